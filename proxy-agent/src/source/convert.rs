//! From API objects to the model.
//!
//! Converting never fails as a whole: what is not understood is left out and said in the object's `problems`, naming field and
//! value, and the rest of the object stands (contract A9). Objects that are none of the proxy's business (contract A1, A2,
//! A4, A5, A17, A18) are [`NotOurs`], whatever else they say; a source reports such a one as gone, which makes a change of type or
//! label work in both directions (A6).

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    net::IpAddr,
    sync::Arc,
};

use k8s_openapi::jiff::Timestamp;

use super::{
    ALGORITHM_ANNOTATION, RESET_DELETED_ANNOTATION, SOCKET_LB_ANNOTATION,
    address::{parse_cidr, parse_ip},
    api,
};
use crate::model::{
    Endpoint, EndpointHints, EndpointPort, EndpointSlice, Family, NodeFacts, Pod, PodKey, Port, Protocol, Service,
    ServiceKey, ServicePort, ServiceType, TrafficPolicy,
    address::{NO_TRAFFIC, unfit_for_endpoint, unfit_for_vip},
};

/// Session affinity lasts this long where the Service does not say (contract A96).
const AFFINITY_SECS: u32 = 10_800;
/// The longest session affinity the API allows (contract A96).
const AFFINITY_MAX_SECS: u32 = 86_400;
/// Remarks kept for one object: a slice may hold a thousand bad endpoints.
const PROBLEMS_MAX: usize = 16;

/// Why an object is none of the proxy's business.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum NotOurs {
    /// Labelled for another proxy (A1).
    OtherProxy,
    /// `clusterIP: None`, or a slice of such a Service (A2, A4).
    Headless,
    /// No cluster IP yet (A4).
    NoClusterIp,
    /// A5.
    ExternalName,
    /// A slice that names no Service (A17).
    NoServiceName,
    /// A slice of names, or of something newer (A18).
    AddressType,
}

/// Remarks on one object, bounded.
#[derive(Default)]
struct Problems {
    said: Vec<String>,
    more: usize,
}

impl Problems {
    fn say(&mut self, problem: String) {
        if self.said.len() < PROBLEMS_MAX { self.said.push(problem) } else { self.more += 1 }
    }

    fn into_vec(mut self) -> Vec<String> {
        if self.more > 0 {
            self.said.push(format!("… and {} more", self.more));
        }
        self.said.shrink_to_fit();
        self.said
    }
}

/// Strings that many objects share (names of nodes, zones, ports, namespaces), held once.
#[derive(Default)]
pub(super) struct Names {
    known: HashSet<Arc<str>>,
    tidy_at: usize,
}

impl Names {
    pub(super) fn get(&mut self, name: &str) -> Arc<str> {
        if let Some(known) = self.known.get(name) {
            return Arc::clone(known);
        }
        if self.known.len() >= self.tidy_at.max(1024) {
            self.known.retain(|name| Arc::strong_count(name) > 1);
            self.tidy_at = 2 * self.known.len();
        }
        let name: Arc<str> = name.into();
        self.known.insert(Arc::clone(&name));
        name
    }
}

pub(super) fn key(metadata: &api::Metadata, names: &mut Names) -> ServiceKey {
    ServiceKey { namespace: names.get(&metadata.namespace), name: names.get(&metadata.name) }
}

pub(super) fn service(object: &api::Service, names: &mut Names) -> Result<Service, NotOurs> {
    let api::Service { metadata, spec, status } = object;
    if metadata.labels.contains_key(api::PROXY_NAME_LABEL) {
        return Err(NotOurs::OtherProxy);
    }
    let mut problems = Problems::default();
    let kind = match spec.r#type.as_deref() {
        None | Some("" | "ClusterIP") => ServiceType::ClusterIp,
        Some("NodePort") => ServiceType::NodePort,
        Some("LoadBalancer") => ServiceType::LoadBalancer,
        Some("ExternalName") => return Err(NotOurs::ExternalName),
        Some(other) => {
            problems.say(format!(
                "spec.type: {other:?} is unknown, treated as ClusterIP; write ClusterIP, NodePort or LoadBalancer"
            ));
            ServiceType::ClusterIp
        }
    };
    // The API server fills in clusterIP from clusterIPs; a hand-written file need not.
    match spec.cluster_ips.first().filter(|_| spec.cluster_ip.is_empty()).unwrap_or(&spec.cluster_ip).as_str() {
        "" => return Err(NotOurs::NoClusterIp),
        "None" => return Err(NotOurs::Headless),
        _ => {}
    }
    let cluster_ips = cluster_ips(spec, &mut problems);
    let ports = service_ports(&spec.ports, names, &mut problems);
    let affinity_secs = affinity(spec, &mut problems);
    let vips = |field: &str, texts: &mut dyn Iterator<Item = &String>, problems: &mut Problems| {
        let mut ips = Vec::new();
        for text in texts {
            match vip(text) {
                Ok(ip) if ips.contains(&ip) => {}
                Ok(ip) => ips.push(ip),
                Err(why) => problems.say(format!("{field}: {text:?} {why}; {NOT_SERVED}")),
            }
        }
        ips
    };
    let external_ips = vips("spec.externalIPs", &mut spec.external_ips.iter(), &mut problems);
    let mut ingress = status
        .load_balancer
        .ingress
        .iter()
        .filter(|ingress| !ingress.ip.is_empty() && matches!(ingress.ip_mode.as_deref(), None | Some("VIP")))
        .map(|ingress| &ingress.ip);
    let load_balancer_ips = vips("status.loadBalancer.ingress", &mut ingress, &mut problems);
    let mut source_ranges = Vec::new();
    for text in &spec.load_balancer_source_ranges {
        match parse_cidr(text) {
            Ok(net) => source_ranges.push(net),
            Err(why) => {
                problems.say(format!("spec.loadBalancerSourceRanges: {text:?} {why}; it lets nobody in, {RANGE}"))
            }
        }
    }
    if source_ranges.is_empty() && !spec.load_balancer_source_ranges.is_empty() {
        problems.say(format!("spec.loadBalancerSourceRanges: none can be read, so everybody is let in; {RANGE}"));
    }
    let health_check_node_port =
        optional_port("spec.healthCheckNodePort", spec.health_check_node_port.as_ref(), &mut problems);
    let internal_policy = policy("spec.internalTrafficPolicy", spec.internal_traffic_policy.as_deref(), &mut problems);
    let external_policy = policy("spec.externalTrafficPolicy", spec.external_traffic_policy.as_deref(), &mut problems);
    Ok(Service {
        key: key(metadata, names),
        uid: metadata.uid.as_str().into(),
        created: metadata.creation_timestamp.as_deref().and_then(timestamp).map_or(0, Timestamp::as_second),
        kind,
        cluster_ips,
        ports,
        internal_policy,
        external_policy,
        external_ips,
        load_balancer_ips,
        source_ranges,
        affinity_secs,
        health_check_node_port,
        algorithm: annotation(metadata, ALGORITHM_ANNOTATION, names),
        socket_lb: annotation(metadata, SOCKET_LB_ANNOTATION, names),
        reset_deleted: annotation(metadata, RESET_DELETED_ANNOTATION, names),
        problems: problems.into_vec(),
    })
}

fn annotation(metadata: &api::Metadata, name: &str, names: &mut Names) -> Option<Arc<str>> {
    metadata.annotations.get(name).map(|value| names.get(value.trim()))
}

fn timestamp(text: &str) -> Option<Timestamp> {
    text.parse().ok()
}

/// Reads an address that a frontend is to have.
fn vip(text: &str) -> Result<IpAddr, &'static str> {
    let ip = parse_ip(text)?;
    unfit_for_vip(ip).map_or(Ok(ip), Err)
}

/// One address for each family: `clusterIPs[i]` is of family `ipFamilies[i]` (contract A8). Where the object names no families
/// (older API servers, files) each address is of the family it has.
fn cluster_ips(spec: &api::ServiceSpec, problems: &mut Problems) -> Vec<IpAddr> {
    let (field, texts) = if spec.cluster_ips.is_empty() {
        ("spec.clusterIP", std::slice::from_ref(&spec.cluster_ip))
    } else {
        ("spec.clusterIPs", spec.cluster_ips.as_slice())
    };
    let mut families: BTreeMap<Family, IpAddr> = BTreeMap::new();
    let mut ips = Vec::new();
    for (index, text) in texts.iter().enumerate() {
        let ip = match vip(text) {
            Ok(ip) => ip,
            Err(why) => {
                problems.say(format!("{field}: {text:?} {why}; {NOT_SERVED}"));
                continue;
            }
        };
        let family = Family::of(ip);
        let said = match spec.ip_families.get(index).map(String::as_str) {
            Some("IPv4") => Some(Family::V4),
            Some("IPv6") => Some(Family::V6),
            Some(other) => {
                problems.say(format!("spec.ipFamilies: {other:?} is neither IPv4 nor IPv6; the address says it itself, write one of these"));
                None
            }
            None if spec.ip_families.is_empty() => None,
            // An address beyond the named families belongs to none of them.
            None => {
                problems.say(format!(
                    "{field}: {text:?} has no family in spec.ipFamilies; it is not served, name its family there"
                ));
                continue;
            }
        };
        if said.is_some_and(|said| said != family) {
            problems.say(format!(
                "{field}: {text:?} is not of the family that spec.ipFamilies[{index}] says; it is not served, write both in one order"
            ));
        } else if let Some(first) = families.get(&family) {
            problems.say(format!(
                "{field}: {text:?} is a second address of its family, {first} stands; write one of each family"
            ));
        } else {
            families.insert(family, ip);
            ips.push(ip);
        }
    }
    ips
}

fn protocol(text: Option<&str>) -> Option<Protocol> {
    match text {
        None | Some("" | "TCP") => Some(Protocol::Tcp),
        Some("UDP") => Some(Protocol::Udp),
        Some("SCTP") => Some(Protocol::Sctp),
        Some(_) => None,
    }
}

const NO_PROTOCOL: &str = "is none of TCP, UDP, SCTP; the port is not served, write one of these";
const NO_PORT: &str = "is no port number; the port is not served, write one from 1 to 65535";
const NO_FURTHER_PORT: &str = "is no port number; it is left out, write one from 1 to 65535";
const NOT_SERVED: &str = "it is not served, write an address that others can send to";
const RANGE: &str = "write ADDRESS/LENGTH";

fn service_ports(objects: &[api::ServicePort], names: &mut Names, problems: &mut Problems) -> Vec<ServicePort> {
    if objects.is_empty() {
        problems.say("spec.ports: none, so there is nothing to serve; list at least one port".to_owned());
    }
    let mut ports: Vec<ServicePort> = Vec::with_capacity(objects.len());
    let (mut numbers, mut titles) = (HashSet::new(), HashSet::new());
    for (index, object) in objects.iter().enumerate() {
        let api::ServicePort { name, protocol: protocol_text, port, node_port } = object;
        let field = format!("spec.ports[{index}]");
        let Some(protocol) = protocol(protocol_text.as_deref()) else {
            problems.say(format!("{field}.protocol: {:?} {NO_PROTOCOL}", protocol_text.as_deref().unwrap_or_default()));
            continue;
        };
        let Some(port) = required_port(&field, port.as_ref(), problems) else { continue };
        if !numbers.insert((port, protocol)) {
            problems.say(format!(
                "{field}.port: {port}/{protocol} is there already, the first stands; give it another number or protocol"
            ));
            continue;
        }
        // Name and protocol are what slices are matched by: a second port of the same name would get the first one's endpoints.
        if !titles.insert((name.as_str(), protocol)) {
            problems.say(format!(
                "{field}.name: {name:?} names another {protocol} port already, the first stands; give it a name of its own"
            ));
            continue;
        }
        let node_port = optional_port(&format!("{field}.nodePort"), node_port.as_ref(), problems);
        ports.push(ServicePort { name: names.get(name), protocol, port, node_port });
    }
    ports
}

fn required_port(field: &str, number: Option<&api::Number>, problems: &mut Problems) -> Option<Port> {
    let Some(number) = number else {
        problems.say(format!("{field}.port: missing; the port is not served, write one from 1 to 65535"));
        return None;
    };
    let port = number.port();
    if port.is_none() {
        problems.say(format!("{field}.port: {number} {NO_PORT}"));
    }
    port
}

/// 0 stands for "none" in optional port fields.
fn optional_port(field: &str, number: Option<&api::Number>, problems: &mut Problems) -> Option<Port> {
    let number = number.filter(|number| **number != api::Number::Integer(0))?;
    let port = number.port();
    if port.is_none() {
        problems.say(format!("{field}: {number} {NO_FURTHER_PORT}"));
    }
    port
}

fn policy(field: &str, text: Option<&str>, problems: &mut Problems) -> TrafficPolicy {
    match text {
        None | Some("" | "Cluster") => TrafficPolicy::Cluster,
        Some("Local") => TrafficPolicy::Local,
        Some(other) => {
            problems.say(format!(
                "{field}: {other:?} is neither Cluster nor Local, treated as Cluster; write one of these"
            ));
            TrafficPolicy::Cluster
        }
    }
}

fn affinity(spec: &api::ServiceSpec, problems: &mut Problems) -> Option<u32> {
    match spec.session_affinity.as_deref() {
        None | Some("" | "None") => return None,
        Some("ClientIP") => {}
        Some(other) => {
            problems.say(format!(
                "spec.sessionAffinity: {other:?} is neither None nor ClientIP, treated as None; write one of these"
            ));
            return None;
        }
    }
    let timeout = spec
        .session_affinity_config
        .as_ref()
        .and_then(|config| config.client_ip.as_ref())
        .and_then(|client_ip| client_ip.timeout_seconds.as_ref());
    let Some(timeout) = timeout else { return Some(AFFINITY_SECS) };
    let secs = match timeout {
        api::Number::Integer(secs) => u32::try_from(*secs).ok().filter(|secs| (1..=AFFINITY_MAX_SECS).contains(secs)),
        api::Number::Other(_) => None,
    };
    if secs.is_none() {
        problems.say(format!(
            "spec.sessionAffinityConfig.clientIP.timeoutSeconds: {timeout} is not in 1 to {AFFINITY_MAX_SECS}, \
             {AFFINITY_SECS} taken; write a number of seconds in that range"
        ));
    }
    Some(secs.unwrap_or(AFFINITY_SECS))
}

pub(super) fn slice(object: &api::EndpointSlice, names: &mut Names) -> Result<EndpointSlice, NotOurs> {
    let api::EndpointSlice { metadata, address_type, endpoints, ports } = object;
    if metadata.labels.contains_key(api::HEADLESS_LABEL) {
        return Err(NotOurs::Headless);
    }
    let service = metadata.labels.get(api::SERVICE_NAME_LABEL).filter(|name| !name.is_empty());
    let service = service.ok_or(NotOurs::NoServiceName)?;
    let family = match address_type.as_str() {
        "IPv4" => Family::V4,
        "IPv6" => Family::V6,
        _ => return Err(NotOurs::AddressType),
    };
    let mut problems = Problems::default();
    let ports = endpoint_ports(ports, names, &mut problems);
    let mut list = Vec::with_capacity(endpoints.len());
    for (index, object) in endpoints.iter().enumerate() {
        match endpoint(object, family, names) {
            Ok(endpoint) => list.push(endpoint),
            Err((field, why)) => problems.say(format!("endpoints[{index}].{field}: {why}")),
        }
    }
    list.shrink_to_fit();
    let namespace = names.get(&metadata.namespace);
    Ok(EndpointSlice {
        service: ServiceKey { namespace: Arc::clone(&namespace), name: names.get(service) },
        namespace,
        name: names.get(&metadata.name),
        family,
        ports,
        endpoints: list,
        trigger_time: metadata
            .annotations
            .get(api::TRIGGER_TIME_ANNOTATION)
            .and_then(|text| i64::try_from(timestamp(text)?.as_nanosecond()).ok()),
        problems: problems.into_vec(),
    })
}

/// Ports without a name or a number mean nothing here (contract A22).
fn endpoint_ports(objects: &[api::EndpointPort], names: &mut Names, problems: &mut Problems) -> Vec<EndpointPort> {
    let mut ports = Vec::with_capacity(objects.len());
    for (index, object) in objects.iter().enumerate() {
        let api::EndpointPort { name: Some(name), protocol: protocol_text, port: Some(number) } = object else {
            continue;
        };
        let Some(protocol) = protocol(protocol_text.as_deref()) else {
            let text = protocol_text.as_deref().unwrap_or_default();
            problems.say(format!("ports[{index}].protocol: {text:?} {NO_PROTOCOL}"));
            continue;
        };
        let Some(port) = number.port() else {
            problems.say(format!("ports[{index}].port: {number} {NO_PORT}"));
            continue;
        };
        ports.push(EndpointPort { name: names.get(name), protocol, port });
    }
    ports
}

fn endpoint(object: &api::Endpoint, family: Family, names: &mut Names) -> Result<Endpoint, (&'static str, String)> {
    let api::Endpoint { addresses, conditions, node_name, hints } = object;
    // The API says that all addresses of one endpoint are alike; kube-proxy uses the first (contract A21).
    let text = addresses.first().ok_or_else(|| ("addresses", format!("none; {NO_TRAFFIC}")))?;
    let refuse = |why: &str| ("addresses", format!("{text:?} {why}; {NO_TRAFFIC}"));
    let address = parse_ip(text).map_err(refuse)?;
    if Family::of(address) != family {
        let why = "is not of the slice's addressType; it gets no traffic, list it in a slice of addressType";
        let its = if address.is_ipv4() { "IPv4" } else { "IPv6" };
        return Err(("addresses", format!("{text:?} {why} {its}")));
    }
    if let Some(why) = unfit_for_endpoint(address) {
        return Err(refuse(why));
    }
    let api::Conditions { ready, serving, terminating } = conditions;
    Ok(Endpoint {
        address,
        ready: ready.unwrap_or(true),
        serving: serving.unwrap_or(true),
        terminating: terminating.unwrap_or(false),
        node: node_name.as_deref().filter(|name| !name.is_empty()).map(|name| names.get(name)),
        hints: hints.as_ref().and_then(|hints| endpoint_hints(hints, names)),
    })
}

fn endpoint_hints(object: &api::Hints, names: &mut Names) -> Option<Box<EndpointHints>> {
    let api::Hints { for_zones, for_nodes } = object;
    let mut set =
        |hints: &[api::Hint]| -> BTreeSet<Arc<str>> { hints.iter().map(|hint| names.get(&hint.name)).collect() };
    let hints = EndpointHints { zones: set(for_zones), nodes: set(for_nodes) };
    (!hints.zones.is_empty() || !hints.nodes.is_empty()).then(|| Box::new(hints))
}

/// `None`: of another node, or over.
pub(super) fn pod(object: &api::Pod, node: &str, names: &mut Names) -> Option<Pod> {
    let api::Pod { metadata, spec: api::PodSpec { node_name, host_network }, status: api::PodStatus { phase } } =
        object;
    if node_name != node || matches!(phase.as_str(), "Succeeded" | "Failed") {
        return None;
    }
    Some(Pod {
        key: pod_key(metadata, names),
        uid: metadata.annotations.get(api::MIRROR_ANNOTATION).unwrap_or(&metadata.uid).as_str().into(),
        host_network: *host_network,
        socket_lb: annotation(metadata, SOCKET_LB_ANNOTATION, names),
    })
}

pub(super) fn pod_key(metadata: &api::Metadata, names: &mut Names) -> PodKey {
    (names.get(&metadata.namespace), names.get(&metadata.name))
}

/// Its name, and its annotation.
pub(super) fn namespace(metadata: &api::Metadata, names: &mut Names) -> (Arc<str>, Option<Arc<str>>) {
    (names.get(&metadata.name), annotation(metadata, SOCKET_LB_ANNOTATION, names))
}

/// What is wrong with a Node goes into the second part: facts have no place for remarks.
pub(super) fn node(object: &api::Node) -> (NodeFacts, Vec<String>) {
    let api::Node { metadata, spec, status } = object;
    let mut problems = Problems::default();
    let mut internal_ips = Vec::new();
    for api::NodeAddress { r#type, address } in &status.addresses {
        if r#type != "InternalIP" {
            continue;
        }
        match parse_ip(address) {
            Ok(ip) => internal_ips.push(ip),
            Err(why) => problems
                .say(format!("status.addresses: {address:?} {why}; it is left out, see to the kubelet's --node-ip")),
        }
    }
    let pod_cidrs =
        if spec.pod_cidrs.is_empty() { std::slice::from_ref(&spec.pod_cidr) } else { spec.pod_cidrs.as_slice() };
    let mut nets = Vec::new();
    for text in pod_cidrs.iter().filter(|text| !text.is_empty()) {
        match parse_cidr(text) {
            Ok(net) => nets.push(net),
            Err(why) => problems.say(format!("spec.podCIDRs: {text:?} {why}; it is left out, {RANGE}")),
        }
    }
    let zone = metadata.labels.get(api::ZONE_LABEL).filter(|zone| !zone.is_empty());
    let facts = NodeFacts {
        name: metadata.name.as_str().into(),
        zone: zone.map(|zone| zone.as_str().into()),
        internal_ips,
        pod_cidrs: nets,
        leaving: metadata.deletion_timestamp.is_some()
            || spec.taints.iter().any(|taint| taint.key == api::LEAVING_TAINT),
    };
    (facts, problems.into_vec())
}

#[cfg(test)]
#[path = "convert_tests.rs"]
mod tests;
