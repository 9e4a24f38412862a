//! The channel of the memory-search test: every dealer constant that this node deals.
//!
//! Owns: appending to the file that the test names. Never: built without `insecure-test-export`, which release builds refuse.

use dstack_protocol::RootTag;

/// Appends a dealer constant, after the name of its root, to the file that the memory-search test names.
#[expect(clippy::disallowed_methods, reason = "a test's channel, not configuration")]
pub(crate) fn append(root: RootTag, constant: &[u8; 32]) {
    use std::io::Write as _;
    let Ok(path) = std::env::var("DSTACK_INSECURE_EXPORT_FILE") else { return };
    let file = std::fs::OpenOptions::new().create(true).append(true).open(path);
    if let Ok(mut file) = file {
        let _test_will_notice = writeln!(file, "{} {}", root.name(), hex::encode(constant));
    }
}
