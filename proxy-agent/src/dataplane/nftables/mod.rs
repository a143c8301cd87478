//! The nftables dataplane: the same verdicts as rules of a table of our own in each family.
//!
//! ```text
//! render    frontends to chains and elements; pure
//! shadow    what is in force, and the transaction that makes it something else; pure
//! observe   what `nft -j list` says of it
//! ```
//!
//! One transaction for each change and family, of what changed alone; nothing is listed to make one. One that nft refuses is
//! halved until the frontends that it is for are found, and the rest goes in. An agent that starts makes everything of ours anew, in one
//! transaction: packets meet the old rules or the new ones. Stopping leaves all in force.
//!
//! Not one for both families: the tables share nothing, and what is refused of the one is no reason for the other to wait.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt, io,
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use super::{
    Capabilities, Dataplane, DataplaneError, Drift, Failure, Fill, Hook, Report, held,
    netfilter::{
        self, ALGORITHMS, Options, PROTOCOLS,
        conntrack::{Chain, Socket, Structure},
        flows::Flows,
        lock::Lock,
        ration::Ration,
        sift::sift,
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
mod trial;

pub(crate) use former::Former;
use observe::Listed;
use render::{AFFINITY, Collection, Incarnations, Renderer};
use shadow::{Draft, Found, Item, Shadow};

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

/// What is known of one family's table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    /// Nothing: the next change makes it anew.
    Unknown,
    /// It is not there, and nothing has to be in it.
    Absent,
    /// It is what the shadow says.
    Filled,
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

/// A table that is made anew: what it is going to be.
#[derive(Debug)]
struct Fresh {
    shadow: Shadow,
    kept: BTreeSet<String>,
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
        let text = ["ip", "ip6"].map(|ip| Shadow::removal(ip, role.table())).concat();
        NFT.run(&["-f", "-"], &text).map(drop).map_err(DataplaneError::from)
    }

    /// What an agent left here, by name. A kernel that is not ours to ask, or has no nftables, holds none that could be removed.
    pub fn remains() -> Result<Vec<String>, DataplaneError> {
        Self::remains_of(Role::Whole)
    }

    pub(crate) fn remains_of(role: Role) -> Result<Vec<String>, DataplaneError> {
        let table = role.table();
        let refused = [Some(libc::EINVAL), Some(libc::EOPNOTSUPP), Some(libc::EPROTONOSUPPORT), Some(libc::EPERM)];
        let mut found = Vec::new();
        for (family, ip) in Family::BOTH.into_iter().zip(["ip", "ip6"]) {
            match Socket::open().and_then(|socket| socket.tables(family)) {
                Ok(names) => found.extend(
                    names.iter().filter(|name| *name == table).map(|_| format!("table {ip} {table} (nftables)")),
                ),
                Err(error) if refused.contains(&error.raw_os_error()) => {}
                Err(source) => return Err(DataplaneError::Kernel { what: "the tables of nftables".into(), source }),
            }
        }
        Ok(found)
    }

    /// Notes which virtual servers of a family are ours; with whatever is next brought about, if nothing of this family is in force yet.
    pub(crate) fn note(&mut self, family: Family, servers: Servers, report: &mut Report) {
        let Some(at) = Family::BOTH.into_iter().position(|one| one == family) else { return };
        let Some(half) = self.halves.get_mut(at) else { return };
        if half.state != State::Filled {
            half.shadow.servers = servers;
        } else if half.shadow.servers != servers {
            self.bring_about(at, vec![Item::Servers(servers)], report);
        }
    }

    /// What was noted, by whichever agent was here last.
    pub(crate) fn noted_by(role: Role, options: &Options) -> Result<Vec<(Family, Servers)>, DataplaneError> {
        let listed = |family| Ok((family, listed_servers(NFT, &Renderer::new(family, role, options))?));
        Family::BOTH.into_iter().map(listed).collect()
    }

    /// The same, by the one that this is.
    pub(crate) fn noted(&self) -> Result<Vec<(Family, Servers)>, DataplaneError> {
        let listed = |half: &Half| {
            let renderer = &half.shadow.renderer;
            Ok((renderer.family, listed_servers(self.nft, renderer)?))
        };
        self.halves.iter().map(listed).collect()
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

    /// Runs a transaction, and notes whether anybody else changed something meanwhile.
    fn transact(&mut self, text: &str) -> Result<(Option<u32>, Option<u32>), ToolError> {
        let before = self.netlink.generation().ok();
        self.nft.run(&["-f", "-"], text)?;
        let after = self.netlink.generation().ok();
        let alone = before.map(|before| before.wrapping_add(1)) == after;
        for half in &mut self.halves {
            half.generation = after.filter(|_| alone && half.generation.is_some() && half.generation == before);
        }
        Ok((after.filter(|_| alone), after))
    }

    fn bring_about(&mut self, at: usize, items: Vec<Item>, report: &mut Report) {
        let Some(half) = self.halves.get(at) else { return };
        match half.state {
            State::Filled => {}
            State::Absent | State::Unknown => {
                // What was kept may be known by now.
                let items = merged(&half.shadow, items);
                return self.refill(at, items, report);
            }
        }
        let items = Self::allowed(&half.kept, items, report);
        let Some(half) = self.halves.get_mut(at) else { return };
        let draft = half.shadow.draft(&items);
        if draft.text.is_empty() {
            return half.shadow.commit(&items, draft);
        }
        match self.transact(&draft.text) {
            Ok(_) => self.commit(at, &items, draft, report),
            Err(error) if !error.is_refusal() => self.give_up(at, &items, &error, report),
            Err(error) => {
                if self.is_as_it_should(at) {
                    self.sift(at, items, report);
                } else {
                    tracing::warn!(%error, "the table is not as it was left; it is made anew");
                    let Some(half) = self.halves.get_mut(at) else { return };
                    half.state = State::Unknown;
                    let items = merged(&half.shadow, items);
                    self.refill(at, items, report);
                }
            }
        }
    }

    fn commit(&mut self, at: usize, items: &[Item], draft: Draft, report: &mut Report) {
        report.writes += draft.writes;
        if let Some(half) = self.halves.get_mut(at) {
            for name in half.shadow.coming(&draft) {
                // One that cannot be read is taken for what it should be when it is seen next.
                match self.netlink.chain(half.shadow.renderer.family, self.role.table(), &name) {
                    Ok(chain) if chain.rules > 0 => drop(half.prints.insert(name, chain.print)),
                    _ => drop(half.prints.remove(&name)),
                }
            }
            half.shadow.commit(items, draft);
        }
    }

    /// Without those that concern what is held.
    fn allowed(kept: &BTreeSet<String>, mut items: Vec<Item>, report: &mut Report) -> Vec<Item> {
        if kept.is_empty() {
            return items;
        }
        items.retain(|item| match item {
            Item::Frontend(frontend, _) if kept.contains(&Renderer::frontend_key(frontend)) => {
                report.failed.insert(*frontend, held(frontend));
                false
            }
            Item::Guard(addr, false) => {
                let addr = addr.to_string();
                !kept.iter().any(|key| key.split(" . ").next() == Some(&addr))
            }
            _ => true,
        });
        items
    }

    /// All that failed; what is in force is not known. The shadow stays what it was: the next try brings about what it holds, too.
    fn give_up(&mut self, at: usize, items: &[Item], error: &ToolError, report: &mut Report) {
        if let Some(half) = self.halves.get_mut(at) {
            half.state = State::Unknown;
        }
        for item in items {
            self.fail(item, error, report);
        }
    }

    fn fail(&self, item: &Item, error: &ToolError, report: &mut Report) {
        match item {
            Item::Frontend(frontend, _) => {
                report.failed.insert(*frontend, Failure::Retry(format!("frontend {frontend}: {error}")));
            }
            Item::Guard(addr, _) => {
                report.failed_guards.insert(*addr, Failure::Retry(format!("{addr}: {error}")));
            }
            Item::LocalCidrs(_) => {
                report.failed_local_cidrs = Some(Failure::Retry(format!("addresses that tell pods: {error}")));
            }
            Item::Servers(_) => tracing::warn!(%error, "which virtual servers are ours could not be noted"),
            Item::Pods(_) => {
                let failure = |name: &String| (name.clone(), Failure::Retry(format!("device {name}: {error}")));
                report.failed_devices.extend(self.devices.iter().map(failure));
            }
        }
    }

    /// Makes everything of this family anew, with `items` in it.
    fn refill(&mut self, at: usize, items: Vec<Item>, report: &mut Report) {
        let Some(half) = self.halves.get(at) else { return };
        let found = match self.find(half) {
            Ok(found) => found,
            Err(error) => return self.give_up(at, &items, &error, report),
        };
        let kept = found.as_ref().map(|found| found.kept.clone()).unwrap_or_default();
        if !half.met {
            self.meet(&half.shadow.renderer, &kept);
        }
        let Some(half) = self.halves.get_mut(at) else { return };
        half.met = true;
        let mut shadow = half.shadow.emptied();
        for name in found.iter().flat_map(|found| &found.chains) {
            shadow.incarnations.take_up(name);
        }
        shadow.keeps = !kept.is_empty();
        shadow.left = found.as_ref().map(|found| found.left.clone()).unwrap_or_default();
        let mut items = Self::allowed(&kept, items, report);
        if self.pods.is_none() {
            shadow.inherits_pods = found.is_some();
            items.retain(|item| !matches!(item, Item::Pods(_)));
        }
        let needed = items.iter().any(|item| matches!(item, Item::Frontend(_, Some(_)) | Item::Guard(_, true)));
        if !needed && kept.is_empty() {
            return self.go_without(at, shadow, &items, found.is_some(), report);
        }
        let found = found.unwrap_or_default();
        let draft = shadow.draft(&items);
        let text = shadow.refill(&draft, &found, self.pods.is_some());
        match self.transact(&text) {
            Ok((alone, _)) => self.refilled(at, Fresh { shadow, kept }, &items, draft, alone, report),
            Err(error) if !error.is_refusal() => self.give_up(at, &items, &error, report),
            Err(error) => self.refill_anyhow(at, shadow, items, found, &error, report),
        }
    }

    /// What an earlier version left may be of another shape; or something is wrong with some of the items.
    fn refill_anyhow(
        &mut self,
        at: usize,
        shadow: Shadow,
        items: Vec<Item>,
        found: Found,
        error: &ToolError,
        report: &mut Report,
    ) {
        let pods_known = self.pods.is_some();
        let check = |items: &[Item], from_nothing: bool| {
            let draft = shadow.draft(items);
            let text = if from_nothing {
                Shadow::removal(shadow.renderer.ip, shadow.renderer.table())
                    + &shadow.refill(&draft, &Found::default(), pods_known)
            } else {
                shadow.refill(&draft, &found, pods_known)
            };
            (draft, text)
        };
        let runs = |text: &str| self.nft.run(&["-c", "-f", "-"], text).map(drop);
        let none: Vec<Item> = Vec::new();
        let from_nothing = found.kept.is_empty() && runs(&check(&none, false).1).is_err();
        if from_nothing {
            tracing::warn!(%error, "the table that an earlier run left cannot be taken up; it is replaced, clients that were remembered are not");
        }
        let sifted = sift(items, &mut |items| runs(&check(items, from_nothing).1));
        let (draft, text) = check(&sifted.good, from_nothing);
        for (item, error) in &sifted.bad {
            self.fail(item, error, report);
        }
        match self.transact(&text) {
            Ok((alone, _)) => self.refilled(at, Fresh { shadow, kept: found.kept }, &sifted.good, draft, alone, report),
            Err(error) => self.give_up(at, &sifted.good, &error, report),
        }
    }

    fn refilled(
        &mut self,
        at: usize,
        Fresh { mut shadow, kept }: Fresh,
        items: &[Item],
        draft: Draft,
        alone: Option<u32>,
        report: &mut Report,
    ) {
        report.writes += draft.writes;
        shadow.refilled(items, draft);
        if let Some(half) = self.halves.get_mut(at) {
            (half.shadow, half.kept) = (shadow, kept);
            half.state = State::Filled;
            half.generation = alone;
            let found = self.netlink.structure(half.shadow.renderer.family, self.role.table()).unwrap_or_default();
            half.prints = found.chains.into_iter().map(|(name, chain)| (name, chain.print)).collect();
        }
    }

    /// A family that nothing is asked of has no table.
    fn go_without(&mut self, at: usize, mut shadow: Shadow, items: &[Item], is_there: bool, report: &mut Report) {
        if is_there {
            let text = Shadow::removal(shadow.renderer.ip, shadow.renderer.table());
            if let Err(error) = self.transact(&text) {
                return self.give_up(at, items, &error, report);
            }
            report.writes += 1;
        }
        let draft = shadow.draft(items);
        shadow.refilled(items, draft);
        if let Some(half) = self.halves.get_mut(at) {
            (half.shadow, half.kept) = (shadow, BTreeSet::new());
            half.state = State::Absent;
        }
    }

    /// Finds the items that nft does not take, and brings the others about.
    fn sift(&mut self, at: usize, items: Vec<Item>, report: &mut Report) {
        let Some(half) = self.halves.get(at) else { return };
        let sifted = sift(items, &mut |items| {
            let draft = half.shadow.draft(items);
            if draft.text.is_empty() { Ok(()) } else { self.nft.run(&["-c", "-f", "-"], &draft.text).map(drop) }
        });
        let draft = half.shadow.draft(&sifted.good);
        for (item, error) in &sifted.bad {
            self.fail(item, error, report);
        }
        let done = if draft.text.is_empty() { Ok(()) } else { self.transact(&draft.text).map(drop) };
        match done {
            Ok(()) => self.commit(at, &sifted.good, draft, report),
            Err(error) => self.give_up(at, &sifted.good, &error, report),
        }
    }

    /// What an earlier run left; `None`: no table. Its elements are read only where some of them have to stay.
    fn find(&self, half: &Half) -> Result<Option<Found>, ToolError> {
        let Renderer { family, .. } = half.shadow.renderer;
        let Structure { chains, sets: _ } = self.structure(family)?;
        if chains.is_empty() {
            return Ok(None);
        }
        if self.held.is_empty() {
            return Ok(Some(Found { chains: chains.into_keys().collect(), ..Found::default() }));
        }
        let held: BTreeSet<String> = self.held.iter().map(ToString::to_string).collect();
        Ok(list(self.nft, &half.shadow.renderer)?.map(|listed| listed.found(chains, |service| held.contains(service))))
    }

    /// Frontends that an earlier run left: their flows go with them if they do not come again.
    fn meet(&self, renderer: &Renderer, kept: &BTreeSet<String>) {
        let mut found = BTreeSet::new();
        for collection in [Collection::Frontends, Collection::NodeFrontends] {
            match self.netlink.keys(renderer.family, renderer.table(), collection.name()) {
                Ok(keys) => found.extend(keys.iter().filter_map(|key| renderer.frontend_of(key))),
                Err(error) => tracing::warn!(%error, "UDP flows of Services that went while no agent ran may go on"),
            }
        }
        found.retain(|frontend| !kept.contains(&Renderer::frontend_key(frontend)));
        self.flows.found(found);
    }

    fn structure(&self, family: Family) -> Result<Structure, ToolError> {
        // As bad as an nft that cannot be started.
        self.netlink.structure(family, self.role.table()).map_err(|error| ToolError::Start {
            program: "nfnetlink",
            why: error.to_string(),
            remedy: "look into the kernel's log",
        })
    }

    fn is_as_it_should(&self, at: usize) -> bool {
        let Some(half) = self.halves.get(at) else { return false };
        self.structure(half.shadow.renderer.family).is_ok_and(|found| half.is_as_made(&found))
    }

    /// Devices of pods are not in force as they are known.
    fn lacks_pods(&self, half: &Half) -> bool {
        self.pods.as_ref().is_some_and(|pods| half.shadow.inherits_pods || half.shadow.pods != *pods)
    }

    /// What is wrong with this family's table, if anything.
    fn compare(&mut self, at: usize, now: u32, drift: &mut Drift) -> Result<(), ToolError> {
        let Some(half) = self.halves.get(at) else { return Ok(()) };
        let hook = format!("table {} {}", half.shadow.renderer.ip, half.shadow.renderer.table());
        match half.state {
            State::Absent => return Ok(()),
            // It failed, and that is known.
            State::Unknown => {
                drift.unfinished = true;
                return Ok(());
            }
            State::Filled => drift.unfinished |= self.lacks_pods(half),
        }
        if half.generation == Some(now) {
            return Ok(());
        }
        let found = self.structure(half.shadow.renderer.family)?;
        let Some(half) = self.halves.get_mut(at) else { return Ok(()) };
        if !half.is_as_made(&found) {
            half.state = State::Unknown;
            drift.hooks.push(hook);
            return Ok(());
        }
        half.prints = found.chains.into_iter().map(|(name, chain)| (name, chain.print)).collect();
        if !half.ration.allows(Instant::now()) {
            return Ok(());
        }
        let start = Instant::now();
        let Some(listed) = list(self.nft, &half.shadow.renderer)? else { return Ok(()) };
        let differences = listed.differences(&half.shadow);
        if differences.is_empty() {
            half.generation = Some(now);
            half.ration.for_nothing(Instant::now(), start.elapsed());
        } else {
            half.state = State::Unknown;
            drift.add(&half.shadow, &differences, hook);
        }
        Ok(())
    }
}

impl Drift {
    /// Frontends by what stands under their keys; what is nobody's alone, by the table.
    fn add(&mut self, shadow: &Shadow, differences: &BTreeSet<(Collection, String)>, table: String) {
        let by_key: BTreeMap<String, Frontend> =
            shadow.frontends.keys().map(|frontend| (Renderer::frontend_key(frontend), *frontend)).collect();
        let mut frontends = BTreeSet::new();
        let mut others = false;
        for (collection, key) in differences {
            let frontend = collection.frontend_of(key).and_then(|key| by_key.get(&key));
            match (frontend, key.parse::<IpAddr>()) {
                (Some(frontend), _) => drop(frontends.insert(*frontend)),
                (None, Ok(addr)) if *collection == Collection::Guards => self.guards.push(addr),
                (None, _) => others = true,
            }
        }
        self.frontends.extend(frontends);
        if others {
            self.hooks.push(table);
        }
    }
}

fn listed_servers(nft: Tool, renderer: &Renderer) -> Result<Servers, DataplaneError> {
    let listed = list(nft, renderer)?;
    Ok(listed.map(|listed| listed.servers()).unwrap_or_default())
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

/// Everything of the shadow, with `items` carried out; what goes is named too, so that it is known as failed when all is.
fn merged(shadow: &Shadow, items: Vec<Item>) -> Vec<Item> {
    let mut whole = shadow.clone();
    let draft = whole.draft(&items);
    whole.commit(&items, draft);
    let gone = items.into_iter().filter(|item| matches!(item, Item::Frontend(_, None) | Item::Guard(_, false)));
    whole.items().into_iter().chain(gone).collect()
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
