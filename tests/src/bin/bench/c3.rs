//! C3: from one changed EndpointSlice, written to the agent's watch, to the map that the programs read.
//!
//! The real agent runs against an API server of a few lines ([`Feed`]), on the other CPU. C1 is its first start, C7 are others after
//! it was killed with everything in force.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddrV4, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use aya::maps::{HashMap, Map, MapData};
use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    unistd::Pid,
};
use proxy_common::{
    Be16, Ipv4Be,
    frontend::{FrontendKey, FrontendValue},
    proto::TCP,
};
use proxy_tests::{
    ahead::Ahead,
    feed::{self, Feed},
};
use serde_json::Value;

use crate::{
    Scale,
    objects::{self, NODE},
    report::{Bound, Figure, Report},
    rules::{PORT, vip},
    worker::{Job, Worker},
    world::{Cgroups, Netns},
};

const ENDPOINTS: u32 = 10;
const AGENT_CPU: usize = 0;
const OUR_CPU: usize = 1;

/// The slice of one Service; its last endpoint tells the version.
fn slice(index: u32, version: u32) -> Value {
    objects::slice(index, ENDPOINTS + 1, (0..ENDPOINTS - 1).chain([last(version)]))
}

/// The one that another version does not have.
fn last(version: u32) -> u32 {
    if version.is_multiple_of(2) { ENDPOINTS - 1 } else { ENDPOINTS }
}

/// Everything there is at the start.
fn feed(services: u32) -> Result<Feed> {
    objects::feed(services, |index| slice(index, 0))
}

/// The agent, and what it leaves behind when it is killed.
struct Agent {
    child: Child,
    files: PathBuf,
    bpffs: PathBuf,
}

/// How it is started.
struct Start<'a> {
    netns: &'a Netns,
    program: &'a Path,
    kubeconfig: &'a Path,
    log: &'a Path,
    bpffs: &'a Path,
    cgroup: &'a Path,
    options: &'static [&'static str],
}

/// What the agent is measured with.
pub struct Shape {
    services: u32,
    options: &'static [&'static str],
    /// Behind every figure's name.
    name: &'static str,
    /// Whether the bars are meant for it.
    bars: bool,
}

impl Shape {
    pub const fn plain(scale: &Scale) -> Self {
        Self { services: scale.change_services, options: &[], name: "", bars: true }
    }

    /// Each change writes a table of 16 381 positions, and the one before rests for 5 s: hence fewer Services and more slots.
    pub const MAGLEV: Self = Self {
        services: 100,
        options: &["--algorithm", "maglev", "--map-slots", "33554432"],
        name: ", Maglev",
        bars: false,
    };
}

impl Start<'_> {
    /// On its CPU, ahead of what else runs; its log begins anew.
    fn spawn(&self) -> Result<Child> {
        let Self { netns, program, kubeconfig, log, bpffs, cgroup, options } = self;
        let log = fs::File::create(log)?;
        // A child inherits the CPU it may run on.
        let before = pin_to(AGENT_CPU)?;
        let ahead = Ahead::of_others();
        let child = Command::new("nsenter")
            .arg(format!("--net={}", netns.path().display()))
            .arg(program)
            .args(["run", "--hostname-override", NODE, "--kubeconfig"])
            .arg(kubeconfig)
            .arg("--bpffs")
            .arg(bpffs)
            .arg("--cgroup-root")
            .arg(cgroup)
            .args(*options)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn();
        drop(ahead);
        sched_setaffinity(Pid::from_raw(0), &before)?;
        Ok(child?)
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(&self.bpffs);
        let _ = fs::remove_dir_all(&self.files);
    }
}

/// Where a run of this name pins.
pub fn bpffs(run: &Path) -> PathBuf {
    Path::new("/sys/fs/bpf").join(run.file_name().unwrap_or_default())
}

fn pin_to(cpu: usize) -> Result<CpuSet> {
    let before = sched_getaffinity(Pid::from_raw(0))?;
    let mut cpus = CpuSet::new();
    cpus.set(cpu)?;
    sched_setaffinity(Pid::from_raw(0), &cpus)?;
    Ok(before)
}

pub fn measure(
    scale: &Scale,
    shape: &Shape,
    agent: Option<&Path>,
    cgroups: &Cgroups,
    report: &mut Report,
) -> Result<()> {
    let Some(program) = agent else {
        report.skip("C3: no agent was given (--agent)");
        return Ok(());
    };
    let Shape { services, options, .. } = *shape;
    let netns = Netns::new()?;
    // Every endpoint is answered for here, by whoever asks whether a new one is reached.
    netns.ip("link set lo up\nroute add local 10.128.0.0/9 dev lo\n")?;
    let feed = feed(services)?;
    let at = netns.enter(|| feed.serve())?;

    let files = std::env::temp_dir().join(cgroups.root().file_name().unwrap_or_default());
    fs::create_dir_all(&files)?;
    let kubeconfig = feed::kubeconfig(&files, at)?;
    let bpffs = bpffs(cgroups.root());
    fs::create_dir_all(&bpffs)?;
    let (log, cgroup) = (files.join("log"), cgroups.make(&format!("agent-{services}"))?);
    let start =
        Start { netns: &netns, program, kubeconfig: &kubeconfig, log: &log, bpffs: &bpffs, cgroup: &cgroup, options };
    let started = Instant::now();
    let mut agent = Agent { child: start.spawn()?, files: files.clone(), bpffs: bpffs.clone() };
    let outcome = changes(scale, shape, &feed, &mut agent, started, report)
        .and_then(|()| if shape.bars { landings(scale, &start, services, &feed, report) } else { Ok(()) })
        .and_then(|()| restarts(&start, shape, &mut agent, report));
    if let Err(error) = outcome {
        let log = fs::read_to_string(&log).unwrap_or_default();
        let tail: Vec<_> = log.lines().rev().take(10).collect();
        report.skip(format!("C3, C7: {error:#}; the agent's last words: {}", tail.join(" | ")));
    }
    Ok(())
}

type Frontends = HashMap<MapData, FrontendKey<Ipv4Be>, FrontendValue>;

fn key(index: u32) -> FrontendKey<Ipv4Be> {
    FrontendKey::new(Ipv4Be::from_octets(vip(index).octets()), Be16::from_host(PORT), TCP)
}

/// The map once the agent has filled it.
fn filled(services: u32, agent: &mut Agent) -> Result<Frontends> {
    let pin = agent.bpffs.join("v1/maps/frontends_v4");
    let deadline = Instant::now() + Duration::from_secs(60);
    let mut index = 0;
    let mut map: Option<Frontends> = None;
    while index < services {
        if let Some(status) = agent.child.try_wait()? {
            bail!("the agent ended: {status}");
        }
        if Instant::now() > deadline {
            bail!("the agent programmed {index} of {services} Services in a minute");
        }
        match &map {
            None => match MapData::from_pin(&pin) {
                Ok(data) => map = Some(Map::HashMap(data).try_into()?),
                Err(_) => thread::sleep(Duration::from_millis(1)),
            },
            Some(map) if map.get(&key(index), 0).is_ok() => index += 1,
            Some(_) => thread::sleep(Duration::from_millis(1)),
        }
    }
    map.context("no map")
}

fn changes(
    scale: &Scale,
    shape: &Shape,
    feed: &Feed,
    agent: &mut Agent,
    started: Instant,
    report: &mut Report,
) -> Result<()> {
    let Shape { services, name, bars, .. } = *shape;
    let map = filled(services, agent)?;
    let cold = started.elapsed().as_secs_f64() * 1e3;
    let size = format!("{services} services, {} endpoints{name}", services * ENDPOINTS);
    report.row(
        "C1",
        format!("process start → last frontend in its map, {size}"),
        "ms",
        Figure { median: cold, min: cold, max: cold },
    );
    // The watch may still be on its way.
    thread::sleep(Duration::from_secs(1));

    pin_to(OUR_CPU)?;
    let ahead = Ahead::of_others();
    let mut took = Vec::with_capacity(scale.changes);
    for change in 0..scale.changes {
        let change = u32::try_from(change)?;
        let index = change.wrapping_mul(7_919) % services;
        // Twice the number of Services and each has changed and changed back.
        let version = 1 + change / services;
        let change = feed.prepare(&slice(index, version))?;
        let key = key(index);
        let before = map.get(&key, 0)?;
        thread::sleep(Duration::from_millis(2));
        let start = Instant::now();
        feed.send(change);
        while map.get(&key, 0)? == before {
            if start.elapsed() > Duration::from_secs(5) {
                bail!("a change was not in the map after 5 s");
            }
        }
        took.push(start.elapsed().as_nanos() as f64 / 1e3);
    }
    drop(ahead);
    report.row("C3", format!("EndpointSlice event → map, {size}"), "µs", Figure::of(&took));
    if !bars {
        return Ok(());
    }
    report.bar("C3", format!("event → map, p50, {size}, µs"), Bound::AtMost(200.0), quantile(&mut took, 0.5), true);
    report.bar("C3", format!("event → map, p99, {size}, µs"), Bound::AtMost(2_000.0), quantile(&mut took, 0.99), true);
    Ok(())
}

/// From a change to the first connection that lands on the endpoint that came with it: one in ten does, from then on.
fn landings(scale: &Scale, start: &Start<'_>, services: u32, feed: &Feed, report: &mut Report) -> Result<()> {
    let mut client = Worker::start(Job::Reach { netns: start.netns.path(), cgroup: start.cgroup.to_owned() })?;
    let ahead = Ahead::of_others();
    let (mut took, mut connections) = (Vec::with_capacity(scale.changes), 0);
    // Where the changes before left off.
    for change in scale.changes..2 * scale.changes {
        let change = u32::try_from(change)?;
        let (index, version) = (change.wrapping_mul(7_919) % services, 1 + change / services);
        let change = feed.prepare(&slice(index, version))?;
        thread::sleep(Duration::from_millis(2));
        let begin = Instant::now();
        feed.send(change);
        client.reach(SocketAddrV4::new(vip(index), PORT), objects::endpoint(index, ENDPOINTS + 1, last(version)))?;
        connections += client.line::<u32>()?;
        took.push(begin.elapsed().as_nanos() as f64 / 1e3);
    }
    drop(ahead);
    let what = format!("EndpointSlice event → first connect that lands on its new endpoint, {services} services");
    report.row("C3", what, "µs", Figure::of(&took));
    let each = f64::from(connections) / took.len() as f64;
    report.row("C3", "connections until then".to_owned(), "mean", Figure { median: each, min: each, max: each });
    let what = format!("event → first connect, p99, {services} services, µs");
    report.bar("C3", what, Bound::AtMost(5_000.0), quantile(&mut took, 0.99), true);
    Ok(())
}

/// Sorts them.
fn quantile(took: &mut [f64], q: f64) -> f64 {
    took.sort_by(f64::total_cmp);
    took.get((took.len() as f64 * q) as usize).copied().unwrap_or(f64::NAN)
}

/// Restarts measured.
const RESTARTS: usize = 5;

/// Killed and started again with nothing changed: how soon it is ready, and what it writes.
fn restarts(start: &Start<'_>, shape: &Shape, agent: &mut Agent, report: &mut Report) -> Result<()> {
    let Shape { name, bars, .. } = *shape;
    let (mut took, mut writes) = (Vec::with_capacity(RESTARTS), 0);
    // The first one may find that the last changes are not in the list.
    for restart in 0..=RESTARTS {
        agent.child.kill()?;
        agent.child.wait()?;
        let began = Instant::now();
        agent.child = start.spawn()?;
        start.netns.enter(|| {
            while !healthy() {
                if began.elapsed() > Duration::from_secs(30) {
                    bail!("not ready 30 s after a restart");
                }
                thread::sleep(Duration::from_millis(1));
            }
            Ok(())
        })?;
        if restart > 0 {
            took.push(began.elapsed().as_secs_f64() * 1e3);
            writes += written(&fs::read_to_string(start.log)?).context("the agent's log names no writes")?;
        }
    }
    let figure = Figure::of(&took);
    let median = figure.median;
    report.row("C7", format!("killed; process start → /healthz says 200, nothing changed{name}"), "ms", figure);
    if bars {
        report.bar("C7", "ready after a restart, ms".to_owned(), Bound::AtMost(400.0), median, true);
    }
    report.bar("C7", format!("map writes of {RESTARTS} restarts{name}"), Bound::AtMost(0.0), f64::from(writes), true);
    Ok(())
}

/// Whether the agent of this namespace is ready.
fn healthy() -> bool {
    let ask = || -> Result<bool> {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, 10_256))?;
        stream.set_read_timeout(Some(Duration::from_secs(1)))?;
        stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer.starts_with("HTTP/1.1 200"))
    };
    ask().unwrap_or(false)
}

/// What the agent says it wrote to bring its first full state into force.
fn written(log: &str) -> Option<u32> {
    let line = log.lines().find(|line| line.contains("first full state programmed"))?;
    let number = line.split("writes=").nth(1)?;
    number.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}
