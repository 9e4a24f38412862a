//! Raft: messages between nodes, records on disk, leaves of the audit log. The first byte selects; what decodes encodes to something that
//! decodes to the same.

/// See the module text.
pub(crate) fn run(data: &[u8]) {
    let Some((selected, bytes)) = data.split_first() else { return };
    dstack_raft::fuzzing::any(*selected, bytes);
}
