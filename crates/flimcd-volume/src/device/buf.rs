//! Aligned buffers that the kernel can do direct I/O on, and a pool of them for one thread.

use std::{
    alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error},
    fmt,
    ops::{Deref, DerefMut},
    ptr::NonNull,
};

/// Alignment of every buffer's start and capacity: enough for direct I/O on any disk we know.
pub(crate) const BUF_ALIGN: usize = 4096;

/// An owned buffer whose memory starts at a multiple of 4096 and whose capacity is one.
///
/// All of its capacity is initialised memory, so that the length may be set freely; after
/// [`set_len`](Self::set_len) the bytes are whatever was there before.
pub struct IoBuf {
    start: NonNull<u8>,
    len: usize,
    capacity: usize,
}

// SAFETY: the memory is owned by this value alone, as a Vec's is.
unsafe impl Send for IoBuf {}
// SAFETY: a shared reference only gives out shared slices.
unsafe impl Sync for IoBuf {}

impl IoBuf {
    /// A buffer without memory.
    #[must_use]
    pub const fn empty() -> Self {
        Self {
            start: NonNull::dangling(),
            len: 0,
            capacity: 0,
        }
    }

    /// `len` zero bytes.
    #[must_use]
    pub fn zeroed(len: usize) -> Self {
        if len == 0 {
            return Self::empty();
        }
        let layout = Self::layout(len.next_multiple_of(BUF_ALIGN));
        // SAFETY: the layout's size is at least BUF_ALIGN, so not zero.
        let Some(start) = NonNull::new(unsafe { alloc_zeroed(layout) }) else {
            handle_alloc_error(layout)
        };
        Self {
            start,
            len,
            capacity: layout.size(),
        }
    }

    /// A copy of `data`.
    #[must_use]
    pub fn copy_of(data: &[u8]) -> Self {
        let mut buf = Self::zeroed(data.len());
        buf.copy_from_slice(data);
        buf
    }

    #[expect(
        clippy::expect_used,
        reason = "as Vec: more than isize::MAX bytes cannot be asked for"
    )]
    fn layout(capacity: usize) -> Layout {
        Layout::from_size_align(capacity, BUF_ALIGN).expect("buffer size fits in isize")
    }

    /// Bytes that fit without other memory.
    #[must_use]
    pub const fn capacity(&self) -> usize {
        self.capacity
    }

    /// Makes the buffer `len` bytes long; what the bytes beyond the old length are is unspecified.
    ///
    /// # Panics
    /// When `len` is more than the capacity.
    pub fn set_len(&mut self, len: usize) {
        assert!(
            len <= self.capacity,
            "length {len} is beyond the capacity {}",
            self.capacity
        );
        self.len = len;
    }

    /// Pointer to the first byte, valid for reads and writes of the whole capacity.
    pub(crate) fn as_mut_raw(&mut self) -> *mut u8 {
        self.start.as_ptr()
    }
}

impl Default for IoBuf {
    fn default() -> Self {
        Self::empty()
    }
}

impl Drop for IoBuf {
    fn drop(&mut self) {
        if self.capacity > 0 {
            // SAFETY: allocated by `zeroed` with exactly this layout, and not freed before.
            unsafe { dealloc(self.start.as_ptr(), Self::layout(self.capacity)) }
        }
    }
}

impl Deref for IoBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `start` is valid for `capacity` initialised bytes, and len <= capacity; dangling
        // but aligned when both are zero.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl DerefMut for IoBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and the exclusive borrow of self is one of the memory.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl fmt::Debug for IoBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "IoBuf({} of {})", self.len, self.capacity)
    }
}

/// Buffers kept for use again by one thread, by powers of two from 4 KiB. What it keeps is bounded
/// by the bytes given at the start; a buffer that does not fit is freed.
#[derive(Debug)]
pub struct BufPool {
    classes: [Vec<IoBuf>; CLASSES],
    kept_bytes: usize,
    kept_bytes_max: usize,
}

/// 4 KiB to 32 MiB.
const CLASSES: usize = 14;

impl BufPool {
    /// A pool that keeps at most `kept_bytes_max` bytes.
    #[must_use]
    pub fn new(kept_bytes_max: usize) -> Self {
        Self {
            classes: Default::default(),
            kept_bytes: 0,
            kept_bytes_max,
        }
    }

    fn class_of(len: usize) -> usize {
        let units = len.div_ceil(BUF_ALIGN).next_power_of_two();
        units.trailing_zeros() as usize
    }

    /// A buffer of `len` bytes of unspecified content.
    #[must_use]
    pub fn take(&mut self, len: usize) -> IoBuf {
        if len == 0 {
            return IoBuf::empty();
        }
        let class = Self::class_of(len);
        if let Some(mut buf) = self.classes.get_mut(class).and_then(Vec::pop) {
            self.kept_bytes -= buf.capacity();
            buf.set_len(len);
            return buf;
        }
        let mut buf = IoBuf::zeroed(if class < CLASSES {
            BUF_ALIGN << class
        } else {
            len
        });
        buf.set_len(len);
        buf
    }

    /// Takes `buf` back.
    pub fn give(&mut self, buf: IoBuf) {
        let capacity = buf.capacity();
        if capacity == 0 || !capacity.is_power_of_two() {
            return;
        }
        if self.kept_bytes + capacity > self.kept_bytes_max {
            return;
        }
        if let Some(class) = self.classes.get_mut(Self::class_of(capacity)) {
            self.kept_bytes += capacity;
            class.push(buf);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_and_zero() {
        for len in [1, 511, 4096, 4097, 1 << 20] {
            let buf = IoBuf::zeroed(len);
            assert_eq!(buf.as_ptr() as usize % BUF_ALIGN, 0);
            assert_eq!((buf.len(), buf.capacity() % BUF_ALIGN), (len, 0));
            assert!(buf.iter().all(|&b| b == 0));
        }
        assert!(IoBuf::empty().is_empty());
    }

    #[test]
    fn pool_hands_buffers_out_again_and_keeps_to_its_bound() {
        let mut pool = BufPool::new(3 * 4096);
        let first = pool.take(100);
        let address = first.as_ptr();
        pool.give(first);
        let again = pool.take(4096);
        assert_eq!(again.as_ptr(), address);
        assert_eq!(again.len(), 4096);
        pool.give(again);
        for _ in 0..10 {
            pool.give(IoBuf::zeroed(4096));
        }
        assert!(pool.kept_bytes <= 3 * 4096);
        pool.give(IoBuf::zeroed(64 << 20));
        assert!(pool.kept_bytes <= 3 * 4096);
        assert_eq!(pool.take(40 << 20).len(), 40 << 20);
    }

    #[test]
    #[should_panic(expected = "beyond the capacity")]
    fn length_beyond_the_capacity_is_refused() {
        IoBuf::zeroed(10).set_len(5000);
    }
}
