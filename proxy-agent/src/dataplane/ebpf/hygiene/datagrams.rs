//! Unconnected UDP of the connect-time path: which backend a socket's later datagrams go to. The programs ask nobody whether it serves: the
//! entry of one that does not is deleted here, and the next datagram is chosen for anew.

use std::io;

use proxy_common::{
    Address, Ipv4Be, Ipv6Be,
    affinity::is_expired,
    slot::Target,
    socket::{DatagramKey, DatagramValue, direction},
};

use super::flows::Clock;
use crate::{
    dataplane::{
        alive::Alive,
        ebpf::{
            former,
            layout::MapName,
            pins::Layout,
            sys::{self, Map},
        },
    },
    model::Protocol,
};

/// Ends the flows that lost their backend. How many there were.
pub(super) fn end(layout: &Layout, alive: &Alive) -> io::Result<u64> {
    Ok(end_in::<Ipv4Be>(layout, MapName::DatagramsV4, alive)? + end_in::<Ipv6Be>(layout, MapName::DatagramsV6, alive)?)
}

fn end_in<A: Address>(layout: &Layout, name: MapName, alive: &Alive) -> io::Result<u64>
where
    DatagramKey<A>: aya::Pod,
    DatagramValue<A>: aya::Pod,
{
    let map: Map<DatagramKey<A>, DatagramValue<A>> = sys::open(&layout.map(name)).and_then(Map::new)?;
    let mut lost = Vec::new();
    map.each(|key, value| {
        if is_lost(alive, &key, &value) {
            lost.push(key);
        }
    })?;
    let mut ended = 0;
    for key in lost {
        // The socket may have been given another backend since. Its answers' entry stays: what is late still shows the VIP.
        if map.get(&key)?.is_some_and(|value| is_lost(alive, &key, &value)) && map.remove(&key)? {
            ended += 1;
        }
    }
    Ok(ended)
}

/// Flows to a VIP that were spoken on so lately that an answer may be under way, which shows the VIP by the programs alone.
pub(super) fn live(layout: &Layout, clock: &Clock) -> io::Result<u64> {
    Ok(live_in::<Ipv4Be>(layout, MapName::DatagramsV4, clock)?
        + live_in::<Ipv6Be>(layout, MapName::DatagramsV6, clock)?)
}

fn live_in<A: Address>(layout: &Layout, name: MapName, clock: &Clock) -> io::Result<u64>
where
    DatagramKey<A>: aya::Pod,
    DatagramValue<A>: aya::Pod,
{
    let mut flows = 0;
    for map in former::maps::<DatagramKey<A>, DatagramValue<A>>(layout, name)? {
        map.each(|key, value| {
            let is_one = key.direction == direction::TO_BACKEND && value.is_sealed_for(&key);
            flows += u64::from(is_one && !is_expired(value.seen, clock.now, clock.timeouts.udp));
        })?;
    }
    Ok(flows)
}

fn is_lost<A: Address>(alive: &Alive, key: &DatagramKey<A>, value: &DatagramValue<A>) -> bool {
    if key.direction != direction::TO_BACKEND || !value.is_sealed_for(key) {
        return false;
    }
    let vip = Target { addr: key.addr, port: key.port };
    alive.has_lost(Protocol::Udp, vip, Target { addr: value.addr, port: value.port })
}
