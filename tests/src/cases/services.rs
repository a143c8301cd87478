//! The Services that the cases ask.

use std::net::SocketAddr;

use serde_json::{Value, json};

use crate::{
    pod::socket::Transport,
    world::{
        Family, Place, World,
        objects::{self, Slice},
        vip4, vip6,
    },
};

/// Every one is dual-stack and has TCP 80, UDP 53 and SCTP 38412, unless it says otherwise.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Svc {
    /// `b1`, `b2`
    Web = 1,
    /// `b1`, `b2`; internal policy Local
    Local,
    /// `b2`; internal policy Local: none on node1
    RemoteOnly,
    /// No endpoints at all
    Empty,
    /// `b1` ready, `c1` unready, `c2` terminating
    OneReady,
    /// `c1` terminating and still serving, `c2` neither ready nor serving
    Terminating,
    /// `b1` hinted for zone-a (node1's), `b2` for zone-b
    Zones,
    /// `b1` hinted for node1, `b2` for node2
    Nodes,
    /// `a1`, who asks it
    Hairpin,
    /// `node1`, `node2`: host-network endpoints
    Host,
    /// `b1`; TCP 80 leads to 8080, TCP 81 to 9090, nothing else
    TwoPorts,
    /// `c2`
    One,
    /// `c2` as well
    Other,
    /// `b1`, not ready
    Unready,
    /// `b2`
    Remote,
    /// `c1` terminating and still serving, `b2` ready; internal policy Local
    LocalTerminating,
    /// No endpoints at all; internal policy Local
    EmptyLocal,
    /// `b2`, at a port where nobody listens
    Deaf,
}

impl Svc {
    const ALL: [Self; 18] = [
        Self::Web,
        Self::Local,
        Self::RemoteOnly,
        Self::Empty,
        Self::OneReady,
        Self::Terminating,
        Self::Zones,
        Self::Nodes,
        Self::Hairpin,
        Self::Host,
        Self::TwoPorts,
        Self::One,
        Self::Other,
        Self::Unready,
        Self::Remote,
        Self::LocalTerminating,
        Self::EmptyLocal,
        Self::Deaf,
    ];

    /// The last part of its addresses.
    pub fn number(self) -> u8 {
        self as u8
    }

    /// Where it answers this transport.
    pub fn at(self, family: Family, transport: Transport) -> SocketAddr {
        let port = match transport {
            Transport::Tcp | Transport::Ping => 80,
            Transport::Udp | Transport::UdpUnconnected => 53,
            Transport::Sctp => 38_412,
        };
        super::at(family, self, port)
    }

    fn name(self) -> String {
        format!("{self:?}").to_lowercase()
    }

    fn endpoints(self, world: &World, slice: Slice) -> Slice {
        let (b1, b2, c1, c2) = (world.pod("b1"), world.pod("b2"), world.pod("c1"), world.pod("c2"));
        let ready = || json!({"ready": true});
        let unready = || json!({"ready": false, "serving": false, "terminating": false});
        let terminating = || json!({"ready": false, "serving": true, "terminating": true});
        let zone = |zone: &str| json!({"forZones": [{"name": zone}]});
        let node = |place: &Place| json!({"forNodes": [{"name": format!("node{}", place.node.unwrap_or(0))}]});
        match self {
            Self::Web | Self::Local => slice.endpoint(b1).endpoint(b2),
            Self::RemoteOnly | Self::Remote | Self::Deaf => slice.endpoint(b2),
            Self::Empty | Self::EmptyLocal => slice,
            Self::OneReady => slice.endpoint(b1).endpoint_with(c1, unready(), Value::Null).endpoint_with(
                c2,
                terminating(),
                Value::Null,
            ),
            Self::Terminating => {
                slice.endpoint_with(c1, terminating(), Value::Null).endpoint_with(c2, unready(), Value::Null)
            }
            Self::LocalTerminating => slice.endpoint_with(c1, terminating(), Value::Null).endpoint(b2),
            Self::Zones => slice.endpoint_with(b1, ready(), zone("zone-a")).endpoint_with(b2, ready(), zone("zone-b")),
            Self::Nodes => slice.endpoint_with(b1, ready(), node(b1)).endpoint_with(b2, ready(), node(b2)),
            Self::Hairpin => slice.endpoint(world.pod("a1")),
            Self::Host => slice.endpoint(&world.node(1).place).endpoint(&world.node(2).place),
            Self::TwoPorts => slice.endpoint(b1),
            Self::One | Self::Other => slice.endpoint(c2),
            Self::Unready => slice.endpoint_with(b1, unready(), Value::Null),
        }
    }

    fn objects(self, world: &World) -> Vec<Value> {
        let name = self.name();
        let mut service = objects::service(&name).cluster_ips(&[vip4(self.number()), vip6(self.number())]);
        if matches!(self, Self::Local | Self::RemoteOnly | Self::LocalTerminating | Self::EmptyLocal) {
            service = service.local();
        }
        let (service, ports) = if self == Self::TwoPorts {
            (service.port("http", "TCP", 80).port("alt", "TCP", 81), vec![("http", "TCP", 8080), ("alt", "TCP", 9090)])
        } else {
            let port = if self == Self::Deaf { 9 } else { 8080 };
            (
                service.port("web", "TCP", 80).port("dns", "UDP", 53).port("ngap", "SCTP", 38_412),
                vec![("web", "TCP", port), ("dns", "UDP", port), ("ngap", "SCTP", port)],
            )
        };
        let slices = Family::BOTH.map(|family| {
            let slice = objects::slice(&name, family);
            let slice = ports.iter().fold(slice, |slice, (name, protocol, port)| slice.port(name, protocol, *port));
            self.endpoints(world, slice).json()
        });
        [service.json()].into_iter().chain(slices).collect()
    }
}

/// Nodes (node1 in zone-a, node2 in zone-b), Services and slices for a world of two nodes.
pub fn objects(world: &World) -> Vec<Value> {
    objects::nodes(world).into_iter().chain(Svc::ALL.iter().flat_map(|svc| svc.objects(world))).collect()
}
