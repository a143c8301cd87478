//! Death at every write, faults at random, any sequence of states.

use super::*;

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
                let [old, new] = [from, to].map(|model| should_admit(&desired(model)));
                for (at, nets) in admitted(table.store()) {
                    let (old, new) = (old.get(&at), new.get(&at));
                    let [less, more] = match (old, new) {
                        (Some(old), Some(new)) => [old & new, old | new],
                        (one, other) => [one.or(other).unwrap(), one.or(other).unwrap()].map(Clone::clone),
                    };
                    assert!(
                        less.is_subset(&nets) && nets.is_subset(&more),
                        "{at:?} admits {nets:?} after {crashes} writes"
                    );
                }
                let mut restarted = reopen(&table);
                assert!(restarted.resync(&desired(to), NOW).is_clean());
                assert_eq!(admitted(restarted.store()), should_admit(&desired(to)), "after {crashes} writes");
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
            prop_assert_eq!(admitted(table.store()), should_admit(&to));
            prop_assert_eq!(table.apply(&current.diff(&to), now).writes, 0, "applying twice");
            current = to;
        }
        table.resync(&DesiredState::default(), now);
        prop_assert_eq!(table.used(), [0; 5]);
        prop_assert!(table.store().names.is_empty());
        prop_assert!(table.store().source_ranges::<Ipv4Be>().unwrap().is_empty());
        prop_assert!(table.store().source_ranges::<Ipv6Be>().unwrap().is_empty());
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
        prop_assert_eq!(admitted(table.store()), should_admit(&current));
        let mut restarted = reopen(&table);
        prop_assert_eq!(restarted.resync(&current, NOW).writes, 0);
        prop_assert_eq!(restarted.used(), table.used(), "no leak");
    }
}
