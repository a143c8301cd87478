//! What comes while the agent runs, and more of it than there is room for: a pod that is plugged in, and a map that is full.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    process::ExitCode,
};

use anyhow::{Context, Result, ensure};
use proxy_tests::{
    pod::socket::Transport,
    suite::Suite,
    world::{
        AgentOptions, Ask, Family, Place, Programs, SocketLb, Spec, Topology, World, objects, patience, vip, within,
    },
};
use serde_json::Value;

const WEB: u8 = 1;
/// The Service whose only endpoint is the pod that comes later.
const LATE: u8 = 2;
/// The Services that there is no room for, all of them.
const MANY: std::ops::Range<u8> = 100..140;
/// Entries of each family: enough for these, and for some of those.
const FRONTENDS: u32 = 32;

fn main() -> ExitCode {
    let shapes = [
        ("later/routed/all".to_owned(), (Topology::Routed, SocketLb::All)),
        ("later/bridge/node".to_owned(), (Topology::Bridge, SocketLb::Node)),
    ];
    Suite::in_worlds("later", shapes, prepare, |suite, group, _, world| {
        suite.case(&format!("{group}/a pod that is plugged in is served, and serves"), || plugged(world));
        suite.case(&format!("{group}/F21: what a full map has no room for waits, the others go on"), || full(world));
    })
}

fn prepare(programs: Programs, (topology, socket_lb): &(Topology, SocketLb)) -> Result<World> {
    let pods = ["b1", "b2"].map(str::to_owned).to_vec();
    let spec = Spec { nodes: vec![pods], ..Spec::two_nodes(*topology) };
    let extra = vec![format!("--map-frontends={FRONTENDS}")];
    World::serving(&spec, programs, &AgentOptions { extra, ..AgentOptions::new(*socket_lb) }, |world| {
        let endpoints = [world.pod("b1"), world.pod("b2")];
        [objects::nodes(world), service("web", WEB, &endpoints), service("late", LATE, &[])].concat()
    })
}

fn service(name: &str, number: u8, endpoints: &[&Place]) -> Vec<Value> {
    let service = objects::service(name).cluster_ips(&Family::BOTH.map(|family| vip(family, number)));
    let slice = |family| {
        let slice = objects::slice(name, family).port("web", "TCP", 8080).port("dns", "UDP", 8080);
        slice.endpoints(endpoints.iter().copied()).json()
    };
    [vec![service.port("web", "TCP", 80).port("dns", "UDP", 53).json()], Family::BOTH.map(slice).to_vec()].concat()
}

/// One port, so that it takes two entries.
fn small(name: &str, number: u8, endpoint: &Place) -> Vec<Value> {
    let service = objects::service(name).cluster_ips(&Family::BOTH.map(|family| vip(family, number)));
    let slice = |family| objects::slice(name, family).port("web", "TCP", 8080).endpoint(endpoint).json();
    [vec![service.port("web", "TCP", 80).json()], Family::BOTH.map(slice).to_vec()].concat()
}

fn eventually(check: impl Fn() -> Result<()>) -> Result<()> {
    within(patience(30), check)
}

/// All of them answer, nobody else; sockets see the VIP throughout, and the backends one of these sources.
fn served(world: &World, from: &Place, number: u8, backends: &[&str], sources: &BTreeSet<IpAddr>) -> Result<()> {
    for family in Family::BOTH {
        for transport in [Transport::Tcp, Transport::Udp, Transport::UdpUnconnected] {
            let to = SocketAddr::new(vip(family, number), if transport == Transport::Tcp { 80 } else { 53 });
            let what = format!("{} -> {to} {transport}", from.name);
            let count = if backends.len() > 1 { 40 } else { 4 };
            let report = world.ask(from, &Ask::new(to, transport).times(count).with("--fail-fast"))?;
            let seen = report.backends();
            ensure!(report.errors().is_empty(), "{what}: {:?}", report.errors());
            ensure!(seen.keys().map(String::as_str).eq(backends.iter().copied()), "{what}: {seen:?}, not {backends:?}");
            for one in &report.tries {
                let name = Some(to.to_string());
                ensure!(transport == Transport::UdpUnconnected || one.peer_name == name, "{what}: {:?}", one.peer_name);
                ensure!(transport == Transport::Tcp || one.from == name, "{what}: from {:?}", one.from);
                let peer: SocketAddr = one.answer.as_ref().context("no answer")?.peer.parse()?;
                ensure!(sources.contains(&peer.ip()), "{what}: seen as {peer}, not as one of {sources:?}");
            }
        }
    }
    Ok(())
}

fn own(place: &Place) -> BTreeSet<IpAddr> {
    Family::BOTH.map(|family| place.ip(family)).into()
}

/// The device of the pod's link, as `status` lists the hooks.
fn hooks(world: &World, pod: &Place) -> Result<BTreeSet<String>> {
    let (link, status) = (world.pod_link(pod), world.node(1).status()?);
    let hooks = status["hooks"].as_array().context("no hooks")?.iter().filter(|hook| hook["target"] == link.as_str());
    Ok(hooks.filter_map(|hook| hook["kind"].as_str().map(str::to_owned)).collect())
}

/// The agent hears of it by netlink, and of nothing else: no object names it before it asks.
fn plugged(world: &mut World) -> Result<()> {
    world.plug(1, "late")?;
    let world = &*world;
    let late = world.pod("late");
    eventually(|| served(world, late, WEB, &["b1", "b2"], &own(late)))?;
    eventually(|| {
        let hooks = hooks(world, late)?;
        ensure!(hooks.len() == 2, "{hooks:?} at the new pod's link");
        Ok(())
    })?;
    // By its Service to itself it is masqueraded (A70), unless its socket was pointed there.
    service("late", LATE, &[late]).iter().try_for_each(|object| world.write(object))?;
    eventually(|| served(world, world.pod("b1"), LATE, &["late"], &own(world.pod("b1"))))?;
    let node = world.node_addresses(1)?;
    let sources = own(world.pod("b1")).into_iter().chain(node.clone()).collect();
    served(world, late, LATE, &["late"], &node.iter().copied().chain(own(late)).collect())?;
    served(world, &world.node(1).place, LATE, &["late"], &node)?;
    // What masquerades is at its own link.
    served(world, world.outside(), LATE, &["late"], &node)?;
    served(world, world.outside(), WEB, &["b1", "b2"], &node)?;
    world.unplug(late)?;
    eventually(|| {
        let hooks = hooks(world, late)?;
        ensure!(hooks.is_empty(), "{hooks:?} at a link that is gone");
        let status = world.node(1).status()?;
        ensure!(status["failedDevices"].as_object().is_some_and(serde_json::Map::is_empty), "{status:#}");
        Ok(())
    })?;
    served(world, world.pod("b1"), WEB, &["b1", "b2"], &sources)
}

/// What is not in force, by address, and why.
fn waiting(world: &World) -> Result<Vec<(IpAddr, String)>> {
    let status = world.node(1).status()?;
    let waiting = status["unprogrammed"].as_array().context("no list")?.iter();
    waiting
        .map(|row| {
            let address = row["address"].as_str().context("no address")?.parse()?;
            Ok((address, row["reason"].as_str().unwrap_or_default().to_owned()))
        })
        .collect()
}

fn answers(world: &World, address: IpAddr) -> Result<bool> {
    let ask = Ask::new(SocketAddr::new(address, 80), Transport::Tcp).timeout(250);
    Ok(!world.ask(world.pod("b1"), &ask)?.backends().is_empty())
}

fn full(world: &mut World) -> Result<()> {
    let world = &*world;
    // Who comes back to itself is masqueraded (A70).
    let sources = own(world.pod("b1")).into_iter().chain(world.node_addresses(1)?).collect();
    let many: Vec<(u8, Vec<Value>)> =
        MANY.map(|number| (number, small(&format!("many-{number}"), number, world.pod("b2")))).collect();
    many.iter().flat_map(|(_, objects)| objects).try_for_each(|object| world.write(object))?;
    let all: BTreeSet<IpAddr> = MANY.flat_map(|number| Family::BOTH.map(|family| vip(family, number))).collect();
    eventually(|| {
        let status = world.node(1).status()?;
        let (waiting, services) = (waiting(world)?, status["services"].as_u64());
        ensure!(services >= Some(u64::from(MANY.end - MANY.start)), "{services:?} Services are known");
        ensure!(
            Family::BOTH.iter().all(|&f| waiting.iter().any(|(a, _)| a.is_ipv4() == (f == Family::V4))),
            "{waiting:?}"
        );
        ensure!(status["frontends"]["degraded"].as_u64() == Some(waiting.len() as u64), "{}", status["frontends"]);
        ensure!(status["frontends"]["pending"] == 0, "{}", status["frontends"]);
        Ok(())
    })?;
    let without: BTreeSet<IpAddr> = {
        let waiting = waiting(world)?;
        for (address, why) in &waiting {
            let family = if address.is_ipv4() { "v4" } else { "v6" };
            let text = format!("frontends_{family} is full ({FRONTENDS} entries): raise --map-frontends");
            ensure!(all.contains(address) && why.contains(&text), "{address}: {why}");
        }
        waiting.into_iter().map(|(address, _)| address).collect()
    };
    ensure!(without.len() < all.len(), "nothing of it is in force");
    for address in &all {
        let (answers, wanted) = (answers(world, *address)?, !without.contains(address));
        ensure!(answers == wanted, "{address} {}", if wanted { "does not answer" } else { "answers" });
    }
    // Nor was there room for guards, who come after them.
    let guards = world.node(1).status()?["failedGuards"].clone();
    ensure!(guards.as_object().is_some_and(|all| !all.is_empty()), "{guards}");
    let page = world.cli(world.node(1), &["status"])?;
    ensure!(page.contains("raise --map-frontends"), "{page}");
    served(world, world.pod("b1"), WEB, &["b1", "b2"], &sources)?;
    served(world, world.outside(), WEB, &["b1", "b2"], &world.node_addresses(1)?)?;

    // Room is made, by whatever is taken away; who waited comes in without being written again.
    let kept = MANY.end - 5..MANY.end;
    for (_, objects) in many.iter().filter(|(number, _)| !kept.contains(number)) {
        objects.iter().try_for_each(|object| world.remove(object))?;
    }
    eventually(|| {
        let status = world.node(1).status()?;
        ensure!(waiting(world)?.is_empty() && status["frontends"]["degraded"] == 0, "{:#}", status["unprogrammed"]);
        ensure!(
            status["failedGuards"].as_object().is_some_and(serde_json::Map::is_empty),
            "{}",
            status["failedGuards"]
        );
        for address in kept.clone().flat_map(|number| Family::BOTH.map(|family| vip(family, number))) {
            ensure!(answers(world, address)?, "{address} does not answer");
        }
        Ok(())
    })?;
    for (_, objects) in many.iter().filter(|(number, _)| kept.contains(number)) {
        objects.iter().try_for_each(|object| world.remove(object))?;
    }
    served(world, world.pod("b1"), WEB, &["b1", "b2"], &sources)
}
