//! What another process finds, and what somebody altered.

use super::*;

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
    let local_cidrs = desired(&model(&[1, 2, 3])).local_cidrs;
    let report = table.resync(&DesiredState { local_cidrs, ..desired(&less) }, NOW);
    assert_eq!(report.failed.len(), 2, "{report:?}");
    assert!(report.failed.values().all(|failure| matches!(failure, Failure::Held(_))), "{report:?}");
    assert_eq!((seen(table.store()), report.writes), (before, 0));
    table.hold(&BTreeSet::new());
    assert!(table.resync(&desired(&less), NOW).is_clean());
    let after = seen(table.store());
    let mut fresh = Table::new(Memory::new(256, 64), REST);
    fresh.resync(&desired(&less), NOW);
    assert_eq!(after, seen(fresh.store()));
}
