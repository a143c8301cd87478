//! A made-up cluster: so many Services, ten endpoints each, on a hundred nodes.

use std::{net::Ipv4Addr, sync::Arc};

use proxy_agent::model::{Endpoint, EndpointSlice, Event, NodeFacts, Service};

const ENDPOINTS: u32 = 10;

#[path = "../../tests/common/mod.rs"]
mod world;

fn name(i: u32) -> String {
    format!("service-{i:05}")
}

fn service(i: u32) -> Service {
    Service {
        uid: format!("{i:08x}-0000-4000-8000-000000000000").into(),
        created: i64::from(i),
        cluster_ips: vec![Ipv4Addr::from(0x0a60_0001 + i).into()],
        ..world::service(&name(i), &[])
    }
}

/// The slice of Service `i`; `version` moves its last endpoint.
pub(crate) fn slice(i: u32, version: u32) -> Arc<EndpointSlice> {
    slice_of(i, version, ENDPOINTS)
}

fn slice_of(i: u32, version: u32, endpoints: u32) -> Arc<EndpointSlice> {
    let endpoint = |n: u32| {
        let moved = if n + 1 == endpoints { version % 2 * 0x0080_0000 } else { 0 };
        // Not in order: that is what slices look like.
        let address = Ipv4Addr::from(0x0a80_0000 + moved + i * endpoints + (n * 7) % endpoints).into();
        let node = Some(format!("node-{}", (i + n) % 100).into());
        Endpoint { node, ..world::endpoint(address) }
    };
    let endpoints = (0..endpoints).map(endpoint).collect();
    Arc::new(EndpointSlice { endpoints, ..world::slice(&name(i), &format!("{}-abcde", name(i)), &[]) })
}

pub(crate) fn events(services: u32) -> Vec<Event> {
    events_of(services, ENDPOINTS)
}

/// The same with so many endpoints each, which is no multiple of seven.
pub(crate) fn events_of(services: u32, endpoints: u32) -> Vec<Event> {
    vec![
        Event::Node(NodeFacts { name: "node-7".into(), ..NodeFacts::default() }),
        Event::Addresses([Ipv4Addr::new(192, 0, 2, 7).into()].into()),
        Event::Services((0..services).map(|i| Arc::new(service(i))).collect()),
        Event::Slices((0..services).map(|i| slice_of(i, 0, endpoints)).collect()),
    ]
}
