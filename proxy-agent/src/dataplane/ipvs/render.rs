//! From frontends to virtual servers: pure.
//!
//! A virtual server knows one set of backends, whoever asks. A frontend whose origins pick from different sets (a traffic policy of
//! Local, seen from the node's own pods) has two: one found by its address, for whom the outside picks from, and one found by a mark,
//! that the table of nftables puts on whoever picks from the other set.

use std::{collections::BTreeSet, hash::Hasher as _, net::IpAddr};

use super::codec::{Service, Virtual};
use crate::{
    dataplane::netfilter::{is_loopback, names::Fnv},
    desired::{Action, Algorithm, Backend, BackendSet, Frontend, FrontendKind, FrontendSpec, Verdict, Verdicts},
    model::{Family, Protocol},
};

/// Which backends a virtual server has.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Which {
    All,
    Local,
}

impl Which {
    pub(crate) const fn of(verdict: Verdict) -> Option<Self> {
        match verdict.action {
            Action::PickAll => Some(Self::All),
            Action::PickLocal => Some(Self::Local),
            Action::Drop | Action::Reject | Action::Pass => None,
        }
    }

    pub(crate) const fn set(self, spec: &FrontendSpec) -> &BackendSet {
        match self {
            Self::All => &spec.all,
            Self::Local => &spec.local,
        }
    }
}

/// Whose server is found by the frontend's address: the outside's, if it picks at all. Its packets carry marks that others made, and
/// it is the outside that session affinity is for at such addresses.
pub(crate) fn at_address(verdicts: &Verdicts) -> Option<Which> {
    let Verdicts { pod, node, external } = *verdicts;
    [external, node, pod].into_iter().find_map(Which::of)
}

/// The mark by which what picks from the other set is found. The same for ever, so that a restart moves nobody; without the bit that
/// asks for masquerading, which is a part of the mark that IPVS compares.
pub(crate) fn mark(frontend: &Frontend, masquerade: bool, bit: u32) -> u32 {
    let mut hash = Fnv::default();
    hash.write(frontend.to_string().as_bytes());
    let hash = hash.finish();
    // 0 is no mark.
    let id = ((hash >> 32) as u32 ^ hash as u32) & !bit | if bit == 1 { 2 } else { 1 };
    if masquerade { id | bit } else { id }
}

/// Which of its origins are found by a mark, and what they pick from.
pub(crate) fn marked(frontend: &Frontend, verdicts: &Verdicts, bit: u32) -> BTreeSet<(u32, Which)> {
    let Verdicts { pod, node, external } = *verdicts;
    let first = at_address(verdicts);
    let others = [pod, node, external].into_iter().filter_map(|verdict| {
        let which = Which::of(verdict).filter(|which| Some(*which) != first)?;
        Some((mark(frontend, verdict.masquerade, bit), which))
    });
    others.collect()
}

/// Whether there are two.
pub(crate) fn picks_both(verdicts: &Verdicts) -> bool {
    let Verdicts { pod, node, external } = *verdicts;
    let picks: BTreeSet<Which> = [pod, node, external].into_iter().filter_map(Which::of).collect();
    picks.len() > 1
}

/// A virtual server as it should be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Server {
    pub service: Service,
    pub backends: BackendSet,
    pub stay: Stay,
}

/// What becomes of connections to backends that are not chosen any more.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Stay {
    /// They go on until they end.
    All,
    /// Those that lead to these.
    Only(BackendSet),
}

impl Stay {
    pub fn keeps(&self, backend: &Backend) -> bool {
        match self {
            Self::All => true,
            Self::Only(backends) => backends.binary_search(backend).is_ok(),
        }
    }

    /// Of a frontend that is gone (contract A103).
    pub(super) fn without_frontend(protocol: Protocol) -> Self {
        match protocol {
            Protocol::Udp => Self::Only(BackendSet::from([])),
            Protocol::Tcp | Protocol::Sctp => Self::All,
        }
    }
}

/// What virtual servers are made by.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Renderer {
    /// For whoever asks for nothing else.
    pub scheduler: String,
    /// The mark's bit that asks for masquerading.
    pub bit: u32,
}

/// Takes turns.
pub(super) const ROUND_ROBIN: &str = "rr";
/// Maglev's hash of the flow, or of the client alone.
pub(super) const MAGLEV: &str = "mh";
/// Those that go by a table of hashes.
const HASHES: [&str; 2] = [MAGLEV, "sh"];

impl Renderer {
    pub fn servers(&self, frontend: &Frontend, spec: &FrontendSpec) -> Vec<Server> {
        let FrontendSpec { verdicts, algorithm, affinity_secs, alive, .. } = spec;
        let Frontend { addr, port, protocol } = *frontend;
        if is_loopback(addr) {
            return Vec::new();
        }
        let scheduler = match algorithm {
            // Each server remembers clients for itself: a hash has all of a Service's agree on whom a client gets (contract A95).
            _ if affinity_secs.is_some() => MAGLEV,
            Algorithm::Random | Algorithm::Scheduler => &self.scheduler,
            Algorithm::RoundRobin => ROUND_ROBIN,
            Algorithm::Maglev => MAGLEV,
        };
        let stay = match (protocol, alive) {
            (Protocol::Udp, Some(alive)) => Stay::Only(alive.clone()),
            _ => Stay::All,
        };
        let server = |at, which: Which, persistence: Option<u32>| Server {
            service: Service {
                at,
                scheduler: scheduler.to_owned(),
                persistence,
                by_port: scheduler == MAGLEV && affinity_secs.is_none(),
                fallback: HASHES.contains(&scheduler),
            },
            backends: which.set(spec).clone(),
            stay: stay.clone(),
        };
        let first = at_address(verdicts);
        let first = first.map(|which| server(Virtual::At { addr, port: port.get(), protocol }, which, *affinity_secs));
        // The kernel leaves a port as it is where a persistent service is found by a mark: the hash has to do.
        let others = marked(frontend, verdicts, self.bit)
            .into_iter()
            .map(|(mark, which)| server(Virtual::Marked { family: Family::of(addr), mark }, which, None));
        first.into_iter().chain(others).collect()
    }
}

/// The address that our device must hold for packets to come to IPVS: the node has its own anyway.
pub(super) fn held_address(frontend: &Frontend, spec: &FrontendSpec) -> Option<IpAddr> {
    let Verdicts { pod, node, external } = spec.verdicts;
    let is_ours = [pod, node, external].iter().any(|verdict| verdict.action != Action::Pass);
    (is_ours && spec.kind != FrontendKind::NodePort).then_some(frontend.addr)
}

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;

    use super::*;
    use crate::{
        dataplane::netfilter::sample,
        model::{Port, ServiceKey, ServicePortName},
    };

    fn verdict(action: Action, masquerade: bool) -> Verdict {
        Verdict { action, masquerade }
    }

    fn spec(kind: FrontendKind, family: Family, protocol: Protocol, verdicts: Verdicts) -> FrontendSpec {
        let backends = |lasts: &[u8]| -> BackendSet {
            let backend = |last: &u8| Backend { addr: sample::addr(family, *last), port: Port::new(8080).unwrap() };
            lasts.iter().map(backend).collect()
        };
        FrontendSpec {
            service: ServicePortName { service: ServiceKey::new("default", "web"), port: "".into(), protocol },
            kind,
            all: backends(&[10, 11, 12]),
            local: backends(&[11]),
            verdicts,
            algorithm: Algorithm::Random,
            affinity_secs: None,
            source_ranges: None,
            pods_per_packet: false,
            alive: (protocol == Protocol::Udp).then(|| backends(&[10, 11, 12, 13])),
        }
    }

    fn dump(frontend: &Frontend, spec: &FrontendSpec) -> String {
        let renderer = Renderer { scheduler: "rr".into(), bit: 1 << 14 };
        let mut text = String::new();
        for Server { service, backends, stay } in renderer.servers(frontend, spec) {
            let Service { at, scheduler, persistence, by_port, fallback } = service;
            let at = match at {
                Virtual::At { addr, port, protocol } => format!("{addr} {port} {protocol}"),
                Virtual::Marked { family, mark } => format!("{family:?} mark {mark:#x}"),
            };
            let backends: Vec<String> = backends.iter().map(ToString::to_string).collect();
            let stay = match stay {
                Stay::All => "connections stay".to_owned(),
                Stay::Only(alive) => format!("connections to {} stay", alive.len()),
            };
            let persistence = persistence.map(|seconds| format!(" for {seconds} s")).unwrap_or_default();
            let by_port = if by_port { " by port" } else { "" };
            assert_eq!(fallback, scheduler == "mh");
            let _ = writeln!(text, "{at}: {scheduler}{by_port}{persistence} [{}] {stay}", backends.join(" "));
        }
        if let Some(addr) = held_address(frontend, spec) {
            let _ = writeln!(text, "holds {addr}");
        }
        text
    }

    const PLAIN: Verdicts = Verdicts {
        pod: Verdict { action: Action::PickAll, masquerade: false },
        node: Verdict { action: Action::PickAll, masquerade: false },
        external: Verdict { action: Action::PickAll, masquerade: true },
    };

    /// External traffic policy Local.
    const LOCAL: Verdicts = Verdicts {
        pod: Verdict { action: Action::PickAll, masquerade: false },
        node: Verdict { action: Action::PickAll, masquerade: true },
        external: Verdict { action: Action::PickLocal, masquerade: false },
    };

    fn at(family: Family, port: u16, protocol: Protocol) -> Frontend {
        Frontend { addr: sample::addr(family, 100), port: Port::new(port).unwrap(), protocol }
    }

    #[test]
    fn frontends_are_virtual_servers() {
        let cluster_ip = FrontendKind::ClusterIp;
        let v4 = |verdicts| spec(cluster_ip, Family::V4, Protocol::Tcp, verdicts);
        let web = at(Family::V4, 80, Protocol::Tcp);
        assert_eq!(
            dump(&web, &v4(PLAIN)),
            "192.0.2.100 80 TCP: rr [192.0.2.10:8080 192.0.2.11:8080 192.0.2.12:8080] connections stay\nholds 192.0.2.100\n"
        );
        let hashed = FrontendSpec { algorithm: Algorithm::Maglev, ..v4(PLAIN) };
        assert!(dump(&web, &hashed).starts_with("192.0.2.100 80 TCP: mh by port ["));
        let sticky = FrontendSpec { affinity_secs: Some(60), ..hashed };
        assert!(dump(&web, &sticky).starts_with("192.0.2.100 80 TCP: mh for 60 s ["));
        let turns = FrontendSpec { algorithm: Algorithm::RoundRobin, ..sticky };
        assert!(dump(&web, &turns).starts_with("192.0.2.100 80 TCP: mh for 60 s ["));
        for (scheduler, passes_by) in [("rr", false), ("lc", false), ("sh", true), ("mh", true)] {
            let renderer = Renderer { scheduler: scheduler.into(), bit: 1 << 14 };
            let servers = renderer.servers(&web, &v4(PLAIN));
            assert!(servers.iter().all(|server| server.service.fallback == passes_by), "{servers:?}");
        }
        let dns = spec(FrontendKind::NodePort, Family::V6, Protocol::Udp, PLAIN);
        assert_eq!(
            dump(&at(Family::V6, 30_053, Protocol::Udp), &dns),
            "2001:db8::64 30053 UDP: rr [[2001:db8::a]:8080 [2001:db8::b]:8080 [2001:db8::c]:8080] connections to 4 stay\n",
            "the node has that address itself"
        );
    }

    #[test]
    fn who_picks_from_another_set_is_found_by_a_mark() {
        let local = spec(FrontendKind::LoadBalancer, Family::V4, Protocol::Tcp, LOCAL);
        let web = at(Family::V4, 80, Protocol::Tcp);
        assert_eq!(
            dump(&web, &local),
            "192.0.2.100 80 TCP: rr [192.0.2.11:8080] connections stay\n\
             V4 mark 0xdb858941: rr [192.0.2.10:8080 192.0.2.11:8080 192.0.2.12:8080] connections stay\n\
             V4 mark 0xdb85c941: rr [192.0.2.10:8080 192.0.2.11:8080 192.0.2.12:8080] connections stay\n\
             holds 192.0.2.100\n"
        );
        let sticky = FrontendSpec { affinity_secs: Some(60), ..local.clone() };
        let text = dump(&web, &sticky);
        assert!(
            text.contains("TCP: mh for 60 s [192.0.2.11:8080]") && text.contains("mark 0xdb858941: mh ["),
            "{text}"
        );
        // Nobody of the outside is served: the pods' is the only set.
        let dropped = Verdicts { external: verdict(Action::Drop, false), ..LOCAL };
        assert_eq!(at_address(&dropped), Some(Which::All));
        assert!(marked(&web, &dropped, 1 << 14).is_empty());
    }

    #[test]
    fn who_picks_nothing_has_no_server() {
        let all = |action| [action; 3].map(|action| verdict(action, false));
        for (action, holds) in [(Action::Reject, true), (Action::Drop, true), (Action::Pass, false)] {
            let [pod, node, external] = all(action);
            let spec = spec(FrontendKind::ClusterIp, Family::V4, Protocol::Tcp, Verdicts { pod, node, external });
            let text = dump(&at(Family::V4, 80, Protocol::Tcp), &spec);
            assert_eq!(text, if holds { "holds 192.0.2.100\n" } else { "" }, "{action:?}");
        }
        let loopback = Frontend { addr: [127, 0, 0, 1].into(), ..at(Family::V4, 30_000, Protocol::Tcp) };
        assert_eq!(dump(&loopback, &spec(FrontendKind::NodePort, Family::V4, Protocol::Tcp, PLAIN)), "");
    }

    #[test]
    fn marks_leave_the_bit_for_masquerading_alone() {
        for port in 1..2000 {
            for shift in [0, 14, 31] {
                let (bit, frontend) = (1 << shift, at(Family::V4, port, Protocol::Tcp));
                let (plain, other) = (mark(&frontend, false, bit), mark(&frontend, true, bit));
                assert!(plain != 0 && plain & bit == 0 && other == plain | bit, "{plain:#x} {other:#x}");
            }
        }
    }
}
