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
    /// Of each such case, how many questions are answered so: all that are not answered as expected.
    questions: usize,
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
            let [subject, case, seen, questions, why] = cells[..] else { bail!("docs/conformance.md: {row}") };
            if why.is_empty() {
                bail!("docs/conformance.md: no reason: {row}");
            }
            let plain = |text: &str| text.trim_matches('`').to_owned();
            let questions = questions.parse().with_context(|| format!("docs/conformance.md: no number: {row}"))?;
            deviations.push(Deviation { subject: plain(subject), case: plain(case), seen: plain(seen), questions });
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
            if seen.iter().all(as_listed) {
                if seen.len() == deviation.questions {
                    return Verdict::Deviates;
                }
                let Deviation { seen: listed, questions, .. } = deviation;
                return Verdict::Failed(format!(
                    "{}: docs/conformance.md lists {listed:?} for {questions} of its questions, not for {}",
                    seen.join("; "),
                    seen.len()
                ));
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
    /// What could not be asked, once for each reason: the suite says it.
    pub skipped: usize,
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        conformance::{
            changes::CHANGES,
            subject::Mode,
            table::{CASES, MATRICES},
        },
        world::SocketLb,
    };

    fn number(word: &str) -> Option<u32> {
        word.strip_prefix('A')?.parse().ok()
    }

    fn numbers(text: &str) -> impl Iterator<Item = u32> {
        text.split_whitespace().filter_map(number)
    }

    #[test]
    fn every_statement_is_asked_or_something_else_shows_it() {
        // What comes behind is no business of packets.
        const ALL: std::ops::RangeInclusive<u32> = 1..=110;
        let contract = include_str!("../../../docs/contract.md");
        let first_cell = |row: &str| row.trim().strip_prefix("| ")?.split(' ').next().map(str::to_owned);
        let stated: BTreeSet<u32> = contract
            .lines()
            .filter_map(|row| number(&first_cell(row)?))
            .filter(|number| ALL.contains(number))
            .collect();
        assert!(stated.iter().copied().eq(ALL), "docs/contract.md has gaps: {stated:?}");
        let mut asked: BTreeSet<u32> = MATRICES.iter().flat_map(|matrix| numbers(matrix.number)).collect();
        asked.extend(CASES.lines().filter_map(|row| row.split_once('|')).flat_map(|(cell, _)| numbers(cell)));
        asked.extend(CHANGES.iter().filter_map(|(name, _)| name.split_once(':')).flat_map(|(cell, _)| numbers(cell)));
        let unasked: BTreeSet<u32> = ALL.filter(|number| !asked.contains(number)).collect();
        let (mut listed, mut reasons) = (BTreeSet::new(), BTreeSet::new());
        let rows = DOCUMENT.lines().skip_while(|row| !row.starts_with("| number |")).skip(2);
        for row in rows.take_while(|row| row.starts_with('|')) {
            let [cell, why, proof] = row.trim_matches(['|', ' ']).split(" | ").collect::<Vec<_>>()[..] else {
                panic!("{row}")
            };
            assert!(listed.insert(number(cell).expect(row)), "twice: {row}");
            assert!(!why.is_empty() && reasons.insert(why), "not a reason of its own: {row}");
            // A file, and what stands in it.
            let quoted: Vec<&str> = proof.split('`').skip(1).step_by(2).collect();
            for proof in quoted.chunks(2) {
                let [file, text] = proof else { panic!("{row}") };
                let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(file);
                let source = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{file}: {error}"));
                assert!(source.contains(text), "{text:?} is not in {file}");
            }
        }
        assert_eq!(unasked, listed, "numbers that nothing asks, and those that docs/conformance.md lists");
    }

    fn lines(answers: &[&str]) -> Vec<String> {
        answers.iter().map(|heard| format!("[fd00::1]:80 tcp: {heard}")).collect()
    }

    #[test]
    fn a_deviation_has_to_be_as_listed_for_every_question() {
        let judge = judge().unwrap();
        let subject = Subject::Ebpf(SocketLb::All);
        let case = "A89: outside to ranged-empty lb";
        let verdict = |answers: &[&str]| judge.verdict(subject, case, &lines(answers));
        assert_eq!(verdict(&["refused"; 4]), Verdict::Deviates);
        for other in [&["refused"; 3][..], &["refused"; 5], &["refused", "refused", "refused", "b1 own"], &[]] {
            assert!(matches!(verdict(other), Verdict::Failed(_)), "{other:?}");
        }
        let nftables = Subject::KubeProxy(Mode::Nftables);
        assert!(matches!(judge.verdict(nftables, case, &lines(&["refused"; 4])), Verdict::Failed(_)));
        assert_eq!(judge.verdict(nftables, case, &[]), Verdict::Passed);
    }
}
