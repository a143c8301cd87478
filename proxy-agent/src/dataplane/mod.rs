//! The trait every dataplane implements, and the dataplanes.
//!
//! A dataplane executes verdicts; it never sees a Service. It is driven from one thread that owns it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::IpAddr,
};

use serde::Serialize;

use crate::{
    desired::{Algorithm, Changes, Devices, Frontend, FrontendSpec},
    model::{Protocol, ServiceKey},
};

pub(crate) mod alive;
pub mod choose;
pub mod ebpf;
pub(crate) mod former;
pub mod iptables;
pub mod ipvs;
pub mod memory;
pub(crate) mod mounts;
pub mod netfilter;
pub(crate) mod netlink;
pub mod nftables;
pub(crate) mod rounds;
pub mod select;

pub use alive::Ended;

/// How packets of this node's pods are told from others.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum DetectLocal {
    /// By the device that they come in by.
    #[default]
    Device,
    /// By their source, with what is desired (`local_cidrs`).
    Address,
}

/// What this dataplane can express. Whoever drives it never asks it for more: a frontend that wants it is not in force, and its
/// status says why. What a frontend can go without is no more than said ([`Capabilities::limits`]).
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Capabilities {
    pub name: &'static str,
    pub protocols: Vec<Protocol>,
    pub affinity: bool,
    pub algorithms: Vec<Algorithm>,
    /// Who asks for another one is served so.
    pub otherwise: Algorithm,
    /// Round-robin begins anew with this.
    pub turns_restart: Option<&'static str>,
    /// NodePorts of 127.0.0.1 are served.
    pub loopback: bool,
    /// Connections to endpoints that were deleted are reset where a Service asks for it.
    pub resets: bool,
    /// So many clients of each endpoint are remembered, where that is no setting of ours.
    pub affinity_clients: Option<u32>,
    /// Each address of a Service remembers its clients for itself, and two sets of backends of one address in two ways.
    pub affinity_apart: bool,
}

impl Capabilities {
    /// What of this frontend cannot be expressed, if anything.
    pub fn lacks(&self, frontend: &Frontend, spec: &FrontendSpec) -> Option<Failure> {
        let Self {
            name,
            protocols,
            affinity,
            algorithms: _,
            otherwise: _,
            turns_restart: _,
            loopback: _,
            resets: _,
            affinity_clients: _,
            affinity_apart: _,
        } = self;
        let what = if !protocols.contains(&frontend.protocol) {
            format!("{} is not served by the {name} dataplane", frontend.protocol)
        } else if spec.affinity_secs.is_some() && !affinity {
            format!(
                "the {name} dataplane has no session affinity: set sessionAffinity: None, or choose another --proxy-mode"
            )
        } else {
            return None;
        };
        Some(Failure::Unsupported(format!("frontend {frontend}: {what}")))
    }

    /// How a backend is chosen for it: where each address remembers for itself, a hash of the client has them agree.
    pub fn chosen(&self, spec: &FrontendSpec) -> Algorithm {
        if self.is_by_hash(spec) {
            Algorithm::Maglev
        } else if self.algorithms.contains(&spec.algorithm) {
            spec.algorithm
        } else {
            self.otherwise
        }
    }

    const fn is_by_hash(&self, spec: &FrontendSpec) -> bool {
        self.affinity_apart && spec.affinity_secs.is_some()
    }

    /// What this frontend, which is in force, does not get of what it asks for.
    pub fn limits(&self, frontend: &Frontend, spec: &FrontendSpec) -> Option<String> {
        let Self {
            name,
            protocols: _,
            affinity: _,
            algorithms: _,
            otherwise: _,
            turns_restart,
            loopback,
            resets,
            affinity_clients,
            affinity_apart: _,
        } = self;
        if !loopback && frontend.addr.is_loopback() {
            return Some(format!("the {name} dataplane has no NodePorts on {}", frontend.addr));
        }
        let mut limits = Vec::new();
        let by_hash = self.is_by_hash(spec);
        let (asked, chosen) = (spec.algorithm, self.chosen(spec));
        if asked != chosen && !by_hash {
            let how = if chosen == Algorithm::Scheduler { "as --ipvs-scheduler says" } else { "at random" };
            limits.push(format!("backends are chosen {how}: the {name} dataplane has no {asked}"));
        }
        if let (Some(with), Algorithm::RoundRobin) = (turns_restart, chosen) {
            limits.push(format!("round-robin begins anew with {with}"));
        }
        if !resets && frontend.protocol == Protocol::Tcp && spec.alive.is_some() {
            limits.push(format!("the {name} dataplane does not reset connections to endpoints that are deleted"));
        }
        if let (Some(clients), Some(_)) = (affinity_clients, spec.affinity_secs) {
            limits.push(format!("session affinity remembers the last {clients} clients of each endpoint"));
        }
        if by_hash {
            limits
                .push("session affinity is each address's own: they agree by a hash, until backends change".to_owned());
            if ipvs::render::picks_both(&spec.verdicts) {
                limits.push(
                    "clients that the traffic policy treats unlike the outside are kept by a hash of their address, without a time-out".to_owned(),
                );
            }
        }
        (!limits.is_empty()).then(|| limits.join("; "))
    }
}

/// Why one frontend is not in force. Text names the object, the cause and the remedy.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, thiserror::Error)]
pub enum Failure {
    /// Trying again may help (a map is full, the kernel is short of memory).
    #[error("{0}")]
    Retry(String),
    /// Only a change of the Service or of the configuration helps.
    #[error("{0}")]
    Unsupported(String),
    /// Not all is known of its Service, so that what an earlier run left in force stands, and serves.
    #[error("{0}")]
    Held(String),
}

/// Of a frontend that [`Dataplane::hold`] keeps as it is.
pub fn held(frontend: &Frontend) -> Failure {
    Failure::Held(format!(
        "frontend {frontend}: its Service or an EndpointSlice of it cannot be read (see the problems in `status`); until it can be, \
         or is gone, what an earlier run left in force stands"
    ))
}

/// Outcome of one `apply`: what is not named here is in force as desired.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Report {
    pub failed: BTreeMap<Frontend, Failure>,
    pub failed_guards: BTreeMap<IpAddr, Failure>,
    /// Devices (by name) that could not be attached to, and why.
    pub failed_devices: BTreeMap<String, Failure>,
    /// Devices (by name) that XDP was asked for and that are served without, and why.
    pub without_xdp: BTreeMap<String, Failure>,
    /// Why not all addresses that tell a pod are in force.
    pub failed_local_cidrs: Option<Failure>,
    /// Kernel writes this apply made (0: nothing changed).
    pub writes: u64,
}

impl Report {
    pub fn is_clean(&self) -> bool {
        let Self { failed, failed_guards, failed_devices, without_xdp: _, failed_local_cidrs, writes: _ } = self;
        failed.is_empty() && failed_guards.is_empty() && failed_devices.is_empty() && failed_local_cidrs.is_none()
    }
}

/// What the kernel holds now, compared with what this dataplane believes it programmed.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Drift {
    /// Frontends whose kernel state is not what was programmed (missing, altered, foreign).
    pub frontends: Vec<Frontend>,
    pub guards: Vec<IpAddr>,
    /// The addresses that tell a pod of this node are not those that were programmed.
    pub local_cidrs: bool,
    /// Hooks that were lost (detached by somebody), by [`Hook::name`].
    pub hooks: Vec<String>,
    /// Something that failed, or was left undone by something that failed, is still to be brought about. Nobody altered it.
    pub unfinished: bool,
}

impl Drift {
    /// Nothing is to be done.
    pub fn is_empty(&self) -> bool {
        self.altered() == 0 && !self.unfinished
    }

    /// How many things are not what was programmed.
    pub fn altered(&self) -> u64 {
        let Self { frontends, guards, local_cidrs, hooks, unfinished: _ } = self;
        (frontends.len() + guards.len() + usize::from(*local_cidrs) + hooks.len()) as u64
    }
}

/// What a node lacks, and what to do about it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Missing {
    pub what: String,
    /// Empty where `what` says it, or nothing general can be said.
    pub remedy: String,
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { what, remedy } = self;
        f.write_str(what)?;
        if remedy.is_empty() { Ok(()) } else { write!(f, "; {remedy}") }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum DataplaneError {
    /// The node cannot run this dataplane, or not now; text says what, why and the remedy.
    #[error("{0}")]
    Unavailable(String),
    /// The same, as far as the node itself is to be changed.
    #[error("{0}")]
    Missing(Missing),
    #[error("{what}: {source}{}", remedy(.source))]
    Kernel { what: String, source: std::io::Error },
}

impl DataplaneError {
    pub(crate) fn missing(what: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::Missing(Missing { what: what.into(), remedy: remedy.into() })
    }
}

/// What to do about an error of the kernel's, as the end of a sentence; empty where nothing general can be said.
pub(crate) fn remedy(error: &std::io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => "; run as root, or with CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN",
        Some(libc::ENOMEM) => "; the kernel or this cgroup is short of memory: raise its limit, or lower --map-*",
        Some(libc::ENOSPC | libc::E2BIG) => "; a table of the kernel's is full: raise --map-*",
        Some(libc::EMFILE | libc::ENFILE) => "; too many open files: raise the limit (ulimit -n)",
        Some(libc::ENOPROTOOPT | libc::ENOSYS) => "; the kernel is too old for that: upgrade it (docs/kernels.md)",
        _ => "",
    }
}

pub trait Dataplane: Send {
    /// The same at any time.
    fn capabilities(&self) -> Capabilities;

    /// Brings the kernel from whatever it holds to `desired`: adopts what is right, sets what is not, removes the rest.
    /// Called once after the first complete list, and again by the periodic resync. Writes nothing when nothing differs.
    fn resync(&mut self, desired: &crate::desired::DesiredState) -> Report;

    /// Called at start, and every second until the first full state is in force and devices are known: takes back what an earlier run left
    /// in force and what must not wait for that.
    fn wait(&mut self) {}

    /// Hooks are to be in place before what they translate by: whoever serves until then goes on, and no flow meets some of the hooks only.
    fn hooks_first(&self) -> bool {
        false
    }

    /// From now on what is in force of these Services is left as it stands, by `resync` and `apply` alike: not all is known of them.
    /// What is asked for there is reported as failed (see [`held`]). Writes nothing.
    fn hold(&mut self, services: &BTreeSet<ServiceKey>);

    /// Carries out one change. Applying twice is a no-op; a failure of one frontend leaves the others in force.
    fn apply(&mut self, changes: &Changes) -> Report;

    /// Attaches to exactly these devices. Called at start and whenever they change. Frontends that fail by that are reported, too.
    fn set_devices(&mut self, devices: &Devices) -> Report;

    /// Attaches what makes the state effective (hooks). Called once the first full state is in force; a no-op if they hold.
    fn activate(&mut self) -> Result<(), DataplaneError>;

    /// Called once: the first full state is in force, on the devices, too, or all but little of it for long enough.
    fn in_force(&mut self) {}

    /// Compares the kernel with what was programmed; writes nothing.
    fn observe(&mut self) -> Result<Drift, DataplaneError>;

    /// Ports at which load balancers ask after the health of Services: whatever filters what comes in lets them in (contract A116), if this
    /// dataplane can say so.
    fn let_in(&mut self, _ports: &BTreeSet<u16>) {}

    /// Periodic housekeeping (freed slots come to rest …); returns when it wants to be called again, if at all.
    fn tick(&mut self) -> Option<std::time::Duration>;

    /// What is asked for and has no place in the kernel yet, as far as no [`Report`] says so; `tick` goes on trying.
    fn unplaced(&self) -> Option<String> {
        None
    }

    /// A setting of the kernel's that cannot be made what it should be; `tick` goes on trying.
    fn unsettled(&self) -> Option<String> {
        None
    }

    /// What an earlier run in this mode left, by means that are not used any more, and that cannot be removed; `tick` goes on trying.
    fn unremoved(&self) -> Option<String> {
        None
    }

    /// What other modes left in force and is on its way out.
    fn retiring(&self) -> Vec<Retiring> {
        Vec::new()
    }

    /// Removes everything of ours.
    fn teardown(&mut self) -> Result<(), DataplaneError>;

    /// Fill of what can fill up, for metrics and `status`.
    fn fill(&self) -> Vec<Fill>;

    /// Hooks in force, for `status`.
    fn hooks(&self) -> Vec<Hook>;

    /// Of the hooks that `set_devices` and `activate` put back those that are not in force, by [`Hook::name`].
    fn lost_hooks(&self) -> Vec<String> {
        Vec::new()
    }

    /// Where others' programs see packets before ours do, and may keep them from it.
    fn ahead(&self) -> Vec<Ahead> {
        Vec::new()
    }
}

/// Others' programs in front of ours.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Ahead {
    /// As [`Hook`] has them.
    pub kind: String,
    pub target: String,
    /// Ids, in the order in which they run.
    pub programs: Vec<u32>,
}

/// What an agent in another mode left in force. It stays until this mode is in force, then takes no new flows, and goes with its last one.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Retiring {
    /// Or `kube-proxy`: its rules are gone, and what it translated goes on.
    pub mode: &'static str,
    /// It takes no new flow.
    pub retired: bool,
    /// That still go by it; `None`: not counted, before it was retired.
    pub flows: Option<u64>,
    /// Why it stays as it is.
    pub trouble: Option<String>,
}

/// How full a kernel table is.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Fill {
    pub map: String,
    pub entries: u64,
    pub capacity: u64,
    /// The option that raises the capacity.
    pub option: &'static str,
}

/// One place where a program of ours sits.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Hook {
    /// `cgroup/connect4`, `tcx/ingress`, `clsact/egress` …
    pub kind: String,
    /// Cgroup path or device name.
    pub target: String,
    pub program: String,
}

impl Hook {
    /// As [`Drift`] names it.
    pub fn name(&self) -> String {
        let Self { kind, target, program: _ } = self;
        format!("{kind} {target}")
    }
}

#[cfg(test)]
mod tests {
    use super::{
        netfilter::refused::{frontend, spec},
        *,
    };

    #[test]
    fn how_backends_are_chosen_is_said_where_it_is_not_as_asked() {
        use Algorithm::{Maglev, Random, RoundRobin, Scheduler};
        let capabilities = |algorithms: &[Algorithm], otherwise, turns_restart| Capabilities {
            name: "one",
            protocols: vec![Protocol::Tcp],
            affinity: true,
            algorithms: algorithms.to_vec(),
            otherwise,
            turns_restart,
            loopback: true,
            resets: true,
            affinity_clients: None,
            affinity_apart: otherwise == Algorithm::Scheduler,
        };
        let rules = capabilities(&[Random, RoundRobin], Random, Some("each change"));
        let ipvs = capabilities(&[Scheduler, RoundRobin, Maglev], Scheduler, None);
        let at = frontend("10.96.0.1");
        let told = |by: &Capabilities, algorithm, affinity_secs| {
            let spec = FrontendSpec { algorithm, affinity_secs, ..FrontendSpec::clone(&spec(&at)) };
            (by.chosen(&spec), by.limits(&at, &spec).unwrap_or_default())
        };
        let random = "backends are chosen at random: the one dataplane has no maglev".to_owned();
        assert_eq!(told(&rules, Maglev, None), (Random, random));
        assert_eq!(told(&rules, Random, None), (Random, String::new()));
        assert_eq!(told(&rules, RoundRobin, None), (RoundRobin, "round-robin begins anew with each change".into()));
        let by_scheduler = "backends are chosen as --ipvs-scheduler says: the one dataplane has no random".to_owned();
        assert_eq!(told(&ipvs, Random, None), (Scheduler, by_scheduler));
        assert_eq!(told(&ipvs, Scheduler, None), (Scheduler, String::new()));
        for asked in [Random, RoundRobin, Scheduler, Maglev] {
            let (chosen, limits) = told(&ipvs, asked, Some(60));
            assert!(chosen == Maglev && !limits.contains("scheduler"), "a hash chooses: {limits}");
        }
    }

    /// One line: what, why, and what to do about it.
    #[test]
    fn an_error_of_the_kernels_names_the_remedy() {
        for (code, remedy) in [
            (libc::ENOSYS, "the kernel is too old for that: upgrade it (docs/kernels.md)"),
            (libc::ENOPROTOOPT, "the kernel is too old for that: upgrade it (docs/kernels.md)"),
            (libc::EPERM, "run as root, or with CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN"),
            (libc::ENOMEM, "raise its limit, or lower --map-*"),
        ] {
            let source = std::io::Error::from_raw_os_error(code);
            let text = DataplaneError::Kernel { what: "create map frontends_v4".into(), source }.to_string();
            assert!(text.starts_with("create map frontends_v4: ") && text.ends_with(remedy), "{text}");
            assert!(!text.contains('\n'), "{text}");
        }
    }
}
