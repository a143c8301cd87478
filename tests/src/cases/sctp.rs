//! SCTP, over raw sockets: the kernel asks no program at `connect()`, so pods go per packet whatever `--socket-lb` says.

use anyhow::{Context, Result, ensure};

use super::{Ground, services::Svc};
use crate::{
    pod::socket::Transport,
    world::{Ask, Fallback, Family, vip},
};

const SCTP: Transport = Transport::Sctp;

/// Endpoints check every packet's checksum, and drop what is wrong.
pub fn served(ground: &Ground<'_>) -> Result<()> {
    let world = ground.world;
    for from in [world.pod("a1"), world.pod("a2"), world.outside()] {
        for family in Family::BOTH {
            let to = Svc::Web.at(family, SCTP);
            // With 30 tries a backend of two is missed once in 10^9 runs; in packets of several lengths.
            for (count, sizes) in [(30, (16, 0)), (4, (1, 1)), (4, (777, 1001)), (4, (1200, 1150))] {
                let (size, reply) = sizes;
                let ask = Ask::new(to, SCTP).times(count);
                let report =
                    ground.answered(from, &ask.with(format!("--size={size}")).with(format!("--reply={reply}")))?;
                let seen = report.backends();
                ensure!(count < 30 || seen.keys().eq(["b1", "b2"]), "{} -> {to}: {seen:?}", from.name);
                for one in &report.tries {
                    ground.check_source(from, family, one).with_context(|| format!("{} -> {to}", from.name))?;
                }
            }
            // From a port that is none of the masquerade range: masquerade changes it.
            for port in 40_000..40_004 {
                ground.answered(from, &Ask::new(to, SCTP).with(format!("--source-port={port}")))?;
            }
            for (svc, backend) in [(Svc::Local, "b1"), (Svc::Remote, "b2")] {
                if from.name == "a2" && svc == Svc::Local {
                    continue;
                }
                let report = ground.answered(from, &Ask::new(svc.at(family, SCTP), SCTP).times(4))?;
                ensure!(report.backends().keys().eq([backend]), "{} -> {svc:?}: {report:?}", from.name);
            }
        }
    }
    // To itself; and from one port to two VIPs of one backend.
    let pod = world.pod("a1");
    for (n, family) in Family::BOTH.into_iter().enumerate() {
        let report = ground.answered(pod, &Ask::new(Svc::Hairpin.at(family, SCTP), SCTP).times(3))?;
        for one in &report.tries {
            let peer = one.answer.as_ref().context("no answer")?.peer.parse::<std::net::SocketAddr>()?;
            ensure!(world.node_addresses(1)?.contains(&peer.ip()), "a pod that reaches itself saw {peer}");
        }
        // IPVS changes no source port.
        let both = [Svc::One, Svc::Other, Svc::One, Svc::Other];
        let both = if ground.fallback == Some(Fallback::Ipvs) { &both[..1] } else { &both[..] };
        for svc in both {
            let ask = Ask::new(svc.at(family, SCTP), SCTP).with(format!("--source-port={}", 41_000 + n));
            ground.answered(pod, &ask)?;
        }
    }
    Ok(())
}

pub fn others(ground: &Ground<'_>) -> Result<()> {
    let world = ground.world;
    for family in Family::BOTH {
        for from in [world.pod("a1"), world.outside()] {
            for to in [Svc::Empty.at(family, SCTP), std::net::SocketAddr::new(vip(family, Svc::Web.number()), 4711)] {
                let report = world.ask(from, &Ask::new(to, SCTP).timeout(2000))?;
                ensure!(report.errors().keys().eq(["ECONNREFUSED"]), "{} -> {to}: {report:?}", from.name);
            }
            let to = Svc::RemoteOnly.at(family, SCTP);
            let report = world.ask(from, &Ask::new(to, SCTP).timeout(200))?;
            ensure!(report.errors().keys().eq(["ETIMEDOUT"]), "{} -> {to}: expected silence, {report:?}", from.name);
        }
        // The node's own way out has no hook that translates; nothing of it gets to the default gateway, either.
        let to = Svc::Web.at(family, SCTP);
        let report = world.ask(&world.node(1).place, &Ask::new(to, SCTP).timeout(200))?;
        ensure!(report.backends().is_empty(), "node1 -> {to}: {report:?}");
    }
    let shown = world.cli(world.node(1), &["services"])?;
    let frontend = format!("{}/SCTP", Svc::Web.at(Family::V4, SCTP));
    ensure!(shown.contains(&frontend), "{frontend} is not in {shown}");
    ground.answered(world.pod("a1"), &Ask::new(Svc::Web.at(Family::V4, SCTP), SCTP))?;
    let shown = world.cli(world.node(1), &["connections"])?;
    ensure!(shown.lines().any(|line| line.starts_with("SCTP")), "no SCTP in {shown}");
    Ok(())
}
