//! The end of a TCP connection whose backend was deleted, or that has lost its entries: what the client sent is turned into a reset from
//! the VIP (RFC 9293, 3.5.2) and sent back where it came from.

use aya_ebpf::{
    EbpfContext as _,
    bindings::{__sk_buff, TC_ACT_SHOT},
    helpers::generated::{bpf_skb_adjust_room, bpf_skb_change_tail},
    programs::TcContext,
};
use proxy_common::{Be16, checksum, counters::Reason, proto};

use super::{
    packet::{Header, Ipv4Header, Ipv6Header, load, tcp_flags},
    reject::{answer, header_v4, header_v6, is_allowed, is_unfinished, put, send_back},
    rewrite::halves,
};
use crate::{
    count,
    maps::{Packet, kind},
};

const TCP: u32 = 20;
const ADJ_ROOM_NET: u32 = 0;

/// Turns the packet into the reset; what has no answer (a fragment, what acknowledges nothing) is dropped. Returns the verdict, and counts it
/// under one reason. `lost`: nobody knows the connection, so anybody could have sent the packet; no more often than others are refused.
#[inline(never)]
pub(crate) fn reset<A: Header>(ctx: &TcContext, l3: u32, packet: &Packet<A>, lost: bool) -> i32 {
    if lost && !is_allowed(packet) {
        count::reason(Reason::RejectLimited);
        return TC_ACT_SHOT;
    }
    answer(build(ctx, l3, packet), if lost { Reason::LostConnection } else { Reason::Rejected })
}

#[inline(always)]
fn build<A: Header>(ctx: &TcContext, l3: u32, packet: &Packet<A>) -> Option<i32> {
    if packet.kind != kind::WHOLE || packet.tcp_flags & tcp_flags::ACK == 0 {
        return None;
    }
    // A reset counts where its number is the one expected next: the one just acknowledged.
    let number: [u16; 2] = load(ctx, packet.l4 + 8)?;
    let unfinished = is_unfinished(ctx, l3, packet)?;
    let skb = ctx.as_ptr().cast::<__sk_buff>();
    // Options and extension headers are not answered. Cut out, and not written over: where the device is to finish the checksum, the
    // kernel knows where that header begins.
    let extra = packet.l4.wrapping_sub(l3 + A::LEN_MIN);
    // SAFETY: live context; packet pointers are derived anew below.
    unsafe {
        if extra != 0 && bpf_skb_adjust_room(skb, -(extra as i32), ADJ_ROOM_NET, 0) != 0 {
            return None;
        }
        if bpf_skb_change_tail(skb, l3 + A::LEN_MIN + TCP, 0) != 0 {
            return None;
        }
    }
    if A::VERSION == 4 {
        let old: Ipv4Header = load(ctx, l3)?;
        put(ctx, l3, &header_v4(&old, TCP, proto::TCP))?;
    } else {
        let old: Ipv6Header = load(ctx, l3)?;
        put(ctx, l3, &header_v6(&old, TCP, proto::TCP))?;
    }
    let ((src_hi, src_lo), (dst_hi, dst_lo)) = (packet.src.words(), packet.dst.words());
    let pseudo = halves(src_hi)
        + halves(src_lo)
        + halves(dst_hi)
        + halves(dst_lo)
        + u16::from_ne_bytes([0, proto::TCP]) as u64
        + Be16::from_host(TCP as u16).0 as u64;
    let length_and_flags = u16::from_ne_bytes([(TCP as u8 / 4) << 4, tcp_flags::RST]);
    let sum = pseudo
        + packet.sport.0 as u64
        + packet.dport.0 as u64
        + number[0] as u64
        + number[1] as u64
        + length_and_flags as u64;
    // Where the device is to finish the checksum, the field holds the sum of the pseudo-header.
    let field = if unfinished { !checksum::finish(pseudo) } else { checksum::finish(sum) };
    let header: [u16; 10] = [packet.dport.0, packet.sport.0, number[0], number[1], 0, 0, length_and_flags, 0, field, 0];
    put(ctx, l3 + A::LEN_MIN, &header)?;
    send_back(ctx, l3)
}
