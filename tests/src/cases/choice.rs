//! A30–A42 with real sockets: which endpoints may be picked.

use anyhow::Result;

use super::{Ground, services::Svc};

pub fn ready_only(ground: &Ground<'_>) -> Result<()> {
    ground.origins().into_iter().try_for_each(|from| ground.served_by(from, Svc::OneReady, &["b1"]))
}

pub fn terminating(ground: &Ground<'_>) -> Result<()> {
    ground.origins().into_iter().try_for_each(|from| ground.served_by(from, Svc::Terminating, &["c1"]))
}

/// What is ready elsewhere does not make the local one less of a choice.
pub fn local_terminating(ground: &Ground<'_>) -> Result<()> {
    ground.origins().into_iter().try_for_each(|from| ground.served_by(from, Svc::LocalTerminating, &["c1"]))?;
    ground.served_by(ground.world.pod("a2"), Svc::LocalTerminating, &["b2"])
}

pub fn zones(ground: &Ground<'_>) -> Result<()> {
    ground.origins().into_iter().try_for_each(|from| ground.served_by(from, Svc::Zones, &["b1"]))?;
    ground.served_by(ground.world.pod("a2"), Svc::Zones, &["b2"])
}

pub fn nodes(ground: &Ground<'_>) -> Result<()> {
    ground.origins().into_iter().try_for_each(|from| ground.served_by(from, Svc::Nodes, &["b1"]))?;
    ground.served_by(ground.world.pod("a2"), Svc::Nodes, &["b2"])
}
