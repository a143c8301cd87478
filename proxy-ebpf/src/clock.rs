//! The clock of the connection table: whole seconds of the monotonic clock.
//!
//! Every packet asks for it, and what a helper costs adds up. So a reading is shared for a few ticks of the kernel's timer, whose count
//! the verifier has read in place, without a call.

use aya_ebpf::helpers::{
    bpf_ktime_get_ns,
    generated::{bpf_jiffies64, bpf_ktime_get_coarse_ns},
};

use crate::{globals, maps::CLOCK};

/// Ticks for which a reading stands: between 8 and 80 ms.
const GOOD_FOR: u32 = 8;

#[inline(always)]
pub(crate) fn now_secs() -> u32 {
    // SAFETY: no arguments. Kernel 5.6 (5576b991e9c1).
    let ticks = unsafe { bpf_jiffies64() } as u32;
    let Some(reading) = CLOCK.get_ptr_mut(0) else { return exact_secs() };
    // SAFETY: a live element; one aligned word, seconds over ticks, which other CPUs write whole.
    let last = unsafe { reading.read_volatile() };
    if ticks.wrapping_sub(last as u32) < GOOD_FOR && last >> 32 != 0 {
        return (last >> 32) as u32;
    }
    let secs = exact_secs();
    // SAFETY: as above.
    unsafe { reading.write_volatile((secs as u64) << 32 | ticks as u64) };
    secs
}

/// Seconds since `then`; none if another CPU noted a second there that has not come here yet.
#[inline(always)]
pub(crate) fn since(then: u32) -> u32 {
    let passed = now_secs().wrapping_sub(then);
    if passed > u32::MAX / 2 { 0 } else { passed }
}

#[inline(always)]
fn exact_secs() -> u32 {
    let ns = if globals::have_coarse_clock() != 0 {
        // SAFETY: no arguments. Kernel 5.11 (d05512618056); the other branch is pruned there, this one before it.
        unsafe { bpf_ktime_get_coarse_ns() }
    } else {
        // SAFETY: no arguments.
        unsafe { bpf_ktime_get_ns() }
    };
    (ns / 1_000_000_000) as u32
}
