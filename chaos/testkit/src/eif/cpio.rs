//! A ramdisk: files and folders in cpio's "newc" form, uncompressed. Owns: an archive that depends on content alone: times, owners and
//! device numbers are zero, the order is the one in which entries were added.
//! Source: the kernel's documentation of initramfs buffers.

/// An archive in the making.
#[derive(Debug, Clone, Default)]
pub struct Ramdisk {
    bytes: Vec<u8>,
    entries: u32,
}

/// Ramdisks lie one after the other in memory; the kernel looks for the next at a multiple of four, and skips zeros.
const BLOCK_BYTES: usize = 512;
const FOLDER: u32 = 0o040_000;
const FILE: u32 = 0o100_000;

impl Ramdisk {
    /// An empty one.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A folder, mode 0755; those above it come first. `path` without a leading slash.
    #[must_use]
    pub fn folder(mut self, path: &str) -> Self {
        self.entry(path, FOLDER | 0o755, 2, &[]);
        self
    }

    /// A file.
    #[must_use]
    pub fn file(mut self, path: &str, mode: u32, content: &[u8]) -> Self {
        self.entry(path, FILE | (mode & 0o777), 1, content);
        self
    }

    /// The archive's bytes.
    #[must_use]
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, 1, &[]);
        let padded = self.bytes.len().next_multiple_of(BLOCK_BYTES);
        self.bytes.resize(padded, 0);
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, links: u32, content: &[u8]) {
        self.entries += 1;
        let size = u32::try_from(content.len()).expect("a file of a ramdisk is smaller than 4 GiB");
        let name_bytes = u32::try_from(path.len() + 1).expect("a path is short");
        // magic; inode, mode, uid, gid, links, time, size, device (2), device of a node (2), length of the name, checksum
        self.bytes.extend_from_slice(b"070701");
        for field in [self.entries, mode, 0, 0, links, 0, size, 0, 0, 0, 0, name_bytes, 0] {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.align();
        self.bytes.extend_from_slice(content);
        self.align();
    }

    fn align(&mut self) {
        let padded = self.bytes.len().next_multiple_of(4);
        self.bytes.resize(padded, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_aligned_and_depend_on_content_alone() {
        let disk = || Ramdisk::new().folder("app").file("app/run", 0o600, b"hello\n").finish();
        let bytes = disk();
        assert_eq!(bytes, disk());
        assert_eq!(bytes.len() % 512, 0);
        let text = String::from_utf8_lossy(&bytes);
        let folder = "07070100000001000041ed000000000000000000000002000000000000000000000000000000000000000000000000\
                      0000000400000000app\0\0\0";
        assert!(text.starts_with(folder), "{text}");
        let file = "0707010000000200008180000000000000000000000001000000000000000600000000000000000000000000000000\
                    0000000800000000app/run\0\0\0hello\n\0\0";
        assert!(text[folder.len()..].starts_with(file), "{text}");
        assert!(text[folder.len() + file.len()..].starts_with("070701"));
        assert!(text.contains("TRAILER!!!\0"));
    }
}
