//! The tasks of the agent as one: the first that ends early ends all, and its error is the process's.

use std::{future::Future, time::Duration};

use anyhow::{Context, anyhow};
use tokio::{task::JoinSet, time::timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

/// What a task may still take once it is told to stop: a kernel call that is under way, no more.
pub(super) const GRACE: Duration = Duration::from_secs(5);

/// Tasks that all run until cancelled.
pub(super) struct Tasks {
    set: JoinSet<(&'static str, anyhow::Result<()>)>,
    cancel: CancellationToken,
}

impl Tasks {
    pub(super) fn new() -> Self {
        Self { set: JoinSet::new(), cancel: CancellationToken::new() }
    }

    /// A token for a task that is about to be spawned.
    pub(super) fn token(&self) -> CancellationToken {
        self.cancel.clone()
    }

    pub(super) fn spawn<E>(&mut self, name: &'static str, task: impl Future<Output = Result<(), E>> + Send + 'static)
    where
        E: Into<anyhow::Error> + 'static,
    {
        self.set.spawn(async move { (name, task.await.map_err(Into::into)) });
    }

    /// Until `stop` resolves (to what asked for it), or a task ends early; then all the others have `grace` to end.
    pub(super) async fn run(mut self, stop: impl Future<Output = &'static str>, grace: Duration) -> anyhow::Result<()> {
        let outcome = tokio::select! {
            reason = stop => {
                info!(reason, "stopping; what is in the kernel goes on serving");
                Ok(())
            }
            Some(ended) = self.set.join_next() => early(ended),
        };
        self.cancel.cancel();
        // Whatever goes wrong from here on follows from stopping (a channel whose other end is gone); the outcome stands.
        let rest = async {
            while let Some(ended) = self.set.join_next().await {
                match ended {
                    Ok((_, Ok(()))) => {}
                    Ok((task, Err(error))) => debug!(task, error = format!("{error:#}"), "failed while stopping"),
                    Err(error) => warn!(%error, "broke down while stopping"),
                }
            }
        };
        match timeout(grace, rest).await {
            Ok(()) => outcome,
            Err(_) => outcome.and(Err(anyhow!("a task did not stop within {grace:?}"))),
        }
    }
}

type Ended = Result<(&'static str, anyhow::Result<()>), tokio::task::JoinError>;

fn early(ended: Ended) -> anyhow::Result<()> {
    match ended {
        Ok((name, Ok(()))) => Err(anyhow!("the {name} ended by itself")),
        Ok((name, Err(error))) => Err(error.context(name)),
        Err(error) => Err(error).context("a task broke down"),
    }
}

#[cfg(test)]
mod tests {
    use std::{convert::Infallible, io};

    use super::*;

    async fn until(cancel: CancellationToken) -> Result<(), Infallible> {
        cancel.cancelled().await;
        Ok(())
    }

    #[tokio::test]
    async fn a_signal_stops_all_and_is_no_error() {
        let mut tasks = Tasks::new();
        tasks.spawn("one", until(tasks.token()));
        tasks.spawn("two", until(tasks.token()));
        tasks.run(async { "SIGTERM" }, GRACE).await.unwrap();
    }

    #[tokio::test]
    async fn the_first_error_ends_all() {
        let mut tasks = Tasks::new();
        tasks.spawn("one", until(tasks.token()));
        tasks.spawn("source", async { Err::<(), _>(io::Error::other("no node name")) });
        let error = tasks.run(std::future::pending(), GRACE).await.unwrap_err();
        assert_eq!(format!("{error:#}"), "source: no node name");
    }

    #[tokio::test]
    async fn a_task_that_ends_early_is_an_error() {
        let mut tasks = Tasks::new();
        tasks.spawn("sync", async { Ok::<(), Infallible>(()) });
        let error = tasks.run(std::future::pending(), GRACE).await.unwrap_err();
        assert_eq!(format!("{error:#}"), "the sync ended by itself");
    }

    #[tokio::test]
    async fn a_task_that_hangs_does_not_keep_the_process() {
        let mut tasks = Tasks::new();
        tasks.spawn("sync", std::future::pending::<Result<(), Infallible>>());
        assert!(tasks.run(async { "SIGINT" }, Duration::from_millis(50)).await.is_err());
    }
}
