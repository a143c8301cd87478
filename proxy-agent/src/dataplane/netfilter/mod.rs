//! What the dataplanes that are made of the kernel's own netfilter share: nftables, iptables, IPVS.
//!
//! ```text
//! lock       one of them in a network namespace
//! tool       a command (nft, iptables-restore) with a time-out, and errors that say what to do
//! counted    what several frontends share, and goes with the last of them
//! sample     frontends of every kind, to try out with whether a node takes them
//! ration     how often all rules are read
//! names      names of chains that tell what is in them
//! settings   where the kernel's settings can be written
//! sift       finds out what is wrong with a change that is refused
//! flows      ends UDP flows of backends that are gone, in the kernel's conntrack
//! translated counts the connections that it translates, where another mode takes over
//! nat        keeps translation on for those of kube-proxy
//! ```

use std::{
    collections::BTreeSet,
    fs,
    net::IpAddr,
    ops::RangeInclusive,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use super::{DataplaneError, DetectLocal, alive::Ended, iptables::Flavour};
use crate::{
    desired::{Algorithm, Devices},
    model::{Family, Protocol, ServicePortName},
};

pub mod conntrack;
pub(crate) mod counted;
pub(crate) mod flows;
pub(crate) mod ipset;
pub mod lock;
pub(crate) mod names;
pub mod nat;
pub(crate) mod ration;
#[cfg(test)]
pub(crate) mod refused;
pub(crate) mod sample;
pub(crate) mod settings;
pub(crate) mod sift;
pub(crate) mod tool;
pub(crate) mod translated;

/// What all of them are told.
#[derive(Clone, Debug)]
pub struct Options {
    pub detect_local: DetectLocal,
    /// The bit of a packet's mark that asks for masquerading (`--iptables-masquerade-bit`, contract A74).
    pub masquerade_bit: u8,
    /// How many clients session affinity remembers, for each address family.
    pub affinity_entries: u32,
    /// Counts what is ended because its backend is gone.
    pub ended: Arc<Ended>,
    /// Of iptables; `None`: the one that others use here.
    pub iptables_flavour: Option<Flavour>,
    /// NodePorts of 127.0.0.1 are served, where that takes `route_localnet` (contract A54).
    pub localhost_node_ports: bool,
    /// Counts what iptables-restore did not take.
    pub restore_failures: Arc<ByFamily>,
    /// First and last source port for masquerading: others than eBPF uses ([`beside`]), so that an answer to the one is never taken for the other's
    /// while both have flows.
    pub masquerade_ports: (u16, u16),
    /// Of IPVS, where a Service does not say how a backend is chosen.
    pub ipvs_scheduler: String,
    /// Of IPVS: no neighbour is told of addresses that are on another device than the one it asks by (`--ipvs-strict-arp`, contract A154).
    pub ipvs_strict_arp: bool,
}

/// Tables of nftables of this name, as they are told to users.
pub(crate) fn named(table: &str) -> Result<Vec<String>, DataplaneError> {
    let found = conntrack::Socket::families_with(table);
    let found = found.map_err(|source| DataplaneError::Kernel { what: "the tables of nftables".into(), source })?;
    Ok(found.into_iter().map(|family| format!("table {} {table} (nftables)", ip(family))).collect())
}

/// Removes them, with all that is in them. By netlink: an agent that has no nft has to be able to, where one that had it made them.
pub(crate) fn remove_named(table: &str) -> Result<(), DataplaneError> {
    let remove = |family| match conntrack::Socket::open()?.remove_table(family, table) {
        // Somebody else was faster.
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        done => done,
    };
    let removed = conntrack::Socket::families_with(table).and_then(|families| {
        // One that cannot go is no reason for the other to stay.
        families.into_iter().map(remove).fold(Ok(()), Result::and)
    });
    removed.map_err(|source| DataplaneError::Kernel { what: format!("remove table {table} (nftables)"), source })
}

/// As nft calls a family.
pub(crate) const fn ip(family: Family) -> &'static str {
    match family {
        Family::V4 => "ip",
        Family::V6 => "ip6",
    }
}

/// A counter for each address family.
#[derive(Debug, Default)]
pub struct ByFamily([AtomicU64; 2]);

impl ByFamily {
    pub(crate) fn add_one(&self, family: Family) {
        let Self([v4, v6]) = self;
        let counter = if family == Family::V4 { v4 } else { v6 };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    pub fn counts(&self) -> [(Family, u64); 2] {
        let Self([v4, v6]) = self;
        [(Family::V4, v4), (Family::V6, v6)].map(|(family, count)| (family, count.load(Ordering::Relaxed)))
    }
}

/// What is known of one family's rules.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum State {
    /// Nothing: the next change writes all of them anew.
    Unknown,
    /// There are none, and none are needed.
    Absent,
    /// They are what the shadow says.
    Filled,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            detect_local: DetectLocal::Device,
            masquerade_bit: 14,
            affinity_entries: 65_536,
            ended: Arc::default(),
            iptables_flavour: None,
            localhost_node_ports: false,
            restore_failures: Arc::default(),
            masquerade_ports: beside((1024, 29_999)),
            ipvs_scheduler: "rr".into(),
            ipvs_strict_arp: false,
        }
    }
}

impl Options {
    pub(crate) const fn mark(&self) -> u32 {
        1 << (self.masquerade_bit & 31)
    }
}

/// What an API server gives Services as NodePorts, unless its `--service-node-port-range` is another; no node is told that.
const NODE_PORTS: RangeInclusive<u16> = 30_000..=32_767;

/// The source ports that `others` and NodePorts leave: the longest run of them, the higher of two; with the others' where that leaves hardly any.
/// An answer by UDP to a port that is a NodePort, too, is a request to eBPF's programs, and to rules once conntrack has forgotten its flow.
pub fn beside((low, high): (u16, u16)) -> (u16, u16) {
    const ALL: (u16, u16) = (1024, u16::MAX);
    const ENOUGH: usize = 4096;
    let longest = |taken: &[RangeInclusive<u16>]| {
        let free: Vec<u16> = (ALL.0..=ALL.1).filter(|port| !taken.iter().any(|range| range.contains(port))).collect();
        let run = free.chunk_by(|one, next| next - one == 1).max_by_key(|run| run.len())?;
        Some((run.len(), (*run.first()?, *run.last()?)))
    };
    let beside = longest(&[NODE_PORTS, low..=high]).filter(|(length, _)| *length >= ENOUGH);
    beside.or_else(|| longest(&[NODE_PORTS])).map_or(ALL, |(_, run)| run)
}

/// Every protocol that netfilter can tell ports of.
pub(crate) const PROTOCOLS: [Protocol; 3] = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];

/// Maglev's tables are ours alone.
pub(crate) const ALGORITHMS: [Algorithm; 2] = [Algorithm::Random, Algorithm::RoundRobin];

/// Devices by which packets of this node's pods come in, as netfilter sees them: of a bridge's ports that is the bridge. One that
/// leads out of the node by another of its ports tells nobody apart; what comes in by it is the outside's, which is served in any case.
pub(crate) fn local_devices(devices: &Devices) -> BTreeSet<u32> {
    let of_bridges = |local: bool| -> BTreeSet<u32> {
        devices.values().filter(|device| device.local == local).filter_map(|device| device.bridge).collect()
    };
    let bridges = &of_bridges(true) - &of_bridges(false);
    devices.iter().filter(|(_, device)| device.local).map(|(index, _)| *index).chain(bridges).collect()
}

/// Whether conntrack takes TCP packets that are out of their window, too.
pub(crate) fn is_liberal() -> bool {
    let text = fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_tcp_be_liberal");
    text.is_ok_and(|text| text.trim() != "0")
}

/// Neither quotes nor line breaks of an object's name may end a word of a command.
pub(crate) fn comment(service: &ServicePortName) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() || "-._/:".contains(c) { c } else { '_' };
    // The kernel takes 128 bytes.
    service.to_string().chars().map(plain).take(127).collect()
}

/// NodePorts of 127.0.0.1 are for the connect-time path alone: netfilter would need `route_localnet`, which opens the node's loopback to its
/// neighbours (contract A55).
pub(crate) const fn is_loopback(addr: IpAddr) -> bool {
    addr.is_loopback()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        desired::{Device, DeviceRole},
        model::ServiceKey,
    };

    fn device(name: &str, local: bool, bridge: Option<u32>) -> Device {
        Device {
            name: name.into(),
            role: if local { DeviceRole::Pod } else { DeviceRole::Outward },
            ethernet: true,
            source4: None,
            source6: None,
            netns: None,
            bridge,
            behind: false,
            mac: None,
            veth: true,
            without_xdp: None,
            local,
        }
    }

    #[test]
    fn pods_of_a_bridge_are_told_by_the_bridge() {
        let devices = Devices::from([
            (2, device("eth0", false, None)),
            (3, device("veth1", true, None)),
            (4, device("veth2", true, Some(9))),
            (5, device("veth3", true, Some(8))),
            (6, device("eth1", false, Some(8))),
        ]);
        assert_eq!(local_devices(&devices).into_iter().collect::<Vec<_>>(), [3, 4, 5, 9], "8 has an uplink");
    }

    #[test]
    fn ports_are_no_others() {
        assert_eq!(beside((1024, 29_999)), (32_768, 65_535), "by default");
        assert_eq!(beside((40_000, 65_535)), (1024, 29_999));
        assert_eq!(beside((20_000, 40_000)), (40_001, 65_535));
        assert_eq!(beside((1, 61_000)), (61_001, 65_535));
        assert_eq!(beside((1024, 61_500)), (32_768, 65_535), "hardly any are left");
        assert_eq!(beside((1024, 65_535)), (32_768, 65_535), "none is left");
        for low in (1..=u16::MAX).step_by(4999) {
            for high in (low..=u16::MAX).step_by(5003) {
                let (first, last) = beside((low, high));
                assert!(
                    first <= last && !(first..=last).any(|port| NODE_PORTS.contains(&port)),
                    "{low}-{high}: {first}-{last}"
                );
            }
        }
    }

    #[test]
    fn a_name_ends_no_word() {
        let name = ServicePortName {
            service: ServiceKey::new("default", "a\" }\nflush ruleset"),
            port: "x".repeat(200).as_str().into(),
            protocol: Protocol::Tcp,
        };
        let text = comment(&name);
        assert!(text.starts_with("default/a____flush_ruleset:xxx") && text.len() == 127, "{text}");
    }
}
