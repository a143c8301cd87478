//! Services, EndpointSlices and Nodes as the agents read them: ordinary Kubernetes objects, one file each.

use std::{
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::{Family, Place, World};

/// A Service in the namespace `default`.
pub fn service(name: &str) -> Service {
    Service {
        name: name.to_owned(),
        cluster_ips: Vec::new(),
        ports: Vec::new(),
        kind: "ClusterIP",
        internal_local: false,
        external_local: false,
        external_ips: Vec::new(),
        ingress: Vec::new(),
        source_ranges: Vec::new(),
        affinity: None,
        annotations: Vec::new(),
    }
}

#[derive(Clone, Debug)]
pub struct Service {
    name: String,
    cluster_ips: Vec<IpAddr>,
    ports: Vec<Value>,
    kind: &'static str,
    internal_local: bool,
    external_local: bool,
    external_ips: Vec<IpAddr>,
    ingress: Vec<Value>,
    source_ranges: Vec<String>,
    affinity: Option<u32>,
    annotations: Vec<(String, String)>,
}

impl Service {
    /// At most one of each family, the primary one first.
    pub fn cluster_ips(mut self, ips: &[IpAddr]) -> Self {
        self.cluster_ips = ips.to_vec();
        self
    }

    pub fn port(mut self, name: &str, protocol: &str, port: u16) -> Self {
        self.ports.push(json!({"name": name, "protocol": protocol, "port": port}));
        self
    }

    /// `internalTrafficPolicy: Local`
    pub fn local(mut self) -> Self {
        self.internal_local = true;
        self
    }

    /// The NodePort of the port added last; the Service is at least of that type.
    pub fn node_port(mut self, number: u16) -> Self {
        if let Some(port) = self.ports.last_mut().and_then(Value::as_object_mut) {
            port.insert("nodePort".to_owned(), number.into());
        }
        if self.kind == "ClusterIP" {
            self.kind = "NodePort";
        }
        self
    }

    /// `externalTrafficPolicy: Local`
    pub fn external_local(mut self) -> Self {
        self.external_local = true;
        self
    }

    /// What a load balancer has given; ipMode VIP.
    pub fn load_balancer(self, ips: &[IpAddr]) -> Self {
        self.ingress(ips.iter().map(|ip| json!({"ip": ip, "ipMode": "VIP"})).collect())
    }

    /// `status.loadBalancer.ingress` as given.
    pub fn ingress(mut self, ingress: Vec<Value>) -> Self {
        self.kind = "LoadBalancer";
        self.ingress = ingress;
        self
    }

    pub fn source_ranges(mut self, ranges: &[&str]) -> Self {
        self.source_ranges = ranges.iter().map(|&range| range.to_owned()).collect();
        self
    }

    /// `sessionAffinity: ClientIP` for so many seconds.
    pub fn affinity(mut self, seconds: Option<u32>) -> Self {
        self.affinity = seconds;
        self
    }

    pub fn external_ips(mut self, ips: &[IpAddr]) -> Self {
        self.external_ips = ips.to_vec();
        self
    }

    pub fn annotation(mut self, key: &str, value: &str) -> Self {
        self.annotations.push((key.to_owned(), value.to_owned()));
        self
    }

    pub fn json(self) -> Value {
        let Self {
            name,
            cluster_ips,
            ports,
            kind,
            internal_local,
            external_local,
            external_ips,
            ingress,
            source_ranges,
            affinity,
            annotations,
        } = self;
        let policy = |local| if local { "Local" } else { "Cluster" };
        let from_outside = kind != "ClusterIP" || !external_ips.is_empty();
        let families: Vec<&str> = cluster_ips.iter().map(|ip| if ip.is_ipv4() { "IPv4" } else { "IPv6" }).collect();
        let annotations: serde_json::Map<String, Value> = annotations.into_iter().map(|(k, v)| (k, v.into())).collect();
        let mut object = json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"namespace": "default", "name": name, "uid": format!("uid-{name}"), "annotations": annotations},
            "spec": {
                "type": kind,
                "clusterIP": cluster_ips.first().map_or("None".to_owned(), IpAddr::to_string),
                "clusterIPs": cluster_ips.iter().map(IpAddr::to_string).collect::<Vec<_>>(),
                "ipFamilies": families,
                "ports": ports,
                "internalTrafficPolicy": policy(internal_local),
            },
        });
        // As the API server has it: fields that mean nothing here are not there.
        if let Some(spec) = object.pointer_mut("/spec").and_then(Value::as_object_mut) {
            if from_outside {
                spec.insert("externalTrafficPolicy".to_owned(), policy(external_local).into());
            }
            if !external_ips.is_empty() {
                spec.insert("externalIPs".to_owned(), json!(external_ips));
            }
            if let Some(seconds) = affinity {
                spec.insert("sessionAffinity".to_owned(), "ClientIP".into());
                spec.insert("sessionAffinityConfig".to_owned(), json!({"clientIP": {"timeoutSeconds": seconds}}));
            }
            if !source_ranges.is_empty() {
                spec.insert("loadBalancerSourceRanges".to_owned(), json!(source_ranges));
            }
        }
        if !ingress.is_empty()
            && let Some(fields) = object.as_object_mut()
        {
            fields.insert("status".to_owned(), json!({"loadBalancer": {"ingress": ingress}}));
        }
        object
    }
}

/// An EndpointSlice of one family for a Service of the namespace `default`.
pub fn slice(service: &str, family: Family) -> Slice {
    Slice { service: service.to_owned(), suffix: family.to_string(), family, ports: Vec::new(), endpoints: Vec::new() }
}

#[derive(Clone, Debug)]
pub struct Slice {
    service: String,
    suffix: String,
    family: Family,
    ports: Vec<Value>,
    endpoints: Vec<Value>,
}

impl Slice {
    /// Tells several slices of one Service and family apart.
    pub fn suffix(mut self, suffix: &str) -> Self {
        self.suffix = format!("{}-{suffix}", self.family);
        self
    }

    /// A port that the Service's port of this name leads to.
    pub fn port(mut self, name: &str, protocol: &str, port: u16) -> Self {
        self.ports.push(json!({"name": name, "protocol": protocol, "port": port}));
        self
    }

    pub fn endpoint(self, place: &Place) -> Self {
        self.endpoint_with(place, json!({"ready": true, "serving": true, "terminating": false}), Value::Null)
    }

    pub fn endpoints<'a>(self, places: impl IntoIterator<Item = &'a Place>) -> Self {
        places.into_iter().fold(self, Slice::endpoint)
    }

    /// With the conditions and hints given.
    pub fn endpoint_with(mut self, place: &Place, conditions: Value, hints: Value) -> Self {
        let node = place.node.map(|node| format!("node{node}"));
        let mut endpoint = json!({"addresses": [place.ip(self.family)], "conditions": conditions, "nodeName": node});
        if let (Some(fields), false) = (endpoint.as_object_mut(), hints.is_null()) {
            fields.insert("hints".to_owned(), hints);
        }
        self.endpoints.push(endpoint);
        self
    }

    pub fn json(self) -> Value {
        let Self { service, suffix, family, ports, endpoints } = self;
        json!({
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "namespace": "default",
                "name": format!("{service}-{suffix}"),
                "labels": {"kubernetes.io/service-name": service},
            },
            "addressType": if family == Family::V4 { "IPv4" } else { "IPv6" },
            "ports": ports,
            "endpoints": endpoints,
        })
    }
}

/// Every node of a world, each in a zone of its own.
/// By which the cgroup of a world's pod is named.
pub fn pod_uid(name: &str) -> String {
    let hash = name
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    format!("{:08x}-0000-4000-8000-{:012x}", hash >> 32, hash & 0xffff_ffff)
}

/// A pod of a world, in the namespace `default`.
pub fn pod(place: &Place, annotations: Value) -> Value {
    let Place { name, node, .. } = place;
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "default", "uid": pod_uid(name), "annotations": annotations},
        "spec": {"nodeName": node.map(|node| format!("node{node}"))},
        "status": {"phase": "Running", "podIP": place.v4},
    })
}

pub fn nodes(world: &World) -> Vec<Value> {
    world.nodes.iter().zip(["zone-a", "zone-b"]).map(|(at, zone)| node(&at.place, zone)).collect()
}

/// A Node object, in the zone given.
pub fn node(place: &Place, zone: &str) -> Value {
    let number = place.node.unwrap_or_default();
    let (v4, v6) = (format!("10.244.{number}.0/24"), format!("fd00:244:{number}::/64"));
    json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": place.name,
            "labels": {"kubernetes.io/hostname": place.name, "topology.kubernetes.io/zone": zone},
        },
        "spec": {"podCIDR": v4, "podCIDRs": [v4, v6]},
        "status": {"addresses": [
            {"type": "InternalIP", "address": place.v4},
            {"type": "InternalIP", "address": place.v6},
        ]},
    })
}

/// Where an object of this kind and name is.
pub fn file(dir: &Path, object: &Value) -> Result<PathBuf> {
    let text = |pointer: &str| object.pointer(pointer).and_then(Value::as_str);
    let kind = text("/kind").context("an object without kind")?;
    let name = text("/metadata/name").context("an object without name")?;
    Ok(dir.join(format!("{}-{name}.json", kind.to_lowercase())))
}

/// One object, one file; renamed into place, so that a reader never sees half of it.
pub fn write(dir: &Path, object: &Value) -> Result<()> {
    let path = file(dir, object)?;
    let draft = path.with_extension("draft");
    fs::write(&draft, serde_json::to_vec_pretty(object)?).with_context(|| format!("write {}", draft.display()))?;
    fs::rename(&draft, &path).with_context(|| format!("rename {}", draft.display()))
}

pub fn remove(dir: &Path, object: &Value) -> Result<()> {
    let path = file(dir, object)?;
    fs::remove_file(&path).with_context(|| format!("remove {}", path.display()))
}
