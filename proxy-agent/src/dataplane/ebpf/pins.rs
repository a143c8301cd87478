//! The pin directory: where it may be, who may own it, who holds it.
//!
//! ```text
//! <bpffs>/v1/maps/<map>   <bpffs>/v1/programs/<program>   <bpffs>/v1/links/<hook>
//! ```
//!
//! One agent a directory: it holds a lock on it as long as it runs, and the kernel lets go of the lock when it dies.

use std::{
    fs, io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::{DirBuilderExt, MetadataExt},
    },
    path::{Path, PathBuf},
};

use proxy_common::LAYOUT_VERSION;
use rustix::fs::{FlockOperation, Mode, OFlags};

use super::layout::MapName;

/// Where bpffs is mounted by convention.
pub(super) const BPFFS: &str = "/sys/fs/bpf";
const BPF_FS_MAGIC: u64 = 0xcafe_4a11;

#[derive(Debug, thiserror::Error)]
pub enum PinError {
    #[error("--bpffs {0} is not an absolute path")]
    Relative(PathBuf),
    #[error("{path} is not on a bpf filesystem: mount one (`mount -t bpf bpf {BPFFS}`) or give --bpffs a path on one")]
    NotBpffs { path: PathBuf },
    #[error("bpffs is not mounted at {BPFFS} and cannot be: {source}; mount it (`mount -t bpf bpf {BPFFS}`)")]
    Mount { source: io::Error },
    #[error("{path} is a symbolic link; give --bpffs the real path")]
    Symlink { path: PathBuf },
    #[error("{path} is not a directory")]
    NotADirectory { path: PathBuf },
    #[error(
        "{path} belongs to uid {uid}, not to root: whoever owns it could swap our programs; remove it or use another --bpffs"
    )]
    Owner { path: PathBuf, uid: u32 },
    #[error("{path} has mode {mode:o}: others could swap our programs; `chmod go-w {path}` or use another --bpffs")]
    Mode { path: PathBuf, mode: u32 },
    #[error("another agent runs on {path}{}: stop it or use another --bpffs", .pid.map(|p| format!(" (pid {p})")).unwrap_or_default())]
    Held { path: PathBuf, pid: Option<u32> },
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: io::Error },
}

/// Paths below one pin directory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Layout {
    pub(crate) root: PathBuf,
    pub(crate) version: PathBuf,
    pub(crate) maps: PathBuf,
    pub(crate) links: PathBuf,
    pub(crate) programs: PathBuf,
}

impl Layout {
    pub(crate) fn of(root: &Path) -> Self {
        let version = root.join(format!("v{LAYOUT_VERSION}"));
        Self {
            root: root.to_owned(),
            maps: version.join("maps"),
            links: version.join("links"),
            programs: version.join("programs"),
            version,
        }
    }

    pub(crate) fn map(&self, name: MapName) -> PathBuf {
        self.maps.join(name.as_str())
    }

    /// Where a map of a new size waits until every program uses it. No dots: bpffs refuses them.
    pub(crate) fn resized(&self, name: MapName) -> PathBuf {
        self.maps.join(format!("{}-resized", name.as_str()))
    }

    /// A map that links of two changes ago may still use.
    pub(crate) fn former(&self, name: MapName) -> PathBuf {
        self.maps.join(format!("{}-former", name.as_str()))
    }

    /// There from the moment a link may use a map that waits until all are in place.
    pub(crate) fn moving(&self) -> PathBuf {
        self.version.join("moving")
    }
}

/// The directory, checked and locked.
#[derive(Debug)]
pub(crate) struct Pinned {
    pub(crate) layout: Layout,
    /// There was no bpf filesystem before.
    pub(super) mounted: bool,
    /// Nor anything pinned: whatever is there now is of this process.
    pub(super) is_new: bool,
    /// Holds the lock while it is open.
    _lock: OwnedFd,
}

impl Pinned {
    /// Makes what is missing; refuses what others could tamper with, and a directory another agent holds.
    pub(crate) fn open(root: &Path) -> Result<Self, PinError> {
        if !root.is_absolute() {
            return Err(PinError::Relative(root.to_owned()));
        }
        let mounted = ensure_bpffs(root)?;
        let layout = Layout::of(root);
        make(&layout.root)?;
        let lock = lock(&layout.root)?;
        let is_new = layout.version.symlink_metadata().is_err();
        for path in [&layout.version, &layout.maps, &layout.links, &layout.programs] {
            make(path)?;
        }
        Ok(Self { layout, mounted, is_new, _lock: lock })
    }
}

fn io_error(path: &Path) -> impl FnOnce(io::Error) -> PinError {
    let path = path.to_owned();
    |source| PinError::Io { path, source }
}

/// Whether the nearest existing ancestor of `path` is on bpffs.
pub(crate) fn is_on_bpffs(path: &Path) -> io::Result<bool> {
    let existing = path.ancestors().find(|p| p.symlink_metadata().is_ok()).unwrap_or(Path::new("/"));
    let stat = rustix::fs::statfs(existing)?;
    Ok(stat.f_type as u64 == BPF_FS_MAGIC)
}

/// Mounts one where nothing is yet; tells whether it had to.
pub(crate) fn ensure_bpffs(root: &Path) -> Result<bool, PinError> {
    if is_on_bpffs(root).map_err(io_error(root))? {
        return Ok(false);
    }
    let mount = Path::new(BPFFS);
    if !root.starts_with(mount) || is_on_bpffs(mount).map_err(io_error(mount))? {
        return Err(PinError::NotBpffs { path: root.to_owned() });
    }
    rustix::mount::mount("bpf", mount, "bpf", rustix::mount::MountFlags::empty(), None)
        .map_err(|source| PinError::Mount { source: source.into() })?;
    Ok(true)
}

/// Makes a directory for root alone, or checks one that is there.
fn make(path: &Path) -> Result<(), PinError> {
    match fs::DirBuilder::new().mode(0o700).recursive(true).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(io_error(path)(error)),
        _ => {}
    }
    let meta = fs::symlink_metadata(path).map_err(io_error(path))?;
    let path = path.to_owned();
    if meta.is_symlink() {
        Err(PinError::Symlink { path })
    } else if !meta.is_dir() {
        Err(PinError::NotADirectory { path })
    } else if meta.uid() != 0 {
        Err(PinError::Owner { path, uid: meta.uid() })
    } else if meta.mode() & 0o022 != 0 {
        Err(PinError::Mode { path, mode: meta.mode() & 0o7777 })
    } else {
        Ok(())
    }
}

fn open_dir(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}

fn lock(path: &Path) -> Result<OwnedFd, PinError> {
    let fd = open_dir(path).map_err(io_error(path))?;
    let mut locked = rustix::fs::flock(&fd, FlockOperation::NonBlockingLockExclusive);
    // A reader that asks whether an agent runs holds a shared lock for an instant; an agent holds its own for good.
    for _ in 0..10 {
        if locked != Err(rustix::io::Errno::WOULDBLOCK) {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
        locked = rustix::fs::flock(&fd, FlockOperation::NonBlockingLockExclusive);
    }
    match locked {
        Ok(()) => Ok(fd),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(PinError::Held { path: path.to_owned(), pid: holder(&fd) }),
        Err(error) => Err(io_error(path)(error.into())),
    }
}

/// Whether some agent holds this directory.
pub(crate) fn is_held(path: &Path) -> bool {
    let Ok(fd) = open_dir(path) else { return false };
    rustix::fs::flock(&fd, FlockOperation::NonBlockingLockShared) == Err(rustix::io::Errno::WOULDBLOCK)
}

/// Who holds this directory.
pub(crate) fn holder_of(path: &Path) -> Option<u32> {
    holder(&open_dir(path).ok()?)
}

/// Who holds the lock, as far as this pid namespace can tell.
fn holder(directory: &OwnedFd) -> Option<u32> {
    let stat = rustix::fs::fstat(directory.as_fd()).ok()?;
    let device =
        format!("{:02x}:{:02x}:{}", rustix::fs::major(stat.st_dev), rustix::fs::minor(stat.st_dev), stat.st_ino);
    // 1: FLOCK  ADVISORY  WRITE 1234 00:1f:5678 0 EOF
    let locks = fs::read_to_string("/proc/locks").ok()?;
    locks.lines().find_map(|line| {
        let mut words = line.split_ascii_whitespace();
        let pid = words.nth(4)?.parse::<u32>().ok()?;
        (words.next()? == device).then_some(pid).filter(|pid| *pid != 0)
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn other_filesystems_are_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let error = Pinned::open(&dir.path().join("pins")).unwrap_err().to_string();
        assert!(error.contains("not on a bpf filesystem") && error.contains("mount -t bpf"), "{error}");
        assert!(matches!(Pinned::open(Path::new("pins")), Err(PinError::Relative(_))));
    }

    #[test]
    fn a_directory_others_could_write_to_is_refused() {
        if !rustix::process::geteuid().is_root() {
            println!("SKIP pin directory checks: not root");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pins");
        make(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o700);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o770)).unwrap();
        assert!(matches!(make(&path), Err(PinError::Mode { mode: 0o770, .. })));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).unwrap();
        std::os::unix::fs::chown(&path, Some(12345), None).unwrap();
        assert!(matches!(make(&path), Err(PinError::Owner { uid: 12345, .. })));
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(dir.path(), &link).unwrap();
        assert!(matches!(make(&link), Err(PinError::Symlink { .. })));
    }

    #[test]
    fn a_second_agent_is_refused_with_the_pid_of_the_first() {
        let dir = tempfile::tempdir().unwrap();
        assert!(!is_held(dir.path()));
        let first = lock(dir.path()).unwrap();
        assert!(is_held(dir.path()));
        match lock(dir.path()) {
            Err(PinError::Held { pid, .. }) => assert_eq!(pid, Some(std::process::id())),
            other => panic!("{other:?}"),
        }
        drop(first);
        assert!(!is_held(dir.path()));
    }
}
