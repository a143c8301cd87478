//! From frontends to the words of nft: pure.
//!
//! A table has a *constant* number of sets and maps, whose elements grow with the cluster, and chains of which all frontends that want
//! the same share one. Sets and chains of a Service's own are what makes rules of this size slow to load: the kernel looks for a set
//! by its name, one after the other.
//!
//! ```text
//! prerouting ─► @frontends       address . protocol . port : goto X │ goto refuse │ drop
//! output ─────► @node-frontends  the same, for what the node itself sends
//!
//! tcp-all-5              dnat to address . port . (a random number below 5) map @tcp-endpoints
//! tcp-all-5-m            sets the mark that asks for masquerading, goto tcp-all-5
//! tcp-local-2            the same from @tcp-local-endpoints
//! rr-<hash>-tcp-all-5    in turn; a chain for each ServicePort, for each has its own counter
//! aff-<hash>             where the client was last, by a rule for each endpoint; else one at random, or in turn
//! ep-<hash>-0-10800      remembers the client for so many seconds, dnat to this endpoint
//! pod-X-else-Y           from pods of this node X, else Y
//! tcp-ranged-X           from the frontend's @tcp-sources X, else dropped
//! ```
//!
//! What is in a chain is told by its name alone, so a chain never changes: it comes when a frontend needs it, and goes with the last one.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    fmt,
    net::{IpAddr, SocketAddr},
};

use ipnet::IpNet;

use crate::{
    dataplane::{
        DetectLocal,
        ipvs::render::{self as ipvs, Which},
        netfilter::{Options, PROTOCOLS, comment, is_loopback, names},
    },
    desired::{Action, Algorithm, Backend, Frontend, FrontendSpec, Verdict, Verdicts},
    model::{Family, Port, Protocol},
};

/// What the table does, and its name in both families.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Role {
    /// All of it.
    Whole,
    /// Everything but the choice of a backend, which IPVS makes behind it: who is served, refused, dropped, masqueraded.
    Gate,
}

impl Role {
    pub(crate) const fn table(self) -> &'static str {
        match self {
            Self::Whole => "proxy-agent",
            Self::Gate => "proxy-agent-ipvs",
        }
    }
}

/// Sets and maps. Where ports stand beside other things they are of one protocol: nft (1.0.6) forgets of a map that it did not make in the
/// same transaction what kind of ports are in it, and refuses rules that look there, or takes them for TCP's.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(super) enum Collection {
    Frontends,
    NodeFrontends,
    Endpoints(Protocol),
    LocalEndpoints(Protocol),
    Sources(Protocol),
    Hairpin,
    Guards,
    Pods,
    LocalCidrs,
    /// Virtual servers of ours, by what they are addressed to and by their mark: IPVS itself does not say whose one is.
    Servers,
    Marks,
}

impl Collection {
    const ALL: [Self; 17] = [
        Self::Frontends,
        Self::NodeFrontends,
        Self::Endpoints(Protocol::Tcp),
        Self::Endpoints(Protocol::Udp),
        Self::Endpoints(Protocol::Sctp),
        Self::LocalEndpoints(Protocol::Tcp),
        Self::LocalEndpoints(Protocol::Udp),
        Self::LocalEndpoints(Protocol::Sctp),
        Self::Sources(Protocol::Tcp),
        Self::Sources(Protocol::Udp),
        Self::Sources(Protocol::Sctp),
        Self::Hairpin,
        Self::Guards,
        Self::Pods,
        Self::LocalCidrs,
        Self::Servers,
        Self::Marks,
    ];

    /// Those that such a table has.
    pub(super) fn of(role: Role) -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().filter(move |collection| match collection {
            Self::Endpoints(_) | Self::LocalEndpoints(_) => role == Role::Whole,
            Self::Servers | Self::Marks => role == Role::Gate,
            _ => true,
        })
    }

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Frontends => "frontends",
            Self::NodeFrontends => "node-frontends",
            Self::Endpoints(Protocol::Tcp) => "tcp-endpoints",
            Self::Endpoints(Protocol::Udp) => "udp-endpoints",
            Self::Endpoints(Protocol::Sctp) => "sctp-endpoints",
            Self::LocalEndpoints(Protocol::Tcp) => "tcp-local-endpoints",
            Self::LocalEndpoints(Protocol::Udp) => "udp-local-endpoints",
            Self::LocalEndpoints(Protocol::Sctp) => "sctp-local-endpoints",
            Self::Sources(Protocol::Tcp) => "tcp-sources",
            Self::Sources(Protocol::Udp) => "udp-sources",
            Self::Sources(Protocol::Sctp) => "sctp-sources",
            Self::Hairpin => "hairpin",
            Self::Guards => "guards",
            Self::Pods => "pods",
            Self::LocalCidrs => "local-cidrs",
            Self::Servers => "servers",
            Self::Marks => "marks",
        }
    }

    pub(super) const fn is_map(self) -> bool {
        matches!(self, Self::Frontends | Self::NodeFrontends | Self::Endpoints(_) | Self::LocalEndpoints(_))
    }

    /// The key of the frontend that an element is of, if it is of one.
    pub(super) fn frontend_of(self, key: &str) -> Option<String> {
        match self {
            Self::Frontends | Self::NodeFrontends => Some(key.to_owned()),
            Self::Endpoints(protocol) | Self::LocalEndpoints(protocol) | Self::Sources(protocol) => {
                let mut parts = key.split(" . ");
                let (addr, port) = (parts.next()?, parts.next()?);
                Some(format!("{addr} . {} . {port}", protocol.number()))
            }
            Self::Hairpin | Self::Guards | Self::Pods | Self::LocalCidrs | Self::Servers | Self::Marks => None,
        }
    }
}

/// Clients that are remembered: written by packets, never by us.
pub(super) const AFFINITY: &str = "affinity";

/// What stands under a key.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Element {
    /// Of a map.
    pub(super) value: Option<String>,
    pub(super) comment: Option<String>,
}

impl Element {
    pub(super) fn text(&self, key: &str) -> String {
        let Self { value, comment } = self;
        let comment = comment.as_ref().map(|comment| format!(" comment \"{comment}\"")).unwrap_or_default();
        let value = value.as_ref().map(|value| format!(" : {value}")).unwrap_or_default();
        format!("{key}{comment}{value}")
    }
}

/// Which life of an endpoint of a ServicePort this is: whoever was remembered in an earlier one is not any more (contract A98).
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Incarnations {
    /// Of the endpoints that have a chain.
    living: HashMap<u64, u32>,
    /// Of those that come: it has not been anybody's who is gone.
    next: u32,
}

impl Incarnations {
    /// `next`: beyond what an earlier run may have come to.
    pub(super) fn from(next: u32) -> Self {
        Self { living: HashMap::new(), next }
    }

    fn of(&self, hash: u64) -> u32 {
        self.living.get(&hash).copied().unwrap_or(self.next)
    }

    /// The chain of an endpoint is there.
    pub(super) fn take_up(&mut self, chain: &str) {
        if let Some((hash, incarnation)) = endpoint_of(chain) {
            self.living.entry(hash).or_insert(incarnation);
        }
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.living.len()
    }

    /// Endpoints of which none of these chains is are gone.
    pub(super) fn keep<'a>(&mut self, chains: impl Iterator<Item = &'a String>) {
        let there: HashSet<u64> = chains.filter_map(|chain| Some(endpoint_of(chain)?.0)).collect();
        let before = self.living.len();
        self.living.retain(|hash, _| there.contains(hash));
        if self.living.len() < before {
            self.next = self.next.wrapping_add(1);
        }
    }
}

/// Of the name of its chain: which endpoint of which ServicePort, and which life of it.
pub(super) fn endpoint_of(chain: &str) -> Option<(u64, u32)> {
    let mut parts = chain.strip_prefix("ep-")?.split('-');
    Some((u64::from_str_radix(parts.next()?, 16).ok()?, parts.next()?.parse().ok()?))
}

/// What one frontend asks for.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Piece {
    /// Names, and the rules that each has.
    pub(super) chains: BTreeMap<String, Vec<String>>,
    pub(super) elements: BTreeMap<(Collection, String), Element>,
    /// Addresses that may come to reach themselves.
    pub(super) hairpin: BTreeSet<IpAddr>,
}

/// Where a packet goes.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Target {
    Chain(String),
    Refuse,
    Drop,
    /// By IPVS, a few hooks later.
    Serve,
    /// As if there were no frontend.
    Pass,
}

impl Target {
    fn name(&self) -> &str {
        match self {
            Self::Chain(name) => name,
            Self::Refuse => "refuse",
            Self::Drop => "drop",
            Self::Serve => "serve",
            Self::Pass => "pass",
        }
    }
}

/// As a verdict of nft.
impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Chain(name) => write!(f, "goto {name}"),
            Self::Refuse => f.write_str("goto refuse"),
            Self::Drop => f.write_str("drop"),
            Self::Serve => f.write_str("accept"),
            Self::Pass => f.write_str("return"),
        }
    }
}

/// The words of one family.
#[derive(Clone, Debug)]
pub(super) struct Renderer {
    pub(super) role: Role,
    pub(super) family: Family,
    /// `ip`, `ip6`: the family of the table and the protocol in its rules.
    pub(super) ip: &'static str,
    address: &'static str,
    mark: u32,
    masquerade_ports: (u16, u16),
    detect_local: DetectLocal,
    pub(super) affinity_entries: u32,
    /// The kernel's conntrack takes what is out of its window, so nothing is invalid (contract A109).
    pub(super) liberal: bool,
}

impl Renderer {
    pub(super) fn new(family: Family, role: Role, options: &Options) -> Self {
        let (ip, address) = match family {
            Family::V4 => ("ip", "ipv4_addr"),
            Family::V6 => ("ip6", "ipv6_addr"),
        };
        let Options {
            detect_local,
            affinity_entries,
            masquerade_bit: _,
            ended: _,
            iptables_flavour: _,
            localhost_node_ports: _,
            restore_failures: _,
            masquerade_ports: _,
            ipvs_scheduler: _,
            ipvs_strict_arp: _,
        } = options;
        Self {
            role,
            family,
            ip,
            address,
            mark: options.mark(),
            masquerade_ports: options.masquerade_ports,
            detect_local: *detect_local,
            affinity_entries: *affinity_entries,
            liberal: false,
        }
    }

    /// An answer that conntrack takes for invalid would reach the client as the endpoint's own, which resets its connection (contract A109).
    /// It is dropped only if a pod of this node has a part in it: what is merely routed through may come one way only.
    fn invalid(&self) -> Vec<String> {
        let Self { ip, detect_local, liberal, .. } = self;
        match detect_local {
            _ if *liberal => Vec::new(),
            DetectLocal::Device => vec!["iif @pods drop".to_owned(), "oif @pods drop".to_owned()],
            DetectLocal::Address => {
                vec![format!("{ip} saddr @local-cidrs drop"), format!("{ip} daddr @local-cidrs drop")]
            }
        }
    }

    pub(super) const fn table(&self) -> &'static str {
        self.role.table()
    }

    /// Clients, for session affinity.
    pub(super) const fn remembers(&self) -> bool {
        matches!(self.role, Role::Whole)
    }

    pub(super) fn own_collections(&self) -> impl Iterator<Item = Collection> {
        Collection::of(self.role)
    }

    /// Sets and maps there are, by name.
    pub(super) fn names(&self) -> BTreeSet<String> {
        self.collections().into_iter().map(|(_, name, _)| name.to_owned()).collect()
    }

    /// What there is whatever the Services are: definitions of sets and maps, then chains with their rules.
    pub(super) fn collections(&self) -> Vec<(&'static str, &'static str, String)> {
        let Self { ip, address, affinity_entries, .. } = self;
        let frontend = format!("typeof {ip} daddr . meta l4proto . th dport");
        let definition = |collection| match collection {
            Collection::Frontends | Collection::NodeFrontends => format!("{frontend} : verdict;"),
            Collection::Endpoints(of) | Collection::LocalEndpoints(of) => {
                let port = format!("{} dport", word(of));
                format!("typeof {ip} daddr . {port} . numgen random mod 2 : {ip} daddr . {port};")
            }
            Collection::Sources(of) => {
                format!("typeof {ip} daddr . {} dport . {ip} saddr; flags interval;", word(of))
            }
            Collection::Hairpin => format!("typeof {ip} saddr . {ip} daddr;"),
            Collection::Guards => format!("type {address};"),
            Collection::Pods => "type iface_index;".to_owned(),
            Collection::LocalCidrs => format!("type {address}; flags interval;"),
            Collection::Servers => format!("{frontend};"),
            Collection::Marks => "type mark;".to_owned(),
        };
        let kind = |collection: Collection| if collection.is_map() { "map" } else { "set" };
        let own = self.own_collections().map(|one| (kind(one), one.name(), definition(one)));
        if !self.remembers() {
            return own.collect();
        }
        let affinity = format!(
            "typeof {ip} saddr . numgen random mod 2 . numgen random mod 2; size {affinity_entries}; flags dynamic,timeout;"
        );
        own.chain([("set", AFFINITY, affinity)]).collect()
    }

    /// Name, hook (of a base chain) and rules.
    pub(super) fn skeleton(&self) -> Vec<(&'static str, Option<&'static str>, Vec<String>)> {
        let Self { ip, .. } = self;
        let frontend = format!("{ip} daddr . meta l4proto . th dport");
        // What opens nothing and belongs to nothing is never load-balanced (F45).
        let opens = "tcp flags & (fin | syn | rst | ack) != syn";
        let guard = format!("{ip} daddr @guards goto guard");
        if self.role == Role::Gate {
            return self.gate(opens, &frontend, &guard);
        }
        vec![
            ("refuse", None, vec!["reject".to_owned()]),
            // Nothing for a guarded address leaves the node; only what opens something is told (contract A48, A50).
            (
                "guard",
                None,
                vec![
                    // Somebody else translates it, without a change of what it is addressed to here: IPVS, on its way out.
                    format!("ct state established,related ct reply {ip} saddr != @guards return"),
                    format!("{opens} drop"),
                    "ct state new goto refuse".to_owned(),
                    "drop".to_owned(),
                ],
            ),
            (
                "prerouting",
                Some("type nat hook prerouting priority -100; policy accept;"),
                vec![format!("{opens} return"), format!("{frontend} vmap @frontends")],
            ),
            (
                "output",
                Some("type nat hook output priority -100; policy accept;"),
                vec![format!("{opens} return"), format!("{frontend} vmap @node-frontends")],
            ),
            (
                "postrouting",
                Some("type nat hook postrouting priority 100; policy accept;"),
                self.masquerade(&[
                    self.marked().as_str(),
                    // A pod that reaches itself would see its own address as the sender (contract A70).
                    &format!("ct status dnat {ip} saddr . {ip} daddr @hairpin"),
                ]),
            ),
            ("guard-prerouting", Some("type filter hook prerouting priority -90; policy accept;"), vec![guard.clone()]),
            ("guard-output", Some("type filter hook output priority -90; policy accept;"), vec![guard]),
            ("invalid", None, self.invalid()),
            (
                "forward",
                Some("type filter hook forward priority 0; policy accept;"),
                vec!["ct state invalid goto invalid".to_owned()],
            ),
        ]
    }

    /// Who asks for masquerading, and asks no more.
    fn marked(&self) -> String {
        let Self { mark, .. } = self;
        let cleared = !mark;
        format!("meta mark & {mark:#x} == {mark:#x} meta mark set meta mark & {cleared:#x}")
    }

    /// Of whoever matches. Ports have to be some protocol's; and what is translated is of one of these.
    fn masquerade(&self, matches: &[&str]) -> Vec<String> {
        let (low, high) = self.masquerade_ports;
        let of = |protocol: Protocol| {
            let number = protocol.number();
            matches
                .iter()
                .map(move |one| format!("meta l4proto {number} {one} masquerade to :{low}-{high} fully-random"))
        };
        PROTOCOLS.into_iter().flat_map(of).collect()
    }

    /// IPVS takes what comes in behind all filters of hook input (99), and what the node itself sends behind hook output's translation
    /// (-98); from there its packets go by hook output, whatever way they came. What it takes is for an address of the node: our
    /// device holds those of Services, so what nobody claims there must not come to a socket of the node's. It translates answers by its
    /// own table, whatever conntrack calls them, so none of those is invalid (contract A109).
    fn gate(&self, opens: &str, frontend: &str, guard: &str) -> Vec<(&'static str, Option<&'static str>, Vec<String>)> {
        let Self { ip, mark, .. } = self;
        let nat = |map: &str| vec![format!("{opens} return"), format!("{frontend} vmap @{map}")];
        vec![
            ("refuse", None, vec!["reject".to_owned()]),
            (
                "guard",
                None,
                // Answers to what the node itself asked a Service for: the kernel takes the Service's address as its source.
                vec![
                    "ct direction reply return".to_owned(),
                    format!("{opens} drop"),
                    "ct state new goto refuse".to_owned(),
                    "drop".to_owned(),
                ],
            ),
            ("prerouting", Some("type nat hook prerouting priority -100; policy accept;"), nat("frontends")),
            ("output", Some("type nat hook output priority -100; policy accept;"), nat("node-frontends")),
            (
                "postrouting",
                Some("type nat hook postrouting priority 100; policy accept;"),
                self.masquerade(&[
                    self.marked().as_str(),
                    &format!("oifname != \"lo\" {ip} saddr @guards"),
                    // A pod that reaches itself would see its own address as the sender (contract A70).
                    &format!("oifname != \"lo\" {ip} saddr . {ip} daddr @hairpin"),
                ]),
            ),
            (
                "marked",
                // IPVS has seen the mark by which it finds a server, and nobody else is to.
                Some("type filter hook output priority -90; policy accept;"),
                vec![format!("meta mark @marks meta mark set meta mark & {mark:#x}")],
            ),
            ("guard-input", Some("type filter hook input priority 110; policy accept;"), vec![guard.to_owned()]),
            ("guard-forward", Some("type filter hook forward priority -90; policy accept;"), vec![guard.to_owned()]),
            ("guard-output", Some("type filter hook output priority -80; policy accept;"), vec![guard.to_owned()]),
        ]
    }

    pub(super) fn frontend_key(frontend: &Frontend) -> String {
        let Frontend { addr, port, protocol } = frontend;
        // Protocols by number: names need a file that a container may lack.
        format!("{addr} . {} . {port}", protocol.number())
    }

    /// The same of the kernel's key, whose parts are of four bytes each. `None`: it is none that we make.
    pub(super) fn frontend_of(&self, key: &[u8]) -> Option<Frontend> {
        let (addr, rest) = match self.family {
            Family::V4 => key.split_first_chunk::<4>().map(|(addr, rest)| (IpAddr::from(*addr), rest))?,
            Family::V6 => key.split_first_chunk::<16>().map(|(addr, rest)| (IpAddr::from(*addr), rest))?,
        };
        let ([number, _, _, _, high, low, ..], 8) = (rest, rest.len()) else { return None };
        let protocol = PROTOCOLS.into_iter().find(|protocol| protocol.number() == *number)?;
        Some(Frontend { addr, port: Port::new(u16::from_be_bytes([*high, *low]))?, protocol })
    }

    pub(super) fn piece(&self, frontend: &Frontend, spec: &FrontendSpec, incarnations: &Incarnations) -> Piece {
        let mut piece = Piece::default();
        if is_loopback(frontend.addr) {
            return piece;
        }
        let FrontendSpec { service, verdicts: Verdicts { pod, node, external }, source_ranges, .. } = spec;
        let key = Self::frontend_key(frontend);
        let address = format!("{} . {}", frontend.addr, frontend.port);
        let mut maker = Maker { renderer: self, frontend, spec, address, incarnations, piece: &mut piece };
        let node = maker.target(*node);
        let (pod, external) = (maker.target(*pod), maker.target(*external));
        let mut others = maker.split(pod, external);
        if let Some(ranges) = source_ranges {
            others = maker.ranged(others, ranges);
        }
        for (collection, target) in [(Collection::Frontends, others), (Collection::NodeFrontends, node)] {
            if target != Target::Pass {
                let element = Element { value: Some(target.to_string()), comment: Some(comment(service)) };
                piece.elements.insert((collection, key.clone()), element);
            }
        }
        piece
    }

    /// The element of a packet's way back to its sender.
    pub(super) fn hairpin(addr: IpAddr) -> String {
        format!("{addr} . {addr}")
    }

    pub(super) fn cidr(net: &IpNet) -> String {
        if net.prefix_len() == net.max_prefix_len() { net.addr().to_string() } else { net.trunc().to_string() }
    }
}

/// Makes the piece of one frontend.
struct Maker<'a> {
    renderer: &'a Renderer,
    frontend: &'a Frontend,
    spec: &'a FrontendSpec,
    /// Address and port, as keys begin where the protocol is the map's.
    address: String,
    incarnations: &'a Incarnations,
    piece: &'a mut Piece,
}

impl Maker<'_> {
    fn chain(&mut self, name: String, rules: Vec<String>) -> Target {
        self.piece.chains.insert(name.clone(), rules);
        Target::Chain(name)
    }

    fn target(&mut self, Verdict { action, masquerade }: Verdict) -> Target {
        let picked = match action {
            Action::PickAll | Action::PickLocal if self.renderer.role == Role::Gate => {
                return self.serve(Verdict { action, masquerade });
            }
            Action::PickAll => self.pick("all"),
            Action::PickLocal => self.pick("local"),
            Action::Drop => return Target::Drop,
            Action::Reject => return Target::Refuse,
            Action::Pass => return Target::Pass,
        };
        match picked {
            Target::Chain(name) if masquerade => {
                let mark = self.renderer.mark;
                self.chain(format!("{name}-m"), vec![format!("meta mark set meta mark | {mark:#x} goto {name}")])
            }
            other => other,
        }
    }

    /// Leaves the choice to the virtual server that has this verdict's backends.
    fn serve(&mut self, verdict: Verdict) -> Target {
        let bit = self.renderer.mark;
        let Some(which) = Which::of(verdict) else { return Target::Pass };
        let set = which.set(self.spec);
        if set.is_empty() {
            return Target::Refuse;
        }
        self.piece.hairpin.extend(set.iter().map(|backend| backend.addr));
        if ipvs::at_address(&self.spec.verdicts) != Some(which) {
            let mark = ipvs::mark(self.frontend, verdict.masquerade, bit);
            return self.chain(format!("marked-{mark:08x}"), vec![format!("meta mark set {mark:#x} accept")]);
        }
        if verdict.masquerade {
            return self.chain("serve-m".to_owned(), vec![format!("meta mark set meta mark | {bit:#x} accept")]);
        }
        Target::Serve
    }

    /// One of a set of backends.
    fn pick(&mut self, which: &'static str) -> Target {
        let FrontendSpec { service, all, local, algorithm, affinity_secs, .. } = self.spec;
        let (set, collection) = if which == "local" {
            (local, Collection::LocalEndpoints(service.protocol))
        } else {
            (all, Collection::Endpoints(service.protocol))
        };
        if set.is_empty() {
            return Target::Refuse;
        }
        self.piece.hairpin.extend(set.iter().map(|backend| backend.addr));
        if let Some(seconds) = affinity_secs {
            return self.pick_by_affinity(set, *seconds);
        }
        for (index, backend) in set.iter().enumerate() {
            let Backend { addr, port } = backend;
            let element = Element { value: Some(format!("{addr} . {port}")), comment: None };
            self.piece.elements.insert((collection, format!("{} . {index}", self.address)), element);
        }
        let Renderer { ip, .. } = self.renderer;
        let (count, map, protocol) = (set.len(), collection.name(), word(service.protocol));
        let dnat = |number: String| format!("dnat {ip} to {ip} daddr . {protocol} dport . {number} map @{map}");
        // A packet that met this chain just before the list grew shorter still finds the first one.
        let first = dnat("numgen random mod 1".to_owned());
        match algorithm {
            Algorithm::RoundRobin => {
                let hash = names::hash([service.to_string().as_str(), protocol]);
                let name = format!("rr-{hash:016x}-{protocol}-{which}-{count}");
                self.chain(name, vec![dnat(format!("numgen inc mod {count}")), first])
            }
            Algorithm::Random | Algorithm::Maglev | Algorithm::Scheduler => {
                let name = format!("{protocol}-{which}-{count}");
                self.chain(name, vec![dnat(format!("numgen random mod {count}")), first])
            }
        }
    }

    fn pick_by_affinity(&mut self, set: &[Backend], seconds: u32) -> Target {
        let FrontendSpec { service, algorithm, .. } = self.spec;
        let way = if *algorithm == Algorithm::RoundRobin { "inc" } else { "random" };
        let (mut remembered, mut chosen, mut content) = (Vec::new(), Vec::new(), format!("{seconds} {way}"));
        for (index, backend) in set.iter().enumerate() {
            let (name, client) = self.endpoint(backend, seconds);
            remembered.push(format!("{client} @{AFFINITY} goto {name}"));
            // Of those that are left, each is as likely as the others; counted, each comes once in a round.
            let left = set.len() - index;
            chosen.push(if left == 1 {
                format!("goto {name}")
            } else {
                format!("numgen {way} mod {left} 0 goto {name}")
            });
            content.push(' ');
            content.push_str(&name);
        }
        remembered.append(&mut chosen);
        let hash = names::hash([service.to_string().as_str(), word(service.protocol), content.as_str()]);
        self.chain(format!("aff-{hash:016x}"), remembered)
    }

    /// The chain of an endpoint that remembers who comes, and how it calls them. It is the port's, whichever of its frontends was asked (contract A95, A97).
    fn endpoint(&mut self, backend: &Backend, seconds: u32) -> (String, String) {
        let FrontendSpec { service, .. } = self.spec;
        let Renderer { ip, .. } = *self.renderer;
        let Backend { addr, port } = backend;
        let hash = names::hash([service.to_string().as_str(), word(service.protocol), backend.to_string().as_str()]);
        let endpoint = format!("ep-{hash:016x}-{}", self.incarnations.of(hash));
        // Another time-out is another chain of the same endpoint, and nobody is forgotten for it.
        let name = format!("{endpoint}-{seconds}");
        let to = SocketAddr::new(*addr, port.get());
        let client = client(ip, &endpoint);
        let remember = format!("update @{AFFINITY} {{ {client} timeout {seconds}s }}");
        let dnat = format!("meta l4proto {} dnat to {to}", service.protocol.number());
        self.chain(name.clone(), vec![remember, dnat]);
        (name, client)
    }

    fn split(&mut self, pod: Target, external: Target) -> Target {
        if pod == external {
            return pod;
        }
        let Renderer { ip, detect_local, .. } = self.renderer;
        let is_pod = match detect_local {
            DetectLocal::Device => "iif @pods".to_owned(),
            DetectLocal::Address => format!("{ip} saddr @local-cidrs"),
        };
        let name = format!("pod-{}-else-{}", pod.name(), external.name());
        self.chain(name, vec![format!("{is_pod} {pod}"), external.to_string()])
    }

    /// Who is in none of the ranges is dropped (contract A91).
    fn ranged(&mut self, inside: Target, ranges: &[IpNet]) -> Target {
        let (collection, protocol) =
            (Collection::Sources(self.spec.service.protocol), word(self.spec.service.protocol));
        for net in ranges {
            let key = format!("{} . {}", self.address, Renderer::cidr(net));
            self.piece.elements.insert((collection, key), Element::default());
        }
        let Renderer { ip, .. } = self.renderer;
        let rule = format!("{ip} daddr . {protocol} dport . {ip} saddr @{} {inside}", collection.name());
        self.chain(format!("{protocol}-ranged-{}", inside.name()), vec![rule, "drop".to_owned()])
    }
}

const fn word(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
        Protocol::Sctp => "sctp",
    }
}

/// A client at an endpoint, as the affinity set knows it: its address, and two numbers that are the endpoint's. nft takes no constants
/// there, but what counts from a number up to it.
fn client(ip: &str, endpoint: &str) -> String {
    let id = names::hash([endpoint]);
    let number = |half: u64| format!("numgen random mod 1 offset {half}");
    format!("{ip} saddr . {} . {}", number(id >> 32), number(id & 0xffff_ffff))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As a kernel lists them.
    #[test]
    fn keys_of_the_kernel_are_understood() {
        let of = |family, key: &[u8]| Renderer::new(family, Role::Whole, &Options::default()).frontend_of(key);
        let udp = [10, 96, 0, 10, 17, 0, 0, 0, 0, 53, 0, 0];
        let frontend = Frontend { addr: [10, 96, 0, 10].into(), port: Port::new(53).unwrap(), protocol: Protocol::Udp };
        assert_eq!(of(Family::V4, &udp), Some(frontend));
        let six = [&[0xfd, 0, 0, 0x96, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1], &udp[4..]].concat();
        assert_eq!(of(Family::V6, &six), Some(Frontend { addr: "fd00:96::1".parse().unwrap(), ..frontend }));
        assert_eq!(of(Family::V6, &udp), None);
        assert_eq!(of(Family::V4, &[10, 96, 0, 10, 1, 0, 0, 0, 0, 53, 0, 0]), None, "ICMP");
        for cut in 0..udp.len() {
            assert_eq!(of(Family::V4, &udp[..cut]), None);
        }
    }
}
