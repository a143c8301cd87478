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
        let (mut there, mut back) = (Vec::new(), Vec::new());
        for map in [&self.answered, &self.half_open] {
            map.each(|key, value| {
                if key.proto == proto::UDP && is_lost(alive, &key, &value) {
                    if key.hook == hook::INGRESS { there.push((key, value)) } else { back.push(key) }
                }
            })?;
        }
        for (key, _) in &there {
            self.remove_udp(key)?;
        }
        for key in &back {
            self.remove_udp(key)?;
        }
        for (key, value) in &there {
            if value.flags & flags::NEEDS_MASQUERADE != 0 {
                self.remove_masquerade(key, value)?;
            }
        }
        Ok(there.len() as u64)
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
                self.remove_udp(&pair(&out, &found).0)?;
            }
            map.remove(&out)?;
        }
        Ok(())
    }

    /// A flow may have moved from one table to the other since it was found.
    fn remove_udp(&self, key: &ConnectionKey<A>) -> io::Result<()> {
        self.answered.remove(key)?;
        self.half_open.remove(key)?;
        Ok(())
    }

    /// Marks the TCP flows that lost their backend; half-open ones are deleted, their next SYN is chosen for anew. How many there
    /// were that no mark was on yet.
    pub(super) fn end_tcp(&self, alive: &Alive) -> io::Result<u64> {
        let (mut marked, mut half) = (Vec::new(), Vec::new());
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
                half.push((key.hook, key));
            }
        })?;
        let mut ended = 0;
        for (key, value) in marked {
            let value = ConnectionValue { flags: value.flags | flags::RESET, ..value }.sealed(&key);
            match self.established.put(&key, &value, EXIST) {
                Ok(()) => ended += 1,
                // Over by itself.
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
                Err(error) => return Err(error),
            }
        }
        half.sort_by_key(|(hook, _)| *hook);
        for (at, key) in half {
            if self.half_open.remove(&key)? && at == hook::INGRESS {
                ended += 1;
            }
        }
        Ok(ended)
    }
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
