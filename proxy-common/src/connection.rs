//! `connections`: our own flow table. One entry is one rewrite, keyed by the tuple as the hook sees it.
//!
//! Ingress entries rewrite the destination (and, where ports collide, the source port); egress entries rewrite the
//! source (and put the collided port back). A plain flow has two, a masqueraded one has four:
//!
//! ```text
//! client C:p → VIP:v → backend B:b, as node N:m
//!   ingress (C:p → VIP:v)   dst := B:b          pair of   egress  (B:b → C:p)   src := VIP:v
//!   egress  (C:p → B:b)     src := N:m          pair of   ingress (B:b → N:m)   dst := C:p
//! ```
//!
//! Either entry of a pair tells the other whole ([`pair`]), so what an LRU evicts is repaired from the half that is left.

use core::mem::size_of;

use crate::{Address, Be16, Ipv4Be, Ipv6Be, pod, seal::Seal};

pub mod hook {
    pub const INGRESS: u8 = 0;
    pub const EGRESS: u8 = 1;
}

/// A flow as one hook sees it. Ports are ICMP-free: 0 for protocols without.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct ConnectionKey<A> {
    pub src: A,
    pub dst: A,
    pub sport: Be16,
    pub dport: Be16,
    pub proto: u8,
    /// [`hook`].
    pub hook: u8,
    pub pad: u16,
}

impl<A: Address> ConnectionKey<A> {
    #[inline(always)]
    pub const fn new(hook: u8, proto: u8, src: A, sport: Be16, dst: A, dport: Be16) -> Self {
        Self { src, dst, sport, dport, proto, hook, pad: 0 }
    }

    /// Tells flows apart, and what else `word` says.
    #[inline(always)]
    pub fn digest(&self, word: u64) -> u32 {
        self.seal().word(word).finish()
    }

    #[inline(always)]
    fn seal(&self) -> Seal {
        let (src_hi, src_lo) = self.src.words();
        let (dst_hi, dst_lo) = self.dst.words();
        let ports = (self.sport.0 as u64) << 48
            | (self.dport.0 as u64) << 32
            | (self.proto as u64) << 24
            | (self.hook as u64) << 16
            | self.pad as u64;
        if A::LEN == 4 {
            Seal::new().word(src_hi << 32 | dst_hi).word(ports)
        } else {
            Seal::new().word(src_hi).word(src_lo).word(dst_hi).word(dst_lo).word(ports)
        }
    }
}

pub mod flags {
    /// Egress entry that asks for a source address and port of the node; none is assigned yet and it has no pair.
    pub const PENDING: u8 = 1;
    /// This pair belongs to the masquerade half of a flow.
    pub const MASQUERADE: u8 = 2;
    /// Ingress entry whose flow also needs a masquerade entry at egress.
    pub const NEEDS_MASQUERADE: u8 = 4;
    /// A direct connection to a backend that had to yield its source port to a Service flow: only the port changes.
    pub const DIRECT: u8 = 8;
    /// Way there of a TCP flow whose backend was deleted, of a Service that wants its clients told: answered with a reset.
    pub const RESET: u8 = 16;
}

/// What packets seen on this entry told; each direction has its own entry, hence its own byte.
pub mod state {
    /// A packet passed in this direction.
    pub const SEEN: u8 = 1;
    pub const FIN: u8 = 2;
    pub const RST: u8 = 4;
    /// Half-open TCP, the answer's entry: `checked` is the number that acknowledges the peer's SYN-ACK; SCTP: the tag in its INIT ACK.
    pub const NUMBERED: u8 = 8;
    /// As above, but the peer answered with more than one number (SYN cookies): `checked` of the opener's entry is the one before.
    pub const RENUMBERED: u8 = 16;
}

/// Seconds without a packet after which a flow's entries may be taken over; the others are options.
pub mod times {
    /// A half-open TCP flow's.
    pub const TCP_HALF_OPEN: u32 = 60;
    /// SCTP's are those of the kernel's conntrack: an association that is alive sends heartbeats (every 30 seconds), and its ports are
    /// fixed ones mostly, so a peer that comes back from a failure comes back on them.
    pub const SCTP_ESTABLISHED: u32 = 210;
    /// What is not established, or shutting down, gives way to an INIT after the first timer; its own packets go on as long as those
    /// of others.
    pub const SCTP_OTHERS: u32 = 3;
}

/// Value of the connection maps. Above `seal`: what must agree, sealed with the key. Below: single-writer-wins notes
/// that programs update in place; losing one costs a time-out's precision, nothing else.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub struct ConnectionValue<A> {
    /// New destination (ingress) or new source (egress) address.
    pub addr: A,
    /// Its port.
    pub port: Be16,
    /// New source port (ingress) or new destination port (egress); mostly the one the packet has.
    pub other: Be16,
    /// Id of the service the flow is counted for.
    pub service: u32,
    /// [`flags`].
    pub flags: u8,
    pub pad: [u8; 3],
    pub seal: u32,
    /// Seconds of the coarse monotonic clock: last packet.
    pub seen: u32,
    /// Seconds of the coarse monotonic clock: when the pair was last looked for. See also [`state::NUMBERED`].
    pub checked: u32,
    /// [`state`].
    pub state: u8,
    pub pad2: u8,
    /// Of a flow that needs masquerade, in its main pair: the port it was given; 0: none yet. A hint, which is why no seal covers it:
    /// if the pair that masquerades is evicted, the flow asks for this port again.
    pub given: Be16,
}

impl<A: Address> ConnectionValue<A> {
    #[inline(always)]
    pub fn seal_for(&self, key: &ConnectionKey<A>) -> u32 {
        let (hi, lo) = self.addr.words();
        let rest = (self.port.0 as u64) << 48 | (self.other.0 as u64) << 32 | self.service as u64;
        let seal = key.seal();
        let seal = if A::LEN == 4 {
            seal.word(hi << 32 | self.flags as u64)
        } else {
            seal.word(hi).word(lo).word(self.flags as u64)
        };
        seal.word(rest).finish()
    }

    #[inline(always)]
    #[must_use]
    pub fn sealed(mut self, key: &ConnectionKey<A>) -> Self {
        self.seal = self.seal_for(key);
        self
    }

    #[inline(always)]
    pub fn is_sealed_for(&self, key: &ConnectionKey<A>) -> bool {
        self.seal == self.seal_for(key)
    }
}

/// The other entry of a pair, sealed, with fresh notes. An involution: `pair(pair(x)) == x` in key and sealed fields.
///
/// Not defined for [`flags::PENDING`] entries.
#[inline(always)]
pub fn pair<A: Address>(key: &ConnectionKey<A>, value: &ConnectionValue<A>) -> (ConnectionKey<A>, ConnectionValue<A>) {
    let (mut to_key, mut to_value) = (*key, *value);
    put_pair(key, value, &mut to_key, &mut to_value);
    (to_key, to_value)
}

/// [`pair`] to where it is wanted, with no stop on the stack.
#[inline(always)]
pub fn put_pair<A: Address>(
    key: &ConnectionKey<A>,
    value: &ConnectionValue<A>,
    to_key: &mut ConnectionKey<A>,
    to_value: &mut ConnectionValue<A>,
) {
    put_pair_key(key, value, to_key);
    let ConnectionValue { service, flags, seen, checked, pad2, given, .. } = *value;
    if key.hook == hook::INGRESS {
        key.dst.put(&mut to_value.addr);
        to_value.port = key.dport;
        to_value.other = key.sport;
    } else {
        key.src.put(&mut to_value.addr);
        to_value.port = key.sport;
        to_value.other = key.dport;
    }
    to_value.service = service;
    to_value.flags = flags;
    to_value.pad = [0; 3];
    to_value.seen = seen;
    to_value.checked = checked;
    to_value.state = 0;
    to_value.pad2 = pad2;
    to_value.given = given;
    to_value.seal = to_value.seal_for(to_key);
}

/// The key of [`pair`] alone.
#[inline(always)]
pub fn put_pair_key<A: Address>(key: &ConnectionKey<A>, value: &ConnectionValue<A>, to: &mut ConnectionKey<A>) {
    // Ingress (src:sport → dst:dport), dst := addr:port, sport := other  becomes  egress (addr:port → src:other),
    // src := dst:dport, dport := sport; and the other way round with the roles of source and destination swapped.
    if key.hook == hook::INGRESS {
        to.hook = hook::EGRESS;
        value.addr.put(&mut to.src);
        to.sport = value.port;
        key.src.put(&mut to.dst);
        to.dport = value.other;
    } else {
        to.hook = hook::INGRESS;
        key.dst.put(&mut to.src);
        to.sport = value.other;
        value.addr.put(&mut to.dst);
        to.dport = value.port;
    }
    to.proto = key.proto;
    to.pad = 0;
}

/// Key under which the egress hook finds a translated packet of the flow that `key`, `value` (ingress) describe: that of what masquerades it.
#[inline(always)]
pub fn masquerade_key<A: Address>(key: &ConnectionKey<A>, value: &ConnectionValue<A>) -> ConnectionKey<A> {
    ConnectionKey::new(hook::EGRESS, key.proto, key.src, value.other, value.addr, value.port)
}

/// Key of the fragment map: later fragments carry no ports, the first one's are remembered here. `proto` is what all fragments of a
/// packet tell: for IPv6 the fragment header's next, which may be one more extension header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct FragmentKey<A> {
    pub src: A,
    pub dst: A,
    /// Identification field as it stands in the packet (16 bits in IPv4).
    pub id: u32,
    pub proto: u8,
    /// [`hook`].
    pub hook: u8,
    pub pad: u16,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub struct FragmentValue {
    pub sport: Be16,
    pub dport: Be16,
    /// Second of the connection table's clock at which the first fragment came: identifications are used again.
    pub seen: u32,
    /// Of the transport header.
    pub proto: u8,
    pub pad: [u8; 3],
}

const _: () = assert!(size_of::<ConnectionKey<Ipv4Be>>() == 16);
const _: () = assert!(size_of::<ConnectionKey<Ipv6Be>>() == 40);
const _: () = assert!(size_of::<ConnectionValue<Ipv4Be>>() == 32);
const _: () = assert!(size_of::<ConnectionValue<Ipv6Be>>() == 44);
const _: () = assert!(size_of::<FragmentKey<Ipv4Be>>() == 16);
const _: () = assert!(size_of::<FragmentKey<Ipv6Be>>() == 40);
const _: () = assert!(size_of::<FragmentValue>() == 12);
pod!(
    ConnectionKey<Ipv4Be>,
    ConnectionKey<Ipv6Be>,
    ConnectionValue<Ipv4Be>,
    ConnectionValue<Ipv6Be>,
    FragmentKey<Ipv4Be>,
    FragmentKey<Ipv6Be>,
    FragmentValue,
);

#[cfg(test)]
mod tests {
    extern crate std;

    use proptest::prelude::*;

    use super::*;

    prop_compose! {
        fn entry()(hook in 0u8..2, src: u32, dst: u32, sport: u16, dport: u16, addr: u32, port: u16, other: u16, service: u32, flags: u8)
            -> (ConnectionKey<Ipv4Be>, ConnectionValue<Ipv4Be>) {
            let key = ConnectionKey::new(hook, 6, Ipv4Be(src), Be16(sport), Ipv4Be(dst), Be16(dport));
            let value = ConnectionValue { addr: Ipv4Be(addr), port: Be16(port), other: Be16(other), service, flags, ..Default::default() };
            (key, value.sealed(&key))
        }
    }

    proptest! {
        #[test]
        fn pair_is_an_involution((key, value) in entry()) {
            let (k, v) = pair(&key, &value);
            prop_assert!(v.is_sealed_for(&k));
            prop_assert_ne!(k.hook, key.hook);
            prop_assert_eq!(pair(&k, &v), (key, value));
        }

        #[test]
        fn a_seal_belongs_to_one_key((key, value) in entry(), bit in 0usize..12) {
            let mut other = key;
            match bit / 4 { 0 => other.src.0 ^= 1 << bit, 1 => other.dport.0 ^= 1, _ => other.hook ^= 1 }
            prop_assert!(value.is_sealed_for(&key));
            prop_assert!(!value.is_sealed_for(&other));
        }
    }

    #[test]
    fn both_pairs_of_a_masqueraded_flow() {
        let ip = |o| Ipv4Be::from_octets(o);
        let (client, vip, backend, node) =
            (ip([192, 0, 2, 7]), ip([10, 96, 0, 1]), ip([10, 1, 0, 3]), ip([192, 0, 2, 1]));
        let p = Be16::from_host;
        let key = ConnectionKey::new(hook::INGRESS, 6, client, p(5000), vip, p(80));
        let value = ConnectionValue { addr: backend, port: p(8080), other: p(5000), ..Default::default() };
        let (k, v) = pair(&key, &value);
        assert_eq!(k, ConnectionKey::new(hook::EGRESS, 6, backend, p(8080), client, p(5000)));
        assert_eq!((v.addr, v.port, v.other), (vip, p(80), p(5000)));

        let key = ConnectionKey::new(hook::EGRESS, 6, client, p(5000), backend, p(8080));
        let value = ConnectionValue { addr: node, port: p(61000), other: p(8080), ..Default::default() };
        let (k, v) = pair(&key, &value);
        assert_eq!(k, ConnectionKey::new(hook::INGRESS, 6, backend, p(8080), node, p(61000)));
        assert_eq!((v.addr, v.port, v.other), (client, p(5000), p(8080)));
    }
}
