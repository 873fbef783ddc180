//! How much the process has allocated.
//!
//! A crate of its own, because an allocator cannot be written without unsafe code, which
//! `egress-datapath` forbids itself.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);
static BEGAN: AtomicUsize = AtomicUsize::new(0);

/// The system's allocator, counted.
pub struct Counting;

fn grown(bytes: usize) {
    let now = NOW.fetch_add(bytes, Relaxed) + bytes;
    PEAK.fetch_max(now, Relaxed);
}

// SAFETY: everything is the system's allocator's; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        grown(layout.size());
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        grown(size);
        NOW.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

/// Counts from here on.
pub fn begin() {
    let now = NOW.load(Relaxed);
    BEGAN.store(now, Relaxed);
    PEAK.store(now, Relaxed);
}

const MB: f64 = 1e6;

fn since(bytes: usize) -> f64 {
    bytes.saturating_sub(BEGAN.load(Relaxed)) as f64 / MB
}

/// The most that was allocated at once since then, in megabytes.
pub fn peak() -> f64 {
    since(PEAK.load(Relaxed))
}

/// What was allocated since then and still is, in megabytes.
pub fn held() -> f64 {
    since(NOW.load(Relaxed))
}
