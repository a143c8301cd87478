//! Who counts as a pod of this node (contract A72): by the device, by the device's exception, by the address.

use std::net::IpAddr;

use aya::maps::{LpmTrie, MapData, lpm_trie::Key};
use proxy_common::{
    Ipv4Be, Ipv6Be,
    device::{flags, role},
    frontend::verdict,
    globals::detect_local,
};

use super::{
    packet::Packet,
    source_ranges::around,
    support::{Maps, Spec},
    world::{Cast, DROP, Hook, NEXT, Options, PROTOS, TCP, World, casts, world},
};

/// Served to pods, dropped from outside.
fn for_pods(world: &mut World, cast: &Cast) {
    let verdicts = [verdict::PICK_ALL, verdict::DROP, verdict::DROP];
    for proto in PROTOS {
        world.datapath.frontend(cast.vip, proto, &Spec { verdicts, ..Spec::pick_all(1, &[cast.backend]) });
    }
}

fn asked(world: &mut World, cast: &Cast) -> i32 {
    let frame = Packet::opening(TCP, cast.client, cast.vip).frame();
    let verdict = world.run(Hook::Ingress, &frame).0;
    world.remove(|_| true);
    verdict
}

/// Enters a network of pods, or takes it out.
fn pods(world: &mut World, net: (IpAddr, u8), there: bool) {
    // The map library wants its own wrapper for a prefix; the bytes are the same.
    #[derive(Clone, Copy)]
    #[repr(transparent)]
    struct Addr<A>(A);
    // SAFETY: an integer or four, no padding.
    unsafe impl aya::Pod for Addr<Ipv4Be> {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Addr<Ipv6Be> {}
    fn go<A: Maps>(world: &mut World, name: &str, (addr, prefix): (IpAddr, u8), there: bool)
    where
        Addr<A>: aya::Pod,
    {
        let mut map: LpmTrie<&mut MapData, Addr<A>, u32> =
            LpmTrie::try_from(world.datapath.ebpf.map_mut(name).unwrap()).unwrap();
        let key = Key::new(u32::from(prefix), Addr(A::from_ip(addr).unwrap()));
        if there { map.insert(&key, 1, 0).unwrap() } else { map.remove(&key).unwrap() }
    }
    match net.0 {
        IpAddr::V4(_) => go::<Ipv4Be>(world, "local_cidrs_v4", net, there),
        IpAddr::V6(_) => go::<Ipv6Be>(world, "local_cidrs_v6", net, there),
    }
}

#[test]
fn by_device_and_its_exception() {
    let Some(mut world) = world("by_device_and_its_exception", Options::default()) else { return };
    for cast in casts() {
        for_pods(&mut world, &cast);
        // Addresses mean nothing here.
        pods(&mut world, around(&cast), true);
        for (role, otherwise, expected) in [
            (role::POD, false, NEXT),
            (role::POD, true, DROP),
            (role::OUTWARD, false, DROP),
            (role::OUTWARD, true, NEXT),
            (role::OVERLAY, true, NEXT),
        ] {
            world.device(role);
            world.device_flags(if otherwise { flags::OTHERWISE } else { 0 });
            assert_eq!(asked(&mut world, &cast), expected, "{role} {otherwise}");
        }
        world.device_with(None);
        assert_eq!(asked(&mut world, &cast), DROP, "no device");
    }
}

#[test]
fn by_address() {
    let options = Options { detect_local: detect_local::ADDRESS, ..Options::default() };
    let Some(mut world) = world("by_address", options) else { return };
    for cast in casts() {
        for_pods(&mut world, &cast);
        for role in [role::POD, role::OUTWARD] {
            world.device(role);
            assert_eq!(asked(&mut world, &cast), DROP, "of nobody is known that it is a pod's");
            pods(&mut world, around(&cast), true);
            assert_eq!(asked(&mut world, &cast), NEXT, "whatever device it comes in by");
            let stranger = Cast { client: (cast.router, 1004).into(), ..cast };
            assert_eq!(asked(&mut world, &stranger), DROP);
            pods(&mut world, around(&cast), false);
        }
        // A longest match is a match: one inside the other is no exception.
        let host = if cast.v6 { 128 } else { 32 };
        pods(&mut world, (cast.client.ip(), host), true);
        assert_eq!(asked(&mut world, &cast), NEXT);
    }
}
