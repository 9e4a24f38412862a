//! `power`: the store on an ext4 of its own (loop device), the file system shut down in the middle of writing without a flush of its
//! journal, mounted again (real journal recovery), checked; again. Needs root, `mkfs.ext4`, `losetup`.
//!
//! Case 0 is a canary: a file written without any sync must be gone afterwards, or the trial shows nothing.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::ioctl::{Setter, ioctl, opcode};

use crate::arguments::{Arguments, Seeded, median_and_max};
use crate::files::TempDir;
use crate::kill::{Writer, ahead_max};
use crate::model::check;

/// Cuts the power `count` times.
pub(crate) fn run(arguments: &Arguments) -> Result<(), String> {
    let dir = TempDir::new(Some(&arguments.dir.clone().unwrap_or_else(std::env::temp_dir)))?;
    let mut disk = Disk::new(dir.path())?;
    canary(&mut disk)?;
    let (mut held, mut acknowledged_total, mut in_flight, mut reopen_ms) = (0, 0u64, 0u64, Vec::new());
    for case in 0..arguments.count {
        let mut writer = Writer::start(arguments.engine, &disk.mount, arguments.seed, case, held)?;
        let mut seeded = Seeded::new(arguments.seed ^ 0x90e5, case);
        std::thread::sleep(Duration::from_millis(5u64.saturating_add(seeded.below(250))));
        // What is acknowledged from here on counts for nothing: the machine is off. (A sync that is under way while the journal is
        // aborted may still answer that all is well: seen in 2 of 147 cuts.)
        let acknowledged = writer.acknowledged_now();
        disk.cut_power()?;
        let in_the_cut = writer.kill()?.saturating_sub(acknowledged);
        disk.mount_again()?;
        let begun = Instant::now();
        let ahead_max = ahead_max(case).saturating_add(in_the_cut);
        let now = check(arguments.engine, &disk.mount, arguments.seed, acknowledged, ahead_max)
            .map_err(|error| format!("power cut {case} of seed {}: {error}", arguments.seed))?;
        reopen_ms.push(begun.elapsed().as_millis());
        acknowledged_total = acknowledged_total.saturating_add(acknowledged.saturating_sub(held));
        in_flight = in_flight.saturating_add(u64::from(now > acknowledged));
        held = now;
    }
    let (median, max) = median_and_max(reopen_ms);
    println!(
        "power engine={} cuts={} acknowledged={acknowledged_total} unacknowledged_but_whole={in_flight} lost=0 reopen_and_check_ms_p50={median} max={max} seed={}",
        arguments.engine, arguments.count, arguments.seed
    );
    Ok(())
}

/// The trial must be able to fail: what was not synced is lost, what was synced is there.
fn canary(disk: &mut Disk) -> Result<(), String> {
    let (synced, unsynced) = (disk.mount.join("synced"), disk.mount.join("unsynced"));
    std::fs::write(&synced, b"x").map_err(|error| error.to_string())?;
    File::open(&synced).and_then(|file| file.sync_all()).map_err(|error| error.to_string())?;
    File::open(&disk.mount).and_then(|file| file.sync_all()).map_err(|error| error.to_string())?;
    std::fs::write(&unsynced, b"x").map_err(|error| error.to_string())?;
    disk.cut_power()?;
    disk.mount_again()?;
    match (synced.exists(), unsynced.exists()) {
        (true, false) => Ok(()),
        (synced, unsynced) => Err(format!("canary: synced file there {synced}, unsynced file there {unsynced}")),
    }
}

/// A file system in a file.
struct Disk {
    mount: PathBuf,
    device: String,
    mounted: bool,
}

impl Disk {
    fn new(dir: &Path) -> Result<Self, String> {
        let image = dir.join("image");
        let file = File::create(&image).map_err(|error| error.to_string())?;
        file.set_len(512 << 20).map_err(|error| error.to_string())?;
        command("mkfs.ext4", &["-q".as_ref(), "-F".as_ref(), image.as_ref()])?;
        let mount = dir.join("mount");
        std::fs::create_dir(&mount).map_err(|error| error.to_string())?;
        let device = command("losetup", &["-f".as_ref(), "--show".as_ref(), image.as_ref()])?.trim().to_owned();
        let mut disk = Self { mount, device, mounted: false };
        disk.mount()?;
        Ok(disk)
    }

    fn mount(&mut self) -> Result<(), String> {
        command("mount", &[self.device.as_ref(), self.mount.as_ref()])?;
        self.mounted = true;
        Ok(())
    }

    fn unmount(&mut self) -> Result<(), String> {
        // A writer that was just killed may still be letting go of its files.
        for _ in 0..50 {
            if command("umount", &[self.mount.as_ref()]).is_ok() {
                self.mounted = false;
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        command("umount", &[self.mount.as_ref()]).map(|_| self.mounted = false)
    }

    fn cut_power(&self) -> Result<(), String> {
        let mount = File::open(&self.mount).map_err(|error| error.to_string())?;
        shut_down(&mount).map_err(|error| format!("shut down ext4: {error}"))
    }

    fn mount_again(&mut self) -> Result<(), String> {
        self.unmount()?;
        self.mount()
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if self.mounted
            && let Err(error) = self.unmount()
        {
            eprintln!("{} stays mounted: {error}", self.mount.display());
        }
        if let Err(error) = command("losetup", &["-d".as_ref(), self.device.as_ref()]) {
            eprintln!("{} stays attached: {error}", self.device);
        }
    }
}

/// `EXT4_IOC_SHUTDOWN` with `NOLOGFLUSH`: from here on every write fails, and the journal stays as it is.
#[expect(unsafe_code, reason = "an ioctl has no safe form; only this trial uses it")]
fn shut_down(mount: &File) -> rustix::io::Result<()> {
    const SHUTDOWN: rustix::ioctl::Opcode = opcode::read::<u32>(b'X', 125);
    const NOLOGFLUSH: u32 = 2;
    // SAFETY: the request reads one u32 at the address it is given, which `Setter` keeps alive for the call.
    unsafe { ioctl(mount, Setter::<SHUTDOWN, u32>::new(NOLOGFLUSH)) }
}

fn command(program: &str, arguments: &[&std::ffi::OsStr]) -> Result<String, String> {
    let output = Command::new(program).args(arguments).output().map_err(|error| format!("{program}: {error}"))?;
    if !output.status.success() {
        return Err(format!("{program}: {}", String::from_utf8_lossy(&output.stderr).trim()));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
