//! Two packets of one flow at the same moment, each on a CPU of its own.

use std::{
    net::SocketAddr,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use proxy_common::device::role;

use super::{
    packet::{Packet, ends},
    world::{Hook, Options, TCP, World, at, casts, world},
};

/// Of a flow that is missed while it moves from one map to the other, a packet in a hundred or so is: thousands meet in this time.
const TIME: Duration = Duration::from_millis(1500);

/// What two packets that meet became: their source and destination.
type Met = [(SocketAddr, SocketAddr); 2];

/// Has new flows made, each from another port, for as long as the time lasts, and the packets that `flow` returns meet.
fn meet(
    world: &mut World,
    client: SocketAddr,
    flow: impl Fn(&mut World, SocketAddr) -> [(Hook, Packet); 2],
    check: impl Fn(&World, SocketAddr, Met),
) {
    let started = Instant::now();
    for (flows, port) in (1024..u16::MAX).enumerate() {
        // Where CPUs are busy two seldom meet.
        if started.elapsed() > TIME && flows > 100 {
            break;
        }
        assert!(started.elapsed() < 20 * TIME, "{flows} flows say nothing");
        let client = at(client, port);
        let packets = flow(world, client).map(|(hook, packet)| (hook, packet.frame()));
        let shared = &*world;
        let go = AtomicBool::new(false);
        let ready = AtomicBool::new(false);
        let run = |(hook, frame): &(Hook, Vec<u8>)| ends(&shared.run(*hook, frame).1);
        let met = thread::scope(|scope| {
            let other = scope.spawn(|| {
                ready.store(true, Ordering::Release);
                while !go.load(Ordering::Acquire) {
                    std::hint::spin_loop();
                }
                run(&packets[1])
            });
            while !ready.load(Ordering::Acquire) {
                thread::yield_now();
            }
            go.store(true, Ordering::Release);
            // Neither is always first.
            for _ in 0..port % 64 * 8 {
                std::hint::spin_loop();
            }
            [run(&packets[0]), other.join().unwrap()]
        });
        check(world, client, met);
        world.remove(|_| true);
    }
}

/// The packet that confirms a connection, and the data behind it.
#[test]
fn nobody_misses_a_flow_that_moves_on() {
    let Some(mut world) = world("nobody_misses_a_flow_that_moves_on", Options::default()) else { return };
    for cast in casts() {
        world.service(1, cast.vip, &[cast.backend]);
        meet(
            &mut world,
            cast.client,
            |world, client| {
                world.translate(Hook::Ingress, &Packet::opening(TCP, client, cast.vip));
                world.translate(Hook::Egress, &Packet::answer(TCP, cast.backend, client));
                let ack = Packet::more(TCP, client, cast.vip);
                [(Hook::Ingress, ack.clone()), (Hook::Ingress, ack.with_payload(b"at once"))]
            },
            |_, client, met| assert_eq!(met, [(client, cast.backend); 2]),
        );
    }
}

/// Of datagrams the answer confirms the flow, while the client sends on: to the backend that it has. That the entries are in the one map before
/// they leave the other is what this shows. The last look of `find` goes unasked here: between the moments that a datagram would have to miss
/// lie four writes, so its CPU would have to stand still for as long.
#[test]
fn a_datagram_that_meets_the_first_answer_stays_with_its_backend() {
    let Some(mut world) = world("a_datagram_that_meets_the_first_answer_stays_with_its_backend", Options::default())
    else {
        return;
    };
    for cast in casts() {
        world.service(1, cast.vip, &[cast.backend]);
        let first = |world: &mut World, client| {
            world.service(1, cast.vip, &[cast.backend]);
            world.translate(Hook::Ingress, &Packet::udp(client, cast.vip));
            world.service(1, cast.vip, &[cast.backend2]);
            [(Hook::Ingress, Packet::udp(client, cast.vip)), (Hook::Egress, Packet::udp(cast.backend, client))]
        };
        meet(&mut world, cast.client, first, |_, client, met| {
            assert_eq!(met, [(client, cast.backend), (cast.vip, client)]);
        });
    }
}

/// And the same where the source is rewritten.
#[test]
fn nobody_leaves_unmasqueraded_while_the_flow_moves_on() {
    let Some(mut world) = world("nobody_leaves_unmasqueraded_while_the_flow_moves_on", Options::default()) else {
        return;
    };
    for cast in casts() {
        world.service(1, cast.vip, &[cast.backend]);
        world.device(role::OUTWARD);
        meet(
            &mut world,
            cast.client,
            |world, client| {
                let open = Packet::opening(TCP, client, cast.vip);
                world.translate(Hook::Ingress, &open);
                let (seen, _) = world.translate(Hook::Egress, &open.to(cast.backend));
                let answer = Packet::answer(TCP, cast.backend, seen);
                world.translate(Hook::Ingress, &answer);
                world.translate(Hook::Egress, &answer.to(client));
                let ack = Packet::more(TCP, client, cast.vip);
                world.translate(Hook::Ingress, &ack);
                let ack = ack.to(cast.backend);
                [(Hook::Egress, ack.clone()), (Hook::Egress, ack.with_payload(b"at once"))]
            },
            |_, client, met| {
                for (source, backend) in met {
                    assert_eq!((source.ip(), backend), (cast.node, cast.backend), "{client}");
                }
            },
        );
    }
}
