//! `test`: every suite, summed up.
//!
//! One `cargo test --no-run` builds all test programs and the agent itself in one profile; they are then run one by one
//! from here, so that each suite gets what it needs (root, one thread) and what they print can be counted. A skip is never
//! a pass: a test that prints a line `SKIP <what>: <why>` counts as skipped, and in CI only skips listed in
//! `tests/skips.txt` are accepted.

mod libtest;

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead as _, BufReader, Write as _},
    path::{Path, PathBuf},
    process::{Child, Command, ExitCode, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use serde::Deserialize;

use self::libtest::{Outcome, Parser};
use crate::{build_ebpf, command, setup};

#[derive(clap::Args)]
pub struct Args {
    /// Which suite
    #[arg(value_enum, default_value_t = Selection::All)]
    suite: Selection,

    /// Only tests whose name contains this
    #[arg(long, value_name = "TEXT")]
    filter: Option<String>,

    /// Minutes that one test program may take before it is ended and counted as failed
    #[arg(long, value_name = "MINUTES", default_value_t = 15)]
    limit: u64,
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
enum Suite {
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

    fn name(self) -> &'static str {
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

/// A test program that cargo built.
struct Program {
    suite: Suite,
    name: String,
    executable: PathBuf,
    /// Directory of its crate: where cargo would have started it.
    package: PathBuf,
}

pub fn run(args: &Args) -> Result<ExitCode> {
    let Args { suite: selection, filter, limit } = args;
    let suites: Vec<Suite> = Suite::ALL.into_iter().filter(|suite| suite.is_selected(*selection)).collect();
    let object = prepare(&suites)?;
    let Built { mut programs, binaries } = build(object.as_deref())?;
    programs.retain(|program| suites.contains(&program.suite));
    programs.sort_by(|a, b| (a.suite, &a.name).cmp(&(b.suite, &b.name)));

    let logs = command::target_dir().join("test-logs");
    fs::create_dir_all(&logs).with_context(|| format!("cannot create {}", logs.display()))?;
    let limit = Duration::from_secs(limit * 60);
    let mut sums: BTreeMap<Suite, (Outcome, Duration)> =
        suites.iter().map(|suite| (*suite, Default::default())).collect();
    let mut add = |suite: Suite, outcome: Outcome, took: Duration| {
        let (sum, time) = sums.entry(suite).or_default();
        sum.add(outcome);
        *time += took;
    };

    for program in &programs {
        let mut test = if program.suite.needs_root() {
            command::as_root(&program.executable, &format!("the {} suite", program.suite.name()))?
        } else {
            command::command(&program.executable)
        };
        test.args(["--show-output", "--color=never"]).args(filter);
        if program.suite.needs_root() {
            // Worlds share the kernel's maps, cgroups and CPUs: side by side they would only measure each other.
            test.arg("--test-threads=1");
        }
        test.current_dir(&program.package).env("CARGO_MANIFEST_DIR", &program.package);
        test.envs(&binaries);
        if let Some(object) = &object {
            test.env(build_ebpf::OBJECT_VARIABLE, object);
        }
        let name = format!("{} {}", program.suite.name(), program.name);
        let start = Instant::now();
        let outcome = run_program(&name, test, &logs, limit)?;
        add(program.suite, outcome, start.elapsed());
    }
    if suites.contains(&Suite::Unit) {
        // The same packages as above, so that cargo unifies the same features and builds nothing twice.
        let mut doc = command::cargo();
        doc.args(["test", "--locked", "--quiet", "--doc"]);
        if let Some(object) = &object {
            doc.env(build_ebpf::OBJECT_VARIABLE, object);
        }
        doc.args(["--", "--show-output", "--color=never"]).args(filter);
        let start = Instant::now();
        let outcome = run_program("unit doc", doc, &logs, limit)?;
        add(Suite::Unit, outcome, start.elapsed());
    }
    report(&sums, filter.is_some(), &logs)
}

/// Brings what the suites need. The object is only built where something loads it.
fn prepare(suites: &[Suite]) -> Result<Option<PathBuf>> {
    if suites.iter().any(|suite| suite.needs_root()) {
        setup::tools(&setup::WORLD)?;
    }
    if suites.contains(&Suite::Netns) {
        setup::tools(&setup::NETNS_SUITES)?;
    }
    if suites.contains(&Suite::Api) {
        setup::api_server()?;
    }
    if suites == [Suite::Unit] { Ok(None) } else { build_ebpf::object().map(Some) }
}

struct Built {
    programs: Vec<Program>,
    /// Ordinary programs that tests start: `PROXY_AGENT_BIN`, `PROXY_TESTPOD_BIN` … and where they are.
    binaries: BTreeMap<String, PathBuf>,
}

#[derive(Deserialize)]
struct Message {
    reason: String,
    manifest_path: Option<PathBuf>,
    target: Option<Target>,
    profile: Option<Profile>,
    executable: Option<PathBuf>,
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
fn build(object: Option<&Path>) -> Result<Built> {
    let mut cargo = command::cargo();
    cargo.args(["test", "--locked", "--no-run", "--quiet", "--message-format=json-render-diagnostics"]);
    if let Some(object) = object {
        cargo.env(build_ebpf::OBJECT_VARIABLE, object);
    }
    let text = command::output(&mut cargo)?;
    let mut built = Built { programs: Vec::new(), binaries: BTreeMap::new() };
    for line in text.lines().filter(|line| line.starts_with('{')) {
        let message: Message = serde_json::from_str(line).context("cannot read cargo's messages")?;
        let Message { reason, manifest_path: Some(manifest), target: Some(target), profile: Some(profile), executable } =
            message
        else {
            continue;
        };
        let (true, Some(executable)) = (reason == "compiler-artifact", executable) else { continue };
        let package = manifest.parent().unwrap_or(Path::new("/")).to_owned();
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

/// Runs one test program; all it prints goes to a log, progress and failures to the terminal.
fn run_program(name: &str, mut test: Command, logs: &Path, limit: Duration) -> Result<Outcome> {
    let path = logs.join(format!("{}.log", name.replace([' ', '/'], "-")));
    let mut log = fs::File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
    println!("\n== {name}");
    let mut child = test
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log.try_clone()?)
        .spawn()
        .with_context(|| format!("cannot start `{}`", command::display(&test)))?;

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
    let start = Instant::now();
    let ended = loop {
        match lines.recv_timeout(Duration::from_millis(500)) {
            Ok(line) => {
                writeln!(log, "{line}")?;
                if let Some(show) = parser.line(&line) {
                    println!("{show}");
                }
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => break Some(child.wait()?),
            Err(mpsc::RecvTimeoutError::Timeout) => {
                if let Some(status) = child.try_wait()? {
                    break Some(status);
                }
            }
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
        println!("   everything it printed: {}", path.display());
    }
    Ok(outcome)
}

fn end(child: &mut Child) -> Result<()> {
    child.kill()?;
    child.wait()?;
    Ok(())
}

/// The table, the skips, the failures, and the line that CI reads.
fn report(sums: &BTreeMap<Suite, (Outcome, Duration)>, filtered: bool, logs: &Path) -> Result<ExitCode> {
    let mut total = Outcome::default();
    println!("\n{:<8}{:>8}{:>8}{:>9}{:>9}", "suite", "passed", "failed", "skipped", "seconds");
    for (suite, (outcome, took)) in sums {
        let mut outcome = outcome.clone();
        if outcome.is_empty() && !filtered {
            outcome.failures.push(format!("{}: this suite ran no test", suite.name()));
        }
        println!(
            "{:<8}{:>8}{:>8}{:>9}{:>9.1}",
            suite.name(),
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
