//! One source port towards one backend, by two ways: both must work at the same time, although their answers look alike.
//!
//! Connect-time translation gives the kernel the backend's address before it looks at the tuple, so there the kernel itself
//! refuses the second connection (EADDRNOTAVAIL): only what goes per packet is asked here.

use std::{
    net::SocketAddr,
    sync::atomic::{AtomicU16, Ordering},
    time::Duration,
};

use anyhow::{Context, Result, ensure};

use super::{Ground, services::Svc};
use crate::{
    pod::{hold, socket::Transport},
    world::{Ask, Client, Family, Place},
};

/// Source ports that no case used before.
static PORT: AtomicU16 = AtomicU16::new(20_000);

fn hold(ground: &Ground<'_>, from: &Place, to: SocketAddr, port: u16) -> Result<Client> {
    let args = ["hold", &to.to_string(), "--connections=1", &format!("--source-port={port}"), "--interval=20"];
    let mut client = from.start(&ground.world.programs().testpod, &args.map(str::to_owned))?;
    client.wait_for_line("ready", Duration::from_secs(5))?;
    Ok(client)
}

/// The held connection must have been answered all the time.
fn unbroken(client: Client, what: &str) -> Result<()> {
    let report: hold::Report = client.finish(Duration::from_secs(5))?;
    ensure!(report.broken.is_empty() && report.wrong.is_empty(), "{what}: {report:?}");
    ensure!(report.rounds > 0, "{what}: never asked again");
    Ok(())
}

fn per_packet_clients<'a>(ground: &'a Ground<'_>) -> impl Iterator<Item = &'a Place> {
    ground.origins().into_iter().filter(|from| ground.per_packet(from))
}

pub fn two_vips(ground: &Ground<'_>) -> Result<()> {
    for from in per_packet_clients(ground) {
        for family in Family::BOTH {
            for transport in [Transport::Tcp, Transport::Udp] {
                let port = PORT.fetch_add(1, Ordering::Relaxed);
                let what = format!("{} {family} {transport} from port {port}", from.name);
                let (one, other) = (Svc::One.at(family, transport), Svc::Other.at(family, transport));
                let held = if transport == Transport::Tcp { Some(hold(ground, from, one, port)?) } else { None };
                let arg = format!("--source-port={port}");
                for to in [one, other, one, other] {
                    // While the first is held, its own tuple is taken.
                    if held.is_some() && to == one {
                        continue;
                    }
                    let ask = Ask::new(to, transport).with(&arg).with("--reset");
                    ground.answered(from, &ask).with_context(|| what.clone())?;
                }
                if let Some(held) = held {
                    std::thread::sleep(Duration::from_millis(100));
                    unbroken(held, &what)?;
                }
            }
        }
    }
    Ok(())
}

/// F48: with the first connection open, and with it closed just before (by FIN and by RST).
pub fn vip_then_backend(ground: &Ground<'_>) -> Result<()> {
    let backend = ground.world.pod("c2");
    for from in per_packet_clients(ground).filter(|from| from.node.is_some()) {
        for family in Family::BOTH {
            let vip = Svc::One.at(family, Transport::Tcp);
            let direct = backend.at(family, 8080);
            let port = PORT.fetch_add(1, Ordering::Relaxed);
            let what = format!("{} {family} from port {port}", from.name);
            let held = hold(ground, from, vip, port)?;
            let arg = format!("--source-port={port}");
            for _ in 0..3 {
                ground
                    .answered(from, &Ask::new(direct, Transport::Tcp).with(&arg).with("--reset"))
                    .with_context(|| format!("{what}: straight to the backend, with a connection to the VIP open"))?;
            }
            std::thread::sleep(Duration::from_millis(100));
            unbroken(held, &what)?;
            for end in ["--reset", ""] {
                let port = PORT.fetch_add(1, Ordering::Relaxed);
                let what = format!("{} {family} from port {port}, closed before {end}", from.name);
                let arg = format!("--source-port={port}");
                let ask = |to| {
                    let ask = Ask::new(to, Transport::Tcp).with(&arg);
                    if end.is_empty() { ask } else { ask.with(end) }
                };
                ground.answered(from, &ask(vip)).with_context(|| format!("{what}: VIP"))?;
                ground.answered(from, &ask(direct)).with_context(|| format!("{what}: backend"))?;
            }
            let port = PORT.fetch_add(1, Ordering::Relaxed);
            let arg = format!("--source-port={port}");
            for to in
                [Svc::One.at(family, Transport::Udp), backend.at(family, 8080), Svc::One.at(family, Transport::Udp)]
            {
                ground
                    .answered(from, &Ask::new(to, Transport::Udp).with(&arg))
                    .with_context(|| format!("{} {family} UDP from port {port} to {to}", from.name))?;
            }
        }
    }
    Ok(())
}

/// The other way round: the direct connection is there first, and the programs never saw it.
pub fn backend_then_vip(ground: &Ground<'_>) -> Result<()> {
    let backend = ground.world.pod("c2");
    for from in per_packet_clients(ground).filter(|from| from.node.is_some()) {
        for family in Family::BOTH {
            let (vip, direct) = (Svc::One.at(family, Transport::Tcp), backend.at(family, 8080));
            let port = PORT.fetch_add(1, Ordering::Relaxed);
            let what = format!("{} {family} from port {port}", from.name);
            let held = hold(ground, from, direct, port)?;
            let arg = format!("--source-port={port}");
            for _ in 0..3 {
                ground
                    .answered(from, &Ask::new(vip, Transport::Tcp).with(&arg).with("--reset"))
                    .with_context(|| format!("{what}: the VIP, with a connection to its backend open"))?;
            }
            std::thread::sleep(Duration::from_millis(100));
            unbroken(held, &what)?;
        }
    }
    Ok(())
}
