//! Refusing: an ICMP port unreachable built out of the refused packet and sent back where it came from (contract A81).
//!
//! The kernel turns it into ECONNREFUSED for a TCP connect and for connected UDP.

use aya_ebpf::{
    EbpfContext as _,
    bindings::{__sk_buff, BPF_F_RECOMPUTE_CSUM, TC_ACT_SHOT},
    helpers::{
        bpf_ktime_get_ns,
        generated::{bpf_csum_diff, bpf_redirect, bpf_skb_adjust_room, bpf_skb_change_tail, bpf_skb_load_bytes},
    },
    programs::TcContext,
};
use proxy_common::{Be16, checksum, counters::Reason, proto};

use super::{
    packet::{Header, Ipv4Header, Ipv6Header, at, load},
    rewrite::halves,
};
use crate::{
    count, globals,
    maps::{Packet, REFUSALS, kind, refusals},
};

/// Most that is quoted of the refused packet, from its IP header on.
const QUOTE_MAX: u32 = 128;
const ADJ_ROOM_MAC: u32 = 1;
const SECOND: u64 = 1_000_000_000;

/// Whether this CPU may send one more refusal to this sender. A flood of what is refused shall not become a flood of refusals, and nobody's
/// flood shall take others' refusals away. So each sender has a rate of its own (those whose addresses have the same digest share
/// it), and below the ceiling for all, which is in the order of the kernel's own for ICMP errors, half is TCP's: that is where a refusal
/// spares a time-out. What was not sent in a second may be sent at once. Another program on this CPU can
/// come in between at worst, and one more goes out.
#[inline(always)]
pub(crate) fn is_allowed<A: Header>(packet: &Packet<A>) -> bool {
    let (hi, lo) = packet.src.words();
    let digest = ((hi ^ lo.rotate_left(32)).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u32;
    let all = u32::from(packet.proto != proto::TCP);
    let (Some(all), Some(own)) = (REFUSALS.get_ptr_mut(all), REFUSALS.get_ptr_mut(refusals::SENDERS + digest)) else {
        return false;
    };
    // SAFETY: no arguments.
    let now = unsafe { bpf_ktime_get_ns() };
    // SAFETY: per-CPU elements, one aligned word each.
    let (busy, own_busy) = unsafe { (later(all.read_volatile(), now), later(own.read_volatile(), now)) };
    if busy - now > SECOND || own_busy - now > SECOND {
        return false;
    }
    let each = SECOND / globals::refusals_per_second() as u64;
    // SAFETY: as above.
    unsafe {
        all.write_volatile(busy + each * 2);
        own.write_volatile(own_busy + each * refusals::SHARES);
    }
    true
}

#[inline(always)]
const fn later(one: u64, other: u64) -> u64 {
    if one > other { one } else { other }
}

/// Nobody to tell, or nothing to quote: later fragments, errors, groups, the unspecified address (RFC 1122, 3.2.2).
#[inline(always)]
pub(crate) fn is_answerable<A: Header>(packet: &Packet<A>) -> bool {
    let kind = packet.kind == kind::WHOLE || packet.kind == kind::OTHER;
    kind && is_host(packet.src)
}

/// Whether that is somebody who can be told.
#[inline(always)]
pub(crate) fn is_host<A: Header>(addr: A) -> bool {
    addr != A::UNSPECIFIED && !is_group(addr)
}

/// Turns the packet into its refusal. Returns the verdict, and counts it under one reason.
#[inline(never)]
pub(crate) fn reject<A: Header>(ctx: &TcContext, l3: u32, packet: &Packet<A>) -> i32 {
    if is_answerable(packet) && !is_allowed(packet) {
        count::reason(Reason::RejectLimited);
        return TC_ACT_SHOT;
    }
    answer(build(ctx, l3, packet), Reason::Rejected)
}

/// What became of a refusal or a reset: sent, with this verdict, for this `reason`, or dropped. Counts it under one reason.
#[inline(always)]
pub(crate) fn answer(built: Option<i32>, reason: Reason) -> i32 {
    match built {
        Some(verdict) => {
            count::reason(reason);
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
    if !is_answerable(packet) {
        return None;
    }
    // As much of the transport header as its checksum field needs: where the sender left it to the device, the
    // kernel does not let that field be cut off. Of an INIT as much as its sender knows it by (RFC 9260, 10).
    let transport = match packet.proto {
        proto::TCP | proto::SCTP => 20,
        _ => 8,
    };
    let available = ctx.len().checked_sub(l3)?;
    let wanted = packet.l4 - l3 + transport;
    let quote = if available < wanted { available } else { wanted };
    if quote > QUOTE_MAX || quote < A::LEN_MIN {
        return None;
    }
    let unfinished = is_unfinished(ctx, l3, packet).unwrap_or(false);
    let room = A::LEN_MIN + 8;
    let skb = ctx.as_ptr().cast::<__sk_buff>();
    // SAFETY: live context; packet pointers are derived anew below.
    unsafe {
        if bpf_skb_change_tail(skb, l3 + quote, 0) != 0 {
            return None;
        }
        if bpf_skb_adjust_room(skb, room as i32, ADJ_ROOM_MAC, 0) != 0 {
            return None;
        }
    }
    let icmp = l3 + A::LEN_MIN;
    if unfinished {
        let transport = packet.l4 - l3;
        settle(ctx, icmp + 8 + transport, quote - transport, packet.proto)?;
    }
    let sum = quoted_sum(ctx, icmp + 8, quote);
    if sum < 0 {
        return None;
    }
    let sum = sum as u64;
    // The refused packet's own IP header tells who asked for what.
    if A::VERSION == 4 {
        let old: Ipv4Header = load(ctx, icmp + 8)?;
        write_v4(ctx, l3, &old, quote, sum)?;
    } else {
        let old: Ipv6Header = load(ctx, icmp + 8)?;
        write_v6(ctx, l3, &old, quote, sum)?;
    }
    send_back(ctx, l3)
}

/// Sends the packet out where it came in, to the hardware address that it came from. Returns the verdict.
#[inline(always)]
pub(crate) fn send_back(ctx: &TcContext, l3: u32) -> Option<i32> {
    if l3 != 0 {
        let ethernet = at::<[u16; 6]>(ctx, 0)?;
        // SAFETY: bounds checked, 2-byte aligned.
        unsafe {
            let [a, b, c, d, e, f] = *ethernet;
            *ethernet = [d, e, f, a, b, c];
        }
    }
    let skb = ctx.as_ptr().cast::<__sk_buff>();
    // SAFETY: live context; the interface the packet came in by.
    Some(unsafe { bpf_redirect((*skb).ifindex, 0) } as i32)
}

/// Writes a part of what goes back; a hardware sum over the packet follows.
#[inline(always)]
pub(crate) fn put<T>(ctx: &TcContext, offset: u32, value: &T) -> Option<()> {
    ctx.store(offset as usize, value, BPF_F_RECOMPUTE_CSUM.into()).ok()
}

/// Header of what goes back for a packet with this one, with `length` bytes behind it.
#[inline(always)]
pub(crate) fn header_v4(old: &Ipv4Header, length: u32, proto: u8) -> Ipv4Header {
    let total_length = Be16::from_host((20 + length) as u16);
    let sum = u16::from_ne_bytes([0x45, 0]) as u64
        + total_length.0 as u64
        + u16::from_ne_bytes([64, proto]) as u64
        + old.src[0] as u64
        + old.src[1] as u64
        + old.dst[0] as u64
        + old.dst[1] as u64;
    Ipv4Header {
        version_ihl: 0x45,
        tos: 0,
        total_length,
        id: Be16::ZERO,
        fragment: Be16::ZERO,
        ttl: 64,
        proto,
        checksum: checksum::finish(sum),
        src: old.dst,
        dst: old.src,
    }
}

/// The same for IPv6.
#[inline(always)]
pub(crate) fn header_v6(old: &Ipv6Header, length: u32, next: u8) -> Ipv6Header {
    Ipv6Header {
        version_flow: [u16::from_ne_bytes([0x60, 0]), 0],
        payload_length: Be16::from_host(length as u16),
        next,
        hop_limit: 64,
        src: old.dst,
        dst: old.src,
    }
}

/// Where its checksum stands in a TCP or UDP header.
#[inline(always)]
const fn checksum_field(protocol: u8) -> u32 {
    if protocol == proto::TCP { 16 } else { 6 }
}

/// Whether the sender left the transport checksum to the device (`CHECKSUM_PARTIAL`), as pods and neighbours on virtio do: the field
/// holds the sum of the pseudo-header then. Nothing where the packet is too short to say.
#[inline(always)]
pub(crate) fn is_unfinished<A: Header>(ctx: &TcContext, l3: u32, packet: &Packet<A>) -> Option<bool> {
    if packet.kind != kind::WHOLE || (packet.proto != proto::TCP && packet.proto != proto::UDP) {
        return Some(false);
    }
    let (length, counted) = if A::VERSION == 4 { (2, 0) } else { (4, A::LEN_MIN) };
    let length: Be16 = load(ctx, l3 + length)?;
    let length = Be16::from_host((length.to_host() as u32 + counted).wrapping_sub(packet.l4 - l3) as u16);
    let field: u16 = load(ctx, packet.l4 + checksum_field(packet.proto))?;
    let ((src_hi, src_lo), (dst_hi, dst_lo)) = (packet.src.words(), packet.dst.words());
    let pseudo = halves(src_hi)
        + halves(src_lo)
        + halves(dst_hi)
        + halves(dst_lo)
        + u16::from_ne_bytes([0, packet.proto]) as u64
        + length.0 as u64;
    Some(!checksum::finish(pseudo) == field)
}

/// Whichever device the refusal leaves by may still finish that checksum, in the middle of the quote, and spoil the sum of the
/// message around it. So the field gets the one value that finishing does not change: that is half of what the other bytes
/// lack to 0xffff, and in one's complement a half is a rotation.
#[inline(always)]
fn settle(ctx: &TcContext, transport: u32, len: u32, protocol: u8) -> Option<()> {
    let field = transport + checksum_field(protocol);
    put(ctx, field, &0_u16)?;
    let others = quoted_sum(ctx, transport, len);
    if others < 0 {
        return None;
    }
    put(ctx, field, &checksum::finish(others as u64).rotate_right(1))
}

/// Sum of the quoted bytes, 4-byte padded with zeroes; negative if they cannot be read.
#[inline(never)]
fn quoted_sum(ctx: &TcContext, offset: u32, len: u32) -> i64 {
    let mut quote = [0_u32; QUOTE_MAX as usize / 4];
    // One less, since a verifier (6.1) that has seen a length differ from 0 does not know that it is greater.
    let less = core::hint::black_box(len.wrapping_sub(1));
    if less >= QUOTE_MAX {
        return -1;
    }
    let len = less + 1;
    // SAFETY: `len` is within the buffer; both helpers are told its length.
    unsafe {
        if bpf_skb_load_bytes(ctx.as_ptr().cast(), offset, quote.as_mut_ptr().cast(), len) != 0 {
            return -1;
        }
        bpf_csum_diff(core::ptr::null_mut(), 0, quote.as_mut_ptr(), QUOTE_MAX, 0)
    }
}

#[inline(always)]
fn write_v4(ctx: &TcContext, l3: u32, old: &Ipv4Header, quote: u32, quoted: u64) -> Option<()> {
    // Destination unreachable, port unreachable.
    let unreachable = u16::from_ne_bytes([3, 3]);
    let icmp_sum = checksum::finish(quoted + unreachable as u64);
    put(ctx, l3, &header_v4(old, 8 + quote, proto::ICMP))?;
    put(ctx, l3 + 20, &[unreachable, icmp_sum, 0, 0])
}

#[inline(always)]
fn write_v6(ctx: &TcContext, l3: u32, old: &Ipv6Header, quote: u32, quoted: u64) -> Option<()> {
    // Destination unreachable, port unreachable.
    let unreachable = u16::from_ne_bytes([1, 4]);
    let header = header_v6(old, 8 + quote, proto::ICMPV6);
    let length = header.payload_length.0;
    let mut sum = quoted + unreachable as u64 + length as u64 + u16::from_ne_bytes([0, proto::ICMPV6]) as u64;
    let mut i = 0;
    while i < 8 {
        sum += header.src[i] as u64 + header.dst[i] as u64;
        i += 1;
    }
    put(ctx, l3, &header)?;
    put(ctx, l3 + 40, &[unreachable, checksum::finish(sum), 0, 0])
}

#[inline(always)]
fn is_group<A: Header>(addr: A) -> bool {
    let (hi, _) = addr.words();
    if A::VERSION == 4 { (hi as u32).to_ne_bytes()[0] >= 224 } else { ((hi >> 32) as u32).to_ne_bytes()[0] == 0xff }
}
