//! The table against a kernel of tree maps: every crash point, random faults, tampering, adoption.

use proptest::prelude::*;
use proxy_common::{
    Address as _, Be16,
    device::DeviceValue,
    frontend::{FrontendValue, Range, algorithm, verdict},
    maglev, proto,
    slot::Slot,
};

use super::{ranges::Ranges, *};
use crate::{
    dataplane::ebpf::store::memory::{Fault, Memory},
    desired::{Action, Algorithm, Backend, BackendSet, FrontendKind, Verdict, Verdicts},
    model::{Protocol, ServiceKey, ServicePortName},
};

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
            source_ranges: None,
            alive: None,
        };
        (frontend, Arc::new(spec))
    });
    DesiredState {
        frontends: frontends.collect(),
        guards: model.guards.iter().map(|g| IpAddr::from([10, 96, 0, *g])).collect(),
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

#[test]
fn equal_sets_of_a_service_share_a_range() {
    let (a, _) = example();
    let mut table = fresh();
    assert!(table.resync(&desired(&a), NOW).is_clean());
    // 3 + 1 for both frontends of service 1, 1 for service 2; service 1 over IPv6: all and local are one range.
    assert_eq!(table.used()[2..4], [5, 2]);
    assert_eq!(seen(table.store()), oracle(&desired(&a)));
}

/// Two Services that choose by Maglev from the same set of backends, and a third that does not.
fn sharing() -> DesiredState {
    let holds = || (vec![1, 2, 3], vec![1, 2, 3], true);
    let frontends = [BY_TABLE, 1, 2].map(|service| ((service, false, false), holds()));
    let mut state = desired(&Model { frontends: frontends.into(), guards: [].into() });
    let set = backends(9, false, [1, 2, 3]);
    for (n, spec) in state.frontends.values_mut().enumerate() {
        let spec = Arc::make_mut(spec);
        (spec.all, spec.local) = (Arc::clone(&set), Arc::clone(&set));
        spec.algorithm = if n < 2 { Algorithm::Maglev } else { Algorithm::Random };
    }
    state
}

#[test]
fn equal_sets_share_a_maglev_table_across_services() {
    let state = sharing();
    let mut table = fresh();
    assert!(table.resync(&state, NOW).is_clean());
    assert_eq!(table.used()[2], 3 + 4513 + 3, "one range with a table, one without");
    let ranges = |table: &Table<Memory>| -> Vec<Range> {
        let mut frontends = table.store().frontends::<Ipv4Be>().unwrap();
        frontends.sort_by_key(|(key, _)| key.addr.octets());
        frontends.into_iter().flat_map(|(_, value)| [value.all(), value.local()]).collect()
    };
    let [first, .., last] = ranges(&table)[..] else { panic!() };
    assert_eq!(ranges(&table), [first, first, first, first, last, last]);
    assert_eq!((first.table, last.table), (1, 0));
    assert_ne!(first.base, last.base);

    // A process that finds them shares them as well.
    let mut restarted = reopen(&table);
    assert_eq!(restarted.resync(&state, NOW).writes, 0);
    assert_eq!(restarted.used(), table.used());

    // One changes its set: the other keeps the table. That goes too when the last lets go of it.
    let mut apart = state.clone();
    let (frontend, spec) = apart.frontends.first_entry().map(|e| (*e.key(), Arc::clone(e.get()))).unwrap();
    let mut spec = Arc::unwrap_or_clone(spec);
    spec.all = backends(9, false, [1, 2]);
    spec.local = Arc::clone(&spec.all);
    apart.frontends.insert(frontend, Arc::new(spec));
    assert!(restarted.resync(&apart, NOW).is_clean());
    assert_eq!(restarted.used()[2], 3 + 4513 + 2 + 4513 + 3);
    assert_eq!(ranges(&restarted)[2], first);
    assert!(restarted.resync(&DesiredState::default(), NOW).is_clean());
    assert_eq!(restarted.used(), [0; 5]);
}

/// A restarted agent looks at the table, too: one position that leads elsewhere, though to a backend of the set, and it is made anew.
#[test]
fn a_table_that_was_altered_is_not_adopted() {
    let state = sharing();
    for offset in [0, 3, 3 + 700, 3 + 1300] {
        for restart in [false, true] {
            let mut table = fresh();
            table.resync(&state, NOW);
            let range = {
                let value = table.store().frontends::<Ipv4Be>().unwrap().into_iter().map(|(_, value)| value);
                value.map(|value| value.all()).find(|range| range.table != 0).unwrap()
            };
            let at = range.base + offset;
            let slot = |index| table.store().slot::<Ipv4Be>(index);
            let other = (range.base..range.base + 3).map(slot).find(|other| *other != slot(at)).unwrap();
            table.store_mut().tamper_slot::<Ipv4Be>(at, other);
            if restart {
                table = reopen(&table);
            } else {
                assert_eq!(table.observe().unwrap().frontends.len(), 2);
            }
            let report = table.resync(&state, NOW);
            assert!(report.is_clean() && report.writes > 4513, "{offset}: {report:?}");
            assert!(table.observe().unwrap().is_empty());
            assert_eq!(reopen(&table).resync(&state, NOW).writes, 0);
        }
    }
}

/// A table of another size than this version makes of so many backends is as good as none, were it right otherwise.
#[test]
fn a_table_of_an_unknown_size_is_not_adopted() {
    const ELSEWHERE: u32 = 50_000;
    let state = sharing();
    for index in [2, 3, 4, 15] {
        let mut table = fresh();
        table.resync(&state, NOW);
        let entries = table.store().frontends::<Ipv4Be>().unwrap();
        let (key, mut value) = entries.into_iter().find(|(_, value)| value.all().table != 0).unwrap();
        let generation = value.all_generation;
        let targets: Vec<_> = (value.all_base..value.all_base + 3)
            .map(|slot| table.store().slot::<Ipv4Be>(slot).decode(generation).unwrap())
            .collect();
        let size = maglev::size(index as u8);
        let mut positions = vec![0; size as usize];
        let mut walks: Vec<_> = targets.iter().map(|target| maglev::Walk::new(*target, size.max(2))).collect();
        maglev::populate(&mut walks, &mut positions);
        let slots = targets.iter().copied().chain(positions.into_iter().map(|n| targets[usize::from(n)]));
        for (at, target) in (ELSEWHERE..).zip(slots.clone()) {
            table.store_mut().tamper_slot::<Ipv4Be>(at, Slot::encode(target, generation));
        }
        (value.all_base, value.local_base) = (ELSEWHERE, ELSEWHERE);
        value.flags = value.flags & 0xf00f | index << 4 | index << 8;
        table.store_mut().tamper(key, Some(value.sealed(&key)));
        let mut restarted = reopen(&table);
        let report = restarted.resync(&state, NOW);
        // The entry alone is written: the other Service's table is there to share.
        assert!(report.is_clean() && report.writes > 0, "{report:?}");
        assert!(restarted.observe().unwrap().is_empty());
        assert_eq!(reopen(&restarted).resync(&state, NOW).writes, 0);
    }
}

#[test]
fn a_change_of_the_algorithm_goes_to_fresh_slots() {
    let mut state =
        desired(&Model { frontends: [((1, false, false), (vec![1, 2, 3], vec![], false))].into(), guards: [].into() });
    let mut table = fresh();
    for (algorithm, used) in [
        (Algorithm::Random, 3),
        (Algorithm::Maglev, 3 + 4513),
        (Algorithm::RoundRobin, 3),
        // The slots alone tell nothing of how they are walked.
        (Algorithm::Random, 3),
    ] {
        for spec in state.frontends.values_mut() {
            Arc::make_mut(spec).algorithm = algorithm;
        }
        assert!(table.resync(&state, NOW).is_clean());
        assert_eq!(table.used()[2], used, "{algorithm:?}");
        let (_, value) = table.store().frontends::<Ipv4Be>().unwrap()[0];
        assert_eq!(render::algorithm_of(value.algorithm), algorithm);
    }
}

#[test]
fn slots_full_of_tables_name_the_remedies() {
    let mut table = Table::new(Memory::new(4600, 64), REST);
    let state = sharing();
    assert!(table.resync(&state, NOW).is_clean());
    let mut more = state.clone();
    let (frontend, spec) = desired(&Model {
        frontends: [((BY_TABLE, false, true), (vec![1, 2], vec![], false))].into(),
        guards: [].into(),
    })
    .frontends
    .pop_first()
    .unwrap();
    more.frontends.insert(frontend, spec);
    let report = table.resync(&more, NOW);
    let Some((failed, Failure::Retry(why))) = report.failed.first_key_value() else { panic!("{report:?}") };
    assert_eq!((report.failed.len(), *failed), (1, frontend));
    for word in ["slots_v4", "4515 free slots", "2 backends", "Maglev", "--map-slots", "another algorithm"] {
        assert!(why.contains(word), "{why}");
    }
    // The others serve on; and it serves as soon as it wants no table.
    assert_eq!(table.used()[2], 3 + 4513 + 3);
    Arc::make_mut(more.frontends.get_mut(&frontend).unwrap()).algorithm = Algorithm::Random;
    assert!(table.resync(&more, NOW).is_clean());
}

/// As below, with tables: their positions are slots as others are, so most of them are passed over.
#[test]
fn every_crash_point_is_safe_with_tables() {
    let model = |members: Vec<u8>, local: Vec<u8>| Model {
        frontends: [((BY_TABLE, false, false), (members, local, true)), ((1, false, false), (vec![1], vec![], false))]
            .into(),
        guards: [1].into(),
    };
    let (from, to) = (desired(&model(vec![1, 2, 3], vec![1, 2])), desired(&model(vec![2, 3, 4], vec![])));
    let prepared = || {
        let mut table = fresh();
        assert!(table.resync(&from, NOW).is_clean());
        table
    };
    let writes = prepared().apply(&from.diff(&to), NOW).writes;
    assert!(writes > 4513, "{writes}");
    for crash in (0..=writes).filter(|n| *n < 10 || n + 10 > writes || n % 61 == 0) {
        let mut table = prepared();
        table.store_mut().fault = Fault::DeadAfter(crash);
        table.apply(&from.diff(&to), NOW);
        let old_or_new = [oracle(&from), oracle(&to)];
        for (at, what) in seen(table.store()) {
            assert!(old_or_new.iter().any(|o| o.get(&at) == Some(&what)), "{at:?} is {what:?} after {crash} writes");
        }
        let mut restarted = reopen(&table);
        assert!(restarted.resync(&to, NOW).is_clean());
        assert_eq!(seen(restarted.store()), oracle(&to), "after {crash} writes");
        assert_eq!(reopen(&restarted).resync(&to, NOW).writes, 0, "after {crash} writes");
    }
}

#[test]
fn sets_that_no_verdict_picks_from_take_no_slots() {
    let mut table = fresh();
    let model = Model { frontends: [((1, false, false), (vec![1], vec![1, 2, 3], false))].into(), guards: [].into() };
    table.resync(&desired(&model), NOW);
    assert_eq!(table.used()[2], 1);
}

#[test]
fn a_restart_with_nothing_changed_writes_nothing() {
    let (a, b) = example();
    let mut table = fresh();
    table.resync(&desired(&a), NOW);
    table.resync(&desired(&b), NOW);
    assert_eq!(table.resync(&desired(&b), NOW).writes, 0, "resync");
    let mut restarted = reopen(&table);
    let report = restarted.resync(&desired(&b), NOW);
    assert!(report.is_clean());
    assert_eq!(report.writes, 0, "restart");
    assert_eq!(restarted.used(), table.used());
}

/// F26: dies after every k-th write; at each k every frontend points at live slots of its own service, and the next process
/// reaches the desired state.
#[test]
fn every_crash_point_is_safe() {
    let (a, b) = example();
    for (from, to) in [(&a, &b), (&b, &a)] {
        for changes_only in [false, true] {
            let mut crashes = 0;
            loop {
                let mut table = fresh();
                assert!(table.resync(&desired(from), NOW).is_clean());
                table.store_mut().fault = Fault::DeadAfter(crashes);
                let report = if changes_only {
                    table.apply(&desired(from).diff(&desired(to)), NOW)
                } else {
                    table.resync(&desired(to), NOW)
                };
                let old_or_new = [oracle(&desired(from)), oracle(&desired(to))];
                for (at, what) in seen(table.store()) {
                    assert!(
                        old_or_new.iter().any(|o| o.get(&at) == Some(&what)),
                        "{at:?} is {what:?} after {crashes} writes: neither old nor new"
                    );
                }
                let mut restarted = reopen(&table);
                assert!(restarted.resync(&desired(to), NOW).is_clean());
                assert_eq!(seen(restarted.store()), oracle(&desired(to)), "after {crashes} writes");
                let mut again = reopen(&restarted);
                assert_eq!(again.resync(&desired(to), NOW).writes, 0, "after {crashes} writes");
                if report.writes < crashes {
                    break;
                }
                crashes += 1;
            }
            assert!(crashes > 15, "the example takes more than {crashes} writes");
        }
    }
}

#[test]
fn a_full_frontends_map_fails_one_frontend_and_names_the_option() {
    let (a, b) = example();
    let mut table = fresh();
    table.resync(&desired(&a), NOW);
    let mut more = desired(&a);
    more.frontends.extend(desired(&b).frontends);
    table.store_mut().frontend_capacity = 6;
    let mut extra =
        desired(&Model { frontends: [((2, false, true), (vec![1], vec![], false))].into(), guards: [].into() });
    extra.frontends.extend(desired(&b).frontends.into_iter().filter(|(f, _)| f.addr.is_ipv4()));
    let report = table.apply(&Changes { set: extra.frontends.clone(), ..Default::default() }, NOW);
    assert_eq!(report.failed.len(), 1, "{:?}", report.failed);
    let (frontend, Failure::Retry(why)) = report.failed.first_key_value().unwrap() else { panic!("not a retry") };
    assert_eq!(frontend.addr, IpAddr::from([10, 96, 1, 2]));
    for word in ["10.96.1.2:80/TCP", "frontends_v4", "6 entries", "--map-frontends"] {
        assert!(why.contains(word), "{why}");
    }
    // The updates of the others landed, and the failed one left nothing behind.
    let expected = oracle(&extra);
    let mut landed = seen(table.store());
    landed.retain(|at, _| expected.contains_key(at));
    assert_eq!(landed.len(), expected.len() - 1);
    let used = table.used()[2];
    table.store_mut().frontend_capacity = 7;
    assert!(table.apply(&Changes { set: extra.frontends.clone(), ..Default::default() }, NOW).is_clean());
    assert_eq!(table.used()[2], used + 1);
}

#[test]
fn full_slots_leave_the_old_backends_serving_until_there_is_room() {
    let mut table = Table::new(Memory::new(4, 64), REST);
    let with = |members: Vec<u8>| {
        desired(&Model { frontends: [((1, false, false), (members, vec![], false))].into(), guards: [].into() })
    };
    table.resync(&with(vec![1, 2, 3]), NOW);
    let report = table.resync(&with(vec![1, 2]), NOW);
    let Some(Failure::Retry(why)) = report.failed.values().next() else { panic!("{report:?}") };
    assert!(why.contains("--map-slots") && why.contains("3 of 4 in use"), "{why}");
    assert_eq!(seen(table.store()), oracle(&with(vec![1, 2, 3])));
    assert!(table.resync(&with(vec![4]), NOW).is_clean());
    assert!(!table.resync(&with(vec![1, 2]), NOW).is_clean(), "the others rest");
    assert_eq!(table.tick(NOW, 0), Some(REST));
    assert!(table.resync(&with(vec![1, 2]), NOW + REST).is_clean());
    assert_eq!(seen(table.store()), oracle(&with(vec![1, 2])));
}

/// One frontend over IPv4 that may be asked from `nets`.
fn filtered(nets: Option<&[&str]>) -> DesiredState {
    let mut state =
        desired(&Model { frontends: [((1, false, false), (vec![1], vec![], false))].into(), guards: [].into() });
    for spec in state.frontends.values_mut() {
        let mut with = (**spec).clone();
        with.source_ranges = nets.map(|nets| nets.iter().map(|net| net.parse().unwrap()).collect());
        *spec = Arc::new(with);
    }
    state
}

fn in_trie(table: &Table<Memory>) -> Vec<(IpAddr, u32)> {
    let mut nets: Vec<_> = table.store().source_ranges::<Ipv4Be>().unwrap();
    nets.sort_by_key(|key| (proxy_common::Address::to_ip(key.range.addr), key.prefix));
    nets.into_iter().map(|key| (proxy_common::Address::to_ip(key.range.addr), key.prefix - 32)).collect()
}

fn flagged(table: &Table<Memory>) -> bool {
    let values = table.store().frontends::<Ipv4Be>().unwrap();
    values.iter().any(|(_, value)| value.flags & proxy_common::frontend::flags::HAS_SOURCE_RANGES != 0)
}

#[test]
fn source_ranges_come_before_their_frontend_and_go_after_it() {
    let net = |a: [u8; 4], prefix| (IpAddr::from(a), prefix);
    let mut table = fresh();
    assert!(table.resync(&filtered(Some(&["10.1.2.3/24", "10.1.2.0/24", "fd00::/64"])), NOW).is_clean());
    assert_eq!((in_trie(&table), flagged(&table)), (vec![net([10, 1, 2, 0], 24)], true));
    // Changed without a change of the frontend's entry.
    assert!(table.resync(&filtered(Some(&["10.2.0.0/16", "10.1.2.0/24"])), NOW).is_clean());
    assert_eq!(in_trie(&table), [net([10, 1, 2, 0], 24), net([10, 2, 0, 0], 16)]);
    assert_eq!(table.resync(&filtered(Some(&["10.2.0.0/16", "10.1.2.0/24"])), NOW).writes, 0);
    // Restart: the same, nothing written; then fewer.
    let mut restarted = reopen(&table);
    assert_eq!(restarted.resync(&filtered(Some(&["10.2.0.0/16", "10.1.2.0/24"])), NOW).writes, 0);
    assert!(restarted.resync(&filtered(Some(&["10.2.0.0/16"])), NOW).is_clean());
    assert_eq!(in_trie(&restarted), [net([10, 2, 0, 0], 16)]);
    assert!(restarted.resync(&filtered(None), NOW).is_clean());
    assert_eq!((in_trie(&restarted), flagged(&restarted)), (vec![], false));
    // Whatever instant the process dies at, a frontend that asks for ranges has them.
    for (from, to) in [(None, Some(&["10.1.0.0/16"][..])), (Some(&["10.1.0.0/16"][..]), None)] {
        for writes in 0..8 {
            let mut table = fresh();
            table.resync(&filtered(from), NOW);
            table.store_mut().fault = Fault::DeadAfter(writes);
            table.resync(&filtered(to), NOW);
            assert!(!flagged(&table) || in_trie(&table) == [net([10, 1, 0, 0], 16)], "after {writes} writes");
            let mut restarted = reopen(&table);
            assert!(restarted.resync(&filtered(to), NOW).is_clean());
            assert_eq!((in_trie(&restarted).is_empty(), flagged(&restarted)), (to.is_none(), to.is_some()));
        }
    }
}

#[test]
fn a_full_trie_fails_its_frontend_and_lost_ranges_come_back() {
    let mut table = fresh();
    table.store_mut().source_capacity = Some(1);
    let report = table.resync(&filtered(Some(&["10.1.0.0/16", "10.2.0.0/16"])), NOW);
    let Some(Failure::Retry(why)) = report.failed.values().next() else { panic!("{report:?}") };
    assert!(why.contains("--map-source-ranges"), "{why}");
    assert_eq!((in_trie(&table), flagged(&table)), (vec![], false));
    let right = filtered(Some(&["10.1.0.0/16"]));
    assert!(table.resync(&right, NOW).is_clean());
    assert!(table.observe().unwrap().frontends.is_empty());
    let service = table.store().source_ranges::<Ipv4Be>().unwrap()[0].range.service;
    let key = |addr: [u8; 4]| proxy_common::source_range::SourceRangeKey::new(service, Ipv4Be::from_octets(addr), 16);
    // Gone, or one too many.
    for (addr, there) in [([10, 1, 0, 0], false), ([10, 9, 0, 0], true)] {
        table.store_mut().tamper_source(key(addr), there);
        assert_eq!(table.observe().unwrap().frontends.len(), 1);
        assert!(table.resync(&right, NOW).is_clean());
        assert_eq!(in_trie(&table), [(IpAddr::from([10, 1, 0, 0]), 16)]);
        assert!(table.observe().unwrap().frontends.is_empty());
    }
}

#[test]
fn clients_are_forgotten_with_their_time_and_their_service() {
    let mut state = filtered(None);
    for spec in state.frontends.values_mut() {
        *spec = Arc::new(FrontendSpec { affinity_secs: Some(100), ..(**spec).clone() });
    }
    let mut table = fresh();
    table.resync(&state, NOW);
    // Service 1; and of another that has no affinity.
    table.store_mut().affinity = vec![(1, 950), (1, 880), (2, 999)];
    assert!(table.tick(NOW, 1000).is_some_and(|pause| pause <= PRUNE_EVERY));
    assert_eq!(table.store().affinity, [(1, 950)]);
    // Gone with its service, before the id comes back.
    table.resync(&DesiredState::default(), NOW);
    table.store_mut().affinity = vec![(1, 999)];
    table.tick(NOW + REST, 1000);
    assert_eq!(table.store().affinity, []);
    table.resync(&state, NOW + REST);
    assert_eq!(table.store().names.keys().collect::<Vec<_>>(), [&1]);
}

/// An id that was freed just before the agent ended leaves no trace but its clients.
#[test]
fn clients_outlive_a_restart_but_not_their_service() {
    let sticky = |state: DesiredState| {
        let mut state = state;
        for spec in state.frontends.values_mut() {
            *spec = Arc::new(FrontendSpec { affinity_secs: Some(100), ..(**spec).clone() });
        }
        state
    };
    let both = sticky(desired(&example().0));
    let mut table = fresh();
    table.resync(&both, NOW);
    let names = table.store().names.clone();
    let (one, last) = (*names.keys().next().unwrap(), *names.keys().next_back().unwrap());
    assert!(one < last);
    let gone = &names[&last];
    let mut without = both.clone();
    without.frontends.retain(|_, spec| ServiceName::new(&spec.service.to_string()) != *gone);
    table.resync(&without, NOW);
    table.store_mut().affinity = vec![(one, 999), (last, 999)];
    let mut table = reopen(&table);
    // Another Service, in the same breath.
    let mut other = both.clone();
    for spec in other.frontends.values_mut().filter(|spec| ServiceName::new(&spec.service.to_string()) == *gone) {
        let mut service = spec.service.clone();
        service.port = "another".into();
        *spec = Arc::new(FrontendSpec { service, ..(**spec).clone() });
    }
    table.resync(&other, NOW);
    assert!(table.store().names.contains_key(&last), "the id is in use again");
    table.tick(NOW, 1000);
    assert_eq!(table.store().affinity, [(one, 999)]);
}

#[test]
fn sctp_is_a_frontend_beside_tcp() {
    let mut state = desired(&example().0);
    let (frontend, spec) = state.frontends.first_key_value().map(|(f, s)| (*f, Arc::clone(s))).unwrap();
    let sctp = Frontend { protocol: Protocol::Sctp, ..frontend };
    state.frontends.insert(sctp, spec);
    let mut table = fresh();
    assert_eq!(table.resync(&state, NOW).failed.len(), 0);
    let keys = table.store().frontends::<Ipv4Be>().unwrap().into_iter().map(|(key, _)| key);
    let port = frontend.port.get();
    let of: Vec<_> = keys.filter(|k| k.addr.to_ip() == frontend.addr && k.port.to_host() == port).collect();
    assert_eq!(of.iter().filter(|key| key.proto == proto::SCTP).count(), 1, "{of:?}");
    assert_eq!(of.len(), 2);
    assert!(table.observe().unwrap().is_empty());
}

#[test]
fn tampering_is_seen_and_repaired() {
    let (a, _) = example();
    let state = desired(&a);
    let mut table = fresh();
    table.resync(&state, NOW);
    assert!(table.observe().unwrap().is_empty());

    let entries = table.store().frontends::<Ipv4Be>().unwrap();
    let at = |addr: [u8; 4]| *entries.iter().find(|(k, _)| k.addr.octets() == addr && !k.is_guard()).unwrap();
    let (gone, _) = at([10, 96, 0, 1]);
    let (altered, mut value) = at([10, 96, 0, 2]);
    value.verdicts[0] ^= 1;
    let foreign = FrontendKey { port: Be16::from_host(9999), ..gone };
    let store = table.store_mut();
    store.tamper(gone, None);
    store.tamper(altered, Some(value));
    store.tamper(foreign, Some(value));
    // A slot of the IPv6 frontend.
    let (_, v6) = store.frontends::<Ipv6Be>().unwrap()[0];
    store.tamper_slot::<Ipv6Be>(v6.all_base, Default::default());

    let drift = table.observe().unwrap();
    assert_eq!(drift.frontends.len(), 4, "{drift:?}");
    assert!(table.resync(&state, NOW).is_clean());
    assert_eq!(seen(table.store()), oracle(&state));
    assert!(table.observe().unwrap().is_empty());
    assert_eq!(reopen(&table).resync(&state, NOW).writes, 0);
}

/// A name that cannot be written is the failure of the frontends that carry it.
#[test]
fn a_name_that_cannot_be_put_back_is_its_frontends_failure() {
    let (a, _) = example();
    let state = desired(&a);
    let mut table = fresh();
    assert!(table.resync(&state, NOW).is_clean());
    let in_force = |table: &Table<Memory>| {
        (table.store().frontends::<Ipv4Be>().unwrap(), table.store().frontends::<Ipv6Be>().unwrap())
    };
    let before = in_force(&table);
    let store = table.store_mut();
    let (id, name) = store.names.pop_first().unwrap();
    store.name_capacity = Some(store.names.len());
    let of_it = |frontend: &Frontend| state.frontends[frontend].service.to_string() == name.as_str();
    for _ in 0..2 {
        let report = table.resync(&state, NOW);
        let failed: BTreeSet<_> = report.failed.keys().copied().collect();
        assert_eq!(failed, state.frontends.keys().copied().filter(of_it).collect(), "{report:?}");
        assert!(!failed.is_empty() && failed.len() < state.frontends.len());
        assert!(
            report.failed.values().all(|why| matches!(why, Failure::Retry(why) if why.contains("names"))),
            "{report:?}"
        );
        assert_eq!(in_force(&table), before, "what is in force stands");
    }
    table.store_mut().name_capacity = None;
    // As a retry does it.
    let changes = Changes { set: state.frontends.clone(), ..Changes::default() };
    let report = table.apply(&changes, NOW);
    assert!(report.is_clean() && report.writes == 1, "{report:?}");
    assert_eq!(table.store().names[&id], name);
    assert_eq!(table.resync(&state, NOW).writes, 0);
}

#[test]
fn senseless_entries_are_not_adopted_and_their_slots_rest() {
    let mut table = Table::new(Memory::new(8, 64), REST);
    let stray = FrontendKey::new(Ipv4Be::from_octets([10, 96, 9, 9]), Be16::from_host(80), 6);
    // Points at virgin slots 0..4: they must not be filled while a program may follow this entry.
    let value = FrontendValue { all_base: 0, all_count: 4, all_generation: 1, service: 7, ..Default::default() };
    table.store_mut().tamper(stray, Some(value.sealed(&stray)));
    let (a, _) = example();
    let mut state = desired(&a);
    state.frontends.retain(|f, _| f.addr == IpAddr::from([10, 96, 0, 2]));
    state.guards.clear();
    assert!(table.resync(&state, NOW).is_clean());
    assert_eq!(seen(table.store()), oracle(&state));
    let (_, value) = table.store().frontends::<Ipv4Be>().unwrap()[0];
    assert!(value.all_base >= 4, "{value:?}");
}

#[test]
fn slots_of_a_senseless_entry_stay_in_use_while_it_cannot_be_removed() {
    let mut table = Table::new(Memory::new(8, 64), REST);
    let stray = FrontendKey::new(Ipv4Be::from_octets([10, 96, 9, 9]), Be16::from_host(80), 6);
    let value = FrontendValue { all_base: 0, all_count: 4, all_generation: 1, service: 7, ..Default::default() };
    table.store_mut().tamper(stray, Some(value.sealed(&stray)));
    table.store_mut().fault = Fault::DeadAfter(0);
    table.resync(&DesiredState::default(), NOW);
    table.store_mut().fault = Fault::None;
    assert_eq!(table.used()[2], 4);
    // Long after: the entry is still there, and the store refuses writes to slots that an entry points at.
    let (a, _) = example();
    let mut state = desired(&a);
    state.frontends.retain(|f, _| f.addr == IpAddr::from([10, 96, 0, 2]));
    state.guards.clear();
    let changes = Changes { set: state.frontends.clone(), ..Default::default() };
    let later = NOW + REST * 2;
    assert!(table.apply(&changes, later).is_clean());
    let held = table.used()[2];
    assert!(table.resync(&state, later).is_clean());
    assert_eq!(seen(table.store()), oracle(&state));
    assert_eq!(table.used()[2], held - 4, "removed at last");
}

#[test]
fn a_service_leaves_no_name_behind() {
    let (a, b) = example();
    let mut table = fresh();
    table.resync(&desired(&a), NOW);
    table.resync(&desired(&b), NOW);
    let names: Vec<String> = table.store().names.values().map(|n| n.as_str().to_owned()).collect();
    assert_eq!(names.len(), 3, "{names:?}");
    table.resync(&DesiredState::default(), NOW);
    assert!(table.store().names.is_empty());
    assert_eq!(table.used(), [0; 5]);
}

proptest! {
    /// Any sequence of states, by diffs, with restarts: always the oracle, nothing leaks.
    #[test]
    fn converges_to_the_oracle(models in prop::collection::vec((model(), any::<bool>(), 0u64..7), 1..8)) {
        let mut table = fresh();
        let mut now = NOW;
        let mut current = DesiredState::default();
        for (model, restart, wait) in &models {
            now += Duration::from_secs(*wait);
            let to = desired(model);
            if *restart {
                table = reopen(&table);
                prop_assert!(table.resync(&to, now).is_clean());
            } else {
                prop_assert!(table.apply(&current.diff(&to), now).is_clean());
            }
            prop_assert_eq!(seen(table.store()), oracle(&to));
            prop_assert_eq!(table.apply(&current.diff(&to), now).writes, 0, "applying twice");
            current = to;
        }
        table.resync(&DesiredState::default(), now);
        prop_assert_eq!(table.used(), [0; 5]);
        prop_assert!(table.store().names.is_empty());
    }

    /// F25: writes fail at random; the invariants hold throughout, and all is well once the faults stop.
    #[test]
    fn random_faults_are_survived(models in prop::collection::vec(model(), 1..6), seed in 1u64.., chance in 1u8..128) {
        let mut table = fresh();
        let mut current = DesiredState::default();
        table.resync(&current, NOW);
        table.store_mut().fault = Fault::Random { state: seed, chance };
        for model in &models {
            let to = desired(model);
            table.apply(&current.diff(&to), NOW);
            seen(table.store());
            current = to;
        }
        table.store_mut().fault = Fault::None;
        prop_assert!(table.resync(&current, NOW + REST).is_clean());
        prop_assert_eq!(seen(table.store()), oracle(&current));
        let mut restarted = reopen(&table);
        prop_assert_eq!(restarted.resync(&current, NOW).writes, 0);
        prop_assert_eq!(restarted.used(), table.used(), "no leak");
    }
}

/// The same crash points in a real kernel: maps of the real kinds, pinned, written through the mapping and in batches.
mod kernel {
    use std::{fs, os::fd::AsFd, path::PathBuf};

    use proxy_common::source_range::SourceRangeKey;

    use super::*;
    use crate::dataplane::ebpf::{
        layout::{MapName, Sizes},
        maps::Maps,
        store::Result,
        sys,
    };

    /// A process that dies after so many writes: what comes after does not land.
    struct Dying {
        maps: Maps,
        left: u64,
    }

    impl Dying {
        fn live(&mut self, map: MapName) -> Result<()> {
            self.left = self
                .left
                .checked_sub(1)
                .ok_or_else(|| StoreError::Io { map, source: std::io::Error::other("dead") })?;
            Ok(())
        }
    }

    impl Store for Dying {
        fn slots<A: Family>(&self) -> u32 {
            self.maps.slots::<A>()
        }
        fn slot<A: Family>(&self, index: u32) -> A::Slot {
            self.maps.slot::<A>(index)
        }
        fn write_slot<A: Family>(&mut self, index: u32, slot: A::Slot) -> Result<()> {
            self.live(A::SLOTS)?;
            self.maps.write_slot::<A>(index, slot)
        }
        fn frontends<A: Family>(&self) -> Result<Vec<(FrontendKey<A>, FrontendValue)>> {
            self.maps.frontends::<A>()
        }
        fn put_frontends<A: Family>(
            &mut self,
            entries: &[(FrontendKey<A>, FrontendValue)],
        ) -> (usize, Option<StoreError>) {
            // A batch dies in its middle.
            let fits = usize::try_from(self.left).unwrap().min(entries.len());
            let (landed, error) = self.maps.put_frontends::<A>(&entries[..fits]);
            self.left -= landed as u64;
            let died = (fits < entries.len()).then(|| self.live(A::FRONTENDS).err()).flatten();
            (landed, error.or(died))
        }
        fn remove_frontends<A: Family>(&mut self, keys: &[FrontendKey<A>]) -> Result<()> {
            for key in keys {
                self.live(A::FRONTENDS)?;
                self.maps.remove_frontends::<A>(&[*key])?;
            }
            Ok(())
        }
        fn source_ranges<A: Family>(&self) -> Result<Vec<SourceRangeKey<A>>> {
            self.maps.source_ranges()
        }
        fn put_source_range<A: Family>(&mut self, key: &SourceRangeKey<A>) -> Result<()> {
            self.live(A::SOURCE_RANGES)?;
            self.maps.put_source_range(key)
        }
        fn remove_source_range<A: Family>(&mut self, key: &SourceRangeKey<A>) -> Result<()> {
            self.live(A::SOURCE_RANGES)?;
            self.maps.remove_source_range(key)
        }
        fn prune_affinity(&mut self, is_over: &dyn Fn(u32, u32) -> bool) -> Result<usize> {
            self.maps.prune_affinity(is_over)
        }
        fn names(&self) -> Result<Vec<(u32, ServiceName)>> {
            self.maps.names()
        }
        fn put_name(&mut self, id: u32, name: &ServiceName) -> Result<()> {
            self.live(MapName::Names)?;
            self.maps.put_name(id, name)
        }
        fn remove_name(&mut self, id: u32) -> Result<()> {
            self.live(MapName::Names)?;
            self.maps.remove_name(id)
        }
        fn remove_counters(&mut self, id: u32) -> Result<()> {
            self.live(MapName::ServiceCounters)?;
            self.maps.remove_counters(id)
        }
        fn devices(&self) -> Result<Vec<(u32, DeviceValue)>> {
            self.maps.devices()
        }
        fn put_device(&mut self, index: u32, value: &DeviceValue) -> Result<()> {
            self.maps.put_device(index, value)
        }
        fn remove_device(&mut self, index: u32) -> Result<()> {
            self.maps.remove_device(index)
        }
        fn bridges(&self) -> Result<Vec<(u32, u32)>> {
            self.maps.bridges()
        }
        fn put_bridge(&mut self, port: u32, bridge: u32) -> Result<()> {
            self.maps.put_bridge(port, bridge)
        }
        fn remove_bridge(&mut self, port: u32) -> Result<()> {
            self.maps.remove_bridge(port)
        }
        fn writes(&self) -> u64 {
            self.maps.writes()
        }
    }

    struct Pins(PathBuf);

    impl Pins {
        fn new() -> Self {
            let root = PathBuf::from(format!("/sys/fs/bpf/table-{}", std::process::id()));
            fs::create_dir(&root).unwrap();
            let pins = Self(root);
            let sizes = Sizes { frontends: 64, slots: 256, services: 64, ..Sizes::default() };
            for map in [
                MapName::FrontendsV4,
                MapName::FrontendsV6,
                MapName::SlotsV4,
                MapName::SlotsV6,
                MapName::Names,
                MapName::ServiceCounters,
                MapName::Devices,
                MapName::Bridges,
                MapName::SourceRangesV4,
                MapName::SourceRangesV6,
                MapName::AffinityV4,
                MapName::AffinityV6,
                MapName::Meta,
            ] {
                let fd = sys::create(map.as_str(), map.info(&sizes)).unwrap();
                sys::pin(fd.as_fd(), &pins.0.join(map.as_str())).unwrap();
            }
            pins
        }

        fn open(&self, left: u64) -> Table<Dying> {
            let maps = Maps::open(|map| self.0.join(map.as_str())).unwrap();
            Table::new(Dying { maps, left }, REST)
        }
    }

    impl Drop for Pins {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn every_crash_point_is_safe_in_the_kernel() {
        if !rustix::process::geteuid().is_root() {
            println!("SKIP every_crash_point_is_safe_in_the_kernel: not root");
            return;
        }
        if !crate::dataplane::ebpf::pins::is_on_bpffs(std::path::Path::new("/sys/fs/bpf")).unwrap_or(false) {
            println!("SKIP every_crash_point_is_safe_in_the_kernel: bpffs is not mounted at /sys/fs/bpf");
            return;
        }
        let (a, b) = example();
        let (from, to) = (desired(&a), desired(&b));
        let old_or_new = [oracle(&from), oracle(&to)];
        let mut crashes = 0;
        loop {
            let pins = Pins::new();
            assert!(pins.open(u64::MAX).resync(&from, NOW).is_clean());
            let mut dying = pins.open(crashes);
            let writes = dying.resync(&to, NOW).writes;
            for (at, what) in seen(dying.store()) {
                assert!(
                    old_or_new.iter().any(|o| o.get(&at) == Some(&what)),
                    "{at:?} after {crashes} writes: {what:?}"
                );
            }
            let mut restarted = pins.open(u64::MAX);
            assert!(restarted.resync(&to, NOW).is_clean());
            assert_eq!(seen(restarted.store()), oracle(&to), "after {crashes} writes");
            assert!(restarted.observe().unwrap().is_empty());
            assert_eq!(pins.open(u64::MAX).resync(&to, NOW).writes, 0, "after {crashes} writes");
            if writes < crashes {
                break;
            }
            crashes += 1;
        }
        assert!(crashes > 15, "the example takes more than {crashes} writes");
    }
}

/// What is held survives adoption by another process, whatever is desired; let go, it follows.
#[test]
fn what_is_held_stays_as_it_is() {
    let model = |services: &[u8]| Model {
        frontends: services.iter().map(|s| ((*s, *s == 2, false), (vec![1, 2], vec![], false))).collect(),
        guards: services.iter().copied().collect(),
    };
    let mut table = Table::new(Memory::new(256, 64), REST);
    assert!(table.resync(&desired(&model(&[1, 2, 3])), NOW).is_clean());
    let before = seen(table.store());

    let mut table = Table::new(table.store().clone(), REST);
    table.hold(&[ServiceKey::new("ns", "1"), ServiceKey::new("ns", "2")].into());
    // 1 is not known at all, 2 seems to have lost its backends.
    let mut less = model(&[2, 3]);
    less.frontends.get_mut(&(2, true, false)).unwrap().0.clear();
    let report = table.resync(&desired(&less), NOW);
    assert_eq!(report.failed.len(), 2, "{report:?}");
    assert!(report.failed.values().all(|failure| matches!(failure, Failure::Unsupported(_))), "{report:?}");
    assert_eq!((seen(table.store()), report.writes), (before, 0));
    table.hold(&BTreeSet::new());
    assert!(table.resync(&desired(&less), NOW).is_clean());
    let after = seen(table.store());
    let mut fresh = Table::new(Memory::new(256, 64), REST);
    fresh.resync(&desired(&less), NOW);
    assert_eq!(after, seen(fresh.store()));
}
