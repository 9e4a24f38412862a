//! dstack's event log: from a list of events to the signed registers, and from proven events to what they say.
//! Owns: digests of runtime events (V1, V2), replay, by-name lookup. Never: decides what a payload is worth.
//! Source: dstack attestation reference, sections 2.5 and 4; the vectors' README.

pub mod ccel;
mod tcg2;
pub mod tpm;

use sha2::{Digest, Sha384};

use crate::{
    AttestError,
    wire::{EventVersion, RUNTIME_EVENT_TYPE, RuntimeEvent, TdxEvent},
};

/// A register or digest of SHA-384.
pub type Digest384 = [u8; 48];

/// Index of the register that runtime events extend.
pub const RUNTIME_REGISTER: u32 = 3;
/// TCG type of entries that are notes and extend nothing.
pub(crate) const EV_NO_ACTION: u32 = 3;

/// The event after which nothing can name the guest's identity any more.
const SYSTEM_READY: &str = "system-ready";
/// The event that ends what `mr_aggregated` covers in the boot-time form.
const BOOT_MR_DONE: &str = "boot-mr-done";

/// Three RTMR0 events of this type and payload are all that a stripped log keeps of the boot.
const ACPI_EVENT: (u32, &[u8]) = (10, b"ACPI DATA");

const LOG: &str = "event log";

/// The digest of a runtime event.
#[must_use]
pub fn runtime_digest(event: &RuntimeEvent) -> Digest384 {
    Sha384::digest(preimage(event.version, &event.event, &event.payload)).into()
}

/// What the digest of a runtime event is the hash of, for any register.
#[must_use]
pub fn runtime_preimage(event: &RuntimeEvent) -> Vec<u8> {
    preimage(event.version, &event.event, &event.payload)
}

fn preimage(version: EventVersion, name: &str, payload: &[u8]) -> Vec<u8> {
    match version {
        EventVersion::V1 => [&RUNTIME_EVENT_TYPE.to_le_bytes(), &b":"[..], name.as_bytes(), b":", payload].concat(),
        // RFC 8785: members in order, no spaces, texts escaped as JSON.stringify does, which is serde_json's way as well.
        EventVersion::V2 => {
            let name = serde_json::Value::from(name);
            format!(r#"{{"name":{name},"payload":"{}","type":{RUNTIME_EVENT_TYPE}}}"#, hex::encode(payload)).into_bytes()
        }
    }
}

/// Extends `register` by `digest`.
pub(crate) fn extend(register: &mut Digest384, digest: &Digest384) {
    *register = Sha384::new().chain_update(*register).chain_update(digest).finalize().into();
}

/// The register that `events` lead to from all zero.
#[must_use]
pub fn replay_runtime(events: &[RuntimeEvent]) -> Digest384 {
    events.iter().fold([0; 48], |mut register, event| {
        extend(&mut register, &runtime_digest(event));
        register
    })
}

/// Runtime events that lead to a signed register. Made only by [`prove`] and [`prove_log`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProvenEvents {
    events: Vec<RuntimeEvent>,
}

impl ProvenEvents {
    /// All of them, in the order they were measured.
    #[must_use]
    pub fn all(&self) -> &[RuntimeEvent] {
        &self.events
    }

    /// Payload of the first event called `name` before `system-ready`: what an application appends later names nothing.
    #[must_use]
    pub fn payload(&self, name: &str) -> Option<&[u8]> {
        let before_ready = self.events.iter().take_while(|event| event.event != SYSTEM_READY);
        before_ready.into_iter().find(|event| event.event == name).map(|event| &event.payload[..])
    }

    /// The payload of `name`, which has to be of `N` bytes where it stands at all.
    pub(crate) fn exact<const N: usize>(&self, name: &str, field: &'static str) -> Result<Option<[u8; N]>, AttestError> {
        let Some(payload) = self.payload(name) else {
            return Ok(None);
        };
        payload.try_into().map(Some).map_err(|_| AttestError::Field { field, why: "of another size than it must be" })
    }

    /// Those up to `boot-mr-done`, or all without one.
    #[must_use]
    pub fn of_boot(&self) -> &[RuntimeEvent] {
        let last = self.events.iter().position(|event| event.event == BOOT_MR_DONE);
        last.and_then(|index| self.events.get(..=index)).unwrap_or(&self.events)
    }

    /// The register after `boot-mr-done`, or after all events without one.
    #[must_use]
    pub fn boot_register(&self) -> Digest384 {
        replay_runtime(self.of_boot())
    }
}

/// Proves that `events` are what was measured into `register`.
/// # Errors
/// [`AttestError::EventDigest`] for a name that could be read two ways, [`AttestError::ReplayMismatch`] otherwise.
pub fn prove(events: &[RuntimeEvent], register: &Digest384) -> Result<ProvenEvents, AttestError> {
    prove_into(events, register, RUNTIME_REGISTER)
}

/// As [`prove`], for a register of another name: PCR14 of a NitroTPM.
pub(crate) fn prove_into(events: &[RuntimeEvent], register: &Digest384, name: u32) -> Result<ProvenEvents, AttestError> {
    let mut before_ready = events.iter().take_while(|event| event.event != SYSTEM_READY);
    if let Some(index) = before_ready.position(|event| is_ambiguous(event.version, &event.event)) {
        return Err(AttestError::EventDigest { index });
    }
    if replay_runtime(events) != *register {
        return Err(AttestError::ReplayMismatch { register: name });
    }
    Ok(ProvenEvents { events: events.to_vec() })
}

/// A V1 digest does not tell where the name ends: `a` + `b:c` hashes as `a:b` + `c`. So a name with a colon is refused where names
/// count, before `system-ready` (which has no payload and so no second reading); applications may use colons after it.
fn is_ambiguous(version: EventVersion, name: &str) -> bool {
    version == EventVersion::V1 && name.contains(':')
}

/// Proves a whole log: every digest is its event's, and each register that the log speaks of is the signed one.
/// A stripped log has no boot events but three of RTMR0; its RTMR0 is then not replayed.
/// # Errors
/// Event log classes, or [`AttestError::Malformed`] for a digest that is no SHA-384 digest.
pub fn prove_log(log: &[TdxEvent], signed: &[Digest384; 4]) -> Result<ProvenEvents, AttestError> {
    let mut replayed = [[0; 48]; 4];
    let mut spoken = [false; 4];
    let mut events = Vec::new();
    let stripped = is_stripped(log);
    let mut ready = false;
    for (index, event) in log.iter().enumerate() {
        let bad_register = AttestError::EventRegister { index, register: event.imr };
        let at = event.imr as usize;
        let (Some(register), Some(spoken)) = (replayed.get_mut(at), spoken.get_mut(at)) else {
            return Err(bad_register);
        };
        if event.event_type == EV_NO_ACTION {
            continue;
        }
        let digest = event_digest(index, event)?;
        extend(register, &digest);
        *spoken = true;
        if is_runtime(event) {
            ready |= event.event == SYSTEM_READY;
            if !ready && is_ambiguous(event.version, &event.event) {
                return Err(AttestError::EventDigest { index });
            }
            events.push(RuntimeEvent { event: event.event.clone(), payload: event.event_payload.clone(), version: event.version });
        }
    }
    for (register, ((replayed, signed), spoken)) in (0u32..).zip(replayed.iter().zip(signed).zip(spoken)) {
        let judged = register == RUNTIME_REGISTER || (spoken && !(stripped && register == 0));
        if judged && replayed != signed {
            return Err(AttestError::ReplayMismatch { register });
        }
    }
    Ok(ProvenEvents { events })
}

/// Proves the JSON form of a log.
/// # Errors
/// As [`prove_log`], and [`AttestError::Malformed`] for anything but an array of events.
pub fn prove_json(json: &[u8], signed: &[Digest384; 4]) -> Result<ProvenEvents, AttestError> {
    let log = TdxEvent::parse_log(json).map_err(|error| match error {
        AttestError::Field { why, .. } => AttestError::Malformed { part: LOG, why },
        other => other,
    })?;
    prove_log(&log, signed)
}

fn is_runtime(event: &TdxEvent) -> bool {
    event.imr == RUNTIME_REGISTER && event.event_type == RUNTIME_EVENT_TYPE
}

fn is_stripped(log: &[TdxEvent]) -> bool {
    let boot = || log.iter().filter(|event| event.imr != RUNTIME_REGISTER);
    let is_acpi = |event: &TdxEvent| event.imr == 0 && event.event_type == ACPI_EVENT.0 && event.event_payload == ACPI_EVENT.1;
    boot().count() <= 3 && boot().all(is_acpi)
}

/// The digest to extend. A runtime event's is computed, and the one in the log has to be the same unless it is empty.
fn event_digest(index: usize, event: &TdxEvent) -> Result<Digest384, AttestError> {
    let stated = match event.digest.len() {
        0 => None,
        _ => Some(
            <Digest384>::try_from(&event.digest[..])
                .map_err(|_| AttestError::Malformed { part: LOG, why: "a digest is not of 48 bytes" })?,
        ),
    };
    if !is_runtime(event) {
        return stated.ok_or(AttestError::Malformed { part: LOG, why: "a boot event without its digest" });
    }
    let preimage = preimage(event.version, &event.event, &event.event_payload);
    let computed: Digest384 = Sha384::digest(&preimage).into();
    let agrees = stated.is_none_or(|stated| stated == computed) && event.preimage.as_ref().is_none_or(|stated| *stated == preimage);
    match agrees {
        true => Ok(computed),
        false => Err(AttestError::EventDigest { index }),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn event(name: &str, payload: &[u8], version: EventVersion) -> RuntimeEvent {
        RuntimeEvent { event: name.to_owned(), payload: payload.to_vec(), version }
    }

    fn boot_events() -> Vec<RuntimeEvent> {
        let v1 = |name, payload: &[u8]| event(name, payload, EventVersion::V1);
        vec![
            v1("system-preparing", &[]),
            v1("app-id", &[0x11; 20]),
            v1("compose-hash", &[0x44; 32]),
            v1("instance-id", &[0x22; 20]),
            v1("boot-mr-done", &[]),
        ]
    }

    fn log_of(events: &[RuntimeEvent]) -> Vec<TdxEvent> {
        let entry = |event: &RuntimeEvent| TdxEvent {
            imr: 3,
            event_type: RUNTIME_EVENT_TYPE,
            digest: runtime_digest(event).to_vec(),
            event: event.event.clone(),
            event_payload: event.payload.clone(),
            version: event.version,
            preimage: None,
        };
        events.iter().map(entry).collect()
    }

    fn registers(events: &[RuntimeEvent]) -> [Digest384; 4] {
        [[0; 48], [0; 48], [0; 48], replay_runtime(events)]
    }

    #[test]
    fn digests_and_replay_are_the_references() {
        let app_id = "3f1fbb6cfe25e7f19bd48cfa9dc590cabaa946da04f9215402e7083550177292c1478402b258a90c649ccfcb5f408175";
        assert_eq!(hex::encode(runtime_digest(&event("app-id", &[0x11; 20], EventVersion::V1))), app_id);
        let app_id_v2 = "f3fdf5a4af4b5554d2fd20456bd667fce7df585c5d94a4f36b5c16ae22eab4123bf6f4e97a30efb6ec980a950e28d1a8";
        assert_eq!(hex::encode(runtime_digest(&event("app-id", &[0x11; 20], EventVersion::V2))), app_id_v2);
        let rtmr3 = "ebb4fcab9548ef85b99508c0e3de1744b8eaef46718e3a54e3af7af2bb2c4081899fab21650f43ebfb4075711b72b8cb";
        assert_eq!(hex::encode(replay_runtime(&boot_events())), rtmr3);
    }

    #[test]
    fn lookup_takes_the_first_and_stops_at_system_ready() {
        let mut events = boot_events();
        events.push(event("app-id", &[9; 20], EventVersion::V1));
        events.push(event("system-ready", &[], EventVersion::V1));
        events.push(event("os-image-hash", &[8; 32], EventVersion::V1));
        let proven = prove(&events, &replay_runtime(&events)).unwrap();
        assert_eq!(proven.payload("app-id"), Some(&[0x11; 20][..]));
        assert_eq!(proven.payload("os-image-hash"), None);
        assert_eq!(proven.boot_register(), replay_runtime(&boot_events()));
    }

    #[test]
    fn a_stripped_log_proves_the_same_events() {
        let events = boot_events();
        let mut log = log_of(&events);
        log.iter_mut().for_each(|entry| entry.digest.clear());
        let acpi = TdxEvent { event_type: 10, digest: vec![7; 48], event_payload: b"ACPI DATA".to_vec(), ..TdxEvent::default() };
        log.splice(0..0, [acpi.clone(), acpi.clone(), acpi]);
        assert_eq!(prove_log(&log, &registers(&events)).unwrap().all(), events);
    }

    #[test]
    fn a_digest_of_another_payload_is_refused() {
        let events = boot_events();
        let mut log = log_of(&events);
        log[1].event_payload[0] ^= 1;
        assert_eq!(prove_log(&log, &registers(&events)), Err(AttestError::EventDigest { index: 1 }));
        log[1].digest.clear();
        assert_eq!(prove_log(&log, &registers(&events)), Err(AttestError::ReplayMismatch { register: 3 }));
    }

    #[test]
    fn a_colon_in_a_v1_name_is_refused_though_its_hash_fits() {
        let events = [event("app-id", b":x", EventVersion::V1)];
        let moved = event("app-id:", b"x", EventVersion::V1);
        assert_eq!(runtime_digest(&moved), runtime_digest(&events[0]));
        assert_eq!(prove(&[moved], &replay_runtime(&events)), Err(AttestError::EventDigest { index: 0 }));
    }

    #[test]
    fn applications_may_use_colons_after_system_ready() {
        let mut events = boot_events();
        events.push(event("system-ready", &[], EventVersion::V1));
        events.push(event("app:note", b"x", EventVersion::V1));
        assert!(prove(&events, &replay_runtime(&events)).is_ok());
        assert!(prove_log(&log_of(&events), &registers(&events)).is_ok());
    }

    #[test]
    fn a_preimage_that_is_not_the_events_is_refused() {
        let events = [event("app-id", &[1], EventVersion::V2)];
        let mut log = log_of(&events);
        log[0].preimage = Some(br#"{"name":"app-id","payload":"01","type":134217729}"#.to_vec());
        assert!(prove_log(&log, &registers(&events)).is_ok());
        log[0].preimage = Some(br#"{"name":"app-id","payload":"02","type":134217729}"#.to_vec());
        assert_eq!(prove_log(&log, &registers(&events)), Err(AttestError::EventDigest { index: 0 }));
    }

    #[test]
    fn a_boot_register_the_log_speaks_of_is_replayed() {
        let boot = TdxEvent { imr: 1, event_type: 4, digest: vec![5; 48], ..TdxEvent::default() };
        assert_eq!(prove_log(std::slice::from_ref(&boot), &[[0; 48]; 4]), Err(AttestError::ReplayMismatch { register: 1 }));
        let mut register = [0; 48];
        extend(&mut register, &[5; 48]);
        assert!(prove_log(&[boot], &[[0; 48], register, [0; 48], [0; 48]]).is_ok());
    }

    #[test]
    fn register_four_does_not_exist() {
        let log = [TdxEvent { imr: 4, digest: vec![0; 48], ..TdxEvent::default() }];
        assert_eq!(prove_log(&log, &[[0; 48]; 4]), Err(AttestError::EventRegister { index: 0, register: 4 }));
    }

    proptest! {
        #[test]
        fn any_json_is_proven_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            let _ = prove_json(&bytes, &[[0; 48]; 4]);
        }

        #[test]
        fn dropping_or_swapping_an_event_is_noticed(at in 0usize..5, swap in any::<bool>()) {
            let events = boot_events();
            let mut log = log_of(&events);
            if swap && at < 4 { log.swap(at, at + 1) } else { log.remove(at); }
            prop_assert_eq!(prove_log(&log, &registers(&events)), Err(AttestError::ReplayMismatch { register: 3 }));
        }
    }
}
