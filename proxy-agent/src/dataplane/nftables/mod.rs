//! The nftables dataplane: the same verdicts as rules of a table of our own in each family.
//!
//! ```text
//! render    frontends to chains and elements; pure
//! shadow    what is in force, and the transaction that makes it something else; pure
//! sync      what carries the transactions out, and looks whether all is as it was made
//! observe   what `nft -j list` says of it
//! ```
//!
//! One transaction for each change and family, of what changed alone; nothing is listed to make one. One that nft refuses is
//! halved until the frontends that it is for are found, and the rest goes in. An agent that starts makes everything of ours anew, in one
//! transaction: packets meet the old rules or the new ones. Stopping leaves all in force.
//!
//! Not one for both families: the tables share nothing, and what is refused of the one is no reason for the other to wait.

use std::{
    collections::{BTreeSet, HashMap},
    fmt, io,
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use super::{
    Capabilities, Dataplane, DataplaneError, Drift, Fill, Hook, Report,
    netfilter::{
        self, ALGORITHMS, Options, PROTOCOLS, State,
        conntrack::{Chain, Socket, Structure},
        flows::Flows,
        lock::Lock,
        ration::Ration,
        tool::{Tool, ToolError},
    },
};
use crate::{
    desired::{Algorithm, Changes, DesiredState, Devices, Frontend},
    model::{Family, ServiceKey},
};

mod former;
mod observe;
mod render;
mod shadow;
mod sync;
mod trial;

pub(crate) use former::Former;
use observe::Listed;
use render::{AFFINITY, Collection, Incarnations, Renderer};
use shadow::{Item, Shadow};

pub(crate) use render::Role;
pub(crate) use shadow::Servers;

const NFT: Tool = Tool {
    program: "nft",
    remedy: "install the package nftables, or choose another --proxy-mode",
    patience: Duration::from_secs(60),
};

/// Counting clients takes at most one part in so many of the time.
const SHARE: u32 = 100;

/// What the kernel says of rules, without nft.
trait Rules: fmt::Debug + Send {
    /// How often they have changed, anybody's.
    fn generation(&self) -> io::Result<u32>;
    /// Of our table; empty where there is none.
    fn structure(&self, family: Family, table: &str) -> io::Result<Structure>;
    /// Of a chain in it.
    fn chain(&self, family: Family, table: &str, name: &str) -> io::Result<Chain>;
    /// The keys of one of its sets and maps.
    fn keys(&self, family: Family, table: &str, set: &str) -> io::Result<Vec<Vec<u8>>>;
    /// How many elements one has.
    fn count(&self, family: Family, table: &str, set: &str) -> io::Result<u64>;
}

impl Rules for Socket {
    fn generation(&self) -> io::Result<u32> {
        Self::generation(self)
    }

    fn structure(&self, family: Family, table: &str) -> io::Result<Structure> {
        Self::structure(self, family, table)
    }

    fn chain(&self, family: Family, table: &str, name: &str) -> io::Result<Chain> {
        Self::chain(self, family, table, name)
    }

    fn keys(&self, family: Family, table: &str, set: &str) -> io::Result<Vec<Vec<u8>>> {
        let mut keys = Vec::new();
        Self::keys(self, family, table, set, |key| keys.push(key.to_vec()))?;
        Ok(keys)
    }

    fn count(&self, family: Family, table: &str, set: &str) -> io::Result<u64> {
        let mut count = 0;
        Self::keys(self, family, table, set, |_| count += 1)?;
        Ok(count)
    }
}

#[derive(Debug)]
struct Half {
    shadow: Shadow,
    state: State,
    /// Of the rule set, with which the table was seen to be as it should.
    generation: Option<u32>,
    /// Frontends that stay as an earlier run left them, by their key.
    kept: BTreeSet<String>,
    /// What an earlier run left was looked at.
    met: bool,
    /// Clients that session affinity remembered when they were last counted, and when they may be again.
    remembered: u64,
    count_at: Instant,
    /// Of its chains, as they were read once they were made.
    prints: HashMap<String, u64>,
    /// Its elements; not at once with the other family's, or that one's turn would never come.
    ration: Ration,
}

impl Half {
    fn new(family: Family, role: Role, options: &Options) -> Self {
        let mut renderer = Renderer::new(family, role, options);
        renderer.liberal = netfilter::is_liberal();
        let mut shadow = Shadow::new(renderer);
        // Clients may be remembered of lives that an earlier run has counted; there are fewer of those than seconds.
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        shadow.incarnations = Incarnations::from(now.as_secs() as u32);
        Self {
            shadow,
            state: State::Unknown,
            generation: None,
            kept: BTreeSet::new(),
            met: false,
            prints: HashMap::new(),
            remembered: 0,
            count_at: Instant::now(),
            ration: Ration::new(Instant::now()),
        }
    }
}

impl Half {
    /// Clients that are remembered, and says once that no more can be.
    fn count(&mut self, kernel: &dyn Rules) {
        let Renderer { family, ip, affinity_entries, .. } = self.shadow.renderer;
        let start = Instant::now();
        if !self.shadow.renderer.remembers() || self.state != State::Filled || self.count_at > start {
            return;
        }
        // Where it cannot be asked there is more amiss, which others say.
        let count = kernel.count(family, self.shadow.renderer.table(), AFFINITY).unwrap_or(self.remembered);
        let room = |count: u64| count < u64::from(affinity_entries);
        if room(self.remembered) && !room(count) {
            tracing::warn!(
                family = ip,
                clients = count,
                "session affinity is full: clients that come now are not remembered; raise --map-affinity"
            );
        }
        self.remembered = count;
        self.count_at = start + start.elapsed() * SHARE;
    }

    /// Whether sets, chains and rules are those that were made.
    fn is_as_made(&self, found: &Structure) -> bool {
        let is_other =
            |(name, chain): (&String, &Chain)| self.prints.get(name).is_some_and(|made| *made != chain.print);
        observe::is_structure_of(found, &self.shadow) && !found.chains.iter().any(is_other)
    }
}

/// See the module.
#[derive(Debug)]
pub struct Nftables {
    _lock: Lock,
    role: Role,
    nft: Tool,
    netlink: Box<dyn Rules>,
    halves: [Half; 2],
    flows: Flows,
    /// Not before devices are known.
    pods: Option<BTreeSet<u32>>,
    devices: Vec<String>,
    held: BTreeSet<ServiceKey>,
}

impl Nftables {
    /// Changes nothing that is in force.
    pub fn open(options: &Options) -> Result<Self, DataplaneError> {
        Self::open_as(Role::Whole, options)
    }

    pub(crate) fn open_as(role: Role, options: &Options) -> Result<Self, DataplaneError> {
        NFT.run(&["--version"], "")?;
        let lock = Lock::take()?;
        let kernel = |what: &'static str| {
            move |source| DataplaneError::Kernel { what: format!("{what} (is nf_tables in this kernel?)"), source }
        };
        let netlink = Socket::open().map_err(kernel("netfilter's netlink"))?;
        netlink.generation().map_err(kernel("nftables"))?;
        let half = |family| Half::new(family, role, options);
        let flows = Flows::start(Arc::clone(&options.ended)).map_err(|source| DataplaneError::Kernel {
            what: "start the thread that ends stale flows".into(),
            source,
        })?;
        Ok(Self {
            _lock: lock,
            role,
            nft: NFT,
            netlink: Box::new(netlink),
            halves: Family::BOTH.map(half),
            flows,
            pods: None,
            devices: Vec::new(),
            held: BTreeSet::new(),
        })
    }

    /// Removes our tables, with no agent at work here.
    pub fn remove() -> Result<(), DataplaneError> {
        let _lock = Lock::take()?;
        Self::remove_tables(Role::Whole)
    }

    pub(crate) fn remove_tables(role: Role) -> Result<(), DataplaneError> {
        netfilter::remove_named(role.table())
    }

    /// What an agent left here, by name. A kernel that is not ours to ask, or has no nftables, holds none that could be removed.
    pub fn remains() -> Result<Vec<String>, DataplaneError> {
        Self::remains_of(Role::Whole)
    }

    pub(crate) fn remains_of(role: Role) -> Result<Vec<String>, DataplaneError> {
        netfilter::named(role.table())
    }

    /// Notes of which virtual servers of a family it is new that they are ours, or are no more; with whatever is next brought about, if nothing
    /// of this family is in force yet. What stays is not looked at: there may be many.
    pub(crate) fn note(&mut self, family: Family, come: &Servers, gone: &Servers, report: &mut Report) {
        let Some(at) = Family::BOTH.into_iter().position(|one| one == family) else { return };
        let is_filled = self.halves.get(at).is_some_and(|half| half.state == State::Filled);
        if is_filled && !(come.is_empty() && gone.is_empty()) {
            self.bring_about(at, vec![Item::Servers { come: come.clone(), gone: gone.clone() }], report);
        }
        let Some(half) = self.halves.get_mut(at) else { return };
        if !half.shadow.servers.are(come, gone) {
            half.shadow.servers.turn(come, gone);
            // Where nft refused, what is there is not what it was taken for.
            half.state = if half.state == State::Filled { State::Unknown } else { half.state };
        }
    }

    /// What was noted, by whichever agent was here last.
    pub(crate) fn noted_by(role: Role, options: &Options) -> Result<Vec<(Family, Servers)>, DataplaneError> {
        let socket = Socket::open().map_err(unread)?;
        let read = |family| read_servers(&socket, &Renderer::new(family, role, options));
        Family::BOTH.into_iter().map(read).collect()
    }

    /// The same, by the one that this is.
    pub(crate) fn noted(&self) -> Result<Vec<(Family, Servers)>, DataplaneError> {
        self.halves.iter().map(|half| read_servers(self.netlink.as_ref(), &half.shadow.renderer)).collect()
    }

    /// Keys of the frontends in force that are to be left as they are, once a resync is done: it looks again at a family that has some.
    pub(crate) fn kept(&self) -> Result<BTreeSet<String>, DataplaneError> {
        let mut kept = BTreeSet::new();
        for half in &self.halves {
            if !self.held.is_empty() && (half.state == State::Unknown || !half.kept.is_empty()) {
                let found = self.find(half)?;
                kept.extend(found.into_iter().flat_map(|found| found.kept));
            }
        }
        Ok(kept)
    }

    /// Those that were left as they are by what was last brought about.
    pub(crate) fn keeps(&self) -> BTreeSet<String> {
        self.halves.iter().flat_map(|half| &half.kept).cloned().collect()
    }

    /// Whether the table has a frontend, as it should be or as it was; `None`: there is a table, of which that is not known.
    pub(crate) fn stands(&self, frontend: &Frontend) -> Option<bool> {
        let half = self.halves.iter().find(|half| half.shadow.renderer.family == Family::of(frontend.addr))?;
        match half.state {
            State::Filled => Some(half.shadow.frontends.contains_key(frontend)),
            State::Absent => Some(false),
            State::Unknown => {
                let found = self.structure(half.shadow.renderer.family);
                if found.is_ok_and(|found| found.chains.is_empty()) { Some(false) } else { None }
            }
        }
    }

    /// A frontend's, as sets of the table have it.
    pub(crate) fn key(frontend: &Frontend) -> String {
        Renderer::frontend_key(frontend)
    }
}

/// By netlink: who removes them may have no nft.
fn read_servers(kernel: &dyn Rules, renderer: &Renderer) -> Result<(Family, Servers), DataplaneError> {
    let keys = |of: Collection| kernel.keys(renderer.family, renderer.table(), of.name()).map_err(unread);
    let frontends = keys(Collection::Servers)?;
    let at = frontends.iter().filter_map(|key| renderer.frontend_of(key)).map(|frontend| Nftables::key(&frontend));
    // In the order of this machine's bytes, as a packet has it.
    let mark = |key: &Vec<u8>| Some(u32::from_ne_bytes(*key.first_chunk()?));
    let marks = keys(Collection::Marks)?.iter().filter_map(mark).collect();
    Ok((renderer.family, Servers { at: at.collect(), marks }))
}

fn unread(source: io::Error) -> DataplaneError {
    DataplaneError::Kernel { what: "which virtual servers are noted as ours".into(), source }
}

fn list(nft: Tool, renderer: &Renderer) -> Result<Option<Listed>, ToolError> {
    match nft.run(&observe::arguments(renderer), "") {
        Ok(json) => Ok(Some(observe::parse(&json, renderer).ok_or_else(|| ToolError::Refused {
            program: nft.program,
            said: "what it lists as JSON is not understood; is it built with JSON?".into(),
        })?)),
        Err(ToolError::Refused { said, .. }) if said.contains("No such file or directory") => Ok(None),
        Err(error) => Err(error),
    }
}

fn items(changes: &Changes, family: Family) -> Vec<Item> {
    // No socket is translated here, so none is to be left alone.
    let Changes { set, remove, guard, unguard, local_cidrs, left_pods: _ } = changes;
    let of = |addr: IpAddr| Family::of(addr) == family;
    let cidrs = local_cidrs.as_ref().map(|cidrs| cidrs.iter().filter(|net| of(net.addr())).copied().collect());
    let guards = guard.iter().map(|addr| (addr, true)).chain(unguard.iter().map(|addr| (addr, false)));
    let guards = guards.filter(|(addr, _)| of(**addr)).map(|(addr, wanted)| Item::Guard(*addr, wanted));
    let gone = remove.iter().filter(|frontend| of(frontend.addr)).map(|frontend| Item::Frontend(*frontend, None));
    let set = set.iter().filter(|(frontend, _)| of(frontend.addr));
    let set = set.map(|(frontend, spec)| Item::Frontend(*frontend, Some(Arc::clone(spec))));
    cidrs.map(Item::LocalCidrs).into_iter().chain(guards).chain(gone).chain(set).collect()
}

impl Dataplane for Nftables {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            name: "nftables",
            protocols: PROTOCOLS.to_vec(),
            affinity: true,
            algorithms: ALGORITHMS.to_vec(),
            otherwise: Algorithm::Random,
            turns_restart: None,
            loopback: false,
            resets: false,
            affinity_clients: None,
            affinity_apart: false,
        }
    }

    fn resync(&mut self, desired: &DesiredState) -> Report {
        let mut report = Report::default();
        for (at, family) in Family::BOTH.into_iter().enumerate() {
            let Some(half) = self.halves.get_mut(at) else { continue };
            if !half.kept.is_empty() {
                half.state = State::Unknown;
            }
            // What was tried and failed is known to be in force by nobody.
            let changes = known(&half.shadow).diff(desired);
            let mut items = items(&changes, family);
            if let Some(pods) =
                self.pods.as_ref().filter(|pods| half.shadow.inherits_pods || half.shadow.pods != **pods)
            {
                items.push(Item::Pods(pods.clone()));
            }
            if half.state == State::Unknown || !items.is_empty() {
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
        for (at, family) in Family::BOTH.into_iter().enumerate() {
            let items = items(changes, family);
            if !items.is_empty() {
                self.bring_about(at, items, &mut report);
            }
        }
        self.flows.changed(changes, &report);
        report
    }

    fn set_devices(&mut self, devices: &Devices) -> Report {
        let pods = netfilter::local_devices(devices);
        self.devices = devices.values().map(|device| device.name.clone()).collect();
        self.pods = Some(pods.clone());
        let mut report = Report::default();
        for at in 0..self.halves.len() {
            // An earlier run's may still be in the kernel.
            let is_filled = self.halves.get(at).is_some_and(|half| half.state == State::Filled);
            if is_filled {
                self.bring_about(at, vec![Item::Pods(pods.clone())], &mut report);
            } else if let Some(half) = self.halves.get_mut(at) {
                half.shadow.pods.clone_from(&pods);
            }
        }
        report
    }

    fn activate(&mut self) -> Result<(), DataplaneError> {
        // Rules are in force as soon as they are made.
        Ok(())
    }

    fn observe(&mut self) -> Result<Drift, DataplaneError> {
        let now = self
            .netlink
            .generation()
            .map_err(|source| DataplaneError::Kernel { what: "the generation of nftables' rules".into(), source })?;
        let mut drift = Drift::default();
        for half in &mut self.halves {
            half.count(self.netlink.as_ref());
        }
        for at in 0..self.halves.len() {
            self.compare(at, now, &mut drift)?;
        }
        Ok(drift)
    }

    fn tick(&mut self) -> Option<Duration> {
        None
    }

    fn teardown(&mut self) -> Result<(), DataplaneError> {
        for half in &mut self.halves {
            half.state = State::Unknown;
        }
        Self::remove_tables(self.role)
    }

    fn fill(&self) -> Vec<Fill> {
        let remembers = |half: &&Half| half.state == State::Filled && half.shadow.renderer.remembers();
        let filled = self.halves.iter().filter(remembers);
        let fill = |half: &Half| {
            let Renderer { family, affinity_entries, .. } = half.shadow.renderer;
            let map = if family == Family::V4 { "affinity_v4" } else { "affinity_v6" };
            let (entries, capacity) = (half.remembered, u64::from(affinity_entries));
            Fill { map: map.to_owned(), entries, capacity, option: "--map-affinity" }
        };
        filled.map(fill).collect()
    }

    fn hooks(&self) -> Vec<Hook> {
        let filled = self.halves.iter().filter(|half| half.state == State::Filled);
        let of = |half: &Half| {
            let (ip, table) = (half.shadow.renderer.ip, half.shadow.renderer.table());
            let chains = half.shadow.renderer.skeleton().into_iter().filter(|(_, hook, _)| hook.is_some());
            let hooks = chains.map(move |(name, hook, _)| {
                let kind = hook.and_then(|hook| hook.split(' ').nth(3)).unwrap_or_default();
                Hook { kind: format!("nftables/{kind}"), target: format!("{ip} {table}"), program: name.to_owned() }
            });
            hooks.collect::<Vec<_>>()
        };
        filled.flat_map(of).collect()
    }
}

/// What the shadow holds, as a state.
fn known(shadow: &Shadow) -> DesiredState {
    DesiredState {
        frontends: shadow.frontends.clone(),
        guards: shadow.guards.clone(),
        local_cidrs: shadow.local_cidrs.clone(),
        left_pods: None,
    }
}

#[cfg(test)]
pub(crate) mod tests;
