//! The loop: takes events in, plans what they touch, keeps the dataplane in step, and publishes what came of it.
//!
//! ```text
//! events ──► Index ──► Planner ──► Changes ──► Dataplane
//!            (what is)  (what should be)          │ Report
//!                                  Status ◄── Table, Retry
//! ```
//!
//! All of it runs on one thread of its own, which owns the dataplane: blocking calls stand in nobody's way, a change passes
//! through no further queue between being heard of and being written, and while a call lasts what happens meanwhile piles
//! up and is taken together afterwards. There is no waiting unless a minimum period is configured.
//!
//! - Nothing is programmed before complete lists of Services and EndpointSlices and the own Node have come in and the source
//!   has said that it is synced (contract A130). Until then what an earlier run left in the kernel goes on serving.
//! - Devices are not touched before the first value has been *sent* on their channel (an empty one counts): the value that
//!   the channel was made with says nothing, and taking it for the truth would detach what an earlier run attached.
//! - What fails is kept in the status table and tried again with growing pauses; it never holds up the rest.

use std::{sync::Arc, time::Duration};

use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use crate::{
    dataplane::Dataplane,
    desired::Devices,
    model::{Event, SourceState},
    plan::Defaults,
    status::Status,
};

mod announced;
mod engine;
mod lost;
mod retry;
mod table;
mod takeover;

#[derive(Clone, Debug)]
pub struct Options {
    pub defaults: Defaults,
    /// At least so long between the end of a sync and the start of the next; zero: none (kube-proxy's minSyncPeriod).
    pub min_period: Duration,
    /// How often the kernel is compared with what was programmed.
    pub resync_period: Duration,
    /// Pause before what failed is tried again; doubles up to `retry_max` while nothing gets better.
    pub retry_first: Duration,
    pub retry_max: Duration,
    /// So long whoever served before goes on where little is missing of what should be in force.
    pub takeover: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            defaults: Defaults::default(),
            min_period: Duration::ZERO,
            resync_period: Duration::from_secs(30),
            retry_first: Duration::from_secs(1),
            retry_max: Duration::from_secs(30),
            takeover: Duration::from_secs(60),
        }
    }
}

/// What the loop is connected to.
pub struct Ends {
    pub events: mpsc::Receiver<Event>,
    pub devices: watch::Receiver<Devices>,
    pub source: watch::Receiver<SourceState>,
    pub dataplane: Box<dyn Dataplane>,
    pub status: watch::Sender<Arc<Status>>,
}

#[derive(Debug, thiserror::Error)]
pub enum SyncError {
    #[error("the dataplane's thread does not start: {0}")]
    Start(#[source] std::io::Error),
    #[error("the dataplane's thread ended unexpectedly; what is programmed goes on serving, restart the agent")]
    Died,
    #[error("the source of Services ended; what is programmed goes on serving, restart the agent")]
    SourceEnded,
}

/// Runs until cancelled. The dataplane is dropped then, not torn down: what it programmed goes on serving (contract A135).
pub async fn run(options: Options, ends: Ends, cancel: CancellationToken) -> Result<(), SyncError> {
    // Whoever drops this future wants the thread to end, too.
    let cancel = cancel.child_token();
    let _guard = cancel.clone().drop_guard();
    let (done, ended) = oneshot::channel();
    std::thread::Builder::new()
        .name("dataplane".into())
        .spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
            let result = runtime
                .map_err(SyncError::Start)
                .and_then(|runtime| runtime.block_on(engine::Engine::new(options, ends, cancel).run()));
            // Nobody listens any more: then nobody needs to know.
            let _ = done.send(result);
        })
        .map_err(SyncError::Start)?;
    ended.await.unwrap_or(Err(SyncError::Died))
}
