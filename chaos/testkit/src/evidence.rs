//! The versioned attestation, SCALE form V0, as a dstack guest writes it into a certificate. Owns: encoding only; written
//! apart from the decoder in `attest`, so that the two check each other.
//! Source: reference `dstack-attestation.md` §2.1 and §2.5 (stripped: digests of runtime events empty).

use crate::eventlog::{RUNTIME_EVENT_TYPE, RUNTIME_REGISTER, RuntimeEvent};

/// Evidence of a TD: quote, stripped event log, runtime events, report data, VmConfig text.
pub fn tdx(quote: &[u8], events: &[RuntimeEvent], report_data: &[u8; 64], config: &str) -> Vec<u8> {
    let mut out = vec![V0, KIND_TDX];
    bytes(&mut out, quote);
    compact(&mut out, events.len());
    for event in events {
        out.extend(RUNTIME_REGISTER.to_le_bytes());
        out.extend(RUNTIME_EVENT_TYPE.to_le_bytes());
        bytes(&mut out, &[]);
        bytes(&mut out, event.name.as_bytes());
        bytes(&mut out, &event.payload);
    }
    tail(out, events, report_data, config)
}

/// Evidence of a Nitro enclave: NSM document, claimed events, report data, VmConfig text.
pub fn nitro(document: &[u8], events: &[RuntimeEvent], report_data: &[u8; 64], config: &str) -> Vec<u8> {
    let mut out = vec![V0, KIND_NITRO];
    bytes(&mut out, document);
    tail(out, events, report_data, config)
}

fn tail(mut out: Vec<u8>, events: &[RuntimeEvent], report_data: &[u8; 64], config: &str) -> Vec<u8> {
    compact(&mut out, events.len());
    for event in events {
        bytes(&mut out, event.name.as_bytes());
        bytes(&mut out, &event.payload);
    }
    out.extend(report_data);
    bytes(&mut out, config.as_bytes());
    out
}

fn bytes(out: &mut Vec<u8>, content: &[u8]) {
    compact(out, content.len());
    out.extend_from_slice(content);
}

/// SCALE compact integer; values here stay below 2^30.
fn compact(out: &mut Vec<u8>, value: usize) {
    let value = u32::try_from(value).unwrap_or(u32::MAX).min((1 << 30) - 1);
    match value {
        0..0x40 => out.push((value << 2) as u8),
        0x40..0x4000 => out.extend(((value << 2 | 1) as u16).to_le_bytes()),
        _ => out.extend((value << 2 | 2).to_le_bytes()),
    }
}

const V0: u8 = 0;
const KIND_TDX: u8 = 0;
const KIND_NITRO: u8 = 2;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nitro_evidence_is_the_references_known_answer() {
        let config = format!("{{\"os_image_hash\":\"{}\"}}", "55".repeat(32));
        let evidence = nitro(&[0xaa, 0xbb], &[RuntimeEvent::new("app-id", [0x11; 20])], &[0x44; 64], &config);
        let expected = format!(
            "000208aabb04186170702d696450{}{}51017b226f735f696d6167655f68617368223a22{}227d",
            "11".repeat(20),
            "44".repeat(64),
            "35".repeat(64)
        );
        assert_eq!(hex::encode(evidence), expected);
    }

    #[test]
    fn compact_integers_take_one_two_or_four_bytes() {
        for (value, hex_form) in [(0, "00"), (63, "fc"), (64, "0101"), (16383, "fdff"), (16384, "02000100")] {
            let mut out = Vec::new();
            compact(&mut out, value);
            assert_eq!(hex::encode(out), hex_form);
        }
    }
}
