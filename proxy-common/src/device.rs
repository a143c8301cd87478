//! `devices`: interface index → what the per-packet programs need to know of it.

use core::mem::size_of;

use crate::{Ipv4Be, Ipv6Be, pod};

pub mod role {
    /// A link whose peer lives in another namespace: a pod is behind it.
    pub const POD: u8 = 1;
    /// Leads off the node.
    pub const OUTWARD: u8 = 2;
    /// A tunnel to other nodes (VXLAN, Geneve, WireGuard …).
    pub const OVERLAY: u8 = 3;
}

pub mod flags {
    /// Packets may come here from another device's hook, translated already: a bridge whose pods' links have hooks of their own.
    pub const BEHIND: u8 = 1;
    /// Local detection says the opposite of the role: what comes in by a pod's link is from outside, what comes in by another device is
    /// from pods (contract A72).
    pub const OTHERWISE: u8 = 2;
}

/// Value of the devices map; key: `u32` interface index. Written by the agent.
///
/// The addresses are what a masqueraded packet that leaves by this device gets as its source if no route says otherwise (contract
/// A75); unspecified: none known, the packet is then dropped and counted.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub struct DeviceValue {
    pub source6: Ipv6Be,
    pub source4: Ipv4Be,
    /// [`role`].
    pub role: u8,
    /// [`flags`].
    pub flags: u8,
    /// Of a pod's link: one more than the id by which this network namespace knows the one of its other end
    /// (`IFLA_LINK_NETNSID`). 0: not known, or an id that has no room here; then nobody looks for sockets there.
    pub netns: u16,
}

/// Value of `xdp_devices`; key: `u32` interface index. Written by the agent. What has no entry is not sent to by XDP.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub struct XdpDevice {
    /// Its own: frames for other hosts are none of XDP's business. As halves, as they stand in the frame.
    pub mac: [u16; 3],
    /// [`xdp`].
    pub flags: u16,
}

pub mod xdp {
    /// Takes frames that are redirected to it, its own ones, too.
    pub const SENDS: u16 = 1;
    /// Sends its own frames back by `XDP_TX`.
    pub const BOUNCES: u16 = 2;
    /// No frame comes in there with a checksum that is yet to be made.
    pub const SUMS: u16 = 4;
}

const _: () = assert!(size_of::<DeviceValue>() == 24);
const _: () = assert!(size_of::<XdpDevice>() == 8);
pod!(DeviceValue, XdpDevice);
