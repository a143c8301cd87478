//! The status table as the loop keeps it, and its publication.
//!
//! Readers get one immutable value. The rows are many (one for each frontend), so copying them is put off until after the
//! change is in force, is done at most every [`PERIOD`], and never takes more than a fiftieth of the time: a cluster of
//! any size pays two percent of a core at worst, and a change never waits for readers.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use tokio::sync::watch;

use crate::{
    dataplane::Failure,
    desired::{Frontend, FrontendSpec},
    status::{FrontendState, FrontendStatus, Status, Timings},
};

const PERIOD: Duration = Duration::from_millis(100);
const SHARE: u32 = 50;

pub(super) struct Table {
    sender: watch::Sender<Arc<Status>>,
    /// What goes out next, but for the parts below, which are copied in when it does.
    pub(super) next: Status,
    pub(super) timings: Timings,
    pub(super) failed_guards: BTreeMap<IpAddr, Failure>,
    rows: BTreeMap<Frontend, FrontendStatus>,
    rows_changed: bool,
    changed: bool,
    published: Instant,
    pause: Duration,
}

impl Table {
    pub(super) fn new(sender: watch::Sender<Arc<Status>>, status: Status) -> Self {
        let published = Instant::now();
        sender.send_replace(Arc::new(status.clone()));
        Self {
            sender,
            next: status,
            timings: Timings::default(),
            failed_guards: BTreeMap::new(),
            rows: BTreeMap::new(),
            rows_changed: false,
            changed: false,
            published,
            pause: PERIOD,
        }
    }

    /// The value to change; it goes out with the next publication.
    pub(super) fn edit(&mut self) -> &mut Status {
        self.changed = true;
        &mut self.next
    }

    /// One frontend's outcome.
    pub(super) fn set(&mut self, frontend: Frontend, spec: &Arc<FrontendSpec>, state: FrontendState, now: SystemTime) {
        let row = FrontendStatus { spec: Arc::clone(spec), state, since: now };
        if let FrontendState::Degraded(failure) = &row.state
            && self.rows.get(&frontend).is_none_or(|old| old.state != row.state)
        {
            tracing::warn!(%frontend, service = %spec.service, %failure, "not in force");
        }
        match self.rows.get_mut(&frontend) {
            // Still the same state of the same thing: since when does not change.
            Some(old) if old.state == row.state && Arc::ptr_eq(&old.spec, &row.spec) => return,
            Some(old) => *old = row,
            None => drop(self.rows.insert(frontend, row)),
        }
        (self.changed, self.rows_changed) = (true, true);
    }

    /// A frontend that should not be in force and could not be removed; nothing to say if it never was ours.
    pub(super) fn stuck(&mut self, frontend: Frontend, failure: &Failure, now: SystemTime) {
        if let Some(row) = self.rows.get(&frontend) {
            let spec = Arc::clone(&row.spec);
            self.set(frontend, &spec, FrontendState::Degraded(failure.clone()), now);
        }
    }

    pub(super) fn remove(&mut self, frontend: &Frontend) {
        if self.rows.remove(frontend).is_some() {
            (self.changed, self.rows_changed) = (true, true);
        }
    }

    pub(super) fn frontends(&self) -> Vec<Frontend> {
        self.rows.keys().copied().collect()
    }

    /// When the next publication is due, if there is anything new.
    pub(super) fn due(&self) -> Option<Instant> {
        self.changed.then(|| self.published + self.pause)
    }

    /// Sends everything that is new.
    pub(super) fn publish(&mut self) {
        let start = Instant::now();
        if self.rows_changed {
            self.next.frontends = Arc::new(self.rows.clone());
        }
        if *self.next.timings != self.timings {
            self.next.timings = Arc::new(self.timings.clone());
        }
        if *self.next.failed_guards != self.failed_guards {
            self.next.failed_guards = Arc::new(self.failed_guards.clone());
        }
        self.sender.send_replace(Arc::new(self.next.clone()));
        (self.changed, self.rows_changed) = (false, false);
        self.published = Instant::now();
        self.pause = PERIOD.max((self.published - start) * SHARE);
    }

    /// Says that something is being waited for, before a call that might not return; tells whether nothing was. All but rows
    /// and timings is sent: that is cheap enough to be done before every call.
    pub(super) fn announce(&mut self, since: Option<Instant>) -> bool {
        let alone = self.next.pending_since.is_none();
        if alone {
            self.edit().pending_since = Some(since.unwrap_or_else(Instant::now));
            self.sender.send_replace(Arc::new(self.next.clone()));
        }
        alone
    }

    /// The call did return; the next publication says so.
    pub(super) fn returned(&mut self) {
        self.edit().pending_since = None;
    }
}
