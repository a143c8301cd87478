//! Cases in which something changes between two questions.

use std::{
    collections::BTreeMap,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::{
    lab::{Lab, question},
    services::{self, At, FIRST, SERVICES, Service, Via, endpoint},
    table::{Case, Expected, SIZE},
};
use crate::{
    pod::{hold, socket::Transport, survey::Question, talk},
    world::{Ask, Client, Family, kernel, patience, slower, within},
};

type Change = (&'static str, fn(&mut Lab) -> Result<()>);

pub const CHANGES: [Change; 21] = [
    ("A96 A97: each port of a Service remembers by itself", apart),
    ("A1: another proxy's label comes and goes", label),
    ("A6: a Service becomes an ExternalName and comes back", external_name),
    ("A13: deleted and made again with another address", made_again),
    ("A14: a port comes and goes", ports),
    ("A29: ports of slices get another number, and another name", slice_ports),
    ("A41: the node changes its zone", zone),
    ("A44: backends are drawn evenly", drawn),
    ("A45 A87 A94: an open connection outlives its endpoints, and ranges that let it in", open),
    ("A60: the node port moves", node_port_moves),
    ("A75: masqueraded with the address of the way that the packet takes", by_route),
    ("A95 A98 A99: sticky on every address; its backend goes; affinity is switched off", sticky),
    ("A103 A108: UDP flows from one port go on with another backend", udp_flows),
    ("A106 A108: they end with the last endpoint, and go on with the next one", udp_flows_emptied),
    ("A104: a flow stays with an endpoint that terminates and serves", udp_flows_kept),
    ("A105: flows from before there was a Service", udp_flows_before),
    ("A111 A112 A113 A114: health-check node ports count local endpoints", health),
    ("A115: a health-check node port that is taken", taken_port),
    ("A102: who is remembered stays so over a restart", restarted),
    ("A96 A101: once its time is over a client may be led elsewhere", forgotten),
    ("A53 A54: node ports answer at some of the node's addresses only", narrowed),
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
        size: SIZE,
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
    lab.objects.delete("service", &service.name)?;
    service.slice_names().iter().try_for_each(|name| lab.objects.delete("endpointslice", name))
}

fn label(lab: &mut Lab) -> Result<()> {
    let own = service(80, "label | ClusterIP | b1")?;
    install(lab, &own)?;
    expect(lab, "pod", &own, Via::ClusterIp, "b1 own")?;
    let foreign = service(80, "label | ClusterIP foreign | b1")?;
    replace_service(lab, &foreign.json())?;
    expect_nobody(lab, "pod", &own, Via::ClusterIp)?;
    expect_nobody(lab, "outside", &own, Via::ClusterIp)?;
    replace_service(lab, &own.json())?;
    expect(lab, "pod", &own, Via::ClusterIp, "b1 own")?;
    delete(lab, &own)
}

fn external_name(lab: &mut Lab) -> Result<()> {
    let own = service(81, "outer-name | ClusterIP | b1")?;
    install(lab, &own)?;
    expect(lab, "pod", &own, Via::ClusterIp, "b1 own")?;
    let name = json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"namespace": "default", "name": own.name},
        "spec": {"type": "ExternalName", "externalName": "elsewhere.example"},
    });
    lab.objects.replace(&name)?;
    lab.settle()?;
    expect_nobody(lab, "pod", &own, Via::ClusterIp)?;
    lab.objects.replace(&own.json())?;
    lab.settle()?;
    expect(lab, "pod", &own, Via::ClusterIp, "b1 own")?;
    delete(lab, &own)
}

fn made_again(lab: &mut Lab) -> Result<()> {
    let old = service(82, "again | ClusterIP | b1")?;
    let new = service(83, "again | ClusterIP | b1")?;
    install(lab, &old)?;
    expect(lab, "pod", &old, Via::ClusterIp, "b1 own")?;
    lab.objects.delete("service", &old.name)?;
    install(lab, &new)?;
    expect(lab, "pod", &new, Via::ClusterIp, "b1 own")?;
    expect(lab, "outside", &new, Via::ClusterIp, "b1 node")?;
    expect_nobody(lab, "pod", &old, Via::ClusterIp)?;
    expect_nobody(lab, "outside", &old, Via::ClusterIp)?;
    delete(lab, &new)
}

fn ports(lab: &mut Lab) -> Result<()> {
    let own = service(84, "more-ports | ClusterIP | b1")?;
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
    expect_by(lab, "pod", &own, Via::ClusterIpPort(81), "b1:9090 own", &[Transport::Tcp])?;
    expect_by(lab, "outside", &own, Via::ClusterIpPort(81), "b1:9090 node", &[Transport::Tcp])?;
    expect(lab, "pod", &own, Via::ClusterIp, "b1 own")?;
    replace_service(lab, &own.json())?;
    expect_nobody(lab, "pod", &own, Via::ClusterIpPort(81))?;
    expect(lab, "pod", &own, Via::ClusterIp, "b1 own")?;
    delete(lab, &own)
}

fn slice_ports(lab: &mut Lab) -> Result<()> {
    let own = service(99, "renamed | NodePort | b1")?;
    install(lab, &own)?;
    let slices = |numbers: [u16; 2], web: &str| -> Result<Vec<Value>> {
        let mut slices = own.objects(&lab.world)?.split_off(1);
        for ports in slices.iter_mut().filter_map(|slice| slice["ports"].as_array_mut()) {
            for (port, number) in ports.iter_mut().zip(numbers) {
                port["port"] = number.into();
            }
            ports.first_mut().context("ports")?["name"] = web.into();
        }
        Ok(slices)
    };
    let (renumbered, renamed) = (slices([9090, 8080], "web")?, slices([9090, 8080], "http")?);
    let tcp = |lab: &Lab, answers: [&str; 2]| {
        expect_by(lab, "pod", &own, Via::ClusterIp, answers[0], &[Transport::Tcp])?;
        expect_by(lab, "outside", &own, Via::NodePort(At::Node1), answers[1], &[Transport::Tcp])
    };
    tcp(lab, ["b1 own", "b1 node"])?;
    lab.apply(&renumbered)?;
    lab.settle()?;
    tcp(lab, ["b1:9090 own", "b1:9090 node"])?;
    expect_by(lab, "pod", &own, Via::ClusterIp, "b1 own", &[Transport::Udp])?;
    lab.apply(&renamed)?;
    lab.settle()?;
    tcp(lab, ["refused", "refused"])?;
    // As a Service is changed whose pods' port got another name.
    let mut object = own.json();
    object["spec"]["ports"][0]["name"] = "http".into();
    replace_service(lab, &object)?;
    tcp(lab, ["b1:9090 own", "b1:9090 node"])?;
    delete(lab, &own)
}

fn drawn(lab: &mut Lab) -> Result<()> {
    // Of two backends one is drawn 200 times, give or take six times what is usual.
    const COUNT: u32 = 400;
    let services = services::parse(SERVICES, FIRST)?;
    let service = services.iter().find(|service| service.name == "lb").context("no such Service")?;
    for (from, via) in [("pod", Via::ClusterIp), ("node", Via::ClusterIp), ("outside", Via::NodePort(At::Node1))] {
        let questions = Family::BOTH.map(|family| {
            question(service.address(&lab.world, via, family, Transport::Tcp), Transport::Tcp, COUNT, patience(4))
        });
        for (Question { to, .. }, report) in questions.iter().zip(lab.survey(from, &questions)?) {
            let seen = report.backends();
            let failure = report.failure();
            ensure!(failure.is_none(), "{from} to {to}: {failure:?}");
            ensure!(
                seen.len() == 2 && seen.values().all(|times| (140..=260).contains(times)),
                "{from} to {to}: {seen:?}"
            );
        }
    }
    Ok(())
}

/// What the node's kernel would take itself to send there. Before 6.7 it does not tell eBPF, which takes the device's first.
fn by_route(lab: &mut Lab) -> Result<()> {
    let services = services::parse(SERVICES, FIRST)?;
    let service = services.iter().find(|service| service.name == "lb").context("no such Service")?;
    let told = kernel()? >= (6, 7);
    for family in Family::BOTH {
        for by in [Transport::Tcp, Transport::Udp] {
            let to = service.address(&lab.world, Via::NodePort(At::Node1), family, by);
            let report = lab.world.ask(lab.world.outside(), &Ask::new(to, by).times(10).timeout(4_000))?;
            ensure!(report.failure().is_none(), "{to} {by}: {report:?}");
            for answer in report.tries.iter().filter_map(|one| one.answer.as_ref()) {
                let seen = answer.peer.parse::<SocketAddr>()?.ip();
                let backend = lab.place(&answer.backend)?.ip(family);
                let expected =
                    if told { [lab.world.route_source(1, backend)?].into() } else { lab.world.node_addresses(1)? };
                ensure!(expected.contains(&seen), "{to} {by}: {} saw {seen}, not {expected:?}", answer.backend);
            }
        }
    }
    Ok(())
}

fn zone(lab: &mut Lab) -> Result<()> {
    let own = service(85, "zoned | ClusterIP | b1@zone-a b2@zone-b")?;
    install(lab, &own)?;
    expect(lab, "pod", &own, Via::ClusterIp, "b1 own")?;
    let moved = move_node(lab, "zone-b").and_then(|()| expect(lab, "pod", &own, Via::ClusterIp, "b2 own"));
    move_node(lab, "zone-a")?;
    moved?;
    expect(lab, "pod", &own, Via::ClusterIp, "b1 own")?;
    delete(lab, &own)
}

fn move_node(lab: &mut Lab, zone: &str) -> Result<()> {
    lab.objects.label_node("node1", "topology.kubernetes.io/zone", zone)?;
    // The marker is a Service: nothing says that Nodes were heard of before it.
    lab.settle()?;
    std::thread::sleep(Duration::from_millis(500));
    lab.settle()
}

fn open(lab: &mut Lab) -> Result<()> {
    let mut own = service(86, "open | LoadBalancer ranges=192.168.77.100/32,fd00:77::100/128 | b1 b2")?;
    install(lab, &own)?;
    let mut held = Vec::new();
    for (from, via) in [("pod", Via::ClusterIp), ("outside", Via::ClusterIp), ("outside", Via::LoadBalancer)] {
        for family in Family::BOTH {
            let to = own.address(&lab.world, via, family, Transport::Tcp);
            let args = ["hold".to_owned(), to.to_string(), "--connections=6".to_owned(), "--interval=20".to_owned()];
            held.push((from, lab.place(from)?.start(&lab.world.programs().testpod, &args)?));
        }
    }
    for (_, client) in &mut held {
        client.wait_for_line("ready", patience(5))?;
    }
    own.endpoints.clear();
    own.ranges = vec!["10.99.0.0/16".to_owned(), "fd00:99::/64".to_owned()];
    install(lab, &own)?;
    expect(lab, "pod", &own, Via::ClusterIp, "refused")?;
    for (from, client) in held {
        let report: hold::Report = client.finish(patience(10))?;
        ensure!(report.broken.is_empty() && report.wrong.is_empty(), "held by {from}: {report:?}");
    }
    delete(lab, &own)
}

fn node_port_moves(lab: &mut Lab) -> Result<()> {
    let own = service(87, "moving | NodePort | b1")?;
    let mut moved = service(88, "moving | NodePort | b1")?;
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
    let mut own = service(89, "clinging | LoadBalancer affinity=10800 | b1 b2")?;
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
    let off = service(89, "clinging | LoadBalancer | b1 b2")?;
    install(lab, &off)?;
    expect(lab, "pod", &off, Via::ClusterIp, "b1 b2 own")?;
    delete(lab, &own)
}

fn who(lab: &Lab, from: &str, to: SocketAddr) -> Result<String> {
    let report = lab.world.ask(lab.place(from)?, &Ask::new(to, Transport::Tcp))?;
    report.backends().into_keys().next().with_context(|| format!("{from} to {to}: {:?}", report.errors()))
}

/// Who asks, by which ways, and from which port on: the node's own sockets keep out of the ports that others are masqueraded to.
const TALKERS: [(&str, u16, &[Via]); 3] = [
    ("pod", 4_070, &[Via::ClusterIp, Via::LoadBalancer]),
    ("node", 34_070, &[Via::ClusterIp]),
    ("outside", 4_070, &[Via::ClusterIp, Via::LoadBalancer, Via::NodePort(At::Node1)]),
];

/// Each question from a port of its own, which is the same every time. `wanted` is who answers, if anybody: of the first Service, of the
/// second one.
fn talk(lab: &Lab, services: &[Service; 2], wanted: [Option<&str>; 2]) -> Result<()> {
    for (from, first, ways) in TALKERS {
        let mut asked: Vec<(Question, Option<&str>)> = Vec::new();
        for (service, wanted) in services.iter().zip(wanted) {
            for &via in ways {
                for family in Family::BOTH {
                    // By policy Local a pod may use any endpoint, but by the ClusterIP.
                    if service.external_local && from == "pod" && via != Via::ClusterIp {
                        continue;
                    }
                    let to = service.address(&lab.world, via, family, Transport::Udp);
                    let port = first + u16::try_from(asked.len())?;
                    let question = question(to, Transport::Udp, 1, Duration::from_millis(700));
                    asked.push((Question { source_port: Some(port), ..question }, wanted));
                }
            }
        }
        let questions: Vec<Question> = asked.iter().map(|(question, _)| question.clone()).collect();
        for ((Question { to, .. }, wanted), report) in asked.iter().zip(lab.survey(from, &questions)?) {
            let seen = report.backends();
            let seen: Vec<&str> = seen.keys().map(String::as_str).collect();
            ensure!(wanted.is_some() || seen.is_empty(), "{from} to {to}: {STILL}");
            ensure!(seen == wanted.as_slice(), "{from} to {to}: expected {wanted:?}, saw {report:?}");
        }
    }
    Ok(())
}

/// As docs/conformance.md has it.
const STILL: &str = "still answered";

/// Endpoints of the two Services, and who answers.
type Step = ([&'static str; 2], [Option<&'static str>; 2]);
const BEFORE: Step = (["b1", "b1 b2"], [Some("b1"); 2]);
const AFTER: Step = (["b2", "c1 b2"], [Some("b2"), Some("c1")]);
const EMPTIED: Step = (["", ""], [None, None]);

fn udp_flows(lab: &mut Lab) -> Result<()> {
    let services =
        [service(90, "datagrams | LoadBalancer | b1")?, service(94, "datagrams-local | LoadBalancer eTP iTP | b1")?];
    steps(lab, services, &[AFTER])
}

fn udp_flows_emptied(lab: &mut Lab) -> Result<()> {
    // Of addresses of their own: kube-proxy ends no flows where a Service is new and its endpoints are not.
    let services =
        [service(95, "emptied | LoadBalancer | b1")?, service(96, "emptied-local | LoadBalancer eTP iTP | b1")?];
    steps(lab, services, &[EMPTIED, AFTER])
}

fn steps(lab: &mut Lab, mut own: [Service; 2], steps: &[Step]) -> Result<()> {
    let outcome = [BEFORE].iter().chain(steps).try_for_each(|(endpoints, wanted)| {
        for (service, endpoints) in own.iter_mut().zip(endpoints) {
            service.endpoints = endpoints.split_whitespace().map(endpoint).collect();
        }
        lab.install(&own)?;
        lab.settle()?;
        // Flows end after the sync that the marker waits for, as soon as a walk over them is done. kube-proxy is not waited for where it is known
        // to end none.
        let known = wanted.contains(&None) && lab.subject.is_some_and(|subject| !subject.is_agent());
        eventually_within(if known { 2 } else { 15 }, || talk(lab, &own, *wanted))
    });
    own.iter().try_for_each(|service| delete(lab, service))?;
    outcome
}

/// Everybody who talks to a Service over UDP, each from a port of its own. Ports are counted from `offset` on.
fn talkers(lab: &Lab, service: &Service, from: &str, offset: u16) -> Result<Vec<(String, Client)>> {
    let (from, first, ways) =
        TALKERS.into_iter().find(|(name, ..)| *name == from).with_context(|| format!("{from} does not talk"))?;
    let ways = ways.iter().filter(|&&via| service.kind == "LoadBalancer" || via != Via::LoadBalancer);
    let ways = ways.flat_map(|&via| Family::BOTH.map(|family| (via, family)));
    let start = |(port, (via, family)): (u16, (Via, Family))| -> Result<_> {
        let to = service.address(&lab.world, via, family, Transport::Udp);
        // Where nobody answers, the next try is soon.
        let args = ["talk".to_owned(), to.to_string(), format!("--source-port={port}"), "--timeout=300".to_owned()];
        Ok((format!("{from} to {to}"), lab.place(from)?.start(&lab.world.programs().testpod, &args)?))
    };
    (first + offset..).zip(ways).map(start).collect()
}

fn udp_flows_kept(lab: &mut Lab) -> Result<()> {
    let mut own = service(97, "leaving | LoadBalancer | b1")?;
    install(lab, &own)?;
    let mut clients = Vec::new();
    for (from, ..) in TALKERS {
        clients.extend(talkers(lab, &own, from, 100)?);
    }
    clients.iter_mut().try_for_each(|(_, client)| client.wait_for_line("ready", patience(5)))?;
    own.endpoints = ["b1:terminating", "b2"].map(endpoint).into();
    install(lab, &own)?;
    expect(lab, "pod", &own, Via::ClusterIp, "b2 own")?;
    expect(lab, "outside", &own, Via::LoadBalancer, "b2 node")?;
    for (what, client) in clients {
        let report: talk::Report = client.finish(patience(5))?;
        let seen = report.backends(0, u64::MAX);
        ensure!(seen == ["b1:8080"], "{what}: answered by {seen:?}");
        ensure!(report.sockets == 1, "{what}: {} sockets, {:?}", report.sockets, report.errors());
    }
    delete(lab, &own)
}

/// The kernel tracks what nobody answers, too, and a flow that it knows meets no new rules. A load balancer's address comes later than endpoints do,
/// and kube-proxy ends flows when these change. Sockets of the node itself are not asked: with eBPF they are translated when they connect, and with
/// kube-proxy it is chance whether a datagram makes the entry anew between the deletion and the rule.
fn udp_flows_before(lab: &mut Lab) -> Result<()> {
    let own = service(98, "early | NodePort | b1")?;
    let mut clients = talkers(lab, &own, "pod", 200)?;
    clients.extend(talkers(lab, &own, "outside", 200)?);
    // Once each has said something to nobody.
    std::thread::sleep(Duration::from_millis(500) * slower());
    install(lab, &own)?;
    for (what, client) in &mut clients {
        client.wait_for_line("ready", patience(15)).with_context(|| format!("{what}: never answered"))?;
    }
    delete(lab, &own)
}

/// Who is asked by whom about affinity that ends soon.
const CLIENTS: [&str; 5] = ["pod", "other", "node", "node2", "outside"];
const BRIEF: &str = "sticky-for-10s";
const FORGOTTEN_AFTER: Duration = Duration::from_secs(10);

/// Who answers each client, by each port of a Service of the table.
fn remembered(lab: &Lab, name: &str) -> Result<BTreeMap<String, String>> {
    let services = services::parse(SERVICES, FIRST)?;
    let service = services.iter().find(|service| service.name == name).context("no such Service")?;
    let mut seen = BTreeMap::new();
    for from in CLIENTS {
        let ways = Family::BOTH.into_iter().flat_map(|family| [Transport::Tcp, Transport::Udp].map(|by| (family, by)));
        let (keys, questions): (Vec<String>, Vec<Question>) = ways
            .map(|(family, by)| {
                let to = service.address(&lab.world, Via::ClusterIp, family, by);
                (format!("{by} {from} {family}"), question(to, by, 3, patience(2)))
            })
            .unzip();
        for (key, report) in keys.into_iter().zip(lab.survey(from, &questions)?) {
            let backends: Vec<String> = report.backends().into_keys().collect();
            let [one] = &backends[..] else { bail!("{key}: {report:?}") };
            seen.insert(key, one.clone());
        }
    }
    Ok(seen)
}

fn apart(lab: &mut Lab) -> Result<()> {
    let (first, second) = (remembered(lab, BRIEF)?, remembered(lab, BRIEF)?);
    ensure!(first == second, "{first:?}, and a moment later {second:?}");
    let by = |transport: &str| -> Vec<String> {
        second.iter().filter(|(key, _)| key.starts_with(transport)).map(|(_, backend)| backend.clone()).collect()
    };
    // Of four backends ten clients draw the same twice in a row once in a million times.
    ensure!(by("tcp") != by("udp"), "both ports are led alike: {second:?}");
    lab.remembered = Some((Instant::now(), second));
    Ok(())
}

fn restarted(lab: &mut Lab) -> Result<()> {
    let before = remembered(lab, "sticky")?;
    lab.restart()?;
    let after = remembered(lab, "sticky")?;
    ensure!(before == after, "{before:?}, and after the restart {after:?}");
    Ok(())
}

fn forgotten(lab: &mut Lab) -> Result<()> {
    if lab.remembered.is_none() {
        lab.remembered = Some((Instant::now(), remembered(lab, BRIEF)?));
    }
    let (since, before) = lab.remembered.take().context("nothing is remembered")?;
    std::thread::sleep((FORGOTTEN_AFTER + Duration::from_secs(1)).saturating_sub(since.elapsed()));
    let after = remembered(lab, BRIEF)?;
    ensure!(before != after, "{before:?}, and after {:?} still the same", since.elapsed());
    Ok(())
}

fn narrowed(lab: &mut Lab) -> Result<()> {
    lab.node_port_addresses = Some("192.168.77.51/32");
    let outcome = lab.restart().and_then(|()| {
        let services = services::parse(SERVICES, FIRST)?;
        let service = services.into_iter().find(|service| service.name == "lb").context("no such Service")?;
        let of = |family| Service { families: vec![family], ..service.clone() };
        expect(lab, "outside", &of(Family::V4), Via::NodePort(At::Second), "b1 b2 node")?;
        expect(lab, "outside", &of(Family::V4), Via::NodePort(At::Node1), "refused")?;
        expect(lab, "localhost", &of(Family::V4), Via::NodePort(At::Localhost), "refused")?;
        // No range is of this family.
        expect(lab, "outside", &of(Family::V6), Via::NodePort(At::Node1), "b1 b2 node")
    });
    lab.node_port_addresses = None;
    lab.restart()?;
    outcome
}

fn health(lab: &mut Lab) -> Result<()> {
    let own = service(91, "healthy | LoadBalancer eTP | b2 c2 b1:unready")?;
    install(lab, &own)?;
    answers(lab, &own, [(1, Some(0)), (2, Some(2))])?;
    // One that terminates goes on serving, and is no reason to send more (A113).
    let own = service(91, "healthy | LoadBalancer eTP | b1 c2 b2:terminating")?;
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
    let own = service(92, "unlucky | LoadBalancer eTP | b1 b2")?;
    let other = service(93, "lucky | LoadBalancer eTP | b1 b2")?;
    let taken = Family::BOTH.map(|family| SocketAddr::new(lab.world.node(1).place.ip(family), own.health_port()));
    let held = lab.world.node(1).place.namespace.enter(|| taken.map(TcpListener::bind))?;
    let held = held.into_iter().collect::<Result<Vec<_>, _>>().context("take the port")?;
    lab.install([&own, &other])?;
    lab.settle()?;
    answers(lab, &other, [(1, Some(1)), (2, Some(1))])?;
    eventually(|| {
        let Some(events) = lab.objects.events()? else { return Ok(()) };
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
    eventually_within(15, check)
}

fn eventually_within(seconds: u64, check: impl Fn() -> Result<()>) -> Result<()> {
    within(patience(seconds), check)
}

fn get(at: SocketAddr) -> Result<String> {
    let mut stream = TcpStream::connect_timeout(&at, patience(2)).with_context(|| format!("connect to {at}"))?;
    stream.set_read_timeout(Some(patience(3)))?;
    write!(stream, "GET /any HTTP/1.0\r\nHost: {at}\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    if answer.is_empty() {
        bail!("{at}: no answer");
    }
    Ok(answer)
}
