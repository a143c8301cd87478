//! The trait every dataplane implements, and the dataplanes.
//!
//! A dataplane executes verdicts; it never sees a Service. It is driven from one thread that owns it.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use serde::Serialize;

use crate::{
    desired::{Changes, Devices, Frontend, FrontendSpec},
    model::{Protocol, ServiceKey},
};

pub mod ebpf;
pub mod memory;

/// What this dataplane can express. Whoever drives it never asks it for more: a frontend that wants it is not in force, and its
/// status says why.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Capabilities {
    pub name: &'static str,
    pub protocols: Vec<Protocol>,
    pub affinity: bool,
}

impl Capabilities {
    /// What of this frontend cannot be expressed, if anything.
    pub fn lacks(&self, frontend: &Frontend, spec: &FrontendSpec) -> Option<Failure> {
        let Self { name, protocols, affinity } = self;
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
}

/// Of a frontend that [`Dataplane::hold`] keeps as it is.
pub fn held(frontend: &Frontend) -> Failure {
    Failure::Unsupported(format!(
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
    /// Hooks that were lost (detached by somebody); named as `status` names them.
    pub hooks: Vec<String>,
}

impl Drift {
    pub fn is_empty(&self) -> bool {
        let Self { frontends, guards, hooks } = self;
        frontends.is_empty() && guards.is_empty() && hooks.is_empty()
    }
}

#[derive(Debug, thiserror::Error)]
pub enum DataplaneError {
    /// The node cannot run this dataplane, or not now; text says what, why and the remedy.
    #[error("{0}")]
    Unavailable(String),
    #[error("{what}: {source}{}", remedy(.source))]
    Kernel { what: String, source: std::io::Error },
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

    /// From now on what is in force of these Services is left as it stands, by `resync` and `apply` alike: not all is known of them.
    /// What is asked for there is reported as failed (see [`held`]). Writes nothing.
    fn hold(&mut self, services: &BTreeSet<ServiceKey>);

    /// Carries out one change. Applying twice is a no-op; a failure of one frontend leaves the others in force.
    fn apply(&mut self, changes: &Changes) -> Report;

    /// Attaches to exactly these devices. Called at start and whenever they change. Frontends that fail by that are reported, too.
    fn set_devices(&mut self, devices: &Devices) -> Report;

    /// Attaches what makes the state effective (hooks). Called once the first full state is in force; a no-op if they hold.
    fn activate(&mut self) -> Result<(), DataplaneError>;

    /// Compares the kernel with what was programmed; writes nothing.
    fn observe(&mut self) -> Result<Drift, DataplaneError>;

    /// Periodic housekeeping (freed slots come to rest …); returns when it wants to be called again, if at all.
    fn tick(&mut self) -> Option<std::time::Duration>;

    /// Removes everything of ours.
    fn teardown(&mut self) -> Result<(), DataplaneError>;

    /// Fill of what can fill up, for metrics and `status`.
    fn fill(&self) -> Vec<Fill>;

    /// Hooks in force, for `status`.
    fn hooks(&self) -> Vec<Hook>;
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
