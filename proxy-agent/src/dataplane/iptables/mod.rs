//! The iptables dataplane: the same verdicts as rules of chains of our own, in each family's nat and filter tables.
//!
//! ```text
//! render    ServicePorts to chains and rules; pure
//! shadow    what is in force, and what has to be written to make it something else; pure
//! save      what iptables-save prints, read; pure
//! flavour   which iptables: nft's or the old one
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
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    Capabilities, Dataplane, DataplaneError, DetectLocal, Drift, Failure, Fill, Hook, Report, held,
    netfilter::{
        ALGORITHMS, ByFamily, Options, PROTOCOLS, State, flows::Flows, is_liberal, local_devices, lock::Lock,
        ration::Ration, sift::sift, tool::ToolError,
    },
};
use crate::{
    desired::{Algorithm, Changes, DesiredState, Devices, Frontend},
    model::{Family, ServiceKey, ServicePortName},
};

mod flavour;
mod former;
mod left;
mod loopback;
mod observe;
mod render;
mod save;
mod shadow;
mod stamp;
mod trial;

pub use flavour::Flavour;
use flavour::{Chosen, Tools, is_busy};
pub(crate) use former::Former;
use left::{Found, Left};
use loopback::RouteLocalnet;
use render::{ChainName, LOOPBACK, Pods, Renderer, Unit};
use save::Saved;
use shadow::{Item, Jumps, Patch, Shadow, Stand};
use stamp::Stamps;

/// Between two tries to put a setting back.
const AGAIN: Duration = Duration::from_secs(30);

#[derive(Debug)]
struct Half {
    shadow: Shadow,
    state: State,
    /// Whose each frontend is that is in force.
    owners: BTreeMap<Frontend, ServicePortName>,
    /// What an earlier run left was looked at.
    met: bool,
    /// Of chains, as they were printed when they were first seen.
    prints: BTreeMap<ChainName, u64>,
    /// Of the rules when all of them were seen to be as they should.
    stamp: Option<u64>,
}

impl Half {
    fn new(renderer: Renderer) -> Self {
        Self {
            shadow: Shadow::new(renderer),
            state: State::Unknown,
            owners: BTreeMap::new(),
            met: false,
            prints: BTreeMap::new(),
            stamp: None,
        }
    }
}

/// See the module.
#[derive(Debug)]
pub struct Iptables {
    _lock: Lock,
    tools: Tools,
    stamps: Box<dyn Stamps>,
    /// The other flavour, where an earlier run left something.
    leftovers: Option<Tools>,
    halves: [Half; 2],
    flows: Flows,
    detect_local: DetectLocal,
    localhost: bool,
    loopback: RouteLocalnet,
    /// Why `route_localnet` is still set though nobody asks for it.
    unrestored: Option<String>,
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
            leftovers,
            halves: Family::BOTH.map(half),
            flows,
            detect_local: options.detect_local,
            localhost: options.localhost_node_ports,
            loopback: loopback::here(),
            unrestored: None,
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

    fn bring_about(&mut self, at: usize, items: Vec<Item>, report: &mut Report) {
        let Some(half) = self.halves.get_mut(at) else { return };
        if half.state != State::Filled {
            return self.refill(at, items, report);
        }
        let family = half.shadow.renderer.family;
        let (patch, undo) = half.shadow.turn(items.clone());
        let text = patch.text(&Jumps::default());
        self.wrote |= !text.is_empty();
        let done = if text.is_empty() { Ok(()) } else { self.tools.restore(family, &text) };
        match done {
            Ok(()) => {
                if let Some(half) = self.halves.get_mut(at) {
                    half.prints.retain(|chain, _| !patch.set.contains_key(chain) && !patch.gone.contains(chain));
                }
                self.landed(at, &items, patch.writes(), report);
            }
            Err(error) => {
                self.failures.add_one(family);
                if let Some(half) = self.halves.get_mut(at) {
                    half.shadow.turn(undo);
                    half.state = State::Unknown;
                }
                if is_busy(&error) || !error.is_refusal() {
                    return self.give_up(&items, at, &error, report);
                }
                tracing::warn!(%error, "iptables refused a change; everything is written anew");
                self.refill(at, items, report);
            }
        }
    }

    /// Of `items`, which are in the shadow by now.
    fn landed(&mut self, at: usize, items: &[Item], writes: u64, report: &mut Report) {
        report.writes += writes;
        let Some(half) = self.halves.get_mut(at) else { return };
        for item in items {
            if let Item::Unit(service, stand) = item {
                half.owners.retain(|_, owner| owner != service);
                if let Some(Stand::Planned(unit)) = stand {
                    half.owners.extend(unit.keys().map(|frontend| (*frontend, service.clone())));
                }
            }
        }
    }

    /// All that failed; what is in force is not known.
    fn give_up(&mut self, items: &[Item], at: usize, error: &ToolError, report: &mut Report) {
        let Some(half) = self.halves.get_mut(at) else { return };
        half.state = State::Unknown;
        let shadow = half.shadow.clone();
        for item in items {
            self.fail(&shadow, item, error, report);
        }
    }

    fn fail(&self, shadow: &Shadow, item: &Item, error: &ToolError, report: &mut Report) {
        match item {
            Item::Unit(service, stand) => {
                let of = |stand: Option<&Stand>| match stand {
                    Some(Stand::Planned(unit)) => unit.clone(),
                    Some(Stand::Kept(_)) | None => Unit::new(),
                };
                let (old, new) = (of(shadow.units().get(service)), of(stand.as_ref()));
                let changed = new.iter().filter(|(frontend, spec)| old.get(frontend) != Some(spec));
                let gone = old.keys().filter(|frontend| !new.contains_key(frontend));
                for frontend in changed.map(|(frontend, _)| frontend).chain(gone) {
                    report.failed.insert(*frontend, Failure::Retry(format!("frontend {frontend}: {error}")));
                }
            }
            Item::Guard(addr, _) => {
                report.failed_guards.insert(*addr, Failure::Retry(format!("{addr}: {error}")));
            }
            Item::Pods(Pods::Cidrs(_)) => {
                report.failed_local_cidrs = Some(Failure::Retry(format!("addresses that tell pods: {error}")));
            }
            Item::Pods(Pods::Devices(_)) => {
                let failure = |name: &String| (name.clone(), Failure::Retry(format!("device {name}: {error}")));
                report.failed_devices.extend(self.devices.iter().flatten().map(failure));
            }
            Item::Health(_) => tracing::warn!(%error, "health-check node ports are not let through"),
        }
    }

    /// Writes everything of this family, with `items` in it.
    fn refill(&mut self, at: usize, items: Vec<Item>, report: &mut Report) {
        let Some(half) = self.halves.get(at) else { return };
        let family = half.shadow.renderer.family;
        // A family that was never asked for may have no tools.
        let asked = items.iter().any(is_asked) || !half.shadow.units().is_empty() || !half.shadow.guards().is_empty();
        let saved = match self.tools.save(family) {
            Ok(saved) => saved,
            Err(_) if !asked => Saved::default(),
            Err(error) => return self.give_up(&items, at, &error, report),
        };
        if self.halves.get_mut(at).is_some_and(|half| !std::mem::replace(&mut half.met, true)) {
            // Their flows go with them if they do not come again.
            self.flows.found(saved.frontends(&self.held));
        }
        let items = self.allowed(at, items, &saved, report);
        let Some(half) = self.halves.get(at) else { return };
        let mut whole = half.shadow.clone();
        whole.turn(items.clone());
        if whole.units().is_empty() && whole.guards().is_empty() && whole.health().is_empty() && self.held.is_empty() {
            return self.go_without(at, whole, &items, &saved, report);
        }
        match self.write(family, &mut whole, &saved) {
            Ok(writes) => self.refilled(at, whole, &items, writes, report),
            Err(error) => {
                self.failures.add_one(family);
                if is_busy(&error) || !error.is_refusal() {
                    self.give_up(&items, at, &error, report);
                } else {
                    self.refill_anyhow(at, items, &saved, &error, report);
                }
            }
        }
    }

    /// Something is wrong with some of the items, or with what there was: what is in force stays until it is known.
    fn refill_anyhow(&mut self, at: usize, items: Vec<Item>, saved: &Saved, error: &ToolError, report: &mut Report) {
        let Some(half) = self.halves.get(at) else { return };
        let (family, renderer) = (half.shadow.renderer.family, half.shadow.renderer.clone());
        let mut open = items;
        // What is in force may be at fault, too, after the tool itself was exchanged.
        open.extend(
            half.shadow
                .items()
                .into_iter()
                .filter(|item| match item {
                    Item::Unit(service, _) => {
                        !open.iter().any(|one| matches!(one, Item::Unit(other, _) if other == service))
                    }
                    Item::Guard(addr, _) => {
                        !open.iter().any(|one| matches!(one, Item::Guard(other, _) if other == addr))
                    }
                    Item::Pods(_) => !open.iter().any(|one| matches!(one, Item::Pods(_))),
                    Item::Health(_) => !open.iter().any(|one| matches!(one, Item::Health(_))),
                })
                .collect::<Vec<_>>(),
        );
        let tools = self.tools;
        let sifted = sift(open, &mut |items| {
            let mut trial = Shadow::new(renderer.clone());
            trial.turn(items.to_vec());
            let (there, away) = shadow::trial(&trial);
            let tried = tools.restore(family, &there);
            let removed = tools.restore(family, &away);
            tried.and(removed)
        });
        if sifted.bad.is_empty() {
            let text = sifted.good.clone();
            return self.give_up(&text, at, error, report);
        }
        let Some(half) = self.halves.get(at) else { return };
        let shadow = half.shadow.clone();
        for (item, error) in &sifted.bad {
            self.fail(&shadow, item, error, report);
            // What stood and is not written again is as good as gone.
            self.fail(&Shadow::new(renderer.clone()), item, error, report);
            if let Item::Unit(_, Some(Stand::Kept(piece))) = item {
                let failure = |frontend| (frontend, Failure::Retry(format!("frontend {frontend}: {error}")));
                report.failed.extend(piece.entries.keys().map(|(_, frontend)| failure(*frontend)));
            }
        }
        let mut whole = Shadow::new(renderer);
        whole.turn(sifted.good.clone());
        match self.write(family, &mut whole, saved) {
            Ok(writes) => self.refilled(at, whole, &sifted.good, writes, report),
            Err(error) => self.give_up(&sifted.good, at, &error, report),
        }
    }

    /// All of it, in place of whatever of ours is there.
    fn write(&mut self, family: Family, whole: &mut Shadow, saved: &Saved) -> Result<u64, ToolError> {
        let opens = whole.renderer.opens_loopback();
        let noted = saved.route_localnet().or(whole.renderer.route_localnet);
        whole.renderer.route_localnet = if opens {
            noted.or_else(|| self.noted_elsewhere(family)).or_else(|| self.loopback.before())
        } else {
            self.put_back(noted)
        };
        let set = whole.chains();
        let gone = saved.names().into_iter().filter(|name| !set.contains_key(name)).collect();
        let patch = Patch { set, gone };
        let jumps = Jumps { stale: saved.jumps.clone(), wanted: whole.renderer.jumps() };
        self.wrote = true;
        self.tools.restore(family, &patch.text(&jumps))?;
        if opens {
            // Not before what keeps the neighbours out, and says what it was.
            self.loopback.open();
        }
        Ok(patch.writes())
    }

    /// Sets `route_localnet` back to what was noted; where that fails, what was noted, by which the neighbours are kept out until it can be.
    fn put_back(&self, noted: Option<i32>) -> Option<i32> {
        let error = self.loopback.put_back(noted).err()?;
        tracing::warn!(%error, "what an earlier run set stays");
        noted
    }

    /// By an earlier run, with the other flavour.
    fn noted_elsewhere(&self, family: Family) -> Option<i32> {
        self.leftovers?.save(family).ok()?.route_localnet()
    }

    fn refilled(&mut self, at: usize, whole: Shadow, items: &[Item], writes: u64, report: &mut Report) {
        if let Some(half) = self.halves.get_mut(at) {
            half.shadow = whole;
            half.state = State::Filled;
            half.owners.clear();
            half.prints.clear();
            if let Ok(saved) = self.tools.save(half.shadow.renderer.family) {
                // It was written a moment ago.
                observe::differences(half, &saved);
            }
            let units: Vec<Item> = half.shadow.items();
            self.landed(at, &units, writes, report);
        }
        self.landed(at, items, 0, report);
        if self.halves.iter().all(|half| half.state != State::Unknown)
            && let Some(other) = self.leftovers.take()
        {
            tracing::info!(flavour = %other.flavour, "what an earlier run left with the other flavour of iptables is removed");
            let shields = |half: &Half| half.state == State::Filled && half.shadow.renderer.shields_loopback();
            // Who goes on with the setting keeps the neighbours out.
            let goes_on = self.halves.iter().any(shields);
            let remove = |left: Left| if goes_on { left.remove_rules() } else { left.remove_with(&self.loopback) };
            if let Err(error) = left::of(other).each(remove) {
                tracing::warn!(%error, flavour = %other.flavour, "what an earlier run left stays");
                self.leftovers = Some(other);
            }
        }
    }

    /// A family that nothing is asked of has no chains.
    fn go_without(&mut self, at: usize, mut whole: Shadow, items: &[Item], saved: &Saved, report: &mut Report) {
        let family = whole.renderer.family;
        whole.renderer.route_localnet = self.put_back(saved.route_localnet());
        let mut gone = saved.clone();
        if whole.renderer.shields_loopback() {
            gone.spare(LOOPBACK);
        }
        if !gone.is_clean() {
            if let Err(error) = self.tools.restore(family, &shadow::removal(gone.names(), gone.jumps)) {
                return self.give_up(items, at, &error, report);
            }
            report.writes += 1;
        }
        if let Some(half) = self.halves.get_mut(at) {
            half.shadow = whole;
            half.state = State::Absent;
        }
        self.landed(at, items, 0, report);
    }

    /// Puts what an earlier run left of held Services into the shadow; `items` without those that concern it.
    fn allowed(&mut self, at: usize, items: Vec<Item>, saved: &Saved, report: &mut Report) -> Vec<Item> {
        let known_pods = self.devices.is_some() || self.detect_local == DetectLocal::Address;
        let Some(half) = self.halves.get_mut(at) else { return items };
        let mut first = Vec::new();
        if !known_pods {
            // Which devices are pods' is not known yet; until it is, those of before are as good a guess as there is.
            first.push(Item::Pods(Pods::Devices(saved.pod_devices())));
        }
        let is_kept = |stand: &Stand| matches!(stand, Stand::Kept(_));
        if half.shadow.units().values().any(is_kept) || !self.held.is_empty() {
            let (pieces, guarded) = saved.kept(&self.held);
            let freed = half
                .shadow
                .units()
                .iter()
                .filter(|(service, stand)| is_kept(stand) && !self.held.contains(&service.service));
            first.extend(freed.map(|(service, _)| Item::Unit(service.clone(), None)));
            first.extend(guarded.into_iter().map(|addr| Item::Guard(addr, true)));
            first.extend(
                pieces
                    .into_iter()
                    .filter(|(service, _)| !half.shadow.units().contains_key(service))
                    .map(|(service, piece)| Item::Unit(service, Some(Stand::Kept(Arc::new(piece))))),
            );
        }
        half.shadow.turn(first);
        let kept: BTreeMap<Frontend, ServicePortName> = half
            .shadow
            .units()
            .iter()
            .filter_map(|(service, stand)| match stand {
                Stand::Kept(piece) => Some((service, piece)),
                Stand::Planned(_) => None,
            })
            .flat_map(|(service, piece)| piece.entries.keys().map(|(_, frontend)| (*frontend, service.clone())))
            .collect();
        if kept.is_empty() {
            return items;
        }
        let services: BTreeSet<&ServicePortName> = kept.values().collect();
        let addresses: BTreeSet<IpAddr> = kept.keys().map(|frontend| frontend.addr).collect();
        let mut allowed = Vec::new();
        for item in items {
            match item {
                Item::Unit(service, Some(Stand::Planned(mut unit))) => {
                    let whole = services.contains(&service);
                    unit.retain(|frontend, _| {
                        let stays = whole || kept.contains_key(frontend);
                        if stays {
                            report.failed.insert(*frontend, held(frontend));
                        }
                        !stays
                    });
                    if !whole {
                        let stand = (!unit.is_empty()).then_some(Stand::Planned(unit));
                        allowed.push(Item::Unit(service, stand));
                    }
                }
                Item::Unit(service, None) if services.contains(&service) => {}
                Item::Guard(addr, false) if addresses.contains(&addr) => {}
                item => allowed.push(item),
            }
        }
        allowed
    }

    /// What `changes` mean for the ServicePorts of one family.
    fn items(&self, at: usize, changes: &Changes) -> Vec<Item> {
        let Some(half) = self.halves.get(at) else { return Vec::new() };
        let family = half.shadow.renderer.family;
        // No socket is translated here, so none is to be left alone.
        let Changes { set, remove, guard, unguard, local_cidrs, left_pods: _ } = changes;
        let of = |addr: IpAddr| Family::of(addr) == family;
        let mut units: BTreeMap<ServicePortName, Unit> = BTreeMap::new();
        let known = |service: &ServicePortName| match half.shadow.units().get(service) {
            Some(Stand::Planned(unit)) => unit.clone(),
            Some(Stand::Kept(_)) | None => Unit::new(),
        };
        for frontend in remove.iter().chain(set.keys()).filter(|frontend| of(frontend.addr)) {
            if let Some(owner) = half.owners.get(frontend) {
                units.entry(owner.clone()).or_insert_with(|| known(owner)).remove(frontend);
            }
        }
        for (frontend, spec) in set.iter().filter(|(frontend, _)| of(frontend.addr)) {
            let unit = units.entry(spec.service.clone()).or_insert_with(|| known(&spec.service));
            unit.insert(*frontend, Arc::clone(spec));
        }
        let units = units.into_iter().map(|(service, unit)| {
            let stand = (!unit.is_empty()).then_some(Stand::Planned(unit));
            Item::Unit(service, stand)
        });
        let guards = guard.iter().map(|addr| (addr, true)).chain(unguard.iter().map(|addr| (addr, false)));
        let guards = guards.filter(|(addr, _)| of(**addr)).map(|(addr, wanted)| Item::Guard(*addr, wanted));
        let pods = local_cidrs
            .as_ref()
            .filter(|_| self.detect_local == DetectLocal::Address)
            .map(|cidrs| Item::Pods(Pods::Cidrs(cidrs.iter().filter(|net| of(net.addr())).copied().collect())));
        pods.into_iter().chain(guards).chain(units).collect()
    }
}

/// The module's setting; where it is not loaded yet, its default.
fn affinity_clients() -> u32 {
    let text = fs::read_to_string("/sys/module/xt_recent/parameters/ip_list_tot").unwrap_or_default();
    text.trim().parse().unwrap_or(100)
}

/// Whether it makes the family needed.
fn is_asked(item: &Item) -> bool {
    match item {
        Item::Unit(_, stand) => stand.is_some(),
        Item::Guard(_, wanted) => *wanted,
        Item::Pods(_) | Item::Health(_) => false,
    }
}

/// Takes everything of ours away.
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
            let is_other =
                self.halves.get(at).is_some_and(|half| half.state == State::Filled && half.shadow.health() != ports);
            if is_other {
                // What fails is seen by the next look at the kernel.
                self.bring_about(at, vec![Item::Health(ports.clone())], &mut Report::default());
            }
        }
    }

    fn activate(&mut self) -> Result<(), DataplaneError> {
        // Rules are in force as soon as they are written.
        Ok(())
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
            let filled = *state == State::Filled;
            // Before it is looked: what changes meanwhile is seen the next time.
            let stamp = filled.then(|| self.stamps.stamp(shadow.renderer.family)).flatten();
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
        let Self { halves, loopback, unrestored, .. } = self;
        let is_stuck = |half: &&mut Half| {
            let renderer = &half.shadow.renderer;
            renderer.shields_loopback() && !renderer.opens_loopback()
        };
        let stuck = halves.iter_mut().find(is_stuck);
        let tried = stuck.map(|half| (loopback.put_back(half.shadow.renderer.route_localnet), half));
        *unrestored = match tried {
            None => None,
            Some((Err(error), _)) => Some(error.to_string()),
            Some((Ok(()), half)) => {
                // The rule goes when the kernel is looked at next.
                half.shadow.renderer.route_localnet = None;
                half.state = State::Unknown;
                None
            }
        };
        unrestored.as_ref().map(|_| AGAIN)
    }

    fn unrestored(&self) -> Option<String> {
        self.unrestored.clone()
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
