//! What a setup leaves at one holder: its secrets with every other one, and their form at rest.
//!
//! Owns: the list of expelled peers, pairs that are missing and made anew, the layout under a seal. Never: cloned, printed or serialized
//! but to [`SecretBytes`]; a run takes a copy of the pairs it needs and wipes it at its end. Source: threshold.md §5.1, §6 (who seals),
//! ADR 0029 (what is made anew).
//!
//! ```text
//!   state = "DKMS-V1-PAIRS" ‖ version(1)=1 ‖ lp(group) ‖ inst(32) ‖ digest(32) ‖ i(2) ‖ count(2) ‖ { member(2) }* ascending
//!         ‖ count(2) ‖ { j(2) ‖ lp4(engine's zero seed, multiplication sender, multiplication receiver) }* ascending
//! ```
//! A member without an entry is missing: its secrets are gone for good, and a setup between the two makes new ones. Who is expelled is
//! remembered in memory only; the secrets with it are not in what is sealed after that.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use dkls23_core::utilities::multiplication::{MulReceiver, MulSender};
use dkls23_core::utilities::zero_shares::SeedPair;
use dstack_protocol::NodeIndex;
use dstack_protocol::codec::{DecodeError, Reader, Writer, sha256};
use dstack_protocol::limits::NODES_MAX;
use dstack_secret::SecretBytes;

use crate::sign::dkls::{check_members, party};
use crate::sign::ecdsa::{EcdsaError, EcdsaGroup};

/// Engine state of one pair at rest, bytes; about 52 kB today.
const PAIR_BYTES_MAX: usize = 64 * 1024;

type Curve<G> = <G as EcdsaGroup>::Curve;
type Stored<G> = (SeedPair, MulSender<Curve<G>>, MulReceiver<Curve<G>>);

/// Secrets shared with one peer. The engine's types wipe themselves.
pub(crate) struct PairState<G: EcdsaGroup> {
    pub(crate) zero: SeedPair,
    pub(crate) sender: MulSender<Curve<G>>,
    pub(crate) receiver: MulReceiver<Curve<G>>,
}

impl<G: EcdsaGroup> PairState<G> {
    /// What both ends of a pair know of it and nobody else, so that they begin no run with secrets of two different setups:
    /// `SHA-256("DKMS-V1-PAIRBIND" ‖ inst(32) ‖ seed(32))`, the seed being the pair's own.
    pub(crate) fn binding(&self, inst: &[u8; 32]) -> [u8; 32] {
        sha256(&[b"DKMS-V1-PAIRBIND", inst, &self.zero.seed])
    }
}

/// One holder's pairwise secrets for all runs of an epoch.
pub struct Pairwise<G: EcdsaGroup> {
    inst: [u8; 32],
    digest: [u8; 32],
    me: NodeIndex,
    members: Vec<NodeIndex>,
    pairs: BTreeMap<NodeIndex, Box<PairState<G>>>,
    expelled: BTreeSet<NodeIndex>,
}

impl<G: EcdsaGroup> Pairwise<G> {
    pub(crate) fn new(
        inst: [u8; 32],
        me: NodeIndex,
        members: Vec<NodeIndex>,
        digest: [u8; 32],
        pairs: BTreeMap<NodeIndex, Box<PairState<G>>>,
    ) -> Self {
        Self { inst, digest, me, members, pairs, expelled: BTreeSet::new() }
    }

    /// Of a holder that lost its secrets with all others: every pair is missing, and no run can begin before [`Pairwise::adopt`].
    ///
    /// # Errors
    /// [`EcdsaError::Members`], [`EcdsaError::NotAMember`].
    pub fn lost(inst: [u8; 32], me: NodeIndex, members: &[NodeIndex]) -> Result<Self, EcdsaError> {
        check_members(members)?;
        party(members, me)?;
        Ok(Self::new(inst, me, members.to_vec(), [0; 32], BTreeMap::new()))
    }

    /// Takes over the secrets of a setup between this holder and one other, in place of those it had with it; the other one.
    ///
    /// # Errors
    /// [`EcdsaError::OtherHolders`] where it is not a setup of two holders of this one, [`EcdsaError::Expelled`].
    pub fn adopt(&mut self, mut redone: Self) -> Result<NodeIndex, EcdsaError> {
        let (Some((peer, mut pair)), true) = (redone.pairs.pop_first(), redone.pairs.is_empty()) else {
            return Err(EcdsaError::OtherHolders);
        };
        if redone.me != self.me || peer == self.me {
            return Err(EcdsaError::OtherHolders);
        }
        // The engine's number of the peer: its place among all holders, which was one of two in the setup.
        pair.zero.index_counterparty = party(&self.members, peer).map_err(|_| EcdsaError::OtherHolders)?;
        if self.expelled.contains(&peer) {
            return Err(EcdsaError::Expelled(peer));
        }
        self.pairs.insert(peer, pair);
        Ok(peer)
    }

    /// `setup` of `Ready`: the same at all holders of one setup. Zero after [`Pairwise::lost`].
    #[must_use]
    pub fn digest(&self) -> [u8; 32] {
        self.digest
    }

    /// Name of the ceremony that the setup belongs to.
    #[must_use]
    pub fn inst(&self) -> [u8; 32] {
        self.inst
    }

    /// This holder.
    #[must_use]
    pub fn index(&self) -> NodeIndex {
        self.me
    }

    /// All holders of the setup, ascending.
    #[must_use]
    pub fn members(&self) -> &[NodeIndex] {
        &self.members
    }

    /// Destroys the secrets with a peer that cheated: no run with it any more (threshold.md §5.1). Runs in progress with it are the
    /// caller's to drop, and a sealed copy to be written again. True if it was not expelled before.
    pub fn expel(&mut self, peer: NodeIndex) -> bool {
        self.pairs.remove(&peer);
        peer != self.me && self.members.contains(&peer) && self.expelled.insert(peer)
    }

    /// Destroys the secrets with a peer that has others: a setup between the two makes new ones. True if there were some.
    pub fn lose(&mut self, peer: NodeIndex) -> bool {
        self.pairs.remove(&peer).is_some()
    }

    /// Members that no run may include any more, ascending.
    #[must_use]
    pub fn expelled(&self) -> Vec<NodeIndex> {
        self.expelled.iter().copied().collect()
    }

    /// Members without secrets that are not expelled, ascending: a setup with each is to be made anew.
    #[must_use]
    pub fn missing(&self) -> Vec<NodeIndex> {
        let there = |i: &NodeIndex| *i == self.me || self.pairs.contains_key(i) || self.expelled.contains(i);
        self.members.iter().filter(|i| !there(i)).copied().collect()
    }

    /// The secrets with a peer.
    pub(crate) fn pair(&self, peer: NodeIndex) -> Result<&PairState<G>, EcdsaError> {
        let none = || if self.expelled.contains(&peer) { EcdsaError::Expelled(peer) } else { EcdsaError::NoPair(peer) };
        self.pairs.get(&peer).map(|pair| &**pair).ok_or_else(none)
    }

    /// The state as secret bytes, to be sealed (threshold.md §6).
    ///
    /// # Errors
    /// [`EcdsaError::Encode`].
    pub fn to_secret(&self) -> Result<SecretBytes, EcdsaError> {
        let mut head = Writer::default();
        head.label_v1("DKMS-V1-PAIRS").lp(G::NAME.as_bytes()).raw(&self.inst).raw(&self.digest).u16(self.me.0);
        head.count2(self.members.len());
        for member in &self.members {
            head.u16(member.0);
        }
        head.count2(self.pairs.len());
        let head = head.into_bytes();
        let sizes = self.pairs.values().map(|pair| size_of_pair(pair)).collect::<Result<Vec<_>, _>>()?;
        let len = sizes.iter().fold(head.len(), |sum, size| sum.saturating_add(6).saturating_add(*size));
        // Written in place: no buffer grows, so no copy is left behind.
        SecretBytes::try_from_fn(len, |mut to| {
            put(&mut to, &head)?;
            for ((peer, pair), size) in self.pairs.iter().zip(sizes) {
                put(&mut to, &peer.0.to_be_bytes())?;
                put(&mut to, &u32::try_from(size).map_err(|_| EcdsaError::Encode)?.to_be_bytes())?;
                let (body, rest) = std::mem::take(&mut to).split_at_mut_checked(size).ok_or(EcdsaError::Encode)?;
                postcard::to_slice(&(&pair.zero, &pair.sender, &pair.receiver), body).map_err(|_| EcdsaError::Encode)?;
                to = rest;
            }
            Ok(())
        })
    }

    /// Reads what [`Pairwise::to_secret`] wrote, out of an opened seal.
    ///
    /// # Errors
    /// [`EcdsaError::State`].
    pub fn from_secret(bytes: &SecretBytes) -> Result<Self, EcdsaError> {
        bytes.expose(Self::read)
    }

    fn read(bytes: &[u8]) -> Result<Self, EcdsaError> {
        let field = |field, reason| EcdsaError::State(DecodeError::Field { field, reason });
        let mut r = Reader::new(bytes);
        r.label_v1("DKMS-V1-PAIRS").map_err(EcdsaError::State)?;
        if r.lp("group", 32).map_err(EcdsaError::State)? != G::NAME.as_bytes() {
            return Err(field("group", "another group"));
        }
        let head = (|| {
            let (inst, digest) = (r.array("inst")?, r.array("digest")?);
            let me = NodeIndex::read("i", &mut r)?;
            let count = usize::from(r.u16("members")?);
            let members = r.list("members", count, 2, |r| NodeIndex::read("member", r))?;
            Ok((inst, digest, me, members))
        })();
        let (inst, digest, me, members) = head.map_err(EcdsaError::State)?;
        check_members(&members).map_err(|_| field("members", "not ascending indices of nodes"))?;
        party(&members, me).map_err(|_| field("i", "no member"))?;
        let count = usize::from(r.u16("pairs").map_err(EcdsaError::State)?);
        if count > NODES_MAX {
            return Err(field("pairs", "more than there are nodes"));
        }
        let mut pairs = BTreeMap::new();
        let mut last = NodeIndex(0);
        for _ in 0..count {
            let peer = NodeIndex::read("j", &mut r).map_err(EcdsaError::State)?;
            if peer <= last || peer == me {
                return Err(field("pairs", "not ascending, or with itself"));
            }
            last = peer;
            let other = party(&members, peer).map_err(|_| field("j", "no member"))?;
            let body = r.lp4("pair", PAIR_BYTES_MAX).map_err(EcdsaError::State)?;
            let pair = read_pair::<G>(body).ok_or_else(|| field("pair", "not the engine's state"))?;
            if pair.zero.index_counterparty != other || pair.zero.lowest_index != (me < peer) {
                return Err(field("pair", "state of another pair"));
            }
            pairs.insert(peer, pair);
        }
        r.finish().map_err(EcdsaError::State)?;
        Ok(Self::new(inst, me, members, digest, pairs))
    }
}

impl<G: EcdsaGroup> fmt::Debug for Pairwise<G> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pairwise").field("me", &self.me).field("members", &self.members).finish_non_exhaustive()
    }
}

fn size_of_pair<G: EcdsaGroup>(pair: &PairState<G>) -> Result<usize, EcdsaError> {
    postcard::experimental::serialized_size(&(&pair.zero, &pair.sender, &pair.receiver)).map_err(|_| EcdsaError::Encode)
}

fn read_pair<G: EcdsaGroup>(body: &[u8]) -> Option<Box<PairState<G>>> {
    let ((zero, sender, receiver), rest) = postcard::take_from_bytes::<Stored<G>>(body).ok()?;
    let sound = rest.is_empty() && sender.check_state().is_ok() && receiver.check_state(None).is_ok();
    sound.then(|| Box::new(PairState { zero, sender, receiver }))
}

/// Writes at the front of `to` and moves it behind.
fn put(to: &mut &mut [u8], bytes: &[u8]) -> Result<(), EcdsaError> {
    let (front, rest) = std::mem::take(to).split_at_mut_checked(bytes.len()).ok_or(EcdsaError::Encode)?;
    front.copy_from_slice(bytes);
    *to = rest;
    Ok(())
}
