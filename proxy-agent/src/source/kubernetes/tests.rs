//! The loop against a server that misbehaves on purpose; the well-behaved one is real (`tests/tests/api_source.rs`).

use std::{
    convert::Infallible,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use axum::{
    Router,
    body::Body,
    http::{StatusCode, Uri},
    response::{IntoResponse, Response},
};
use futures::{StreamExt, stream};
use serde_json::{Value, json};

use super::*;
use crate::model::index::Index;

/// One request for Services.
#[derive(Clone, Debug)]
struct Asked {
    at: Instant,
    /// The version to watch from; `None`: a list.
    watch: Option<String>,
    fields: bool,
    page: Option<String>,
}

fn parameter(uri: &Uri, name: &str) -> Option<String> {
    let (_, value) = uri.query()?.split('&').filter_map(|pair| pair.split_once('=')).find(|(key, _)| *key == name)?;
    Some(value.to_owned())
}

/// Answers requests for Services as `answer` says, given how many came before of the same sort; the other kinds are well.
struct Server {
    asked: Arc<Mutex<Vec<Asked>>>,
    events: mpsc::Receiver<Event>,
    state: watch::Receiver<SourceState>,
    cancel: CancellationToken,
    _kubeconfig: tempfile::TempDir,
}

impl Server {
    async fn start(answer: impl Fn(&Asked, usize) -> Response + Clone + Send + Sync + 'static) -> Self {
        let asked: Arc<Mutex<Vec<Asked>>> = Arc::default();
        let noted = Arc::clone(&asked);
        let services = move |uri: Uri| {
            let (noted, answer) = (Arc::clone(&noted), answer.clone());
            async move {
                let asked = Asked {
                    at: Instant::now(),
                    watch: parameter(&uri, "watch").and_then(|_| parameter(&uri, "resourceVersion")),
                    fields: parameter(&uri, "fieldSelector").is_some(),
                    page: parameter(&uri, "continue"),
                };
                let mut noted = noted.lock().unwrap();
                let before = noted.iter().filter(|before| before.watch.is_some() == asked.watch.is_some()).count();
                noted.push(asked.clone());
                drop(noted);
                answer(&asked, before)
            }
        };
        let well = |items: Value| {
            move |uri: Uri| {
                let items = items.clone();
                async move { if parameter(&uri, "watch").is_some() { hang(&[]) } else { list("1", "", items) } }
            }
        };
        let router = Router::new()
            .route("/api/v1/services", axum::routing::get(services))
            .route("/apis/discovery.k8s.io/v1/endpointslices", axum::routing::get(well(json!([]))))
            .route(
                "/api/v1/nodes",
                axum::routing::get(well(json!([{"metadata": {"name": "n1", "resourceVersion": "1"}}]))),
            );
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let cancel = CancellationToken::new();
        tokio::spawn(cancel.clone().run_until_cancelled_owned(async { axum::serve(listener, router).await }));

        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kubeconfig");
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{"name": "c", "cluster": {"server": format!("http://{address}")}}],
            "users": [{"name": "c", "user": {}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "c"}}],
        });
        std::fs::write(&path, config.to_string()).unwrap();
        let options = KubernetesOptions { kubeconfig: Some(path), ..KubernetesOptions::default() };
        let (tx, events) = mpsc::channel(64);
        let (state_tx, state) = watch::channel(SourceState::Synced);
        let stop = cancel.clone();
        tokio::spawn(async move { run("n1", false, options, tx, state_tx, &stop).await });
        Self { asked, events, state, cancel, _kubeconfig: dir }
    }

    fn asked(&self) -> Vec<Asked> {
        self.asked.lock().unwrap().clone()
    }

    /// What was said of Services, in words, until `last` is.
    async fn heard(&mut self, last: &str) -> Vec<String> {
        let mut words = Vec::new();
        while words.last().is_none_or(|word| word != last) {
            let event = tokio::time::timeout(Duration::from_secs(5), self.events.recv()).await;
            let name = |service: &crate::model::Service| service.key.name.to_string();
            words.push(match event.unwrap_or_else(|_| panic!("waited for {last} after {words:?}")).unwrap() {
                Event::Services(list) => format!("all: {}", list.iter().map(|s| name(s)).collect::<Vec<_>>().join(" ")),
                Event::Service(service) => name(&service),
                Event::ServiceGone(key) => format!("gone: {}", key.name),
                _ => continue,
            });
        }
        words
    }

    async fn state(&mut self, is: impl FnMut(&SourceState) -> bool) {
        tokio::time::timeout(Duration::from_secs(5), self.state.wait_for(is)).await.expect("that state").unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.cancel.cancel();
    }
}

fn service(name: &str, version: &str) -> Value {
    json!({
        "metadata": {"name": name, "namespace": "ns", "resourceVersion": version},
        "spec": {"clusterIP": "10.0.0.1", "ports": [{"port": 80}]},
    })
}

fn list(version: &str, next: &str, items: Value) -> Response {
    json!({"kind": "List", "metadata": {"resourceVersion": version, "continue": next}, "items": items})
        .to_string()
        .into_response()
}

fn failure(code: u16, message: &str) -> Response {
    let status = json!({"kind": "Status", "status": "Failure", "code": code, "message": message, "reason": ""});
    (StatusCode::from_u16(code).unwrap(), status.to_string()).into_response()
}

fn event(r#type: &str, object: &Value) -> String {
    format!("{}\n", json!({"type": r#type, "object": object}))
}

fn bookmark(version: &str) -> String {
    event("BOOKMARK", &json!({"kind": "Service", "apiVersion": "v1", "metadata": {"resourceVersion": version}}))
}

/// A watch that says these lines and ends.
fn end(lines: &[String]) -> Response {
    Body::from(lines.concat()).into_response()
}

/// A watch that says these lines and then nothing more.
fn hang(lines: &[String]) -> Response {
    let lines: Vec<_> = lines.iter().map(|line| Ok::<_, Infallible>(line.clone())).collect();
    Body::from_stream(stream::iter(lines).chain(stream::pending())).into_response()
}

/// F1, F7: watches that end are taken up where they were, bookmarks counted.
#[tokio::test]
async fn ended_watches_resume() {
    let mut server = Server::start(|asked, before| match (&asked.watch, before) {
        (None, _) => list("10", "", json!([service("a", "5")])),
        (Some(_), 0) => end(&[event("ADDED", &service("b", "11"))]),
        (Some(_), 1) => end(&[bookmark("20")]),
        (Some(_), 2) => end(&[event("DELETED", &service("a", "21"))]),
        (Some(_), _) => hang(&[event("MODIFIED", &service("c", "22"))]),
    })
    .await;
    assert_eq!(server.heard("c").await, ["all: a", "b", "gone: a", "c"]);
    let watches: Vec<_> = server.asked().into_iter().filter_map(|asked| asked.watch).collect();
    assert_eq!(watches, ["10", "11", "20", "21"]);
    server.state(|state| *state == SourceState::Synced).await;
}

/// A server that ends every watch as it begins is not asked ever faster.
#[tokio::test]
async fn watches_that_end_at_once_are_not_hammered() {
    for line in [String::new(), bookmark("11")] {
        let mut server = Server::start({
            let line = line.clone();
            move |asked, _| {
                if asked.watch.is_none() { list("10", "", json!([])) } else { end(std::slice::from_ref(&line)) }
            }
        })
        .await;
        server.heard("all: ").await;
        server.state(|state| *state == SourceState::Synced).await;
        tokio::time::sleep(Duration::from_millis(1500)).await;
        let watches = server.asked().iter().filter(|asked| asked.watch.is_some()).count();
        assert!((2..=17).contains(&watches), "{watches} watches in 1.5 s, {line:?}");
        assert_eq!(*server.state.borrow(), SourceState::Synced, "{line:?}");
    }
}

/// F2: inside the stream and in place of it.
#[tokio::test]
async fn too_old_a_version_means_a_new_list() {
    let expired =
        json!({"kind": "Status", "status": "Failure", "code": 410, "reason": "Expired", "message": "too old"});
    let answers: [Arc<dyn Fn() -> Response + Send + Sync>; 2] =
        [Arc::new(move || end(&[event("ERROR", &expired)])), Arc::new(|| failure(410, "too old"))];
    for gone in answers {
        let mut server = Server::start(move |asked, before| match (&asked.watch, before) {
            (None, 0) => list("10", "", json!([service("a", "5"), service("b", "6")])),
            (None, _) => list("30", "", json!([service("b", "6"), service("c", "25")])),
            (Some(_), 0) => gone(),
            (Some(_), _) => hang(&[]),
        })
        .await;
        // What is missing in the new list goes with it, and not before.
        assert_eq!(server.heard("all: b c").await, ["all: a b", "all: b c"]);
    }
}

/// F3: a loop of 410 is slowed down.
#[tokio::test]
async fn endless_410_backs_off() {
    let mut server =
        Server::start(
            |asked, _| if asked.watch.is_none() { list("10", "", json!([])) } else { failure(410, "too old") },
        )
        .await;
    server.heard("all: ").await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    let asked = server.asked();
    assert!((4..=16).contains(&asked.len()), "{} requests in three seconds", asked.len());
    let gaps: Vec<Duration> = asked.windows(2).map(|pair| pair[1].at - pair[0].at).collect();
    assert!(gaps.iter().max().unwrap() > &Duration::from_millis(400), "{gaps:?}");
}

/// F17: an object that cannot be read is not skipped silently.
#[tokio::test]
async fn what_cannot_be_read_means_a_new_list() {
    for garbage in [
        "{\"type\":\"ADDED\",\"object\":{\"metadata\":7}}\n".to_owned(),
        "nonsense\n".to_owned(),
        // Lines that do not say how far the watch has come.
        event("ADDED", &service("x", "")),
        bookmark(""),
    ] {
        let line = garbage.clone();
        let mut server = Server::start(move |asked, before| match (&asked.watch, before) {
            (None, 0) => list("10", "", json!([service("a", "5")])),
            (None, _) => list("12", "", json!([service("a", "5"), service("b", "11")])),
            (Some(_), 0) => hang(std::slice::from_ref(&line)),
            (Some(_), _) => hang(&[event("ADDED", &service("c", "13"))]),
        })
        .await;
        assert_eq!(server.heard("c").await, ["all: a", "all: a b", "c"], "{garbage}");
        server.state(|state| *state == SourceState::Synced).await;
    }
}

/// F17: an object that cannot be read costs itself alone, in a list (of several pages) and in a watch; its last good state
/// stands, and it is named until it can be read or is gone.
#[tokio::test]
async fn an_object_that_cannot_be_read_costs_itself_alone() {
    fn bad(name: &str, version: &str) -> Value {
        let mut object = service(name, version);
        object["spec"]["ports"] = json!([{"port": {"number": 80}}]);
        object
    }
    let expired = json!({"kind": "Status", "code": 410, "reason": "Expired", "message": "too old"});
    let mut server = Server::start(move |asked, before| match (&asked.watch, before) {
        (None, 0) => list("10", "", json!([service("a", "5"), service("b", "6"), bad("new", "7")])),
        (Some(_), 0) => {
            end(&[event("MODIFIED", &bad("b", "11")), event("ADDED", &service("c", "12")), event("ERROR", &expired)])
        }
        (None, 1) => list("20", "more", json!([service("a", "5"), bad("b", "11")])),
        (None, _) => list("20", "", json!([bad("new", "7"), service("d", "19")])),
        (Some(_), 1) => end(&[event("DELETED", &bad("new", "21")), event("MODIFIED", &service("b", "22"))]),
        (Some(_), _) => hang(&[event("ADDED", &service("last", "23"))]),
    })
    .await;
    let mut index = Index::default();
    let mut seen = Vec::new();
    while !index.snapshot().services.keys().any(|key| &*key.name == "last") {
        let event = tokio::time::timeout(Duration::from_secs(10), server.events.recv()).await;
        let event = event.unwrap_or_else(|_| panic!("no more after {seen:?}")).unwrap();
        index.apply(event, &mut crate::model::index::Touched::default());
        let services: Vec<&str> = index.snapshot().services.keys().map(|key| &*key.name).collect();
        let problems: Vec<String> = index.problems().into_keys().collect();
        let now = format!("{} | {}", services.join(" "), problems.join(", "));
        if seen.last() != Some(&now) {
            seen.push(now);
        }
    }
    assert_eq!(
        seen,
        [
            " | ",
            "a b | ",
            "a b | Service ns/new",
            "a b | Service ns/b, Service ns/new",
            "a b c | Service ns/b, Service ns/new",
            // The list leaves b out and does not take it away; c is gone.
            "a b d | Service ns/b, Service ns/new",
            "a b d | Service ns/b",
            "a b d | ",
            "a b d last | ",
        ]
    );
    // Each went on from what could not be read, too.
    let watches: Vec<_> = server.asked().into_iter().filter_map(|asked| asked.watch).collect();
    assert_eq!(watches, ["10", "20", "22"]);
    server.state(|state| *state == SourceState::Synced).await;
}

/// Old servers know no field selector for cluster IPs; what it would have filtered is filtered here.
#[tokio::test]
async fn a_server_without_the_field_selector() {
    let mut server = Server::start(|asked, _| match (asked.fields, &asked.watch) {
        (true, _) => failure(400, "field label not supported: spec.clusterIP"),
        (false, None) => {
            let mut headless = service("headless", "6");
            headless["spec"]["clusterIP"] = "None".into();
            list("10", "", json!([service("a", "5"), headless]))
        }
        (false, Some(_)) => hang(&[event("ADDED", &service("b", "11"))]),
    })
    .await;
    assert_eq!(server.heard("b").await, ["all: a", "b"]);
    assert_eq!(server.asked().len(), 3);
}

/// Pages are one list; one that breaks off half-way leaves nothing behind.
#[tokio::test]
async fn pages() {
    let mut server = Server::start(|asked, before| match (&asked.watch, asked.page.as_deref()) {
        (None, None) => list("10", "more", json!([service("a", "5")])),
        (None, Some("more")) if before == 1 => failure(410, "the continue token is too old"),
        (None, Some("more")) => list("10", "", json!([service("b", "6")])),
        _ => hang(&[]),
    })
    .await;
    assert_eq!(server.heard("all: a b").await, ["all: a b"]);
}

/// F3: failures are a state, never a deletion.
#[tokio::test]
async fn failures_are_a_state() {
    let mut server = Server::start(|asked, before| match (&asked.watch, before) {
        (None, 0) => failure(503, "starting"),
        (None, _) => list("10", "", json!([service("a", "5")])),
        (Some(_), 0) => end(&[bookmark("11")]),
        (Some(_), 1) => failure(403, "services is forbidden"),
        (Some(_), 2) => failure(500, "etcd is away"),
        (Some(_), _) => hang(&[event("ADDED", &service("b", "12"))]),
    })
    .await;
    let missing = |state: &SourceState, part: &str| matches!(state, SourceState::Listing { missing } if missing.concat().contains(part));
    let stale =
        |state: &SourceState, part: &str| matches!(state, SourceState::Stale { reason } if reason.contains(part));
    server.state(|state| missing(state, "Services: the API server answered 503 starting")).await;
    server.state(|state| stale(state, "system:node-proxier")).await;
    server.state(|state| stale(state, "Services: the API server answered 500 etcd is away")).await;
    assert_eq!(server.heard("b").await, ["all: a", "b"]);
    server.state(|state| *state == SourceState::Synced).await;
    assert_eq!(server.asked().last().unwrap().watch.as_deref(), Some("11"));
}
