//! The status table: what the loop last did, per frontend; published whole, read by HTTP, metrics and the CLI.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::{Arc, LazyLock},
    time::{Duration, Instant, SystemTime},
};

use serde::Serialize;

pub mod report;
pub mod requests;

pub use crate::model::SourceState;
use crate::{
    dataplane::{Ahead, Failure, Fill, Hook, Retiring},
    desired::{Algorithm, Device, Frontend, FrontendSpec, HealthChecks, HealthDoors},
    model::{Family, NodeFacts, ServiceKey},
};

#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(tag = "state", content = "reason")]
pub enum FrontendState {
    Pending,
    Programmed,
    /// Not in force, and why.
    Degraded(Failure),
}

#[derive(Clone, Debug)]
pub struct FrontendStatus {
    pub spec: Arc<FrontendSpec>,
    pub state: FrontendState,
    pub since: SystemTime,
    /// What it does not get of what its Service asks for, where it is in force.
    pub limits: Option<String>,
    /// How a backend is chosen for it.
    pub algorithm: Algorithm,
}

/// What a Service lacks.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Unserved {
    pub uid: Arc<str>,
    /// How many are not in force.
    pub frontends: usize,
    /// Of the first of them.
    pub reason: String,
}

/// One value for everything that reports; cheap to clone (shared parts).
#[derive(Clone, Debug)]
pub struct Status {
    pub mode: &'static str,
    /// Why it runs in this mode.
    pub mode_reason: Arc<str>,
    pub node: Arc<str>,
    pub started: SystemTime,
    pub source: SourceState,
    /// The first full state is in force.
    pub ready: bool,
    /// The own Node is neither being deleted nor marked for removal by the cluster autoscaler (contract A117).
    pub node_eligible: bool,
    /// What the source knows of the own Node; `None` before it said anything.
    pub node_facts: Option<Arc<NodeFacts>>,
    pub last_sync: Option<SystemTime>,
    pub last_queued: Option<SystemTime>,
    /// Since when the oldest change that is not in force yet, or else the call into the dataplane that is under way, has been
    /// waiting; published before every such call, so that health notices one that never returns. Monotonic: a clock that
    /// jumps makes nobody unhealthy.
    pub pending_since: Option<Instant>,
    pub service_changes: ChangeCount,
    pub endpoint_changes: ChangeCount,
    pub timings: Arc<Timings>,
    pub syncs: u64,
    pub services: usize,
    pub endpoints: usize,
    pub frontends: Arc<BTreeMap<Frontend, FrontendStatus>>,
    /// What [`Status::degraded_of`] says of them: load balancers ask often, at every such port.
    pub degraded: Arc<BTreeSet<(ServiceKey, Family)>>,
    /// What [`Status::unserved_of`] says of them.
    pub unserved: Arc<BTreeMap<ServiceKey, Unserved>>,
    pub failed_guards: Arc<BTreeMap<IpAddr, Failure>>,
    /// What load balancers are told at health-check node ports.
    pub health_checks: Arc<HealthChecks>,
    /// Another value only if other ports are asked for: what is counted behind them changes much more often.
    pub health_doors: Arc<HealthDoors>,
    /// Objects that were read but not wholly understood, and what the source itself reports (`Event::Problems`): object or
    /// place → what was left out.
    pub problems: Arc<BTreeMap<String, Vec<String>>>,
    pub devices: Arc<BTreeMap<u32, Device>>,
    pub failed_devices: Arc<BTreeMap<String, Failure>>,
    /// Device → why it is served without the XDP that was asked for.
    pub without_xdp: Arc<BTreeMap<String, Failure>>,
    pub hooks: Arc<Vec<Hook>>,
    /// Hooks that were in force, were taken off by somebody, and could not be put back: the node does not serve as it should.
    pub lost_hooks: Arc<Vec<Hook>>,
    /// How often hooks were found to have been taken off, since the start.
    pub hooks_lost: u64,
    /// Where others' programs run before ours.
    pub ahead: Arc<Vec<Ahead>>,
    /// Since when nothing is in force of all that should be. Monotonic, as above.
    pub nothing_since: Option<Instant>,
    /// What other modes left in force and is on its way out.
    pub retiring: Arc<Vec<Retiring>>,
    pub fill: Arc<Vec<Fill>>,
    pub drift_repaired: u64,
}

impl Status {
    /// Whether a frontend of the Service, in this family, is not in force as planned.
    pub fn has_degraded(&self, service: &ServiceKey, family: Family) -> bool {
        self.degraded.contains(&(service.clone(), family))
    }

    /// Of which Services frontends are not in force as planned, in which family. One that is held serves as before; what this dataplane
    /// cannot serve no node's can, and to say so of all would take the Service's other ports away.
    pub fn degraded_of(frontends: &BTreeMap<Frontend, FrontendStatus>) -> BTreeSet<(ServiceKey, Family)> {
        let degraded = frontends.iter().filter(|(_, status)| match &status.state {
            FrontendState::Degraded(Failure::Retry(_)) => true,
            FrontendState::Degraded(Failure::Held(_) | Failure::Unsupported(_))
            | FrontendState::Pending
            | FrontendState::Programmed => false,
        });
        degraded.map(|(frontend, row)| (row.spec.service.service.clone(), Family::of(frontend.addr))).collect()
    }

    /// Whether there are frontends that should be in force and may yet be, and none is.
    pub fn serves_nothing(frontends: &BTreeMap<Frontend, FrontendStatus>) -> bool {
        let mut waits = false;
        for row in frontends.values() {
            match &row.state {
                FrontendState::Programmed | FrontendState::Degraded(Failure::Held(_)) => return false,
                FrontendState::Degraded(Failure::Retry(_)) => waits = true,
                FrontendState::Degraded(Failure::Unsupported(_)) | FrontendState::Pending => {}
            }
        }
        waits
    }

    /// Services with frontends that are not in force as they should be and may yet be, and what their owners need to know of it. What no
    /// node with this dataplane serves is for the status alone to say. `uid_of`: of a Service that is there.
    pub fn unserved_of(
        frontends: &BTreeMap<Frontend, FrontendStatus>,
        uid_of: impl Fn(&ServiceKey) -> Option<Arc<str>>,
    ) -> BTreeMap<ServiceKey, Unserved> {
        let mut unserved: BTreeMap<ServiceKey, Unserved> = BTreeMap::new();
        for row in frontends.values() {
            let FrontendState::Degraded(Failure::Retry(reason)) = &row.state else { continue };
            let key = &row.spec.service.service;
            if let Some(known) = unserved.get_mut(key) {
                known.frontends += 1;
            } else if let Some(uid) = uid_of(key) {
                unserved.insert(key.clone(), Unserved { uid, frontends: 1, reason: reason.clone() });
            }
        }
        unserved
    }

    /// Nothing known, nothing done.
    pub fn starting(mode: &'static str, node: Arc<str>) -> Self {
        Self {
            mode,
            mode_reason: "".into(),
            node,
            started: SystemTime::now(),
            source: SourceState::Listing { missing: Vec::new() },
            ready: false,
            node_eligible: true,
            node_facts: None,
            last_sync: None,
            last_queued: None,
            pending_since: None,
            service_changes: ChangeCount::default(),
            endpoint_changes: ChangeCount::default(),
            timings: Arc::default(),
            syncs: 0,
            services: 0,
            endpoints: 0,
            frontends: Arc::default(),
            degraded: Arc::default(),
            unserved: Arc::default(),
            failed_guards: Arc::default(),
            health_checks: Arc::default(),
            health_doors: Arc::default(),
            problems: Arc::default(),
            devices: Arc::default(),
            failed_devices: Arc::default(),
            without_xdp: Arc::default(),
            hooks: Arc::default(),
            lost_hooks: Arc::default(),
            hooks_lost: 0,
            ahead: Arc::default(),
            nothing_since: None,
            retiring: Arc::default(),
            fill: Arc::default(),
            drift_repaired: 0,
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub struct ChangeCount {
    /// Changes seen since the start.
    pub total: u64,
    /// Seen, and not in force yet.
    pub pending: u64,
}

/// How long things took.
#[derive(Clone, PartialEq, Debug)]
pub struct Timings {
    /// From the start of a sync to its end.
    pub sync: Histogram,
    /// Of everything there is: the first, and what puts right what somebody altered.
    pub full: Histogram,
    /// Of what changed alone.
    pub partial: Histogram,
    /// From the change of an endpoint (its slice's trigger time, contract A28) to the end of the sync that put it in force.
    pub programming: BTreeMap<Family, Histogram>,
}

impl Default for Timings {
    fn default() -> Self {
        let [sync, full, partial] = [&SYNC_BOUNDS; 3].map(|bounds| Histogram::new(bounds));
        let programming = Family::BOTH.map(|family| (family, Histogram::new(&PROGRAMMING_BOUNDS))).into();
        Self { sync, full, partial, programming }
    }
}

/// 1 ms · 2ⁿ, as kube-proxy.
pub static SYNC_BOUNDS: [f64; 15] =
    [0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1.024, 2.048, 4.096, 8.192, 16.384];

/// kube-proxy's eighty (every second up to a minute, every five up to two, every thirty up to five), and finer ones below them: that is
/// where most of this happens.
pub static PROGRAMMING_BOUNDS: LazyLock<Vec<f64>> = LazyLock::new(|| {
    let linear = |start: f64, width: f64, count: u32| (0..count).map(move |n| start + width * f64::from(n));
    let kube_proxy = linear(0.25, 0.25, 2).chain(linear(1.0, 1.0, 59)).chain(linear(60.0, 5.0, 12));
    [0.005, 0.01, 0.05, 0.1].into_iter().chain(kube_proxy).chain(linear(120.0, 30.0, 7)).collect()
});

/// A histogram as a plain value, so that the status stays one value. Counts are per bucket, not cumulative.
#[derive(Clone, PartialEq, Debug)]
pub struct Histogram {
    bounds: &'static [f64],
    counts: Vec<u64>,
    /// Beyond the last bound.
    above: u64,
    sum: f64,
}

impl Histogram {
    pub fn new(bounds: &'static [f64]) -> Self {
        Self { bounds, counts: vec![0; bounds.len()], above: 0, sum: 0.0 }
    }

    pub fn observe(&mut self, took: Duration) {
        let seconds = took.as_secs_f64();
        let bucket = self.bounds.iter().zip(&mut self.counts).find(|(bound, _)| seconds <= **bound);
        match bucket {
            Some((_, count)) => *count += 1,
            None => self.above += 1,
        }
        self.sum += seconds;
    }

    /// Upper bound and count of each bucket; the last bound is infinite.
    pub fn buckets(&self) -> impl Iterator<Item = (f64, u64)> {
        self.bounds.iter().copied().zip(self.counts.iter().copied()).chain([(f64::INFINITY, self.above)])
    }

    pub fn sum(&self) -> f64 {
        self.sum
    }

    pub fn count(&self) -> u64 {
        self.counts.iter().sum::<u64>() + self.above
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_kube_proxys_and_finer_ones() {
        let bounds = &PROGRAMMING_BOUNDS;
        assert!(bounds.is_sorted() && bounds.len() == 84, "{bounds:?}");
        assert_eq!(bounds[4..8], [0.25, 0.5, 1.0, 2.0]);
        assert_eq!(bounds[64..67], [59.0, 60.0, 65.0]);
        assert_eq!(bounds[76..], [115.0, 120.0, 150.0, 180.0, 210.0, 240.0, 270.0, 300.0][..]);
        assert!(SYNC_BOUNDS.iter().zip(0..).all(|(bound, n)| *bound == 0.001 * f64::from(1 << n)));
    }

    #[test]
    fn a_histogram_counts_what_it_sees() {
        let mut histogram = Histogram::new(&SYNC_BOUNDS);
        for ms in [1, 3, 3, 20_000] {
            histogram.observe(Duration::from_millis(ms));
        }
        assert_eq!(histogram.count(), 4);
        assert!((histogram.sum() - 20.007).abs() < 1e-9);
        let filled: Vec<_> = histogram.buckets().filter(|(_, count)| *count > 0).collect();
        assert_eq!(filled, [(0.001, 1), (0.004, 2), (f64::INFINITY, 1)]);
    }
}
