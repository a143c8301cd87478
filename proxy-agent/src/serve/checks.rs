//! Health-check node ports: each Service that asks for one has an HTTP server of its own, which says how many of its endpoints are
//! on this node (contract A111–A115). Load balancers send traffic to nodes that answer 200.
//!
//! What is to be open comes with the status; what could not be opened is tried again, is said in the report and as an Event on the
//! Service, and costs the others nothing.

use std::{
    collections::BTreeMap,
    io,
    net::SocketAddr,
    sync::{Arc, MutexGuard, PoisonError},
    time::Duration,
};

use axum::{
    Router,
    extract::State,
    http::{HeaderName, StatusCode, header},
    response::{IntoResponse, Response},
};
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};
use tokio::{
    net::TcpListener,
    sync::{Semaphore, watch},
    task::JoinHandle,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::{Shared, listen};
use crate::{
    desired::{HealthChecks, HealthDoors},
    model::{About, Family, Notice, NoticeKind, ServiceKey},
    status::{Status, report::CheckPorts},
};

/// At once, at each port: who asks one too often takes nothing from the others.
const CONNECTIONS: usize = 64;
/// Between attempts to open what could not be.
const RETRY: Duration = Duration::from_secs(5);
/// For a port to be closed, which takes no time unless the machine has none.
const CLOSE: Duration = Duration::from_secs(1);
const BACKLOG: i32 = 128;
const WEIGHT: HeaderName = HeaderName::from_static("x-load-balancing-endpoint-weight");

type Door = (ServiceKey, SocketAddr);

/// An open port.
struct Open {
    task: JoinHandle<()>,
    cancel: CancellationToken,
}

/// Opens and closes ports as the status asks, until cancelled.
pub(super) async fn run(shared: Arc<Shared>, cancel: CancellationToken) {
    let mut status = shared.status.clone();
    let mut open: BTreeMap<Door, Open> = BTreeMap::new();
    let mut known: Option<Arc<HealthDoors>> = None;
    loop {
        let (wanted, checks) = {
            let status = status.borrow_and_update();
            (Arc::clone(&status.health_doors), Arc::clone(&status.health_checks))
        };
        if known.as_ref().is_none_or(|known| !Arc::ptr_eq(known, &wanted)) {
            // Before others are opened: a port may pass from one Service to another.
            close(&mut open, &wanted, &shared).await;
            try_all(
                wanted.iter().filter(|door| !open.contains_key(door)).cloned().collect(),
                &mut open,
                &checks,
                &shared,
            );
            known = Some(wanted);
        } else {
            try_all(failures(&shared), &mut open, &checks, &shared);
        }
        tokio::select! {
            () = cancel.cancelled() => break,
            ended = changed(&mut status, known.as_ref()) => if ended { cancel.cancelled().await; break },
            () = sleep(RETRY) => {}
        }
    }
    close(&mut open, &HealthDoors::new(), &shared).await;
}

/// Until other ports are asked for; `true`: nothing will be any more.
async fn changed(status: &mut watch::Receiver<Arc<Status>>, known: Option<&Arc<HealthDoors>>) -> bool {
    let other = |status: &Arc<Status>| known.is_none_or(|known| !Arc::ptr_eq(known, &status.health_doors));
    status.wait_for(other).await.is_err()
}

fn try_all(doors: Vec<Door>, open: &mut BTreeMap<Door, Open>, checks: &HealthChecks, shared: &Arc<Shared>) {
    for door in doors {
        if let Some(opened) = try_open(&door, checks, shared) {
            open.insert(door, opened);
        }
    }
}

fn ports(shared: &Shared) -> MutexGuard<'_, CheckPorts> {
    shared.ports.lock().unwrap_or_else(PoisonError::into_inner)
}

fn failures(shared: &Shared) -> Vec<Door> {
    let ports = ports(shared);
    ports.iter().filter(|(_, failure)| failure.is_some()).map(|(door, _)| door.clone()).collect()
}

async fn close(open: &mut BTreeMap<Door, Open>, wanted: &HealthDoors, shared: &Shared) {
    ports(shared).retain(|door, _| wanted.contains(door));
    let gone: Vec<Door> = open.keys().filter(|door| !wanted.contains(*door)).cloned().collect();
    for door in gone {
        let Some(Open { task, cancel }) = open.remove(&door) else { continue };
        let (service, addr) = door;
        cancel.cancel();
        let abort = task.abort_handle();
        if timeout(CLOSE, task).await.is_err() {
            abort.abort();
        }
        info!(%service, %addr, "health-check node port closed");
    }
}

fn try_open(door: &Door, checks: &HealthChecks, shared: &Arc<Shared>) -> Option<Open> {
    let (service, addr) = door;
    let listener = match bind(*addr) {
        Ok(listener) => listener,
        // Then nobody can ask either.
        Err(error) if addr.ip().is_unspecified() && is_no_family(&error) => return None,
        Err(error) => {
            let failure = format!("cannot listen on {addr} for its health checks: {error}; free the port on this node");
            let before = ports(shared).insert(door.clone(), Some(failure.clone()));
            if before.flatten().as_ref() != Some(&failure) {
                warn!(%service, "{failure}");
                warn_of(service, checks, &failure, shared);
            }
            return None;
        }
    };
    ports(shared).insert(door.clone(), None);
    info!(%service, %addr, "health-check node port open");
    let answerer = Answerer { service: service.clone(), family: Family::of(addr.ip()), shared: Arc::clone(shared) };
    let routes = Router::new().fallback(answer).with_state(answerer);
    let cancel = CancellationToken::new();
    let permits = Arc::new(Semaphore::new(CONNECTIONS));
    let task = tokio::spawn(listen::accept_all(listener, permits, routes, cancel.clone()));
    Some(Open { task, cancel })
}

/// An Event on the Service (contract A115). With nobody to take it, the log and the report have to do.
fn warn_of(service: &ServiceKey, checks: &HealthChecks, failure: &str, shared: &Shared) {
    let Some(check) = checks.get(service) else { return };
    let node = shared.status().node.to_string();
    shared.options.notices.tell(Notice {
        about: About::Service { key: service.clone(), uid: Arc::clone(&check.uid) },
        kind: NoticeKind::Warning,
        reason: "FailedToStartServiceHealthcheck",
        action: "Listen",
        note: format!(
            "node {node} failed to start healthcheck {:?} on port {}: {failure}",
            service.to_string(),
            check.port
        ),
    });
}

/// IPv4 and IPv6 apart, since each has its own count.
fn bind(addr: SocketAddr) -> io::Result<TcpListener> {
    let family = if addr.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    if addr.is_ipv6() {
        sockopt::set_ipv6_v6only(&socket, true)?;
    }
    rustix::net::bind(&socket, &addr)?;
    rustix::net::listen(&socket, BACKLOG)?;
    TcpListener::from_std(socket.into())
}

fn is_no_family(error: &io::Error) -> bool {
    let number = error.raw_os_error().map(rustix::io::Errno::from_raw_os_error);
    matches!(number, Some(rustix::io::Errno::AFNOSUPPORT | rustix::io::Errno::ADDRNOTAVAIL))
}

#[derive(Clone)]
struct Answerer {
    service: ServiceKey,
    family: Family,
    shared: Arc<Shared>,
}

/// To whatever is asked, kube-proxy's answer to the byte (contract A112).
async fn answer(State(answerer): State<Answerer>) -> Response {
    let Answerer { service, family, shared } = answerer;
    let status = shared.status();
    let check = status.health_checks.get(&service).and_then(|check| check.families.get(&family));
    let local = check.map_or(0, |check| check.local);
    let healthy = shared.health().in_force() && !status.has_degraded(&service, family);
    let code = if local > 0 && healthy { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let headers = [
        (header::CONTENT_TYPE, "application/json".to_owned()),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff".to_owned()),
        (WEIGHT, local.to_string()),
    ];
    (code, headers, body(&service, local, healthy)).into_response()
}

fn body(service: &ServiceKey, local: usize, healthy: bool) -> String {
    let ServiceKey { namespace, name } = service;
    format!(
        "{{\n\t\"service\": {{\n\t\t\"namespace\": {namespace:?},\n\t\t\"name\": {name:?}\n\t}},\n\t\"localEndpoints\": {local},\n\t\
         \"serviceProxyHealthy\": {healthy}\n}}"
    )
}
