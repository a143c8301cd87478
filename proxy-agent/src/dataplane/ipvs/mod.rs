//! The IPVS dataplane: backends are chosen by the kernel's own load balancer; a table of nftables before and behind it does what that
//! cannot.
//!
//! ```text
//! render    frontends to virtual servers; pure
//! servers   what makes virtual servers what they should be; pure
//! around    whose an address is already; pure
//! codec     their bytes           socket   what IPVS is asked
//! device    holds the addresses   sysctl   what IPVS needs to be set
//! talk      a conversation by netlink      system   all that the kernel is asked
//! former    takes all of it away, where another mode takes over
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
    nftables::{Nftables, Role, Servers},
};
use crate::{
    desired::{
        Action, Algorithm, BackendSet, Changes, DesiredState, Devices, Frontend, FrontendKind, FrontendSpec, Verdicts,
    },
    model::{Family, Protocol, ServiceKey},
};

mod around;
pub mod codec;
mod device;
mod former;
pub mod kube_proxy;
pub(crate) mod render;
mod servers;
pub mod socket;
mod sysctl;
mod system;
mod talk;
#[cfg(test)]
mod tests;
mod trial;

pub(crate) use former::Former;

use around::Around;
use codec::{Request, Virtual};
use device::{Device, Route};
use render::{Renderer, Server, Stay};
use servers::{Current, Kernel};
use socket::Socket;
use system::System;

/// Between two looks at who has no connections left.
const LOOK: Duration = Duration::from_secs(2);
/// Comparing destinations takes at most one part in so many of the time.
const SHARE: u32 = 100;

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
        Ok(Self::over(gate, Box::new(system::Kernel { socket, route }), options))
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

    /// What an agent left here, by name.
    pub fn remains() -> Result<Vec<String>, DataplaneError> {
        let mut found = Nftables::remains_of(Role::Gate)?;
        let device = match Route::open().and_then(|route| route.device()) {
            // A namespace that is not ours to ask holds none that could be removed.
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => None,
            device => {
                device.map_err(|source| DataplaneError::Kernel { what: format!("device {}", device::NAME), source })?
            }
        };
        let device = device.filter(|device| device.is_dummy);
        if device.is_some() {
            found.push(format!(
                "device {} with the addresses of Services, and their virtual servers (IPVS)",
                device::NAME
            ));
        }
        Ok(found)
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

    /// Settings and device.
    fn prepare(&mut self, report: &mut Report) -> Result<(), String> {
        let of_device = |error: io::Error| format!("device {}: {error}", device::NAME);
        let device = match self.system.device().map_err(of_device)? {
            Some(device) if !device.is_dummy => {
                return Err(format!(
                    "device {} is there and is no dummy, so it is somebody else's; rename it, or remove it",
                    device::NAME
                ));
            }
            Some(device) => {
                if sysctl::Settings::is_note(&device.alias) {
                    self.alias = Some(device.alias.clone());
                } else {
                    // An agent was killed over it.
                    let alias = self.alias()?;
                    self.system.label(device.index, &alias).map_err(of_device)?;
                    report.writes += 1;
                }
                if !device.up {
                    self.system.raise(device.index).map_err(of_device)?;
                    report.writes += 1;
                }
                device
            }
            None => {
                let alias = self.alias()?;
                report.writes += 1;
                self.system.create(&alias).map_err(|error| {
                    format!("device {} cannot be made: {error}; `modprobe dummy`, and CAP_NET_ADMIN", device::NAME)
                })?
            }
        };
        report.writes += self.system.set().map_err(|(name, error)| {
            format!("{name} cannot be set: {error}; mount /proc/sys/net writable, or set it to 1 yourself")
        })?;
        self.bound = self
            .system
            .addresses(device.index)
            .map_err(|error| format!("addresses of device {}: {error}", device::NAME))?;
        self.look_around()?;
        self.device = Some(device);
        Ok(())
    }

    /// What was set before us: what a device that is gone meanwhile said, for by now we have set it.
    fn alias(&mut self) -> Result<String, String> {
        if self.alias.is_none() {
            let note = self
                .system
                .note()
                .map_err(|error| format!("net/ipv4/vs: {error}; is /proc/sys/net that of this network namespace?"))?;
            self.alias = Some(note);
        }
        Ok(self.alias.clone().unwrap_or_default())
    }

    /// Whose addresses are, anew.
    fn look_around(&mut self) -> Result<(), String> {
        let asking = |error: io::Error| format!("the networks that this node is in: {error}");
        let (others, neighbours) = (self.system.others().map_err(asking)?, self.system.neighbours().map_err(asking)?);
        self.around.look(others, neighbours);
        Ok(())
    }

    /// Backends of all frontends, served or not.
    fn sets(&self) -> impl Iterator<Item = &BackendSet> {
        let all = self.by_frontend.values().map(|claim| &claim.spec).chain(self.refused.values());
        all.map(|spec| &spec.all)
    }

    /// Those of our servers that there are: what is wanted, at addresses that our device holds, or noted.
    fn list(&mut self) -> Result<Kernel, String> {
        let noted = Noted(self.gate.noted().map_err(|error| error.to_string())?);
        let mut kernel = Kernel::new();
        let asking = |error: io::Error| format!("IPVS cannot be asked: {error}");
        for service in self.system.services().map_err(asking)? {
            let at = service.at;
            let is_ours = self.wanted.contains_key(&at)
                || matches!(at, Virtual::At { addr, .. } if self.bound.contains(&addr))
                || noted.has(&at)
                // The table may have been flushed.
                || self.noted.contains(&at);
            if is_ours {
                let held = self.system.destinations(at).map_err(asking)?;
                kernel.insert(at, Current::of(service, &held));
            }
        }
        Ok(kernel)
    }

    /// Carries them out; what fails is told of the frontend that it is for, and concerns nobody else.
    fn run(&mut self, requests: &[Request], report: &mut Report) {
        if requests.is_empty() {
            return;
        }
        let outcomes = match self.system.run(requests) {
            Ok(outcomes) => outcomes,
            Err(error) => {
                self.kernel = None;
                let concerned =
                    requests.iter().filter_map(|request| Some(self.wanted.get(&servers::target(request))?.1));
                let concerned: Vec<Frontend> = concerned.collect();
                report.failed.extend(Self::all_failed(concerned, &format!("IPVS cannot be reached: {error}")).failed);
                return;
            }
        };
        let mut stale = BTreeSet::new();
        for (request, outcome) in requests.iter().zip(outcomes) {
            let at = servers::target(request);
            match outcome {
                Ok(()) => {
                    report.writes += 1;
                    if let Some(kernel) = &mut self.kernel {
                        servers::carry_out(kernel, request);
                    }
                }
                Err(error) => {
                    stale.insert(at);
                    if let Some((_, frontend)) = self.wanted.get(&at) {
                        let why = format!("frontend {frontend}: IPVS: {error}{}", remedy(request, &error));
                        report.failed.insert(*frontend, Failure::Retry(why));
                    } else {
                        tracing::warn!(%error, ?request, "IPVS refused");
                    }
                }
            }
        }
        for at in stale {
            self.read_again(at);
        }
    }

    /// One server that is not what it was thought to be.
    fn read_again(&mut self, at: Virtual) {
        let found = self.system.service(at).and_then(|service| {
            let Some(service) = service else { return Ok(None) };
            Ok(Some(Current::of(service, &self.system.destinations(at)?)))
        });
        match (found, &mut self.kernel) {
            (Ok(Some(current)), Some(kernel)) => drop(kernel.insert(at, current)),
            (Ok(None), Some(kernel)) => drop(kernel.remove(&at)),
            (Err(error), _) => {
                tracing::warn!(%error, ?at, "IPVS cannot be asked for a virtual server");
                self.kernel = None;
            }
            (Ok(_), None) => {}
        }
    }

    /// What brings a server about. One whose frontend is `closed` has nobody to choose.
    fn requests(&self, at: Virtual, closed: &BTreeSet<Frontend>) -> Vec<Request> {
        let Some(kernel) = &self.kernel else { return Vec::new() };
        let wanted = self.wanted.get(&at);
        let shut = wanted.filter(|(_, frontend)| closed.contains(frontend)).map(|(server, _)| Server {
            backends: BackendSet::from([]),
            stay: Stay::All,
            ..server.clone()
        });
        let wanted = shut.as_ref().or(wanted.map(|(server, _)| server));
        servers::turn(at, kernel.get(&at), wanted, &self.otherwise(&at))
    }

    /// What becomes of the connections of a server that is not wanted.
    fn otherwise(&self, at: &Virtual) -> Stay {
        let Virtual::At { addr, port, protocol } = *at else { return Stay::All };
        let frontend = crate::model::Port::new(port).map(|port| Frontend { addr, port, protocol });
        // It may be there, and choose nobody at the moment (contract A104).
        let alive = frontend.and_then(|frontend| self.by_frontend.get(&frontend)?.spec.alive.clone());
        match alive {
            Some(alive) if protocol == Protocol::Udp => Stay::Only(alive),
            _ => Stay::without_frontend(protocol),
        }
    }

    /// Servers that are not there yet, with nobody to choose: what comes for them is refused until the table is there.
    fn begin(&mut self, all: &[Virtual], report: &mut Report) {
        let Some(kernel) = &self.kernel else { return };
        let missing = all.iter().filter(|at| !kernel.contains_key(at));
        let requests: Vec<Request> =
            missing.filter_map(|at| Some(Request::Add(self.wanted.get(at)?.0.service.clone()))).collect();
        self.run(&requests, report);
    }

    /// Frontends that the table did not take: source ranges, traffic policies and masquerading are not in force for them, so nobody is
    /// served. What an earlier change left there serves on, as it was.
    fn closed(&self, failed: &BTreeMap<Frontend, Failure>) -> BTreeSet<Frontend> {
        let is_served = |frontend: &Frontend| {
            let servers = self.by_frontend.get(frontend).into_iter().flat_map(|claim| &claim.servers);
            let mut current = servers.filter_map(|at| self.kernel.as_ref()?.get(at));
            current.any(|current| current.destinations.values().any(|weight| *weight != Some(0)))
        };
        let stands = |frontend: &Frontend| self.gate.stands(frontend).unwrap_or_else(|| is_served(frontend));
        failed.keys().filter(|frontend| !stands(frontend)).copied().collect()
    }

    fn is_kept(&self, at: &Virtual) -> bool {
        match at {
            Virtual::At { .. } => key(at).is_some_and(|key| self.kept.contains(&key)),
            // Whose a mark is cannot be told of a frontend that is not planned.
            Virtual::Marked { .. } => !self.kept.is_empty(),
        }
    }

    /// Whether the frontend can have its servers: one whose mark is another's is told apart by nothing.
    fn want(&mut self, frontend: &Frontend, spec: &Arc<FrontendSpec>) -> Result<(), Failure> {
        let servers = self.renderer.servers(frontend, spec);
        if let Some(server) = servers
            .iter()
            .find(|server| self.wanted.get(&server.service.at).is_some_and(|(_, other)| other != frontend))
        {
            let other = self.wanted.get(&server.service.at).map(|(_, other)| other.to_string()).unwrap_or_default();
            return Err(Failure::Unsupported(format!(
                "frontend {frontend}: the mark that its virtual server is found by is that of {other}; give one of them another port"
            )));
        }
        let held = self.around.held(frontend, spec, |addr| self.bound.contains(addr));
        let held = held.inspect_err(|_| drop(self.refused.insert(*frontend, Arc::clone(spec))))?;
        if let Some(addr) = held {
            *self.held_for.entry(addr).or_default() += 1;
        }
        let all: Vec<Virtual> = servers.iter().map(|server| server.service.at).collect();
        let marked = all.iter().filter(|at| matches!(at, Virtual::Marked { .. }));
        self.marked_at.extend(marked.map(|at| (*at, frontend.addr)));
        self.by_frontend.insert(*frontend, Claim { servers: all, held, spec: Arc::clone(spec) });
        self.wanted.extend(servers.into_iter().map(|server| (server.service.at, (server, *frontend))));
        Ok(())
    }

    /// The servers that it had.
    fn forget(&mut self, frontend: &Frontend) -> Vec<Virtual> {
        self.refused.remove(frontend);
        let Some(Claim { servers, held, spec: _ }) = self.by_frontend.remove(frontend) else { return Vec::new() };
        for at in &servers {
            self.wanted.remove(at);
        }
        if let Some(addr) = held
            && let Some(count) = self.held_for.get_mut(&addr)
        {
            *count -= 1;
            if *count == 0 {
                self.held_for.remove(&addr);
            }
        }
        servers
    }

    /// Puts on our device what is held and not there yet. What could not be guarded is not: the node's own sockets would answer there.
    fn bind(&mut self, report: &mut Report) {
        let Some(index) = self.device.as_ref().map(|device| device.index) else { return };
        let missing: Vec<IpAddr> = self.held_for.keys().filter(|addr| !self.bound.contains(addr)).copied().collect();
        for addr in missing {
            let done = match report.failed_guards.get(&addr) {
                Some(failure) => Err(format!("{addr} cannot be guarded: {failure}")),
                None => self
                    .system
                    .add(index, addr)
                    .map_err(|error| format!("{addr} cannot be put on device {}: {error}", device::NAME)),
            };
            match done {
                Ok(()) => {
                    report.writes += 1;
                    self.bound.insert(addr);
                }
                Err(why) => {
                    let concerned = self.by_frontend.iter().filter(|(_, claim)| claim.held == Some(addr));
                    report.failed.extend(Self::all_failed(concerned.map(|(one, _)| *one), &why).failed);
                }
            }
        }
        // Only we know of the others; what is held there is tried again, and its guard with it.
        report.failed_guards.retain(|addr, _| self.guards.contains(addr) || !self.held_for.contains_key(addr));
    }

    /// The node has taken it over itself: what comes for it is not ours any more, from now on.
    fn is_lost(&self, addr: &IpAddr) -> bool {
        !self.held_for.contains_key(addr) && self.around.is_own(addr)
    }

    /// Takes from our device what nobody holds, and no connection leads to. What became free.
    fn unbind(&mut self, report: &mut Report) -> Vec<IpAddr> {
        let (Some(index), Some(kernel)) = (self.device.as_ref().map(|device| device.index), &self.kernel) else {
            return Vec::new();
        };
        let used = |addr: &IpAddr| {
            let leads_there = |at: &Virtual| match at {
                Virtual::At { addr: of, .. } => of == addr,
                _ if self.wanted.contains_key(at) => false,
                // One that an earlier run left does not say at which address its frontend was.
                Virtual::Marked { family, .. } => {
                    self.marked_at.get(at).map_or(*family == Family::of(*addr), |of| of == addr)
                }
            };
            kernel.keys().any(leads_there)
        };
        let is_kept = |addr: &IpAddr| {
            let addr = addr.to_string();
            self.kept.iter().any(|key| key.split(" . ").next() == Some(&addr))
        };
        let free: Vec<IpAddr> = self
            .bound
            .iter()
            .filter(|addr| !self.held_for.contains_key(addr) && !is_kept(addr))
            .filter(|addr| self.is_lost(addr) || !used(addr))
            .copied()
            .collect();
        let mut gone = Vec::new();
        for addr in free {
            match self.system.take_off(index, addr) {
                Ok(()) => {
                    report.writes += 1;
                    self.bound.remove(&addr);
                    gone.push(addr);
                }
                Err(error) => tracing::warn!(%addr, %error, "cannot be taken off the device"),
            }
        }
        gone
    }

    /// Writes down which servers are ours: those there are, and those that are wanted.
    fn note(&mut self, report: &mut Report) {
        let there: Vec<Virtual> = match &self.kernel {
            Some(kernel) => kernel.keys().copied().collect(),
            // None of them is forgotten before it is known to be gone.
            None => self.noted.iter().copied().collect(),
        };
        let all: BTreeSet<Virtual> = self.wanted.keys().copied().chain(there).collect();
        self.marked_at.retain(|at, _| all.contains(at));
        for family in Family::BOTH {
            let mut servers = Servers::default();
            for at in all.iter().filter(|at| at.family() == family) {
                match at {
                    Virtual::At { .. } => servers.at.extend(key(at)),
                    Virtual::Marked { mark, .. } => drop(servers.marks.insert(*mark)),
                }
            }
            self.gate.note(family, servers, report);
        }
        self.noted = all;
    }

    /// What is not wanted any more, once nobody is sent there.
    fn leave(&mut self, all: &[Virtual], report: &mut Report) {
        let none = BTreeSet::new();
        let requests: Vec<Request> =
            all.iter().filter(|at| !self.wanted.contains_key(at)).flat_map(|at| self.requests(*at, &none)).collect();
        self.run(&requests, report);
        let unbound = self.unbind(report);
        let unguard: BTreeSet<IpAddr> = unbound.into_iter().filter(|addr| !self.guards.contains(addr)).collect();
        if !unguard.is_empty() {
            // Somebody else's address from now on, or the route's.
            let done = self.gate.apply(&Changes { unguard, ..Changes::default() });
            report.writes += done.writes;
        }
        let leaving = |kernel: &Kernel| kernel.values().any(|current| current.leaving().next().is_some());
        if self.kernel.as_ref().is_some_and(leaving) {
            self.look_at.get_or_insert_with(|| Instant::now() + LOOK);
        }
    }

    /// Lets those go who have no connections left.
    fn look(&mut self) {
        let Some(kernel) = &self.kernel else { return };
        let some: Vec<Virtual> =
            kernel.iter().filter(|(_, current)| current.leaving().next().is_some()).map(|(at, _)| *at).collect();
        let mut requests = Vec::new();
        for at in some {
            let held = match self.system.destinations(at) {
                Ok(held) => held,
                Err(error) => {
                    tracing::warn!(%error, ?at, "IPVS cannot be asked for connections");
                    continue;
                }
            };
            let Some(current) = self.kernel.as_ref().and_then(|kernel| kernel.get(&at)) else { continue };
            requests.extend(servers::departed(at, current, &held, self.wanted.contains_key(&at)));
        }
        let mut report = Report::default();
        self.run(&requests, &mut report);
        self.leave(&[], &mut report);
        if !requests.is_empty() {
            self.note(&mut report);
        }
    }

    /// Whether an address has come to somebody else, or back from them. That is nobody's alteration of ours.
    fn is_other_than_thought(&mut self) -> io::Result<bool> {
        let mut now = self.around.clone();
        now.look(self.system.others()?, self.system.neighbours()?);
        now.backends = around::backends(&now.load_balancers, self.sets());
        let is_bound = |addr: &IpAddr| self.bound.contains(addr);
        let differs = |(frontend, claim): (&Frontend, &Claim)| {
            asks_whose(&claim.spec) && now.held(frontend, &claim.spec, is_bound) != Ok(claim.held)
        };
        let is_free = |(frontend, spec): (&Frontend, &Arc<FrontendSpec>)| now.held(frontend, spec, is_bound).is_ok();
        Ok(self.by_frontend.iter().any(differs) || self.refused.iter().any(is_free))
    }

    /// What is wrong with our servers and their backends.
    fn compare(&mut self, drift: &mut Drift) -> Result<(), DataplaneError> {
        let asking = |source| DataplaneError::Kernel { what: "IPVS".into(), source };
        let Some(kernel) = self.kernel.clone() else {
            // It failed, and that is known.
            drift.unfinished = true;
            return Ok(());
        };
        let services: BTreeMap<Virtual, codec::Service> =
            self.system.services().map_err(asking)?.into_iter().map(|service| (service.at, service)).collect();
        let mut wrong: BTreeSet<Virtual> = kernel
            .iter()
            .filter(|(at, current)| services.get(at) != Some(&current.service))
            .map(|(at, _)| *at)
            .collect();
        if wrong.is_empty() && self.compare_at <= Instant::now() {
            let start = Instant::now();
            for (at, current) in &kernel {
                let held = self.system.destinations(*at).map_err(asking)?;
                if Current::of(current.service.clone(), &held) != *current {
                    wrong.insert(*at);
                }
            }
            self.compare_at = Instant::now() + start.elapsed() * SHARE;
        }
        if !wrong.is_empty() {
            self.kernel = None;
        }
        for at in wrong {
            match self.wanted.get(&at) {
                Some((_, frontend)) => drift.frontends.push(*frontend),
                None => drift.hooks.push(format!("{at:?}")),
            }
        }
        Ok(())
    }
}

/// Whether it matters who else has its address.
fn asks_whose(spec: &FrontendSpec) -> bool {
    let Verdicts { pod, node, external } = spec.verdicts;
    let is_left = [pod, node, external].iter().all(|verdict| verdict.action == Action::Pass);
    is_left || matches!(spec.kind, FrontendKind::ExternalIp | FrontendKind::LoadBalancer)
}

fn load_balancers(frontends: &BTreeMap<Frontend, Arc<FrontendSpec>>) -> BTreeSet<IpAddr> {
    let all = frontends.iter().filter(|(_, spec)| spec.kind == FrontendKind::LoadBalancer);
    all.map(|(frontend, _)| frontend.addr).collect()
}

/// What an agent has noted as its own.
struct Noted(Vec<(Family, Servers)>);

impl Noted {
    fn has(&self, at: &Virtual) -> bool {
        let of = |servers: &Servers| match at {
            Virtual::At { .. } => key(at).is_some_and(|key| servers.at.contains(&key)),
            Virtual::Marked { mark, .. } => servers.marks.contains(mark),
        };
        self.0.iter().any(|(family, servers)| *family == at.family() && of(servers))
    }
}

/// As the table has it.
fn key(at: &Virtual) -> Option<String> {
    match at {
        Virtual::At { addr, port, protocol } => {
            let port = crate::model::Port::new(*port)?;
            Some(Nftables::key(&Frontend { addr: *addr, port, protocol: *protocol }))
        }
        Virtual::Marked { .. } => None,
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

/// Servers, addresses and settings, then the table, which says whose the servers are.
fn remove(options: &Options) -> Result<(), DataplaneError> {
    let kernel = |what: &str| {
        let what = what.to_owned();
        move |source| DataplaneError::Kernel { what, source }
    };
    let has_table = !Nftables::remains_of(Role::Gate)?.is_empty();
    let route = Route::open().map_err(kernel("rtnetlink"))?;
    // One that is no dummy is somebody else's.
    let device = route.device().map_err(kernel(device::NAME))?.filter(|device| device.is_dummy);
    let bound = match &device {
        Some(device) => route.addresses(device.index).map_err(kernel(device::NAME))?,
        None => BTreeSet::new(),
    };
    let noted = Noted(if has_table { Nftables::noted_by(Role::Gate, options)? } else { Vec::new() });
    if has_table || device.is_some() {
        let mut socket = Socket::open().map_err(no_ipvs)?;
        let services = socket.services().map_err(kernel("IPVS"))?;
        let ours = services
            .iter()
            .map(|service| service.at)
            .filter(|at| noted.has(at) || matches!(at, Virtual::At { addr, .. } if bound.contains(addr)));
        let requests: Vec<Request> = ours.map(Request::Remove).collect();
        for outcome in socket.run(&requests).map_err(kernel("IPVS"))? {
            match outcome {
                // Somebody else was faster.
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
                outcome => outcome.map_err(kernel("a virtual server"))?,
            }
        }
    }
    if let Some(Device { index, alias, .. }) = device {
        sysctl::HERE.restore(&alias).map_err(kernel("net/ipv4/vs"))?;
        route.remove(index).map_err(kernel(device::NAME))?;
    }
    if has_table { Nftables::remove_tables(Role::Gate) } else { Ok(()) }
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
