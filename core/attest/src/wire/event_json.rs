//! The JSON form of an event log: extension `.2`, the `event_log` member of dstack's APIs, the vectors' files.
//! Owns: its members. Source: dstack attestation reference, sections 1 and 2.2.

use std::borrow::Cow;

use super::{ATTESTATION_BYTES_MAX, EVENTS_MAX, EventVersion, TdxEvent};
use crate::AttestError;
use serde::{Deserialize, Serialize};

const PART: &str = "event log";

/// Texts stand where they were read, unless they hold escapes: half of a log is hex.
#[derive(Serialize, Deserialize)]
struct JsonEvent<'a> {
    imr: u32,
    event_type: u32,
    #[serde(borrow)]
    digest: Cow<'a, str>,
    #[serde(borrow)]
    event: Cow<'a, str>,
    #[serde(borrow)]
    event_payload: Cow<'a, str>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    version: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    preimage: Option<String>,
}

pub(super) fn parse(json: &[u8]) -> Result<Vec<TdxEvent>, AttestError> {
    if json.len() > ATTESTATION_BYTES_MAX {
        return Err(AttestError::Length { part: PART, length_bytes: json.len(), limit_bytes: ATTESTATION_BYTES_MAX });
    }
    let malformed = |_| AttestError::Malformed { part: PART, why: "not a JSON array of events" };
    let events: Vec<JsonEvent<'_>> = serde_json::from_slice(json).map_err(malformed)?;
    if events.len() > EVENTS_MAX {
        return Err(AttestError::Length { part: PART, length_bytes: events.len(), limit_bytes: EVENTS_MAX });
    }
    events.into_iter().map(event).collect()
}

fn event(json: JsonEvent<'_>) -> Result<TdxEvent, AttestError> {
    let unhex = |text: &str, field| bytes_of_hex(text).ok_or(AttestError::Field { field, why: "not hex" });
    Ok(TdxEvent {
        imr: json.imr,
        event_type: json.event_type,
        digest: unhex(&json.digest, "digest")?,
        event: json.event.into_owned(),
        event_payload: unhex(&json.event_payload, "event_payload")?,
        version: match json.version {
            None | Some(1) => EventVersion::V1,
            Some(2) => EventVersion::V2,
            Some(got) => return Err(AttestError::UnsupportedVersion { part: "runtime event", got: got.into() }),
        },
        preimage: json.preimage.map(|text| unhex(&text, "preimage")).transpose()?,
    })
}

/// A value no nibble has.
const NO_DIGIT: u8 = 0xff;

/// What each byte is worth as a hex digit of either case.
#[expect(clippy::indexing_slicing, reason = "evaluated by the compiler")]
const DIGITS: [u8; 256] = {
    let mut digits = [NO_DIGIT; 256];
    let mut value = 0;
    while value < 16 {
        digits[b"0123456789abcdef"[value] as usize] = value as u8;
        digits[b"0123456789ABCDEF"[value] as usize] = value as u8;
        value += 1;
    }
    digits
};

/// By table and without a branch for each digit: a log is twenty kilobytes of hex, which the `hex` crate reads in ten microseconds.
fn bytes_of_hex(text: &str) -> Option<Vec<u8>> {
    let (pairs, []) = text.as_bytes().as_chunks::<2>() else { return None };
    let digit = |byte: u8| DIGITS.get(usize::from(byte)).copied().unwrap_or(NO_DIGIT);
    let mut seen = 0;
    let decode = |[high, low]: &[u8; 2]| {
        let (high, low) = (digit(*high), digit(*low));
        seen |= high | low;
        high << 4 | low & 0x0f
    };
    let bytes = pairs.iter().map(decode).collect();
    (seen < 16).then_some(bytes)
}

pub(super) fn to_json(log: &[TdxEvent]) -> String {
    let events: Vec<JsonEvent<'_>> = log
        .iter()
        .map(|event| JsonEvent {
            imr: event.imr,
            event_type: event.event_type,
            digest: hex::encode(&event.digest).into(),
            event: event.event.as_str().into(),
            event_payload: hex::encode(&event.event_payload).into(),
            version: (event.version == EventVersion::V2).then_some(2),
            preimage: event.preimage.as_ref().map(hex::encode),
        })
        .collect();
    serde_json::to_string(&events).expect("integers and texts always have a JSON form")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn texts_with_escapes_read_as_those_without() {
        let plain = br#"[{"imr":3,"event_type":1,"digest":"0aFF","event":"a/b","event_payload":"31"}]"#;
        let escaped = br#"[{"imr":3,"event_type":1,"digest":"\u0030aFF","event":"a\/b","event_payload":"3\u0031"}]"#;
        let log = parse(plain).unwrap();
        assert_eq!(log[0].digest, [0x0a, 0xff]);
        assert_eq!(parse(escaped), Ok(log));
    }

    proptest! {
        #[test]
        fn hex_is_what_the_library_reads(text in "([0-9a-fA-F]{2}){0,40}|[0-9a-gG:`@/ \\x00é]{0,20}") {
            prop_assert_eq!(bytes_of_hex(&text), hex::decode(&text).ok());
        }
    }
}
