//! Addresses and ports in network order, and the one trait that makes maps and programs generic over the family.

use core::{fmt, net};

use crate::pod;

/// A 16-bit number in network order: a port, an ICMP identifier.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
#[repr(transparent)]
pub struct Be16(pub u16);

impl Be16 {
    pub const ZERO: Self = Self(0);

    #[inline(always)]
    pub const fn from_host(value: u16) -> Self {
        Self(value.to_be())
    }

    #[inline(always)]
    pub const fn to_host(self) -> u16 {
        u16::from_be(self.0)
    }
}

impl fmt::Debug for Be16 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.to_host())
    }
}

/// An IPv4 address in network order.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
#[repr(transparent)]
pub struct Ipv4Be(pub u32);

/// An IPv6 address in network order, as four words (the kernel's contexts hand it out that way).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
#[repr(transparent)]
pub struct Ipv6Be(pub [u32; 4]);

impl Ipv4Be {
    #[inline(always)]
    pub const fn from_octets(octets: [u8; 4]) -> Self {
        Self(u32::from_ne_bytes(octets))
    }

    #[inline(always)]
    pub const fn octets(self) -> [u8; 4] {
        self.0.to_ne_bytes()
    }
}

impl Ipv6Be {
    #[inline(always)]
    pub const fn from_octets(o: [u8; 16]) -> Self {
        Self([
            u32::from_ne_bytes([o[0], o[1], o[2], o[3]]),
            u32::from_ne_bytes([o[4], o[5], o[6], o[7]]),
            u32::from_ne_bytes([o[8], o[9], o[10], o[11]]),
            u32::from_ne_bytes([o[12], o[13], o[14], o[15]]),
        ])
    }

    pub const fn octets(self) -> [u8; 16] {
        let [a, b, c, d] =
            [self.0[0].to_ne_bytes(), self.0[1].to_ne_bytes(), self.0[2].to_ne_bytes(), self.0[3].to_ne_bytes()];
        [a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], c[0], c[1], c[2], c[3], d[0], d[1], d[2], d[3]]
    }

    /// The IPv4 address inside `::ffff:a.b.c.d`, which dual-stack sockets use for IPv4 peers.
    #[inline(always)]
    pub const fn v4_mapped(self) -> Option<Ipv4Be> {
        if self.0[0] == 0 && self.0[1] == 0 && self.0[2] == 0xffff_u32.to_be() { Some(Ipv4Be(self.0[3])) } else { None }
    }

    #[inline(always)]
    pub const fn from_v4_mapped(v4: Ipv4Be) -> Self {
        Self([0, 0, 0xffff_u32.to_be(), v4.0])
    }
}

/// An address of either family: what a map or a program needs to know of it.
pub trait Address: Copy + PartialEq + Eq + Default + 'static {
    /// 4 or 6.
    const VERSION: u8;
    /// Bytes on the wire.
    const LEN: usize;
    const UNSPECIFIED: Self;

    /// 127.0.0.0/8, ::1.
    fn is_loopback(self) -> bool;
    /// What no packet that is to be routed has as its source: 0.0.0.0/8, 224.0.0.0 and above; ::, ff00::/8.
    fn is_no_sender(self) -> bool;
    /// The address as two words, for hashing and sealing; one-to-one.
    fn words(self) -> (u64, u64);
    /// Word by word: of two places that may overlap, for all it knows, the compiler makes a call that copies bytes.
    fn put(self, to: &mut Self);
    fn to_ip(self) -> net::IpAddr;
    /// `None` where the address is of the other family.
    fn from_ip(ip: net::IpAddr) -> Option<Self>;
}

impl Address for Ipv4Be {
    const VERSION: u8 = 4;
    const LEN: usize = 4;
    const UNSPECIFIED: Self = Self(0);

    #[inline(always)]
    fn is_loopback(self) -> bool {
        self.octets()[0] == 127
    }

    #[inline(always)]
    fn is_no_sender(self) -> bool {
        let first = self.octets()[0];
        first == 0 || first >= 224
    }

    #[inline(always)]
    fn words(self) -> (u64, u64) {
        (self.0 as u64, 0)
    }

    #[inline(always)]
    fn put(self, to: &mut Self) {
        *to = self;
    }

    fn to_ip(self) -> net::IpAddr {
        net::IpAddr::V4(self.octets().into())
    }

    fn from_ip(ip: net::IpAddr) -> Option<Self> {
        match ip {
            net::IpAddr::V4(v4) => Some(Self::from_octets(v4.octets())),
            net::IpAddr::V6(_) => None,
        }
    }
}

impl Address for Ipv6Be {
    const VERSION: u8 = 6;
    const LEN: usize = 16;
    const UNSPECIFIED: Self = Self([0; 4]);

    #[inline(always)]
    fn is_loopback(self) -> bool {
        self.0[0] == 0 && self.0[1] == 0 && self.0[2] == 0 && self.0[3] == 1_u32.to_be()
    }

    #[inline(always)]
    fn is_no_sender(self) -> bool {
        let [a, b, c, d] = self.0;
        a.to_ne_bytes()[0] == 0xff || (a | b | c | d) == 0
    }

    #[inline(always)]
    fn words(self) -> (u64, u64) {
        (((self.0[0] as u64) << 32) | self.0[1] as u64, ((self.0[2] as u64) << 32) | self.0[3] as u64)
    }

    #[inline(always)]
    fn put(self, to: &mut Self) {
        let Self([a, b, c, d]) = self;
        to.0[0] = a;
        to.0[1] = b;
        to.0[2] = c;
        to.0[3] = d;
    }

    fn to_ip(self) -> net::IpAddr {
        net::IpAddr::V6(self.octets().into())
    }

    fn from_ip(ip: net::IpAddr) -> Option<Self> {
        match ip {
            net::IpAddr::V6(v6) => Some(Self::from_octets(v6.octets())),
            net::IpAddr::V4(_) => None,
        }
    }
}

impl fmt::Debug for Ipv4Be {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.to_ip())
    }
}

impl fmt::Debug for Ipv6Be {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.to_ip())
    }
}

pod!(Be16, Ipv4Be, Ipv6Be);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_may_be_a_sender() {
        let v4 = |octets| Ipv4Be::from_octets(octets).is_no_sender();
        assert!(v4([0; 4]) && v4([0, 1, 2, 3]) && v4([224, 0, 0, 1]) && v4([240, 0, 0, 1]) && v4([255; 4]));
        assert!(!v4([1, 0, 0, 0]) && !v4([127, 0, 0, 1]) && !v4([223, 255, 255, 255]));
        let v6 = |ip: &str| Ipv6Be::from_octets(ip.parse::<net::Ipv6Addr>().unwrap().octets()).is_no_sender();
        assert!(v6("::") && v6("ff02::1") && v6("ff00::"));
        assert!(!v6("::1") && !v6("::ff00:0") && !v6("fe80::1") && !v6("1::"));
    }

    #[test]
    fn network_order_is_kept() {
        let a = Ipv4Be::from_octets([10, 96, 0, 1]);
        assert_eq!(a.0.to_ne_bytes(), [10, 96, 0, 1]);
        assert_eq!(a.to_ip(), net::IpAddr::from([10, 96, 0, 1]));
        let b = Ipv6Be::from_octets([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9]);
        assert_eq!(b.octets()[0], 0xfd);
        assert_eq!(Ipv6Be::from_ip(b.to_ip()), Some(b));
        assert_eq!(Be16::from_host(80).0.to_ne_bytes(), [0, 80]);
    }

    #[test]
    fn mapped_addresses_go_both_ways() {
        let v4 = Ipv4Be::from_octets([10, 96, 0, 1]);
        let mapped = Ipv6Be::from_v4_mapped(v4);
        assert_eq!(mapped.to_ip(), "::ffff:10.96.0.1".parse::<net::IpAddr>().unwrap());
        assert_eq!(mapped.v4_mapped(), Some(v4));
        assert_eq!(Ipv6Be::from_ip("fd00::1".parse().unwrap()).unwrap().v4_mapped(), None);
    }
}
