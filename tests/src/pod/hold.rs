//! Long connections, always in use: says which broke, and whether any ever changed its backend.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{BufRead, BufReader, Write},
    net::{SocketAddr, TcpStream},
    sync::atomic::Ordering,
    thread,
    time::Duration,
};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::{
    socket,
    wire::{self, Answer},
};

#[derive(clap::Args)]
pub struct Args {
    pub to: SocketAddr,
    /// How many connections
    #[arg(long, default_value_t = 10)]
    pub connections: usize,
    /// Bind the first connection to this port, the next to the one after it, and so on
    #[arg(long)]
    pub source_port: Option<u16>,
    /// Milliseconds between two rounds over all connections
    #[arg(long, default_value_t = 100)]
    pub interval: u64,
    /// Milliseconds to wait for a connection or an answer
    #[arg(long, default_value_t = 3000)]
    pub timeout: u64,
    /// Backends that may answer; none given: any
    #[arg(long, value_delimiter = ',')]
    pub expect: Vec<String>,
}

#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Report {
    pub connections: usize,
    /// Rounds in which every open connection was asked and answered.
    pub rounds: u64,
    pub answers: u64,
    pub backends: BTreeMap<String, usize>,
    /// Each connection that ended or fell silent, and how.
    pub broken: Vec<String>,
    /// Each answer from a backend that was not expected, or not the connection's own.
    pub wrong: Vec<String>,
}

struct Held {
    stream: BufReader<TcpStream>,
    backend: String,
}

/// Opens the connections, prints `ready`, then goes round until stdin closes.
pub fn run(args: &Args) -> Result<Report> {
    let Args { to, connections, source_port, interval, timeout, expect } = args;
    let expect: BTreeSet<&str> = expect.iter().map(String::as_str).collect();
    let timeout = Duration::from_millis(*timeout);
    let mut report = Report { connections: *connections, ..Report::default() };
    let mut held = Vec::with_capacity(*connections);
    for i in 0..*connections {
        let port = source_port.and_then(|first| first.checked_add(u16::try_from(i).ok()?));
        let stream = socket::tcp(*to, port, timeout).with_context(|| format!("connection {i} to {to}"))?;
        stream.set_read_timeout(Some(timeout))?;
        stream.set_write_timeout(Some(timeout))?;
        let mut stream = BufReader::with_capacity(512, stream);
        send(&mut stream).with_context(|| format!("connection {i} to {to}"))?;
        let backend = receive(&mut stream).with_context(|| format!("connection {i} to {to}"))?.backend;
        if !expect.is_empty() && !expect.contains(backend.as_str()) {
            report.wrong.push(format!("connection {i} reached {backend}"));
        }
        *report.backends.entry(backend.clone()).or_insert(0) += 1;
        held.push(Some(Held { stream, backend }));
    }
    let stop = super::stop_on_stdin_eof();
    println!("ready");
    while !stop.load(Ordering::Relaxed) {
        thread::sleep(Duration::from_millis(*interval));
        // All requests go out before the first answer is read: the connections are in flight together.
        for (i, slot) in held.iter_mut().enumerate() {
            if let Some(connection) = slot
                && let Err(error) = send(&mut connection.stream)
            {
                report.broken.push(format!("connection {i} to {}: {error}", connection.backend));
                *slot = None;
            }
        }
        for (i, slot) in held.iter_mut().enumerate() {
            let Some(connection) = slot else { continue };
            match receive(&mut connection.stream) {
                Ok(answer) if answer.backend == connection.backend => report.answers += 1,
                Ok(answer) => {
                    report
                        .wrong
                        .push(format!("connection {i} to {} answered by {}", connection.backend, answer.backend));
                }
                Err(error) => {
                    report.broken.push(format!("connection {i} to {}: {error}", connection.backend));
                    *slot = None;
                }
            }
        }
        report.rounds += 1;
    }
    Ok(report)
}

fn send(stream: &mut BufReader<TcpStream>) -> std::io::Result<()> {
    stream.get_mut().write_all(&wire::request(0, 0))
}

fn receive(stream: &mut BufReader<TcpStream>) -> std::io::Result<Answer> {
    let mut line = Vec::new();
    if stream.read_until(b'\n', &mut line)? == 0 {
        return Err(std::io::ErrorKind::UnexpectedEof.into());
    }
    serde_json::from_slice(&line).map_err(Into::into)
}
