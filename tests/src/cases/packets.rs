//! Packets that are not the ordinary ones: fragments, and ICMP messages about translated flows.

use std::{
    net::SocketAddr,
    sync::atomic::{AtomicU16, Ordering},
};

use anyhow::{Context, Result, bail, ensure};

use super::{Ground, services::Svc};
use crate::{
    pod::{bulk::Report, frame, pieces, socket::Transport},
    world::{Ask, Family, Namespace, Place, Topology, World, patience, vip},
};

/// Datagrams of 8 and 60 KB both ways: only the first fragment carries ports.
pub fn fragments(ground: &Ground<'_>) -> Result<()> {
    for from in ground.origins() {
        for family in Family::BOTH {
            if ground.loses_large_datagrams(from, family) {
                continue;
            }
            for transport in [Transport::Udp, Transport::UdpUnconnected] {
                let to = Svc::Web.at(family, transport);
                let ask = |size: usize| {
                    Ask::new(to, transport).times(8).with(format!("--size={size}")).with(format!("--reply={size}"))
                };
                // The first one may be what tells an IPv6 sender of a smaller MTU on the way.
                ground.world.ask(from, &ask(8_000).timeout(300))?;
                ground.answered(from, &ask(8_000))?;
                ground.answered(from, &ask(60_000).times(4))?;
            }
        }
    }
    Ok(())
}

/// F41: fragments of which the first one comes last, both ways: what is asked of a backend, and what it says. Cut by hand, since no kernel
/// sends them so.
pub fn disorder(ground: &Ground<'_>) -> Result<()> {
    let (pod, outside) = (ground.world.pod("a1"), ground.world.outside());
    for (from, masqueraded) in [(pod, false), (outside, true)] {
        for family in Family::BOTH {
            for (svc, backend) in [(Svc::Local, "b1"), (Svc::Remote, "b2")] {
                let to = svc.at(family, Transport::Udp);
                disordered(ground.world, from, to, backend, masqueraded)?;
            }
        }
    }
    Ok(())
}

/// One such datagram to a Service port with one backend, and, unless the client is masqueraded, one from that to the client.
pub(super) fn disordered(world: &World, from: &Place, to: SocketAddr, backend: &str, masqueraded: bool) -> Result<()> {
    const SIZE: usize = 4_000;
    const SERVED: u16 = 8080;
    /// No flow of an earlier case has the port, which would be given another one then.
    static PORT: AtomicU16 = AtomicU16::new(2_700);
    let family = if to.is_ipv4() { Family::V4 } else { Family::V6 };
    let (testpod, backend) = (&world.programs().testpod, world.pod(backend));
    let (own, served) = (from.at(family, PORT.fetch_add(1, Ordering::Relaxed)), backend.at(family, SERVED));
    let what = || format!("{own} -> {to}");
    let pieces = |from: SocketAddr, to: SocketAddr, answers: usize| {
        let timeout = patience(8).as_millis();
        let args = ["pieces".to_owned(), to.to_string(), format!("--from={from}"), format!("--size={SIZE}")];
        args.into_iter().chain([format!("--answers={answers}"), format!("--timeout={timeout}")]).collect::<Vec<_>>()
    };
    let mut client = from.start(testpod, &pieces(own, to, if masqueraded { 1 } else { 2 }))?;
    client.wait_for_line("ready", patience(10)).with_context(what)?;
    if !masqueraded {
        let _: pieces::Report = backend.testpod(testpod, &pieces(served, own, 0))?;
    }
    let report: pieces::Report = client.ends(patience(10)).with_context(what)?;
    let [asked, told @ ..] = &report.heard[..] else { bail!("{}: {report:?}", what()) };
    let answer = asked.answer.as_ref().with_context(|| format!("{}: {report:?}", what()))?;
    ensure!((answer.got, &answer.backend, asked.from) == (SIZE, &backend.name, to), "{}: {report:?}", what());
    ensure!((answer.peer != own.to_string()) == masqueraded, "{}: {report:?}", what());
    let told: Vec<_> = told.iter().map(|heard| (heard.from, heard.size)).collect();
    ensure!(masqueraded || told == [(to, SIZE)], "{}: what its backend said came as {told:?}", what());
    Ok(())
}

/// Many datagrams by one call, cut up by the last link that has to (UDP_SEGMENT): one flow, every one of them translated.
pub fn bursts(ground: &Ground<'_>) -> Result<()> {
    for from in ground.origins() {
        for family in Family::BOTH {
            for transport in [Transport::Udp, Transport::UdpUnconnected] {
                for svc in [Svc::Local, Svc::Remote] {
                    let to = svc.at(family, transport);
                    ground.answered(from, &Ask::new(to, transport).with("--size=1200").with("--burst=40"))?;
                }
            }
        }
    }
    Ok(())
}

/// A datagram without a checksum arrives without one: a wrong one would be dropped at the backend.
pub fn no_checksum(ground: &Ground<'_>) -> Result<()> {
    for from in ground.origins() {
        for transport in [Transport::Udp, Transport::UdpUnconnected] {
            let to = Svc::Web.at(Family::V4, transport);
            ground.answered(from, &Ask::new(to, transport).times(8).with("--no-check"))?;
        }
    }
    Ok(())
}

/// Megabytes both ways at once, to a backend on the same node and to one on the other, every byte compared. Where links take
/// large segments, large ones are what the programs saw.
pub fn bulk(ground: &Ground<'_>) -> Result<()> {
    let world = ground.world;
    for from in ground.origins().into_iter().filter(|from| ground.per_packet(from)) {
        for family in Family::BOTH {
            for (svc, backend) in [(Svc::Local, "b1"), (Svc::Remote, "b2")] {
                let to = svc.at(family, Transport::Tcp);
                let what = format!("{} -> {to}", from.name);
                let before = sent(world.pod(backend))?;
                let args = ["bulk", &to.to_string(), "--megabytes=16"].map(str::to_owned);
                let report: Report = from.testpod(&world.programs().testpod, &args).with_context(|| what.clone())?;
                ensure!(report.up && report.down && report.backend == backend, "{what}: {report:?}");
                let after = sent(world.pod(backend))?;
                let (bytes, packets) = (after.0 - before.0, after.1 - before.1);
                let large = bytes > 2 * 1500 * packets;
                ensure!(
                    large || !ground.large_segments,
                    "{what}: {bytes} bytes in {packets} packets, no large segments"
                );
            }
        }
    }
    Ok(())
}

/// Bytes and packets that left a pod so far.
fn sent(pod: &Place) -> Result<(u64, u64)> {
    let shown = pod.namespace.output("ip", &["-s", "-j", "link", "show", "dev", "eth0"])?;
    let shown: serde_json::Value = serde_json::from_str(&shown).context("ip -s -j link")?;
    let count = |what: &str| shown.pointer(&format!("/0/stats64/tx/{what}")).and_then(serde_json::Value::as_u64);
    count("bytes").zip(count("packets")).context("ip -s shows no counters")
}

/// A frame with a VLAN tag belongs to the VLAN device, which has hooks of its own: whatever its addresses say, it is neither
/// translated nor refused here. The same frame without the tag is.
pub fn tagged(ground: &Ground<'_>) -> Result<()> {
    let world = ground.world;
    let node = world.node(1);
    for (family, source) in Family::BOTH.into_iter().zip([31_001, 31_002]) {
        for (port, answer) in [(80, "tcp"), (4711, "icmp")] {
            let to = SocketAddr::new(vip(family, Svc::Web.number()), port);
            let ask = |extra: &[&str]| framed(world, to, source, extra);
            let seen = || -> Result<(String, bool)> {
                let flows = world.cli(node, &["connections", "-o", "json"])?;
                let counters = world.cli(node, &["counters", "-o", "json"])?;
                Ok((counters, flows.contains(&format!(":{source}"))))
            };
            let before = seen()?;
            let report = ask(&["--vlan=77", "--timeout=60"])?;
            ensure!(report.answer.is_none(), "{to}: a tagged frame was answered: {report:?}");
            let after = seen()?;
            ensure!(before == after, "{to}: a tagged frame was counted or made a flow");
            let report = ask(&[])?;
            ensure!(report.answer.as_deref() == Some(answer), "{to}: the same frame without a tag: {report:?}");
            ensure!(seen()? != before, "{to}: the same frame without a tag was not counted");
        }
    }
    Ok(())
}

/// What comes back for a SYN from outside that is sent to node1's hardware address, whoever it is for.
pub(super) fn framed(world: &World, to: SocketAddr, source: u16, extra: &[&str]) -> Result<frame::Report> {
    let from = world.outside().at(if to.is_ipv4() { Family::V4 } else { Family::V6 }, source);
    framed_from(world, from, to, extra)
}

/// The same, with any address as its source.
pub(super) fn framed_from(world: &World, from: SocketAddr, to: SocketAddr, extra: &[&str]) -> Result<frame::Report> {
    let (outside, node) = (world.outside(), &world.node(1).place.namespace);
    let uplink = if world.topology == Topology::Uplink { "cni0" } else { "eth0" };
    let (from_mac, to_mac) = (mac(&outside.namespace, "eth0")?, mac(node, uplink)?);
    let mut args = vec!["frame".to_owned(), to.to_string(), "--device=eth0".to_owned()];
    args.extend([format!("--from={from}"), format!("--from-mac={from_mac}"), format!("--to-mac={to_mac}")]);
    args.extend(extra.iter().map(|&arg| arg.to_owned()));
    outside.testpod(&world.programs().testpod, &args)
}

/// A109: what conntrack takes for invalid does not leave a pod untranslated; what it knows nothing against does.
pub fn invalid(world: &World) -> Result<()> {
    let (pod, other) = (world.pod("b1"), world.pod("b2"));
    let node = &world.node(1).place.namespace;
    let (from_mac, to_mac) = (mac(&pod.namespace, "eth0")?, mac(node, &world.pod_link(pod))?);
    for (family, source) in Family::BOTH.into_iter().zip([31_011, 31_012]) {
        let (from, to) = (pod.at(family, source), other.at(family, 4711));
        let ask = |flags: &str| -> Result<frame::Report> {
            let mut args = vec!["frame".to_owned(), to.to_string(), "--device=eth0".to_owned(), flags.to_owned()];
            args.extend([format!("--from={from}"), format!("--from-mac={from_mac}"), format!("--to-mac={to_mac}")]);
            pod.testpod(&world.programs().testpod, &args)
        };
        // Nobody listens there, and the kernel says so to whatever is no RST.
        let report = ask("--flags=2")?;
        ensure!(report.answer.as_deref() == Some("tcp"), "{from} -> {to}: a SYN: {report:?}");
        let report = ask("--flags=3")?;
        ensure!(report.answer.is_none(), "{from} -> {to}: a SYN with FIN went through: {report:?}");
    }
    Ok(())
}

fn mac(namespace: &Namespace, device: &str) -> Result<String> {
    let shown = namespace.output("ip", &["-j", "link", "show", "dev", device])?;
    let shown: serde_json::Value = serde_json::from_str(&shown).context("ip -j link")?;
    let mac = shown.pointer("/0/address").and_then(serde_json::Value::as_str);
    mac.map(str::to_owned).with_context(|| format!("{device} has no hardware address"))
}

/// Where on the way between a client and `b2` packets of more than 1300 bytes do not fit. Whoever stands before it says so to the sender, who
/// must understand it although it never heard of whom the message is about.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Narrow {
    /// The last link to `b2`: node2 tells the sender, who never heard of `b2`.
    ToBackend,
    /// node1's way to the pods of node2: node1 itself tells it, with the packet in hand that it had translated.
    BetweenNodes,
    /// node1's way back to the client outside: it tells `b2`, who never heard of the VIP and, where it is masqueraded, of the client.
    ToOutside,
}

/// A command that narrows a way, and the one that makes it as wide as before, for `ip -batch` on a node.
struct Change {
    node: usize,
    narrow: String,
    widen: String,
}

impl Narrow {
    fn changes(self, world: &World) -> Result<Vec<Change>> {
        if self == Self::ToBackend {
            let (link, before) = match world.topology {
                Topology::Routed | Topology::Tun => (world.pod_link(world.pod("b2")), 1500),
                Topology::Bridge | Topology::Uplink => ("cni0".to_owned(), 1500),
                Topology::Vxlan => ("cni0".to_owned(), 1450),
            };
            let set = |mtu: u16| format!("link set {link} mtu {mtu}\n");
            return Ok(vec![Change { node: 2, narrow: set(1300), widen: set(before) }]);
        }
        let change = |family: Family| {
            let to = if self == Self::BetweenNodes { world.pod("b2") } else { world.outside() };
            let bits = if family == Family::V4 { 32 } else { 128 };
            let to = to.ip(family);
            let found = world.node(1).place.namespace.output("ip", &["-j", "route", "get", &to.to_string()])?;
            let found: serde_json::Value = serde_json::from_str(&found).context("ip -j route get")?;
            let word = |key: &str| found.pointer(&format!("/0/{key}")).and_then(serde_json::Value::as_str);
            let via = word("gateway").map_or(String::new(), |gateway| format!("via {gateway} onlink "));
            let way = format!("{to}/{bits} {via}dev {}", word("dev").context("no device")?);
            Ok(Change {
                node: 1,
                // Where XDP looks a route up, the kernel heeds no MTU of it that is not locked.
                narrow: format!("route add {way} mtu lock 1300\n"),
                widen: format!("route del {way}\n"),
            })
        };
        Family::BOTH.into_iter().map(change).collect()
    }
}

/// What `ask` does while the way is narrow.
pub fn narrowed<T>(world: &World, narrow: Narrow, ask: impl FnOnce() -> Result<T>) -> Result<T> {
    let changes = narrow.changes(world)?;
    let run = |change: &Change, script: &str| world.node(change.node).place.namespace.ip(script);
    let done = changes.iter().try_for_each(|change| run(change, &change.narrow)).and_then(|()| ask());
    for change in &changes {
        // Of what could not be narrowed nothing is left; the first error is the one to tell.
        let widened = run(change, &change.widen);
        if done.is_ok() {
            widened?;
        }
    }
    done
}

/// A large request by way of `to`, or a large answer where the way back is narrow, gets through, and who sends too much has learnt how much it may: not of an
/// earlier case.
pub fn learns(ground: &Ground<'_>, from: &Place, to: SocketAddr, narrow: Narrow) -> Result<()> {
    let world = ground.world;
    let (backend, family) = (world.pod("b2"), if to.is_ipv4() { Family::V4 } else { Family::V6 });
    let nodes = world.nodes.iter().map(|node| &node.place);
    for place in nodes.chain([from, backend]) {
        place.namespace.ip("route flush cache\n")?;
        place.namespace.output("ip", &["-6", "route", "flush", "cache"])?;
    }
    // Not both: a veth takes no frame that is longer than its own MTU, so the narrow link to `b2` has nobody to tell `b2` that.
    let large = if narrow == Narrow::ToOutside { "--reply=200000" } else { "--size=200000" };
    let ask = Ask::new(to, Transport::Tcp).timeout(10_000).with(large);
    let report = ground.answered(from, &ask)?;
    let what = || format!("{} -> {to}, narrow {narrow:?}", from.name);
    ensure!(report.backends().keys().eq(["b2"]), "{}: answered by {:?}", what(), report.backends());
    // At connect time the kernel knows the flow by its backend, per packet by the VIP; the backend knows whoever it sees.
    let (teller, peers) = if narrow == Narrow::ToOutside {
        let seen = report.tries.first().and_then(|one| one.answer.as_ref()).context("no answer")?;
        (backend, vec![seen.peer.parse::<SocketAddr>()?.ip()])
    } else {
        (from, vec![to.ip(), backend.ip(family)])
    };
    let known = peers.iter().any(|peer| {
        let route = teller.namespace.output("ip", &["route", "get", &peer.to_string()]);
        route.is_ok_and(|route| route.contains("mtu 1300") || route.contains("mtu lock 1300"))
    });
    ensure!(known, "{}: all arrived, but {} does not know the path MTU", what(), teller.name);
    Ok(())
}

/// From everywhere, to a backend on the other node.
pub fn path_mtu(ground: &Ground<'_>) -> Result<()> {
    let narrow = Narrow::ToBackend;
    narrowed(ground.world, narrow, || {
        for from in ground.origins() {
            for family in Family::BOTH {
                learns(ground, from, Svc::Remote.at(family, Transport::Tcp), narrow)?;
            }
        }
        Ok(())
    })
}
