//! Links, addresses and routes of every shape.
//!
//! | network | IPv4 | IPv6 |
//! |---|---|---|
//! | underlay | 192.168.77.0/24 (node N: .N, sink .254, outside .100) | fd00:77::/64 (::N, ::fe, ::100) |
//! | outside, by tunnel | 192.168.78.100 | fd00:78::100 |
//! | pods of node N | 10.244.N.0/24, from .10 | fd00:244:N::/64, from ::a |
//! | Services | 10.96.0.0/16 | fd00:96::/112 |
//! | load balancers and external IPs | 203.0.113.0/24 | 2001:db8:203::/112 |

use std::{
    collections::BTreeMap,
    fmt::Write,
    fs,
    net::{Ipv4Addr, Ipv6Addr},
    path::Path,
};

use anyhow::{Context, Result};

use super::{
    EXTERNAL_CIDR_V4, EXTERNAL_CIDR_V6, Namespace, Node, Place, SERVICE_CIDR_V4, SERVICE_CIDR_V6, Spec, Topology,
    layout::Layout, tunnel::Tunnel,
};

pub(super) struct Built {
    pub(super) nodes: Vec<Node>,
    pub(super) pods: BTreeMap<String, Place>,
    pub(super) outside: Place,
    pub(super) sink: Namespace,
    pub(super) underlay: Namespace,
    pub(super) tunnels: Vec<Tunnel>,
}

/// The gateway of routed pods, as Calico has it: the node's end of the link answers for it by proxy ARP.
const GATEWAY4: &str = "169.254.1.1";
const GATEWAY6: &str = "fe80::1";
const GATEWAY_MAC: &str = "ee:ee:ee:ee:ee:ee";

pub(super) fn build(spec: &Spec, layout: &Layout) -> Result<Built> {
    let underlay = Namespace::create(&layout.namespace("underlay"))?;
    // Without snooping neighbour discovery needs no querier.
    underlay.ip("link add under type bridge stp_state 0 mcast_snooping 0\nlink set under up\n")?;
    let sink = build_sink(&underlay, layout)?;
    let mut nodes = Vec::new();
    let mut pods = BTreeMap::new();
    for (number, names) in (1u8..).zip(&spec.nodes) {
        let node = build_node(spec, number, &underlay, layout)?;
        for (i, name) in (0u8..).zip(names) {
            pods.insert(name.clone(), build_pod(spec.topology, &node, number, i, name, layout)?);
        }
        nodes.push(node);
    }
    let outside = build_outside(&underlay, layout)?;
    let tunnels = if spec.topology == Topology::Tun { build_tunnels(&nodes, &outside)? } else { Vec::new() };
    if spec.software_checksums {
        compute_checksums(spec, &nodes, &pods, &outside)?;
    }
    if spec.for_xdp {
        ready_for_xdp(&nodes, &pods, &outside, &underlay)?;
    }
    Ok(Built { nodes, pods, outside, sink, underlay, tunnels })
}

/// Between each two nodes, and from outside to node1: what goes to pods elsewhere and to Services takes them.
fn build_tunnels(nodes: &[Node], outside: &Place) -> Result<Vec<Tunnel>> {
    let mut tunnels = Vec::new();
    let mut numbered: Vec<(u8, &Namespace)> = (1..).zip(nodes.iter().map(|node| &node.place.namespace)).collect();
    let Some(&entry) = numbered.first() else { return Ok(tunnels) };
    while let Some((number, here)) = numbered.pop() {
        for &(other, there) in &numbered {
            tunnels.push(Tunnel::between([(here, &format!("tun{other}")), (there, &format!("tun{number}"))])?);
            for (from, to) in [((number, here), other), ((other, there), number)] {
                let (_, namespace) = from;
                namespace.ip(&format!(
                    "link set tun{to} up\n\
                     route add 10.244.{to}.0/24 dev tun{to}\n\
                     route add fd00:244:{to}::/64 dev tun{to}\n"
                ))?;
            }
        }
    }
    tunnels.push(Tunnel::between([(&outside.namespace, "tun1"), (entry.1, "tun0")])?);
    outside.namespace.ip(&format!(
        "link set tun1 up\n\
         addr add {TUNNEL4}/32 dev tun1\n\
         addr add {TUNNEL6}/128 dev tun1 nodad\n\
         route replace {SERVICE_CIDR_V4} dev tun1 src {TUNNEL4}\n\
         route replace {SERVICE_CIDR_V6} dev tun1 src {TUNNEL6} metric 1\n\
         route replace {EXTERNAL_CIDR_V4} dev tun1 src {TUNNEL4}\n\
         route replace {EXTERNAL_CIDR_V6} dev tun1 src {TUNNEL6} metric 1\n"
    ))?;
    entry.1.ip(&format!(
        "link set tun0 up\n\
         route add {TUNNEL4}/32 dev tun0\n\
         route add {TUNNEL6}/128 dev tun0\n"
    ))?;
    Ok(tunnels)
}

/// Every other pod and the client outside send whole checksums, and the nodes' ends of pod links complete those that others
/// leave to the hardware: so that a wrong one, made by whatever rewrote it, does not stay unseen on a link that never looks.
fn compute_checksums(spec: &Spec, nodes: &[Node], pods: &BTreeMap<String, Place>, outside: &Place) -> Result<()> {
    let off = |namespace: &Namespace, device: &str| namespace.output("ethtool", &["-K", device, "tx", "off"]).map(drop);
    off(&outside.namespace, "eth0")?;
    for (node, names) in nodes.iter().zip(&spec.nodes) {
        for name in names {
            off(&node.place.namespace, &pod_link(spec.topology, name))?;
        }
        for pod in names.iter().skip(1).filter_map(|name| pods.get(name)) {
            off(&pod.namespace, "eth0")?;
        }
    }
    Ok(())
}

/// A veth hands over what a socket left for the hardware to do, which XDP leaves to the stack; and it takes frames from XDP only if its other
/// end polls.
fn ready_for_xdp(nodes: &[Node], pods: &BTreeMap<String, Place>, outside: &Place, underlay: &Namespace) -> Result<()> {
    let senders = nodes.iter().map(|node| &node.place).chain(pods.values()).chain([outside]);
    for place in senders {
        place.namespace.output("ethtool", &["-K", "eth0", "tx", "off"])?;
    }
    let ports = underlay.output("ip", &["-o", "link", "show", "master", "under"])?;
    for port in ports.lines().filter_map(|line| line.split(": ").nth(1)?.split('@').next()) {
        // What it has merged it cuts up again, and would leave the sums of the pieces to the hardware.
        underlay.output("ethtool", &["-K", port, "gro", "on", "tx", "off"])?;
    }
    Ok(())
}

/// A link from `namespace` (as `eth0`) to the underlay's bridge, and its addresses.
fn plug(underlay: &Namespace, namespace: &Namespace, port: &str, host: u16) -> Result<()> {
    underlay.ip(&format!(
        "link add {port} type veth peer name eth0 netns {}\n\
         link set {port} master under\n\
         link set {port} up\n",
        namespace.name()
    ))?;
    let v6 = underlay6(host);
    let v4 = underlay4(host);
    namespace.ip(&format!(
        "link set eth0 up\n\
         addr add {v4}/24 dev eth0\n\
         addr add {v6}/64 dev eth0 nodad\n"
    ))
}

/// A port of the node's bridge `cni0` (as `eth0`) to the underlay's bridge. No veth, which would be a pod's link to all appearance:
/// the whole of another device, as macvlan gives it.
fn plug_bridge(underlay: &Namespace, namespace: &Namespace, port: &str) -> Result<()> {
    underlay.ip(&format!(
        "link add {port} type veth peer name {port}-m\n\
         link set {port} master under\n\
         link set {port} up\n\
         link set {port}-m up\n\
         link add link {port}-m name eth0 netns {} type macvlan mode passthru\n",
        namespace.name()
    ))?;
    namespace.ip("link set eth0 master cni0\nlink set eth0 up\n")
}

fn underlay4(host: u16) -> Ipv4Addr {
    Ipv4Addr::new(192, 168, 77, u8::try_from(host).unwrap_or(u8::MAX))
}

/// The same digits as in the IPv4 address, for readers of dumps.
fn underlay6(host: u16) -> Ipv6Addr {
    let digits = u16::from_str_radix(&host.to_string(), 16).unwrap_or(host);
    Ipv6Addr::new(0xfd00, 0x77, 0, 0, 0, 0, 0, digits)
}

fn pod4(node: u8, i: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 244, node, 10 + i)
}

fn pod6(node: u8, i: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0x244, node.into(), 0, 0, 0, 0, 10 + u16::from(i))
}

/// The client outside on its own end of a tunnel.
const TUNNEL4: Ipv4Addr = Ipv4Addr::new(192, 168, 78, 100);
const TUNNEL6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x78, 0, 0, 0, 0, 0, 0x100);

const SINK: u16 = 254;
const OUTSIDE: u16 = 100;

/// Takes what nobody else routes, and remembers what was meant for a Service. It forwards nothing.
fn build_sink(underlay: &Namespace, layout: &Layout) -> Result<Namespace> {
    let sink = Namespace::create(&layout.namespace("sink"))?;
    plug(underlay, &sink, "to-sink", SINK)?;
    sink.nft(&format!(
        "table inet sink {{
            set leaks4 {{ type ipv4_addr . ipv4_addr . inet_proto; flags dynamic; size 4096; }}
            set leaks6 {{ type ipv6_addr . ipv6_addr . inet_proto; flags dynamic; size 4096; }}
            chain incoming {{
                type filter hook prerouting priority raw;
                ip daddr {{ {SERVICE_CIDR_V4}, {EXTERNAL_CIDR_V4} }} add @leaks4 {{ ip saddr . ip daddr . meta l4proto }} drop
                ip6 daddr {{ {SERVICE_CIDR_V6}, {EXTERNAL_CIDR_V6} }} add @leaks6 {{ ip6 saddr . ip6 daddr . meta l4proto }} drop
            }}
        }}"
    ))?;
    Ok(sink)
}

/// What flannel's `--ip-masq` does: pods leave the pod network under their node's address. So this topology also runs with
/// the kernel's connection tracking on, and with a firewall that drops what that tracking does not understand.
const FLANNEL: &str = "
    table inet flannel {
        chain postrouting {
            type nat hook postrouting priority srcnat;
            ip saddr 10.244.0.0/16 ip daddr != { 10.244.0.0/16, 224.0.0.0/4 } masquerade
            ip6 saddr fd00:244::/32 ip6 daddr != { fd00:244::/32, ff00::/8 } masquerade
        }
        chain forward {
            type filter hook forward priority filter;
            ct state invalid drop
        }
    }";

/// A host of the underlay that knows the Services' networks and those of load balancers, by way of node1, and nothing else of the cluster (contract A51).
fn build_outside(underlay: &Namespace, layout: &Layout) -> Result<Place> {
    let namespace = Namespace::create(&layout.namespace("outside"))?;
    plug(underlay, &namespace, "to-outside", OUTSIDE)?;
    let (entry4, entry6) = (underlay4(1), underlay6(1));
    namespace.ip(&format!(
        "route add {SERVICE_CIDR_V4} via {entry4}\n\
         route add {SERVICE_CIDR_V6} via {entry6}\n\
         route add {EXTERNAL_CIDR_V4} via {entry4}\n\
         route add {EXTERNAL_CIDR_V6} via {entry6}\n"
    ))?;
    let cgroup = make_cgroup(&layout.cgroups().join("outside"))?;
    Ok(Place {
        name: "outside".to_owned(),
        node: None,
        v4: underlay4(OUTSIDE),
        v6: underlay6(OUTSIDE),
        namespace,
        cgroup,
    })
}

fn make_cgroup(path: &Path) -> Result<std::path::PathBuf> {
    fs::create_dir_all(path).with_context(|| format!("make the cgroup {}", path.display()))?;
    Ok(path.to_owned())
}

fn build_node(spec: &Spec, number: u8, underlay: &Namespace, layout: &Layout) -> Result<Node> {
    let name = format!("node{number}");
    let host = u16::from(number);
    let namespace = Namespace::create(&layout.namespace(&name))?;
    let rp_filter = if spec.rp_filter { "1" } else { "0" };
    namespace.sysctl(&[
        ("ipv4/ip_forward", "1"),
        ("ipv6/conf/all/forwarding", "1"),
        ("ipv6/conf/default/forwarding", "1"),
        // Cases are refused more often than a node's kernel would say so by default.
        ("ipv4/icmp_ratelimit", "0"),
        ("ipv6/icmp/ratelimit", "0"),
        ("ipv4/conf/all/rp_filter", rp_filter),
        ("ipv4/conf/default/rp_filter", rp_filter),
    ])?;
    let port = format!("to-{name}");
    if spec.topology == Topology::Uplink {
        // Traffic of pods leaves by the device that it came in by: no news to them.
        namespace.sysctl(&[("ipv4/conf/all/send_redirects", "0"), ("ipv4/conf/default/send_redirects", "0")])?;
    } else {
        plug(underlay, &namespace, &port, host)?;
    }
    let mut script = String::new();
    let others = (1u8..).take(spec.nodes.len()).filter(|&other| other != number);
    let mut fdb = String::new();
    if !matches!(spec.topology, Topology::Routed | Topology::Tun) {
        writeln!(
            script,
            "link add cni0 address 0a:58:0a:f4:{number:02x}:01 type bridge stp_state 0 mcast_snooping 0\n\
             link set cni0 up\n\
             addr add 10.244.{number}.1/24 dev cni0\n\
             addr add fd00:244:{number}::1/64 dev cni0 nodad"
        )?;
    }
    if spec.topology == Topology::Uplink {
        writeln!(script, "addr add {}/24 dev cni0\naddr add {}/64 dev cni0 nodad", underlay4(host), underlay6(host))?;
    }
    writeln!(script, "route add default via {}\nroute add default via {}", underlay4(SINK), underlay6(SINK))?;
    if spec.topology == Topology::Vxlan {
        writeln!(
            script,
            "link add flannel.1 address 02:77:00:00:00:{number:02x} type vxlan id 1 local {} dev eth0 dstport 8472 nolearning\n\
             link set flannel.1 mtu 1450 up\n\
             addr add 10.244.{number}.0/32 dev flannel.1\n\
             addr add fd00:244:{number}::/128 dev flannel.1 nodad\n\
             link set cni0 mtu 1450",
            underlay4(host)
        )?;
    }
    for other in others {
        let remote = u16::from(other);
        if spec.topology == Topology::Vxlan {
            writeln!(
                script,
                "neigh add 10.244.{other}.0 lladdr 02:77:00:00:00:{other:02x} dev flannel.1 nud permanent\n\
                 neigh add fd00:244:{other}:: lladdr 02:77:00:00:00:{other:02x} dev flannel.1 nud permanent\n\
                 route add 10.244.{other}.0/24 via 10.244.{other}.0 dev flannel.1 onlink\n\
                 route add fd00:244:{other}::/64 via fd00:244:{other}:: dev flannel.1 onlink"
            )?;
            writeln!(fdb, "fdb append 02:77:00:00:00:{other:02x} dev flannel.1 dst {}", underlay4(remote))?;
        } else if spec.topology != Topology::Tun {
            writeln!(
                script,
                "route add 10.244.{other}.0/24 via {}\n\
                 route add fd00:244:{other}::/64 via {}",
                underlay4(remote),
                underlay6(remote)
            )?;
        }
    }
    namespace.ip(&script)?;
    if spec.topology == Topology::Uplink {
        plug_bridge(underlay, &namespace, &port)?;
    }
    if !fdb.is_empty() {
        namespace.bridge(&fdb)?;
    }
    if spec.topology == Topology::Vxlan {
        namespace.nft(FLANNEL)?;
    }
    let cgroup = make_cgroup(&layout.cgroups().join(&name))?;
    let host_cgroup = make_cgroup(&cgroup.join("host"))?;
    let bpffs = layout.bpffs().join(&name);
    // Private, as the agent requires of a directory that it pins programs in.
    fs::create_dir(&bpffs).with_context(|| format!("make {}", bpffs.display()))?;
    fs::set_permissions(&bpffs, std::os::unix::fs::PermissionsExt::from_mode(0o700))?;
    let place = Place {
        name,
        node: Some(number.into()),
        v4: underlay4(host),
        v6: underlay6(host),
        namespace,
        cgroup: host_cgroup,
    };
    Ok(Node { place, cgroup, bpffs, agent: None })
}

pub(super) fn build_pod(
    topology: Topology,
    node: &Node,
    number: u8,
    i: u8,
    name: &str,
    layout: &Layout,
) -> Result<Place> {
    let namespace = Namespace::create(&layout.namespace(name))?;
    let (v4, v6) = (pod4(number, i), pod6(number, i));
    let host = &node.place.namespace;
    let (inside, netns) = (&namespace, namespace.name());
    if matches!(topology, Topology::Routed | Topology::Tun) {
        let link = format!("cali{name}");
        // No link-local address but the gateway's: all node ends of pod links have the same MAC.
        host.ip(&format!(
            "link add {link} type veth peer name eth0 netns {netns}\n\
             link set {link} addrgenmode none\n\
             link set {link} address {GATEWAY_MAC}\n\
             link set {link} up\n\
             addr add {GATEWAY6}/64 dev {link} nodad\n\
             route add {v4}/32 dev {link} scope link\n\
             route add {v6}/128 dev {link}\n"
        ))?;
        // Proxy ARP answers after a random delay by default.
        host.sysctl(&[
            (&format!("ipv4/conf/{link}/proxy_arp"), "1"),
            (&format!("ipv4/neigh/{link}/proxy_delay"), "0"),
        ])?;
        inside.ip(&format!(
            "link set eth0 up\n\
             addr add {v4}/32 dev eth0\n\
             addr add {v6}/128 dev eth0 nodad\n\
             route add {GATEWAY4}/32 dev eth0 scope link\n\
             route add default via {GATEWAY4} dev eth0\n\
             route add default via {GATEWAY6} dev eth0\n"
        ))?;
    } else {
        let link = format!("veth{name}");
        let mtu = if topology == Topology::Vxlan { 1450 } else { 1500 };
        // kubeadm's flannel turns hairpin on, the bridge plugin's default is off.
        let hairpin = if topology == Topology::Vxlan { "on" } else { "off" };
        host.ip(&format!(
            "link add {link} mtu {mtu} type veth peer name eth0 mtu {mtu} netns {netns}\n\
             link set {link} master cni0\n\
             link set {link} type bridge_slave hairpin {hairpin}\n\
             link set {link} up\n"
        ))?;
        inside.ip(&format!(
            "link set eth0 up\n\
             addr add {v4}/24 dev eth0\n\
             addr add {v6}/64 dev eth0 nodad\n\
             route add default via 10.244.{number}.1\n\
             route add default via fd00:244:{number}::1\n"
        ))?;
    }
    // As kubelets name them, one way or the other; containers are below.
    let uid = super::objects::pod_uid(name);
    let cgroup = if i.is_multiple_of(2) {
        node.cgroup.join(format!("kubepods.slice/kubepods-pod{}.slice", uid.replace('-', "_")))
    } else {
        node.cgroup.join(format!("kubepods/burstable/pod{uid}"))
    };
    let cgroup = make_cgroup(&cgroup.join("container"))?;
    Ok(Place { name: name.to_owned(), node: Some(number.into()), v4, v6, namespace, cgroup })
}

/// Name of the node's end of a pod's link.
pub(super) fn pod_link(topology: Topology, pod: &str) -> String {
    match topology {
        Topology::Routed | Topology::Tun => format!("cali{pod}"),
        Topology::Bridge | Topology::Vxlan | Topology::Uplink => format!("veth{pod}"),
    }
}
