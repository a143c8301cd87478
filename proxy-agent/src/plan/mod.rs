//! All Service semantics: from Services, EndpointSlices and node facts to frontends with verdicts and backends.
//!
//! ```text
//! Service ─┐
//! slices  ─┼─► plan_service ─► PlannedService ─┐
//! node    ─┘   (one Service, pure)             ├─► Planner: who owns a frontend ─► DesiredState, Changes
//!                         other Services' plans┘
//! ```
//!
//! Pure, total and deterministic: no clock, no I/O, no logging, no tasks. The full plan is the incremental one over all
//! Services; a property test holds the two equal. What cannot be used (a loopback endpoint, an address that an older
//! Service holds) is left out and said in `problems`, and never costs the rest of the Service.

use std::{collections::BTreeSet, net::IpAddr, sync::Arc};

use ipnet::IpNet;

use crate::{
    desired::{
        Action, Algorithm, Backend, BackendSet, Frontend, FrontendKind, FrontendSpec, HealthCheck, Verdict, Verdicts,
    },
    model::{
        EndpointSlice, Family, NodeFacts, Service, ServicePort, ServicePortName, ServiceType, Snapshot, TrafficPolicy,
        address::NodePortAddresses,
    },
};

mod addresses;
mod candidates;
mod checks;
mod dump;
mod planner;
mod pods;
mod topology;
mod verdicts;

pub use dump::Dump;
pub use planner::Planner;

use addresses::Addresses;
use candidates::Candidate;
use topology::{Choice, Needs};
use verdicts::Situation;

/// What configuration says for all Services, or for those that do not say it themselves.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Defaults {
    pub algorithm: Algorithm,
    /// Masquerade pods' traffic to ClusterIPs, too (contract A79).
    pub masquerade_all: bool,
    pub detect_local: DetectLocal,
    pub node_port_addresses: NodePortAddresses,
    /// NodePorts answer the node's own processes on 127.0.0.1, too (A54).
    pub localhost_node_ports: bool,
    /// External IPs are served (A158).
    pub external_ips: bool,
}

impl Default for Defaults {
    fn default() -> Self {
        Self {
            algorithm: Algorithm::default(),
            masquerade_all: false,
            detect_local: DetectLocal::Device,
            node_port_addresses: NodePortAddresses::All,
            localhost_node_ports: true,
            external_ips: true,
        }
    }
}

/// How pods of this node are told from the rest of the world (contract A72). Where they cannot be, nothing to a ClusterIP is
/// masqueraded, and a pod is as far away as anybody (A68, A78).
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum DetectLocal {
    /// By the device that their packets come in by: the dataplane knows.
    #[default]
    Device,
    /// By these addresses; of a family that none is of nobody can be told (A73).
    Cidrs(BTreeSet<IpNet>),
    /// By the pod networks of the own Node.
    NodeCidrs,
}

impl DetectLocal {
    /// Addresses that tell a pod.
    fn cidrs(&self, node: &NodeFacts) -> BTreeSet<IpNet> {
        match self {
            Self::Device => BTreeSet::new(),
            Self::Cidrs(cidrs) => cidrs.iter().map(IpNet::trunc).collect(),
            Self::NodeCidrs => node.pod_cidrs.iter().map(IpNet::trunc).collect(),
        }
    }

    fn tells(&self, family: Family, node: &NodeFacts) -> bool {
        *self == Self::Device || self.cidrs(node).iter().any(|cidr| Family::of(cidr.addr()) == family)
    }
}

/// The node as planning sees it.
#[derive(Clone, Copy, Debug)]
pub struct Here<'a> {
    pub node: &'a NodeFacts,
    /// Its own addresses, of any scope.
    pub addresses: &'a BTreeSet<IpAddr>,
}

impl<'a> From<&'a Snapshot> for Here<'a> {
    fn from(
        Snapshot { node, addresses, services: _, slices: _, pods: _, namespaces: _, pods_known: _ }: &'a Snapshot,
    ) -> Self {
        Self { node, addresses }
    }
}

/// One Service, planned without regard to the others.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct PlannedService {
    /// Sorted by frontend, each once.
    pub frontends: Vec<(Frontend, Arc<FrontendSpec>)>,
    /// Addresses whose unclaimed ports are refused (contract A48). Sorted, each once.
    pub guards: Vec<IpAddr>,
    pub health_check: Option<HealthCheck>,
    /// What was left out, and why.
    pub problems: Vec<String>,
}

impl PlannedService {
    pub(crate) fn frontend(&self, frontend: &Frontend) -> Option<&Arc<FrontendSpec>> {
        let at = self.frontends.binary_search_by_key(frontend, |(frontend, _)| *frontend).ok()?;
        self.frontends.get(at).map(|(_, spec)| spec)
    }
}

/// Plans one Service from its slices (of both families) and what is known of the node.
pub fn plan_service<'a>(
    service: &Service,
    slices: impl Iterator<Item = &'a EndpointSlice> + Clone,
    here: Here<'_>,
    defaults: &Defaults,
) -> PlannedService {
    let mut problems = service.problems.clone();
    // Contract A4, A5: headless and ExternalName Services have no frontends, whatever fields an earlier type left.
    if service.kind == ServiceType::ExternalName || service.cluster_ips.is_empty() {
        return PlannedService { problems, ..PlannedService::default() };
    }
    let algorithm = algorithm(service, defaults, &mut problems);
    let resets_deleted = resets_deleted(service, &mut problems);
    if let Some(unknown) = service.socket_lb.as_deref().filter(|value| !matches!(*value, "all" | "node")) {
        problems.push(format!("socket-lb {unknown:?} is not known, \"all\" is used; write \"all\" or \"node\""));
    }
    let addresses = addresses::of(service, here, defaults, &mut problems);
    candidates::report_unusable(slices.clone(), &mut problems);
    let health_check = checks::of(service, addresses.families(), slices.clone(), here, defaults);

    // By kind: what a Service claims twice goes to the kind that comes first, and there to the port that comes first.
    let mut claims: Vec<(Frontend, usize, FrontendKind, Arc<FrontendSpec>)> =
        Vec::with_capacity(addresses.cluster_ips.len() * service.ports.len());
    for family in addresses.families() {
        for (index, port) in service.ports.iter().enumerate() {
            let candidates = candidates::unite(slices.clone(), port, family, here.node);
            let choice = topology::choose(&candidates, needs(service, port, family), here.node);
            let alive = candidates::alive(&candidates, slices.clone(), port, family, resets_deleted);
            let detect_local = defaults.detect_local.tells(family, here.node);
            let mut specs =
                Specs::new(service, port, choice, alive, algorithm, (defaults.masquerade_all, detect_local));
            addresses.claims(port, family, &mut |kind, addr, number| {
                let spec = match kind {
                    Claim::Localhost => specs.localhost(),
                    Claim::Yielded => specs.yielded(),
                    Claim::Kind(FrontendKind::LoadBalancer) => specs.load_balancer(&addresses, family),
                    Claim::Kind(kind) => specs.of(kind),
                };
                let frontend = Frontend { addr, port: number, protocol: port.protocol };
                claims.push((frontend, index, spec.kind, spec));
            });
        }
    }
    claims.sort_by_key(|(frontend, index, kind, _)| (*frontend, precedence(*kind), *index));
    let mut frontends: Vec<(Frontend, Arc<FrontendSpec>)> = Vec::with_capacity(claims.len());
    let mut owner = None;
    for (frontend, index, kind, spec) in claims {
        match owner {
            Some((owned, by)) if owned == frontend => {
                // One port that claims an address in two ways (an external IP that is the load balancer's) loses nothing.
                if by != index {
                    let said = twice(&frontend, kind);
                    if !problems.contains(&said) {
                        problems.push(said);
                    }
                }
            }
            _ => {
                owner = Some((frontend, index));
                frontends.push((frontend, spec));
            }
        }
    }
    PlannedService { frontends, guards: addresses.cluster_ips, health_check, problems }
}

fn twice(frontend: &Frontend, kind: FrontendKind) -> String {
    let Frontend { addr: _, port, protocol } = frontend;
    match kind {
        FrontendKind::NodePort => format!("nodePort {port}/{protocol} is given twice; the first is used"),
        _ => format!("port {port}/{protocol} is given twice; the first is used"),
    }
}

/// What may claim a frontend before what: what the cluster hands out before what a user writes (contract A158: an external IP must
/// not take a Service's traffic away).
pub(crate) const fn precedence(kind: FrontendKind) -> u8 {
    match kind {
        FrontendKind::ClusterIp => 0,
        FrontendKind::NodePort => 1,
        FrontendKind::LoadBalancer => 2,
        FrontendKind::ExternalIp => 3,
    }
}

const PASS: Verdict = Verdict { action: Action::Pass, masquerade: false };

/// A kind of claim on an address.
enum Claim {
    Kind(FrontendKind),
    /// A NodePort of 127.0.0.1.
    Localhost,
    /// A ClusterIP that is the node's own.
    Yielded,
}

/// The frontends of one port and family: made when asked for, each once, with backend sets that they share.
struct Specs<'a> {
    service: &'a Service,
    port: &'a ServicePort,
    situation: Situation,
    cluster: Vec<Backend>,
    local: Vec<Backend>,
    /// Those two, as soon as a verdict picks from them: a set that none does is left out, so that its changes cost nothing.
    sets: [Option<BackendSet>; 2],
    alive: Option<BackendSet>,
    algorithm: Algorithm,
    made: Vec<Arc<FrontendSpec>>,
}

impl<'a> Specs<'a> {
    fn new(
        service: &'a Service,
        port: &'a ServicePort,
        choice: Choice,
        alive: Option<BackendSet>,
        algorithm: Algorithm,
        (masquerade_all, detect_local): (bool, bool),
    ) -> Self {
        let Choice { cluster, local, has_any } = choice;
        let (cluster, local) = (cluster.unwrap_or_default(), local.unwrap_or_default());
        let situation = Situation {
            internal: service.internal_policy,
            external: service.external_policy,
            has_any,
            has_local: !local.is_empty(),
            masquerade_all,
            detect_local,
        };
        Self { service, port, situation, cluster, local, sets: [None, None], alive, algorithm, made: Vec::new() }
    }

    fn of(&mut self, kind: FrontendKind) -> Arc<FrontendSpec> {
        let verdicts = verdicts::verdicts(kind, &self.situation);
        self.spec(kind, verdicts, None)
    }

    /// Only a process of the node can mean the node by 127.0.0.1, and only at connect time: no packet of that address is touched,
    /// so that nobody else has a way to what listens there (lesson of CVE-2020-8558).
    fn localhost(&mut self) -> Arc<FrontendSpec> {
        let Verdicts { node, .. } = verdicts::verdicts(FrontendKind::NodePort, &self.situation);
        self.spec(FrontendKind::NodePort, Verdicts { pod: PASS, node, external: PASS }, None)
    }

    /// Nothing new is led anywhere. What is open goes on with the backends that it has, for as long as they serve (A104): so there is
    /// a frontend still.
    fn yielded(&mut self) -> Arc<FrontendSpec> {
        self.spec(FrontendKind::ClusterIp, Verdicts { pod: PASS, node: PASS, external: PASS }, None)
    }

    /// Source ranges bind here alone (contract A90). Without an endpoint anywhere there is nothing to keep anybody from, and
    /// everybody is refused (A89). The node's own traffic has no packet that could be looked at: it is let in if a range has
    /// one of its addresses.
    fn load_balancer(&mut self, addresses: &Addresses, family: Family) -> Arc<FrontendSpec> {
        let mut verdicts = verdicts::verdicts(FrontendKind::LoadBalancer, &self.situation);
        let ranges = addresses.ranges(family).filter(|_| self.situation.has_any);
        if let Some(ranges) = ranges
            && !ranges.node
        {
            verdicts.node = Verdict { action: Action::Drop, masquerade: false };
        }
        self.spec(FrontendKind::LoadBalancer, verdicts, ranges.map(|ranges| Arc::clone(&ranges.nets)))
    }

    fn spec(
        &mut self,
        kind: FrontendKind,
        verdicts: Verdicts,
        source_ranges: Option<Arc<[IpNet]>>,
    ) -> Arc<FrontendSpec> {
        // Frontends of one kind differ by their address alone, all but localhost.
        if let Some(made) = self.made.iter().find(|made| made.kind == kind && made.verdicts == verdicts) {
            return Arc::clone(made);
        }
        let Verdicts { pod, node, external } = verdicts;
        let used = |action| [pod, node, external].iter().any(|verdict| verdict.action == action);
        let (uses_all, uses_local) = (used(Action::PickAll), used(Action::PickLocal));
        let Self { service, port, cluster, local, sets: [all_set, local_set], alive, algorithm, made, .. } = self;
        let set = |used: bool, shared: &mut Option<BackendSet>, backends: &[Backend]| {
            if used { Arc::clone(shared.get_or_insert_with(|| backends.into())) } else { BackendSet::default() }
        };
        let spec = Arc::new(FrontendSpec {
            service: ServicePortName {
                service: service.key.clone(),
                port: Arc::clone(&port.name),
                protocol: port.protocol,
            },
            kind,
            all: set(uses_all, all_set, cluster),
            local: set(uses_local, local_set, local),
            verdicts,
            algorithm: *algorithm,
            affinity_secs: service.affinity_secs,
            source_ranges,
            pods_per_packet: service.socket_lb.as_deref() == Some("node"),
            alive: alive.clone(),
        });
        made.push(Arc::clone(&spec));
        spec
    }
}

/// Which lists this port needs (contract A30, A31).
fn needs(service: &Service, port: &ServicePort, family: Family) -> Needs {
    let of_family = |ips: &[IpAddr]| ips.iter().any(|ip| Family::of(*ip) == family);
    let external =
        port.node_port.is_some() || of_family(&service.external_ips) || of_family(&service.load_balancer_ips);
    let internal_local = service.internal_policy == TrafficPolicy::Local;
    let external_local = service.external_policy == TrafficPolicy::Local && external;
    Needs { cluster: !internal_local || external, local: internal_local || external_local }
}

fn algorithm(service: &Service, defaults: &Defaults, problems: &mut Vec<String>) -> Algorithm {
    match service.algorithm.as_deref().map(str::trim) {
        None => defaults.algorithm,
        Some("random") => Algorithm::Random,
        Some("round-robin") => Algorithm::RoundRobin,
        Some("maglev") => Algorithm::Maglev,
        Some(unknown) => {
            problems.push(format!(
                "algorithm {unknown:?} is not known, the default is used; choose \"random\", \"round-robin\" or \"maglev\""
            ));
            defaults.algorithm
        }
    }
}

/// Whether TCP connections to endpoints that are gone are reset.
fn resets_deleted(service: &Service, problems: &mut Vec<String>) -> bool {
    match service.reset_deleted.as_deref().map(str::trim) {
        None | Some("false") => false,
        Some("true") => true,
        Some(unknown) => {
            problems
                .push(format!("reset-deleted {unknown:?} is not known, nothing is reset; write \"true\" or \"false\""));
            false
        }
    }
}

#[cfg(test)]
mod tests;
