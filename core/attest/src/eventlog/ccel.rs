//! The firmware's own event log of a TD (CCEL): TCG2 crypto-agile form, SHA-384 bank. Owns: its replay, its events in dstack's form.
//! Never: judges what an event describes. Register index 1 to 4 of the log is RTMR0 to RTMR3.
//! Source: TCG PC Client Platform Firmware Profile, "crypto agile log format"; UEFI "confidential computing", table CCEL.

use super::{Digest384, extend, tcg2};
use crate::AttestError;
use crate::wire::{EVENTS_MAX, TdxEvent};

/// Largest log area.
pub const CCEL_BYTES_MAX: usize = tcg2::LOG_BYTES_MAX;

const ALGORITHM_SHA384: u16 = 0x000c;
const PART: &str = "ccel";

/// What a log leads to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Replay {
    /// RTMR0 to RTMR3 from all zero.
    pub registers: [Digest384; 4],
    /// Which of them the log extends.
    pub extended: [bool; 4],
    /// Entries after the header.
    pub event_count: usize,
}

impl Replay {
    /// Compares with the signed registers: RTMR0 to RTMR2 always, RTMR3 where the log extends it.
    /// # Errors
    /// [`AttestError::ReplayMismatch`] with the first register that differs.
    pub fn check(&self, signed: &[Digest384; 4]) -> Result<(), AttestError> {
        for (register, ((replayed, signed), extended)) in (0u32..).zip(self.registers.iter().zip(signed).zip(self.extended)) {
            if (register < 3 || extended) && replayed != signed {
                return Err(AttestError::ReplayMismatch { register });
            }
        }
        Ok(())
    }
}

/// Replays a log area. What follows the last event has to be fill: all `0xff` or all zero.
/// # Errors
/// Parse classes, or [`AttestError::EventRegister`] for a register that is none.
pub fn replay(area: &[u8]) -> Result<Replay, AttestError> {
    let mut log = tcg2::Log::begin(area, PART)?;
    let mut replay = Replay { registers: [[0; 48]; 4], extended: [false; 4], event_count: 0 };
    while let Some(event) = log.next()? {
        let Some((at, digest)) = extension(&event)? else {
            continue;
        };
        if let (Some(value), Some(extended)) = (replay.registers.get_mut(at), replay.extended.get_mut(at)) {
            extend(value, &digest);
            *extended = true;
        }
    }
    replay.event_count = log.count();
    Ok(replay)
}

/// The events of a log area that extend a register, as dstack's logs carry boot events: without a name, the content as payload.
/// # Errors
/// As [`replay`], and [`AttestError::Length`] above [`EVENTS_MAX`].
pub fn events(area: &[u8]) -> Result<Vec<TdxEvent>, AttestError> {
    let mut log = tcg2::Log::begin(area, PART)?;
    let mut events = Vec::new();
    while let Some(event) = log.next()? {
        if event.index >= EVENTS_MAX {
            return Err(AttestError::Length { part: PART, length_bytes: log.count(), limit_bytes: EVENTS_MAX });
        }
        if let Some((_, digest)) = extension(&event)? {
            let (imr, event_type, event_payload) = (event.register.saturating_sub(1), event.event_type, event.content.to_vec());
            events.push(TdxEvent { imr, event_type, digest: digest.to_vec(), event_payload, ..TdxEvent::default() });
        }
    }
    Ok(events)
}

/// Which of the four registers an event extends, with what; `None` for a note.
fn extension(event: &tcg2::Event<'_>) -> Result<Option<(usize, Digest384)>, AttestError> {
    if event.is_note() {
        return Ok(None);
    }
    let at = (event.register as usize).checked_sub(1).filter(|at| *at < 4);
    let at = at.ok_or(AttestError::EventRegister { index: event.index, register: event.register })?;
    let digest = event.digest(ALGORITHM_SHA384).and_then(|digest| digest.try_into().ok());
    let digest = digest.ok_or(AttestError::Malformed { part: PART, why: "an event without a sha-384 digest" })?;
    Ok(Some((at, digest)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::eventlog::EV_NO_ACTION;

    const SIGNATURE: &[u8; 16] = b"Spec ID Event03\0";

    fn log(events: &[(u32, u32, u8)]) -> Vec<u8> {
        let mut spec = SIGNATURE.to_vec();
        spec.extend([0, 0, 0, 0, 0, 2, 0, 2, 1, 0, 0, 0, 0x0c, 0, 48, 0, 0]);
        let mut bytes = [&1u32.to_le_bytes()[..], &EV_NO_ACTION.to_le_bytes(), &[0; 20]].concat();
        bytes.extend(u32::try_from(spec.len()).unwrap().to_le_bytes());
        bytes.extend(spec);
        for (register, event_type, fill) in events {
            bytes.extend([register.to_le_bytes(), event_type.to_le_bytes(), 1u32.to_le_bytes()].concat());
            bytes.extend([0x0c, 0]);
            bytes.extend([*fill; 48]);
            bytes.extend([2, 0, 0, 0, b'h', b'i']);
        }
        bytes
    }

    #[test]
    fn replays_to_the_register_one_below_its_index() {
        let mut area = log(&[(1, 4, 7), (2, EV_NO_ACTION, 8), (3, 4, 9)]);
        area.resize(2000, 0xff);
        let replay = replay(&area).unwrap();
        let mut expected = [0; 48];
        extend(&mut expected, &[7; 48]);
        assert_eq!(replay.registers[0], expected);
        assert_eq!((replay.extended, replay.event_count), ([true, false, true, false], 3));
        assert_eq!(replay.check(&replay.registers.clone()), Ok(()));
        assert_eq!(replay.check(&[[0; 48]; 4]), Err(AttestError::ReplayMismatch { register: 0 }));
    }

    #[test]
    fn events_are_the_ones_that_are_replayed() {
        let area = log(&[(1, 4, 7), (2, EV_NO_ACTION, 8), (3, 10, 9)]);
        let listed = events(&area).unwrap();
        let seen: Vec<_> = listed.iter().map(|event| (event.imr, event.event_type, &event.digest[..2], &event.event_payload[..])).collect();
        assert_eq!(seen, [(0, 4, &[7, 7][..], &b"hi"[..]), (2, 10, &[9, 9][..], &b"hi"[..])]);
        let registers = replay(&area).unwrap().registers;
        assert!(crate::eventlog::prove_log(&listed, &registers).is_ok());
        assert_eq!(events(&log(&[(5, 4, 1)])), Err(AttestError::EventRegister { index: 0, register: 5 }));
    }

    #[test]
    fn refuses_registers_that_do_not_exist() {
        assert_eq!(replay(&log(&[(5, 4, 1)])), Err(AttestError::EventRegister { index: 0, register: 5 }));
        assert_eq!(replay(&log(&[(0, 4, 1)])), Err(AttestError::EventRegister { index: 0, register: 0 }));
    }

    #[test]
    fn refuses_an_empty_area_and_broken_fill() {
        let begin = AttestError::Malformed { part: PART, why: "does not begin with a spec id event" };
        assert_eq!(replay(&[0xff; 64]), Err(begin.clone()));
        assert_eq!(replay(&[]), Err(begin));
        let mut area = log(&[(1, 4, 7)]);
        area.extend([0xff; 20]);
        area.push(0);
        assert!(replay(&area).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_replay_or_are_refused(tail in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = replay(&tail);
            let _ = replay(&[log(&[(1, 4, 7)]), tail].concat());
        }

        #[test]
        fn any_cut_inside_an_event_is_refused(cut in 1usize..60) {
            let area = log(&[(1, 4, 7)]);
            prop_assert!(replay(&area[..area.len() - cut]).is_err());
        }
    }
}
