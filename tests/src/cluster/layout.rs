//! What a cluster owns on the machine, all of it by fixed names: so that any process can remove it, whoever made it.
//!
//! | what | where |
//! |---|---|
//! | data of the servers and nodes, logs, kubeconfig | `/var/tmp/proxy-e2e/` |
//! | network namespaces | `/run/netns/proxy-e2e-*` |
//! | cgroups | `proxy-e2e/` in every hierarchy |
//!
//! What the nodes mount is mounted in namespaces of theirs, and goes with their last process.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use nix::{
    fcntl::{Flock, FlockArg},
    mount::{MntFlags, MsFlags, mount, umount2},
};

use crate::world::{
    cgroup,
    layout::{remove_namespaces, remove_tree},
};

const NAME: &str = "proxy-e2e";
const DIR: &str = "/var/tmp/proxy-e2e";
const LOCK: &str = "/run/lock/proxy-e2e";

/// Removes everything when dropped.
pub(super) struct Layout {
    _alone: Flock<File>,
}

impl Layout {
    /// Sweeps what an earlier run left, and makes the directories. One cluster at a time: names and addresses are fixed.
    pub(super) fn create() -> Result<Self> {
        let alone = alone()?;
        remove().context("what an earlier run left")?;
        fs::create_dir_all(logs()).with_context(|| format!("make {}", logs().display()))?;
        let layout = Self { _alone: alone };
        let servers = servers();
        fs::create_dir(&servers).with_context(|| format!("make {}", servers.display()))?;
        // etcd waits for the disk at each write.
        mount(Some("servers"), &servers, Some("tmpfs"), MsFlags::empty(), Some("size=2g,mode=755"))
            .with_context(|| format!("mount a tmpfs at {}", servers.display()))?;
        Ok(layout)
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        if let Err(error) = remove() {
            eprintln!("the cluster is not removed whole: {error:#}");
        }
    }
}

fn alone() -> Result<Flock<File>> {
    let file = File::create(LOCK).with_context(|| format!("make {LOCK}"))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(lock),
        Err(_) => bail!("another cluster is up on this machine: end it first"),
    }
}

/// Takes down what a killed run left.
pub fn sweep() -> Result<()> {
    let _alone = alone()?;
    remove()
}

pub(super) fn servers() -> PathBuf {
    Path::new(DIR).join("servers")
}

pub(super) fn logs() -> PathBuf {
    Path::new(DIR).join("logs")
}

pub(super) fn images() -> PathBuf {
    Path::new(DIR).join("images")
}

/// The disk of a node.
pub(super) fn node(name: &str) -> PathBuf {
    Path::new(DIR).join(name)
}

pub(super) fn kubeconfig() -> PathBuf {
    Path::new(DIR).join("kubeconfig")
}

pub(super) fn namespace(what: &str) -> String {
    format!("{NAME}-{what}")
}

/// A cgroup of a node, in every hierarchy; returns where each is.
pub(super) fn cgroups(node: &str) -> Result<Vec<PathBuf>> {
    let mut made = Vec::new();
    for cgroup::Hierarchy { at, .. } in cgroup::hierarchies()? {
        let mut dir = at;
        for part in [NAME, node] {
            let above = dir.clone();
            dir.push(part);
            fs::create_dir_all(&dir).with_context(|| format!("make the cgroup {}", dir.display()))?;
            // Nothing may enter a cgroup of v1's cpuset as long as these are empty.
            for file in ["cpuset.cpus", "cpuset.mems"] {
                if at_v1(&dir, file) {
                    let value = fs::read_to_string(above.join(file))?;
                    fs::write(dir.join(file), value).with_context(|| format!("fill {file} of {}", dir.display()))?;
                }
            }
        }
        made.push(dir);
    }
    Ok(made)
}

fn at_v1(dir: &Path, file: &str) -> bool {
    // Only there can processes be listed one thread at a time by this name.
    dir.join("tasks").exists() && dir.join(file).exists()
}

/// Takes everything down, in the order in which nothing is in use any more; goes on after a failure and reports the first.
fn remove() -> Result<()> {
    let steps =
        [remove_cgroups(), unmount(&servers()), remove_namespaces(&format!("{NAME}-")), remove_tree(Path::new(DIR))];
    steps.into_iter().collect()
}

fn remove_cgroups() -> Result<()> {
    let hierarchies = cgroup::hierarchies()?;
    // v2 first: one write kills all that runs in any of them.
    let (v2, v1): (Vec<_>, Vec<_>) = hierarchies.into_iter().partition(|hierarchy| hierarchy.v1.is_none());
    for hierarchy in v2.into_iter().chain(v1) {
        cgroup::remove(&hierarchy.at.join(NAME))?;
    }
    Ok(())
}

fn unmount(at: &Path) -> Result<()> {
    let began = Instant::now();
    loop {
        match umount2(at, MntFlags::empty()) {
            Ok(()) | Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOENT) => return Ok(()),
            // Servers of a run that was killed are about to end.
            Err(_) if began.elapsed() < Duration::from_secs(5) => sleep(Duration::from_millis(50)),
            Err(_) => return umount2(at, MntFlags::MNT_DETACH).with_context(|| format!("unmount {}", at.display())),
        }
    }
}

/// From here on SIGINT, SIGTERM and SIGHUP take the cluster down and end the process. Call it before any thread is started.
pub fn cleanup_on_signals() -> Result<()> {
    crate::signals::before_they_end_us(|| {
        if let Err(error) = remove() {
            eprintln!("the cluster is not removed whole: {error:#}");
        }
        130
    })
}
