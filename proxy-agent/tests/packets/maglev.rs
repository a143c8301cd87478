//! Choosing by Maglev: a flow's backend is told by the flow and the set, whatever the node, the maps and what was in them before.

use std::{collections::BTreeMap, net::SocketAddr};

use aya::maps::Array;
use proxy_common::{
    Address, Be16, Ipv4Be, Ipv6Be,
    counters::Reason,
    frontend::{algorithm, verdict},
    maglev::{self, Walk},
    slot::{Slot, Target, sort_key},
};

use super::{
    packet::{Packet, SYN},
    support::{Maps, Spec},
    world::{Cast, Hook, Options, PROTOS, TCP, UDP, World, at, casts, world},
};

fn spec(service: u32, all: &[SocketAddr]) -> Spec {
    Spec { algorithm: algorithm::MAGLEV, ..Spec::pick_all(service, all) }
}

fn backends(cast: &Cast, n: u16) -> Vec<SocketAddr> {
    (0..n).map(|i| at(cast.backend, 1000 + i)).collect()
}

fn targets<A: Address>(addrs: &[SocketAddr]) -> Vec<Target<A>> {
    let target =
        |addr: &SocketAddr| Target { addr: A::from_ip(addr.ip()).unwrap(), port: Be16::from_host(addr.port()) };
    let mut targets: Vec<_> = addrs.iter().map(target).collect();
    targets.sort_by_key(|target| sort_key(*target));
    targets
}

/// What the agent and the programs must come to, worked out here.
fn expected(proto: u8, client: SocketAddr, vip: SocketAddr, all: &[SocketAddr], table: bool) -> SocketAddr {
    fn go<A: Address>(proto: u8, client: SocketAddr, vip: SocketAddr, all: &[SocketAddr], table: bool) -> SocketAddr {
        let (all, ends) = (targets::<A>(all), [client, vip].map(|end| targets::<A>(&[end])[0]));
        let hash = maglev::flow(ends[0], ends[1], proto);
        let size = if table { maglev::size(maglev::index_for(all.len())) } else { 0 };
        let chosen = if size == 0 {
            maglev::position(hash, all.len() as u32) as usize
        } else {
            let mut positions = vec![0; size as usize];
            maglev::populate(&mut all.iter().map(|b| Walk::new(*b, size)).collect::<Vec<_>>(), &mut positions);
            usize::from(positions[maglev::position(hash, size) as usize])
        };
        SocketAddr::new(all[chosen].addr.to_ip(), all[chosen].port.to_host())
    }
    if vip.is_ipv6() {
        go::<Ipv6Be>(proto, client, vip, all, table)
    } else {
        go::<Ipv4Be>(proto, client, vip, all, table)
    }
}

/// Where the flow goes.
fn choice(world: &mut World, proto: u8, client: SocketAddr, vip: SocketAddr) -> SocketAddr {
    world.translate(Hook::Ingress, &Packet::opening(proto, client, vip)).1
}

/// Two nodes that came to the same set by different ways, with a table and without.
#[test]
fn every_node_chooses_the_same_backend() {
    let Some(mut one) = world("every_node_chooses_the_same_backend", Options::default()) else { return };
    let mut other = World::load(Options::default());
    for cast in casts() {
        for (n, tables) in [(1, true), (2, true), (7, true), (14, true), (7, false)] {
            let all = backends(&cast, n);
            let mut reversed = all.clone();
            reversed.reverse();
            for proto in PROTOS {
                one.datapath.frontend(cast.vip, proto, &Spec { tables, ..spec(1, &all) });
                // Other slots, another id, another order, and something else in force before.
                other.datapath.frontend(cast.vip, proto, &Spec::pick_all(8, &backends(&cast, 31)));
                other.datapath.frontend(cast.vip, proto, &Spec { tables, ..spec(9, &reversed) });
                let mut hits = BTreeMap::new();
                for port in 0..60 {
                    let client = at(cast.client, 20_000 + port);
                    let chosen = choice(&mut one, proto, client, cast.vip);
                    assert_eq!(choice(&mut other, proto, client, cast.vip), chosen, "{client} of {n}");
                    assert_eq!(chosen, expected(proto, client, cast.vip, &all, tables), "{client} of {n}");
                    *hits.entry(chosen).or_insert(0) += 1;
                }
                assert!(hits.len() > usize::from(n) / 2, "{n}: {hits:?}");
                // A flow whose entries were evicted comes to where it was, if its packets can open one (contract F45).
                let client = at(cast.client, 20_000);
                let chosen = choice(&mut one, proto, client, cast.vip);
                one.remove(|_| true);
                other.remove(|_| true);
                if proto != UDP {
                    one.untouched(Hook::Ingress, &Packet::more(proto, client, cast.vip).frame());
                    assert_eq!(one.rows(), []);
                }
                assert_eq!(choice(&mut one, proto, client, cast.vip), chosen);
                one.remove(|_| true);
            }
        }
    }
    assert_eq!((one.reason(Reason::StaleSlot), other.reason(Reason::StaleSlot)), (0, 0));
}

/// All of a set, and the one in hand goes: flows of the others stay but for a few in a hundred.
#[test]
fn a_backend_that_leaves_takes_its_own_flows() {
    let Some(mut world) = world("a_backend_that_leaves_takes_its_own_flows", Options::default()) else { return };
    for cast in casts() {
        let all = backends(&cast, 10);
        let choices = |world: &mut World, all: &[SocketAddr]| -> Vec<SocketAddr> {
            world.datapath.frontend(cast.vip, UDP, &spec(1, all));
            let chosen = (0..2000).map(|n| choice(world, UDP, at(cast.client, 10_000 + n), cast.vip)).collect();
            world.remove(|_| true);
            chosen
        };
        let before = choices(&mut world, &all);
        let mut hits = [0_f64; 10];
        for chosen in &before {
            hits[all.iter().position(|b| b == chosen).unwrap()] += 1.0;
        }
        // Chi-square with nine degrees of freedom; the flows are always the same, and so is the sum.
        let chi: f64 = hits.iter().map(|n| (n - 200.0).powi(2) / 200.0).sum();
        assert!(chi < 25.0, "{chi}: {hits:?}");

        let (gone, rest) = all.split_first().unwrap();
        let after = choices(&mut world, rest);
        let others = before.iter().zip(&after).filter(|(before, _)| *before != gone);
        let moved = others.clone().filter(|(before, after)| before != after).count();
        assert!(!after.contains(gone) && moved * 25 < others.count(), "{moved} flows of others moved");
        assert!(moved > 0, "a table of another size, or none");
    }
}

/// Each of the two sets has a table of its own, of its own size.
#[test]
fn the_local_set_has_its_own_table() {
    let Some(mut world) = world("the_local_set_has_its_own_table", Options::default()) else { return };
    for cast in casts() {
        let all = backends(&cast, 20);
        let local = &all[5..8];
        for action in [verdict::PICK_ALL, verdict::PICK_LOCAL] {
            let spec = Spec { local: local.to_vec(), verdicts: [action; 3], ..spec(1, &all) };
            world.datapath.frontend(cast.vip, TCP, &spec);
            let from = if action == verdict::PICK_ALL { &all[..] } else { local };
            for port in 0..100 {
                let client = at(cast.client, 20_000 + port);
                let wanted = expected(TCP, client, cast.vip, from, true);
                assert_eq!(choice(&mut world, TCP, client, cast.vip), wanted);
            }
            world.remove(|_| true);
        }
    }
    assert_eq!(world.reason(Reason::StaleSlot), 0);
}

/// With session affinity (contract A95) it is the client's address alone that counts, over all frontends of the set.
#[test]
fn affinity_goes_by_the_client_alone() {
    let Some(mut world) = world("affinity_goes_by_the_client_alone", Options::default()) else { return };
    for cast in casts() {
        let all = backends(&cast, 5);
        for (vip, proto) in [(cast.vip, TCP), (cast.vip2, TCP), (cast.vip, UDP)] {
            world.datapath.frontend(vip, proto, &Spec { affinity_secs: 60, ..spec(1, &all) });
        }
        let mut used = BTreeMap::new();
        for n in 1..40_u8 {
            let client = match cast.client.ip() {
                std::net::IpAddr::V4(ip) => SocketAddr::new([ip.octets()[0], 244, 7, n].into(), 40_000),
                std::net::IpAddr::V6(_) => SocketAddr::new([0xfd00, 0x244, 7, 0, 0, 0, 0, u16::from(n)].into(), 40_000),
            };
            let chosen = choice(&mut world, TCP, client, cast.vip);
            for (port, vip, proto) in [(2, cast.vip, TCP), (3, cast.vip2, TCP), (4, cast.vip, UDP)] {
                assert_eq!(choice(&mut world, proto, at(client, port), vip), chosen);
            }
            *used.entry(chosen).or_insert(0) += 1;
        }
        assert_eq!(used.len(), 5, "{used:?}");
        world.remove(|_| true);
    }
}

/// One position of the table was re-used: it is looked at again, then the next position serves.
#[test]
fn a_stale_position_is_passed_over() {
    fn spoil<A: Maps>(world: &mut World, position: u32) {
        let mut map: Array<_, A::Slot> = Array::try_from(world.datapath.ebpf.map_mut(A::SLOTS).unwrap()).unwrap();
        let old = map.get(&position, 0).unwrap().decode(1).unwrap();
        map.set(position, A::Slot::encode(old, 2), 0).unwrap();
    }
    let Some(mut world) = world("a_stale_position_is_passed_over", Options::default()) else { return };
    for (n, cast) in casts().into_iter().enumerate() {
        let all = backends(&cast, 3);
        // Both families' ranges are numbered together.
        let base = n as u32 * (3 + 4513);
        world.datapath.frontend(cast.vip, TCP, &spec(1, &all));
        let first = choice(&mut world, TCP, cast.client, cast.vip);
        world.remove(|_| true);
        let hash = if cast.v6 {
            maglev::flow(targets::<Ipv6Be>(&[cast.client])[0], targets::<Ipv6Be>(&[cast.vip])[0], TCP)
        } else {
            maglev::flow(targets::<Ipv4Be>(&[cast.client])[0], targets::<Ipv4Be>(&[cast.vip])[0], TCP)
        };
        let position = base + 3 + maglev::position(hash, 4513);
        if cast.v6 {
            spoil::<Ipv6Be>(&mut world, position)
        } else {
            spoil::<Ipv4Be>(&mut world, position)
        }
        let again = choice(&mut world, TCP, cast.client, cast.vip);
        assert!(all.contains(&first) && all.contains(&again));
        assert_eq!(world.reason(Reason::StaleSlot), n as u64 + 1);
        assert_eq!(world.reason(Reason::TornTwice), 0);
        // Nobody else notices.
        let untouched = Packet::tcp(at(cast.client, 1), cast.vip, SYN);
        world.translate(Hook::Ingress, &untouched);
        assert_eq!(world.reason(Reason::StaleSlot), n as u64 + 1);
        world.remove(|_| true);
    }
}
