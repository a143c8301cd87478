//! What kube-proxy leaves of its IPVS mode: a device, and virtual servers. IPVS does not say whose a server is; those are its that are at an
//! address of its device, or at a node port of its and an address of this node. (Its own cleanup removes everybody's.)

use std::{collections::BTreeSet, net::IpAddr};

use super::{
    codec::{Request, Virtual},
    device::{KUBE_PROXYS, Route},
    no_ipvs,
    socket::Socket,
};
use crate::{
    dataplane::DataplaneError,
    model::{Family, Protocol},
};

/// Its device's name.
pub const DEVICE: &str = KUBE_PROXYS;

pub type NodePorts = BTreeSet<(Family, Protocol, u16)>;

/// See the module.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Left {
    pub servers: Vec<Virtual>,
    pub device: Option<u32>,
}

/// `node_ports`: what it served as such.
pub fn find(node_ports: &NodePorts) -> Result<Left, DataplaneError> {
    let of_device = |source| DataplaneError::Kernel { what: format!("device {DEVICE}"), source };
    let route = Route::open().map_err(of_device)?;
    // Another one of this name is somebody else's.
    let device = route.named(DEVICE).map_err(of_device)?.filter(|device| device.is_dummy).map(|device| device.index);
    let held = device.map_or(Ok(BTreeSet::new()), |index| route.addresses(index)).map_err(of_device)?;
    if (held.is_empty() && node_ports.is_empty()) || !Socket::is_loaded() {
        return Ok(Left { servers: Vec::new(), device });
    }
    let own = route.others().map_err(of_device)?.into_iter().map(|net| net.addr()).collect();
    let mut all = Socket::open().map_err(no_ipvs)?;
    let mut servers: Vec<Virtual> = all.services().map_err(no_ipvs)?.into_iter().map(|service| service.at).collect();
    servers.retain(|at| is_its(*at, &held, &own, node_ports));
    servers.sort();
    Ok(Left { servers, device })
}

fn is_its(at: Virtual, held: &BTreeSet<IpAddr>, own: &BTreeSet<IpAddr>, node_ports: &NodePorts) -> bool {
    match at {
        Virtual::At { addr, port, protocol } => {
            let is_node_port = || node_ports.contains(&(Family::of(addr), protocol, port));
            held.contains(&addr) || (own.contains(&addr) && is_node_port())
        }
        // It has none.
        Virtual::Marked { .. } => false,
    }
}

/// Their connections end. What is gone meanwhile is no error.
pub fn remove_servers(servers: &[Virtual]) -> Result<(), DataplaneError> {
    let requests: Vec<Request> = servers.iter().copied().map(Request::Remove).collect();
    let outcomes = Socket::open().and_then(|mut socket| socket.run(&requests)).map_err(no_ipvs)?;
    let mut refused =
        outcomes.into_iter().filter_map(Result::err).filter(|error| error.raw_os_error() != Some(libc::ESRCH));
    refused.next().map_or(Ok(()), |error| Err(no_ipvs(error)))
}

pub fn remove_device(index: u32) -> Result<(), DataplaneError> {
    Route::open()
        .and_then(|route| route.remove(index))
        .map_err(|source| DataplaneError::Kernel { what: format!("device {DEVICE}"), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whose_a_server_is_shows_by_where_it_is() {
        let set = |addrs: &[&str]| addrs.iter().map(|addr| addr.parse().unwrap()).collect::<BTreeSet<IpAddr>>();
        let held = set(&["10.96.0.1", "fd00:96::1"]);
        let own = set(&["192.168.1.10", "fd00::10", "127.0.0.1"]);
        let ports = NodePorts::from([
            (Family::V4, Protocol::Tcp, 30_080),
            (Family::V6, Protocol::Tcp, 30_080),
            (Family::V4, Protocol::Udp, 30_053),
        ]);
        let rows = [
            ("10.96.0.1", 80, Protocol::Tcp, true),
            ("10.96.0.1", 443, Protocol::Sctp, true),
            ("fd00:96::1", 53, Protocol::Udp, true),
            ("192.168.1.10", 30_080, Protocol::Tcp, true),
            ("fd00::10", 30_080, Protocol::Tcp, true),
            ("192.168.1.10", 30_053, Protocol::Udp, true),
            // Somebody's: another port, another protocol, another address.
            ("192.168.1.10", 80, Protocol::Tcp, false),
            ("192.168.1.10", 30_080, Protocol::Udp, false),
            ("fd00::10", 30_053, Protocol::Udp, false),
            ("192.168.1.11", 30_080, Protocol::Tcp, false),
            ("10.96.0.2", 80, Protocol::Tcp, false),
        ];
        for (addr, port, protocol, wanted) in rows {
            let at = Virtual::At { addr: addr.parse().unwrap(), port, protocol };
            assert_eq!(is_its(at, &held, &own, &ports), wanted, "{at:?}");
        }
        assert!(!is_its(Virtual::Marked { family: Family::V4, mark: 7 }, &held, &own, &ports));
    }
}
