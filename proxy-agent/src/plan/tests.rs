use std::{collections::BTreeSet, net::IpAddr};

use super::{topology::choose, *};
use crate::{
    desired::{FamilyCheck, Verdict, Verdicts},
    model::{Endpoint, Protocol},
};

/// What the tests outside of the library build their worlds from.
#[path = "../../tests/common/mod.rs"]
mod common;

use common::port;

fn service(ips: &[&str]) -> Service {
    common::service("web", ips)
}

/// `ADDRESS FLAGS…`: `local`, `notready`, `terminating` (serving, not ready), `dead` (terminating, not serving),
/// `z:a,b` zone hints, `n:a,b` node hints.
fn endpoint(text: &str) -> Endpoint {
    let mut words = text.split_whitespace();
    let address: IpAddr = words.next().unwrap().parse().unwrap();
    let mut endpoint = common::endpoint(address);
    for word in words {
        match word {
            "local" => endpoint.node = Some("this".into()),
            "notready" => (endpoint.ready, endpoint.serving) = (false, false),
            "terminating" => (endpoint.ready, endpoint.terminating) = (false, true),
            "dead" => (endpoint.ready, endpoint.serving, endpoint.terminating) = (false, false, true),
            "ready-terminating" => endpoint.terminating = true,
            _ if word.starts_with("z:") => {
                endpoint.hints.get_or_insert_default().zones = word[2..].split(',').map(Into::into).collect()
            }
            _ if word.starts_with("n:") => {
                endpoint.hints.get_or_insert_default().nodes = word[2..].split(',').map(Into::into).collect()
            }
            _ => panic!("unknown flag {word}"),
        }
    }
    endpoint
}

fn slice(name: &str, endpoints: &[&str]) -> EndpointSlice {
    let endpoints = endpoints.iter().map(|text| endpoint(text)).collect();
    EndpointSlice { endpoints, ..common::slice("web", name, &[]) }
}

fn node(zone: &str) -> NodeFacts {
    common::node("this", (zone != "-").then_some(zone))
}

fn plan(service: &Service, slices: &[EndpointSlice]) -> PlannedService {
    plan_with(service, slices, &Defaults::default())
}

/// What the node of these tests has.
const OWN: &str = "10.244.1.1 127.0.0.1 192.0.2.1 192.0.2.99 ::1 2001:db8::1 fe80::1";

fn plan_with(service: &Service, slices: &[EndpointSlice], defaults: &Defaults) -> PlannedService {
    let own = OWN.split(' ').map(|ip| ip.parse().unwrap()).collect();
    let node = NodeFacts { internal_ips: vec!["192.0.2.1".parse().unwrap()], ..node("-") };
    plan_service(service, slices.iter(), Here { node: &node, addresses: &own }, defaults)
}

fn addresses(set: &[Backend]) -> String {
    set.iter().map(|backend| backend.addr.to_string()).collect::<Vec<_>>().join(" ")
}

fn only(planned: &PlannedService) -> &FrontendSpec {
    assert_eq!(planned.frontends.len(), 1, "{planned:?}");
    &planned.frontends[0].1
}

struct Case {
    name: &'static str,
    zone: &'static str,
    /// `itp`, `etp`: that policy is Local. `nodeport`: externally accessible.
    service: &'static str,
    endpoints: &'static [&'static str],
    cluster: Option<&'static str>,
    local: Option<&'static str>,
    /// The union; where only one list is needed it is that list.
    reachable: &'static str,
    /// `has_any` although nothing is reachable from here.
    elsewhere: bool,
}

const HINTED: &[&str] = &["10.1.2.3 z:a", "10.1.2.4 z:b", "10.1.2.5 z:c", "10.1.2.6 z:a"];
const BY_NODE: &[&str] = &["10.1.2.3 z:a n:this", "10.1.2.4 z:b n:two", "10.1.2.5 z:c n:three", "10.1.2.6 z:a n:four"];
const TWO_LOCAL: &[&str] = &["10.0.0.1 local", "10.0.0.2 local"];
const ONE_LOCAL: &[&str] = &["10.0.0.1 local", "10.0.0.2"];
const NONE_LOCAL: &[&str] = &["10.0.0.1", "10.0.0.2"];
const ALL: Option<&str> = Some("10.0.0.1 10.0.0.2");
const HINTED_LOCAL: &[&str] = &["10.1.2.3 local z:a", "10.1.2.4 local z:b", "10.1.2.5 z:c", "10.1.2.6 z:a"];

macro_rules! case {
    ($name:literal, $zone:literal, $service:literal, $endpoints:expr, $cluster:expr, $local:expr, $reachable:expr) => {
        case!($name, $zone, $service, $endpoints, $cluster, $local, $reachable, false)
    };
    ($name:literal, $zone:literal, $service:literal, $endpoints:expr, $cluster:expr, $local:expr, $reachable:expr, $elsewhere:expr) => {
        Case {
            name: $name,
            zone: $zone,
            service: $service,
            endpoints: $endpoints,
            cluster: $cluster,
            local: $local,
            reachable: $reachable,
            elsewhere: $elsewhere,
        }
    };
}

/// The situations that Kubernetes' own table for endpoint choice names (contract A30–A42), in our words.
const CASES: &[Case] = &[
    case!(
        "every endpoint hinted, some for our zone: only those",
        "a",
        "",
        HINTED,
        Some("10.1.2.3 10.1.2.6"),
        None,
        "10.1.2.3 10.1.2.6"
    ),
    case!(
        "eTP Local: hints do not narrow the local list",
        "a",
        "etp nodeport",
        HINTED_LOCAL,
        Some("10.1.2.3 10.1.2.6"),
        Some("10.1.2.3 10.1.2.4"),
        "10.1.2.3 10.1.2.4 10.1.2.6"
    ),
    case!(
        "iTP Local: hints do not narrow the local list",
        "a",
        "itp nodeport",
        HINTED_LOCAL,
        Some("10.1.2.3 10.1.2.6"),
        Some("10.1.2.3 10.1.2.4"),
        "10.1.2.3 10.1.2.4 10.1.2.6"
    ),
    case!("node without labels: hints mean nothing", "-", "", &["10.1.2.3 z:a"], Some("10.1.2.3"), None, "10.1.2.3"),
    case!("empty zone label: hints mean nothing", "", "", &["10.1.2.3 z:a"], Some("10.1.2.3"), None, "10.1.2.3"),
    case!(
        "no endpoint for our zone: all",
        "b",
        "",
        &["10.1.2.3 z:a", "10.1.2.5 z:c"],
        Some("10.1.2.3 10.1.2.5"),
        None,
        "10.1.2.3 10.1.2.5"
    ),
    case!(
        "an unready endpoint for our zone is not used",
        "a",
        "",
        &["10.1.2.3 z:a", "10.1.2.4 z:b", "10.1.2.5 z:c", "10.1.2.6 z:a notready"],
        Some("10.1.2.3"),
        None,
        "10.1.2.3"
    ),
    case!(
        "our zone has unready ones only: ready ones of other zones",
        "a",
        "",
        &["10.1.2.3 z:a notready", "10.1.2.4 z:b", "10.1.2.5 z:c", "10.1.2.6 z:a notready"],
        Some("10.1.2.4 10.1.2.5"),
        None,
        "10.1.2.4 10.1.2.5"
    ),
    case!(
        "one endpoint lacks a hint: all",
        "a",
        "",
        &["10.1.2.3 z:a", "10.1.2.4 z:b", "10.1.2.5", "10.1.2.6 z:a"],
        Some("10.1.2.3 10.1.2.4 10.1.2.5 10.1.2.6"),
        None,
        "10.1.2.3 10.1.2.4 10.1.2.5 10.1.2.6"
    ),
    case!(
        "an unready endpoint without a hint does not count",
        "a",
        "",
        &["10.1.2.3 z:a", "10.1.2.4 z:b", "10.1.2.5 notready"],
        Some("10.1.2.3"),
        None,
        "10.1.2.3"
    ),
    case!(
        "several zones in one hint",
        "c",
        "",
        &["10.1.2.3 z:a,b,c", "10.1.2.4 z:b,c", "10.1.2.5 z:b,d", "10.1.2.6 z:c"],
        Some("10.1.2.3 10.1.2.4 10.1.2.6"),
        None,
        "10.1.2.3 10.1.2.4 10.1.2.6"
    ),
    case!(
        "no hints at all: all",
        "a",
        "",
        &["10.1.2.3", "10.1.2.4"],
        Some("10.1.2.3 10.1.2.4"),
        None,
        "10.1.2.3 10.1.2.4"
    ),
    case!("hinted for our node: only that one", "a", "", BY_NODE, Some("10.1.2.3"), None, "10.1.2.3"),
    case!(
        "one endpoint lacks a node hint and a zone hint: all",
        "a",
        "",
        &["10.1.2.3 z:a n:this", "10.1.2.4", "10.1.2.5 z:c n:three"],
        Some("10.1.2.3 10.1.2.4 10.1.2.5"),
        None,
        "10.1.2.3 10.1.2.4 10.1.2.5"
    ),
    case!(
        "one endpoint lacks a node hint, all have zones: our zone",
        "a",
        "",
        &["10.1.2.3 z:a n:this", "10.1.2.4 z:b n:two", "10.1.2.6 z:a"],
        Some("10.1.2.3 10.1.2.6"),
        None,
        "10.1.2.3 10.1.2.6"
    ),
    case!(
        "no endpoint for our node: our zone",
        "a",
        "",
        &["10.1.2.3 z:a n:one", "10.1.2.4 z:b n:two", "10.1.2.6 z:a n:four"],
        Some("10.1.2.3 10.1.2.6"),
        None,
        "10.1.2.3 10.1.2.6"
    ),
    case!(
        "node hints without zone hints",
        "a",
        "",
        &["10.1.2.3 n:this", "10.1.2.4 n:two"],
        Some("10.1.2.3"),
        None,
        "10.1.2.3"
    ),
    case!(
        "hints and locality disagree: the union has both",
        "a",
        "etp nodeport",
        &["10.0.0.1 local z:a", "10.0.0.2 local z:b", "10.0.0.3 z:a", "10.0.0.4 z:b"],
        Some("10.0.0.1 10.0.0.3"),
        Some("10.0.0.1 10.0.0.2"),
        "10.0.0.1 10.0.0.2 10.0.0.3"
    ),
    case!("iTP Local, no endpoints", "-", "itp", &[], None, Some(""), ""),
    case!("iTP Local, all remote", "-", "itp", NONE_LOCAL, None, Some(""), "", true),
    case!("iTP Local, all local", "-", "itp", TWO_LOCAL, None, ALL, "10.0.0.1 10.0.0.2"),
    case!("iTP Local, one local", "-", "itp", ONE_LOCAL, None, Some("10.0.0.1"), "10.0.0.1"),
    case!(
        "iTP Local without external access needs no cluster list",
        "-",
        "itp",
        &["10.0.0.1", "10.0.0.2 local"],
        None,
        Some("10.0.0.2"),
        "10.0.0.2"
    ),
    case!("none ready", "-", "", &["10.0.0.1 notready", "10.0.0.2 notready"], Some(""), None, ""),
    case!("some ready", "-", "", &["10.0.0.1 notready", "10.0.0.2"], Some("10.0.0.2"), None, "10.0.0.2"),
    case!(
        "all terminating and serving: all of them",
        "-",
        "",
        &["10.0.0.1 local terminating", "10.0.0.2 terminating"],
        ALL,
        None,
        "10.0.0.1 10.0.0.2"
    ),
    case!(
        "all terminating, hinted elsewhere: the fallback ignores hints",
        "a",
        "",
        &["10.0.0.1 z:b terminating", "10.0.0.2 z:c terminating"],
        ALL,
        None,
        "10.0.0.1 10.0.0.2"
    ),
    case!(
        "terminating ones that no longer serve are gone",
        "-",
        "",
        &["10.0.0.1 dead", "10.0.0.2 terminating"],
        Some("10.0.0.2"),
        None,
        "10.0.0.2"
    ),
    case!(
        "iTP Local, eTP Cluster, one local",
        "-",
        "itp nodeport",
        ONE_LOCAL,
        ALL,
        Some("10.0.0.1"),
        "10.0.0.1 10.0.0.2"
    ),
    case!(
        "iTP Cluster, eTP Local, one local",
        "-",
        "etp nodeport",
        ONE_LOCAL,
        ALL,
        Some("10.0.0.1"),
        "10.0.0.1 10.0.0.2"
    ),
    case!(
        "iTP Local, eTP Local, one local",
        "-",
        "itp etp nodeport",
        ONE_LOCAL,
        ALL,
        Some("10.0.0.1"),
        "10.0.0.1 10.0.0.2"
    ),
    case!("iTP Local, eTP Local, all remote", "-", "itp etp nodeport", NONE_LOCAL, ALL, Some(""), "10.0.0.1 10.0.0.2"),
    case!(
        "iTP Local, eTP Local, all remote and terminating",
        "-",
        "itp etp nodeport",
        &["10.0.0.1 terminating", "10.0.0.2 terminating"],
        ALL,
        Some(""),
        "10.0.0.1 10.0.0.2"
    ),
    case!(
        "eTP Local: the local fallback does not look at the cluster",
        "-",
        "etp nodeport",
        &["10.0.0.1", "10.0.0.2 local notready", "10.0.0.3 local terminating", "10.0.0.4 terminating"],
        Some("10.0.0.1"),
        Some("10.0.0.3"),
        "10.0.0.1 10.0.0.3"
    ),
    case!(
        "eTP Local means nothing without external access",
        "-",
        "etp",
        &["10.0.0.1", "10.0.0.2 local"],
        ALL,
        None,
        "10.0.0.1 10.0.0.2"
    ),
    case!("eTP Local, no endpoints", "-", "etp nodeport", &[], Some(""), Some(""), ""),
    case!("eTP Local, all remote", "-", "etp nodeport", NONE_LOCAL, ALL, Some(""), "10.0.0.1 10.0.0.2"),
    case!("eTP Local, all local", "-", "etp nodeport", TWO_LOCAL, ALL, ALL, "10.0.0.1 10.0.0.2"),
];

#[test]
fn endpoint_choice_a3() {
    for case in CASES {
        let mut service = service(&["10.96.0.1"]);
        for word in case.service.split_whitespace() {
            match word {
                "itp" => service.internal_policy = TrafficPolicy::Local,
                "etp" => service.external_policy = TrafficPolicy::Local,
                "nodeport" => service.ports[0].node_port = Some(port(30080)),
                _ => panic!("{word}"),
            }
        }
        let slices = [slice("web-1", case.endpoints)];
        let candidates = candidates::unite(slices.iter(), &service.ports[0], Family::V4, &node(case.zone));
        let needs = needs(&service, &service.ports[0], Family::V4);
        let Choice { cluster, local, has_any } = choose(&candidates, needs, &node(case.zone));

        assert_eq!(cluster.as_deref().map(addresses).as_deref(), case.cluster, "cluster list: {}", case.name);
        assert_eq!(local.as_deref().map(addresses).as_deref(), case.local, "local list: {}", case.name);
        let union: BTreeSet<Backend> = cluster.into_iter().chain(local).flatten().collect();
        let union: Vec<Backend> = union.into_iter().collect();
        assert_eq!(addresses(&union), case.reachable, "reachable: {}", case.name);
        assert_eq!(has_any, !case.reachable.is_empty() || case.elsewhere, "has_any: {}", case.name);
    }
}

#[test]
fn external_access_comes_by_address_of_the_same_family() {
    let mut service = service(&["10.96.0.1", "fd00::1"]);
    service.external_policy = TrafficPolicy::Local;
    service.load_balancer_ips = vec!["203.0.113.1".parse().unwrap()];
    let of = |family| needs(&service, &service.ports[0], family);
    assert_eq!(of(Family::V4), Needs { cluster: true, local: true });
    assert_eq!(of(Family::V6), Needs { cluster: true, local: false });
}

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

/// `A`: pick all, `L`: pick local, `D`: drop, `R`: reject; `m`: masquerade. Pod, node, external.
fn row(verdicts: Verdicts) -> String {
    let cell = |Verdict { action, masquerade }| {
        let action = match action {
            Action::PickAll => "A",
            Action::PickLocal => "L",
            Action::Drop => "D",
            Action::Reject => "R",
            Action::Pass => "P",
        };
        format!("{action}{}", if masquerade { "m" } else { "" })
    };
    [verdicts.pod, verdicts.node, verdicts.external].map(cell).join(" ")
}

/// The spec of `ADDRESS:PORT/PROTOCOL`.
fn at<'a>(planned: &'a PlannedService, frontend: &str) -> &'a FrontendSpec {
    let found = planned.frontends.iter().find(|(known, _)| known.to_string() == frontend);
    &found.unwrap_or_else(|| panic!("no {frontend} in {:?}", claimed(planned))).1
}

/// `FRONTEND KIND` of all.
fn claimed(planned: &PlannedService) -> Vec<String> {
    planned.frontends.iter().map(|(frontend, spec)| format!("{frontend} {}", spec.kind)).collect()
}

/// One Service of every kind of address, as the matrix has it.
fn everything() -> Service {
    let mut service = service(&["10.96.0.1"]);
    service.ports[0].node_port = Some(port(30080));
    service.external_ips = vec!["198.51.100.1".parse().unwrap()];
    service.load_balancer_ips = vec!["203.0.113.1".parse().unwrap()];
    service
}

/// A77–A80: every flow of the matrix in each of its configurations, as the plan of three Services with a local and a remote
/// endpoint. Columns: plain, eTP Local, iTP Local. Rows: pod, node, external; the node by 127.0.0.1 after the table.
#[test]
fn matrix_a6() {
    let base = Defaults::default();
    let all = Defaults { masquerade_all: true, ..base.clone() };
    let blind = Defaults { detect_local: false, ..base.clone() };
    let blind_all = Defaults { detect_local: false, ..all.clone() };
    let (cluster, node_port, load_balancer) = ("10.96.0.1:80/TCP", "192.0.2.1:30080/TCP", "203.0.113.1:80/TCP");
    let (secondary, external_ip) = ("10.244.1.1:30080/TCP", "198.51.100.1:80/TCP");
    let outside = |etp: &'static str| ["Am Am Am", etp, "Am Am Am"];
    let configurations = [
        ("A77", base, ["A Am Am", "A Am Am", "L Lm Lm"], outside("A Am L")),
        ("A78: no detector", blind, ["A A A", "A A A", "L L L"], outside("L Am L")),
        ("A79: masquerade-all", all, ["Am Am Am", "Am Am Am", "Lm Lm Lm"], outside("A Am L")),
        ("A80: both", blind_all, ["Am Am Am", "Am Am Am", "Lm Lm Lm"], outside("L Am L")),
    ];
    for (name, defaults, to_cluster_ip, from_outside) in configurations {
        for (column, (internal, external)) in [
            (TrafficPolicy::Cluster, TrafficPolicy::Cluster),
            (TrafficPolicy::Cluster, TrafficPolicy::Local),
            (TrafficPolicy::Local, TrafficPolicy::Cluster),
        ]
        .into_iter()
        .enumerate()
        {
            let service = Service { internal_policy: internal, external_policy: external, ..everything() };
            let planned = plan_with(&service, &[slice("web-1", ONE_LOCAL)], &defaults);
            assert_eq!(row(at(&planned, cluster).verdicts), to_cluster_ip[column], "{name}: ClusterIP, {column}");
            for frontend in [node_port, secondary, load_balancer, external_ip] {
                assert_eq!(row(at(&planned, frontend).verdicts), from_outside[column], "{name}: {frontend}, {column}");
            }
            assert_eq!(row(at(&planned, "127.0.0.1:30080/TCP").verdicts), "P Am P", "{name}: localhost, {column}");
            for (frontend, spec) in &planned.frontends {
                let sets = (addresses(&spec.all), addresses(&spec.local));
                let row = row(spec.verdicts);
                assert_eq!(sets.0, if row.contains('A') { "10.0.0.1 10.0.0.2" } else { "" }, "{name}: {frontend}");
                assert_eq!(sets.1, if row.contains('L') { "10.0.0.1" } else { "" }, "{name}: {frontend}");
            }
        }
    }
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
    assert_eq!(claimed(&service, &by(NodePortAddresses::Primary)), ["192.0.2.1"]);
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
fn a_node_port_without_endpoints_refuses_where_it_would_answer_a56() {
    let mut service = service(&["10.96.0.1"]);
    service.ports[0].node_port = Some(port(30080));
    let planned = plan(&service, &[]);
    for frontend in ["10.244.1.1:30080/TCP", "192.0.2.1:30080/TCP", "192.0.2.99:30080/TCP"] {
        assert_eq!(row(at(&planned, frontend).verdicts), "R R R");
    }
    assert_eq!(row(at(&planned, "127.0.0.1:30080/TCP").verdicts), "P R P");
    service.external_policy = TrafficPolicy::Local;
    let planned = plan(&service, &[slice("web-1", NONE_LOCAL)]);
    assert_eq!(row(at(&planned, "192.0.2.1:30080/TCP").verdicts), "A Am D");
    assert_eq!(row(at(&planned, "127.0.0.1:30080/TCP").verdicts), "P Am P");
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

#[test]
fn no_endpoints_a81_a83_a84_a86() {
    use FrontendKind::{ClusterIp, LoadBalancer};
    use TrafficPolicy::{Cluster, Local};
    let nowhere = Situation {
        internal: Cluster,
        external: Cluster,
        has_any: false,
        has_local: false,
        masquerade_all: false,
        detect_local: true,
    };
    let itp = Situation { internal: Local, ..nowhere };
    let etp = Situation { external: Local, ..nowhere };
    for (kind, situation, expected) in [
        (ClusterIp, nowhere, "R R R"),
        (LoadBalancer, nowhere, "R R R"),
        (ClusterIp, itp, "R R R"),
        (LoadBalancer, etp, "R R R"),
        (ClusterIp, Situation { has_any: true, ..itp }, "D D D"),
        (LoadBalancer, Situation { has_any: true, ..etp }, "A Am D"),
    ] {
        assert_eq!(row(verdicts::verdicts(kind, &situation)), expected, "{kind} {situation:?}");
    }
}

#[test]
fn itp_local_without_local_endpoints_drops_and_carries_no_backends() {
    let mut service = service(&["10.96.0.1"]);
    service.internal_policy = TrafficPolicy::Local;
    let planned = plan(&service, &[slice("web-1", NONE_LOCAL)]);
    assert_eq!(row(only(&planned).verdicts), "D D D");
    assert!(only(&planned).local.is_empty() && only(&planned).all.is_empty());
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

/// What is told, as `FAMILY count at addresses`.
fn health(service: &Service, slices: &[EndpointSlice], defaults: &Defaults) -> Option<(u16, String)> {
    let check = plan_with(service, slices, defaults).health_check?;
    let text = check.families.iter().map(|(family, FamilyCheck { listen, local })| {
        let listen: Vec<String> = listen.iter().map(ToString::to_string).collect();
        format!("{family:?} {local} at {}", listen.join(","))
    });
    Some((check.port.get(), text.collect::<Vec<_>>().join("; ")))
}

#[test]
fn health_checks_are_for_load_balancers_with_a_local_policy_a111_a114() {
    let balanced = Service {
        kind: ServiceType::LoadBalancer,
        external_policy: TrafficPolicy::Local,
        health_check_node_port: Some(port(30_105)),
        ..service(&["10.96.0.1"])
    };
    let slices = [slice("s", &["10.1.1.3 local", "10.1.1.4"])];
    let of = |service: Service| health(&service, &slices, &Defaults::default());
    assert_eq!(of(balanced.clone()), Some((30_105, "V4 1 at 0.0.0.0".into())));
    assert_eq!(of(Service { external_policy: TrafficPolicy::Cluster, ..balanced.clone() }), None);
    assert_eq!(of(Service { kind: ServiceType::NodePort, ..balanced.clone() }), None);
    assert_eq!(of(Service { health_check_node_port: None, ..balanced.clone() }), None);
    assert_eq!(of(Service { cluster_ips: Vec::new(), ..balanced.clone() }), None);
    let dual = Service { cluster_ips: service(&["10.96.0.1", "fd00::1"]).cluster_ips, ..balanced };
    for (addresses, expected) in [
        ("", "V4 1 at 0.0.0.0; V6 0 at ::"),
        ("primary", "V4 1 at 192.0.2.1; V6 0 at "),
        ("192.0.2.0/24", "V4 1 at 192.0.2.1,192.0.2.99; V6 0 at ::"),
        ("192.0.2.0/24,0.0.0.0/0,2001:db8::/32", "V4 1 at 0.0.0.0; V6 0 at 2001:db8::1"),
    ] {
        let node_port_addresses = crate::config::node_port_addresses(addresses).unwrap();
        let defaults = Defaults { node_port_addresses, ..Defaults::default() };
        assert_eq!(health(&dual, &slices, &defaults), Some((30_105, expected.into())), "{addresses}");
    }
}

#[test]
fn health_checks_count_ready_local_addresses_a113() {
    let balanced = Service {
        kind: ServiceType::LoadBalancer,
        external_policy: TrafficPolicy::Local,
        health_check_node_port: Some(port(30_105)),
        ..service(&["10.96.0.1", "fd00::1"])
    };
    let v6 = EndpointSlice { family: Family::V6, ..slice("six", &["fd00:1::3 local"]) };
    let portless = EndpointSlice { ports: Vec::new(), ..slice("portless", &["10.1.1.9 local"]) };
    for (endpoints, count) in [
        (&["10.1.1.3 local", "10.1.1.4 local", "10.1.1.5"][..], 2),
        // It still serves, but nothing more should be sent here.
        (&["10.1.1.3 local terminating"], 0),
        (&["10.1.1.3 local notready", "10.1.1.4 local dead"], 0),
        // publishNotReadyAddresses
        (&["10.1.1.3 local ready-terminating"], 1),
        (&["127.0.0.1 local", "10.1.1.3"], 0),
    ] {
        let slices = [slice("a", endpoints), slice("b", endpoints), v6.clone(), portless.clone()];
        let expected = format!("V4 {count} at 0.0.0.0; V6 1 at ::");
        assert_eq!(health(&balanced, &slices, &Defaults::default()), Some((30_105, expected)), "{endpoints:?}");
    }
}
