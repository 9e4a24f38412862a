//! [`Locked`]: a long-lived secret on memory pages of its own. Owns: mapping, locking and unmapping those pages.
//! Never: fails because the system refuses a protection; what is missing is told as a [`LockWarning`].
//!
//! A page of its own, because page locks do not nest: unlocking one secret would unlock its neighbours on the same page.

#![expect(unsafe_code, reason = "anonymous mappings have no safe interface; each block says why it is sound")]

use std::fmt;
use std::ptr::NonNull;

use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mlock, mmap_anonymous, munmap};
use subtle::{Choice, ConstantTimeEq};
use zeroize::{Zeroize, ZeroizeOnDrop};

use crate::Secret;

/// `N` secret bytes for the life of a process: shares, node keys, platform keys. Kept out of swap (`mlock`), core dumps
/// (`MADV_DONTDUMP`) and forked children (`MADV_WIPEONFORK`) as far as the system grants it; see [`Locked::warnings`].
pub struct Locked<const N: usize> {
    home: Home<N>,
    warnings: Vec<LockWarning>,
}

/// A protection that the system refused. The secret is usable; the operator is told (usually `RLIMIT_MEMLOCK` is too low).
#[non_exhaustive]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LockWarning {
    /// No own page could be mapped: the secret stays on the heap with no protection but wiping.
    NotMapped(Errno),
    /// The page may be written to swap.
    NotLocked(Errno),
    /// The page would be part of a core dump.
    InCoreDumps(Errno),
    /// A forked child would inherit a copy.
    SharedWithChildren(Errno),
}

impl fmt::Display for LockWarning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotMapped(e) => write!(f, "secret has no page of its own: {e}"),
            Self::NotLocked(e) => write!(f, "secret can be swapped out, raise RLIMIT_MEMLOCK: {e}"),
            Self::InCoreDumps(e) => write!(f, "secret would be part of a core dump: {e}"),
            Self::SharedWithChildren(e) => {
                write!(f, "secret would be copied to forked children: {e}")
            }
        }
    }
}

enum Home<const N: usize> {
    Page(Page<N>),
    Heap(Secret<N>),
}

impl<const N: usize> Locked<N> {
    /// Moves `secret` to locked memory; the heap copy is wiped.
    pub fn new(secret: Secret<N>) -> Self {
        let mut warnings = Vec::new();
        let home = match Page::map(&mut warnings) {
            Ok(mut page) => {
                secret.expose(|bytes| page.bytes_mut().copy_from_slice(bytes));
                Home::Page(page)
            }
            Err(errno) => {
                warnings.push(LockWarning::NotMapped(errno));
                Home::Heap(secret)
            }
        };
        Self { home, warnings }
    }

    /// Lends the bytes to `use_it`, as [`Secret::expose`].
    pub fn expose<T>(&self, use_it: impl FnOnce(&[u8; N]) -> T) -> T {
        match &self.home {
            Home::Page(page) => use_it(page.bytes()),
            Home::Heap(secret) => secret.expose(use_it),
        }
    }

    /// The protections that the system refused; empty where all hold. Log them once, at creation.
    pub fn warnings(&self) -> &[LockWarning] {
        &self.warnings
    }
}

impl<const N: usize> From<Secret<N>> for Locked<N> {
    fn from(secret: Secret<N>) -> Self {
        Self::new(secret)
    }
}

impl<const N: usize> ZeroizeOnDrop for Locked<N> {}

impl<const N: usize> ConstantTimeEq for Locked<N> {
    fn ct_eq(&self, other: &Self) -> Choice {
        self.expose(|a| other.expose(|b| a.as_slice().ct_eq(b.as_slice())))
    }
}

impl<const N: usize> PartialEq for Locked<N> {
    /// Compares in constant time.
    fn eq(&self, other: &Self) -> bool {
        self.ct_eq(other).into()
    }
}

impl<const N: usize> Eq for Locked<N> {}

impl<const N: usize> fmt::Debug for Locked<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Locked<{N}>(redacted)")
    }
}

/// An anonymous private mapping that begins with `N` bytes of secret.
struct Page<const N: usize> {
    start: NonNull<[u8; N]>,
    len: usize,
}

// SAFETY: the mapping is owned by this value alone and has no thread affinity; shared references only read.
unsafe impl<const N: usize> Send for Page<N> {}
// SAFETY: as above; writing needs `&mut`.
unsafe impl<const N: usize> Sync for Page<N> {}

impl<const N: usize> Page<N> {
    /// Maps zeroed memory and asks for the protections; refusals are appended to `warnings`.
    fn map(warnings: &mut Vec<LockWarning>) -> Result<Self, Errno> {
        let len = N.max(1);
        // SAFETY: a null hint without MAP_FIXED never replaces an existing mapping.
        let start = unsafe { mmap_anonymous(std::ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE)? };
        let page = Self { start: NonNull::new(start.cast()).ok_or(Errno::NOMEM)?, len };
        // SAFETY: the three calls name exactly the mapping just made; none of them changes what may be read or written.
        let (locked, dump, fork) =
            unsafe { (mlock(start, len), madvise(start, len, Advice::LinuxDontDump), madvise(start, len, Advice::LinuxWipeOnFork)) };
        warnings.extend(locked.err().map(LockWarning::NotLocked));
        warnings.extend(dump.err().map(LockWarning::InCoreDumps));
        warnings.extend(fork.err().map(LockWarning::SharedWithChildren));
        Ok(page)
    }

    fn bytes(&self) -> &[u8; N] {
        // SAFETY: `start` is page aligned, mapped readable for `len >= N` bytes until drop, initialised (zeros), and only
        // written through `&mut self`.
        unsafe { self.start.as_ref() }
    }

    fn bytes_mut(&mut self) -> &mut [u8; N] {
        // SAFETY: as in `bytes`; `&mut self` makes the reference unique.
        unsafe { self.start.as_mut() }
    }
}

impl<const N: usize> Drop for Page<N> {
    fn drop(&mut self) {
        self.bytes_mut().zeroize();
        // SAFETY: the mapping is ours, no reference into it outlives `self`. Unmapping also unlocks. It can fail only for
        // arguments that `mmap` did not return; the bytes are wiped either way.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_bytes_and_compares_by_value() {
        let a = Locked::new(Secret::<32>::from_fn(|b| b.fill(3)));
        let b = Locked::from(Secret::<32>::from_fn(|b| b.fill(3)));
        let c = Locked::new(Secret::<32>::from_fn(|b| b.fill(4)));
        assert!(a.expose(|x| x == &[3; 32]));
        assert_eq!(a, b);
        assert_ne!(a, c);
        assert_eq!(format!("{a:?}"), "Locked<32>(redacted)");
    }

    #[test]
    fn the_kernel_reports_the_page_as_locked_and_undumped() {
        let secret = Locked::new(Secret::<32>::from_fn(|b| b.fill(3)));
        let address = secret.expose(|b| b.as_ptr() as usize);
        let flags = vm_flags(address);
        let refused = |w: fn(&LockWarning) -> bool| secret.warnings().iter().any(w);
        // `lo` locked, `dd` do not dump, `wf` wipe on fork (proc_pid_smaps(5)): set unless a warning says otherwise.
        assert_ne!(flags.contains(&"lo".to_owned()), refused(|w| matches!(w, LockWarning::NotLocked(_))));
        assert_ne!(flags.contains(&"dd".to_owned()), refused(|w| matches!(w, LockWarning::InCoreDumps(_))));
        assert_ne!(flags.contains(&"wf".to_owned()), refused(|w| matches!(w, LockWarning::SharedWithChildren(_))));
        let elsewhere = Box::new([0u8; 32]);
        assert!(!vm_flags(elsewhere.as_ptr() as usize).contains(&"dd".to_owned()));
    }

    #[test]
    fn many_secrets_beyond_the_lock_limit_still_work() {
        let many: Vec<_> = (0..3000u32).map(|i| Locked::new(Secret::<4>::from_fn(|b| *b = i.to_be_bytes()))).collect();
        for (i, secret) in (0u32..).zip(&many) {
            assert!(secret.expose(|b| b == &i.to_be_bytes()));
        }
    }

    #[test]
    fn is_send_and_sync() {
        let secret = std::sync::Arc::new(Locked::new(Secret::<8>::from_fn(|b| b.fill(5))));
        let other = secret.clone();
        let same = std::thread::spawn(move || other.expose(|b| b == &[5; 8])).join().unwrap();
        assert!(same && secret.expose(|b| b == &[5; 8]));
    }

    /// The `VmFlags` of the mapping that contains `address`.
    fn vm_flags(address: usize) -> Vec<String> {
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut inside = false;
        for line in maps.lines() {
            if let Some((range, _)) = line.split_once(' ')
                && let Some((low, high)) = range.split_once('-')
                && let (Ok(low), Ok(high)) = (usize::from_str_radix(low, 16), usize::from_str_radix(high, 16))
            {
                inside = (low..high).contains(&address);
            }
            if inside && let Some(flags) = line.strip_prefix("VmFlags: ") {
                return flags.split_whitespace().map(str::to_owned).collect();
            }
        }
        panic!("no mapping contains {address:#x}");
    }
}
