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
//! On a thread of its own: a walk over full tables takes longer than a change may wait, and a thread that is in another
//! network namespace must not do anything else. It sleeps until something was lost. Each such round is followed by another
//! one: a program that read a frontend just before it changed may have entered a flow just after we looked. What fails is
//! tried again, after longer and longer pauses.
//!
//! Only what is in force counts: a frontend that could not be written is as it was, and its flows stay.

mod alive;
mod datagrams;
mod flows;
mod notes;
mod sockets;
mod types;

use std::{
    collections::BTreeSet,
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{self, Receiver, RecvTimeoutError, Sender},
    },
    time::{Duration, Instant},
};

use self::{
    alive::{Alive, Change, Keep},
    flows::Tables,
    sockets::{Home, Notes},
};
use super::pins::Layout;
use crate::{
    dataplane::Report,
    desired::{Changes, DesiredState, Frontend},
};

pub(crate) use sockets::{Unreachable, reaches_sockets};

/// The second look.
const AGAIN: Duration = Duration::from_secs(1);
/// The longest pause between two tries at what fails.
const LONGEST: Duration = Duration::from_secs(300);
/// Rounds take at most one part in so many of the time, whatever is lost meanwhile.
const SHARE: u32 = 4;

/// What was ended since the agent started.
#[derive(Debug, Default)]
pub struct Ended {
    udp_flows: AtomicU64,
    tcp_flows: AtomicU64,
    sockets: AtomicU64,
}

impl Ended {
    /// What is counted, by name.
    pub fn counts(&self) -> [(&'static str, u64); 3] {
        let Self { udp_flows, tcp_flows, sockets } = self;
        [("udp_flow", udp_flows), ("tcp_flow", tcp_flows), ("socket", sockets)]
            .map(|(name, count)| (name, count.load(Ordering::Relaxed)))
    }
}

#[derive(Debug)]
enum Job {
    All(Vec<(Frontend, Keep)>),
    Change(Change),
    /// Maps took the place of others.
    Look,
}

/// The thread's other end. It ends with this.
#[derive(Debug)]
pub(crate) struct Hygiene {
    jobs: Sender<Job>,
}

impl Hygiene {
    /// `pods`: whether sockets of pods can be found and destroyed.
    pub(crate) fn start(layout: Layout, pods: Result<(), Unreachable>, ended: Arc<Ended>) -> io::Result<Self> {
        let (jobs, queue) = mpsc::channel();
        let mut worker = Worker::new(layout, pods, ended);
        std::thread::Builder::new().name("hygiene".into()).spawn(move || worker.run(&queue))?;
        Ok(Self { jobs })
    }

    fn send(&self, job: Job) {
        if self.jobs.send(job).is_err() {
            tracing::error!("the thread that ends stale flows is gone; restart the agent");
        }
    }

    /// Everything that should be in force; `report` says what is not.
    pub(crate) fn all(&self, desired: &DesiredState, report: &Report) {
        let mut all: Vec<_> = desired
            .frontends
            .iter()
            .map(|(frontend, spec)| {
                let keep = if report.failed.contains_key(frontend) { Keep::All } else { spec.alive.clone().into() };
                (*frontend, keep)
            })
            .collect();
        // Those that could not be removed.
        all.extend(report.failed.keys().filter(|f| !desired.frontends.contains_key(f)).map(|f| (*f, Keep::All)));
        self.send(Job::All(all));
    }

    pub(crate) fn changed(&self, changes: &Changes, report: &Report) {
        let landed = |frontend: &Frontend| !report.failed.contains_key(frontend);
        let set = changes.set.iter().filter(|(frontend, _)| landed(frontend));
        let set: Vec<_> = set.map(|(frontend, spec)| (*frontend, spec.alive.clone().into())).collect();
        let removed: BTreeSet<_> = changes.remove.iter().copied().filter(landed).collect();
        if !set.is_empty() || !removed.is_empty() {
            self.send(Job::Change(Change { set, removed }));
        }
    }

    pub(crate) fn look(&self) {
        self.send(Job::Look);
    }
}

struct Worker {
    layout: Layout,
    pods: Result<(), Unreachable>,
    ended: Arc<Ended>,
    /// Made with the first round.
    notes: Option<Notes>,
    home: Option<Home>,
    alive: Alive,
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
    fn new(layout: Layout, pods: Result<(), Unreachable>, ended: Arc<Ended>) -> Self {
        Self {
            layout,
            pods,
            ended,
            notes: None,
            home: None,
            alive: Alive::default(),
            due: None,
            again: None,
            pause: AGAIN,
            fades: None,
            not_before: Instant::now(),
            complaint: None,
        }
    }

    fn run(&mut self, queue: &Receiver<Job>) {
        loop {
            let job = match [self.due, self.again, self.fades].into_iter().flatten().min() {
                Some(at) => queue.recv_timeout(at.max(self.not_before).saturating_duration_since(Instant::now())),
                None => queue.recv().map_err(|_| RecvTimeoutError::Disconnected),
            };
            match job {
                Ok(job) => self.take(job),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            while let Ok(job) = queue.try_recv() {
                self.take(job);
            }
            self.turn();
        }
    }

    fn take(&mut self, job: Job) {
        let now = Instant::now();
        let lost = match job {
            Job::All(all) => {
                self.alive.replace(all, now);
                true
            }
            Job::Change(change) => self.alive.apply(change, now),
            Job::Look => true,
        };
        if lost {
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
        let again = next_try(due || faded, trouble.iter().any(|trouble| trouble.may_pass), &mut self.pause);
        if let Some(pause) = again {
            self.again = Some(start + pause);
        }
        // A directory that is cleared away has nothing to look at.
        if trouble.is_empty() || self.layout.maps.exists() {
            self.complain(&trouble);
        }
        self.not_before = start + start.elapsed() * SHARE;
    }

    /// Looks at everything once; what could not be looked at.
    fn round(&mut self) -> Vec<Trouble> {
        let mut trouble = Vec::new();
        let (mut udp_flows, mut tcp_flows) = (0, 0);
        let flows = self.flows(&mut udp_flows, &mut tcp_flows);
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
        for (counter, count) in
            [(&self.ended.udp_flows, udp_flows), (&self.ended.tcp_flows, tcp_flows), (&self.ended.sockets, destroyed)]
        {
            counter.fetch_add(count, Ordering::Relaxed);
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
        desired::Backend,
        model::{Port, Protocol},
    };

    /// A connection may move between two tables while they are walked over; TCP's grace is no second look.
    #[test]
    fn the_end_of_a_grace_is_a_loss_like_any_other() {
        let empty = tempfile::tempdir().unwrap();
        let mut worker = Worker::new(Layout::of(empty.path()), Ok(()), Arc::default());
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
