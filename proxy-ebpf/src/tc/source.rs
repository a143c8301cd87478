//! What a masqueraded packet gets as its source: what the kernel would pick by the route that the packet takes (contract A75).

use core::mem::size_of;

use aya_ebpf::{
    EbpfContext as _,
    bindings::{BPF_FIB_LOOKUP_OUTPUT, BPF_FIB_LOOKUP_SKIP_NEIGH, BPF_FIB_LOOKUP_SRC},
    helpers::generated::bpf_fib_lookup,
    programs::TcContext,
};
use proxy_common::Be16;

use super::{
    packet::Header,
    table::{VOID, Void},
};
use crate::maps::{BRIDGES, Packet};

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

/// `struct bpf_fib_lookup`; IPv4 addresses take the first word of their four.
#[repr(C)]
struct Route {
    family: u8,
    proto: u8,
    sport: Be16,
    dport: Be16,
    length: u16,
    ifindex: u32,
    flow: u32,
    src: [u32; 4],
    dst: [u32; 4],
    vlan: u32,
    macs: [u16; 6],
}

const _: () = assert!(size_of::<Route>() == 64);

/// Writes to `source` what the route of this packet, which is about to leave by `ifindex`, says. Leaves it alone where the kernel
/// knows no answer (before 6.7), or its answer is about another device: marks and the like led the packet elsewhere. A bridge's port
/// has no routes, its bridge has.
#[inline(never)]
pub(crate) fn by_route<A: Header>(ctx: &TcContext, packet: &Packet<A>, ifindex: u32, source: &mut A) -> Void {
    // SAFETY: an aligned word, copied at once.
    let ifindex = unsafe { BRIDGES.get(ifindex) }.map_or(ifindex, |bridge| *bridge);
    let mut route = Route {
        family: if A::VERSION == 4 { AF_INET } else { AF_INET6 },
        proto: packet.proto,
        sport: packet.sport,
        dport: packet.dport,
        // Of no account here, but 0 would have the packet's own length compared with the MTU.
        length: 1,
        ifindex,
        flow: 0,
        src: [0; 4],
        dst: [0; 4],
        vlan: 0,
        macs: [0; 6],
    };
    let flags = BPF_FIB_LOOKUP_OUTPUT | BPF_FIB_LOOKUP_SKIP_NEIGH | BPF_FIB_LOOKUP_SRC;
    // SAFETY: live context; `route` has the size that is told, and its fields take an address of either family.
    let found = unsafe {
        (&raw mut route.src).cast::<A>().write(packet.src);
        (&raw mut route.dst).cast::<A>().write(packet.dst);
        bpf_fib_lookup(ctx.as_ptr().cast(), (&raw mut route).cast(), size_of::<Route>() as i32, flags)
    };
    let picked = A::from_words(route.src);
    if found == 0 && route.ifindex == ifindex && picked != A::UNSPECIFIED {
        *source = picked;
    }
    VOID
}
