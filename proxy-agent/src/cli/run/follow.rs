//! Follows the configuration file: takes in what can change while the agent runs, and ends the process for all else, so that whoever started
//! it starts it anew (contract A141). The datapath serves meanwhile. A file that cannot be read or does not hold together is said, and
//! changes nothing; one that nothing could be started with is tried again until it changes, for what it names may come.

use std::{path::Path, sync::Arc, time::Duration};

use anyhow::anyhow;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::{
    effective::{self, Effective},
    given::Given,
    logging::Reload,
};
use crate::{config::ProxyMode, serve, source};

/// Options that take effect at once.
const LIVE: [&str; 2] = ["log-level", "v"];

/// Between two tries at what nothing could be started with; doubled from the first to the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// What nothing could be started with, and why.
struct Refused {
    next: Effective,
    why: String,
}

/// What runs was started with, and what it takes to make that anew.
pub(super) struct Configuration {
    pub(super) given: Given,
    pub(super) current: Effective,
    pub(super) log: Reload,
    /// That runs.
    pub(super) mode: ProxyMode,
    /// For whoever asks what is in force.
    pub(super) shown: watch::Sender<Arc<serve::Shown>>,
}

impl Configuration {
    /// Until cancelled, or until what changed wants a new start.
    pub(super) async fn follow(mut self, cancel: CancellationToken) -> anyhow::Result<()> {
        let Some(read) = &self.current.file else {
            cancel.cancelled().await;
            return Ok(());
        };
        let path = read.path.clone();
        let mut file = source::File::new(&path, read.text.clone());
        let (mut refused, mut pause): (Option<Refused>, _) = (None, FIRST_PAUSE);
        loop {
            let changed = tokio::select! {
                () = cancel.cancelled() => return Ok(()),
                text = file.changed() => Some(text),
                () = tokio::time::sleep(pause), if refused.is_some() => None,
            };
            (refused, pause) = match (changed, refused) {
                (Some(text), _) => (self.read(&path, text).await?, FIRST_PAUSE),
                (None, Some(Refused { next, why })) => (self.take(next, &why).await?, (pause * 2).min(LONGEST_PAUSE)),
                (None, None) => (None, FIRST_PAUSE),
            };
        }
    }

    async fn read(&mut self, path: &Path, text: String) -> anyhow::Result<Option<Refused>> {
        match effective::with_file(&self.given, path, text) {
            Ok(next) => self.take(next, "").await,
            Err(error) => {
                warn!("{error:#}; the configuration from before stays in force");
                Ok(None)
            }
        }
    }

    /// `said`: why nothing could be started with it, if that was said already.
    async fn take(&mut self, next: Effective, said: &str) -> anyhow::Result<Option<Refused>> {
        let path = &self.given.args.file.config.clone().unwrap_or_default();
        let changes = self.current.changes(&next);
        let wants_start = |long: &&String| next.counts(long, self.mode) && !LIVE.contains(&long.as_str());
        let named: Vec<_> = changes.iter().filter(wants_start).map(|long| next.name_of(long)).collect();
        if !named.is_empty() {
            // Whoever ended for what nothing can start with would be started over and over, and fail.
            if let Err(error) = super::could_start(&next, self.mode).await {
                let why = format!("{error:#}");
                if why != said {
                    warn!("{why}; the configuration from before stays in force, and this one is tried again");
                }
                return Ok(Some(Refused { next, why }));
            }
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
                    return Ok(None);
                }
            }
        } else {
            info!(file = %path.display(), "changed, and nothing of effect");
        }
        self.shown.send_replace(next.shown()?.into());
        self.current = next;
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, sync::Mutex};

    use super::{
        super::effective::tests::{given, own, read, theirs},
        *,
    };

    /// What runs in eBPF mode by a file that says this, and the filters that it is told.
    fn running(text: &str) -> (Configuration, Arc<Mutex<Vec<String>>>) {
        let filters = Arc::<Mutex<Vec<String>>>::default();
        let told = Arc::clone(&filters);
        let log: Reload = Arc::new(move |filter| {
            told.lock().unwrap().push(filter.to_owned());
            Ok(())
        });
        let shown = watch::channel(Arc::default()).0;
        let current = read(&[], text).unwrap();
        (Configuration { given: given(&[]), current, log, mode: ProxyMode::Ebpf, shown }, filters)
    }

    #[tokio::test]
    async fn what_nothing_could_start_with_is_no_reason_to_end() {
        let source = tempfile::tempdir().unwrap();
        let path = |path: &Path| path.display().to_string();
        let fields =
            |source: &str, more: &str| own(&format!("source: {source}\nsocketLb: off\nproxyMode: nftables\n{more}"));
        let good = path(source.path());
        let before = fields(&good, "");
        for (text, words) in [
            (
                fields("/nonexistent/objects", ""),
                "/etc/agent.conf:4: source: cannot read the directory /nonexistent/objects",
            ),
            (theirs("clientConnection: {kubeconfig: /nonexistent/kubeconfig}"), ":3: clientConnection.kubeconfig: "),
            (
                own(&format!("source: {good}\nsocketLb: off\nbpffs: /proc/pins")),
                ":6: bpffs: /proc/pins is not on a bpf",
            ),
        ] {
            let (mut configuration, _) = running(&before);
            let next = read(&[], &text).unwrap();
            let error = super::super::could_start(&next, ProxyMode::Ebpf).await.unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
            let refused = configuration.take(next, "").await.unwrap().unwrap();
            assert_eq!((refused.why, configuration.current.file.unwrap().text), (error, before.clone()), "{text}");
        }
        let (mut configuration, _) = running(&before);
        let next = read(&[], &fields(&good, "algorithm: maglev")).unwrap();
        let Err(error) = configuration.take(next, "").await else { panic!("it goes on") };
        assert!(error.to_string().contains("(algorithm): ending"), "{error}");
    }

    #[tokio::test]
    async fn what_nothing_could_start_with_is_tried_again() {
        let dir = tempfile::tempdir().unwrap();
        let (file, later) = (dir.path().join("agent.conf"), dir.path().join("later"));
        let text = |source: &Path| own(&format!("source: {}\nproxyMode: nftables\n", source.display()));
        fs::write(&file, text(dir.path())).unwrap();
        let (mut configuration, _) = running(&theirs("mode: ''"));
        configuration.given = given(&[&format!("--config={}", file.display())]);
        configuration.current = effective::of(&configuration.given).unwrap();
        configuration.mode = ProxyMode::Nftables;
        let following = tokio::spawn(configuration.follow(CancellationToken::new()));

        fs::write(&file, text(&later)).unwrap();
        tokio::time::sleep(FIRST_PAUSE * 4).await;
        assert!(!following.is_finished(), "nothing could start with it");
        fs::create_dir(&later).unwrap();
        let ended = tokio::time::timeout(Duration::from_secs(60), following).await.unwrap().unwrap();
        let error = ended.unwrap_err().to_string();
        assert!(error.contains("(source): ending"), "{error}");
    }

    /// By HTTP or by the file; that says something where it has another level than before.
    #[tokio::test]
    async fn what_is_logged_is_what_was_said_last() {
        let file = |verbosity: u32, more: &str| theirs(&format!("logging: {{verbosity: {verbosity}}}\n{more}"));
        let (mut configuration, filters) = running(&file(2, ""));
        let by_http = super::super::set_verbosity(Arc::clone(&configuration.log));
        let mut by_file =
            async |text: String| configuration.take(read(&[], &text).unwrap(), "").await.unwrap().is_none();
        by_http(6).unwrap();
        assert!(by_file(file(2, "ipvs: {scheduler: lc}")).await);
        assert!(by_file(file(2, "# the same again")).await);
        assert_eq!(*filters.lock().unwrap(), ["info,proxy_agent=trace"], "the file has said nothing of it");
        // Also where it comes to the same filter as the one from before.
        assert!(by_file(file(3, "")).await);
        by_http(4).unwrap();
        assert!(by_file(file(6, "")).await);
        by_http(0).unwrap();
        let last = ["info", "info,proxy_agent=debug", "info,proxy_agent=trace", "info"];
        assert_eq!(filters.lock().unwrap()[1..], last);
    }

    #[tokio::test]
    async fn what_has_no_effect_or_is_logged_is_taken_in() {
        let (mut configuration, filters) = running(&theirs("mode: ''"));
        for text in [
            theirs("mode: ''\nipvs: {scheduler: lc}\nnftables: {masqueradeAll: true}"),
            theirs("mode: ''\nudpIdleTimeout: 250ms\nlogging: {verbosity: 4}"),
            theirs("mode: ''\nlogging: {verbosity: 4}\nenableProfiling: false") + &own("log: {level: warn}"),
        ] {
            assert!(configuration.take(read(&[], &text).unwrap(), "").await.unwrap().is_none());
            assert_eq!(configuration.current.file.as_ref().unwrap().text, text);
            assert_eq!(**configuration.shown.borrow(), configuration.current.shown().unwrap());
        }
        assert_eq!(*filters.lock().unwrap(), ["info,proxy_agent=debug", "warn"]);
    }
}
