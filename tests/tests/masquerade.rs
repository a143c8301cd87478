//! The ports that masqueraded flows get: what happens when none is left, and who is told.

use std::{net::SocketAddr, process::ExitCode, thread, time::Duration};

use anyhow::{Context, Result, ensure};
use proxy_tests::{
    pod::{hold, socket::Transport},
    suite::Suite,
    world::{AgentOptions, Ask, Client, Family, Programs, SocketLb, Spec, Topology, World, objects, vip},
};
use serde_json::Value;

/// As many as `PORTS` says, and no more than are tried one after the other: so none that is free is missed.
const RANGE: &str = "--masquerade-ports=20000-20003";
const PORTS: usize = 4;
const NODE_PORT: u16 = 30_080;
const PATIENCE: Duration = Duration::from_secs(15);

fn main() -> ExitCode {
    Suite::in_worlds("masquerade", Suite::both_ways("masquerade"), prepare, |suite, group, _, world| {
        for family in Family::BOTH {
            suite.case(&format!("{group}/a range that is used up, {family}"), || used_up(world, family));
        }
    })
}

fn prepare(programs: Programs, socket_lb: &SocketLb) -> Result<World> {
    let options = AgentOptions { extra: vec![RANGE.to_owned()], ..AgentOptions::new(*socket_lb) };
    World::serving(&Spec::two_nodes(Topology::Routed), programs, &options, |world| {
        let service = objects::service("far")
            .cluster_ips(&Family::BOTH.map(|family| vip(family, 1)))
            .port("web", "TCP", 80)
            .node_port(NODE_PORT);
        let slice = |family| objects::slice("far", family).port("web", "TCP", 8080).endpoint(world.pod("b2")).json();
        [objects::nodes(world), vec![service.json()], Family::BOTH.map(slice).to_vec()].concat()
    })
}

/// Those that have a port keep it, who comes next is dropped and counted, and a port that was given back is given again.
fn used_up(world: &World, family: Family) -> Result<()> {
    let to = SocketAddr::new(world.node(1).place.ip(family), NODE_PORT);
    let before = exhausted(world)?;
    let mut held = connections(world, to, PORTS)?;
    held.wait_for_line("ready", PATIENCE)?;
    ensure!(exhausted(world)? == before, "a port was missed before all were used");
    let ask = Ask::new(to, Transport::Tcp).timeout(1500);
    let report = world.ask(world.outside(), &ask)?;
    ensure!(report.errors().keys().eq(["ETIMEDOUT"]), "one too many: {report:?}");
    let counted = exhausted(world)?;
    ensure!(counted > before, "the counter stands at {counted}");
    let metric = metric(world)?;
    ensure!(metric == counted, "counters say {counted}, the metric {metric}");
    // The other family has ports of its own.
    let other = if family == Family::V4 { Family::V6 } else { Family::V4 };
    let elsewhere = SocketAddr::new(world.node(1).place.ip(other), NODE_PORT);
    let report = world.ask(world.outside(), &Ask::new(elsewhere, Transport::Tcp))?;
    ensure!(report.errors().is_empty(), "{elsewhere}: {report:?}");

    let report: hold::Report = held.finish(PATIENCE)?;
    ensure!(report.broken.is_empty() && report.wrong.is_empty(), "held connections: {report:?}");
    ensure!(report.rounds > 1, "held connections: {report:?}");
    // Both sides have closed: their ports are to be had.
    for attempt in 0.. {
        let report = world.ask(world.outside(), &ask)?;
        if report.errors().is_empty() {
            break;
        }
        ensure!(attempt < 5, "no port came back: {report:?}");
        thread::sleep(Duration::from_millis(200));
    }
    Ok(())
}

fn connections(world: &World, to: SocketAddr, count: usize) -> Result<Client> {
    let args = ["hold".to_owned(), to.to_string(), format!("--connections={count}"), "--interval=50".to_owned()];
    world.outside().start(&world.programs().testpod, &args)
}

/// As the command tells it.
fn exhausted(world: &World) -> Result<u64> {
    let text = world.cli(world.node(1), &["counters", "-o", "json"])?;
    let counters: Value = serde_json::from_str(&text)?;
    let mut events = counters["events"].as_array().into_iter().flatten();
    let event = events.find(|event| event["reason"] == "masquerade_ports_exhausted");
    let event = event.with_context(|| format!("no such reason: {text}"))?;
    ensure!(event["drop"] == true, "{event}");
    event["count"].as_u64().context("a count")
}

/// As it is scraped.
fn metric(world: &World) -> Result<u64> {
    let (_, text) = world.node(1).http(10_249, "/metrics")?;
    let sample = "proxy_agent_datapath_events_total{reason=\"masquerade_ports_exhausted\",drop=\"true\"} ";
    let line = text.lines().find_map(|line| line.strip_prefix(sample)).context("no such sample")?;
    Ok(line.trim().parse()?)
}
