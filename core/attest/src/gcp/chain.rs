//! The path of a vTPM's attestation key on Google Cloud. Owns: what those paths are like, found in a pool or given whole.
//! Never: takes a root from the evidence.
//! Source: dstack attestation reference, section 5.2 rule 4; the vectors' README (`gcp-tpm`, `gce-ak-cert`).

use dstack_protocol::UnixMillis;
use x509_parser::der_parser::{Oid, oid};

use crate::{
    AttestError, TrustRoots, Vendor, pem,
    x509::{self, KeyKind, Path, Purpose, Revocation, Rules, SignatureAlgorithm, Untrusted},
};

/// tcg-kp-EKCertificate, which Google's CA certificates name; newer leaves name no purpose.
static EK_CERTIFICATE: Oid<'static> = oid!(2.23.133.8.1);

/// The older leaves have an empty subject and, critical, the TPM's maker as alternative name.
static RULES: Rules = Rules {
    chain: "ak certificate chain",
    vendor: Vendor::Google,
    keys: &[KeyKind::Rsa, KeyKind::P256, KeyKind::P384],
    signatures: &[SignatureAlgorithm::RsaPkcs1Sha256, SignatureAlgorithm::EcdsaP256Sha256, SignatureAlgorithm::EcdsaP384Sha384],
    purpose: Some(Purpose::Other(&EK_CERTIFICATE)),
    alternative_names: true,
    revocation: Revocation::WhereNamed,
    intermediates_max: 3,
};

/// Finds the path from an attestation key's certificate to one of Google's roots (or a software root).
/// # Errors
/// Classes `chain.*`, `time.*`, `sig.algorithm`, `parse.*`; `collateral.mismatch` for a list that is not there.
pub fn verify_ak<'a, 'r>(
    leaf: &'a [u8],
    untrusted: &Untrusted<'a>,
    roots: &'r TrustRoots,
    now: UnixMillis,
    revocation: Revocation,
) -> Result<Path<'a, 'r>, AttestError> {
    x509::build(leaf, untrusted, roots, now, &Rules { revocation, ..RULES })
}

/// A path given whole, leaf first and its root last, as PEM.
/// # Errors
/// Parse classes.
pub fn chain_of_pem(text: &[u8]) -> Result<Vec<Vec<u8>>, AttestError> {
    pem::certificates(text, RULES.chain)
}

/// Walks a path given whole. Its last certificate has to be one of `roots`, byte for byte.
/// # Errors
/// As [`verify_ak`]; no revocation list is asked for.
pub(crate) fn walk_ak<'a, 'r>(chain: &'a [Vec<u8>], roots: &'r TrustRoots, now: UnixMillis) -> Result<Path<'a, 'r>, AttestError> {
    let untrusted = AttestError::UntrustedRoot { chain: RULES.chain };
    let (last, below) = chain.split_last().ok_or(untrusted.clone())?;
    let root = roots.serving(RULES.vendor).find(|root| root.der() == *last).ok_or(untrusted)?;
    let (leaf, issuers) = below.split_first().ok_or(AttestError::ChainInvalid { chain: RULES.chain, why: "holds nothing but a root" })?;
    let downwards: Vec<&[u8]> = issuers.iter().rev().map(Vec::as_slice).collect();
    x509::walk(root, &downwards, leaf, &[], now, &Rules { revocation: Revocation::WhereGiven, ..RULES })
}
