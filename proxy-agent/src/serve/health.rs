//! Healthy or not: a pure function of the status and the clock (contract A117–A119).
//!
//! | | `/livez` (restart me?) | `/healthz` (send me traffic?) |
//! |---|---|---|
//! | waiting for the first lists | 200 | 503 |
//! | first full state in force | 200 | 200 |
//! | a change, or a call into the kernel, waits for two sync periods | 503 | 503 |
//! | for two sync periods nothing of all that should be is in force | 503 | 503 |
//! | a hook was taken off and cannot be put back | 200 | 503 |
//! | the Node is leaving, gone, or not known yet | 200 | 503 |
//! | some frontends are not in force | 200 | 200: the others serve; the Service's own health-check node port says 503 |
//! | the source cannot be reached | 200 | 200: the last state goes on serving (contract A136) |

use std::time::{Duration, Instant, SystemTime};

use serde::Serialize;

use crate::{
    dataplane::Hook,
    status::{SourceState, Status, report::rfc3339},
};

/// As kube-proxy writes that there was none.
const NEVER: &str = "0001-01-01T00:00:00Z";

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Health {
    now: SystemTime,
    last_sync: Option<SystemTime>,
    node_eligible: bool,
    /// Nothing waits longer than it may.
    in_step: bool,
    /// The first full state was put in force, and its hooks are in place.
    ready: bool,
    reason: Option<String>,
}

/// kube-proxy's body, and `reason`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Body {
    /// Now, where the answer is 200; else the end of the last sync.
    last_updated: String,
    current_time: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    node_eligible: Option<bool>,
    /// Whatever becomes of the node.
    healthy: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<Families>,
}

/// One sync programs both families, so they always agree; kube-proxy's readers look for them by these names.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
struct Families {
    #[serde(rename = "IPv4")]
    v4: FamilyHealth,
    #[serde(rename = "IPv6")]
    v6: FamilyHealth,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct FamilyHealth {
    last_updated: String,
    healthy: bool,
}

pub fn judge(status: &Status, sync_period: Duration, now: Instant, wall: SystemTime) -> Health {
    let limit = sync_period.saturating_mul(2);
    let since = |since: Option<Instant>| since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
    let (waited, nothing) = (since(status.pending_since), since(status.nothing_since));
    let in_step = waited < limit && nothing < limit;
    // A Node of which nothing is known is nobody's.
    let node_eligible = status.node_eligible && status.node_facts.is_some();
    let ready = status.ready && status.lost_hooks.is_empty();
    let reason = if waited >= limit {
        Some(format!(
            "a change, or a call into the kernel, has been waiting for {} s (limit {} s)",
            waited.as_secs(),
            limit.as_secs()
        ))
    } else if !in_step {
        Some(format!("no frontend has been in force for {} s (limit {} s)", nothing.as_secs(), limit.as_secs()))
    } else if !status.ready {
        Some(match &status.source {
            SourceState::Listing { missing } if !missing.is_empty() => {
                format!("waiting for the first complete list of {}", missing.join(", "))
            }
            _ => "the first full state is not in force yet".to_owned(),
        })
    } else if !ready {
        let lost: Vec<String> = status.lost_hooks.iter().map(Hook::name).collect();
        Some(format!("hooks were taken off and cannot be put back: {}", lost.join(", ")))
    } else if !node_eligible {
        Some("the Node is being deleted or removed by the cluster autoscaler".to_owned())
    } else {
        None
    };
    Health { now: wall, last_sync: status.last_sync, node_eligible, in_step, ready, reason }
}

impl Health {
    /// Whether load balancers should send traffic here.
    pub fn healthz(&self) -> bool {
        self.in_force() && self.node_eligible
    }

    /// Whether the agent is alive; a restart would help if it is not.
    pub fn livez(&self) -> bool {
        self.in_step
    }

    /// Whether what is planned is in force, whatever becomes of the node: kube-proxy's word at health-check node ports.
    pub fn in_force(&self) -> bool {
        self.in_step && self.ready
    }

    pub fn healthz_body(&self) -> Body {
        self.body(self.healthz(), Some(self.node_eligible), self.in_force())
    }

    pub fn livez_body(&self) -> Body {
        self.body(self.livez(), None, self.in_step)
    }

    /// `good`: the answer is 200.
    fn body(&self, good: bool, node_eligible: Option<bool>, healthy: bool) -> Body {
        let last_sync = self.last_sync.map_or_else(|| NEVER.to_owned(), rfc3339);
        let family = FamilyHealth { last_updated: last_sync.clone(), healthy };
        Body {
            last_updated: if good { rfc3339(self.now) } else { last_sync },
            current_time: rfc3339(self.now),
            node_eligible,
            healthy,
            reason: if good { None } else { self.reason.clone() },
            // As with kube-proxy, there is none before there was a sync.
            status: self.last_sync.map(|_| Families { v4: family.clone(), v6: family }),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use serde_json::{Value, json};

    use super::*;
    use crate::model::NodeFacts;

    const PERIOD: Duration = Duration::from_secs(30);

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn ready() -> Status {
        Status {
            ready: true,
            source: SourceState::Synced,
            node_facts: Some(Arc::new(NodeFacts::default())),
            last_sync: Some(at(7)),
            ..Status::starting("ebpf", Arc::from("n1"))
        }
    }

    fn seconds(seconds: u64) -> Option<Duration> {
        Some(Duration::from_secs(seconds))
    }

    /// (livez, healthz, reason) so long after the oldest change was queued.
    fn verdict(status: &Status, waited: Option<Duration>) -> (bool, bool, Option<String>) {
        let queued = Instant::now();
        let status = Status { pending_since: waited.map(|_| queued), ..status.clone() };
        let health = judge(&status, PERIOD, queued + waited.unwrap_or_default(), at(100));
        (health.livez(), health.healthz(), health.reason)
    }

    #[test]
    fn waiting_for_the_first_lists_is_alive_but_not_ready() {
        let mut status = Status::starting("ebpf", Arc::from("n1"));
        status.source = SourceState::Listing { missing: vec!["Services".into(), "EndpointSlices".into()] };
        let reason = "waiting for the first complete list of Services, EndpointSlices";
        assert_eq!(verdict(&status, None), (true, false, Some(reason.into())));
    }

    #[test]
    fn a_change_may_wait_less_than_two_sync_periods_a117() {
        let late = "a change, or a call into the kernel, has been waiting for 60 s (limit 60 s)".to_owned();
        for (waited, expected) in [
            (None, (true, true, None)),
            (seconds(0), (true, true, None)),
            (seconds(59), (true, true, None)),
            (seconds(60), (false, false, Some(late))),
        ] {
            assert_eq!(verdict(&ready(), waited), expected, "{waited:?}");
        }
    }

    #[test]
    fn a_node_that_serves_nothing_is_not_healthy_for_long() {
        let began = Instant::now();
        let status = Status { nothing_since: Some(began), ..ready() };
        let after = |seconds| {
            let health = judge(&status, PERIOD, began + Duration::from_secs(seconds), at(100));
            (health.livez(), health.healthz(), health.reason)
        };
        assert_eq!(after(59), (true, true, None));
        assert_eq!(after(61), (false, false, Some("no frontend has been in force for 61 s (limit 60 s)".into())));
    }

    #[test]
    fn a_hook_that_cannot_be_put_back_is_no_reason_to_restart() {
        let hook = Hook { kind: "tcx/ingress".into(), target: "eth0".into(), program: "tc_ingress_ether".into() };
        let status = Status { lost_hooks: Arc::new(vec![hook]), ..ready() };
        let reason = "hooks were taken off and cannot be put back: tcx/ingress eth0";
        assert_eq!(verdict(&status, None), (true, false, Some(reason.into())));
        assert!(!judge(&status, PERIOD, Instant::now(), at(100)).in_force(), "health-check node ports say so, too");
    }

    #[test]
    fn a_lost_source_changes_nothing_a136() {
        let status = Status { source: SourceState::Stale { reason: "connection refused".into() }, ..ready() };
        assert_eq!(verdict(&status, None), (true, true, None));
    }

    /// The cases of upstream's TestHealthzServer and TestLivezServer: what the Node is, and how long a change waits.
    #[test]
    fn bodies_are_kube_proxys_a117_a118_a119() {
        let (now, last) = ("1970-01-01T00:01:40.000Z", "1970-01-01T00:00:07.000Z");
        let gone = Status { node_facts: None, ..ready() };
        let leaving = Status { node_eligible: false, ..ready() };
        let never = Status { last_sync: None, ..ready() };
        let status = |healthy| {
            let family = json!({"lastUpdated": last, "healthy": healthy});
            Some(json!({"IPv4": family, "IPv6": family}))
        };
        // Status, how long a change waits; /healthz: code, lastUpdated, nodeEligible, healthy; /livez: code, lastUpdated; status of both.
        for (what, input, waited, healthz, livez, families) in [
            ("synced", ready(), None, (true, now, true, true), (true, now), status(true)),
            ("queued", ready(), seconds(25), (true, now, true, true), (true, now), status(true)),
            ("late", ready(), seconds(60), (false, last, true, false), (false, last), status(false)),
            ("tainted or deleting", leaving, None, (false, last, false, true), (true, now), status(true)),
            ("no Node", gone, None, (false, last, false, true), (true, now), status(true)),
            ("before a sync", never, None, (true, now, true, true), (true, now), None),
        ] {
            let queued = Instant::now();
            let input = Status { pending_since: waited.map(|_| queued), ..input };
            let health = judge(&input, PERIOD, queued + waited.unwrap_or_default(), at(100));
            let seen = |body: Body| {
                let Value::Object(mut body) = serde_json::to_value(body).unwrap() else { unreachable!() };
                assert_eq!(body.remove("currentTime"), Some(json!(now)), "{what}");
                body.remove("reason");
                body
            };
            let expected = |last_updated, eligible: Option<bool>, healthy| {
                let mut body = serde_json::Map::new();
                body.insert("lastUpdated".into(), json!(last_updated));
                body.insert("healthy".into(), json!(healthy));
                body.extend(eligible.map(|eligible| ("nodeEligible".to_owned(), json!(eligible))));
                body.extend(families.clone().map(|families| ("status".to_owned(), families)));
                body
            };
            let (code, last_updated, eligible, healthy) = healthz;
            assert_eq!(health.healthz(), code, "{what}");
            assert_eq!(seen(health.healthz_body()), expected(last_updated, Some(eligible), healthy), "{what}");
            let (code, last_updated) = livez;
            assert_eq!(health.livez(), code, "{what}");
            assert_eq!(seen(health.livez_body()), expected(last_updated, None, code), "{what}");
        }
    }

    #[test]
    fn bodies_have_the_fields_that_load_balancers_and_tests_look_for() {
        let healthy = judge(&ready(), PERIOD, Instant::now(), at(100));
        insta::assert_snapshot!("healthz_healthy", serde_json::to_string_pretty(&healthy.healthz_body()).unwrap());
        insta::assert_snapshot!("livez_healthy", serde_json::to_string_pretty(&healthy.livez_body()).unwrap());
        let starting = Status::starting("ebpf", Arc::from("n1"));
        let starting = judge(&starting, PERIOD, Instant::now(), at(100));
        insta::assert_snapshot!("healthz_starting", serde_json::to_string_pretty(&starting.healthz_body()).unwrap());
    }
}
