//! When whoever served before may go: once what is asked for is in force, or all but little of it, for long enough.
//!
//! Ready is the node before that: a start from nothing has nothing to lose, taking over has. While it waits the former serves on, by what
//! was true when its agent ended, so what fails for good must not hold it for ever.

use std::{
    fmt,
    time::{Duration, Instant},
};

/// Named of each kind at most.
const NAMED: usize = 5;

/// What is not in force yet.
#[derive(Debug, Default)]
pub(super) struct Missing {
    /// Nothing of a family is, or no hook at all: nobody would serve in the former's place.
    all: Option<String>,
    some: Vec<String>,
}

impl Missing {
    pub(super) fn all(&mut self, what: impl Into<String>) {
        self.all.get_or_insert(what.into());
    }

    pub(super) fn some(&mut self, kind: &str, objects: impl ExactSizeIterator<Item: fmt::Display>) {
        let count = objects.len();
        if count > 0 {
            let named: Vec<_> = objects.take(NAMED).map(|object| object.to_string()).collect();
            let more = if count > NAMED { ", …" } else { "" };
            self.some.push(format!("{count} {kind} ({}{more})", named.join(", ")));
        }
    }
}

/// Decided once.
#[derive(Debug)]
pub(super) struct Takeover {
    patience: Duration,
    /// Since when there is little missing only.
    since: Option<Instant>,
    done: bool,
}

impl Takeover {
    pub(super) const fn new(patience: Duration) -> Self {
        Self { patience, since: None, done: false }
    }

    pub(super) const fn is_done(&self) -> bool {
        self.done
    }

    /// When to look again although nothing happens.
    pub(super) fn at(&self) -> Option<Instant> {
        self.since.filter(|_| !self.done).map(|since| since + self.patience)
    }

    /// Whether the former may go now.
    pub(super) fn look(&mut self, missing: &Missing, now: Instant) -> bool {
        let Missing { all, some } = missing;
        if let Some(all) = all {
            self.since = None;
            tracing::debug!(%all, "whoever served before goes on");
            return false;
        }
        if !some.is_empty() {
            let since = *self.since.get_or_insert_with(|| {
                tracing::warn!(missing = %some.join("; "), patience = ?self.patience, "whoever served before goes on a while");
                now
            });
            if now < since + self.patience {
                return false;
            }
            tracing::warn!(missing = %some.join("; "), "takes over without what is missing");
        }
        self.done = true;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn missing(all: bool, some: &[&str]) -> Missing {
        let mut missing = Missing::default();
        missing.some("frontends", some.iter());
        if all {
            missing.all("IPv6");
        }
        missing
    }

    #[test]
    fn little_is_waited_for_a_while_and_all_for_ever() {
        let patience = Duration::from_secs(60);
        let mut takeover = Takeover::new(patience);
        let start = Instant::now();
        assert!(!takeover.look(&missing(true, &["a"]), start));
        let later = start + patience * 10;
        assert!(!takeover.look(&missing(true, &[]), later) && takeover.at().is_none());
        // From now on.
        assert!(!takeover.look(&missing(false, &["a"]), later));
        assert_eq!(takeover.at(), Some(later + patience));
        assert!(!takeover.look(&missing(false, &["a", "b"]), later + patience / 2));
        assert!(takeover.look(&missing(false, &["b"]), later + patience));
        assert!(takeover.is_done() && takeover.at().is_none());
        assert!(Takeover::new(patience).look(&missing(false, &[]), start));
    }

    #[test]
    fn what_is_missing_is_named() {
        assert_eq!(missing(false, &["a", "b"]).some, ["2 frontends (a, b)"]);
        assert_eq!(missing(false, &["a"; 9]).some, ["9 frontends (a, a, a, a, a, …)"]);
    }
}
