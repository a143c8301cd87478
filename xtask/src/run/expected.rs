//! What the objects promise, by the product's own reading and plan of them (`proxy-agent print-plan`): whatever it takes for a Service is
//! asked, and nothing else. What is judged here is whether that is what happens; whether the plan is right is for the unit and
//! conformance suites to say.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    path::Path,
};

use anyhow::{Context as _, Result};
use ipnet::IpNet;
use serde::Deserialize;

use crate::command;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Plan {
    pub frontends: Vec<Frontend>,
    /// What is wrong with the objects, by object or file.
    pub problems: BTreeMap<String, Vec<String>>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Frontend {
    /// `namespace/name:port`
    pub service: String,
    pub kind: String,
    pub address: IpAddr,
    pub port: u16,
    /// `TCP`, `UDP` or `SCTP`.
    pub protocol: String,
    /// `address:port` of each backend.
    pub all: Vec<SocketAddr>,
    pub local: Vec<SocketAddr>,
    pub verdicts: Verdicts,
    pub algorithm: String,
    pub affinity_secs: Option<u32>,
    pub source_ranges: Option<Vec<IpNet>>,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Verdicts {
    pub pod: Verdict,
    pub node: Verdict,
    pub external: Verdict,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Verdict {
    /// `pick-all`, `pick-local`, `drop`, `reject` or `pass`.
    pub action: String,
}

/// What an agent with these options would put in force on `node`, which has `addresses`.
pub fn plan(agent: &Path, source: &Path, node: &str, addresses: &[IpAddr], options: &[String]) -> Result<Plan> {
    let addresses = addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    let mut planning = command::command(agent);
    planning
        .args(["print-plan", "--hostname-override", node, "--addresses", &addresses, "--source"])
        .arg(source)
        .args(options);
    // The machine's own cluster means nothing inside.
    planning.env_remove("KUBECONFIG");
    let mut plan: Plan =
        serde_json::from_str(&command::output(&mut planning)?).context("read what `proxy-agent print-plan` says")?;
    plan.frontends.sort_by(|a, b| a.service.cmp(&b.service));
    Ok(plan)
}

impl Frontend {
    /// Whether who comes from there is dropped for that alone.
    pub fn shuts_out(&self, from: IpAddr) -> bool {
        self.source_ranges.as_ref().is_some_and(|ranges| !ranges.iter().any(|range| range.contains(&from)))
    }
}
