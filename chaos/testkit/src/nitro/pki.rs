//! Root, regional, zonal and instance certificates of one emulated Nitro host, and the enclave's own leaf.
//! Source: the chains of published documents (names, path lengths 2, 1, 0, a short-lived leaf `CA:FALSE`).

use std::fmt;
use std::path::Path;

use base64::Engine as _;
use dstack_secret::{Secret, SecretBytes};
use rcgen::DnType;
use sha2::{Digest as _, Sha384};

use crate::error::TestkitError;
use crate::key::{Key as _, P384Key, derive_public, derive_secret};
use crate::nitro::NsmDocument;
use crate::roots::write_new;
use crate::validity::Validity;
use crate::x509::{Certified, Role, Template};

/// The root of one software Nitro world.
pub(crate) struct NitroPki {
    pub(crate) root: Certified<P384Key>,
}

impl NitroPki {
    /// Makes the root, its key derived from `seed`.
    pub(crate) fn new(seed: &Secret<32>, validity: Validity) -> Result<Self, TestkitError> {
        Self::from_key(P384Key::derive(seed, &[b"nitro", b"root"]), validity)
    }

    /// The root certificate for a key; the same key and validity give the same bytes.
    pub(crate) fn from_key(key: P384Key, validity: Validity) -> Result<Self, TestkitError> {
        Ok(Self { root: Certified::root(root_template(validity), key)? })
    }

    /// The host `name`: its keys and instance id depend on `secret` and `name` alone.
    pub(crate) fn host(&self, secret: &Secret<32>, name: &str, validity: Validity) -> Result<EnclaveHost, TestkitError> {
        let key = |label: &[u8]| P384Key::derive(secret, &[b"nitro", label, name.as_bytes()]);
        let instance: [u8; 9] = derive_public(secret, &[b"nitro", b"instance", name.as_bytes()]);
        let instance_id = format!("i-{}", hex::encode(instance).get(..17).unwrap_or_default());
        let zone = "software-1.software-tee.invalid";
        let regional =
            self.root.issue(authority(&[("XX", DnType::CountryName)], &format!("region.{zone}"), 2, validity), key(b"regional"))?;
        let zonal = regional.issue(authority(&[("XX", DnType::CountryName)], &format!("zonal.{zone}"), 1, validity), key(b"zonal"))?;
        let host = zonal.issue(
            authority(
                &[("XX", DnType::CountryName), ("NA", DnType::StateOrProvinceName), ("Nowhere", DnType::LocalityName)],
                &format!("{instance_id}.{zone}"),
                0,
                validity,
            ),
            key(b"instance"),
        )?;
        let bundle = vec![self.root.der.clone(), regional.der, zonal.der, host.der.clone()];
        let enclave: [u8; 8] = derive_public(secret, &[b"nitro", b"enclave", name.as_bytes()]);
        Ok(EnclaveHost {
            module_id: format!("{instance_id}-enc{}", hex::encode(enclave)),
            instance_id,
            bundle,
            host,
            leaf_secret: derive_secret(secret, &[b"nitro", b"leaf", name.as_bytes()]),
            validity,
        })
    }
}

/// One emulated Nitro host with the hypervisor's signing key for its enclave.
pub struct EnclaveHost {
    instance_id: String,
    module_id: String,
    /// Root first, without the leaf.
    bundle: Vec<Vec<u8>>,
    host: Certified<P384Key>,
    leaf_secret: Secret<32>,
    validity: Validity,
}

impl EnclaveHost {
    /// PCR4: the hash of the host's instance id, extended into a zero register.
    pub fn pcr4(&self) -> [u8; 48] {
        extend_pcr(&Sha384::digest(self.instance_id.as_bytes()))
    }

    /// What the document calls `module_id`.
    pub fn module_id(&self) -> &str {
        &self.module_id
    }

    /// A document of this host at `now_ms` (milliseconds since 1970) with PCR4 set, nothing else measured.
    pub fn blank(&self, now_ms: u64) -> NsmDocument {
        NsmDocument::new(self.module_id.clone(), now_ms, self.pcr4())
    }

    /// Signs `document` with a leaf certificate that holds between two and three hours more, never beyond its host's.
    ///
    /// # Errors
    /// [`TestkitError::Certificate`] when the leaf cannot be written.
    pub fn sign(&self, document: &NsmDocument, now_ms: u64) -> Result<Vec<u8>, TestkitError> {
        let leaf = self.leaf(now_ms)?;
        Ok(document.cose_sign1(&leaf.der, &self.bundle, &leaf.key))
    }
}

/// Environment of a QEMU whose NSM signs as this host's: names with the files they name.
pub type SigningFiles = Vec<(&'static str, String)>;

impl EnclaveHost {
    /// Writes the leaf's key (PKCS#8, PEM, mode 0600) and the certificates (DER) to `dir`, as the patched device of QEMU reads them.
    ///
    /// # Errors
    /// [`TestkitError::Certificate`], [`TestkitError::File`].
    pub fn signing_files(&self, dir: &Path, now_ms: u64) -> Result<SigningFiles, TestkitError> {
        let leaf = self.leaf(now_ms)?;
        let named = |name: &str| dir.join(name);
        let key_file = named("leaf.key");
        let pem = leaf.key.to_pkcs8().map_err(|error| TestkitError::file(&key_file, error))?.expose(|der| {
            let text = base64::engine::general_purpose::STANDARD.encode(der);
            let lines: Vec<&str> = text.as_bytes().chunks(64).map(|line| std::str::from_utf8(line).unwrap_or_default()).collect();
            SecretBytes::take(format!("-----BEGIN PRIVATE KEY-----\n{}\n-----END PRIVATE KEY-----\n", lines.join("\n")).into_bytes())
        });
        pem.expose(|pem| write_new(&key_file, pem, 0o600))?;
        let leaf_file = named("leaf.der");
        write_new(&leaf_file, &leaf.der, 0o644)?;
        let mut bundle = Vec::new();
        for (place, certificate) in self.bundle.iter().enumerate() {
            let file = named(&format!("ca-{place}.der"));
            write_new(&file, certificate, 0o644)?;
            bundle.push(file.display().to_string());
        }
        Ok(vec![
            ("NSM_TEST_KEY", key_file.display().to_string()),
            ("NSM_TEST_CERT", leaf_file.display().to_string()),
            ("NSM_TEST_CABUNDLE", bundle.join(":")),
        ])
    }

    /// The enclave's own certificate at that time.
    fn leaf(&self, now_ms: u64) -> Result<Certified<P384Key>, TestkitError> {
        // One leaf an hour: the same certificate serves all documents of the hour.
        let from_s = (now_ms / 1000 / LEAF_STEP_S).saturating_mul(LEAF_STEP_S).saturating_sub(LEAF_STEP_S);
        let validity = Validity {
            from_s: from_s.max(self.validity.from_s),
            until_s: from_s.saturating_add(4 * LEAF_STEP_S).min(self.validity.until_s),
        };
        let key = P384Key::derive(&self.leaf_secret, &[&validity.from_s.to_be_bytes()]);
        let template = Template {
            subject: subject(&[("XX", DnType::CountryName)], &format!("{}.software-1.invalid", self.module_id)),
            role: Role::Signer,
            crl_url: None,
            extension: None,
            validity,
        };
        self.host.issue(template, key)
    }
}

impl fmt::Debug for EnclaveHost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EnclaveHost").field("module_id", &self.module_id).finish_non_exhaustive()
    }
}

/// `SHA-384(0^48 ‖ digest)`: one extension of a zero register.
pub(crate) fn extend_pcr(digest: &[u8]) -> [u8; 48] {
    Sha384::new().chain_update([0; 48]).chain_update(digest).finalize().into()
}

fn root_template(validity: Validity) -> Template {
    Template {
        subject: subject(&[("XX", DnType::CountryName)], "software.nitro-enclaves.invalid"),
        role: Role::Ca { path_len: None },
        crl_url: None,
        extension: None,
        validity,
    }
}

fn authority(place: &[(&str, DnType)], common_name: &str, path_len: u8, validity: Validity) -> Template {
    Template { subject: subject(place, common_name), role: Role::Ca { path_len: Some(path_len) }, crl_url: None, extension: None, validity }
}

/// AWS's attribute order: place, O, OU, CN.
fn subject(place: &[(&str, DnType)], common_name: &str) -> Vec<(DnType, String)> {
    let mut name: Vec<_> = place.iter().map(|(value, kind)| (kind.clone(), (*value).to_owned())).collect();
    name.push((DnType::OrganizationName, "dstack software TEE".to_owned()));
    name.push((DnType::OrganizationalUnitName, "not hardware".to_owned()));
    name.push((DnType::CommonName, common_name.to_owned()));
    name
}

const LEAF_STEP_S: u64 = 3600;
