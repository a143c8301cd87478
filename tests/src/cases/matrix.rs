//! The ClusterIP part of the matrix (A77): who answers whom, and which source is seen.

use anyhow::{Context, Result, ensure};

use super::{Ground, at, services::Svc};
use crate::{
    pod::socket::Transport,
    world::{Ask, Family},
};

pub fn pod(ground: &Ground<'_>) -> Result<()> {
    ground.served_by(ground.world.pod("a1"), Svc::Web, &["b1", "b2"])?;
    ground.served_by(ground.world.pod("a2"), Svc::Web, &["b1", "b2"])
}

pub fn node(ground: &Ground<'_>) -> Result<()> {
    ground.served_by(&ground.world.node(1).place, Svc::Web, &["b1", "b2"])?;
    ground.served_by(&ground.world.node(2).place, Svc::Web, &["b1", "b2"])
}

/// `--socket-lb off`: what the node's own processes send to a Service goes where the routes say, and whoever asks is told so.
pub fn node_unserved(ground: &Ground<'_>) -> Result<()> {
    let world = ground.world;
    for number in [1, 2] {
        let node = world.node(number);
        for family in Family::BOTH {
            for transport in Transport::ALL {
                let to = Svc::Web.at(family, transport);
                let report = world.ask(&node.place, &Ask::new(to, transport).timeout(150))?;
                ensure!(report.backends().is_empty(), "{} -> {to} {transport}: {report:?}", node.place.name);
                // What nobody translates ends at the node's way out (A50).
                let leaks = world.leaks()?;
                ensure!(leaks.is_empty(), "{} -> {to}: {leaks:?}", node.place.name);
            }
        }
        let attached = node.pinned()?.ids;
        let cgroup: Vec<&String> =
            attached.keys().filter(|pin| pin.starts_with("links/") && !pin.contains("tcx-")).collect();
        ensure!(cgroup.is_empty(), "attached to the cgroup although nothing is to be: {cgroup:?}");
        let said = "off: connections that this node's own processes make to Services are not served";
        let status = world.cli(node, &["status"])?;
        ensure!(status.lines().any(|line| line.starts_with("Socket LB:") && line.ends_with(said)), "status: {status}");
        let cgroup = node.cgroup.to_string_lossy().into_owned();
        // It fails here: the agent has the addresses that it looks at.
        let check = world.cli_output(node, &["check", "--socket-lb", "off", "--cgroup-root", &cgroup])?;
        ensure!(check.lines().any(|line| line.contains("socket LB") && line.contains(said)), "check: {check}");
    }
    Ok(())
}

pub fn outside(ground: &Ground<'_>) -> Result<()> {
    ground.served_by(ground.world.outside(), Svc::Web, &["b1", "b2"])
}

pub fn local(ground: &Ground<'_>) -> Result<()> {
    for from in ground.origins() {
        ground.served_by(from, Svc::Local, &["b1"])?;
    }
    ground.served_by(ground.world.pod("a2"), Svc::Local, &["b2"])?;
    ground.served_by(ground.world.pod("a2"), Svc::RemoteOnly, &["b2"])
}

pub fn hairpin(ground: &Ground<'_>) -> Result<()> {
    ground.served_by(ground.world.pod("a1"), Svc::Hairpin, &["a1"])?;
    // One that picks itself only sometimes.
    ground.served_by(ground.world.pod("b1"), Svc::Web, &["b1", "b2"])
}

pub fn host_network(ground: &Ground<'_>) -> Result<()> {
    for from in ground.origins() {
        ground.served_by(from, Svc::Host, &["node1", "node2"])?;
    }
    Ok(())
}

/// A46: the endpoint's port, not the Service's. A47: TCP is not UDP.
pub fn ports(ground: &Ground<'_>) -> Result<()> {
    for from in ground.origins() {
        for family in Family::BOTH {
            for (port, behind) in [(80, ":8080"), (81, ":9090")] {
                let to = at(family, Svc::TwoPorts, port);
                let report = ground.answered(from, &Ask::new(to, Transport::Tcp))?;
                let answer = report.tries.first().and_then(|one| one.answer.as_ref()).context("no answer")?;
                ensure!(answer.local.ends_with(behind), "{} -> {to}: led to {}", from.name, answer.local);
                let report = ground.world.ask(from, &Ask::new(to, Transport::Udp).timeout(1000))?;
                let refused = report.errors().keys().any(|error| ground.is_refusal(from, error));
                ensure!(refused, "{} -> {to} by UDP: {report:?}", from.name);
            }
        }
    }
    Ok(())
}

pub fn names(ground: &Ground<'_>) -> Result<()> {
    for from in ground.origins() {
        for family in Family::BOTH {
            for transport in Transport::ALL {
                let to = Svc::Web.at(family, transport);
                check_names(ground, from, to, transport, &to.to_string(), "")?;
            }
        }
    }
    Ok(())
}

pub fn mapped(ground: &Ground<'_>) -> Result<()> {
    for from in ground.origins() {
        for transport in Transport::ALL {
            let to = Svc::Web.at(Family::V4, transport);
            let shown = format!("[::ffff:{}]:{}", to.ip(), to.port());
            check_names(ground, from, to, transport, &shown, "--mapped")?;
        }
    }
    Ok(())
}

fn check_names(
    ground: &Ground<'_>,
    from: &crate::world::Place,
    to: std::net::SocketAddr,
    transport: Transport,
    shown: &str,
    extra: &str,
) -> Result<()> {
    let mut ask = Ask::new(to, transport).times(8);
    if !extra.is_empty() {
        ask = ask.with(extra);
    }
    let what = format!("{} -> {to} {transport} {extra}", from.name);
    for one in ground.answered(from, &ask)?.tries {
        if transport != Transport::UdpUnconnected {
            ensure!(one.peer_name.as_deref() == Some(shown), "{what}: getpeername says {:?}", one.peer_name);
        }
        if transport != Transport::Tcp {
            ensure!(one.from.as_deref() == Some(shown), "{what}: the answer came from {:?}", one.from);
        }
    }
    Ok(())
}
