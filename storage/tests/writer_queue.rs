//! The writer's bounded queue, a store that is full, names of engines.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod common;

use std::sync::{Arc, mpsc};

use common::{at, entry, key};
use dstack_storage::engine::MemoryEngine;
use dstack_storage::{Change, EngineError, EngineKind, LogStore, LogWriter, Page, StoreError};

#[test]
fn engine_names_are_those_of_the_configuration() {
    for kind in [EngineKind::Sled, EngineKind::Redb, EngineKind::Memory] {
        assert_eq!(kind.as_str().parse(), Ok(kind));
    }
    assert_eq!("rocksdb".parse::<EngineKind>(), Err(EngineError::UnknownEngine { name: "rocksdb".into() }));
}

#[test]
fn a_full_queue_refuses_and_a_full_store_comes_back() {
    let memory = MemoryEngine::new();
    let store = Arc::new(LogStore::on_engine(Box::new(memory.clone()), &key(), None).unwrap());
    let writer = LogWriter::start(Arc::clone(&store), 1).unwrap();
    let (hold, held) = mpsc::sync_channel::<()>(0);
    let (entered, inside) = mpsc::sync_channel::<()>(1);
    writer
        .submit(Change::Vote(b"a".to_vec()), move |_| {
            entered.send(()).unwrap();
            let _ = held.recv();
        })
        .unwrap();
    inside.recv().unwrap();
    writer.submit(Change::Vote(b"b".to_vec()), |_| {}).unwrap();
    assert_eq!(writer.submit(Change::Append(vec![entry(0, 1, 1)]), |_| {}), Err(StoreError::QueueFull { capacity: 1 }));
    assert_eq!(writer.bounds().last, None, "what was not accepted is not shown");
    drop(hold);
    writer.write(Change::Vote(b"c".to_vec())).unwrap_or(());
    memory.limit(Some(2000));
    let error = loop {
        match writer.write(Change::Append(vec![entry(0, 1, 4000)])) {
            Err(StoreError::QueueFull { .. }) => {}
            other => break other.unwrap_err(),
        }
    };
    assert!(error.is_full(), "{error}");
    assert_eq!((writer.bounds().last, writer.read_range(0, 9, Page::SCAN).unwrap().len()), (None, 0));
    memory.limit(None);
    writer.write(Change::Append(vec![entry(0, 1, 4000)])).unwrap();
    assert_eq!(store.last(), Some(at(0, 1)));
}
