//! The temp CA: a P-256 key and self-signed certificate that anyone can compute from the cluster's id, the same at every node. Trusted
//! for nothing. And the certificate that a client makes under it.
//!
//! Owns: derivation, fixed dates. Never: a secret; the key is public by design. Source: threshold.md §5.2; ADR 0016.

use dstack_protocol::ClusterId;

use crate::build::{Draft, IssuedBy, Name, signed};
use crate::key::{P256Key, PublicKey};
use crate::{CertificateError, names, pem};

/// 2020-01-01T00:00:00Z.
const NOT_BEFORE_S: u64 = 1_577_836_800;
/// 2120-01-01T00:00:00Z.
const NOT_AFTER_S: u64 = 4_733_510_400;

/// A cluster's temp CA.
#[derive(Debug)]
pub struct TempCa {
    key: P256Key,
    scalar: [u8; 32],
    der: Vec<u8>,
}

/// The temp CA of a cluster: `d` is the first of `HKDF-SHA256(salt="DKMS-V1-TEMPCA", ikm=cluster_id, info=counter(1), 32)` that is a
/// scalar, counter from 0; signed by itself as RFC 6979 says.
///
/// # Errors
/// [`CertificateError::Build`]; never, in fact: 256 hashes in a row would have to miss the group.
pub fn temp_ca(cluster_id: &ClusterId) -> Result<TempCa, CertificateError> {
    let hkdf = hkdf::Hkdf::<sha2::Sha256>::new(Some(b"DKMS-V1-TEMPCA"), &cluster_id.0);
    for counter in 0..=u8::MAX {
        let mut scalar = [0; 32];
        hkdf.expand(&[counter], &mut scalar).map_err(|error| CertificateError::Build(error.to_string()))?;
        if let Ok(key) = P256Key::from_bytes(&scalar) {
            let mut serial = crate::issue::serial(cluster_id, u64::MAX);
            if let Some(last) = serial.last_mut() {
                *last = counter;
            }
            let draft = Draft { ca: Some(0), ..Draft::new(Name::ca(names::TEMP_CA), *key.public(), serial, NOT_BEFORE_S, NOT_AFTER_S) };
            let der = signed(&draft.tbs(None)?, key.public(), &key)?;
            return Ok(TempCa { key, scalar, der });
        }
    }
    Err(CertificateError::Build("no scalar in 256 hashes".to_owned()))
}

impl TempCa {
    /// The certificate, DER.
    #[must_use]
    pub fn der(&self) -> &[u8] {
        &self.der
    }

    /// The certificate, PEM.
    #[must_use]
    pub fn certificate_pem(&self) -> String {
        pem::certificate(&self.der)
    }

    /// The key, PKCS #8 PEM (138 bytes of DER, KMS API reference §5).
    #[must_use]
    pub fn key_pem(&self) -> String {
        pem::block("PRIVATE KEY", &self.key_pkcs8())
    }

    /// The key, PKCS #8 DER.
    #[must_use]
    pub fn key_pkcs8(&self) -> Vec<u8> {
        const HEAD: &[u8] = &[
            0x30, 0x81, 0x87, 0x02, 0x01, 0x00, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86,
            0x48, 0xce, 0x3d, 0x03, 0x01, 0x07, 0x04, 0x6d, 0x30, 0x6b, 0x02, 0x01, 0x01, 0x04, 0x20,
        ];
        const BEFORE_POINT: &[u8] = &[0xa1, 0x44, 0x03, 0x42, 0x00];
        [HEAD, &self.scalar, BEFORE_POINT, rcgen::PublicKeyData::der_bytes(&self.key)].concat()
    }

    /// A client's certificate under it, with evidence that binds `key`. `serial` is random, `now_s` the client's clock.
    ///
    /// # Errors
    /// [`CertificateError::Build`].
    pub fn client(&self, key: &PublicKey, attestation: &[u8], serial: [u8; 16], now_s: u64) -> Result<Vec<u8>, CertificateError> {
        let name = Name { common_name: names::RA_CLIENT.to_owned(), organization: None };
        let not_before_s = now_s.saturating_sub(crate::issue::BACKDATED_S);
        let draft = Draft {
            client_auth: true,
            extensions: vec![(names::ATTESTATION, attestation.to_vec())],
            ..Draft::new(
                name,
                *key,
                crate::leaf::positive(serial),
                not_before_s,
                now_s.saturating_add(crate::leaf::LEAF_S).min(NOT_AFTER_S),
            )
        };
        let issuer = IssuedBy { name: Name::ca(names::TEMP_CA), key: *self.key.public() };
        signed(&draft.tbs(Some(&issuer))?, self.key.public(), &self.key)
    }
}
