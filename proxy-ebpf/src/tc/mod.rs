//! Per packet, on tc: *ingress rewrites destinations, egress rewrites sources*.
//!
//! Between the hooks the kernel sees client ↔ backend and nothing else: its routing, its conntrack, a CNI's network policies and
//! its reverse-path filter all see the truth. Entry points come in two shapes: for devices whose packets start with an
//! Ethernet header and for those that start with the IP header.

mod direct;
mod icmp;
pub(crate) mod packet;
mod reject;
mod reset;
pub(crate) mod rewrite;
mod sctp;
pub(crate) mod source;
pub(crate) mod table;

use aya_ebpf::{
    EbpfContext,
    bindings::{__sk_buff, TC_ACT_SHOT, TC_ACT_UNSPEC},
    btf_maps::lpm_trie::Key,
    helpers::bpf_get_prandom_u32,
    macros::classifier,
    programs::TcContext,
};
use proxy_common::{
    Be16, Ipv4Be, Ipv6Be,
    connection::{self, ConnectionKey, ConnectionValue, flags, hook},
    counters::Reason,
    device::{self, role},
    frontend::{FrontendKey, origin},
    globals::detect_local,
    local_cidr::LocalCidrKey,
    maglev, proto,
    slot::Target,
};

use self::{
    packet::{Header, tcp_flags},
    rewrite::{End, rewrite},
    table::Room,
};
use crate::{
    client::{Sticky, admit, stick},
    count, globals, log,
    lookup::{self, Choice},
    maps::{BRIDGES, DEVICES, Family, Packet, Work, kind},
};

pub(crate) const ETHERNET: u32 = 14;
pub(crate) const ETH_P_IP: u32 = (0x0800_u16).to_be() as u32;
pub(crate) const ETH_P_IPV6: u32 = (0x86dd_u16).to_be() as u32;
/// Source ports tried for a flow whose reply tuple is taken.
const REMAP_TRIES: u32 = 4;
/// Ports tried for a masqueraded flow before it counts as exhaustion.
const MASQUERADE_TRIES: u32 = 10;

/// `pkt_type` of a frame that is not addressed to the device.
const PACKET_BROADCAST: u32 = 1;
const PACKET_MULTICAST: u32 = 2;
const PACKET_OTHERHOST: u32 = 3;

/// Leave the packet to whoever comes next.
const NEXT: i32 = TC_ACT_UNSPEC;
/// Not a verdict of the kernel's: send a refusal back.
const REFUSE: i32 = i32::MIN;
/// Nor this: send a reset back.
const RESET: i32 = i32::MIN + 1;

#[classifier]
pub(crate) fn tc_ingress_ether(ctx: TcContext) -> i32 {
    handle::<{ hook::INGRESS }>(&ctx, ETHERNET)
}

#[classifier]
pub(crate) fn tc_egress_ether(ctx: TcContext) -> i32 {
    handle::<{ hook::EGRESS }>(&ctx, ETHERNET)
}

#[classifier]
pub(crate) fn tc_ingress_l3(ctx: TcContext) -> i32 {
    handle::<{ hook::INGRESS }>(&ctx, 0)
}

#[classifier]
pub(crate) fn tc_egress_l3(ctx: TcContext) -> i32 {
    handle::<{ hook::EGRESS }>(&ctx, 0)
}

#[inline(always)]
fn handle<const HOOK: u8>(ctx: &TcContext, l3: u32) -> i32 {
    let skb = ctx.as_ptr().cast::<__sk_buff>();
    // SAFETY: the context is live; both fields are readable for classifiers.
    let (protocol, vlan) = unsafe { ((*skb).protocol, (*skb).vlan_present) };
    // A tagged packet belongs to the VLAN device above, which has its own hook; translated here it would be twice.
    if vlan != 0 {
        return NEXT;
    }
    match protocol {
        ETH_P_IP => family::<Ipv4Be, HOOK>(ctx, l3),
        ETH_P_IPV6 => family::<Ipv6Be, HOOK>(ctx, l3),
        _ => NEXT,
    }
}

#[inline(always)]
fn family<A: Header, const HOOK: u8>(ctx: &TcContext, l3: u32) -> i32 {
    let Some(Work { packet, key, value, .. }) = Room::Main.work::<A>() else { return NEXT };
    if HOOK == hook::EGRESS {
        packet.dst = A::UNSPECIFIED;
    }
    if packet::parse(ctx, l3, HOOK, packet) != 0 {
        // What there was to read tells where it goes, if not what it is.
        return if HOOK == hook::EGRESS { leave(ctx, packet) } else { NEXT };
    }
    if packet.kind <= kind::LATER_FRAGMENT {
        *key = ConnectionKey::new(HOOK, packet.proto, packet.src, packet.sport, packet.dst, packet.dport);
        return if HOOK == hook::INGRESS {
            carry_out(ctx, l3, packet, ingress(ctx, l3, packet, key, value))
        } else {
            egress(ctx, l3, packet, key, value)
        };
    }
    if packet.kind == kind::ICMP_ERROR {
        match icmp::translate(ctx, l3, packet, HOOK) {
            icmp::NO_FLOW => {}
            icmp::TRANSLATED | icmp::ABOUT_A_VIP => return NEXT,
            _ => {
                count::reason(Reason::RewriteFailed);
                return TC_ACT_SHOT;
            }
        }
    }
    if HOOK == hook::INGRESS { carry_out(ctx, l3, packet, other(ctx, l3, packet)) } else { leave(ctx, packet) }
}

/// Refuses if that is the verdict. Here and not where it is decided: the refusal needs the stack that the decision took.
#[inline(always)]
fn carry_out<A: Header>(ctx: &TcContext, l3: u32, packet: &Packet<A>, verdict: i32) -> i32 {
    match verdict {
        REFUSE => reject::reject(ctx, l3, packet),
        RESET => reset::reset(ctx, l3, packet),
        verdict => verdict,
    }
}

/// What is not translated: another protocol, a fragment that lacks its first. Towards an address of ours it is refused, or
/// dropped where nobody can be told; never routed on (contract A48, A50).
#[inline(never)]
fn other<A: Header>(ctx: &TcContext, l3: u32, packet: &Packet<A>) -> i32 {
    if packet.kind == kind::LOST_FRAGMENT {
        return stray(packet);
    }
    match lookup::guard(packet.dst, origin::EXTERNAL) {
        Choice::Pass | Choice::Backend { .. } => NEXT,
        _ if is_overheard(ctx, l3, device(ctx).0) => NEXT,
        Choice::Refuse if is_martian(packet) == 0 => REFUSE,
        Choice::Refuse | Choice::Drop { .. } => TC_ACT_SHOT,
    }
}

/// What leaves a device untranslated. Whoever translates in the stack has done so by now: a VIP as its destination would take it to the
/// default gateway (contract A50). Only a pod may have such an address, for reasons of its own.
#[inline(never)]
fn leave<A: Header>(ctx: &TcContext, packet: &Packet<A>) -> i32 {
    if !lookup::is_guarded(packet.dst) || device(ctx).0 == origin::POD {
        return NEXT;
    }
    count::reason(Reason::Unserved);
    TC_ACT_SHOT
}

/// What is behind this device, a pod or the outside; of a pod's link, one more than the number of its network namespace; its flags.
#[inline(always)]
fn device(ctx: &TcContext) -> (usize, u32, u32) {
    let skb = ctx.as_ptr().cast::<__sk_buff>();
    // SAFETY: the context is live.
    let ifindex = unsafe { (*skb).ifindex };
    // SAFETY: copied at once; bytes and an aligned half-word, none of which needs another.
    match unsafe { DEVICES.get(ifindex) } {
        Some(device) if device.role == role::POD => (origin::POD, device.netns as u32, device.flags as u32),
        Some(device) => (origin::EXTERNAL, 0, device.flags as u32),
        None => (origin::EXTERNAL, 0, 0),
    }
}

/// Whether a new flow comes from a pod of this node: by its source address, or by the device that it comes in by (contract A72). Who is behind
/// the device (`from`) is another matter.
#[inline(never)]
pub(crate) fn origin_of<A: Family>(src: &A, from: usize, flags: u32) -> usize {
    let is_pod = if globals::detect_local() == detect_local::ADDRESS {
        let LocalCidrKey { prefix, addr } = LocalCidrKey::host(*src);
        A::local_cidrs().get(&Key::new(prefix, addr)).is_some()
    } else {
        (from == origin::POD) != (flags & device::flags::OTHERWISE as u32 != 0)
    };
    if is_pod { origin::POD } else { origin::EXTERNAL }
}

/// Whether the frame is for another host, or for all of them: a switch that floods, an interface that listens to everything, a macvlan on
/// top. The stack forwards none of these, and to refuse them is their host's business. On a pod's link and at a bridge's port frames
/// are for whoever is behind the switch.
#[inline(always)]
fn is_overheard(ctx: &TcContext, l3: u32, from: usize) -> bool {
    if l3 == 0 {
        return false;
    }
    let skb = ctx.as_ptr().cast::<__sk_buff>();
    // SAFETY: the context is live; both fields are readable for classifiers.
    let (kind, ifindex) = unsafe { ((*skb).pkt_type, (*skb).ifindex) };
    match kind {
        PACKET_BROADCAST | PACKET_MULTICAST => true,
        // SAFETY: that there is an element is all that is asked.
        PACKET_OTHERHOST => from != origin::POD && unsafe { BRIDGES.get(ifindex) }.is_none(),
        _ => false,
    }
}

/// Carries out what an entry says and counts the packet: where the VIP comes or goes, so a masqueraded one is counted once.
#[inline(never)]
fn apply<A: Header>(ctx: &TcContext, l3: u32, packet: &Packet<A>, end: End, value: &ConnectionValue<A>) -> i32 {
    if value.flags & flags::MASQUERADE == 0 {
        count::packet(value.service, ctx.len());
    }
    match rewrite(ctx, l3, packet, end, value.addr, value.port, value.other) {
        Ok(()) => NEXT,
        Err(()) => {
            count::reason(Reason::RewriteFailed);
            TC_ACT_SHOT
        }
    }
}

#[inline(always)]
fn ingress<A: Header>(
    ctx: &TcContext,
    l3: u32,
    packet: &Packet<A>,
    key: &ConnectionKey<A>,
    value: &mut ConnectionValue<A>,
) -> i32 {
    let may_open = packet.kind == kind::WHOLE && packet.may_open();
    if let Some(hit) = table::find(key, value) {
        // The client's own reset is for the backend: one that was taken out of the Service and is there still would send to nobody.
        let marked = value.flags & flags::RESET != 0 && packet.tcp_flags & tcp_flags::RST == 0;
        if marked && !may_open {
            return RESET;
        }
        if !marked && (!may_open || !reopens(key, packet, value, hit.established)) {
            hit.note(ctx, key, value, packet);
            return apply(ctx, l3, packet, End::Destination, value);
        }
        table::void(table::forget(key, value));
    }
    // A TCP packet that is no SYN and has no connection is somebody else's: a flow that another proxy translated before us.
    if !may_open {
        return stray(packet);
    }
    new_flow(ctx, l3, packet, key)
}

/// A packet that belongs to no flow of ours and opens none. TCP may be of a flow that another proxy translates, in pieces, too; any
/// other fragment towards an address of ours goes where its first one went, which was refused or dropped.
#[inline(never)]
fn stray<A: Header>(packet: &Packet<A>) -> i32 {
    if !lookup::is_guarded(packet.dst) {
        return NEXT;
    }
    if packet.kind == kind::WHOLE {
        count::reason(Reason::NotASyn);
        return NEXT;
    }
    if packet.proto == proto::TCP || packet.proto == proto::SCTP {
        return NEXT;
    }
    count::reason(Reason::StrayFragment);
    TC_ACT_SHOT
}

/// Whether what asks for an address of ours comes from one that asks nothing: of the loopback network, or one of ours. Counts it then. Only
/// asked where we would answer or translate: who passes other traffic on under such an address may have reasons to. 1: it does.
#[inline(never)]
fn is_martian<A: Header>(packet: &Packet<A>) -> u32 {
    if may_ask(packet) {
        return 0;
    }
    count::reason(Reason::Martian);
    1
}

/// Whether the sender is one that may ask for an address of ours.
#[inline(always)]
pub(crate) fn may_ask<A: Header>(packet: &Packet<A>) -> bool {
    !packet.src.is_loopback() && !lookup::is_guarded(packet.src)
}

/// Whether this packet starts a new flow where an old one has entries.
#[inline(always)]
pub(crate) fn reopens<A: Header>(
    key: &ConnectionKey<A>,
    packet: &Packet<A>,
    value: &ConnectionValue<A>,
    established: bool,
) -> bool {
    // A masqueraded flow's answer is no opening, whatever it looks like.
    if value.flags & flags::MASQUERADE != 0 {
        return false;
    }
    // For datagrams the entry's own note decides: no second look-up for each of them.
    if !packet.is_syn() && !table::may_be_idle(key, value) {
        return false;
    }
    table::is_over(key, value, established)
}

#[inline(never)]
fn new_flow<A: Header>(ctx: &TcContext, l3: u32, packet: &Packet<A>, key: &ConnectionKey<A>) -> i32 {
    let (from, netns, flags) = device(ctx);
    if is_overheard(ctx, l3, from) {
        return NEXT;
    }
    let Some(Work { value, key: pair_key, found, sticky, picked, .. }) = Room::Enter.work::<A>() else {
        return TC_ACT_SHOT;
    };
    let mut outcome = pick::<A, true>(packet, origin_of(&packet.src, from, flags), value, sticky);
    if outcome <= PICKED_REFUSAL && is_martian(packet) != 0 {
        return TC_ACT_SHOT;
    }
    if outcome <= PICKED_FILTERED {
        let admitted = admit(value.service, &packet.src, u32::from(outcome == PICKED_FILTERED));
        outcome = if admitted != 0 { PICKED } else { PICKED_DROP };
    }
    match outcome {
        PICKED => {
            if sticky.timeout_secs != 0 {
                *picked = Target { addr: value.addr, port: value.port };
                let chosen = || Target { addr: value.addr, port: value.port };
                if stick(&packet.src, value.service, sticky, picked, chosen) {
                    count::turn_back(value.service);
                }
                value.addr = picked.addr;
                value.port = picked.port;
            }
            // A pod that reaches itself must not see its own address as the sender (contract A70).
            if value.addr == packet.src {
                value.flags |= connection::flags::NEEDS_MASQUERADE;
            }
            table::void(log::chosen(ctx, key.proto, (key.dst, key.dport), (value.addr, value.port)));
            // Answers to a connection that the pod has there already must not be taken for this flow's.
            if netns != 0 && direct::is_connected(ctx, packet, value, netns - 1) != 0 {
                value.other = random_port();
            }
        }
        PICKED_NOTHING => {
            // Each datagram would be asked about, and of those from off the node hardly one is beside a Service flow. Nor is a packet that is
            // a Service flow's own, translated by another device's hook.
            let asked =
                flags & device::flags::BEHIND as u32 == 0 && (packet.proto != proto::UDP || from == origin::POD);
            if !asked || !yields(packet, value, pair_key, found) {
                return NEXT;
            }
        }
        PICKED_REFUSAL => {
            table::void(log::refused(ctx, key.proto, (key.dst, key.dport)));
            return REFUSE;
        }
        _ => return TC_ACT_SHOT,
    }
    if enter(packet, key, value, pair_key, found) {
        apply(ctx, l3, packet, End::Destination, value)
    } else {
        TC_ACT_SHOT
    }
}

pub(crate) const PICKED: u32 = 0;
/// If the frontend may be asked from there.
pub(crate) const PICKED_FILTERED: u32 = 1;
const PICKED_REFUSAL: u32 = 2;
const PICKED_NOTHING: u32 = 3;
const PICKED_DROP: u32 = 4;

/// Chooses a backend and fills the flow's entry with it; whether the client may ask, and what session affinity makes of it, is the caller's:
/// the stack has no room for everything at once.
#[inline(never)]
pub(crate) fn pick<A: Header, const COUNTS: bool>(
    packet: &Packet<A>,
    from: usize,
    value: &mut ConnectionValue<A>,
    sticky: &mut Sticky,
) -> u32 {
    let hash = |client| {
        if client {
            maglev::client(packet.src)
        } else {
            let src = Target { addr: packet.src, port: packet.sport };
            maglev::flow(src, Target { addr: packet.dst, port: packet.dport }, packet.proto)
        }
    };
    match lookup::choose::<A, false>(&FrontendKey::new(packet.dst, packet.dport, packet.proto), from, 0, COUNTS, hash) {
        Choice::Backend { target, service, masquerade, sticky: wanted, filtered, .. } => {
            *sticky = wanted;
            value.addr = target.addr;
            value.port = target.port;
            value.other = packet.sport;
            value.service = service;
            value.pad = [0; 3];
            value.flags = if masquerade { flags::NEEDS_MASQUERADE } else { 0 };
            if filtered { PICKED_FILTERED } else { PICKED }
        }
        Choice::Pass => PICKED_NOTHING,
        Choice::Refuse => PICKED_REFUSAL,
        Choice::Drop { .. } => PICKED_DROP,
    }
}

/// Enters a flow under a reply tuple that nobody else has, with its own source port or with another one. `pair_key` and `found` are
/// room. If there is none, or no room for it, the packet is counted as lost.
#[inline(always)]
pub(crate) fn enter<A: Header>(
    packet: &Packet<A>,
    key: &ConnectionKey<A>,
    value: &mut ConnectionValue<A>,
    pair_key: &mut ConnectionKey<A>,
    found: &mut ConnectionValue<A>,
) -> bool {
    let mut tries = 0;
    while tries < REMAP_TRIES {
        let mut again = false;
        // A pod that reaches itself from the port it serves on: what is to be masqueraded would have the tuple of its answer.
        let loops = value.addr == packet.src && value.port == value.other;
        if !loops && is_free(key, value, pair_key, found) {
            match table::open(key, value, pair_key, found) {
                Ok(true) => {
                    if value.other != packet.sport {
                        count::reason(Reason::PortRemapped);
                    }
                    return true;
                }
                // Taken since we looked: look once more, it may be this very flow's, opened by another CPU.
                Ok(false) if tries == 0 => again = true,
                Ok(false) => {}
                Err(()) => return false,
            }
        }
        tries += 1;
        if !again {
            value.other = random_port();
        }
    }
    count::reason(Reason::RemapExhausted);
    false
}

/// Whether the reply tuple that `value` would lead to is nobody's, or that of a flow that is over.
#[inline(never)]
fn is_free<A: Header>(
    key: &ConnectionKey<A>,
    value: &ConnectionValue<A>,
    reply_key: &mut ConnectionKey<A>,
    found: &mut ConnectionValue<A>,
) -> bool {
    table::void(table::put_pair_key(key, value, reply_key));
    let held = table::peek(reply_key, found);
    if held == 0 {
        return true;
    }
    // Left over from this very flow: its notes are of a peer that has not spoken yet.
    if found.addr == key.dst && found.port == key.dport && found.other == key.sport {
        table::void(table::remove(reply_key));
        return true;
    }
    if !table::is_over(reply_key, found, held == 2) {
        return false;
    }
    table::void(table::forget(reply_key, found));
    true
}

/// A port of the masquerade range, apart from those the kernel hands out.
#[inline(always)]
fn random_port() -> Be16 {
    let (min, max) = (globals::masquerade_port_min(), globals::masquerade_port_max());
    // SAFETY: no arguments.
    let random = unsafe { bpf_get_prandom_u32() };
    Be16::from_host(min.wrapping_add((random % (max.wrapping_sub(min) as u32 + 1)) as u16))
}

#[inline(always)]
fn next_port(port: Be16) -> Be16 {
    if port.to_host() >= globals::masquerade_port_max() {
        Be16::from_host(globals::masquerade_port_min())
    } else {
        Be16::from_host(port.to_host() + 1)
    }
}

/// A flow that aims at no frontend. If a Service flow of the same client port already leads to this destination, answers could not
/// be told apart: one that is over is forgotten; beside a live one this flow has to yield, and `value` becomes its
/// entry with another source port. `reply_key` and `found` are room.
#[inline(always)]
fn yields<A: Header>(
    packet: &Packet<A>,
    value: &mut ConnectionValue<A>,
    reply_key: &mut ConnectionKey<A>,
    found: &mut ConnectionValue<A>,
) -> bool {
    *reply_key = ConnectionKey::new(hook::EGRESS, packet.proto, packet.dst, packet.dport, packet.src, packet.sport);
    let held = table::peek(reply_key, found);
    // The egress half of a masqueraded flow whose client is our destination means no answer of ours.
    if held == 0 || found.flags & flags::MASQUERADE != 0 {
        return false;
    }
    if table::is_over(reply_key, found, held == 2) {
        table::void(table::forget(reply_key, found));
        return false;
    }
    value.addr = packet.dst;
    value.port = packet.dport;
    value.other = random_port();
    value.service = found.service;
    value.flags = flags::DIRECT;
    value.pad = [0; 3];
    true
}

#[inline(always)]
fn egress<A: Header>(
    ctx: &TcContext,
    l3: u32,
    packet: &Packet<A>,
    key: &ConnectionKey<A>,
    value: &mut ConnectionValue<A>,
) -> i32 {
    let Some(hit) = table::find(key, value) else { return leave(ctx, packet) };
    if value.flags & flags::PENDING != 0 {
        let skb = ctx.as_ptr().cast::<__sk_buff>();
        // SAFETY: the context is live.
        let ifindex = unsafe { (*skb).ifindex };
        if masquerade(ctx, ifindex, key, value) == 0 {
            return TC_ACT_SHOT;
        }
    } else {
        hit.note(ctx, key, value, packet);
    }
    apply(ctx, l3, packet, End::Source, value)
}

/// First packet of a flow to be masqueraded, now that its device is known: gives it an address and a port of the node; the port that it
/// had before its entries were evicted, if the request names one and it is still to be had. 1: what the request was in is the entry
/// now. 0: the packet is lost, and counted.
#[inline(never)]
pub(crate) fn masquerade<A: Header>(
    ctx: &impl EbpfContext,
    ifindex: u32,
    key: &ConnectionKey<A>,
    request: &mut ConnectionValue<A>,
) -> u32 {
    let Some(Work { value, key: reverse_key, spare_key, found: reverse, .. }) = Room::Masquerade.work::<A>() else {
        return 0;
    };
    // SAFETY: copied at once; addresses of a device change rarely, and a torn one only costs this flow.
    value.addr = match unsafe { DEVICES.get(ifindex) } {
        Some(device) => A::source(device),
        None => A::UNSPECIFIED,
    };
    table::void(source::by_route(ctx, key, ifindex, &mut value.addr));
    if value.addr == A::UNSPECIFIED {
        count::reason(Reason::NoMasqueradeAddress);
        return 0;
    }
    let (service, given) = (request.service, request.port);
    let (min, max) = (globals::masquerade_port_min(), globals::masquerade_port_max());
    let kept = key.sport.to_host();
    value.port = if given != Be16(0) {
        given
    } else if kept >= min && kept <= max {
        key.sport
    } else {
        random_port()
    };
    value.other = key.dport;
    value.service = service;
    value.flags = flags::MASQUERADE;
    value.pad = [0; 3];
    let mut tries = 0;
    while tries < MASQUERADE_TRIES {
        tries += 1;
        // Any free port will do; when those get rare, ports of flows that are over. The packet's own may be this flow's already.
        let look = tries == 1 || tries > MASQUERADE_TRIES - 4;
        match table::claim_masquerade(key, value, reverse_key, reverse, look) {
            Ok(true) => {
                if value.port == given {
                    count::reason(Reason::PairRepaired);
                }
                table::void(table::note_given(key, value.port, reverse_key, spare_key, reverse));
                *request = *value;
                return 1;
            }
            // The last ones side by side: in a small range all are looked at.
            Ok(false) => value.port = if tries > MASQUERADE_TRIES - 4 { next_port(value.port) } else { random_port() },
            Err(()) => {
                count::reason(Reason::InsertFailed);
                return 0;
            }
        }
    }
    count::reason(Reason::MasqueradeExhausted);
    0
}
