//! The JSON form of an event log: extension `.2`, the `event_log` member of dstack's APIs, the vectors' files.
//! Owns: its members. Source: dstack attestation reference, sections 1 and 2.2.

use super::{ATTESTATION_BYTES_MAX, EVENTS_MAX, EventVersion, TdxEvent};
use crate::AttestError;
use serde::{Deserialize, Serialize};

const PART: &str = "event log";

#[derive(Serialize, Deserialize)]
struct JsonEvent {
    imr: u32,
    event_type: u32,
    digest: String,
    event: String,
    event_payload: String,
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
    let events: Vec<JsonEvent> = serde_json::from_slice(json).map_err(malformed)?;
    if events.len() > EVENTS_MAX {
        return Err(AttestError::Length { part: PART, length_bytes: events.len(), limit_bytes: EVENTS_MAX });
    }
    events.into_iter().map(event).collect()
}

fn event(json: JsonEvent) -> Result<TdxEvent, AttestError> {
    let unhex = |text: &str, field| hex::decode(text).map_err(|_| AttestError::Field { field, why: "not hex" });
    Ok(TdxEvent {
        imr: json.imr,
        event_type: json.event_type,
        digest: unhex(&json.digest, "digest")?,
        event: json.event,
        event_payload: unhex(&json.event_payload, "event_payload")?,
        version: match json.version {
            None | Some(1) => EventVersion::V1,
            Some(2) => EventVersion::V2,
            Some(got) => return Err(AttestError::UnsupportedVersion { part: "runtime event", got: got.into() }),
        },
        preimage: json.preimage.map(|text| unhex(&text, "preimage")).transpose()?,
    })
}

pub(super) fn to_json(log: &[TdxEvent]) -> String {
    let events: Vec<JsonEvent> = log
        .iter()
        .map(|event| JsonEvent {
            imr: event.imr,
            event_type: event.event_type,
            digest: hex::encode(&event.digest),
            event: event.event.clone(),
            event_payload: hex::encode(&event.event_payload),
            version: (event.version == EventVersion::V2).then_some(2),
            preimage: event.preimage.as_ref().map(hex::encode),
        })
        .collect();
    serde_json::to_string(&events).expect("integers and texts always have a JSON form")
}
