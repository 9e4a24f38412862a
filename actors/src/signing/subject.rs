//! What a run is over, rebuilt from this node's own applied state.
//!
//! Owns: the checks before anything is signed, the bytes, the run's name. Never: takes a digest, a serial or a date from another node.
//! Source: threshold.md §5.1 ("signers MUST NOT sign a digest they were handed"), §5.2.

use std::collections::BTreeMap;

use dstack_certificates::{PublicKey, issue};
use dstack_protocol::codec::sha256;
use dstack_protocol::genesis::CaAlgorithm;
use dstack_protocol::governance::Object;
use dstack_protocol::sign::{Basis, SignKey, SignObject};
use dstack_protocol::state::{AskRow, State};
use dstack_protocol::{ClusterId, Epoch, NodeIndex, Refusal, RefusalCode, RootTag, Seat};
use dstack_raft::machine::view;
use dstack_threshold::sign::{Run, Scope, tbs_digest};

use crate::share_holder::Under;

/// An ask that waits, with everything that a run over it needs.
#[derive(Debug, Clone)]
pub(super) struct Subject {
    pub(super) cluster_id: ClusterId,
    pub(super) ask: AskRow,
    pub(super) under: Under,
    pub(super) threshold: u16,
    pub(super) ca: CaAlgorithm,
    /// The root's public key and every holder's verification key, as the state has them.
    pub(super) public_key: Vec<u8>,
    pub(super) verification_keys: Vec<(NodeIndex, Vec<u8>)>,
    /// Holders that have a seat.
    pub(super) seats: BTreeMap<NodeIndex, Seat>,
    /// What is signed.
    pub(super) content: Content,
}

/// What is signed.
#[derive(Debug, Clone)]
pub(super) enum Content {
    /// Bytes: a TBSCertificate or a statement.
    Bytes(Vec<u8>),
    /// A digest of typed fields.
    Digest([u8; 32]),
}

/// How it is signed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Algorithm {
    Frost,
    Ecdsa,
}

impl Subject {
    /// Of the ask under `key` at leaf `pos`, if it still waits and may still be signed.
    pub(super) fn of(state: &State, cluster_id: &ClusterId, key: &SignKey, pos: u64) -> Result<Self, Refusal> {
        let unknown = || Refusal::new(RefusalCode::SignUnknown, format!("an open ask at leaf {pos}"), "none");
        let ask = state.asked_at(key, pos).ok_or_else(unknown)?.clone();
        allowed(state, &ask.object)?;
        let root = ask.object.root();
        let (generation, ca) = (ask.object.generation(), state.genesis.ca_algorithm);
        let missing = || Refusal::new(RefusalCode::RootMissing, format!("root {} in force", root.name()), "it is not").retry_after(1000);
        let row = state.roots.get(&(generation, root)).ok_or_else(missing)?;
        let internal = |what: String| Refusal::new(RefusalCode::Internal, "an ask that can be rebuilt", what);
        let content = match ask.object.identity_digest() {
            Some(digest) => Content::Digest(digest),
            None => {
                let root_key = PublicKey::root(ca, &row.public_key.0).map_err(|error| internal(error.to_string()))?;
                Content::Bytes(issue::to_be_signed(cluster_id, &ask, &root_key).map_err(|error| internal(error.to_string()))?)
            }
        };
        Ok(Self {
            cluster_id: *cluster_id,
            under: Under { root, generation, epoch: row.epoch },
            threshold: row.t,
            ca,
            public_key: row.public_key.0.clone(),
            verification_keys: row.vks.iter().map(|(index, vk)| (*index, vk.0.clone())).collect(),
            seats: state.seats.iter().filter(|(_, seat)| row.vks.contains_key(&seat.index)).map(|(seat, row)| (row.index, *seat)).collect(),
            content,
            ask,
        })
    }

    pub(super) fn algorithm(&self) -> Algorithm {
        match (self.under.root, self.ca) {
            (RootTag::Ca, CaAlgorithm::Ed25519) => Algorithm::Frost,
            (RootTag::Ca | RootTag::Id | RootTag::Prf, _) => Algorithm::Ecdsa,
        }
    }

    /// The bytes of a FROST run.
    pub(super) fn message(&self) -> Vec<u8> {
        match &self.content {
            Content::Bytes(bytes) => bytes.clone(),
            Content::Digest(digest) => digest.to_vec(),
        }
    }

    /// The 32 bytes of an ECDSA run.
    pub(super) fn digest(&self) -> [u8; 32] {
        match &self.content {
            Content::Bytes(bytes) => sha256(&[bytes]),
            Content::Digest(digest) => *digest,
        }
    }

    /// The run of `signers`, if these are exactly `t` holders of the epoch in force.
    pub(super) fn run(&self, epoch: Epoch, attempt: u32, signers: &[NodeIndex]) -> Result<Run, Refusal> {
        let refuse = |expected: String, got: String| Refusal::new(RefusalCode::SignRun, expected, got).retry_after(200);
        if epoch != self.under.epoch {
            return Err(refuse(format!("a run of epoch {}", self.under.epoch), epoch.to_string()));
        }
        let holders = signers.iter().filter(|index| self.seats.contains_key(index)).count();
        if signers.len() != usize::from(self.threshold) || holders != usize::from(self.threshold) {
            let got = format!("{} signers, {holders} of them holders with a seat", signers.len());
            return Err(refuse(format!("exactly {} holders", self.threshold), got));
        }
        let Under { root, generation, epoch } = self.under;
        let scope = Scope { cluster_id: self.cluster_id, generation, root, epoch, attempt };
        let bound = match &self.content {
            Content::Bytes(bytes) => tbs_digest(bytes),
            Content::Digest(digest) => *digest,
        };
        Run::new(&scope, bound, signers).map_err(|error| refuse("a run".to_owned(), error.to_string()))
    }

    /// What the log stores of a signature: the certificate around it, or itself.
    pub(super) fn stored(&self, signature: &[u8]) -> Result<Vec<u8>, Refusal> {
        let internal = |what: String| Refusal::new(RefusalCode::SignatureInvalid, "a signature over what was asked for", what);
        let Content::Bytes(tbs) = &self.content else { return Ok(signature.to_vec()) };
        let plain: &[u8; 64] = signature.first_chunk().ok_or_else(|| internal(format!("{} bytes", signature.len())))?;
        if matches!(self.ask.object, SignObject::Generation { .. }) {
            return Ok(plain.to_vec());
        }
        let root = PublicKey::root(self.ca, &self.public_key).map_err(|error| internal(error.to_string()))?;
        issue::assemble(tbs, &root, plain).map_err(|error| internal(error.to_string()))
    }

    /// Whether `bytes` are what the log would store.
    pub(super) fn check_stored(&self, bytes: &[u8]) -> Result<(), Refusal> {
        issue::check_stored(&self.cluster_id, self.ca, &self.public_key, &self.ask, bytes)
            .map_err(|error| Refusal::new(RefusalCode::SignatureInvalid, "a signature over what was asked for", error.to_string()))
    }

    /// The hash of the claim that the ask rests on.
    pub(super) fn claim(&self) -> Option<[u8; 32]> {
        match self.ask.basis {
            Basis::Claim { claim_hash } => Some(claim_hash),
            Basis::State | Basis::Release { .. } => None,
        }
    }
}

/// The latest applied state still allows it: a revocation after the ask stops every signature not yet given.
fn allowed(state: &State, object: &SignObject) -> Result<(), Refusal> {
    let generation = object.generation();
    if state.governance.revoked.contains(&Object::Generation(generation)) {
        return Err(Refusal::new(RefusalCode::GenerationRevoked, "a generation that is not revoked", generation.to_string()));
    }
    if let Some(app_id) = object.app_id() {
        state.app(app_id).map_err(|code| Refusal::new(code, "an app that may be served", app_id.to_string()))?;
    }
    if let SignObject::IssuingCa { index, .. } = object
        && !view::signers(state).is_some_and(|signers| signers.keys.contains_key(index))
    {
        return Err(Refusal::new(RefusalCode::SignAuthor, "a node in force", index.to_string()));
    }
    Ok(())
}
