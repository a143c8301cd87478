//! What is in force of one family, and what turns it into something else: pure.
//!
//! ```text
//! Item, Item … ─► Shadow::draft ─► text of one transaction ─► nft ─► Shadow::commit
//! ```

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use ipnet::IpNet;

use super::render::{Collection, Element, Incarnations, Piece, Renderer, endpoint_of};
use crate::{
    dataplane::netfilter::counted::{Counted, Delta},
    desired::{Frontend, FrontendSpec},
};

/// One thing to bring about.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Item {
    /// `None`: gone.
    Frontend(Frontend, Option<Arc<FrontendSpec>>),
    Guard(IpAddr, bool),
    /// All of them.
    Pods(BTreeSet<u32>),
    LocalCidrs(BTreeSet<IpNet>),
    /// Of the many that there may be those that come, and those that go.
    Servers {
        come: Servers,
        gone: Servers,
    },
}

impl Item {
    /// All of these, and none that goes.
    pub(super) fn servers(come: Servers) -> Self {
        Self::Servers { come, gone: Servers::default() }
    }
}

/// Virtual servers of IPVS that are ours: what they are addressed to, as keys of frontends are written, and marks.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Servers {
    pub(crate) at: BTreeSet<String>,
    pub(crate) marks: BTreeSet<u32>,
}

impl Servers {
    pub(super) fn turn(&mut self, come: &Self, gone: &Self) {
        for key in &gone.at {
            self.at.remove(key);
        }
        for mark in &gone.marks {
            self.marks.remove(mark);
        }
        self.at.extend(come.at.iter().cloned());
        self.marks.extend(&come.marks);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.at.is_empty() && self.marks.is_empty()
    }

    fn has(&self, others: &Self) -> bool {
        self.at.is_superset(&others.at) && self.marks.is_superset(&others.marks)
    }

    fn has_none(&self, others: &Self) -> bool {
        self.at.is_disjoint(&others.at) && self.marks.is_disjoint(&others.marks)
    }

    /// Whether they have turned.
    pub(super) fn are(&self, come: &Self, gone: &Self) -> bool {
        self.has(come) && self.has_none(gone)
    }
}

/// See the module.
#[derive(Clone, Debug)]
pub(super) struct Shadow {
    pub(super) renderer: Renderer,
    pub(super) frontends: BTreeMap<Frontend, Arc<FrontendSpec>>,
    pub(super) guards: BTreeSet<IpAddr>,
    pub(super) pods: BTreeSet<u32>,
    pub(super) local_cidrs: BTreeSet<IpNet>,
    pub(super) servers: Servers,
    chains: Counted<String>,
    hairpin: Counted<IpAddr>,
    pub(super) incarnations: Incarnations,
    /// There are frontends that we do not know, and what they share with others must not go with those.
    pub(super) keeps: bool,
    /// What there is of those.
    pub(super) left: Left,
    /// `pods` in the kernel is of an earlier run, and not known.
    pub(super) inherits_pods: bool,
}

/// A change that is not made yet.
#[derive(Clone, Debug, Default)]
pub(super) struct Draft {
    /// Of the transaction; empty if nothing changes.
    pub(super) text: String,
    pub(super) writes: u64,
    chains: Delta<String>,
    hairpin: Delta<IpAddr>,
}

type Elements = BTreeMap<Collection, BTreeMap<String, Element>>;

/// Elements for one command: nft reads a line as a whole.
const ELEMENTS: usize = 512;

impl Shadow {
    pub(super) fn new(renderer: Renderer) -> Self {
        Self {
            renderer,
            frontends: BTreeMap::new(),
            guards: BTreeSet::new(),
            pods: BTreeSet::new(),
            local_cidrs: BTreeSet::new(),
            servers: Servers::default(),
            chains: Counted::default(),
            hairpin: Counted::default(),
            incarnations: Incarnations::default(),
            keeps: false,
            left: Left::default(),
            inherits_pods: false,
        }
    }

    /// The same, with nothing in force.
    pub(super) fn emptied(&self) -> Self {
        Self { incarnations: self.incarnations.clone(), ..Self::new(self.renderer.clone()) }
    }

    /// All that is in force.
    pub(super) fn items(&self) -> Vec<Item> {
        let Self { frontends, guards, pods, local_cidrs, servers, .. } = self;
        let frontends = frontends.iter().map(|(frontend, spec)| Item::Frontend(*frontend, Some(Arc::clone(spec))));
        let guards = guards.iter().map(|addr| Item::Guard(*addr, true));
        [Item::Pods(pods.clone()), Item::LocalCidrs(local_cidrs.clone()), Item::servers(servers.clone())]
            .into_iter()
            .chain(guards)
            .chain(frontends)
            .collect()
    }

    /// Every element that should be there.
    pub(super) fn elements(&self) -> BTreeMap<(Collection, String), Element> {
        let Self { renderer, frontends, guards, pods, local_cidrs, servers, hairpin, incarnations, left, .. } = self;
        let mut all = left.elements.clone();
        for (frontend, spec) in frontends {
            all.extend(renderer.piece(frontend, spec, incarnations).elements);
        }
        let plain = |collection, key: String| ((collection, key), Element::default());
        all.extend(guards.iter().map(|addr| plain(Collection::Guards, addr.to_string())));
        all.extend(hairpin.iter().map(|addr| plain(Collection::Hairpin, Renderer::hairpin(*addr))));
        all.extend(pods.iter().map(|index| plain(Collection::Pods, index.to_string())));
        all.extend(local_cidrs.iter().map(|net| plain(Collection::LocalCidrs, Renderer::cidr(net))));
        all.extend(servers.at.iter().map(|key| plain(Collection::Servers, key.clone())));
        all.extend(servers.marks.iter().map(|mark| plain(Collection::Marks, mark.to_string())));
        all
    }

    /// The chains that frontends need, with their rules.
    pub(super) fn rules(&self) -> BTreeMap<String, Vec<String>> {
        let Self { renderer, frontends, incarnations, .. } = self;
        frontends.iter().flat_map(|(frontend, spec)| renderer.piece(frontend, spec, incarnations).chains).collect()
    }

    /// What brings `items` about; nothing is changed.
    pub(super) fn draft(&self, items: &[Item]) -> Draft {
        let (mut add, mut delete) = (Elements::new(), Elements::new());
        let mut rules: BTreeMap<String, Vec<String>> = BTreeMap::new();
        let (mut chains, mut hairpin) = (Delta::default(), Delta::default());
        let mut flush = String::new();
        for item in items {
            match item {
                Item::Frontend(frontend, spec) => {
                    let of = |spec: Option<&Arc<FrontendSpec>>| {
                        spec.map(|spec| self.renderer.piece(frontend, spec, &self.incarnations)).unwrap_or_default()
                    };
                    let (old, new) = (of(self.frontends.get(frontend)), of(spec.as_ref()));
                    change(&old, &new, &mut add, &mut delete);
                    new.chains.keys().for_each(|name| chains.more(name.clone()));
                    old.chains.keys().for_each(|name| chains.less(name.clone()));
                    new.hairpin.iter().for_each(|addr| hairpin.more(*addr));
                    old.hairpin.iter().for_each(|addr| hairpin.less(*addr));
                    rules.extend(new.chains);
                }
                Item::Guard(addr, wanted) => {
                    if self.guards.contains(addr) != *wanted {
                        let into = if *wanted { &mut add } else { &mut delete };
                        put(into, Collection::Guards, addr.to_string());
                    }
                }
                Item::Pods(pods) => {
                    let text = |index: &u32| index.to_string();
                    let none = BTreeSet::new();
                    let known = if self.inherits_pods { &none } else { &self.pods };
                    if self.inherits_pods {
                        flush = self.flush(Collection::Pods);
                    }
                    replace((known, pods), Collection::Pods, text, (&mut add, &mut delete));
                }
                Item::LocalCidrs(cidrs) => {
                    let halves = (&mut add, &mut delete);
                    replace((&self.local_cidrs, cidrs), Collection::LocalCidrs, Renderer::cidr, halves);
                }
                Item::Servers { come, gone } => {
                    let Servers { at, marks } = &self.servers;
                    come.at.difference(at).for_each(|key| put(&mut add, Collection::Servers, key.clone()));
                    gone.at.intersection(at).for_each(|key| put(&mut delete, Collection::Servers, key.clone()));
                    let text = |mark: &u32| mark.to_string();
                    come.marks.difference(marks).for_each(|mark| put(&mut add, Collection::Marks, text(mark)));
                    gone.marks.intersection(marks).for_each(|mark| put(&mut delete, Collection::Marks, text(mark)));
                }
            }
        }
        let (come, go) = self.hairpin.turn(&hairpin);
        come.into_iter().for_each(|addr| put(&mut add, Collection::Hairpin, Renderer::hairpin(*addr)));
        if !self.keeps {
            go.into_iter().for_each(|addr| put(&mut delete, Collection::Hairpin, Renderer::hairpin(*addr)));
        }
        let (come, mut go) = self.chains.turn(&chains);
        if self.keeps {
            go.clear();
        }
        let come = come.into_iter().filter_map(|name| Some((name.as_str(), rules.get(name)?.as_slice())));
        let (text, writes) = self.transaction(come.collect(), &delete, &add, &go);
        let writes = writes + u64::from(!flush.is_empty());
        Draft { text: flush + &text, writes, chains, hairpin }
    }

    fn flush(&self, collection: Collection) -> String {
        let kind = if collection.is_map() { "map" } else { "set" };
        format!("flush {kind} {} {} {}\n", self.renderer.ip, self.renderer.table(), collection.name())
    }

    /// In this order each command finds what it refers to, and nothing refers to what goes.
    fn transaction(
        &self,
        chains: Vec<(&str, &[String])>,
        delete: &Elements,
        add: &Elements,
        gone: &[&String],
    ) -> (String, u64) {
        let (ip, table) = (self.renderer.ip, self.renderer.table());
        let mut text = String::new();
        let mut line = |words: &[&str]| {
            text.push_str(&words.concat());
            text.push('\n');
        };
        for (name, _) in &chains {
            line(&["add chain ", ip, " ", table, " ", name]);
            if self.keeps {
                // It may have stayed with its rules.
                line(&["flush chain ", ip, " ", table, " ", name]);
            }
        }
        for (name, rules) in &chains {
            for rule in *rules {
                line(&["add rule ", ip, " ", table, " ", name, " ", rule]);
            }
        }
        let mut writes = chains.len() + gone.len();
        for (verb, elements) in [("delete", delete), ("add", add)] {
            for (collection, elements) in elements {
                let words =
                    |(key, element): (&String, &Element)| if verb == "add" { element.text(key) } else { key.clone() };
                let all: Vec<String> = elements.iter().map(words).collect();
                for some in all.chunks(ELEMENTS) {
                    let head = [verb, " element ", ip, " ", table, " ", collection.name(), " { "].concat();
                    line(&[&head, &some.join(", "), " }"]);
                }
                writes += all.len();
            }
        }
        // Rules of the one may lead to the other.
        for name in gone {
            line(&["flush chain ", ip, " ", table, " ", name]);
        }
        for name in gone {
            line(&["delete chain ", ip, " ", table, " ", name]);
        }
        (text, writes as u64)
    }

    /// Chains that come with `draft`.
    pub(super) fn coming(&self, draft: &Draft) -> Vec<String> {
        self.chains.turn(&draft.chains).0.into_iter().cloned().collect()
    }

    /// The transaction of `draft`, which was made of `items`, went through.
    pub(super) fn commit(&mut self, items: &[Item], draft: Draft) {
        let Draft { text: _, writes: _, chains, hairpin } = draft;
        let (come, gone) = self.chains.turn(&chains);
        come.into_iter().for_each(|name| self.incarnations.take_up(name));
        let gone = gone.into_iter().any(|name| endpoint_of(name).is_some());
        self.chains.carry_out(chains);
        if gone {
            // With another time-out an endpoint is still there.
            self.incarnations.keep(self.chains.iter());
        }
        self.hairpin.carry_out(hairpin);
        for item in items {
            match item {
                Item::Frontend(frontend, Some(spec)) => drop(self.frontends.insert(*frontend, Arc::clone(spec))),
                Item::Frontend(frontend, None) => drop(self.frontends.remove(frontend)),
                Item::Guard(addr, true) => drop(self.guards.insert(*addr)),
                Item::Guard(addr, false) => drop(self.guards.remove(addr)),
                Item::Pods(pods) => {
                    self.pods.clone_from(pods);
                    self.inherits_pods = false;
                }
                Item::LocalCidrs(cidrs) => self.local_cidrs.clone_from(cidrs),
                Item::Servers { come, gone } => self.servers.turn(come, gone),
            }
        }
    }

    /// The refill around `draft`, which was made of `items`, went through.
    pub(super) fn refilled(&mut self, items: &[Item], draft: Draft) {
        self.commit(items, draft);
        self.incarnations.keep(self.chains.iter());
    }

    /// What makes everything of ours anew around `draft`, which was made of nothing: in one transaction, whatever was there before. Who
    /// is remembered stays so.
    pub(super) fn refill(&self, draft: &Draft, found: &Found, pods_known: bool) -> String {
        let Renderer { ip, .. } = self.renderer;
        let table = self.renderer.table();
        let mut text = format!("add table {ip} {table}\n");
        let mut line = |words: String| {
            text.push_str(&words);
            text.push('\n');
        };
        for (kind, name, definition) in self.renderer.collections() {
            line(format!("add {kind} {ip} {table} {name} {{ {definition} }}"));
        }
        let skeleton = self.renderer.skeleton();
        for (name, hook, _) in &skeleton {
            let hook = hook.map(|hook| format!(" {{ {hook} }}")).unwrap_or_default();
            line(format!("add chain {ip} {table} {name}{hook}"));
        }
        let (wanted, _) = self.chains.turn(&draft.chains);
        let is_fixed = |name: &str| skeleton.iter().any(|(fixed, _, _)| *fixed == name);
        let is_wanted = |name: &String| is_fixed(name) || wanted.contains(&name);
        if found.kept.is_empty() {
            line(format!("flush table {ip} {table}"));
            for collection in self.renderer.own_collections() {
                // Which devices are pods' may not be known yet; until it is, those of before are as good a guess as there is.
                if pods_known || collection != Collection::Pods {
                    line(self.flush(collection).trim_end().to_owned());
                }
            }
            for name in found.chains.iter().filter(|name| !is_wanted(name)) {
                line(format!("delete chain {ip} {table} {name}"));
            }
        } else {
            if pods_known {
                line(self.flush(Collection::Pods).trim_end().to_owned());
            }
            for name in found.chains.iter().filter(|name| is_wanted(name)) {
                line(format!("flush chain {ip} {table} {name}"));
            }
            for (collection, keys) in &found.stale {
                if !keys.is_empty() {
                    line(format!("delete element {ip} {table} {} {{ {} }}", collection.name(), keys.join(", ")));
                }
            }
        }
        for (name, _, rules) in &skeleton {
            for rule in rules {
                line(format!("add rule {ip} {table} {name} {rule}"));
            }
        }
        text.push_str(&draft.text);
        text
    }

    /// Takes everything of ours away.
    pub(super) fn removal(ip: &str, table: &str) -> String {
        // Deleting what is not there is an error, adding what is there is none.
        format!("add table {ip} {table}\ndelete table {ip} {table}\n")
    }
}

/// What stays of an earlier run, as it was read.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Left {
    /// Chains, and how many rules each has.
    pub(super) chains: BTreeMap<String, usize>,
    pub(super) elements: BTreeMap<(Collection, String), Element>,
}

/// What an earlier run left of one family.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Found {
    pub(super) chains: BTreeSet<String>,
    /// Frontends, by their key, that are to be left as they are: their Service cannot be read. Only then the rest is asked for.
    pub(super) kept: BTreeSet<String>,
    /// Elements that are not those frontends'.
    pub(super) stale: BTreeMap<Collection, Vec<String>>,
    /// What there will be without them.
    pub(super) left: Left,
}

fn put(into: &mut Elements, collection: Collection, key: String) {
    into.entry(collection).or_default().insert(key, Element::default());
}

fn change(old: &Piece, new: &Piece, add: &mut Elements, delete: &mut Elements) {
    for ((collection, key), element) in &old.elements {
        if new.elements.get(&(*collection, key.clone())) != Some(element) {
            put(delete, *collection, key.clone());
        }
    }
    for ((collection, key), element) in &new.elements {
        if old.elements.get(&(*collection, key.clone())) != Some(element) {
            add.entry(*collection).or_default().insert(key.clone(), element.clone());
        }
    }
}

fn replace<T: Ord>(
    (old, new): (&BTreeSet<T>, &BTreeSet<T>),
    collection: Collection,
    text: impl Fn(&T) -> String,
    (add, delete): (&mut Elements, &mut Elements),
) {
    old.difference(new).for_each(|one| put(delete, collection, text(one)));
    new.difference(old).for_each(|one| put(add, collection, text(one)));
}

#[cfg(test)]
mod tests;
