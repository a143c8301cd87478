//! Names, ids and what is remembered under them.

use super::*;

#[test]
fn clients_are_forgotten_with_their_time_and_their_service() {
    let mut state = filtered::<Ipv4Be>(None);
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

#[test]
fn where_nobody_is_remembered_nobody_is_looked_for() {
    let state = desired(&example().0);
    let mut table = fresh();
    table.resync(&state, NOW);
    let walks = |table: &Table<Memory>| table.store().walks;
    let before = walks(&table);
    table.resync(&DesiredState::default(), NOW);
    table.tick(NOW + REST, 1000);
    table.tick(NOW + REST + PRUNE_EVERY, 1000);
    assert_eq!(walks(&table), before);
    table.resync(&state, NOW + REST);
    assert!(table.store().names.contains_key(&1), "their ids come back");

    // Only those without affinity now, but one had it once.
    let mut sticky = state.clone();
    let (_, spec) = sticky.frontends.iter_mut().next().unwrap();
    *spec = Arc::new(FrontendSpec { affinity_secs: Some(100), ..(**spec).clone() });
    table.resync(&sticky, NOW + REST);
    table.resync(&state, NOW + REST);
    table.resync(&DesiredState::default(), NOW + REST);
    table.tick(NOW + REST + REST, 1000);
    assert_eq!(walks(&table), before + 1);
    table.tick(NOW + REST + REST + PRUNE_EVERY, 1000);
    assert_eq!(walks(&table), before + 1);
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
