//! [`SegmentReader`]: all entries of a directory in order, every checksum and link verified. For offline verification.
//! Never: changes a file, so it also reads the directory of a running node (whose last batch may then look torn).

use std::collections::VecDeque;
use std::fs::File;
use std::path::{Path, PathBuf};

use super::frame::Checksum;
use super::walk::{Step, Walk, io, list};
use crate::error::SegmentError;
use crate::sealed::RecordKey;

/// Iterates over `(position, bytes)`. Ends after the first error.
#[derive(Debug)]
pub struct SegmentReader {
    with: Checksum,
    files: VecDeque<PathBuf>,
    current: Option<(File, Walk)>,
    /// Where the chain stands: next position and last checksum; none before the first file.
    link: Option<(u64, [u8; 32])>,
    ready: VecDeque<(u64, Vec<u8>)>,
    torn_tail_bytes: u64,
    ended: bool,
}

impl SegmentReader {
    /// Reads `dir`, with the key if it was written with one.
    ///
    /// # Errors
    /// The file system's. Everything else shows while iterating.
    pub fn open(dir: &Path, key: Option<&RecordKey>) -> Result<Self, SegmentError> {
        Ok(Self {
            with: Checksum::new(key),
            files: list(dir)?.into(),
            current: None,
            link: None,
            ready: VecDeque::new(),
            torn_tail_bytes: 0,
            ended: false,
        })
    }

    /// After the last entry: bytes of a batch that was cut short at the end, 0 if none.
    pub fn torn_tail_bytes(&self) -> u64 {
        self.torn_tail_bytes
    }

    /// Makes entries ready; false at the end.
    fn advance(&mut self) -> Result<bool, SegmentError> {
        loop {
            let Some((file, walk)) = &mut self.current else {
                let Some(path) = self.files.pop_front() else { return Ok(false) };
                self.next_file(&path)?;
                continue;
            };
            match walk.step(file, &self.with)? {
                Step::Frame { header, entries, .. } => {
                    self.ready.extend((header.first_position..).zip(entries));
                    return Ok(true);
                }
                Step::TornTail if !self.files.is_empty() => return Err(walk.damaged("batch is cut, though a segment follows")),
                Step::TornTail => {
                    self.torn_tail_bytes = walk.file_bytes.saturating_sub(walk.offset);
                    return Ok(false);
                }
                Step::End => {
                    self.link = Some((walk.next_position, walk.previous));
                    self.current = None;
                }
            }
        }
    }

    fn next_file(&mut self, path: &Path) -> Result<(), SegmentError> {
        let file = File::open(path).map_err(|error| io("open", path, &error))?;
        match Walk::begin(&file, path, &self.with)? {
            None if self.files.is_empty() => {
                self.torn_tail_bytes = file.metadata().map_err(|error| io("size", path, &error))?.len();
                Ok(())
            }
            None => Err(SegmentError::Damaged {
                path: path.display().to_string(),
                offset: 0,
                position: self.link.map_or(0, |(position, _)| position),
                detail: "file header is cut, though a segment follows",
            }),
            Some((walk, header)) => {
                super::check_link(self.link, &header, &walk)?;
                self.current = Some((file, walk));
                Ok(())
            }
        }
    }
}

impl Iterator for SegmentReader {
    type Item = Result<(u64, Vec<u8>), SegmentError>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.ready.is_empty() {
            if self.ended {
                return None;
            }
            match self.advance() {
                Ok(more) => self.ended = !more,
                Err(error) => {
                    self.ended = true;
                    return Some(Err(error));
                }
            }
        }
        self.ready.pop_front().map(Ok)
    }
}
