//! Packets that are cut, garbled, at odds with themselves (F39, F40, F42): whatever comes, what leaves is right or was not touched.

use proxy_common::device::role;

use super::{
    flows::masquerade,
    packet::{Body, ETHERNET, Packet, SYN, Sums, sums},
    world::{BOUNCE, DROP, Dice, Hook, NEXT, Options, PROTOS, UDP, World, at, casts, hex, world},
};

/// Every packet shape, for cutting and garbling. The flows they belong to exist.
fn zoo(world: &mut World) -> Vec<(Hook, Vec<u8>)> {
    let mut zoo = Vec::new();
    for cast in casts() {
        world.service(1, cast.vip, &[cast.backend]);
        world.service(2, cast.vip2, &[]);
        world.datapath.guard(cast.vip.ip(), 1);
        world.device(role::OUTWARD);
        for proto in PROTOS {
            let seen = masquerade(world, proto, cast.client, cast.vip, cast.node);
            let pod = at(cast.client, 45_000);
            world.device(role::POD);
            world.establish(proto, pod, cast.vip);
            let more = Packet::more(proto, pod, cast.vip);
            let mut bare = more.clone();
            if proto == UDP && !cast.v6 {
                bare.body = Body::Udp { bare: true };
            }
            bare.options = vec![1; 8];
            bare.extensions = vec![(0, vec![0, 0, 1, 4, 0, 0, 0, 0]), (60, vec![0, 0, 1, 4, 0, 0, 0, 0])];
            let big = more.clone().with_payload(&[3; 100]);
            zoo.extend([
                (Hook::Ingress, Packet::opening(proto, at(pod, 45_001), cast.vip).frame()),
                (Hook::Ingress, Packet::opening(proto, pod, cast.vip2).frame()),
                (Hook::Ingress, Packet::opening(proto, pod, at(cast.vip, 99)).frame()),
                (Hook::Ingress, more.frame()),
                (Hook::Ingress, bare.frame()),
                (Hook::Ingress, big.fragment(0, 64)),
                (Hook::Ingress, big.fragment(64, 104)),
                (Hook::Ingress, more.atomic_fragment()),
                (Hook::Egress, more.between(cast.backend, pod).frame()),
                (Hook::Egress, bare.between(cast.backend, pod).frame()),
                (Hook::Egress, more.between(cast.client, cast.backend).frame()),
                (Hook::Ingress, more.between(cast.backend, seen).frame()),
            ]);
            let quote = |packet: &Packet| packet.frame()[14..].to_vec();
            let kind = if cast.v6 { (2, 0) } else { (3, 4) };
            let about = |to, quoted: &Packet| Packet::icmp(cast.router, to, kind.0, kind.1, &quote(quoted)).frame();
            zoo.extend([
                (Hook::Ingress, about(cast.vip.ip(), &more.between(cast.vip, pod))),
                (Hook::Egress, about(pod.ip(), &more.between(pod, cast.backend))),
                (Hook::Ingress, about(cast.node, &more.between(seen, cast.backend))),
                (Hook::Ingress, about(cast.vip.ip(), &bare.between(cast.vip, pod))),
            ]);
        }
        let echo = if cast.v6 { 128 } else { 8 };
        zoo.push((Hook::Ingress, Packet::icmp(cast.client.ip(), cast.vip.ip(), echo, 0, b"ping").frame()));
        zoo.push((Hook::Ingress, Packet::other(cast.client.ip(), cast.vip.ip(), 132).with_payload(&[9; 20]).frame()));
    }
    zoo
}

/// The same with a VLAN tag, and with two.
fn tagged(mut zoo: Vec<(Hook, Vec<u8>)>) -> Vec<(Hook, Vec<u8>)> {
    for (hook, frame) in zoo.clone() {
        for tags in [&[0x81, 0, 0, 5][..], &[0x88, 0xa8, 0, 6, 0x81, 0, 0, 5]] {
            let mut frame = frame.clone();
            frame.splice(12..12, tags.iter().copied());
            zoo.push((hook, frame));
        }
    }
    zoo
}

/// Each at the hook where it belongs, and at the other one.
fn both_hooks(zoo: Vec<(Hook, Vec<u8>)>) -> impl Iterator<Item = (Hook, Vec<u8>)> {
    zoo.into_iter().flat_map(|(_, frame)| [(Hook::Ingress, frame.clone()), (Hook::Egress, frame)])
}

/// What holds for any packet whatever.
#[track_caller]
pub(crate) fn holds(hook: Hook, frame: &[u8], verdict: i32, out: &[u8]) {
    let about = || format!("{hook:?} {verdict}: {} became {}", hex(frame), hex(out));
    match verdict {
        NEXT => {
            assert_eq!(out.len(), frame.len(), "{}", about());
            if out != frame && sums(frame) == Sums::Right {
                assert_eq!(sums(out), Sums::Right, "{}", about());
            }
            if out != frame {
                assert_eq!(out[..ETHERNET], frame[..ETHERNET], "{}", about());
            }
        }
        DROP => {}
        BOUNCE => assert_eq!(sums(out), Sums::Right, "{}", about()),
        _ => panic!("{}", about()),
    }
}

#[test]
fn packets_cut_anywhere_do_no_harm() {
    let Some(mut world) = world("packets_cut_anywhere_do_no_harm", Options::default()) else { return };
    let mut runs = 0;
    for (hook, frame) in both_hooks(tagged(zoo(&mut world))) {
        for len in 0..frame.len() {
            let name = if hook == Hook::Ingress { "tc_ingress_ether" } else { "tc_egress_ether" };
            // The kernel's test itself refuses what no device would hand up.
            let Ok((verdict, out)) = world.run_program(name, &frame[..len], None) else {
                assert!(len < ETHERNET + 40, "{len}");
                continue;
            };
            runs += 1;
            holds(hook, &frame[..len], verdict, &out);
        }
    }
    assert!(runs > 20_000, "{runs}");
}

#[test]
fn broken_headers_are_left_alone() {
    let Some(mut world) = world("broken_headers_are_left_alone", Options::default()) else { return };
    for cast in casts() {
        world.service(1, cast.vip, &[cast.backend]);
        let frame = Packet::tcp(cast.client, cast.vip, SYN).frame();
        let with = |at: usize, byte: u8| {
            let mut frame = frame.clone();
            frame[at] = byte;
            frame
        };
        // The version of the other family, and of none.
        for version in [0x00, 0x45 ^ 0x60 ^ (frame[14] & 0xf0), 0x55, 0xf5] {
            if version & 0xf0 != frame[14] & 0xf0 {
                world.untouched(Hook::Ingress, &with(14, version));
            }
        }
        if !cast.v6 {
            for ihl in 0..5 {
                world.untouched(Hook::Ingress, &with(14, 0x40 | ihl));
            }
            // Longer than the packet.
            world.untouched(Hook::Ingress, &with(14, 0x4f));
        }
    }
    assert_eq!(world.rows(), []);
}

#[test]
fn a_total_length_that_lies_does_no_harm() {
    let Some(mut world) = world("a_total_length_that_lies_does_no_harm", Options::default()) else { return };
    for (hook, frame) in zoo(&mut world) {
        let field = if frame[12] == 8 { 16 } else { 18 };
        for length in [0_u16, 1, 19, 20, 21, 27, 28, 40, 1500, 65_535] {
            let mut frame = frame.clone();
            frame[field..field + 2].copy_from_slice(&length.to_be_bytes());
            let (verdict, out) = world.run(hook, &frame);
            holds(hook, &frame, verdict, &out);
        }
    }
}

/// F39: a header that says it is longer than it is has its ports in its payload, and a shorter one in its options: that is what it says.
#[test]
fn a_header_length_that_lies_does_no_harm() {
    let Some(mut world) = world("a_header_length_that_lies_does_no_harm", Options::default()) else { return };
    for (hook, frame) in both_hooks(zoo(&mut world)) {
        if frame[12] != 8 {
            continue;
        }
        for ihl in 0..16 {
            let mut frame = frame.clone();
            frame[14] = 0x40 | ihl;
            for mended in [false, true] {
                if mended {
                    mend(&mut frame);
                }
                let (verdict, out) = world.run(hook, &frame);
                holds(hook, &frame, verdict, &out);
                assert!(ihl >= 5 || (verdict, &out) == (NEXT, &frame), "{}", hex(&frame));
            }
        }
    }
}

/// F42: it is the stack that takes a hop off, and tells the sender where there is none left. What is none of a translation's business
/// stays as it is: hops, "don't fragment" and the bit beside it, class and congestion, flow label.
#[test]
fn hops_and_flags_stay_as_they_are() {
    let Some(mut world) = world("hops_and_flags_stay_as_they_are", Options::default()) else { return };
    for cast in casts() {
        world.service(1, cast.vip, &[cast.backend]);
        for proto in PROTOS {
            let open = Packet::opening(proto, cast.client, cast.vip);
            let answer = Packet::answer(proto, cast.backend, cast.client);
            for (hook, from, to) in
                [(Hook::Ingress, &open, open.to(cast.backend)), (Hook::Egress, &answer, answer.from(cast.vip))]
            {
                for ttl in [0, 1, 2, 255] {
                    let with = |packet: &Packet| Packet { ttl, ..packet.clone() };
                    world.expect(hook, &with(from), &with(&to));
                }
                let bits: &[(usize, u8)] = if cast.v6 {
                    &[(14, 0x0f), (15, 0xff), (16, 0xff), (17, 0xff)]
                } else {
                    &[(15, 0x03), (15, 0xb8), (20, 0x40), (20, 0x80), (20, 0xc0)]
                };
                for (at, bits) in bits {
                    let with = |packet: &Packet| {
                        let mut frame = packet.frame();
                        frame[*at] |= bits;
                        mend(&mut frame);
                        frame
                    };
                    let (verdict, out) = world.run(hook, &with(from));
                    assert_eq!((verdict, hex(&out)), (NEXT, hex(&with(&to))), "{at} {bits:02x}");
                }
            }
        }
    }
    assert_eq!(world.reasons(), []);
}

/// F40: bytes at random behind an Ethernet type, of any length. `PACKETS_RANDOM` says how many.
#[test]
fn random_bytes_do_no_harm() {
    let Some(mut world) = world("random_bytes_do_no_harm", Options::default()) else { return };
    let zoo = zoo(&mut world);
    let count = std::env::var("PACKETS_RANDOM").ok().and_then(|n| n.parse().ok()).unwrap_or(100_000_u32);
    let mut dice = Dice::new();
    let (mut runs, mut parsed) = (0, 0);
    for _ in 0..count {
        let hook = if dice.below(2) == 0 { Hook::Ingress } else { Hook::Egress };
        let (_, like) = &zoo[dice.below(zoo.len())];
        let mut frame: Vec<u8> = (0..ETHERNET + 6 + dice.below(120)).map(|_| dice.next() as u8).collect();
        // Mostly a type, a version and ends that lead somewhere: else nothing is looked at.
        frame[..6].copy_from_slice(&like[..6]);
        if dice.below(8) != 0 {
            frame[12..14].copy_from_slice(&like[12..14]);
            frame[14] = like[14] & 0xf0 | if dice.below(2) == 0 { 5 } else { frame[14] & 15 };
        }
        let ends = if like[12] == 8 { 22..34 } else { 20..54 };
        if dice.below(4) != 0 && frame.len() > ends.end && like.len() > ends.end {
            frame[ends.clone()].copy_from_slice(&like[ends]);
        }
        let name = if hook == Hook::Ingress { "tc_ingress_ether" } else { "tc_egress_ether" };
        let Ok((verdict, out)) = world.run_program(name, &frame, None) else {
            assert!(frame.len() < ETHERNET + 40, "{}", hex(&frame));
            continue;
        };
        runs += 1;
        parsed += usize::from(verdict != NEXT || out != frame);
        holds(hook, &frame, verdict, &out);
    }
    assert!(runs > count / 2, "{runs}");
    assert!(parsed > count as usize / 100, "{parsed} of {runs} came to anything");
}

/// Valid packets with some bytes changed: the rest of the world may send anything.
#[test]
fn garbled_packets_do_no_harm() {
    let Some(mut world) = world("garbled_packets_do_no_harm", Options::default()) else { return };
    let zoo = zoo(&mut world);
    let mut dice = Dice::new();
    let mut changed = 0;
    for _ in 0..120_000 {
        let (hook, frame) = &zoo[dice.below(zoo.len())];
        let hook = if dice.below(8) == 0 { Hook::Egress } else { *hook };
        let mut frame = frame.clone();
        garble(&mut dice, &mut frame);
        let (verdict, out) = world.run(hook, &frame);
        holds(hook, &frame, verdict, &out);
        changed += usize::from(out != frame);
    }
    assert!(changed > 20_000, "{changed}");
}

/// Changes some bytes behind the Ethernet addresses, or none.
pub(crate) fn garble(dice: &mut Dice, frame: &mut [u8]) {
    for _ in 0..dice.below(4) {
        // Headers mostly.
        let reach = if dice.below(3) == 0 { frame.len() } else { frame.len().min(64) };
        let at = 12 + dice.below(reach - 12);
        frame[at] = match dice.below(4) {
            0 => dice.next() as u8,
            1 => frame[at] ^ (1 << dice.below(8)),
            2 => 0,
            _ => 0xff,
        };
    }
    // Checksums right again, half the time: only then is there something to keep right.
    if dice.below(2) == 0 {
        mend(frame);
    }
}

/// Puts right the checksums of what parses.
fn mend(frame: &mut [u8]) {
    if frame[12..14] == [8, 0] {
        let ihl = usize::from(frame[14] & 15) * 4;
        if ihl >= 20 && frame.len() >= 14 + ihl {
            frame[24..26].fill(0);
            let sum = !super::packet::total(&frame[14..14 + ihl]);
            frame[24..26].copy_from_slice(&sum.to_be_bytes());
        }
    }
    if sums(frame) != Sums::WrongTransport {
        return;
    }
    let at = super::packet::payload_at(frame);
    let proto = {
        let packet = etherparse::SlicedPacket::from_ethernet(frame).unwrap();
        packet.net.as_ref().unwrap().ip_payload_ref().unwrap().ip_number.0
    };
    if proto == 132 {
        frame[at + 8..at + 12].fill(0);
        let sum = super::packet::crc32c(&frame[at..]);
        return frame[at + 8..at + 12].copy_from_slice(&sum.to_le_bytes());
    }
    let field = at
        + match proto {
            6 => 16,
            17 => 6,
            _ => 2,
        };
    let ip = &frame[14..at];
    let (src, dst) = if ip[0] >> 4 == 4 { (12..16, 16..20) } else { (8..24, 24..40) };
    let len =
        if proto == 17 { usize::from(u16::from_be_bytes([frame[at + 4], frame[at + 5]])) } else { frame.len() - at };
    let mut bytes = Vec::new();
    if proto != 1 {
        bytes.extend_from_slice(&ip[src]);
        bytes.extend_from_slice(&ip[dst]);
        bytes.extend_from_slice(&(len as u32).to_be_bytes());
        bytes.extend_from_slice(&[0, proto]);
    }
    frame[field..field + 2].fill(0);
    bytes.extend_from_slice(&frame[at..]);
    let mut sum = !super::packet::total(&bytes);
    if sum == 0 && proto == 17 {
        sum = 0xffff;
    }
    frame[field..field + 2].copy_from_slice(&sum.to_be_bytes());
}
