//! Hooks that somebody takes off a running agent's node: noticed within the sync period, counted, put back, and the node healthy again.

use std::process::ExitCode;

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

fn main() -> ExitCode {
    let shapes = [("hooks/all".to_owned(), SocketLb::All), ("hooks/node".to_owned(), SocketLb::Node)];
    Suite::in_worlds("hooks", shapes, prepare, |suite, group, _, world| {
        suite.case(&format!("{group}/a link that is detached by hand is put back"), || detached(world));
    })
}

fn prepare(programs: Programs, socket_lb: &SocketLb) -> Result<World> {
    let pods = ["client", "backend"].map(str::to_owned).to_vec();
    let spec = Spec { nodes: vec![pods], ..Spec::two_nodes(Topology::Routed) };
    let extra = vec!["--sync-period=2s".to_owned()];
    World::serving(&spec, programs, &AgentOptions { extra, ..AgentOptions::new(*socket_lb) }, |world| {
        [objects::nodes(world), service(world.pod("backend"))].concat()
    })
}

fn service(endpoint: &Place) -> Vec<Value> {
    let service = objects::service("web").cluster_ips(&Family::BOTH.map(|family| vip(family, WEB)));
    let slice = |family| objects::slice("web", family).port("web", "TCP", 8080).endpoint(endpoint).json();
    [vec![service.port("web", "TCP", 80).json()], Family::BOTH.map(slice).to_vec()].concat()
}

fn served(world: &World) -> Result<()> {
    for family in Family::BOTH {
        for from in [world.pod("client"), &world.node(1).place] {
            let report = world.ask(from, &Ask::new((vip(family, WEB), 80).into(), Transport::Tcp).times(4))?;
            ensure!(report.errors().is_empty(), "{} {family:?}: {:?}", from.name, report.errors());
        }
    }
    Ok(())
}

/// How many hooks are in force.
fn hooks(world: &World) -> Result<usize> {
    Ok(world.node(1).status()?["hooks"].as_array().context("no hooks")?.len())
}

fn detached(world: &mut World) -> Result<()> {
    let world = &*world;
    served(world)?;
    let (node, whole) = (world.node(1), hooks(world)?);
    let pinned = node.pinned()?;
    let links = pinned.ids.keys().filter_map(|pin| pin.strip_prefix("links/"));
    let victims: Vec<&str> = links.filter(|link| link.starts_with("connect") || link.starts_with("tcx-")).collect();
    ensure!(victims.len() > 2, "{:?}", pinned.ids);
    let before = node.metric("proxy_agent_hooks_lost_total")?;
    for name in &victims {
        node.detach_link(name)?;
    }
    within(patience(30), || {
        let lost = node.metric("proxy_agent_hooks_lost_total")? - before;
        ensure!(lost == victims.len() as f64, "{lost} lost, of {}", victims.len());
        ensure!(hooks(world)? == whole, "{} of {whole} hooks", hooks(world)?);
        Ok(())
    })?;
    // What was put back is no loss: neither to who asks for the node's health nor to clients.
    let (code, body) = node.http(10256, "/healthz")?;
    ensure!(code == 200 && node.metric("proxy_agent_hooks")? == whole as f64, "{code} {body}");
    served(world)
}
