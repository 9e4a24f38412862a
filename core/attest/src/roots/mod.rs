//! The roots evidence may end at. Owns: the vendors' built-in roots and the operator's software roots. Never: verifies a chain.
//! A root is known by the SHA-256 of its SubjectPublicKeyInfo, so a re-issued certificate of one key is the same root.
//! Source: README.md beside this file for the certificates' origin.

use sha2::{Digest, Sha256};
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::AttestError;

const INTEL_SGX_ROOT_CA: &[u8] = include_bytes!("intel-sgx-root-ca.der");
const AWS_NITRO_ROOT_G1: &[u8] = include_bytes!("aws-nitro-root-g1.der");
const GOOGLE_EK_AK_CA_ROOT: &[u8] = include_bytes!("google-ek-ak-ca-root.der");
const GOOGLE_TPM_EK_V1_ROOT: &[u8] = include_bytes!("google-tpm-ek-v1-root.der");
const AMD_ARK_MILAN: &[u8] = include_bytes!("amd-ark-milan.der");
const AMD_ARK_GENOA: &[u8] = include_bytes!("amd-ark-genoa.der");
const AMD_ARK_TURIN: &[u8] = include_bytes!("amd-ark-turin.der");
const AZURE_VIRTUAL_TPM_ROOT_2023: &[u8] = include_bytes!("azure-virtual-tpm-root-2023.der");

/// Largest certificate taken as a root.
const ROOT_BYTES_MAX: usize = 8 * 1024;

/// Who signs evidence of a platform: a root ends the paths of its own vendor and no other's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Vendor {
    /// Intel: PCK certificates and collateral.
    Intel,
    /// AWS: NSM and NitroTPM documents.
    Aws,
    /// Google: attestation keys of vTPMs.
    Google,
    /// AMD: VCEK and VLEK.
    Amd,
    /// Microsoft: attestation keys of vTPMs.
    Microsoft,
}

/// One root certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Root {
    der: Vec<u8>,
    subject: Vec<u8>,
    spki: Vec<u8>,
    spki_sha256: [u8; 32],
    /// `None` for a software root.
    vendor: Option<Vendor>,
}

impl Root {
    fn parse(der: &[u8], vendor: Option<Vendor>) -> Result<Self, AttestError> {
        if der.len() > ROOT_BYTES_MAX {
            return Err(AttestError::Length { part: "root certificate", length_bytes: der.len(), limit_bytes: ROOT_BYTES_MAX });
        }
        let (rest, certificate) = X509Certificate::from_der(der)
            .map_err(|_| AttestError::Malformed { part: "root certificate", why: "not an X.509 certificate" })?;
        if !rest.is_empty() {
            return Err(AttestError::TrailingBytes { part: "root certificate", count_bytes: rest.len() });
        }
        let (subject, spki) = (certificate.subject().as_raw().to_vec(), certificate.public_key().raw.to_vec());
        let spki_sha256 = Sha256::digest(&spki).into();
        Ok(Self { der: der.to_vec(), subject, spki, spki_sha256, vendor })
    }

    /// The certificate, DER.
    #[must_use]
    pub fn der(&self) -> &[u8] {
        &self.der
    }

    /// Its subject, DER.
    pub(crate) fn subject(&self) -> &[u8] {
        &self.subject
    }

    /// The SubjectPublicKeyInfo, DER.
    pub(crate) fn spki(&self) -> &[u8] {
        &self.spki
    }

    /// SHA-256 of the certificate's SubjectPublicKeyInfo: the root's name.
    #[must_use]
    pub const fn spki_sha256(&self) -> &[u8; 32] {
        &self.spki_sha256
    }

    /// Whether this root was named by the operator and belongs to no vendor: nothing under it is backed by hardware.
    #[must_use]
    pub const fn is_software(&self) -> bool {
        self.vendor.is_none()
    }

    /// The vendor, or `None` for a software root.
    #[must_use]
    pub const fn vendor(&self) -> Option<Vendor> {
        self.vendor
    }
}

/// All roots a verifier accepts. There is no default: name what you trust.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrustRoots {
    roots: Vec<Root>,
}

impl TrustRoots {
    /// The vendors' roots, one or more of each [`Vendor`] whose platforms are served.
    #[must_use]
    pub fn production() -> Self {
        let built_in = [
            (Vendor::Intel, INTEL_SGX_ROOT_CA),
            (Vendor::Aws, AWS_NITRO_ROOT_G1),
            (Vendor::Google, GOOGLE_EK_AK_CA_ROOT),
            (Vendor::Google, GOOGLE_TPM_EK_V1_ROOT),
            (Vendor::Amd, AMD_ARK_MILAN),
            (Vendor::Amd, AMD_ARK_GENOA),
            (Vendor::Amd, AMD_ARK_TURIN),
            (Vendor::Microsoft, AZURE_VIRTUAL_TPM_ROOT_2023),
        ];
        let root = |(vendor, der)| Root::parse(der, Some(vendor)).expect("built-in roots parse, see the test below");
        Self { roots: built_in.into_iter().map(root).collect() }
    }

    /// No root at all; add software roots. For test vectors and clusters of emulated machines that must accept no hardware.
    #[must_use]
    pub const fn none() -> Self {
        Self { roots: Vec::new() }
    }

    /// Adds a software root (DER certificate) beside those already there.
    /// # Errors
    /// [`AttestError::Malformed`] and its kin when `der` is no certificate: the configuration is wrong.
    pub fn with_software_root(mut self, der: &[u8]) -> Result<Self, AttestError> {
        self.roots.push(Root::parse(der, None)?);
        Ok(self)
    }

    /// The roots, vendors' first.
    pub fn iter(&self) -> impl Iterator<Item = &Root> {
        self.roots.iter()
    }

    /// The roots that may end a path of `vendor`: its own, and software roots.
    pub fn serving(&self, vendor: Vendor) -> impl Iterator<Item = &Root> {
        self.roots.iter().filter(move |root| root.vendor.is_none_or(|own| own == vendor))
    }

    /// The root whose key has this SPKI digest.
    #[must_use]
    pub fn by_spki(&self, spki_sha256: &[u8; 32]) -> Option<&Root> {
        self.roots.iter().find(|root| root.spki_sha256 == *spki_sha256)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn production_roots_serve_their_own_vendor_only() {
        let roots = TrustRoots::production().with_software_root(INTEL_SGX_ROOT_CA).unwrap();
        let serving = |vendor| roots.serving(vendor).filter(|root| !root.is_software()).count();
        assert_eq!((serving(Vendor::Intel), serving(Vendor::Aws), serving(Vendor::Google)), (1, 1, 2));
        assert_eq!((serving(Vendor::Amd), serving(Vendor::Microsoft)), (3, 1));
        assert_eq!(roots.iter().filter(|root| root.is_software()).count(), 1);
        assert!(roots.serving(Vendor::Aws).any(Root::is_software), "a software root serves every vendor");
    }

    #[test]
    fn refuses_a_root_with_bytes_after_its_end() {
        let mut der = INTEL_SGX_ROOT_CA.to_vec();
        der.push(0);
        assert_eq!(
            TrustRoots::none().with_software_root(&der),
            Err(AttestError::TrailingBytes { part: "root certificate", count_bytes: 1 })
        );
    }

    #[test]
    fn finds_a_root_by_its_key() {
        let roots = TrustRoots::none().with_software_root(INTEL_SGX_ROOT_CA).unwrap();
        let spki = *roots.iter().next().unwrap().spki_sha256();
        assert!(roots.by_spki(&spki).unwrap().is_software());
        assert_eq!(roots.by_spki(&[0; 32]), None);
    }
}
