//! What a masqueraded packet gets as its source: what the kernel would pick by the route that the packet takes (contract A75).

use core::mem::size_of;

use aya_ebpf::{
    EbpfContext,
    bindings::{__sk_buff, BPF_FIB_LOOKUP_OUTPUT, BPF_FIB_LOOKUP_SKIP_NEIGH, BPF_FIB_LOOKUP_SRC},
    helpers::generated::bpf_fib_lookup,
    programs::TcContext,
};
use proxy_common::{Be16, connection::ConnectionKey};

use super::{
    packet::Header,
    table::{VOID, Void},
};
use crate::maps::BRIDGES;

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

/// What `bpf_fib_lookup` answers: the next hop is known; it is but for its neighbour.
pub(crate) const FOUND: i64 = 0;
pub(crate) const NO_NEIGHBOUR: i64 = 7;

/// `struct bpf_fib_lookup`; IPv4 addresses take the first word of their four.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Route {
    pub(crate) family: u8,
    pub(crate) proto: u8,
    pub(crate) sport: Be16,
    pub(crate) dport: Be16,
    /// Asked: the packet's, 0 for the context's own. Answered: the route's MTU.
    pub(crate) length: u16,
    pub(crate) ifindex: u32,
    /// Type of service or flow label.
    pub(crate) flow: u32,
    pub(crate) src: [u32; 4],
    pub(crate) dst: [u32; 4],
    pub(crate) vlan: u32,
    /// Source, destination.
    pub(crate) macs: [[u16; 3]; 2],
}

const _: () = assert!(size_of::<Route>() == 64);

/// A packet's way.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Way {
    pub(crate) route: Route,
    /// `XDP_TX` or `XDP_REDIRECT`; `XDP_PASS`: not by XDP.
    pub(crate) verdict: u32,
}

impl Route {
    #[inline(always)]
    pub(crate) const fn family<A: Header>() -> u8 {
        if A::VERSION == 4 { AF_INET } else { AF_INET6 }
    }

    /// A question about this flow; without its ends.
    #[inline(always)]
    fn to<A: Header>(key: &ConnectionKey<A>, ifindex: u32) -> Self {
        Self {
            family: Self::family::<A>(),
            proto: key.proto,
            sport: key.sport,
            dport: key.dport,
            // Of no account here, but 0 would have the packet's own length compared with the MTU.
            length: 1,
            ifindex,
            flow: 0,
            src: [0; 4],
            dst: [0; 4],
            vlan: 0,
            macs: [[0; 3]; 2],
        }
    }

    /// # Safety
    ///
    /// `route` has room for one.
    #[inline(always)]
    pub(crate) unsafe fn put_ends<A: Header>(route: *mut Self, src: A, dst: A) {
        // SAFETY: both fields take an address of either family.
        unsafe {
            (&raw mut (*route).src).cast::<A>().write(src);
            (&raw mut (*route).dst).cast::<A>().write(dst);
        }
    }
}

/// Writes to `source` what the route of this packet, which is about to leave by `ifindex`, says. Leaves it alone where the kernel
/// knows no answer (before 6.7), or its answer is about another device: marks and the like led the packet elsewhere. A bridge's port
/// has no routes, its bridge has.
#[inline(never)]
pub(crate) fn by_route<A: Header>(
    ctx: &impl EbpfContext,
    key: &ConnectionKey<A>,
    ifindex: u32,
    source: &mut A,
) -> Void {
    // SAFETY: an aligned word, copied at once.
    let ifindex = unsafe { BRIDGES.get(ifindex) }.map_or(ifindex, |bridge| *bridge);
    let mut route = Route::to::<A>(key, ifindex);
    let flags = BPF_FIB_LOOKUP_OUTPUT | BPF_FIB_LOOKUP_SKIP_NEIGH | BPF_FIB_LOOKUP_SRC;
    // SAFETY: live context; `route` has the size that is told.
    let found = unsafe {
        Route::put_ends(&raw mut route, key.src, key.dst);
        bpf_fib_lookup(ctx.as_ptr().cast(), (&raw mut route).cast(), size_of::<Route>() as i32, flags)
    };
    let picked = A::from_words(route.src);
    if found == 0 && route.ifindex == ifindex && picked != A::UNSPECIFIED {
        *source = picked;
    }
    VOID
}

/// Whether the packet's route leads back by the device that it came in by (1): who sent it here meant this node. The stack would tell them of
/// the router behind, and they would go by that with all further connections. A bridge's port has no routes: what goes back to its bridge may be for a
/// pod there.
#[inline(never)]
pub(crate) fn turns_back<A: Header>(ctx: &TcContext, key: &ConnectionKey<A>) -> u32 {
    let skb = ctx.as_ptr().cast::<__sk_buff>();
    // SAFETY: live context.
    let ifindex = unsafe { (*skb).ifindex };
    let mut route = Route::to::<A>(key, ifindex);
    // SAFETY: live context; `route` has the size that is told.
    let found = unsafe {
        Route::put_ends(&raw mut route, key.src, key.dst);
        bpf_fib_lookup(ctx.as_ptr().cast(), (&raw mut route).cast(), size_of::<Route>() as i32, 0)
    };
    u32::from((found == FOUND || found == NO_NEIGHBOUR) && route.ifindex == ifindex)
}
