//! Who is a pod of this node, by each `--detect-local-mode` and its options (contract A72), as the packets tell: a pod keeps its address on its
//! way to a ClusterIP, and reaches a node port with externalTrafficPolicy Local although no endpoint is here; who is none is
//! masqueraded, and dropped (A63, A67, A68).

use std::{
    net::{IpAddr, SocketAddr},
    process::ExitCode,
};

use anyhow::{Context, Result, ensure};
use proxy_tests::{
    pod::socket::Transport,
    suite::Suite,
    world::{AgentOptions, Ask, Family, Place, Programs, SocketLb, Spec, Topology, World, objects, vip},
};

const NODE_PORT: u16 = 30_080;

/// Options, and whether the pods are told by them.
type Mode = (&'static str, &'static [&'static str], bool);

const ROUTED: [Mode; 6] = [
    ("ClusterCIDR", &["--detect-local-mode=ClusterCIDR", "--cluster-cidr=10.244.0.0/16,fd00:244::/32"], true),
    ("ClusterCIDR of others", &["--detect-local-mode=ClusterCIDR", "--cluster-cidr=10.99.0.0/16,fd00:99::/32"], false),
    ("InterfaceNamePrefix", &["--detect-local-mode=InterfaceNamePrefix", "--pod-interface-name-prefix=cali"], true),
    ("NodeCIDR", &["--detect-local-mode=NodeCIDR"], true),
    ("a prefix of others", &["--detect-local-mode=InterfaceNamePrefix", "--pod-interface-name-prefix=veth"], false),
    // An address range alone is no mode.
    ("roles", &["--cluster-cidr=10.99.0.0/16,fd00:99::/32"], true),
];

const BRIDGE: [Mode; 4] = [
    ("BridgeInterface", &["--detect-local-mode=BridgeInterface", "--pod-bridge-interface=cni0"], true),
    ("another bridge", &["--detect-local-mode=BridgeInterface", "--pod-bridge-interface=cni1"], false),
    ("the bridge's prefix", &["--detect-local-mode=InterfaceNamePrefix", "--pod-interface-name-prefix=cni"], true),
    ("roles", &[], true),
];

fn main() -> ExitCode {
    let shapes: [(&str, Topology, &'static [Mode]); 2] =
        [("routed", Topology::Routed, &ROUTED), ("bridge", Topology::Bridge, &BRIDGE)];
    let shapes = shapes.map(|(name, topology, modes)| (format!("local_detection/{name}"), (topology, modes)));
    Suite::in_worlds("local_detection", shapes, prepare, |suite, group, (_, modes), world| {
        // One after the other on the same pins: what the mode before left in the kernel counts no more.
        for (name, options, told) in *modes {
            suite.case(&format!("{group}/{name}"), || restarted(world, options, *told));
        }
    })
}

fn options(extra: &[&str]) -> AgentOptions {
    AgentOptions { extra: extra.iter().map(|word| (*word).to_owned()).collect(), ..AgentOptions::new(SocketLb::Node) }
}

fn prepare(programs: Programs, (topology, _): &(Topology, &'static [Mode])) -> Result<World> {
    World::serving(&Spec::two_nodes(*topology), programs, &options(&[]), |world| {
        let service = objects::service("far")
            .cluster_ips(&Family::BOTH.map(|family| vip(family, 1)))
            .port("web", "TCP", 80)
            .node_port(NODE_PORT)
            .external_local();
        let slice = |family| objects::slice("far", family).port("web", "TCP", 8080).endpoint(world.pod("b2")).json();
        [objects::nodes(world), vec![service.json()], Family::BOTH.map(slice).to_vec()].concat()
    })
}

fn restarted(world: &mut World, extra: &[&str], told: bool) -> Result<()> {
    for number in [1, 2] {
        world.kill_agent(number)?;
    }
    world.start_agents(&options(extra))?;
    world.settle()?;
    let (pod, outside) = (world.pod("a1"), world.outside());
    for family in Family::BOTH {
        let to = SocketAddr::new(vip(family, 1), 80);
        let seen = source(world, pod, to)?;
        ensure!((seen == pod.ip(family)) == told, "{} -> {to}: seen as {seen}", pod.name);
        ensure!(told || world.node_addresses(1)?.contains(&seen), "{} -> {to}: seen as {seen}", pod.name);
        let seen = source(world, outside, to)?;
        ensure!(world.node_addresses(1)?.contains(&seen), "outside -> {to}: seen as {seen}");

        let to = SocketAddr::new(world.node(1).place.ip(family), NODE_PORT);
        let report = world.ask(pod, &Ask::new(to, Transport::Tcp).timeout(if told { 4000 } else { 300 }))?;
        let right = if told { report.backends().keys().eq(["b2"]) } else { report.errors().keys().eq(["ETIMEDOUT"]) };
        ensure!(right, "{} -> {to}: {report:?}", pod.name);
        let report = world.ask(outside, &Ask::new(to, Transport::Tcp).timeout(300))?;
        ensure!(report.errors().keys().eq(["ETIMEDOUT"]), "outside -> {to}: {report:?}");
    }
    Ok(())
}

/// Whom the backend saw.
fn source(world: &World, from: &Place, to: SocketAddr) -> Result<IpAddr> {
    let report = world.ask(from, &Ask::new(to, Transport::Tcp))?;
    let answer = report.tries.first().and_then(|one| one.answer.as_ref());
    let answer = answer.with_context(|| format!("{} -> {to}: {report:?}", from.name))?;
    Ok(answer.peer.parse::<SocketAddr>()?.ip())
}
