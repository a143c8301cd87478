//! What the objects promise: read from the YAML itself, not from the product, which is the one to be judged.

use std::{
    collections::BTreeSet,
    fs,
    net::{IpAddr, Ipv4Addr},
    path::Path,
};

use anyhow::{Context as _, Result, ensure};
use proxy_tests::pod::socket::Transport;
use serde::Serialize;
use serde_json::Value;

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub enum Kind {
    #[serde(rename = "ClusterIP")]
    ClusterIp,
    NodePort,
    LoadBalancer,
    #[serde(rename = "ExternalIP")]
    ExternalIp,
}

#[derive(Clone, Debug)]
pub struct Frontend {
    /// `namespace/name:port`
    pub service: String,
    pub kind: Kind,
    pub address: IpAddr,
    pub port: u16,
    pub transport: Transport,
    /// Ready endpoints: address, and the node they are on.
    pub endpoints: Vec<(IpAddr, String)>,
    /// Policy Local: only endpoints of the node that is asked; by an address from outside, only for who comes from there.
    pub local: bool,
}

/// The node that is asked.
pub const ASKED: &str = "node1";

/// Every frontend of the objects below `dir`, with the NodePorts of the node that is asked.
pub fn read(dir: &Path) -> Result<Vec<Frontend>> {
    let mut objects = Vec::new();
    let mut files: Vec<_> = fs::read_dir(dir)?.filter_map(|entry| Some(entry.ok()?.path())).collect();
    files.sort();
    for file in files.iter().filter(|file| file.extension().is_some_and(|ext| ext == "yaml")) {
        let text = fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?;
        let parsed: Vec<Value> =
            serde_saphyr::from_multiple(&text).with_context(|| format!("parse {}", file.display()))?;
        objects.extend(parsed);
    }
    let mut frontends = Vec::new();
    for service in objects.iter().filter(|object| text(object, "/kind") == "Service") {
        for port in items(service, "/spec/ports") {
            let number = number(port, "port")?.context("spec.ports.port")?;
            let of = |kind, pointer: &str| addresses(service, pointer).map(move |found| (kind, found, number));
            let mut claims = vec![
                of(Kind::ClusterIp, "/spec/clusterIPs")?,
                of(Kind::LoadBalancer, "/status/loadBalancer/ingress")?,
                of(Kind::ExternalIp, "/spec/externalIPs")?,
            ];
            if let Some(node_port) = self::number(port, "nodePort")? {
                let node = objects.iter().find(|o| text(o, "/kind") == "Node" && text(o, "/metadata/name") == ASKED);
                let mut own = node.map_or_else(|| Ok(Vec::new()), |node| addresses(node, "/status/addresses"))?;
                own.push(Ipv4Addr::LOCALHOST.into());
                claims.push((Kind::NodePort, own, node_port));
            }
            for (kind, addresses, number) in claims {
                for address in addresses {
                    frontends.push(frontend(service, kind, address, (port, number), &objects)?);
                }
            }
        }
    }
    ensure!(!frontends.is_empty(), "no Service in {}", dir.display());
    Ok(frontends)
}

/// The addresses of a list of texts, or of objects that name theirs.
fn addresses(object: &Value, pointer: &str) -> Result<Vec<IpAddr>> {
    let text_of = |item: &Value| {
        let named = ["ip", "address"].iter().find_map(|field| item.get(field)?.as_str().map(str::to_owned));
        named.or_else(|| item.as_str().map(str::to_owned)).unwrap_or_default()
    };
    items(object, pointer)
        .filter(|item| text(item, "/ipMode") != "Proxy")
        .map(|item| text_of(item).parse().with_context(|| pointer.to_owned()))
        .collect()
}

fn number(port: &Value, field: &str) -> Result<Option<u16>> {
    port.get(field).and_then(Value::as_u64).map(|number| number.try_into().context("a port's number")).transpose()
}

fn frontend(
    service: &Value,
    kind: Kind,
    address: IpAddr,
    (port, number): (&Value, u16),
    objects: &[Value],
) -> Result<Frontend> {
    let (namespace, name) = (text(service, "/metadata/namespace"), text(service, "/metadata/name"));
    let (port_name, protocol) = (text(port, "/name"), text(port, "/protocol"));
    let family = if address.is_ipv4() { "IPv4" } else { "IPv6" };
    let slices = objects.iter().filter(|object| {
        text(object, "/kind") == "EndpointSlice"
            && text(object, "/metadata/labels/kubernetes.io~1service-name") == name
            && text(object, "/metadata/namespace") == namespace
            && text(object, "/addressType") == family
            && items(object, "/ports").any(|p| text(p, "/name") == port_name && text(p, "/protocol") == protocol)
    });
    let mut endpoints = BTreeSet::new();
    for endpoint in slices.flat_map(|slice| items(slice, "/endpoints")) {
        if endpoint.pointer("/conditions/ready") != Some(&Value::Bool(false)) {
            let address = text(endpoint, "/addresses/0").parse().context("an endpoint's address")?;
            endpoints.insert((address, text(endpoint, "/nodeName").to_owned()));
        }
    }
    let policy = match kind {
        Kind::ClusterIp => "/spec/internalTrafficPolicy",
        _ => "/spec/externalTrafficPolicy",
    };
    Ok(Frontend {
        service: format!("{namespace}/{name}:{port_name}"),
        kind,
        address,
        port: number,
        transport: if protocol == "UDP" { Transport::Udp } else { Transport::Tcp },
        endpoints: endpoints.into_iter().collect(),
        local: text(service, policy) == "Local",
    })
}

fn text<'a>(value: &'a Value, pointer: &str) -> &'a str {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

fn items<'a>(value: &'a Value, pointer: &str) -> impl Iterator<Item = &'a Value> {
    value.pointer(pointer).and_then(Value::as_array).into_iter().flatten()
}
