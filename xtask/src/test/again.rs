//! A second look at cases that failed while others ran beside them.
//!
//! Suites share two CPUs with each other and with a virtual machine, so now and then a case meets a limit that it would keep alone. Such a
//! case is asked once more, alone, when all else is done. It is named whatever comes of it, and a case that fails twice has failed.

use std::process::Command;

use anyhow::Result;

use super::{Done, Outcome};

/// Asks again what failed, unless more than `most` did; returns what passed this time, which is no longer among the failures, and what it
/// had said.
/// Only cases that named themselves can be asked alone, and pure tests have nothing beside them.
pub fn look(
    done: &mut [Done],
    most: usize,
    run: impl Fn(&str, &mut Command) -> Result<Outcome>,
) -> Result<Vec<(String, String)>> {
    if done.iter().map(|done| done.outcome.failures.len()).sum::<usize>() > most {
        return Ok(Vec::new());
    }
    let mut passed = Vec::new();
    for Done { name, command, outcome, .. } in done.iter_mut().filter(|done| done.suite.needs_root()) {
        for failure in std::mem::take(&mut outcome.failures) {
            let case = failure.strip_prefix(&*name).and_then(|rest| rest.strip_prefix(' '));
            let again = match case {
                Some(case) => run(&format!("{name} again {}", passed.len()), alone(command).arg(case))?,
                None => Outcome::default(),
            };
            if again.failures.is_empty() && again.passed > 0 {
                outcome.passed += 1;
                let reason = outcome.reasons.remove(&failure).unwrap_or_default();
                passed.push((failure, reason));
            } else {
                outcome.failures.push(failure);
            }
        }
    }
    Ok(passed)
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
    use crate::test::Suite;

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
            _ => Outcome { passed: 1, ..Outcome::default() },
        })
    }

    #[test]
    fn what_passes_alone_is_named_and_what_fails_twice_has_failed() {
        let failures = ["netns tests/x x/bad", "netns tests/x x/good", "netns tests/x x/gone", "netns tests/x: died"];
        let mut all = [done(Suite::Netns, &failures)];
        assert_eq!(look(&mut all, 4, answer).unwrap(), [("netns tests/x x/good".to_owned(), "slow".to_owned())]);
        assert_eq!(all[0].outcome.passed, 6);
        assert_eq!(all[0].outcome.failures, ["netns tests/x x/bad", "netns tests/x x/gone", "netns tests/x: died"]);
    }

    #[test]
    fn more_than_a_few_are_not_asked_again_nor_are_pure_ones() {
        let mut all = [done(Suite::Netns, &["netns tests/x x/good"]), done(Suite::Unit, &["unit x y"])];
        assert!(look(&mut all, 1, answer).unwrap().is_empty());
        assert!(look(&mut all[1..], 1, answer).unwrap().is_empty());
        assert_eq!(all[0].outcome.failures.len(), 1);
        assert_eq!(all[1].outcome.failures.len(), 1);
    }
}
