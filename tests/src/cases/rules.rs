//! What the suites of nftables and of iptables share: a world with one Service, whose agents look at the kernel every two seconds, and what is
//! asked of rules, whoever writes them.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::{
    pod::{hold, socket::Transport, storm},
    world::{AgentOptions, Ask, Client, Fallback, Family, Programs, Spec, Topology, World, objects, vip},
};

pub fn options(by: Fallback) -> AgentOptions {
    let mut options = AgentOptions::by(by);
    options.extra.extend(["--sync-period".to_owned(), "2s".to_owned()]);
    options
}

/// The Service is number 1.
pub fn prepare(programs: Programs, by: Fallback) -> Result<World> {
    let mut world = World::serving(&Spec::two_nodes(Topology::Routed), programs, &options(by), objects::nodes)?;
    let objects = service(&world, 1, "web", None);
    world.apply(&objects)?;
    Ok(world)
}

/// At the VIPs of this number, with a NodePort; `algorithm`: how backends are to be chosen.
pub fn service(world: &World, number: u8, name: &str, algorithm: Option<&str>) -> Vec<Value> {
    let mut service = objects::service(name)
        .cluster_ips(&Family::BOTH.map(|family| vip(family, number)))
        .port("web", "TCP", 80)
        .node_port(30_000 + u16::from(number));
    if let Some(algorithm) = algorithm {
        service = service.annotation("proxy-agent/algorithm", algorithm);
    }
    let slices = Family::BOTH.map(|family| {
        objects::slice(name, family).port("web", "TCP", 8080).endpoints(["b1", "b2"].map(|pod| world.pod(pod))).json()
    });
    [vec![service.json()], slices.to_vec()].concat()
}

/// To a pod, to the node, and from outside.
pub fn answers(world: &World, number: u8) -> Result<()> {
    for from in [world.pod("a1"), &world.node(1).place, world.outside()] {
        for family in Family::BOTH {
            let to = (vip(family, number), 80).into();
            let report = world.ask(from, &Ask::new(to, Transport::Tcp).times(3).timeout(500))?;
            ensure!(report.errors().is_empty(), "{} to {to}: {:?}", from.name, report.errors());
        }
    }
    Ok(())
}

/// What `status` says of node 1.
pub fn report(world: &World) -> Result<Value> {
    let status: Value = serde_json::from_str(&world.cli(world.node(1), &["status", "-o", "json"])?)?;
    Ok(status["report"].clone())
}

/// How much others altered.
pub fn repaired(world: &World) -> Result<u64> {
    report(world)?["sync"]["driftRepaired"].as_u64().context("no driftRepaired")
}

/// What was repaired since, and that the Service answers.
pub fn is_put_back(world: &World, repaired_before: u64) -> Result<()> {
    ensure!(repaired(world)? > repaired_before, "nothing was repaired\n{}", world.node(1).agent_log());
    answers(world, 1)
}

/// Agents die and start over what they left, under traffic.
pub fn restart(world: &mut World, by: Fallback) -> Result<()> {
    let (mut held, mut storms) = (Vec::new(), Vec::new());
    for (from, family) in [("a1", Family::V4), ("a1", Family::V6), ("outside", Family::V4)] {
        let to = SocketAddr::new(vip(family, 1), 80).to_string();
        let place = world.place(from).context("no such place")?;
        let start = |args: &[&str]| -> Result<Client> {
            let args: Vec<String> = args.iter().map(|&arg| arg.to_owned()).collect();
            let mut client = place.start(&world.programs().testpod, &args)?;
            client.wait_for_line("ready", Duration::from_secs(5))?;
            Ok(client)
        };
        held.push(start(&["hold", &to, "--connections=4", "--interval=20"])?);
        storms.push(start(&["storm", &to, "--rate=50", "--workers=2"])?);
    }
    for _ in 0..3 {
        for node in [1, 2] {
            world.kill_agent(node)?;
        }
        answers(world, 1)?;
        world.start_agents(&options(by))?;
    }
    for client in held {
        let report: hold::Report = client.finish(Duration::from_secs(10))?;
        ensure!(report.broken.is_empty() && report.wrong.is_empty(), "{report:?}");
    }
    for client in storms {
        let report: storm::Report = client.finish(Duration::from_secs(10))?;
        ensure!(report.failures.is_empty() && report.answered > 20, "{report:?}");
    }
    Ok(())
}

/// One agent at a time; who is refused in this mode leaves nothing.
pub fn second(world: &World, mode: &str) -> Result<()> {
    let node = world.node(1);
    let absent = node.bpffs.join("absent");
    let done = node
        .place
        .command(&world.programs().agent)?
        .args(["run", "--metrics-bind-address=", "--healthz-bind-address=", "--source=/"])
        .arg(format!("--proxy-mode={mode}"))
        .arg(format!("--bpffs={}", absent.display()))
        .output()?;
    let said = String::from_utf8_lossy(&done.stderr);
    ensure!(!done.status.success() && said.contains("another proxy-agent (pid "), "{mode}: {said}");
    ensure!(!absent.exists(), "{mode} left pins");
    answers(world, 1)
}
