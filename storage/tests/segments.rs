//! Audit segment files: appends, rotation, reads, idempotence, torn tails at every byte, damage named, offline verification.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod common;

use std::path::{Path, PathBuf};

use common::{Seeded, key};
use dstack_storage::{SegmentConfig, SegmentError, SegmentReader, Segments};
use proptest::prelude::*;

fn config(dir: &Path) -> SegmentConfig {
    SegmentConfig { segment_bytes_max: 4096, reserve_bytes: 0, ..SegmentConfig::new(dir) }
}

fn open(dir: &Path) -> Segments {
    Segments::open(config(dir), Some(&key())).unwrap()
}

fn try_open(dir: &Path) -> Result<Segments, SegmentError> {
    Segments::open(config(dir), Some(&key()))
}

fn bytes_of(position: u64) -> Vec<u8> {
    format!("leaf {position};").repeat(1 + (position % 7) as usize).into_bytes()
}

fn batch(from: u64, to: u64) -> Vec<(u64, Vec<u8>)> {
    (from..to).map(|position| (position, bytes_of(position))).collect()
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut files: Vec<_> = std::fs::read_dir(dir).unwrap().map(|item| item.unwrap().path()).collect();
    files.sort();
    files
}

fn verify(dir: &Path) -> Result<(u64, u64), SegmentError> {
    let mut reader = SegmentReader::open(dir, Some(&key()))?;
    let mut next = 0;
    for item in &mut reader {
        let (position, bytes) = item?;
        assert_eq!((position, bytes), (next, bytes_of(next)));
        next += 1;
    }
    Ok((next, reader.torn_tail_bytes()))
}

#[test]
fn entries_are_read_back_over_rotation_and_restart() {
    let dir = tempfile::tempdir().unwrap();
    let mut segments = open(dir.path());
    assert_eq!((segments.next_position(), segments.read(0).unwrap()), (0, None));
    let mut next = 0;
    while files(dir.path()).len() < 4 {
        let to = next + 1 + next % 9;
        segments.append(&batch(next, to)).unwrap();
        next = to;
    }
    let check = |segments: &Segments| {
        assert_eq!((segments.first_position(), segments.next_position()), (0, next));
        for position in 0..next {
            assert_eq!(segments.read(position).unwrap().unwrap(), bytes_of(position));
        }
        assert_eq!(segments.read(next).unwrap(), None);
        assert_eq!(segments.read_range(3, 1000, usize::MAX).unwrap(), batch(3, next));
        assert_eq!(segments.read_range(3, 5, usize::MAX).unwrap(), batch(3, 8));
        assert_eq!(segments.read_range(3, 5, 1).unwrap(), batch(3, 4));
        assert_eq!(segments.read_range(3, 0, 1).unwrap(), []);
    };
    check(&segments);
    let checksum = segments.last_checksum();
    drop(segments);
    let segments = open(dir.path());
    check(&segments);
    assert_eq!((segments.last_checksum(), segments.removed_bytes()), (checksum, 0));
    assert_eq!(verify(dir.path()), Ok((next, 0)));
}

#[test]
fn appends_are_idempotent_by_position_and_gaps_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut segments = open(dir.path());
    segments.append(&batch(0, 10)).unwrap();
    let checksum = segments.last_checksum();
    segments.append(&batch(4, 10)).unwrap();
    assert_eq!(segments.last_checksum(), checksum, "nothing new, nothing written");
    segments.append(&batch(8, 13)).unwrap();
    assert_eq!(segments.next_position(), 13);
    assert_eq!(segments.append(&batch(14, 15)), Err(SegmentError::NotContiguous { expected: 13, got: 14 }));
    let hole = [(13, b"a".to_vec()), (15, b"b".to_vec())];
    assert_eq!(segments.append(&hole), Err(SegmentError::NotContiguous { expected: 14, got: 15 }));
    assert_eq!(segments.append(&[(12, b"other".to_vec()), (13, bytes_of(13))]), Err(SegmentError::Differs { position: 12 }));
    let huge = vec![0u8; (8 << 20) + 1];
    assert_eq!(segments.append(&[(13, &huge)]), Err(SegmentError::TooLarge { what: "entry", bytes: (8 << 20) + 1, max_bytes: 8 << 20 }));
    let many: Vec<(u64, &[u8])> = (13..18).map(|position| (position, &huge[1..])).collect();
    assert!(matches!(segments.append(&many), Err(SegmentError::TooLarge { what: "batch", .. })));
    segments.append::<Vec<u8>>(&[]).unwrap();
    drop(segments);
    assert_eq!(verify(dir.path()), Ok((13, 0)));
}

/// A copy of `from`, and the bytes of its newest file.
fn copy(from: &Path) -> (tempfile::TempDir, PathBuf, Vec<u8>) {
    let dir = tempfile::tempdir().unwrap();
    for file in files(from) {
        std::fs::copy(&file, dir.path().join(file.file_name().unwrap())).unwrap();
    }
    let newest = files(dir.path()).pop().unwrap();
    let bytes = std::fs::read(&newest).unwrap();
    (dir, newest, bytes)
}

#[test]
fn a_torn_last_batch_is_cut_back_wherever_it_was_torn() {
    let base = tempfile::tempdir().unwrap();
    let mut segments = open(base.path());
    segments.append(&batch(0, 3)).unwrap();
    segments.append(&batch(3, 5)).unwrap();
    let whole = std::fs::metadata(&files(base.path())[0]).unwrap().len() as usize;
    segments.append(&batch(5, 9)).unwrap();
    drop(segments);
    let (dir, newest, bytes) = copy(base.path());
    let mut seeded = Seeded(7);
    for cut in whole..bytes.len() {
        // Cut short; or at full length with zeros; or with every byte after the cut garbage.
        for fill in 0..3 {
            let mut torn = bytes[..cut].to_vec();
            match fill {
                0 => {}
                1 if bytes[cut..].iter().all(|byte| *byte == 0) => continue,
                1 => torn.resize(bytes.len(), 0),
                _ => torn.extend(bytes[cut..].iter().map(|byte| byte ^ (1 + seeded.below(255) as u8))),
            }
            std::fs::write(&newest, &torn).unwrap();
            let (_, tail) = verify(dir.path()).unwrap();
            assert_eq!(tail, (torn.len() - whole) as u64);
            let mut segments = open(dir.path());
            assert_eq!((segments.next_position(), segments.removed_bytes()), (5, tail), "cut at {cut}, fill {fill}");
            segments.append(&batch(4, 7)).unwrap();
            drop(segments);
            assert_eq!(verify(dir.path()), Ok((7, 0)));
        }
    }
    std::fs::write(&newest, &bytes[..whole]).unwrap();
    let knowing = SegmentConfig { acknowledged_next: 6, ..config(dir.path()) };
    assert_eq!(Segments::open(knowing, Some(&key())).unwrap_err(), SegmentError::TailLost { found_next: 5, acknowledged_next: 6 });
}

#[test]
fn a_new_file_that_was_never_written_is_removed() {
    for content in [vec![], vec![0; 82], b"dskaudit".to_vec()] {
        let dir = tempfile::tempdir().unwrap();
        open(dir.path()).append(&batch(0, 5)).unwrap();
        std::fs::write(dir.path().join("audit-00000000000000000005.seg"), &content).unwrap();
        let mut segments = open(dir.path());
        assert_eq!(segments.next_position(), 5);
        segments.append(&batch(5, 6)).unwrap();
        drop(segments);
        assert_eq!(files(dir.path()).len(), 1);
        assert_eq!(verify(dir.path()), Ok((6, 0)));
    }
}

#[test]
fn damage_before_the_last_batch_is_refused_and_named() {
    let base = tempfile::tempdir().unwrap();
    let mut segments = open(base.path());
    for position in (0..200).step_by(5) {
        segments.append(&batch(position, position + 5)).unwrap();
    }
    drop(segments);
    let count = files(base.path()).len();
    assert!(count >= 3, "{count} files");
    let mut seeded = Seeded(11);
    for _ in 0..300 {
        let (dir, newest, _) = copy(base.path());
        let all = files(dir.path());
        let target = &all[seeded.below(count as u64) as usize];
        let mut bytes = std::fs::read(target).unwrap();
        // Not the last batch of the last file: that one cannot be told from a torn one.
        let limit = if *target == newest { bytes.len() - 600 } else { bytes.len() };
        let at = seeded.below(limit as u64) as usize;
        bytes[at] ^= 1 << seeded.below(8);
        std::fs::write(target, &bytes).unwrap();
        let before: Vec<_> = all.iter().map(|file| std::fs::read(file).unwrap()).collect();
        match try_open(dir.path()) {
            Err(SegmentError::Damaged { path, offset, position, .. }) => {
                assert_eq!(Path::new(&path), target.as_path());
                assert!(offset <= at as u64 && position < 200);
            }
            other => panic!("byte {at} of {}: {other:?}", target.display()),
        }
        let after: Vec<_> = files(dir.path()).iter().map(|file| std::fs::read(file).unwrap()).collect();
        assert_eq!(before, after, "nothing is changed after damage");
        assert!(verify(dir.path()).is_err());
    }
}

#[test]
fn missing_swapped_and_foreign_files_are_refused() {
    let base = tempfile::tempdir().unwrap();
    let mut segments = open(base.path());
    for position in (0..200).step_by(5) {
        segments.append(&batch(position, position + 5)).unwrap();
    }
    drop(segments);
    let names = |dir: &Path| files(dir);
    let (dir, ..) = copy(base.path());
    std::fs::remove_file(&names(dir.path())[1]).unwrap();
    assert!(matches!(try_open(dir.path()), Err(SegmentError::MissingSegment { position }) if position > 0));
    let (dir, ..) = copy(base.path());
    std::fs::remove_file(&names(dir.path())[0]).unwrap();
    assert_eq!(try_open(dir.path()).unwrap_err(), SegmentError::MissingSegment { position: 0 });
    let (dir, ..) = copy(base.path());
    std::fs::copy(&names(dir.path())[0], &names(dir.path())[1]).unwrap();
    assert!(matches!(try_open(dir.path()), Err(SegmentError::Damaged { detail: "file name and header disagree", .. })));
    let (dir, ..) = copy(base.path());
    let truncated = &names(dir.path())[0];
    let bytes = std::fs::read(truncated).unwrap();
    std::fs::write(truncated, &bytes[..bytes.len() - 1]).unwrap();
    assert!(matches!(try_open(dir.path()), Err(SegmentError::Damaged { detail: "batch is cut, though a segment follows", .. })));
    assert!(matches!(
        Segments::open(config(base.path()), None),
        Err(SegmentError::Damaged { detail: "written with a record key and read without, or the reverse", .. })
    ));
}

#[test]
fn without_a_key_anyone_can_verify() {
    let dir = tempfile::tempdir().unwrap();
    let mut segments = Segments::open(SegmentConfig { first_position: 1000, ..config(dir.path()) }, None).unwrap();
    segments.append(&batch(1000, 1400)).unwrap();
    segments.append(&batch(1400, 1401)).unwrap();
    let read: Vec<_> = SegmentReader::open(dir.path(), None).unwrap().map(Result::unwrap).collect();
    assert_eq!(read, batch(1000, 1401));
}

#[test]
fn a_full_reserve_refuses_before_writing() {
    let dir = tempfile::tempdir().unwrap();
    let mut segments = Segments::open(SegmentConfig { reserve_bytes: u64::MAX / 2, ..config(dir.path()) }, None).unwrap();
    assert!(matches!(segments.append(&batch(0, 1)), Err(SegmentError::Full { .. })));
    assert_eq!((segments.next_position(), files(dir.path()).len()), (0, 0));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]
    /// Batches of any shape, reopened at any time, cut at any place: what is there is always a prefix that ends with a whole batch.
    #[test]
    fn agrees_with_a_model(batches in prop::collection::vec((1u64..9, any::<bool>()), 1..30), cut in any::<prop::sample::Index>()) {
        let dir = tempfile::tempdir().unwrap();
        let mut segments = open(dir.path());
        let mut ends = vec![0];
        for (count, reopen) in batches {
            let from = segments.next_position();
            segments.append(&batch(from, from + count)).unwrap();
            ends.push(from + count);
            if reopen {
                segments = open(dir.path());
            }
        }
        drop(segments);
        prop_assert_eq!(verify(dir.path()).unwrap(), (*ends.last().unwrap(), 0));
        let newest = files(dir.path()).pop().unwrap();
        let bytes = std::fs::read(&newest).unwrap();
        std::fs::write(&newest, &bytes[..cut.index(bytes.len())]).unwrap();
        let segments = open(dir.path());
        prop_assert!(ends.contains(&segments.next_position()));
        let next = segments.next_position();
        prop_assert_eq!(segments.read_range(0, 1000, usize::MAX).unwrap(), batch(0, next));
    }
}
