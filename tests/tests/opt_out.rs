//! A Service that wants pods' sockets left alone, where all others are translated at connect time.

use std::{
    net::SocketAddr,
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use proxy_tests::{
    pod::socket::Transport,
    suite::Suite,
    world::{AgentOptions, Ask, Family, Place, Programs, SocketLb, Spec, Topology, World, objects, vip},
};
use serde_json::Value;

const ANNOTATION: &str = "proxy-agent/socket-lb";

fn main() -> ExitCode {
    let shapes = [("opt-out/all".to_owned(), SocketLb::All)];
    Suite::in_worlds("opt_out", shapes, prepare, |suite, group, _, world| {
        suite.case(&format!("{group}/a Service goes per packet, and comes back"), || service(world));
        suite.case(&format!("{group}/a ClusterIP that the node owns is left to it"), || own_address(world));
    })
}

fn prepare(programs: Programs, socket_lb: &SocketLb) -> Result<World> {
    World::serving(&Spec::two_nodes(Topology::Routed), programs, &AgentOptions::new(*socket_lb), |world| {
        let slice = |family| meshed_slice(world, family);
        [objects::nodes(world), vec![meshed(Some("node"))], Family::BOTH.map(slice).to_vec()].concat()
    })
}

fn meshed(annotation: Option<&str>) -> Value {
    let service = objects::service("meshed")
        .cluster_ips(&Family::BOTH.map(|family| vip(family, 1)))
        .port("web", "TCP", 80)
        .port("dns", "UDP", 53);
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

/// Answered or refused, by every transport; the connection table says by which way. The node's own processes have one way only.
fn asked(world: &World, answered: bool, per_packet: bool) -> Result<()> {
    let (pod, node): (&Place, &Place) = (world.pod("a1"), &world.node(1).place);
    for family in Family::BOTH {
        for transport in [Transport::Tcp, Transport::Udp] {
            let port = if transport == Transport::Tcp { 80 } else { 53 };
            let to = SocketAddr::new(vip(family, 1), port);
            for (from, in_table) in [(pod, per_packet), (node, false)] {
                let before = flows(world, to)?;
                let report = world.ask(from, &Ask::new(to, transport).timeout(4000))?;
                let right = if answered {
                    report.backends().keys().eq(["b2"])
                } else {
                    report.errors().keys().eq(["ECONNREFUSED"])
                };
                ensure!(right, "{} to {to} {transport}: {report:?}", from.name);
                let new = flows(world, to)? > before;
                ensure!(new == (in_table && answered), "{} to {to} {transport}: in the table: {new}", from.name);
            }
        }
    }
    Ok(())
}

/// Those of the per-packet path.
fn flows(world: &World, to: SocketAddr) -> Result<usize> {
    let list: Value = serde_json::from_str(&world.cli(world.node(1), &["connections", "-o", "json"])?)?;
    let items = list["items"].as_array().with_context(|| format!("no list: {list}"))?;
    let leads_there =
        |item: &&Value| item["frontend"]["address"] == to.ip().to_string() && item["frontend"]["port"] == to.port();
    Ok(items.iter().filter(leads_there).count())
}
