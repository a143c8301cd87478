//! What was asked of the API server: counted where requests are sent, read by metrics.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use super::Histogram;

/// kube-proxy's.
static BOUNDS: [f64; 12] = [0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0];

#[derive(Debug, Default)]
pub struct Requests(Mutex<Counts>);

#[derive(Clone, Debug, Default)]
pub struct Counts {
    /// By status code (`<error>` where no answer came), method and host.
    pub results: BTreeMap<(String, String, String), u64>,
    /// Until the answer began, by method and host; without watches, whose answers wait for something to happen.
    pub durations: BTreeMap<(String, String), Histogram>,
}

impl Requests {
    /// `code`: of the answer, if there was one. `took`: unless it was a watch.
    pub fn count(&self, method: &str, host: &str, code: Option<u16>, took: Option<Duration>) {
        let code = code.map_or_else(|| "<error>".to_owned(), |code| code.to_string());
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *counts.results.entry((code, method.to_owned(), host.to_owned())).or_default() += 1;
        if let Some(took) = took {
            let durations = counts.durations.entry((method.to_owned(), host.to_owned()));
            durations.or_insert_with(|| Histogram::new(&BOUNDS)).observe(took);
        }
    }

    pub fn counts(&self) -> Counts {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// What became of Events for users of the cluster.
#[derive(Debug, Default)]
pub struct EventCounts {
    written: AtomicU64,
    dropped: AtomicU64,
}

impl EventCounts {
    pub fn written(&self) {
        self.written.fetch_add(1, Ordering::Relaxed);
    }

    /// The API server could not be reached, refused it, or there were too many.
    pub fn dropped(&self) {
        self.dropped.fetch_add(1, Ordering::Relaxed);
    }

    pub fn counts(&self) -> [(&'static str, u64); 2] {
        let Self { written, dropped } = self;
        [("written", written), ("dropped", dropped)].map(|(name, count)| (name, count.load(Ordering::Relaxed)))
    }
}
