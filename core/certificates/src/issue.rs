//! What the roots sign, rebuilt from the log's row by every signer, and whether what came back is it.
//!
//! Owns: fields of each object's certificate; serial and dates from the row. Never: signs. Source: threshold.md §1.6, §5.2.

use dstack_protocol::codec::{Writer, sha256};
use dstack_protocol::genesis::CaAlgorithm;
use dstack_protocol::limits::ISSUING_CA_S;
use dstack_protocol::sign::SignObject;
use dstack_protocol::state::AskRow;
use dstack_protocol::{ClusterId, Generation, RootTag};

use crate::build::{Draft, IssuedBy, Name, assemble as certificate};
use crate::key::PublicKey;
use crate::read::Certificate;
use crate::{CertificateError, identity, names};

/// Certificates begin this long before the log time of their ask: clocks of guests may be behind.
pub const BACKDATED_S: u64 = 3600;
/// Life of the root's certificate: signed once, and nothing pinned may outlive it. 100 years.
pub const ROOT_CA_S: u64 = 36_525 * 86_400;
/// Life of an app's CA: signed once, and its leaves live under it. 50 years.
pub const APP_CA_S: u64 = 18_262 * 86_400;

/// Serial number of the certificate asked for at `pos`: 16 bytes, the first between 0x40 and 0x7f.
#[must_use]
pub fn serial(cluster_id: &ClusterId, pos: u64) -> [u8; 16] {
    let hash = sha256(&[b"DKMS-V1-SERIAL", &cluster_id.0, &pos.to_be_bytes()]);
    let mut serial = [0; 16];
    for (to, from) in serial.iter_mut().zip(hash) {
        *to = from;
    }
    if let Some(first) = serial.first_mut() {
        *first = 0x40 | (*first & 0x3f);
    }
    serial
}

/// The bytes that a generation's statement signs: `"DKMS-V1-GEN" ‖ cluster_id(32) ‖ generation(4) ‖ enc(PK_prf)` (threshold.md §1.6).
#[must_use]
pub fn generation_statement(cluster_id: &ClusterId, generation: Generation, pk_prf: &[u8; 32]) -> Vec<u8> {
    let mut w = Writer::labelled("DKMS-V1-GEN");
    w.raw(&cluster_id.0).u32(generation.0).raw(pk_prf);
    w.into_bytes()
}

/// What root `ca` signs for an ask: a TBSCertificate, or a generation's statement. `root` is the root's public key.
///
/// # Errors
/// [`CertificateError::WrongRoot`] for objects of root `id` (those have a digest), [`CertificateError::BadKey`] for a key off its curve.
pub fn to_be_signed(cluster_id: &ClusterId, ask: &AskRow, root: &PublicKey) -> Result<Vec<u8>, CertificateError> {
    let serial = serial(cluster_id, ask.pos);
    let log_time_s = ask.log_time.0 / 1000;
    let not_before_s = log_time_s.saturating_sub(BACKDATED_S);
    let under_root = IssuedBy { name: Name::ca(names::ROOT_CA), key: *root };
    match &ask.object {
        SignObject::RootCa { .. } => {
            let not_after_s = log_time_s.saturating_add(ROOT_CA_S);
            let draft = Draft { ca: Some(1), ..Draft::new(Name::ca(names::ROOT_CA), *root, serial, not_before_s, not_after_s) };
            draft.tbs(None)
        }
        SignObject::AppCa { app_id, public_key, .. } => {
            let key = PublicKey::p256("app ca", public_key)?;
            let not_after_s = log_time_s.saturating_add(APP_CA_S);
            let extensions = vec![(names::APP_ID, app_id.0.to_vec()), (names::USAGE, names::USAGE_APP_CA.as_bytes().to_vec())];
            let draft = Draft { ca: Some(0), extensions, ..Draft::new(Name::ca(names::APP_CA), key, serial, not_before_s, not_after_s) };
            draft.tbs(Some(&under_root))
        }
        SignObject::IssuingCa { index, public_key, hosts, .. } => {
            let key = PublicKey::p256("issuing ca", public_key)?;
            // At most seven days, the hour before included.
            let not_after_s = not_before_s.saturating_add(ISSUING_CA_S);
            let subject = node_ca_name(index.0);
            let draft = Draft { ca: Some(0), permitted: hosts.clone(), ..Draft::new(subject, key, serial, not_before_s, not_after_s) };
            draft.tbs(Some(&under_root))
        }
        SignObject::Generation { generation, pk_prf } => Ok(generation_statement(cluster_id, *generation, pk_prf)),
        SignObject::AppKey { .. } | SignObject::EnvKey { .. } | SignObject::EnvKeyAt { .. } => {
            Err(CertificateError::WrongRoot { object: "key", root: "ca" })
        }
    }
}

pub(crate) fn node_ca_name(index: u16) -> Name {
    Name::ca(format!("{} {index}", names::NODE_CA))
}

/// A certificate from what [`to_be_signed`] gave and the root's signature: 64 bytes, of Ed25519, or `r ‖ s` of P-256.
///
/// # Errors
/// [`CertificateError::BadSignature`].
pub fn assemble(tbs: &[u8], root: &PublicKey, signature: &[u8; 64]) -> Result<Vec<u8>, CertificateError> {
    let bad = CertificateError::BadSignature { what: "certificate" };
    let encoded = match root {
        PublicKey::Ed25519(_) => signature.to_vec(),
        PublicKey::P256(_) => p256::ecdsa::Signature::from_slice(signature).map_err(|_| bad)?.to_der().as_bytes().to_vec(),
    };
    root.verify("certificate", tbs, &encoded)?;
    Ok(certificate(tbs, root, &encoded))
}

/// Whether `bytes` are the signature of what was asked for: what `apply` and a reader of a snapshot check. For root `ca` the
/// certificate's signature, key, serial and kind; its other fields are what `t` signers rebuilt. `root_key` is the root's public key
/// as the state holds it.
///
/// # Errors
/// The first thing that is wrong.
pub fn check_stored(
    cluster_id: &ClusterId,
    algorithm: CaAlgorithm,
    root_key: &[u8],
    ask: &AskRow,
    bytes: &[u8],
) -> Result<(), CertificateError> {
    if ask.object.root() == RootTag::Id {
        let digest = ask.object.identity_digest().ok_or(CertificateError::WrongRoot { object: "certificate", root: "id" })?;
        return identity::verify(root_key, &digest, bytes);
    }
    let root = PublicKey::root(algorithm, root_key)?;
    let (subject, ca, key) = match &ask.object {
        SignObject::RootCa { .. } => (names::ROOT_CA.to_owned(), 1, root),
        SignObject::AppCa { public_key, .. } => (names::APP_CA.to_owned(), 0, PublicKey::p256("app ca", public_key)?),
        SignObject::IssuingCa { index, public_key, .. } => {
            (node_ca_name(index.0).common_name, 0, PublicKey::p256("issuing ca", public_key)?)
        }
        SignObject::Generation { generation, pk_prf } => {
            let statement = generation_statement(cluster_id, *generation, pk_prf);
            let signature = <&[u8; 64]>::try_from(bytes).map_err(|_| CertificateError::BadSignature { what: "statement" })?;
            return assemble(&statement, &root, signature).map(|_| ());
        }
        SignObject::AppKey { .. } | SignObject::EnvKey { .. } | SignObject::EnvKeyAt { .. } => {
            return Err(CertificateError::WrongRoot { object: "key", root: "ca" });
        }
    };
    let certificate = Certificate::read(bytes)?;
    certificate.signed_by(&root)?;
    if certificate.key() != &key {
        return Err(CertificateError::field("public key", "the key asked for", "another"));
    }
    let expected = serial(cluster_id, ask.pos);
    if certificate.serial() != expected {
        return Err(CertificateError::field("serial", hex(&expected), hex(certificate.serial())));
    }
    certificate.expect_name(&subject, Some(names::ORGANIZATION))?;
    certificate.expect_ca(ca)
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().take(32).map(|byte| format!("{byte:02x}")).collect()
}
