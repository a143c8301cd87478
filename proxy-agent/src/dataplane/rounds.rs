//! The loop of a thread that goes round when something was lost, and sleeps until then.

use std::{
    sync::mpsc::{Receiver, RecvTimeoutError},
    time::Instant,
};

/// Who goes round.
pub(crate) trait Rounds {
    type Job;

    /// When to go round if no job comes; `None`: not before one does.
    fn next(&self) -> Option<Instant>;

    fn take(&mut self, job: Self::Job);

    /// Goes round if it is time to.
    fn turn(&mut self);

    /// Until nobody is left who could send a job. What is queued is taken together.
    fn run(&mut self, queue: &Receiver<Self::Job>) {
        loop {
            let job = match self.next() {
                Some(at) => queue.recv_timeout(at.saturating_duration_since(Instant::now())),
                None => queue.recv().map_err(|_| RecvTimeoutError::Disconnected),
            };
            match job {
                Ok(job) => self.take(job),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            while let Ok(job) = queue.try_recv() {
                self.take(job);
            }
            self.turn();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc, time::Duration};

    use super::*;

    #[derive(Default)]
    struct Fake {
        due: Option<Instant>,
        taken: Vec<u8>,
        turns: Vec<usize>,
    }

    impl Rounds for Fake {
        type Job = u8;

        fn next(&self) -> Option<Instant> {
            self.due
        }

        fn take(&mut self, job: u8) {
            self.taken.push(job);
            self.due = Some(Instant::now() + Duration::from_millis(10));
        }

        fn turn(&mut self) {
            self.turns.push(self.taken.len());
            if self.due.is_some_and(|due| due <= Instant::now()) {
                self.due = None;
            }
        }
    }

    #[test]
    fn what_is_queued_is_taken_together_and_the_end_is_heard() {
        let (jobs, queue) = mpsc::channel();
        [1, 2, 3].into_iter().for_each(|job| jobs.send(job).unwrap());
        let ends = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(200));
            drop(jobs);
        });
        let mut fake = Fake::default();
        fake.run(&queue);
        ends.join().unwrap();
        assert_eq!(fake.taken, [1, 2, 3]);
        assert!(fake.turns.len() >= 2 && fake.turns.iter().all(|taken| *taken == 3), "{:?}", fake.turns);
        assert_eq!(fake.due, None, "its time came");
    }
}
