//! What XDP takes from the stack, and what it leaves to it.
//!
//! Two outward devices, one of which packets come in by, and the kernel's own routes and neighbours: towards the client and the first
//! backend by that one, towards the second backend by the other.

use std::{
    net::{IpAddr, SocketAddr},
    process::Command,
};

use aya::{
    maps::{HashMap, MapData, PerCpuArray, PerCpuValues},
    programs::{Xdp, xdp::XdpMode},
};
use proxy_common::{
    connection::flags,
    counters::Reason,
    device::{XdpDevice, role, xdp},
    frontend::{self, origin, verdict},
};

use super::{
    broken::garble,
    packet::{ACK, Body, FIN, Packet, RST, SYN, Sums, ends, sums},
    source_ranges::{around, range},
    support::Spec,
    world::{Cast, Dice, Hook, Options, SCTP, TCP, UDP, World, at, casts, hex, usual, world},
};

/// What XDP takes; SCTP goes by tc.
const PROTOS: [u8; 2] = [TCP, UDP];

const NAME: &str = "xdp_ingress";

/// `XDP_DROP`, `XDP_PASS`, `XDP_TX`, `XDP_REDIRECT`.
const LOST: i32 = 1;
const PASS: i32 = 2;
const BACK: i32 = 3;
const ACROSS: i32 = 4;

/// Indexes of the devices, and the last octet of their addresses.
const IN: u32 = 71;
const OTHER: u32 = 73;
/// Neighbours: the client, the first backend, the second.
const CLIENT: u8 = 0xc1;
const FIRST: u8 = 0xb1;
const SECOND: u8 = 0xb2;

const fn mac(last: u8) -> [u8; 6] {
    [2, 0, 0, 0, 0, last]
}

fn sh(command: &str) {
    let output = Command::new("sh").args(["-ec", command]).output().unwrap();
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
}

fn halves(mac: [u8; 6]) -> [u16; 3] {
    let half = |n: usize| u16::from_ne_bytes([mac[n], mac[n + 1]]);
    [half(0), half(2), half(4)]
}

/// When the stack had a packet for each neighbour last: in a time to come, it has none.
fn turns(world: &mut World, second: u32) {
    let mut map: PerCpuArray<&mut MapData, u32> =
        PerCpuArray::try_from(world.datapath.ebpf.map_mut("neighbours").unwrap()).unwrap();
    let cpus = aya::util::nr_cpus().unwrap();
    for slot in 0..map.len() {
        map.set(slot, PerCpuValues::try_from(vec![second; cpus]).unwrap(), 0).unwrap();
    }
}

fn xdp_devices(world: &mut World) -> HashMap<&mut MapData, u32, XdpDevice> {
    HashMap::try_from(world.datapath.ebpf.map_mut("xdp_devices").unwrap()).unwrap()
}

/// A world with routes.
fn outside(test: &str, options: Options) -> Option<World> {
    let mut world = world(test, options)?;
    sh("ip link set lo up
        for d in 'x 71 72' 'y 73 74'; do set -- $d
            ip link add $1 index $2 mtu 1500 type veth peer name $1-peer index $3; done
        ip link set x address 02:00:00:00:00:47; ip link set y address 02:00:00:00:00:48
        for d in x x-peer y y-peer; do ip link set $d up; done
        echo 1 > /proc/sys/net/ipv4/ip_forward; echo 1 > /proc/sys/net/ipv6/conf/all/forwarding");
    let neighbour = |ip: IpAddr, device: &str, last: u8| {
        sh(&format!(
            "ip route add {ip} dev {device}; ip neigh add {ip} lladdr 02:00:00:00:00:{last:02x} dev {device} nud permanent"
        ));
    };
    for cast in casts() {
        let (bits, nodad) = if cast.v6 { (64, "nodad") } else { (24, "") };
        sh(&format!("ip addr add {}/{bits} dev x {nodad}", cast.node));
        neighbour(cast.client.ip(), "x", CLIENT);
        neighbour(cast.backend.ip(), "x", FIRST);
        neighbour(cast.backend2.ip(), "y", SECOND);
    }
    for index in [IN, OTHER] {
        world.device_at(index, role::OUTWARD);
    }
    turns(&mut world, u32::MAX / 2);
    for (index, last) in [(IN, 0x47), (OTHER, 0x48)] {
        let device = XdpDevice { mac: halves(mac(last)), flags: xdp::SENDS | xdp::BOUNCES };
        xdp_devices(&mut world).insert(index, device, 0).unwrap();
    }
    let program: &mut Xdp = world.datapath.ebpf.program_mut(NAME).unwrap().try_into().unwrap();
    program.load().unwrap_or_else(|e| panic!("{NAME}: {e:?}"));
    // Only then is the device one that a test run can come in by.
    program.attach_to_if_index(IN, XdpMode::Driver).unwrap();
    Some(world)
}

/// As it comes in from `from`.
fn arriving(packet: &Packet, from: u8) -> Vec<u8> {
    addressed(packet.frame(), mac(0x47), mac(from))
}

fn addressed(mut frame: Vec<u8>, to: [u8; 6], from: [u8; 6]) -> Vec<u8> {
    frame[..6].copy_from_slice(&to);
    frame[6..12].copy_from_slice(&from);
    frame
}

/// As it leaves towards `to`.
fn leaving(packet: &Packet, to: u8) -> Vec<u8> {
    let own = if to == SECOND { mac(0x48) } else { mac(0x47) };
    addressed(Packet { ttl: packet.ttl - 1, ..packet.clone() }.frame(), mac(to), own)
}

fn run(world: &mut World, frame: &[u8]) -> (i32, Vec<u8>) {
    // struct xdp_md: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex.
    let words = [0, frame.len() as u32, 0, IN, 0, 0];
    let context: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    world.run_program(NAME, frame, Some(&context)).unwrap_or_else(|e| panic!("{NAME}: {e:?} on {frame:02x?}"))
}

#[track_caller]
fn passes(world: &mut World, frame: &[u8], why: &str) {
    let (rows, reasons) = (world.rows(), world.reasons());
    let (verdict, out) = run(world, frame);
    assert_eq!((verdict, hex(&out)), (PASS, hex(frame)), "{why}");
    assert_eq!(world.rows(), rows, "{why}");
    assert_eq!(world.reasons(), reasons, "{why}");
}

/// The same of a packet that opens a flow of service 1, but the backend that is chosen counts: tc finds it, and chooses no other.
#[track_caller]
fn is_left_to_tc(world: &mut World, packet: &Packet, backend: SocketAddr, why: &str) {
    let (rows, reasons, frame) = (world.rows().len(), world.reasons(), arriving(packet, CLIENT));
    let connections = |world: &World| if world.has_counters(1) { world.counters(1).connections } else { 0 };
    let before = connections(world);
    let (verdict, out) = run(world, &frame);
    assert_eq!((verdict, hex(&out)), (PASS, hex(&frame)), "{why}");
    let entered = world.rows();
    assert_eq!(entered.len(), rows + 3, "{why}: the flow's pair, and what asks for masquerade");
    assert_eq!(connections(world), before + 1, "{why}");
    assert_eq!(world.reasons(), reasons, "{why}");
    assert_eq!(world.translate(Hook::Ingress, packet), (packet.src, backend), "{why}");
    assert_eq!((connections(world), world.rows().len()), (before + 1, entered.len()), "{why}");
}

/// Must be sent to `to` as `expected`, to the byte.
#[track_caller]
fn goes(world: &mut World, packet: &Packet, from: u8, expected: &Packet, to: u8) {
    let (verdict, out) = run(world, &arriving(packet, from));
    let expected = leaving(expected, to);
    assert_eq!(sums(&expected), Sums::Right, "the expectation itself");
    let wanted = if to == SECOND { ACROSS } else { BACK };
    assert_eq!((verdict, hex(&out)), (wanted, hex(&expected)), "in was {packet:?}");
}

/// Opens; returns the node's end of the masqueraded flow.
#[track_caller]
fn opens(world: &mut World, packet: &Packet, node: IpAddr, backend: SocketAddr, to: u8) -> SocketAddr {
    let (verdict, out) = run(world, &arriving(packet, CLIENT));
    assert_eq!(verdict, if to == SECOND { ACROSS } else { BACK }, "{packet:?}");
    let (seen, dst) = ends(&out);
    assert_eq!((seen.ip(), dst), (node, backend));
    assert!((20_000..30_000).contains(&seen.port()), "{seen}");
    assert_eq!(sums(&out), Sums::Right);
    assert_eq!(hex(&out), hex(&leaving(&packet.between(seen, backend), to)));
    seen
}

fn backends(cast: &Cast) -> [(SocketAddr, u8); 2] {
    [(cast.backend, FIRST), (cast.backend2, SECOND)]
}

#[test]
fn what_leaves_again_never_sees_the_stack() {
    let Some(mut world) = outside("what_leaves_again_never_sees_the_stack", Options::default()) else { return };
    let (mut service, mut sent) = (0, 0);
    for cast in casts() {
        for (backend, hop) in backends(&cast) {
            for proto in PROTOS {
                service += 1;
                let spec = Spec { verdicts: usual(), ..Spec::pick_all(service, &[backend]) };
                world.datapath.frontend(cast.vip, proto, &spec);
                let client = at(cast.client, 40_000 + service as u16);
                let open = Packet::opening(proto, client, cast.vip);
                let seen = opens(&mut world, &open, cast.node, backend, hop);
                let answer = Packet::answer(proto, backend, seen);
                goes(&mut world, &answer, hop, &answer.between(cast.vip, client), CLIENT);
                let mut more = vec![Packet::more(proto, client, cast.vip).with_payload(b"")];
                if proto == TCP {
                    more.extend([ACK, ACK | FIN].map(|flags| Packet::tcp(client, cast.vip, flags)));
                } else if !cast.v6 {
                    more.push(Packet { body: Body::Udp { bare: true }, ..open.clone() });
                }
                more.push(Packet { ttl: 2, ..more[more.len() - 1].clone().with_payload(&[7; 1400]) });
                for packet in &more {
                    goes(&mut world, packet, CLIENT, &packet.between(seen, backend), hop);
                }
                let answer = if proto == TCP { Packet::tcp(backend, seen, ACK | FIN) } else { answer };
                goes(&mut world, &answer, hop, &answer.between(cast.vip, client), CLIENT);
                sent += 3 + more.len() as u64;
                let counters = world.counters(service);
                assert_eq!((counters.connections, counters.packets), (1, 3 + more.len() as u64));
                let rows: Vec<_> = world.rows().into_iter().filter(|row| row.service == service).collect();
                assert_eq!(rows.len(), 4, "{rows:?}");
                assert!(rows.iter().all(|row| row.established && row.has_seen()), "{rows:?}");
                world.remove(|row| row.service == service);
            }
        }
    }
    assert_eq!(world.reasons(), [("bypassed", sent)]);
}

/// With the client's address kept, and to a frontend for whom the client is in a source range, with session affinity.
#[test]
fn the_verdict_is_carried_out() {
    let Some(mut world) = outside("the_verdict_is_carried_out", Options::default()) else { return };
    for cast in casts() {
        let mut keeps = [verdict::REJECT; origin::COUNT];
        keeps[origin::EXTERNAL] = verdict::PICK_ALL;
        let plain = Spec { verdicts: keeps, affinity_secs: 600, ..Spec::pick_all(7, &[cast.backend, cast.backend2]) };
        let filtered = Spec { flags: frontend::flags::HAS_SOURCE_RANGES, ..plain.clone() };
        range(&mut world, 7, around(&cast), true);
        for proto in PROTOS {
            world.datapath.frontend(cast.vip, proto, &filtered);
            let mut chosen = None;
            for port in 41_000..41_016 {
                let open = Packet::opening(proto, at(cast.client, port), cast.vip);
                let (verdict, out) = run(&mut world, &arriving(&open, CLIENT));
                assert_eq!(sums(&out), Sums::Right);
                let (src, backend) = ends(&out);
                let (wanted, hop) = if backend == cast.backend { (BACK, FIRST) } else { (ACROSS, SECOND) };
                assert_eq!((verdict, src), (wanted, open.src), "the client's address stays");
                assert_eq!(hex(&out), hex(&leaving(&open.to(backend), hop)));
                assert_eq!(*chosen.get_or_insert(backend), backend, "affinity");
            }
        }
    }
}

/// What XDP chooses and cannot send is entered and counted, and what session affinity remembers of it stands.
#[test]
fn what_is_left_to_the_stack_counts_once() {
    let Some(mut world) = outside("what_is_left_to_the_stack_counts_once", Options::default()) else { return };
    world.device(role::OUTWARD);
    for (cast, service) in casts().into_iter().zip([7, 8]) {
        let far = SocketAddr::new(cast.router, 9);
        let mut verdicts = [verdict::REJECT; origin::COUNT];
        verdicts[origin::EXTERNAL] = verdict::PICK_ALL;
        let sticky = Spec { verdicts, affinity_secs: 600, ..Spec::pick_all(service, &[far]) };
        for proto in PROTOS {
            world.datapath.frontend(cast.vip, proto, &sticky);
            for port in 41_000..41_004 {
                let open = Packet::opening(proto, at(cast.client, port), cast.vip);
                let frame = arriving(&open, CLIENT);
                assert_eq!(run(&mut world, &frame), (PASS, frame));
                world.expect(Hook::Ingress, &open, &open.to(far));
            }
        }
        let counters = world.counters(service);
        assert_eq!((counters.connections, counters.turns), (8, 1), "one client, remembered from the first on");
    }
}

/// A flow goes by either way with every packet.
#[test]
fn a_flow_changes_ways_at_any_packet() {
    let Some(mut world) = outside("a_flow_changes_ways_at_any_packet", Options::default()) else { return };
    let mut dice = Dice::new();
    world.device(role::OUTWARD);
    for round in 0..60 {
        for cast in casts() {
            for (backend, hop) in backends(&cast) {
                for proto in PROTOS {
                    world.service(1, cast.vip, &[backend]);
                    let client = at(cast.client, 45_000 + round);
                    let mut seen = None;
                    let there = if proto == TCP {
                        [SYN, ACK, ACK, ACK | FIN].map(|flags| Packet::tcp(client, cast.vip, flags))
                    } else {
                        [0; 4].map(|_| Packet::udp(client, cast.vip))
                    };
                    for (n, packet) in there.iter().enumerate() {
                        let node = if dice.below(2) == 0 {
                            let (verdict, out) = run(&mut world, &arriving(packet, CLIENT));
                            assert!(verdict == BACK || verdict == ACROSS, "{round}: {verdict} {packet:?}");
                            let (src, _) = ends(&out);
                            assert_eq!(hex(&out), hex(&leaving(&packet.between(src, backend), hop)));
                            src
                        } else {
                            assert_eq!(world.translate(Hook::Ingress, packet), (client, backend));
                            let (src, dst) = world.translate(Hook::Egress, &packet.to(backend));
                            assert_eq!(dst, backend);
                            src
                        };
                        assert_eq!(*seen.get_or_insert(node), node, "one flow, one port");
                        let answer = match n {
                            0 => Packet::answer(proto, backend, node),
                            _ if proto == TCP => Packet::tcp(backend, node, ACK),
                            _ => Packet::udp(backend, node),
                        };
                        if dice.below(2) == 0 {
                            goes(&mut world, &answer, hop, &answer.between(cast.vip, client), CLIENT);
                        } else {
                            world.expect(Hook::Ingress, &answer, &answer.to(client));
                            world.expect(Hook::Egress, &answer.to(client), &answer.between(cast.vip, client));
                        }
                    }
                    let rows = world.rows();
                    assert!(rows.len() == 4 && rows.iter().all(|row| row.established), "{rows:?}");
                    world.remove(|_| true);
                }
            }
        }
    }
    let others: Vec<_> = world.reasons().into_iter().filter(|(name, _)| *name != "bypassed").collect();
    assert_eq!(others, []);
}

/// Openings and packets of flows alike.
#[test]
fn what_is_not_plain_is_left_to_the_stack() {
    let Some(mut world) = outside("what_is_not_plain_is_left_to_the_stack", Options::default()) else { return };
    for cast in casts() {
        for proto in PROTOS {
            world.service(1, cast.vip, &[cast.backend]);
            let known = Packet::opening(proto, at(cast.client, 42_000), cast.vip);
            let seen = opens(&mut world, &known, cast.node, cast.backend, FIRST);
            let answer = Packet::answer(proto, cast.backend, seen);
            goes(&mut world, &answer, FIRST, &answer.between(cast.vip, known.src), CLIENT);
            let (new, next) = (at(cast.client, 42_001), Packet::more(proto, known.src, cast.vip));
            for (n, packet) in [&Packet::opening(proto, new, cast.vip), &next, &answer].into_iter().enumerate() {
                let frame = arriving(packet, CLIENT);
                for length in 14..frame.len() {
                    passes(&mut world, &frame[..length], "cut off");
                }
                passes(&mut world, &arriving(&Packet { ttl: 1, ..packet.clone() }, CLIENT), "no hop to spare");
                passes(&mut world, &addressed(packet.frame(), mac(0x99), mac(CLIENT)), "another host's");
                passes(&mut world, &addressed(packet.frame(), [0xff; 6], mac(CLIENT)), "everybody's");
                let mut tagged = frame[..12].to_vec();
                tagged.extend([0x81, 0, 0, 5]);
                tagged.extend(&frame[12..]);
                passes(&mut world, &tagged, "tagged");
                let special = if cast.v6 {
                    Packet { extensions: vec![(60, vec![0, 0, 1, 4, 0, 0, 0, 0])], ..packet.clone() }
                } else {
                    Packet { options: vec![1, 1, 1, 0], ..packet.clone() }
                };
                passes(&mut world, &arriving(&special, CLIENT), "options");
                let long = packet.clone().with_payload(&[3; 64]);
                let whole = long.transport().len();
                for (from, to) in [(0, 32), (32, whole)] {
                    let fragment = addressed(long.fragment(from, to), mac(0x47), mac(CLIENT));
                    passes(&mut world, &fragment, "a fragment");
                }
                let long = packet.clone().with_payload(&[3; 1500]);
                if n == 0 {
                    is_left_to_tc(&mut world, &long, cast.backend, "too long for the route");
                    world.remove(|row| row.src.port() == 42_001 || row.dst.port() == 42_001);
                } else {
                    passes(&mut world, &arriving(&long, CLIENT), "too long for the route");
                }
                // Only the pseudo-header's sum, as from a socket of this host.
                let mut partial = frame.clone();
                let l4 = super::packet::payload_at(&frame);
                let field = l4 + if proto == TCP { 16 } else { 6 };
                let mut pseudo = Packet::frame(packet);
                pseudo.truncate(l4);
                let sum = pseudo_sum(packet, (frame.len() - l4) as u16);
                partial[field..field + 2].copy_from_slice(&sum.to_be_bytes());
                passes(&mut world, &partial, "checksum to be made");
            }
            // An ICMP error about the flow.
            let quoted = answer.frame()[14..].to_vec();
            let error = if cast.v6 {
                Packet::icmp(cast.backend.ip(), seen.ip(), 1, 4, &quoted)
            } else {
                Packet::icmp(cast.backend.ip(), seen.ip(), 3, 3, &quoted)
            };
            passes(&mut world, &arriving(&error, FIRST), "ICMP");
            passes(&mut world, &arriving(&Packet::other(known.src.ip(), known.dst.ip(), 47), CLIENT), "GRE");
            passes(&mut world, &arriving(&Packet::opening(SCTP, known.src, known.dst), CLIENT), "SCTP");
            world.remove(|_| true);
        }
    }
}

/// F39, F40: what is garbled, or cut, is left as it is or leaves right; and nothing is lost that is not counted.
#[test]
fn what_is_garbled_does_no_harm() {
    let Some(mut world) = outside("what_is_garbled_does_no_harm", Options::default()) else { return };
    let mut zoo = Vec::new();
    for cast in casts() {
        for proto in PROTOS {
            for (vip, (backend, hop)) in [cast.vip, cast.vip2].into_iter().zip(backends(&cast)) {
                world.service(1, vip, &[backend]);
                let open = Packet::opening(proto, at(cast.client, 42_000), vip);
                let seen = opens(&mut world, &open, cast.node, backend, hop);
                let answer = Packet::answer(proto, backend, seen);
                zoo.extend([
                    arriving(&Packet::opening(proto, at(cast.client, 42_001), vip), CLIENT),
                    arriving(&Packet::more(proto, open.src, vip).with_payload(&[3; 40]), CLIENT),
                    arriving(&answer, hop),
                ]);
            }
        }
    }
    let mut dice = Dice::new();
    let (mut sent, mut lost) = (0, 0);
    for _ in 0..60_000 {
        let mut frame = zoo[dice.below(zoo.len())].clone();
        garble(&mut dice, &mut frame);
        if dice.below(8) == 0 {
            frame.truncate(14 + dice.below(frame.len() - 14));
        }
        let (verdict, out) = run(&mut world, &frame);
        match verdict {
            PASS => assert_eq!(hex(&out), hex(&frame)),
            BACK | ACROSS => {
                sent += 1;
                assert_eq!(out.len(), frame.len());
                assert!(sums(&frame) != Sums::Right || sums(&out) == Sums::Right, "{} {}", hex(&frame), hex(&out));
            }
            LOST => lost += 1,
            _ => panic!("{verdict}: {}", hex(&frame)),
        }
    }
    assert!(sent > 10_000, "{sent}");
    let counted = world.reasons().into_iter().filter(|(name, _)| *name != "bypassed").map(|(_, count)| count);
    assert!(lost <= counted.sum::<u64>(), "{lost} lost: {:?}", world.reasons());
}

fn pseudo_sum(packet: &Packet, length: u16) -> u16 {
    let mut bytes = match (packet.src.ip(), packet.dst.ip()) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => [src.octets(), dst.octets()].concat(),
        (IpAddr::V6(src), IpAddr::V6(dst)) => [src.octets(), dst.octets()].concat(),
        _ => panic!("mixed families"),
    };
    bytes.extend([0, packet.proto()]);
    bytes.extend(length.to_be_bytes());
    super::packet::total(&bytes)
}

/// What no host sends from is translated on tc, for the stack to refuse when it routes it; whether the flow is known or not.
#[test]
fn what_nobody_sends_from_is_left_to_the_stack() {
    let Some(mut world) = outside("what_nobody_sends_from_is_left_to_the_stack", Options::default()) else { return };
    world.device(role::OUTWARD);
    // Answers to all of these would find a way.
    for family in ["", "-6"] {
        sh(&format!("ip {family} route add default dev x"));
    }
    let sources = [
        ["0.0.0.0", "0.1.2.3", "224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255"].as_slice(),
        ["::", "ff02::1", "ff0e::1"].as_slice(),
    ];
    for (cast, sources) in casts().into_iter().zip(sources) {
        for (proto, source) in PROTOS.into_iter().flat_map(|proto| sources.iter().map(move |source| (proto, source))) {
            world.service(1, cast.vip, &[cast.backend]);
            let open = Packet::opening(proto, SocketAddr::new(source.parse().unwrap(), 40_000), cast.vip);
            passes(&mut world, &arriving(&open, CLIENT), source);
            assert_eq!(world.translate(Hook::Ingress, &open).1, cast.backend);
            let more = Packet::more(proto, open.src, cast.vip);
            passes(&mut world, &arriving(&more, CLIENT), source);
            world.remove(|_| true);
        }
    }
    assert_eq!(world.reasons(), []);
}

/// XDP confirms no neighbour. What is sent again goes by the stack, which does.
#[test]
fn what_is_sent_again_is_left_to_the_stack() {
    let Some(mut world) = outside("what_is_sent_again_is_left_to_the_stack", Options::default()) else { return };
    for cast in casts() {
        world.service(1, cast.vip, &[cast.backend]);
        let client = at(cast.client, 47_000);
        // Each half of the handshake once, and again after it.
        let syn = Packet::tcp(client, cast.vip, SYN);
        let seen = opens(&mut world, &syn, cast.node, cast.backend, FIRST);
        passes(&mut world, &arriving(&syn, CLIENT), "a SYN again");
        let answer = Packet::tcp(cast.backend, seen, SYN | ACK);
        goes(&mut world, &answer, FIRST, &answer.between(cast.vip, client), CLIENT);
        passes(&mut world, &arriving(&answer, FIRST), "a SYN-ACK again");
        let there = Packet::tcp(client, cast.vip, ACK);
        goes(&mut world, &there, CLIENT, &there.between(seen, cast.backend), FIRST);
        passes(&mut world, &arriving(&answer, FIRST), "a SYN-ACK once more");
        passes(&mut world, &arriving(&syn, CLIENT), "a SYN once more");
        goes(&mut world, &there, CLIENT, &there.between(seen, cast.backend), FIRST);
        world.remove(|_| true);
        // A datagram that nobody has answered, at most one in a second.
        let ask = Packet::udp(client, cast.vip);
        let seen = opens(&mut world, &ask, cast.node, cast.backend, FIRST);
        goes(&mut world, &ask, CLIENT, &ask.between(seen, cast.backend), FIRST);
        for _ in 0..3 {
            world.age(3);
            passes(&mut world, &arriving(&ask, CLIENT), "asked again");
            goes(&mut world, &ask, CLIENT, &ask.between(seen, cast.backend), FIRST);
        }
        let answer = Packet::udp(cast.backend, seen);
        goes(&mut world, &answer, FIRST, &answer.between(cast.vip, client), CLIENT);
        world.age(3);
        goes(&mut world, &ask, CLIENT, &ask.between(seen, cast.backend), FIRST);
        world.remove(|_| true);
    }
}

/// Nor is every flow's packet sent again, or a flow's every packet of one direction: of what goes to each neighbour the stack has one now and then.
#[test]
fn the_stack_has_a_packet_for_each_neighbour_now_and_then() {
    let test = "the_stack_has_a_packet_for_each_neighbour_now_and_then";
    let Some(mut world) = outside(test, Options::default()) else { return };
    for cast in casts() {
        world.service(1, cast.vip, &[cast.backend]);
        world.service(2, cast.vip2, &[cast.backend2]);
        let (open, other) = (Packet::udp(cast.client, cast.vip), Packet::udp(cast.client, cast.vip2));
        let seen = opens(&mut world, &open, cast.node, cast.backend, FIRST);
        opens(&mut world, &other, cast.node, cast.backend2, SECOND);
        let answer = Packet::udp(cast.backend, seen);
        goes(&mut world, &answer, FIRST, &answer.between(cast.vip, open.src), CLIENT);
        for _ in 0..2 {
            turns(&mut world, 0);
            passes(&mut world, &arriving(&open, CLIENT), "to the first backend");
            goes(&mut world, &open, CLIENT, &open.between(seen, cast.backend), FIRST);
            passes(&mut world, &arriving(&answer, FIRST), "to the client");
            goes(&mut world, &answer, FIRST, &answer.between(cast.vip, open.src), CLIENT);
            // A flow that begins.
            let new = Packet::udp(at(cast.client, 48_000), cast.vip2);
            let frame = arriving(&new, CLIENT);
            assert_eq!(run(&mut world, &frame), (PASS, frame), "to the second backend");
            assert_eq!(world.translate(Hook::Ingress, &new).1, cast.backend2);
            let next = at(cast.client, 48_001);
            opens(&mut world, &Packet::udp(next, cast.vip2), cast.node, cast.backend2, SECOND);
            world
                .remove(|row| [48_000, 48_001].contains(&row.src.port()) || [48_000, 48_001].contains(&row.dst.port()));
        }
        turns(&mut world, u32::MAX / 2);
        world.remove(|_| true);
    }
}

/// A device that hands over no frame with a checksum that is yet to be made: there what looks like one is none.
#[test]
fn whole_frames_are_taken_whatever_they_look_like() {
    let Some(mut world) = outside("whole_frames_are_taken_whatever_they_look_like", Options::default()) else { return };
    let own = xdp_devices(&mut world).get(&IN, 0).unwrap();
    for cast in casts() {
        for proto in PROTOS {
            world.service(1, cast.vip, &[cast.backend]);
            // With the payload that makes the sum what the pseudo-header's alone is.
            let alike = (0..=u16::MAX)
                .map(|n| Packet::opening(proto, cast.client, cast.vip).with_payload(&n.to_be_bytes()))
                .find(|packet| {
                    let frame = packet.frame();
                    let l4 = super::packet::payload_at(&frame);
                    let field = l4 + if proto == TCP { 16 } else { 6 };
                    frame[field..field + 2] == pseudo_sum(packet, (frame.len() - l4) as u16).to_be_bytes()
                })
                .unwrap();
            passes(&mut world, &arriving(&alike, CLIENT), "it may be unfinished");
            let whole = XdpDevice { flags: own.flags | xdp::SUMS, ..own };
            xdp_devices(&mut world).insert(IN, whole, 0).unwrap();
            opens(&mut world, &alike, cast.node, cast.backend, FIRST);
            xdp_devices(&mut world).insert(IN, own, 0).unwrap();
            world.remove(|_| true);
        }
    }
}

/// What is to be refused, dropped or is not ours; tc counts it.
#[test]
fn refusals_are_left_to_tc() {
    let Some(mut world) = outside("refusals_are_left_to_tc", Options::default()) else { return };
    let mut service = 2;
    for cast in casts() {
        for proto in PROTOS {
            service += 1;
            let open = Packet::opening(proto, cast.client, cast.vip);
            let frame = arriving(&open, CLIENT);
            passes(&mut world, &frame, "no frontend");
            if proto == TCP {
                for flags in [ACK, FIN | ACK, RST, SYN | ACK] {
                    let packet = Packet::tcp(cast.client, cast.vip, flags);
                    passes(&mut world, &arriving(&packet, CLIENT), "no flow");
                }
            }
            world.datapath.frontend(cast.vip, proto, &Spec::pick_all(service, &[]));
            passes(&mut world, &frame, "no endpoints");
            for action in [verdict::DROP, verdict::REJECT, verdict::PASS] {
                let spec = Spec { verdicts: [action; origin::COUNT], ..Spec::pick_all(service, &[cast.backend]) };
                world.datapath.frontend(cast.vip, proto, &spec);
                passes(&mut world, &frame, "the verdict");
            }
            let spec = Spec { verdicts: usual(), ..Spec::pick_all(service, &[cast.backend]) };
            let filtered = Spec { flags: frontend::flags::HAS_SOURCE_RANGES, ..spec.clone() };
            world.datapath.frontend(cast.vip, proto, &filtered);
            passes(&mut world, &frame, "in no source range");
            world.datapath.frontend(cast.vip, proto, &spec);
            // The loopback network has no way back, anyhow; one of ours is one that has a guard.
            world.datapath.guard(cast.client.ip(), 9);
            passes(&mut world, &frame, "a martian");
            world.datapath.unguard(cast.client.ip());
            assert!(!world.has_counters(service));
            opens(&mut world, &open, cast.node, cast.backend, FIRST);
            world.datapath.forget(cast.vip, proto);
            world.remove(|_| true);
        }
    }
    assert_eq!(world.reasons(), [("bypassed", 4)]);
}

/// What the stack knows takes a flow back to it at any time. One that is not to be opened from there leaves no trace; one that XDP cannot
/// send, tc finds.
#[test]
fn the_routes_decide() {
    let Some(mut world) = outside("the_routes_decide", Options::default()) else { return };
    for cast in casts() {
        let (client, backend) = (cast.client.ip(), cast.backend.ip());
        let proc = if cast.v6 { "/proc/sys/net/ipv6/conf/all/forwarding" } else { "/proc/sys/net/ipv4/ip_forward" };
        let stay = |ip: IpAddr, last: u8| {
            format!("ip neigh replace {ip} lladdr 02:00:00:00:00:{last:02x} dev x nud permanent")
        };
        let local = if cast.v6 { "ip -6" } else { "ip" };
        // Whether it holds for known flows, too, and whether one that begins is entered.
        let cases = [
            (format!("echo 0 > {proc}"), format!("echo 1 > {proc}"), "forwarding is off", (true, false)),
            (format!("ip neigh del {backend} dev x"), stay(backend, FIRST), "the neighbour is not known", (true, true)),
            (
                format!("ip route replace unreachable {backend}; ip route del {backend} dev x || :"),
                format!("ip route del unreachable {backend}; ip route replace {backend} dev x"),
                "no way there",
                (true, true),
            ),
            (
                format!("{local} route add local {backend} dev lo table local"),
                format!("{local} route del local {backend} dev lo table local"),
                "the backend is here",
                (true, true),
            ),
            (
                format!("ip route replace {client} dev y"),
                format!("ip route replace {client} dev x"),
                "the client is elsewhere",
                (false, false),
            ),
            (
                format!("{local} route add local {client} dev lo table local"),
                format!("{local} route del local {client} dev lo table local"),
                "the client's address is ours",
                (false, false),
            ),
        ];
        for proto in PROTOS {
            world.service(1, cast.vip, &[cast.backend]);
            let open = Packet::opening(proto, at(cast.client, 42_000), cast.vip);
            let new = Packet::opening(proto, at(cast.client, 42_001), cast.vip);
            let seen = opens(&mut world, &open, cast.node, cast.backend, FIRST);
            let answer = Packet::answer(proto, cast.backend, seen);
            goes(&mut world, &answer, FIRST, &answer.between(cast.vip, open.src), CLIENT);
            let known = Packet::more(proto, open.src, cast.vip);
            for (change, back, why, (for_known, entered)) in &cases {
                sh(change);
                if *for_known {
                    passes(&mut world, &arriving(&known, CLIENT), why);
                }
                if *entered {
                    is_left_to_tc(&mut world, &new, cast.backend, why);
                    world.remove(|row| row.src.port() == 42_001 || row.dst.port() == 42_001);
                } else {
                    passes(&mut world, &arriving(&new, CLIENT), why);
                }
                sh(back);
                // A neighbour's or a route's own settings.
                goes(&mut world, &known, CLIENT, &known.between(seen, cast.backend), FIRST);
            }
            world.remove(|_| true);
            // Where XDP may not send to.
            world.service(1, cast.vip, &[cast.backend2]);
            let sends = XdpDevice { mac: halves(mac(0x48)), flags: xdp::SENDS };
            let own = xdp_devices(&mut world).get(&IN, 0).unwrap();
            xdp_devices(&mut world).insert(OTHER, XdpDevice { flags: 0, ..sends }, 0).unwrap();
            is_left_to_tc(&mut world, &new, cast.backend2, "a device that takes no frames");
            world.remove(|_| true);
            xdp_devices(&mut world).remove(&OTHER).unwrap();
            is_left_to_tc(&mut world, &new, cast.backend2, "a device without XDP");
            world.remove(|_| true);
            xdp_devices(&mut world).insert(OTHER, sends, 0).unwrap();
            passes(&mut world, &addressed(new.frame(), mac(0x99), mac(CLIENT)), "another host's, across");
            xdp_devices(&mut world).remove(&IN).unwrap();
            passes(&mut world, &arriving(&new, CLIENT), "a device whose own address is not known");
            // A device that XDP_TX is no use on sends back by a redirection to itself, if it takes those.
            world.service(1, cast.vip, &[cast.backend]);
            for (flags, verdict) in [(0, PASS), (xdp::SENDS, ACROSS), (xdp::BOUNCES, BACK)] {
                world.remove(|_| true);
                xdp_devices(&mut world).insert(IN, XdpDevice { flags, ..own }, 0).unwrap();
                assert_eq!(run(&mut world, &arriving(&new, CLIENT)).0, verdict, "{flags}");
            }
            world.remove(|_| true);
            world.service(1, cast.vip, &[cast.backend2]);
            xdp_devices(&mut world).insert(IN, own, 0).unwrap();
            opens(&mut world, &new, cast.node, cast.backend2, SECOND);
            world.remove(|_| true);
        }
    }
}

/// A backend that XDP cannot reach gets its share like the other: its flows go on by tc.
#[test]
fn a_choice_is_made_once() {
    let Some(mut world) = outside("a_choice_is_made_once", Options::default()) else { return };
    world.device(role::OUTWARD);
    xdp_devices(&mut world).remove(&OTHER).unwrap();
    for cast in casts() {
        world.service(1, cast.vip, &[cast.backend, cast.backend2]);
        let mut near = 0;
        for port in 0..400 {
            let open = Packet::udp(at(cast.client, 44_000 + port), cast.vip);
            let (verdict, out) = run(&mut world, &arriving(&open, CLIENT));
            if verdict == BACK {
                assert_eq!(ends(&out).1, cast.backend);
                near += 1;
            } else {
                assert_eq!((verdict, hex(&out)), (PASS, hex(&arriving(&open, CLIENT))));
                assert_eq!(world.translate(Hook::Ingress, &open).1, cast.backend2);
            }
        }
        // Six standard deviations.
        assert!((140..260).contains(&near), "{near} of 400");
    }
    assert_eq!(world.counters(1).connections, 800);
}

/// What has to do with flows that are lost or over.
#[test]
fn what_is_to_be_put_right_is_left_to_tc() {
    let Some(mut world) = outside("what_is_to_be_put_right_is_left_to_tc", Options::default()) else { return };
    world.device(role::OUTWARD);
    for cast in casts() {
        world.service(1, cast.vip, &[cast.backend]);
        let client = at(cast.client, 43_000);
        let seen = super::flows::masquerade(&mut world, TCP, client, cast.vip, cast.node);
        let ack = Packet::tcp(client, cast.vip, ACK);
        goes(&mut world, &ack, CLIENT, &ack.between(seen, cast.backend), FIRST);
        // The pair that masquerades is evicted: tc asks for it again.
        let removed = world.remove(|row| row.is(flags::MASQUERADE) && row.hook == Hook::Egress);
        assert_eq!(removed, 1);
        let (verdict, out) = run(&mut world, &arriving(&ack, CLIENT));
        assert_eq!((verdict, hex(&out)), (PASS, hex(&arriving(&ack, CLIENT))));
        world.age(2);
        world.expect(Hook::Ingress, &ack, &ack.to(cast.backend));
        world.expect(Hook::Egress, &ack.to(cast.backend), &ack.between(seen, cast.backend));
        goes(&mut world, &ack, CLIENT, &ack.between(seen, cast.backend), FIRST);
        // Its backend is deleted.
        world.mark(flags::RESET);
        passes(&mut world, &arriving(&ack, CLIENT), "to be reset");
        passes(&mut world, &arriving(&Packet::tcp(client, cast.vip, SYN), CLIENT), "chosen for anew");
        world.remove(|_| true);
        // Over, and its ports used again.
        let client = at(cast.client, 43_001);
        super::flows::masquerade(&mut world, TCP, client, cast.vip, cast.node);
        let reset = Packet::tcp(client, cast.vip, RST);
        let (verdict, _) = run(&mut world, &arriving(&reset, CLIENT));
        assert_eq!(verdict, BACK);
        passes(&mut world, &arriving(&Packet::tcp(client, cast.vip, SYN), CLIENT), "over");
        let seen = super::flows::masquerade(&mut world, TCP, client, cast.vip, cast.node);
        goes(&mut world, &ack.from(client), CLIENT, &ack.between(seen, cast.backend), FIRST);
        world.remove(|_| true);
    }
}

/// No port is left: the flow is lost, as on tc, and counted.
#[test]
fn running_out_of_ports_is_counted() {
    let options = Options { ports: (25_000, 25_001), ..Options::default() };
    let Some(mut world) = outside("running_out_of_ports_is_counted", options) else { return };
    for (n, cast) in casts().into_iter().enumerate() {
        world.service(1, cast.vip, &[cast.backend]);
        let sent: Vec<i32> = (0..3)
            .map(|port| run(&mut world, &arriving(&Packet::udp(at(cast.client, 50_000 + port), cast.vip), CLIENT)).0)
            .collect();
        assert_eq!(sent, [BACK, BACK, LOST]);
        assert_eq!(world.reason(Reason::MasqueradeExhausted), (n + 1) as u64);
    }
}
