//! The agent's own process, by the names that Prometheus' libraries have for it; read from /proc at each scrape.

use std::fs;

use rustix::{
    param::{clock_ticks_per_second, page_size},
    process::{Resource, getrlimit},
};

use super::exposition::Exposition;

/// Of `/proc/self/stat`, in the kernel's units.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Stat {
    cpu_ticks: u64,
    /// After the machine's start.
    started_ticks: u64,
    virtual_bytes: u64,
    resident_pages: u64,
}

impl Stat {
    /// The second field is the command's name, which may hold anything.
    fn parse(text: &str) -> Option<Self> {
        let (_, fields) = text.rsplit_once(')')?;
        let fields: Vec<&str> = fields.split_whitespace().collect();
        let number = |field: usize| fields.get(field - 3)?.parse::<u64>().ok();
        Some(Self {
            cpu_ticks: number(14)? + number(15)?,
            started_ticks: number(22)?,
            virtual_bytes: number(23)?,
            resident_pages: number(24)?,
        })
    }
}

/// Seconds since the epoch.
fn boot_time(stat: &str) -> Option<f64> {
    stat.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()
}

/// What cannot be read is left out.
pub(super) fn write(to: &mut Exposition) {
    if let Some(stat) = fs::read_to_string("/proc/self/stat").ok().as_deref().and_then(Stat::parse) {
        let Stat { cpu_ticks, started_ticks: _, virtual_bytes, resident_pages } = stat;
        to.counter(
            "process_cpu_seconds_total",
            "Total user and system CPU time spent in seconds.",
            cpu_ticks as f64 / clock_ticks_per_second() as f64,
        );
        to.gauge(
            "process_resident_memory_bytes",
            "Resident memory size in bytes.",
            resident_pages * page_size() as u64,
        );
        to.gauge("process_virtual_memory_bytes", "Virtual memory size in bytes.", virtual_bytes);
    }
    // None: as much as there is.
    let limit = |resource| getrlimit(resource).current.unwrap_or(u64::MAX);
    to.gauge(
        "process_virtual_memory_max_bytes",
        "Maximum amount of virtual memory available in bytes.",
        limit(Resource::As),
    );
    if let Ok(open) = fs::read_dir("/proc/self/fd") {
        // One of them reads the directory.
        to.gauge("process_open_fds", "Number of open file descriptors.", open.count().saturating_sub(1));
    }
    to.gauge("process_max_fds", "Maximum number of open file descriptors.", limit(Resource::Nofile));
    write_start_time(to);
}

pub(super) fn write_start_time(to: &mut Exposition) {
    let read = |path| fs::read_to_string(path).ok();
    let booted = read("/proc/stat").as_deref().and_then(boot_time);
    let stat = read("/proc/self/stat").as_deref().and_then(Stat::parse);
    if let (Some(booted), Some(Stat { started_ticks, .. })) = (booted, stat) {
        to.gauge(
            "process_start_time_seconds",
            "Start time of the process since unix epoch in seconds.",
            booted + started_ticks as f64 / clock_ticks_per_second() as f64,
        );
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;

    #[test]
    fn fields_are_counted_behind_the_name() {
        let text =
            "71 (a ) b) S 1 71 71 0 -1 4194560 9 0 0 0 250 50 0 0 20 0 5 0 4242 1048576 33 18446744073709551615 1";
        let expected = Stat { cpu_ticks: 300, started_ticks: 4242, virtual_bytes: 1_048_576, resident_pages: 33 };
        assert_eq!(Stat::parse(text), Some(expected));
        assert_eq!(Stat::parse("71 (a) S 1"), None);
        assert_eq!(boot_time("cpu 1 2\nbtime 1700000000\nprocesses 3\n"), Some(1_700_000_000.0));
    }

    #[test]
    fn a_process_knows_itself() {
        let mut to = Exposition::default();
        write(&mut to);
        let text = to.finish();
        let value = |name: &str| -> f64 {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            line.unwrap_or_else(|| panic!("no {name} in {text}")).parse().unwrap()
        };
        let age = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs_f64()
            - value("process_start_time_seconds");
        // The clock may have been set since the machine started.
        assert!(age.abs() < 86_400.0, "{age} s old");
        assert!(value("process_resident_memory_bytes") > 1e6 && value("process_open_fds") >= 3.0, "{text}");
        assert!(value("process_open_fds") < value("process_max_fds"), "{text}");
    }
}
