//! Which addresses can be served, and which can serve.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::IpNet;

use super::{Family, NodeFacts};

/// Which family such an address means is anybody's guess, and a packet never carries it.
pub const MAPPED: &str = "is an IPv4 address in IPv6 clothes";

/// Why no frontend can have this address.
pub fn unfit_for_vip(ip: IpAddr) -> Option<&'static str> {
    if ip.is_unspecified() {
        Some("is the unspecified address")
    } else if ip.is_loopback() {
        Some("is a loopback address")
    } else if ip.is_multicast() {
        Some("is a multicast address")
    } else if matches!(ip, IpAddr::V4(ip) if ip.is_broadcast()) {
        Some("is the broadcast address")
    } else if matches!(ip, IpAddr::V6(ip) if ip.to_ipv4_mapped().is_some()) {
        Some(MAPPED)
    } else if matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local()) {
        Some("is a link-local address")
    } else {
        None
    }
}

/// Why no endpoint can have this address: what the API server refuses too. Traffic sent there would reach this node's own
/// services, everybody, or another host on every link: doors that nobody asked for (fault F13).
pub fn unfit_for_endpoint(ip: IpAddr) -> Option<&'static str> {
    unfit_for_vip(ip)
        .or_else(|| matches!(ip, IpAddr::V4(ip) if ip.is_link_local()).then_some("is a link-local address"))
}

/// What comes of such an endpoint, and what to do.
pub const NO_TRAFFIC: &str = "it gets no traffic, list a pod's or a host's own address";

/// Which of its addresses a node answers NodePorts at (`--nodeport-addresses`, contract A53).
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum NodePortAddresses {
    /// All that others can reach.
    #[default]
    All,
    /// The InternalIPs that the Node object names; of the family of this address it alone.
    Primary(Option<IpAddr>),
    /// Those inside one of these; a family that none is of: all.
    Cidrs(Vec<IpNet>),
}

impl NodePortAddresses {
    /// Those of the node's own `addresses` that are meant, sorted.
    pub fn select(&self, addresses: &BTreeSet<IpAddr>, node: &NodeFacts) -> Vec<IpAddr> {
        addresses.iter().copied().filter(|addr| self.means(*addr, node)).collect()
    }

    /// Where to listen, so that whoever reaches a NodePort of this family is heard; the unspecified address is everywhere.
    pub fn listen(&self, family: Family, addresses: &BTreeSet<IpAddr>, node: &NodeFacts) -> Vec<IpAddr> {
        let everywhere = match self {
            Self::All => true,
            Self::Primary(_) => false,
            Self::Cidrs(cidrs) => {
                let mut of_family = cidrs.iter().filter(|cidr| Family::of(cidr.addr()) == family).peekable();
                of_family.peek().is_none() || of_family.any(|cidr| cidr.prefix_len() == 0)
            }
        };
        if everywhere {
            return vec![match family {
                Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
                Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
            }];
        }
        self.select(addresses, node).into_iter().filter(|addr| Family::of(*addr) == family).collect()
    }

    fn means(&self, addr: IpAddr, node: &NodeFacts) -> bool {
        match self {
            Self::All => unfit_for_endpoint(addr).is_none(),
            Self::Primary(instead) => {
                let of_node = || node.internal_ips.contains(&addr);
                let instead = instead.filter(|instead| Family::of(*instead) == Family::of(addr));
                unfit_for_vip(addr).is_none() && instead.map_or_else(of_node, |instead| instead == addr)
            }
            Self::Cidrs(cidrs) => {
                let all = !cidrs.iter().any(|cidr| Family::of(cidr.addr()) == Family::of(addr))
                    || cidrs.iter().any(|cidr| cidr.prefix_len() == 0 && cidr.contains(&addr));
                // A link-local address is not meant by "everything", only by name.
                let named = cidrs.iter().any(|cidr| cidr.prefix_len() > 0 && cidr.contains(&addr));
                all && unfit_for_endpoint(addr).is_none() || named && unfit_for_vip(addr).is_none()
            }
        }
    }

    /// Whether the node's own processes may use 127.0.0.1 (contract A54).
    pub fn means_localhost(&self) -> bool {
        let localhost = IpAddr::V4(Ipv4Addr::LOCALHOST);
        match self {
            Self::All => true,
            Self::Primary(_) => false,
            Self::Cidrs(cidrs) => {
                !cidrs.iter().any(|cidr| cidr.addr().is_ipv4())
                    || cidrs
                        .iter()
                        .any(|cidr| cidr.contains(&localhost) || cidr.addr().is_ipv4() && cidr.addr().is_loopback())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_nothing_can_live_at() {
        for text in [
            "0.0.0.0",
            "127.0.0.1",
            "127.1.2.3",
            "224.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "ff02::1",
            "fe80::1",
            "::ffff:1.2.3.4",
        ] {
            assert!(unfit_for_vip(text.parse().unwrap()).is_some(), "{text}");
        }
        assert_eq!(unfit_for_vip("169.254.20.10".parse().unwrap()), None);
        assert!(unfit_for_endpoint("169.254.20.10".parse().unwrap()).is_some());
        for text in ["10.0.0.1", "192.0.2.1", "fd00::1", "2001:db8::1"] {
            assert_eq!(unfit_for_endpoint(text.parse().unwrap()), None, "{text}");
        }
    }

    #[test]
    fn a_node_answers_node_ports_where_it_is_told_to_a52_a53() {
        let addresses = "10.244.1.1 127.0.0.1 169.254.20.10 192.0.2.1 198.51.100.7 ::1 fd00::1 fe80::1";
        let addresses: BTreeSet<IpAddr> = addresses.split(' ').map(|ip| ip.parse().unwrap()).collect();
        let node = NodeFacts {
            internal_ips: ["192.0.2.1", "192.0.2.99", "fe80::1"].map(|ip| ip.parse().unwrap()).to_vec(),
            ..NodeFacts::default()
        };
        let cidrs = |text: &str| NodePortAddresses::Cidrs(text.split(' ').map(|cidr| cidr.parse().unwrap()).collect());
        for (which, expected, localhost) in [
            (NodePortAddresses::All, "10.244.1.1 192.0.2.1 198.51.100.7 fd00::1", true),
            // What the Node object says and the node does not have, it cannot answer for; nor for what is no address to ask.
            (NodePortAddresses::Primary(None), "192.0.2.1", false),
            // Another one for a family, and nothing for the other (A125).
            (NodePortAddresses::Primary(Some("198.51.100.7".parse().unwrap())), "198.51.100.7", false),
            (NodePortAddresses::Primary(Some("fd00::1".parse().unwrap())), "192.0.2.1 fd00::1", false),
            (NodePortAddresses::Primary(Some("192.0.2.98".parse().unwrap())), "", false),
            (cidrs("192.0.2.0/24"), "192.0.2.1 fd00::1", false),
            (cidrs("192.0.2.0/24 127.0.0.0/8"), "192.0.2.1 fd00::1", true),
            (cidrs("127.0.0.1/32"), "fd00::1", true),
            (cidrs("127.0.0.2/32"), "fd00::1", true),
            (cidrs("0.0.0.0/0 fd01::/64"), "10.244.1.1 192.0.2.1 198.51.100.7", true),
            (cidrs("169.254.0.0/16 0.0.0.0/0"), "10.244.1.1 169.254.20.10 192.0.2.1 198.51.100.7 fd00::1", true),
            (cidrs("::/0"), "10.244.1.1 192.0.2.1 198.51.100.7 fd00::1", true),
            (cidrs("203.0.113.0/24 fe80::/10"), "", false),
        ] {
            let selected: Vec<String> = which.select(&addresses, &node).iter().map(ToString::to_string).collect();
            assert_eq!(selected.join(" "), expected, "{which:?}");
            assert_eq!(which.means_localhost(), localhost, "{which:?}");
        }
    }
}
