//! Many probes by one process, side by side: silence costs its time-out once, not once for each question.

use std::{
    net::SocketAddr,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::{
    probe::{self, Report},
    socket::Transport,
};

/// Questions come on stdin, as a JSON list; the reports are printed in their order.
#[derive(clap::Args)]
pub struct Args {
    /// Questions that are asked at one time
    #[arg(long, default_value_t = 48)]
    pub workers: usize,
}

/// What to ask; it ends with the first try that fails.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Question {
    pub to: SocketAddr,
    pub transport: Transport,
    pub count: u32,
    /// Milliseconds to wait for each answer.
    pub timeout: u64,
    /// Of the first try; each further one binds the next.
    pub source_port: Option<u16>,
    /// Bytes to send, and to ask for.
    pub size: usize,
}

impl Question {
    fn ask(&self) -> Result<Report> {
        probe::run(&probe::Args {
            to: self.to,
            transport: self.transport,
            count: self.count,
            source_port: self.source_port,
            successive: self.source_port.is_some(),
            timeout: self.timeout,
            mapped: false,
            size: self.size,
            reply: self.size,
            burst: 1,
            no_check: false,
            hear_errors: false,
            reset: false,
            server_closes: false,
            fail_fast: true,
        })
    }
}

pub fn run(args: &Args) -> Result<Vec<Report>> {
    let questions: Vec<Question> = serde_json::from_reader(std::io::stdin()).context("read questions")?;
    let next = AtomicUsize::new(0);
    let reports = Mutex::new(vec![Report::default(); questions.len()]);
    let work = || -> Result<()> {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let Some(question) = questions.get(number) else { return Ok(()) };
            let report = question.ask()?;
            let mut reports = reports.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            if let Some(slot) = reports.get_mut(number) {
                *slot = report;
            }
        }
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..args.workers.min(questions.len())).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|worker| worker.join().unwrap_or_else(|_| anyhow::bail!("a worker panicked")))
    })?;
    Ok(reports.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner))
}
