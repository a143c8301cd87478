//! Opening and answering, masquerade, hairpin.

use std::net::{IpAddr, SocketAddr};

use proxy_common::{
    connection::{flags, state},
    counters::Reason,
    device::role,
    frontend::{origin, verdict},
};

use super::{
    packet::{ACK, Packet, RST, SYN, ends},
    support::Spec,
    world::{DROP, Hook, NEXT, Options, PROTOS, TCP, UDP, World, at, casts, hex, world},
};

#[test]
fn a_flow_goes_to_a_backend_and_answers_as_the_vip() {
    let Some(mut world) = world("a_flow_goes_to_a_backend_and_answers_as_the_vip", Options::default()) else { return };
    for cast in casts() {
        world.service(1, cast.vip, &[cast.backend]);
        for proto in PROTOS {
            let open = Packet::opening(proto, cast.client, cast.vip);
            world.expect(Hook::Ingress, &open, &open.to(cast.backend));
            let answer = Packet::answer(proto, cast.backend, cast.client);
            world.expect(Hook::Egress, &answer, &answer.from(cast.vip));
            for payload in [&b""[..], b"x", b"some odd bytes!", &[0xff; 1400]] {
                let more = Packet::more(proto, cast.client, cast.vip).with_payload(payload);
                world.expect(Hook::Ingress, &more, &more.to(cast.backend));
                let back = more.between(cast.backend, cast.client);
                world.expect(Hook::Egress, &back, &back.from(cast.vip));
            }
            // The translated packet means nothing to the other hook, nor the answer to this one.
            world.untouched(Hook::Egress, &open.to(cast.backend).frame());
            world.untouched(Hook::Ingress, &answer.frame());
        }
        // Other ports, other hosts: not ours.
        world.untouched(Hook::Ingress, &Packet::tcp(cast.client, at(cast.backend, 9), SYN).frame());
        world.untouched(Hook::Egress, &Packet::tcp(at(cast.backend, 9), cast.client, SYN).frame());
    }
    assert_eq!(world.reasons(), []);
}

/// A masqueraded exchange from outside; returns the source the backend saw.
#[track_caller]
pub(crate) fn masquerade(
    world: &mut World,
    proto: u8,
    client: SocketAddr,
    vip: SocketAddr,
    node: IpAddr,
) -> SocketAddr {
    world.device(role::OUTWARD);
    let open = Packet::opening(proto, client, vip);
    let (_, backend) = world.translate(Hook::Ingress, &open);
    let (seen, still) = world.translate(Hook::Egress, &open.to(backend));
    assert_eq!((seen.ip(), still), (node, backend));
    masqueraded_answer(world, &Packet::answer(proto, backend, seen), client, vip);
    if proto != UDP {
        let ack = Packet::more(proto, client, vip);
        world.expect(Hook::Ingress, &ack, &ack.to(backend));
        world.expect(Hook::Egress, &ack.to(backend), &ack.between(seen, backend));
    }
    seen
}

/// An answer to a masqueraded packet, through both hooks.
#[track_caller]
pub(crate) fn masqueraded_answer(world: &mut World, answer: &Packet, client: SocketAddr, vip: SocketAddr) {
    world.expect(Hook::Ingress, answer, &answer.to(client));
    world.expect(Hook::Egress, &answer.to(client), &answer.between(vip, client));
}

#[test]
fn what_comes_from_outside_is_masqueraded() {
    let Some(mut world) = world("what_comes_from_outside_is_masqueraded", Options::default()) else { return };
    for cast in casts() {
        world.service(1, cast.vip, &[cast.backend]);
        for proto in PROTOS {
            let seen = masquerade(&mut world, proto, cast.client, cast.vip, cast.node);
            assert!((20_000..30_000).contains(&seen.port()), "{seen}");
            // A port that lies in the range is kept.
            let client = at(cast.client, 22_222);
            assert_eq!(masquerade(&mut world, proto, client, cast.vip, cast.node).port(), 22_222);
            // Unless another client has it: towards one backend a port is one flow's.
            let mut rival = client;
            rival.set_ip(cast.router);
            let seen = masquerade(&mut world, proto, rival, cast.vip, cast.node);
            assert_ne!(seen.port(), 22_222);
            // The first one's flow still works.
            masqueraded_answer(
                &mut world,
                &Packet::answer(proto, cast.backend, SocketAddr::new(cast.node, 22_222)),
                client,
                cast.vip,
            );
        }
    }
    let rows = world.rows();
    assert_eq!(rows.len(), 2 * PROTOS.len() * 3 * 4);
    assert!(rows.iter().all(|row| row.established && !row.is(flags::PENDING)), "{rows:#?}");
    assert_eq!(world.reasons(), []);
}

/// An eviction or a sweep may take a connection's main pair and leave what masquerades it. The next connection from the same port to the same
/// backend does not go on with that, and with what the last one ended with.
#[test]
fn a_masquerade_that_was_left_alone_is_made_anew() {
    let Some(mut world) = world("a_masquerade_that_was_left_alone_is_made_anew", Options::default()) else { return };
    for cast in casts() {
        world.service(1, cast.vip, &[cast.backend]);
        let client = at(cast.client, 22_222);
        let seen = masquerade(&mut world, TCP, client, cast.vip, cast.node);
        let reset = Packet::tcp(cast.backend, seen, RST | ACK);
        masqueraded_answer(&mut world, &reset, client, cast.vip);
        assert_eq!(world.remove(|row| !row.is(flags::MASQUERADE)), 2);
        masquerade(&mut world, TCP, client, cast.vip, cast.node);
        let rows = world.rows();
        assert!(rows.len() == 4 && rows.iter().all(|row| row.state & state::RST == 0), "{rows:#?}");
        world.remove(|_| true);
    }
    assert_eq!(world.reasons(), []);
}

/// The port that it answers to may be another's by then: of a connection of the node's own, or of one that another proxy masquerades.
#[test]
fn a_datagram_after_the_time_out_answers_no_masqueraded_flow() {
    let name = "a_datagram_after_the_time_out_answers_no_masqueraded_flow";
    let Some(mut world) = world(name, Options::default()) else { return };
    for cast in casts() {
        world.service(1, cast.vip, &[cast.backend]);
        let seen = masquerade(&mut world, UDP, cast.client, cast.vip, cast.node);
        let answer = Packet::answer(UDP, cast.backend, seen);
        masqueraded_answer(&mut world, &answer, cast.client, cast.vip);
        world.age(100);
        masqueraded_answer(&mut world, &answer, cast.client, cast.vip);
        world.age(200);
        world.untouched(Hook::Ingress, &answer.frame());
        assert!(!world.rows().iter().any(|row| row.is(flags::MASQUERADE)), "{:#?}", world.rows());
        world.remove(|_| true);
    }
    assert_eq!(world.reasons(), []);
}

/// Nor does one in pieces: its first tells, and the others go the way of that one.
#[test]
fn a_datagram_in_pieces_after_the_time_out_answers_no_masqueraded_flow() {
    let name = "a_datagram_in_pieces_after_the_time_out_answers_no_masqueraded_flow";
    let Some(mut world) = world(name, Options::default()) else { return };
    for cast in casts() {
        world.service(1, cast.vip, &[cast.backend]);
        let seen = masquerade(&mut world, UDP, cast.client, cast.vip, cast.node);
        let mut answer = Packet::answer(UDP, cast.backend, seen).with_payload(&[0x5a; 3000]);
        let pieces = [(0, 1480), (1480, 2960), (2960, answer.transport().len())];
        answer.id = 0x7100;
        for (a, b) in pieces {
            let (verdict, out) = world.run(Hook::Ingress, &answer.fragment(a, b));
            assert_eq!((verdict, hex(&out)), (NEXT, hex(&answer.to(cast.client).fragment(a, b))), "in time");
        }
        world.age(200);
        answer.id = 0x7200;
        for (a, b) in pieces {
            world.untouched(Hook::Ingress, &answer.fragment(a, b));
        }
        assert!(!world.rows().iter().any(|row| row.is(flags::MASQUERADE)), "{:#?}", world.rows());
        world.remove(|_| true);
    }
    assert_eq!(world.reasons(), []);
}

/// Nor does one that is not masqueraded (policy Local, say) get the node's address from it: it gets another port.
#[test]
fn a_masquerade_that_was_left_alone_is_for_nobody_else() {
    let Some(mut world) = world("a_masquerade_that_was_left_alone_is_for_nobody_else", Options::default()) else {
        return;
    };
    for cast in casts() {
        world.service(1, cast.vip, &[cast.backend]);
        for proto in PROTOS {
            world.datapath.frontend(cast.vip2, proto, &Spec::pick_all(2, &[cast.backend]));
            masquerade(&mut world, proto, cast.client, cast.vip, cast.node);
            assert_eq!(world.remove(|row| !row.is(flags::MASQUERADE)), 2);
            let open = Packet::opening(proto, cast.client, cast.vip2);
            let (moved, backend) = world.translate(Hook::Ingress, &open);
            assert!(moved.ip() == cast.client.ip() && moved != cast.client && backend == cast.backend, "{moved}");
            world.untouched(Hook::Egress, &open.between(moved, backend).frame());
            let answer = Packet::answer(proto, backend, moved);
            world.expect(Hook::Egress, &answer, &answer.between(cast.vip2, cast.client));
            world.remove(|_| true);
        }
    }
    assert_eq!(world.reason(Reason::PortRemapped), 2 * PROTOS.len() as u64);
}

#[test]
fn without_an_address_to_masquerade_with_a_flow_is_dropped() {
    let Some(mut world) = world("without_an_address_to_masquerade_with_a_flow_is_dropped", Options::default()) else {
        return;
    };
    for (n, cast) in casts().into_iter().enumerate() {
        world.service(1, cast.vip, &[cast.backend]);
        let other = casts()[1 - n].node;
        let (v4, v6) = if cast.v6 { (Some(other), None) } else { (None, Some(other)) };
        for (m, device) in [Some((role::OUTWARD, v4, v6)), None].into_iter().enumerate() {
            world.device_with(device);
            let open = Packet::tcp(at(cast.client, 50_000 + m as u16), cast.vip, SYN);
            world.expect(Hook::Ingress, &open, &open.to(cast.backend));
            assert_eq!(world.run(Hook::Egress, &open.to(cast.backend).frame()).0, DROP);
            assert_eq!(world.reason(Reason::NoMasqueradeAddress), (2 * n + m + 1) as u64);
        }
        // As soon as there is an address, the retransmission passes.
        masquerade(&mut world, TCP, at(cast.client, 50_000), cast.vip, cast.node);
    }
}

/// Two routes on one device, each with a source of its own; and what has no route there gets the device's address (contract A75). By a
/// bridge's port the routes are the bridge's.
#[test]
fn the_route_says_the_masquerade_source() {
    let Some(mut world) = world("the_route_says_the_masquerade_source", Options::default()) else { return };
    // `BPF_FIB_LOOKUP_SRC`, dab4e1f06cab.
    if kernel() < (6, 7) {
        return println!("SKIP the_route_says_the_masquerade_source: the kernel has no BPF_FIB_LOOKUP_SRC (6.7)");
    }
    let sh = |command: &str| {
        let output = std::process::Command::new("sh").args(["-c", command]).output().unwrap();
        assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    };
    sh("ip link add m0 index 77 type veth peer name m1 && ip link add n0 type veth peer name n1 && \
        ip link add p0 index 78 type veth peer name p1 && ip link add b0 index 79 type bridge && \
        ip link set p0 master b0 && for d in m0 m1 n0 n1 p0 p1 b0; do ip link set $d up; done && \
        echo 1 > /proc/sys/net/ipv4/ip_forward && echo 1 > /proc/sys/net/ipv6/conf/all/forwarding");
    let port = 78;
    world.bridge(port, 79);
    for cast in casts() {
        let (own, other, elsewhere): (IpAddr, IpAddr, IpAddr) = if cast.v6 {
            ("fd00:7::8".parse().unwrap(), "fd00:7::9".parse().unwrap(), "fd00:8::1".parse().unwrap())
        } else {
            ([192, 168, 7, 8].into(), [192, 168, 7, 9].into(), [192, 168, 8, 1].into())
        };
        let (nodad, bits) = if cast.v6 { ("nodad", 64) } else { ("", 24) };
        sh(&format!(
            "ip addr add {own}/{bits} dev m0 {nodad} && ip addr add {other}/{bits} dev m0 {nodad} && \
             ip addr add {elsewhere}/{bits} dev n0 {nodad} && \
             ip route add {} dev m0 src {own} && ip route add {} dev m0 src {other}",
            cast.backend.ip(),
            cast.backend2.ip(),
        ));
        let off = if cast.v6 { "2001:db8::1" } else { "203.0.113.1" };
        sh(&format!("ip route add {off} dev n0"));
        let (bridged, of_bridge) = if cast.v6 { ("2001:db8::3", "fd00:9::1") } else { ("203.0.113.3", "192.168.9.1") };
        sh(&format!("ip addr add {of_bridge}/{bits} dev b0 {nodad} && ip route add {bridged} dev b0 src {of_bridge}"));
        world.device_at(77, role::OUTWARD);
        world.device_at(port, role::OUTWARD);
        world.device(role::OUTWARD);
        let off = SocketAddr::new(off.parse().unwrap(), 8080);
        let nowhere = SocketAddr::new(if cast.v6 { "2001:db8::2" } else { "203.0.113.2" }.parse().unwrap(), 8080);
        let bridged = SocketAddr::new(bridged.parse().unwrap(), 8080);
        let cases = [
            (77, cast.backend, own),
            (77, cast.backend2, other),
            (77, off, cast.node),
            (77, nowhere, cast.node),
            (77, bridged, cast.node),
            (port, bridged, of_bridge.parse().unwrap()),
            (port, off, cast.node),
        ];
        for (n, (index, backend, source)) in cases.into_iter().enumerate() {
            world.service(1, cast.vip, &[backend]);
            for proto in PROTOS {
                let client = at(cast.client, 43_000 + n as u16);
                let open = Packet::opening(proto, client, cast.vip);
                world.expect(Hook::Ingress, &open, &open.to(backend));
                // Out by that device: `ifindex` of the program's context.
                let mut context = [0; 192];
                context[40..44].copy_from_slice(&u32::to_ne_bytes(index));
                let (verdict, out) =
                    world.run_program("tc_egress_ether", &open.to(backend).frame(), Some(&context)).unwrap();
                let (seen, to) = ends(&out);
                assert_eq!((verdict, seen.ip(), to), (NEXT, source, backend), "{proto}");
                let answer = Packet::answer(proto, backend, seen);
                world.expect(Hook::Ingress, &answer, &answer.to(client));
                world.remove(|_| true);
            }
        }
    }
    assert_eq!(world.reasons(), []);
}

/// Version of the kernel: the first two numbers.
fn kernel() -> (u32, u32) {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse().unwrap());
    (numbers.next().unwrap(), numbers.next().unwrap())
}

#[test]
fn masquerade_ports_run_out_and_come_back() {
    let Some(mut world) =
        world("masquerade_ports_run_out_and_come_back", Options { ports: (25_000, 25_001), ..Options::default() })
    else {
        return;
    };
    world.device(role::OUTWARD);
    for cast in casts() {
        for (n, proto) in PROTOS.into_iter().enumerate() {
            world.service(1, cast.vip, &[cast.backend]);
            let mut taken = Vec::new();
            for sport in 50_000..50_006 {
                let open = Packet::opening(proto, at(cast.client, sport), cast.vip);
                world.expect(Hook::Ingress, &open, &open.to(cast.backend));
                for _ in 0..4 {
                    let (verdict, out) = world.run(Hook::Egress, &open.to(cast.backend).frame());
                    if verdict == NEXT {
                        taken.push((sport, ends(&out).0));
                        break;
                    }
                    assert_eq!(verdict, DROP);
                }
            }
            assert_eq!(taken.len(), 2, "{taken:?}");
            assert_ne!(taken[0].1, taken[1].1);
            assert_eq!(world.reason(Reason::MasqueradeExhausted), (16 * (n + 1)) as u64);
            // Another backend has its own range.
            world.service(1, cast.vip, &[cast.backend2]);
            masquerade(&mut world, proto, at(cast.client, 50_010), cast.vip, cast.node);
            // One ends: its port, and no other, is given away.
            let (sport, seen) = taken[0];
            let client = at(cast.client, sport);
            let late = at(cast.client, 50_005);
            if proto != UDP {
                let rst = Packet::abort(proto, client, cast.vip);
                world.expect(Hook::Ingress, &rst, &rst.to(cast.backend));
                world.expect(Hook::Egress, &rst.to(cast.backend), &rst.between(seen, cast.backend));
            } else {
                world.edit(
                    |row| row.src.port() == sport || row.to.port() == sport,
                    Some(&|notes| *notes.seen = notes.seen.wrapping_sub(31)),
                );
            }
            let open = Packet::opening(proto, late, cast.vip);
            let mut given = None;
            for _ in 0..8 {
                let (verdict, out) = world.run(Hook::Egress, &open.to(cast.backend).frame());
                if verdict == NEXT {
                    given = Some(ends(&out).0);
                    break;
                }
            }
            assert_eq!(given, Some(seen));
            let answer = Packet::answer(proto, cast.backend, seen);
            world.expect(Hook::Ingress, &answer, &answer.to(late));
            let answer = Packet::answer(proto, cast.backend, taken[1].1);
            world.expect(Hook::Ingress, &answer, &answer.to(at(cast.client, taken[1].0)));
        }
        assert!(world.reason(Reason::MasqueradeExhausted) >= 32);
        world = World::load(Options { ports: (25_000, 25_001), ..Options::default() });
        world.device(role::OUTWARD);
    }
}

/// Ten ports are tried: of a range that is full to nine tenths what is lost is near 0.9 to the power of ten, which is 35 in a hundred, and more as
/// it fills up. Whoever sends again draws again.
#[test]
fn of_a_range_that_is_nearly_full_chance_takes_a_share() {
    const NEW: u16 = 300;
    let test = "of_a_range_that_is_nearly_full_chance_takes_a_share";
    let Some(mut world) = world(test, Options { half_open: 131_072, ..Options::default() }) else { return };
    world.device(role::OUTWARD);
    let cast = casts()[0];
    world.service(1, cast.vip, &[cast.backend]);
    let is_lost = |world: &World, sport: u16| {
        let open = Packet::opening(TCP, at(cast.client, sport), cast.vip);
        assert_eq!(world.run(Hook::Ingress, &open.frame()).0, NEXT);
        match world.run(Hook::Egress, &open.to(cast.backend).frame()).0 {
            NEXT => false,
            verdict => {
                assert_eq!(verdict, DROP);
                true
            }
        }
    };
    // Each keeps its own port; those that stay free are spread over the range.
    let (min, max) = Options::default().ports;
    let taken = (min..=max).filter(|&port| u32::from(port).wrapping_mul(0x9e37_79b9) >> 16 > 6_553);
    assert!(taken.clone().all(|port| !is_lost(&world, port)));
    let full = taken.count() as f64 / f64::from(max - min + 1);
    assert!((0.89..0.91).contains(&full), "{full}");
    let lost: Vec<u16> = (40_000..40_000 + NEW).filter(|&sport| is_lost(&world, sport)).collect();
    let share = lost.len() as f64 / f64::from(NEW);
    assert!((0.25..0.5).contains(&share), "{share} are lost");
    assert_eq!(world.reason(Reason::MasqueradeExhausted), lost.len() as u64);
    let again = lost.iter().filter(|&&sport| is_lost(&world, sport)).count();
    assert!(again * 4 < lost.len() * 3, "of {} that are sent again {again} are lost", lost.len());
}

#[test]
fn a_pod_reaches_itself() {
    let Some(mut world) = world("a_pod_reaches_itself", Options::default()) else { return };
    for cast in casts() {
        world.service(1, cast.vip, &[cast.backend]);
        for proto in PROTOS {
            // Also from the very port it serves on, as peers of a UDP protocol do.
            for sport in [41_000, cast.backend.port()] {
                world.device(role::POD);
                let client = at(cast.backend, sport);
                let open = Packet::opening(proto, client, cast.vip);
                let (from, to) = world.translate(Hook::Ingress, &open);
                assert_eq!((from.ip(), to), (client.ip(), cast.backend));
                let (seen, to) = world.translate(Hook::Egress, &open.between(from, to));
                assert_eq!((seen.ip(), to), (cast.node, cast.backend));
                let answer = Packet::answer(proto, cast.backend, seen);
                let (src, dst) = world.translate(Hook::Ingress, &answer);
                assert_eq!(
                    world.translate(Hook::Egress, &answer.between(src, dst)),
                    (cast.vip, client),
                    "from {client}"
                );
            }
        }
    }
}

/// A flow that a test talks on: who asks, whom, as whom and whom that is by now, and who the backend takes it for.
struct Talk {
    client: SocketAddr,
    vip: SocketAddr,
    moved: SocketAddr,
    backend: SocketAddr,
    seen: SocketAddr,
}

impl Talk {
    fn open(world: &mut World, proto: u8, client: SocketAddr, vip: SocketAddr) -> Self {
        let open = Packet::opening(proto, client, vip);
        let (moved, backend) = world.translate(Hook::Ingress, &open);
        let (seen, _) = world.translate(Hook::Egress, &open.between(moved, backend));
        let talk = Self { client, vip, moved, backend, seen };
        talk.answered(world, &Packet::answer(proto, backend, seen));
        talk.more(world, proto);
        talk
    }

    /// Both sides go on.
    #[track_caller]
    fn more(&self, world: &mut World, proto: u8) {
        let Self { client, vip, moved, backend, seen } = *self;
        let more = Packet::more(proto, client, vip);
        world.expect(Hook::Ingress, &more, &more.between(moved, backend));
        world.expect(Hook::Egress, &more.between(moved, backend), &more.between(seen, backend));
        self.answered(world, &more.between(backend, seen));
    }

    #[track_caller]
    fn answered(&self, world: &mut World, answer: &Packet) {
        let Self { client, vip, moved, .. } = *self;
        world.expect(Hook::Ingress, answer, &answer.to(moved));
        world.expect(Hook::Egress, &answer.to(moved), &answer.between(vip, client));
    }
}

/// Each of them is a backend of the Service that the other one asks for, and asks from the port that it serves on (SIP, say): what one asks
/// looks like what it answers the other one. Masqueraded or not.
#[test]
fn two_peers_ask_for_each_other_from_the_ports_they_serve_on() {
    let test = "two_peers_ask_for_each_other_from_the_ports_they_serve_on";
    let Some(mut world) = world(test, Options::default()) else { return };
    for cast in casts() {
        let (one, other) = (at(cast.client, 5_060), at(cast.backend, 5_060));
        for (proto, masquerades) in
            PROTOS.into_iter().flat_map(|p| [(p, [false; 2]), (p, [false, true]), (p, [true, false])])
        {
            for (service, vip, backend) in [(1, cast.vip, other), (2, cast.vip2, one)] {
                let spec = Spec::pick_all(service, &[backend]);
                let spec = if masquerades[service as usize - 1] {
                    Spec { verdicts: [verdict::PICK_ALL | verdict::MASQUERADE; origin::COUNT], ..spec }
                } else {
                    spec
                };
                world.datapath.frontend(vip, proto, &spec);
            }
            let first = Talk::open(&mut world, proto, one, cast.vip);
            assert_eq!(first.moved, one);
            let second = Talk::open(&mut world, proto, other, cast.vip2);
            assert!(second.moved.ip() == other.ip() && second.moved != other, "{}", second.moved);
            for talk in [&first, &second, &first] {
                world.age(3);
                talk.more(&mut world, proto);
            }
            world.remove(|_| true);
        }
    }
    assert_eq!(world.reason(Reason::PairRepaired), 0);
}

#[test]
fn two_vips_to_one_backend_do_not_mix() {
    let Some(mut world) = world("two_vips_to_one_backend_do_not_mix", Options::default()) else { return };
    for cast in casts() {
        world.service(1, cast.vip, &[cast.backend]);
        world.service(2, cast.vip2, &[cast.backend]);
        for proto in PROTOS {
            let before = world.reason(Reason::PortRemapped);
            let first = Packet::opening(proto, cast.client, cast.vip);
            let second = Packet::opening(proto, cast.client, cast.vip2);
            assert_eq!(world.translate(Hook::Ingress, &first), (cast.client, cast.backend));
            let (moved, to) = world.translate(Hook::Ingress, &second);
            assert_eq!((moved.ip(), to), (cast.client.ip(), cast.backend));
            assert_ne!(moved.port(), cast.client.port());
            assert!((20_000..30_000).contains(&moved.port()));
            assert_eq!(world.reason(Reason::PortRemapped), before + 1);
            for _ in 0..2 {
                let answer = Packet::answer(proto, cast.backend, cast.client);
                world.expect(Hook::Egress, &answer, &answer.from(cast.vip));
                let answer = Packet::answer(proto, cast.backend, moved);
                world.expect(Hook::Egress, &answer, &answer.between(cast.vip2, cast.client));
                if proto != UDP {
                    let ack = Packet::more(proto, cast.client, cast.vip2);
                    world.expect(Hook::Ingress, &ack, &ack.between(moved, cast.backend));
                    let ack = Packet::more(proto, cast.client, cast.vip);
                    world.expect(Hook::Ingress, &ack, &ack.to(cast.backend));
                } else {
                    world.expect(Hook::Ingress, &second, &second.between(moved, cast.backend));
                }
            }
            // The first one ends, a third VIP's flow gets the client's own port again.
            if proto != UDP {
                world.translate(Hook::Ingress, &Packet::abort(proto, cast.client, cast.vip));
                let vip3 = at(cast.vip2, 8001);
                world.service(3, vip3, &[cast.backend]);
                let third = Packet::opening(proto, cast.client, vip3);
                world.expect(Hook::Ingress, &third, &third.to(cast.backend));
                let answer = Packet::answer(proto, cast.backend, cast.client);
                world.expect(Hook::Egress, &answer, &answer.from(vip3));
            }
        }
    }
}

#[test]
fn a_direct_connection_beside_one_through_the_vip() {
    let Some(mut world) = world("a_direct_connection_beside_one_through_the_vip", Options::default()) else { return };
    for cast in casts() {
        world.service(1, cast.vip, &[cast.backend]);
        for proto in PROTOS {
            // Live: the direct one yields its port, and gets its answers with the port it used.
            world.establish(proto, cast.client, cast.vip);
            let direct = Packet::opening(proto, cast.client, cast.backend);
            let (moved, to) = world.translate(Hook::Ingress, &direct);
            assert_eq!(to, cast.backend);
            assert!(moved.ip() == cast.client.ip() && moved.port() != cast.client.port());
            let answer = Packet::answer(proto, cast.backend, moved);
            world.expect(Hook::Egress, &answer, &answer.to(cast.client));
            let answer = Packet::answer(proto, cast.backend, cast.client);
            world.expect(Hook::Egress, &answer, &answer.from(cast.vip));
            if proto != UDP {
                let ack = Packet::more(proto, cast.client, cast.backend);
                world.expect(Hook::Ingress, &ack, &ack.from(moved));
            }
            assert!(world.rows().iter().all(|row| row.established), "{:#?}", world.rows());
            // Datagrams from off the node, of which each would have to be asked about, are not.
            if proto == UDP {
                world.remove(|row| row.is(flags::DIRECT));
                world.device(role::OUTWARD);
                world.untouched(Hook::Ingress, &direct.frame());
                world.device(role::POD);
            }

            // Over: forgotten, the direct one passes as it is.
            world.remove(|_| true);
            world.establish(proto, cast.client, cast.vip);
            if proto != UDP {
                world.translate(Hook::Ingress, &Packet::closing(proto, cast.client, cast.vip));
                world.translate(Hook::Egress, &Packet::closing(proto, cast.backend, cast.client));
            } else {
                world.age(121);
            }
            world.untouched(Hook::Ingress, &direct.frame());
            assert_eq!(world.rows(), []);
            world.untouched(Hook::Egress, &Packet::answer(proto, cast.backend, cast.client).frame());

            // And once more through the VIP.
            world.expect(
                Hook::Ingress,
                &Packet::opening(proto, cast.client, cast.vip),
                &Packet::opening(proto, cast.client, cast.backend),
            );
            world.expect(
                Hook::Egress,
                &Packet::answer(proto, cast.backend, cast.client),
                &Packet::answer(proto, cast.vip, cast.client),
            );
            world.remove(|_| true);
        }
    }
}

/// A NodePort of policy Local is not masqueraded, so a pod of another node that uses it and, from the same port, the backend itself (as
/// connect-time translation there makes it) has one reply tuple for both. A SYN is asked about. A datagram is not, wherever it
/// comes from off the node: its answers show the NodePort (README, Limits).
#[test]
fn a_direct_flow_from_off_the_node_beside_one_that_keeps_its_source() {
    let test = "a_direct_flow_from_off_the_node_beside_one_that_keeps_its_source";
    let Some(mut world) = world(test, Options::default()) else { return };
    world.device(role::OUTWARD);
    for cast in casts() {
        let node_port = SocketAddr::new(cast.node, 30_080);
        for proto in PROTOS {
            world.datapath.frontend(node_port, proto, &Spec::pick_all(1, &[cast.backend]));
            world.establish(proto, cast.client, node_port);
            let direct = Packet::opening(proto, cast.client, cast.backend);
            let answer = Packet::answer(proto, cast.backend, cast.client);
            if proto == UDP {
                world.untouched(Hook::Ingress, &direct.frame());
            } else {
                let (moved, to) = world.translate(Hook::Ingress, &direct);
                assert!(to == cast.backend && moved.ip() == cast.client.ip() && moved != cast.client);
                let answer = Packet::answer(proto, cast.backend, moved);
                world.expect(Hook::Egress, &answer, &answer.to(cast.client));
            }
            world.expect(Hook::Egress, &answer, &answer.from(node_port));
            world.remove(|_| true);
        }
    }
}

/// A pod's link in a bridge that is an outward device itself: both have the programs, and packets pass them one after the other.
#[test]
fn a_flow_through_two_devices_still_answers_as_the_vip() {
    let Some(mut world) = world("a_flow_through_two_devices_still_answers_as_the_vip", Options::default()) else {
        return;
    };
    for cast in casts() {
        world.service(1, cast.vip, &[cast.backend]);
        for proto in PROTOS {
            let mut seen = cast.client;
            let opening = Packet::opening(proto, cast.client, cast.vip);
            let more = Packet::more(proto, cast.client, cast.vip);
            for (n, packet) in [&opening, &more, &more].into_iter().enumerate() {
                let mut to = packet.clone();
                for role in [role::POD, role::OUTWARD] {
                    world.device(role);
                    let (src, dst) = world.translate(Hook::Ingress, &to);
                    to = to.between(src, dst);
                }
                assert_eq!(to.dst, cast.backend);
                assert!(n == 0 || to.src == seen, "{} after {seen}", to.src);
                seen = to.src;
                let mut back = Packet::answer(proto, cast.backend, seen);
                for _ in 0..2 {
                    let (src, dst) = world.translate(Hook::Egress, &back);
                    back = back.between(src, dst);
                }
                assert_eq!((back.src, back.dst), (cast.vip, cast.client));
            }
        }
    }
}

/// The same with a bridge that is known to be behind its pods' links: packets pass it as they are.
#[test]
fn a_flow_through_a_device_behind_another_keeps_its_port() {
    let Some(mut world) = world("a_flow_through_a_device_behind_another_keeps_its_port", Options::default()) else {
        return;
    };
    for cast in casts() {
        for (proto, backend) in PROTOS.into_iter().flat_map(|p| [(p, cast.backend), (p, at(cast.client, 8080))]) {
            world.service(1, cast.vip, &[backend]);
            let opening = Packet::opening(proto, cast.client, cast.vip);
            let more = Packet::more(proto, cast.client, cast.vip);
            let hairpin = backend.ip() == cast.client.ip();
            for packet in [&opening, &more, &more] {
                world.device(role::POD);
                world.expect(Hook::Ingress, packet, &packet.to(backend));
                world.device_behind();
                world.untouched(Hook::Ingress, &packet.to(backend).frame());
                world.device(role::POD);
                let (seen, _) = world.translate(Hook::Egress, &packet.to(backend));
                assert_eq!(seen.ip() == cast.node, hairpin);
            }
            world.remove(|_| true);
            // What comes from outside it chooses for.
            world.device_behind();
            world.expect(Hook::Ingress, &opening, &opening.to(backend));
            world.remove(|_| true);
        }
    }
    assert_eq!(world.reasons(), []);
}
