//! Who the signers were at each size, derived from the admissions in the log.
//! Owns: counting Admit and Vouch as `apply` does. Never: judges evidence (whoever vouched did; its digest is in the signed Admit).
//! Source: threshold.md §2.6 (`members_version`) and §3 "Admit".

use std::collections::{BTreeMap, BTreeSet};

use dstack_protocol::ceremony::{AdmitBody, Message, MessageKind, body_digest};
use dstack_protocol::genesis::Genesis;
use dstack_protocol::{ClusterId, NodeIndex, Seat, Wire};

use crate::error::AuditError;
use crate::signers::SignerSet;

/// An Admit that waits for its vouches.
#[derive(Debug, Clone)]
struct Pending {
    admit_hash: [u8; 32],
    node_key: [u8; 32],
    vouched: BTreeSet<NodeIndex>,
}

/// The signer lists of a log, version by version.
#[derive(Debug, Clone)]
pub struct SignerHistory {
    cluster_id: ClusterId,
    seats: u16,
    faulty: u16,
    pending: BTreeMap<Seat, Pending>,
    admitted: BTreeMap<Seat, (NodeIndex, [u8; 32])>,
    versions: Vec<(u64, SignerSet)>,
    next_index: u16,
}

impl SignerHistory {
    /// Before the first admission.
    #[must_use]
    pub fn new(genesis: &Genesis) -> Self {
        Self {
            cluster_id: genesis.cluster_id(),
            seats: genesis.n,
            faulty: genesis.f,
            pending: BTreeMap::new(),
            admitted: BTreeMap::new(),
            versions: Vec::new(),
            next_index: genesis.n.saturating_add(1),
        }
    }

    /// The signers in force, once all seats of genesis are admitted.
    #[must_use]
    pub fn current(&self) -> Option<&SignerSet> {
        self.versions.last().map(|(_, signers)| signers)
    }

    /// The signers that count for a head of `members_version` at `size`, if that version was in force there.
    #[must_use]
    pub fn at(&self, members_version: u64, size: u64) -> Option<&SignerSet> {
        let at = usize::try_from(members_version).ok()?;
        let (since, signers) = self.versions.get(at)?;
        let until = self.versions.get(at + 1).map_or(u64::MAX, |(next, _)| *next);
        (*since <= size && size < until).then_some(signers)
    }

    /// Verifies a signature by index: a signer in force, or during genesis the key of that seat's own Admit.
    ///
    /// # Errors
    /// [`AuditError::UnknownSigner`] or [`AuditError::BadSignature`].
    pub fn verify(&self, index: NodeIndex, message: &[u8], signature: &[u8; 64]) -> Result<(), AuditError> {
        if let Some(signers) = self.current() {
            return signers.verify(index, message, signature);
        }
        let key = self.genesis_key(Seat(index.0)).ok_or(AuditError::UnknownSigner { index, members_version: 0 })?;
        SignerSet::new(0, 0, [(index, key)])?.verify(index, message, signature)
    }

    /// Takes the body of an applied admission record that ends at `size`.
    ///
    /// # Errors
    /// [`AuditError::LogRule`] or [`AuditError::Undecodable`] at that record; a wrong signature.
    pub fn admission(&mut self, pos: u64, body: &[u8]) -> Result<(), AuditError> {
        let undecodable = |source| AuditError::Undecodable { pos, source };
        let rule = |rule| AuditError::LogRule { pos, rule };
        let message = Message::decode(body).map_err(undecodable)?;
        let signed = message.signed_bytes(&self.cluster_id);
        if message.inst != [0; 32] {
            return Err(rule("an admission belongs to no ceremony"));
        }
        match message.kind {
            MessageKind::Admit => {
                let admit = AdmitBody::decode(&message.body).map_err(undecodable)?;
                if message.index.0 != 0 || admit.seat.0 == 0 || admit.seat.0 > self.seats {
                    return Err(rule("an Admit has index 0 and one of the cluster's seats"));
                }
                // threshold.md §3: signed by the key it brings.
                let own = NodeIndex(admit.seat.0);
                SignerSet::new(0, 0, [(own, admit.node_key)])?.verify(own, &signed, &message.sig)?;
                let admit_hash = body_digest(&message.body);
                self.pending.insert(admit.seat, Pending { admit_hash, node_key: admit.node_key, vouched: BTreeSet::new() });
                Ok(())
            }
            MessageKind::Vouch => {
                self.verify(message.index, &signed, &message.sig)?;
                let need = self.current().map_or(usize::from(self.seats), SignerSet::quorum);
                let mut waiting = self.pending.iter_mut();
                // A vouch for an Admit that is settled or was replaced is applied without effect.
                let Some((seat, pending)) = waiting.find(|(_, pending)| pending.admit_hash.as_slice() == message.body) else {
                    return Ok(());
                };
                pending.vouched.insert(message.index);
                if pending.vouched.len() < need {
                    return Ok(());
                }
                let (seat, key) = (*seat, pending.node_key);
                self.admit(pos, seat, key)
            }
            _ => Err(rule("an admission record holds an Admit or a Vouch")),
        }
    }

    /// A seat's new key is in force: at genesis under the seat's number, later under the next unused index.
    fn admit(&mut self, pos: u64, seat: Seat, key: [u8; 32]) -> Result<(), AuditError> {
        self.pending.remove(&seat);
        let formed = self.admitted.len() == usize::from(self.seats);
        let index = if formed {
            let index = NodeIndex(self.next_index);
            self.next_index = self.next_index.saturating_add(1);
            index
        } else {
            NodeIndex(seat.0)
        };
        self.admitted.insert(seat, (index, key));
        if self.admitted.len() == usize::from(self.seats) {
            let version = self.versions.len() as u64;
            let signers = SignerSet::new(version, self.faulty, self.admitted.values().copied())?;
            self.versions.push((pos.saturating_add(1), signers));
        }
        Ok(())
    }

    /// During genesis: the key that a seat brought.
    fn genesis_key(&self, seat: Seat) -> Option<[u8; 32]> {
        let waiting = self.pending.get(&seat).map(|pending| pending.node_key);
        waiting.or_else(|| self.admitted.get(&seat).map(|(_, key)| *key))
    }
}
