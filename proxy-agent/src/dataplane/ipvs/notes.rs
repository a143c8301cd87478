//! Which virtual servers are ours: IPVS does not say, so the table has it in sets, for the next agent and for who removes all of it.

use std::{collections::BTreeSet, io};

use super::{
    Ipvs,
    codec::{Request, Virtual},
    device::{self, Device, Route},
    no_ipvs,
    servers::{Current, Kernel},
    socket::Socket,
    sysctl::Settings,
};
use crate::{
    dataplane::{
        DataplaneError, Report,
        netfilter::Options,
        nftables::{Nftables, Role, Servers},
    },
    desired::Frontend,
    model::{Family, Port},
};

impl Ipvs {
    /// What an agent left here, by name.
    pub fn remains() -> Result<Vec<String>, DataplaneError> {
        let mut found = Nftables::remains_of(Role::Gate)?;
        let device = match Route::open().and_then(|route| route.device()) {
            // A namespace that is not ours to ask holds none that could be removed.
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => None,
            device => {
                device.map_err(|source| DataplaneError::Kernel { what: format!("device {}", device::NAME), source })?
            }
        };
        let device = device.filter(|device| device.is_dummy);
        if device.is_some() {
            found.push(format!(
                "device {} with the addresses of Services, and their virtual servers (IPVS)",
                device::NAME
            ));
        }
        Ok(found)
    }

    /// Those of our servers that there are: what is wanted, at addresses that our device holds, or noted.
    pub(super) fn list(&mut self) -> Result<Kernel, String> {
        let noted = Noted(self.gate.noted().map_err(|error| error.to_string())?);
        let mut kernel = Kernel::new();
        let asking = |error: io::Error| format!("IPVS cannot be asked: {error}");
        for service in self.system.services().map_err(asking)? {
            let at = service.at;
            let is_ours = self.wanted.contains_key(&at)
                || matches!(at, Virtual::At { addr, .. } if self.bound.contains(&addr))
                || noted.has(&at)
                // The table may have been flushed.
                || self.noted.contains(&at);
            if is_ours {
                let held = self.system.destinations(at).map_err(asking)?;
                kernel.insert(at, Current::of(service, &held));
            }
        }
        Ok(kernel)
    }

    /// Writes down which servers are ours: those there are, and those that are wanted.
    pub(super) fn note(&mut self, report: &mut Report) {
        let there: Vec<Virtual> = match &self.kernel {
            Some(kernel) => kernel.keys().copied().collect(),
            // None of them is forgotten before it is known to be gone.
            None => self.noted.iter().copied().collect(),
        };
        let all: BTreeSet<Virtual> = self.wanted.keys().copied().chain(there).collect();
        self.marked_at.retain(|at, _| all.contains(at));
        for family in Family::BOTH {
            let of = |at: &&Virtual| at.family() == family;
            let come = servers(all.difference(&self.noted).filter(of));
            let gone = servers(self.noted.difference(&all).filter(of));
            self.gate.note(family, &come, &gone, report);
        }
        self.noted = all;
    }

    pub(super) fn is_kept(&self, at: &Virtual) -> bool {
        match at {
            Virtual::At { .. } => key(at).is_some_and(|key| self.kept.contains(&key)),
            // Whose a mark is cannot be told of a frontend that is not planned.
            Virtual::Marked { .. } => !self.kept.is_empty(),
        }
    }
}

fn servers<'a>(all: impl Iterator<Item = &'a Virtual>) -> Servers {
    let mut servers = Servers::default();
    for at in all {
        match at {
            Virtual::At { .. } => servers.at.extend(key(at)),
            Virtual::Marked { mark, .. } => drop(servers.marks.insert(*mark)),
        }
    }
    servers
}

/// What an agent has noted as its own.
struct Noted(Vec<(Family, Servers)>);

impl Noted {
    fn has(&self, at: &Virtual) -> bool {
        let of = |servers: &Servers| match at {
            Virtual::At { .. } => key(at).is_some_and(|key| servers.at.contains(&key)),
            Virtual::Marked { mark, .. } => servers.marks.contains(mark),
        };
        self.0.iter().any(|(family, servers)| *family == at.family() && of(servers))
    }
}

/// As the table has it.
pub(super) fn key(at: &Virtual) -> Option<String> {
    match at {
        Virtual::At { addr, port, protocol } => {
            let port = Port::new(*port)?;
            Some(Nftables::key(&Frontend { addr: *addr, port, protocol: *protocol }))
        }
        Virtual::Marked { .. } => None,
    }
}

/// Servers, addresses and settings, then the table, which says whose the servers are.
pub(super) fn remove(options: &Options) -> Result<(), DataplaneError> {
    let kernel = |what: &str| {
        let what = what.to_owned();
        move |source| DataplaneError::Kernel { what, source }
    };
    let has_table = !Nftables::remains_of(Role::Gate)?.is_empty();
    let route = Route::open().map_err(kernel("rtnetlink"))?;
    // One that is no dummy is somebody else's.
    let device = route.device().map_err(kernel(device::NAME))?.filter(|device| device.is_dummy);
    let bound = match &device {
        Some(device) => route.addresses(device.index).map_err(kernel(device::NAME))?,
        None => BTreeSet::new(),
    };
    let noted = Noted(if has_table { Nftables::noted_by(Role::Gate, options)? } else { Vec::new() });
    if has_table || device.is_some() {
        let mut socket = Socket::open().map_err(no_ipvs)?;
        let services = socket.services().map_err(kernel("IPVS"))?;
        let ours = services
            .iter()
            .map(|service| service.at)
            .filter(|at| noted.has(at) || matches!(at, Virtual::At { addr, .. } if bound.contains(addr)));
        let requests: Vec<Request> = ours.map(Request::Remove).collect();
        for outcome in socket.run(&requests).map_err(kernel("IPVS"))? {
            match outcome {
                // Somebody else was faster.
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
                outcome => outcome.map_err(kernel("a virtual server"))?,
            }
        }
    }
    if let Some(Device { index, alias, .. }) = device {
        Settings::here().restore(&alias).map_err(kernel("net/ipv4/vs"))?;
        route.remove(index).map_err(kernel(device::NAME))?;
    }
    if has_table { Nftables::remove_tables(Role::Gate) } else { Ok(()) }
}
