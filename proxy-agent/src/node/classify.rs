//! Which devices the per-packet programs belong on, and what is behind each. Pure.
//!
//! A packet must meet the programs once on its way in and once on its way out:
//! - *pod*: a veth or netkit whose peer lives in another namespace, unless it carries the node's address or a default route
//!   (a node that is itself a container has such an `eth0`), or is named as an uplink (one that is a port of a bridge has neither);
//! - *outward*: carries a default route or an address of the node's networks;
//! - *overlay*: a tunnel to other nodes.
//!
//! Where devices are stacked, one floor is chosen:
//! - ports of a bond, a team or a bridge with an uplink are left to their master, which has the addresses and the routes;
//! - a bridge that joins pods (the CNI bridge plugin, Docker), alone or with an uplink, is left out and its ports are taken: there,
//!   bridged packets between two pods pass too, and with a hook on the bridge as well they would pass two. Not one that filters
//!   VLANs, beside an uplink: packets of tagged ports lose their tags only on their way up to the bridge;
//! - ports of a VRF are taken and the VRF device is not: its ports see the packets with their link headers.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use super::Options;
use crate::{
    desired::{Device, DeviceRole, Devices},
    model::NodeFacts,
};

/// An address of a device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Address {
    pub ip: IpAddr,
    pub prefix: u8,
    /// Of global scope, past duplicate detection, not deprecated.
    pub usable: bool,
    /// Past duplicate detection: the kernel answers for it.
    pub assigned: bool,
    /// Not the first of its prefix (IPv4), or a temporary one (IPv6).
    pub secondary: bool,
}

/// What netlink says of a link, as far as it matters here.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Link {
    pub name: String,
    /// `veth`, `vxlan` …; empty for hardware.
    pub kind: String,
    pub up: bool,
    pub loopback: bool,
    pub ethernet: bool,
    pub master: Option<u32>,
    /// Its other end is in another network namespace.
    pub peer_elsewhere: bool,
    /// The number by which this namespace knows that one, if it has one.
    pub peer_netns: Option<u32>,
    pub addresses: Vec<Address>,
    pub default_route: bool,
    /// A bridge that is aware of VLANs.
    pub vlan_filtering: bool,
    pub mac: Option<[u8; 6]>,
    /// The device that it is on top of; of a veth the other end.
    pub lower: Option<u32>,
    /// Of the program that is on its XDP hook, whosever it is.
    pub xdp_program: Option<u32>,
}

/// One of `--devices` or `--uplinks`: a glob (`*`, `?`), with `!` in front to exclude.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Pattern {
    glob: String,
    exclude: bool,
}

impl Pattern {
    pub fn new(text: &str) -> Self {
        match text.strip_prefix('!') {
            Some(glob) => Self { glob: glob.to_owned(), exclude: true },
            None => Self { glob: text.to_owned(), exclude: false },
        }
    }

    pub fn all(texts: &[String]) -> Vec<Self> {
        texts.iter().map(|text| Self::new(text)).collect()
    }
}

/// Which devices' packets count as those of this node's pods (contract A72).
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum Detect {
    /// Those of pods' links.
    #[default]
    Roles,
    /// Those that come in by this bridge.
    Bridge(String),
    /// Those that come in by a device of such a name.
    Prefix(String),
}

/// Excluded by no pattern, and matched by one if there are any that include.
fn is_wanted(name: &str, patterns: &[Pattern]) -> bool {
    let matches = |p: &Pattern| glob(p.glob.as_bytes(), name.as_bytes());
    let mut includes = patterns.iter().filter(|p| !p.exclude).peekable();
    let included = includes.peek().is_none() || includes.any(matches);
    included && !patterns.iter().any(|p| p.exclude && matches(p))
}

fn glob(pattern: &[u8], text: &[u8]) -> bool {
    match (pattern.split_first(), text.split_first()) {
        (None, None) => true,
        (Some((b'*', rest)), _) => glob(rest, text) || text.split_first().is_some_and(|(_, tail)| glob(pattern, tail)),
        (Some((p, rest)), Some((t, tail))) if *p == b'?' || p == t => glob(rest, tail),
        _ => false,
    }
}

const TUNNELS: [&str; 16] = [
    "vxlan",
    "geneve",
    "wireguard",
    "ipip",
    "ip6tnl",
    "sit",
    "gre",
    "gretap",
    "ip6gre",
    "ip6gretap",
    "erspan",
    "ip6erspan",
    "tun",
    "vti",
    "vti6",
    "xfrm",
];

struct World<'a> {
    links: &'a BTreeMap<u32, Link>,
    facts: &'a NodeFacts,
    options: &'a Options,
    /// Devices with another one on top of them as its ports.
    ports: BTreeMap<u32, Vec<&'a Link>>,
}

impl World<'_> {
    /// Carries an address of the node: one that its Node object names, or one of a whole network that is not the node's pod
    /// network (a second uplink). A gateway address that a CNI puts on a pod's link stands for itself alone (/32, /128)
    /// or is of the pod network.
    fn has_node_address(&self, link: &Link) -> bool {
        link.addresses.iter().any(|address| {
            let Address { ip, prefix, usable, .. } = address;
            let host = if ip.is_ipv4() { 32 } else { 128 };
            let of_pods = || self.facts.pod_cidrs.iter().any(|cidr| cidr.contains(ip));
            *usable && (self.facts.internal_ips.contains(ip) || *prefix < host && !of_pods())
        })
    }

    fn has_internal_ip(&self, link: &Link) -> bool {
        link.addresses.iter().any(|address| address.usable && self.facts.internal_ips.contains(&address.ip))
    }

    fn is_pod(&self, link: &Link) -> bool {
        matches!(link.kind.as_str(), "veth" | "netkit")
            && link.peer_elsewhere
            // What carries a bond is no pod's, be it a veth: the whole node may be in a container.
            && self.master(link).is_none_or(|(_, master)| !matches!(master.kind.as_str(), "bond" | "team"))
            && (self.options.uplinks.is_empty() || !is_wanted(&link.name, &self.options.uplinks))
            && !link.default_route
            && !self.has_node_address(link)
    }

    /// Whether what comes in there is from pods of this node. Ports of a bridge are the bridge, by whose name netfilter knows them; but for
    /// an uplink, whose packets are from elsewhere whatever it is a port of.
    fn is_local(&self, role: DeviceRole, link: &Link) -> bool {
        let master = self.master(link).map(|(_, master)| master).filter(|master| master.kind == "bridge");
        let by_bridge = master.filter(|_| role == DeviceRole::Pod);
        match &self.options.detect {
            Detect::Roles => role == DeviceRole::Pod,
            Detect::Bridge(name) => link.name == *name || by_bridge.is_some_and(|master| master.name == *name),
            Detect::Prefix(prefix) => {
                let named = |link: &Link| link.name.starts_with(prefix);
                named(link) || by_bridge.is_some_and(named)
            }
        }
    }

    /// XDP takes everything that comes in for the outside's.
    fn not_outside(&self, role: DeviceRole, link: &Link) -> Option<&'static str> {
        (role != DeviceRole::Pod && self.is_local(role, link)).then_some("what comes in there counts as pods' traffic")
    }

    /// Said to be a pod's by its name, although nothing else tells: a tap of a virtual machine, a kind that is not known here.
    fn is_named(&self, link: &Link) -> bool {
        matches!(&self.options.detect, Detect::Prefix(prefix) if link.name.starts_with(prefix))
            && !self.has_node_address(link)
    }

    fn master<'b>(&'b self, link: &Link) -> Option<(u32, &'b Link)> {
        let index = link.master?;
        Some((index, self.links.get(&index)?))
    }

    /// Whether all that passes this bridge passes a hook on one of its ports: it joins pods and an uplink, none of them is
    /// excluded by a pattern, and no port has packets with VLAN tags, which hooks leave alone.
    fn is_joined_at_ports(&self, bridge: u32) -> bool {
        let filtering = self.links.get(&bridge).is_some_and(|bridge| bridge.vlan_filtering);
        !filtering
            && self.ports.get(&bridge).is_some_and(|ports| {
                ports.iter().any(|port| self.is_pod(port))
                    && ports.iter().any(|port| !self.is_pod(port))
                    && ports.iter().all(|port| is_wanted(&port.name, &self.options.patterns))
            })
    }

    fn has_hooked_pods(&self, bridge: u32) -> bool {
        let hooked = |port: &&Link| self.is_pod(port) && is_wanted(&port.name, &self.options.patterns);
        self.ports.get(&bridge).is_some_and(|ports| ports.iter().any(hooked))
    }

    fn without_xdp(&self, index: u32, link: &Link) -> Option<&'static str> {
        if matches!(link.kind.as_str(), "bond" | "team" | "bridge") {
            return Some("XDP sees its ports, and not the device that routes lead to");
        }
        if link.master.is_some() {
            return Some("it is a port of a bridge or of a VRF: routes do not lead to it");
        }
        let tagged = |above: &Link| above.kind == "vlan" && above.lower == Some(index);
        if self.links.values().any(tagged) {
            return Some("VLANs are on it: XDP cannot tell their packets where the device takes the tags off");
        }
        None
    }

    fn role(&self, index: u32, link: &Link) -> Option<DeviceRole> {
        if link.loopback || matches!(link.kind.as_str(), "dummy" | "vrf" | "ifb" | "nlmon") {
            return None;
        }
        let (mut port, mut joined) = (false, false);
        if let Some((index, master)) = self.master(link) {
            port = matches!(master.kind.as_str(), "bridge" | "bond" | "team");
            joined = master.kind == "bridge" && self.is_joined_at_ports(index);
        }
        if self.is_pod(link) {
            return Some(DeviceRole::Pod);
        }
        // Its packets are its master's.
        if port && !joined {
            return None;
        }
        if self.is_named(link) && !link.default_route {
            return Some(DeviceRole::Pod);
        }
        if TUNNELS.contains(&link.kind.as_str()) {
            return link.up.then_some(DeviceRole::Overlay);
        }
        let has_address = link.addresses.iter().any(|a| a.usable);
        let outward = if link.kind == "bridge" {
            let uplink = self.ports.get(&index).is_some_and(|ports| ports.iter().any(|port| !self.is_pod(port)));
            let leads = link.default_route || self.has_internal_ip(link) || (has_address && uplink);
            leads && !self.is_joined_at_ports(index)
        } else {
            joined || link.default_route || has_address
        };
        outward.then_some(DeviceRole::Outward)
    }
}

/// The address that a packet masqueraded at `link` gets (contract A75): its own first one, its master's, else `fallback`.
fn source<T: Copy>(
    link: &Link,
    master: Option<&Link>,
    fallback: Option<T>,
    pick: impl Fn(IpAddr) -> Option<T>,
) -> Option<T> {
    primary(link, &pick).or_else(|| master.and_then(|master| primary(master, &pick))).or(fallback)
}

fn primary<T>(link: &Link, pick: impl Fn(IpAddr) -> Option<T>) -> Option<T> {
    let of = |secondary: bool| link.addresses.iter().filter(move |a| a.usable && a.secondary == secondary);
    of(false).chain(of(true)).find_map(|address| pick(address.ip))
}

const fn v4(ip: IpAddr) -> Option<Ipv4Addr> {
    match ip {
        IpAddr::V4(ip) => Some(ip),
        IpAddr::V6(_) => None,
    }
}

const fn v6(ip: IpAddr) -> Option<Ipv6Addr> {
    match ip {
        IpAddr::V6(ip) => Some(ip),
        IpAddr::V4(_) => None,
    }
}

/// What the kernel would pick for a device without addresses: the address of the device with the default route, the node's
/// own, any.
fn fallback<T: Copy>(
    links: &BTreeMap<u32, Link>,
    node_ips: &[IpAddr],
    pick: impl Fn(IpAddr) -> Option<T>,
) -> Option<T> {
    let by_route = links.values().filter(|l| l.default_route).find_map(|link| primary(link, &pick));
    let by_node = || node_ips.iter().copied().find_map(&pick);
    let any = || links.values().filter(|l| !l.loopback).find_map(|link| primary(link, &pick));
    by_route.or_else(by_node).or_else(any)
}

impl<'a> World<'a> {
    fn new(links: &'a BTreeMap<u32, Link>, facts: &'a NodeFacts, options: &'a Options) -> Self {
        let mut ports: BTreeMap<u32, Vec<&Link>> = BTreeMap::new();
        for link in links.values() {
            if let Some(master) = link.master {
                ports.entry(master).or_default().push(link);
            }
        }
        Self { links, facts, options, ports }
    }
}

/// Bridges that lead out of the node by a port that cannot be told from a pod's link, with their ports: one of those has to be named
/// by `uplinks`.
pub(super) fn without_uplink(links: &BTreeMap<u32, Link>, options: &Options) -> BTreeMap<String, Vec<String>> {
    let facts = NodeFacts::default();
    let world = World::new(links, &facts, options);
    let bridges = links.iter().filter(|(_, link)| link.kind == "bridge" && link.default_route);
    let all_pods = bridges.filter_map(|(index, bridge)| Some((bridge, world.ports.get(index)?)));
    all_pods
        .filter(|(_, ports)| ports.iter().all(|port| world.is_pod(port)))
        .map(|(bridge, ports)| (bridge.name.clone(), ports.iter().map(|port| port.name.clone()).collect()))
        .collect()
}

/// Every device the programs belong on.
pub fn classify(links: &BTreeMap<u32, Link>, facts: &NodeFacts, options: &Options) -> Devices {
    let node_ips = facts.internal_ips.as_slice();
    let world = World::new(links, facts, options);
    let (fallback4, fallback6) = (fallback(links, node_ips, v4), fallback(links, node_ips, v6));
    let device = |(index, link): (&u32, &Link)| {
        let role = world.role(*index, link).filter(|_| is_wanted(&link.name, &options.patterns))?;
        let master = world.master(link).map(|(_, master)| master);
        let device = Device {
            name: link.name.clone(),
            role,
            ethernet: link.ethernet,
            source4: source(link, master, fallback4, v4),
            source6: source(link, master, fallback6, v6),
            netns: link.peer_netns.filter(|_| role == DeviceRole::Pod),
            behind: link.kind == "bridge" && world.has_hooked_pods(*index),
            mac: link.mac,
            veth: link.kind == "veth",
            without_xdp: world.without_xdp(*index, link).or_else(|| world.not_outside(role, link)),
            local: world.is_local(role, link),
            bridge: link.master.filter(|_| master.is_some_and(|master| master.kind == "bridge")),
        };
        Some((*index, device))
    };
    links.iter().filter_map(device).collect()
}

/// Of kube-proxy, of kube-router, and our own.
const IPVS_DUMMIES: [&str; 3] = ["kube-ipvs0", "kube-dummy-if", "proxy-ipvs0"];

/// What the node itself answers for, of any scope.
///
/// Not what IPVS proxies put on their dummy devices: those are the VIPs of all Services, and the proxy may be running still or
/// have been killed a moment ago.
pub(super) fn own_addresses(links: &BTreeMap<u32, Link>) -> BTreeSet<IpAddr> {
    let links = links.values().filter(|link| !(link.kind == "dummy" && IPVS_DUMMIES.contains(&link.name.as_str())));
    let assigned = links.flat_map(|link| &link.addresses).filter(|address| address.assigned);
    assigned.map(|address| address.ip).filter(|ip| !is_of_one_link(*ip)).collect()
}

/// Each host-side link of a pod has an IPv6 one of its own, and no frontend is at such an address: they are no news (contract A27, A52).
fn is_of_one_link(ip: IpAddr) -> bool {
    matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local())
}

/// Indexes whose devices carry a default route: where routes must be read again when they change.
pub(super) fn route_devices(links: &BTreeMap<u32, Link>) -> BTreeSet<u32> {
    links.iter().filter(|(_, link)| link.default_route).map(|(index, _)| *index).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `name kind [flags…] [addr/prefix…]`; flags: up, lo, l3, peer, default, vlans, master=N.
    fn links(lines: &[&str]) -> BTreeMap<u32, Link> {
        let mut links = BTreeMap::new();
        for (line, index) in lines.iter().zip(1..) {
            let mut words = line.split_whitespace();
            let mut link = Link {
                name: words.next().unwrap().into(),
                kind: words.next().unwrap().trim_matches('-').into(),
                ethernet: true,
                up: true,
                ..Default::default()
            };
            for word in words {
                match word {
                    "down" => link.up = false,
                    "lo" => link.loopback = true,
                    "l3" => link.ethernet = false,
                    "peer" => link.peer_elsewhere = true,
                    "default" => link.default_route = true,
                    "vlans" => link.vlan_filtering = true,
                    _ => match word.strip_prefix("master=") {
                        Some(master) => link.master = Some(master.parse().unwrap()),
                        None => {
                            let net: ipnet::IpNet = word.parse().unwrap();
                            link.addresses.push(Address {
                                ip: net.addr(),
                                prefix: net.prefix_len(),
                                usable: true,
                                assigned: true,
                                secondary: false,
                            });
                        }
                    },
                }
            }
            links.insert(index, link);
        }
        links
    }

    /// `name:role:source4`, space between.
    /// `facts`: internal addresses, and pod networks (those with a slash).
    fn shown(lines: &[&str], facts: &[&str], patterns: &[&str]) -> String {
        let facts = NodeFacts {
            internal_ips: facts.iter().filter_map(|ip| ip.parse().ok()).collect(),
            pod_cidrs: facts.iter().filter_map(|cidr| cidr.parse().ok()).collect(),
            ..Default::default()
        };
        let patterns = patterns.iter().map(|p| Pattern::new(p)).collect();
        show(&classify(&links(lines), &facts, &Options { patterns, ..Default::default() }))
    }

    fn show(devices: &Devices) -> String {
        let one = |d: &Device| {
            let l3 = if d.ethernet { "" } else { ":l3" };
            let source = d.source4.map(|s| s.to_string()).unwrap_or_else(|| "none".into());
            let behind = if d.behind { ":behind" } else { "" };
            format!("{}:{:?}:{source}{l3}{behind}", d.name, d.role)
        };
        devices.values().map(one).collect::<Vec<_>>().join(" ")
    }

    /// A72: what counts as a pod's, by name. Roles are as ever, so that packets go the same ways.
    #[test]
    fn local_by_name() {
        let lines = [
            "eth0 - default 192.168.0.1/24",
            "cni0 bridge 10.244.1.1/24",
            "veth1 veth peer master=2",
            "br1 bridge 192.168.9.1/24",
            "veth2 veth peer master=4",
            "eth1 - master=4",
            "cali1 veth peer",
            "tap0 unknown",
            "lo - lo 127.0.0.1/8",
        ];
        let by = |lines: &[&str], detect: &Detect| {
            let options = Options { detect: detect.clone(), ..Default::default() };
            classify(&links(lines), &NodeFacts::default(), &options)
        };
        let prefix = |text: &str| Detect::Prefix(text.into());
        for (detect, expected) in [
            (Detect::Roles, "veth1 veth2 cali1"),
            (Detect::Bridge("cni0".into()), "veth1"),
            // The uplink is not on the node, whatever it is a port of.
            (Detect::Bridge("br1".into()), "veth2"),
            (Detect::Bridge("absent".into()), ""),
            (prefix("cali"), "cali1"),
            (prefix("veth"), "veth1 veth2"),
            (prefix("cni"), "veth1"),
            // Nobody else knew that it is a pod's.
            (prefix("tap"), "tap0"),
            // Carries the node's address: named or not, that is what its role says.
            (prefix("eth0"), "eth0"),
        ] {
            let devices = by(&lines, &detect);
            let local: Vec<&str> = devices.values().filter(|d| d.local).map(|d| d.name.as_str()).collect();
            assert_eq!(local.join(" "), expected, "{detect:?}");
            let plain = by(&lines, &Detect::Roles);
            assert!(plain.iter().all(|(index, device)| devices[index].role == device.role), "{detect:?}");
        }
        let taps = by(&lines, &prefix("tap"));
        assert_eq!(taps.values().find(|d| d.name == "tap0").unwrap().role, DeviceRole::Pod);
        // A filtering bridge beside an uplink has a hook of its own, and what it passes up comes from there.
        let filtering = ["br1 bridge vlans default 192.168.9.1/24", "veth2 veth peer master=1", "eth1 - master=1"];
        let devices = by(&filtering, &Detect::Bridge("br1".into()));
        assert!(devices.values().all(|device| device.local), "{devices:?}");
    }

    #[test]
    fn roles_by_topology() {
        let cases: [(&str, &[&str], &[&str], &str); 18] = [
            (
                "routed pods (Calico): links without addresses",
                &["lo - lo 127.0.0.1/8", "eth0 - default 192.168.0.1/24", "cali1 veth peer", "cali2 netkit peer"],
                &[],
                "eth0:Outward:192.168.0.1 cali1:Pod:192.168.0.1 cali2:Pod:192.168.0.1",
            ),
            (
                "bridge CNI: the pods' links, not the bridge; its address masquerades",
                &["eth0 - default 192.168.0.1/24", "cni0 bridge 10.244.1.1/24", "veth1 veth peer master=2"],
                &[],
                "eth0:Outward:192.168.0.1 veth1:Pod:10.244.1.1",
            ),
            (
                "a bridge without pods yet",
                &["eth0 - default 192.168.0.1/24", "cni0 bridge 10.244.1.1/24"],
                &[],
                "eth0:Outward:192.168.0.1",
            ),
            (
                "a node that is a container: its eth0 is a veth, too",
                &["eth0 veth peer default 172.18.0.2/16", "veth1 veth peer 10.244.0.1/32"],
                &[],
                "eth0:Outward:172.18.0.2 veth1:Pod:10.244.0.1",
            ),
            (
                "such a node without a default route",
                &["eth0 veth peer 192.168.77.1/24", "veth1 veth peer"],
                &[],
                "eth0:Outward:192.168.77.1 veth1:Pod:192.168.77.1",
            ),
            (
                "the pod network tells a gateway's address with its network from a second uplink's",
                &[
                    "eth0 veth peer 192.168.77.1/24",
                    "eth1 veth peer 172.20.0.2/16",
                    "veth1 veth peer 10.244.0.1/24",
                    "eth2 veth peer 192.168.78.1/32",
                ],
                &["192.168.77.1", "192.168.78.1", "10.244.0.0/16"],
                "eth0:Outward:192.168.77.1 eth1:Outward:172.20.0.2 veth1:Pod:10.244.0.1 eth2:Outward:192.168.78.1",
            ),
            (
                "bond: the master, not its ports",
                &["eth0 - master=3", "eth1 - master=3", "bond0 bond default 192.168.0.1/24"],
                &[],
                "bond0:Outward:192.168.0.1",
            ),
            (
                "a bond in a node that is a container: its ports are no pods' links",
                &["eth0 veth peer master=2", "bond0 bond default 192.168.0.1/24", "veth1 veth peer"],
                &[],
                "bond0:Outward:192.168.0.1 veth1:Pod:192.168.0.1",
            ),
            (
                "VLAN on a bond",
                &["eth0 - master=2", "bond0 bond", "bond0.7 vlan default 192.168.7.1/24"],
                &[],
                "bond0.7:Outward:192.168.7.1",
            ),
            (
                "a bridge over the uplink has the node's address",
                &["eth0 - master=2", "br0 bridge default 192.168.0.1/24", "eth1 - 10.0.0.1/8"],
                &[],
                "br0:Outward:192.168.0.1 eth1:Outward:10.0.0.1",
            ),
            (
                "a bridge of uplink and pods: its ports, whose packets get the bridge's address",
                &[
                    "bond0 bond master=3",
                    "eth0 - master=1",
                    "br0 bridge default 192.168.0.1/24",
                    "vnet1 veth peer master=3",
                    "tap1 tun master=3",
                    "eth1 - 10.0.0.1/8",
                ],
                &[],
                "bond0:Outward:192.168.0.1 vnet1:Pod:192.168.0.1 tap1:Overlay:192.168.0.1 eth1:Outward:10.0.0.1",
            ),
            (
                "such a bridge that filters VLANs: its uplink may be tagged, so itself",
                &["eth0 - master=2", "br0 bridge vlans default 192.168.0.1/24", "vnet1 veth peer master=2"],
                &[],
                "br0:Outward:192.168.0.1:behind vnet1:Pod:192.168.0.1",
            ),
            (
                "pods and a tunnel on one bridge",
                &[
                    "eth0 - default 192.168.0.1/24",
                    "cni0 bridge 10.244.1.1/16",
                    "vxlan1 vxlan master=2",
                    "veth1 veth peer master=2",
                ],
                &[],
                "eth0:Outward:192.168.0.1 vxlan1:Overlay:10.244.1.1 veth1:Pod:10.244.1.1",
            ),
            (
                "overlays, with and without link headers; one that is down",
                &[
                    "eth0 - default 192.168.0.1/24",
                    "flannel.1 vxlan 10.244.1.0/32",
                    "wg0 wireguard l3",
                    "tunl0 ipip l3 down",
                ],
                &[],
                "eth0:Outward:192.168.0.1 flannel.1:Overlay:10.244.1.0 wg0:Overlay:192.168.0.1:l3",
            ),
            (
                "local veth pair, dummies, idle hardware",
                &["eth0 - default 192.168.0.1/24", "a veth", "b veth", "kube-ipvs0 dummy 10.96.0.1/32", "eth1 -"],
                &[],
                "eth0:Outward:192.168.0.1",
            ),
            (
                "VRF: its port, not itself",
                &["eth0 - master=2 192.168.0.1/24", "red vrf l3", "eth1 - default 10.0.0.1/8"],
                &[],
                "eth0:Outward:192.168.0.1 eth1:Outward:10.0.0.1",
            ),
            (
                "two uplinks, the second without a route",
                &["eth0 - default 192.168.0.1/24", "eth1 - 10.0.0.1/8"],
                &[],
                "eth0:Outward:192.168.0.1 eth1:Outward:10.0.0.1",
            ),
            ("no address anywhere", &["eth0 - default", "veth1 veth peer"], &[], "eth0:Outward:none veth1:Pod:none"),
        ];
        for (case, lines, node_ips, expected) in cases {
            assert_eq!(shown(lines, node_ips, &[]), expected, "{case}");
        }
    }

    #[test]
    fn where_xdp_is_no_use_is_said() {
        let mut links = links(&[
            "eth0 - default 192.168.0.1/24",
            "eth1 - 10.0.0.1/8",
            "eth1.5 vlan 172.16.0.1/16",
            "bond0 bond 172.17.0.1/16",
            "eth2 - master=4",
            "eth3 veth 172.18.0.1/16",
            "veth1 veth peer",
        ]);
        links.get_mut(&3).unwrap().lower = Some(2);
        // Of a veth it is the other end, here or elsewhere: its number means nothing.
        links.get_mut(&7).unwrap().lower = Some(1);
        links.get_mut(&1).unwrap().mac = Some([2, 0, 0, 0, 0, 1]);
        let devices = classify(&links, &NodeFacts::default(), &Options::default());
        let reason = |index: u32| devices[&index].without_xdp.unwrap_or_default();
        assert_eq!([reason(1), reason(3), reason(6)], [""; 3]);
        assert!(reason(2).contains("VLANs are on it") && reason(4).contains("ports"), "{devices:?}");
        assert_eq!((devices[&1].mac, devices[&1].veth, devices[&6].veth), (Some([2, 0, 0, 0, 0, 1]), false, true));
    }

    #[test]
    fn patterns_narrow() {
        let lines = ["eth0 - default 192.168.0.1/24", "eth1 - 10.0.0.1/8", "cali1 veth peer", "lxc1 veth peer"];
        let names = |patterns: &[&str]| {
            shown(&lines, &[], patterns).split(' ').map(|d| d.split(':').next().unwrap().to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(names(&["eth*", "cali*"]), ["eth0", "eth1", "cali1"]);
        assert_eq!(names(&["!eth1"]), ["eth0", "cali1", "lxc1"]);
        assert_eq!(names(&["*", "!lxc?"]), ["eth0", "eth1", "cali1"]);
        assert_eq!(names(&["eth?", "!*0"]), ["eth1"]);
        // A bridge stands in for a port that is excluded.
        let lines = ["eth0 - master=2", "br0 bridge default 192.168.0.1/24", "vnet1 veth peer master=2"];
        for (patterns, expected) in [
            (&[][..], "eth0:Outward:192.168.0.1 vnet1:Pod:192.168.0.1"),
            (&["!eth0"], "br0:Outward:192.168.0.1:behind vnet1:Pod:192.168.0.1"),
            (&["br0", "vnet*"], "br0:Outward:192.168.0.1:behind vnet1:Pod:192.168.0.1"),
        ] {
            assert_eq!(shown(&lines, &[], patterns), expected, "{patterns:?}");
        }
    }

    #[test]
    fn own_addresses_are_those_the_kernel_answers_for() {
        let mut links = links(&[
            "lo - lo 127.0.0.1/8 203.0.113.9/32",
            "eth0 - default 192.168.0.1/24 fd00::1/64",
            "nodelocaldns dummy 169.254.20.10/32",
            "kube-ipvs0 dummy 10.96.0.1/32",
            "cni0 bridge 10.244.1.1/24 fe80::1/64",
            "veth1 veth peer fe80::2/64",
            "kube-dummy-if dummy 10.96.0.2/32",
            "proxy-ipvs0 dummy 10.96.0.3/32",
        ]);
        links.get_mut(&2).unwrap().addresses[1].assigned = false;
        links.get_mut(&5).unwrap().addresses[0].usable = false;
        let own: Vec<String> = own_addresses(&links).iter().map(ToString::to_string).collect();
        assert_eq!(own, ["10.244.1.1", "127.0.0.1", "169.254.20.10", "192.168.0.1", "203.0.113.9"]);
    }

    /// A node that is a container, with its only way out in a bridge: nothing tells that veth from a pod's but its name.
    #[test]
    fn an_uplink_that_looks_like_a_pods_link_is_named() {
        let lines = links(&["br0 bridge default 172.18.0.2/16", "out0 veth peer master=1", "veth1 veth peer master=1"]);
        let none = Options::default();
        let uplinks = |text: &str| Options { uplinks: vec![Pattern::new(text)], ..Default::default() };
        let shown = |options: &Options| -> Vec<String> {
            let devices = classify(&lines, &NodeFacts::default(), options);
            devices
                .values()
                .map(|d| format!("{}:{:?}{}", d.name, d.role, if d.behind { ":behind" } else { "" }))
                .collect()
        };
        assert_eq!(shown(&none), ["br0:Outward:behind", "out0:Pod", "veth1:Pod"]);
        let named = uplinks("out*");
        assert_eq!(shown(&named), ["out0:Outward", "veth1:Pod"]);
        assert_eq!(shown(&uplinks("!veth*")), ["out0:Outward", "veth1:Pod"], "all but these");
        let ports = vec!["out0".to_owned(), "veth1".to_owned()];
        assert_eq!(without_uplink(&lines, &none), [("br0".to_owned(), ports)].into());
        assert_eq!(without_uplink(&lines, &named), BTreeMap::new());
        // One that a device of another kind leads out of, and one of pods alone.
        let lines = links(&[
            "br0 bridge default 172.18.0.2/16",
            "eth0 - master=1",
            "veth1 veth peer master=1",
            "cni0 bridge 10.0.0.1/24",
            "veth2 veth peer master=4",
        ]);
        assert_eq!(without_uplink(&lines, &none), BTreeMap::new());
    }

    #[test]
    fn secondary_addresses_come_last() {
        let mut links = links(&["eth0 - default 192.168.0.9/24 192.168.0.1/24"]);
        links.get_mut(&1).unwrap().addresses[0].secondary = true;
        let devices = classify(&links, &NodeFacts::default(), &Options::default());
        assert_eq!(devices[&1].source4, Some([192, 168, 0, 1].into()));
    }
}
