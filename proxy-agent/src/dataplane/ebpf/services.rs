//! Ids of Services: small numbers that frontends carry and counters are kept by. Pure.
//!
//! Low ids come back after a rest. An id is never 0 (the programs' "no service") and always below [`MAX_ID`], so never `render::GUARD_SERVICE`.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    time::Duration,
};

use crate::model::Protocol;

/// An id found in the kernel beyond this is not one of ours.
pub(crate) const MAX_ID: u32 = 1 << 24;

/// `namespace/name:port` and protocol.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Name {
    pub(crate) name: String,
    pub(crate) protocol: Protocol,
}

#[derive(Debug)]
struct Service {
    name: Name,
    /// Frontends that carry the id.
    refs: u32,
}

#[derive(Debug)]
pub(crate) struct Services {
    rest: Duration,
    by_name: HashMap<Name, u32>,
    by_id: BTreeMap<u32, Service>,
    /// Ids that no frontend carries: a change costs what changed, not a walk over all.
    idle: BTreeSet<u32>,
    /// Ids whose name is not in the kernel, or not as it should be.
    unnamed: BTreeSet<u32>,
    /// Ids under which the kernel may remember clients.
    sticky: BTreeSet<u32>,
    /// Those of them that have rested: what is remembered under them is still to be forgotten.
    rested: BTreeSet<u32>,
    /// Used before, and free again.
    free: BTreeSet<u32>,
    resting: VecDeque<(Duration, u32)>,
    /// This one and all above were never used.
    next: u32,
}

/// What [`Services::acquire`] handed out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Acquired {
    Known(u32),
    /// The kernel does not know its name: that must be written (see [`Services::named`]) before a frontend carries it.
    Unnamed(u32),
}

impl Services {
    pub(crate) fn new(rest: Duration) -> Self {
        Self {
            rest,
            by_name: HashMap::new(),
            by_id: BTreeMap::new(),
            idle: BTreeSet::new(),
            unnamed: BTreeSet::new(),
            sticky: BTreeSet::new(),
            rested: BTreeSet::new(),
            free: BTreeSet::new(),
            resting: VecDeque::new(),
            next: 1,
        }
    }

    /// The id of `name`, a new one if it has none. It stays only if [`Self::hold`] follows before the next [`Self::reap`].
    pub(crate) fn acquire(&mut self, name: &Name) -> Acquired {
        if let Some(id) = self.by_name.get(name) {
            return if self.unnamed.contains(id) { Acquired::Unnamed(*id) } else { Acquired::Known(*id) };
        }
        let id = self.free.pop_first().unwrap_or_else(|| {
            let id = self.next;
            self.next += 1;
            id
        });
        self.by_name.insert(name.clone(), id);
        self.by_id.insert(id, Service { name: name.clone(), refs: 0 });
        self.idle.insert(id);
        self.unnamed.insert(id);
        Acquired::Unnamed(id)
    }

    /// The kernel knows its name, as it is.
    pub(crate) fn named(&mut self, id: u32) {
        self.unnamed.remove(&id);
    }

    /// The kernel turned out not to.
    pub(crate) fn lost_name(&mut self, id: u32) {
        self.unnamed.insert(id);
    }

    /// Takes up an id that the kernel already knows under this name; `false` if that contradicts what was taken up before.
    pub(crate) fn adopt(&mut self, id: u32, name: &Name) -> bool {
        if id == 0 || id >= MAX_ID || self.by_name.get(name).is_some_and(|known| *known != id) {
            return false;
        }
        match self.by_id.get(&id) {
            Some(service) => service.name == *name,
            None => {
                self.by_name.insert(name.clone(), id);
                self.by_id.insert(id, Service { name: name.clone(), refs: 0 });
                self.idle.insert(id);
                true
            }
        }
    }

    /// Ends adoption: ids below the highest seen that nobody holds may have been freed a moment ago.
    pub(crate) fn adopted(&mut self, also: impl Iterator<Item = u32>, now: Duration) {
        let highest = self.by_id.keys().next_back().copied().into_iter().chain(also).max().unwrap_or(0).min(MAX_ID);
        self.next = self.next.max(highest + 1);
        for id in (1..=highest).filter(|id| !self.by_id.contains_key(id)) {
            // What it was used for is not known.
            self.sticky.insert(id);
            self.resting.push_back((now + self.rest, id));
        }
    }

    /// From now on the kernel may remember clients of `id`.
    pub(crate) fn remembers(&mut self, id: u32) {
        self.sticky.insert(id);
    }

    /// Whether the kernel may remember anybody.
    pub(crate) fn remember_somebody(&self) -> bool {
        !self.sticky.is_empty()
    }

    /// One more frontend carries `id`.
    pub(crate) fn hold(&mut self, id: u32) {
        if let Some(service) = self.by_id.get_mut(&id) {
            service.refs += 1;
            self.idle.remove(&id);
        }
    }

    /// One fewer does.
    pub(crate) fn drop_one(&mut self, id: u32) {
        if let Some(service) = self.by_id.get_mut(&id) {
            service.refs = service.refs.saturating_sub(1);
            if service.refs == 0 {
                self.idle.insert(id);
            }
        }
    }

    /// Ids that nobody carries any more.
    pub(crate) fn idle(&self) -> Vec<u32> {
        self.idle.iter().copied().collect()
    }

    pub(crate) fn name(&self, id: u32) -> Option<&Name> {
        self.by_id.get(&id).map(|service| &service.name)
    }

    pub(crate) fn contains(&self, id: u32) -> bool {
        self.by_id.contains_key(&id)
    }

    /// Forgets an id; it rests.
    pub(crate) fn reap(&mut self, id: u32, now: Duration) {
        if let Some(service) = self.by_id.remove(&id) {
            self.by_name.remove(&service.name);
            self.idle.remove(&id);
            self.unnamed.remove(&id);
            self.resting.push_back((now + self.rest, id));
        }
    }

    pub(crate) fn settle(&mut self, now: Duration) -> Option<Duration> {
        while let Some((until, id)) = self.resting.front().copied() {
            if until > now {
                return Some(until - now);
            }
            self.resting.pop_front();
            let ids = if self.sticky.contains(&id) { &mut self.rested } else { &mut self.free };
            ids.insert(id);
        }
        None
    }

    /// Whether [`Self::free_rested`] has something to do.
    pub(crate) fn waits(&self) -> bool {
        !self.rested.is_empty()
    }

    /// Nothing is remembered any more under ids that nobody carries.
    pub(crate) fn free_rested(&mut self) {
        self.sticky.retain(|id| !self.rested.contains(id));
        self.free.append(&mut self.rested);
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (u32, &Name)> {
        self.by_id.iter().map(|(id, service)| (*id, &service.name))
    }

    pub(crate) fn len(&self) -> usize {
        self.by_id.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REST: Duration = Duration::from_secs(5);

    fn name(name: &str) -> Name {
        Name { name: name.into(), protocol: Protocol::Tcp }
    }

    #[test]
    fn ids_come_back_low_and_rested() {
        let now = Duration::from_secs(1);
        let mut services = Services::new(REST);
        assert_eq!(services.acquire(&name("a/a")), Acquired::Unnamed(1));
        assert_eq!(services.acquire(&name("a/b")), Acquired::Unnamed(2));
        assert_eq!(services.acquire(&name("a/a")), Acquired::Unnamed(1), "until it is written");
        services.named(1);
        assert_eq!(services.acquire(&name("a/a")), Acquired::Known(1));
        services.lost_name(1);
        assert_eq!(services.acquire(&name("a/a")), Acquired::Unnamed(1));
        services.remembers(1);
        services.reap(1, now);
        services.reap(2, now);
        assert_eq!(services.acquire(&name("a/c")), Acquired::Unnamed(3), "both rest");
        services.settle(now + REST);
        assert_eq!(services.acquire(&name("a/f")), Acquired::Unnamed(2), "it never had clients to remember");
        assert!(services.waits() && services.remember_somebody());
        assert_eq!(
            services.acquire(&name("a/e")),
            Acquired::Unnamed(4),
            "what is remembered of its clients is still there"
        );
        services.free_rested();
        assert!(!services.waits() && !services.remember_somebody());
        assert_eq!(services.acquire(&name("a/d")), Acquired::Unnamed(1));
        assert_eq!(
            services.acquire(&Name { protocol: Protocol::Udp, ..name("a/d") }),
            Acquired::Unnamed(5),
            "the same name over another protocol is another service port"
        );
    }

    #[test]
    fn adoption_keeps_ids_and_refuses_contradictions() {
        let mut services = Services::new(REST);
        assert!(services.adopt(3, &name("a/a")));
        assert!(services.adopt(3, &name("a/a")));
        assert!(!services.adopt(3, &name("a/b")), "one id, two names");
        assert!(!services.adopt(4, &name("a/a")), "one name, two ids");
        assert!(!services.adopt(0, &name("a/z")) && !services.adopt(MAX_ID, &name("a/z")));
        services.adopted([5].into_iter(), Duration::ZERO);
        assert_eq!(services.acquire(&name("a/c")), Acquired::Unnamed(6));
        services.settle(REST);
        services.free_rested();
        assert_eq!(services.acquire(&name("a/d")), Acquired::Unnamed(1));
    }
}
