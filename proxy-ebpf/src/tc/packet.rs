//! Parsing. Header lengths come from the packet, fragments and extension headers are dealt with, and whatever is not
//! understood is left to the stack.

use aya_ebpf::{
    EbpfContext,
    bindings::__sk_buff,
    helpers::generated::{bpf_skb_load_bytes, bpf_skb_pull_data},
    programs::TcContext,
};
use proxy_common::{
    Address, Be16, Ipv4Be, Ipv6Be,
    connection::{FragmentKey, FragmentValue},
    counters::Reason,
    device::DeviceValue,
    proto,
};

use super::{held, sctp};
use crate::{
    clock, count,
    maps::{Family, Packet, kind},
};

pub(crate) mod tcp_flags {
    pub(crate) const FIN: u8 = 0x01;
    pub(crate) const SYN: u8 = 0x02;
    pub(crate) const RST: u8 = 0x04;
    pub(crate) const PSH: u8 = 0x08;
    pub(crate) const ACK: u8 = 0x10;
}

impl<A: Address> Packet<A> {
    /// A packet that opens a connection, or a datagram (each may be a flow's first).
    #[inline(always)]
    pub(crate) fn may_open(&self) -> bool {
        self.proto == proto::UDP || self.is_syn()
    }

    /// SYN or INIT. Datagrams have no flags. One that closes or resets in the same breath is nobody's opening: hosts drop it, and so does conntrack.
    #[inline(always)]
    pub(crate) fn is_syn(&self) -> bool {
        self.tcp_flags & (tcp_flags::SYN | tcp_flags::ACK | tcp_flags::RST | tcp_flags::FIN) == tcp_flags::SYN
    }

    #[inline(always)]
    pub(crate) fn is_syn_ack(&self) -> bool {
        self.tcp_flags & (tcp_flags::SYN | tcp_flags::ACK | tcp_flags::RST) == tcp_flags::SYN | tcp_flags::ACK
    }
}

/// A packet's bytes, at whichever hook.
pub(crate) trait Frame: EbpfContext {
    fn start(&self) -> usize;
    fn end(&self) -> usize;
    /// Copies `T`, which is integers only, out of the packet.
    fn load<T: Copy>(&self, offset: u32) -> Option<T>;
}

impl Frame for TcContext {
    #[inline(always)]
    fn start(&self) -> usize {
        self.data()
    }

    #[inline(always)]
    fn end(&self) -> usize {
        self.data_end()
    }

    /// Wherever it lies, also beyond the linear part.
    #[inline(always)]
    fn load<T: Copy>(&self, offset: u32) -> Option<T> {
        let mut to = core::mem::MaybeUninit::<T>::uninit();
        // SAFETY: the helper writes exactly `size_of::<T>()` bytes to `to`, or fails; callers use integer-only types.
        unsafe {
            if bpf_skb_load_bytes(self.as_ptr().cast(), offset, to.as_mut_ptr().cast(), size_of::<T>() as u32) == 0 {
                Some(to.assume_init())
            } else {
                None
            }
        }
    }
}

/// A pointer to `T` at `offset`, if the packet's linear part reaches so far.
#[inline(always)]
pub(crate) fn at<T>(ctx: &impl Frame, offset: usize) -> Option<*mut T> {
    let start = ctx.start() + offset;
    if start + size_of::<T>() > ctx.end() { None } else { Some(start as *mut T) }
}

#[inline(always)]
pub(crate) fn load<T: Copy>(ctx: &impl Frame, offset: u32) -> Option<T> {
    ctx.load(offset)
}

/// Makes the first `len` bytes linear, if the packet has as many.
#[inline(always)]
pub(crate) fn pull(ctx: &TcContext, len: u32) {
    let len = if ctx.len() < len { ctx.len() } else { len };
    // SAFETY: the context is live; all packet pointers are derived anew afterwards.
    unsafe { bpf_skb_pull_data(ctx.as_ptr().cast::<__sk_buff>(), len) };
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Ipv4Header {
    pub(crate) version_ihl: u8,
    pub(crate) tos: u8,
    pub(crate) total_length: Be16,
    pub(crate) id: Be16,
    pub(crate) fragment: Be16,
    pub(crate) ttl: u8,
    pub(crate) proto: u8,
    pub(crate) checksum: u16,
    // Addresses as bytes of 16 bits: the header starts at offset 14, so it is only 2-byte aligned.
    pub(crate) src: [u16; 2],
    pub(crate) dst: [u16; 2],
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Ipv6Header {
    pub(crate) version_flow: [u16; 2],
    pub(crate) payload_length: Be16,
    pub(crate) next: u8,
    pub(crate) hop_limit: u8,
    pub(crate) src: [u16; 8],
    pub(crate) dst: [u16; 8],
}

const _: () = assert!(size_of::<Ipv4Header>() == 20 && align_of::<Ipv4Header>() == 2);
const _: () = assert!(size_of::<Ipv6Header>() == 40 && align_of::<Ipv6Header>() == 2);

/// Why a packet is left to the stack.
pub(crate) enum Left {
    /// The linear part is too short: pull and try again.
    Short,
    /// Not understood; counted.
    Alone,
}

/// Headers that a second try may need: Ethernet, IPv6 or IPv4 with options, TCP.
const PULL: u32 = 14 + 60 + 20;

/// Parses, pulling the headers into the linear part if need be. 0: `packet` is filled.
///
/// A call of its own: behind it the compiler knows nothing of the fields, and neither does the verifier.
#[inline(never)]
pub(crate) fn parse<A: Header>(ctx: &TcContext, l3: u32, hook: u8, packet: &mut Packet<A>) -> u32 {
    match A::parse(ctx, l3, hook, packet) {
        Ok(()) => return 0,
        Err(Left::Alone) => return 1,
        Err(Left::Short) => pull(ctx, PULL),
    }
    match A::parse(ctx, l3, hook, packet) {
        Ok(()) => 0,
        Err(Left::Alone) => 1,
        Err(Left::Short) => {
            count::reason(Reason::Unparsed);
            1
        }
    }
}

/// What differs between the families in reading and writing a header.
pub(crate) trait Header: Family {
    /// Offset of the addresses from the start of the IP header.
    const SRC: usize;
    const DST: usize;
    const LEN_MIN: u32;
    const ICMP: u8;

    /// Reads the headers into `packet`.
    fn parse(ctx: &TcContext, l3: u32, hook: u8, packet: &mut Packet<Self>) -> Result<(), Left>;
    /// From words as they stand in the packet; IPv4 takes the first.
    fn from_words(words: [u32; 4]) -> Self;
    /// What a masqueraded packet that leaves by this device gets as its source.
    fn source(device: &DeviceValue) -> Self;
}

const MORE_FRAGMENTS: u16 = 0x2000;
const FRAGMENT_OFFSET: u16 = 0x1fff;

impl Header for Ipv4Be {
    const SRC: usize = 12;
    const DST: usize = 16;
    const LEN_MIN: u32 = 20;
    const ICMP: u8 = proto::ICMP;

    #[inline(always)]
    fn from_words(words: [u32; 4]) -> Self {
        Self(words[0])
    }

    #[inline(always)]
    fn source(device: &DeviceValue) -> Self {
        device.source4
    }

    #[inline(always)]
    fn parse(ctx: &TcContext, l3: u32, hook: u8, packet: &mut Packet<Self>) -> Result<(), Left> {
        let header = at::<Ipv4Header>(ctx, l3 as usize).ok_or(Left::Short)?;
        // SAFETY: `at` checked the bounds; the header is integers only and 2-byte aligned (frames start aligned, l3 is even).
        let header = unsafe { *header };
        let ihl = (header.version_ihl & 0x0f) as u32 * 4;
        if header.version_ihl >> 4 != 4 || ihl < 20 {
            return Err(unparsed());
        }
        *packet = Packet {
            src: Ipv4Be(pair32(header.src)),
            dst: Ipv4Be(pair32(header.dst)),
            sport: Be16::ZERO,
            dport: Be16::ZERO,
            proto: header.proto,
            kind: kind::WHOLE,
            tcp_flags: 0,
            more: 0,
            l4: l3 + ihl,
        };
        let fragment = header.fragment.to_host();
        if fragment & FRAGMENT_OFFSET != 0 {
            later_fragment(ctx, l3, packet, header.id.0 as u32, hook);
            return Ok(());
        }
        transport(ctx, packet, ihl == 20)?;
        if fragment & MORE_FRAGMENTS != 0 {
            first_fragment(packet, header.proto, header.id.0 as u32, hook);
        }
        Ok(())
    }
}

/// Extension headers the walk goes through; more than this is left to the stack.
const MAX_EXTENSIONS: u32 = 8;

impl Header for Ipv6Be {
    const SRC: usize = 8;
    const DST: usize = 24;
    const LEN_MIN: u32 = 40;
    const ICMP: u8 = proto::ICMPV6;

    #[inline(always)]
    fn from_words(words: [u32; 4]) -> Self {
        Self(words)
    }

    #[inline(always)]
    fn source(device: &DeviceValue) -> Self {
        device.source6
    }

    #[inline(always)]
    fn parse(ctx: &TcContext, l3: u32, hook: u8, packet: &mut Packet<Self>) -> Result<(), Left> {
        let header = at::<Ipv6Header>(ctx, l3 as usize).ok_or(Left::Short)?;
        // SAFETY: as for IPv4.
        let header = unsafe { *header };
        if header.version_flow[0].to_be() >> 12 != 6 {
            return Err(unparsed());
        }
        *packet = Packet {
            src: Ipv6Be(words(header.src)),
            dst: Ipv6Be(words(header.dst)),
            sport: Be16::ZERO,
            dport: Be16::ZERO,
            proto: header.next,
            kind: kind::WHOLE,
            tcp_flags: 0,
            more: 0,
            l4: l3 + 40,
        };
        if !is_extension(header.next) {
            transport(ctx, packet, true)?;
            return Ok(());
        }
        let (mut id, mut told, mut first, mut later) = (0, 0, false, false);
        let mut seen = 0;
        while seen < MAX_EXTENSIONS && is_extension(packet.proto) {
            seen += 1;
            // next header, length in 8-byte units after the first 8; a fragment header: offset, identification.
            let Some(extension) = load::<[u16; 4]>(ctx, packet.l4) else { return Err(unparsed()) };
            let [next, length] = extension[0].to_ne_bytes();
            if packet.proto == FRAGMENT {
                id = pair32([extension[2], extension[3]]);
                let offset = u16::from_be(extension[1]);
                later = offset & 0xfff8 != 0;
                first = offset & 1 != 0 && !later;
                packet.l4 += 8;
                packet.proto = next;
                told = next;
                if later {
                    break;
                }
            } else {
                // Its next hop is not its destination yet, and that is what the checksum is over.
                if packet.proto == ROUTING && extension[1].to_ne_bytes()[1] != 0 {
                    return Err(unparsed());
                }
                packet.l4 +=
                    if packet.proto == AUTHENTICATION { (length as u32 + 2) * 4 } else { (length as u32 + 1) * 8 };
                packet.proto = next;
            }
        }
        if later {
            later_fragment(ctx, l3, packet, id, hook);
            return Ok(());
        }
        if is_extension(packet.proto) {
            return Err(unparsed());
        }
        transport(ctx, packet, false)?;
        if first {
            first_fragment(packet, told, id, hook);
        }
        Ok(())
    }
}

const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;

/// Hop-by-hop, routing, fragment, authentication, destination options (RFC 8200).
#[inline(always)]
fn is_extension(next: u8) -> bool {
    matches!(next, 0 | ROUTING | FRAGMENT | AUTHENTICATION | 60)
}

#[inline(always)]
fn unparsed() -> Left {
    count::reason(Reason::Unparsed);
    Left::Alone
}

#[inline(always)]
pub(crate) fn pair32(halves: [u16; 2]) -> u32 {
    // Two halves in memory order are one word in memory order, whatever the machine's own order.
    let [a, b] = halves[0].to_ne_bytes();
    let [c, d] = halves[1].to_ne_bytes();
    u32::from_ne_bytes([a, b, c, d])
}

#[inline(always)]
pub(crate) fn words(h: [u16; 8]) -> [u32; 4] {
    [pair32([h[0], h[1]]), pair32([h[2], h[3]]), pair32([h[4], h[5]]), pair32([h[6], h[7]])]
}

/// Ports and flags. `direct`: the header is where a packet without options has it, so packet memory is read; else
/// the helper copies it from its variable place.
#[inline(always)]
fn transport<A: Header>(ctx: &TcContext, packet: &mut Packet<A>, direct: bool) -> Result<(), Left> {
    match packet.proto {
        proto::TCP | proto::SCTP => {
            // Ports; then sequence, acknowledgement, offset, flags, or tag, checksum, the first chunk's type and flags.
            let header: [u16; 7] = if direct {
                let header = at::<[u16; 7]>(ctx, packet.l4 as usize).ok_or(Left::Short)?;
                // SAFETY: bounds checked, integers, 2-byte aligned.
                unsafe { *header }
            } else {
                load(ctx, packet.l4).ok_or_else(unparsed)?
            };
            packet.sport = Be16(header[0]);
            packet.dport = Be16(header[1]);
            let [chunk, tcp_flags] = header[6].to_ne_bytes();
            packet.tcp_flags =
                if packet.proto == proto::TCP { tcp_flags } else { sctp::flags(chunk, pair32([header[2], header[3]])) };
        }
        proto::UDP => {
            let header: [u16; 4] = if direct {
                let header = at::<[u16; 4]>(ctx, packet.l4 as usize).ok_or(Left::Short)?;
                // SAFETY: as above.
                unsafe { *header }
            } else {
                load(ctx, packet.l4).ok_or_else(unparsed)?
            };
            packet.sport = Be16(header[0]);
            packet.dport = Be16(header[1]);
        }
        p if p == A::ICMP => {
            let icmp_type: u8 = load(ctx, packet.l4).ok_or_else(unparsed)?;
            packet.kind = if super::icmp::is_error::<A>(icmp_type) { kind::ICMP_ERROR } else { kind::OTHER };
        }
        _ => packet.kind = kind::OTHER,
    }
    Ok(())
}

#[inline(always)]
fn fragment_key<A: Header>(packet: &Packet<A>, proto: u8, id: u32, hook: u8) -> FragmentKey<A> {
    FragmentKey { src: packet.src, dst: packet.dst, id, proto, hook, pad: 0 }
}

/// Seconds for which a first fragment speaks for later ones: as long as the kernel waits for them. After that the
/// identification may be another packet's.
const FRAGMENT_TIME: u32 = 30;

/// Notes the ports for the packet's later fragments. `told`: the protocol that those tell.
#[inline(always)]
fn first_fragment<A: Header>(packet: &mut Packet<A>, told: u8, id: u32, hook: u8) {
    packet.more = 1;
    if packet.kind == kind::WHOLE {
        let Packet { sport, dport, proto, .. } = *packet;
        let ports = FragmentValue { sport, dport, seen: clock::now_secs(), proto, pad: [0; 3] };
        // An insert that fails costs this datagram's later fragments, which are counted when they come.
        let _ = A::fragments().insert(fragment_key(packet, told, id, hook), ports, 0);
    }
}

#[inline(always)]
fn later_fragment<A: Header>(ctx: &TcContext, l3: u32, packet: &mut Packet<A>, id: u32, hook: u8) {
    packet.kind = kind::LOST_FRAGMENT;
    // Others are not followed (a ping's), with the first seen or not.
    if !proto::has_ports(packet.proto) && (A::VERSION == 4 || !is_extension(packet.proto)) {
        return;
    }
    let key = fragment_key(packet, packet.proto, id, hook);
    // SAFETY: copied at once; a recycled element could at worst give another datagram's ports, as a lost one would none.
    let first = unsafe { A::fragments().get(&key) }.copied();
    match first {
        Some(first) if clock::since(first.seen) <= FRAGMENT_TIME => {
            packet.sport = first.sport;
            packet.dport = first.dport;
            packet.proto = first.proto;
            packet.kind = kind::LATER_FRAGMENT;
        }
        _ => {
            count::reason(Reason::UnknownFragment);
            held::hold(ctx, l3, &key);
        }
    }
}
