//! What an agent in another mode left in force, and how this one takes over from it: without a gap, and without breaking a connection.
//!
//! ```text
//! there ──► this mode's first full state is in force ──► retired: takes no new flow ──► its last flow is over ──► removed
//! ```
//!
//! Until this mode is in force nothing is touched, so there is always somebody who serves. What is retired is found again by the next start,
//! whichever mode that is of. A walk over a large table takes longer than a change may wait, so a thread of its own does all of it.

use std::{
    collections::BTreeSet,
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{self, Receiver, RecvTimeoutError, Sender},
    },
    time::{Duration, Instant},
};

use super::{
    Ahead, Capabilities, Dataplane, DataplaneError, Drift, Fill, Hook, Report, Retiring, ebpf, iptables, ipvs,
    netfilter::{nat::Kept, translated::Translated},
    nftables,
    select::{Mode, Options},
};
use crate::{
    desired::{Changes, DesiredState, Devices, Frontend},
    model::ServiceKey,
};

/// The first look at how many flows are left, and the one that confirms that there is none: a program that read a frontend just before it
/// went may enter a flow just after.
const SOON: Duration = Duration::from_secs(1);
/// Between two looks at flows that last.
const LATER: Duration = Duration::from_secs(30);
/// Between two looks for what may come.
const AT_TIMES: Duration = Duration::from_secs(10);
/// Between two tries at what fails.
const LONGEST: Duration = Duration::from_secs(300);
/// Looking takes at most one part in so many of the time.
const SHARE: u32 = 20;

/// What one mode left. Another dataplane joins in by an implementation, and a line in [`find`].
pub(crate) trait Former: Send {
    /// The mode's, or whoever else it is of.
    fn name(&self) -> &'static str;

    /// Whether there may be something at any time, and again. What agents left is there when one starts, or not at all.
    fn recurs(&self) -> bool {
        false
    }

    /// Whether there is anything. Asked once the mode that takes over is in force.
    fn is_there(&mut self) -> Result<bool, DataplaneError>;

    /// From now on it takes no new flow, and the open ones go on. Done again it does nothing.
    fn retire(&mut self) -> Result<(), DataplaneError>;

    /// How many flows still go by it.
    fn flows(&mut self) -> Result<u64, DataplaneError>;

    /// Everything that is left of it.
    fn remove(&mut self) -> Result<(), DataplaneError>;
}

/// Frontends that are, or were, in force since this agent started.
pub(crate) type Known = Arc<Mutex<BTreeSet<Frontend>>>;

/// Who else may have left something.
struct Found {
    formers: Vec<Box<dyn Former>>,
    /// Ends flows of the former one's table whose backend goes, as it would itself.
    hygiene: Option<ebpf::Hygiene>,
    known: Option<Known>,
}

/// Fails where an agent is at work in another mode.
fn find(options: &Options) -> Result<Found, DataplaneError> {
    let Options { mode, ebpf, netfilter: _ } = options;
    let mut found = Found { formers: Vec::new(), hygiene: None, known: None };
    // Netfilter's own modes hand over to one another through conntrack, which translates for either; programs do not.
    let known = (*mode == Mode::Ebpf).then(Known::default);
    if *mode != Mode::Ebpf
        && let Some((former, hygiene)) = ebpf::Former::find(ebpf)?
    {
        found.formers.push(Box::new(former));
        found.hygiene = Some(hygiene);
    }
    if *mode != Mode::Nftables {
        found.formers.push(Box::new(nftables::Former(Translated::new(known.clone()))));
    }
    if *mode != Mode::Iptables {
        found.formers.push(Box::new(iptables::Former(Translated::new(known.clone()))));
    }
    if *mode != Mode::Ipvs {
        found.formers.push(Box::new(ipvs::Former::default()));
    }
    found.formers.push(Box::new(Kept { waits: *mode == Mode::Ebpf }));
    found.known = known;
    Ok(found)
}

/// What the thread tells of.
#[derive(Debug, Default)]
struct Told {
    retiring: Vec<Retiring>,
    /// It has more to do.
    busy: bool,
}

type Shared = Arc<Mutex<Told>>;

fn lock<T>(shared: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A dataplane that takes over from others.
pub(super) struct Moving {
    dataplane: Box<dyn Dataplane>,
    hygiene: Option<ebpf::Hygiene>,
    known: Option<Known>,
    /// The thread's other end. It ends with this.
    begin: Sender<()>,
    shared: Shared,
}

impl Moving {
    /// `open` makes the dataplane; it is not asked where this one may not run beside an agent that does.
    pub(super) fn open(
        options: &Options,
        open: impl FnOnce() -> Result<Box<dyn Dataplane>, DataplaneError>,
    ) -> Result<Self, DataplaneError> {
        let Found { formers, hygiene, known } = find(options)?;
        let dataplane = open()?;
        let (begin, queue) = mpsc::channel();
        let shared = Shared::default();
        let mut worker = Worker::new(options.mode, formers, Arc::clone(&shared));
        std::thread::Builder::new().name("former".into()).spawn(move || worker.run(&queue)).map_err(|source| {
            DataplaneError::Kernel { what: "start the thread that removes what other modes left".into(), source }
        })?;
        Ok(Self { dataplane, hygiene, known, begin, shared })
    }

    fn know<'a>(&self, frontends: impl Iterator<Item = &'a Frontend>) {
        if let Some(known) = &self.known {
            lock(known).extend(frontends.copied());
        }
    }
}

impl Dataplane for Moving {
    fn capabilities(&self) -> Capabilities {
        self.dataplane.capabilities()
    }

    fn resync(&mut self, desired: &DesiredState) -> Report {
        self.know(desired.frontends.keys());
        let report = self.dataplane.resync(desired);
        if let Some(hygiene) = &self.hygiene {
            hygiene.all(desired, &report);
        }
        report
    }

    fn wait(&mut self) {
        self.dataplane.wait();
    }

    fn hooks_first(&self) -> bool {
        self.dataplane.hooks_first()
    }

    fn hold(&mut self, services: &BTreeSet<ServiceKey>) {
        self.dataplane.hold(services);
    }

    fn apply(&mut self, changes: &Changes) -> Report {
        self.know(changes.set.keys());
        let report = self.dataplane.apply(changes);
        if let Some(hygiene) = &self.hygiene {
            hygiene.changed(changes, &report);
        }
        report
    }

    fn set_devices(&mut self, devices: &Devices) -> Report {
        let report = self.dataplane.set_devices(devices);
        if let Some(hygiene) = &self.hygiene {
            hygiene.devices();
        }
        report
    }

    fn activate(&mut self) -> Result<(), DataplaneError> {
        self.dataplane.activate()
    }

    fn in_force(&mut self) {
        self.dataplane.in_force();
        if self.begin.send(()).is_err() {
            tracing::error!("the thread that removes what other modes left is gone; restart the agent");
        }
    }

    fn observe(&mut self) -> Result<Drift, DataplaneError> {
        self.dataplane.observe()
    }

    fn let_in(&mut self, ports: &BTreeSet<u16>) {
        self.dataplane.let_in(ports);
    }

    fn tick(&mut self) -> Option<Duration> {
        let next = self.dataplane.tick();
        let told = lock(&self.shared);
        if !told.retiring.iter().any(|one| one.mode == Mode::Ebpf.name()) {
            self.hygiene = None;
        }
        if !told.busy {
            // Nobody is left who counts by it.
            self.known = None;
        }
        // Whoever drives this asks what is left each time; something may come by itself.
        let look = if told.busy { SOON } else { AT_TIMES };
        Some(next.map_or(look, |next| next.min(look)))
    }

    fn unplaced(&self) -> Option<String> {
        self.dataplane.unplaced()
    }

    fn unsettled(&self) -> Option<String> {
        self.dataplane.unsettled()
    }

    fn unremoved(&self) -> Option<String> {
        self.dataplane.unremoved()
    }

    fn retiring(&self) -> Vec<Retiring> {
        lock(&self.shared).retiring.clone()
    }

    fn teardown(&mut self) -> Result<(), DataplaneError> {
        self.dataplane.teardown()
    }

    fn fill(&self) -> Vec<Fill> {
        self.dataplane.fill()
    }

    fn hooks(&self) -> Vec<Hook> {
        self.dataplane.hooks()
    }

    fn lost_hooks(&self) -> Vec<String> {
        self.dataplane.lost_hooks()
    }

    fn ahead(&self) -> Vec<Ahead> {
        self.dataplane.ahead()
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    /// Not known to be there.
    Unasked,
    There,
    Retired,
}

/// One former mode on its way out.
struct Task {
    former: Box<dyn Former>,
    stage: Stage,
    due: Instant,
    pause: Duration,
    flows: Option<u64>,
    trouble: Option<String>,
}

struct Worker {
    /// Which takes over.
    mode: Mode,
    tasks: Vec<Task>,
    shared: Shared,
}

impl Worker {
    fn new(mode: Mode, formers: Vec<Box<dyn Former>>, shared: Shared) -> Self {
        let task = |former: Box<dyn Former>| Task {
            former,
            stage: Stage::Unasked,
            due: Instant::now(),
            pause: SOON,
            flows: None,
            trouble: None,
        };
        let worker = Self { mode, tasks: formers.into_iter().map(task).collect(), shared };
        // Pins are looked for to find their owner, and there from the beginning.
        worker.tell(|task| task.former.name() == Mode::Ebpf.name());
        worker
    }

    fn run(&mut self, queue: &Receiver<()>) {
        if queue.recv().is_err() {
            return;
        }
        while let Some(due) = self.tasks.iter().map(|task| task.due).min() {
            match queue.recv_timeout(due.saturating_duration_since(Instant::now())) {
                Err(RecvTimeoutError::Disconnected) => return,
                Ok(()) | Err(RecvTimeoutError::Timeout) => self.turn(Instant::now()),
            }
        }
    }

    fn turn(&mut self, now: Instant) {
        let Self { mode, tasks, shared: _ } = self;
        let over: Vec<bool> = tasks.iter_mut().map(|task| task.due <= now && task.turn(*mode, now)).collect();
        let mut over = over.into_iter();
        tasks.retain(|_| !over.next().unwrap_or_default());
        self.tell(|task| task.stage != Stage::Unasked || task.trouble.is_some());
    }

    fn tell(&self, of: impl Fn(&Task) -> bool) {
        let retiring = self.tasks.iter().filter(|task| of(task)).map(Task::state).collect();
        *lock(&self.shared) = Told { retiring, busy: self.tasks.iter().any(|task| !task.waits()) };
    }
}

impl Task {
    /// For something that may come.
    fn waits(&self) -> bool {
        self.stage == Stage::Unasked && self.former.recurs()
    }

    /// Whether it is over.
    fn turn(&mut self, to: Mode, now: Instant) -> bool {
        let start = Instant::now();
        let result = self.step(to);
        let took = start.elapsed();
        let over = matches!(result, Ok(true));
        match result {
            Ok(_) => self.trouble = None,
            Err(error) => {
                let trouble = error.to_string();
                let mode = self.former.name();
                if self.trouble.as_ref() != Some(&trouble) {
                    let retired = self.stage == Stage::Retired;
                    tracing::warn!(mode, retired, %error, "what an earlier run left cannot be done away with");
                    self.pause = SOON;
                }
                self.trouble = Some(trouble);
                self.pause = (self.pause * 2).min(LONGEST);
            }
        }
        if over && self.former.recurs() {
            (self.stage, self.flows, self.pause) = (Stage::Unasked, None, AT_TIMES);
        }
        self.due = now + self.pause.max(took * SHARE);
        over && !self.former.recurs()
    }

    fn step(&mut self, to: Mode) -> Result<bool, DataplaneError> {
        let mode = self.former.name();
        if self.stage == Stage::Unasked {
            if !self.former.is_there()? {
                return Ok(true);
            }
            self.stage = Stage::There;
        }
        if self.stage == Stage::There {
            self.former.retire()?;
            tracing::info!(mode, "what an earlier run left in force takes no new flows: {} has taken over", to.name());
            self.stage = Stage::Retired;
            self.pause = SOON;
            return Ok(false);
        }
        let flows = self.former.flows()?;
        let before = self.flows.replace(flows);
        if flows == 0 && before == Some(0) {
            self.former.remove()?;
            tracing::info!(mode, "what an earlier run left is removed");
            return Ok(true);
        }
        let changed = before.is_none_or(|before| flows < before);
        if changed {
            tracing::info!(mode, flows, "flows still go by what an earlier run left");
        }
        self.pause = if changed || flows == 0 { SOON } else { (self.pause * 2).min(LATER) };
        Ok(false)
    }

    fn state(&self) -> Retiring {
        Retiring {
            mode: self.former.name(),
            retired: self.stage == Stage::Retired,
            flows: self.flows,
            trouble: self.trouble.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What was asked of it, and how many flows it has each time.
    struct Fake {
        recurs: bool,
        there: bool,
        flows: Vec<Result<u64, ()>>,
        log: Arc<Mutex<Vec<&'static str>>>,
    }

    impl Former for Fake {
        fn name(&self) -> &'static str {
            "nftables"
        }

        fn recurs(&self) -> bool {
            self.recurs
        }

        fn is_there(&mut self) -> Result<bool, DataplaneError> {
            lock(&self.log).push("is there");
            Ok(self.there)
        }

        fn retire(&mut self) -> Result<(), DataplaneError> {
            lock(&self.log).push("retire");
            Ok(())
        }

        fn flows(&mut self) -> Result<u64, DataplaneError> {
            lock(&self.log).push("flows");
            self.flows.remove(0).map_err(|()| DataplaneError::Unavailable("no leave".into()))
        }

        fn remove(&mut self) -> Result<(), DataplaneError> {
            lock(&self.log).push("remove");
            Ok(())
        }
    }

    type Log = Arc<Mutex<Vec<&'static str>>>;

    fn worker(there: bool, flows: &[Result<u64, ()>]) -> (Worker, Log) {
        worker_for(false, there, flows)
    }

    fn worker_for(recurs: bool, there: bool, flows: &[Result<u64, ()>]) -> (Worker, Log) {
        let log = Log::default();
        let fake = Fake { recurs, there, flows: flows.to_vec(), log: Arc::clone(&log) };
        (Worker::new(Mode::Ebpf, vec![Box::new(fake)], Shared::default()), log)
    }

    fn turn(worker: &mut Worker) -> Vec<(Option<u64>, bool)> {
        let due = worker.tasks[0].due;
        worker.turn(due);
        lock(&worker.shared).retiring.iter().map(|one| (one.flows, one.trouble.is_some())).collect()
    }

    #[test]
    fn it_goes_when_nobody_needs_it_by_two_looks() {
        let flows = [Ok(2), Ok(0), Ok(1), Err(()), Ok(0), Ok(0)];
        let (mut worker, log) = worker(true, &flows);
        assert_eq!(lock(&worker.shared).retiring, [], "nobody has looked yet");
        assert_eq!(turn(&mut worker), [(None, false)]);
        assert_eq!(*lock(&log), ["is there", "retire"]);
        let seen: Vec<_> = (0..5).map(|_| turn(&mut worker)).collect();
        assert_eq!(
            seen,
            [[(Some(2), false)], [(Some(0), false)], [(Some(1), false)], [(Some(1), true)], [(Some(0), false)],]
        );
        assert!(!lock(&log).contains(&"remove"));
        assert_eq!(turn(&mut worker), []);
        assert_eq!(lock(&log).last(), Some(&"remove"));
        assert!(worker.tasks.is_empty());
    }

    #[test]
    fn what_lasts_is_looked_at_less_and_less() {
        let (mut worker, _) = worker(true, &[Ok(3); 9]);
        let pauses: Vec<_> = (0..9)
            .map(|_| {
                turn(&mut worker);
                worker.tasks[0].pause.as_secs()
            })
            .collect();
        assert_eq!(pauses, [1, 1, 2, 4, 8, 16, 30, 30, 30]);
    }

    #[test]
    fn where_nothing_is_nothing_is_said() {
        let (mut worker, log) = worker(false, &[]);
        assert_eq!(turn(&mut worker), []);
        assert_eq!(*lock(&log), ["is there"]);
    }

    #[test]
    fn what_may_come_again_is_looked_for_again() {
        let (mut worker, log) = worker_for(true, true, &[Ok(1), Ok(0), Ok(0), Ok(5)]);
        let waits = |worker: &Worker| (worker.tasks[0].waits(), lock(&worker.shared).busy);
        let seen: Vec<_> = (0..4).map(|_| turn(&mut worker)).collect();
        assert_eq!(seen, [vec![(None, false)], vec![(Some(1), false)], vec![(Some(0), false)], vec![]]);
        assert_eq!((waits(&worker), worker.tasks[0].pause), ((true, false), AT_TIMES));
        assert_eq!(lock(&log).last(), Some(&"remove"));
        assert_eq!((turn(&mut worker), waits(&worker)), (vec![(None, false)], (false, true)));
        assert_eq!(turn(&mut worker), [(Some(5), false)]);

        let (mut worker, log) = worker_for(true, false, &[]);
        assert_eq!([turn(&mut worker), turn(&mut worker)], [[], []]);
        assert_eq!((log.lock().unwrap().len(), waits(&worker)), (2, (true, false)));
    }

    /// The thread waits for the word, and ends with its owner.
    #[test]
    fn nothing_is_touched_before_the_new_one_is_in_force() {
        let (mut worker, log) = worker(true, &[]);
        let (begin, queue) = mpsc::channel();
        drop(begin);
        worker.run(&queue);
        assert!(lock(&log).is_empty());
    }
}
