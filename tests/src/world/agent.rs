//! The real agent on a node.

use std::{
    ffi::{OsStr, OsString},
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

/// A dataplane that is no eBPF.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fallback {
    Nftables,
    IptablesNft,
    IptablesLegacy,
    Ipvs,
}

impl Fallback {
    /// Those that every machine has. Not every kernel has IPVS, which has a suite of its own.
    pub const ALL: [Self; 3] = [Self::Nftables, Self::IptablesNft, Self::IptablesLegacy];

    pub fn name(self) -> &'static str {
        match self {
            Self::Nftables => "nftables",
            Self::IptablesNft => "iptables-nft",
            Self::IptablesLegacy => "iptables-legacy",
            Self::Ipvs => "ipvs",
        }
    }

    /// The commands with which its rules are looked at, by the beginnings of their names.
    pub fn iptables(self) -> Option<[&'static str; 2]> {
        match self {
            Self::Nftables | Self::Ipvs => None,
            Self::IptablesNft => Some(["iptables-nft", "ip6tables-nft"]),
            Self::IptablesLegacy => Some(["iptables-legacy", "ip6tables-legacy"]),
        }
    }

    fn arguments(self) -> &'static [&'static str] {
        match self {
            Self::Nftables => &["--proxy-mode", "nftables"],
            Self::Ipvs => &["--proxy-mode", "ipvs"],
            Self::IptablesNft => {
                &["--proxy-mode", "iptables", "--iptables-flavour", "nft", "--iptables-localhost-nodeports"]
            }
            Self::IptablesLegacy => {
                &["--proxy-mode", "iptables", "--iptables-flavour", "legacy", "--iptables-localhost-nodeports"]
            }
        }
    }
}

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
    /// The dataplane in place of eBPF.
    pub fallback: Option<Fallback>,
    /// The directory to read instead of the world's own.
    pub source: Option<PathBuf>,
    /// The cluster to watch instead of a directory.
    pub kubeconfig: Option<PathBuf>,
    /// As in a pod: no other input than the service account's directory, in its place, and where the API server is.
    pub service_account: Option<(PathBuf, SocketAddr)>,
    /// Further arguments of `proxy-agent run`.
    pub extra: Vec<String>,
    /// Note every bpf(2) call that it makes, for [`Node::bpf_calls`].
    pub traced: bool,
    /// Its only capabilities, as setpriv(1) names them.
    pub capabilities: Option<String>,
    /// A directory of programs that it finds before the system's.
    pub programs: Option<PathBuf>,
    /// It finds none of the system's.
    pub only_programs: bool,
}

impl AgentOptions {
    pub fn new(socket_lb: SocketLb) -> Self {
        Self {
            socket_lb,
            fallback: None,
            source: None,
            kubeconfig: None,
            service_account: None,
            extra: Vec::new(),
            traced: false,
            capabilities: None,
            programs: None,
            only_programs: false,
        }
    }

    /// Where another dataplane than eBPF serves, all goes per packet.
    pub fn by(fallback: Fallback) -> Self {
        Self { fallback: Some(fallback), ..Self::new(SocketLb::Node) }
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
        let AgentOptions {
            socket_lb,
            fallback,
            source,
            kubeconfig,
            service_account,
            extra,
            traced,
            capabilities,
            programs,
            only_programs,
        } = options;
        let name = &node.place.name;
        let log = logs.join(format!("{name}.log"));
        let stderr =
            File::options().create(true).append(true).open(&log).with_context(|| format!("open {}", log.display()))?;
        let input: &[&OsStr] = match (kubeconfig, service_account) {
            (Some(kubeconfig), _) => &["--kubeconfig".as_ref(), kubeconfig.as_os_str()],
            (None, Some(_)) => &[],
            (None, None) => &["--source".as_ref(), source.as_deref().unwrap_or(objects).as_os_str()],
        };
        let trace = traced.then(|| logs.join(format!("{name}.trace")));
        let mut words: Vec<OsString> = Vec::new();
        let mut variables: Vec<(&str, String)> = Vec::new();
        if let Some((account, server)) = service_account {
            words.extend(["unshare", "--mount", "--propagation=private", "sh", "-c", MOUNTED].map(OsString::from));
            words.push(account.into());
            variables.push(("KUBERNETES_SERVICE_HOST", server.ip().to_string()));
            variables.push(("KUBERNETES_SERVICE_PORT", server.port().to_string()));
        }
        if let Some(capabilities) = capabilities {
            // By its path, for it may be in none of the directories that the agent is to look in.
            words.extend(["/usr/bin/setpriv".into(), format!("--bounding-set=-all,{capabilities}").into()]);
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
            .args(fallback.iter().flat_map(|fallback| fallback.arguments()))
            .args(extra)
            .env("NO_COLOR", "1")
            .env("PATH", path(programs.as_deref(), *only_programs))
            // The machine's own proxy settings and cluster mean nothing inside.
            .env_remove("KUBECONFIG")
            .env("HOME", "/nonexistent")
            .envs(variables)
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

/// Where a pod's service account is, for this process and what it becomes alone.
const MOUNTED: &str = "mount -t tmpfs none /run && mkdir -p /var/run/secrets/kubernetes.io && \
                       ln -s \"$0\" /var/run/secrets/kubernetes.io/serviceaccount && exec \"$@\"";

fn path(first: Option<&Path>, alone: bool) -> OsString {
    let system = std::env::var_os("PATH").filter(|_| !alone);
    let dirs: Vec<OsString> = first.map(OsString::from).into_iter().chain(system).collect();
    dirs.join(OsStr::new(":"))
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

    /// Whether its programs know that nobody else translates here.
    pub fn is_alone(&self) -> Result<bool> {
        Ok(self.pinned_map("alone")?.values().flatten().any(|byte| *byte != 0))
    }

    /// Takes everything out of one of its hash maps; how much there was.
    pub fn clear_map(&self, name: &str) -> Result<usize> {
        pins::clear(&self.bpffs, name)
    }

    /// Takes the program of one of its links off its place, behind its back.
    pub fn detach_link(&self, name: &str) -> Result<()> {
        pins::detach(&self.bpffs, name)
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
