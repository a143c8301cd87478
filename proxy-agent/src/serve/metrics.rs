//! `/metrics`: kube-proxy's names where this program has the value, so that existing dashboards go on working, and our own
//! beside them. Values are taken from the status and the kernel at scrape time; the only state here counts health answers.

use std::{fmt, sync::Arc, time::SystemTime};

use axum::http::StatusCode;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric, NoLabelSet, text},
    metrics::{
        MetricType,
        counter::{ConstCounter, Counter},
        family::Family,
        gauge::ConstGauge,
    },
    registry::{Registry, Unit},
};
use tracing::warn;

use crate::{
    dataplane::{Fill, select::Mode},
    status::{
        Histogram, SourceState, Status,
        report::{CheckPorts, FrontendCount},
    },
};

pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// What only the kernel knows.
#[derive(Clone, Debug, Default)]
pub struct Readings {
    pub events: Vec<Event>,
    pub fill: Vec<Fill>,
    /// What was ended because its backend, or its address, is gone.
    pub ended: Vec<(&'static str, u64)>,
    /// What iptables did not take, where that is the dataplane.
    pub restore_failures: Option<u64>,
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

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct Code {
    code: u16,
}

pub(super) struct Metrics {
    probe: Probe,
    healthz: Family<Code, Counter>,
    livez: Family<Code, Counter>,
}

impl Metrics {
    pub(super) fn new(probe: Probe) -> Self {
        Self { probe, healthz: Family::default(), livez: Family::default() }
    }

    pub(super) fn count_healthz(&self, code: StatusCode) {
        self.healthz.get_or_create(&Code { code: code.as_u16() }).inc();
    }

    pub(super) fn count_livez(&self, code: StatusCode) {
        self.livez.get_or_create(&Code { code: code.as_u16() }).inc();
    }

    pub(super) fn encode(&self, status: &Arc<Status>, ports: &CheckPorts) -> Result<String, fmt::Error> {
        let mut registry = Registry::default();
        registry.register("kubeproxy_proxy_healthz", "Answers of /healthz by code", self.healthz.clone());
        registry.register("kubeproxy_proxy_livez", "Answers of /livez by code", self.livez.clone());
        let readings = (self.probe)();
        if let Err(error) = &readings {
            warn!(%error, "the kernel's counters are missing from the metrics");
        }
        let failed = ports.values().flatten().count();
        registry.register_collector(Box::new(Scrape {
            status: Arc::clone(status),
            readings: readings.ok(),
            check_ports: [("listening", ports.len() - failed), ("failed", failed)],
        }));
        let mut out = String::new();
        text::encode(&mut out, &registry)?;
        Ok(out)
    }
}

/// One scrape's values.
#[derive(Debug)]
struct Scrape {
    status: Arc<Status>,
    /// `None`: the kernel could not be read; its metrics are left out, the rest is served.
    readings: Option<Readings>,
    check_ports: [(&'static str, usize); 2],
}

impl Collector for Scrape {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut to = Encoder(encoder);
        self.encode_sync(&mut to)?;
        self.encode_state(&mut to)?;
        if let Some(readings) = &self.readings {
            encode_kernel(readings, &self.status.fill, &mut to)?;
        }
        Ok(())
    }
}

impl Scrape {
    /// Under kube-proxy's names.
    fn encode_sync(&self, to: &mut Encoder<'_>) -> fmt::Result {
        let Status { timings, last_sync, last_queued, service_changes, endpoint_changes, .. } = &*self.status;
        to.histogram("kubeproxy_sync_proxy_rules_duration", "How long a sync took", &timings.sync)?;
        to.histogram(
            "kubeproxy_network_programming_duration",
            "From the change of an endpoint to the end of the sync that put it in force",
            &timings.programming,
        )?;
        let timestamp = |time: &Option<SystemTime>| {
            time.and_then(|time| time.duration_since(SystemTime::UNIX_EPOCH).ok()).map_or(0.0, |d| d.as_secs_f64())
        };
        to.gauge(
            "kubeproxy_sync_proxy_rules_last_timestamp",
            "When the last sync ended",
            Some(&Unit::Seconds),
            timestamp(last_sync),
        )?;
        to.gauge(
            "kubeproxy_sync_proxy_rules_last_queued_timestamp",
            "When a sync was last asked for",
            Some(&Unit::Seconds),
            timestamp(last_queued),
        )?;
        for (object, changes) in [("service", service_changes), ("endpoint", endpoint_changes)] {
            to.counter(
                &format!("kubeproxy_sync_proxy_rules_{object}_changes"),
                &format!("Changes of {object}s seen"),
                changes.total,
            )?;
            to.gauge(
                &format!("kubeproxy_sync_proxy_rules_{object}_changes_pending"),
                &format!("Changes of {object}s seen and not in force yet"),
                None,
                changes.pending as f64,
            )?;
        }
        Ok(())
    }

    fn encode_state(&self, to: &mut Encoder<'_>) -> fmt::Result {
        let status = &*self.status;
        let whole = |n: usize| n as f64;
        to.gauges(
            "proxy_agent_mode",
            "1 for the mode that the agent runs in",
            Mode::ALL.map(|mode| ([("mode", mode.name())], f64::from(u8::from(mode.name() == status.mode)))),
        )?;
        to.gauges(
            "proxy_agent_mode_info",
            "The mode that the agent runs in, and why that one",
            [([("mode", status.mode), ("reason", &*status.mode_reason)], 1.0)],
        )?;
        let state = |one: &crate::dataplane::Retiring| {
            let state = if one.retired { "retired" } else { "in_force" };
            ([("mode", one.mode), ("state", state)], 1.0)
        };
        to.gauges(
            "proxy_agent_retiring",
            "1 for each other mode that an agent left something of: in_force, or retired, taking no new flows",
            status.retiring.iter().map(state),
        )?;
        // Not counted is not none.
        let flows = |one: &crate::dataplane::Retiring| Some(([("mode", one.mode)], one.flows? as f64));
        to.gauges(
            "proxy_agent_retiring_flows",
            "Open flows that go by what another mode left in force, which takes no new ones",
            status.retiring.iter().filter_map(flows),
        )?;
        to.counter("proxy_agent_syncs", "Syncs done", status.syncs)?;
        to.counter(
            "proxy_agent_drift_repaired",
            "Differences found in the kernel and put right",
            status.drift_repaired,
        )?;
        to.gauge(
            "proxy_agent_ready",
            "1 once the first full state is in force",
            None,
            f64::from(u8::from(status.ready)),
        )?;
        let synced = matches!(status.source, SourceState::Synced);
        to.gauge(
            "proxy_agent_source_synced",
            "1 while the source is reachable and listed",
            None,
            f64::from(u8::from(synced)),
        )?;
        to.gauge("proxy_agent_services", "Services known", None, whole(status.services))?;
        to.gauge("proxy_agent_endpoints", "Endpoints known", None, whole(status.endpoints))?;
        let FrontendCount { programmed, pending, degraded } = FrontendCount::of(status.frontends.values());
        to.gauges(
            "proxy_agent_frontends",
            "Frontends by state",
            [("programmed", programmed), ("pending", pending), ("degraded", degraded)]
                .map(|(state, count)| ([("state", state)], whole(count))),
        )?;
        to.gauge("proxy_agent_problem_objects", "Objects not wholly understood", None, whole(status.problems.len()))?;
        to.gauges(
            "proxy_agent_health_check_ports",
            "Health-check node ports of Services, for each address",
            self.check_ports.map(|(state, count)| ([("state", state)], whole(count))),
        )?;
        let failed = status.failed_devices.len();
        to.gauge("proxy_agent_failed_devices", "Devices that could not be attached to", None, whole(failed))
    }
}

/// `own`: the fill of the agent's own maps, which it knows without counting.
fn encode_kernel(readings: &Readings, own: &[Fill], to: &mut Encoder<'_>) -> fmt::Result {
    let Readings { events, fill, ended, restore_failures } = readings;
    let counted = fill.iter().map(|fill| own.iter().find(|own| own.map == fill.map).unwrap_or(fill));
    // Without pins there are none but its own.
    let others = own.iter().filter(|own| !fill.iter().any(|fill| fill.map == own.map));
    let fill: Vec<&Fill> = counted.chain(others).collect();
    to.gauges(
        "proxy_agent_bpf_map_entries",
        "Entries in a map of the datapath, counted at most once a minute; the agent's own maps as of the last sync",
        fill.iter().map(|fill| ([("map", fill.map.as_str())], fill.entries as f64)),
    )?;
    to.gauges(
        "proxy_agent_bpf_map_capacity",
        "Entries that a map of the datapath can hold",
        fill.iter().map(|fill| ([("map", fill.map.as_str())], fill.capacity as f64)),
    )?;
    to.counters(
        "proxy_agent_datapath_events",
        "What the datapath dropped, refused, repaired or left alone",
        events.iter().map(|event| {
            ([("reason", event.reason), ("drop", if event.drop { "true" } else { "false" })], event.count)
        }),
    )?;
    if let Some(failures) = restore_failures {
        to.counter(
            "kubeproxy_sync_proxy_rules_iptables_restore_failures",
            "Times that iptables-restore failed, since the agent started",
            *failures,
        )?;
    }
    to.counters(
        "proxy_agent_ended",
        "Flows and sockets ended because their backend is gone, and masquerades because their address is, since the agent started; over: pairs of entries of flows that were over, taken out to make room",
        ended.iter().map(|(object, count)| ([("object", *object)], *count)),
    )
}

/// Constant metrics, one call each.
struct Encoder<'a>(DescriptorEncoder<'a>);

impl Encoder<'_> {
    fn counter(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        let to = self.0.encode_descriptor(name, help, None, MetricType::Counter)?;
        ConstCounter::new(value).encode(to)
    }

    fn gauge(&mut self, name: &str, help: &str, unit: Option<&Unit>, value: f64) -> fmt::Result {
        let to = self.0.encode_descriptor(name, help, unit, MetricType::Gauge)?;
        ConstGauge::new(value).encode(to)
    }

    fn counters<L: EncodeLabelSet>(
        &mut self,
        name: &str,
        help: &str,
        values: impl IntoIterator<Item = (L, u64)>,
    ) -> fmt::Result {
        let mut to = self.0.encode_descriptor(name, help, None, MetricType::Counter)?;
        values.into_iter().try_for_each(|(labels, value)| ConstCounter::new(value).encode(to.encode_family(&labels)?))
    }

    fn gauges<L: EncodeLabelSet>(
        &mut self,
        name: &str,
        help: &str,
        values: impl IntoIterator<Item = (L, f64)>,
    ) -> fmt::Result {
        let mut to = self.0.encode_descriptor(name, help, None, MetricType::Gauge)?;
        values.into_iter().try_for_each(|(labels, value)| ConstGauge::new(value).encode(to.encode_family(&labels)?))
    }

    fn histogram(&mut self, name: &str, help: &str, values: &Histogram) -> fmt::Result {
        let mut to = self.0.encode_descriptor(name, help, Some(&Unit::Seconds), MetricType::Histogram)?;
        let buckets: Vec<_> = values.buckets().collect();
        to.encode_histogram::<NoLabelSet>(values.sum(), values.count(), &buckets, None)
    }
}

#[cfg(test)]
mod tests {
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
            restore_failures: Some(2),
        }
    }

    #[test]
    fn metrics_text() {
        let metrics = Metrics::new(Arc::new(|| Ok(readings())));
        metrics.count_healthz(StatusCode::OK);
        metrics.count_healthz(StatusCode::SERVICE_UNAVAILABLE);
        metrics.count_livez(StatusCode::OK);
        let text = metrics.encode(&Arc::new(busy()), &check_ports()).unwrap();
        // Label sets of a family come in no fixed order.
        let (mut healthz, rest): (Vec<_>, Vec<_>) = text.lines().partition(|l| l.contains("healthz_total{"));
        healthz.sort_unstable();
        insta::assert_snapshot!("metrics", [healthz, rest].concat().join("\n"));
    }

    #[test]
    fn every_sample_has_a_described_family_and_a_number() {
        let text = Metrics::new(Arc::new(|| Ok(readings()))).encode(&Arc::new(busy()), &CheckPorts::new()).unwrap();
        let families: Vec<&str> = text.lines().filter_map(|l| l.strip_prefix("# TYPE ")?.split(' ').next()).collect();
        assert!(families.len() > 15, "{families:?}");
        let mut unique = families.clone();
        unique.sort_unstable();
        unique.dedup();
        assert_eq!(unique.len(), families.len(), "a family is described twice");
        for line in text.lines().filter(|l| !l.starts_with('#')) {
            let (name, value) = line.rsplit_once(' ').unwrap();
            assert!(value.parse::<f64>().is_ok(), "{line}");
            assert!(families.iter().any(|family| name.starts_with(family)), "{line}");
        }
        assert!(text.ends_with("# EOF\n"));
    }

    #[test]
    fn an_unreadable_kernel_takes_only_its_own_metrics_away() {
        let text =
            Metrics::new(Arc::new(|| Err("no pins".into()))).encode(&Arc::new(busy()), &CheckPorts::new()).unwrap();
        assert!(text.contains("proxy_agent_syncs_total 9"));
        assert!(!text.contains("proxy_agent_bpf_map"));
    }
}
