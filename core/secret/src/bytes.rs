//! [`SecretBytes`]: secret bytes whose length is known at run time only. Owns: one allocation that never grows.

use std::fmt;

use subtle::{Choice, ConstantTimeEq};
use zeroize::{Zeroize, ZeroizeOnDrop};

/// Secret bytes of a length fixed at creation. Same promises as [`Secret`](crate::Secret); the length is not secret.
pub struct SecretBytes {
    bytes: Vec<u8>,
}

impl SecretBytes {
    /// Makes a secret of `len` bytes by letting `fill` write it where it will stay. The buffer starts as zeros.
    pub fn from_fn(len: usize, fill: impl FnOnce(&mut [u8])) -> Self {
        let mut secret = Self { bytes: vec![0; len] };
        fill(&mut secret.bytes);
        secret
    }

    /// As [`SecretBytes::from_fn`] for a source that can fail.
    ///
    /// # Errors
    /// What `fill` answers; a half written buffer is wiped.
    pub fn try_from_fn<E>(len: usize, fill: impl FnOnce(&mut [u8]) -> Result<(), E>) -> Result<Self, E> {
        let mut secret = Self { bytes: vec![0; len] };
        fill(&mut secret.bytes)?;
        Ok(secret)
    }

    /// Takes over a vector: no copy is made, its whole capacity is wiped on drop. Reallocations before are the caller's.
    pub fn take(bytes: Vec<u8>) -> Self {
        Self { bytes }
    }

    /// The one door out: lends the bytes to `use_it`. What the closure copies, it wipes.
    pub fn expose<T>(&self, use_it: impl FnOnce(&[u8]) -> T) -> T {
        use_it(&self.bytes)
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// True for a secret of no bytes.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }
}

impl Drop for SecretBytes {
    fn drop(&mut self) {
        self.bytes.zeroize();
    }
}

impl ZeroizeOnDrop for SecretBytes {}

impl ConstantTimeEq for SecretBytes {
    /// Constant time for equal lengths; a difference in length, which is public, answers at once.
    fn ct_eq(&self, other: &Self) -> Choice {
        self.bytes.as_slice().ct_eq(other.bytes.as_slice())
    }
}

impl PartialEq for SecretBytes {
    /// Compares in constant time.
    fn eq(&self, other: &Self) -> bool {
        self.ct_eq(other).into()
    }
}

impl Eq for SecretBytes {}

impl fmt::Debug for SecretBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SecretBytes({} bytes, redacted)", self.bytes.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_what_was_filled_in() {
        let secret = SecretBytes::from_fn(3, |b| b.copy_from_slice(b"abc"));
        assert_eq!(secret.len(), 3);
        assert!(!secret.is_empty());
        assert!(secret.expose(|b| b == b"abc"));
        assert_eq!(secret, SecretBytes::take(b"abc".to_vec()));
        assert_ne!(secret, SecretBytes::take(b"abd".to_vec()));
        assert_ne!(secret, SecretBytes::take(b"ab".to_vec()));
    }

    #[test]
    fn debug_shows_no_byte() {
        assert_eq!(format!("{:?}", SecretBytes::take(b"abc".to_vec())), "SecretBytes(3 bytes, redacted)");
    }
}
