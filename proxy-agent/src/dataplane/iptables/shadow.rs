//! What is in force of one family, and what turns it into something else: pure.
//!
//! ```text
//! Item, Item … ─► Shadow::turn ─► Patch: chains that are new or other, chains that go ─► text for iptables-restore
//! ```
//!
//! A frontend is found by its address, and so is an endpoint that was sent to itself: a long list is cut into blocks of addresses, each with a
//! chain of its own. A new connection passes a few hundred rules at most where kube-proxy's passes one for each Service, and a Service that
//! comes or goes changes one short chain.

use std::{
    collections::{BTreeMap, BTreeSet},
    iter,
    net::IpAddr,
    ops::Bound,
    sync::Arc,
};

use ipnet::IpNet;

use super::render::{
    ChainName, Jump, OPENS_NOTHING, PODS, PREFIX, Piece, Pods, Renderer, Rules, SCRATCH, Table, Tree, Unit,
};
use crate::{dataplane::netfilter::names, desired::Frontend, model::ServicePortName};

/// A list of so many addresses is not cut.
const WHOLE: usize = 32;
/// Blocks, and blocks in them, by the bits that addresses in one may differ in.
const BLOCKS: [u8; 2] = [12, 6];

/// What stands of one ServicePort.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Stand {
    Planned(Unit),
    /// As an earlier run left it: its Service cannot be read.
    Kept(Arc<Piece>),
}

/// One thing to bring about.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Item {
    /// `None`: gone.
    Unit(ServicePortName, Option<Stand>),
    Guard(IpAddr, bool),
    Pods(Pods),
    /// Health-check node ports.
    Health(BTreeSet<u16>),
}

/// See the module.
#[derive(Clone, Debug)]
pub(super) struct Shadow {
    pub(super) renderer: Renderer,
    units: BTreeMap<ServicePortName, Stand>,
    guards: BTreeSet<IpAddr>,
    pods: Pods,
    health: BTreeSet<u16>,
    /// Of each tree, by address.
    entries: BTreeMap<Tree, BTreeMap<IpAddr, BTreeMap<Frontend, Rules>>>,
    /// Endpoints, and of how many ServicePorts each is one.
    hairpin: BTreeMap<IpAddr, usize>,
}

/// What is to be written.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Patch {
    pub(super) set: BTreeMap<ChainName, Rules>,
    pub(super) gone: BTreeSet<ChainName>,
}

type Chains = BTreeMap<ChainName, Rules>;

impl Patch {
    /// Rules written and chains removed.
    pub(super) fn writes(&self) -> u64 {
        let Self { set, gone } = self;
        (set.values().map(Vec::len).sum::<usize>() + gone.len()) as u64
    }

    fn between(before: &Chains, after: Chains) -> Self {
        let gone = before.keys().filter(|name| !after.contains_key(name)).cloned().collect();
        let set = after.into_iter().filter(|(name, rules)| before.get(name) != Some(rules)).collect();
        Self { set, gone }
    }

    /// For `iptables-restore --noflush`: chains that are declared are emptied by that; what is not named stays as it is.
    pub(super) fn text(&self, jumps: &Jumps) -> String {
        self.in_order(Table::ALL, jumps)
    }

    /// The same, where most of it is that chains go. Tables go one after the other: what is not translated any more would be refused for a moment,
    /// where IPVS takes over at the node's input.
    pub(super) fn removal(&self, jumps: &Jumps) -> String {
        self.in_order([Table::Filter, Table::Nat, Table::Mangle], jumps)
    }

    fn in_order(&self, tables: [Table; 3], jumps: &Jumps) -> String {
        let Self { set, gone } = self;
        let mut text = String::new();
        for table in tables {
            let of = |name: &ChainName| name.0 == table;
            let begin = text.len();
            let mut line = |words: &[&str]| {
                text.push_str(&words.concat());
                text.push('\n');
            };
            line(&["*", table.name()]);
            for (_, chain) in set.keys().chain(gone).filter(|name| of(name)) {
                line(&[":", chain, " - [0:0]"]);
            }
            for (_, rule) in jumps.stale.iter().filter(|(one, _)| *one == table) {
                line(&["-D ", rule]);
            }
            // Each is put first: the last of them comes to stand first.
            for (_, chain, rule) in jumps.wanted.iter().rev().filter(|(one, _, _)| *one == table) {
                line(&["-I ", chain, " ", rule]);
            }
            for ((_, chain), rules) in set.iter().filter(|(name, _)| of(name)) {
                for rule in rules {
                    line(&["-A ", chain, " ", rule]);
                }
            }
            for (_, chain) in gone.iter().filter(|name| of(name)) {
                line(&["-X ", chain]);
            }
            if text.len() == begin + table.name().len() + 2 {
                text.truncate(begin);
            } else {
                text.push_str("COMMIT\n");
            }
        }
        text
    }
}

/// Rules in chains that are not ours.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Jumps {
    /// To be deleted: `CHAIN RULE`.
    pub(super) stale: Vec<(Table, String)>,
    pub(super) wanted: Vec<Jump>,
}

impl Shadow {
    pub(super) fn new(renderer: Renderer) -> Self {
        Self {
            renderer,
            units: BTreeMap::new(),
            guards: BTreeSet::new(),
            pods: Pods::Devices(BTreeSet::new()),
            health: BTreeSet::new(),
            entries: BTreeMap::new(),
            hairpin: BTreeMap::new(),
        }
    }

    pub(super) const fn units(&self) -> &BTreeMap<ServicePortName, Stand> {
        &self.units
    }

    pub(super) const fn guards(&self) -> &BTreeSet<IpAddr> {
        &self.guards
    }

    pub(super) const fn pods(&self) -> &Pods {
        &self.pods
    }

    pub(super) const fn health(&self) -> &BTreeSet<u16> {
        &self.health
    }

    /// All that is in force.
    pub(super) fn items(&self) -> Vec<Item> {
        let Self { units, guards, pods, health, .. } = self;
        let units = units.iter().map(|(service, stand)| Item::Unit(service.clone(), Some(stand.clone())));
        let guards = guards.iter().map(|addr| Item::Guard(*addr, true));
        [Item::Pods(pods.clone()), Item::Health(health.clone())].into_iter().chain(guards).chain(units).collect()
    }

    /// Every chain that should be there.
    pub(super) fn chains(&self) -> Chains {
        let Self { renderer, units, pods, health, .. } = self;
        let mut all = renderer.fixed(pods, health);
        for stand in units.values() {
            all.extend(piece(renderer, stand).chains.clone());
        }
        for tree in Tree::ALL {
            self.dispatch(tree, &self.blocks(tree).collect(), &mut all);
        }
        all
    }

    /// Brings `items` about in this value: what has to be written for it, and what would undo it here.
    pub(super) fn turn(&mut self, items: Vec<Item>) -> (Patch, Vec<Item>) {
        let mut touched: BTreeMap<Tree, BTreeSet<IpAddr>> = BTreeMap::new();
        let (mut before, mut after) = (Chains::new(), Chains::new());
        let fixed = items.iter().any(|item| matches!(item, Item::Pods(_) | Item::Health(_)));
        let mut changes = Vec::new();
        for item in items {
            match item {
                Item::Unit(service, stand) => {
                    let old = self.units.get(&service).map(|stand| piece(&self.renderer, stand)).unwrap_or_default();
                    let new = stand.as_ref().map(|stand| piece(&self.renderer, stand)).unwrap_or_default();
                    for (tree, frontend) in old.entries.keys().chain(new.entries.keys()) {
                        touched.entry(*tree).or_default().insert(frontend.addr);
                    }
                    let endpoints: BTreeSet<IpAddr> = &old.hairpin ^ &new.hairpin;
                    if !endpoints.is_empty() {
                        touched.entry(Tree::Hairpin).or_default().extend(endpoints);
                    }
                    changes.push(Change::Unit { service, stand, old, new });
                }
                Item::Guard(addr, wanted) => {
                    touched.entry(Tree::Filter).or_default().insert(addr);
                    changes.push(Change::Guard(addr, wanted));
                }
                Item::Pods(pods) => changes.push(Change::Pods(pods)),
                Item::Health(health) => changes.push(Change::Health(health)),
            }
        }
        for all in Tree::ALL {
            if all.of_pods().is_some_and(|pods| touched.contains_key(&pods)) {
                // Its first chain leads to that of pods, if there is anything.
                touched.entry(all).or_default();
            }
        }
        let blocks: BTreeMap<Tree, BTreeSet<IpNet>> = touched
            .iter()
            .map(|(tree, addrs)| {
                // Where a list may cease to be cut, or begin to be, all of it is.
                let all = self.is_at_most(WHOLE + addrs.len(), *tree).then(|| self.blocks(*tree));
                let touched = addrs.iter().map(|addr| block(*addr, BLOCKS[0]));
                (*tree, touched.chain(all.into_iter().flatten()).collect())
            })
            .collect();
        for (tree, blocks) in &blocks {
            self.dispatch(*tree, blocks, &mut before);
        }
        if fixed {
            before.extend(self.renderer.fixed(&self.pods, &self.health));
        }
        let undo = changes.into_iter().map(|change| self.carry_out(change, &mut before, &mut after)).rev().collect();
        if fixed {
            after.extend(self.renderer.fixed(&self.pods, &self.health));
        }
        for (tree, blocks) in &blocks {
            self.dispatch(*tree, blocks, &mut after);
        }
        (Patch::between(&before, after), undo)
    }

    fn carry_out(&mut self, change: Change, before: &mut Chains, after: &mut Chains) -> Item {
        match change {
            Change::Unit { service, stand, old, new } => {
                for (tree, frontend) in old.entries.keys() {
                    let addrs = self.entries.entry(*tree).or_default();
                    if let Some(there) = addrs.get_mut(&frontend.addr) {
                        there.remove(frontend);
                        if there.is_empty() {
                            addrs.remove(&frontend.addr);
                        }
                    }
                }
                for ((tree, frontend), rules) in &new.entries {
                    let addrs = self.entries.entry(*tree).or_default();
                    addrs.entry(frontend.addr).or_default().insert(*frontend, rules.clone());
                }
                for addr in &old.hairpin {
                    if let Some(count) = self.hairpin.get_mut(addr).filter(|count| **count > 1) {
                        *count -= 1;
                    } else {
                        self.hairpin.remove(addr);
                    }
                }
                for addr in &new.hairpin {
                    *self.hairpin.entry(*addr).or_default() += 1;
                }
                before.extend(old.chains.clone());
                after.extend(new.chains.clone());
                let was = match stand {
                    Some(stand) => self.units.insert(service.clone(), stand),
                    None => self.units.remove(&service),
                };
                Item::Unit(service, was)
            }
            Change::Guard(addr, wanted) => {
                let was = if wanted { !self.guards.insert(addr) } else { self.guards.remove(&addr) };
                Item::Guard(addr, was)
            }
            Change::Pods(pods) => Item::Pods(std::mem::replace(&mut self.pods, pods)),
            Change::Health(health) => Item::Health(std::mem::replace(&mut self.health, health)),
        }
    }

    /// The first address of a tree from there on: a change asks for those around it, and never for all.
    fn next(&self, tree: Tree, from: Bound<IpAddr>) -> Option<IpAddr> {
        let range = (from, Bound::Unbounded);
        let entry = self.entries.get(&tree).and_then(|addrs| addrs.range(range).next()).map(|(addr, _)| *addr);
        let other = match tree {
            Tree::Nat | Tree::NatPods | Tree::FilterPods => None,
            Tree::Filter => self.guards.range(range).next().copied(),
            Tree::Hairpin => self.hairpin.range(range).next().map(|(addr, _)| *addr),
        };
        entry.into_iter().chain(other).min()
    }

    fn addresses(&self, tree: Tree, from: Bound<IpAddr>) -> impl Iterator<Item = IpAddr> {
        iter::successors(self.next(tree, from), move |addr| self.next(tree, Bound::Excluded(*addr)))
    }

    fn is_at_most(&self, count: usize, tree: Tree) -> bool {
        self.addresses(tree, Bound::Unbounded).take(count + 1).count() <= count
    }

    /// Those that there are addresses in.
    fn blocks(&self, tree: Tree) -> impl Iterator<Item = IpNet> {
        let from = move |from| self.next(tree, from).map(|addr| block(addr, BLOCKS[0]));
        iter::successors(from(Bound::Unbounded), move |net| from(Bound::Excluded(net.broadcast())))
    }

    /// The chains that lead to the addresses of one tree: the first one, and those of `blocks`.
    fn dispatch(&self, tree: Tree, blocks: &BTreeSet<IpNet>, into: &mut Chains) {
        let mut rules = Rules::new();
        // What opens nothing is never load-balanced (F45).
        rules.extend((tree == Tree::Nat).then(|| format!("{OPENS_NOTHING} -j RETURN")));
        let of_pods = tree.of_pods().and_then(|pods| self.entries.get(&pods));
        rules.extend(of_pods.filter(|addrs| !addrs.is_empty()).map(|_| format!("-j {PODS}")));
        if self.is_at_most(WHOLE, tree) {
            rules.extend(self.addresses(tree, Bound::Unbounded).flat_map(|addr| self.rules(tree, addr)));
            into.insert((tree.table(), tree.top().to_owned()), rules);
            return;
        }
        rules.extend(self.blocks(tree).map(|net| to_block(tree, net)));
        into.insert((tree.table(), tree.top().to_owned()), rules);
        for net in blocks {
            let addrs = self.addresses(tree, Bound::Included(net.network())).take_while(|addr| net.contains(addr));
            let addrs: Vec<IpAddr> = addrs.collect();
            let name = (tree.table(), block_name(tree, *net));
            if addrs.is_empty() {
                continue;
            }
            if addrs.len() <= WHOLE {
                into.insert(name, addrs.iter().flat_map(|addr| self.rules(tree, *addr)).collect());
                continue;
            }
            let mut inner: BTreeMap<IpNet, Rules> = BTreeMap::new();
            for addr in addrs {
                inner.entry(block(addr, BLOCKS[1])).or_default().extend(self.rules(tree, addr));
            }
            into.insert(name, inner.keys().map(|net| to_block(tree, *net)).collect());
            into.extend(inner.into_iter().map(|(net, rules)| ((tree.table(), block_name(tree, net)), rules)));
        }
    }

    /// Of one address.
    fn rules(&self, tree: Tree, addr: IpAddr) -> Rules {
        let there = self.entries.get(&tree).and_then(|addrs| addrs.get(&addr));
        let further = match tree {
            Tree::Nat | Tree::NatPods | Tree::FilterPods => None,
            Tree::Filter => self.guards.contains(&addr).then(|| Renderer::guard(addr)),
            Tree::Hairpin => self.hairpin.contains_key(&addr).then(|| Renderer::hairpin(addr)),
        };
        there.into_iter().flat_map(BTreeMap::values).flatten().cloned().chain(further).collect()
    }
}

enum Change {
    Unit { service: ServicePortName, stand: Option<Stand>, old: Piece, new: Piece },
    Guard(IpAddr, bool),
    Pods(Pods),
    Health(BTreeSet<u16>),
}

fn piece(renderer: &Renderer, stand: &Stand) -> Piece {
    match stand {
        Stand::Planned(unit) => renderer.piece(unit),
        Stand::Kept(piece) => Piece::clone(piece),
    }
}

/// The addresses that differ from this one in the last `bits` only.
fn block(addr: IpAddr, bits: u8) -> IpNet {
    let whole = IpNet::from(addr);
    IpNet::new(addr, whole.max_prefix_len() - bits).map_or(whole, |net| net.trunc())
}

fn block_name(tree: Tree, net: IpNet) -> String {
    let who = match tree {
        Tree::Nat | Tree::Filter => "all",
        Tree::NatPods | Tree::FilterPods => "pods",
        Tree::Hairpin => "hairpin",
    };
    format!("{PREFIX}NET-{:016X}", names::hash([who, net.to_string().as_str()]))
}

fn to_block(tree: Tree, net: IpNet) -> String {
    format!("-d {net} -j {}", block_name(tree, net))
}

/// What takes everything of ours away that is in `chains`.
pub(super) fn removal(chains: BTreeSet<ChainName>, stale: Vec<(Table, String)>) -> String {
    Patch { set: BTreeMap::new(), gone: chains }.removal(&Jumps { stale, wanted: Vec::new() })
}

/// What puts `shadow` into chains that no packet meets, and what takes them away again.
pub(super) fn trial(shadow: &Shadow) -> (String, String) {
    let set = shadow.chains();
    let away = removal(set.keys().cloned().collect(), Vec::new());
    let there = Patch { set, gone: BTreeSet::new() }.text(&Jumps::default());
    let scratch = |text: String| text.replace(PREFIX, SCRATCH);
    (scratch(there), scratch(away))
}

#[cfg(test)]
mod tests;
