//! Events: that the agent has started, and Services with frontends that are not in force for long, and in force again.
//!
//! A task of its own that looks at the status now and then: the loop never waits for it, and what fails for a moment only is nobody's
//! business. Who writes them is told through a channel that drops what does not fit.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{sync::mpsc, time::sleep};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::Shared;
use crate::{
    model::{About, Notice, NoticeKind, ServiceKey},
    status::{Status, Unserved, requests::EventCounts},
};

/// Between two looks.
const LOOK: Duration = Duration::from_secs(2);
/// So long a frontend may be missing before its owner hears of it.
const PATIENCE: Duration = Duration::from_secs(5);

/// To whoever can tell users of the cluster.
#[derive(Clone, Debug)]
pub struct Notices {
    pub sender: mpsc::Sender<Notice>,
    pub counts: Arc<EventCounts>,
}

impl Notices {
    /// Waits for nobody: what is more than anybody reads is in the log and the status.
    pub(super) fn tell(&self, notice: Notice) {
        if let Err(error) = self.sender.try_send(notice) {
            let Notice { about, reason, note, .. } = error.into_inner();
            warn!(?about, reason, note, "no Event could be written: too many wait");
            self.counts.dropped();
        }
    }

    /// Whether it was taken. If not, it may be offered again.
    fn offer(&self, notice: Notice) -> bool {
        self.sender.try_send(notice).is_ok()
    }
}

pub(super) async fn run(shared: Arc<Shared>, cancel: CancellationToken) {
    shared.options.notices.tell(starting(&shared.status()));
    let mut following = Following::default();
    loop {
        tokio::select! {
            () = cancel.cancelled() => return,
            () = sleep(LOOK) => {}
        }
        following.look(&shared.status(), Instant::now(), |notice| shared.options.notices.offer(notice));
    }
}

/// Contract A145.
fn starting(status: &Status) -> Notice {
    Notice {
        about: About::Node,
        kind: NoticeKind::Normal,
        reason: "Starting",
        action: "Start",
        note: format!("proxy-agent {}, mode {}", env!("CARGO_PKG_VERSION"), status.mode),
    }
}

/// What is known of Services that lack something.
#[derive(Default)]
struct Following(BTreeMap<ServiceKey, Lack>);

struct Lack {
    uid: Arc<str>,
    since: Instant,
    told: bool,
}

impl Following {
    /// Offers what is to be told now; what is not taken is offered again by the next look.
    fn look(&mut self, status: &Status, now: Instant, mut offer: impl FnMut(Notice) -> bool) {
        for (key, unserved) in &*status.unserved {
            let Unserved { uid, frontends, reason } = unserved;
            let lack =
                self.0.entry(key.clone()).or_insert_with(|| Lack { uid: Arc::clone(uid), since: now, told: false });
            if lack.uid != *uid {
                // Another Service of this name.
                *lack = Lack { uid: Arc::clone(uid), since: now, told: false };
            }
            if !lack.told && now.saturating_duration_since(lack.since) >= PATIENCE {
                let many =
                    if *frontends == 1 { "1 frontend is".to_owned() } else { format!("{frontends} frontends are") };
                lack.told = offer(Notice {
                    about: About::Service { key: key.clone(), uid: Arc::clone(uid) },
                    kind: NoticeKind::Warning,
                    reason: "FrontendDegraded",
                    action: "Program",
                    note: format!("node {}: {many} not in force: {reason}", status.node),
                });
            }
        }
        let ended = |key: &ServiceKey, lack: &Lack| lack.told && !status.unserved.contains_key(key);
        // Nobody hears of a Service that is gone.
        let there: BTreeSet<&ServiceKey> = if self.0.iter().any(|(key, lack)| ended(key, lack)) {
            status.frontends.values().map(|row| &row.spec.service.service).collect()
        } else {
            BTreeSet::new()
        };
        self.0.retain(|key, lack| {
            let recovered = || Notice {
                about: About::Service { key: key.clone(), uid: Arc::clone(&lack.uid) },
                kind: NoticeKind::Normal,
                reason: "FrontendRecovered",
                action: "Program",
                note: format!("node {}: all frontends are in force", status.node),
            };
            let waits = ended(key, lack) && there.contains(key) && !offer(recovered());
            waits || status.unserved.contains_key(key)
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        dataplane::Failure,
        status::{FrontendState, report::tests::frontend},
    };

    fn status(names: &[(&str, &str, FrontendState)]) -> Status {
        let frontends: BTreeMap<_, _> =
            names.iter().map(|(addr, name, state)| frontend(addr, name, state.clone())).collect();
        let uid = |key: &ServiceKey| Some(Arc::from(format!("uid-{}", key.name)));
        let unserved = Arc::new(Status::unserved_of(&frontends, uid));
        Status { frontends: Arc::new(frontends), unserved, ..Status::starting("ebpf", "n1".into()) }
    }

    #[test]
    fn what_lasts_is_told_once_and_so_is_its_end() {
        let full = || FrontendState::Degraded(Failure::Retry("the map is full".into()));
        let held = || FrontendState::Degraded(Failure::Held("cannot be read".into()));
        // Every node would say so, for as long as there is the Service.
        let never = || FrontendState::Degraded(Failure::Unsupported("SCTP is not served".into()));
        let good = || FrontendState::Programmed;
        let degraded = status(&[
            ("10.96.0.1", "web", full()),
            ("fd00::1", "web", full()),
            ("10.96.0.2", "shop", full()),
            ("10.96.0.3", "held", held()),
            ("10.96.0.4", "never", never()),
        ]);
        let mut following = Following::default();
        let start = Instant::now();
        // What is told by a look of which only so many Events are taken.
        let mut look = |status: &Status, seconds: u64, room: usize| {
            let mut told: Vec<(String, &'static str, String)> = Vec::new();
            following.look(status, start + Duration::from_secs(seconds), |notice| {
                let about = match notice.about {
                    About::Service { key, uid } => format!("{key} {uid}"),
                    About::Node => String::new(),
                };
                let is_taken = told.len() < room;
                if is_taken {
                    told.push((about, notice.reason, notice.note));
                }
                is_taken
            });
            told
        };
        assert_eq!(look(&degraded, 0, 9), []);
        let expected = [
            (
                "default/shop uid-shop".to_owned(),
                "FrontendDegraded",
                "node n1: 1 frontend is not in force: the map is full".to_owned(),
            ),
            (
                "default/web uid-web".to_owned(),
                "FrontendDegraded",
                "node n1: 2 frontends are not in force: the map is full".to_owned(),
            ),
        ];
        // What is not taken is told by a later look, and once.
        assert_eq!(look(&degraded, 5, 1), expected[..1]);
        assert_eq!(look(&degraded, 7, 0), []);
        assert_eq!(look(&degraded, 9, 9), expected[1..]);
        assert_eq!(look(&degraded, 60, 9), []);
        // One is in force again, the other is gone.
        let better = status(&[("10.96.0.1", "web", good()), ("fd00::1", "web", good())]);
        let expected =
            ("default/web uid-web".to_owned(), "FrontendRecovered", "node n1: all frontends are in force".to_owned());
        assert_eq!(look(&better, 61, 0), []);
        assert_eq!(look(&better, 63, 9), [expected]);
        assert_eq!(look(&better, 70, 9), []);
        // For a moment only.
        assert_eq!(look(&degraded, 80, 9), []);
        assert_eq!(look(&better, 82, 9), []);
    }

    #[test]
    fn what_nobody_takes_is_counted() {
        let (sender, mut receiver) = mpsc::channel(1);
        let notices = Notices { sender, counts: Arc::default() };
        let notice = starting(&Status::starting("ebpf", "n1".into()));
        notices.tell(notice.clone());
        notices.tell(notice.clone());
        assert_eq!(receiver.try_recv(), Ok(notice));
        assert_eq!(notices.counts.counts(), [("written", 0), ("dropped", 1)]);
    }
}
