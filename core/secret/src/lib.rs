//! Secret containers: wiped on drop, redacted, compared in constant time.
