//! The addresses and ports that masqueraded flows get: what happens when none is left, or the node gets another address, and who is told.

use std::{
    net::{IpAddr, SocketAddr},
    process::ExitCode,
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use proxy_tests::{
    pod::{hold, socket::Transport, talk},
    suite::Suite,
    world::{AgentOptions, Ask, Client, Family, Programs, SocketLb, Spec, Topology, World, external, objects, vip},
};
use serde_json::Value;

/// As many as `PORTS` says, and no more than are tried one after the other: so none that is free is missed.
const RANGE: &str = "--masquerade-ports=20000-20003";
const PORTS: usize = 4;
const NODE_PORT: u16 = 30_080;
const PATIENCE: Duration = Duration::from_secs(15);

fn main() -> ExitCode {
    Suite::in_worlds("masquerade", Suite::both_ways("masquerade"), prepare, |suite, group, socket_lb, world| {
        for family in Family::BOTH {
            suite.case(&format!("{group}/a range that is used up, {family}"), || used_up(world, family));
            // What a pod opens at connect time is not masqueraded.
            if *socket_lb == SocketLb::Node {
                suite.case(&format!("{group}/A75: another address under traffic, {family}"), || moved(world, family));
            }
            suite.case(&format!("{group}/a range that datagrams use up, {family}"), || {
                used_up_by_datagrams(world, family)
            });
        }
    })
}

fn prepare(programs: Programs, socket_lb: &SocketLb) -> Result<World> {
    let options = AgentOptions { extra: vec![RANGE.to_owned()], ..AgentOptions::new(*socket_lb) };
    World::serving(&Spec::two_nodes(Topology::Routed), programs, &options, |world| {
        let service = objects::service("far")
            .cluster_ips(&Family::BOTH.map(|family| vip(family, 1)))
            .port("web", "TCP", 80)
            .node_port(NODE_PORT)
            .port("dns", "UDP", 53)
            .load_balancer(&Family::BOTH.map(|family| external(family, 1)));
        let slice = |family| {
            let slice = objects::slice("far", family).port("web", "TCP", 8080).port("dns", "UDP", 8080);
            slice.endpoint(world.pod("b2")).json()
        };
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

/// A flow of datagrams keeps its port until its time is over: who comes next is dropped and counted, and those that have one go on.
fn used_up_by_datagrams(world: &World, family: Family) -> Result<()> {
    let to = SocketAddr::new(external(family, 1), 53);
    let ask = |port: u16| -> Result<bool> {
        let ask = Ask::new(to, Transport::Udp).timeout(700).with(format!("--source-port={port}"));
        let report = world.ask(world.outside(), &ask)?;
        let errors = report.errors();
        ensure!(errors.is_empty() || errors.keys().eq(["ETIMEDOUT"]), "from {port}: {report:?}");
        Ok(errors.is_empty())
    };
    let before = exhausted(world)?;
    let mut answered = Vec::new();
    for port in (5_000..).take(PORTS + 1) {
        if !ask(port)? {
            break;
        }
        ensure!(exhausted(world)? == before, "a port was missed for {port} that it has got");
        answered.push(port);
    }
    // One may still be a flow's of the case before.
    ensure!((PORTS - 1..=PORTS).contains(&answered.len()), "answered: {answered:?}");
    let counted = exhausted(world)?;
    ensure!(counted > before, "the counter stands at {counted}");
    for port in answered {
        ensure!(ask(port)?, "the flow from {port} is cut");
    }
    ensure!(exhausted(world)? == counted, "a flow that has a port asks for another");
    Ok(())
}

/// The outward device's address is replaced. As when netfilter forgets what it masqueraded with it: new flows have the new one, datagrams go on
/// with it, and a TCP connection, which would otherwise wait for good, is reset by the backend that knows no such peer.
fn moved(world: &World, family: Family) -> Result<()> {
    let (pod, node) = (world.pod("a1"), &world.node(1).place);
    let old = node.ip(family);
    let (new, length) = match family {
        Family::V4 => ("192.168.77.41", 24),
        Family::V6 => ("fd00:77::41", 64),
    };
    let nodad = if family == Family::V6 { " nodad" } else { "" };
    let to = |port| SocketAddr::new(external(family, 1), port);
    let seen = || -> Result<IpAddr> {
        let report = world.ask(pod, &Ask::new(to(80), Transport::Tcp))?;
        let answer = report.tries.first().and_then(|one| one.answer.as_ref());
        Ok(answer.with_context(|| format!("{report:?}"))?.peer.parse::<SocketAddr>()?.ip())
    };
    ensure!(seen()? == old, "masqueraded with {}", seen()?);

    let start = |args: &[&str]| {
        pod.start(&world.programs().testpod, &args.iter().map(|arg| (*arg).to_owned()).collect::<Vec<_>>())
    };
    let mut held = start(&["hold", &to(80).to_string(), "--connections=1", "--interval=50", "--timeout=8000"])?;
    held.wait_for_line("ready", PATIENCE)?;
    let mut talking = start(&["talk", &to(53).to_string(), "--source-port=41000"])?;
    talking.wait_for_line("ready", PATIENCE)?;
    let counted = || world.node(1).metric("proxy_agent_ended_total");
    let before = counted()?;
    node.namespace.sysctl(&[("ipv4/conf/eth0/promote_secondaries", "1")])?;
    node.namespace.ip(&format!(
        "addr add {new}/{length} dev eth0{nodad}\n\
         addr del {old}/{length} dev eth0\n"
    ))?;
    let changed = talk::now();
    thread::sleep(Duration::from_millis(2_500));
    let expected: IpAddr = new.parse()?;
    ensure!(seen()? == expected, "masqueraded with {}", seen()?);
    let talked: talk::Report = talking.finish(PATIENCE)?;
    let answered = talked.backends(changed + 1_000, u64::MAX);
    ensure!(answered == ["b2:8080"] && talked.sockets == 1, "{answered:?}, {:?}", talked.errors());
    ensure!(talked.turns.last().is_some_and(|turn| turn.backend.is_some()), "{:?}", talked.turns.last());
    let report: hold::Report = held.finish(PATIENCE)?;
    ensure!(report.broken.len() == 1 && report.broken[0].contains("reset"), "{report:?}");
    ensure!(counted()? >= before + 2.0, "{before} before, {} now", counted()?);

    node.namespace.ip(&format!(
        "addr add {old}/{length} dev eth0{nodad}\n\
         addr del {new}/{length} dev eth0\n"
    ))?;
    thread::sleep(Duration::from_millis(500));
    ensure!(seen()? == old, "masqueraded with {}", seen()?);
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
