//! The per-packet path's flows: finds those that lost their backend, and ends them.
//!
//! UDP: the flow's entries are deleted, and its next packet is chosen for anew. TCP: the entry of the way there is marked, and the
//! next packet of the client's is answered with a reset.
//!
//! Nothing locks the table against the programs, so the way there goes first: what finds the way back alone puts the other
//! one back at worst, and the second look finds it again.

use std::io;

use proxy_common::{
    Address, Be16, Ipv4Be, Ipv6Be,
    connection::{ConnectionKey, ConnectionValue, flags, hook, pair},
    proto,
};

use super::alive::Alive;
use crate::{
    dataplane::ebpf::{
        layout::MapName,
        pins::Layout,
        sys::{self, Map},
    },
    desired::{Backend, Frontend},
    model::{Port, Protocol},
};

/// Update only what is there.
const EXIST: u64 = 2;

/// A family's flow tables.
pub(super) struct Tables<A> {
    established: Map<ConnectionKey<A>, ConnectionValue<A>>,
    answered: Map<ConnectionKey<A>, ConnectionValue<A>>,
    half_open: Map<ConnectionKey<A>, ConnectionValue<A>>,
}

impl Tables<Ipv4Be> {
    pub(super) fn open_v4(layout: &Layout) -> io::Result<Self> {
        Self::open(layout, [MapName::EstablishedV4, MapName::AnsweredV4, MapName::HalfOpenV4])
    }
}

impl Tables<Ipv6Be> {
    pub(super) fn open_v6(layout: &Layout) -> io::Result<Self> {
        Self::open(layout, [MapName::EstablishedV6, MapName::AnsweredV6, MapName::HalfOpenV6])
    }
}

impl<A: Address> Tables<A>
where
    ConnectionKey<A>: aya::Pod,
    ConnectionValue<A>: aya::Pod,
{
    fn open(layout: &Layout, [established, answered, half_open]: [MapName; 3]) -> io::Result<Self> {
        let map = |name| sys::open(&layout.map(name)).and_then(Map::new);
        Ok(Self { established: map(established)?, answered: map(answered)?, half_open: map(half_open)? })
    }

    /// Ends the UDP flows that lost their backend. How many there were.
    pub(super) fn end_udp(&self, alive: &Alive) -> io::Result<u64> {
        let lost = self.lost_udp(alive)?;
        self.remove_udp_flows(&lost)
    }

    fn lost_udp(&self, alive: &Alive) -> io::Result<Lost<A>> {
        let mut lost = Lost::default();
        for map in [&self.answered, &self.half_open] {
            map.each(|key, value| {
                if key.proto == proto::UDP && is_lost(alive, &key, &value) {
                    lost.add(key, value);
                }
            })?;
        }
        Ok(lost)
    }

    fn remove_udp_flows(&self, Lost { there, back }: &Lost<A>) -> io::Result<u64> {
        let mut ended = Vec::new();
        for (key, value) in there {
            if self.remove_udp(key, value)? {
                ended.push((key, value));
            }
        }
        for (key, value) in back {
            self.remove_udp(key, value)?;
        }
        for (key, value) in &ended {
            if value.flags & flags::NEEDS_MASQUERADE != 0 {
                self.remove_masquerade(key, value)?;
            }
        }
        Ok(ended.len() as u64)
    }

    /// Deletes the pair that masquerades a flow.
    fn remove_masquerade(&self, key: &ConnectionKey<A>, value: &ConnectionValue<A>) -> io::Result<()> {
        let out = ConnectionKey::new(hook::EGRESS, key.proto, key.src, value.other, value.addr, value.port);
        for map in [&self.answered, &self.half_open] {
            let Some(found) = map.get(&out)?.filter(|found| found.is_sealed_for(&out)) else { continue };
            if found.flags & flags::MASQUERADE == 0 {
                continue;
            }
            if found.flags & flags::PENDING == 0 {
                let (key, value) = pair(&out, &found);
                self.remove_udp(&key, &value)?;
            }
            map.remove(&out)?;
        }
        Ok(())
    }

    /// A flow may have moved from one table to the other since it was found, or have given its place to another one, which stays.
    fn remove_udp(&self, key: &ConnectionKey<A>, value: &ConnectionValue<A>) -> io::Result<bool> {
        let mut removed = false;
        for map in [&self.answered, &self.half_open] {
            removed |= is_still(map, key, value)?.is_some() && map.remove(key)?;
        }
        Ok(removed)
    }

    /// Marks the TCP flows that lost their backend; half-open ones are deleted, their next SYN is chosen for anew. How many there
    /// were that no mark was on yet.
    pub(super) fn end_tcp(&self, alive: &Alive) -> io::Result<u64> {
        let (marked, half) = self.lost_tcp(alive)?;
        self.mark(&marked, &half)
    }

    /// Ways there of established flows, and half-open ones.
    fn lost_tcp(&self, alive: &Alive) -> io::Result<(Entries<A>, Lost<A>)> {
        let (mut marked, mut half) = (Vec::new(), Lost::default());
        let found = |key: &ConnectionKey<A>, value: &ConnectionValue<A>| {
            key.proto == proto::TCP && value.flags & flags::RESET == 0 && is_lost(alive, key, value)
        };
        self.established.each(|key, value| {
            if key.hook == hook::INGRESS && found(&key, &value) {
                marked.push((key, value));
            }
        })?;
        self.half_open.each(|key, value| {
            if found(&key, &value) {
                half.add(key, value);
            }
        })?;
        Ok((marked, half))
    }

    fn mark(&self, marked: &Entries<A>, Lost { there, back }: &Lost<A>) -> io::Result<u64> {
        let mut ended = 0;
        for (key, value) in marked {
            // With the notes as they are by now.
            let Some(value) = is_still(&self.established, key, value)? else { continue };
            let value = ConnectionValue { flags: value.flags | flags::RESET, ..value }.sealed(key);
            match self.established.put(key, &value, EXIST) {
                Ok(()) => ended += 1,
                // Over by itself.
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
                Err(error) => return Err(error),
            }
        }
        for (key, value) in there {
            ended += u64::from(is_still(&self.half_open, key, value)?.is_some() && self.half_open.remove(key)?);
        }
        for (key, value) in back {
            if is_still(&self.half_open, key, value)?.is_some() {
                self.half_open.remove(key)?;
            }
        }
        Ok(ended)
    }
}

type Entries<A> = Vec<(ConnectionKey<A>, ConnectionValue<A>)>;

/// What a walk found, apart because the way there goes first.
struct Lost<A> {
    there: Entries<A>,
    back: Entries<A>,
}

impl<A> Default for Lost<A> {
    fn default() -> Self {
        Self { there: Vec::new(), back: Vec::new() }
    }
}

impl<A> Lost<A> {
    fn add(&mut self, key: ConnectionKey<A>, value: ConnectionValue<A>) {
        if key.hook == hook::INGRESS { self.there.push((key, value)) } else { self.back.push((key, value)) }
    }
}

/// The entry as it is by now, if it is still the one that a walk found: a walk takes its time, and meanwhile the client may have opened
/// another flow from the same port, to somebody who serves.
fn is_still<A: Address>(
    map: &Map<ConnectionKey<A>, ConnectionValue<A>>,
    key: &ConnectionKey<A>,
    found: &ConnectionValue<A>,
) -> io::Result<Option<ConnectionValue<A>>>
where
    ConnectionKey<A>: aya::Pod,
    ConnectionValue<A>: aya::Pod,
{
    Ok(map.get(key)?.filter(|now| now.seal == found.seal && now.is_sealed_for(key)))
}

/// Whether an entry belongs to a flow from a frontend to a backend that it may not go on with.
fn is_lost<A: Address>(alive: &Alive, key: &ConnectionKey<A>, value: &ConnectionValue<A>) -> bool {
    if value.flags & (flags::MASQUERADE | flags::DIRECT) != 0 || !value.is_sealed_for(key) {
        return false;
    }
    let protocol = if key.proto == proto::UDP { Protocol::Udp } else { Protocol::Tcp };
    let (vip, vip_port, to, to_port) = if key.hook == hook::INGRESS {
        (key.dst, key.dport, value.addr, value.port)
    } else {
        (value.addr, value.port, key.src, key.sport)
    };
    let port = |port: Be16| Port::new(port.to_host());
    let (Some(vip_port), Some(to_port)) = (port(vip_port), port(to_port)) else { return false };
    let frontend = Frontend { addr: vip.to_ip(), port: vip_port, protocol };
    alive.is_lost(&frontend, &Backend { addr: to.to_ip(), port: to_port })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataplane::ebpf::{
        hygiene::alive::{Change, Keep},
        layout::Sizes,
    };

    type A = Ipv4Be;

    fn tables() -> Option<Tables<A>> {
        if !rustix::process::geteuid().is_root() {
            println!("SKIP flows of removed backends: not root");
            return None;
        }
        let map = |name: MapName| sys::create(name.as_str(), name.info(&Sizes::default())).and_then(Map::new).unwrap();
        let (established, answered, half_open) = (MapName::EstablishedV4, MapName::AnsweredV4, MapName::HalfOpenV4);
        Some(Tables { established: map(established), answered: map(answered), half_open: map(half_open) })
    }

    const fn ip(n: u8) -> A {
        Ipv4Be::from_octets([10, 0, 0, n])
    }

    /// A flow from the client's port to backend `n`: way there and way back.
    fn flow(proto: u8, port: u16, n: u8) -> [(ConnectionKey<A>, ConnectionValue<A>); 2] {
        let port = Be16::from_host(port);
        let key = ConnectionKey::new(hook::INGRESS, proto, ip(200), port, ip(100), Be16::from_host(80));
        let value = ConnectionValue { addr: ip(n), port: Be16::from_host(8080), other: port, ..Default::default() };
        [(key, value.sealed(&key)), pair(&key, &value)]
    }

    fn put(map: &Map<ConnectionKey<A>, ConnectionValue<A>>, flow: &[(ConnectionKey<A>, ConnectionValue<A>)]) {
        for (key, value) in flow {
            map.put(key, value, 0).unwrap();
        }
    }

    /// Backend 2 serves, 1 is gone.
    fn alive(protocol: Protocol) -> Alive {
        let port = |n| Port::new(n).unwrap();
        let frontend = Frontend { addr: ip(100).to_ip(), port: port(80), protocol };
        let keep = Keep::Only(vec![Backend { addr: ip(2).to_ip(), port: port(8080) }].into());
        let (mut alive, now) = (Alive::default(), std::time::Instant::now());
        alive.apply(Change { set: vec![(frontend, keep)], ..Change::default() }, now);
        alive.settle(now + super::super::alive::TCP_GRACE);
        alive
    }

    #[test]
    fn a_flow_that_took_the_place_of_a_lost_one_stays() {
        let Some(tables) = tables() else { return };
        let (lost, given_up, other) = (flow(proto::TCP, 1, 1), flow(proto::TCP, 2, 1), flow(proto::TCP, 3, 2));
        for flow in [&lost, &given_up, &other] {
            put(&tables.established, flow);
        }
        let (half, half_given_up) = (flow(proto::TCP, 4, 1), flow(proto::TCP, 5, 1));
        put(&tables.half_open, &half);
        put(&tables.half_open, &half_given_up);
        let (marked, halves) = tables.lost_tcp(&alive(Protocol::Tcp)).unwrap();
        assert_eq!((marked.len(), halves.there.len(), halves.back.len()), (2, 2, 2));
        // Between the walk and what it leads to.
        let reopened = [flow(proto::TCP, 2, 2), flow(proto::TCP, 5, 2)];
        put(&tables.established, &reopened[0]);
        put(&tables.half_open, &reopened[1]);
        assert_eq!(tables.mark(&marked, &halves).unwrap(), 2);
        let is_marked = |(key, _): &(ConnectionKey<A>, ConnectionValue<A>)| {
            let found = tables.established.get(key).unwrap().unwrap();
            assert!(found.is_sealed_for(key));
            found.flags & flags::RESET != 0
        };
        assert!(is_marked(&lost[0]) && !is_marked(&lost[1]));
        assert!(!is_marked(&reopened[0][0]) && !is_marked(&other[0]));
        assert_eq!(tables.established.get(&reopened[0][0].0).unwrap(), Some(reopened[0][0].1));
        assert_eq!(half.map(|(key, _)| tables.half_open.get(&key).unwrap()), [None, None]);
        assert_eq!(tables.half_open.get(&reopened[1][0].0).unwrap(), Some(reopened[1][0].1));

        let (lost, given_up) = (flow(proto::UDP, 1, 1), flow(proto::UDP, 2, 1));
        put(&tables.answered, &lost);
        put(&tables.answered, &given_up);
        let found = tables.lost_udp(&alive(Protocol::Udp)).unwrap();
        assert_eq!((found.there.len(), found.back.len()), (2, 2));
        let reopened = flow(proto::UDP, 2, 2);
        put(&tables.answered, &reopened);
        // Its old way back leads nowhere any more, and is not the new one's.
        assert_eq!(tables.remove_udp_flows(&found).unwrap(), 1);
        let left: Vec<_> = tables.answered.entries().unwrap().into_iter().map(|(key, _)| key).collect();
        assert!(left.len() == 2 && reopened.iter().all(|(key, _)| left.contains(key)), "{left:?}");
    }
}
