//! TCP connections that have lost their entries (contract F24, F45): reset where nobody else translates, left to the stack elsewhere.

use std::{
    collections::HashMap,
    net::SocketAddr,
    thread,
    time::{Duration, Instant},
};

use proxy_common::{
    Address, Be16, Ipv4Be, Ipv6Be,
    connection::{ConnectionKey, hook},
    counters::Reason,
    device::role,
    frontend::{flags, origin, verdict},
    proto,
};

use super::{
    packet::{ACK, FIN, Packet, RST, SYN, Sums, ends, payload_at, sums},
    source_ranges::{around, range},
    support::Spec,
    world::{BOUNCE, Cast, DROP, Hook, NEXT, Options, SCTP, TCP, World, at, casts, hex, world},
};

const PSH: u8 = 0x08;
/// For so long the same is said before it was said in vain.
const IN_VAIN_MS: u64 = 5000;
/// After so long the clock, which knows seconds and is read now and then, has passed that.
const WAIT: Duration = Duration::from_millis(IN_VAIN_MS + 1200);
/// Of the map of notes.
const ELEMENTS: u32 = 65_536;

/// What a client goes on with, whatever it is at, and what its peer acknowledged.
fn going_on(cast: &Cast) -> [Packet; 4] {
    [(ACK, &b""[..]), (PSH | ACK, b"GET / HTTP/1.1"), (FIN | ACK, b""), (ACK, &[7; 1200])]
        .map(|(flags, payload)| Packet::tcp(cast.client, cast.vip, flags).with_payload(payload))
}

/// Left to the stack, and counted as that.
#[track_caller]
fn is_left(world: &mut World, frame: &[u8]) {
    let (left, reset) = (world.reason(Reason::NotASyn), world.reason(Reason::LostConnection));
    world.untouched(Hook::Ingress, frame);
    assert_eq!((world.reason(Reason::NotASyn), world.reason(Reason::LostConnection)), (left + 1, reset));
}

/// The reset that a client takes for its peer's: its number is what the client expects next.
#[track_caller]
fn is_reset(world: &mut World, cast: &Cast, packet: &Packet) {
    let reset = world.reason(Reason::LostConnection);
    let frame = packet.frame();
    let (verdict, out) = world.run(Hook::Ingress, &frame);
    assert_eq!(verdict, BOUNCE, "{packet:?}");
    let tcp = payload_at(&frame);
    assert_eq!((out.len(), ends(&out), sums(&out)), (tcp + 20, (cast.vip, cast.client), Sums::Right), "{}", hex(&out));
    assert_eq!((&out[tcp + 4..tcp + 8], out[tcp + 13]), (&frame[tcp + 8..tcp + 12], RST), "{}", hex(&out));
    assert_eq!(world.reason(Reason::LostConnection), reset + 1);
}

#[test]
fn a_connection_without_entries_is_reset_where_nobody_else_translates() {
    let name = "a_connection_without_entries_is_reset_where_nobody_else_translates";
    let Some(mut world) = world(name, Options::default()) else { return };
    for cast in casts() {
        world.service(1, cast.vip, &[cast.backend]);
        world.datapath.guard(cast.vip.ip(), 1);
        for device in [role::POD, role::OUTWARD] {
            world.device(device);
            world.alone(false);
            for packet in going_on(&cast) {
                is_left(&mut world, &packet.frame());
            }
            world.alone(true);
            for packet in going_on(&cast) {
                is_reset(&mut world, &cast, &packet);
            }
        }
        // With its entries it goes on, as long as it has them.
        world.device(role::POD);
        world.establish(TCP, cast.client, cast.vip);
        let [more, ..] = going_on(&cast);
        world.expect(Hook::Ingress, &more, &more.to(cast.backend));
        assert_ne!(world.remove(|_| true), 0);
        is_reset(&mut world, &cast, &more);
        assert_eq!(world.rows(), []);
        // And a new one from there is served.
        assert_eq!(world.establish(TCP, cast.client, cast.vip), cast.backend);
        world.remove(|_| true);
    }
    assert_eq!(world.reason(Reason::Rejected), 0);
}

#[test]
fn what_is_no_connection_of_ours_is_not_reset() {
    let Some(mut world) = world("what_is_no_connection_of_ours_is_not_reset", Options::default()) else { return };
    world.alone(true);
    for cast in casts() {
        world.service(1, cast.vip, &[cast.backend]);
        world.datapath.guard(cast.vip.ip(), 1);
        // A reset is not answered, nor what answers a SYN, nor what acknowledges nothing.
        for flags in [RST, RST | ACK, SYN | ACK, SYN | RST | ACK, SYN | RST, FIN, 0] {
            let frame = Packet::tcp(cast.client, cast.vip, flags).frame();
            is_left(&mut world, &frame);
        }
        is_left(&mut world, &Packet::closing(SCTP, cast.client, cast.vip).frame());
        let big = Packet::tcp(cast.client, cast.vip, ACK).with_payload(&[7; 2000]);
        is_left(&mut world, &big.fragment(0, 1480));
        world.untouched(Hook::Ingress, &big.fragment(1480, 2020));
        // Who may not ask gets no answer either.
        let [more, ..] = going_on(&cast);
        let loopback = if cast.v6 { "[::1]:4000" } else { "127.0.0.1:4000" };
        let group = if cast.v6 { "[ff02::1]:4000" } else { "224.0.0.1:4000" };
        for source in [loopback, group].map(|source| source.parse().unwrap()).into_iter().chain([at(cast.vip, 4000)]) {
            is_left(&mut world, &more.from(source).frame());
        }
        // A switch that floods.
        world.device(role::OUTWARD);
        let mut elsewhere = more.frame();
        elsewhere[..6].copy_from_slice(&[2, 0, 0, 0, 0, 9]);
        is_left(&mut world, &elsewhere);
        // And where the device is a port of the bridge that the pods are at.
        world.bridge(1, 9);
        is_left(&mut world, &elsewhere);
        world.device(role::POD);
        // Nobody would be served anew: no endpoint, none here, or by policy.
        world.service(2, cast.vip2, &[]);
        world.datapath.guard(cast.vip2.ip(), 2);
        is_left(&mut world, &more.to(cast.vip2).frame());
        for verdict in [verdict::DROP, verdict::REJECT, verdict::PASS, verdict::PICK_LOCAL] {
            let verdicts = [verdict; origin::COUNT];
            let spec = Spec { verdicts, ..Spec::pick_all(2, &[cast.backend]) };
            world.datapath.frontend(cast.vip2, TCP, &spec);
            is_left(&mut world, &more.to(cast.vip2).frame());
        }
        // An address of the node, whose stack answers.
        let port = Spec { flags: flags::NODE_PORT, ..Spec::pick_all(3, &[cast.backend]) };
        world.datapath.frontend(at(cast.backend2, 30_080), TCP, &port);
        is_left(&mut world, &more.to(at(cast.backend2, 30_080)).frame());
        // A port that no Service has: what leaves is counted there.
        let counted = world.reasons();
        world.untouched(Hook::Ingress, &more.to(at(cast.vip, 99)).frame());
        assert_eq!(world.reasons(), counted);
    }
    assert_eq!(world.rows(), []);
}

/// With other numbers, and as if the checksum were right.
fn numbered(packet: &Packet, number: u8, acknowledged: u8) -> Vec<u8> {
    let mut frame = packet.frame();
    let tcp = payload_at(&frame);
    (frame[tcp + 7], frame[tcp + 11]) = (number, acknowledged);
    frame
}

/// The packet without payload in a frame with a trailer, and with the one byte of a probe.
fn asking(packet: &Packet) -> [Vec<u8>; 2] {
    let mut trailed = packet.frame();
    trailed.extend([0x55; 16]);
    [trailed, packet.clone().with_payload(&[7]).frame()]
}

/// What the client says to a load balancer's address, which there is then.
fn to_a_balancer(world: &mut World, cast: &Cast) -> Packet {
    let spec = Spec { flags: flags::LOAD_BALANCER, ..Spec::pick_all(1, &[cast.backend]) };
    world.datapath.frontend(cast.vip, TCP, &spec);
    let [_, more, ..] = going_on(cast);
    more
}

/// Two clients that share an element of the map of notes, and are told apart there.
fn neighbours(cast: &Cast) -> [SocketAddr; 2] {
    fn digest<A: Address>(from: SocketAddr, to: SocketAddr) -> u32 {
        let [src, dst] = [from, to].map(|end| A::from_ip(end.ip()).unwrap());
        let [sport, dport] = [from, to].map(|end| Be16::from_host(end.port()));
        ConnectionKey::new(hook::INGRESS, proto::TCP, src, sport, dst, dport).digest(0)
    }
    let mut seen = HashMap::new();
    for port in 10_000..=u16::MAX {
        let from = at(cast.client, port);
        let digest = if cast.v6 { digest::<Ipv6Be>(from, cast.vip) } else { digest::<Ipv4Be>(from, cast.vip) };
        match seen.insert(digest % ELEMENTS, (digest, from)) {
            Some((other, neighbour)) if other >> 24 != digest >> 24 => return [neighbour, from],
            _ => {}
        }
    }
    panic!("no two ports share an element");
}

/// Of what was under way when the entries were lost the first one is not always the one that is sent again: that one's time begins when it comes.
#[test]
fn who_said_something_else_before_waits_no_longer() {
    let Some(mut world) = world("who_said_something_else_before_waits_no_longer", Options::default()) else { return };
    world.alone(true);
    world.device(role::OUTWARD);
    let all = casts().map(|cast| {
        let more = to_a_balancer(&mut world, &cast);
        (cast, more)
    });
    for (_, more) in &all {
        is_left(&mut world, &numbered(more, 9, 1));
        is_left(&mut world, &more.frame());
    }
    thread::sleep(WAIT);
    for (cast, more) in &all {
        is_reset(&mut world, cast, more);
    }
}

/// Many are lost together: who shares a note's place with others waits for its turn, but has one.
#[test]
fn neighbours_are_reset_one_after_the_other() {
    let name = "neighbours_are_reset_one_after_the_other";
    let Some(mut world) = world(name, Options::default()) else { return };
    world.alone(true);
    world.device(role::OUTWARD);
    let all = casts().map(|cast| {
        let more = to_a_balancer(&mut world, &cast);
        neighbours(&cast).map(|client| (Cast { client, ..cast }, more.from(client)))
    });
    for both in &all {
        // In turns, as their clients would.
        for (_, packet) in [both, both].into_iter().flatten() {
            is_left(&mut world, &packet.frame());
        }
    }
    thread::sleep(WAIT);
    for [(cast, first), (_, second)] in &all {
        is_left(&mut world, &second.frame());
        is_reset(&mut world, cast, first);
        is_reset(&mut world, cast, first);
        // It has had its turn, and there is no other.
        is_left(&mut world, &second.frame());
        is_left(&mut world, &first.frame());
    }
    thread::sleep(WAIT);
    for [(_, first), (cast, second)] in &all {
        is_left(&mut world, &first.frame());
        is_reset(&mut world, cast, second);
    }
}

/// Until there was the Service the address may have been somebody else's, whose connections have no entries: they are answered. One that
/// has lost its entries is not, so its sender says the same again and again.
#[test]
fn at_an_address_that_others_may_have_had_who_speaks_in_vain_is_reset() {
    let name = "at_an_address_that_others_may_have_had_who_speaks_in_vain_is_reset";
    let Some(mut world) = world(name, Options::default()) else { return };
    world.alone(true);
    world.device(role::OUTWARD);
    let all: Vec<(Cast, Vec<Packet>)> = casts()
        .into_iter()
        .flat_map(|cast| [(flags::LOAD_BALANCER, cast.vip), (flags::EXTERNAL_IP, cast.vip2)].map(|to| (cast, to)))
        .map(|(cast, (flags, vip))| {
            let spec = Spec { flags, ..Spec::pick_all(1, &[cast.backend]) };
            world.datapath.frontend(vip, TCP, &spec);
            let cast = Cast { vip, ..cast };
            let each = (1..).zip(going_on(&cast)).map(|(n, packet)| packet.from(at(cast.client, 5000 + n)));
            let each = each.collect();
            (cast, each)
        })
        .collect();
    let say = |world: &mut World| {
        for packet in all.iter().flat_map(|(_, packets)| packets) {
            is_left(world, &packet.frame());
        }
        for frame in all.iter().flat_map(|(_, packets)| asking(&packets[0])) {
            is_left(world, &frame);
        }
    };
    let (said_again, at_first) = (Duration::from_millis(IN_VAIN_MS - 600), Instant::now());
    say(&mut world);
    let noted = Instant::now();
    say(&mut world);
    thread::sleep(said_again.saturating_sub(at_first.elapsed()));
    if at_first.elapsed() < said_again + Duration::from_millis(400) {
        say(&mut world);
    }
    thread::sleep(WAIT.saturating_sub(noted.elapsed()));
    for (cast, packets) in &all {
        for (packet, alive) in packets.iter().zip([true, false, false, false]) {
            // Where somebody hears it there is more to say, or more was heard.
            let elsewhere = packet.from(at(packet.src, packet.src.port() + 100));
            is_left(&mut world, &numbered(&elsewhere, 1, 1));
            if alive {
                // To ask whether somebody is there is to say nothing, whatever a switch has put behind it, or with a byte that is no news.
                is_left(&mut world, &packet.frame());
                for frame in asking(packet) {
                    is_left(&mut world, &frame);
                }
                continue;
            }
            world.alone(false);
            world.untouched(Hook::Ingress, &packet.frame());
            world.alone(true);
            let from = Cast { client: packet.src, ..*cast };
            is_reset(&mut world, &from, packet);
            is_reset(&mut world, &from, packet);
            is_left(&mut world, &numbered(packet, 8, 9));
            is_left(&mut world, &numbered(packet, 8, 10));
            is_left(&mut world, &packet.frame());
        }
    }
    assert_eq!(world.rows(), []);
}

/// What leads back out by the device that it came in by: a host off the node meant this one, a pod may mean anybody. What leads back to
/// the bridge whose port it came in by may be for a pod there, whoever sent it.
#[test]
fn what_would_be_sent_back_off_the_node_is_reset_at_once() {
    const PORT: u32 = 77;
    let name = "what_would_be_sent_back_off_the_node_is_reset_at_once";
    let Some(mut world) = world(name, Options::default()) else { return };
    let sh = |command: &str| {
        let output = std::process::Command::new("sh").args(["-c", command]).output().unwrap();
        assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    };
    sh(&format!(
        "ip link add m0 index {PORT} address 02:00:00:00:00:77 type veth peer name m1 && \
         ip link add b0 index 79 type bridge && for d in m0 m1 b0; do ip link set $d up; done && \
         echo 1 > /proc/sys/net/ipv4/ip_forward && echo 1 > /proc/sys/net/ipv6/conf/all/forwarding"
    ));
    // In by that device: `ifindex` of the program's context.
    let mut context = [0; 192];
    context[40..44].copy_from_slice(&PORT.to_ne_bytes());
    world.alone(true);
    for (route, is_port) in [("m0", false), ("b0", true)] {
        if is_port {
            world.bridge(PORT, 79);
        }
        for cast in casts() {
            let spec = Spec { flags: flags::LOAD_BALANCER, ..Spec::pick_all(1, &[cast.backend]) };
            world.datapath.frontend(cast.vip, TCP, &spec);
            let [more, ..] = going_on(&cast);
            let mut frame = more.frame();
            frame[..6].copy_from_slice(&[2, 0, 0, 0, 0, 0x77]);
            for (leads_back, role) in
                [(false, role::OUTWARD), (true, role::OUTWARD), (true, role::OVERLAY), (true, role::POD)]
            {
                if leads_back {
                    sh(&format!("ip route replace {} dev {route}", cast.vip.ip()));
                }
                world.device_at(PORT, role);
                let is_reset = leads_back && role == role::OUTWARD && !is_port;
                let before = world.reason(Reason::LostConnection);
                let (verdict, _) = world.run_program("tc_ingress_ether", &frame, Some(&context)).unwrap();
                let what = (route, leads_back, role, cast.vip);
                assert_eq!(verdict, if is_reset { BOUNCE } else { NEXT }, "{what:?}");
                assert_eq!(world.reason(Reason::LostConnection) - before, u64::from(is_reset), "{what:?}");
            }
            sh(&format!("ip route del {} dev {route}", cast.vip.ip()));
        }
    }
}

/// The address of a bridge may be another one than its port's: what comes by that is for this node, or was flooded, and then its host answers.
#[test]
fn at_a_port_of_a_bridge_who_speaks_in_vain_is_reset() {
    let Some(mut world) = world("at_a_port_of_a_bridge_who_speaks_in_vain_is_reset", Options::default()) else {
        return;
    };
    world.alone(true);
    world.device(role::OUTWARD);
    let all: Vec<Vec<u8>> = casts()
        .into_iter()
        .flat_map(|cast| {
            world.service(1, cast.vip, &[cast.backend]);
            world.datapath.guard(cast.vip.ip(), 1);
            let spec = Spec { flags: flags::LOAD_BALANCER, ..Spec::pick_all(2, &[cast.backend]) };
            world.datapath.frontend(cast.vip2, TCP, &spec);
            let [_, more, ..] = going_on(&cast);
            [more.clone(), more.to(cast.vip2)]
        })
        .map(|packet| {
            let mut frame = packet.frame();
            frame[..6].copy_from_slice(&[2, 0, 0, 0, 0, 9]);
            frame
        })
        .collect();
    world.bridge(1, 9);
    for frame in &all {
        is_left(&mut world, frame);
    }
    thread::sleep(WAIT);
    for frame in &all {
        let reset = world.reason(Reason::LostConnection);
        assert_eq!(world.run(Hook::Ingress, frame).0, BOUNCE, "{}", hex(frame));
        assert_eq!(world.reason(Reason::LostConnection), reset + 1);
    }
}

/// An entry that cannot be read whole, since somebody writes it just then, is there all the same: nothing is lost.
#[test]
fn who_has_an_entry_that_is_torn_is_not_reset() {
    let Some(mut world) = world("who_has_an_entry_that_is_torn_is_not_reset", Options::default()) else { return };
    world.alone(true);
    for cast in casts() {
        world.service(1, cast.vip, &[cast.backend]);
        world.datapath.guard(cast.vip.ip(), 1);
        let [more, ..] = going_on(&cast);
        for is_established in [true, false] {
            if is_established {
                world.establish(TCP, cast.client, cast.vip);
            } else {
                world.translate(Hook::Ingress, &Packet::opening(TCP, cast.client, cast.vip));
            }
            let tear = |world: &mut World| assert_eq!(world.edit(|_| true, Some(&|notes| *notes.seal ^= 1)), 2);
            tear(&mut world);
            for packet in going_on(&cast) {
                is_left(&mut world, &packet.frame());
            }
            // Whole again it goes on.
            tear(&mut world);
            world.expect(Hook::Ingress, &more, &more.to(cast.backend));
            world.remove(|_| true);
            is_reset(&mut world, &cast, &more);
        }
    }
}

/// Nor is anybody who could open no connection, however long ago it was heard.
#[test]
fn who_may_not_ask_is_not_reset_either() {
    let Some(mut world) = world("who_may_not_ask_is_not_reset_either", Options::default()) else { return };
    world.alone(true);
    for cast in casts() {
        let spec = Spec { flags: flags::HAS_SOURCE_RANGES, ..Spec::pick_all(1, &[cast.backend]) };
        world.datapath.frontend(cast.vip, TCP, &spec);
        let [more, ..] = going_on(&cast);
        is_left(&mut world, &more.frame());
        range(&mut world, 1, around(&cast), true);
        is_reset(&mut world, &cast, &more);
    }
}

/// Anybody can send what is answered so: it is limited as refusals are, and counts under one reason.
#[test]
fn resets_of_lost_connections_are_limited() {
    let options = Options { refusals: 200, ..Options::default() };
    let Some(mut world) = world("resets_of_lost_connections_are_limited", options) else { return };
    world.alone(true);
    for cast in casts() {
        world.service(1, cast.vip, &[cast.backend]);
        world.datapath.guard(cast.vip.ip(), 1);
        let before = world.reason(Reason::LostConnection) + world.reason(Reason::RejectLimited);
        let [more, ..] = going_on(&cast);
        let verdicts: Vec<i32> = (0..1000).map(|_| world.run(Hook::Ingress, &more.frame()).0).collect();
        let of = |wanted: i32| verdicts.iter().filter(|verdict| **verdict == wanted).count();
        assert!(of(BOUNCE) >= 10 && of(DROP) > of(BOUNCE) && of(NEXT) == 0, "{} and {}", of(BOUNCE), of(DROP));
        let counted = world.reason(Reason::LostConnection) + world.reason(Reason::RejectLimited);
        assert_eq!(counted - before, 1000);
        // A reset that the agent asked for is not: its client is known.
        world.establish(TCP, at(cast.client, 40_002), cast.vip);
        world.mark(proxy_common::connection::flags::RESET);
        let marked = more.from(at(cast.client, 40_002)).frame();
        assert!((0..100).all(|_| world.run(Hook::Ingress, &marked).0 == BOUNCE));
        world.remove(|_| true);
    }
    assert_eq!(world.reason(Reason::Rejected), 200);
}
