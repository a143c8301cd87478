//! What options of the agent take away: NodePorts at some of the node's addresses only, and external IPs altogether (contract A53, A54,
//! A158). What is not served any more goes where it would go without a proxy: to the node's own server on that port, or out by the
//! default route. The agents follow one another on the same pins and rules, so what the one before had in force has to go, too.

use std::{
    cell::RefCell,
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    process::ExitCode,
};

use anyhow::{Context, Result, ensure};
use proxy_tests::{
    pod::socket::Transport,
    suite::Suite,
    world::{
        AgentOptions, Ask, Client, Fallback, Family, Place, Programs, Spec, Topology, World, external, objects,
        patience, slower, vip, within,
    },
};
use serde_json::Value;

/// Ranges of both families, with an address of node1 in each; see [`within_ranges`].
const RANGES: &str = "--nodeport-addresses=192.168.77.60/30,fd00:77::60/126";
const BACKENDS: [&str; 2] = ["b1", "b2"];
/// The node's own server, on the node ports.
const OWN: &str = "own";
const SWITCHED_OFF: &str = "externalIPs are switched off on this node (--external-ips=false)";

/// Who answers node1's node ports.
struct NodePorts {
    options: &'static [&'static str],
    /// At its first address, in IPv4 and in IPv6: the Service, else the node's own server.
    first: [bool; 2],
    /// At the address within [`RANGES`].
    within: [bool; 2],
    /// The node's own processes on 127.0.0.1; else nobody does.
    localhost: bool,
}

const NARROWED: [(&str, NodePorts); 5] = [
    (
        "everywhere, if nothing is said",
        NodePorts { options: &[], first: [true; 2], within: [true; 2], localhost: true },
    ),
    (
        "A53 A54: within ranges of both families alone",
        NodePorts { options: &[RANGES], first: [false; 2], within: [true; 2], localhost: false },
    ),
    (
        "A53: a family that no range is of is not narrowed",
        NodePorts {
            options: &["--nodeport-addresses=192.168.77.60/30"],
            first: [false, true],
            within: [true; 2],
            localhost: false,
        },
    ),
    (
        "A54: 127.0.0.1 alone, by its range",
        NodePorts {
            options: &["--nodeport-addresses=127.0.0.0/8,::1/128"],
            first: [false; 2],
            within: [false; 2],
            localhost: true,
        },
    ),
    (
        "A53: the primary addresses",
        NodePorts {
            options: &["--nodeport-addresses=primary"],
            first: [true; 2],
            within: [false; 2],
            localhost: false,
        },
    ),
];

/// A world and the node's own server.
struct Ground<'a> {
    world: &'a mut World,
    options: &'a AgentOptions,
}

fn main() -> ExitCode {
    Suite::in_worlds("narrowed", Suite::every_way("narrowed"), prepare, |suite, group, options, world| {
        let server = match own_server(world) {
            Ok(server) => server,
            Err(error) => return suite.fail(group, &error),
        };
        let mut ground = Ground { world, options };
        for (name, narrowed) in &NARROWED {
            suite.case(&format!("{group}/NodePorts: {name}"), || ground.node_ports(narrowed));
        }
        suite.case(&format!("{group}/NodePorts: A127: addresses within ranges are followed"), || ground.followed());
        suite.case(&format!("{group}/A158: without external IPs"), || ground.without_external_ips());
        suite.case(&format!("{group}/A158: external IPs again"), || ground.external_ips());
        drop(server);
    })
}

fn node_port(transport: Transport) -> u16 {
    if transport == Transport::Tcp { 30_080 } else { 30_053 }
}

fn port(transport: Transport) -> u16 {
    if transport == Transport::Tcp { 80 } else { 53 }
}

/// Within [`RANGES`]: the first is there from the beginning.
fn within_ranges(family: Family, n: u8) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(192, 168, 77, 60 + n).into(),
        Family::V6 => [0xfd00, 0x77, 0, 0, 0, 0, 0, 0x60 + u16::from(n)].into(),
    }
}

fn change_addresses(world: &World, change: &str, n: u8) -> Result<()> {
    let [v4, v6] = Family::BOTH.map(|family| within_ranges(family, n));
    let nodad = if change == "add" { " nodad" } else { "" };
    let node = &world.node(1).place.namespace;
    node.ip(&format!("addr {change} {v4}/24 dev eth0\naddr {change} {v6}/64 dev eth0{nodad}\n"))
}

fn prepare(programs: Programs, options: &AgentOptions) -> Result<World> {
    World::serving(&Spec::two_nodes(Topology::Routed), programs, options, |world| {
        let service = objects::service("web")
            .cluster_ips(&Family::BOTH.map(|family| vip(family, 1)))
            .port("web", "TCP", port(Transport::Tcp))
            .node_port(node_port(Transport::Tcp))
            .port("dns", "UDP", port(Transport::Udp))
            .node_port(node_port(Transport::Udp))
            .load_balancer(&Family::BOTH.map(|family| external(family, 1)))
            .external_ips(&Family::BOTH.map(|family| external(family, 101)));
        let slice = |family| {
            let slice = objects::slice("web", family).port("web", "TCP", 8080).port("dns", "UDP", 8080);
            slice.endpoints(BACKENDS.map(|pod| world.pod(pod))).json()
        };
        [objects::nodes(world), vec![service.json()], Family::BOTH.map(slice).to_vec()].concat()
    })
}

/// On the node ports, at every address but loopback's: who answers once the Service does not.
fn own_server(world: &World) -> Result<Client> {
    // What node1 does not take goes on by the way that it came: it would tell `outside` of a shorter one, past node1, for good.
    world.outside().namespace.sysctl(&[
        ("ipv4/conf/all/accept_redirects", "0"),
        ("ipv4/conf/eth0/accept_redirects", "0"),
        ("ipv6/conf/all/accept_redirects", "0"),
        ("ipv6/conf/eth0/accept_redirects", "0"),
    ])?;
    change_addresses(world, "add", 1)?;
    let node = &world.node(1).place;
    let mut args = vec!["serve".to_owned(), format!("--name={OWN}")];
    for family in Family::BOTH {
        args.extend([node.ip(family), within_ranges(family, 1)].map(|address| format!("--address={address}")));
    }
    args.extend([Transport::Tcp, Transport::Udp].map(|transport| format!("--port={}", node_port(transport))));
    let mut server = node.start(&world.programs().testpod, &args)?;
    server.wait_for_line("serving", patience(10))?;
    Ok(server)
}

impl Ground<'_> {
    fn restart(&mut self, extra: &[&str]) -> Result<()> {
        let mut options = self.options.clone();
        options.extra.extend(extra.iter().map(|&word| word.to_owned()));
        self.world.kill_agent(1)?;
        self.world.start_agent(1, &options)?;
        self.world.node(1).wait_ready(patience(30))?;
        self.world.settle()
    }

    /// One of each origin: a pod of node1, node1 itself, the client outside.
    fn origins(&self) -> [&Place; 3] {
        [self.world.pod("a1"), &self.world.node(1).place, self.world.outside()]
    }

    /// From everywhere, by every transport.
    fn everybody(&self, ip: IpAddr, port: fn(Transport) -> u16, backends: &[&str]) -> Result<()> {
        for from in self.origins() {
            for transport in Transport::ALL {
                self.answered(from, SocketAddr::new(ip, port(transport)), transport, backends)?;
            }
        }
        Ok(())
    }

    /// Every time, and by nobody else.
    fn answered(&self, from: &Place, to: SocketAddr, transport: Transport, backends: &[&str]) -> Result<()> {
        let ask = Ask::new(to, transport).times(4).timeout(5_000 * slower()).with("--fail-fast");
        let report = self.world.ask(from, &ask)?;
        let what = || format!("{} -> {to} {transport}: {report:?}", from.name);
        ensure!(report.errors().is_empty(), "{}", what());
        ensure!(report.backends().keys().all(|backend| backends.contains(&&**backend)), "{}", what());
        Ok(())
    }

    fn node_ports(&mut self, narrowed: &NodePorts) -> Result<()> {
        let NodePorts { options, first, within, localhost } = narrowed;
        self.restart(options)?;
        let mut served = BTreeSet::new();
        for (family, (first, within)) in Family::BOTH.into_iter().zip(first.iter().zip(within)) {
            for (ip, is_served) in [(self.world.node(1).place.ip(family), first), (within_ranges(family, 1), within)] {
                self.everybody(ip, node_port, if *is_served { &BACKENDS } else { &[OWN] })?;
                served.extend(is_served.then_some(ip));
            }
        }
        self.localhost(*localhost)?;
        served.extend(localhost.then_some(IpAddr::from(Ipv4Addr::LOCALHOST)));
        let listed = self.listed("NodePort")?;
        ensure!(listed == served, "services lists NodePorts at {listed:?}, served they are at {served:?}");
        Ok(())
    }

    fn localhost(&self, is_served: bool) -> Result<()> {
        let node = &self.world.node(1).place;
        for transport in Transport::ALL {
            let to = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), node_port(transport));
            if is_served && self.options.fallback != Some(Fallback::Nftables) {
                self.answered(node, to, transport, &BACKENDS)?;
            } else if transport != Transport::UdpUnconnected {
                let report = self.world.ask(node, &Ask::new(to, transport).timeout(5_000))?;
                ensure!(report.errors().keys().eq(["ECONNREFUSED"]), "{} -> {to} {transport}: {report:?}", node.name);
            }
        }
        Ok(())
    }

    /// Addresses of the Service's frontends of this type.
    fn listed(&self, kind: &str) -> Result<BTreeSet<IpAddr>> {
        let shown: Value = serde_json::from_str(&self.world.cli(self.world.node(1), &["services", "-o", "json"])?)?;
        let rows = shown["items"].as_array().context("no items")?.iter();
        let rows = rows.filter(|row| row["name"] == "web" && row["type"] == kind);
        rows.map(|row| row["frontend"]["address"].as_str().context("no address")?.parse().context("an address"))
            .collect()
    }

    fn followed(&mut self) -> Result<()> {
        self.restart(&[RANGES])?;
        change_addresses(self.world, "add", 2)?;
        let listed = |wanted: &[u8]| {
            within(patience(10), || {
                let listed = self.listed("NodePort")?;
                let wanted = wanted.iter().flat_map(|n| Family::BOTH.map(|family| within_ranges(family, *n)));
                ensure!(listed == wanted.collect(), "served at {listed:?}: {}", self.world.node(1).agent_log());
                Ok(())
            })
        };
        let outcome = listed(&[1, 2]).and_then(|()| {
            let mut families = Family::BOTH.into_iter();
            families.try_for_each(|family| self.everybody(within_ranges(family, 2), node_port, &BACKENDS))
        });
        change_addresses(self.world, "del", 2)?;
        outcome?;
        listed(&[1])
    }

    /// The Service is served by every other way.
    fn served_elsewhere(&self) -> Result<()> {
        for family in Family::BOTH {
            self.everybody(vip(family, 1), port, &BACKENDS)?;
            self.everybody(external(family, 1), port, &BACKENDS)?;
            self.everybody(self.world.node(1).place.ip(family), node_port, &BACKENDS)?;
        }
        let listed = self.listed("ClusterIP")?;
        let wanted = Family::BOTH.map(|family| vip(family, 1));
        ensure!(listed == wanted.into(), "services lists ClusterIPs at {listed:?}");
        Ok(())
    }

    /// The sink sees what is for them, from each as it was sent.
    fn without_external_ips(&mut self) -> Result<()> {
        self.restart(&["--external-ips=false"])?;
        self.world.leaks()?;
        let mut wanted = BTreeSet::new();
        for from in self.origins() {
            for family in Family::BOTH {
                let ip = external(family, 101);
                let source = if from.is_node() { self.world.route_source(1, ip)? } else { from.ip(family) };
                for transport in [Transport::Tcp, Transport::Udp] {
                    let to = SocketAddr::new(ip, port(transport));
                    let report = self.world.ask(from, &Ask::new(to, transport).timeout(200))?;
                    let errors = report.errors();
                    ensure!(errors.keys().eq(["ETIMEDOUT"]), "{} -> {to} {transport}: {report:?}", from.name);
                    wanted.insert(format!("{source} > {ip} proto {transport}"));
                }
            }
        }
        let seen = RefCell::new(BTreeSet::new());
        within(patience(10), || {
            let mut seen = seen.borrow_mut();
            seen.extend(self.world.leaks()?);
            ensure!(wanted.is_subset(&seen), "the sink saw {seen:?} of {wanted:?}");
            Ok(())
        })?;
        self.served_elsewhere()?;
        let listed = self.listed("ExternalIP")?;
        ensure!(listed.is_empty(), "services lists external IPs: {listed:?}");
        let status = self.world.cli(self.world.node(1), &["status"])?;
        ensure!(status.contains(SWITCHED_OFF), "{SWITCHED_OFF:?} is not in {status}");
        Ok(())
    }

    fn external_ips(&mut self) -> Result<()> {
        self.restart(&[])?;
        self.world.leaks()?;
        let wanted = Family::BOTH.map(|family| external(family, 101));
        wanted.iter().try_for_each(|ip| self.everybody(*ip, port, &BACKENDS))?;
        self.served_elsewhere()?;
        let listed = self.listed("ExternalIP")?;
        ensure!(listed == wanted.into(), "services lists external IPs: {listed:?}");
        let status = self.world.cli(self.world.node(1), &["status"])?;
        ensure!(!status.contains(SWITCHED_OFF), "{status}");
        let leaks = self.world.leaks()?;
        ensure!(leaks.is_empty(), "went elsewhere: {leaks:?}");
        Ok(())
    }
}
