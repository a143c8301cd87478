//! Whether what is pinned outlives the container: it does on the node's bpf filesystem, and on one of the container's own it does not.
//!
//! The kernel does not say whose a mount is. What can be told without a doubt is told, and nothing else: a container that was given some other
//! container's bpf filesystem for the node's is not found out.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use super::pins::BPFFS;
use crate::dataplane::mounts::{self, Mount};

/// Of the PID namespace that the kernel starts with (`PROC_PID_INIT_INO`).
const FIRST_PID_NAMESPACE: u64 = 0xefff_fffc;

/// What is seen of a bpf filesystem.
struct Seen {
    /// The filesystem.
    device: u64,
    /// That at the same place where the first process is, if this one may look there: it is another's in a container.
    at_first: io::Result<u64>,
    /// This process is in a container.
    contained: bool,
    /// What is mounted there shows elsewhere, too.
    shared: bool,
}

impl Seen {
    /// `mounted`: by this process, a moment ago.
    fn ends_with_container(&self, mounted: bool) -> bool {
        match &self.at_first {
            Ok(device) if *device != self.device => true,
            _ => mounted && self.contained && !self.shared,
        }
    }
}

/// What to say where it does. `mounted`: this process has mounted the filesystem.
pub(super) fn warning(root: &Path, mounted: bool) -> Option<&'static str> {
    ends_with_container(root, mounted).then_some(
        "the bpf filesystem is not the node's: what is in force ends with this container, so that a restart is a gap; mount the node's \
         /sys/fs/bpf into it",
    )
}

/// Whether what is pinned at `root` goes with this container, as far as that can be told. `mounted`: this process has mounted the filesystem.
pub(super) fn ends_with_container(root: &Path, mounted: bool) -> bool {
    let mounts = mounts::all().unwrap_or_default();
    let Some(Mount { path, shared, .. }) = of(&mounts, root) else { return false };
    let device = |path: PathBuf| fs::metadata(path).map(|metadata| metadata.dev());
    let Ok(own) = device(path.clone()) else { return false };
    let at_first = device(Path::new("/proc/1/root").join(path.strip_prefix("/").unwrap_or(path)));
    Seen { device: own, at_first, contained: is_contained(), shared: *shared }.ends_with_container(mounted)
}

/// Whether one that is mounted now, where none is, would be the container's own.
pub(super) fn would_end_with_container() -> bool {
    let mounts = mounts::all().unwrap_or_default();
    is_contained() && nearest(&mounts, Path::new(BPFFS)).is_some_and(|parent| !parent.shared)
}

/// The bpf filesystem that `root` is on.
fn of<'a>(mounts: &'a [Mount], root: &Path) -> Option<&'a Mount> {
    nearest(mounts, root).filter(|mount| mount.kind == "bpf")
}

/// What a path is on; of two at one place the later one is seen.
fn nearest<'a>(mounts: &'a [Mount], path: &Path) -> Option<&'a Mount> {
    let above = mounts.iter().filter(|mount| path.starts_with(&mount.path));
    above.max_by_key(|mount| mount.path.as_os_str().len())
}

fn is_contained() -> bool {
    fs::metadata("/proc/self/ns/pid").is_ok_and(|namespace| namespace.ino() != FIRST_PID_NAMESPACE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_beyond_doubt_is_told() {
        let unknown = || Err(io::Error::from(io::ErrorKind::PermissionDenied));
        let absent = || Err(io::Error::from(io::ErrorKind::NotFound));
        for (at_first, contained, shared, mounted, ends) in [
            // A privileged container without a mount of the node's.
            (Ok(7), true, false, true, true),
            (unknown(), true, false, true, true),
            // The manifests': the node's, given to the container.
            (Ok(7), true, false, false, false),
            (unknown(), true, false, false, false),
            // Mounted in a step that has it propagate.
            (unknown(), true, true, true, false),
            // On the node itself.
            (Ok(7), false, false, true, false),
            // With the node's PIDs: what the first process sees is another one. Where it has nothing the node's may be elsewhere.
            (Ok(8), false, false, false, true),
            (absent(), false, true, false, false),
        ] {
            let what = format!("{at_first:?}, contained {contained}, shared {shared}, mounted {mounted}");
            let seen = Seen { device: 7, at_first, contained, shared };
            assert_eq!(seen.ends_with_container(mounted), ends, "{what}");
        }
    }

    #[test]
    fn the_filesystem_of_a_path_is_the_one_that_is_seen_there() {
        let mounts = mounts::parse(
            "1 0 0:1 / / rw - overlay overlay rw\n\
             2 1 0:2 / /sys rw - sysfs sysfs rw\n\
             3 2 0:3 / /sys/fs/bpf rw - bpf bpf rw\n\
             4 2 0:4 / /sys/fs/bpf rw shared:5 - bpf bpf rw\n\
             5 1 0:5 / /pins rw - bpf bpf rw\n\
             6 5 0:6 / /pins/in rw - tmpfs tmpfs rw\n",
        );
        let at =
            |root: &str| of(&mounts, Path::new(root)).map(|mount| (mount.path.display().to_string(), mount.shared));
        assert_eq!(at("/sys/fs/bpf/proxy-agent"), Some(("/sys/fs/bpf".into(), true)));
        assert_eq!(at("/pins/x"), Some(("/pins".into(), false)));
        assert_eq!([at("/pins/in/x"), at("/var")], [None, None]);
    }
}
