//! The state machine that joins grant, intent, partials and receipt.
