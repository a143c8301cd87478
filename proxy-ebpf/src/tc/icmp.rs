//! ICMP errors about translated flows: the packet they quote is rewritten too, or path-MTU discovery dies.
//!
//! An error travels towards the quoted packet's sender, as an answer would: turned round, the quoted tuple is looked up in the
//! same table by the same hook, and the same rule holds. Ingress rewrites where the error goes and what sender it
//! quotes; egress rewrites whom the quoted packet was for.

use aya_ebpf::{EbpfContext as _, helpers::generated::bpf_skb_store_bytes, programs::TcContext};
use proxy_common::{
    Address, Be16, checksum,
    connection::{ConnectionKey, ConnectionValue, flags, hook},
    proto,
};

use super::{
    packet::{Header, Ipv4Header, Ipv6Header, load, pair32, words},
    rewrite::{End, add_diff, add_pseudo_diff, address_diff, done, ports_diff, write_address},
    table::{self, Room},
};
use crate::{
    count, lookup,
    maps::{Packet, Work},
};

/// Whether this ICMP type quotes the packet it is about (RFC 792, RFC 4443).
#[inline(always)]
pub(crate) fn is_error<A: Address>(kind: u8) -> bool {
    if A::VERSION == 4 { matches!(kind, 3 | 11 | 12) } else { matches!(kind, 1..=4) }
}

/// Reads the quoted packet's headers at `l3` and writes the key that an answer to it has at `at_hook`. Returns the offset of its
/// transport header; 0: not TCP, UDP or SCTP, or without ports.
#[inline(never)]
fn quoted<A: Header>(ctx: &TcContext, l3: u32, at_hook: u8, key: &mut ConnectionKey<A>) -> u32 {
    // Turned round: whom it was for answers whom it was from.
    let l4 = if A::VERSION == 4 {
        let Some(header) = load::<Ipv4Header>(ctx, l3) else { return 0 };
        // A quoted later fragment has no ports.
        let ihl = (header.version_ihl & 0x0f) as u32 * 4;
        if header.version_ihl >> 4 != 4 || header.fragment.to_host() & 0x1fff != 0 || ihl < 20 {
            return 0;
        }
        key.src = A::from_words([pair32(header.dst), 0, 0, 0]);
        key.dst = A::from_words([pair32(header.src), 0, 0, 0]);
        key.proto = header.proto;
        l3 + ihl
    } else {
        let Some(header) = load::<Ipv6Header>(ctx, l3) else { return 0 };
        key.src = A::from_words(words(header.dst));
        key.dst = A::from_words(words(header.src));
        key.proto = header.next;
        l3 + 40
    };
    if !proto::has_ports(key.proto) {
        return 0;
    }
    let Some(ports) = load::<[u16; 2]>(ctx, l4) else { return 0 };
    key.sport = Be16(ports[1]);
    key.dport = Be16(ports[0]);
    key.hook = at_hook;
    key.pad = 0;
    l4
}

#[inline(always)]
fn store<T: Copy>(ctx: &TcContext, offset: u32, value: &T) -> Result<(), ()> {
    // SAFETY: live context; the helper reads `size_of::<T>()` bytes of `value` and checks the offset.
    done(unsafe {
        bpf_skb_store_bytes(ctx.as_ptr().cast(), offset, (&raw const *value).cast(), size_of::<T>() as u32, 0)
    })
}

/// The error is about no flow of ours.
pub(crate) const NO_FLOW: u32 = 0;
pub(crate) const TRANSLATED: u32 = 1;
/// About no flow of ours, but what it quotes was sent under a VIP: an answer that another proxy translated, which does the same
/// with this.
pub(crate) const ABOUT_A_VIP: u32 = 2;
/// The kernel did not let us.
pub(crate) const FAILED: u32 = 3;

/// Translates an ICMP error, if it is about a flow of ours. Says what came of it.
#[inline(never)]
pub(crate) fn translate<A: Header>(ctx: &TcContext, l3: u32, outer: &Packet<A>, at_hook: u8) -> u32 {
    let Some(Work { key, found: value, .. }) = Room::Icmp.work::<A>() else { return NO_FLOW };
    let inner_l4 = quoted(ctx, outer.l4 + 8, at_hook, key);
    if inner_l4 == 0 {
        return NO_FLOW;
    }
    if table::peek(key, value) == 0 || value.flags & flags::PENDING != 0 {
        return if lookup::is_guarded(key.dst) { ABOUT_A_VIP } else { NO_FLOW };
    }
    match rewrite(ctx, l3, outer, (at_hook, inner_l4), key, value) {
        Ok(()) => TRANSLATED,
        Err(()) => FAILED,
    }
}

/// Puts into the error and into its quote, whose transport header is at `inner_l4`, what the flow's entry says.
#[inline(always)]
fn rewrite<A: Header>(
    ctx: &TcContext,
    l3: u32,
    outer: &Packet<A>,
    (at_hook, inner_l4): (u8, u32),
    key: &ConnectionKey<A>,
    value: &ConnectionValue<A>,
) -> Result<(), ()> {
    let inner_l3 = outer.l4 + 8;
    // Which address of the quoted packet changes, and the ports it has then.
    let (old, inner_end, ports) = if at_hook == hook::INGRESS {
        (key.dst, End::Source, (value.port, value.other))
    } else {
        (key.src, End::Destination, (value.other, value.port))
    };
    let inner_diff = address_diff(old, value.addr);
    store(ctx, inner_l4, &[ports.0.0, ports.1.0])?;
    let offset = inner_l3 + if inner_end == End::Source { A::SRC } else { A::DST } as u32;
    store(ctx, offset, &value.addr)?;
    let field = outer.l4 + 2;
    let ports_changed = ports_diff((key.dport, key.sport), ports);
    if A::VERSION == 4 {
        // Under the ICMP checksum the address and the quoted header's own checksum cancel out; ports remain.
        let sum: u16 = load(ctx, inner_l3 + 10).ok_or(())?;
        store(ctx, inner_l3 + 10, &checksum::replace32(sum, old.words().0 as u32, value.addr.words().0 as u32))?;
        add_diff(ctx, field, ports_changed, 0)?;
    } else {
        add_diff(ctx, field, super::rewrite::fold32(ports_changed as u64 + inner_diff as u64), 0)?;
    }
    // Outside: ingress sends the error on to whom the flow's packets go; egress speaks for the backend if it was its sender.
    let outer_end = if at_hook == hook::INGRESS { End::Destination } else { End::Source };
    let outer_old = if at_hook == hook::INGRESS { outer.dst } else { outer.src };
    if outer_old == old {
        super::packet::pull(ctx, l3 + A::LEN_MIN);
        write_address(ctx, l3, outer_end, outer_old, value.addr)?;
        if A::VERSION == 6 {
            add_pseudo_diff::<A>(ctx, field, inner_diff, 0)?;
        }
    }
    if value.flags & flags::MASQUERADE == 0 {
        count::packet(value.service, ctx.len());
    }
    Ok(())
}
