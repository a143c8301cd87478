//! Copies out of maps that other CPUs write while we read.

use core::{mem::MaybeUninit, mem::size_of};

/// Copies a map value word by word, each load volatile, so that what is checked afterwards is what is used: the compiler
/// may not load a field a second time from the map.
///
/// # Safety
///
/// `from` points into a map value (so it is readable for the size of `T` and 4-byte aligned) and every bit pattern is a
/// valid `T`, whose size is a multiple of 4.
#[inline(always)]
pub(crate) unsafe fn copy<T: Copy>(from: *const T) -> T {
    let mut to = MaybeUninit::<T>::uninit();
    // SAFETY: the caller's promise for `from`; `to` has room for one `T`.
    unsafe { copy_to(from, to.as_mut_ptr()) };
    // SAFETY: every word was written, and every bit pattern is valid.
    unsafe { to.assume_init() }
}

/// [`copy`] to where the value is wanted, with no stop on the stack.
///
/// # Safety
///
/// As for [`copy`]; `to` has room for one `T`, aligned like it.
#[inline(always)]
pub(crate) unsafe fn copy_to<T: Copy>(from: *const T, to: *mut T) {
    const { assert!(size_of::<T>().is_multiple_of(4) && align_of::<T>() <= 8) };
    let mut i = 0;
    if align_of::<T>() == 8 {
        while i < size_of::<T>() / 8 {
            // SAFETY: within `T` on both sides; aligned, as `T` is.
            unsafe { to.cast::<u64>().add(i).write(from.cast::<u64>().add(i).read_volatile()) };
            i += 1;
        }
    } else {
        while i < size_of::<T>() / 4 {
            // SAFETY: within `T` on both sides; 4-byte aligned by the function's contract.
            unsafe { to.cast::<u32>().add(i).write(from.cast::<u32>().add(i).read_volatile()) };
            i += 1;
        }
    }
}
