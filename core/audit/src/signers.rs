//! Who may sign heads, and when their signatures make a certificate.
//! Owns: the signer list of one `members_version`, strict Ed25519 verification, the quorum. Never: holds a private key.
//! Source: threshold.md §0 (`Sign`: strict, canonical, no small-order key) and §2.6 (`q = ⌊(N+f)/2⌋+1`).

use std::collections::{BTreeMap, BTreeSet};

use dstack_protocol::log::{Head, HeadCert, SignedHead};
use dstack_protocol::{ClusterId, NodeIndex};
use ed25519_dalek::{Signature, VerifyingKey};

use crate::error::AuditError;

/// The signers of one `members_version`: voters and witnesses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SignerSet {
    members_version: u64,
    quorum: usize,
    keys: BTreeMap<NodeIndex, VerifyingKey>,
}

impl SignerSet {
    /// The signers of `members_version`, of whom `faulty` (the genesis document's `f`) may lie.
    ///
    /// # Errors
    /// [`AuditError::SignerKey`] for a key that is not canonical or of small order, [`AuditError::SignerTwice`] for an index or key that
    /// comes twice, [`AuditError::NoSigners`] for an empty list.
    pub fn new(members_version: u64, faulty: u16, signers: impl IntoIterator<Item = (NodeIndex, [u8; 32])>) -> Result<Self, AuditError> {
        let mut keys = BTreeMap::new();
        let mut seen = BTreeSet::new();
        for (index, bytes) in signers {
            let key = strict_key(&bytes).ok_or(AuditError::SignerKey { index })?;
            if index.0 == 0 || keys.insert(index, key).is_some() || !seen.insert(bytes) {
                return Err(AuditError::SignerTwice { index });
            }
        }
        if keys.is_empty() {
            return Err(AuditError::NoSigners { members_version });
        }
        let quorum = keys.len().saturating_add(faulty.into()) / 2 + 1;
        Ok(Self { members_version, quorum, keys })
    }

    /// Version of this list.
    #[must_use]
    pub fn members_version(&self) -> u64 {
        self.members_version
    }

    /// Signatures that certify a head.
    #[must_use]
    pub fn quorum(&self) -> usize {
        self.quorum
    }

    /// The signers' indices, ascending.
    pub fn indices(&self) -> impl Iterator<Item = NodeIndex> {
        self.keys.keys().copied()
    }

    /// Whether `signature` over `message` is that signer's.
    ///
    /// # Errors
    /// [`AuditError::UnknownSigner`] or [`AuditError::BadSignature`].
    pub fn verify(&self, index: NodeIndex, message: &[u8], signature: &[u8; 64]) -> Result<(), AuditError> {
        let unknown = AuditError::UnknownSigner { index, members_version: self.members_version };
        let key = self.keys.get(&index).ok_or(unknown)?;
        // threshold.md §0: strict verification.
        key.verify_strict(message, &Signature::from_bytes(signature)).map_err(|_| AuditError::BadSignature { index })
    }

    /// Whether one pushed head is signed by who it names.
    ///
    /// # Errors
    /// [`AuditError::OtherMembers`], [`AuditError::UnknownSigner`] or [`AuditError::BadSignature`].
    pub fn verify_head(&self, cluster_id: &ClusterId, signed: &SignedHead) -> Result<(), AuditError> {
        self.same_members(&signed.head)?;
        self.verify(signed.index, &signed.head.signed_bytes(cluster_id), &signed.sig)
    }

    /// Judges a certificate: at least `q` valid signatures by distinct signers. Others are not counted and not kept.
    ///
    /// # Errors
    /// [`AuditError::OtherMembers`], or [`AuditError::BelowQuorum`] which names whose signatures did not count.
    pub fn certify(&self, cluster_id: &ClusterId, certificate: &HeadCert) -> Result<CertifiedHead, AuditError> {
        self.same_members(&certificate.head)?;
        let message = certificate.head.signed_bytes(cluster_id);
        let mut valid = BTreeMap::new();
        let mut bad = Vec::new();
        for (index, signature) in &certificate.signatures {
            match self.verify(*index, &message, signature) {
                Ok(()) => {
                    valid.insert(*index, *signature);
                }
                Err(_) => bad.push(*index),
            }
        }
        self.certified(certificate.head, valid).map_err(|have| AuditError::BelowQuorum { need: self.quorum, have, bad })
    }

    /// The certificate that already verified signatures make, or how many there are.
    fn certified(&self, head: Head, signatures: BTreeMap<NodeIndex, [u8; 64]>) -> Result<CertifiedHead, usize> {
        if signatures.len() < self.quorum {
            return Err(signatures.len());
        }
        Ok(CertifiedHead { certificate: HeadCert { head, signatures: signatures.into_iter().collect() } })
    }

    fn same_members(&self, head: &Head) -> Result<(), AuditError> {
        if head.members_version != self.members_version {
            return Err(AuditError::OtherMembers { need: self.members_version, have: head.members_version });
        }
        Ok(())
    }
}

/// A head that `q` signers of its `members_version` signed. Made only by [`SignerSet::certify`] and [`HeadTally::add`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertifiedHead {
    certificate: HeadCert,
}

impl CertifiedHead {
    /// The head.
    #[must_use]
    pub fn head(&self) -> &Head {
        &self.certificate.head
    }

    /// The certificate with its valid signatures only, ascending: fit to be passed on.
    #[must_use]
    pub fn certificate(&self) -> &HeadCert {
        &self.certificate
    }

    /// Who signed, ascending.
    pub fn signers(&self) -> impl Iterator<Item = NodeIndex> {
        self.certificate.signatures.iter().map(|(index, _)| *index)
    }
}

/// What one pushed signature meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HeadVote {
    /// Counted; no certificate yet, or the one already made stands.
    Counted,
    /// The signature that completed a certificate.
    Certified(CertifiedHead),
    /// The signer signed another head of the same size before: alarm, name it. It stops nothing alone (threshold.md §2.6).
    Equivocation {
        /// Who signed twice.
        culprit: NodeIndex,
        /// What it signed first.
        first: Box<SignedHead>,
        /// What it signed now.
        second: Box<SignedHead>,
    },
}

/// Collects the signatures of one `size`. At most one head for each signer is kept, so a liar costs no memory.
#[derive(Debug, Clone)]
pub struct HeadTally {
    cluster_id: ClusterId,
    signers: SignerSet,
    size: u64,
    votes: BTreeMap<NodeIndex, SignedHead>,
    certified: Option<Head>,
}

impl HeadTally {
    /// An empty tally for the heads of one size.
    #[must_use]
    pub fn new(cluster_id: ClusterId, signers: SignerSet, size: u64) -> Self {
        Self { cluster_id, signers, size, votes: BTreeMap::new(), certified: None }
    }

    /// Takes one signature.
    ///
    /// # Errors
    /// [`AuditError::OtherSize`], or why the signature does not count.
    pub fn add(&mut self, signed: SignedHead) -> Result<HeadVote, AuditError> {
        if signed.head.size != self.size {
            return Err(AuditError::OtherSize { need: self.size, have: signed.head.size });
        }
        self.signers.verify_head(&self.cluster_id, &signed)?;
        if let Some(first) = self.votes.get(&signed.index).filter(|first| first.head != signed.head) {
            return Ok(HeadVote::Equivocation { culprit: signed.index, first: Box::new(*first), second: Box::new(signed) });
        }
        self.votes.insert(signed.index, signed);
        if self.certified == Some(signed.head) {
            return Ok(HeadVote::Counted);
        }
        let same = self.votes.values().filter(|vote| vote.head == signed.head).map(|vote| (vote.index, vote.sig)).collect();
        Ok(match self.signers.certified(signed.head, same) {
            Ok(certified) => {
                self.certified = Some(signed.head);
                HeadVote::Certified(certified)
            }
            Err(_) => HeadVote::Counted,
        })
    }

    /// All signatures taken, by signer.
    pub fn votes(&self) -> impl Iterator<Item = &SignedHead> {
        self.votes.values()
    }
}

/// threshold.md §0: a key is canonical and not of small order.
fn strict_key(bytes: &[u8; 32]) -> Option<VerifyingKey> {
    // Field elements of edwards25519 are below 2^255 − 19; encodings at or above it decode too, as second names of small numbers.
    let [low, middle @ .., high] = bytes;
    if *low >= 0xed && middle.iter().all(|byte| *byte == 0xff) && high & 0x7f == 0x7f {
        return None;
    }
    VerifyingKey::from_bytes(bytes).ok().filter(|key| !key.is_weak())
}
