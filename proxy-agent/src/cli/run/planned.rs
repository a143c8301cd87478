//! `print-plan`: what `run` would put in force with the same options, as JSON, and nothing done about it.
//!
//! Not for operators (it is not in the manual, and its output may change): `cargo xtask run` asks the frontends of its world and
//! has to know what objects that somebody wrote are meant to lead to.

use std::{collections::BTreeMap, io::Write, net::IpAddr, time::Duration};

use anyhow::Context;
use clap::Args as ClapArgs;
use serde::Serialize;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::{EVENTS, Exit, shapes, sync};
use crate::{
    desired::{Algorithm, Backend, Frontend, FrontendKind, FrontendSpec, Verdicts},
    model::{Event, Protocol, SourceState, index::Index},
    plan::Planner,
    source,
};

#[derive(Clone, Debug, ClapArgs)]
// Its group would have the name of that of `run`.
#[group(skip)]
pub struct Args {
    /// The node's own addresses
    #[arg(long, value_name = "ADDRESS,…", value_delimiter = ',')]
    addresses: Vec<IpAddr>,
    #[command(flatten)]
    run: super::Given,
}

/// How long a source may take for its first complete list.
const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Planned {
    frontends: Vec<Row>,
    /// By the object, or the file, that they are about.
    problems: BTreeMap<String, Vec<String>>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Row {
    service: String,
    kind: FrontendKind,
    address: IpAddr,
    port: u16,
    protocol: Protocol,
    all: Vec<String>,
    local: Vec<String>,
    verdicts: Verdicts,
    algorithm: Algorithm,
    affinity_secs: Option<u32>,
    source_ranges: Option<Vec<String>>,
}

pub fn execute(args: Args, out: &mut dyn Write) -> anyhow::Result<Exit> {
    let Args { addresses, run } = args;
    let effective = super::effective::of(&run)?;
    let asked = shapes::asked(effective.args.proxy_mode);
    let mut plan = super::plan(effective.args.clone(), effective.shown()?)?;
    // Which runs where none is asked for shows when it is started.
    asked.into_iter().for_each(|mode| plan.run_in(mode));
    let super::Plan { source, sync: sync::Options { defaults, .. }, .. } = plan;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("starting the runtime")?;
    let mut index = runtime.block_on(first_list(source))?;
    index.apply(Event::Addresses(addresses.into_iter().collect()), &mut Default::default());

    let mut planner = Planner::new(defaults);
    let state = planner.full(index.snapshot());
    let frontends = state.frontends.iter().map(|(frontend, spec)| row(frontend, spec)).collect();
    let mut problems = planner.problems();
    problems.extend(index.problems().clone());
    serde_json::to_writer_pretty(&mut *out, &Planned { frontends, problems })?;
    writeln!(out)?;
    Ok(Exit::Done)
}

/// What the source says first of all.
async fn first_list(options: source::Options) -> anyhow::Result<Index> {
    let (events, mut heard) = mpsc::channel(EVENTS);
    let (state, mut states) = watch::channel(SourceState::Listing { missing: Vec::new() });
    let cancel = CancellationToken::new();
    let mut index = Index::default();
    let listen = async {
        loop {
            tokio::select! {
                // Events first: the state turns only after the last of them was handed over.
                biased;
                event = heard.recv() => match event {
                    Some(event) => index.apply(event, &mut Default::default()),
                    None => return,
                },
                seen = states.wait_for(|state| *state == SourceState::Synced), if heard.is_empty() => {
                    drop(seen);
                    while let Ok(event) = heard.try_recv() {
                        index.apply(event, &mut Default::default());
                    }
                    return;
                }
            }
        }
    };
    tokio::select! {
        ended = source::run(options, events, state, cancel.clone()) => ended?,
        heard = tokio::time::timeout(PATIENCE, listen) => {
            heard.with_context(|| format!("no complete list of objects within {} s", PATIENCE.as_secs()))?;
        }
    }
    Ok(index)
}

fn row(frontend: &Frontend, spec: &FrontendSpec) -> Row {
    let Frontend { addr, port, protocol } = *frontend;
    let FrontendSpec {
        service,
        kind,
        all,
        local,
        verdicts,
        algorithm,
        affinity_secs,
        source_ranges,
        pods_per_packet: _,
        alive: _,
    } = spec;
    let texts = |backends: &[Backend]| backends.iter().map(ToString::to_string).collect();
    Row {
        service: service.to_string(),
        kind: *kind,
        address: addr,
        port: port.get(),
        protocol,
        all: texts(all),
        local: texts(local),
        verdicts: *verdicts,
        algorithm: *algorithm,
        affinity_secs: *affinity_secs,
        source_ranges: source_ranges.as_ref().map(|ranges| ranges.iter().map(ToString::to_string).collect()),
    }
}
