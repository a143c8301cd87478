//! From a frontend's specification to the bytes the programs read. Pure.

use proxy_common::{
    Be16,
    frontend::{FrontendKey, FrontendValue, Range, algorithm, flags, origin, verdict},
};

use super::family::Family;
use crate::{
    desired::{Action, Algorithm, Frontend, FrontendKind, FrontendSpec, Verdict, Verdicts},
    model::Protocol,
};

/// Service id of guards: they belong to no Service, and what they refuse is counted under it.
pub(crate) const GUARD_SERVICE: u32 = u32::MAX;

/// `None` where the frontend is of the other family.
pub(crate) fn key<A: Family>(frontend: &Frontend) -> Option<FrontendKey<A>> {
    let Frontend { addr, port, protocol } = frontend;
    Some(FrontendKey::new(A::from_ip(*addr)?, Be16::from_host(port.get()), protocol.number()))
}

/// One verdict byte.
pub(crate) const fn verdict_byte(verdict: Verdict) -> u8 {
    let Verdict { action, masquerade } = verdict;
    let action = match action {
        Action::PickAll => verdict::PICK_ALL,
        Action::PickLocal => verdict::PICK_LOCAL,
        Action::Drop => verdict::DROP,
        Action::Reject => verdict::REJECT,
        Action::Pass => verdict::PASS,
    };
    if masquerade { action | verdict::MASQUERADE } else { action }
}

/// The other way, for readers.
pub(crate) const fn verdict_of(byte: u8) -> Verdict {
    let action = match byte & verdict::ACTION_MASK {
        verdict::PICK_ALL => Action::PickAll,
        verdict::PICK_LOCAL => Action::PickLocal,
        verdict::DROP => Action::Drop,
        verdict::PASS => Action::Pass,
        _ => Action::Reject,
    };
    Verdict { action, masquerade: byte & verdict::MASQUERADE != 0 }
}

const fn kind_flag(kind: FrontendKind) -> u16 {
    match kind {
        FrontendKind::ClusterIp => flags::CLUSTER_IP,
        FrontendKind::NodePort => flags::NODE_PORT,
        FrontendKind::ExternalIp => flags::EXTERNAL_IP,
        FrontendKind::LoadBalancer => flags::LOAD_BALANCER,
    }
}

const fn table_flags(range: Range, shift: u16) -> u16 {
    (range.table as u16 & flags::TABLE_MASK) << shift
}

/// The other way, for readers.
pub(crate) const fn kind_of(value: &FrontendValue) -> FrontendKind {
    match value.flags & flags::KIND_MASK {
        flags::NODE_PORT => FrontendKind::NodePort,
        flags::EXTERNAL_IP => FrontendKind::ExternalIp,
        flags::LOAD_BALANCER => FrontendKind::LoadBalancer,
        _ => FrontendKind::ClusterIp,
    }
}

pub(crate) const fn algorithm_of(byte: u8) -> Algorithm {
    match byte {
        algorithm::ROUND_ROBIN => Algorithm::RoundRobin,
        algorithm::MAGLEV => Algorithm::Maglev,
        _ => Algorithm::Random,
    }
}

/// Which sets some verdict picks from: (all, local). What none picks from needs no slots.
pub(crate) fn needs(verdicts: &Verdicts) -> (bool, bool) {
    let Verdicts { pod, node, external } = verdicts;
    let any = |action| [pod, node, external].into_iter().any(|v| v.action == action);
    (any(Action::PickAll), any(Action::PickLocal))
}

/// What a TCP connection of a pod's can be reset by.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) enum Reach {
    /// Its socket, wherever it was pointed.
    #[default]
    Sockets,
    /// Its packets alone.
    Packets,
}

/// The value of `key`, sealed.
pub(crate) fn value<A: Family>(
    key: &FrontendKey<A>,
    spec: &FrontendSpec,
    service: u32,
    all: Range,
    local: Range,
    reach: Reach,
) -> FrontendValue {
    let FrontendSpec {
        service: service_port,
        kind,
        all: _,
        local: _,
        verdicts,
        algorithm: choice,
        affinity_secs,
        source_ranges,
        pods_per_packet,
        alive,
    } = spec;
    let resets = alive.is_some() && service_port.protocol == Protocol::Tcp;
    let Verdicts { pod, node, external } = verdicts;
    let mut bytes = [0; origin::COUNT];
    for (at, verdict) in [(origin::POD, pod), (origin::NODE, node), (origin::EXTERNAL, external)] {
        if let Some(byte) = bytes.get_mut(at) {
            *byte = verdict_byte(*verdict);
        }
    }
    FrontendValue {
        all_base: all.base,
        all_count: all.count,
        all_generation: all.generation,
        local_base: local.base,
        local_count: local.count,
        local_generation: local.generation,
        service,
        verdicts: bytes,
        algorithm: match choice {
            Algorithm::Random | Algorithm::Scheduler => algorithm::RANDOM,
            Algorithm::RoundRobin => algorithm::ROUND_ROBIN,
            Algorithm::Maglev => algorithm::MAGLEV,
        },
        flags: kind_flag(*kind)
            | table_flags(all, flags::ALL_TABLE_SHIFT)
            | table_flags(local, flags::LOCAL_TABLE_SHIFT)
            | if source_ranges.is_some() { flags::HAS_SOURCE_RANGES } else { 0 }
            | if *pods_per_packet || resets && reach == Reach::Packets { flags::PODS_PER_PACKET } else { 0 },
        affinity_secs: affinity_secs.unwrap_or(0),
        seal: 0,
    }
    .sealed(key)
}

/// A guard refuses every origin (contract A48).
pub(crate) fn guard<A: Family>(key: &FrontendKey<A>) -> FrontendValue {
    FrontendValue { service: GUARD_SERVICE, verdicts: [verdict::REJECT; origin::COUNT], ..Default::default() }
        .sealed(key)
}

#[cfg(test)]
mod tests {
    use proxy_common::Ipv4Be;

    use super::*;
    use crate::{
        desired::Backend,
        model::{ServiceKey, ServicePortName},
    };

    fn spec(verdicts: Verdicts) -> FrontendSpec {
        FrontendSpec {
            service: ServicePortName {
                service: ServiceKey::new("default", "web"),
                port: "http".into(),
                protocol: Protocol::Tcp,
            },
            kind: FrontendKind::ClusterIp,
            all: [].into(),
            local: [].into(),
            verdicts,
            algorithm: Algorithm::RoundRobin,
            affinity_secs: Some(10_800),
            source_ranges: None,
            pods_per_packet: false,
            alive: None,
        }
    }

    #[test]
    fn every_field_lands_where_the_programs_read_it() {
        let pick = |action, masquerade| Verdict { action, masquerade };
        let spec = spec(Verdicts {
            pod: pick(Action::PickAll, false),
            node: pick(Action::PickLocal, true),
            external: pick(Action::Drop, false),
        });
        let frontend =
            Frontend { addr: "10.96.0.1".parse().unwrap(), port: 443.try_into().unwrap(), protocol: Protocol::Tcp };
        let at = key::<Ipv4Be>(&frontend).unwrap();
        let all = Range { base: 7, count: 2, generation: 3, table: 1 };
        let local = Range { base: 9, count: 1, generation: 4, table: 3 };
        let value = value(&at, &spec, 5, all, local, Reach::Packets);
        assert_eq!((value.all(), value.local(), value.service), (all, local, 5));
        assert_eq!(value.verdicts, [0, 0x81, 2]);
        assert_eq!((value.algorithm, value.affinity_secs), (algorithm::ROUND_ROBIN, 10_800));
        assert!(value.is_sealed_for(&at));
        assert_eq!(needs(&spec.verdicts), (true, true));
        assert_eq!(key::<proxy_common::Ipv6Be>(&frontend), None);
    }

    #[test]
    fn pods_go_per_packet_where_only_that_way_resets_them() {
        let frontend =
            Frontend { addr: "10.96.0.1".parse().unwrap(), port: 443.try_into().unwrap(), protocol: Protocol::Tcp };
        let at = key::<Ipv4Be>(&frontend).unwrap();
        let pass = Verdict { action: Action::PickAll, masquerade: false };
        let mut spec = spec(Verdicts { pod: pass, node: pass, external: pass });
        let mut per_packet = |alive: Option<&[Backend]>, protocol, reach| {
            spec.alive = alive.map(Into::into);
            spec.service.protocol = protocol;
            let value = value(&at, &spec, 5, Range::default(), Range::default(), reach);
            value.flags & flags::PODS_PER_PACKET != 0
        };
        assert!(per_packet(Some(&[]), Protocol::Tcp, Reach::Packets));
        assert!(!per_packet(Some(&[]), Protocol::Tcp, Reach::Sockets));
        assert!(!per_packet(None, Protocol::Tcp, Reach::Packets), "nothing is reset");
        assert!(!per_packet(Some(&[]), Protocol::Udp, Reach::Packets), "CONNECTED_UDP says it for all");
    }

    #[test]
    fn verdict_bytes_go_both_ways() {
        for action in [Action::PickAll, Action::PickLocal, Action::Drop, Action::Reject, Action::Pass] {
            for masquerade in [false, true] {
                let verdict = Verdict { action, masquerade };
                assert_eq!(verdict_of(verdict_byte(verdict)), verdict);
            }
        }
    }

    #[test]
    fn kinds_go_both_ways() {
        use FrontendKind::{ClusterIp, ExternalIp, LoadBalancer, NodePort};
        for kind in [ClusterIp, NodePort, ExternalIp, LoadBalancer] {
            assert_eq!(kind_of(&FrontendValue { flags: kind_flag(kind) | 0xff00, ..Default::default() }), kind);
        }
    }

    #[test]
    fn a_guard_refuses_everybody() {
        let key = FrontendKey::guard(Ipv4Be::from_octets([10, 96, 0, 1]));
        let value = guard(&key);
        assert!(value.verdicts.iter().all(|v| verdict_of(*v).action == Action::Reject));
        assert!(value.is_sealed_for(&key) && value.service != 0);
    }
}
