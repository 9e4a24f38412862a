//! Stripping: what a certificate or certificate request leaves out of its evidence. Owns: which events stay and in which
//! form. Never: changes what verifies: every event that is replayed from the log keeps what its digest is made of.
//! Source: dstack attestation reference, section 2.5.

use super::{Attestation, EventVersion, PlatformEvidence, TdxEvent};

/// Payload of the three RTMR0 events that measure ACPI tables.
pub(super) const ACPI_PAYLOAD: &[u8] = b"ACPI DATA";
/// TCG type of those (EV_PLATFORM_CONFIG_FLAGS).
const ACPI_EVENT_TYPE: u32 = 10;

pub(super) fn strip(mut attestation: Attestation) -> Attestation {
    match &mut attestation.platform {
        PlatformEvidence::Tdx(evidence) => {
            evidence.event_log.retain(|event| event.imr == 3 || is_acpi(event));
            evidence.event_log.iter_mut().for_each(shorten);
        }
        PlatformEvidence::GcpTdx(evidence, _) => {
            evidence.event_log.retain(|event| event.imr == 3);
            evidence.event_log.iter_mut().for_each(shorten);
        }
        PlatformEvidence::NitroEnclave { .. } | PlatformEvidence::SevSnp { .. } | PlatformEvidence::NitroTpm { .. } => {}
    }
    attestation
}

fn is_acpi(event: &TdxEvent) -> bool {
    event.imr == 0 && event.event_type == ACPI_EVENT_TYPE && event.event_payload.starts_with(ACPI_PAYLOAD)
}

fn shorten(event: &mut TdxEvent) {
    match (event.is_runtime(), event.version) {
        // the digest is computed from name and payload
        (true, EventVersion::V1) => event.digest.clear(),
        // a V2 event is checked by its preimage and digest, so both stay (dstack drops them and then fails, #1038)
        (true, EventVersion::V2) => {}
        (false, _) => {
            let kept: &[u8] = if is_acpi(event) { ACPI_PAYLOAD } else { &[] };
            event.event_payload = kept.to_vec();
        }
    }
}
