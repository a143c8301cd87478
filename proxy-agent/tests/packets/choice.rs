//! Choosing a backend, slots and seals, and what is counted.

use std::net::SocketAddr;

use aya::maps::Array;
use proxy_common::{
    Be16, Ipv4Be, Ipv6Be,
    counters::Reason,
    device::role,
    frontend::{FrontendKey, FrontendValue, algorithm},
    slot::{Slot, Target},
};

use super::{
    flows::masquerade,
    packet::{ACK, Packet, SYN},
    support::{Maps, Spec},
    world::{DROP, Hook, Options, PROTOS, TCP, World, at, casts, usual, world},
};

/// Stays on one CPU: counts and cursors are per CPU.
pub(crate) fn on_one_cpu() {
    let mut set = nix::sched::CpuSet::new();
    set.set(0).unwrap();
    nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &set).unwrap();
}

pub(crate) fn backends(first: SocketAddr, n: u16) -> Vec<SocketAddr> {
    (0..n).map(|i| at(first, 1000 + i)).collect()
}

#[test]
fn round_robin_is_exact_on_a_cpu() {
    let Some(mut world) = world("round_robin_is_exact_on_a_cpu", Options::default()) else { return };
    on_one_cpu();
    for cast in casts() {
        let all = backends(cast.backend, 7);
        let spec = Spec {
            verdicts: usual(),
            algorithm: algorithm::ROUND_ROBIN,
            ..Spec::pick_all(u32::from(cast.v6) + 1, &all)
        };
        world.datapath.frontend(cast.vip, TCP, &spec);
        let mut order = Vec::new();
        for n in 0..70 {
            let (_, to) = world.translate(Hook::Ingress, &Packet::tcp(at(cast.client, 10_000 + n), cast.vip, SYN));
            order.push(to);
        }
        for (n, to) in order.iter().enumerate() {
            assert_eq!(*to, all[n % 7]);
        }
    }
}

/// Chi-square over 10 backends and 4 000 flows: 9 degrees of freedom exceed 39 in one run out of 10⁵.
#[test]
fn random_is_uniform() {
    let Some(mut world) = world("random_is_uniform", Options::default()) else { return };
    for cast in casts() {
        let all = backends(cast.backend, 10);
        world.service(1, cast.vip, &all);
        let mut hits = [0_f64; 10];
        for n in 0..4000 {
            let frame = Packet::udp(at(cast.client, 10_000 + n), cast.vip).frame();
            let (_, to) = super::packet::ends(&world.run(Hook::Ingress, &frame).1);
            hits[all.iter().position(|b| *b == to).unwrap()] += 1.0;
        }
        let chi: f64 = hits.iter().map(|n| (n - 400.0).powi(2) / 400.0).sum();
        assert!(chi < 39.0, "{chi}: {hits:?}");
    }
}

/// Gives slots another generation.
fn break_slots(world: &mut World, v6: bool, slots: std::ops::Range<u32>, generation: u8) {
    fn go<A: Maps>(world: &mut World, slots: std::ops::Range<u32>, generation: u8) {
        let mut map: Array<_, A::Slot> = Array::try_from(world.datapath.ebpf.map_mut(A::SLOTS).unwrap()).unwrap();
        for n in slots {
            let old = map.get(&n, 0).unwrap();
            if let Some(Target { addr, port }) = old.decode(old.generation()) {
                map.set(n, A::Slot::encode(Target { addr, port }, generation), 0).unwrap();
            }
        }
    }
    if v6 { go::<Ipv6Be>(world, slots, generation) } else { go::<Ipv4Be>(world, slots, generation) }
}

#[test]
fn a_slot_of_another_generation_is_never_used() {
    let Some(mut world) = world("a_slot_of_another_generation_is_never_used", Options::default()) else { return };
    let mut tried = 0;
    for cast in casts() {
        world.service(1, cast.vip, &[cast.backend, cast.backend2]);
        break_slots(&mut world, cast.v6, 0..64, 2);
        for proto in PROTOS {
            tried += 1;
            assert_eq!(world.run(Hook::Ingress, &Packet::opening(proto, cast.client, cast.vip).frame()).0, DROP);
            // Looked at twice, in case the frontend had moved on.
            assert_eq!(world.reason(Reason::StaleSlot), 2 * tried);
            assert_eq!(world.reason(Reason::TornTwice), tried);
        }
        assert_eq!(world.rows(), []);
        break_slots(&mut world, cast.v6, 0..64, 1);
        let (_, to) = world.translate(Hook::Ingress, &Packet::tcp(cast.client, cast.vip, SYN));
        assert!([cast.backend, cast.backend2].contains(&to));
        world.remove(|_| true);
    }
}

/// One stale slot among good ones: round robin meets it, looks again and takes the next; nobody is skipped, nothing counted twice.
#[test]
fn a_stale_slot_is_looked_at_again() {
    let Some(mut world) = world("a_stale_slot_is_looked_at_again", Options::default()) else { return };
    on_one_cpu();
    for cast in casts() {
        let service = u32::from(cast.v6) + 1;
        let all = backends(cast.backend, 4);
        world.datapath.frontend(
            cast.vip,
            TCP,
            &Spec { algorithm: algorithm::ROUND_ROBIN, ..Spec::pick_all(service, &all) },
        );
        // Its first one; both families' ranges are numbered together.
        let first = if cast.v6 { 4 } else { 0 };
        break_slots(&mut world, cast.v6, first..first + 1, 2);
        let stale = world.reason(Reason::StaleSlot);
        let mut order = Vec::new();
        for n in 0..6 {
            let (_, to) = world.translate(Hook::Ingress, &Packet::tcp(at(cast.client, 10_000 + n), cast.vip, SYN));
            order.push(to);
        }
        assert_eq!(order, [all[1], all[1], all[2], all[3], all[1], all[1]]);
        assert_eq!(world.reason(Reason::StaleSlot), stale + 2);
        assert_eq!(world.counters(service).connections, 6);
    }
    assert_eq!(world.reason(Reason::TornTwice), 0);
}

/// Changes the TCP frontend of `vip`; with its seal put right, or left as it was.
fn alter(world: &mut World, vip: SocketAddr, seal: bool, change: fn(&mut FrontendValue)) {
    fn go<A: Maps>(world: &mut World, vip: SocketAddr, seal: bool, change: fn(&mut FrontendValue)) {
        let key = FrontendKey::new(A::from_ip(vip.ip()).unwrap(), Be16::from_host(vip.port()), TCP);
        let mut map = world.datapath.frontends::<A>();
        let mut value = map.get(&A::key(key), 0).unwrap();
        change(&mut value);
        map.insert(A::key(key), if seal { value.sealed(&key) } else { value }, 0).unwrap();
    }
    if vip.is_ipv6() { go::<Ipv6Be>(world, vip, seal, change) } else { go::<Ipv4Be>(world, vip, seal, change) }
}

/// The frontend has moved on to a generation that its slots are not of.
#[test]
fn a_frontend_of_another_generation_finds_no_slot() {
    let Some(mut world) = world("a_frontend_of_another_generation_finds_no_slot", Options::default()) else { return };
    for cast in casts() {
        world.service(1, cast.vip, &[cast.backend]);
        alter(&mut world, cast.vip, true, |value| value.all_generation = 2);
        let stale = world.reason(Reason::StaleSlot);
        assert_eq!(world.run(Hook::Ingress, &Packet::tcp(cast.client, cast.vip, SYN).frame()).0, DROP);
        assert_eq!(world.reason(Reason::StaleSlot), stale + 2);
    }
    assert_eq!(world.rows(), []);
}

#[test]
fn a_frontend_with_a_wrong_seal_is_dropped_and_counted() {
    let Some(mut world) = world("a_frontend_with_a_wrong_seal_is_dropped_and_counted", Options::default()) else {
        return;
    };
    for cast in casts() {
        let changes: [fn(&mut FrontendValue); 4] =
            [|v| v.seal ^= 1, |v| v.all_base += 1, |v| v.service += 1, |v| v.verdicts[0] = 3];
        for change in changes {
            world.service(1, cast.vip, &[cast.backend]);
            alter(&mut world, cast.vip, false, change);
            let (once, twice) = (world.reason(Reason::TornRead), world.reason(Reason::TornTwice));
            assert_eq!(world.run(Hook::Ingress, &Packet::tcp(cast.client, cast.vip, SYN).frame()).0, DROP);
            assert_eq!((world.reason(Reason::TornRead), world.reason(Reason::TornTwice)), (once + 1, twice + 1));
        }
    }
    assert_eq!(world.rows(), []);
}

#[test]
fn a_service_counts_its_packets_once() {
    let Some(mut world) = world("a_service_counts_its_packets_once", Options::default()) else { return };
    for (n, cast) in casts().into_iter().enumerate() {
        let (plain, masqueraded) = (10 + n as u32, 20 + n as u32);
        world.service(plain, cast.vip, &[cast.backend]);
        world.service(masqueraded, cast.vip2, &[cast.backend2]);
        world.device(role::POD);
        let open = Packet::tcp(cast.client, cast.vip, SYN);
        world.establish(TCP, cast.client, cast.vip);
        let len = open.frame().len() as u64;
        let counted = world.counters(plain);
        assert_eq!((counted.connections, counted.packets, counted.bytes, counted.refused), (1, 3, 3 * len, 0));
        // A retransmission is a packet and no connection.
        world.translate(Hook::Ingress, &open);
        assert_eq!((world.counters(plain).connections, world.counters(plain).packets), (1, 4));
        // The masquerade is one more rewrite of the same packet.
        masquerade(&mut world, TCP, cast.client, cast.vip2, cast.node);
        let counted = world.counters(masqueraded);
        assert_eq!((counted.connections, counted.packets, counted.bytes), (1, 3, 3 * len));
        // What is left alone is not counted.
        world.untouched(Hook::Ingress, &Packet::tcp(at(cast.client, 9), cast.vip, ACK).frame());
        assert_eq!(world.counters(plain).packets, 4);
    }
}

/// Its service is gone, and its counters with it: the packets that still come make no new ones.
#[test]
fn a_packet_makes_no_counters() {
    let Some(mut world) = world("a_packet_makes_no_counters", Options::default()) else { return };
    for cast in casts() {
        let service = u32::from(cast.v6) + 1;
        world.service(service, cast.vip, &[cast.backend]);
        world.establish(TCP, cast.client, cast.vip);
        let ack = Packet::tcp(cast.client, cast.vip, ACK);
        world.forget_counters(service);
        world.expect(Hook::Ingress, &ack, &ack.to(cast.backend));
        assert!(!world.has_counters(service));
        // The next connection does.
        world.translate(Hook::Ingress, &Packet::tcp(at(cast.client, 9), cast.vip, SYN));
        assert_eq!(world.counters(service).connections, 1);
    }
}

/// Established flows outlive their frontend (contract A45, A87).
#[test]
fn a_flow_outlives_its_frontend() {
    fn forget<A: Maps>(world: &mut World, vip: SocketAddr) {
        let key = FrontendKey::new(A::from_ip(vip.ip()).unwrap(), Be16::from_host(vip.port()), TCP);
        world.datapath.frontends::<A>().remove(&A::key(key)).unwrap();
    }
    let Some(mut world) = world("a_flow_outlives_its_frontend", Options::default()) else { return };
    for cast in casts() {
        world.service(1, cast.vip, &[cast.backend]);
        world.establish(TCP, cast.client, cast.vip);
        let ack = Packet::tcp(cast.client, cast.vip, ACK);
        let answer = ack.between(cast.backend, cast.client);
        for change in 0..3 {
            match change {
                0 => world.service(1, cast.vip, &[cast.backend2]),
                1 => world.service(1, cast.vip, &[]),
                _ if cast.v6 => forget::<Ipv6Be>(&mut world, cast.vip),
                _ => forget::<Ipv4Be>(&mut world, cast.vip),
            }
            world.expect(Hook::Ingress, &ack, &ack.to(cast.backend));
            world.expect(Hook::Egress, &answer, &answer.from(cast.vip));
        }
        // No frontend, no guard: a new one is not ours.
        world.untouched(Hook::Ingress, &Packet::tcp(at(cast.client, 9), cast.vip, SYN).frame());
    }
}
