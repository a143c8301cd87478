//! The benchmarks: connect-time and per-packet translation against a direct connection and against rules of kube-proxy's shape.
//!
//! Started by `cargo xtask bench`. Everything happens in network namespaces and a cgroup of its own:
//!
//! ```text
//! client 10.1.0.2 ── c0 · node · s0 ── 10.2.0.2 server      one such world for each set of rules
//! ```
//!
//! Namespaces live as long as the processes that hold them, programs as long as the process that attached them, so nothing
//! outlives this program but cgroup directories; a supervisor removes those however the measuring process ends.
//!
//! Figures are ratios measured side by side: every round runs each variant once, on one CPU for client and server, and the
//! next round in the opposite order. A control, the same as the baseline in another cgroup, tells how much is noise.
#![allow(unreachable_pub, reason = "a program: nothing of it is reached from outside")]

mod balance;
mod bpf;
mod c11;
mod c3;
mod connect_cost;
mod flows;
mod maglev;
mod objects;
mod packets;
mod report;
mod rules;
mod services;
mod transactions;
mod worker;
mod world;
mod xdp;

#[path = "../../../../proxy-agent/tests/support/mod.rs"]
#[expect(dead_code, reason = "shared with the agent's tests, which use all of it")]
mod support;

#[path = "../../../../proxy-agent/tests/packets/packet.rs"]
#[expect(dead_code, reason = "as above")]
mod frame;

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use anyhow::{Context as _, Result, bail};
use clap::Parser;
use nix::{
    sys::{
        signal::{self, SigSet, Signal},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};

use proxy_tests::extent::Extent;
use report::Report;
use world::Cgroups;

#[derive(Parser, Clone)]
#[command(about = "Benchmarks of the datapath and of the control plane")]
struct Args {
    #[command(flatten)]
    extent: Extent,
    /// Where the JSON and the table go
    #[arg(long, default_value = "target/bench")]
    out: PathBuf,
    /// The agent to measure with C3 and C11
    #[arg(long, value_name = "FILE")]
    agent: Option<PathBuf>,
    /// Whom to measure beside it with C11
    #[arg(long, value_name = "FILE")]
    kube_proxy: Option<PathBuf>,
    #[arg(long, hide = true)]
    cgroup: Option<PathBuf>,
    #[arg(long, hide = true)]
    worker: bool,
}

/// How much is done.
struct Scale {
    rounds: usize,
    round_ms: u64,
    /// Services in the rulesets of the peers.
    rules: &'static [u32],
    /// Services in the maps for the cost of one `connect`.
    services: &'static [u32],
    batches: usize,
    /// Runs of a program on one packet.
    repeat: u32,
    new_flows: u16,
    /// New flows whose backends are counted.
    picks: u32,
    /// Entries of the connection table that is filled.
    table: u32,
    changes: usize,
    change_services: u32,
    /// Services in the rules of the fallbacks.
    fallback: &'static [u32],
}

const SMOKE: Scale = Scale {
    rounds: 5,
    round_ms: 150,
    rules: &[1_000],
    services: &[1, 10_000],
    batches: 20,
    repeat: 50_000,
    new_flows: 1_500,
    picks: 20_000,
    table: 8_192,
    changes: 200,
    change_services: 1_000,
    fallback: &[1_000],
};
const FULL: Scale = Scale {
    rounds: 20,
    round_ms: 600,
    rules: &[100, 1_000, 10_000],
    services: &[1, 100, 10_000, 50_000],
    batches: 100,
    repeat: 1_000_000,
    new_flows: 8_192,
    picks: 1_000_000,
    table: 65_536,
    changes: 2_000,
    change_services: 10_000,
    fallback: &[1_000, 5_000, 10_000],
};

fn main() -> ExitCode {
    let args = Args::parse();
    let result = match (args.worker, &args.cgroup) {
        (true, _) => worker::run().map(|()| ExitCode::SUCCESS),
        (false, Some(cgroup)) => measure(&args, cgroup),
        (false, None) => supervise(&args),
    };
    result.unwrap_or_else(|error| {
        eprintln!("bench: {error:#}");
        ExitCode::from(3)
    })
}

/// Starts the measuring process and cleans up behind it.
fn supervise(_args: &Args) -> Result<ExitCode> {
    if let Some(reason) = support::skip() {
        bail!("cannot measure here: {reason}");
    }
    let root = support::cgroup_root().context("no cgroup v2 is mounted")?;
    let cgroup = root.join(format!("proxy-bench-{}", std::process::id()));
    fs::create_dir(&cgroup).with_context(|| format!("cannot make {}", cgroup.display()))?;

    let mut signals = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGCHLD] {
        signals.add(signal);
    }
    signals.thread_block()?;
    let child = Command::new(env::current_exe()?).args(env::args_os().skip(1)).arg("--cgroup").arg(&cgroup).spawn()?;
    let pid = Pid::from_raw(i32::try_from(child.id())?);
    let code = loop {
        match signals.wait()? {
            Signal::SIGCHLD => match waitpid(pid, Some(WaitPidFlag::WNOHANG))? {
                WaitStatus::Exited(_, code) => break code,
                WaitStatus::Signaled(..) => break 3,
                _ => {}
            },
            other => signal::kill(pid, other).or_else(|e| if e == nix::Error::ESRCH { Ok(()) } else { Err(e) })?,
        }
    };
    // Gone already unless it was killed.
    let _ = fs::write(cgroup.join("cgroup.kill"), "1");
    let _ = fs::remove_dir_all(c3::bpffs(&cgroup));
    let _ = fs::remove_dir_all(c11::files(&cgroup));
    world::remove_cgroups(&cgroup);
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(3)))
}

fn measure(args: &Args, cgroup: &Path) -> Result<ExitCode> {
    SigSet::all().thread_unblock()?;
    // Dies with the supervisor, and the namespaces' holders with it.
    nix::sys::prctl::set_pdeathsig(Signal::SIGTERM)?;
    let Extent { smoke, .. } = args.extent;
    let scale = if smoke { SMOKE } else { FULL };
    let wants = |id: &str| args.extent.wants(id);
    let cgroups = Cgroups::new(cgroup);
    let mut report = Report::new(if smoke { "smoke" } else { "full" });

    if wants("d1") {
        connect_cost::measure(&scale, &cgroups, &mut report).context("D1")?;
    }
    if wants("d2") || wants("d3") || wants("d5") {
        transactions::measure(&scale, &cgroups, &wants, &mut report).context("D2, D3, D5")?;
    }
    if wants("d6") {
        packets::measure(&scale, &mut report).context("D6")?;
    }
    if wants("d7") {
        xdp::measure(&scale, &mut report).context("D7")?;
    }

    if wants("d13") {
        packets::alone(|| flows::full_table(&scale, &mut report)).context("D13")?;
    }

    if wants("d9") {
        maglev::measure(&mut report);
        packets::alone(|| balance::measure(&scale, &mut report)).context("D9")?;
    }

    if wants("c3") {
        for shape in [c3::Shape::plain(&scale), c3::Shape::MAGLEV] {
            c3::measure(&scale, &shape, args.agent.as_deref(), &cgroups, &mut report).context("C3")?;
        }
    }

    if wants("c11") {
        let programs = c11::Programs { agent: args.agent.as_deref(), kube_proxy: args.kube_proxy.as_deref() };
        c11::measure(&scale, &programs, &cgroups, &mut report).context("C11")?;
    }

    report.write(&args.out)?;
    Ok(if report.any_missed() { ExitCode::from(1) } else { ExitCode::SUCCESS })
}
