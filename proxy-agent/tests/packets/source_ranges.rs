//! Source ranges per packet (contract A8).

use std::net::IpAddr;

use aya::maps::{LpmTrie, MapData, lpm_trie::Key};
use proxy_common::{
    Ipv4Be, Ipv6Be,
    counters::Reason,
    device::role,
    frontend::{flags, verdict},
    source_range::{SourceRange, SourceRangeKey},
};

use super::{
    packet::Packet,
    support::{Maps, Spec},
    world::{BOUNCE, Cast, DROP, Hook, NEXT, Options, PROTOS, World, at, casts, usual, world},
};

fn filtered(service: u32, cast: &Cast) -> Spec {
    Spec {
        verdicts: usual(),
        flags: flags::LOAD_BALANCER | flags::HAS_SOURCE_RANGES,
        ..Spec::pick_all(service, &[cast.backend])
    }
}

/// Enters a range, or takes it out.
pub(crate) fn range(world: &mut World, service: u32, net: (IpAddr, u8), there: bool) {
    // The map library wants its own wrapper for a prefix; the bytes are the same.
    #[derive(Clone, Copy)]
    #[repr(transparent)]
    struct Range<A>(SourceRange<A>);
    // SAFETY: two integers or five, no padding.
    unsafe impl aya::Pod for Range<Ipv4Be> {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Range<Ipv6Be> {}
    fn go<A: Maps>(world: &mut World, name: &str, service: u32, (addr, prefix): (IpAddr, u8), there: bool)
    where
        Range<A>: aya::Pod,
    {
        let SourceRangeKey { prefix, range } = SourceRangeKey::new(service, A::from_ip(addr).unwrap(), prefix);
        let mut map: LpmTrie<&mut MapData, Range<A>, u32> =
            LpmTrie::try_from(world.datapath.ebpf.map_mut(name).unwrap()).unwrap();
        let key = Key::new(prefix, Range(range));
        if there { map.insert(&key, 1, 0).unwrap() } else { map.remove(&key).unwrap() }
    }
    match net.0 {
        IpAddr::V4(_) => go::<Ipv4Be>(world, "source_ranges_v4", service, net, there),
        IpAddr::V6(_) => go::<Ipv6Be>(world, "source_ranges_v6", service, net, there),
    }
}

/// A network that the cast's client is in.
pub(crate) fn around(cast: &Cast) -> (IpAddr, u8) {
    if cast.v6 { ("fd00:244:1::".parse().unwrap(), 64) } else { ("10.244.1.0".parse().unwrap(), 24) }
}

/// Contract A91; from pods and from outside alike.
#[test]
fn others_are_dropped_in_silence() {
    let Some(mut world) = world("others_are_dropped_in_silence", Options::default()) else { return };
    let mut service = 0;
    for role in [role::POD, role::OUTWARD] {
        world.device(role);
        for cast in casts() {
            for proto in PROTOS {
                service += 1;
                world.datapath.frontend(cast.vip, proto, &filtered(service, &cast));
                let opening = |port| Packet::opening(proto, at(cast.client, port), cast.vip).frame();
                let dropped = world.reason(Reason::SourceRange);
                assert_eq!(world.run(Hook::Ingress, &opening(1001)).0, DROP, "no range at all");
                // Another service's says nothing.
                range(&mut world, service + 100, around(&cast), true);
                assert_eq!(world.run(Hook::Ingress, &opening(1002)).0, DROP);
                range(&mut world, service, around(&cast), true);
                assert_eq!(world.run(Hook::Ingress, &opening(1003)).0, NEXT);
                let stranger = Packet::opening(proto, (cast.router, 1004).into(), cast.vip).frame();
                assert_eq!(world.run(Hook::Ingress, &stranger).0, DROP);
                assert_eq!(world.reason(Reason::SourceRange), dropped + 3);
                let counters = world.counters(service);
                assert_eq!((counters.connections, counters.refused), (1, 3));
                world.remove(|_| true);
            }
        }
    }
}

/// Contract A93; and a frontend without the flag asks nobody, whatever ranges its service has (A90).
#[test]
fn everybody_and_one_host() {
    let Some(mut world) = world("everybody_and_one_host", Options::default()) else { return };
    for cast in casts() {
        let service = 1 + u32::from(cast.v6);
        let all: IpAddr = if cast.v6 { "::".parse().unwrap() } else { "0.0.0.0".parse().unwrap() };
        world.datapath.frontend(cast.vip, PROTOS[0], &filtered(service, &cast));
        world.datapath.frontend(cast.vip2, PROTOS[0], &Spec { flags: flags::NODE_PORT, ..filtered(service, &cast) });
        let ask = |world: &mut World, vip, n: u16| {
            let frame = Packet::opening(PROTOS[0], (cast.router, n).into(), vip).frame();
            world.run(Hook::Ingress, &frame).0
        };
        range(&mut world, service, (all, 0), true);
        assert_eq!(ask(&mut world, cast.vip, 1), NEXT);
        range(&mut world, service, (all, 0), false);
        assert_eq!(ask(&mut world, cast.vip, 2), DROP);
        assert_eq!(ask(&mut world, cast.vip2, 2), NEXT);
        let host = if cast.v6 { 128 } else { 32 };
        range(&mut world, service, (cast.router, host), true);
        assert_eq!(ask(&mut world, cast.vip, 3), NEXT);
        assert_eq!(
            world.run(Hook::Ingress, &Packet::opening(PROTOS[0], cast.client, cast.vip).frame()).0,
            DROP,
            "one host is one host"
        );
    }
}

/// Contract A94.
#[test]
fn what_began_within_a_range_goes_on_without_it() {
    let Some(mut world) = world("what_began_within_a_range_goes_on_without_it", Options::default()) else { return };
    for cast in casts() {
        for proto in PROTOS {
            let service = 1 + u32::from(cast.v6) * 2 + u32::from(proto == PROTOS[0]);
            world.datapath.frontend(cast.vip, proto, &filtered(service, &cast));
            range(&mut world, service, around(&cast), true);
            let backend = world.establish(proto, cast.client, cast.vip);
            range(&mut world, service, around(&cast), false);
            let (seen, to) = world.translate(Hook::Ingress, &Packet::answer(proto, cast.client, cast.vip));
            assert_eq!((seen, to), (cast.client, backend));
            let other = Packet::opening(proto, at(cast.client, 999), cast.vip).frame();
            assert_eq!(world.run(Hook::Ingress, &other).0, DROP);
            world.remove(|_| true);
        }
    }
}

/// Contract A89: who has nobody to serve refuses everybody; who drops counts a policy's drop.
#[test]
fn no_endpoints_refuse_whoever_asks() {
    let Some(mut world) = world("no_endpoints_refuse_whoever_asks", Options::default()) else { return };
    for cast in casts() {
        let opening = Packet::opening(PROTOS[0], cast.client, cast.vip).frame();
        let none = Spec { all: vec![], ..filtered(1, &cast) };
        world.datapath.frontend(cast.vip, PROTOS[0], &none);
        assert_eq!(world.run(Hook::Ingress, &opening).0, BOUNCE);
        world.datapath.frontend(cast.vip, PROTOS[0], &Spec { verdicts: [verdict::REJECT; 3], ..filtered(1, &cast) });
        assert_eq!(world.run(Hook::Ingress, &opening).0, BOUNCE);
        world.datapath.frontend(cast.vip, PROTOS[0], &Spec { verdicts: [verdict::DROP; 3], ..filtered(1, &cast) });
        assert_eq!(world.run(Hook::Ingress, &opening).0, DROP);
    }
    assert_eq!(world.reason(Reason::SourceRange), 0);
    assert_eq!(world.reason(Reason::PolicyDrop), 2);
}
