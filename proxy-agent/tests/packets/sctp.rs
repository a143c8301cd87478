//! What is SCTP's own: tags, chunks, the checksum. What it shares with TCP and UDP the other files ask of all three.

use proxy_common::{connection::state, counters::Reason, device::role};

use super::{
    flows::{masquerade, masqueraded_answer},
    packet::{
        ABORT, ANSWERERS_TAG, COOKIE_ECHO, INIT, INIT_ACK, OPENERS_TAG, Packet, SHUTDOWN, Sums, ends, payload_at, sums,
    },
    support::Spec,
    world::{Cast, DROP, Dice, Hook, NEXT, Options, SCTP, World, at, casts, hex, usual, world},
};

const DATA: u8 = 0;
const SACK: u8 = 3;
const HEARTBEAT: u8 = 4;
const SHUTDOWN_ACK: u8 = 8;
const COOKIE_ACK: u8 = 11;
const SHUTDOWN_COMPLETE: u8 = 14;

fn established(world: &World) -> usize {
    world.rows().iter().filter(|row| row.established).count()
}

/// An INIT ACK that tells the opener another tag.
fn init_ack(cast: &Cast, told: u32) -> Vec<u8> {
    let mut frame = Packet::sctp(cast.backend, cast.client, INIT_ACK, OPENERS_TAG).frame();
    let at = payload_at(&frame) + 16;
    frame[at..at + 4].copy_from_slice(&told.to_be_bytes());
    frame
}

#[test]
fn an_association_is_established_under_the_tag_that_it_was_told() {
    let Some(mut world) = world("an_association_is_established_under_the_tag_that_it_was_told", Options::default())
    else {
        return;
    };
    for cast in casts() {
        world.service(1, cast.vip, &[cast.backend]);
        let echo = |tag| Packet::sctp(cast.client, cast.vip, COOKIE_ECHO, tag);
        world.translate(Hook::Ingress, &Packet::opening(SCTP, cast.client, cast.vip));
        // Nothing is known yet, then another one is; its answer alone is no proof either.
        for told in [None, Some(ANSWERERS_TAG)] {
            if let Some(told) = told {
                world.run(Hook::Egress, &init_ack(&cast, told));
                world.translate(Hook::Egress, &Packet::sctp(cast.backend, cast.client, COOKIE_ACK, OPENERS_TAG));
            }
            for tag in [ANSWERERS_TAG ^ 1, ANSWERERS_TAG + 1, ANSWERERS_TAG - 1, 0, OPENERS_TAG, u32::MAX] {
                world.translate(Hook::Ingress, &echo(tag));
                world.translate(Hook::Ingress, &Packet::sctp(cast.client, cast.vip, DATA, tag));
            }
            assert_eq!(established(&world), 0);
        }
        world.translate(Hook::Ingress, &echo(ANSWERERS_TAG));
        let rows = world.rows();
        assert_eq!((established(&world), rows.len()), (2, 2));
        assert!(rows.iter().all(|row| row.proto == SCTP && row.state & !state::SEEN == 0), "{rows:#?}");
        world.remove(|_| true);

        // Each INIT is answered under a tag of its own: the last two count.
        let tags = [7, 0x8000_0000, u32::MAX];
        for (used, establishes) in [(7, 0), (0x8000_0000, 2), (u32::MAX, 2)] {
            for told in tags {
                world.translate(Hook::Ingress, &Packet::opening(SCTP, cast.client, cast.vip));
                world.run(Hook::Egress, &init_ack(&cast, told));
            }
            world.translate(Hook::Ingress, &echo(used));
            assert_eq!(established(&world), establishes, "{used:x}");
            world.remove(|_| true);
        }
        // Refused: there is no tag to know.
        world.translate(Hook::Ingress, &Packet::opening(SCTP, cast.client, cast.vip));
        world.translate(Hook::Egress, &Packet::sctp(cast.backend, cast.client, ABORT, OPENERS_TAG));
        world.translate(Hook::Ingress, &echo(ANSWERERS_TAG));
        assert_eq!(established(&world), 0);
        world.remove(|_| true);
    }
    assert_eq!(world.reasons(), []);
}

const THERE: Hook = Hook::Ingress;
const BACK: Hook = Hook::Egress;

type Chunks = &'static [(Hook, u8)];

#[test]
fn a_live_association_keeps_its_backend_and_an_ended_one_does_not() {
    let Some(mut world) = world("a_live_association_keeps_its_backend_and_an_ended_one_does_not", Options::default())
    else {
        return;
    };
    // Times are those of the kernel's conntrack: 210 s, and 3 s in shutdown.
    let ends: [(Chunks, u32, bool); 17] = [
        (&[], 0, false),
        (&[(THERE, DATA), (BACK, SACK), (THERE, HEARTBEAT), (BACK, 5), (THERE, 9), (BACK, 130)], 0, false),
        (&[(THERE, SHUTDOWN)], 0, false),
        (&[(BACK, SHUTDOWN)], 0, false),
        (&[(THERE, SHUTDOWN), (BACK, SHUTDOWN_ACK)], 0, true),
        (&[(BACK, SHUTDOWN), (THERE, SHUTDOWN_ACK), (BACK, SHUTDOWN_COMPLETE)], 0, true),
        (&[(THERE, SHUTDOWN_COMPLETE)], 0, true),
        (&[(THERE, ABORT)], 0, true),
        (&[(BACK, ABORT)], 0, true),
        (&[], 208, false),
        (&[], 212, true),
        (&[(THERE, DATA), (BACK, SACK), (THERE, HEARTBEAT)], 208, false),
        (&[(THERE, DATA), (BACK, SACK), (THERE, HEARTBEAT)], 212, true),
        (&[(THERE, SHUTDOWN)], 2, false),
        (&[(THERE, SHUTDOWN)], 5, true),
        (&[(BACK, SHUTDOWN)], 2, false),
        (&[(BACK, SHUTDOWN)], 5, true),
    ];
    for cast in casts() {
        for (chunks, idle, over) in ends {
            world.service(1, cast.vip, &[cast.backend]);
            world.establish(SCTP, cast.client, cast.vip);
            world.service(1, cast.vip, &[cast.backend2]);
            for (hook, chunk) in chunks {
                // What comes after the end still gets where the rest went.
                let packet = if *hook == THERE {
                    Packet::sctp(cast.client, cast.vip, *chunk, ANSWERERS_TAG)
                } else {
                    Packet::sctp(cast.backend, cast.client, *chunk, OPENERS_TAG)
                };
                let out = if *hook == THERE { packet.to(cast.backend) } else { packet.from(cast.vip) };
                world.expect(*hook, &packet, &out);
            }
            world.age(idle);
            let (_, to) = world.translate(THERE, &Packet::opening(SCTP, cast.client, cast.vip));
            assert_eq!(to, if over { cast.backend2 } else { cast.backend }, "{chunks:?} {idle}");
            assert_eq!(world.rows().len(), 2);
            world.remove(|_| true);
        }
        // Nobody answered: one INIT that is sent again may still get there, the next is another choice.
        for (idle, to) in [(2, cast.backend), (5, cast.backend2)] {
            world.service(1, cast.vip, &[cast.backend]);
            let open = Packet::opening(SCTP, cast.client, cast.vip);
            world.translate(THERE, &open);
            world.service(1, cast.vip, &[cast.backend2]);
            world.age(idle);
            assert_eq!(world.translate(THERE, &open).1, to);
            world.remove(|_| true);
        }
        // Who is slow to shut down, or to answer the INIT ACK, is not cut off by that.
        world.service(1, cast.vip, &[cast.backend]);
        world.establish(SCTP, cast.client, cast.vip);
        let shutdown = Packet::sctp(cast.client, cast.vip, SHUTDOWN, ANSWERERS_TAG);
        world.expect(THERE, &shutdown, &shutdown.to(cast.backend));
        world.age(100);
        let ack = Packet::sctp(cast.backend, cast.client, SHUTDOWN_ACK, OPENERS_TAG);
        world.expect(BACK, &ack, &ack.from(cast.vip));
        let complete = Packet::sctp(cast.client, cast.vip, SHUTDOWN_COMPLETE, ANSWERERS_TAG);
        world.expect(THERE, &complete, &complete.to(cast.backend));
        world.remove(|_| true);
        world.translate(THERE, &Packet::opening(SCTP, cast.client, cast.vip));
        world.run(BACK, &init_ack(&cast, ANSWERERS_TAG));
        world.age(100);
        let echo = Packet::sctp(cast.client, cast.vip, COOKIE_ECHO, ANSWERERS_TAG);
        world.expect(THERE, &echo, &echo.to(cast.backend));
        world.remove(|_| true);
    }
}

#[test]
fn what_opens_no_association_is_left_alone() {
    let Some(mut world) = world("what_opens_no_association_is_left_alone", Options::default()) else { return };
    let mut left = 0;
    for cast in casts() {
        world.service(1, cast.vip, &[cast.backend]);
        world.datapath.guard(cast.vip.ip(), 1);
        for (chunk, tag) in (0..=255).filter(|chunk| *chunk != INIT).map(|chunk| (chunk, 0)).chain([(INIT, 1)]) {
            world.untouched(Hook::Ingress, &Packet::sctp(cast.client, cast.vip, chunk, tag).frame());
            world.untouched(Hook::Ingress, &Packet::sctp(cast.client, cast.backend, chunk, tag).frame());
            left += 1;
        }
        // No chunk at all.
        let empty = Packet::sctp(cast.client, cast.vip, INIT, 0).frame();
        world.untouched(Hook::Ingress, &empty[..payload_at(&empty) + 12]);
        assert_eq!(world.rows(), []);
    }
    assert_eq!(world.reasons(), [(Reason::Unparsed.name(), 2), (Reason::NotASyn.name(), left)]);
}

/// Ports change, by DNAT, by masquerade and by collision, in packets of any length: the checksum is that of the whole packet.
#[test]
fn the_checksum_is_right_for_any_length() {
    let Some(mut world) = world("the_checksum_is_right_for_any_length", Options::default()) else { return };
    for cast in casts() {
        world.service(1, cast.vip, &[cast.backend]);
        world.service(2, cast.vip2, &[cast.backend]);
        world.device(role::POD);
        let client = at(cast.client, 40_002);
        world.establish(SCTP, client, cast.vip);
        let (moved, _) = world.translate(Hook::Ingress, &Packet::opening(SCTP, client, cast.vip2));
        assert_ne!(moved.port(), client.port());
        let seen = masquerade(&mut world, SCTP, cast.client, cast.vip, cast.node);
        assert_ne!(seen.port(), cast.client.port());
        let long: Vec<u8> = (0..8000_u32).map(|n| ((n * 7) >> 2) as u8).collect();
        for len in (0..140).chain([511, 512, 1023, 1024, 1025, 1400, 1452, 2047, 2048, 3400]) {
            let data = |from, to| Packet::sctp(from, to, DATA, ANSWERERS_TAG).with_payload(&long[..len]);
            let ahead = data(client, cast.vip2);
            world.expect(Hook::Ingress, &ahead, &ahead.between(moved, cast.backend));
            let back = data(cast.backend, moved);
            world.expect(Hook::Egress, &back, &back.between(cast.vip2, client));
            let ahead = data(cast.client, cast.vip);
            world.expect(Hook::Ingress, &ahead, &ahead.to(cast.backend));
            world.expect(Hook::Egress, &ahead.to(cast.backend), &ahead.between(seen, cast.backend));
            masqueraded_answer(&mut world, &data(cast.backend, seen), cast.client, cast.vip);
            // Padded to the least Ethernet frame, as SHUTDOWN COMPLETE is: what the IP header counts, counts.
            let mut short = data(client, cast.vip2).frame();
            let mut out = data(moved, cast.backend).frame();
            short.extend([0xee; 10]);
            out.extend([0xee; 10]);
            assert_eq!(hex(&world.run(Hook::Ingress, &short).1), hex(&out));
        }
        // Behind options and extension headers.
        let mut ahead = Packet::sctp(client, cast.vip, DATA, ANSWERERS_TAG).with_payload(&long[..333]);
        ahead.options = vec![1; 12];
        ahead.extensions = vec![(0, vec![0, 0, 1, 4, 0, 0, 0, 0]), (60, vec![0, 0, 1, 4, 0, 0, 0, 0])];
        world.expect(Hook::Ingress, &ahead, &ahead.to(cast.backend));
        if cast.v6 {
            world.expect_frame(Hook::Ingress, &ahead.atomic_fragment(), &ahead.to(cast.backend).atomic_fragment());
        }
    }
}

/// A zero is not a sum but the sender's leaving it to the device, which sums up over that zero.
#[test]
fn a_checksum_left_to_the_device_stays_zero() {
    let Some(mut world) = world("a_checksum_left_to_the_device_stays_zero", Options::default()) else { return };
    let unfinished = |packet: &Packet| {
        let mut frame = packet.frame();
        let at = payload_at(&frame) + 8;
        frame[at..at + 4].fill(0);
        frame
    };
    for cast in casts() {
        world.service(1, cast.vip, &[cast.backend]);
        let seen = masquerade(&mut world, SCTP, cast.client, cast.vip, cast.node);
        let there = Packet::sctp(cast.client, cast.vip, DATA, ANSWERERS_TAG).with_payload(&[0x5a; 99]);
        let back = there.between(cast.backend, seen);
        for (hook, from, to) in [
            (Hook::Ingress, there.clone(), there.to(cast.backend)),
            (Hook::Egress, there.to(cast.backend), there.between(seen, cast.backend)),
            (Hook::Ingress, back.clone(), back.to(cast.client)),
            (Hook::Egress, back.to(cast.client), back.between(cast.vip, cast.client)),
        ] {
            let (verdict, out) = world.run(hook, &unfinished(&from));
            assert_eq!((verdict, hex(&out)), (NEXT, hex(&unfinished(&to))));
            // As skb_crc32c_csum_help() does.
            let (mut finished, at) = (out.clone(), payload_at(&out));
            let sum = super::packet::crc32c(&out[at..]);
            finished[at + 8..at + 12].copy_from_slice(&sum.to_le_bytes());
            assert_eq!(sums(&finished), Sums::Right);
        }
        // Refused, it is quoted as far as the kernel must have it.
        world.service(2, cast.vip2, &[]);
        let (verdict, out) = world.run(Hook::Ingress, &unfinished(&Packet::opening(SCTP, cast.client, cast.vip2)));
        assert_eq!((verdict, sums(&out)), (super::world::BOUNCE, Sums::Right));
        assert_eq!(out.len(), payload_at(&out) + 8 + if cast.v6 { 40 } else { 20 } + 20);
    }
}

/// Damaged on its way here: translating it must not make it whole.
#[test]
fn a_wrong_checksum_stays_wrong() {
    let Some(mut world) = world("a_wrong_checksum_stays_wrong", Options::default()) else { return };
    let mut dice = Dice::new();
    for cast in casts() {
        world.service(1, cast.vip, &[cast.backend]);
        world.establish(SCTP, cast.client, cast.vip);
        for _ in 0..500 {
            let data = Packet::sctp(cast.client, cast.vip, DATA, ANSWERERS_TAG).with_payload(&[0x33; 50]);
            let mut frame = data.frame();
            let start = payload_at(&frame);
            let (byte, bit) = (start + 4 + dice.below(frame.len() - start - 4), dice.below(8));
            frame[byte] ^= 1 << bit;
            let mut expected = data.to(cast.backend).frame();
            expected[byte] ^= 1 << bit;
            let (verdict, out) = world.run(Hook::Ingress, &frame);
            assert_eq!((verdict, hex(&out)), (NEXT, hex(&expected)));
            assert_eq!(sums(&out), Sums::WrongTransport);
        }
    }
}

/// The checksum is over all fragments and the first does not know how long they are: another port cannot be worked in. Where the
/// ports stay, all pass.
#[test]
fn fragments_pass_if_their_ports_stay() {
    let Some(mut world) = world("fragments_pass_if_their_ports_stay", Options::default()) else { return };
    let mut failed = 0;
    for cast in casts() {
        let same = at(cast.backend, cast.vip.port());
        world.service(1, cast.vip, &[same]);
        world.service(2, cast.vip2, &[cast.backend]);
        let data = |from, to| Packet::sctp(from, to, DATA, ANSWERERS_TAG).with_payload(&[0x5a; 3000]);
        world.establish(SCTP, cast.client, cast.vip);
        let (there, back) = (data(cast.client, cast.vip), data(same, cast.client));
        for (hook, from, to) in [(Hook::Ingress, &there, there.to(same)), (Hook::Egress, &back, back.from(cast.vip))] {
            for (a, b) in [(0, 1480), (1480, 2960), (2960, from.transport().len())] {
                let (verdict, out) = world.run(hook, &from.fragment(a, b));
                assert_eq!((verdict, hex(&out)), (NEXT, hex(&to.fragment(a, b))));
            }
        }
        world.establish(SCTP, cast.client, cast.vip2);
        let changed = data(cast.client, cast.vip2);
        assert_eq!(world.run(Hook::Ingress, &changed.fragment(0, 1480)).0, DROP);
        failed += 1;
        assert_eq!(world.reasons(), [(Reason::RewriteFailed.name(), failed)]);
        // Unless nobody has summed it up yet.
        let mut frame = changed.fragment(0, 1480);
        let mut out = changed.to(cast.backend).fragment(0, 1480);
        let sum = if cast.v6 { 14 + 48 + 8 } else { 14 + 20 + 8 };
        frame[sum..sum + 4].fill(0);
        out[sum..sum + 4].fill(0);
        assert_eq!(hex(&world.run(Hook::Ingress, &frame).1), hex(&out));
    }
}

/// Hundreds of flows, random ends, lengths and directions, each packet checked to the byte.
#[test]
fn random_packets_keep_their_sums() {
    let Some(mut world) = world("random_packets_keep_their_sums", Options::default()) else { return };
    let mut dice = Dice::new();
    for cast in casts() {
        for _ in 0..800 {
            let (vip, backend) =
                (at(cast.vip, 1 + dice.below(65_535) as u16), at(cast.backend, 1 + dice.below(65_535) as u16));
            let client = at(cast.client, 1 + dice.below(65_535) as u16);
            let spec = Spec { verdicts: usual(), ..Spec::pick_all(1, &[backend]) };
            world.datapath.frontend(vip, SCTP, &spec);
            let payload: Vec<u8> = (0..dice.below(300)).map(|_| dice.next() as u8).collect();
            let open = Packet::opening(SCTP, client, vip).with_payload(&payload);
            world.expect(Hook::Ingress, &open, &open.to(backend));
            let answer = Packet::answer(SCTP, backend, client).with_payload(&payload);
            world.expect(Hook::Egress, &answer, &answer.from(vip));
            world.remove(|_| true);
        }
    }
    assert_eq!(world.reasons(), []);
}

/// An association's packets and TCP's of the same ends are two flows.
#[test]
fn protocols_do_not_mix() {
    let Some(mut world) = world("protocols_do_not_mix", Options::default()) else { return };
    for cast in casts() {
        let spec = |backend| Spec { verdicts: usual(), ..Spec::pick_all(1, &[backend]) };
        world.datapath.frontend(cast.vip, SCTP, &spec(cast.backend));
        world.datapath.frontend(cast.vip, super::world::TCP, &spec(cast.backend2));
        world.establish(SCTP, cast.client, cast.vip);
        world.establish(super::world::TCP, cast.client, cast.vip);
        let abort = Packet::abort(SCTP, cast.client, cast.vip);
        world.expect(Hook::Ingress, &abort, &abort.to(cast.backend));
        let ack = Packet::more(super::world::TCP, cast.client, cast.vip);
        world.expect(Hook::Ingress, &ack, &ack.to(cast.backend2));
        let (_, out) = world.run(Hook::Egress, &Packet::more(SCTP, cast.backend2, cast.client).frame());
        assert_eq!(ends(&out).0, cast.backend2, "nobody's");
        assert_eq!(world.rows().len(), 4);
        world.remove(|_| true);
    }
}
