//! A hundred changes a second through the watch, and whether whoever answered was chosen then.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use proxy_tests::{
    feed::Feed,
    pod::storm::{self, Answered},
    world::{
        Family, Place, World, objects,
        pins::{Elements, changed},
        vip,
    },
};
use serde_json::{Value, json};

use crate::{BLUE, Dice, RED, names, node_ports, pods_of, slice, traffic::Stormed};

/// What one Service was made to look like over one family.
struct Era {
    /// When the change to it was written, and when it was in force on both nodes ([`storm::now`]).
    written: u64,
    in_force: u64,
    chosen: BTreeSet<String>,
}

/// Changes through the watch, each made once the one before is in force on both nodes: in the map that the programs read.
pub(super) struct Changes<'a> {
    world: &'a World,
    feed: &'a Feed,
    /// Changes of EndpointSlices that each agent says it has seen.
    seen: [u64; 2],
    eras: BTreeMap<(&'static str, Family), Vec<Era>>,
}

impl<'a> Changes<'a> {
    pub(super) fn new(world: &'a World, feed: &'a Feed) -> Result<Self> {
        let of = |number| Ok::<_, anyhow::Error>(endpoint_changes(world, number)?.0);
        let mut changes = Self { world, feed, seen: [of(1)?, of(2)?], eras: BTreeMap::new() };
        for service in [RED, BLUE] {
            for family in Family::BOTH {
                let all = Era { written: 0, in_force: 0, chosen: names(&pods_of(world, service)) };
                changes.eras.insert((service, family), vec![all]);
            }
        }
        Ok(changes)
    }

    /// Makes these, and no others, those that are chosen, if they are not. Those of red terminate, so that a datagram on its way is answered, those of
    /// blue are gone at once.
    pub(super) fn choose(&mut self, service: &'static str, family: Family, chosen: &[&Place]) -> Result<()> {
        let now = self.eras.get(&(service, family)).and_then(|eras| eras.last()).context("no state")?;
        if now.chosen == names(chosen) {
            return Ok(());
        }
        let object = if service == RED {
            let state = |slice: objects::Slice, place: &&Place| {
                let chosen = chosen.iter().any(|chosen| chosen.name == place.name);
                let conditions = json!({"ready": chosen, "serving": true, "terminating": !chosen});
                slice.endpoint_with(place, conditions, Value::Null)
            };
            let ports = objects::slice(service, family).port("web", "TCP", 8080).port("dns", "UDP", 8080);
            pods_of(self.world, service).iter().fold(ports, state).json()
        } else {
            slice(service, family, chosen)
        };
        let before = [frontends(self.world, 1, service, family)?, frontends(self.world, 2, service, family)?];
        let written = storm::now();
        self.feed.set(&object)?;
        for (before, number) in before.iter().zip([1, 2]) {
            let deadline = Instant::now() + Duration::from_secs(10);
            // A changed list of backends is never where the one before was, so that all ports' entries change, and the guard does not.
            while changed(before, &frontends(self.world, number, service, family)?).len() + 1 < before.len() {
                ensure!(Instant::now() < deadline, "node{number}: a change of {service} {family} is not in force");
                thread::sleep(Duration::from_micros(200));
            }
        }
        let era = Era { written, in_force: storm::now(), chosen: names(chosen) };
        self.eras.entry((service, family)).or_default().push(era);
        self.seen = self.seen.map(|seen| seen + 1);
        Ok(())
    }

    /// The agents say so, too, a little later.
    fn reported(&self) -> Result<()> {
        for (seen, number) in self.seen.into_iter().zip([1, 2]) {
            let deadline = Instant::now() + Duration::from_secs(10);
            while endpoint_changes(self.world, number)? != (seen, 0) {
                ensure!(
                    Instant::now() < deadline,
                    "node{number} says {:?} of changes and of those not in force, expected {seen} and none",
                    endpoint_changes(self.world, number)?
                );
                thread::sleep(Duration::from_millis(10));
            }
        }
        Ok(())
    }

    /// A hundred changes, one every 9.5 ms if the one before is in force by then; how long they took, to the end of the last.
    pub(super) fn hundred(&mut self, dice: &mut Dice) -> Result<Duration> {
        let start = Instant::now();
        for turn in 0..100 {
            thread::sleep((Duration::from_micros(9_500) * turn).saturating_sub(start.elapsed()));
            let service = if turn % 3 == 0 { BLUE } else { RED };
            let family = if dice.roll() & 1 == 0 { Family::V4 } else { Family::V6 };
            let pods = pods_of(self.world, service);
            let now = self.eras.get(&(service, family)).and_then(|eras| eras.last()).context("no state")?;
            let before = now.chosen.clone();
            let chosen = loop {
                let chosen = dice.some(&pods);
                if names(&chosen) != before {
                    break chosen;
                }
            };
            self.choose(service, family, &chosen)?;
        }
        let took = start.elapsed();
        self.reported()?;
        Ok(took)
    }

    /// Who answered was chosen at some time between the connection's beginning and its end. Returns how many answers some other pod
    /// of the Service could not have given.
    pub(super) fn judge(&self, stormed: &[Stormed]) -> Result<usize> {
        let mut telling = 0;
        for Stormed { what, service, family, log } in stormed {
            let eras = self.eras.get(&(*service, *family)).context("no state")?;
            let last = eras.last().context("no state")?;
            let at_last: BTreeSet<String> =
                log.iter().filter(|answered| answered.began > last.in_force).map(|a| a.backend.clone()).collect();
            ensure!(at_last == last.chosen, "{what}: {at_last:?} answered at last, expected {:?}", last.chosen);
            let all = pods_of(self.world, service).len();
            for Answered { began, ended, backend } in log {
                // What was in force stays so until the agent has done the next change, which it may at once after that was written.
                let over = eras.iter().skip(1).map(|next| next.in_force).chain([u64::MAX]);
                let then = eras.iter().zip(over).filter(|(era, over)| era.written <= *ended && *over >= *began);
                let chosen: BTreeSet<&String> = then.flat_map(|(era, _)| &era.chosen).collect();
                telling += usize::from(chosen.len() < all);
                let last = eras.iter().rev().find(|era| era.in_force < *began && era.chosen.contains(backend));
                ensure!(
                    chosen.contains(backend),
                    "{what}: {backend} answered, which had been taken out before: only {chosen:?} were chosen in the {} µs of this \
                     connection, {backend} last {:?} µs before it",
                    ended - began,
                    last.map(|era| began - era.in_force)
                );
            }
        }
        Ok(telling)
    }
}

/// The entries of one Service over one family, those of its ports, its NodePorts and its guard.
fn frontends(world: &World, number: usize, service: &str, family: Family) -> Result<Elements> {
    let (map, address) = match vip(family, crate::number(service)) {
        IpAddr::V4(ip) => ("frontends_v4", ip.octets().to_vec()),
        IpAddr::V6(ip) => ("frontends_v6", ip.octets().to_vec()),
    };
    let mut elements = world.node(number).pinned_map(map)?;
    let node_ports = node_ports(crate::number(service)).map(u16::to_be_bytes);
    elements.retain(|key, _| {
        let port = key.get(address.len()..).and_then(<[u8]>::first_chunk);
        key.starts_with(&address) || port.is_some_and(|port| node_ports.contains(port))
    });
    Ok(elements)
}

/// How many changes of EndpointSlices an agent says it has seen, and how many of them are not in force.
fn endpoint_changes(world: &World, number: usize) -> Result<(u64, u64)> {
    let status = world.node(number).status()?;
    let of =
        |field: &str| status.pointer(field).and_then(Value::as_u64).with_context(|| format!("no {field} in /status"));
    Ok((of("/sync/endpointChanges")?, of("/sync/pendingEndpoints")?))
}
