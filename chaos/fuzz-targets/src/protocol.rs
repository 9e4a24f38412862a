//! Every decoder of `protocol`, the replicated state included: the first byte selects the format. What decodes must encode to the same bytes: one encoding for each value.

use dstack_protocol::Wire;
use dstack_protocol::{
    ceremony, command, coordinated, env, genesis, governance, hello, log, policy, receipt, refusal, release, rpc, sign, state,
};

/// Calls `judge` for the format with the number `selected`.
macro_rules! select {
    ($selected:expr, $bytes:expr, $($format:ty),+ $(,)?) => {{
        let formats: &[fn(&[u8])] = &[$(judge::<$format>),+];
        if let Some(judge) = formats.get(usize::from($selected)) {
            judge($bytes);
        }
    }};
}

fn judge<F: Wire>(bytes: &[u8]) {
    if let Ok(value) = F::decode(bytes) {
        assert_eq!(value.encode(), bytes, "one encoding for each value");
    }
}

/// The two that are no `Wire`: a Deal needs to know its group, the state has no cap of its own.
fn judge_others(selected: u8, bytes: &[u8]) {
    match selected {
        0xff => {
            if let Ok(state) = state::State::from_bytes(bytes) {
                assert_eq!(state.to_bytes(), bytes, "one encoding for each state");
            }
        }
        0xfc..=0xfe => {
            let (point_bytes, with_possession) = if selected == 0xfc { (33, false) } else { (32, selected == 0xfe) };
            if let Ok(deal) = ceremony::DealBody::decode(bytes, point_bytes, with_possession) {
                assert_eq!(deal.encode(), bytes, "one encoding for each deal");
            }
        }
        _ => {}
    }
}

/// See the module text.
pub(crate) fn run(data: &[u8]) {
    let Some((selected, bytes)) = data.split_first() else { return };
    judge_others(*selected, bytes);
    select!(
        *selected,
        bytes,
        ceremony::Message,
        ceremony::AdmitBody,
        ceremony::JoinBody,
        ceremony::ReadyBody,
        ceremony::ComplainBody,
        ceremony::Open,
        ceremony::Step,
        command::Command,
        command::CommandAnswer,
        genesis::Genesis,
        genesis::GenesisCertificate,
        governance::Action,
        governance::Entry,
        governance::OperatorsBody,
        hello::Hello,
        log::Record,
        log::Head,
        log::SignedHead,
        log::HeadCert,
        log::BeaconBody,
        policy::AppPolicy,
        receipt::Receipt,
        refusal::Refusal,
        release::RelReq,
        release::Intent,
        release::Ask,
        release::Go,
        release::PartialPlain,
        release::Out,
        rpc::BeaconAnswer,
        rpc::ReleaseAsk,
        rpc::ReleaseAnswer,
        rpc::ClockAsk,
        dstack_audit::Frontier,
        sign::SignObject,
        sign::SignAsk,
        sign::Signed,
        sign::AppPkClaim,
        env::EnvAttempt,
        env::EnvPubBody,
        rpc::NodesAnswer,
        coordinated::CoordinatorWord,
    );
}
