//! The Services of the table.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::{
    pod::socket::Transport,
    world::{Family, World, vip},
};

/// `name | what | endpoints`. Every Service is dual-stack, has TCP 80 and UDP 53, and its endpoints answer on 8080, unless it
/// says otherwise.
///
/// - `LoadBalancer`, `NodePort`, `ClusterIP`: the type. A LoadBalancer has an ingress address of each family, and node ports.
/// - `external`: an external IP of each family.
/// - `eTP`, `iTP`: external and internal traffic policy Local.
/// - `ingress=proxy`: `ipMode: Proxy`; `ingress=none`: no load balancer has taken it on yet; `ingress=owned`: at an address that node1 has.
/// - `ranges=A,B`: `loadBalancerSourceRanges`, `_` for a blank in them.
/// - `affinity=N`: ClientIP affinity for N seconds.
/// - `v4`, `v6`: this family only.
/// - `no-node-ports`: `allocateLoadBalancerNodePorts: false`.
/// - `foreign`: labelled as another proxy's; `headless-slices`: its slices are labelled as a headless Service's.
/// - `published`: `publishNotReadyAddresses`; `close`: `trafficDistribution`, and the annotation that was there before it.
/// - `sctp`: has SCTP 38412 besides.
/// - `one-number`: TCP and UDP have port 80 both, and one node port; its endpoints answer on 9090 over UDP.
/// - `doubled`: the first endpoint terminates in a slice of its own, and is ready in that of the others.
/// - `numbers`: the last endpoint is in a slice of its own, which has another number for the same port: 9090.
/// - `odd-slices`: endpoints have a second address, c1's; and there are slices that are no good: one names no Service (c1), one says no port
///   (c2), one has names for addresses.
///
/// An endpoint is a place, `:unready`, `:terminating` (and still serving) or `:bare` (no conditions at all), `@zone-a`, `@node1`
/// (hints).
pub const SERVICES: &str = "
    lb                | LoadBalancer external                                   | b1 b2
    ext-local         | LoadBalancer external eTP                               | b1 b2
    int-local         | LoadBalancer external iTP                               | b1 b2
    host              | LoadBalancer                                            | node1 node2
    self              | LoadBalancer external                                   | a1
    pending           | LoadBalancer ingress=none                               | b1 b2
    proxied           | LoadBalancer ingress=proxy                              | b1 b2
    no-node-ports     | LoadBalancer no-node-ports                              | b1 b2
    plain             | ClusterIP                                               | b1 b2
    ports             | NodePort                                                | b1 b2
    empty             | LoadBalancer external                                   |
    empty-ext         | LoadBalancer external eTP                               |
    empty-int         | LoadBalancer external iTP                               |
    far-ext           | LoadBalancer external eTP                               | b2
    far-int           | LoadBalancer external iTP                               | b2
    unready           | LoadBalancer                                            | b1:unready
    one-ready         | LoadBalancer published                                  | b1 c1:unready c2:terminating
    terminating       | LoadBalancer                                            | c1:terminating b2:unready
    local-terminating | LoadBalancer external eTP                               | b1:terminating b2
    bare              | ClusterIP close                                         | b1:bare b2:bare
    zones             | LoadBalancer                                            | b1@zone-a b2@zone-b
    half-hinted       | LoadBalancer                                            | b1@zone-a b2
    zone-local        | LoadBalancer iTP                                        | b1@zone-b b2@zone-b
    nodes             | LoadBalancer                                            | b1@node1 b2@node2
    foreign           | NodePort foreign                                        | b1 b2
    headless-slices   | ClusterIP headless-slices                               | b1 b2
    only-v4           | LoadBalancer external v4                                | b1 b2
    only-v6           | LoadBalancer external v6                                | b1 b2
    ranged            | LoadBalancer external ranges=192.168.77.100/32,fd00:77::100/128 | b1 b2
    ranged-out        | LoadBalancer external ranges=10.99.0.0/16,fd00:99::/64  | b1 b2
    ranged-v4         | LoadBalancer external ranges=10.99.0.0/16               | b1 b2
    ranged-all        | LoadBalancer ranges=0.0.0.0/0,::/0                      | b1 b2
    ranged-nodes      | LoadBalancer ranges=192.168.77.0/24,fd00:77::/64        | b1 b2
    ranged-local      | LoadBalancer eTP ranges=192.168.77.100/32,fd00:77::100/128 | b1 b2
    ranged-empty      | LoadBalancer ranges=10.99.0.0/16,fd00:99::/64           |
    sticky            | LoadBalancer affinity=10800                             | b1 b2
    sticky-local      | LoadBalancer affinity=10800 eTP                         | b1 c1 b2
    sticky-for-10s    | LoadBalancer affinity=10                                | b1 b2 c1 c2
    ranged-blank      | LoadBalancer ranges=_192.168.77.100/32_,_fd00:77::100/128 | b1 b2
    doubled           | NodePort doubled                                        | b1 b2
    numbers           | NodePort numbers                                        | b1 b2
    sctp              | LoadBalancer external sctp                              | b1 b2
    one-number        | NodePort one-number                                     | b1 b2
    odd-slices        | NodePort odd-slices                                     | b1 b2
    owned             | LoadBalancer ingress=owned                              | b1 b2
";

/// Number of the first one: the API server has taken lower addresses for itself.
pub const FIRST: u8 = 20;

/// Where a Service is asked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Via {
    ClusterIp,
    /// Another port of the cluster IP, which the Service does not have.
    ClusterIpPort(u16),
    NodePort(At),
    LoadBalancer,
    ExternalIp,
}

/// Whose address a node port is asked at.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum At {
    Node1,
    Node2,
    Localhost,
    /// A second address of node1.
    Second,
    /// The load balancer's.
    LoadBalancer,
}

impl Via {
    pub fn parse(text: &str) -> Result<Self> {
        Ok(match text {
            "cluster-ip" => Self::ClusterIp,
            "node-port" => Self::NodePort(At::Node1),
            "node-port@node2" => Self::NodePort(At::Node2),
            "node-port@localhost" => Self::NodePort(At::Localhost),
            "node-port@second" => Self::NodePort(At::Second),
            "node-port@lb" => Self::NodePort(At::LoadBalancer),
            "lb" => Self::LoadBalancer,
            "external-ip" => Self::ExternalIp,
            other => match other.strip_prefix("cluster-ip:") {
                Some(port) => Self::ClusterIpPort(port.parse()?),
                None => bail!("no way to a Service is called {other}"),
            },
        })
    }
}

/// The second address of node1.
pub fn second(family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(192, 168, 77, 51).into(),
        Family::V6 => Ipv6Addr::new(0xfd00, 0x77, 0, 0, 0, 0, 0, 0x51).into(),
    }
}

/// A third one, which is a load balancer's at the same time, as with kube-vip.
pub fn owned(family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(192, 168, 77, 52).into(),
        Family::V6 => Ipv6Addr::new(0xfd00, 0x77, 0, 0, 0, 0, 0, 0x52).into(),
    }
}

/// Networks that lead to node1 from outside: of load balancers, of external IPs.
pub const OUTER_NETWORKS: [&str; 4] = ["203.0.113.0/24", "198.51.100.0/24", "fd00:1b::/112", "fd00:e::/112"];

/// One endpoint of a slice.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Endpoint {
    pub place: String,
    /// `unready`, `terminating`, `bare`.
    pub condition: Option<String>,
    pub hint: Option<String>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Service {
    pub name: String,
    /// Last part of its addresses; its node ports count from it, too.
    pub number: u8,
    pub kind: String,
    pub external: bool,
    pub external_local: bool,
    pub internal_local: bool,
    /// `proxy`, `none`, `owned`.
    pub ingress: Option<String>,
    pub ranges: Vec<String>,
    pub affinity: Option<u32>,
    pub families: Vec<Family>,
    pub node_ports: bool,
    pub foreign: bool,
    pub headless_slices: bool,
    pub published: bool,
    pub close: bool,
    pub sctp: bool,
    pub one_number: bool,
    pub slices: Slices,
    pub endpoints: Vec<Endpoint>,
}

/// How endpoints are spread over slices.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Slices {
    /// One of each family
    One,
    Doubled,
    Numbers,
    Odd,
}

/// Where endpoints of a slice that says otherwise serve.
const OTHER_PORT: u16 = 9090;

/// Every Service of a table; numbered from `first`.
pub fn parse(table: &str, first: u8) -> Result<Vec<Service>> {
    let lines = table.lines().map(str::trim).filter(|line| !line.is_empty());
    (first..=u8::MAX).zip(lines).map(|(number, line)| Service::parse(number, line)).collect()
}

impl Service {
    pub fn parse(number: u8, line: &str) -> Result<Self> {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let [name, what, endpoints] = cells[..] else { bail!("{line}: not three cells") };
        let mut service = Self {
            name: name.to_owned(),
            number,
            kind: "ClusterIP".to_owned(),
            external: false,
            external_local: false,
            internal_local: false,
            ingress: None,
            ranges: Vec::new(),
            affinity: None,
            families: Family::BOTH.to_vec(),
            node_ports: true,
            foreign: false,
            headless_slices: false,
            published: false,
            close: false,
            sctp: false,
            one_number: false,
            slices: Slices::One,
            endpoints: endpoints.split_whitespace().map(endpoint).collect(),
        };
        for word in what.split_whitespace() {
            let (key, value) = word.split_once('=').unwrap_or((word, ""));
            match key {
                "LoadBalancer" | "NodePort" | "ClusterIP" => service.kind = key.to_owned(),
                "external" => service.external = true,
                "eTP" => service.external_local = true,
                "iTP" => service.internal_local = true,
                "ingress" => service.ingress = Some(value.to_owned()),
                "ranges" => service.ranges = value.split(',').map(|range| range.replace('_', " ")).collect(),
                "affinity" => service.affinity = Some(value.parse()?),
                "v4" => service.families = vec![Family::V4],
                "v6" => service.families = vec![Family::V6],
                "no-node-ports" => service.node_ports = false,
                "foreign" => service.foreign = true,
                "headless-slices" => service.headless_slices = true,
                "published" => service.published = true,
                "close" => service.close = true,
                "sctp" => service.sctp = true,
                "one-number" => service.one_number = true,
                "doubled" => service.slices = Slices::Doubled,
                "numbers" => service.slices = Slices::Numbers,
                "odd-slices" => service.slices = Slices::Odd,
                other => bail!("{line}: no Service is {other}"),
            }
        }
        Ok(service)
    }

    pub fn node_port(&self, transport: Transport) -> u16 {
        let of_transport = match transport {
            Transport::Tcp | Transport::Ping => 0,
            Transport::Udp | Transport::UdpUnconnected if self.one_number => 0,
            Transport::Udp | Transport::UdpUnconnected => 1,
            Transport::Sctp => 2,
        };
        30_000 + 10 * u16::from(self.number) + of_transport
    }

    /// Where `/healthz` says how many endpoints are local.
    pub fn health_port(&self) -> u16 {
        30_005 + 10 * u16::from(self.number)
    }

    pub fn lb_ip(&self, family: Family) -> IpAddr {
        match family {
            _ if self.ingress.as_deref() == Some("owned") => owned(family),
            Family::V4 => Ipv4Addr::new(203, 0, 113, self.number).into(),
            Family::V6 => Ipv6Addr::new(0xfd00, 0x1b, 0, 0, 0, 0, 0, self.number.into()).into(),
        }
    }

    pub fn external_ip(&self, family: Family) -> IpAddr {
        match family {
            Family::V4 => Ipv4Addr::new(198, 51, 100, self.number).into(),
            Family::V6 => Ipv6Addr::new(0xfd00, 0xe, 0, 0, 0, 0, 0, self.number.into()).into(),
        }
    }

    /// Whether who asks there is let through by its address only (A91); a range of everybody asks nobody (A93).
    pub fn filters(&self, via: Via, family: Family) -> bool {
        let mut ranges = self.ranges.iter().filter(|range| range.contains(':') == (family == Family::V6)).peekable();
        via == Via::LoadBalancer && ranges.peek().is_some() && ranges.all(|range| !range.ends_with("/0"))
    }

    fn port(&self, transport: Transport) -> u16 {
        match transport {
            // A ping has none: where it goes is told by the address.
            Transport::Tcp | Transport::Ping => 80,
            Transport::Udp | Transport::UdpUnconnected if self.one_number => 80,
            Transport::Udp | Transport::UdpUnconnected => 53,
            Transport::Sctp => 38_412,
        }
    }

    pub fn address(&self, world: &World, via: Via, family: Family, transport: Transport) -> SocketAddr {
        let port = self.port(transport);
        match via {
            Via::ClusterIp => SocketAddr::new(vip(family, self.number), port),
            Via::ClusterIpPort(port) => SocketAddr::new(vip(family, self.number), port),
            Via::LoadBalancer => SocketAddr::new(self.lb_ip(family), port),
            Via::ExternalIp => SocketAddr::new(self.external_ip(family), port),
            Via::NodePort(at) => {
                let ip = match (at, family) {
                    (At::Node1, _) => world.node(1).place.ip(family),
                    (At::Node2, _) => world.node(2).place.ip(family),
                    (At::Localhost, Family::V4) => Ipv4Addr::LOCALHOST.into(),
                    (At::Localhost, Family::V6) => Ipv6Addr::LOCALHOST.into(),
                    (At::Second, _) => second(family),
                    (At::LoadBalancer, _) => self.lb_ip(family),
                };
                SocketAddr::new(ip, self.node_port(transport))
            }
        }
    }

    /// The Service and its slices; the status is written on its own.
    pub fn objects(&self, world: &World) -> Result<Vec<Value>> {
        let mut objects = vec![self.json()];
        for &family in &self.families {
            objects.extend(self.slices(world, family)?);
        }
        Ok(objects)
    }

    pub fn json(&self) -> Value {
        let Self { name, kind, affinity, .. } = self;
        let addresses: Vec<IpAddr> = self.families.iter().map(|&family| vip(family, self.number)).collect();
        let names: Vec<&str> = self.families.iter().map(|&family| family_name(family)).collect();
        let sctp = self.sctp.then_some(("ngap", "SCTP", Transport::Sctp));
        let ports = [("web", "TCP", Transport::Tcp), ("dns", "UDP", Transport::Udp)].into_iter().chain(sctp);
        let ports: Vec<Value> = ports
            .map(|(name, protocol, transport)| {
                let port = self.port(transport);
                let mut port = json!({"name": name, "protocol": protocol, "port": port, "targetPort": 8080});
                if kind != "ClusterIP" && self.node_ports {
                    port["nodePort"] = self.node_port(transport).into();
                }
                port
            })
            .collect();
        let mut spec = json!({
            "type": kind,
            "clusterIP": addresses.first(),
            "clusterIPs": addresses,
            "ipFamilies": names,
            "ipFamilyPolicy": if names.len() == 2 { "RequireDualStack" } else { "SingleStack" },
            "ports": ports,
            "internalTrafficPolicy": if self.internal_local { "Local" } else { "Cluster" },
            "sessionAffinity": if affinity.is_some() { "ClientIP" } else { "None" },
        });
        if let Some(seconds) = affinity {
            spec["sessionAffinityConfig"] = json!({"clientIP": {"timeoutSeconds": seconds}});
        }
        if self.external {
            spec["externalIPs"] =
                self.families.iter().map(|&family| self.external_ip(family).to_string()).collect::<Vec<_>>().into();
        }
        if kind != "ClusterIP" {
            spec["externalTrafficPolicy"] = if self.external_local { "Local" } else { "Cluster" }.into();
        }
        if kind == "LoadBalancer" {
            spec["allocateLoadBalancerNodePorts"] = self.node_ports.into();
            if self.external_local {
                spec["healthCheckNodePort"] = self.health_port().into();
            }
            if !self.ranges.is_empty() {
                spec["loadBalancerSourceRanges"] = self.ranges.clone().into();
            }
        }
        if self.published {
            spec["publishNotReadyAddresses"] = true.into();
        }
        let mut annotations = json!({});
        if self.close {
            spec["trafficDistribution"] = "PreferClose".into();
            annotations = json!({"service.kubernetes.io/topology-mode": "Auto"});
        }
        let labels =
            if self.foreign { json!({"service.kubernetes.io/service-proxy-name": "other"}) } else { json!({}) };
        json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"namespace": "default", "name": name, "labels": labels, "annotations": annotations},
            "spec": spec,
        })
    }

    /// Where its load balancer answers, if it has one.
    pub fn status(&self) -> Option<Value> {
        if self.kind != "LoadBalancer" || self.ingress.as_deref() == Some("none") {
            return None;
        }
        let mode = if self.ingress.as_deref() == Some("proxy") { "Proxy" } else { "VIP" };
        let ingress: Vec<Value> =
            self.families.iter().map(|&family| json!({"ip": self.lb_ip(family), "ipMode": mode})).collect();
        Some(json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"namespace": "default", "name": self.name},
            "status": {"loadBalancer": {"ingress": ingress}},
        }))
    }

    /// Their names.
    pub fn slice_names(&self) -> Vec<String> {
        let suffixes: &[&str] = match self.slices {
            Slices::One => &[""],
            Slices::Doubled | Slices::Numbers => &["", "-more"],
            Slices::Odd => &["", "-unlabelled", "-portless", "-named"],
        };
        let of = |&family: &Family| suffixes.iter().map(move |suffix| format!("{}-{family}{suffix}", self.name));
        self.families.iter().flat_map(of).collect()
    }

    fn slices(&self, world: &World, family: Family) -> Result<Vec<Value>> {
        let all = &self.endpoints;
        let slice = |suffix, endpoints: &[Endpoint], port| self.slice(world, family, suffix, endpoints, port);
        Ok(match (self.slices, &all[..]) {
            (Slices::Doubled, [first, ..]) => {
                let leaving = Endpoint { condition: Some("terminating".to_owned()), ..first.clone() };
                vec![slice("", &[leaving], 8080)?, slice("-more", all, 8080)?]
            }
            (Slices::Numbers, [others @ .., last]) => {
                vec![slice("", others, 8080)?, slice("-more", std::slice::from_ref(last), OTHER_PORT)?]
            }
            (Slices::Odd, all) => {
                let [mut good, mut unlabelled, mut portless, mut named] = [
                    slice("", all, 8080)?,
                    slice("-unlabelled", &[endpoint("c1")], 8080)?,
                    slice("-portless", &[endpoint("c2")], 8080)?,
                    slice("-named", &[endpoint("c2")], 8080)?,
                ];
                let second = world.pod("c1").ip(family).to_string();
                for one in good["endpoints"].as_array_mut().into_iter().flatten() {
                    one["addresses"].as_array_mut().context("addresses")?.push(second.clone().into());
                }
                unlabelled["metadata"]["labels"] = json!({});
                for port in portless["ports"].as_array_mut().into_iter().flatten() {
                    port.as_object_mut().context("a port")?.remove("port");
                }
                named["addressType"] = "FQDN".into();
                named["endpoints"][0]["addresses"] = json!(["c2.example"]);
                vec![good, unlabelled, portless, named]
            }
            (_, all) => vec![slice("", all, 8080)?],
        })
    }

    fn slice(&self, world: &World, family: Family, suffix: &str, endpoints: &[Endpoint], port: u16) -> Result<Value> {
        let mut labels = json!({"kubernetes.io/service-name": self.name});
        if self.headless_slices {
            labels["service.kubernetes.io/headless"] = "".into();
        }
        let endpoints = endpoints.iter().map(|endpoint| {
            let place = world.place(&endpoint.place).with_context(|| format!("no place {}", endpoint.place))?;
            let mut one = json!({
                "addresses": [place.ip(family)],
                "nodeName": format!("node{}", place.node.unwrap_or_default()),
            });
            one["conditions"] = match endpoint.condition.as_deref() {
                None => json!({"ready": true, "serving": true, "terminating": false}),
                Some("bare") => json!({}),
                Some("unready") => json!({"ready": false, "serving": false, "terminating": false}),
                Some("terminating") => json!({"ready": false, "serving": true, "terminating": true}),
                Some(other) => bail!("no endpoint is {other}"),
            };
            match endpoint.hint.as_deref() {
                Some(hint) if hint.starts_with("zone") => one["hints"] = json!({"forZones": [{"name": hint}]}),
                Some(hint) => one["hints"] = json!({"forNodes": [{"name": hint}]}),
                None => {}
            }
            Ok(one)
        });
        let sctp = self.sctp.then(|| json!({"name": "ngap", "protocol": "SCTP", "port": port}));
        let ports = [
            json!({"name": "web", "protocol": "TCP", "port": port}),
            json!({"name": "dns", "protocol": "UDP", "port": if self.one_number { OTHER_PORT } else { port }}),
        ];
        let ports: Vec<Value> = ports.into_iter().chain(sctp).collect();
        Ok(json!({
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {"namespace": "default", "name": format!("{}-{family}{suffix}", self.name), "labels": labels},
            "addressType": family_name(family),
            "ports": ports,
            "endpoints": endpoints.collect::<Result<Vec<Value>>>()?,
        }))
    }
}

fn family_name(family: Family) -> &'static str {
    if family == Family::V4 { "IPv4" } else { "IPv6" }
}

pub fn endpoint(text: &str) -> Endpoint {
    let (rest, hint) = text.split_once('@').map_or((text, None), |(rest, hint)| (rest, Some(hint.to_owned())));
    let (place, condition) =
        rest.split_once(':').map_or((rest, None), |(place, condition)| (place, Some(condition.to_owned())));
    Endpoint { place: place.to_owned(), condition, hint }
}
