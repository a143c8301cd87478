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
    dataplane::{Capabilities, Failure},
    desired::{Frontend, FrontendSpec, HealthCheck, HealthChecks, health_doors},
    model::{Family, ServiceKey},
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
    health: HealthChecks,
    health_changed: bool,
    /// Not their counts alone.
    doors_changed: bool,
    changed: bool,
    published: Instant,
    pause: Duration,
    /// Of the dataplane.
    capabilities: Capabilities,
}

impl Table {
    pub(super) fn new(sender: watch::Sender<Arc<Status>>, status: Status, capabilities: Capabilities) -> Self {
        let published = Instant::now();
        sender.send_replace(Arc::new(status.clone()));
        Self {
            sender,
            next: status,
            timings: Timings::default(),
            failed_guards: BTreeMap::new(),
            rows: BTreeMap::new(),
            rows_changed: false,
            health: HealthChecks::new(),
            health_changed: false,
            doors_changed: false,
            changed: false,
            published,
            pause: PERIOD,
            capabilities,
        }
    }

    /// The value to change; it goes out with the next publication.
    pub(super) fn edit(&mut self) -> &mut Status {
        self.changed = true;
        &mut self.next
    }

    /// One frontend's outcome.
    pub(super) fn set(&mut self, frontend: Frontend, spec: &Arc<FrontendSpec>, state: FrontendState, now: SystemTime) {
        let limits = self.capabilities.limits(&frontend, spec);
        let algorithm = self.capabilities.chosen(spec);
        let row = FrontendStatus { spec: Arc::clone(spec), state, since: now, limits, algorithm };
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

    /// What load balancers are told of a Service, if anything.
    pub(super) fn set_health(&mut self, service: ServiceKey, check: Option<HealthCheck>) {
        let doors: Vec<_> = check.iter().flat_map(HealthCheck::doors).collect();
        let old = match check {
            Some(check) => self.health.insert(service, check),
            None => self.health.remove(&service),
        };
        (self.changed, self.health_changed) = (true, true);
        self.doors_changed |= !old.iter().flat_map(HealthCheck::doors).eq(doors);
    }

    pub(super) fn frontends(&self) -> Vec<Frontend> {
        self.rows.keys().copied().collect()
    }

    /// Something of this family is in force.
    pub(super) fn serves(&self, family: Family) -> bool {
        self.rows
            .iter()
            .any(|(frontend, row)| Family::of(frontend.addr) == family && row.state == FrontendState::Programmed)
    }

    /// When the next publication is due, if there is anything new.
    pub(super) fn due(&self) -> Option<Instant> {
        self.changed.then(|| self.published + self.pause)
    }

    /// Sends everything that is new. `uid_of`: of a Service that is there.
    pub(super) fn publish(&mut self, uid_of: impl Fn(&ServiceKey) -> Option<Arc<str>>) {
        let start = Instant::now();
        if self.rows_changed {
            self.next.frontends = Arc::new(self.rows.clone());
            self.next.degraded = Arc::new(Status::degraded_of(&self.rows));
            let nothing = Status::serves_nothing(&self.rows);
            self.next.nothing_since = nothing.then(|| self.next.nothing_since.unwrap_or(start));
            let unserved = Status::unserved_of(&self.rows, uid_of);
            if *self.next.unserved != unserved {
                self.next.unserved = Arc::new(unserved);
            }
        }
        if self.health_changed {
            self.next.health_checks = Arc::new(self.health.clone());
        }
        if self.doors_changed {
            self.next.health_doors = Arc::new(health_doors(&self.health));
        }
        if *self.next.timings != self.timings {
            self.next.timings = Arc::new(self.timings.clone());
        }
        if *self.next.failed_guards != self.failed_guards {
            self.next.failed_guards = Arc::new(self.failed_guards.clone());
        }
        self.sender.send_replace(Arc::new(self.next.clone()));
        (self.changed, self.rows_changed, self.health_changed, self.doors_changed) = (false, false, false, false);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{desired::FamilyCheck, model::Port};

    fn check(port: u16, local: usize) -> HealthCheck {
        let family = FamilyCheck { listen: vec![[0, 0, 0, 0].into()], local };
        HealthCheck { uid: "u".into(), port: Port::new(port).unwrap(), families: [(Family::V4, family)].into() }
    }

    #[test]
    fn another_count_asks_for_no_other_ports() {
        let (sender, watched) = watch::channel(Arc::new(Status::starting("ebpf", "n1".into())));
        let kernel = crate::dataplane::memory::Kernel::default();
        let capabilities = crate::dataplane::Dataplane::capabilities(&crate::dataplane::memory::Memory::new(kernel));
        let mut table = Table::new(sender, Status::starting("ebpf", "n1".into()), capabilities);
        let mut tell = |name: &str, check| {
            table.set_health(ServiceKey::new("default", name), check);
            table.publish(|_| None);
            Arc::clone(&watched.borrow())
        };
        tell("web", Some(check(30_100, 1)));
        let before = tell("shop", Some(check(30_200, 1)));
        assert_eq!(before.health_doors.iter().map(|(_, door)| door.port()).collect::<Vec<_>>(), [30_200, 30_100]);
        let counted = tell("web", Some(check(30_100, 2)));
        assert!(Arc::ptr_eq(&before.health_doors, &counted.health_doors));
        assert_eq!(counted.health_checks[&ServiceKey::new("default", "web")], check(30_100, 2));
        let moved = tell("web", Some(check(30_101, 2)));
        assert_eq!(moved.health_doors.len(), 2);
        assert!(moved.health_doors.iter().any(|(_, door)| door.port() == 30_101));
        let gone = tell("web", None);
        assert_eq!((gone.health_doors.len(), gone.health_checks.len()), (1, 1));
    }
}
