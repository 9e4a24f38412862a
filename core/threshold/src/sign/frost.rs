//! FROST(Ed25519, SHA-512) over shares of root `ca`: the engine is `frost-ed25519`, encodings and bookkeeping are ours.
//!
//! Owns: one-shot nonces, three message formats, naming the author of a bad share, strict verification of what comes out.
//! Never: stores or copies a nonce; [`sign_share`] takes it by value, whatever the outcome. Source: RFC 9591, threshold.md §5.2.
//!
//! A signer signs only under its own commitments, for the run they were made for, and over the message that it was given by its own
//! caller. A coordinator that shows signers different packages gets shares that do not fit together, and no signature.

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt;
use std::hint::black_box;

use curve25519_dalek::scalar::Scalar;
use dstack_protocol::NodeIndex;
use dstack_protocol::codec::{DecodeError, Reader, Wire, Writer, ascending};
use dstack_protocol::limits::NODES_MAX;
use dstack_secret::Secret;
use frost_core::round1::Nonce as EngineNonce;
use frost_ed25519 as engine;
use frost_ed25519::keys::{KeyPackage, PublicKeyPackage, SigningShare, VerifyingShare};
use frost_ed25519::round1::{NonceCommitment, SigningCommitments, SigningNonces};
use frost_ed25519::round2::SignatureShare;
use frost_ed25519::{Identifier, SigningPackage, VerifyingKey};
use sha2::{Digest as _, Sha512};
use zeroize::{Zeroize as _, ZeroizeOnDrop};

use crate::group::{Edwards25519, Group as _};
use crate::message;
use crate::sign::{Holders, RootShare, Run, tbs_digest};

/// Why a step of a run has no result. The run is over; the next try is a new `attempt`.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrostError {
    /// The signers are not exactly `t` holders. The fault of who chose them.
    #[error("{got} signers that are not exactly {threshold} holders of the root")]
    Signers {
        /// Threshold.
        threshold: u16,
        /// How many signers the run names.
        got: usize,
    },
    /// This node is no signer of the run.
    #[error("node {0} does not sign in this run")]
    NotASigner(NodeIndex),
    /// The run is bound to another message. The caller's fault.
    #[error("the run is bound to another message")]
    Message,
    /// Bytes of a signer that are not the message due. That node's fault.
    #[error("message of node {peer}: {error}")]
    Malformed {
        /// Author.
        peer: NodeIndex,
        /// What is wrong.
        error: DecodeError,
    },
    /// A package that does not decode. The coordinator's fault.
    #[error("package: {0}")]
    Package(#[from] DecodeError),
    /// A message of another run. Drop it.
    #[error("message of another run")]
    OtherRun,
    /// A message under another index than its sender's. That node's fault.
    #[error("node {peer} sent a message of node {claimed}")]
    Sender {
        /// Who sent it.
        peer: NodeIndex,
        /// Whom it names as author.
        claimed: NodeIndex,
    },
    /// The nonces were made for another run. The caller's fault; they are destroyed.
    #[error("nonces of another run")]
    OtherNonces,
    /// The package does not hold one commitment of each signer. The coordinator's fault.
    #[error("the package does not hold the commitments of exactly the signers")]
    PackageSigners,
    /// The package holds other commitments for this node than it made. The coordinator's fault.
    #[error("the package replaces this node's commitments")]
    CommitmentReplaced,
    /// The message of a signer is missing.
    #[error("nothing from node {0}")]
    Missing(NodeIndex),
    /// Two messages of one signer.
    #[error("two messages from node {0}")]
    Duplicate(NodeIndex),
    /// A signature share that is wrong. That node's fault: choose others.
    #[error("signature share of node {0} is wrong")]
    BadShare(NodeIndex),
    /// The engine refused. An error of ours, or of its.
    #[error("engine: {0}")]
    Engine(String),
    /// The combined signature is not valid, and no share is to blame. An error of ours, or of the engine's.
    #[error("the combined signature does not verify")]
    BadSignature,
}

impl FrostError {
    /// The signer that is provably at fault.
    #[must_use]
    pub fn culprit(&self) -> Option<NodeIndex> {
        match self {
            Self::Malformed { peer, .. } | Self::Sender { peer, .. } | Self::BadShare(peer) | Self::Duplicate(peer) => Some(*peer),
            Self::Signers { .. }
            | Self::NotASigner(_)
            | Self::Message
            | Self::Package(_)
            | Self::OtherRun
            | Self::OtherNonces
            | Self::PackageSigners
            | Self::CommitmentReplaced
            | Self::Missing(_)
            | Self::Engine(_)
            | Self::BadSignature => None,
        }
    }
}

/// What a signer keeps between [`commit`] and [`sign_share`]: gone with the first use. Not cloned, not stored, wiped on drop.
pub struct Nonces {
    sign_id: [u8; 32],
    index: NodeIndex,
    nonces: Box<SigningNonces>,
}

impl Drop for Nonces {
    fn drop(&mut self) {
        // The engine wipes by plain assignments, which the compiler leaves out before a block is freed: it must believe in a reader.
        self.nonces.zeroize();
        black_box(&*self.nonces);
    }
}

impl ZeroizeOnDrop for Nonces {}

impl fmt::Debug for Nonces {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Nonces").field("index", &self.index).finish_non_exhaustive()
    }
}

/// Step 1, signer: fresh nonces and the commitments to send to the coordinator. `rng`: 64 fresh bytes from the operating system.
///
/// # Errors
/// [`FrostError::Signers`], [`FrostError::NotASigner`].
pub fn commit(share: &RootShare<Edwards25519>, run: &Run, rng: Secret<64>) -> Result<(Nonces, Vec<u8>), FrostError> {
    check_signers(share.holders(), run)?;
    if !run.signers().contains(&share.index()) {
        return Err(FrostError::NotASigner(share.index()));
    }
    let nonces = rng.expose(|rng| {
        let (hiding, binding) = rng.split_at(32);
        Ok::<_, FrostError>(Box::new(SigningNonces::from_nonces(nonce(share, hiding)?, nonce(share, binding)?)))
    })?;
    let commitments = nonces.commitments();
    let bytes = Commitments {
        sign_id: run.id(),
        index: share.index(),
        hiding: element_bytes(commitments.hiding())?,
        binding: element_bytes(commitments.binding())?,
    }
    .encode();
    Ok((Nonces { sign_id: run.id(), index: share.index(), nonces }, bytes))
}

/// Step 2, coordinator: collects the commitments of all signers, each with the node that sent it.
///
/// # Errors
/// [`FrostError`]; [`FrostError::culprit`] names a signer that sent something else.
pub fn package(run: &Run, commitments: &[(NodeIndex, Vec<u8>)]) -> Result<Vec<u8>, FrostError> {
    let mut entries = BTreeMap::new();
    for (peer, bytes) in commitments {
        let decoded = Commitments::decode(bytes).map_err(|error| FrostError::Malformed { peer: *peer, error })?;
        check_author(run, *peer, decoded.index, &decoded.sign_id)?;
        if entries.insert(*peer, decoded).is_some() {
            return Err(FrostError::Duplicate(*peer));
        }
    }
    let commitments = run
        .signers()
        .iter()
        .map(|i| entries.remove(i).map(|c| (*i, c.hiding, c.binding)).ok_or(FrostError::Missing(*i)))
        .collect::<Result<_, _>>()?;
    Ok(Package { sign_id: run.id(), commitments }.encode())
}

/// Step 3, signer: signs `message` once. `message` is what this node rebuilt itself; the run must be bound to it.
///
/// # Errors
/// [`FrostError`]; the nonces are gone in any case.
pub fn sign_share(
    share: &RootShare<Edwards25519>,
    nonces: Nonces,
    run: &Run,
    message: &[u8],
    package: &[u8],
) -> Result<Vec<u8>, FrostError> {
    check_signers(share.holders(), run)?;
    check_message(run, message)?;
    if nonces.sign_id != run.id() || nonces.index != share.index() {
        return Err(FrostError::OtherNonces);
    }
    let package = open_package(run, message, package)?;
    let identifier = identifier(share.index())?;
    if package.signing_commitment(&identifier) != Some(*nonces.nonces.commitments()) {
        return Err(FrostError::CommitmentReplaced);
    }
    let key = key_package(share, identifier)?;
    let signature_share = engine::round2::sign(&package, &nonces.nonces, &key).map_err(engine_error)?;
    let z = scalar_bytes(&signature_share.serialize())?;
    Ok(Share { sign_id: run.id(), index: share.index(), z }.encode())
}

/// Step 4, coordinator: the signature over `message`, RFC 8032 encoding, verified strictly under the root's public key.
///
/// # Errors
/// [`FrostError`]; [`FrostError::culprit`] names a signer whose share is wrong.
pub fn aggregate(
    holders: &Holders<Edwards25519>,
    run: &Run,
    message: &[u8],
    package: &[u8],
    shares: &[(NodeIndex, Vec<u8>)],
) -> Result<[u8; 64], FrostError> {
    check_signers(holders, run)?;
    check_message(run, message)?;
    let package = open_package(run, message, package)?;
    let mut decoded = BTreeMap::new();
    for (peer, bytes) in shares {
        let share = Share::decode(bytes).map_err(|error| FrostError::Malformed { peer: *peer, error })?;
        check_author(run, *peer, share.index, &share.sign_id)?;
        let z = SignatureShare::deserialize(&share.z).map_err(|_| FrostError::BadShare(*peer))?;
        if decoded.insert(identifier(*peer)?, z).is_some() {
            return Err(FrostError::Duplicate(*peer));
        }
    }
    let names: BTreeMap<Identifier, NodeIndex> =
        run.signers().iter().map(|i| Ok((identifier(*i)?, *i))).collect::<Result<_, FrostError>>()?;
    if let Some((_, missing)) = names.iter().find(|(identifier, _)| !decoded.contains_key(identifier)) {
        return Err(FrostError::Missing(*missing));
    }
    let signature = engine::aggregate(&package, &decoded, &public_key_package(holders)?).map_err(|error| {
        let culprit = error.culprits().first().and_then(|identifier| names.get(identifier)).copied();
        culprit.map_or_else(|| engine_error(error), FrostError::BadShare)
    })?;
    let signature: [u8; 64] =
        signature.serialize().map_err(engine_error)?.try_into().map_err(|_| FrostError::Engine("signature is not 64 bytes".into()))?;
    // The combined signature is verified before use (threshold.md §5.1), by another implementation and strictly.
    if !message::verify(&Edwards25519::encode(holders.public_element()), message, &signature) {
        return Err(FrostError::BadSignature);
    }
    Ok(signature)
}

fn check_signers(holders: &Holders<Edwards25519>, run: &Run) -> Result<(), FrostError> {
    if holders.can_sign(run.signers()) {
        return Ok(());
    }
    Err(FrostError::Signers { threshold: holders.threshold(), got: run.signers().len() })
}

/// A run is bound to one TBS hash (threshold.md §5.2).
fn check_message(run: &Run, message: &[u8]) -> Result<(), FrostError> {
    if run.digest() == tbs_digest(message) { Ok(()) } else { Err(FrostError::Message) }
}

fn check_author(run: &Run, peer: NodeIndex, claimed: NodeIndex, sign_id: &[u8; 32]) -> Result<(), FrostError> {
    if *sign_id != run.id() {
        return Err(FrostError::OtherRun);
    }
    if claimed != peer {
        return Err(FrostError::Sender { peer, claimed });
    }
    if !run.signers().contains(&peer) {
        return Err(FrostError::NotASigner(peer));
    }
    Ok(())
}

/// `nonce_generate` of RFC 9591 §4.1: `H3(random(32) ‖ share)`. Written out, because the engine's own leaves copies of the share on
/// the heap.
fn nonce(share: &RootShare<Edwards25519>, random: &[u8]) -> Result<EngineNonce<engine::Ed25519Sha512>, FrostError> {
    share.scalar().expose(|secret| {
        let mut hash = Sha512::new();
        hash.update(b"FROST-ED25519-SHA512-v1");
        hash.update(b"nonce");
        hash.update(random);
        hash.update(secret);
        let mut wide: [u8; 64] = hash.finalize().into();
        let mut scalar = Scalar::from_bytes_mod_order_wide(&wide);
        let mut bytes = scalar.to_bytes();
        let nonce = EngineNonce::deserialize(&bytes).map_err(engine_error);
        wide.zeroize();
        scalar.zeroize();
        bytes.zeroize();
        nonce
    })
}

/// Identifier = index as scalar (threshold.md §3).
fn identifier(index: NodeIndex) -> Result<Identifier, FrostError> {
    Identifier::try_from(index.0).map_err(engine_error)
}

fn key_package(share: &RootShare<Edwards25519>, identifier: Identifier) -> Result<KeyPackage, FrostError> {
    let holders = share.holders();
    let vk = holders.verification_key(share.index()).ok_or(FrostError::NotASigner(share.index()))?;
    let verifying_share = VerifyingShare::deserialize(&Edwards25519::encode(vk)).map_err(engine_error)?;
    let signing_share = share.scalar().expose(|bytes| SigningShare::deserialize(bytes)).map_err(engine_error)?;
    Ok(KeyPackage::new(identifier, signing_share, verifying_share, verifying_key(holders)?, holders.threshold()))
}

fn public_key_package(holders: &Holders<Edwards25519>) -> Result<PublicKeyPackage, FrostError> {
    let shares = holders
        .keys()
        .map(|(i, vk)| Ok((identifier(i)?, VerifyingShare::deserialize(&Edwards25519::encode(vk)).map_err(engine_error)?)))
        .collect::<Result<_, FrostError>>()?;
    Ok(PublicKeyPackage::new(shares, verifying_key(holders)?, Some(holders.threshold())))
}

fn verifying_key(holders: &Holders<Edwards25519>) -> Result<VerifyingKey, FrostError> {
    VerifyingKey::deserialize(&Edwards25519::encode(holders.public_element())).map_err(engine_error)
}

/// The package of this run over this message; every commitment is an element of the group other than the identity.
fn open_package(run: &Run, message: &[u8], package: &[u8]) -> Result<SigningPackage, FrostError> {
    let package = Package::decode(package)?;
    if package.sign_id != run.id() {
        return Err(FrostError::OtherRun);
    }
    if !package.commitments.iter().map(|(i, _, _)| i).eq(run.signers()) {
        return Err(FrostError::PackageSigners);
    }
    let commitments = package
        .commitments
        .iter()
        .map(|(i, hiding, binding)| {
            let point = |bytes: &[u8; 32]| NonceCommitment::deserialize(bytes).map_err(engine_error);
            Ok((identifier(*i)?, SigningCommitments::new(point(hiding)?, point(binding)?)))
        })
        .collect::<Result<BTreeMap<_, _>, FrostError>>()?;
    Ok(SigningPackage::new(commitments, message))
}

fn element_bytes(commitment: &NonceCommitment) -> Result<[u8; 32], FrostError> {
    scalar_bytes(&commitment.serialize().map_err(engine_error)?)
}

fn scalar_bytes(bytes: &[u8]) -> Result<[u8; 32], FrostError> {
    bytes.try_into().map_err(|_| FrostError::Engine(format!("{} bytes where 32 belong", bytes.len())))
}

fn engine_error(error: engine::Error) -> FrostError {
    FrostError::Engine(error.to_string())
}

/// `"DKMS-V1-FROSTC" ‖ version(1)=1 ‖ sign_id(32) ‖ i(2) ‖ D_i(32) ‖ E_i(32)`: hiding and binding commitment.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Commitments {
    sign_id: [u8; 32],
    index: NodeIndex,
    hiding: [u8; 32],
    binding: [u8; 32],
}

impl Wire for Commitments {
    const BYTES_MAX: usize = 14 + 1 + 32 + 2 + 64;

    fn write(&self, w: &mut Writer) {
        w.label_v1("DKMS-V1-FROSTC").raw(&self.sign_id).u16(self.index.0).raw(&self.hiding).raw(&self.binding);
    }

    fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        r.label_v1("DKMS-V1-FROSTC")?;
        let (sign_id, index) = (r.array("sign_id")?, NodeIndex::read("i", r)?);
        Ok(Self { sign_id, index, hiding: element(r, "D")?, binding: element(r, "E")? })
    }
}

/// `"DKMS-V1-FROSTP" ‖ version(1)=1 ‖ sign_id(32) ‖ count(2) ‖ { i(2) ‖ D_i(32) ‖ E_i(32) }* ascending`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Package {
    sign_id: [u8; 32],
    commitments: Vec<(NodeIndex, [u8; 32], [u8; 32])>,
}

impl Wire for Package {
    const BYTES_MAX: usize = 14 + 1 + 32 + 2 + NODES_MAX * 66;

    fn write(&self, w: &mut Writer) {
        w.label_v1("DKMS-V1-FROSTP").raw(&self.sign_id).count2(self.commitments.len());
        for (i, hiding, binding) in &self.commitments {
            w.u16(i.0).raw(hiding).raw(binding);
        }
    }

    fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        r.label_v1("DKMS-V1-FROSTP")?;
        let sign_id = r.array("sign_id")?;
        let count = usize::from(r.u16("count")?);
        let commitments = r.list("commitments", count, 66, |r| Ok((NodeIndex::read("i", r)?, element(r, "D")?, element(r, "E")?)))?;
        ascending("commitments", commitments.iter().map(|(i, _, _)| i))?;
        Ok(Self { sign_id, commitments })
    }
}

/// `"DKMS-V1-FROSTS" ‖ version(1)=1 ‖ sign_id(32) ‖ i(2) ‖ z_i(32)`: a signature share.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Share {
    sign_id: [u8; 32],
    index: NodeIndex,
    z: [u8; 32],
}

impl Wire for Share {
    const BYTES_MAX: usize = 14 + 1 + 32 + 2 + 32;

    fn write(&self, w: &mut Writer) {
        w.label_v1("DKMS-V1-FROSTS").raw(&self.sign_id).u16(self.index.0).raw(&self.z);
    }

    fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        r.label_v1("DKMS-V1-FROSTS")?;
        let (sign_id, index, z) = (r.array("sign_id")?, NodeIndex::read("i", r)?, r.array("z")?);
        if Edwards25519::decode_scalar(&z).is_none() {
            return Err(DecodeError::Field { field: "z", reason: "not a canonical scalar" });
        }
        Ok(Self { sign_id, index, z })
    }
}

fn element(r: &mut Reader<'_>, field: &'static str) -> Result<[u8; 32], DecodeError> {
    let bytes = r.array(field)?;
    if Edwards25519::decode(&bytes).is_none() {
        return Err(DecodeError::Field { field, reason: "not an element of the prime-order group" });
    }
    Ok(bytes)
}
