//! `vm`: other kernels than the one that runs here.
//!
//! ```text
//! package sources ─► kernel, modules ─┐
//! cargo ─► test programs, the agent ──┼─► initramfs ─► qemu, emulating ─► serial lines ─► counted as `test` counts
//! this machine's ip, nft, sh … ───────┘
//! ```
//!
//! A guest has no disk and no network; what it says comes by serial lines: the kernel's on the first, what the tests print on the
//! second, with a line before and behind each program, what they say aside on the third. It ends itself when it is done. Nothing
//! is left but logs in `target/test-logs`, and the kernels in `target/vm`.

mod initramfs;
mod kernel;
mod machine;

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use self::{
    initramfs::Initramfs,
    kernel::Kernel,
    machine::{Heard, Machine},
};
use crate::{
    build_ebpf, command, setup,
    test::{self, Built, Outcome, Parser, Program, Row},
};

#[derive(clap::Args)]
pub struct Args {
    /// Which kernels, by series; the package sources of this machine say which there are [default: 6.1]
    #[arg(long, value_name = "SERIES")]
    kernel: Vec<String>,

    /// Only test programs whose name contains this, such as `packets`
    #[arg(long, value_name = "TEXT")]
    program: Option<String>,

    /// Only tests whose name contains this
    #[arg(long, value_name = "TEXT")]
    filter: Option<String>,

    /// The conformance table alone, all of it, with every mode that runs there
    #[arg(long, conflicts_with_all = ["program", "filter"])]
    conformance: bool,

    /// Minutes that one machine may take, from its start, before it is ended and what is missing is counted as failed [default: 10; with
    /// --conformance 90]
    #[arg(long, value_name = "MINUTES")]
    limit: Option<u64>,
}

/// It has IPVS and no TCX.
const KERNEL: &str = "6.1";

/// What runs in a guest, in this order: a test program, and which of its cases; none named are all. An emulated verifier takes ten
/// seconds for the programs of each test that loads them, so what may differ between kernels is chosen, of each kind something.
const STEPS: [(&str, &[&str]); 7] = [
    ("proxy-agent/ipvs", &[]),
    ("proxy-agent/packets", &["programs_load_and_stay_small", "what_leaves_again_never_sees_the_stack"]),
    (
        "proxy-agent/connect_time",
        &["a_pod_stays_where_it_was_sent", "connected_udp_keeps_its_backend_and_sees_the_vip"],
    ),
    ("proxy-agent/ebpf_dataplane", &["clsact_serves_where_tcx_is_missing"]),
    ("tests/kernel", &[]),
    // Everything takes a quarter of an hour: `--program tests/ipvs --filter / --limit 30`.
    (
        "tests/ipvs",
        &[
            "own/frontends are virtual servers",
            "own/A95 A96",
            "own/A104",
            "own/A135",
            "own/put back: all servers are cleared",
            "own/settings",
            "own/what is not served",
            "own/from IPVS to nftables",
            "own/cleanup",
            "SCTP: associations",
        ],
    ),
    // A choice of the table: `--conformance` asks for all of it.
    (
        "tests/conformance",
        // IPVS' turn is `--conformance` alone: beside the worlds this takes nearly twenty minutes without.
        &["conformance/ebpf socket-lb node/A77:"],
    ),
];

/// Programs of this machine that tests, or what they start, call by name.
const TOOLS: [&str; 36] = [
    "sh",
    "mount",
    "sleep",
    "cat",
    "kill",
    "timeout",
    "mkdir",
    "uname",
    "unshare",
    "nsenter",
    "setpriv",
    "ip",
    "bridge",
    "tc",
    "nft",
    "iptables",
    "ip6tables",
    "iptables-nft",
    "iptables-nft-save",
    "iptables-nft-restore",
    "ip6tables-nft",
    "ip6tables-nft-save",
    "ip6tables-nft-restore",
    "iptables-legacy",
    "iptables-legacy-save",
    "iptables-legacy-restore",
    "ip6tables-legacy",
    "ip6tables-legacy-save",
    "ip6tables-legacy-restore",
    "conntrack",
    "ethtool",
    "sysctl",
    "modprobe",
    "ls",
    "ipvsadm",
    "ipset",
];
/// Directories of libraries that programs load by name, if they are here.
const PLUGINS: [&str; 1] = ["/usr/lib/x86_64-linux-gnu/xtables"];

/// Which modules of a kernel go in.
fn wanted_module(path: &str) -> bool {
    let drivers = ["veth", "vxlan", "dummy", "tun", "ifb", "macvlan", "ipvlan", "vrf", "bonding", "geneve"];
    let driver = |path: &str| {
        drivers.iter().any(|name| path.starts_with(&format!("{name}.")) || path.starts_with(&format!("{name}/")))
    };
    match path.strip_prefix("kernel/") {
        None => false,
        Some(path) => match path.strip_prefix("drivers/net/") {
            Some(path) => driver(path),
            None => {
                ["net/", "lib/", "crypto/", "arch/x86/crypto/"].iter().any(|directory| path.starts_with(directory))
                    && ![
                        "net/wireless",
                        "net/mac80211",
                        "net/bluetooth",
                        "net/ceph",
                        "net/rds",
                        "net/tipc",
                        "net/sunrpc",
                    ]
                    .iter()
                    .any(|directory| path.starts_with(directory))
            }
        },
    }
}

/// By which who runs this chooses who is examined.
const SUBJECTS_VARIABLE: &str = "PROXY_CONFORMANCE_SUBJECTS";

/// Beginnings of the lines that are the guest's own, and no test's.
const BEGIN: &str = "@begin ";
const END: &str = "@end ";
const DONE: &str = "@done";

pub fn run(args: &Args) -> Result<ExitCode> {
    let Args { kernel: series, program, filter, conformance, limit } = args;
    let only = if *conformance {
        Only { program: Some("tests/conformance"), filter: Some("conformance/") }
    } else {
        Only { program: program.as_deref(), filter: filter.as_deref() }
    };
    let limit = limit.unwrap_or(if *conformance { 90 } else { 10 });
    let default = [KERNEL.to_owned()];
    let machines = Machines::bring(if series.is_empty() { &default } else { series })?;
    setup::tools(&setup::WORLD)?;
    setup::tools(&setup::NETNS_SUITES)?;
    let object = build_ebpf::object()?;
    let built = test::build(Some(&object))?;
    let pace = Pace { limit: Duration::from_secs(limit * 60), ..Pace::ALONE };
    let rows = machines.run(&built, &object, only, &pace)?;
    test::report(&rows, only.filter.is_some() || only.program.is_some(), &logs()?)
}

fn logs() -> Result<PathBuf> {
    let logs = command::target_dir().join("test-logs");
    fs::create_dir_all(&logs).with_context(|| format!("cannot create {}", logs.display()))?;
    Ok(logs)
}

/// How a machine shares this one.
struct Pace {
    /// Of the emulator's process.
    niceness: u8,
    /// What waits in it gets so many times as long.
    patience: u32,
    limit: Duration,
    /// Its lines among those of others are to be told apart.
    beside: bool,
}

impl Pace {
    /// Tests must not starve who else works here.
    const ALONE: Self = Self { niceness: 5, patience: 8, limit: Duration::from_secs(10 * 60), beside: false };
    /// Next to nothing beside eight others that want to run, and yet so much that it ends when they do.
    const BESIDE: Self = Self { niceness: 5, patience: 24, limit: Duration::from_secs(30 * 60), beside: true };
}

/// Of what would run in a machine.
#[derive(Clone, Copy, Default)]
struct Only<'a> {
    program: Option<&'a str>,
    filter: Option<&'a str>,
}

/// Kernels to run tests with.
pub(crate) struct Machines(Vec<(String, Kernel)>);

impl Machines {
    /// Brings kernels, and what emulates a machine for them.
    pub(crate) fn bring(series: &[String]) -> Result<Self> {
        if !series.is_empty() {
            kernel::suits_this_machine()?;
            setup::tools(&setup::VM)?;
        }
        series.iter().map(|series| Ok((series.clone(), kernel::bring(series)?))).collect::<Result<_>>().map(Self)
    }

    /// What there is to run in them, while other suites run here.
    pub(crate) fn beside(&self, built: &Built, object: Option<&Path>) -> Result<Vec<Row>> {
        match object {
            Some(object) => self.run(built, object, Only::default(), &Pace::BESIDE),
            None if self.0.is_empty() => Ok(Vec::new()),
            None => bail!("the pure tests alone give a machine nothing to do: no --vm with them"),
        }
    }

    fn run(&self, built: &Built, object: &Path, only: Only<'_>, pace: &Pace) -> Result<Vec<Row>> {
        let logs = logs()?;
        let mut rows = Vec::new();
        for (series, kernel) in &self.0 {
            let steps = steps(built, only)?;
            let archive = command::target_dir().join(format!("vm/initramfs-{series}.cpio"));
            pack(kernel, built, object, &steps, pace)?.write(&archive)?;
            rows.extend(boot(series, kernel, &archive, &steps, &logs, pace)?);
            fs::remove_file(&archive).with_context(|| format!("cannot remove {}", archive.display()))?;
        }
        Ok(rows)
    }
}

struct Step<'a> {
    program: &'a Program,
    /// By names, or parts of them; none are all.
    cases: Vec<String>,
    /// Nobody promised that it has such tests.
    may_be_idle: bool,
}

fn steps<'a>(built: &'a Built, Only { program: only, filter }: Only<'_>) -> Result<Vec<Step<'a>>> {
    let step = |(name, cases): (&str, &[&str])| {
        let program = built.programs.iter().find(|program| program.name == name);
        let cases: Vec<String> =
            filter.map_or_else(|| cases.iter().map(|case| (*case).to_owned()).collect(), |only| vec![only.to_owned()]);
        let program = program.with_context(|| format!("cargo built no test program {name}"))?;
        Ok(Step { program, cases, may_be_idle: filter.is_some() })
    };
    STEPS.into_iter().filter(|(name, _)| only.is_none_or(|only| name.contains(only))).map(step).collect()
}

/// All that the guest needs.
fn pack(kernel: &Kernel, built: &Built, object: &Path, steps: &[Step<'_>], pace: &Pace) -> Result<Initramfs> {
    let mut guest = Initramfs::new();
    for at in ["/proc", "/sys", "/run", "/tmp", "/etc", "/root"] {
        guest.directory(Path::new(at));
    }
    for tool in TOOLS {
        guest.tool(tool)?;
    }
    for directory in PLUGINS.map(Path::new).into_iter().filter(|directory| directory.is_dir()) {
        guest.tree(directory, directory)?;
    }
    let stripped = command::target_dir().join("vm/stripped");
    for program in steps.iter().map(|step| &step.program.executable).chain(built.binaries.values()) {
        guest.built(program, &stripped)?;
    }
    guest.file(object, object, 0o644);
    for step in steps {
        guest.directory(&step.program.package);
    }
    guest.tree(Path::new("/lib/modules"), &kernel.tree.join("lib/modules"))?;
    guest.text("/init", init(built, object, steps, pace), 0o755);
    Ok(guest)
}

/// The guest's first process. Nothing is mounted on /tmp: what it runs may have been built below it.
fn init(built: &Built, object: &Path, steps: &[Step<'_>], pace: &Pace) -> String {
    let mut text = String::from(
        "#!/bin/sh\n\
         export PATH=/usr/sbin:/usr/bin HOME=/root NO_COLOR=1 CI=true PROXY_CONFORMANCE_FILES=1\n\
         mount -t proc proc /proc\n\
         mount -t sysfs sysfs /sys\n\
         mount -t devtmpfs devtmpfs /dev\n\
         mount -t tmpfs tmpfs /run\n\
         mount -t cgroup2 cgroup2 /sys/fs/cgroup\n\
         mount -t bpf bpf /sys/fs/bpf\n\
         exec </dev/null >/dev/ttyS1 2>/dev/ttyS2\n\
         ip link set lo up\n",
    );
    let _ = writeln!(text, "export PROXY_TESTS_SLOWER={}", pace.patience);
    let environment = [(build_ebpf::OBJECT_VARIABLE, object)];
    if let Ok(subjects) = std::env::var(SUBJECTS_VARIABLE) {
        let _ = writeln!(text, "export {SUBJECTS_VARIABLE}={}", quoted(&subjects));
    }
    let programs = built.binaries.iter().map(|(name, path)| (name.as_str(), path.as_path()));
    for (name, path) in environment.into_iter().chain(programs) {
        let _ = writeln!(text, "export {name}={}", quoted(&path.to_string_lossy()));
    }
    for (number, Step { program, cases, .. }) in steps.iter().enumerate() {
        let directory = quoted(&program.package.to_string_lossy());
        let words: Vec<String> = cases.iter().map(|case| quoted(case)).collect();
        let executable = quoted(&program.executable.to_string_lossy());
        let _ = write!(
            text,
            "echo '{BEGIN}{number}'\n\
             cd {directory}\n\
             CARGO_MANIFEST_DIR={directory} {executable} --show-output --color=never --test-threads=1 {}\n\
             printf '\\n{END}%s\\n' $?\n",
            words.join(" ")
        );
    }
    // The machine was told not to start again.
    let _ = write!(text, "echo '{DONE}'\nsleep 1\necho b >/proc/sysrq-trigger\nsleep 60\n");
    text
}

/// As one word of a shell's.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', "'\\''"))
}

/// Starts a machine and counts what its programs say.
fn boot(
    series: &str,
    kernel: &Kernel,
    archive: &Path,
    steps: &[Step<'_>],
    logs: &Path,
    pace: &Pace,
) -> Result<Vec<Row>> {
    let limit = pace.limit;
    let prefix = if pace.beside { format!("vm {series} | ") } else { String::new() };
    let console = logs.join(format!("vm-{series}-console.log"));
    let mut log = fs::File::create(logs.join(format!("vm-{series}.log"))).context("cannot create a log")?;
    println!("\n== vm {series}: {}", kernel.release);
    let start = Instant::now();
    let errors = logs.join(format!("vm-{series}-errors.log"));
    let mut machine = Machine::start(kernel, archive, pace.niceness, &console, &errors)?;
    let mut account = Account::new(series, steps, &prefix);
    let trouble = loop {
        if start.elapsed() > limit {
            break Some(format!("took longer than {} minutes and was ended", limit.as_secs() / 60));
        }
        let line = match machine.listen() {
            Heard::Line(line) => line,
            Heard::Silence => continue,
            Heard::End => break Some("ended before its time".to_owned()),
        };
        writeln!(log, "{line}")?;
        if line == DONE {
            break None;
        }
        account.line(&line);
    };
    drop(machine);
    if let Some(trouble) = &trouble {
        println!(
            "{prefix}the machine {trouble}; its kernel's last words ({}):\n{}",
            console.display(),
            machine::last_words(&console)
        );
    }
    println!("{prefix}vm {series}: {:.0} s", start.elapsed().as_secs_f64());
    Ok(account.close(trouble.as_deref().unwrap_or("was done without it")))
}

/// What a machine's programs have said so far.
struct Account<'a> {
    series: &'a str,
    steps: &'a [Step<'a>],
    prefix: &'a str,
    rows: BTreeMap<String, (Outcome, Duration)>,
    start: Instant,
    running: Option<(usize, Parser, Instant)>,
    /// Of the cases that were chosen, those that nothing was heard of.
    unseen: Vec<&'a String>,
    /// The step that begins next.
    next: usize,
}

impl<'a> Account<'a> {
    fn new(series: &'a str, steps: &'a [Step<'a>], prefix: &'a str) -> Self {
        let (rows, running, unseen) = (BTreeMap::new(), None, Vec::new());
        Self { series, steps, prefix, rows, start: Instant::now(), running, unseen, next: 0 }
    }

    fn line(&mut self, line: &str) {
        if line.starts_with(BEGIN) {
            self.end(Some("ended without a status"));
            let (name, since) = (self.name(self.next), self.start.elapsed().as_secs_f64());
            println!("{}-- {name} ({since:.0} s since the start)", self.prefix);
            self.running = Some((self.next, Parser::new(&format!("vm {} {name}", self.series)), Instant::now()));
            self.unseen = self.steps.get(self.next).map_or(&[][..], |step| &step.cases).iter().collect();
            self.next += 1;
        } else if let Some(status) = line.strip_prefix(END) {
            let trouble = (status != "0").then(|| format!("ended with status {status}"));
            self.end(trouble.as_deref());
        } else if let Some((_, parser, _)) = &mut self.running {
            self.unseen.retain(|case| !line.contains(case.as_str()));
            if let Some(show) = parser.line(line) {
                println!("{}{show}", self.prefix);
            }
        }
    }

    fn name(&self, step: usize) -> &'a str {
        self.steps.get(step).map_or("", |step| &step.program.name)
    }

    /// The program that runs, if one does, is over.
    fn end(&mut self, trouble: Option<&str>) {
        let Some((step, parser, since)) = self.running.take() else { return };
        let mut outcome = parser.finish(trouble.map(str::to_owned));
        let what = format!("vm {} {}", self.series, self.name(step));
        // What the machine here cannot run is what this one is for.
        outcome.failures.extend(outcome.skips.drain(..).map(|skip| format!("{what}: skipped {}", skip.text)));
        if self.steps.get(step).is_some_and(|step| !step.may_be_idle) {
            outcome.failures.extend(self.unseen.drain(..).map(|case| format!("{what}: it has no test {case:?}")));
            if outcome.is_empty() {
                outcome.failures.push(format!("{what}: it ran no test"));
            }
        }
        self.add(step, outcome, since.elapsed());
    }

    fn add(&mut self, step: usize, outcome: Outcome, took: Duration) {
        let suite = self.steps.get(step).map_or("", |step| step.program.suite.name());
        let (sum, time) = self.rows.entry(format!("{} {suite}", self.series)).or_default();
        sum.add(outcome);
        *time += took;
    }

    /// What did not come to its turn or its end has failed, too.
    fn close(mut self, trouble: &str) -> Vec<Row> {
        self.end(Some(trouble));
        for step in self.next..self.steps.len() {
            let failures = vec![format!("vm {} {}: the machine {trouble}", self.series, self.name(step))];
            self.add(step, Outcome { failures, ..Outcome::default() }, Duration::ZERO);
        }
        self.rows.into_iter().map(|(name, (outcome, took))| Row { name, outcome, took }).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test::Suite;

    fn heard(lines: &[&str], may_be_idle: bool) -> Outcome {
        let program = Program {
            suite: Suite::Prog,
            name: "agent/packets".into(),
            executable: "/packets".into(),
            package: "/".into(),
        };
        let step = |case: &str| Step { program: &program, cases: vec![case.to_owned()], may_be_idle };
        let steps = [step("one"), step("two")];
        let mut account = Account::new("6.1", &steps, "vm 6.1 | ");
        lines.iter().for_each(|line| account.line(line));
        let rows = account.close("was ended");
        assert_eq!(rows.len(), 1);
        rows.into_iter().next().unwrap().outcome
    }

    #[test]
    fn what_a_machine_says_is_counted() {
        let one = ["@begin 0", "test a::one ... ok", "test result: ok. 1 passed; 0 failed", "@end 0"];
        let two = ["@begin 1", "test a::two ... ok", "test result: ok. 1 passed; 0 failed", "@end 0"];
        let all = heard(&[one, two].concat(), false);
        assert_eq!((all.passed, all.failures.len()), (2, 0), "{all:?}");
        // It died in the middle of a line, and the next one began; or nothing did any more.
        for rest in [&two[..], &[]] {
            let died = heard(&[&["@begin 0", "test a::one ... @end 139"], rest].concat(), false);
            assert!(
                died.failures.iter().any(|failure| failure.contains("without a status") || rest.is_empty()),
                "{died:?}"
            );
            assert!(!died.failures.is_empty());
        }
        // Told by its status alone.
        assert!(!heard(&[&one[..2], &["", "@end 139"], &two].concat(), false).failures.is_empty());
    }

    #[test]
    fn what_a_machine_did_not_run_has_failed() {
        let one = ["@begin 0", "test a::one ... ok", "test result: ok. 1 passed; 0 failed", "@end 0"];
        let never = heard(&one, false);
        assert!(never.failures.iter().any(|failure| failure.ends_with("the machine was ended")), "{never:?}");
        let other = ["@begin 1", "test a::three ... ok", "test result: ok. 1 passed; 0 failed", "@end 0"];
        let renamed = heard(&[one, other].concat(), false);
        assert!(renamed.failures.iter().any(|failure| failure.ends_with("it has no test \"two\"")), "{renamed:?}");
        assert!(heard(&[one, other].concat(), true).failures.is_empty());
        let skips =
            ["@begin 1", "SKIP two: no IPVS", "test two ... ok", "test result: ok. 1 passed; 0 failed", "@end 0"];
        let skipped = heard(&[&one[..], &skips].concat(), false);
        assert!(skipped.failures.iter().any(|failure| failure.contains("skipped two: no IPVS")), "{skipped:?}");
    }

    #[test]
    fn modules_are_chosen_by_their_place() {
        for wanted in [
            "kernel/net/netfilter/ipvs/ip_vs.ko",
            "kernel/net/sched/cls_bpf.ko.xz",
            "kernel/drivers/net/veth.ko.xz",
            "kernel/drivers/net/vxlan/vxlan.ko",
            "kernel/lib/libcrc32c.ko",
        ] {
            assert!(wanted_module(wanted), "{wanted}");
        }
        for other in ["kernel/drivers/net/ethernet/intel/e1000/e1000.ko", "kernel/fs/xfs/xfs.ko", "modules.dep"] {
            assert!(!wanted_module(other), "{other}");
        }
    }

    #[test]
    fn words_stay_words() {
        assert_eq!(quoted("a b"), "'a b'");
        assert_eq!(quoted("it's"), "'it'\\''s'");
    }
}
