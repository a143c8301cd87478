//! The IPVS dataplane: backends are chosen by the kernel's own load balancer; a table of nftables before and behind it does what that
//! cannot.
//!
//! ```text
//! render    frontends to virtual servers; pure
//! servers   what makes virtual servers what they should be; pure
//! around    whose an address is already; pure
//! codec     their bytes           socket   what IPVS is asked       connections   which are open
//! device    holds the addresses   sysctl   what IPVS needs to be set
//! talk      a conversation by netlink      system   all that the kernel is asked
//! wanted    what there should be, and what brings it about
//! addresses what our device holds, and what has to be there before: settings, the device
//! notes     which virtual servers are ours
//! former    takes it out of force, where another mode takes over, and away once its connections are over
//! trial     whether this node can run it
//! ```
//!
//! The table (role `Gate`) is the nftables dataplane with another name and another way to serve: who is refused or dropped, who is
//! masqueraded, who is a pod. Nothing is served that it has not got: order of a change is servers without backends, the table, addresses,
//! backends, then what is to go. An agent that starts takes up what is there. Stopping leaves all in force.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    Capabilities, Dataplane, DataplaneError, Drift, Failure, Fill, Hook, Report, held,
    netfilter::{Options, PROTOCOLS, lock::Lock},
    nftables::{Nftables, Role},
};
use crate::{
    desired::{Algorithm, Changes, DesiredState, Devices, Frontend, FrontendKind, FrontendSpec},
    model::ServiceKey,
};

mod addresses;
mod around;
pub mod codec;
mod connections;
mod device;
mod former;
pub mod kube_proxy;
mod notes;
pub mod render;
pub mod servers;
pub mod socket;
mod sysctl;
mod system;
mod talk;
#[cfg(test)]
mod tests;
mod trial;
mod wanted;

pub(crate) use former::Former;

use addresses::{asks_whose, load_balancers};
use around::Around;
use codec::{Request, Virtual};
use device::{Device, Route};
use notes::remove;
use render::{Renderer, Server};
use servers::Kernel;
use socket::Socket;
use system::System;

/// What a frontend has of IPVS.
#[derive(Debug)]
struct Claim {
    servers: Vec<Virtual>,
    /// Held by our device for it.
    held: Option<IpAddr>,
    spec: Arc<FrontendSpec>,
}

/// See the module.
#[derive(Debug)]
pub struct Ipvs {
    gate: Nftables,
    system: Box<dyn System>,
    renderer: Renderer,
    options: Options,
    device: Option<Device>,
    /// What is written on our device, for one that is made in its place.
    alias: Option<String>,
    /// Our virtual servers as they are; `None`: not known.
    kernel: Option<Kernel>,
    /// Noted as ours when that was last done.
    noted: BTreeSet<Virtual>,
    /// On our device.
    bound: BTreeSet<IpAddr>,
    /// Of those, what a route leads here in their place: another mode had it on its way out, and did not come to the end of it.
    routed: BTreeSet<IpAddr>,
    around: Around,
    wanted: BTreeMap<Virtual, (Server, Frontend)>,
    by_frontend: BTreeMap<Frontend, Claim>,
    /// Not served, for their address is somebody else's.
    refused: BTreeMap<Frontend, Arc<FrontendSpec>>,
    /// For how many frontends each address is held.
    held_for: BTreeMap<IpAddr, usize>,
    /// At which address the frontend of a mark was or is.
    marked_at: BTreeMap<Virtual, IpAddr>,
    guards: BTreeSet<IpAddr>,
    /// Keys of frontends that stay as an earlier run left them.
    kept: BTreeSet<String>,
    look_at: Option<Instant>,
    compare_at: Instant,
}

impl Ipvs {
    /// Changes nothing that is in force.
    pub fn open(options: &Options) -> Result<Self, DataplaneError> {
        let gate = Nftables::open_as(Role::Gate, options)?;
        let socket = Socket::open().map_err(no_ipvs)?;
        let kernel = |source| DataplaneError::Kernel { what: "rtnetlink".into(), source };
        let route = Route::open().map_err(kernel)?;
        let system = system::Kernel { socket, route, strict_arp: options.ipvs_strict_arp };
        Ok(Self::over(gate, Box::new(system), options))
    }

    /// What takes more rights than to run: the settings as they have to be, and the device, on which is written what they were. It serves
    /// nothing, and may be done while an agent is at work.
    pub fn initialise(options: &Options) -> Result<(), DataplaneError> {
        let socket = Socket::open().map_err(no_ipvs)?;
        let route = Route::open().map_err(|source| DataplaneError::Kernel { what: "rtnetlink".into(), source })?;
        let mut system = system::Kernel { socket, route, strict_arp: options.ipvs_strict_arp };
        addresses::ready(&mut system, &mut None, &mut 0).map(drop).map_err(DataplaneError::Unavailable)
    }

    fn over(gate: Nftables, system: Box<dyn System>, options: &Options) -> Self {
        Self {
            gate,
            system,
            renderer: Renderer { scheduler: options.ipvs_scheduler.clone(), bit: options.mark() },
            options: options.clone(),
            device: None,
            alias: None,
            kernel: None,
            noted: BTreeSet::new(),
            bound: BTreeSet::new(),
            routed: BTreeSet::new(),
            around: Around::default(),
            wanted: BTreeMap::new(),
            by_frontend: BTreeMap::new(),
            refused: BTreeMap::new(),
            held_for: BTreeMap::new(),
            marked_at: BTreeMap::new(),
            guards: BTreeSet::new(),
            kept: BTreeSet::new(),
            look_at: None,
            compare_at: Instant::now(),
        }
    }

    /// Removes all of ours, with no agent at work here.
    pub fn remove() -> Result<(), DataplaneError> {
        let _lock = Lock::take()?;
        remove(&Options::default())
    }

    fn all_failed(frontends: impl IntoIterator<Item = Frontend>, why: &str) -> Report {
        let failed = |frontend| (frontend, Failure::Retry(format!("frontend {frontend}: {why}")));
        Report { failed: frontends.into_iter().map(failed).collect(), ..Report::default() }
    }
}

fn no_ipvs(error: io::Error) -> DataplaneError {
    match error.kind() {
        io::ErrorKind::NotFound => {
            DataplaneError::missing("the kernel has no IPVS", "`modprobe ip_vs`, or CONFIG_IP_VS")
        }
        _ => DataplaneError::Kernel { what: "IPVS".into(), source: error },
    }
}

fn remedy(request: &Request, error: &io::Error) -> String {
    match request {
        Request::Add(service) | Request::Set(service) if error.raw_os_error() == Some(libc::ENOENT) => {
            format!("; `modprobe ip_vs_{}`, or another --ipvs-scheduler", service.scheduler)
        }
        _ => String::new(),
    }
}

impl Dataplane for Ipvs {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            name: "ipvs",
            protocols: PROTOCOLS.to_vec(),
            affinity: true,
            // None of the kernel's schedulers is random.
            algorithms: vec![Algorithm::Scheduler, Algorithm::RoundRobin, Algorithm::Maglev],
            otherwise: Algorithm::Scheduler,
            turns_restart: None,
            loopback: false,
            resets: false,
            affinity_clients: None,
            affinity_apart: true,
        }
    }

    fn resync(&mut self, desired: &DesiredState) -> Report {
        let mut report = Report::default();
        let kept = self.gate.kept().map_err(|error| error.to_string());
        let prepared = kept.and_then(|kept| {
            self.kept = kept;
            self.prepare(&mut report)
        });
        if let Err(why) = prepared {
            self.kernel = None;
            return Self::all_failed(desired.frontends.keys().copied(), &why);
        }
        (self.wanted, self.by_frontend, self.held_for) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        self.refused = BTreeMap::new();
        self.around.load_balancers = load_balancers(&desired.frontends);
        let sets = desired.frontends.values().map(|spec| &spec.all);
        self.around.backends = around::backends(&self.around.load_balancers, sets);
        let mut passed = desired.clone();
        for (frontend, spec) in &desired.frontends {
            if self.kept.contains(&Nftables::key(frontend)) {
                // The table says what is to be said of it.
                continue;
            }
            if let Err(failure) = self.want(frontend, spec) {
                report.failed.insert(*frontend, failure);
                passed.frontends.remove(frontend);
            }
        }
        self.guards.clone_from(&desired.guards);
        self.kernel = match self.list() {
            Ok(kernel) => Some(kernel),
            Err(why) => return Self::all_failed(desired.frontends.keys().copied(), &why),
        };
        let others: Vec<Virtual> = self.kernel.iter().flat_map(Kernel::keys).copied().collect();
        let others: Vec<Virtual> =
            others.into_iter().filter(|at| !self.wanted.contains_key(at) && !self.is_kept(at)).collect();
        self.note(&mut report);
        let all: Vec<Virtual> = self.wanted.keys().copied().collect();
        self.begin(&all, &mut report);
        passed.guards.extend(self.bound.iter().filter(|addr| !self.is_lost(addr)).chain(self.held_for.keys()));
        let done = self.gate.resync(&passed);
        let closed = self.closed(&done.failed);
        merge(&mut report, done);
        self.bind(&mut report);
        let requests: Vec<Request> = all.iter().flat_map(|at| self.requests(*at, &closed)).collect();
        self.run(&requests, &mut report);
        self.leave(&others, &mut report);
        self.note(&mut report);
        report
    }

    fn hold(&mut self, services: &BTreeSet<ServiceKey>) {
        self.gate.hold(services);
    }

    fn apply(&mut self, changes: &Changes) -> Report {
        let mut report = Report::default();
        let concerned = || changes.set.keys().chain(&changes.remove).copied();
        if self.device.is_none() {
            return Self::all_failed(concerned(), "IPVS is not prepared yet");
        }
        if self.kernel.is_none() {
            match self.list() {
                Ok(kernel) => self.kernel = Some(kernel),
                Err(why) => return Self::all_failed(concerned(), &why),
            }
        }
        if changes.set.values().any(|spec| asks_whose(spec))
            && let Err(why) = self.look_around()
        {
            return Self::all_failed(concerned(), &why);
        }
        let mut passed = changes.clone();
        let (mut removed, mut old, mut new) = (Vec::new(), Vec::new(), Vec::new());
        for frontend in concerned() {
            if self.kept.contains(&Nftables::key(&frontend)) {
                report.failed.insert(frontend, held(&frontend));
            } else if changes.remove.contains(&frontend) {
                removed.extend(self.forget(&frontend));
            } else {
                old.extend(self.forget(&frontend));
                // One that has chosen nobody of late may have connections yet.
                let Frontend { addr, port, protocol } = frontend;
                old.push(Virtual::At { addr, port: port.get(), protocol });
            }
        }
        if changes.set.values().any(|spec| spec.kind == FrontendKind::LoadBalancer) {
            self.around.load_balancers.extend(load_balancers(&changes.set));
            let sets = self.sets().chain(changes.set.values().map(|spec| &spec.all));
            self.around.backends = around::backends(&self.around.load_balancers, sets);
        }
        for (frontend, spec) in &changes.set {
            if report.failed.contains_key(frontend) {
                continue;
            }
            match self.want(frontend, spec) {
                Ok(()) => {
                    let claim = self.by_frontend.get(frontend);
                    new.extend(claim.into_iter().flat_map(|claim| claim.servers.iter().copied()));
                    passed.guard.extend(claim.and_then(|claim| claim.held));
                }
                Err(failure) => {
                    report.failed.insert(*frontend, failure);
                    passed.set.remove(frontend);
                    passed.remove.insert(*frontend);
                }
            }
        }
        self.guards.extend(&changes.guard);
        self.guards.retain(|addr| !changes.unguard.contains(addr));
        self.note(&mut report);
        self.begin(&new, &mut report);
        // Before the table forgets who may come.
        let gone: Vec<Request> = removed
            .iter()
            .filter(|at| !self.wanted.contains_key(at))
            .flat_map(|at| self.requests(*at, &BTreeSet::new()))
            .collect();
        self.run(&gone, &mut report);
        passed.guard.extend(self.held_for.keys().filter(|addr| !self.bound.contains(addr)));
        passed.unguard.extend(self.bound.iter().filter(|addr| self.is_lost(addr)));
        passed.unguard.retain(|addr| !self.bound.contains(addr) || self.is_lost(addr));
        let done = self.gate.apply(&passed);
        self.kept = self.gate.keeps();
        let closed = self.closed(&done.failed);
        // Where the table had to be made anew these may be others than those that have changed.
        for frontend in &closed {
            let claim = self.by_frontend.get(frontend);
            new.extend(claim.into_iter().flat_map(|claim| claim.servers.iter().copied()));
        }
        merge(&mut report, done);
        self.bind(&mut report);
        let new: BTreeSet<Virtual> = new.into_iter().collect();
        let requests: Vec<Request> = new.iter().flat_map(|at| self.requests(*at, &closed)).collect();
        self.run(&requests, &mut report);
        old.extend(removed);
        self.leave(&old, &mut report);
        self.note(&mut report);
        report
    }

    fn set_devices(&mut self, devices: &Devices) -> Report {
        self.gate.set_devices(devices)
    }

    fn activate(&mut self) -> Result<(), DataplaneError> {
        self.gate.activate()
    }

    fn observe(&mut self) -> Result<Drift, DataplaneError> {
        let mut drift = self.gate.observe()?;
        let kernel = |source| DataplaneError::Kernel { what: format!("device {}", device::NAME), source };
        let found = self.system.device().map_err(kernel)?;
        match found.filter(|device| device.up) {
            None => drift.hooks.push(format!("device {}", device::NAME)),
            Some(device) => {
                let bound = self.system.addresses(device.index).map_err(kernel)?;
                let lost = |addr: &IpAddr| self.held_for.contains_key(addr) && !bound.contains(addr);
                let concerned = self.by_frontend.iter().filter(|(_, claim)| claim.held.as_ref().is_some_and(lost));
                drift.frontends.extend(concerned.map(|(frontend, _)| *frontend));
            }
        }
        drift.hooks.extend(self.system.wrong().into_iter().map(|name| format!("net/ipv4/{name}")));
        drift.unfinished |= self.is_other_than_thought().map_err(kernel)?;
        self.compare(&mut drift)?;
        drift.frontends.sort();
        drift.frontends.dedup();
        Ok(drift)
    }

    fn tick(&mut self) -> Option<Duration> {
        let now = Instant::now();
        if self.look_at.take_if(|at| *at <= now).is_some() {
            self.look();
        }
        let wait = self.look_at.map(|at| at.saturating_duration_since(now));
        [wait, self.gate.tick()].into_iter().flatten().min()
    }

    fn teardown(&mut self) -> Result<(), DataplaneError> {
        self.kernel = None;
        self.device = None;
        remove(&self.options)?;
        self.gate.teardown()
    }

    fn fill(&self) -> Vec<Fill> {
        self.gate.fill()
    }

    fn hooks(&self) -> Vec<Hook> {
        let mut hooks = self.gate.hooks();
        let servers = self.kernel.as_ref().map_or(0, BTreeMap::len);
        hooks.extend(self.device.is_some().then(|| Hook {
            kind: "ipvs".into(),
            target: device::NAME.into(),
            program: format!("{servers} virtual servers"),
        }));
        hooks
    }
}

/// Failures of the one and of the other.
fn merge(report: &mut Report, other: Report) {
    let Report { failed, failed_guards, failed_devices, without_xdp, failed_local_cidrs, writes } = other;
    for (frontend, failure) in failed {
        report.failed.entry(frontend).or_insert(failure);
    }
    report.failed_guards.extend(failed_guards);
    report.failed_devices.extend(failed_devices);
    report.without_xdp.extend(without_xdp);
    report.failed_local_cidrs = report.failed_local_cidrs.take().or(failed_local_cidrs);
    report.writes += writes;
}
