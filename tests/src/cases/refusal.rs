//! A7: refused, at once, where nobody can answer; silence where somebody might elsewhere.

use anyhow::Result;

use super::{Ground, services::Svc};
use crate::{
    pod::socket::Transport,
    world::{Family, vip},
};

pub fn no_endpoints(ground: &Ground<'_>) -> Result<()> {
    for from in ground.origins() {
        for family in Family::BOTH {
            for svc in [Svc::Empty, Svc::Unready] {
                for port in [80, 53] {
                    refused_on(ground, from, family, svc, port)?;
                }
            }
        }
    }
    Ok(())
}

/// On the transport of this port; the other one has no frontend there and is refused as an unused port is.
fn refused_on(ground: &Ground<'_>, from: &crate::world::Place, family: Family, svc: Svc, port: u16) -> Result<()> {
    ground.refused(from, vip(family, svc.number()), port)
}

pub fn unused_port(ground: &Ground<'_>) -> Result<()> {
    for from in ground.origins() {
        for family in Family::BOTH {
            ground.refused(from, vip(family, Svc::Web.number()), 4711)?;
        }
    }
    Ok(())
}

pub fn local_without_local(ground: &Ground<'_>) -> Result<()> {
    for from in ground.origins() {
        for family in Family::BOTH {
            ground.dropped(from, Svc::RemoteOnly.at(family, Transport::Tcp))?;
        }
    }
    Ok(())
}
