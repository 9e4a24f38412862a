//! One suite, run on sled, redb and memory: the engine contract, the log, vote, snapshot, shares, restart.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, mpsc};

use common::{at, entry, key};
use dstack_storage::engine::{KEY_BYTES_MAX, MemoryEngine, Op, VALUE_BYTES_MAX, scan};
use dstack_storage::log_store::{CHUNK_BYTES, ENTRY_BYTES_MAX};
use dstack_storage::{
    Batch, Change, Engine, EngineConfig, EngineError, EngineKind, LogStore, LogWriter, Page, StoreError, Tree, open_engine,
};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

/// Opens an engine, and opens it again with what it held: `memory` shares its trees through a handle.
struct Bed {
    kind: EngineKind,
    dir: tempfile::TempDir,
    memory: MemoryEngine,
}

impl Bed {
    fn new(kind: EngineKind) -> Self {
        Self { kind, dir: tempfile::tempdir().unwrap(), memory: MemoryEngine::new() }
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    fn engine(&self) -> Box<dyn Engine> {
        match self.kind {
            EngineKind::Memory => Box::new(self.memory.clone()),
            kind => open_engine(&EngineConfig { reserve_bytes: 0, cache_bytes: 8 << 20, ..EngineConfig::new(kind, self.path()) }).unwrap(),
        }
    }

    fn store(&self) -> LogStore {
        self.try_store().unwrap()
    }

    fn try_store(&self) -> Result<LogStore, StoreError> {
        LogStore::on_engine(self.engine(), &key(), Some(&self.path().join("anchor")))
    }
}

fn batch_is_atomic_ordered_and_survives(kind: EngineKind) {
    let bed = Bed::new(kind);
    let engine = bed.engine();
    assert_eq!(engine.kind(), kind);
    let mut batch = Batch::new();
    batch.put(Tree::Log, *b"a", *b"1").put(Tree::Log, *b"b", *b"2").put(Tree::Log, *b"c", *b"3").put(Tree::Vote, *b"a", *b"vote");
    batch.put(Tree::Log, *b"b", *b"4").delete(Tree::Log, *b"c").put(Tree::Log, *b"d", *b"5").delete_range(Tree::Log, *b"d", None);
    batch.put(Tree::Log, *b"e", *b"6");
    engine.write(&batch).unwrap();
    let check = |engine: &dyn Engine| {
        let all = engine.range(Tree::Log, b"", None, Page::SCAN).unwrap();
        assert_eq!(all, [(b"a".to_vec(), b"1".to_vec()), (b"b".to_vec(), b"4".to_vec()), (b"e".to_vec(), b"6".to_vec())]);
        assert_eq!(engine.get(Tree::Vote, b"a").unwrap(), Some(b"vote".to_vec()));
        assert_eq!(engine.get(Tree::State, b"a").unwrap(), None);
        assert_eq!(engine.last(Tree::Log).unwrap(), Some((b"e".to_vec(), b"6".to_vec())));
        assert_eq!(engine.last(Tree::Shares).unwrap(), None);
        assert_eq!(engine.range(Tree::Log, b"a", Some(b"b"), Page::SCAN).unwrap().len(), 1);
        assert_eq!(engine.range(Tree::Log, b"b", Some(b"a"), Page::SCAN).unwrap(), []);
        assert_eq!(engine.range(Tree::Log, b"", None, Page::entries(2)).unwrap().len(), 2);
        let one = Page { entries_max: 9, bytes_max: 1 };
        assert_eq!(engine.range(Tree::Log, b"", None, one).unwrap().len(), 1, "a page holds one record at least");
    };
    check(engine.as_ref());
    engine.reopen().unwrap();
    check(engine.as_ref());
    drop(engine);
    check(bed.engine().as_ref());
}

fn large_values_and_their_removal(kind: EngineKind) {
    let bed = Bed::new(kind);
    let engine = bed.engine();
    let large: Vec<u8> = (0..3_000_000u32).map(|i| i.to_le_bytes()[1]).collect();
    for (size, other) in [(4095, 4097), (4096, 1), (4097, 0), (3_000_000, 131_072)] {
        let mut batch = Batch::new();
        batch.put(Tree::Snapshot, *b"x", &large[..size]).put(Tree::State, *b"x", &large[..other]);
        engine.write(&batch).unwrap();
        assert_eq!(engine.get(Tree::Snapshot, b"x").unwrap().unwrap(), &large[..size]);
        assert_eq!(engine.last(Tree::State).unwrap().unwrap().1, &large[..other]);
    }
    let mut batch = Batch::new();
    batch.put(Tree::Log, *b"k", vec![1; VALUE_BYTES_MAX]);
    engine.write(&batch).unwrap();
    assert_eq!(engine.get(Tree::Log, b"k").unwrap().unwrap().len(), VALUE_BYTES_MAX);
    let mut batch = Batch::new();
    batch.delete(Tree::Log, *b"k").delete_range(Tree::Snapshot, *b"", None).delete(Tree::State, *b"x").delete(Tree::State, *b"absent");
    engine.write(&batch).unwrap();
    for tree in Tree::ALL {
        assert_eq!(engine.last(tree).unwrap(), None);
    }
    let too_large = |batch: &Batch| engine.write(batch).unwrap_err();
    let mut batch = Batch::new();
    batch.put(Tree::Log, vec![0; KEY_BYTES_MAX + 1], *b"");
    assert_eq!(too_large(&batch), EngineError::TooLarge { what: "key", bytes: KEY_BYTES_MAX + 1, max_bytes: KEY_BYTES_MAX });
    let mut batch = Batch::new();
    batch.put(Tree::Log, *b"k", vec![0; VALUE_BYTES_MAX + 1]);
    assert_eq!(too_large(&batch), EngineError::TooLarge { what: "value", bytes: VALUE_BYTES_MAX + 1, max_bytes: VALUE_BYTES_MAX });
}

/// Random batches against a plain map, with a reopen now and then.
fn agrees_with_a_model(kind: EngineKind) {
    let key = || prop::collection::vec(0u8..4, 0..4);
    let op = prop_oneof![
        4 => (0usize..6, key(), 0usize..9000, any::<u8>()).prop_map(|(tree, key, size, byte)| Op::Put { tree: Tree::ALL[tree], key, value: vec![byte; size] }),
        2 => (0usize..6, key()).prop_map(|(tree, key)| Op::Delete { tree: Tree::ALL[tree], key }),
        1 => (0usize..6, key(), prop::option::of(key())).prop_map(|(tree, start, end)| Op::DeleteRange { tree: Tree::ALL[tree], start, end }),
    ];
    let batches = prop::collection::vec((prop::collection::vec(op, 0..12), prop::bool::weighted(0.1)), 1..12);
    let cases = if kind == EngineKind::Memory { 200 } else { 24 };
    let mut runner = TestRunner::new(Config { cases, failure_persistence: None, ..Config::default() });
    runner
        .run(&batches, |batches| {
            let bed = Bed::new(kind);
            let engine = bed.engine();
            let mut model: BTreeMap<(Tree, Vec<u8>), Vec<u8>> = BTreeMap::new();
            for (ops, reopen) in batches {
                let mut batch = Batch::new();
                for op in ops {
                    match op {
                        Op::Put { tree, key, value } => {
                            batch.put(tree, key.clone(), value.clone());
                            model.insert((tree, key), value);
                        }
                        Op::Delete { tree, key } => {
                            batch.delete(tree, key.clone());
                            model.remove(&(tree, key));
                        }
                        Op::DeleteRange { tree, start, end } => {
                            batch.delete_range(tree, start.clone(), end.clone());
                            model.retain(|(of, key), _| *of != tree || *key < start || end.as_ref().is_some_and(|end| key >= end));
                        }
                    }
                }
                engine.write(&batch).unwrap();
                if reopen {
                    engine.reopen().unwrap();
                }
                let mut found = BTreeMap::new();
                for tree in Tree::ALL {
                    scan::<EngineError>(engine.as_ref(), tree, b"", None, |key, value| {
                        found.insert((tree, key.to_vec()), value.to_vec());
                        Ok(())
                    })
                    .unwrap();
                }
                prop_assert_eq!(&found, &model);
            }
            Ok(())
        })
        .unwrap();
}

fn log_is_kept_over_restarts(kind: EngineKind) {
    let bed = Bed::new(kind);
    let store = bed.store();
    assert_eq!((store.last(), store.last_purged(), store.read_vote().unwrap()), (None, None, None));
    store.append(&[entry(0, 0, 10), entry(1, 1, 10)]).unwrap();
    store.append(&(2..50).map(|i| entry(i, 1 + i / 20, 600)).collect::<Vec<_>>()).unwrap();
    store.save_vote(b"vote 1").unwrap();
    store.save_vote(b"vote 2").unwrap();
    store.save_committed(Some(b"7")).unwrap();
    store.truncate_after(Some(44)).unwrap();
    store.purge_upto(at(9, 1)).unwrap();
    store.append(&[entry(45, 9, 100_000)]).unwrap();
    let check = |store: &LogStore| {
        assert_eq!(store.last(), Some(at(45, 9)));
        assert_eq!(store.last_purged(), Some(at(9, 1)));
        let entries = store.read_range(0, 99, Page::SCAN).unwrap();
        assert_eq!(entries.len(), 36);
        for found in &entries {
            let size = if found.index == 45 { 100_000 } else { 600 };
            assert_eq!(*found, entry(found.index, found.term, size));
        }
        assert_eq!(store.read_range(12, 14, Page::SCAN).unwrap().len(), 2);
        assert_eq!(store.read_range(14, 12, Page::SCAN).unwrap(), []);
        assert_eq!(store.read_range(12, 44, Page::entries(5)).unwrap().len(), 5);
        assert_eq!(store.position(9).unwrap(), None);
        assert_eq!(store.position(45).unwrap(), Some(at(45, 9)));
        assert_eq!(store.read_vote().unwrap().unwrap(), b"vote 2");
        assert_eq!(store.read_committed().unwrap().unwrap(), b"7");
    };
    check(&store);
    drop(store);
    check(&bed.store());
}

fn refuses_what_would_leave_a_gap(kind: EngineKind) {
    let bed = Bed::new(kind);
    let store = bed.store();
    assert_eq!(store.append(&[entry(2, 1, 1)]), Err(StoreError::NotContiguous { expected: 0, got: 2 }));
    store.append(&[entry(1, 1, 1), entry(2, 3, 1), entry(3, 3, 1)]).unwrap();
    assert_eq!(store.append(&[entry(3, 3, 1)]), Err(StoreError::NotContiguous { expected: 4, got: 3 }));
    assert_eq!(store.append(&[entry(5, 3, 1)]), Err(StoreError::NotContiguous { expected: 4, got: 5 }));
    assert_eq!(store.append(&[entry(4, 3, 1), entry(6, 3, 1)]), Err(StoreError::NotContiguous { expected: 5, got: 6 }));
    assert_eq!(store.append(&[entry(4, 2, 1)]), Err(StoreError::TermFalls { index: 4, term: 2, before: 3 }));
    assert_eq!(
        store.append(&[entry(4, 3, ENTRY_BYTES_MAX + 1000)]).unwrap_err(),
        StoreError::TooLarge {
            what: "log entry",
            bytes: entry(4, 3, ENTRY_BYTES_MAX + 1000).payload.len() as u64,
            max_bytes: ENTRY_BYTES_MAX as u64
        }
    );
    let before = store.sequence();
    assert!(store.write(&[Change::Vote(b"v".to_vec()), Change::Append(vec![entry(9, 9, 1)])]).is_err());
    assert_eq!((store.sequence(), store.read_vote().unwrap()), (before, None), "refused together");
    store.purge_upto(at(2, 3)).unwrap();
    store.purge_upto(at(1, 1)).unwrap();
    assert_eq!(store.last_purged(), Some(at(2, 3)), "purging less again changes nothing");
    assert_eq!(store.truncate_after(Some(1)), Err(StoreError::OutsideLog { index: 1, first: 3, last: 3 }));
    store.truncate_after(Some(7)).unwrap();
    assert_eq!(store.last(), Some(at(3, 3)));
    store.truncate_after(Some(2)).unwrap();
    assert_eq!(store.last(), Some(at(2, 3)));
    store.append(&[entry(3, 4, 1)]).unwrap();
    store.truncate_after(None).unwrap();
    assert_eq!(store.last(), Some(at(2, 3)));
    store.purge_upto(at(100, 8)).unwrap();
    assert_eq!((store.last(), store.last_purged()), (Some(at(100, 8)), Some(at(100, 8))), "a snapshot ran ahead of the log");
    store.append(&[entry(101, 8, 1)]).unwrap();
    drop(store);
    assert_eq!(bed.store().read_range(0, 200, Page::SCAN).unwrap(), [entry(101, 8, 1)]);
}

fn changes_of_one_group_see_each_other(kind: EngineKind) {
    let bed = Bed::new(kind);
    let store = bed.store();
    store.append(&[entry(0, 1, 1), entry(1, 1, 1), entry(2, 1, 1)]).unwrap();
    let answers = store.write_each(&[
        Change::Append(vec![entry(3, 2, 1), entry(4, 2, 1)]),
        Change::Append(vec![entry(9, 2, 1)]),
        Change::TruncateAfter(Some(3)),
        Change::Append(vec![entry(4, 5, 1)]),
        Change::PurgeUpto(at(1, 1)),
        Change::TruncateAfter(Some(4)),
        Change::Vote(b"v".to_vec()),
    ]);
    assert_eq!(answers.iter().filter(|answer| answer.is_err()).count(), 1);
    assert_eq!(answers[1], Err(StoreError::NotContiguous { expected: 5, got: 9 }));
    drop(store);
    let store = bed.store();
    assert_eq!(store.read_range(0, 99, Page::SCAN).unwrap(), [entry(2, 1, 1), entry(3, 2, 1), entry(4, 5, 1)]);
    assert_eq!(store.last(), Some(at(4, 5)));
}

fn snapshot_is_switched_whole(kind: EngineKind) {
    let bed = Bed::new(kind);
    let store = bed.store();
    assert_eq!(store.snapshot().unwrap(), None);
    let data: Vec<u8> = (0..CHUNK_BYTES * 2 + 77).map(|i| (i / 3) as u8).collect();
    let first = store.save_snapshot(b"meta 1", &data).unwrap();
    assert_eq!(first.size_bytes, data.len() as u64);
    let mut unfinished = store.begin_snapshot().unwrap();
    unfinished.write(&data[..CHUNK_BYTES + 5]).unwrap();
    drop(unfinished);
    assert_eq!(store.load_snapshot(u64::MAX).unwrap().unwrap(), (first.clone(), data.clone()));
    drop(store);
    let store = bed.store();
    assert_eq!(store.load_snapshot(u64::MAX).unwrap().unwrap(), (first.clone(), data.clone()));
    let mut second = store.begin_snapshot().unwrap();
    second.write_from(&mut &data[7..]).unwrap();
    let mut third = store.begin_snapshot().unwrap();
    third.write(b"small").unwrap();
    let late = Err(StoreError::Snapshot { detail: "another one was begun after this" });
    assert_eq!(second.finish(b"meta 2"), late);
    let third = third.finish(b"meta 3").unwrap();
    assert_eq!(store.load_snapshot(5).unwrap().unwrap(), (third, b"small".to_vec()));
    assert_eq!(store.load_snapshot(4), Err(StoreError::TooLarge { what: "snapshot", bytes: 5, max_bytes: 4 }));
    assert_eq!(store.snapshot_chunk(&first, 0), Err(StoreError::Snapshot { detail: "replaced by a newer one while it was read" }));
    let empty = store.save_snapshot(b"", b"").unwrap();
    drop(store);
    assert_eq!(bed.store().load_snapshot(0).unwrap().unwrap(), (empty, Vec::new()));
}

fn shares_and_state_by_name(kind: EngineKind) {
    let bed = Bed::new(kind);
    let store = bed.store();
    store.save_share("prf/0", b"sealed a").unwrap();
    store.save_share("prf/1", b"sealed b").unwrap();
    store.write(&[Change::State(vec![("rows/1".into(), Some(b"x".to_vec())), ("rows/2".into(), Some(b"y".to_vec()))])]).unwrap();
    store.write(&[Change::State(vec![("rows/1".into(), None), ("applied".into(), Some(b"9".to_vec()))])]).unwrap();
    store.delete_share("prf/0").unwrap();
    assert!(matches!(store.save_share(&"n".repeat(129), b""), Err(StoreError::TooLarge { what: "name", .. })));
    drop(store);
    let store = bed.store();
    assert_eq!(store.share_names().unwrap(), ["prf/1"]);
    assert_eq!(store.load_share("prf/1").unwrap().unwrap(), b"sealed b");
    assert_eq!(store.load_share("prf/0").unwrap(), None);
    assert_eq!(store.state_names().unwrap(), ["applied", "rows/2"]);
    assert_eq!(store.load_state("rows/2").unwrap().unwrap(), b"y");
}

fn writer_keeps_order_and_shows_what_it_accepted(kind: EngineKind) {
    let bed = Bed::new(kind);
    let store = Arc::new(bed.store());
    let before = store.sequence();
    let writer = LogWriter::start(Arc::clone(&store), 1024).unwrap();
    let (answered, answers) = mpsc::channel();
    for index in 0..200 {
        let answered = answered.clone();
        let seen = Arc::clone(&store);
        writer
            .submit(Change::Append(vec![entry(index, 1, 200)]), move |result| {
                assert!(seen.last().unwrap().index >= index, "durable before the answer");
                answered.send((index, result)).unwrap();
            })
            .unwrap();
        assert_eq!(writer.bounds().last, Some(at(index, 1)), "accepted is visible");
        assert_eq!(writer.read_range(0, 999, Page::SCAN).unwrap().len() as u64, index + 1);
        if index == 100 {
            writer.submit(Change::TruncateAfter(Some(99)), |result| assert_eq!(result, Ok(()))).unwrap();
            assert_eq!(writer.bounds().last, Some(at(99, 1)));
            assert_eq!(writer.read_range(98, 999, Page::SCAN).unwrap().len(), 2);
            writer.submit(Change::Append(vec![entry(100, 1, 5)]), |result| assert_eq!(result, Ok(()))).unwrap();
        }
    }
    let order: Vec<_> = answers.iter().take(200).collect();
    assert_eq!(order, (0..200).map(|index| (index, Ok(()))).collect::<Vec<_>>());
    assert!(store.sequence() - before <= 202);
    writer.write(Change::PurgeUpto(at(49, 1))).unwrap();
    assert_eq!(writer.write(Change::Append(vec![entry(7, 1, 1)])), Err(StoreError::NotContiguous { expected: 200, got: 7 }));
    assert_eq!(writer.bounds(), store.bounds(), "a refusal leaves no trace in the view");
    writer.write(Change::Vote(b"v".to_vec())).unwrap();
    writer.write(Change::TruncateAfter(Some(150))).unwrap();
    drop(writer);
    drop(store);
    let store = bed.store();
    let log = store.read_range(0, 999, Page::SCAN).unwrap();
    assert_eq!(log.len(), 101);
    assert_eq!(log[50], entry(100, 1, 5));
    assert_eq!((store.last(), store.read_vote().unwrap()), (Some(at(150, 1)), Some(b"v".to_vec())));
}

/// Reads beside writes see whole batches: never a gap, never a foreign byte.
fn reads_beside_writes_see_whole_batches(kind: EngineKind) {
    let bed = Bed::new(kind);
    let store = Arc::new(bed.store());
    let reader = {
        let store = Arc::clone(&store);
        std::thread::spawn(move || {
            let mut reads = 0u64;
            while store.last_purged().is_none_or(|purged| purged.index < 1500) {
                for found in store.read_range(0, u64::MAX, Page::SCAN).unwrap() {
                    assert_eq!(found, entry(found.index, 1, 100 + (found.index % 5 * 2000) as usize));
                }
                reads += 1;
            }
            reads
        })
    };
    for first in (0..1600).step_by(20) {
        store.append(&(first..first + 20).map(|i| entry(i, 1, 100 + (i % 5 * 2000) as usize)).collect::<Vec<_>>()).unwrap();
        if first >= 60 {
            store.purge_upto(at(first - 45, 1)).unwrap();
        }
    }
    assert!(reader.join().unwrap() > 0);
}

/// What an attacker with the disk, but without the key, can do to records; and what start says.
fn tampering_is_noticed_and_named(kind: EngineKind) {
    type Attack = fn(&dyn Engine);
    fn put(engine: &dyn Engine, tree: Tree, key: &[u8], value: Vec<u8>) {
        let mut batch = Batch::new();
        batch.put(tree, key, value);
        engine.write(&batch).unwrap();
    }
    fn get(engine: &dyn Engine, tree: Tree, key: &[u8]) -> Vec<u8> {
        engine.get(tree, key).unwrap().unwrap()
    }
    let log = |index: u64| index.to_be_bytes();
    let _ = log;
    let attacks: [(&str, Attack, &str); 10] = [
        (
            "altered byte",
            |e| {
                let mut v = get(e, Tree::Log, &3u64.to_be_bytes());
                *v.last_mut().unwrap() ^= 1;
                put(e, Tree::Log, &3u64.to_be_bytes(), v);
            },
            "record 0000000000000003 in tree log",
        ),
        (
            "other term",
            |e| {
                let mut v = get(e, Tree::Log, &3u64.to_be_bytes());
                v[16] ^= 1;
                put(e, Tree::Log, &3u64.to_be_bytes(), v);
            },
            "record 0000000000000003 in tree log",
        ),
        (
            "moved entry",
            |e| {
                let v = get(e, Tree::Log, &3u64.to_be_bytes());
                put(e, Tree::Log, &4u64.to_be_bytes(), v);
            },
            "record 0000000000000004 in tree log",
        ),
        (
            "copied past the end",
            |e| {
                let v = get(e, Tree::Log, &9u64.to_be_bytes());
                put(e, Tree::Log, &10u64.to_be_bytes(), v);
            },
            "record 000000000000000a in tree log",
        ),
        (
            "moved over trees",
            |e| {
                let v = get(e, Tree::Vote, b"vote");
                put(e, Tree::State, b"vote", v);
            },
            "record 766f7465 in tree state",
        ),
        (
            "cut record",
            |e| {
                put(e, Tree::Vote, b"vote", vec![1; 20]);
            },
            "record 766f7465 in tree vote",
        ),
        (
            "removed last entry",
            |e| {
                let mut b = Batch::new();
                b.delete(Tree::Log, 9u64.to_be_bytes());
                e.write(&b).unwrap();
            },
            "tree log holds another set",
        ),
        (
            "removed vote",
            |e| {
                let mut b = Batch::new();
                b.delete(Tree::Vote, *b"vote");
                e.write(&b).unwrap();
            },
            "tree vote holds another set",
        ),
        (
            "removed header",
            |e| {
                let mut b = Batch::new();
                b.delete(Tree::Meta, *b"store");
                e.write(&b).unwrap();
            },
            "missing, while other records exist",
        ),
        ("foreign meta record", |e| put(e, Tree::Meta, b"x", vec![]), "does not belong there"),
    ];
    for (name, attack, says) in attacks {
        let bed = Bed::new(kind);
        let store = bed.store();
        store.append(&(0..10).map(|i| entry(i, 1, 50)).collect::<Vec<_>>()).unwrap();
        store.save_vote(b"vote").unwrap();
        drop(store);
        attack(bed.engine().as_ref());
        let error = bed.try_store().expect_err(name).to_string();
        assert!(error.contains(says), "{name}: {error}");
        assert!(error.contains("rejoin"), "{name}: {error}");
    }
}

fn older_records_and_older_commits_are_noticed(kind: EngineKind) {
    let dump = |engine: &dyn Engine| {
        let mut all = Vec::new();
        for tree in Tree::ALL {
            scan::<EngineError>(engine, tree, b"", None, |key, value| {
                all.push((tree, key.to_vec(), value.to_vec()));
                Ok(())
            })
            .unwrap();
        }
        all
    };
    let restore = |engine: &dyn Engine, records: &[(Tree, Vec<u8>, Vec<u8>)]| {
        let mut batch = Batch::new();
        for tree in Tree::ALL {
            batch.delete_range(tree, *b"", None);
        }
        for (tree, key, value) in records {
            batch.put(*tree, key.clone(), value.clone());
        }
        engine.write(&batch).unwrap();
    };
    let bed = Bed::new(kind);
    let store = bed.store();
    store.append(&(0..10).map(|i| entry(i, 1, 50)).collect::<Vec<_>>()).unwrap();
    store.save_vote(b"vote for a").unwrap();
    drop(store);
    let (old, old_anchor) = (dump(bed.engine().as_ref()), std::fs::read(bed.path().join("anchor")).unwrap());
    let store = bed.store();
    store.save_vote(b"vote for b").unwrap();
    drop(store);
    let new = dump(bed.engine().as_ref());

    // One commit back, consistent in itself.
    restore(bed.engine().as_ref(), &old);
    let error = bed.try_store().unwrap_err();
    assert_eq!(error, StoreError::SteppedBack { found: 2, found_last: Some(at(9, 1)), anchored: 3, anchored_last: Some(at(9, 1)) });
    // The old vote alone, everything else new.
    restore(bed.engine().as_ref(), &new);
    let vote = old.iter().find(|(tree, ..)| *tree == Tree::Vote).unwrap();
    let mut batch = Batch::new();
    batch.put(Tree::Vote, vote.1.clone(), vote.2.clone());
    bed.engine().write(&batch).unwrap();
    assert_eq!(bed.try_store().unwrap_err(), StoreError::TreeChanged { tree: Tree::Vote, sequence: 3 });
    // The anchor gone, damaged in one slot (the other still tells), damaged in both, in an empty engine's company.
    restore(bed.engine().as_ref(), &new);
    let anchor = bed.path().join("anchor");
    let good = std::fs::read(&anchor).unwrap();
    std::fs::remove_file(&anchor).unwrap();
    assert!(bed.try_store().unwrap_err().to_string().contains("missing, though the store has commits"));
    let mut damaged = good.clone();
    damaged[20] ^= 1;
    damaged[4096 + 20] ^= 1;
    std::fs::write(&anchor, &damaged).unwrap();
    assert!(bed.try_store().unwrap_err().to_string().contains("neither half authenticates"));
    std::fs::write(&anchor, &good).unwrap();
    restore(bed.engine().as_ref(), &[]);
    assert!(bed.try_store().unwrap_err().to_string().contains("the engine is empty"));
    // An older anchor with the newer engine is what a power cut can leave: fine, nothing acknowledged is missing.
    restore(bed.engine().as_ref(), &new);
    std::fs::write(&anchor, &old_anchor).unwrap();
    assert_eq!(bed.store().read_vote().unwrap().unwrap(), b"vote for b");
    // Another branch of history with the same number of commits.
    let branch = std::fs::read(&anchor).unwrap();
    restore(bed.engine().as_ref(), &old);
    std::fs::write(&anchor, &old_anchor).unwrap();
    bed.store().save_vote(b"vote for c").unwrap();
    std::fs::write(&anchor, &branch).unwrap();
    assert_eq!(bed.try_store().unwrap_err(), StoreError::Forked { sequence: 3 });
}

fn another_record_key_is_refused(kind: EngineKind) {
    let bed = Bed::new(kind);
    bed.store().save_vote(b"vote").unwrap();
    let other = dstack_storage::RecordKey::new(dstack_secret::Secret::from_fn(|bytes| bytes.fill(1)));
    let error = LogStore::on_engine(bed.engine(), &other, Some(&bed.path().join("anchor"))).unwrap_err();
    assert_eq!(error, StoreError::Tampered { tree: Tree::Meta, key: "68656164".into(), detail: "does not authenticate" });
}

macro_rules! on_every_engine {
    ($($test:ident)*) => {
        mod sled { use super::*; $(#[test] fn $test() { super::$test(EngineKind::Sled); })* }
        mod redb { use super::*; $(#[test] fn $test() { super::$test(EngineKind::Redb); })* }
        mod memory { use super::*; $(#[test] fn $test() { super::$test(EngineKind::Memory); })* }
    };
}

on_every_engine! {
    batch_is_atomic_ordered_and_survives
    large_values_and_their_removal
    agrees_with_a_model
    log_is_kept_over_restarts
    refuses_what_would_leave_a_gap
    changes_of_one_group_see_each_other
    snapshot_is_switched_whole
    shares_and_state_by_name
    writer_keeps_order_and_shows_what_it_accepted
    reads_beside_writes_see_whole_batches
    tampering_is_noticed_and_named
    older_records_and_older_commits_are_noticed
    another_record_key_is_refused
}
