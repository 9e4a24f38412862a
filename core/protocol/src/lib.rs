//! Every type and byte format on a wire, in the log or on disk; limits; versions.
