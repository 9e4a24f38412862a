//! Directories: temporary ones, copies in memory, writing them back.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Files below a directory, by relative path.
pub(crate) type Image = BTreeMap<PathBuf, Vec<u8>>;

/// A directory of this process, removed at the end.
pub(crate) struct TempDir(PathBuf);

impl TempDir {
    /// In `parent`, or in shared memory if there is some (its sync costs nothing), or in the system's place.
    pub(crate) fn new(parent: Option<&Path>) -> Result<Self, String> {
        let shared = Path::new("/dev/shm");
        let parent = match parent {
            Some(parent) => parent.to_owned(),
            None if shared.is_dir() => shared.to_owned(),
            None => std::env::temp_dir(),
        };
        let mut name = [0u8; 8];
        getrandom::fill(&mut name).map_err(|error| error.to_string())?;
        let path = parent.join(format!("storage-torment-{:016x}", u64::from_le_bytes(name)));
        fs::create_dir_all(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(Self(path))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            eprintln!("{} left behind: {error}", self.0.display());
        }
    }
}

/// Reads all files below `dir`.
pub(crate) fn read(dir: &Path) -> Result<Image, String> {
    let mut image = Image::new();
    let mut todo = vec![PathBuf::new()];
    while let Some(below) = todo.pop() {
        for item in fs::read_dir(dir.join(&below)).map_err(|error| error.to_string())? {
            let item = item.map_err(|error| error.to_string())?;
            let relative = below.join(item.file_name());
            if item.path().is_dir() {
                todo.push(relative);
            } else {
                image.insert(relative, fs::read(item.path()).map_err(|error| error.to_string())?);
            }
        }
    }
    Ok(image)
}

/// Replaces `dir` by `image`.
pub(crate) fn write(dir: &Path, image: &Image) -> Result<(), String> {
    if dir.exists() {
        fs::remove_dir_all(dir).map_err(|error| error.to_string())?;
    }
    for (relative, bytes) in image {
        let path = dir.join(relative);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(|error| error.to_string())?;
        }
        fs::write(&path, bytes).map_err(|error| error.to_string())?;
    }
    Ok(())
}
