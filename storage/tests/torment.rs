//! Crashes and damage, in a number that fits CI: the program `storage-torment` runs each trial on each durable engine. Larger counts are
//! run by hand; their figures are in `docs/adr/0001-storage-engine.md`.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::process::Command;
use std::time::{Duration, Instant};

/// Runs a trial and gives its line of figures.
fn torment(trial: &str, engine: &str, count: u32, seconds_max: u64) -> String {
    let mut child = Command::new(env!("CARGO_BIN_EXE_storage-torment"))
        .args([trial, "--engine", engine, "--count", &count.to_string(), "--seed", "2026"])
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let end = Instant::now() + Duration::from_secs(seconds_max);
    while child.try_wait().unwrap().is_none() {
        if Instant::now() > end {
            child.kill().unwrap();
            panic!("{trial} on {engine} took more than {seconds_max} s");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let output = child.wait_with_output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{trial} on {engine}: {}{}", text(&output.stdout), text(&output.stderr));
    let figures = text(&output.stdout);
    assert!(figures.starts_with(&format!("{trial} engine={engine}")), "{figures}");
    println!("{figures}");
    figures
}

#[test]
fn sled_loses_nothing_when_killed() {
    torment("kill", "sled", 12, 300);
}

#[test]
fn redb_loses_nothing_when_killed() {
    torment("kill", "redb", 12, 300);
}

#[test]
fn sled_has_a_torn_batch_in_whole_or_not_at_all() {
    torment("torn", "sled", 20, 300);
}

#[test]
fn redb_has_a_torn_batch_in_whole_or_not_at_all() {
    torment("torn", "redb", 20, 300);
}

#[test]
fn sled_survives_power_cuts() {
    power("sled");
}

#[test]
fn redb_survives_power_cuts() {
    power("redb");
}

#[test]
fn redb_refuses_damaged_files_or_gives_authentic_data() {
    torment("hostile", "redb", 100, 600);
}

#[test]
fn sled_refuses_damaged_files_or_gives_authentic_data() {
    torment("hostile", "sled", 100, 600);
}

/// Power cuts need root and a loop device; a machine without them skips, CI does not.
fn power(engine: &str) {
    if let Some(missing) = missing_for_disks() {
        println!("skipped: {missing}");
        return;
    }
    torment("power", engine, 6, 300);
}

fn missing_for_disks() -> Option<String> {
    let missing = if !rustix::process::geteuid().is_root() {
        "root".to_owned()
    } else if Command::new("mkfs.ext4").arg("-V").output().is_err() {
        "mkfs.ext4 (package e2fsprogs)".to_owned()
    } else if !std::path::Path::new("/dev/loop-control").exists() {
        "loop devices".to_owned()
    } else {
        return None;
    };
    assert!(std::env::var_os("CI").is_none_or(|ci| ci != "true"), "CI must have {missing}");
    Some(missing)
}

/// A file system of 48 MiB in a file, unmounted at the end.
struct SmallDisk {
    dir: tempfile::TempDir,
}

impl SmallDisk {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        std::fs::File::create(&image).unwrap().set_len(48 << 20).unwrap();
        run("mkfs.ext4", &["-q", "-F", "-m", "0", image.to_str().unwrap()]);
        std::fs::create_dir(dir.path().join("mount")).unwrap();
        run("mount", &["-o", "loop", image.to_str().unwrap(), dir.path().join("mount").to_str().unwrap()]);
        Self { dir }
    }

    fn path(&self) -> std::path::PathBuf {
        self.dir.path().join("mount")
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        run("umount", &[self.path().to_str().unwrap()]);
    }
}

fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
}

mod full_disk {
    use std::sync::Arc;

    use dstack_secret::Secret;
    use dstack_storage::{
        Change, EngineKind, LogEntry, LogStore, LogWriter, Page, RecordKey, SegmentConfig, SegmentError, Segments, StoreConfig,
    };

    use super::SmallDisk;

    fn entry(index: u64) -> LogEntry {
        LogEntry { index, term: 1, payload: vec![u8::try_from(index % 251).unwrap(); 100_000] }
    }

    /// `reserve_bytes` 0: the engine itself meets ENOSPC; else the store refuses before it writes.
    fn refuses_and_comes_back(engine: EngineKind, reserve_bytes: u64) {
        if let Some(missing) = super::missing_for_disks() {
            println!("skipped: {missing}");
            return;
        }
        let disk = SmallDisk::new();
        let ballast = disk.path().join("ballast");
        std::fs::write(&ballast, vec![1; 16 << 20]).unwrap();
        let key = RecordKey::new(Secret::from_fn(|bytes| bytes.fill(9)));
        let config = StoreConfig { reserve_bytes, cache_bytes: 4 << 20, ..StoreConfig::new(engine, disk.path().join("store")) };
        let store = Arc::new(LogStore::open(&config, &key).unwrap());
        let writer = LogWriter::start(Arc::clone(&store), 16).unwrap();
        writer.write(Change::Vote(b"vote".to_vec())).unwrap();
        let mut next = 0;
        let error = loop {
            match writer.write(Change::Append(vec![entry(next)])) {
                Ok(()) => next += 1,
                Err(error) => break error,
            }
        };
        assert!(error.is_full(), "{engine}: {error}");
        assert!(next > 10, "{engine}: full after {next} entries");
        // Full again and again, and what is there can be read.
        for _ in 0..3 {
            let again = writer.write(Change::Append(vec![entry(next)])).unwrap_err();
            assert!(again.is_full(), "{engine}: {again}");
        }
        if !store.is_down() {
            assert_eq!(writer.read_range(next - 1, next, Page::SCAN).unwrap(), [entry(next - 1)]);
        }
        std::fs::remove_file(&ballast).unwrap();
        for _ in 0..5 {
            writer.write(Change::Append(vec![entry(next)])).unwrap();
            next += 1;
        }
        drop(writer);
        drop(store);
        let store = LogStore::open(&config, &key).unwrap();
        assert_eq!(store.read_vote().unwrap().unwrap(), b"vote");
        assert_eq!(store.last().unwrap().index, next - 1);
        for index in 0..next {
            assert_eq!(store.read_range(index, index + 1, Page::SCAN).unwrap(), [entry(index)]);
        }
    }

    #[test]
    fn sled_meets_the_end_of_the_disk() {
        refuses_and_comes_back(EngineKind::Sled, 0);
    }

    #[test]
    fn redb_meets_the_end_of_the_disk() {
        refuses_and_comes_back(EngineKind::Redb, 0);
    }

    #[test]
    fn sled_keeps_its_reserve() {
        refuses_and_comes_back(EngineKind::Sled, 4 << 20);
    }

    #[test]
    fn redb_keeps_its_reserve() {
        refuses_and_comes_back(EngineKind::Redb, 4 << 20);
    }

    #[test]
    fn audit_segments_refuse_and_come_back() {
        if let Some(missing) = super::missing_for_disks() {
            println!("skipped: {missing}");
            return;
        }
        let disk = SmallDisk::new();
        let ballast = disk.path().join("ballast");
        std::fs::write(&ballast, vec![1; 16 << 20]).unwrap();
        let config = SegmentConfig { reserve_bytes: 0, segment_bytes_max: 3 << 20, ..SegmentConfig::new(disk.path().join("audit")) };
        let mut segments = Segments::open(config.clone(), None).unwrap();
        let mut next = 0;
        let error = loop {
            match segments.append(&[(next, entry(next).payload)]) {
                Ok(()) => next += 1,
                Err(error) => break error,
            }
        };
        assert!(matches!(error, SegmentError::Full { .. }), "{error}");
        assert!(matches!(segments.append(&[(next, entry(next).payload)]), Err(SegmentError::Full { .. })));
        std::fs::remove_file(&ballast).unwrap();
        segments.append(&[(next, entry(next).payload)]).unwrap();
        drop(segments);
        let segments = Segments::open(config, None).unwrap();
        assert_eq!((segments.next_position(), segments.removed_bytes()), (next + 1, 0));
        assert_eq!(segments.read(next).unwrap().unwrap(), entry(next).payload);
    }
}
