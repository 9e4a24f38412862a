//! dstack's runtime events, version 1: the order a guest writes them in, digests, replay, the JSON log.
//! Source: reference `dstack-attestation.md` §4 (preimage, register, order).

use serde_json::{Value, json};
use sha2::{Digest as _, Sha384};

/// One runtime event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuntimeEvent {
    /// `app-id`, `compose-hash`, …
    pub name: String,
    /// Its content.
    pub payload: Vec<u8>,
}

impl RuntimeEvent {
    /// An event.
    pub fn new(name: &str, payload: impl Into<Vec<u8>>) -> Self {
        Self { name: name.to_owned(), payload: payload.into() }
    }

    /// SHA-384 of `LE32(type) ‖ ":" ‖ name ‖ ":" ‖ payload`.
    pub fn digest(&self) -> [u8; 48] {
        Sha384::new()
            .chain_update(RUNTIME_EVENT_TYPE.to_le_bytes())
            .chain_update(b":")
            .chain_update(&self.name)
            .chain_update(b":")
            .chain_update(&self.payload)
            .finalize()
            .into()
    }
}

/// The register after all `events`, from zero.
pub fn replay(events: &[RuntimeEvent]) -> [u8; 48] {
    events.iter().fold([0; 48], |register, event| Sha384::new().chain_update(register).chain_update(event.digest()).finalize().into())
}

/// The events of a guest's boot, in order.
pub fn boot_events(app_id: &[u8], compose_hash: &[u8; 32], instance_id: &[u8], key_provider: &[u8]) -> Vec<RuntimeEvent> {
    vec![
        RuntimeEvent::new("system-preparing", []),
        RuntimeEvent::new("app-id", app_id),
        RuntimeEvent::new("compose-hash", compose_hash),
        RuntimeEvent::new("instance-id", instance_id),
        RuntimeEvent::new("boot-mr-done", []),
        RuntimeEvent::new("key-provider", key_provider),
        RuntimeEvent::new("system-ready", []),
    ]
}

/// The log as the guest API returns it: a JSON array of TDX events on register 3.
pub fn json_log(events: &[RuntimeEvent]) -> String {
    let entries: Vec<Value> = events
        .iter()
        .map(|event| {
            json!({
                "imr": RUNTIME_REGISTER,
                "event_type": RUNTIME_EVENT_TYPE,
                "digest": hex::encode(event.digest()),
                "event": event.name,
                "event_payload": hex::encode(&event.payload),
            })
        })
        .collect();
    Value::Array(entries).to_string()
}

/// Type of every runtime event.
pub const RUNTIME_EVENT_TYPE: u32 = 0x0800_0001;
/// RTMR3.
pub const RUNTIME_REGISTER: u32 = 3;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_and_replay_are_the_references() {
        // Known answers of the reference, §12.
        let events = [
            RuntimeEvent::new("system-preparing", []),
            RuntimeEvent::new("app-id", [0x11; 20]),
            RuntimeEvent::new("compose-hash", [0x44; 32]),
            RuntimeEvent::new("instance-id", [0x22; 20]),
            RuntimeEvent::new("boot-mr-done", []),
        ];
        assert_eq!(
            hex::encode(events[1].digest()),
            "3f1fbb6cfe25e7f19bd48cfa9dc590cabaa946da04f9215402e7083550177292c1478402b258a90c649ccfcb5f408175"
        );
        assert_eq!(
            hex::encode(replay(&events)),
            "ebb4fcab9548ef85b99508c0e3de1744b8eaef46718e3a54e3af7af2bb2c4081899fab21650f43ebfb4075711b72b8cb"
        );
    }
}
