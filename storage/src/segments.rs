//! [`Segments`]: append-only audit files: entries at positions without a gap, batches with checksums chained over all files.
//!
//! Owns: appending with one `fdatasync` per batch, rotation by size, a sparse index for reads, the check at open.
//! Never: rewrites a byte that was acknowledged. At open a last batch that was cut short is removed (its append never returned);
//! damage anywhere else is refused and named. Appends are idempotent by position: a state machine that applies again after a crash
//! finds its entries there, and is stopped if they differ.
//!
//! What a checksum cannot tell: whether a *whole* batch at the end is missing. So the caller keeps the newest acknowledged position
//! elsewhere (the authenticated store) and gives it at open.
//! Source: issue text on storage ("audit entries go to append-only segment files with batch checksums"); layouts in `frame`.

mod frame;
mod reader;
mod walk;

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use self::frame::{BODY_BYTES_MAX, Checksum, FRAME_HEADER_LEN, FileHeader, encode_frame};
pub use self::reader::SegmentReader;
use self::walk::{Step, Walk, file_name, io, list};
use crate::engine::{check_space, sync_dir};
use crate::error::{EngineError, SegmentError};
use crate::sealed::RecordKey;

/// Where and how to keep segments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SegmentConfig {
    /// Their directory; created if absent.
    pub dir: PathBuf,
    /// Size after which the next batch begins a new file.
    pub segment_bytes_max: u64,
    /// Space that appends must leave free.
    pub reserve_bytes: u64,
    /// Position of the first entry ever, used in an empty directory.
    pub first_position: u64,
    /// First position not known to be acknowledged: everything before it must be there. 0 if nothing is known.
    pub acknowledged_next: u64,
}

impl SegmentConfig {
    /// Files of 64 MiB in `dir`, 32 MiB reserve, positions from 0, nothing known to be acknowledged.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into(), segment_bytes_max: 64 << 20, reserve_bytes: 32 << 20, first_position: 0, acknowledged_next: 0 }
    }
}

/// The segment files of a node, open for appending.
#[derive(Debug)]
pub struct Segments {
    config: SegmentConfig,
    with: Checksum,
    /// By first position. Never empty after an open.
    files: BTreeMap<u64, Segment>,
    next_position: u64,
    previous: [u8; 32],
    /// Set after an error that leaves the end of the last file unknown.
    closed: bool,
    /// What the open removed.
    removed_bytes: u64,
}

#[derive(Debug)]
struct Segment {
    path: PathBuf,
    file: File,
    /// Position and offset of some frames, the first one included.
    index: Vec<Mark>,
    /// End of the last whole frame.
    bytes: u64,
}

#[derive(Debug, Clone, Copy)]
struct Mark {
    position: u64,
    offset: u64,
    previous: [u8; 32],
}

impl Segments {
    /// Opens or creates the segments in `config.dir`, every batch of every file checked, with keyed checksums if a key is given.
    ///
    /// # Errors
    /// [`SegmentError`]: do not start; it names the file, the place and what to do.
    pub fn open(config: SegmentConfig, key: Option<&RecordKey>) -> Result<Self, SegmentError> {
        std::fs::create_dir_all(&config.dir).map_err(|error| io("create", &config.dir, &error))?;
        let with = Checksum::new(key);
        let mut segments = Self {
            with,
            files: BTreeMap::new(),
            next_position: config.first_position,
            previous: [0; 32],
            closed: false,
            removed_bytes: 0,
            config,
        };
        let mut link = None;
        let mut paths = list(&segments.config.dir)?.into_iter().peekable();
        while let Some(path) = paths.next() {
            link = segments.load(&path, link, paths.peek().is_none())?;
        }
        if let Some((next_position, previous)) = link {
            segments.next_position = next_position;
            segments.previous = previous;
        }
        if segments.next_position < segments.config.acknowledged_next {
            return Err(SegmentError::TailLost {
                found_next: segments.next_position,
                acknowledged_next: segments.config.acknowledged_next,
            });
        }
        Ok(segments)
    }

    /// First position that is not there yet.
    pub fn next_position(&self) -> u64 {
        self.next_position
    }

    /// Position of the oldest entry, or of the first to come.
    pub fn first_position(&self) -> u64 {
        self.files.first_key_value().map_or(self.next_position, |(position, _)| *position)
    }

    /// Checksum of the last batch: stands for everything before it. Zeros if there is none.
    pub fn last_checksum(&self) -> [u8; 32] {
        self.previous
    }

    /// Bytes of an unfinished batch that the open removed from the end.
    pub fn removed_bytes(&self) -> u64 {
        self.removed_bytes
    }

    /// Appends `entries` as one batch, durable when this returns. Positions must be consecutive; those that are on disk already must
    /// hold the same bytes and are skipped.
    ///
    /// # Errors
    /// [`SegmentError::Full`]: nothing was written, appends go on when space is back. [`SegmentError::NotContiguous`],
    /// [`SegmentError::TooLarge`], [`SegmentError::Differs`]: nothing was written. After [`SegmentError::Io`] open the segments anew.
    pub fn append<B: AsRef<[u8]>>(&mut self, entries: &[(u64, B)]) -> Result<(), SegmentError> {
        if self.closed {
            return Err(SegmentError::Closed);
        }
        self.check(entries)?;
        let known = entries.iter().take_while(|(position, _)| *position < self.next_position).count();
        let (known, new) = entries.split_at_checked(known).unwrap_or((entries, &[]));
        for (position, bytes) in known {
            if self.read(*position)?.as_deref() != Some(bytes.as_ref()) {
                return Err(SegmentError::Differs { position: *position });
            }
        }
        if new.is_empty() {
            return Ok(());
        }
        let bytes = new.iter().fold(0u64, |sum, (_, entry)| sum.saturating_add(wide(entry.as_ref().len())));
        self.check_space(bytes)?;
        self.rotate_if_full()?;
        let entries: Vec<&[u8]> = new.iter().map(|(_, entry)| entry.as_ref()).collect();
        let (header, frame) = encode_frame(self.next_position, &entries, self.previous, &self.with).ok_or(SegmentError::TooLarge {
            what: "batch",
            bytes,
            max_bytes: BODY_BYTES_MAX,
        })?;
        let mark = Mark { position: self.next_position, offset: 0, previous: self.previous };
        self.write_frame(mark, &frame)?;
        self.next_position = header.next_position();
        self.previous = header.checksum;
        Ok(())
    }

    /// The entry at `position`, its batch checked; none outside what is there.
    ///
    /// # Errors
    /// [`SegmentError::Damaged`] if the disk changed since the open.
    pub fn read(&self, position: u64) -> Result<Option<Vec<u8>>, SegmentError> {
        let mut found = None;
        self.read_from(position, |at, bytes| {
            if at == position {
                found = Some(bytes);
            }
            false
        })?;
        Ok(found)
    }

    /// Entries from `from` on, in order, at most `entries_max` and, after the first, no more than `bytes_max` together.
    ///
    /// # Errors
    /// As [`Segments::read`].
    pub fn read_range(&self, from: u64, entries_max: usize, bytes_max: usize) -> Result<Vec<(u64, Vec<u8>)>, SegmentError> {
        let mut found = Vec::new();
        let mut bytes = 0usize;
        if entries_max > 0 {
            self.read_from(from, |position, entry| {
                bytes = bytes.saturating_add(entry.len());
                if !found.is_empty() && bytes > bytes_max {
                    return false;
                }
                found.push((position, entry));
                found.len() < entries_max
            })?;
        }
        Ok(found)
    }

    /// Gives `visit` every entry from `from` on until it answers false.
    fn read_from(&self, from: u64, mut visit: impl FnMut(u64, Vec<u8>) -> bool) -> Result<(), SegmentError> {
        let Some((&first, _)) = self.files.range(..=from).next_back() else { return Ok(()) };
        if from >= self.next_position {
            return Ok(());
        }
        for segment in self.files.range(first..).map(|(_, segment)| segment) {
            let Some(mark) = segment.mark_before(from) else { continue };
            let mut walk = Walk {
                path: segment.path.clone(),
                offset: mark.offset,
                next_position: mark.position,
                previous: mark.previous,
                file_bytes: segment.bytes,
            };
            loop {
                match walk.step(&segment.file, &self.with)? {
                    Step::Frame { header, entries, .. } => {
                        for (position, entry) in (header.first_position..).zip(entries) {
                            if position >= from && !visit(position, entry) {
                                return Ok(());
                            }
                        }
                    }
                    Step::End => break,
                    Step::TornTail => return Err(walk.damaged("batch changed since the open")),
                }
            }
        }
        Ok(())
    }

    /// Checks one file and takes it in. Answers where the chain stands after it.
    fn load(&mut self, path: &Path, link: Option<(u64, [u8; 32])>, is_last: bool) -> Result<Option<(u64, [u8; 32])>, SegmentError> {
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(|error| io("open", path, &error))?;
        let begun = match Walk::begin(&file, path, &self.with) {
            // A new file is synced with its header before anything is appended: a cut or zeroed header holds nothing acknowledged.
            Err(error) if !(is_last && is_unwritten(&file, path)?) => return Err(error),
            Err(_) => None,
            Ok(begun) => begun,
        };
        let Some((mut walk, header)) = begun else {
            if !is_last {
                let position = link.map_or(0, |(position, _)| position);
                return Err(SegmentError::Damaged {
                    path: path.display().to_string(),
                    offset: 0,
                    position,
                    detail: "file header is cut, though a segment follows",
                });
            }
            self.removed_bytes = file.metadata().map_err(|error| io("size", path, &error))?.len();
            std::fs::remove_file(path).map_err(|error| io("remove", path, &error))?;
            sync_dir(&self.config.dir).map_err(|error| io("sync", &self.config.dir, &error))?;
            return Ok(link);
        };
        check_link(link, &header, &walk)?;
        let mut segment = Segment { path: path.to_owned(), file, index: Vec::new(), bytes: walk.offset };
        loop {
            let previous = walk.previous;
            match walk.step(&segment.file, &self.with)? {
                Step::Frame { offset, header, .. } => {
                    segment.note(Mark { position: header.first_position, offset, previous });
                    segment.bytes = walk.offset;
                }
                Step::End => break,
                Step::TornTail if !is_last => return Err(walk.damaged("batch is cut, though a segment follows")),
                Step::TornTail => {
                    self.removed_bytes = walk.file_bytes.saturating_sub(walk.offset);
                    tracing::warn!(path = %path.display(), bytes = self.removed_bytes, "unfinished audit batch removed");
                    segment.cut(walk.offset).map_err(|error| io("truncate", path, &error))?;
                    break;
                }
            }
        }
        self.files.insert(header.first_position, segment);
        Ok(Some((walk.next_position, walk.previous)))
    }

    fn check<B: AsRef<[u8]>>(&self, entries: &[(u64, B)]) -> Result<(), SegmentError> {
        let mut body_bytes = 0u64;
        let mut expected = None;
        for (position, entry) in entries {
            // The first may lie before the end (then it is compared), but not beyond it.
            let follows = match expected {
                Some(expected) => *position == expected,
                None => *position <= self.next_position,
            };
            if !follows {
                return Err(SegmentError::NotContiguous { expected: expected.unwrap_or(self.next_position), got: *position });
            }
            expected = position.checked_add(1);
            let bytes = wide(entry.as_ref().len());
            if bytes > ENTRY_BYTES_MAX {
                return Err(SegmentError::TooLarge { what: "entry", bytes, max_bytes: ENTRY_BYTES_MAX });
            }
            body_bytes = body_bytes.saturating_add(bytes).saturating_add(4);
        }
        if body_bytes > BODY_BYTES_MAX {
            return Err(SegmentError::TooLarge { what: "batch", bytes: body_bytes, max_bytes: BODY_BYTES_MAX });
        }
        Ok(())
    }

    fn check_space(&self, bytes: u64) -> Result<(), SegmentError> {
        match check_space(&self.config.dir, bytes, self.config.reserve_bytes) {
            Ok(()) => Ok(()),
            Err(EngineError::Full { need_bytes, free_bytes }) => Err(SegmentError::Full { need_bytes, free_bytes }),
            Err(error) => Err(SegmentError::Io {
                during: "statvfs",
                path: self.config.dir.display().to_string(),
                kind: std::io::ErrorKind::Other,
                detail: error.to_string(),
            }),
        }
    }

    /// Begins a new file when there is none or the last one is large enough.
    fn rotate_if_full(&mut self) -> Result<(), SegmentError> {
        if self.files.last_key_value().is_some_and(|(_, last)| last.bytes < self.config.segment_bytes_max.max(SEGMENT_BYTES_MIN)) {
            return Ok(());
        }
        let path = self.config.dir.join(file_name(self.next_position));
        let header = FileHeader::new(self.next_position, self.previous, &self.with);
        let bytes = header.encode(&self.with);
        let made = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&path).and_then(|file| {
            file.write_all_at(&bytes, 0)?;
            file.sync_all()?;
            sync_dir(&self.config.dir)?;
            Ok(file)
        });
        match made {
            Ok(file) => {
                let segment = Segment { path, file, index: Vec::new(), bytes: wide(bytes.len()) };
                self.files.insert(self.next_position, segment);
                self.previous = header.checksum;
                Ok(())
            }
            Err(error) => {
                // Without this file everything is as before; if it cannot be removed the next open does it.
                let removed = std::fs::remove_file(&path);
                self.closed = removed.is_err();
                Err(full_or_io("create", &path, &error))
            }
        }
    }

    fn write_frame(&mut self, mark: Mark, frame: &[u8]) -> Result<(), SegmentError> {
        let Some((_, segment)) = self.files.iter_mut().next_back() else { return Err(SegmentError::Closed) };
        let offset = segment.bytes;
        if let Err(error) = segment.file.write_all_at(frame, offset) {
            // Nothing was synced: cut back what a short write left, and go on if that works.
            let refused = full_or_io("append", &segment.path, &error);
            let cut = segment.cut(offset);
            self.closed = cut.is_err() || !matches!(refused, SegmentError::Full { .. });
            return Err(refused);
        }
        if let Err(error) = segment.file.sync_data() {
            self.closed = true;
            return Err(io("sync", &segment.path, &error));
        }
        segment.note(Mark { offset, ..mark });
        segment.bytes = offset.saturating_add(wide(frame.len()));
        Ok(())
    }
}

impl Segment {
    /// Adds a mark if the last one is far enough behind.
    fn note(&mut self, mark: Mark) {
        if self.index.last().is_none_or(|last| mark.offset.saturating_sub(last.offset) >= INDEX_DISTANCE_BYTES) {
            self.index.push(mark);
        }
    }

    /// The last mark at or before `position`, or the first.
    fn mark_before(&self, position: u64) -> Option<Mark> {
        let after = self.index.partition_point(|mark| mark.position <= position);
        self.index.get(after.saturating_sub(1)).copied()
    }

    fn cut(&mut self, bytes: u64) -> std::io::Result<()> {
        self.file.set_len(bytes)?;
        self.file.sync_all()
    }
}

/// "Never a silent gap": a segment begins where the one before ends, and names its last checksum.
fn check_link(link: Option<(u64, [u8; 32])>, header: &FileHeader, walk: &Walk) -> Result<(), SegmentError> {
    match link {
        None if header.previous == [0; 32] => Ok(()),
        // The first file of the directory follows another one that is gone.
        None => Err(SegmentError::MissingSegment { position: 0 }),
        Some((position, _)) if header.first_position > position => Err(SegmentError::MissingSegment { position }),
        Some((position, previous)) if header.first_position == position && header.previous == previous => Ok(()),
        Some(_) => Err(walk.damaged("segment does not follow the one before it")),
    }
}

/// Whether a file holds no frame at all: nothing but a header that may be cut short or zeros.
fn is_unwritten(file: &File, path: &Path) -> Result<bool, SegmentError> {
    let bytes = file.metadata().map_err(|error| io("size", path, &error))?.len();
    if bytes > frame::FILE_HEADER_LEN {
        return Ok(false);
    }
    let mut header = vec![0; usize::try_from(bytes).unwrap_or(0)];
    file.read_exact_at(&mut header, 0).map_err(|error| io("read", path, &error))?;
    Ok(header.iter().all(|byte| *byte == 0))
}

fn full_or_io(during: &'static str, path: &Path, error: &std::io::Error) -> SegmentError {
    match error.kind() {
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => SegmentError::Full { need_bytes: 0, free_bytes: 0 },
        _ => io(during, path, error),
    }
}

fn wide(bytes: usize) -> u64 {
    u64::try_from(bytes).unwrap_or(u64::MAX)
}

/// Largest entry.
pub const ENTRY_BYTES_MAX: u64 = 8 << 20;
const _: () = assert!(ENTRY_BYTES_MAX + 4 <= BODY_BYTES_MAX && FRAME_HEADER_LEN < BODY_BYTES_MAX);
/// A read walks over at most this much before the batch it wants.
const INDEX_DISTANCE_BYTES: u64 = 64 << 10;
/// Smallest size of a file before the next one begins: a file holds at least one batch.
const SEGMENT_BYTES_MIN: u64 = 4096;
