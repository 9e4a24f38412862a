//! Time of judgement against the validity of every part: the one temporal rule of all platforms. Owns: which moments a date includes,
//! and how long a verdict lasts. Never: reads the clock.
//! Source: RFC 5280 sections 4.1.2.5 and 5.1.2.4 (both ends are inside); the table of `docs/attestation.md`, "Time".
//!
//! A date of ASN.1 or RFC 3339 names a second: the whole second counts, at both ends, and without any skew. A document's age is
//! counted in milliseconds. A verdict is to be renewed at the second that its earliest date names.

use x509_parser::prelude::{ASN1Time, X509Certificate};

use crate::AttestError;

/// What a check came across that depends on the time, as it was asked of the window.
#[derive(Debug, Clone, Copy)]
enum Dated {
    Certificate { part: &'static str, from_ms: u64, last_ms: u64 },
    Collateral { part: &'static str, issued_ms: u64, next_update_ms: u64 },
    Document { part: &'static str, made_at_ms: u64, age_ms_max: u64, ahead_ms_max: u64 },
}

/// The time of judgement and how long what was seen so far stays valid, in milliseconds since 1970.
#[derive(Debug, Clone)]
pub(crate) struct Window {
    now_ms: u64,
    earliest_expiry_ms: u64,
    oldest_issue_ms: u64,
    renewed_issue_ms: u64,
    /// Where dates are noted instead of judged.
    noted: Option<Vec<Dated>>,
}

/// What a check found that holds at any time, beside the dates it came across: made once, judged for time at each use.
#[derive(Debug, Clone)]
pub(crate) struct Recorded<T> {
    found: T,
    dates: Vec<Dated>,
}

impl<T> Recorded<T> {
    /// Makes `check` without a time.
    pub(crate) fn of(check: impl FnOnce(&mut Window) -> Result<T, AttestError>) -> Result<Self, AttestError> {
        let mut window = Window { noted: Some(Vec::new()), ..Window::at(0) };
        let found = check(&mut window)?;
        Ok(Self { found, dates: window.noted.unwrap_or_default() })
    }

    /// What was found, if all of its dates hold at the time of `window`, in the order in which the check came across them.
    pub(crate) fn at(&self, window: &mut Window) -> Result<&T, AttestError> {
        self.dates.iter().try_for_each(|dated| window.judge(*dated))?;
        Ok(&self.found)
    }

    /// What was found, at no particular time.
    pub(crate) const fn found(&self) -> &T {
        &self.found
    }
}

impl Window {
    /// A window at `now_ms` that nothing has narrowed yet.
    pub(crate) const fn at(now_ms: u64) -> Self {
        Self { now_ms, earliest_expiry_ms: u64::MAX, oldest_issue_ms: u64::MAX, renewed_issue_ms: u64::MAX, noted: None }
    }

    /// The first moment at which one of the parts is over.
    pub(crate) const fn earliest_expiry_ms(&self) -> u64 {
        self.earliest_expiry_ms
    }

    /// When the oldest revocation list, TCB info or QE identity was issued.
    pub(crate) const fn oldest_issue_ms(&self) -> u64 {
        self.oldest_issue_ms
    }

    /// As [`Self::oldest_issue_ms`], without the root's revocation list, which is renewed about once a year.
    pub(crate) const fn renewed_issue_ms(&self) -> u64 {
        self.renewed_issue_ms
    }

    /// Judges a certificate's validity.
    pub(crate) fn certificate(&mut self, certificate: &X509Certificate<'_>, part: &'static str) -> Result<(), AttestError> {
        let (from_ms, last_ms) = validity_ms(certificate)?;
        self.judge(Dated::Certificate { part, from_ms, last_ms })
    }

    /// Judges the dates of a revocation list, TCB info or QE identity.
    pub(crate) fn collateral(&mut self, issued_ms: u64, next_update_ms: u64, part: &'static str) -> Result<(), AttestError> {
        self.judge(Dated::Collateral { part, issued_ms, next_update_ms })
    }

    /// Judges the age of a document made at `made_at_ms`, which may be `ahead_ms_max` in our future: another clock wrote it.
    pub(crate) fn document(&mut self, made_at_ms: u64, age_ms_max: u64, ahead_ms_max: u64, part: &'static str) -> Result<(), AttestError> {
        self.judge(Dated::Document { part, made_at_ms, age_ms_max, ahead_ms_max })
    }

    fn judge(&mut self, dated: Dated) -> Result<(), AttestError> {
        if let Some(noted) = &mut self.noted {
            noted.push(dated);
            return Ok(());
        }
        let now_ms = self.now_ms;
        match dated {
            Dated::Certificate { part, from_ms, last_ms } => {
                self.begin(from_ms, part)?;
                if self.ended(last_ms) {
                    return Err(AttestError::CertExpired { part, expired_at_ms: last_ms, now_ms });
                }
            }
            Dated::Collateral { part, issued_ms, next_update_ms } => {
                self.begin(issued_ms, part)?;
                self.oldest_issue_ms = self.oldest_issue_ms.min(issued_ms);
                if part != crate::tdx::ROOT_CRL {
                    self.renewed_issue_ms = self.renewed_issue_ms.min(issued_ms);
                }
                if self.ended(next_update_ms) {
                    return Err(AttestError::CollateralExpired { part, expired_at_ms: next_update_ms, now_ms });
                }
            }
            Dated::Document { part, made_at_ms, age_ms_max, ahead_ms_max } => {
                self.begin(made_at_ms.saturating_sub(ahead_ms_max), part)?;
                let expired_at_ms = made_at_ms.saturating_add(age_ms_max);
                self.earliest_expiry_ms = self.earliest_expiry_ms.min(expired_at_ms);
                if now_ms > expired_at_ms {
                    return Err(AttestError::DocumentExpired { part, expired_at_ms, now_ms });
                }
            }
        }
        Ok(())
    }

    const fn begin(&self, valid_from_ms: u64, part: &'static str) -> Result<(), AttestError> {
        match self.now_ms < valid_from_ms {
            true => Err(AttestError::NotYetValid { part, valid_from_ms, now_ms: self.now_ms }),
            false => Ok(()),
        }
    }

    /// Dates name whole seconds; the second they name is the last one that counts.
    fn ended(&mut self, last_ms: u64) -> bool {
        self.earliest_expiry_ms = self.earliest_expiry_ms.min(last_ms);
        self.now_ms / 1000 > last_ms / 1000
    }
}

/// Milliseconds since 1970 of an ASN.1 time.
pub(crate) fn ms_of(time: ASN1Time) -> Result<u64, AttestError> {
    let seconds = u64::try_from(time.timestamp()).map_err(|_| AttestError::Field { field: "asn.1 time", why: "before 1970" })?;
    seconds.checked_mul(1000).ok_or(AttestError::Field { field: "asn.1 time", why: "too far ahead" })
}

/// The validity of a certificate in milliseconds.
pub(crate) fn validity_ms(certificate: &X509Certificate<'_>) -> Result<(u64, u64), AttestError> {
    let validity = certificate.validity();
    Ok((ms_of(validity.not_before)?, ms_of(validity.not_after)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_second_still_counts() {
        let mut window = Window::at(2_999);
        assert_eq!(window.collateral(0, 2_000, "test"), Ok(()));
        assert_eq!(
            Window::at(3_000).collateral(0, 2_000, "test"),
            Err(AttestError::CollateralExpired { part: "test", expired_at_ms: 2_000, now_ms: 3_000 })
        );
        assert_eq!(window.earliest_expiry_ms(), 2_000);
        assert_eq!(
            Window::at(999).collateral(1_000, 2_000, "test"),
            Err(AttestError::NotYetValid { part: "test", valid_from_ms: 1_000, now_ms: 999 })
        );
    }

    #[test]
    fn a_recorded_check_is_judged_as_a_fresh_one() {
        let check = |window: &mut Window| {
            window.collateral(1_000, 9_000, "first")?;
            window.collateral(3_000, 5_000, "second")?;
            window.document(3_500, 1_000, 100, "third").map(|()| 7)
        };
        let recorded = Recorded::of(check).unwrap();
        for now_ms in [0, 999, 1_000, 2_999, 3_000, 3_399, 3_400, 4_500, 4_501, 5_999, 6_000, 9_999, 10_000] {
            let (mut fresh, mut replayed) = (Window::at(now_ms), Window::at(now_ms));
            assert_eq!(recorded.at(&mut replayed).copied(), check(&mut fresh), "{now_ms}");
            let dates = |window: &Window| (window.earliest_expiry_ms(), window.oldest_issue_ms(), window.renewed_issue_ms());
            assert_eq!(dates(&replayed), dates(&fresh), "{now_ms}");
        }
        let malformed = AttestError::Malformed { part: "test", why: "never dated" };
        assert_eq!(Recorded::of(|_| Err::<(), _>(malformed.clone())).unwrap_err(), malformed);
    }

    #[test]
    fn a_document_lives_to_the_millisecond() {
        let made_at = 10_000_000;
        let at = |now_ms| Window::at(now_ms).document(made_at, 3_600_000, 300_000, "test");
        assert_eq!((at(made_at + 3_600_000), at(made_at - 300_000)), (Ok(()), Ok(())));
        let (expired_at_ms, now_ms) = (made_at + 3_600_000, made_at + 3_600_001);
        assert_eq!(at(now_ms), Err(AttestError::DocumentExpired { part: "test", expired_at_ms, now_ms }));
        let (valid_from_ms, now_ms) = (made_at - 300_000, made_at - 300_001);
        assert_eq!(at(now_ms), Err(AttestError::NotYetValid { part: "test", valid_from_ms, now_ms }));
        assert!(Window::at(0).document(u64::MAX, 3_600_000, 300_000, "test").is_err());
    }
}
