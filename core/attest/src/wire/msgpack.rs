//! msgpack primitives. Owns: reading and writing of the few msgpack types the attestation uses. Never: recurses,
//! or allocates by a count or length that the input does not hold. Source: the MessagePack specification.

use crate::AttestError;

/// Most members of one map that is read by name; the largest known one has 7.
const MEMBERS_MAX: usize = 32;

/// Reads msgpack values off the front of a slice.
pub(super) struct Reader<'a> {
    rest: &'a [u8],
}

/// Kind and size of the value at the front.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Head {
    Nil,
    Bool,
    Unsigned(u64),
    Negative,
    /// Body of that many bytes: a float or an extension with its type.
    Opaque(usize),
    Text(usize),
    Bin(usize),
    Array(usize),
    Map(usize),
}

impl<'a> Reader<'a> {
    pub(super) const fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    fn take(&mut self, count: usize, part: &'static str) -> Result<&'a [u8], AttestError> {
        let truncated = AttestError::Truncated { part, need_bytes: count, have_bytes: self.rest.len() };
        let (taken, rest) = self.rest.split_at_checked(count).ok_or(truncated)?;
        self.rest = rest;
        Ok(taken)
    }

    fn number(&mut self, bytes: usize, part: &'static str) -> Result<u64, AttestError> {
        Ok(self.take(bytes, part)?.iter().fold(0, |value, byte| (value << 8) | u64::from(*byte)))
    }

    fn size(&mut self, bytes: usize, part: &'static str) -> Result<usize, AttestError> {
        let size = self.number(bytes, part)?;
        usize::try_from(size).map_err(|_| AttestError::Length { part, length_bytes: usize::MAX, limit_bytes: self.rest.len() })
    }

    fn head(&mut self, part: &'static str) -> Result<Head, AttestError> {
        let first = self.number(1, part)? as u8;
        Ok(match first {
            0x00..=0x7f => Head::Unsigned(first.into()),
            0x80..=0x8f => Head::Map((first & 0x0f).into()),
            0x90..=0x9f => Head::Array((first & 0x0f).into()),
            0xa0..=0xbf => Head::Text((first & 0x1f).into()),
            0xc0 => Head::Nil,
            0xc1 => return Err(AttestError::Malformed { part, why: "byte c1 is not used by msgpack" }),
            0xc2 | 0xc3 => Head::Bool,
            0xc4 => Head::Bin(self.size(1, part)?),
            0xc5 => Head::Bin(self.size(2, part)?),
            0xc6 => Head::Bin(self.size(4, part)?),
            0xc7 => Head::Opaque(self.size(1, part)?.saturating_add(1)),
            0xc8 => Head::Opaque(self.size(2, part)?.saturating_add(1)),
            0xc9 => Head::Opaque(self.size(4, part)?.saturating_add(1)),
            0xca => Head::Opaque(4),
            0xcb => Head::Opaque(8),
            0xcc => Head::Unsigned(self.number(1, part)?),
            0xcd => Head::Unsigned(self.number(2, part)?),
            0xce => Head::Unsigned(self.number(4, part)?),
            0xcf => Head::Unsigned(self.number(8, part)?),
            0xd0 => signed(self.number(1, part)?, 1),
            0xd1 => signed(self.number(2, part)?, 2),
            0xd2 => signed(self.number(4, part)?, 4),
            0xd3 => signed(self.number(8, part)?, 8),
            0xd4 => Head::Opaque(2),
            0xd5 => Head::Opaque(3),
            0xd6 => Head::Opaque(5),
            0xd7 => Head::Opaque(9),
            0xd8 => Head::Opaque(17),
            0xd9 => Head::Text(self.size(1, part)?),
            0xda => Head::Text(self.size(2, part)?),
            0xdb => Head::Text(self.size(4, part)?),
            0xdc => Head::Array(self.size(2, part)?),
            0xdd => Head::Array(self.size(4, part)?),
            0xde => Head::Map(self.size(2, part)?),
            0xdf => Head::Map(self.size(4, part)?),
            0xe0..=0xff => Head::Negative,
        })
    }

    pub(super) fn unsigned(&mut self, part: &'static str) -> Result<u64, AttestError> {
        match self.head(part)? {
            Head::Unsigned(value) => Ok(value),
            _ => Err(AttestError::Field { field: part, why: "not an unsigned integer" }),
        }
    }

    pub(super) fn u32(&mut self, part: &'static str) -> Result<u32, AttestError> {
        u32::try_from(self.unsigned(part)?).map_err(|_| AttestError::Field { field: part, why: "more than 32 bits" })
    }

    pub(super) fn text(&mut self, part: &'static str) -> Result<&'a str, AttestError> {
        match self.head(part)? {
            Head::Text(size) => {
                std::str::from_utf8(self.take(size, part)?).map_err(|_| AttestError::Malformed { part, why: "text is not utf-8" })
            }
            _ => Err(AttestError::Field { field: part, why: "not a text" }),
        }
    }

    /// Bytes in either form that writers use: bin, or an array of integers up to 255.
    pub(super) fn bytes(&mut self, part: &'static str) -> Result<Vec<u8>, AttestError> {
        match self.head(part)? {
            Head::Bin(size) => Ok(self.take(size, part)?.to_vec()),
            Head::Array(count) => {
                self.check_count(count, part)?;
                let mut bytes = Vec::with_capacity(count);
                for _ in 0..count {
                    let value = self.unsigned(part)?;
                    bytes.push(
                        u8::try_from(value).map_err(|_| AttestError::Field { field: part, why: "an integer above 255 among bytes" })?,
                    );
                }
                Ok(bytes)
            }
            _ => Err(AttestError::Field { field: part, why: "not bytes" }),
        }
    }

    fn check_count(&self, count: usize, part: &'static str) -> Result<(), AttestError> {
        let limit_bytes = self.rest.len();
        if count > limit_bytes { Err(AttestError::Length { part, length_bytes: count, limit_bytes }) } else { Ok(()) }
    }

    /// An array of at most `count_max` items.
    pub(super) fn array<T>(
        &mut self,
        part: &'static str,
        count_max: usize,
        mut item: impl FnMut(&mut Self) -> Result<T, AttestError>,
    ) -> Result<Vec<T>, AttestError> {
        let Head::Array(count) = self.head(part)? else {
            return Err(AttestError::Field { field: part, why: "not an array" });
        };
        self.check_count(count, part)?;
        if count > count_max {
            return Err(AttestError::Length { part, length_bytes: count, limit_bytes: count_max });
        }
        (0..count).map(|_| item(self)).collect()
    }

    /// Takes a nil if one is next.
    pub(super) fn nil(&mut self) -> bool {
        let is_nil = self.rest.first() == Some(&0xc0);
        if let (true, Some(rest)) = (is_nil, self.rest.get(1..)) {
            self.rest = rest;
        }
        is_nil
    }

    /// Length of the array that starts here, its items left to be read.
    pub(super) fn array_header(&mut self, part: &'static str) -> Result<usize, AttestError> {
        match self.head(part)? {
            Head::Array(count) => Ok(count),
            _ => Err(AttestError::Field { field: part, why: "not an array" }),
        }
    }

    /// A map with text keys: its members as slices, in any order, each name once.
    pub(super) fn map(&mut self, part: &'static str) -> Result<Map<'a>, AttestError> {
        let Head::Map(count) = self.head(part)? else {
            return Err(AttestError::Field { field: part, why: "not a map" });
        };
        if count > MEMBERS_MAX {
            return Err(AttestError::Length { part, length_bytes: count, limit_bytes: MEMBERS_MAX });
        }
        let mut members: Vec<(&str, &[u8])> = Vec::with_capacity(count);
        for _ in 0..count {
            let name = self.text(part)?;
            if members.iter().any(|(known, _)| *known == name) {
                return Err(AttestError::Malformed { part, why: "a member occurs twice" });
            }
            members.push((name, self.skip(part)?));
        }
        Ok(Map { part, members })
    }

    /// Passes over one value of any depth, without recursion: an open count stands for the values still owed.
    fn skip(&mut self, part: &'static str) -> Result<&'a [u8], AttestError> {
        let before = self.rest;
        let mut owed: usize = 1;
        while owed > 0 {
            owed = owed.saturating_sub(1);
            match self.head(part)? {
                Head::Nil | Head::Bool | Head::Unsigned(_) | Head::Negative => {}
                Head::Opaque(size) | Head::Text(size) | Head::Bin(size) => {
                    self.take(size, part)?;
                }
                Head::Array(count) => {
                    self.check_count(count, part)?;
                    owed = owed.saturating_add(count);
                }
                Head::Map(count) => {
                    self.check_count(count, part)?;
                    owed = owed.saturating_add(count.saturating_mul(2));
                }
            }
        }
        let used = before.len().saturating_sub(self.rest.len());
        Ok(before.get(..used).unwrap_or_default())
    }

    /// Nothing may be left.
    pub(super) fn end(self, part: &'static str) -> Result<(), AttestError> {
        if self.rest.is_empty() { Ok(()) } else { Err(AttestError::TrailingBytes { part, count_bytes: self.rest.len() }) }
    }
}

const fn signed(value: u64, bytes: u32) -> Head {
    let sign = 1_u64 << (bytes * 8 - 1);
    if value & sign == 0 { Head::Unsigned(value) } else { Head::Negative }
}

/// Members of a map, read by name.
pub(super) struct Map<'a> {
    part: &'static str,
    members: Vec<(&'a str, &'a [u8])>,
}

impl<'a> Map<'a> {
    /// The member of that name, if there.
    pub(super) fn optional(&self, name: &'static str) -> Option<Reader<'a>> {
        self.members.iter().find(|(known, _)| *known == name).map(|(_, value)| Reader::new(value))
    }

    /// The member of that name.
    pub(super) fn member(&self, name: &'static str) -> Result<Reader<'a>, AttestError> {
        let part = self.part;
        self.optional(name).ok_or(AttestError::Field { field: name, why: missing_from(part) })
    }
}

/// Why a member cannot be read; errors hold static texts only.
fn missing_from(part: &'static str) -> &'static str {
    match part {
        "attestation" => "missing from the attestation",
        "platform" => "missing from the platform",
        "stack" => "missing from the stack",
        _ => "missing",
    }
}

pub(super) fn put_map(out: &mut Vec<u8>, members: usize) {
    put_size(out, members, Some((0x80, 15)), [None, Some(0xde), Some(0xdf)]);
}

pub(super) fn put_array(out: &mut Vec<u8>, items: usize) {
    put_size(out, items, Some((0x90, 15)), [None, Some(0xdc), Some(0xdd)]);
}

pub(super) fn put_text(out: &mut Vec<u8>, text: &str) {
    put_size(out, text.len(), Some((0xa0, 31)), [Some(0xd9), Some(0xda), Some(0xdb)]);
    out.extend_from_slice(text.as_bytes());
}

pub(super) fn put_bin(out: &mut Vec<u8>, bytes: &[u8]) {
    put_size(out, bytes.len(), None, [Some(0xc4), Some(0xc5), Some(0xc6)]);
    out.extend_from_slice(bytes);
}

/// Bytes as an array of integers.
pub(super) fn put_int_array(out: &mut Vec<u8>, bytes: &[u8]) {
    put_array(out, bytes.len());
    bytes.iter().for_each(|byte| put_unsigned(out, (*byte).into()));
}

pub(super) fn put_unsigned(out: &mut Vec<u8>, value: u64) {
    let [.., c, d, e, f] = value.to_be_bytes();
    match value {
        0..=0x7f => out.push(f),
        0x80..=0xff => out.extend_from_slice(&[0xcc, f]),
        0x100..=0xffff => out.extend_from_slice(&[0xcd, e, f]),
        0x1_0000..=0xffff_ffff => out.extend_from_slice(&[0xce, c, d, e, f]),
        _ => {
            out.push(0xcf);
            out.extend_from_slice(&value.to_be_bytes());
        }
    }
}

/// The smallest head that holds `size`: the one-byte form (base, most), then 8, 16 and 32 bits where they exist.
fn put_size(out: &mut Vec<u8>, size: usize, short: Option<(u8, u8)>, long: [Option<u8>; 3]) {
    // more than 32 bits cannot occur: evidence is capped at 10 MiB long before
    let size = u32::try_from(size).unwrap_or(u32::MAX);
    let [c, d, e, f] = size.to_be_bytes();
    match (short, long) {
        (Some((base, most)), _) if size <= most.into() => out.push(base | f),
        (_, [Some(head), ..]) if size <= 0xff => out.extend_from_slice(&[head, f]),
        (_, [_, Some(head), _]) if size <= 0xffff => out.extend_from_slice(&[head, e, f]),
        (_, [_, _, head]) => {
            out.extend(head);
            out.extend_from_slice(&[c, d, e, f]);
        }
    }
}
