//! Shapes that several lists share, in JSON and in tables.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
};

use clap::ValueEnum;
use serde::Serialize;

use crate::{
    config::ProxyMode,
    dataplane::{ebpf, select::Mode},
    desired::Algorithm,
    model::Protocol,
};

/// The dataplane that is asked for; `None`: whichever can run.
pub const fn asked(mode: ProxyMode) -> Option<Mode> {
    match mode {
        ProxyMode::Auto => None,
        ProxyMode::Ebpf => Some(Mode::Ebpf),
        ProxyMode::Nftables => Some(Mode::Nftables),
        ProxyMode::Iptables => Some(Mode::Iptables),
        ProxyMode::Ipvs => Some(Mode::Ipvs),
    }
}

/// An address with a port; IPv6 in brackets.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize)]
pub struct Endpoint {
    pub address: IpAddr,
    pub port: u16,
}

impl From<SocketAddr> for Endpoint {
    fn from(addr: SocketAddr) -> Self {
        Self { address: addr.ip(), port: addr.port() }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        SocketAddr::new(self.address, self.port).fmt(f)
    }
}

/// What traffic is addressed to: `10.96.0.10:53/UDP`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize)]
pub struct FrontendAddress {
    pub address: IpAddr,
    pub port: u16,
    pub protocol: Protocol,
}

impl fmt::Display for FrontendAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", SocketAddr::new(self.address, self.port), self.protocol)
    }
}

/// How a backend is chosen: by which tables, for Maglev (`maglev:4513`, `maglev:16381,4513` with a local one of another size).
pub fn algorithm(algorithm: Algorithm, tables: [Option<u32>; 2]) -> String {
    let mut sizes: Vec<_> = tables.into_iter().flatten().map(|size| size.to_string()).collect();
    sizes.dedup();
    if sizes.is_empty() { algorithm.to_string() } else { format!("{algorithm}:{}", sizes.join(",")) }
}

/// Blank for none.
pub fn blank<T: ToString>(value: Option<T>) -> String {
    value.map(|value| value.to_string()).unwrap_or_default()
}

/// `3d4h`, `5m10s`: the two largest units.
pub fn duration(seconds: u64) -> String {
    let units = [(86_400, "d"), (3_600, "h"), (60, "m"), (1, "s")];
    let mut rest = seconds;
    let parts = units.map(|(size, unit)| {
        let count = rest / size;
        rest %= size;
        (count, unit)
    });
    let shown: String = parts
        .iter()
        .skip_while(|(count, _)| *count == 0)
        .take(2)
        .map(|(count, unit)| format!("{count}{unit}"))
        .collect();
    if shown.is_empty() { "0s".to_owned() } else { shown }
}

/// Whose sockets are translated at connect time.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, ValueEnum)]
pub enum SocketLb {
    /// Pods and the node's own processes
    #[default]
    All,
    /// The node's own processes only
    Node,
    /// None; the node's own processes are then not served
    Off,
}

impl From<SocketLb> for ebpf::SocketLb {
    fn from(socket_lb: SocketLb) -> Self {
        match socket_lb {
            SocketLb::All => Self::All,
            SocketLb::Node => Self::Node,
            SocketLb::Off => Self::Off,
        }
    }
}

impl SocketLb {
    pub const fn name(self) -> &'static str {
        match self {
            Self::All => "all",
            Self::Node => "node",
            Self::Off => "off",
        }
    }
}

/// Whether packets that leave again by an outward device are taken from the stack.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, ValueEnum)]
pub enum Xdp {
    /// On devices whose driver can
    Auto,
    /// The same; a device whose driver cannot is a fault, and tried again
    Native,
    /// By the kernel instead of the driver, on every Ethernet device; slower
    Generic,
    /// Nowhere
    #[default]
    Off,
}

impl From<Xdp> for ebpf::Xdp {
    fn from(xdp: Xdp) -> Self {
        match xdp {
            Xdp::Auto => Self::Auto,
            Xdp::Native => Self::Native,
            Xdp::Generic => Self::Generic,
            Xdp::Off => Self::Off,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        for (seconds, text) in [(0, "0s"), (59, "59s"), (61, "1m1s"), (3_600, "1h0m"), (90_061, "1d1h")] {
            assert_eq!(duration(seconds), text);
        }
    }
}
