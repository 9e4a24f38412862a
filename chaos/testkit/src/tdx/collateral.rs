//! Collateral: TCB info, QE identity and CRLs, signed as Intel's provisioning service signs them.
//! Source: Intel SGX and TDX PCS API v4 (appendix "TCB info v3", "enclave identity v2"); members of a collateral object as
//! `vectors/README.md` lists them; bundle form of `CollateralBundle`.

use serde_json::{Value, json};

use crate::error::TestkitError;
use crate::key::Key as _;
use crate::tdx::TdxPki;
use crate::tdx::pck;
use crate::validity::{Validity, rfc3339};
use crate::x509::pem_chain;

/// One level of the TCB info. A platform has the first level, from the top, all of whose SVNs it reaches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TcbLevel {
    /// SGX component SVNs.
    pub sgx: [u8; 16],
    /// PCE SVN.
    pub pce_svn: u16,
    /// TDX component SVNs (of modules with a version, components 0 and 1 are judged by [`ModuleLevel`]).
    pub tdx: [u8; 16],
    /// `UpToDate`, `OutOfDate`, `SWHardeningNeeded`, `Revoked`, …
    pub status: &'static str,
    /// Advisories, for instance `INTEL-SA-00001`.
    pub advisory_ids: Vec<String>,
    /// `tcbDate`.
    pub date: String,
}

/// One level of the TDX module identity `TDX_01`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModuleLevel {
    /// Least ISVSVN of the module.
    pub isv_svn: u8,
    /// `UpToDate`, `OutOfDate` or `Revoked`.
    pub status: &'static str,
    /// Advisories.
    pub advisory_ids: Vec<String>,
}

/// What the collateral of one platform family says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CollateralSpec {
    /// Family.
    pub fmspc: [u8; 6],
    /// `issueDate` to `nextUpdate` of both documents.
    pub validity: Validity,
    /// `thisUpdate` to `nextUpdate` of both CRLs.
    pub crl_validity: Validity,
    /// Number of the TCB recovery.
    pub evaluation: u32,
    /// Levels, highest first.
    pub levels: Vec<TcbLevel>,
    /// Levels of the TDX module, highest first.
    pub module_levels: Vec<ModuleLevel>,
    /// Least ISVSVN and status of the quoting enclave, highest first.
    pub qe_levels: Vec<(u16, &'static str)>,
    /// MRSIGNER the quoting enclave must have.
    pub qe_mrsigner: [u8; 32],
    /// Serial numbers on the PCK CA's CRL.
    pub revoked_pcks: Vec<Vec<u8>>,
    /// True: the root's CRL names the PCK CA.
    pub pck_ca_revoked: bool,
}

impl CollateralSpec {
    /// The collateral of the software family: one level each that is up to date, out of date, revoked.
    pub fn new(validity: Validity) -> Self {
        let level = |sgx, pce_svn, tdx, status, advisory: Option<&str>| TcbLevel {
            sgx,
            pce_svn,
            tdx,
            status,
            advisory_ids: advisory.into_iter().map(str::to_owned).collect(),
            date: TCB_DATE.to_owned(),
        };
        let module = |isv_svn, status, advisory: Option<&str>| ModuleLevel {
            isv_svn,
            status,
            advisory_ids: advisory.into_iter().map(str::to_owned).collect(),
        };
        let tdx = [5, 0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        Self {
            fmspc: pck::FMSPC,
            validity,
            crl_validity: validity,
            evaluation: 19,
            levels: vec![
                level(pck::CPU_SVN, pck::PCE_SVN, tdx, "UpToDate", None),
                level(pck::OLD_CPU_SVN, pck::PCE_SVN, tdx, "OutOfDate", Some("SOFTWARE-SA-00001")),
                level([0; 16], 1, [0; 16], "Revoked", Some("SOFTWARE-SA-00002")),
            ],
            module_levels: vec![module(6, "UpToDate", None), module(4, "OutOfDate", Some("SOFTWARE-SA-00003"))],
            qe_levels: vec![(pck::QE_ISV_SVN, "UpToDate"), (4, "OutOfDate")],
            qe_mrsigner: pck::qe_mrsigner(),
            revoked_pcks: Vec::new(),
            pck_ca_revoked: false,
        }
    }

    /// What the service publishes after a TCB recovery of `date_s`: the level that was up to date has `advisory`, and one above it,
    /// which no machine of this testkit reaches, is up to date.
    #[must_use]
    pub fn recovered(mut self, date_s: u64, advisory: &str) -> Self {
        self.evaluation += 1;
        let mut above = None;
        if let Some(level) = self.levels.first_mut() {
            above = Some(TcbLevel { pce_svn: level.pce_svn + 1, date: rfc3339(date_s), ..level.clone() });
            level.status = "OutOfDate";
            level.advisory_ids.push(advisory.to_owned());
        }
        self.levels.splice(0..0, above);
        self
    }

    /// The text that is signed: member order and spelling of Intel's service, no white space.
    fn tcb_info(&self) -> Value {
        let zero_signer = "0".repeat(96);
        let module = json!({"mrsigner": zero_signer, "attributes": "0000000000000000", "attributesMask": "FFFFFFFFFFFFFFFF"});
        let module_levels: Vec<Value> = self
            .module_levels
            .iter()
            .map(|level| {
                with_advisories(
                    json!({"tcb": {"isvsvn": level.isv_svn}, "tcbDate": TCB_DATE, "tcbStatus": level.status}),
                    &level.advisory_ids,
                )
            })
            .collect();
        let levels: Vec<Value> = self
            .levels
            .iter()
            .map(|level| {
                with_advisories(
                    json!({
                        "tcb": {
                            "sgxtcbcomponents": components(&level.sgx),
                            "pcesvn": level.pce_svn,
                            "tdxtcbcomponents": components(&level.tdx),
                        },
                        "tcbDate": level.date,
                        "tcbStatus": level.status,
                    }),
                    &level.advisory_ids,
                )
            })
            .collect();
        json!({
            "id": "TDX",
            "version": 3,
            "issueDate": rfc3339(self.validity.from_s),
            "nextUpdate": rfc3339(self.validity.until_s),
            "fmspc": hex::encode_upper(self.fmspc),
            "pceId": "0000",
            "tcbType": 0,
            "tcbEvaluationDataNumber": self.evaluation,
            "tdxModule": module,
            "tdxModuleIdentities": [{
                "id": "TDX_01",
                "mrsigner": zero_signer,
                "attributes": "0000000000000000",
                "attributesMask": "FFFFFFFFFFFFFFFF",
                "tcbLevels": module_levels,
            }],
            "tcbLevels": levels,
        })
    }

    fn qe_identity(&self) -> Value {
        let levels: Vec<Value> = self
            .qe_levels
            .iter()
            .map(|(isv_svn, status)| json!({"tcb": {"isvsvn": isv_svn}, "tcbDate": TCB_DATE, "tcbStatus": status}))
            .collect();
        json!({
            "id": "TD_QE",
            "version": 2,
            "issueDate": rfc3339(self.validity.from_s),
            "nextUpdate": rfc3339(self.validity.until_s),
            "tcbEvaluationDataNumber": self.evaluation,
            "miscselect": "00000000",
            "miscselectMask": "FFFFFFFF",
            "attributes": "11000000000000000000000000000000",
            "attributesMask": "FBFFFFFFFFFFFFFF0000000000000000",
            "mrsigner": hex::encode_upper(self.qe_mrsigner),
            "isvprodid": 2,
            "tcbLevels": levels,
        })
    }
}

/// Everything a verifier needs beside the quote, for one family.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Collateral {
    /// Family it is for.
    pub fmspc: [u8; 6],
    /// PEM: PCK CA, root.
    pub pck_crl_issuer_chain: String,
    /// DER, signed by the root.
    pub root_ca_crl: Vec<u8>,
    /// DER, signed by the PCK CA.
    pub pck_crl: Vec<u8>,
    /// PEM: TCB signer, root.
    pub tcb_info_issuer_chain: String,
    /// The signed text.
    pub tcb_info: String,
    /// `r ‖ s` over the text.
    pub tcb_info_signature: Vec<u8>,
    /// PEM: TCB signer, root.
    pub qe_identity_issuer_chain: String,
    /// The signed text.
    pub qe_identity: String,
    /// `r ‖ s` over the text.
    pub qe_identity_signature: Vec<u8>,
}

impl Collateral {
    pub(crate) fn sign(pki: &TdxPki, spec: &CollateralSpec) -> Result<Self, TestkitError> {
        let revoked_by_root = if spec.pck_ca_revoked { vec![pki.pck_ca.serial()] } else { Vec::new() };
        let signer_chain = pem_chain(&[&pki.tcb_signer.der, &pki.root.der]);
        let tcb_info = spec.tcb_info().to_string();
        let qe_identity = spec.qe_identity().to_string();
        Ok(Self {
            fmspc: spec.fmspc,
            pck_crl_issuer_chain: pem_chain(&[&pki.pck_ca.der, &pki.root.der]),
            root_ca_crl: pki.root.crl(spec.crl_validity, 1, &revoked_by_root)?,
            pck_crl: pki.pck_ca.crl(spec.crl_validity, 1, &spec.revoked_pcks)?,
            tcb_info_issuer_chain: signer_chain.clone(),
            tcb_info_signature: pki.tcb_signer.key.sign_raw(tcb_info.as_bytes()),
            tcb_info,
            qe_identity_issuer_chain: signer_chain,
            qe_identity_signature: pki.tcb_signer.key.sign_raw(qe_identity.as_bytes()),
            qe_identity,
        })
    }

    /// The same for quotes of enclaves: TCB info `SGX`, QE identity `QE`.
    pub(crate) fn sign_sgx(pki: &TdxPki, spec: &CollateralSpec) -> Result<Self, TestkitError> {
        let (mut tcb_info, mut qe_identity) = (spec.tcb_info(), spec.qe_identity());
        if let Some(members) = tcb_info.as_object_mut() {
            members.insert("id".to_owned(), "SGX".into());
            members.shift_remove("tdxModule");
            members.shift_remove("tdxModuleIdentities");
            for level in members.get_mut("tcbLevels").and_then(Value::as_array_mut).into_iter().flatten() {
                if let Some(tcb) = level.get_mut("tcb").and_then(Value::as_object_mut) {
                    tcb.shift_remove("tdxtcbcomponents");
                }
            }
        }
        if let Some(members) = qe_identity.as_object_mut() {
            members.insert("id".to_owned(), "QE".into());
            members.insert("isvprodid".to_owned(), 1.into());
        }
        let (tcb_info, qe_identity) = (tcb_info.to_string(), qe_identity.to_string());
        Ok(Self {
            tcb_info_signature: pki.tcb_signer.key.sign_raw(tcb_info.as_bytes()),
            tcb_info,
            qe_identity_signature: pki.tcb_signer.key.sign_raw(qe_identity.as_bytes()),
            qe_identity,
            ..Self::sign(pki, spec)?
        })
    }

    /// The JSON object with exactly the members of a collateral file.
    pub fn json(&self) -> Value {
        json!({
            "pck_crl_issuer_chain": self.pck_crl_issuer_chain,
            "root_ca_crl": hex::encode(&self.root_ca_crl),
            "pck_crl": hex::encode(&self.pck_crl),
            "tcb_info_issuer_chain": self.tcb_info_issuer_chain,
            "tcb_info": self.tcb_info,
            "tcb_info_signature": hex::encode(&self.tcb_info_signature),
            "qe_identity_issuer_chain": self.qe_identity_issuer_chain,
            "qe_identity": self.qe_identity,
            "qe_identity_signature": hex::encode(&self.qe_identity_signature),
        })
    }
}

/// The bytes of a collateral bundle: `{"format":1,"tdx":{"<fmspc, lower-case hex>": <collateral object>}}`.
pub fn bundle_json(parts: &[Collateral]) -> Vec<u8> {
    let families: serde_json::Map<String, Value> = parts.iter().map(|part| (hex::encode(part.fmspc), part.json())).collect();
    json!({"format": 1, "tdx": families}).to_string().into_bytes()
}

fn components(svns: &[u8; 16]) -> Vec<Value> {
    svns.iter().map(|svn| json!({"svn": svn})).collect()
}

fn with_advisories(mut level: Value, advisory_ids: &[String]) -> Value {
    if let (Some(members), false) = (level.as_object_mut(), advisory_ids.is_empty()) {
        members.insert("advisoryIDs".to_owned(), json!(advisory_ids));
    }
    level
}

/// Date of every level; only its order against others would matter to a verifier.
const TCB_DATE: &str = "2025-05-14T00:00:00Z";
