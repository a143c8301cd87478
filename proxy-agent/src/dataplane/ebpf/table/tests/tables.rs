//! Maglev tables behind their slots.

use super::*;

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
