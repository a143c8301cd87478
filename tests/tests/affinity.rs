//! Session affinity through the real agent (contract A9): pods translated at connect time and per packet.
//!
//! With four backends and a dozen clients, that all of them stay where they were by chance happens once in ten million runs.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    process::ExitCode,
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use proxy_tests::{
    pod::{hold, socket::Transport},
    suite::Suite,
    world::{
        AgentOptions, Ask, Client, Family, Place, Programs, SocketLb, Spec, Topology, World, external, objects, vip,
    },
};
use serde_json::Value;

const BACKENDS: [&str; 4] = ["b1", "c1", "b2", "c2"];
const HOUR: u32 = 3600;

fn main() -> ExitCode {
    Suite::in_worlds("affinity", Suite::every_way("affinity"), prepare, cases)
}

fn cases(suite: &mut Suite, group: &str, options: &AgentOptions, world: &mut World) {
    suite.case(&format!("{group}/A95 A100: one backend for every address of a port"), || shared(world));
    suite.case(&format!("{group}/A97: ports of a Service are apart"), || ports(world));
    suite.case(&format!("{group}/A96 A101: until nobody has connected for so long"), || expiry(world));
    suite.case(&format!("{group}/A98: a backend that goes is forgotten"), || fail_over(world));
    suite.case(&format!("{group}/A98 A100: a policy that takes the backend out goes first"), || policy(world));
    suite.case(&format!("{group}/A99: on, off and on again"), || toggle(world));
    suite.case(&format!("{group}/A102: a restart forgets nobody"), || restart(world, options));
    // The table of clients, and ids in it, are eBPF's.
    if options.fallback.is_none() {
        suite.case(&format!("{group}/the command shows who is remembered"), || shown(world, options.socket_lb));
        suite.case(&format!("{group}/a new Service inherits nobody's clients"), || inherits_nothing(world, options));
    }
}

fn prepare(programs: Programs, options: &AgentOptions) -> Result<World> {
    let spec = Spec::two_nodes(Topology::Routed);
    World::serving(&spec, programs, options, objects::nodes)
}

fn port(transport: Transport) -> u16 {
    if transport == Transport::Tcp { 80 } else { 53 }
}

fn node_port(number: u8, transport: Transport) -> u16 {
    30_000 + 10 * u16::from(number) + u16::from(transport != Transport::Tcp)
}

/// A Service with all that leads to one: addresses end in `number`.
fn service(number: u8, affinity: Option<u32>) -> objects::Service {
    objects::service(&format!("sticky-{number}"))
        .cluster_ips(&Family::BOTH.map(|family| vip(family, number)))
        .port("web", "TCP", port(Transport::Tcp))
        .node_port(node_port(number, Transport::Tcp))
        .port("dns", "UDP", port(Transport::Udp))
        .node_port(node_port(number, Transport::Udp))
        .load_balancer(&Family::BOTH.map(|family| external(family, number)))
        .affinity(affinity)
}

fn slices(world: &World, number: u8, backends: &[&str]) -> Vec<Value> {
    let places = || backends.iter().map(|name| world.pod(name));
    let slice = |family| {
        objects::slice(&format!("sticky-{number}"), family)
            .port("web", "TCP", 8080)
            .port("dns", "UDP", 8080)
            .endpoints(places())
            .json()
    };
    Family::BOTH.map(slice).to_vec()
}

fn install(world: &mut World, number: u8, affinity: Option<u32>, backends: &[&str]) -> Result<()> {
    let objects = [vec![service(number, affinity).json()], slices(world, number, backends)].concat();
    world.apply(&objects)
}

/// Who asks, over which family and which transport.
type Asker = (&'static str, Family, Transport);

/// One of each origin; the two transports are two ports of the Service.
fn askers() -> Vec<Asker> {
    let mut askers = Vec::new();
    for from in ["a1", "node1", "outside"] {
        for family in Family::BOTH {
            askers.extend([Transport::Tcp, Transport::Udp].map(|transport| (from, family, transport)));
        }
    }
    askers
}

fn place<'a>(world: &'a World, name: &str) -> Result<&'a Place> {
    world.place(name).with_context(|| format!("no place {name}"))
}

/// All who answer; every time somebody has to.
fn who(world: &World, from: &str, to: SocketAddr, transport: Transport, count: u32) -> Result<BTreeSet<String>> {
    let report = world.ask(place(world, from)?, &Ask::new(to, transport).times(count))?;
    ensure!(report.errors().is_empty(), "{from} to {to} {transport}: {:?}", report.errors());
    Ok(report.backends().into_keys().collect())
}

fn cluster_ip(number: u8, family: Family, transport: Transport) -> SocketAddr {
    SocketAddr::new(vip(family, number), port(transport))
}

/// The one that answers the asker at the cluster IP, over UDP both kinds of sockets.
fn the_one(world: &World, number: u8, (from, family, transport): Asker) -> Result<String> {
    let to = cluster_ip(number, family, transport);
    let mut seen = who(world, from, to, transport, 3)?;
    if transport == Transport::Udp {
        seen.extend(who(world, from, to, Transport::UdpUnconnected, 2)?);
    }
    ensure!(seen.len() == 1, "{from} to {to} {transport}: answered by {seen:?}");
    seen.pop_first().context("nobody")
}

type Where = BTreeMap<String, String>;

fn everybody(world: &World, number: u8) -> Result<Where> {
    let one = |asker: Asker| {
        let (from, family, transport) = asker;
        Ok((format!("{from} {family} {transport}"), the_one(world, number, asker)?))
    };
    askers().into_iter().map(one).collect()
}

fn stays(world: &World, number: u8, was: &Where, when: &str) -> Result<()> {
    let is = everybody(world, number)?;
    ensure!(is == *was, "{when}: was {was:?}, is {is:?}");
    Ok(())
}

fn shared(world: &mut World) -> Result<()> {
    install(world, 1, Some(HOUR), &BACKENDS)?;
    let first = everybody(world, 1)?;
    let distinct: BTreeSet<&String> = first.values().collect();
    ensure!(distinct.len() > 1, "everybody is sent to {distinct:?}");
    let node = world.node(1).place.clone();
    for (from, family, transport) in askers() {
        let one = &first[&format!("{from} {family} {transport}")];
        let ways = [
            SocketAddr::new(external(family, 1), port(transport)),
            node.at(family, node_port(1, transport)),
            cluster_ip(1, family, transport),
        ];
        for to in ways {
            let seen = who(world, from, to, transport, 5)?;
            ensure!(seen.iter().eq([one]), "{from} to {to} {transport}: {seen:?}, at the cluster IP {one}");
        }
    }
    Ok(())
}

fn ports(world: &mut World) -> Result<()> {
    // As many ports as it takes: two that agree prove nothing.
    let mut service = objects::service("sticky-2").cluster_ips(&Family::BOTH.map(|family| vip(family, 2)));
    let numbers = 8001..8013;
    for number in numbers.clone() {
        service = service.port(&format!("p{number}"), "TCP", number);
    }
    let mut objects = vec![service.affinity(Some(HOUR)).json()];
    for family in Family::BOTH {
        let mut slice = objects::slice("sticky-2", family);
        for number in numbers.clone() {
            slice = slice.port(&format!("p{number}"), "TCP", 8080);
        }
        objects.push(slice.endpoints(BACKENDS.map(|name| world.pod(name))).json());
    }
    world.apply(&objects)?;
    for from in ["a1", "node1", "outside"] {
        let ask = |number| -> Result<String> {
            let mut seen = who(world, from, SocketAddr::new(vip(Family::V4, 2), number), Transport::Tcp, 4)?;
            ensure!(seen.len() == 1, "{from} to port {number}: {seen:?}");
            seen.pop_first().context("nobody")
        };
        let first: Vec<String> = numbers.clone().map(ask).collect::<Result<_>>()?;
        ensure!(first.iter().collect::<BTreeSet<_>>().len() > 1, "{from}: {first:?}");
        let again: Vec<String> = numbers.clone().map(ask).collect::<Result<_>>()?;
        ensure!(first == again, "{from}: {first:?}, then {again:?}");
    }
    Ok(())
}

fn expiry(world: &mut World) -> Result<()> {
    const SECONDS: u32 = 8;
    install(world, 3, Some(SECONDS), &BACKENDS)?;
    let first = everybody(world, 3)?;
    // Longer than it lasts, all in all.
    for _ in 0..3 {
        thread::sleep(Duration::from_secs(4));
        stays(world, 3, &first, "connections put it off")?;
    }
    thread::sleep(Duration::from_secs(u64::from(SECONDS) + 2));
    let later = everybody(world, 3)?;
    ensure!(later != first, "nobody was sent elsewhere: {later:?}");
    stays(world, 3, &later, "remembered anew")
}

fn fail_over(world: &mut World) -> Result<()> {
    install(world, 4, Some(HOUR), &BACKENDS)?;
    let first = everybody(world, 4)?;
    let left = ["c1", "b2"];
    install(world, 4, Some(HOUR), &left)?;
    let second = everybody(world, 4)?;
    for (asker, backend) in &second {
        let was = &first[asker];
        let expected: BTreeSet<&str> = if left.contains(&was.as_str()) { [was.as_str()].into() } else { left.into() };
        ensure!(expected.contains(backend.as_str()), "{asker}: from {was} to {backend}, expected {expected:?}");
    }
    ensure!(first != second, "nobody was with those that went: {first:?}");
    install(world, 4, Some(HOUR), &BACKENDS)?;
    stays(world, 4, &second, "with those that came back")
}

/// By the cluster IP anybody is sent anywhere, by the NodePort from outside to local ones: who is not among them is forgotten for good.
fn policy(world: &mut World) -> Result<()> {
    let number = 5;
    let objects =
        [vec![service(number, Some(HOUR)).external_local().json()], slices(world, number, &["b1", "b2", "c2"])]
            .concat();
    world.apply(&objects)?;
    let node = world.node(1).place.clone();
    let outside = world.outside().clone();
    for family in Family::BOTH {
        for transport in [Transport::Tcp, Transport::Udp] {
            who(world, "outside", cluster_ip(number, family, transport), transport, 1)?;
            let to = node.at(family, node_port(number, transport));
            let report = world.ask(&outside, &Ask::new(to, transport).times(5))?;
            ensure!(report.backends().keys().eq(["b1"]), "{to} {transport}: {report:?}");
            for answer in report.tries.iter().filter_map(|one| one.answer.as_ref()) {
                let peer: SocketAddr = answer.peer.parse()?;
                ensure!(peer.ip() == outside.ip(family), "{to} {transport}: b1 saw {peer}");
            }
            let seen = who(world, "outside", cluster_ip(number, family, transport), transport, 8)?;
            ensure!(seen.iter().eq(["b1"]), "{family} {transport}: {seen:?} at the cluster IP afterwards");
        }
    }
    Ok(())
}

/// Connections of one socket each, in use all the time.
fn hold(world: &World, number: u8) -> Result<Vec<(String, Client)>> {
    let mut held = Vec::new();
    for from in ["a1", "node1", "outside"] {
        for family in Family::BOTH {
            let to = cluster_ip(number, family, Transport::Tcp);
            let args = ["hold".to_owned(), to.to_string(), "--connections=4".to_owned(), "--interval=50".to_owned()];
            let mut client = place(world, from)?.start(&world.programs().testpod, &args)?;
            client.wait_for_line("ready", Duration::from_secs(5))?;
            held.push((format!("{from} to {to}"), client));
        }
    }
    Ok(held)
}

fn toggle(world: &mut World) -> Result<()> {
    let spread = |world: &World| -> Result<()> {
        for (from, family, transport) in askers() {
            let seen = who(world, from, cluster_ip(6, family, transport), transport, 12)?;
            ensure!(seen.len() > 1, "{from} {family} {transport}: {seen:?} only");
        }
        Ok(())
    };
    install(world, 6, None, &BACKENDS)?;
    let held = hold(world, 6)?;
    spread(world)?;
    install(world, 6, Some(HOUR), &BACKENDS)?;
    let first = everybody(world, 6)?;
    stays(world, 6, &first, "on")?;
    install(world, 6, None, &BACKENDS)?;
    spread(world)?;
    install(world, 6, Some(HOUR), &BACKENDS)?;
    let second = everybody(world, 6)?;
    stays(world, 6, &second, "on again")?;
    for (what, client) in held {
        let report: hold::Report = client.finish(Duration::from_secs(5))?;
        ensure!(report.broken.is_empty() && report.wrong.is_empty() && report.rounds > 3, "{what}: {report:?}");
    }
    Ok(())
}

/// What `proxy-agent affinity` says of a node: client to backend, for the web port of a Service.
fn rows(world: &World, node: usize, args: &[&str]) -> Result<Vec<Value>> {
    let shown = world.cli(world.node(node), &[&["affinity", "-o", "json"], args].concat())?;
    let shown: Value = serde_json::from_str(&shown)?;
    ensure!(shown["kind"] == "AffinityList", "{shown}");
    shown["items"].as_array().cloned().context("no items")
}

fn shown(world: &mut World, socket_lb: SocketLb) -> Result<()> {
    install(world, 7, Some(HOUR), &BACKENDS)?;
    let asked = everybody(world, 7)?;
    let rows = rows(world, 1, &["--service", "default/sticky-7"])?;
    // Over each family and port: the pod, the node, the one outside.
    ensure!(rows.len() == 12, "{} rows: {rows:#?}", rows.len());
    for (from, family, transport) in askers() {
        let backend = &asked[&format!("{from} {family} {transport}")];
        let at = world.pod(backend).ip(family).to_string();
        let name = if transport == Transport::Tcp { "web" } else { "dns" };
        let of = |row: &&Value| {
            let client = &row["client"];
            let known = match from {
                "node1" => client["node"] == true,
                "a1" if socket_lb == SocketLb::All => client["node"] == false && client["netnsCookie"].is_u64(),
                _ => world.place(from).is_some_and(|place| client["address"] == place.ip(family).to_string()),
            };
            known && row["portName"] == name && row["backend"]["address"] == at
        };
        let mut found = rows.iter().filter(of);
        let row = found.next().with_context(|| format!("{from} {family} {transport} at {at} is not in {rows:#?}"))?;
        let (age, left) = (row["ageSeconds"].as_u64(), row["remainingSeconds"].as_u64());
        ensure!(age.is_some_and(|age| age < 60) && row["state"] == "Active", "{row}");
        ensure!(age.zip(left).is_some_and(|(age, left)| age + left == u64::from(HOUR)), "{row}");
    }
    let by_vip = self::rows(world, 1, &["--vip", &external(Family::V4, 7).to_string()])?;
    ensure!(by_vip.len() == rows.len(), "{} rows by the load balancer's address", by_vip.len());
    install(world, 7, Some(HOUR), &["a2"])?;
    let states = self::rows(world, 1, &["--service", "default/sticky-7"])?;
    ensure!(states.iter().all(|row| row["state"] == "BackendGone"), "{states:#?}");
    let status: Value = serde_json::from_str(&world.cli(world.node(1), &["status", "-o", "json"])?)?;
    let maps = status["kernel"]["maps"].as_array().context("no maps")?;
    let entries = |name: &str| maps.iter().find(|map| map["map"] == name).and_then(|map| map["entries"].as_u64());
    ensure!(entries("affinity_v4") >= Some(6) && entries("affinity_v6") >= Some(6), "{maps:#?}");
    Ok(())
}

fn restart(world: &mut World, options: &AgentOptions) -> Result<()> {
    install(world, 8, Some(HOUR), &BACKENDS)?;
    let first = everybody(world, 8)?;
    for node in [1, 2] {
        world.kill_agent(node)?;
    }
    stays(world, 8, &first, "with no agent")?;
    world.start_agents(options)?;
    world.settle()?;
    stays(world, 8, &first, "with another agent")?;
    // Other programs, too.
    let mut others = options.clone();
    others.extra.push("--masquerade-ports=2000-29000".to_owned());
    world.start_agents(&others)?;
    world.settle()?;
    stays(world, 8, &first, "with other programs")?;
    world.start_agents(options)?;
    world.settle()
}

/// Ids are used again, at once if an agent ended that had just freed one: who gets it starts with a clean sheet.
fn inherits_nothing(world: &mut World, options: &AgentOptions) -> Result<()> {
    install(world, 9, Some(HOUR), &BACKENDS)?;
    let mut first = everybody(world, 9)?;
    let ids = |world: &World, number: u8| -> Result<BTreeSet<u64>> {
        let shown = world.cli(world.node(1), &["services", "-o", "json", "-n", "default"])?;
        let shown: Value = serde_json::from_str(&shown)?;
        let name = format!("sticky-{number}");
        let rows = shown["items"].as_array().context("no items")?.iter().filter(|row| row["name"] == name.as_str());
        Ok(rows.filter_map(|row| row["serviceId"].as_u64()).collect())
    };
    let mut reused = 0;
    for number in 10..13_u8 {
        let before = ids(world, number - 1)?;
        world.remove(&service(number - 1, None).json())?;
        world.settle()?;
        for node in [1, 2] {
            world.kill_agent(node)?;
        }
        let objects = [vec![service(number, Some(HOUR)).json()], slices(world, number, &BACKENDS)].concat();
        for object in &objects {
            world.write(object)?;
        }
        world.start_agents(options)?;
        world.settle()?;
        reused += ids(world, number)?.intersection(&before).count();
        let next = everybody(world, number)?;
        ensure!(next != first, "{next:?} as for another Service before");
        first = next;
    }
    ensure!(reused > 0, "no id was used again");
    Ok(())
}
