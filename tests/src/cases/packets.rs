//! Packets that are not the ordinary ones: fragments, and ICMP messages about translated flows.

use std::net::IpAddr;

use anyhow::{Result, ensure};

use super::{Ground, services::Svc};
use crate::{
    pod::socket::Transport,
    world::{Ask, Family, Topology},
};

/// Datagrams of 8 KB both ways: only the first fragment carries ports.
pub fn fragments(ground: &Ground<'_>) -> Result<()> {
    for from in ground.origins() {
        for family in Family::BOTH {
            for transport in [Transport::Udp, Transport::UdpUnconnected] {
                let to = Svc::Web.at(family, transport);
                // The first one may be what tells an IPv6 sender of a smaller MTU on the way.
                let warm = Ask::new(to, transport).times(8).timeout(300).with("--size=8000").with("--reply=8000");
                ground.world.ask(from, &warm)?;
                ground.answered(from, &warm.timeout(1000))?;
            }
        }
    }
    Ok(())
}

/// The last link to the backend takes 1300 bytes: the node before it says so to the sender, who must understand it although
/// it never heard of the backend.
pub fn path_mtu(ground: &Ground<'_>) -> Result<()> {
    let world = ground.world;
    let node = &world.node(2).place.namespace;
    let (link, before) = match world.topology {
        Topology::Routed => (world.pod_link(world.pod("b2")), 1500),
        Topology::Bridge | Topology::Uplink => ("cni0".to_owned(), 1500),
        Topology::Vxlan => ("cni0".to_owned(), 1450),
    };
    node.ip(&format!("link set {link} mtu 1300\n"))?;
    let outcome = [world.pod("a1"), world.outside(), &world.node(1).place].into_iter().try_for_each(|from| {
        for family in Family::BOTH {
            let to = Svc::Remote.at(family, Transport::Tcp);
            let ask = Ask::new(to, Transport::Tcp).timeout(5000).with("--size=200000");
            ground.answered(from, &ask)?;
            // At connect time the kernel knows the flow by its backend, per packet by the VIP.
            let known = [to.ip(), world.pod("b2").ip(family)].map(|peer: IpAddr| {
                let route = from.namespace.output("ip", &["route", "get", &peer.to_string()]);
                route.is_ok_and(|route| route.contains("mtu 1300"))
            });
            ensure!(known.contains(&true), "{} -> {to}: all arrived, but the path MTU is not known", from.name);
        }
        Ok(())
    });
    node.ip(&format!("link set {link} mtu {before}\n"))?;
    outcome
}
