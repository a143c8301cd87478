//! One listening address: bound with patience, served with bounds.
//!
//! INVARIANT: a client holds at most one of [`CONNECTIONS`] permits for at most [`LIFETIME`]; so clients that send slowly, read
//! slowly or not at all cost neither memory nor the health checks of others for long.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::{ServeError, notices::Notices};
use crate::model::{About, Notice, NoticeKind};

/// At once, per address.
const CONNECTIONS: usize = 256;
/// Of one connection; it carries one request.
const LIFETIME: Duration = Duration::from_secs(10);
/// For the request line and the headers.
const HEADERS: Duration = Duration::from_secs(3);
/// Between attempts to bind (contract A122).
const RETRY: Duration = Duration::from_secs(5);

/// What is served where, and the option that moves it.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub(super) what: &'static str,
    pub(super) addr: SocketAddr,
    pub(super) option: &'static str,
    /// Of the Event where the address cannot be had, in kube-proxy's words.
    pub(super) reason: &'static str,
}

pub(super) async fn serve(
    place: Place,
    hard_fail: bool,
    notices: Notices,
    routes: Router,
    cancel: CancellationToken,
) -> Result<(), ServeError> {
    let Some(listener) = bind(place, hard_fail, &notices, &cancel).await? else { return Ok(()) };
    let addr = listener.local_addr().unwrap_or(place.addr);
    info!(%addr, what = place.what, "listening");

    accept_all(listener, Arc::new(Semaphore::new(CONNECTIONS)), routes, cancel).await;
    Ok(())
}

/// Until cancelled; whatever is under way then is broken off.
pub(super) async fn accept_all(
    listener: TcpListener,
    permits: Arc<Semaphore>,
    routes: Router,
    cancel: CancellationToken,
) {
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            () = cancel.cancelled() => return,
            Some(_) = connections.join_next() => continue,
            accepted = accept(&listener, &permits) => accepted,
        };
        match accepted {
            Ok((stream, permit)) => {
                let routes = routes.clone();
                connections.spawn(async move {
                    connection(stream, routes).await;
                    drop(permit);
                });
            }
            // Out of file descriptors, or the client left before it was accepted: neither is a reason to spin or to end.
            Err(error) => {
                let addr = listener.local_addr().ok();
                warn!(?addr, %error, "a connection was not accepted");
                sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// `None`: cancelled before the address could be had. An Event on the Node says that it cannot (contract A122).
async fn bind(
    place: Place,
    hard_fail: bool,
    notices: &Notices,
    cancel: &CancellationToken,
) -> Result<Option<TcpListener>, ServeError> {
    let Place { what, addr, option, reason } = place;
    let mut told = String::new();
    loop {
        let error = match TcpListener::bind(addr).await {
            Ok(listener) => return Ok(Some(listener)),
            Err(source) => ServeError::Bind { what, addr, option, source },
        };
        let note = error.to_string();
        if note != told {
            told.clone_from(&note);
            notices.tell(Notice { about: About::Node, kind: NoticeKind::Warning, reason, action: "Listen", note });
        }
        if hard_fail {
            return Err(error);
        }
        warn!(%error, retry = ?RETRY, "not served yet");
        tokio::select! {
            () = cancel.cancelled() => return Ok(None),
            () = sleep(RETRY) => {}
        }
    }
}

async fn accept(
    listener: &TcpListener,
    permits: &Arc<Semaphore>,
) -> std::io::Result<(TcpStream, tokio::sync::OwnedSemaphorePermit)> {
    // In this order: where nobody asks, nobody waits for a permit.
    let (stream, _) = listener.accept().await?;
    let permit = Arc::clone(permits).acquire_owned().await.map_err(std::io::Error::other)?;
    Ok((stream, permit))
}

async fn connection(stream: TcpStream, routes: Router) {
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADERS)
        .keep_alive(false)
        // As Go writes them; what probes a health check may be simple.
        .title_case_headers(true)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(routes));
    match timeout(LIFETIME, connection).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => debug!(%error, "connection failed"),
        Err(_) => debug!("connection took too long"),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use axum::routing::get;

    use super::*;

    /// One permit, and more listeners than that: who is never asked keeps nobody waiting.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_listener_that_nobody_asks_takes_no_permit() {
        let permits = Arc::new(Semaphore::new(1));
        let cancel = CancellationToken::new();
        let mut addrs = Vec::new();
        for name in ["first", "second", "third"] {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            addrs.push((name, listener.local_addr().unwrap()));
            let routes = Router::new().route("/", get(move || async move { name }));
            tokio::spawn(accept_all(listener, Arc::clone(&permits), routes, cancel.clone()));
        }
        for (name, addr) in addrs.into_iter().rev() {
            let asked = tokio::task::spawn_blocking(move || {
                let mut stream = std::net::TcpStream::connect(addr).unwrap();
                stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
                stream.write_all(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n").unwrap();
                let mut answer = String::new();
                stream.read_to_string(&mut answer).unwrap();
                answer
            });
            assert!(asked.await.unwrap().ends_with(name), "{name}");
        }
        cancel.cancel();
    }
}
