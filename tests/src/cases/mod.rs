//! What a ClusterIP Service owes its clients, asked with real sockets: one list for every topology and every dataplane.
//!
//! Numbers (A77, A81 …) are statements of `docs/contract.md`, which numbers kube-proxy's behaviour.

pub mod choice;
pub mod collisions;
pub mod external;
pub mod matrix;
pub mod packets;
pub mod refusal;
pub mod rules;
pub mod sctp;
pub mod services;

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
};

use anyhow::{Context, Result, ensure};

use crate::{
    pod::{
        probe::{Report, Try},
        socket::Transport,
    },
    suite::Suite,
    world::{Ask, Fallback, Family, Place, SocketLb, Topology, World, kernel, slower, vip},
};

use services::Svc;

/// A world whose agents have the Services of [`services`] in force.
pub struct Ground<'a> {
    pub world: &'a World,
    /// Who is translated at connect time.
    pub socket_lb: SocketLb,
    /// Whether the pods' links take segments beyond their MTU.
    pub large_segments: bool,
    /// Who serves in the place of eBPF.
    pub fallback: Option<Fallback>,
}

type Case = (&'static str, fn(&Ground<'_>) -> Result<()>);

/// What holds on every kind of link and for pods and clients outside, whoever is translated at connect time.
const EVERYWHERE: [Case; 22] = [
    ("A77: pod to ClusterIP, all endpoints, true source", matrix::pod),
    ("A77: outside to ClusterIP, all endpoints, masqueraded", matrix::outside),
    ("A77: internal policy Local, local endpoints only", matrix::local),
    ("A70 F47: a pod reaches itself through its Service", matrix::hairpin),
    ("A51: host-network endpoints", matrix::host_network),
    ("A47: protocol and port are part of the frontend", matrix::ports),
    ("sockets see the VIP: getpeername, answers", matrix::names),
    ("IPv4 through IPv6 sockets", matrix::mapped),
    ("A48 F50: unused port, refused", refusal::unused_port),
    ("F43: what the backend's own host refuses", refusal::by_the_backend),
    ("A83: internal policy Local without local endpoints, dropped", refusal::local_without_local),
    ("A62: fragmented datagrams", packets::fragments),
    ("A62 F41: the first fragment comes last", packets::disorder),
    ("F44: bursts of datagrams by one call", packets::bursts),
    ("F44: datagrams without a checksum", packets::no_checksum),
    ("megabytes both ways", packets::bulk),
    ("F43: path MTU is found through a VIP", packets::path_mtu),
    ("A61: SCTP: associations from pods and outside, both ways", sctp::served),
    ("A61: SCTP: refused, unserved, shown", sctp::others),
    ("two VIPs of one backend from one source port", collisions::two_vips),
    ("a VIP, then its backend from the same source port", collisions::vip_then_backend),
    ("a backend, then its VIP from the same source port", collisions::backend_then_vip),
];

/// What does not depend on links: asked where everybody is served.
const FURTHER: [Case; 8] = [
    ("frames with a VLAN tag are left alone", packets::tagged),
    ("A81: no endpoints, refused", refusal::no_endpoints),
    ("A86: no endpoints anywhere, internal policy Local, refused", refusal::local_without_any),
    ("A35: only ready endpoints", choice::ready_only),
    ("A32: terminating endpoints where none is ready", choice::terminating),
    ("A33: a terminating endpoint here, a ready one elsewhere, internal policy Local", choice::local_terminating),
    ("A37: zone hints", choice::zones),
    ("A36: node hints", choice::nodes),
];

const NODE: Case = ("A77: node to ClusterIP, all endpoints, the node's source", matrix::node);
const NODE_UNSERVED: Case = ("the node's own processes are not served, and that is said", matrix::node_unserved);

/// Every case, under names that begin with `group`.
pub fn all(suite: &mut Suite, group: &str, ground: &Ground<'_>) {
    let node = if ground.socket_lb == SocketLb::Off { NODE_UNSERVED } else { NODE };
    let everything = ground.socket_lb != SocketLb::Off && ground.world.topology != Topology::Tun;
    let further = FURTHER.into_iter().filter(|_| everything);
    each(suite, group, ground, [node].into_iter().chain(EVERYWHERE).chain(further));
}

/// What those of them are called that IPVS does not keep: it knows a connection by its tuple, and changes no source port, so two that
/// come to the same one are mixed up. And what is eBPF's alone.
const NOT_BY_IPVS: [&str; 5] = [
    "two VIPs of one backend from one source port",
    "a VIP, then its backend from the same source port",
    "a backend, then its VIP from the same source port",
    "frames with a VLAN tag are left alone",
    "A61: SCTP: refused, unserved, shown",
];

/// The same, where IPVS serves.
pub fn by_ipvs(suite: &mut Suite, group: &str, ground: &Ground<'_>) {
    let all = [NODE].into_iter().chain(EVERYWHERE).chain(FURTHER);
    each(suite, group, ground, all.filter(|(name, _)| !NOT_BY_IPVS.contains(name)));
}

fn each(suite: &mut Suite, group: &str, ground: &Ground<'_>, cases: impl IntoIterator<Item = Case>) {
    for (name, case) in cases {
        suite.case(&format!("{group}/{name}"), || {
            ground.world.leaks()?;
            case(ground)?;
            // Every case ends with this: what was meant for a Service went nowhere else, and no packet was spoilt.
            let leaks = ground.world.leaks()?;
            ensure!(leaks.is_empty(), "packets for Services went to the default route: {leaks:?}");
            let bad = ground.world.bad_checksums()?;
            ensure!(bad.is_empty(), "wrong checksums: {bad:?}");
            Ok(())
        });
    }
}

impl Ground<'_> {
    /// Asks and expects an answer every time, on a slow machine as long as that may take. Returns what was seen.
    fn answered(&self, from: &Place, ask: &Ask) -> Result<Report> {
        let patient = ask.clone().timeout(ask.timeout.saturating_mul(slower()));
        let report = self.world.ask(from, &patient.with("--fail-fast"))?;
        ensure!(
            report.errors().is_empty(),
            "{} -> {} {}: {} of {}",
            from.name,
            ask.to,
            ask.transport,
            report.failure().unwrap_or_default(),
            ask.count
        );
        Ok(report)
    }

    /// Asks often and expects exactly these backends to answer, each at least once, each seeing the source that it should.
    fn served_by(&self, from: &Place, svc: Svc, backends: &[&str]) -> Result<()> {
        for family in Family::BOTH {
            for transport in Transport::ALL {
                let to = svc.at(family, transport);
                // With 40 tries a backend of two is missed once in 10^12 runs.
                let count = if backends.len() > 1 { 40 } else { 6 };
                let what = format!("{} -> {to} {transport}", from.name);
                let report = self.answered(from, &Ask::new(to, transport).times(count))?;
                let seen: BTreeSet<String> = report.backends().into_keys().collect();
                let expected: BTreeSet<String> = backends.iter().map(|&backend| backend.to_owned()).collect();
                ensure!(seen == expected, "{what}: answered by {:?}, expected {expected:?}", report.backends());
                for one in &report.tries {
                    self.check_source(from, family, one).with_context(|| what.clone())?;
                }
            }
        }
        Ok(())
    }

    /// The source address that the backend saw (A63, A70, A71, A77).
    fn check_source(&self, from: &Place, family: Family, seen: &Try) -> Result<()> {
        let answer = seen.answer.as_ref().context("no answer")?;
        let peer: SocketAddr = answer.peer.parse()?;
        let backend = self.world.place(&answer.backend).context("an unknown backend")?;
        let expected = self.sources(from, backend, family)?;
        ensure!(
            expected.contains(&peer.ip()),
            "{} saw {} as the source, expected one of {expected:?}",
            backend.name,
            peer.ip()
        );
        Ok(())
    }

    fn sources(&self, from: &Place, backend: &Place, family: Family) -> Result<BTreeSet<IpAddr>> {
        let own = || BTreeSet::from([from.ip(family)]);
        let Some(number) = from.node else {
            // What node1 takes in for an off-cluster client it masquerades, unless its own process is the backend: nothing
            // leaves the node then, and the answer takes the same way back.
            let to_entry = backend.is_node() && backend.node == Some(1);
            if to_entry {
                return self.world.addresses(from);
            }
            // The one that its route says (A75), which is not always the device's first. Before 6.7 nobody tells the programs, and
            // flannel masquerades once more what is for a node.
            let flannel = self.world.topology == Topology::Vxlan && backend.is_node();
            if kernel()? < (6, 7) || flannel {
                return self.world.node_addresses(1);
            }
            return Ok(BTreeSet::from([self.world.route_source(1, backend.ip(family))?]));
        };
        if from.is_node() {
            return self.world.node_addresses(number);
        }
        if backend.name == from.name && self.socket_lb != SocketLb::All {
            return self.world.node_addresses(number);
        }
        // Not ours: flannel masquerades what leaves the pod network.
        if self.world.topology == Topology::Vxlan && backend.is_node() && backend.node != from.node {
            return self.world.node_addresses(number);
        }
        Ok(own())
    }

    /// Expects a refusal, at once, which every kind of socket hears of.
    fn refused(&self, from: &Place, ip: IpAddr, port: u16) -> Result<()> {
        Transport::ALL
            .into_iter()
            .try_for_each(|transport| self.refused_over(transport, from, SocketAddr::new(ip, port)))
    }

    fn refused_over(&self, transport: Transport, from: &Place, to: SocketAddr) -> Result<()> {
        let ask = Ask::new(to, transport).timeout(3000);
        let ask = if transport == Transport::UdpUnconnected { ask.with("--hear-errors") } else { ask };
        let report = self.world.ask(from, &ask)?;
        let what = format!("{} -> {to} {transport}", from.name);
        let one = report.tries.first().context("no try")?;
        ensure!(
            one.error.as_deref().is_some_and(|error| self.is_refusal(from, error)),
            "{what}: expected a refusal, saw {one:?}"
        );
        // On a link without latency the ICMPv6 error arrives while connect() still holds the socket's lock, and the
        // kernel drops it (LockDroppedIcmps): it takes the second SYN, a second later. nftables' reject shows
        // the same.
        let slow = to.is_ipv6() && transport == Transport::Tcp && self.per_packet(from);
        ensure!(one.micros < if slow { 2_500_000 } else { 900_000 }, "{what}: refused only after {} us", one.micros);
        Ok(())
    }

    /// With IPVS the node's own sender takes the way for loopback's, whose MTU is another, and the kernel keeps no other one for it.
    fn loses_large_datagrams(&self, from: &Place, family: Family) -> bool {
        self.fallback == Some(Fallback::Ipvs) && from.is_node() && family == Family::V6
    }

    /// What netfilter refuses on the node's own way out is an error of sending, too.
    fn is_refusal(&self, from: &Place, error: &str) -> bool {
        error == "ECONNREFUSED" || (self.fallback.is_some() && from.is_node() && error == "EPERM")
    }

    /// Expects silence: what netfilter's DROP looks like to the caller (A83). On the node's own way out that is EPERM for a
    /// datagram, and for TCP what it would learn after its retries.
    fn dropped(&self, from: &Place, svc: Svc, family: Family) -> Result<()> {
        for transport in [Transport::Tcp, Transport::Udp] {
            let to = svc.at(family, transport);
            let report = self.world.ask(from, &Ask::new(to, transport).timeout(250))?;
            let one = report.tries.first().context("no try")?;
            let expected = if from.is_node() && transport == Transport::Udp { "EPERM" } else { "ETIMEDOUT" };
            ensure!(
                one.error.as_deref() == Some(expected),
                "{} -> {to} {transport}: expected {expected}, saw {one:?}",
                from.name
            );
        }
        Ok(())
    }

    /// Whether what this place sends to a VIP is translated packet by packet.
    fn per_packet(&self, from: &Place) -> bool {
        match from.node {
            None => true,
            Some(_) if from.is_node() => false,
            Some(_) => self.socket_lb != SocketLb::All,
        }
    }

    /// One of each origin that is served (A77): a pod of node1, node1 itself, the client outside.
    fn origins(&self) -> Vec<&Place> {
        let node = (self.socket_lb != SocketLb::Off).then_some(&self.world.node(1).place);
        [Some(self.world.pod("a1")), node, Some(self.world.outside())].into_iter().flatten().collect()
    }
}

/// The address of a Service port in a family.
fn at(family: Family, svc: Svc, port: u16) -> SocketAddr {
    SocketAddr::new(vip(family, svc.number()), port)
}
