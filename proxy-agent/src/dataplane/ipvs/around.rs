//! Whose an address is already. To hold one is to take it from whoever has it: this node would answer in its place, refuse what no
//! Service claims there, and reach the other one no more (k8s#104679).

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::IpNet;

use super::render;
use crate::{
    dataplane::{Failure, netfilter::is_loopback},
    desired::{BackendSet, Frontend, FrontendKind, FrontendSpec},
    model::Family,
};

/// What is known of it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Around {
    /// On this node's other devices, with the networks that they are in.
    pub(super) others: Vec<IpNet>,
    /// Those that somebody in this node's networks has answered for, and with which link address.
    pub(super) neighbours: BTreeMap<IpAddr, Vec<u8>>,
    /// Of all Services.
    pub(super) load_balancers: BTreeSet<IpAddr>,
    /// Load balancers' that are endpoints' too: a node's, mostly, whose own processes serve.
    pub(super) backends: BTreeSet<IpAddr>,
}

impl Around {
    /// Takes in what is known now. Who was seen at a load balancer's address is not forgotten: a node that does not answer for a while
    /// has its address still.
    pub(super) fn look(&mut self, others: Vec<IpNet>, mut neighbours: BTreeMap<IpAddr, Vec<u8>>) {
        let before = std::mem::take(&mut self.neighbours);
        for (addr, link) in before.into_iter().filter(|(addr, _)| self.load_balancers.contains(addr)) {
            neighbours.entry(addr).or_insert(link);
        }
        (self.others, self.neighbours) = (others, neighbours);
    }

    /// A neighbour has it that goes by no other: one that does holds it for a load balancer that moves from node to node, and is no
    /// reason for this one not to.
    fn is_neighbours(&self, addr: &IpAddr) -> bool {
        let Some(link) = self.neighbours.get(addr) else { return false };
        let of_it = self.neighbours.iter().filter(|(_, of)| *of == link).map(|(other, _)| other);
        let mut names = of_it.filter(|other| Family::of(**other) == Family::of(*addr) && !is_link_local(other));
        !names.any(|other| !self.load_balancers.contains(other))
    }

    pub(super) fn is_own(&self, addr: &IpAddr) -> bool {
        self.others.iter().any(|net| net.addr() == *addr)
    }

    /// The address that our device is to hold, if any; `bound`: it does.
    pub(super) fn held(
        &self,
        frontend: &Frontend,
        spec: &FrontendSpec,
        is_bound: impl Fn(&IpAddr) -> bool,
    ) -> Result<Option<IpAddr>, Failure> {
        let Some(addr) = render::held_address(frontend, spec).filter(|addr| !is_loopback(*addr)) else {
            return Ok(None);
        };
        let refused = |why: String| Err(Failure::Unsupported(format!("frontend {frontend}: {why}")));
        match spec.kind {
            FrontendKind::ExternalIp => {
                if let Some(net) = self.networks().find(|net| net.contains(&addr)) {
                    return refused(format!(
                        "the external IP {addr} is in {}, where this node's neighbours are: to serve it with ipvs would take it from whoever \
                         has it; use an address that is routed to the nodes, or another --proxy-mode",
                        net.trunc()
                    ));
                }
            }
            // Packets for it come to the node's input anyway, and what no Service claims there is the node's.
            FrontendKind::LoadBalancer if self.is_own(&addr) => return Ok(None),
            FrontendKind::LoadBalancer if self.backends.contains(&addr) => {
                return refused(format!(
                    "the load balancer's address {addr} is an endpoint's, too, so another node's: to serve it here with ipvs would cut this \
                     node off from it; it is left to that one, or use another --proxy-mode"
                ));
            }
            FrontendKind::LoadBalancer if self.is_neighbours(&addr) && !is_bound(&addr) => {
                return refused(format!(
                    "the load balancer's address {addr} is answered for by a neighbour of this node's (`ip neigh show {addr}`): to serve it \
                     here with ipvs would cut this node off from it; it is left to that one, or use another --proxy-mode"
                ));
            }
            FrontendKind::ClusterIp | FrontendKind::NodePort | FrontendKind::LoadBalancer => {}
        }
        Ok(Some(addr))
    }

    /// One that holds a single address is in none.
    fn networks(&self) -> impl Iterator<Item = &IpNet> {
        self.others.iter().filter(|net| net.prefix_len() < net.max_prefix_len())
    }
}

fn is_link_local(addr: &IpAddr) -> bool {
    match addr {
        IpAddr::V4(addr) => addr.is_link_local(),
        IpAddr::V6(addr) => addr.is_unicast_link_local(),
    }
}

/// Which of `addresses` are backends'.
pub(super) fn backends<'a>(
    addresses: &BTreeSet<IpAddr>,
    sets: impl Iterator<Item = &'a BackendSet>,
) -> BTreeSet<IpAddr> {
    if addresses.is_empty() {
        return BTreeSet::new();
    }
    let mut seen = BTreeSet::new();
    // Frontends of a Service share theirs.
    let once = sets.filter(|set| seen.insert(set.as_ptr()));
    once.flat_map(|set| set.iter()).map(|backend| backend.addr).filter(|addr| addresses.contains(addr)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        dataplane::netfilter::refused,
        desired::{Action, Verdict, Verdicts},
    };

    fn addr(last: u8) -> IpAddr {
        [192, 0, 2, last].into()
    }

    fn held(around: &Around, kind: FrontendKind, last: u8, is_bound: bool) -> Result<Option<IpAddr>, String> {
        let frontend = refused::frontend(&addr(last).to_string());
        let spec = FrontendSpec { kind, ..FrontendSpec::clone(&refused::spec(&frontend)) };
        around.held(&frontend, &spec, |_| is_bound).map_err(|failure| failure.to_string())
    }

    #[test]
    fn what_is_somebodys_is_not_held() {
        let lb = FrontendKind::LoadBalancer;
        let mut around = Around { load_balancers: [1, 2, 3, 4].map(addr).into(), ..Around::default() };
        assert_eq!(held(&around, lb, 1, false), Ok(Some(addr(1))));
        assert_eq!(held(&around, FrontendKind::ExternalIp, 1, false), Ok(Some(addr(1))));
        let one = |last: u8, bits| IpNet::new(addr(last), bits).unwrap();
        around.look(
            vec![one(1, 24), one(9, 32)],
            BTreeMap::from([(addr(2), vec![2]), (addr(3), vec![3]), (addr(7), vec![3])]),
        );
        assert_eq!(held(&around, lb, 1, false), Ok(None), "the node's own");
        assert_eq!(held(&around, lb, 9, true), Ok(None), "the node's own, of late");
        assert!(held(&around, FrontendKind::ExternalIp, 8, true).unwrap_err().contains("192.0.2.0/24"));
        assert!(held(&around, lb, 2, false).unwrap_err().contains("a neighbour"), "{around:?}");
        assert_eq!(held(&around, lb, 2, true), Ok(Some(addr(2))), "here nobody else is asked for it any more");
        assert_eq!(held(&around, lb, 3, false), Ok(Some(addr(3))), "a node that is named otherwise announces it");
        assert_eq!(held(&around, FrontendKind::ClusterIp, 1, false), Ok(Some(addr(1))), "the planner yields these");
        // One that is away for a while.
        around.look(Vec::new(), BTreeMap::new());
        assert!(held(&around, lb, 2, false).is_err() && around.neighbours.len() == 2);
        around.backends = [addr(4)].into();
        assert!(held(&around, lb, 4, true).unwrap_err().contains("an endpoint"));
        assert_eq!(held(&around, FrontendKind::ExternalIp, 4, true), Ok(Some(addr(4))));
        // What is nobody's to serve.
        let frontend = refused::frontend("192.0.2.2");
        let pass = Verdict { action: Action::Pass, masquerade: false };
        let spec = FrontendSpec {
            kind: lb,
            verdicts: Verdicts { pod: pass, node: pass, external: pass },
            ..FrontendSpec::clone(&refused::spec(&frontend))
        };
        assert_eq!(around.held(&frontend, &spec, |_| false), Ok(None));
    }

    #[test]
    fn endpoints_at_load_balancers_addresses_are_found() {
        let backend = |last: u8| crate::desired::Backend { addr: addr(last), port: 80.try_into().unwrap() };
        let sets: [BackendSet; 2] = [[backend(1), backend(2)].into(), [backend(3)].into()];
        let twice = || sets.iter().chain(&sets);
        assert_eq!(backends(&[addr(3), addr(4)].into(), twice()), [addr(3)].into());
        assert_eq!(backends(&BTreeSet::new(), twice()), BTreeSet::new());
    }
}
