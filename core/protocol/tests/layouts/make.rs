//! Values of every type from a stream of bytes: random streams for properties, a fixed one for vectors. Owns: staying
//! inside the rules that the decoders check, and reaching every variant.

mod collateral;
mod coordinated;
mod policy;
mod sign;
mod state;

use std::collections::{BTreeMap, BTreeSet};

use dstack_protocol::adopt::{Adopt, AdoptBasis};
use dstack_protocol::ceremony::{
    AdmitBody, ComplainBody, DealBody, DealtShare, JoinBody, Message, MessageKind, Open, ReadyBody, Step, StepKind, What,
};
use dstack_protocol::command::{Command, CommandAnswer, Outcome};
use dstack_protocol::genesis::{AllowedNode, Authority, CaAlgorithm, Genesis, GenesisCertificate, SeatGrant};
use dstack_protocol::governance::{Action, ActionKind, Approval, Entry, Mono, Object, OperatorsBody};
use dstack_protocol::hello::Hello;
use dstack_protocol::log::{BeaconBody, Head, HeadCert, Reading, Record, RecordKind, SignedHead};
use dstack_protocol::policy::Rate;
use dstack_protocol::receipt::Receipt;
use dstack_protocol::release::{Ask, Go, Intent, KeyClass, Mode, Out, PartialPlain, RelReq, Wish};
use dstack_protocol::rpc::{BeaconAnswer, ClockAsk, NodesAnswer, ReleaseAnswer, ReleaseAsk};
use dstack_protocol::state::{AdoptedRow, AppRow, BeaconRow, Blob, IntentRow, SeatRow};
use dstack_protocol::{
    AppId, ClusterId, Epoch, Generation, NodeIndex, Platform, Refusal, RefusalCode, RootTag, Seat, TcbStatus, UnixMillis,
};

/// A stream of bytes; zeros after its end.
pub(crate) struct Source<'a>(pub(crate) &'a [u8]);

impl Source<'_> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    /// A number in `0..bound`.
    fn below(&mut self, bound: usize) -> usize {
        usize::from(u16::make(self)) % bound
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    fn list<T: Make>(&mut self, least: usize, most: usize) -> Vec<T> {
        let count = least + self.below(most - least + 1);
        (0..count).map(|_| T::make(self)).collect()
    }

    /// Ascending, no duplicates; at least one.
    fn set<T: Make + Ord>(&mut self, most: usize) -> Vec<T> {
        self.list::<T>(1, most).into_iter().collect::<BTreeSet<T>>().into_iter().collect()
    }

    fn map<K: Make + Ord, V: Make>(&mut self, most: usize) -> BTreeMap<K, V> {
        self.list::<(K, V)>(0, most).into_iter().collect()
    }

    fn bytes(&mut self, least: usize, most: usize) -> Vec<u8> {
        self.list(least, most)
    }

    /// UTF-8 of one and two bytes a character, at most `most` bytes.
    fn text(&mut self, least: usize, most: usize) -> String {
        let mut text = "x".repeat(least);
        for _ in 0..self.below(most - least + 1) / 2 {
            text.push(char::from(self.byte()));
        }
        text
    }
}

/// A value from a stream.
pub(crate) trait Make: Sized {
    fn make(s: &mut Source<'_>) -> Self;
}

macro_rules! numbers {
    ($($t:ty),*) => {$(
        impl Make for $t {
            fn make(s: &mut Source<'_>) -> Self {
                let mut bytes = [0; size_of::<$t>()];
                bytes.fill_with(|| s.byte());
                <$t>::from_be_bytes(bytes)
            }
        }
    )*};
}
numbers!(u8, u16, u32, u64);

macro_rules! wrapped {
    ($($t:ident),*) => {$( impl Make for $t { fn make(s: &mut Source<'_>) -> Self { Self(Make::make(s)) } } )*};
}
wrapped!(UnixMillis, NodeIndex, Seat, Generation, Epoch, ClusterId, AppId);

macro_rules! plain {
    ($($t:ident { $($field:ident),* $(,)? })*) => {$(
        impl Make for $t { fn make(s: &mut Source<'_>) -> Self { Self { $($field: Make::make(s)),* } } }
    )*};
}

use plain;

macro_rules! one_of {
    ($($t:ty => [$($variant:expr),* $(,)?])*) => {$(
        impl Make for $t { fn make(s: &mut Source<'_>) -> Self { s.pick(&[$($variant),*]) } }
    )*};
}

impl<const N: usize> Make for [u8; N] {
    fn make(s: &mut Source<'_>) -> Self {
        let mut bytes = [0; N];
        bytes.fill_with(|| s.byte());
        bytes
    }
}

impl Make for bool {
    fn make(s: &mut Source<'_>) -> Self {
        s.byte() & 1 == 1
    }
}

impl<A: Make, B: Make> Make for (A, B) {
    fn make(s: &mut Source<'_>) -> Self {
        (A::make(s), B::make(s))
    }
}

impl<T: Make> Make for Option<T> {
    fn make(s: &mut Source<'_>) -> Self {
        bool::make(s).then(|| T::make(s))
    }
}

impl Make for Blob {
    fn make(s: &mut Source<'_>) -> Self {
        Self(s.bytes(0, 40))
    }
}

one_of! {
    Platform => [Platform::Tdx, Platform::GcpTdx, Platform::Nitro, Platform::NitroTpm, Platform::SevSnp, Platform::AzureTdx]
    RootTag => [RootTag::Prf, RootTag::Ca, RootTag::Id]
    What => [What::Dkg, What::Reshare, What::Backup, What::Recovery]
    StepKind => [StepKind::Switched, StepKind::Finalized, StepKind::Aborted, StepKind::Reverted]
    KeyClass => [KeyClass::Disk, KeyClass::Env, KeyClass::K256, KeyClass::Custom, KeyClass::P256]
    CaAlgorithm => [CaAlgorithm::Ed25519, CaAlgorithm::P256]
    MessageKind => [
        MessageKind::Admit, MessageKind::Join, MessageKind::Commit, MessageKind::Deal, MessageKind::Ready, MessageKind::Complain,
        MessageKind::Unready, MessageKind::Live, MessageKind::Erased, MessageKind::Vouch, MessageKind::EnvPub,
    ]
    ActionKind => [
        ActionKind::SetAppPolicy, ActionKind::Revoke, ActionKind::Unrevoke, ActionKind::SetOperators, ActionKind::GrantSeat,
        ActionKind::SetSettings, ActionKind::AllowNodeMeasurement, ActionKind::NewGeneration, ActionKind::DestroyGeneration, ActionKind::Resume,
        ActionKind::SetDelegation,
    ]
    AdoptBasis => [AdoptBasis::Booted, AdoptBasis::Asked]
    Mode => [Mode::Client, Mode::Legacy, Mode::Env]
    TcbStatus => [
        TcbStatus::UpToDate, TcbStatus::SwHardeningNeeded, TcbStatus::ConfigurationNeeded,
        TcbStatus::ConfigurationAndSwHardeningNeeded, TcbStatus::OutOfDate, TcbStatus::OutOfDateConfigurationNeeded,
    ]
}

impl Make for RecordKind {
    fn make(s: &mut Source<'_>) -> Self {
        s.pick(&Self::ALL)
    }
}

impl Make for RefusalCode {
    fn make(s: &mut Source<'_>) -> Self {
        s.pick(Self::ALL)
    }
}

plain! {
    DealtShare { to, ephemeral, ct }
    ComplainBody { dealer, shared, c, s }
    Step { kind, join_id }
    Outcome { pos, code, retry_after_ms }
    Approval { operator, sig }
    Mono { index, elapsed_ms, sig }
    Hello { cluster_id, seat, node_key, sig }
    Record { pos, log_time, epoch, kind, outcome, body_hash }
    Head { members_version, size, log_root, state_root }
    SignedHead { head, index, sig }
    Reading { prev_beacon_pos, prev_beacon, index, unix_ms, rand, sig }
    Go { intent_id, pos }
    BeaconAnswer { cluster_id, generation, beacon_pos, beacon, log_time }
    ClockAsk { prev_beacon_pos, prev_beacon }
    Rate { per_second, burst }
    BeaconRow { value, log_time }
    SeatRow { index, node_key, incarnation }
    AppRow { policy_hash, tokens_milli, refilled, adopted }
    AdoptedRow { adopt, since }
    Adopt { app_id, basis, author, beacon_pos, sig }
    IntentRow { pos, size, log_root, log_time, policy_hash, collateral_id, members_version, generation, app_id, mode, coordinator, classes }
}

impl Make for Message {
    fn make(s: &mut Source<'_>) -> Self {
        Self { kind: Make::make(s), index: Make::make(s), inst: Make::make(s), body: s.bytes(0, 60), sig: Make::make(s) }
    }
}

impl Make for AdmitBody {
    fn make(s: &mut Source<'_>) -> Self {
        Self {
            seat: Make::make(s),
            node_key: Make::make(s),
            incarnation: Make::make(s),
            beacon_pos: Make::make(s),
            beacon: Make::make(s),
            evidence: s.bytes(0, 60),
        }
    }
}

impl Make for JoinBody {
    fn make(s: &mut Source<'_>) -> Self {
        let keys: BTreeMap<RootTag, [u8; 32]> = s.map(3);
        Self { beacon_pos: Make::make(s), beacon: Make::make(s), keys: keys.into_iter().collect(), evidence: s.bytes(0, 60) }
    }
}

impl DealBodyOf {
    fn body(s: &mut Source<'_>, point_bytes: usize, with_possession: bool) -> DealBody {
        let commitments = (0..=s.below(4)).map(|_| s.bytes(point_bytes, point_bytes)).collect();
        let shares: BTreeMap<NodeIndex, DealtShare> = s.list::<DealtShare>(0, 4).into_iter().map(|share| (share.to, share)).collect();
        DealBody {
            commitments,
            possession: with_possession.then(|| (Make::make(s), Make::make(s))),
            shares: shares.into_values().collect(),
        }
    }
}

/// A Deal of a group with points of 32 bytes, as at genesis; its decoder needs to be told so.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DealBodyOf(pub(crate) DealBody);

impl Make for DealBodyOf {
    fn make(s: &mut Source<'_>) -> Self {
        Self(Self::body(s, 32, true))
    }
}

/// A Deal of a resharing in a group with points of 33 bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ReshareDeal(pub(crate) DealBody);

impl Make for ReshareDeal {
    fn make(s: &mut Source<'_>) -> Self {
        Self(DealBodyOf::body(s, 33, false))
    }
}

impl Make for ReadyBody {
    fn make(s: &mut Source<'_>) -> Self {
        Self { transcript: Make::make(s), vk: s.bytes(0, 64), setup: Make::make(s) }
    }
}

fn indices(s: &mut Source<'_>) -> Vec<NodeIndex> {
    s.set::<NodeIndex>(5).into_iter().map(|i| NodeIndex(i.0 % 0x7fff + 1)).collect::<BTreeSet<_>>().into_iter().collect()
}

impl Make for Open {
    fn make(s: &mut Source<'_>) -> Self {
        Self {
            generation: Make::make(s),
            what: Make::make(s),
            old_epoch: Make::make(s),
            new_epoch: Make::make(s),
            attempt: Make::make(s),
            t: Make::make(s),
            roots: s.set(3),
            dealers: indices(s),
            holders: indices(s),
        }
    }
}

impl Make for Command {
    fn make(s: &mut Source<'_>) -> Self {
        let which = s.below(13);
        Self::variant(s, which)
    }
}

/// Types whose variants are made one by one.
pub(crate) trait Variants: Sized {
    fn variant(s: &mut Source<'_>, which: usize) -> Self;
}

impl Variants for Command {
    fn variant(s: &mut Source<'_>, which: usize) -> Self {
        match which {
            0 => Self::Genesis { genesis: s.bytes(0, 60), collateral: s.bytes(0, 60) },
            1 => Self::Beacon(Make::make(s)),
            2 => Self::Intents(s.list(1, 3)),
            3 => Self::Ceremony(Make::make(s)),
            4 => Self::Open(Make::make(s)),
            5 => Self::Step(Make::make(s)),
            6 => Self::Governance(Make::make(s)),
            7 => Self::Checkpoint,
            8 => Self::Collateral(Make::make(s)),
            9 => Self::Sign(Make::make(s)),
            10 => Self::Signed(Make::make(s)),
            11 => Self::Env(Make::make(s)),
            12 => Self::Adopt(Make::make(s)),
            _ => Self::Coordinated(Make::make(s)),
        }
    }
}

impl Make for CommandAnswer {
    fn make(s: &mut Source<'_>) -> Self {
        Self { outcomes: s.list(0, 5), size: Make::make(s), log_root: Make::make(s) }
    }
}

impl Make for AllowedNode {
    fn make(s: &mut Source<'_>) -> Self {
        Self { platform: Make::make(s), measurement: s.bytes(0, 60) }
    }
}

impl Make for Genesis {
    fn make(s: &mut Source<'_>) -> Self {
        let n = s.pick(&[1, 3, 4, 5, 7]);
        let on_chain = bool::make(s);
        let operators: Vec<[u8; 32]> = s.set(5);
        let most = u8::try_from(operators.len()).unwrap();
        let k = u8::make(s) % most + 1;
        let seat = |s: &mut Source<'_>, number: u16| {
            let mut platform_identity = s.bytes(0, 40);
            // One seat for each identity.
            platform_identity.extend(number.to_be_bytes());
            SeatGrant { seat: Seat(number), address: s.text(0, 40), platform_identity }
        };
        Self {
            random: Make::make(s),
            n,
            t: Self::threshold_for(n),
            f: if n >= 4 { u16::make(s) % 2 } else { 0 },
            ca_algorithm: Make::make(s),
            authority: if on_chain { Authority::OnChain } else { Authority::OperatorQuorum },
            chain_settings: if on_chain { s.bytes(1, 40) } else { Vec::new() },
            k,
            r: u8::make(s) % k + 1,
            timelock_s: Make::make(s),
            operators,
            allowed_nodes: s.set(3),
            software_roots: s.list::<[u8; 32]>(0, 2).into_iter().collect::<BTreeSet<_>>().into_iter().collect(),
            seats: (1..=n).map(|number| seat(s, number)).collect(),
            collateral_id: Make::make(s),
        }
    }
}

impl Make for NodesAnswer {
    fn make(s: &mut Source<'_>) -> Self {
        let genesis = Genesis::make(s);
        let own = Seat(u16::make(s) % genesis.n + 1);
        let seats = (1..=genesis.n).map(Seat).filter(|_| bool::make(s)).collect();
        Self { genesis, own, seats }
    }
}

impl Make for GenesisCertificate {
    fn make(s: &mut Source<'_>) -> Self {
        Self {
            seat: Make::make(s),
            generation: Make::make(s),
            root: Make::make(s),
            public_key: s.bytes(0, 64),
            transcript: Make::make(s),
            evidence: s.bytes(0, 60),
        }
    }
}

impl Make for Object {
    fn make(s: &mut Source<'_>) -> Self {
        match s.below(8) {
            0 => Self::App(Make::make(s)),
            1 => Self::Measurement(s.bytes(1, 40)),
            2 => Self::Platform(Make::make(s)),
            3 => Self::Seat(Make::make(s)),
            4 => Self::Operators,
            5 => Self::Settings,
            6 => Self::Delegation,
            _ => Self::Generation(Make::make(s)),
        }
    }
}

impl Make for Action {
    fn make(s: &mut Source<'_>) -> Self {
        let kind = ActionKind::make(s);
        let object = match kind {
            ActionKind::SetAppPolicy => Object::App(Make::make(s)),
            ActionKind::Revoke | ActionKind::Unrevoke => match Object::make(s) {
                Object::Operators | Object::Settings => Object::Platform(Make::make(s)),
                object => object,
            },
            ActionKind::SetOperators => Object::Operators,
            ActionKind::GrantSeat => Object::Seat(Make::make(s)),
            ActionKind::SetSettings | ActionKind::Resume => Object::Settings,
            ActionKind::AllowNodeMeasurement => Object::Measurement(s.bytes(1, 40)),
            ActionKind::NewGeneration | ActionKind::DestroyGeneration => Object::Generation(Make::make(s)),
            ActionKind::SetDelegation => Object::Delegation,
        };
        let empty = matches!(kind, ActionKind::Revoke | ActionKind::Unrevoke);
        Self {
            cluster_id: Make::make(s),
            action_id: Make::make(s),
            kind,
            object,
            base_version: Make::make(s),
            body: if empty { Vec::new() } else { s.bytes(0, 60) },
            not_after: Make::make(s),
        }
    }
}

impl Make for Entry {
    fn make(s: &mut Source<'_>) -> Self {
        let which = s.below(3);
        Self::variant(s, which)
    }
}

impl Variants for Entry {
    fn variant(s: &mut Source<'_>, which: usize) -> Self {
        match which {
            0 => Self::Propose { action: Make::make(s), approvals: s.list(0, 3) },
            1 => Self::Approve { action_id: Make::make(s), approvals: s.list(0, 3) },
            _ => Self::Activate { action_id: Make::make(s), monos: s.list(0, 3) },
        }
    }
}

impl Make for OperatorsBody {
    fn make(s: &mut Source<'_>) -> Self {
        let operators: Vec<[u8; 32]> = s.set(5);
        let k = u8::make(s) % u8::try_from(operators.len()).unwrap() + 1;
        Self { k, r: u8::make(s) % k + 1, operators }
    }
}

impl Make for HeadCert {
    fn make(s: &mut Source<'_>) -> Self {
        let signatures: BTreeMap<NodeIndex, [u8; 64]> = s.map(4);
        Self { head: Make::make(s), signatures: signatures.into_iter().collect() }
    }
}

impl Make for BeaconBody {
    fn make(s: &mut Source<'_>) -> Self {
        let readings: BTreeMap<NodeIndex, Reading> = s.list::<Reading>(1, 4).into_iter().map(|x| (x.index, x)).collect();
        Self { cluster_id: Make::make(s), readings: readings.into_values().collect() }
    }
}

impl Make for Wish {
    fn make(s: &mut Source<'_>) -> Self {
        let class = KeyClass::make(s);
        let ctx = match class {
            KeyClass::Disk if bool::make(s) => s.bytes(20, 20),
            KeyClass::Custom => s.text(1, 30).into_bytes(),
            _ => Vec::new(),
        };
        Self::new(class, ctx).unwrap()
    }
}

impl Make for RelReq {
    fn make(s: &mut Source<'_>) -> Self {
        // No point of low order, also where the stream has ended.
        let mut epk: [u8; 32] = Make::make(s);
        epk[1] |= 2;
        Self {
            cluster_id: Make::make(s),
            generation: Make::make(s),
            beacon_pos: Make::make(s),
            beacon: Make::make(s),
            mode: Make::make(s),
            evidence_hash: Make::make(s),
            epk,
            nonce: Make::make(s),
            app_id: Make::make(s),
            // Any order is allowed, so the ascending one is turned around.
            wishes: s.set(16).into_iter().rev().collect(),
        }
    }
}

impl Make for Intent {
    fn make(s: &mut Source<'_>) -> Self {
        let mode = Mode::make(s);
        let coordinator = if mode == Mode::Client { NodeIndex(0) } else { NodeIndex(u16::make(s).max(1)) };
        Self {
            req_hash: Make::make(s),
            evidence_hash: Make::make(s),
            generation: Make::make(s),
            mode,
            coordinator,
            beacon_pos: Make::make(s),
            app_id: Make::make(s),
            wishes: s.list(1, 16),
        }
    }
}

impl Make for Ask {
    fn make(s: &mut Source<'_>) -> Self {
        Self { request: Make::make(s), sig: Make::make(s), session_pos: Make::make(s), spki: s.bytes(0, 91), evidence: s.bytes(0, 60) }
    }
}

impl Make for PartialPlain {
    fn make(s: &mut Source<'_>) -> Self {
        Self {
            index: Make::make(s),
            generation: Make::make(s),
            epoch: Make::make(s),
            pos: Make::make(s),
            size: Make::make(s),
            log_root: Make::make(s),
            vk: Make::make(s),
            elements: s.list(1, 16).into(),
            c: Make::make(s),
            s: Make::make(s),
        }
    }
}

impl Make for Out {
    fn make(s: &mut Source<'_>) -> Self {
        Self { index: Make::make(s), epoch: Make::make(s), kem: Make::make(s), ct: s.bytes(0, 60) }
    }
}

impl Make for Receipt {
    fn make(s: &mut Source<'_>) -> Self {
        Self {
            generation: Make::make(s),
            intent: Make::make(s),
            record: Make::make(s),
            size: Make::make(s),
            log_root: Make::make(s),
            path: s.list(0, 5),
        }
    }
}

impl Make for Refusal {
    fn make(s: &mut Source<'_>) -> Self {
        Self::new(Make::make(s), s.text(0, 60), s.text(0, 60)).retry_after(Make::make(s))
    }
}

impl Make for ReleaseAsk {
    fn make(s: &mut Source<'_>) -> Self {
        Self { request: Make::make(s), sig: Make::make(s), exclude: s.list(0, 4) }
    }
}

impl Make for ReleaseAnswer {
    fn make(s: &mut Source<'_>) -> Self {
        Self { receipt: Make::make(s), outs: s.list(0, 3) }
    }
}
