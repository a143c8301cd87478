//! What is ended, and what nothing ends: resets for deleted backends, floods, full tables.

use std::{net::SocketAddr, time::Instant};

use proxy_agent::dataplane::ebpf::{Sweep, Swept, Timeouts};
use proxy_common::{connection::flags, counters::Reason, device::role};

use super::{
    flows::{masquerade, masqueraded_answer},
    packet::{ACK, FIN, Packet, RST, SYN, Sums, ends, payload_at, sums},
    world::{BOUNCE, Cast, DROP, Hook, NEXT, Options, Row, SCTP, TCP, UDP, World, at, casts, hex, world},
};

/// A pseudo-random number, the same ones in every run.
fn next(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

/// The agent has marked the flow: the client hears of it with its next packet, and again if that was lost; a SYN is chosen for anew.
#[test]
fn a_marked_flow_is_reset() {
    let Some(mut world) = world("a_marked_flow_is_reset", Options::default()) else { return };
    for cast in casts() {
        world.service(1, cast.vip, &[cast.backend]);
        world.establish(TCP, cast.client, cast.vip);
        world.service(1, cast.vip, &[cast.backend2]);
        world.mark(flags::RESET);
        let acknowledged = [1, 2, 3, 4];
        for payload in [b"".as_slice(), b"anybody there?", &[7; 1200]] {
            let mut packet = Packet::tcp(cast.client, cast.vip, ACK).with_payload(payload).frame();
            let tcp = payload_at(&packet);
            packet[tcp + 8..tcp + 12].copy_from_slice(&acknowledged);
            let (verdict, out) = world.run(Hook::Ingress, &packet);
            assert_eq!(verdict, BOUNCE);
            assert_eq!((out.len(), ends(&out), sums(&out)), (tcp + 20, (cast.vip, cast.client), Sums::Right));
            assert_eq!((&out[tcp + 4..tcp + 8], out[tcp + 13]), (acknowledged.as_slice(), RST));
            assert_eq!((&out[..6], &out[6..12]), (&packet[6..12], &packet[..6]));
        }
        // A backend that is there still, in no Service: it must hear that its client is gone, which it cannot know from us.
        let answer = Packet::tcp(cast.backend, cast.client, ACK);
        world.expect(Hook::Egress, &answer, &answer.from(cast.vip));
        for flags in [RST, RST | ACK] {
            let over = Packet::tcp(cast.client, cast.vip, flags);
            world.expect(Hook::Ingress, &over, &over.to(cast.backend));
        }
        // What cannot be answered: it acknowledges nothing, or is a piece.
        let failed = world.reason(Reason::RejectFailed);
        let bare = Packet::tcp(cast.client, cast.vip, 0);
        let big = Packet::tcp(cast.client, cast.vip, ACK).with_payload(&[7; 2000]);
        world.translate(Hook::Egress, &answer);
        for (n, frame) in [bare.frame(), big.fragment(0, 1480)].into_iter().enumerate() {
            assert_eq!(world.run(Hook::Ingress, &frame).0, [DROP, BOUNCE][n]);
        }
        assert_eq!(world.run(Hook::Ingress, &big.fragment(1480, 2020)).0, DROP);
        assert_eq!(world.reason(Reason::RejectFailed), failed + 2);
        assert_eq!(world.translate(Hook::Ingress, &Packet::tcp(cast.client, cast.vip, SYN)).1, cast.backend2);
        world.remove(|_| true);
    }
}

/// Whatever stands between the headers: it is cut out, the reset has none.
#[test]
fn a_marked_flow_with_options_is_reset() {
    let Some(mut world) = world("a_marked_flow_with_options_is_reset", Options::default()) else { return };
    for cast in casts() {
        world.service(1, cast.vip, &[cast.backend]);
        world.establish(TCP, cast.client, cast.vip);
        world.mark(flags::RESET);
        let plain = Packet::tcp(cast.client, cast.vip, ACK);
        let (verdict, expected) = world.run(Hook::Ingress, &plain.frame());
        assert_eq!(verdict, BOUNCE);
        for words in 1..=5 {
            for payload in [b"".as_slice(), &[7; 1200]] {
                let mut packet = plain.clone().with_payload(payload);
                if cast.v6 {
                    packet.extensions = (0..words).map(|_| (60, vec![0, 0, 1, 4, 0, 0, 0, 0])).collect();
                } else {
                    packet.options = vec![1; words * 4];
                }
                let (verdict, out) = world.run(Hook::Ingress, &packet.frame());
                assert_eq!((verdict, hex(&out)), (BOUNCE, hex(&expected)), "{words}");
            }
        }
        world.remove(|_| true);
    }
    assert_eq!(world.reason(Reason::RejectFailed), 0);
}

/// Contract F46: a million SYNs from everywhere. Whoever talks meanwhile talks on, and opens new connections.
#[test]
fn a_million_syns_cut_nobody() {
    let options = Options { half_open: 65_536, established: 4_096, ..Options::default() };
    let Some(mut world) = world("a_million_syns_cut_nobody", options) else { return };
    for cast in casts() {
        // Half of those who talk do so to the Service that is flooded.
        world.service(1, cast.vip, &[cast.backend]);
        world.service(2, cast.vip2, &[cast.backend2]);
        let clients: Vec<SocketAddr> = (1..=100).map(|n| at(cast.client, 50_000 + n)).collect();
        let ends = |client: &SocketAddr| {
            let proto = if client.port().is_multiple_of(2) { TCP } else { UDP };
            let (vip, backend) =
                if client.port() % 4 < 2 { (cast.vip, cast.backend) } else { (cast.vip2, cast.backend2) };
            (proto, vip, backend)
        };
        for client in &clients {
            let (proto, vip, backend) = ends(client);
            assert_eq!(world.establish(proto, *client, vip), backend);
        }
        let mut frame = Packet::tcp(cast.client, cast.vip, SYN).frame();
        let (last, port) = (if cast.v6 { 14 + 23 } else { 14 + 15 }, payload_at(&frame));
        let (mut dice, started) = (0x2545_f491_4f6c_dd1d, Instant::now());
        for n in 0..1_000_000_u32 {
            // The low three bytes of the address, and a port that no client has.
            let random = next(&mut dice).to_be_bytes();
            frame[last - 2..=last].copy_from_slice(&random[..3]);
            frame[port..port + 2]
                .copy_from_slice(&(1024 + u16::from_be_bytes([random[3], random[4]]) % 40_000).to_be_bytes());
            let (verdict, _) = world.run(Hook::Ingress, &frame);
            assert_eq!(verdict, NEXT);
            if n % 100_000 == 99_999 {
                for client in &clients {
                    let (proto, vip, backend) = ends(client);
                    let more = Packet::more(proto, *client, vip);
                    world.expect(Hook::Ingress, &more, &more.to(backend));
                    let answer = more.between(backend, *client);
                    world.expect(Hook::Egress, &answer, &answer.from(vip));
                }
                let fresh = at(cast.client, 45_000 + (n / 100_000) as u16);
                assert_eq!(world.establish(TCP, fresh, cast.vip), cast.backend);
                let fresh = at(cast.client, 46_000 + (n / 100_000) as u16);
                assert_eq!(world.establish(TCP, fresh, cast.vip2), cast.backend2);
            }
        }
        println!(
            "a million SYNs in {:?}, {:?} each with the call around it",
            started.elapsed(),
            started.elapsed() / 1_000_000
        );
        let half_open = world.rows().iter().filter(|row| !row.established).count();
        assert!((10_000..=65_536).contains(&half_open), "{half_open}");
        world.remove(|_| true);
    }
    assert_eq!(world.reason(Reason::InsertFailed), 0);
}

/// Contract F24: ten times as many connections as the table holds are established and stay open, and whoever says something while half a
/// table's worth of others come up keeps its backend, which is not even chosen any more.
#[test]
fn a_full_table_cuts_nobody_who_talks() {
    const ENTRIES: u32 = 4_096;
    let options = Options { established: ENTRIES, ..Options::default() };
    let Some(mut world) = world("a_full_table_cuts_nobody_who_talks", options) else { return };
    for cast in casts() {
        world.service(1, cast.vip, &[cast.backend]);
        let clients: Vec<SocketAddr> = (1..=50).map(|n| at(cast.client, 60_000 + n)).collect();
        for client in &clients {
            world.establish(TCP, *client, cast.vip);
        }
        world.service(1, cast.vip, &[cast.backend2]);
        for n in 0..10 * ENTRIES / 2 {
            let client = at(cast.client, (2_000 + n) as u16);
            world.establish(TCP, client, cast.vip);
            if n % (ENTRIES / 4) == 0 {
                for client in &clients {
                    let more = Packet::tcp(*client, cast.vip, ACK);
                    world.expect(Hook::Ingress, &more, &more.to(cast.backend));
                    let answer = more.between(cast.backend, *client);
                    world.expect(Hook::Egress, &answer, &answer.from(cast.vip));
                }
            }
        }
        let established = world.rows().iter().filter(|row| row.established).count() as u32;
        assert!((ENTRIES / 2..=ENTRIES).contains(&established), "{established}: the table was full");
        world.remove(|_| true);
    }
}

/// Where there is no room no flow comes in, and none that is open goes. Without an agent that says so it is the table that makes room.
#[test]
fn without_room_no_flow_is_opened() {
    let Some(mut world) = world("without_room_no_flow_is_opened", Options::default()) else { return };
    for cast in casts() {
        for proto in [TCP, SCTP] {
            world.service(1, cast.vip, &[cast.backend]);
            let client = |n: u16| at(cast.client, 40_000 + n);
            world.spare(20, 0, u64::MAX);
            for n in 0..10 {
                world.establish(proto, client(n), cast.vip);
            }
            let full = world.reason(Reason::TableFull);
            let opening = Packet::opening(proto, client(10), cast.vip);
            assert_eq!(world.run(Hook::Ingress, &opening.frame()).0, DROP);
            assert_eq!(world.reason(Reason::TableFull), full + 1);
            assert_eq!(world.rows().len(), 20);
            for n in 0..10 {
                let more = Packet::more(proto, client(n), cast.vip);
                world.expect(Hook::Ingress, &more, &more.to(cast.backend));
            }
            // Datagrams have a table of their own, where what was answered once may go.
            world.establish(UDP, client(10), cast.vip);
            // What nobody has said for long holds no more.
            world.spare(0, 0, 0);
            world.establish(proto, client(10), cast.vip);
            assert_eq!(world.reason(Reason::TableFull), full + 1);
            world.remove(|_| true);
        }
    }
}

/// A connection that was opened while there was room, and answered when there was none, goes on, and comes in once there is some, whatever it acknowledges by
/// then; with a reserve at once.
#[test]
fn what_was_opened_with_room_comes_in_later() {
    let Some(mut world) = world("what_was_opened_with_room_comes_in_later", Options::default()) else { return };
    for cast in casts() {
        world.service(1, cast.vip, &[cast.backend]);
        let open = |world: &mut World, client| {
            world.spare(1, 0, u64::MAX);
            let opening = Packet::tcp(client, cast.vip, SYN);
            world.expect(Hook::Ingress, &opening, &opening.to(cast.backend));
            let answer = Packet::answer(TCP, cast.backend, client);
            world.expect(Hook::Egress, &answer, &answer.from(cast.vip));
        };
        let established = |world: &World| world.rows().iter().filter(|row| row.established).count();
        let client = at(cast.client, 40_000);
        let more = Packet::more(TCP, client, cast.vip);
        let mut far = more.frame();
        let number = payload_at(&far) + 8;
        let acknowledged = u32::from_be_bytes(far[number..number + 4].try_into().unwrap());
        far[number..number + 4].copy_from_slice(&acknowledged.wrapping_add(5 << 20).to_be_bytes());
        open(&mut world, client);
        // Nobody says that there is room, but for a second: who acknowledges anything is not confirmed by that.
        assert_eq!((world.run(Hook::Ingress, &far).0, established(&world)), (NEXT, 0));
        world.spare(0, 0, u64::MAX);
        world.expect(Hook::Ingress, &more, &more.to(cast.backend));
        assert_eq!((world.rows().len(), established(&world)), (2, 0));
        world.spare(1, 0, u64::MAX);
        assert_eq!((world.run(Hook::Ingress, &far).0, established(&world)), (NEXT, 2));
        world.remove(|_| true);

        open(&mut world, client);
        world.spare(0, 1, u64::MAX);
        world.expect(Hook::Ingress, &more, &more.to(cast.backend));
        assert_eq!(established(&world), 2);
        world.spare(0, 0, 0);
        world.remove(|_| true);
    }
}

/// Contract F24: as many flows as the table holds, and then twice as many that want to come in. Not one of the former loses an entry, though it says
/// nothing; the others are dropped, until some of the former are over.
#[test]
fn a_full_table_cuts_nobody_where_an_agent_looks() {
    const ENTRIES: u32 = 4_096;
    let options = Options { established: ENTRIES, ..Options::default() };
    let Some(mut world) = world("a_full_table_cuts_nobody_where_an_agent_looks", options) else { return };
    for cast in casts() {
        world.service(1, cast.vip, &[cast.backend]);
        let mut sweep = Sweep::new(Timeouts::default());
        let full = world.reason(Reason::TableFull);
        let (mut open, mut dropped) = (Vec::new(), 0);
        for n in 0..3 * ENTRIES / 2 {
            // Every second, at some hundred new connections in each.
            if n % 128 == 0 {
                let _ = world.sweep(&mut sweep);
            }
            let client = at(cast.client, (2_000 + n) as u16);
            if world.run(Hook::Ingress, &Packet::opening(TCP, client, cast.vip).frame()).0 == DROP {
                dropped += 1;
            } else {
                open.push(client);
                world.establish(TCP, client, cast.vip);
            }
        }
        assert_eq!(world.reason(Reason::TableFull) - full, dropped);
        // What the CPUs may keep to themselves is the least that the agent keeps back.
        let room = (ENTRIES / 2) as usize;
        assert!((room / 2..=room).contains(&open.len()), "{} open", open.len());
        assert_eq!(world.rows().len(), 2 * open.len());

        world.service(1, cast.vip, &[cast.backend2]);
        let (over, rest) = open.split_at(500);
        for client in over {
            for (flags, hook) in [(FIN | ACK, Hook::Ingress), (FIN | ACK, Hook::Egress)] {
                let packet = Packet::tcp(*client, cast.vip, flags);
                match hook {
                    Hook::Ingress => world.expect(hook, &packet, &packet.to(cast.backend)),
                    Hook::Egress => {
                        let answer = Packet::tcp(cast.backend, *client, flags);
                        world.expect(hook, &answer, &answer.from(cast.vip));
                    }
                }
            }
        }
        let Swept { pairs, .. } = world.sweep(&mut sweep);
        assert!(pairs > 0, "what is over makes room, though nothing came in");
        assert_eq!(world.establish(TCP, at(cast.client, 60_000), cast.vip), cast.backend2);
        for client in rest {
            let more = Packet::tcp(*client, cast.vip, ACK);
            world.expect(Hook::Ingress, &more, &more.to(cast.backend));
        }
        println!("{} open, {dropped} dropped; {pairs} taken out", open.len());
        world.spare(0, 0, 0);
        world.remove(|_| true);
    }
}

/// A connection's two ends, and as whom its backend sees the client: as the node, where it is masqueraded.
#[derive(Clone, Copy)]
struct Ends {
    client: SocketAddr,
    vip: SocketAddr,
    backend: SocketAddr,
    seen: SocketAddr,
}

impl Ends {
    /// `backend`: the one that there is.
    fn open(world: &mut World, cast: Cast, client: SocketAddr, backend: SocketAddr, is_outside: bool) -> Self {
        let Cast { vip, node, .. } = cast;
        let seen = if is_outside {
            masquerade(world, TCP, client, vip, node)
        } else {
            world.device(role::POD);
            world.establish(TCP, client, vip);
            client
        };
        Self { client, vip, backend, seen }
    }

    /// A packet of the client's and one of the backend's, each through all hooks, as if the flow had its entries.
    #[track_caller]
    fn say(&self, world: &mut World, flags: u8, is_clients: bool) {
        let Self { client, vip, backend, seen } = *self;
        let is_masqueraded = client != seen;
        if is_clients {
            let packet = Packet::tcp(client, vip, flags);
            world.expect(Hook::Ingress, &packet, &packet.to(backend));
            if is_masqueraded {
                world.expect(Hook::Egress, &packet.to(backend), &packet.between(seen, backend));
            }
            return;
        }
        let answer = Packet::tcp(backend, seen, flags);
        if is_masqueraded {
            masqueraded_answer(world, &answer, client, vip);
        } else {
            world.expect(Hook::Egress, &answer, &answer.from(vip));
        }
    }

    /// In one of the ways in which connections end.
    fn close(&self, world: &mut World, n: u32) {
        let close: &[(u8, bool)] = match n % 4 {
            0 => &[(RST | ACK, true)],
            1 => &[(FIN | ACK, false), (RST, false)],
            _ => &[(FIN | ACK, true), (FIN | ACK, false), (ACK, true)],
        };
        close.iter().for_each(|(flags, is_clients)| self.say(world, *flags, *is_clients));
    }
}

/// Contract F24: ten tables' worth of others come, and go, and 50 connections that say nothing all the while keep their backend, which is not even
/// chosen any more. None loses so much as one half.
#[test]
fn a_table_full_of_what_is_over_cuts_nobody_who_is_silent() {
    const ENTRIES: u32 = 4_096;
    let options = Options { established: ENTRIES, ..Options::default() };
    let Some(mut world) = world("a_table_full_of_what_is_over_cuts_nobody_who_is_silent", options) else { return };
    for cast in casts() {
        world.service(1, cast.vip, &[cast.backend]);
        let silent: Vec<Ends> = (1..=50)
            .map(|n| Ends::open(&mut world, cast, at(cast.client, 60_000 + n), cast.backend, n % 2 == 0))
            .collect();
        world.service(1, cast.vip, &[cast.backend2]);
        let (repaired, lost) = (world.reason(Reason::PairRepaired), world.reason(Reason::NotASyn));
        let (mut sweep, mut swept) = (Sweep::new(Timeouts::default()), Swept::default());
        let (mut entries, mut n) = (0, 0);
        while entries < 10 * ENTRIES {
            let is_outside = n % 8 == 0;
            let client = at(cast.client, (2_000 + n) as u16);
            Ends::open(&mut world, cast, client, cast.backend2, is_outside).close(&mut world, n);
            entries += if is_outside { 4 } else { 2 };
            n += 1;
            // Every second, at some hundred new connections in each.
            if n % 128 == 0 {
                let Swept { pairs, walks, crowded } = world.sweep(&mut sweep);
                (swept.pairs, swept.walks) = (swept.pairs + pairs, swept.walks + walks);
                assert_eq!(crowded, 0);
            }
        }
        for ends in &silent {
            ends.say(&mut world, ACK, true);
            ends.say(&mut world, ACK, false);
        }
        assert_eq!((world.reason(Reason::PairRepaired), world.reason(Reason::NotASyn)), (repaired, lost));
        // Not at every look, and no more than it takes.
        println!("{n} connections, {swept:?}, {} entries left", world.rows().len());
        assert!((10..=60).contains(&swept.walks), "{swept:?}");
        let left = world.rows().iter().filter(|row| row.established).count() as u32;
        assert!((ENTRIES / 4..ENTRIES).contains(&left), "{left}");
        world.remove(|_| true);
    }
}

/// A sweep that takes out some of the flows takes what masquerades them along: who asks their backends straight, from the same ports, keeps its
/// address. (Policies would judge the node's.)
#[test]
fn what_masquerades_a_flow_goes_with_it() {
    let options = Options { established: 4_096, ..Options::default() };
    let Some(mut world) = world("what_masquerades_a_flow_goes_with_it", options) else { return };
    for cast in casts() {
        world.service(1, cast.vip, &[cast.backend]);
        let clients: Vec<SocketAddr> = (0..600).map(|n| at(cast.client, 20_000 + n)).collect();
        for client in &clients {
            Ends::open(&mut world, cast, *client, cast.backend, true).close(&mut world, 0);
        }
        assert_eq!(world.rows().len(), 2_400, "nothing was evicted");
        // Their main pairs have been silent for longer, so they come first, and after some of them there is room enough.
        let main = |row: &Row| !row.is(flags::MASQUERADE);
        world.edit(main, Some(&|notes| *notes.seen = notes.seen.wrapping_sub(5)));
        let Swept { pairs, walks, .. } = world.sweep(&mut Sweep::new(Timeouts::default()));
        let left = world.rows().iter().filter(|row| main(row)).count();
        assert!(walks > 0 && pairs > 0 && (1..1_200).contains(&left), "{pairs} pairs went, {left} halves are left");
        for client in &clients {
            let direct = Packet::tcp(*client, cast.backend, SYN);
            world.untouched(Hook::Ingress, &direct.frame());
            world.untouched(Hook::Egress, &direct.frame());
        }
        assert_eq!(world.rows(), []);
    }
}

/// `--conntrack-tcp-timeout-close-wait`: an hour, not the day of a connection that nobody closed.
#[test]
fn a_connection_that_one_side_closed_is_over_sooner() {
    let Some(mut world) = world("a_connection_that_one_side_closed_is_over_sooner", Options::default()) else { return };
    for cast in casts() {
        let fin = Packet::tcp(cast.client, cast.vip, FIN | ACK);
        let answer = fin.between(cast.backend, cast.client);
        for (hook, packet) in [(Hook::Ingress, &fin), (Hook::Egress, &answer)] {
            for (idle, to) in [(3_590, cast.backend), (3_602, cast.backend2)] {
                world.service(1, cast.vip, &[cast.backend]);
                world.establish(TCP, cast.client, cast.vip);
                world.translate(hook, packet);
                world.service(1, cast.vip, &[cast.backend2]);
                world.age(idle);
                let syn = Packet::tcp(cast.client, cast.vip, SYN);
                assert_eq!(world.translate(Hook::Ingress, &syn).1, to, "{hook:?} {idle}");
                world.remove(|_| true);
            }
        }
    }
}

/// A reset that its receiver ignores, for its number, ends no flow here: who it claims to be from goes on (F49).
#[test]
fn a_reset_that_nobody_heeds_ends_no_flow() {
    let Some(mut world) = world("a_reset_that_nobody_heeds_ends_no_flow", Options::default()) else { return };
    for cast in casts() {
        for hook in [Hook::Ingress, Hook::Egress] {
            world.service(1, cast.vip, &[cast.backend]);
            world.establish(TCP, cast.client, cast.vip);
            world.service(1, cast.vip, &[cast.backend2]);
            let (data, rst, syn) = [ACK, RST, SYN].map(|flags| Packet::tcp(cast.client, cast.vip, flags)).into();
            let there = |packet: &Packet| match hook {
                Hook::Ingress => packet.clone(),
                Hook::Egress => packet.between(cast.backend, cast.client),
            };
            world.translate(hook, &there(&rst));
            world.translate(hook, &there(&data));
            // Someone asks for the same ports: the connection is there.
            assert_eq!(world.translate(Hook::Ingress, &syn).1, cast.backend, "{hook:?}");
            world.translate(hook, &there(&rst));
            // Nobody goes on: it is over, and the new one goes where there is a backend.
            assert_eq!(world.translate(Hook::Ingress, &syn).1, cast.backend2, "{hook:?}");
            world.remove(|_| true);
        }
    }
}
