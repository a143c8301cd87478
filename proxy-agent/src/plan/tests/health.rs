//! Health-check node ports.

use super::*;

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
