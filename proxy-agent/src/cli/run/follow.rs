//! Follows the configuration file: takes in what can change while the agent runs, and ends the process for all else, so that whoever started
//! it starts it anew (contract A141). The datapath serves meanwhile. A file that cannot be read or does not hold together is said, and
//! changes nothing.

use std::sync::Arc;

use anyhow::anyhow;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::{
    effective::{self, Effective},
    given::Given,
    logging::Reload,
};
use crate::{config::ProxyMode, source};

/// Options that take effect at once.
const LIVE: [&str; 2] = ["log-level", "v"];

/// What runs was started with, and what it takes to make that anew.
pub(super) struct Configuration {
    pub(super) given: Given,
    pub(super) current: Effective,
    pub(super) log: Reload,
    /// That runs.
    pub(super) mode: ProxyMode,
    /// For whoever asks what is in force.
    pub(super) shown: watch::Sender<Arc<str>>,
}

impl Configuration {
    /// Until cancelled, or until what changed wants a new start.
    pub(super) async fn follow(mut self, cancel: CancellationToken) -> anyhow::Result<()> {
        self.shown.send_replace(self.current.configz()?.into());
        let Some(read) = &self.current.file else {
            cancel.cancelled().await;
            return Ok(());
        };
        let path = read.path.clone();
        let mut file = source::File::new(&path, read.text.clone());
        while let Some(text) = cancel.run_until_cancelled(file.changed()).await {
            match effective::with_file(&self.given, &path, text) {
                Ok(next) => self.take(next)?,
                Err(error) => warn!("{error:#}; the configuration from before stays in force"),
            }
        }
        Ok(())
    }

    fn take(&mut self, next: Effective) -> anyhow::Result<()> {
        let path = &self.given.args.file.config.clone().unwrap_or_default();
        let changes = self.current.changes(&next);
        let wants_start = |long: &&String| next.counts(long, self.mode) && !LIVE.contains(&long.as_str());
        let named: Vec<_> = changes.iter().filter(wants_start).map(|long| next.name_of(long)).collect();
        if !named.is_empty() {
            return Err(anyhow!(
                "{} changed ({}): ending, to be started with it; what is in the kernel goes on serving",
                path.display(),
                named.join(", ")
            ));
        }
        let known = self.current.warnings(self.mode);
        for warning in next.warnings(self.mode).iter().filter(|warning| !known.contains(warning)) {
            warn!("{warning}");
        }
        let filter = next.args.log.filter();
        if changes.iter().any(|long| LIVE.contains(&long.as_str())) {
            match (self.log)(filter) {
                Ok(()) => info!(file = %path.display(), filter, "changed: what is logged"),
                Err(error) => {
                    warn!("{}: {error:#}; the configuration from before stays in force", path.display());
                    return Ok(());
                }
            }
        } else {
            info!(file = %path.display(), "changed, and nothing of effect");
        }
        self.shown.send_replace(next.configz()?.into());
        self.current = next;
        Ok(())
    }
}
