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

/// Somebody takes one out, or brings one in: all pods would be outside, or the world a pod.
#[test]
fn addresses_that_tell_pods_are_looked_after_a72() {
    let cidr: IpNet = "10.244.1.0/24".parse().unwrap();
    let state = DesiredState { local_cidrs: [cidr].into(), ..DesiredState::default() };
    let mut table = fresh();
    assert!(!table.observe().unwrap().local_cidrs, "nothing is asked for yet");
    table.resync(&state, NOW);
    assert!(!table.observe().unwrap().local_cidrs);
    for (other, there) in [(cidr, false), ("fd00::/8".parse().unwrap(), true)] {
        let store = table.store_mut();
        if there { store.put_local_cidr(other) } else { store.remove_local_cidr(other) }.unwrap();
        let drift = table.observe().unwrap();
        assert!(drift.local_cidrs && !drift.is_empty());
        table.resync(&state, NOW);
        assert!(!table.observe().unwrap().local_cidrs);
        assert_eq!(table.store().local_cidrs().unwrap(), state.local_cidrs);
    }
}

/// The programs of a former process go by them, until ours take their place.
#[test]
fn what_former_programs_ask_for_stays_until_they_are_gone() {
    let state = DesiredState { local_cidrs: ["10.244.1.0/24".parse().unwrap()].into(), ..DesiredState::default() };
    let mut former = fresh();
    former.resync(&state, NOW);
    let mut table = reopen(&former).leaving_local_cidrs(true);
    assert_eq!(table.resync(&DesiredState::default(), NOW).writes, 0);
    assert_eq!(table.store().local_cidrs().unwrap(), state.local_cidrs);
    assert!(!table.observe().unwrap().local_cidrs);
    table.store_mut().fault = Fault::DeadAfter(0);
    assert!(table.clear_local_cidrs().is_err());
    table.store_mut().fault = Fault::None;
    table.clear_local_cidrs().unwrap();
    assert_eq!(table.store().local_cidrs().unwrap(), BTreeSet::new());
    table.store_mut().put_local_cidr("10.244.1.0/24".parse().unwrap()).unwrap();
    assert!(table.observe().unwrap().local_cidrs);
}
