//! What is to be known of pinned programs by whoever comes after the agent that left them. Nothing can be written to a file on bpffs, so it is
//! said by directories: by their names, and by when they were made.

use std::{fs, io, path::PathBuf, time::SystemTime};

use super::{Timeouts, pins::Layout};

const TIMEOUTS: &str = "timeouts-";

/// There from the moment another mode took their frontends away, until an agent in mode ebpf comes again.
fn retired(layout: &Layout) -> PathBuf {
    layout.version.join("retired")
}

/// Since when: of the first time.
pub(super) fn retire(layout: &Layout) -> io::Result<SystemTime> {
    let path = retired(layout);
    unless(io::ErrorKind::AlreadyExists, fs::create_dir(&path))?;
    fs::metadata(path)?.modified()
}

pub(super) fn is_retired(layout: &Layout) -> bool {
    retired(layout).exists()
}

pub(super) fn take_up(layout: &Layout) -> io::Result<()> {
    unless(io::ErrorKind::NotFound, fs::remove_dir(retired(layout)))
}

/// By which the programs go.
pub(super) fn note(layout: &Layout, timeouts: Timeouts) -> io::Result<()> {
    let Timeouts { tcp_established, tcp_close_wait, udp, udp_stream } = timeouts;
    let name = format!("{TIMEOUTS}{tcp_established}-{tcp_close_wait}-{udp}-{udp_stream}");
    unless(io::ErrorKind::AlreadyExists, fs::create_dir(layout.version.join(&name)))?;
    for (other, _) in noted(layout)?.into_iter().filter(|(other, _)| *other != name) {
        unless(io::ErrorKind::NotFound, fs::remove_dir(layout.version.join(other)))?;
    }
    Ok(())
}

/// Those that were noted; where nobody has, these. An agent that died over it may have left two notes: of either the longer ones.
pub(super) fn timeouts(layout: &Layout, otherwise: Timeouts) -> Timeouts {
    let noted = noted(layout).unwrap_or_default().into_iter().map(|(_, timeouts)| timeouts);
    noted.reduce(|one, other| one.longer(other)).unwrap_or(otherwise)
}

fn noted(layout: &Layout) -> io::Result<Vec<(String, Timeouts)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(&layout.version)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        found.extend(read(&name).map(|timeouts| (name, timeouts)));
    }
    Ok(found)
}

fn read(name: &str) -> Option<Timeouts> {
    let numbers: Vec<u32> =
        name.strip_prefix(TIMEOUTS)?.split('-').map(|word| word.parse().ok()).collect::<Option<_>>()?;
    let [tcp_established, tcp_close_wait, udp, udp_stream] = *numbers.as_slice() else { return None };
    Some(Timeouts { tcp_established, tcp_close_wait, udp, udp_stream })
}

fn unless(kind: io::ErrorKind, done: io::Result<()>) -> io::Result<()> {
    done.or_else(|error| if error.kind() == kind { Ok(()) } else { Err(error) })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn layout(dir: &tempfile::TempDir) -> Layout {
        let layout = Layout::of(dir.path());
        fs::create_dir(&layout.version).unwrap();
        layout
    }

    #[test]
    fn retirement_counts_from_its_first_moment() {
        let dir = tempfile::tempdir().unwrap();
        let layout = layout(&dir);
        take_up(&layout).unwrap();
        assert!(!is_retired(&layout));
        let first = retire(&layout).unwrap();
        assert!(is_retired(&layout));
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(retire(&layout).unwrap(), first, "another agent, later");
        take_up(&layout).unwrap();
        assert!(retire(&layout).unwrap() > first, "it was in force meanwhile");
    }

    #[test]
    fn time_outs_are_those_of_the_programs() {
        let dir = tempfile::tempdir().unwrap();
        let layout = layout(&dir);
        let [mine, long] = [Timeouts::default(), Timeouts { tcp_established: 432_000, udp: 3, ..Timeouts::default() }];
        assert_eq!(timeouts(&layout, mine), mine);
        note(&layout, long).unwrap();
        assert_eq!(timeouts(&layout, mine), long);
        note(&layout, mine).unwrap();
        note(&layout, mine).unwrap();
        assert_eq!(timeouts(&layout, long), mine);
        assert_eq!(noted(&layout).unwrap().len(), 1);
        for other in ["maps", "timeouts-1", "timeouts-1-2-3-x", "timeouts-1-2-3-4-5"] {
            fs::create_dir(layout.version.join(other)).unwrap();
        }
        fs::create_dir(layout.version.join("timeouts-432000-1-3-1")).unwrap();
        assert_eq!(timeouts(&layout, mine), Timeouts { tcp_established: 432_000, ..mine });
    }
}
