//! Which slots are free, in use, or resting. Pure: no clock (the caller says what time it is), no kernel.
//!
//! INVARIANT: a slot is handed out only if no live range holds it and it has rested since the last one let go of it. A program
//! may have copied a frontend's old range just before it was replaced; a slot filled anew under its eyes would send a client to
//! another Service's pod. (Generations catch that too; resting makes it not happen.)

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::Duration,
};

/// After adoption so many slots at least are looked at in one go when room is needed.
const LOOK: u32 = 1024;

/// How long a freed slot rests: far longer than a program runs, RCU grace periods included.
pub(crate) const REST: Duration = Duration::from_secs(5);

/// A run of slots.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct Extent {
    pub(crate) base: u32,
    pub(crate) len: u32,
}

impl Extent {
    /// One past the last slot; `u64` because the last extent may end at 2³².
    fn end(self) -> u64 {
        u64::from(self.base) + u64::from(self.len)
    }
}

/// No extent is long enough.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("no run of {wanted} free slots ({used} of {capacity} in use, {resting} resting)")]
pub(crate) struct NoRoom {
    pub(crate) wanted: u32,
    pub(crate) used: u32,
    pub(crate) resting: u32,
    pub(crate) capacity: u32,
}

/// Allocator of slot ranges: the shortest free extent that is long enough, the lowest among equals. Neighbours grow together.
#[derive(Debug)]
pub(crate) struct Slots {
    capacity: u32,
    rest: Duration,
    /// Free extents, base → length; no two touch.
    free: BTreeMap<u32, u32>,
    /// The same by length.
    by_len: BTreeSet<(u32, u32)>,
    /// Freed and resting, in the order they come to rest.
    resting: VecDeque<(Duration, Extent)>,
    resting_slots: u32,
    /// What an earlier run left and nobody has looked at yet, lowest last: free if it was never written, resting until then
    /// otherwise.
    unknown: Vec<Extent>,
    unknown_slots: u32,
    unknown_until: Duration,
    used: u32,
}

impl Slots {
    /// All free.
    pub(crate) fn new(capacity: u32, rest: Duration) -> Self {
        let mut slots = Self::empty(capacity, rest);
        slots.insert_free(Extent { base: 0, len: capacity });
        slots
    }

    fn empty(capacity: u32, rest: Duration) -> Self {
        Self {
            capacity,
            rest,
            free: BTreeMap::new(),
            by_len: BTreeSet::new(),
            resting: VecDeque::new(),
            resting_slots: 0,
            unknown: vec![],
            unknown_slots: 0,
            unknown_until: Duration::ZERO,
            used: 0,
        }
    }

    /// From what an earlier run left: `live` ranges (sorted, not overlapping) are in use; of the rest, slots that were never
    /// written are free at once, the others count as freed just now. Which they are is seen when one is needed, so this costs what
    /// is in use and not the size of the map.
    pub(crate) fn adopt(capacity: u32, rest: Duration, live: &[Extent], now: Duration) -> Self {
        let mut slots = Self { unknown_until: now + rest, ..Self::empty(capacity, rest) };
        let mut at = 0_u32;
        for extent in live.iter().copied().chain([Extent { base: capacity, len: 0 }]) {
            if at < extent.base {
                slots.unknown.push(Extent { base: at, len: extent.base - at });
                slots.unknown_slots += extent.base - at;
            }
            slots.used += extent.len;
            at = u32::try_from(extent.end()).unwrap_or(u32::MAX);
        }
        slots.unknown.reverse();
        slots
    }

    /// `virgin`: whether a slot was never written; asked of slots of an earlier run alone.
    pub(crate) fn alloc(&mut self, len: u32, now: Duration, virgin: impl Fn(u32) -> bool) -> Result<Extent, NoRoom> {
        self.settle(now);
        let found = loop {
            let found = self.by_len.range((len, 0)..).next().copied().filter(|_| len > 0);
            if found.is_some() || !self.look(len.max(LOOK), &virgin) {
                break found;
            }
        };
        let Some((have, base)) = found else {
            return Err(NoRoom { wanted: len, used: self.used, resting: self.resting_slots, capacity: self.capacity });
        };
        self.remove_free(base, have);
        if have > len {
            self.insert_free(Extent { base: base + len, len: have - len });
        }
        self.used += len;
        Ok(Extent { base, len })
    }

    /// Gives a range back; it rests before it is used again.
    pub(crate) fn release(&mut self, extent: Extent, now: Duration) {
        self.used -= extent.len.min(self.used);
        self.lay_to_rest(extent, now);
    }

    /// Looks at the next so many slots that an earlier run left, up to the end of their extent; false if there are none.
    fn look(&mut self, len: u32, virgin: impl Fn(u32) -> bool) -> bool {
        let Some(Extent { base, len: have }) = self.unknown.pop() else { return false };
        let len = len.min(have);
        let end = base + len;
        if have > len {
            self.unknown.push(Extent { base: end, len: have - len });
        }
        self.unknown_slots -= len;
        let mut at = base;
        while at < end {
            let fresh = virgin(at);
            let until = (at + 1..end).find(|index| virgin(*index) != fresh).unwrap_or(end);
            let run = Extent { base: at, len: until - at };
            if fresh {
                self.insert_free(run);
            } else {
                // Before all that was freed since: that order is what `settle` goes by.
                self.resting_slots += run.len;
                self.resting.push_front((self.unknown_until, run));
            }
            at = until;
        }
        true
    }

    /// Frees what has rested; how long until the next does.
    pub(crate) fn settle(&mut self, now: Duration) -> Option<Duration> {
        if self.unknown_until <= now {
            // Whoever wrote them, it was before this process began.
            for extent in std::mem::take(&mut self.unknown) {
                self.insert_free(extent);
            }
            self.unknown_slots = 0;
        }
        while let Some((until, extent)) = self.resting.front().copied() {
            if until > now {
                return Some(until - now);
            }
            self.resting.pop_front();
            self.resting_slots -= extent.len.min(self.resting_slots);
            self.insert_free(extent);
        }
        (!self.unknown.is_empty()).then(|| self.unknown_until - now)
    }

    pub(crate) const fn used(&self) -> u32 {
        self.used
    }

    fn lay_to_rest(&mut self, extent: Extent, now: Duration) {
        self.resting_slots += extent.len;
        self.resting.push_back((now + self.rest, extent));
    }

    fn remove_free(&mut self, base: u32, len: u32) {
        self.free.remove(&base);
        self.by_len.remove(&(len, base));
    }

    fn insert_free(&mut self, extent: Extent) {
        let Extent { mut base, mut len } = extent;
        if len == 0 {
            return;
        }
        if let Some((left, left_len)) = self.free.range(..base).next_back().map(|(b, l)| (*b, *l))
            && left + left_len == base
        {
            self.remove_free(left, left_len);
            base = left;
            len += left_len;
        }
        if let Some(right) = u32::try_from(extent.end()).ok()
            && let Some(right_len) = self.free.get(&right).copied()
        {
            self.remove_free(right, right_len);
            len += right_len;
        }
        self.free.insert(base, len);
        self.by_len.insert((len, base));
    }
}

/// The slots below `capacity` that `extents` (in any order, overlapping or not) hold and `live` (sorted, not overlapping) does
/// not: sorted, not overlapping.
pub(crate) fn beside(mut extents: Vec<Extent>, live: &[Extent], capacity: u32) -> Vec<Extent> {
    extents.sort_unstable();
    let mut beside = vec![];
    let mut push = |from: u64, to: u64| {
        if let (Ok(base), Ok(len)) = (u32::try_from(from), u32::try_from(to.saturating_sub(from)))
            && len > 0
        {
            beside.push(Extent { base, len });
        }
    };
    let mut live = live.iter().copied().peekable();
    let mut at = 0_u64;
    for extent in extents {
        let end = extent.end().min(u64::from(capacity));
        at = at.max(u64::from(extent.base));
        while at < end {
            match live.peek() {
                Some(next) if next.end() <= at => {
                    live.next();
                }
                Some(next) if u64::from(next.base) < end => {
                    push(at, u64::from(next.base));
                    at = next.end();
                }
                _ => {
                    push(at, end);
                    at = end;
                }
            }
        }
    }
    beside
}

/// A generation for slots that now carry `old` ones: the first from `cursor` on that none of them has. Never 0.
///
/// Where a range of 255 and more has seen them all there is none left; resting alone protects it then.
pub(crate) fn next_generation(cursor: &mut u8, old: impl Iterator<Item = u8>) -> u8 {
    let mut taken = [false; 256];
    for generation in old {
        if let Some(flag) = taken.get_mut(usize::from(generation)) {
            *flag = true;
        }
    }
    let after = |g: u8| if g == u8::MAX { 1 } else { g + 1 };
    let mut candidate = after(*cursor);
    for _ in 0..255 {
        if !taken.get(usize::from(candidate)).copied().unwrap_or(false) {
            break;
        }
        candidate = after(candidate);
    }
    *cursor = candidate;
    candidate
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SEC: Duration = Duration::from_secs(1);

    #[test]
    fn a_freed_range_rests_before_it_is_used_again() {
        let mut slots = Slots::new(4, REST);
        let a = slots.alloc(4, SEC, |_| true).unwrap();
        slots.release(a, SEC);
        let refused = slots.alloc(1, SEC + REST - Duration::from_nanos(1), |_| true).unwrap_err();
        assert_eq!((refused.resting, refused.used, refused.capacity), (4, 0, 4));
        assert_eq!(slots.alloc(4, SEC + REST, |_| true), Ok(a));
    }

    #[test]
    fn neighbours_grow_together() {
        let mut slots = Slots::new(9, REST);
        let [a, b, c] = [(); 3].map(|()| slots.alloc(3, SEC, |_| true).unwrap());
        for extent in [a, c, b] {
            slots.release(extent, SEC);
        }
        assert_eq!(slots.alloc(9, SEC + REST, |_| true), Ok(Extent { base: 0, len: 9 }));
    }

    #[test]
    fn adoption_trusts_only_virgin_slots() {
        // 0 1 live, 2 written, 3 virgin, 4 live, 5 6 virgin, 7 written
        let live = [Extent { base: 0, len: 2 }, Extent { base: 4, len: 1 }];
        let virgin = |index| [3, 5, 6].contains(&index);
        let mut slots = Slots::adopt(8, REST, &live, SEC);
        assert_eq!(slots.used(), 3);
        assert_eq!(slots.settle(SEC), Some(REST));
        assert_eq!(slots.alloc(1, SEC, virgin), Ok(Extent { base: 3, len: 1 }));
        assert_eq!(slots.alloc(2, SEC, virgin), Ok(Extent { base: 5, len: 2 }));
        assert_eq!(slots.alloc(1, SEC, virgin).unwrap_err().resting, 2);
        assert_eq!(slots.settle(SEC), Some(REST));
        assert_eq!(slots.alloc(1, SEC + REST, virgin), Ok(Extent { base: 2, len: 1 }));
        assert_eq!(slots.alloc(1, SEC + REST, virgin), Ok(Extent { base: 7, len: 1 }));
        // Nobody has to look at what has rested.
        let mut slots = Slots::adopt(8, REST, &live, SEC);
        assert_eq!(slots.alloc(3, SEC + REST, |_| unreachable!()), Ok(Extent { base: 5, len: 3 }));
        assert_eq!(slots.settle(SEC + REST), None);
    }

    /// Starting with a large map that hardly holds anything looks at next to nothing of it.
    #[test]
    fn adoption_costs_what_is_in_use() {
        let looked = std::cell::Cell::new(0_u32);
        let virgin = |index| {
            looked.set(looked.get() + 1);
            index >= 100
        };
        let mut slots = Slots::adopt(1 << 20, REST, &[Extent { base: 0, len: 90 }], SEC);
        assert_eq!(looked.get(), 0);
        assert_eq!(slots.alloc(5, SEC, virgin), Ok(Extent { base: 100, len: 5 }));
        assert_eq!(slots.alloc(5, SEC, virgin), Ok(Extent { base: 105, len: 5 }));
        assert!(looked.get() <= LOOK + 2, "{} slots looked at", looked.get());
        // More than is looked at in one go.
        assert_eq!(slots.alloc(5_000, SEC, virgin), Ok(Extent { base: 110, len: 5_000 }));
        assert!(looked.get() <= 5_000 + 2 * LOOK + 4, "{} slots looked at", looked.get());
    }

    #[test]
    fn what_strays_hold_is_counted_once_and_never_what_is_live() {
        let extent = |(base, len)| Extent { base, len };
        let live = [(2, 2), (6, 1), (20, 5)].map(extent);
        let strays = [(30, 9), (5, 3), (0, 6), (21, 2), (31, 60_000), (6, 1)].map(extent);
        let want = [(0, 2), (4, 2), (7, 1), (30, 9), (39, 61)].map(extent);
        assert_eq!(beside(strays.to_vec(), &live, 100), want);
        assert_eq!(beside(vec![extent((u32::MAX, u32::MAX))], &[], 100), []);
        // As many as a lost `names` map leaves: linear, or this does not end.
        let many: Vec<_> = (0..65_536).map(|n| extent((n * 16, 16))).collect();
        assert_eq!(beside(many.clone(), &many, 1 << 20), []);
    }

    #[test]
    fn generations_differ_from_what_was_there() {
        let mut cursor = 254;
        assert_eq!(next_generation(&mut cursor, [255, 1].into_iter()), 2);
        assert_eq!(next_generation(&mut cursor, [].into_iter()), 3);
        assert_ne!(next_generation(&mut cursor, 1..=255), 0, "all taken: any but 0");
    }

    proptest! {
        /// Never hands out what is referenced or resting; nothing is lost.
        #[test]
        fn keeps_its_invariant(
            adopted: bool,
            // Gaps before and lengths of what is in use when it is adopted.
            found in prop::collection::vec((0u32..6, 1u32..6), 0..8),
            dirty in prop::collection::btree_set(0u32..64, 0..32),
            ops in prop::collection::vec((any::<bool>(), 1u32..9, any::<prop::sample::Index>(), 0u64..4), 1..200),
        ) {
            let mut live: Vec<Extent> = vec![];
            let mut at = 0;
            for (gap, len) in found.into_iter().filter(|_| adopted) {
                let base = at + gap;
                at = base + len;
                if at <= 64 {
                    live.push(Extent { base, len });
                }
            }
            let mut slots = if adopted { Slots::adopt(64, REST, &live, SEC) } else { Slots::new(64, REST) };
            prop_assert_eq!(slots.used(), live.iter().map(|e| e.len).sum::<u32>());
            let mut freed: Vec<(Duration, Extent)> = vec![];
            let mut now = SEC;
            let overlap = |a: Extent, b: Extent| u64::from(a.base) < b.end() && u64::from(b.base) < a.end();
            for (alloc, len, pick, wait) in ops {
                now += Duration::from_secs(wait);
                if alloc || live.is_empty() {
                    if let Ok(got) = slots.alloc(len, now, |index| !dirty.contains(&index)) {
                        let mut places = u64::from(got.base)..got.end();
                        prop_assert!(!adopted || now >= SEC + REST || !places.any(|i| dirty.contains(&(i as u32))), "written before");
                        prop_assert_eq!(got.len, len);
                        prop_assert!(got.end() <= 64);
                        prop_assert!(live.iter().all(|l| !overlap(*l, got)), "live");
                        prop_assert!(freed.iter().all(|(at, f)| *at + REST <= now || !overlap(*f, got)), "resting");
                        live.push(got);
                    }
                } else {
                    let extent = live.swap_remove(pick.index(live.len()));
                    slots.release(extent, now);
                    freed.push((now, extent));
                }
                let in_use: u32 = live.iter().map(|e| e.len).sum();
                prop_assert_eq!(slots.used(), in_use);
                let free: u32 = slots.free.values().sum();
                prop_assert_eq!(free + slots.resting_slots + slots.unknown_slots + in_use, 64, "no leak");
            }
            for extent in live.drain(..) {
                slots.release(extent, now);
            }
            prop_assert_eq!(slots.alloc(64, now + REST, |_| true), Ok(Extent { base: 0, len: 64 }));
        }
    }
}
