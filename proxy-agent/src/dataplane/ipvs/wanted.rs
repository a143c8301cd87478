//! What there should be of virtual servers and backends, and what brings it about.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    Claim, Ipvs,
    codec::{self, Request, Virtual},
    remedy,
    render::{Server, Stay},
    servers::{self, Current, Kernel},
};
use crate::{
    dataplane::{Dataplane, DataplaneError, Drift, Failure, Report},
    desired::{BackendSet, Changes, Frontend, FrontendSpec},
    model::{Port, Protocol},
};

/// Between two looks at who has no connections left.
const LOOK: Duration = Duration::from_secs(2);
/// Comparing destinations takes at most one part in so many of the time.
const SHARE: u32 = 100;

impl Ipvs {
    /// Backends of all frontends, served or not.
    pub(super) fn sets(&self) -> impl Iterator<Item = &BackendSet> {
        let all = self.by_frontend.values().map(|claim| &claim.spec).chain(self.refused.values());
        all.map(|spec| &spec.all)
    }

    /// Whether the frontend can have its servers: one whose mark is another's is told apart by nothing.
    pub(super) fn want(&mut self, frontend: &Frontend, spec: &Arc<FrontendSpec>) -> Result<(), Failure> {
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
    pub(super) fn forget(&mut self, frontend: &Frontend) -> Vec<Virtual> {
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

    /// Frontends that the table did not take: source ranges, traffic policies and masquerading are not in force for them, so nobody is
    /// served. What an earlier change left there serves on, as it was.
    pub(super) fn closed(&self, failed: &BTreeMap<Frontend, Failure>) -> BTreeSet<Frontend> {
        let is_served = |frontend: &Frontend| {
            let servers = self.by_frontend.get(frontend).into_iter().flat_map(|claim| &claim.servers);
            let mut current = servers.filter_map(|at| self.kernel.as_ref()?.get(at));
            current.any(|current| current.destinations.values().any(|weight| *weight != Some(0)))
        };
        let stands = |frontend: &Frontend| self.gate.stands(frontend).unwrap_or_else(|| is_served(frontend));
        failed.keys().filter(|frontend| !stands(frontend)).copied().collect()
    }

    /// What brings a server about. One whose frontend is `closed` has nobody to choose.
    pub(super) fn requests(&self, at: Virtual, closed: &BTreeSet<Frontend>) -> Vec<Request> {
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
    pub(super) fn otherwise(&self, at: &Virtual) -> Stay {
        let Virtual::At { addr, port, protocol } = *at else { return Stay::All };
        let frontend = Port::new(port).map(|port| Frontend { addr, port, protocol });
        // It may be there, and choose nobody at the moment (contract A104).
        let alive = frontend.and_then(|frontend| self.by_frontend.get(&frontend)?.spec.alive.clone());
        match alive {
            Some(alive) if protocol == Protocol::Udp => Stay::Only(alive),
            _ => Stay::without_frontend(protocol),
        }
    }

    /// Servers that are not there yet, with nobody to choose: what comes for them is refused until the table is there. But one that is found by a
    /// mark has all of its backends, for without the table nobody has that mark, and with it everybody has at once. And what is found by
    /// the address beside it turns before the table lets those in whom it alone is for.
    pub(super) fn begin(&mut self, all: &[Virtual], report: &mut Report) {
        let Some(kernel) = &self.kernel else { return };
        let none = BTreeSet::new();
        let mut requests = Vec::new();
        for at in all.iter().filter(|at| !kernel.contains_key(at)) {
            let Some((server, frontend)) = self.wanted.get(at) else { continue };
            match at {
                Virtual::At { .. } => requests.push(Request::Add(server.service.clone())),
                Virtual::Marked { .. } => {
                    let beside = self.by_frontend.get(frontend).into_iter().flat_map(|claim| &claim.servers);
                    let there = beside.filter(|one| kernel.contains_key(one));
                    requests.extend(there.chain([at]).flat_map(|one| self.requests(*one, &none)));
                }
            }
        }
        self.run(&requests, report);
    }

    /// Carries them out; what fails is told of the frontend that it is for, and concerns nobody else.
    pub(super) fn run(&mut self, requests: &[Request], report: &mut Report) {
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
    pub(super) fn read_again(&mut self, at: Virtual) {
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

    /// What is not wanted any more, once nobody is sent there.
    pub(super) fn leave(&mut self, all: &[Virtual], report: &mut Report) {
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
    pub(super) fn look(&mut self) {
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

    /// What is wrong with our servers and their backends.
    pub(super) fn compare(&mut self, drift: &mut Drift) -> Result<(), DataplaneError> {
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
