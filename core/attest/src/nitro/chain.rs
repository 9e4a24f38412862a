//! The certificate path of an NSM or NitroTPM document. Owns: what AWS's paths are like, and that the bundle begins with the root.
//! Never: asks for a revocation list (AWS publishes none: its certificates live hours to days), reads the clock.
//! Source: dstack attestation reference, section 5.3 rule 4.

use dstack_protocol::UnixMillis;

use super::document::CABUNDLE_MAX;
use crate::{
    AttestError, TrustRoots, Vendor,
    x509::{self, KeyKind, Path, Purpose, Revocation, Rules, SignatureAlgorithm},
};

/// Every key is on P-384; dstack verifies for client authentication.
static RULES: Rules = Rules {
    chain: "nsm certificate chain",
    vendor: Vendor::Aws,
    keys: &[KeyKind::P384],
    signatures: &[SignatureAlgorithm::EcdsaP384Sha384],
    purpose: Some(Purpose::ClientAuthentication),
    alternative_names: false,
    revocation: Revocation::WhereGiven,
    intermediates_max: CABUNDLE_MAX,
};

/// Walks `bundle` (root first) and `leaf`.
///
/// The bundle's first certificate has to be one of `roots`, byte for byte: dstack ignores it and uses its own root, which
/// accepts the same paths, but a bundle that names another root is not what an NSM wrote.
///
/// # Errors
/// Classes `chain.*`, `time.cert_expired`, `time.not_yet_valid`, `sig.algorithm`, `parse.malformed`.
pub(super) fn walk<'a, 'r>(
    leaf: &'a [u8],
    bundle: &[&'a [u8]],
    roots: &'r TrustRoots,
    now: UnixMillis,
) -> Result<Path<'a, 'r>, AttestError> {
    let untrusted = AttestError::UntrustedRoot { chain: RULES.chain };
    let (first, intermediates) = bundle.split_first().ok_or(untrusted.clone())?;
    let root = roots.serving(RULES.vendor).find(|root| root.der() == *first).ok_or(untrusted)?;
    x509::walk(root, intermediates, leaf, &[], now, &RULES)
}
