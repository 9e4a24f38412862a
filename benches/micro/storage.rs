//! A durable append of 512-byte entries: a plain file, both engines behind the authenticated log, the audit segments.

use std::cell::{Cell, LazyCell, RefCell};
use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use criterion::measurement::{Measurement, WallTime};
use criterion::{BatchSize, Criterion};
use dstack_benches::clock::CpuTime;
use dstack_secret::Secret;
use dstack_storage::{EngineKind, LogEntry, LogStore, RecordKey, SegmentConfig, Segments, StoreConfig};
use tempfile::TempDir;

use crate::measure;

const ENTRY_BYTES: usize = 512;
/// The plain file; writing begins anew at its end.
const PLAIN_BYTES: u64 = 16 << 20;

pub(crate) fn all(criterion: &mut Criterion<WallTime>) {
    plain(criterion, "storage/append_plain/1", 1);
    plain(criterion, "storage/append_plain/16", 16);
    plain(criterion, "storage/append_plain/128", 128);
    engine(criterion, "storage/append_sled/1", EngineKind::Sled, 1);
    engine(criterion, "storage/append_sled/16", EngineKind::Sled, 16);
    engine(criterion, "storage/append_sled/128", EngineKind::Sled, 128);
    engine(criterion, "storage/append_redb/1", EngineKind::Redb, 1);
    engine(criterion, "storage/append_redb/16", EngineKind::Redb, 16);
    engine(criterion, "storage/append_redb/128", EngineKind::Redb, 128);
    segments(criterion, "storage/segments/1", 1);
    segments(criterion, "storage/segments/16", 16);
    segments(criterion, "storage/segments/128", 128);
}

/// What the processor does for an append of one entry, without waiting for the disk.
pub(crate) fn cpu(criterion: &mut Criterion<CpuTime>) {
    engine(criterion, "storage/append_cpu/sled", EngineKind::Sled, 1);
    engine(criterion, "storage/append_cpu/redb", EngineKind::Redb, 1);
    segments(criterion, "storage/append_cpu/segments", 1);
}

/// The physical limit: blocks that exist already, one write, one sync.
fn plain(criterion: &mut Criterion<WallTime>, name: &'static str, entries: usize) {
    let bytes = vec![0xa5; entries * ENTRY_BYTES];
    let opened = LazyCell::new(|| {
        let dir = folder();
        let mut file = OpenOptions::new().read(true).write(true).create_new(true).open(dir.path().join("plain")).unwrap();
        for _ in 0..PLAIN_BYTES >> 20 {
            file.write_all(&vec![0; 1 << 20]).unwrap();
        }
        file.sync_all().unwrap();
        (file, dir)
    });
    let at = Cell::new(0);
    measure(criterion, name, |bencher| {
        let file: &File = &opened.0;
        bencher.iter(|| {
            file.write_all_at(&bytes, at.get()).unwrap();
            file.sync_data().unwrap();
            at.set((at.get() + bytes.len() as u64) % (PLAIN_BYTES - bytes.len() as u64));
        });
    });
}

fn engine<M: Measurement>(criterion: &mut Criterion<M>, name: &'static str, kind: EngineKind, entries: u64) {
    let opened = LazyCell::new(|| {
        let dir = folder();
        let key = RecordKey::new(Secret::from_fn(|bytes| bytes.fill(0x42)));
        (LogStore::open(&StoreConfig::new(kind, dir.path()), &key).unwrap(), dir)
    });
    let next = Cell::new(1);
    measure(criterion, name, |bencher| {
        let store = &opened.0;
        let batch = || {
            let first = next.replace(next.get() + entries);
            (first..first + entries).map(|index| LogEntry { index, term: 1, payload: vec![0xa5; ENTRY_BYTES] }).collect::<Vec<_>>()
        };
        bencher.iter_batched(batch, |batch| store.append(&batch).unwrap(), BatchSize::PerIteration);
    });
}

fn segments<M: Measurement>(criterion: &mut Criterion<M>, name: &'static str, entries: u64) {
    let opened = LazyCell::new(|| {
        let dir = folder();
        (RefCell::new(Segments::open(SegmentConfig::new(dir.path()), None).unwrap()), dir)
    });
    measure(criterion, name, |bencher| {
        let mut segments = opened.0.borrow_mut();
        bencher.iter(|| {
            let first = segments.next_position();
            let batch: Vec<(u64, [u8; ENTRY_BYTES])> = (first..first + entries).map(|position| (position, [0xa5; ENTRY_BYTES])).collect();
            segments.append(&batch).unwrap();
        });
    });
}

/// On the disk of the build, not in memory.
fn folder() -> TempDir {
    let parent = Path::new(env!("CARGO_TARGET_TMPDIR"));
    std::fs::create_dir_all(parent).unwrap();
    tempfile::tempdir_in(parent).unwrap()
}
