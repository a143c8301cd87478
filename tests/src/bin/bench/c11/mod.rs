//! C11: the dataplanes that stand in for eBPF, side by side with upstream's kube-proxy.
//!
//! Agent and kube-proxy take turns. Each gets a network namespace of its own and the same objects from an API server of a few lines, and the
//! kernel is asked what is in force ([`observer`]). A further run, whose times are not taken, notes which commands are started and what they
//! are told; the longest text of it is then loaded by hand: what the rules cost whoever writes them.

mod observer;
mod subject;

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use proxy_tests::{
    ahead::Ahead,
    feed::{self, Feed},
};

use self::{
    observer::Observer,
    subject::{Call, Mode, Period, Start, Subject, Who},
};
use crate::{
    Scale, c3, objects,
    report::{Bound, Figure, Report},
    world::{Cgroups, Netns},
};

const ENDPOINTS: u32 = 5;
/// Of which a change adds one.
const ROOM: u32 = ENDPOINTS + 1;

/// Who is measured, if it is there.
pub struct Programs<'a> {
    pub agent: Option<&'a Path>,
    pub kube_proxy: Option<&'a Path>,
}

/// Longer than this nobody may take to load rules.
const PATIENCE: Duration = Duration::from_secs(100);
/// Whoever writes several tables is not done before the last of them.
const SETTLED: Duration = Duration::from_millis(300);
/// kube-proxy lets changes wait until the last one is a second ago.
const APART: Duration = Duration::from_millis(1_300);
/// The agent does not.
const GAP: Duration = Duration::from_millis(100);
const AGENT_CHANGES: u32 = 50;
const KUBE_PROXY_CHANGES: u32 = 5;
/// Starts measured of the agent. kube-proxy's last up to half a minute.
const LOADS: usize = 3;
/// Where it is counted what runs while nothing changes.
const PERIOD: u32 = 5;
const IDLE: Duration = Duration::from_secs(21);
/// Loads by hand, of which the fastest counts.
const BY_HAND: usize = 3;

/// Where a run happens.
struct Room<'a> {
    mode: Mode,
    services: u32,
    cgroups: &'a Cgroups,
    files: PathBuf,
}

/// A subject that is fed and seen.
struct Run {
    feed: Feed,
    observer: Observer,
    started: Instant,
    subject: Subject,
    /// What it is in.
    _netns: Netns,
}

/// How the first rules came; in milliseconds and MB.
#[derive(Clone, Copy)]
struct Load {
    took: f64,
    /// Of that, what the last command took that it started.
    tool: f64,
    cpu: f64,
    /// The largest of the commands.
    memory: f64,
}

/// What one subject came to.
struct Figures {
    loads: Vec<Load>,
    /// In milliseconds.
    changes: Vec<f64>,
    change_cpu: f64,
    /// Its own, in the end.
    memory: f64,
}

impl Figures {
    fn load(&self, of: fn(&Load) -> f64) -> Figure {
        Figure::of(&self.loads.iter().map(of).collect::<Vec<_>>())
    }
}

pub fn measure(scale: &Scale, programs: &Programs<'_>, cgroups: &Cgroups, report: &mut Report) -> Result<()> {
    let Some(agent) = programs.agent else {
        report.skip("C11: no agent was given (--agent)");
        return Ok(());
    };
    if programs.kube_proxy.is_none() {
        report.skip("C11, kube-proxy: none was given (--kube-proxy)");
    }
    let files = files(cgroups.root());
    let outcome = Mode::ALL.into_iter().try_for_each(|mode| {
        if let Some(missing) = [mode.writes(), "tee"].into_iter().find(|program| subject::find(program).is_none()) {
            report.skip(format!("C11, {}: there is no {missing}", mode.name()));
            return Ok(());
        }
        scale.fallback.iter().try_for_each(|&services| {
            let room = Room { mode, services, cgroups, files: files.clone() };
            let first = scale.fallback.first() == Some(&services);
            let last = scale.fallback.last() == Some(&services);
            room.measure(agent, programs.kube_proxy, (first, last), report)
        })
    });
    let _gone = fs::remove_dir_all(&files);
    outcome
}

/// Where a run of this name keeps what it writes.
pub fn files(run: &Path) -> PathBuf {
    std::env::temp_dir().join(run.file_name().unwrap_or_default())
}

/// The slice of a Service, with or without what a change adds.
fn slice(index: u32, changed: bool) -> serde_json::Value {
    objects::slice(index, ROOM, 0..ENDPOINTS + u32::from(changed))
}

impl Room<'_> {
    fn measure(
        &self,
        agent: &Path,
        kube_proxy: Option<&Path>,
        (first, last): (bool, bool),
        report: &mut Report,
    ) -> Result<()> {
        let Self { mode, services, .. } = *self;
        let size = format!("{}, {services} × {ENDPOINTS}", mode.name());
        let mut ours = None;
        let mut theirs = None;
        for (who, program) in [(Who::Agent, Some(agent)), (Who::KubeProxy, kube_proxy)] {
            let Some(program) = program else { continue };
            let figures = match self.figures(who, program) {
                Ok(figures) => figures,
                Err(error) => {
                    report.skip(format!("C11, {}, {size}: {error:#}", who.name()));
                    continue;
                }
            };
            say(who, &size, &figures, report);
            *(if who == Who::Agent { &mut ours } else { &mut theirs }) = Some(figures);
        }
        let by_hand = match self.by_hand(agent, first, &size, report) {
            Ok(by_hand) => Some(by_hand),
            Err(error) => {
                report.skip(format!("C11, by hand, {size}: {error:#}"));
                None
            }
        };
        if first && let Some(program) = kube_proxy {
            let noted = self.noted(Who::KubeProxy, program, true);
            match noted {
                Ok(noted) => noted.say(Who::KubeProxy, &size, report),
                Err(error) => report.skip(format!("C11, what kube-proxy starts, {size}: {error:#}")),
            }
        }
        let Some(ours) = ours else { return Ok(()) };
        if let Some(by_hand) = by_hand {
            let ratio = |took: Figure| took.median / by_hand;
            let took = ratio(ours.load(|load| load.took));
            report.row("C11", format!("agent's load over the same by hand, {size}"), "×", once(took));
            if mode != Mode::Nftables {
                let what = format!("the agent's restore over the same by hand, {size}");
                report.bar("C11", what, Bound::AtMost(1.1), ratio(ours.load(|load| load.tool)), true);
            }
        }
        if let Some(theirs) = theirs {
            let took = |of: &Figures| of.load(|load| load.took).median;
            let times = took(&theirs) / took(&ours);
            let what = format!("kube-proxy's load over the agent's, {size}");
            if mode == Mode::Nftables && last && !first {
                report.bar("C11", what, Bound::AtLeast(10.0), times, true);
            } else {
                report.row("C11", what, "×", once(times));
            }
            let times = Figure::of(&theirs.changes).median / Figure::of(&ours.changes).median;
            report.row("C11", format!("kube-proxy's change over the agent's, {size}"), "×", once(times));
        }
        let limit = if mode == Mode::Nftables { 10.0 } else { 500.0 };
        let what = format!("the agent's change, median, {size}, ms");
        report.bar("C11", what, Bound::AtMost(limit), Figure::of(&ours.changes).median, true);
        Ok(())
    }

    /// Starts one, in a namespace of its own.
    fn start(&self, who: Who, program: &Path, period: Period, notes: Option<&Path>) -> Result<Run> {
        let Self { mode, services, cgroups, files } = self;
        let _old = fs::remove_dir_all(files);
        fs::create_dir_all(files)?;
        if let Some(notes) = notes {
            fs::create_dir_all(notes)?;
        }
        let commands = files.join("bin");
        subject::commands(&commands, *mode, notes)?;
        let netns = Netns::new()?;
        netns.ip("link set lo up\nlink add eth0 type veth peer name eth1\naddr add 10.1.0.1/24 dev eth0\n")?;
        let feed = objects::feed(*services, |index| slice(index, false))?;
        // The threads that answer go ahead, too.
        let ahead = Ahead::of_others();
        let at = netns.enter(|| feed.serve());
        drop(ahead);
        let kubeconfig = feed::kubeconfig(files, at?)?;
        let bpffs = c3::bpffs(cgroups.root());
        fs::create_dir_all(&bpffs)?;
        let observer = Observer::new(&netns, who.place(*mode), |index, n| objects::endpoint(index, ROOM, n))?;
        let cgroup = cgroups.make("c11")?;
        let start = Start {
            who,
            mode: *mode,
            period,
            program,
            kubeconfig: &kubeconfig,
            netns: &netns,
            commands: &commands,
            cgroup: &cgroup,
            files,
            bpffs: &bpffs,
        };
        let started = Instant::now();
        let subject = start.spawn()?;
        Ok(Run { feed, observer, started, subject, _netns: netns })
    }

    fn figures(&self, who: Who, program: &Path) -> Result<Figures> {
        let mut loads = Vec::new();
        let more = if who == Who::Agent { LOADS - 1 } else { 0 };
        for _ in 0..more {
            let mut run = self.start(who, program, Period::Default, None)?;
            let load = run.load(self.services);
            loads.push(load.with_context(|| run.subject.last_words())?);
        }
        let mut run = self.start(who, program, Period::Default, None)?;
        let outcome = run.load(self.services).and_then(|load| {
            loads.push(load);
            run.changes(who, self.services)
        });
        let (changes, change_cpu) = outcome.with_context(|| run.subject.last_words())?;
        let memory = run.subject.memory(None).context("it says nothing of its memory")?;
        Ok(Figures { loads, changes, change_cpu, memory })
    }

    /// A run whose commands are noted; `idle`: and what it starts while nothing changes.
    fn noted(&self, who: Who, program: &Path, idle: bool) -> Result<Noted> {
        let notes = self.files.join("notes");
        let mut run = self.start(who, program, Period::Seconds(PERIOD), Some(&notes))?;
        let outcome: Result<(usize, usize, usize)> = (|| {
            run.load(self.services)?;
            thread::sleep(APART);
            let load = subject::calls(&notes).len();
            let wanted = run.change(0)?;
            run.wait_for(wanted)?;
            thread::sleep(APART);
            let change = subject::calls(&notes).len();
            let mut quiet = change;
            if idle {
                // Whoever looks once more after a change may.
                thread::sleep(3 * Duration::from_secs(PERIOD.into()));
                quiet = subject::calls(&notes).len();
                thread::sleep(IDLE);
            }
            Ok((load, change, quiet))
        })();
        let (load, change, quiet) = outcome.with_context(|| run.subject.last_words())?;
        drop(run);
        let mut start = subject::calls(&notes);
        let idle = idle.then(|| start.split_off(quiet));
        start.truncate(change);
        let changed = start.split_off(load);
        Ok(Noted { start, changed, idle })
    }

    /// The agent's rules, written by hand into a namespace where there are none.
    fn by_hand(&self, agent: &Path, idle: bool, size: &str, report: &mut Report) -> Result<f64> {
        let noted = self.noted(Who::Agent, agent, idle)?;
        noted.say(Who::Agent, size, report);
        let longest = noted.start.iter().filter(|call| call.command == self.mode.writes());
        let longest = longest.max_by_key(|call| call.told()).context("no rules were written")?;
        let (text, arguments) = (fs::read_to_string(&longest.input)?, &longest.arguments);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let mut took = Vec::with_capacity(BY_HAND);
        for _ in 0..BY_HAND {
            let netns = Netns::new()?;
            let _ahead = Ahead::of_others();
            let start = Instant::now();
            netns.run(self.mode.writes(), &arguments, &text)?;
            took.push(ms(start.elapsed()));
        }
        let took = Figure::of(&took);
        report.row("C11", format!("the agent's rules by hand ({} bytes), {size}", text.len()), "ms", took);
        Ok(took.median)
    }
}

impl Run {
    /// What changes take, and their processor time.
    fn changes(&mut self, who: Who, services: u32) -> Result<(Vec<f64>, f64)> {
        thread::sleep(APART);
        let before = self.subject.cpu()?;
        let count = if who == Who::Agent { AGENT_CHANGES } else { KUBE_PROXY_CHANGES };
        let mut changes = Vec::new();
        for change in 0..count.min(services) {
            // Neighbours are not changed one after the other.
            let index = change.wrapping_mul(7_919) % services;
            let wanted = self.change(index)?;
            changes.push(ms(self.wait_for(wanted)?));
            thread::sleep(if who == Who::Agent { GAP } else { APART });
        }
        let cpu = (self.subject.cpu()? - before) / changes.len() as f64;
        Ok((changes, cpu))
    }

    /// Until all endpoints stand in the rules.
    fn load(&mut self, services: u32) -> Result<Load> {
        let ahead = Ahead::of_others();
        let (mut looks, mut complete) = (Looks::after(self.observer.stamp()?), None::<(Instant, f64)>);
        let (mut known, mut tool, mut looked) = (BTreeSet::new(), self.started, Instant::now());
        let mut memory = 0_f64;
        loop {
            let now = Instant::now();
            let seen = self.observer.stamp()?;
            if complete.is_none() && now - looked > Duration::from_millis(2) {
                let processes = self.subject.processes();
                if processes.iter().any(|pid| !known.contains(pid)) {
                    tool = now;
                }
                memory = processes.iter().filter_map(|pid| self.subject.memory(Some(*pid))).fold(memory, f64::max);
                known = processes;
                looked = now;
            }
            if let Some(at) = looks.due(seen, now) {
                let cpu = self.subject.cpu()?;
                if complete.is_some() || self.observer.holds(services, ENDPOINTS)? {
                    complete = Some((at, cpu));
                }
            }
            match complete {
                Some((at, cpu)) if at.elapsed() > SETTLED => {
                    drop(ahead);
                    return Ok(Load { took: ms(at - self.started), tool: ms(at - tool), cpu, memory });
                }
                _ => {}
            }
            self.subject.check()?;
            if complete.is_none() && self.started.elapsed() > PATIENCE {
                bail!("not all rules were in force after {} s", PATIENCE.as_secs());
            }
            subject::nap();
        }
    }

    /// Gives a Service one more endpoint; what has to come.
    fn change(&self, index: u32) -> Result<Wanted> {
        ensure!(!self.observer.has(index, ENDPOINTS)?, "the change is in the rules before it is told");
        let change = self.feed.prepare(&slice(index, true))?;
        let looks = Looks::after(self.observer.stamp()?);
        let start = Instant::now();
        self.feed.send(change);
        Ok(Wanted { index, looks, start })
    }

    fn wait_for(&mut self, wanted: Wanted) -> Result<Duration> {
        let Wanted { index, mut looks, start } = wanted;
        let _ahead = Ahead::of_others();
        loop {
            let now = Instant::now();
            let seen = self.observer.stamp()?;
            if let Some(at) = looks.due(seen, now)
                && self.observer.has(index, ENDPOINTS)?
            {
                return Ok(at - start);
            }
            self.subject.check()?;
            if start.elapsed() > PATIENCE / 2 {
                bail!("a change was not in force after {} s", PATIENCE.as_secs() / 2);
            }
            subject::nap();
        }
    }
}

/// When to look at the rules.
struct Looks {
    stamp: u64,
    changed: Option<Instant>,
    next: Option<Instant>,
}

impl Looks {
    fn after(stamp: u64) -> Self {
        Self { stamp, changed: None, next: None }
    }

    /// Since when the rules are what they are, if it is time to look at them: at once, and a few times more, since the kernel counts a change a
    /// moment before it makes it.
    fn due(&mut self, stamp: u64, now: Instant) -> Option<Instant> {
        let Self { stamp: known, changed, next } = self;
        if stamp != *known {
            *known = stamp;
            *changed = Some(now);
            *next = Some(now);
        }
        let (since, due) = ((*changed)?, (*next)?);
        if due > now {
            return None;
        }
        // At last a second after the change.
        let again = now + (now - since).max(Duration::from_millis(2));
        *next = (now - since < Duration::from_secs(1)).then_some(again);
        Some(since)
    }
}

/// What has to come of a change.
struct Wanted {
    index: u32,
    looks: Looks,
    start: Instant,
}

/// Commands that were started.
struct Noted {
    start: Vec<Call>,
    changed: Vec<Call>,
    idle: Option<Vec<Call>>,
}

impl Call {
    /// How many bytes it was told.
    fn told(&self) -> u64 {
        fs::metadata(&self.input).map_or(0, |file| file.len())
    }
}

impl Noted {
    fn say(&self, who: Who, size: &str, report: &mut Report) {
        let Self { start, changed, idle, .. } = self;
        let who = who.name();
        report.row("C11", format!("{who}: commands started to load, {size}"), "", once(start.len() as f64));
        let told: u64 = changed.iter().map(Call::told).sum();
        report.row("C11", format!("{who}: what commands are told for one change, {size}"), "bytes", once(told as f64));
        let Some(idle) = idle else { return };
        let seconds = IDLE.as_secs();
        let what = format!("{who}: commands in {seconds} s without a change, sync period {PERIOD} s, {size}");
        if who == Who::Agent.name() {
            report.bar("C11", what, Bound::AtMost(0.0), idle.len() as f64, true);
        } else {
            report.row("C11", what, "", once(idle.len() as f64));
        }
    }
}

fn say(who: Who, size: &str, figures: &Figures, report: &mut Report) {
    let Figures { changes, change_cpu, memory, .. } = figures;
    let who = who.name();
    let mut row = |what: &str, unit, figure| report.row("C11", format!("{who}: {what}, {size}"), unit, figure);
    row("process start → all rules in force", "ms", figures.load(|load| load.took));
    row("… of which the last command", "ms", figures.load(|load| load.tool));
    row("… processor time, with what it starts", "ms", figures.load(|load| load.cpu));
    row("… memory of its largest command", "MB", figures.load(|load| load.memory));
    row("one endpoint more → in force", "ms", Figure::of(changes));
    row("… processor time", "ms", once(*change_cpu));
    row("peak memory, itself", "MB", once(*memory));
}

fn once(value: f64) -> Figure {
    Figure { median: value, min: value, max: value }
}

fn ms(took: Duration) -> f64 {
    took.as_secs_f64() * 1e3
}
