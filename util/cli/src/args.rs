//! Text forms of arguments: hex, times, durations, platforms. Owns: parsing; each error says the form that is wanted.

use std::time::Duration;

use dstack_protocol::{AppId, Platform, TcbStatus, UnixMillis};

/// 32 bytes in hex, with or without `0x`.
pub(crate) fn hash(text: &str) -> Result<[u8; 32], String> {
    array(text)
}

/// 16 bytes in hex.
pub(crate) fn action_id(text: &str) -> Result<[u8; 16], String> {
    array(text)
}

/// An app id: 20 bytes in hex.
pub(crate) fn app_id(text: &str) -> Result<AppId, String> {
    array(text).map(AppId)
}

fn array<const N: usize>(text: &str) -> Result<[u8; N], String> {
    let mut out = [0; N];
    let digits = text.strip_prefix("0x").unwrap_or(text);
    hex::decode_to_slice(digits, &mut out)
        .map_err(|_| format!("want {N} bytes as {} hex digits, got {} characters", N * 2, digits.len()))?;
    Ok(out)
}

/// Bytes in hex, any length but none.
pub(crate) fn hex_bytes(text: &str) -> Result<Vec<u8>, String> {
    match hex::decode(text.strip_prefix("0x").unwrap_or(text)) {
        Ok(bytes) if !bytes.is_empty() => Ok(bytes),
        Ok(_) => Err("want at least one byte in hex".to_owned()),
        Err(error) => Err(format!("want hex digits: {error}")),
    }
}

/// A platform by name.
pub(crate) fn platform(text: &str) -> Result<Platform, String> {
    Platform::from_name(text).ok_or_else(|| format!("want one of {}", Platform::ALL.map(Platform::name).join(", ")))
}

/// A TCB status that a policy may allow, by Intel's name.
pub(crate) fn tcb_status(text: &str) -> Result<TcbStatus, String> {
    let allowable = |status: &TcbStatus| !matches!(status, TcbStatus::None | TcbStatus::Revoked);
    let names = || TcbStatus::ALL.iter().filter(|s| allowable(s)).map(|s| s.name()).collect::<Vec<_>>().join(", ");
    TcbStatus::from_name(text).filter(allowable).ok_or_else(|| format!("want one of {}", names()))
}

/// `90s`, `30m`, `12h`, `7d`.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let wanted = || format!("want a number and s, m, h or d, as in 12h; got {text}");
    let unit = text.chars().last().ok_or_else(wanted)?;
    let seconds: u64 = match unit {
        's' => 1,
        'm' => 60,
        'h' => 3600,
        'd' => 86_400,
        _ => return Err(wanted()),
    };
    let number: u64 = text.strip_suffix(unit).and_then(|digits| digits.parse().ok()).ok_or_else(wanted)?;
    number.checked_mul(seconds).filter(|s| *s > 0).map(Duration::from_secs).ok_or_else(wanted)
}

/// `2026-01-31T12:00:00Z` or seconds since 1970.
pub(crate) fn time(text: &str) -> Result<UnixMillis, String> {
    if let Ok(seconds) = text.parse::<u64>() {
        return seconds.checked_mul(1000).map(UnixMillis).ok_or_else(|| "time is too far ahead".to_owned());
    }
    rfc3339(text).ok_or_else(|| format!("want a time as 2026-01-31T12:00:00Z or seconds since 1970, got {text}"))
}

fn rfc3339(text: &str) -> Option<UnixMillis> {
    let (date, clock) = text.strip_suffix('Z')?.split_once('T')?;
    // Fractions of a second are dropped.
    let clock = clock.split_once('.').map_or(clock, |(whole, _)| whole);
    let [year, month, day] = numbers(date, '-', [4, 2, 2])?;
    let [hour, minute, second] = numbers(clock, ':', [2, 2, 2])?;
    if !(1970..=9999).contains(&year) || !(1..=12).contains(&month) || hour > 23 || minute > 59 || second > 59 {
        return None;
    }
    if day == 0 || day > days_of_month(year, month) {
        return None;
    }
    let months_before: u64 = (1..month).map(|month| days_of_month(year, month)).sum();
    let leap_days = |year: u64| year / 4 - year / 100 + year / 400;
    let days = (year - 1970) * 365 + leap_days(year - 1) - leap_days(1969) + months_before + day - 1;
    Some(UnixMillis((days * 86_400 + hour * 3600 + minute * 60 + second) * 1000))
}

fn days_of_month(year: u64, month: u64) -> u64 {
    let leap = year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    match month {
        2 => 28 + u64::from(leap),
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

/// Three numbers of exactly these lengths.
fn numbers(text: &str, separator: char, lengths: [usize; 3]) -> Option<[u64; 3]> {
    let mut parts = text.split(separator);
    let mut out = [0; 3];
    for (number, length) in out.iter_mut().zip(lengths) {
        let part = parts.next().filter(|part| part.len() == length && part.bytes().all(|b| b.is_ascii_digit()))?;
        *number = part.parse().ok()?;
    }
    parts.next().is_none().then_some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_rfc_3339_in_utc_or_seconds() {
        for (text, millis) in [
            ("1970-01-01T00:00:00Z", 0),
            ("2000-02-29T23:59:59Z", 951_868_799_000),
            ("2026-01-01T00:00:00Z", 1_767_225_600_000),
            ("2024-12-31T12:30:01.5Z", 1_735_648_201_000),
            ("1767225600", 1_767_225_600_000),
        ] {
            assert_eq!(time(text), Ok(UnixMillis(millis)), "{text}");
        }
        for text in ["", "2026", "2026-13-01T00:00:00Z", "2025-02-29T00:00:00Z", "2026-01-01 00:00:00Z", "2026-01-01T00:00:00+01:00"] {
            assert!(text == "2026" || time(text).is_err(), "{text}");
        }
    }

    #[test]
    fn durations_have_a_unit() {
        assert_eq!(duration("90s"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("7d"), Ok(Duration::from_secs(604_800)));
        for text in ["", "7", "d", "0s", "-1h", "99999999999999999999d", "7 d"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn hashes_have_their_length() {
        assert_eq!(hash(&"ab".repeat(32)), Ok([0xab; 32]));
        assert_eq!(hash(&format!("0x{}", "AB".repeat(32))), Ok([0xab; 32]));
        assert!(hash("ab").is_err() && hash(&"zz".repeat(32)).is_err() && app_id(&"ab".repeat(21)).is_err());
    }

    #[test]
    fn revoked_cannot_be_allowed() {
        assert_eq!(tcb_status("OutOfDate"), Ok(TcbStatus::OutOfDate));
        assert!(tcb_status("Revoked").is_err() && tcb_status("").is_err());
    }
}
