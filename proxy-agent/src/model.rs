//! What the agent knows of the cluster: slim own types, not API objects.
//!
//! A [`Snapshot`] is immutable once handed out (its parts are shared by `Arc`); sources build it, `plan` reads it. Nothing
//! here knows how an object was obtained, and nothing here decides anything.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::IpAddr,
    num::NonZeroU16,
    sync::Arc,
};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

pub mod address;
pub mod index;

/// Namespace and name of a Service.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ServiceKey {
    pub namespace: Arc<str>,
    pub name: Arc<str>,
}

impl ServiceKey {
    pub fn new(namespace: &str, name: &str) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

impl fmt::Display for ServiceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// `namespace/name:port`, the unit of programming (contract A7). The port name is empty for an unnamed port.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ServicePortName {
    pub service: ServiceKey,
    pub port: Arc<str>,
    pub protocol: Protocol,
}

impl fmt::Display for ServicePortName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.port.is_empty() { write!(f, "{}", self.service) } else { write!(f, "{}:{}", self.service, self.port) }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Protocol {
    Tcp,
    Udp,
    Sctp,
}

impl Protocol {
    /// The IP protocol number.
    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp => proxy_common::proto::TCP,
            Self::Udp => proxy_common::proto::UDP,
            Self::Sctp => proxy_common::proto::SCTP,
        }
    }

    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            proxy_common::proto::TCP => Some(Self::Tcp),
            proxy_common::proto::UDP => Some(Self::Udp),
            proxy_common::proto::SCTP => Some(Self::Sctp),
            _ => None,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        })
    }
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Family {
    V4,
    V6,
}

impl Family {
    pub const BOTH: [Self; 2] = [Self::V4, Self::V6];

    pub const fn of(ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }
}

pub type Port = NonZeroU16;

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum ServiceType {
    #[default]
    ClusterIp,
    NodePort,
    LoadBalancer,
    ExternalName,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum TrafficPolicy {
    #[default]
    Cluster,
    Local,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ServicePort {
    /// Empty where the Service does not name it.
    pub name: Arc<str>,
    pub protocol: Protocol,
    pub port: Port,
    pub node_port: Option<Port>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Service {
    pub key: ServiceKey,
    pub uid: Arc<str>,
    /// Seconds since the epoch; 0 where the object does not say. Older Services keep an address that two claim; ties go
    /// to the smaller uid, then to the smaller key.
    pub created: i64,
    pub kind: ServiceType,
    /// At most one for each family, invalid ones left out (see `problems`); empty for headless and ExternalName.
    pub cluster_ips: Vec<IpAddr>,
    pub ports: Vec<ServicePort>,
    pub internal_policy: TrafficPolicy,
    pub external_policy: TrafficPolicy,
    pub external_ips: Vec<IpAddr>,
    /// Ingress addresses with ipMode `VIP` or none (contract A11).
    pub load_balancer_ips: Vec<IpAddr>,
    pub source_ranges: Vec<IpNet>,
    /// Session affinity time-out in seconds; `None`: no affinity.
    pub affinity_secs: Option<u32>,
    pub health_check_node_port: Option<Port>,
    /// Value of the algorithm annotation, if the Service carries it; `plan` says so if it means nothing.
    pub algorithm: Option<Arc<str>>,
    /// Value of the annotation that says whose sockets are translated at connect time, likewise.
    pub socket_lb: Option<Arc<str>>,
    /// Value of the annotation that asks for resets of TCP connections to deleted endpoints, likewise.
    pub reset_deleted: Option<Arc<str>>,
    /// What was wrong with the object and left out: each a sentence naming field and value.
    pub problems: Vec<String>,
}

impl Service {
    /// Whether what is planned for it depends on the node's own addresses.
    pub fn asks_for_addresses(&self) -> bool {
        let has_node_port = self.ports.iter().any(|port| port.node_port.is_some());
        has_node_port
            || self.health_check_node_port.is_some()
            || !self.external_ips.is_empty()
            || !self.load_balancer_ips.is_empty()
    }
}

#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct EndpointHints {
    pub zones: BTreeSet<Arc<str>>,
    pub nodes: BTreeSet<Arc<str>>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Endpoint {
    /// `addresses[0]` (contract A21).
    pub address: IpAddr,
    /// Conditions with their defaults applied (contract A24).
    pub ready: bool,
    pub serving: bool,
    pub terminating: bool,
    pub node: Option<Arc<str>>,
    /// Most endpoints carry none.
    pub hints: Option<Box<EndpointHints>>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct EndpointPort {
    pub name: Arc<str>,
    pub protocol: Protocol,
    pub port: Port,
}

/// One EndpointSlice of addressType IPv4 or IPv6 that names its Service (contract A17, A18).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct EndpointSlice {
    pub namespace: Arc<str>,
    pub name: Arc<str>,
    pub service: ServiceKey,
    pub family: Family,
    pub ports: Vec<EndpointPort>,
    pub endpoints: Vec<Endpoint>,
    /// `endpoints.kubernetes.io/last-change-trigger-time`, nanoseconds since the epoch (contract A28).
    pub trigger_time: Option<i64>,
    /// What was wrong with the object and left out.
    pub problems: Vec<String>,
}

/// What planning needs to know of the own node.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct NodeFacts {
    pub name: Arc<str>,
    /// Label `topology.kubernetes.io/zone`.
    pub zone: Option<Arc<str>>,
    /// InternalIP addresses of the Node object.
    pub internal_ips: Vec<IpAddr>,
    pub pod_cidrs: Vec<IpNet>,
    /// Being deleted, or tainted `ToBeDeletedByClusterAutoscaler` (contract A117): load balancers should leave it alone.
    pub leaving: bool,
}

/// Namespace and name of a pod.
pub type PodKey = (Arc<str>, Arc<str>);

/// A pod of this node, as far as its sockets are concerned.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Pod {
    pub key: PodKey,
    /// By which the kubelet knows it, and names its cgroup.
    pub uid: Arc<str>,
    pub host_network: bool,
    /// Value of the annotation that says whether its sockets are translated at connect time, if it carries one.
    pub socket_lb: Option<Arc<str>>,
}

/// The world at one instant.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Snapshot {
    pub services: BTreeMap<ServiceKey, Arc<Service>>,
    /// Slices of each Service, by slice name.
    pub slices: BTreeMap<ServiceKey, BTreeMap<Arc<str>, Arc<EndpointSlice>>>,
    pub node: NodeFacts,
    /// What the node itself answers for: every address of its devices, of any scope.
    pub addresses: BTreeSet<IpAddr>,
    /// Of this node; none where nobody asked for them.
    pub pods: BTreeMap<PodKey, Arc<Pod>>,
    /// Namespaces with the annotation that a pod may have, too, and its value.
    pub namespaces: BTreeMap<Arc<str>, Arc<str>>,
    /// Complete lists of both have come in. They may come late, or never: Services do not wait for them.
    pub pods_known: bool,
}

/// One observed change, as sources report it. Applying it tells which Services it touches.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Event {
    Service(Arc<Service>),
    ServiceGone(ServiceKey),
    Slice(Arc<EndpointSlice>),
    SliceGone {
        namespace: Arc<str>,
        name: Arc<str>,
    },
    Node(NodeFacts),
    /// The node's own addresses, all of them.
    Addresses(BTreeSet<IpAddr>),
    /// A complete list replaces all that was known of one kind (first list, relist after 410 …).
    Services(Vec<Arc<Service>>),
    Slices(Vec<Arc<EndpointSlice>>),
    /// Services, and EndpointSlices by namespace and name with the Service whose they say they are, that the next complete list
    /// leaves out because they cannot be read although they are there: what is known of them stands.
    UnreadableServices(BTreeSet<ServiceKey>),
    UnreadableSlices(BTreeMap<(Arc<str>, Arc<str>), Option<ServiceKey>>),
    Pod(Arc<Pod>),
    PodGone(PodKey),
    /// A complete list; what cannot be read although it is there stands as it was known.
    Pods {
        list: Vec<Arc<Pod>>,
        unreadable: BTreeSet<PodKey>,
    },
    /// A namespace, and the value of its annotation.
    Namespace(Arc<str>, Option<Arc<str>>),
    /// A complete list of those that carry it; what cannot be read stands.
    Namespaces {
        list: BTreeMap<Arc<str>, Arc<str>>,
        unreadable: BTreeSet<Arc<str>>,
    },
    /// What is wrong with a source itself, or with objects that it does not hand on: place (a file and line, an object) → what was
    /// left out. Replaces what the same teller said before. It touches no Service; it is for the status table.
    Problems(Teller, BTreeMap<String, Vec<String>>),
}

/// Who tells of problems.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Teller {
    /// Of Services, EndpointSlices and the own Node.
    Source,
    /// Who watches the node's devices and addresses.
    Devices,
}

/// What users of the cluster should hear of this node, where there is an API server to tell it: an Event.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Notice {
    pub about: About,
    pub kind: NoticeKind,
    pub reason: &'static str,
    /// What was being done.
    pub action: &'static str,
    pub note: String,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum About {
    /// The own one.
    Node,
    Service {
        key: ServiceKey,
        /// Empty where it is not known.
        uid: Arc<str>,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum NoticeKind {
    Normal,
    Warning,
}

/// Where the agent gets its objects from, and whether it still does.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum SourceState {
    /// Waiting for the first complete list of these kinds; each says why, where something is in the way.
    Listing {
        missing: Vec<String>,
    },
    Synced,
    /// Was synced, cannot reach its source now; the last state goes on serving.
    Stale {
        reason: String,
    },
}
