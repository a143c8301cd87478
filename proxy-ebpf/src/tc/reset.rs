//! The end of a TCP connection whose backend was deleted: what the client sent is turned into a reset from the VIP (RFC 9293, 3.5.2)
//! and sent back where it came from.

use aya_ebpf::{
    EbpfContext as _,
    bindings::{__sk_buff, TC_ACT_SHOT},
    helpers::generated::{bpf_skb_adjust_room, bpf_skb_change_tail},
    programs::TcContext,
};
use proxy_common::{Be16, checksum, counters::Reason, proto};

use super::{
    packet::{Header, Ipv4Header, Ipv6Header, load, tcp_flags},
    reject::{header_v4, header_v6, is_unfinished, send_back},
    rewrite::halves,
};
use crate::{
    count,
    maps::{Packet, kind},
};

const TCP: u32 = 20;
const ADJ_ROOM_NET: u32 = 0;

/// Turns the packet into the reset; what has no answer (a fragment, what acknowledges nothing) is dropped. Returns the verdict, and counts it
/// under one reason.
#[inline(never)]
pub(crate) fn reset<A: Header>(ctx: &TcContext, l3: u32, packet: &Packet<A>) -> i32 {
    match build(ctx, l3, packet) {
        Some(verdict) => {
            count::reason(Reason::Rejected);
            verdict
        }
        None => {
            count::reason(Reason::RejectFailed);
            TC_ACT_SHOT
        }
    }
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
        ctx.store(l3 as usize, &header_v4(&old, TCP, proto::TCP), 0).ok()?;
    } else {
        let old: Ipv6Header = load(ctx, l3)?;
        ctx.store(l3 as usize, &header_v6(&old, TCP, proto::TCP), 0).ok()?;
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
    ctx.store((l3 + A::LEN_MIN) as usize, &header, 0).ok()?;
    send_back(ctx, l3)
}
