//! A span of time and its two spellings: X.509 time and RFC 3339. Never: reads the clock.

use std::time::Duration;

/// From when until when a certificate, CRL or collateral document holds. Seconds since 1970, both ends included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Validity {
    /// First second.
    pub from_s: u64,
    /// Last second.
    pub until_s: u64,
}

impl Validity {
    /// What `dstack-testkit init` gives: from a day before `now_s` until 365 days after it.
    pub fn around(now_s: u64) -> Self {
        Self { from_s: now_s.saturating_sub(DAY_S), until_s: now_s.saturating_add(365 * DAY_S) }
    }

    /// `before_s` seconds before `now_s` until `after_s` seconds after it.
    pub fn window(now_s: u64, before_s: u64, after_s: u64) -> Self {
        Self { from_s: now_s.saturating_sub(before_s), until_s: now_s.saturating_add(after_s) }
    }

    /// Sets the two dates of a certificate.
    pub(crate) fn apply(self, params: &mut rcgen::CertificateParams) {
        let epoch = rcgen::date_time_ymd(1970, 1, 1);
        params.not_before = epoch + Duration::from_secs(self.from_s.min(LAST_S));
        params.not_after = epoch + Duration::from_secs(self.until_s.min(LAST_S));
    }
}

/// `2026-06-08T11:32:35Z`: how collateral documents write a time (seconds since 1970; years beyond 9999 are cut).
pub fn rfc3339(seconds: u64) -> String {
    let seconds = seconds.min(LAST_S);
    let (days, of_day) = (seconds / DAY_S, seconds % DAY_S);
    // Days to civil date over eras of 400 years, the year beginning in March (proleptic Gregorian calendar).
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", of_day / 3600, of_day / 60 % 60, of_day % 60)
}

const DAY_S: u64 = 86_400;
/// 9999-12-31T23:59:59Z, the last instant X.509 can write.
const LAST_S: u64 = 253_402_300_799;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_known_instants() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (951_868_800, "2000-03-01T00:00:00Z"),
            (1_780_918_355, "2026-06-08T11:32:35Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
            (u64::MAX, "9999-12-31T23:59:59Z"),
        ] {
            assert_eq!(rfc3339(seconds), text);
        }
    }
}
