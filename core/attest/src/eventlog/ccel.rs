//! The firmware's own event log (CCEL): TCG2 crypto-agile form, SHA-384 bank. Owns: its parser and replay.
//! Never: judges what an event describes. Register index 1 to 4 of the log is RTMR0 to RTMR3.
//! Source: TCG PC Client Platform Firmware Profile, "crypto agile log format"; UEFI "confidential computing", table CCEL.

use super::{Digest384, EV_NO_ACTION, extend};
use crate::{AttestError, reader::Reader};

/// Largest log area: GCP reserves 256 KiB.
pub const CCEL_BYTES_MAX: usize = 4 * 1024 * 1024;

const ALGORITHM_SHA384: u16 = 0x000c;
const SIGNATURE: &[u8; 16] = b"Spec ID Event03\0";
/// Digest algorithms a log may list; TPM banks number five.
const ALGORITHMS_MAX: usize = 8;
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
    if area.len() > CCEL_BYTES_MAX {
        return Err(AttestError::Length { part: PART, length_bytes: area.len(), limit_bytes: CCEL_BYTES_MAX });
    }
    let mut reader = Reader::new(area, PART);
    let algorithms = header(&mut reader).map_err(|_| AttestError::Malformed { part: PART, why: "does not begin with a spec id event" })?;
    let mut replay = Replay { registers: [[0; 48]; 4], extended: [false; 4], event_count: 0 };
    while !is_fill(reader.rest()) {
        event(&mut reader, &algorithms, &mut replay)?;
    }
    Ok(replay)
}

fn is_fill(rest: &[u8]) -> bool {
    rest.iter().all(|byte| *byte == 0xff) || rest.iter().all(|byte| *byte == 0)
}

/// The first entry has the old form and lists the digest algorithms of all others.
fn header(reader: &mut Reader<'_>) -> Result<Vec<(u16, usize)>, AttestError> {
    let malformed = |why| AttestError::Malformed { part: PART, why };
    reader.take(4)?;
    if reader.u32()? != EV_NO_ACTION {
        return Err(malformed("first entry extends a register"));
    }
    reader.take(20)?;
    let size = reader.u32()? as usize;
    let mut spec = Reader::new(reader.claimed(size, "spec id event")?, "spec id event");
    if spec.array()? != *SIGNATURE {
        return Err(malformed("another signature"));
    }
    spec.take(4 + 4)?; // platform class; version minor, major, errata, size of a native integer
    let count = spec.u32()? as usize;
    if count == 0 || count > ALGORITHMS_MAX {
        return Err(malformed("an impossible number of algorithms"));
    }
    let mut algorithms = Vec::with_capacity(count);
    for _ in 0..count {
        let (algorithm, size) = (spec.u16()?, usize::from(spec.u16()?));
        let repeated = algorithms.iter().any(|(listed, _)| *listed == algorithm);
        if repeated || size == 0 || size > 64 || (algorithm == ALGORITHM_SHA384) != (size == 48) {
            return Err(malformed("an impossible algorithm"));
        }
        algorithms.push((algorithm, size));
    }
    let vendor_size = usize::from(spec.u8()?);
    spec.claimed(vendor_size, "vendor data of the spec id event")?;
    match spec.remaining() {
        0 => Ok(algorithms),
        _ => Err(malformed("its spec id event is longer than its content")),
    }
}

fn event(reader: &mut Reader<'_>, algorithms: &[(u16, usize)], replay: &mut Replay) -> Result<(), AttestError> {
    let malformed = |why| AttestError::Malformed { part: PART, why };
    let index = replay.event_count;
    let register = reader.u32()?;
    let event_type = reader.u32()?;
    let count = reader.u32()? as usize;
    if count == 0 || count > algorithms.len() {
        return Err(malformed("an impossible number of digests"));
    }
    let mut sha384 = None;
    for _ in 0..count {
        let algorithm = reader.u16()?;
        let size = algorithms.iter().find(|(listed, _)| *listed == algorithm).map(|(_, size)| *size);
        let digest = reader.take(size.ok_or_else(|| malformed("a digest of an algorithm that is not listed"))?)?;
        if algorithm == ALGORITHM_SHA384 {
            let twice = sha384.replace(digest).is_some();
            if twice {
                return Err(malformed("two sha-384 digests in one event"));
            }
        }
    }
    let size = reader.u32()? as usize;
    reader.claimed(size, "event of the ccel")?;
    replay.event_count = replay.event_count.saturating_add(1);
    if event_type == EV_NO_ACTION {
        return Ok(());
    }
    let bad_register = AttestError::EventRegister { index, register };
    let at = (register as usize).checked_sub(1).ok_or_else(|| bad_register.clone())?;
    let (Some(value), Some(extended)) = (replay.registers.get_mut(at), replay.extended.get_mut(at)) else {
        return Err(bad_register);
    };
    let digest = sha384.ok_or_else(|| malformed("an event without a sha-384 digest"))?;
    extend(value, digest.try_into().map_err(|_| malformed("a sha-384 digest of another size"))?);
    *extended = true;
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

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
