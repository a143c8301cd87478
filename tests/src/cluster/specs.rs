//! Upstream's specs, run against a cluster, and a table of what came of them.

use std::{
    fmt,
    fs::{self, File},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Child,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};

use super::{Cluster, kubeconfig};
use crate::apiserver::{on_path, spawn, tail};

/// What is run, built.
#[derive(Clone, Debug)]
pub struct Programs {
    pub specs: PathBuf,
    pub ginkgo: PathBuf,
}

/// Which specs, by upstream's names.
#[derive(Clone, Copy, Debug)]
pub struct Group {
    pub name: &'static str,
    focus: &'static str,
}

/// What tells of a proxy.
pub const GROUPS: [Group; 5] = [
    Group { name: "services", focus: r"\[sig-network\] Services" },
    Group { name: "conntrack", focus: r"\[sig-network\] Conntrack" },
    Group { name: "distribution", focus: r"\[sig-network\] Traffic Distribution" },
    Group { name: "slices", focus: r"\[sig-network\] EndpointSlice" },
    Group { name: "granular", focus: r"\[sig-network\] Networking Granular Checks" },
];

/// Those that stop what they do not find here, or ask for what no cluster of this kind has: other clouds, other nodes, features that
/// are off.
const SKIP: &str = r"\[Disruptive\]|\[Feature:|\[Flaky\]|\[Slow\]";

#[derive(Clone, Debug)]
pub struct Run {
    /// A regular expression over names of specs.
    pub focus: String,
    /// So many at a time.
    pub workers: u32,
    pub limit: Duration,
    /// Logs and the report go here.
    pub out: PathBuf,
}

impl Group {
    /// All of them, or those that are asked for.
    pub fn focus(names: &[String]) -> Result<String> {
        if let Some(unknown) = names.iter().find(|name| GROUPS.iter().all(|group| group.name != **name)) {
            let known = GROUPS.map(|group| group.name).join(", ");
            bail!("there is no group of specs `{unknown}`; there are {known}");
        }
        let wanted = GROUPS.iter().filter(|group| names.is_empty() || names.iter().any(|name| name == group.name));
        Ok(wanted.map(|group| group.focus).collect::<Vec<_>>().join("|"))
    }
}

/// What came of one.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Outcome {
    pub spec: String,
    pub state: State,
    pub seconds: f64,
    /// Why it failed or was skipped.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub why: String,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    Failed,
    Skipped,
    Passed,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Failed => "FAILED",
            Self::Skipped => "skipped",
            Self::Passed => "passed",
        })
    }
}

/// Failures first.
#[derive(Clone, Debug, Serialize)]
pub struct Table(Vec<Outcome>);

impl Table {
    pub fn count(&self, state: State) -> usize {
        self.0.iter().filter(|outcome| outcome.state == state).count()
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for Outcome { spec, state, seconds, why } in &self.0 {
            writeln!(f, "{state:<7} {seconds:>5.0} s  {spec}")?;
            if !why.is_empty() {
                writeln!(f, "                 {why}")?;
            }
        }
        let counts = [State::Passed, State::Failed, State::Skipped].map(|state| self.count(state));
        writeln!(f, "{} passed, {} failed, {} skipped", counts[0], counts[1], counts[2])
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Suite {
    #[serde(default)]
    spec_reports: Option<Vec<Spec>>,
}

/// As ginkgo reports it.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Spec {
    #[serde(default)]
    container_hierarchy_texts: Option<Vec<String>>,
    leaf_node_type: String,
    leaf_node_text: String,
    state: String,
    /// Nanoseconds.
    run_time: f64,
    #[serde(default)]
    failure: Failure,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Failure {
    #[serde(default)]
    message: String,
}

impl Spec {
    /// `None`: it was not asked for.
    fn outcome(self) -> Option<Outcome> {
        let Self { container_hierarchy_texts, leaf_node_type, leaf_node_text, state, run_time, failure } = self;
        let state = match state.as_str() {
            "passed" => State::Passed,
            // Passed over for its name, it has no reason.
            "skipped" | "pending" if failure.message.is_empty() => return None,
            "skipped" | "pending" => State::Skipped,
            _ => State::Failed,
        };
        // What goes on around the specs is told where it fails.
        if leaf_node_type != "It" && state != State::Failed {
            return None;
        }
        let texts = container_hierarchy_texts.unwrap_or_default().into_iter().chain([leaf_node_text]);
        let name = texts.collect::<Vec<_>>().join(" ");
        let why = failure.message.lines().map(str::trim).find(|line| !line.is_empty()).unwrap_or_default().to_owned();
        let why = if state == State::Passed { String::new() } else { why };
        let spec = if name.trim().is_empty() { leaf_node_type } else { name };
        Some(Outcome { spec, state, seconds: run_time / 1e9, why })
    }
}

fn read(report: &Path) -> Result<Table> {
    let file = File::open(report).with_context(|| format!("there is no report {}", report.display()))?;
    let suites: Vec<Suite> = serde_json::from_reader(std::io::BufReader::new(file)).context("read ginkgo's report")?;
    let specs = suites.into_iter().flat_map(|suite| suite.spec_reports.unwrap_or_default());
    let mut outcomes: Vec<Outcome> = specs.filter_map(Spec::outcome).collect();
    outcomes.sort_by(|a, b| (a.state, &a.spec).cmp(&(b.state, &b.spec)));
    Ok(Table(outcomes))
}

impl Cluster {
    /// Runs specs to their end, or to the limit, and reads what came of them.
    pub fn specs(&self, programs: &Programs, run: &Run) -> Result<Table> {
        let Run { focus, workers, limit, out } = run;
        fs::create_dir_all(out).with_context(|| format!("make {}", out.display()))?;
        // ginkgo takes a program for one of specs by the end of its name.
        let program = out.join("e2e.test");
        let _none = fs::remove_file(&program);
        symlink(&programs.specs, &program).with_context(|| format!("make {}", program.display()))?;
        let report = out.join("report.json");
        let _none = fs::remove_file(&report);
        let kubectl = on_path("kubectl").context("there is no kubectl")?;
        let mut command = self.command(&programs.ginkgo);
        command
            .arg("run")
            .arg(format!("--procs={workers}"))
            .arg(format!("--timeout={}s", limit.as_secs()))
            .arg(format!("--focus={focus}"))
            .arg(format!("--skip={SKIP}"))
            .arg("--json-report=report.json")
            .arg(format!("--output-dir={}", out.display()))
            .args(["--no-color", "--silence-skips"])
            .arg(&program)
            .arg("--")
            .arg(format!("--kubeconfig={}", kubeconfig().display()))
            .arg(format!("--kubectl-path={}", kubectl.display()))
            .arg(format!("--num-nodes={}", self.nodes.len()))
            .args(["--provider=skeleton", "--minStartupPods=0", "--dump-logs-on-failure=false"])
            .arg("--disable-log-dump=true");
        let log = out.join("ginkgo.log");
        let _none = fs::remove_file(&log);
        let mut child = spawn(command, &log)?;
        // It ends what it runs itself, and takes a while for what they leave.
        wait(&mut child, *limit + Duration::from_secs(120))?;
        let table = read(&report).with_context(|| tail(&log))?;
        fs::write(out.join("specs.json"), serde_json::to_vec_pretty(&table)?).context("write specs.json")?;
        Ok(table)
    }
}

fn wait(child: &mut Child, limit: Duration) -> Result<()> {
    let began = Instant::now();
    while child.try_wait()?.is_none() {
        if began.elapsed() > limit {
            child.kill()?;
            child.wait()?;
            return Ok(());
        }
        sleep(Duration::from_millis(500));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_read() {
        let spec = |state: &str, text: &str, message: &str| {
            serde_json::from_value::<Spec>(serde_json::json!({
                "ContainerHierarchyTexts": ["[sig-network] Services"],
                "LeafNodeType": "It",
                "LeafNodeText": text,
                "State": state,
                "RunTime": 2_500_000_000_u64,
                "Failure": {"Message": message},
            }))
            .unwrap()
            .outcome()
        };
        assert_eq!(spec("passed", "should serve", "").unwrap().state, State::Passed);
        assert_eq!(spec("timedout", "should serve", "no more").unwrap().state, State::Failed);
        assert_eq!(spec("skipped", "should serve", "needs two nodes\nmore").unwrap().why, "needs two nodes");
        assert!(spec("skipped", "should serve", "").is_none());
        assert_eq!(spec("passed", "should serve", "").unwrap().spec, "[sig-network] Services should serve");
    }

    #[test]
    fn groups_are_chosen_by_name() {
        assert_eq!(Group::focus(&["services".to_owned()]).unwrap(), r"\[sig-network\] Services");
        assert!(Group::focus(&[]).unwrap().contains("Granular"));
        assert!(Group::focus(&["nothing".to_owned()]).is_err());
    }
}
