//! Audit segment files of foreign bytes: reading ends, in entries or an error, and never goes beyond the file. Reading twice is the same.

use dstack_storage::segments::SegmentReader;

/// See the module text.
pub(crate) fn run(data: &[u8]) {
    let dir = tempfile::tempdir().expect("a folder for the segment");
    std::fs::write(dir.path().join("audit-00000000000000000000.seg"), data).expect("the segment is written");
    let read = || {
        let mut entries = Vec::new();
        for entry in SegmentReader::open(dir.path(), None).expect("the folder is there") {
            match entry {
                Ok((_, bytes)) => entries.push(bytes.len()),
                Err(error) => return (entries, Some(error.to_string())),
            }
        }
        (entries, None)
    };
    let first = read();
    assert!(first.0.iter().sum::<usize>() <= data.len(), "entries are no longer than their file");
    assert_eq!(first, read(), "reading changes nothing");
}
