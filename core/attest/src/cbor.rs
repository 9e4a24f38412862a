//! The subset of CBOR that COSE_Sign1 and NSM documents use, read off a slice. Owns: heads, strings, arrays and maps of
//! definite or indefinite length, skipping. Never: recurses, allocates by a length of the input, or copies.
//! A general decoder builds a tree, by recursion, from whatever a peer nests; this one follows the document's schema.
//! Source: RFC 8949; deterministic encoding is not required, since the signed bytes are taken as they came.

use crate::AttestError;

/// Values that may be nested inside a value that is skipped.
const SKIP_DEPTH_MAX: usize = 16;

/// Reads CBOR items off the front of a slice. `part` names in errors what was read.
pub(super) struct Reader<'a> {
    part: &'static str,
    rest: &'a [u8],
}

/// An item's head: major type and argument.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Head {
    Unsigned(u64),
    /// The value is `-1 - n`.
    Negative(u64),
    Bytes(Length),
    Text(Length),
    Array(Length),
    Map(Length),
    Tag(u64),
    Null,
    /// Other simple values and floats.
    Simple,
    /// Ends what was opened with [`Length::Indefinite`].
    Break,
}

/// How many bytes or items follow a head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Length {
    Of(u64),
    Indefinite,
}

impl<'a> Reader<'a> {
    pub(super) const fn new(part: &'static str, bytes: &'a [u8]) -> Self {
        Self { part, rest: bytes }
    }

    const fn malformed(&self, why: &'static str) -> AttestError {
        AttestError::Malformed { part: self.part, why }
    }

    fn take(&mut self, count: u64) -> Result<&'a [u8], AttestError> {
        let split = usize::try_from(count).ok().and_then(|count| self.rest.split_at_checked(count));
        let (taken, rest) = split.ok_or(self.malformed("ends inside an item"))?;
        self.rest = rest;
        Ok(taken)
    }

    fn argument(&mut self, bytes: u64) -> Result<u64, AttestError> {
        Ok(self.take(bytes)?.iter().fold(0, |value, byte| (value << 8) | u64::from(*byte)))
    }

    pub(super) fn head(&mut self) -> Result<Head, AttestError> {
        let first = self.argument(1)?;
        let (major, minor) = (first >> 5, first & 0x1f);
        let argument = match minor {
            0..=23 => Some(minor),
            24 => Some(self.argument(1)?),
            25 => Some(self.argument(2)?),
            26 => Some(self.argument(4)?),
            27 => Some(self.argument(8)?),
            31 => None,
            _ => return Err(self.malformed("a reserved length form")),
        };
        let length = argument.map_or(Length::Indefinite, Length::Of);
        match (major, argument) {
            (0, Some(value)) => Ok(Head::Unsigned(value)),
            (1, Some(value)) => Ok(Head::Negative(value)),
            (2, _) => Ok(Head::Bytes(length)),
            (3, _) => Ok(Head::Text(length)),
            (4, _) => Ok(Head::Array(length)),
            (5, _) => Ok(Head::Map(length)),
            (6, Some(value)) => Ok(Head::Tag(value)),
            (7, Some(_)) => Ok(if minor == 22 { Head::Null } else { Head::Simple }),
            (7, None) => Ok(Head::Break),
            _ => Err(self.malformed("an integer or tag of indefinite length")),
        }
    }

    /// The body of a string whose head was just read. Strings in chunks are refused: no NSM writes them.
    pub(super) fn body(&mut self, length: Length) -> Result<&'a [u8], AttestError> {
        match length {
            Length::Of(count) => self.take(count),
            Length::Indefinite => Err(self.malformed("a string in chunks")),
        }
    }

    pub(super) fn text_body(&mut self, length: Length) -> Result<&'a str, AttestError> {
        let body = self.body(length)?;
        std::str::from_utf8(body).map_err(|_| self.malformed("text is not utf-8"))
    }

    /// A byte string, or an error that says `field` is of another type.
    pub(super) fn bytes(&mut self, field: &'static str) -> Result<&'a [u8], AttestError> {
        match self.head()? {
            Head::Bytes(length) => self.body(length),
            _ => Err(AttestError::Field { field, why: "not a byte string" }),
        }
    }

    /// Whether another item of an array or map follows; counts a definite one down, eats the break of an indefinite one.
    pub(super) fn more(&mut self, length: &mut Length) -> Result<bool, AttestError> {
        match length {
            Length::Of(0) => Ok(false),
            Length::Of(left) => {
                *left = left.saturating_sub(1);
                Ok(true)
            }
            Length::Indefinite => match self.rest.split_first() {
                None => Err(self.malformed("ends inside an array or map")),
                Some((0xff, rest)) => {
                    self.rest = rest;
                    Ok(false)
                }
                Some(_) => Ok(true),
            },
        }
    }

    /// Passes over one item. A stack of bounded depth stands for the recursion.
    pub(super) fn skip(&mut self) -> Result<(), AttestError> {
        // items still owed at each level; `None` until a break
        let mut open: Vec<Option<u64>> = vec![Some(1)];
        while let Some(level) = open.last_mut() {
            match level {
                Some(0) => {
                    open.pop();
                    continue;
                }
                Some(left) => *left = left.saturating_sub(1),
                None if self.rest.first() == Some(&0xff) => {
                    self.take(1)?;
                    open.pop();
                    continue;
                }
                None => {}
            }
            let owed = match self.head()? {
                Head::Unsigned(_) | Head::Negative(_) | Head::Null | Head::Simple => continue,
                Head::Bytes(length) | Head::Text(length) => {
                    self.body(length)?;
                    continue;
                }
                Head::Break => return Err(self.malformed("a break outside of an array or map")),
                Head::Tag(_) => Some(1),
                Head::Array(Length::Of(count)) => Some(count),
                Head::Map(Length::Of(count)) => Some(count.saturating_mul(2)),
                Head::Array(Length::Indefinite) | Head::Map(Length::Indefinite) => None,
            };
            if open.len() > SKIP_DEPTH_MAX {
                return Err(self.malformed("nested too deep"));
            }
            open.push(owed);
        }
        Ok(())
    }

    /// Nothing may be left.
    pub(super) const fn end(self) -> Result<(), AttestError> {
        if self.rest.is_empty() { Ok(()) } else { Err(AttestError::TrailingBytes { part: self.part, count_bytes: self.rest.len() }) }
    }
}

/// Appends the head of a byte string and its body.
pub(super) fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    let [_, _, high, low] = length.to_be_bytes();
    match length {
        0..=23 => out.push(0x40 | low),
        24..=0xff => out.extend_from_slice(&[0x58, low]),
        0x100..=0xffff => out.extend_from_slice(&[0x59, high, low]),
        _ => {
            out.push(0x5a);
            out.extend_from_slice(&length.to_be_bytes());
        }
    }
    out.extend_from_slice(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn skips_what_a_general_decoder_writes() {
        use ciborium::Value;
        let inner = Value::Map(vec![(Value::Text("k".into()), Value::Array(vec![Value::Null, Value::Float(1.5), Value::Bool(true)]))]);
        let value = Value::Tag(30, Box::new(Value::Array(vec![inner, Value::Integer((-5).into()), Value::Bytes(vec![1; 300])])));
        let mut bytes = Vec::new();
        ciborium::into_writer(&value, &mut bytes).unwrap();
        bytes.push(0x05);
        let mut reader = Reader::new("test", &bytes);
        reader.skip().unwrap();
        assert_eq!(reader.head(), Ok(Head::Unsigned(5)));
        reader.end().unwrap();
    }

    #[test]
    fn skips_indefinite_items_and_refuses_depth_and_stray_breaks() {
        let skip = |bytes: &[u8]| {
            let mut reader = Reader::new("test", bytes);
            reader.skip().and_then(|()| reader.end())
        };
        assert_eq!(skip(&[0x9f, 0x01, 0xbf, 0x61, b'a', 0x02, 0xff, 0xff]), Ok(()));
        assert_eq!(skip(&[0xff]), Err(AttestError::Malformed { part: "test", why: "a break outside of an array or map" }));
        assert_eq!(skip(&[0x81; 10_000]), Err(AttestError::Malformed { part: "test", why: "nested too deep" }));
        assert_eq!(
            skip(&[0x9b, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]),
            Err(AttestError::Malformed { part: "test", why: "ends inside an item" })
        );
    }

    #[test]
    fn byte_strings_have_the_shortest_head() {
        for length in [0, 23, 24, 255, 256, 65_535, 65_536] {
            let mut ours = Vec::new();
            put_bytes(&mut ours, &vec![7; length]);
            let mut theirs = Vec::new();
            ciborium::into_writer(&ciborium::Value::Bytes(vec![7; length]), &mut theirs).unwrap();
            assert_eq!(ours, theirs);
        }
    }
}
