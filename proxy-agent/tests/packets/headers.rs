//! Fragments (F41), options, extension headers (F42), checksums (F44), tags.

use proxy_common::{
    Ipv4Be, Ipv6Be,
    counters::Reason,
    device::role,
    held::{FRAME, Held, ROOM},
};

use super::{
    broken::{garble, holds},
    flows::masquerade,
    packet::{ACK, Body, ETHERNET, Packet, SYN},
    world::{BOUNCE, DROP, Dice, Hook, NEXT, Options, PROTOS, TCP, UDP, at, casts, hex, world},
};

#[test]
fn later_fragments_follow_the_first() {
    let Some(mut world) = world("later_fragments_follow_the_first", Options::default()) else { return };
    for cast in casts() {
        world.service(1, cast.vip, &[cast.backend]);
        for (n, proto) in [TCP, UDP].into_iter().enumerate() {
            let mut unknown = world.reason(Reason::UnknownFragment);
            let mut open = Packet::opening(proto, cast.client, cast.vip).with_payload(&[0x5a; 3000]);
            open.id = 0x7700 + n as u32;
            let through = open.to(cast.backend);
            let answer = open.between(cast.backend, cast.client);
            let back = answer.from(cast.vip);
            let end = open.transport().len();
            for (hook, from, to) in [(Hook::Ingress, &open, &through), (Hook::Egress, &answer, &back)] {
                // Ports are never read from payload: before the first one came, a later one is nobody's.
                world.untouched(hook, &from.fragment(1480, 2960));
                unknown += 1;
                assert_eq!(world.reason(Reason::UnknownFragment), unknown);
                let (verdict, out) = world.run(hook, &from.fragment(0, 1480));
                assert_eq!((verdict, hex(&out)), (NEXT, hex(&to.fragment(0, 1480))), "the first carries the checksum");
                for (a, b) in [(2960, end), (1480, 2960), (1480, 2960)] {
                    world.expect_frame(hook, &from.fragment(a, b), &to.fragment(a, b));
                }
                // Another datagram's, another sender's.
                let mut other = from.clone();
                other.id ^= 0x100;
                world.untouched(hook, &other.fragment(1480, 2960));
                world.untouched(hook, &from.from(at(cast.vip2, 1)).fragment(1480, 2960));
                unknown += 2;
                assert_eq!(world.reason(Reason::UnknownFragment), unknown);
            }
            // Masqueraded: through both hooks.
            world.device(role::OUTWARD);
            let outside = at(cast.client, 50_000 + n as u16);
            let seen = masquerade(&mut world, proto, outside, cast.vip, cast.node);
            let mut more = Packet::more(proto, outside, cast.vip).with_payload(&[1; 2000]);
            more.id = 9;
            let (middle, last) = (more.to(cast.backend), more.between(seen, cast.backend));
            for (a, b) in [(0, 1480), (1480, more.transport().len())] {
                assert_eq!(hex(&world.run(Hook::Ingress, &more.fragment(a, b)).1), hex(&middle.fragment(a, b)));
                assert_eq!(hex(&world.run(Hook::Egress, &middle.fragment(a, b)).1), hex(&last.fragment(a, b)));
            }
            world.device(role::POD);
        }
    }
}

/// What becomes of the first one becomes of the others: none of them goes to the default gateway under a VIP.
#[test]
fn fragments_of_what_was_refused_are_dropped() {
    let Some(mut world) = world("fragments_of_what_was_refused_are_dropped", Options::default()) else { return };
    let mut stray = 0;
    for cast in casts() {
        world.service(1, cast.vip, &[]);
        world.service(2, cast.vip2, &[cast.backend]);
        world.datapath.guard(cast.vip.ip(), 1);
        world.datapath.guard(cast.vip2.ip(), 2);
        let fragments = |packet: &Packet, id: u32| {
            let mut packet = packet.clone().with_payload(&[0x5a; 3000]);
            packet.id = id;
            (packet.fragment(0, 1480), packet.fragment(1480, 2960))
        };
        for (n, to) in [cast.vip, at(cast.vip, 99)].into_iter().enumerate() {
            // Refused with its first, whichever of the address's ports it is for.
            let (first, later) = fragments(&Packet::udp(cast.client, to), 0x4400 + n as u32);
            assert_eq!(world.run(Hook::Ingress, &first).0, BOUNCE);
            assert_eq!(world.run(Hook::Ingress, &later).0, DROP);
            // Its first never came, or comes too late.
            let (_, later) = fragments(&Packet::udp(cast.client, to), 0x4500 + n as u32);
            assert_eq!(world.run(Hook::Ingress, &later).0, DROP);
            stray += 2;
        }
        let (mut unknown, echo) = (world.reason(Reason::UnknownFragment), if cast.v6 { 128 } else { 8 });
        for (packet, followed) in [
            (Packet::udp(cast.client, cast.vip2), 1),
            (Packet::other(cast.client.ip(), cast.vip2.ip(), 50), 0),
            (Packet::icmp(cast.client.ip(), cast.vip2.ip(), echo, 0, b""), 0),
        ] {
            let (_, later) = fragments(&packet, 0x4600);
            assert_eq!(world.run(Hook::Ingress, &later).0, DROP, "{packet:?}");
            stray += 1;
            // Only what is translated is followed: a large ping's later parts lack nothing.
            unknown += followed;
            assert_eq!(world.reason(Reason::UnknownFragment), unknown, "{packet:?}");
        }
        let ping = Packet::icmp(cast.client.ip(), cast.backend.ip(), echo, 0, b"");
        world.untouched(Hook::Ingress, &fragments(&ping, 0x4601).1);
        assert_eq!(world.reason(Reason::UnknownFragment), unknown);
        assert_eq!(world.reason(Reason::StrayFragment), stray);
        // Another proxy's TCP flow goes on, in pieces and in any order, too; so does what is not for us. What nobody translates
        // ends where it would leave the node.
        let (first, later) = fragments(&Packet::tcp(cast.client, cast.vip, ACK), 0x4700);
        for fragment in [&later, &first, &later] {
            world.untouched(Hook::Ingress, fragment);
            world.device(role::OUTWARD);
            assert_eq!(world.run(Hook::Egress, fragment).0, DROP);
            world.device(role::POD);
        }
        for proto in PROTOS {
            let (first, later) = fragments(&Packet::opening(proto, cast.client, cast.backend), 0x4800);
            world.untouched(Hook::Ingress, &later);
            world.untouched(Hook::Ingress, &first);
            world.untouched(Hook::Ingress, &later);
        }
        assert_eq!(world.reason(Reason::StrayFragment), stray);
        assert_eq!(world.reason(Reason::HeldFragment), world.reason(Reason::UnknownFragment));
    }
}

/// What overtakes its first is handed to the agent, as it came; not what the agent could not bring back, and nothing beyond what it has room for.
#[test]
fn what_overtakes_the_first_fragment_is_kept() {
    let name = "what_overtakes_the_first_fragment_is_kept";
    let Some(mut world) = world(name, Options::default()) else { return };
    for cast in casts() {
        world.service(1, cast.vip, &[cast.backend]);
        world.datapath.guard(cast.vip.ip(), 1);
        let (headers, version) = if cast.v6 { (14 + 40 + 8, 6) } else { (14 + 20, 4) };
        let size = if cast.v6 { size_of::<Held<Ipv6Be>>() } else { size_of::<Held<Ipv4Be>>() };
        let open = Packet::udp(cast.client, cast.vip).with_payload(&[0x5a; 20_000]);
        let answer = open.between(cast.backend, cast.client);
        let longest = (FRAME - headers) / 8 * 8;
        for (hook, packet, verdict) in [(Hook::Ingress, &open, DROP), (Hook::Egress, &answer, NEXT)] {
            for (length, is_kept) in [(8, true), (1480, true), (longest, true), (longest + 8, false)] {
                let (held, stray) = (world.reason(Reason::HeldFragment), world.reason(Reason::StrayFragment));
                let frame = packet.fragment(1480, 1480 + length);
                assert_eq!(world.run(hook, &frame).0, verdict);
                let records = world.held();
                assert_eq!(world.reason(Reason::HeldFragment) - held, u64::from(is_kept), "{length}");
                let dropped = u64::from(hook == Hook::Ingress);
                assert_eq!(world.reason(Reason::StrayFragment) - stray, dropped, "{length}");
                assert_eq!(records.len(), usize::from(is_kept), "{length}");
                for record in records {
                    assert_eq!(record.len(), size);
                    // Which, Ethernet, length; the interface, which is the loopback one here; no mark.
                    let start =
                        [&[version, 14][..], &(frame.len() as u16).to_ne_bytes(), &[1, 0, 0, 0, 0, 0, 0, 0]].concat();
                    assert_eq!(record[..12], start);
                    let body = &record[size - 4 - ROOM..];
                    assert_eq!(body[..frame.len()], frame);
                }
            }
        }
        // Once the first has come nothing is kept any more.
        assert_eq!(world.run(Hook::Ingress, &open.fragment(0, 1480)).0, NEXT);
        let later = open.fragment(1480, 2960);
        world.expect_frame(Hook::Ingress, &later, &open.to(cast.backend).fragment(1480, 2960));
        assert!(world.held().is_empty());
        // Nobody takes them out: what there is no room for is lost, and the rest of the node goes on.
        let (held, stray) = (world.reason(Reason::HeldFragment), world.reason(Reason::StrayFragment));
        for id in 0..1000 {
            let mut other = open.clone();
            other.id = 0x1_0000 + id;
            assert_eq!(world.run(Hook::Ingress, &other.fragment(1480, 2960)).0, DROP);
        }
        let kept = world.held().len() as u64;
        assert!((100..150).contains(&kept), "{kept}");
        let counted = (world.reason(Reason::HeldFragment) - held, world.reason(Reason::StrayFragment) - stray);
        assert_eq!(counted, (kept, 1000));
    }
}

/// Sixteen bits come round soon: a first fragment speaks for what comes within seconds.
#[test]
fn an_old_first_fragment_speaks_for_no_later_one() {
    let Some(mut world) = world("an_old_first_fragment_speaks_for_no_later_one", Options::default()) else { return };
    for cast in casts() {
        world.service(1, cast.vip, &[cast.backend]);
        let open = Packet::udp(cast.client, cast.vip).with_payload(&[0x5a; 3000]);
        let (first, later) = (open.fragment(0, 1480), open.fragment(1480, 2960));
        let through = hex(&open.to(cast.backend).fragment(1480, 2960));
        for (age, follows) in [(0, true), (29, true), (32, false)] {
            world.run(Hook::Ingress, &first);
            world.age_fragments(age);
            let (verdict, out) = world.run(Hook::Ingress, &later);
            assert_eq!((verdict, hex(&out)), (NEXT, if follows { through.clone() } else { hex(&later) }), "{age}");
        }
    }
    assert_eq!(world.reason(Reason::UnknownFragment), 2);
}

/// Destination options may stand behind the fragment header: only the first fragment has them, the others tell that they come next.
#[test]
fn extension_headers_behind_the_fragment_header() {
    let Some(mut world) = world("extension_headers_behind_the_fragment_header", Options::default()) else { return };
    let [_, cast] = casts();
    world.service(1, cast.vip, &[cast.backend]);
    world.datapath.guard(cast.vip.ip(), 1);
    for proto in [TCP, UDP] {
        let open = Packet::opening(proto, cast.client, cast.vip).with_payload(&[0x5a; 3000]);
        let fragments = |packet: &Packet| {
            let next = packet.proto();
            let options = [next, 0, 1, 4, 0, 0, 0, 0];
            let behind = [&options[..], &packet.transport()].concat();
            let told = Packet::other(packet.src.ip(), packet.dst.ip(), 60).with_payload(&behind);
            [(0, 1480), (1480, 2960)].map(|(from, to)| told.fragment(from, to))
        };
        for (frame, expected) in fragments(&open).iter().zip(fragments(&open.to(cast.backend))) {
            world.expect_frame(Hook::Ingress, frame, &expected);
        }
        let answer = open.between(cast.backend, cast.client);
        for (frame, expected) in fragments(&answer).iter().zip(fragments(&answer.from(cast.vip))) {
            world.expect_frame(Hook::Egress, frame, &expected);
        }
    }
    assert_eq!(world.reasons(), []);
}

#[test]
fn options_and_extension_headers_are_walked() {
    let Some(mut world) = world("options_and_extension_headers_are_walked", Options::default()) else { return };
    let [v4, v6] = casts();
    world.service(1, v4.vip, &[v4.backend]);
    world.service(2, v6.vip, &[v6.backend]);
    for proto in PROTOS {
        for words in [1, 5, 10] {
            let client = at(v4.client, 41_000 + words as u16);
            let mut open = Packet::opening(proto, client, v4.vip);
            open.options = vec![1; words * 4];
            world.expect(Hook::Ingress, &open, &open.to(v4.backend));
            let answer = open.between(v4.backend, client);
            world.expect(Hook::Egress, &answer, &answer.from(v4.vip));
        }
        let pad = |n: u8| -> Vec<u8> {
            let mut bytes = vec![0, n, 1, 4 + n * 8];
            bytes.resize(8 + usize::from(n) * 8, 0);
            bytes
        };
        // Type 0 with no segment left: its destination is the packet's.
        let routing = vec![0, 2, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4, 5, 6, 7, 8];
        let chains: Vec<Vec<(u8, Vec<u8>)>> = vec![
            vec![(0, pad(0))],
            vec![(60, pad(2))],
            vec![(43, routing.clone())],
            vec![(0, pad(1)), (60, pad(0)), (43, routing.clone()), (60, pad(3))],
            std::iter::once((0, pad(0))).chain((0..7).map(|_| (60, pad(0)))).collect(),
        ];
        for (n, extensions) in chains.into_iter().enumerate() {
            let client = at(v6.client, 42_000 + n as u16);
            let mut open = Packet::opening(proto, client, v6.vip);
            open.extensions = extensions;
            world.expect(Hook::Ingress, &open, &open.to(v6.backend));
            let answer = open.between(v6.backend, client);
            world.expect(Hook::Egress, &answer, &answer.from(v6.vip));
            // A fragment header that announces the only fragment.
            if n < 4 {
                world.expect_frame(Hook::Ingress, &open.atomic_fragment(), &open.to(v6.backend).atomic_fragment());
            }
        }
        let unparsed = world.reason(Reason::Unparsed);
        // More than is walked.
        let mut open = Packet::opening(proto, v6.client, v6.vip);
        open.extensions = std::iter::once((0, pad(0))).chain((0..8).map(|_| (60, pad(0)))).collect();
        world.untouched(Hook::Ingress, &open.frame());
        // Segments left: the destination is a stop on the way, and the checksum is over another.
        open.extensions = vec![(43, {
            let mut r = routing.clone();
            r[3] = 1;
            r
        })];
        world.untouched(Hook::Ingress, &open.frame());
        // A header that is longer than the packet.
        open.extensions = vec![(60, vec![0, 200, 1, 4, 0, 0, 0, 0])];
        world.untouched(Hook::Ingress, &open.frame());
        assert_eq!(world.reason(Reason::Unparsed), unparsed + 3);
    }
}

#[test]
fn udp_checksums_keep_their_special_values() {
    let Some(mut world) = world("udp_checksums_keep_their_special_values", Options::default()) else { return };
    for cast in casts() {
        world.service(1, cast.vip, &[cast.backend]);
        if !cast.v6 {
            let mut open = Packet::udp(cast.client, cast.vip);
            open.body = Body::Udp { bare: true };
            world.expect(Hook::Ingress, &open, &open.to(cast.backend));
            let answer = open.between(cast.backend, cast.client);
            world.expect(Hook::Egress, &answer, &answer.from(cast.vip));
        }
        // A payload under which the sum comes out as zero after the rewrite: sent as 0xffff, or it would mean "none".
        let field = if cast.v6 { 40 } else { 20 } + ETHERNET + 6;
        let mut hit = 0;
        for (hook, from, to) in [
            (Hook::Ingress, Packet::udp(cast.client, cast.vip), Packet::udp(cast.client, cast.backend)),
            (Hook::Egress, Packet::udp(cast.backend, cast.client), Packet::udp(cast.vip, cast.client)),
        ] {
            let sum = |payload: u16| {
                let frame = to.clone().with_payload(&payload.to_be_bytes()).frame();
                u16::from_be_bytes([frame[field], frame[field + 1]])
            };
            let payload = sum(0);
            for payload in [payload, payload.wrapping_sub(1), payload.wrapping_add(1)] {
                hit += usize::from(sum(payload) == 0xffff);
                let payload = payload.to_be_bytes();
                world.expect(hook, &from.clone().with_payload(&payload), &to.clone().with_payload(&payload));
            }
            // And one that comes in as 0xffff.
            let frame = from.clone().with_payload(&[0, 0]).frame();
            let payload = u16::from_be_bytes([frame[field], frame[field + 1]]).to_be_bytes();
            let packet = from.clone().with_payload(&payload);
            assert_eq!(packet.frame()[field..field + 2], [0xff, 0xff]);
            world.expect(hook, &packet, &to.clone().with_payload(&payload));
        }
        assert!(hit >= 2);
    }
}

/// Tags as they stand in the frame. Those that a device took out cannot be had from the kernel's test.
#[test]
fn tagged_packets_are_left_alone() {
    let Some(mut world) = world("tagged_packets_are_left_alone", Options::default()) else { return };
    for cast in casts() {
        world.service(1, cast.vip, &[cast.backend]);
        for tags in [&[0x81, 0, 0, 5][..], &[0x88, 0xa8, 0, 6, 0x81, 0, 0, 5]] {
            let mut frame = Packet::tcp(cast.client, cast.vip, SYN).frame();
            frame.splice(12..12, tags.iter().copied());
            world.untouched(Hook::Ingress, &frame);
            world.untouched(Hook::Egress, &frame);
        }
    }
    assert_eq!(world.rows(), []);
}

/// Programs for devices without a link header. The kernel's test hands out an Ethernet frame, so the client's address says what an
/// Ethernet type would say at that place.
#[test]
fn devices_without_a_link_header() {
    let Some(mut world) = world("devices_without_a_link_header", Options::default()) else { return };
    for name in ["tc_ingress_l3", "tc_egress_l3"] {
        let program: &mut aya::programs::SchedClassifier =
            world.datapath.ebpf.program_mut(name).unwrap().try_into().unwrap();
        program.load().unwrap();
    }
    let mut dice = Dice::new();
    let ends = [["8.0.0.9:41000", "8.0.0.8:8080"], ["[fd00:1:86dd::9]:41000", "[fd00:1:86dd::8]:8080"]];
    for (cast, ends) in casts().into_iter().zip(ends) {
        let [client, backend] = ends.map(|end| end.parse().unwrap());
        world.service(1, cast.vip, &[backend]);
        for proto in PROTOS {
            let open = Packet::opening(proto, client, cast.vip);
            let answer = Packet::answer(proto, backend, client);
            let both = [
                (Hook::Ingress, "tc_ingress_l3", &open, open.to(backend)),
                (Hook::Egress, "tc_egress_l3", &answer, answer.from(cast.vip)),
            ];
            for (_, name, from, to) in &both {
                let (verdict, out) = world.run_program(name, &from.frame()[ETHERNET..], None).unwrap();
                assert_eq!((verdict, hex(&out)), (NEXT, hex(&to.frame()[ETHERNET..])), "{name}");
            }
            // F39, F40
            for (hook, name, from, _) in both {
                let frame = from.frame();
                for round in 0..1000 {
                    let mut broken = frame.clone();
                    garble(&mut dice, &mut broken);
                    let types = [ETHERNET - 2..ETHERNET, ETHERNET + 12..ETHERNET + 14];
                    types.into_iter().for_each(|at| broken[at.clone()].copy_from_slice(&frame[at]));
                    broken.truncate(if round % 4 == 0 { ETHERNET + 14 + dice.below(60) } else { frame.len() });
                    // The kernel's test itself refuses what no device would hand up.
                    let Ok((verdict, out)) = world.run_program(name, &broken[ETHERNET..], None) else {
                        assert!(broken.len() < 2 * ETHERNET + 40, "{}", hex(&broken));
                        continue;
                    };
                    holds(hook, &broken, verdict, &[&broken[..ETHERNET], &out[..]].concat());
                }
            }
            world.remove(|_| true);
        }
    }
}
