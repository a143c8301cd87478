//! A real etcd and kube-apiserver, for as long as a test lives.
//!
//! Both run below one private directory, on loopback or in a namespace the test made, on ports that were free. There are no
//! controllers: a Service gets its cluster IPs from the server itself, EndpointSlices and Nodes are what the test writes.
//! Authorization is RBAC as in a real cluster, and the agent's user is kube-proxy's, so that what the agent asks for beyond
//! `system:node-proxier` is refused here too.
//!
//! [`ApiServer::start_whole`] is the one of a whole cluster ([`crate::cluster`]): with controllers, and pods that run.
//!
//! The programs come from `KUBEBUILDER_ASSETS`; else etcd from PATH, and kube-apiserver built with Go ([`crate::golang`]).

mod relay;

use std::{
    fs::{self, File},
    io::Write as _,
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use nix::{
    sys::signal::{SigSet, SigmaskHow, Signal, kill, sigprocmask},
    unistd::Pid,
};

pub use self::relay::Relay;
use crate::golang;

/// Cluster IPs are taken from here.
pub const SERVICE_RANGES: &str = "10.96.0.0/16,fd00:96::/112";

/// On two busy CPUs a start takes some ten seconds.
const START: Duration = Duration::from_secs(90);

/// The programs, wherever they came from.
#[derive(Clone, Debug)]
pub struct Programs {
    etcd: PathBuf,
    apiserver: PathBuf,
}

impl Programs {
    /// Finds or builds them; the error says why there are none: a reason to skip.
    pub fn find() -> Result<Self> {
        if on_path("kubectl").is_none() {
            bail!("there is no `kubectl` (Debian: kubernetes-client)");
        }
        if let Some(assets) = std::env::var_os("KUBEBUILDER_ASSETS") {
            let program = |name: &str| {
                let path = Path::new(&assets).join(name);
                if path.is_file() {
                    Ok(path)
                } else {
                    bail!("KUBEBUILDER_ASSETS is set, but there is no {}", path.display())
                }
            };
            return Ok(Self { etcd: program("etcd")?, apiserver: program("kube-apiserver")? });
        }
        let etcd =
            on_path("etcd").context("there is no `etcd` (Debian: etcd-server) and KUBEBUILDER_ASSETS is not set")?;
        Ok(Self { etcd, apiserver: golang::APISERVER.quick().build_with_path()? })
    }
}

pub(crate) fn on_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join(program)).find(|path| path.is_file())
}

/// Where the servers run.
#[derive(Clone, Debug)]
pub struct Seat {
    pub address: IpAddr,
    /// Path of a network namespace; `None`: the test's own.
    pub namespace: Option<PathBuf>,
}

impl Default for Seat {
    fn default() -> Self {
        Self { address: Ipv4Addr::LOCALHOST.into(), namespace: None }
    }
}

impl Seat {
    fn command(&self, program: &Path) -> Command {
        match &self.namespace {
            None => Command::new(program),
            Some(namespace) => {
                let mut command = Command::new("nsenter");
                command.arg(format!("--net={}", namespace.display())).arg(program);
                command
            }
        }
    }
}

/// Who asks. Tokens are no secrets: the server dies with the test.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum User {
    /// May do everything.
    Admin,
    /// kube-proxy's user: what `system:node-proxier` grants.
    Proxy,
    /// Known, but nothing is granted.
    Nobody,
    /// Not known at all.
    Stranger,
}

impl User {
    const fn token(self) -> &'static str {
        match self {
            Self::Admin => "admin-token",
            Self::Proxy => "proxy-token",
            Self::Nobody => "nobody-token",
            Self::Stranger => "stranger-token",
        }
    }
}

const TOKENS: &str =
    "admin-token,admin,admin,system:masters\nproxy-token,system:kube-proxy,proxy\nnobody-token,nobody,nobody\n";

/// A running API server with its storage. Dropping it ends both and removes the directory.
pub struct ApiServer {
    programs: Programs,
    seat: Seat,
    dir: PathBuf,
    port: u16,
    etcd_port: u16,
    /// Of a whole cluster.
    whole: bool,
    etcd: Option<Child>,
    server: Option<Child>,
}

impl ApiServer {
    pub fn start(programs: Programs, seat: Seat) -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("proxy-apiserver-{}-{number}", std::process::id()));
        Self::start_in(programs, seat, dir, false, "")
    }

    /// For a cluster whose pods run: they get tokens of their service accounts, nodes may only what nodes may, and the Service
    /// `kubernetes` leads here. `users`: further lines for the file of tokens.
    pub fn start_whole(programs: Programs, seat: Seat, dir: PathBuf, users: &str) -> Result<Self> {
        Self::start_in(programs, seat, dir, true, users)
    }

    fn start_in(programs: Programs, seat: Seat, dir: PathBuf, whole: bool, users: &str) -> Result<Self> {
        fs::create_dir_all(&dir).with_context(|| format!("make {}", dir.display()))?;
        let [port, etcd_port, peer_port] = free_ports()?;
        let mut server = Self { programs, seat, dir, port, etcd_port, whole, etcd: None, server: None };
        fs::write(server.dir.join("tokens.csv"), format!("{TOKENS}{users}"))?;
        server.start_etcd(peer_port)?;
        server.start_server()?;
        server.wait_ready()?;
        Ok(server)
    }

    fn start_etcd(&mut self, peer_port: u16) -> Result<()> {
        let client = format!("http://127.0.0.1:{}", self.etcd_port);
        let peer = format!("https://127.0.0.1:{peer_port}");
        let mut command = self.seat.command(&self.programs.etcd);
        command
            .arg("--data-dir")
            .arg(self.dir.join("etcd"))
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("default={peer}"), "--snapshot-count", "10000"])
            // Nobody is peer to a single member; but this makes etcd write a key pair, which the API server needs below.
            .arg("--peer-auto-tls");
        self.etcd = Some(spawn(command, &self.dir.join("etcd.log"))?);
        let key = self.key();
        let began = Instant::now();
        while !key.is_file() {
            if began.elapsed() > START {
                bail!("etcd wrote no key within {} s: {}", START.as_secs(), tail(&self.dir.join("etcd.log")));
            }
            sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// The key that service account tokens are signed with.
    pub(crate) fn key(&self) -> PathBuf {
        self.dir.join("etcd/fixtures/peer/key.pem")
    }

    fn start_server(&mut self) -> Result<()> {
        let key = self.key();
        let mut command = self.seat.command(&self.programs.apiserver);
        command
            .arg(format!("--etcd-servers=http://127.0.0.1:{}", self.etcd_port))
            .arg(format!("--bind-address={}", self.seat.address))
            .arg(format!("--advertise-address={}", self.seat.address))
            .arg(format!("--secure-port={}", self.port))
            .arg(format!("--cert-dir={}", self.dir.join("certs").display()))
            .arg(format!("--token-auth-file={}", self.dir.join("tokens.csv").display()))
            .arg(format!("--service-cluster-ip-range={SERVICE_RANGES}"))
            .arg(format!("--service-account-key-file={}", key.display()))
            .arg(format!("--service-account-signing-key-file={}", key.display()))
            .arg("--service-account-issuer=https://kubernetes.default.svc");
        if self.whole {
            command.args([
                "--authorization-mode=Node,RBAC",
                "--enable-admission-plugins=NodeRestriction",
                "--allow-privileged=true",
                "--kubelet-preferred-address-types=InternalIP",
            ]);
        } else {
            command.args([
                "--authorization-mode=RBAC",
                // Pods are not what this is about.
                "--disable-admission-plugins=ServiceAccount",
                // As clusters have it: a Pod may have a privileged step.
                "--allow-privileged=true",
                // Loopback addresses are refused as endpoints of the Service `kubernetes`.
                "--endpoint-reconciler-type=none",
            ]);
        }
        self.server = Some(spawn(command, &self.dir.join("apiserver.log"))?);
        Ok(())
    }

    /// Waits until the server answers as a whole: its built-in roles and namespaces included.
    fn wait_ready(&mut self) -> Result<()> {
        let began = Instant::now();
        loop {
            if let Some(server) = &mut self.server
                && let Some(status) = server.try_wait()?
            {
                bail!("kube-apiserver ended ({status}): {}", tail(&self.dir.join("apiserver.log")));
            }
            let why = match self.kubectl(&["get", "--raw", "/readyz"], "") {
                Ok(_) => match self.kubectl(&["get", "namespace", "default"], "") {
                    Ok(_) => return Ok(()),
                    Err(error) => error,
                },
                Err(error) => error,
            };
            if began.elapsed() > START {
                bail!("kube-apiserver is not ready after {} s: {why:#}", START.as_secs());
            }
            sleep(Duration::from_millis(200));
        }
    }

    pub fn address(&self) -> SocketAddr {
        SocketAddr::new(self.seat.address, self.port)
    }

    /// The certificate that the server's is checked with: its own.
    pub(crate) fn authority(&self) -> PathBuf {
        self.dir.join("certs/apiserver.crt")
    }

    /// Writes a kubeconfig for `user`; `server` is where it leads, [`Self::address`] or a [`Relay`] to it.
    pub fn kubeconfig(&self, user: User, server: SocketAddr) -> Result<PathBuf> {
        self.kubeconfig_of(&format!("{user:?}-{}", server.port()), user.token(), server)
    }

    /// The same for whoever has this token; `name` is the file's.
    pub fn kubeconfig_of(&self, name: &str, token: &str, server: SocketAddr) -> Result<PathBuf> {
        let path = self.dir.join(format!("{name}.kubeconfig"));
        let authority = self.authority();
        let config = serde_json::json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": {"server": format!("https://{server}"), "certificate-authority": authority}}],
            "users": [{"name": "test", "user": {"token": token}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
            "current-context": "test",
        });
        fs::write(&path, serde_json::to_vec_pretty(&config)?).with_context(|| format!("write {}", path.display()))?;
        Ok(path)
    }

    /// What the kubelet mounts into the pods of a service account: its directory, with a token of the server's own making.
    pub fn service_account(&self, namespace: &str, name: &str) -> Result<PathBuf> {
        let dir = self.dir.join("serviceaccount");
        fs::create_dir_all(&dir).with_context(|| format!("make {}", dir.display()))?;
        fs::write(dir.join("token"), self.kubectl(&["create", "token", name, "--namespace", namespace], "")?.trim())?;
        fs::write(dir.join("namespace"), namespace)?;
        fs::copy(self.authority(), dir.join("ca.crt")).context("the server's certificate")?;
        Ok(dir)
    }

    /// Runs kubectl as the administrator; returns what it printed.
    pub fn kubectl(&self, args: &[&str], stdin: &str) -> Result<String> {
        let kubeconfig = self.kubeconfig(User::Admin, self.address())?;
        let mut command = self.seat.command(Path::new("kubectl"));
        command
            .arg("--kubeconfig")
            .arg(kubeconfig)
            .args(["--request-timeout", "10s", "--cache-dir"])
            .arg(self.dir.join("kubectl-cache"))
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().context("start kubectl")?;
        if let Some(mut pipe) = child.stdin.take() {
            // kubectl that fails early reads nothing: its own words say more than a broken pipe.
            let _unread = pipe.write_all(stdin.as_bytes());
        }
        let output = child.wait_with_output().context("wait for kubectl")?;
        if !output.status.success() {
            bail!("kubectl {}: {}", args.join(" "), String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Creates or changes the objects of a YAML stream.
    pub fn apply(&self, yaml: &str) -> Result<()> {
        self.kubectl(&["apply", "--validate=false", "-f", "-"], yaml).map(drop)
    }

    /// Changes the statuses of the objects of a YAML stream, which nothing else may: here there is no controller to do it.
    pub fn apply_status(&self, yaml: &str) -> Result<()> {
        let args =
            ["apply", "--validate=false", "--server-side", "--force-conflicts", "--subresource=status", "-f", "-"];
        self.kubectl(&args, yaml).map(drop)
    }

    pub fn delete(&self, kind: &str, name: &str) -> Result<()> {
        self.kubectl(&["delete", kind, name, "--wait=false"], "").map(drop)
    }

    /// Kills the API server as a crash would; its storage goes on.
    pub fn kill(&mut self) -> Result<()> {
        if let Some(mut server) = self.server.take() {
            server.kill().context("kill kube-apiserver")?;
            server.wait().context("wait for kube-apiserver")?;
        }
        Ok(())
    }

    /// Starts the API server again, on the same port, and waits until it is ready.
    pub fn restart(&mut self) -> Result<()> {
        self.kill()?;
        self.start_server()?;
        self.wait_ready()
    }

    /// Stops the server in its tracks: its connections stay open and silent, new ones are accepted by the kernel and never
    /// answered.
    pub fn freeze(&self) -> Result<()> {
        self.signal(Signal::SIGSTOP)
    }

    pub fn thaw(&self) -> Result<()> {
        self.signal(Signal::SIGCONT)
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        let server = self.server.as_ref().context("kube-apiserver is not running")?;
        kill(Pid::from_raw(i32::try_from(server.id())?), signal).with_context(|| format!("{signal} to kube-apiserver"))
    }

    /// The end of the server's log, for a test that failed.
    pub fn log(&self) -> String {
        tail(&self.dir.join("apiserver.log"))
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        for child in [&mut self.server, &mut self.etcd] {
            if let Some(mut child) = child.take() {
                // What is gone already needs no ending.
                let _gone = child.kill();
                let _gone = child.wait();
            }
        }
        // That of a whole cluster goes with the rest of it.
        if !self.whole
            && let Err(error) = fs::remove_dir_all(&self.dir)
        {
            eprintln!("cannot remove {}: {error}", self.dir.display());
        }
    }
}

/// Starts a program that dies with this one, its output appended to a file.
pub(crate) fn spawn(mut command: Command, log: &Path) -> Result<Child> {
    use std::os::unix::process::CommandExt as _;
    let name = command.get_program().to_string_lossy().into_owned();
    let output =
        File::options().create(true).append(true).open(log).with_context(|| format!("open {}", log.display()))?;
    command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
    // SAFETY: the closure makes two system calls, which are async-signal-safe, and touches no memory of the parent.
    unsafe {
        command.pre_exec(|| {
            // Who cleans up on signals has them blocked, and a child that inherits that could not be stopped.
            sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)?;
            nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).map_err(Into::into)
        });
    }
    command.spawn().with_context(|| format!("start {name}"))
}

fn free_ports<const N: usize>() -> Result<[u16; N]> {
    // Held together, so that they differ.
    let listeners = [(); N].map(|()| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)));
    let mut ports = [0; N];
    for (port, listener) in ports.iter_mut().zip(listeners) {
        *port = listener.context("find a free port")?.local_addr()?.port();
    }
    Ok(ports)
}

pub(crate) fn tail(log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(15)..].join("\n")
}
