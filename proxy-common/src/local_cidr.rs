//! `local_cidrs`: addresses that a pod of this node may have, where pods are told by their address (contract A72).
//!
//! A trie of prefixes; what is in none of them comes from outside.

use core::mem::{offset_of, size_of};

use crate::{Address, Ipv4Be, Ipv6Be, pod};

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(C)]
pub struct LocalCidrKey<A> {
    /// Bits of `addr` that count.
    pub prefix: u32,
    pub addr: A,
}

/// The value says nothing: that there is an entry does.
pub type LocalCidrValue = u32;

impl<A: Address> LocalCidrKey<A> {
    /// What a look-up asks with.
    #[inline(always)]
    pub const fn host(addr: A) -> Self {
        Self { prefix: (A::LEN * 8) as u32, addr }
    }
}

const _: () = assert!(size_of::<LocalCidrKey<Ipv4Be>>() == 8);
const _: () = assert!(size_of::<LocalCidrKey<Ipv6Be>>() == 20);
const _: () = assert!(offset_of!(LocalCidrKey<Ipv4Be>, addr) == 4);
pod!(LocalCidrKey<Ipv4Be>, LocalCidrKey<Ipv6Be>);
