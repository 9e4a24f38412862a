//! The file system of the data disk, and swap in it. Owns: making it once, mounting it, a swap file. Never: makes one where there is one.
//! Source: util and deploy reference §5, §3 step 9.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use crate::files::FileError;
use crate::program::{Program, ProgramError};
use crate::setup::compose::StorageFs;

/// Name of the ZFS pool.
const POOL: &str = "dstack";
/// Magic number of ext2 to ext4, at 1024 + 56.
const EXT_MAGIC_AT: usize = 1080;
/// Least swap that is made.
const SWAP_BYTES_MIN: u64 = 1 << 20;

/// Why there is no file system.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FilesystemError {
    /// This kernel has no ZFS. Operator's to fix: another image, or `"storage_fs": "ext4"` (which changes the compose hash).
    #[error(
        "storage_fs is zfs, but this kernel has none (no /dev/zfs): take an image with ZFS, or write \"storage_fs\": \"ext4\" into app-compose.json"
    )]
    NoZfs,
    /// Neither blank nor of the wished kind. Operator's to decide.
    #[error("{} holds another file system than {wanted}: attach the right disk, or wipe it if its data is given up", .device.display())]
    Foreign {
        /// The device.
        device: PathBuf,
        /// What was wished.
        wanted: &'static str,
    },
    /// Something else is mounted there.
    #[error("{} is mounted already, and not from {}", .mount_point.display(), .device.display())]
    Mounted {
        /// Where.
        mount_point: PathBuf,
        /// The device that should be there.
        device: PathBuf,
    },
    /// A program is missing or failed.
    #[error("{0}")]
    Program(#[from] ProgramError),
    /// A file cannot be made.
    #[error("{0}")]
    File(#[from] FileError),
}

/// What is known of the device before it is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Contents {
    /// Nothing was ever written to it; what is read is no data, though it need not be zeros.
    None,
    /// What is found counts.
    AsFound,
}

/// Whether this kernel has the file system.
///
/// # Errors
/// [`FilesystemError::NoZfs`].
pub fn require(kind: StorageFs) -> Result<(), FilesystemError> {
    match kind {
        StorageFs::Zfs if !Path::new("/dev/zfs").exists() => Err(FilesystemError::NoZfs),
        StorageFs::Zfs | StorageFs::Ext4 => Ok(()),
    }
}

/// Mounts `device`, making its file system first where it is blank. Twice is once.
///
/// # Errors
/// [`FilesystemError`].
pub fn mount(device: &Path, contents: Contents, kind: StorageFs, mount_point: &Path) -> Result<(), FilesystemError> {
    fs::create_dir_all(mount_point).map_err(|error| FileError::system("make", mount_point, &error))?;
    if let Some(source) = source_of(mount_point)? {
        let is_ours = source == device.to_string_lossy() || kind == StorageFs::Zfs && source.starts_with(POOL);
        let mounted = || FilesystemError::Mounted { mount_point: mount_point.to_owned(), device: device.to_owned() };
        return is_ours.then_some(()).ok_or_else(mounted);
    }
    match kind {
        StorageFs::Ext4 => ext4(device, contents, mount_point),
        StorageFs::Zfs => zfs(device, contents, mount_point),
    }
}

fn ext4(device: &Path, contents: Contents, mount_point: &Path) -> Result<(), FilesystemError> {
    match beginning(device, contents)? {
        Beginning::Ext => {}
        Beginning::Blank => {
            Program::new("mkfs.ext4", "Debian package e2fsprogs").with(["-q", "-F", "-L", "dstack-data"]).with([device]).run()?;
        }
        Beginning::Other => return Err(FilesystemError::Foreign { device: device.to_owned(), wanted: "ext4" }),
    }
    let call = Program::new("mount", "Debian package mount").with(["-t", "ext4", "-o", "nosuid,nodev"]).with([device, mount_point]);
    Ok(call.run().map(drop)?)
}

fn zfs(device: &Path, contents: Contents, mount_point: &Path) -> Result<(), FilesystemError> {
    let zpool = || Program::new("zpool", "package zfsutils-linux");
    let at = format!("mountpoint={}", mount_point.display());
    match beginning(device, contents)? {
        Beginning::Blank => zpool().with(["create", "-O", &at, "-O", "compression=lz4", POOL]).with([device]).run()?,
        Beginning::Ext => return Err(FilesystemError::Foreign { device: device.to_owned(), wanted: "zfs" }),
        Beginning::Other => zpool().with(["import", "-d"]).with([device]).with([POOL]).run()?,
    };
    Ok(())
}

enum Beginning {
    Blank,
    Ext,
    Other,
}

/// By the first 64 KiB: file systems have their marks there.
fn beginning(device: &Path, contents: Contents) -> Result<Beginning, FilesystemError> {
    use std::io::Read as _;
    if contents == Contents::None {
        return Ok(Beginning::Blank);
    }
    let mut bytes = vec![0; 64 << 10];
    let read = fs::File::open(device).and_then(|mut file| file.read_exact(&mut bytes));
    read.map_err(|error| FileError::system("read", device, &error))?;
    Ok(match bytes.get(EXT_MAGIC_AT..) {
        Some([0x53, 0xef, ..]) => Beginning::Ext,
        _ if bytes.iter().all(|byte| *byte == 0) => Beginning::Blank,
        _ => Beginning::Other,
    })
}

/// What is mounted at `mount_point`, by the kernel's table.
fn source_of(mount_point: &Path) -> Result<Option<String>, FilesystemError> {
    let table = Path::new("/proc/self/mounts");
    let text = fs::read_to_string(table).map_err(|error| FileError::system("read", table, &error))?;
    let wanted = fs::canonicalize(mount_point).unwrap_or_else(|_| mount_point.to_owned());
    let fields = text.lines().rev().map(|line| line.split(' '));
    let found = fields.filter_map(|mut fields| Some((fields.next()?, fields.next()?))).find(|(_, at)| Path::new(at) == wanted);
    Ok(found.map(|(source, _)| source.to_owned()))
}

/// Makes a swap file of `bytes` below `mount_point` and turns it on. Twice is once.
///
/// # Errors
/// [`FilesystemError`].
pub fn swap(mount_point: &Path, bytes: u64) -> Result<(), FilesystemError> {
    let file = mount_point.join(".swap");
    let table = fs::read_to_string("/proc/swaps").unwrap_or_default();
    if bytes < SWAP_BYTES_MIN || table.lines().any(|line| line.starts_with(&*file.to_string_lossy())) {
        return Ok(());
    }
    let failed = |error: std::io::Error| FileError::system("make", &file, &error);
    let is_there = fs::symlink_metadata(&file).is_ok_and(|metadata| metadata.is_file() && metadata.size() == bytes);
    if !is_there {
        let _ = fs::remove_file(&file);
        let made = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&file).map_err(failed)?;
        // a swap file has no holes
        rustix::fs::fallocate(&made, rustix::fs::FallocateFlags::empty(), 0, bytes).map_err(|errno| failed(errno.into()))?;
        made.sync_all().map_err(failed)?;
        Program::new("mkswap", "Debian package util-linux").with([&file]).run()?;
    }
    Ok(Program::new("swapon", "Debian package mount").with([&file]).run().map(drop)?)
}
