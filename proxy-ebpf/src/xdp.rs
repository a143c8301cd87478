//! Per packet, on XDP of outward devices: what came in from outside and goes out again never touches the stack.
//!
//! A packet takes here at once what it would take on tc at the ingress and at the egress, from the same connection table, so a flow
//! may go either way with any packet. Only what is clear is taken: a whole TCP or UDP packet, addressed to this host, whose flow is known or
//! may begin, whose route leads to a neighbour that is known, by a device that XDP may send to. Whatever is to be
//! refused, answered, put back or not understood goes on to tc as it came. Nothing of that is counted here, but for a flow whose backend
//! XDP does not reach: it is chosen, entered and counted, and tc finds it.

use core::mem::size_of;

use aya_ebpf::{
    EbpfContext as _,
    bindings::xdp_action::{XDP_DROP, XDP_PASS, XDP_REDIRECT, XDP_TX},
    helpers::{bpf_redirect, generated::bpf_fib_lookup},
    macros::xdp,
    programs::XdpContext,
};
use proxy_common::{
    Be16, Ipv4Be, Ipv6Be, checksum,
    connection::{ConnectionKey, ConnectionValue, flags, hook},
    counters::Reason,
    device::xdp as device,
    frontend::origin,
    proto,
    slot::Target,
};

use crate::{
    client::{is_in_range, stick},
    clock, count, log,
    maps::{NEIGHBOUR_SLOTS, NEIGHBOURS, Packet, ROUTES, Work, XDP_DEVICES, kind},
    tc::{
        ETH_P_IP, ETH_P_IPV6, ETHERNET, PICKED, PICKED_FILTERED, enter, masquerade, may_ask, origin_of,
        packet::{Frame, Header, Ipv4Header, Ipv6Header, at, pair32, words},
        pick, reopens,
        rewrite::{address_diff, halves, ports_diff},
        source::{FOUND, NO_NEIGHBOUR, Route},
        table::{self, Room},
    },
};

const L3: usize = ETHERNET as usize;

impl Frame for XdpContext {
    // Volatile: loaded anew for each check. A load that the compiler shares between checks it widens apart from it, by shifts, and the
    // verifier allows those of no pointer.
    #[inline(always)]
    fn start(&self) -> usize {
        // SAFETY: live context.
        unsafe { (&raw const (*self.ctx).data).read_volatile() as usize }
    }

    #[inline(always)]
    fn end(&self) -> usize {
        // SAFETY: live context.
        unsafe { (&raw const (*self.ctx).data_end).read_volatile() as usize }
    }

    /// Among the first bytes: headers here have one length.
    #[inline(always)]
    fn load<T: Copy>(&self, offset: u32) -> Option<T> {
        let from = at::<T>(self, (offset & 0x7f) as usize)?;
        // SAFETY: bounds checked.
        Some(unsafe { from.read_unaligned() })
    }
}

/// What differs between the families.
pub(crate) trait Plain: Header {
    /// Reads a packet of headers that are nothing special. `route` gets what only the headers tell.
    fn read(ctx: &XdpContext, packet: &mut Packet<Self>, route: &mut Route) -> Option<()>;
    /// Writes addresses, and one hop less. `Err`: nothing was written.
    fn write(ctx: &XdpContext, old: (Self, Self), new: (Self, Self)) -> Result<(), ()>;
}

#[inline(always)]
fn split(word: u32) -> [u16; 2] {
    let [a, b, c, d] = word.to_ne_bytes();
    [u16::from_ne_bytes([a, b]), u16::from_ne_bytes([c, d])]
}

/// Whether so many bytes are there behind the Ethernet header.
#[inline(always)]
fn has(ctx: &XdpContext, length: u16) -> bool {
    ctx.end() - ctx.start() >= L3 + length as usize
}

impl Plain for Ipv4Be {
    #[inline(always)]
    fn read(ctx: &XdpContext, packet: &mut Packet<Self>, route: &mut Route) -> Option<()> {
        let header = at::<Ipv4Header>(ctx, L3)?;
        // SAFETY: `at` checked the bounds; the header is integers only and 2-byte aligned.
        let header = unsafe { *header };
        let length = header.total_length.to_host();
        // No options, no fragment, and a hop to spare. All flags but "don't fragment" are clear.
        let plain = header.version_ihl == 0x45 && header.fragment.to_host() & !0x4000 == 0 && header.ttl > 1;
        if !plain || length < 20 || !has(ctx, length) {
            return None;
        }
        packet.src = Self(pair32(header.src));
        packet.dst = Self(pair32(header.dst));
        packet.proto = header.proto;
        route.length = length;
        route.flow = header.tos as u32;
        Some(())
    }

    #[inline(always)]
    fn write(ctx: &XdpContext, old: (Self, Self), new: (Self, Self)) -> Result<(), ()> {
        let header = at::<Ipv4Header>(ctx, L3).ok_or(())?;
        // SAFETY: bounds checked; 2-byte aligned.
        unsafe {
            let hop = u16::from_ne_bytes([(*header).ttl, (*header).proto]);
            (*header).ttl -= 1;
            let less = u16::from_ne_bytes([(*header).ttl, (*header).proto]);
            let sum = checksum::replace32((*header).checksum, old.0.0, new.0.0);
            let sum = checksum::replace32(sum, old.1.0, new.1.0);
            (*header).checksum = checksum::replace16(sum, hop, less);
            (*header).src = split(new.0.0);
            (*header).dst = split(new.1.0);
        }
        Ok(())
    }
}

impl Plain for Ipv6Be {
    #[inline(always)]
    fn read(ctx: &XdpContext, packet: &mut Packet<Self>, route: &mut Route) -> Option<()> {
        let header = at::<Ipv6Header>(ctx, L3)?;
        // SAFETY: as for IPv4.
        let header = unsafe { *header };
        let payload = header.payload_length.to_host();
        if header.version_flow[0].to_be() >> 12 != 6 || header.hop_limit <= 1 || payload > 0xffff - 40 {
            return None;
        }
        if !has(ctx, payload + 40) {
            return None;
        }
        packet.src = Self(words(header.src));
        packet.dst = Self(words(header.dst));
        packet.proto = header.next;
        route.length = payload + 40;
        route.flow = pair32(header.version_flow) & 0x0fff_ffff_u32.to_be();
        Some(())
    }

    #[inline(always)]
    fn write(ctx: &XdpContext, _: (Self, Self), new: (Self, Self)) -> Result<(), ()> {
        let header = at::<Ipv6Header>(ctx, L3).ok_or(())?;
        let address = |to: *mut [u16; 8], Self([a, b, c, d]): Self| {
            let ([a, b], [c, d], [e, f], [g, h]) = (split(a), split(b), split(c), split(d));
            // SAFETY: bounds checked; 2-byte aligned.
            unsafe { *to = [a, b, c, d, e, f, g, h] };
        };
        // SAFETY: as above.
        unsafe {
            (*header).hop_limit -= 1;
            address(&raw mut (*header).src, new.0);
            address(&raw mut (*header).dst, new.1);
        }
        Ok(())
    }
}

#[xdp]
pub(crate) fn xdp_ingress(ctx: XdpContext) -> u32 {
    let Some(kind) = at::<u16>(&ctx, 12) else { return XDP_PASS };
    // SAFETY: bounds checked; 2-byte aligned.
    match unsafe { *kind } as u32 {
        ETH_P_IP => family::<Ipv4Be>(&ctx),
        ETH_P_IPV6 => family::<Ipv6Be>(&ctx),
        _ => XDP_PASS,
    }
}

#[inline(always)]
fn family<A: Plain>(ctx: &XdpContext) -> u32 {
    let Some(Work { packet, key, value, spare_key, found, .. }) = Room::Main.work::<A>() else { return XDP_PASS };
    if parse(ctx, packet) == 0 {
        return XDP_PASS;
    }
    *key = ConnectionKey::new(hook::INGRESS, packet.proto, packet.src, packet.sport, packet.dst, packet.dport);
    match table::find(key, value) {
        Some(hit) => {
            // A reset, or a flow that takes the place of another: tc does that.
            if value.flags & flags::RESET != 0 || packet.may_open() && reopens(key, packet, value, hit.established) {
                return XDP_PASS;
            }
            if hit.is_sent_again(key, value, packet) || route(ctx, packet, value, 0) == 0 {
                return XDP_PASS;
            }
            hit.note(ctx, key, value, packet);
        }
        None => {
            if !packet.may_open() {
                return XDP_PASS;
            }
            let verdict = new_flow(ctx, packet, key, value);
            if verdict <= XDP_PASS {
                return verdict;
            }
        }
    }
    let mut verdict = source(ctx, packet, value, spare_key, found);
    if verdict == ASKED_FOR {
        let Some(way) = ROUTES.get_ptr(0) else { return XDP_PASS };
        // SAFETY: an element of this CPU's own.
        if masquerade(ctx, unsafe { (*way).route.ifindex }, spare_key, found) == 0 {
            return XDP_DROP;
        }
        verdict = REWRITTEN;
    }
    if verdict < AS_IT_IS { verdict } else { send(ctx, packet, value, found, verdict) }
}

/// 1: `packet` is filled, and so is what only the headers tell of its route.
#[inline(never)]
fn parse<A: Plain>(ctx: &XdpContext, packet: &mut Packet<A>) -> u32 {
    let Some(way) = ROUTES.get_ptr_mut(0) else { return 0 };
    // SAFETY: an element of this CPU's own; its words are integers.
    let route = unsafe { &mut (*way).route };
    // Nor what the stack would not pass on: it refuses such a source when it routes the packet, which is not asked here.
    if A::read(ctx, packet, route).is_none() || packet.src.is_no_sender() {
        return 0;
    }
    let l4 = L3 + A::LEN_MIN as usize;
    packet.kind = kind::WHOLE;
    packet.l4 = l4 as u32;
    packet.more = 0;
    packet.tcp_flags = 0;
    let sum = match packet.proto {
        proto::TCP => {
            let Some(header) = at::<[u16; 10]>(ctx, l4) else { return 0 };
            // SAFETY: bounds checked, integers, 2-byte aligned.
            let header = unsafe { *header };
            packet.sport = Be16(header[0]);
            packet.dport = Be16(header[1]);
            packet.tcp_flags = header[6].to_ne_bytes()[1];
            header[8]
        }
        proto::UDP => {
            let Some(header) = at::<[u16; 4]>(ctx, l4) else { return 0 };
            // SAFETY: as above.
            let header = unsafe { *header };
            packet.sport = Be16(header[0]);
            packet.dport = Be16(header[1]);
            header[3]
        }
        _ => return 0,
    };
    // On its way from a socket of this very host (a virtual link) the field may hold only the pseudo-header's sum, for a device to go on
    // from. Nothing here could tell it so. One packet in 65536 looks like that by chance, and takes the other way; not where a device hands
    // over nothing of the kind: one that is sent again because a firewall refused it there would look the same.
    let (src, dst) = (packet.src.words(), packet.dst.words());
    let length = route.length.wrapping_sub(A::LEN_MIN as u16).to_be() as u64;
    let pseudo = halves(src.0) + halves(src.1) + halves(dst.0) + halves(dst.1);
    if sum != checksum::fold(pseudo + (packet.proto as u16).to_be() as u64 + length) {
        return 1;
    }
    // SAFETY: live context; one aligned half-word is read of the element.
    let device = unsafe { XDP_DEVICES.get((*ctx.ctx).ingress_ifindex) };
    u32::from(device.is_some_and(|device| device.flags & device::SUMS != 0))
}

/// Chooses a backend, finds the way there, enters the flow. `XDP_TX` or `XDP_REDIRECT`: `value` is its entry, and it can be sent from here.
#[inline(never)]
fn new_flow<A: Plain>(
    ctx: &XdpContext,
    packet: &Packet<A>,
    key: &ConnectionKey<A>,
    value: &mut ConnectionValue<A>,
) -> u32 {
    let Some(Work { key: pair_key, found, sticky, picked, .. }) = Room::Enter.work::<A>() else { return XDP_PASS };
    // A pod by its address, of another node: its packets are few, and not from outside.
    if origin_of(&packet.src, origin::EXTERNAL, 0) != origin::EXTERNAL {
        return XDP_PASS;
    }
    let outcome = pick::<A, false>(packet, origin::EXTERNAL, value, sticky);
    if outcome > PICKED_FILTERED || !may_ask(packet) {
        return XDP_PASS;
    }
    if outcome == PICKED_FILTERED && !is_in_range(value.service, &packet.src) {
        return XDP_PASS;
    }
    // Before a client is noted down: by which way it came is for the stack to judge.
    if route(ctx, packet, value, 1) == 0 {
        return XDP_PASS;
    }
    let mut remembered = false;
    if sticky.timeout_secs != 0 {
        *picked = Target { addr: value.addr, port: value.port };
        let chosen = || Target { addr: value.addr, port: value.port };
        remembered = stick(&packet.src, value.service, sticky, picked, chosen);
        value.addr = picked.addr;
        value.port = picked.port;
    }
    if value.addr == packet.src {
        value.flags |= flags::NEEDS_MASQUERADE;
    }
    // A backend that is not reached from here is the choice all the same, and tc finds it: if tc chose anew, the others would get more
    // than their share.
    table::void(route(ctx, packet, value, 0));
    count::connection(value.service);
    if remembered {
        count::turn_back(value.service);
    }
    table::void(log::chosen(ctx, (key.dst, key.dport), (value.addr, value.port)));
    if !enter(packet, key, value, pair_key, found) {
        return XDP_DROP;
    }
    let Some(way) = ROUTES.get_ptr(0) else { return XDP_PASS };
    // SAFETY: an element of this CPU's own.
    unsafe { (*way).verdict }
}
const _: () = assert!(PICKED < PICKED_FILTERED && XDP_DROP < XDP_PASS && XDP_PASS < XDP_TX && XDP_TX < XDP_REDIRECT);

/// Asks for the way that the packet takes after its translation (`back` 0), or for the one back to its sender (1). 1: it leads by a device that XDP
/// may send to, to a neighbour whose address is known; respectively by the device that the packet came in by. And
/// the frame was for this host. Else the stack is to judge, which knows of filters for reverse paths, of packets too long, of neighbours to be asked for.
#[inline(never)]
fn route<A: Plain>(ctx: &XdpContext, packet: &Packet<A>, value: &ConnectionValue<A>, back: u32) -> u32 {
    let (Some(way), Some(reverse)) = (ROUTES.get_ptr_mut(0), ROUTES.get_ptr_mut(1)) else { return 0 };
    // SAFETY: an element of this CPU's own.
    unsafe { (*way).verdict = XDP_PASS };
    // SAFETY: live context.
    let ingress = unsafe { (*ctx.ctx).ingress_ifindex };
    let Some(to) = at::<[u16; 3]>(ctx, 0) else { return 0 };
    // SAFETY: bounds checked; 2-byte aligned.
    let to = unsafe { *to };
    // SAFETY: copied at once; a device's address changes rarely, and a torn one leaves the packet to the stack.
    let Some(from) = (unsafe { XDP_DEVICES.get(ingress) }) else { return 0 };
    if !is_same(to, from.mac) {
        return 0;
    }
    let mut sends = from.flags;
    // SAFETY: elements of this CPU's own, of the size that is told; their words are integers.
    unsafe {
        let (length, flow) = ((*way).route.length, (*way).route.flow);
        let asked = if back == 0 { &raw mut (*way).route } else { &raw mut (*reverse).route };
        (*asked).family = Route::family::<A>();
        (*asked).proto = packet.proto;
        (*asked).ifindex = ingress;
        (*asked).vlan = 0;
        (*asked).flow = flow;
        if back == 0 {
            (*asked).sport = value.other;
            (*asked).dport = value.port;
            (*asked).length = length;
            Route::put_ends(asked, packet.src, value.addr);
        } else {
            (*asked).sport = packet.dport;
            (*asked).dport = packet.sport;
            (*asked).length = 1;
            Route::put_ends(asked, packet.dst, packet.src);
        }
        let found = bpf_fib_lookup(ctx.as_ptr(), asked.cast(), size_of::<Route>() as i32, 0);
        if back != 0 {
            return u32::from((found == FOUND || found == NO_NEIGHBOUR) && (*asked).ifindex == ingress);
        }
        if found != FOUND || (*asked).vlan != 0 {
            return 0;
        }
        let mut verdict = XDP_TX;
        if (*asked).ifindex != ingress {
            let Some(by) = XDP_DEVICES.get((*asked).ifindex) else { return 0 };
            sends = by.flags & device::SENDS;
        }
        if sends & device::BOUNCES == 0 {
            verdict = XDP_REDIRECT;
        }
        if sends == 0 || is_the_stacks_turn((*asked).macs[1]) {
            return 0;
        }
        (*way).verdict = verdict;
        1
    }
}

/// Seconds.
const TURN: i32 = 5;

/// Whether the stack is to have a packet for the neighbour of this address. It alone asks, for what it sends itself, whether a neighbour still is
/// there; `bpf_fib_lookup` goes by what that found, however long ago. Those that share a digest share the turn.
#[inline(always)]
fn is_the_stacks_turn([a, b, c]: [u16; 3]) -> bool {
    let word = (c as u32) << 16 | (a ^ b) as u32;
    let digest = word.wrapping_mul(0x9e37_79b1) >> (u32::BITS - NEIGHBOUR_SLOTS.ilog2());
    let Some(last) = NEIGHBOURS.get_ptr_mut(digest) else { return false };
    let now = clock::now_secs();
    // SAFETY: an element of this CPU's own.
    unsafe {
        let is_turn = now.wrapping_sub(*last).cast_signed() >= TURN;
        if is_turn {
            *last = now;
        }
        is_turn
    }
}

#[inline(always)]
fn is_same(one: [u16; 3], other: [u16; 3]) -> bool {
    one[0] == other[0] && one[1] == other[1] && one[2] == other[2]
}

// Not verdicts.
const AS_IT_IS: u32 = 100;
const REWRITTEN: u32 = 101;
const ASKED_FOR: u32 = 102;

/// What the packet gets as its source where it leaves: `found` is the entry for it ([`REWRITTEN`]) or asks for one
/// ([`ASKED_FOR`]), there is none ([`AS_IT_IS`]), or a verdict.
#[inline(never)]
fn source<A: Plain>(
    ctx: &XdpContext,
    packet: &Packet<A>,
    value: &ConnectionValue<A>,
    key: &mut ConnectionKey<A>,
    found: &mut ConnectionValue<A>,
) -> u32 {
    *key = ConnectionKey::new(hook::EGRESS, packet.proto, packet.src, value.other, value.addr, value.port);
    let Some(hit) = table::find(key, found) else {
        // Evicted: tc puts back what can be.
        let lost = value.flags & (flags::NEEDS_MASQUERADE | flags::MASQUERADE) != 0;
        return if lost { XDP_PASS } else { AS_IT_IS };
    };
    if found.flags & flags::PENDING != 0 {
        return ASKED_FOR;
    }
    hit.note(ctx, key, found, packet);
    REWRITTEN
}

/// Writes the packet and sends it by the way that was found for it. `how`: what [`source`] says of `found`.
#[inline(never)]
fn send<A: Plain>(
    ctx: &XdpContext,
    packet: &Packet<A>,
    value: &ConnectionValue<A>,
    found: &ConnectionValue<A>,
    how: u32,
) -> u32 {
    let (dst, mut dport) = (value.addr, value.port);
    let (mut src, mut sport) = (packet.src, value.other);
    let mut masquerades = value.flags & flags::MASQUERADE;
    if how == REWRITTEN {
        dport = found.other;
        (src, sport) = (found.addr, found.port);
        masquerades &= found.flags;
    }
    let l4 = L3 + A::LEN_MIN as usize;
    let is_udp = packet.proto == proto::UDP;
    let Some(way) = ROUTES.get_ptr(0) else { return XDP_PASS };
    let Some(macs) = at::<[[u16; 3]; 2]>(ctx, 0) else { return XDP_PASS };
    let Some(ports) = at::<[u16; 2]>(ctx, l4) else { return XDP_PASS };
    let field = if is_udp { at::<u16>(ctx, l4 + 6) } else { at::<u16>(ctx, l4 + 16) };
    let Some(field) = field else { return XDP_PASS };
    if A::write(ctx, (packet.src, packet.dst), (src, dst)).is_err() {
        return XDP_PASS;
    }
    let diff = address_diff(packet.src, src) as u64
        + address_diff(packet.dst, dst) as u64
        + ports_diff((packet.sport, packet.dport), (sport, dport)) as u64;
    // SAFETY: bounds checked above; 2-byte aligned. The route is an element of this CPU's own.
    let (ifindex, verdict) = unsafe {
        *ports = [sport.0, dport.0];
        // A datagram without a checksum keeps none, and none gets lost.
        if !is_udp || *field != 0 {
            let sum = !checksum::fold((!*field) as u64 + diff);
            *field = if is_udp && sum == 0 { 0xffff } else { sum };
        }
        let [from, to] = (*way).route.macs;
        *macs = [to, from];
        ((*way).route.ifindex, (*way).verdict)
    };
    // Counted where the VIP comes or goes, as on tc.
    if masquerades == 0 {
        // Hidden from the compiler, which would cut both ends to 32 bits before it takes the difference: the verifier allows that of no pointer.
        let length = core::hint::black_box(ctx.end() - ctx.start());
        count::packet(value.service, length as u32);
    }
    count::reason(Reason::Bypassed);
    if verdict == XDP_TX {
        return XDP_TX;
    }
    // SAFETY: no pointers.
    unsafe { bpf_redirect(ifindex, 0) as u32 }
}
