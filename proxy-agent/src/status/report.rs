//! The status as JSON: what `GET /status` answers and what the CLI reads. Stable; documented in docs/cli.md.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    time::SystemTime,
};

use k8s_openapi::jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{ChangeCount, FrontendState, FrontendStatus, SourceState, Status};
use crate::{
    desired::{self, DeviceRole, Frontend},
    model::{Family, Protocol, ServiceKey},
};

/// Version of every JSON document this program writes.
pub const API_VERSION: &str = "proxy-agent/v1alpha1";

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    pub api_version: String,
    pub kind: String,
    pub version: String,
    pub pid: u32,
    pub node: String,
    pub mode: String,
    /// Why this mode: `asked for`, or what the choice of `auto` met.
    #[serde(default)]
    pub mode_reason: String,
    /// Whose sockets are translated at connect time: `all`, `node` or `off`; absent where only packets are.
    pub socket_lb: Option<String>,
    /// Where the pins are; absent where what is in force is not pinned.
    pub bpffs: Option<PathBuf>,
    pub started: String,
    pub uptime_seconds: u64,
    /// The first full state is in force.
    pub ready: bool,
    /// No change waits longer than it may.
    pub healthy: bool,
    pub source: Source,
    pub sync: Sync,
    pub services: usize,
    pub endpoints: usize,
    pub frontends: FrontendCount,
    /// Frontends that are not in force, and why.
    pub unprogrammed: Vec<Unprogrammed>,
    /// Frontends that are in force with less than their Service asks for, and what they lack.
    #[serde(default)]
    pub limited: Vec<Unprogrammed>,
    /// Addresses whose unused ports are not refused, and why.
    pub failed_guards: BTreeMap<IpAddr, String>,
    /// Ports at which load balancers ask after a Service.
    #[serde(default)]
    pub health_checks: Vec<HealthCheck>,
    /// Object or place → what was left out of it.
    pub problems: BTreeMap<String, Vec<String>>,
    pub devices: Vec<Device>,
    pub failed_devices: BTreeMap<String, String>,
    /// Devices that XDP was asked for and that are served without, and why.
    #[serde(default)]
    pub without_xdp: BTreeMap<String, String>,
    pub hooks: Vec<Hook>,
    /// Hooks that somebody took off and that could not be put back.
    #[serde(default)]
    pub lost_hooks: Vec<Hook>,
    /// How often hooks were found to have been taken off.
    #[serde(default)]
    pub hooks_lost: u64,
    /// Where others' programs run before ours, by their ids.
    #[serde(default)]
    pub ahead: Vec<Ahead>,
    /// What agents in other modes left in force and is on its way out.
    #[serde(default)]
    pub retiring: Vec<Retiring>,
    pub maps: Vec<MapFill>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "camelCase")]
pub enum Source {
    Listing { missing: Vec<String> },
    Synced,
    Stale { reason: String },
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Sync {
    pub count: u64,
    pub last: Option<String>,
    pub last_queued: Option<String>,
    pub pending_services: u64,
    pub pending_endpoints: u64,
    pub service_changes: u64,
    pub endpoint_changes: u64,
    pub drift_repaired: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct FrontendCount {
    pub programmed: usize,
    pub pending: usize,
    pub degraded: usize,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Unprogrammed {
    /// `namespace/name:port`.
    pub service: String,
    #[serde(rename = "type")]
    pub kind: String,
    pub address: IpAddr,
    pub port: u16,
    pub protocol: Protocol,
    pub state: String,
    pub reason: Option<String>,
    pub since: String,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HealthCheck {
    /// `namespace/name`.
    pub service: String,
    pub port: u16,
    /// Ready endpoints on this node by family, `IPv4` and `IPv6`.
    pub local_endpoints: BTreeMap<String, usize>,
    pub listening: Vec<IpAddr>,
    /// Where it cannot be asked, and why.
    pub failed: BTreeMap<IpAddr, String>,
}

/// By Service and address: why it could not be opened, if it could not.
pub type CheckPorts = BTreeMap<(ServiceKey, SocketAddr), Option<String>>;

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Device {
    pub index: u32,
    pub name: String,
    pub role: String,
    /// What local detection makes of what comes in there, where it goes by devices: `pod` or `outside`.
    #[serde(default)]
    pub counts_as: String,
    pub source4: Option<Ipv4Addr>,
    pub source6: Option<Ipv6Addr>,
}

#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct Hook {
    pub kind: String,
    pub target: String,
    pub program: String,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Ahead {
    pub kind: String,
    pub target: String,
    pub programs: Vec<u32>,
}

impl From<&crate::dataplane::Ahead> for Ahead {
    fn from(of: &crate::dataplane::Ahead) -> Self {
        let crate::dataplane::Ahead { kind, target, programs } = of.clone();
        Self { kind, target, programs }
    }
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Retiring {
    pub mode: String,
    /// It takes no new flow.
    pub retired: bool,
    /// Flows that still go by it; absent before it is retired.
    pub flows: Option<u64>,
    /// Why it stays as it is.
    pub trouble: Option<String>,
}

impl From<&crate::dataplane::Retiring> for Retiring {
    fn from(of: &crate::dataplane::Retiring) -> Self {
        let crate::dataplane::Retiring { mode, retired, flows, trouble } = of;
        Self { mode: (*mode).to_owned(), retired: *retired, flows: *flows, trouble: trouble.clone() }
    }
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MapFill {
    pub map: String,
    pub entries: u64,
    pub capacity: u64,
    /// The option that raises the capacity.
    pub option: String,
}

impl Report {
    pub const KIND: &'static str = "NodeStatus";

    pub fn new(
        status: &Status,
        healthy: bool,
        socket_lb: Option<&str>,
        bpffs: Option<&Path>,
        ports: &CheckPorts,
    ) -> Self {
        let Status {
            mode,
            mode_reason,
            node,
            started,
            source,
            ready,
            node_eligible: _,
            node_facts: _,
            last_sync,
            last_queued,
            pending_since: _,
            service_changes,
            endpoint_changes,
            timings: _,
            syncs,
            services,
            endpoints,
            frontends,
            degraded: _,
            unserved: _,
            failed_guards,
            health_checks,
            health_doors: _,
            problems,
            devices,
            failed_devices,
            without_xdp,
            hooks,
            lost_hooks,
            hooks_lost,
            ahead,
            nothing_since: _,
            retiring,
            fill,
            drift_repaired,
        } = status;
        let ChangeCount { total: service_total, pending: pending_services } = *service_changes;
        let ChangeCount { total: endpoint_total, pending: pending_endpoints } = *endpoint_changes;
        Self {
            api_version: API_VERSION.to_owned(),
            kind: Self::KIND.to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            node: node.to_string(),
            mode: (*mode).to_owned(),
            mode_reason: mode_reason.to_string(),
            socket_lb: socket_lb.map(str::to_owned),
            bpffs: bpffs.map(Path::to_owned),
            started: rfc3339(*started),
            uptime_seconds: started.elapsed().map_or(0, |elapsed| elapsed.as_secs()),
            ready: *ready,
            healthy,
            source: Source::from(source),
            sync: Sync {
                count: *syncs,
                last: last_sync.map(rfc3339),
                last_queued: last_queued.map(rfc3339),
                pending_services,
                pending_endpoints,
                service_changes: service_total,
                endpoint_changes: endpoint_total,
                drift_repaired: *drift_repaired,
            },
            services: *services,
            endpoints: *endpoints,
            frontends: FrontendCount::of(frontends.values()),
            unprogrammed: frontends
                .iter()
                .filter_map(|(frontend, status)| Unprogrammed::of(frontend, status))
                .collect(),
            limited: frontends
                .iter()
                .filter_map(|(frontend, status)| Unprogrammed::limited(frontend, status))
                .collect(),
            failed_guards: failed_guards.iter().map(|(addr, failure)| (*addr, failure.to_string())).collect(),
            health_checks: health_checks
                .iter()
                .map(|(service, check)| HealthCheck::of(service, check, ports))
                .collect(),
            problems: all_problems(problems, ports),
            devices: devices.iter().map(|(index, device)| Device::of(*index, device)).collect(),
            failed_devices: failed_devices.iter().map(|(name, failure)| (name.clone(), failure.to_string())).collect(),
            without_xdp: without_xdp.iter().map(|(name, why)| (name.clone(), why.to_string())).collect(),
            hooks: hooks.iter().map(Hook::from).collect(),
            lost_hooks: lost_hooks.iter().map(Hook::from).collect(),
            hooks_lost: *hooks_lost,
            ahead: ahead.iter().map(Ahead::from).collect(),
            retiring: retiring.iter().map(Retiring::from).collect(),
            maps: fill.iter().map(MapFill::from).collect(),
        }
    }
}

impl From<&SourceState> for Source {
    fn from(state: &SourceState) -> Self {
        match state {
            SourceState::Listing { missing } => Self::Listing { missing: missing.clone() },
            SourceState::Synced => Self::Synced,
            SourceState::Stale { reason } => Self::Stale { reason: reason.clone() },
        }
    }
}

impl FrontendCount {
    pub fn of<'a>(all: impl Iterator<Item = &'a FrontendStatus>) -> Self {
        all.fold(Self::default(), |mut count, frontend| {
            match frontend.state {
                FrontendState::Programmed => count.programmed += 1,
                FrontendState::Pending => count.pending += 1,
                FrontendState::Degraded(_) => count.degraded += 1,
            }
            count
        })
    }
}

impl Unprogrammed {
    fn of(frontend: &Frontend, status: &FrontendStatus) -> Option<Self> {
        let FrontendStatus { state, limits: _, .. } = status;
        match state {
            FrontendState::Programmed => None,
            FrontendState::Pending => Some(Self::row(frontend, status, "Pending", None)),
            FrontendState::Degraded(failure) => {
                Some(Self::row(frontend, status, "Degraded", Some(failure.to_string())))
            }
        }
    }

    fn limited(frontend: &Frontend, status: &FrontendStatus) -> Option<Self> {
        let FrontendStatus { state, limits, .. } = status;
        let limits = limits.clone().filter(|_| *state == FrontendState::Programmed)?;
        Some(Self::row(frontend, status, "Programmed", Some(limits)))
    }

    fn row(frontend: &Frontend, status: &FrontendStatus, state: &str, reason: Option<String>) -> Self {
        let FrontendStatus { spec, since, .. } = status;
        Self {
            service: spec.service.to_string(),
            kind: spec.kind.to_string(),
            address: frontend.addr,
            port: frontend.port.get(),
            protocol: frontend.protocol,
            state: state.to_owned(),
            reason,
            since: rfc3339(*since),
        }
    }
}

/// A frontend that is in force, as `GET /frontends` answers it: for who cannot read it out of pinned maps.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct InForce {
    /// `namespace/name:port`.
    pub service: String,
    #[serde(rename = "type")]
    pub kind: String,
    pub address: IpAddr,
    pub port: u16,
    pub protocol: Protocol,
    pub backends: Vec<SocketAddr>,
    pub local_backends: Vec<SocketAddr>,
    pub verdicts: desired::Verdicts,
    pub algorithm: desired::Algorithm,
    pub affinity_seconds: Option<u32>,
}

impl InForce {
    pub fn all(status: &Status) -> Vec<Self> {
        let programmed = status.frontends.iter().filter(|(_, status)| status.state == FrontendState::Programmed);
        programmed.map(|(frontend, status)| Self::of(frontend, status)).collect()
    }

    fn of(frontend: &Frontend, status: &FrontendStatus) -> Self {
        let FrontendStatus { spec, algorithm, .. } = status;
        let desired::FrontendSpec { service, kind, all, local, verdicts, affinity_secs, .. } = &**spec;
        let backends = |set: &desired::BackendSet| {
            set.iter().map(|desired::Backend { addr, port }| SocketAddr::new(*addr, port.get())).collect()
        };
        Self {
            service: service.to_string(),
            kind: kind.to_string(),
            address: frontend.addr,
            port: frontend.port.get(),
            protocol: frontend.protocol,
            backends: backends(all),
            local_backends: backends(local),
            verdicts: *verdicts,
            algorithm: *algorithm,
            affinity_seconds: *affinity_secs,
        }
    }
}

impl HealthCheck {
    fn of(service: &ServiceKey, check: &desired::HealthCheck, ports: &CheckPorts) -> Self {
        let desired::HealthCheck { uid: _, port, families } = check;
        let local = |(family, check): (&Family, &desired::FamilyCheck)| {
            let family = match family {
                Family::V4 => "IPv4",
                Family::V6 => "IPv6",
            };
            (family.to_owned(), check.local)
        };
        let mut shown = Self {
            service: service.to_string(),
            port: port.get(),
            local_endpoints: families.iter().map(local).collect(),
            listening: Vec::new(),
            failed: BTreeMap::new(),
        };
        for ((_, addr), failure) in ports.iter().filter(|((of, _), _)| of == service) {
            match failure {
                None => shown.listening.push(addr.ip()),
                Some(failure) => drop(shown.failed.insert(addr.ip(), failure.clone())),
            }
        }
        shown
    }
}

/// What was left out of objects, and what could not be done for them.
fn all_problems(problems: &BTreeMap<String, Vec<String>>, ports: &CheckPorts) -> BTreeMap<String, Vec<String>> {
    let mut problems = problems.clone();
    for ((service, _), failure) in ports {
        if let Some(failure) = failure {
            problems.entry(format!("Service {service}")).or_default().push(failure.clone());
        }
    }
    problems
}

impl Device {
    fn of(index: u32, device: &crate::desired::Device) -> Self {
        let crate::desired::Device {
            name,
            role,
            ethernet: _,
            source4,
            source6,
            netns: _,
            bridge: _,
            behind: _,
            mac: _,
            veth: _,
            without_xdp: _,
            local,
        } = device;
        let told = if *local { "pod" } else { "outside" };
        let role = match role {
            DeviceRole::Pod => "pod",
            DeviceRole::Outward => "outward",
            DeviceRole::Overlay => "overlay",
        };
        Self {
            index,
            name: name.clone(),
            role: role.to_owned(),
            counts_as: told.to_owned(),
            source4: *source4,
            source6: *source6,
        }
    }
}

impl From<&crate::dataplane::Hook> for Hook {
    fn from(hook: &crate::dataplane::Hook) -> Self {
        let crate::dataplane::Hook { kind, target, program } = hook.clone();
        Self { kind, target, program }
    }
}

impl From<&crate::dataplane::Fill> for MapFill {
    fn from(fill: &crate::dataplane::Fill) -> Self {
        let crate::dataplane::Fill { map, entries, capacity, option } = fill.clone();
        Self { map, entries, capacity, option: option.to_owned() }
    }
}

/// In UTC, to the millisecond. A time that the calendar cannot hold (a clock gone wild) is empty.
pub fn rfc3339(time: SystemTime) -> String {
    Timestamp::try_from(time).map(|time| format!("{time:.3}")).unwrap_or_default()
}

#[cfg(test)]
pub(crate) mod tests {
    use std::{num::NonZeroU16, sync::Arc, time::Duration};

    use super::*;
    use crate::{
        dataplane::{Failure, Fill},
        desired::{
            Action, Algorithm, Backend, Device, DeviceRole, Frontend, FrontendKind, FrontendSpec, Verdict, Verdicts,
        },
        model::{ServiceKey, ServicePortName},
        status::Timings,
    };

    fn port(port: u16) -> NonZeroU16 {
        NonZeroU16::new(port).unwrap()
    }

    pub(crate) fn frontend(addr: &str, name: &str, state: FrontendState) -> (Frontend, FrontendStatus) {
        let pick = Verdict { action: Action::PickAll, masquerade: false };
        let spec = FrontendSpec {
            service: ServicePortName {
                service: ServiceKey::new("default", name),
                port: "http".into(),
                protocol: Protocol::Tcp,
            },
            kind: FrontendKind::ClusterIp,
            all: [Backend { addr: "10.1.1.3".parse().unwrap(), port: port(8080) }].into(),
            local: [].into(),
            verdicts: Verdicts { pod: pick, node: pick, external: Verdict { masquerade: true, ..pick } },
            algorithm: Algorithm::Random,
            affinity_secs: None,
            source_ranges: None,
            pods_per_packet: false,
            alive: None,
        };
        let since = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000);
        let frontend = Frontend { addr: addr.parse().unwrap(), port: port(80), protocol: Protocol::Tcp };
        (frontend, FrontendStatus { algorithm: spec.algorithm, spec: spec.into(), state, since, limits: None })
    }

    fn check(family: Family) -> desired::FamilyCheck {
        let listen = vec![if family == Family::V4 { "0.0.0.0" } else { "::" }.parse().unwrap()];
        desired::FamilyCheck { listen, local: 1 }
    }

    /// Of the port in [`busy`].
    pub(crate) fn check_ports() -> CheckPorts {
        let at = |addr: &str| (ServiceKey::new("default", "web"), addr.parse().unwrap());
        let failure =
            "cannot listen on [::]:30105 for its health checks: Address already in use; free the port on this node";
        CheckPorts::from([(at("0.0.0.0:30105"), None), (at("[::]:30105"), Some(failure.to_owned()))])
    }

    /// A status with something in every field.
    pub(crate) fn busy() -> Status {
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        let mut timings = Timings::default();
        timings.sync.observe(Duration::from_millis(3));
        timings.partial.observe(Duration::from_millis(2));
        timings.programming.get_mut(&Family::V4).unwrap().observe(Duration::from_millis(40));
        let full =
            Failure::Retry("frontend 10.96.0.2:80/TCP: map frontends_v4 is full (65536); raise --map-frontends".into());
        Status {
            mode_reason: "auto: ebpf can run here".into(),
            started: at(900),
            source: SourceState::Synced,
            ready: true,
            last_sync: Some(at(1_000)),
            last_queued: Some(at(999)),
            service_changes: ChangeCount { total: 7, pending: 0 },
            endpoint_changes: ChangeCount { total: 12, pending: 1 },
            timings: timings.into(),
            syncs: 9,
            services: 2,
            endpoints: 1,
            frontends: Arc::new(BTreeMap::from([
                frontend("10.96.0.1", "web", FrontendState::Programmed),
                frontend("10.96.0.2", "api", FrontendState::Degraded(full)),
            ])),
            failed_guards: Arc::new(BTreeMap::from([(
                "10.96.0.2".parse().unwrap(),
                Failure::Retry("guard 10.96.0.2: map frontends_v4 is full (65536); raise --map-frontends".into()),
            )])),
            health_checks: Arc::new(BTreeMap::from([(
                ServiceKey::new("default", "web"),
                desired::HealthCheck {
                    uid: "u1".into(),
                    port: port(30_105),
                    families: Family::BOTH.map(|family| (family, check(family))).into(),
                },
            )])),
            problems: Arc::new(BTreeMap::from([(
                "Service default/odd".to_owned(),
                vec!["spec.clusterIP: \"010.96.0.9\" is no address; left out".to_owned()],
            )])),
            devices: Arc::new(BTreeMap::from([(
                2,
                Device { source4: Some([192, 0, 2, 1].into()), ..Device::new("eth0", DeviceRole::Outward) },
            )])),
            failed_devices: Arc::new(BTreeMap::from([(
                "veth9".to_owned(),
                Failure::Retry("device veth9: no such device".into()),
            )])),
            without_xdp: Arc::new(BTreeMap::from([(
                "eth0".to_owned(),
                Failure::Unsupported("its driver has no XDP".into()),
            )])),
            hooks: Arc::new(vec![crate::dataplane::Hook {
                kind: "tcx/ingress".into(),
                target: "eth0".into(),
                program: "tc_ingress_ether".into(),
            }]),
            hooks_lost: 1,
            ahead: Arc::new(vec![crate::dataplane::Ahead {
                kind: "tcx/ingress".into(),
                target: "eth0".into(),
                programs: vec![7, 9],
            }]),
            retiring: Arc::new(vec![
                crate::dataplane::Retiring { mode: "nftables", retired: true, flows: Some(3), trouble: None },
                crate::dataplane::Retiring {
                    mode: "iptables",
                    retired: false,
                    flows: None,
                    trouble: Some("the lock is held".into()),
                },
            ]),
            fill: Arc::new(vec![Fill {
                map: "frontends_v4".into(),
                entries: 2,
                capacity: 65_536,
                option: "--map-frontends",
            }]),
            drift_repaired: 1,
            ..Status::starting("ebpf", "n1".into())
        }
    }

    #[test]
    fn times_are_utc_to_the_millisecond() {
        let time = SystemTime::UNIX_EPOCH + Duration::from_millis(1_795_228_318_042);
        assert_eq!(rfc3339(time), "2026-11-21T02:31:58.042Z");
    }

    #[test]
    fn a_report_is_stable_and_reads_back() {
        let report = Report {
            pid: 4242,
            uptime_seconds: 61,
            version: "0.0.0".into(),
            ..Report::new(&busy(), true, Some("all"), Some(Path::new("/sys/fs/bpf/x")), &check_ports())
        };
        insta::assert_snapshot!("report", serde_json::to_string_pretty(&report).unwrap());
        let text = serde_json::to_string(&report).unwrap();
        assert_eq!(serde_json::from_str::<Report>(&text).unwrap(), report);
    }
}
