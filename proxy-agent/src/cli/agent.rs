//! Asking the running agent: one GET of its status report, or of what is in force.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context, bail};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::{Request, StatusCode, body::Bytes, client::conn::http1, header::HOST};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::{net::TcpStream, time::timeout};

use crate::status::report::{InForce, Report};

/// The agent is on this host; one that takes longer is stuck.
const PATIENCE: Duration = Duration::from_secs(3);
/// A report of a very large cluster is a few MB; whoever sends more is not the agent.
const REPORT_LIMIT: usize = 256 << 20;

/// The report of the agent that answers at `addr`.
pub fn report(addr: SocketAddr) -> anyhow::Result<Report> {
    ask(addr, "/status")
}

/// What it has in force.
pub fn frontends(addr: SocketAddr) -> anyhow::Result<Vec<InForce>> {
    ask(addr, "/frontends")
}

fn ask<T: DeserializeOwned>(addr: SocketAddr, path: &str) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("starting a runtime")?;
    runtime.block_on(async {
        match timeout(PATIENCE, get(addr, path)).await {
            Ok(answer) => answer,
            Err(_) => bail!("no answer within {} s", PATIENCE.as_secs()),
        }
    })
}

async fn get<T: DeserializeOwned>(addr: SocketAddr, path: &str) -> anyhow::Result<T> {
    let stream = TcpStream::connect(addr).await.context("connecting")?;
    let (mut client, connection) = http1::handshake(TokioIo::new(stream)).await.context("speaking HTTP")?;
    let connection = tokio::spawn(connection);
    let request = Request::get(path).header(HOST, addr.to_string()).body(Empty::<Bytes>::new())?;
    let answer = client.send_request(request).await.with_context(|| format!("asking for {path}"))?;
    if answer.status() != StatusCode::OK {
        bail!("{path} answers {}: this is no proxy-agent, or another version of it", answer.status());
    }
    let body = Limited::new(answer.into_body(), REPORT_LIMIT).collect().await;
    connection.abort();
    let body = body.map_err(|error| anyhow::anyhow!("reading the report: {error}"))?.to_bytes();
    serde_json::from_slice(&body).context("the report is not understood: is this another version of proxy-agent?")
}
