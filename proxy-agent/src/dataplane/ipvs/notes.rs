//! Which virtual servers are ours: IPVS does not say, so the table has it in sets, for the next agent and for who removes all of it.

use std::{collections::BTreeSet, io, net::IpAddr};

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
        netfilter::{
            Options,
            conntrack::{self, Entry},
        },
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

/// All that is ours, with no agent at work.
pub(super) struct Ours {
    has_table: bool,
    pub(super) route: Route,
    pub(super) device: Option<Device>,
    /// On the device.
    pub(super) bound: BTreeSet<IpAddr>,
    /// Led to it otherwise.
    pub(super) routed: BTreeSet<IpAddr>,
    /// Where there are some.
    pub(super) socket: Option<Socket>,
    pub(super) servers: BTreeSet<Virtual>,
}

pub(super) fn kernel(what: &str) -> impl FnOnce(io::Error) -> DataplaneError + use<> {
    let what = what.to_owned();
    move |source| DataplaneError::Kernel { what, source }
}

impl Ours {
    pub(super) fn find(options: &Options) -> Result<Self, DataplaneError> {
        let has_table = !Nftables::remains_of(Role::Gate)?.is_empty();
        let route = Route::open().map_err(kernel("rtnetlink"))?;
        // One that is no dummy is somebody else's.
        let device = route.device().map_err(kernel(device::NAME))?.filter(|device| device.is_dummy);
        let (bound, routed) = match &device {
            Some(device) => (
                route.addresses(device.index).map_err(kernel(device::NAME))?,
                route.routed(device.index).map_err(kernel(device::NAME))?,
            ),
            None => (BTreeSet::new(), BTreeSet::new()),
        };
        let noted = Noted(if has_table { Nftables::noted_by(Role::Gate, options)? } else { Vec::new() });
        let (mut socket, mut servers) = (None, BTreeSet::new());
        if has_table || device.is_some() {
            let all = socket.insert(Socket::open().map_err(no_ipvs)?);
            let is_held = |addr: &IpAddr| bound.contains(addr) || routed.contains(addr);
            let is_ours = |at: &Virtual| noted.has(at) || matches!(at, Virtual::At { addr, .. } if is_held(addr));
            let found = all.services().map_err(kernel("IPVS"))?.into_iter().map(|service| service.at);
            servers = found.filter(is_ours).collect();
        }
        Ok(Self { has_table, route, device, bound, routed, socket, servers })
    }

    /// What somebody else was faster with is no error.
    pub(super) fn run(&mut self, requests: &[Request]) -> Result<(), DataplaneError> {
        let Some(socket) = &mut self.socket else { return Ok(()) };
        for outcome in socket.run(requests).map_err(kernel("IPVS"))? {
            match outcome {
                Err(error) if [libc::ESRCH, libc::ENOENT].map(Some).contains(&error.raw_os_error()) => {}
                outcome => outcome.map_err(kernel("a virtual server"))?,
            }
        }
        Ok(())
    }
}

/// Servers, addresses and settings, then the table, which says whose the servers are and guards the addresses.
pub(super) fn remove(options: &Options) -> Result<(), DataplaneError> {
    let mut ours = Ours::find(options)?;
    let requests: Vec<Request> = ours.servers.iter().copied().map(Request::Remove).collect();
    ours.run(&requests)?;
    if let Err(error) = forget(&ours.servers) {
        // Without conntrack's netlink, say.
        tracing::debug!(%error, "connections that IPVS translated are not forgotten");
    }
    let Ours { has_table, route, device, bound, routed, .. } = ours;
    let mut put_back = Ok(());
    if let Some(Device { index, alias, .. }) = device {
        let mut freed = Ok(());
        for addr in bound {
            freed = freed.and(route.take_off(index, addr).map_err(kernel(&format!("{addr} of {}", device::NAME))));
        }
        for addr in routed {
            let gone = route.let_go(index, addr);
            freed = freed.and(gone.map_err(kernel(&format!("the route to {addr} by {}", device::NAME))));
        }
        // The table guards the node's own sockets as long as the node holds one of them.
        freed?;
        // Where settings are read-only the device stays, for what they were is written on it, and nothing that anybody meets.
        let restored = Settings::here().restore(&alias).map_err(kernel("net/ipv4/vs"));
        put_back = restored.and_then(|()| route.remove(index).map_err(kernel(device::NAME)));
    }
    let removed = if has_table { Nftables::remove_tables(Role::Gate) } else { Ok(()) };
    put_back.and(removed)
}

/// Has conntrack forget what IPVS translated: whoever sends on would be known for a connection that nobody translates any more, and find no
/// rule of those that serve now.
fn forget(servers: &BTreeSet<Virtual>) -> io::Result<()> {
    if servers.is_empty() {
        return Ok(());
    }
    let socket = conntrack::Socket::open()?;
    for family in Family::BOTH {
        let mut lost = Vec::new();
        socket.all_entries(family, |entry| {
            if is_of_ipvs(&entry, servers) {
                lost.push(entry);
            }
        })?;
        for entry in lost {
            socket.delete(&entry)?;
        }
    }
    Ok(())
}

fn is_of_ipvs(entry: &Entry, servers: &BTreeSet<Virtual>) -> bool {
    let Entry { protocol, asked: (addr, port), translated, zoned, .. } = entry;
    let at = Virtual::At { addr: *addr, port: port.get(), protocol: *protocol };
    entry.is_translated() && !translated && !zoned && servers.contains(&at)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Protocol;

    #[test]
    fn what_others_translate_is_not_forgotten() {
        let end = |last: u8, port: u16| (IpAddr::from([10, 96, 0, last]), Port::new(port).unwrap());
        let servers = BTreeSet::from([Virtual::At { addr: end(1, 80).0, port: 80, protocol: Protocol::Tcp }]);
        let of = |asked, answers, by_rules| is_of_ipvs(&Entry::of(Protocol::Tcp, asked, answers, by_rules), &servers);
        assert!(of(end(1, 80), end(2, 8080), false));
        assert!(!of(end(1, 80), end(2, 8080), true), "translated by rules");
        assert!(
            !of(end(1, 80), end(1, 80), false) && !of(end(2, 80), end(3, 80), false),
            "not at all, or nobody's of ours"
        );
        let mut zoned = Entry::of(Protocol::Tcp, end(1, 80), end(2, 80), false);
        zoned.zoned = true;
        assert!(!is_of_ipvs(&zoned, &servers));
    }
}
