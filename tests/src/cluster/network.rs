//! Addresses, and the namespaces that they are in.
//!
//! ```text
//!   pods 10.56.1.0/24 ── node1 10.55.0.11 ──┐
//!   pods 10.56.2.0/24 ── node2 10.55.0.12 ──┼── fabric (a bridge, 10.55.0.1: everybody's default route, which leads nowhere)
//!                                           │
//!              servers, DNS, specs 10.55.0.2 ┘
//! ```

use std::net::Ipv4Addr;

use anyhow::Result;

use super::layout;
use crate::world::Namespace;

pub(super) const SERVERS: Ipv4Addr = Ipv4Addr::new(10, 55, 0, 2);

/// Address of a node; they count from 1.
pub(super) fn node_address(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 55, 0, 10 + number)
}

pub(super) fn pod_range(number: u8) -> String {
    format!("10.56.{number}.0/24")
}

/// All that pods have.
pub(super) const POD_RANGE: &str = "10.56.0.0/16";

/// The network between the nodes.
pub(super) struct Network {
    fabric: Namespace,
    pub(super) servers: Namespace,
}

impl Network {
    pub(super) fn create(nodes: u8) -> Result<Self> {
        let fabric = Namespace::create(&layout::namespace("fabric"))?;
        fabric.ip("link add fabric type bridge\naddress add 10.55.0.1/24 dev fabric\nlink set fabric up\n")?;
        let network = Self { servers: Namespace::create(&layout::namespace("servers"))?, fabric };
        network.attach("servers", SERVERS, &network.servers)?;
        for number in 1..=nodes {
            network.route(&network.servers, number)?;
        }
        Ok(network)
    }

    /// A node's namespace, with routes to the pods of the others.
    pub(super) fn node(&self, name: &str, number: u8, nodes: u8) -> Result<Namespace> {
        let namespace = Namespace::create(&layout::namespace(name))?;
        self.attach(name, node_address(number), &namespace)?;
        namespace.sysctl(&[("ipv4/ip_forward", "1"), ("ipv6/conf/all/forwarding", "1")])?;
        for other in (1..=nodes).filter(|other| *other != number) {
            self.route(&namespace, other)?;
        }
        Ok(namespace)
    }

    fn attach(&self, name: &str, address: Ipv4Addr, namespace: &Namespace) -> Result<()> {
        self.fabric.ip(&format!(
            "link add {name} type veth peer name eth0 netns {}\nlink set {name} master fabric up\n",
            namespace.name()
        ))?;
        namespace.ip(&format!("address add {address}/24 dev eth0\nlink set eth0 up\nroute add default via 10.55.0.1\n"))
    }

    fn route(&self, from: &Namespace, node: u8) -> Result<()> {
        from.ip(&format!("route add {} via {}\n", pod_range(node), node_address(node)))
    }
}
