//! Addresses that tell pods.

use super::*;

/// Both families, by difference; what fails is said and tried again.
#[test]
fn addresses_that_tell_pods_follow_what_is_desired_a72() {
    let cidrs = |text: &str| text.split_whitespace().map(|cidr| cidr.parse().unwrap()).collect::<BTreeSet<IpNet>>();
    let mut table = fresh();
    let state = |text| DesiredState { local_cidrs: cidrs(text), ..DesiredState::default() };
    assert_eq!(table.resync(&state("10.244.1.0/24 fd00:1::/64"), NOW).writes, 2);
    let change = |text| Changes { local_cidrs: Some(cidrs(text)), ..Changes::default() };
    assert_eq!(table.apply(&change("10.244.0.0/16 fd00:1::/64"), NOW).writes, 2);
    assert_eq!(table.store().local_cidrs().unwrap(), cidrs("10.244.0.0/16 fd00:1::/64"));
    assert_eq!(table.apply(&Changes::default(), NOW).writes, 0);

    table.store_mut().fault = Fault::DeadAfter(0);
    let report = table.apply(&change(""), NOW);
    let failure = report.failed_local_cidrs.clone().unwrap();
    assert!(!report.is_clean() && failure.to_string().contains("tell a pod"), "{failure}");
    table.store_mut().fault = Fault::None;
    assert!(table.resync(&state(""), NOW).is_clean());
    assert_eq!(table.store().local_cidrs().unwrap(), BTreeSet::new());
}
