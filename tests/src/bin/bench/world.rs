//! Namespaces, links and cgroups for the measurements.

use std::{
    fs::{self, File},
    io::Write as _,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use nix::sched::{CloneFlags, setns};

use crate::worker::{Job, Worker};

pub const SERVER: &str = "10.2.0.2";

/// The cgroups of one run: workers in different ones meet different programs.
pub struct Cgroups(PathBuf);

impl Cgroups {
    pub fn new(root: &Path) -> Self {
        Self(root.to_owned())
    }

    pub fn root(&self) -> &Path {
        &self.0
    }

    pub fn make(&self, name: &str) -> Result<PathBuf> {
        let path = self.0.join(name);
        fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(path)
    }
}

/// Removes a cgroup and those below it once their processes are gone.
pub fn remove_cgroups(root: &Path) {
    for child in fs::read_dir(root).into_iter().flatten().flatten() {
        if child.path().is_dir() {
            remove_cgroups(&child.path());
        }
    }
    for _ in 0..100 {
        match fs::remove_dir(root) {
            Ok(()) => return,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return,
            Err(_) => thread::sleep(Duration::from_millis(20)),
        }
    }
    eprintln!("bench: could not remove {}: processes are left in it", root.display());
}

/// A network namespace, alive as long as the process that holds it.
pub struct Netns {
    holder: Worker,
}

impl Netns {
    pub fn new() -> Result<Self> {
        Ok(Self { holder: Worker::start(Job::Hold)? })
    }

    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/ns/net", self.holder.pid()))
    }

    fn pid(&self) -> u32 {
        self.holder.pid()
    }

    /// Runs a program in here with `input`.
    pub fn run(&self, program: &str, args: &[&str], input: &str) -> Result<()> {
        let mut child = Command::new("nsenter")
            .arg(format!("--net={}", self.path().display()))
            .arg(program)
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start nsenter {program}"))?;
        child.stdin.take().context("no stdin")?.write_all(input.as_bytes())?;
        let output = child.wait_with_output()?;
        if !output.status.success() {
            bail!("{program} {}: {}", args.join(" "), String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(())
    }

    pub fn ip(&self, batch: &str) -> Result<()> {
        self.run("ip", &["-batch", "-"], batch)
    }

    /// Runs `f` on a thread that is in here.
    pub fn enter<T: Send>(&self, f: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let file = File::open(self.path())?;
        thread::scope(|scope| {
            scope
                .spawn(move || {
                    setns(file.as_fd(), CloneFlags::CLONE_NEWNET)?;
                    f()
                })
                .join()
                .unwrap_or_else(|_| bail!("a thread panicked"))
        })
    }
}

/// Client, node and server.
pub struct World {
    pub client: Netns,
    pub node: Netns,
    pub server: Netns,
}

impl World {
    pub fn new() -> Result<Self> {
        let (client, node, server) = (Netns::new()?, Netns::new()?, Netns::new()?);
        node.ip(&format!(
            "link set lo up\n\
             link add c0 type veth peer name eth0 netns {}\n\
             link add s0 type veth peer name eth0 netns {}\n\
             addr add 10.1.0.1/24 dev c0\n\
             addr add 10.2.0.1/24 dev s0\n\
             link set c0 up\n\
             link set s0 up\n",
            client.pid(),
            server.pid()
        ))?;
        node.enter(|| Ok(fs::write("/proc/sys/net/ipv4/ip_forward", "1")?))?;
        for (netns, address, gateway) in [(&client, "10.1.0.2/24", "10.1.0.1"), (&server, "10.2.0.2/24", "10.2.0.1")] {
            netns.ip(&format!(
                "link set lo up\n\
                 addr add {address} dev eth0\n\
                 link set eth0 up\n\
                 route add default via {gateway}\n"
            ))?;
        }
        // Connections are closed by the client: without this its ports would be used up within seconds.
        client.enter(|| {
            fs::write("/proc/sys/net/ipv4/tcp_max_tw_buckets", "0")?;
            Ok(fs::write("/proc/sys/net/ipv4/ip_local_port_range", "1024 65000")?)
        })?;
        Ok(Self { client, node, server })
    }
}
