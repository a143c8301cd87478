//! Rewriting in place: addresses, ports, checksums.
//!
//! Addresses, ports and the IPv4 header checksum are written directly. So is a transport checksum that is one for certain. Where it
//! may be just the pseudo-header's sum, on its way to a device that will fill it in (`CHECKSUM_PARTIAL`), it goes through the kernel's
//! helper, which knows, and calls three functions for each of the two differences. A hardware sum over the packet
//! (`CHECKSUM_COMPLETE`) is kept right either way.

use aya_ebpf::{
    EbpfContext as _,
    bindings::{BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR},
    helpers::generated::{bpf_csum_update, bpf_l4_csum_replace},
    programs::TcContext,
};
use proxy_common::{Address, Be16, checksum, proto};

use super::{
    packet::{Header, at, load},
    sctp,
};
use crate::maps::{Packet, kind};

/// `bpf_l4_csum_replace`: the pseudo-header is IPv6's, whose addresses no header checksum compensates (kernel 6.16,
/// ead7f9b8de65; older ones refuse the flag).
const BPF_F_IPV6: u64 = 1 << 7;

/// Which end of the packet is rewritten; the other end only gets its port.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    Source,
    Destination,
}

/// One's-complement difference between two addresses, as the kernel's `__wsum`.
#[inline(always)]
pub(crate) fn address_diff<A: Address>(old: A, new: A) -> u32 {
    let (old_hi, old_lo) = old.words();
    let (new_hi, new_lo) = new.words();
    let sum = halves(!old_hi) + halves(!old_lo) + halves(new_hi) + halves(new_lo);
    fold32(sum)
}

#[inline(always)]
pub(crate) fn halves(word: u64) -> u64 {
    (word >> 32) + (word & 0xffff_ffff)
}

#[inline(always)]
pub(crate) fn fold32(sum: u64) -> u32 {
    halves(halves(sum)) as u32
}

#[inline(always)]
pub(crate) fn ports_diff(old: (Be16, Be16), new: (Be16, Be16)) -> u32 {
    (!old.0.0) as u32 + (!old.1.0) as u32 + new.0.0 as u32 + new.1.0 as u32
}

/// Adds to the transport checksum at `field` a difference of the pseudo-header's addresses.
#[inline(always)]
pub(crate) fn add_pseudo_diff<A: Header>(ctx: &TcContext, field: u32, diff: u32, mangled_0: u64) -> Result<(), ()> {
    let flags = u64::from(BPF_F_PSEUDO_HDR) | mangled_0;
    // SAFETY: live context; the helper checks `field` against the packet.
    unsafe {
        if A::VERSION == 4 {
            return done(bpf_l4_csum_replace(ctx.as_ptr().cast(), field, 0, diff as u64, flags));
        }
        if bpf_l4_csum_replace(ctx.as_ptr().cast(), field, 0, diff as u64, flags | BPF_F_IPV6) == 0 {
            return Ok(());
        }
        done(bpf_l4_csum_replace(ctx.as_ptr().cast(), field, 0, diff as u64, flags))?;
        // Without the flag the helper also changes a CHECKSUM_COMPLETE sum, as is right for IPv4 only: undo that. Fails
        // where there is no such sum, which is fine.
        bpf_csum_update(ctx.as_ptr().cast(), diff);
    }
    Ok(())
}

#[inline(always)]
pub(crate) fn add_diff(ctx: &TcContext, field: u32, diff: u32, mangled_0: u64) -> Result<(), ()> {
    // SAFETY: live context; the helper checks `field` against the packet.
    done(unsafe { bpf_l4_csum_replace(ctx.as_ptr().cast(), field, 0, diff as u64, mangled_0) })
}

#[inline(always)]
pub(crate) fn done(code: i64) -> Result<(), ()> {
    if code == 0 { Ok(()) } else { Err(()) }
}

/// Writes an address into the IP header at `l3` and corrects the IPv4 header checksum.
#[inline(always)]
pub(crate) fn write_address<A: Header>(ctx: &TcContext, l3: u32, end: End, old: A, new: A) -> Result<(), ()> {
    let offset = l3 as usize + if end == End::Source { A::SRC } else { A::DST };
    if A::VERSION == 4 {
        let field = at::<[u16; 2]>(ctx, offset).ok_or(())?;
        let sum = at::<u16>(ctx, l3 as usize + 10).ok_or(())?;
        let word = new.words().0 as u32;
        let bytes = word.to_ne_bytes();
        // SAFETY: bounds checked; 2-byte aligned. The verifier's prologue unclones what we write to.
        unsafe {
            *sum = checksum::replace32(*sum, old.words().0 as u32, word);
            *field = [u16::from_ne_bytes([bytes[0], bytes[1]]), u16::from_ne_bytes([bytes[2], bytes[3]])];
        }
    } else {
        let field = at::<[[u16; 2]; 4]>(ctx, offset).ok_or(())?;
        let (hi, lo) = new.words();
        let split = |word: u32| {
            let b = word.to_ne_bytes();
            [u16::from_ne_bytes([b[0], b[1]]), u16::from_ne_bytes([b[2], b[3]])]
        };
        // SAFETY: as above.
        unsafe {
            *field = [split((hi >> 32) as u32), split(hi as u32), split((lo >> 32) as u32), split(lo as u32)];
        }
    }
    Ok(())
}

/// Rewrites `end` of the packet to `addr`:`port` and the other end's port to `other`.
#[inline(always)]
pub(crate) fn rewrite<A: Header>(
    ctx: &TcContext,
    l3: u32,
    packet: &Packet<A>,
    end: End,
    addr: A,
    port: Be16,
    other: Be16,
) -> Result<(), ()> {
    let old = if end == End::Source { packet.src } else { packet.dst };
    let diff = address_diff(old, addr);
    if packet.kind == kind::LATER_FRAGMENT {
        return write_unsummed(ctx, l3, (end, old, addr), 0);
    }
    let ports = if end == End::Source { (port, other) } else { (other, port) };
    let (field, mangled_0) =
        if packet.proto == proto::TCP { (packet.l4 + 16, 0) } else { (packet.l4 + 6, u64::from(BPF_F_MARK_MANGLED_0)) };

    if let Some(field) = finished(ctx, l3, packet) {
        return rewrite_plain(ctx, l3, packet, (end, old, addr), ports, field);
    }
    let summed = packet.proto != proto::SCTP;
    if packet.proto == proto::UDP && load::<u16>(ctx, field) == Some(0) {
        write_ports(ctx, l3, packet, ports)?;
        return write_unsummed(ctx, l3, (end, old, addr), ports_diff((packet.sport, packet.dport), ports));
    }
    if ports != (packet.sport, packet.dport) {
        if summed {
            add_diff(ctx, field, ports_diff((packet.sport, packet.dport), ports), mangled_0)?;
        } else if sctp::change_ports(ctx, l3, packet, ports.0, ports.1) != 0 {
            return Err(());
        }
        write_ports(ctx, l3, packet, ports)?;
    }
    if old != addr {
        write_address(ctx, l3, end, old, addr)?;
        // Different addresses may have one sum: then the checksum stands.
        if summed && diff != 0 && diff != 0xffff_ffff {
            add_pseudo_diff::<A>(ctx, field, diff, mangled_0)?;
        }
    }
    Ok(())
}

/// Writes the address of a packet that has no transport checksum, a later fragment or a UDP datagram of which none was wanted. What
/// changed shows in a hardware sum then, ports and all; an IPv4 address, which the header's checksum compensates, does not.
#[inline(always)]
fn write_unsummed<A: Header>(
    ctx: &TcContext,
    l3: u32,
    (end, old, addr): (End, A, A),
    ports_changed: u32,
) -> Result<(), ()> {
    write_address(ctx, l3, end, old, addr)?;
    let diff = if A::VERSION == 4 { 0 } else { address_diff(old, addr) };
    // SAFETY: live context; fails harmlessly where there is no such sum.
    unsafe { bpf_csum_update(ctx.as_ptr().cast(), fold32(diff as u64 + ports_changed as u64)) };
    Ok(())
}

/// The checksum field of a TCP or UDP packet without options, if it holds a checksum: anything but the pseudo-header's sum, which one
/// packet in 65536 has by chance. (Whoever sends a packet with an inner checksum to be filled in has finished the outer one.)
#[inline(always)]
fn finished<A: Header>(ctx: &TcContext, l3: u32, packet: &Packet<A>) -> Option<*mut u16> {
    if packet.kind != kind::WHOLE || packet.l4 != l3 + A::LEN_MIN {
        return None;
    }
    let (at_length, counted) = if A::VERSION == 4 { (2, A::LEN_MIN as u16) } else { (4, 0) };
    let length = at::<Be16>(ctx, l3 as usize + at_length)?;
    // SAFETY: bounds checked; 2-byte aligned.
    let length = unsafe { *length }.to_host();
    let l4 = (l3 + A::LEN_MIN) as usize;
    let field = match packet.proto {
        proto::TCP => at::<u16>(ctx, l4 + 16)?,
        proto::UDP => at::<u16>(ctx, l4 + 6)?,
        _ => return None,
    };
    // SAFETY: as above.
    let held = unsafe { *field };
    // No length: a packet beyond 64 KiB (BIG TCP). No checksum: there is nothing to keep right.
    if length <= counted || held == 0 {
        return None;
    }
    let (src, dst) = (packet.src.words(), packet.dst.words());
    let pseudo = halves(src.0) + halves(src.1) + halves(dst.0) + halves(dst.1);
    let rest = (packet.proto as u16).to_be() as u64 + (length - counted).to_be() as u64;
    // Neither is zero, so what is equal looks equal.
    if held == checksum::fold(pseudo + rest) { None } else { Some(field) }
}

/// [`rewrite`] of a packet whose checksum `field` is one. `end`: which, its address before and after.
#[inline(always)]
fn rewrite_plain<A: Header>(
    ctx: &TcContext,
    l3: u32,
    packet: &Packet<A>,
    (end, old, addr): (End, A, A),
    ports: (Be16, Be16),
    field: *mut u16,
) -> Result<(), ()> {
    let diff = address_diff(old, addr);
    let ports_changed = ports_diff((packet.sport, packet.dport), ports);
    // SAFETY: `field` was checked against the packet's end, and no helper was called since.
    unsafe {
        let sum = !checksum::fold((!*field) as u64 + diff as u64 + ports_changed as u64);
        *field = if sum == 0 && packet.proto == proto::UDP { 0xffff } else { sum };
    }
    write_ports(ctx, l3, packet, ports)?;
    write_address(ctx, l3, end, old, addr)?;
    if A::VERSION == 4 && diff != 0 && diff != 0xffff_ffff {
        // Over the whole packet, the header's checksum compensates the address, and the transport's does once more.
        // SAFETY: live context; fails harmlessly where there is no such sum.
        unsafe { bpf_csum_update(ctx.as_ptr().cast(), !diff) };
    }
    Ok(())
}

/// Writes both ports. Directly where the header has its usual place, by helper behind options and extension headers.
#[inline(always)]
fn write_ports<A: Header>(ctx: &TcContext, l3: u32, packet: &Packet<A>, ports: (Be16, Be16)) -> Result<(), ()> {
    if packet.l4 == l3 + A::LEN_MIN {
        let field = at::<[u16; 2]>(ctx, (l3 + A::LEN_MIN) as usize).ok_or(())?;
        // SAFETY: bounds checked; 2-byte aligned.
        unsafe { *field = [ports.0.0, ports.1.0] };
        Ok(())
    } else {
        ctx.store(packet.l4 as usize, &[ports.0.0, ports.1.0], 0).map_err(|_| ())
    }
}
