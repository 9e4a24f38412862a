//! The software roots of one test world: both PKIs, the device secret, the directory that holds them.
//! Owns: CA keys (files readable by their owner only). Never: reads the clock, serves anything.
//!
//! Layout of the directory: `tdx-root.der`, `nitro-root.der`, `collateral.json`, `roots.json` are public; `private/` holds the
//! CA keys (PKCS#8) and the device secret. Certificates are rebuilt from keys and validity, since signing is deterministic,
//! and compared with the public files.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use dstack_protocol::UnixMillis;
use dstack_secret::{Secret, SecretBytes};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::error::TestkitError;
use crate::key::{Key, P256Key, derive_public, derive_secret, fresh_secret};
use crate::nitro::{EnclaveHost, NitroPki};
use crate::tdx::{Collateral, CollateralSpec, PlatformSpec, QuotingEnclave, TdxPki, bundle_json};
use crate::validity::Validity;

/// Both software roots with all that hangs from them.
pub struct SoftwareRoots {
    tdx: TdxPki,
    nitro: NitroPki,
    device_secret: Secret<32>,
    validity: Validity,
    bundle: Vec<u8>,
}

/// `roots.json`: what tests and configs need to name the roots.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Summary {
    /// 1.
    pub format: u32,
    /// First second of every certificate.
    pub valid_from_s: u64,
    /// Last second of every certificate.
    pub valid_until_s: u64,
    /// SHA-256 of the TDX root's SubjectPublicKeyInfo, hex.
    pub tdx_root_spki_sha256: String,
    /// SHA-256 of the Nitro root's SubjectPublicKeyInfo, hex.
    pub nitro_root_spki_sha256: String,
}

impl SoftwareRoots {
    /// New roots with fresh keys, valid from a day before `now` until 365 days after it.
    ///
    /// # Errors
    /// [`TestkitError::Randomness`].
    pub fn generate(now: UnixMillis) -> Result<Self, TestkitError> {
        Self::from_seed(&fresh_secret()?, Validity::around(now.0 / 1000))
    }

    /// Roots that depend on `seed` and `validity` alone, for tests that need the same ones again.
    ///
    /// # Errors
    /// [`TestkitError::Certificate`] for an empty validity.
    pub fn from_seed(seed: &Secret<32>, validity: Validity) -> Result<Self, TestkitError> {
        let tdx = TdxPki::new(seed, validity)?;
        let nitro = NitroPki::new(seed, validity)?;
        Self::assemble(tdx, nitro, derive_secret(seed, &[b"device secret"]), validity)
    }

    fn assemble(tdx: TdxPki, nitro: NitroPki, device_secret: Secret<32>, validity: Validity) -> Result<Self, TestkitError> {
        let bundle = bundle_json(&[Collateral::sign(&tdx, &CollateralSpec::new(validity))?]);
        Ok(Self { tdx, nitro, device_secret, validity, bundle })
    }

    /// DER of the TDX root.
    pub fn tdx_root_der(&self) -> &[u8] {
        &self.tdx.root.der
    }

    /// DER of the Nitro root.
    pub fn nitro_root_der(&self) -> &[u8] {
        &self.nitro.root.der
    }

    /// Names of the roots.
    pub fn summary(&self) -> Summary {
        Summary {
            format: 1,
            valid_from_s: self.validity.from_s,
            valid_until_s: self.validity.until_s,
            tdx_root_spki_sha256: hex::encode(Sha256::digest(self.tdx.root.spki())),
            nitro_root_spki_sha256: hex::encode(Sha256::digest(self.nitro.root.spki())),
        }
    }

    /// When the certificates hold.
    pub fn validity(&self) -> Validity {
        self.validity
    }

    /// Bytes of the collateral bundle: the default collateral, or what `collateral.json` held.
    pub fn bundle(&self) -> &[u8] {
        &self.bundle
    }

    /// Signs other collateral, for tests of expiry, recovery and revocation.
    ///
    /// # Errors
    /// [`TestkitError::Certificate`] for an empty validity.
    pub fn collateral(&self, spec: &CollateralSpec) -> Result<Collateral, TestkitError> {
        Collateral::sign(&self.tdx, spec)
    }

    /// Collateral of quotes of enclaves on the software family, as the default collateral is for TDs.
    ///
    /// # Errors
    /// [`TestkitError::Certificate`] for an empty validity.
    pub fn sgx_collateral(&self) -> Result<Collateral, TestkitError> {
        Collateral::sign_sgx(&self.tdx, &CollateralSpec::new(self.validity))
    }

    /// Platform of the emulated TDX machine `name`: its ids depend on the roots and the name alone.
    pub fn platform(&self, name: &str) -> PlatformSpec {
        PlatformSpec::new(
            derive_public(&self.device_secret, &[b"ppid", name.as_bytes()]),
            derive_public(&self.device_secret, &[b"platform instance", name.as_bytes()]),
        )
    }

    /// Quoting enclave of the machine `name` with platform `spec`; its PCK certificate holds for `validity`.
    ///
    /// # Errors
    /// [`TestkitError::Certificate`] for an empty validity.
    pub fn quoting_enclave(&self, name: &str, spec: PlatformSpec, validity: Validity) -> Result<QuotingEnclave, TestkitError> {
        let key = |label: &[u8]| P256Key::derive(&self.device_secret, &[b"tdx", label, name.as_bytes()]);
        let pck = self.tdx.issue_pck(&spec, key(b"pck"), validity)?;
        let above = [self.tdx.pck_ca.der.as_slice(), self.tdx.root.der.as_slice()];
        Ok(QuotingEnclave::new(spec, pck, &above, key(b"attestation key")))
    }

    /// Nitro host `name`: its PCR4 depends on the roots and the name alone.
    ///
    /// # Errors
    /// [`TestkitError::Certificate`].
    pub fn enclave_host(&self, name: &str) -> Result<EnclaveHost, TestkitError> {
        self.nitro.host(&self.device_secret, name, self.validity)
    }

    /// Secret behind the platform keys of the machine `name`.
    pub(crate) fn sealing_secret(&self, name: &str) -> Secret<32> {
        derive_secret(&self.device_secret, &[b"platform keys", name.as_bytes()])
    }

    /// Writes everything below `dir`, which is made if missing.
    ///
    /// # Errors
    /// [`TestkitError::File`], also when roots are there already: they are never overwritten.
    pub fn save(&self, dir: &Path) -> Result<(), TestkitError> {
        let private = dir.join(PRIVATE);
        fs::create_dir_all(dir).map_err(|error| TestkitError::file(dir, error))?;
        fs::DirBuilder::new().mode(0o700).create(&private).map_err(|error| TestkitError::file(&private, error))?;
        save_key(&private.join(TDX_ROOT_KEY), &self.tdx.root.key)?;
        save_key(&private.join(PCK_CA_KEY), &self.tdx.pck_ca.key)?;
        save_key(&private.join(TCB_SIGNER_KEY), &self.tdx.tcb_signer.key)?;
        save_key(&private.join(NITRO_ROOT_KEY), &self.nitro.root.key)?;
        self.device_secret.expose(|bytes| write_new(&private.join(DEVICE_SECRET), bytes, 0o600))?;

        write_new(&dir.join(TDX_ROOT), &self.tdx.root.der, 0o644)?;
        write_new(&dir.join(NITRO_ROOT), &self.nitro.root.der, 0o644)?;
        write_new(&dir.join(COLLATERAL), &self.bundle, 0o644)?;
        let summary = serde_json::to_vec_pretty(&self.summary()).expect("a struct of strings is always JSON");
        write_new(&dir.join(SUMMARY), &summary, 0o644)
    }

    /// Reads what [`save`](Self::save) wrote.
    ///
    /// # Errors
    /// [`TestkitError::File`] for a missing file, [`TestkitError::Damaged`] for one that does not fit the others.
    pub fn load(dir: &Path) -> Result<Self, TestkitError> {
        let private = dir.join(PRIVATE);
        let summary_path = dir.join(SUMMARY);
        let summary: Summary =
            serde_json::from_slice(&read(&summary_path)?).map_err(|error| TestkitError::damaged(&summary_path, error))?;
        if summary.format != 1 {
            return Err(TestkitError::damaged(&summary_path, format!("format {}, known: 1", summary.format)));
        }
        let validity = Validity { from_s: summary.valid_from_s, until_s: summary.valid_until_s };
        let tdx = TdxPki::from_keys(
            load_key(&private.join(TDX_ROOT_KEY))?,
            load_key(&private.join(PCK_CA_KEY))?,
            load_key(&private.join(TCB_SIGNER_KEY))?,
            validity,
        )?;
        let nitro = NitroPki::from_key(load_key(&private.join(NITRO_ROOT_KEY))?, validity)?;
        let secret_path = private.join(DEVICE_SECRET);
        let mut secret = read(&secret_path)?;
        let device_secret = Secret::take_slice(&mut secret).map_err(|error| TestkitError::damaged(&secret_path, error))?;
        let mut roots = Self::assemble(tdx, nitro, device_secret, validity)?;
        roots.bundle = read(&dir.join(COLLATERAL))?;

        if roots.summary() != summary {
            return Err(TestkitError::damaged(&summary_path, "names other roots than the keys make"));
        }
        for (name, der) in [(TDX_ROOT, roots.tdx_root_der()), (NITRO_ROOT, roots.nitro_root_der())] {
            if read(&dir.join(name))? != der {
                return Err(TestkitError::damaged(dir.join(name), "is not the certificate that the keys make"));
            }
        }
        Ok(roots)
    }
}

/// The public files below a root directory, in the order `init` names them.
pub fn public_files(dir: &Path) -> [PathBuf; 4] {
    [TDX_ROOT, NITRO_ROOT, COLLATERAL, SUMMARY].map(|name| dir.join(name))
}

fn save_key(path: &Path, key: &impl Key) -> Result<(), TestkitError> {
    let der = key.to_pkcs8().map_err(|error| TestkitError::file(path, error))?;
    der.expose(|der| write_new(path, der, 0o600))
}

fn load_key<K: Key>(path: &Path) -> Result<K, TestkitError> {
    let der = SecretBytes::take(read(path)?);
    der.expose(|der| K::from_pkcs8(der)).map_err(|error| TestkitError::damaged(path, error))
}

/// Creates the file with `mode`; an existing one is an error.
pub(crate) fn write_new(path: &Path, bytes: &[u8], mode: u32) -> Result<(), TestkitError> {
    let mut file =
        fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(path).map_err(|error| TestkitError::file(path, error))?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(|error| TestkitError::file(path, error))
}

fn read(path: &Path) -> Result<Vec<u8>, TestkitError> {
    fs::read(path).map_err(|error| TestkitError::file(path, error))
}

const PRIVATE: &str = "private";
const TDX_ROOT: &str = "tdx-root.der";
const NITRO_ROOT: &str = "nitro-root.der";
const COLLATERAL: &str = "collateral.json";
const SUMMARY: &str = "roots.json";
const TDX_ROOT_KEY: &str = "tdx-root.key";
const PCK_CA_KEY: &str = "tdx-pck-ca.key";
const TCB_SIGNER_KEY: &str = "tdx-tcb-signing.key";
const NITRO_ROOT_KEY: &str = "nitro-root.key";
const DEVICE_SECRET: &str = "device.secret";

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    const NOW: UnixMillis = UnixMillis(1_790_000_000_000);

    #[test]
    fn a_directory_gives_the_same_roots_again() {
        let dir = tempfile::tempdir().unwrap();
        let roots = SoftwareRoots::generate(NOW).unwrap();
        roots.save(dir.path()).unwrap();
        let again = SoftwareRoots::load(dir.path()).unwrap();
        assert_eq!(again.summary(), roots.summary());
        assert_eq!(again.tdx_root_der(), roots.tdx_root_der());
        assert_eq!(again.bundle(), roots.bundle());
        assert_eq!(again.platform("a"), roots.platform("a"));
        assert_ne!(again.platform("a").ppid, roots.platform("b").ppid);
        assert_eq!(again.enclave_host("a").unwrap().pcr4(), roots.enclave_host("a").unwrap().pcr4());
        assert_ne!(again.enclave_host("a").unwrap().pcr4(), roots.enclave_host("b").unwrap().pcr4());
        let other = SoftwareRoots::generate(NOW).unwrap();
        assert_ne!(other.platform("a").ppid, roots.platform("a").ppid);
    }

    #[test]
    fn private_files_are_their_owners_only_and_never_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let roots = SoftwareRoots::generate(NOW).unwrap();
        roots.save(dir.path()).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&dir.path().join(PRIVATE)), 0o700);
        let mut files = 0;
        for entry in fs::read_dir(dir.path().join(PRIVATE)).unwrap() {
            assert_eq!(mode(&entry.unwrap().path()), 0o600);
            files += 1;
        }
        assert_eq!(files, 5);
        assert!(matches!(roots.save(dir.path()), Err(TestkitError::File { .. })));
    }

    #[test]
    fn a_foreign_certificate_or_key_is_named() {
        let dir = tempfile::tempdir().unwrap();
        SoftwareRoots::generate(NOW).unwrap().save(dir.path()).unwrap();
        fs::write(dir.path().join(TDX_ROOT), SoftwareRoots::generate(NOW).unwrap().tdx_root_der()).unwrap();
        let error = SoftwareRoots::load(dir.path()).err().unwrap();
        assert!(matches!(&error, TestkitError::Damaged { path, .. } if path.ends_with(TDX_ROOT)), "{error}");
        fs::write(dir.path().join(PRIVATE).join(PCK_CA_KEY), b"no key").unwrap();
        let error = SoftwareRoots::load(dir.path()).err().unwrap();
        assert!(matches!(&error, TestkitError::Damaged { path, .. } if path.ends_with(PCK_CA_KEY)), "{error}");
    }
}
