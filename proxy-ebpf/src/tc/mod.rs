//! Per packet, on tc: *ingress rewrites destinations, egress rewrites sources*.
//!
//! Between the hooks the kernel sees client ↔ backend and nothing else: its routing, its conntrack, a CNI's network policies and
//! its reverse-path filter all see the truth. Entry points come in two shapes: for devices whose packets start with an
//! Ethernet header and for those that start with the IP header.

mod direct;
pub(crate) mod held;
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
    connection::{self, ConnectionKey, ConnectionValue, flags, hook, masquerade_key},
    counters::Reason,
    device::{self, role},
    frontend::{FrontendKey, origin},
    globals::detect_local,
    local_cidr::LocalCidrKey,
    maglev, proto,
    slot::Target,
};

use self::{
    packet::{Header, pair32, tcp_flags},
    rewrite::{End, rewrite},
    table::Room,
};
use crate::{
    apart::apart,
    client::{Sticky, admit, stick},
    clock, count, globals, log,
    lookup::{self, Choice},
    maps::{ALONE, BRIDGES, DEVICES, Family, Packet, STRAY_SLOTS, STRAYS, Work, kind},
};

pub(crate) const ETHERNET: u32 = 14;
pub(crate) const ETH_P_IP: u32 = (0x0800_u16).to_be() as u32;
pub(crate) const ETH_P_IPV6: u32 = (0x86dd_u16).to_be() as u32;
/// Source ports tried for a flow whose reply tuple is taken.
const REMAP_TRIES: u32 = 4;
/// Ports tried for a masqueraded flow before it counts as exhaustion.
const MASQUERADE_TRIES: u32 = 10;

/// Seconds for which a sender says the same before a connection without entries is taken for lost at an address that may be somebody
/// else's: those answer sooner, unless they are gone as well.
const IN_VAIN: u32 = 5;
/// Seconds for which nobody else takes an element of [`STRAYS`]: with TCP's pauses, which double, the first that is long enough has
/// ended by then.
const HELD: u32 = 15;
/// Bits of a note that tell flows which share an element apart; the others tell a flow's packets apart.
const WHOSE: u32 = 0xff << 24;
/// Bytes that ask whether a closed window is still closed, or whether somebody is there.
const PROBE: u32 = 1;

/// `pkt_type` of a frame that is addressed to the device.
const PACKET_HOST: u32 = 0;
/// And of those that are not.
const PACKET_BROADCAST: u32 = 1;
const PACKET_MULTICAST: u32 = 2;
const PACKET_OTHERHOST: u32 = 3;

/// Leave the packet to whoever comes next.
const NEXT: i32 = TC_ACT_UNSPEC;
/// Not a verdict of the kernel's: send a refusal back.
const REFUSE: i32 = i32::MIN;
/// Nor this: send a reset back.
const RESET: i32 = i32::MIN + 1;
/// Nor this: reset it as one whose connection has lost its entries.
const RESET_LOST: i32 = i32::MIN + 3;
/// Nor this: do as the flow's entry says, which is new and still where it was made.
const ENTERED: i32 = i32::MIN + 2;

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
        RESET | RESET_LOST => reset::reset(ctx, l3, packet, verdict == RESET_LOST),
        verdict => verdict,
    }
}

/// What is not translated: another protocol, a fragment that lacks its first. Towards an address of ours it is refused, or
/// dropped where nobody can be told; never routed on (contract A48, A50).
#[inline(never)]
fn other<A: Header>(ctx: &TcContext, l3: u32, packet: &Packet<A>) -> i32 {
    if packet.kind == kind::LOST_FRAGMENT {
        return stray(ctx, l3, packet);
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
    if !lookup::has_guard(packet.dst) || device(ctx).0 == origin::POD {
        return NEXT;
    }
    count::reason(Reason::Unserved);
    TC_ACT_SHOT
}

/// What is behind this device, a pod or the outside; of a pod's link, one more than the number of its network namespace; its flags.
#[inline(always)]
pub(crate) fn device(ctx: &TcContext) -> (usize, u32, u32) {
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
pub(crate) fn is_overheard(ctx: &TcContext, l3: u32, from: usize) -> bool {
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
        if !marked && is_anothers(key, packet, value, u32::from(hit.established)) == 0 {
            hit.note(ctx, key, value, packet);
            return apply(ctx, l3, packet, End::Destination, value);
        }
        table::void(table::forget(key, value));
    }
    // A TCP packet that is no SYN and has no connection may be somebody else's: of a flow that another proxy translated before us.
    if !may_open {
        return stray(ctx, l3, packet);
    }
    let verdict = new_flow(ctx, l3, packet, key);
    if verdict != ENTERED {
        return verdict;
    }
    // Here and not where it was entered: each needs the stack that the other takes.
    let Some(Work { value, .. }) = Room::Enter.work::<A>() else { return TC_ACT_SHOT };
    apply(ctx, l3, packet, End::Destination, value)
}

/// A packet that belongs to no flow of ours and opens none. TCP may be of a flow that another proxy translates, in pieces, too, or
/// of one that [has lost its entries](has_lost_its_entries); any other fragment towards an address of ours goes where its first one went, which was
/// refused or dropped.
#[inline(never)]
fn stray<A: Header>(ctx: &TcContext, l3: u32, packet: &Packet<A>) -> i32 {
    // A SYN-ACK and a reset are not answered, and what acknowledges nothing does not tell which number its sender expects.
    let flags = packet.tcp_flags & (tcp_flags::SYN | tcp_flags::RST | tcp_flags::ACK);
    let goes_on = packet.kind == kind::WHOLE && packet.more == 0 && flags == tcp_flags::ACK;
    // One look-up for what is not ours, whichever it is.
    if goes_on && packet.proto == proto::TCP && ALONE.get(0).copied() == Some(1) {
        let key = FrontendKey::new(packet.dst, packet.dport, packet.proto);
        return if lookup::has_frontend(&key) && has_lost_its_entries::<A>(ctx, l3) { RESET_LOST } else { NEXT };
    }
    if !lookup::has_guard(packet.dst) {
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

/// What a connection to a frontend goes on with although it has no entry, and nobody else translates any: it had one, which was evicted
/// with its other half. Nobody knows its backend any more, and the stack would send it to the default gateway: it is reset, as a backend
/// does that conntrack chose for it anew. Only where a new one would be served: what is refused or dropped stays so.
///
/// At once if the address is a ClusterIP, or if the stack knows no better than to send the packet back to a host off the node. Another one may
/// have been somebody else's until there was the Service, and a connection from then goes on with them: there it is reset once it is [`in_vain`].
///
/// Apart, as [`apart`] makes it (before 6.2 it is walked as any other). The packet and its key it finds where they are, since the entry point's
/// stack is full.
#[inline(always)]
fn has_lost_its_entries<A: Header>(ctx: &TcContext, l3: u32) -> bool {
    let skb = ctx.as_ptr().cast::<__sk_buff>();
    0 != if A::VERSION == 4 { is_lost_v4(skb, l3) } else { is_lost_v6(skb, l3) }
}

macro_rules! is_lost {
    ($($name:ident: $family:ty),+) => {$(
        #[unsafe(no_mangle)]
        #[inline(never)]
        extern "C" fn $name(skb: *mut __sk_buff, l3: u32) -> u32 {
            let Some(Work { packet, key, .. }) = Room::Main.work::<$family>() else { return 0 };
            is_lost(&TcContext::new(skb), l3, packet, key)
        }
    )+};
}

is_lost!(is_lost_v4: Ipv4Be, is_lost_v6: Ipv6Be);

#[inline(always)]
fn is_lost<A: Header>(ctx: &TcContext, l3: u32, packet: &Packet<A>, key: &ConnectionKey<A>) -> u32 {
    let (from, _, flags) = device(ctx);
    // Of what comes by a bridge's port it is not known whether it is for this node: the bridge's address may be another than the port's, and a
    // switch may have flooded what is for another host, who answers then.
    let skb = ctx.as_ptr().cast::<__sk_buff>();
    // SAFETY: the context is live; both fields are readable for classifiers.
    let (kind, ifindex) = unsafe { ((*skb).pkt_type, (*skb).ifindex) };
    let is_own = l3 == 0 || from == origin::POD || kind == PACKET_HOST;
    // Of an entry that was read torn again and again it is not known what it says, but that it is not lost.
    if !is_overheard(ctx, l3, from) && !table::is_there(key) {
        let served = would_get(key, from, flags);
        // A pod sends all that it says to its link, whoever it means; a tunnel's peers mean each other.
        // SAFETY: a byte, copied at once.
        let is_outward = || unsafe { DEVICES.get(ifindex) }.is_some_and(|device| device.role == role::OUTWARD);
        if is_own && served == lookup::OURS
            || is_own && served == lookup::SHARED && l3 != 0 && is_outward() && source::turns_back(ctx, key) != 0
            || (served == lookup::OURS || served == lookup::SHARED) && is_said_in_vain(ctx, l3, packet, key)
        {
            return 1;
        }
    }
    count::reason(Reason::NotASyn);
    0
}

/// Whether the packet says something, and that [`in_vain`].
#[inline(always)]
fn is_said_in_vain<A: Header>(ctx: &TcContext, l3: u32, packet: &Packet<A>, key: &ConnectionKey<A>) -> bool {
    // Its number, what it acknowledges, the header's length.
    let Some(header) = packet::load::<[u16; 5]>(ctx, packet.l4 + 4) else { return false };
    // As the IP header has it: behind that there may be what a switch has added. 0: more than fits the field.
    let (field, counted) = if A::VERSION == 4 { (2, 0) } else { (4, A::LEN_MIN) };
    let Some(length) = packet::load::<Be16>(ctx, l3 + field) else { return false };
    let (length, tcp) = (length.to_host() as u32, (header[4].to_ne_bytes()[0] >> 4) as u32 * 4);
    // Whoever only asks whether the other one is there (keep-alive, a closed window) says the same each time, and is answered.
    let says = packet.tcp_flags & (tcp_flags::PSH | tcp_flags::FIN) != 0
        || length == 0
        || l3 + counted + length > packet.l4 + tcp + PROBE;
    let numbers = (pair32([header[0], header[1]]) as u64) << 32 | pair32([header[2], header[3]]) as u64;
    says && in_vain(key, numbers) != 0
}

apart! {
    /// Whether this very packet came for the first time so long ago that somebody who heard it would have said so (1). Notes it if nobody's
    /// note is in its place that is still waited for.
    fn in_vain[in_vain_v4, in_vain_v6](reads key: ConnectionKey; writes; numbers: u64) -> u32 = noted;
}

/// What a new connection in this one's place would get ([`lookup::served`]), if its sender may ask and can be answered. `from` and `flags` are
/// the device's.
#[inline(never)]
fn would_get<A: Header>(key: &ConnectionKey<A>, from: usize, flags: u32) -> u32 {
    if !reject::is_host(key.src) || key.src.is_loopback() || lookup::is_guarded(key.src) {
        return lookup::UNSERVED;
    }
    let origin = origin_of(&key.src, from, flags);
    lookup::served(&FrontendKey::new(key.dst, key.dport, key.proto), origin, &key.src)
}

#[inline(always)]
fn noted<A: Header>(key: &ConnectionKey<A>, numbers: u64) -> u32 {
    let whose = key.digest(0);
    let which = whose & WHOSE | key.digest(numbers) & !WHOSE;
    let Some(last) = STRAYS.get_ptr_mut(whose % STRAY_SLOTS as u32) else { return 0 };
    // SAFETY: a live element; one aligned word, which other CPUs write whole.
    let noted = unsafe { last.read_volatile() };
    let age = clock::since(noted as u32);
    let other = (noted >> 32) as u32 ^ which;
    let is_again = other == 0;
    // What began in one second ended in another: five of them may be four and a bit. Who says something else waits for nobody but neighbours:
    // of what was under way when the entries were lost, the first one is not always the one that is sent again.
    let is_due = if is_again { age > IN_VAIN } else { other & WHOSE == 0 || age >= HELD };
    if !is_due {
        return 0;
    }
    // Who is reset leaves the place to the next one. As long as that has not come, it is told again: the reset may have been one too many, or lost.
    let since = if is_again { clock::now_secs().wrapping_sub(HELD) } else { clock::now_secs() };
    // SAFETY: as above.
    unsafe { last.write_volatile((which as u64) << 32 | since as u64) };
    u32::from(is_again)
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
    table::is_over(key, value, u32::from(established)) != 0
}

/// Whether the flow of the entry is over and the packet is none of it: it [`reopens`], or it is an answer that begins a connection, or a datagram
/// after a time-out, to a port that the flow was masqueraded with. That answers none of ours: the kernel gave the port to a connection of the
/// node's own, where that would have shared its answers with one that conntrack remembers; or to one that another proxy masquerades, as
/// kube-proxy does with any port. 1: it is so. A function of its own: 6.1 has no stack left in its caller's frame.
#[inline(never)]
fn is_anothers<A: Header>(
    key: &ConnectionKey<A>,
    packet: &Packet<A>,
    value: &ConnectionValue<A>,
    established: u32,
) -> u32 {
    let begins = if value.flags & flags::MASQUERADE != 0 {
        packet.is_syn_ack() || key.proto == proto::UDP && table::may_be_idle(key, value)
    } else {
        let may_open = packet.kind == kind::WHOLE && packet.may_open();
        may_open && (packet.is_syn() || table::may_be_idle(key, value))
    };
    u32::from(begins && table::is_over(key, value, established) != 0)
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
            table::void(log::chosen(ctx, (key.dst, key.dport), (value.addr, value.port)));
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
    if enter(packet, key, value, pair_key, found) { ENTERED } else { TC_ACT_SHOT }
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
        if !loops && is_free(key, value, pair_key, found) != 0 {
            match table::open(key, value, pair_key, found) {
                table::ENTERED => {
                    if value.other != packet.sport {
                        count::reason(Reason::PortRemapped);
                    }
                    return true;
                }
                // Taken since we looked: look once more, it may be this very flow's, opened by another CPU.
                table::TAKEN if tries == 0 => again = true,
                table::TAKEN => {}
                _ => return false,
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

apart! {
    /// Whether the reply tuple that `value` would lead to is nobody's, or that of a flow that is over, and the tuple of the flow's own packets
    /// where they leave is nobody's (1).
    fn is_free[is_free_v4, is_free_v6](
        reads key: ConnectionKey, value: ConnectionValue; writes reply_key: ConnectionKey, found: ConnectionValue;
    ) -> u32 = freed;
}

#[inline(always)]
fn freed<A: Header>(
    key: &ConnectionKey<A>,
    value: &ConnectionValue<A>,
    reply_key: &mut ConnectionKey<A>,
    found: &mut ConnectionValue<A>,
) -> u32 {
    // What answers a flow the other way round looks like this one: the backend has asked for a Service whose backend is the client, each from
    // the port that it serves on. And what is left of an earlier flow would masquerade one that is not to be; where this one is, it takes its place.
    *reply_key = masquerade_key(key, value);
    if table::would_be_rewritten(reply_key, value.flags & flags::NEEDS_MASQUERADE != 0) {
        return 0;
    }
    table::void(table::put_pair_key(key, value, reply_key));
    let held = table::peek(reply_key, found);
    if held == 0 {
        return 1;
    }
    // Left over from this very flow: its notes are of a peer that has not spoken yet.
    if found.addr == key.dst && found.port == key.dport && found.other == key.sport {
        table::void(table::remove(reply_key));
        return 1;
    }
    if table::is_over(reply_key, found, u32::from(held == 2)) == 0 {
        return 0;
    }
    table::void(table::forget(reply_key, found));
    1
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
    if table::is_over(reply_key, found, u32::from(held == 2)) != 0 {
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
        match table::claim_masquerade(key, value, reverse_key, reverse, u32::from(look)) {
            table::ENTERED => {
                if value.port == given {
                    count::reason(Reason::PairRepaired);
                }
                table::void(table::note_given(key, value.port, reverse_key, spare_key, reverse));
                *request = *value;
                return 1;
            }
            // The last ones side by side: in a small range all are looked at.
            table::TAKEN => {
                value.port = if tries > MASQUERADE_TRIES - 4 { next_port(value.port) } else { random_port() }
            }
            _ => {
                count::reason(Reason::InsertFailed);
                return 0;
            }
        }
    }
    count::reason(Reason::MasqueradeExhausted);
    0
}
