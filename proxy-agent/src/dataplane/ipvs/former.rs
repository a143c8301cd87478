//! What IPVS left in force, where another mode takes over.
//!
//! Every other mode translates what is new before IPVS is asked (hooks prerouting and output, or earlier), and leaves alone what conntrack knows.
//! So the open connections of IPVS go on as long as their packets come to the node's own input, where it translates them by its own table.
//! That takes an address that is the node's, but not one that a process of the node is given as its source when it asks by the rules of
//! the mode that serves now: it would lose it in the midst. So a route stays in the place of each address, with another source.
//!
//! Retired it has servers without weight, by which nothing new goes, those routes, its settings, and a table that guards the node's own
//! sockets at those addresses and leads nobody.

use std::{collections::BTreeSet, net::IpAddr};

use super::{
    Ipvs,
    codec::{Destination, Request, Virtual},
    connections,
    device::{self, Device},
    notes::{Ours, kernel, remove},
};
use crate::{
    dataplane::{
        DataplaneError, former,
        netfilter::{
            Options,
            conntrack::{Entry, Socket},
        },
        nftables::{Nftables, Role},
        select::Mode,
    },
    model::Family,
};

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Former {
    /// Known once it is retired.
    servers: BTreeSet<Virtual>,
    held: BTreeSet<IpAddr>,
}

impl former::Former for Former {
    fn name(&self) -> &'static str {
        Mode::Ipvs.name()
    }

    fn is_there(&mut self) -> Result<bool, DataplaneError> {
        Ok(!Ipvs::remains()?.is_empty())
    }

    fn retire(&mut self) -> Result<(), DataplaneError> {
        let mut ours = Ours::find(&Options::default())?;
        replace_addresses(&ours)?;
        let requests = without_weight(&mut ours)?;
        ours.run(&requests)?;
        // Last: until then it masquerades whoever was given a Service's address as their source.
        Nftables::retire_gate()?;
        self.held = &ours.bound | &ours.routed;
        self.servers = ours.servers;
        Ok(())
    }

    fn flows(&mut self) -> Result<u64, DataplaneError> {
        // Whoever flushed all rules took what guards the node's own sockets at those addresses: rather end what is open.
        if Nftables::remains_of(Role::Gate)?.is_empty() {
            return Ok(0);
        }
        let open = connections::open(&self.servers).map_err(kernel("the connections of IPVS"))?;
        Ok(open + self.by_held())
    }

    fn remove(&mut self) -> Result<(), DataplaneError> {
        remove(&Options::default())
    }
}

impl Former {
    /// Those of the node's own that were given a Service's address as their source by the rules of the mode that serves now, before this one was
    /// retired. Where conntrack cannot be asked they are not waited for.
    fn by_held(&self) -> u64 {
        let mut flows = 0;
        for family in Family::BOTH {
            let counted = Socket::open().and_then(|socket| {
                socket.all_entries(family, |Entry { opener: (addr, _), translated, zoned, over, .. }| {
                    flows += u64::from(translated && !zoned && !over && self.held.contains(&addr));
                })
            });
            if let Err(error) = counted {
                tracing::debug!(%error, "the node's own connections by way of Services' addresses are not counted");
            }
        }
        flows
    }
}

/// By routes. A family that the node has no address of its own of has nobody who could lose one.
fn replace_addresses(ours: &Ours) -> Result<(), DataplaneError> {
    let Ours { route, device: Some(Device { index, .. }), bound, .. } = ours else { return Ok(()) };
    for family in Family::BOTH {
        let mut bound = bound.iter().filter(|addr| Family::of(**addr) == family).peekable();
        if bound.peek().is_none() {
            continue;
        }
        let Some(source) = route.source(family).map_err(kernel("the node's own addresses"))? else { continue };
        for addr in bound {
            route
                .route_here(*index, *addr, source)
                .map_err(kernel(&format!("a route to {addr} by {}", device::NAME)))?;
            // It comes before the one that an address of IPv4 has; with a device's last such address all its routes would go. An address of IPv6 is
            // a source to itself whatever a route says.
            if family == Family::V6 {
                route.take_off(*index, *addr).map_err(kernel(&format!("{addr} of {}", device::NAME)))?;
            }
        }
    }
    Ok(())
}

fn without_weight(ours: &mut Ours) -> Result<Vec<Request>, DataplaneError> {
    let Ours { socket: Some(socket), servers, .. } = ours else { return Ok(Vec::new()) };
    let mut requests = Vec::new();
    for at in servers.iter() {
        let held = socket.destinations(*at).map_err(kernel("IPVS"))?;
        let chosen = held.iter().filter(|held| held.destination.weight > 0).map(|held| held.destination);
        requests.extend(chosen.map(|chosen| Request::SetDestination(*at, Destination { weight: 0, ..chosen })));
    }
    Ok(requests)
}
