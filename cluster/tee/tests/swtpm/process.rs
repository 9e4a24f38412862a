//! One swtpm process, and writing into its NV what a cloud writes.

use dstack_tee::tpm::Tpm;
use std::io::Write as _;
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::str::FromStr as _;
use std::time::{Duration, Instant};
use tss_esapi::abstraction::nv::NvOpenOptions;
use tss_esapi::attributes::{NvIndexAttributesBuilder, ObjectAttributesBuilder};
use tss_esapi::handles::NvIndexTpmHandle;
use tss_esapi::interface_types::algorithm::{HashingAlgorithm, PublicAlgorithm};
use tss_esapi::interface_types::ecc::EccCurve;
use tss_esapi::interface_types::key_bits::RsaKeyBits;
use tss_esapi::interface_types::resource_handles::{Hierarchy, NvAuth};
use tss_esapi::structures::{
    EccPoint, EccScheme, HashScheme, KeyDerivationFunctionScheme, NvPublicBuilder, Public, PublicBuilder, PublicEccParametersBuilder,
    PublicKeyRsa, PublicRsaParametersBuilder, RsaExponent, RsaScheme, SymmetricDefinitionObject,
};
use tss_esapi::traits::Marshall as _;
use tss_esapi::{Context, TctiNameConf};

/// A fresh TPM. Ends with its value.
pub(crate) struct Swtpm {
    child: Child,
    port: u16,
    _state: tempfile::TempDir,
}

impl Swtpm {
    /// `None` where swtpm is not installed: said, and a failure under CI.
    pub(crate) fn start() -> Option<Self> {
        if Command::new("swtpm").arg("--version").output().is_err() {
            #[allow(clippy::disallowed_methods, reason = "whether tests may be left out is CI's to say")]
            let ci = std::env::var("CI").is_ok_and(|ci| ci == "true");
            assert!(!ci, "swtpm is not installed; CI has to have it");
            eprintln!("left out: swtpm is not installed");
            return None;
        }
        // another process may take the ports between looking and starting
        (0..5).find_map(|_| Self::at_free_ports()).or_else(|| panic!("swtpm does not start"))
    }

    fn at_free_ports() -> Option<Self> {
        let port = free_pair();
        // an absolute path: swtpm would look for a relative one elsewhere
        let state = tempfile::tempdir().unwrap();
        let mut child = Command::new("swtpm")
            .args(["socket", "--tpm2", "--tpmstate"])
            .arg(format!("dir={}", state.path().canonicalize().unwrap().display()))
            .args(["--server", &format!("type=tcp,port={port},bindaddr=127.0.0.1")])
            .args(["--ctrl", &format!("type=tcp,port={},bindaddr=127.0.0.1", port + 1)])
            .args(["--flags", "not-need-init,startup-clear"])
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let deadline = Instant::now() + Duration::from_secs(30);
        while Instant::now() < deadline {
            if child.try_wait().unwrap().is_some() {
                return None;
            }
            let up = std::net::TcpStream::connect(("127.0.0.1", port + 1)).is_ok();
            if up && Tpm::open(&tcti(port)).is_ok() {
                return Some(Self { child, port, _state: state });
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        None
    }

    pub(crate) fn tcti(&self) -> String {
        tcti(self.port)
    }

    pub(crate) fn tpm(&self) -> Tpm {
        Tpm::open(&self.tcti()).unwrap()
    }

    /// Writes a template as Google does and answers the key that it makes: x ‖ y.
    pub(crate) fn write_template(&self) -> [u8; 64] {
        let mut context = self.context();
        let template = template();
        let bytes = template.marshall().unwrap();
        let made = context
            .execute_with_nullauth_session(|context| context.create_primary(Hierarchy::Endorsement, template, None, None, None, None))
            .unwrap();
        context.flush_context(made.key_handle.into()).unwrap();
        drop(context);
        self.write_nv(0x01c1_0003, &bytes, bytes.len());
        let Public::Ecc { unique, .. } = made.out_public else { panic!("no ECC key") };
        let mut key = [0; 64];
        let (x, y) = (unique.x().value(), unique.y().value());
        key[32 - x.len()..32].copy_from_slice(x);
        key[64 - y.len()..].copy_from_slice(y);
        key
    }

    /// The same for an RSA key; answers its modulus.
    pub(crate) fn write_rsa_template(&self) -> Vec<u8> {
        let mut context = self.context();
        let template = rsa_template();
        let bytes = template.marshall().unwrap();
        let made = context
            .execute_with_nullauth_session(|context| context.create_primary(Hierarchy::Endorsement, template, None, None, None, None))
            .unwrap();
        context.flush_context(made.key_handle.into()).unwrap();
        drop(context);
        self.write_nv(0x01c1_0001, &bytes, bytes.len());
        let Public::Rsa { unique, .. } = made.out_public else { panic!("no RSA key") };
        unique.value().to_vec()
    }

    /// Writes a certificate into an index that is larger than it.
    pub(crate) fn write_certificate(&self, der: &[u8]) {
        self.write_nv(0x01c1_0002, der, der.len() + 100);
    }

    /// The same for the RSA key's.
    pub(crate) fn write_rsa_certificate(&self, der: &[u8]) {
        self.write_nv(0x01c1_0000, der, der.len() + 100);
    }

    fn write_nv(&self, index: u32, content: &[u8], size_bytes: usize) {
        let mut context = self.context();
        let attributes = NvIndexAttributesBuilder::new()
            .with_owner_write(true)
            .with_owner_read(true)
            .with_auth_read(true)
            .with_no_da(true)
            .build()
            .unwrap();
        let nv_public = NvPublicBuilder::new()
            .with_nv_index(NvIndexTpmHandle::new(index).unwrap())
            .with_index_name_algorithm(HashingAlgorithm::Sha256)
            .with_index_attributes(attributes)
            .with_data_area_size(size_bytes)
            .build()
            .unwrap();
        context
            .execute_with_nullauth_session(|context| {
                let mut file = NvOpenOptions::NewIndex { nv_public, auth_handle: NvAuth::Owner }.open(context)?;
                file.write_all(content).unwrap();
                Ok::<_, tss_esapi::Error>(())
            })
            .unwrap();
    }

    fn context(&self) -> Context {
        Context::new(TctiNameConf::from_str(&self.tcti()).unwrap()).unwrap()
    }
}

impl Drop for Swtpm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn tcti(port: u16) -> String {
    format!("swtpm:host=127.0.0.1,port={port}")
}

/// A port whose successor is free as well: the TSS looks for the control channel there.
fn free_pair() -> u16 {
    loop {
        let first = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = first.local_addr().unwrap().port();
        if port < u16::MAX && TcpListener::bind(("127.0.0.1", port + 1)).is_ok() {
            return port;
        }
    }
}

/// A restricted RSA signing key, as Google's RSA template is.
fn rsa_template() -> Public {
    let attributes = ObjectAttributesBuilder::new()
        .with_fixed_tpm(true)
        .with_fixed_parent(true)
        .with_sensitive_data_origin(true)
        .with_user_with_auth(true)
        .with_restricted(true)
        .with_sign_encrypt(true)
        .build()
        .unwrap();
    let parameters = PublicRsaParametersBuilder::new()
        .with_scheme(RsaScheme::RsaSsa(HashScheme::new(HashingAlgorithm::Sha256)))
        .with_key_bits(RsaKeyBits::Rsa2048)
        .with_exponent(RsaExponent::default())
        .with_is_signing_key(true)
        .with_restricted(true)
        .build()
        .unwrap();
    PublicBuilder::new()
        .with_public_algorithm(PublicAlgorithm::Rsa)
        .with_name_hashing_algorithm(HashingAlgorithm::Sha256)
        .with_object_attributes(attributes)
        .with_rsa_parameters(parameters)
        .with_rsa_unique_identifier(PublicKeyRsa::default())
        .build()
        .unwrap()
}

/// A restricted P-256 signing key, as Google's ECC template is.
fn template() -> Public {
    let attributes = ObjectAttributesBuilder::new()
        .with_fixed_tpm(true)
        .with_fixed_parent(true)
        .with_sensitive_data_origin(true)
        .with_user_with_auth(true)
        .with_restricted(true)
        .with_sign_encrypt(true)
        .build()
        .unwrap();
    let parameters = PublicEccParametersBuilder::new()
        .with_symmetric(SymmetricDefinitionObject::Null)
        .with_ecc_scheme(EccScheme::EcDsa(HashScheme::new(HashingAlgorithm::Sha256)))
        .with_curve(EccCurve::NistP256)
        .with_key_derivation_function_scheme(KeyDerivationFunctionScheme::Null)
        .with_is_signing_key(true)
        .with_restricted(true)
        .build()
        .unwrap();
    PublicBuilder::new()
        .with_public_algorithm(PublicAlgorithm::Ecc)
        .with_name_hashing_algorithm(HashingAlgorithm::Sha256)
        .with_object_attributes(attributes)
        .with_ecc_parameters(parameters)
        .with_ecc_unique_identifier(EccPoint::default())
        .build()
        .unwrap()
}
