//! A cursor over foreign bytes that never reads past their end. Owns: bounds. Never: allocates, interprets a field.

use crate::AttestError;

/// Reads fields from the front of a slice: little-endian ones, and big-endian ones where the name says so.
#[derive(Debug, Clone)]
pub(crate) struct Reader<'a> {
    rest: &'a [u8],
    part: &'static str,
}

impl<'a> Reader<'a> {
    /// Starts at the front of `bytes`; `part` names them in errors.
    pub(crate) const fn new(bytes: &'a [u8], part: &'static str) -> Self {
        Self { rest: bytes, part }
    }

    pub(crate) const fn remaining(&self) -> usize {
        self.rest.len()
    }

    pub(crate) const fn rest(&self) -> &'a [u8] {
        self.rest
    }

    pub(crate) fn take(&mut self, size_bytes: usize) -> Result<&'a [u8], AttestError> {
        let truncated = AttestError::Truncated { part: self.part, need_bytes: size_bytes, have_bytes: self.rest.len() };
        let (head, tail) = self.rest.split_at_checked(size_bytes).ok_or(truncated)?;
        self.rest = tail;
        Ok(head)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], AttestError> {
        let truncated = AttestError::Truncated { part: self.part, need_bytes: N, have_bytes: self.rest.len() };
        let (head, tail) = self.rest.split_first_chunk::<N>().ok_or(truncated)?;
        self.rest = tail;
        Ok(*head)
    }

    pub(crate) fn u8(&mut self) -> Result<u8, AttestError> {
        let [byte] = self.array()?;
        Ok(byte)
    }

    pub(crate) fn u16(&mut self) -> Result<u16, AttestError> {
        self.array().map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, AttestError> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn u16_be(&mut self) -> Result<u16, AttestError> {
        self.array().map(u16::from_be_bytes)
    }

    pub(crate) fn u32_be(&mut self) -> Result<u32, AttestError> {
        self.array().map(u32::from_be_bytes)
    }

    pub(crate) fn u64_be(&mut self) -> Result<u64, AttestError> {
        self.array().map(u64::from_be_bytes)
    }

    /// Reads a buffer with its length before it in two bytes (TPM2B).
    pub(crate) fn sized_be(&mut self) -> Result<&'a [u8], AttestError> {
        let size = self.u16_be()?;
        self.take(usize::from(size))
    }

    /// Reads `size_bytes` that a length field before them claims; too many is the length's fault.
    pub(crate) fn claimed(&mut self, size_bytes: usize, field: &'static str) -> Result<&'a [u8], AttestError> {
        if size_bytes > self.rest.len() {
            return Err(AttestError::Length { part: field, length_bytes: size_bytes, limit_bytes: self.rest.len() });
        }
        self.take(size_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stops_at_the_end() {
        let mut reader = Reader::new(&[1, 0, 2], "test");
        assert_eq!(reader.u16(), Ok(1));
        assert_eq!(reader.u32(), Err(AttestError::Truncated { part: "test", need_bytes: 4, have_bytes: 1 }));
        assert_eq!(reader.u8(), Ok(2));
        assert_eq!(reader.remaining(), 0);
    }

    #[test]
    fn blames_a_length_that_claims_too_much() {
        let mut reader = Reader::new(&[1, 2, 3], "test");
        assert_eq!(reader.claimed(4, "length field"), Err(AttestError::Length { part: "length field", length_bytes: 4, limit_bytes: 3 }));
        assert_eq!(reader.claimed(3, "length field"), Ok(&[1, 2, 3][..]));
    }
}
