//! Frontends of every kind, to try out with whether a node takes the rules for them. They are never in force.

use std::{net::IpAddr, path::Path, sync::Arc};

use rustix::thread::{CapabilitySet, capabilities};

use super::{ALGORITHMS, PROTOCOLS};
use crate::{
    dataplane::DataplaneError,
    desired::{Action, Algorithm, Backend, BackendSet, Frontend, FrontendKind, FrontendSpec, Verdict, Verdicts},
    model::{Family, Port, Protocol, ServiceKey, ServicePortName},
};

/// A kernel without IPv6 is asked for none of it.
pub(crate) fn families() -> Vec<Family> {
    with_ipv6_at(Path::new("/proc/sys/net/ipv6"))
}

fn with_ipv6_at(ipv6: &Path) -> Vec<Family> {
    Family::BOTH.into_iter().filter(|family| *family == Family::V4 || ipv6.exists()).collect()
}

/// Without it there is nothing to try.
pub(crate) fn net_admin() -> Result<(), DataplaneError> {
    holds(effective(), CapabilitySet::NET_ADMIN, "NET_ADMIN", "")
}

/// The old iptables asks the kernel by a raw socket.
pub(crate) fn net_raw() -> Result<(), DataplaneError> {
    holds(effective(), CapabilitySet::NET_RAW, "NET_RAW", ", which legacy iptables wants")
}

fn effective() -> CapabilitySet {
    capabilities(None).map_or(CapabilitySet::empty(), |sets| sets.effective)
}

fn holds(held: CapabilitySet, wanted: CapabilitySet, name: &str, why: &str) -> Result<(), DataplaneError> {
    if held.contains(wanted) {
        return Ok(());
    }
    Err(DataplaneError::missing(
        format!("CAP_{name} is missing{why}"),
        format!("run as root, or add {name} to the container's capabilities"),
    ))
}

/// Documentation's addresses: they are nobody's.
pub(crate) fn addr(family: Family, last: u8) -> IpAddr {
    match family {
        Family::V4 => IpAddr::from([192, 0, 2, last]),
        Family::V6 => IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, u16::from(last)]),
    }
}

/// Each of a ServicePort of its own.
pub(crate) fn frontends(family: Family) -> Vec<(Frontend, Arc<FrontendSpec>)> {
    let verdict = |action, masquerade| Verdict { action, masquerade };
    let served = Verdicts {
        pod: verdict(Action::PickAll, false),
        node: verdict(Action::PickAll, true),
        external: verdict(Action::PickLocal, false),
    };
    let refused = Verdicts {
        pod: verdict(Action::Reject, false),
        node: verdict(Action::Reject, false),
        external: verdict(Action::Drop, false),
    };
    let mut wanted = Vec::new();
    for protocol in PROTOCOLS {
        for algorithm in ALGORITHMS {
            wanted.push((protocol, served, algorithm, None));
            wanted.push((protocol, served, algorithm, Some(60)));
        }
        wanted.push((protocol, refused, Algorithm::Random, None));
    }
    (101_u8..).zip(wanted).map(|(last, wanted)| frontend(family, last, wanted)).collect()
}

fn frontend(
    family: Family,
    last: u8,
    (protocol, verdicts, algorithm, affinity_secs): (Protocol, Verdicts, Algorithm, Option<u32>),
) -> (Frontend, Arc<FrontendSpec>) {
    let port = Port::MIN;
    let backends =
        |lasts: &[u8]| -> BackendSet { lasts.iter().map(|last| Backend { addr: addr(family, *last), port }).collect() };
    let service = ServicePortName {
        service: ServiceKey::new("default", "sample"),
        port: last.to_string().as_str().into(),
        protocol,
    };
    let spec = FrontendSpec {
        service,
        kind: FrontendKind::ClusterIp,
        all: backends(&[10, 11]),
        local: backends(&[10]),
        verdicts,
        algorithm,
        affinity_secs,
        // Together, for the kinds are many enough.
        source_ranges: affinity_secs.map(|_| Arc::from([addr(family, 2).into()])),
        pods_per_packet: false,
        alive: None,
    };
    (Frontend { addr: addr(family, last), port, protocol }, Arc::new(spec))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named() {
        let held = CapabilitySet::NET_ADMIN | CapabilitySet::NET_RAW;
        assert!(holds(held, CapabilitySet::NET_RAW, "NET_RAW", "").is_ok());
        let error = holds(CapabilitySet::NET_ADMIN, CapabilitySet::NET_RAW, "NET_RAW", ", which X wants").unwrap_err();
        assert_eq!(
            error.to_string(),
            "CAP_NET_RAW is missing, which X wants; run as root, or add NET_RAW to the container's capabilities"
        );
    }

    #[test]
    fn a_kernel_without_ipv6_is_asked_for_none() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(with_ipv6_at(dir.path()), Family::BOTH);
        assert_eq!(with_ipv6_at(&dir.path().join("none")), [Family::V4]);
    }
}
