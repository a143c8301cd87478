//! Refusing, dropping, guarding addresses, origins.

use std::{
    net::{IpAddr, SocketAddr},
    thread,
    time::{Duration, Instant},
};

use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    unistd::Pid,
};
use proxy_common::{
    counters::Reason,
    device::role,
    frontend::{origin, verdict},
};

use super::{
    packet::{ACK, Packet, SYN, Sums, sums},
    support::Spec,
    world::{BOUNCE, Cast, DROP, Hook, NEXT, Options, PROTOS, TCP, UDP, World, at, casts, hex, usual, world},
};

/// What must come back for `refused`: an ICMP port unreachable from the VIP, `quote` bytes of the packet in it.
fn refusal(refused: &[u8], v6: bool, quote: usize) -> Vec<u8> {
    let ip = |at: usize| -> IpAddr {
        if v6 {
            IpAddr::from(<[u8; 16]>::try_from(&refused[at..at + 16]).unwrap())
        } else {
            IpAddr::from(<[u8; 4]>::try_from(&refused[at..at + 4]).unwrap())
        }
    };
    let (src, dst) = if v6 { (ip(22), ip(38)) } else { (ip(26), ip(30)) };
    let (kind, code) = if v6 { (1, 4) } else { (3, 3) };
    let mut icmp = Packet::icmp(dst, src, kind, code, &refused[14..14 + quote]);
    icmp.ttl = 64;
    icmp.id = 0;
    let mut frame = icmp.frame();
    if v6 {
        // No flow label.
        frame[14..18].copy_from_slice(&[0x60, 0, 0, 0]);
    }
    frame[..6].copy_from_slice(&refused[6..12]);
    frame[6..12].copy_from_slice(&refused[..6]);
    frame
}

#[track_caller]
fn is_refused(world: &mut World, cast: &Cast, frame: &[u8], quote: usize) {
    let (verdict, out) = world.run(Hook::Ingress, frame);
    assert_eq!((verdict, hex(&out)), (BOUNCE, hex(&refusal(frame, cast.v6, quote))), "in: {}", hex(frame));
    assert_eq!(sums(&out), Sums::Right);
}

#[test]
fn no_endpoint_is_refused_with_port_unreachable() {
    let Some(mut world) = world("no_endpoint_is_refused_with_port_unreachable", Options::default()) else { return };
    for cast in casts() {
        world.service(7, cast.vip, &[]);
        let before = world.reason(Reason::Rejected);
        let ip = if cast.v6 { 40 } else { 20 };
        for proto in PROTOS {
            let transport = if proto == UDP { 8 } else { 20 };
            for payload in [0, 1, 2, 3, 100, 1400] {
                let packet = Packet::opening(proto, cast.client, cast.vip).with_payload(&vec![0xa5; payload]);
                is_refused(&mut world, &cast, &packet.frame(), ip + transport);
            }
            // Padded to the least Ethernet frame.
            let mut frame = Packet::opening(proto, cast.client, cast.vip).with_payload(b"").frame();
            frame.resize(frame.len().max(74), 0);
            is_refused(&mut world, &cast, &frame, ip + transport);
            // A header in front of the transport's is quoted whole.
            let mut packet = Packet::opening(proto, cast.client, cast.vip);
            packet.options = vec![1; 40];
            packet.extensions =
                vec![(0, vec![0, 0, 1, 4, 0, 0, 0, 0]), (60, vec![0, 1, 1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])];
            is_refused(&mut world, &cast, &packet.frame(), ip + if cast.v6 { 24 } else { 40 } + transport);
        }
        assert_eq!(world.reason(Reason::Rejected), before + 8 * PROTOS.len() as u64);
        assert_eq!(world.counters(7).refused, before + 8 * PROTOS.len() as u64);
        assert_eq!(world.counters(7).connections, 0);
        assert_eq!(world.reason(Reason::RejectFailed), 0);
        // Only what opens a connection is refused (contract A87).
        world.untouched(Hook::Ingress, &Packet::tcp(cast.client, cast.vip, ACK).frame());
        world.untouched(Hook::Ingress, &Packet::tcp(cast.client, cast.vip, SYN | ACK).frame());
        world.untouched(Hook::Ingress, &Packet::tcp(cast.client, cast.vip, super::packet::RST).frame());
    }
    assert_eq!(world.rows(), []);
}

/// One's-complement sum of 16-bit words, padded with a zero.
fn folded(bytes: &[u8]) -> u16 {
    let mut sum: u32 =
        bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// A pod's packet has the pseudo-header's sum where its checksum belongs, for the device to finish (`CHECKSUM_PARTIAL`). The device
/// that the refusal leaves by may finish it still: the ICMP checksum has to be right before and after.
#[test]
fn a_checksum_left_to_the_device_does_not_spoil_the_refusal() {
    let Some(mut world) = world("a_checksum_left_to_the_device_does_not_spoil_the_refusal", Options::default()) else {
        return;
    };
    for cast in casts() {
        world.service(7, cast.vip, &[]);
        for proto in [TCP, UDP] {
            for port in 0..16_u8 {
                let payload = vec![port; usize::from(port)];
                let mut frame = Packet::opening(proto, cast.client, cast.vip).with_payload(&payload).frame();
                let (l4, addresses) = if cast.v6 { (54, 22..54) } else { (34, 26..34) };
                let field = if proto == TCP { 16 } else { 6 };
                let mut pseudo = frame[addresses].to_vec();
                pseudo.extend([0, proto]);
                pseudo.extend(u16::try_from(frame.len() - l4).unwrap().to_be_bytes());
                frame[l4 + field..l4 + field + 2].copy_from_slice(&folded(&pseudo).to_be_bytes());
                let (verdict, mut out) = world.run(Hook::Ingress, &frame);
                assert_eq!((verdict, sums(&out)), (BOUNCE, Sums::Right), "in: {} out: {}", hex(&frame), hex(&out));
                // As skb_checksum_help() does.
                let start = l4 + if cast.v6 { 48 } else { 28 };
                let finished = !folded(&out[start..]);
                out[start + field..start + field + 2].copy_from_slice(&finished.to_be_bytes());
                assert_eq!(sums(&out), Sums::Right, "finished: {}", hex(&out));
            }
        }
    }
}

#[test]
fn what_must_not_be_answered_is_dropped() {
    let Some(mut world) = world("what_must_not_be_answered_is_dropped", Options::default()) else { return };
    for cast in casts() {
        world.service(7, cast.vip, &[]);
        world.datapath.guard(cast.vip.ip(), 7);
        let nobody: [&str; 4] = if cast.v6 {
            ["[::]:1", "[ff02::1]:1", "[ff0e::5]:1", "[ff01::1]:1"]
        } else {
            ["0.0.0.0:1", "224.0.0.1:1", "239.1.1.1:1", "255.255.255.255:1"]
        };
        let mut failed = world.reason(Reason::RejectFailed);
        for source in nobody {
            for proto in PROTOS {
                let packet = Packet::opening(proto, source.parse().unwrap(), cast.vip);
                assert_eq!(world.run(Hook::Ingress, &packet.frame()).0, DROP, "{packet:?}");
                failed += 1;
                assert_eq!(world.reason(Reason::RejectFailed), failed);
            }
        }
        // An error about an error.
        let quoted = Packet::tcp(at(cast.backend, 9), cast.client, SYN).frame();
        for kind in if cast.v6 { 1..=4 } else { 11..=12 } {
            let error = Packet::icmp(cast.router, cast.vip.ip(), kind, 0, &quoted[14..]);
            assert_eq!(world.run(Hook::Ingress, &error.frame()).0, DROP, "type {kind}");
            failed += 1;
        }
        assert_eq!(world.reason(Reason::RejectFailed), failed);
    }
    // What was dropped counts once, under the reason that it was dropped for.
    assert_eq!(world.reasons(), [(Reason::RejectFailed.name(), world.reason(Reason::RejectFailed))]);
}

#[test]
fn a_drop_is_silent() {
    let Some(mut world) = world("a_drop_is_silent", Options::default()) else { return };
    for (n, cast) in casts().into_iter().enumerate() {
        let spec = Spec { verdicts: [verdict::DROP; origin::COUNT], ..Spec::pick_all(9, &[cast.backend]) };
        for proto in PROTOS {
            world.datapath.frontend(cast.vip, proto, &spec);
            assert_eq!(world.run(Hook::Ingress, &Packet::opening(proto, cast.client, cast.vip).frame()).0, DROP);
        }
        assert_eq!(world.reason(Reason::PolicyDrop), (PROTOS.len() * (n + 1)) as u64);
        assert_eq!(world.counters(9).refused, (PROTOS.len() * (n + 1)) as u64, "refused or dropped by verdict");
        world.untouched(Hook::Ingress, &Packet::tcp(cast.client, cast.vip, ACK).frame());
    }
    assert_eq!(world.rows(), []);
}

#[test]
fn a_guarded_address_refuses_what_no_frontend_claims() {
    let Some(mut world) = world("a_guarded_address_refuses_what_no_frontend_claims", Options::default()) else {
        return;
    };
    for cast in casts() {
        let spec = Spec { verdicts: usual(), ..Spec::pick_all(1, &[cast.backend]) };
        world.datapath.frontend(cast.vip, TCP, &spec);
        world.datapath.guard(cast.vip.ip(), 1);
        let ip = if cast.v6 { 40 } else { 20 };
        for origin in [role::POD, role::OUTWARD] {
            world.device(origin);
            // Another port, another protocol on the same port (contract A47, A48).
            is_refused(&mut world, &cast, &Packet::tcp(cast.client, at(cast.vip, 81), SYN).frame(), ip + 20);
            is_refused(&mut world, &cast, &Packet::udp(cast.client, cast.vip).frame(), ip + 8);
            is_refused(&mut world, &cast, &Packet::udp(cast.client, at(cast.vip, 0)).frame(), ip + 8);
            // A ping, and what is not even looked at (contract A50).
            let kind = if cast.v6 { 128 } else { 8 };
            let echo = Packet::icmp(cast.client.ip(), cast.vip.ip(), kind, 0, b"ping");
            is_refused(&mut world, &cast, &echo.frame(), ip + 8);
            for proto in [33, 50, 47, 89] {
                is_refused(
                    &mut world,
                    &cast,
                    &Packet::other(cast.client.ip(), cast.vip.ip(), proto).with_payload(&[7; 40]).frame(),
                    ip + 8,
                );
            }
        }
        // The claimed port works, and so do others' addresses.
        world.device(role::POD);
        world.expect(
            Hook::Ingress,
            &Packet::tcp(cast.client, cast.vip, SYN),
            &Packet::tcp(cast.client, cast.backend, SYN),
        );
        world.untouched(Hook::Ingress, &Packet::icmp(cast.client.ip(), cast.backend.ip(), 8, 0, b"ping").frame());
        world.untouched(Hook::Ingress, &Packet::other(cast.client.ip(), cast.backend.ip(), 33).frame());
        world.untouched(Hook::Egress, &Packet::other(cast.client.ip(), cast.vip.ip(), 33).frame());
    }
}

/// A switch floods, an interface listens to everything: their host does with such frames what is to be done.
#[test]
fn frames_for_other_hosts_are_neither_translated_nor_refused() {
    let Some(mut world) = world("frames_for_other_hosts_are_neither_translated_nor_refused", Options::default()) else {
        return;
    };
    let mut sport = 50_000;
    for cast in casts() {
        world.service(1, cast.vip, &[cast.backend]);
        world.service(2, cast.vip2, &[]);
        for vip in [cast.vip, cast.vip2] {
            world.datapath.guard(vip.ip(), 1);
        }
        let mut frames = |mac: [u8; 6]| {
            sport += 1;
            let client = at(cast.client, sport);
            let mut packets: Vec<_> = PROTOS.iter().map(|proto| Packet::opening(*proto, client, cast.vip)).collect();
            packets.extend(PROTOS.iter().map(|proto| Packet::opening(*proto, client, cast.vip2)));
            packets.push(Packet::icmp(client.ip(), cast.vip.ip(), if cast.v6 { 128 } else { 8 }, 0, b"ping"));
            packets.push(Packet::other(client.ip(), cast.vip.ip(), 33).with_payload(&[7; 40]));
            packets.iter().map(|packet| [&mac[..], &packet.frame()[6..]].concat()).collect::<Vec<_>>()
        };
        let others = [2, 0, 0, 0, 0, 1];
        for (role, bridged, acted) in [
            (role::OUTWARD, false, false),
            (role::OVERLAY, false, false),
            (role::OUTWARD, true, true),
            // Whatever switch is in the node.
            (role::POD, false, true),
        ] {
            world.device(role);
            world.bridge_port(bridged);
            for frame in frames(others) {
                let (verdict, out) = world.run(Hook::Ingress, &frame);
                assert_eq!(out != frame, acted, "{role} {bridged} {verdict} {}", hex(&frame));
                assert!(acted || verdict == NEXT);
            }
            for frame in frames([0; 6]) {
                assert_ne!(world.run(Hook::Ingress, &frame).1, frame);
            }
            for mac in [[0xff; 6], [0x33, 0x33, 0, 0, 0, 1], [1, 0, 0x5e, 0, 0, 1]] {
                for frame in frames(mac) {
                    world.untouched(Hook::Ingress, &frame);
                }
            }
        }
        world.bridge_port(false);
    }
}

/// Whatever nobody translated: the node's own ping, its TCP and UDP with `--socket-lb=off`, a piece of another proxy's flow that this one did
/// not know either. None of it goes to the default gateway (contract A50).
#[test]
fn nothing_for_a_guarded_address_leaves_the_node() {
    let Some(mut world) = world("nothing_for_a_guarded_address_leaves_the_node", Options::default()) else { return };
    let mut unserved = 0;
    for cast in casts() {
        world.service(1, cast.vip, &[cast.backend]);
        world.datapath.guard(cast.vip.ip(), 1);
        let node = SocketAddr::new(cast.node, 5000);
        let all = |to: SocketAddr| {
            let big = Packet::udp(node, to).with_payload(&[1; 2000]);
            // Nobody can tell what is in these: more headers than are walked, a stop on the way to another destination, TCP cut short.
            let mut odd = [Packet::udp(node, to), Packet::udp(node, to), Packet::other(node.ip(), to.ip(), 6)];
            if cast.v6 {
                odd[0].extensions = (0..9).map(|_| (60, vec![0, 0, 1, 4, 0, 0, 0, 0])).collect();
                odd[1].extensions = vec![(43, [&[0, 2, 0, 1, 0, 0, 0, 0], [7; 16].as_slice()].concat())];
            }
            let [headers, route, cut] = odd.map(|packet| packet.with_payload(&[0x50; 12]).frame());
            [
                headers,
                route,
                cut,
                Packet::icmp(node.ip(), to.ip(), if cast.v6 { 128 } else { 8 }, 0, b"ping").frame(),
                Packet::other(node.ip(), to.ip(), 33).with_payload(&[7; 40]).frame(),
                Packet::tcp(node, to, SYN).frame(),
                Packet::tcp(node, to, ACK).frame(),
                Packet::udp(node, at(to, 99)).frame(),
                big.fragment(0, 1480),
                big.fragment(1480, 2008),
                big.fragment(1480, 2000),
            ]
        };
        for role in [Some(role::OUTWARD), Some(role::OVERLAY), None] {
            match role {
                Some(role) => world.device(role),
                None => world.device_with(None),
            }
            for frame in all(cast.vip) {
                assert_eq!(world.run(Hook::Egress, &frame).0, DROP, "{role:?} {}", hex(&frame));
                unserved += 1;
                assert_eq!(world.reason(Reason::Unserved), unserved);
            }
            for frame in all(cast.backend).into_iter().chain(all(cast.vip2)) {
                world.untouched(Hook::Egress, &frame);
            }
        }
        // A container may have such an address itself.
        world.device(role::POD);
        for frame in all(cast.vip) {
            world.untouched(Hook::Egress, &frame);
        }
    }
    let unparsed = world.reason(Reason::Unparsed);
    assert!(unparsed > 0);
    assert_eq!(world.reasons(), [(Reason::Unparsed.name(), unparsed), (Reason::Unserved.name(), unserved)]);
}

/// One verdict for each origin: the device tells which holds.
#[test]
fn the_device_tells_the_origin() {
    let Some(mut world) = world("the_device_tells_the_origin", Options::default()) else { return };
    for cast in casts() {
        let spec = |pod: u8, external: u8| {
            let mut verdicts = [verdict::REJECT; origin::COUNT];
            verdicts[origin::POD] = pod;
            verdicts[origin::EXTERNAL] = external;
            Spec { verdicts, local: vec![cast.backend2], ..Spec::pick_all(1, &[cast.backend]) }
        };
        let mut sport = 40_000;
        let mut goes = |world: &mut World, device: Option<u8>, spec: &Spec| -> Result<SocketAddr, i32> {
            sport += 1;
            match device {
                Some(role) => world.device(role),
                None => world.device_with(None),
            }
            world.datapath.frontend(cast.vip, TCP, spec);
            let (verdict, out) = world.run(Hook::Ingress, &Packet::tcp(at(cast.client, sport), cast.vip, SYN).frame());
            if verdict == -1 { Ok(super::packet::ends(&out).1) } else { Err(verdict) }
        };
        let local_for_pods = spec(verdict::PICK_LOCAL, verdict::PICK_ALL);
        let drop_outside = spec(verdict::PICK_ALL, verdict::DROP);
        let refuse_pods = spec(verdict::REJECT, verdict::PICK_LOCAL | verdict::MASQUERADE);
        assert_eq!(goes(&mut world, Some(role::POD), &local_for_pods), Ok(cast.backend2));
        assert_eq!(goes(&mut world, Some(role::POD), &drop_outside), Ok(cast.backend));
        assert_eq!(goes(&mut world, Some(role::POD), &refuse_pods), Err(BOUNCE));
        for outside in [Some(role::OUTWARD), Some(role::OVERLAY), None] {
            assert_eq!(goes(&mut world, outside, &local_for_pods), Ok(cast.backend));
            assert_eq!(goes(&mut world, outside, &drop_outside), Err(DROP));
            assert_eq!(goes(&mut world, outside, &refuse_pods), Ok(cast.backend2));
        }
        // An empty local range is a refusal, whatever is in the other.
        let none_local = Spec { local: Vec::new(), ..local_for_pods };
        assert_eq!(goes(&mut world, Some(role::POD), &none_local), Err(BOUNCE));
    }
}

/// An address that sends none, forged or gone astray (contract A48, F51): what it opens is dropped, and answers nobody.
#[test]
fn new_flows_from_our_own_addresses_and_from_loopback_are_dropped() {
    let Some(mut world) = world("new_flows_from_our_own_addresses_and_from_loopback_are_dropped", Options::default())
    else {
        return;
    };
    let mut dropped = 0;
    for cast in casts() {
        world.service(1, cast.vip, &[cast.backend]);
        world.service(2, cast.vip2, &[]);
        for vip in [cast.vip, cast.vip2] {
            world.datapath.guard(vip.ip(), 1);
        }
        let loopback: SocketAddr = if cast.v6 { "[::1]:5000" } else { "127.8.0.1:5000" }.parse().unwrap();
        let forged = at(cast.vip2, 5000);
        for role in [role::POD, role::OUTWARD, role::OVERLAY] {
            world.device(role);
            for proto in PROTOS {
                // To a backend, to what has none, to a port that nobody claims.
                for to in [cast.vip, cast.vip2, at(cast.vip, 99)] {
                    for from in [loopback, forged] {
                        assert_eq!(world.run(Hook::Ingress, &Packet::opening(proto, from, to).frame()).0, DROP);
                        dropped += 1;
                    }
                }
                assert_eq!(world.reason(Reason::Martian), dropped);
                // What is for others is none of our business: a node or a pod may route for others, and pass on another node's answers.
                for from in [loopback, forged] {
                    world.untouched(Hook::Ingress, &Packet::opening(proto, from, cast.backend).frame());
                }
            }
            // Nor is it answered over another protocol.
            for from in [loopback.ip(), forged.ip()] {
                let ping = Packet::icmp(from, cast.vip.ip(), if cast.v6 { 128 } else { 8 }, 0, b"ping");
                for packet in [ping, Packet::other(from, cast.vip.ip(), 33), Packet::other(from, cast.vip.ip(), 50)] {
                    assert_eq!(world.run(Hook::Ingress, &packet.with_payload(&[7; 40]).frame()).0, DROP);
                    dropped += 1;
                }
            }
            assert_eq!(world.reason(Reason::Martian), dropped);
        }
        assert_eq!(world.rows(), []);
        // Our own answers, with the VIP as their source, leave as ever.
        world.device(role::POD);
        for proto in PROTOS {
            world.establish(proto, cast.client, cast.vip);
        }
        world.remove(|_| true);
    }
    assert_eq!(world.reasons(), [(Reason::Martian.name(), dropped)]);
}

/// A flood of what is refused becomes no flood of refusals: beyond the rate packets are dropped in silence. Who is behind the
/// flood is held back before others are, and UDP leaves TCP its half.
#[test]
fn refusals_are_limited() {
    const RATE: u32 = 200;
    let Some(mut world) = world("refusals_are_limited", Options { refusals: RATE, ..Options::default() }) else {
        return;
    };
    // Each CPU has a rate of its own.
    let _pinned = Pinned::here();
    let [v4, v6] = casts();
    world.service(7, v4.vip, &[]);
    world.service(8, v6.vip, &[]);
    // How many of `clients` by turns are refused, and the most that may be: of a second's worth at once, and what time adds to it.
    let (mut asked, begun) = (0, Instant::now());
    let mut ask = |world: &mut World, proto: u8, clients: &[(&Cast, SocketAddr)], packets: usize, per_second: u32| {
        let mut refused = 0;
        for n in 0..packets {
            let (cast, client) = clients[n % clients.len()];
            match world.run(Hook::Ingress, &Packet::opening(proto, client, cast.vip).frame()).0 {
                BOUNCE => refused += 1,
                verdict => assert_eq!(verdict, DROP),
            }
        }
        asked += packets as u64;
        let most = per_second + 2 + (begun.elapsed().as_secs_f64() * f64::from(RATE / 2)) as u32;
        assert!((per_second..=most).contains(&refused), "{refused}, not {per_second} to {most}");
        assert_eq!(world.reason(Reason::Rejected) + world.reason(Reason::RejectLimited), asked, "each counts once");
        assert_eq!(world.counters(7).refused + world.counters(8).refused, asked);
        world.reason(Reason::RejectLimited)
    };
    // A noisy one is held back for itself, whatever it asks over.
    let limited = ask(&mut world, UDP, &[(&v4, v4.client)], 400, RATE / 10);
    assert_eq!(ask(&mut world, UDP, &[(&v6, v6.client)], 20, 20), limited, "another one is not");
    // Many are held back together.
    let many: Vec<_> = (0..64_u8).map(|n| (&v4, SocketAddr::from(([10, 244, 3, n], 5000)))).collect();
    ask(&mut world, UDP, &many, 800, RATE / 2 - 40);
    // Over TCP none of that shows.
    let others: Vec<_> = (0..64_u8).map(|n| (&v4, SocketAddr::from(([10, 244, 4, n], 5000)))).collect();
    ask(&mut world, TCP, &others, 800, RATE / 2);
    // Time gives back.
    let (started, before) = (Instant::now(), world.reason(Reason::Rejected));
    thread::sleep(Duration::from_millis(300));
    for n in 0..800 {
        world.run(Hook::Ingress, &Packet::opening(TCP, others[n % 64].1, v4.vip).frame());
    }
    let least = (f64::from(RATE / 2) * 0.3) as u64;
    let most = 3 + (f64::from(RATE / 2) * started.elapsed().as_secs_f64()) as u64;
    let refused = world.reason(Reason::Rejected) - before;
    assert!((least..=most).contains(&refused), "{refused}, not {least} to {most}");
    // What has a backend is not held up.
    world.service(7, v4.vip, &[v4.backend]);
    world.establish(TCP, v4.client, v4.vip);
}

/// What cannot be answered takes nothing from those who can.
#[test]
fn what_is_not_answered_spares_the_rate() {
    let Some(mut world) = world("what_is_not_answered_spares_the_rate", Options { refusals: 20, ..Options::default() })
    else {
        return;
    };
    let _pinned = Pinned::here();
    let [cast, _] = casts();
    world.service(7, cast.vip, &[]);
    for n in 0..200_u16 {
        let nobody = SocketAddr::from(([224, 0, n as u8, 1], 1));
        assert_eq!(world.run(Hook::Ingress, &Packet::udp(nobody, cast.vip).frame()).0, DROP);
    }
    assert_eq!(world.reasons(), [(Reason::RejectFailed.name(), 200)]);
    assert_eq!(world.run(Hook::Ingress, &Packet::udp(cast.client, cast.vip).frame()).0, BOUNCE);
}

/// Keeps this thread on the CPU where it is, for a time: the next test may run on this thread.
struct Pinned(CpuSet);

impl Pinned {
    fn here() -> Self {
        let before = sched_getaffinity(Pid::from_raw(0)).unwrap();
        let first = (0..CpuSet::count()).find(|cpu| before.is_set(*cpu).unwrap()).unwrap();
        let mut here = CpuSet::new();
        here.set(first).unwrap();
        sched_setaffinity(Pid::from_raw(0), &here).unwrap();
        Self(before)
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        sched_setaffinity(Pid::from_raw(0), &self.0).unwrap();
    }
}
