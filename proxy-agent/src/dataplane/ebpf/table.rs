//! Brings the frontends in the kernel to what is desired, one atomic step a frontend. Owns ids, ranges and the shadow of what
//! was written; never attaches anything.
//!
//! ```text
//! Table ─┬─ Services (ids)            the steps of a change, and their order
//!        └─ Half, one a family        the shadow, entry by entry
//!             └─ Ranges               slots: who holds what, what is free
//! ```
//!
//! ```text
//! set:     id + name ─► fresh slots ─► one write to `frontends` ─► old slots and ids come to rest
//! remove:  delete from `frontends` ─► slots come to rest, name and counters go
//! ```
//!
//! INVARIANT: slots, then frontends, then removals. Whatever instant the process dies at, every frontend in the kernel points at
//! slots that hold backends of its own Service, and nobody writes to slots that a frontend points at.
//!
//! INVARIANT: the shadow records what landed, nothing that was merely tried; so a retry is the same call again.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::IpAddr,
    sync::Arc,
    time::Duration,
};

use ipnet::IpNet;
use proxy_common::{Ipv4Be, Ipv6Be, affinity::is_expired, frontend::FrontendKey, meta::ServiceName};

use super::{
    family::Family,
    render::{self, Reach},
    services::{Acquired, MAX_ID, Name, Services},
    store::{Store, StoreError},
};
use crate::{
    dataplane::{self, Drift, Failure, Report},
    desired::{Changes, DesiredState, Frontend, FrontendSpec},
    model::ServiceKey,
};

mod half;
mod ranges;
mod sources;

use half::{Amiss, Asked, Half, Pending, Prepared, What, frontend_of};

/// How often clients whose time is over are forgotten; the programs take no notice of them in any case.
const PRUNE_EVERY: Duration = Duration::from_secs(60);

enum Refused {
    Unsupported(String),
    Retry(String),
}

impl From<StoreError> for Refused {
    fn from(error: StoreError) -> Self {
        Self::Retry(error.to_string())
    }
}

impl Refused {
    fn of(self, object: impl std::fmt::Display) -> Failure {
        match self {
            Self::Unsupported(why) => Failure::Unsupported(format!("{object}: {why}")),
            Self::Retry(why) => Failure::Retry(format!("{object}: {why}")),
        }
    }
}

/// The whole table over one store.
#[derive(Debug)]
pub(crate) struct Table<S> {
    store: S,
    rest: Duration,
    services: Services,
    v4: Half<Ipv4Be>,
    v6: Half<Ipv6Be>,
    adopted: bool,
    /// When affinity entries are looked through next.
    prune_at: Duration,
    /// Services (`namespace/name`) whose frontends stay as they are.
    held: BTreeSet<String>,
    reach: Reach,
    /// Addresses that tell a pod, as they landed; `None`: not known to be right.
    local_cidrs: Option<BTreeSet<IpNet>>,
    /// Those of a former process stay as they are: its programs ask for them until ours have taken their place.
    leaves_local_cidrs: bool,
}

/// Keys to delete beyond those that `Changes` name.
#[derive(Default)]
struct Strays {
    v4: Vec<FrontendKey<Ipv4Be>>,
    v6: Vec<FrontendKey<Ipv6Be>>,
    /// Names that no frontend carries.
    names: Vec<u32>,
}

impl<S: Store> Table<S> {
    pub(crate) fn new(store: S, rest: Duration) -> Self {
        let (v4, v6) = (Half::new(store.slots::<Ipv4Be>(), rest), Half::new(store.slots::<Ipv6Be>(), rest));
        Self {
            store,
            rest,
            services: Services::new(rest),
            v4,
            v6,
            adopted: false,
            held: BTreeSet::new(),
            prune_at: Duration::ZERO,
            reach: Reach::default(),
            local_cidrs: None,
            leaves_local_cidrs: false,
        }
    }

    /// How connections of pods are reset where that is asked for.
    pub(crate) fn resetting_by(self, reach: Reach) -> Self {
        Self { reach, ..self }
    }

    /// For programs that tell pods by their devices: what others go by is left until [`clear_local_cidrs`](Self::clear_local_cidrs).
    pub(crate) fn leaving_local_cidrs(self, leaves_local_cidrs: bool) -> Self {
        Self { leaves_local_cidrs, ..self }
    }

    /// Nobody asks for them any more.
    pub(crate) fn clear_local_cidrs(&mut self) -> Result<(), StoreError> {
        if !self.leaves_local_cidrs {
            return Ok(());
        }
        self.set_local_cidrs(&BTreeSet::new())?;
        self.leaves_local_cidrs = false;
        Ok(())
    }

    #[cfg(test)]
    pub(crate) const fn store(&self) -> &S {
        &self.store
    }

    pub(crate) const fn store_mut(&mut self) -> &mut S {
        &mut self.store
    }

    pub(crate) fn resync(&mut self, desired: &DesiredState, now: Duration) -> Report {
        let before = self.store.writes();
        let looked = if self.adopted { self.recheck(now) } else { self.adopt(now) };
        let mut report = match looked {
            Ok(strays) => {
                let changes = self.towards(desired);
                self.carry_out(&changes, strays, now)
            }
            Err(error) => {
                // Without knowing what is there nothing is safe to write.
                let fail = |what: String| Failure::Retry(format!("{what}: cannot read the kernel's state: {error}"));
                Report {
                    failed: desired.frontends.keys().map(|f| (*f, fail(format!("frontend {f}")))).collect(),
                    failed_guards: desired.guards.iter().map(|a| (*a, fail(format!("guard of {a}")))).collect(),
                    ..Default::default()
                }
            }
        };
        report.writes = self.store.writes() - before;
        report
    }

    pub(crate) fn apply(&mut self, changes: &Changes, now: Duration) -> Report {
        let before = self.store.writes();
        let strays = if self.adopted { Ok(Strays::default()) } else { self.adopt(now) };
        let mut report = match strays {
            Ok(strays) => self.carry_out(changes, strays, now),
            Err(error) => {
                let fail =
                    |f: &Frontend| Failure::Retry(format!("frontend {f}: cannot read the kernel's state: {error}"));
                Report {
                    failed: changes.set.keys().chain(&changes.remove).map(|f| (*f, fail(f))).collect(),
                    ..Default::default()
                }
            }
        };
        report.writes = self.store.writes() - before;
        report
    }

    /// The kernel has no frontend and no guard.
    pub(crate) fn is_out_of_force(&self) -> bool {
        self.store.frontends::<Ipv4Be>().is_ok_and(|v4| v4.is_empty())
            && self.store.frontends::<Ipv6Be>().is_ok_and(|v6| v6.is_empty())
    }

    /// See [`dataplane::Dataplane::hold`].
    pub(crate) fn hold(&mut self, services: &BTreeSet<ServiceKey>) {
        self.held = services.iter().map(ToString::to_string).collect();
    }

    /// Strikes what is held from `changes`.
    fn spare(&self, changes: &mut Changes, report: &mut Report) {
        let mut spare = |service: u32, frontend: Option<Frontend>| {
            let name = self.services.name(service).and_then(|name| name.name.split(':').next());
            let (Some(frontend), Some(name)) = (frontend, name) else { return };
            if self.held.contains(name) {
                if changes.set.remove(&frontend).is_some() || changes.remove.remove(&frontend) {
                    report.failed.insert(frontend, dataplane::held(&frontend));
                }
                changes.unguard.remove(&frontend.addr);
            }
        };
        for (key, value) in &self.v4.shadow {
            spare(value.service, frontend_of(key));
        }
        for (key, value) in &self.v6.shadow {
            spare(value.service, frontend_of(key));
        }
    }

    /// Everything desired, and the removal of everything else the shadow holds.
    fn towards(&self, desired: &DesiredState) -> Changes {
        let DesiredState { frontends, guards, local_cidrs, left_pods: _ } = desired;
        let mut changes = Changes {
            set: frontends.clone(),
            guard: guards.clone(),
            local_cidrs: Some(local_cidrs.clone()),
            ..Default::default()
        };
        let mut excess = |addr: IpAddr, frontend: Option<Frontend>| match frontend {
            Some(frontend) if !frontends.contains_key(&frontend) => {
                changes.remove.insert(frontend);
            }
            None if !guards.contains(&addr) => {
                changes.unguard.insert(addr);
            }
            _ => {}
        };
        for key in self.v4.shadow.keys() {
            excess(proxy_common::Address::to_ip(key.addr), frontend_of(key));
        }
        for key in self.v6.shadow.keys() {
            excess(proxy_common::Address::to_ip(key.addr), frontend_of(key));
        }
        changes
    }

    fn carry_out(&mut self, changes: &Changes, strays: Strays, now: Duration) -> Report {
        let mut report = Report::default();
        let mut changes = std::borrow::Cow::Borrowed(changes);
        if !self.held.is_empty() {
            self.spare(changes.to_mut(), &mut report);
        }
        let Changes { set, remove, guard, unguard, local_cidrs, left_pods: _ } = &*changes;
        if let Some(local_cidrs) = local_cidrs
            && !self.leaves_local_cidrs
        {
            let error = self.set_local_cidrs(local_cidrs).err();
            report.failed_local_cidrs =
                error.map(|error| Failure::Retry(format!("addresses that tell a pod of this node: {error}")));
        }
        // INVARIANT: slots, then frontends, then removals (see the head of this file).
        self.set::<Ipv4Be>(set, guard, &mut report, now);
        self.set::<Ipv6Be>(set, guard, &mut report, now);
        let Strays { v4, v6, names } = strays;
        self.unset::<Ipv4Be>(remove, unguard, v4, &mut report, now);
        self.unset::<Ipv6Be>(remove, unguard, v6, &mut report, now);
        let Self { store, v4, v6, .. } = self;
        v4.sweep_sources(store, &mut report);
        v6.sweep_sources(store, &mut report);
        self.reap(names, now);
        report
    }

    /// Brings exactly these in. What is new comes first: where two overlap, nobody is outside for a moment.
    fn set_local_cidrs(&mut self, wanted: &BTreeSet<IpNet>) -> Result<(), StoreError> {
        self.local_cidrs = None;
        let present = self.store.local_cidrs()?;
        for cidr in wanted.difference(&present) {
            self.store.put_local_cidr(*cidr)?;
        }
        for cidr in present.difference(wanted) {
            self.store.remove_local_cidr(*cidr)?;
        }
        self.local_cidrs = Some(wanted.clone());
        Ok(())
    }

    fn half<A: HalfOf>(&mut self) -> (&mut S, &mut Services, &mut Half<A>) {
        let Self { store, services, v4, v6, .. } = self;
        (store, services, A::pick(v4, v6))
    }

    fn set<A: HalfOf>(
        &mut self,
        set: &BTreeMap<Frontend, Arc<FrontendSpec>>,
        guard: &BTreeSet<IpAddr>,
        report: &mut Report,
        now: Duration,
    ) {
        let mut pending = vec![];
        for (frontend, spec) in set {
            let Some(key) = render::key::<A>(frontend) else { continue };
            match self.prepare::<A>(key, spec, now) {
                Ok(Some((value, sources))) => {
                    pending.push(Pending { key, value, what: What::Frontend(*frontend), sources });
                }
                Ok(None) => {}
                Err(refused) => {
                    report.failed.insert(*frontend, refused.of(format_args!("frontend {frontend}")));
                }
            }
        }
        // Guards last: the port of a frontend is never refused for the moment until its own entry is there.
        for addr in guard {
            let Some(key) = A::from_ip(*addr).map(FrontendKey::guard) else { continue };
            let value = render::guard(&key);
            let (_, _, half) = self.half::<A>();
            if half.shadow.get(&key) != Some(&value) {
                pending.push(Pending { key, value, what: What::Guard(*addr), sources: None });
            }
        }
        let (store, services, half) = self.half::<A>();
        half.commit(store, services, &pending, report, now);
    }

    fn prepare<A: HalfOf>(
        &mut self,
        key: FrontendKey<A>,
        spec: &FrontendSpec,
        now: Duration,
    ) -> Result<Option<Prepared<A>>, Refused> {
        let reach = self.reach;
        let (store, services, half) = self.half::<A>();
        let name = Name { name: spec.service.to_string(), protocol: spec.service.protocol };
        let service = match services.acquire(&name) {
            Acquired::Known(id) => id,
            Acquired::Unnamed(id) => {
                // A new id that got no name is idle and goes at the end of this change.
                store.put_name(id, &ServiceName::new(&name.name))?;
                services.named(id);
                id
            }
        };
        if spec.affinity_secs.is_some() {
            services.remembers(service);
        }
        half.prepare(store, Asked { key, spec, service, reach }, now)
    }

    fn unset<A: HalfOf>(
        &mut self,
        remove: &BTreeSet<Frontend>,
        unguard: &BTreeSet<IpAddr>,
        strays: Vec<FrontendKey<A>>,
        report: &mut Report,
        now: Duration,
    ) {
        let (store, services, half) = self.half::<A>();
        let frontends = remove.iter().filter_map(|f| Some((render::key::<A>(f)?, What::Frontend(*f))));
        let guards = unguard.iter().filter_map(|a| Some((FrontendKey::guard(A::from_ip(*a)?), What::Guard(*a))));
        let known: Vec<_> = frontends.chain(guards).filter(|(key, _)| half.shadow.contains_key(key)).collect();
        // Entries that made no sense and were not overwritten just now. What could not be overwritten stays: a retry will.
        let strays = strays.into_iter().filter(|key| {
            let failed = frontend_of(key).is_some_and(|f| report.failed.contains_key(&f));
            let failed_guard = key.is_guard() && report.failed_guards.contains_key(&key.addr.to_ip());
            !half.shadow.contains_key(key) && !failed && !failed_guard
        });
        let keys: Vec<_> = known.iter().map(|(key, _)| *key).chain(strays).collect();
        if let Err(error) = half.remove(store, services, &keys, now) {
            for (_, what) in known {
                match what {
                    What::Frontend(f) => {
                        report.failed.insert(f, Failure::Retry(format!("frontend {f}: cannot be removed: {error}")))
                    }
                    What::Guard(a) => report
                        .failed_guards
                        .insert(a, Failure::Retry(format!("guard of {a}: cannot be removed: {error}"))),
                };
            }
        }
    }

    /// Names and counters of services that no frontend carries any more.
    fn reap(&mut self, strays: Vec<u32>, now: Duration) {
        let Self { store, services, .. } = self;
        let mut gone = services.idle();
        gone.extend(strays.into_iter().filter(|id| !services.contains(*id)));
        for id in gone {
            // The name goes last: as long as it is there the id is the service's, here and for the next process. What cannot be
            // removed now is found idle again at the next change.
            if store.remove_counters(id).and_then(|()| store.remove_name(id)).is_ok() {
                services.reap(id, now);
            }
        }
    }

    fn adopt(&mut self, now: Duration) -> Result<Strays, StoreError> {
        let rest = self.rest;
        // From scratch: an earlier attempt may have failed half-way.
        *self.services_mut() = Services::new(rest);
        self.v4 = Half::new(self.store.slots::<Ipv4Be>(), rest);
        self.v6 = Half::new(self.store.slots::<Ipv6Be>(), rest);
        let Self { store, services, v4, v6, adopted, .. } = self;
        let names: HashMap<u32, String> =
            store.names()?.into_iter().map(|(id, name)| (id, name.as_str().to_owned())).collect();
        let strays4 = v4.adopt(store, services, &names, rest, now)?;
        let strays6 = v6.adopt(store, services, &names, rest, now)?;
        services.adopted(names.keys().copied().filter(|id| *id < MAX_ID), now);
        for value in v4.shadow.values().chain(v6.shadow.values()).filter(|value| value.affinity_secs != 0) {
            services.remembers(value.service);
        }
        let known: HashSet<u32> = services.iter().map(|(id, _)| id).collect();
        // The highest ids may be given again at once, if nothing tells that they were in use: who took one over would inherit its clients.
        store.prune_affinity(&|id, _| !known.contains(&id))?;
        *adopted = true;
        Ok(Strays { v4: strays4, v6: strays6, names: names.into_keys().filter(|id| !known.contains(id)).collect() })
    }

    const fn services_mut(&mut self) -> &mut Services {
        &mut self.services
    }

    /// Strikes what is amiss from the shadow, so that it is written anew.
    fn recheck(&mut self, now: Duration) -> Result<Strays, StoreError> {
        let Self { store, services, v4, v6, .. } = self;
        let amiss4 = v4.compare(store)?;
        let amiss6 = v6.compare(store)?;
        for key in &amiss4.damaged {
            v4.forget(services, key, now);
        }
        for key in &amiss6.damaged {
            v6.forget(services, key, now);
        }
        v4.sources.recheck(store)?;
        v6.sources.recheck(store)?;
        let mut stored: HashMap<u32, ServiceName> = store.names()?.into_iter().collect();
        // Written with the frontends that carry it: where that fails it is their failure and nobody else's.
        let lost = services.iter().filter(|(id, name)| stored.remove(id) != Some(ServiceName::new(&name.name)));
        let lost: Vec<_> = lost.map(|(id, _)| id).collect();
        lost.into_iter().for_each(|id| services.lost_name(id));
        // A damaged entry is still in the kernel: deleted unless it is written anew.
        let strays = |damaged: Vec<_>, foreign: Vec<_>| damaged.into_iter().chain(foreign).collect();
        Ok(Strays {
            v4: strays(amiss4.damaged, amiss4.foreign),
            v6: amiss6.damaged.into_iter().chain(amiss6.foreign).collect(),
            names: stored.into_keys().collect(),
        })
    }

    /// Compares with the kernel; writes nothing.
    pub(crate) fn observe(&self) -> Result<Drift, StoreError> {
        let mut drift = Drift::default();
        if !self.adopted {
            return Ok(drift);
        }
        let mut note = |addr: IpAddr, frontend: Option<Frontend>| match frontend {
            Some(frontend) => drift.frontends.push(frontend),
            // A guard, or a key that no agent writes: its address says enough.
            None => drift.guards.push(addr),
        };
        let Amiss { damaged, foreign } = self.v4.compare(&self.store)?;
        for key in damaged.iter().chain(&foreign) {
            note(proxy_common::Address::to_ip(key.addr), frontend_of(key));
        }
        let Amiss { damaged, foreign } = self.v6.compare(&self.store)?;
        for key in damaged.iter().chain(&foreign) {
            note(proxy_common::Address::to_ip(key.addr), frontend_of(key));
        }
        drift.frontends.sort();
        drift.guards.sort();
        if let Some(local_cidrs) = &self.local_cidrs {
            drift.local_cidrs = self.store.local_cidrs()? != *local_cidrs;
        }
        Ok(drift)
    }

    /// Lets what has rested be used again; how long until there is more to do. `clock` is the programs' second.
    pub(crate) fn tick(&mut self, now: Duration, clock: u32) -> Option<Duration> {
        let next = [self.v4.ranges.settle(now), self.v6.ranges.settle(now), self.services.settle(now)];
        next.into_iter().chain([self.prune_affinity(now, clock)]).flatten().min()
    }

    /// Forgets the clients whose time is over, and those of services without affinity. Ids of those that had it come back only then: a Service
    /// that gets one inherits nobody's clients. Where no Service has affinity, changes do not wait for a walk over maps that are empty.
    fn prune_affinity(&mut self, now: Duration, clock: u32) -> Option<Duration> {
        if !self.adopted || !self.services.remember_somebody() {
            return None;
        }
        let waiting = self.services.waits();
        if !waiting && now < self.prune_at {
            return Some(self.prune_at - now);
        }
        let values = self.v4.shadow.values().chain(self.v6.shadow.values());
        let mut timeouts: HashMap<u32, u32> = HashMap::new();
        for value in values.filter(|value| value.affinity_secs != 0) {
            let longest = timeouts.entry(value.service).or_default();
            *longest = value.affinity_secs.max(*longest);
        }
        let is_over =
            |service: u32, seen: u32| timeouts.get(&service).is_none_or(|timeout| is_expired(seen, clock, *timeout));
        match self.store.prune_affinity(&is_over) {
            Ok(left) => {
                self.services.free_rested();
                self.prune_at = now + PRUNE_EVERY;
                (left > 0 || !timeouts.is_empty()).then_some(PRUNE_EVERY)
            }
            Err(error) => {
                tracing::warn!(%error, "clients that session affinity remembers cannot be looked through");
                Some(PRUNE_EVERY)
            }
        }
    }

    /// What is in force.
    pub(crate) fn frontends(&self) -> impl Iterator<Item = Frontend> {
        self.v4.shadow.keys().filter_map(frontend_of).chain(self.v6.shadow.keys().filter_map(frontend_of))
    }

    /// Entries in (frontends v4, frontends v6, slots v4, slots v6, names).
    pub(crate) fn used(&self) -> [u64; 5] {
        [
            self.v4.shadow.len() as u64,
            self.v6.shadow.len() as u64,
            u64::from(self.v4.ranges.used()),
            u64::from(self.v6.ranges.used()),
            self.services.len() as u64,
        ]
    }
}

/// Finds a family's half.
trait HalfOf: Family {
    fn pick<'a>(v4: &'a mut Half<Ipv4Be>, v6: &'a mut Half<Ipv6Be>) -> &'a mut Half<Self>;
}

impl HalfOf for Ipv4Be {
    fn pick<'a>(v4: &'a mut Half<Ipv4Be>, _: &'a mut Half<Ipv6Be>) -> &'a mut Half<Self> {
        v4
    }
}

impl HalfOf for Ipv6Be {
    fn pick<'a>(_: &'a mut Half<Ipv4Be>, v6: &'a mut Half<Ipv6Be>) -> &'a mut Half<Self> {
        v6
    }
}

#[cfg(test)]
mod tests;
