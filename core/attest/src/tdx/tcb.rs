//! Which TCB level a platform, its TDX module and its quoting enclave reach. Owns: level selection and how statuses combine.
//! Never: verifies a signature, decides whether a status is good enough.
//! Source: Intel PCS API v4 "TCB info"/"Enclave identity" level selection; Intel QVL for combining and for the two relaunch statuses.

use std::cmp::Reverse;

use dcap_qvl::{QeIdentity, TcbInfo, TcbLevel, TcbStatus as Status};
use dstack_protocol::{TcbStatus, UnixMillis};

use super::{
    clock::ms_of_rfc3339,
    pck::PckPlatform,
    quote::{QeReport, TdBody},
};
use crate::{AttestError, TcbFacts};

/// A status and the advisories it stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LevelVerdict {
    /// The status.
    pub status: TcbStatus,
    /// Advisory ids, in the order of the collateral.
    pub advisory_ids: Vec<String>,
}

/// TCB verdict over platform, TDX module and quoting enclave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TcbVerdict {
    /// All three together.
    pub overall: LevelVerdict,
    /// Platform and TDX module.
    pub platform: LevelVerdict,
    /// Quoting enclave.
    pub qe: LevelVerdict,
    /// `tcbDate` of the level that was reached, the earliest of platform, module and quoting enclave.
    pub date: UnixMillis,
    /// Where the overall status is out of date: since when, the earliest of the parts that are.
    pub outdated_since: Option<UnixMillis>,
    /// Number of the TCB recovery, the lower of both documents.
    pub evaluation: u32,
}

/// A level found, and its place in time.
struct Found {
    verdict: LevelVerdict,
    date_ms: u64,
    outdated_since_ms: Option<u64>,
}

impl Found {
    /// The level of `date` and `status` among levels of `dates`. What is out of date is so since the next better level: with a later
    /// recovery that day stays the same, so a grace that is over stays over.
    fn dated<'d>(verdict: LevelVerdict, date: &str, status: Status, dates: impl Iterator<Item = &'d String>) -> Result<Self, AttestError> {
        const FIELD: &str = "tcb date";
        let date_ms = ms_of_rfc3339(date, FIELD)?;
        let mut next_ms = None;
        if is_outdated(ours(status)) {
            for better in dates {
                let better_ms = ms_of_rfc3339(better, FIELD)?;
                if better_ms > date_ms && next_ms.is_none_or(|next| better_ms < next) {
                    next_ms = Some(better_ms);
                }
            }
            next_ms = next_ms.or(Some(date_ms));
        }
        Ok(Self { verdict, date_ms, outdated_since_ms: next_ms })
    }

    fn with(self, verdict: LevelVerdict, other: &Self) -> Self {
        Self {
            verdict,
            date_ms: self.date_ms.min(other.date_ms),
            outdated_since_ms: earlier(self.outdated_since_ms, other.outdated_since_ms),
        }
    }
}

fn earlier(one: Option<u64>, other: Option<u64>) -> Option<u64> {
    one.into_iter().chain(other).min()
}

const fn is_outdated(status: TcbStatus) -> bool {
    matches!(status, TcbStatus::OutOfDate | TcbStatus::OutOfDateConfigurationNeeded)
}

impl TcbVerdict {
    /// What a policy judges.
    #[must_use]
    pub fn facts(&self) -> TcbFacts {
        TcbFacts {
            status: self.overall.status,
            advisory_ids: self.overall.advisory_ids.clone(),
            date: Some(self.date),
            outdated_since: self.outdated_since,
            evaluation: Some(self.evaluation),
            vlek: false,
        }
    }

    /// Selects the levels of a platform that runs `body`.
    pub(crate) fn select(
        tcb_info: &TcbInfo,
        qe_identity: &QeIdentity,
        pck: &PckPlatform,
        body: &TdBody,
        qe_report: &QeReport,
    ) -> Result<Self, AttestError> {
        let platform = platform_level(tcb_info, pck, &body.tee_tcb_svn)?;
        let qe = qe_level(qe_identity, qe_report.isv_svn)?;
        let Found { verdict: platform, date_ms, outdated_since_ms } = platform;
        let Found { verdict: qe, date_ms: qe_date_ms, outdated_since_ms: qe_since_ms } = qe;
        let mut status = converge(platform.status, qe.status);
        if let Some(td15) = &body.td15 {
            // The module may have been updated under a running TD: what runs now has to be known as well.
            let current = converge(platform_level(tcb_info, pck, &td15.tee_tcb_svn2)?.verdict.status, qe.status);
            status = if current == TcbStatus::Revoked { current } else { relaunch(status, current) };
        }
        let advisory_ids = union(platform.advisory_ids.clone(), &qe.advisory_ids);
        let since_ms = earlier(outdated_since_ms, qe_since_ms).filter(|_| is_outdated(status));
        Ok(Self {
            overall: LevelVerdict { status, advisory_ids },
            platform,
            qe,
            date: UnixMillis(date_ms.min(qe_date_ms)),
            outdated_since: since_ms.map(UnixMillis),
            evaluation: tcb_info.tcb_evaluation_data_number.min(qe_identity.tcb_evaluation_data_number),
        })
    }
}

/// Puts the levels into the order in which Intel's library tries them: not that of the text, but the highest first.
pub(super) fn highest_first(tcb_info: &mut TcbInfo) {
    let key = |level: &TcbLevel| (level.tcb.sgx_components.clone(), level.tcb.pce_svn, level.tcb.tdx_components.clone());
    tcb_info.tcb_levels.sort_by_cached_key(|level| Reverse(key(level)));
}

fn platform_level(tcb_info: &TcbInfo, pck: &PckPlatform, tee_tcb_svn: &[u8; 16]) -> Result<Found, AttestError> {
    let mut found = None;
    for level in &tcb_info.tcb_levels {
        let shortfalls = level
            .shortfalls(&pck.tcb_components, pck.pce_svn, Some(tee_tcb_svn))
            .map_err(|_| AttestError::Field { field: "tcb level", why: "not of sixteen components" })?;
        if shortfalls.is_empty() {
            found = Some(level);
            break;
        }
    }
    let level = found.ok_or(AttestError::NoTcbLevel { part: "tcb info" })?;
    let platform = match level.tcb_status {
        Status::TDRelaunchAdvised | Status::TDRelaunchAdvisedConfigurationNeeded => return Err(misplaced("tcb info")),
        status => LevelVerdict { status: ours(status), advisory_ids: level.advisory_ids.clone() },
    };
    let dates = tcb_info.tcb_levels.iter().map(|level| &level.tcb_date);
    let found = Found::dated(platform, &level.tcb_date, level.tcb_status, dates)?;
    let Some(module) = module_level(tcb_info, tee_tcb_svn)? else {
        return Ok(found);
    };
    let advisory_ids = union(found.verdict.advisory_ids.clone(), &module.verdict.advisory_ids);
    let status = converge(found.verdict.status, module.verdict.status);
    Ok(found.with(LevelVerdict { status, advisory_ids }, &module))
}

/// The level of the TDX module's own identity; module version 0 (the first modules) has none.
fn module_level(tcb_info: &TcbInfo, tee_tcb_svn: &[u8; 16]) -> Result<Option<Found>, AttestError> {
    let none = || AttestError::NoTcbLevel { part: "tdx module identity" };
    let Some(identity) = tcb_info.tdx_module_identity(tee_tcb_svn).map_err(|_| none())? else {
        return Ok(None);
    };
    let level = identity.tcb_levels.iter().find(|level| level.shortfall(tee_tcb_svn).is_none()).ok_or_else(none)?;
    match level.tcb_status {
        Status::UpToDate | Status::OutOfDate | Status::Revoked => {
            let verdict = LevelVerdict { status: ours(level.tcb_status), advisory_ids: level.advisory_ids.clone() };
            let dates = identity.tcb_levels.iter().map(|level| &level.tcb_date);
            Found::dated(verdict, &level.tcb_date, level.tcb_status, dates).map(Some)
        }
        _ => Err(misplaced("tdx module identity")),
    }
}

fn qe_level(qe_identity: &QeIdentity, isv_svn: u16) -> Result<Found, AttestError> {
    let level =
        qe_identity.tcb_levels.iter().find(|level| level.tcb.isvsvn <= isv_svn).ok_or(AttestError::NoTcbLevel { part: "qe identity" })?;
    match level.tcb_status {
        Status::UpToDate | Status::OutOfDate | Status::Revoked | Status::ConfigurationNeeded | Status::OutOfDateConfigurationNeeded => {
            let verdict = LevelVerdict { status: ours(level.tcb_status), advisory_ids: level.advisory_ids.clone() };
            Found::dated(verdict, &level.tcb_date, level.tcb_status, qe_identity.tcb_levels.iter().map(|level| &level.tcb_date))
        }
        _ => Err(misplaced("qe identity")),
    }
}

const fn misplaced(part: &'static str) -> AttestError {
    AttestError::Malformed { part, why: "a tcb status that cannot stand there" }
}

fn union(mut ids: Vec<String>, more: &[String]) -> Vec<String> {
    for id in more {
        if !ids.contains(id) {
            ids.push(id.clone());
        }
    }
    ids
}

/// A component pulls the platform down only when it is outdated or revoked.
const fn converge(platform: TcbStatus, component: TcbStatus) -> TcbStatus {
    use TcbStatus as S;
    match (component, platform) {
        (S::Revoked, _) => S::Revoked,
        (S::OutOfDate, S::UpToDate | S::SwHardeningNeeded) => S::OutOfDate,
        (S::OutOfDate, S::ConfigurationNeeded | S::ConfigurationAndSwHardeningNeeded) => S::OutOfDateConfigurationNeeded,
        _ => platform,
    }
}

/// A TD launched under an outdated module stays outdated until it is launched anew, even when the module is current by now
/// (Intel's `TDRelaunchAdvised`); what the current module needs comes on top.
const fn relaunch(launch: TcbStatus, current: TcbStatus) -> TcbStatus {
    use TcbStatus as S;
    match (launch, current) {
        (S::OutOfDate, S::ConfigurationNeeded | S::ConfigurationAndSwHardeningNeeded) => S::OutOfDateConfigurationNeeded,
        _ => launch,
    }
}

/// Our name of a status. The two relaunch statuses count as what the TD was launched under: out of date.
pub(super) const fn ours(status: Status) -> TcbStatus {
    match status {
        Status::UpToDate => TcbStatus::UpToDate,
        Status::OutOfDateConfigurationNeeded | Status::TDRelaunchAdvisedConfigurationNeeded => TcbStatus::OutOfDateConfigurationNeeded,
        Status::OutOfDate | Status::TDRelaunchAdvised => TcbStatus::OutOfDate,
        Status::ConfigurationAndSWHardeningNeeded => TcbStatus::ConfigurationAndSwHardeningNeeded,
        Status::ConfigurationNeeded => TcbStatus::ConfigurationNeeded,
        Status::SWHardeningNeeded => TcbStatus::SwHardeningNeeded,
        Status::Revoked => TcbStatus::Revoked,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// TCB info with two levels, one of them for PCE 13, and module identities of versions 1 and 3.
    fn tcb_info() -> TcbInfo {
        let components = |svn: u8| format!("[{}]", vec![format!(r#"{{"svn":{svn}}}"#); 16].join(","));
        let level = |svn, pce, status| {
            let tcb = format!(r#"{{"sgxtcbcomponents":{0},"pcesvn":{pce},"tdxtcbcomponents":{0}}}"#, components(svn));
            format!(r#"{{"tcb":{tcb},"tcbDate":"2024-03-13T00:00:00Z","tcbStatus":"{status}","advisoryIDs":["A-{pce}"]}}"#)
        };
        let module = |version, isvsvn, status| {
            let level =
                format!(r#"{{"tcb":{{"isvsvn":{isvsvn}}},"tcbDate":"2024-03-13T00:00:00Z","tcbStatus":"{status}","advisoryIDs":["M"]}}"#);
            format!(r#"{{"id":"TDX_0{version}","mrsigner":"","attributes":"","attributesMask":"","tcbLevels":[{level}]}}"#)
        };
        // The higher level stands last: order in the text must not matter.
        let levels = [level(2, 11, "OutOfDate"), level(3, 13, "UpToDate")].join(",");
        let modules = [module(1, 4, "UpToDate"), module(3, 2, "OutOfDate"), module(4, 1, "Revoked")].join(",");
        let head =
            r#""id":"TDX","version":3,"issueDate":"","nextUpdate":"","fmspc":"","pceId":"","tcbType":0,"tcbEvaluationDataNumber":17"#;
        let mut parsed = serde_json::from_str(&format!(r#"{{{head},"tdxModuleIdentities":[{modules}],"tcbLevels":[{levels}]}}"#)).unwrap();
        highest_first(&mut parsed);
        parsed
    }

    fn pck(svn: u8, pce_svn: u16) -> PckPlatform {
        let cpu_svn = [svn; 16];
        PckPlatform { ppid: [0; 16], tcb_components: cpu_svn, pce_svn, cpu_svn, pce_id: [0; 2], fmspc: [0; 6] }
    }

    /// Module security version, module version, then the other components at 3.
    fn tee_tcb_svn(isvsvn: u8, version: u8) -> [u8; 16] {
        let mut svn = [3; 16];
        svn[..2].copy_from_slice(&[isvsvn, version]);
        svn
    }

    #[test]
    fn the_highest_level_that_is_met_counts() {
        let level =
            |pck, svn| platform_level(&tcb_info(), &pck, &svn).map(|found| (found.verdict.status, found.verdict.advisory_ids.join(" ")));
        let up_to_date = (TcbStatus::UpToDate, "A-13 M".to_owned());
        assert_eq!(level(pck(3, 13), tee_tcb_svn(4, 1)), Ok(up_to_date));
        assert_eq!(level(pck(3, 12), tee_tcb_svn(4, 1)), Ok((TcbStatus::OutOfDate, "A-11 M".to_owned())));
        assert_eq!(level(pck(2, 13), tee_tcb_svn(4, 1)), Ok((TcbStatus::OutOfDate, "A-11 M".to_owned())));
        assert_eq!(level(pck(1, 13), tee_tcb_svn(4, 1)), Err(AttestError::NoTcbLevel { part: "tcb info" }));
        assert_eq!(level(pck(3, 10), tee_tcb_svn(4, 1)), Err(AttestError::NoTcbLevel { part: "tcb info" }));
    }

    #[test]
    fn the_module_is_judged_by_its_own_identity() {
        let level = |svn| platform_level(&tcb_info(), &pck(3, 13), &svn).map(|found| found.verdict.status);
        let none = Err(AttestError::NoTcbLevel { part: "tdx module identity" });
        assert_eq!(level(tee_tcb_svn(3, 1)), none, "below its lowest level");
        assert_eq!(level(tee_tcb_svn(9, 2)), none, "a version without identity");
        assert_eq!(level(tee_tcb_svn(2, 3)), Ok(TcbStatus::OutOfDate));
        assert_eq!(level(tee_tcb_svn(1, 4)), Ok(TcbStatus::Revoked));
        // Version 0 has no identity: its components are judged with the platform's.
        assert_eq!(level(tee_tcb_svn(3, 0)), Err(AttestError::NoTcbLevel { part: "tcb info" }), "version 0 is below 2");
    }

    #[test]
    fn out_of_date_counts_from_the_next_better_level() {
        let mut levels = tcb_info();
        let best = levels.tcb_levels[0].clone();
        let dated = |date: &str, status, svn| {
            let mut level = TcbLevel { tcb_date: format!("{date}T00:00:00Z"), tcb_status: status, ..best.clone() };
            level.tcb.sgx_components.iter_mut().for_each(|component| component.svn = svn);
            level
        };
        // Two recoveries came after the level of svn 2.
        levels.tcb_levels = vec![
            dated("2025-05-14", Status::UpToDate, 5),
            dated("2024-11-13", Status::OutOfDate, 4),
            dated("2024-03-13", Status::OutOfDate, 2),
        ];
        let of = |svn| platform_level(&levels, &pck(svn, 13), &tee_tcb_svn(4, 1)).map(|found| (found.date_ms, found.outdated_since_ms));
        let day = |date: &str| ms_of_rfc3339(&format!("{date}T00:00:00Z"), "test").unwrap();
        // The module's level is of 2024-03-13, the earliest date here.
        assert_eq!(of(5), Ok((day("2024-03-13"), None)));
        assert_eq!(of(4), Ok((day("2024-03-13"), Some(day("2025-05-14")))));
        assert_eq!(of(3), Ok((day("2024-03-13"), Some(day("2024-11-13")))));
        levels.tcb_levels.remove(0);
        levels.tcb_levels[0].tcb_date = "2024-13-99".to_owned();
        assert!(matches!(platform_level(&levels, &pck(3, 13), &tee_tcb_svn(4, 1)), Err(AttestError::Field { field: "tcb date", .. })));
    }

    #[test]
    fn only_outdated_and_revoked_components_pull_down() {
        use TcbStatus as S;
        for (platform, component, expected) in [
            (S::UpToDate, S::OutOfDate, S::OutOfDate),
            (S::ConfigurationNeeded, S::OutOfDate, S::OutOfDateConfigurationNeeded),
            (S::UpToDate, S::ConfigurationNeeded, S::UpToDate),
            (S::OutOfDateConfigurationNeeded, S::Revoked, S::Revoked),
            (S::Revoked, S::OutOfDate, S::Revoked),
        ] {
            assert_eq!(converge(platform, component), expected);
        }
    }

    #[test]
    fn an_old_launch_stays_out_of_date_under_a_current_module() {
        use TcbStatus as S;
        for (launch, current, expected) in [
            (S::OutOfDate, S::UpToDate, S::OutOfDate),
            (S::OutOfDate, S::ConfigurationNeeded, S::OutOfDateConfigurationNeeded),
            (S::OutOfDateConfigurationNeeded, S::UpToDate, S::OutOfDateConfigurationNeeded),
            (S::OutOfDate, S::OutOfDate, S::OutOfDate),
            (S::UpToDate, S::OutOfDate, S::UpToDate),
        ] {
            assert_eq!(relaunch(launch, current), expected);
        }
    }
}
