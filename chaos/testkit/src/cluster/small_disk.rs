//! A small file system of its own, to be filled. Owns: its image, loop device and mount, and that both go when it is dropped.
//! Never: touches another loop device. Source: emulation.md §D (ext4 on a loop device; needs root).

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::error::ClusterError;
use super::process::run;

/// Written at once while filling.
const BLOCK: [u8; 4096] = [0x5a; 4096];

/// A mounted ext4 image.
#[derive(Debug)]
pub struct SmallDisk {
    device: String,
    mount: PathBuf,
    image: PathBuf,
}

impl SmallDisk {
    /// Whether this process may mount: only root may.
    #[must_use]
    pub fn possible() -> bool {
        rustix::process::geteuid().is_root()
    }

    /// An empty file system of `mib` MiB at `mount`, which is made if absent.
    ///
    /// # Errors
    /// [`ClusterError`] of mkfs.ext4, losetup or mount.
    pub fn mount(mount: &Path, mib: u64) -> Result<Self, ClusterError> {
        let image = mount.with_extension("img");
        let file = |error| ClusterError::file(&image, error);
        File::create(&image).and_then(|made| made.set_len(mib << 20)).map_err(file)?;
        run(Command::new("mkfs.ext4").args(["-q", "-F", "-m", "0"]).arg(&image))?;
        std::fs::create_dir_all(mount).map_err(|error| ClusterError::file(mount, error))?;
        let device = run(Command::new("losetup").args(["-f", "--show"]).arg(&image))?.trim().to_owned();
        // From here on dropping gives the device back.
        let disk = Self { device, mount: mount.to_owned(), image };
        run(Command::new("mount").arg(&disk.device).arg(mount))?;
        Ok(disk)
    }

    fn filler(&self) -> PathBuf {
        self.mount.join("filler")
    }

    /// Writes until there is no space left.
    ///
    /// # Errors
    /// [`ClusterError::File`] for anything but the end of space.
    pub fn fill(&self) -> Result<(), ClusterError> {
        let wrong = |error: std::io::Error| ClusterError::file(self.filler(), error);
        let mut file = File::options().create(true).append(true).open(self.filler()).map_err(wrong)?;
        loop {
            match file.write_all(&BLOCK).and_then(|()| file.flush()) {
                Ok(()) => {}
                Err(error) if error.kind() == std::io::ErrorKind::StorageFull => return Ok(()),
                Err(error) => return Err(wrong(error)),
            }
        }
    }

    /// Gives the space back.
    ///
    /// # Errors
    /// [`ClusterError::File`].
    pub fn free(&self) -> Result<(), ClusterError> {
        std::fs::remove_file(self.filler()).map_err(|error| ClusterError::file(self.filler(), error))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: a process that still ends may hold files; the device goes with the last of them.
        for command in [Command::new("umount").arg("-l").arg(&self.mount), Command::new("losetup").arg("-d").arg(&self.device)] {
            if let Err(error) = run(command) {
                eprintln!("small disk: {error}");
            }
        }
        let _left_to_the_temporary_directory = std::fs::remove_file(&self.image);
    }
}
