//! Which endpoints a ServicePort is served by: policies, hints, readiness.

use super::*;

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
