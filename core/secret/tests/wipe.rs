//! Looks at every heap block at the moment it is freed: no block may still hold the marker that secrets of this test carry.
//! Reading there is sound, because the allocator is asked before the block is gone.

#![allow(unsafe_code, reason = "a global allocator is an unsafe trait")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use dstack_secret::{Locked, Secret, SecretBytes};

const MARKER: [u8; 16] = *b"\xd5s3cr3t-m4rk3r\xa7\x11";

struct Inspecting;

static BLOCKS_FREED_WITH_MARKER: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is handed to the system allocator unchanged.
unsafe impl GlobalAlloc for Inspecting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // Zeroed, so that every byte of a block may be read when it is freed.
        // SAFETY: the caller's layout is passed on.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the block is still allocated, `layout.size()` bytes long, and was zeroed by `alloc`.
        let bytes = unsafe { std::slice::from_raw_parts(block, layout.size()) };
        if bytes.windows(MARKER.len()).any(|w| w == MARKER) {
            BLOCKS_FREED_WITH_MARKER.fetch_add(1, Ordering::SeqCst);
        }
        // SAFETY: passed on unchanged.
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Inspecting = Inspecting;

// One test: the counter is shared by the process.
#[test]
fn no_freed_block_holds_a_secret() {
    let freed = || BLOCKS_FREED_WITH_MARKER.load(Ordering::SeqCst);

    // The instrument sees what it must see.
    drop(std::hint::black_box(MARKER.to_vec()));
    assert_eq!(freed(), 1, "a plain vector is freed with its content");

    drop(std::hint::black_box(Secret::<16>::from_fn(|b| *b = MARKER)));
    drop(std::hint::black_box(Secret::<64>::from_fn(|b| b[40..56].copy_from_slice(&MARKER))));
    let _ = std::hint::black_box(Secret::<16>::try_from_fn(|b| {
        *b = MARKER;
        Err(())
    }));
    assert_eq!(freed(), 1, "a fixed secret is wiped, also when filling it failed");

    let mut wide = Vec::with_capacity(64);
    wide.extend_from_slice(&MARKER);
    drop(std::hint::black_box(SecretBytes::take(wide)));
    drop(std::hint::black_box(SecretBytes::from_fn(16, |b| b.copy_from_slice(&MARKER))));
    assert_eq!(freed(), 1, "bytes are wiped");

    let mut slice = MARKER.to_vec();
    let secret = Secret::<16>::take_slice(&mut slice).unwrap();
    drop(slice);
    let locked = Locked::new(secret);
    assert!(locked.expose(|b| *b == MARKER));
    drop(locked);
    assert_eq!(freed(), 1, "the heap copy of a locked secret is wiped");
}
