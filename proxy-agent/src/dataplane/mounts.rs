//! What is mounted here, by `/proc/self/mountinfo`.

use std::{fs, io, path::PathBuf};

#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Mount {
    /// Of the filesystem.
    pub(crate) kind: String,
    /// What of the filesystem is to be seen there.
    pub(crate) root: PathBuf,
    pub(crate) path: PathBuf,
    /// What is mounted on it shows in other places that have it, too.
    pub(crate) shared: bool,
}

/// In the order in which they were mounted.
pub(crate) fn all() -> io::Result<Vec<Mount>> {
    fs::read_to_string("/proc/self/mountinfo").map(|text| parse(&text))
}

pub(crate) fn parse(mountinfo: &str) -> Vec<Mount> {
    mountinfo.lines().filter_map(mount).collect()
}

fn mount(line: &str) -> Option<Mount> {
    // 41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw
    let (place, filesystem) = line.split_once(" - ")?;
    let mut place = place.split(' ').skip(3);
    Some(Mount {
        kind: filesystem.split(' ').next()?.to_owned(),
        root: unescaped(place.next()?),
        path: unescaped(place.next()?),
        // Behind the options.
        shared: place.skip(1).any(|field| field.starts_with("shared:")),
    })
}

/// Blanks and backslashes are written in octal there.
fn unescaped(path: &str) -> PathBuf {
    [(r"\040", " "), (r"\011", "\t"), (r"\012", "\n"), (r"\134", r"\")]
        .into_iter()
        .fold(path.to_owned(), |path, (code, character)| path.replace(code, character))
        .into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_read() {
        let text = "22 1 0:20 / /proc rw,nosuid shared:5 - proc proc rw\n\
                    41 31 0:38 /a\\040b /host/c\\134d rw,relatime master:2 - cgroup2 cgroup2 rw\n\
                    short\n";
        let mount = |kind: &str, root: &str, path: &str, shared| Mount {
            kind: kind.into(),
            root: root.into(),
            path: path.into(),
            shared,
        };
        assert_eq!(parse(text), [mount("proc", "/", "/proc", true), mount("cgroup2", "/a b", r"/host/c\d", false)]);
        assert!(all().unwrap().iter().any(|mount| mount.kind == "proc"), "there is no /proc");
    }
}
