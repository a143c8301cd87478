//! Events: that the agent has started, and Services with frontends that are not in force for long, and in force again.
//!
//! A task of its own that looks at the status now and then: the loop never waits for it, and what fails for a moment only is nobody's
//! business. Who writes them is told through a channel that drops what does not fit.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{sync::mpsc, time::sleep};
use tokio_util::sync::CancellationToken;

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
        if self.sender.try_send(notice).is_err() {
            self.counts.dropped();
        }
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
        for notice in following.look(&shared.status(), Instant::now()) {
            shared.options.notices.tell(notice);
        }
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
    /// What is to be told now.
    fn look(&mut self, status: &Status, now: Instant) -> Vec<Notice> {
        let mut notices = Vec::new();
        for (key, unserved) in &*status.unserved {
            let Unserved { uid, frontends, reason } = unserved;
            let lack =
                self.0.entry(key.clone()).or_insert_with(|| Lack { uid: Arc::clone(uid), since: now, told: false });
            if lack.uid != *uid {
                // Another Service of this name.
                *lack = Lack { uid: Arc::clone(uid), since: now, told: false };
            }
            if !lack.told && now.saturating_duration_since(lack.since) >= PATIENCE {
                lack.told = true;
                let many =
                    if *frontends == 1 { "1 frontend is".to_owned() } else { format!("{frontends} frontends are") };
                notices.push(Notice {
                    about: About::Service { key: key.clone(), uid: Arc::clone(uid) },
                    kind: NoticeKind::Warning,
                    reason: "FrontendDegraded",
                    action: "Program",
                    note: format!("node {}: {many} not in force: {reason}", status.node),
                });
            }
        }
        self.0.retain(|key, lack| {
            let lasts = status.unserved.contains_key(key);
            // Nobody hears of a Service that is gone.
            if !lasts && lack.told && status.frontends.values().any(|row| row.spec.service.service == *key) {
                notices.push(Notice {
                    about: About::Service { key: key.clone(), uid: Arc::clone(&lack.uid) },
                    kind: NoticeKind::Normal,
                    reason: "FrontendRecovered",
                    action: "Program",
                    note: format!("node {}: all frontends are in force", status.node),
                });
            }
            lasts
        });
        notices
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
        let good = || FrontendState::Programmed;
        let degraded = status(&[
            ("10.96.0.1", "web", full()),
            ("fd00::1", "web", full()),
            ("10.96.0.2", "shop", full()),
            ("10.96.0.3", "held", held()),
        ]);
        let mut following = Following::default();
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let told = |notices: Vec<Notice>| -> Vec<(String, &'static str, String)> {
            let about = |about| match about {
                About::Service { key, uid } => format!("{key} {uid}"),
                About::Node => String::new(),
            };
            notices.into_iter().map(|notice| (about(notice.about), notice.reason, notice.note)).collect()
        };
        assert_eq!(told(following.look(&degraded, at(0))), []);
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
        assert_eq!(told(following.look(&degraded, at(5))), expected);
        assert_eq!(told(following.look(&degraded, at(60))), []);
        // One is in force again, the other is gone.
        let better = status(&[("10.96.0.1", "web", good()), ("fd00::1", "web", good())]);
        let expected =
            ("default/web uid-web".to_owned(), "FrontendRecovered", "node n1: all frontends are in force".to_owned());
        assert_eq!(told(following.look(&better, at(61))), [expected]);
        assert_eq!(told(following.look(&better, at(70))), []);
        // For a moment only.
        assert_eq!(told(following.look(&degraded, at(80))), []);
        assert_eq!(told(following.look(&better, at(82))), []);
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
