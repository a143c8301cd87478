//! One table of cases for our dataplanes and for kube-proxy: who answers, who refuses, who is silent, and whose source is seen.
//!
//! `PROXY_CONFORMANCE_SUBJECTS` chooses subjects by a part of their names, separated by commas.

use std::{collections::BTreeMap, process::ExitCode, time::Instant};

use anyhow::{Result, bail};
use proxy_tests::{
    apiserver,
    conformance::{
        judge::{self, Judge, Sum, Verdict},
        lab::Lab,
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
    let (servers, kube_proxy) =
        match apiserver::Programs::find().and_then(|servers| Ok((servers, subject::kube_proxy()?))) {
            Ok(found) => found,
            Err(reason) => {
                suite.skip("conformance", &format!("{reason:#}"));
                return suite.finish();
            }
        };
    let examined = cleanup_on_signals()
        .and_then(|()| World::sweep())
        .and_then(|_| Lab::new(programs, servers, kube_proxy))
        .and_then(|mut lab| examine_all(&mut suite, &mut lab));
    if let Err(error) = examined {
        suite.fail("preparation", &error);
    }
    suite.finish()
}

fn examine_all(suite: &mut Suite, lab: &mut Lab) -> Result<()> {
    let judge = judge::judge()?;
    let services = services::parse(SERVICES, FIRST)?;
    lab.install(&services)?;
    let chosen = std::env::var("PROXY_CONFORMANCE_SUBJECTS").unwrap_or_default();
    let mut sums = Vec::new();
    for subject in Subject::ALL {
        if !chosen.split(',').any(|part| subject.name().contains(part)) {
            continue;
        }
        let started = Instant::now();
        let mut sum = Sum::default();
        if let Err(error) = examine(suite, lab, &judge, subject, &services, &mut sum) {
            suite.fail(subject.name(), &error.context(lab.logs()));
            sum.failed += 1;
        }
        lab.stop()?;
        sums.push((subject, sum, started.elapsed()));
    }
    println!("\n{:<22}{:>8}{:>8}{:>9}{:>11}{:>9}", "subject", "passed", "failed", "skipped", "deviating", "seconds");
    for (subject, sum, took) in sums {
        let Sum { passed, failed, skipped, deviating } = sum;
        println!("{:<22}{passed:>8}{failed:>8}{skipped:>9}{deviating:>11}{:>9.1}", subject.name(), took.as_secs_f64());
    }
    println!();
    Ok(())
}

fn examine(
    suite: &mut Suite,
    lab: &mut Lab,
    judge: &Judge,
    subject: Subject,
    services: &[Service],
    sum: &mut Sum,
) -> Result<()> {
    let mut not_yet: BTreeMap<&str, usize> = BTreeMap::new();
    for matrix in &MATRICES {
        let configuration = matrix.configuration;
        lab.start(subject, configuration)?;
        let mut cases = matrix.cases()?;
        if configuration == Configuration::BASE {
            cases.extend(table::cases(services)?);
        }
        for (case, seen) in cases.iter().zip(lab.ask_all(&cases, services)?) {
            let verdict = judge.verdict(subject, &case.name, &seen);
            sum.add(&verdict);
            let name = format!("conformance/{}/{}", subject.name(), case.name);
            match verdict {
                Verdict::Passed | Verdict::Deviates => suite.case(&name, || Ok(())),
                Verdict::NotYet(reason) => *not_yet.entry(reason).or_default() += 1,
                Verdict::Failed(why) => {
                    suite.case(&name, || bail!("expected {}, but {why}", case.expected.text()));
                }
            }
        }
        lab.stop()?;
    }
    for (reason, count) in not_yet {
        suite.skip("not yet", &format!("{}: {reason}: {count} cases", subject.name()));
    }
    Ok(())
}
