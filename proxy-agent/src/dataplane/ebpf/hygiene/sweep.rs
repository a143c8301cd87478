//! Room for connections that live: takes flows that are over out of the tables of those that both sides have spoken on.
//!
//! An LRU map evicts what was used least recently. A connection that was closed a moment ago was used later than one that lives and has been
//! silent for a minute, so without this it is the latter that would go. Nothing is taken out as long as there is room: what is over harms
//! nobody, a FIN that is sent again still finds its way, and whether a reset or a FIN was forged cannot be told here.
//!
//! ```text
//! entries  │ live │ over: at most half of what the live ones leave │ free │
//!                   the longest silent go first
//! ```
//!
//! The programs count the flows that come into each table, and the count is all that is looked at until a quarter of what was left has come
//! in. So an idle node's tables are not walked over, and a flood of SYNs, which never gets there, causes no walk.
//!
//! Where those of TCP and SCTP that live leave nothing, it is what is new that has to wait: with each look the programs are told how much may still
//! come in (map `spare`), count that down, and open no flow without. That holds for some seconds: where no agent says so they do as LRU maps do.
//!
//! Nothing locks the tables against the programs. An entry is taken and read in one step (`LOOKUP_AND_DELETE`), and one that has been used
//! since it was looked at is put back at once: its port was used again in the microsecond between. For as long as that takes its packets find no
//! entry, as if it had been evicted.

use std::{
    convert::Infallible,
    io,
    os::fd::{AsFd, OwnedFd},
    sync::{
        atomic::Ordering,
        mpsc::{Receiver, RecvTimeoutError},
    },
    time::{Duration, Instant},
};

use proxy_common::{
    Address, Ipv4Be, Ipv6Be,
    connection::{ConnectionKey, ConnectionValue, flags, hook, masquerade_key, pair, state},
    counters::{Confirmed, Spare},
};

use super::flows::{Clock, is_still, other_half};
use crate::dataplane::{
    alive::Ended,
    ebpf::{
        Timeouts,
        layout::{MapName, Sizes},
        maps::{self, MappedArray},
        pins::Layout,
        sys::{self, Map},
    },
};

/// Between two looks at how many flows have come.
const PERIOD: Duration = Duration::from_secs(1);
/// Walks that find nothing to take out, or fail, take at most one part in so many of the time.
const SHARE: u32 = 4;

/// Seconds for which the programs hold to what they were told, beside what a look takes: who is gone says no more that there is room again.
const HOLDS: u32 = 3;
/// Free entries of an LRU map that a CPU may keep to itself, twice over (LOCAL_FREE_TARGET in kernel/bpf/bpf_lru_list.c): others evict although
/// those are there.
const KEPT_BY_CPU: u32 = 256;
/// One part in so many of a table is for flows that were opened while there was room, and are confirmed when there is none.
const RESERVE: u32 = 64;

/// What the tables must have taken in for a walk to be worth its while, even if they are full of flows that live: one part in so many of
/// their size.
const LEAST: u32 = 64;

/// Looks once a second, until the other end of `end` is gone.
pub(super) fn run(layout: &Layout, timeouts: Timeouts, ended: &Ended, end: &Receiver<Infallible>) {
    let mut sweep = Sweep::new(timeouts);
    let (mut said, mut walks_from): (Option<String>, _) = (None, Instant::now());
    while let Err(RecvTimeoutError::Timeout) = end.recv_timeout(PERIOD) {
        let start = Instant::now();
        let swept = sweep.look_or_walk(start >= walks_from, |name| sys::open(&layout.maps.join(name)));
        if !matches!(swept, Ok(Swept { pairs: 1.., .. })) {
            walks_from = walks_from.max(start + start.elapsed() * SHARE);
        }
        let complaint = match swept {
            Ok(Swept { pairs, walks, crowded }) => {
                ended.over.fetch_add(pairs, Ordering::Relaxed);
                if walks > 0 {
                    tracing::debug!(pairs, walks, took = ?start.elapsed(), "took out entries of flows that are over");
                }
                (crowded > 0).then(|| {
                    "connections that live nearly fill a table: beyond that new ones are dropped (table_full); raise --map-connections"
                        .to_owned()
                })
            }
            // A directory that is cleared away has nothing to look at.
            Err(_) if !layout.maps.exists() => None,
            Err(error) => Some(format!("flows that are over keep their place, and may cost others theirs: {error}")),
        };
        if let Some(text) = complaint.as_ref().filter(|text| said.as_ref() != Some(text)) {
            tracing::warn!("{text}");
        }
        said = complaint;
    }
}

/// What was done.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Swept {
    /// Pairs of entries that were taken out; a masqueraded flow has two.
    pub pairs: u64,
    /// Tables that were walked over.
    pub walks: u32,
    /// Tables of which flows that live filled more than seven parts in eight when they were walked over last.
    pub crowded: u32,
}

/// What is known of the four tables.
#[derive(Debug)]
pub struct Sweep {
    timeouts: Timeouts,
    confirmed: Option<Confirmations>,
    spare: Option<MappedArray<Spare>>,
    tables: [Table; 4],
    /// What looks take, the last ones.
    took: Duration,
}

#[derive(Clone, Copy, Debug)]
struct Table {
    name: MapName,
    /// How many flows had ever come in when it was looked at last, and when it was walked over last.
    flows: u64,
    at: u64,
    /// What that walk found.
    found: Option<Walk>,
}

impl Table {
    /// Entries that came in since the walk: two for each flow.
    fn came(&self) -> i64 {
        i64::try_from(self.flows.wrapping_sub(self.at)).unwrap_or(i64::MAX).saturating_mul(2)
    }

    /// Entries that may come in without the kernel evicting one; not known before the first walk.
    fn spare(&self) -> Option<i64> {
        self.found.map(|Walk { free, .. }| free.saturating_sub(self.came()))
    }

    /// Where there is next to no room nothing comes in, and what has ended meanwhile is found in no other way.
    fn is_due(&self) -> bool {
        match self.found {
            Some(Walk { due, few, free, .. }) => self.came() >= due || self.is_gated() && free - self.came() <= few,
            None => self.came() > 0,
        }
    }

    /// Whether the programs ask for room there.
    const fn is_gated(&self) -> bool {
        matches!(self.name, MapName::EstablishedV4 | MapName::EstablishedV6)
    }
}

impl Sweep {
    pub const fn new(timeouts: Timeouts) -> Self {
        // What came in before this agent did, counts: an earlier one may not have been there for long.
        const fn table(name: MapName) -> Table {
            Table { name, flows: 0, at: 0, found: None }
        }
        let tables = [
            table(MapName::EstablishedV4),
            table(MapName::EstablishedV6),
            table(MapName::AnsweredV4),
            table(MapName::AnsweredV6),
        ];
        Self { timeouts, confirmed: None, spare: None, tables, took: Duration::ZERO }
    }

    /// Walks over the tables that so much has come into that there might be too little room, and says how much may come in. `open` opens a map by its name.
    pub fn look(&mut self, open: impl Fn(&str) -> io::Result<OwnedFd>) -> io::Result<Swept> {
        self.look_or_walk(true, open)
    }

    /// Without walks only what was found before is said again, less what has come in since.
    fn look_or_walk(&mut self, walks: bool, open: impl Fn(&str) -> io::Result<OwnedFd>) -> io::Result<Swept> {
        let start = Instant::now();
        let Self { timeouts, confirmed, spare, tables, took } = self;
        let confirmations = match confirmed {
            Some(confirmations) => confirmations,
            None => match open(MapName::Confirmed.as_str()) {
                Ok(fd) => confirmed.insert(Confirmations::new(fd)?),
                // There are no programs, or those of a version that did not count.
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Swept::default()),
                Err(error) => return Err(error),
            },
        };
        let spare = match spare {
            Some(spare) => spare,
            None => spare.insert(MappedArray::new(open(MapName::Spare.as_str())?.as_fd(), true)?),
        };
        let (mut swept, mut failed) = (Swept::default(), Ok(()));
        let count = |tables: &mut [Table], flows: [u64; 4]| {
            tables.iter_mut().zip(flows).for_each(|(table, flows)| table.flows = flows);
        };
        count(tables, confirmations.read()?);
        for table in &mut *tables {
            if walks && table.is_due() {
                let clock = Clock::new(*timeouts);
                let walk = open(table.name.as_str()).and_then(|fd| match table.name {
                    MapName::EstablishedV4 | MapName::AnsweredV4 => sweep::<Ipv4Be>(fd, &clock),
                    _ => sweep::<Ipv6Be>(fd, &clock),
                });
                match walk {
                    Ok(walk) => {
                        swept.pairs += walk.pairs;
                        swept.walks += 1;
                        *table = Table { at: table.flows, found: Some(walk), ..*table };
                    }
                    Err(error) => failed = failed.and(Err(error)),
                }
            }
            swept.crowded += u32::from(table.found.is_some_and(|walk| walk.crowded));
        }
        if swept.walks > 0 {
            // What came in meanwhile counts, whether a walk saw it or not.
            count(tables, confirmations.read()?);
        }
        *took = start.elapsed().max(*took / 2);
        let holds = HOLDS.saturating_add(2 * took.as_secs() as u32);
        for (index, table) in (0..spare.len()).zip(tables.iter()) {
            if let (Some(entries), Some(Walk { reserve, .. })) = (table.spare(), table.found) {
                let until = u64::from(Clock::new(*timeouts).now.saturating_add(holds));
                spare.write(index, &Spare { entries, reserve, until });
            }
        }
        failed.map(|()| swept)
    }
}

/// The programs' count.
#[derive(Debug)]
struct Confirmations {
    map: OwnedFd,
    cpus: Vec<u8>,
}

impl Confirmations {
    fn new(map: OwnedFd) -> io::Result<Self> {
        let (have, want) = (sys::map_info(map.as_fd())?, MapName::Confirmed.info(&Sizes::default()));
        if (have.kind, have.key, have.value) != (want.kind, want.key, want.value) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "map confirmed has another layout"));
        }
        Ok(Self { map, cpus: vec![0; maps::value_size(MapName::Confirmed)?] })
    }

    /// In the order of the tables.
    fn read(&mut self) -> io::Result<[u64; 4]> {
        sys::read_element(self.map.as_fd(), 0, &mut self.cpus)?;
        let mut sum = [0_u64; 4];
        for cpu in self.cpus.chunks_exact(size_of::<Confirmed>()) {
            for (sum, word) in sum.iter_mut().zip(cpu.chunks_exact(8)) {
                *sum += word.first_chunk().map_or(0, |word| u64::from_ne_bytes(*word));
            }
        }
        Ok(sum)
    }
}

#[derive(Clone, Copy, Debug)]
struct Walk {
    pairs: u64,
    /// Entries that may come in until the next walk.
    due: i64,
    /// And without the kernel evicting one; how few are a reason for another walk; how many are kept back beside.
    free: i64,
    few: i64,
    reserve: i64,
    crowded: bool,
}

/// Beside the entry that it was found by.
struct Pair<A> {
    silent: u32,
    /// The other entry, if that is there and is this pair's.
    other: Option<(ConnectionKey<A>, ConnectionValue<A>)>,
}

/// A pair that is over, by one of its entries. Many of them are remembered at one time.
struct Over<A> {
    key: ConnectionKey<A>,
    silent: u32,
    entries: u32,
}

fn sweep<A: Address>(fd: OwnedFd, clock: &Clock) -> io::Result<Walk>
where
    ConnectionKey<A>: aya::Pod,
    ConnectionValue<A>: aya::Pod,
{
    let map: Map<ConnectionKey<A>, ConnectionValue<A>> = Map::new(fd)?;
    let capacity = sys::map_info(map.fd())?.max_entries;
    let (mut entries, mut over, mut trouble) = (0_u32, Vec::new(), None);
    map.each(|key, value| {
        entries += 1;
        if trouble.is_none() {
            match pair_if_over(&map, clock, &key, &value) {
                Ok(pair) => over.extend(pair.map(|Pair { silent, other }| Over {
                    key,
                    silent,
                    entries: 1 + u32::from(other.is_some()),
                })),
                Err(error) => trouble = Some(error),
            }
        }
    })?;
    if let Some(error) = trouble {
        return Err(error);
    }
    let mut waiting: u32 = over.iter().map(|over| over.entries).sum();
    let live = entries.saturating_sub(waiting);
    let spare = capacity.saturating_sub(live);
    // What is over may keep half of what can be used at all.
    let (kept, reserve) = (kept_by_cpus(capacity), capacity / RESERVE);
    let usable = spare.saturating_sub(kept + reserve);
    over.sort_unstable_by_key(|over| std::cmp::Reverse(over.silent));
    let mut pairs = 0;
    for Over { key, silent: _, entries } in over {
        if waiting <= usable / 2 {
            break;
        }
        pairs += remove(&map, clock, &key)?;
        waiting = waiting.saturating_sub(entries);
    }
    let few = (capacity / LEAST).max(1);
    Ok(Walk {
        pairs,
        due: i64::from((usable / 4).max(few)),
        free: i64::from(spare) - i64::from(waiting) - i64::from(kept + reserve),
        few: i64::from(few),
        reserve: i64::from(reserve),
        crowded: usable < capacity / 8,
    })
}

/// Entries that may be free where no other CPU finds them. One that is not there has none.
fn kept_by_cpus(capacity: u32) -> u32 {
    let cpus = aya::util::online_cpus().map_or(1, |cpus| cpus.len());
    u32::try_from(cpus).unwrap_or(u32::MAX).saturating_mul(KEPT_BY_CPU).min(capacity / 4)
}

/// The pair that the entry belongs to, if it is over. Where both entries tell, the one on the way in counts.
fn pair_if_over<A: Address>(
    map: &Map<ConnectionKey<A>, ConnectionValue<A>>,
    clock: &Clock,
    key: &ConnectionKey<A>,
    value: &ConnectionValue<A>,
) -> io::Result<Option<Pair<A>>>
where
    ConnectionKey<A>: aya::Pod,
    ConnectionValue<A>: aya::Pod,
{
    let alone = |value: &ConnectionValue<A>| ConnectionValue { seen: value.seen, ..Default::default() };
    // Spares most entries the look at the other one: by itself each tells of a side that closes, of a reset and of a silence that is too long.
    let tells = |value: &ConnectionValue<A>| {
        value.state & state::FIN != 0 || clock.is_over(key.proto, true, value, &alone(value))
    };
    if !value.is_sealed_for(key) || !tells(value) {
        return Ok(None);
    }
    let (other_key, other) = other_half(map, key, value)?;
    if key.hook != hook::INGRESS && other.is_some_and(|other| tells(&other)) {
        return Ok(None);
    }
    // Of a half that is alone the other one is not known to go on: who speaks there would have put it back.
    let notes = other.unwrap_or_else(|| ConnectionValue { state: value.state & state::FIN, ..alone(value) });
    let silent = clock.silence(value.seen.max(notes.seen));
    let pair = Pair { silent, other: other.map(|other| (other_key, other)) };
    Ok(clock.is_over(key.proto, true, value, &notes).then_some(pair))
}

/// Removes the pair of an entry that was found to be over, if it is so still, and with it the pair that masquerades its flow, over or not: left
/// alone, that would masquerade the next flow between the same ends, also one that is not to be. How many pairs went.
fn remove<A: Address>(
    map: &Map<ConnectionKey<A>, ConnectionValue<A>>,
    clock: &Clock,
    key: &ConnectionKey<A>,
) -> io::Result<u64>
where
    ConnectionKey<A>: aya::Pod,
    ConnectionValue<A>: aya::Pod,
{
    let Some(value) = map.get(key)? else { return Ok(0) };
    let Some(Pair { other, silent: _ }) = pair_if_over(map, clock, key, &value)? else { return Ok(0) };
    // Looked at before its flow goes: what is used from then on is the next one's.
    let masquerade = masquerade_of(map, key, &value)?;
    if !take(map, key, &value)? {
        return Ok(0);
    }
    if let Some((other_key, other)) = other
        && !take(map, &other_key, &other)?
        && is_still(map, &other_key, &other)?.is_some()
    {
        // Its flow goes on.
        put_back(map, key, &value)?;
        return Ok(0);
    }
    let mut pairs = 1;
    for (n, (key, value)) in masquerade.iter().enumerate() {
        if !take(map, key, value)? {
            break;
        }
        pairs += u64::from(n == 0);
    }
    Ok(pairs)
}

/// What masquerades the flow of an entry: the entry at egress first, then the other one of its pair, if that is there and is this pair's.
fn masquerade_of<A: Address>(
    map: &Map<ConnectionKey<A>, ConnectionValue<A>>,
    key: &ConnectionKey<A>,
    value: &ConnectionValue<A>,
) -> io::Result<Vec<(ConnectionKey<A>, ConnectionValue<A>)>>
where
    ConnectionKey<A>: aya::Pod,
    ConnectionValue<A>: aya::Pod,
{
    if value.flags & flags::NEEDS_MASQUERADE == 0 {
        return Ok(Vec::new());
    }
    let out = if key.hook == hook::INGRESS {
        // It is whose the reply tuple is, and that may be another flow's by now.
        let (other_key, other) = other_half(map, key, value)?;
        if other.is_none() && map.get(&other_key)?.is_some() {
            return Ok(Vec::new());
        }
        masquerade_key(key, value)
    } else {
        let (there, to) = pair(key, value);
        masquerade_key(&there, &to)
    };
    let ours = |found: &ConnectionValue<A>| found.flags & flags::MASQUERADE != 0 && found.is_sealed_for(&out);
    let Some(found) = map.get(&out)?.filter(ours) else { return Ok(Vec::new()) };
    let (back_key, back) = pair(&out, &found);
    let back = is_still(map, &back_key, &back)?;
    Ok([(out, found)].into_iter().chain(back.map(|back| (back_key, back))).collect())
}

/// Takes an entry out if it is as it was found.
fn take<A: Address>(
    map: &Map<ConnectionKey<A>, ConnectionValue<A>>,
    key: &ConnectionKey<A>,
    found: &ConnectionValue<A>,
) -> io::Result<bool>
where
    ConnectionKey<A>: aya::Pod,
    ConnectionValue<A>: aya::Pod,
{
    let Some(taken) = map.take(key)? else { return Ok(false) };
    let is_same = (taken.seal, taken.state, taken.seen) == (found.seal, found.state, found.seen);
    if !is_same {
        put_back(map, key, &taken)?;
    }
    Ok(is_same)
}

fn put_back<A: Address>(
    map: &Map<ConnectionKey<A>, ConnectionValue<A>>,
    key: &ConnectionKey<A>,
    value: &ConnectionValue<A>,
) -> io::Result<()>
where
    ConnectionKey<A>: aya::Pod,
    ConnectionValue<A>: aya::Pod,
{
    match map.put(key, value, sys::NOEXIST) {
        // By its other half, meanwhile.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        put => put,
    }
}

#[cfg(test)]
mod tests {
    use proxy_common::{Be16, proto};

    use super::*;

    type A = Ipv4Be;
    type Entry = (ConnectionKey<A>, ConnectionValue<A>);

    const CAPACITY: u32 = 4096;
    const NOW: u32 = 1_000_000;
    const OPEN: [u8; 2] = [state::SEEN; 2];
    const CLOSED: [u8; 2] = [state::SEEN | state::FIN; 2];

    fn table(name: MapName) -> Option<Map<ConnectionKey<A>, ConnectionValue<A>>> {
        if !rustix::process::geteuid().is_root() {
            println!("SKIP flows that are over: not root");
            return None;
        }
        let mut info = name.info(&Sizes::default());
        info.max_entries = CAPACITY;
        Some(sys::create(name.as_str(), info).and_then(Map::new).unwrap())
    }

    fn clock() -> Clock {
        Clock { now: NOW, timeouts: Timeouts::default() }
    }

    /// Way there and way back of flow `n`, silent for so long, with these states.
    fn flow(proto: u8, n: u16, silent: u32, states: [u8; 2]) -> [Entry; 2] {
        let port = Be16::from_host(n);
        let ip = |n| Ipv4Be::from_octets([10, 0, 0, n]);
        let key = ConnectionKey::new(hook::INGRESS, proto, ip(200), port, ip(100), Be16::from_host(80));
        let value = ConnectionValue {
            addr: ip(1),
            port: Be16::from_host(8080),
            other: port,
            seen: NOW - silent,
            state: states[0],
            ..Default::default()
        }
        .sealed(&key);
        let (other_key, other) = pair(&key, &value);
        [(key, value), (other_key, ConnectionValue { state: states[1], ..other })]
    }

    fn put(map: &Map<ConnectionKey<A>, ConnectionValue<A>>, entries: &[Entry]) {
        for (key, value) in entries {
            map.put(key, value, 0).unwrap();
        }
    }

    fn sweep_of(map: &Map<ConnectionKey<A>, ConnectionValue<A>>) -> Walk {
        sweep::<A>(map.fd().try_clone_to_owned().unwrap(), &clock()).unwrap()
    }

    fn there(map: &Map<ConnectionKey<A>, ConnectionValue<A>>, entries: &[Entry]) -> Vec<bool> {
        entries.iter().map(|(key, _)| map.get(key).unwrap().is_some()).collect()
    }

    /// Half of what the live ones leave is kept of those that are over, and the youngest of them.
    #[test]
    fn what_is_over_makes_room_the_longest_silent_first() {
        let Some(map) = table(MapName::EstablishedV4) else { return };
        let live: Vec<_> = (1..=500).map(|n| flow(proto::TCP, n, 80_000, OPEN)).collect();
        let over: Vec<_> = (1..=1000).map(|n| flow(proto::TCP, 1000 + n, u32::from(n), CLOSED)).collect();
        live.iter().chain(&over).for_each(|flow| put(&map, flow));
        // What is left of 4096 - 1000 entries, and half of that in flows.
        let usable = 3096 - kept_by_cpus(CAPACITY) - CAPACITY / RESERVE;
        let stay = usable / 4;
        let Walk { pairs, due, crowded, .. } = sweep_of(&map);
        assert_eq!((pairs, due, crowded), (u64::from(1000 - stay), i64::from(usable / 4), false));
        assert!(live.iter().all(|flow| there(&map, flow) == [true; 2]));
        for (n, flow) in over.iter().enumerate() {
            assert_eq!(there(&map, flow), [n < stay as usize; 2], "{n}");
        }
        // There is room now.
        assert_eq!(sweep_of(&map).pairs, 0);
        assert_eq!(map.entries().unwrap().len(), 2 * (500 + stay as usize));
    }

    /// Whatever the reason why a flow is over; and who is not, by either half, stays.
    #[test]
    fn only_what_is_over_goes() {
        let Some(map) = table(MapName::EstablishedV4) else { return };
        let Timeouts { tcp_established, tcp_close_wait, .. } = Timeouts::default();
        let [open, fin, rst] = [state::SEEN, state::SEEN | state::FIN, state::SEEN | state::RST];
        let over = [
            flow(proto::TCP, 1, 1, [fin, fin]),
            flow(proto::TCP, 2, 1, [rst, open]),
            flow(proto::TCP, 3, 1, [open, rst]),
            flow(proto::TCP, 4, 1, [rst, rst]),
            flow(proto::TCP, 5, tcp_established + 1, [open, open]),
            flow(proto::TCP, 6, tcp_close_wait + 1, [fin, open]),
            flow(proto::TCP, 7, tcp_close_wait + 1, [open, fin]),
        ];
        let live = [
            flow(proto::TCP, 11, tcp_established, [open, open]),
            flow(proto::TCP, 12, tcp_close_wait, [fin, open]),
            flow(proto::TCP, 13, tcp_close_wait, [open, fin]),
        ];
        // Its answers' entry alone was used.
        let mut heard = flow(proto::TCP, 14, 1, [open, open]);
        heard[0].1.seen = NOW - tcp_established - 1;
        // One half is another flow's by now, which stays; the other half leads nowhere.
        let mut shared = flow(proto::TCP, 15, tcp_established + 1, [open, open]);
        shared[1].1 = ConnectionValue { port: Be16::from_host(81), seen: NOW, ..shared[1].1 }.sealed(&shared[1].0);
        over.iter().chain(&live).chain([&heard, &shared]).for_each(|flow| put(&map, flow));
        let half = flow(proto::TCP, 16, tcp_established + 1, [open, open]);
        put(&map, &half[1..]);
        // What is left of connections that were closed, where the table became smaller.
        let halves = [flow(proto::TCP, 17, 1, [fin, fin]), flow(proto::TCP, 18, 1, [fin, fin])];
        put(&map, &halves[0][..1]);
        put(&map, &halves[1][1..]);
        // As many as it takes for there to be no room for any of these, which are silent for longer.
        let before = map.entries().unwrap().len() as u32;
        let others: Vec<_> = (0..1100).map(|n| flow(proto::TCP, 1000 + n, 0, [fin, fin])).collect();
        others.iter().for_each(|flow| put(&map, flow));
        assert_eq!(map.entries().unwrap().len() as u32, before + 2200, "nothing was evicted");
        assert!(sweep_of(&map).pairs > 8);
        for flow in &over {
            assert_eq!(there(&map, flow), [false; 2], "{flow:?}");
        }
        assert_eq!(there(&map, &half[1..]), [false]);
        assert_eq!((there(&map, &halves[0]), there(&map, &halves[1])), (vec![false; 2], vec![false; 2]));
        assert_eq!(there(&map, &shared), [false, true]);
        for flow in live.iter().chain([&heard]) {
            assert_eq!(there(&map, flow), [true; 2], "{flow:?}");
        }
    }

    /// Between the look and the removal a client may have opened its next connection from the same port, to the same backend.
    #[test]
    fn a_flow_that_was_opened_anew_stays() {
        let Some(map) = table(MapName::EstablishedV4) else { return };
        let (closed, anew) = (flow(proto::TCP, 1, 5, CLOSED), flow(proto::TCP, 1, 0, OPEN));
        put(&map, &anew);
        // The seal alone does not tell them apart.
        assert_eq!(closed[0].1.seal, anew[0].1.seal);
        for ((key, found), (_, now)) in closed.iter().zip(&anew) {
            assert!(!take(&map, key, found).unwrap());
            assert_eq!(map.get(key).unwrap().as_ref(), Some(now));
        }
        assert_eq!(remove(&map, &clock(), &closed[0].0).unwrap(), 0);
        assert_eq!(there(&map, &anew), [true; 2]);
        // What has come back by its other half is not written over.
        put_back(&map, &closed[0].0, &closed[0].1).unwrap();
        assert_eq!(map.get(&closed[0].0).unwrap(), Some(anew[0].1));
        put(&map, &closed);
        assert_eq!(remove(&map, &clock(), &closed[0].0).unwrap(), 1);
        assert_eq!(there(&map, &closed), [false; 2]);
        assert_eq!(remove(&map, &clock(), &closed[0].0).unwrap(), 0);
    }

    /// A masqueraded flow: main pair and what masquerades it, each with these states.
    fn masqueraded(n: u16, silent: u32, main: [u8; 2], masquerade: [u8; 2]) -> ([Entry; 2], [Entry; 2]) {
        let needs = |(key, value): Entry| {
            let value = ConnectionValue { flags: flags::NEEDS_MASQUERADE, ..value };
            (key, value.sealed(&key))
        };
        let main = flow(proto::TCP, n, silent, main).map(needs);
        let key = masquerade_key(&main[0].0, &main[0].1);
        let value = ConnectionValue {
            addr: Ipv4Be::from_octets([10, 0, 0, 50]),
            port: Be16::from_host(n),
            other: key.dport,
            flags: flags::MASQUERADE,
            seen: NOW - silent,
            state: masquerade[0],
            ..Default::default()
        }
        .sealed(&key);
        let (back_key, back) = pair(&key, &value);
        (main, [(key, value), (back_key, ConnectionValue { state: masquerade[1], ..back })])
    }

    /// Also where its own notes do not say that it is over; by whichever half the flow is found.
    #[test]
    fn what_masquerades_a_flow_goes_with_it() {
        let Some(map) = table(MapName::EstablishedV4) else { return };
        let refused = [state::SEEN, state::SEEN | state::RST];
        for (half, over, states) in [(0, CLOSED, CLOSED), (0, CLOSED, OPEN), (1, refused, refused), (1, refused, OPEN)]
        {
            let (main, masquerade) = masqueraded(1, 5, over, states);
            put(&map, &main);
            put(&map, &masquerade);
            assert_eq!(remove(&map, &clock(), &main[half].0).unwrap(), 2);
            assert_eq!(map.entries().unwrap(), [], "{half} {states:?}");
        }
        // The reply tuple went to another flow, and what masquerades is that one's.
        let ([(key, value), mut back], masquerade) = masqueraded(1, 5, CLOSED, OPEN);
        back.1 = ConnectionValue { port: Be16::from_host(81), ..back.1 }.sealed(&back.0);
        put(&map, &[(key, ConnectionValue { state: state::SEEN | state::RST, ..value }), back]);
        put(&map, &masquerade);
        assert_eq!(remove(&map, &clock(), &key).unwrap(), 1);
        assert_eq!((there(&map, &[back]), there(&map, &masquerade)), (vec![true], vec![true; 2]));
    }

    /// The mark is on the way there alone; the halves are one flow's all the same. Nobody is told by the mark, but by the reset.
    #[test]
    fn a_marked_flow_is_over_once_its_client_was_told() {
        let Some(map) = table(MapName::EstablishedV4) else { return };
        for (states, over) in [(OPEN, 0), ([state::SEEN | state::RST, state::SEEN], 1)] {
            let [(key, value), back] = flow(proto::TCP, 1, 5, states);
            let marked = ConnectionValue { flags: flags::RESET, ..value }.sealed(&key);
            for by in [key, back.0] {
                put(&map, &[(key, marked), back]);
                // The one on the way in tells, and is asked where both do.
                let expected = if by == key { over } else { 0 };
                assert_eq!(remove(&map, &clock(), &by).unwrap(), expected);
                assert_eq!(there(&map, &[(key, marked), back]), [expected == 0; 2]);
            }
        }
        // By the half that the mark is not on.
        let [(key, value), back] = flow(proto::TCP, 1, 5, [state::SEEN, state::SEEN | state::RST]);
        put(&map, &[(key, ConnectionValue { flags: flags::RESET, ..value }.sealed(&key)), back]);
        assert_eq!(remove(&map, &clock(), &back.0).unwrap(), 1);
        assert_eq!(map.entries().unwrap(), []);
    }

    /// The default size, half of it other flows than the other half: one octet tells them apart.
    #[test]
    fn a_table_of_the_default_size() {
        if !rustix::process::geteuid().is_root() {
            println!("SKIP flows that are over: not root");
            return;
        }
        let size = MapName::EstablishedV4.info(&Sizes::default()).max_entries;
        let usable = size - kept_by_cpus(size) - size / RESERVE;
        let over = u64::from(130_000 - usable / 4);
        for (what, states, expected) in [("live", OPEN, 0), ("over", CLOSED, over)] {
            let map: Map<ConnectionKey<A>, ConnectionValue<A>> =
                sys::create("established_v4", MapName::EstablishedV4.info(&Sizes::default()))
                    .and_then(Map::new)
                    .unwrap();
            let entries = (0..130_000_u32).flat_map(|n| {
                let [(mut key, value), (_, back)] = flow(proto::TCP, n as u16, n / 10_000, states);
                key.src = Ipv4Be::from_octets([10, 1, (n >> 16) as u8, 1]);
                let value = value.sealed(&key);
                let (other_key, other) = pair(&key, &value);
                [(key, value), (other_key, ConnectionValue { state: back.state, ..other })]
            });
            let (keys, values): (Vec<_>, Vec<_>) = entries.unzip();
            assert_eq!(map.put_all(&keys, &values, sys::ANY).0, 260_000);
            let used = || {
                let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
                Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
            };
            let before = used();
            let walk = sweep_of(&map);
            println!(
                "260 000 entries, all {what}: {} pairs taken out in {:?} of CPU time",
                walk.pairs,
                used() - before
            );
            assert_eq!(walk.pairs, expected);
        }
    }

    #[test]
    fn a_table_full_of_live_flows_is_said() {
        let Some(map) = table(MapName::AnsweredV4) else { return };
        // Some room is left, or the kernel evicts.
        (0..1900).for_each(|n| put(&map, &flow(proto::UDP, n, 100, OPEN)));
        let Walk { pairs, due, crowded, free, .. } = sweep_of(&map);
        assert_eq!((pairs, crowded), (0, true));
        // Of 296 that are left each CPU may have some, so that the kernel evicts for another; and some are a reserve.
        assert!(free <= 0, "{free}");
        assert!((64..100).contains(&due), "{due}");
    }

    /// Without programs, or with those of a version that did not count, there is nothing to look at.
    #[test]
    fn nothing_is_looked_at_before_something_came_in() {
        let Some(map) = table(MapName::EstablishedV4) else { return };
        let gone = |_: &str| Err(io::ErrorKind::NotFound.into());
        assert_eq!(Sweep::new(Timeouts::default()).look(gone).unwrap(), Swept::default());

        let info = MapName::Confirmed.info(&Sizes::default());
        let confirmed = sys::create("confirmed", info).unwrap();
        let spare = sys::create("spare", MapName::Spare.info(&Sizes::default())).unwrap();
        let open = |name: &str| match name {
            "confirmed" => confirmed.try_clone(),
            "spare" => spare.try_clone(),
            "established_v4" => map.fd().try_clone_to_owned(),
            name => Err(io::Error::other(format!("{name} was opened"))),
        };
        let mut sweep = Sweep::new(Timeouts::default());
        let mut walks = |flows: u64| {
            let cpus = aya::util::nr_cpus().unwrap();
            let mut bytes = vec![0; cpus * size_of::<Confirmed>()];
            bytes[..8].copy_from_slice(&flows.to_ne_bytes());
            // On each CPU one more: it is the sum that counts.
            bytes[(cpus - 1) * size_of::<Confirmed>()] += u8::from(cpus > 1);
            sys::put_bytes(confirmed.as_fd(), &0_u32.to_ne_bytes(), &bytes, sys::ANY).unwrap();
            sweep.look(open).unwrap().walks
        };
        // A quarter of an empty table, less what is kept back, is some 400 to 500 flows.
        assert_eq!([1, 1, 350, 520, 521, 880, 1040].map(&mut walks), [1, 0, 0, 1, 0, 0, 1]);

        // What the programs are told: of the table that was walked over how much may come in, of the others nothing.
        let told = MappedArray::<Spare>::new(spare.as_fd(), false).unwrap();
        let [Spare { entries, until, .. }, other] = [0, 1].map(|index| told.read(index));
        let now = Clock::new(Timeouts::default()).now;
        assert!(
            (3000..=4096 - i64::from(KEPT_BY_CPU + CAPACITY / RESERVE)).contains(&entries) && until > u64::from(now),
            "{entries} {until}"
        );
        assert_eq!(other, Spare::default());
    }
}
