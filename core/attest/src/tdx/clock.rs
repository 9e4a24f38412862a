//! Dates as Intel's collateral writes them. Owns: the one form that is read. Never: judges them (that is [`crate::window`]).

use crate::AttestError;
pub(crate) use crate::window::{Recorded, Window, ms_of, validity_ms};

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
}
