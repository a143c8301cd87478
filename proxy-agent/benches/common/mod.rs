//! A made-up cluster: so many Services, ten endpoints each, on a hundred nodes.

use std::{net::Ipv4Addr, sync::Arc};

use proxy_agent::model::{
    Endpoint, EndpointPort, EndpointSlice, Event, Family, NodeFacts, Port, Protocol, Service, ServiceKey, ServicePort,
    ServiceType, TrafficPolicy,
    index::{Index, Touched},
};

const ENDPOINTS: u32 = 10;

fn key(i: u32) -> ServiceKey {
    ServiceKey::new("default", &format!("service-{i:05}"))
}

fn service(i: u32) -> Service {
    Service {
        key: key(i),
        uid: format!("{i:08x}-0000-4000-8000-000000000000").into(),
        created: i64::from(i),
        kind: ServiceType::ClusterIp,
        cluster_ips: vec![Ipv4Addr::from(0x0a60_0001 + i).into()],
        ports: vec![ServicePort { name: "http".into(), protocol: Protocol::Tcp, port: port(80), node_port: None }],
        internal_policy: TrafficPolicy::Cluster,
        external_policy: TrafficPolicy::Cluster,
        external_ips: Vec::new(),
        load_balancer_ips: Vec::new(),
        source_ranges: Vec::new(),
        affinity_secs: None,
        health_check_node_port: None,
        algorithm: None,
        problems: Vec::new(),
    }
}

fn port(number: u16) -> Port {
    Port::new(number).unwrap_or(Port::MIN)
}

/// The slice of Service `i`; `version` moves its last endpoint.
pub(crate) fn slice(i: u32, version: u32) -> Arc<EndpointSlice> {
    let endpoint = |n: u32| {
        let moved = if n + 1 == ENDPOINTS { version % 2 * 0x0080_0000 } else { 0 };
        // Not in order: that is what slices look like.
        let address = Ipv4Addr::from(0x0a80_0000 + moved + i * ENDPOINTS + (n * 7) % ENDPOINTS).into();
        let node = Some(format!("node-{}", (i + n) % 100).into());
        Endpoint { address, ready: true, serving: true, terminating: false, node, hints: None }
    };
    Arc::new(EndpointSlice {
        namespace: "default".into(),
        name: format!("service-{i:05}-abcde").into(),
        service: key(i),
        family: Family::V4,
        ports: vec![EndpointPort { name: "http".into(), protocol: Protocol::Tcp, port: port(8080) }],
        endpoints: (0..ENDPOINTS).map(endpoint).collect(),
        trigger_time: None,
        problems: Vec::new(),
    })
}

pub(crate) fn events(services: u32) -> Vec<Event> {
    vec![
        Event::Node(NodeFacts { name: "node-7".into(), ..NodeFacts::default() }),
        Event::Services((0..services).map(|i| Arc::new(service(i))).collect()),
        Event::Slices((0..services).map(|i| slice(i, 0)).collect()),
    ]
}

#[allow(dead_code, reason = "the other bench has the loop do it")]
pub(crate) fn index(services: u32) -> Index {
    let mut index = Index::default();
    for event in events(services) {
        index.apply(event, &mut Touched::default());
    }
    index
}
