//! How each case went: passed, failed, skipped, or deviating for a reason that `docs/conformance.md` gives.

use std::collections::BTreeSet;

use anyhow::{Context, Result, bail};

use super::subject::Subject;

/// The table of deviations is read out of the document that people read.
const DOCUMENT: &str = include_str!("../../../docs/conformance.md");

/// One line of the document's table.
#[derive(Debug)]
struct Deviation {
    subject: String,
    case: String,
    seen: String,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Verdict {
    Passed,
    /// As the document says.
    Deviates,
    Failed(String),
}

pub struct Judge {
    deviations: Vec<Deviation>,
}

impl Judge {
    pub fn new() -> Result<Self> {
        let mut deviations = Vec::new();
        let rows = DOCUMENT.lines().skip_while(|line| !line.starts_with("| subject |")).skip(2);
        for row in rows.take_while(|line| line.starts_with('|')) {
            // Cells have no `|` of their own but for that of an answer, which has no blanks round it.
            let cells: Vec<&str> = row.trim_matches('|').split(" | ").map(str::trim).collect();
            let [subject, case, seen, why] = cells[..] else { bail!("docs/conformance.md: {row}") };
            if why.is_empty() {
                bail!("docs/conformance.md: no reason: {row}");
            }
            let plain = |text: &str| text.trim_matches('`').to_owned();
            deviations.push(Deviation { subject: plain(subject), case: plain(case), seen: plain(seen) });
        }
        if deviations.is_empty() {
            bail!("docs/conformance.md has no table of deviations");
        }
        Ok(Self { deviations })
    }

    /// `seen` is what was not as expected, one line for each question.
    pub fn verdict(&self, subject: Subject, case: &str, seen: &[String]) -> Verdict {
        let name = subject.name();
        let listed = self
            .deviations
            .iter()
            .find(|deviation| name.starts_with(&deviation.subject) && covers(&deviation.case, case));
        if seen.is_empty() {
            return match listed {
                Some(_) => Verdict::Failed("docs/conformance.md lists a deviation, but there is none".to_owned()),
                None => Verdict::Passed,
            };
        }
        if let Some(deviation) = listed {
            // `ADDRESS TRANSPORT: what came back`
            let as_listed = |one: &String| one.rsplit_once(": ").is_some_and(|(_, heard)| heard == deviation.seen);
            if deviation.seen == "fails" || seen.iter().all(as_listed) {
                return Verdict::Deviates;
            }
        }
        Verdict::Failed(seen.join("; "))
    }

    /// Deviations listed for `subject` that name none of the `cases` it was asked: a mistake in the document.
    pub fn unknown(&self, subject: Subject, cases: &BTreeSet<String>) -> Vec<&str> {
        let listed = self.deviations.iter().filter(|deviation| subject.name().starts_with(&deviation.subject));
        listed
            .filter(|deviation| !cases.iter().any(|case| covers(&deviation.case, case)))
            .map(|deviation| deviation.case.as_str())
            .collect()
    }
}

/// `*` stands for anything, once.
fn covers(pattern: &str, case: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == case,
        Some((head, tail)) => case.len() >= head.len() + tail.len() && case.starts_with(head) && case.ends_with(tail),
    }
}

/// Counts of one subject.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Sum {
    pub passed: usize,
    pub failed: usize,
    pub deviating: usize,
}

impl Sum {
    pub fn add(&mut self, verdict: &Verdict) {
        match verdict {
            Verdict::Passed => self.passed += 1,
            Verdict::Deviates => self.deviating += 1,
            Verdict::Failed(_) => self.failed += 1,
        }
    }
}

pub fn judge() -> Result<Judge> {
    Judge::new().context("the table of deviations")
}
