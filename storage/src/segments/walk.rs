//! Walks over one segment file, frame by frame, and tells a clean end from a torn tail from damage.
//!
//! Owns: the decision rule. A frame that does not check is a *torn tail* if nothing after it in the file is a whole frame, no segment
//! follows, and it is not longer than one batch can be (each batch is synced before the next is written). Everything else is *damage*.
//! Never: changes a file.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::frame::{
    BODY_BYTES_MAX, Checksum, FILE_HEADER_BYTES, FILE_HEADER_LEN, FRAME_HEADER_BYTES, FRAME_HEADER_LEN, FRAME_MAGIC, FileHeader,
    FrameHeader, decode_body,
};
use crate::error::SegmentError;

/// A place in a file between two frames.
#[derive(Debug, Clone)]
pub(super) struct Walk {
    pub(super) path: PathBuf,
    pub(super) offset: u64,
    pub(super) next_position: u64,
    pub(super) previous: [u8; 32],
    pub(super) file_bytes: u64,
}

/// What comes next.
pub(super) enum Step {
    /// A whole frame, checked and linked to the one before; the walk stands behind it.
    Frame { offset: u64, header: FrameHeader, entries: Vec<Vec<u8>> },
    /// The file ends here.
    End,
    /// The file's last batch was cut short by a crash; it begins where the walk stands.
    TornTail,
}

impl Walk {
    /// Reads the header of `file`. `None`: the file is shorter than a header (its creation was cut short).
    pub(super) fn begin(file: &File, path: &Path, with: &Checksum) -> Result<Option<(Self, FileHeader)>, SegmentError> {
        let file_bytes = file.metadata().map_err(|error| io("size", path, &error))?.len();
        if file_bytes < FILE_HEADER_LEN {
            return Ok(None);
        }
        let mut bytes = [0; FILE_HEADER_BYTES];
        file.read_exact_at(&mut bytes, 0).map_err(|error| io("read", path, &error))?;
        let damaged = |detail| SegmentError::Damaged {
            path: path.display().to_string(),
            offset: 0,
            position: position_of(path).unwrap_or(0),
            detail,
        };
        let header = FileHeader::decode(&bytes, with).map_err(damaged)?;
        if position_of(path) != Some(header.first_position) {
            return Err(damaged("file name and header disagree"));
        }
        let walk = Self {
            path: path.to_owned(),
            offset: FILE_HEADER_LEN,
            next_position: header.first_position,
            previous: header.checksum,
            file_bytes,
        };
        Ok(Some((walk, header)))
    }

    /// Goes one frame ahead.
    pub(super) fn step(&mut self, file: &File, with: &Checksum) -> Result<Step, SegmentError> {
        if self.offset >= self.file_bytes {
            return Ok(Step::End);
        }
        if let Some((header, body)) = self.whole_frame(file, self.offset, with)? {
            if header.previous != self.previous {
                return Err(self.damaged("batch does not follow the one before it"));
            }
            if header.first_position != self.next_position {
                return Err(self.damaged("position does not follow the one before it"));
            }
            let entries = decode_body(&header, &body).ok_or_else(|| self.damaged("entry lengths do not add up"))?;
            let offset = self.offset;
            self.offset = self.offset.saturating_add(header.frame_bytes());
            self.next_position = header.next_position();
            self.previous = header.checksum;
            return Ok(Step::Frame { offset, header, entries });
        }
        if self.file_bytes.saturating_sub(self.offset) > FRAME_HEADER_LEN.saturating_add(BODY_BYTES_MAX) {
            return Err(self.damaged("more unreadable bytes than one batch can have"));
        }
        if self.whole_frame_follows(file, with)? {
            return Err(self.damaged("checksum of a batch that whole batches follow"));
        }
        Ok(Step::TornTail)
    }

    pub(super) fn damaged(&self, detail: &'static str) -> SegmentError {
        SegmentError::Damaged { path: self.path.display().to_string(), offset: self.offset, position: self.next_position, detail }
    }

    /// The frame at `offset` if it is whole and its checksum is right.
    fn whole_frame(&self, file: &File, offset: u64, with: &Checksum) -> Result<Option<(FrameHeader, Vec<u8>)>, SegmentError> {
        let Some(left) = self.file_bytes.checked_sub(offset).and_then(|left| left.checked_sub(FRAME_HEADER_LEN)) else { return Ok(None) };
        let mut bytes = [0; FRAME_HEADER_BYTES];
        file.read_exact_at(&mut bytes, offset).map_err(|error| io("read", &self.path, &error))?;
        let Some(header) = FrameHeader::decode(&bytes).filter(|header| u64::from(header.body_bytes) <= left) else { return Ok(None) };
        // At most BODY_BYTES_MAX, and no more than the file has.
        let mut body = vec![0; usize::try_from(header.body_bytes).unwrap_or(0)];
        let at = offset.saturating_add(FRAME_HEADER_LEN);
        file.read_exact_at(&mut body, at).map_err(|error| io("read", &self.path, &error))?;
        Ok(header.authenticates(&body, with).then_some((header, body)))
    }

    /// Whether anything after `self.offset` is a whole frame.
    fn whole_frame_follows(&self, file: &File, with: &Checksum) -> Result<bool, SegmentError> {
        let after = self.offset.saturating_add(1);
        let mut tail = vec![0; usize::try_from(self.file_bytes.saturating_sub(after)).unwrap_or(0)];
        file.read_exact_at(&mut tail, after).map_err(|error| io("read", &self.path, &error))?;
        for (distance, window) in (0u64..).zip(tail.windows(FRAME_MAGIC.len())) {
            if window == FRAME_MAGIC && self.whole_frame(file, after.saturating_add(distance), with)?.is_some() {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// All segment files of `dir`, in order of their first position.
pub(super) fn list(dir: &Path) -> Result<Vec<PathBuf>, SegmentError> {
    let mut found = Vec::new();
    for item in std::fs::read_dir(dir).map_err(|error| io("list", dir, &error))? {
        let path = item.map_err(|error| io("list", dir, &error))?.path();
        if let Some(position) = position_of(&path) {
            found.push((position, path));
        }
    }
    found.sort();
    Ok(found.into_iter().map(|(_, path)| path).collect())
}

/// Name of the file whose first entry is at `position`.
pub(super) fn file_name(position: u64) -> String {
    format!("audit-{position:020}.seg")
}

/// The position in a file's name; none for files that are not segments.
pub(super) fn position_of(path: &Path) -> Option<u64> {
    let digits = path.file_name()?.to_str()?.strip_prefix("audit-")?.strip_suffix(".seg")?;
    (digits.len() == 20).then(|| digits.parse().ok())?
}

pub(super) fn io(during: &'static str, path: &Path, error: &std::io::Error) -> SegmentError {
    SegmentError::Io { during, path: path.display().to_string(), kind: error.kind(), detail: error.to_string() }
}
