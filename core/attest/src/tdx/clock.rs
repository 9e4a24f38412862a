//! Time of judgement against the validity of every part. Owns: the window in which a verdict holds. Never: reads the clock.

use x509_parser::prelude::{ASN1Time, X509Certificate};

use super::chain::validity_ms;
use crate::AttestError;

/// The time of judgement and how long what was seen so far stays valid, in milliseconds since 1970.
#[derive(Debug, Clone)]
pub(crate) struct Window {
    now_ms: u64,
    earliest_expiry_ms: u64,
    oldest_issue_ms: u64,
    renewed_issue_ms: u64,
}

impl Window {
    /// A window at `now_ms` that nothing has narrowed yet.
    pub(crate) const fn at(now_ms: u64) -> Self {
        Self { now_ms, earliest_expiry_ms: u64::MAX, oldest_issue_ms: u64::MAX, renewed_issue_ms: u64::MAX }
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
        let (valid_from_ms, expired_at_ms) = validity_ms(certificate)?;
        self.begin(valid_from_ms, part)?;
        if self.ended(expired_at_ms) {
            return Err(AttestError::CertExpired { part, expired_at_ms, now_ms: self.now_ms });
        }
        Ok(())
    }

    /// Judges the dates of a revocation list, TCB info or QE identity.
    pub(crate) fn collateral(&mut self, issued_ms: u64, next_update_ms: u64, part: &'static str) -> Result<(), AttestError> {
        self.begin(issued_ms, part)?;
        self.oldest_issue_ms = self.oldest_issue_ms.min(issued_ms);
        if part != super::ROOT_CRL {
            self.renewed_issue_ms = self.renewed_issue_ms.min(issued_ms);
        }
        if self.ended(next_update_ms) {
            return Err(AttestError::CollateralExpired { part, expired_at_ms: next_update_ms, now_ms: self.now_ms });
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

/// Milliseconds since 1970 of the only RFC 3339 form Intel and the vectors use, `YYYY-MM-DDThh:mm:ssZ`.
pub(crate) fn ms_of_rfc3339(text: &str, field: &'static str) -> Result<u64, AttestError> {
    let malformed = AttestError::Field { field, why: "not a date of the form 2025-01-31T00:00:00Z" };
    let bytes: &[u8; 20] = text.as_bytes().try_into().map_err(|_| malformed.clone())?;
    let number =
        |digits: &[u8]| digits.iter().try_fold(0u64, |sum, digit| digit.is_ascii_digit().then(|| sum * 10 + u64::from(digit - b'0')));
    let [y0, y1, y2, y3, b'-', m0, m1, b'-', d0, d1, b'T', h0, h1, b':', n0, n1, b':', s0, s1, b'Z'] = *bytes else {
        return Err(malformed);
    };
    let fields = (number(&[y0, y1, y2, y3]), number(&[m0, m1]), number(&[d0, d1]), number(&[h0, h1]), number(&[n0, n1]), number(&[s0, s1]));
    let (Some(year), Some(month), Some(day), Some(hour), Some(minute), Some(second)) = fields else {
        return Err(malformed);
    };
    let in_range = (1970..=9999).contains(&year) && hour < 24 && minute < 60 && second < 60;
    if !in_range || day == 0 || day > days_in_month(year, month) {
        return Err(malformed);
    }
    Ok((((days_since_1970(year, month, day) * 24 + hour) * 60 + minute) * 60 + second) * 1000)
}

const fn days_in_month(year: u64, month: u64) -> u64 {
    let leap = year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    match month {
        1 | 3 | 5 | 7 | 8 | 10 | 12 => 31,
        4 | 6 | 9 | 11 => 30,
        2 if leap => 29,
        2 => 28,
        _ => 0,
    }
}

/// Days from 1970-01-01, for years 1970 to 9999; counts from March so that the leap day ends its year.
const fn days_since_1970(year: u64, month: u64, day: u64) -> u64 {
    let (year, month) = if month <= 2 { (year - 1, month + 9) } else { (year, month - 3) };
    let days = year * 365 + year / 4 - year / 100 + year / 400 + (month * 306 + 5) / 10 + day - 1;
    days - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_become_milliseconds() {
        for (text, expected) in [
            ("1970-01-01T00:00:00Z", 0),
            ("2000-02-29T12:00:00Z", 951_825_600_000),
            ("2025-07-01T00:00:00Z", 1_751_328_000_000),
            ("2026-10-15T23:59:59Z", 1_792_108_799_000),
        ] {
            assert_eq!(ms_of_rfc3339(text, "test"), Ok(expected), "{text}");
        }
    }

    #[test]
    fn refuses_dates_that_do_not_exist() {
        for text in [
            "2025-02-29T00:00:00Z",
            "2025-13-01T00:00:00Z",
            "2025-01-01T24:00:00Z",
            "2025-01-01 00:00:00Z",
            "2025-01-0aT00:00:00Z",
            "",
            "1969-12-31T23:59:59Z",
        ] {
            assert!(ms_of_rfc3339(text, "test").is_err(), "{text}");
        }
    }

    #[test]
    fn the_last_second_still_counts() {
        let mut window = Window::at(2_000);
        assert_eq!(window.collateral(0, 2_000, "test"), Ok(()));
        assert_eq!(
            Window::at(3_000).collateral(0, 2_000, "test"),
            Err(AttestError::CollateralExpired { part: "test", expired_at_ms: 2_000, now_ms: 3_000 })
        );
        assert_eq!(window.earliest_expiry_ms(), 2_000);
    }
}
