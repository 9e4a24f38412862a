//! A holder that lies, for tests of clients that must notice. Owns: whether this process lies.
//! Never: part of a build without the feature `insecure-rogue`, which release builds refuse. Source: threshold.md §1.3, §10, 5.

use std::sync::atomic::{AtomicBool, Ordering};

use dstack_protocol::release::PartialPlain;

static TWISTS: AtomicBool = AtomicBool::new(false);

/// From now on this process's partials are wrong, or right again.
pub fn twist(twists: bool) {
    TWISTS.store(twists, Ordering::SeqCst);
}

/// The partial that leaves: well formed, sealed like any other, and of another point.
pub(crate) fn twisted(mut plain: PartialPlain) -> PartialPlain {
    if TWISTS.load(Ordering::SeqCst)
        && let Some(element) = plain.elements.first_mut()
    {
        *element = plain.vk;
    }
    plain
}
