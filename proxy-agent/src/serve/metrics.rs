//! `/metrics`: kube-proxy's names where this program has the value (`upstream`), so that existing dashboards go on working, and our own
//! beside them. Values are taken from the status and the kernel at scrape time; the only state here counts health answers.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::SystemTime,
};

use axum::http::StatusCode;
use tracing::warn;

use super::{exposition::Exposition, process, upstream};
use crate::{
    dataplane::{Ahead, Fill, Retiring, select::Mode},
    model::Family,
    status::{
        FrontendState, SourceState, Status,
        report::{CheckPorts, FrontendCount},
        requests::{EventCounts, Requests},
    },
};

/// What only the kernel knows.
#[derive(Clone, Debug, Default)]
pub struct Readings {
    pub events: Vec<Event>,
    pub fill: Vec<Fill>,
    /// What was ended because its backend, or its address, is gone.
    pub ended: Vec<(&'static str, u64)>,
    /// What iptables did not take, where that is the dataplane.
    pub restore_failures: Option<[(Family, u64); 2]>,
}

/// Something that the programs counted.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Event {
    pub reason: &'static str,
    /// The packet or the connection was lost to its sender.
    pub drop: bool,
    pub count: u64,
}

/// Reads the kernel; `Err` says why it could not. May block.
pub type Probe = Arc<dyn Fn() -> Result<Readings, String> + Send + Sync>;

/// As Kubernetes writes it of Nodes and images.
const PLATFORM: &str = if cfg!(target_arch = "x86_64") {
    "linux/amd64"
} else if cfg!(target_arch = "aarch64") {
    "linux/arm64"
} else {
    "linux"
};

/// The answers of one health check.
#[derive(Debug, Default)]
pub(super) struct Answers(Mutex<(BTreeMap<u16, u64>, Option<u16>)>);

impl Answers {
    pub(super) fn count(&self, code: StatusCode) {
        let mut answers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (counts, last) = &mut *answers;
        *counts.entry(code.as_u16()).or_default() += 1;
        *last = Some(code.as_u16());
    }

    /// By code.
    pub(super) fn counts(&self) -> BTreeMap<u16, u64> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).0.clone()
    }

    pub(super) fn last(&self) -> Option<u16> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).1
    }
}

pub(super) struct Metrics {
    probe: Probe,
    requests: Arc<Requests>,
    told: Arc<EventCounts>,
    pub(super) healthz: Answers,
    pub(super) livez: Answers,
}

impl Metrics {
    pub(super) fn new(probe: Probe, requests: Arc<Requests>, told: Arc<EventCounts>) -> Self {
        Self { probe, requests, told, healthz: Answers::default(), livez: Answers::default() }
    }

    pub(super) fn encode(&self, status: &Status, ports: &CheckPorts) -> String {
        let mut to = Exposition::default();
        upstream::write_health(&mut to, "healthz", &self.healthz);
        upstream::write_health(&mut to, "livez", &self.livez);
        upstream::write_sync(&mut to, status);
        write_state(&mut to, status);
        let failed = ports.values().flatten().count();
        to.gauges(
            "proxy_agent_health_check_ports",
            "Health-check node ports of Services, for each address",
            [("listening", ports.len() - failed), ("failed", failed)].map(|(state, count)| ([("state", state)], count)),
        );
        match (self.probe)() {
            Ok(readings) => {
                write_kernel(&mut to, &readings, &status.fill);
                upstream::write_mode(&mut to, &readings);
            }
            // Its metrics are left out, the rest is served.
            Err(error) => warn!(%error, "the kernel's counters are missing from the metrics"),
        }
        to.counters(
            "proxy_agent_events_total",
            "Events for users of the cluster, by what became of them",
            self.told.counts().map(|(outcome, count)| ([("outcome", outcome)], count)),
        );
        upstream::write_requests(&mut to, &self.requests.counts());
        process::write(&mut to);
        to.finish()
    }

    pub(super) fn encode_slis(&self) -> String {
        let mut to = Exposition::default();
        upstream::write_slis(&mut to, [("healthz", &self.healthz), ("livez", &self.livez)]);
        process::write_start_time(&mut to);
        to.finish()
    }
}

fn write_state(to: &mut Exposition, status: &Status) {
    let build = [("version", env!("CARGO_PKG_VERSION")), ("platform", PLATFORM)];
    to.gauges("proxy_agent_build_info", "The program that runs", [(build, 1)]);
    to.gauges(
        "proxy_agent_mode",
        "1 for the mode that the agent runs in",
        Mode::ALL.map(|mode| ([("mode", mode.name())], u8::from(mode.name() == status.mode))),
    );
    to.gauges(
        "proxy_agent_mode_info",
        "The mode that the agent runs in, and why that one",
        [([("mode", status.mode), ("reason", &*status.mode_reason)], 1)],
    );
    let state = |one: &Retiring| {
        let state = if one.retired { "retired" } else { "in_force" };
        ([("mode", one.mode), ("state", state)], 1)
    };
    to.gauges(
        "proxy_agent_retiring",
        "1 for each other mode that an agent left something of: in_force, or retired, taking no new flows",
        status.retiring.iter().map(state),
    );
    // Not counted is not none.
    let flows = |one: &Retiring| Some(([("mode", one.mode)], one.flows?));
    to.gauges(
        "proxy_agent_retiring_flows",
        "Open flows that go by what another mode left in force, which takes no new ones",
        status.retiring.iter().filter_map(flows),
    );
    to.counter("proxy_agent_syncs_total", "Syncs done", status.syncs);
    to.counter(
        "proxy_agent_drift_repaired_total",
        "Differences found in the kernel and put right",
        status.drift_repaired,
    );
    to.gauge("proxy_agent_ready", "1 once the first full state is in force", u8::from(status.ready));
    let synced = matches!(status.source, SourceState::Synced);
    to.gauge("proxy_agent_source_synced", "1 while the source is reachable and listed", u8::from(synced));
    to.gauge("proxy_agent_services", "Services known", status.services);
    to.gauge("proxy_agent_endpoints", "Endpoints known", status.endpoints);
    let FrontendCount { programmed, pending, degraded } = FrontendCount::of(status.frontends.values());
    to.gauges(
        "proxy_agent_frontends",
        "Frontends by state",
        [("programmed", programmed), ("pending", pending), ("degraded", degraded)]
            .map(|(state, count)| ([("state", state)], count)),
    );
    let oldest = status.frontends.values().filter(|row| matches!(row.state, FrontendState::Degraded(_)));
    let oldest = oldest.filter_map(|row| row.since.duration_since(SystemTime::UNIX_EPOCH).ok()).min();
    to.gauges(
        "proxy_agent_degraded_since_timestamp_seconds",
        "Since when the frontend is degraded that is for longest",
        oldest.map(|since| ([], since.as_secs_f64())),
    );
    to.gauges(
        "proxy_agent_hooks",
        "Hooks by state; lost: taken off by somebody, and not to be put back",
        [("in_force", status.hooks.len()), ("lost", status.lost_hooks.len())]
            .map(|(state, count)| ([("state", state)], count)),
    );
    to.counter("proxy_agent_hooks_lost_total", "Times that a hook was found to be taken off", status.hooks_lost);
    to.gauges(
        "proxy_agent_programs_ahead",
        "Others' programs that run before ours, and may keep packets from it",
        status
            .ahead
            .iter()
            .map(|Ahead { kind, target, programs }| ([("device", target.as_str()), ("hook", kind)], programs.len())),
    );
    to.gauge("proxy_agent_problem_objects", "Objects not wholly understood", status.problems.len());
    to.gauge("proxy_agent_failed_devices", "Devices that could not be attached to", status.failed_devices.len());
}

/// `own`: the fill of the agent's own maps, which it knows without counting.
fn write_kernel(to: &mut Exposition, readings: &Readings, own: &[Fill]) {
    let Readings { events, fill, ended, restore_failures: _ } = readings;
    let counted = fill.iter().map(|fill| own.iter().find(|own| own.map == fill.map).unwrap_or(fill));
    // Without pins there are none but its own.
    let others = own.iter().filter(|own| !fill.iter().any(|fill| fill.map == own.map));
    let fill: Vec<&Fill> = counted.chain(others).collect();
    to.gauges(
        "proxy_agent_bpf_map_entries",
        "Entries in a map of the datapath, counted at most once a minute; the agent's own maps as of the last sync",
        fill.iter().map(|fill| ([("map", fill.map.as_str())], fill.entries)),
    );
    to.gauges(
        "proxy_agent_bpf_map_capacity",
        "Entries that a map of the datapath can hold",
        fill.iter().map(|fill| ([("map", fill.map.as_str())], fill.capacity)),
    );
    to.counters(
        "proxy_agent_datapath_events_total",
        "What the datapath dropped, refused, repaired or left alone",
        events.iter().map(|event| {
            ([("reason", event.reason), ("drop", if event.drop { "true" } else { "false" })], event.count)
        }),
    );
    to.counters(
        "proxy_agent_ended_total",
        "Flows and sockets ended because their backend is gone, and masquerades because their address is, since the agent started; over: pairs of entries of flows that were over, taken out to make room",
        ended.iter().map(|(object, count)| ([("object", *object)], *count)),
    );
}

#[cfg(test)]
pub(super) mod tests {
    use std::time::Duration;

    use super::*;
    use crate::status::report::tests::{busy, check_ports};

    fn readings() -> Readings {
        Readings {
            events: vec![
                Event { reason: "rejected", drop: true, count: 4 },
                Event { reason: "torn_read", drop: false, count: 0 },
            ],
            fill: busy().fill.to_vec(),
            ended: vec![("udp_flow", 7), ("socket", 1)],
            restore_failures: Some([(Family::V4, 2), (Family::V6, 0)]),
        }
    }

    /// Something of each metric that there is.
    pub(in crate::serve) fn everything() -> (Metrics, Status, CheckPorts) {
        let requests = Requests::default();
        requests.count("GET", "192.0.2.1:6443", Some(200), Some(Duration::from_millis(3)));
        let metrics = Metrics::new(Arc::new(|| Ok(readings())), requests.into(), Arc::default());
        metrics.healthz.count(StatusCode::OK);
        metrics.healthz.count(StatusCode::SERVICE_UNAVAILABLE);
        metrics.livez.count(StatusCode::OK);
        (metrics, busy(), check_ports())
    }

    #[test]
    fn metrics_text() {
        let (metrics, status, ports) = everything();
        let text = metrics.encode(&status, &ports);
        // The process is another one each time; eighty buckets twice over show nothing that the first do not.
        let is_stable = |line: &&str| {
            let bucket = line.contains("programming_duration_seconds_bucket") && !line.contains("le=\"0.");
            !bucket && !line.starts_with("process_") && !line.starts_with("proxy_agent_build_info")
        };
        insta::assert_snapshot!("metrics", text.lines().filter(is_stable).collect::<Vec<_>>().join("\n"));
    }

    #[test]
    fn every_sample_has_a_described_family_and_a_number() {
        let (metrics, status, ports) = everything();
        let text = metrics.encode(&status, &ports);
        let families: Vec<&str> = text.lines().filter_map(|l| l.strip_prefix("# TYPE ")?.split(' ').next()).collect();
        assert!(families.len() > 30, "{families:?}");
        let mut unique = families.clone();
        unique.sort_unstable();
        unique.dedup();
        assert_eq!(unique.len(), families.len(), "a family is described twice");
        for line in text.lines().filter(|l| !l.starts_with('#')) {
            let (name, value) = line.rsplit_once(' ').unwrap();
            assert!(value.parse::<f64>().is_ok(), "{line}");
            assert!(families.iter().any(|family| name.starts_with(family)), "{line}");
        }
        let counters = text.lines().filter_map(|l| l.strip_prefix("# TYPE ")?.strip_suffix(" counter"));
        assert_eq!(counters.filter(|name| !name.ends_with("_total")).collect::<Vec<_>>(), Vec::<&str>::new());
    }

    #[test]
    fn an_unreadable_kernel_takes_only_its_own_metrics_away() {
        let metrics = Metrics::new(Arc::new(|| Err("no pins".into())), Arc::default(), Arc::default());
        let text = metrics.encode(&busy(), &CheckPorts::new());
        assert!(text.contains("proxy_agent_syncs_total 9"));
        assert!(!text.contains("proxy_agent_bpf_map"));
    }
}
