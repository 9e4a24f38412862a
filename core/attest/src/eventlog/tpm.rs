//! The firmware log of a TPM, and the event lists evidence carries in its place: replay to PCRs. Owns: both replays.
//! Never: judges what an event describes.
//! Source: TCG PC Client Platform Firmware Profile, sections 10.2 and 10.4.5.3 (StartupLocality); dstack attestation reference,
//! sections 4 and 5.2.

use std::collections::BTreeMap;

use aws_lc_rs::digest;

use super::{preimage, tcg2::Log};
use crate::{
    AttestError,
    tpm::Bank,
    wire::{EVENTS_MAX, RuntimeEvent, TpmEvent},
};

const PART: &str = "tpm event log";
/// PCRs of a PC client's TPM.
const PCR_COUNT: u32 = 24;
/// Content of the note that says from which locality the TPM was started; one byte follows.
const STARTUP_LOCALITY: &[u8; 16] = b"StartupLocality\0";

/// What a firmware log leads to in one bank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Replay {
    /// Entries after the header.
    pub event_count: usize,
    /// The PCRs that the log extends.
    pub pcrs: BTreeMap<u32, Vec<u8>>,
}

/// Replays a firmware log in `bank`. What follows the last event has to be fill: all `0xff` or all zero.
/// # Errors
/// Parse classes, [`AttestError::EventRegister`] for a PCR that does not exist.
pub fn replay(area: &[u8], bank: Bank) -> Result<Replay, AttestError> {
    let mut log = Log::begin(area, PART)?;
    let mut pcrs: BTreeMap<u32, Vec<u8>> = BTreeMap::new();
    let mut locality = 0;
    while let Some(event) = log.next()? {
        if event.register >= PCR_COUNT && !event.is_note() {
            return Err(AttestError::EventRegister { index: event.index, register: event.register });
        }
        if event.is_note() {
            if let Some([at]) = event.content.strip_prefix(STARTUP_LOCALITY) {
                if pcrs.contains_key(&0) {
                    return Err(AttestError::Malformed { part: PART, why: "a startup locality after pcr 0 was extended" });
                }
                locality = *at;
            }
            continue;
        }
        let digest =
            event.digest(bank.algorithm()).ok_or(AttestError::Malformed { part: PART, why: "an event without a digest of the bank" })?;
        let pcr = pcrs.entry(event.register).or_insert_with(|| bank.zero());
        // a TPM started from another locality has it in the last byte of PCR 0
        if event.register == 0
            && pcr.iter().all(|byte| *byte == 0)
            && let Some(last) = pcr.last_mut()
        {
            *last = locality;
        }
        bank.extend(pcr, digest);
    }
    Ok(Replay { event_count: log.count(), pcrs })
}

/// The events of a firmware log that extend `bank`, as evidence carries them.
/// # Errors
/// As [`replay`], and [`AttestError::Length`] above [`EVENTS_MAX`].
pub fn events(area: &[u8], bank: Bank) -> Result<Vec<TpmEvent>, AttestError> {
    let mut log = Log::begin(area, PART)?;
    let mut events = Vec::new();
    while let Some(event) = log.next()? {
        if event.index >= EVENTS_MAX {
            return Err(AttestError::Length { part: PART, length_bytes: log.count(), limit_bytes: EVENTS_MAX });
        }
        if event.is_note() {
            continue;
        }
        let digest = event.digest(bank.algorithm());
        let digest = digest.ok_or(AttestError::Malformed { part: PART, why: "an event without a digest of the bank" })?.to_vec();
        events.push(TpmEvent { pcr_index: event.register, digest });
    }
    Ok(events)
}

/// The PCR that `events` of `index` lead to, or `None` where the list has none of it.
/// # Errors
/// [`AttestError::EventRegister`] for a PCR that does not exist, [`AttestError::EventDigest`] for a digest of another size.
pub fn replay_list(events: &[TpmEvent], index: u32, bank: Bank) -> Result<Option<Vec<u8>>, AttestError> {
    let mut replayed = None;
    for (position, event) in events.iter().enumerate() {
        if event.pcr_index >= PCR_COUNT {
            return Err(AttestError::EventRegister { index: position, register: event.pcr_index });
        }
        if event.pcr_index != index {
            continue;
        }
        if event.digest.len() != bank.size_bytes() {
            return Err(AttestError::EventDigest { index: position });
        }
        bank.extend(replayed.get_or_insert_with(|| bank.zero()), &event.digest);
    }
    Ok(replayed)
}

/// The PCR that runtime events lead to from all zero.
#[must_use]
pub fn replay_runtime(events: &[RuntimeEvent], bank: Bank) -> Vec<u8> {
    events.iter().fold(bank.zero(), |mut pcr, event| {
        let preimage = preimage(event.version, &event.event, &event.payload);
        bank.extend(&mut pcr, digest::digest(bank.hash(), &preimage).as_ref());
        pcr
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::wire::EventVersion;

    /// A log of SHA-1 and SHA-256 digests.
    fn log(events: &[(u32, u32, u8, &[u8])]) -> Vec<u8> {
        let mut spec = b"Spec ID Event03\0".to_vec();
        spec.extend([0, 0, 0, 0, 0, 2, 0, 2, 2, 0, 0, 0, 4, 0, 20, 0, 0x0b, 0, 32, 0, 0]);
        let mut bytes = [&0u32.to_le_bytes()[..], &3u32.to_le_bytes(), &[0; 20]].concat();
        bytes.extend(u32::try_from(spec.len()).unwrap().to_le_bytes());
        bytes.extend(spec);
        for (register, event_type, fill, content) in events {
            bytes.extend([register.to_le_bytes(), event_type.to_le_bytes(), 2u32.to_le_bytes()].concat());
            bytes.extend([4, 0].into_iter().chain([*fill; 20]).chain([0x0b, 0]).chain([*fill; 32]));
            bytes.extend(u32::try_from(content.len()).unwrap().to_le_bytes());
            bytes.extend(*content);
        }
        bytes
    }

    fn extended(from: &[u8], fills: &[u8]) -> Vec<u8> {
        fills.iter().fold(from.to_vec(), |mut pcr, fill| {
            Bank::Sha256.extend(&mut pcr, &[*fill; 32]);
            pcr
        })
    }

    #[test]
    fn replays_each_pcr_and_passes_over_notes() {
        let replay = replay(&log(&[(0, 8, 1, b"v"), (2, 3, 9, b"note"), (0, 8, 2, b""), (23, 4, 3, b"")]), Bank::Sha256).unwrap();
        assert_eq!(replay.event_count, 4);
        let expected = [(0, extended(&[0; 32], &[1, 2])), (23, extended(&[0; 32], &[3]))];
        assert_eq!(replay.pcrs, BTreeMap::from(expected));
    }

    #[test]
    fn a_startup_locality_is_in_pcr_0() {
        let note: &[u8] = b"StartupLocality\0\x03";
        let mut start = [0; 32];
        start[31] = 3;
        let area = log(&[(0, 3, 0, note), (0, 8, 1, b""), (1, 8, 1, b"")]);
        let replayed = replay(&area, Bank::Sha256).unwrap().pcrs;
        assert_eq!((&replayed[&0], &replayed[&1]), (&extended(&start, &[1]), &extended(&[0; 32], &[1])));
        let late = replay(&log(&[(0, 8, 1, b""), (0, 3, 0, note)]), Bank::Sha256).unwrap_err();
        assert_eq!(late.class().as_str(), "parse.malformed");
    }

    #[test]
    fn refuses_pcrs_and_banks_that_do_not_exist() {
        assert_eq!(replay(&log(&[(24, 8, 1, b"")]), Bank::Sha256), Err(AttestError::EventRegister { index: 0, register: 24 }));
        assert_eq!(replay(&log(&[(0, 8, 1, b"")]), Bank::Sha384).unwrap_err().class().as_str(), "parse.malformed");
    }

    #[test]
    fn event_lists_lead_to_their_pcr() {
        let event = |pcr_index, fill: u8| TpmEvent { pcr_index, digest: vec![fill; 32] };
        let events = [event(2, 1), event(0, 7), event(2, 2)];
        assert_eq!(replay_list(&events, 2, Bank::Sha256), Ok(Some(extended(&[0; 32], &[1, 2]))));
        assert_eq!(replay_list(&events, 14, Bank::Sha256), Ok(None));
        assert_eq!(replay_list(&events, 2, Bank::Sha384), Err(AttestError::EventDigest { index: 0 }));
        assert_eq!(replay_list(&[event(24, 1)], 2, Bank::Sha256), Err(AttestError::EventRegister { index: 0, register: 24 }));
    }

    #[test]
    fn runtime_digests_are_the_references() {
        let event = RuntimeEvent { event: "app-id".into(), payload: vec![0x11; 20], version: EventVersion::V1 };
        let digest = hex::decode("16af01b1516d0c5e8545bd362dadcaa4aa36c61ccaf0dc379e01f20445ce30ce").unwrap();
        let mut pcr = vec![0; 32];
        Bank::Sha256.extend(&mut pcr, &digest);
        assert_eq!(replay_runtime(&[event], Bank::Sha256), pcr);
        assert_eq!(replay_runtime(&[], Bank::Sha384), vec![0; 48]);
    }

    proptest! {
        #[test]
        fn any_bytes_replay_or_are_refused(tail in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = replay(&tail, Bank::Sha256);
            let _ = replay(&[log(&[(1, 4, 7, b"x")]), tail].concat(), Bank::Sha1);
        }

        #[test]
        fn any_cut_inside_an_event_is_refused(cut in 1usize..72) {
            let area = log(&[(1, 4, 7, b"hi")]);
            prop_assert!(replay(&area[..area.len() - cut], Bank::Sha256).is_err());
        }
    }
}
