//! `affinity`: which backend a client of a ServicePort with session affinity was sent to (contract A9).
//!
//! The key names the ServicePort and not the frontend: ClusterIP, NodePort and load balancer address of one port share what they
//! remember (A95), two ports of a Service do not (A97).

use core::{
    mem::{offset_of, size_of},
    net::IpAddr,
};

use crate::{Address, Be16, Ipv4Be, Ipv6Be, pod, seal::Seal};

/// What [`AffinityKey::client`] is.
pub mod client {
    /// The address that the packet came from, before any masquerade.
    pub const ADDRESS: u32 = 0;
    /// The cookie of the network namespace that the socket is in: at connect time a socket mostly has no address yet.
    pub const NETNS: u32 = 1;
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(C)]
pub struct AffinityKey {
    /// An address as its words (IPv4: the first one), or a cookie as high and low half; zeroes behind it.
    pub client: [u32; 4],
    pub service: u32,
    /// [`client`].
    pub kind: u32,
}

impl AffinityKey {
    #[inline(always)]
    pub fn of_address<A: Address>(addr: A, service: u32) -> Self {
        let (hi, lo) = addr.words();
        let client = if A::LEN == 4 {
            [hi as u32, 0, 0, 0]
        } else {
            [(hi >> 32) as u32, hi as u32, (lo >> 32) as u32, lo as u32]
        };
        Self { client, service, kind: client::ADDRESS }
    }

    #[inline(always)]
    pub const fn of_netns(cookie: u64, service: u32) -> Self {
        Self { client: [(cookie >> 32) as u32, cookie as u32, 0, 0], service, kind: client::NETNS }
    }

    /// The client's address, in a map of family `A`, if that is what it is known by.
    pub fn address<A: Address>(&self) -> Option<IpAddr> {
        let [first, ..] = self.client;
        match self.kind {
            client::ADDRESS if A::LEN == 4 => Some(Ipv4Be(first).to_ip()),
            client::ADDRESS => Some(Ipv6Be(self.client).to_ip()),
            _ => None,
        }
    }

    /// The cookie of the client's network namespace, if that is what it is known by.
    pub const fn netns(&self) -> Option<u64> {
        let [high, low, ..] = self.client;
        if self.kind == client::NETNS { Some((high as u64) << 32 | low as u64) } else { None }
    }

    #[inline(always)]
    fn seal(&self) -> Seal {
        let [a, b, c, d] = self.client;
        Seal::new()
            .word((a as u64) << 32 | b as u64)
            .word((c as u64) << 32 | d as u64)
            .word((self.service as u64) << 32 | self.kind as u64)
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub struct AffinityValue<A> {
    /// The backend.
    pub addr: A,
    pub port: Be16,
    pub pad: u16,
    /// Over the key and all fields above.
    pub seal: u32,
    /// When the client's last connection began, in seconds of the monotonic clock. Noted in place by every new one.
    pub seen: u32,
}

impl<A: Address> AffinityValue<A> {
    #[inline(always)]
    pub fn seal_for(&self, key: &AffinityKey) -> u32 {
        let (hi, lo) = self.addr.words();
        key.seal().word(hi).word(lo).word((self.port.0 as u64) << 16 | self.pad as u64).finish()
    }

    #[inline(always)]
    #[must_use]
    pub fn sealed(mut self, key: &AffinityKey) -> Self {
        self.seal = self.seal_for(key);
        self
    }

    #[inline(always)]
    pub fn is_sealed_for(&self, key: &AffinityKey) -> bool {
        self.seal == self.seal_for(key)
    }
}

/// Whether what was noted at `seen` is past its time. A clock in whole seconds: never too early, up to a second late.
#[inline(always)]
pub const fn is_expired(seen: u32, now: u32, timeout_secs: u32) -> bool {
    // Another CPU may have noted a second that has not come here yet.
    let idle = now.wrapping_sub(seen);
    idle > timeout_secs && idle <= u32::MAX / 2
}

const _: () = assert!(size_of::<AffinityKey>() == 24);
const _: () = assert!(size_of::<AffinityValue<Ipv4Be>>() == 16);
const _: () = assert!(size_of::<AffinityValue<Ipv6Be>>() == 28);
const _: () = assert!(offset_of!(AffinityValue<Ipv4Be>, seen) == 12);
const _: () = assert!(offset_of!(AffinityValue<Ipv6Be>, seen) == 24);
pod!(AffinityKey, AffinityValue<Ipv4Be>, AffinityValue<Ipv6Be>);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_one_clients_at_one_service_port() {
        let addr = Ipv4Be::from_octets([10, 1, 0, 2]);
        let key = AffinityKey::of_address(addr, 7);
        let value = AffinityValue { addr, port: Be16::from_host(80), seen: 5, ..Default::default() }.sealed(&key);
        assert!(value.is_sealed_for(&key));
        assert!(AffinityValue { seen: 6, ..value }.is_sealed_for(&key), "noted in place");
        assert!(!AffinityValue { port: Be16::from_host(81), ..value }.is_sealed_for(&key));
        assert!(!AffinityValue { addr: Ipv4Be::from_octets([10, 1, 0, 3]), ..value }.is_sealed_for(&key));
        for other in [
            AffinityKey::of_address(addr, 8),
            AffinityKey::of_address(Ipv4Be::from_octets([10, 1, 0, 3]), 7),
            AffinityKey { kind: client::NETNS, ..key },
        ] {
            assert_ne!(other, key);
            assert!(!value.is_sealed_for(&other));
        }
        assert!(!AffinityValue::<Ipv4Be>::default().is_sealed_for(&key));
    }

    #[test]
    fn a_cookie_is_told_whole() {
        assert_ne!(AffinityKey::of_netns(1 << 32, 1), AffinityKey::of_netns(1, 1));
        let v6 = Ipv6Be([1, 2, 3, 4]);
        assert_eq!(AffinityKey::of_address(v6, 9).client, [1, 2, 3, 4]);
    }

    #[test]
    fn a_key_tells_the_client_again() {
        let ip: IpAddr = "192.0.2.7".parse().unwrap();
        let key = AffinityKey::of_address(Ipv4Be::from_ip(ip).unwrap(), 7);
        assert_eq!((key.address::<Ipv4Be>(), key.netns()), (Some(ip), None));
        let ip: IpAddr = "fd00:1::2:3".parse().unwrap();
        let key = AffinityKey::of_address(Ipv6Be::from_ip(ip).unwrap(), 7);
        assert_eq!((key.address::<Ipv6Be>(), key.netns()), (Some(ip), None));
        let cookie = 0x0102_0304_0506_0708;
        let key = AffinityKey::of_netns(cookie, 7);
        assert_eq!((key.address::<Ipv6Be>(), key.netns()), (None, Some(cookie)));
    }

    #[test]
    fn time_runs_out_after_the_last_second() {
        assert!(!is_expired(100, 110, 10));
        assert!(is_expired(100, 111, 10));
        assert!(!is_expired(101, 100, 10), "another CPU's second");
        assert!(!is_expired(u32::MAX, 5, 10), "the counter came round");
        assert!(is_expired(u32::MAX, 10, 10));
    }
}
