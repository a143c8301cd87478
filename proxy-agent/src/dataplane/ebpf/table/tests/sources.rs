//! Source ranges beside their frontends.

use super::*;

fn in_trie<A: Family>(table: &Table<Memory>) -> Vec<(IpAddr, u32)> {
    let mut nets: Vec<_> = table.store().source_ranges::<A>().unwrap();
    nets.sort_by_key(|key| (proxy_common::Address::to_ip(key.range.addr), key.prefix));
    nets.into_iter().map(|key| (proxy_common::Address::to_ip(key.range.addr), key.prefix - 32)).collect()
}

fn flagged<A: Family>(table: &Table<Memory>) -> bool {
    let values = table.store().frontends::<A>().unwrap();
    values.iter().any(|(_, value)| value.flags & proxy_common::frontend::flags::HAS_SOURCE_RANGES != 0)
}

/// Three ranges of a family; the first is written twice, once with bits behind its length, and one of the other family is not its own.
#[test]
fn source_ranges_come_before_their_frontend_and_go_after_it() {
    come_and_go::<Ipv4Be>(["10.1.2.0/24", "10.1.2.3/24", "fd00::/64"], ["10.2.0.0/16", "10.3.0.0/16"]);
    come_and_go::<Ipv6Be>(["fd01:2::/64", "fd01:2::3/64", "10.1.0.0/16"], ["fd02::/32", "fd03::/32"]);
}

fn come_and_go<A: HalfOf>([one, again, foreign]: [&str; 3], [two, three]: [&str; 2]) {
    let net = |text: &str| text.parse::<IpNet>().map(|net| (net.network(), u32::from(net.prefix_len()))).unwrap();
    let mut table = fresh();
    assert!(table.resync(&filtered::<A>(Some(&[again, one, foreign])), NOW).is_clean());
    assert_eq!((in_trie::<A>(&table), flagged::<A>(&table)), (vec![net(one)], true));
    // Changed without a change of the frontend's entry.
    assert!(table.resync(&filtered::<A>(Some(&[two, one])), NOW).is_clean());
    assert_eq!(in_trie::<A>(&table), [net(one), net(two)]);
    assert_eq!(table.resync(&filtered::<A>(Some(&[two, one])), NOW).writes, 0);
    // Restart: the same, nothing written; then fewer.
    let mut restarted = reopen(&table);
    assert_eq!(restarted.resync(&filtered::<A>(Some(&[two, one])), NOW).writes, 0);
    assert!(restarted.resync(&filtered::<A>(Some(&[two])), NOW).is_clean());
    assert_eq!(in_trie::<A>(&restarted), [net(two)]);
    assert!(restarted.resync(&filtered::<A>(None), NOW).is_clean());
    assert_eq!((in_trie::<A>(&restarted), flagged::<A>(&restarted)), (vec![], false));
    // Whatever instant the process dies at, a frontend that asks for ranges has them.
    for (from, to) in [(None, Some(&[three][..])), (Some(&[three][..]), None)] {
        for writes in 0..8 {
            let mut table = fresh();
            table.resync(&filtered::<A>(from), NOW);
            table.store_mut().fault = Fault::DeadAfter(writes);
            table.resync(&filtered::<A>(to), NOW);
            assert!(!flagged::<A>(&table) || in_trie::<A>(&table) == [net(three)], "after {writes} writes");
            let mut restarted = reopen(&table);
            assert!(restarted.resync(&filtered::<A>(to), NOW).is_clean());
            assert_eq!((in_trie::<A>(&restarted).is_empty(), flagged::<A>(&restarted)), (to.is_none(), to.is_some()));
        }
    }
}

#[test]
fn a_full_trie_fails_its_frontend_and_lost_ranges_come_back() {
    let mut table = fresh();
    table.store_mut().source_capacity = Some(1);
    let report = table.resync(&filtered::<Ipv4Be>(Some(&["10.1.0.0/16", "10.2.0.0/16"])), NOW);
    let Some(Failure::Retry(why)) = report.failed.values().next() else { panic!("{report:?}") };
    assert!(why.contains("--map-source-ranges"), "{why}");
    assert_eq!((in_trie::<Ipv4Be>(&table), flagged::<Ipv4Be>(&table)), (vec![], false));
    let right = filtered::<Ipv4Be>(Some(&["10.1.0.0/16"]));
    assert!(table.resync(&right, NOW).is_clean());
    assert!(table.observe().unwrap().frontends.is_empty());
    let service = table.store().source_ranges::<Ipv4Be>().unwrap()[0].range.service;
    let key = |addr: [u8; 4]| proxy_common::source_range::SourceRangeKey::new(service, Ipv4Be::from_octets(addr), 16);
    // Gone, or one too many.
    for (addr, there) in [([10, 1, 0, 0], false), ([10, 9, 0, 0], true)] {
        table.store_mut().tamper_source(key(addr), there);
        assert_eq!(table.observe().unwrap().frontends.len(), 1);
        assert!(table.resync(&right, NOW).is_clean());
        assert_eq!(in_trie::<Ipv4Be>(&table), [(IpAddr::from([10, 1, 0, 0]), 16)]);
        assert!(table.observe().unwrap().frontends.is_empty());
    }
}

/// It would go on admitting its sources, with nobody the wiser.
#[test]
fn a_range_that_cannot_be_taken_out_fails_its_frontend() {
    cannot_be_taken_out::<Ipv4Be>(["10.1.0.0/16", "10.2.0.0/16"]);
    cannot_be_taken_out::<Ipv6Be>(["fd01::/32", "fd02::/32"]);
}

fn cannot_be_taken_out<A: HalfOf>([stays, goes]: [&str; 2]) {
    let mut table = fresh();
    assert!(table.resync(&filtered::<A>(Some(&[stays, goes])), NOW).is_clean());
    table.store_mut().fault = Fault::DeadAfter(0);
    let report = table.resync(&filtered::<A>(Some(&[stays])), NOW);
    let Some(Failure::Retry(why)) = report.failed.values().next() else { panic!("{report:?}") };
    assert!(why.contains("still admitted"), "{why}");
    table.store_mut().fault = Fault::None;
    assert!(table.resync(&filtered::<A>(Some(&[stays])), NOW).is_clean());
    let stays: IpNet = stays.parse().unwrap();
    assert_eq!(in_trie::<A>(&table), [(stays.addr(), u32::from(stays.prefix_len()))]);
}
