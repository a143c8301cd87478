//! The table against a kernel of tree maps: every crash point, random faults, tampering, adoption.

use ipnet::IpNet;
use proptest::prelude::*;

use proxy_common::{
    Address as _, Be16,
    device::{DeviceValue, XdpDevice},
    frontend::{FrontendValue, Range, algorithm, flags, verdict},
    maglev, proto,
    slot::Slot,
};

use super::{ranges::Ranges, *};
use crate::{
    dataplane::ebpf::store::memory::{Fault, Memory},
    desired::{Action, Algorithm, Backend, BackendSet, FrontendKind, Verdict, Verdicts},
    model::{Protocol, ServiceKey, ServicePortName},
};

mod adoption;
mod crashes;
mod kernel;
mod local_cidrs;
mod room;
mod services;
mod sources;
mod tables;

const REST: Duration = Duration::from_secs(5);
const NOW: Duration = Duration::from_secs(100);

fn verdict_for(action: Action) -> Verdict {
    Verdict { action, masquerade: false }
}

/// The service that chooses by Maglev.
const BY_TABLE: u8 = 5;

/// Service number `service` over both families; its backends carry its number in the second octet.
fn backends(service: u8, v6: bool, members: impl IntoIterator<Item = u8>) -> BackendSet {
    let mut set: Vec<_> = members
        .into_iter()
        .map(|m| Backend {
            addr: if v6 {
                IpAddr::from([0xfd00, u16::from(service), 0, 0, 0, 0, 0, u16::from(m)])
            } else {
                IpAddr::from([10, service, 0, m])
            },
            port: 8080.try_into().unwrap(),
        })
        .collect();
    set.sort();
    set.dedup();
    set.into()
}

/// Service, IPv6, its extra frontend.
type Which = (u8, bool, bool);

/// Members, local members, whether the external verdict picks local.
type Holds = (Vec<u8>, Vec<u8>, bool);

#[derive(Clone, Debug)]
struct Model {
    frontends: BTreeMap<Which, Holds>,
    guards: BTreeSet<u8>,
}

/// The extra frontend of a service admits as many ranges as it has local members.
fn net(v6: bool, member: u8) -> IpNet {
    if v6 { format!("fd01:{member:x}::/32") } else { format!("10.200.{member}.0/24") }.parse().unwrap()
}

fn desired(model: &Model) -> DesiredState {
    let frontends = model.frontends.iter().map(|((service, v6, extra), (all, local, picks_local))| {
        let frontend = Frontend {
            addr: if *v6 {
                IpAddr::from([0xfd96, 0, 0, 0, 0, 0, u16::from(*extra), u16::from(*service)])
            } else {
                IpAddr::from([10, 96, u8::from(*extra), *service])
            },
            port: 80.try_into().unwrap(),
            protocol: Protocol::Tcp,
        };
        let spec = FrontendSpec {
            service: ServicePortName {
                service: ServiceKey::new("ns", &service.to_string()),
                port: "".into(),
                protocol: Protocol::Tcp,
            },
            kind: FrontendKind::ClusterIp,
            all: backends(*service, *v6, all.iter().copied()),
            local: backends(*service, *v6, local.iter().copied()),
            verdicts: Verdicts {
                pod: verdict_for(if all.is_empty() { Action::Reject } else { Action::PickAll }),
                node: verdict_for(Action::PickAll),
                external: verdict_for(if *picks_local { Action::PickLocal } else { Action::Drop }),
            },
            algorithm: if *service == BY_TABLE { Algorithm::Maglev } else { Algorithm::Random },
            affinity_secs: None,
            source_ranges: extra.then(|| local.iter().map(|member| net(*v6, *member)).collect()),
            pods_per_packet: false,
            alive: None,
        };
        (frontend, Arc::new(spec))
    });
    DesiredState {
        frontends: frontends.collect(),
        guards: model.guards.iter().map(|g| IpAddr::from([10, 96, 0, *g])).collect(),
        local_cidrs: model.guards.iter().map(|g| format!("10.244.{g}.0/24").parse().unwrap()).collect(),
        left_pods: Default::default(),
    }
}

/// What a program would see: by frontend, the service name, the verdicts and both sets.
type Seen = BTreeMap<(IpAddr, u16, u8), (String, [u8; 3], Vec<Backend>, Vec<Backend>)>;

/// Reads the store as a program does, and checks what must hold at every instant.
fn look<A: Family>(store: &impl Store, seen: &mut Seen) {
    let names: HashMap<u32, String> =
        store.names().unwrap().into_iter().map(|(id, name)| (id, name.as_str().to_owned())).collect();
    for (key, value) in store.frontends::<A>().unwrap() {
        assert!(value.is_sealed_for(&key));
        let at = (key.addr.to_ip(), key.port.to_host(), key.proto);
        if key.is_guard() {
            assert_eq!(value, render::guard(&key));
            seen.insert(at, (String::new(), value.verdicts, vec![], vec![]));
            continue;
        }
        let name = names.get(&value.service).expect("a frontend's service has a name").clone();
        let read = |range: Range| -> Vec<Backend> {
            Ranges::<A>::read(store, range).expect("a frontend points at live slots").to_vec()
        };
        let (all, local) = (read(value.all()), read(value.local()));
        for (range, set) in [(value.all(), &all), (value.local(), &local)] {
            let wants = value.algorithm == algorithm::MAGLEV;
            assert_eq!(range.table, if wants { maglev::index_for(set.len()) } else { 0 });
        }
        for backend in all.iter().chain(&local) {
            let owner = match backend.addr {
                IpAddr::V4(a) => u16::from(a.octets()[1]),
                IpAddr::V6(a) => a.segments()[1],
            };
            assert_eq!(name, format!("ns/{owner}"), "a frontend points at slots of its own service");
        }
        seen.insert(at, (name, value.verdicts, all, local));
    }
}

fn seen(store: &impl Store) -> Seen {
    let mut seen = Seen::new();
    look::<Ipv4Be>(store, &mut seen);
    look::<Ipv6Be>(store, &mut seen);
    seen
}

/// Whom frontends that ask admit.
type Admitted = BTreeMap<(IpAddr, u16, u8), BTreeSet<IpNet>>;

fn admitted(store: &impl Store) -> Admitted {
    let mut admitted = Admitted::new();
    look_at_sources::<Ipv4Be>(store, &mut admitted);
    look_at_sources::<Ipv6Be>(store, &mut admitted);
    admitted
}

fn look_at_sources<A: Family>(store: &impl Store, admitted: &mut Admitted) {
    let ranges = store.source_ranges::<A>().unwrap();
    for (key, value) in store.frontends::<A>().unwrap() {
        if value.flags & flags::HAS_SOURCE_RANGES != 0 {
            let own = ranges.iter().filter(|range| range.range.service == value.service);
            // The service is a part of what is matched.
            let nets = own.map(|range| IpNet::new(range.range.addr.to_ip(), (range.prefix - 32) as u8).unwrap());
            admitted.insert((key.addr.to_ip(), key.port.to_host(), key.proto), nets.collect());
        }
    }
}

fn should_admit(desired: &DesiredState) -> Admitted {
    let asking = desired.frontends.iter().filter_map(|(frontend, spec)| {
        let at = (frontend.addr, frontend.port.get(), frontend.protocol.number());
        Some((at, spec.source_ranges.as_ref()?.iter().copied().collect()))
    });
    asking.collect()
}

fn oracle(desired: &DesiredState) -> Seen {
    let mut seen = Seen::new();
    for (frontend, spec) in &desired.frontends {
        let (all, local) = render::needs(&spec.verdicts);
        let Verdicts { pod, node, external } = spec.verdicts;
        seen.insert(
            (frontend.addr, frontend.port.get(), frontend.protocol.number()),
            (
                spec.service.to_string(),
                [pod, node, external].map(render::verdict_byte),
                if all { spec.all.to_vec() } else { vec![] },
                if local { spec.local.to_vec() } else { vec![] },
            ),
        );
    }
    for guard in &desired.guards {
        seen.insert((*guard, 0, 0), (String::new(), [verdict::REJECT; 3], vec![], vec![]));
    }
    seen
}

fn model() -> impl Strategy<Value = Model> {
    let members = || prop::collection::vec(1u8..6, 0..5);
    (
        prop::collection::btree_map(
            (1u8..=BY_TABLE, any::<bool>(), any::<bool>()),
            (members(), members(), any::<bool>()),
            0..8,
        ),
        prop::collection::btree_set(1u8..5, 0..3),
    )
        .prop_map(|(frontends, guards)| Model { frontends, guards })
}

fn fresh() -> Table<Memory> {
    Table::new(Memory::new(1 << 17, 64), REST)
}

/// Opens what a dead process left.
fn reopen(table: &Table<Memory>) -> Table<Memory> {
    let mut store = table.store().clone();
    store.fault = Fault::None;
    Table::new(store, REST)
}

/// A state with a bit of everything.
fn example() -> (Model, Model) {
    let a = Model {
        frontends: [
            ((1, false, false), (vec![1, 2, 3], vec![1], true)),
            ((1, false, true), (vec![1, 2, 3], vec![1], true)),
            ((1, true, false), (vec![1, 2], vec![1, 2], true)),
            ((2, false, false), (vec![4], vec![], false)),
            ((3, false, false), (vec![], vec![], false)),
        ]
        .into(),
        guards: [1, 2].into(),
    };
    let b = Model {
        frontends: [
            ((1, false, false), (vec![2, 3, 5], vec![5], true)),
            ((1, false, true), (vec![2, 3, 5], vec![2], true)),
            ((1, true, false), (vec![1, 2], vec![1, 2], true)),
            ((3, false, false), (vec![1], vec![], false)),
            ((4, true, false), (vec![1, 3], vec![], true)),
        ]
        .into(),
        guards: [1, 3].into(),
    };
    (a, b)
}

/// One frontend over IPv4 that may be asked from `nets`.
fn filtered<A: Family>(nets: Option<&[&str]>) -> DesiredState {
    let v6 = A::LEN == 16;
    let mut state =
        desired(&Model { frontends: [((1, v6, false), (vec![1], vec![], false))].into(), guards: [].into() });
    for spec in state.frontends.values_mut() {
        let mut with = (**spec).clone();
        with.source_ranges = nets.map(|nets| nets.iter().map(|net| net.parse().unwrap()).collect());
        *spec = Arc::new(with);
    }
    state
}
