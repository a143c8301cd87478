//! Endpoints that change a hundred times a second, and agents that die, under traffic: nobody notices.
//!
//! Every server stays alive throughout, so whoever was ever an endpoint of a Service can still answer for it: one that answers a new
//! connection when it is no longer chosen is seen, and so is a pod of another Service.

mod changes;
mod traffic;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    path::Path,
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use proxy_tests::{
    ahead::Ahead,
    feed::{self, Feed},
    pod::{hold, socket::Transport},
    suite::Suite,
    world::{
        AgentOptions, Ask, Family, Place, Programs, SocketLb, Spec, Topology, World, objects, patience,
        pins::{Pinned, changed},
        trace::Call,
        vip, within,
    },
};
use serde_json::Value;

use self::{changes::Changes, traffic::Traffic};

const RED: &str = "red";
const BLUE: &str = "blue";
/// Never changes.
const STILL: &str = "still";

fn main() -> ExitCode {
    Suite::in_worlds("churn", Suite::both_ways("churn"), prepare, cases)
}

fn cases(suite: &mut Suite, group: &str, socket_lb: &SocketLb, world: &mut World) {
    let options = AgentOptions::new(*socket_lb);
    suite.case(&format!("{group}/endpoints and Services come and go"), || lifecycle(world));
    suite.case(&format!("{group}/two Services claim one address, one claims a port twice: what is said"), || {
        conflicts(world)
    });
    suite.case(&format!("{group}/A45: connections outlive their endpoint's removal"), || removed_endpoint(world));
    suite.case(
        &format!("{group}/1000 connections, new ones over TCP and UDP, 100 changes a second, each in force"),
        || endpoint_churn(world, &options),
    );
    suite.case(&format!("{group}/A135: killed and started again under traffic"), || killed(world, &options));
    suite.case(&format!("{group}/a restart without a change writes nothing"), || idle_restart(world, &options));
    suite.case(&format!("{group}/what changed while no agent ran"), || changed_meanwhile(world, &options));
    // The last: its datagrams are masqueraded, to ports out of those that the node's own sockets are bound to where others ask.
    suite.case(&format!("{group}/new connections from outside to NodePorts while endpoints change"), || {
        node_port_churn(world, &options)
    });
}

fn prepare(programs: Programs, socket_lb: &SocketLb) -> Result<World> {
    let pods = [["client", "r1", "r2", "b1"], ["r3", "r4", "b2", "b3"]];
    let nodes = pods.iter().map(|names| names.iter().map(|&name| name.to_owned()).collect()).collect();
    let spec = Spec { nodes, ..Spec::two_nodes(Topology::Routed) };
    World::serving(&spec, programs, &AgentOptions::new(*socket_lb), |world| {
        let services =
            [(RED, number(RED)), (BLUE, number(BLUE)), (STILL, 63)].map(|(name, number)| service(name, number));
        let still = [world.pod("b1"), world.pod("b2")].to_vec();
        let places = [(RED, reds(world)), (BLUE, blues(world)), (STILL, still)];
        let slices = places.iter().flat_map(|(name, places)| Family::BOTH.map(|family| slice(name, family, places)));
        objects::nodes(world).into_iter().chain(services).chain(slices).collect()
    })
}

/// Both Services with all their endpoints, whatever the case before left.
fn all_in_force(world: &mut World) -> Result<()> {
    write_endpoints(world, RED, &reds(world))?;
    write_endpoints(world, BLUE, &blues(world))?;
    world.settle()
}

fn service(name: &str, number: u8) -> Value {
    let addresses = Family::BOTH.map(|family| vip(family, number));
    objects::service(name).cluster_ips(&addresses).port("web", "TCP", 80).port("dns", "UDP", 53).json()
}

/// The same, for those outside as well.
fn service_with_node_ports(name: &str, number: u8) -> Value {
    let addresses = Family::BOTH.map(|family| vip(family, number));
    let service = objects::service(name).cluster_ips(&addresses);
    let [web, dns] = node_ports(number);
    service.port("web", "TCP", 80).node_port(web).port("dns", "UDP", 53).node_port(dns).json()
}

/// Of TCP, of UDP.
fn node_ports(number: u8) -> [u16; 2] {
    [31_000, 31_500].map(|first| first + u16::from(number))
}

fn write_endpoints(world: &World, service: &str, places: &[&Place]) -> Result<()> {
    Family::BOTH.into_iter().try_for_each(|family| world.write(&slice(service, family, places)))
}

fn slice(service: &str, family: Family, places: &[&Place]) -> Value {
    objects::slice(service, family)
        .port("web", "TCP", 8080)
        .port("dns", "UDP", 8080)
        .endpoints(places.iter().copied())
        .json()
}

fn number(service: &str) -> u8 {
    if service == RED { 100 } else { 101 }
}

fn pods_of<'a>(world: &'a World, service: &str) -> Vec<&'a Place> {
    if service == RED { reds(world) } else { blues(world) }
}

fn reds(world: &World) -> Vec<&Place> {
    ["r1", "r2", "r3", "r4"].map(|name| world.pod(name)).to_vec()
}

fn blues(world: &World) -> Vec<&Place> {
    ["b1", "b2", "b3"].map(|name| world.pod(name)).to_vec()
}

fn names(places: &[&Place]) -> BTreeSet<String> {
    places.iter().map(|place| place.name.clone()).collect()
}

fn web(family: Family, number: u8) -> SocketAddr {
    SocketAddr::new(vip(family, number), 80)
}

fn origins(world: &World) -> [&Place; 3] {
    [world.pod("client"), &world.node(1).place, world.outside()]
}

/// Exactly these answer, from everywhere.
fn served_by(world: &World, number: u8, places: &[&Place]) -> Result<()> {
    for from in origins(world) {
        for family in Family::BOTH {
            for (transport, port) in [(Transport::Tcp, 80), (Transport::Udp, 53)] {
                let to = SocketAddr::new(vip(family, number), port);
                let tries = 20 * u32::try_from(places.len())?;
                let report = world.ask(from, &Ask::new(to, transport).times(tries))?;
                let seen: BTreeSet<String> = report.backends().into_keys().collect();
                ensure!(
                    report.errors().is_empty() && seen == names(places),
                    "{} -> {to} {transport}: {:?} {:?}, expected {:?}",
                    from.name,
                    report.backends(),
                    report.errors(),
                    names(places)
                );
            }
        }
    }
    Ok(())
}

fn unanswered(world: &World, number: u8, errno: Option<&str>) -> Result<()> {
    for from in origins(world) {
        for family in Family::BOTH {
            let to = web(family, number);
            // Per packet an IPv6 refusal may take the second SYN (see the cases of A81).
            let patience = if errno.is_some() { 3000 } else { 250 };
            let report = world.ask(from, &Ask::new(to, Transport::Tcp).timeout(patience))?;
            let right = errno.is_none_or(|errno| report.errors().keys().eq([errno]));
            ensure!(report.backends().is_empty() && right, "{} -> {to}: {report:?}", from.name);
        }
    }
    Ok(())
}

fn lifecycle(world: &mut World) -> Result<()> {
    let own = |world: &World, names: &[&str]| -> Result<()> {
        let places: Vec<&Place> = names.iter().map(|name| world.pod(name)).collect();
        write_endpoints(world, "short", &places)
    };
    own(world, &["r1"])?;
    world.apply(&[service("short", 60)])?;
    served_by(world, 60, &[world.pod("r1")])?;
    own(world, &["r3", "b3"])?;
    world.settle()?;
    served_by(world, 60, &[world.pod("r3"), world.pod("b3")])?;
    own(world, &[])?;
    world.settle()?;
    unanswered(world, 60, Some("ECONNREFUSED"))?;
    own(world, &["r4"])?;
    world.settle()?;
    served_by(world, 60, &[world.pod("r4")])?;
    // A13: the same name with another address.
    world.remove(&service("short", 60))?;
    world.settle()?;
    unanswered(world, 60, None)?;
    world.apply(&[service("short", 61)])?;
    served_by(world, 61, &[world.pod("r4")])?;
    unanswered(world, 60, None)?;
    world.remove(&service("short", 61))?;
    for family in Family::BOTH {
        world.remove(&slice("short", family, &[]))?;
    }
    world.settle()?;
    // An address that is nobody's goes where the routes say: to the sink, here.
    world.leaks().map(drop)
}

/// The older Service keeps what two claim, the first port what one claims twice; `services` and `status` say so, and stop saying so.
fn conflicts(world: &mut World) -> Result<()> {
    let aged = |year: u32, service: objects::Service| -> Value {
        let mut service = service.json();
        service["metadata"]["creationTimestamp"] = format!("{year}-01-01T00:00:00Z").into();
        service
    };
    let address = vip(Family::V4, 70);
    let of = |name: &str| objects::service(name).cluster_ips(&[address]).port("web", "TCP", 80);
    let older = aged(2020, of("older"));
    let younger = aged(2021, of("younger").port("own", "TCP", 81));
    let twice =
        objects::service("twice").cluster_ips(&[vip(Family::V4, 71)]).port("one", "TCP", 80).port("two", "TCP", 80);
    let twice = aged(2020, twice);
    world.apply(&[older.clone(), younger.clone(), twice.clone()])?;
    let node = world.node(1);
    let listed = |vip_number: u8| -> Result<Vec<String>> {
        let at = vip(Family::V4, vip_number).to_string();
        let shown = world.cli(node, &["services", "--no-headers", "--vip", &at])?;
        Ok(shown.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect())
    };
    let said = |world: &World| -> Result<Vec<String>> {
        let status = world.cli(world.node(1), &["status"])?;
        let problems = status.split_once("Problems of objects").map_or("", |(_, problems)| problems);
        let about =
            |line: &&str| ["default/older", "default/younger", "default/twice"].iter().any(|name| line.contains(name));
        Ok(problems.lines().filter(about).map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect())
    };
    let expected = [
        "default/older:web ClusterIP 10.96.0.70:80/TCP 0 Programmed",
        "default/younger:own ClusterIP 10.96.0.70:81/TCP 0 Programmed",
    ];
    ensure!(listed(70)? == expected, "services: {:?}", listed(70)?);
    ensure!(
        listed(71)? == ["default/twice:one ClusterIP 10.96.0.71:80/TCP 0 Programmed"],
        "services: {:?}",
        listed(71)?
    );
    let twice_line = "Service default/twice spec.ports[1].port: 80/TCP is there already, the first stands; give it another number or \
                      protocol";
    let expected = [
        twice_line,
        "Service default/younger 10.96.0.70:80/TCP is already used by default/older:web, which is older and keeps it; give one of \
         the two another address or port",
    ];
    // What is in force may be asked a moment before the report of it is out.
    let says = |world: &World, expected: &[&str]| {
        within(patience(5), || {
            let said = said(world)?;
            ensure!(said == expected, "status: {said:?}");
            Ok(())
        })
    };
    says(world, &expected)?;
    world.remove(&older)?;
    world.settle()?;
    says(world, &[twice_line])?;
    let heir = world.cli(world.node(1), &["services", "--no-headers", "--service", "default/younger"])?;
    ensure!(heir.contains("10.96.0.70:80/TCP") && heir.contains("10.96.0.70:81/TCP"), "services: {heir}");
    world.remove(&younger)?;
    world.remove(&twice)?;
    world.settle()
}

fn removed_endpoint(world: &mut World) -> Result<()> {
    let (r1, r3) = (world.pod("r1").clone(), world.pod("r3").clone());
    write_endpoints(world, RED, &[&r1, &r3])?;
    world.settle()?;
    let mut held = Vec::new();
    for from in origins(world) {
        for family in Family::BOTH {
            let args = ["hold", &web(family, 100).to_string(), "--connections=12", "--interval=50"].map(str::to_owned);
            let mut client = from.start(&world.programs().testpod, &args)?;
            client.wait_for_line("ready", Duration::from_secs(5))?;
            held.push((format!("{} {family}", from.name), client));
        }
    }
    let r4 = world.pod("r4").clone();
    write_endpoints(world, RED, &[&r4])?;
    world.settle()?;
    served_by(world, 100, &[&r4])?;
    write_endpoints(world, RED, &[])?;
    world.settle()?;
    unanswered(world, 100, Some("ECONNREFUSED"))?;
    thread::sleep(Duration::from_millis(300));
    for (what, client) in held {
        let report: hold::Report = client.finish(Duration::from_secs(5))?;
        ensure!(report.broken.is_empty() && report.wrong.is_empty() && report.rounds > 3, "{what}: {report:?}");
    }
    Ok(())
}

/// Small and the same in every run: a failure can be looked at again.
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Some of them, at least one.
    fn some<'a>(&mut self, places: &[&'a Place]) -> Vec<&'a Place> {
        let mask = self.roll();
        let always = usize::try_from(self.roll()).unwrap_or(0) % places.len();
        let chosen = places.iter().enumerate().filter(|(i, _)| *i == always || mask >> i & 1 == 1);
        chosen.map(|(_, place)| *place).collect()
    }
}

/// `times` changes, one every 10 ms, of red and blue, both families.
fn churn(world: &World, dice: &mut Dice, times: u32) -> Result<()> {
    let (reds, blues) = (reds(world), blues(world));
    let start = Instant::now();
    for turn in 0..times {
        let (name, all) = if turn % 3 == 0 { (BLUE, &blues) } else { (RED, &reds) };
        let family = if dice.roll() & 1 == 0 { Family::V4 } else { Family::V6 };
        let chosen = dice.some(all);
        world.write(&slice(name, family, &chosen))?;
        thread::sleep((Duration::from_millis(10) * (turn + 1)).saturating_sub(start.elapsed()));
    }
    Ok(())
}

/// Both nodes' agents follow what is said here, Services made by `service` among it; `dir` is where they are told so.
fn watched(world: &mut World, options: &AgentOptions, dir: &Path, service: fn(&str, u8) -> Value) -> Result<Feed> {
    all_in_force(world)?;
    let feed = Feed::default();
    objects::nodes(world).iter().try_for_each(|node| feed.set(node))?;
    for name in [RED, BLUE] {
        feed.set(&service(name, number(name)))?;
        for family in Family::BOTH {
            feed.set(&slice(name, family, &pods_of(world, name)))?;
        }
    }
    let ahead = Ahead::of_others();
    for number in [1, 2] {
        let at = world.node(number).place.namespace.enter(|| feed.serve())??;
        let kubeconfig = Some(feed::kubeconfig(dir, at)?);
        world.start_agent(number, &AgentOptions { kubeconfig, ..options.clone() })?;
    }
    for number in [1, 2] {
        world.node(number).wait_ready(Duration::from_secs(30))?;
    }
    drop(ahead);
    Ok(feed)
}

/// Of node1, since it began to count.
fn counted(world: &World, reason: &str) -> Result<u64> {
    let text = world.cli(world.node(1), &["counters", "-o", "json"])?;
    let counters: Value = serde_json::from_str(&text)?;
    let mut events = counters["events"].as_array().into_iter().flatten();
    let event = events.find(|event| event["reason"] == reason).with_context(|| format!("no {reason}: {text}"))?;
    event["count"].as_u64().context("a count")
}

/// Nobody is refused, nobody is answered by who was not chosen, and no packet is left over that belongs to nothing: at the node's own
/// addresses that is counted once nobody else translates.
fn node_port_churn(world: &mut World, options: &AgentOptions) -> Result<()> {
    const REASONS: [&str; 2] = ["not_a_syn", "rejected"];
    let dir = tempfile::tempdir()?;
    let feed = watched(world, options, dir.path(), service_with_node_ports)?;
    world.wait_until_alone(1)?;
    let before = REASONS.map(|reason| counted(world, reason));
    let traffic = Traffic::at_node_ports(world)?;
    let mut changes = Changes::new(world, &feed)?;
    let mut dice = Dice(0x2545_f491_4f6c_dd1d);
    for _ in 0..5 {
        changes.hundred(&mut dice)?;
    }
    for (service, last) in [(RED, ["r2", "r3"]), (BLUE, ["b1", "b3"])] {
        let last = last.map(|name| world.pod(name));
        for family in Family::BOTH {
            changes.choose(service, family, &last)?;
        }
    }
    thread::sleep(Duration::from_secs(1));
    let telling = changes.judge(&traffic.finish(0)?)?;
    println!("     {telling} answers by somebody chosen where another was not");
    for (reason, before) in REASONS.into_iter().zip(before) {
        let count = counted(world, reason)? - before?;
        ensure!(count == 0, "{count} packets of these connections count as {reason}");
    }
    Ok(())
}

/// Through the watch; the directory source waits for files to settle. A busy machine may spoil some seconds: then there are more of
/// them, and what is asked of every change is asked of all.
fn endpoint_churn(world: &mut World, options: &AgentOptions) -> Result<()> {
    const HUNDREDS: usize = 10;
    let dir = tempfile::tempdir()?;
    let feed = watched(world, options, dir.path(), service)?;
    let mut traffic = Traffic::start(world)?;
    traffic.add_datagrams(world, RED)?;
    let mut changes = Changes::new(world, &feed)?;
    let mut dice = Dice(0x9e37_79b9_7f4a_7c15);
    let mut took = Vec::new();
    let ahead = Ahead::of_others();
    let within = |took: &[Duration]| took.iter().filter(|took| **took <= Duration::from_secs(1)).count();
    while within(&took) < HUNDREDS && took.len() < 3 * HUNDREDS {
        took.push(changes.hundred(&mut dice)?);
    }
    let last = ["r2", "r3"].map(|name| world.pod(name));
    for family in Family::BOTH {
        changes.choose(RED, family, &last)?;
    }
    drop(ahead);
    // For connections that find what was chosen last.
    thread::sleep(Duration::from_secs(1));
    let telling = changes.judge(&traffic.finish(1000)?)?;
    took.sort();
    let (best, median) = (took.first().context("none")?, took.get(took.len() / 2).context("none")?);
    println!(
        "     {} times 100 changes, each in force before the next, in {best:.2?} at best, {median:.2?} as a rule; {telling} answers by \
         somebody chosen where another was not",
        took.len()
    );
    let enough = within(&took) >= HUNDREDS;
    ensure!(enough, "100 changes were in force within a second {} times only, and took {took:.2?}", within(&took));
    ensure!(telling > 500, "only {telling} answers could have been wrong");
    // Back to the directory, for the cases that follow.
    world.start_agents(options)?;
    all_in_force(world)
}

fn restart(world: &mut World, options: &AgentOptions) -> Result<()> {
    for number in [1, 2] {
        world.kill_agent(number)?;
    }
    thread::sleep(Duration::from_millis(300));
    world.start_agents(options)
}

/// With and without changes going on.
fn killed(world: &mut World, options: &AgentOptions) -> Result<()> {
    all_in_force(world)?;
    let traffic = Traffic::start(world)?;
    let mut dice = Dice(0x2545_f491_4f6c_dd1d);
    for _ in 0..2 {
        restart(world, options)?;
        thread::sleep(Duration::from_millis(500));
    }
    for _ in 0..3 {
        churn(world, &mut dice, 50)?;
        // In the middle of a change, as likely as not.
        for number in [1, 2] {
            world.kill_agent(number)?;
        }
        churn(world, &mut dice, 20)?;
        world.start_agents(options)?;
    }
    all_in_force(world)?;
    served_by(world, 100, &reds(world))?;
    served_by(world, 101, &blues(world))?;
    traffic.finish(1000).map(drop)
}

/// The same agents again, all their bpf(2) calls written down, and what they found and left.
fn traced_restart(
    world: &mut World,
    options: &AgentOptions,
    meanwhile: impl FnOnce(&World) -> Result<()>,
) -> Result<[(Pinned, Pinned, Vec<Call>); 2]> {
    for number in [1, 2] {
        world.kill_agent(number)?;
    }
    thread::sleep(Duration::from_millis(300));
    let before = [world.node(1).pinned()?, world.node(2).pinned()?];
    meanwhile(world)?;
    let mut options = AgentOptions { traced: true, ..options.clone() };
    // So that the comparison with the kernel, too, falls into the time that is looked at.
    options.extra.push("--sync-period=1s".to_owned());
    world.start_agents(&options)?;
    // Devices and hooks are looked at again in the first moments.
    thread::sleep(Duration::from_millis(1500));
    let mut seen = Vec::new();
    for (number, before) in [1, 2].into_iter().zip(before) {
        let node = world.node(number);
        let calls = node.bpf_calls()?;
        ensure!(
            calls.iter().any(|call| call.pin.as_deref() == Some("frontends_v4")),
            "node{number}: nothing was traced"
        );
        seen.push((before, node.pinned()?, calls));
    }
    seen.try_into().map_err(|_| anyhow::anyhow!("two nodes"))
}

/// What was written to a map: elements put, elements removed. Not told apart from them: an update that changes nothing.
fn writes(calls: &[Call], map: &str) -> (usize, usize) {
    let of = |command: &str| {
        let about = calls.iter().filter(|call| call.command.contains(command) && call.pin.as_deref() == Some(map));
        about.map(|call| call.count).sum()
    };
    (of("MAP_UPDATE"), of("MAP_DELETE"))
}

/// Only what changed is written, each once.
fn changed_meanwhile(world: &mut World, options: &AgentOptions) -> Result<()> {
    all_in_force(world)?;
    let r2 = world.pod("r2").clone();
    let nodes = traced_restart(world, options, |world| {
        // The datapath goes on with what it has.
        served_by(world, 101, &blues(world)).context("with no agent")?;
        write_endpoints(world, RED, &[&r2])?;
        world.write(&service("late", 62))?;
        write_endpoints(world, "late", &[&r2])?;
        world.remove(&service(BLUE, 101))
    })?;
    served_by(world, 100, &[&r2])?;
    served_by(world, 62, &[&r2])?;
    unanswered(world, 101, None)?;
    world.leaks()?;
    for (number, (before, after, calls)) in [1, 2].into_iter().zip(&nodes) {
        ensure!(before.ids == after.ids, "node{number}: {:?}", before.differences(after));
        for (map, family) in [("frontends_v4", Family::V4), ("frontends_v6", Family::V6)] {
            let (old, new) = (before.map(map), after.map(map));
            let about = |vip_number: u8| match vip(family, vip_number) {
                IpAddr::V4(ip) => ip.octets().to_vec(),
                IpAddr::V6(ip) => ip.octets().to_vec(),
            };
            let mut kinds: BTreeMap<(Vec<u8>, bool, bool), usize> = BTreeMap::new();
            for key in changed(old, new) {
                let address = key.get(..about(0).len()).unwrap_or_default().to_vec();
                *kinds.entry((address, old.contains_key(key), new.contains_key(key))).or_default() += 1;
            }
            // Two ports each; a guard comes and goes with its address, and does not change.
            let expected =
                [((about(100), true, true), 2), ((about(62), false, true), 3), ((about(101), true, false), 3)];
            ensure!(kinds == BTreeMap::from(expected), "node{number} {map}: changed {kinds:?}");
            let written = writes(calls, map);
            ensure!(
                written == (5, 3),
                "node{number} {map}: 5 elements differ and 3 are gone, but written were {written:?}"
            );
        }
        for map in ["devices", "meta"] {
            ensure!(writes(calls, map) == (0, 0), "node{number} {map}: written although nothing changed");
        }
        // One name for each port that came or went.
        ensure!(writes(calls, "names") == (2, 2), "node{number} names: {:?}", writes(calls, "names"));
    }
    Ok(())
}

/// A restart with nothing changed: the same maps, programs and links, byte for byte, and no call that writes. (A slot that is
/// stored again as it was shows in neither; the agent's own account has it.)
fn idle_restart(world: &mut World, options: &AgentOptions) -> Result<()> {
    all_in_force(world)?;
    world.wait_until_alone(1)?;
    world.wait_until_alone(2)?;
    let nodes = traced_restart(world, options, |_| Ok(()))?;
    for (number, (before, after, calls)) in [1, 2].into_iter().zip(&nodes) {
        ensure!(before == after, "node{number}: {:#?}", before.differences(after));
        ensure!(!after.map("slots_v4").is_empty() && !after.map("slots_v6").is_empty(), "node{number}: no slots seen");
        let writing: Vec<&Call> = calls.iter().filter(|call| call.writes()).collect();
        ensure!(writing.is_empty(), "node{number}: nothing changed, but {writing:?}");
        let path = world.node(number).agent_log_path().context("no agent")?.to_owned();
        let log = std::fs::read_to_string(&path)?;
        let last_run = log.rsplit_once("first full state programmed").context("no first sync in the log")?.1;
        let writes: Vec<&str> = last_run.split_whitespace().filter_map(|word| word.strip_prefix("writes=")).collect();
        ensure!(!writes.is_empty(), "node{number}: the log does not say how much was written");
        ensure!(writes.iter().all(|writes| *writes == "0"), "node{number}: writes {writes:?} although nothing changed");
    }
    Ok(())
}
