//! The data disk. Owns: the order format, header, passphrase, open, file system, swap. Never: an unencrypted disk where the kernel's
//! command line is not measured.
//! Source: util and deploy reference §5.

pub mod filesystem;
pub mod header;
pub mod luks;

use std::path::Path;

use dstack_protocol::Platform;
use dstack_secret::SecretBytes;

use super::compose::StorageFs;
use filesystem::{Contents, FilesystemError};
use luks::{Disk, LuksError};

/// Name of the opened disk below /dev/mapper.
pub const MAPPED_NAME: &str = "dstack_data_disk";

/// Why there is no data disk.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DiskError {
    /// LUKS.
    #[error("{0}")]
    Luks(#[from] LuksError),
    /// File system or swap.
    #[error("{0}")]
    Filesystem(#[from] FilesystemError),
    /// The kernel's command line turns encryption off where nobody measures it.
    #[error("dstack.storage_encrypted=0 on a platform whose kernel command line is not measured: a host could write it; refused")]
    Unencrypted,
}

/// What the kernel's command line says of the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KernelWishes {
    /// `dstack.storage_encrypted`, on unless it is 0.
    pub encrypted: bool,
    /// `dstack.storage_fs`.
    pub storage_fs: Option<StorageFs>,
}

impl KernelWishes {
    /// Reads a command line; the last of two counts, as in the kernel.
    #[must_use]
    pub fn parse(command_line: &str) -> Self {
        let mut wishes = Self { encrypted: true, storage_fs: None };
        for word in command_line.split_ascii_whitespace() {
            match word.split_once('=') {
                Some(("dstack.storage_encrypted", value)) => wishes.encrypted = !matches!(value, "0" | "false"),
                Some(("dstack.storage_fs", "zfs")) => wishes.storage_fs = Some(StorageFs::Zfs),
                Some(("dstack.storage_fs", "ext4")) => wishes.storage_fs = Some(StorageFs::Ext4),
                _ => {}
            }
        }
        wishes
    }

    /// The file system: the measured document's, the kernel's, zfs.
    #[must_use]
    pub fn file_system(&self, of_compose: Option<StorageFs>) -> StorageFs {
        of_compose.or(self.storage_fs).unwrap_or(StorageFs::Zfs)
    }

    /// Refuses a plain disk where the command line is not measured.
    ///
    /// # Errors
    /// [`DiskError::Unencrypted`].
    pub const fn require_measured(&self, platform: Platform) -> Result<(), DiskError> {
        match (self.encrypted, platform) {
            (true, _) | (false, Platform::Tdx) => Ok(()),
            (false, _) => Err(DiskError::Unencrypted),
        }
    }
}

/// What the disk shall be.
#[derive(Debug)]
pub struct Wanted<'a> {
    /// Block device, or an image file.
    pub disk: &'a Path,
    /// Where its file system goes.
    pub mount_point: &'a Path,
    /// `disk_crypt_key`.
    pub key: &'a SecretBytes,
    /// Kind of file system.
    pub file_system: StorageFs,
    /// Off only by a measured command line.
    pub encrypted: bool,
    /// Swap, bytes.
    pub swap_bytes: u64,
}

/// Opens the disk, or makes it where it is blank, and mounts it. Twice is once.
///
/// # Errors
/// [`DiskError`], whose words name the step.
pub fn open(wanted: &Wanted<'_>) -> Result<Disk, DiskError> {
    // before the disk is touched: one that is formatted for nothing is not blank any more
    filesystem::require(wanted.file_system)?;
    let (device, disk, contents) = if wanted.encrypted {
        let passphrase = luks::passphrase(wanted.key);
        let (header, disk) = luks::prepare(wanted.disk, &passphrase)?;
        tracing::info!(disk = %wanted.disk.display(), new = disk == Disk::New, "data disk has a header we take, and its key fits");
        // zeros deciphered are noise: whether anything was ever written tells the disk, not what is seen through the cipher
        let is_new = disk == Disk::New || header::has_no_data(wanted.disk).map_err(LuksError::from)?;
        let contents = if is_new { Contents::None } else { Contents::AsFound };
        (luks::open(wanted.disk, &header, MAPPED_NAME, &passphrase)?, disk, contents)
    } else {
        tracing::warn!(disk = %wanted.disk.display(), "the data disk is not encrypted, by the kernel's command line");
        (wanted.disk.to_owned(), Disk::Known, Contents::AsFound)
    };
    filesystem::mount(&device, contents, wanted.file_system, wanted.mount_point)?;
    filesystem::swap(wanted.mount_point, wanted.swap_bytes)?;
    Ok(disk)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::program::Program;

    #[test]
    fn the_kernels_wishes_are_read_and_judged() {
        let wishes = KernelWishes::parse("console=ttyS0 dstack.storage_fs=ext4 dstack.storage_encrypted=0 dstack.storage_fs=xfs\n");
        assert_eq!(wishes, KernelWishes { encrypted: false, storage_fs: Some(StorageFs::Ext4) });
        assert_eq!(wishes.file_system(Some(StorageFs::Zfs)), StorageFs::Zfs);
        assert_eq!(KernelWishes::parse("").file_system(None), StorageFs::Zfs);
        assert_eq!(wishes.require_measured(Platform::GcpTdx), Err(DiskError::Unencrypted));
        assert_eq!((wishes.require_measured(Platform::Tdx), KernelWishes::parse("").require_measured(Platform::GcpTdx)), (Ok(()), Ok(())));
    }

    /// Detached with its value.
    struct Loop(std::path::PathBuf);

    impl Drop for Loop {
        fn drop(&mut self) {
            let _ = Program::new("losetup", "mount").with(["-d"]).with([&self.0]).run();
        }
    }

    struct Mounted<'a>(&'a Path);

    impl Drop for Mounted<'_> {
        fn drop(&mut self) {
            let _ = Program::new("umount", "mount").with([self.0]).run();
        }
    }

    #[test]
    fn a_loop_device_is_made_mounted_and_known_again() {
        let dir = tempfile::tempdir().unwrap();
        let (image, mount_point) = (dir.path().join("image"), dir.path().join("data"));
        std::fs::File::create(&image).unwrap().set_len(64 << 20).unwrap();
        let attached = Program::new("losetup", "Debian package mount").with(["-f", "--show"]).with([&image]).run();
        let device = match attached {
            Ok(out) => Loop(String::from_utf8(out).unwrap().trim().into()),
            Err(error) => {
                eprintln!("left out: no loop device here ({error})");
                return;
            }
        };
        let key = SecretBytes::take(vec![7; 32]);
        let wanted = |encrypted, file_system| Wanted {
            disk: &device.0,
            mount_point: &mount_point,
            key: &key,
            file_system,
            encrypted,
            swap_bytes: 0,
        };
        if !Path::new("/dev/zfs").exists() {
            assert_eq!(open(&wanted(false, StorageFs::Zfs)), Err(FilesystemError::NoZfs.into()));
        }
        open(&wanted(false, StorageFs::Ext4)).unwrap();
        let _mounted = Mounted(&mount_point);
        std::fs::write(mount_point.join("kept"), "data").unwrap();
        open(&wanted(false, StorageFs::Ext4)).unwrap();
        assert_eq!(std::fs::read(mount_point.join("kept")).unwrap(), b"data");
        let refused = open(&wanted(true, StorageFs::Ext4)).unwrap_err();
        assert!(matches!(refused, DiskError::Luks(LuksError::Foreign { .. })), "a plain disk is not formatted over: {refused}");
    }
}
