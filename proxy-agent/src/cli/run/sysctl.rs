//! Settings of the kernel's conntrack, where netfilter translates: those that were asked for, as kube-proxy sets them (contract A110). All
//! others stay as they are, and these once they are set: what was there before is nobody's to know once another agent has set it again.

use std::{fs, path::Path, time::Duration};

use super::args::Conntrack;
use crate::dataplane::netfilter::settings;

/// kube-proxy sets no more, however many CPUs there are.
const MOST_ENTRIES: u64 = 1 << 20;
/// kube-proxy's `--conntrack-max-per-core`, where only the least is given.
const PER_CORE: u32 = 32_768;
/// And its `--conntrack-min`, where only that is.
const LEAST: u32 = 131_072;

/// What could not be set, and why.
pub(super) fn set(conntrack: &Conntrack) -> Vec<String> {
    write(&wanted(conntrack, settings::cpus()), &settings::directory())
}

fn wanted(conntrack: &Conntrack, cpus: u64) -> Vec<(&'static str, u64)> {
    let Conntrack {
        conntrack_tcp_timeout_established,
        conntrack_tcp_timeout_close_wait,
        conntrack_udp_timeout,
        conntrack_udp_timeout_stream,
        conntrack_max_per_core,
        conntrack_min,
        conntrack_tcp_be_liberal,
    } = *conntrack;
    let per_core = conntrack_max_per_core.or_else(|| conntrack_min.map(|_| PER_CORE)).unwrap_or_default();
    let entries = match u64::from(per_core) * cpus {
        0 => 0,
        scaled if scaled > MOST_ENTRIES => MOST_ENTRIES,
        scaled => scaled.max(u64::from(conntrack_min.unwrap_or(LEAST))),
    };
    let seconds = |timeout: Option<Duration>| timeout.map_or(0, |timeout| timeout.as_secs());
    let all = [
        ("netfilter/nf_conntrack_max", entries),
        ("netfilter/nf_conntrack_tcp_timeout_established", seconds(conntrack_tcp_timeout_established)),
        ("netfilter/nf_conntrack_tcp_timeout_close_wait", seconds(conntrack_tcp_timeout_close_wait)),
        ("netfilter/nf_conntrack_tcp_be_liberal", u64::from(conntrack_tcp_be_liberal)),
        ("netfilter/nf_conntrack_udp_timeout", seconds(conntrack_udp_timeout)),
        ("netfilter/nf_conntrack_udp_timeout_stream", seconds(conntrack_udp_timeout_stream)),
    ];
    all.into_iter().filter(|(_, value)| *value > 0).collect()
}

fn write(wanted: &[(&'static str, u64)], directory: &Path) -> Vec<String> {
    let one = |(name, value): &(&'static str, u64)| {
        let path = directory.join(name);
        let text = value.to_string();
        if fs::read_to_string(&path).is_ok_and(|now| now.trim() == text) {
            return None;
        }
        let error = fs::write(&path, text).err()?;
        let name = name.replace('/', ".");
        Some(format!("net.{name} cannot be set to {value}: {error}; set it on the node (sysctl), or say nothing of it"))
    };
    wanted.iter().filter_map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOTHING: Conntrack = Conntrack {
        conntrack_tcp_timeout_established: None,
        conntrack_tcp_timeout_close_wait: None,
        conntrack_udp_timeout: None,
        conntrack_udp_timeout_stream: None,
        conntrack_max_per_core: None,
        conntrack_min: None,
        conntrack_tcp_be_liberal: false,
    };

    #[test]
    fn what_is_not_asked_for_stays_as_it_is() {
        assert_eq!(wanted(&NOTHING, 8), []);
        let as_it_is = Conntrack {
            conntrack_max_per_core: Some(0),
            conntrack_min: Some(5),
            conntrack_udp_timeout: Some(Duration::ZERO),
            ..NOTHING
        };
        assert_eq!(wanted(&as_it_is, 8), []);
    }

    #[test]
    fn entries_as_kube_proxy_counts_them_a110() {
        for (per_core, least, cpus, entries) in [
            (Some(8_192), None, 4, 131_072),
            (Some(40_000), None, 4, 160_000),
            (Some(10), Some(0), 4, 40),
            (Some(10), Some(100), 4, 100),
            (None, Some(100), 4, 4 * 32_768),
            (Some(1_000_000), Some(5_000_000), 4, 1 << 20),
        ] {
            let conntrack = Conntrack { conntrack_max_per_core: per_core, conntrack_min: least, ..NOTHING };
            assert_eq!(wanted(&conntrack, cpus), [("netfilter/nf_conntrack_max", entries)], "{per_core:?} {least:?}");
        }
    }

    #[test]
    fn what_cannot_be_set_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let wanted = [("udp", 7), ("conf/max", 9)];
        fs::write(dir.path().join("udp"), "30\n").unwrap();
        fs::create_dir_all(dir.path().join("conf/max")).unwrap();
        let problems = write(&wanted, dir.path());
        assert_eq!(fs::read_to_string(dir.path().join("udp")).unwrap(), "7");
        assert_eq!(problems.len(), 1);
        assert!(problems[0].starts_with("net.conf.max cannot be set to 9: "), "{problems:?}");
    }
}
