//! Find a node, verify it, ask, combine.
