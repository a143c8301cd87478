//! A Service, a pod, a namespace that wants pods' sockets left alone, where all others are translated at connect time.

use std::{
    net::SocketAddr,
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use proxy_tests::{
    pod::{hold, socket::Transport, talk},
    suite::Suite,
    world::{
        AgentOptions, Ask, Client, Family, Place, Programs, SocketLb, Spec, Topology, World, external, objects, vip,
    },
};
use serde_json::{Value, json};

const ANNOTATION: &str = "proxy-agent/socket-lb";
/// Of TCP and of UDP.
const NODE_PORTS: (u16, u16) = (30_080, 30_053);

fn main() -> ExitCode {
    let shapes = [("opt-out/all".to_owned(), false), ("opt-out/pods".to_owned(), true)];
    Suite::in_worlds("opt_out", shapes, prepare, |suite, group, pods, world| {
        if *pods {
            suite.case(&format!("{group}/a pod goes per packet, and comes back"), || pod(world));
            suite.case(&format!("{group}/a namespace, and pods that say otherwise"), || namespace(world));
            suite.case(&format!("{group}/what is open goes on"), || open(world));
            suite.case(&format!("{group}/with no agent, and through a restart"), || restart(world));
            suite.case(&format!("{group}/a pod in the node's network"), || host_network(world));
            return;
        }
        suite.case(&format!("{group}/a Service goes per packet, and comes back"), || service(world));
        suite.case(&format!("{group}/a ClusterIP that the node owns is left to it"), || own_address(world));
    })
}

fn options(pods: bool) -> AgentOptions {
    let extra = if pods { vec!["--pod-annotations".to_owned()] } else { Vec::new() };
    AgentOptions { extra, ..AgentOptions::new(SocketLb::All) }
}

fn prepare(programs: Programs, pods: &bool) -> Result<World> {
    World::serving(&Spec::two_nodes(Topology::Routed), programs, &options(*pods), |world| {
        if *pods {
            let slice = |family| {
                let slice = objects::slice("plain", family).port("web", "TCP", 8080).port("dns", "UDP", 8080);
                slice.endpoint(world.pod("b2")).json()
            };
            let service = objects::service("plain")
                .cluster_ips(&Family::BOTH.map(|family| vip(family, 1)))
                .port("web", "TCP", 80)
                .port("dns", "UDP", 53);
            return [objects::nodes(world), vec![service.json()], Family::BOTH.map(slice).to_vec()].concat();
        }
        let slice = |family| meshed_slice(world, family);
        [objects::nodes(world), vec![meshed(Some("node"))], Family::BOTH.map(slice).to_vec()].concat()
    })
}

fn meshed(annotation: Option<&str>) -> Value {
    let service = objects::service("meshed")
        .cluster_ips(&Family::BOTH.map(|family| vip(family, 1)))
        .port("web", "TCP", 80)
        .node_port(NODE_PORTS.0)
        .port("dns", "UDP", 53)
        .node_port(NODE_PORTS.1)
        .load_balancer(&Family::BOTH.map(|family| external(family, 1)));
    annotation.into_iter().fold(service, |service, value| service.annotation(ANNOTATION, value)).json()
}

fn meshed_slice(world: &World, family: Family) -> Value {
    let slice = objects::slice("meshed", family).port("web", "TCP", 8080).port("dns", "UDP", 8080);
    slice.endpoint(world.pod("b2")).json()
}

fn service(world: &mut World) -> Result<()> {
    asked(world, true, true)?;
    world.apply(&[meshed(Some("all"))])?;
    asked(world, true, false)?;
    // Nobody serves: refused either way, per packet by ICMP, which a sidecar would not have come to know of by a failed call.
    for family in Family::BOTH {
        world.remove(&meshed_slice(world, family))?;
    }
    world.apply(&[meshed(Some("node"))])?;
    asked(world, false, true)?;
    // A word that means nothing is said, and changes nothing.
    world.apply(&[meshed(Some("off"))])?;
    let status = world.cli(world.node(1), &["status"])?;
    ensure!(status.contains("socket-lb \"off\" is not known"), "{status}");
    Ok(())
}

/// As NodeLocal DNSCache does: pods and the node itself reach what listens on the node, as long as the node has the address.
fn own_address(world: &mut World) -> Result<()> {
    let objects = |world: &World| {
        let addresses = Family::BOTH.map(|family| vip(family, 2));
        let service = objects::service("cached").cluster_ips(&addresses).port("web", "TCP", 8080).json();
        let slice = |family| objects::slice("cached", family).port("web", "TCP", 8080).endpoint(world.pod("b2")).json();
        [vec![service], Family::BOTH.map(slice).to_vec()].concat()
    };
    world.apply(&objects(world))?;
    answers(world, "b2")?;
    let address = |verb: &str| {
        let [v4, v6] = Family::BOTH.map(|family| vip(family, 2));
        world.node(1).place.namespace.ip(&format!("addr {verb} {v4}/32 dev lo\naddr {verb} {v6}/128 dev lo\n"))
    };
    address("add")?;
    let mut args = ["serve", "--name=cache", "--port=8080"].map(str::to_owned).to_vec();
    args.extend(Family::BOTH.map(|family| format!("--address={}", vip(family, 2))));
    let mut cache = world.node(1).place.start(&world.programs().testpod, &args)?;
    cache.wait_for_line("serving", Duration::from_secs(5))?;
    answers(world, "cache")?;
    drop(cache);
    address("del")?;
    answers(world, "b2")
}

/// The node's addresses are followed a moment later.
fn answers(world: &World, who: &str) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(10);
    for family in Family::BOTH {
        for from in [world.pod("a1"), &world.node(1).place] {
            let to = SocketAddr::new(vip(family, 2), 8080);
            loop {
                let report = world.ask(from, &Ask::new(to, Transport::Tcp))?;
                if report.backends().keys().eq([who]) {
                    break;
                }
                ensure!(Instant::now() < deadline, "{} to {to}: not {who}, but {report:?}", from.name);
                thread::sleep(Duration::from_millis(100));
            }
        }
    }
    Ok(())
}

/// Answered or refused at every address of the Service, by every transport. By which way is told by the connection table, and by the
/// ICMP errors that came in: there is none of a refusal at `connect()`. The node's own processes have one way only.
fn asked(world: &World, answered: bool, per_packet: bool) -> Result<()> {
    let (pod, node): (&Place, &Place) = (world.pod("a1"), &world.node(1).place);
    for (family, transport) in Family::BOTH.into_iter().flat_map(|f| [(f, Transport::Tcp), (f, Transport::Udp)]) {
        let tcp = transport == Transport::Tcp;
        let port = if tcp { 80 } else { 53 };
        for to in [
            SocketAddr::new(vip(family, 1), port),
            SocketAddr::new(external(family, 1), port),
            SocketAddr::new(world.node(1).place.ip(family), if tcp { NODE_PORTS.0 } else { NODE_PORTS.1 }),
        ] {
            for (from, by_packets) in [(pod, per_packet), (node, false)] {
                let trace = || if answered { flows(world, to) } else { unreachables(from, family) };
                let before = trace()?;
                let report = world.ask(from, &Ask::new(to, transport).timeout(4000))?;
                let right = if answered {
                    report.backends().keys().eq(["b2"])
                } else {
                    report.errors().keys().eq(["ECONNREFUSED"])
                };
                ensure!(right, "{} to {to} {transport}: {report:?}", from.name);
                let after = trace()?;
                ensure!(
                    (after > before) == by_packets,
                    "{} to {to} {transport}: {before} before, {after} now",
                    from.name
                );
            }
        }
    }
    Ok(())
}

/// Errors of the kind "destination unreachable" that came in at a place so far.
fn unreachables(place: &Place, family: Family) -> Result<usize> {
    let read = |file: &str| place.namespace.output("cat", &[file]);
    let count = match family {
        // A line of names, a line of values.
        Family::V4 => {
            let shown = read("/proc/net/snmp")?;
            let mut lines = shown.lines().filter(|line| line.starts_with("Icmp:"));
            let (names, values) = lines.next().zip(lines.next()).context("no Icmp in /proc/net/snmp")?;
            let mut named = names.split(' ').zip(values.split(' '));
            named.find(|(name, _)| *name == "InDestUnreachs").map(|(_, value)| value.to_owned())
        }
        Family::V6 => {
            let shown = read("/proc/net/snmp6")?;
            let line = shown.lines().find_map(|line| line.strip_prefix("Icmp6InDestUnreachs"));
            line.map(|value| value.trim().to_owned())
        }
    };
    Ok(count.context("no count of errors")?.parse()?)
}

/// Whether what `from` opens goes per packet, by everything that a socket can do. The agent finds a pod's cgroup a moment later.
fn goes(world: &World, from: &str, per_packet: bool) -> Result<()> {
    let from = world.place(from).context("no such place")?;
    for family in Family::BOTH {
        for transport in [Transport::Tcp, Transport::Udp, Transport::UdpUnconnected] {
            let to = SocketAddr::new(vip(family, 1), if transport == Transport::Tcp { 80 } else { 53 });
            let deadline = Instant::now() + Duration::from_secs(5);
            loop {
                let before = flows(world, to)?;
                let report = world.ask(from, &Ask::new(to, transport).timeout(4000))?;
                ensure!(report.backends().keys().eq(["b2"]), "{} to {to} {transport}: {report:?}", from.name);
                if (flows(world, to)? > before) == per_packet {
                    break;
                }
                ensure!(Instant::now() < deadline, "{} to {to} {transport}: not per packet: {per_packet}", from.name);
                thread::sleep(Duration::from_millis(50));
            }
        }
    }
    Ok(())
}

fn asks(value: &str) -> Value {
    json!({ANNOTATION: value})
}

/// The others, and the node, stay as they are.
fn pod(world: &mut World) -> Result<()> {
    goes(world, "a1", false)?;
    world.apply(&[objects::pod(world.pod("a1"), asks("node")), objects::pod(world.pod("b1"), json!({}))])?;
    goes(world, "a1", true)?;
    goes(world, "b1", false)?;
    goes(world, "node1", false)?;
    // The other way to name a cgroup; and one of another node.
    world.apply(&[objects::pod(world.pod("b1"), asks("node")), objects::pod(world.pod("a2"), asks("node"))])?;
    goes(world, "b1", true)?;
    world.apply(&[objects::pod(world.pod("a1"), asks("all"))])?;
    goes(world, "a1", false)?;
    world.remove(&objects::pod(world.pod("b1"), json!({})))?;
    world.settle()?;
    goes(world, "b1", false)?;
    world.apply(&[objects::pod(world.pod("a1"), asks("off"))])?;
    let status = world.cli(world.node(1), &["status"])?;
    ensure!(status.contains("socket-lb \"off\" is not known"), "{status}");
    goes(world, "a1", false)
}

fn default_namespace(annotations: &Value) -> Value {
    json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "default", "annotations": annotations}})
}

fn namespace(world: &mut World) -> Result<()> {
    world.apply(&[
        default_namespace(&asks("node")),
        objects::pod(world.pod("a1"), json!({})),
        objects::pod(world.pod("b1"), asks("all")),
    ])?;
    goes(world, "a1", true)?;
    goes(world, "b1", false)?;
    world.apply(&[default_namespace(&json!({}))])?;
    goes(world, "a1", false)
}

/// A connection keeps its backend whichever way it was opened, and whatever is asked for later.
fn open(world: &mut World) -> Result<()> {
    let start = |world: &World| -> Result<Vec<Client>> {
        let mut held = Vec::new();
        for (n, family) in Family::BOTH.into_iter().enumerate() {
            let web = SocketAddr::new(vip(family, 1), 80).to_string();
            let dns = SocketAddr::new(vip(family, 1), 53).to_string();
            held.push(vec!["hold".to_owned(), web, "--connections=3".to_owned(), "--interval=50".to_owned()]);
            held.push(vec!["talk".to_owned(), dns, format!("--source-port={}", 31_000 + n)]);
        }
        held.into_iter()
            .map(|args| {
                let mut client = world.pod("a1").start(&world.programs().testpod, &args)?;
                client.wait_for_line("ready", Duration::from_secs(5))?;
                Ok(client)
            })
            .collect()
    };
    let mut later = start(world)?;
    world.apply(&[objects::pod(world.pod("a1"), asks("node"))])?;
    goes(world, "a1", true)?;
    thread::sleep(Duration::from_millis(300));
    for n in [1, 0] {
        let talk: talk::Report = later.remove(2 * n + 1).finish(Duration::from_secs(5))?;
        let seen = talk.backends(0, u64::MAX);
        ensure!(seen == ["b2:8080"] && talk.errors().is_empty() && talk.sockets == 1, "{seen:?} {:?}", talk.errors());
        let hold: hold::Report = later.remove(2 * n).finish(Duration::from_secs(5))?;
        ensure!(hold.broken.is_empty() && hold.wrong.is_empty() && hold.rounds > 1, "{hold:?}");
    }
    Ok(())
}

fn restart(world: &mut World) -> Result<()> {
    world.apply(&[objects::pod(world.pod("a1"), asks("node"))])?;
    goes(world, "a1", true)?;
    world.kill_agent(1)?;
    goes(world, "a1", true)?;
    world.start_agent(1, &options(true))?;
    // Never translated, at no moment of the start.
    let to = SocketAddr::new(vip(Family::V4, 1), 80);
    let deadline = Instant::now() + Duration::from_secs(3);
    while Instant::now() < deadline {
        let before = flows(world, to)?;
        world.ask(world.pod("a1"), &Ask::new(to, Transport::Tcp))?;
        ensure!(flows(world, to)? > before, "translated at connect time");
    }
    world.node(1).wait_ready(Duration::from_secs(10))?;
    world.settle()?;
    goes(world, "b1", false)?;
    // Without the option nobody asks.
    world.kill_agent(1)?;
    world.start_agent(1, &options(false))?;
    world.node(1).wait_ready(Duration::from_secs(10))?;
    goes(world, "a1", false)?;
    ensure!(world.node(1).pinned_map("left_pods")?.is_empty(), "a pod is left in the map");
    world.start_agent(1, &options(true))?;
    world.node(1).wait_ready(Duration::from_secs(10))?;
    goes(world, "a1", true)
}

/// Its sockets are the node's, which have no other way.
fn host_network(world: &mut World) -> Result<()> {
    let mut pod = objects::pod(world.pod("c1"), asks("node"));
    pod["spec"]["hostNetwork"] = true.into();
    world.apply(&[pod])?;
    let status = world.cli(world.node(1), &["status"])?;
    ensure!(status.contains("Pod default/c1") && status.contains("node's network"), "{status}");
    goes(world, "c1", false)
}

/// Those of the per-packet path.
fn flows(world: &World, to: SocketAddr) -> Result<usize> {
    let list: Value = serde_json::from_str(&world.cli(world.node(1), &["connections", "-o", "json"])?)?;
    let items = list["items"].as_array().with_context(|| format!("no list: {list}"))?;
    let leads_there =
        |item: &&Value| item["frontend"]["address"] == to.ip().to_string() && item["frontend"]["port"] == to.port();
    Ok(items.iter().filter(leads_there).count())
}
