//! Asking the kernel whether a pod has a connection of its own to where a new Service flow is about to lead.
//!
//! A direct connection passes by the table without a trace, so only the pod's own socket tells of it. Without this, its answers would
//! be taken for the flow's and show the VIP. One that was closed a moment ago counts: in `TIME_WAIT` its last packets are still
//! about. Not found: a client that is not on this node, and a socket bound to a device (SO_BINDTODEVICE), since the kernel compares
//! that with the index of this namespace's device.

use core::{mem::size_of, ptr};

use aya_ebpf::{
    EbpfContext as _,
    helpers::generated::{bpf_sk_lookup_udp, bpf_sk_release, bpf_skc_lookup_tcp},
    programs::TcContext,
};
use proxy_common::{Be16, connection::ConnectionValue, proto};

use super::packet::Header;
use crate::maps::Packet;

/// `TCP_CLOSE`: also a datagram socket that is not connected; `TCP_LISTEN`.
const CLOSED: u32 = 7;
const LISTENING: u32 = 10;

/// `struct bpf_sock_tuple`: addresses and ports of a packet that the socket would be given.
#[repr(C)]
struct Tuple<A> {
    src: A,
    dst: A,
    sport: Be16,
    dport: Be16,
}

/// Whether a socket of network namespace `netns` (as this one numbers it) is connected to the flow's backend from the flow's client
/// port. 1: it is.
#[inline(never)]
pub(crate) fn is_connected<A: Header>(
    ctx: &TcContext,
    packet: &Packet<A>,
    value: &ConnectionValue<A>,
    netns: u32,
) -> u32 {
    // No helper finds an SCTP socket.
    if packet.proto == proto::SCTP {
        return 0;
    }
    let mut answer = Tuple { src: value.addr, dst: packet.src, sport: value.port, dport: packet.sport };
    let state = if packet.proto == proto::TCP {
        state::<{ proto::TCP }, A>(ctx, &mut answer, netns)
    } else {
        state::<{ proto::UDP }, A>(ctx, &mut answer, netns)
    };
    u32::from(state != CLOSED && state != LISTENING)
}

/// State of the socket that a packet with these ends would be given. A function for each protocol: one instruction may not read both
/// helpers' kinds of socket.
#[inline(never)]
fn state<const PROTO: u8, A: Header>(ctx: &TcContext, tuple: &mut Tuple<A>, netns: u32) -> u32 {
    let (tuple, size) = (ptr::from_mut(tuple).cast(), size_of::<Tuple<A>>() as u32);
    // SAFETY: live context, `tuple` has `size` bytes; a socket that was found is read before it is given back, and given back
    // once on the only way there is.
    unsafe {
        let socket = if PROTO == proto::TCP {
            // Unlike bpf_sk_lookup_tcp it finds what is in TIME_WAIT, too (kernel 5.2, edbf8c01de5a).
            bpf_skc_lookup_tcp(ctx.as_ptr().cast(), tuple, size, netns as u64, 0)
        } else {
            bpf_sk_lookup_udp(ctx.as_ptr().cast(), tuple, size, netns as u64, 0)
        };
        if socket.is_null() {
            return CLOSED;
        }
        let state = ptr::read_volatile(&raw const (*socket).state);
        bpf_sk_release(socket.cast());
        state
    }
}
