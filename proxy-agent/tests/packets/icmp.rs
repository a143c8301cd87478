//! ICMP errors about translated flows (F43), in both directions, at both hooks.

use std::net::{IpAddr, SocketAddr};

use proxy_common::{counters::Reason, device::role};

use super::{
    flows::masquerade,
    packet::{ACK, Body, Packet, Sums, payload_at, sums},
    world::{DROP, Hook, NEXT, Options, PROTOS, World, at, casts, hex, world},
};

/// The quoted packet's ends and the error's, told apart from its transport checksum, which nobody corrects.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Told {
    from: IpAddr,
    to: IpAddr,
    quoted: (SocketAddr, SocketAddr),
}

/// An error from `from` to `to` about `quoted`, cut to `len` bytes of quote.
pub(crate) fn error(from: IpAddr, to: IpAddr, kind: (u8, u8), quoted: &Packet, len: usize) -> Packet {
    let quote = &quoted.frame()[14..];
    let mut packet = Packet::icmp(from, to, kind.0, kind.1, &quote[..len.min(quote.len())]);
    if let Body::Icmp { rest, .. } = &mut packet.body {
        *rest = [0, 0, 5, 0xdc];
    }
    packet
}

/// Runs an error through a hook; everything but the ends must stay, and all sums must be right.
#[track_caller]
pub(crate) fn tell(world: &mut World, hook: Hook, error: &Packet, quoted: &Packet) -> (Packet, Told) {
    let frame = error.frame();
    let (verdict, out) = world.run(hook, &frame);
    assert_eq!(verdict, NEXT, "{error:?}");
    assert_eq!(sums(&out), Sums::Right, "{hook:?}: {} became {}", hex(&frame), hex(&out));
    let icmp = payload_at(&out);
    let inner = icmp + 8;
    let ip = |at: usize| -> IpAddr {
        if error.is_v6() {
            IpAddr::from(<[u8; 16]>::try_from(&out[at..at + 16]).unwrap())
        } else {
            IpAddr::from(<[u8; 4]>::try_from(&out[at..at + 4]).unwrap())
        }
    };
    let port = |at: usize| u16::from_be_bytes([out[at], out[at + 1]]);
    let (src, dst, transport) = if error.is_v6() {
        (8, 24, 40)
    } else {
        let ihl = usize::from(out[inner] & 15) * 4;
        assert_eq!(super::packet::total(&out[inner..inner + ihl]), 0xffff, "the quoted header's checksum");
        (12, 16, ihl)
    };
    let told = Told {
        from: ip(14 + src),
        to: ip(14 + dst),
        quoted: (
            SocketAddr::new(ip(inner + src), port(inner + transport)),
            SocketAddr::new(ip(inner + dst), port(inner + transport + 2)),
        ),
    };
    // Put together anew from what it tells: nothing else has changed.
    let mut requoted = quoted.between(told.quoted.0, told.quoted.1).frame()[14..].to_vec();
    let field = match quoted.proto() {
        6 => transport + 16..transport + 18,
        132 => transport + 8..transport + 12,
        _ => transport + 6..transport + 8,
    };
    let kept = &quoted.frame()[14..];
    requoted[field.clone()].copy_from_slice(&kept[field]);
    let mut rebuilt = Packet::icmp(told.from, told.to, 0, 0, &requoted[..error.payload.len()]);
    rebuilt.body = error.body.clone();
    assert_eq!(hex(&out), hex(&rebuilt.frame()));
    (rebuilt, told)
}

/// Fragmentation needed or packet too big, unreachable, time exceeded, parameter problem.
pub(crate) fn kinds(v6: bool) -> &'static [(u8, u8)] {
    if v6 { &[(2, 0), (1, 4), (3, 0), (4, 1)] } else { &[(3, 4), (3, 3), (11, 0), (12, 0)] }
}

#[test]
fn errors_about_a_flow_are_translated() {
    let Some(mut world) = world("errors_about_a_flow_are_translated", Options::default()) else { return };
    for cast in casts() {
        world.service(1, cast.vip, &[cast.backend]);
        for proto in PROTOS {
            world.device(role::POD);
            world.establish(proto, cast.client, cast.vip);
            for (n, kind) in kinds(cast.v6).iter().enumerate() {
                // RFC 792's least quote, and all of it.
                let len = if n % 2 == 0 { if cast.v6 { 48 } else { 28 } } else { 4000 };
                let mut forward = Packet::opening(proto, cast.client, cast.backend);
                if n == 3 && !cast.v6 {
                    forward.options = vec![1; 8];
                }
                for speaker in [cast.router, cast.backend.ip()] {
                    let mut quoted = forward.clone();
                    quoted.ttl = 3;
                    let about = error(speaker, cast.client.ip(), *kind, &quoted, len);
                    world.untouched(Hook::Ingress, &about.frame());
                    let (_, told) = tell(&mut world, Hook::Egress, &about, &quoted);
                    // The backend itself speaks as the VIP, a router as itself.
                    let from = if speaker == cast.router { speaker } else { cast.vip.ip() };
                    assert_eq!(told, Told { from, to: cast.client.ip(), quoted: (cast.client, cast.vip) });
                }
                // About an answer: the client, or a router before it, has trouble with what the VIP sent.
                let quoted = Packet::answer(proto, cast.vip, cast.client);
                for speaker in [cast.router, cast.client.ip()] {
                    let about = error(speaker, cast.vip.ip(), *kind, &quoted, len);
                    let (_, told) = tell(&mut world, Hook::Ingress, &about, &quoted);
                    assert_eq!(
                        told,
                        Told { from: speaker, to: cast.backend.ip(), quoted: (cast.backend, cast.client) }
                    );
                }
            }
            // About nobody's flow: none of our business.
            let quoted = Packet::opening(proto, at(cast.client, 1), cast.backend);
            let about = error(cast.router, cast.client.ip(), kinds(cast.v6)[0], &quoted, 4000);
            world.untouched(Hook::Egress, &about.frame());
            world.untouched(Hook::Ingress, &about.frame());
        }
    }
    assert_eq!(world.reasons(), []);
}

#[test]
fn errors_about_a_flow_with_another_port_are_translated() {
    let Some(mut world) = world("errors_about_a_flow_with_another_port_are_translated", Options::default()) else {
        return;
    };
    for cast in casts() {
        world.service(1, cast.vip, &[cast.backend]);
        world.service(2, cast.vip2, &[cast.backend]);
        for proto in PROTOS {
            world.establish(proto, cast.client, cast.vip);
            let (moved, _) = world.translate(Hook::Ingress, &Packet::opening(proto, cast.client, cast.vip2));
            let quoted = Packet::opening(proto, moved, cast.backend);
            let about = error(cast.router, cast.client.ip(), kinds(cast.v6)[0], &quoted, 4000);
            let (_, told) = tell(&mut world, Hook::Egress, &about, &quoted);
            assert_eq!(told.quoted, (cast.client, cast.vip2));
            let quoted = Packet::answer(proto, cast.vip2, cast.client);
            let about = error(cast.client.ip(), cast.vip2.ip(), kinds(cast.v6)[1], &quoted, 4000);
            let (_, told) = tell(&mut world, Hook::Ingress, &about, &quoted);
            assert_eq!((told.to, told.quoted), (cast.backend.ip(), (cast.backend, moved)));
        }
    }
}

#[test]
fn errors_about_a_masqueraded_flow_are_translated_twice() {
    let Some(mut world) = world("errors_about_a_masqueraded_flow_are_translated_twice", Options::default()) else {
        return;
    };
    for cast in casts() {
        world.service(1, cast.vip, &[cast.backend]);
        for proto in PROTOS {
            let node = masquerade(&mut world, proto, cast.client, cast.vip, cast.node);
            for kind in kinds(cast.v6) {
                for speaker in [cast.router, cast.backend.ip()] {
                    let quoted = Packet::opening(proto, node, cast.backend);
                    let about = error(speaker, cast.node, *kind, &quoted, 4000);
                    let (about, told) = tell(&mut world, Hook::Ingress, &about, &quoted);
                    assert_eq!(told, Told { from: speaker, to: cast.client.ip(), quoted: (cast.client, cast.backend) });
                    let Told { quoted: (src, dst), .. } = told;
                    let mut requoted = quoted.between(src, dst);
                    requoted.payload.clone_from(&quoted.payload);
                    let told = tell_again(&mut world, Hook::Egress, &about, &requoted);
                    let from = if speaker == cast.router { speaker } else { cast.vip.ip() };
                    assert_eq!(told, Told { from, to: cast.client.ip(), quoted: (cast.client, cast.vip) });
                }
                for speaker in [cast.router, cast.client.ip()] {
                    let quoted = Packet::answer(proto, cast.vip, cast.client);
                    let about = error(speaker, cast.vip.ip(), *kind, &quoted, 4000);
                    let (about, told) = tell(&mut world, Hook::Ingress, &about, &quoted);
                    assert_eq!(
                        told,
                        Told { from: speaker, to: cast.backend.ip(), quoted: (cast.backend, cast.client) }
                    );
                    let told = tell_again(&mut world, Hook::Egress, &about, &quoted.between(cast.backend, cast.client));
                    // A client that speaks is hidden as its packets are.
                    let from = if speaker == cast.router { speaker } else { cast.node };
                    assert_eq!(told, Told { from, to: cast.backend.ip(), quoted: (cast.backend, node) });
                }
            }
        }
    }
    let ack = Packet::tcp(casts()[0].client, casts()[0].vip, ACK);
    assert_eq!(world.run(Hook::Ingress, &ack.frame()).0, NEXT);
    assert_eq!(world.reasons(), []);
}

/// Another proxy's flow, while this one takes over: its answers leave under the VIP, and "fragmentation needed" comes back to it. That proxy
/// translates it, if it gets it.
#[test]
fn errors_about_another_proxys_answers_go_to_it() {
    let Some(mut world) = world("errors_about_another_proxys_answers_go_to_it", Options::default()) else { return };
    let mut failed = 0;
    for cast in casts() {
        world.service(1, cast.vip, &[cast.backend]);
        world.datapath.guard(cast.vip.ip(), 1);
        for role in [role::POD, role::OUTWARD] {
            world.device(role);
            for kind in kinds(cast.v6) {
                for proto in PROTOS {
                    let quoted = Packet::answer(proto, cast.vip, cast.client);
                    let about = error(cast.router, cast.vip.ip(), *kind, &quoted, 4000);
                    world.untouched(Hook::Ingress, &about.frame());
                    world.untouched(Hook::Egress, &about.frame());
                    // Of a packet that the VIP did not send it is told nothing.
                    let about = error(cast.router, cast.vip.ip(), *kind, &quoted.from(cast.backend2), 4000);
                    assert_eq!(world.run(Hook::Ingress, &about.frame()).0, DROP);
                    failed += 1;
                }
                let quoted = Packet::other(cast.vip.ip(), cast.client.ip(), 33).with_payload(&[7; 40]);
                let about = error(cast.router, cast.vip.ip(), *kind, &quoted, 4000);
                assert_eq!(world.run(Hook::Ingress, &about.frame()).0, DROP);
                failed += 1;
            }
        }
    }
    assert_eq!(world.reasons(), [(Reason::RejectFailed.name(), failed)]);
}

/// [`tell`] for what another hook translated before: its quote carries the first transport checksum.
#[track_caller]
fn tell_again(world: &mut World, hook: Hook, error: &Packet, quoted: &Packet) -> Told {
    let (verdict, out) = world.run(hook, &error.frame());
    assert_eq!(verdict, NEXT);
    assert_eq!(sums(&out), Sums::Right, "{}", hex(&out));
    let inner = payload_at(&out) + 8;
    let (src, dst, len, transport) = if quoted.is_v6() { (8, 24, 16, 40) } else { (12, 16, 4, 20) };
    let ip = |at: usize| -> IpAddr {
        if len == 16 {
            IpAddr::from(<[u8; 16]>::try_from(&out[at..at + 16]).unwrap())
        } else {
            IpAddr::from(<[u8; 4]>::try_from(&out[at..at + 4]).unwrap())
        }
    };
    if len == 4 {
        assert_eq!(super::packet::total(&out[inner..inner + 20]), 0xffff);
    }
    let port = |at: usize| u16::from_be_bytes([out[at], out[at + 1]]);
    assert_eq!(out.len(), error.frame().len());
    assert_eq!(out[inner + transport + 8..], error.frame()[inner + transport + 8..]);
    Told {
        from: ip(14 + src),
        to: ip(14 + dst),
        quoted: (
            SocketAddr::new(ip(inner + src), port(inner + transport)),
            SocketAddr::new(ip(inner + dst), port(inner + transport + 2)),
        ),
    }
}
