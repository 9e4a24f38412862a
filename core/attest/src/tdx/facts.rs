//! How old collateral is, part by part. Owns: reading those numbers, and which of two is the older.
//! Never: verifies (`check_collateral` does; what is read here counts only for collateral that was verified).
//! Source: Intel PCS API v4: `tcbEvaluationDataNumber` never decreases, texts and revocation lists carry their issue date.

use std::collections::BTreeSet;

use dcap_qvl::{QeIdentity, TcbInfo};
use dstack_protocol::UnixMillis;
use x509_parser::prelude::{CertificateRevocationList, FromDer};

use super::clock::{ms_of, ms_of_rfc3339};
use crate::{AttestError, TdxCollateral};

/// Evaluation numbers and dates of one platform's collateral.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CollateralFacts {
    /// `tcbEvaluationDataNumber` of the TCB info.
    pub tcb_evaluation: u32,
    /// `tcbEvaluationDataNumber` of the QE identity.
    pub qe_evaluation: u32,
    /// Issue date of the TCB info.
    pub tcb_issued: UnixMillis,
    /// Issue date of the QE identity.
    pub qe_issued: UnixMillis,
    /// Issue date of the PCK CA's revocation list.
    pub pck_crl_issued: UnixMillis,
    /// Issue date of the root's revocation list; renewed about once a year.
    pub root_crl_issued: UnixMillis,
    /// The first next update among the four.
    pub next_update: UnixMillis,
}

impl CollateralFacts {
    /// Issue date of the oldest part that its vendor renews within weeks: all but the root's revocation list.
    #[must_use]
    pub fn issued(&self) -> UnixMillis {
        self.tcb_issued.min(self.qe_issued).min(self.pck_crl_issued)
    }

    /// The first part in which `self` is older than `than`: an evaluation number that falls, or an earlier issue date.
    #[must_use]
    pub fn older_part(&self, than: &Self) -> Option<&'static str> {
        let numbers = |of: &Self| [of.tcb_evaluation, of.qe_evaluation];
        let dates = |of: &Self| [of.tcb_issued, of.qe_issued, of.pck_crl_issued, of.root_crl_issued];
        let older_number = numbers(self).into_iter().zip(numbers(than)).position(|(own, other)| own < other);
        let older_date = || dates(self).into_iter().zip(dates(than)).position(|(own, other)| own < other);
        let numbered = ["tcb evaluation data number of the tcb info", "tcb evaluation data number of the qe identity"];
        let dated = ["tcb info", "qe identity", "pck crl", "root crl"];
        match older_number {
            Some(index) => numbered.get(index).copied(),
            None => older_date().and_then(|index| dated.get(index).copied()),
        }
    }
}

/// Reads numbers and dates; see the module text.
/// # Errors
/// Parse classes.
pub fn collateral_facts(collateral: &TdxCollateral) -> Result<CollateralFacts, AttestError> {
    let malformed = |part| move |_| AttestError::Malformed { part, why: "not an object of its kind" };
    let tcb: TcbInfo = serde_json::from_str(&collateral.tcb_info).map_err(malformed("tcb info"))?;
    let qe: QeIdentity = serde_json::from_str(&collateral.qe_identity).map_err(malformed("qe identity"))?;
    let (pck_crl_issued, pck_crl_next) = list_dates(&collateral.pck_crl, super::PCK_CRL)?;
    let (root_crl_issued, root_crl_next) = list_dates(&collateral.root_ca_crl, super::ROOT_CRL)?;
    let date = |text: &str| ms_of_rfc3339(text, "collateral date").map(UnixMillis);
    Ok(CollateralFacts {
        tcb_evaluation: tcb.tcb_evaluation_data_number,
        qe_evaluation: qe.tcb_evaluation_data_number,
        tcb_issued: date(&tcb.issue_date)?,
        qe_issued: date(&qe.issue_date)?,
        pck_crl_issued,
        root_crl_issued,
        next_update: date(&tcb.next_update)?.min(date(&qe.next_update)?).min(pck_crl_next).min(root_crl_next),
    })
}

/// Every `tcbDate` that stands in a platform's TCB info and QE identity: of levels of the platform, the TDX modules and the quoting
/// enclave.
/// # Errors
/// Parse classes.
pub fn tcb_dates(collateral: &TdxCollateral) -> Result<BTreeSet<UnixMillis>, AttestError> {
    let malformed = |part| move |_| AttestError::Malformed { part, why: "not an object of its kind" };
    let tcb: TcbInfo = serde_json::from_str(&collateral.tcb_info).map_err(malformed("tcb info"))?;
    let qe: QeIdentity = serde_json::from_str(&collateral.qe_identity).map_err(malformed("qe identity"))?;
    let modules = tcb.tdx_module_identities.iter().flat_map(|module| module.tcb_levels.iter().map(|level| level.tcb_date.as_str()));
    let levels = tcb.tcb_levels.iter().map(|level| level.tcb_date.as_str());
    let enclave = qe.tcb_levels.iter().map(|level| level.tcb_date.as_str());
    levels.chain(modules).chain(enclave).map(|text| ms_of_rfc3339(text, "tcb date").map(UnixMillis)).collect()
}

/// Issue and next update of a DER revocation list, unverified.
fn list_dates(der: &[u8], part: &'static str) -> Result<(UnixMillis, UnixMillis), AttestError> {
    let (_, list) =
        CertificateRevocationList::from_der(der).map_err(|_| AttestError::Malformed { part, why: "not a DER revocation list" })?;
    let next = list.next_update().ok_or(AttestError::Malformed { part, why: "no next update" })?;
    Ok((UnixMillis(ms_of(list.last_update())?), UnixMillis(ms_of(next)?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn older_means_a_lower_number_or_an_earlier_date() {
        let at = UnixMillis;
        let one = CollateralFacts {
            tcb_evaluation: 17,
            qe_evaluation: 17,
            tcb_issued: at(50),
            qe_issued: at(40),
            pck_crl_issued: at(60),
            root_crl_issued: at(10),
            next_update: at(100),
        };
        assert_eq!((one.older_part(&one), one.issued()), (None, at(40)));
        let newer = CollateralFacts { tcb_evaluation: 18, tcb_issued: at(51), ..one };
        assert_eq!(newer.older_part(&one), None);
        assert_eq!(one.older_part(&newer), Some("tcb evaluation data number of the tcb info"));
        // A newer date does not make up for a lower number.
        let lower = CollateralFacts { qe_evaluation: 16, qe_issued: at(90), ..one };
        assert_eq!(lower.older_part(&one), Some("tcb evaluation data number of the qe identity"));
        for (older, part) in [
            (CollateralFacts { tcb_issued: at(49), ..one }, "tcb info"),
            (CollateralFacts { qe_issued: at(39), ..one }, "qe identity"),
            (CollateralFacts { pck_crl_issued: at(59), ..one }, "pck crl"),
            (CollateralFacts { root_crl_issued: at(9), ..one }, "root crl"),
        ] {
            assert_eq!(older.older_part(&one), Some(part));
        }
    }
}
