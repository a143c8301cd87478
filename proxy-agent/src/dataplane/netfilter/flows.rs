//! Ends UDP flows whose backend is gone, or whose Service is (contract A103–A108): a client that goes on sending from one port never
//! lets its entry expire. TCP's end themselves.
//!
//! On a thread of its own, which sleeps until something was lost: a walk over a large table takes longer than a change may wait. A
//! packet that met the rules just before they changed may enter a flow just after we looked, so each round is followed by another.

use std::{
    collections::BTreeSet,
    io,
    sync::{
        Arc,
        atomic::Ordering,
        mpsc::{self, Sender},
    },
    time::{Duration, Instant},
};

use super::conntrack::{Entry, Socket};
use crate::{
    dataplane::{
        Report,
        alive::{self, Alive, Change, Ended, Keep},
        rounds::Rounds,
    },
    desired::{Backend, Changes, DesiredState, Frontend},
    model::{Family, Protocol},
};

/// The second look.
const AGAIN: Duration = Duration::from_secs(1);
/// Between two tries at what fails.
const LONGEST: Duration = Duration::from_secs(300);
/// Rounds that take longer than this take at most one part in so many of the time.
const SHORT: Duration = Duration::from_millis(100);
const SHARE: u32 = 4;

#[derive(Debug)]
enum Job {
    /// What there was of one family when we came.
    Found(BTreeSet<Frontend>),
    All(Vec<(Frontend, Keep)>),
    Change(Change),
}

/// The thread's other end. It ends with this.
#[derive(Debug)]
pub(crate) struct Flows {
    jobs: Sender<Job>,
}

impl Flows {
    pub(crate) fn start(ended: Arc<Ended>) -> io::Result<Self> {
        let (jobs, queue) = mpsc::channel();
        let mut worker = Worker {
            ended,
            alive: Alive::default(),
            found: BTreeSet::new(),
            removed: BTreeSet::new(),
            due: None,
            again: None,
            pause: AGAIN,
            not_before: Instant::now(),
            complaint: None,
        };
        std::thread::Builder::new().name("flows".into()).spawn(move || worker.run(&queue))?;
        Ok(Self { jobs })
    }

    /// Nobody looks after flows.
    #[cfg(test)]
    pub(crate) fn idle() -> Self {
        let (jobs, queue) = mpsc::channel();
        std::mem::forget(queue);
        Self { jobs }
    }

    fn send(&self, job: Job) {
        if self.jobs.send(job).is_err() {
            tracing::error!("the thread that ends stale flows is gone; restart the agent");
        }
    }

    /// What an earlier run left in force and nobody holds: what is not in force again with [`Self::all`] is gone, and so are its flows.
    pub(crate) fn found(&self, mut frontends: BTreeSet<Frontend>) {
        frontends.retain(|frontend| frontend.protocol == Protocol::Udp);
        if !frontends.is_empty() {
            self.send(Job::Found(frontends));
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
}

struct Worker {
    ended: Arc<Ended>,
    alive: Alive,
    /// There when we came; not known yet whether they stay.
    found: BTreeSet<Frontend>,
    /// Gone since we came, or while nobody was here: what else leads from an address that is none of ours is somebody else's.
    removed: BTreeSet<Frontend>,
    due: Option<Instant>,
    again: Option<Instant>,
    pause: Duration,
    not_before: Instant,
    complaint: Option<String>,
}

impl Rounds for Worker {
    type Job = Job;

    fn next(&self) -> Option<Instant> {
        [self.due, self.again].into_iter().flatten().min().map(|at| at.max(self.not_before))
    }

    fn take(&mut self, job: Job) {
        let now = Instant::now();
        let lost = match job {
            Job::Found(found) => {
                self.found.extend(found);
                false
            }
            Job::All(all) => {
                let kept: BTreeSet<Frontend> = all.iter().map(|(frontend, _)| *frontend).collect();
                self.removed.extend(std::mem::take(&mut self.found).difference(&kept));
                self.removed.extend(self.alive.frontends().filter(|frontend| !kept.contains(frontend)).copied());
                self.alive.replace(all, now);
                true
            }
            Job::Change(change) => {
                // A frontend that is new may have been asked before (contract A105).
                let is_new = |(frontend, _): &(Frontend, Keep)| {
                    frontend.protocol == Protocol::Udp && !self.alive.knows(frontend)
                };
                let any_new = change.set.iter().any(is_new);
                self.removed.extend(change.removed.iter().copied());
                for (frontend, _) in &change.set {
                    self.removed.remove(frontend);
                }
                self.alive.apply(change, now) || any_new
            }
        };
        if lost {
            self.due.get_or_insert(now);
        }
    }

    fn turn(&mut self) {
        let start = Instant::now();
        if start < self.not_before {
            return;
        }
        let is_due = |at: &mut Option<Instant>| at.take_if(|at| *at <= start).is_some();
        let (due, again) = (is_due(&mut self.due), is_due(&mut self.again));
        if !due && !again {
            return;
        }
        match self.round() {
            Ok(()) => {
                self.complaint = None;
                self.pause = AGAIN;
                if due {
                    self.again = Some(start + AGAIN);
                } else {
                    self.removed.clear();
                }
            }
            Err(error) => {
                let complaint = error.to_string();
                if self.complaint.as_ref() != Some(&complaint) {
                    tracing::warn!(%error, "UDP flows to removed backends may go on; is connection tracking (nf_conntrack_netlink) there?");
                }
                self.complaint = Some(complaint);
                self.again = Some(start + self.pause);
                self.pause = (self.pause * 2).min(LONGEST);
            }
        }
        let took = start.elapsed();
        self.not_before = if took > SHORT { start + took * SHARE } else { start };
    }
}

impl Worker {
    fn round(&self) -> io::Result<()> {
        let socket = Socket::open()?;
        let mut ended = 0;
        for family in Family::BOTH {
            let mut lost = Vec::new();
            socket.entries(family, Protocol::Udp, |entry| {
                if self.is_lost(&entry) {
                    lost.push(entry);
                }
            })?;
            for entry in lost {
                ended += u64::from(socket.delete(&entry)?);
            }
        }
        if ended > 0 {
            self.ended.udp_flows.fetch_add(ended, Ordering::Relaxed);
            tracing::info!(udp_flows = ended, "ended what led to removed backends");
        }
        Ok(())
    }

    fn is_lost(&self, entry: &Entry) -> bool {
        let Entry { protocol, asked: (addr, port), answers, zoned, .. } = entry;
        // What is in a zone is somebody else's.
        if *zoned {
            return false;
        }
        let frontend = Frontend { addr: *addr, port: *port, protocol: *protocol };
        let known = self.alive.knows(&frontend);
        if entry.is_translated() {
            let (addr, port) = *answers;
            (known || self.removed.contains(&frontend)) && self.alive.is_lost(&frontend, &Backend { addr, port })
        } else {
            // From before there were rules for it (contract A105): its packets pass them by.
            known && !self.alive.keeps_all(&frontend)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Port;

    fn frontend(last: u8) -> Frontend {
        Frontend { addr: [10, 96, 0, last].into(), port: Port::new(53).unwrap(), protocol: Protocol::Udp }
    }

    fn entry(vip: u8, backend: Option<u8>) -> Entry {
        let asked = ([10, 96, 0, vip].into(), Port::new(53).unwrap());
        let answers = backend.map_or(asked, |last| ([10, 1, 0, last].into(), Port::new(53).unwrap()));
        Entry::of(Protocol::Udp, asked, answers, backend.is_some())
    }

    #[test]
    fn only_what_is_ours_and_lost_is_ended() {
        let backend = |last: u8| Backend { addr: [10, 1, 0, last].into(), port: Port::new(53).unwrap() };
        let (jobs, queue) = mpsc::channel::<Job>();
        drop(jobs);
        let mut worker = Worker {
            ended: Arc::default(),
            alive: Alive::default(),
            found: BTreeSet::new(),
            removed: BTreeSet::new(),
            due: None,
            again: None,
            pause: AGAIN,
            not_before: Instant::now(),
            complaint: None,
        };
        let only = |last: &[u8]| Keep::Only(last.iter().map(|last| backend(*last)).collect());
        worker.take(Job::Found([frontend(1), frontend(7)].into()));
        assert!(worker.due.is_none() && worker.removed.is_empty(), "not known yet what is to be");
        worker.take(Job::All(vec![(frontend(1), only(&[1])), (frontend(2), only(&[2])), (frontend(3), Keep::All)]));
        assert!(worker.due.is_some());
        let lost = |worker: &Worker, vip, backend| worker.is_lost(&entry(vip, backend));
        assert!(!lost(&worker, 1, Some(1)) && lost(&worker, 1, Some(2)));
        assert!(lost(&worker, 1, None), "from before the rules");
        let by_ipvs = |last| {
            let Entry { asked, answers, .. } = entry(1, Some(last));
            Entry::of(Protocol::Udp, asked, answers, false)
        };
        assert!(!worker.is_lost(&by_ipvs(1)) && worker.is_lost(&by_ipvs(2)), "whoever translates");
        assert!(!lost(&worker, 3, Some(9)) && !lost(&worker, 3, None), "not known to be in force");
        assert!(!lost(&worker, 9, Some(1)) && !lost(&worker, 9, None), "somebody else's");
        assert!(lost(&worker, 7, Some(1)) && !lost(&worker, 7, None), "it went while nobody was here");
        worker.take(Job::All(vec![(frontend(1), only(&[1]))]));
        assert!(lost(&worker, 2, Some(2)), "its Service is gone (contract A106)");
        worker.take(Job::Change(Change { set: vec![(frontend(2), only(&[2]))], removed: BTreeSet::new() }));
        assert!(!lost(&worker, 2, Some(2)) && worker.removed.contains(&frontend(3)));
        worker.due = None;
        worker.take(Job::Change(Change { set: vec![(frontend(2), only(&[2, 3]))], removed: BTreeSet::new() }));
        assert!(worker.due.is_none(), "nothing was lost");
        worker.take(Job::Change(Change { set: vec![(frontend(4), only(&[2]))], removed: BTreeSet::new() }));
        assert!(worker.due.is_some() && lost(&worker, 4, None), "somebody may have asked before");
        worker.run(&queue);
    }
}
