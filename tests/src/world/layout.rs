//! What a world owns on the machine, all of it found by the world's id: so that any process can remove it, whoever made it.
//!
//! | what | where |
//! |---|---|
//! | record of the owner, objects, logs | `/run/proxy-world/<id>/` |
//! | network namespaces | `/run/netns/pw-<id>-*` |
//! | cgroups | `<cgroup2 mount>/proxy-world-<id>/` |
//! | pins | `/sys/fs/bpf/proxy-world-<id>/` |

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicI32, AtomicU32, Ordering},
    },
};

use anyhow::{Context, Result};
use nix::{
    fcntl::{Flock, FlockArg},
    mount::{MntFlags, MsFlags, mount, umount2},
};

use super::cgroup;

const RUN: &str = "/run/proxy-world";
const BPFFS: &str = "/sys/fs/bpf";

/// Worlds of this process that a signal has to remove.
static LIVE: Mutex<Vec<String>> = Mutex::new(Vec::new());
static NEXT: AtomicU32 = AtomicU32::new(0);
static EXIT_STATUS: AtomicI32 = AtomicI32::new(130);
static ENDING: AtomicBool = AtomicBool::new(false);

/// Removes everything when dropped.
pub(super) struct Layout {
    id: String,
    cgroups: PathBuf,
}

impl Layout {
    /// Reserves an id, records its owner, makes the directories.
    pub(super) fn create() -> Result<Self> {
        let cgroups = cgroup::root()?;
        mount_bpffs()?;
        let id = format!("{:x}{}", std::process::id(), suffix(NEXT.fetch_add(1, Ordering::Relaxed)));
        let layout = Self { cgroups: cgroups.join(format!("proxy-world-{id}")), id };
        if let Ok(mut live) = LIVE.lock() {
            live.push(layout.id.clone());
        }
        // The record appears whole: a sweep never meets a world without its owner.
        let draft = PathBuf::from(RUN).join(format!(".{}", layout.id));
        fs::create_dir_all(draft.join("objects")).with_context(|| format!("make {}", draft.display()))?;
        fs::create_dir_all(draft.join("logs"))?;
        fs::write(draft.join("owner"), owner(std::process::id()).context("read the own start time")?)?;
        fs::rename(&draft, layout.dir()).with_context(|| format!("make {}", layout.dir().display()))?;
        fs::create_dir(&layout.cgroups).with_context(|| format!("make the cgroup {}", layout.cgroups.display()))?;
        fs::create_dir(layout.bpffs()).with_context(|| format!("make {}", layout.bpffs().display()))?;
        Ok(layout)
    }

    pub(super) fn id(&self) -> &str {
        &self.id
    }

    fn dir(&self) -> PathBuf {
        PathBuf::from(RUN).join(&self.id)
    }

    pub(super) fn objects(&self) -> PathBuf {
        self.dir().join("objects")
    }

    pub(super) fn logs(&self) -> PathBuf {
        self.dir().join("logs")
    }

    pub(super) fn cgroups(&self) -> &Path {
        &self.cgroups
    }

    pub(super) fn bpffs(&self) -> PathBuf {
        PathBuf::from(BPFFS).join(format!("proxy-world-{}", self.id))
    }

    /// Name of a namespace of this world.
    pub(super) fn namespace(&self, what: &str) -> String {
        format!("pw-{}-{what}", self.id)
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.id) {
            eprintln!("world {}: not removed whole: {error:#}", self.id);
        }
        if let Ok(mut live) = LIVE.lock() {
            live.retain(|id| *id != self.id);
        }
    }
}

/// `a`, `b` … `z`, `ba` …: no separator needed behind a hexadecimal number if it starts beyond `f`.
fn suffix(mut n: u32) -> String {
    let mut letters = Vec::new();
    loop {
        letters.push(char::from(b'g' + u8::try_from(n % 20).unwrap_or(0)));
        n /= 20;
        if n == 0 {
            return letters.into_iter().collect();
        }
    }
}

/// Process id and start time: an id alone may have been given to another process since.
fn owner(pid: u32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command name (field 2) may hold blanks; what follows its closing parenthesis does not. Start time is field 22.
    let start = stat.rsplit_once(')')?.1.split_whitespace().nth(19)?;
    Some(format!("{pid} {start}"))
}

/// Takes the world apart, in the order in which nothing is in use any more; goes on after a failure and reports the first.
fn remove(id: &str) -> Result<()> {
    let processes = cgroup::root().map(|root| root.join(format!("proxy-world-{id}")));
    let steps = [
        // First the processes: nothing is opened, attached or pinned after that. Attached programs live on in links.
        processes.map(|tree| cgroup_kill(&tree)),
        remove_pins(&PathBuf::from(BPFFS).join(format!("proxy-world-{id}"))),
        remove_namespaces(&format!("pw-{id}-")),
        cgroup::root().and_then(|root| cgroup::remove(&root.join(format!("proxy-world-{id}")))),
        remove_tree(&PathBuf::from(RUN).join(id)),
        remove_tree(&PathBuf::from(RUN).join(format!(".{id}"))),
    ];
    steps.into_iter().collect()
}

fn cgroup_kill(tree: &Path) {
    let _ = fs::write(tree.join("cgroup.kill"), "1");
}

pub(crate) fn remove_tree(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}

/// Unpins everything below: programs whose last holder that was are detached.
pub(super) fn remove_pins(dir: &Path) -> Result<()> {
    remove_tree(dir)
}

pub(crate) fn remove_namespaces(prefix: &str) -> Result<()> {
    for entry in fs::read_dir("/run/netns").into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(prefix) {
            let path = entry.path();
            // Not mounted: its creation did not get that far.
            let _ = umount2(&path, MntFlags::MNT_DETACH);
            fs::remove_file(&path).with_context(|| format!("remove {}", path.display()))?;
        }
    }
    Ok(())
}

/// Other programs that make worlds wait meanwhile.
fn alone() -> Result<Flock<File>> {
    fs::create_dir_all(RUN).with_context(|| format!("make {RUN}"))?;
    let path = Path::new(RUN).join(".lock");
    let file = File::create(&path).with_context(|| format!("make {}", path.display()))?;
    Flock::lock(file, FlockArg::LockExclusive)
        .map_err(|(_, error)| error)
        .with_context(|| format!("lock {}", path.display()))
}

/// Removes the worlds whose owner is gone.
pub(super) fn sweep() -> Result<usize> {
    let _alone = alone()?;
    let mut removed = 0;
    for entry in fs::read_dir(RUN).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Ok(record) = fs::read_to_string(entry.path().join("owner")) else { continue };
        let Some(pid) = record.split_whitespace().next().and_then(|pid| pid.parse().ok()) else { continue };
        if owner(pid).is_some_and(|now| now == record) {
            continue;
        }
        remove(name.trim_start_matches('.')).with_context(|| format!("world {name} of a dead run"))?;
        removed += 1;
    }
    Ok(removed)
}

fn mount_bpffs() -> Result<()> {
    let _alone = alone()?;
    let mounts = fs::read_to_string("/proc/mounts").context("read /proc/mounts")?;
    if mounts.lines().any(|line| line.split_whitespace().skip(1).take(2).eq([BPFFS, "bpf"])) {
        return Ok(());
    }
    mount(Some("bpffs"), BPFFS, Some("bpf"), MsFlags::empty(), None::<&str>)
        .with_context(|| format!("mount the bpffs at {BPFFS}"))
}

/// From here on SIGINT, SIGTERM and SIGHUP remove this process's worlds and end it. Call it before any thread is started.
pub fn cleanup_on_signals() -> Result<()> {
    crate::signals::before_they_end_us(|| {
        ENDING.store(true, Ordering::SeqCst);
        let live = LIVE.lock().map(|live| live.clone()).unwrap_or_default();
        for id in live {
            if let Err(error) = remove(&id) {
                eprintln!("world {id}: not removed whole: {error:#}");
            }
        }
        EXIT_STATUS.load(Ordering::Relaxed)
    })
}

/// Blocks for good if a signal is taking the worlds down: what fails from then on is no failure, and the process is about to end.
pub fn wait_if_ending() {
    while ENDING.load(Ordering::SeqCst) {
        std::thread::park();
    }
}

/// What a signal makes the process exit with: 130 by default, 0 where ending it by Ctrl-C is the ordinary way.
pub fn set_exit_status(status: i32) {
    EXIT_STATUS.store(status, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suffixes_differ_and_are_no_hex_digits() {
        let all: std::collections::BTreeSet<_> = (0..1000).map(suffix).collect();
        assert_eq!(all.len(), 1000);
        assert!(all.iter().all(|s| s.bytes().all(|b| (b'g'..=b'z').contains(&b))));
    }

    #[test]
    fn the_own_process_is_alive_and_an_older_one_of_its_id_is_not() {
        let now = owner(std::process::id()).unwrap();
        assert_eq!(owner(std::process::id()).unwrap(), now);
        assert_ne!(now, format!("{} 1", std::process::id()));
    }
}
