//! One table of cases for our dataplanes and for kube-proxy: who answers, who refuses, who is silent, and whose source is seen.
//!
//! `PROXY_CONFORMANCE_SUBJECTS` chooses subjects by a part of their names, separated by commas. With `PROXY_CONFORMANCE_FILES` there is
//! neither API server nor kube-proxy: our agents read files.

use std::{
    collections::{BTreeMap, BTreeSet},
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};
use proxy_tests::{
    apiserver,
    conformance::{
        changes::CHANGES,
        judge::{self, Judge, Sum, Verdict},
        lab::{Lab, Means},
        objects::Objects,
        random::{self, Answers},
        services::{self, FIRST, SERVICES, Service},
        subject::{self, Subject},
        table::{self, Configuration, MATRICES},
    },
    suite::Suite,
    world::{World, cleanup_on_signals},
};

fn main() -> ExitCode {
    let mut suite = Suite::new("conformance");
    let Some(programs) = suite.programs() else { return suite.finish() };
    let means = match means() {
        Ok(means) => means,
        Err(reason) => {
            suite.skip("conformance", &format!("{reason:#}"));
            return suite.finish();
        }
    };
    let examined = cleanup_on_signals()
        .and_then(|()| World::sweep())
        .and_then(|_| Lab::new(programs, means))
        .and_then(|mut lab| examine_all(&mut suite, &mut lab));
    if let Err(error) = examined {
        suite.fail("preparation", &error);
    }
    suite.finish()
}

fn means() -> Result<Means> {
    if std::env::var_os("PROXY_CONFORMANCE_FILES").is_some() {
        return Ok(Means::None);
    }
    Ok(Means::Upstream { servers: apiserver::Programs::find()?, kube_proxy: subject::kube_proxy()? })
}

/// What everybody is asked.
struct Questions {
    services: Vec<Service>,
    made_up: Vec<Service>,
    judge: Judge,
}

fn examine_all(suite: &mut Suite, lab: &mut Lab) -> Result<()> {
    let judge = judge::judge()?;
    let seeds = random::seeds()?;
    // `cargo xtask` shows lines that begin so. One that found something is asked again by `PROXY_CONFORMANCE_SEEDS`.
    println!("sum  seeds of made-up Services: {seeds:?}");
    let questions =
        Questions { services: services::parse(SERVICES, FIRST)?, made_up: random::services(&seeds)?, judge };
    lab.install(questions.services.iter().chain(&questions.made_up))?;
    let chosen = std::env::var("PROXY_CONFORMANCE_SUBJECTS").unwrap_or_default();
    let mut sums = Vec::new();
    let mut answers = Vec::new();
    for subject in Subject::ALL {
        if !chosen.split(',').any(|part| subject.name().contains(part)) {
            continue;
        }
        let group = format!("conformance/{}", subject.name());
        let files = matches!(lab.objects, Objects::Files(_));
        // Who is asked about a made-up Service alone is compared with kube-proxy all the same.
        let compared = matches!(subject, Subject::KubeProxy(_)) && suite.names(random::NAME);
        if !suite.wants_group(&group) && !compared || files && !subject.reads_files() {
            continue;
        }
        if let Some(reason) = subject.unavailable() {
            suite.skip(&group, reason);
            sums.push((subject, Sum { skipped: 1, ..Sum::default() }, Duration::ZERO));
            continue;
        }
        let started = Instant::now();
        let mut exam = Exam { suite, subject, sum: Sum::default(), asked: BTreeSet::new(), in_part: false };
        match exam.all(lab, &questions, &answers) {
            Ok(heard) => answers.push((subject, heard)),
            Err(error) => exam.failed(&error.context(lab.logs())),
        }
        let sum = exam.sum;
        lab.stop()?;
        sums.push((subject, sum, started.elapsed()));
    }
    println!("sum  {:<22}{:>8}{:>8}{:>11}{:>9}{:>9}", "subject", "passed", "failed", "deviating", "skipped", "seconds");
    for (subject, sum, took) in sums {
        let Sum { passed, failed, deviating, skipped } = sum;
        let took = took.as_secs_f64();
        println!("sum  {:<22}{passed:>8}{failed:>8}{deviating:>11}{skipped:>9}{took:>9.1}", subject.name());
    }
    Ok(())
}

/// What stands for all questions about them.
const MADE_UP: &str = "made-up Services";

/// The turn of one subject.
struct Exam<'a> {
    suite: &'a mut Suite,
    subject: Subject,
    sum: Sum,
    asked: BTreeSet<String>,
    /// Not all cases are wanted.
    in_part: bool,
}

impl Exam<'_> {
    /// Returns what it answered about Services that are made up.
    fn all(&mut self, lab: &mut Lab, questions: &Questions, others: &[(Subject, Answers)]) -> Result<Answers> {
        let Questions { services, made_up, judge } = questions;
        let mut answers = Answers::new();
        for matrix in &MATRICES {
            let base = matrix.configuration == Configuration::BASE;
            let mut cases = matrix.cases()?;
            let mut changes = Vec::new();
            if base {
                cases.extend(table::cases(services)?);
                changes.extend(CHANGES);
            }
            cases.retain(|case| self.wants(&case.name));
            changes.retain(|(name, _)| self.wants(name));
            let with_made_up = base && (self.wants(MADE_UP) || self.suite.names(random::NAME));
            if cases.is_empty() && changes.is_empty() && !with_made_up {
                continue;
            }
            lab.start(self.subject, matrix.configuration)?;
            let failed = self.sum.failed;
            for (case, seen) in cases.iter().zip(lab.ask_all(&cases, services)?) {
                let wanted = format!("expected {}, but ", case.expected.text());
                self.note(&case.name, &wanted, judge.verdict(self.subject, &case.name, &seen));
            }
            if self.sum.failed > failed {
                counters(self.subject, &lab.world);
            }
            if with_made_up {
                answers = self.made_up(lab, judge, made_up, others)?;
            }
            for (name, change) in changes {
                let seen: Vec<String> = change(lab).err().map(|error| format!("{error:#}")).into_iter().collect();
                self.note(name, "", judge.verdict(self.subject, name, &seen));
            }
            if base {
                self.subject.check(&lab.world, services)?;
            }
            lab.stop()?;
        }
        if !self.in_part
            && let unknown @ [_, ..] = &judge.unknown(self.subject, &self.asked)[..]
        {
            bail!("docs/conformance.md lists deviations of no case: {unknown:?}");
        }
        Ok(answers)
    }

    fn wants(&mut self, case: &str) -> bool {
        let wants = self.suite.wants(&format!("conformance/{}/{case}", self.subject.name()));
        self.in_part |= !wants;
        wants
    }

    fn made_up(
        &mut self,
        lab: &Lab,
        judge: &Judge,
        services: &[Service],
        others: &[(Subject, Answers)],
    ) -> Result<Answers> {
        let answers = random::ask(lab, services)?;
        let agreed = random::agreed(others);
        if self.subject.is_agent() {
            if agreed.is_empty() && matches!(lab.objects, Objects::Served(_)) {
                self.suite.skip(MADE_UP, "kube-proxy was not asked, so there is nothing to compare with");
                self.sum.skipped += 1;
            }
            let differences: BTreeMap<_, _> =
                random::differences(self.subject, &answers, &agreed, services).into_iter().collect();
            for key in agreed.keys() {
                let seen: Vec<String> = differences.get(key).cloned().into_iter().collect();
                self.note(key, "", judge.verdict(self.subject, key, &seen));
            }
        }
        Ok(answers)
    }

    fn note(&mut self, case: &str, wanted: &str, verdict: Verdict) {
        self.sum.add(&verdict);
        self.asked.insert(case.to_owned());
        let name = format!("conformance/{}/{case}", self.subject.name());
        match verdict {
            Verdict::Passed | Verdict::Deviates => self.suite.case(&name, || Ok(())),
            Verdict::Failed(why) => self.suite.case(&name, || bail!("{wanted}{why}")),
        }
    }

    fn failed(&mut self, error: &anyhow::Error) {
        self.suite.fail(&format!("conformance/{}", self.subject.name()), error);
        self.sum.failed += 1;
    }
}

/// What was refused, dropped and reset so far, into the log beside what failed.
fn counters(subject: Subject, world: &World) {
    for node in world.nodes.iter().filter(|_| subject.is_ebpf()) {
        match world.cli(node, &["counters"]) {
            Ok(text) => eprintln!("counters of {}:\n{text}", node.place.name),
            Err(error) => eprintln!("counters of {}: {error:#}", node.place.name),
        }
    }
    if subject.is_ebpf() {
        return;
    }
    // Who has sent resets, and whether conntrack took packets for invalid: those are translated by nobody, and reset by the node.
    for place in world.nodes.iter().map(|node| &node.place).chain(world.pods()) {
        let says = |program: &str, args: &[&str], wanted: &str| {
            let said = place.namespace.output(program, args).unwrap_or_else(|error| format!("{error:#}"));
            let lines = said.lines().filter(|line| line.contains(wanted));
            lines.map(|line| format!("\n  {line}")).collect::<String>()
        };
        let resets = says("grep", &["-h", "^Tcp:", "/proc/net/snmp"], "Tcp:");
        let invalid = if place.is_node() { says("conntrack", &["-S"], "invalid=") } else { String::new() };
        eprintln!("{}:{resets}{invalid}", place.name);
    }
}
