//! What our device holds, whose that is, and what has to be there before: the kernel's settings and the device.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::IpAddr,
    sync::Arc,
};

use super::{
    Claim, Ipvs, around,
    codec::Virtual,
    device::{self, Device},
    sysctl::Settings,
    system::System,
};
use crate::{
    dataplane::Report,
    desired::{Action, Frontend, FrontendKind, FrontendSpec, Verdicts},
    model::Family,
};

/// How often it is looked again where somebody else makes the device at the same time.
const TRIES: u32 = 10;

/// The device, with what was set before us written on it, and the settings as they have to be. `alias` is what was set before, as far as it is
/// known: of a device that is gone meanwhile, for by now we have set it.
pub(super) fn ready(system: &mut dyn System, alias: &mut Option<String>, writes: &mut u64) -> Result<Device, String> {
    for _ in 0..TRIES {
        if let Some(device) = noted(system, alias, writes)? {
            if !device.up {
                system.raise(device.index).map_err(of_device)?;
                *writes += 1;
            }
            *writes += system.set().map_err(|unset| unset.to_string())?;
            return Ok(device);
        }
    }
    Err(format!("device {}: somebody makes it over and over; remove it", device::NAME))
}

fn of_device(error: io::Error) -> String {
    format!("device {}: {error}", device::NAME)
}

/// The device, with the note on it. `None`: somebody else does the same (`--init-only`, beside an agent), and it is to be looked again.
///
/// INVARIANT: nobody sets anything before the note is on the device. So what is read is what was set before if the device has no note
/// afterwards, either.
fn noted(system: &mut dyn System, alias: &mut Option<String>, writes: &mut u64) -> Result<Option<Device>, String> {
    let found = system.device().map_err(of_device)?;
    if found.as_ref().is_some_and(|device| !device.is_dummy) {
        return Err(format!(
            "device {} is there and is no dummy, so it is somebody else's; rename it, or remove it",
            device::NAME
        ));
    }
    let on_it = found.as_ref().map(|device| device.alias.as_str()).filter(|alias| Settings::is_note(alias));
    // Of what we have set nobody else can know; but they may have set more.
    let known = Settings::either(alias.as_deref().unwrap_or_default(), on_it.unwrap_or_default());
    // What the notes do not say is as it was before.
    let note = system
        .note(&known)
        .map_err(|error| format!("net/ipv4/vs: {error}; is /proc/sys/net that of this network namespace?"))?;
    let device = match found {
        // Whoever made one in its place while we were at work has noted what we had set.
        Some(device) if device.alias == note => device,
        Some(device) => {
            let is_as_found = |now: Option<Device>| now.is_some_and(|now| now.alias == device.alias);
            if !is_as_found(system.device().map_err(of_device)?) {
                return Ok(None);
            }
            system.label(device.index, &note).map_err(of_device)?;
            *writes += 1;
            device
        }
        None => match system.create(&note) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(None),
            made => {
                *writes += 1;
                made.map_err(|error| {
                    format!("device {} cannot be made: {error}; `modprobe dummy`, and CAP_NET_ADMIN", device::NAME)
                })?
            }
        },
    };
    *alias = Some(note);
    Ok(Some(device))
}

impl Ipvs {
    /// Settings and device.
    pub(super) fn prepare(&mut self, report: &mut Report) -> Result<(), String> {
        let device = ready(&mut *self.system, &mut self.alias, &mut report.writes)?;
        self.bound = self
            .system
            .addresses(device.index)
            .map_err(|error| format!("addresses of device {}: {error}", device::NAME))?;
        self.routed =
            self.system.routed(device.index).map_err(|error| format!("routes of device {}: {error}", device::NAME))?;
        self.bound.extend(&self.routed);
        self.look_around()?;
        self.device = Some(device);
        Ok(())
    }

    /// Addresses in place of routes. Not before the table is there: it masquerades whoever is given such an address as their source.
    fn hold_again(&mut self, index: u32, report: &mut Report) -> io::Result<()> {
        while let Some(addr) = self.routed.first().copied() {
            self.system.add(index, addr)?;
            self.system.let_go(index, addr)?;
            self.routed.remove(&addr);
            report.writes += 2;
        }
        Ok(())
    }

    /// Whose addresses are, anew.
    pub(super) fn look_around(&mut self) -> Result<(), String> {
        let asking = |error: io::Error| format!("the networks that this node is in: {error}");
        let (others, neighbours) = (self.system.others().map_err(asking)?, self.system.neighbours().map_err(asking)?);
        self.around.look(others, neighbours);
        Ok(())
    }

    /// Puts on our device what is held and not there yet. What could not be guarded is not: the node's own sockets would answer there.
    pub(super) fn bind(&mut self, report: &mut Report) {
        let Some(index) = self.device.as_ref().map(|device| device.index) else { return };
        if let Err(error) = self.hold_again(index, report) {
            // They lead here by their routes; the next time all of it is made anew.
            tracing::warn!(%error, "addresses of device {} that another mode had on its way out", device::NAME);
        }
        let missing: Vec<IpAddr> = self.held_for.keys().filter(|addr| !self.bound.contains(addr)).copied().collect();
        for addr in missing {
            let done = match report.failed_guards.get(&addr) {
                Some(failure) => Err(format!("{addr} cannot be guarded: {failure}")),
                None => self
                    .system
                    .add(index, addr)
                    .map_err(|error| format!("{addr} cannot be put on device {}: {error}", device::NAME)),
            };
            match done {
                Ok(()) => {
                    report.writes += 1;
                    self.bound.insert(addr);
                }
                Err(why) => {
                    let concerned = self.by_frontend.iter().filter(|(_, claim)| claim.held == Some(addr));
                    report.failed.extend(Self::all_failed(concerned.map(|(one, _)| *one), &why).failed);
                }
            }
        }
        // Only we know of the others; what is held there is tried again, and its guard with it.
        report.failed_guards.retain(|addr, _| self.guards.contains(addr) || !self.held_for.contains_key(addr));
    }

    /// The node has taken it over itself: what comes for it is not ours any more, from now on.
    pub(super) fn is_lost(&self, addr: &IpAddr) -> bool {
        !self.held_for.contains_key(addr) && self.around.is_own(addr)
    }

    /// Takes from our device what nobody holds, and no connection leads to. What became free.
    pub(super) fn unbind(&mut self, report: &mut Report) -> Vec<IpAddr> {
        let (Some(index), Some(kernel)) = (self.device.as_ref().map(|device| device.index), &self.kernel) else {
            return Vec::new();
        };
        let used = |addr: &IpAddr| {
            let leads_there = |at: &Virtual| match at {
                Virtual::At { addr: of, .. } => of == addr,
                _ if self.wanted.contains_key(at) => false,
                // One that an earlier run left does not say at which address its frontend was.
                Virtual::Marked { family, .. } => {
                    self.marked_at.get(at).map_or(*family == Family::of(*addr), |of| of == addr)
                }
            };
            kernel.keys().any(leads_there)
        };
        let is_kept = |addr: &IpAddr| {
            let addr = addr.to_string();
            self.kept.iter().any(|key| key.split(" . ").next() == Some(&addr))
        };
        let free: Vec<IpAddr> = self
            .bound
            .iter()
            .filter(|addr| !self.held_for.contains_key(addr) && !is_kept(addr))
            .filter(|addr| self.is_lost(addr) || !used(addr))
            .copied()
            .collect();
        let mut gone = Vec::new();
        for addr in free {
            let routed = if self.routed.contains(&addr) { self.system.let_go(index, addr) } else { Ok(()) };
            match routed.and_then(|()| self.system.take_off(index, addr)) {
                Ok(()) => {
                    report.writes += 1;
                    self.bound.remove(&addr);
                    self.routed.remove(&addr);
                    gone.push(addr);
                }
                Err(error) => tracing::warn!(%addr, %error, "cannot be taken off the device"),
            }
        }
        gone
    }

    /// Whether an address has come to somebody else, or back from them. That is nobody's alteration of ours.
    pub(super) fn is_other_than_thought(&mut self) -> io::Result<bool> {
        let mut now = self.around.clone();
        now.look(self.system.others()?, self.system.neighbours()?);
        now.backends = around::backends(&now.load_balancers, self.sets());
        let is_bound = |addr: &IpAddr| self.bound.contains(addr);
        let differs = |(frontend, claim): (&Frontend, &Claim)| {
            asks_whose(&claim.spec) && now.held(frontend, &claim.spec, is_bound) != Ok(claim.held)
        };
        let is_free = |(frontend, spec): (&Frontend, &Arc<FrontendSpec>)| now.held(frontend, spec, is_bound).is_ok();
        Ok(self.by_frontend.iter().any(differs) || self.refused.iter().any(is_free))
    }
}

/// Whether it matters who else has its address.
pub(super) fn asks_whose(spec: &FrontendSpec) -> bool {
    let Verdicts { pod, node, external } = spec.verdicts;
    let is_left = [pod, node, external].iter().all(|verdict| verdict.action == Action::Pass);
    is_left || matches!(spec.kind, FrontendKind::ExternalIp | FrontendKind::LoadBalancer)
}

pub(super) fn load_balancers(frontends: &BTreeMap<Frontend, Arc<FrontendSpec>>) -> BTreeSet<IpAddr> {
    let all = frontends.iter().filter(|(_, spec)| spec.kind == FrontendKind::LoadBalancer);
    all.map(|(frontend, _)| frontend.addr).collect()
}
