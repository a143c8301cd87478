//! Algorithms that are asked for, through the real agent and over TCP: Maglev for everybody (`--algorithm`), round-robin by annotation.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    process::ExitCode,
};

use anyhow::{Context, Result, ensure};
use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    unistd::Pid,
};
use proxy_tests::{
    pod::socket::Transport,
    suite::Suite,
    world::{
        AgentOptions, Ask, EXTERNAL_CIDR_V4, EXTERNAL_CIDR_V6, Family, Place, Programs, SocketLb, Spec, Topology,
        World, external, objects, slower, vip,
    },
};
use serde_json::Value;

const BACKENDS: [&str; 4] = ["b1", "c1", "b2", "c2"];
/// Last parts of the Services' addresses.
const MAGLEV: u8 = 1;
const TURNS: u8 = 2;

fn main() -> ExitCode {
    // Pods per packet, the node's own processes at connect time.
    let shapes = [("choice".to_owned(), SocketLb::Node)];
    Suite::in_worlds("choice", shapes, prepare, |suite, group, _, world| {
        suite.case(
            &format!("{group}/Maglev: a client's port comes to the same backend again, by whichever node"),
            || again(world),
        );
        suite.case(&format!("{group}/Maglev: a backend that leaves moves nobody else"), || leaves(world));
        suite.case(&format!("{group}/round-robin: each in its turn, on one CPU"), || turns(world));
    })
}

fn prepare(programs: Programs, socket_lb: &SocketLb) -> Result<World> {
    let extra = ["--algorithm", "maglev"].map(str::to_owned).to_vec();
    let options = AgentOptions { extra, ..AgentOptions::new(*socket_lb) };
    World::serving(&Spec::two_nodes(Topology::Routed), programs, &options, |world| {
        let service = |name: &str, number| {
            objects::service(name)
                .cluster_ips(&Family::BOTH.map(|family| vip(family, number)))
                .port("web", "TCP", 80)
                .load_balancer(&Family::BOTH.map(|family| external(family, number)))
        };
        let turns = service("turns", TURNS).annotation("proxy-agent/algorithm", "round-robin");
        let services = [service("maglev", MAGLEV).json(), turns.json()];
        let slices = ["maglev", "turns"].map(|name| slices(world, name, &BACKENDS));
        [objects::nodes(world), services.to_vec(), slices.concat()].concat()
    })
}

fn slices(world: &World, service: &str, backends: &[&str]) -> Vec<Value> {
    let pods = || backends.iter().map(|name| world.pod(name));
    Family::BOTH
        .map(|family| objects::slice(service, family).port("web", "TCP", 8080).endpoints(pods()).json())
        .to_vec()
}

/// Who answers, try by try.
fn answers(world: &World, from: &Place, ask: &Ask) -> Result<Vec<String>> {
    let report = world.ask(from, ask)?;
    ensure!(report.errors().is_empty(), "{} -> {}: {:?}", from.name, ask.to, report.failure());
    Ok(report.tries.iter().filter_map(|one| one.backend().map(str::to_owned)).collect())
}

/// From 24 ports, each of which ends its connection for good, so that the next one from there is a new flow.
fn by_port(world: &World, from: &Place, to: IpAddr) -> Result<Vec<String>> {
    let ask = Ask::new(SocketAddr::new(to, 80), Transport::Tcp).times(24).timeout(4_000 * slower());
    answers(world, from, &ask.with("--source-port=31300").with("--successive").with("--reset"))
}

/// Who comes from outside by a load balancer that has led to another node meanwhile; and a pod by the ClusterIP, with another hash.
fn again(world: &World) -> Result<()> {
    let outside = world.outside();
    let lead = |number: usize| -> Result<()> {
        let node = &world.node(number).place;
        outside.namespace.ip(&format!(
            "route replace {EXTERNAL_CIDR_V4} via {}\nroute replace {EXTERNAL_CIDR_V6} via {}\n",
            node.v4, node.v6
        ))
    };
    let outcome = Family::BOTH.into_iter().try_for_each(|family| {
        let mut seen = Vec::new();
        for number in [1, 1, 2] {
            lead(number)?;
            seen.push(by_port(world, outside, external(family, MAGLEV))?);
        }
        let different: BTreeSet<&String> = seen[0].iter().collect();
        ensure!(different.len() > 2, "24 ports are led to {different:?} alone");
        ensure!(seen[0] == seen[1], "{family}: led to {:?}, and then to {:?}", seen[0], seen[1]);
        ensure!(seen[0] == seen[2], "{family}: node1 leads to {:?}, node2 to {:?}", seen[0], seen[2]);
        let by_pod = || by_port(world, world.pod("a1"), vip(family, MAGLEV));
        let (first, second) = (by_pod()?, by_pod()?);
        ensure!(first == second, "{family}, a pod: led to {first:?}, and then to {second:?}");
        Ok(())
    });
    lead(1)?;
    outcome
}

/// But a few: less than one in a hundred, of 24.
fn leaves(world: &mut World) -> Result<()> {
    let ask = |world: &World| -> Result<Vec<Vec<String>>> {
        Family::BOTH.into_iter().map(|family| by_port(world, world.outside(), external(family, MAGLEV))).collect()
    };
    let before = ask(world)?.concat();
    let fewer = slices(world, "maglev", &BACKENDS[..3]);
    world.apply(&fewer)?;
    let after = ask(world)?.concat();
    let moved = before.iter().zip(&after).filter(|(was, is)| *was != "c2" && was != is).count();
    ensure!(before.iter().any(|was| was == "c2") && !after.iter().any(|is| is == "c2"), "{before:?}, then {after:?}");
    ensure!(moved <= 2, "{moved} moved besides: {before:?}, then {after:?}");
    Ok(())
}

/// Every CPU has its own turns.
fn turns(world: &World) -> Result<()> {
    on_one_cpu(|| {
        for from in [&world.node(1).place, world.pod("a1")] {
            for family in Family::BOTH {
                let ask = Ask::new(SocketAddr::new(vip(family, TURNS), 80), Transport::Tcp).times(12);
                let seen = answers(world, from, &ask.timeout(4_000 * slower()))?;
                let (round, rest) = seen.split_at(BACKENDS.len());
                let all: BTreeSet<&String> = round.iter().collect();
                ensure!(all.len() == BACKENDS.len(), "{} {family}: no full round in {seen:?}", from.name);
                ensure!(
                    rest.iter().zip(round.iter().cycle()).all(|(is, was)| is == was),
                    "{} {family}: out of turn: {seen:?}",
                    from.name
                );
            }
        }
        Ok(())
    })
}

/// What is started inside runs on one CPU, and so do the programs that see its packets.
fn on_one_cpu(inside: impl FnOnce() -> Result<()>) -> Result<()> {
    let this = Pid::from_raw(0);
    let all = sched_getaffinity(this)?;
    let first = (0..CpuSet::count()).find(|&cpu| all.is_set(cpu) == Ok(true)).context("no CPU")?;
    let mut one = CpuSet::new();
    one.set(first)?;
    sched_setaffinity(this, &one)?;
    let done = inside();
    sched_setaffinity(this, &all)?;
    done
}
