//! Brings the frontends in the kernel to what is desired, one atomic step a frontend. Owns ids, ranges and the shadow of what
//! was written; never attaches anything.
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
    num::NonZeroU16,
    sync::Arc,
    time::Duration,
};

use proxy_common::{
    Be16, Ipv4Be, Ipv6Be,
    device::{DeviceValue, role},
    frontend::{FrontendKey, FrontendValue, Range},
    meta::ServiceName,
    slot::{Slot, Target},
};

use super::{
    alloc::{self, Extent, Slots},
    family::Family,
    render,
    services::{Acquired, MAX_ID, Name, Services},
    store::{Store, StoreError},
};
use crate::{
    dataplane::{Drift, Failure, Report},
    desired::{Backend, BackendSet, Changes, DesiredState, Device, DeviceRole, Devices, Frontend, FrontendSpec},
    model::Protocol,
};

/// A range in use.
#[derive(Debug)]
struct Live {
    service: u32,
    set: BackendSet,
    range: Range,
    /// Ranges of frontends that point here; a frontend whose sets are equal counts twice.
    refs: u32,
}

/// What is kept for one family.
#[derive(Debug)]
struct Half<A: Family> {
    slots: Slots,
    generation: u8,
    /// What the kernel holds, as far as this process wrote or adopted it. Guards too.
    shadow: HashMap<FrontendKey<A>, FrontendValue>,
    /// By first slot.
    live: BTreeMap<u32, Live>,
    /// Frontends of one service with equal sets share a range.
    by_set: HashMap<(u32, BackendSet), u32>,
    /// Senseless entries found at adoption and still in the kernel.
    strays: HashSet<FrontendKey<A>>,
    /// What they point at and nothing else does: in use until the last of them is gone.
    stray_slots: Vec<Extent>,
}

/// A frontend about to be written.
struct Pending<A> {
    key: FrontendKey<A>,
    value: FrontendValue,
    what: What,
}

#[derive(Clone, Copy)]
enum What {
    Frontend(Frontend),
    Guard(IpAddr),
}

/// What a look at the kernel found amiss in one family.
struct Amiss<A> {
    /// Ours, but not as written: gone, altered, or pointing at altered slots.
    damaged: Vec<FrontendKey<A>>,
    /// Not ours.
    foreign: Vec<FrontendKey<A>>,
}

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

/// The ranges a value points at, empty ones left out.
fn ranges(value: &FrontendValue) -> impl Iterator<Item = Range> {
    [value.all(), value.local()].into_iter().filter(|r| r.count > 0)
}

const fn extent(range: Range) -> Extent {
    Extent { base: range.base, len: range.count as u32 }
}

/// `None` for a guard, and for a key that no agent writes.
fn frontend_of<A: Family>(key: &FrontendKey<A>) -> Option<Frontend> {
    Some(Frontend {
        addr: key.addr.to_ip(),
        port: NonZeroU16::new(key.port.to_host())?,
        protocol: Protocol::from_number(key.proto)?,
    })
}

impl<A: Family> Half<A> {
    fn new(capacity: u32, rest: Duration) -> Self {
        Self {
            slots: Slots::new(capacity, rest),
            generation: 0,
            shadow: HashMap::new(),
            live: BTreeMap::new(),
            by_set: HashMap::new(),
            strays: HashSet::new(),
            stray_slots: vec![],
        }
    }

    /// A range with these backends, held once more. Prefers `current`, then one another frontend of the service has, then
    /// writes fresh slots.
    fn hold<S: Store>(
        &mut self,
        store: &mut S,
        service: u32,
        set: &BackendSet,
        current: Range,
        now: Duration,
    ) -> Result<Range, Refused> {
        if set.is_empty() {
            return Ok(Range::default());
        }
        let fits = |live: &Live| live.service == service && live.set == *set;
        let base = match self.live.get(&current.base) {
            Some(live) if live.range == current && fits(live) => Some(current.base),
            _ => self.by_set.get(&(service, Arc::clone(set))).copied(),
        };
        if let Some(live) = base.and_then(|base| self.live.get_mut(&base)) {
            live.refs += 1;
            return Ok(live.range);
        }
        let range = self.write_slots(store, set, now)?;
        self.live.insert(range.base, Live { service, set: Arc::clone(set), range, refs: 1 });
        self.by_set.insert((service, Arc::clone(set)), range.base);
        Ok(range)
    }

    fn write_slots<S: Store>(&mut self, store: &mut S, set: &BackendSet, now: Duration) -> Result<Range, Refused> {
        let count = u16::try_from(set.len())
            .map_err(|_| Refused::Unsupported(format!("{} backends; a frontend holds {}", set.len(), u16::MAX)))?;
        let targets = set
            .iter()
            .map(|backend| {
                let Backend { addr, port } = backend;
                A::from_ip(*addr)
                    .map(|addr| Target { addr, port: Be16::from_host(port.get()) })
                    .ok_or_else(|| Refused::Unsupported(format!("backend {backend} is of the other address family")))
            })
            .collect::<Result<Vec<_>, _>>()?;
        let extent = self
            .slots
            .alloc(u32::from(count), now)
            .map_err(|no_room| Refused::Retry(format!("map {}: {no_room}: raise {}", A::SLOTS, A::SLOTS.option())))?;
        let places = extent.base..extent.base + extent.len;
        let generation = alloc::next_generation(
            &mut self.generation,
            places.clone().map(|index| store.slot::<A>(index).generation()),
        );
        for (index, target) in places.zip(targets) {
            if let Err(error) = store.write_slot::<A>(index, A::Slot::encode(target, generation)) {
                self.slots.release(extent, now);
                return Err(error.into());
            }
        }
        Ok(Range { base: extent.base, count, generation })
    }

    fn release(&mut self, range: Range, now: Duration) {
        // An empty range has no first slot, whatever its base says.
        let Some(live) = self.live.get_mut(&range.base).filter(|_| range.count > 0) else { return };
        live.refs = live.refs.saturating_sub(1);
        if live.refs > 0 {
            return;
        }
        if let Some(Live { service, set, range, refs: _ }) = self.live.remove(&range.base) {
            let key = (service, set);
            if self.by_set.get(&key) == Some(&range.base) {
                self.by_set.remove(&key);
            }
            self.slots.release(extent(range), now);
        }
    }

    fn release_all(&mut self, value: &FrontendValue, now: Duration) {
        for range in ranges(value) {
            self.release(range, now);
        }
    }

    /// Puts backends in place for one frontend and renders it; `None` if the kernel has it already.
    fn prepare<S: Store>(
        &mut self,
        store: &mut S,
        key: FrontendKey<A>,
        spec: &FrontendSpec,
        service: u32,
        now: Duration,
    ) -> Result<Option<FrontendValue>, Refused> {
        let old = self.shadow.get(&key).copied().unwrap_or_default();
        let (needs_all, needs_local) = render::needs(&spec.verdicts);
        let all = if needs_all { self.hold(store, service, &spec.all, old.all(), now)? } else { Range::default() };
        let local = if needs_local {
            match self.hold(store, service, &spec.local, old.local(), now) {
                Ok(local) => local,
                Err(error) => {
                    self.release(all, now);
                    return Err(error);
                }
            }
        } else {
            Range::default()
        };
        let value = render::value(&key, spec, service, all, local);
        if self.shadow.get(&key) == Some(&value) {
            self.release_all(&value, now);
            return Ok(None);
        }
        Ok(Some(value))
    }

    /// Writes what was prepared and records what landed.
    fn commit<S: Store>(
        &mut self,
        store: &mut S,
        services: &mut Services,
        pending: &[Pending<A>],
        report: &mut Report,
        now: Duration,
    ) {
        let entries: Vec<_> = pending.iter().map(|p| (p.key, p.value)).collect();
        let mut at = 0;
        while let Some(rest) = entries.get(at..).filter(|rest| !rest.is_empty()) {
            let (landed, error) = store.put_frontends::<A>(rest);
            for Pending { key, value, .. } in pending.iter().skip(at).take(landed) {
                services.hold(value.service);
                self.stray_gone(key, now);
                if let Some(old) = self.shadow.insert(*key, *value) {
                    services.drop_one(old.service);
                    self.release_all(&old, now);
                }
            }
            at += landed;
            let Some(error) = error else { break };
            // One did not fit; the others, above all those that overwrite, still may.
            if let Some(Pending { value, what, .. }) = pending.get(at) {
                self.release_all(value, now);
                match what {
                    What::Frontend(f) => {
                        report.failed.insert(*f, Refused::from(error).of(format_args!("frontend {f}")));
                    }
                    What::Guard(a) => {
                        report.failed_guards.insert(*a, Refused::from(error).of(format_args!("guard of {a}")));
                    }
                }
            }
            at += 1;
        }
    }

    /// Deletes entries that are in the kernel, ours (in the shadow) or not.
    fn remove<S: Store>(
        &mut self,
        store: &mut S,
        services: &mut Services,
        keys: &[FrontendKey<A>],
        now: Duration,
    ) -> Result<(), StoreError> {
        if keys.is_empty() {
            return Ok(());
        }
        store.remove_frontends::<A>(keys)?;
        for key in keys {
            self.forget(services, key, now);
            self.stray_gone(key, now);
        }
        Ok(())
    }

    /// Strikes an entry from the shadow; the kernel may hold anything under this key.
    fn forget(&mut self, services: &mut Services, key: &FrontendKey<A>, now: Duration) {
        if let Some(old) = self.shadow.remove(key) {
            services.drop_one(old.service);
            self.release_all(&old, now);
        }
    }

    /// The backends that a range holds in the kernel, if it is whole: all of its generation, in order.
    fn read_range<S: Store>(store: &S, range: Range) -> Option<BackendSet> {
        let end = range.base.checked_add(u32::from(range.count)).filter(|end| *end <= store.slots::<A>())?;
        let set = (range.base..end)
            .map(|index| {
                let Target { addr, port } = store.slot::<A>(index).decode(range.generation)?;
                Some(Backend { addr: addr.to_ip(), port: NonZeroU16::new(port.to_host())? })
            })
            .collect::<Option<Vec<_>>>()?;
        set.is_sorted_by(|a, b| a < b).then(|| set.into())
    }

    /// Takes a kernel entry into the shadow if it is whole and agrees with what was taken before.
    fn adopt_entry<S: Store>(
        &mut self,
        store: &S,
        services: &mut Services,
        names: &HashMap<u32, String>,
        key: FrontendKey<A>,
        value: FrontendValue,
    ) -> bool {
        if !value.is_sealed_for(&key) {
            return false;
        }
        if key.is_guard() {
            let ours = value == render::guard(&key);
            if ours {
                self.shadow.insert(key, value);
            }
            return ours;
        }
        let (Some(frontend), Some(name)) = (frontend_of(&key), names.get(&value.service)) else { return false };
        let mut found: Vec<(Range, BackendSet)> = vec![];
        for range in ranges(&value) {
            let known = self.live.get(&range.base).filter(|l| l.range == range && l.service == value.service);
            if known.is_some() || found.iter().any(|(r, _)| *r == range) {
                continue;
            }
            let end = range.base.saturating_add(u32::from(range.count));
            let overlaps = |other: Range| other.base < end && range.base < other.base + u32::from(other.count);
            if self.live.range(..end).next_back().is_some_and(|(_, l)| overlaps(l.range))
                || found.iter().any(|(r, _)| overlaps(*r))
            {
                return false;
            }
            let Some(set) = Self::read_range(store, range) else { return false };
            found.push((range, set));
        }
        if !services.adopt(value.service, &Name { name: name.clone(), protocol: frontend.protocol }) {
            return false;
        }
        for (range, set) in found {
            self.by_set.insert((value.service, Arc::clone(&set)), range.base);
            self.live.insert(range.base, Live { service: value.service, set, range, refs: 0 });
        }
        for range in ranges(&value) {
            if let Some(live) = self.live.get_mut(&range.base) {
                live.refs += 1;
            }
        }
        services.hold(value.service);
        self.shadow.insert(key, value);
        true
    }

    /// Takes over what the kernel holds. Returns the keys of entries that make no sense.
    fn adopt<S: Store>(
        &mut self,
        store: &S,
        services: &mut Services,
        names: &HashMap<u32, String>,
        rest: Duration,
        now: Duration,
    ) -> Result<Vec<FrontendKey<A>>, StoreError> {
        let mut strays = vec![];
        let mut pointed_at = vec![];
        for (key, value) in store.frontends::<A>()? {
            if !self.adopt_entry(store, services, names, key, value) {
                strays.push(key);
                pointed_at.extend(ranges(&value).map(extent));
            }
        }
        let capacity = store.slots::<A>();
        let mut in_use: Vec<_> = self.live.values().map(|live| extent(live.range)).collect();
        // A slot that a senseless entry points at is not free before that entry is gone, written or not.
        self.stray_slots = alloc::beside(pointed_at, &in_use, capacity);
        self.strays = strays.iter().copied().collect();
        in_use.extend(&self.stray_slots);
        in_use.sort_unstable();
        self.slots = Slots::adopt(capacity, rest, &in_use, now, |index| store.slot::<A>(index).is_virgin());
        Ok(strays)
    }

    /// A key was overwritten or deleted.
    fn stray_gone(&mut self, key: &FrontendKey<A>, now: Duration) {
        if self.strays.remove(key) && self.strays.is_empty() {
            for extent in std::mem::take(&mut self.stray_slots) {
                self.slots.release(extent, now);
            }
        }
    }

    /// Compares the kernel with the shadow.
    fn compare<S: Store>(&self, store: &S) -> Result<Amiss<A>, StoreError> {
        let broken: HashSet<u32> = self
            .live
            .values()
            .filter(|live| Self::read_range(store, live.range).as_ref() != Some(&live.set))
            .map(|live| live.range.base)
            .collect();
        let mut foreign = vec![];
        let mut intact = HashSet::new();
        for (key, value) in store.frontends::<A>()? {
            match self.shadow.get(&key) {
                None => foreign.push(key),
                Some(ours) if *ours == value && !ranges(&value).any(|r| broken.contains(&r.base)) => {
                    intact.insert(key);
                }
                Some(_) => {}
            }
        }
        let damaged = self.shadow.keys().filter(|key| !intact.contains(key)).copied().collect();
        Ok(Amiss { damaged, foreign })
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
        Self { store, rest, services: Services::new(rest), v4, v6, adopted: false }
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

    /// Everything desired, and the removal of everything else the shadow holds.
    fn towards(&self, desired: &DesiredState) -> Changes {
        let DesiredState { frontends, guards } = desired;
        let mut changes = Changes { set: frontends.clone(), guard: guards.clone(), ..Default::default() };
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
        let Changes { set, remove, guard, unguard } = changes;
        let mut report = Report::default();
        // INVARIANT: slots, then frontends, then removals (see the head of this file).
        self.set::<Ipv4Be>(set, guard, &mut report, now);
        self.set::<Ipv6Be>(set, guard, &mut report, now);
        let Strays { v4, v6, names } = strays;
        self.unset::<Ipv4Be>(remove, unguard, v4, &mut report, now);
        self.unset::<Ipv6Be>(remove, unguard, v6, &mut report, now);
        self.reap(names, now);
        report
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
            match self.prepare::<A>(key, frontend, spec, now) {
                Ok(Some(value)) => pending.push(Pending { key, value, what: What::Frontend(*frontend) }),
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
                pending.push(Pending { key, value, what: What::Guard(*addr) });
            }
        }
        let (store, services, half) = self.half::<A>();
        half.commit(store, services, &pending, report, now);
    }

    fn prepare<A: HalfOf>(
        &mut self,
        key: FrontendKey<A>,
        frontend: &Frontend,
        spec: &FrontendSpec,
        now: Duration,
    ) -> Result<Option<FrontendValue>, Refused> {
        if frontend.protocol == Protocol::Sctp {
            return Err(Refused::Unsupported("the eBPF datapath does not translate SCTP".into()));
        }
        let (store, services, half) = self.half::<A>();
        let name = Name { name: spec.service.to_string(), protocol: spec.service.protocol };
        let service = match services.acquire(&name, now) {
            Acquired::Known(id) => id,
            Acquired::Fresh(id) => {
                if let Err(error) = store.put_name(id, &ServiceName::new(&name.name)) {
                    services.reap(id, now);
                    return Err(error.into());
                }
                id
            }
        };
        half.prepare(store, key, spec, service, now)
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
        let known: HashSet<u32> = services.iter().map(|(id, _)| id).collect();
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
        let mut stored: HashMap<u32, ServiceName> = store.names()?.into_iter().collect();
        for (id, name) in services.iter() {
            let right = ServiceName::new(&name.name);
            if stored.remove(&id) != Some(right) {
                store.put_name(id, &right)?;
            }
        }
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
        Ok(drift)
    }

    /// Lets what has rested be used again; how long until there is more to do.
    pub(crate) fn tick(&mut self, now: Duration) -> Option<Duration> {
        [self.v4.slots.settle(now), self.v6.slots.settle(now), self.services.settle(now)].into_iter().flatten().min()
    }

    /// Entries in (frontends v4, frontends v6, slots v4, slots v6, names).
    pub(crate) fn used(&self) -> [u64; 5] {
        [
            self.v4.shadow.len() as u64,
            self.v6.shadow.len() as u64,
            u64::from(self.v4.slots.used()),
            u64::from(self.v6.slots.used()),
            self.services.len() as u64,
        ]
    }

    /// Brings `devices` entries that programs need before they are attached; those of other devices stay until
    /// [`Self::prune_devices`]. Failures by device name.
    pub(crate) fn put_devices(&mut self, devices: &Devices, report: &mut Report) {
        let before = self.store.writes();
        match self.store.devices() {
            Ok(present) => {
                let present: HashMap<u32, DeviceValue> = present.into_iter().collect();
                for (index, device) in devices {
                    let value = device_value(device);
                    if present.get(index) == Some(&value) {
                        continue;
                    }
                    if let Err(error) = self.store.put_device(*index, &value) {
                        let why = format!("device {}: {error}", device.name);
                        report.failed_devices.insert(device.name.clone(), Failure::Retry(why));
                    }
                }
            }
            Err(error) => {
                for device in devices.values() {
                    let why = format!("device {}: {error}", device.name);
                    report.failed_devices.insert(device.name.clone(), Failure::Retry(why));
                }
            }
        }
        report.writes += self.store.writes() - before;
    }

    /// Removes the entries of devices that are not in `devices`; once their programs are gone.
    pub(crate) fn prune_devices(&mut self, devices: &Devices, report: &mut Report) -> Result<(), StoreError> {
        let before = self.store.writes();
        for (index, _) in self.store.devices()? {
            if !devices.contains_key(&index) {
                self.store.remove_device(index)?;
            }
        }
        report.writes += self.store.writes() - before;
        Ok(())
    }
}

fn device_value(device: &Device) -> DeviceValue {
    let Device { name: _, role, ethernet: _, source4, source6 } = device;
    DeviceValue {
        source6: source6.map(|a| Ipv6Be::from_octets(a.octets())).unwrap_or_default(),
        source4: source4.map(|a| Ipv4Be::from_octets(a.octets())).unwrap_or_default(),
        role: match role {
            DeviceRole::Pod => role::POD,
            DeviceRole::Outward => role::OUTWARD,
            DeviceRole::Overlay => role::OVERLAY,
        },
        pad: [0; 3],
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
#[path = "table_tests.rs"]
mod tests;
