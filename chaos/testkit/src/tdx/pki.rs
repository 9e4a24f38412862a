//! The four certificates above every TDX quote: root, PCK CA, TCB signing, and their names.
//! Source: Intel SGX PCK Certificate and CRL Profile Specification §1.3 (names, usages, path lengths).

use dstack_secret::Secret;
use rcgen::DnType;

use crate::error::TestkitError;
use crate::key::{Key as _, P256Key};
use crate::tdx::pck::{PlatformSpec, SGX_EXTENSION};
use crate::validity::Validity;
use crate::x509::{Certified, Role, Template};

/// Root CA, PCK platform CA and TCB signer of one software TDX world.
pub(crate) struct TdxPki {
    pub(crate) root: Certified<P256Key>,
    pub(crate) pck_ca: Certified<P256Key>,
    pub(crate) tcb_signer: Certified<P256Key>,
}

impl TdxPki {
    /// Makes all three, keys derived from `seed`.
    pub(crate) fn new(seed: &Secret<32>, validity: Validity) -> Result<Self, TestkitError> {
        let key = |label: &[u8]| P256Key::derive(seed, &[b"tdx", label]);
        Self::from_keys(key(b"root"), key(b"pck ca"), key(b"tcb signing"), validity)
    }

    /// Certificates for three keys; the same keys and validity give the same bytes.
    pub(crate) fn from_keys(root: P256Key, pck_ca: P256Key, tcb_signer: P256Key, validity: Validity) -> Result<Self, TestkitError> {
        let root = Certified::root(root_template(validity), root)?;
        let pck_ca = root.issue(pck_ca_template(validity), pck_ca)?;
        let tcb_signer = root.issue(tcb_signer_template(validity), tcb_signer)?;
        Ok(Self { root, pck_ca, tcb_signer })
    }

    /// A PCK certificate for `key` on the platform `spec`.
    pub(crate) fn issue_pck(&self, spec: &PlatformSpec, key: P256Key, validity: Validity) -> Result<Certified<P256Key>, TestkitError> {
        self.pck_ca.issue(pck_template(spec, validity), key)
    }
}

fn root_template(validity: Validity) -> Template {
    authority("Software SGX Root CA", Role::Ca { path_len: Some(1) }, validity)
}

fn pck_ca_template(validity: Validity) -> Template {
    authority("Software SGX PCK Platform CA", Role::Ca { path_len: Some(0) }, validity)
}

fn tcb_signer_template(validity: Validity) -> Template {
    authority("Software SGX TCB Signing", Role::Signer, validity)
}

fn pck_template(spec: &PlatformSpec, validity: Validity) -> Template {
    Template {
        crl_url: Some("http://software-tee.invalid/pck-platform.crl".to_owned()),
        extension: Some((SGX_EXTENSION.to_vec(), spec.sgx_extension())),
        ..authority("Software SGX PCK Certificate", Role::Signer, validity)
    }
}

/// Intel's attribute order: CN, O, L, ST, C.
fn authority(common_name: &str, role: Role, validity: Validity) -> Template {
    Template {
        subject: vec![
            (DnType::CommonName, common_name.to_owned()),
            (DnType::OrganizationName, "dstack software TEE, not hardware".to_owned()),
            (DnType::LocalityName, "Nowhere".to_owned()),
            (DnType::StateOrProvinceName, "NA".to_owned()),
            (DnType::CountryName, "XX".to_owned()),
        ],
        role,
        crl_url: Some("http://software-tee.invalid/root.crl".to_owned()),
        extension: None,
        validity,
    }
}
