//! The roots evidence may end at. Owns: the vendors' built-in roots and the operator's software roots. Never: verifies a chain.
//! A root is known by the SHA-256 of its SubjectPublicKeyInfo, so a re-issued certificate of one key is the same root.
//! Source: README.md beside this file for the certificates' origin.

use sha2::{Digest, Sha256};
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::AttestError;

const INTEL_SGX_ROOT_CA: &[u8] = include_bytes!("intel-sgx-root-ca.der");
const AWS_NITRO_ROOT_G1: &[u8] = include_bytes!("aws-nitro-root-g1.der");

/// Largest certificate taken as a root.
const ROOT_BYTES_MAX: usize = 8 * 1024;

/// One root certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Root {
    der: Vec<u8>,
    spki_sha256: [u8; 32],
    software: bool,
}

impl Root {
    fn parse(der: &[u8], software: bool) -> Result<Self, AttestError> {
        if der.len() > ROOT_BYTES_MAX {
            return Err(AttestError::Length { part: "root certificate", length_bytes: der.len(), limit_bytes: ROOT_BYTES_MAX });
        }
        let (rest, certificate) = X509Certificate::from_der(der)
            .map_err(|_| AttestError::Malformed { part: "root certificate", why: "not an X.509 certificate" })?;
        if !rest.is_empty() {
            return Err(AttestError::TrailingBytes { part: "root certificate", count_bytes: rest.len() });
        }
        let spki_sha256 = Sha256::digest(certificate.public_key().raw).into();
        Ok(Self { der: der.to_vec(), spki_sha256, software })
    }

    /// The certificate, DER.
    #[must_use]
    pub fn der(&self) -> &[u8] {
        &self.der
    }

    /// SHA-256 of the certificate's SubjectPublicKeyInfo: the root's name.
    #[must_use]
    pub const fn spki_sha256(&self) -> &[u8; 32] {
        &self.spki_sha256
    }

    /// Whether this root was named by the operator and belongs to no vendor: nothing under it is backed by hardware.
    #[must_use]
    pub const fn is_software(&self) -> bool {
        self.software
    }
}

/// All roots a verifier accepts. There is no default: name what you trust.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrustRoots {
    roots: Vec<Root>,
}

impl TrustRoots {
    /// The vendors' roots: Intel SGX Root CA and AWS Nitro Enclaves Root G1.
    #[must_use]
    pub fn production() -> Self {
        let vendor = |der| Root::parse(der, false).expect("built-in roots parse, see the test below");
        Self { roots: vec![vendor(INTEL_SGX_ROOT_CA), vendor(AWS_NITRO_ROOT_G1)] }
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
        self.roots.push(Root::parse(der, true)?);
        Ok(self)
    }

    /// The roots, vendors' first.
    pub fn iter(&self) -> impl Iterator<Item = &Root> {
        self.roots.iter()
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
    fn production_roots_are_two_vendors() {
        let roots = TrustRoots::production();
        assert_eq!(roots.iter().count(), 2);
        assert!(roots.iter().all(|root| !root.is_software()));
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
