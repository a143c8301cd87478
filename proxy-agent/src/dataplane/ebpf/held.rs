//! Keeps fragments that came before their datagram's first one (contract F41), and brings them back when that has come.
//!
//! ```text
//! tc program ─► no first fragment seen ─► copy to `held` (ring buffer) ─► here
//!                                                                          │ the first came, and is of a flow of ours
//! tc program ◄─ tc_return (BPF_PROG_TEST_RUN, bpf_clone_redirect) ◄────────┘
//! ```
//!
//! What came went on as if nobody kept it: to the stack, which knows what to do with a datagram that is none of ours, or nowhere if it was
//! for an address of ours. So nothing depends on an agent that is there. Only the first fragment tells which it is; whether that was translated
//! is asked of the tables, and a copy of what was not is thrown away.
//!
//! On a thread of its own, which sleeps until there is a record. The kernel may have other fragments wait for half a minute; a few seconds
//! are more than any network changes the order by.

use std::{
    cell::LazyCell,
    collections::VecDeque,
    io,
    net::IpAddr,
    os::fd::{AsFd as _, OwnedFd},
    time::{Duration, Instant},
};

use aya::{
    maps::{Map as AyaMap, MapData, RingBuf},
    programs::{SchedClassifier, TestRun as _, TestRunOptions},
};
use proxy_common::{
    Address, Ipv4Be, Ipv6Be,
    connection::{ConnectionKey, ConnectionValue, FragmentKey, FragmentValue, hook},
    held::{self, Held},
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{
    hooks::RETURN_PROGRAM,
    layout::MapName,
    pins::Layout,
    sys::{self, Map},
};

/// How long a copy is kept.
const KEPT: Duration = Duration::from_secs(5);
/// How many are, at most, and of one sender. Beyond that the oldest goes.
const MOST: usize = 256;
const MOST_OF_ONE: usize = MOST / 4;
/// How often the first one is looked for: nearly at once at first, since a network hardly lets a packet wait longer.
const SOON: Duration = Duration::from_millis(2);
const LATER: Duration = Duration::from_millis(20);
const EARLY: Duration = Duration::from_millis(100);
/// For each look at so many the pause is so many times as long.
const SHARE: usize = 32;
/// Seconds for which the programs let a first fragment speak for others.
const SPEAKS: u32 = 30;

/// `BPF_F_INGRESS`.
const INGRESS: u32 = 1;

/// Where `struct __sk_buff` (include/uapi/linux/bpf.h) has what the kernel takes from whoever runs a program.
mod sk_buff {
    pub(super) const MARK: usize = 8;
    pub(super) const IFINDEX: usize = 40;
    pub(super) const CB: usize = 48;
    pub(super) const LEN: usize = 68;
}

/// The thread's other end. It ends with this.
#[derive(Debug)]
pub(crate) struct Keeper {
    _end: OwnedFd,
}

impl Keeper {
    pub(crate) fn start(layout: Layout) -> io::Result<Self> {
        let (end, own) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        std::thread::Builder::new().name("fragments".into()).spawn(move || {
            if let Err(error) = run(&layout, &end) {
                tracing::warn!(%error, "fragments that overtake their datagram's first one are lost from here on; restart the agent");
            }
        })?;
        Ok(Self { _end: own })
    }
}

/// Until the other end of `end` is gone.
fn run(layout: &Layout, end: &OwnedFd) -> io::Result<()> {
    let map = MapData::from_fd(sys::open(&layout.map(MapName::Held))?).map_err(io::Error::other)?;
    let mut ring = RingBuf::try_from(AyaMap::RingBuf(map)).map_err(io::Error::other)?;
    // Left by an agent that is gone: nobody knows for how long they have waited.
    while ring.next().is_some() {}
    let (mut kept, mut next, mut warned) = (Kept::default(), Instant::now(), false);
    loop {
        let pause = kept.pause(Instant::now()).map(|_| next.saturating_duration_since(Instant::now()));
        let (wait, ring_fd) = (pause.and_then(|pause| Timespec::try_from(pause).ok()), ring.as_fd());
        let mut fds = [PollFd::new(&ring_fd, PollFlags::IN), PollFd::new(end, PollFlags::IN)];
        match poll(&mut fds, wait.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        if !fds[1].revents().is_empty() {
            return Ok(());
        }
        let now = Instant::now();
        while let Some(record) = ring.next() {
            kept.add(&record, now);
        }
        // However many come: looks are what costs.
        if now < next {
            continue;
        }
        // Opened anew for each look: maps may have been replaced.
        let (v4, v6) = (LazyCell::new(|| Tables::open_v4(layout)), LazyCell::new(|| Tables::open_v6(layout)));
        let due = kept.due(now, |which| match which {
            Which::V4(key) => v4.as_ref().is_ok_and(|tables| tables.lead_on(&key).unwrap_or(false)),
            Which::V6(key) => v6.as_ref().is_ok_and(|tables| tables.lead_on(&key).unwrap_or(false)),
        });
        for frame in due {
            if let Err(error) = give_back(layout, &frame)
                && !std::mem::replace(&mut warned, true)
            {
                tracing::warn!(%error, ifindex = frame.ifindex, "a fragment could not be brought back; said once");
            }
        }
        next = now + kept.pause(now).unwrap_or_default();
    }
}

/// Which datagram it is of, and at which hook.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Which {
    V4(FragmentKey<Ipv4Be>),
    V6(FragmentKey<Ipv6Be>),
}

impl Which {
    fn sender(&self) -> IpAddr {
        match self {
            Self::V4(key) => key.src.to_ip(),
            Self::V6(key) => key.src.to_ip(),
        }
    }

    const fn is_incoming(&self) -> bool {
        let (Self::V4(FragmentKey { hook, .. }) | Self::V6(FragmentKey { hook, .. })) = self;
        *hook == hook::INGRESS
    }
}

/// A copy, and where it was.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Frame {
    which: Which,
    ifindex: u32,
    mark: u32,
    /// From the Ethernet header on; where there was none, with one that says the protocol alone.
    bytes: Vec<u8>,
    since: Instant,
}

impl Frame {
    /// Nothing of a record that is not whole.
    fn read(record: &[u8], since: Instant) -> Option<Self> {
        match *record.first()? {
            held::V4 => Self::of(record, Which::V4, since),
            held::V6 => Self::of(record, Which::V6, since),
            _ => None,
        }
    }

    fn of<A: Address>(record: &[u8], which: fn(FragmentKey<A>) -> Which, since: Instant) -> Option<Self>
    where
        Held<A>: aya::Pod,
    {
        if record.len() < size_of::<Held<A>>() {
            return None;
        }
        // SAFETY: as many bytes are there; plain old data, of which every bit pattern is valid, read from wherever it lies.
        let Held { l3, len, ifindex, mark, key, frame, .. } =
            unsafe { record.as_ptr().cast::<Held<A>>().read_unaligned() };
        let mut bytes = frame.get(..usize::from(len))?.to_vec();
        if l3 == 0 {
            let ethertype: [u8; 2] = if A::VERSION == held::V4 { [0x08, 0x00] } else { [0x86, 0xdd] };
            bytes.splice(..0, [0; 12].into_iter().chain(ethertype));
        }
        Some(Self { which: which(key), ifindex, mark, bytes, since })
    }
}

#[derive(Debug, Default)]
struct Kept(VecDeque<Frame>);

impl Kept {
    fn add(&mut self, record: &[u8], now: Instant) {
        let Some(frame) = Frame::read(record, now) else { return };
        let sender = frame.which.sender();
        let mut others = self.0.iter().enumerate().filter(|(_, other)| other.which.sender() == sender);
        let oldest = others.next().map(|(at, _)| at);
        if others.count() + 1 >= MOST_OF_ONE {
            oldest.and_then(|at| self.0.remove(at));
        } else if self.0.len() == MOST {
            self.0.pop_front();
        }
        self.0.push_back(frame);
    }

    /// Between two looks; none where there is nothing to look for.
    fn pause(&self, now: Instant) -> Option<Duration> {
        let youngest = self.0.back()?;
        let pause = if now.saturating_duration_since(youngest.since) < EARLY { SOON } else { LATER };
        Some(pause.saturating_mul(1 + (self.0.len() / SHARE) as u32))
    }

    /// Takes out those of which the first one `has_come`, in the order in which they came, and forgets those that were kept for long enough. What was
    /// seen at several hooks (of a bridge and its port) was to be translated at the first of them.
    fn due(&mut self, now: Instant, has_come: impl Fn(Which) -> bool) -> Vec<Frame> {
        let mut due = Vec::new();
        let mut asked: Vec<(Which, u32, bool)> = Vec::new();
        for frame in std::mem::take(&mut self.0) {
            let known = asked.iter().find(|(which, ..)| *which == frame.which).map(|(_, first, come)| (*first, *come));
            let (first, come) = known.unwrap_or_else(|| {
                let come = has_come(frame.which);
                asked.push((frame.which, frame.ifindex, come));
                (frame.ifindex, come)
            });
            if come {
                if frame.ifindex == first {
                    due.push(frame);
                }
            } else if now.saturating_duration_since(frame.since) < KEPT {
                self.0.push_back(frame);
            }
        }
        due
    }
}

/// What tells whether a first fragment has come, and has led to a flow.
struct Tables<A> {
    firsts: Map<FragmentKey<A>, FragmentValue>,
    flows: [Map<ConnectionKey<A>, ConnectionValue<A>>; 3],
}

impl Tables<Ipv4Be> {
    fn open_v4(layout: &Layout) -> io::Result<Self> {
        let flows = [MapName::EstablishedV4, MapName::AnsweredV4, MapName::HalfOpenV4];
        Self::open(layout, MapName::FragmentsV4, flows)
    }
}

impl Tables<Ipv6Be> {
    fn open_v6(layout: &Layout) -> io::Result<Self> {
        let flows = [MapName::EstablishedV6, MapName::AnsweredV6, MapName::HalfOpenV6];
        Self::open(layout, MapName::FragmentsV6, flows)
    }
}

impl<A: Address> Tables<A>
where
    FragmentKey<A>: aya::Pod,
    ConnectionKey<A>: aya::Pod,
    ConnectionValue<A>: aya::Pod,
{
    fn open(layout: &Layout, firsts: MapName, [one, other, third]: [MapName; 3]) -> io::Result<Self> {
        let map = |name| sys::open(&layout.map(name)).and_then(Map::new);
        let firsts = sys::open(&layout.map(firsts)).and_then(Map::new)?;
        Ok(Self { firsts, flows: [map(one)?, map(other)?, map(third)?] })
    }

    /// Whether the datagram's others are translated by now.
    fn lead_on(&self, key: &FragmentKey<A>) -> io::Result<bool> {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic).tv_sec as u32;
        // A later second: another CPU's clock was read since.
        let speaks = |first: &FragmentValue| now.wrapping_sub(first.seen).cast_signed() <= SPEAKS.cast_signed();
        let first = self.firsts.get(key)?.filter(speaks);
        let Some(FragmentValue { sport, dport, proto, .. }) = first else { return Ok(false) };
        let flow = ConnectionKey::new(key.hook, proto, key.src, sport, key.dst, dport);
        for map in &self.flows {
            if map.get(&flow)?.is_some() {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// Puts a copy where it was: before the program that had left it alone.
fn give_back(layout: &Layout, frame: &Frame) -> Result<(), aya::programs::ProgramError> {
    let program = SchedClassifier::from_pin(layout.programs.join(RETURN_PROGRAM))?;
    let mut context = [0; sk_buff::LEN];
    let incoming = if frame.which.is_incoming() { INGRESS } else { 0 };
    for (at, word) in [
        (sk_buff::MARK, frame.mark),
        (sk_buff::IFINDEX, frame.ifindex),
        (sk_buff::CB, frame.ifindex),
        (sk_buff::CB + 4, incoming),
    ] {
        if let Some(to) = context.get_mut(at..at + 4) {
            to.copy_from_slice(&word.to_ne_bytes());
        }
    }
    let options = TestRunOptions { data_in: Some(&frame.bytes), ctx_in: Some(&context), ..TestRunOptions::default() };
    program.test_run(options).map(drop)
}

#[cfg(test)]
mod tests {
    use proxy_common::held::{FRAME, ROOM};

    use super::*;

    fn record<A: Address>(l3: u8, len: usize, key: FragmentKey<A>) -> Vec<u8> {
        let mut frame = [0xee; ROOM];
        frame[..len].fill(7);
        let held = Held { version: A::VERSION, l3, len: len as u16, ifindex: 3, mark: 9, key, frame, pad: 0 };
        // SAFETY: plain old data without padding.
        unsafe { std::slice::from_raw_parts((&raw const held).cast::<u8>(), size_of_val(&held)) }.to_vec()
    }

    fn key<A: Address>(id: u32, hook: u8) -> FragmentKey<A> {
        FragmentKey { src: A::UNSPECIFIED, dst: A::UNSPECIFIED, id, proto: 17, hook, pad: 0 }
    }

    #[test]
    fn a_record_is_a_frame() {
        let now = Instant::now();
        let (v4, v6) = (key::<Ipv4Be>(5, hook::INGRESS), key::<Ipv6Be>(5, hook::EGRESS));
        let frame = Frame::read(&record(14, 60, v4), now).unwrap();
        let expected = Frame { which: Which::V4(v4), ifindex: 3, mark: 9, bytes: vec![7; 60], since: now };
        assert_eq!((&frame, frame.which.is_incoming()), (&expected, true));
        // The kernel that takes it back wants to see an Ethernet header.
        let frame = Frame::read(&record(0, FRAME, v6), now).unwrap();
        assert_eq!((frame.which, frame.which.is_incoming()), (Which::V6(v6), false));
        assert_eq!((frame.bytes.len(), &frame.bytes[12..15]), (FRAME + 14, &[0x86, 0xdd, 7][..]));
        for broken in [&[][..], &[4; 100], &[9; 5000]] {
            assert_eq!(Frame::read(broken, now), None);
        }
    }

    #[test]
    fn the_first_one_sets_its_others_free_in_their_order() {
        let now = Instant::now();
        let mut kept = Kept::default();
        assert_eq!(kept.pause(now), None, "an idle node looks at nothing");
        for (n, id) in [1, 2, 1, 3].into_iter().enumerate() {
            kept.add(&record(14, 100 + n, key::<Ipv4Be>(id, hook::INGRESS)), now);
        }
        assert_eq!(kept.pause(now), Some(SOON));
        let is = |id: u32| move |which: Which| which == Which::V4(key(id, hook::INGRESS));
        let lengths = |due: Vec<Frame>| due.iter().map(|frame| frame.bytes.len()).collect::<Vec<_>>();
        assert_eq!(lengths(kept.due(now, is(9))), [] as [usize; 0]);
        assert_eq!(lengths(kept.due(now, is(1))), [100, 102]);
        assert_eq!(lengths(kept.due(now, is(1))), [] as [usize; 0], "each is brought back once");
        assert_eq!(kept.0.len(), 2);
        assert_eq!(lengths(kept.due(now + KEPT, is(3))), [103], "the other one has waited for long enough");
        assert!(kept.0.is_empty());
    }

    #[test]
    fn there_is_an_end_to_what_is_kept() {
        let (mut kept, now) = (Kept::default(), Instant::now());
        let from = |sender: u8, id: u32| FragmentKey {
            src: Ipv4Be::from_octets([192, 0, 2, sender]),
            ..key::<Ipv4Be>(id, hook::INGRESS)
        };
        for id in 0..MOST as u32 {
            kept.add(&record(14, 60, from(1, id)), now);
        }
        // One sender has a share, and that is its youngest.
        assert_eq!((kept.0.len(), kept.0[0].which), (MOST_OF_ONE, Which::V4(from(1, (MOST - MOST_OF_ONE) as u32))));
        for sender in 2..=255 {
            kept.add(&record(14, 60, from(sender, 1)), now);
        }
        assert_eq!((kept.0.len(), kept.0[MOST - 1].which), (MOST, Which::V4(from(255, 1))));
        assert!(kept.pause(now) > Some(SOON * 8), "{:?}", kept.pause(now));
    }

    #[test]
    fn what_was_seen_twice_goes_where_it_was_seen_first() {
        let (mut kept, now) = (Kept::default(), Instant::now());
        let which = key::<Ipv4Be>(1, hook::EGRESS);
        for ifindex in [3, 7, 3, 7] {
            kept.add(&record(14, 60, which), now);
            kept.0.back_mut().unwrap().ifindex = ifindex;
        }
        let at: Vec<_> = kept.due(now, |_| true).iter().map(|frame| frame.ifindex).collect();
        assert_eq!((at, kept.0.len()), (vec![3, 3], 0));
    }
}
