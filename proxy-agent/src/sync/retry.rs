//! What failed and is worth trying again, and when.

use std::{
    collections::BTreeSet,
    net::IpAddr,
    time::{Duration, Instant},
};

use super::Options;
use crate::{
    dataplane::Failure,
    desired::{Changes, DesiredState, Frontend},
};

/// Pauses double while nothing gets better, and start over when something does.
pub(super) struct Retry {
    first: Duration,
    max: Duration,
    delay: Duration,
    at: Option<Instant>,
    pub(super) frontends: BTreeSet<Frontend>,
    pub(super) guards: BTreeSet<IpAddr>,
    pub(super) devices: bool,
    pub(super) hooks: bool,
    pub(super) local_cidrs: bool,
}

impl Retry {
    pub(super) fn new(options: &Options) -> Self {
        let Options { retry_first: first, retry_max: max, .. } = *options;
        Self {
            first,
            max,
            delay: first,
            at: None,
            frontends: BTreeSet::new(),
            guards: BTreeSet::new(),
            devices: false,
            hooks: false,
            local_cidrs: false,
        }
    }

    /// Notes the outcome for one frontend.
    pub(super) fn frontend(&mut self, frontend: Frontend, failure: Option<&Failure>) {
        match failure {
            Some(Failure::Retry(_)) => self.frontends.insert(frontend),
            Some(Failure::Unsupported(_) | Failure::Held(_)) | None => self.frontends.remove(&frontend),
        };
    }

    pub(super) fn guard(&mut self, addr: IpAddr, failure: Option<&Failure>) {
        match failure {
            Some(Failure::Retry(_)) => self.guards.insert(addr),
            Some(Failure::Unsupported(_) | Failure::Held(_)) | None => self.guards.remove(&addr),
        };
    }

    /// How much is waiting.
    pub(super) fn waiting(&self) -> usize {
        let Self { frontends, guards, devices, hooks, local_cidrs, .. } = self;
        frontends.len() + guards.len() + [devices, hooks, local_cidrs].into_iter().filter(|waits| **waits).count()
    }

    pub(super) fn at(&self) -> Option<Instant> {
        self.at
    }

    /// Sets the clock after something was noted outside a retry. `room` was made: what failed for want of it may fit now.
    pub(super) fn schedule(&mut self, now: Instant, room: bool) {
        if self.waiting() == 0 {
            (self.at, self.delay) = (None, self.first);
        } else if self.at.is_none() || room {
            self.delay = self.first;
            let soonest = now + self.delay;
            self.at = Some(self.at.map_or(soonest, |at| at.min(soonest)));
        }
    }

    /// Sets the clock after a retry that began with `before` things waiting.
    pub(super) fn reschedule(&mut self, now: Instant, before: usize) {
        self.delay = if self.waiting() < before { self.first } else { (self.delay * 2).min(self.max) };
        self.at = (self.waiting() > 0).then(|| now + self.delay);
        if self.at.is_none() {
            self.delay = self.first;
        }
    }

    /// The failed part of what is desired *now*.
    pub(super) fn changes(&self, desired: &DesiredState) -> Changes {
        let local_cidrs = self.local_cidrs.then(|| desired.local_cidrs.clone());
        let mut changes = Changes { local_cidrs, ..Changes::default() };
        for frontend in &self.frontends {
            match desired.frontends.get(frontend) {
                Some(spec) => drop(changes.set.insert(*frontend, spec.clone())),
                None => drop(changes.remove.insert(*frontend)),
            }
        }
        for addr in &self.guards {
            if desired.guards.contains(addr) {
                changes.guard.insert(*addr)
            } else {
                changes.unguard.insert(*addr)
            };
        }
        changes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_and_start_over() {
        let options =
            Options { retry_first: Duration::from_secs(1), retry_max: Duration::from_secs(5), ..Options::default() };
        let mut retry = Retry::new(&options);
        let now = Instant::now();
        let pause = |retry: &Retry| retry.at().map(|at| (at - now).as_secs());

        retry.schedule(now, false);
        assert_eq!(pause(&retry), None);
        for addr in ["10.0.0.1", "10.0.0.2"] {
            retry.guard(addr.parse().unwrap(), Some(&Failure::Retry("full".into())));
        }
        retry.guard("10.0.0.3".parse().unwrap(), Some(&Failure::Unsupported("never".into())));
        retry.schedule(now, false);
        assert_eq!(pause(&retry), Some(1));
        for expected in [2, 4, 5, 5] {
            retry.reschedule(now, 2);
            assert_eq!(pause(&retry), Some(expected));
        }
        // A further failure does not hurry what waits already; room does.
        retry.schedule(now, false);
        assert_eq!(pause(&retry), Some(5));
        retry.schedule(now, true);
        assert_eq!(pause(&retry), Some(1));

        retry.guard("10.0.0.1".parse().unwrap(), None);
        retry.reschedule(now, 2);
        assert_eq!(pause(&retry), Some(1));
        retry.guard("10.0.0.2".parse().unwrap(), None);
        retry.reschedule(now, 1);
        assert_eq!(pause(&retry), None);
    }
}
