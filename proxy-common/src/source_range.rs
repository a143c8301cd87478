//! `source_ranges`: from where a ServicePort may be asked, for frontends with
//! [`HAS_SOURCE_RANGES`](crate::frontend::flags::HAS_SOURCE_RANGES) (contract A8).
//!
//! A trie of prefixes: the service's id comes first and counts whole, the address behind it as far as the range is long.

use core::mem::{offset_of, size_of};

use crate::{Address, Ipv4Be, Ipv6Be, pod};

/// What is matched from its first bit on.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(C)]
pub struct SourceRange<A> {
    pub service: u32,
    pub addr: A,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(C)]
pub struct SourceRangeKey<A> {
    /// Bits of `range` that count.
    pub prefix: u32,
    pub range: SourceRange<A>,
}

/// The value says nothing: that there is an entry does.
pub type SourceRangeValue = u32;

impl<A: Address> SourceRangeKey<A> {
    /// Bits of the service id, before those of the address.
    const SERVICE_BITS: u32 = 32;

    #[inline(always)]
    pub const fn new(service: u32, addr: A, prefix: u8) -> Self {
        Self { prefix: Self::SERVICE_BITS + prefix as u32, range: SourceRange { service, addr } }
    }

    /// What a look-up asks with.
    #[inline(always)]
    pub const fn host(service: u32, addr: A) -> Self {
        Self::new(service, addr, (A::LEN * 8) as u8)
    }
}

const _: () = assert!(size_of::<SourceRangeKey<Ipv4Be>>() == 12);
const _: () = assert!(size_of::<SourceRangeKey<Ipv6Be>>() == 24);
const _: () = assert!(offset_of!(SourceRangeKey<Ipv4Be>, range) == 4);
pod!(SourceRangeKey<Ipv4Be>, SourceRangeKey<Ipv6Be>);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_service_counts_whole_whatever_the_range() {
        assert_eq!(SourceRangeKey::new(1, Ipv4Be::UNSPECIFIED, 0).prefix, 32);
        assert_eq!(SourceRangeKey::host(1, Ipv4Be::UNSPECIFIED).prefix, 64);
        assert_eq!(SourceRangeKey::host(1, Ipv6Be::UNSPECIFIED).prefix, 160);
    }
}
