//! Whether this node can run it: a device and servers of every kind are made where nobody asks, and removed.

use std::io;

use super::{
    Ipvs,
    codec::{Request, Service, Virtual},
    device::Route,
    no_ipvs, remedy,
    render::{MAGLEV, Renderer},
    socket::Socket,
    sysctl::Settings,
};
use crate::dataplane::{
    DataplaneError,
    netfilter::{Options, sample},
    nftables::{Nftables, Role},
};

impl Ipvs {
    /// `Err` says what keeps this dataplane from running here, and what to do about it.
    pub fn try_out(options: &Options) -> Result<(), DataplaneError> {
        sample::net_admin()?;
        let mut socket = Socket::open().map_err(no_ipvs)?;
        let settings = Settings::here().with_strict_arp(options.ipvs_strict_arp);
        settings.try_out().map_err(|unset| DataplaneError::missing(unset.what(), unset.remedy()))?;
        Nftables::try_out_as(Role::Gate, options)?;
        Route::open().and_then(|route| route.try_out()).map_err(|error| {
            let what = format!("no dummy device can be made ({error})");
            DataplaneError::missing(what, "`modprobe dummy`, or CONFIG_DUMMY")
        })?;
        let services = services(options);
        let added: Vec<Request> = services.iter().cloned().map(Request::Add).collect();
        let kernel = |source: io::Error| DataplaneError::Kernel { what: "IPVS".into(), source };
        let outcomes = socket.run(&added).map_err(kernel)?;
        // One that was there already is somebody else's.
        let made = services.iter().zip(&outcomes).filter(|(_, outcome)| outcome.is_ok());
        let made: Vec<Request> = made.map(|(service, _)| Request::Remove(service.at)).collect();
        socket.run(&made).map_err(kernel)?;
        let mut refused = added.iter().zip(outcomes).filter_map(|(request, outcome)| Some((request, outcome.err()?)));
        match refused.find(|(_, error)| error.kind() != io::ErrorKind::AlreadyExists) {
            None => Ok(()),
            Some((request, error)) => {
                let what = format!("IPVS takes no {request:?}: {error}");
                Err(DataplaneError::missing(what, remedy(request, &error).trim_start_matches("; ")))
            }
        }
    }
}

/// Of every family, protocol and scheduler that frontends may ask for, at documentation's addresses.
fn services(options: &Options) -> Vec<Service> {
    let renderer = Renderer { scheduler: options.ipvs_scheduler.clone(), bit: options.mark() };
    let mut all = Vec::new();
    for family in sample::families() {
        for (frontend, spec) in sample::frontends(family) {
            all.extend(renderer.servers(&frontend, &spec).into_iter().map(|server| server.service));
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
    }
}
