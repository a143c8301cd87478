//! Session affinity per packet (contract A9).

use std::net::SocketAddr;

use aya::maps::{HashMap, MapData};
use proxy_common::{
    Be16, Ipv4Be, Ipv6Be,
    affinity::{AffinityKey, AffinityValue},
    counters::Reason,
    device::role,
    frontend::{algorithm, origin, verdict},
};

use super::{
    choice::{backends, on_one_cpu},
    packet::Packet,
    support::{Maps, Spec},
    world::{Cast, Hook, Options, PROTOS, TCP, UDP, World, at, casts, usual, world},
};

const TIMEOUT: u32 = 60;

/// By turns, so that whoever is not remembered is sent to a backend that the test can tell.
fn sticky(service: u32, all: &[SocketAddr]) -> Spec {
    Spec {
        verdicts: usual(),
        algorithm: algorithm::ROUND_ROBIN,
        affinity_secs: TIMEOUT,
        ..Spec::pick_all(service, all)
    }
}

/// Where a new flow of `client` goes.
#[track_caller]
fn opens(world: &mut World, proto: u8, client: SocketAddr, vip: SocketAddr) -> SocketAddr {
    world.translate(Hook::Ingress, &Packet::opening(proto, client, vip)).1
}

/// Edits what is remembered; how many entries there were.
fn remembered(world: &mut World, v6: bool, mut edit: impl FnMut(&mut u32, &mut u32)) -> usize {
    fn go<A: Maps>(world: &mut World, name: &str, edit: &mut dyn FnMut(&mut u32, &mut u32)) -> usize
    where
        AffinityValue<A>: aya::Pod,
    {
        let mut map: HashMap<&mut MapData, AffinityKey, AffinityValue<A>> =
            HashMap::try_from(world.datapath.ebpf.map_mut(name).unwrap()).unwrap();
        let found: Vec<_> = map.iter().map(Result::unwrap).collect();
        let count = found.len();
        for (key, mut value) in found {
            let AffinityValue { seen, seal, .. } = &mut value;
            edit(seen, seal);
            map.insert(key, value, 0).unwrap();
        }
        count
    }
    if v6 { go::<Ipv6Be>(world, "affinity_v6", &mut edit) } else { go::<Ipv4Be>(world, "affinity_v4", &mut edit) }
}

fn age(world: &mut World, v6: bool, seconds: u32) {
    remembered(world, v6, |seen, _| *seen = seen.wrapping_sub(seconds));
}

fn with_each(test: &str, mut each: impl FnMut(&mut World, Cast, u8, u32)) {
    let Some(mut world) = world(test, Options::default()) else { return };
    on_one_cpu();
    let mut service = 0;
    for cast in casts() {
        for proto in PROTOS {
            service += 10;
            each(&mut world, cast, proto, service);
            world.remove(|_| true);
        }
    }
}

#[test]
fn a_client_stays_where_it_was_sent() {
    with_each("a_client_stays_where_it_was_sent", |world, cast, proto, service| {
        let all = backends(cast.backend, 7);
        world.datapath.frontend(cast.vip, proto, &sticky(service, &all));
        for n in 0..30 {
            assert_eq!(opens(world, proto, at(cast.client, 10_000 + n), cast.vip), all[0]);
        }
        assert_eq!(world.counters(service).connections, 30);
        // Another client.
        for n in 0..5 {
            assert_eq!(opens(world, proto, SocketAddr::new(cast.router, 10_000 + n), cast.vip), all[1]);
        }
        assert_eq!(opens(world, proto, at(cast.client, 9_000), cast.vip), all[0]);
    });
}

/// Whatever the number of connections that each of them opens.
#[test]
fn clients_are_shared_out_by_turns() {
    with_each("clients_are_shared_out_by_turns", |world, cast, proto, service| {
        let all = backends(cast.backend, 2);
        world.datapath.frontend(cast.vip, proto, &sticky(service, &all));
        let ips = [cast.client, cast.backend, cast.backend2, cast.vip2].map(|end| end.ip());
        for (n, ip) in ips.into_iter().chain([cast.node, cast.router]).enumerate() {
            for port in 0..4 {
                let client = SocketAddr::new(ip, 10_000 + port);
                assert_eq!(opens(world, proto, client, cast.vip), all[n % 2], "{client}");
            }
        }
    });
}

/// Contract A96, A101.
#[test]
fn time_runs_out_from_the_last_new_connection() {
    with_each("time_runs_out_from_the_last_new_connection", |world, cast, proto, service| {
        let all = backends(cast.backend, 7);
        world.datapath.frontend(cast.vip, proto, &sticky(service, &all));
        assert_eq!(opens(world, proto, at(cast.client, 10_000), cast.vip), all[0]);
        // Each new connection puts the end off.
        for n in 1..5 {
            age(world, cast.v6, TIMEOUT - 2);
            assert_eq!(opens(world, proto, at(cast.client, 10_000 + n), cast.vip), all[0]);
        }
        // Packets of a flow that there is do not.
        age(world, cast.v6, TIMEOUT - 2);
        world.translate(Hook::Ingress, &Packet::opening(proto, at(cast.client, 10_004), cast.vip));
        age(world, cast.v6, 4);
        assert_eq!(opens(world, proto, at(cast.client, 10_005), cast.vip), all[1], "the second by turns");
        assert_eq!(opens(world, proto, at(cast.client, 10_006), cast.vip), all[1], "remembered anew");
    });
}

/// Contract A95, A97.
#[test]
fn frontends_of_a_service_port_share_what_they_remember() {
    with_each("frontends_of_a_service_port_share_what_they_remember", |world, cast, proto, service| {
        let all = backends(cast.backend, 7);
        world.datapath.frontend(cast.vip, proto, &sticky(service, &all));
        world.datapath.frontend(at(cast.vip, 30_080), proto, &sticky(service, &all));
        world.datapath.frontend(cast.vip2, proto, &sticky(service + 1, &all));
        assert_eq!(opens(world, proto, at(cast.client, 10_000), cast.vip), all[0]);
        assert_eq!(opens(world, proto, at(cast.client, 10_001), at(cast.vip, 30_080)), all[0]);
        // Another port of the Service, to another backend by a client that comes first.
        assert_eq!(opens(world, proto, SocketAddr::new(cast.router, 10_000), cast.vip2), all[0]);
        for n in 0..3 {
            assert_eq!(opens(world, proto, at(cast.client, 10_010 + n), cast.vip2), all[1]);
        }
        assert_eq!(opens(world, proto, at(cast.client, 10_020), cast.vip), all[0]);
    });
}

/// Contract A98.
#[test]
fn a_backend_that_may_not_be_chosen_is_forgotten() {
    with_each("a_backend_that_may_not_be_chosen_is_forgotten", |world, cast, proto, service| {
        let all = backends(cast.backend, 7);
        world.datapath.frontend(cast.vip, proto, &sticky(service, &all));
        assert_eq!(opens(world, proto, at(cast.client, 10_000), cast.vip), all[0]);
        world.datapath.frontend(cast.vip, proto, &sticky(service, &all[1..]));
        assert_eq!(opens(world, proto, at(cast.client, 10_001), cast.vip), all[2], "the second of six by turns");
        world.datapath.frontend(cast.vip, proto, &sticky(service, &all));
        for n in 2..10 {
            assert_eq!(opens(world, proto, at(cast.client, 10_000 + n), cast.vip), all[2], "and not back");
        }
        // Local backends alone, of which it is none; the port counts, not the address alone.
        let local =
            Spec { verdicts: [verdict::PICK_LOCAL; origin::COUNT], local: vec![all[5]], ..sticky(service, &all) };
        world.datapath.frontend(cast.vip, proto, &local);
        assert_eq!(opens(world, proto, at(cast.client, 10_011), cast.vip), all[5]);
    });
}

/// Contract A99.
#[test]
fn affinity_comes_and_goes_with_the_frontend() {
    with_each("affinity_comes_and_goes_with_the_frontend", |world, cast, proto, service| {
        let all = backends(cast.backend, 4);
        let none = Spec { affinity_secs: 0, ..sticky(service, &all) };
        world.datapath.frontend(cast.vip, proto, &none);
        let order: Vec<_> = (0..4).map(|n| opens(world, proto, at(cast.client, 10_000 + n), cast.vip)).collect();
        assert_eq!(order, all);
        let held = remembered(world, cast.v6, |_, _| {});
        world.datapath.frontend(cast.vip, proto, &sticky(service, &all));
        for n in 0..4 {
            assert_eq!(opens(world, proto, at(cast.client, 10_010 + n), cast.vip), all[0]);
        }
        assert_eq!(remembered(world, cast.v6, |_, _| {}), held + 1, "nobody is remembered without affinity");
        world.datapath.frontend(cast.vip, proto, &none);
        let mut order: Vec<_> = (0..4).map(|n| opens(world, proto, at(cast.client, 10_020 + n), cast.vip)).collect();
        order.rotate_right(1);
        assert_eq!(order, all, "one turn was the client's");
        // A flow that began earlier goes on as it did.
        assert_eq!(opens(world, proto, at(cast.client, 10_010), cast.vip), all[0]);
    });
}

/// The client is told by its own address, though the backend will see the node's.
#[test]
fn a_masqueraded_client_is_known_by_its_own_address() {
    with_each("a_masqueraded_client_is_known_by_its_own_address", |world, cast, proto, service| {
        world.device(role::OUTWARD);
        let all = backends(cast.backend, 7);
        world.datapath.frontend(cast.vip, proto, &sticky(service, &all));
        for n in 0..3 {
            assert_eq!(opens(world, proto, at(cast.client, 10_000 + n), cast.vip), all[0]);
        }
        assert_eq!(opens(world, proto, SocketAddr::new(cast.router, 10_000), cast.vip), all[1]);
        world.device(role::POD);
    });
}

#[test]
fn an_entry_that_does_not_match_its_seal_is_none() {
    with_each("an_entry_that_does_not_match_its_seal_is_none", |world, cast, proto, service| {
        let torn = world.reason(Reason::TornRead);
        let all = backends(cast.backend, 7);
        world.datapath.frontend(cast.vip, proto, &sticky(service, &all));
        assert_eq!(opens(world, proto, at(cast.client, 10_000), cast.vip), all[0]);
        remembered(world, cast.v6, |_, seal| *seal ^= 1);
        assert_eq!(opens(world, proto, at(cast.client, 10_001), cast.vip), all[1]);
        assert_eq!(world.reason(Reason::TornRead), torn + 1);
        assert_eq!(opens(world, proto, at(cast.client, 10_002), cast.vip), all[1]);
        // Those of other rounds are of other services; whole again.
        remembered(world, cast.v6, |_, _| {});
    });
}

/// More clients than there is room for: the map forgets, nobody is turned away.
#[test]
fn a_full_map_turns_nobody_away() {
    let Some(mut world) = world("a_full_map_turns_nobody_away", Options::default()) else { return };
    let cast = casts()[0];
    let all = backends(cast.backend, 7);
    world.datapath.frontend(cast.vip, UDP, &sticky(1, &all));
    for n in 0..5_000_u16 {
        let [hi, lo] = n.to_be_bytes();
        opens(&mut world, UDP, SocketAddr::new([10, 9, hi, lo].into(), 10_000), cast.vip);
    }
    let held = remembered(&mut world, false, |_, _| {});
    assert!((256..=1024).contains(&held), "{held} entries");
    assert_eq!(world.reason(Reason::NotRemembered), 0);
    // The last one is still known.
    let last = SocketAddr::new([10, 9, 0x13, 0x87].into(), 10_001);
    let first = opens(&mut world, UDP, last, cast.vip);
    assert_eq!(opens(&mut world, UDP, at(last, 10_002), cast.vip), first);
}

/// What is remembered has the layout that user space reads.
#[test]
fn entries_say_who_and_where() {
    let Some(mut world) = world("entries_say_who_and_where", Options::default()) else { return };
    let [cast, _] = casts();
    world.datapath.frontend(cast.vip, TCP, &sticky(7, &[cast.backend]));
    opens(&mut world, TCP, cast.client, cast.vip);
    let map: HashMap<_, AffinityKey, AffinityValue<Ipv4Be>> =
        HashMap::try_from(world.datapath.ebpf.map("affinity_v4").unwrap()).unwrap();
    let entries: Vec<_> = map.iter().map(Result::unwrap).collect();
    let [(key, value)] = entries[..] else { panic!("{entries:?}") };
    let addr = |addr: SocketAddr| proxy_common::Address::from_ip(addr.ip()).unwrap();
    assert_eq!(key, AffinityKey::of_address::<Ipv4Be>(addr(cast.client), 7));
    assert!(value.is_sealed_for(&key));
    assert_eq!((value.addr, value.port), (addr(cast.backend), Be16::from_host(cast.backend.port())));
}
