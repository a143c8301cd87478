//! Connect-time records: what a socket was pointed at, so that replies and `getpeername` can show the VIP.
//!
//! A connected socket has one peer: its record lives in the socket itself (socket storage), goes away with it, and cannot
//! be evicted by others. An unconnected UDP socket may talk to many VIPs: its records live in an LRU hash, one for
//! each direction: `(socket, VIP) → backend` keeps later datagrams on the backend of the first, `(socket, backend) → VIP`
//! names the sender of an answer.

use core::mem::size_of;

use crate::{Address, Be16, Ipv4Be, Ipv6Be, pod, seal::Seal};

/// Socket storage of a connected socket.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub struct PeerRecord<A> {
    pub vip: A,
    pub backend: A,
    pub vip_port: Be16,
    pub backend_port: Be16,
    /// Id of the service. 0: the record names no peer; the socket has, or had, datagrams to a VIP or a peer that was one.
    pub service: u32,
    /// IP protocol of the socket.
    pub proto: u8,
    pub pad: [u8; 3],
}

pub mod direction {
    /// Key holds the VIP, value the backend.
    pub const TO_BACKEND: u8 = 0;
    /// Key holds the backend, value the VIP.
    pub const TO_VIP: u8 = 1;
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct DatagramKey<A> {
    /// `bpf_get_socket_cookie`, high and low half: as a `u64` it would pad the key.
    pub cookie: [u32; 2],
    pub addr: A,
    pub port: Be16,
    /// [`direction`].
    pub direction: u8,
    pub pad: u8,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub struct DatagramValue<A> {
    pub addr: A,
    pub port: Be16,
    pub pad: u16,
    pub service: u32,
    /// Over the key and all fields above.
    pub seal: u32,
    /// To a backend: when the last datagram went there, in seconds of the monotonic clock. Noted in place.
    pub seen: u32,
}

impl<A: Address> DatagramKey<A> {
    #[inline(always)]
    pub const fn new(cookie: u64, direction: u8, addr: A, port: Be16) -> Self {
        Self { cookie: [(cookie >> 32) as u32, cookie as u32], addr, port, direction, pad: 0 }
    }

    #[inline(always)]
    fn seal(&self) -> Seal {
        let (hi, lo) = self.addr.words();
        Seal::new()
            .word((self.cookie[0] as u64) << 32 | self.cookie[1] as u64)
            .word(hi)
            .word(lo)
            .word((self.port.0 as u64) << 8 | self.direction as u64)
    }
}

impl<A: Address> DatagramValue<A> {
    #[inline(always)]
    pub fn seal_for(&self, key: &DatagramKey<A>) -> u32 {
        let (hi, lo) = self.addr.words();
        key.seal()
            .word(hi)
            .word(lo)
            .word((self.service as u64) << 32 | (self.port.0 as u64) << 16 | self.pad as u64)
            .finish()
    }

    #[inline(always)]
    #[must_use]
    pub fn sealed(mut self, key: &DatagramKey<A>) -> Self {
        self.seal = self.seal_for(key);
        self
    }

    #[inline(always)]
    pub fn is_sealed_for(&self, key: &DatagramKey<A>) -> bool {
        self.seal == self.seal_for(key)
    }
}

const _: () = assert!(size_of::<PeerRecord<Ipv4Be>>() == 20);
const _: () = assert!(size_of::<PeerRecord<Ipv6Be>>() == 44);
const _: () = assert!(size_of::<DatagramKey<Ipv4Be>>() == 16);
const _: () = assert!(size_of::<DatagramKey<Ipv6Be>>() == 28);
const _: () = assert!(size_of::<DatagramValue<Ipv4Be>>() == 20);
const _: () = assert!(size_of::<DatagramValue<Ipv6Be>>() == 32);
pod!(
    PeerRecord<Ipv4Be>,
    PeerRecord<Ipv6Be>,
    DatagramKey<Ipv4Be>,
    DatagramKey<Ipv6Be>,
    DatagramValue<Ipv4Be>,
    DatagramValue<Ipv6Be>,
);
