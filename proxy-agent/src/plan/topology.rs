//! Which endpoints a node uses: readiness, the terminating fallback, topology hints, locality (contract A32–A42).
//!
//! The rules are Kubernetes' own (`pkg/proxy/topology.go`); `tests.rs` beside this holds its named cases.

use super::Candidate;
use crate::{desired::Backend, model::NodeFacts};

/// Which lists a port needs (contract A30).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Needs {
    pub(super) cluster: bool,
    pub(super) local: bool,
}

/// The lists, each sorted; `None` where the port does not need it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Choice {
    pub(super) cluster: Option<Vec<Backend>>,
    pub(super) local: Option<Vec<Backend>>,
    /// Somewhere there is an endpoint that could serve: where a list is empty nonetheless, traffic is dropped, not refused
    /// (contract A34).
    pub(super) has_any: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Mode {
    Anywhere,
    SameNode,
    SameZone,
}

pub(super) fn choose(candidates: &[Candidate<'_>], needs: Needs, node: &NodeFacts) -> Choice {
    Choice {
        cluster: needs.cluster.then(|| cluster(candidates, node)),
        local: needs.local.then(|| local(candidates)),
        has_any: candidates.iter().any(|c| c.ready || c.is_fallback()),
    }
}

/// Ready ones that topology allows; if nothing is ready, all that still serve while they terminate, wherever they are
/// (contract A32).
fn cluster(candidates: &[Candidate<'_>], node: &NodeFacts) -> Vec<Backend> {
    let mode = mode(candidates, node);
    let ready = backends(candidates, |c| c.ready && allowed(c, mode, node));
    if ready.is_empty() { backends(candidates, |c| c.is_fallback()) } else { ready }
}

/// Topology never restricts this list, and its fallback does not ask whether the cluster has ready ones (contract A33, A39).
fn local(candidates: &[Candidate<'_>]) -> Vec<Backend> {
    let ready = backends(candidates, |c| c.local && c.ready);
    if ready.is_empty() { backends(candidates, |c| c.local && c.is_fallback()) } else { ready }
}

fn backends(candidates: &[Candidate<'_>], take: impl Fn(&Candidate<'_>) -> bool) -> Vec<Backend> {
    candidates.iter().filter(|c| take(c)).map(|c| c.backend).collect()
}

/// One ready endpoint without a hint switches the mode off for the port, and so does a set of hints that names neither
/// this node nor its zone: then all ready endpoints are used (contract A36–A38).
fn mode(candidates: &[Candidate<'_>], node: &NodeFacts) -> Mode {
    let mut ready = candidates.iter().filter(|c| c.ready).peekable();
    if ready.peek().is_none() {
        return Mode::Anywhere;
    }
    let (mut all_nodes, mut all_zones, mut this_node, mut this_zone) = (true, true, false, false);
    for candidate in ready {
        all_nodes &= candidate.hints.is_some_and(|hints| !hints.nodes.is_empty());
        all_zones &= candidate.hints.is_some_and(|hints| !hints.zones.is_empty());
        if !all_nodes && !all_zones {
            return Mode::Anywhere;
        }
        this_node |= allowed(candidate, Mode::SameNode, node);
        this_zone |= allowed(candidate, Mode::SameZone, node);
    }
    if all_nodes && this_node {
        Mode::SameNode
    } else if all_zones && this_zone {
        Mode::SameZone
    } else {
        Mode::Anywhere
    }
}

fn allowed(candidate: &Candidate<'_>, mode: Mode, node: &NodeFacts) -> bool {
    match mode {
        Mode::Anywhere => true,
        Mode::SameNode => candidate.hints.is_some_and(|hints| hints.nodes.contains(&node.name)),
        Mode::SameZone => {
            candidate.hints.zip(node.zone.as_ref()).is_some_and(|(hints, zone)| hints.zones.contains(zone))
        }
    }
}
