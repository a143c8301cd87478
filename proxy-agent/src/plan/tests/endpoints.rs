//! What slices say of endpoints: united, matched, and passed over.

use super::*;

#[test]
fn slices_are_united_and_duplicates_counted_once_a19_a20() {
    let slices = [
        slice("web-1", &["10.0.0.2", "10.0.0.1 terminating", "10.0.0.3 notready"]),
        slice("web-2", &["10.0.0.1", "10.0.0.2", "10.0.0.3 terminating"]),
    ];
    let planned = plan(&service(&["10.96.0.1"]), &slices);
    // .1: the one that does not terminate wins. .3: not terminating wins too, and is not ready.
    assert_eq!(addresses(&only(&planned).all), "10.0.0.1 10.0.0.2");
    assert_eq!(only(&planned).all[0].to_string(), "10.0.0.1:8080");
}

#[test]
fn a_ready_endpoint_wins_over_its_own_ghost() {
    let slices = [slice("web-1", &["10.0.0.1 notready"]), slice("web-2", &["10.0.0.1 local"])];
    assert_eq!(addresses(&only(&plan(&service(&["10.96.0.1"]), &slices)).all), "10.0.0.1");
}

#[test]
fn slices_may_give_the_port_different_numbers_a23() {
    let mut second = slice("web-2", &["10.0.0.2"]);
    second.ports[0].port = port(9090);
    let planned = plan(&service(&["10.96.0.1"]), &[slice("web-1", &["10.0.0.1"]), second]);
    let backends: Vec<String> = only(&planned).all.iter().map(ToString::to_string).collect();
    assert_eq!(backends, ["10.0.0.1:8080", "10.0.0.2:9090"]);
}

#[test]
fn a_slice_port_matches_by_name_and_protocol_a23() {
    let mut udp = slice("web-1", &["10.0.0.1"]);
    udp.ports[0].protocol = Protocol::Udp;
    let mut other = slice("web-2", &["10.0.0.2"]);
    other.ports[0].name = "metrics".into();
    let planned = plan(&service(&["10.96.0.1"]), &[udp, other]);
    assert!(only(&planned).all.is_empty());
    assert_eq!(only(&planned).verdicts.pod.action, Action::Reject);
}

#[test]
fn bad_addresses_are_passed_over_and_said_f13() {
    let mut v6 = slice("web-2", &["::1", "fe80::1", "::ffff:10.0.0.9", "ff02::1", "::", "fd00::5"]);
    v6.family = Family::V6;
    let v4 =
        slice("web-1", &["127.0.0.1", "224.0.0.1", "0.0.0.0", "169.254.1.1", "255.255.255.255", "fd00::4", "10.0.0.1"]);
    let planned = plan(&service(&["10.96.0.1", "fd00:96::1"]), &[v4, v6]);
    let all: Vec<String> = planned.frontends.iter().map(|(_, spec)| addresses(&spec.all)).collect();
    assert_eq!(all, ["10.0.0.1", "fd00::5"]);
    let problems = planned.problems.join("\n");
    for said in
        ["127.0.0.1 is a loopback", "224.0.0.1 is a multicast", "169.254.1.1 is a link-local", "3 more endpoints"]
    {
        assert!(problems.contains(said), "{said} not in {problems}");
    }
}

/// F9: two endpoints of one address, in whatever slices and order they come, are one, and the better one: the pod that lives, not
/// the ghost that had its address before. `local` is the winner's, not either's.
#[test]
fn the_better_of_two_endpoints_of_one_address_whatever_slice_has_it() {
    let cases = [
        (["10.0.0.1 local dead", "10.0.0.1"], "ready=true terminating=false local=false"),
        (["10.0.0.1 local terminating", "10.0.0.1"], "ready=true terminating=false local=false"),
        (["10.0.0.1 local", "10.0.0.1 terminating"], "ready=true terminating=false local=true"),
        (["10.0.0.1 ready-terminating", "10.0.0.1 local"], "ready=true terminating=false local=true"),
        (["10.0.0.1 notready", "10.0.0.1 local"], "ready=true terminating=false local=true"),
        (["10.0.0.1 dead", "10.0.0.1 local terminating"], "ready=false terminating=true local=true"),
    ];
    let service = service(&["10.96.0.1"]);
    let node = NodeFacts { name: "this".into(), ..NodeFacts::default() };
    for ([a, b], expected) in cases {
        for slices in [
            vec![slice("web-1", &[a]), slice("web-2", &[b])],
            vec![slice("web-1", &[b]), slice("web-2", &[a])],
            vec![slice("web-1", &[a, b])],
            vec![slice("web-1", &[b, a])],
        ] {
            let found = candidates::unite(slices.iter(), &service.ports[0], Family::V4, &node);
            let [one] = &*found else { panic!("{} endpoints of one address", found.len()) };
            let said = format!("ready={} terminating={} local={}", one.ready, one.terminating, one.local);
            assert_eq!(said, expected, "{a:?}, {b:?}");
        }
    }
}

/// TCP is reset for endpoints that are deleted: neither another number nor another name of their port deletes them (A104).
#[test]
fn a_port_that_changes_deletes_no_endpoint() {
    let mut service = service(&["10.96.0.1"]);
    service.reset_deleted = Some("true".into());
    let mut old = slice("s", &["10.0.0.1 local", "10.0.0.2"]);
    let listed = |service: &Service, slices: &[EndpointSlice]| only(&plan(service, slices)).alive.clone().unwrap();
    let before = listed(&service, &[old.clone()]);
    assert_eq!(addresses(&before), "10.0.0.1 10.0.0.2");
    let mut new = slice("t", &["10.0.0.2", "10.0.0.3"]);
    new.ports[0].port = port(9090);
    assert_eq!(addresses(&listed(&service, &[old.clone(), new])), "10.0.0.1 10.0.0.2 10.0.0.3");
    old.ports[0].port = port(9090);
    assert_eq!(listed(&service, &[old.clone()]), before, "targetPort changes");
    service.ports[0].name = "renamed".into();
    assert_eq!(listed(&service, &[old]), before, "the Service's port is renamed, its slices are not yet");
    assert_eq!(addresses(&listed(&service, &[])), "");
}

/// Who may go on with what it has is a matter of serving (UDP), or of being listed at all (TCP, on demand): no policy, no hint
/// and no preference for what is ready ends a flow (contract A103, A104, A106).
#[test]
fn flows_go_on_with_whatever_serves() {
    let endpoints = ["10.0.0.1 local", "10.0.0.2 n:two", "10.0.0.3 terminating", "10.0.0.4 dead", "10.0.0.5 notready"];
    let planned = |protocol, reset: Option<&str>, endpoints: &[&str]| {
        let mut service = service(&["10.96.0.1"]);
        service.ports[0].protocol = protocol;
        service.internal_policy = TrafficPolicy::Local;
        service.reset_deleted = reset.map(Into::into);
        let mut slice = slice("s", endpoints);
        slice.ports[0].protocol = protocol;
        let planned = plan(&service, &[slice]);
        (only(&planned).alive.as_deref().map(addresses), planned.problems)
    };
    let alive = |protocol, reset, endpoints: &[&str]| planned(protocol, reset, endpoints).0;
    assert_eq!(alive(Protocol::Udp, None, &endpoints).as_deref(), Some("10.0.0.1 10.0.0.2 10.0.0.3"));
    assert_eq!(alive(Protocol::Udp, None, &[]).as_deref(), Some(""), "nobody left: every flow ends");
    assert_eq!(alive(Protocol::Tcp, None, &endpoints), None);
    assert_eq!(alive(Protocol::Tcp, Some("false"), &endpoints), None);
    assert_eq!(alive(Protocol::Sctp, Some("true"), &endpoints), None);
    let listed = "10.0.0.1 10.0.0.2 10.0.0.3 10.0.0.4 10.0.0.5";
    assert_eq!(alive(Protocol::Tcp, Some(" true "), &endpoints).as_deref(), Some(listed));
    let (alive, problems) = planned(Protocol::Tcp, Some("yes"), &endpoints);
    assert_eq!(alive, None);
    assert!(problems[0].contains("reset-deleted") && problems[0].contains("\"true\""), "{problems:?}");
}

/// What a mesh needs; unknown words change nothing and are said.
#[test]
fn sockets_of_pods_are_left_alone_by_annotation() {
    for (value, expected, said) in
        [(None, false, 0), (Some("all"), false, 0), (Some("node"), true, 0), (Some("off"), false, 1)]
    {
        let service = Service { socket_lb: value.map(Into::into), ..service(&["10.96.0.1"]) };
        let planned = plan(&service, &[]);
        assert_eq!((only(&planned).pods_per_packet, planned.problems.len()), (expected, said), "{value:?}");
    }
}

/// NodeLocal DNSCache: whoever asks for the Service's address here means the cache; its other addresses are served as ever.
#[test]
fn a_cluster_ip_that_the_node_owns_is_left_to_it() {
    let service = Service { cluster_ips: service(&["192.0.2.99", "fd00::a"]).cluster_ips, ..service(&["10.96.0.1"]) };
    let planned = plan(&service, &[]);
    let of = |addr: &str| {
        let (_, spec) = planned.frontends.iter().find(|(frontend, _)| frontend.addr.to_string() == addr).unwrap();
        let Verdicts { pod, node, external } = spec.verdicts;
        [pod, node, external].map(|verdict| verdict.action)
    };
    assert_eq!((of("192.0.2.99"), of("fd00::a")), ([Action::Pass; 3], [Action::Reject; 3]));
    assert_eq!(planned.guards, ["fd00::a".parse::<IpAddr>().unwrap()]);
    assert!(planned.problems[0].contains("clusterIP 192.0.2.99 is an address of this node"), "{:?}", planned.problems);
}

/// The cache comes and goes: nothing else is planned anew for that.
#[test]
fn a_service_follows_what_the_node_owns() {
    let mut index = crate::model::index::Index::default();
    let mut touched = crate::model::index::Touched::default();
    for (name, ip) in [("dns", "10.96.0.10"), ("web", "10.96.0.1")] {
        let service = common::service(name, &[ip]);
        index.apply(crate::model::Event::Service(Arc::new(service)), &mut touched);
    }
    let own: BTreeSet<IpAddr> = ["169.254.20.10", "10.96.0.10"].map(|ip| ip.parse().unwrap()).into();
    for addresses in [own, BTreeSet::new()] {
        let mut touched = crate::model::index::Touched::default();
        index.apply(crate::model::Event::Addresses(addresses), &mut touched);
        assert_eq!(touched.services.iter().map(|key| &*key.name).collect::<Vec<_>>(), ["dns"]);
    }
}
