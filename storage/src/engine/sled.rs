//! [`SledEngine`]: sled 0.34.7, hardened.
//!
//! Owns: the directory `sled`. What is hardened, and why (dependencies.md §5 and §7):
//! * **Durability.** On Linux sled's `flush()` only calls `sync_file_range`, which writes neither the file's size nor the disk's
//!   cache: an acknowledged vote could vanish at power loss. So every batch ends with `flush()` and then `sync_data` on sled's
//!   database file, and with a sync of its directory when the file grew. The background flusher is off: it would hide lost syncs.
//! * **No blob files.** sled puts a page over a quarter of a segment (128 KiB) into a file of its own, which it never syncs. A leaf
//!   holds at most some 20 records, so values over [`INLINE_BYTES_MAX`] are cut into chunks of that size in a tree of their own
//!   and no page can reach the limit (20 × 4.4 KiB).
//! * **Atomic over trees.** One sled transaction spans all trees of a batch; sled recovers it in whole or not at all.
//! * **Errors.** sled keeps its first error for good and panics on some damaged files: [`Engine::reopen`] drops and opens it anew, and
//!   a panic becomes [`EngineError::Panicked`].
//!
//!
//! Not the default: on files whose checksums an adversary made right again sled can loop and take memory without bound (ADR 0001). It
//! remains for disks that only fail, and as the second implementation that keeps the trait honest.
//! Never: sled's merge operators, blobs, compression, background flusher.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError, RwLock};
use std::time::Duration;

use sled::transaction::{TransactionError, Transactional};

use super::{
    Batch, Engine, EngineConfig, EngineKind, Op, Page, PageBuilder, Record, Tree, VALUE_BYTES_MAX, check_space, guarded, sync_dir,
};
use crate::error::EngineError;

/// sled behind [`Engine`].
#[derive(Debug)]
pub struct SledEngine {
    config: EngineConfig,
    open: RwLock<Option<Open>>,
    /// One batch at a time: a batch is computed from what the trees hold.
    writing: Mutex<()>,
    /// Held for writing while a batch is put into the trees, for reading by reads of more than one record: sled's iterators have no
    /// snapshot, and a purge in the middle of a read would look like a gap.
    applying: RwLock<()>,
}

#[derive(Debug)]
struct Open {
    /// All of [`Tree::ALL`] in order, then the tree of chunks.
    trees: Vec<sled::Tree>,
    database: sled::Db,
    /// sled's file, opened a second time to sync it.
    file: File,
    /// Its size at the last sync of the directory.
    file_bytes: AtomicU64,
    /// Number of the next chunked value.
    next_chunked: AtomicU64,
    dir: PathBuf,
}

impl SledEngine {
    /// Opens or creates the database in `config.dir`.
    ///
    /// # Errors
    /// [`EngineError`], all of which mean: do not start.
    pub fn open(config: &EngineConfig) -> Result<Self, EngineError> {
        let open = guarded(|| open_when_released(config))?;
        Ok(Self { config: config.clone(), open: RwLock::new(Some(open)), writing: Mutex::new(()), applying: RwLock::new(()) })
    }

    fn with<T>(&self, run: impl FnOnce(&Open) -> Result<T, EngineError>) -> Result<T, EngineError> {
        let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
        let open = open.as_ref().ok_or(EngineError::Closed)?;
        guarded(|| run(open))
    }
}

/// A thread of sled's pool may hold the files, and their lock, a moment longer than the store that was closed or failed.
fn open_when_released(config: &EngineConfig) -> Result<Open, EngineError> {
    for _ in 0..REOPEN_TRIES {
        match Open::new(config) {
            Err(EngineError::InUse { .. }) => std::thread::sleep(REOPEN_PAUSE),
            answer => return answer,
        }
    }
    Open::new(config)
}

impl Engine for SledEngine {
    fn kind(&self) -> EngineKind {
        EngineKind::Sled
    }

    fn get(&self, tree: Tree, key: &[u8]) -> Result<Option<Vec<u8>>, EngineError> {
        let _whole_batches = self.applying.read().unwrap_or_else(PoisonError::into_inner);
        self.with(|open| match open.tree(tree)?.get(key).map_err(failed)? {
            Some(stored) => open.value(&stored).map(Some),
            None => Ok(None),
        })
    }

    fn range(&self, tree: Tree, start: &[u8], end: Option<&[u8]>, page: Page) -> Result<Vec<Record>, EngineError> {
        if end.is_some_and(|end| end <= start) {
            return Ok(Vec::new());
        }
        let _whole_batches = self.applying.read().unwrap_or_else(PoisonError::into_inner);
        self.with(|open| {
            let mut found = PageBuilder::new(page);
            for record in open.tree(tree)?.range::<&[u8], _>(start..) {
                let (key, stored) = record.map_err(failed)?;
                if found.is_full() || end.is_some_and(|end| key.as_ref() >= end) {
                    break;
                }
                found.push(key.to_vec(), open.value(&stored)?);
            }
            Ok(found.records)
        })
    }

    fn last(&self, tree: Tree) -> Result<Option<Record>, EngineError> {
        let _whole_batches = self.applying.read().unwrap_or_else(PoisonError::into_inner);
        self.with(|open| match open.tree(tree)?.last().map_err(failed)? {
            Some((key, stored)) => Ok(Some((key.to_vec(), open.value(&stored)?))),
            None => Ok(None),
        })
    }

    fn write(&self, batch: &Batch) -> Result<(), EngineError> {
        batch.check()?;
        check_space(&self.config.dir, batch.size_bytes(), self.config.reserve_bytes)?;
        let _one_at_a_time = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        self.with(|open| {
            let batches = open.expand(batch)?;
            {
                let _no_reads = self.applying.write().unwrap_or_else(PoisonError::into_inner);
                open.apply(&batches)?;
            }
            open.sync()
        })
    }

    fn reopen(&self) -> Result<(), EngineError> {
        let mut open = self.open.write().unwrap_or_else(PoisonError::into_inner);
        guarded(|| {
            drop(open.take());
            *open = Some(open_when_released(&self.config)?);
            Ok(())
        })
    }
}

impl Drop for SledEngine {
    fn drop(&mut self) {
        // After an input/output error sled panics when it is dropped (it syncs and unwraps). Everything acknowledged is synced already.
        let open = self.open.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        let dropped = guarded(|| {
            drop(open);
            Ok(())
        });
        if let Err(error) = dropped {
            tracing::warn!(%error, "sled did not close cleanly");
        }
    }
}

/// The final effect of a batch on one tree: a stored value, or none for a removal.
type Effects = BTreeMap<Vec<u8>, Option<Vec<u8>>>;

impl Open {
    fn new(config: &EngineConfig) -> Result<Self, EngineError> {
        let io = |during| move |error: std::io::Error| EngineError::from_io(during, &error);
        let dir = config.dir.join("sled");
        fs::create_dir_all(&dir).map_err(io("create directory"))?;
        let database = sled::Config::new()
            .path(&dir)
            .cache_capacity(config.cache_bytes)
            .flush_every_ms(None)
            .use_compression(false)
            .open()
            .map_err(failed)?;
        let mut trees = Vec::with_capacity(Tree::ALL.len().saturating_add(1));
        for name in Tree::ALL.iter().map(|tree| tree.as_str()).chain([CHUNKS]) {
            trees.push(database.open_tree(name).map_err(failed)?);
        }
        let file = File::open(dir.join("db")).map_err(io("open sled file"))?;
        let open = Self { trees, database, file, file_bytes: AtomicU64::new(0), next_chunked: AtomicU64::new(0), dir };
        let next = match open.chunks()?.last().map_err(failed)? {
            Some((key, _)) => chunk_owner(&key)?.saturating_add(1),
            None => 0,
        };
        open.next_chunked.store(next, Ordering::Relaxed);
        // Names made by this open (and by the engine's directory itself) become durable with the first batch at the latest.
        open.sync()?;
        sync_dir(&config.dir).map_err(io("sync directory"))?;
        if let Some(parent) = config.dir.parent() {
            sync_dir(parent).map_err(io("sync directory"))?;
        }
        Ok(open)
    }

    fn tree(&self, tree: Tree) -> Result<&sled::Tree, EngineError> {
        self.trees.get(tree.slot()).ok_or(EngineError::Closed)
    }

    fn chunks(&self) -> Result<&sled::Tree, EngineError> {
        self.trees.last().ok_or(EngineError::Closed)
    }

    /// Puts a stored value together.
    fn value(&self, stored: &[u8]) -> Result<Vec<u8>, EngineError> {
        match Stored::parse(stored)? {
            Stored::Inline(value) => Ok(value.to_vec()),
            Stored::Chunked { owner, bytes } => {
                let mut value = Vec::new();
                for record in self.chunks()?.scan_prefix(owner.to_be_bytes()) {
                    let (_, chunk) = record.map_err(failed)?;
                    value.extend_from_slice(&chunk);
                    if value.len() > bytes {
                        break;
                    }
                }
                if value.len() != bytes {
                    return Err(EngineError::Corrupt {
                        detail: format!("chunks of value {owner} make {} bytes, not {bytes}", value.len()),
                    });
                }
                Ok(value)
            }
        }
    }

    /// Works out what `batch` leaves behind, range deletes and chunks spelled out.
    fn expand(&self, batch: &Batch) -> Result<Vec<sled::Batch>, EngineError> {
        let mut values: Vec<Effects> = vec![Effects::new(); Tree::ALL.len()];
        for op in batch.ops() {
            match op {
                Op::Put { tree, key, value } => {
                    effects(&mut values, *tree)?.insert(key.clone(), Some(value.clone()));
                }
                Op::Delete { tree, key } => {
                    effects(&mut values, *tree)?.insert(key.clone(), None);
                }
                Op::DeleteRange { end: Some(end), start, .. } if end <= start => {}
                Op::DeleteRange { tree, start, end } => {
                    let before_end = |key: &[u8]| end.as_deref().is_none_or(|end| key < end);
                    let effects = effects(&mut values, *tree)?;
                    for (_, value) in effects.range_mut(start.clone()..).take_while(|(key, _)| before_end(key)) {
                        *value = None;
                    }
                    for key in self.tree(*tree)?.range::<&[u8], _>(start.as_slice()..).keys() {
                        let key = key.map_err(failed)?;
                        if !before_end(&key) {
                            break;
                        }
                        effects.insert(key.to_vec(), None);
                    }
                }
            }
        }
        let mut batches: Vec<sled::Batch> = Vec::with_capacity(self.trees.len());
        let mut chunks = sled::Batch::default();
        for (tree, effects) in Tree::ALL.into_iter().zip(values) {
            let mut changes = sled::Batch::default();
            for (key, value) in effects {
                self.remove_chunks(tree, &key, &mut chunks)?;
                match value {
                    None => changes.remove(key),
                    Some(value) => changes.insert(key, self.stored(&value, &mut chunks)),
                }
            }
            batches.push(changes);
        }
        batches.push(chunks);
        Ok(batches)
    }

    /// If the value now at `key` is chunked, its chunks go with it.
    fn remove_chunks(&self, tree: Tree, key: &[u8], chunks: &mut sled::Batch) -> Result<(), EngineError> {
        let Some(old) = self.tree(tree)?.get(key).map_err(failed)? else { return Ok(()) };
        if let Stored::Chunked { owner, .. } = Stored::parse(&old)? {
            for chunk in self.chunks()?.scan_prefix(owner.to_be_bytes()).keys() {
                chunks.remove(chunk.map_err(failed)?);
            }
        }
        Ok(())
    }

    /// How `value` is stored; what does not fit goes to `chunks`.
    fn stored(&self, value: &[u8], chunks: &mut sled::Batch) -> Vec<u8> {
        if value.len() <= INLINE_BYTES_MAX {
            let mut stored = Vec::with_capacity(value.len().saturating_add(1));
            stored.push(TAG_INLINE);
            stored.extend_from_slice(value);
            return stored;
        }
        let owner = self.next_chunked.fetch_add(1, Ordering::Relaxed);
        for (number, chunk) in (0u32..).zip(value.chunks(INLINE_BYTES_MAX)) {
            let mut key = owner.to_be_bytes().to_vec();
            key.extend_from_slice(&number.to_be_bytes());
            chunks.insert(key, chunk);
        }
        let mut stored = vec![TAG_CHUNKED];
        stored.extend_from_slice(&owner.to_be_bytes());
        stored.extend_from_slice(&u32::try_from(value.len()).unwrap_or(u32::MAX).to_be_bytes());
        stored
    }

    fn apply(&self, batches: &[sled::Batch]) -> Result<(), EngineError> {
        self.trees
            .as_slice()
            .transaction(|trees| {
                for (tree, batch) in trees.iter().zip(batches) {
                    tree.apply_batch(batch)?;
                }
                Ok(())
            })
            .map_err(|error| match error {
                TransactionError::Storage(error) => failed(error),
                TransactionError::Abort(()) => EngineError::Closed,
            })
    }

    /// The durability point.
    fn sync(&self) -> Result<(), EngineError> {
        let io = |during| move |error: std::io::Error| EngineError::from_io(during, &error);
        self.database.flush().map_err(failed)?;
        self.file.sync_data().map_err(io("sync sled file"))?;
        let bytes = self.file.metadata().map_err(io("sled file size"))?.len();
        if self.file_bytes.swap(bytes, Ordering::Relaxed) != bytes {
            sync_dir(&self.dir).map_err(io("sync directory"))?;
        }
        Ok(())
    }
}

fn effects(values: &mut [Effects], tree: Tree) -> Result<&mut Effects, EngineError> {
    values.get_mut(tree.slot()).ok_or(EngineError::Closed)
}

/// What a sled value holds.
enum Stored<'a> {
    Inline(&'a [u8]),
    Chunked { owner: u64, bytes: usize },
}

impl<'a> Stored<'a> {
    fn parse(stored: &'a [u8]) -> Result<Self, EngineError> {
        let corrupt = |detail: &str| EngineError::Corrupt { detail: detail.to_owned() };
        match stored.split_first() {
            Some((&TAG_INLINE, value)) => Ok(Self::Inline(value)),
            Some((&TAG_CHUNKED, rest)) => {
                let rest: &[u8; 12] = rest.try_into().map_err(|_| corrupt("reference to chunks has a wrong size"))?;
                let (owner, bytes) = rest.split_at(8);
                let owner = u64::from_be_bytes(owner.try_into().map_err(|_| corrupt("reference to chunks"))?);
                let bytes = u32::from_be_bytes(bytes.try_into().map_err(|_| corrupt("reference to chunks"))?);
                let bytes = usize::try_from(bytes).map_err(|_| corrupt("size of a chunked value"))?;
                if bytes > VALUE_BYTES_MAX {
                    return Err(corrupt("size of a chunked value is over the limit"));
                }
                Ok(Self::Chunked { owner, bytes })
            }
            _ => Err(corrupt("value has an unknown tag")),
        }
    }
}

fn chunk_owner(key: &[u8]) -> Result<u64, EngineError> {
    key.first_chunk::<8>()
        .map(|owner| u64::from_be_bytes(*owner))
        .ok_or_else(|| EngineError::Corrupt { detail: "key of a chunk is too short".to_owned() })
}

fn failed(error: sled::Error) -> EngineError {
    match error {
        sled::Error::Io(error)
            if error.kind() == std::io::ErrorKind::WouldBlock || error.to_string().contains("could not acquire lock") =>
        {
            EngineError::InUse { detail: error.to_string() }
        }
        sled::Error::Io(error) => EngineError::from_io("sled", &error),
        error => EngineError::Corrupt { detail: error.to_string() },
    }
}

const CHUNKS: &str = "chunks";
const TAG_INLINE: u8 = 0;
const TAG_CHUNKED: u8 = 1;
/// How often, and how far apart, [`Engine::reopen`] tries to get the files' lock back.
const REOPEN_TRIES: u32 = 50;
const REOPEN_PAUSE: Duration = Duration::from_millis(100);
/// Largest value kept in one sled record, see the module's text.
const INLINE_BYTES_MAX: usize = 4096;
