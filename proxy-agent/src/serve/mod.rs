//! What the agent answers over HTTP: health for load balancers and kubelets, metrics, and the status report that the CLI reads.
//!
//! It reads the status, and changes nothing but how much is logged; a client, however slow, costs one bounded connection.
//!
//! ```text
//! healthz address   /healthz  /livez
//! metrics address   /metrics  /metrics/slis  /status  /frontends  /proxyMode  /healthz  /livez
//!                   /configz  /flagz  /statusz  and /debug/flags/v, if asked for
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
    routing::{any, get},
};
use tokio::{
    sync::watch,
    task::{JoinError, JoinSet},
};
use tokio_util::sync::CancellationToken;
use tracing::warn;

mod checks;
mod exposition;
pub mod health;
mod listen;
pub mod metrics;
mod notices;
mod process;
mod upstream;
mod zpages;

pub use metrics::{Event, Probe, Readings};
pub use notices::Notices;
pub use zpages::{SetVerbosity, Shown};

use crate::status::{Status, report, requests::Requests};

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
    /// What the API server was asked.
    pub requests: Arc<Requests>,
    /// What users of the cluster should hear.
    pub notices: Notices,
    /// What is in force.
    pub configuration: watch::Receiver<Arc<Shown>>,
    /// `None`: nobody is to set it by HTTP.
    pub verbosity: Option<SetVerbosity>,
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
    let metrics_of = metrics::Metrics::new(
        options.probe.clone(),
        Arc::clone(&options.requests),
        Arc::clone(&options.notices.counts),
    );
    let shared = Arc::new(Shared { status, metrics: metrics_of, options, ports: Mutex::default() });

    let mut servers = JoinSet::new();
    let (checks, notices) =
        (checks::run(Arc::clone(&shared), cancel.clone()), notices::run(Arc::clone(&shared), cancel.clone()));
    servers.spawn(async {
        checks.await;
        Ok(())
    });
    servers.spawn(async {
        notices.await;
        Ok(())
    });
    let told = shared.options.notices.clone();
    if let Some(addr) = healthz {
        let place = listen::Place {
            what: "health checks",
            addr,
            option: "--healthz-bind-address",
            reason: "FailedToStartProxierHealthcheck",
        };
        let routes = health_routes(Arc::clone(&shared));
        servers.spawn(listen::serve(place, hard_fail, told.clone(), routes, cancel.clone()));
    }
    if let Some(addr) = metrics {
        let place = listen::Place {
            what: "metrics",
            addr,
            option: "--metrics-bind-address",
            reason: "FailedToStartMetricServer",
        };
        servers.spawn(listen::serve(place, hard_fail, told, metrics_routes(shared), cancel.clone()));
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
    let debug = match shared.options.verbosity.clone() {
        Some(set) => Router::new()
            .route("/debug/flags/v", any(move |method, body| zpages::verbosity(Arc::clone(&set), method, body))),
        None => Router::new(),
    };
    Router::new()
        .route("/metrics", get(scrape))
        .route("/metrics/slis", get(slis))
        .route("/status", get(report))
        .route("/frontends", get(frontends))
        .route("/proxyMode", get(proxy_mode))
        .route("/configz", get(zpages::configz))
        .route("/flagz", get(zpages::flagz))
        .route("/statusz", get(zpages::statusz))
        .with_state(Arc::clone(&shared))
        .merge(health_routes(shared))
        .merge(debug)
}

async fn healthz(State(shared): State<Arc<Shared>>) -> Response {
    let health = shared.health();
    let answer = answer(health.healthz(), health.healthz_body());
    shared.metrics.healthz.count(answer.status());
    answer
}

async fn livez(State(shared): State<Arc<Shared>>) -> Response {
    let health = shared.health();
    let answer = answer(health.livez(), health.livez_body());
    shared.metrics.livez.count(answer.status());
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

async fn proxy_mode(State(shared): State<Arc<Shared>>) -> Response {
    ([(header::X_CONTENT_TYPE_OPTIONS, "nosniff")], shared.status().mode).into_response()
}

async fn scrape(State(shared): State<Arc<Shared>>) -> Response {
    // Maps are read with blocking system calls; health checks must not wait for them.
    let text =
        tokio::task::spawn_blocking(move || shared.metrics.encode(&shared.status(), &shared.check_ports())).await;
    match text {
        Ok(text) => exposed(text),
        Err(error) => {
            warn!(%error, "metrics could not be written");
            (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response()
        }
    }
}

async fn slis(State(shared): State<Arc<Shared>>) -> Response {
    exposed(shared.metrics.encode_slis())
}

fn exposed(text: String) -> Response {
    ([(header::CONTENT_TYPE, exposition::CONTENT_TYPE)], text).into_response()
}

#[cfg(test)]
mod tests;
