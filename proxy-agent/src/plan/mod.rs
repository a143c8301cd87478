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

use std::{net::IpAddr, sync::Arc};

use crate::{
    desired::{Action, Algorithm, Backend, BackendSet, Frontend, FrontendKind, FrontendSpec},
    model::{
        EndpointSlice, Family, NodeFacts, Service, ServicePort, ServicePortName, ServiceType, TrafficPolicy,
        address::unfit_for_vip,
    },
};

mod candidates;
mod dump;
mod planner;
mod topology;
mod verdicts;

pub use dump::Dump;
pub use planner::Planner;

use candidates::Candidate;
use topology::{Choice, Needs};
use verdicts::Situation;

/// What configuration says for Services that do not say it themselves.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Defaults {
    pub algorithm: Algorithm,
    /// Masquerade pods' traffic to ClusterIPs, too (contract A79).
    pub masquerade_all: bool,
}

/// One Service, planned without regard to the others.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct PlannedService {
    /// Sorted by frontend, each once.
    pub frontends: Vec<(Frontend, Arc<FrontendSpec>)>,
    /// Addresses whose unclaimed ports are refused (contract A48). Sorted, each once.
    pub guards: Vec<IpAddr>,
    /// What was left out, and why.
    pub problems: Vec<String>,
}

impl PlannedService {
    pub(crate) fn frontend(&self, frontend: &Frontend) -> Option<&Arc<FrontendSpec>> {
        let at = self.frontends.binary_search_by_key(frontend, |(frontend, _)| *frontend).ok()?;
        self.frontends.get(at).map(|(_, spec)| spec)
    }
}

/// Plans one Service from its slices (of both families) and the node's facts.
pub fn plan_service<'a>(
    service: &Service,
    slices: impl Iterator<Item = &'a EndpointSlice> + Clone,
    node: &NodeFacts,
    defaults: &Defaults,
) -> PlannedService {
    let mut problems = service.problems.clone();
    // Contract A4, A5: headless and ExternalName Services have no frontends, whatever fields an earlier type left.
    if service.kind == ServiceType::ExternalName || service.cluster_ips.is_empty() {
        return PlannedService { problems, ..PlannedService::default() };
    }
    let algorithm = algorithm(service, defaults, &mut problems);
    let resets_deleted = resets_deleted(service, &mut problems);
    let guards = vips(service, &mut problems);
    candidates::report_unusable(slices.clone(), &mut problems);

    let mut frontends: Vec<(Frontend, Arc<FrontendSpec>)> = Vec::with_capacity(guards.len() * service.ports.len());
    for port in &service.ports {
        for &addr in &guards {
            let frontend = Frontend { addr, port: port.port, protocol: port.protocol };
            if frontends.iter().any(|(other, _)| *other == frontend) {
                problems.push(format!("port {}/{} is given twice; the first is used", port.port, port.protocol));
                break;
            }
            let family = Family::of(addr);
            let candidates = candidates::unite(slices.clone(), port, family, node);
            let choice = topology::choose(&candidates, needs(service, port, family), node);
            let alive = candidates::alive(&candidates, port.protocol, resets_deleted);
            frontends.push((frontend, Arc::new(cluster_ip(service, port, choice, alive, algorithm, defaults))));
        }
    }
    frontends.sort_unstable_by_key(|(frontend, _)| *frontend);
    PlannedService { frontends, guards, problems }
}

fn cluster_ip(
    service: &Service,
    port: &ServicePort,
    choice: Choice,
    alive: Option<BackendSet>,
    algorithm: Algorithm,
    defaults: &Defaults,
) -> FrontendSpec {
    let Choice { cluster, local, has_any } = choice;
    let (cluster, local) = (cluster.unwrap_or_default(), local.unwrap_or_default());
    let verdicts = verdicts::verdicts(
        FrontendKind::ClusterIp,
        &Situation {
            internal: service.internal_policy,
            external: service.external_policy,
            has_any,
            has_local: !local.is_empty(),
            masquerade_all: defaults.masquerade_all,
        },
    );
    let used = |action| [verdicts.pod, verdicts.node, verdicts.external].iter().any(|verdict| verdict.action == action);
    // A set that no verdict picks from is left out, so that its changes cost nothing.
    let set = |action, backends: Vec<Backend>| if used(action) { backends.into() } else { BackendSet::default() };
    FrontendSpec {
        service: ServicePortName {
            service: service.key.clone(),
            port: Arc::clone(&port.name),
            protocol: port.protocol,
        },
        kind: FrontendKind::ClusterIp,
        all: set(Action::PickAll, cluster),
        local: set(Action::PickLocal, local),
        verdicts,
        algorithm,
        affinity_secs: service.affinity_secs,
        source_ranges: None,
        alive,
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
        Some(unknown) => {
            problems.push(format!(
                "algorithm {unknown:?} is not known, the default is used; choose \"random\" or \"round-robin\""
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

/// The ClusterIPs that can be served, sorted, each once.
fn vips(service: &Service, problems: &mut Vec<String>) -> Vec<IpAddr> {
    let mut usable = Vec::with_capacity(service.cluster_ips.len());
    for &addr in &service.cluster_ips {
        match unfit_for_vip(addr) {
            Some(why) => problems.push(format!("clusterIP {addr} {why}; it is not served")),
            None => usable.push(addr),
        }
    }
    usable.sort_unstable();
    usable.dedup();
    usable
}

#[cfg(test)]
mod tests;
