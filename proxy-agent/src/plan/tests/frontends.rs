//! Which addresses and ports become frontends, and what each carries.

use super::*;

#[test]
fn vips_that_cannot_be_served_cost_only_themselves() {
    let planned = plan(&service(&["127.0.0.1", "10.96.0.1"]), &[slice("web-1", &["10.0.0.1"])]);
    assert_eq!(planned.guards, ["10.96.0.1".parse::<IpAddr>().unwrap()]);
    assert_eq!(only(&planned).all.len(), 1);
    assert_eq!(planned.problems, ["clusterIP 127.0.0.1 is a loopback address; it is not served"]);
}

#[test]
fn headless_and_external_name_have_nothing_a4_a5() {
    assert_eq!(plan(&service(&[]), &[slice("web-1", &["10.0.0.1"])]), PlannedService::default());
    let mut external = service(&["10.96.0.1"]);
    external.kind = ServiceType::ExternalName;
    assert_eq!(plan(&external, &[]), PlannedService::default());
}

#[test]
fn one_number_two_protocols_are_two_frontends_a7() {
    let mut service = service(&["10.96.0.1"]);
    for protocol in [Protocol::Udp, Protocol::Sctp, Protocol::Tcp] {
        service.ports.push(ServicePort { name: "again".into(), protocol, port: port(80), node_port: None });
    }
    let planned = plan(&service, &[]);
    let frontends: Vec<String> = planned.frontends.iter().map(|(frontend, _)| frontend.to_string()).collect();
    assert_eq!(frontends, ["10.96.0.1:80/TCP", "10.96.0.1:80/UDP", "10.96.0.1:80/SCTP"]);
    assert_eq!(planned.problems, ["port 80/TCP is given twice; the first is used"]);
    assert_eq!(&*planned.frontends[0].1.service.port, "http");
}

#[test]
fn algorithm_by_annotation() {
    let with = |text: &str| {
        let mut service = service(&["10.96.0.1"]);
        service.algorithm = Some(text.into());
        let planned = plan(&service, &[]);
        (only(&planned).algorithm, planned.problems.len())
    };
    assert_eq!(with("round-robin"), (Algorithm::RoundRobin, 0));
    assert_eq!(with("maglev"), (Algorithm::Maglev, 0));
    assert_eq!(with("random"), (Algorithm::Random, 0));
    assert_eq!(with("fastest"), (Algorithm::Random, 1));
    let defaults = Defaults { algorithm: Algorithm::RoundRobin, ..Defaults::default() };
    let planned = plan_with(&service(&["10.96.0.1"]), &[], &defaults);
    assert_eq!(only(&planned).algorithm, Algorithm::RoundRobin);
}

#[test]
fn sets_that_no_verdict_uses_are_left_out() {
    let mut service = service(&["10.96.0.1"]);
    let slices = [slice("web-1", ONE_LOCAL)];
    let planned = plan(&service, &slices);
    assert_eq!((only(&planned).all.len(), only(&planned).local.len()), (2, 0));
    service.internal_policy = TrafficPolicy::Local;
    service.ports[0].node_port = Some(port(30080));
    let planned = plan(&service, &slices);
    let sets = |frontend: &str| {
        let spec = at(&planned, frontend);
        (spec.all.len(), spec.local.len())
    };
    assert_eq!(sets("10.96.0.1:80/TCP"), (0, 1));
    assert_eq!(sets("192.0.2.1:30080/TCP"), (2, 0));
}

#[test]
fn node_ports_answer_where_they_are_told_to_a52_a53_a54() {
    let mut service = service(&["10.96.0.1", "fd00::1"]);
    service.ports[0].node_port = Some(port(30080));
    let claimed = |service: &Service, defaults: &Defaults| {
        let all = claimed(&plan_with(service, &[], defaults));
        all.into_iter()
            .filter_map(|claim| Some(claim.strip_suffix(":30080/TCP NodePort")?.to_owned()))
            .collect::<Vec<_>>()
    };
    let base = Defaults::default();
    let by = |node_port_addresses| Defaults { node_port_addresses, ..base.clone() };
    assert_eq!(claimed(&service, &base), ["10.244.1.1", "127.0.0.1", "192.0.2.1", "192.0.2.99", "[2001:db8::1]"]);
    let without = Defaults { localhost_node_ports: false, ..base.clone() };
    assert_eq!(claimed(&service, &without), ["10.244.1.1", "192.0.2.1", "192.0.2.99", "[2001:db8::1]"]);
    assert_eq!(claimed(&service, &by(NodePortAddresses::Primary(None))), ["192.0.2.1"]);
    let cidr = NodePortAddresses::Cidrs(vec!["192.0.2.0/26".parse().unwrap()]);
    assert_eq!(claimed(&service, &by(cidr)), ["192.0.2.1", "[2001:db8::1]"]);
    // Nobody else's ports are refused at the node's own addresses.
    assert_eq!(
        plan(&service, &[]).guards.iter().map(ToString::to_string).collect::<Vec<_>>(),
        ["10.96.0.1", "fd00::1"]
    );

    // A family without a clusterIP has none of its own (A8).
    service.cluster_ips.pop();
    assert_eq!(claimed(&service, &base), ["10.244.1.1", "127.0.0.1", "192.0.2.1", "192.0.2.99"]);
    // A59: no node port was handed out.
    service.ports[0].node_port = None;
    assert!(claimed(&service, &base).is_empty());
}

#[test]
fn external_ips_never_take_what_is_the_nodes() {
    let mut service = service(&["10.96.0.1"]);
    let ips = ["198.51.100.1", "192.0.2.99", "10.244.1.1", "127.0.0.1", "2001:db8::99"];
    service.external_ips = ips.iter().map(|ip| ip.parse().unwrap()).collect();
    let planned = plan(&service, &[]);
    assert_eq!(claimed(&planned), ["10.96.0.1:80/TCP ClusterIP", "198.51.100.1:80/TCP ExternalIP"]);
    let problems = planned.problems.join("\n");
    for said in [
        "externalIP 192.0.2.99 is an address of this node",
        "externalIP 10.244.1.1 is an address of this node",
        "externalIP 127.0.0.1 is a loopback address",
        "externalIP 2001:db8::99 is of a family that the Service has no clusterIP of",
    ] {
        assert!(problems.contains(said), "{said} not in {problems}");
    }
    // A load balancer's address may be the node's own (kubernetes#47723).
    let given = std::mem::take(&mut service.external_ips);
    service.load_balancer_ips = given;
    assert_eq!(
        claimed(&plan(&service, &[])),
        [
            "10.96.0.1:80/TCP ClusterIP",
            "10.244.1.1:80/TCP LoadBalancer",
            "192.0.2.99:80/TCP LoadBalancer",
            "198.51.100.1:80/TCP LoadBalancer"
        ]
    );
}

#[test]
fn external_ips_can_be_switched_off_a158() {
    let defaults = Defaults { external_ips: false, ..Defaults::default() };
    let planned = plan_with(&everything(), &[], &defaults);
    assert!(claimed(&planned).iter().all(|claim| !claim.ends_with("ExternalIP")), "{planned:?}");
    assert_eq!(
        planned.problems,
        ["externalIPs are switched off on this node (--external-ips=false); they are not served"]
    );
}

#[test]
fn what_one_service_claims_twice() {
    let mut service = everything();
    // The same address from the load balancer and by hand is one frontend, and no mistake.
    service.external_ips = service.load_balancer_ips.clone();
    service.load_balancer_ips.push("10.96.0.1".parse().unwrap());
    let planned = plan(&service, &[]);
    assert_eq!(at(&planned, "203.0.113.1:80/TCP").kind, FrontendKind::LoadBalancer);
    assert_eq!(at(&planned, "10.96.0.1:80/TCP").kind, FrontendKind::ClusterIp);
    assert!(planned.problems.is_empty(), "{:?}", planned.problems);

    // Two ports with one NodePort is one: said once, whatever the number of addresses.
    let again = ServicePort { name: "again".into(), port: port(81), ..service.ports[0].clone() };
    service.ports.push(again);
    let planned = plan(&service, &[]);
    assert_eq!(&*at(&planned, "192.0.2.1:30080/TCP").service.port, "http");
    assert_eq!(planned.problems, ["nodePort 30080/TCP is given twice; the first is used"]);
}

#[test]
fn source_ranges_are_the_load_balancers_alone_a90_a93() {
    let with = |ranges: &[&str]| {
        let mut service = everything();
        service.source_ranges = ranges.iter().map(|net| net.parse().unwrap()).collect();
        service
    };
    let endpoints = [slice("web-1", ONE_LOCAL)];
    let lb = "203.0.113.1:80/TCP";
    let ranges = |planned: &PlannedService| {
        let ranges = at(planned, lb).source_ranges.as_deref();
        ranges.map(|nets| nets.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "))
    };

    // The node is outside: its own traffic is dropped by its verdict, the packets of others by the ranges (A91).
    let planned = plan(&with(&["203.0.113.0/25", "198.51.100.9/24", "198.51.100.0/25", "2001:db8::/64"]), &endpoints);
    assert_eq!(ranges(&planned).as_deref(), Some("198.51.100.0/24 203.0.113.0/25"));
    assert_eq!(row(at(&planned, lb).verdicts), "Am D Am");
    for (frontend, spec) in &planned.frontends {
        assert_eq!(spec.source_ranges.is_some(), frontend.to_string() == lb, "{frontend}");
        assert!(frontend.to_string() == lb || !row(spec.verdicts).contains('D'), "{frontend}");
    }
    // A92: inside by its InternalIP; another address of the node is no reason.
    let planned = plan(&with(&["192.0.2.0/30"]), &endpoints);
    assert_eq!((ranges(&planned).as_deref(), &*row(at(&planned, lb).verdicts)), (Some("192.0.2.0/30"), "Am Am Am"));
    let planned = plan(&with(&["192.0.2.99/32"]), &endpoints);
    assert_eq!(row(at(&planned, lb).verdicts), "Am D Am");
    // A93: everybody.
    for everybody in [&["0.0.0.0/0", "10.0.0.0/8"][..], &["2001:db8::/64"], &[]] {
        let planned = plan(&with(everybody), &endpoints);
        assert_eq!((ranges(&planned), &*row(at(&planned, lb).verdicts)), (None, "Am Am Am"), "{everybody:?}");
    }
    // A89: refusing beats the ranges; a drop by policy does not need them to be one.
    let planned = plan(&with(&["203.0.113.0/25"]), &[]);
    assert_eq!((ranges(&planned), &*row(at(&planned, lb).verdicts)), (None, "R R R"));
}

#[test]
fn frontends_of_one_kind_share_everything() {
    let planned = plan(&everything(), &[slice("web-1", ONE_LOCAL)]);
    let spec = |frontend: &str| planned.frontends.iter().find(|(f, _)| f.to_string() == frontend).unwrap().1.clone();
    assert!(Arc::ptr_eq(&spec("192.0.2.1:30080/TCP"), &spec("10.244.1.1:30080/TCP")));
    assert!(Arc::ptr_eq(&spec("192.0.2.1:30080/TCP").all, &spec("10.96.0.1:80/TCP").all));
}
