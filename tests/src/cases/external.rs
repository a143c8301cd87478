//! What leads to a Service beside its ClusterIP: NodePorts, load balancers' addresses, external IPs, and the policy on them.
//!
//! Every Service here has `b1` on node1 and `b2` on node2 behind it, unless it says otherwise, and answers on TCP 80, UDP 53 and SCTP 38412;
//! on the nodes on NodePorts of its own.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::{
    Case, Ground,
    packets::{self, Narrow},
};
use crate::{
    pod::{hold, socket::Transport},
    suite::Suite,
    world::{
        Ask, EXTERNAL_CIDR_V4, EXTERNAL_CIDR_V6, Fallback, Family, Place, World, external,
        objects::{self, Service},
        patience, vip, vip4, vip6,
    },
};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
enum Ext {
    /// External policy Cluster
    Open = 101,
    /// External policy Local
    Local,
    /// External policy Local; `b2` only: none on node1
    Elsewhere,
    /// Nobody
    Empty,
    /// Internal policy Local, which means nothing here
    Internal,
    /// A load balancer, no node ports
    NoNodePorts,
    /// External IPs that are addresses of node1: one on the port that its own server has, one on another
    Own,
    /// Whoever asks it: `a1`
    Hairpin,
    /// `node1`, `node2`: host-network endpoints; external policy Local
    Host,
    /// `b2` only; external policy Cluster
    Remote,
}

impl Ext {
    const ALL: [Self; 10] = [
        Self::Open,
        Self::Local,
        Self::Elsewhere,
        Self::Empty,
        Self::Internal,
        Self::NoNodePorts,
        Self::Own,
        Self::Hairpin,
        Self::Host,
        Self::Remote,
    ];

    /// 1, 2, …
    fn number(self) -> u8 {
        self as u8 - 100
    }

    fn node_port(self, transport: Transport) -> u16 {
        let of_transport = match transport {
            Transport::Tcp | Transport::Ping => 0,
            Transport::Udp | Transport::UdpUnconnected => 1,
            Transport::Sctp => 2,
        };
        30_000 + 10 * u16::from(self.number()) + of_transport
    }

    fn port(transport: Transport) -> u16 {
        match transport {
            Transport::Tcp | Transport::Ping => 80,
            Transport::Udp | Transport::UdpUnconnected => 53,
            Transport::Sctp => 38_412,
        }
    }

    fn at_node(self, node: &Place, family: Family, transport: Transport) -> SocketAddr {
        node.at(family, self.node_port(transport))
    }

    fn at_load_balancer(self, family: Family, transport: Transport) -> SocketAddr {
        SocketAddr::new(external(family, self.number()), Self::port(transport))
    }

    fn at_external_ip(self, family: Family, transport: Transport) -> SocketAddr {
        SocketAddr::new(external(family, 100 + self.number()), Self::port(transport))
    }

    /// All ways to it from somewhere that node1 serves.
    fn ways(self, world: &World, family: Family, transport: Transport) -> [SocketAddr; 3] {
        let node = &world.node(1).place;
        [
            self.at_node(node, family, transport),
            self.at_load_balancer(family, transport),
            self.at_external_ip(family, transport),
        ]
    }

    fn service(self, world: &World) -> Service {
        let service = objects::service(&format!("ext-{self:?}").to_lowercase())
            .cluster_ips(&[vip4(self as u8), vip6(self as u8)]);
        let ips = |n| Family::BOTH.map(|family| external(family, n));
        let node = &world.node(1).place;
        match self {
            Self::Own => service
                .port("web", "TCP", 8080)
                .port("dns", "UDP", 8080)
                .external_ips(&[node.v4.into(), node.v6.into()]),
            Self::NoNodePorts => {
                service.port("web", "TCP", 80).port("dns", "UDP", 53).load_balancer(&ips(self.number()))
            }
            _ => {
                let service = service
                    .port("web", "TCP", 80)
                    .node_port(self.node_port(Transport::Tcp))
                    .port("dns", "UDP", 53)
                    .node_port(self.node_port(Transport::Udp))
                    .port("ngap", "SCTP", 38_412)
                    .node_port(self.node_port(Transport::Sctp))
                    .load_balancer(&ips(self.number()))
                    .external_ips(&ips(100 + self.number()));
                match self {
                    Self::Local | Self::Elsewhere | Self::Host => service.external_local(),
                    Self::Internal => service.local(),
                    _ => service,
                }
            }
        }
    }

    fn objects(self, world: &World) -> Vec<Value> {
        let name = format!("ext-{self:?}").to_lowercase();
        let slices = Family::BOTH.map(|family| {
            let slice = objects::slice(&name, family)
                .port("web", "TCP", 8080)
                .port("dns", "UDP", 8080)
                .port("ngap", "SCTP", 8080);
            let slice = match self {
                Self::Empty => slice,
                Self::Elsewhere | Self::Own | Self::Remote => slice.endpoint(world.pod("b2")),
                Self::Hairpin => slice.endpoint(world.pod("a1")),
                Self::Host => slice.endpoint(&world.node(1).place).endpoint(&world.node(2).place),
                _ => slice.endpoint(world.pod("b1")).endpoint(world.pod("b2")),
            };
            slice.json()
        });
        [self.service(world).json()].into_iter().chain(slices).collect()
    }
}

/// At node1, from outside: what leads to an endpoint here and to one on node2.
pub fn at_node_port(world: &World, family: Family, transport: Transport) -> SocketAddr {
    Ext::Open.at_node(&world.node(1).place, family, transport)
}

/// From outside, at node1's node port to a backend on node2 past a link that is narrow behind node2.
pub fn remote_path_mtu(ground: &Ground<'_>, family: Family) -> Result<()> {
    let narrow = Narrow::ToBackend;
    let [node_port, _] = remote(ground.world, family);
    packets::narrowed(ground.world, narrow, || packets::learns(ground, ground.world.outside(), node_port, narrow))
}

/// Nodes, Services and slices.
pub fn objects(world: &World) -> Vec<Value> {
    objects::nodes(world).into_iter().chain(Ext::ALL.iter().flat_map(|ext| ext.objects(world))).collect()
}

const CASES: [Case; 22] = [
    ("A64 A77: policy Cluster, all endpoints", open),
    ("A66 A67 A77: policy Local, from pod and node all endpoints", local_inside),
    ("A65 A77: policy Local, from outside local endpoints with the true source", local_outside),
    ("A84: policy Local without local endpoints, silence outside, service inside", elsewhere),
    ("A65: a pod of another node is outside at this node's address", other_node),
    ("A77: internal policy Local means nothing here", internal),
    ("A81 A56: no endpoints, refused", empty),
    ("A70: a pod reaches itself through every address of its Service", hairpin),
    ("A54: 127.0.0.1 from the node's own processes, nobody else's", localhost),
    ("A59: a load balancer without node ports", no_node_ports),
    ("A57: an external IP of the node itself stays the node's, and that is said", own),
    ("other ports of the node's addresses are the node's own", untouched),
    ("A51 A65: host-network endpoints", host_network),
    ("A62: fragmented datagrams", fragments),
    ("A62 F41: the first fragment comes last", disorder),
    ("F43: path MTU is found, both ways, from either node", path_mtu),
    (REUSED, reused),
    ("A127 A52: NodePorts follow the node's addresses", addresses_change),
    ("sockets see the address they asked", names),
    ("A61: SCTP: every way in, masqueraded and by policy Local", sctp),
    (FORGED, forged),
    (MAGLEV, maglev),
];

const FORGED: &str = "F51: from loopback and from a VIP nothing is served, nor at loopback from outside";

const REUSED: &str = "F49: a port that is used again: chosen anew once it was closed, kept while it is open";

const MAGLEV: &str = "Maglev: every node leads a client's port to the same backend";

/// Every case, under names that begin with `group`. On 127.0.0.1 IPVS serves nobody. What is forged is the kernel's to drop where it translates, and Maglev eBPF's
/// own.
pub fn all(suite: &mut Suite, group: &str, ground: &Ground<'_>) {
    let held = |(name, _): &Case| ground.fallback != Some(Fallback::Ipvs) || !name.contains("127.0.0.1");
    let by_ebpf = |(name, _): &Case| ground.fallback.is_none() || ![FORGED, REUSED, MAGLEV].contains(name);
    super::each(suite, group, ground, CASES.into_iter().filter(held).filter(by_ebpf));
}

/// Asks often; exactly these must answer, each having seen one of `sources`.
fn served(
    ground: &Ground<'_>,
    from: &Place,
    (to, transport): (SocketAddr, Transport),
    backends: &[&str],
    sources: &BTreeSet<IpAddr>,
) -> Result<()> {
    // With 30 tries a backend of two is missed once in 10^9 runs.
    let count = if backends.len() > 1 { 30 } else { 4 };
    let what = format!("{} -> {to} {transport}", from.name);
    let report = ground.answered(from, &Ask::new(to, transport).times(count))?;
    let seen: BTreeSet<String> = report.backends().into_keys().collect();
    let expected: BTreeSet<String> = backends.iter().map(|&backend| backend.to_owned()).collect();
    ensure!(seen == expected, "{what}: answered by {:?}, expected {expected:?}", report.backends());
    for one in &report.tries {
        let peer: SocketAddr = one.answer.as_ref().context("no answer")?.peer.parse()?;
        ensure!(sources.contains(&peer.ip()), "{what}: the backend saw {peer}, expected one of {sources:?}");
    }
    Ok(())
}

/// By every transport and family, on every way to `ext`.
fn served_everywhere(ground: &Ground<'_>, from: &Place, ext: Ext, backends: &[&str], masqueraded: bool) -> Result<()> {
    for family in Family::BOTH {
        let sources = sources(ground, from, family, masqueraded)?;
        for transport in Transport::ALL {
            for to in ext.ways(ground.world, family, transport) {
                served(ground, from, (to, transport), backends, &sources)?;
            }
        }
    }
    Ok(())
}

/// What a backend sees of `from`. Who is translated at connect time needs no masquerade: its own address gets there.
fn sources(ground: &Ground<'_>, from: &Place, family: Family, masqueraded: bool) -> Result<BTreeSet<IpAddr>> {
    match from.node {
        Some(number) if from.is_node() => ground.world.node_addresses(number),
        Some(number) if masqueraded && ground.per_packet(from) => ground.world.node_addresses(number),
        None if masqueraded => ground.world.node_addresses(1),
        _ => Ok(BTreeSet::from([from.ip(family)])),
    }
}

fn open(ground: &Ground<'_>) -> Result<()> {
    for from in ground.origins() {
        served_everywhere(ground, from, Ext::Open, &["b1", "b2"], true)?;
    }
    Ok(())
}

fn local_inside(ground: &Ground<'_>) -> Result<()> {
    for from in [ground.world.pod("a1"), &ground.world.node(1).place] {
        served_everywhere(ground, from, Ext::Local, &["b1", "b2"], false)?;
    }
    Ok(())
}

fn local_outside(ground: &Ground<'_>) -> Result<()> {
    served_everywhere(ground, ground.world.outside(), Ext::Local, &["b1"], false)?;
    // node2 has another one; nobody else's addresses lead there.
    let outside = ground.world.outside();
    for family in Family::BOTH {
        let to = Ext::Local.at_node(&ground.world.node(2).place, family, Transport::Tcp);
        served(ground, outside, (to, Transport::Tcp), &["b2"], &BTreeSet::from([outside.ip(family)]))?;
    }
    Ok(())
}

fn elsewhere(ground: &Ground<'_>) -> Result<()> {
    for from in [ground.world.pod("a1"), &ground.world.node(1).place] {
        served_everywhere(ground, from, Ext::Elsewhere, &["b2"], false)?;
    }
    let outside = ground.world.outside();
    for family in Family::BOTH {
        for transport in [Transport::Tcp, Transport::Udp] {
            for to in Ext::Elsewhere.ways(ground.world, family, transport) {
                let report = ground.world.ask(outside, &Ask::new(to, transport).timeout(200))?;
                let errors = report.errors();
                ensure!(errors.keys().eq(["ETIMEDOUT"]), "outside -> {to} {transport}: expected silence, {report:?}");
            }
        }
    }
    Ok(())
}

/// By the other node's own NodePort a pod is a pod; by ours it comes from outside (kubernetes#74383).
fn other_node(ground: &Ground<'_>) -> Result<()> {
    let (a2, node1, node2) = (ground.world.pod("a2"), &ground.world.node(1).place, &ground.world.node(2).place);
    // What leaves the pod network is masqueraded there by others, with some CNIs.
    let as_left = |family| -> Result<BTreeSet<IpAddr>> {
        let mut sources = ground.world.node_addresses(2)?;
        sources.insert(a2.ip(family));
        Ok(sources)
    };
    for family in Family::BOTH {
        for transport in [Transport::Tcp, Transport::Udp] {
            let to = Ext::Local.at_node(node1, family, transport);
            served(ground, a2, (to, transport), &["b1"], &as_left(family)?)?;
            let to = Ext::Open.at_node(node1, family, transport);
            served(ground, a2, (to, transport), &["b1", "b2"], &ground.world.node_addresses(1)?)?;
            let to = Ext::Local.at_node(node2, family, transport);
            served(ground, a2, (to, transport), &["b1", "b2"], &BTreeSet::from([a2.ip(family)]))?;
            let to = Ext::Local.at_load_balancer(family, transport);
            served(ground, a2, (to, transport), &["b1", "b2"], &BTreeSet::from([a2.ip(family)]))?;
        }
    }
    Ok(())
}

fn internal(ground: &Ground<'_>) -> Result<()> {
    for from in ground.origins() {
        served_everywhere(ground, from, Ext::Internal, &["b1", "b2"], true)?;
    }
    Ok(())
}

fn empty(ground: &Ground<'_>) -> Result<()> {
    for from in ground.origins() {
        for family in Family::BOTH {
            for transport in [Transport::Tcp, Transport::Udp] {
                for to in Ext::Empty.ways(ground.world, family, transport) {
                    let report = ground.world.ask(from, &Ask::new(to, transport).timeout(3000))?;
                    let errors = report.errors();
                    ensure!(
                        errors.len() == 1 && errors.keys().all(|error| ground.is_refusal(from, error)),
                        "{} -> {to} {transport}: expected a refusal, {report:?}",
                        from.name
                    );
                }
            }
        }
    }
    Ok(())
}

fn hairpin(ground: &Ground<'_>) -> Result<()> {
    served_everywhere(ground, ground.world.pod("a1"), Ext::Hairpin, &["a1"], true)
}

fn localhost(ground: &Ground<'_>) -> Result<()> {
    let at = |ext: Ext, transport| SocketAddr::new(Ipv4Addr::LOCALHOST.into(), ext.node_port(transport));
    let node = &ground.world.node(1).place;
    let own = ground.world.node_addresses(1)?;
    for transport in Transport::ALL {
        for ext in [Ext::Open, Ext::Local, Ext::Internal] {
            served(ground, node, (at(ext, transport), transport), &["b1", "b2"], &own)?;
        }
        served(ground, node, (at(Ext::Elsewhere, transport), transport), &["b2"], &own)?;
    }
    for transport in [Transport::Tcp, Transport::Udp] {
        // A pod's 127.0.0.1 is the pod's own, where nobody listens.
        for (from, ext) in [(ground.world.pod("a1"), Ext::Open), (node, Ext::Empty)] {
            let report = ground.world.ask(from, &Ask::new(at(ext, transport), transport))?;
            ensure!(report.errors().keys().eq(["ECONNREFUSED"]), "{} {transport}: {report:?}", from.name);
        }
    }
    // No way in was opened for others (F51): what would be answered at the node's own address is not at this one.
    let open = at(Ext::Open, Transport::Tcp);
    for (to, answer) in [(open, None), (SocketAddr::new(node.ip(Family::V4), open.port()), Some("tcp"))] {
        let report = packets::framed(ground.world, to, 31_031, &["--timeout=500"])?;
        ensure!(report.answer.as_deref() == answer, "from outside to {to}: {report:?}");
    }
    let localnet = node.namespace.output("cat", &["/proc/sys/net/ipv4/conf/all/route_localnet"])?;
    ensure!(localnet.trim() == "0", "route_localnet is {localnet}");
    Ok(())
}

fn no_node_ports(ground: &Ground<'_>) -> Result<()> {
    for from in ground.origins() {
        for family in Family::BOTH {
            let sources = sources(ground, from, family, true)?;
            for transport in Transport::ALL {
                let to = Ext::NoNodePorts.at_load_balancer(family, transport);
                served(ground, from, (to, transport), &["b1", "b2"], &sources)?;
            }
        }
    }
    Ok(())
}

fn own(ground: &Ground<'_>) -> Result<()> {
    let node = &ground.world.node(1).place;
    for from in ground.origins() {
        for family in Family::BOTH {
            for transport in Transport::ALL {
                let report = ground.answered(from, &Ask::new(node.at(family, 8080), transport).times(3))?;
                ensure!(report.backends().keys().eq(["node1"]), "{}: {:?}", from.name, report.backends());
            }
        }
    }
    let status = ground.world.cli(ground.world.node(1), &["status"])?;
    for ip in [IpAddr::from(node.v4), node.v6.into()] {
        let said = format!("externalIP {ip} is an address of this node");
        ensure!(status.contains(&said), "{said:?} is not in {status}");
    }
    // It is no address of node2: there it is served, and b2 is behind it.
    let a2 = ground.world.pod("a2");
    let report = ground.answered(a2, &Ask::new(node.at(Family::V4, 8080), Transport::Tcp).times(3))?;
    // IPVS would take it from node1 for good.
    let expected = if ground.fallback == Some(Fallback::Ipvs) { "node1" } else { "b2" };
    ensure!(report.backends().keys().eq([expected]), "{:?}", report.backends());
    Ok(())
}

/// No guard stands on an address of a node: what no frontend claims there goes where it went.
fn untouched(ground: &Ground<'_>) -> Result<()> {
    for from in ground.origins() {
        for family in Family::BOTH {
            for transport in Transport::ALL {
                let to = ground.world.node(1).place.at(family, 9090);
                let report = ground.answered(from, &Ask::new(to, transport))?;
                ensure!(report.backends().keys().eq(["node1"]), "{} -> {to}: {report:?}", from.name);
            }
        }
    }
    Ok(())
}

fn host_network(ground: &Ground<'_>) -> Result<()> {
    let (outside, pod) = (ground.world.outside(), ground.world.pod("a1"));
    for family in Family::BOTH {
        for transport in [Transport::Tcp, Transport::Udp] {
            for to in Ext::Host.ways(ground.world, family, transport) {
                served(ground, outside, (to, transport), &["node1"], &ground.world.addresses(outside)?)?;
                // What leaves the pod network for another node is masqueraded there by others, with some CNIs.
                let mut sources = ground.world.node_addresses(1)?;
                sources.insert(pod.ip(family));
                served(ground, pod, (to, transport), &["node1", "node2"], &sources)?;
            }
        }
    }
    Ok(())
}

/// Per packet, whoever else is translated at connect time.
fn sctp(ground: &Ground<'_>) -> Result<()> {
    let (pod, outside) = (ground.world.pod("a1"), ground.world.outside());
    for family in Family::BOTH {
        let own = |place: &Place| BTreeSet::from([place.ip(family)]);
        let node = ground.world.node_addresses(1)?;
        for (from, ext, backends, sources) in [
            (outside, Ext::Open, &["b1", "b2"][..], node.clone()),
            (outside, Ext::Local, &["b1"], own(outside)),
            (pod, Ext::Open, &["b1", "b2"], node.clone()),
            (pod, Ext::Local, &["b1", "b2"], own(pod)),
            (pod, Ext::Hairpin, &["a1"], node),
        ] {
            for to in ext.ways(ground.world, family, Transport::Sctp) {
                served(ground, from, (to, Transport::Sctp), backends, &sources)?;
            }
        }
        for to in Ext::Elsewhere.ways(ground.world, family, Transport::Sctp) {
            let report = ground.world.ask(outside, &Ask::new(to, Transport::Sctp).timeout(200))?;
            ensure!(report.errors().keys().eq(["ETIMEDOUT"]), "outside -> {to}: expected silence, {report:?}");
        }
    }
    Ok(())
}

fn fragments(ground: &Ground<'_>) -> Result<()> {
    for from in ground.origins() {
        for family in Family::BOTH {
            if ground.loses_large_datagrams(from, family) {
                continue;
            }
            for ext in [Ext::Open, Ext::Local] {
                for to in ext.ways(ground.world, family, Transport::Udp) {
                    let ask = Ask::new(to, Transport::Udp).times(8).with("--size=4000").with("--reply=4000");
                    // The first one may be what tells an IPv6 sender of a smaller MTU on the way to either backend.
                    ground.world.ask(from, &ask.clone().timeout(300))?;
                    ground.answered(from, &ask)?;
                }
            }
        }
    }
    Ok(())
}

/// From outside, to backends on either node.
fn disorder(ground: &Ground<'_>) -> Result<()> {
    let outside = ground.world.outside();
    for family in Family::BOTH {
        for (ext, backend, masqueraded) in [(Ext::Local, "b1", false), (Ext::Remote, "b2", true)] {
            for to in ext.ways(ground.world, family, Transport::Udp) {
                packets::disordered(ground.world, outside, to, backend, masqueraded)?;
                // A load balancer's address may be somebody else's, and so may a fragment of which only that is known: it goes on, too.
                let leak = format!("{} > {} proto udp", outside.ip(family), to.ip());
                let leaks = ground.world.leaks()?;
                ensure!(leaks.iter().all(|found| *found == leak), "{to}: {leaks:?}");
            }
        }
    }
    Ok(())
}

/// By node port and load balancer's address, as the packet's translation is another one at each of the places.
fn path_mtu(ground: &Ground<'_>) -> Result<()> {
    for narrow in [Narrow::ToBackend, Narrow::BetweenNodes, Narrow::ToOutside] {
        packets::narrowed(ground.world, narrow, || {
            for from in ground.origins() {
                // node1 itself tells whom it translates, and outside is one alone.
                let asks = match narrow {
                    Narrow::ToBackend => true,
                    Narrow::BetweenNodes => ground.per_packet(from),
                    Narrow::ToOutside => from.node.is_none(),
                };
                for family in Family::BOTH.into_iter().filter(|_| asks) {
                    for to in remote(ground.world, family) {
                        packets::learns(ground, from, to, narrow)?;
                    }
                }
            }
            Ok(())
        })?;
    }
    Ok(())
}

/// What leads to `b2` alone, whoever asks: a node port and a load balancer's address.
fn remote(world: &World, family: Family) -> [SocketAddr; 2] {
    let [node_port, load_balancer, _] = Ext::Remote.ways(world, family, Transport::Tcp);
    [node_port, load_balancer]
}

/// How a connection ends whose port is used again.
const ENDS: [&str; 2] = ["--reset", "--server-closes"];

fn reused(ground: &Ground<'_>) -> Result<()> {
    // Ports that no other case has.
    let mut ports = 31_400..;
    for from in ground.origins().into_iter().filter(|from| ground.per_packet(from)) {
        for family in Family::BOTH {
            let [node_port, load_balancer, _] = Ext::Open.ways(ground.world, family, Transport::Tcp);
            for to in [node_port, load_balancer] {
                for end in ENDS {
                    let port = ports.next().context("no port left")?;
                    let ask = Ask::new(to, Transport::Tcp).times(30).timeout(5_000);
                    let report = ground.answered(from, &ask.with(format!("--source-port={port}")).with(end))?;
                    let backends = report.backends();
                    ensure!(backends.keys().eq(["b1", "b2"]), "{} -> {to} {end}: {backends:?}", from.name);
                }
            }
        }
    }
    // No socket sends another SYN of a connection that is open: from outside, as a frame.
    let outside = ground.world.outside();
    for family in Family::BOTH {
        let [node_port, load_balancer, _] = Ext::Open.ways(ground.world, family, Transport::Tcp);
        for to in [node_port, load_balancer] {
            let port = ports.next().context("no port left")?;
            let (at, port_arg) = (to.to_string(), format!("--source-port={port}"));
            let args = ["hold", &at, "--connections=1", &port_arg, "--interval=20", "--timeout=15000"];
            let mut held = outside.start(&ground.world.programs().testpod, &args.map(str::to_owned))?;
            held.wait_for_line("ready", patience(15))?;
            for _ in 0..12 {
                packets::framed(ground.world, to, port, &["--timeout=10"])?;
            }
            std::thread::sleep(Duration::from_millis(200));
            let report: hold::Report = held.finish(patience(20))?;
            let fine = report.broken.is_empty() && report.wrong.is_empty() && report.rounds > 0;
            ensure!(fine, "outside:{port} -> {to}, with SYNs in between: {report:?}");
        }
    }
    Ok(())
}

fn addresses_change(ground: &Ground<'_>) -> Result<()> {
    let node = ground.world.node(1);
    let device = if node.place.namespace.output("ip", &["-o", "addr", "show", "dev", "eth0"])?.contains("inet ") {
        "eth0"
    } else {
        "cni0"
    };
    let added = [IpAddr::from([192, 168, 77, 201]), "fd00:77::201".parse()?];
    let shown = |wanted: bool| -> Result<()> {
        let deadline = Instant::now() + patience(5);
        loop {
            let listed = ground.world.cli(node, &["services", "-o", "json"])?;
            if added.iter().all(|ip| listed.contains(&format!("\"{ip}\"")) == wanted) {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("the agent does not follow: {added:?} should be there: {wanted}; {}", node.agent_log());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    };
    node.place
        .namespace
        .ip(&format!("addr add {}/24 dev {device}\naddr add {}/64 dev {device} nodad\n", added[0], added[1]))?;
    let outcome = shown(true).and_then(|()| {
        for (family, ip) in Family::BOTH.into_iter().zip(added) {
            for from in ground.origins() {
                let to = SocketAddr::new(ip, Ext::Open.node_port(Transport::Tcp));
                served(ground, from, (to, Transport::Tcp), &["b1", "b2"], &sources(ground, from, family, true)?)?;
            }
        }
        Ok(())
    });
    node.place
        .namespace
        .ip(&format!("addr del {}/24 dev {device}\naddr del {}/64 dev {device}\n", added[0], added[1]))?;
    outcome?;
    shown(false)
}

/// Whole frames, as a neighbour may send them: the kernel lets no socket do so.
fn forged(ground: &Ground<'_>) -> Result<()> {
    let world = ground.world;
    // No other port begins so.
    let mut port = 31_100;
    let mut send = |from: IpAddr, to: SocketAddr| -> Result<()> {
        port += 1;
        let from = SocketAddr::new(from, port);
        let report = packets::framed_from(world, from, to, &["--timeout=40"])?;
        ensure!(report.answer.is_none(), "{from} -> {to}: {report:?}");
        Ok(())
    };
    for family in Family::BOTH {
        let loopback = match family {
            Family::V4 => IpAddr::from([127, 0, 0, 1]),
            Family::V6 => IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1_u16]),
        };
        let before = martian(world)?;
        let cluster_ip = SocketAddr::new(vip(family, Ext::Open as u8), 80);
        let ways = Ext::Open.ways(world, family, Transport::Tcp).into_iter().chain([cluster_ip]);
        let mut sent = 0;
        for to in ways {
            for from in [loopback, vip(family, Ext::Empty as u8)] {
                send(from, to)?;
                sent += 1;
            }
        }
        let counted = martian(world)? - before;
        ensure!(counted == sent, "{sent} were forged, {counted} were found to be");
        // CVE-2020-8558
        send(world.outside().ip(family), SocketAddr::new(loopback, Ext::Open.node_port(Transport::Tcp)))?;
    }
    let flows = world.cli(world.node(1), &["connections", "-o", "json"])?;
    ensure!(!flows.contains(":311"), "a flow was made: {flows}");
    Ok(())
}

/// Packets that node1 found to be forged.
fn martian(world: &World) -> Result<u64> {
    let counters = world.cli(world.node(1), &["counters"])?;
    let line = counters.lines().find_map(|line| line.strip_prefix("martian"));
    Ok(line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok()).unwrap_or(0))
}

/// By annotation; as when a router leads a connection to another node.
fn maglev(ground: &Ground<'_>) -> Result<()> {
    const NUMBER: u8 = 111;
    let world = ground.world;
    let service = objects::service("ext-maglev")
        .cluster_ips(&Family::BOTH.map(|family| vip(family, NUMBER)))
        .port("dns", "UDP", 53)
        .load_balancer(&Family::BOTH.map(|family| external(family, NUMBER)))
        .annotation("proxy-agent/algorithm", "maglev")
        .json();
    let slices = Family::BOTH.map(|family| {
        let pods = ["b1", "c1", "b2", "c2"].map(|pod| world.pod(pod));
        objects::slice("ext-maglev", family).port("dns", "UDP", 8080).endpoints(pods).json()
    });
    let outside = &world.outside().namespace;
    let lead = |number: usize| -> Result<()> {
        let node = &world.node(number).place;
        outside.ip(&format!(
            "route replace {EXTERNAL_CIDR_V4} via {}\nroute replace {EXTERNAL_CIDR_V6} via {}\n",
            node.v4, node.v6
        ))
    };
    let ask = |family: Family| -> Result<Vec<String>> {
        let to = SocketAddr::new(external(family, NUMBER), 53);
        let ask = Ask::new(to, Transport::Udp).times(16).with("--source-port=31300").with("--successive");
        let report = ground.answered(world.outside(), &ask)?;
        Ok(report.tries.iter().filter_map(|one| one.backend().map(str::to_owned)).collect())
    };
    for object in slices.iter().chain([&service]) {
        world.write(object)?;
    }
    let deadline = Instant::now() + patience(10);
    for node in &world.nodes {
        let wanted = Family::BOTH.map(|family| format!("\"{}\"", external(family, NUMBER)));
        loop {
            let listed = world.cli(node, &["services", "-o", "json"])?;
            if wanted.iter().all(|address| listed.contains(address)) {
                break;
            }
            ensure!(Instant::now() < deadline, "{wanted:?} are not in force: {}", node.agent_log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    let outcome = Family::BOTH.into_iter().try_for_each(|family| {
        let mut seen = Vec::new();
        for number in [1, 2] {
            lead(number)?;
            seen.push(ask(family)?);
        }
        let different: BTreeSet<&String> = seen[0].iter().collect();
        ensure!(different.len() > 1, "sixteen ports are led to {different:?} alone");
        ensure!(seen[0] == seen[1], "{family}: node1 leads to {:?}, node2 to {:?}", seen[0], seen[1]);
        Ok(())
    });
    lead(1)?;
    for object in slices.iter().chain([&service]) {
        world.remove(object)?;
    }
    outcome
}

fn names(ground: &Ground<'_>) -> Result<()> {
    for from in ground.origins() {
        for family in Family::BOTH {
            for transport in Transport::ALL {
                for to in Ext::Open.ways(ground.world, family, transport) {
                    check_name(ground, from, to, transport)?;
                }
            }
        }
    }
    let node = &ground.world.node(1).place;
    for transport in Transport::ALL {
        let to = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), Ext::Open.node_port(transport));
        check_name(ground, node, to, transport)?;
    }
    Ok(())
}

fn check_name(ground: &Ground<'_>, from: &Place, to: SocketAddr, transport: Transport) -> Result<()> {
    let shown = to.to_string();
    for one in ground.answered(from, &Ask::new(to, transport).times(3))?.tries {
        let what = format!("{} -> {to} {transport}", from.name);
        if transport != Transport::UdpUnconnected {
            ensure!(one.peer_name.as_deref() == Some(&*shown), "{what}: getpeername says {:?}", one.peer_name);
        }
        if transport != Transport::Tcp {
            ensure!(one.from.as_deref() == Some(&*shown), "{what}: the answer came from {:?}", one.from);
        }
    }
    Ok(())
}
