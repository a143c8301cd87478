//! From slices to the endpoints of one port and family: united, without duplicates, without addresses that must not be
//! aimed at.

use std::{cmp::Reverse, collections::BTreeSet, net::IpAddr};

use crate::{
    desired::{Backend, BackendSet},
    model::{
        Endpoint, EndpointHints, EndpointSlice, Family, NodeFacts, Protocol, ServicePort,
        address::{NO_TRAFFIC, unfit_for_endpoint},
    },
};

/// More unusable addresses than this are counted, not listed.
const LISTED: usize = 8;

/// One endpoint of one port.
#[derive(Clone, Copy, Debug)]
pub(super) struct Candidate<'a> {
    pub(super) backend: Backend,
    pub(super) ready: bool,
    pub(super) serving: bool,
    pub(super) terminating: bool,
    /// On this node (contract A25).
    pub(super) local: bool,
    pub(super) hints: Option<&'a EndpointHints>,
}

impl Candidate<'_> {
    /// Used only where nothing ready is left (contract A32, A33).
    pub(super) fn is_fallback(&self) -> bool {
        !self.ready && self.serving && self.terminating
    }
}

/// The endpoints of `port` in all slices (contract A19, A23), sorted by address, each once.
pub(super) fn unite<'a>(
    slices: impl Iterator<Item = &'a EndpointSlice>,
    port: &ServicePort,
    family: Family,
    node: &NodeFacts,
) -> Vec<Candidate<'a>> {
    let mut candidates = Vec::new();
    for slice in slices.filter(|slice| slice.family == family) {
        for slice_port in slice.ports.iter().filter(|p| p.name == port.name && p.protocol == port.protocol) {
            let usable = slice.endpoints.iter().filter(|endpoint| unusable(endpoint.address, family).is_none());
            candidates.extend(usable.map(|endpoint| {
                let Endpoint { address, ready, serving, terminating, node: at, hints } = endpoint;
                Candidate {
                    backend: Backend { addr: *address, port: slice_port.port },
                    ready: *ready,
                    serving: *serving,
                    terminating: *terminating,
                    local: at.as_ref().is_some_and(|at| *at == node.name),
                    hints: hints.as_deref(),
                }
            }));
        }
    }
    // A pod that moves between slices is seen twice for a while, and so is an address that a new pod took over from one
    // that still terminates: what is not terminating wins, then what is ready (contract A20). The sort is stable, so
    // between equals the slice of the smaller name decides.
    //
    // That the two may be the same pod (targetRef), so that the newer slice knows better, is not asked: kube-proxy asks neither
    // (kubernetes#135593, merged in place of #135334), and nothing in a slice says dependably how new it is. The trigger time is
    // the controller's alone and comes with some changes only, the creation time is that of the slice and not of its content, and
    // versions are opaque. What is wrong is over with the other slice's event, which the controller writes in the same sync.
    candidates.sort_by_key(|c| (c.backend, c.terminating, Reverse(c.ready), Reverse(c.serving)));
    candidates.dedup_by_key(|c| c.backend);
    candidates
}

/// What flows of `port` may go on with: for UDP whatever serves, terminating or not, and for TCP, where the Service asks for
/// resets, whoever is still listed (contract A103, A104). Neither policy nor topology takes part.
///
/// An endpoint is deleted when no slice of the Service has its address: a port that gets another number, or another name that its
/// slices do not have yet, deletes nobody. So for TCP addresses alone count, each once, with the port of the Service.
pub(super) fn alive<'a>(
    candidates: &[Candidate<'_>],
    slices: impl Iterator<Item = &'a EndpointSlice>,
    port: &ServicePort,
    family: Family,
    resets_deleted: bool,
) -> Option<BackendSet> {
    match port.protocol {
        Protocol::Udp => Some(candidates.iter().filter(|c| c.ready || c.serving).map(|c| c.backend).collect()),
        Protocol::Tcp if resets_deleted => {
            let endpoints = slices.filter(|slice| slice.family == family).flat_map(|slice| &slice.endpoints);
            let listed: BTreeSet<_> = endpoints.map(|e| Backend { addr: e.address, port: port.port }).collect();
            Some(listed.into_iter().collect())
        }
        Protocol::Tcp | Protocol::Sctp => None,
    }
}

/// Says once which addresses `unite` passes over. The sources leave them out and say so themselves: this is for what comes by another way.
pub(super) fn report_unusable<'a>(slices: impl Iterator<Item = &'a EndpointSlice>, problems: &mut Vec<String>) {
    let mut passed = 0_usize;
    for slice in slices {
        problems.extend(slice.problems.iter().map(|problem| format!("EndpointSlice {}: {problem}", slice.name)));
        for endpoint in &slice.endpoints {
            let Some(why) = unusable(endpoint.address, slice.family) else { continue };
            passed += 1;
            if passed <= LISTED {
                let (slice, address) = (&slice.name, endpoint.address);
                problems.push(format!("EndpointSlice {slice}: endpoint {address} {why}; {NO_TRAFFIC}"));
            }
        }
    }
    if passed > LISTED {
        problems.push(format!("{} more endpoints have addresses that cannot be used", passed - LISTED));
    }
}

/// Why an endpoint's address must not be aimed at.
pub(super) fn unusable(addr: IpAddr, family: Family) -> Option<&'static str> {
    if Family::of(addr) != family { Some("is of another family than its slice") } else { unfit_for_endpoint(addr) }
}
