//! SCALE primitives. Owns: reading and writing of the few SCALE types the attestation uses. Never: allocates by a
//! count or length that the input does not hold. Source: dstack attestation reference, section 2.

use crate::AttestError;

/// Reads SCALE values off the front of a slice.
pub(super) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(super) const fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    pub(super) fn take(&mut self, count: usize, part: &'static str) -> Result<&'a [u8], AttestError> {
        let truncated = AttestError::Truncated { part, need_bytes: count, have_bytes: self.rest.len() };
        let (taken, rest) = self.rest.split_at_checked(count).ok_or(truncated)?;
        self.rest = rest;
        Ok(taken)
    }

    pub(super) fn array<const N: usize>(&mut self, part: &'static str) -> Result<[u8; N], AttestError> {
        let truncated = AttestError::Truncated { part, need_bytes: N, have_bytes: self.rest.len() };
        self.take(N, part)?.try_into().map_err(|_| truncated)
    }

    pub(super) fn u8(&mut self, part: &'static str) -> Result<u8, AttestError> {
        self.array::<1>(part).map(|[byte]| byte)
    }

    pub(super) fn u32(&mut self, part: &'static str) -> Result<u32, AttestError> {
        self.array(part).map(u32::from_le_bytes)
    }

    /// A compact integer that counts bytes or items. Only the shortest form is taken; the big form (2^30 and more)
    /// cannot fit the size cap and is refused.
    fn compact(&mut self, part: &'static str) -> Result<usize, AttestError> {
        let first = self.u8(part)?;
        let (value, least) = match first & 3 {
            0 => (u32::from(first >> 2), 0),
            1 => (u32::from(u16::from_le_bytes([first, self.u8(part)?]) >> 2), 1 << 6),
            2 => {
                let [b, c, d] = self.array(part)?;
                (u32::from_le_bytes([first, b, c, d]) >> 2, 1 << 14)
            }
            _ => return Err(AttestError::Length { part, length_bytes: usize::MAX, limit_bytes: self.rest.len() }),
        };
        if value < least {
            return Err(AttestError::Malformed { part, why: "length is not in its shortest form" });
        }
        usize::try_from(value).map_err(|_| AttestError::Length { part, length_bytes: usize::MAX, limit_bytes: self.rest.len() })
    }

    /// `Vec<u8>`.
    pub(super) fn bytes(&mut self, part: &'static str) -> Result<&'a [u8], AttestError> {
        let length_bytes = self.compact(part)?;
        if length_bytes > self.rest.len() {
            return Err(AttestError::Length { part, length_bytes, limit_bytes: self.rest.len() });
        }
        self.take(length_bytes, part)
    }

    /// `String`.
    pub(super) fn text(&mut self, part: &'static str) -> Result<String, AttestError> {
        let bytes = self.bytes(part)?;
        std::str::from_utf8(bytes).map(str::to_owned).map_err(|_| AttestError::Malformed { part, why: "text is not utf-8" })
    }

    /// `Vec<T>` of at most `count_max` items, each at least `item_bytes_min` long.
    pub(super) fn vec<T>(
        &mut self,
        part: &'static str,
        count_max: usize,
        item_bytes_min: usize,
        mut item: impl FnMut(&mut Self) -> Result<T, AttestError>,
    ) -> Result<Vec<T>, AttestError> {
        let count = self.compact(part)?;
        let limit = count_max.min(self.rest.len() / item_bytes_min.max(1));
        if count > limit {
            return Err(AttestError::Length { part, length_bytes: count, limit_bytes: limit });
        }
        (0..count).map(|_| item(self)).collect()
    }

    /// All that is left.
    pub(super) const fn rest(self) -> &'a [u8] {
        self.rest
    }

    /// Nothing may be left.
    pub(super) fn end(self, part: &'static str) -> Result<(), AttestError> {
        if self.rest.is_empty() { Ok(()) } else { Err(AttestError::TrailingBytes { part, count_bytes: self.rest.len() }) }
    }
}

/// Appends a compact integer.
pub(super) fn put_compact(out: &mut Vec<u8>, value: usize) {
    let value = u64::try_from(value).unwrap_or(u64::MAX);
    match value {
        0..=0x3f => out.push((value << 2) as u8),
        0x40..=0x3fff => out.extend_from_slice(&((value << 2) as u16 | 1).to_le_bytes()),
        0x4000..=0x3fff_ffff => out.extend_from_slice(&((value << 2) as u32 | 2).to_le_bytes()),
        _ => {
            let bytes = value.to_le_bytes();
            let used = 8_usize.saturating_sub(value.leading_zeros() as usize / 8).max(4);
            out.push(((used as u8).saturating_sub(4) << 2) | 3);
            out.extend(bytes.into_iter().take(used));
        }
    }
}

/// Appends `Vec<u8>` or `String`.
pub(super) fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    put_compact(out, bytes.len());
    out.extend_from_slice(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compact_integers_have_one_form() {
        for value in [0, 1, 63, 64, 16_383, 16_384, 0x3fff_ffff] {
            let mut out = Vec::new();
            put_compact(&mut out, value);
            let mut reader = Reader::new(&out);
            assert_eq!(reader.compact("count"), Ok(value));
            reader.end("count").unwrap();
        }
        let mut big = Vec::new();
        put_compact(&mut big, 0x4000_0000);
        assert_eq!(big, [0x03, 0, 0, 0, 0x40]);
        for bytes in [&[0x01_u8, 0x00][..], &[0x02, 0x01, 0x00, 0x00]] {
            let refused = AttestError::Malformed { part: "count", why: "length is not in its shortest form" };
            assert_eq!(Reader::new(bytes).compact("count"), Err(refused));
        }
    }

    #[test]
    fn a_count_beyond_the_input_is_refused_before_any_item() {
        let mut reader = Reader::new(&[0xfe, 0xff, 0x01, 0x00, 1, 2]);
        let refused = AttestError::Length { part: "events", length_bytes: 0x7fff, limit_bytes: 2 };
        assert_eq!(reader.vec("events", 100_000, 1, |r| r.u8("event")), Err(refused));
    }
}
