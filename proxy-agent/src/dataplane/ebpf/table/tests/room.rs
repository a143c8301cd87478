//! Who shares slots, and what happens when there are none.

use super::*;

#[test]
fn equal_sets_of_a_service_share_a_range() {
    let (a, _) = example();
    let mut table = fresh();
    assert!(table.resync(&desired(&a), NOW).is_clean());
    // 3 + 1 for both frontends of service 1, 1 for service 2; service 1 over IPv6: all and local are one range.
    assert_eq!(table.used()[2..4], [5, 2]);
    assert_eq!(seen(table.store()), oracle(&desired(&a)));
}

#[test]
fn sets_that_no_verdict_picks_from_take_no_slots() {
    let mut table = fresh();
    let model = Model { frontends: [((1, false, false), (vec![1], vec![1, 2, 3], false))].into(), guards: [].into() };
    table.resync(&desired(&model), NOW);
    assert_eq!(table.used()[2], 1);
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
