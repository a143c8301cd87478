//! Reads what a test program prints: libtest under `--show-output`, and the worlds' own harness.
//!
//! libtest:
//!
//! ```text
//! running 2 tests
//! test a ... ok
//! test b ... FAILED
//!
//! successes:
//!
//! ---- a stdout ----
//! SKIP a: why
//!
//! failures:
//!
//! ---- b stdout ----
//! …
//!
//! failures:
//!     b
//!
//! test result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s
//! ```
//!
//! The worlds' harness (`proxy_tests::suite`), whose cases share a world and so run in order:
//!
//! ```text
//! ok   clusterip/tcp (12 ms)
//! FAIL clusterip/udp (9 ms): no answer
//! SKIP overlay: no vxlan here
//! suite clusterip: 1 passed, 1 failed, 1 skipped in 3.2 s
//! ```

use std::collections::{BTreeMap, BTreeSet};

/// What came of a test program, or of several.
#[derive(Clone, Default, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Without those that skipped.
    pub passed: usize,
    pub failures: Vec<String>,
    /// Last words about failures that had any.
    pub reasons: BTreeMap<String, String>,
    pub skips: Vec<Skip>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Skip {
    pub test: String,
    /// What follows `SKIP `.
    pub text: String,
}

impl Outcome {
    pub fn add(&mut self, other: Self) {
        let Self { passed, failures, reasons, skips } = other;
        self.passed += passed;
        self.failures.extend(failures);
        self.reasons.extend(reasons);
        self.skips.extend(skips);
    }

    pub fn is_empty(&self) -> bool {
        self.passed == 0 && self.failures.is_empty() && self.skips.is_empty()
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Section {
    Running,
    Successes,
    Failures,
}

pub struct Parser {
    program: String,
    section: Section,
    /// Whose output the current lines are.
    current: Option<String>,
    /// `N passed` and `N failed` of every `test result` line (doc tests print several).
    passed: usize,
    failed: usize,
    results: usize,
    failures: BTreeSet<String>,
    /// The failure that lines may be about, and what they said of each.
    about: Option<String>,
    words: BTreeMap<String, String>,
    skips: Vec<Skip>,
    /// Tests that printed a skip: libtest counts them as passed.
    skipping: BTreeSet<String>,
}

impl Parser {
    pub fn new(program: &str) -> Self {
        Self {
            program: program.to_owned(),
            section: Section::Running,
            current: None,
            passed: 0,
            failed: 0,
            results: 0,
            failures: BTreeSet::new(),
            about: None,
            words: BTreeMap::new(),
            skips: Vec::new(),
            skipping: BTreeSet::new(),
        }
    }

    /// Takes one line; gives back what is worth showing.
    pub fn line<'a>(&mut self, line: &'a str) -> Option<&'a str> {
        let shown = self.read(line);
        match self.section {
            // What a case of a world says may have many lines; only the first is shown as it comes.
            Section::Running if shown.is_some() && !line.starts_with("FAIL ") => self.about = None,
            Section::Running => {}
            Section::Successes | Section::Failures => self.about.clone_from(&self.current),
        }
        let is_heading = line.starts_with("---- ") || line.starts_with("note: ") || line.trim().is_empty();
        if let Some(test) = self.about.as_ref().filter(|_| !is_heading) {
            let words = self.words.entry(test.clone()).or_default();
            words.push_str(if words.is_empty() { "" } else { " / " });
            words.push_str(line);
        }
        shown
    }

    fn read<'a>(&mut self, line: &'a str) -> Option<&'a str> {
        if let Some(counts) = line.strip_prefix("test result: ") {
            self.count(counts);
            self.section = Section::Running;
            self.current = None;
            return Some(line);
        }
        match line {
            "successes:" => {
                self.section = Section::Successes;
                self.current = None;
                return None;
            }
            "failures:" => {
                self.section = Section::Failures;
                self.current = None;
                return Some(line);
            }
            _ => {}
        }
        if let Some(test) = line.strip_prefix("---- ").and_then(|rest| rest.strip_suffix(" stdout ----")) {
            self.current = Some(test.to_owned());
        }
        match self.section {
            Section::Running => {
                if let Some(text) = line.strip_prefix("SKIP ") {
                    let name = text.split(':').next().unwrap_or(text);
                    self.skips.push(Skip { test: format!("{} {name}", self.program), text: text.to_owned() });
                    return Some(line);
                }
                if let Some(case) = line.strip_prefix("FAIL ") {
                    let case = case.split(" (").next().unwrap_or(case);
                    self.failures.insert(case.to_owned());
                    self.about = Some(case.to_owned());
                    return Some(line);
                }
                if line.starts_with("ok   ") || line.starts_with("sum  ") {
                    return Some(line);
                }
                if let Some(counts) = line.strip_prefix("suite ").and_then(|rest| rest.split_once(": ")) {
                    self.count(counts.1);
                    return Some(line);
                }
                let (name, verdict) = line.strip_prefix("test ")?.split_once(" ... ")?;
                if let Some(reason) = verdict.strip_prefix("ignored") {
                    let reason = reason.trim_start_matches(", ");
                    let reason = if reason.is_empty() { "no reason given" } else { reason };
                    self.skips.push(Skip {
                        test: format!("{} {name}", self.program),
                        text: format!("{name}: ignored, {reason}"),
                    });
                }
                Some(line)
            }
            Section::Successes => {
                if let (Some(test), Some(text)) = (&self.current, line.strip_prefix("SKIP ")) {
                    self.skipping.insert(test.clone());
                    self.skips.push(Skip { test: format!("{} {test}", self.program), text: text.to_owned() });
                    return Some(line);
                }
                None
            }
            Section::Failures => {
                if let (None, Some(name)) = (&self.current, line.strip_prefix("    ")) {
                    self.failures.insert(name.to_owned());
                }
                Some(line)
            }
        }
    }

    /// `ok. 2 passed; 1 failed; …` or `2 passed, 1 failed, …`.
    fn count(&mut self, counts: &str) {
        let count = |what: &str| -> usize {
            counts
                .split([';', '.', ','])
                .find_map(|part| part.trim().strip_suffix(what))
                .and_then(|number| number.trim().parse().ok())
                .unwrap_or(0)
        };
        self.passed += count(" passed");
        self.failed += count(" failed");
        self.results += 1;
    }

    /// Ends the reading; `trouble` says how the program itself went wrong. A program that died has failed even if every
    /// line it got out was good.
    pub fn finish(self, trouble: Option<String>) -> Outcome {
        let Self { program, passed, failed, results, failures, mut words, skips, skipping, .. } = self;
        let reason = |name: &String| Some((format!("{program} {name}"), last_words(&words.remove(name)?)));
        let reasons = failures.iter().filter_map(reason).collect();
        let mut names: Vec<String> = failures.into_iter().map(|name| format!("{program} {name}")).collect();
        while names.len() < failed {
            names.push(format!("{program}: a test that did not name itself"));
        }
        match trouble {
            Some(trouble) if names.is_empty() => names.push(format!("{program}: {trouble}")),
            Some(trouble) if results == 0 => names.push(format!("{program}: {trouble}")),
            None if results == 0 => names.push(format!("{program}: ended without a result")),
            _ => {}
        }
        Outcome { passed: passed.saturating_sub(skipping.len()), failures: names, reasons, skips }
    }
}

/// The end of a text: errors name what they come of last.
fn last_words(text: &str) -> String {
    const MOST: usize = 500;
    match text.char_indices().rev().nth(MOST) {
        Some((start, _)) => format!("… {}", text.get(start..).unwrap_or_default()),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAMPLE: &str = "
running 4 tests
test a ... ok
test b ... FAILED
test c ... ignored, needs a printer
test d::e ... ok

successes:

---- a stdout ----
looking
SKIP a: no ip_vs here


successes:
    a
    d::e

failures:

---- b stdout ----
SKIP nothing: a failed test is no skip
thread 'b' panicked at src/lib.rs:1:1

failures:
    b

test result: FAILED. 2 passed; 1 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s
";

    fn read(text: &str, trouble: Option<&str>) -> Outcome {
        let mut parser = Parser::new("unit x");
        for line in text.lines() {
            parser.line(line);
        }
        parser.finish(trouble.map(Into::into))
    }

    #[test]
    fn a_skip_is_no_pass_and_is_listed() {
        let outcome = read(SAMPLE, Some("ended with exit status: 101"));
        assert_eq!(outcome.passed, 1, "{outcome:?}");
        assert_eq!(outcome.failures, ["unit x b"]);
        let texts: Vec<&str> = outcome.skips.iter().map(|skip| skip.text.as_str()).collect();
        assert_eq!(texts, ["c: ignored, needs a printer", "a: no ip_vs here"]);
    }

    #[test]
    fn a_program_that_dies_has_failed() {
        let alive = "running 1 test\ntest a ... ok\n";
        assert_eq!(read(alive, Some("ended with signal: 6")).failures, ["unit x: ended with signal: 6"]);
        assert_eq!(read(alive, None).failures, ["unit x: ended without a result"]);
        let done = "test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s";
        assert_eq!(read(done, Some("ended with signal: 6")).failures, ["unit x: ended with signal: 6"]);
        assert_eq!(read(done, None), Outcome { passed: 1, ..Default::default() });
    }

    #[test]
    fn the_harness_of_the_worlds_is_read_too() {
        let text = "ok   clusterip/tcp (12 ms)\nFAIL clusterip/udp (9 ms): no answer\nSKIP overlay: no vxlan here\n\
                    suite clusterip: 1 passed, 1 failed, 1 skipped in 3.2 s\n";
        let outcome = read(text, Some("ended with exit status: 1"));
        assert_eq!((outcome.passed, outcome.skips.len()), (1, 1));
        assert_eq!(outcome.failures, ["unit x clusterip/udp"]);
        assert_eq!(outcome.skips[0].text, "overlay: no vxlan here");
        assert_eq!(read("ok   a (1 ms)\n", Some("ended with signal: 9")).failures, ["unit x: ended with signal: 9"]);
    }

    #[test]
    fn what_a_failure_said_last_is_kept() {
        let outcome = read(SAMPLE, Some("ended with exit status: 101"));
        let reason = &outcome.reasons["unit x b"];
        assert_eq!(reason, "SKIP nothing: a failed test is no skip / thread 'b' panicked at src/lib.rs:1:1");
        let log = "a line of a log\n".repeat(100);
        let text = format!(
            "FAIL a/b (9 ms): --- log\n{log}no answer\nok   c (1 ms)\nsuite x: 1 passed, 1 failed, 0 skipped in 1 s\n"
        );
        let outcome = read(&text, Some("ended with exit status: 1"));
        let reason = &outcome.reasons["unit x a/b"];
        assert!(reason.starts_with("… ") && reason.ends_with("a line of a log / no answer"), "{reason}");
        assert!(reason.len() < 600);
        assert_eq!(outcome.reasons.len(), 1);
    }

    #[test]
    fn several_results_add_up() {
        let line = "test result: ok. 12 passed; 0 failed; 0 ignored; 0 measured; 3 filtered out; finished in 0.01s\n";
        assert_eq!(read(&line.repeat(2), None).passed, 24);
    }
}
