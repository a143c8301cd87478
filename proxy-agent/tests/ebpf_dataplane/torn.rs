//! What a new flow gets while its frontend is on the move (F38): the programs read a frontend, then a slot of its range, and the agent writes
//! meanwhile.

use std::{
    net::SocketAddr,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
};

use aya::programs::{SchedClassifier, TestRun as _, TestRunOptions};
use etherparse::{NetSlice, PacketBuilder, SlicedPacket, TransportSlice};
use proxy_agent::desired::Changes;
use proxy_common::counters::Reason;

use super::*;

/// Longer than slots rest: what was let go of first is written anew, by another Service as often as not.
const LONG: Duration = Duration::from_secs(7);

/// A Service's two sets, of different sizes: where one has an end, the other goes on. Every one has a network of its own, and ports that
/// tell the network.
fn set(service: u8, second: bool, v6: bool) -> Vec<SocketAddr> {
    let network = 2 * service + u8::from(second);
    (1..=if second { 40 } else { 8 })
        .map(|n: u8| {
            let addr = if v6 {
                IpAddr::from([0xfd00, network.into(), 0, 0, 0, 0, 0, n.into()])
            } else {
                IpAddr::from([10, network, 0, n])
            };
            SocketAddr::new(addr, 1000 * u16::from(network) + u16::from(n))
        })
        .collect()
}

fn moved(service: u8, second: bool) -> Changes {
    let of = |v6| {
        let all = set(service, second, v6);
        let all = all.iter().map(|to| Backend { addr: to.ip(), port: to.port().try_into().unwrap() }).collect();
        (frontend(service, v6), Arc::new(FrontendSpec { all, ..(*spec(service, v6, 1..2)).clone() }))
    };
    Changes { set: [false, true].into_iter().map(of).collect(), ..Changes::default() }
}

/// The opening of the `n`th connection of all to the first Service.
fn opening(n: u32, v6: bool) -> Vec<u8> {
    let (port, host) = (1024 + (n % 60_000) as u16, (n / 60_000) as u8 + 1);
    let link = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 2], [0; 6]);
    let packet = match (frontend(1, v6).addr, v6) {
        (IpAddr::V4(to), _) => link.ipv4([10, 244, 1, host], to.octets(), 61),
        (IpAddr::V6(to), _) => link.ipv6([0xfd, 0, 2, 0x44, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, host], to.octets(), 61),
    };
    let mut frame = Vec::new();
    packet.tcp(port, 80, 7, 1000).syn().write(&mut frame, &[]).unwrap();
    frame
}

fn destination(frame: &[u8]) -> SocketAddr {
    let packet = SlicedPacket::from_ethernet(frame).unwrap();
    let addr: IpAddr = match packet.net.as_ref().unwrap() {
        NetSlice::Ipv4(ip) => ip.header().destination_addr().into(),
        NetSlice::Ipv6(ip) => ip.header().destination_addr().into(),
        NetSlice::Arp(_) => panic!("ARP"),
    };
    let Some(TransportSlice::Tcp(tcp)) = packet.transport else { panic!("no TCP: {frame:02x?}") };
    SocketAddr::new(addr, tcp.destination_port())
}

/// Also when a flow got what it should not: nobody waits for a writer that goes on.
struct Stops<'a>(&'a AtomicBool);

impl Drop for Stops<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Whoever asks while nothing moves gets a backend of the set in force; who asks meanwhile gets one of either set. Never one of another
/// Service, never an address of one with the port of another, never nothing.
#[test]
fn a_flow_gets_a_backend_of_one_set_while_its_frontend_moves_f38() {
    let Some(mut world) = World::new("torn") else { return };
    world.options.sizes.slots = 1 << 19;
    let mut ebpf = world.open();
    let mut state = DesiredState::default();
    for changes in [moved(1, false), moved(2, false)] {
        state.frontends.extend(changes.set);
    }
    // The device by which test runs have packets come in.
    start(&mut ebpf, &state, &device_list(&[(1, "lo")]));
    let program = SchedClassifier::from_pin(world.options.bpffs.join("v1/programs/tc_ingress_ether")).unwrap();
    let sets = [false, true].map(|v6| [set(1, false, v6), set(1, true, v6)]);

    // Moves of the first Service that have begun or ended: odd in the midst of one.
    let (moves, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    let (mut asked, mut at_rest, mut seen) = (0_u32, 0_u32, BTreeSet::new());
    thread::scope(|scope| {
        let writer = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let second = moves.fetch_add(1, Ordering::SeqCst) / 2 % 2 == 0;
                let report = ebpf.apply(&moved(1, second));
                moves.fetch_add(1, Ordering::SeqCst);
                assert!(report.is_clean(), "{report:?}");
                let report = ebpf.apply(&moved(2, second));
                assert!(report.is_clean(), "{report:?}");
                // Slots rest for seconds: there are so many of them.
                thread::sleep(Duration::from_micros(200));
            }
        });
        let stops = Stops(&stop);
        let began = Instant::now();
        while began.elapsed() < LONG && !writer.is_finished() {
            for v6 in [false, true] {
                let frame = opening(asked, v6);
                let mut out = vec![0; 2048];
                let before = moves.load(Ordering::SeqCst);
                let options =
                    TestRunOptions { data_in: Some(&frame), data_out: Some(&mut out), ..TestRunOptions::default() };
                let result = program.test_run(options).unwrap();
                let after = moves.load(Ordering::SeqCst);
                out.truncate(result.data_size_out as usize);
                let to = destination(&out);
                let [first, second] = &sets[usize::from(v6)];
                let is_at_rest = before == after && before % 2 == 0;
                let right = match (is_at_rest, before / 2 % 2 == 0) {
                    (true, true) => first.contains(&to),
                    (true, false) => second.contains(&to),
                    (false, _) => first.contains(&to) || second.contains(&to),
                };
                assert!(right, "flow {asked} got {to} (verdict {}), moves {before} to {after}", result.return_value);
                at_rest += u32::from(is_at_rest);
                seen.insert(to);
            }
            asked += 1;
        }
        drop(stops);
        writer.join().unwrap();
    });
    let moves = moves.into_inner() / 2;
    let reasons: BTreeMap<_, _> = world.pins().reasons().unwrap().into_iter().map(|(r, n)| (r.name(), n)).collect();
    println!("{moves} moves, 2 x {asked} flows, {at_rest} of them at rest; {reasons:?}");
    assert!(moves > 1000 && asked > 5000, "{moves} moves, {asked} flows");
    assert!(at_rest > asked / 10 && at_rest < 2 * asked, "flows met moves, and some did not: {at_rest} of 2 x {asked}");
    assert_eq!(seen.len(), 2 * (8 + 40), "every backend of either set, of both families");
    assert_eq!(reasons.get(Reason::TornTwice.name()), Some(&0), "{reasons:?}");
}
