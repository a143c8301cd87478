//! kube-proxy's metrics: its names, types, labels and buckets, so that existing dashboards and alerts go on working. What is here and what
//! is left out, and why, is listed in docs/observability.md; a test holds the two together.
//!
//! One sync programs both families, where kube-proxy has one proxy for each: what is the same for both is said of each.

use std::{collections::BTreeSet, time::SystemTime};

use axum::http::StatusCode;

use super::{exposition::Exposition, metrics::Readings};
use crate::{
    desired::{Action, FrontendKind},
    model::Family,
    status::{Status, requests::Counts},
};

const fn label(family: Family) -> [(&'static str, &'static str); 1] {
    [("ip_family", family_name(family))]
}

const fn family_name(family: Family) -> &'static str {
    match family {
        Family::V4 => "IPv4",
        Family::V6 => "IPv6",
    }
}

/// The same of both families.
fn of_both<T: Copy>(value: T) -> [([(&'static str, &'static str); 1], T); 2] {
    Family::BOTH.map(|family| (label(family), value))
}

pub(super) fn write_sync(to: &mut Exposition, status: &Status) {
    let Status { timings, last_sync, last_queued, service_changes, endpoint_changes, .. } = status;
    to.histograms(
        "kubeproxy_sync_proxy_rules_duration_seconds",
        "SyncProxyRules latency in seconds",
        of_both(&timings.sync),
    );
    to.histograms(
        "kubeproxy_sync_full_proxy_rules_duration_seconds",
        "SyncProxyRules latency in seconds for full resyncs",
        of_both(&timings.full),
    );
    to.histograms(
        "kubeproxy_sync_partial_proxy_rules_duration_seconds",
        "SyncProxyRules latency in seconds for partial resyncs",
        of_both(&timings.partial),
    );
    to.histograms(
        "kubeproxy_network_programming_duration_seconds",
        "In Cluster Network Programming Latency in seconds",
        timings.programming.iter().map(|(family, values)| (label(*family), values)),
    );
    let timestamp = |time: &Option<SystemTime>| {
        time.and_then(|time| time.duration_since(SystemTime::UNIX_EPOCH).ok()).map_or(0.0, |d| d.as_secs_f64())
    };
    to.gauges(
        "kubeproxy_sync_proxy_rules_last_timestamp_seconds",
        "The last time proxy rules were successfully synced",
        of_both(timestamp(last_sync)),
    );
    to.gauges(
        "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds",
        "The last time a sync of proxy rules was queued",
        of_both(timestamp(last_queued)),
    );
    for (object, title, changes) in
        [("service", "Service", service_changes), ("endpoint", "Endpoint", endpoint_changes)]
    {
        to.counter(
            &format!("kubeproxy_sync_proxy_rules_{object}_changes_total"),
            &format!("Cumulative proxy rules {title} changes"),
            changes.total,
        );
        to.gauge(
            &format!("kubeproxy_sync_proxy_rules_{object}_changes_pending"),
            &format!("Pending proxy rules {title} changes"),
            changes.pending,
        );
    }
    let samples = no_local_endpoints(status);
    to.gauges(
        "kubeproxy_sync_proxy_rules_no_local_endpoints_total",
        "Number of services with a Local traffic policy and no endpoints",
        samples
            .map(|(policy, family, count)| ([("traffic_policy", policy), ("ip_family", family_name(family))], count)),
    );
}

/// Ports of Services whose policy is Local and that have endpoints, but none here; not those that have none at all (contract A151).
fn no_local_endpoints(status: &Status) -> [(&'static str, Family, usize); 4] {
    let mut without = BTreeSet::new();
    for (frontend, row) in &*status.frontends {
        let verdicts = &row.spec.verdicts;
        // Nothing else is dropped whoever sends it: source ranges are no verdict of what is outside.
        let (policy, verdict) = match row.spec.kind {
            FrontendKind::ClusterIp => ("internal", verdicts.pod),
            FrontendKind::NodePort | FrontendKind::ExternalIp | FrontendKind::LoadBalancer => {
                ("external", verdicts.external)
            }
        };
        if verdict.action == Action::Drop {
            without.insert((policy, Family::of(frontend.addr), &row.spec.service));
        }
    }
    let kinds =
        [("internal", Family::V4), ("internal", Family::V6), ("external", Family::V4), ("external", Family::V6)];
    kinds.map(|(policy, family)| {
        (policy, family, without.iter().filter(|(p, f, _)| (*p, *f) == (policy, family)).count())
    })
}

/// What only some modes have.
pub(super) fn write_mode(to: &mut Exposition, readings: &Readings) {
    let failures = readings.restore_failures.iter().flatten();
    to.counters(
        "kubeproxy_sync_proxy_rules_iptables_restore_failures_total",
        "Cumulative proxy iptables restore failures",
        failures.map(|(family, count)| (label(*family), *count)),
    );
}

/// How often health checks were answered with what.
pub(super) fn write_health(to: &mut Exposition, check: &str, answers: &super::metrics::Answers) {
    let answers = answers.counts();
    let codes: Vec<(String, u64)> = answers.iter().map(|(code, count)| (code.to_string(), *count)).collect();
    to.counters(
        &format!("kubeproxy_proxy_{check}_total"),
        &format!("Cumulative proxy {check} HTTP status"),
        codes.iter().map(|(code, count)| ([("code", code.as_str())], *count)),
    );
}

/// What the API server was asked.
pub(super) fn write_requests(to: &mut Exposition, counts: &Counts) {
    let Counts { results, durations } = counts;
    to.counters(
        "rest_client_requests_total",
        "Number of HTTP requests, partitioned by status code, method, and host.",
        results.iter().map(|((code, method, host), count)| {
            ([("code", code.as_str()), ("host", host), ("method", method)], *count)
        }),
    );
    to.histograms(
        "rest_client_request_duration_seconds",
        "Request latency in seconds. Broken down by verb, and host.",
        durations.iter().map(|((verb, host), values)| ([("host", host.as_str()), ("verb", verb)], values)),
    );
}

/// `/metrics/slis`: the health checks as every component of Kubernetes tells of its own.
pub(super) fn write_slis(to: &mut Exposition, checks: [(&'static str, &super::metrics::Answers); 2]) {
    let name = ("name", "proxy");
    let last = checks.iter().filter_map(|(check, answers)| Some((*check, answers.last()?)));
    to.gauges(
        "kubernetes_healthcheck",
        "[STABLE] This metric records the result of a single healthcheck.",
        last.map(|(check, code)| ([name, ("type", check)], u8::from(code == StatusCode::OK.as_u16()))),
    );
    let mut all = Vec::new();
    for (check, answers) in checks {
        let (good, bad): (Vec<_>, Vec<_>) =
            answers.counts().into_iter().partition(|(code, _)| *code == StatusCode::OK.as_u16());
        for (status, answers) in [("success", good), ("error", bad)] {
            let count: u64 = answers.iter().map(|(_, count)| count).sum();
            if count > 0 {
                all.push(([name, ("status", status), ("type", check)], count));
            }
        }
    }
    to.counters("kubernetes_healthchecks_total", "[STABLE] This metric records the results of all healthcheck.", all);
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, fs, path::Path, sync::Arc};

    use super::*;
    use crate::{
        desired::{FrontendSpec, Verdict, Verdicts},
        serve::metrics::{Metrics, tests::everything},
        status::{FrontendState, report::tests::frontend},
    };

    /// Name → (type, label names) of what is exported.
    fn families(text: &str) -> BTreeMap<String, (String, BTreeSet<String>)> {
        let mut families = BTreeMap::new();
        let mut family = String::new();
        for line in text.lines() {
            if let Some(described) = line.strip_prefix("# TYPE ") {
                let (name, kind) = described.split_once(' ').unwrap();
                family = name.to_owned();
                families.insert(family.clone(), (kind.to_owned(), BTreeSet::new()));
            } else if let Some((_, labels)) = line.split_once('{').filter(|_| !line.starts_with('#')) {
                let names = labels.split("=\"").filter_map(|part| part.rsplit([',', '"']).next());
                let names = names.filter(|name| *name != "le" && !name.contains('}')).map(str::to_owned);
                families.get_mut(&family).unwrap().1.extend(names);
            }
        }
        families
    }

    /// The table of docs/observability.md: name → (type, labels, exported).
    fn listed() -> BTreeMap<String, (String, BTreeSet<String>, bool)> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/observability.md");
        let text = fs::read_to_string(path).unwrap();
        let (_, table) = text.split_once("| kube-proxy's metric |").unwrap();
        let rows = table.lines().skip(2).take_while(|line| line.starts_with('|'));
        let row = |line: &str| {
            let cells: Vec<&str> = line.split('|').map(|cell| cell.trim().trim_matches('`')).collect();
            let labels =
                cells[3].split(", ").filter(|label| !label.is_empty()).map(|label| label.trim_matches('`').to_owned());
            assert!(cells[4] == "yes" || cells[4].starts_with("no: "), "{line}");
            (cells[1].to_owned(), (cells[2].to_owned(), labels.collect(), cells[4] == "yes"))
        };
        rows.map(row).collect()
    }

    #[test]
    fn what_is_listed_is_what_is_exported_a150() {
        let (metrics, status, ports) = everything();
        let exported = families(&metrics.encode(&status, &ports));
        let listed = listed();
        assert!(listed.len() > 40, "{listed:?}");
        for (name, (kind, labels, here)) in &listed {
            let found = exported.get(name);
            assert_eq!(found.is_some(), *here, "{name}");
            if let Some((is, has)) = found {
                assert_eq!((is, has), (kind, labels), "{name}");
            }
        }
        let is_upstreams = |name: &&String| !name.starts_with("proxy_agent_");
        let unlisted: Vec<_> =
            exported.keys().filter(is_upstreams).filter(|name| !listed.contains_key(*name)).collect();
        assert_eq!(unlisted, Vec::<&String>::new());
    }

    /// kubernetes-mixin's dashboard and alerts for the proxy, as to the names they ask for.
    #[test]
    fn dashboards_find_what_they_ask_for_a150() {
        let (metrics, status, ports) = everything();
        let text = metrics.encode(&status, &ports);
        for sample in [
            "kubeproxy_sync_proxy_rules_duration_seconds_count{",
            "kubeproxy_sync_proxy_rules_duration_seconds_bucket{",
            "kubeproxy_network_programming_duration_seconds_count{",
            "kubeproxy_network_programming_duration_seconds_bucket{",
            "rest_client_requests_total{code=\"200\"",
            "rest_client_request_duration_seconds_bucket{",
            "process_resident_memory_bytes ",
            "process_cpu_seconds_total ",
            "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds{",
            "kubeproxy_sync_proxy_rules_last_timestamp_seconds{",
        ] {
            assert!(text.lines().any(|line| line.starts_with(sample)), "{sample}");
        }
    }

    #[test]
    fn services_without_local_endpoints_are_counted_by_policy_a151() {
        let act = |action| Verdict { action, masquerade: false };
        let all = |action| Verdicts { pod: act(action), node: act(action), external: act(action) };
        let with = |addr, name, kind, verdicts| {
            let (frontend, mut row) = frontend(addr, name, FrontendState::Programmed);
            row.spec = FrontendSpec { kind, verdicts, ..FrontendSpec::clone(&row.spec) }.into();
            (frontend, row)
        };
        let (drop, pick, reject) = (all(Action::Drop), all(Action::PickAll), all(Action::Reject));
        let outside = Verdicts { external: act(Action::Drop), ..pick };
        // The node itself is in no source range.
        let ranged = Verdicts { node: act(Action::Drop), ..pick };
        let frontends = [
            with("10.96.0.1", "a", FrontendKind::ClusterIp, drop),
            with("10.96.0.2", "b", FrontendKind::ClusterIp, pick),
            // Two frontends of one port.
            with("192.0.2.1", "b", FrontendKind::NodePort, outside),
            with("192.0.2.2", "b", FrontendKind::LoadBalancer, outside),
            with("fd00::2", "b", FrontendKind::LoadBalancer, outside),
            with("192.0.2.3", "c", FrontendKind::LoadBalancer, ranged),
            // Nobody has endpoints.
            with("10.96.0.4", "d", FrontendKind::ClusterIp, reject),
            with("192.0.2.4", "d", FrontendKind::LoadBalancer, reject),
        ];
        let status = Status { frontends: Arc::new(frontends.into()), ..Status::starting("ebpf", "n1".into()) };
        let expected = [
            ("internal", Family::V4, 1),
            ("internal", Family::V6, 0),
            ("external", Family::V4, 1),
            ("external", Family::V6, 1),
        ];
        assert_eq!(no_local_endpoints(&status), expected);
    }

    #[test]
    fn health_checks_are_service_level_indicators() {
        let metrics = Metrics::new(Arc::new(|| Ok(Readings::default())), Arc::default(), Arc::default());
        assert!(!metrics.encode_slis().contains("kubernetes_healthcheck{"));
        for code in [StatusCode::OK, StatusCode::OK, StatusCode::SERVICE_UNAVAILABLE] {
            metrics.healthz.count(code);
        }
        let text = metrics.encode_slis();
        for line in [
            "kubernetes_healthcheck{name=\"proxy\",type=\"healthz\"} 0",
            "kubernetes_healthchecks_total{name=\"proxy\",status=\"success\",type=\"healthz\"} 2",
            "kubernetes_healthchecks_total{name=\"proxy\",status=\"error\",type=\"healthz\"} 1",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in {text}");
        }
        assert!(text.contains("process_start_time_seconds "));
    }
}
