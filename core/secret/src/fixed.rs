//! [`Secret`]: `N` secret bytes on the heap. Owns: filling in place, exposure, comparison, wiping.
//! Never: lets the bytes be cloned, printed or serialized.

use std::fmt;

use subtle::{Choice, ConstantTimeEq};
use zeroize::{Zeroize, ZeroizeOnDrop};

/// `N` secret bytes. Wiped on drop, compared in constant time, redacted in `Debug`; no `Clone`, `Copy`, `Display` or serde.
///
/// The bytes live in one heap allocation from creation to drop: moving the value moves a pointer.
pub struct Secret<const N: usize> {
    bytes: Box<[u8; N]>,
}

/// A slice of the wrong length was offered as a secret. Caller's fault; the slice has been wiped all the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WrongLength {
    /// Length of the secret's type.
    pub want: usize,
    /// Length of the slice.
    pub have: usize,
}

impl fmt::Display for WrongLength {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a secret of {} bytes cannot be made of {} bytes", self.want, self.have)
    }
}

impl std::error::Error for WrongLength {}

impl<const N: usize> Secret<N> {
    /// Makes a secret by letting `fill` write it where it will stay. The buffer starts as zeros.
    pub fn from_fn(fill: impl FnOnce(&mut [u8; N])) -> Self {
        let mut secret = Self { bytes: Box::new([0; N]) };
        fill(&mut secret.bytes);
        secret
    }

    /// As [`Secret::from_fn`] for a source that can fail.
    ///
    /// # Errors
    /// What `fill` answers; a half written buffer is wiped.
    pub fn try_from_fn<E>(fill: impl FnOnce(&mut [u8; N]) -> Result<(), E>) -> Result<Self, E> {
        let mut secret = Self { bytes: Box::new([0; N]) };
        fill(&mut secret.bytes)?;
        Ok(secret)
    }

    /// Moves the bytes out of `source` and wipes `source`.
    pub fn take(source: &mut [u8; N]) -> Self {
        let secret = Self::from_fn(|bytes| bytes.copy_from_slice(source));
        source.zeroize();
        secret
    }

    /// Moves the bytes out of a slice and wipes it, also when its length is wrong.
    ///
    /// # Errors
    /// [`WrongLength`] when `source` is not `N` bytes long.
    pub fn take_slice(source: &mut [u8]) -> Result<Self, WrongLength> {
        let have = source.len();
        let secret = Self::try_from_fn(|bytes| {
            let source: &[u8; N] = (&*source).try_into().map_err(|_| WrongLength { want: N, have })?;
            bytes.copy_from_slice(source);
            Ok(())
        });
        source.zeroize();
        secret
    }

    /// The one door out: lends the bytes to `use_it`. What the closure copies, it wipes.
    pub fn expose<T>(&self, use_it: impl FnOnce(&[u8; N]) -> T) -> T {
        use_it(&self.bytes)
    }

    /// Lends the bytes for writing, for sources that fill in pieces.
    pub fn expose_mut<T>(&mut self, use_it: impl FnOnce(&mut [u8; N]) -> T) -> T {
        use_it(&mut self.bytes)
    }
}

impl<const N: usize> Drop for Secret<N> {
    fn drop(&mut self) {
        self.bytes.zeroize();
    }
}

impl<const N: usize> ZeroizeOnDrop for Secret<N> {}

impl<const N: usize> ConstantTimeEq for Secret<N> {
    fn ct_eq(&self, other: &Self) -> Choice {
        self.bytes.as_slice().ct_eq(other.bytes.as_slice())
    }
}

impl<const N: usize> PartialEq for Secret<N> {
    /// Compares in constant time.
    fn eq(&self, other: &Self) -> bool {
        self.ct_eq(other).into()
    }
}

impl<const N: usize> Eq for Secret<N> {}

impl<const N: usize> fmt::Debug for Secret<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Secret<{N}>(redacted)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn take_moves_the_bytes_and_wipes_the_source() {
        let mut source = [7u8; 32];
        let secret = Secret::take(&mut source);
        assert_eq!(source, [0u8; 32]);
        assert!(secret.expose(|b| b == &[7u8; 32]));
    }

    #[test]
    fn a_slice_of_wrong_length_is_refused_and_wiped() {
        let mut source = vec![9u8; 31];
        let error = Secret::<32>::take_slice(&mut source).unwrap_err();
        assert_eq!(error, WrongLength { want: 32, have: 31 });
        assert_eq!(source, vec![0u8; 31]);
        assert_eq!(error.to_string(), "a secret of 32 bytes cannot be made of 31 bytes");
    }

    #[test]
    fn compares_by_value() {
        let a = Secret::<4>::from_fn(|b| b.copy_from_slice(&[1, 2, 3, 4]));
        let b = Secret::<4>::from_fn(|b| b.copy_from_slice(&[1, 2, 3, 4]));
        let c = Secret::<4>::from_fn(|b| b.copy_from_slice(&[1, 2, 3, 5]));
        assert_eq!(a, b);
        assert_ne!(a, c);
    }

    #[test]
    fn debug_shows_no_byte() {
        let secret = Secret::<4>::from_fn(|b| b.copy_from_slice(&[222, 173, 190, 239]));
        assert_eq!(format!("{secret:?}"), "Secret<4>(redacted)");
    }

    #[test]
    fn a_failing_source_gives_its_error() {
        let error = Secret::<4>::try_from_fn(|_| Err("no entropy")).unwrap_err();
        assert_eq!(error, "no entropy");
    }

    #[test]
    fn bytes_do_not_move_with_the_value() {
        let secret = Secret::<16>::from_fn(|b| b.fill(1));
        let before = secret.expose(|b| b.as_ptr() as usize);
        let moved = Box::new(secret);
        assert_eq!(moved.expose(|b| b.as_ptr() as usize), before);
    }
}
