//! The slot ranges of one family: which backends each holds, and how many frontends point at it.
//!
//! Frontends of one service with equal sets share a range; those that choose by Maglev do so whosever they are, since the table
//! behind the slots takes far more room than they. A changed set never overwrites slots that are in use: it goes to a
//! fresh range, and the old one comes to rest when the last frontend lets go of it.
//!
//! INVARIANT: the slots that a frontend points at hold the set it wants, and a table made of that set alone. Who else points there
//! does not matter: nobody writes to a range that is held.

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
    maglev::{self, Walk},
    slot::{Slot, Target},
};

use super::Refused;
use crate::{
    dataplane::ebpf::{
        alloc::{self, Extent, Slots},
        family::Family,
        store::Store,
    },
    desired::{Algorithm, Backend, BackendSet},
};

/// Whose a range is: a service's, or with a Maglev table everybody's who wants that set.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Owner {
    Service(u32),
    Shared,
}

impl Owner {
    const fn of(range: Range, service: u32) -> Self {
        if range.table == 0 { Self::Service(service) } else { Self::Shared }
    }
}

/// What a range is made of.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted<'a> {
    pub(super) service: u32,
    pub(super) set: &'a BackendSet,
    pub(super) algorithm: Algorithm,
}

#[derive(Debug)]
struct Live {
    owner: Owner,
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
    /// Frontends of one owner with equal sets share a range.
    by_set: HashMap<(Owner, BackendSet), u32>,
    /// What only senseless entries point at: in use until the last of them is gone.
    strays: Vec<Extent>,
    family: PhantomData<A>,
}

/// The ranges a value points at, empty ones left out.
pub(super) fn ranges(value: &FrontendValue) -> impl Iterator<Item = Range> {
    [value.all(), value.local()].into_iter().filter(|r| r.count > 0)
}

/// Says what is full, and what makes room.
fn full<A: Family>(range: Range, no_room: alloc::NoRoom) -> String {
    let (map, option) = (A::SLOTS, A::SLOTS.option());
    if range.table == 0 {
        return format!("map {map}: {no_room}: raise {option}");
    }
    format!(
        "map {map}: {no_room}, which is what {} backends take with a Maglev table: raise {option}, or choose another algorithm",
        range.count
    )
}

const fn extent(range: Range) -> Extent {
    Extent { base: range.base, len: range.slots() }
}

/// What stands in the table of this set: the backend at each position. Empty where it has none.
fn table<A: Family>(targets: &[Target<A>], index: u8) -> Vec<Target<A>> {
    let size = maglev::size(index);
    if size == 0 {
        return vec![];
    }
    let mut walks: Vec<_> = targets.iter().map(|target| Walk::new(*target, size)).collect();
    let mut table = vec![0; size as usize];
    maglev::populate(&mut walks, &mut table);
    table.into_iter().filter_map(|at| targets.get(usize::from(at)).copied()).collect()
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

    /// A range with these backends, held once more. Prefers `current`, then one another frontend has that may be shared, then
    /// writes fresh slots.
    pub(super) fn hold<S: Store>(
        &mut self,
        store: &mut S,
        wanted: Wanted<'_>,
        current: Range,
        now: Duration,
    ) -> Result<Range, Refused> {
        let Wanted { service, set, algorithm } = wanted;
        if set.is_empty() {
            return Ok(Range::default());
        }
        let index = if algorithm == Algorithm::Maglev { maglev::index_for(set.len()) } else { 0 };
        let owner = if index == 0 { Owner::Service(service) } else { Owner::Shared };
        let fits = |live: &Live| live.owner == owner && live.set == *set;
        let base = match self.live.get(&current.base) {
            Some(live) if live.range == current && fits(live) => Some(current.base),
            _ => self.by_set.get(&(owner, Arc::clone(set))).copied(),
        };
        if let Some(live) = base.and_then(|base| self.live.get_mut(&base)) {
            live.refs += 1;
            return Ok(live.range);
        }
        let range = self.write_slots(store, set, index, now)?;
        self.live.insert(range.base, Live { owner, set: Arc::clone(set), range, refs: 1 });
        self.by_set.insert((owner, Arc::clone(set)), range.base);
        Ok(range)
    }

    fn write_slots<S: Store>(
        &mut self,
        store: &mut S,
        set: &BackendSet,
        index: u8,
        now: Duration,
    ) -> Result<Range, Refused> {
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
        let mut range = Range { base: 0, count, generation: 0, table: index };
        let extent = self
            .slots
            .alloc(range.slots(), now, |index| store.slot::<A>(index).is_virgin())
            .map_err(|no_room| Refused::Retry(full::<A>(range, no_room)))?;
        let table = table(&targets, index);
        let places = extent.base..extent.base + extent.len;
        let generation = alloc::next_generation(
            &mut self.generation,
            places.clone().map(|index| store.slot::<A>(index).generation()),
        );
        for (index, target) in places.zip(targets.into_iter().chain(table)) {
            if let Err(error) = store.write_slot::<A>(index, A::Slot::encode(target, generation)) {
                self.slots.release(extent, now);
                return Err(error.into());
            }
        }
        (range.base, range.generation) = (extent.base, generation);
        Ok(range)
    }

    pub(super) fn release(&mut self, range: Range, now: Duration) {
        // An empty range has no first slot, whatever its base says.
        let Some(live) = self.live.get_mut(&range.base).filter(|_| range.count > 0) else { return };
        live.refs = live.refs.saturating_sub(1);
        if live.refs > 0 {
            return;
        }
        if let Some(Live { owner, set, range, refs: _ }) = self.live.remove(&range.base) {
            let key = (owner, set);
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

    /// The backends that a range holds in the kernel, if it is whole: all of its generation, in order, and behind them the table
    /// that an agent of this version makes of them.
    pub(super) fn read<S: Store>(store: &S, range: Range) -> Option<BackendSet> {
        let count = u32::from(range.count);
        let end = range.base.checked_add(range.slots()).filter(|end| *end <= store.slots::<A>())?;
        if range.table != 0 && range.table != maglev::index_for(usize::from(range.count)) {
            return None;
        }
        let slot = |index| store.slot::<A>(index).decode(range.generation);
        let targets = (range.base..range.base + count).map(slot).collect::<Option<Vec<_>>>()?;
        let set = targets
            .iter()
            .map(|Target { addr, port }| Some(Backend { addr: addr.to_ip(), port: NonZeroU16::new(port.to_host())? }))
            .collect::<Option<Vec<_>>>()?;
        if !set.is_sorted_by(|a, b| a < b) {
            return None;
        }
        let table = table(&targets, range.table);
        (range.base + count..end).zip(table).all(|(index, wanted)| slot(index) == Some(wanted)).then(|| set.into())
    }

    /// The ranges of a kernel entry that are not known yet, with what they hold; `None` if one is not whole or overlaps another.
    pub(super) fn find<S: Store>(&self, store: &S, value: &FrontendValue) -> Option<Vec<(Range, BackendSet)>> {
        let mut found: Vec<(Range, BackendSet)> = vec![];
        for range in ranges(value) {
            let owner = Owner::of(range, value.service);
            let known = self.live.get(&range.base).filter(|l| l.range == range && l.owner == owner);
            if known.is_some() || found.iter().any(|(r, _)| *r == range) {
                continue;
            }
            let end = range.base.saturating_add(range.slots());
            let overlaps = |other: Range| other.base < end && range.base < other.base + other.slots();
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
            let owner = Owner::of(range, value.service);
            self.by_set.insert((owner, Arc::clone(&set)), range.base);
            self.live.insert(range.base, Live { owner, set, range, refs: 0 });
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
