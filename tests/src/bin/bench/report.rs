//! What was measured: a table, JSON, and for each bar whether it is met.

use std::{fmt::Write as _, fs, path::Path, process::Command};

use anyhow::Result;
use serde::Serialize;

/// Median with its extremes.
#[derive(Serialize, Clone, Copy)]
pub struct Figure {
    pub median: f64,
    pub min: f64,
    pub max: f64,
}

impl Figure {
    pub fn of(values: &[f64]) -> Self {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let n = sorted.len();
        let median = match n {
            0 => f64::NAN,
            n if n % 2 == 1 => sorted[n / 2],
            n => (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0,
        };
        Self {
            median,
            min: sorted.first().copied().unwrap_or(f64::NAN),
            max: sorted.last().copied().unwrap_or(f64::NAN),
        }
    }
}

#[derive(Serialize)]
struct Row {
    id: &'static str,
    what: String,
    unit: &'static str,
    #[serde(flatten)]
    figure: Figure,
}

#[derive(Serialize, Clone, Copy, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    Met,
    Missed,
    Inconclusive,
}

#[derive(Serialize)]
struct Bar {
    id: &'static str,
    what: String,
    bar: String,
    measured: f64,
    outcome: Outcome,
}

#[derive(Serialize)]
struct Machine {
    cpu: String,
    cpus: usize,
    kernel: String,
    load_before: String,
    load_after: String,
    commit: String,
    nft: String,
    iptables: String,
}

#[derive(Serialize)]
pub struct Report {
    tier: &'static str,
    machine: Machine,
    rows: Vec<Row>,
    bars: Vec<Bar>,
    skipped: Vec<String>,
}

fn first_line(command: &str, args: &[&str]) -> String {
    let output = Command::new(command).args(args).output().ok();
    let text = output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
    text.lines().next().unwrap_or("absent").to_owned()
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

impl Report {
    pub fn new(tier: &'static str) -> Self {
        let cpuinfo = read("/proc/cpuinfo");
        let cpu = cpuinfo.lines().find_map(|l| l.strip_prefix("model name")).unwrap_or("unknown");
        Self {
            tier,
            machine: Machine {
                cpu: cpu.trim_start_matches([' ', '\t', ':']).to_owned(),
                cpus: std::thread::available_parallelism().map_or(0, usize::from),
                kernel: read("/proc/sys/kernel/osrelease"),
                load_before: read("/proc/loadavg"),
                load_after: String::new(),
                commit: first_line("git", &["describe", "--always", "--dirty"]),
                nft: first_line("nft", &["--version"]),
                iptables: first_line("iptables", &["--version"]),
            },
            rows: Vec::new(),
            bars: Vec::new(),
            skipped: Vec::new(),
        }
    }

    pub fn row(&mut self, id: &'static str, what: impl Into<String>, unit: &'static str, figure: Figure) {
        let what = what.into();
        println!("{id}  {what}: {:.3} {unit} ({:.3} … {:.3})", figure.median, figure.min, figure.max);
        self.rows.push(Row { id, what, unit, figure });
    }

    /// A bar; `sure` is false where the control says that noise is larger than what is asked.
    pub fn bar(&mut self, id: &'static str, what: impl Into<String>, bar: Bound, measured: f64, sure: bool) {
        let holds = match bar {
            Bound::AtLeast(limit) => measured >= limit,
            Bound::AtMost(limit) => measured <= limit,
        };
        let outcome = match (sure, holds) {
            (false, _) => Outcome::Inconclusive,
            (true, true) => Outcome::Met,
            (true, false) => Outcome::Missed,
        };
        self.bars.push(Bar { id, what: what.into(), bar: bar.to_string(), measured, outcome });
    }

    pub fn skip(&mut self, what: impl Into<String>) {
        let what = what.into();
        println!("SKIP {what}");
        self.skipped.push(what);
    }

    pub fn any_missed(&self) -> bool {
        self.bars.iter().any(|bar| bar.outcome == Outcome::Missed)
    }

    fn table(&self) -> Result<String> {
        let Self { tier, machine, rows, bars, skipped } = self;
        let mut out = String::new();
        writeln!(
            out,
            "{tier} run: {} × {}, kernel {}, load {} before and {} after; {}, {}\n",
            machine.cpus,
            machine.cpu,
            machine.kernel,
            machine.load_before,
            machine.load_after,
            machine.nft,
            machine.iptables
        )?;
        writeln!(out, "| | bar | asked | measured | |\n|---|---|---|---|---|")?;
        for Bar { id, what, bar, measured, outcome } in bars {
            let outcome = match outcome {
                Outcome::Met => "met",
                Outcome::Missed => "**missed**",
                Outcome::Inconclusive => "inconclusive",
            };
            writeln!(out, "| {id} | {what} | {bar} | {measured:.3} | {outcome} |")?;
        }
        writeln!(out, "\n| | figure | median | min | max | unit |\n|---|---|---|---|---|---|")?;
        for Row { id, what, unit, figure: Figure { median, min, max } } in rows {
            writeln!(out, "| {id} | {what} | {median:.3} | {min:.3} | {max:.3} | {unit} |")?;
        }
        for what in skipped {
            writeln!(out, "\nSKIP {what}")?;
        }
        Ok(out)
    }

    pub fn write(&mut self, to: &Path) -> Result<()> {
        self.machine.load_after = read("/proc/loadavg");
        let table = self.table()?;
        fs::create_dir_all(to)?;
        fs::write(to.join(format!("{}.json", self.tier)), serde_json::to_string_pretty(self)?)?;
        fs::write(to.join(format!("{}.md", self.tier)), &table)?;
        println!("\n{table}");
        println!("written to {}/{}.{{json,md}}", to.display(), self.tier);
        Ok(())
    }
}

#[derive(Clone, Copy)]
pub enum Bound {
    AtLeast(f64),
    AtMost(f64),
}

impl std::fmt::Display for Bound {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::AtLeast(limit) => write!(f, "≥ {limit}"),
            Self::AtMost(limit) => write!(f, "≤ {limit}"),
        }
    }
}
