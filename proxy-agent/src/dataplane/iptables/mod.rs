//! The iptables dataplane: the same verdicts as rules of chains of our own, in each family's nat and filter tables.
//!
//! ```text
//! render    ServicePorts to chains and rules; pure
//! shadow    what is in force, and what has to be written to make it something else; pure
//! save      what iptables-save prints, read; pure
//! half      one family: what is in force of it, and how changes are brought about
//! flavour   which iptables: nft's or the old one
//! other     what an earlier run left with the other one
//! loopback  the setting that node ports of 127.0.0.1 take, and what it was
//! observe   whether what was written is still there
//! stamp     whether anything has changed at all
//! ```
//!
//! One `iptables-restore --noflush` for each change and family, of the chains that changed alone; nothing is listed to make one. One that is
//! refused is halved until the ServicePorts that it is for are found, in chains that no packet meets; the rest goes in. After any failure, and
//! at start, everything of ours is written anew: each table in one piece, so that packets meet the old rules or the new ones. Stopping
//! leaves all in force.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    Capabilities, Dataplane, DataplaneError, DetectLocal, Drift, Fill, Hook, Report,
    netfilter::{
        ALGORITHMS, ByFamily, Options, PROTOCOLS, State, flows::Flows, is_liberal, local_devices, lock::Lock,
        ration::Ration,
    },
};
use crate::{
    desired::{Algorithm, Changes, DesiredState, Devices},
    model::{Family, ServiceKey},
};

mod flavour;
mod former;
mod half;
mod left;
mod loopback;
mod observe;
mod other;
mod render;
mod save;
mod shadow;
mod stamp;
mod trial;

pub use flavour::Flavour;
use flavour::{Chosen, Tools};
pub(crate) use former::Former;
use half::Half;
use left::{Found, Left};
use loopback::RouteLocalnet;
use other::Other;
use render::{Pods, Renderer};
use shadow::{Item, Shadow, Stand};
use stamp::Stamps;

/// Between two tries to make a setting what it should be, or to remove what is to go.
const AGAIN: Duration = Duration::from_secs(30);

/// See the module.
#[derive(Debug)]
pub struct Iptables {
    _lock: Lock,
    tools: Tools,
    stamps: Box<dyn Stamps>,
    /// The other flavour, where an earlier run left something.
    other: Option<Other>,
    halves: [Half; 2],
    flows: Flows,
    detect_local: DetectLocal,
    localhost: bool,
    loopback: RouteLocalnet,
    /// Why `route_localnet` is not what it should be.
    unsettled: Option<String>,
    /// What the kernel remembers for each list.
    affinity_clients: u32,
    failures: Arc<ByFamily>,
    /// Not before devices are known.
    devices: Option<BTreeSet<String>>,
    held: BTreeSet<ServiceKey>,
    /// At which load balancers ask.
    health: BTreeSet<u16>,
    /// Of readings because others may have changed something, and of those that follow a change of our own.
    rations: Rations,
    /// Rules were written since all of them were last read.
    wrote: bool,
}

#[derive(Debug)]
struct Rations {
    others: Ration,
    own: Ration,
}

impl Rations {
    fn new(now: Instant) -> Self {
        Self { others: Ration::new(now), own: Ration::new(now) }
    }

    const fn of(&mut self, own: bool) -> &mut Ration {
        if own { &mut self.own } else { &mut self.others }
    }
}

impl Iptables {
    /// Changes nothing that is in force.
    pub fn open(options: &Options) -> Result<Self, DataplaneError> {
        let Chosen { tools, leftovers } = flavour::choose(options.iptables_flavour)?;
        tools.are_allowed()?;
        let lock = Lock::take()?;
        tracing::info!(flavour = %tools.flavour, "iptables");
        let flows = Flows::start(Arc::clone(&options.ended)).map_err(|source| DataplaneError::Kernel {
            what: "start the thread that ends stale flows".into(),
            source,
        })?;
        let liberal = is_liberal();
        let half = |family| {
            let renderer = Renderer {
                family,
                mark: options.mark(),
                masquerade_ports: options.masquerade_ports,
                localhost: options.localhost_node_ports,
                route_localnet: None,
                liberal,
            };
            Half::new(renderer)
        };
        Ok(Self {
            _lock: lock,
            tools,
            stamps: stamp::of(tools.flavour),
            other: leftovers.map(Other::new),
            halves: Family::BOTH.map(half),
            flows,
            detect_local: options.detect_local,
            localhost: options.localhost_node_ports,
            loopback: loopback::here(),
            unsettled: None,
            affinity_clients: affinity_clients(),
            failures: Arc::clone(&options.restore_failures),
            devices: None,
            held: BTreeSet::new(),
            health: BTreeSet::new(),
            rations: Rations::new(Instant::now()),
            wrote: false,
        })
    }

    /// What an agent left here, of either flavour, and why there may be more.
    pub fn remains() -> (Vec<String>, Option<DataplaneError>) {
        let Found { left, unknown } = left::find();
        let mut chains = BTreeMap::<&str, usize>::new();
        for Left { tools, family: _, saved } in &left {
            *chains.entry(tools.flavour.name()).or_default() += saved.names().len();
        }
        let text = |(flavour, chains)| format!("{chains} chains of iptables ({flavour})");
        (chains.into_iter().map(text).collect(), unknown)
    }

    /// Removes what is ours of either flavour, with no agent at work here.
    pub fn remove() -> Result<(), DataplaneError> {
        let _lock = Lock::take()?;
        left::find().each(Left::remove)
    }
}

/// The module's setting; where it is not loaded yet, its default.
fn affinity_clients() -> u32 {
    let text = fs::read_to_string("/sys/module/xt_recent/parameters/ip_list_tot").unwrap_or_default();
    text.trim().parse().unwrap_or(100)
}

impl Dataplane for Iptables {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            name: "iptables",
            protocols: PROTOCOLS.to_vec(),
            affinity: true,
            algorithms: ALGORITHMS.to_vec(),
            otherwise: Algorithm::Random,
            turns_restart: Some(match self.tools.flavour {
                Flavour::Nft => "a change of its backends",
                // All of a table is written anew.
                Flavour::Legacy => "a change of any Service",
            }),
            loopback: self.localhost,
            resets: false,
            affinity_clients: Some(self.affinity_clients),
            affinity_apart: false,
        }
    }

    fn resync(&mut self, desired: &DesiredState) -> Report {
        let mut report = Report::default();
        for at in 0..self.halves.len() {
            let Some(half) = self.halves.get_mut(at) else { continue };
            let is_kept = |stand: &Stand| matches!(stand, Stand::Kept(_));
            if half.shadow.units().values().any(is_kept) {
                half.state = State::Unknown;
            }
            let changes = known(&half.shadow).diff(desired);
            let unknown = half.state == State::Unknown;
            let mut items = self.items(at, &changes);
            let pods = self.pods().filter(|pods| self.halves.get(at).is_some_and(|half| half.shadow.pods() != pods));
            items.extend(pods.map(Item::Pods));
            let health = self.halves.get(at).filter(|half| *half.shadow.health() != self.health);
            items.extend(health.map(|_| Item::Health(self.health.clone())));
            if unknown || !items.is_empty() {
                self.bring_about(at, items, &mut report);
            }
        }
        self.flows.all(desired, &report);
        report
    }

    fn hold(&mut self, services: &BTreeSet<ServiceKey>) {
        self.held.clone_from(services);
    }

    fn apply(&mut self, changes: &Changes) -> Report {
        let mut report = Report::default();
        for at in 0..self.halves.len() {
            let items = self.items(at, changes);
            if !items.is_empty() {
                self.bring_about(at, items, &mut report);
            }
        }
        self.flows.changed(changes, &report);
        report
    }

    fn set_devices(&mut self, devices: &Devices) -> Report {
        let mut report = Report::default();
        if self.detect_local == DetectLocal::Address {
            return report;
        }
        self.devices = Some(observe::names(devices, &local_devices(devices)));
        let Some(pods) = self.pods() else { return report };
        for at in 0..self.halves.len() {
            let Some(half) = self.halves.get_mut(at) else { continue };
            // An earlier run's may still be in the kernel.
            if half.state == State::Filled {
                if *half.shadow.pods() != pods {
                    self.bring_about(at, vec![Item::Pods(pods.clone())], &mut report);
                }
            } else {
                half.shadow.turn(vec![Item::Pods(pods.clone())]);
            }
        }
        report
    }

    fn let_in(&mut self, ports: &BTreeSet<u16>) {
        self.health.clone_from(ports);
        for at in 0..self.halves.len() {
            let Some(half) = self.halves.get_mut(at).filter(|half| half.shadow.health() != ports) else { continue };
            let items = vec![Item::Health(ports.clone())];
            if half.state == State::Filled {
                // What fails is seen by the next look at the kernel.
                self.bring_about(at, items, &mut Report::default());
            } else {
                half.shadow.turn(items);
            }
        }
    }

    fn activate(&mut self) -> Result<(), DataplaneError> {
        // Rules are in force as soon as they are written.
        Ok(())
    }

    fn in_force(&mut self) {
        if let Some(other) = &mut self.other {
            other.let_go();
        }
    }

    fn observe(&mut self) -> Result<Drift, DataplaneError> {
        let mut drift = Drift::default();
        let compare = self.rations.of(self.wrote).allows(Instant::now());
        let mut took = Duration::ZERO;
        let pods = self.pods();
        for half in &mut self.halves {
            let Half { shadow, state, .. } = &*half;
            let lacks = *shadow.health() != self.health || pods.as_ref().is_some_and(|pods| shadow.pods() != pods);
            drift.unfinished |= *state == State::Unknown || (*state == State::Filled && lacks);
            let has_rules = !half.jumps().is_empty();
            // Before it is looked: what changes meanwhile is seen the next time.
            let stamp = has_rules.then(|| self.stamps.stamp(shadow.renderer.family)).flatten();
            if stamp.is_some() && half.stamp == stamp {
                continue;
            }
            let lost = observe::lost(&self.tools, half, compare.then_some(&mut took))?;
            if !lost.is_empty() {
                half.state = State::Unknown;
            }
            half.stamp = stamp.filter(|_| compare && lost.is_empty());
            drift.hooks.extend(lost);
        }
        if took > Duration::ZERO && drift.hooks.is_empty() {
            self.rations.of(std::mem::take(&mut self.wrote)).for_nothing(Instant::now(), took);
        }
        Ok(drift)
    }

    fn tick(&mut self) -> Option<Duration> {
        self.unsettled = self.settle();
        self.remove_other(Instant::now());
        (self.unsettled.is_some() || self.other.is_some()).then_some(AGAIN)
    }

    fn unsettled(&self) -> Option<String> {
        self.unsettled.clone()
    }

    fn unremoved(&self) -> Option<String> {
        self.other.as_ref()?.trouble()
    }

    fn teardown(&mut self) -> Result<(), DataplaneError> {
        for half in &mut self.halves {
            half.state = State::Unknown;
        }
        left::of(self.tools).each(Left::remove)
    }

    fn fill(&self) -> Vec<Fill> {
        Vec::new()
    }

    fn hooks(&self) -> Vec<Hook> {
        let filled = self.halves.iter().filter(|half| half.state == State::Filled);
        filled.flat_map(observe::hooks).collect()
    }
}

impl Iptables {
    /// `None`: not known, or told by what is desired.
    fn pods(&self) -> Option<Pods> {
        match self.detect_local {
            DetectLocal::Device => self.devices.clone().map(Pods::Devices),
            DetectLocal::Address => None,
        }
    }
}

/// What the shadow holds, as a state.
fn known(shadow: &Shadow) -> DesiredState {
    let planned = shadow.units().values().filter_map(|stand| match stand {
        Stand::Planned(unit) => Some(unit),
        Stand::Kept(_) => None,
    });
    let frontends = planned.flatten().map(|(frontend, spec)| (*frontend, Arc::clone(spec))).collect();
    let local_cidrs = match shadow.pods() {
        Pods::Cidrs(nets) => nets.clone(),
        Pods::Devices(_) => BTreeSet::new(),
    };
    DesiredState { frontends, guards: shadow.guards().clone(), local_cidrs, left_pods: None }
}

#[cfg(test)]
mod tests;
