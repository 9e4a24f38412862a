//! Files of a ramdisk, by path. Owns: the folders above them. Never: the same path twice with different content.

use std::collections::{BTreeMap, BTreeSet};

use crate::eif::Ramdisk;

/// See the module text. The order of the archive is that of the paths.
#[derive(Debug, Clone, Default)]
pub(super) struct Tree {
    folders: BTreeSet<String>,
    files: BTreeMap<String, (u32, Vec<u8>)>,
}

impl Tree {
    pub(super) fn new() -> Self {
        Self::default()
    }

    /// `path` with or without its leading slash.
    pub(super) fn add(&mut self, path: &str, mode: u32, content: Vec<u8>) {
        let path = path.trim_start_matches('/');
        if let Some((folder, _)) = path.rsplit_once('/') {
            self.add_folder(folder);
        }
        self.files.insert(path.to_owned(), (mode, content));
    }

    /// A folder, and those above it.
    pub(super) fn add_folder(&mut self, path: &str) {
        let path = path.trim_start_matches('/');
        let ends = path.match_indices('/').map(|(end, _)| end).chain([path.len()]);
        self.folders.extend(ends.filter_map(|end| path.get(..end)).map(str::to_owned));
    }

    pub(super) fn ramdisk(&self) -> Vec<u8> {
        let disk = self.folders.iter().fold(Ramdisk::new(), |disk, folder| disk.folder(folder));
        self.files.iter().fold(disk, |disk, (path, (mode, content))| disk.file(path, *mode, content)).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_come_before_what_is_in_them() {
        let mut tree = Tree::new();
        tree.add("/usr/lib/x", 0o755, b"1".to_vec());
        tree.add("init", 0o755, b"2".to_vec());
        let expected = Ramdisk::new().folder("usr").folder("usr/lib").file("init", 0o755, b"2").file("usr/lib/x", 0o755, b"1");
        assert_eq!(tree.ramdisk(), expected.finish());
    }
}
