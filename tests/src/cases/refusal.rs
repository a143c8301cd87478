//! A81–A87: refused, at once, where nobody can answer; silence where somebody might elsewhere.

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
                    // The transport that has no frontend there is refused as an unused port is.
                    ground.refused(from, vip(family, svc.number()), port)?;
                }
            }
        }
    }
    Ok(())
}

/// There is nobody elsewhere, either.
pub fn local_without_any(ground: &Ground<'_>) -> Result<()> {
    for from in ground.origins() {
        for family in Family::BOTH {
            for port in [80, 53] {
                ground.refused(from, vip(family, Svc::EmptyLocal.number()), port)?;
            }
        }
    }
    Ok(())
}

pub fn unused_port(ground: &Ground<'_>) -> Result<()> {
    for from in ground.origins() {
        for family in Family::BOTH {
            ground.refused(from, vip(family, Svc::Web.number()), 4711)?;
        }
    }
    Ok(())
}

/// A reset for TCP; for a datagram an ICMP error that quotes what the backend got.
pub fn by_the_backend(ground: &Ground<'_>) -> Result<()> {
    for from in ground.origins() {
        for family in Family::BOTH {
            for transport in Transport::ALL {
                ground.refused_over(transport, from, Svc::Deaf.at(family, transport))?;
            }
        }
    }
    Ok(())
}

pub fn local_without_local(ground: &Ground<'_>) -> Result<()> {
    for from in ground.origins() {
        for family in Family::BOTH {
            ground.dropped(from, Svc::RemoteOnly, family)?;
        }
    }
    Ok(())
}
