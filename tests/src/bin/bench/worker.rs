//! Processes that live in one namespace and one cgroup and do one job. Each is this program again; it ends when its
//! standard input does, hence with its parent.

use std::{
    env, fs,
    fs::File,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    mem::zeroed,
    net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream},
    os::fd::AsFd as _,
    path::PathBuf,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::{
    libc,
    sched::{CloneFlags, CpuSet, sched_setaffinity, setns, unshare},
    sys::socket::{setsockopt, sockopt},
    unistd::Pid,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::rules::SERVER_PORT;

/// CPU of clients and servers: one for both, or waking the other would be what is measured.
pub const CPU: usize = 1;

#[derive(Serialize, Deserialize, Clone)]
pub enum Job {
    /// Keeps a new network namespace.
    Hold,
    /// Answers every byte with `id`.
    Serve { netns: PathBuf, at: SocketAddr, id: u8 },
    /// Runs transactions when told to.
    Ask { netns: PathBuf, cgroup: PathBuf, to: SocketAddr, id: u8 },
    /// Times `connect` of UDP sockets.
    ConnectCost { netns: PathBuf, variants: Vec<Variant>, batches: usize },
    /// Connects over and over until a certain backend is reached: any address is its own, at the backends' port.
    Reach { netns: PathBuf, cgroup: PathBuf },
}

#[derive(Serialize, Deserialize, Clone)]
pub struct Variant {
    pub label: String,
    pub cgroup: PathBuf,
    pub to: Vec<SocketAddrV4>,
    /// A new socket for each `connect`.
    pub fresh: bool,
}

#[derive(Serialize, Deserialize, Clone, Copy)]
pub enum Mode {
    /// Connect, request, response, close.
    Crr,
    /// Request, response on one connection.
    Rr,
}

#[derive(Serialize, Deserialize)]
struct Round {
    mode: Mode,
    ms: u64,
}

/// Whom [`Job::Reach`] is to reach, and through what.
#[derive(Serialize, Deserialize)]
struct Reach {
    to: SocketAddrV4,
    backend: Ipv4Addr,
}

/// What one round of transactions came to.
#[derive(Serialize, Deserialize, Clone, Copy, Debug)]
pub struct Sample {
    pub per_second: f64,
    pub p50_us: f64,
    pub p99_us: f64,
}

/// One variant's nanoseconds per `connect`, a value for each batch.
#[derive(Serialize, Deserialize)]
pub struct Cost {
    pub label: String,
    pub ns: Vec<f64>,
}

pub struct Worker {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Worker {
    /// Starts a worker and waits until it is ready.
    pub fn start(job: Job) -> Result<Self> {
        let mut worker = Self::start_with_output(job)?;
        worker.line::<String>()?;
        Ok(worker)
    }

    /// Starts a worker that says nothing but its results.
    pub fn start_with_output(job: Job) -> Result<Self> {
        let mut child =
            Command::new(env::current_exe()?).arg("--worker").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let mut input = child.stdin.take().context("no stdin")?;
        writeln!(input, "{}", serde_json::to_string(&job)?)?;
        let output = BufReader::new(child.stdout.take().context("no stdout")?);
        Ok(Self { child, input: Some(input), output })
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn round(&mut self, mode: Mode, ms: u64) -> Result<Sample> {
        let line = serde_json::to_string(&Round { mode, ms })?;
        writeln!(self.input.as_mut().context("no stdin")?, "{line}")?;
        self.line()
    }

    /// Returns at once; [`Self::line`] tells by how many connections it was reached.
    pub fn reach(&mut self, to: SocketAddrV4, backend: Ipv4Addr) -> Result<()> {
        let line = serde_json::to_string(&Reach { to, backend })?;
        Ok(writeln!(self.input.as_mut().context("no stdin")?, "{line}")?)
    }

    pub fn line<T: DeserializeOwned>(&mut self) -> Result<T> {
        let mut line = String::new();
        ensure!(self.output.read_line(&mut line)? > 0, "a worker ended early");
        Ok(serde_json::from_str(&line)?)
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        drop(self.input.take());
        // It may be busy serving; it has nothing to lose.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn run() -> Result<()> {
    nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
    let mut job = String::new();
    std::io::stdin().read_line(&mut job)?;
    match serde_json::from_str(&job)? {
        Job::Hold => {
            unshare(CloneFlags::CLONE_NEWNET)?;
            say(&"ready")?;
            std::io::stdin().read_to_end(&mut Vec::new())?;
            Ok(())
        }
        Job::Serve { netns, at, id } => serve(netns, at, id),
        Job::Ask { netns, cgroup, to, id } => {
            join_cgroup(&cgroup)?;
            enter(netns)?;
            say(&"ready")?;
            for line in std::io::stdin().lines() {
                let Round { mode, ms } = serde_json::from_str(&line?)?;
                let ms = Duration::from_millis(ms);
                say(&match mode {
                    Mode::Crr => transact::<true>(to, id, ms)?,
                    Mode::Rr => transact::<false>(to, id, ms)?,
                })?;
            }
            Ok(())
        }
        Job::ConnectCost { netns, variants, batches } => connect_cost(netns, &variants, batches),
        Job::Reach { netns, cgroup } => {
            join_cgroup(&cgroup)?;
            enter(netns)?;
            let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, SERVER_PORT))?;
            say(&"ready")?;
            for line in std::io::stdin().lines() {
                let Reach { to, backend } = serde_json::from_str(&line?)?;
                say(&reach(&listener, to, backend)?)?;
            }
            Ok(())
        }
    }
}

fn say<T: Serialize>(what: &T) -> Result<()> {
    println!("{}", serde_json::to_string(what)?);
    Ok(std::io::stdout().flush()?)
}

fn join_cgroup(cgroup: &std::path::Path) -> Result<()> {
    fs::write(cgroup.join("cgroup.procs"), "0").with_context(|| format!("cannot join {}", cgroup.display()))
}

fn enter(netns: PathBuf) -> Result<()> {
    setns(File::open(netns)?.as_fd(), CloneFlags::CLONE_NEWNET)?;
    let mut cpus = CpuSet::new();
    cpus.set(CPU)?;
    Ok(sched_setaffinity(Pid::from_raw(0), &cpus)?)
}

fn serve(netns: PathBuf, at: SocketAddr, id: u8) -> Result<()> {
    enter(netns)?;
    let listener = TcpListener::bind(at)?;
    say(&"ready")?;
    let mut byte = [0_u8; 1];
    loop {
        let (mut stream, _) = listener.accept()?;
        // A client that goes away in the middle of it is no matter.
        while matches!(stream.read(&mut byte), Ok(1)) {
            if stream.write_all(&[id]).is_err() {
                break;
            }
        }
    }
}

/// How many connections it took.
fn reach(listener: &TcpListener, to: SocketAddrV4, backend: Ipv4Addr) -> Result<u32> {
    let start = Instant::now();
    let mut connections = 0;
    loop {
        connections += 1;
        let client = TcpStream::connect(to)?;
        // No port is to stay behind in TIME_WAIT: there are more connections than ports.
        setsockopt(&client, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 0 })?;
        let (server, _) = listener.accept()?;
        if server.local_addr()?.ip() == backend {
            return Ok(connections);
        }
        ensure!(start.elapsed() < Duration::from_secs(5), "{to} did not lead to {backend} within 5 s");
    }
}

/// Latencies in steps of 1/16 µs up to a millisecond; no allocation while it counts.
struct Histogram([u32; 16_384]);

impl Histogram {
    fn add(&mut self, took: Duration) {
        let step = usize::try_from(took.as_nanos() * 16 / 1000).unwrap_or(usize::MAX);
        self.0[step.min(self.0.len() - 1)] += 1;
    }

    fn quantile_us(&self, q: f64) -> f64 {
        let total: u64 = self.0.iter().map(|n| u64::from(*n)).sum();
        let mut left = (total as f64 * q) as u64;
        for (step, n) in self.0.iter().enumerate() {
            if u64::from(*n) > left {
                return (step as f64 + 0.5) / 16.0;
            }
            left -= u64::from(*n);
        }
        f64::NAN
    }
}

fn transact<const CONNECT: bool>(to: SocketAddr, id: u8, lasts: Duration) -> Result<Sample> {
    let mut histogram = Histogram([0; 16_384]);
    let mut count = 0_u64;
    let mut byte = [0_u8; 1];
    let mut held = if CONNECT { None } else { Some(TcpStream::connect(to)?) };
    let start = Instant::now();
    let mut before = start;
    let mut now = start;
    while now - start < lasts {
        if let Some(stream) = &mut held {
            stream.write_all(&[1])?;
            stream.read_exact(&mut byte)?;
        } else {
            let mut stream = TcpStream::connect(to)?;
            stream.write_all(&[1])?;
            stream.read_exact(&mut byte)?;
        }
        if byte[0] != id {
            bail!("{to} was answered by {} instead of {id}", byte[0]);
        }
        now = Instant::now();
        histogram.add(now - before);
        before = now;
        count += 1;
    }
    Ok(Sample {
        per_second: count as f64 / (now - start).as_secs_f64(),
        p50_us: histogram.quantile_us(0.5),
        p99_us: histogram.quantile_us(0.99),
    })
}

const CALLS: usize = 10_000;

fn udp_socket() -> Result<i32> {
    // SAFETY: no pointers.
    let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    ensure!(fd >= 0, "socket: {}", std::io::Error::last_os_error());
    Ok(fd)
}

fn connect(fd: i32, to: &libc::sockaddr_in) -> i32 {
    // SAFETY: `to` is an address of the length given.
    unsafe { libc::connect(fd, std::ptr::from_ref(to).cast(), size_of::<libc::sockaddr_in>() as u32) }
}

fn connect_cost(netns: PathBuf, variants: &[Variant], batches: usize) -> Result<()> {
    enter(netns)?;
    let mut prepared = Vec::new();
    for variant in variants {
        // A socket belongs to the cgroup that its process was in when it was made.
        join_cgroup(&variant.cgroup)?;
        let addresses: Vec<_> = variant
            .to
            .iter()
            .map(|to| {
                // SAFETY: all zeroes is a valid sockaddr_in.
                let mut address: libc::sockaddr_in = unsafe { zeroed() };
                address.sin_family = libc::AF_INET as u16;
                address.sin_port = to.port().to_be();
                address.sin_addr.s_addr = u32::from_ne_bytes(to.ip().octets());
                address
            })
            .collect();
        let fd = udp_socket()?;
        for address in &addresses {
            ensure!(connect(fd, address) == 0, "{}: {}", variant.label, std::io::Error::last_os_error());
        }
        prepared.push((variant, addresses, fd, Vec::with_capacity(batches)));
    }
    for batch in 0..batches {
        let order: Vec<usize> =
            if batch % 2 == 0 { (0..prepared.len()).collect() } else { (0..prepared.len()).rev().collect() };
        for index in order {
            let (variant, addresses, fd, ns) = &mut prepared[index];
            let took = if variant.fresh {
                join_cgroup(&variant.cgroup)?;
                let start = Instant::now();
                for _ in 0..CALLS {
                    let fd = udp_socket()?;
                    connect(fd, &addresses[0]);
                    // SAFETY: opened above, used nowhere else.
                    unsafe { libc::close(fd) };
                }
                start.elapsed()
            } else {
                let mut at = 0;
                let start = Instant::now();
                for _ in 0..CALLS {
                    connect(*fd, &addresses[at]);
                    at += 1;
                    if at == addresses.len() {
                        at = 0;
                    }
                }
                start.elapsed()
            };
            ns.push(took.as_nanos() as f64 / CALLS as f64);
        }
    }
    let costs: Vec<_> =
        prepared.into_iter().map(|(variant, _, _, ns)| Cost { label: variant.label.clone(), ns }).collect();
    say(&costs)
}
