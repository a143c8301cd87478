//! The connection table: what is half-open and what established, ends and time-outs, eviction and repair, seals.

use std::net::SocketAddr;

use proxy_common::{
    connection::{flags, state},
    counters::Reason,
    device::role,
};

use super::{
    flows::{masquerade, masqueraded_answer},
    packet::{ACK, FIN, Packet, RST, SYN},
    world::{Cast, Hook, NEXT, Options, PROTOS, Row, SCTP, TCP, UDP, World, at, casts, world},
};

/// Which entries are established, by part.
fn maps(world: &World) -> Vec<(bool, Hook, bool)> {
    let mut maps: Vec<_> = world
        .rows()
        .iter()
        .map(|row| {
            let (masquerade, hook) = row.part();
            (masquerade, hook, row.established)
        })
        .collect();
    maps.sort();
    maps
}

/// The four parts of a masqueraded flow, the first two of a plain one.
fn parts(main: bool, masquerade: bool) -> Vec<(bool, Hook, bool)> {
    vec![
        (false, Hook::Ingress, main),
        (false, Hook::Egress, main),
        (true, Hook::Ingress, masquerade),
        (true, Hook::Egress, masquerade),
    ]
}

#[test]
fn tcp_is_established_by_the_openers_answer() {
    let Some(mut world) = world("tcp_is_established_by_the_openers_answer", Options::default()) else { return };
    for cast in casts() {
        world.service(1, cast.vip, &[cast.backend]);
        let syn = Packet::tcp(cast.client, cast.vip, SYN);
        let ack = Packet::tcp(cast.client, cast.vip, ACK);
        let syn_ack = Packet::tcp(cast.backend, cast.client, SYN | ACK);
        world.translate(Hook::Ingress, &syn);
        assert_eq!(maps(&world), parts(false, false)[..2]);
        // An ACK before the peer spoke proves nothing, however often.
        for _ in 0..3 {
            world.expect(Hook::Ingress, &ack, &ack.to(cast.backend));
            assert_eq!(maps(&world), parts(false, false)[..2]);
        }
        // Nor does the peer alone, nor a SYN again, nor a reset.
        for _ in 0..2 {
            world.translate(Hook::Egress, &syn_ack);
            world.translate(Hook::Egress, &Packet::tcp(cast.backend, cast.client, ACK));
            world.translate(Hook::Ingress, &syn);
            assert_eq!(maps(&world), parts(false, false)[..2]);
        }
        world.translate(Hook::Ingress, &ack);
        assert_eq!(maps(&world), parts(true, true)[..2]);
        world.remove(|_| true);

        // Masqueraded: each pair on its own.
        world.device(role::OUTWARD);
        world.translate(Hook::Ingress, &syn);
        let pending = world.rows();
        assert_eq!(pending.len(), 3);
        assert!(pending.iter().all(|row| !row.established));
        assert_eq!(pending.iter().filter(|row| row.is(flags::PENDING)).count(), 1);
        let (seen, _) = world.translate(Hook::Egress, &syn.to(cast.backend));
        assert_eq!(maps(&world), parts(false, false));
        masqueraded_answer(&mut world, &Packet::tcp(cast.backend, seen, SYN | ACK), cast.client, cast.vip);
        assert_eq!(maps(&world), parts(false, false));
        world.translate(Hook::Ingress, &ack);
        assert_eq!(maps(&world), parts(true, false));
        world.translate(Hook::Egress, &ack.to(cast.backend));
        assert_eq!(maps(&world), parts(true, true));
        world.remove(|_| true);
        world.device(role::POD);
    }
    assert_eq!(world.reasons(), []);
}

/// Sequence and acknowledgement; the table does not look at checksums.
fn number_frame(frame: &mut [u8], sequence: u32, acknowledgement: u32) {
    let tcp = super::packet::payload_at(frame);
    frame[tcp + 4..tcp + 8].copy_from_slice(&sequence.to_be_bytes());
    frame[tcp + 8..tcp + 12].copy_from_slice(&acknowledgement.to_be_bytes());
}

/// Who forged the SYN never saw the answer: an acknowledgement of another number establishes nothing.
#[test]
fn a_blind_acknowledgement_establishes_nothing() {
    let Some(mut world) = world("a_blind_acknowledgement_establishes_nothing", Options::default()) else { return };
    for cast in casts() {
        world.service(1, cast.vip, &[cast.backend]);
        let numbered = |packet: &Packet, sequence: u32, acknowledgement: u32| {
            let mut frame = packet.frame();
            number_frame(&mut frame, sequence, acknowledgement);
            frame
        };
        let syn = Packet::tcp(cast.client, cast.vip, SYN);
        let ack = Packet::tcp(cast.client, cast.vip, ACK);
        let syn_ack = Packet::tcp(cast.backend, cast.client, SYN | ACK);
        let run = |world: &mut World, hook, frame: &[u8]| {
            assert_eq!(world.run(hook, frame).0, NEXT);
            world.rows().iter().all(|row| row.established)
        };
        let wrapping: [u32; 3] = [1_000_000, u32::MAX, u32::MAX - 10];
        for (isn, first, establishes) in wrapping.into_iter().flat_map(|isn| {
            [(isn, 1, true), (isn, 65_000, true), (isn, 0, false), (isn, 1 << 21, false), (isn, 1 << 31, false)]
        }) {
            world.translate(Hook::Ingress, &syn);
            assert!(!run(&mut world, Hook::Egress, &numbered(&syn_ack, isn, 8)));
            // Sent again: the same number.
            assert!(!run(&mut world, Hook::Egress, &numbered(&syn_ack, isn, 8)));
            let blind = numbered(&ack, 8, isn.wrapping_add(first));
            for _ in 0..2 {
                assert_eq!(run(&mut world, Hook::Ingress, &blind), establishes, "{isn} {first}");
            }
            // What the client sends still gets there, and the right number establishes it late.
            assert!(run(&mut world, Hook::Ingress, &numbered(&ack, 8, isn.wrapping_add(1))));
            assert!(world.rows().iter().all(|row| row.state & !(state::SEEN | state::FIN | state::RST) == 0));
            world.remove(|_| true);
        }
        // Answers of different numbers (SYN cookies, which depend on the client's own number): one of the last two, and no other.
        let numbers = [5_000, 90_000_000, 4_000_000_000, 1_500_000_000];
        for (answers, right) in [(2, 0), (2, 1), (3, 1), (3, 2), (4, 3)] {
            world.translate(Hook::Ingress, &syn);
            for _ in 0..2 {
                for isn in &numbers[..answers] {
                    assert!(!run(&mut world, Hook::Egress, &numbered(&syn_ack, *isn, 8)));
                    // The client's SYN once more takes nothing back.
                    world.translate(Hook::Ingress, &syn);
                }
            }
            for wrong in [8, 50_000_000, 3_000_000_000].into_iter().chain(numbers[..answers - 2].iter().map(|n| n + 1))
            {
                assert!(!run(&mut world, Hook::Ingress, &numbered(&ack, 8, wrong)), "{answers} {wrong}");
            }
            let isn = numbers[right];
            assert!(run(&mut world, Hook::Ingress, &numbered(&ack, 8, isn.wrapping_add(1))), "{answers} {isn}");
            world.remove(|_| true);
        }
        // A peer that refused: nothing is there to be acknowledged.
        world.translate(Hook::Ingress, &syn);
        world.translate(Hook::Egress, &Packet::tcp(cast.backend, cast.client, RST | ACK));
        for _ in 0..2 {
            assert!(!run(&mut world, Hook::Ingress, &numbered(&ack, 8, 1)));
        }
        world.remove(|_| true);
        // Masqueraded: both pairs, each by what its own answer said.
        world.device(role::OUTWARD);
        world.translate(Hook::Ingress, &syn);
        let (seen, _) = world.translate(Hook::Egress, &syn.to(cast.backend));
        run(&mut world, Hook::Ingress, &numbered(&syn_ack.to(seen), 7000, 8));
        run(&mut world, Hook::Egress, &numbered(&syn_ack, 7000, 8));
        for (number, establishes) in [(70, false), (7001, true)] {
            run(&mut world, Hook::Ingress, &numbered(&ack, 8, number));
            run(&mut world, Hook::Egress, &numbered(&ack.to(cast.backend), 8, number));
            let all = parts(establishes, establishes);
            assert_eq!(maps(&world), all);
        }
        world.remove(|_| true);
        world.device(role::POD);
    }
}

#[test]
fn udp_is_established_by_the_first_answer() {
    let Some(mut world) = world("udp_is_established_by_the_first_answer", Options::default()) else { return };
    for cast in casts() {
        world.service(1, cast.vip, &[cast.backend]);
        let open = Packet::udp(cast.client, cast.vip);
        for _ in 0..3 {
            world.translate(Hook::Ingress, &open);
            assert_eq!(maps(&world), parts(false, false)[..2]);
        }
        world.translate(Hook::Egress, &Packet::udp(cast.backend, cast.client));
        assert_eq!(maps(&world), parts(true, true)[..2]);
        world.remove(|_| true);
        world.device(role::OUTWARD);
        world.translate(Hook::Ingress, &open);
        let (seen, _) = world.translate(Hook::Egress, &open.to(cast.backend));
        let answer = Packet::udp(cast.backend, seen);
        world.expect(Hook::Ingress, &answer, &answer.to(cast.client));
        assert_eq!(maps(&world), parts(false, true));
        world.translate(Hook::Egress, &answer.to(cast.client));
        assert_eq!(maps(&world), parts(true, true));
        world.remove(|_| true);
        world.device(role::POD);
    }
}

#[test]
fn the_packet_that_establishes_may_also_end() {
    let Some(mut world) = world("the_packet_that_establishes_may_also_end", Options::default()) else { return };
    for cast in casts() {
        world.service(1, cast.vip, &[cast.backend]);
        world.translate(Hook::Ingress, &Packet::tcp(cast.client, cast.vip, SYN));
        world.translate(Hook::Egress, &Packet::tcp(cast.backend, cast.client, SYN | ACK));
        world.translate(Hook::Ingress, &Packet::tcp(cast.client, cast.vip, ACK | FIN));
        let rows = world.rows();
        assert!(rows.iter().all(|row| row.established));
        assert!(rows.iter().any(|row| row.hook == Hook::Ingress && row.state & state::FIN != 0), "{rows:#?}");
        world.remove(|_| true);
    }
}

/// 20 established flows, maps of 512, and 5 000 SYNs from everywhere; backends answer some, twice and with another number each time, and
/// get blind acknowledgements.
#[test]
fn a_syn_flood_evicts_no_established_flow() {
    let options = Options { half_open: 512, established: 512, ..Options::default() };
    let Some(mut world) = world("a_syn_flood_evicts_no_established_flow", options) else { return };
    for cast in casts() {
        world.service(1, cast.vip, &[cast.backend]);
        let clients: Vec<SocketAddr> = (1..=20).map(|n| at(cast.client, 50_000 + n)).collect();
        for client in &clients {
            world.establish(if client.port() % 2 == 0 { TCP } else { UDP }, *client, cast.vip);
        }
        let before = established(&world);
        assert_eq!(before.len(), 40);
        for n in 0..5_000_u32 {
            let mut source = cast.client;
            source.set_port(1024 + (n % 40_000) as u16);
            let open = Packet::opening(if n % 3 == 0 { UDP } else { TCP }, source, cast.vip);
            // Random enough for the low bytes of the address; the checksum does not matter to the table.
            let (of_source, of_destination) = if cast.v6 { (14 + 23, 14 + 39) } else { (14 + 15, 14 + 19) };
            let run = |hook, packet: &Packet, end: usize, numbers: Option<[u32; 2]>| {
                let mut frame = packet.frame();
                frame[end] = (n >> 8) as u8;
                frame[end - 1] = n as u8;
                if let Some([sequence, acknowledgement]) = numbers {
                    number_frame(&mut frame, sequence, acknowledgement);
                }
                assert_eq!(world.run(hook, &frame).0, NEXT);
            };
            run(Hook::Ingress, &open, of_source, None);
            if n % 5 == 0 {
                let ack = Packet::tcp(source, cast.vip, ACK);
                run(Hook::Ingress, &ack, of_source, None);
                if n % 3 != 0 {
                    let answer = Packet::tcp(cast.backend, source, SYN | ACK);
                    for isn in [0x1000_0000, 0x2000_0000] {
                        run(Hook::Egress, &answer, of_destination, Some([isn + n, 1]));
                        run(Hook::Ingress, &open, of_source, None);
                    }
                    run(Hook::Ingress, &ack, of_source, Some([1, 0x3000_0000]));
                }
            }
        }
        let half_open = world.rows().iter().filter(|row| !row.established).count();
        assert!((100..=512).contains(&half_open), "{half_open}");
        assert_eq!(established(&world), before);
        for client in clients {
            let proto = if client.port() % 2 == 0 { TCP } else { UDP };
            let more = Packet::more(proto, client, cast.vip);
            world.expect(Hook::Ingress, &more, &more.to(cast.backend));
            let answer = more.between(cast.backend, client);
            world.expect(Hook::Egress, &answer, &answer.from(cast.vip));
        }
        world.remove(|_| true);
    }
    assert_eq!(world.reason(Reason::InsertFailed), 0);
}

fn established(world: &World) -> Vec<Row> {
    let rows = world.rows().into_iter().filter(|row| row.established);
    rows.map(|row| Row { seen: 0, ..row }).collect()
}

/// Whether the next opening packet goes to `backend2`, which has taken `backend`'s place.
fn chosen_anew(world: &mut World, cast: &Cast, open: &Packet) -> bool {
    let (_, to) = world.translate(Hook::Ingress, open);
    assert!(to == cast.backend || to == cast.backend2);
    to == cast.backend2
}

#[test]
fn a_live_flow_keeps_its_backend_and_an_ended_one_does_not() {
    let Some(mut world) = world("a_live_flow_keeps_its_backend_and_an_ended_one_does_not", Options::default()) else {
        return;
    };
    type End = fn(&mut World, &Cast);
    let fin = |world: &mut World, cast: &Cast| {
        world.translate(Hook::Ingress, &Packet::tcp(cast.client, cast.vip, FIN | ACK));
    };
    let fin_back = |world: &mut World, cast: &Cast| {
        world.translate(Hook::Egress, &Packet::tcp(cast.backend, cast.client, FIN | ACK));
    };
    let ends: [(&str, bool, End); 8] = [
        ("nothing", false, |_, _| {}),
        ("one FIN", false, fin),
        ("the other FIN", false, fin_back),
        ("both", true, |world, cast| {
            world.translate(Hook::Egress, &Packet::tcp(cast.backend, cast.client, FIN | ACK));
            world.translate(Hook::Ingress, &Packet::tcp(cast.client, cast.vip, FIN | ACK));
            world.translate(Hook::Egress, &Packet::tcp(cast.backend, cast.client, ACK));
        }),
        ("RST", true, |world, cast| {
            world.translate(Hook::Ingress, &Packet::tcp(cast.client, cast.vip, RST));
        }),
        ("RST back", true, |world, cast| {
            world.translate(Hook::Egress, &Packet::tcp(cast.backend, cast.client, RST | ACK));
        }),
        ("a long silence", false, |world, _| world.age(86_000)),
        ("a longer one", true, |world, _| world.age(86_402)),
    ];
    for cast in casts() {
        for (name, anew, end) in ends {
            world.service(1, cast.vip, &[cast.backend]);
            world.establish(TCP, cast.client, cast.vip);
            // The frontend changes: established flows do not care (contract A45).
            world.service(1, cast.vip, &[cast.backend2]);
            let ack = Packet::tcp(cast.client, cast.vip, ACK);
            world.expect(Hook::Ingress, &ack, &ack.to(cast.backend));
            end(&mut world, &cast);
            let syn = Packet::tcp(cast.client, cast.vip, SYN);
            assert_eq!(chosen_anew(&mut world, &cast, &syn), anew, "{name}");
            if anew {
                // Nothing is left of the old one, and the new one is half-open.
                assert_eq!(maps(&world), parts(false, false)[..2], "{name}");
                let answer = Packet::tcp(cast.backend2, cast.client, SYN | ACK);
                world.expect(Hook::Egress, &answer, &answer.from(cast.vip));
            } else {
                let answer = Packet::tcp(cast.backend, cast.client, SYN | ACK);
                world.expect(Hook::Egress, &answer, &answer.from(cast.vip));
            }
            world.remove(|_| true);
        }
    }
}

#[test]
fn idle_flows_are_chosen_anew() {
    let Some(mut world) = world("idle_flows_are_chosen_anew", Options::default()) else { return };
    for cast in casts() {
        // Protocol, answered, idle, chosen anew.
        for (proto, answered, idle, anew) in [
            (UDP, true, 110, false),
            (UDP, true, 122, true),
            (UDP, false, 25, false),
            (UDP, false, 32, true),
            (TCP, false, 55, false),
            (TCP, false, 62, true),
        ] {
            world.service(1, cast.vip, &[cast.backend]);
            let open = Packet::opening(proto, cast.client, cast.vip);
            world.translate(Hook::Ingress, &open);
            if answered {
                world.translate(Hook::Egress, &Packet::udp(cast.backend, cast.client));
            }
            world.service(1, cast.vip, &[cast.backend2]);
            world.age(idle);
            assert_eq!(chosen_anew(&mut world, &cast, &open), anew, "{proto} {answered} {idle}");
            if anew {
                assert_eq!(world.rows().len(), 2, "{:#?}", world.rows());
            } else {
                // That packet counts as life.
                world.age(10);
                assert!(!chosen_anew(&mut world, &cast, &open));
            }
            world.remove(|_| true);
        }
        // Answers alone keep a flow alive.
        world.service(1, cast.vip, &[cast.backend]);
        world.establish(UDP, cast.client, cast.vip);
        world.service(1, cast.vip, &[cast.backend2]);
        for _ in 0..3 {
            world.age(100);
            world.translate(Hook::Egress, &Packet::udp(cast.backend, cast.client));
        }
        assert!(!chosen_anew(&mut world, &cast, &Packet::udp(cast.client, cast.vip)));
        world.remove(|_| true);
    }
}

#[test]
fn a_masqueraded_flow_that_ended_leaves_nothing() {
    let Some(mut world) = world("a_masqueraded_flow_that_ended_leaves_nothing", Options::default()) else { return };
    for cast in casts() {
        for proto in PROTOS {
            world.service(1, cast.vip, &[cast.backend]);
            masquerade(&mut world, proto, cast.client, cast.vip, cast.node);
            world.service(1, cast.vip, &[cast.backend2]);
            if proto != UDP {
                let rst = Packet::abort(proto, cast.client, cast.vip);
                world.translate(Hook::Ingress, &rst);
                world.translate(Hook::Egress, &rst.to(cast.backend));
            } else {
                world.age(122);
            }
            let open = Packet::opening(proto, cast.client, cast.vip);
            assert!(chosen_anew(&mut world, &cast, &open));
            world.translate(Hook::Egress, &open.to(cast.backend2));
            let rows = world.rows();
            assert_eq!(rows.len(), 4, "{rows:#?}");
            assert!(rows.iter().all(|row| ![row.src, row.dst, row.to].contains(&cast.backend)), "{rows:#?}");
            world.remove(|_| true);
        }
    }
}

/// Conntrack gives a connection of the node's own another source port where it would share its answers with one that it remembers; out of our
/// range, too.
#[test]
fn a_masquerade_port_whose_flow_is_over_may_be_another_connections() {
    let Some(mut world) = world("a_masquerade_port_whose_flow_is_over_may_be_another_connections", Options::default())
    else {
        return;
    };
    for cast in casts() {
        for proto in PROTOS.into_iter().filter(|proto| *proto != UDP) {
            world.service(1, cast.vip, &[cast.backend]);
            let seen = masquerade(&mut world, proto, cast.client, cast.vip, cast.node);
            // Sent once more, while it is open.
            let answer = Packet::answer(proto, cast.backend, seen);
            masqueraded_answer(&mut world, &answer, cast.client, cast.vip);
            let rst = Packet::abort(proto, cast.client, cast.vip);
            world.translate(Hook::Ingress, &rst);
            world.translate(Hook::Egress, &rst.to(cast.backend));
            // What is still on its way.
            let more = Packet::more(proto, cast.backend, seen);
            world.expect(Hook::Ingress, &more, &more.to(cast.client));
            for packet in [&answer, &more, &answer] {
                world.untouched(Hook::Ingress, &packet.frame());
            }
            world.remove(|_| true);
        }
    }
}

#[test]
fn what_is_no_opening_and_has_no_flow_is_left_alone() {
    let Some(mut world) = world("what_is_no_opening_and_has_no_flow_is_left_alone", Options::default()) else { return };
    for cast in casts() {
        world.service(1, cast.vip, &[cast.backend]);
        world.datapath.guard(cast.vip.ip(), 1);
        for flags in [ACK, ACK | FIN, RST, RST | ACK, SYN | ACK, SYN | RST, SYN | FIN, 0, 0x08 | ACK, FIN] {
            for role in [role::POD, role::OUTWARD] {
                world.device(role);
                for to in [cast.vip, cast.backend, at(cast.vip, 9)] {
                    world.untouched(Hook::Ingress, &Packet::tcp(cast.client, to, flags).frame());
                }
                world.untouched(Hook::Egress, &Packet::tcp(cast.backend, cast.client, flags).frame());
            }
        }
        // SYN with odd company opens: ECN's bits, data to be pushed.
        world.device(role::POD);
        for (n, flags) in [SYN | 0xc0, SYN | 0x08].into_iter().enumerate() {
            let syn = Packet::tcp(at(cast.client, 100 + n as u16), cast.vip, flags);
            world.expect(Hook::Ingress, &syn, &syn.to(cast.backend));
        }
        world.remove(|_| true);
    }
    // Towards our addresses it is counted: 10 kinds of packet, 2 roles, 2 ports, 2 families.
    assert_eq!(world.reasons(), [(Reason::NotASyn.name(), 80)]);
}

#[test]
fn an_evicted_half_is_put_back() {
    let Some(mut world) = world("an_evicted_half_is_put_back", Options::default()) else { return };
    for cast in casts() {
        world.service(1, cast.vip, &[cast.backend]);
        for proto in PROTOS {
            let seen = masquerade(&mut world, proto, cast.client, cast.vip, cast.node);
            // The frontend goes (contract A87): nothing could bring the flow back but its entries.
            world.service(1, cast.vip, &[cast.backend2]);
            let whole = established(&world);
            assert_eq!(whole.len(), 4);
            let ahead = Packet::more(proto, cast.client, cast.vip);
            let back = ahead.between(cast.backend, seen);
            for lost in [(false, Hook::Ingress), (false, Hook::Egress), (true, Hook::Ingress), (true, Hook::Egress)] {
                let repaired = world.reason(Reason::PairRepaired);
                assert_eq!(world.remove(|row| row.part() == lost), 1);
                // Looked for a moment ago: not again so soon.
                world.edit(|_| true, Some(&|notes| *notes.checked = *notes.seen));
                world.edit(|_| true, Some(&|notes| *notes.checked = notes.checked.wrapping_sub(3)));
                // What still has its way through; in the order that reaches the half that is left.
                match lost {
                    (false, Hook::Ingress) => {
                        world.expect(Hook::Egress, &back.to(cast.client), &back.between(cast.vip, cast.client));
                    }
                    (false, Hook::Egress) => world.expect(Hook::Ingress, &ahead, &ahead.to(cast.backend)),
                    (true, Hook::Ingress) => {
                        world.expect(Hook::Egress, &ahead.to(cast.backend), &ahead.between(seen, cast.backend));
                    }
                    (true, Hook::Egress) => world.expect(Hook::Ingress, &back, &back.to(cast.client)),
                }
                assert_eq!(world.reason(Reason::PairRepaired), repaired + 1, "{lost:?}");
                // As it was; what passed and what did not is told anew.
                let forget =
                    |rows: Vec<Row>| -> Vec<Row> { rows.into_iter().map(|row| Row { state: 0, ..row }).collect() };
                assert_eq!(forget(established(&world)), forget(whole.clone()), "{lost:?}");
                world.expect(Hook::Ingress, &ahead, &ahead.to(cast.backend));
                world.expect(Hook::Egress, &ahead.to(cast.backend), &ahead.between(seen, cast.backend));
                masqueraded_answer(&mut world, &back, cast.client, cast.vip);
            }
            world.service(1, cast.vip, &[cast.backend]);
            world.remove(|_| true);
        }
    }
}

/// The masquerade pair is gone, or its half at egress and the client speaks first: the flow asks for its port again, one that is in the
/// range by itself and one that it was given.
#[test]
fn an_evicted_masquerade_is_asked_for_again() {
    let Some(mut world) = world("an_evicted_masquerade_is_asked_for_again", Options::default()) else { return };
    let mut repaired = 0;
    for cast in casts() {
        world.service(1, cast.vip, &[cast.backend]);
        for (proto, client) in PROTOS.into_iter().flat_map(|p| [(p, at(cast.client, 23_456)), (p, cast.client)]) {
            let seen = masquerade(&mut world, proto, client, cast.vip, cast.node);
            assert_eq!(seen.port() == client.port(), client.port() == 23_456);
            let ahead = Packet::more(proto, client, cast.vip);
            let back = ahead.between(cast.backend, seen);
            for (both, main) in [(true, None), (false, None), (true, Some(Hook::Ingress)), (true, Some(Hook::Egress))] {
                if let Some(half) = main {
                    // A half of the main pair, too: put back, it still knows the port.
                    let evict =
                        |world: &mut World, half| assert_eq!(world.remove(|row| row.part() == (false, half)), 1);
                    let age = |world: &mut World| {
                        world.edit(|_| true, Some(&|notes| *notes.checked = notes.checked.wrapping_sub(3)));
                    };
                    evict(&mut world, half);
                    age(&mut world);
                    if half == Hook::Ingress {
                        world.expect(Hook::Egress, &back.to(client), &back.between(cast.vip, client));
                    } else {
                        world.expect(Hook::Ingress, &ahead, &ahead.to(cast.backend));
                        // From the half that was put back, the other one again.
                        evict(&mut world, Hook::Ingress);
                        age(&mut world);
                        world.expect(Hook::Egress, &back.to(client), &back.between(cast.vip, client));
                        repaired += 1;
                    }
                    repaired += 1;
                }
                // One half, and the client speaks first; or both.
                let lost = world.remove(|row| row.is(flags::MASQUERADE) && (both || row.hook == Hook::Egress));
                assert_eq!(lost, if both { 2 } else { 1 });
                world.edit(|_| true, Some(&|notes| *notes.checked = notes.checked.wrapping_sub(3)));
                world.expect(Hook::Ingress, &ahead, &ahead.to(cast.backend));
                world.expect(Hook::Egress, &ahead.to(cast.backend), &ahead.between(seen, cast.backend));
                masqueraded_answer(&mut world, &back, client, cast.vip);
                repaired += 1;
                assert_eq!(world.reason(Reason::PairRepaired), repaired);
            }
            world.remove(|_| true);
        }
    }
    assert_eq!(world.reason(Reason::MasqueradeExhausted), 0);
}

/// Evicted, and another flow has the port by now: this one gets another, and is not counted as repaired.
#[test]
fn a_port_that_is_taken_is_not_given_again() {
    let Some(mut world) = world("a_port_that_is_taken_is_not_given_again", Options::default()) else { return };
    for cast in casts() {
        world.service(1, cast.vip, &[cast.backend]);
        for proto in PROTOS {
            let seen = masquerade(&mut world, proto, cast.client, cast.vip, cast.node);
            assert_eq!(world.remove(|row| row.is(flags::MASQUERADE)), 2);
            let rival = SocketAddr::new(cast.router, seen.port());
            assert_eq!(masquerade(&mut world, proto, rival, cast.vip, cast.node), seen);
            world.edit(|_| true, Some(&|notes| *notes.checked = notes.checked.wrapping_sub(3)));
            let (client, vip) = (cast.client, cast.vip);
            let ahead = Packet::more(proto, client, vip);
            let back = |seen| ahead.between(cast.backend, seen);
            world.expect(Hook::Ingress, &ahead, &ahead.to(cast.backend));
            let (moved, _) = world.translate(Hook::Egress, &ahead.to(cast.backend));
            assert!(moved.ip() == cast.node && moved != seen, "{moved}");
            masqueraded_answer(&mut world, &back(moved), client, vip);
            masqueraded_answer(&mut world, &back(seen), rival, vip);
            world.remove(|_| true);
        }
    }
    assert_eq!(world.reason(Reason::PairRepaired), 0);
}

/// A masquerade port whose claim was evicted may be another flow's by now: whoever lost it leaves it.
#[test]
fn a_port_that_went_to_another_flow_is_not_shared() {
    let options = Options { ports: (25_000, 25_001), ..Options::default() };
    let Some(mut world) = world("a_port_that_went_to_another_flow_is_not_shared", options) else { return };
    for cast in casts() {
        world.service(1, cast.vip, &[cast.backend]);
        for proto in PROTOS {
            let first = at(cast.client, 25_000);
            let mut second = first;
            second.set_ip(cast.router);
            assert_eq!(masquerade(&mut world, proto, first, cast.vip, cast.node).port(), 25_000);
            assert_eq!(world.remove(|row| row.part() == (true, Hook::Ingress)), 1);
            assert_eq!(masquerade(&mut world, proto, second, cast.vip, cast.node).port(), 25_000);
            world.edit(|row| row.established, Some(&|notes| *notes.checked = notes.checked.wrapping_sub(3)));
            // The first one's next packet finds out, the one after has a port of its own.
            let ahead = Packet::more(proto, first, cast.vip);
            let (verdict, _) = world.run(Hook::Egress, &ahead.to(cast.backend).frame());
            assert_eq!(verdict, NEXT);
            let mut moved = first;
            for _ in 0..8 {
                let (verdict, out) = world.run(Hook::Egress, &ahead.to(cast.backend).frame());
                if verdict == NEXT {
                    moved = super::packet::ends(&out).0;
                    break;
                }
            }
            assert_eq!(moved, SocketAddr::new(cast.node, 25_001));
            let answer = |to| Packet::more(proto, cast.backend, to);
            masqueraded_answer(&mut world, &answer(moved), first, cast.vip);
            masqueraded_answer(&mut world, &answer(SocketAddr::new(cast.node, 25_000)), second, cast.vip);
            world.remove(|_| true);
        }
    }
}

/// The reply tuple of a flow whose answers' entry was evicted went to another one. When the first flow is over and its ports are used anew, the
/// other one keeps its entries.
#[test]
fn a_flow_whose_reply_tuple_went_to_another_one_leaves_it_alone() {
    let test = "a_flow_whose_reply_tuple_went_to_another_one_leaves_it_alone";
    let Some(mut world) = world(test, Options::default()) else { return };
    for cast in casts() {
        world.service(1, cast.vip, &[cast.backend]);
        world.service(2, cast.vip2, &[cast.backend]);
        let client = at(cast.client, 22_222);
        for (proto, is_masqueraded) in [TCP, SCTP].into_iter().flat_map(|p| [(p, false), (p, true)]) {
            let open = |world: &mut World, vip| {
                if is_masqueraded {
                    masquerade(world, proto, client, vip, cast.node)
                } else {
                    world.device(role::POD);
                    assert_eq!(world.establish(proto, client, vip), cast.backend);
                    client
                }
            };
            open(&mut world, cast.vip);
            // All of its way back, as if each half had been evicted.
            world.remove(|row| row.part().1 == Hook::Egress || row.is(flags::MASQUERADE));
            let seen = open(&mut world, cast.vip2);
            let second =
                |world: &World| -> Vec<Row> { established(world).into_iter().filter(|row| row.service == 2).collect() };
            let before = second(&world);
            assert_eq!(before.len(), if is_masqueraded { 4 } else { 2 }, "{before:#?}");
            world.translate(Hook::Ingress, &Packet::abort(proto, client, cast.vip));
            let (moved, to) = world.translate(Hook::Ingress, &Packet::opening(proto, client, cast.vip));
            assert!(to == cast.backend && moved != client, "{moved}");
            assert_eq!(second(&world), before);
            let more = Packet::more(proto, client, cast.vip2);
            world.expect(Hook::Ingress, &more, &more.to(cast.backend));
            let answer = more.between(cast.backend, client);
            if is_masqueraded {
                world.expect(Hook::Egress, &more.to(cast.backend), &more.between(seen, cast.backend));
                masqueraded_answer(&mut world, &answer.to(seen), client, cast.vip2);
            } else {
                world.expect(Hook::Egress, &answer, &answer.from(cast.vip2));
            }
            world.remove(|_| true);
        }
    }
    assert_eq!(world.reason(Reason::PairRepaired), 0);
}

/// The client of a masqueraded flow went elsewhere after its entry was evicted. When the first flow is over, what masqueraded it goes with what is
/// left of it, and its client asks the first backend straight, as itself.
#[test]
fn what_masquerades_goes_with_a_flow_whose_client_went_elsewhere() {
    let test = "what_masquerades_goes_with_a_flow_whose_client_went_elsewhere";
    let Some(mut world) = world(test, Options::default()) else { return };
    for cast in casts() {
        world.service(1, cast.vip, &[cast.backend]);
        let client = at(cast.client, 22_222);
        let seen = masquerade(&mut world, TCP, client, cast.vip, cast.node);
        masqueraded_answer(&mut world, &Packet::tcp(cast.backend, seen, RST | ACK), client, cast.vip);
        assert_eq!(world.remove(|row| row.part() == (false, Hook::Ingress)), 1);
        let elsewhere = at(cast.backend, 9_090);
        world.service(1, cast.vip, &[elsewhere]);
        assert_eq!(world.translate(Hook::Ingress, &Packet::opening(TCP, client, cast.vip)), (client, elsewhere));
        let straight = Packet::tcp(client, cast.backend, SYN);
        world.untouched(Hook::Ingress, &straight.frame());
        world.untouched(Hook::Egress, &straight.frame());
        world.remove(|_| true);
    }
}

/// The port that a flow was masqueraded with went to another one after its half was evicted. When the first flow is over, the other one keeps it.
#[test]
fn a_port_that_went_to_another_flow_stays_with_that() {
    let Some(mut world) = world("a_port_that_went_to_another_flow_stays_with_that", Options::default()) else { return };
    for cast in casts() {
        world.service(1, cast.vip, &[cast.backend]);
        let (client, other) = (at(cast.client, 22_222), at(cast.backend2, 22_222));
        let seen = masquerade(&mut world, TCP, client, cast.vip, cast.node);
        assert_eq!(world.remove(|row| row.part() == (true, Hook::Ingress)), 1);
        assert_eq!(masquerade(&mut world, TCP, other, cast.vip, cast.node), seen);
        // The first one is over, and its client opens its next connection from the same port.
        for flags in [RST, SYN] {
            let packet = Packet::tcp(client, cast.vip, flags);
            world.expect(Hook::Ingress, &packet, &packet.to(cast.backend));
        }
        let half = |row: &Row| row.part() == (true, Hook::Ingress) && row.to == other;
        assert_eq!(world.rows().iter().filter(|row| half(row)).count(), 1, "{:#?}", world.rows());
        masqueraded_answer(&mut world, &Packet::tcp(cast.backend, seen, ACK), other, cast.vip);
        world.remove(|_| true);
    }
}

/// The way back of a flow that is gone is no sign of life of the one that takes its place.
#[test]
fn a_left_over_answer_entry_establishes_nothing() {
    let Some(mut world) = world("a_left_over_answer_entry_establishes_nothing", Options::default()) else { return };
    for cast in casts() {
        world.service(1, cast.vip, &[cast.backend]);
        world.establish(TCP, cast.client, cast.vip);
        world.translate(Hook::Egress, &Packet::tcp(cast.backend, cast.client, RST));
        assert_eq!(world.remove(|row| row.hook == Hook::Ingress), 1);
        let syn = Packet::tcp(cast.client, cast.vip, SYN);
        world.expect(Hook::Ingress, &syn, &syn.to(cast.backend));
        world.translate(Hook::Ingress, &Packet::tcp(cast.client, cast.vip, ACK));
        let rows = world.rows();
        assert_eq!(maps(&world), parts(false, false)[..2]);
        assert!(rows.iter().all(|row| row.state & state::RST == 0), "{rows:#?}");
        assert!(rows.iter().all(|row| row.has_seen() == (row.hook == Hook::Ingress)));
        world.remove(|_| true);
    }
}

/// An answer to a datagram that went elsewhere first does not move the flow there.
#[test]
fn a_late_answer_of_another_backend_establishes_nothing() {
    let Some(mut world) = world("a_late_answer_of_another_backend_establishes_nothing", Options::default()) else {
        return;
    };
    for cast in casts() {
        let open = Packet::udp(cast.client, cast.vip);
        world.service(1, cast.vip, &[cast.backend]);
        world.translate(Hook::Ingress, &open);
        assert_eq!(world.remove(|row| row.hook == Hook::Ingress), 1);
        world.service(1, cast.vip, &[cast.backend2]);
        world.expect(Hook::Ingress, &open, &open.to(cast.backend2));
        let late = Packet::udp(cast.backend, cast.client);
        world.expect(Hook::Egress, &late, &late.from(cast.vip));
        world.expect(Hook::Ingress, &open, &open.to(cast.backend2));
        assert_eq!(established(&world), []);
        let answer = Packet::udp(cast.backend2, cast.client);
        world.expect(Hook::Egress, &answer, &answer.from(cast.vip));
        assert_eq!(established(&world).len(), 2);
        world.expect(Hook::Ingress, &open, &open.to(cast.backend2));
        world.remove(|_| true);
    }
}

#[test]
fn an_entry_with_a_wrong_seal_is_none() {
    let Some(mut world) = world("an_entry_with_a_wrong_seal_is_none", Options::default()) else { return };
    for cast in casts() {
        world.service(1, cast.vip, &[cast.backend]);
        for proto in PROTOS {
            world.establish(proto, cast.client, cast.vip);
            world.service(1, cast.vip, &[cast.backend2]);
            assert_eq!(world.edit(|_| true, Some(&|notes| *notes.seal ^= 1)), 2);
            let (once, twice) = (world.reason(Reason::TornRead), world.reason(Reason::TornTwice));
            world.untouched(Hook::Egress, &Packet::answer(proto, cast.backend, cast.client).frame());
            // Looked up twice more, then taken for none: that is no loss, so not counted as one.
            assert_eq!((world.reason(Reason::TornRead), world.reason(Reason::TornTwice)), (once + 3, twice));
            if proto != UDP {
                world.untouched(Hook::Ingress, &Packet::more(proto, cast.client, cast.vip).frame());
            }
            // What opens, opens anew.
            let open = Packet::opening(proto, cast.client, cast.vip);
            world.expect(Hook::Ingress, &open, &open.to(cast.backend2));
            world.remove(|_| true);
            world.service(1, cast.vip, &[cast.backend]);
        }
    }
}

/// A reply tuple that another CPU claims between the look and the claim. Stood in for by an entry that no look finds, since its
/// seal is wrong, but that is there: it must stay, and the new flow gets another port.
#[test]
fn a_reply_tuple_taken_since_the_look_is_not_overwritten() {
    let Some(mut world) = world("a_reply_tuple_taken_since_the_look_is_not_overwritten", Options::default()) else {
        return;
    };
    for cast in casts() {
        world.service(1, cast.vip, &[cast.backend]);
        world.service(2, cast.vip2, &[cast.backend]);
        for proto in PROTOS {
            for is_established in [false, true] {
                if is_established {
                    world.establish(proto, cast.client, cast.vip);
                } else {
                    world.translate(Hook::Ingress, &Packet::opening(proto, cast.client, cast.vip));
                }
                let reply = |row: &Row| row.hook == Hook::Egress;
                assert_eq!(world.edit(reply, Some(&|notes| *notes.seal ^= 1)), 1);
                let before = world.rows();
                let remapped = world.reason(Reason::PortRemapped);
                let open = Packet::opening(proto, cast.client, cast.vip2);
                let (seen, to) = world.translate(Hook::Ingress, &open);
                assert_eq!(to, cast.backend);
                assert_ne!(seen, cast.client, "its answers would come back as the other VIP's");
                assert_eq!(world.reason(Reason::PortRemapped), remapped + 1);
                let rows = world.rows();
                assert_eq!(rows.len(), 4, "{rows:#?}");
                assert!(before.iter().all(|row| rows.contains(row)), "{before:#?} {rows:#?}");
                let answer = Packet::answer(proto, cast.backend, seen);
                world.expect(Hook::Egress, &answer, &answer.between(cast.vip2, cast.client));
                world.remove(|_| true);
            }
        }
    }
    assert_eq!(world.reason(Reason::RemapExhausted) + world.reason(Reason::InsertFailed), 0);
}

/// An idle TCP flow, and many times more answered datagram flows than the map has room for.
#[test]
fn answered_udp_evicts_no_tcp_flow() {
    let options = Options { established: 512, ..Options::default() };
    let Some(mut world) = world("answered_udp_evicts_no_tcp_flow", options) else { return };
    for cast in casts() {
        world.service(1, cast.vip, &[cast.backend]);
        world.establish(TCP, cast.client, cast.vip);
        let tcp = |world: &World| established(world).into_iter().filter(|row| row.proto == TCP).collect::<Vec<_>>();
        let before = tcp(&world);
        assert_eq!(before.len(), 2);
        for n in 0..3_000 {
            world.establish(UDP, at(cast.client, 10_000 + n), cast.vip);
        }
        let answered = established(&world).len() - before.len();
        assert!((100..=512).contains(&answered), "{answered}");
        assert_eq!(tcp(&world), before);
        let more = Packet::tcp(cast.client, cast.vip, ACK);
        world.expect(Hook::Ingress, &more, &more.to(cast.backend));
        let answer = more.between(cast.backend, cast.client);
        world.expect(Hook::Egress, &answer, &answer.from(cast.vip));
        world.remove(|_| true);
    }
}
