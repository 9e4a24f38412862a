//! [`MemoryEngine`]: the model the others are compared with, and an engine for tests. Never durable.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use super::{Batch, Engine, EngineKind, Op, Page, PageBuilder, Record, Tree};
use crate::error::EngineError;

/// Trees in memory. Clones share them, so a test can look at, alter or reopen what another handle wrote.
#[derive(Debug, Clone, Default)]
pub struct MemoryEngine {
    trees: Arc<RwLock<Trees>>,
}

#[derive(Debug, Default)]
struct Trees {
    trees: [BTreeMap<Vec<u8>, Vec<u8>>; 6],
    /// Sum of keys and values that may be stored, for tests of a full disk.
    capacity_bytes: Option<u64>,
}

impl MemoryEngine {
    /// Empty trees without a limit.
    pub fn new() -> Self {
        Self::default()
    }

    /// Limits what may be stored, or lifts the limit.
    pub fn limit(&self, capacity_bytes: Option<u64>) {
        self.trees.write().unwrap_or_else(PoisonError::into_inner).capacity_bytes = capacity_bytes;
    }

    fn read(&self) -> RwLockReadGuard<'_, Trees> {
        // A writer that panicked has not swapped its copy in: what is here is whole.
        self.trees.read().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Trees {
    fn tree(&self, tree: Tree) -> &BTreeMap<Vec<u8>, Vec<u8>> {
        self.trees.get(tree.slot()).expect("one map for each tree")
    }

    fn tree_mut(&mut self, tree: Tree) -> &mut BTreeMap<Vec<u8>, Vec<u8>> {
        self.trees.get_mut(tree.slot()).expect("one map for each tree")
    }

    fn size_bytes(&self) -> u64 {
        self.trees.iter().flatten().map(|(key, value)| u64::try_from(key.len().saturating_add(value.len())).unwrap_or(u64::MAX)).sum()
    }
}

impl Engine for MemoryEngine {
    fn kind(&self) -> EngineKind {
        EngineKind::Memory
    }

    fn get(&self, tree: Tree, key: &[u8]) -> Result<Option<Vec<u8>>, EngineError> {
        Ok(self.read().tree(tree).get(key).cloned())
    }

    fn range(&self, tree: Tree, start: &[u8], end: Option<&[u8]>, page: Page) -> Result<Vec<Record>, EngineError> {
        let trees = self.read();
        let mut found = PageBuilder::new(page);
        for (key, value) in trees.tree(tree).range(start.to_vec()..) {
            if found.is_full() || end.is_some_and(|end| key.as_slice() >= end) {
                break;
            }
            found.push(key.clone(), value.clone());
        }
        Ok(found.records)
    }

    fn last(&self, tree: Tree) -> Result<Option<Record>, EngineError> {
        Ok(self.read().tree(tree).last_key_value().map(|(key, value)| (key.clone(), value.clone())))
    }

    fn write(&self, batch: &Batch) -> Result<(), EngineError> {
        batch.check()?;
        let mut trees = self.trees.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(capacity) = trees.capacity_bytes {
            let need_bytes = trees.size_bytes().saturating_add(batch.size_bytes());
            if need_bytes > capacity {
                return Err(EngineError::Full { need_bytes, free_bytes: capacity.saturating_sub(trees.size_bytes()) });
            }
        }
        for op in batch.ops() {
            match op {
                Op::Put { tree, key, value } => {
                    trees.tree_mut(*tree).insert(key.clone(), value.clone());
                }
                Op::Delete { tree, key } => {
                    trees.tree_mut(*tree).remove(key);
                }
                Op::DeleteRange { tree, start, end } => {
                    trees.tree_mut(*tree).retain(|key, _| key < start || end.as_ref().is_some_and(|end| key >= end))
                }
            }
        }
        Ok(())
    }

    fn reopen(&self) -> Result<(), EngineError> {
        Ok(())
    }
}
