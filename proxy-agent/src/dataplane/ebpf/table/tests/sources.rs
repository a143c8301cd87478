//! Source ranges beside their frontends.

use super::*;

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

/// It would go on admitting its sources, with nobody the wiser.
#[test]
fn a_range_that_cannot_be_taken_out_fails_its_frontend() {
    let mut table = fresh();
    assert!(table.resync(&filtered(Some(&["10.1.0.0/16", "10.2.0.0/16"])), NOW).is_clean());
    table.store_mut().fault = Fault::DeadAfter(0);
    let report = table.resync(&filtered(Some(&["10.1.0.0/16"])), NOW);
    let Some(Failure::Retry(why)) = report.failed.values().next() else { panic!("{report:?}") };
    assert!(why.contains("still admitted"), "{why}");
    table.store_mut().fault = Fault::None;
    assert!(table.resync(&filtered(Some(&["10.1.0.0/16"])), NOW).is_clean());
    assert_eq!(in_trie(&table), [(IpAddr::from([10, 1, 0, 0]), 16)]);
}
