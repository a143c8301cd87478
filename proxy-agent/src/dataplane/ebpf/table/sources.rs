//! Source ranges in the kernel: which there are, and which frontends hold them.
//!
//! INVARIANT: a frontend that asks for them is written after its ranges, and they are taken out after it has been written without. What
//! nobody holds is taken out at the end of a change ([`Sources::sweep`]); but never while a frontend that a
//! former process wrote may still need it.

use std::collections::{HashMap, HashSet, hash_map::Entry};

use ipnet::IpNet;
use proxy_common::{frontend::FrontendKey, source_range::SourceRangeKey};

use crate::dataplane::ebpf::{
    family::Family,
    store::{Store, StoreError},
};

#[derive(Debug)]
pub(super) struct Sources<A> {
    /// What the kernel holds, and how many frontends hold it.
    entries: HashMap<SourceRangeKey<A>, u32>,
    idle: HashSet<SourceRangeKey<A>>,
    by_frontend: HashMap<FrontendKey<A>, Held<A>>,
}

/// Ranges held for one frontend.
pub(super) type Held<A> = Vec<SourceRangeKey<A>>;

impl<A> Default for Sources<A> {
    fn default() -> Self {
        Self { entries: HashMap::new(), idle: HashSet::new(), by_frontend: HashMap::new() }
    }
}

/// This family's of `nets`.
fn keys<A: Family>(service: u32, nets: &[IpNet]) -> Held<A> {
    let key = |net: &IpNet| Some(SourceRangeKey::new(service, A::from_ip(net.network())?, net.prefix_len()));
    let mut seen = HashSet::new();
    nets.iter().filter_map(key).filter(|key| seen.insert(*key)).collect()
}

impl<A: Family> Sources<A> {
    /// Brings ranges into the kernel and holds them; nothing is held if it fails.
    pub(super) fn hold<S: Store>(
        &mut self,
        store: &mut S,
        service: u32,
        nets: &[IpNet],
    ) -> Result<Held<A>, StoreError> {
        let mut held = vec![];
        for key in keys(service, nets) {
            if !self.entries.contains_key(&key)
                && let Err(error) = store.put_source_range(&key)
            {
                self.release(&held);
                return Err(error);
            }
            *self.entries.entry(key).or_default() += 1;
            self.idle.remove(&key);
            held.push(key);
        }
        Ok(held)
    }

    pub(super) fn release(&mut self, held: &[SourceRangeKey<A>]) {
        for key in held {
            if let Some(count) = self.entries.get_mut(key) {
                *count = count.saturating_sub(1);
                if *count == 0 {
                    self.idle.insert(*key);
                }
            }
        }
    }

    /// A frontend is in the kernel, with these ranges or without any.
    pub(super) fn landed(&mut self, frontend: FrontendKey<A>, held: Option<Held<A>>) {
        let old = match held {
            Some(held) => self.by_frontend.insert(frontend, held),
            None => self.by_frontend.remove(&frontend),
        };
        self.release(&old.unwrap_or_default());
    }

    /// Whether it is known what this frontend holds: not if a former process wrote it.
    pub(super) fn knows(&self, frontend: &FrontendKey<A>) -> bool {
        self.by_frontend.contains_key(frontend)
    }

    pub(super) fn has_idle(&self) -> bool {
        !self.idle.is_empty()
    }

    /// Takes out what nobody holds, but for those of services that are `unknown`. What cannot be taken out stays for the next time:
    /// which services admit more than they should by that, and why.
    pub(super) fn sweep<S: Store>(&mut self, store: &mut S, unknown: &HashSet<u32>) -> HashMap<u32, StoreError> {
        let Self { entries, idle, .. } = self;
        let mut failed = HashMap::new();
        idle.retain(|key| {
            if unknown.contains(&key.range.service) {
                return true;
            }
            if let Err(error) = store.remove_source_range(key) {
                failed.insert(key.range.service, error);
                return true;
            }
            entries.remove(key);
            false
        });
        failed
    }

    /// Takes up what the kernel holds.
    pub(super) fn adopt<S: Store>(&mut self, store: &S) -> Result<(), StoreError> {
        for key in store.source_ranges::<A>()? {
            self.entries.insert(key, 0);
            self.idle.insert(key);
        }
        Ok(())
    }

    /// Services of whose ranges the kernel holds more or fewer than it should.
    pub(super) fn broken<S: Store>(&self, store: &S) -> Result<HashSet<u32>, StoreError> {
        let there: HashSet<_> = store.source_ranges::<A>()?.into_iter().collect();
        let lost = self.entries.keys().filter(|key| !there.contains(key));
        let foreign = there.iter().filter(|key| !self.entries.contains_key(key));
        Ok(lost.chain(foreign).map(|key| key.range.service).collect())
    }

    /// Once frontends with broken ranges have been struck: what is lost will be written again, what is foreign goes.
    pub(super) fn recheck<S: Store>(&mut self, store: &S) -> Result<(), StoreError> {
        let there: HashSet<_> = store.source_ranges::<A>()?.into_iter().collect();
        self.entries.retain(|key, _| there.contains(key));
        self.idle.retain(|key| there.contains(key));
        for key in there {
            if let Entry::Vacant(unknown) = self.entries.entry(key) {
                self.idle.insert(*unknown.key());
                unknown.insert(0);
            }
        }
        Ok(())
    }
}
