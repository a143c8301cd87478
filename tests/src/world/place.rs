//! A place where processes run: a pod, a node, the client outside. A network namespace and a cgroup.

use std::{
    fs::OpenOptions,
    io::{BufRead, BufReader, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::{
        atomic::{AtomicU32, Ordering},
        mpsc,
    },
    thread::JoinHandle,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};

use super::Namespace;
use crate::pod::{probe::Report, socket::Transport};

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Family {
    V4,
    V6,
}

impl Family {
    pub const BOTH: [Self; 2] = [Self::V4, Self::V6];
}

impl std::fmt::Display for Family {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::V4 => "v4",
            Self::V6 => "v6",
        })
    }
}

#[derive(Clone)]
pub struct Place {
    pub name: String,
    /// Number of its node, from 1; the client outside has none.
    pub node: Option<usize>,
    pub v4: Ipv4Addr,
    pub v6: Ipv6Addr,
    pub namespace: Namespace,
    pub cgroup: PathBuf,
}

/// What to ask, beyond the defaults of `testpod probe`.
#[derive(Clone, Debug)]
pub struct Ask {
    pub to: SocketAddr,
    pub transport: Transport,
    pub count: u32,
    /// Milliseconds to wait for each answer.
    pub timeout: u32,
    pub extra: Vec<String>,
}

impl Place {
    /// A node itself, not a pod on it.
    pub fn is_node(&self) -> bool {
        self.node.is_some_and(|number| self.name == format!("node{number}"))
    }

    pub fn ip(&self, family: Family) -> IpAddr {
        match family {
            Family::V4 => self.v4.into(),
            Family::V6 => self.v6.into(),
        }
    }

    pub fn at(&self, family: Family, port: u16) -> SocketAddr {
        SocketAddr::new(self.ip(family), port)
    }

    /// A command that runs here: in the cgroup before it is executed, so that its first socket counts as this place's.
    pub fn command(&self, program: impl AsRef<Path>) -> Result<Command> {
        let mut command = self.namespace.command(&program.as_ref().to_string_lossy());
        let procs = self.cgroup.join("cgroup.procs");
        let procs = OpenOptions::new().write(true).open(&procs).with_context(|| format!("open {}", procs.display()))?;
        // SAFETY: between fork and exec the closure makes plain system calls on what it owns, and allocates nothing.
        unsafe {
            command.pre_exec(move || {
                (&procs).write_all(b"0")?;
                // The world's own signal thread needs these blocked; a child that inherits that could not be stopped.
                sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)?;
                Ok(())
            });
        }
        // Ctrl-C in a terminal goes to a whole process group: the world ends its processes itself.
        command.process_group(0);
        Ok(command)
    }

    /// How to run a command here by hand.
    pub fn by_hand(&self, command: &str) -> String {
        format!(
            "sh -c 'echo $$ > {}/cgroup.procs; exec nsenter --net={} {command}'",
            self.cgroup.display(),
            self.namespace.path()
        )
    }

    /// Starts a program that runs until it is told to end.
    pub fn start(&self, program: &Path, args: &[String]) -> Result<Client> {
        let mut command = self.command(program)?;
        command.args(args);
        Client::spawn(command, format!("{} in {}", args.join(" "), self.name))
    }

    /// Runs `testpod` to its end and parses what it printed.
    pub fn testpod<T: serde::de::DeserializeOwned>(&self, testpod: &Path, args: &[String]) -> Result<T> {
        let done = self.command(testpod)?.args(args).stdin(Stdio::null()).output()?;
        if !done.status.success() {
            bail!("testpod {} in {}: {}", args.join(" "), self.name, String::from_utf8_lossy(&done.stderr).trim());
        }
        serde_json::from_slice(&done.stdout).with_context(|| format!("what testpod {} printed", args.join(" ")))
    }

    /// First of the source ports from which datagrams are sent here: within the range that masquerading takes its own from, so that it
    /// may keep them; the node's own sockets keep out of that, as those do whose ports the kernel chooses.
    pub fn source_ports(&self) -> u32 {
        if self.is_node() { 33_000 } else { 2_000 }
    }

    /// Asks from here.
    pub fn ask(&self, testpod: &Path, ask: &Ask) -> Result<Report> {
        self.testpod(testpod, &ask.args(self.source_ports()))
    }
}

impl Ask {
    pub fn new(to: SocketAddr, transport: Transport) -> Self {
        Self { to, transport, count: 1, timeout: 1000, extra: Vec::new() }
    }

    pub fn times(mut self, count: u32) -> Self {
        self.count = count;
        self
    }

    /// Milliseconds to wait for each answer.
    pub fn timeout(mut self, millis: u32) -> Self {
        self.timeout = millis;
        self
    }

    pub fn with(mut self, arg: impl Into<String>) -> Self {
        self.extra.push(arg.into());
        self
    }

    /// First of `count` source ports, counted from `first`, that no datagram of this process came from lately: a UDP flow stays with its backend for as
    /// long as its ports are used again within the time-out, and the kernel's own choice does that now and then.
    fn unused_ports(first: u32, count: u32) -> u32 {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        first + NEXT.fetch_add(count, Ordering::Relaxed) % 25_000
    }

    fn args(&self, first: u32) -> Vec<String> {
        let Self { to, transport, count, timeout, extra } = self;
        let mut args = vec!["probe".to_owned(), to.to_string()];
        args.extend([format!("--transport={transport}"), format!("--count={count}"), format!("--timeout={timeout}")]);
        if *transport != Transport::Tcp && !extra.iter().any(|arg| arg.starts_with("--source-port")) {
            args.extend([format!("--source-port={}", Self::unused_ports(first, *count)), "--successive".to_owned()]);
        }
        args.extend(extra.iter().cloned());
        args
    }
}

impl super::World {
    /// Asks from a place.
    pub fn ask(&self, from: &Place, ask: &Ask) -> Result<Report> {
        from.ask(&self.programs().testpod, ask)
    }
}

/// A running program; killed when dropped.
pub struct Client {
    what: String,
    child: Child,
    stdin: Option<ChildStdin>,
    lines: mpsc::Receiver<String>,
    /// What it wrote to stderr, once that is closed.
    words: Option<JoinHandle<String>>,
}

impl Client {
    /// Starts `command`; `what` names it where it fails.
    pub(crate) fn spawn(mut command: Command, what: String) -> Result<Self> {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("start {what}"))?;
        let stdin = child.stdin.take();
        let (sender, lines) = mpsc::channel();
        if let Some(stdout) = child.stdout.take() {
            std::thread::spawn(move || {
                for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                    if sender.send(line).is_err() {
                        return;
                    }
                }
            });
        }
        // Shown at once: what a server has to say explains failures elsewhere, and a pipe that nobody reads would hold it up.
        let words = child.stderr.take().map(|stderr| {
            let what = what.clone();
            std::thread::spawn(move || {
                let lines = BufReader::new(stderr).lines().map_while(Result::ok);
                lines.inspect(|line| eprintln!("{what}: {line}")).collect::<Vec<_>>().join("\n")
            })
        });
        Ok(Self { what, child, stdin, lines, words })
    }

    /// Waits until it prints exactly this.
    pub fn wait_for_line(&mut self, wanted: &str, timeout: Duration) -> Result<()> {
        match self.lines.recv_timeout(timeout) {
            Ok(line) if line == wanted => Ok(()),
            Ok(line) => bail!("{}: printed {line:?} instead of {wanted:?}", self.what),
            Err(_) => {
                let stderr = self.last_words();
                bail!("{}: did not print {wanted:?} within {timeout:?}: {stderr}", self.what)
            }
        }
    }

    /// Closes its stdin, which ends it, and parses its last word.
    pub fn finish<T: serde::de::DeserializeOwned>(mut self, timeout: Duration) -> Result<T> {
        drop(self.stdin.take());
        self.ends(timeout)
    }

    /// Waits until it ends by itself, and parses its last word.
    pub fn ends<T: serde::de::DeserializeOwned>(mut self, timeout: Duration) -> Result<T> {
        match self.lines.recv_timeout(timeout) {
            Ok(line) => serde_json::from_str(&line).with_context(|| format!("{}: printed {line:?}", self.what)),
            Err(_) => {
                let stderr = self.last_words();
                bail!("{}: no report within {timeout:?}: {stderr}", self.what)
            }
        }
    }

    /// Ends it and returns what it wrote to stderr.
    fn last_words(&mut self) -> String {
        let _ = self.child.kill();
        self.words.take().and_then(|words| words.join().ok()).unwrap_or_default()
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
