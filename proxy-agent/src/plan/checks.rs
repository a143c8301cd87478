//! Health-check node ports: where a load balancer asks whether to send a Service's traffic to this node (contract A111–A113).

use std::{collections::BTreeSet, net::IpAddr, sync::Arc};

use super::{Defaults, Here, candidates};
use crate::{
    desired::{FamilyCheck, HealthCheck},
    model::{EndpointSlice, Family, Service, ServiceType, TrafficPolicy},
};

/// `None`: this Service has none. Another policy or another type closes it, whatever number the Service still carries (A114).
pub(super) fn of<'a>(
    service: &Service,
    families: impl Iterator<Item = Family>,
    slices: impl Iterator<Item = &'a EndpointSlice> + Clone,
    here: Here<'_>,
    defaults: &Defaults,
) -> Option<HealthCheck> {
    let asked = service.kind == ServiceType::LoadBalancer && service.external_policy == TrafficPolicy::Local;
    let port = service.health_check_node_port.filter(|_| asked)?;
    let check = |family| {
        let listen = defaults.node_port_addresses.listen(family, here.addresses, here.node);
        let local = local_ready(slices.clone(), family, here);
        (family, FamilyCheck { listen, local })
    };
    Some(HealthCheck { uid: Arc::clone(&service.uid), port, families: families.map(check).collect() })
}

/// Addresses of ready endpoints on this node, each once, whatever ports they have. One that terminates is not counted, so that the
/// load balancer turns away while the endpoint still serves what comes (A113).
fn local_ready<'a>(slices: impl Iterator<Item = &'a EndpointSlice>, family: Family, here: Here<'_>) -> usize {
    let slices = slices.filter(|slice| slice.family == family && !slice.ports.is_empty());
    let here = slices.flat_map(|slice| &slice.endpoints).filter(|endpoint| {
        let local = endpoint.node.as_ref().is_some_and(|node| *node == here.node.name);
        local && endpoint.ready && candidates::unusable(endpoint.address, family).is_none()
    });
    here.map(|endpoint| endpoint.address).collect::<BTreeSet<IpAddr>>().len()
}
