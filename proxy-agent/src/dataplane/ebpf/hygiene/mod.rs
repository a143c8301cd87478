//! Ends what leads to backends that are gone: flows, and sockets pointed there at connect time (contract A103–A108).
//!
//! ```text
//! Ebpf::apply, resync ─► Change ─► Alive (which backends a frontend's flows may go on with)
//!                                    │ a UDP frontend lost one, or is gone; always at start
//!                                    ▼
//!                                  flows      the programs' tables        delete, mark
//!                                  datagrams  those of unconnected UDP    delete
//!                                  sockets    every network namespace     SOCK_DESTROY
//! ```
//!
//! Beside them, what is masqueraded with an address that the node has lost: no answer would ever come back. Such flows ask for another
//! address with their next packet, as netfilter forgets them (`masq_inet_event`).
//!
//! And flows that are over by themselves, where those that live might lose their place: on a second thread ([`sweep`]), since there may be many.
//!
//! On a thread of its own: a walk over full tables takes longer than a change may wait, and a thread that is in another
//! network namespace must not do anything else. It sleeps until something was lost. Each such round is followed by another
//! one: a program that read a frontend just before it changed may have entered a flow just after we looked. What fails is
//! tried again, after longer and longer pauses.
//!
//! Only what is in force counts: a frontend that could not be written is as it was, and its flows stay.

mod addresses;
mod datagrams;
mod flows;
mod notes;
mod sockets;
pub(super) mod sweep;
mod types;

use std::{
    collections::BTreeSet,
    convert::Infallible,
    io,
    net::IpAddr,
    sync::{
        Arc,
        atomic::Ordering,
        mpsc::{self, Sender},
    },
    time::{Duration, Instant},
};

use self::{
    flows::{Clock, Moved, Tables},
    sockets::{Home, Notes},
};
use super::{Timeouts, pins::Layout};
use crate::{
    dataplane::{
        Report,
        alive::{self, Alive, Change, Ended, Keep},
        rounds::Rounds,
    },
    desired::{Changes, DesiredState},
};

pub(crate) use sockets::{Unreachable, reaches_sockets};

/// The second look.
const AGAIN: Duration = Duration::from_secs(1);
/// The longest pause between two tries at what fails.
const LONGEST: Duration = Duration::from_secs(300);
/// Rounds take at most one part in so many of the time, whatever is lost meanwhile.
const SHARE: u32 = 4;

#[derive(Debug)]
enum Job {
    All(Vec<(crate::desired::Frontend, Keep)>),
    Change(Change),
    /// The node's own addresses, by now.
    Addresses(BTreeSet<IpAddr>),
    /// Maps took the place of others.
    Look,
}

/// The threads' other end. They end with this.
#[derive(Debug)]
pub(crate) struct Hygiene {
    jobs: Sender<Job>,
    _sweeping: Sender<Infallible>,
}

impl Hygiene {
    /// `pods`: whether sockets of pods can be found and destroyed.
    pub(crate) fn start(
        layout: Layout,
        pods: Result<(), Unreachable>,
        timeouts: Timeouts,
        ended: Arc<Ended>,
    ) -> io::Result<Self> {
        let (sweeping, end) = mpsc::channel();
        let (of, counts) = (layout.clone(), Arc::clone(&ended));
        std::thread::Builder::new().name("sweep".into()).spawn(move || sweep::run(&of, timeouts, &counts, &end))?;
        let (jobs, queue) = mpsc::channel();
        let mut worker = Worker::new(layout, pods, timeouts, ended);
        std::thread::Builder::new().name("hygiene".into()).spawn(move || worker.run(&queue))?;
        Ok(Self { jobs, _sweeping: sweeping })
    }

    fn send(&self, job: Job) {
        if self.jobs.send(job).is_err() {
            tracing::error!("the thread that ends stale flows is gone; restart the agent");
        }
    }

    /// Everything that should be in force; `report` says what is not.
    pub(crate) fn all(&self, desired: &DesiredState, report: &Report) {
        self.send(Job::All(alive::all(desired, report)));
    }

    pub(crate) fn changed(&self, changes: &Changes, report: &Report) {
        if let Some(change) = Change::of(changes, report) {
            self.send(Job::Change(change));
        }
    }

    /// The node's devices, or their addresses, may be other ones.
    pub(crate) fn devices(&self) {
        match addresses::own() {
            Ok(own) => self.send(Job::Addresses(own)),
            Err(error) => {
                tracing::warn!(%error, "the node's addresses cannot be listed; flows masqueraded with lost ones go on")
            }
        }
    }

    pub(crate) fn look(&self) {
        self.send(Job::Look);
    }
}

/// Counts what still goes by the maps of a directory.
#[derive(Debug)]
pub(crate) struct Census {
    timeouts: Timeouts,
    /// Made with the first count; or why there is none.
    notes: Option<Result<Notes, String>>,
}

impl Census {
    pub(crate) const fn new(timeouts: Timeouts) -> Self {
        Self { timeouts, notes: None }
    }

    pub(crate) const fn timeouts(&self) -> Timeouts {
        self.timeouts
    }

    /// Flows that are not over, those of unconnected sockets among them, and where it is asked for, sockets that are pointed at a backend.
    pub(crate) fn count(&mut self, layout: &Layout, sockets: bool) -> io::Result<u64> {
        let clock = Clock::new(self.timeouts);
        let packets = Tables::live_v4(layout, &clock)? + Tables::live_v6(layout, &clock)?;
        let flows = packets + datagrams::live(layout, &clock)?;
        if !sockets {
            return Ok(flows);
        }
        let notes = self.notes.get_or_insert_with(|| {
            let opened = Notes::open().map_err(|error| error.to_string());
            if let Err(why) = &opened {
                tracing::warn!(
                    why,
                    "sockets that were pointed at a backend cannot be counted; they are not waited for"
                );
            }
            opened
        });
        Ok(flows + notes.as_ref().map_or(Ok(0), |notes| notes.count(layout))?)
    }
}

struct Worker {
    layout: Layout,
    pods: Result<(), Unreachable>,
    timeouts: Timeouts,
    ended: Arc<Ended>,
    /// Made with the first round.
    notes: Option<Notes>,
    home: Option<Home>,
    alive: Alive,
    /// What flows may be masqueraded with, when it was listed last; none: not known.
    own: BTreeSet<IpAddr>,
    /// How often flows are still to be asked whether the node has their source: an address went.
    looks: u8,
    /// When to go round: something was lost; for the second look; a TCP backend is gone for long enough.
    due: Option<Instant>,
    again: Option<Instant>,
    /// Until what failed is tried again; longer each time, until something else is lost.
    pause: Duration,
    fades: Option<Instant>,
    not_before: Instant,
    complaint: Option<String>,
}

impl Worker {
    fn new(layout: Layout, pods: Result<(), Unreachable>, timeouts: Timeouts, ended: Arc<Ended>) -> Self {
        Self {
            layout,
            pods,
            timeouts,
            ended,
            notes: None,
            home: None,
            alive: Alive::default(),
            own: BTreeSet::new(),
            looks: 0,
            due: None,
            again: None,
            pause: AGAIN,
            fades: None,
            not_before: Instant::now(),
            complaint: None,
        }
    }
}

impl Rounds for Worker {
    type Job = Job;

    fn next(&self) -> Option<Instant> {
        [self.due, self.again, self.fades].into_iter().flatten().min().map(|at| at.max(self.not_before))
    }

    fn take(&mut self, job: Job) {
        let now = Instant::now();
        let lost = match job {
            Job::All(all) => {
                self.alive.replace(all, now);
                true
            }
            Job::Change(change) => self.alive.apply(change, now),
            // What is masqueraded with an address that is new was so by somebody else.
            Job::Addresses(own) => {
                let first = self.own.is_empty();
                let before = std::mem::replace(&mut self.own, own);
                let shrank = first || !before.is_subset(&self.own);
                if shrank {
                    self.looks = 2;
                }
                shrank
            }
            Job::Look => true,
        };
        // What no frontend is known of yet would seem lost: devices may be told before it is, and flows be there before that.
        if lost && self.alive.is_complete() {
            self.due.get_or_insert(now);
        }
        self.fades = self.alive.next_fade();
    }

    fn turn(&mut self) {
        let start = Instant::now();
        if start < self.not_before {
            return;
        }
        let is_due = |at: &mut Option<Instant>| at.take_if(|at| *at <= start).is_some();
        let (due, again) = (is_due(&mut self.due), is_due(&mut self.again));
        let (faded, fades) = self.alive.settle(start);
        self.fades = fades;
        if !due && !again && !faded {
            return;
        }
        let trouble = self.round();
        let failed = trouble.iter().any(|trouble| trouble.may_pass);
        let again = next_try(due || faded || (self.looks > 0 && !failed), failed, &mut self.pause);
        if let Some(pause) = again {
            self.again = Some(start + pause);
        }
        // A directory that is cleared away has nothing to look at.
        if trouble.is_empty() || self.layout.maps.exists() {
            self.complain(&trouble);
        }
        self.not_before = start + start.elapsed() * SHARE;
    }
}

impl Worker {
    /// Looks at everything once; what could not be looked at.
    fn round(&mut self) -> Vec<Trouble> {
        let mut trouble = Vec::new();
        let (mut udp_flows, mut tcp_flows, mut masquerades) = (0, 0, 0);
        let flows = self.flows(&mut udp_flows, &mut tcp_flows).and_then(|()| self.masquerades(&mut masquerades));
        trouble
            .extend(flows.err().map(|error| Trouble::passing(format!("flows to removed backends may go on: {error}"))));
        let mut destroyed = 0;
        match self.end_sockets() {
            Ok(round) => {
                destroyed = round.destroyed;
                trouble.extend(self.left(round));
            }
            Err(error) => {
                trouble.push(Trouble::passing(format!("sockets on removed backends cannot be looked for: {error}")));
            }
        }
        for (counter, count) in [
            (&self.ended.udp_flows, udp_flows),
            (&self.ended.tcp_flows, tcp_flows),
            (&self.ended.masquerades, masquerades),
            (&self.ended.sockets, destroyed),
        ] {
            counter.fetch_add(count, Ordering::Relaxed);
        }
        if masquerades > 0 {
            tracing::info!(masquerades, "flows get another source: theirs is no address of this node any more");
        }
        if udp_flows + tcp_flows + destroyed > 0 {
            tracing::info!(udp_flows, tcp_flows, sockets = destroyed, "ended what led to removed backends");
        }
        trouble
    }

    /// Counts what was ended also if it fails in the midst.
    fn flows(&self, udp: &mut u64, tcp: &mut u64) -> io::Result<()> {
        let Self { layout, alive, .. } = self;
        let (v4, v6) = (Tables::open_v4(layout)?, Tables::open_v6(layout)?);
        *udp += v4.end_udp(alive)?;
        *udp += v6.end_udp(alive)?;
        *udp += datagrams::end(layout, alive)?;
        if alive.resets_tcp() {
            *tcp += v4.end_tcp(alive)?;
            *tcp += v6.end_tcp(alive)?;
        }
        Ok(())
    }

    /// Nothing to do for as long as the node loses no address.
    fn masquerades(&mut self, moved: &mut u64) -> io::Result<()> {
        if self.own.is_empty() {
            // Nothing can be told; those that come are the first again, and call for a look.
            self.looks = 0;
        }
        if self.looks == 0 {
            return Ok(());
        }
        // A round that could not come back would ask a pod's kernel which addresses are local, and lose them all.
        self.home.as_mut().map_or(Ok(()), Home::back)?;
        let Self { layout, own, timeouts, .. } = self;
        let (clock, mut lost) = (Clock::new(*timeouts), addresses::Lost::new(own));
        let v4 = Tables::open_v4(layout)?.masquerade_anew(&clock, |address| lost.has(address))?;
        *moved += v4.flows;
        let v6 = Tables::open_v6(layout)?.masquerade_anew(&clock, |address| lost.has(address))?;
        *moved += v6.flows;
        if ![v4, v6].iter().any(|Moved { rest, .. }| *rest) {
            self.looks -= 1;
        }
        Ok(())
    }

    /// Whatever `--socket-lb` says: an earlier run may have pointed sockets at backends.
    fn end_sockets(&mut self) -> io::Result<sockets::Round> {
        let Self { layout, alive, notes, home, pods, .. } = self;
        let notes = match notes {
            Some(notes) => notes,
            None => notes.insert(Notes::open()?),
        };
        let home = match home {
            Some(home) => home,
            None => home.insert(Home::open()?),
        };
        sockets::end(notes, layout, alive, home, pods.is_ok())
    }

    fn left(&self, sockets::Round { destroyed: _, left, why }: sockets::Round) -> Option<Trouble> {
        let may_pass = self.pods.is_ok();
        let why = match &self.pods {
            Err(Unreachable { why, .. }) => why.clone(),
            Ok(()) => why.unwrap_or_else(|| "they are in no network namespace that can be found".into()),
        };
        let text = format!("sockets are left on removed backends: {why}; see `proxy-agent check`");
        (left > 0).then_some(Trouble { text, left, may_pass })
    }

    /// Says a thing once, until it changes.
    fn complain(&mut self, trouble: &[Trouble]) {
        let text: Vec<_> = trouble.iter().map(|trouble| trouble.text.as_str()).collect();
        let complaint = (!text.is_empty()).then(|| text.join("; "));
        if let Some(text) = complaint.as_ref().filter(|text| self.complaint.as_ref() != Some(text)) {
            let sockets: usize = trouble.iter().map(|trouble| trouble.left).sum();
            tracing::warn!(sockets, "{text}");
        }
        self.complaint = complaint;
    }
}

/// Something that could not be ended.
struct Trouble {
    text: String,
    /// Sockets that are known to be concerned.
    left: usize,
    /// Trying again may help.
    may_pass: bool,
}

impl Trouble {
    const fn passing(text: String) -> Self {
        Self { text, left: 0, may_pass: true }
    }
}

/// How long after a round the next one is: the second look at a loss, or another try at what failed.
fn next_try(lost: bool, failed: bool, pause: &mut Duration) -> Option<Duration> {
    if lost {
        *pause = AGAIN;
    }
    if !failed {
        return lost.then_some(AGAIN);
    }
    let now = *pause;
    *pause = (now * 2).min(LONGEST);
    Some(now)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        desired::{Backend, Frontend},
        model::{Port, Protocol},
    };
    use std::collections::BTreeSet;

    /// A connection may move between two tables while they are walked over; TCP's grace is no second look.
    #[test]
    fn the_end_of_a_grace_is_a_loss_like_any_other() {
        let empty = tempfile::tempdir().unwrap();
        let mut worker = Worker::new(Layout::of(empty.path()), Ok(()), Timeouts::default(), Arc::default());
        let port = Port::new(80).unwrap();
        let frontend = Frontend { addr: [10, 96, 0, 1].into(), port, protocol: Protocol::Tcp };
        let keep = Keep::Only(vec![Backend { addr: [10, 0, 0, 1].into(), port }].into());
        let now = Instant::now();
        let change = Change { set: vec![(frontend, keep)], removed: BTreeSet::new() };
        worker.alive.apply(change, now.checked_sub(alive::TCP_GRACE).unwrap());
        // As if something else had failed for long: there is nothing here to look at.
        worker.pause = LONGEST;
        worker.turn();
        assert!(worker.again.is_some_and(|at| at < now + AGAIN * 30), "{:?} from {now:?}", worker.again);
    }

    /// A mode that is taken up again has flows and sockets before it has a frontend.
    #[test]
    fn nothing_is_looked_for_before_it_is_known_what_should_be_there() {
        let empty = tempfile::tempdir().unwrap();
        let mut worker = Worker::new(Layout::of(empty.path()), Ok(()), Timeouts::default(), Arc::default());
        for job in [Job::Addresses([[192, 0, 2, 1].into()].into()), Job::Look] {
            worker.take(job);
            assert_eq!(worker.due, None);
        }
        worker.take(Job::All(Vec::new()));
        assert!(worker.due.is_some());
        assert_eq!(worker.looks, 2, "masquerade addresses are looked at then");
    }

    /// What else is lost says nothing of addresses.
    #[test]
    fn sources_are_asked_about_when_an_address_went() {
        let empty = tempfile::tempdir().unwrap();
        let mut worker = Worker::new(Layout::of(empty.path()), Ok(()), Timeouts::default(), Arc::default());
        let own = |list: &[u8]| Job::Addresses(list.iter().map(|n| IpAddr::from([192, 0, 2, *n])).collect());
        for (job, looks) in [
            (Job::Look, 0),
            (own(&[1]), 2),
            (own(&[1, 2]), 0),
            (own(&[1, 2]), 0),
            (Job::Look, 0),
            (own(&[1]), 2),
            (own(&[3]), 2),
        ] {
            worker.looks = 0;
            worker.take(job);
            assert_eq!(worker.looks, looks);
        }
        // With no address at all there is nothing to ask, and no reason to go round for ever.
        worker.take(own(&[]));
        assert!(worker.masquerades(&mut 0).is_ok() && worker.looks == 0);
        worker.take(own(&[3]));
        assert_eq!(worker.looks, 2);
        // There are no tables here: what could not be looked at is still to be looked at.
        assert!(worker.masquerades(&mut 0).is_err() && worker.looks == 2);
    }

    #[test]
    fn what_fails_is_tried_less_and_less_until_something_else_is_lost() {
        let mut pause = AGAIN;
        let seconds = |pause: Option<Duration>| pause.map(|pause| pause.as_secs());
        assert_eq!(seconds(next_try(true, false, &mut pause)), Some(1));
        assert_eq!(seconds(next_try(false, false, &mut pause)), None);
        let tries: Vec<_> = (0..12).map(|round| seconds(next_try(round == 0, true, &mut pause)).unwrap()).collect();
        assert_eq!(tries, [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300, 300]);
        assert_eq!(seconds(next_try(true, true, &mut pause)), Some(1));
        assert_eq!(seconds(next_try(false, true, &mut pause)), Some(2));
    }
}
