//! Whether a platform's TCB is good enough. Owns: the rule: allowed, out of date within its grace, refused. Never: derives a status
//! (that is `tdx::tcb`), reads the clock.
//! Source: Intel PCS API v4, `tcbStatus`, `tcbDate`, `tcbEvaluationDataNumber`; the vectors' README: `UpToDate` only unless told
//! otherwise; `docs/adr/0011-collateral-checked-once.md` for where a grace begins.

use std::collections::BTreeMap;

use dstack_protocol::{TcbStatus, UnixMillis};
use sha2::{Digest as _, Sha256};

use crate::AttestError;

/// How long after a `tcbDate` a cluster's first knowledge of it may lie and still move the beginning of a grace. Intel's standard update
/// lags behind its recoveries by up to a year; what a cluster learns later than this was withheld from it.
pub const TCB_LAG_MS_MAX: u64 = 400 * 86_400_000;

/// PCR0 of Google's OVMF version 2 (dstack attestation reference, section 6).
const GOOGLE_FIRMWARE_V2: [u8; 32] = [
    0x0c, 0xca, 0x9e, 0xc1, 0x61, 0xb0, 0x92, 0x88, 0x80, 0x2e, 0x5a, 0x11, 0x22, 0x55, 0xd2, 0x13, 0x40, 0xed, 0x5b, 0x79, 0x7f, 0x5f,
    0xe2, 0x9c, 0xec, 0xcc, 0xfd, 0x8f, 0x67, 0xb9, 0xf8, 0x02,
];

/// What evidence and collateral say of a platform's TCB, as far as a policy asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TcbFacts {
    /// The status.
    pub status: TcbStatus,
    /// The advisories behind it.
    pub advisory_ids: Vec<String>,
    /// `tcbDate` of the level that was reached: no advisory published until then applies. The earliest, where several parts count.
    pub date: Option<UnixMillis>,
    /// Where the status is out of date: `tcbDate` of the next better level, the day from which the one reached was not enough.
    pub outdated_since: Option<UnixMillis>,
    /// Number of the TCB recovery that the collateral stands for.
    pub evaluation: Option<u32>,
    /// Whether a key that a vendor gave to a cloud signed (SEV-SNP's VLEK): no chip is named.
    pub vlek: bool,
}

impl TcbFacts {
    /// Of a platform that has no such notion.
    #[must_use]
    pub const fn none() -> Self {
        Self { status: TcbStatus::None, advisory_ids: Vec::new(), date: None, outdated_since: None, evaluation: None, vlek: false }
    }

    /// As a cluster judges that pinned a `tcbDate` at the log time that `known` names for it: what is out of date counts as such from
    /// the later of both, at most [`TCB_LAG_MS_MAX`] after the `tcbDate`. A date that is not among `known` counts from itself.
    #[must_use]
    pub fn known_since(&self, known: &BTreeMap<UnixMillis, UnixMillis>) -> Self {
        let later = |date: UnixMillis| {
            let pinned = known.get(&date).copied().unwrap_or(date);
            date.max(pinned.min(date.plus_ms(TCB_LAG_MS_MAX)))
        };
        Self { outdated_since: self.outdated_since.map(later), ..self.clone() }
    }
}

/// How a TCB that is accepted stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TcbStanding {
    /// Up to date, or a platform without the notion.
    Current,
    /// Not up to date, and allowed by name: nothing ends it but another policy.
    Warn,
    /// Out of date, and accepted until its grace ends.
    Grace {
        /// The last moment of the grace.
        until: UnixMillis,
    },
}

impl TcbStanding {
    /// Stable name, for status, metrics and logs.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Current => "current",
            Self::Warn => "warn",
            Self::Grace { .. } => "grace",
        }
    }

    /// The end of the grace, where there is one.
    #[must_use]
    pub const fn grace_until(self) -> Option<UnixMillis> {
        match self {
            Self::Grace { until } => Some(until),
            Self::Current | Self::Warn => None,
        }
    }
}

/// The rule of a verifier. [`TcbStatus::Revoked`] is never accepted; [`TcbStatus::None`] (Nitro) always is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TcbPolicy {
    allowed: Vec<TcbStatus>,
    grace_ms: u64,
    refused_advisories: Vec<String>,
    min_evaluation: u32,
    accept_vlek: bool,
    accept_missing_crl: bool,
    google_firmware: Vec<[u8; 32]>,
}

impl Default for TcbPolicy {
    /// `UpToDate` only.
    fn default() -> Self {
        Self::allowing(&[TcbStatus::UpToDate])
    }
}

impl TcbPolicy {
    /// Accepts exactly `allowed`, without `Revoked` even if it is named.
    #[must_use]
    pub fn allowing(allowed: &[TcbStatus]) -> Self {
        let allowed = allowed.iter().copied().filter(|status| *status != TcbStatus::Revoked).collect();
        Self {
            allowed,
            grace_ms: 0,
            refused_advisories: Vec::new(),
            min_evaluation: 0,
            accept_vlek: false,
            accept_missing_crl: false,
            google_firmware: vec![GOOGLE_FIRMWARE_V2],
        }
    }

    /// Also accepts what is out of date, and would be allowed were it not, for this long after it became so.
    #[must_use]
    pub const fn with_grace_ms(mut self, grace_ms: u64) -> Self {
        self.grace_ms = grace_ms;
        self
    }

    /// Refuses any platform to which one of these advisories applies, whatever its status.
    #[must_use]
    pub fn refusing_advisories(mut self, ids: &[String]) -> Self {
        self.refused_advisories = ids.to_vec();
        self
    }

    /// Refuses collateral of an earlier TCB recovery than this.
    #[must_use]
    pub const fn with_min_evaluation(mut self, number: u32) -> Self {
        self.min_evaluation = number;
        self
    }

    /// Also accepts SEV-SNP reports signed by a VLEK: a key that AMD gave to a cloud, so that the report names no chip.
    #[must_use]
    pub fn accepting_vlek(mut self) -> Self {
        self.accept_vlek = true;
        self
    }

    /// Also accepts a chain of AMD or Google whose issuers have no revocation list in the bundle. A list that is there is obeyed anyway.
    #[must_use]
    pub fn accepting_missing_crl(mut self) -> Self {
        self.accept_missing_crl = true;
        self
    }

    /// Accepts exactly these values of PCR0 as firmware of Google Cloud's TDs.
    #[must_use]
    pub fn with_google_firmware(mut self, firmware: &[[u8; 32]]) -> Self {
        self.google_firmware = firmware.to_vec();
        self
    }

    /// Values of PCR0 that are accepted as firmware of Google Cloud's TDs: by default the one in use, OVMF version 2.
    #[must_use]
    pub fn google_firmware(&self) -> &[[u8; 32]] {
        &self.google_firmware
    }

    /// Names the rule: equal for policies that judge alike.
    #[must_use]
    pub fn digest(&self) -> [u8; 32] {
        let mut allowed: Vec<&str> = self.allowed.iter().map(|status| status.name()).collect();
        allowed.sort_unstable();
        let mut refused: Vec<String> = self.refused_advisories.iter().map(|id| id.to_ascii_uppercase()).collect();
        refused.sort_unstable();
        let mut firmware = self.google_firmware.clone();
        firmware.sort_unstable();
        let mut hash = Sha256::new();
        hash.update(b"DKMS-V1-TCBPOLICY");
        hash.update(self.grace_ms.to_be_bytes());
        hash.update(self.min_evaluation.to_be_bytes());
        hash.update([u8::from(self.accept_vlek), u8::from(self.accept_missing_crl)]);
        // Neither holds a line feed or a zero: names and ids are printable.
        hash.update(allowed.join("\n"));
        hash.update([0]);
        hash.update(refused.join("\n"));
        hash.update([0]);
        firmware.iter().for_each(|value| hash.update(value));
        hash.finalize().into()
    }

    /// Whether VLEK-signed reports are accepted; not unless asked for.
    #[must_use]
    pub const fn accepts_vlek(&self) -> bool {
        self.accept_vlek
    }

    /// Whether a chain of AMD or Google is accepted without a revocation list of its issuers; not unless asked for.
    #[must_use]
    pub const fn accepts_missing_crl(&self) -> bool {
        self.accept_missing_crl
    }

    /// The accepted statuses.
    #[must_use]
    pub fn allowed(&self) -> &[TcbStatus] {
        &self.allowed
    }

    /// Judges `facts` at `now`.
    /// # Errors
    /// [`AttestError::GuestPolicy`] for a VLEK, [`AttestError::TcbEvaluation`], [`AttestError::TcbAdvisory`],
    /// [`AttestError::TcbGraceOver`], [`AttestError::TcbStatus`].
    pub fn judge(&self, facts: &TcbFacts, now: UnixMillis) -> Result<TcbStanding, AttestError> {
        if facts.vlek && !self.accept_vlek {
            return Err(AttestError::GuestPolicy { why: "signed by a VLEK, which the policy does not take" });
        }
        if let Some(got) = facts.evaluation.filter(|number| *number < self.min_evaluation) {
            return Err(AttestError::TcbEvaluation { got, least: self.min_evaluation });
        }
        let refused = |id: &&String| self.refused_advisories.iter().any(|refused| refused.eq_ignore_ascii_case(id));
        if let Some(id) = facts.advisory_ids.iter().find(refused) {
            return Err(AttestError::TcbAdvisory { id: id.clone(), status: facts.status.name().to_owned() });
        }
        let status = facts.status;
        if matches!(status, TcbStatus::None | TcbStatus::UpToDate) {
            return self.check(status).map(|()| TcbStanding::Current);
        }
        if self.allowed.contains(&status) {
            return Ok(TcbStanding::Warn);
        }
        match facts.outdated_since.filter(|_| self.grace_ms > 0 && self.would_allow(status)) {
            Some(since) => self.grace(facts, since, now),
            None => self.check(status).map(|()| TcbStanding::Warn),
        }
    }

    /// A grace excuses being out of date and nothing else: the status without that has to be allowed.
    fn would_allow(&self, status: TcbStatus) -> bool {
        use TcbStatus as S;
        let updated: &[S] = match status {
            S::OutOfDate => &[S::UpToDate, S::SwHardeningNeeded],
            S::OutOfDateConfigurationNeeded => &[S::ConfigurationNeeded, S::ConfigurationAndSwHardeningNeeded],
            _ => &[],
        };
        updated.iter().any(|status| self.allowed.contains(status))
    }

    fn grace(&self, facts: &TcbFacts, since: UnixMillis, now: UnixMillis) -> Result<TcbStanding, AttestError> {
        let until = UnixMillis(since.0.saturating_add(self.grace_ms));
        if now <= until {
            return Ok(TcbStanding::Grace { until });
        }
        Err(AttestError::TcbGraceOver {
            status: facts.status.name().to_owned(),
            tcb_date_ms: facts.date.unwrap_or_default().0,
            outdated_since_ms: since.0,
            grace_ms: self.grace_ms,
            ended_at_ms: until.0,
            advisories: facts.advisory_ids.join(", "),
        })
    }

    /// Refuses a status that is not accepted by name.
    /// # Errors
    /// [`AttestError::TcbStatus`].
    pub fn check(&self, status: TcbStatus) -> Result<(), AttestError> {
        if status == TcbStatus::None || self.allowed.contains(&status) {
            return Ok(());
        }
        Err(AttestError::TcbStatus { status: status.name().to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DAY_MS: u64 = 86_400_000;
    const SINCE: UnixMillis = UnixMillis(1_700_000_000_000);

    fn facts(status: TcbStatus) -> TcbFacts {
        let outdated = matches!(status, TcbStatus::OutOfDate | TcbStatus::OutOfDateConfigurationNeeded);
        TcbFacts {
            status,
            advisory_ids: vec!["INTEL-SA-00828".to_owned()],
            date: Some(UnixMillis(SINCE.0 - 200 * DAY_MS)),
            outdated_since: outdated.then_some(SINCE),
            evaluation: Some(17),
            vlek: false,
        }
    }

    fn after(days: u64) -> UnixMillis {
        UnixMillis(SINCE.0 + days * DAY_MS)
    }

    #[test]
    fn revoked_is_refused_even_when_named() {
        let policy = TcbPolicy::allowing(&[TcbStatus::Revoked, TcbStatus::OutOfDate]).with_grace_ms(u64::MAX);
        assert_eq!(policy.check(TcbStatus::Revoked), Err(AttestError::TcbStatus { status: "Revoked".to_owned() }));
        assert_eq!(policy.judge(&facts(TcbStatus::Revoked), SINCE), Err(AttestError::TcbStatus { status: "Revoked".to_owned() }));
        assert_eq!(policy.check(TcbStatus::OutOfDate), Ok(()));
        assert_eq!(policy.check(TcbStatus::UpToDate), Err(AttestError::TcbStatus { status: "UpToDate".to_owned() }));
    }

    #[test]
    fn the_default_takes_up_to_date_only() {
        for status in TcbStatus::ALL {
            let good = matches!(status, TcbStatus::UpToDate | TcbStatus::None);
            assert_eq!(TcbPolicy::default().check(status).is_ok(), good, "{status:?}");
            assert_eq!(TcbPolicy::default().judge(&facts(status), SINCE).is_ok(), good, "{status:?}");
        }
    }

    #[test]
    fn out_of_date_is_accepted_to_the_last_moment_of_its_grace() {
        let policy = TcbPolicy::default().with_grace_ms(30 * DAY_MS);
        let outdated = facts(TcbStatus::OutOfDate);
        let grace = Ok(TcbStanding::Grace { until: after(30) });
        assert_eq!(policy.judge(&facts(TcbStatus::UpToDate), after(0)), Ok(TcbStanding::Current));
        assert_eq!(policy.judge(&outdated, after(0)), grace);
        assert_eq!(policy.judge(&outdated, after(30)), grace);
        let over = policy.judge(&outdated, UnixMillis(after(30).0 + 1)).unwrap_err();
        assert_eq!(over.class(), crate::Class::PolicyTcbStatus);
        for part in ["OutOfDate", "1682720000000", "1700000000000", "2592000000", "1702592000000", "INTEL-SA-00828"] {
            assert!(over.to_string().contains(part), "{part} in {over}");
        }
    }

    #[test]
    fn a_grace_begins_when_the_cluster_could_know() {
        let policy = TcbPolicy::default().with_grace_ms(30 * DAY_MS);
        let outdated = facts(TcbStatus::OutOfDate);
        let pinned = |days: u64| outdated.known_since(&BTreeMap::from([(SINCE, after(days)), (after(7), after(300))]));
        assert!(policy.judge(&outdated, after(200)).is_err());
        assert_eq!(policy.judge(&pinned(190), after(200)), Ok(TcbStanding::Grace { until: after(220) }));
        assert!(policy.judge(&pinned(190), UnixMillis(after(220).0 + 1)).is_err());
        assert_eq!(pinned(900).outdated_since, Some(after(400)), "never later than the longest lag");
        assert_eq!(outdated.known_since(&BTreeMap::from([(SINCE, UnixMillis(0))])), outdated, "known at genesis: from its own day");
        assert_eq!(outdated.known_since(&BTreeMap::new()), outdated);
        assert_eq!(facts(TcbStatus::UpToDate).known_since(&BTreeMap::from([(SINCE, after(3))])).outdated_since, None);
    }

    #[test]
    fn a_digest_names_what_a_policy_does() {
        let one =
            || TcbPolicy::allowing(&[TcbStatus::UpToDate, TcbStatus::OutOfDate]).refusing_advisories(&["A".to_owned(), "b".to_owned()]);
        let same = TcbPolicy::allowing(&[TcbStatus::OutOfDate, TcbStatus::UpToDate]).refusing_advisories(&["B".to_owned(), "a".to_owned()]);
        assert_eq!(one().digest(), same.digest());
        let others = [
            TcbPolicy::default(),
            one().with_grace_ms(1),
            one().with_min_evaluation(1),
            one().accepting_vlek(),
            one().accepting_missing_crl(),
            one().refusing_advisories(&[]),
            one().with_google_firmware(&[]),
        ];
        assert!(others.iter().all(|other| other.digest() != one().digest()));
    }

    #[test]
    fn a_policy_takes_a_vlek_only_by_name() {
        let vlek = TcbFacts { vlek: true, ..facts(TcbStatus::UpToDate) };
        assert!(matches!(TcbPolicy::default().judge(&vlek, SINCE), Err(AttestError::GuestPolicy { .. })));
        assert_eq!(TcbPolicy::default().accepting_vlek().judge(&vlek, SINCE), Ok(TcbStanding::Current));
    }

    #[test]
    fn a_grace_excuses_being_out_of_date_only() {
        let strict = TcbPolicy::default().with_grace_ms(30 * DAY_MS);
        let configured = facts(TcbStatus::OutOfDateConfigurationNeeded);
        assert!(matches!(strict.judge(&configured, after(1)), Err(AttestError::TcbStatus { .. })));
        assert!(matches!(strict.judge(&facts(TcbStatus::ConfigurationNeeded), after(1)), Err(AttestError::TcbStatus { .. })));
        let lax = TcbPolicy::allowing(&[TcbStatus::UpToDate, TcbStatus::ConfigurationNeeded]).with_grace_ms(30 * DAY_MS);
        assert_eq!(lax.judge(&configured, after(1)), Ok(TcbStanding::Grace { until: after(30) }));
        assert_eq!(lax.judge(&facts(TcbStatus::ConfigurationNeeded), after(900)), Ok(TcbStanding::Warn));
    }

    #[test]
    fn each_rule_refuses_on_its_own() {
        let outdated = facts(TcbStatus::OutOfDate);
        let allowing = || TcbPolicy::allowing(&[TcbStatus::UpToDate, TcbStatus::OutOfDate]);
        assert_eq!(allowing().judge(&outdated, after(900)), Ok(TcbStanding::Warn));
        let advisory = allowing().refusing_advisories(&["intel-sa-00828".to_owned()]).judge(&outdated, after(0));
        assert_eq!(advisory, Err(AttestError::TcbAdvisory { id: "INTEL-SA-00828".to_owned(), status: "OutOfDate".to_owned() }));
        assert_eq!(allowing().with_min_evaluation(17).judge(&outdated, after(0)), Ok(TcbStanding::Warn));
        let low = allowing().with_min_evaluation(18).judge(&outdated, after(0));
        assert_eq!(low, Err(AttestError::TcbEvaluation { got: 17, least: 18 }));
        let strict = TcbPolicy::default().refusing_advisories(&["INTEL-SA-00828".to_owned()]).with_min_evaluation(99);
        assert_eq!(strict.judge(&TcbFacts::none(), after(0)), Ok(TcbStanding::Current));
    }

    proptest! {
        /// Whatever the status, the grace and the moment: time only ever takes away, a longer grace only ever gives.
        #[test]
        fn time_takes_and_grace_gives(
            status in 0usize..8, allowed in proptest::collection::vec(0usize..8, 0..4), days in 0u64..100, later in 0u64..100,
            grace in 0u64..100, longer in 0u64..100,
        ) {
            let status = TcbStatus::ALL[status];
            let allowed: Vec<TcbStatus> = allowed.iter().map(|index| TcbStatus::ALL[*index]).collect();
            let policy = |days: u64| TcbPolicy::allowing(&allowed).with_grace_ms(days * DAY_MS);
            let judged = |grace: u64, days: u64| policy(grace).judge(&facts(status), after(days));
            let now = judged(grace, days);
            if now.is_err() {
                prop_assert!(judged(grace, days + later).is_err());
            } else {
                prop_assert!(judged(grace + longer, days).is_ok());
            }
            prop_assert!(status != TcbStatus::Revoked || now.is_err());
            if let Ok(TcbStanding::Grace { until }) = now {
                prop_assert!(after(days) <= until && policy(grace).judge(&facts(status), UnixMillis(until.0 + 1)).is_err());
                prop_assert!(!allowed.contains(&status));
            }
        }
    }
}
