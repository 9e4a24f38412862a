//! [`Wiping`]: a global allocator that overwrites every block before it is freed. Owns: that and nothing else.
//!
//! For processes whose libraries free secrets unwiped: our own types wipe themselves, the engines behind threshold signatures do not
//! in every place (ADR 0017). Does not cover: stack, registers, blocks still in use, a process that is killed.

#![expect(unsafe_code, reason = "a global allocator is an unsafe trait; each block says why it is sound")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::hint::black_box;

/// Hands every call to `A` and overwrites a block with zeros before `A` gets it back.
///
/// A block that grows is moved to a new one and the old one wiped, also where `A` could have grown it in place.
#[derive(Debug, Clone, Copy, Default)]
pub struct Wiping<A = System>(A);

impl Wiping<System> {
    /// Over the system's allocator.
    pub const fn system() -> Self {
        Self(System)
    }
}

impl<A> Wiping<A> {
    /// Over another allocator.
    pub const fn over(inner: A) -> Self {
        Self(inner)
    }
}

// SAFETY: memory comes from `A`, which keeps the contract; a block is written to only while it is still allocated, within its layout.
// `realloc` is the trait's own: allocate, copy, deallocate.
unsafe impl<A: GlobalAlloc> GlobalAlloc for Wiping<A> {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's layout is passed on.
        unsafe { self.0.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's layout is passed on.
        unsafe { self.0.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the block is allocated with this layout and nobody else's any more.
        unsafe { block.write_bytes(0, layout.size()) };
        // The compiler knows `free` and drops stores before it; it does not know what happens to this pointer.
        // SAFETY: the same block and layout.
        unsafe { self.0.dealloc(black_box(block), layout) }
    }
}
