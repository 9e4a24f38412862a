//! `gen-ra-cert`, `gen-ca-cert`, `gen-app-keys`. Owns: certificates with this machine's evidence, and their keys in files of mode 0600.
//! Never: a key without evidence of the machine that made it.
//! Source: util and deploy reference §1; attestation reference §1, §3.

use std::path::Path;

use anyhow::Context as _;
use dstack_attest::x509ext::wrap;
use dstack_protocol::codec::sha256;
use dstack_secret::{Secret, SecretBytes};
use rcgen::{CertificateParams, CustomExtension, DistinguishedName, DnType, ExtendedKeyUsagePurpose, Issuer, KeyPair, KeyUsagePurpose};
use sha2::{Digest as _, Sha512};

use super::put;
use crate::app_keys::{AppKeys, ProviderKeys};
use crate::files;
use crate::machine::Machine;
use crate::setup::provider::seed;

/// Name of a client's certificate. Carries no meaning.
pub const RA_CLIENT: &str = "RA-TLS TEMP Cert";
/// Name of a certificate of `gen-ca-cert`.
pub const APP_ROOT_CA: &str = "App Root CA";
/// Largest PEM file.
const PEM_BYTES_MAX: u64 = 1 << 20;
/// Extension with evidence.
const EVIDENCE_OID: &[u64] = &[1, 3, 6, 1, 4, 1, 62397, 1, 8];

/// A certificate signed by a CA, and its key; both PEM.
#[derive(Debug)]
pub struct RaCertificate {
    /// PEM.
    pub certificate: String,
    /// DER.
    pub certificate_der: Vec<u8>,
    /// PKCS#8, DER.
    pub key: SecretBytes,
}

/// A fresh P-256 key with a client certificate by the CA, bound to evidence.
///
/// # Errors
/// The CA's files, the device's, the library's.
pub fn ra_certificate(
    ca_certificate: &str,
    ca_key: &str,
    evidence_of: impl FnOnce([u8; 64]) -> Result<Vec<u8>, String>,
) -> anyhow::Result<RaCertificate> {
    let ca_key = KeyPair::from_pem(ca_key).context("the CA's key is no PKCS#8 PEM of a known kind")?;
    let issuer = Issuer::from_ca_cert_pem(ca_certificate, ca_key).context("the CA's certificate is no PEM certificate")?;
    let (key, point) = fresh_key()?;
    let evidence = evidence_of(dstack_protocol::binding::ratls_certificate(&seed::spki(&point))).map_err(anyhow::Error::msg)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, RA_CLIENT);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
    params.use_authority_key_identifier_extension = true;
    params.custom_extensions = vec![CustomExtension::from_oid_content(EVIDENCE_OID, wrap(&evidence))];
    let pair = key.expose(|der| KeyPair::try_from(der)).context("our own key")?;
    let certificate = params.signed_by(&pair, &issuer).context("the certificate cannot be made")?;
    Ok(RaCertificate { certificate: certificate.pem(), certificate_der: certificate.der().to_vec(), key })
}

/// PKCS#8 and point of a fresh P-256 key.
fn fresh_key() -> anyhow::Result<(SecretBytes, [u8; 65])> {
    for _ in 0..4 {
        let scalar = Secret::try_from_fn(|out: &mut [u8; 32]| getrandom::fill(out)).ok().context("the system gives no randomness")?;
        // one number in 2^32 is no key
        if let Some(made) = seed::pk8(&scalar) {
            return Ok(made);
        }
    }
    anyhow::bail!("the system's randomness gives no key")
}

fn evidence(machine: &Machine) -> impl FnOnce([u8; 64]) -> Result<Vec<u8>, String> + '_ {
    |report_data| machine.device().evidence(report_data).map_err(|error| error.to_string())
}

fn text(file: &Path) -> anyhow::Result<String> {
    String::from_utf8(files::read(file, PEM_BYTES_MAX)?).with_context(|| format!("{} is no PEM", file.display()))
}

/// `gen-ra-cert`.
///
/// # Errors
/// As [`ra_certificate`], and the system's.
pub fn gen_ra_cert(machine: &Machine, ca_cert: &Path, ca_key: &Path, cert: &Path, key: &Path) -> anyhow::Result<()> {
    let made = ra_certificate(&text(ca_cert)?, &text(ca_key)?, evidence(machine))?;
    seed::pem(&made.key).expose(|pem| put(Some(key), pem, "", 0o600))?;
    put(Some(cert), made.certificate.as_bytes(), "", 0o644)
}

/// `gen-ca-cert`: a self-signed CA; its evidence is bound with tag `kms-root-ca`.
///
/// # Errors
/// The device's, the library's, the system's.
pub fn gen_ca_cert(machine: &Machine, cert: &Path, key: &Path, ca_level: u8) -> anyhow::Result<()> {
    let (der, point) = fresh_key()?;
    let report_data: [u8; 64] = Sha512::new().chain_update(b"kms-root-ca:").chain_update(seed::spki(&point)).finalize().into();
    let evidence = machine.device().evidence(report_data)?;
    let certificate = seed::root_certificate(&der, APP_ROOT_CA, ca_level, &evidence)?;
    seed::pem(&der).expose(|pem| put(Some(key), pem, "", 0o600))?;
    put(Some(cert), certificate.as_bytes(), "", 0o644)
}

/// `gen-app-keys`: fresh keys of an app, of no provider.
///
/// # Errors
/// The device's, the library's, the system's.
pub fn gen_app_keys(machine: &Machine, ca_level: u8, output: &Path) -> anyhow::Result<()> {
    let (app, point) = fresh_key()?;
    let (disk, _) = fresh_key()?;
    let k256 = SecretBytes::try_from_fn(32, getrandom::fill).ok().context("the system gives no randomness")?;
    let evidence = machine.device().evidence(dstack_protocol::binding::ratls_certificate(&seed::spki(&point)))?;
    let mut hash = zeroize::Zeroizing::new(disk.expose(|der| sha256(&[der])));
    let keys = AppKeys {
        disk_crypt_key: SecretBytes::from_fn(32, |out| out.copy_from_slice(&hash[..])),
        env_crypt_key: SecretBytes::take(Vec::new()),
        k256_key: k256,
        k256_signature: Vec::new(),
        gateway_app_id: String::new(),
        ca_cert: seed::root_certificate(&app, seed::APP_ROOT, ca_level, &evidence)?,
        key_provider: ProviderKeys::None { key: seed::pem(&app) },
    };
    zeroize::Zeroize::zeroize(&mut *hash);
    Ok(keys.write(output)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn certificates_carry_evidence_bound_to_their_keys() {
        let mut world = dstack_testkit::World::new().unwrap();
        let device = world.tdx("m").unwrap();
        let machine = Machine::open(Some(&device), None).unwrap();
        let path = |name: &str| world.dir().join(name);
        gen_ca_cert(&machine, &path("ca.crt"), &path("ca.key"), 1).unwrap();
        gen_ra_cert(&machine, &path("ca.crt"), &path("ca.key"), &path("ra.crt"), &path("ra.key")).unwrap();
        for name in ["ca.key", "ra.key"] {
            assert_eq!(std::fs::metadata(path(name)).unwrap().permissions().mode() & 0o777, 0o600);
        }
        let pem = std::fs::read_to_string(path("ra.crt")).unwrap();
        let der = der_of(&pem);
        let claims = dstack_attest::x509ext::CertificateClaims::read(&der).unwrap();
        let key = KeyPair::from_pem(&std::fs::read_to_string(path("ra.key")).unwrap()).unwrap();
        let spki = rcgen::PublicKeyData::subject_public_key_info(&key);
        assert_eq!(claims.spki, spki);
        let identity = world.verify(&claims.evidence.unwrap().to_bytes()).unwrap();
        identity.require_report_data(&dstack_protocol::binding::ratls_certificate(&spki)).unwrap();
        gen_app_keys(&machine, 1, &path("keys.json")).unwrap();
        let keys = AppKeys::parse(&SecretBytes::take(std::fs::read(path("keys.json")).unwrap())).unwrap();
        assert!(keys.disk_crypt_key.len() == 32 && keys.k256_key.len() == 32 && keys.ca_cert.contains("BEGIN CERTIFICATE"));
        assert!(gen_ra_cert(&machine, &path("ra.key"), &path("ca.key"), &path("x"), &path("y")).is_err());
    }

    fn der_of(pem: &str) -> Vec<u8> {
        use base64::Engine as _;
        let text: String = pem.lines().filter(|line| !line.starts_with("-----")).collect();
        base64::engine::general_purpose::STANDARD.decode(text).unwrap()
    }
}
