//! The status table: what the loop last did, per frontend; published whole, read by HTTP, metrics and the CLI.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc, time::SystemTime};

use serde::Serialize;

use crate::{
    dataplane::{Failure, Fill, Hook},
    desired::{Device, Frontend, FrontendSpec},
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
}

/// Where the agent gets its objects from.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum SourceState {
    /// Waiting for the first complete list of these kinds.
    Listing {
        missing: Vec<String>,
    },
    Synced,
    /// Was synced, cannot reach its source now; the last state goes on serving.
    Stale {
        reason: String,
    },
}

/// One value for everything that reports; cheap to clone (shared parts).
#[derive(Clone, Debug)]
pub struct Status {
    pub mode: &'static str,
    pub node: Arc<str>,
    pub started: SystemTime,
    pub source: SourceState,
    /// The first full state is in force.
    pub ready: bool,
    pub last_sync: Option<SystemTime>,
    pub last_queued: Option<SystemTime>,
    pub syncs: u64,
    pub services: usize,
    pub endpoints: usize,
    pub frontends: Arc<BTreeMap<Frontend, FrontendStatus>>,
    pub failed_guards: Arc<BTreeMap<IpAddr, Failure>>,
    /// Objects that were read but not wholly understood: object → what was left out.
    pub problems: Arc<BTreeMap<String, Vec<String>>>,
    pub devices: Arc<BTreeMap<u32, Device>>,
    pub failed_devices: Arc<BTreeMap<String, Failure>>,
    pub hooks: Arc<Vec<Hook>>,
    pub fill: Arc<Vec<Fill>>,
    pub drift_repaired: u64,
}
