//! Where settings of this network namespace can be written.
//!
//! Container runtimes mount `/proc/sys` read-only, and nothing may be mounted inside `/proc`. What the manifest mounts of the node's `/proc`
//! elsewhere can be written to, and shows each process the settings of its own network namespace, as `/proc` itself does.

use std::path::{Path, PathBuf};

use rustix::fs::{Access, access};

use crate::dataplane::mounts::{self, Mount};

const OWN: &str = "/proc/sys/net";

/// `/proc/sys/net`, or another mount of it where only that can be written to.
pub(crate) fn directory() -> PathBuf {
    let is_writable = |path: &Path| access(path.join("ipv4/ip_forward"), Access::WRITE_OK).is_ok();
    if is_writable(Path::new(OWN)) {
        return OWN.into();
    }
    let mounts = mounts::all().unwrap_or_default();
    others(&mounts).find(|path| is_writable(path)).unwrap_or_else(|| OWN.into())
}

/// How many CPUs the node has, however few of them this container may use; 1 if that cannot be told.
pub(crate) fn cpus() -> u64 {
    aya::util::online_cpus().map_or(1, |cpus| cpus.len() as u64)
}

/// Where else it is.
fn others(mounts: &[Mount]) -> impl Iterator<Item = PathBuf> {
    let of_proc = mounts.iter().filter(|mount| mount.kind == "proc" && mount.path != Path::new("/proc"));
    of_proc.filter_map(|Mount { root, path, .. }| Some(path.join(Path::new("/sys/net").strip_prefix(root).ok()?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_mount_is_found_whatever_of_proc_it_shows() {
        let mounts = mounts::parse(
            "1 0 0:1 / /proc rw - proc proc rw\n\
             2 1 0:1 /sys /proc/sys ro - proc proc rw\n\
             3 1 0:1 /bus /proc/bus ro - proc proc rw\n\
             4 0 0:9 / /host/proc ro - proc proc rw\n\
             5 0 0:9 /sys /host/sys rw - proc proc rw\n\
             6 0 0:9 /sys/net /host/settings rw - proc proc rw\n\
             7 0 0:8 /sys/net /srv rw - ext4 /dev/vda1 rw\n",
        );
        let found: Vec<_> = others(&mounts).collect();
        let wanted = ["/proc/sys/net", "/host/proc/sys/net", "/host/sys/net", "/host/settings"];
        assert_eq!(found, wanted.map(PathBuf::from));
        assert!(directory().join("ipv4/ip_forward").exists());
    }
}
