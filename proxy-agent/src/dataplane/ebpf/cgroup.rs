//! The cgroup that connect-time programs are attached to, and where the root of the cgroup v2 hierarchy is mounted.
//!
//! Not simply the first cgroup2 mount: in a container with a cgroup namespace of its own the first one is that container's
//! cgroup, and programs attached there would see nobody else. The node's hierarchy is then where the manifest mounts it, at its
//! top on most hosts and below `unified` on hybrid ones.

use std::{
    fs, io,
    os::{fd::OwnedFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
};

use super::{kernel, unavailable};
use crate::dataplane::{
    DataplaneError,
    mounts::{self, Mount},
};

#[derive(Debug)]
pub(crate) struct Cgroup {
    pub(crate) path: PathBuf,
    pub(crate) fd: OwnedFd,
    /// What the kernel calls it in a link.
    pub(crate) id: u64,
}

impl Cgroup {
    /// `root` as an option names it, or the root of the hierarchy.
    pub(crate) fn open(root: Option<&Path>) -> Result<Self, DataplaneError> {
        let path = match root {
            Some(path) => path.to_owned(),
            None => {
                let path = mounted().map_err(kernel("/proc/self/mountinfo"))?.ok_or_else(not_mounted)?;
                if !is_root(&path) {
                    tracing::warn!(
                        path = %path.display(),
                        "not the root of the cgroup hierarchy: sockets outside are not translated at connect time; mount the node's \
                         /sys/fs/cgroup into the container"
                    );
                }
                path
            }
        };
        const CGROUP2_MAGIC: u64 = 0x6367_7270;
        let open = || -> io::Result<_> {
            let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::CLOEXEC;
            let fd = rustix::fs::open(&path, flags, rustix::fs::Mode::empty())?;
            let magic = rustix::fs::fstatfs(&fd)?.f_type as u64;
            Ok((fd, magic, fs::metadata(&path)?.ino()))
        };
        let (fd, magic, id) = open().map_err(|error| {
            unavailable(format!(
                "--cgroup-root {}: {error}; name a directory of the cgroup v2 hierarchy, or run with --socket-lb off",
                path.display()
            ))
        })?;
        if magic != CGROUP2_MAGIC {
            return Err(unavailable(format!(
                "--cgroup-root {} is not in a cgroup v2 hierarchy: connect-time programs cannot be attached there; name one that \
                 is, or run with --socket-lb off",
                path.display()
            )));
        }
        Ok(Self { path, fd, id })
    }
}

fn not_mounted() -> DataplaneError {
    unavailable(
        "no cgroup v2 hierarchy is mounted: mount one (`mount -t cgroup2 none /sys/fs/cgroup`), name it with --cgroup-root, or run \
         with --socket-lb off",
    )
}

/// The mount whose directory is the root of the hierarchy; where none is, the first cgroup2 mount.
pub(crate) fn mounted() -> io::Result<Option<PathBuf>> {
    Ok(choose(&mounts::all()?, is_root))
}

/// Every cgroup but the root has `cgroup.events`, whatever a cgroup namespace makes its path look like.
pub(crate) fn is_root(path: &Path) -> bool {
    path.join("cgroup.controllers").exists() && !path.join("cgroup.events").exists()
}

fn choose(mounts: &[Mount], is_root: impl Fn(&Path) -> bool) -> Option<PathBuf> {
    let paths: Vec<&PathBuf> = mounts.iter().filter(|mount| mount.kind == "cgroup2").map(|mount| &mount.path).collect();
    paths.iter().find(|path| is_root(path)).or(paths.first()).copied().cloned()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory that looks like a cgroup.
    fn cgroup(path: &Path, root: bool) {
        fs::create_dir_all(path).unwrap();
        fs::write(path.join("cgroup.controllers"), "").unwrap();
        if !root {
            fs::write(path.join("cgroup.events"), "").unwrap();
        }
    }

    fn found(mounts: &[(&str, &Path)]) -> Option<PathBuf> {
        let lines = mounts.iter().map(|(kind, path)| {
            format!("41 31 0:38 /../.. {} rw,relatime shared:9 - {kind} {kind} rw\n", path.display())
        });
        choose(&mounts::parse(&lines.collect::<String>()), is_root)
    }

    #[test]
    fn the_hierarchys_root_is_found_wherever_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let (own, host) = (dir.path().join("own"), dir.path().join("host"));
        let unified = host.join("unified");
        cgroup(&own, false);
        cgroup(&unified, true);
        fs::create_dir_all(host.join("memory")).unwrap();
        // A hybrid host, from the host itself and from a container that mounts all of it.
        assert_eq!(
            found(&[("tmpfs", &host), ("cgroup", &host.join("memory")), ("cgroup2", &unified)]),
            Some(unified.clone())
        );
        assert_eq!(found(&[("cgroup2", &own), ("cgroup", &host), ("cgroup2", &unified)]), Some(unified));
        // cgroup v2 alone, from a container with a cgroup namespace of its own.
        cgroup(&host, true);
        assert_eq!(found(&[("cgroup2", &own), ("cgroup2", &host)]), Some(host));
        // Nothing of the node's to be seen: better its own than none.
        assert_eq!(found(&[("tmpfs", dir.path()), ("cgroup2", &own)]), Some(own));
        assert_eq!(found(&[("tmpfs", dir.path())]), None);
    }

    /// No node without cgroup v2 is left alone with an error number.
    #[test]
    fn no_cgroup_v2_is_said_in_a_line_with_the_remedy() {
        let of = |path: &str| Cgroup::open(Some(Path::new(path))).unwrap_err().to_string();
        assert_eq!(
            of("/proc"),
            "--cgroup-root /proc is not in a cgroup v2 hierarchy: connect-time programs cannot be attached there; name one that is, or run \
             with --socket-lb off"
        );
        assert_eq!(
            of("/nonexistent"),
            "--cgroup-root /nonexistent: No such file or directory (os error 2); name a directory of the cgroup v2 hierarchy, or run with \
             --socket-lb off"
        );
        assert_eq!(
            not_mounted().to_string(),
            "no cgroup v2 hierarchy is mounted: mount one (`mount -t cgroup2 none /sys/fs/cgroup`), name it with --cgroup-root, or run \
             with --socket-lb off"
        );
        assert_eq!(choose(&mounts::parse("41 31 0:38 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n"), |_| true), None);
    }

    #[test]
    fn odd_paths() {
        let line = r"41 31 0:38 / /a\040b\134c rw - cgroup2 none rw";
        assert_eq!(choose(&mounts::parse(line), |_| false), Some(PathBuf::from(r"/a b\c")));
    }
}
