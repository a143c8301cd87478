//! `slots`: an mmap-able array; a frontend's ranges point into it. One slot holds one backend.
//!
//! The agent writes slots through the mapping, one aligned 8-byte store a word, before any frontend points at them.
//! Inside a range the slots are in the order of [`sort_key`] (address, then port), so that a program
//! can ask in a few probes whether a backend is still a member.

use core::mem::size_of;

use crate::{Address, Be16, Ipv4Be, Ipv6Be, pod, seal::Seal};

/// A backend as a program uses it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Target<A> {
    pub addr: A,
    pub port: Be16,
}

/// IPv4 slot: one aligned 8-byte word, so a read never tears.
///
/// From the low byte up (little endian): generation, flags, port (2, network order), address (4, network order).
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
#[repr(C, align(8))]
pub struct SlotV4(pub u64);

/// IPv6 slot: two words of address and a third that proves them.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
#[repr(C, align(8))]
pub struct SlotV6 {
    pub hi: u64,
    pub lo: u64,
    /// generation (8 bits) | flags (8) | port (16, network order) | digest of the others (32, high)
    pub tail: u64,
}

/// What both families' slots can do; `index` is the slot's place in the array.
pub trait Slot: Copy + Default + 'static {
    type Addr: Address;

    fn encode(target: Target<Self::Addr>, generation: u8) -> Self;
    /// The backend, if this slot is whole and of `generation`.
    fn decode(self, generation: u8) -> Option<Target<Self::Addr>>;
    /// Never written since the map was made (the kernel hands out zeroes; a written slot has a generation).
    fn is_virgin(self) -> bool;
    /// The generation it was last written with; 0 for a virgin slot.
    fn generation(self) -> u8;
}

impl Slot for SlotV4 {
    type Addr = Ipv4Be;

    #[inline(always)]
    fn encode(target: Target<Ipv4Be>, generation: u8) -> Self {
        Self((target.addr.0 as u64) << 32 | (target.port.0 as u64) << 16 | generation as u64)
    }

    #[inline(always)]
    fn decode(self, generation: u8) -> Option<Target<Ipv4Be>> {
        if self.0 as u8 != generation || generation == 0 {
            return None;
        }
        Some(Target { addr: Ipv4Be((self.0 >> 32) as u32), port: Be16((self.0 >> 16) as u16) })
    }

    #[inline(always)]
    fn is_virgin(self) -> bool {
        self.0 == 0
    }

    #[inline(always)]
    fn generation(self) -> u8 {
        self.0 as u8
    }
}

impl SlotV6 {
    #[inline(always)]
    fn digest(hi: u64, lo: u64, low_tail: u64) -> u64 {
        (Seal::new().word(hi).word(lo).word(low_tail).finish() as u64) << 32
    }
}

impl Slot for SlotV6 {
    type Addr = Ipv6Be;

    #[inline(always)]
    fn encode(target: Target<Ipv6Be>, generation: u8) -> Self {
        let (hi, lo) = target.addr.words();
        let low = (target.port.0 as u64) << 16 | generation as u64;
        Self { hi, lo, tail: Self::digest(hi, lo, low) | low }
    }

    #[inline(always)]
    fn decode(self, generation: u8) -> Option<Target<Ipv6Be>> {
        let low = self.tail & 0xffff_ffff;
        if low as u8 != generation || generation == 0 || self.tail != (Self::digest(self.hi, self.lo, low) | low) {
            return None;
        }
        Some(Target {
            addr: Ipv6Be([(self.hi >> 32) as u32, self.hi as u32, (self.lo >> 32) as u32, self.lo as u32]),
            port: Be16((low >> 16) as u16),
        })
    }

    #[inline(always)]
    fn is_virgin(self) -> bool {
        self.tail == 0
    }

    #[inline(always)]
    fn generation(self) -> u8 {
        self.tail as u8
    }
}

/// Sort key of a backend inside a range: the address as numbers in host order, then the port in host order.
#[inline(always)]
pub fn sort_key<A: Address>(target: Target<A>) -> (u64, u64, u16) {
    let (hi, lo) = target.addr.words();
    if A::LEN == 4 {
        (u32::from_be(hi as u32) as u64, 0, target.port.to_host())
    } else {
        let word = |w: u64| (u32::from_be((w >> 32) as u32) as u64) << 32 | u32::from_be(w as u32) as u64;
        (word(hi), word(lo), target.port.to_host())
    }
}

const _: () = assert!(size_of::<SlotV4>() == 8);
const _: () = assert!(size_of::<SlotV6>() == 24);
pod!(SlotV4, SlotV6);

#[cfg(test)]
mod tests {
    use core::net::IpAddr;

    use super::*;

    #[test]
    fn slots_round_trip_and_know_their_generation() {
        let v4 = Target { addr: Ipv4Be::from_octets([10, 1, 2, 3]), port: Be16::from_host(8080) };
        let slot = SlotV4::encode(v4, 7);
        assert_eq!(slot.decode(7), Some(v4));
        assert_eq!(slot.decode(8), None);
        assert_eq!(SlotV4::default().decode(0), None);
        assert!(SlotV4::default().is_virgin() && !slot.is_virgin());

        let v6 = Target {
            addr: Ipv6Be::from_ip("fd00:1:2:3:4:5:6:7".parse::<IpAddr>().unwrap()).unwrap(),
            port: Be16::from_host(53),
        };
        let slot = SlotV6::encode(v6, 255);
        assert_eq!(slot.decode(255), Some(v6));
        assert_eq!(SlotV6 { hi: slot.hi ^ 1, ..slot }.decode(255), None, "half an address is no address");
        assert_eq!(SlotV6 { lo: slot.lo ^ 1, ..slot }.decode(255), None);
        assert_eq!(slot.decode(1), None);
    }

    #[test]
    fn sort_key_orders_like_ip_addresses() {
        let key4 = |s: &str| {
            sort_key(Target { addr: Ipv4Be::from_ip(s.parse().unwrap()).unwrap(), port: Be16::from_host(256) })
        };
        assert!(key4("10.0.0.255") < key4("10.0.1.0"));
        let key6 =
            |s: &str| sort_key(Target { addr: Ipv6Be::from_ip(s.parse().unwrap()).unwrap(), port: Be16::from_host(1) });
        assert!(key6("fd00::1:0") < key6("fd00::1:0:0:0:1"));
        assert!(key6("fd00:0:1::") > key6("fd00::ffff"));
    }
}
