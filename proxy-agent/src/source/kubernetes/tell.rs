//! Events: what users of the cluster should hear of this node, where they look for it (`kubectl describe node`, `describe service`).
//!
//! The only thing that is ever written to the API server. Nothing depends on it: what cannot be written is in the agent's log and
//! in its status, and is counted.
//!
//! - What is said again within six minutes is no further Event but one more of a series, as with kube-proxy's library.
//! - No more than [`BURST`] at once, and one each second after that: a thousand Services that fail for one reason tell it often enough.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use k8s_openapi::jiff::Timestamp;
use kube::{
    Error,
    api::{Patch, PatchParams, PostParams},
    core::Request,
};
use serde_json::{Value, json};
use tokio::{
    sync::mpsc,
    time::{sleep, timeout},
};
use tracing::{debug, warn};

use super::connect::Connector;
use crate::{
    model::{About, Notice, NoticeKind, ServiceKey},
    source::KubernetesOptions,
    status::requests::EventCounts,
};

/// As kubectl shows it for the source of an Event.
const CONTROLLER: &str = "proxy-agent";
const ANSWER: Duration = Duration::from_secs(10);
/// How long an Event may be gone on with as a series.
const SERIES: Duration = Duration::from_secs(360);
const BURST: u32 = 30;
/// After so long one more may be written.
const PACE: Duration = Duration::from_secs(1);

/// Seconds before it is tried again where the API server does not answer, or not now: at the start of a node it may come later than we do.
const AGAIN: [u64; 5] = [1, 2, 4, 8, 16];

/// Writes what comes until nobody sends any more. The API server is not spoken to before there is something to say.
pub(in crate::source) async fn tell(
    node: &str,
    options: KubernetesOptions,
    notices: &mut mpsc::Receiver<Notice>,
    counts: &EventCounts,
) {
    let mut recorder = Recorder { node, options, connector: None, written: HashMap::new() };
    let mut ration = Ration { left: BURST, at: Instant::now() };
    while let Some(notice) = notices.recv().await {
        let outcome = if ration.take(Instant::now()) {
            recorder.insist(&notice).await
        } else {
            Err("too many at once".to_owned())
        };
        match outcome {
            Ok(()) => {
                debug!(about = ?notice.about, reason = notice.reason, "Event written");
                counts.written();
            }
            Err(why) => {
                warn!(about = ?notice.about, reason = notice.reason, note = notice.note, "no Event could be written: {why}");
                counts.dropped();
            }
        }
    }
}

struct Ration {
    left: u32,
    /// Since when more may have come.
    at: Instant,
}

impl Ration {
    fn take(&mut self, now: Instant) -> bool {
        let more = u32::try_from(now.saturating_duration_since(self.at).as_secs() / PACE.as_secs()).unwrap_or(BURST);
        if more > 0 {
            self.left = self.left.saturating_add(more).min(BURST);
            self.at = now;
        }
        self.left > 0 && {
            self.left -= 1;
            true
        }
    }
}

/// An Event that stands.
struct Written {
    name: String,
    count: u32,
    at: Instant,
}

struct Recorder<'a> {
    node: &'a str,
    options: KubernetesOptions,
    connector: Option<Connector>,
    written: HashMap<Notice, Written>,
}

impl Recorder<'_> {
    /// Several times if need be. What comes meanwhile waits in the channel.
    async fn insist(&mut self, notice: &Notice) -> Result<(), String> {
        for pause in AGAIN.map(Duration::from_secs) {
            match self.write(notice).await {
                Err(error) if may_pass(&error) => debug!(%error, ?pause, "no Event written; trying again"),
                done => return done.map_err(|error| error.to_string()),
            }
            sleep(pause).await;
        }
        self.write(notice).await.map_err(|error| error.to_string())
    }

    async fn write(&mut self, notice: &Notice) -> Result<(), Error> {
        let now = Timestamp::now();
        self.written.retain(|_, written| written.at.elapsed() < SERIES);
        let path = format!("/apis/events.k8s.io/v1/namespaces/{}/events", namespace(&notice.about));
        if let Some(Written { name, count, .. }) = self.written.get(notice) {
            let (name, count) = (name.clone(), count + 1);
            let series = json!({"series": {"count": count, "lastObservedTime": format!("{now:.6}")}});
            let request = Request::new(path.clone()).patch(&name, &PatchParams::default(), &Patch::Merge(series));
            match self.send(request.map_err(Error::BuildRequest)?).await {
                Ok(()) => {
                    self.written.insert(notice.clone(), Written { name, count, at: Instant::now() });
                    return Ok(());
                }
                // Its time was up there: it is told anew.
                Err(Error::Api(status)) if status.code == 404 => {}
                Err(error) => return Err(error),
            }
        }
        let body = event(self.node, notice, now);
        let request = Request::new(path).create(&PostParams::default(), body.to_string().into_bytes());
        self.send(request.map_err(Error::BuildRequest)?).await?;
        let name = body.pointer("/metadata/name").and_then(Value::as_str).unwrap_or_default().to_owned();
        self.written.insert(notice.clone(), Written { name, count: 1, at: Instant::now() });
        Ok(())
    }

    /// All of it within the time for an answer: a plugin that gives credentials may hang, too.
    async fn send(&mut self, request: axum::http::Request<Vec<u8>>) -> Result<(), Error> {
        let answer = timeout(ANSWER, async {
            let connector = match &mut self.connector {
                Some(connector) => {
                    // Tokens age while nothing happens.
                    connector.renew().await;
                    connector
                }
                None => {
                    let connector = Connector::new(self.options.clone()).await;
                    self.connector.insert(connector.map_err(|error| Error::Service(error.into()))?)
                }
            };
            connector.client().await.request_text(request).await
        });
        answer.await.map_err(|late| Error::Service(late.into()))?.map(drop)
    }
}

/// Whether the same may be taken later: there was no answer, or one that says so.
fn may_pass(error: &Error) -> bool {
    match error {
        Error::Api(status) => status.code == 429 || status.code >= 500,
        Error::BuildRequest(_) => false,
        _ => true,
    }
}

/// Of what has none Events are written to this one, where kubectl looks for them.
fn namespace(about: &About) -> &str {
    match about {
        About::Node => "default",
        About::Service { key, uid: _ } => &key.namespace,
    }
}

fn event(node: &str, notice: &Notice, now: Timestamp) -> Value {
    let Notice { about, kind, reason, action, note } = notice;
    let (name, regarding) = match about {
        // kubectl looks for Events of a Node by this for its uid, as the kubelet and kube-proxy write them.
        About::Node => (node, json!({"apiVersion": "v1", "kind": "Node", "name": node, "uid": node})),
        About::Service { key: ServiceKey { namespace, name }, uid } => {
            let uid = (!uid.is_empty()).then_some(&**uid);
            let regarding =
                json!({"apiVersion": "v1", "kind": "Service", "namespace": &**namespace, "name": &**name, "uid": uid});
            (&**name, regarding)
        }
    };
    json!({
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"namespace": namespace(about), "name": format!("{name}.{:x}", now.as_nanosecond())},
        "eventTime": format!("{now:.6}"),
        "reportingController": CONTROLLER,
        "reportingInstance": instance(node),
        "type": match kind {
            NoticeKind::Normal => "Normal",
            NoticeKind::Warning => "Warning",
        },
        "reason": reason,
        "action": action,
        "regarding": regarding,
        "note": shortened(note),
    })
}

/// The API takes 128 bytes.
fn instance(node: &str) -> String {
    cut(&format!("{CONTROLLER}-{node}"), 128).to_owned()
}

/// The API takes 1024 bytes.
fn shortened(note: &str) -> &str {
    cut(note, 1024)
}

fn cut(text: &str, bytes: usize) -> &str {
    text.get(..text.floor_char_boundary(bytes)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn an_event_says_who_where_and_what() {
        let key = ServiceKey::new("shop", "web");
        let notice = Notice {
            about: About::Service { key, uid: Arc::from("u1") },
            kind: NoticeKind::Warning,
            reason: "FailedToStartServiceHealthcheck",
            action: "Listen",
            note: "ä".repeat(2000),
        };
        let told = event("n1", &notice, Timestamp::UNIX_EPOCH);
        assert_eq!(told["regarding"]["uid"], "u1");
        assert_eq!(told["metadata"], json!({"namespace": "shop", "name": "web.0"}));
        assert_eq!(told["eventTime"], "1970-01-01T00:00:00.000000Z");
        assert_eq!(told["reportingInstance"], "proxy-agent-n1");
        assert_eq!(told["type"], "Warning");
        assert_eq!(told["note"].as_str().unwrap().len(), 1024);
        assert_eq!(instance(&"n".repeat(250)).len(), 128);
        let told =
            event("n1", &Notice { about: About::Node, kind: NoticeKind::Normal, ..notice }, Timestamp::UNIX_EPOCH);
        assert_eq!(told["regarding"], json!({"apiVersion": "v1", "kind": "Node", "name": "n1", "uid": "n1"}));
        assert_eq!((&told["metadata"]["namespace"], &told["type"]), (&json!("default"), &json!("Normal")));
    }

    #[test]
    fn no_more_than_a_burst_and_one_a_second() {
        let start = Instant::now();
        let mut ration = Ration { left: BURST, at: start };
        let mut taken = |after| (0..100).filter(|_| ration.take(start + Duration::from_secs(after))).count();
        assert_eq!(taken(0), 30);
        assert_eq!(taken(0), 0);
        assert_eq!(taken(2), 2);
        assert_eq!(taken(1_000_000), 30);
    }
}
