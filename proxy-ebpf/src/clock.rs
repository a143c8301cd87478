//! The clock of the connection table: whole seconds of the monotonic clock.

use aya_ebpf::helpers::{bpf_ktime_get_ns, generated::bpf_ktime_get_coarse_ns};

use crate::globals;

#[inline(always)]
pub(crate) fn now_secs() -> u32 {
    let ns = if globals::have_coarse_clock() != 0 {
        // SAFETY: no arguments. Kernel 5.11 (d05512618056); the other branch is pruned there, this one before it.
        unsafe { bpf_ktime_get_coarse_ns() }
    } else {
        // SAFETY: no arguments.
        unsafe { bpf_ktime_get_ns() }
    };
    (ns / 1_000_000_000) as u32
}
