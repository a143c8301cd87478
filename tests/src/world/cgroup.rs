//! cgroups: where they are mounted, subtrees made and removed. A world has them of v2 alone, a whole cluster of every hierarchy.

use std::{
    fs,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};

/// Where cgroup v2 is mounted: `/sys/fs/cgroup`, or `/sys/fs/cgroup/unified` on a hybrid host.
pub(crate) fn root() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/mounts").context("read /proc/mounts")?;
    mounts
        .lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace().skip(1);
            let at = words.next()?;
            (words.next()? == "cgroup2").then(|| PathBuf::from(at))
        })
        .next()
        .context("needs cgroup v2: mount -t cgroup2 none /sys/fs/cgroup/unified")
}

/// A mounted hierarchy of cgroups, of whatever version.
#[derive(Clone, Debug)]
pub(crate) struct Hierarchy {
    pub(crate) at: PathBuf,
    /// `None`: version 2. Else what `mount -o` calls it.
    pub(crate) v1: Option<String>,
}

/// Every hierarchy of this machine.
pub(crate) fn hierarchies() -> Result<Vec<Hierarchy>> {
    let mounts = fs::read_to_string("/proc/mounts").context("read /proc/mounts")?;
    let mut found: Vec<Hierarchy> = Vec::new();
    for line in mounts.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [_, at, kind, options, ..] = words.as_slice() else { continue };
        let v1 = match *kind {
            "cgroup2" => None,
            "cgroup" => Some(which(options)),
            _ => continue,
        };
        // Mounted twice, it is one all the same.
        if !found.iter().any(|one| one.v1 == v1) {
            found.push(Hierarchy { at: PathBuf::from(at), v1 });
        }
    }
    Ok(found)
}

/// Of the options of a mount, those that say which hierarchy it is.
fn which(options: &str) -> String {
    let all = options.split(',').filter(|option| !GENERAL.contains(option) && !option.starts_with("release_agent="));
    all.collect::<Vec<_>>().join(",")
}

const GENERAL: [&str; 8] = ["rw", "ro", "nosuid", "nodev", "noexec", "relatime", "noatime", "xattr"];

/// Kills all that runs in the subtree, then removes it. One that is not there is removed already.
pub(crate) fn remove(tree: &Path) -> Result<()> {
    if !tree.exists() {
        return Ok(());
    }
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        kill_all(tree);
        match remove_dirs(tree) {
            Ok(()) => return Ok(()),
            Err(error) if Instant::now() > deadline => {
                return Err(error).with_context(|| format!("remove the cgroup {}", tree.display()));
            }
            // A killed process leaves its cgroup only once it is reaped.
            Err(_) => thread::sleep(Duration::from_millis(10)),
        }
    }
}

fn kill_all(tree: &Path) {
    // One write kills the whole subtree since 5.14; before that, process by process.
    if fs::write(tree.join("cgroup.kill"), "1").is_ok() {
        return;
    }
    for entry in fs::read_dir(tree).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            kill_all(&entry.path());
        }
    }
    for pid in fs::read_to_string(tree.join("cgroup.procs")).unwrap_or_default().lines() {
        if let Ok(pid) = pid.parse() {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
        }
    }
}

fn remove_dirs(tree: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(tree)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_dirs(&entry.path())?;
        }
    }
    fs::remove_dir(tree)
}
