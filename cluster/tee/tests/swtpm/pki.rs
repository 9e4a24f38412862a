//! A software stand-in for the cloud's AK authority: root → intermediate → certificate over the TPM's own key.

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DistinguishedName, DnType, IsCa, Issuer, KeyIdMethod, KeyPair,
    KeyUsagePurpose, PublicKeyData, SerialNumber, SignatureAlgorithm, date_time_ymd,
};

pub(crate) struct AkAuthority {
    pub(crate) root_der: Vec<u8>,
    pub(crate) intermediate_der: Vec<u8>,
    /// Of the root and of the intermediate, both empty.
    pub(crate) crls: Vec<Vec<u8>>,
    intermediate: CertificateParams,
    key: KeyPair,
}

/// A public key of the TPM: a point.
struct Point([u8; 65]);

/// A public key of the TPM: RSAPublicKey of PKCS #1, exponent 65537.
struct Modulus(Vec<u8>);

impl PublicKeyData for Modulus {
    fn der_bytes(&self) -> &[u8] {
        &self.0
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        &rcgen::PKCS_RSA_SHA256
    }
}

impl PublicKeyData for Point {
    fn der_bytes(&self) -> &[u8] {
        &self.0
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        &rcgen::PKCS_ECDSA_P256_SHA256
    }
}

impl AkAuthority {
    pub(crate) fn new() -> Self {
        let (root_key, key) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
        let root = authority("Software EK/AK CA Root", None, 1);
        let root_der = root.self_signed(&root_key).unwrap().der().to_vec();
        let intermediate = authority("Software EK/AK CA Intermediate", Some(0), 2);
        let by_root = Issuer::from_params(&root, &root_key);
        let intermediate_der = intermediate.signed_by(&key, &by_root).unwrap().der().to_vec();
        let crls = vec![crl(&by_root), crl(&Issuer::from_params(&intermediate, &key))];
        Self { root_der, intermediate_der, crls, intermediate, key }
    }

    /// A collateral bundle with this authority's certificates and lists in its pool.
    pub(crate) fn beside(&self, bundle: &[u8]) -> Vec<u8> {
        let mut bundle: serde_json::Value = serde_json::from_slice(bundle).unwrap();
        bundle["x509"] = serde_json::json!({
            "certificates": [hex::encode(&self.intermediate_der)],
            "crls": self.crls.iter().map(hex::encode).collect::<Vec<_>>(),
        });
        serde_json::to_vec(&bundle).unwrap()
    }

    pub(crate) fn certify(&self, key: [u8; 64]) -> Vec<u8> {
        let mut point = [4; 65];
        point[1..].copy_from_slice(&key);
        self.issue(&Point(point))
    }

    /// For a modulus of 256 bytes.
    pub(crate) fn certify_rsa(&self, modulus: &[u8]) -> Vec<u8> {
        let number = [&[2, 0x82, 1, 1, 0], modulus].concat();
        let exponent = [2, 3, 1, 0, 1];
        self.issue(&Modulus([&[0x30, 0x82, 1, 10], &number[..], &exponent].concat()))
    }

    fn issue(&self, key: &impl PublicKeyData) -> Vec<u8> {
        let mut params = named("software-project/software-zone/software-instance", 3);
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.signed_by(key, &Issuer::from_params(&self.intermediate, &self.key)).unwrap().der().to_vec()
    }
}

fn authority(name: &str, below: Option<u8>, serial: u64) -> CertificateParams {
    let mut params = named(name, serial);
    params.is_ca = IsCa::Ca(below.map_or(BasicConstraints::Unconstrained, BasicConstraints::Constrained));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

fn named(name: &str, serial: u64) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.distinguished_name.push(DnType::OrganizationName, "dstack software TEE, not hardware");
    params.serial_number = Some(SerialNumber::from(serial));
    params.use_authority_key_identifier_extension = true;
    params.key_identifier_method = KeyIdMethod::Sha256;
    (params.not_before, params.not_after) = (date_time_ymd(2020, 1, 1), date_time_ymd(2120, 1, 1));
    params
}

fn crl(issuer: &Issuer<'_, &KeyPair>) -> Vec<u8> {
    let params = CertificateRevocationListParams {
        this_update: date_time_ymd(2020, 1, 1),
        next_update: date_time_ymd(2120, 1, 1),
        crl_number: SerialNumber::from(1u64),
        issuing_distribution_point: None,
        revoked_certs: Vec::new(),
        key_identifier_method: KeyIdMethod::Sha256,
    };
    params.signed_by(issuer).unwrap().der().to_vec()
}
