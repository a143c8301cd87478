//! Which addresses one Service claims on this node: its own, the node's, and those that lead here from outside.

use std::{
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
};

use ipnet::IpNet;

use super::{Claim, Defaults, Here};
use crate::{
    desired::FrontendKind,
    model::{Family, Port, Service, ServicePort, address::unfit_for_vip},
};

/// All of them, sorted, each once.
pub(super) struct Addresses {
    pub(super) cluster_ips: Vec<IpAddr>,
    /// ClusterIPs that the node itself has, which are left to it.
    yielded: Vec<IpAddr>,
    /// Families that the Service has a ClusterIP of: only those are served (contract A8).
    families: Vec<Family>,
    /// The node's own that answer for its NodePorts.
    node: Vec<IpAddr>,
    localhost: Option<IpAddr>,
    load_balancers: Vec<IpAddr>,
    external_ips: Vec<IpAddr>,
    ranges: Vec<Ranges>,
}

/// The source ranges of one family.
pub(super) struct Ranges {
    pub(super) nets: Arc<[IpNet]>,
    /// The node itself is inside.
    pub(super) node: bool,
}

pub(super) fn of(service: &Service, here: Here<'_>, defaults: &Defaults, problems: &mut Vec<String>) -> Addresses {
    let has_node_port = service.ports.iter().any(|port| port.node_port.is_some());
    let mut families: Vec<Family> = service.cluster_ips.iter().map(|ip| Family::of(*ip)).collect();
    families.sort_unstable();
    families.dedup();
    let node = if has_node_port { defaults.node_port_addresses.select(here.addresses, here.node) } else { Vec::new() };
    let localhost = has_node_port && defaults.localhost_node_ports && defaults.node_port_addresses.means_localhost();
    let load_balancers = usable("load balancer address", &service.load_balancer_ips, &families, problems);
    let ranges = if load_balancers.is_empty() {
        Vec::new()
    } else {
        families.iter().filter_map(|family| ranges(service, *family, here)).collect()
    };
    let cluster_ips = usable("clusterIP", &service.cluster_ips, &families, problems);
    let (yielded, cluster_ips): (Vec<_>, Vec<_>) =
        cluster_ips.into_iter().partition(|addr| here.addresses.contains(addr));
    report_yielded(&yielded, problems);
    Addresses {
        cluster_ips,
        yielded,
        node,
        localhost: localhost.then_some(IpAddr::V4(Ipv4Addr::LOCALHOST)),
        load_balancers,
        external_ips: external_ips(service, &families, here, defaults, problems),
        ranges,
        families,
    }
}

impl Addresses {
    pub(super) fn families(&self) -> impl Iterator<Item = Family> {
        self.families.iter().copied()
    }

    pub(super) fn ranges(&self, family: Family) -> Option<&Ranges> {
        self.ranges.iter().find(|ranges| ranges.nets.first().is_some_and(|net| Family::of(net.addr()) == family))
    }

    /// What `port` claims of `family`.
    pub(super) fn claims(&self, port: &ServicePort, family: Family, claim: &mut impl FnMut(Claim, IpAddr, Port)) {
        let Self { cluster_ips, yielded, families: _, node, localhost, load_balancers, external_ips, ranges: _ } = self;
        let of_family = |addr: &&IpAddr| Family::of(**addr) == family;
        let mut claim_all = |kind: FrontendKind, addresses: &[IpAddr], number: Port| {
            for addr in addresses.iter().filter(of_family) {
                claim(Claim::Kind(kind), *addr, number);
            }
        };
        claim_all(FrontendKind::ClusterIp, cluster_ips, port.port);
        claim_all(FrontendKind::LoadBalancer, load_balancers, port.port);
        claim_all(FrontendKind::ExternalIp, external_ips, port.port);
        if let Some(number) = port.node_port {
            claim_all(FrontendKind::NodePort, node, number);
        }
        for addr in yielded.iter().filter(of_family) {
            claim(Claim::Yielded, *addr, port.port);
        }
        if let Some(number) = port.node_port {
            for addr in localhost.iter().filter(of_family) {
                claim(Claim::Localhost, *addr, number);
            }
        }
    }
}

/// The addresses of a field that can be served.
fn usable(what: &str, addresses: &[IpAddr], families: &[Family], problems: &mut Vec<String>) -> Vec<IpAddr> {
    let mut usable = Vec::with_capacity(addresses.len());
    for &addr in addresses {
        match unfit_for_vip(addr) {
            Some(why) => problems.push(format!("{what} {addr} {why}; it is not served")),
            None if !families.contains(&Family::of(addr)) => {
                problems.push(format!(
                    "{what} {addr} is of a family that the Service has no clusterIP of; it is not served"
                ));
            }
            None => usable.push(addr),
        }
    }
    usable.sort_unstable();
    usable.dedup();
    usable
}

/// A cache of the node (NodeLocal DNSCache) that takes the place of a Service gives itself that Service's address: whoever asks for it means the
/// cache. kube-proxy gets out of its way by rules that the cache makes for it, which keep connection tracking off (cilium#13040).
fn report_yielded(yielded: &[IpAddr], problems: &mut Vec<String>) {
    problems.extend(yielded.iter().map(|addr| {
        format!(
            "clusterIP {addr} is an address of this node, where something answers in the Service's place; it is left to that here"
        )
    }));
}

/// Those that no one else needs: what the node itself answers for stays the node's, or a Service with the node's address and
/// port 6443 would cut it off from its cluster (kubernetes#104679). A NodePort or a load balancer's address is the way to
/// serve on it.
fn external_ips(
    service: &Service,
    families: &[Family],
    here: Here<'_>,
    defaults: &Defaults,
    problems: &mut Vec<String>,
) -> Vec<IpAddr> {
    if service.external_ips.is_empty() {
        return Vec::new();
    }
    if !defaults.external_ips {
        problems
            .push("externalIPs are switched off on this node (--external-ips=false); they are not served".to_owned());
        return Vec::new();
    }
    let mut served = usable("externalIP", &service.external_ips, families, problems);
    served.retain(|addr| {
        let own = here.addresses.contains(addr);
        if own {
            problems.push(format!(
                "externalIP {addr} is an address of this node, whose own services it would take over; it is not served \
                 here, use a NodePort or a load balancer's address"
            ));
        }
        !own
    });
    served
}

/// `None`: everybody may come, because nothing is said for this family or all of it (contract A93).
fn ranges(service: &Service, family: Family, here: Here<'_>) -> Option<Ranges> {
    let of_family = service.source_ranges.iter().filter(|net| Family::of(net.addr()) == family);
    let nets = IpNet::aggregate(&of_family.map(IpNet::trunc).collect());
    if nets.is_empty() || nets.iter().any(|net| net.prefix_len() == 0) {
        return None;
    }
    // The addresses that the node goes by; one that has none yet goes by whatever it has.
    let inside = |addr: &IpAddr| nets.iter().any(|net| net.contains(addr));
    let named = &here.node.internal_ips;
    let node = if named.iter().any(|addr| Family::of(*addr) == family) {
        named.iter().any(inside)
    } else {
        here.addresses.iter().any(inside)
    };
    Some(Ranges { nets: nets.into(), node })
}
