//! The real agent on a node.

use std::{
    ffi::OsString,
    fs::{self, File},
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use super::{
    Node,
    pins::{self, Pinned},
    trace,
};

/// Whose sockets are translated at connect time (`--socket-lb`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SocketLb {
    All,
    /// The node's own processes only: pods go per packet.
    Node,
    /// Nobody: pods go per packet, the node's own processes are not served.
    Off,
}

impl SocketLb {
    /// Those that serve everybody.
    pub const SERVING: [Self; 2] = [Self::All, Self::Node];

    pub fn name(self) -> &'static str {
        match self {
            Self::All => "all",
            Self::Node => "node",
            Self::Off => "off",
        }
    }
}

#[derive(Clone, Debug)]
pub struct AgentOptions {
    pub socket_lb: SocketLb,
    /// The directory to read instead of the world's own.
    pub source: Option<PathBuf>,
    /// The cluster to watch instead of a directory.
    pub kubeconfig: Option<PathBuf>,
    /// Further arguments of `proxy-agent run`.
    pub extra: Vec<String>,
    /// Note every bpf(2) call that it makes, for [`Node::bpf_calls`].
    pub traced: bool,
    /// Its only capabilities, as setpriv(1) names them.
    pub capabilities: Option<String>,
}

impl AgentOptions {
    pub fn new(socket_lb: SocketLb) -> Self {
        Self { socket_lb, source: None, kubeconfig: None, extra: Vec::new(), traced: false, capabilities: None }
    }
}

pub(super) struct Agent {
    child: Child,
    log: PathBuf,
    trace: Option<PathBuf>,
}

impl Agent {
    pub(super) fn start(
        node: &Node,
        program: &Path,
        objects: &Path,
        logs: &Path,
        options: &AgentOptions,
    ) -> Result<Self> {
        let AgentOptions { socket_lb, source, kubeconfig, extra, traced, capabilities } = options;
        let name = &node.place.name;
        let log = logs.join(format!("{name}.log"));
        let stderr =
            File::options().create(true).append(true).open(&log).with_context(|| format!("open {}", log.display()))?;
        let input = match kubeconfig {
            Some(kubeconfig) => ["--kubeconfig".as_ref(), kubeconfig.as_os_str()],
            None => ["--source".as_ref(), source.as_deref().unwrap_or(objects).as_os_str()],
        };
        let trace = traced.then(|| logs.join(format!("{name}.trace")));
        let mut words: Vec<OsString> = Vec::new();
        if let Some(capabilities) = capabilities {
            words.extend(["setpriv".into(), format!("--bounding-set=-all,{capabilities}").into()]);
        }
        if let Some(trace) = &trace {
            words.push("strace".into());
            words.extend(trace::ARGUMENTS.iter().map(OsString::from));
            words.extend(["-o".into(), trace.into()]);
        }
        words.push(program.into());
        let (first, rest) = words.split_first().context("a program to start")?;
        let child = node
            .place
            .command(first)?
            .args(rest)
            .arg("run")
            .args(input)
            .args(["--hostname-override", name, "--socket-lb", socket_lb.name()])
            .arg("--bpffs")
            .arg(&node.bpffs)
            .arg("--cgroup-root")
            .arg(&node.cgroup)
            .args(extra)
            .env("NO_COLOR", "1")
            // The machine's own proxy settings and cluster mean nothing inside.
            .env_remove("KUBECONFIG")
            .stdin(Stdio::null())
            .stdout(stderr.try_clone()?)
            .stderr(stderr)
            .spawn()
            .with_context(|| format!("start {} on {name}", program.display()))?;
        Ok(Self { child, log, trace })
    }

    pub(super) fn log_path(&self) -> &Path {
        &self.log
    }

    pub(super) fn log_tail(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let from = lines.len().saturating_sub(40);
        format!(
            "--- {} (last {} lines)\n{}",
            self.log.display(),
            lines.len() - from,
            lines.get(from..).unwrap_or_default().join("\n")
        )
    }
}

impl Drop for Agent {
    /// As a crash would; whatever is pinned stays.
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Node {
    /// What the agent has pinned, as it is now.
    pub fn pinned(&self) -> Result<Pinned> {
        Pinned::read(&self.bpffs)
    }

    /// One of the maps that only the agent writes.
    pub fn pinned_map(&self, name: &str) -> Result<pins::Elements> {
        pins::map(&self.bpffs, name)
    }

    /// Every bpf(2) call of the running agent so far that succeeded. It has to be started as `traced`.
    pub fn bpf_calls(&self) -> Result<Vec<trace::Call>> {
        let trace = self.agent.as_ref().and_then(|agent| agent.trace.as_ref()).context("no traced agent runs here")?;
        let text = fs::read_to_string(trace).with_context(|| format!("read {}", trace.display()))?;
        trace::calls(&text)
    }

    /// What the agent's log ends with, if there was one here and it has ended.
    pub fn agent_ended(&self) -> Option<String> {
        let agent = self.agent.as_ref()?;
        // An ended child that nobody has waited for has no executable any more.
        let alive = Path::new(&format!("/proc/{}/exe", agent.child.id())).exists();
        (!alive).then(|| agent.log_tail())
    }

    /// Asks one of the agent's HTTP servers, on the node's loopback.
    pub fn http(&self, port: u16, path: &str) -> Result<(u16, String)> {
        self.place.namespace.enter(|| get(port, path))?
    }

    /// `GET /status` as JSON.
    pub fn status(&self) -> Result<serde_json::Value> {
        let (code, body) = self.http(10249, "/status")?;
        if code != 200 {
            bail!("GET /status: {code} {body}");
        }
        serde_json::from_str(&body).context("GET /status")
    }

    /// The value of a metric, all its label sets summed up.
    pub fn metric(&self, name: &str) -> Result<f64> {
        let (_, body) = self.http(10249, "/metrics")?;
        let values: Vec<f64> = body
            .lines()
            .filter_map(|line| line.strip_prefix(name))
            .filter(|rest| rest.starts_with([' ', '{']))
            .filter_map(|rest| rest.rsplit(' ').next()?.parse().ok())
            .collect();
        if values.is_empty() {
            bail!("no metric {name} on {}", self.place.name);
        }
        Ok(values.iter().sum())
    }

    /// Waits until `/healthz` says that the first full state is in force.
    pub fn wait_ready(&self, timeout: Duration) -> Result<()> {
        let deadline = Instant::now() + timeout;
        loop {
            let last = match self.http(10256, "/healthz") {
                Ok((200, _)) => return Ok(()),
                Ok((code, body)) => format!("{code} {body}"),
                Err(error) => format!("{error:#}"),
            };
            let ended =
                self.agent.as_ref().is_none_or(|agent| !Path::new(&format!("/proc/{}/exe", agent.child.id())).exists());
            if ended || Instant::now() > deadline {
                let why = if ended { "ended".to_owned() } else { format!("not ready within {timeout:?} ({last})") };
                bail!("the agent on {} {why}\n{}", self.place.name, self.agent_log());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// One HTTP/1.0 exchange: the answer ends with the connection, so no parser for lengths or chunks is needed.
fn get(port: u16, path: &str) -> Result<(u16, String)> {
    let at = SocketAddr::from(([127, 0, 0, 1], port));
    let mut stream =
        TcpStream::connect_timeout(&at, Duration::from_secs(1)).with_context(|| format!("connect to {at}"))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    write!(stream, "GET {path} HTTP/1.0\r\nHost: {at}\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).with_context(|| format!("GET {path} from {at}"))?;
    let (head, body) = answer.split_once("\r\n\r\n").with_context(|| format!("GET {path} from {at}: no header"))?;
    let code = head.split_whitespace().nth(1).and_then(|code| code.parse().ok());
    Ok((code.with_context(|| format!("GET {path} from {at}: no status"))?, body.to_owned()))
}
