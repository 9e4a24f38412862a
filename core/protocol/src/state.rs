//! The replicated state as data: ordered maps, one encoding per value (threshold.md §2.6 `state`).
//!
//! Owns: the canonical serialization that `state_root` hashes and snapshots carry, with the signatures that its content
//! rests on. Never: a rule; those live in the machine (`raft`) and in `policy`. Holds no head certificate and no secret.

use std::collections::{BTreeMap, BTreeSet};

use crate::adopt::{Adopt, AdoptBasis};
use crate::ceremony::{Message, Open};
use crate::codec::{DecodeError, Reader, Wire, Writer};
use crate::genesis::Genesis;
use crate::governance::{Action, Approval, Mono, Object};
use crate::ids::{AppId, Epoch, Generation, NodeIndex, RootTag, Seat, UnixMillis};
use crate::limits::{APPROVALS_MAX, COLLATERAL_BYTES_MAX, COMMAND_BYTES_MAX, GENESIS_BYTES_MAX, NODES_MAX, POLICY_BYTES_MAX};
use crate::release::{KeyClass, Mode};
use crate::sign::SignKey;

/// A value inside the state. Like [`Wire`], without a cap of its own: the snapshot is capped as a whole.
pub trait Canonical: Sized {
    /// Appends the encoding.
    fn put(&self, w: &mut Writer);
    /// Reads one value.
    ///
    /// # Errors
    /// [`DecodeError`] names the field.
    fn take(r: &mut Reader<'_>) -> Result<Self, DecodeError>;
}

macro_rules! canonical_number {
    ($($t:ty => $f:ident),*) => {$(
        impl Canonical for $t {
            fn put(&self, w: &mut Writer) { w.$f(*self); }
            fn take(r: &mut Reader<'_>) -> Result<Self, DecodeError> { r.$f("number") }
        }
    )*};
}
canonical_number!(u8 => u8, u16 => u16, u32 => u32, u64 => u64);

macro_rules! canonical_id {
    ($($t:ident),*) => {$(
        impl Canonical for $t {
            fn put(&self, w: &mut Writer) { self.0.put(w); }
            fn take(r: &mut Reader<'_>) -> Result<Self, DecodeError> { Canonical::take(r).map(Self) }
        }
    )*};
}
canonical_id!(UnixMillis, NodeIndex, Seat, Generation, Epoch, AppId);

impl<const N: usize> Canonical for [u8; N] {
    fn put(&self, w: &mut Writer) {
        w.raw(self);
    }
    fn take(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        r.array("bytes")
    }
}

impl Canonical for bool {
    fn put(&self, w: &mut Writer) {
        w.u8(u8::from(*self));
    }
    fn take(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        r.flag("flag")
    }
}

impl Canonical for RootTag {
    fn put(&self, w: &mut Writer) {
        w.u8(self.byte());
    }
    fn take(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Self::read(r)
    }
}

impl Canonical for Mode {
    fn put(&self, w: &mut Writer) {
        w.u8(*self as u8);
    }
    fn take(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Self::read(r)
    }
}

impl Canonical for KeyClass {
    fn put(&self, w: &mut Writer) {
        w.u8(self.byte());
    }
    fn take(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Self::read(r)
    }
}

impl Canonical for AdoptBasis {
    fn put(&self, w: &mut Writer) {
        w.u8(*self as u8);
    }
    fn take(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Self::read(r)
    }
}

impl Canonical for Object {
    fn put(&self, w: &mut Writer) {
        self.write(w);
    }
    fn take(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Self::read(r)
    }
}

impl<A: Canonical, B: Canonical> Canonical for (A, B) {
    fn put(&self, w: &mut Writer) {
        self.0.put(w);
        self.1.put(w);
    }
    fn take(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok((A::take(r)?, B::take(r)?))
    }
}

impl<T: Canonical> Canonical for Option<T> {
    fn put(&self, w: &mut Writer) {
        match self {
            None => {
                w.u8(0);
            }
            Some(value) => {
                w.u8(1);
                value.put(w);
            }
        }
    }
    fn take(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(if r.flag("option")? { Some(<T as Canonical>::take(r)?) } else { None })
    }
}

impl<T: Canonical> Canonical for Vec<T> {
    fn put(&self, w: &mut Writer) {
        w.u32(u32::try_from(self.len()).expect("lists of the state are capped far below 2^32"));
        for item in self {
            item.put(w);
        }
    }
    fn take(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let count = count(r)?;
        r.list("list", count, 1, T::take)
    }
}

impl<K: Canonical + Ord, V: Canonical> Canonical for BTreeMap<K, V> {
    fn put(&self, w: &mut Writer) {
        w.u32(u32::try_from(self.len()).expect("maps of the state are capped far below 2^32"));
        for (key, value) in self {
            key.put(w);
            value.put(w);
        }
    }
    fn take(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let count = count(r)?;
        let rows = r.list("map", count, 1, <(K, V)>::take)?;
        crate::codec::ascending("map", rows.iter().map(|(key, _)| key))?;
        Ok(rows.into_iter().collect())
    }
}

impl<K: Canonical + Ord> Canonical for BTreeSet<K> {
    fn put(&self, w: &mut Writer) {
        w.u32(u32::try_from(self.len()).expect("sets of the state are capped far below 2^32"));
        for key in self {
            key.put(w);
        }
    }
    fn take(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let count = count(r)?;
        let rows = r.list("set", count, 1, K::take)?;
        crate::codec::ascending("set", rows.iter())?;
        Ok(rows.into_iter().collect())
    }
}

fn count(r: &mut Reader<'_>) -> Result<usize, DecodeError> {
    Ok(usize::try_from(r.u32("count")?).unwrap_or(usize::MAX))
}

/// Bytes of a bounded length inside the state.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Blob(pub Vec<u8>);

impl Canonical for Blob {
    fn put(&self, w: &mut Writer) {
        w.lp4(&self.0);
    }
    fn take(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Self(r.lp4("blob", COMMAND_BYTES_MAX)?.to_vec()))
    }
}

macro_rules! canonical_wire {
    ($($t:ty => $cap:expr),*) => {$(
        impl Canonical for $t {
            fn put(&self, w: &mut Writer) { w.lp4(&self.encode()); }
            fn take(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
                <$t as Wire>::decode(r.lp4(stringify!($t), $cap)?)
            }
        }
    )*};
}
canonical_wire!(
    Genesis => GENESIS_BYTES_MAX,
    Message => <Message as Wire>::BYTES_MAX,
    Open => <Open as Wire>::BYTES_MAX,
    Action => <Action as Wire>::BYTES_MAX,
    Adopt => <Adopt as Wire>::BYTES_MAX
);

impl Canonical for Approval {
    fn put(&self, w: &mut Writer) {
        w.raw(&self.operator).raw(&self.sig);
    }
    fn take(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Self { operator: r.array("operator")?, sig: r.array("sig")? })
    }
}

impl Canonical for Mono {
    fn put(&self, w: &mut Writer) {
        w.u16(self.index.0).u64(self.elapsed_ms).raw(&self.sig);
    }
    fn take(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Self { index: NodeIndex::read("i", r)?, elapsed_ms: r.u64("elapsed_ms")?, sig: r.array("sig")? })
    }
}

macro_rules! state_struct {
    ($(#[$doc:meta])* $name:ident { $($(#[$fdoc:meta])* $field:ident : $t:ty,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq)]
        pub struct $name { $($(#[$fdoc])* pub $field: $t,)* }

        impl Canonical for $name {
            fn put(&self, w: &mut Writer) { $(self.$field.put(w);)* }
            fn take(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
                Ok(Self { $($field: <$t as Canonical>::take(r)?,)* })
            }
        }
    };
}

state_struct!(
    /// A beacon in the state.
    BeaconRow {
        /// `log_root` at size `pos + 1`.
        value: [u8; 32],
        /// Log time it set.
        log_time: UnixMillis,
    }
);
state_struct!(
    /// Signers of one members version.
    Members {
        /// Log size from which the version holds.
        from_size: u64,
        /// Node key of each signer.
        signers: BTreeMap<NodeIndex, [u8; 32]>,
    }
);
state_struct!(
    /// Who holds a seat.
    SeatRow {
        /// Its index.
        index: NodeIndex,
        /// Its node key.
        node_key: [u8; 32],
        /// Its incarnation.
        incarnation: u64,
    }
);
state_struct!(
    /// An Admit with the vouches for it so far.
    AdmitRow {
        /// The Admit.
        admit: Message,
        /// Log time at which it was applied.
        since: UnixMillis,
        /// Vouches by their author.
        vouches: BTreeMap<NodeIndex, Message>,
    }
);
state_struct!(
    /// An attempt of a ceremony with every message that counted.
    AttemptRow {
        /// The entry that opened it.
        open: Open,
        /// Log time at which the present round began.
        round_since: UnixMillis,
        /// Joins by author.
        joins: BTreeMap<NodeIndex, Message>,
        /// Messages after the joins, in log order; replayed, they give the ceremony's state.
        messages: Vec<Message>,
        /// The attempt ended without a result: it can only be aborted.
        ended: bool,
        /// Who is convicted.
        convicted: BTreeSet<NodeIndex>,
    }
);
state_struct!(
    /// A root in force.
    RootRow {
        /// Epoch of the sharing.
        epoch: Epoch,
        /// Threshold.
        t: u16,
        /// Public key.
        public_key: Blob,
        /// Verification key of each holder.
        vks: BTreeMap<NodeIndex, Blob>,
        /// Transcript.
        transcript: [u8; 32],
        /// Instance.
        inst: [u8; 32],
        /// The attempt it came from, one of [`State::ceremonies`].
        attempt: u32,
    }
);
state_struct!(
    /// The adoption of an app that only the authority knows.
    AdoptedRow {
        /// The signed word of the node that adopted it.
        adopt: Adopt,
        /// Log time when it was applied.
        since: UnixMillis,
    }
);
state_struct!(
    /// An app.
    AppRow {
        /// Policy in force.
        policy_hash: [u8; 32],
        /// Tokens of the rate limit, in thousandths.
        tokens_milli: u64,
        /// Log time of the last refill.
        refilled: UnixMillis,
        /// How it came here without the operators; `None`: they registered it.
        adopted: Option<AdoptedRow>,
    }
);
state_struct!(
    /// A row of the table of open intents (threshold.md §2.2).
    IntentRow {
        /// Leaf number.
        pos: u64,
        /// Leaves at the end of the entry that holds it.
        size: u64,
        /// Log root at that size.
        log_root: [u8; 32],
        /// Log time when it was applied.
        log_time: UnixMillis,
        /// Policy in force for its app.
        policy_hash: [u8; 32],
        /// Collateral in force.
        collateral_id: [u8; 32],
        /// Members version.
        members_version: u64,
        /// Generation.
        generation: Generation,
        /// The app.
        app_id: AppId,
        /// Who combines.
        mode: Mode,
        /// 0 in mode C, else the combining node.
        coordinator: NodeIndex,
        /// Key classes asked for.
        classes: BTreeSet<KeyClass>,
    }
);
state_struct!(
    /// A bucket of tokens that log time refills.
    BucketRow {
        /// Tokens, in thousandths.
        tokens_milli: u64,
        /// Log time of the last refill.
        refilled: UnixMillis,
    }
);
state_struct!(
    /// An action that waits for approvals or its timelock.
    PendingRow {
        /// The action.
        action: Action,
        /// Approvals by operator.
        approvals: Vec<Approval>,
        /// Log time when it had all approvals.
        ready_since: Option<UnixMillis>,
    }
);
state_struct!(
    /// Why an object is as it is: the last applied action, with its signatures.
    ProofRow {
        /// The action.
        action: Action,
        /// Approvals it had.
        approvals: Vec<Approval>,
        /// Monotonic readings that ended its timelock.
        monos: Vec<Mono>,
    }
);
state_struct!(
    /// Operators in force.
    Operators {
        /// Approvals that an action needs.
        k: u8,
        /// Approvals that a revocation needs.
        r: u8,
        /// Keys.
        keys: BTreeSet<[u8; 32]>,
    }
);
state_struct!(
    /// Governance.
    Governance {
        /// Operators in force.
        operators: Operators,
        /// Timelock, seconds.
        timelock_s: u64,
        /// Version of each object touched.
        versions: BTreeMap<Object, u64>,
        /// Revoked objects.
        revoked: BTreeSet<Object>,
        /// Pending actions by id.
        pending: BTreeMap<[u8; 16], PendingRow>,
        /// Ids used, with their `not_after`.
        used: BTreeMap<[u8; 16], UnixMillis>,
        /// What the present state of each object rests on.
        proofs: BTreeMap<Object, ProofRow>,
        /// What revocations in force rest on.
        revocations: BTreeMap<Object, ProofRow>,
        /// Node measurements allowed: platform byte and measurement.
        allowed_nodes: BTreeSet<(u8, Vec<u8>)>,
    }
);
state_struct!(
    /// The replicated state after genesis.
    State {
        /// The genesis document.
        genesis: Genesis,
        /// Collateral bundles by id; one in force and those that open intents name.
        collaterals: BTreeMap<[u8; 32], Blob>,
        /// Collateral in force.
        collateral_id: [u8; 32],
        /// When a bundle with this `tcbDate` was first pinned, by `tcbDate`; 0 where the genesis document's has it. The latest
        /// [`TCB_DATES_MAX`](crate::limits::TCB_DATES_MAX) dates.
        tcb_known: BTreeMap<UnixMillis, UnixMillis>,
        /// Leaves of the log.
        size: u64,
        /// Merkle frontier: peaks, largest first.
        peaks: Vec<[u8; 32]>,
        /// Log time, 0 before the first beacon.
        log_time: UnixMillis,
        /// Epoch of the newest generation, 0 before its `Switched`.
        epoch: Epoch,
        /// Beacons of the last 4000 s by position.
        beacons: BTreeMap<u64, BeaconRow>,
        /// Position of the latest beacon.
        latest_beacon: Option<u64>,
        /// Signers of every members version.
        members: BTreeMap<u64, Members>,
        /// Members version in force; meaningless before the first.
        members_version: u64,
        /// Seats that are filled.
        seats: BTreeMap<Seat, SeatRow>,
        /// Admits that wait for vouches, by seat.
        admits: BTreeMap<Seat, AdmitRow>,
        /// Admissions in force, with their vouches, by index.
        admissions: BTreeMap<NodeIndex, AdmitRow>,
        /// Next unused index.
        next_index: NodeIndex,
        /// The open attempt.
        attempt: Option<AttemptRow>,
        /// Attempts opened so far.
        attempts: u32,
        /// Roots in force.
        roots: BTreeMap<(Generation, RootTag), RootRow>,
        /// Attempts that roots in force came from, by their number, with every signed message; one attempt may have made several roots.
        ceremonies: BTreeMap<u32, AttemptRow>,
        /// Governance.
        governance: Governance,
        /// Apps.
        apps: BTreeMap<AppId, AppRow>,
        /// Policies by hash: those in force and those that open intents name.
        policies: BTreeMap<[u8; 32], Blob>,
        /// Open intents by id.
        intents: BTreeMap<[u8; 32], IntentRow>,
        /// Signatures of roots `ca` and `id`: what was asked for, and what came of it.
        signatures: BTreeMap<SignKey, SignRow>,
        /// Env public keys, and the attempts to compute them.
        env_keys: BTreeMap<(Generation, AppId), EnvRow>,
        /// Mode L: when the log first saw a piece of evidence, by app and statement id (ADR 0033).
        sightings: BTreeMap<AppId, BTreeMap<[u8; 32], UnixMillis>>,
        /// Mode L: what each serving node has spent; a full bucket has no row.
        legacy_rates: BTreeMap<NodeIndex, BucketRow>,
        /// Hash of the policy of apps that only the authority knows; `None`: there are none.
        delegation: Option<[u8; 32]>,
        /// What each node has spent of its adoptions, by basis; a full bucket has no row.
        adopt_rates: BTreeMap<(NodeIndex, AdoptBasis), BucketRow>,
    }
);

mod apps;
mod sign;
pub use sign::{AskRow, EnvRow, SignRow, SignedRow};

/// Largest snapshot accepted, bytes.
pub const STATE_BYTES_MAX: usize = 256 * 1024 * 1024;

const _: () = assert!(POLICY_BYTES_MAX <= COMMAND_BYTES_MAX && COLLATERAL_BYTES_MAX <= COMMAND_BYTES_MAX);
const _: () = assert!(APPROVALS_MAX <= 255 && NODES_MAX <= 255);

impl State {
    /// The canonical bytes.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut w = Writer::default();
        w.label_v1("DKMS-V1-STATE");
        self.put(&mut w);
        w.into_bytes()
    }

    /// Decodes exactly `bytes`; only the canonical encoding is accepted.
    ///
    /// # Errors
    /// [`DecodeError`] names the field.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, DecodeError> {
        if bytes.len() > STATE_BYTES_MAX {
            return Err(DecodeError::TooLong { field: "state", max: STATE_BYTES_MAX, got: bytes.len() });
        }
        let mut r = Reader::new(bytes);
        r.label_v1("DKMS-V1-STATE")?;
        let state = Self::take(&mut r)?;
        r.finish()?;
        Ok(state)
    }

    /// `state_root`: the label and version of the canonical bytes are those of threshold.md §2.6.
    #[must_use]
    pub fn root(&self) -> [u8; 32] {
        crate::codec::sha256(&[&self.to_bytes()])
    }
}
