//! New connections at a steady rate: says how often they failed, how, and who answered.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{BufRead, BufReader, Write},
    net::SocketAddr,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant, SystemTime},
};

use anyhow::Result;
use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use super::{
    socket,
    wire::{self, Answer},
};

#[derive(clap::Args)]
pub struct Args {
    pub to: SocketAddr,
    /// Connections per second, all workers together
    #[arg(long, default_value_t = 200)]
    pub rate: u64,
    /// Threads that connect; a slow connection holds up one of them only
    #[arg(long, default_value_t = 8)]
    pub workers: u64,
    /// End after this many seconds, at the latest
    #[arg(long, default_value_t = 60)]
    pub seconds: u64,
    /// Milliseconds to wait for a connection or an answer
    #[arg(long, default_value_t = 3000)]
    pub timeout: u64,
    /// Backends that may answer; none given: any
    #[arg(long, value_delimiter = ',')]
    pub expect: Vec<String>,
    /// Ask by UDP, a new connected socket each time
    #[arg(long)]
    pub udp: bool,
    /// Bind to this port and those that follow it, each in turn: a UDP flow whose port is used again within its time-out is no new one
    #[arg(long)]
    pub source_port: Option<u16>,
    /// Report each answer, too
    #[arg(long)]
    pub log: bool,
}

/// So many failures are told one by one.
const TOLD: usize = 8;

/// Source ports before the first is used again.
pub const PORTS: u16 = 6_000;

#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Report {
    pub tries: u64,
    pub answered: u64,
    /// By errno, with what was being done.
    pub failures: BTreeMap<String, u64>,
    /// The first of those: when it began, as [`now`] has it, from which port, and how it failed.
    #[serde(default)]
    pub failed: Vec<(u64, Option<u16>, String)>,
    pub backends: BTreeMap<String, u64>,
    /// Answers from a backend that was not expected.
    pub wrong: BTreeMap<String, u64>,
    pub slowest_micros: u64,
    /// The longest time in which no connection was answered; its beginning and its end are such moments, too.
    #[serde(default)]
    pub gap_micros: u64,
    /// TCP connections whose SYN had to be sent again: nobody answered for a second.
    pub sent_again: u64,
    /// With `--log`, in no order.
    #[serde(default)]
    pub log: Vec<Answered>,
}

/// One connection that was answered; times as [`now`] has them.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Answered {
    pub began: u64,
    pub ended: u64,
    pub backend: String,
}

/// Microseconds since the epoch.
pub fn now() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    micros(since)
}

pub fn run(args: &Args) -> Result<Report> {
    let stop = super::stop_on_stdin_eof();
    println!("ready");
    let report = Mutex::new((Report::default(), Instant::now()));
    let expect: BTreeSet<&str> = args.expect.iter().map(String::as_str).collect();
    let started = Instant::now();
    let end = started + Duration::from_secs(args.seconds);
    let (turn, sent_again) = (AtomicU64::new(0), AtomicU64::new(0));
    thread::scope(|scope| {
        for _ in 0..args.workers {
            scope.spawn(|| {
                loop {
                    // Every try has its own moment on the clock: one that takes long does not slow the others.
                    let mine = turn.fetch_add(1, Ordering::Relaxed);
                    let due = started + Duration::from_micros(mine * 1_000_000 / args.rate.max(1));
                    if due >= end || stop.load(Ordering::Relaxed) {
                        return;
                    }
                    thread::sleep(due.saturating_duration_since(Instant::now()));
                    let port =
                        args.source_port.map(|first| first + u16::try_from(mine % u64::from(PORTS)).unwrap_or(0));
                    let began = now();
                    let mut from = port;
                    let outcome = ask(args, &mut from, &sent_again);
                    let ended = now();
                    let Ok(mut report) = report.lock() else { return };
                    let (report, answered) = &mut *report;
                    report.tries += 1;
                    report.slowest_micros = report.slowest_micros.max(ended.saturating_sub(began));
                    match outcome {
                        Ok(answer) => {
                            report.answered += 1;
                            report.gap_micros = report.gap_micros.max(micros(answered.elapsed()));
                            *answered = Instant::now();
                            if !expect.is_empty() && !expect.contains(answer.backend.as_str()) {
                                *report.wrong.entry(answer.backend.clone()).or_insert(0) += 1;
                            }
                            if args.log {
                                report.log.push(Answered { began, ended, backend: answer.backend.clone() });
                            }
                            *report.backends.entry(answer.backend).or_insert(0) += 1;
                        }
                        Err((doing, errno)) => {
                            let how = format!("{doing}: {errno:?}");
                            if report.failed.len() < TOLD {
                                report.failed.push((began, from, how.clone()));
                            }
                            *report.failures.entry(how).or_insert(0) += 1;
                        }
                    }
                }
            });
        }
    });
    let (report, answered) = report.into_inner().map_err(|_| anyhow::anyhow!("a worker panicked"))?;
    let gap_micros = report.gap_micros.max(micros(answered.elapsed()));
    Ok(Report { sent_again: sent_again.into_inner(), gap_micros, ..report })
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// `from`: the source port that it is to have, and then the one that it has.
fn ask(args: &Args, from: &mut Option<u16>, sent_again: &AtomicU64) -> Result<Answer, (&'static str, Errno)> {
    let has = |addr: std::io::Result<SocketAddr>| addr.ok().map(|addr| addr.port());
    let timeout = Duration::from_millis(args.timeout);
    let request = wire::request(0, 0);
    let mut line = Vec::new();
    if args.udp {
        let socket = socket::udp(args.to, *from, true).map_err(|errno| ("connect", errno))?;
        *from = has(socket.local_addr());
        let doing = |what| move |error: std::io::Error| (what, socket::errno(&error));
        socket.set_read_timeout(Some(timeout)).map_err(doing("connect"))?;
        socket.send(&request).map_err(doing("send"))?;
        line.resize(2048, 0);
        let length = socket.recv(&mut line).map_err(doing("receive"))?;
        line.truncate(length);
    } else {
        let mut stream = socket::tcp(args.to, *from, timeout).map_err(|errno| ("connect", errno))?;
        *from = has(stream.local_addr());
        let again = socket::sent_again(&stream).map_err(|errno| ("connect", errno))?;
        sent_again.fetch_add(u64::from(again > 0), Ordering::Relaxed);
        let doing = |what| move |error: std::io::Error| (what, socket::errno(&error));
        stream.set_read_timeout(Some(timeout)).map_err(doing("connect"))?;
        stream.write_all(&request).map_err(doing("send"))?;
        BufReader::new(&stream).read_until(b'\n', &mut line).map_err(doing("receive"))?;
        if line.is_empty() {
            return Err(("receive", Errno::ECONNRESET));
        }
    }
    serde_json::from_slice(&line).map_err(|_| ("receive", Errno::EBADMSG))
}
