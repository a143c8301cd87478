//! A second look at cases that failed while others ran beside them.
//!
//! Suites share two CPUs with each other and with a virtual machine, so now and then a case meets a limit that it would keep alone. Such a
//! case is asked once more, alone, when all else is done. It is named whatever comes of it, and a case that fails twice has failed.

use std::process::Command;

use anyhow::Result;

use super::{Done, Outcome};

/// Asks again what failed, each in a world of its own, unless more than `most` did; returns what passed this time, which is no longer among the failures, and what it
/// had said.
/// Only cases that named themselves can be asked alone, and pure tests have nothing beside them.
pub fn look(
    done: &mut [Done],
    most: usize,
    run: impl Fn(&str, &mut Command) -> Result<Outcome>,
) -> Vec<(String, String)> {
    if done.iter().map(|done| done.outcome.failures.len()).sum::<usize>() > most {
        return Vec::new();
    }
    let (mut passed, mut looks) = (Vec::new(), 0);
    for Done { name, command, outcome, .. } in done.iter_mut().filter(|done| done.suite.needs_root()) {
        for failure in std::mem::take(&mut outcome.failures) {
            let case = failure.strip_prefix(&*name).and_then(|rest| rest.strip_prefix(' '));
            looks += 1;
            let again = case.map(|case| run(&format!("{name} again {looks}"), alone(command).arg(case)));
            // What cannot even be asked again has failed.
            let again = again.and_then(Result::ok).unwrap_or_default();
            if again.failures.is_empty() && again.skips.is_empty() && again.passed > 0 {
                outcome.passed += again.passed;
                let reason = outcome.reasons.remove(&failure).unwrap_or_default();
                passed.push((failure, reason));
            } else {
                outcome.failures.push(failure);
            }
        }
    }
    passed
}

/// The same program in the same surroundings.
fn alone(command: &Command) -> Command {
    let mut again = Command::new(command.get_program());
    again.args(command.get_args());
    if let Some(directory) = command.get_current_dir() {
        again.current_dir(directory);
    }
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => again.env(name, value),
            None => again.env_remove(name),
        };
    }
    again
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::test::{Suite, libtest::Skip};

    fn done(suite: Suite, failures: &[&str]) -> Done {
        let mut command = Command::new("/bin/x");
        command.arg("--one").env("A", "b").current_dir("/");
        let failures: Vec<_> = failures.iter().map(|&failure| failure.to_owned()).collect();
        let reasons = failures.iter().map(|failure| (failure.clone(), "slow".to_owned())).collect();
        let outcome = Outcome { passed: 5, failures, reasons, ..Outcome::default() };
        Done { suite, name: "netns tests/x".to_owned(), command, outcome, took: Duration::ZERO }
    }

    /// Fails a case called `bad`, and finds none called `gone`.
    fn answer(_: &str, command: &mut Command) -> Result<Outcome> {
        let args: Vec<_> = command.get_args().map(|arg| arg.to_string_lossy().into_owned()).collect();
        assert_eq!(args[0], "--one");
        assert_eq!(command.get_envs().count(), 1);
        assert_eq!(command.get_current_dir(), Some(std::path::Path::new("/")));
        Ok(match args[1].as_str() {
            "x/bad" => Outcome { failures: vec!["again".to_owned()], ..Outcome::default() },
            "x/gone" => Outcome::default(),
            "x/skips" => {
                Outcome { passed: 1, skips: vec![Skip { test: "a".into(), text: "b".into() }], ..Outcome::default() }
            }
            "x/unasked" => anyhow::bail!("no room for a log"),
            _ => Outcome { passed: 1, ..Outcome::default() },
        })
    }

    #[test]
    fn what_passes_alone_is_named_and_what_fails_twice_has_failed() {
        let failures = ["x x/bad", "x x/good", "x x/gone", "x x/skips", "x x/unasked", "x: died"];
        let failures = failures.map(|failure| format!("netns tests/{failure}"));
        let failures = failures.each_ref().map(String::as_str);
        let mut all = [done(Suite::Netns, &failures)];
        assert_eq!(look(&mut all, 6, answer), [("netns tests/x x/good".to_owned(), "slow".to_owned())]);
        assert_eq!(all[0].outcome.passed, 6);
        let left = [0, 2, 3, 4, 5].map(|n| failures[n]);
        assert_eq!(all[0].outcome.failures, left);
    }

    #[test]
    fn more_than_a_few_are_not_asked_again_nor_are_pure_ones() {
        let mut all = [done(Suite::Netns, &["netns tests/x x/good"]), done(Suite::Unit, &["unit x y"])];
        assert!(look(&mut all, 1, answer).is_empty());
        assert!(look(&mut all[1..], 1, answer).is_empty());
        assert_eq!(all[0].outcome.failures.len(), 1);
        assert_eq!(all[1].outcome.failures.len(), 1);
    }
}
