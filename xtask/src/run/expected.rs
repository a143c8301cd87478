//! What the objects promise: read from the YAML itself, not from the product, which is the one to be judged.

use std::{collections::BTreeSet, fs, net::IpAddr, path::Path};

use anyhow::{Context as _, Result, ensure};
use proxy_tests::pod::socket::Transport;
use serde_json::Value;

#[derive(Clone, Debug)]
pub struct Frontend {
    /// `namespace/name:port`
    pub service: String,
    pub address: IpAddr,
    pub port: u16,
    pub transport: Transport,
    /// Ready endpoints: address, and the node they are on.
    pub endpoints: Vec<(IpAddr, String)>,
    /// Internal policy Local: only endpoints of the asking node.
    pub local: bool,
}

/// Every ClusterIP frontend of the objects below `dir`.
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
        for address in items(service, "/spec/clusterIPs") {
            let address: IpAddr = address.as_str().unwrap_or_default().parse().context("spec.clusterIPs")?;
            for port in items(service, "/spec/ports") {
                frontends.push(frontend(service, address, port, &objects)?);
            }
        }
    }
    ensure!(!frontends.is_empty(), "no ClusterIP Service in {}", dir.display());
    Ok(frontends)
}

fn frontend(service: &Value, address: IpAddr, port: &Value, objects: &[Value]) -> Result<Frontend> {
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
    Ok(Frontend {
        service: format!("{namespace}/{name}:{port_name}"),
        address,
        port: port
            .pointer("/port")
            .and_then(Value::as_u64)
            .and_then(|p| p.try_into().ok())
            .context("spec.ports.port")?,
        transport: if protocol == "UDP" { Transport::Udp } else { Transport::Tcp },
        endpoints: endpoints.into_iter().collect(),
        local: text(service, "/spec/internalTrafficPolicy") == "Local",
    })
}

fn text<'a>(value: &'a Value, pointer: &str) -> &'a str {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

fn items<'a>(value: &'a Value, pointer: &str) -> impl Iterator<Item = &'a Value> {
    value.pointer(pointer).and_then(Value::as_array).into_iter().flatten()
}
