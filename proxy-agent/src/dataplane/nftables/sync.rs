//! How one family's table becomes what it should be, and whether it still is.
//!
//! A change is one transaction. One that nft refuses is halved until it is known what is wrong with it, where the table is as it was made;
//! where it is not, all of it is made anew.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    time::Instant,
};

use super::{
    Half, Nftables, list,
    render::{Collection, Renderer},
    shadow::{Draft, Found, Item, Shadow},
};
use crate::{
    dataplane::{
        Drift, Failure, Report, held,
        netfilter::{State, conntrack::Structure, sift::sift, tool::ToolError},
    },
    desired::Frontend,
    model::Family,
};

/// A table that is made anew: what it is going to be.
#[derive(Debug)]
struct Fresh {
    shadow: Shadow,
    kept: BTreeSet<String>,
}

impl Nftables {
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

    pub(super) fn bring_about(&mut self, at: usize, items: Vec<Item>, report: &mut Report) {
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
            Item::Servers { .. } => tracing::warn!(%error, "which virtual servers are ours could not be noted"),
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
    pub(super) fn find(&self, half: &Half) -> Result<Option<Found>, ToolError> {
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

    pub(super) fn structure(&self, family: Family) -> Result<Structure, ToolError> {
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
    pub(super) fn compare(&mut self, at: usize, now: u32, drift: &mut Drift) -> Result<(), ToolError> {
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

/// Everything of the shadow, with `items` carried out; what goes is named too, so that it is known as failed when all is.
fn merged(shadow: &Shadow, items: Vec<Item>) -> Vec<Item> {
    let mut whole = shadow.clone();
    let draft = whole.draft(&items);
    whole.commit(&items, draft);
    let gone = items.into_iter().filter(|item| matches!(item, Item::Frontend(_, None) | Item::Guard(_, false)));
    whole.items().into_iter().chain(gone).collect()
}
