//! Debug lines, through aya-log: new connections and refusals, for whoever asked for them at load time.
//!
//! The level is a read-only global (`AYA_LOG_LEVEL`): where it is 0, as it is by default, the verifier removes these lines.

use aya_ebpf::EbpfContext;
use aya_log_ebpf::{
    debug,
    macro_support::{Level, level_enabled},
};
use proxy_common::Be16;

use crate::maps::Family;

/// A new connection towards `vip` goes to `backend`.
#[inline(always)]
pub(crate) fn chosen<A: Family>(ctx: &impl EbpfContext, vip: (A, Be16), backend: (A, Be16)) -> u32 {
    // Asked here, so that the call goes away with the line.
    if level_enabled(Level::Debug) { say_chosen(ctx, vip, backend) } else { 0 }
}

/// The protocol has no room on the stack: `connect6`'s and this one's fill it, each rounded up to 32 bytes as kernel 6.1 counts.
#[inline(never)]
fn say_chosen<A: Family>(ctx: &impl EbpfContext, vip: (A, Be16), backend: (A, Be16)) -> u32 {
    debug!(ctx, "{:i} port {} -> {:i} port {}", vip.0.shown(), vip.1.to_host(), backend.0.shown(), backend.1.to_host());
    0
}

/// A new connection towards `vip` is refused.
#[inline(always)]
pub(crate) fn refused<A: Family>(ctx: &impl EbpfContext, proto: u8, vip: (A, Be16)) -> u32 {
    if level_enabled(Level::Debug) { say_refused(ctx, proto, vip) } else { 0 }
}

#[inline(never)]
fn say_refused<A: Family>(ctx: &impl EbpfContext, proto: u8, vip: (A, Be16)) -> u32 {
    debug!(ctx, "{:i} port {} protocol {} refused", vip.0.shown(), vip.1.to_host(), proto);
    0
}
