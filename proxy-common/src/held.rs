//! Fragments that came before their datagram's first one, which alone has the ports: what the programs hand to the agent of them.

use core::mem::size_of;

use crate::{Ipv4Be, Ipv6Be, connection::FragmentKey};

/// The longest frame of which a copy is kept. What the kernel takes back in one piece (`BPF_PROG_TEST_RUN`: a page of 4 KB, less room of its own).
pub const FRAME: usize = 3584;
/// Room for it: a power of two, by which a verifier is shown that a length fits.
pub const ROOM: usize = 4096;

/// What `version` may be.
pub const V4: u8 = 4;
pub const V6: u8 = 6;

/// A record of `held` (ring buffer). Written by the programs, read by the agent.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Held<A> {
    /// [`V4`] or [`V6`]: which record this is.
    pub version: u8,
    /// Length of the frame's Ethernet header, 0 where it has none.
    pub l3: u8,
    /// Bytes of `frame`; the others are of no meaning.
    pub len: u16,
    /// Interface at which the frame was.
    pub ifindex: u32,
    /// The kernel's mark on it.
    pub mark: u32,
    /// Which datagram it is of, and at which hook.
    pub key: FragmentKey<A>,
    pub frame: [u8; ROOM],
    pub pad: u32,
}

const _: () = assert!(size_of::<Held<Ipv4Be>>() == 12 + 16 + ROOM + 4);
const _: () = assert!(size_of::<Held<Ipv6Be>>() == 12 + 40 + ROOM + 4);
crate::pod!(Held<Ipv4Be>, Held<Ipv6Be>);
