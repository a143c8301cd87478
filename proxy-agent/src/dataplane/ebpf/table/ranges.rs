//! The slot ranges of one family: which backends each holds, and how many frontends point at it.
//!
//! Frontends of one service with equal sets share a range. A changed set never overwrites slots that are in use: it goes to a
//! fresh range, and the old one comes to rest when the last frontend lets go of it.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    marker::PhantomData,
    num::NonZeroU16,
    sync::Arc,
    time::Duration,
};

use proxy_common::{
    Be16,
    frontend::{FrontendValue, Range},
    slot::{Slot, Target},
};

use super::Refused;
use crate::{
    dataplane::ebpf::{
        alloc::{self, Extent, Slots},
        family::Family,
        store::Store,
    },
    desired::{Backend, BackendSet},
};

#[derive(Debug)]
struct Live {
    service: u32,
    set: BackendSet,
    range: Range,
    /// Ranges of frontends that point here; a frontend whose sets are equal counts twice.
    refs: u32,
}

#[derive(Debug)]
pub(super) struct Ranges<A> {
    slots: Slots,
    generation: u8,
    /// By first slot.
    live: BTreeMap<u32, Live>,
    /// Frontends of one service with equal sets share a range.
    by_set: HashMap<(u32, BackendSet), u32>,
    /// What only senseless entries point at: in use until the last of them is gone.
    strays: Vec<Extent>,
    family: PhantomData<A>,
}

/// The ranges a value points at, empty ones left out.
pub(super) fn ranges(value: &FrontendValue) -> impl Iterator<Item = Range> {
    [value.all(), value.local()].into_iter().filter(|r| r.count > 0)
}

const fn extent(range: Range) -> Extent {
    Extent { base: range.base, len: range.count as u32 }
}

impl<A: Family> Ranges<A> {
    pub(super) fn new(capacity: u32, rest: Duration) -> Self {
        Self {
            slots: Slots::new(capacity, rest),
            generation: 0,
            live: BTreeMap::new(),
            by_set: HashMap::new(),
            strays: vec![],
            family: PhantomData,
        }
    }

    /// A range with these backends, held once more. Prefers `current`, then one another frontend of the service has, then
    /// writes fresh slots.
    pub(super) fn hold<S: Store>(
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
            .alloc(u32::from(count), now, |index| store.slot::<A>(index).is_virgin())
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

    pub(super) fn release(&mut self, range: Range, now: Duration) {
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

    pub(super) fn release_all(&mut self, value: &FrontendValue, now: Duration) {
        for range in ranges(value) {
            self.release(range, now);
        }
    }

    /// The backends that a range holds in the kernel, if it is whole: all of its generation, in order.
    pub(super) fn read<S: Store>(store: &S, range: Range) -> Option<BackendSet> {
        let end = range.base.checked_add(u32::from(range.count)).filter(|end| *end <= store.slots::<A>())?;
        let set = (range.base..end)
            .map(|index| {
                let Target { addr, port } = store.slot::<A>(index).decode(range.generation)?;
                Some(Backend { addr: addr.to_ip(), port: NonZeroU16::new(port.to_host())? })
            })
            .collect::<Option<Vec<_>>>()?;
        set.is_sorted_by(|a, b| a < b).then(|| set.into())
    }

    /// The ranges of a kernel entry that are not known yet, with what they hold; `None` if one is not whole or overlaps another.
    pub(super) fn find<S: Store>(&self, store: &S, value: &FrontendValue) -> Option<Vec<(Range, BackendSet)>> {
        let mut found: Vec<(Range, BackendSet)> = vec![];
        for range in ranges(value) {
            let known = self.live.get(&range.base).filter(|l| l.range == range && l.service == value.service);
            if known.is_some() || found.iter().any(|(r, _)| *r == range) {
                continue;
            }
            let end = range.base.saturating_add(u32::from(range.count));
            let overlaps = |other: Range| other.base < end && range.base < other.base + u32::from(other.count);
            if self.live.range(..end).next_back().is_some_and(|(_, l)| overlaps(l.range))
                || found.iter().any(|(r, _)| overlaps(*r))
            {
                return None;
            }
            found.push((range, Self::read(store, range)?));
        }
        Some(found)
    }

    /// Takes what [`Self::find`] found into use, and holds all ranges of the entry once more.
    pub(super) fn take(&mut self, value: &FrontendValue, found: Vec<(Range, BackendSet)>) {
        for (range, set) in found {
            self.by_set.insert((value.service, Arc::clone(&set)), range.base);
            self.live.insert(range.base, Live { service: value.service, set, range, refs: 0 });
        }
        for range in ranges(value) {
            if let Some(live) = self.live.get_mut(&range.base) {
                live.refs += 1;
            }
        }
    }

    /// Ends adoption: what is neither in use nor in `strays`, the ranges of senseless entries, is free or rests.
    pub(super) fn adopted<S: Store>(&mut self, store: &S, strays: &[FrontendValue], rest: Duration, now: Duration) {
        let capacity = store.slots::<A>();
        let mut in_use: Vec<_> = self.live.values().map(|live| extent(live.range)).collect();
        // A slot that a senseless entry points at is not free before that entry is gone, written or not.
        let pointed_at = strays.iter().flat_map(ranges).map(extent).collect();
        self.strays = alloc::beside(pointed_at, &in_use, capacity);
        in_use.extend(&self.strays);
        in_use.sort_unstable();
        self.slots = Slots::adopt(capacity, rest, &in_use, now);
    }

    /// The last senseless entry is gone.
    pub(super) fn release_strays(&mut self, now: Duration) {
        for extent in std::mem::take(&mut self.strays) {
            self.slots.release(extent, now);
        }
    }

    /// First slots of ranges that the kernel does not hold as they were written.
    pub(super) fn broken<S: Store>(&self, store: &S) -> HashSet<u32> {
        self.live
            .values()
            .filter(|live| Self::read(store, live.range).as_ref() != Some(&live.set))
            .map(|live| live.range.base)
            .collect()
    }

    /// Lets what has rested be used again; how long until there is more to do.
    pub(super) fn settle(&mut self, now: Duration) -> Option<Duration> {
        self.slots.settle(now)
    }

    /// Slots in use.
    pub(super) const fn used(&self) -> u32 {
        self.slots.used()
    }
}
