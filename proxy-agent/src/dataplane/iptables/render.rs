//! From ServicePorts to the words of iptables: pure.
//!
//! Who knows kube-proxy's chains finds his way by their second halves:
//!
//! ```text
//! nat     PROXY-SERVICES      by address, protocol and port to one of:
//!         PROXY-INT-<hash>    a ClusterIP: asks for masquerading where its verdict says so, then picks
//!         PROXY-EXT-<hash>    a node port, external IP, load balancer's address: the same
//!         PROXY-FW-<hash>     from the source ranges only
//!         PROXY-SVC-<hash>    one of all endpoints: DNAT
//!         PROXY-SVL-<hash>    one of the local endpoints
//!         PROXY-SEP-<hash>    an endpoint that remembers its clients
//!         PROXY-HAIRPIN       who was sent to himself is masqueraded, by address
//! filter  PROXY-SERVICES      what nat has left as it was: refused, dropped, and everything else for a guarded address
//! ```
//!
//! A hash is of the ServicePort (and of the endpoint), so a name stays as endpoints come and go. The chains of a ServicePort are its own.
//!
//! Legacy iptables reads and writes a whole table for each change, so what an endpoint costs is kept low: a rule in each list that it is chosen
//! from, and one for all Services that tells that it was sent to itself. A chain is two entries of the table before there is a rule in it, and a
//! comment is more than twice as long as the rest of a rule.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use ipnet::IpNet;

use super::loopback;
use crate::{
    dataplane::netfilter::{PROTOCOLS, comment, names},
    desired::{Action, Algorithm, Backend, BackendSet, Frontend, FrontendKind, FrontendSpec, Verdict, Verdicts},
    model::{Family, Protocol, ServicePortName},
};

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(super) enum Table {
    Nat,
    Filter,
    Mangle,
}

impl Table {
    /// In the order in which they are written: what is to be translated is, before the rest is refused.
    pub(super) const ALL: [Self; 3] = [Self::Nat, Self::Filter, Self::Mangle];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Nat => "nat",
            Self::Filter => "filter",
            Self::Mangle => "mangle",
        }
    }
}

pub(super) type ChainName = (Table, String);
/// A rule of ours in a chain that is not.
pub(super) type Jump = (Table, &'static str, String);
/// Rules as iptables-restore takes them, without `-A CHAIN`.
pub(super) type Rules = Vec<String>;

/// What is found by address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(super) enum Tree {
    /// Frontends, as the next three.
    Nat,
    /// From pods of this node, where they fare otherwise than the outside.
    NatPods,
    Filter,
    FilterPods,
    /// Endpoints.
    Hairpin,
}

impl Tree {
    pub(super) const ALL: [Self; 5] = [Self::Nat, Self::NatPods, Self::Filter, Self::FilterPods, Self::Hairpin];
    pub(super) const OF_FRONTENDS: [Self; 4] = [Self::Nat, Self::NatPods, Self::Filter, Self::FilterPods];

    pub(super) const fn table(self) -> Table {
        match self {
            Self::Nat | Self::NatPods | Self::Hairpin => Table::Nat,
            Self::Filter | Self::FilterPods => Table::Filter,
        }
    }

    pub(super) const fn is_for_pods(self) -> bool {
        matches!(self, Self::NatPods | Self::FilterPods)
    }

    /// What pods of this node are asked for first.
    pub(super) const fn of_pods(self) -> Option<Self> {
        match self {
            Self::Nat => Some(Self::NatPods),
            Self::Filter => Some(Self::FilterPods),
            Self::NatPods | Self::FilterPods | Self::Hairpin => None,
        }
    }

    /// Its chain.
    pub(super) const fn top(self) -> &'static str {
        match self {
            Self::Nat | Self::Filter => SERVICES,
            Self::NatPods | Self::FilterPods => POD_SERVICES,
            Self::Hairpin => HAIRPIN,
        }
    }
}

/// What all our chains begin with.
pub(super) const PREFIX: &str = "PROXY-";
/// The same, of what is only tried.
pub(super) const SCRATCH: &str = "PROXT-";
pub(super) const SERVICES: &str = "PROXY-SERVICES";
pub(super) const POD_SERVICES: &str = "PROXY-POD-SERVICES";
/// Leads what pods of this node send to `POD_SERVICES`.
pub(super) const PODS: &str = "PROXY-PODS";
pub(super) const MARK_MASQ: &str = "PROXY-MARK-MASQ";
/// The same, unless a pod of this node sends it.
pub(super) const MARK_OTHERS: &str = "PROXY-MARK-OTHERS";
pub(super) const POSTROUTING: &str = "PROXY-POSTROUTING";
pub(super) const HAIRPIN: &str = "PROXY-HAIRPIN";
pub(super) const REJECT: &str = "PROXY-REJECT";
pub(super) const DROP: &str = "PROXY-DROP";
pub(super) const GUARD: &str = "PROXY-GUARD";
pub(super) const FORWARD: &str = "PROXY-FORWARD";
pub(super) const INVALID: &str = "PROXY-INVALID";
/// Lets load balancers ask at health-check node ports.
pub(super) const NODEPORTS: &str = "PROXY-NODEPORTS";
pub(super) const LOOPBACK: &str = "PROXY-LOOPBACK";
/// Tells whether somebody else flushed a table.
pub(super) const CANARY: &str = "PROXY-CANARY";

/// No packet of it opens anything (F45).
pub(super) const OPENS_NOTHING: &str = "-p tcp -m tcp ! --tcp-flags FIN,SYN,RST,ACK SYN";
/// From the node itself, whatever the detection of pods says of its address.
const FROM_NODE: &str = "-m addrtype --src-type LOCAL";

/// How pods of this node are told.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Pods {
    Devices(BTreeSet<String>),
    Cidrs(BTreeSet<IpNet>),
}

impl Pods {
    /// Matches that tell them by where a packet comes from; `to`: by where it goes.
    pub(super) fn matches(&self, to: bool) -> Vec<String> {
        match self {
            Self::Devices(names) => {
                names.iter().map(|name| format!("{} {name}", if to { "-o" } else { "-i" })).collect()
            }
            Self::Cidrs(nets) => nets.iter().map(|net| format!("{} {net}", if to { "-d" } else { "-s" })).collect(),
        }
    }

    fn are_told_by_address(&self) -> bool {
        matches!(self, Self::Cidrs(_))
    }
}

/// What one ServicePort asks for in one family.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Piece {
    pub(super) chains: BTreeMap<ChainName, Rules>,
    pub(super) entries: BTreeMap<(Tree, Frontend), Rules>,
    /// Endpoints that may be sent to themselves.
    pub(super) hairpin: BTreeSet<IpAddr>,
}

/// The frontends of one ServicePort.
pub(super) type Unit = BTreeMap<Frontend, Arc<FrontendSpec>>;

/// The words of one family.
#[derive(Clone, Debug)]
pub(super) struct Renderer {
    pub(super) family: Family,
    pub(super) mark: u32,
    pub(super) masquerade_ports: (u16, u16),
    /// Node ports of 127.0.0.1 are asked for, at the price of `route_localnet` (contract A54).
    pub(super) localhost: bool,
    /// What `route_localnet` was before it was set; `None`: not known yet, or not set. It may be still set though it is not asked for.
    pub(super) route_localnet: Option<i32>,
    /// The kernel's conntrack takes what is out of its window, so nothing is invalid (contract A109).
    pub(super) liberal: bool,
}

impl Renderer {
    /// Whether this dataplane programs it at all.
    pub(super) fn serves(&self, frontend: &Frontend) -> bool {
        !frontend.addr.is_loopback() || (self.localhost && self.family == Family::V4)
    }

    /// Of an address alone.
    pub(super) fn to(addr: IpAddr) -> String {
        format!("-d {}", IpNet::from(addr))
    }

    pub(super) fn guard(addr: IpAddr) -> String {
        format!("{} -j {GUARD}", Self::to(addr))
    }

    /// An endpoint that was sent to itself would answer itself past the node.
    pub(super) fn hairpin(addr: IpAddr) -> String {
        let addr = IpNet::from(addr);
        format!("-s {addr} -d {addr} -j {MARK_MASQ}")
    }

    /// `-d … -p … --dport …`, with what a person wants to know.
    fn frontend(frontend: &Frontend, remark: &str) -> String {
        let Frontend { addr, port, protocol } = frontend;
        let protocol = word(*protocol);
        format!("{} -p {protocol} -m comment --comment \"{remark}\" -m {protocol} --dport {port}", Self::to(*addr))
    }

    pub(super) fn piece(&self, unit: &Unit) -> Piece {
        let mut maker = Maker { renderer: self, piece: Piece::default() };
        for (frontend, spec) in unit.iter().filter(|(frontend, _)| self.serves(frontend)) {
            maker.frontend(frontend, spec);
        }
        maker.piece
    }

    const fn unreachable(&self) -> &'static str {
        match self.family {
            Family::V4 => "icmp-port-unreachable",
            Family::V6 => "icmp6-port-unreachable",
        }
    }

    /// Who is remembered: the whole address, as iptables-save prints it.
    const fn by_source(&self) -> &'static str {
        match self.family {
            Family::V4 => "--mask 255.255.255.255 --rsource",
            Family::V6 => "--mask ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff --rsource",
        }
    }

    /// Chains that are always there, in part by what pods are told by and which ports load balancers ask at.
    pub(super) fn fixed(&self, pods: &Pods, health: &BTreeSet<u16>) -> BTreeMap<ChainName, Rules> {
        let mark = self.mark;
        let mut from_pods = Rules::new();
        let mut others = Rules::new();
        if pods.are_told_by_address() {
            // The node may have an address of its pods' range (a bridge's).
            from_pods.push(format!("{FROM_NODE} -j RETURN"));
            others.push(format!("{FROM_NODE} -g {MARK_MASQ}"));
        }
        from_pods.extend(pods.matches(false).iter().map(|from| format!("{from} -g {POD_SERVICES}")));
        others.extend(pods.matches(false).iter().map(|from| format!("{from} -j RETURN")));
        others.push(format!("-g {MARK_MASQ}"));
        let chain = |table, name: &str, rules: Rules| ((table, name.to_owned()), rules);
        let (low, high) = self.masquerade_ports;
        let masquerade = [
            format!("-m conntrack --ctstate DNAT -j {HAIRPIN}"),
            format!("-m mark ! --mark {mark:#x}/{mark:#x} -j RETURN"),
            // A tunnel would show the mark again, and the packet would be masqueraded a second time.
            format!("-j MARK --set-xmark {mark:#x}/0x0"),
        ]
        .into_iter()
        // Ports have to be some protocol's; and what is translated is of one of these.
        .chain(
            PROTOCOLS
                .map(|protocol| format!("-p {} -j MASQUERADE --to-ports {low}-{high} --random-fully", word(protocol))),
        )
        .collect();
        let reject = vec![
            format!("{OPENS_NOTHING} -j RETURN"),
            format!("-m conntrack --ctstate NEW -j REJECT --reject-with {}", self.unreachable()),
        ];
        let drop = vec![format!("{OPENS_NOTHING} -j RETURN"), "-m conntrack --ctstate NEW -j DROP".to_owned()];
        let ports = health.iter().map(|port| {
            format!("-p tcp -m comment --comment \"health check node port\" -m tcp --dport {port} -j ACCEPT")
        });
        let canary = |table| {
            chain(
                table,
                CANARY,
                vec!["-m comment --comment \"here until somebody flushes this table\" -j RETURN".into()],
            )
        };
        let mut all = BTreeMap::from([
            chain(Table::Nat, PODS, from_pods.clone()),
            chain(Table::Filter, PODS, from_pods),
            chain(Table::Nat, MARK_MASQ, vec![format!("-j MARK --set-xmark {mark:#x}/{mark:#x}")]),
            chain(Table::Nat, MARK_OTHERS, others),
            chain(Table::Nat, POSTROUTING, masquerade),
            chain(Table::Filter, REJECT, reject),
            chain(Table::Filter, DROP, drop),
            // Nothing for a guarded address leaves the node (contract A48, A50).
            chain(Table::Filter, GUARD, vec![format!("-j {REJECT}"), "-j DROP".to_owned()]),
            chain(Table::Filter, NODEPORTS, ports.collect()),
            chain(
                Table::Filter,
                FORWARD,
                vec![
                    format!("-m conntrack --ctstate INVALID -j {INVALID}"),
                    format!("-m comment --comment \"masqueraded\" -m mark --mark {mark:#x}/{mark:#x} -j ACCEPT"),
                    "-m comment --comment \"more of what was translated\" -m conntrack --ctstate RELATED,ESTABLISHED -m conntrack --ctstate DNAT -j ACCEPT"
                        .to_owned(),
                ],
            ),
            chain(Table::Filter, INVALID, self.invalid(pods)),
            canary(Table::Nat),
            canary(Table::Filter),
            canary(Table::Mangle),
        ]);
        all.extend(self.shields_loopback().then(|| self.shield()));
        all
    }

    /// Chains and jumps where nothing is served: what the setting lets in is kept out for as long as it stands.
    pub(super) fn alone(&self) -> (BTreeMap<ChainName, Rules>, Vec<Jump>) {
        let stands = self.route_localnet.is_some();
        let (chains, jumps) = (stands.then(|| self.shield()), stands.then(Self::to_shield));
        (chains.into_iter().collect(), jumps.into_iter().collect())
    }

    /// What `route_localnet` lets in from the neighbours (contract A54).
    fn shield(&self) -> (ChainName, Rules) {
        let note = self.route_localnet.map(|before| format!("-m comment --comment \"{}\" ", loopback::note(before)));
        let martian = format!(
            "-d 127.0.0.0/8 ! -s 127.0.0.0/8 {}-m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP",
            note.unwrap_or_default()
        );
        ((Table::Filter, LOOPBACK.to_owned()), vec![martian])
    }

    fn to_shield() -> Jump {
        (Table::Filter, "INPUT", format!("-m comment --comment \"loopback is the node's own\" -j {LOOPBACK}"))
    }

    pub(super) const fn opens_loopback(&self) -> bool {
        self.localhost && matches!(self.family, Family::V4)
    }

    /// Where something is served. As long as the setting stands, whoever asks for it.
    pub(super) const fn shields_loopback(&self) -> bool {
        matches!(self.family, Family::V4) && (self.localhost || self.route_localnet.is_some())
    }

    /// An answer that conntrack takes for invalid would reach the client as the endpoint's own, which resets its connection (contract A109).
    /// Where pods can be told, it is dropped only if one of them has a part in it: what is merely routed through may come one way only.
    fn invalid(&self, pods: &Pods) -> Rules {
        if self.liberal {
            return Rules::new();
        }
        let matches: Rules = [false, true].iter().flat_map(|to| pods.matches(*to)).collect();
        if matches.is_empty() && pods.are_told_by_address() {
            return vec!["-j DROP".to_owned()];
        }
        matches.iter().map(|one| format!("{one} -j DROP")).collect()
    }

    /// Rules of ours in chains that are not.
    pub(super) fn jumps(&self) -> Vec<Jump> {
        let unserved = format!(
            "-m conntrack --ctstate INVALID,NEW,UNTRACKED -m comment --comment \"Services that nobody serves\" -j {SERVICES}"
        );
        let services = format!("-m comment --comment \"Services\" -j {SERVICES}");
        let mut jumps = vec![
            (Table::Nat, "PREROUTING", services.clone()),
            (Table::Nat, "OUTPUT", services),
            (Table::Nat, "POSTROUTING", format!("-m comment --comment \"masquerading for Services\" -j {POSTROUTING}")),
            (Table::Filter, "INPUT", unserved.clone()),
            (
                Table::Filter,
                "INPUT",
                format!("-m comment --comment \"health checks of load balancers\" -j {NODEPORTS}"),
            ),
            (Table::Filter, "FORWARD", unserved.clone()),
            (Table::Filter, "FORWARD", format!("-m comment --comment \"forwarding for Services\" -j {FORWARD}")),
            // What is for the node itself comes in again, where a refusal is told as one: here, it is as good as a drop (`EPERM`).
            (Table::Filter, "OUTPUT", format!("-m addrtype ! --dst-type LOCAL {unserved}")),
        ];
        jumps.extend(self.shields_loopback().then(Self::to_shield));
        jumps
    }
}

/// What becomes of a packet in nat.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Way {
    /// Its chain; `None`: it stays as it is.
    pick: Option<String>,
    masquerade: bool,
}

/// What becomes in filter of a packet that nat left as it was.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Rest {
    /// None is left.
    Never,
    /// Somebody else's.
    Pass,
    Refuse,
    Drop,
}

/// A verdict, as the two tables have it.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Outcome {
    way: Way,
    rest: Rest,
}

struct Maker<'a> {
    renderer: &'a Renderer,
    piece: Piece,
}

impl Maker<'_> {
    /// Of frontends that share a chain all want the same of it, as they come from one plan. If they do not after all, the later one gets
    /// a chain of another name.
    fn chain(&mut self, table: Table, kind: &str, parts: &[&str], rules: Rules) -> String {
        let name = |hash: u64| format!("{PREFIX}{kind}-{hash:016X}");
        let mut chosen = name(names::hash(parts.iter().copied()));
        let taken = self.piece.chains.get(&(table, chosen.clone()));
        if taken.is_some_and(|taken| *taken != rules) {
            chosen = name(names::hash(parts.iter().copied().chain(rules.iter().map(String::as_str))));
        }
        self.piece.chains.insert((table, chosen.clone()), rules);
        chosen
    }

    fn frontend(&mut self, frontend: &Frontend, spec: &FrontendSpec) {
        let FrontendSpec { verdicts: Verdicts { pod, node, external }, .. } = spec;
        let [pod, node, external] = [pod, node, external].map(|verdict| self.outcome(spec, *verdict));
        self.translate(frontend, spec, &pod.way, &node.way, &external.way);
        self.refuse(frontend, spec, pod.rest, node.rest, external.rest);
    }

    fn outcome(&mut self, spec: &FrontendSpec, Verdict { action, masquerade }: Verdict) -> Outcome {
        let FrontendSpec { all, local, .. } = spec;
        let (pick, rest) = match action {
            Action::PickAll => (self.pick(spec, "SVC", all), Rest::Never),
            Action::PickLocal => (self.pick(spec, "SVL", local), Rest::Never),
            Action::Drop => (None, Rest::Drop),
            Action::Reject => (None, Rest::Refuse),
            Action::Pass => (None, Rest::Pass),
        };
        let rest = if pick.is_none() && rest == Rest::Never { Rest::Refuse } else { rest };
        Outcome { way: Way { masquerade: masquerade && pick.is_some(), pick }, rest }
    }

    /// One of a set of backends.
    fn pick(&mut self, spec: &FrontendSpec, kind: &str, set: &BackendSet) -> Option<String> {
        let FrontendSpec { service, algorithm, affinity_secs, .. } = spec;
        let (mut remembered, mut chosen) = (Rules::new(), Rules::new());
        for (index, backend) in set.iter().enumerate() {
            self.piece.hairpin.insert(backend.addr);
            let choice = match (set.len() - index, algorithm) {
                (1, _) => String::new(),
                (left, Algorithm::RoundRobin) => format!("-m statistic --mode nth --every {left} --packet 0 "),
                // Of those that are left, each is as likely as the others.
                (left, Algorithm::Random | Algorithm::Maglev | Algorithm::Scheduler) => {
                    format!("-m statistic --mode random --probability {} ", probability(left))
                }
            };
            let Some(seconds) = affinity_secs else {
                chosen.push(translation(service, backend, &choice));
                continue;
            };
            let endpoint = self.endpoint(service, backend);
            remembered.push(format!(
                "-m recent --rcheck --seconds {} --reap --name {} {} -j {endpoint}",
                seconds.max(&1),
                list(service, backend),
                self.renderer.by_source()
            ));
            chosen.push(format!("{choice}-j {endpoint}"));
        }
        if chosen.is_empty() {
            return None;
        }
        remembered.append(&mut chosen);
        let (name, protocol) = id(service);
        Some(self.chain(Table::Nat, kind, &[&name, protocol], remembered))
    }

    /// Who is remembered at an endpoint is so for all frontends of the port, which is what the chain is of (contract A95, A97).
    fn endpoint(&mut self, service: &ServicePortName, backend: &Backend) -> String {
        let remember = format!("-m recent --set --name {} {} ", list(service, backend), self.renderer.by_source());
        let rules = vec![translation(service, backend, &remember)];
        let (name, protocol) = id(service);
        self.chain(Table::Nat, "SEP", &[&name, protocol, &plain(backend).to_string()], rules)
    }

    /// The frontend in nat.
    fn translate(&mut self, frontend: &Frontend, spec: &FrontendSpec, pod: &Way, node: &Way, external: &Way) {
        // Masquerading that only others than pods get is told by a chain that all share.
        let apart = pod.pick != external.pick || (pod.masquerade && !external.masquerade);
        let mut rules = Rules::new();
        if node != external {
            match &node.pick {
                Some(pick) => {
                    rules.extend(node.masquerade.then(|| format!("{FROM_NODE} -j {MARK_MASQ}")));
                    rules.push(format!("{FROM_NODE} -j {pick}"));
                }
                None => rules.push(format!("{FROM_NODE} -j RETURN")),
            }
        }
        if let Some(pick) = &external.pick {
            let mark = if pod.masquerade || apart { MARK_MASQ } else { MARK_OTHERS };
            rules.extend(external.masquerade.then(|| format!("-j {mark}")));
            rules.push(format!("-j {pick}"));
        }
        if external.pick.is_some() || node.pick.is_some() {
            self.entry(Tree::Nat, frontend, spec, rules, node.pick.is_some());
        }
        if apart {
            let rules = match &pod.pick {
                Some(pick) => {
                    let mark = pod.masquerade.then(|| format!("-j {MARK_MASQ}"));
                    mark.into_iter().chain([format!("-j {pick}")]).collect()
                }
                // Not as the outside.
                None => vec!["-j ACCEPT".to_owned()],
            };
            self.entry(Tree::NatPods, frontend, spec, rules, false);
        }
    }

    fn entry(&mut self, tree: Tree, frontend: &Frontend, spec: &FrontendSpec, rules: Rules, node: bool) {
        let FrontendSpec { service, kind, source_ranges, .. } = spec;
        let (name, protocol) = id(service);
        let who = if tree.is_for_pods() { "pods" } else { "all" };
        let kind_word = kind.to_string();
        let mut target = match rules.as_slice() {
            [one] if is_plain_jump(one) => one.trim_start_matches("-j ").to_owned(),
            _ => {
                let chain = if *kind == FrontendKind::ClusterIp { "INT" } else { "EXT" };
                self.chain(Table::Nat, chain, &[&name, protocol, who, &kind_word], rules)
            }
        };
        if let Some(ranges) = source_ranges {
            let mut rules: Rules = ranges.iter().map(|net| format!("-s {net} -g {target}")).collect();
            if !tree.is_for_pods() {
                let node = if node { format!("-g {target}") } else { "-j RETURN".to_owned() };
                rules.insert(0, format!("{FROM_NODE} {node}"));
            }
            target = self.chain(Table::Nat, "FW", &[&name, protocol, who, &kind_word], rules);
        }
        let remark = remark(service, &kind_word);
        let rule = format!("{} -j {target}", Renderer::frontend(frontend, &remark));
        self.piece.entries.insert((tree, *frontend), vec![rule]);
    }

    /// The frontend in filter.
    fn refuse(&mut self, frontend: &Frontend, spec: &FrontendSpec, pod: Rest, node: Rest, external: Rest) {
        let mut rules = Rules::new();
        let FrontendSpec { service, source_ranges, kind, .. } = spec;
        let words = |rest: Rest| match rest {
            Rest::Refuse => "has no endpoints",
            Rest::Drop => "has no local endpoints",
            Rest::Never | Rest::Pass => "is not for this source",
        };
        let rule = |matches: &str, rest: Rest, target: &str| {
            let remark = remark(service, words(rest));
            format!("{}{matches} -j {target}", Renderer::frontend(frontend, &remark))
        };
        let target = |rest: Rest| match rest {
            Rest::Refuse => Some(REJECT),
            Rest::Drop => Some(DROP),
            Rest::Never | Rest::Pass => None,
        };
        let from_node = format!(" {FROM_NODE}");
        let others = match source_ranges {
            None => target(external).map(str::to_owned),
            // Whoever is in none of the ranges (contract A91).
            Some(ranges) => Some(match external {
                Rest::Never | Rest::Drop => DROP.to_owned(),
                Rest::Refuse | Rest::Pass => {
                    let inside = if external == Rest::Refuse { format!("-g {REJECT}") } else { "-j RETURN".to_owned() };
                    let mut rules: Rules = ranges.iter().map(|net| format!("-s {net} {inside}")).collect();
                    rules.push(format!("-j {DROP}"));
                    let (name, protocol) = id(service);
                    self.chain(Table::Filter, "FW", &[&name, protocol, &kind.to_string()], rules)
                }
            }),
        };
        let same = source_ranges.is_none() && node == external;
        if let Some(target) = target(node)
            && !same
        {
            rules.push(rule(&from_node, node, target));
        }
        if let Some(target) = &others {
            let spared = if node == Rest::Pass && !same { " -m addrtype ! --src-type LOCAL" } else { "" };
            rules.push(rule(spared, external, target));
        }
        if !rules.is_empty() {
            self.piece.entries.insert((Tree::Filter, *frontend), rules);
        }
        // What nat does for pods alone leaves nothing to be done here.
        if let Some(target) = target(pod)
            && pod != external
        {
            self.piece.entries.insert((Tree::FilterPods, *frontend), vec![rule("", pod, target)]);
        }
    }
}

fn is_plain_jump(rule: &str) -> bool {
    rule.strip_prefix("-j ").is_some_and(|rest| !rest.contains(' '))
}

/// A comment that begins with the Service's name, which tells whose the rule is.
fn remark(service: &ServicePortName, words: &str) -> String {
    let mut text = comment(service);
    text.truncate(255 - 1 - words.len());
    format!("{text} {words}")
}

/// `matches`: each with a blank behind it.
fn translation(service: &ServicePortName, backend: &Backend, matches: &str) -> String {
    format!("-p {} {matches}-j DNAT --to-destination {}", word(service.protocol), plain(backend))
}

/// What hashes are of.
fn id(service: &ServicePortName) -> (String, &'static str) {
    (service.to_string(), word(service.protocol))
}

/// Of the clients that an endpoint remembers.
fn list(service: &ServicePortName, backend: &Backend) -> String {
    let (name, protocol) = id(service);
    let backend = plain(backend).to_string();
    format!("{PREFIX}SEP-{:016X}", names::hash([name.as_str(), protocol, backend.as_str()]))
}

const fn word(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
        Protocol::Sctp => "sctp",
    }
}

fn plain(backend: &Backend) -> SocketAddr {
    SocketAddr::new(backend.addr, backend.port.get())
}

/// As iptables-save prints it: a 31-bit fraction.
fn probability(of: usize) -> String {
    #[expect(clippy::cast_precision_loss, reason = "so many endpoints nobody has")]
    let of = of as f64;
    format!("{:.11}", 1.0 / of)
}
