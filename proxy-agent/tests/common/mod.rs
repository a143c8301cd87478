//! A small world for plan and sync tests: model objects from short texts, and arbitrary event sequences.
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::{net::IpAddr, sync::Arc};

use proptest::prelude::*;
use proxy_agent::model::{
    Endpoint, EndpointHints, EndpointPort, EndpointSlice, Event, Family, NodeFacts, Pod, PodKey, Port, Protocol,
    Service, ServiceKey, ServicePort, ServiceType, TrafficPolicy,
};

pub(crate) fn port(number: u16) -> Port {
    Port::new(number).unwrap()
}

pub(crate) fn key(name: &str) -> ServiceKey {
    ServiceKey::new("default", name)
}

/// One TCP port 80, named `http`.
pub(crate) fn service(name: &str, ips: &[&str]) -> Service {
    Service {
        key: key(name),
        uid: format!("uid-{name}").into(),
        created: 100,
        kind: ServiceType::ClusterIp,
        cluster_ips: ips.iter().map(|ip| ip.parse().unwrap()).collect(),
        ports: vec![ServicePort { name: "http".into(), protocol: Protocol::Tcp, port: port(80), node_port: None }],
        internal_policy: TrafficPolicy::Cluster,
        external_policy: TrafficPolicy::Cluster,
        external_ips: Vec::new(),
        load_balancer_ips: Vec::new(),
        source_ranges: Vec::new(),
        affinity_secs: None,
        health_check_node_port: None,
        socket_lb: None,
        reset_deleted: None,
        algorithm: None,
        problems: Vec::new(),
    }
}

pub(crate) fn endpoint(address: IpAddr) -> Endpoint {
    Endpoint { address, ready: true, serving: true, terminating: false, node: None, hints: None }
}

/// Ready endpoints on port 8080, named `http`; the family is that of the first.
pub(crate) fn slice(service: &str, name: &str, addresses: &[&str]) -> EndpointSlice {
    let endpoints: Vec<Endpoint> = addresses.iter().map(|a| endpoint(a.parse().unwrap())).collect();
    EndpointSlice {
        namespace: "default".into(),
        name: name.into(),
        service: key(service),
        family: endpoints.first().map_or(Family::V4, |endpoint| Family::of(endpoint.address)),
        ports: vec![EndpointPort { name: "http".into(), protocol: Protocol::Tcp, port: port(8080) }],
        endpoints,
        trigger_time: None,
        problems: Vec::new(),
    }
}

pub(crate) fn node(name: &str, zone: Option<&str>) -> NodeFacts {
    NodeFacts { name: name.into(), zone: zone.map(Into::into), ..NodeFacts::default() }
}

fn protocols() -> impl Strategy<Value = Protocol> {
    prop_oneof![4 => Just(Protocol::Tcp), 2 => Just(Protocol::Udp), 1 => Just(Protocol::Sctp)]
}

fn port_names() -> impl Strategy<Value = Arc<str>> {
    prop_oneof![Just("http".into()), Just("".into())]
}

/// What makes a Service reachable from outside.
#[derive(Clone, Debug)]
struct Outside {
    node_ports: Vec<Option<Port>>,
    external_ips: Vec<IpAddr>,
    load_balancer_ips: Vec<IpAddr>,
    source_ranges: Vec<ipnet::IpNet>,
    local: bool,
}

/// Addresses that the node has at times, VIPs of others, and some that mean nothing.
fn outside() -> impl Strategy<Value = Outside> {
    let addresses = || {
        let some = ["192.0.2.1", "192.0.2.9", "10.96.0.1", "203.0.113.1", "2001:db8::1", "fd00::1", "127.0.0.1"];
        let some: Vec<IpAddr> = some.iter().map(|ip| ip.parse().unwrap()).collect();
        prop_oneof![2 => Just(Vec::new()), 1 => prop::sample::subsequence(some, 0..3)]
    };
    let ranges = ["192.0.2.0/29", "198.51.100.7/24", "0.0.0.0/0", "2001:db8::/64"];
    let ranges: Vec<ipnet::IpNet> = ranges.iter().map(|net| net.parse().unwrap()).collect();
    let number = prop_oneof![2 => Just(None), 2 => Just(Some(port(30080))), 1 => Just(Some(port(80)))];
    (
        prop::collection::vec(number, 0..3),
        addresses(),
        addresses(),
        prop::sample::subsequence(ranges, 0..3),
        any::<bool>(),
    )
        .prop_map(|(node_ports, external_ips, load_balancer_ips, source_ranges, local)| Outside {
            node_ports,
            external_ips,
            load_balancer_ips,
            source_ranges,
            local,
        })
}

/// The node's own addresses come and go.
fn own_addresses() -> impl Strategy<Value = Event> {
    let some = ["127.0.0.1", "192.0.2.1", "192.0.2.9", "203.0.113.1", "10.96.0.1", "2001:db8::1", "fe80::1"];
    let some: Vec<IpAddr> = some.iter().map(|ip| ip.parse().unwrap()).collect();
    prop::sample::subsequence(some, 0..5).prop_map(|addresses| Event::Addresses(addresses.into_iter().collect()))
}

/// Few names, few addresses: claims collide often.
pub(crate) fn services() -> impl Strategy<Value = Arc<Service>> {
    let ports = prop::collection::vec((port_names(), protocols(), prop_oneof![Just(80_u16), Just(443)]), 0..3);
    let ips = prop::sample::subsequence(vec!["10.96.0.1", "10.96.0.2", "fd00::1", "127.0.0.1"], 0..3);
    let algorithm = prop_oneof![4 => Just(None), 1 => Just(Some("round-robin")), 1 => Just(Some("maglev")), 1 => Just(Some("nonsense"))];
    let socket_lb =
        prop_oneof![3 => Just(None), 1 => Just(Some("all")), 2 => Just(Some("node")), 1 => Just(Some("nonsense"))];
    let annotations = (algorithm, socket_lb);
    (0..5_usize, 0..3_i64, 0..2_u8, ips, ports, any::<(bool, bool, bool)>(), annotations, outside()).prop_map(
        |(name, created, uid, ips, ports, (internal_local, external_name, resets), (algorithm, socket_lb), outside)| {
            let mut service = service(["a", "b", "c", "d", "e"][name], &ips);
            service.created = created;
            service.uid = format!("{uid}").into();
            service.ports = ports
                .into_iter()
                .map(|(name, protocol, number)| ServicePort { name, protocol, port: port(number), node_port: None })
                .collect();
            let Outside { node_ports, external_ips, load_balancer_ips, source_ranges, local } = outside;
            for (port, node_port) in service.ports.iter_mut().zip(node_ports) {
                port.node_port = node_port;
            }
            (service.external_ips, service.load_balancer_ips) = (external_ips, load_balancer_ips);
            service.source_ranges = source_ranges;
            if !service.load_balancer_ips.is_empty() {
                service.kind = ServiceType::LoadBalancer;
                service.health_check_node_port = Some(port(30_105));
            }
            if local {
                service.external_policy = TrafficPolicy::Local;
            }
            if internal_local {
                service.internal_policy = TrafficPolicy::Local;
            }
            if external_name && created == 0 {
                service.kind = ServiceType::ExternalName;
            }
            service.algorithm = algorithm.map(Into::into);
            service.socket_lb = socket_lb.map(Into::into);
            service.reset_deleted = resets.then(|| "true".into());
            Arc::new(service)
        },
    )
}

fn endpoints(family: Family) -> impl Strategy<Value = Endpoint> {
    let addresses = match family {
        Family::V4 => vec!["10.0.0.1", "10.0.0.2", "10.0.0.3", "127.0.0.1"],
        Family::V6 => vec!["fd00:1::1", "fd00:1::2", "::1", "10.0.0.4"],
    };
    let names = || prop::collection::btree_set(prop_oneof![Just("x".into()), Just("y".into())], 0..3);
    (prop::sample::select(addresses), any::<(bool, bool, bool)>(), prop::option::of(names()), names(), 0..3_u8)
        .prop_map(|(address, (ready, serving, terminating), zones, nodes, on)| Endpoint {
            address: address.parse().unwrap(),
            ready,
            serving,
            terminating,
            node: [None, Some("x".into()), Some("y".into())][usize::from(on)].clone(),
            hints: zones.map(|zones| Box::new(EndpointHints { zones, nodes })),
        })
}

pub(crate) fn slices() -> impl Strategy<Value = Arc<EndpointSlice>> {
    let family = prop_oneof![2 => Just(Family::V4), 1 => Just(Family::V6)];
    family.prop_flat_map(|family| {
        let ports = prop::collection::vec((port_names(), protocols(), 8080..8082_u16), 0..3);
        let endpoints = prop::collection::vec(endpoints(family), 0..5);
        (0..5_usize, 0..4_usize, ports, endpoints, prop::option::of(0..3_i64)).prop_map(
            move |(name, service, ports, endpoints, trigger_time)| {
                Arc::new(EndpointSlice {
                    namespace: "default".into(),
                    name: ["s1", "s2", "s3", "s4", "s5"][name].into(),
                    service: key(["a", "b", "c", "d"][service]),
                    family,
                    ports: ports
                        .into_iter()
                        .map(|(name, protocol, number)| EndpointPort { name, protocol, port: port(number) })
                        .collect(),
                    endpoints,
                    trigger_time,
                    problems: Vec::new(),
                })
            },
        )
    })
}

pub(crate) fn nodes() -> impl Strategy<Value = NodeFacts> {
    let zone = prop_oneof![Just(None), Just(Some("x")), Just(Some("y"))];
    let ips = prop::sample::subsequence(vec!["192.0.2.1", "192.0.2.9", "2001:db8::1"], 0..3);
    let cidrs = prop::sample::subsequence(vec!["10.244.1.0/24", "fd00:244:1::/64"], 0..=2);
    (prop_oneof![3 => Just("x"), 1 => Just("y")], zone, ips, cidrs).prop_map(|(name, zone, ips, cidrs)| NodeFacts {
        internal_ips: ips.iter().map(|ip| ip.parse().unwrap()).collect(),
        pod_cidrs: cidrs.iter().map(|cidr| cidr.parse().unwrap()).collect(),
        ..node(name, zone)
    })
}

fn pod_keys() -> impl Strategy<Value = PodKey> {
    let select = |names: &[&'static str]| prop::sample::select(names.to_vec());
    (select(&["n", "m"]), select(&["p", "q", "r"])).prop_map(|(namespace, name)| (namespace.into(), name.into()))
}

fn asked() -> impl Strategy<Value = Option<Arc<str>>> {
    prop::sample::select(vec![None, Some("node"), Some("all"), Some("odd")]).prop_map(|value| value.map(Into::into))
}

fn pods() -> impl Strategy<Value = Arc<Pod>> {
    (pod_keys(), asked(), any::<bool>()).prop_map(|(key, socket_lb, host_network)| {
        let uid = format!("{}/{}", key.0, key.1).into();
        Arc::new(Pod { key, uid, host_network, socket_lb })
    })
}

/// Of pods and namespaces.
fn pod_events() -> impl Strategy<Value = Event> {
    let namespaces = || prop::sample::select(vec!["n", "m"]);
    let unreadable = || prop::collection::btree_set(pod_keys(), 0..2);
    let annotated = prop::collection::btree_map(namespaces().prop_map(Arc::from), asked(), 0..3);
    prop_oneof![
        4 => pods().prop_map(Event::Pod),
        2 => pod_keys().prop_map(Event::PodGone),
        1 => (prop::collection::vec(pods(), 0..4), unreadable())
            .prop_map(|(list, unreadable)| Event::Pods { list, unreadable }),
        2 => (namespaces(), asked()).prop_map(|(name, value)| Event::Namespace(name.into(), value)),
        1 => annotated.prop_map(|list| {
            let list = list.into_iter().filter_map(|(name, value)| Some((name, value?))).collect();
            Event::Namespaces { list, unreadable: ["n".into()].into() }
        }),
    ]
}

pub(crate) fn events() -> impl Strategy<Value = Event> {
    let names = || prop::sample::select(vec!["a", "b", "c", "d", "e"]);
    let slice_names = || prop::sample::select(vec!["s1", "s2", "s3", "s4", "s5"]);
    prop_oneof![
        8 => services().prop_map(Event::Service),
        2 => names().prop_map(|name| Event::ServiceGone(key(name))),
        8 => slices().prop_map(Event::Slice),
        2 => slice_names().prop_map(|name| Event::SliceGone { namespace: "default".into(), name: name.into() }),
        1 => nodes().prop_map(Event::Node),
        2 => own_addresses(),
        4 => pod_events(),
        1 => prop::collection::vec(services(), 0..4).prop_map(Event::Services),
        1 => prop::collection::vec(slices(), 0..4).prop_map(Event::Slices),
    ]
}
