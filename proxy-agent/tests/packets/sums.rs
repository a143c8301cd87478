//! Packets that came with a sum over all of them (`CHECKSUM_COMPLETE`, as many network cards make it). A receiver that is not this node's
//! stack, a pod, goes by it: where a rewrite leaves it behind, the kernel sums up anew, and complains of the hardware. The kernel
//! itself compares the two here, when the program has run.

use proxy_common::{connection::flags, device::role};

use super::{
    flows::{masquerade, masqueraded_answer},
    icmp,
    packet::{ACK, Body, FIN, Packet, SYN, Sums, sums},
    world::{BOUNCE, Hook, NEXT, Options, TCP, UDP, World, at, casts, hex, world},
};

/// A world whose packets have sums; none where the kernel cannot make them.
fn summed(test: &str) -> Option<World> {
    let mut world = world(test, Options::default())?;
    let bystander = Packet::udp(casts()[0].client, casts()[0].backend).frame();
    if let Err(e) = world.run_summed("tc_ingress_ether", &bystander) {
        println!("SKIP {test}: this kernel runs no test with CHECKSUM_COMPLETE ({e})");
        return None;
    }
    world.summed = true;
    Some(world)
}

/// Even and odd, short and long.
fn payloads() -> [Vec<u8>; 5] {
    [vec![], vec![0xa5], b"payload".to_vec(), vec![0xff; 64], (0..1401).map(|n| (n * 31 % 251) as u8).collect()]
}

#[test]
fn a_rewrite_takes_the_hardwares_sum_along() {
    let Some(mut world) = summed("a_rewrite_takes_the_hardwares_sum_along") else { return };
    for cast in casts() {
        world.service(1, cast.vip, &[cast.backend]);
        for (n, proto) in [TCP, UDP].into_iter().enumerate() {
            world.device(role::POD);
            world.establish(proto, cast.client, cast.vip);
            // Beside it, through another VIP: with another source port.
            world.service(2, cast.vip2, &[cast.backend]);
            let (other, _) = world.translate(Hook::Ingress, &Packet::opening(proto, cast.client, cast.vip2));
            assert_ne!(other, cast.client);
            let seen = masquerade(&mut world, proto, at(cast.client, 50_000), cast.vip, cast.node);
            for payload in payloads() {
                world.device(role::POD);
                let more = Packet::more(proto, cast.client, cast.vip).with_payload(&payload);
                world.expect(Hook::Ingress, &more, &more.to(cast.backend));
                let answer = more.between(cast.backend, cast.client);
                world.expect(Hook::Egress, &answer, &answer.from(cast.vip));
                world.expect(Hook::Ingress, &more.to(cast.vip2), &more.between(other, cast.backend));
                let answer = more.between(cast.backend, other);
                world.expect(Hook::Egress, &answer, &answer.between(cast.vip2, cast.client));
                // Behind options and extension headers.
                let mut behind = more.clone();
                behind.options = vec![1; 8];
                behind.extensions = if cast.v6 { vec![(60, vec![0, 0, 1, 4, 0, 0, 0, 0])] } else { vec![] };
                world.expect(Hook::Ingress, &behind, &behind.to(cast.backend));
                world.expect(Hook::Ingress, &behind.to(cast.vip2), &behind.between(other, cast.backend));
                let answer = behind.between(cast.backend, other);
                world.expect(Hook::Egress, &answer, &answer.between(cast.vip2, cast.client));
                // Without a checksum of its own; over IPv6 tunnels may go so (RFC 6935).
                if proto == UDP {
                    let mut bare = more.clone();
                    bare.body = Body::Udp { bare: true };
                    for (hook, from, to) in [
                        (Hook::Ingress, &bare, bare.to(cast.backend)),
                        (Hook::Ingress, &bare.to(cast.vip2), bare.between(other, cast.backend)),
                        (Hook::Egress, &bare.between(cast.backend, cast.client), bare.between(cast.vip, cast.client)),
                    ] {
                        let (verdict, out) = world.run(hook, &from.frame());
                        assert_eq!((verdict, hex(&out)), (NEXT, hex(&to.frame())));
                    }
                }
                // Masqueraded: both ways through both hooks.
                world.device(role::OUTWARD);
                let more = more.from(at(cast.client, 50_000));
                world.expect(Hook::Ingress, &more, &more.to(cast.backend));
                world.expect(Hook::Egress, &more.to(cast.backend), &more.between(seen, cast.backend));
                masqueraded_answer(&mut world, &more.between(cast.backend, seen), more.src, cast.vip);
            }
            // Fragments, the first of which has the transport's header.
            world.device(role::POD);
            let mut more = Packet::more(proto, cast.client, cast.vip).with_payload(&[0x5a; 3001]);
            more.id = 0x7700 + n as u32;
            let end = more.transport().len();
            let answer = more.between(cast.backend, cast.client);
            for (hook, from, to) in [
                (Hook::Ingress, &more, more.to(cast.backend)),
                (Hook::Ingress, &more.to(cast.vip2), more.between(other, cast.backend)),
                (Hook::Egress, &answer, answer.from(cast.vip)),
            ] {
                for (a, b) in [(0, 1480), (1480, 2960), (2960, end)] {
                    let (verdict, out) = world.run(hook, &from.fragment(a, b));
                    assert_eq!((verdict, hex(&out)), (NEXT, hex(&to.fragment(a, b))));
                }
            }
            world.remove(|_| true);
        }
    }
    assert_eq!(world.reasons().iter().filter(|(name, _)| *name != "port_remapped").count(), 0, "{:?}", world.reasons());
}

/// An error's own checksum is over all that it quotes.
#[test]
fn a_translated_error_takes_the_hardwares_sum_along() {
    let Some(mut world) = summed("a_translated_error_takes_the_hardwares_sum_along") else { return };
    for cast in casts() {
        world.service(1, cast.vip, &[cast.backend]);
        world.service(2, cast.vip2, &[cast.backend]);
        for proto in [TCP, UDP] {
            world.establish(proto, cast.client, cast.vip);
            let (other, _) = world.translate(Hook::Ingress, &Packet::opening(proto, cast.client, cast.vip2));
            for (client, kind) in [cast.client, other].into_iter().zip(icmp::kinds(cast.v6)) {
                for speaker in [cast.router, cast.backend.ip()] {
                    let quoted = Packet::opening(proto, client, cast.backend);
                    let about = icmp::error(speaker, client.ip(), *kind, &quoted, 4000);
                    icmp::tell(&mut world, Hook::Egress, &about, &quoted);
                }
            }
            for vip in [cast.vip, cast.vip2] {
                for speaker in [cast.router, cast.client.ip()] {
                    let quoted = Packet::answer(proto, vip, cast.client);
                    let about = icmp::error(speaker, vip.ip(), icmp::kinds(cast.v6)[0], &quoted, 4000);
                    icmp::tell(&mut world, Hook::Ingress, &about, &quoted);
                }
            }
            world.remove(|_| true);
        }
    }
}

/// What is sent back is made out of the packet that came. Where that had more than is sent, the kernel gives the sum up as it cuts; its
/// comparison does not heed that, so nothing here has a payload.
#[test]
fn a_refusal_takes_the_hardwares_sum_along() {
    let Some(mut world) = summed("a_refusal_takes_the_hardwares_sum_along") else { return };
    for cast in casts() {
        world.service(1, cast.vip, &[]);
        world.service(2, cast.vip2, &[cast.backend]);
        world.establish(TCP, cast.client, cast.vip2);
        world.mark(flags::RESET);
        for behind in [false, true] {
            for (packet, to) in
                [(SYN, cast.vip), (FIN | ACK, cast.vip2)].map(|(flags, to)| (Packet::tcp(cast.client, to, flags), to))
            {
                let mut packet = packet.with_payload(b"");
                if behind {
                    packet.options = vec![1; 8];
                    packet.extensions = if cast.v6 { vec![(60, vec![0, 0, 1, 4, 0, 0, 0, 0])] } else { vec![] };
                }
                let (verdict, out) = world.run(Hook::Ingress, &packet.frame());
                assert_eq!((verdict, sums(&out)), (BOUNCE, Sums::Right), "{to}");
            }
            let datagram = Packet::udp(cast.client, cast.vip).with_payload(b"");
            assert_eq!(world.run(Hook::Ingress, &datagram.frame()).0, BOUNCE);
        }
        world.remove(|_| true);
    }
}
