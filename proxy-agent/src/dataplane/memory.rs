//! A dataplane without a kernel: holds the desired state, and fails where it is told to. For tests of the loop, and for
//! whatever wants the loop without its effects.
//!
//! [`Kernel`] stands for what outlives the agent: a test keeps it, alters it behind the agent's back, and hands it to the
//! next agent as a restart would.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use super::{Capabilities, Dataplane, DataplaneError, Drift, Failure, Fill, Hook, Report};
use crate::{
    desired::{Algorithm, Changes, DesiredState, Devices, Frontend},
    model::{Protocol, ServiceKey},
};

/// What goes wrong.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    /// Writes of these frontends fail.
    pub frontends: BTreeMap<Frontend, Failure>,
    /// With the first of them all that is in force is lost, as of a table that is made anew.
    pub together: bool,
    /// Something that failed is still to be brought about.
    pub unfinished: bool,
    /// Attaching to these devices (by name) fails.
    pub devices: BTreeMap<String, Failure>,
    /// Served without XDP (by name).
    pub without_xdp: BTreeMap<String, Failure>,
    /// Every so many writes one fails; 0: none.
    pub every: u64,
    /// After so many writes nothing is written any more, as if the agent had died there.
    pub crash_after: Option<u64>,
    /// No more frontends than this.
    pub capacity: Option<usize>,
    /// `activate` fails.
    pub activate: bool,
    /// Each call takes at least this long, or only those of the method that `slow_call` names.
    pub slow: Duration,
    pub slow_call: Option<&'static str>,
    /// Housekeeping wants to be done so often.
    pub tick: Option<Duration>,
}

/// What a dataplane may not have.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Lack {
    Protocol(Protocol),
    Affinity,
    Algorithm(Algorithm),
}

/// What the kernel would hold.
#[derive(Debug, Default)]
pub struct State {
    pub desired: DesiredState,
    pub devices: Devices,
    pub active: bool,
    /// Writes that took effect.
    pub writes: u64,
    /// Writes that were tried, failed ones included.
    pub tried: u64,
    /// Calls of `resync`, `apply` and `set_devices`, by name, in order.
    pub calls: Vec<&'static str>,
    pub faults: Faults,
    /// Calls of `wait`.
    pub waits: u64,
    /// Calls of `in_force`.
    pub in_force: u64,
    /// As long as nothing is in force.
    pub hooks_first: bool,
    /// Of what there usually is.
    pub lacks: Vec<Lack>,
}

/// A shared handle on the state that outlives a [`Memory`].
#[derive(Clone, Debug, Default)]
pub struct Kernel(Arc<Mutex<State>>);

impl Kernel {
    /// A panic elsewhere leaves the state as it was; it holds no invariants that could break.
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// One write; `None` if it takes effect.
    fn fault(&mut self) -> Option<Failure> {
        if self.faults.crash_after.is_some_and(|writes| self.writes >= writes) {
            return Some(Failure::Retry("dead".into()));
        }
        self.tried += 1;
        if self.faults.every != 0 && self.tried.is_multiple_of(self.faults.every) {
            return Some(Failure::Retry(format!("write {} fails on purpose", self.tried)));
        }
        self.writes += 1;
        None
    }

    fn frontend_fault(&mut self, frontend: &Frontend, adds: bool) -> Option<Failure> {
        if let Some(failure) = self.faults.frontends.get(frontend) {
            return Some(failure.clone());
        }
        let full = self.faults.capacity.filter(|capacity| self.desired.frontends.len() >= *capacity);
        match full {
            Some(capacity) if adds => Some(Failure::Retry(format!(
                "frontend {frontend}: the frontends table is full ({capacity}); there is no option to raise it"
            ))),
            _ => self.fault(),
        }
    }

    fn carry_out(&mut self, changes: &Changes, held: &BTreeSet<ServiceKey>) -> Report {
        let Changes { mut set, mut remove, guard, mut unguard, local_cidrs, left_pods } = changes.clone();
        let mut report = Report::default();
        for (frontend, _) in self.desired.frontends.iter().filter(|(_, spec)| held.contains(&spec.service.service)) {
            if set.remove(frontend).is_some() || remove.remove(frontend) {
                report.failed.insert(*frontend, super::held(frontend));
            }
            unguard.remove(&frontend.addr);
        }
        let (set, remove) = (&set, &remove);
        let before = self.writes;
        for frontend in remove {
            if self.desired.frontends.contains_key(frontend) {
                match self.frontend_fault(frontend, false) {
                    Some(failure) => drop(report.failed.insert(*frontend, failure)),
                    None => drop(self.desired.frontends.remove(frontend)),
                }
            }
        }
        for (frontend, spec) in set {
            let known = self.desired.frontends.get(frontend);
            if known != Some(spec) {
                match self.frontend_fault(frontend, known.is_none()) {
                    Some(failure) => drop(report.failed.insert(*frontend, failure)),
                    None => drop(self.desired.frontends.insert(*frontend, Arc::clone(spec))),
                }
            }
        }
        if let Some(failure) = report.failed.values().next().filter(|_| self.faults.together).cloned() {
            let lost = std::mem::take(&mut self.desired.frontends);
            report.failed.extend(lost.into_keys().map(|frontend| (frontend, failure.clone())));
        }
        for (addrs, wanted) in [(&guard, true), (&unguard, false)] {
            for addr in
                addrs.iter().filter(|addr| self.desired.guards.contains(*addr) != wanted).copied().collect::<Vec<_>>()
            {
                match self.fault() {
                    Some(failure) => drop(report.failed_guards.insert(addr, failure)),
                    None => self.set_guard(addr, wanted),
                }
            }
        }
        if let Some(local_cidrs) = local_cidrs
            && self.desired.local_cidrs != local_cidrs
        {
            match self.fault() {
                Some(failure) => report.failed_local_cidrs = Some(failure),
                None => self.desired.local_cidrs = local_cidrs,
            }
        }
        // Goes on by itself until it is done: see `Dataplane::unplaced`.
        if let Some(left_pods) = left_pods {
            self.desired.left_pods = Some(left_pods);
        }
        report.writes = self.writes - before;
        report
    }

    fn set_guard(&mut self, addr: IpAddr, wanted: bool) {
        if wanted {
            self.desired.guards.insert(addr);
        } else {
            self.desired.guards.remove(&addr);
        }
    }
}

/// See the module.
pub struct Memory {
    kernel: Kernel,
    /// What this agent believes it programmed; `observe` compares the kernel with it.
    believed: DesiredState,
    held: BTreeSet<ServiceKey>,
}

impl Memory {
    pub fn new(kernel: Kernel) -> Self {
        Self { kernel, believed: DesiredState::default(), held: BTreeSet::new() }
    }

    /// Takes as long as `name` is to take.
    fn entered(&self, name: &'static str) -> MutexGuard<'_, State> {
        let Faults { slow, slow_call, .. } = self.kernel.state().faults;
        if !slow.is_zero() && slow_call.is_none_or(|call| call == name) {
            std::thread::sleep(slow);
        }
        self.kernel.state()
    }

    fn call(&self, name: &'static str) -> MutexGuard<'_, State> {
        let mut state = self.entered(name);
        state.calls.push(name);
        state
    }
}

impl Dataplane for Memory {
    fn capabilities(&self) -> Capabilities {
        let lacks = self.kernel.state().lacks.clone();
        let mut protocols = vec![Protocol::Tcp, Protocol::Udp, Protocol::Sctp];
        protocols.retain(|protocol| !lacks.contains(&Lack::Protocol(*protocol)));
        let mut algorithms = vec![Algorithm::Random, Algorithm::RoundRobin, Algorithm::Maglev];
        algorithms.retain(|algorithm| !lacks.contains(&Lack::Algorithm(*algorithm)));
        Capabilities {
            name: "memory",
            protocols,
            affinity: !lacks.contains(&Lack::Affinity),
            algorithms,
            otherwise: Algorithm::Random,
            turns_restart: None,
            loopback: true,
            resets: true,
            affinity_clients: None,
            affinity_apart: false,
        }
    }

    fn resync(&mut self, desired: &DesiredState) -> Report {
        let mut state = self.call("resync");
        let changes = state.desired.diff(desired);
        let report = state.carry_out(&changes, &self.held);
        let believed = state.desired.clone();
        drop(state);
        self.believed = believed;
        report
    }

    fn hold(&mut self, services: &BTreeSet<ServiceKey>) {
        self.held.clone_from(services);
    }

    fn apply(&mut self, changes: &Changes) -> Report {
        let mut state = self.call("apply");
        let report = state.carry_out(changes, &self.held);
        drop(state);
        let Report { failed, failed_guards, failed_devices: _, without_xdp: _, failed_local_cidrs, writes: _ } =
            &report;
        let mut done = changes.clone();
        done.set.retain(|frontend, _| !failed.contains_key(frontend));
        done.remove.retain(|frontend| !failed.contains_key(frontend));
        done.guard.retain(|addr| !failed_guards.contains_key(addr));
        done.unguard.retain(|addr| !failed_guards.contains_key(addr));
        if failed_local_cidrs.is_some() {
            done.local_cidrs = None;
        }
        self.believed.apply(&done);
        report
    }

    fn wait(&mut self) {
        self.kernel.state().waits += 1;
    }

    fn hooks_first(&self) -> bool {
        let state = self.kernel.state();
        state.hooks_first && state.desired.frontends.is_empty()
    }

    fn in_force(&mut self) {
        self.kernel.state().in_force += 1;
    }

    fn set_devices(&mut self, devices: &Devices) -> Report {
        let mut state = self.call("set_devices");
        let faults = state.faults.devices.clone();
        state.devices = devices.clone();
        state.devices.retain(|_, device| !faults.contains_key(&device.name));
        let failed_devices = faults.into_iter().filter(|(name, _)| devices.values().any(|d| d.name == *name)).collect();
        Report { failed_devices, without_xdp: state.faults.without_xdp.clone(), ..Report::default() }
    }

    fn activate(&mut self) -> Result<(), DataplaneError> {
        let mut state = self.call("activate");
        if state.faults.activate {
            return Err(DataplaneError::Unavailable("hooks: attaching fails on purpose".into()));
        }
        state.active = true;
        Ok(())
    }

    fn observe(&mut self) -> Result<Drift, DataplaneError> {
        let state = self.entered("observe");
        let Changes { set, remove, guard, unguard, local_cidrs, left_pods: _ } = state.desired.diff(&self.believed);
        Ok(Drift {
            frontends: set.into_keys().chain(remove).collect(),
            guards: guard.into_iter().chain(unguard).collect(),
            local_cidrs: local_cidrs.is_some(),
            hooks: (!state.active).then(|| hook().name()).into_iter().collect(),
            unfinished: state.faults.unfinished,
        })
    }

    fn tick(&mut self) -> Option<Duration> {
        self.entered("tick").faults.tick
    }

    fn teardown(&mut self) -> Result<(), DataplaneError> {
        let mut state = self.kernel.state();
        state.desired = DesiredState::default();
        state.devices.clear();
        state.active = false;
        Ok(())
    }

    fn fill(&self) -> Vec<Fill> {
        let state = self.entered("fill");
        let fill = |map: &str, entries: usize, capacity| Fill {
            map: map.into(),
            entries: u64::try_from(entries).unwrap_or(u64::MAX),
            capacity,
            option: "",
        };
        let capacity = state.faults.capacity.and_then(|capacity| u64::try_from(capacity).ok()).unwrap_or(u64::MAX);
        vec![fill("frontends", state.desired.frontends.len(), capacity)]
    }

    fn hooks(&self) -> Vec<Hook> {
        self.kernel.state().active.then(hook).into_iter().collect()
    }

    fn lost_hooks(&self) -> Vec<String> {
        (!self.kernel.state().active).then(|| hook().name()).into_iter().collect()
    }
}

/// The one that there is.
fn hook() -> Hook {
    Hook { kind: "memory".into(), target: "hook".into(), program: "none".into() }
}
