//! One signing run: three rounds between exactly `t` holders, DKLs23 Protocol 3.6.
//!
//! Owns: a copy of the pairs' secrets for the length of the run, the order of rounds, the class of each abort, verification of the
//! result. Never: outlives its end: result, abort and drop destroy everything. Source: threshold.md §5.1, ADR 0029.
//!
//! The body of a first message is `pair(32) ‖ engine's`: both ends show that they have the secrets of one setup before the extension
//! of the transfer begins. With secrets of two setups its check would fail, and an honest node would be expelled.

use std::collections::BTreeMap;
use std::fmt;

use dkls23_core::protocols::derivation::DerivData;
use dkls23_core::protocols::signing::{
    Broadcast3to4, KeepPhase1to2, KeepPhase2to3, SignData, TransmitPhase1to2, TransmitPhase2to3, UniqueKeep1to2, UniqueKeep2to3,
};
use dkls23_core::protocols::{Abort, AbortKind, AbortReason, Parameters, PartiesMessage, Party, PartyIndex};
use dkls23_core::utilities::zero_shares::ZeroShare;
use dstack_protocol::NodeIndex;
use dstack_protocol::codec::DecodeError;
use dstack_secret::SecretBytes;
use k256::elliptic_curve::Field as _;
use k256::elliptic_curve::Scalar;
use k256::elliptic_curve::group::Curve as _;
use zeroize::Zeroize as _;

use crate::group::SecretScalar;
use crate::shamir::lagrange_at_zero;
use crate::sign::dkls::pairwise::Pairwise;
use crate::sign::dkls::{member, party};
use crate::sign::ecdsa::{EcdsaError, EcdsaGroup, EcdsaSignature, Outgoing, Progress, Rounds, guarded};
use crate::sign::envelope::{Desk, Kind, decode_body, encode_body};
use crate::sign::{RootShare, Run};

type Curve<G> = <G as EcdsaGroup>::Curve;
type Kept<T> = BTreeMap<PartyIndex, T>;

/// One signer in one run.
pub struct Signing<G: EcdsaGroup> {
    state: State<G>,
    me: NodeIndex,
    run: Run,
}

enum State<G: EcdsaGroup> {
    Live(Box<Live<G>>),
    Ended,
}

struct Live<G: EcdsaGroup> {
    party: Party<Curve<G>>,
    data: SignData,
    public_key: G::Element,
    members: Vec<NodeIndex>,
    /// Of the pair with each other signer.
    bindings: BTreeMap<NodeIndex, [u8; 32]>,
    stage: Stage<G>,
    first: BTreeMap<NodeIndex, TransmitPhase1to2>,
    second: BTreeMap<NodeIndex, TransmitPhase2to3<Curve<G>>>,
    third: BTreeMap<NodeIndex, Broadcast3to4<Curve<G>>>,
}

/// What the run waits for; each stage's secrets are moved into the next step and gone.
enum Stage<G: EcdsaGroup> {
    AwaitingFirst(Box<UniqueKeep1to2<Curve<G>>>, Kept<KeepPhase1to2<Curve<G>>>),
    AwaitingSecond(Box<UniqueKeep2to3<Curve<G>>>, Kept<KeepPhase2to3<Curve<G>>>),
    AwaitingThird(String, Box<Broadcast3to4<Curve<G>>>),
    Computing,
}

impl<G: EcdsaGroup> Signing<G> {
    /// Begins this node's part in `run` over `digest`: the 32 bytes to be signed, computed by the caller from typed fields.
    ///
    /// # Errors
    /// [`EcdsaError`]: the run is not one of this share and setup, or a signer is expelled.
    pub fn begin(share: &RootShare<G>, pairwise: &Pairwise<G>, run: &Run, digest: [u8; 32]) -> Result<(Self, Vec<Outgoing>), EcdsaError> {
        let (me, holders) = (share.index(), share.holders());
        if !holders.can_sign(run.signers()) {
            return Err(EcdsaError::Signers { threshold: holders.threshold(), got: run.signers().len() });
        }
        if !run.signers().contains(&me) {
            return Err(EcdsaError::NotAMember(me));
        }
        if pairwise.index() != me || !holders.members().eq(pairwise.members().iter().copied()) {
            return Err(EcdsaError::OtherHolders);
        }
        let members = pairwise.members().to_vec();
        let peers: Vec<NodeIndex> = run.signers().iter().filter(|i| **i != me).copied().collect();
        let mut party = empty_party(share, pairwise)?;
        let mut bindings = BTreeMap::new();
        for peer in &peers {
            // No run with a node that cheated (threshold.md §5.1).
            let pair = pairwise.pair(*peer)?;
            bindings.insert(*peer, pair.binding(&pairwise.inst()));
            let number = super::party(&members, *peer)?;
            party.zero_share.seeds.push(pair.zero.clone());
            party.mul_senders.insert(number, pair.sender.clone());
            party.mul_receivers.insert(number, pair.receiver.clone());
        }
        weigh(&mut party, share, run, &members)?;
        let counterparties = peers.iter().map(|peer| super::party(&members, *peer)).collect::<Result<_, _>>()?;
        let data = SignData { sign_id: run.id().to_vec(), counterparties, message_hash: digest };
        let (unique, kept, messages) = party.sign_phase1(&data).map_err(|abort| classify(&abort, &members))?;
        let live = Live {
            party,
            data,
            public_key: *holders.public_element(),
            members,
            bindings,
            stage: Stage::AwaitingFirst(Box::new(unique), kept),
            first: BTreeMap::new(),
            second: BTreeMap::new(),
            third: BTreeMap::new(),
        };
        let desk = Desk { kind: Kind::Signing, id: &run.id(), me, participants: run.signers() };
        let send = messages.iter().map(|m| live.outgoing(&desk, 1, m.parties.receiver, m)).collect::<Result<_, _>>()?;
        Ok((Self { state: State::Live(Box::new(live)), me, run: run.clone() }, send))
    }

    /// The run.
    #[must_use]
    pub fn run(&self) -> &Run {
        &self.run
    }
}

impl<G: EcdsaGroup> Rounds for Signing<G> {
    type Output = EcdsaSignature;

    fn receive(&mut self, from: NodeIndex, message: &[u8]) -> Result<Progress<EcdsaSignature>, EcdsaError> {
        let State::Live(live) = &mut self.state else { return Err(EcdsaError::Ended) };
        let id = self.run.id();
        let desk = Desk { kind: Kind::Signing, id: &id, me: self.me, participants: self.run.signers() };
        let outcome = guarded(from, || {
            let (round, body) = desk.unwrap(from, message)?;
            live.step(&desk, from, round, body)
        });
        // One-shot: the state is destroyed on success and abort.
        let ended = match &outcome {
            Ok(progress) => progress.done.is_some(),
            Err(error) => error.ends_run(),
        };
        if ended {
            self.state = State::Ended;
        }
        outcome
    }

    fn missing(&self) -> Vec<NodeIndex> {
        let State::Live(live) = &self.state else { return Vec::new() };
        let here = |peer: &NodeIndex| match live.stage {
            Stage::AwaitingFirst(..) => live.first.contains_key(peer),
            Stage::AwaitingSecond(..) => live.second.contains_key(peer),
            Stage::AwaitingThird(..) => live.third.contains_key(peer),
            Stage::Computing => true,
        };
        self.run.signers().iter().filter(|i| **i != self.me && !here(i)).copied().collect()
    }

    fn involves(&self, peer: NodeIndex) -> bool {
        self.run.signers().contains(&peer)
    }
}

impl<G: EcdsaGroup> fmt::Debug for Signing<G> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Signing").field("me", &self.me).field("run", &self.run).finish_non_exhaustive()
    }
}

impl<G: EcdsaGroup> Live<G> {
    /// Keeps a message, then runs every step whose messages are all here.
    fn step(&mut self, desk: &Desk<'_>, from: NodeIndex, round: u8, body: &[u8]) -> Result<Progress<EcdsaSignature>, EcdsaError> {
        self.keep(desk, from, round, body)?;
        let mut progress = Progress::waiting();
        let peers = desk.participants.len().saturating_sub(1);
        loop {
            match std::mem::replace(&mut self.stage, Stage::Computing) {
                Stage::AwaitingFirst(unique, kept) if self.first.len() == peers => {
                    let received: Vec<_> = std::mem::take(&mut self.first).into_values().collect();
                    let (unique, kept, messages) =
                        self.party.sign_phase2(&self.data, *unique, kept, &received).map_err(|abort| classify(&abort, &self.members))?;
                    for m in &messages {
                        progress.send.push(self.outgoing(desk, 2, m.parties.receiver, m)?);
                    }
                    self.stage = Stage::AwaitingSecond(Box::new(unique), kept);
                }
                Stage::AwaitingSecond(unique, kept) if self.second.len() == peers => {
                    let received: Vec<_> = std::mem::take(&mut self.second).into_values().collect();
                    let (x, broadcast) =
                        self.party.sign_phase3(&self.data, *unique, kept, &received).map_err(|abort| classify(&abort, &self.members))?;
                    for to in &self.data.counterparties {
                        progress.send.push(self.outgoing(desk, 3, *to, &broadcast)?);
                    }
                    self.stage = Stage::AwaitingThird(x, Box::new(broadcast));
                }
                Stage::AwaitingThird(x, own) if self.third.len() == peers => {
                    let received: Vec<_> = std::mem::take(&mut self.third).into_values().chain([*own]).collect();
                    progress.done = Some(self.finish(&x, &received)?);
                    return Ok(progress);
                }
                waiting => {
                    self.stage = waiting;
                    return Ok(progress);
                }
            }
        }
    }

    /// Decodes a message of a round that has not passed, the first one of its author.
    fn keep(&mut self, desk: &Desk<'_>, from: NodeIndex, round: u8, body: &[u8]) -> Result<(), EcdsaError> {
        let passed = match self.stage {
            Stage::AwaitingFirst(..) => 0,
            Stage::AwaitingSecond(..) => 1,
            Stage::AwaitingThird(..) | Stage::Computing => 2,
        };
        let here = self.first.contains_key(&from) && round == 1
            || self.second.contains_key(&from) && round == 2
            || self.third.contains_key(&from) && round == 3;
        if round <= passed || here {
            return Err(EcdsaError::Duplicate { peer: from, round });
        }
        match round {
            1 => {
                let (binding, body) = body.split_first_chunk::<32>().ok_or_else(|| unbound(from))?;
                if *binding != self.binding(from)? {
                    return Err(EcdsaError::OtherPair(from));
                }
                let message = decode_body::<TransmitPhase1to2>(from, body)?;
                self.check_parties(desk, from, &message.parties)?;
                self.first.insert(from, message);
            }
            2 => {
                let message = decode_body::<TransmitPhase2to3<Curve<G>>>(from, body)?;
                self.check_parties(desk, from, &message.parties)?;
                self.second.insert(from, message);
            }
            _ => {
                self.third.insert(from, decode_body(from, body)?);
            }
        }
        Ok(())
    }

    fn binding(&self, peer: NodeIndex) -> Result<[u8; 32], EcdsaError> {
        self.bindings.get(&peer).copied().ok_or(EcdsaError::NotAMember(peer))
    }

    /// The engine's own sender and recipient are those of the envelope.
    fn check_parties(&self, desk: &Desk<'_>, from: NodeIndex, parties: &PartiesMessage) -> Result<(), EcdsaError> {
        if parties.sender == party(&self.members, from)? && parties.receiver == party(&self.members, desk.me)? {
            return Ok(());
        }
        Err(EcdsaError::Malformed { peer: from, error: DecodeError::Field { field: "parties", reason: "not those of the envelope" } })
    }

    fn outgoing<T: serde::Serialize>(&self, desk: &Desk<'_>, round: u8, to: PartyIndex, body: &T) -> Result<Outgoing, EcdsaError> {
        let to = member(&self.members, to).ok_or(EcdsaError::Members)?;
        let mut body = encode_body(body)?;
        if round == 1 {
            // One allocation: the engine's part is wiped where it was.
            let bound = [&self.binding(to)?[..], &body].concat();
            body.zeroize();
            body = bound;
        }
        let bytes = SecretBytes::take(desk.wrap(round, to, &body));
        body.zeroize();
        Ok(Outgoing { to, bytes })
    }

    /// Step 10. The combined signature is verified before use, by another implementation than the engine's (threshold.md §5.1).
    fn finish(&self, x: &str, received: &[Broadcast3to4<Curve<G>>]) -> Result<EcdsaSignature, EcdsaError> {
        let (s, recid) = self.party.sign_phase4(&self.data, x, received, true).map_err(|abort| classify(&abort, &self.members))?;
        let number = |text: &str| -> Option<[u8; 32]> {
            let mut bytes = [0; 32];
            if text.len() != 64 {
                return None;
            }
            for (i, byte) in bytes.iter_mut().enumerate() {
                *byte = u8::from_str_radix(text.get(2 * i..2 * i + 2)?, 16).ok()?;
            }
            Some(bytes)
        };
        let (Some(r), Some(s)) = (number(x), number(&s)) else { return Err(EcdsaError::BadSignature) };
        let signature = EcdsaSignature { r, s, recid };
        if !G::verify(&self.public_key, &self.data.message_hash, &signature) {
            return Err(EcdsaError::BadSignature);
        }
        Ok(signature)
    }
}

fn unbound(peer: NodeIndex) -> EcdsaError {
    EcdsaError::Malformed { peer, error: DecodeError::Field { field: "pair", reason: "32 bytes that bind the pair" } }
}

/// The engine's view of this holder, without share and pairs.
fn empty_party<G: EcdsaGroup>(share: &RootShare<G>, pairwise: &Pairwise<G>) -> Result<Party<Curve<G>>, EcdsaError> {
    let holders = share.holders();
    let number = |n: usize| u8::try_from(n).map_err(|_| EcdsaError::Members);
    let parameters =
        Parameters::new(number(usize::from(holders.threshold()))?, number(holders.count())?).map_err(|_| EcdsaError::Members)?;
    let pk = holders.public_element().to_affine();
    Ok(Party {
        parameters,
        party_index: party(pairwise.members(), share.index())?,
        session_id: pairwise.inst().to_vec(),
        poly_point: Scalar::<Curve<G>>::ZERO,
        pk,
        zero_share: ZeroShare::initialize(Vec::with_capacity(holders.count())),
        mul_senders: BTreeMap::new(),
        mul_receivers: BTreeMap::new(),
        // No key is derived from a root: all zero but the public key.
        derivation_data: DerivData {
            depth: 0,
            child_number: 0,
            parent_fingerprint: [0; 4],
            poly_point: Scalar::<Curve<G>>::ZERO,
            pk,
            chain_code: [0; 32],
        },
        address: String::new(),
    })
}

/// Sets the share, weighed so that the engine's coefficient over places gives ours over indices (see the module's doc).
fn weigh<G: EcdsaGroup>(party: &mut Party<Curve<G>>, share: &RootShare<G>, run: &Run, members: &[NodeIndex]) -> Result<(), EcdsaError> {
    let signers = run.signers();
    let places =
        signers.iter().map(|i| super::party(members, *i).map(|p| NodeIndex(u16::from(p.as_u8())))).collect::<Result<Vec<_>, _>>()?;
    let mine = signers.iter().position(|i| *i == share.index()).ok_or(EcdsaError::NotAMember(share.index()))?;
    let coefficient = |set: &[NodeIndex]| lagrange_at_zero::<G>(set).ok().and_then(|all| all.get(mine).copied());
    let ours = coefficient(signers).ok_or(EcdsaError::Members)?;
    let theirs = coefficient(&places).and_then(|c| G::invert_public(&c)).ok_or(EcdsaError::Members)?;
    let scalar = SecretScalar::<G>::from_locked(share.scalar()).ok_or(EcdsaError::NotAMember(share.index()))?;
    scalar.expose(|s| party.poly_point = *s * (ours * theirs));
    Ok(())
}

/// The engine's abort as one of ours.
fn classify(abort: &Abort, members: &[NodeIndex]) -> EcdsaError {
    let peer = counterparty(&abort.reason).and_then(|number| member(members, number));
    match (&abort.kind, &abort.reason) {
        (AbortKind::BanCounterparty(number), reason) => match member(members, *number) {
            Some(peer) => EcdsaError::Cheated { peer, reason: reason.to_string() },
            None => EcdsaError::Aborted { peer: None, reason: reason.to_string() },
        },
        (AbortKind::Recoverable, AbortReason::SessionBindingMismatch { .. }) => {
            peer.map_or_else(|| EcdsaError::Aborted { peer: None, reason: abort.description() }, EcdsaError::Mismatch)
        }
        (AbortKind::Recoverable, AbortReason::SignatureVerificationFailed | AbortReason::ZeroDenominator) => EcdsaError::BadSignature,
        (AbortKind::Recoverable, reason) => EcdsaError::Aborted { peer, reason: reason.to_string() },
    }
}

/// Whom a reason of a signing step names. `AbortReason` is open: what is not known names nobody.
fn counterparty(reason: &AbortReason) -> Option<PartyIndex> {
    match reason {
        AbortReason::SessionBindingMismatch { counterparty }
        | AbortReason::CommitmentMismatch { counterparty }
        | AbortReason::TrivialInstancePoint { counterparty }
        | AbortReason::ProofVerificationFailed { counterparty } => Some(*counterparty),
        _ => None,
    }
}
