//! Public keys and signature algorithms of certificates. Owns: which pairs of key, hash and padding are served, and the one call
//! that verifies. Never: SHA-1, RSA below 2048 bits, a curve other than P-256 and P-384.
//! Source: RFC 5480, RFC 4055 (PSS parameters), RFC 8017.

use aws_lc_rs::signature::{self, UnparsedPublicKey, VerificationAlgorithm};
use x509_parser::{
    der_parser::{Oid, oid},
    oid_registry::{
        OID_EC_P256, OID_KEY_TYPE_EC_PUBLIC_KEY, OID_NIST_EC_P384, OID_NIST_HASH_SHA384, OID_PKCS1_RSAENCRYPTION, OID_PKCS1_RSASSAPSS,
        OID_PKCS1_SHA256WITHRSA, OID_PKCS1_SHA384WITHRSA, OID_PKCS1_SHA512WITHRSA, OID_SIG_ECDSA_WITH_SHA256, OID_SIG_ECDSA_WITH_SHA384,
    },
    prelude::AlgorithmIdentifier,
    signature_algorithm::RsaSsaPssParams,
    x509::SubjectPublicKeyInfo,
};

/// id-mgf1, the only mask generation of RFC 8017.
const MGF1: Oid<'static> = oid!(1.2.840.113549.1.1.8);

/// Kind of a public key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyKind {
    /// ECDSA on P-256.
    P256,
    /// ECDSA on P-384.
    P384,
    /// RSA, 2048 to 8192 bits.
    Rsa,
}

/// A public key of a kind that is served: an uncompressed point, or an RSAPublicKey in DER.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Key<'a> {
    kind: KeyKind,
    bytes: &'a [u8],
}

impl<'a> Key<'a> {
    /// The key of a certificate, or `None` for a kind that is not served.
    #[must_use]
    pub fn of(key: &'a SubjectPublicKeyInfo<'_>) -> Option<Self> {
        let bytes: &[u8] = key.subject_public_key.data.as_ref();
        let algorithm = &key.algorithm.algorithm;
        if *algorithm == OID_PKCS1_RSAENCRYPTION {
            return Some(Self { kind: KeyKind::Rsa, bytes });
        }
        if *algorithm != OID_KEY_TYPE_EC_PUBLIC_KEY {
            return None;
        }
        let curve = key.algorithm.parameters.as_ref()?.as_oid().ok()?;
        let (kind, size_bytes) = match curve {
            curve if curve == OID_EC_P256 => (KeyKind::P256, 65),
            curve if curve == OID_NIST_EC_P384 => (KeyKind::P384, 97),
            _ => return None,
        };
        (bytes.len() == size_bytes).then_some(Self { kind, bytes })
    }

    /// The key of an uncompressed point on P-256, where it has a point's form.
    #[must_use]
    pub fn of_p256_point(point: &'a [u8]) -> Option<Self> {
        (point.len() == 65 && point.first() == Some(&4)).then_some(Self { kind: KeyKind::P256, bytes: point })
    }

    /// An RSA key that stands in no certificate: RSAPublicKey in DER.
    pub(crate) const fn rsa(bytes: &'a [u8]) -> Self {
        Self { kind: KeyKind::Rsa, bytes }
    }

    /// Its kind.
    #[must_use]
    pub const fn kind(&self) -> KeyKind {
        self.kind
    }

    /// The uncompressed point of a curve, or the RSAPublicKey in DER.
    #[must_use]
    pub const fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// Whether `signature` over `message` verifies. The algorithm has to be one for this kind of key.
    #[must_use]
    pub fn verifies(&self, algorithm: SignatureAlgorithm, message: &[u8], signature: &[u8]) -> bool {
        algorithm.key() == self.kind && UnparsedPublicKey::new(algorithm.verifier(), self.bytes).verify(message, signature).is_ok()
    }
}

/// A signature algorithm as certificates, revocation lists and TPMs use them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SignatureAlgorithm {
    /// ECDSA on P-256 with SHA-256, DER form.
    EcdsaP256Sha256,
    /// ECDSA on P-256 with SHA-256, `r ‖ s`.
    EcdsaP256Sha256Fixed,
    /// ECDSA on P-384 with SHA-384, DER form.
    EcdsaP384Sha384,
    /// RSASSA-PKCS1-v1_5 with SHA-256.
    RsaPkcs1Sha256,
    /// RSASSA-PKCS1-v1_5 with SHA-384.
    RsaPkcs1Sha384,
    /// RSASSA-PKCS1-v1_5 with SHA-512.
    RsaPkcs1Sha512,
    /// RSASSA-PSS with SHA-384 throughout and a salt of 48 bytes.
    RsaPssSha384,
}

impl SignatureAlgorithm {
    /// The algorithm an identifier names, or `None` for one that is not served.
    #[must_use]
    pub fn of(identifier: &AlgorithmIdentifier<'_>) -> Option<Self> {
        let oid = &identifier.algorithm;
        let parameters = identifier.parameters.as_ref();
        if *oid == OID_PKCS1_RSASSAPSS {
            return is_pss_sha384(identifier).then_some(Self::RsaPssSha384);
        }
        let (algorithm, bare) = match oid {
            oid if *oid == OID_SIG_ECDSA_WITH_SHA256 => (Self::EcdsaP256Sha256, parameters.is_none()),
            oid if *oid == OID_SIG_ECDSA_WITH_SHA384 => (Self::EcdsaP384Sha384, parameters.is_none()),
            oid if *oid == OID_PKCS1_SHA256WITHRSA => (Self::RsaPkcs1Sha256, is_null_or_absent(identifier)),
            oid if *oid == OID_PKCS1_SHA384WITHRSA => (Self::RsaPkcs1Sha384, is_null_or_absent(identifier)),
            oid if *oid == OID_PKCS1_SHA512WITHRSA => (Self::RsaPkcs1Sha512, is_null_or_absent(identifier)),
            _ => return None,
        };
        bare.then_some(algorithm)
    }

    /// The kind of key it takes.
    #[must_use]
    pub const fn key(self) -> KeyKind {
        match self {
            Self::EcdsaP256Sha256 | Self::EcdsaP256Sha256Fixed => KeyKind::P256,
            Self::EcdsaP384Sha384 => KeyKind::P384,
            Self::RsaPkcs1Sha256 | Self::RsaPkcs1Sha384 | Self::RsaPkcs1Sha512 | Self::RsaPssSha384 => KeyKind::Rsa,
        }
    }

    fn verifier(self) -> &'static dyn VerificationAlgorithm {
        match self {
            Self::EcdsaP256Sha256 => &signature::ECDSA_P256_SHA256_ASN1,
            Self::EcdsaP256Sha256Fixed => &signature::ECDSA_P256_SHA256_FIXED,
            Self::EcdsaP384Sha384 => &signature::ECDSA_P384_SHA384_ASN1,
            Self::RsaPkcs1Sha256 => &signature::RSA_PKCS1_2048_8192_SHA256,
            Self::RsaPkcs1Sha384 => &signature::RSA_PKCS1_2048_8192_SHA384,
            Self::RsaPkcs1Sha512 => &signature::RSA_PKCS1_2048_8192_SHA512,
            Self::RsaPssSha384 => &signature::RSA_PSS_2048_8192_SHA384,
        }
    }
}

/// DER's NULL, or nothing: RFC 4055 section 5 asks for the first and has readers take the second.
fn is_null_or_absent(identifier: &AlgorithmIdentifier<'_>) -> bool {
    identifier.parameters.as_ref().is_none_or(|parameters| parameters.as_null().is_ok())
}

/// SHA-384 as hash and inside the mask, a salt of 48 bytes, trailer 1: what AMD signs with and what the verifier computes.
fn is_pss_sha384(identifier: &AlgorithmIdentifier<'_>) -> bool {
    let Some(parameters) = identifier.parameters.as_ref().and_then(|parameters| RsaSsaPssParams::try_from(parameters).ok()) else {
        return false;
    };
    let mask = parameters.mask_gen_algorithm().is_ok_and(|mask| mask.mgf == MGF1 && mask.hash == OID_NIST_HASH_SHA384);
    *parameters.hash_algorithm_oid() == OID_NIST_HASH_SHA384 && mask && parameters.salt_length() == 48 && parameters.trailer_field() == 1
}
