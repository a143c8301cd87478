//! Read-only globals of the programs, set when they are loaded. The verifier prunes what they switch off.
//!
//! Names are the symbols in the object; the agent sets them with `override_global`.

/// `u8`, [`socket_lb`]: whose sockets are translated at connect time.
pub const SOCKET_LB: &str = "SOCKET_LB";
/// `u64`: `SO_NETNS_COOKIE` of the node's network namespace; tells the node's own processes from pods.
pub const NODE_NETNS_COOKIE: &str = "NODE_NETNS_COOKIE";
/// `u16`, host order: first and last port used for masquerading.
pub const MASQUERADE_PORT_MIN: &str = "MASQUERADE_PORT_MIN";
pub const MASQUERADE_PORT_MAX: &str = "MASQUERADE_PORT_MAX";
/// `u32`, not 0: ICMP errors that refuse a packet, for each CPU; beyond that packets are dropped in silence. The agent leaves it at 1000.
pub const REFUSALS_PER_SECOND: &str = "REFUSALS_PER_SECOND";
/// `u32`: seconds of silence after which a flow's entries may be taken over. TCP that both sides spoke on, TCP that one side closed,
/// UDP without an answer, UDP with one.
pub const TCP_ESTABLISHED_SECS: &str = "TCP_ESTABLISHED_SECS";
pub const TCP_CLOSE_WAIT_SECS: &str = "TCP_CLOSE_WAIT_SECS";
pub const UDP_SECS: &str = "UDP_SECS";
pub const UDP_STREAM_SECS: &str = "UDP_STREAM_SECS";
/// `u8`: connected UDP sockets of pods are translated at connect time; 0 where the agent could not destroy them once their
/// backend is gone.
pub const CONNECTED_UDP: &str = "CONNECTED_UDP";
/// `u8`, [`detect_local`]: how packets of this node's pods are told from others.
pub const DETECT_LOCAL: &str = "DETECT_LOCAL";
/// `u8`: whether pods may be left alone at connect time, each by itself; 0: nobody looks at `left_pods`.
pub const LEFT_PODS: &str = "LEFT_PODS";
/// `u8`: the kernel has `bpf_set_retval` (5.18); without it a refused connect gets EPERM.
pub const HAVE_SET_RETVAL: &str = "HAVE_SET_RETVAL";
/// `u8`: the kernel has `bpf_ktime_get_coarse_ns` (5.11); without it the exact clock is read.
pub const HAVE_COARSE_CLOCK: &str = "HAVE_COARSE_CLOCK";
/// `u8`: log through aya-log at this level or more severe; 0: off.
///
/// aya-log's own symbol. The object's default logs everything, so the loader always sets it.
pub const LOG_LEVEL: &str = "AYA_LOG_LEVEL";

pub mod detect_local {
    /// By the device that they come in by.
    pub const DEVICE: u8 = 0;
    /// By their source address: `local_cidrs`.
    pub const ADDRESS: u8 = 1;
}

pub mod socket_lb {
    /// Pods and the node's own processes.
    pub const ALL: u8 = 0;
    /// The node's own processes only.
    pub const NODE: u8 = 1;
}
