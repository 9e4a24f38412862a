//! Every decoder of `protocol`: the first byte selects the format. What decodes must encode to the same bytes: one encoding for each value.
#![no_main]

use dstack_protocol::Wire;
use dstack_protocol::{ceremony, command, genesis, governance, hello, log, policy, receipt, refusal, release, rpc};
use libfuzzer_sys::fuzz_target;

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

fuzz_target!(|data: &[u8]| {
    let Some((selected, bytes)) = data.split_first() else { return };
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
    );
});
