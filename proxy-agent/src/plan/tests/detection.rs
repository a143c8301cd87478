//! How pods of this node are told, as far as planning goes.

use super::*;

/// Each family by itself: of one without an address range nobody can tell pods, and so it is planned (A68, A73, A78).
#[test]
fn a_family_without_pod_addresses_has_no_detector_a73() {
    let policy = TrafficPolicy::Local;
    let service = Service {
        external_policy: policy,
        ..Service { cluster_ips: service(&["10.96.0.1", "fd00::1"]).cluster_ips, ..everything() }
    };
    let slices =
        [slice("s", &["10.1.1.3 local"]), EndpointSlice { family: Family::V6, ..slice("six", &["fd00:1::3 local"]) }];
    let masqueraded = |detect_local: &DetectLocal, pod_cidrs: &[&str]| {
        let node = NodeFacts { pod_cidrs: pod_cidrs.iter().map(|cidr| cidr.parse().unwrap()).collect(), ..node("-") };
        let defaults = Defaults { detect_local: detect_local.clone(), ..Defaults::default() };
        let planned =
            plan_service(&service, slices.iter(), Here { node: &node, addresses: &BTreeSet::new() }, &defaults);
        let of = |addr: &str| {
            let spec = planned.frontends.iter().find(|(frontend, _)| frontend.addr == addr.parse::<IpAddr>().unwrap());
            spec.unwrap().1.verdicts.external.masquerade
        };
        (of("10.96.0.1"), of("fd00::1"))
    };
    let cidrs = |cidrs: &[&str]| DetectLocal::Cidrs(cidrs.iter().map(|cidr| cidr.parse().unwrap()).collect());
    for (detect, pod_cidrs, expected) in [
        (DetectLocal::Device, &[][..], (true, true)),
        (cidrs(&[]), &["10.244.1.0/24"], (false, false)),
        (cidrs(&["10.244.0.0/16"]), &[], (true, false)),
        (cidrs(&["10.244.0.0/16", "fd00:244::/48"]), &[], (true, true)),
        (DetectLocal::NodeCidrs, &["fd00:244:1::/64"], (false, true)),
    ] {
        assert_eq!(masqueraded(&detect, pod_cidrs), expected, "{detect:?}");
    }
}

/// The pod network of the own Node comes late, and changes: nothing has to be started again (A126).
#[test]
fn the_nodes_pod_networks_are_followed() {
    let mut index = crate::model::index::Index::default();
    let mut touched = crate::model::index::Touched::default();
    index.apply(crate::model::Event::Service(Arc::new(service(&["10.96.0.1"]))), &mut touched);
    let mut planner = Planner::new(Defaults { detect_local: DetectLocal::NodeCidrs, ..Defaults::default() });
    planner.full(index.snapshot());
    let problem = |planner: &Planner| planner.problems().remove("local detection").map(|all| all.concat());
    assert!(problem(&planner).unwrap().contains("no pod CIDR of IPv4 addresses"), "{:?}", problem(&planner));

    let mut touched = crate::model::index::Touched::default();
    let facts = NodeFacts { pod_cidrs: vec!["10.244.1.7/24".parse().unwrap()], ..NodeFacts::default() };
    index.apply(crate::model::Event::Node(facts), &mut touched);
    let version = planner.problems_version();
    let changes = planner.update(index.snapshot(), &touched.services);
    assert_eq!(changes.local_cidrs, Some(["10.244.1.0/24".parse().unwrap()].into()));
    assert!(problem(&planner).is_none() && planner.problems_version() > version);
}
