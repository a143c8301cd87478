//! What becomes of traffic, by origin.

use super::*;

/// A77–A80: every flow of the matrix in each of its configurations, as the plan of three Services with a local and a remote
/// endpoint. Columns: plain, eTP Local, iTP Local. Rows: pod, node, external; the node by 127.0.0.1 after the table.
#[test]
fn matrix_a6() {
    let base = Defaults::default();
    let all = Defaults { masquerade_all: true, ..base.clone() };
    let blind = Defaults { detect_local: DetectLocal::Cidrs(BTreeSet::new()), ..base.clone() };
    let blind_all = Defaults { detect_local: DetectLocal::Cidrs(BTreeSet::new()), ..all.clone() };
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
