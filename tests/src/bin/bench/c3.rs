//! C3: from one changed EndpointSlice, written to the agent's watch, to the map that the programs read.
//!
//! The API server is one made of a few lines: it lists what it holds, keeps watches open, and sends what it is told. The
//! real agent runs against it, on the other CPU.

use std::{
    fmt::Write as _,
    fs,
    io::{BufRead as _, BufReader, Write as _},
    net::{Ipv4Addr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use aya::maps::{HashMap, Map, MapData};
use nix::{
    libc,
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    unistd::Pid,
};
use proxy_common::{
    Be16, Ipv4Be,
    frontend::{FrontendKey, FrontendValue},
    proto::TCP,
};

use crate::{
    Scale,
    report::{Bound, Figure, Report},
    rules::{PORT, vip},
    world::{Cgroups, Netns},
};

const ENDPOINTS: u32 = 10;
const NODE: &str = "bench-node";
const AGENT_CPU: usize = 0;
const OUR_CPU: usize = 1;

fn service(index: u32) -> String {
    format!(
        r#"{{"metadata":{{"name":"s{index}","namespace":"bench","uid":"s{index}","resourceVersion":"1","creationTimestamp":"2026-01-01T00:00:00Z"}},"spec":{{"type":"ClusterIP","clusterIP":"{vip}","clusterIPs":["{vip}"],"ipFamilies":["IPv4"],"ports":[{{"name":"http","port":{PORT},"protocol":"TCP"}}]}}}}"#,
        vip = vip(index)
    )
}

/// The slice of one Service; its last endpoint tells the version.
fn slice(index: u32, version: u32) -> String {
    let first = u32::from(Ipv4Addr::new(10, 128, 0, 0)) + index * (ENDPOINTS + 1);
    let mut endpoints = String::new();
    for n in 0..ENDPOINTS {
        let n = if n + 1 == ENDPOINTS { n + version % 2 } else { n };
        let comma = if endpoints.is_empty() { "" } else { "," };
        let _ = write!(
            endpoints,
            r#"{comma}{{"addresses":["{}"],"conditions":{{"ready":true,"serving":true,"terminating":false}},"nodeName":"n{}"}}"#,
            Ipv4Addr::from(first + n),
            n % 7
        );
    }
    format!(
        r#"{{"metadata":{{"name":"s{index}-a","namespace":"bench","uid":"e{index}","resourceVersion":"{}","labels":{{"kubernetes.io/service-name":"s{index}"}}}},"addressType":"IPv4","ports":[{{"name":"http","port":8080,"protocol":"TCP"}}],"endpoints":[{endpoints}]}}"#,
        version + 2
    )
}

fn list(kind: &str, version: &str, items: impl Iterator<Item = String>) -> String {
    let items: Vec<_> = items.collect();
    format!(
        r#"{{"kind":"{kind}List","apiVersion":"{version}","metadata":{{"resourceVersion":"1"}},"items":[{}]}}"#,
        items.join(",")
    )
}

struct Api {
    services: String,
    slices: String,
    nodes: String,
    /// Where the agent watches EndpointSlices.
    watch: Mutex<Option<TcpStream>>,
}

impl Api {
    fn new(services: u32) -> Self {
        let node = format!(
            r#"{{"metadata":{{"name":"{NODE}","uid":"n","resourceVersion":"1"}},"spec":{{}},"status":{{"addresses":[{{"type":"InternalIP","address":"10.1.0.1"}}]}}}}"#
        );
        Self {
            services: list("Service", "v1", (0..services).map(service)),
            slices: list("EndpointSlice", "discovery.k8s.io/v1", (0..services).map(|i| slice(i, 0))),
            nodes: list("Node", "v1", std::iter::once(node)),
            watch: Mutex::new(None),
        }
    }

    fn serve(self: &Arc<Self>, listener: TcpListener) {
        let api = Arc::clone(self);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let api = Arc::clone(&api);
                // A connection that breaks off is the agent's end.
                thread::spawn(move || api.connection(stream));
            }
        });
    }

    fn connection(&self, mut stream: TcpStream) -> Result<()> {
        stream.set_nodelay(true)?;
        let mut reader = BufReader::new(stream.try_clone()?);
        loop {
            let mut request = String::new();
            if reader.read_line(&mut request)? == 0 {
                return Ok(());
            }
            let mut header = String::new();
            while reader.read_line(&mut header)? > 2 {
                header.clear();
            }
            let target = request.split(' ').nth(1).unwrap_or_default();
            let (path, query) = target.split_once('?').unwrap_or((target, ""));
            let body = match path {
                "/api/v1/services" => &self.services,
                "/apis/discovery.k8s.io/v1/endpointslices" => &self.slices,
                _ if path.starts_with("/api/v1/nodes") => &self.nodes,
                _ => {
                    stream.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")?;
                    continue;
                }
            };
            if query.contains("watch=") {
                stream.write_all(
                    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n",
                )?;
                if path.ends_with("endpointslices") {
                    *self.watch.lock().unwrap_or_else(PoisonError::into_inner) = Some(stream.try_clone()?);
                }
            } else {
                write!(
                    stream,
                    "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
                    body.len()
                )?;
                stream.write_all(body.as_bytes())?;
            }
        }
    }

    fn send(&self, chunk: &[u8]) -> Result<()> {
        let mut watch = self.watch.lock().unwrap_or_else(PoisonError::into_inner);
        watch.as_mut().context("the agent does not watch EndpointSlices")?.write_all(chunk)?;
        Ok(())
    }
}

/// A changed slice as one chunk of an answer to a watch.
fn event(index: u32, version: u32) -> Vec<u8> {
    let event = format!("{{\"type\":\"MODIFIED\",\"object\":{}}}\n", slice(index, version));
    format!("{:x}\r\n{event}\r\n", event.len()).into_bytes()
}

/// The agent, and what it leaves behind when it is killed.
struct Agent {
    child: Child,
    files: PathBuf,
    bpffs: PathBuf,
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

/// Ahead of what else runs on the machine, or waiting for a CPU is what is measured; children inherit it. Where it is
/// refused the load in the report tells.
fn real_time(on: bool) {
    let (policy, priority) = if on { (libc::SCHED_FIFO, 1) } else { (libc::SCHED_OTHER, 0) };
    let parameter = libc::sched_param { sched_priority: priority };
    // SAFETY: this thread, and a parameter that lives through the call.
    let _ = unsafe { libc::sched_setscheduler(0, policy, &raw const parameter) };
}

fn pin_to(cpu: usize) -> Result<CpuSet> {
    let before = sched_getaffinity(Pid::from_raw(0))?;
    let mut cpus = CpuSet::new();
    cpus.set(cpu)?;
    sched_setaffinity(Pid::from_raw(0), &cpus)?;
    Ok(before)
}

pub fn measure(scale: &Scale, agent: Option<&Path>, cgroups: &Cgroups, report: &mut Report) -> Result<()> {
    let Some(program) = agent else {
        report.skip("C3: no agent was given (--agent)");
        return Ok(());
    };
    let services = scale.change_services;
    let netns = Netns::new()?;
    netns.ip("link set lo up\n")?;
    let api = Arc::new(Api::new(services));
    let port = netns.enter(|| {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let port = listener.local_addr()?.port();
        api.serve(listener);
        Ok(port)
    })?;

    let files = std::env::temp_dir().join(cgroups.root().file_name().unwrap_or_default());
    fs::create_dir_all(&files)?;
    let kubeconfig = files.join("kubeconfig");
    fs::write(
        &kubeconfig,
        format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: c\nclusters:\n- name: c\n  cluster:\n    server: http://127.0.0.1:{port}\n\
             contexts:\n- name: c\n  context:\n    cluster: c\n    user: u\nusers:\n- name: u\n  user: {{}}\n"
        ),
    )?;
    let log = fs::File::create(files.join("log"))?;
    let bpffs = bpffs(cgroups.root());
    fs::create_dir_all(&bpffs)?;
    // A child inherits the CPU it may run on.
    let before = pin_to(AGENT_CPU)?;
    real_time(true);
    let started = Instant::now();
    let child = Command::new("nsenter")
        .arg(format!("--net={}", netns.path().display()))
        .arg(program)
        .args(["run", "--hostname-override", NODE, "--kubeconfig"])
        .arg(&kubeconfig)
        .arg("--bpffs")
        .arg(&bpffs)
        .arg("--cgroup-root")
        .arg(cgroups.make("agent")?)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn();
    real_time(false);
    sched_setaffinity(Pid::from_raw(0), &before)?;
    let mut agent = Agent { child: child?, files: files.clone(), bpffs: bpffs.clone() };
    let outcome = changes(scale, &api, &mut agent, started, report);
    if let Err(error) = outcome {
        let log = fs::read_to_string(files.join("log")).unwrap_or_default();
        let tail: Vec<_> = log.lines().rev().take(10).collect();
        report.skip(format!("C3: {error:#}; the agent's last words: {}", tail.join(" | ")));
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

fn changes(scale: &Scale, api: &Api, agent: &mut Agent, started: Instant, report: &mut Report) -> Result<()> {
    let services = scale.change_services;
    let map = filled(services, agent)?;
    let cold = started.elapsed().as_secs_f64() * 1e3;
    let size = format!("{services} services, {} endpoints", services * ENDPOINTS);
    report.row(
        "C1",
        format!("process start → last frontend in its map, {size}"),
        "ms",
        Figure { median: cold, min: cold, max: cold },
    );
    // The watch may still be on its way.
    thread::sleep(Duration::from_secs(1));

    pin_to(OUR_CPU)?;
    real_time(true);
    let mut took = Vec::with_capacity(scale.changes);
    for change in 0..scale.changes {
        let change = u32::try_from(change)?;
        let index = change.wrapping_mul(7_919) % services;
        // Twice the number of Services and each has changed and changed back.
        let version = 1 + change / services;
        let chunk = event(index, version);
        let key = key(index);
        let before = map.get(&key, 0)?;
        thread::sleep(Duration::from_millis(2));
        let start = Instant::now();
        api.send(&chunk)?;
        while map.get(&key, 0)? == before {
            if start.elapsed() > Duration::from_secs(5) {
                bail!("a change was not in the map after 5 s");
            }
        }
        took.push(start.elapsed().as_nanos() as f64 / 1e3);
    }
    real_time(false);
    report.row("C3", format!("EndpointSlice event → map, {size}"), "µs", Figure::of(&took));
    took.sort_by(f64::total_cmp);
    let quantile = |q: f64| took.get((took.len() as f64 * q) as usize).copied().unwrap_or(f64::NAN);
    report.bar("C3", format!("event → map, p50, {size}, µs"), Bound::AtMost(200.0), quantile(0.5), true);
    report.bar("C3", format!("event → map, p99, {size}, µs"), Bound::AtMost(2_000.0), quantile(0.99), true);
    Ok(())
}
