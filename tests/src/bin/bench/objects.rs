//! What the measured proxies are fed with: Services with a ClusterIP and a port, a slice for each, and a Node.

use std::net::Ipv4Addr;

use anyhow::Result;
use proxy_tests::feed::Feed;
use serde_json::{Value, json};

use crate::rules::{PORT, SERVER_PORT, vip};

pub const NODE: &str = "bench-node";

pub fn service(index: u32) -> Value {
    let vip = vip(index).to_string();
    json!({
        "kind": "Service",
        "metadata": {"name": format!("s{index}"), "namespace": "bench", "creationTimestamp": "2026-01-01T00:00:00Z"},
        "spec": {
            "type": "ClusterIP",
            "clusterIP": vip,
            "clusterIPs": [vip],
            "ipFamilies": ["IPv4"],
            "ports": [{"name": "http", "port": PORT, "protocol": "TCP"}],
        },
    })
}

/// Where the `n`-th endpoint of a Service is, of which each has at most `room`.
pub fn endpoint(index: u32, room: u32, n: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 128, 0, 0)) + index * room + n)
}

/// The slice of one Service with these endpoints.
pub fn slice(index: u32, room: u32, endpoints: impl Iterator<Item = u32>) -> Value {
    let endpoint = |n: u32| {
        json!({
            "addresses": [endpoint(index, room, n)],
            "conditions": {"ready": true, "serving": true, "terminating": false},
            "nodeName": format!("n{}", n % 7),
        })
    };
    json!({
        "kind": "EndpointSlice",
        "metadata": {
            "name": format!("s{index}-a"),
            "namespace": "bench",
            "labels": {"kubernetes.io/service-name": format!("s{index}")},
        },
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": SERVER_PORT, "protocol": "TCP"}],
        "endpoints": endpoints.map(endpoint).collect::<Vec<_>>(),
    })
}

/// The Node and the first so many Services, each with its slice.
pub fn feed(services: u32, slice: impl Fn(u32) -> Value) -> Result<Feed> {
    let feed = Feed::default();
    feed.set(&json!({
        "kind": "Node",
        "metadata": {"name": NODE},
        "spec": {},
        "status": {"addresses": [{"type": "InternalIP", "address": "10.1.0.1"}]},
    }))?;
    for index in 0..services {
        feed.set(&service(index))?;
        feed.set(&slice(index))?;
    }
    Ok(feed)
}
