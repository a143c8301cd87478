//! Healthy or not: a pure function of the status and the clock (contract A117–A119).
//!
//! | | `/livez` (restart me?) | `/healthz` (send me traffic?) |
//! |---|---|---|
//! | waiting for the first lists | 200 | 503 |
//! | first full state in force | 200 | 200 |
//! | a change, or a call into the kernel, waits for more than two sync periods | 503 | 503 |
//! | the Node is leaving | 200 | 503 |
//! | the source cannot be reached | 200 | 200: the last state goes on serving (contract A136) |

use std::time::{Duration, Instant, SystemTime};

use serde::Serialize;

use crate::status::{SourceState, Status, report::rfc3339};

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Health {
    now: SystemTime,
    last_sync: Option<SystemTime>,
    node_eligible: bool,
    /// Nothing waits longer than it may.
    in_step: bool,
    ready: bool,
    reason: Option<String>,
}

/// kube-proxy's body, and `reason`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Body {
    /// Now, while healthy; else the end of the last sync, empty if there was none.
    last_updated: String,
    current_time: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    node_eligible: Option<bool>,
    healthy: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    status: Families,
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
    let waited = status.pending_since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
    let in_step = waited <= limit;
    let reason = if !in_step {
        Some(format!(
            "a change, or a call into the kernel, has been waiting for {} s (limit {} s)",
            waited.as_secs(),
            limit.as_secs()
        ))
    } else if !status.ready {
        Some(match &status.source {
            SourceState::Listing { missing } if !missing.is_empty() => {
                format!("waiting for the first complete list of {}", missing.join(", "))
            }
            _ => "the first full state is not in force yet".to_owned(),
        })
    } else if !status.node_eligible {
        Some("the Node is being deleted or removed by the cluster autoscaler".to_owned())
    } else {
        None
    };
    Health {
        now: wall,
        last_sync: status.last_sync,
        node_eligible: status.node_eligible,
        in_step,
        ready: status.ready,
        reason,
    }
}

impl Health {
    /// Whether load balancers should send traffic here.
    pub fn healthz(&self) -> bool {
        self.in_step && self.ready && self.node_eligible
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

    fn body(&self, healthy: bool, node_eligible: Option<bool>, synced: bool) -> Body {
        let last_updated = if synced { Some(self.now) } else { self.last_sync };
        let last_updated = last_updated.map(rfc3339).unwrap_or_default();
        let family = FamilyHealth { last_updated: last_updated.clone(), healthy: synced };
        Body {
            last_updated,
            current_time: rfc3339(self.now),
            node_eligible,
            healthy,
            reason: if healthy { None } else { self.reason.clone() },
            status: Families { v4: family.clone(), v6: family },
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    const PERIOD: Duration = Duration::from_secs(30);

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn ready() -> Status {
        Status { ready: true, source: SourceState::Synced, ..Status::starting("ebpf", Arc::from("n1")) }
    }

    /// (livez, healthz, reason) `waited` after the oldest change was queued.
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
    fn a_change_may_wait_two_sync_periods() {
        assert_eq!(verdict(&ready(), None), (true, true, None));
        assert_eq!(verdict(&ready(), Some(PERIOD * 2)), (true, true, None));
        let (livez, healthz, reason) = verdict(&ready(), Some(PERIOD * 2 + Duration::from_secs(1)));
        assert_eq!((livez, healthz), (false, false));
        assert_eq!(
            reason.as_deref(),
            Some("a change, or a call into the kernel, has been waiting for 61 s (limit 60 s)")
        );
    }

    #[test]
    fn a_leaving_node_takes_no_traffic_but_lives() {
        let status = Status { node_eligible: false, ..ready() };
        let (livez, healthz, _) = verdict(&status, None);
        assert_eq!((livez, healthz), (true, false));
    }

    #[test]
    fn a_lost_source_changes_nothing() {
        let status = Status { source: SourceState::Stale { reason: "connection refused".into() }, ..ready() };
        assert_eq!(verdict(&status, None), (true, true, None));
    }

    #[test]
    fn bodies_have_the_fields_that_load_balancers_and_tests_look_for() {
        let healthy = judge(&ready(), PERIOD, Instant::now(), at(100));
        insta::assert_snapshot!("healthz_healthy", serde_json::to_string_pretty(&healthy.healthz_body()).unwrap());
        insta::assert_snapshot!("livez_healthy", serde_json::to_string_pretty(&healthy.livez_body()).unwrap());
        let starting = Status { last_sync: Some(at(7)), ..Status::starting("ebpf", Arc::from("n1")) };
        let starting = judge(&starting, PERIOD, Instant::now(), at(100));
        insta::assert_snapshot!("healthz_starting", serde_json::to_string_pretty(&starting.healthz_body()).unwrap());
    }
}
