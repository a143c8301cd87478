//! How often all of our rules are read, where they are so many that this takes long.
//!
//! Who changes ours is found at once, and so is the first change of others'. Those who change theirs over and over have ours read for nothing:
//! that takes at most one part in so many of the time.

use std::time::{Duration, Instant};

const SHARE: u32 = 100;

/// See the module.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ration {
    /// When all that was for nothing is paid for.
    paid: Instant,
    /// What the last of it costs.
    last: Duration,
}

impl Ration {
    pub(crate) fn new(now: Instant) -> Self {
        Self { paid: now, last: Duration::ZERO }
    }

    /// One reading may be owed for.
    pub(crate) fn allows(&self, now: Instant) -> bool {
        self.paid.saturating_duration_since(now) <= self.last
    }

    /// It took so long, and nothing of ours was other than it should be.
    pub(crate) fn for_nothing(&mut self, now: Instant, took: Duration) {
        self.last = took * SHARE;
        self.paid = self.paid.max(now) + self.last;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_read_again_and_again_for_nothing_waits() {
        let took = Duration::from_secs(3);
        let start = Instant::now();
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        let mut ration = Ration::new(start);
        assert!(ration.allows(at(0)));
        ration.for_nothing(at(0), took);
        assert!(ration.allows(at(0)), "one change of others' is nobody's habit");
        ration.for_nothing(at(0), took);
        assert!(!ration.allows(at(299)) && ration.allows(at(300)));
        // Each sync period for an hour.
        let mut read = 0;
        for seconds in (300..3900).step_by(30) {
            if ration.allows(at(seconds)) {
                ration.for_nothing(at(seconds), took);
                read += 1;
            }
        }
        assert_eq!(read, 12, "in 3600 s at 3 s each: a hundredth");
        assert!(ration.allows(at(9000)));
    }
}
