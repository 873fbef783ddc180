//! How much a thread has allocated.
//!
//! A crate of its own, because an allocator cannot be written without unsafe code, which
//! `egress-datapath` forbids itself.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    // Less than nothing where the thread frees what another allocated.
    static NOW: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
    static BEGAN: Cell<isize> = const { Cell::new(0) };
}

/// The system's allocator, counted.
pub struct Counting;

fn grown(bytes: usize) {
    let now = NOW.get().saturating_add_unsigned(bytes);
    NOW.set(now);
    PEAK.set(now.max(PEAK.get()));
}

fn shrunk(bytes: usize) {
    NOW.set(NOW.get().saturating_sub_unsigned(bytes));
}

// SAFETY: everything is the system's allocator's; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        grown(layout.size());
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        shrunk(layout.size());
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        grown(size);
        shrunk(layout.size());
        // SAFETY: the caller's promise is passed on.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

/// Counts from here on.
pub fn begin() {
    BEGAN.set(NOW.get());
    PEAK.set(NOW.get());
}

const MB: f64 = 1e6;

fn since(bytes: isize) -> f64 {
    bytes.saturating_sub(BEGAN.get()).max(0) as f64 / MB
}

/// The most that was allocated at once since then, in megabytes.
pub fn peak() -> f64 {
    since(PEAK.get())
}

/// What was allocated since then and still is, in megabytes.
pub fn held() -> f64 {
    since(NOW.get())
}
