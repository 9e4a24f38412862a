//! Every layout under its name, so that each test goes over all of them.

use dstack_protocol::ceremony::{AdmitBody, ComplainBody, DealBody, JoinBody, Message, Open, ReadyBody, Step};
use dstack_protocol::collateral::{Pin, PinRequest};
use dstack_protocol::command::{Command, CommandAnswer};
use dstack_protocol::coordinated::CoordinatorWord;
use dstack_protocol::env::{EnvAttempt, EnvPubBody};
use dstack_protocol::genesis::{Genesis, GenesisCertificate};
use dstack_protocol::governance::{Action, Entry, OperatorsBody};
use dstack_protocol::hello::Hello;
use dstack_protocol::log::{BeaconBody, Head, HeadCert, Record, SignedHead};
use dstack_protocol::policy::AppPolicy;
use dstack_protocol::receipt::Receipt;
use dstack_protocol::release::{Ask, Go, Intent, Out, PartialPlain, RelReq};
use dstack_protocol::rpc::{BeaconAnswer, ClockAsk, NodesAnswer, ReleaseAnswer, ReleaseAsk};
use dstack_protocol::sign::{AppPkClaim, SignAsk, SignObject, Signed};
use dstack_protocol::state::State;
use dstack_protocol::{DecodeError, Refusal, Wire};

use crate::make::{DealBodyOf, Make, ReshareDeal, Source, Variants};

/// A type with its codec, however that is called.
pub(crate) trait Format: Make + PartialEq {
    fn to_wire(&self) -> Vec<u8>;
    fn from_wire(bytes: &[u8]) -> Result<Self, DecodeError>;
    /// The fields with their names, for people and for the vectors.
    fn show(&self) -> String;
}

macro_rules! wire {
    ($($t:ty),* $(,)?) => {$(
        impl Format for $t {
            fn to_wire(&self) -> Vec<u8> { self.encode() }
            fn from_wire(bytes: &[u8]) -> Result<Self, DecodeError> { Self::decode(bytes) }
            fn show(&self) -> String { format!("{self:?}") }
        }
    )*};
}
wire!(
    AdmitBody,
    ComplainBody,
    JoinBody,
    Message,
    Open,
    ReadyBody,
    Step,
    Command,
    CommandAnswer,
    CoordinatorWord,
    Pin,
    PinRequest,
    Genesis,
    GenesisCertificate,
    Action,
    Entry,
    OperatorsBody,
    Hello,
    BeaconBody,
    Head,
    HeadCert,
    Record,
    SignedHead,
    AppPolicy,
    Receipt,
    Ask,
    Go,
    Intent,
    Out,
    RelReq,
    BeaconAnswer,
    NodesAnswer,
    ClockAsk,
    ReleaseAnswer,
    ReleaseAsk,
    Refusal,
    SignObject,
    SignAsk,
    Signed,
    AppPkClaim,
    EnvAttempt,
    EnvPubBody,
);

impl Format for PartialPlain {
    fn to_wire(&self) -> Vec<u8> {
        self.encode()
    }
    fn from_wire(bytes: &[u8]) -> Result<Self, DecodeError> {
        Self::decode(bytes)
    }
    /// The type has no `Debug` on purpose; test values are no secrets.
    fn show(&self) -> String {
        let Self { index, generation, epoch, pos, size, log_root, vk, elements, c, s } = self;
        format!("{:?}", (index, generation, epoch, pos, size, log_root, vk, elements.as_slice(), c, s))
    }
}

impl Format for DealBodyOf {
    fn to_wire(&self) -> Vec<u8> {
        self.0.encode()
    }
    fn from_wire(bytes: &[u8]) -> Result<Self, DecodeError> {
        DealBody::decode(bytes, 32, true).map(Self)
    }
    fn show(&self) -> String {
        format!("{:?}", self.0)
    }
}

impl Format for ReshareDeal {
    fn to_wire(&self) -> Vec<u8> {
        self.0.encode()
    }
    fn from_wire(bytes: &[u8]) -> Result<Self, DecodeError> {
        DealBody::decode(bytes, 33, false).map(Self)
    }
    fn show(&self) -> String {
        format!("{:?}", self.0)
    }
}

impl Format for State {
    fn to_wire(&self) -> Vec<u8> {
        self.to_bytes()
    }
    fn from_wire(bytes: &[u8]) -> Result<Self, DecodeError> {
        Self::from_bytes(bytes)
    }
    fn show(&self) -> String {
        format!("{self:?}")
    }
}

/// Bytes to what is shown and the bytes again.
pub(crate) type Through = fn(&[u8]) -> Result<(String, Vec<u8>), DecodeError>;

/// A layout, or one variant of it, without its type.
pub(crate) struct Layout {
    /// Name of its vector.
    pub(crate) name: &'static str,
    /// A value's encoding from a stream.
    pub(crate) make: fn(&mut Source<'_>) -> Vec<u8>,
    /// Decodes, shows, encodes again.
    pub(crate) through: Through,
    /// Makes a value and fails unless it survives the way there and back.
    pub(crate) round_trip: fn(&mut Source<'_>),
}

fn through<F: Format>(bytes: &[u8]) -> Result<(String, Vec<u8>), DecodeError> {
    F::from_wire(bytes).map(|value| (value.show(), value.to_wire()))
}

fn round_trip<F: Format>(s: &mut Source<'_>) {
    let value = F::make(s);
    let decoded = F::from_wire(&value.to_wire());
    assert!(decoded.as_ref() == Ok(&value), "{} came back as {:?}", value.show(), decoded.map(|value| value.show()));
}

const fn layout<F: Format>(name: &'static str) -> Layout {
    Layout { name, make: |s| F::make(s).to_wire(), through: through::<F>, round_trip: round_trip::<F> }
}

macro_rules! variants {
    ($t:ty: $($number:literal $name:literal),*) => {
        [$(Layout {
            name: $name,
            make: |s| <$t>::variant(s, $number).to_wire(),
            through: through::<$t>,
            round_trip: round_trip::<$t>,
        }),*]
    };
}

/// All of them.
pub(crate) fn layouts() -> Vec<Layout> {
    let mut all = vec![
        layout::<Message>("ceremony-message"),
        layout::<AdmitBody>("admit-body"),
        layout::<JoinBody>("join-body"),
        layout::<DealBodyOf>("deal-body"),
        layout::<ReshareDeal>("deal-body-reshare"),
        layout::<ReadyBody>("ready-body"),
        layout::<ComplainBody>("complain-body"),
        layout::<Open>("open"),
        layout::<Step>("step"),
        layout::<CommandAnswer>("command-answer"),
        layout::<CoordinatorWord>("coordinator-word"),
        layout::<Pin>("collateral-pin"),
        layout::<PinRequest>("collateral-pin-request"),
        layout::<Genesis>("genesis"),
        layout::<GenesisCertificate>("genesis-certificate"),
        layout::<Action>("action"),
        layout::<OperatorsBody>("operators-body"),
        layout::<Hello>("hello"),
        layout::<Record>("record"),
        layout::<Head>("head"),
        layout::<SignedHead>("signed-head"),
        layout::<HeadCert>("head-certificate"),
        layout::<HeadCert>("head-certificate-signed"),
        layout::<BeaconBody>("beacon-body"),
        layout::<AppPolicy>("app-policy"),
        layout::<AppPolicy>("app-policy-tcb"),
        layout::<Receipt>("receipt"),
        layout::<Refusal>("refusal"),
        layout::<RelReq>("release-request"),
        layout::<Intent>("intent"),
        layout::<Ask>("ask"),
        layout::<Go>("go"),
        layout::<PartialPlain>("partial"),
        layout::<Out>("out"),
        layout::<BeaconAnswer>("beacon-answer"),
        layout::<NodesAnswer>("nodes-answer"),
        layout::<ReleaseAsk>("release-ask"),
        layout::<ReleaseAnswer>("release-answer"),
        layout::<ClockAsk>("clock-ask"),
        layout::<State>("state"),
        layout::<Signed>("signed"),
        layout::<AppPkClaim>("app-pk-claim"),
        layout::<EnvAttempt>("env-attempt"),
        layout::<EnvPubBody>("env-pub-body"),
    ];
    all.extend(variants!(AppPolicy: 0 "app-policy-authority"));
    all.extend(variants!(Command:
        0 "command-genesis", 1 "command-beacon", 2 "command-intents", 3 "command-ceremony", 4 "command-open", 5 "command-step",
        6 "command-governance", 7 "command-checkpoint", 8 "command-collateral",
        9 "command-sign", 10 "command-signed", 11 "command-env", 12 "command-adopt",
        13 "command-coordinated"));
    all.extend(variants!(SignObject:
        0 "sign-object-root-ca", 1 "sign-object-app-ca", 2 "sign-object-issuing-ca", 3 "sign-object-generation",
        4 "sign-object-app-key", 5 "sign-object-env-key", 6 "sign-object-env-key-at"));
    all.extend(variants!(SignAsk: 0 "sign-ask", 1 "sign-ask-release", 5 "sign-ask-claim"));
    all.extend(variants!(Entry: 0 "entry-propose", 1 "entry-approve", 1 "entry-approve-given", 2 "entry-activate"));
    all
}
