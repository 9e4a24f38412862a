//! Which TCB level a platform, its TDX module and its quoting enclave reach. Owns: level selection and how statuses combine.
//! Never: verifies a signature, decides whether a status is good enough.
//! Source: Intel PCS API v4 "TCB info"/"Enclave identity" level selection; Intel QVL for combining and for the two relaunch statuses.

use std::cmp::Reverse;

use dcap_qvl::{QeIdentity, TcbInfo, TcbLevel, TcbStatus as Status};
use dstack_protocol::TcbStatus;

use super::{
    pck::PckPlatform,
    quote::{QeReport, TdBody},
};
use crate::AttestError;

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
}

impl TcbVerdict {
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
        let mut status = converge(platform.status, qe.status);
        if let Some(td15) = &body.td15 {
            // The module may have been updated under a running TD: what runs now has to be known as well.
            let current = converge(platform_level(tcb_info, pck, &td15.tee_tcb_svn2)?.status, qe.status);
            status = if current == TcbStatus::Revoked { current } else { relaunch(status, current) };
        }
        let advisory_ids = union(platform.advisory_ids.clone(), &qe.advisory_ids);
        Ok(Self { overall: LevelVerdict { status, advisory_ids }, platform, qe })
    }
}

fn platform_level(tcb_info: &TcbInfo, pck: &PckPlatform, tee_tcb_svn: &[u8; 16]) -> Result<LevelVerdict, AttestError> {
    let mut levels: Vec<&TcbLevel> = tcb_info.tcb_levels.iter().collect();
    levels.sort_by_key(|level| {
        let tcb = &level.tcb;
        Reverse((tcb.sgx_components.clone(), tcb.pce_svn, tcb.tdx_components.clone()))
    });
    let mut found = None;
    for level in levels {
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
    let Some(module) = module_level(tcb_info, tee_tcb_svn)? else {
        return Ok(platform);
    };
    let advisory_ids = union(platform.advisory_ids, &module.advisory_ids);
    Ok(LevelVerdict { status: converge(platform.status, module.status), advisory_ids })
}

/// The level of the TDX module's own identity; module version 0 (the first modules) has none.
fn module_level(tcb_info: &TcbInfo, tee_tcb_svn: &[u8; 16]) -> Result<Option<LevelVerdict>, AttestError> {
    let none = || AttestError::NoTcbLevel { part: "tdx module identity" };
    let Some(identity) = tcb_info.tdx_module_identity(tee_tcb_svn).map_err(|_| none())? else {
        return Ok(None);
    };
    let level = identity.tcb_levels.iter().find(|level| level.shortfall(tee_tcb_svn).is_none()).ok_or_else(none)?;
    match level.tcb_status {
        Status::UpToDate | Status::OutOfDate | Status::Revoked => {
            Ok(Some(LevelVerdict { status: ours(level.tcb_status), advisory_ids: level.advisory_ids.clone() }))
        }
        _ => Err(misplaced("tdx module identity")),
    }
}

fn qe_level(qe_identity: &QeIdentity, isv_svn: u16) -> Result<LevelVerdict, AttestError> {
    let level =
        qe_identity.tcb_levels.iter().find(|level| level.tcb.isvsvn <= isv_svn).ok_or(AttestError::NoTcbLevel { part: "qe identity" })?;
    match level.tcb_status {
        Status::UpToDate | Status::OutOfDate | Status::Revoked | Status::ConfigurationNeeded | Status::OutOfDateConfigurationNeeded => {
            Ok(LevelVerdict { status: ours(level.tcb_status), advisory_ids: level.advisory_ids.clone() })
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
        serde_json::from_str(&format!(r#"{{{head},"tdxModuleIdentities":[{modules}],"tcbLevels":[{levels}]}}"#)).unwrap()
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
        let level = |pck, svn| platform_level(&tcb_info(), &pck, &svn).map(|level| (level.status, level.advisory_ids.join(" ")));
        let up_to_date = (TcbStatus::UpToDate, "A-13 M".to_owned());
        assert_eq!(level(pck(3, 13), tee_tcb_svn(4, 1)), Ok(up_to_date));
        assert_eq!(level(pck(3, 12), tee_tcb_svn(4, 1)), Ok((TcbStatus::OutOfDate, "A-11 M".to_owned())));
        assert_eq!(level(pck(2, 13), tee_tcb_svn(4, 1)), Ok((TcbStatus::OutOfDate, "A-11 M".to_owned())));
        assert_eq!(level(pck(1, 13), tee_tcb_svn(4, 1)), Err(AttestError::NoTcbLevel { part: "tcb info" }));
        assert_eq!(level(pck(3, 10), tee_tcb_svn(4, 1)), Err(AttestError::NoTcbLevel { part: "tcb info" }));
    }

    #[test]
    fn the_module_is_judged_by_its_own_identity() {
        let level = |svn| platform_level(&tcb_info(), &pck(3, 13), &svn).map(|level| level.status);
        let none = Err(AttestError::NoTcbLevel { part: "tdx module identity" });
        assert_eq!(level(tee_tcb_svn(3, 1)), none, "below its lowest level");
        assert_eq!(level(tee_tcb_svn(9, 2)), none, "a version without identity");
        assert_eq!(level(tee_tcb_svn(2, 3)), Ok(TcbStatus::OutOfDate));
        assert_eq!(level(tee_tcb_svn(1, 4)), Ok(TcbStatus::Revoked));
        // Version 0 has no identity: its components are judged with the platform's.
        assert_eq!(level(tee_tcb_svn(3, 0)), Err(AttestError::NoTcbLevel { part: "tcb info" }), "version 0 is below 2");
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
