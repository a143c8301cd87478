//! XDP through the real agent, native and generic: everything from outside is served as without it, and what goes on to the other node
//! goes past the stack.

use std::{
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use proxy_tests::{
    cases::{Ground, external},
    pod::{hold, socket::Transport},
    suite::Suite,
    world::{AgentOptions, Ask, Client, Family, Programs, SocketLb, Spec, Topology, World, cleanup_on_signals},
};

const SOCKET_LB: SocketLb = SocketLb::Node;
const PATIENCE: Duration = Duration::from_secs(5);

fn main() -> ExitCode {
    let mut suite = Suite::new("xdp");
    let Some(programs) = suite.programs() else { return suite.finish() };
    if let Err(error) = cleanup_on_signals().and_then(|()| World::sweep().map(drop)) {
        suite.fail("preparation", &error);
        return suite.finish();
    }
    for mode in ["native", "generic"] {
        if !suite.wants_group(mode) {
            continue;
        }
        let mut world = match prepare(programs.clone(), mode) {
            Ok(world) => world,
            Err(error) => {
                suite.fail(mode, &error);
                continue;
            }
        };
        external::all(&mut suite, mode, &Ground { world: &world, socket_lb: SOCKET_LB, large_segments: false });
        suite.case(&format!("{mode}/what goes on to another node goes past the stack"), || bypasses(&world, mode));
        suite.case(&format!("{mode}/restarts, and XDP off and on, under traffic"), || switches(&mut world, mode));
        suite.case(&format!("{mode}/cleanup takes it off"), || cleaned(&mut world));
    }
    suite.finish()
}

fn options(mode: &str) -> AgentOptions {
    let extra = ["--xdp", mode, "--sync-period", "1s"].map(str::to_owned).to_vec();
    AgentOptions { extra, ..AgentOptions::new(SOCKET_LB) }
}

fn prepare(programs: Programs, mode: &str) -> Result<World> {
    let spec = Spec { rp_filter: true, for_xdp: true, ..Spec::two_nodes(Topology::Routed) };
    let mut world = World::new(&spec, programs)?;
    for object in external::objects(&world) {
        world.write(&object)?;
    }
    world.start_agents(&options(mode))?;
    world.settle()?;
    Ok(world)
}

/// Packets that XDP on node1 sent on.
fn bypassed(world: &World) -> Result<u64> {
    let text = world.cli(world.node(1), &["counters", "-o", "json"])?;
    let json: serde_json::Value = serde_json::from_str(&text)?;
    let found = find(&json, "bypassed").unwrap_or(0);
    Ok(found)
}

/// `count` of the object whose `reason` is this, wherever it stands.
fn find(json: &serde_json::Value, reason: &str) -> Option<u64> {
    match json {
        serde_json::Value::Object(fields) if fields.get("reason").is_some_and(|r| r == reason) => {
            fields.get("count")?.as_u64()
        }
        serde_json::Value::Object(fields) => fields.values().find_map(|value| find(value, reason)),
        serde_json::Value::Array(items) => items.iter().find_map(|value| find(value, reason)),
        _ => None,
    }
}

fn is_on(world: &World, mode: &str) -> Result<bool> {
    let status = world.cli(world.node(1), &["status"])?;
    Ok(status.contains(&format!("xdp/{mode}")))
}

fn bypasses(world: &World, mode: &str) -> Result<()> {
    ensure!(is_on(world, mode)?, "status does not name the hook");
    for family in Family::BOTH {
        for transport in [Transport::Tcp, Transport::Udp] {
            let to = external::at_node_port(world, family, transport);
            let before = bypassed(world)?;
            let report = world.ask(world.outside(), &Ask::new(to, transport).times(30))?;
            ensure!(report.errors().is_empty(), "{to} {transport}: {:?}", report.errors());
            // Half of the flows, roughly, lead to the other node; of each its packets there and back.
            let there = report.backends().get("b2").copied().unwrap_or_default();
            ensure!(there > 0, "none was answered by the other node");
            let least = if transport == Transport::Tcp { 6 } else { 2 };
            let count = bypassed(world)? - before;
            ensure!(
                count >= least * there as u64,
                "{to} {transport}: {there} flows to the other node, {count} packets past the stack"
            );
        }
    }
    Ok(())
}

struct Held(Vec<Client>);

impl Held {
    fn start(world: &World) -> Result<Self> {
        let mut clients = Family::BOTH
            .map(|family| {
                let to = external::at_node_port(world, family, Transport::Tcp).to_string();
                let args = ["hold", &to, "--interval=20", "--connections=40"].map(str::to_owned);
                world.outside().start(&world.programs().testpod, &args)
            })
            .into_iter()
            .collect::<Result<Vec<_>>>()?;
        for client in &mut clients {
            client.wait_for_line("ready", Duration::from_secs(15))?;
        }
        Ok(Self(clients))
    }

    fn finish(self) -> Result<()> {
        for client in self.0 {
            let report: hold::Report = client.finish(Duration::from_secs(15))?;
            ensure!(report.broken.is_empty() && report.wrong.is_empty(), "{report:?}");
            ensure!(report.backends.len() == 2 && report.rounds > 20, "{report:?}");
        }
        Ok(())
    }
}

/// Whoever is connected notices nothing, and whoever connects meanwhile is served.
fn switches(world: &mut World, mode: &str) -> Result<()> {
    let held = Held::start(world)?;
    for (next, on) in [(mode, true), ("off", false), (mode, true), ("off", false), (mode, true)] {
        world.kill_agent(1)?;
        let before = bypassed(world)?;
        thread::sleep(Duration::from_millis(300));
        let meanwhile = bypassed(world)? > before;
        world.start_agent(1, &options(next))?;
        world.node(1).wait_ready(Duration::from_secs(30))?;
        settled(world, next, on)?;
        let before = bypassed(world)?;
        for family in Family::BOTH {
            let to = external::at_node_port(world, family, Transport::Tcp);
            let report = world.ask(world.outside(), &Ask::new(to, Transport::Tcp).times(20))?;
            ensure!(report.errors().is_empty(), "{next}: {:?}", report.errors());
        }
        let count = bypassed(world)? - before;
        ensure!((count > 0) == on, "--xdp {next}: {count} packets past the stack");
        ensure!(on || meanwhile, "with no agent running XDP goes on");
    }
    held.finish()
}

fn settled(world: &World, mode: &str, on: bool) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let text = world.node(1).place.namespace.output("ip", &["-o", "link", "show", "eth0"])?;
        if text.contains("xdp") == on && (!on || is_on(world, mode)?) {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "--xdp {mode}: {text}");
        thread::sleep(Duration::from_millis(50));
    }
}

fn cleaned(world: &mut World) -> Result<()> {
    world.remove_agents()?;
    for node in &world.nodes {
        // Once its pin is gone the kernel lets go of a link by a worker of its own.
        let deadline = Instant::now() + PATIENCE;
        loop {
            let links = node.place.namespace.output("ip", &["-o", "link"]).context("ip link")?;
            if !links.contains("xdp") {
                break;
            }
            ensure!(Instant::now() < deadline, "{links}");
            thread::sleep(Duration::from_millis(50));
        }
    }
    Ok(())
}
