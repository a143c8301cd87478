//! Cases in which something changes between two questions.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::{
    lab::Lab,
    services::{At, Service, Via, endpoint},
    table::{Case, Expected},
};
use crate::{
    pod::{hold, socket::Transport},
    world::{Ask, Family},
};

type Change = (&'static str, fn(&mut Lab) -> Result<()>);

pub const CHANGES: [Change; 11] = [
    ("A1: another proxy's label comes and goes", label),
    ("A6: a Service becomes an ExternalName and comes back", external_name),
    ("A13: deleted and made again with another address", made_again),
    ("A14: a port comes and goes", ports),
    ("A41: the node changes its zone", zone),
    ("A45 A87: an open connection outlives its endpoints", open),
    ("A60: the node port moves", node_port_moves),
    ("A95 A98 A99: sticky on every address; its backend goes; affinity is switched off", sticky),
    ("A103: a UDP flow of a removed backend goes on with another", udp_flow),
    ("A111 A112 A113 A114: health-check node ports count local endpoints", health),
    ("A115: a health-check node port that is taken", taken_port),
];

/// A Service of its own for each case, numbered beyond those of the table.
fn service(number: u8, line: &str) -> Result<Service> {
    Service::parse(number, line)
}

fn expect(lab: &Lab, from: &str, service: &Service, via: Via, answer: &str) -> Result<()> {
    expect_by(lab, from, service, via, answer, &[Transport::Tcp, Transport::Udp])
}

fn expect_by(lab: &Lab, from: &str, service: &Service, via: Via, answer: &str, by: &[Transport]) -> Result<()> {
    let case = Case {
        name: String::new(),
        from: from.to_owned(),
        service: service.name.clone(),
        via,
        expected: Expected::parse(answer)?,
        families: service.families.clone(),
        transports: by.to_vec(),
    };
    let seen = lab.ask_all(&[case], std::slice::from_ref(service))?.concat();
    ensure!(seen.is_empty(), "{from} to {} {via:?}: expected {answer}, but {}", service.name, seen.join("; "));
    Ok(())
}

/// Nobody answers: how nobody answers at an address that no Service has any more is no part of the contract.
fn expect_nobody(lab: &Lab, from: &str, service: &Service, via: Via) -> Result<()> {
    let ways = Family::BOTH.into_iter().flat_map(|family| [Transport::Tcp, Transport::Udp].map(|way| (family, way)));
    for (family, transport) in ways {
        let to = service.address(&lab.world, via, family, transport);
        let report = lab.world.ask(lab.place(from)?, &Ask::new(to, transport).timeout(300))?;
        ensure!(report.backends().is_empty(), "{from} to {to}: answered by {:?}", report.backends());
    }
    Ok(())
}

fn install(lab: &mut Lab, service: &Service) -> Result<()> {
    lab.install([service])?;
    lab.settle()
}

fn replace_service(lab: &mut Lab, object: &Value) -> Result<()> {
    lab.apply(std::slice::from_ref(object))?;
    lab.settle()
}

fn delete(lab: &Lab, service: &Service) -> Result<()> {
    lab.server.delete("service", &service.name)?;
    for family in &service.families {
        lab.server.delete("endpointslice", &format!("{}-{family}", service.name))?;
    }
    Ok(())
}

fn label(lab: &mut Lab) -> Result<()> {
    let own = service(60, "label | ClusterIP | b1")?;
    install(lab, &own)?;
    expect(lab, "pod", &own, Via::ClusterIp, "b1 own")?;
    let foreign = service(60, "label | ClusterIP foreign | b1")?;
    replace_service(lab, &foreign.json())?;
    expect_nobody(lab, "pod", &own, Via::ClusterIp)?;
    expect_nobody(lab, "outside", &own, Via::ClusterIp)?;
    replace_service(lab, &own.json())?;
    expect(lab, "pod", &own, Via::ClusterIp, "b1 own")?;
    delete(lab, &own)
}

fn external_name(lab: &mut Lab) -> Result<()> {
    let own = service(61, "outer-name | ClusterIP | b1")?;
    install(lab, &own)?;
    expect(lab, "pod", &own, Via::ClusterIp, "b1 own")?;
    let name = json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"namespace": "default", "name": own.name},
        "spec": {"type": "ExternalName", "externalName": "elsewhere.example"},
    });
    lab.server.kubectl(&["replace", "--validate=false", "-f", "-"], &name.to_string())?;
    lab.settle()?;
    expect_nobody(lab, "pod", &own, Via::ClusterIp)?;
    lab.server.kubectl(&["replace", "--validate=false", "-f", "-"], &own.json().to_string())?;
    lab.settle()?;
    expect(lab, "pod", &own, Via::ClusterIp, "b1 own")?;
    delete(lab, &own)
}

fn made_again(lab: &mut Lab) -> Result<()> {
    let old = service(62, "again | ClusterIP | b1")?;
    let new = service(63, "again | ClusterIP | b1")?;
    install(lab, &old)?;
    expect(lab, "pod", &old, Via::ClusterIp, "b1 own")?;
    lab.server.delete("service", &old.name)?;
    install(lab, &new)?;
    expect(lab, "pod", &new, Via::ClusterIp, "b1 own")?;
    expect(lab, "outside", &new, Via::ClusterIp, "b1 node")?;
    expect_nobody(lab, "pod", &old, Via::ClusterIp)?;
    expect_nobody(lab, "outside", &old, Via::ClusterIp)?;
    delete(lab, &new)
}

fn ports(lab: &mut Lab) -> Result<()> {
    let own = service(64, "more-ports | ClusterIP | b1")?;
    install(lab, &own)?;
    let mut objects = own.objects(&lab.world)?;
    let more = [
        json!({"name": "alt", "protocol": "TCP", "port": 81}),
        json!({"name": "alt", "protocol": "TCP", "port": 9090}),
    ];
    for (object, (path, port)) in
        objects.iter_mut().zip([("/spec/ports", &more[0]), ("/ports", &more[1]), ("/ports", &more[1])])
    {
        object.pointer_mut(path).and_then(Value::as_array_mut).context("ports")?.push(port.clone());
    }
    lab.apply(&objects)?;
    lab.settle()?;
    expect_by(lab, "pod", &own, Via::ClusterIpPort(81), "b1 own", &[Transport::Tcp])?;
    expect_by(lab, "outside", &own, Via::ClusterIpPort(81), "b1 node", &[Transport::Tcp])?;
    expect(lab, "pod", &own, Via::ClusterIp, "b1 own")?;
    replace_service(lab, &own.json())?;
    expect_nobody(lab, "pod", &own, Via::ClusterIpPort(81))?;
    expect(lab, "pod", &own, Via::ClusterIp, "b1 own")?;
    delete(lab, &own)
}

fn zone(lab: &mut Lab) -> Result<()> {
    let own = service(65, "zoned | ClusterIP | b1@zone-a b2@zone-b")?;
    install(lab, &own)?;
    expect(lab, "pod", &own, Via::ClusterIp, "b1 own")?;
    let moved = move_node(lab, "zone-b").and_then(|()| expect(lab, "pod", &own, Via::ClusterIp, "b2 own"));
    move_node(lab, "zone-a")?;
    moved?;
    expect(lab, "pod", &own, Via::ClusterIp, "b1 own")?;
    delete(lab, &own)
}

fn move_node(lab: &mut Lab, zone: &str) -> Result<()> {
    let label = format!("topology.kubernetes.io/zone={zone}");
    lab.server.kubectl(&["label", "--overwrite", "node", "node1", &label], "")?;
    // The marker is a Service: nothing says that Nodes were heard of before it.
    lab.settle()?;
    std::thread::sleep(Duration::from_millis(500));
    lab.settle()
}

fn open(lab: &mut Lab) -> Result<()> {
    let mut own = service(66, "open | ClusterIP | b1 b2")?;
    install(lab, &own)?;
    let mut held = Vec::new();
    for (from, family) in [("pod", Family::V4), ("outside", Family::V6)] {
        let to = own.address(&lab.world, Via::ClusterIp, family, Transport::Tcp);
        let args = ["hold".to_owned(), to.to_string(), "--connections=6".to_owned(), "--interval=20".to_owned()];
        let mut client = lab.place(from)?.start(&lab.world.programs().testpod, &args)?;
        client.wait_for_line("ready", Duration::from_secs(5))?;
        held.push((from, client));
    }
    own.endpoints.clear();
    install(lab, &own)?;
    expect(lab, "pod", &own, Via::ClusterIp, "refused")?;
    for (from, client) in held {
        let report: hold::Report = client.finish(Duration::from_secs(10))?;
        ensure!(report.broken.is_empty() && report.wrong.is_empty(), "held by {from}: {report:?}");
    }
    delete(lab, &own)
}

fn node_port_moves(lab: &mut Lab) -> Result<()> {
    let own = service(67, "moving | NodePort | b1")?;
    let mut moved = service(68, "moving | NodePort | b1")?;
    install(lab, &own)?;
    expect(lab, "outside", &own, Via::NodePort(At::Node1), "b1 node")?;
    let mut object = own.json();
    for (i, transport) in [Transport::Tcp, Transport::Udp].into_iter().enumerate() {
        object["spec"]["ports"][i]["nodePort"] = moved.node_port(transport).into();
    }
    moved.families.clone_from(&own.families);
    replace_service(lab, &object)?;
    expect(lab, "outside", &moved, Via::NodePort(At::Node1), "b1 node")?;
    expect(lab, "pod", &moved, Via::NodePort(At::Node1), "b1 node")?;
    expect_nobody(lab, "outside", &own, Via::NodePort(At::Node1))?;
    delete(lab, &own)
}

fn sticky(lab: &mut Lab) -> Result<()> {
    let mut own = service(69, "clinging | LoadBalancer affinity=10800 | b1 b2")?;
    install(lab, &own)?;
    for from in ["pod", "outside"] {
        for family in Family::BOTH {
            let to = |own: &Service, via| own.address(&lab.world, via, family, Transport::Tcp);
            let first = who(lab, from, to(&own, Via::ClusterIp))?;
            for via in [Via::ClusterIp, Via::LoadBalancer, Via::NodePort(At::Node1)] {
                for _ in 0..4 {
                    let now = who(lab, from, to(&own, via))?;
                    ensure!(now == first, "{from} to {via:?} {family}: {now} after {first}");
                }
            }
        }
    }
    own.endpoints = vec![endpoint("c1")];
    install(lab, &own)?;
    expect(lab, "pod", &own, Via::ClusterIp, "c1 own")?;
    expect(lab, "outside", &own, Via::LoadBalancer, "c1 node")?;
    let off = service(69, "clinging | LoadBalancer | b1 b2")?;
    install(lab, &off)?;
    expect(lab, "pod", &off, Via::ClusterIp, "b1 b2 own")?;
    delete(lab, &own)
}

fn who(lab: &Lab, from: &str, to: SocketAddr) -> Result<String> {
    let report = lab.world.ask(lab.place(from)?, &Ask::new(to, Transport::Tcp))?;
    report.backends().into_keys().next().with_context(|| format!("{from} to {to}: {:?}", report.errors()))
}

fn udp_flow(lab: &mut Lab) -> Result<()> {
    let mut own = service(70, "datagrams | ClusterIP | b1")?;
    install(lab, &own)?;
    let ask = |lab: &Lab, own: &Service, wanted: &str| -> Result<()> {
        for from in ["pod", "node", "outside"] {
            for family in Family::BOTH {
                let to = own.address(&lab.world, Via::ClusterIp, family, Transport::Udp);
                // The node's own sockets keep out of the ports that others are masqueraded to.
                let port = if from == "node" { "--source-port=34070" } else { "--source-port=4070" };
                let report = lab.world.ask(lab.place(from)?, &Ask::new(to, Transport::Udp).with(port))?;
                ensure!(report.backends().contains_key(wanted), "{from} to {to}: expected {wanted}, saw {report:?}");
            }
        }
        Ok(())
    };
    ask(lab, &own, "b1")?;
    own.endpoints = vec![endpoint("b2")];
    install(lab, &own)?;
    // kube-proxy ends flows after the sync that the marker waits for.
    std::thread::sleep(Duration::from_millis(300));
    ask(lab, &own, "b2")?;
    delete(lab, &own)
}

fn health(lab: &mut Lab) -> Result<()> {
    let own = service(71, "healthy | LoadBalancer eTP | b2 c2 b1:unready")?;
    install(lab, &own)?;
    answers(lab, &own, [(1, Some(0)), (2, Some(2))])?;
    // One that terminates goes on serving, and is no reason to send more (A113).
    let own = service(71, "healthy | LoadBalancer eTP | b1 c2 b2:terminating")?;
    install(lab, &own)?;
    answers(lab, &own, [(1, Some(1)), (2, Some(1))])?;
    expect(lab, "outside", &own, Via::NodePort(At::Node1), "b1 own")?;
    // Asked for no longer, and asked for again (A114).
    let mut object = own.json();
    object["spec"]["externalTrafficPolicy"] = "Cluster".into();
    object["spec"]["healthCheckNodePort"] = 0.into();
    replace_service(lab, &object)?;
    answers(lab, &own, [(1, None), (2, None)])?;
    replace_service(lab, &own.json())?;
    answers(lab, &own, [(1, Some(1)), (2, Some(1))])?;
    delete(lab, &own)?;
    lab.settle()?;
    answers(lab, &own, [(1, None), (2, None)])
}

fn taken_port(lab: &mut Lab) -> Result<()> {
    let own = service(72, "unlucky | LoadBalancer eTP | b1 b2")?;
    let other = service(73, "lucky | LoadBalancer eTP | b1 b2")?;
    let taken = Family::BOTH.map(|family| SocketAddr::new(lab.world.node(1).place.ip(family), own.health_port()));
    let held = lab.world.node(1).place.namespace.enter(|| taken.map(TcpListener::bind))?;
    let held = held.into_iter().collect::<Result<Vec<_>, _>>().context("take the port")?;
    lab.install([&own, &other])?;
    lab.settle()?;
    answers(lab, &other, [(1, Some(1)), (2, Some(1))])?;
    eventually(|| {
        let arguments = ["get", "events.events.k8s.io", "-o", "json"];
        let events: Value = serde_json::from_str(&lab.server.kubectl(&arguments, "")?)?;
        let found = events["items"].as_array().into_iter().flatten().find(|event| {
            let of_own = event["regarding"]["kind"] == "Service" && event["regarding"]["name"] == own.name.as_str();
            let said = (&event["type"], &event["reason"], &event["action"]);
            of_own && said == (&json!("Warning"), &json!("FailedToStartServiceHealthcheck"), &json!("Listen"))
        });
        let note = found.with_context(|| format!("no Event on the Service: {events}"))?["note"].as_str();
        let note = note.context("an Event that says nothing")?;
        ensure!(note.contains("node1") && note.contains("already in use"), "{note}");
        Ok(())
    })?;
    drop(held);
    // kube-proxy tries again with the next sync.
    lab.settle()?;
    answers(lab, &own, [(1, Some(1)), (2, Some(1))])?;
    delete(lab, &own)?;
    delete(lab, &other)
}

/// What the nodes tell load balancers of a Service, to the byte; `None`: the port is closed.
fn answers(lab: &Lab, service: &Service, expected: [(usize, Option<usize>); 2]) -> Result<()> {
    for (node, local) in expected {
        for family in Family::BOTH {
            let at = SocketAddr::new(lab.world.node(node).place.ip(family), service.health_port());
            eventually(|| {
                let answer = lab.world.outside().namespace.enter(|| get(at))?;
                let Some(local) = local else {
                    ensure!(answer.is_err(), "{at} is open: {answer:?}");
                    return Ok(());
                };
                let answer = answer?;
                let (mut headers, expected) = (lines(&answer), lines(&health_answer(service, local)));
                headers.retain(|line| !line.starts_with("Date: ") && !line.starts_with("Connection: "));
                ensure!(headers == expected, "{at}: expected {expected:?}, got {headers:?}");
                Ok(())
            })?;
        }
    }
    Ok(())
}

/// Contract A112. HTTP does not care about the order of headers.
fn lines(answer: &str) -> Vec<String> {
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((answer, ""));
    let (status, headers) = head.split_once("\r\n").unwrap_or((head, ""));
    let mut headers: Vec<&str> = headers.split("\r\n").collect();
    headers.sort_unstable();
    [&[status], headers.as_slice(), &[body]].concat().into_iter().map(str::to_owned).collect()
}

fn health_answer(service: &Service, local: usize) -> String {
    let name = &service.name;
    let code = if local > 0 { "200 OK" } else { "503 Service Unavailable" };
    let body = format!(
        "{{\n\t\"service\": {{\n\t\t\"namespace\": \"default\",\n\t\t\"name\": \"{name}\"\n\t}},\n\t\"localEndpoints\": {local},\n\t\
         \"serviceProxyHealthy\": true\n}}"
    );
    let length = body.len();
    format!(
        "HTTP/1.0 {code}\r\nContent-Type: application/json\r\nX-Content-Type-Options: nosniff\r\n\
         X-Load-Balancing-Endpoint-Weight: {local}\r\nContent-Length: {length}\r\n\r\n{body}"
    )
}

/// What is in force is told a moment later.
fn eventually(check: impl Fn() -> Result<()>) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(15);
    loop {
        let Err(error) = check() else { return Ok(()) };
        if Instant::now() > deadline {
            return Err(error);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn get(at: SocketAddr) -> Result<String> {
    let mut stream =
        TcpStream::connect_timeout(&at, Duration::from_secs(2)).with_context(|| format!("connect to {at}"))?;
    stream.set_read_timeout(Some(Duration::from_secs(3)))?;
    write!(stream, "GET /any HTTP/1.0\r\nHost: {at}\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    if answer.is_empty() {
        bail!("{at}: no answer");
    }
    Ok(answer)
}
