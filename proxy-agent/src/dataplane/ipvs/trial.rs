//! Whether this node can run it: a device and servers of every kind are made where nobody asks, and removed. What one left that was ended in
//! its midst is known to the next, and to `cleanup`.

use std::{collections::BTreeSet, io};

use super::{
    Ipvs,
    codec::{Request, Service, Virtual},
    device::{self, Route},
    no_ipvs, remedy,
    render::{MAGLEV, Renderer},
    socket::Socket,
    sysctl::Settings,
    system::{self, System},
};
use crate::dataplane::{
    DataplaneError,
    netfilter::{Options, lock::Lock, sample},
    nftables::{Nftables, Role},
};

impl Ipvs {
    /// `Err` says what keeps this dataplane from running here, and what to do about it.
    pub fn try_out(options: &Options) -> Result<(), DataplaneError> {
        sample::net_admin()?;
        let socket = Socket::open().map_err(no_ipvs)?;
        let settings = Settings::here().with_strict_arp(options.ipvs_strict_arp);
        settings.try_out().map_err(|unset| DataplaneError::missing(unset.what(), unset.remedy()))?;
        Nftables::try_out_as(Role::Gate, options)?;
        let route = Route::open().and_then(|route| route.try_out().map(|()| route)).map_err(|error| {
            let what = format!("no dummy device can be made ({error})");
            DataplaneError::missing(what, "`modprobe dummy`, or CONFIG_DUMMY")
        })?;
        try_servers(&mut system::Kernel { socket, route, strict_arp: options.ipvs_strict_arp }, options)
    }

    /// What a trial left that was ended in its midst, by name.
    pub fn left_by_trial() -> Result<Vec<String>, DataplaneError> {
        let device = unless_refused(Route::open().and_then(|route| route.tried()))?.flatten();
        let servers = unless_refused(left_servers())?.unwrap_or_default();
        let device = device.map(|_| format!("device {}, which a trial of IPVS left", device::TRIAL));
        let servers =
            (!servers.is_empty()).then(|| format!("{} virtual servers, which a trial of IPVS left", servers.len()));
        Ok(device.into_iter().chain(servers).collect())
    }

    /// Removes it, with no agent at work here.
    pub fn remove_left_by_trial() -> Result<(), DataplaneError> {
        let _lock = Lock::take()?;
        let route = Route::open().map_err(kernel)?;
        if let Some(device) = route.tried().map_err(kernel)? {
            route.remove(device.index).map_err(kernel)?;
        }
        if !Socket::is_loaded() {
            return Ok(());
        }
        let socket = Socket::open().map_err(no_ipvs)?;
        clear(&mut system::Kernel { socket, route, strict_arp: false }).map_err(kernel)
    }
}

fn kernel(source: io::Error) -> DataplaneError {
    DataplaneError::Kernel { what: "IPVS".into(), source }
}

/// A namespace that is not ours to ask holds nothing that could be removed.
fn unless_refused<T>(asked: io::Result<T>) -> Result<Option<T>, DataplaneError> {
    match asked {
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => Ok(None),
        asked => asked.map(Some).map_err(kernel),
    }
}

fn left_servers() -> io::Result<Vec<Virtual>> {
    if !Socket::is_loaded() {
        return Ok(Vec::new());
    }
    left(&mut system::Kernel { socket: Socket::open()?, route: Route::open()?, strict_arp: false })
}

/// Those at a trial's places that have nobody to choose. One that has is somebody else's.
fn left(system: &mut dyn System) -> io::Result<Vec<Virtual>> {
    let places: BTreeSet<Virtual> = services(&Options::default()).into_iter().map(|service| service.at).collect();
    let mut left = Vec::new();
    for Service { at, .. } in system.services()? {
        if places.contains(&at) && system.destinations(at)?.is_empty() {
            left.push(at);
        }
    }
    Ok(left)
}

/// What is gone meanwhile is gone.
fn clear(system: &mut dyn System) -> io::Result<()> {
    let requests: Vec<Request> = left(system)?.into_iter().map(Request::Remove).collect();
    system.run(&requests).map(drop)
}

pub(super) fn try_servers(system: &mut dyn System, options: &Options) -> Result<(), DataplaneError> {
    // Where another trial is under way the one takes away what the other made, and neither is hurt by that.
    clear(system).map_err(kernel)?;
    let added: Vec<Request> = services(options).into_iter().map(Request::Add).collect();
    let outcomes = system.run(&added).map_err(kernel)?;
    clear(system).map_err(kernel)?;
    let mut refused = added.iter().zip(outcomes).filter_map(|(request, outcome)| Some((request, outcome.err()?)));
    // One that was there already is somebody else's.
    match refused.find(|(_, error)| error.kind() != io::ErrorKind::AlreadyExists) {
        None => Ok(()),
        Some((request, error)) => {
            let what = format!("IPVS takes no {request:?}: {error}");
            Err(DataplaneError::missing(what, remedy(request, &error).trim_start_matches("; ")))
        }
    }
}

/// Of every family, protocol and scheduler that frontends may ask for, at documentation's addresses; at the same places whatever the options
/// are, so that they are found again. Marks of frontends are not: one stands for all of them.
pub(super) fn services(options: &Options) -> Vec<Service> {
    let renderer = Renderer { scheduler: options.ipvs_scheduler.clone(), bit: options.mark() };
    let mut all = Vec::new();
    for family in sample::families() {
        for (frontend, spec) in sample::frontends(family) {
            let servers = renderer.servers(&frontend, &spec).into_iter().map(|server| server.service);
            all.extend(servers.filter(|service| matches!(service.at, Virtual::At { .. })));
        }
        let marked = Virtual::Marked { family, mark: u32::MAX };
        let by_hash =
            Service { at: marked, scheduler: MAGLEV.into(), persistence: None, by_port: true, fallback: true };
        all.push(by_hash);
    }
    all
}

#[cfg(test)]
mod tests {
    use super::{super::render::ROUND_ROBIN, *};
    use crate::model::Protocol;

    /// What is not tried is not known.
    #[test]
    fn there_are_servers_of_every_kind() {
        let options = Options { ipvs_scheduler: "lc".into(), ..Options::default() };
        let services = services(&options);
        for scheduler in [ROUND_ROBIN, MAGLEV, "lc"] {
            assert!(services.iter().any(|service| service.scheduler == scheduler), "{scheduler}");
        }
        for wanted in [Protocol::Tcp, Protocol::Udp, Protocol::Sctp] {
            let of = |service: &&Service| matches!(service.at, Virtual::At { protocol, .. } if protocol == wanted);
            assert!(services.iter().filter(of).any(|service| service.persistence.is_some()), "{wanted}");
        }
        assert!(services.iter().any(|service| matches!(service.at, Virtual::Marked { .. })));
        let places = |services: Vec<Service>| services.into_iter().map(|service| service.at).collect::<Vec<_>>();
        let others = Options { masquerade_bit: 3, ..Options::default() };
        assert_eq!(places(services), places(super::services(&others)), "where they are is always the same");
    }
}
