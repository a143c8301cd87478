//! One family's rules with the flavour that is used: what is in force of them, and how changes are brought about.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use super::{
    Iptables,
    flavour::{Tools, is_busy},
    observe,
    render::{ChainName, Jump, Pods, Renderer, Rules, Unit},
    save::Saved,
    shadow::{self, Item, Jumps, Patch, Shadow, Stand},
};
use crate::{
    dataplane::{
        DetectLocal, Failure, Report, held,
        netfilter::{State, sift::sift, tool::ToolError},
    },
    desired::{Changes, Frontend},
    model::{Family, ServicePortName},
};

#[derive(Debug)]
pub(super) struct Half {
    pub(super) shadow: Shadow,
    pub(super) state: State,
    /// Whose each frontend is that is in force.
    pub(super) owners: BTreeMap<Frontend, ServicePortName>,
    /// What an earlier run left was looked at.
    pub(super) met: bool,
    /// Of chains, as they were printed when they were first seen.
    pub(super) prints: BTreeMap<ChainName, u64>,
    /// Of the rules when all of them were seen to be as they should.
    pub(super) stamp: Option<u64>,
}

impl Half {
    pub(super) fn new(renderer: Renderer) -> Self {
        Self {
            shadow: Shadow::new(renderer),
            state: State::Unknown,
            owners: BTreeMap::new(),
            met: false,
            prints: BTreeMap::new(),
            stamp: None,
        }
    }

    /// It was made so a moment ago: as it is printed now it is to be printed from now on.
    fn becomes(&mut self, shadow: Shadow, state: State, tools: Tools) {
        self.shadow = shadow;
        self.state = state;
        self.prints.clear();
        if !self.jumps().is_empty()
            && let Ok(saved) = tools.save(self.shadow.renderer.family)
        {
            observe::differences(self, &saved);
        }
    }

    /// That should be there.
    pub(super) fn chains(&self) -> BTreeMap<ChainName, Rules> {
        match self.state {
            State::Filled => self.shadow.chains(),
            State::Absent => self.shadow.renderer.alone().0,
            State::Unknown => BTreeMap::new(),
        }
    }

    /// That should be there, in chains that are not ours.
    pub(super) fn jumps(&self) -> Vec<Jump> {
        match self.state {
            State::Filled => self.shadow.renderer.jumps(),
            State::Absent => self.shadow.renderer.alone().1,
            State::Unknown => Vec::new(),
        }
    }

    /// It keeps the neighbours from loopback.
    pub(super) const fn shields(&self) -> bool {
        let renderer = &self.shadow.renderer;
        match self.state {
            State::Filled => renderer.shields_loopback(),
            State::Absent => renderer.route_localnet.is_some(),
            State::Unknown => false,
        }
    }

    /// The setting is to stand.
    fn opens_loopback(&self) -> bool {
        self.state == State::Filled && self.shadow.renderer.opens_loopback()
    }

    /// The setting stands, and is not to: nobody asks for it, or there is nothing that it is asked for.
    fn is_stuck(&self) -> bool {
        let renderer = &self.shadow.renderer;
        renderer.route_localnet.is_some() && (self.state == State::Absent || !renderer.opens_loopback())
    }
}

impl Iptables {
    pub(super) fn bring_about(&mut self, at: usize, items: Vec<Item>, report: &mut Report) {
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
        // Nobody asks after the health of a family that has no Services.
        if whole.units().is_empty() && whole.guards().is_empty() && self.held.is_empty() {
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
        let noted = self.noted(&whole.renderer, saved);
        whole.renderer.route_localnet =
            if opens { noted.or_else(|| self.loopback.before()) } else { self.put_back(noted) };
        let set = whole.chains();
        let gone = saved.names().into_iter().filter(|name| !set.contains_key(name)).collect();
        let patch = Patch { set, gone };
        let jumps = Jumps { stale: saved.jumps.clone(), wanted: whole.renderer.jumps() };
        self.wrote = true;
        self.tools.restore(family, &patch.text(&jumps))?;
        if opens {
            // Not before what keeps the neighbours out, and says what it was. Why it cannot be, `settle` says.
            let _said_later = self.loopback.open();
        }
        Ok(patch.writes())
    }

    /// What `route_localnet` was: somebody may have flushed the rule in which that stands, or an earlier run noted it with the other flavour.
    fn noted(&self, renderer: &Renderer, saved: &Saved) -> Option<i32> {
        if renderer.family != Family::V4 {
            return None;
        }
        saved.route_localnet().or(renderer.route_localnet).or_else(|| self.other.as_ref()?.noted())
    }

    /// Sets `route_localnet` back to what was noted; where that fails, what was noted, by which the neighbours are kept out until it can be.
    fn put_back(&self, noted: Option<i32>) -> Option<i32> {
        let error = self.loopback.put_back(noted).err()?;
        tracing::warn!(%error, "what an earlier run set stays");
        noted
    }

    /// Sees to it that the setting is what it should be; why it is not.
    pub(super) fn settle(&mut self) -> Option<String> {
        let Self { halves, loopback, .. } = self;
        let settle = |half: &mut Half| {
            if half.opens_loopback() {
                return loopback.open();
            }
            if half.is_stuck() {
                loopback.put_back(half.shadow.renderer.route_localnet)?;
                // The rule goes when the kernel is looked at next.
                half.shadow.renderer.route_localnet = None;
                half.state = State::Unknown;
            }
            Ok(())
        };
        let troubles: Vec<_> = halves.iter_mut().filter_map(|half| settle(half).err()).collect();
        troubles.first().map(ToString::to_string)
    }

    fn refilled(&mut self, at: usize, whole: Shadow, items: &[Item], writes: u64, report: &mut Report) {
        if let Some(half) = self.halves.get_mut(at) {
            half.becomes(whole, State::Filled, self.tools);
            half.owners.clear();
            let units: Vec<Item> = half.shadow.items();
            self.landed(at, &units, writes, report);
        }
        self.landed(at, items, 0, report);
    }

    /// A family that nothing is asked of has no chains, but for the one that keeps out what a setting lets in that cannot be put back.
    fn go_without(&mut self, at: usize, mut whole: Shadow, items: &[Item], saved: &Saved, report: &mut Report) {
        let family = whole.renderer.family;
        whole.renderer.route_localnet = self.put_back(self.noted(&whole.renderer, saved));
        let Some(half) = self.halves.get_mut(at) else { return };
        let (set, wanted) = whole.renderer.alone();
        if half.state == State::Absent && half.chains() == set && saved.names().iter().eq(set.keys()) {
            half.shadow = whole;
            return self.landed(at, items, 0, report);
        }
        let gone = saved.names().into_iter().filter(|name| !set.contains_key(name)).collect();
        let patch = Patch { set, gone };
        let text = patch.removal(&Jumps { stale: saved.jumps.clone(), wanted });
        self.wrote |= !text.is_empty();
        let done = if text.is_empty() { Ok(()) } else { self.tools.restore(family, &text) };
        if let Err(error) = done {
            tracing::warn!(%error, ?family, "what nobody asks for any more stays");
            self.failures.add_one(family);
            return self.give_up(items, at, &error, report);
        }
        half.becomes(whole, State::Absent, self.tools);
        self.landed(at, items, patch.writes(), report);
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
    pub(super) fn items(&self, at: usize, changes: &Changes) -> Vec<Item> {
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

/// Whether it makes the family needed.
fn is_asked(item: &Item) -> bool {
    match item {
        Item::Unit(_, stand) => stand.is_some(),
        Item::Guard(_, wanted) => *wanted,
        Item::Pods(_) | Item::Health(_) => false,
    }
}
