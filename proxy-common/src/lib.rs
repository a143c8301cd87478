//! What the eBPF programs and the agent share: the layout of every map, the words in them, and the pure helpers that
//! both sides must compute alike.
//!
//! Rules of this crate:
//! - no std, no aya (the `user` feature only adds marker traits for user space);
//! - every type that goes into a map is `#[repr(C)]`, has no implicit padding, and holds no `bool`, `Option` or enum;
//! - addresses and ports are in network order, and the type says so ([`Be16`], [`Ipv4Be`], [`Ipv6Be`]);
//! - what must agree inside a map value carries a [`seal`](mod@seal), because values tear and are recycled under readers.
#![no_std]

pub mod addr;
pub mod affinity;
pub mod checksum;
pub mod connection;
pub mod counters;
pub mod crc32c;
pub mod device;
pub mod frontend;
pub mod globals;
pub mod held;
pub mod local_cidr;
pub mod maglev;
pub mod meta;
pub mod seal;
pub mod slot;
pub mod socket;
pub mod source_range;

pub use addr::{Address, Be16, Ipv4Be, Ipv6Be};

/// Version of every layout in this crate; the pin directory carries it (`v<LAYOUT_VERSION>`).
///
/// Raise it when a key, a value or the meaning of a field changes.
pub const LAYOUT_VERSION: u32 = 1;

/// IP protocol numbers the datapath translates.
pub mod proto {
    pub const ICMP: u8 = 1;
    pub const TCP: u8 = 6;
    pub const UDP: u8 = 17;
    pub const ICMPV6: u8 = 58;
    pub const SCTP: u8 = 132;

    /// Whether it has ports that are translated.
    #[inline(always)]
    pub const fn has_ports(proto: u8) -> bool {
        matches!(proto, TCP | UDP | SCTP)
    }
}

/// Implements aya's marker for plain old data where the `user` feature asks for it.
macro_rules! pod {
    ($($t:ty),+ $(,)?) => {$(
        // SAFETY: `#[repr(C)]`, all fields are integers or arrays of them, no implicit padding (size asserted beside
        // the type), so every bit pattern is valid and every byte is initialised.
        #[cfg(feature = "user")]
        unsafe impl aya::Pod for $t {}
    )+};
}
pub(crate) use pod;
