//! The pairwise setup: base oblivious transfers in both directions and a common seed for zero shares, with every other holder.
//!
//! Owns: two rounds of messages, the digest that all holders agree on. Never: touches a share; no dealer takes part.
//! Source: DKLs23 functionalities 3.4 (zero shares, by commitment) and 3.5 (multiplication); threshold.md §5.1, ADR 0017.
//!
//! ```text
//!   pair   = SHA-256("DKMS-V1-SETUPPAIR" ‖ inst(32) ‖ i(2) ‖ j(2) ‖ SHA-256(message 1 of i to j)(32) ‖ SHA-256(message 1 of j to i)(32))   i < j
//!   digest = SHA-256("DKMS-V1-SETUP" ‖ inst(32) ‖ count(2) ‖ { i(2) ‖ j(2) ‖ pair(32) }* ascending)
//! ```
//! Message 1 commits to what message 2 opens. Message 2 also states the author's digests of all its pairs, so everybody compares both
//! ends of every pair, and the digest in `Ready` is the same at all holders or the setup has failed.

use std::collections::BTreeMap;
use std::fmt;

use dkls23_core::protocols::PartyIndex;
use dkls23_core::utilities::multiplication::{MulReceiver, MulSender};
use dkls23_core::utilities::ot::base::{OTReceiver, OTSender};
use dkls23_core::utilities::proofs::{DLogProof, EncProof};
use dkls23_core::utilities::zero_shares::ZeroShare;
use dstack_protocol::NodeIndex;
use dstack_protocol::codec::{DecodeError, Reader, Writer, sha256};
use dstack_secret::SecretBytes;
use k256::elliptic_curve::group::Group as _;
use k256::elliptic_curve::{ProjectivePoint, Scalar};
use zeroize::{Zeroize as _, Zeroizing};

use crate::sign::dkls::pairwise::{PairState, Pairwise};
use crate::sign::dkls::{check_members, party};
use crate::sign::ecdsa::{EcdsaError, EcdsaGroup, Outgoing, Progress, Rounds, guarded};
use crate::sign::envelope::{Desk, Kind, decode_body, encode_body};

/// Commitment to the seed, proof of `z = s·B`, gadget nonce, choices with proofs, seed of the base OT.
type First<G> = ([u8; 32], DLogProof<Curve<G>>, Scalar<Curve<G>>, Vec<EncProof<Curve<G>>>, [u8; 32]);
type Curve<G> = <G as EcdsaGroup>::Curve;

/// Bytes of a salt: twice the security parameter.
const SALT_BYTES: usize = 64;

/// One holder's setup with all others.
pub struct Setup<G: EcdsaGroup> {
    state: State<G>,
    me: NodeIndex,
    members: Vec<NodeIndex>,
}

enum State<G: EcdsaGroup> {
    Live(Box<Live<G>>),
    Ended,
}

struct Live<G: EcdsaGroup> {
    inst: [u8; 32],
    pairs: BTreeMap<NodeIndex, Pair<G>>,
    /// What this node committed to towards each peer.
    openings: BTreeMap<NodeIndex, Box<Opening>>,
    /// Second messages that came before the peer's first one.
    early: BTreeMap<NodeIndex, Second>,
    second_sent: bool,
}

enum Pair<G: EcdsaGroup> {
    AwaitingFirst(Box<Bases<G>>),
    AwaitingSecond(Box<Checked<G>>),
    Complete(Box<PairState<G>>, PairDigests),
}

/// This node's secrets of the base OTs with one peer.
struct Bases<G: EcdsaGroup> {
    ot_sender: OTSender<Curve<G>>,
    nonce: Scalar<Curve<G>>,
    ot_receiver: OTReceiver,
    correlation: Vec<bool>,
    vec_r: Vec<Scalar<Curve<G>>>,
    /// Of the message that went out.
    first_hash: [u8; 32],
}

impl<G: EcdsaGroup> Drop for Bases<G> {
    fn drop(&mut self) {
        self.ot_sender.s.zeroize();
        self.correlation.zeroize();
        self.vec_r.zeroize();
    }
}

/// After the peer's first message.
struct Checked<G: EcdsaGroup> {
    sender: MulSender<Curve<G>>,
    receiver: MulReceiver<Curve<G>>,
    their_commitment: [u8; 32],
    digest: [u8; 32],
}

/// What a pair's two ends have seen of each other, and the peer of all others.
struct PairDigests {
    ours: [u8; 32],
    theirs: BTreeMap<NodeIndex, [u8; 32]>,
}

/// One half of a pair's seed, and the salt of its commitment.
struct Opening {
    seed: Zeroizing<[u8; 32]>,
    salt: Zeroizing<Vec<u8>>,
}

/// `seed(32) ‖ salt(64) ‖ count(2) ‖ { j(2) ‖ pair(32) }*`: every member but the author, ascending.
struct Second {
    opening: Box<Opening>,
    digests: BTreeMap<NodeIndex, [u8; 32]>,
}

impl<G: EcdsaGroup> Setup<G> {
    /// Begins the setup of `me` with all other `members` (ascending). Computes proofs for each of them: about 0.2 s a peer.
    ///
    /// # Errors
    /// [`EcdsaError::Members`], [`EcdsaError::NotAMember`].
    pub fn begin(inst: [u8; 32], me: NodeIndex, members: &[NodeIndex]) -> Result<(Self, Vec<Outgoing>), EcdsaError> {
        check_members(members)?;
        let own = party(members, me)?;
        let (mut pairs, mut openings, mut send) = (BTreeMap::new(), BTreeMap::new(), Vec::new());
        let desk = Desk { kind: Kind::Setup, id: &inst, me, participants: members };
        for peer in members.iter().filter(|i| **i != me) {
            let other = party(members, *peer)?;
            let (mut bases, opening, first) = first_message::<G>(&inst, own, other);
            let message = desk.wrap(1, *peer, &encode_body(&first)?);
            bases.first_hash = sha256(&[&message]);
            pairs.insert(*peer, Pair::AwaitingFirst(bases));
            openings.insert(*peer, opening);
            send.push(Outgoing { to: *peer, bytes: SecretBytes::take(message) });
        }
        let live = Live { inst, pairs, openings, early: BTreeMap::new(), second_sent: false };
        Ok((Self { state: State::Live(Box::new(live)), me, members: members.to_vec() }, send))
    }

    /// The state after the last message, taken apart.
    fn finish(&mut self, digest: [u8; 32]) -> Option<Pairwise<G>> {
        let State::Live(live) = std::mem::replace(&mut self.state, State::Ended) else { return None };
        let pairs = live.pairs.into_iter().filter_map(|(peer, pair)| match pair {
            Pair::Complete(state, _) => Some((peer, state)),
            Pair::AwaitingFirst(_) | Pair::AwaitingSecond(_) => None,
        });
        Some(Pairwise::new(live.inst, self.me, self.members.clone(), digest, pairs.collect()))
    }
}

impl<G: EcdsaGroup> Rounds for Setup<G> {
    type Output = Pairwise<G>;

    fn receive(&mut self, from: NodeIndex, message: &[u8]) -> Result<Progress<Pairwise<G>>, EcdsaError> {
        let State::Live(live) = &mut self.state else { return Err(EcdsaError::Ended) };
        match guarded(from, || live.step(self.me, &self.members, from, message)) {
            Ok((send, None)) => Ok(Progress { send, done: None }),
            Ok((send, Some(digest))) => Ok(Progress { send, done: self.finish(digest) }),
            Err(error) => {
                if error.ends_run() {
                    self.state = State::Ended;
                }
                Err(error)
            }
        }
    }

    fn missing(&self) -> Vec<NodeIndex> {
        let State::Live(live) = &self.state else { return Vec::new() };
        let first_round = !live.second_sent;
        let waits = |(peer, pair): (&NodeIndex, &Pair<G>)| match pair {
            Pair::AwaitingFirst(_) => Some(*peer),
            Pair::AwaitingSecond(_) => (!first_round).then_some(*peer),
            Pair::Complete(..) => None,
        };
        live.pairs.iter().filter_map(waits).collect()
    }

    fn involves(&self, peer: NodeIndex) -> bool {
        self.members.contains(&peer)
    }
}

impl<G: EcdsaGroup> fmt::Debug for Setup<G> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Setup").field("me", &self.me).field("members", &self.members).finish_non_exhaustive()
    }
}

impl<G: EcdsaGroup> Live<G> {
    /// What to send after a message, and the digest once all is there and agrees.
    fn step(
        &mut self,
        me: NodeIndex,
        members: &[NodeIndex],
        from: NodeIndex,
        message: &[u8],
    ) -> Result<(Vec<Outgoing>, Option<[u8; 32]>), EcdsaError> {
        let (round, body) = Desk { kind: Kind::Setup, id: &self.inst, me, participants: members }.unwrap(from, message)?;
        if round == 1 {
            self.first(me, members, from, message, body)?;
            if let Some(second) = self.early.remove(&from) {
                self.second(me, members, from, second)?;
            }
        } else {
            let second = Second::read(from, members, body)?;
            self.second(me, members, from, second)?;
        }
        let all_first = !self.pairs.values().any(|pair| matches!(pair, Pair::AwaitingFirst(_)));
        let send = if all_first && !self.second_sent { self.second_messages(me, members) } else { Vec::new() };
        Ok((send, self.agreed(me)?))
    }

    /// The peer's base OTs: verified at once, against ours.
    fn first(&mut self, me: NodeIndex, members: &[NodeIndex], from: NodeIndex, message: &[u8], body: &[u8]) -> Result<(), EcdsaError> {
        let pair = self.pairs.get_mut(&from).ok_or(EcdsaError::Stranger(from))?;
        let Pair::AwaitingFirst(bases) = pair else { return Err(EcdsaError::Duplicate { peer: from, round: 1 }) };
        let (own, other) = (party(members, me)?, party(members, from)?);
        let first = decode_body::<First<G>>(from, body)?;
        let theirs = sha256(&[message]);
        let (low, high) = if me < from { (bases.first_hash, theirs) } else { (theirs, bases.first_hash) };
        let digest = pair_digest(&self.inst, me.min(from), me.max(from), &low, &high);
        let checked = check_first(&self.inst, own, other, from, bases, first, digest)?;
        *pair = Pair::AwaitingSecond(Box::new(checked));
        Ok(())
    }

    /// The peer's opening: kept until its first message is here, then checked against it.
    fn second(&mut self, me: NodeIndex, members: &[NodeIndex], from: NodeIndex, second: Second) -> Result<(), EcdsaError> {
        let duplicate = EcdsaError::Duplicate { peer: from, round: 2 };
        let pair = self.pairs.get_mut(&from).ok_or(EcdsaError::Stranger(from))?;
        let checked = match pair {
            Pair::AwaitingFirst(_) => {
                if self.early.contains_key(&from) {
                    return Err(duplicate);
                }
                self.early.insert(from, second);
                return Ok(());
            }
            Pair::Complete(..) => return Err(duplicate),
            Pair::AwaitingSecond(checked) => checked,
        };
        let (own, other) = (party(members, me)?, party(members, from)?);
        let ours = self.openings.get(&from).ok_or(EcdsaError::Stranger(from))?;
        let theirs = &second.opening;
        let context = seed_context(&self.inst, other, own);
        if !ZeroShare::verify_bound_seed(&theirs.seed, &context, &checked.their_commitment, &theirs.salt) {
            return Err(EcdsaError::SetupFault { peer: from, reason: "the opened seed is not the committed one" });
        }
        // Both ends of this pair have seen the same first messages.
        if second.digests.get(&me) != Some(&checked.digest) {
            return Err(EcdsaError::SetupFault { peer: from, reason: "it saw other first messages than were sent" });
        }
        let zero = ZeroShare::generate_seed_pair(own, other, &ours.seed, &theirs.seed);
        let state = PairState { zero, sender: checked.sender.clone(), receiver: checked.receiver.clone() };
        let digests = PairDigests { ours: checked.digest, theirs: second.digests };
        *pair = Pair::Complete(Box::new(state), digests);
        Ok(())
    }

    /// Opens the seed to each peer, once the first messages of all are here.
    fn second_messages(&mut self, me: NodeIndex, members: &[NodeIndex]) -> Vec<Outgoing> {
        self.second_sent = true;
        let digests: BTreeMap<NodeIndex, [u8; 32]> = self.pairs.iter().filter_map(|(peer, pair)| Some((*peer, pair.digest()?))).collect();
        let desk = Desk { kind: Kind::Setup, id: &self.inst, me, participants: members };
        let mut send = Vec::with_capacity(self.openings.len());
        for (peer, opening) in &self.openings {
            let body = second_body(opening, &digests);
            send.push(Outgoing { to: *peer, bytes: SecretBytes::take(desk.wrap(2, *peer, &body)) });
        }
        send
    }

    /// The digest of the whole setup, once both ends of every pair are known and equal.
    fn agreed(&self, me: NodeIndex) -> Result<Option<[u8; 32]>, EcdsaError> {
        let mut stated: BTreeMap<(NodeIndex, NodeIndex), [u8; 32]> = BTreeMap::new();
        for (peer, pair) in &self.pairs {
            let Pair::Complete(_, digests) = pair else { return Ok(None) };
            let of_peer = digests.theirs.iter().map(|(other, digest)| ((*peer).min(*other), (*peer).max(*other), digest));
            for (i, j, digest) in of_peer.chain([(me.min(*peer), me.max(*peer), &digests.ours)]) {
                if *stated.entry((i, j)).or_insert(*digest) != *digest {
                    return Err(EcdsaError::SetupDiffers(i, j));
                }
            }
        }
        let mut w = Writer::labelled("DKMS-V1-SETUP");
        w.raw(&self.inst).count2(stated.len());
        for ((i, j), digest) in &stated {
            w.u16(i.0).u16(j.0).raw(digest);
        }
        Ok(Some(sha256(&[&w.into_bytes()])))
    }
}

impl<G: EcdsaGroup> Pair<G> {
    fn digest(&self) -> Option<[u8; 32]> {
        match self {
            Self::AwaitingFirst(_) => None,
            Self::AwaitingSecond(checked) => Some(checked.digest),
            Self::Complete(_, digests) => Some(digests.ours),
        }
    }
}

impl Second {
    fn read(peer: NodeIndex, members: &[NodeIndex], body: &[u8]) -> Result<Self, EcdsaError> {
        let read = || -> Result<Self, DecodeError> {
            let mut r = Reader::new(body);
            let seed = Zeroizing::new(r.array("seed")?);
            let salt = Zeroizing::new(r.take("salt", SALT_BYTES)?.to_vec());
            let count = usize::from(r.u16("count")?);
            let digests = r.list("digests", count, 34, |r| Ok((NodeIndex::read("j", r)?, r.array("pair")?)))?;
            r.finish()?;
            if !digests.iter().map(|(j, _)| j).eq(members.iter().filter(|i| **i != peer)) {
                return Err(DecodeError::Field { field: "digests", reason: "not one for every other member" });
            }
            Ok(Self { opening: Box::new(Opening { seed, salt }), digests: digests.into_iter().collect() })
        };
        read().map_err(|error| EcdsaError::Malformed { peer, error })
    }
}

fn second_body(opening: &Opening, digests: &BTreeMap<NodeIndex, [u8; 32]>) -> Zeroizing<Vec<u8>> {
    let mut w = Writer::default();
    w.reserve(32 + SALT_BYTES + 2 + digests.len() * 34);
    w.raw(opening.seed.as_slice()).raw(&opening.salt).count2(digests.len());
    for (j, digest) in digests {
        w.u16(j.0).raw(digest);
    }
    Zeroizing::new(w.into_bytes())
}

/// This node's base OTs with one peer and the commitment to its half of their seed.
fn first_message<G: EcdsaGroup>(inst: &[u8; 32], own: PartyIndex, other: PartyIndex) -> (Box<Bases<G>>, Box<Opening>, First<G>) {
    let (seed, commitment, salt) = ZeroShare::generate_seed_with_bound_commitment(&seed_context(inst, own, other));
    let opening = Box::new(Opening { seed: Zeroizing::new(seed), salt: Zeroizing::new(salt) });
    let (ot_sender, dlog_proof, nonce) = MulReceiver::<Curve<G>>::init_phase1(&multiplication_id(inst, own, other));
    let (ot_receiver, correlation, vec_r, enc_proofs) = MulSender::<Curve<G>>::init_phase1(&multiplication_id(inst, other, own));
    let ot_seed = ot_receiver.seed;
    let bases = Bases { ot_sender, nonce, ot_receiver, correlation, vec_r, first_hash: [0; 32] };
    (Box::new(bases), opening, (commitment, dlog_proof, nonce, enc_proofs, ot_seed))
}

/// Finishes both multiplications' setup with what the peer sent.
fn check_first<G: EcdsaGroup>(
    inst: &[u8; 32],
    own: PartyIndex,
    other: PartyIndex,
    peer: NodeIndex,
    bases: &mut Bases<G>,
    (their_commitment, dlog_proof, nonce, enc_proofs, ot_seed): First<G>,
    digest: [u8; 32],
) -> Result<Checked<G>, EcdsaError> {
    let fault = |reason| EcdsaError::SetupFault { peer, reason };
    // z = 0·B would make the pads of this direction public.
    if ProjectivePoint::<Curve<G>>::from(dlog_proof.point).is_identity().into() {
        return Err(fault("its base OT key is the identity"));
    }
    let receiver = MulReceiver::init_phase2(&bases.ot_sender, &multiplication_id(inst, own, other), &ot_seed, &enc_proofs, &bases.nonce)
        .map_err(|_| fault("a proof of its base OT choices is wrong"))?;
    let correlation = std::mem::take(&mut bases.correlation);
    let id = multiplication_id(inst, other, own);
    let sender = MulSender::init_phase2(&bases.ot_receiver, &id, correlation, &bases.vec_r, &dlog_proof, &nonce)
        .map_err(|_| fault("the proof of its base OT key is wrong"))?;
    Ok(Checked { sender, receiver, their_commitment, digest })
}

/// The engine's session of the multiplication in which `receiver` receives.
fn multiplication_id(inst: &[u8; 32], receiver: PartyIndex, sender: PartyIndex) -> Vec<u8> {
    [&b"DKMS-V1-SETUPMUL"[..], inst, &[receiver.as_u8(), sender.as_u8()]].concat()
}

fn seed_context(inst: &[u8; 32], author: PartyIndex, reader: PartyIndex) -> [u8; 32] {
    ZeroShare::seed_context(b"DKMS-V1-SETUPSEED", &[inst], author, reader)
}

fn pair_digest(inst: &[u8; 32], i: NodeIndex, j: NodeIndex, of_i: &[u8; 32], of_j: &[u8; 32]) -> [u8; 32] {
    sha256(&[b"DKMS-V1-SETUPPAIR", inst, &i.0.to_be_bytes(), &j.0.to_be_bytes(), of_i, of_j])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_message_has_one_digest_for_every_other_member() {
        let members = [1, 2, 3].map(NodeIndex);
        let opening = Opening { seed: Zeroizing::new([7; 32]), salt: Zeroizing::new(vec![8; SALT_BYTES]) };
        let read = |digests: &[u16], salt: usize, extra: &[u8]| {
            let digests = digests.iter().map(|j| (NodeIndex(*j), [9; 32])).collect();
            let short = Opening { seed: opening.seed.clone(), salt: Zeroizing::new(opening.salt[..salt].to_vec()) };
            let body = [&second_body(&short, &digests)[..], extra].concat();
            Second::read(NodeIndex(2), &members, &body).map(|second| second.digests.len())
        };
        assert_eq!(read(&[1, 3], 64, &[]), Ok(2));
        for bad in [read(&[1], 64, &[]), read(&[1, 2, 3], 64, &[]), read(&[1, 4], 64, &[]), read(&[1, 3], 63, &[]), read(&[1, 3], 64, &[0])]
        {
            assert!(matches!(bad, Err(EcdsaError::Malformed { peer: NodeIndex(2), .. })), "{bad:?}");
        }
    }
}
