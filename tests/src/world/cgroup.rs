//! The cgroup v2 tree: where it is mounted, subtrees made and removed.

use std::{
    fs,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};

/// Where cgroup v2 is mounted: `/sys/fs/cgroup`, or `/sys/fs/cgroup/unified` on a hybrid host.
pub(super) fn root() -> Result<PathBuf> {
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

/// Kills all that runs in the subtree, then removes it. One that is not there is removed already.
pub(super) fn remove(tree: &Path) -> Result<()> {
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
