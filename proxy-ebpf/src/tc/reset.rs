//! The end of a TCP connection whose backend was deleted: what the client sent is turned into a reset from the VIP (RFC 9293, 3.5.2)
//! and sent back where it came from.

use aya_ebpf::{
    EbpfContext as _,
    bindings::{__sk_buff, TC_ACT_SHOT},
    helpers::generated::{bpf_redirect, bpf_skb_adjust_room, bpf_skb_change_tail},
    programs::TcContext,
};
use proxy_common::{Be16, checksum, counters::Reason, proto};

use super::{
    packet::{Header, Ipv4Header, Ipv6Header, at, load, tcp_flags},
    reject::is_unfinished,
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
        write_v4(ctx, l3, &old)?;
    } else {
        let old: Ipv6Header = load(ctx, l3)?;
        let header = Ipv6Header {
            version_flow: [u16::from_ne_bytes([0x60, 0]), 0],
            payload_length: Be16::from_host(TCP as u16),
            next: proto::TCP,
            hop_limit: 64,
            src: old.dst,
            dst: old.src,
        };
        ctx.store(l3 as usize, &header, 0).ok()?;
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
    if l3 != 0 {
        let ethernet = at::<[u16; 6]>(ctx, 0)?;
        // SAFETY: bounds checked, 2-byte aligned.
        unsafe {
            let [a, b, c, d, e, f] = *ethernet;
            *ethernet = [d, e, f, a, b, c];
        }
    }
    // SAFETY: the interface the packet came in by; sent out there again.
    Some(unsafe { bpf_redirect((*skb).ifindex, 0) } as i32)
}

#[inline(always)]
fn write_v4(ctx: &TcContext, l3: u32, old: &Ipv4Header) -> Option<()> {
    let mut header = Ipv4Header {
        version_ihl: 0x45,
        tos: 0,
        total_length: Be16::from_host(20 + TCP as u16),
        id: Be16::ZERO,
        fragment: Be16::ZERO,
        ttl: 64,
        proto: proto::TCP,
        checksum: 0,
        src: old.dst,
        dst: old.src,
    };
    let sum = u16::from_ne_bytes([0x45, 0]) as u64
        + header.total_length.0 as u64
        + u16::from_ne_bytes([64, proto::TCP]) as u64
        + header.src[0] as u64
        + header.src[1] as u64
        + header.dst[0] as u64
        + header.dst[1] as u64;
    header.checksum = checksum::finish(sum);
    ctx.store(l3 as usize, &header, 0).ok()
}
