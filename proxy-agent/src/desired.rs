//! What should be in force: frontends with policies and ordered backends. No ids, no slots, no chain names: those belong to
//! each dataplane's renderer.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::model::{Family, Port, Protocol, ServiceKey, ServicePortName};

/// What traffic is addressed to.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Frontend {
    pub addr: IpAddr,
    pub port: Port,
    pub protocol: Protocol,
}

impl fmt::Display for Frontend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", SocketAddr::new(self.addr, self.port.get()), self.protocol)
    }
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize)]
pub enum FrontendKind {
    #[serde(rename = "ClusterIP")]
    ClusterIp,
    NodePort,
    #[serde(rename = "ExternalIP")]
    ExternalIp,
    LoadBalancer,
}

impl fmt::Display for FrontendKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ClusterIp => "ClusterIP",
            Self::NodePort => "NodePort",
            Self::ExternalIp => "ExternalIP",
            Self::LoadBalancer => "LoadBalancer",
        })
    }
}

/// One endpoint as the datapath sees it. Ordered by address, then port: the order inside every set.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Backend {
    pub addr: IpAddr,
    pub port: Port,
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", SocketAddr::new(self.addr, self.port.get()))
    }
}

/// Sorted, without duplicates; shared between frontends of one ServicePort.
pub type BackendSet = Arc<[Backend]>;

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Action {
    PickAll,
    PickLocal,
    Drop,
    Reject,
    /// Not for this origin: its traffic goes on as if there were no frontend.
    Pass,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct Verdict {
    pub action: Action,
    pub masquerade: bool,
}

/// A verdict for each origin of a packet.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct Verdicts {
    pub pod: Verdict,
    pub node: Verdict,
    pub external: Verdict,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Algorithm {
    #[default]
    Random,
    RoundRobin,
    /// By a hash of the flow, the same on every node.
    Maglev,
    /// As `--ipvs-scheduler` says: where IPVS serves, and nobody asks for anything else.
    Scheduler,
}

impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Random => "random",
            Self::RoundRobin => "round-robin",
            Self::Maglev => "maglev",
            Self::Scheduler => "scheduler",
        })
    }
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FrontendSpec {
    pub service: ServicePortName,
    pub kind: FrontendKind,
    pub all: BackendSet,
    pub local: BackendSet,
    pub verdicts: Verdicts,
    pub algorithm: Algorithm,
    /// Session affinity time-out in seconds.
    pub affinity_secs: Option<u32>,
    /// Of this frontend's family: whose packets count, and everybody else's are dropped (contract A91). `None`: everybody's.
    /// What the node itself sends is decided by its verdict already.
    pub source_ranges: Option<Arc<[IpNet]>>,
    /// Sockets of pods are left alone at connect time; their packets are translated.
    pub pods_per_packet: bool,
    /// Backends that flows may go on with, whichever of them are chosen now; flows that lead elsewhere are ended. Of TCP, addresses
    /// alone count. `None`: whatever becomes of the endpoints, no flow is (contract A104).
    pub alive: Option<BackendSet>,
}

/// Role of a device.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceRole {
    Pod,
    Outward,
    Overlay,
}

/// A device the per-packet programs belong on.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Device {
    pub name: String,
    pub role: DeviceRole,
    /// Packets carry an Ethernet header; else they start with the IP header (tun, WireGuard …).
    pub ethernet: bool,
    /// What a masqueraded packet leaving here gets as its source.
    pub source4: Option<std::net::Ipv4Addr>,
    pub source6: Option<std::net::Ipv6Addr>,
    /// Of a pod's link: the id by which this network namespace knows the pod's.
    pub netns: Option<u32>,
    /// Of a bridge's port: the bridge's index. Routes lead to it and not to the port.
    pub bridge: Option<u32>,
    /// Its packets may have met the programs of another device already: a bridge whose pods' links are hooked.
    pub behind: bool,
    /// Its own Ethernet address.
    pub mac: Option<[u8; 6]>,
    /// A virtual link whose other end `XDP_TX` does not wake (veth, unless that end has a program of its own).
    pub veth: bool,
    /// Why XDP would do nothing or harm on it, whatever its driver can.
    pub without_xdp: Option<&'static str>,
    /// What comes in there counts as coming from pods of this node, where that is told by devices (contract A72).
    pub local: bool,
}

impl Device {
    /// A link with an Ethernet header of which nothing else is known.
    pub fn new(name: &str, role: DeviceRole) -> Self {
        Self {
            name: name.into(),
            role,
            ethernet: true,
            source4: None,
            source6: None,
            netns: None,
            bridge: None,
            behind: false,
            mac: None,
            veth: false,
            without_xdp: None,
            local: role == DeviceRole::Pod,
        }
    }
}

/// By interface index.
pub type Devices = BTreeMap<u32, Device>;

/// All of it: the outcome of `plan` over every Service.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct DesiredState {
    pub frontends: BTreeMap<Frontend, Arc<FrontendSpec>>,
    /// Addresses that are ours whatever the port: what no frontend claims there is refused (contract A48).
    pub guards: BTreeSet<IpAddr>,
    /// Addresses that tell a pod of this node, where that is not told by devices (contract A72).
    pub local_cidrs: BTreeSet<IpNet>,
    /// Pods of this node whose sockets are left alone at connect time; `None`: not known, so whoever is stays so.
    pub left_pods: Option<LeftPods>,
}

/// By uid: `namespace/name`, for what is said of it.
pub type LeftPods = BTreeMap<Arc<str>, Arc<str>>;

/// A port of the node at which a load balancer asks how many endpoints of one Service are here (contract A111).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HealthCheck {
    pub uid: Arc<str>,
    pub port: Port,
    pub families: BTreeMap<Family, FamilyCheck>,
}

/// Each family is asked for itself: endpoints of the one say nothing of the other.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FamilyCheck {
    /// Addresses to answer at; the unspecified one is all of them.
    pub listen: Vec<IpAddr>,
    /// Ready endpoints on this node.
    pub local: usize,
}

pub type HealthChecks = BTreeMap<ServiceKey, HealthCheck>;

/// What is to be open, and for whom.
pub type HealthDoors = BTreeSet<(ServiceKey, SocketAddr)>;

impl HealthCheck {
    /// Where it is to be asked. Counts have no part in it.
    pub fn doors(&self) -> impl Iterator<Item = SocketAddr> {
        let listen = self.families.values().flat_map(|family| &family.listen);
        listen.map(|addr| SocketAddr::new(*addr, self.port.get()))
    }
}

pub fn health_doors(checks: &HealthChecks) -> HealthDoors {
    let doors = checks.iter().flat_map(|(service, check)| check.doors().map(|door| (service.clone(), door)));
    doors.collect()
}

/// What changes between two states. Everything is idempotent: setting what stands, removing what is absent.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Changes {
    pub set: BTreeMap<Frontend, Arc<FrontendSpec>>,
    pub remove: BTreeSet<Frontend>,
    pub guard: BTreeSet<IpAddr>,
    pub unguard: BTreeSet<IpAddr>,
    /// All of them, if they are other ones.
    pub local_cidrs: Option<BTreeSet<IpNet>>,
    /// All of them, if they are other ones.
    pub left_pods: Option<LeftPods>,
}

impl Changes {
    pub fn is_empty(&self) -> bool {
        let Self { set, remove, guard, unguard, local_cidrs, left_pods } = self;
        let moves_frontends = !set.is_empty() || !remove.is_empty() || !guard.is_empty() || !unguard.is_empty();
        !moves_frontends && local_cidrs.is_none() && left_pods.is_none()
    }
}

impl DesiredState {
    /// What turns `self` into `to`.
    pub fn diff(&self, to: &Self) -> Changes {
        let Self { frontends, guards, local_cidrs, left_pods } = self;
        Changes {
            set: to
                .frontends
                .iter()
                .filter(|(frontend, spec)| frontends.get(frontend) != Some(spec))
                .map(|(frontend, spec)| (*frontend, Arc::clone(spec)))
                .collect(),
            remove: frontends.keys().filter(|f| !to.frontends.contains_key(f)).copied().collect(),
            guard: to.guards.difference(guards).copied().collect(),
            unguard: guards.difference(&to.guards).copied().collect(),
            local_cidrs: (*local_cidrs != to.local_cidrs).then(|| to.local_cidrs.clone()),
            left_pods: to.left_pods.clone().filter(|_| *left_pods != to.left_pods),
        }
    }

    /// Carries `changes` out on this value.
    pub fn apply(&mut self, changes: &Changes) {
        let Changes { set, remove, guard, unguard, local_cidrs, left_pods } = changes;
        if let Some(left_pods) = left_pods {
            self.left_pods = Some(left_pods.clone());
        }
        if let Some(local_cidrs) = local_cidrs {
            self.local_cidrs.clone_from(local_cidrs);
        }
        for frontend in remove {
            self.frontends.remove(frontend);
        }
        for (frontend, spec) in set {
            self.frontends.insert(*frontend, Arc::clone(spec));
        }
        for addr in unguard {
            self.guards.remove(addr);
        }
        self.guards.extend(guard);
    }
}
