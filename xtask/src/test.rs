//! `test`: every suite, summed up.
//!
//! One `cargo test --no-run` builds all test programs and the agent itself in one profile; they are then run from here, so
//! that each suite gets what it needs (root, one thread) and what they print can be counted. A skip is never a pass: a test
//! that prints a line `SKIP <what>: <why>` counts as skipped, and in CI only skips listed in `tests/skips.txt` are accepted.
//!
//! Pure tests use every CPU and run one program after the other. Worlds mostly wait, and each has namespaces, cgroups and
//! pins of its own, so several of those programs run side by side.

mod again;
mod libtest;

use std::{
    collections::{BTreeMap, VecDeque},
    fs,
    io::{BufRead as _, BufReader, Write as _},
    num::NonZeroUsize,
    path::{Path, PathBuf},
    process::{Child, Command, ExitCode, Stdio},
    sync::{Mutex, PoisonError, mpsc},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use serde::Deserialize;

pub(crate) use self::libtest::{Outcome, Parser};
use crate::{build_ebpf, command, image, setup, vm::Machines};

#[derive(clap::Args)]
pub struct Args {
    /// Which suite
    #[arg(value_enum, default_value_t = Selection::All)]
    suite: Selection,

    /// Only tests whose name contains this
    #[arg(long, value_name = "TEXT")]
    filter: Option<String>,

    /// Minutes that one test program may take before it is ended and counted as failed
    #[arg(long, value_name = "MINUTES", default_value_t = 30)]
    limit: u64,

    /// How many test programs run side by side, pure ones excepted [default: one more than there are CPUs, 4 at most]
    #[arg(long, value_name = "N")]
    lanes: Option<NonZeroUsize>,

    /// So many cases at most that failed are asked once more when all is done, alone; what passes only then is listed. More
    /// failures than that are none of chance, and none is asked again
    #[arg(long, value_name = "N", default_value_t = 0, conflicts_with = "filter")]
    second_looks: usize,

    /// Kernels, by series, that machines run beside the worlds with, as `cargo xtask vm --kernel` does
    #[arg(long, value_name = "SERIES", conflicts_with = "filter")]
    vm: Vec<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Selection {
    All,
    Unit,
    Prog,
    Netns,
    Api,
}

/// What a test program belongs to; [`Suite::of`] says by which names.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Suite {
    /// Pure and property tests of every crate; needs no root and no BPF toolchain.
    Unit,
    /// The eBPF programs alone: packets through `BPF_PROG_TEST_RUN`, sockets in a cgroup of their own.
    Prog,
    /// The real agent in worlds of network namespaces.
    Netns,
    /// The real agent against a real etcd and kube-apiserver.
    Api,
}

impl Suite {
    const ALL: [Self; 4] = [Self::Unit, Self::Prog, Self::Netns, Self::Api];

    /// By crate and name: below `tests/` are worlds, `api*` and `conformance` among them with an API server; the agent's own integration tests
    /// load programs, unless they begin with a room that never touches the kernel; what is left is unit.
    fn of(target: &Target, package: &str) -> Self {
        if !target.kind.iter().any(|kind| kind == "test") {
            return Self::Unit;
        }
        match (package, target.name.as_str()) {
            ("tests", name) if name.starts_with("api") || name == "conformance" => Self::Api,
            ("tests", _) => Self::Netns,
            ("proxy-agent", name) if PURE.iter().any(|room| name.starts_with(room)) => Self::Unit,
            ("proxy-agent", _) => Self::Prog,
            _ => Self::Unit,
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Unit => "unit",
            Self::Prog => "prog",
            Self::Netns => "netns",
            Self::Api => "api",
        }
    }

    fn is_selected(self, selection: Selection) -> bool {
        match selection {
            Selection::All => true,
            Selection::Unit => self == Self::Unit,
            Selection::Prog => self == Self::Prog,
            Selection::Netns => self == Self::Netns,
            Selection::Api => self == Self::Api,
        }
    }

    /// All but the pure tests load programs or make namespaces.
    fn needs_root(self) -> bool {
        self != Self::Unit
    }
}

/// Beginnings of the names of the agent's integration tests that need neither root nor programs.
const PURE: [&str; 9] = ["cli", "config", "desired", "floors", "model", "plan", "serve", "source", "sync"];

/// These take minutes, the first one longest: they begin before the others, so that in the end no lane has to wait for them.
const LONGEST: [&str; 14] = [
    "tests/conformance",
    "tests/hygiene",
    "tests/cluster_ip",
    "tests/moving",
    "tests/lost",
    "tests/affinity",
    "proxy-agent/packets",
    "tests/api_agent",
    "tests/iptables",
    "tests/xdp",
    "tests/churn",
    "tests/api_takeover",
    "tests/external",
    "proxy-agent/ebpf_dataplane",
];

/// A test program that cargo built.
pub(crate) struct Program {
    pub(crate) suite: Suite,
    /// `<directory of its crate>/<target>`
    pub(crate) name: String,
    pub(crate) executable: PathBuf,
    /// Directory of its crate: where cargo would have started it.
    pub(crate) package: PathBuf,
}

pub fn run(args: &Args) -> Result<ExitCode> {
    let Args { suite: selection, filter, limit, lanes, second_looks, vm: series } = args;
    let suites: Vec<Suite> = Suite::ALL.into_iter().filter(|suite| suite.is_selected(*selection)).collect();
    let servers = suites.contains(&Suite::Api).then(setup::api_server).transpose()?;
    let object = prepare(&suites)?;
    // Minutes where Go has nothing cached; only the suites that start these wait for it.
    let servers = servers.map(|servers| std::thread::spawn(|| servers.build()));
    let machines = Machines::bring(series);
    let built = build(object.as_deref())?;
    let images = suites.contains(&Suite::Netns) && filter.as_ref().is_none_or(|filter| filter.contains("image"));
    let library = built.library.clone();
    let images = images.then(|| std::thread::spawn(move || image::for_tests(&library)));
    let mut programs: Vec<&Program> = built.programs.iter().filter(|program| suites.contains(&program.suite)).collect();
    programs.sort_by(|a, b| (a.suite, &a.name).cmp(&(b.suite, &b.name)));

    let logs = command::target_dir().join("test-logs");
    fs::create_dir_all(&logs).with_context(|| format!("cannot create {}", logs.display()))?;
    let mut pure = Vec::new();
    let mut worlds = Vec::new();
    for program in programs {
        let mut test = if program.suite.needs_root() {
            command::as_root(&program.executable, &format!("the {} suite", program.suite.name()))?
        } else {
            command::command(&program.executable)
        };
        test.args(["--show-output", "--color=never"]).args(filter);
        test.current_dir(&program.package).env("CARGO_MANIFEST_DIR", &program.package);
        test.envs(&built.binaries).env("PROXY_IMAGES", image::tests_directory());
        if let Some(object) = &object {
            test.env(build_ebpf::OBJECT_VARIABLE, object);
        }
        let job = Job { suite: program.suite, name: program.name.clone(), command: test };
        if program.suite.needs_root() {
            worlds.push(job);
        } else {
            pure.push(job);
        }
    }
    if suites.contains(&Suite::Unit) {
        // The same packages as above, so that cargo unifies the same features and builds nothing twice.
        let mut doc = command::cargo();
        doc.args(["test", "--locked", "--quiet", "--doc"]);
        if let Some(object) = &object {
            doc.env(build_ebpf::OBJECT_VARIABLE, object);
        }
        doc.args(["--", "--show-output", "--color=never"]).args(filter);
        pure.push(Job { suite: Suite::Unit, name: "doc".to_owned(), command: doc });
    }
    worlds.sort_by_key(|job| LONGEST.iter().position(|name| job.name == *name).unwrap_or(LONGEST.len()));
    for Job { command, .. } in &mut worlds {
        // Within a program tests share worlds or load programs: one after the other.
        command.arg("--test-threads=1");
    }

    let runner = Runner { logs, limit: Duration::from_secs(limit * 60), servers, images, done: Mutex::default() };
    let beside = std::thread::scope(|scope| {
        let beside = scope.spawn(|| machines?.beside(&built, object.as_deref()));
        runner.all(pure.into(), NonZeroUsize::MIN)?;
        runner.all(worlds.into(), lanes.unwrap_or_else(default_lanes))?;
        let beside = beside.join().unwrap_or_else(|_| bail!("what watches over the virtual machines panicked"));
        Ok::<_, anyhow::Error>(beside.unwrap_or_else(|error| vec![Row::failed("vm", &error)]))
    })?;
    let Runner { logs, limit, done, .. } = runner;
    let mut done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
    let only_alone =
        again::look(&mut done, *second_looks, |name, command| run_program(name, command, &logs, limit, ""));
    let row = |suite: &Suite| {
        let mut row = Row { name: suite.name().to_owned(), outcome: Outcome::default(), took: Duration::ZERO };
        for Done { outcome, took, .. } in done.iter().filter(|done| done.suite == *suite) {
            row.outcome.add(outcome.clone());
            row.took += *took;
        }
        row
    };
    let rows: Vec<Row> = suites.iter().map(row).chain(beside).collect();
    if !only_alone.is_empty() {
        println!(
            "\nfailed beside others, passed alone on a second look (a defect to look into, of the case or of what it asks):"
        );
    }
    for (case, reason) in only_alone {
        println!("  {case}\n      {reason}");
    }
    report(&rows, filter.is_some(), &logs)
}

/// Two that wait leave most of two CPUs idle.
fn default_lanes() -> NonZeroUsize {
    let most = NonZeroUsize::MIN.saturating_add(3);
    std::thread::available_parallelism().map_or(NonZeroUsize::MIN, |cpus| cpus.saturating_add(1).min(most))
}

/// A test program to run.
struct Job {
    suite: Suite,
    name: String,
    command: Command,
}

/// One that ran.
struct Done {
    suite: Suite,
    /// As its failures begin.
    name: String,
    /// As it was started.
    command: Command,
    outcome: Outcome,
    took: Duration,
}

struct Runner {
    logs: PathBuf,
    limit: Duration,
    /// Builds what the `api` suite starts.
    servers: Option<JoinHandle<()>>,
    /// Makes what the suite `image` starts.
    images: Option<JoinHandle<()>>,
    done: Mutex<Vec<Done>>,
}

impl Runner {
    /// Runs them in their order, as many at a time as there are lanes; what has to wait comes later.
    fn all(&self, jobs: VecDeque<Job>, lanes: NonZeroUsize) -> Result<()> {
        let side_by_side = lanes > NonZeroUsize::MIN && jobs.len() > 1;
        let jobs = Mutex::new(jobs);
        let next = || {
            let since = Instant::now();
            loop {
                let mut jobs = jobs.lock().unwrap_or_else(PoisonError::into_inner);
                if jobs.is_empty() {
                    return None;
                }
                // Whatever holds Go up, the suites say what they miss.
                let is_late = since.elapsed() > self.limit;
                if let Some(ready) = jobs.iter().position(|job| is_late || self.is_ready(job)) {
                    return jobs.remove(ready);
                }
                drop(jobs);
                std::thread::sleep(Duration::from_secs(1));
            }
        };
        let lane = || -> Result<()> {
            while let Some(Job { suite, name, mut command }) = next() {
                let name = format!("{} {name}", suite.name());
                let started = Instant::now();
                let prefix = if side_by_side { format!("{name} | ") } else { String::new() };
                let outcome = run_program(&name, &mut command, &self.logs, self.limit, &prefix)?;
                let took = started.elapsed();
                let done = Done { suite, name, command, outcome, took };
                self.done.lock().unwrap_or_else(PoisonError::into_inner).push(done);
            }
            Ok(())
        };
        std::thread::scope(|scope| {
            let others: Vec<_> = (1..lanes.get()).map(|_| scope.spawn(lane)).collect();
            let mut ended = lane();
            for other in others {
                ended = ended.and(other.join().unwrap_or_else(|_| bail!("a lane of test programs panicked")));
            }
            ended
        })
    }

    fn is_ready(&self, job: &Job) -> bool {
        let waits_for = match job.suite {
            Suite::Api => &self.servers,
            Suite::Netns if job.name.ends_with("/image") => &self.images,
            _ => return true,
        };
        waits_for.as_ref().is_none_or(JoinHandle::is_finished)
    }
}

/// Brings what the suites need, but for an API server. The object is only built where something loads it.
fn prepare(suites: &[Suite]) -> Result<Option<PathBuf>> {
    if suites.iter().any(|suite| suite.needs_root()) {
        setup::tools(&setup::WORLD)?;
    }
    if suites.contains(&Suite::Netns) {
        setup::tools(&setup::NETNS_SUITES)?;
    }
    if suites == [Suite::Unit] { Ok(None) } else { build_ebpf::object().map(Some) }
}

pub(crate) struct Built {
    pub(crate) programs: Vec<Program>,
    /// Ordinary programs that tests start: `PROXY_AGENT_BIN`, `PROXY_TESTPOD_BIN` … and where they are.
    pub(crate) binaries: BTreeMap<String, PathBuf>,
    /// The agent's library, of which its program is made.
    library: PathBuf,
}

#[derive(Deserialize)]
struct Message {
    reason: String,
    manifest_path: Option<PathBuf>,
    target: Option<Target>,
    profile: Option<Profile>,
    executable: Option<PathBuf>,
    #[serde(default)]
    filenames: Vec<PathBuf>,
}

#[derive(Deserialize)]
struct Target {
    kind: Vec<String>,
    name: String,
}

#[derive(Deserialize)]
struct Profile {
    test: bool,
}

/// Builds every test program, and the agent with them (cargo builds a crate's binaries for its integration tests).
pub(crate) fn build(object: Option<&Path>) -> Result<Built> {
    let mut cargo = command::cargo();
    cargo.args(["test", "--locked", "--no-run", "--quiet", "--message-format=json-render-diagnostics"]);
    if let Some(object) = object {
        cargo.env(build_ebpf::OBJECT_VARIABLE, object);
    }
    let text = command::output(&mut cargo)?;
    let mut built = Built { programs: Vec::new(), binaries: BTreeMap::new(), library: PathBuf::new() };
    for line in text.lines().filter(|line| line.starts_with('{')) {
        let message: Message = serde_json::from_str(line).context("cannot read cargo's messages")?;
        let Message {
            reason,
            manifest_path: Some(manifest),
            target: Some(target),
            profile: Some(profile),
            executable,
            filenames,
        } = message
        else {
            continue;
        };
        let package = manifest.parent().unwrap_or(Path::new("/")).to_owned();
        let is_library = target.name == "proxy_agent" && target.kind.iter().any(|kind| kind == "lib") && !profile.test;
        if is_library && package.starts_with(command::root()) {
            let library = filenames.into_iter().find(|file| file.extension().is_some_and(|ext| ext == "rlib"));
            built.library = library.context("cargo made no library of the agent")?;
            continue;
        }
        let (true, Some(executable)) = (reason == "compiler-artifact", executable) else { continue };
        let directory = package.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if profile.test {
            let suite = Suite::of(&target, &directory);
            built.programs.push(Program { suite, name: format!("{directory}/{}", target.name), executable, package });
        } else if target.kind.iter().any(|kind| kind == "bin") {
            let short = target.name.strip_prefix("proxy-").unwrap_or(&target.name);
            built.binaries.insert(format!("PROXY_{}_BIN", short.to_uppercase().replace('-', "_")), executable);
        }
    }
    if !built.binaries.contains_key("PROXY_AGENT_BIN") {
        bail!("cargo did not build the proxy-agent binary beside the tests");
    }
    Ok(built)
}

/// Runs one test program; all it prints goes to a log, progress and failures to the terminal, each line behind `prefix`.
fn run_program(name: &str, test: &mut Command, logs: &Path, limit: Duration, prefix: &str) -> Result<Outcome> {
    let path = logs.join(format!("{}.log", name.replace([' ', '/'], "-")));
    let mut log = fs::File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
    println!("\n== {name}");
    let mut child = test
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log.try_clone()?)
        .spawn()
        .with_context(|| format!("cannot start `{}`", command::display(test)))?;

    let stdout = child.stdout.take().context("no pipe from the test program")?;
    let (sender, lines) = mpsc::sync_channel(1024);
    // Not joined: a process that a test left behind may hold the pipe open for ever.
    std::thread::spawn(move || {
        for line in BufReader::new(stdout).split(b'\n').map_while(Result::ok) {
            if sender.send(String::from_utf8_lossy(&line).into_owned()).is_err() {
                break;
            }
        }
    });

    let mut parser = Parser::new(name);
    let (start, mut gone) = (Instant::now(), None);
    let ended = loop {
        match lines.recv_timeout(Duration::from_secs(1)) {
            Ok(line) => {
                writeln!(log, "{line}")?;
                if let Some(show) = parser.line(&line) {
                    println!("{prefix}{show}");
                }
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => break Some(child.wait()?),
            // What it printed last may still be on its way when it has ended.
            Err(mpsc::RecvTimeoutError::Timeout) if gone.is_some() => break gone,
            Err(mpsc::RecvTimeoutError::Timeout) => gone = child.try_wait()?,
        }
        if start.elapsed() > limit {
            end(&mut child)?;
            break None;
        }
    };
    let trouble = match ended {
        None => Some(format!("took longer than {} minutes and was ended", limit.as_secs() / 60)),
        Some(status) if status.success() => None,
        Some(status) => Some(format!("ended with {status}")),
    };
    let outcome = parser.finish(trouble);
    if !outcome.failures.is_empty() {
        println!("{prefix}   everything it printed: {}", path.display());
    }
    Ok(outcome)
}

fn end(child: &mut Child) -> Result<()> {
    child.kill()?;
    child.wait()?;
    Ok(())
}

/// A line of the table.
pub(crate) struct Row {
    pub(crate) name: String,
    pub(crate) outcome: Outcome,
    pub(crate) took: Duration,
}

impl Row {
    fn failed(name: &str, error: &anyhow::Error) -> Self {
        let outcome = Outcome { failures: vec![format!("{name}: {error:#}")], ..Outcome::default() };
        Self { name: name.to_owned(), outcome, took: Duration::ZERO }
    }
}

/// The table, the skips, the failures, and the line that CI reads.
pub(crate) fn report(rows: &[Row], filtered: bool, logs: &Path) -> Result<ExitCode> {
    let mut total = Outcome::default();
    println!("\n{:<12}{:>8}{:>8}{:>9}{:>9}", "suite", "passed", "failed", "skipped", "seconds");
    for Row { name, outcome, took } in rows {
        let mut outcome = outcome.clone();
        if outcome.is_empty() && !filtered {
            outcome.failures.push(format!("{name}: this suite ran no test"));
        }
        println!(
            "{name:<12}{:>8}{:>8}{:>9}{:>9.1}",
            outcome.passed,
            outcome.failures.len(),
            outcome.skips.len(),
            took.as_secs_f64()
        );
        total.add(outcome);
    }
    let allowed = allowed_skips()?;
    let mut unlisted = 0;
    if !total.skips.is_empty() {
        println!("\nskipped:");
    }
    for skip in &total.skips {
        let listed = allowed.iter().any(|allowed| skip.text.starts_with(allowed));
        unlisted += usize::from(!listed);
        println!("  {}: {}{}", skip.test, skip.text, if listed { "" } else { "   (not in tests/skips.txt)" });
    }
    let strict = command::is_ci();
    if strict && unlisted > 0 {
        // In CI a skip that nobody allowed is a failure, and counted as one.
        total.failures.push(format!("{unlisted} skipped that tests/skips.txt does not allow"));
    }
    if !total.failures.is_empty() {
        println!("\nfailed:");
    }
    for failure in &total.failures {
        println!("  {failure}");
        if let Some(reason) = total.reasons.get(failure) {
            println!("      {reason}");
        }
    }
    println!("\nlogs: {}", logs.display());
    println!("{} passed, {} failed, {} skipped", total.passed, total.failures.len(), total.skips.len());
    Ok(if total.failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Beginnings of the skip texts that CI accepts.
fn allowed_skips() -> Result<Vec<String>> {
    let path = command::root().join("tests/skips.txt");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')).map(Into::into).collect())
}
