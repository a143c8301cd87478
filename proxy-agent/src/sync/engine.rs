//! One turn of the loop after the other; see the module above.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::{
    Ends, Options, SyncError,
    announced::Announced,
    lost,
    retry::Retry,
    table::Table,
    takeover::{Missing, Takeover},
};
use crate::{
    dataplane::{Drift, Failure, Report, Retiring, select::Mode},
    desired::{Changes, Device, Devices, Frontend},
    model::{
        Event, Family, ServiceKey, SourceState,
        index::{Index, Touched},
    },
    plan::Planner,
    status::{FrontendState, Status},
};

/// So many queued events are taken together at most; what is left is the next turn's.
const BATCH: usize = 4096;
/// Where nothing is due.
const IDLE: Duration = Duration::from_secs(3600);
/// How often the dataplane looks after what an earlier run left, as long as the gate is closed or devices are unknown.
const WAIT: Duration = Duration::from_secs(1);
/// How long a dataplane that wants its hooks in place first waits to hear of devices.
const DEVICES: Duration = Duration::from_secs(5);

pub(super) struct Engine {
    options: Options,
    events: mpsc::Receiver<Event>,
    devices: watch::Receiver<Devices>,
    source: watch::Receiver<SourceState>,
    dataplane: Announced,
    cancel: CancellationToken,

    index: Index,
    touched: Touched,
    planner: Planner,
    retry: Retry,
    table: Table,
    /// The first full state is programmed.
    running: bool,
    /// Devices were sent at least once; before that nothing is attached or detached.
    devices_known: bool,
    devices_changed: bool,
    devices_open: bool,
    devices_until: Option<Instant>,
    source_open: bool,
    active: bool,
    takeover: Takeover,
    /// Services that were unknown when the gate opened, and still are: what an earlier run left in force of them stands.
    held: BTreeSet<ServiceKey>,
    /// Since when the oldest change that is not in force waits.
    queued: Option<Instant>,
    /// Trigger times (nanoseconds since the epoch) of changes that are not in force, the oldest for each Service and family.
    triggers: BTreeMap<(ServiceKey, Family), i64>,
    /// What the dataplane as a whole complains of, by object.
    complaints: BTreeMap<String, String>,
    problems_seen: Option<u64>,
    synced: Option<Instant>,
    wait_at: Instant,
    observe_at: Instant,
    tick_at: Option<Instant>,
}

impl Engine {
    pub(super) fn new(options: Options, ends: Ends, cancel: CancellationToken) -> Self {
        let Ends { events, devices, source, dataplane, status } = ends;
        let dataplane = Announced::new(dataplane);
        let first = status.borrow().clone();
        let starting = Status { mode: dataplane.name(), ..Status::clone(&first) };
        Self {
            planner: Planner::new(options.defaults.clone()),
            retry: Retry::new(&options),
            table: Table::new(status, starting, dataplane.capabilities().clone()),
            takeover: Takeover::new(options.takeover),
            wait_at: Instant::now(),
            observe_at: Instant::now() + options.resync_period,
            options,
            events,
            devices,
            source,
            dataplane,
            cancel,
            index: Index::default(),
            touched: Touched::default(),
            running: false,
            devices_known: false,
            devices_changed: false,
            devices_open: true,
            devices_until: None,
            source_open: true,
            active: false,
            held: BTreeSet::new(),
            queued: None,
            triggers: BTreeMap::new(),
            complaints: BTreeMap::new(),
            problems_seen: None,
            synced: None,
            tick_at: None,
        }
    }

    pub(super) async fn run(mut self) -> Result<(), SyncError> {
        // What the channels hold now may have been sent before anybody listened.
        self.devices_known = !self.devices.borrow().is_empty();
        self.devices_changed = self.devices_known;
        self.table.edit().source = self.source.borrow_and_update().clone();
        loop {
            let wake = tokio::time::Instant::from_std(self.wake());
            tokio::select! {
                biased;
                () = self.cancel.cancelled() => return Ok(()),
                event = self.events.recv() => match event {
                    Some(event) => self.take(event),
                    None => return Err(SyncError::SourceEnded),
                },
                changed = self.devices.changed(), if self.devices_open => self.devices_open = self.hear_devices(changed.is_ok()),
                changed = self.source.changed(), if self.source_open => self.source_open = self.hear_source(changed.is_ok()),
                () = tokio::time::sleep_until(wake) => {}
            }
            for _ in 0..BATCH {
                let Ok(event) = self.events.try_recv() else { break };
                self.take(event);
            }
            // Events that never pause would keep these from being heard above.
            if self.devices.has_changed().unwrap_or(false) {
                self.devices.mark_unchanged();
                self.hear_devices(true);
            }
            if self.source.has_changed().unwrap_or(false) {
                self.hear_source(true);
            }
            self.turn();
        }
    }

    fn hear_devices(&mut self, sent: bool) -> bool {
        self.devices_known |= sent;
        self.devices_changed |= sent;
        sent
    }

    fn hear_source(&mut self, sent: bool) -> bool {
        if sent {
            self.table.edit().source = self.source.borrow_and_update().clone();
        }
        sent
    }

    fn take(&mut self, event: Event) {
        let before = (self.touched.service_changes, self.touched.slice_changes);
        let is_report = matches!(event, Event::Problems(..));
        let is_node = matches!(event, Event::Node(_));
        self.index.apply(event, &mut self.touched);
        let services = self.touched.service_changes - before.0;
        let slices = self.touched.slice_changes - before.1;
        if is_report {
            self.problems_seen = None;
        }
        let changed = services + slices > 0 || self.touched.calls_for_plan();
        let snapshot = self.index.snapshot();
        let (node, eligible, known) =
            (Arc::clone(&snapshot.node.name), !snapshot.node.leaving, snapshot.services.len());
        let endpoints = self.index.endpoints();
        let status = self.table.edit();
        status.service_changes.total += services;
        status.service_changes.pending += services;
        status.endpoint_changes.total += slices;
        status.endpoint_changes.pending += slices;
        (status.node_eligible, status.services, status.endpoints) = (eligible, known, endpoints);
        if is_node && status.node_facts.as_deref() != Some(&self.index.snapshot().node) {
            status.node_facts = Some(Arc::new(self.index.snapshot().node.clone()));
        }
        if !node.is_empty() {
            status.node = node;
        }
        if changed {
            self.queued.get_or_insert_with(Instant::now);
            // kube-proxy's, of the newest one.
            status.last_queued = Some(SystemTime::now());
        }
    }

    /// When there is something to do although nothing happens.
    fn wake(&self) -> Instant {
        let now = Instant::now();
        let sync = (self.running && self.touched.calls_for_plan()).then(|| self.sync_at(now));
        let observe = self.running.then_some(self.observe_at);
        let wait = self.waits().then_some(self.wait_at);
        let retry = self.retry.at().filter(|_| self.running);
        let takeover = self.takeover.at();
        [sync, observe, wait, retry, takeover, self.tick_at, self.table.due()]
            .into_iter()
            .flatten()
            .min()
            .unwrap_or(now + IDLE)
    }

    /// What an earlier run left on devices is still in force.
    fn waits(&self) -> bool {
        !self.running || (!self.devices_known && self.devices_open)
    }

    fn sync_at(&self, now: Instant) -> Instant {
        self.synced.map_or(now, |synced| synced + self.options.min_period)
    }

    /// Does what is due, changes first.
    fn turn(&mut self) {
        let due = |at: Option<Instant>| at.is_some_and(|at| at <= Instant::now());
        if self.waits() && due(Some(self.wait_at)) {
            self.dataplane.call(&mut self.table, None, |dataplane| dataplane.wait());
            self.wait_at = Instant::now() + WAIT;
        }
        if !self.running {
            self.start();
        } else if self.touched.calls_for_plan() && due(Some(self.sync_at(Instant::now()))) {
            self.sync();
        }
        if self.running {
            if !self.touched.calls_for_plan() && self.let_go() {
                self.resync(Instant::now());
                self.retry.schedule(Instant::now(), true);
                self.tick();
            }
            if self.devices_changed {
                self.set_devices();
                self.retry.schedule(Instant::now(), false);
            }
            if due(self.retry.at()) {
                self.try_again();
            }
            if due(Some(self.observe_at)) {
                self.observe();
            }
            self.be_ready();
        }
        if due(self.tick_at) {
            self.tick();
        }
        if due(self.table.due()) {
            self.publish();
        }
    }

    /// The gate: opens once, when everything has been heard of.
    fn start(&mut self) {
        let synced = matches!(self.table.next.source, SourceState::Synced | SourceState::Stale { .. });
        if !synced || !self.index.is_complete() {
            return;
        }
        let start = Instant::now();
        let hooks_first = self.dataplane.call(&mut self.table, None, |dataplane| dataplane.hooks_first());
        let until = *self.devices_until.get_or_insert(start + DEVICES);
        if hooks_first && !self.devices_known && self.devices_open && start < until {
            return;
        }
        self.take_touched();
        self.planner.full(self.index.snapshot());
        let now = SystemTime::now();
        for (frontend, spec) in &self.planner.state().frontends {
            self.table.set(*frontend, spec, FrontendState::Pending, now);
        }
        self.table.announce(self.queued);
        self.publish();
        self.held = self.index.unknown();
        if !self.held.is_empty() {
            let services: Vec<_> = self.held.iter().map(ToString::to_string).collect();
            tracing::warn!(?services, "cannot be read wholly; what is in force of them stands");
            self.dataplane.call(&mut self.table, self.queued, |dataplane| dataplane.hold(&self.held));
        }
        if hooks_first {
            self.attach();
        }
        let report = self.resync(start);
        self.running = true;
        if !hooks_first {
            self.attach();
        }
        self.retry.schedule(Instant::now(), false);
        self.observe_at = Instant::now() + self.options.resync_period;
        self.finish(start);
        tracing::info!(
            frontends = self.planner.state().frontends.len(),
            failed = report.failed.len(),
            writes = report.writes,
            took = ?start.elapsed(),
            "first full state programmed"
        );
        self.be_ready();
        self.publish();
    }

    /// On the devices that are known by now, and at connect time.
    fn attach(&mut self) {
        if self.devices_known {
            self.set_devices();
        }
        self.activate();
    }

    /// Brings the kernel to all that is planned, whatever it holds. `start`: when that was begun.
    fn resync(&mut self, start: Instant) -> Report {
        let report = self.dataplane.resync(&mut self.table, self.queued, self.planner.state());
        self.settle_full(&report);
        self.table.timings.full.observe(start.elapsed());
        report
    }

    /// Ends the holding of Services of which all is known by now, or which are gone. What they left is up to a resync, which must
    /// not come before they are planned.
    fn let_go(&mut self) -> bool {
        if self.held.is_empty() {
            return false;
        }
        let unknown = self.index.unknown();
        let before = self.held.len();
        self.held.retain(|service| unknown.contains(service));
        let changed = self.held.len() != before;
        if changed {
            self.dataplane.call(&mut self.table, self.queued, |dataplane| dataplane.hold(&self.held));
        }
        changed
    }

    /// Plans what was touched and carries it out.
    fn sync(&mut self) {
        let start = Instant::now();
        let services = self.take_touched();
        let changes = self.planner.update(self.index.snapshot(), &services);
        if self.let_go() {
            self.resync(start);
            self.retry.schedule(Instant::now(), true);
        } else if !changes.is_empty() {
            self.table.announce(self.queued);
            let report = self.dataplane.apply(&mut self.table, self.queued, &changes);
            self.settle(&changes, &report);
            self.table.timings.partial.observe(start.elapsed());
            self.retry.schedule(Instant::now(), !changes.remove.is_empty());
            tracing::debug!(
                services = services.len(),
                set = changes.set.len(),
                removed = changes.remove.len(),
                failed = report.failed.len(),
                writes = report.writes,
                took = ?start.elapsed(),
                "synced"
            );
        }
        self.finish(start);
    }

    fn take_touched(&mut self) -> BTreeSet<ServiceKey> {
        let Touched { services, triggers, service_changes: _, slice_changes: _, pods: _ } =
            std::mem::take(&mut self.touched);
        let started = nanoseconds(self.table.next.started);
        // A28: what happened before we were there says nothing of how fast we are.
        for (service, family, at) in triggers.into_iter().filter(|(.., at)| *at >= started) {
            let oldest = self.triggers.entry((service, family)).or_insert(at);
            *oldest = at.min(*oldest);
        }
        services
    }

    /// After a sync: what was queued is in force, or in the table as failed.
    fn finish(&mut self, start: Instant) {
        let now = SystemTime::now();
        self.table.timings.sync.observe(start.elapsed());
        self.record_programmed(now);
        self.queued = None;
        self.synced = Some(Instant::now());
        let health = self.planner.take_health_changes();
        if !health.is_empty() {
            let ports = self.planner.health_checks().values().map(|check| check.port.get()).collect();
            self.dataplane.call(&mut self.table, self.queued, |dataplane| dataplane.let_in(&ports));
        }
        for (service, check) in health {
            self.table.set_health(service, check);
        }
        let status = self.table.edit();
        status.syncs += 1;
        status.last_sync = Some(now);
        status.service_changes.pending = 0;
        status.endpoint_changes.pending = 0;
        self.tick();
        self.table.returned();
    }

    /// Latency of what is in force now; a Service with a frontend that failed goes on waiting.
    fn record_programmed(&mut self, now: SystemTime) {
        if self.triggers.is_empty() {
            return;
        }
        let frontends = &self.planner.state().frontends;
        let failed: BTreeSet<&ServiceKey> =
            self.retry.frontends.iter().filter_map(|f| frontends.get(f)).map(|spec| &spec.service.service).collect();
        let now = nanoseconds(now);
        let programming = &mut self.table.timings.programming;
        self.triggers.retain(|(service, family), at| {
            let waits = failed.contains(service);
            if let Some(programming) = programming.get_mut(family).filter(|_| !waits) {
                programming.observe(Duration::from_nanos(u64::try_from(now - *at).unwrap_or(0)));
            }
            waits
        });
    }

    fn settle(&mut self, changes: &Changes, report: &Report) {
        let Changes { set, remove, guard, unguard, local_cidrs, left_pods: _ } = changes;
        let Report { failed, failed_guards, failed_devices: _, without_xdp: _, failed_local_cidrs, writes: _ } = report;
        let now = SystemTime::now();
        for (frontend, spec) in set {
            let failure = failed.get(frontend);
            let state = failure.map_or(FrontendState::Programmed, |failure| FrontendState::Degraded(failure.clone()));
            self.table.set(*frontend, spec, state, now);
            self.retry.frontend(*frontend, failure);
        }
        for frontend in remove {
            let failure = failed.get(frontend);
            match failure {
                Some(failure) => self.table.stuck(*frontend, failure, now),
                None => self.table.remove(frontend),
            }
            self.retry.frontend(*frontend, failure);
        }
        if local_cidrs.is_some() {
            self.retry.local_cidrs = failed_local_cidrs.is_some();
            self.complain("local CIDRs", failed_local_cidrs.as_ref().map(ToString::to_string));
        }
        for addr in guard.iter().chain(unguard) {
            let failure = failed_guards.get(addr);
            match failure {
                Some(failure) => drop(self.table.failed_guards.insert(*addr, failure.clone())),
                None => drop(self.table.failed_guards.remove(addr)),
            }
            self.retry.guard(*addr, failure);
        }
        // A dataplane that made everything anew may have failed with more than was asked for.
        for (frontend, failure) in failed {
            if set.contains_key(frontend) || remove.contains(frontend) {
                continue;
            }
            match self.planner.state().frontends.get(frontend) {
                Some(spec) => self.table.set(*frontend, spec, FrontendState::Degraded(failure.clone()), now),
                None => self.table.stuck(*frontend, failure, now),
            }
            self.retry.frontend(*frontend, Some(failure));
        }
        for (addr, failure) in failed_guards {
            self.table.failed_guards.insert(*addr, failure.clone());
            self.retry.guard(*addr, Some(failure));
        }
        if let Some(failure) = failed_local_cidrs {
            self.retry.local_cidrs = true;
            self.complain("local CIDRs", Some(failure.to_string()));
        }
    }

    /// After a resync, which has dealt with everything there is and with everything that should not be.
    fn settle_full(&mut self, report: &Report) {
        let state = self.planner.state();
        let gone = self.table.frontends().into_iter().chain(report.failed.keys().copied());
        let changes = Changes {
            set: state.frontends.clone(),
            remove: gone.filter(|frontend| !state.frontends.contains_key(frontend)).collect(),
            guard: state.guards.union(&report.failed_guards.keys().copied().collect()).copied().collect(),
            unguard: BTreeSet::new(),
            local_cidrs: Some(state.local_cidrs.clone()),
            left_pods: None,
        };
        self.retry.frontends.clear();
        self.retry.guards.clear();
        self.table.failed_guards.clear();
        self.settle(&changes, report);
    }

    fn set_devices(&mut self) {
        self.devices_changed = false;
        let devices = self.devices.borrow().clone();
        let (lost, report, hooks) = self.dataplane.call(&mut self.table, self.queued, |dataplane| {
            let lost = dataplane.lost_hooks();
            let report = dataplane.set_devices(&devices);
            (lost, report, dataplane.hooks())
        });
        self.note_lost(&lost);
        let Report { failed, failed_guards: _, failed_devices, without_xdp, failed_local_cidrs: _, writes: _ } = report;
        let now = SystemTime::now();
        for (frontend, failure) in failed {
            if let Some(spec) = self.planner.state().frontends.get(&frontend) {
                self.retry.frontend(frontend, Some(&failure));
                self.table.set(frontend, spec, FrontendState::Degraded(failure), now);
            }
        }
        for (device, failure) in &failed_devices {
            tracing::warn!(%device, %failure, "not attached");
        }
        let failures = failed_devices.values().chain(without_xdp.values());
        self.retry.devices = failures.into_iter().any(|failure| matches!(failure, Failure::Retry(_)));
        let status = self.table.edit();
        status.devices = Arc::new(devices);
        status.failed_devices = Arc::new(failed_devices);
        if *status.without_xdp != without_xdp {
            for (device, reason) in &without_xdp {
                match reason {
                    Failure::Retry(reason) => tracing::warn!(%device, %reason, "without XDP"),
                    Failure::Unsupported(reason) | Failure::Held(reason) => {
                        tracing::info!(%device, %reason, "without XDP")
                    }
                }
            }
            status.without_xdp = Arc::new(without_xdp);
        }
        status.hooks = Arc::new(hooks);
        lost::look_after(&mut self.table);
    }

    fn activate(&mut self) {
        let (lost, result, hooks) = self.dataplane.call(&mut self.table, self.queued, |dataplane| {
            let lost = dataplane.lost_hooks();
            let result = dataplane.activate();
            (lost, result, dataplane.hooks())
        });
        self.note_lost(&lost);
        self.retry.hooks = result.is_err();
        self.active |= result.is_ok();
        self.complain("hooks", result.err().map(|error| error.to_string()));
        self.table.edit().hooks = Arc::new(hooks);
        lost::look_after(&mut self.table);
    }

    /// Hooks that were found lost before they were put back, if they were.
    fn note_lost(&mut self, lost: &[String]) {
        if lost::note(&mut self.table, lost) {
            tracing::warn!(hooks = ?lost, "hooks were taken off; putting them back");
            // Not all of them need be what is being done: the rest is put back at once, too.
            self.observe_at = Instant::now();
        }
    }

    fn complain(&mut self, object: &str, complaint: Option<String>) {
        let before = match &complaint {
            Some(text) => self.complaints.insert(object.into(), text.clone()),
            None => self.complaints.remove(object),
        };
        if before != complaint {
            self.problems_seen = None;
            self.table.edit();
            if let Some(text) = complaint {
                tracing::error!(%object, "{text}");
            }
        }
    }

    fn try_again(&mut self) {
        self.table.announce(self.queued);
        let before = self.retry.waiting();
        let changes = self.retry.changes(self.planner.state());
        if !changes.is_empty() {
            let report = self.dataplane.apply(&mut self.table, self.queued, &changes);
            self.settle(&changes, &report);
        }
        if self.retry.devices {
            self.set_devices();
        }
        if self.retry.hooks {
            self.activate();
        }
        self.retry.reschedule(Instant::now(), before);
        self.record_programmed(SystemTime::now());
        self.tick();
        self.table.returned();
        tracing::info!(before, waiting = self.retry.waiting(), "tried again what had failed");
    }

    /// Compares with the kernel and repairs what somebody else changed.
    fn observe(&mut self) {
        self.table.announce(self.queued);
        let observed = self.dataplane.call(&mut self.table, self.queued, |dataplane| dataplane.observe());
        self.complain("kernel state", observed.as_ref().err().map(|error| format!("cannot be read: {error}")));
        if let Ok(drift) = &observed {
            lost::note(&mut self.table, &drift.hooks);
        }
        let ahead = self.dataplane.call(&mut self.table, self.queued, |dataplane| dataplane.ahead());
        lost::note_ahead(&mut self.table, ahead);
        let without_xdp = self.devices_known && !self.table.next.without_xdp.is_empty();
        if observed.as_ref().is_ok_and(|drift| drift.is_empty() && without_xdp) {
            // Nobody tells when what was in its way is gone: another program, a setting of the driver.
            self.set_devices();
            self.retry.schedule(Instant::now(), false);
        }
        if let Ok(drift) = observed
            && !drift.is_empty()
        {
            let Drift { frontends, guards, local_cidrs, hooks, unfinished } = &drift;
            if drift.altered() > 0 {
                tracing::warn!(
                    frontends = frontends.len(),
                    guards = guards.len(),
                    local_cidrs,
                    ?hooks,
                    "kernel state was altered; repairing"
                );
                self.table.edit().drift_repaired += drift.altered();
            } else {
                tracing::info!(unfinished, "what failed is brought about anew");
            }
            self.resync(Instant::now());
            if self.devices_known {
                self.set_devices();
            }
            self.activate();
            self.retry.schedule(Instant::now(), false);
            self.tick();
        }
        self.table.returned();
        self.observe_at = Instant::now() + self.options.resync_period;
    }

    /// The first full state is programmed, on devices and with its hooks; from then on the node stays ready. Whoever served before goes once all
    /// of it is in force.
    fn be_ready(&mut self) {
        if self.table.next.ready && self.takeover.is_done() {
            return;
        }
        // Whoever would send devices may be gone or switched off; then there is nothing to wait for.
        let next = &self.table.next;
        // A node on none of whose devices a program sits serves nobody per packet.
        let is_hooked = |device: &Device| !next.failed_devices.contains_key(&device.name);
        let hooked = next.devices.is_empty() || next.devices.values().any(is_hooked);
        let attached = (self.devices_known && hooked) || !self.devices_open;
        if !self.table.next.ready && self.active && attached {
            self.table.edit().ready = true;
            self.publish();
        }
        if self.table.next.ready && self.takeover.look(&self.missing(hooked), Instant::now()) {
            self.dataplane.call(&mut self.table, self.queued, |dataplane| dataplane.in_force());
            self.tick();
        }
    }

    /// What is not in force although it should be, and may be yet.
    fn missing(&self, hooked: bool) -> Missing {
        let Retry { frontends, guards, hooks, local_cidrs, .. } = &self.retry;
        let mut missing = Missing::default();
        if !hooked || *hooks {
            missing.all("hooks");
        }
        for family in Family::BOTH {
            let is_of = |frontend: &Frontend| Family::of(frontend.addr) == family;
            if frontends.iter().any(is_of) && !self.table.serves(family) {
                missing.all(format!("frontends of {family:?}"));
            }
        }
        missing.some("frontends", frontends.iter());
        missing.some("guards", guards.iter());
        let is_worth_trying = |failure: &Failure| matches!(failure, Failure::Retry(_));
        let devices = self.table.next.failed_devices.iter().filter(|(_, failure)| is_worth_trying(failure));
        missing.some("devices", devices.map(|(name, _)| name).collect::<Vec<_>>().into_iter());
        missing.some("addresses that tell pods", (*local_cidrs).then_some("all").into_iter());
        missing.some("Services that cannot be read", self.held.iter());
        missing
    }

    fn tick(&mut self) {
        let (pause, unplaced, unsettled, unremoved, retiring) =
            self.dataplane.call(&mut self.table, self.queued, |dataplane| {
                let pause = dataplane.tick();
                (pause, dataplane.unplaced(), dataplane.unsettled(), dataplane.unremoved(), dataplane.retiring())
            });
        self.complain("pods left alone at connect time", unplaced);
        self.complain("kernel settings", unsettled);
        self.complain("rules of an earlier run", unremoved);
        for mode in Mode::ALL.map(Mode::name) {
            let trouble = |one: &Retiring| {
                let state = if one.retired { "takes no new flows, and stays" } else { "is still in force" };
                one.trouble.as_ref().map(|why| format!("what an agent in this mode left {state}: {why}"))
            };
            let text = retiring.iter().find(|one| one.mode == mode).and_then(trouble);
            self.complain(&format!("mode {mode}"), text);
        }
        let kept = retiring.iter().find(|one| Mode::ALL.iter().all(|mode| mode.name() != one.mode));
        let why = kept.and_then(|one| one.trouble.clone());
        self.complain("connections that kube-proxy translated", why.map(|why| format!("NAT stays on for them: {why}")));
        if *self.table.next.retiring != retiring {
            self.table.edit().retiring = Arc::new(retiring);
        }
        self.tick_at = pause.map(|pause| Instant::now() + pause);
    }

    fn publish(&mut self) {
        if self.problems_seen != Some(self.planner.problems_version()) {
            self.problems_seen = Some(self.planner.problems_version());
            let mut problems = self.planner.problems();
            problems.extend(self.index.problems());
            problems.extend(self.complaints.iter().map(|(object, text)| (object.clone(), vec![text.clone()])));
            self.table.edit().problems = Arc::new(problems);
        }
        let fill = self.dataplane.call(&mut self.table, self.queued, |dataplane| dataplane.fill());
        if *self.table.next.fill != fill {
            self.table.edit().fill = Arc::new(fill);
        }
        let services = &self.index.snapshot().services;
        self.table.publish(|service| services.get(service).map(|service| Arc::clone(&service.uid)));
    }
}

fn nanoseconds(at: SystemTime) -> i64 {
    let since = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}
