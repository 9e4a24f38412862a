//! sled's checksums have no key, so an adversary makes them right again. Owns: finding whole messages in a sled log file, altering one
//! and renewing its CRC-32; the same for sled's snapshot and configuration files. (redb's checksums form a tree up to its commit slot;
//! forging it is not done here.)

use std::path::Path;

use crate::arguments::Seeded;

/// Alters something under a CRC-32 of `bytes` (the file at `path`) and renews the checksum. None if the file has none.
pub(crate) fn forge(path: &Path, bytes: &mut [u8], seeded: &mut Seeded) -> Option<String> {
    let name = path.file_name()?.to_str()?;
    if !path.components().any(|part| part.as_os_str() == "sled") {
        return None;
    }
    if name == "db" {
        return forge_message(bytes, seeded);
    }
    let body = bytes.len().checked_sub(4)?;
    let (body, checksum) = bytes.split_at_mut_checked(body)?;
    let story = alter(body, seeded);
    checksum.copy_from_slice(&crc32(&[body]).to_le_bytes());
    Some(format!("{story} under a renewed checksum"))
}

struct Message {
    at: usize,
    header: usize,
    body: usize,
}

fn forge_message(bytes: &mut [u8], seeded: &mut Seeded) -> Option<String> {
    let messages = messages(bytes);
    let Message { at, header, body } = messages.get(seeded.size_below(messages.len()))?;
    let message = bytes.get_mut(*at..at.checked_add(*header)?.checked_add(*body)?)?;
    // One in five alters the header (kind, length, segment, page) instead of the body.
    let story = if seeded.below(5) == 0 || *body == 0 {
        alter(message.get_mut(4..*header)?, seeded)
    } else {
        alter(message.get_mut(*header..)?, seeded)
    };
    let (head, tail) = message.split_at_mut_checked(*header)?;
    let checksum = crc32(&[tail, head.get(4..)?]) ^ u32::MAX;
    head.get_mut(..4)?.copy_from_slice(&checksum.to_le_bytes());
    Some(format!("message at {at}: {story}, under a renewed checksum"))
}

/// Messages of a log file whose checksums are right.
fn messages(bytes: &[u8]) -> Vec<Message> {
    let mut found = Vec::new();
    for segment in (0..bytes.len()).step_by(SEGMENT_BYTES) {
        let mut at = segment.saturating_add(SEGMENT_HEADER_BYTES);
        while let Some(message) = message_at(bytes, at) {
            at = at.saturating_add(message.header).saturating_add(message.body);
            found.push(message);
        }
    }
    found
}

fn message_at(bytes: &[u8], at: usize) -> Option<Message> {
    let message = bytes.get(at..)?;
    let stored = u32::from_le_bytes(*message.first_chunk()?);
    let mut header = 5;
    let body = usize::try_from(number(message, &mut header)?).ok()?;
    number(message, &mut header)?;
    number(message, &mut header)?;
    let end = header.checked_add(body)?;
    let checksum = crc32(&[message.get(header..end)?, message.get(4..header)?]) ^ u32::MAX;
    (checksum == stored).then_some(Message { at, header, body })
}

/// sled's numbers of 1 to 9 bytes.
fn number(bytes: &[u8], at: &mut usize) -> Option<u64> {
    let first = *bytes.get(*at)?;
    let byte = |distance: usize| bytes.get(at.checked_add(distance)?).copied().map(u64::from);
    let (value, size) = match first {
        0..=240 => (u64::from(first), 1),
        241..=248 => (u64::from(first).checked_sub(241)?.checked_mul(256)?.checked_add(byte(1)?)?.checked_add(240)?, 2),
        249 => (byte(1)?.checked_mul(256)?.checked_add(byte(2)?)?.checked_add(2288)?, 3),
        _ => {
            let count = usize::from(first).checked_sub(247)?;
            let mut value = 0u64;
            for distance in (1..=count).rev() {
                value = value.checked_shl(8)? | byte(distance)?;
            }
            (value, count.checked_add(1)?)
        }
    };
    *at = at.checked_add(size)?;
    Some(value)
}

fn alter(bytes: &mut [u8], seeded: &mut Seeded) -> String {
    let first = seeded.size_below(bytes.len().min(24));
    let at = if seeded.below(2) == 0 { first } else { seeded.size_below(bytes.len()) };
    let garbage = match seeded.below(4) {
        0 => vec![255; 9],
        1 => vec![0; 4],
        2 => seeded.some_bytes(1),
        _ => seeded.some_bytes(8),
    };
    for (byte, new) in bytes.iter_mut().skip(at).zip(&garbage) {
        *byte = *new;
    }
    format!("{} bytes at {at}", garbage.len())
}

/// CRC-32 (IEEE), bit by bit.
fn crc32(parts: &[&[u8]]) -> u32 {
    let mut crc = u32::MAX;
    for byte in parts.iter().flat_map(|part| part.iter()) {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { (crc >> 1) ^ 0xedb8_8320 } else { crc >> 1 };
        }
    }
    crc ^ u32::MAX
}

const SEGMENT_BYTES: usize = 512 << 10;
const SEGMENT_HEADER_BYTES: usize = 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc_is_the_common_one() {
        assert_eq!(crc32(&[b"1234", b"56789"]), 0xcbf4_3926);
    }
}
