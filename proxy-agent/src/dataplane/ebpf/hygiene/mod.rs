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
//! network namespace must not do anything else. It sleeps until something was lost. Each round is followed by another
//! one: a program that read a frontend just before it changed may have entered a flow just after we looked.
//!
//! Only what is in force counts: a frontend that could not be written is as it was, and its flows stay.

mod alive;
mod datagrams;
mod flows;
mod notes;
mod sockets;

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
    sockets::Notes,
};
use super::pins::Layout;
use crate::{
    dataplane::Report,
    desired::{Changes, DesiredState, Frontend},
};

pub(crate) use sockets::{Unreachable, reaches_sockets};

/// The second look.
const AGAIN: Duration = Duration::from_secs(1);
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
    /// `sockets`: programs point sockets at backends.
    pub(crate) fn start(layout: Layout, sockets: bool, ended: Arc<Ended>) -> io::Result<Self> {
        let (jobs, queue) = mpsc::channel();
        let mut worker = Worker {
            layout,
            sockets,
            ended,
            notes: None,
            alive: Alive::default(),
            due: None,
            again: None,
            fades: None,
            not_before: Instant::now(),
            complaint: None,
        };
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
    sockets: bool,
    ended: Arc<Ended>,
    /// Made with the first round.
    notes: Option<Notes>,
    alive: Alive,
    /// When to go round: something was lost; for the second look; a TCP backend is gone for long enough.
    due: Option<Instant>,
    again: Option<Instant>,
    fades: Option<Instant>,
    not_before: Instant,
    complaint: Option<String>,
}

impl Worker {
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
        let result = self.round();
        let failed = result.is_err();
        match result {
            Ok(complaint) => self.complain(complaint),
            // A directory that is cleared away has nothing to look at.
            Err(_) if !self.layout.maps.exists() => {}
            Err(error) => self.complain(Some(format!("flows of removed backends may go on: {error}"))),
        }
        if due || failed {
            self.again = Some(start + AGAIN);
        }
        self.not_before = start + start.elapsed() * SHARE;
    }

    /// Looks at everything once; what could not be looked at.
    fn round(&mut self) -> io::Result<Option<String>> {
        let Self { layout, alive, ended, notes, sockets, .. } = self;
        let (v4, v6) = (Tables::open_v4(layout)?, Tables::open_v6(layout)?);
        let udp_flows = v4.end_udp(alive)? + v6.end_udp(alive)? + datagrams::end(layout, alive)?;
        let tcp_flows = if alive.resets_tcp() { v4.end_tcp(alive)? + v6.end_tcp(alive)? } else { 0 };
        ended.udp_flows.fetch_add(udp_flows, Ordering::Relaxed);
        ended.tcp_flows.fetch_add(tcp_flows, Ordering::Relaxed);
        let mut complaint = None;
        let mut destroyed = 0;
        if *sockets {
            let notes = match notes {
                Some(notes) => notes,
                None => notes.insert(Notes::open()?),
            };
            let round = sockets::end(notes, layout, alive)?;
            destroyed = round.destroyed;
            ended.sockets.fetch_add(destroyed, Ordering::Relaxed);
            complaint = round.why.map(|why| {
                format!(
                    "sockets of {} network namespaces are left on removed backends: {why}; see `proxy-agent check`",
                    round.unseen
                )
            });
        }
        if udp_flows + tcp_flows + destroyed > 0 {
            tracing::info!(udp_flows, tcp_flows, sockets = destroyed, "ended what led to removed backends");
        }
        Ok(complaint)
    }

    /// Says a thing once, until it changes.
    fn complain(&mut self, complaint: Option<String>) {
        if let Some(text) = complaint.as_ref().filter(|text| self.complaint.as_ref() != Some(text)) {
            tracing::warn!("{text}");
        }
        self.complaint = complaint;
    }
}
