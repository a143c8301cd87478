//! Tables: YAML as users write it in, model and remarks out.

use super::*;

fn read<T: serde::de::DeserializeOwned>(yaml: &str) -> T {
    serde_saphyr::from_str(yaml).unwrap()
}

fn service_of(yaml: &str) -> Result<Service, NotOurs> {
    service(&read(yaml), &mut Names::default())
}

fn slice_of(yaml: &str) -> Result<EndpointSlice, NotOurs> {
    slice(&read(yaml), &mut Names::default())
}

/// A Service of `spec` (flow style), with a port where it names none.
fn spec(spec: &str) -> Service {
    let ports = if spec.contains("ports:") { "" } else { ", ports: [{port: 80}]" };
    service_of(&format!("{{metadata: {{namespace: ns, name: svc}}, spec: {{{spec}{ports}}}}}")).unwrap()
}

fn ips(list: &[IpAddr]) -> Vec<String> {
    list.iter().map(ToString::to_string).collect()
}

#[test]
fn a_whole_service() {
    let service = service_of(
        "
        metadata:
          namespace: shop
          name: cart
          uid: 5c1c
          creationTimestamp: '2026-01-02T03:04:05Z'
          annotations: {proxy-agent/algorithm: round-robin, proxy-agent/socket-lb: node, other: x}
          managedFields: [{manager: kubectl, fieldsV1: {f:spec: {}}}]
        spec:
          type: LoadBalancer
          clusterIP: 10.96.0.7
          clusterIPs: [10.96.0.7, 'fd00:96::7']
          ipFamilies: [IPv4, IPv6]
          internalTrafficPolicy: Local
          externalTrafficPolicy: Local
          healthCheckNodePort: 30001
          sessionAffinity: ClientIP
          sessionAffinityConfig: {clientIP: {timeoutSeconds: 60}}
          externalIPs: [192.0.2.1, 192.0.2.1]
          loadBalancerSourceRanges: [' 203.0.113.0/25']
          trafficDistribution: PreferClose
          selector: {app: cart}
          ports:
          - {name: http, port: 80, targetPort: web, nodePort: 30080}
          - {name: dns, port: 53, protocol: UDP}
          - {name: dns, port: 53, protocol: TCP}
        status: {loadBalancer: {ingress: [{ip: 198.51.100.1}, {ip: 198.51.100.2, ipMode: Proxy}, {hostname: a.example}]}}
        ",
    )
    .unwrap();
    assert_eq!(service.problems, Vec::<String>::new());
    assert_eq!(service.key, ServiceKey::new("shop", "cart"));
    assert_eq!(&*service.uid, "5c1c");
    assert_eq!(service.created, 1_767_323_045);
    assert_eq!(service.kind, ServiceType::LoadBalancer);
    assert_eq!(ips(&service.cluster_ips), ["10.96.0.7", "fd00:96::7"]);
    assert_eq!((service.internal_policy, service.external_policy), (TrafficPolicy::Local, TrafficPolicy::Local));
    assert_eq!(service.health_check_node_port, Port::new(30001));
    assert_eq!(service.affinity_secs, Some(60));
    assert_eq!(ips(&service.external_ips), ["192.0.2.1"]);
    assert_eq!(ips(&service.load_balancer_ips), ["198.51.100.1"]);
    assert_eq!(service.source_ranges, ["203.0.113.0/25".parse().unwrap()]);
    assert_eq!(service.algorithm.as_deref(), Some("round-robin"));
    assert_eq!(service.socket_lb.as_deref(), Some("node"));
    let ports: Vec<_> =
        service.ports.iter().map(|p| (&*p.name, p.protocol, p.port.get(), p.node_port.map(Port::get))).collect();
    assert_eq!(
        ports,
        [("http", Protocol::Tcp, 80, Some(30080)), ("dns", Protocol::Udp, 53, None), ("dns", Protocol::Tcp, 53, None)]
    );
}

/// A1, A4, A5, F14.
#[test]
fn services_that_are_not_ours() {
    for (yaml, why) in [
        (
            "{metadata: {labels: {service.kubernetes.io/service-proxy-name: x}}, spec: {clusterIP: 10.0.0.1}}",
            NotOurs::OtherProxy,
        ),
        (
            "{metadata: {labels: {service.kubernetes.io/service-proxy-name: ''}}, spec: {clusterIP: 10.0.0.1}}",
            NotOurs::OtherProxy,
        ),
        (
            "{metadata: {labels: {service.kubernetes.io/service-proxy-name: }}, spec: {clusterIP: 10.0.0.1}}",
            NotOurs::OtherProxy,
        ),
        ("{spec: {clusterIP: None}}", NotOurs::Headless),
        ("{spec: {clusterIPs: [None]}}", NotOurs::Headless),
        ("{spec: {clusterIP: ''}}", NotOurs::NoClusterIp),
        ("{spec: {}}", NotOurs::NoClusterIp),
        ("{metadata: {name: x}}", NotOurs::NoClusterIp),
        ("{spec: {type: ExternalName, externalName: a.example}}", NotOurs::ExternalName),
        ("{spec: {type: ExternalName, clusterIP: 10.0.0.1}}", NotOurs::ExternalName),
    ] {
        assert_eq!(service_of(yaml).unwrap_err(), why, "{yaml}");
    }
    // The headless label of a *Service* says nothing; its slices carry it (A3).
    assert!(
        service_of("{metadata: {labels: {service.kubernetes.io/headless: ''}}, spec: {clusterIP: 10.0.0.1}}").is_ok()
    );
}

/// A8.
#[test]
fn families() {
    for (fields, expected) in [
        ("clusterIP: 10.0.0.1", vec!["10.0.0.1"]),
        ("clusterIP: 'fd00::1'", vec!["fd00::1"]),
        ("clusterIP: 10.0.0.1, clusterIPs: [10.0.0.1], ipFamilies: [IPv4]", vec!["10.0.0.1"]),
        (
            "clusterIP: 'fd00::1', clusterIPs: ['fd00::1', 10.0.0.1], ipFamilies: [IPv6, IPv4]",
            vec!["fd00::1", "10.0.0.1"],
        ),
        ("clusterIPs: [10.0.0.1, 'fd00::1']", vec!["10.0.0.1", "fd00::1"]),
        ("clusterIP: 10.0.0.1, ipFamilies: [IPv4, IPv6]", vec!["10.0.0.1"]),
    ] {
        let service = spec(fields);
        assert_eq!(ips(&service.cluster_ips), expected, "{fields}");
        assert_eq!(service.problems, Vec::<String>::new(), "{fields}");
    }
    for (fields, expected, problem) in [
        (
            "clusterIP: 10.0.0.1, ipFamilies: [IPv6]",
            vec![],
            r#"spec.clusterIP: "10.0.0.1" is not of the family that spec.ipFamilies[0] says; it is not served, write both in one order"#,
        ),
        (
            "clusterIPs: [10.0.0.1, 'fd00::1'], ipFamilies: [IPv4, IPv4]",
            vec!["10.0.0.1"],
            r#"spec.clusterIPs: "fd00::1" is not of the family that spec.ipFamilies[1] says; it is not served, write both in one order"#,
        ),
        (
            "clusterIPs: [10.0.0.1, 10.0.0.2]",
            vec!["10.0.0.1"],
            r#"spec.clusterIPs: "10.0.0.2" is a second address of its family, 10.0.0.1 stands; write one of each family"#,
        ),
        (
            "clusterIPs: ['fd00::1', 'fd00::2']",
            vec!["fd00::1"],
            r#"spec.clusterIPs: "fd00::2" is a second address of its family, fd00::1 stands; write one of each family"#,
        ),
        (
            "clusterIPs: [10.0.0.1, 'fd00::1'], ipFamilies: [IPv4]",
            vec!["10.0.0.1"],
            r#"spec.clusterIPs: "fd00::1" has no family in spec.ipFamilies; it is not served, name its family there"#,
        ),
        (
            "clusterIPs: ['fd00::1', 10.0.0.1], ipFamilies: [IPv6]",
            vec!["fd00::1"],
            r#"spec.clusterIPs: "10.0.0.1" has no family in spec.ipFamilies; it is not served, name its family there"#,
        ),
        (
            "clusterIPs: [10.0.0.1], ipFamilies: [IPX]",
            vec!["10.0.0.1"],
            r#"spec.ipFamilies: "IPX" is neither IPv4 nor IPv6; the address says it itself, write one of these"#,
        ),
    ] {
        let service = spec(fields);
        assert_eq!(ips(&service.cluster_ips), expected, "{fields}");
        assert_eq!(service.problems, [problem], "{fields}");
    }
}

/// A9, A12: upstream's TestBadIPs.
#[test]
fn bad_ips() {
    let service = service_of(
        "
        metadata: {namespace: ns1, name: svc1}
        spec:
          type: LoadBalancer
          clusterIP: 172.30.0.041
          clusterIPs: [172.30.0.041]
          ipFamilies: [IPv4]
          externalIPs: [192.168.099.022, 256.1.1.1, '::ffff:1.2.3.4', 127.0.0.1, 'fe80::1%eth0']
          loadBalancerSourceRanges: [203.0.113.000/025, 203.0.113.130, 1.2.3.4/40]
          ports: [{name: p80, port: 80, nodePort: 3001}]
        status: {loadBalancer: {ingress: [{ip: 1.2.3.004}, {ip: nonsense}]}}
        ",
    )
    .unwrap();
    assert_eq!(ips(&service.cluster_ips), ["172.30.0.41"]);
    assert_eq!(ips(&service.external_ips), ["192.168.99.22"]);
    assert_eq!(ips(&service.load_balancer_ips), ["1.2.3.4"]);
    assert_eq!(service.source_ranges, ["203.0.113.0/25".parse().unwrap()]);
    assert_eq!(service.ports.len(), 1);
    let not_served = "it is not served, write an address that others can send to";
    assert_eq!(
        service.problems,
        [
            format!(r#"spec.externalIPs: "256.1.1.1" is no IP address; {not_served}"#),
            format!(r#"spec.externalIPs: "::ffff:1.2.3.4" is an IPv4 address in IPv6 clothes; {not_served}"#),
            format!(r#"spec.externalIPs: "127.0.0.1" is a loopback address; {not_served}"#),
            format!(r#"spec.externalIPs: "fe80::1%eth0" is no IP address; {not_served}"#),
            format!(r#"status.loadBalancer.ingress: "nonsense" is no IP address; {not_served}"#),
            r#"spec.loadBalancerSourceRanges: "203.0.113.130" is no address range (CIDR); it lets nobody in, write ADDRESS/LENGTH"#.into(),
            r#"spec.loadBalancerSourceRanges: "1.2.3.4/40" is no address range (CIDR); it lets nobody in, write ADDRESS/LENGTH"#.into(),
        ]
    );

    for (text, why) in [
        ("10.0.0.256", "is no IP address"),
        ("224.0.0.1", "is a multicast address"),
        ("0.0.0.0", "is the unspecified address"),
        ("255.255.255.255", "is the broadcast address"),
        ("fd00::g", "is no IP address"),
        ("::1", "is a loopback address"),
        ("ff02::1", "is a multicast address"),
        ("::", "is the unspecified address"),
        ("fe80::1", "is a link-local address"),
    ] {
        let service = spec(&format!("clusterIP: '{text}'"));
        assert_eq!(service.cluster_ips, Vec::<IpAddr>::new());
        assert_eq!(service.problems, [format!("spec.clusterIP: {text:?} {why}; {not_served}")]);
    }
    // As kube-proxy has it; nobody would guess.
    let service = spec("clusterIP: 10.0.0.1, loadBalancerSourceRanges: [nonsense]");
    assert_eq!(
        service.problems.last().unwrap(),
        "spec.loadBalancerSourceRanges: none can be read, so everybody is let in; write ADDRESS/LENGTH"
    );
}

/// F15.
#[test]
fn ports() {
    let service = spec(
        "clusterIP: 10.0.0.1, ports: [{name: a, port: 0}, {name: b, port: 65536}, {name: c, port: -1}, {name: d}, \
         {name: e, port: eighty}, {name: f, port: 80.5}, {name: g, port: 99999999999999999999}, {name: h, port: 80, protocol: ICMP}, \
         {name: i, port: 80}, {name: j, port: 80}, {name: i, port: 81}, {name: i, port: 80, protocol: UDP}, \
         {name: k, port: 82, nodePort: 70000}, {name: l, port: 83, nodePort: 0}, {name: m, port: 90, protocol: SCTP}]",
    );
    let ports: Vec<_> = service.ports.iter().map(|p| (&*p.name, p.protocol, p.port.get(), p.node_port)).collect();
    assert_eq!(
        ports,
        [
            ("i", Protocol::Tcp, 80, None),
            ("i", Protocol::Udp, 80, None),
            ("k", Protocol::Tcp, 82, None),
            ("l", Protocol::Tcp, 83, None),
            ("m", Protocol::Sctp, 90, None),
        ]
    );
    let no_port = "is no port number; the port is not served, write one from 1 to 65535";
    assert_eq!(
        service.problems,
        [
            format!("spec.ports[0].port: 0 {no_port}"),
            format!("spec.ports[1].port: 65536 {no_port}"),
            format!("spec.ports[2].port: -1 {no_port}"),
            "spec.ports[3].port: missing; the port is not served, write one from 1 to 65535".into(),
            format!(r#"spec.ports[4].port: "eighty" {no_port}"#),
            format!(r#"spec.ports[5].port: "80.5" {no_port}"#),
            format!(r#"spec.ports[6].port: "100000000000000000000" {no_port}"#),
            r#"spec.ports[7].protocol: "ICMP" is none of TCP, UDP, SCTP; the port is not served, write one of these"#
                .into(),
            "spec.ports[9].port: 80/TCP is there already, the first stands; give it another number or protocol".into(),
            r#"spec.ports[10].name: "i" names another TCP port already, the first stands; give it a name of its own"#
                .into(),
            "spec.ports[12].nodePort: 70000 is no port number; it is left out, write one from 1 to 65535".into(),
        ]
    );
    let none = ["spec.ports: none, so there is nothing to serve; list at least one port"];
    assert_eq!(spec("clusterIP: 10.0.0.1, ports: []").problems, none);
    assert_eq!(spec("clusterIP: 'fd00::1', ports: []").problems, none);
}

#[test]
fn words_nobody_knows() {
    let service = spec(
        "clusterIP: 10.0.0.1, type: Magic, internalTrafficPolicy: Near, externalTrafficPolicy: Far, sessionAffinity: Cookie",
    );
    assert_eq!(
        service.problems,
        [
            r#"spec.type: "Magic" is unknown, treated as ClusterIP; write ClusterIP, NodePort or LoadBalancer"#,
            r#"spec.sessionAffinity: "Cookie" is neither None nor ClientIP, treated as None; write one of these"#,
            r#"spec.internalTrafficPolicy: "Near" is neither Cluster nor Local, treated as Cluster; write one of these"#,
            r#"spec.externalTrafficPolicy: "Far" is neither Cluster nor Local, treated as Cluster; write one of these"#,
        ]
    );
    assert_eq!((service.kind, service.affinity_secs), (ServiceType::ClusterIp, None));
    assert_eq!((service.internal_policy, service.external_policy), (TrafficPolicy::Cluster, TrafficPolicy::Cluster));
}

/// A96.
#[test]
fn affinity_timeouts() {
    for (config, secs, problems) in [
        ("", 10_800, 0),
        (", sessionAffinityConfig: {}", 10_800, 0),
        (", sessionAffinityConfig: {clientIP: {}}", 10_800, 0),
        (", sessionAffinityConfig: {clientIP: {timeoutSeconds: 1}}", 1, 0),
        (", sessionAffinityConfig: {clientIP: {timeoutSeconds: 86400}}", 86_400, 0),
        (", sessionAffinityConfig: {clientIP: {timeoutSeconds: 0}}", 10_800, 1),
        (", sessionAffinityConfig: {clientIP: {timeoutSeconds: 86401}}", 10_800, 1),
    ] {
        let service = spec(&format!("clusterIP: 10.0.0.1, sessionAffinity: ClientIP{config}"));
        assert_eq!((service.affinity_secs, service.problems.len()), (Some(secs), problems), "{config}");
    }
}

const SLICE: &str = "metadata: {namespace: ns, name: svc-1, labels: {kubernetes.io/service-name: svc}}";

fn endpoints(address_type: &str, list: &str) -> EndpointSlice {
    slice_of(&format!(
        "{{{SLICE}, addressType: {address_type}, endpoints: [{list}], ports: [{{name: '', port: 8080}}]}}"
    ))
    .unwrap()
}

/// A2, A17, A18, F13, F14.
#[test]
fn slices_that_are_not_ours() {
    for (yaml, why) in [
        (
            "{metadata: {labels: {kubernetes.io/service-name: svc, service.kubernetes.io/headless: ''}}, addressType: IPv4}",
            NotOurs::Headless,
        ),
        ("{metadata: {name: x}, addressType: IPv4}", NotOurs::NoServiceName),
        ("{metadata: {labels: {kubernetes.io/service-name: ''}}, addressType: IPv4}", NotOurs::NoServiceName),
        ("{metadata: {labels: {kubernetes.io/service-name: svc}}, addressType: FQDN}", NotOurs::AddressType),
        ("{metadata: {labels: {kubernetes.io/service-name: svc}}}", NotOurs::AddressType),
    ] {
        assert_eq!(slice_of(yaml).unwrap_err(), why, "{yaml}");
    }
}

/// A24.
#[test]
fn condition_defaults() {
    for (conditions, expected) in [
        ("", (true, true, false)),
        (", conditions: ", (true, true, false)),
        (", conditions: {}", (true, true, false)),
        (", conditions: {ready: null, serving: null, terminating: null}", (true, true, false)),
        (", conditions: {ready: false}", (false, true, false)),
        (", conditions: {ready: false, serving: false, terminating: true}", (false, false, true)),
    ] {
        let slice = endpoints("IPv4", &format!("{{addresses: [10.0.0.1]{conditions}}}"));
        let endpoint = &slice.endpoints[0];
        assert_eq!((endpoint.ready, endpoint.serving, endpoint.terminating), expected, "{conditions}");
    }
}

/// A21, A25, A26, A28.
#[test]
fn a_whole_slice() {
    let slice = slice_of(
        "
        metadata:
          namespace: ns
          name: svc-1
          labels: {kubernetes.io/service-name: svc}
          annotations: {endpoints.kubernetes.io/last-change-trigger-time: '2026-01-02T03:04:05.000000006Z'}
        addressType: IPv6
        ports:
        - {name: http, port: 8080}
        - {name: dns, port: 53, protocol: UDP}
        endpoints:
        - {addresses: ['fd00::1', 'fd00::2'], nodeName: n1, zone: z1, hints: {forZones: [{name: z1}, {name: z2}], forNodes: [{name: n1}]}}
        - {addresses: ['fd00::3'], nodeName: '', hints: {forZones: []}}
        ",
    )
    .unwrap();
    assert_eq!(slice.problems, Vec::<String>::new());
    assert_eq!((&*slice.namespace, &*slice.name, slice.family), ("ns", "svc-1", Family::V6));
    assert_eq!(slice.service, ServiceKey::new("ns", "svc"));
    assert_eq!(slice.trigger_time, Some(1_767_323_045_000_000_006));
    let ports: Vec<_> = slice.ports.iter().map(|p| (&*p.name, p.protocol, p.port.get())).collect();
    assert_eq!(ports, [("http", Protocol::Tcp, 8080), ("dns", Protocol::Udp, 53)]);
    let [first, second] = slice.endpoints.as_slice() else { panic!("{:?}", slice.endpoints) };
    assert_eq!(first.address, "fd00::1".parse::<IpAddr>().unwrap());
    assert_eq!(first.node.as_deref(), Some("n1"));
    let hints = first.hints.as_deref().unwrap();
    assert_eq!(hints.zones.iter().map(|zone| &**zone).collect::<Vec<_>>(), ["z1", "z2"]);
    assert_eq!(hints.nodes.iter().map(|node| &**node).collect::<Vec<_>>(), ["n1"]);
    assert_eq!((second.node.as_deref(), second.hints.as_deref()), (None, None));
}

/// A12, A21, F13.
#[test]
fn endpoints_left_out() {
    const V4: &str = "{addresses: [10.180.00.001]}, {addresses: []}, {}, {addresses: ['fd00::1']}, {addresses: ['::ffff:1.2.3.4']}, \
         {addresses: [127.0.0.1]}, {addresses: [224.0.0.1]}, {addresses: [169.254.1.1]}, {addresses: [0.0.0.0]}, \
         {addresses: [example.com]}, {addresses: [10.0.0.2]}";
    const V6: &str = "{addresses: ['fd00:0::0001']}, {addresses: []}, {}, {addresses: [10.0.0.1]}, {addresses: ['::ffff:1.2.3.4']}, \
         {addresses: ['::1']}, {addresses: ['ff02::1']}, {addresses: ['fe80::1']}, {addresses: ['::']}, {addresses: [example.com]}, \
         {addresses: ['fd00::2']}";
    let v4 = ["10.180.0.1", "10.0.0.2", "fd00::1", "127.0.0.1", "224.0.0.1", "169.254.1.1", "0.0.0.0", "IPv6"];
    let v6 = ["fd00::1", "fd00::2", "10.0.0.1", "::1", "ff02::1", "fe80::1", "::", "IPv4"];
    for (family, list, expected) in [("IPv4", V4, v4), ("IPv6", V6, v6)] {
        let [first, last, other, loopback, multicast, link_local, unspecified, its] = expected;
        let slice = endpoints(family, list);
        assert_eq!(slice.endpoints.iter().map(|e| e.address.to_string()).collect::<Vec<_>>(), [first, last]);
        let no_traffic = "it gets no traffic, list a pod's or a host's own address";
        let expected = [
            format!("endpoints[1].addresses: none; {no_traffic}"),
            format!("endpoints[2].addresses: none; {no_traffic}"),
            format!(
                "endpoints[3].addresses: {other:?} is not of the slice's addressType; it gets no traffic, list it in a slice of addressType \
                 {its}"
            ),
            format!(r#"endpoints[4].addresses: "::ffff:1.2.3.4" is an IPv4 address in IPv6 clothes; {no_traffic}"#),
            format!("endpoints[5].addresses: {loopback:?} is a loopback address; {no_traffic}"),
            format!("endpoints[6].addresses: {multicast:?} is a multicast address; {no_traffic}"),
            format!("endpoints[7].addresses: {link_local:?} is a link-local address; {no_traffic}"),
            format!("endpoints[8].addresses: {unspecified:?} is the unspecified address; {no_traffic}"),
            format!(r#"endpoints[9].addresses: "example.com" is no IP address; {no_traffic}"#),
        ];
        assert_eq!(slice.problems, expected);
    }
}

/// A22.
#[test]
fn slice_ports() {
    let slice = slice_of(&format!(
        "{{{SLICE}, addressType: IPv4, ports: [{{port: 1}}, {{name: a}}, {{name: b, port: null}}, {{name: c, port: 0}}, \
         {{name: d, port: 70000}}, {{name: e, port: 1, protocol: X}}, {{name: '', port: 2}}]}}"
    ))
    .unwrap();
    assert_eq!(slice.ports.iter().map(|port| (&*port.name, port.port.get())).collect::<Vec<_>>(), [("", 2)]);
    let no_port = "is no port number; the port is not served, write one from 1 to 65535";
    assert_eq!(
        slice.problems,
        [
            format!("ports[3].port: 0 {no_port}"),
            format!("ports[4].port: 70000 {no_port}"),
            r#"ports[5].protocol: "X" is none of TCP, UDP, SCTP; the port is not served, write one of these"#.into(),
        ]
    );
    for ports in ["", ", ports: ", ", ports: []"] {
        assert_eq!(slice_of(&format!("{{{SLICE}, addressType: IPv4{ports}}}")).unwrap().ports, []);
    }
}

/// F12: a slice of the largest size, all of it bad, stays small.
#[test]
fn remarks_are_bounded() {
    let slice = endpoints("IPv4", &vec!["{addresses: [127.0.0.1]}"; 1000].join(", "));
    assert_eq!((slice.endpoints.len(), slice.problems.len()), (0, PROBLEMS_MAX + 1));
    assert_eq!(slice.problems.last().unwrap(), "… and 984 more");
}

#[test]
fn nodes() {
    let (facts, problems) = node(&read(
        "
        metadata: {name: n1, labels: {topology.kubernetes.io/zone: z1, kubernetes.io/hostname: n1}}
        spec: {podCIDR: 10.1.0.0/24, podCIDRs: [10.1.0.0/24, 'fd00:1::/64', nonsense]}
        status:
          addresses:
          - {type: InternalIP, address: 192.0.2.010}
          - {type: InternalIP, address: '2001:db8::10'}
          - {type: Hostname, address: n1}
          - {type: InternalIP, address: n1}
        ",
    ));
    assert_eq!((&*facts.name, facts.zone.as_deref()), ("n1", Some("z1")));
    assert_eq!(ips(&facts.internal_ips), ["192.0.2.10", "2001:db8::10"]);
    assert_eq!(facts.pod_cidrs, ["10.1.0.0/24".parse().unwrap(), "fd00:1::/64".parse().unwrap()]);
    assert_eq!(
        problems,
        [
            r#"status.addresses: "n1" is no IP address; it is left out, see to the kubelet's --node-ip"#,
            r#"spec.podCIDRs: "nonsense" is no address range (CIDR); it is left out, write ADDRESS/LENGTH"#,
        ]
    );
    assert!(!facts.leaving);
    let (facts, problems) = node(&read("{metadata: {name: n2}, spec: {podCIDR: 10.2.0.0/24, taints: [{key: other}]}}"));
    assert_eq!((facts.zone, facts.pod_cidrs, problems), (None, vec!["10.2.0.0/24".parse().unwrap()], vec![]));
    assert!(!facts.leaving);
    // A117.
    assert!(node(&read("{spec: {taints: [{key: ToBeDeletedByClusterAutoscaler, effect: NoSchedule}]}}")).0.leaving);
    assert!(node(&read("{metadata: {deletionTimestamp: '2026-01-02T03:04:05Z'}}")).0.leaving);
}

#[test]
fn names_are_shared_and_forgotten() {
    let mut names = Names::default();
    assert!(Arc::ptr_eq(&names.get("n1"), &names.get("n1")));
    let kept = names.get("kept");
    for number in 0..10_000 {
        names.get(&number.to_string());
    }
    assert!(names.known.len() < 2_000, "{}", names.known.len());
    assert!(Arc::ptr_eq(&kept, &names.get("kept")));
}

/// What real API servers send and YAML rarely shows.
#[test]
fn json_as_the_api_server_sends_it() {
    let object: api::EndpointSlice = serde_json::from_str(
        r#"{"metadata":{"name":"s","namespace":"d","resourceVersion":"7","labels":{"kubernetes.io/service-name":"kubernetes"},
        "annotations":null,"ownerReferences":[{"kind":"Service"}],"managedFields":[{"fieldsV1":{"f:ports":{}}}]},
        "addressType":"IPv4","endpoints":[{"addresses":["10.0.0.1"],"conditions":{"ready":true}}],
        "ports":[{"name":"https","port":6443,"protocol":"TCP","appProtocol":null}],"future":{"field":[1]}}"#,
    )
    .unwrap();
    assert_eq!(object.metadata.resource_version, "7");
    let slice = slice(&object, &mut Names::default()).unwrap();
    assert_eq!((slice.endpoints.len(), slice.ports.len()), (1, 1));
}
