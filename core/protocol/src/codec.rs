//! Strict binary codec: big-endian integers, length prefixes, labels.
//!
//! Owns: [`Reader`], [`Writer`], [`Wire`], [`DecodeError`]. Never: allocates more than the input justifies; every list
//! is bounded by the bytes that are left. Source: threshold.md §0 ("every format ends exactly where its layout ends").

/// Why bytes are not the format they were said to be. The sender's fault: refuse, never retry unchanged.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The input ends inside a field.
    #[error("truncated: {field} needs {need} bytes, {have} left")]
    Truncated {
        /// Field being read.
        field: &'static str,
        /// Bytes the field needs.
        need: usize,
        /// Bytes that are left.
        have: usize,
    },
    /// Bytes are left after the last field.
    #[error("{extra} trailing bytes")]
    Trailing {
        /// How many.
        extra: usize,
    },
    /// The label at the start is not the one of this format.
    #[error("not a {expected} (label differs)")]
    Label {
        /// The label that was expected.
        expected: &'static str,
    },
    /// The format's version is not one this build reads.
    #[error("version {got} of {format} is not supported")]
    Version {
        /// Name of the format.
        format: &'static str,
        /// Version found.
        got: u8,
    },
    /// A field holds a value outside its type.
    #[error("field {field}: {reason}")]
    Field {
        /// Name of the field.
        field: &'static str,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A field or the whole input is longer than its cap.
    #[error("{field} has {got} bytes, at most {max} allowed")]
    TooLong {
        /// Name of the field.
        field: &'static str,
        /// The cap.
        max: usize,
        /// What came.
        got: usize,
    },
    /// A list that must be strictly ascending is not.
    #[error("list {field} is not strictly ascending")]
    Order {
        /// Name of the list.
        field: &'static str,
    },
}

/// A byte format: one encoding per value, strict decoding.
pub trait Wire: Sized {
    /// Largest encoding accepted, in bytes.
    const BYTES_MAX: usize;
    /// Appends the encoding.
    fn write(&self, w: &mut Writer);
    /// Reads one value; leaves the reader behind it.
    ///
    /// # Errors
    /// [`DecodeError`] names the field.
    fn read(r: &mut Reader<'_>) -> Result<Self, DecodeError>;
    /// The whole encoding.
    fn encode(&self) -> Vec<u8> {
        let mut w = Writer::default();
        self.write(&mut w);
        w.into_bytes()
    }
    /// Decodes exactly `bytes`.
    ///
    /// # Errors
    /// [`DecodeError`]; trailing bytes are one.
    fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        if bytes.len() > Self::BYTES_MAX {
            return Err(DecodeError::TooLong { field: "input", max: Self::BYTES_MAX, got: bytes.len() });
        }
        let mut r = Reader::new(bytes);
        let value = Self::read(&mut r)?;
        r.finish()?;
        Ok(value)
    }
}

/// Reads fields from the front of a byte slice.
#[derive(Debug)]
pub struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    /// Starts at the front of `bytes`.
    #[must_use]
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// Bytes not read yet.
    #[must_use]
    pub fn remaining(&self) -> usize {
        self.rest.len()
    }

    /// Takes `count` bytes.
    ///
    /// # Errors
    /// [`DecodeError::Truncated`].
    pub fn take(&mut self, field: &'static str, count: usize) -> Result<&'a [u8], DecodeError> {
        match self.rest.split_at_checked(count) {
            Some((head, tail)) => {
                self.rest = tail;
                Ok(head)
            }
            None => Err(DecodeError::Truncated { field, need: count, have: self.rest.len() }),
        }
    }

    /// Takes a fixed array.
    ///
    /// # Errors
    /// [`DecodeError::Truncated`].
    pub fn array<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], DecodeError> {
        let mut out = [0u8; N];
        out.copy_from_slice(self.take(field, N)?);
        Ok(out)
    }

    /// One byte.
    ///
    /// # Errors
    /// [`DecodeError::Truncated`].
    pub fn u8(&mut self, field: &'static str) -> Result<u8, DecodeError> {
        self.array(field).map(u8::from_be_bytes)
    }

    /// Two bytes, big-endian.
    ///
    /// # Errors
    /// [`DecodeError::Truncated`].
    pub fn u16(&mut self, field: &'static str) -> Result<u16, DecodeError> {
        self.array(field).map(u16::from_be_bytes)
    }

    /// Four bytes, big-endian.
    ///
    /// # Errors
    /// [`DecodeError::Truncated`].
    pub fn u32(&mut self, field: &'static str) -> Result<u32, DecodeError> {
        self.array(field).map(u32::from_be_bytes)
    }

    /// Eight bytes, big-endian.
    ///
    /// # Errors
    /// [`DecodeError::Truncated`].
    pub fn u64(&mut self, field: &'static str) -> Result<u64, DecodeError> {
        self.array(field).map(u64::from_be_bytes)
    }

    /// A byte that must be 0 or 1.
    ///
    /// # Errors
    /// [`DecodeError::Field`].
    pub fn flag(&mut self, field: &'static str) -> Result<bool, DecodeError> {
        match self.u8(field)? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(DecodeError::Field { field, reason: "flag is neither 0 nor 1" }),
        }
    }

    /// `lp(b)`: two-byte length, then the bytes; at most `max`.
    ///
    /// # Errors
    /// [`DecodeError::TooLong`], [`DecodeError::Truncated`].
    pub fn lp(&mut self, field: &'static str, max: usize) -> Result<&'a [u8], DecodeError> {
        let got = usize::from(self.u16(field)?);
        if got > max {
            return Err(DecodeError::TooLong { field, max, got });
        }
        self.take(field, got)
    }

    /// `lp4(b)`: four-byte length, then the bytes; at most `max`.
    ///
    /// # Errors
    /// [`DecodeError::TooLong`], [`DecodeError::Truncated`].
    pub fn lp4(&mut self, field: &'static str, max: usize) -> Result<&'a [u8], DecodeError> {
        let got = usize::try_from(self.u32(field)?).unwrap_or(usize::MAX);
        if got > max {
            return Err(DecodeError::TooLong { field, max, got });
        }
        self.take(field, got)
    }

    /// Takes an ASCII label.
    ///
    /// # Errors
    /// [`DecodeError::Label`] when the bytes differ or are too few.
    pub fn label(&mut self, expected: &'static str) -> Result<(), DecodeError> {
        match self.rest.strip_prefix(expected.as_bytes()) {
            Some(tail) => {
                self.rest = tail;
                Ok(())
            }
            None => Err(DecodeError::Label { expected }),
        }
    }

    /// Takes a label and the version byte 1 that follows it.
    ///
    /// # Errors
    /// [`DecodeError::Label`], [`DecodeError::Version`].
    pub fn label_v1(&mut self, expected: &'static str) -> Result<(), DecodeError> {
        self.label(expected)?;
        match self.u8("version")? {
            1 => Ok(()),
            got => Err(DecodeError::Version { format: expected, got }),
        }
    }

    /// Reads `count` items; refuses a count that the remaining bytes cannot hold.
    ///
    /// # Errors
    /// [`DecodeError::Truncated`] before anything is allocated, or the item's own error.
    pub fn list<T>(
        &mut self,
        field: &'static str,
        count: usize,
        item_bytes_min: usize,
        mut item: impl FnMut(&mut Self) -> Result<T, DecodeError>,
    ) -> Result<Vec<T>, DecodeError> {
        let need = count.saturating_mul(item_bytes_min.max(1));
        if need > self.rest.len() {
            return Err(DecodeError::Truncated { field, need, have: self.rest.len() });
        }
        (0..count).map(|_| item(self)).collect()
    }

    /// Everything that is left.
    pub fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.rest)
    }

    /// Checks that nothing is left.
    ///
    /// # Errors
    /// [`DecodeError::Trailing`].
    pub fn finish(self) -> Result<(), DecodeError> {
        match self.rest.len() {
            0 => Ok(()),
            extra => Err(DecodeError::Trailing { extra }),
        }
    }
}

/// Checks that `keys` ascend strictly.
///
/// # Errors
/// [`DecodeError::Order`].
pub fn ascending<T: Ord>(field: &'static str, mut keys: impl Iterator<Item = T>) -> Result<(), DecodeError> {
    let Some(mut last) = keys.next() else {
        return Ok(());
    };
    for key in keys {
        if key <= last {
            return Err(DecodeError::Order { field });
        }
        last = key;
    }
    Ok(())
}

/// Appends fields to a byte vector.
#[derive(Debug, Default)]
pub struct Writer {
    bytes: Vec<u8>,
}

impl Writer {
    /// A writer that begins with `label`.
    #[must_use]
    pub fn labelled(label: &str) -> Self {
        let mut w = Self::default();
        w.raw(label.as_bytes());
        w
    }

    /// Makes room for `count` more bytes.
    pub fn reserve(&mut self, count: usize) -> &mut Self {
        self.bytes.reserve(count);
        self
    }

    /// Appends bytes as they are.
    pub fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(bytes);
        self
    }

    /// Appends a label and version byte 1.
    pub fn label_v1(&mut self, label: &str) -> &mut Self {
        self.raw(label.as_bytes()).u8(1)
    }

    /// One byte.
    pub fn u8(&mut self, value: u8) -> &mut Self {
        self.raw(&[value])
    }

    /// Two bytes, big-endian.
    pub fn u16(&mut self, value: u16) -> &mut Self {
        self.raw(&value.to_be_bytes())
    }

    /// Four bytes, big-endian.
    pub fn u32(&mut self, value: u32) -> &mut Self {
        self.raw(&value.to_be_bytes())
    }

    /// Eight bytes, big-endian.
    pub fn u64(&mut self, value: u64) -> &mut Self {
        self.raw(&value.to_be_bytes())
    }

    /// `lp(bytes)`.
    ///
    /// # Panics
    /// When `bytes` is longer than 65535: constructors and decoders of every type keep its fields far below.
    pub fn lp(&mut self, bytes: &[u8]) -> &mut Self {
        let len = u16::try_from(bytes.len()).expect("fields under lp are capped below 64 KiB");
        self.u16(len).raw(bytes)
    }

    /// `lp4(bytes)`.
    ///
    /// # Panics
    /// When `bytes` is longer than 4 GiB.
    pub fn lp4(&mut self, bytes: &[u8]) -> &mut Self {
        let len = u32::try_from(bytes.len()).expect("fields under lp4 are capped below 4 GiB");
        self.u32(len).raw(bytes)
    }

    /// A list length as one byte.
    ///
    /// # Panics
    /// When `count` is above 255: lists are capped in `limits`.
    pub fn count1(&mut self, count: usize) -> &mut Self {
        self.u8(u8::try_from(count).expect("list is capped below 256"))
    }

    /// A list length as two bytes.
    ///
    /// # Panics
    /// When `count` is above 65535: lists are capped in `limits`.
    pub fn count2(&mut self, count: usize) -> &mut Self {
        self.u16(u16::try_from(count).expect("list is capped below 65536"))
    }

    /// The bytes written.
    #[must_use]
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    /// Appends another value's encoding.
    pub fn value(&mut self, value: &impl Wire) -> &mut Self {
        value.write(self);
        self
    }
}

/// SHA-256 of the concatenation of `parts`.
#[must_use]
pub fn sha256(parts: &[&[u8]]) -> [u8; 32] {
    use sha2::Digest as _;
    let mut h = sha2::Sha256::new();
    for part in parts {
        h.update(part);
    }
    h.finalize().into()
}

/// SHA-512 of the concatenation of `parts`.
#[must_use]
pub fn sha512(parts: &[&[u8]]) -> [u8; 64] {
    use sha2::Digest as _;
    let mut h = sha2::Sha512::new();
    for part in parts {
        h.update(part);
    }
    h.finalize().into()
}
