//! [`Sealed`]: an engine whose records are encrypted, bound to their place, and compared as a set at start with what was last written.
//!
//! Owns: the store's header, the *head* record (sequence of the commit, a fingerprint of each tree, the ends of the log) that every
//! commit replaces in the same batch, the anchor file, the check at start.
//! Never: knows what a value means; repairs what does not authenticate.
//!
//! What is noticed at start, and by what:
//! * a record altered, moved to another key or tree, taken from another store: its tag ([`RecordKey`]), which covers tree, key, stamp
//!   (index and term of a log entry) and version;
//! * a record removed, put back from an older commit, or added: the fingerprint of its tree in the head;
//! * the engine back at an older commit, whole and consistent: the anchor, which holds the newest acknowledged sequence.
//!
//! Not noticed here: all files, anchor included, put back to an older state together; the other nodes tell that (architecture.md §7).
//!
//! The anchor is written after the engine's flush, before anyone is told, and synced when the writer has been idle for a moment or after
//! `SYNC_ANCHOR_EVERY` commits: a killed process never loses it, a power cut may take it back by so much, which only narrows what a
//! *simultaneous* damage to the engine's newest commit would show.
//! Source: architecture.md §8, dependencies.md §0 (sled row) and §5.

mod anchor;
mod head;
mod record;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use self::anchor::Anchor;
pub use self::head::LogBounds;
use self::head::{Fingerprint, Head};
pub use self::record::RecordKey;
pub(crate) use self::record::hex;
use self::record::{Keys, StoreId};
use crate::engine::{Batch, Engine, Page, Tree, scan};
use crate::error::{EngineError, StoreError};

/// Two numbers bound to a record beside its key: index and term of a log entry, zeros elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stamp {
    /// Index of a log entry.
    pub index: u64,
    /// Term of a log entry.
    pub term: u64,
}

/// A record as it was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Opened {
    /// Its key.
    pub key: Vec<u8>,
    /// Its stamp.
    pub stamp: Stamp,
    /// Its value.
    pub value: Vec<u8>,
}

/// One change of a [`SealedBatch`].
#[derive(Debug)]
enum Change {
    Put { tree: Tree, key: Vec<u8>, stamp: Stamp, value: Vec<u8> },
    Delete { tree: Tree, key: Vec<u8> },
    DeleteRange { tree: Tree, start: Vec<u8>, end: Option<Vec<u8>> },
}

/// Changes that become durable together, with the log's new ends.
#[derive(Debug, Default)]
pub struct SealedBatch {
    changes: Vec<Change>,
    bounds: Option<LogBounds>,
}

impl SealedBatch {
    /// Adds a put. [`Tree::Meta`] belongs to the store and is not for callers.
    pub fn put(&mut self, tree: Tree, key: &[u8], stamp: Stamp, value: &[u8]) {
        self.changes.push(Change::Put { tree, key: key.to_vec(), stamp, value: value.to_vec() });
    }

    /// Adds a delete.
    pub fn delete(&mut self, tree: Tree, key: &[u8]) {
        self.changes.push(Change::Delete { tree, key: key.to_vec() });
    }

    /// Adds a range delete, `start` inclusive, `end` exclusive.
    pub fn delete_range(&mut self, tree: Tree, start: &[u8], end: Option<&[u8]>) {
        self.changes.push(Change::DeleteRange { tree, start: start.to_vec(), end: end.map(<[u8]>::to_vec) });
    }

    /// Sets the log's ends as of this commit.
    pub fn set_bounds(&mut self, bounds: LogBounds) {
        self.bounds = Some(bounds);
    }

    /// Whether nothing was added.
    pub fn is_empty(&self) -> bool {
        self.changes.is_empty() && self.bounds.is_none()
    }
}

/// Whether a write whose outcome was unknown turned out to be on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recovered {
    /// It is, in whole.
    Applied,
    /// It is not, nothing of it.
    Absent,
}

/// An engine with authenticated records.
#[derive(Debug)]
pub struct Sealed {
    engine: Box<dyn Engine>,
    keys: Keys,
    writing: Mutex<Writing>,
}

/// What a writer needs and one at a time may touch.
#[derive(Debug)]
struct Writing {
    head: Head,
    anchor: Option<Anchor>,
    unsynced_commits: u32,
    /// Set while a write's outcome is unknown: the head it would have left.
    unknown: Option<Head>,
}

impl Sealed {
    /// Opens a store on `engine`, or makes one if the engine is empty, and checks everything in it.
    ///
    /// `anchor_path`: the anchor file, none for engines that keep nothing.
    ///
    /// # Errors
    /// [`StoreError`]: do not start. The error says what is wrong and how to rejoin.
    pub fn open(engine: Box<dyn Engine>, key: &RecordKey, anchor_path: Option<&Path>) -> Result<Self, StoreError> {
        let stored = engine.get(Tree::Meta, KEY_STORE)?;
        let (keys, head, anchor) = match stored {
            Some(header) => {
                let id = StoreId::parse(&header)?;
                let keys = Keys::derive(key, &id);
                let head = read_head(engine.as_ref(), &keys)?;
                let anchor = anchor_path.map(|path| Anchor::open(path, &keys)).transpose()?;
                if let Some(anchor) = &anchor {
                    anchor.check(&head, &keys)?;
                }
                check_trees(engine.as_ref(), &keys, &head)?;
                (keys, head, anchor)
            }
            None => create(engine.as_ref(), key, anchor_path)?,
        };
        let mut writing = Writing { head, anchor, unsynced_commits: 0, unknown: None };
        // The engine may be one commit ahead (killed between flush and anchor): from here on that commit counts as acknowledged.
        writing.advance_anchor(&keys)?;
        writing.sync_anchor()?;
        Ok(Self { engine, keys, writing: Mutex::new(writing) })
    }

    /// The record at `key`, if any.
    ///
    /// # Errors
    /// [`StoreError::Tampered`] if it is not the one written there.
    pub fn get(&self, tree: Tree, key: &[u8]) -> Result<Option<Opened>, StoreError> {
        match self.engine.get(tree, key)? {
            Some(stored) => self.keys.open(tree, key, &stored).map(Some),
            None => Ok(None),
        }
    }

    /// Records of `start..end` in order, as many as `page` allows.
    ///
    /// # Errors
    /// As [`Sealed::get`].
    pub fn range(&self, tree: Tree, start: &[u8], end: Option<&[u8]>, page: Page) -> Result<Vec<Opened>, StoreError> {
        let records = self.engine.range(tree, start, end, page)?;
        records.iter().map(|(key, stored)| self.keys.open(tree, key, stored)).collect()
    }

    /// The log's ends as of the last commit.
    pub fn bounds(&self) -> LogBounds {
        self.lock().head.bounds
    }

    /// Number of the last commit.
    pub fn sequence(&self) -> u64 {
        self.lock().head.sequence
    }

    /// The engine's name.
    pub fn engine(&self) -> crate::engine::EngineKind {
        self.engine.kind()
    }

    /// Applies all of `batch` durably or nothing.
    ///
    /// # Errors
    /// [`EngineError::Full`] and [`EngineError::TooLarge`]: nothing was written, the store goes on. Any other engine error: unknown;
    /// every write answers [`StoreError::Down`] until [`Sealed::recover`] succeeds.
    pub fn write(&self, batch: SealedBatch) -> Result<(), StoreError> {
        let mut writing = self.lock();
        if writing.unknown.is_some() {
            return Err(StoreError::Down { cause: Box::new(EngineError::Closed.into()) });
        }
        let (sealed, head) = self.seal(&writing.head, batch)?;
        match self.engine.write(&sealed) {
            Ok(()) => {
                let before = std::mem::replace(&mut writing.head, head);
                writing.advance_anchor(&self.keys).inspect_err(|_| {
                    // Durable in the engine, not said in the anchor: unknown to the caller until `recover` says it.
                    let attempted = std::mem::replace(&mut writing.head, before);
                    writing.unknown = Some(attempted);
                })
            }
            Err(error @ (EngineError::Full { .. } | EngineError::TooLarge { .. })) => Err(error.into()),
            Err(error) => {
                writing.unknown = Some(head);
                Err(error.into())
            }
        }
    }

    /// Whether a failed write awaits [`Sealed::recover`].
    pub fn is_down(&self) -> bool {
        self.lock().unknown.is_some()
    }

    /// Reopens the engine after a failed write and finds out whether that write is on disk.
    ///
    /// # Errors
    /// The store stays down; call again when the cause is gone.
    pub fn recover(&self) -> Result<Recovered, StoreError> {
        let mut writing = self.lock();
        let Some(attempted) = writing.unknown.clone() else { return Ok(Recovered::Applied) };
        self.engine.reopen()?;
        let head = read_head(self.engine.as_ref(), &self.keys)?;
        let outcome = if head == attempted {
            Recovered::Applied
        } else if head == writing.head {
            Recovered::Absent
        } else {
            return Err(StoreError::Forked { sequence: head.sequence });
        };
        check_trees(self.engine.as_ref(), &self.keys, &head)?;
        writing.head = head;
        writing.advance_anchor(&self.keys)?;
        writing.unknown = None;
        Ok(outcome)
    }

    /// Syncs the anchor file if it is behind. For idle moments; see the module's text.
    ///
    /// # Errors
    /// The file system's.
    pub fn sync_anchor(&self) -> Result<(), StoreError> {
        self.lock().sync_anchor()
    }

    fn lock(&self) -> MutexGuard<'_, Writing> {
        // The head is replaced only after the engine's answer: a panic in between leaves the old one, which a write then contradicts
        // at the next start at worst.
        self.writing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Encrypts `batch` and works out the head it leaves.
    fn seal(&self, before: &Head, batch: SealedBatch) -> Result<(Batch, Head), StoreError> {
        let mut head = before.clone();
        head.sequence = head.sequence.saturating_add(1);
        if let Some(bounds) = batch.bounds {
            head.bounds = bounds;
        }
        let mut sealed = Batch::new();
        // Records this batch already touched: what the engine still shows for them is not what they are.
        let mut touched: BTreeMap<(Tree, Vec<u8>), Option<Fingerprint>> = BTreeMap::new();
        for change in batch.changes {
            match change {
                Change::Put { tree, key, stamp, value } => {
                    let stored = self.keys.seal(tree, &key, stamp, &value)?;
                    let old = self.fingerprint_now(&touched, tree, &key)?;
                    let new = self.keys.fingerprint(tree, &key, &stored)?;
                    head.replace(tree, old.as_ref(), Some(&new));
                    sealed.put(tree, key.clone(), stored);
                    touched.insert((tree, key), Some(new));
                }
                Change::Delete { tree, key } => {
                    let old = self.fingerprint_now(&touched, tree, &key)?;
                    head.replace(tree, old.as_ref(), None);
                    sealed.delete(tree, key.clone());
                    touched.insert((tree, key), None);
                }
                Change::DeleteRange { tree, start, end } => {
                    let in_range = |key: &[u8]| key >= start.as_slice() && end.as_deref().is_none_or(|end| key < end);
                    for ((of, key), now) in &mut touched {
                        if *of == tree && in_range(key) {
                            head.replace(tree, now.take().as_ref(), None);
                        }
                    }
                    let mut gone = Vec::new();
                    scan::<StoreError>(self.engine.as_ref(), tree, &start, end.as_deref(), |key, stored| {
                        if !touched.contains_key(&(tree, key.to_vec())) {
                            head.replace(tree, Some(&self.keys.fingerprint(tree, key, stored)?), None);
                            gone.push(key.to_vec());
                        }
                        Ok(())
                    })?;
                    for key in gone {
                        touched.insert((tree, key), None);
                    }
                    sealed.delete_range(tree, start, end);
                }
            }
        }
        sealed.put(Tree::Meta, KEY_HEAD, self.keys.seal(Tree::Meta, KEY_HEAD, Stamp::default(), &head.encode())?);
        Ok((sealed, head))
    }

    fn fingerprint_now(
        &self,
        touched: &BTreeMap<(Tree, Vec<u8>), Option<Fingerprint>>,
        tree: Tree,
        key: &[u8],
    ) -> Result<Option<Fingerprint>, StoreError> {
        if let Some(now) = touched.get(&(tree, key.to_vec())) {
            return Ok(*now);
        }
        match self.engine.get(tree, key)? {
            Some(stored) => Ok(Some(self.keys.fingerprint(tree, key, &stored)?)),
            None => Ok(None),
        }
    }
}

impl Writing {
    fn advance_anchor(&mut self, keys: &Keys) -> Result<(), StoreError> {
        let Some(anchor) = &mut self.anchor else { return Ok(()) };
        anchor.write(&self.head, keys)?;
        self.unsynced_commits = self.unsynced_commits.saturating_add(1);
        if self.unsynced_commits >= SYNC_ANCHOR_EVERY {
            self.sync_anchor()?;
        }
        Ok(())
    }

    fn sync_anchor(&mut self) -> Result<(), StoreError> {
        if let (Some(anchor), true) = (&mut self.anchor, self.unsynced_commits > 0) {
            anchor.sync()?;
            self.unsynced_commits = 0;
        }
        Ok(())
    }
}

/// Makes an empty store: anchor first, so that a store without one is always suspect.
fn create(engine: &dyn Engine, key: &RecordKey, anchor_path: Option<&Path>) -> Result<(Keys, Head, Option<Anchor>), StoreError> {
    for tree in Tree::ALL {
        // Records without a header: someone removed the header, or the engine lost it.
        if engine.last(tree)?.is_some() {
            return Err(StoreError::Tampered { tree: Tree::Meta, key: hex(KEY_STORE), detail: "missing, while other records exist" });
        }
    }
    let id = StoreId::random()?;
    let keys = Keys::derive(key, &id);
    let head = Head::default();
    let anchor = anchor_path.map(|path| Anchor::create(path, &head, &keys)).transpose()?;
    let mut batch = Batch::new();
    batch.put(Tree::Meta, KEY_STORE, id.encode());
    batch.put(Tree::Meta, KEY_HEAD, keys.seal(Tree::Meta, KEY_HEAD, Stamp::default(), &head.encode())?);
    engine.write(&batch)?;
    Ok((keys, head, anchor))
}

fn read_head(engine: &dyn Engine, keys: &Keys) -> Result<Head, StoreError> {
    let Some(stored) = engine.get(Tree::Meta, KEY_HEAD)? else {
        return Err(StoreError::Tampered { tree: Tree::Meta, key: hex(KEY_HEAD), detail: "missing" });
    };
    Head::decode(&keys.open(Tree::Meta, KEY_HEAD, &stored)?.value)
}

/// Authenticates every record and compares each tree's set with the head.
fn check_trees(engine: &dyn Engine, keys: &Keys, head: &Head) -> Result<(), StoreError> {
    for tree in Tree::ALL {
        let mut found = Head::default();
        scan::<StoreError>(engine, tree, &[], None, |key, stored| {
            if tree == Tree::Meta {
                // Both were read already; anything else does not belong there.
                return if key == KEY_STORE || key == KEY_HEAD {
                    Ok(())
                } else {
                    Err(StoreError::Tampered { tree, key: hex(key), detail: "does not belong there" })
                };
            }
            keys.open(tree, key, stored)?;
            found.replace(tree, None, Some(&keys.fingerprint(tree, key, stored)?));
            Ok(())
        })?;
        if found.fingerprint(tree) != head.fingerprint(tree) {
            return Err(StoreError::TreeChanged { tree, sequence: head.sequence });
        }
    }
    Ok(())
}

const KEY_STORE: &[u8] = b"store";
const KEY_HEAD: &[u8] = b"head";
/// Commits after which the anchor is synced even if the writer is never idle.
const SYNC_ANCHOR_EVERY: u32 = 64;
