//! The crypto-agile event log of TCG firmware: one header that lists the digests' sizes, then events. Owns: its parser and its bounds.
//! Never: decides which register an index means or which events extend it (that is `ccel` for a TD, [`super::tpm`] for a TPM).
//! Source: TCG PC Client Platform Firmware Profile, sections 9.4.5 ("Spec ID Event03") and 10.2 (TCG_PCR_EVENT2).

use super::EV_NO_ACTION;
use crate::{AttestError, reader::Reader};

/// Largest log area: GCP reserves 256 KiB.
pub(super) const LOG_BYTES_MAX: usize = 4 * 1024 * 1024;

const SIGNATURE: &[u8; 16] = b"Spec ID Event03\0";
/// Digest algorithms a log may list; TPM banks number five.
const ALGORITHMS_MAX: usize = 8;

/// Sizes of the digests whose algorithm is known: SHA-1, SHA-256, SHA-384, SHA-512, SM3.
const SIZES: [(u16, usize); 5] = [(0x0004, 20), (0x000b, 32), (0x000c, 48), (0x000d, 64), (0x0012, 32)];

/// A log that is being read.
#[derive(Debug)]
pub(super) struct Log<'a> {
    part: &'static str,
    reader: Reader<'a>,
    algorithms: Vec<(u16, usize)>,
    count: usize,
}

/// One event after the header.
#[derive(Debug)]
pub(super) struct Event<'a> {
    /// Position after the header.
    pub(super) index: usize,
    /// Register it was extended into.
    pub(super) register: u32,
    /// TCG event type.
    pub(super) event_type: u32,
    digests: Vec<(u16, &'a [u8])>,
    /// What was measured, or a description of it.
    pub(super) content: &'a [u8],
}

impl<'a> Event<'a> {
    /// Its digest of `algorithm`.
    pub(super) fn digest(&self, algorithm: u16) -> Option<&'a [u8]> {
        self.digests.iter().find(|(listed, _)| *listed == algorithm).map(|(_, digest)| *digest)
    }

    /// Whether it is a note that extends nothing.
    pub(super) const fn is_note(&self) -> bool {
        self.event_type == EV_NO_ACTION
    }
}

impl<'a> Log<'a> {
    /// Reads the header of `area`; `part` names the log in errors.
    pub(super) fn begin(area: &'a [u8], part: &'static str) -> Result<Self, AttestError> {
        if area.len() > LOG_BYTES_MAX {
            return Err(AttestError::Length { part, length_bytes: area.len(), limit_bytes: LOG_BYTES_MAX });
        }
        let mut reader = Reader::new(area, part);
        let begin = AttestError::Malformed { part, why: "does not begin with a spec id event" };
        let algorithms = header(&mut reader, part).map_err(|_| begin)?;
        Ok(Self { part, reader, algorithms, count: 0 })
    }

    /// The next event, or `None` where only fill follows: all `0xff` or all zero.
    pub(super) fn next(&mut self) -> Result<Option<Event<'a>>, AttestError> {
        let rest = self.reader.rest();
        if rest.iter().all(|byte| *byte == 0xff) || rest.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        let malformed = |why| AttestError::Malformed { part: self.part, why };
        let reader = &mut self.reader;
        let (register, event_type) = (reader.u32()?, reader.u32()?);
        let count = reader.u32()? as usize;
        if count == 0 || count > self.algorithms.len() {
            return Err(malformed("an impossible number of digests"));
        }
        let mut digests: Vec<(u16, &[u8])> = Vec::with_capacity(count);
        for _ in 0..count {
            let algorithm = reader.u16()?;
            let size = self.algorithms.iter().find(|(listed, _)| *listed == algorithm).map(|(_, size)| *size);
            let digest = reader.take(size.ok_or_else(|| malformed("a digest of an algorithm that is not listed"))?)?;
            if digests.iter().any(|(earlier, _)| *earlier == algorithm) {
                return Err(malformed("two digests of one algorithm in one event"));
            }
            digests.push((algorithm, digest));
        }
        let size = reader.u32()? as usize;
        let content = reader.claimed(size, "event of the firmware log")?;
        let index = self.count;
        self.count = self.count.saturating_add(1);
        Ok(Some(Event { index, register, event_type, digests, content }))
    }

    /// Events read so far.
    pub(super) const fn count(&self) -> usize {
        self.count
    }
}

/// The first entry has the old form and lists the digest algorithms of all others.
fn header(reader: &mut Reader<'_>, part: &'static str) -> Result<Vec<(u16, usize)>, AttestError> {
    let malformed = |why| AttestError::Malformed { part, why };
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
        let known = SIZES.iter().find(|(known, _)| *known == algorithm);
        if repeated || size == 0 || size > 64 || known.is_some_and(|(_, known)| *known != size) {
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
