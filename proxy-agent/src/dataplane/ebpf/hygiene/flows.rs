//! The per-packet path's flows: finds those that lost their backend, and ends them.
//!
//! UDP: the flow's entries are deleted, and its next packet is chosen for anew. TCP: the entry of the way there is marked, and the
//! next packet of the client's is answered with a reset.
//!
//! Nothing locks the table against the programs, so the way there goes first: what finds the way back alone puts the other
//! one back at worst, and the second look finds it again.

use std::{io, net::IpAddr};

use proxy_common::{
    Address, Ipv4Be, Ipv6Be,
    affinity::is_expired,
    connection::{
        ConnectionKey, ConnectionValue, flags, hook, masquerade_key, pair, state,
        times::{SCTP_ESTABLISHED, SCTP_OTHERS, TCP_HALF_OPEN},
    },
    proto,
    slot::Target,
};

use crate::{
    dataplane::{
        alive::Alive,
        ebpf::{
            Timeouts,
            layout::MapName,
            pins::Layout,
            sys::{self, Map},
        },
    },
    model::Protocol,
};

/// Update only what is there.
const EXIST: u64 = 2;

/// One part in so many of the table of half-open flows is what may be asked for anew in one round.
const PART: u32 = 16;

/// What was asked for anew.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Moved {
    pub(super) flows: u64,
    /// There are more, for another round.
    pub(super) rest: bool,
}

/// When a flow is over: as the programs have it.
pub(super) struct Clock {
    pub(super) now: u32,
    pub(super) timeouts: Timeouts,
}

impl Clock {
    pub(super) fn new(timeouts: Timeouts) -> Self {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic).tv_sec as u32;
        Self { now, timeouts }
    }

    /// How long ago that second was; nothing, if another CPU has noted one that has not come here yet.
    pub(super) fn silence(&self, seen: u32) -> u32 {
        self.now.wrapping_sub(seen).cast_signed().max(0).cast_unsigned()
    }

    pub(super) fn is_over<A>(
        &self,
        protocol: u8,
        established: bool,
        one: &ConnectionValue<A>,
        other: &ConnectionValue<A>,
    ) -> bool {
        let Timeouts { tcp_established, tcp_close_wait, udp, udp_stream } = self.timeouts;
        let told = one.state | other.state;
        if protocol != proto::UDP && (told & state::RST != 0 || one.state & other.state & state::FIN != 0) {
            return true;
        }
        let closes = told & state::FIN != 0;
        let most = match protocol {
            proto::UDP if established => udp_stream,
            proto::UDP => udp,
            proto::SCTP if established && !closes => SCTP_ESTABLISHED,
            proto::SCTP => SCTP_OTHERS,
            _ if !established => TCP_HALF_OPEN,
            _ if closes => tcp_close_wait,
            _ => tcp_established,
        };
        is_expired(one.seen.max(other.seen), self.now, most)
    }
}

/// A family's flow tables.
pub(super) struct Tables<A> {
    established: Map<ConnectionKey<A>, ConnectionValue<A>>,
    answered: Map<ConnectionKey<A>, ConnectionValue<A>>,
    half_open: Map<ConnectionKey<A>, ConnectionValue<A>>,
}

const V4: [MapName; 3] = [MapName::EstablishedV4, MapName::AnsweredV4, MapName::HalfOpenV4];
const V6: [MapName; 3] = [MapName::EstablishedV6, MapName::AnsweredV6, MapName::HalfOpenV6];

impl Tables<Ipv4Be> {
    pub(super) fn open_v4(layout: &Layout) -> io::Result<Self> {
        Self::open(layout, V4)
    }

    /// Flows that are not over.
    pub(super) fn live_v4(layout: &Layout, clock: &Clock) -> io::Result<u64> {
        Self::live(layout, V4, clock)
    }
}

impl Tables<Ipv6Be> {
    pub(super) fn open_v6(layout: &Layout) -> io::Result<Self> {
        Self::open(layout, V6)
    }

    /// Flows that are not over.
    pub(super) fn live_v6(layout: &Layout, clock: &Clock) -> io::Result<u64> {
        Self::live(layout, V6, clock)
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

    fn live(layout: &Layout, [established, answered, half_open]: [MapName; 3], clock: &Clock) -> io::Result<u64> {
        let mut flows = 0;
        for (name, established) in [(established, true), (answered, true), (half_open, false)] {
            let mut maps =
                vec![sys::open(&layout.map(name)).and_then(Map::<ConnectionKey<A>, ConnectionValue<A>>::new)?];
            // Those that links use in its place, if an agent died while sizes changed.
            for path in [layout.resized(name), layout.former(name)] {
                match sys::open(&path).and_then(Map::new) {
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    map => maps.push(map?),
                }
            }
            for map in &maps {
                flows += Self::live_in(map, established, clock)?;
            }
        }
        Ok(flows)
    }

    fn live_in(map: &Map<ConnectionKey<A>, ConnectionValue<A>>, established: bool, clock: &Clock) -> io::Result<u64> {
        let (mut flows, mut trouble) = (0, None);
        map.each(|key, value| {
            // The pair that masquerades a flow ends with it.
            if value.flags & flags::MASQUERADE != 0 || !value.is_sealed_for(&key) {
                return;
            }
            match other_half(map, &key, &value) {
                // Counted once.
                Ok((_, Some(_))) if key.hook != hook::INGRESS => {}
                Ok((_, found)) => {
                    let other = found.unwrap_or(ConnectionValue { seen: value.seen, ..Default::default() });
                    flows += u64::from(!clock.is_over(key.proto, established, &value, &other));
                }
                Err(error) => trouble = Some(error),
            }
        })?;
        trouble.map_or(Ok(flows), Err)
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
        let out = masquerade_key(key, value);
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

    /// Has the flows that are masqueraded with a lost address ask for one anew, except those that are over; in one round no more than
    /// leave room for the others in the table of half-open flows.
    pub(super) fn masquerade_anew(
        &self,
        clock: &Clock,
        mut is_lost: impl FnMut(IpAddr) -> io::Result<bool>,
    ) -> io::Result<Moved> {
        let most = (sys::map_info(self.half_open.fd())?.max_entries / PART).max(1) as usize;
        let (mut lost, mut trouble) = (Vec::new(), None);
        for (map, established) in [(&self.established, true), (&self.answered, true), (&self.half_open, false)] {
            map.each(|key, value| {
                let masquerades = value.flags & (flags::MASQUERADE | flags::PENDING) == flags::MASQUERADE;
                let ours = masquerades && key.hook == hook::EGRESS && value.is_sealed_for(&key);
                if !ours || lost.len() > most || trouble.is_some() {
                    return;
                }
                let found = is_lost(value.addr.to_ip()).and_then(|lost| {
                    Ok(lost && {
                        let (back, found) = pair(&key, &value);
                        let answers =
                            is_still(map, &back, &found)?.unwrap_or(ConnectionValue { seen: value.seen, ..found });
                        !clock.is_over(key.proto, established, &value, &answers)
                    })
                });
                match found {
                    Ok(true) => lost.push((key, value)),
                    Ok(false) => {}
                    Err(error) => trouble = Some(error),
                }
            })?;
        }
        if let Some(error) = trouble {
            return Err(error);
        }
        let mut moved = Moved { flows: 0, rest: lost.len() > most };
        for (key, value) in lost.iter().take(most) {
            moved.flows += u64::from(self.ask_anew(key, value)?);
        }
        Ok(moved)
    }

    /// The request first: no packet between the two steps leaves with the client's address. If the request is evicted before its flow
    /// sends anything, the flow's main pair asks again, as for any that lost its masquerade.
    fn ask_anew(&self, key: &ConnectionKey<A>, value: &ConnectionValue<A>) -> io::Result<bool> {
        let confirmed = if key.proto == proto::UDP { &self.answered } else { &self.established };
        let is_confirmed = is_still(confirmed, key, value)?.is_some();
        if !is_confirmed && is_still(&self.half_open, key, value)?.is_none() {
            return Ok(false);
        }
        let ConnectionValue { service, seen, checked, .. } = *value;
        let flags = flags::PENDING | flags::MASQUERADE;
        let request = ConnectionValue { service, flags, seen, checked, state: state::SEEN, ..Default::default() };
        self.half_open.put(key, &request.sealed(key), 0)?;
        if is_confirmed {
            confirmed.remove(key)?;
        }
        let (back, found) = pair(key, value);
        for map in [confirmed, &self.half_open] {
            if is_still(map, &back, &found)?.is_some() {
                map.remove(&back)?;
            }
        }
        Ok(true)
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
pub(super) fn is_still<A: Address>(
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

/// The other entry of a flow's pair: its key, and the entry as it is by now if it is there and is this flow's. The mark of a flow that lost its
/// backend is on the way there alone, so it does not count.
pub(super) fn other_half<A: Address>(
    map: &Map<ConnectionKey<A>, ConnectionValue<A>>,
    key: &ConnectionKey<A>,
    value: &ConnectionValue<A>,
) -> io::Result<(ConnectionKey<A>, Option<ConnectionValue<A>>)>
where
    ConnectionKey<A>: aya::Pod,
    ConnectionValue<A>: aya::Pod,
{
    let unmarked = |value: ConnectionValue<A>| ConnectionValue { flags: value.flags & !flags::RESET, ..value };
    let (other_key, other) = pair(key, &unmarked(*value));
    let is_its =
        |now: &ConnectionValue<A>| now.is_sealed_for(&other_key) && unmarked(*now).seal_for(&other_key) == other.seal;
    Ok((other_key, map.get(&other_key)?.filter(is_its)))
}

/// Whether an entry belongs to a flow from a frontend to a backend that it may not go on with.
fn is_lost<A: Address>(alive: &Alive, key: &ConnectionKey<A>, value: &ConnectionValue<A>) -> bool {
    if value.flags & (flags::MASQUERADE | flags::DIRECT) != 0 || !value.is_sealed_for(key) {
        return false;
    }
    let protocol = if key.proto == proto::UDP { Protocol::Udp } else { Protocol::Tcp };
    let here = Target { addr: value.addr, port: value.port };
    let (vip, backend) = if key.hook == hook::INGRESS {
        (Target { addr: key.dst, port: key.dport }, here)
    } else {
        (here, Target { addr: key.src, port: key.sport })
    };
    alive.has_lost(protocol, vip, backend)
}

#[cfg(test)]
mod tests {
    use proxy_common::Be16;

    use super::*;
    use crate::{
        dataplane::{
            alive::{Change, Keep},
            ebpf::layout::Sizes,
        },
        desired::{Backend, Frontend},
        model::Port,
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
        alive.settle(now + crate::dataplane::alive::TCP_GRACE);
        alive
    }

    /// Its answers would go to whoever has the address now.
    #[test]
    fn what_is_masqueraded_with_a_lost_address_asks_for_another_a75() {
        let Some(tables) = tables() else { return };
        let masqueraded = |proto, port, source: u8| {
            let port = Be16::from_host(port);
            let key = ConnectionKey::new(hook::EGRESS, proto, ip(200), port, ip(1), Be16::from_host(8080));
            let value = ConnectionValue {
                addr: ip(source),
                port: Be16::from_host(1024),
                other: key.dport,
                service: 7,
                flags: flags::MASQUERADE,
                seen: 900,
                ..Default::default()
            };
            [(key, value.sealed(&key)), pair(&key, &value)]
        };
        let (tcp, udp, half) =
            (masqueraded(proto::TCP, 1, 50), masqueraded(proto::UDP, 2, 50), masqueraded(proto::TCP, 3, 50));
        let stays = masqueraded(proto::TCP, 4, 51);
        put(&tables.established, &tcp);
        put(&tables.established, &stays);
        put(&tables.answered, &udp);
        put(&tables.half_open, &half);
        let is_lost = |address| Ok(address != ip(51).to_ip());
        let clock = Clock { now: 901, timeouts: Timeouts::default() };
        assert_eq!(tables.masquerade_anew(&clock, is_lost).unwrap(), Moved { flows: 3, rest: false });
        for [(key, _), (back, _)] in [tcp, udp, half] {
            let request = tables.half_open.get(&key).unwrap().unwrap();
            assert!(request.is_sealed_for(&key) && request.flags == flags::PENDING | flags::MASQUERADE);
            assert_eq!((request.service, request.seen), (7, 900));
            for map in [&tables.established, &tables.answered] {
                assert_eq!((map.get(&key).unwrap(), map.get(&back).unwrap()), (None, None));
            }
            assert_eq!(tables.half_open.get(&back).unwrap(), None);
        }
        assert_eq!(stays.map(|(key, _)| tables.established.get(&key).unwrap().is_some()), [true; 2]);
        assert_eq!(tables.masquerade_anew(&clock, is_lost).unwrap(), Moved::default());

        // Who cannot be asked about stays, and it is said.
        let refused = |_| Err(io::Error::from_raw_os_error(libc::ENOBUFS));
        assert!(tables.masquerade_anew(&clock, refused).is_err());
        assert!(tables.established.get(&stays[0].0).unwrap().is_some());
    }

    #[test]
    fn a_round_leaves_room_for_new_flows_and_flows_that_are_over_alone() {
        let Some(tables) = tables() else { return };
        let most = u64::from(sys::map_info(tables.half_open.fd()).unwrap().max_entries / PART);
        let (many, now) = (most as u16 + 10, 1_000_000);
        for port in 0..many + 5 {
            let port_be = Be16::from_host(port + 1);
            let key = ConnectionKey::new(hook::EGRESS, proto::TCP, ip(200), port_be, ip(1), Be16::from_host(8080));
            let value = ConnectionValue {
                addr: ip(50),
                port: port_be,
                other: key.dport,
                flags: flags::MASQUERADE,
                seen: if port < many { now } else { now - Timeouts::default().tcp_established - 1 },
                ..Default::default()
            };
            put(&tables.established, &[(key, value.sealed(&key)), pair(&key, &value)]);
        }
        let clock = Clock { now, timeouts: Timeouts::default() };
        assert_eq!(tables.masquerade_anew(&clock, |_| Ok(true)).unwrap(), Moved { flows: most, rest: true });
        assert_eq!(tables.masquerade_anew(&clock, |_| Ok(true)).unwrap(), Moved { flows: 10, rest: false });
        assert_eq!(tables.masquerade_anew(&clock, |_| Ok(true)).unwrap(), Moved::default());
        assert_eq!(tables.established.entries().unwrap().len(), 10, "five flows that are over");
    }

    #[test]
    fn a_marked_flow_counts_once_and_only_until_its_client_was_told() {
        let Some(tables) = tables() else { return };
        let clock = Clock { now: 1_000, timeouts: Timeouts::default() };
        for (told, flows) in [(0, 1), (state::RST, 0)] {
            let [(key, value), (back, answers)] = flow(proto::TCP, 1, 1);
            let there = ConnectionValue { flags: flags::RESET, state: state::SEEN | told, seen: 990, ..value };
            put(&tables.established, &[(key, there.sealed(&key)), (back, ConnectionValue { seen: 990, ..answers })]);
            assert_eq!(Tables::live_in(&tables.established, true, &clock).unwrap(), flows);
        }
    }

    #[test]
    fn times_are_those_of_the_programs() {
        let timeouts = Timeouts { tcp_established: 500, tcp_close_wait: 400, udp: 30, udp_stream: 120 };
        let (open, fin, rst) = (state::SEEN, state::FIN, state::RST);
        for (protocol, established, states, most) in [
            (proto::TCP, true, (open, open), Some(500)),
            (proto::TCP, true, (fin, open), Some(400)),
            (proto::TCP, false, (open, 0), Some(TCP_HALF_OPEN)),
            (proto::TCP, true, (fin, fin), None),
            (proto::TCP, true, (open, rst), None),
            (proto::UDP, true, (open, open), Some(120)),
            (proto::UDP, false, (open, 0), Some(30)),
            (proto::SCTP, true, (open, open), Some(SCTP_ESTABLISHED)),
            (proto::SCTP, true, (open, fin), Some(SCTP_OTHERS)),
            (proto::SCTP, false, (open, 0), Some(SCTP_OTHERS)),
        ] {
            let value = |state, seen| ConnectionValue::<A> { state, seen, ..Default::default() };
            let (one, other) = (value(states.0, 1000), value(states.1, 900));
            let is_over = |idle| Clock { now: 1000 + idle, timeouts }.is_over(protocol, established, &one, &other);
            match most {
                Some(most) => assert_eq!((is_over(most), is_over(most + 1)), (false, true), "{protocol} {states:?}"),
                None => assert!(is_over(0), "{protocol} {states:?}"),
            }
        }
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
