//! openraft's own storage suite, on every engine.
//!
//! The suite begins some logs at an index above 1, which no running node does: our store refuses that as a gap. [`Gapless`] purges
//! up to there first, so that the suite's further expectations can be checked.

use std::{io, ops::RangeBounds, sync::Arc};

use dstack_storage::EngineKind;
use openraft::{
    LogState, RaftLogReader, StorageError,
    storage::{IOFlushed, RaftLogStorage},
    testing::log::{StoreBuilder, Suite},
};
use tempfile::TempDir;

use super::{Ledger, open_writer};
use crate::{
    NoObserver,
    apply::{State, StateMachine},
    disk::{Disk, LogStorage},
    toy::Toy,
    types::{Entry, LogId, TypeConfig, Vote},
};

#[derive(Clone)]
struct Gapless(LogStorage);

impl RaftLogReader<TypeConfig> for Gapless {
    async fn try_get_log_entries<R>(&mut self, range: R) -> Result<Vec<Entry>, io::Error>
    where
        R: RangeBounds<u64> + Clone + std::fmt::Debug + Send,
    {
        self.0.try_get_log_entries(range).await
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> Result<Vec<Entry>, io::Error> {
        self.0.limited_get_log_entries(start, end).await
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, io::Error> {
        self.0.read_vote().await
    }
}

impl RaftLogStorage<TypeConfig> for Gapless {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, io::Error> {
        self.0.get_log_state().await
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), io::Error> {
        self.0.save_vote(vote).await
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> Result<(), io::Error> {
        self.0.save_committed(committed).await
    }

    async fn read_committed(&mut self) -> Result<Option<LogId>, io::Error> {
        self.0.read_committed().await
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<TypeConfig>) -> Result<(), io::Error>
    where
        I: IntoIterator<Item = Entry> + Send,
        I::IntoIter: Send,
    {
        let entries: Vec<Entry> = entries.into_iter().collect();
        if let (Some(first), LogState { last_log_id: None, .. }) = (entries.first(), self.0.get_log_state().await?)
            && first.log_id.index > 1
        {
            self.0.purge(LogId::new(first.log_id.leader_id, first.log_id.index - 1)).await?;
        }
        self.0.append(entries, callback).await
    }

    async fn truncate_after(&mut self, kept: Option<LogId>) -> Result<(), io::Error> {
        self.0.truncate_after(kept).await
    }

    async fn purge(&mut self, upto: LogId) -> Result<(), io::Error> {
        self.0.purge(upto).await
    }
}

struct Builder(EngineKind);

impl StoreBuilder<TypeConfig, Gapless, StateMachine<Toy, NoObserver>, TempDir> for Builder {
    async fn build(&self) -> Result<(TempDir, Gapless, StateMachine<Toy, NoObserver>), StorageError<TypeConfig>> {
        let dir = tempfile::tempdir().unwrap();
        let disk = Disk::open(open_writer(self.0, dir.path())).unwrap();
        let state = Arc::new(State::new(Toy { checkpoint_everywhere: true, ..Toy::default() }));
        let sink = Arc::new(std::sync::Mutex::new(Ledger::default()));
        let log = LogStorage::new(disk.clone(), state.watch_applied());
        Ok((dir, Gapless(log), StateMachine::new(state, disk, sink, Arc::new(NoObserver))))
    }
}

async fn passes(engine: EngineKind) {
    Suite::<TypeConfig, Gapless, StateMachine<Toy, NoObserver>, Builder, TempDir>::test_all(Builder(engine)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_passes_the_storage_suite() {
    passes(EngineKind::Memory).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sled_passes_the_storage_suite() {
    passes(EngineKind::Sled).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn redb_passes_the_storage_suite() {
    passes(EngineKind::Redb).await;
}
