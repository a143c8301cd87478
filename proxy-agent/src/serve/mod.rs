//! What the agent answers over HTTP: health for load balancers and kubelets, metrics, and the status report that the CLI reads.
//!
//! It reads the status and never writes anything; a client, however slow, costs one bounded connection.
//!
//! ```text
//! healthz address   /healthz  /livez
//! metrics address   /metrics  /status  /frontends  /proxyMode  /healthz  /livez
//! node ports        whatever is asked: a Service's endpoints here (those that ask for it)
//! ```

use std::{
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use axum::{
    Json, Router,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use tokio::{
    sync::{mpsc, watch},
    task::{JoinError, JoinSet},
};
use tokio_util::sync::CancellationToken;
use tracing::warn;

mod checks;
pub mod health;
mod listen;
pub mod metrics;

pub use metrics::{Event, Probe, Readings};

use crate::{
    model::Warning,
    status::{Status, report},
};

#[derive(Clone)]
pub struct Options {
    /// `None`: not served.
    pub healthz: Option<SocketAddr>,
    pub metrics: Option<SocketAddr>,
    /// An address that cannot be had ends the process instead of being tried again (contract A122).
    pub bind_address_hard_fail: bool,
    /// A change that waits twice as long makes the node unhealthy (contract A117).
    pub sync_period: Duration,
    /// For the report: whose sockets are translated at connect time, where any can be.
    pub socket_lb: Option<&'static str>,
    /// For the report, so that a reader of other pins notices; `None`: there are none.
    pub bpffs: Option<PathBuf>,
    /// Reads what only the kernel knows; called at every scrape.
    pub probe: Probe,
    /// What users of the cluster should hear of their Services.
    pub warnings: mpsc::Sender<Warning>,
}

#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error("cannot listen on {addr} for {what}: {source}; free the address or choose another with {option}")]
    Bind { what: &'static str, addr: SocketAddr, option: &'static str, source: std::io::Error },
    #[error("the HTTP server ended early: {0}")]
    Ended(#[from] JoinError),
}

struct Shared {
    status: watch::Receiver<Arc<Status>>,
    options: Options,
    metrics: metrics::Metrics,
    /// Health-check node ports that are open, and those that cannot be.
    ports: Mutex<report::CheckPorts>,
}

impl Shared {
    fn status(&self) -> Arc<Status> {
        Arc::clone(&self.status.borrow())
    }

    fn check_ports(&self) -> report::CheckPorts {
        self.ports.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn health(&self) -> health::Health {
        health::judge(&self.status(), self.options.sync_period, std::time::Instant::now(), std::time::SystemTime::now())
    }
}

/// Serves until cancelled.
pub async fn run(
    options: Options,
    status: watch::Receiver<Arc<Status>>,
    cancel: CancellationToken,
) -> Result<(), ServeError> {
    let (healthz, metrics) = (options.healthz, options.metrics);
    let hard_fail = options.bind_address_hard_fail;
    let metrics_of = metrics::Metrics::new(options.probe.clone());
    let shared = Arc::new(Shared { status, metrics: metrics_of, options, ports: Mutex::default() });

    let mut servers = JoinSet::new();
    let checks = checks::run(Arc::clone(&shared), cancel.clone());
    servers.spawn(async {
        checks.await;
        Ok(())
    });
    if let Some(addr) = healthz {
        let place = listen::Place { what: "health checks", addr, option: "--healthz-bind-address" };
        servers.spawn(listen::serve(place, hard_fail, health_routes(Arc::clone(&shared)), cancel.clone()));
    }
    if let Some(addr) = metrics {
        let place = listen::Place { what: "metrics", addr, option: "--metrics-bind-address" };
        servers.spawn(listen::serve(place, hard_fail, metrics_routes(shared), cancel.clone()));
    }
    while let Some(ended) = servers.join_next().await {
        ended??;
    }
    // With nothing to serve this task still lasts as long as the others: one that ends early ends the process.
    cancel.cancelled().await;
    Ok(())
}

fn health_routes(shared: Arc<Shared>) -> Router {
    Router::new().route("/healthz", get(healthz)).route("/livez", get(livez)).with_state(shared)
}

fn metrics_routes(shared: Arc<Shared>) -> Router {
    Router::new()
        .route("/metrics", get(scrape))
        .route("/status", get(report))
        .route("/frontends", get(frontends))
        .route("/proxyMode", get(async |State(shared): State<Arc<Shared>>| shared.status().mode))
        .with_state(Arc::clone(&shared))
        .merge(health_routes(shared))
}

async fn healthz(State(shared): State<Arc<Shared>>) -> Response {
    let health = shared.health();
    let answer = answer(health.healthz(), health.healthz_body());
    shared.metrics.count_healthz(answer.status());
    answer
}

async fn livez(State(shared): State<Arc<Shared>>) -> Response {
    let health = shared.health();
    let answer = answer(health.livez(), health.livez_body());
    shared.metrics.count_livez(answer.status());
    answer
}

fn answer(healthy: bool, body: health::Body) -> Response {
    let code = if healthy { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (code, [(header::X_CONTENT_TYPE_OPTIONS, "nosniff")], Json(body)).into_response()
}

async fn report(State(shared): State<Arc<Shared>>) -> Response {
    let health = shared.health();
    let ports = shared.check_ports();
    let Options { socket_lb, bpffs, .. } = &shared.options;
    let report = report::Report::new(&shared.status(), health.livez(), *socket_lb, bpffs.as_deref(), &ports);
    Json(report).into_response()
}

async fn frontends(State(shared): State<Arc<Shared>>) -> Response {
    Json(report::InForce::all(&shared.status())).into_response()
}

async fn scrape(State(shared): State<Arc<Shared>>) -> Response {
    // Maps are read with blocking system calls; health checks must not wait for them.
    let text =
        tokio::task::spawn_blocking(move || shared.metrics.encode(&shared.status(), &shared.check_ports())).await;
    match text {
        Ok(Ok(text)) => ([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response(),
        Ok(Err(error)) => failed(&error),
        Err(error) => failed(&error),
    }
}

fn failed(error: &dyn std::error::Error) -> Response {
    warn!(%error, "metrics could not be written");
    (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response()
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::{TcpListener, TcpStream},
        time::{sleep, timeout},
    };

    use super::*;
    use crate::{
        dataplane::Failure,
        desired::{FamilyCheck, HealthCheck, HealthChecks, health_doors},
        model::{Family, ServiceKey},
        status::{FrontendState, SourceState, report::tests::frontend},
    };

    async fn free_address() -> SocketAddr {
        TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap()
    }

    async fn options() -> Options {
        Options {
            healthz: Some(free_address().await),
            metrics: Some(free_address().await),
            bind_address_hard_fail: false,
            sync_period: Duration::from_secs(30),
            socket_lb: Some("all"),
            bpffs: Some("/sys/fs/bpf/test".into()),
            probe: Arc::new(|| Ok(Readings::default())),
            warnings: mpsc::channel(8).0,
        }
    }

    /// Status line and body. Whoever had the address before may still take a connection and drop it.
    async fn get(addr: Option<SocketAddr>, path: &str) -> (String, String) {
        loop {
            match exchange(addr.unwrap(), path).await {
                Ok(answer) if !answer.is_empty() => {
                    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
                    return (head.lines().next().unwrap().to_owned(), body.to_owned());
                }
                _ => sleep(Duration::from_millis(10)).await,
            }
        }
    }

    async fn exchange(addr: SocketAddr, path: &str) -> std::io::Result<String> {
        let mut stream = TcpStream::connect(addr).await?;
        stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes()).await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        Ok(answer)
    }

    #[tokio::test]
    async fn answers_on_both_addresses() {
        let options = options().await;
        let (status, watched) = watch::channel(Arc::new(Status::starting("ebpf", "n1".into())));
        let cancel = CancellationToken::new();
        let server = tokio::spawn(run(options.clone(), watched, cancel.clone()));

        assert_eq!(get(options.healthz, "/healthz").await.0, "HTTP/1.1 503 Service Unavailable");
        assert_eq!(get(options.healthz, "/livez").await.0, "HTTP/1.1 200 OK");
        let ready = Status { ready: true, source: SourceState::Synced, ..Status::starting("ebpf", "n1".into()) };
        status.send_replace(Arc::new(ready));
        let (line, body) = get(options.healthz, "/healthz").await;
        assert_eq!(line, "HTTP/1.1 200 OK");
        assert!(body.contains("lastUpdated"), "{body}");

        assert_eq!(get(options.metrics, "/proxyMode").await.1, "ebpf");
        let (_, body) = get(options.metrics, "/status").await;
        assert_eq!(serde_json::from_str::<report::Report>(&body).unwrap().node, "n1");
        assert_eq!(get(options.metrics, "/frontends").await.1, "[]");
        let (_, body) = get(options.metrics, "/metrics").await;
        assert!(body.contains("kubeproxy_proxy_healthz_total{code=\"503\"} 1"), "{body}");
        assert_eq!(get(options.healthz, "/metrics").await.0, "HTTP/1.1 404 Not Found");

        cancel.cancel();
        server.await.unwrap().unwrap();
    }

    fn checks(ports: &[(&str, u16, usize)]) -> Arc<HealthChecks> {
        let check = |&(name, port, local): &(&str, u16, usize)| {
            let listen = |family| vec![if family == Family::V4 { "127.0.0.1" } else { "::1" }.parse().unwrap()];
            let family =
                |family| (family, FamilyCheck { listen: listen(family), local: local * (family as usize + 1) });
            let families = Family::BOTH.map(family).into();
            let check = HealthCheck { uid: "u".into(), port: port.try_into().unwrap(), families };
            (ServiceKey::new("default", name), check)
        };
        Arc::new(ports.iter().map(check).collect())
    }

    /// A server that is told what to be ready for.
    struct Told {
        status: watch::Sender<Arc<Status>>,
        warned: mpsc::Receiver<Warning>,
        metrics: Option<SocketAddr>,
        cancel: CancellationToken,
    }

    impl Told {
        async fn new() -> Self {
            let (warnings, warned) = mpsc::channel(8);
            let options = Options { healthz: None, warnings, ..options().await };
            let (status, watched) = watch::channel(Arc::new(Status::starting("ebpf", "n1".into())));
            let (cancel, metrics) = (CancellationToken::new(), options.metrics);
            tokio::spawn(run(options, watched, cancel.clone()));
            Self { status, warned, metrics, cancel }
        }

        fn tell(&self, ready: bool, ports: &[(&str, u16, usize)]) {
            let (health_checks, source) = (checks(ports), SourceState::Synced);
            // As the sync loop has it: the same value as long as the same ports are asked for.
            let before = Arc::clone(&self.status.borrow().health_doors);
            let doors = health_doors(&health_checks);
            let health_doors = if *before == doors { before } else { Arc::new(doors) };
            self.status.send_replace(Arc::new(Status {
                ready,
                health_checks,
                health_doors,
                source,
                ..Status::starting("ebpf", "n1".into())
            }));
        }
    }

    async fn is_closed(addr: SocketAddr) -> bool {
        for _ in 0..100 {
            if TcpStream::connect(addr).await.is_err() {
                return true;
            }
            sleep(Duration::from_millis(20)).await;
        }
        false
    }

    /// A111-A114: the answer is kube-proxy's, and ports come, move and go.
    #[tokio::test]
    async fn health_check_ports_follow_the_status() {
        let told = Told::new().await;
        let (v4, other) = (free_address().await, free_address().await);
        let v6 = SocketAddr::new("::1".parse().unwrap(), v4.port());
        told.tell(true, &[("web", v4.port(), 1)]);
        let (line, body) = get(Some(v4), "/any/path").await;
        assert_eq!(line, "HTTP/1.1 200 OK");
        let expected = "{\n\t\"service\": {\n\t\t\"namespace\": \"default\",\n\t\t\"name\": \"web\"\n\t},\n\t\"localEndpoints\": 1,\n\t\"serviceProxyHealthy\": true\n}";
        assert_eq!(body, expected);
        let head = exchange(v6, "/").await.unwrap();
        for header in
            ["Content-Type: application/json", "X-Content-Type-Options: nosniff", "X-Load-Balancing-Endpoint-Weight: 2"]
        {
            assert!(head.contains(&format!("{header}\r\n")), "{head}");
        }

        told.tell(true, &[("web", v4.port(), 0)]);
        let (line, body) = get(Some(v4), "/").await;
        assert!(
            line.contains("503") && body.contains("\"localEndpoints\": 0") && body.contains("true"),
            "{line} {body}"
        );
        told.tell(false, &[("web", v4.port(), 1)]);
        let (line, body) = get(Some(v4), "/").await;
        assert!(
            line.contains("503") && body.contains("\"localEndpoints\": 1") && body.contains("false"),
            "{line} {body}"
        );

        // What is not in force as planned is nothing to send traffic to, in its family.
        let mut degraded = Status::clone(&told.status.borrow());
        degraded.ready = true;
        let full = |(addr, name)| frontend(addr, name, FrontendState::Degraded(Failure::Retry("full".into())));
        degraded.frontends = Arc::new([("10.96.0.1", "web"), ("fd00::1", "other")].map(full).into());
        degraded.degraded = Arc::new(Status::degraded_of(&degraded.frontends));
        told.status.send_replace(Arc::new(degraded));
        let (line, body) = get(Some(v4), "/").await;
        assert!(line.contains("503") && body.contains("\"serviceProxyHealthy\": false"), "{line} {body}");
        assert!(get(Some(v6), "/").await.0.contains("200"));

        // The port passes from one Service to another, which had it elsewhere.
        told.tell(true, &[("web", v4.port(), 1), ("shop", other.port(), 1)]);
        assert!(get(Some(other), "/").await.1.contains("shop"));
        told.tell(true, &[("shop", v4.port(), 1)]);
        assert!(is_closed(other).await, "{other} is still open");
        assert!(get(Some(v4), "/").await.1.contains("shop"));
        told.tell(true, &[]);
        assert!(is_closed(v4).await && is_closed(v6).await, "{v4} is still open");
        told.cancel.cancel();
    }

    /// A115: said once, tried again, and nothing to the others.
    #[tokio::test]
    async fn a_health_check_port_that_is_taken_is_said_and_tried_again() {
        let mut told = Told::new().await;
        let (taken, free) = (TcpListener::bind("127.0.0.1:0").await.unwrap(), free_address().await);
        let addr = taken.local_addr().unwrap();
        told.tell(true, &[("web", addr.port(), 1), ("shop", free.port(), 1)]);
        assert!(get(Some(free), "/").await.0.contains("200"));
        let warning = told.warned.recv().await.unwrap();
        assert_eq!(
            (warning.service.to_string().as_str(), warning.reason),
            ("default/web", "FailedToStartServiceHealthcheck")
        );
        assert!(warning.note.contains("Address already in use") && warning.note.contains("n1"), "{}", warning.note);
        let (_, body) = get(told.metrics, "/status").await;
        let report: report::Report = serde_json::from_str(&body).unwrap();
        let shown: Vec<_> =
            report.health_checks.iter().map(|check| (check.listening.len(), check.failed.len())).collect();
        assert_eq!(shown, [(2, 0), (1, 1)], "{report:?}");
        assert!(report.problems["Service default/web"][0].contains("free the port"), "{report:?}");
        let (_, metrics) = get(told.metrics, "/metrics").await;
        assert!(metrics.contains("proxy_agent_health_check_ports{state=\"failed\"} 1"), "{metrics}");

        drop(taken);
        let answer = timeout(Duration::from_secs(10), get(Some(addr), "/")).await.unwrap();
        assert!(answer.1.contains("web"), "{answer:?}");
        let (_, body) = get(told.metrics, "/status").await;
        assert!(serde_json::from_str::<report::Report>(&body).unwrap().problems.is_empty());
        assert!(told.warned.try_recv().is_err(), "said twice");
        told.cancel.cancel();
    }

    #[tokio::test]
    async fn a_taken_address_is_tried_again_or_ends_the_process() {
        let options = options().await;
        let taken = TcpListener::bind(options.healthz.unwrap()).await.unwrap();
        let (_status, watched) = watch::channel(Arc::new(Status::starting("ebpf", "n1".into())));

        let strict = Options { bind_address_hard_fail: true, ..options.clone() };
        let error = run(strict, watched.clone(), CancellationToken::new()).await.unwrap_err().to_string();
        assert!(error.contains("--healthz-bind-address") && error.contains("Address already in use"), "{error}");

        let cancel = CancellationToken::new();
        let server = tokio::spawn(run(options.clone(), watched, cancel.clone()));
        assert_eq!(get(options.metrics, "/livez").await.0, "HTTP/1.1 200 OK", "the other address is served meanwhile");
        drop(taken);
        assert_eq!(get(options.healthz, "/livez").await.0, "HTTP/1.1 200 OK");
        cancel.cancel();
        server.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn silent_clients_do_not_keep_others_out() {
        let options = options().await;
        let (_status, watched) = watch::channel(Arc::new(Status::starting("ebpf", "n1".into())));
        let cancel = CancellationToken::new();
        let server = tokio::spawn(run(options.clone(), watched, cancel.clone()));
        get(options.healthz, "/livez").await;

        let mut silent = Vec::new();
        for _ in 0..300 {
            silent.push(TcpStream::connect(options.healthz.unwrap()).await.unwrap());
        }
        let started = Instant::now();
        let answer = timeout(Duration::from_secs(25), get(options.healthz, "/livez")).await;
        assert_eq!(answer.map(|(line, _)| line).unwrap(), "HTTP/1.1 200 OK", "after {:?}", started.elapsed());
        cancel.cancel();
        server.await.unwrap().unwrap();
    }
}
