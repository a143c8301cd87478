//! The frontends of one family: the shadow of what the kernel holds, and the steps that change both.

use std::{
    collections::{HashMap, HashSet},
    net::IpAddr,
    num::NonZeroU16,
    time::Duration,
};

use proxy_common::frontend::{FrontendKey, FrontendValue, Range, flags};

use super::{
    Refused,
    ranges::{Ranges, Wanted, ranges},
    sources::{Held, Sources},
};
use crate::{
    dataplane::{
        Failure, Report,
        ebpf::{
            family::Family,
            render::{self, Reach},
            services::{Name, Services},
            store::{Store, StoreError},
        },
    },
    desired::{Frontend, FrontendSpec},
    model::Protocol,
};

/// What is kept for one family.
#[derive(Debug)]
pub(super) struct Half<A: Family> {
    pub(super) ranges: Ranges<A>,
    pub(super) sources: Sources<A>,
    /// What the kernel holds, as far as this process wrote or adopted it. Guards too.
    pub(super) shadow: HashMap<FrontendKey<A>, FrontendValue>,
    /// Senseless entries found at adoption and still in the kernel.
    strays: HashSet<FrontendKey<A>>,
}

/// A frontend to be put in place.
#[derive(Clone, Copy)]
pub(super) struct Asked<'a, A> {
    pub(super) key: FrontendKey<A>,
    pub(super) spec: &'a FrontendSpec,
    pub(super) service: u32,
    pub(super) reach: Reach,
}

/// A frontend's value, and the source ranges held for it.
pub(super) type Prepared<A> = (FrontendValue, Option<Held<A>>);

/// A frontend about to be written.
pub(super) struct Pending<A> {
    pub(super) key: FrontendKey<A>,
    pub(super) value: FrontendValue,
    pub(super) what: What,
    pub(super) sources: Option<Held<A>>,
}

#[derive(Clone, Copy)]
pub(super) enum What {
    Frontend(Frontend),
    Guard(IpAddr),
}

/// What a look at the kernel found amiss in one family.
pub(super) struct Amiss<A> {
    /// Ours, but not as written: gone, altered, or pointing at altered slots.
    pub(super) damaged: Vec<FrontendKey<A>>,
    /// Not ours.
    pub(super) foreign: Vec<FrontendKey<A>>,
}

const fn has_sources(value: &FrontendValue) -> bool {
    value.flags & flags::HAS_SOURCE_RANGES != 0
}

/// `None` for a guard, and for a key that no agent writes.
pub(super) fn frontend_of<A: Family>(key: &FrontendKey<A>) -> Option<Frontend> {
    Some(Frontend {
        addr: key.addr.to_ip(),
        port: NonZeroU16::new(key.port.to_host())?,
        protocol: Protocol::from_number(key.proto)?,
    })
}

impl<A: Family> Half<A> {
    pub(super) fn new(capacity: u32, rest: Duration) -> Self {
        Self {
            ranges: Ranges::new(capacity, rest),
            sources: Sources::default(),
            shadow: HashMap::new(),
            strays: HashSet::new(),
        }
    }

    /// Puts source ranges and backends in place for one frontend and renders it; `None` if the kernel has it already.
    pub(super) fn prepare<S: Store>(
        &mut self,
        store: &mut S,
        asked: Asked<'_, A>,
        now: Duration,
    ) -> Result<Option<Prepared<A>>, Refused> {
        let Asked { key, spec, service, reach: _ } = asked;
        let sources = match &spec.source_ranges {
            Some(nets) => Some(self.sources.hold(store, service, nets)?),
            None => None,
        };
        match self.prepare_ranges(store, asked, now) {
            Ok(Some(value)) => Ok(Some((value, sources))),
            Ok(None) => {
                self.sources.landed(key, sources);
                Ok(None)
            }
            Err(error) => {
                self.sources.release(&sources.unwrap_or_default());
                Err(error)
            }
        }
    }

    fn prepare_ranges<S: Store>(
        &mut self,
        store: &mut S,
        Asked { key, spec, service, reach }: Asked<'_, A>,
        now: Duration,
    ) -> Result<Option<FrontendValue>, Refused> {
        let old = self.shadow.get(&key).copied().unwrap_or_default();
        let (needs_all, needs_local) = render::needs(&spec.verdicts);
        let wanted = |set| Wanted { service, set, algorithm: spec.algorithm };
        let all =
            if needs_all { self.ranges.hold(store, wanted(&spec.all), old.all(), now)? } else { Range::default() };
        let local = if needs_local {
            match self.ranges.hold(store, wanted(&spec.local), old.local(), now) {
                Ok(local) => local,
                Err(error) => {
                    self.ranges.release(all, now);
                    return Err(error);
                }
            }
        } else {
            Range::default()
        };
        let value = render::value(&key, spec, service, all, local, reach);
        if self.shadow.get(&key) == Some(&value) {
            self.ranges.release_all(&value, now);
            return Ok(None);
        }
        Ok(Some(value))
    }

    /// Writes what was prepared and records what landed.
    pub(super) fn commit<S: Store>(
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
            for Pending { key, value, sources, .. } in pending.iter().skip(at).take(landed) {
                self.sources.landed(*key, sources.clone());
                services.hold(value.service);
                self.stray_gone(key, now);
                if let Some(old) = self.shadow.insert(*key, *value) {
                    services.drop_one(old.service);
                    self.ranges.release_all(&old, now);
                }
            }
            at += landed;
            let Some(error) = error else { break };
            // One did not fit; the others, above all those that overwrite, still may.
            if let Some(Pending { value, what, sources, .. }) = pending.get(at) {
                self.sources.release(sources.as_deref().unwrap_or_default());
                self.ranges.release_all(value, now);
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
    pub(super) fn remove<S: Store>(
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
    pub(super) fn forget(&mut self, services: &mut Services, key: &FrontendKey<A>, now: Duration) {
        self.sources.landed(*key, None);
        if let Some(old) = self.shadow.remove(key) {
            services.drop_one(old.service);
            self.ranges.release_all(&old, now);
        }
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
        let Some(found) = self.ranges.find(store, &value) else { return false };
        if !services.adopt(value.service, &Name { name: name.clone(), protocol: frontend.protocol }) {
            return false;
        }
        self.ranges.take(&value, found);
        services.hold(value.service);
        self.shadow.insert(key, value);
        true
    }

    /// Takes over what the kernel holds. Returns the keys of entries that make no sense.
    pub(super) fn adopt<S: Store>(
        &mut self,
        store: &S,
        services: &mut Services,
        names: &HashMap<u32, String>,
        rest: Duration,
        now: Duration,
    ) -> Result<Vec<FrontendKey<A>>, StoreError> {
        let mut strays = vec![];
        self.sources.adopt(store)?;
        for (key, value) in store.frontends::<A>()? {
            if !self.adopt_entry(store, services, names, key, value) {
                strays.push((key, value));
            }
        }
        let (strays, values): (Vec<_>, Vec<_>) = strays.into_iter().unzip();
        self.ranges.adopted(store, &values, rest, now);
        self.strays = strays.iter().copied().collect();
        Ok(strays)
    }

    /// A key was overwritten or deleted.
    fn stray_gone(&mut self, key: &FrontendKey<A>, now: Duration) {
        if self.strays.remove(key) && self.strays.is_empty() {
            self.ranges.release_strays(now);
        }
    }

    /// Takes out source ranges that no frontend holds. A frontend that admits more than it should is not in force.
    pub(super) fn sweep_sources<S: Store>(&mut self, store: &mut S, report: &mut Report) {
        if !self.sources.has_idle() {
            return;
        }
        // What a former process wrote, and this one could not take up or bring up to date yet.
        let unknown = self.shadow.iter().filter(|(key, value)| has_sources(value) && !self.sources.knows(key));
        let unknown = unknown.map(|(_, value)| value.service).collect();
        let failed = self.sources.sweep(store, &unknown);
        if failed.is_empty() {
            return;
        }
        for (key, value) in self.shadow.iter().filter(|(_, value)| has_sources(value)) {
            let (Some(frontend), Some(error)) = (frontend_of(key), failed.get(&value.service)) else { continue };
            let why = format!("frontend {frontend}: a source range that it has no longer is still admitted: {error}");
            report.failed.entry(frontend).or_insert(Failure::Retry(why));
        }
    }

    /// Compares the kernel with the shadow.
    pub(super) fn compare<S: Store>(&self, store: &S) -> Result<Amiss<A>, StoreError> {
        let broken = self.ranges.broken(store);
        let sources = self.sources.broken(store)?;
        let mut foreign = vec![];
        let mut intact = HashSet::new();
        for (key, value) in store.frontends::<A>()? {
            match self.shadow.get(&key) {
                None => foreign.push(key),
                Some(ours)
                    if *ours == value
                        && !ranges(&value).any(|r| broken.contains(&r.base))
                        && !(has_sources(&value) && sources.contains(&value.service)) =>
                {
                    intact.insert(key);
                }
                Some(_) => {}
            }
        }
        let damaged = self.shadow.keys().filter(|key| !intact.contains(key)).copied().collect();
        Ok(Amiss { damaged, foreign })
    }
}
