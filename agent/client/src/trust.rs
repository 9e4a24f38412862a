//! What the evidence of nodes is judged by. Owns: reading roots and collateral from files, the rule on measurements.
//! Never: trusts a software root that is not named, fetches collateral.
//!
//! Mode C needs little of this: no node learns a key, and the pin decides. Verified nodes keep a client from telling its plans, and
//! from being led around, by machines that are no nodes at all.

use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use dstack_attest::{AttestError, BUNDLE_BYTES_MAX, CollateralBundle, TcbPolicy, TrustRoots};
use dstack_protocol::TcbStatus;
use dstack_protocol::limits::{MEASUREMENT_BYTES_MAX, MEASUREMENTS_MAX};
use dstack_ratls::AttestJudge;
use dstack_ratls::attest_judge::TrustMaterial;
use serde::{Deserialize, Serialize};

/// Largest root certificate that is read, bytes.
const ROOT_BYTES_MAX: usize = 64 * 1024;
/// Software roots at most.
const SOFTWARE_ROOTS_MAX: usize = 16;

/// Section `[trust]` of a configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Trust {
    /// DER files of software roots. Empty in production: then only hardware is trusted.
    pub software_roots: Vec<PathBuf>,
    /// The collateral bundle (JSON) that evidence of nodes is judged with. Without it only platforms that need none are.
    pub collateral: Option<PathBuf>,
    /// Measurements of nodes, hex; one of these must be proven. Empty: any measurement, and the pin alone decides.
    pub node_measurements: Vec<String>,
    /// TCB statuses of nodes beside `UpToDate`, in Intel's words.
    pub tcb_also: Vec<String>,
    /// How long a node may be out of date after a TCB recovery, seconds; 0 refuses it at once.
    pub tcb_grace_s: u32,
    /// Whether SEV-SNP nodes are taken whose reports a cloud's key (VLEK) signed.
    pub accept_vlek: bool,
    /// Whether nodes' chains of AMD and Google are taken without the revocation lists that they name.
    pub accept_missing_crl: bool,
}

impl Default for Trust {
    fn default() -> Self {
        Self {
            software_roots: Vec::new(),
            collateral: None,
            node_measurements: Vec::new(),
            tcb_also: Vec::new(),
            // A TCB recovery must not cut all agents off at once.
            tcb_grace_s: 30 * 86_400,
            accept_vlek: false,
            accept_missing_crl: false,
        }
    }
}

/// Why the trust settings cannot be used. Operator's to fix.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TrustError {
    /// A file cannot be read.
    #[error("cannot read {}: {reason}", .path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The system's words.
        reason: String,
    },
    /// A file is no root, or no collateral bundle.
    #[error("{}: {error}", .path.display())]
    Refused {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        error: AttestError,
    },
    /// A setting is out of bounds.
    #[error("trust.{key}: expected {expected}, got {got}")]
    Setting {
        /// Its name.
        key: &'static str,
        /// What it may be.
        expected: String,
        /// What it is.
        got: String,
    },
}

impl Trust {
    /// Reads the files.
    ///
    /// # Errors
    /// [`TrustError`].
    pub fn material(&self) -> Result<TrustMaterial, TrustError> {
        if self.software_roots.len() > SOFTWARE_ROOTS_MAX {
            return Err(setting("software_roots", format!("at most {SOFTWARE_ROOTS_MAX}"), self.software_roots.len().to_string()));
        }
        let mut roots = TrustRoots::production();
        for path in &self.software_roots {
            let der = read(path, ROOT_BYTES_MAX)?;
            roots = roots.with_software_root(&der).map_err(|error| TrustError::Refused { path: path.clone(), error })?;
        }
        let collateral = match &self.collateral {
            None => CollateralBundle::empty(),
            Some(path) => CollateralBundle::parse(&read(path, BUNDLE_BYTES_MAX)?)
                .map_err(|error| TrustError::Refused { path: path.clone(), error })?,
        };
        let mut allowed = vec![TcbStatus::UpToDate];
        for name in &self.tcb_also {
            match TcbStatus::from_name(name) {
                Some(status) if !matches!(status, TcbStatus::None | TcbStatus::Revoked) => allowed.push(status),
                _ => return Err(setting("tcb_also", "Intel's names of statuses, without Revoked".to_owned(), name.clone())),
            }
        }
        let tcb = TcbPolicy::allowing(&allowed).with_grace_ms(u64::from(self.tcb_grace_s) * 1000);
        let tcb = if self.accept_vlek { tcb.accepting_vlek() } else { tcb };
        let tcb = if self.accept_missing_crl { tcb.accepting_missing_crl() } else { tcb };
        Ok(TrustMaterial { roots, collateral, tcb })
    }

    /// The judge of nodes' evidence.
    ///
    /// # Errors
    /// [`TrustError`].
    pub fn judge(&self) -> Result<Arc<AttestJudge>, TrustError> {
        Ok(judge_of(self.material()?, self.measurements()?))
    }

    fn measurements(&self) -> Result<Vec<Vec<u8>>, TrustError> {
        let wrong =
            |got: &str| setting("node_measurements", format!("at most {MEASUREMENTS_MAX} hex texts"), got.chars().take(80).collect());
        if self.node_measurements.len() > MEASUREMENTS_MAX {
            return Err(wrong(&self.node_measurements.len().to_string()));
        }
        let decoded = |text: &String| match hex::decode(text.trim_start_matches("0x")) {
            Ok(bytes) if !bytes.is_empty() && bytes.len() <= MEASUREMENT_BYTES_MAX => Ok(bytes),
            _ => Err(wrong(text)),
        };
        self.node_measurements.iter().map(decoded).collect()
    }
}

/// A judge that takes nodes of these measurements, or of any where the list is empty.
pub fn judge_of(material: TrustMaterial, measurements: Vec<Vec<u8>>) -> Arc<AttestJudge> {
    if measurements.is_empty() {
        return Arc::new(AttestJudge::new(material));
    }
    let acceptance = move |_role, identity: &dstack_attest::VerifiedIdentity| {
        if measurements.iter().any(|allowed| allowed == identity.measurement()) {
            return Ok(());
        }
        Err(format!("node measurement {} is none of the {} allowed ones", hex::encode(identity.measurement()), measurements.len()))
    };
    Arc::new(AttestJudge::new(material).with_acceptance(Box::new(acceptance)))
}

fn setting(key: &'static str, expected: String, got: String) -> TrustError {
    TrustError::Setting { key, expected, got }
}

fn read(path: &Path, bytes_max: usize) -> Result<Vec<u8>, TrustError> {
    let unreadable = |reason: String| TrustError::Unreadable { path: path.to_owned(), reason };
    let file = File::open(path).map_err(|error| unreadable(error.to_string()))?;
    let mut bytes = Vec::new();
    let limit = u64::try_from(bytes_max).unwrap_or(u64::MAX).saturating_add(1);
    file.take(limit).read_to_end(&mut bytes).map_err(|error| unreadable(error.to_string()))?;
    if bytes.len() > bytes_max { Err(unreadable(format!("more than {bytes_max} bytes"))) } else { Ok(bytes) }
}

#[cfg(test)]
mod tests {
    use dstack_attest::{AttestError, VerifiedIdentity, VerifyContext, X509Pool, verify};
    use dstack_protocol::UnixMillis;

    use super::*;

    /// A self-made AMD hierarchy and a report that a VLEK signed: `core/attest/tests/snp`.
    const ARK: &[u8] = include_bytes!("../../../core/attest/tests/snp/ark.der");
    const AMD_LIST: &[u8] = include_bytes!("../../../core/attest/tests/snp/crl-none.der");
    const VLEK_EVIDENCE: &[u8] = include_bytes!("../../../core/attest/tests/snp/vlek-evidence.bin");
    /// 2026-06-01.
    const NOW: UnixMillis = UnixMillis(1_780_272_000_000);

    #[test]
    fn nodes_under_a_clouds_key_and_chains_without_lists_only_where_told() {
        let dir = tempfile::tempdir().unwrap();
        let (ark, file) = (dir.path().join("ark.der"), dir.path().join("collateral.json"));
        std::fs::write(&ark, ARK).unwrap();
        let pool = X509Pool::new(Vec::new(), vec![AMD_LIST.to_vec()]).unwrap();
        std::fs::write(&file, CollateralBundle::compose(&std::collections::BTreeMap::new(), &pool).unwrap().bytes()).unwrap();
        let judged = |with_list: bool, accept_vlek, accept_missing_crl| -> Result<VerifiedIdentity, AttestError> {
            let collateral = with_list.then(|| file.clone());
            let trust = Trust { software_roots: vec![ark.clone()], collateral, accept_vlek, accept_missing_crl, ..Trust::default() };
            let TrustMaterial { roots, collateral, tcb } = trust.material().unwrap();
            verify(VLEK_EVIDENCE, &VerifyContext { now: NOW, roots: &roots, collateral: &collateral, tcb: &tcb })
        };
        assert!(judged(true, true, false).unwrap().tcb().vlek);
        assert!(judged(false, true, true).is_ok());
        assert!(matches!(judged(true, false, false), Err(AttestError::GuestPolicy { .. })));
        assert!(matches!(judged(false, false, true), Err(AttestError::GuestPolicy { .. })));
        assert!(matches!(judged(false, true, false), Err(AttestError::CrlMissing { .. })));
    }
}
