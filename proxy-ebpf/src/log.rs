//! Debug lines, through aya-log: new connections and refusals, for whoever asked for them at load time.
//!
//! The level is a read-only global (`AYA_LOG_LEVEL`): where it is 0, as it is by default, the verifier removes these lines.

use aya_ebpf::EbpfContext;
use aya_log_ebpf::debug;
use proxy_common::Be16;

use crate::maps::Family;

/// A new connection towards `vip` goes to `backend`.
#[inline(never)]
pub(crate) fn chosen<A: Family>(ctx: &impl EbpfContext, proto: u8, vip: (A, Be16), backend: (A, Be16)) -> u32 {
    debug!(
        ctx,
        "{:i} port {} protocol {} -> {:i} port {}",
        vip.0.shown(),
        vip.1.to_host(),
        proto,
        backend.0.shown(),
        backend.1.to_host()
    );
    0
}

/// A new connection towards `vip` is refused.
#[inline(never)]
pub(crate) fn refused<A: Family>(ctx: &impl EbpfContext, proto: u8, vip: (A, Be16)) -> u32 {
    debug!(ctx, "{:i} port {} protocol {} refused", vip.0.shown(), vip.1.to_host(), proto);
    0
}
