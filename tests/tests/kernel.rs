//! What the agent makes of the kernel that it runs on: `check` finds nothing that fails, packets are met by the means that this
//! kernel has, and what somebody takes off is put back.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use proxy_tests::{
    pod::socket::Transport,
    suite::Suite,
    world::{
        AgentOptions, Ask, Family, Place, Programs, SocketLb, Spec, Topology, World, kernel, objects, patience, vip,
        within,
    },
};
use serde_json::{Value, json};

fn main() -> ExitCode {
    Suite::in_worlds("kernel", [("kernel".to_owned(), ())], prepare, |suite, group, (), world| {
        suite.case(&format!("{group}/check: nothing fails, and it says how packets are met"), || checked(world));
        suite.case(&format!("{group}/tc programs are on every device: by TCX since 6.6, before by clsact"), || {
            hooked(world)
        });
        suite.case(&format!("{group}/what somebody takes off a device is put back"), || put_back(world));
        let name = format!("{group}/a bond is met at the bond, not at its ports, and without XDP");
        match can_be_made(world, BOND, "type bond mode active-backup") {
            Ok(true) => suite.case(&name, || bonded(world)),
            Ok(false) => suite.skip(&name, "this kernel has no bonding"),
            Err(error) => suite.fail(&name, &error),
        }
        let name = format!("{group}/a VLAN as uplink: asked and masqueraded there, its packets left alone below");
        match can_be_made(world, VLAN, TAGGED) {
            Ok(true) => suite.case(&name, || tagged(world)),
            Ok(false) => suite.skip(&name, "this kernel has no VLAN devices"),
            Err(error) => suite.fail(&name, &error),
        }
        suite.case(&format!("{group}/foreign filters stay, ours go"), || cleaned_up(world));
    })
}

const NODE_PORT: u16 = 30_080;

fn prepare(programs: Programs, (): &()) -> Result<World> {
    // Pods are served by what is at their links alone.
    let extra = ["--sync-period", "1s", "--xdp", "generic"].map(str::to_owned).to_vec();
    let options = AgentOptions { extra, ..AgentOptions::new(SocketLb::Node) };
    let spec = Spec { nodes: vec![vec!["a1".to_owned(), "b1".to_owned()]], ..Spec::two_nodes(Topology::Routed) };
    World::serving(&spec, programs, &options, |world| {
        let service = objects::service("web")
            .cluster_ips(&Family::BOTH.map(|family| vip(family, 1)))
            .port("web", "TCP", 80)
            .node_port(NODE_PORT)
            .port("dns", "UDP", 80)
            .node_port(NODE_PORT);
        let slice = |family| {
            let slice = objects::slice("web", family).port("web", "TCP", 8080).port("dns", "UDP", 8080);
            slice.endpoint(world.pod("b1")).json()
        };
        [objects::nodes(world), vec![service.json()], Family::BOTH.map(slice).to_vec()].concat()
    })
}

/// `tcx` or `clsact`.
fn way() -> Result<&'static str> {
    Ok(if kernel()? < (6, 6) { "clsact" } else { "tcx" })
}

fn checked(world: &World) -> Result<()> {
    let node = world.node(1);
    let cgroup = node.cgroup.display().to_string();
    let text = world.cli_output(node, &["check", "-o", "json", "--cgroup-root", &cgroup])?;
    let list: Value = serde_json::from_str(&text).with_context(|| text.clone())?;
    let checks = list["items"].as_array().context("no items")?;
    let failed: Vec<&Value> = checks.iter().filter(|check| check["result"] == "failed").collect();
    ensure!(failed.is_empty(), "{failed:?}");
    let tc = checks.iter().find(|check| check["name"] == "tc").context("no check tc")?;
    let detail = tc["detail"].as_str().context("no detail")?;
    ensure!(detail.to_lowercase().starts_with(way()?), "{detail}");
    Ok(())
}

/// Devices and directions at which something of ours is, with its kind.
fn hooks(world: &World) -> Result<Vec<(String, String)>> {
    let status = world.node(1).status()?;
    let hooks = status["hooks"].as_array().with_context(|| format!("no hooks: {status}"))?;
    let text = |hook: &Value, field: &str| hook[field].as_str().unwrap_or_default().to_owned();
    let mut hooks: Vec<_> = hooks.iter().map(|hook| (text(hook, "target"), text(hook, "kind"))).collect();
    hooks.retain(|(_, kind)| !kind.starts_with("cgroup/"));
    Ok(hooks)
}

fn hooked(world: &World) -> Result<()> {
    let (hooks, way) = (hooks(world)?, way()?);
    for device in ["eth0".to_owned(), world.pod_link(world.pod("a1"))] {
        for direction in ["ingress", "egress"] {
            let wanted = (device.clone(), format!("{way}/{direction}"));
            ensure!(hooks.contains(&wanted), "no {wanted:?} in {hooks:?}");
        }
    }
    all_served(world)
}

fn served(world: &World, from: &Place) -> Result<()> {
    for (family, transport) in Family::BOTH.into_iter().flat_map(|f| [(f, Transport::Tcp), (f, Transport::Udp)]) {
        let to = SocketAddr::new(vip(family, 1), 80);
        let report = world.ask(from, &Ask::new(to, transport).times(2).timeout(5000))?;
        ensure!(report.errors().is_empty(), "{} -> {to} {transport}: {:?}", from.name, report.errors());
        let unused = SocketAddr::new(vip(family, 1), 81);
        let report = world.ask(from, &Ask::new(unused, transport).timeout(5000))?;
        ensure!(report.errors().keys().eq(["ECONNREFUSED"]), "{} -> {unused} {transport}: {report:?}", from.name);
    }
    Ok(())
}

/// Packet by packet, from both sides, and at connect time.
fn all_served(world: &World) -> Result<()> {
    for from in [world.pod("a1"), world.outside(), &world.node(1).place] {
        served(world, from)?;
    }
    Ok(())
}

/// The whole qdisc with all its filters, or our links with their pins.
fn put_back(world: &World) -> Result<()> {
    let (node, link) = (world.node(1), world.pod_link(world.pod("a1")));
    let before = hooks(world)?;
    if way()? == "clsact" {
        node.place.namespace.output("tc", &["qdisc", "del", "dev", &link, "clsact"])?;
    } else {
        let links = node.bpffs.join("v1/links");
        for entry in std::fs::read_dir(&links)? {
            let path = entry?.path();
            if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("tcx-")) {
                std::fs::remove_file(path)?;
            }
        }
    }
    let deadline = Instant::now() + patience(30);
    while served(world, world.pod("a1")).is_err() || hooks(world)? != before {
        ensure!(Instant::now() < deadline, "not put back: {:?} of {before:?}", hooks(world)?);
        thread::sleep(Duration::from_millis(200));
    }
    world.leaks()?;
    all_served(world)
}

const BOND: &str = "bond0";
/// Ports of it: an uplink that is a veth, as that of a node in a container, and another one.
const PORTS: [&str; 2] = ["port0", "port1"];

/// By making one, which has the module loaded.
fn can_be_made(world: &World, link: &str, what: &str) -> Result<bool> {
    let namespace = &world.node(1).place.namespace;
    match namespace.ip(&format!("link add name {link} {what}\n")) {
        Ok(()) => namespace.ip(&format!("link del {link}\n")).map(|()| true),
        Err(error) if format!("{error:#}").contains("Unknown device type") => Ok(false),
        Err(error) => Err(error),
    }
}

/// A second way from outside leads over a bond, as long as it is asked.
fn bonded(world: &World) -> Result<()> {
    let served = served_by_a_bond(world);
    let (node, outside) = (&world.node(1).place.namespace, &world.outside().namespace);
    // A veth goes with its peer, and routes with what they lead to.
    let links = [(outside, "wire0"), (node, BOND), (node, PORTS[1])];
    let gone: Result<()> =
        links.map(|(namespace, link)| namespace.ip(&format!("link del {link}\n"))).into_iter().collect();
    // A case that fails may not have made them all.
    served.and(gone)
}

fn served_by_a_bond(world: &World) -> Result<()> {
    let (node, outside) = (world.node(1).place.namespace.clone(), world.outside().namespace.clone());
    let [port, spare] = PORTS;
    node.ip(&format!(
        "link add {BOND} type bond mode active-backup\n\
         link add {port} type veth peer name wire0 netns {}\n\
         link add {spare} type dummy\n\
         link set {port} master {BOND}\n\
         link set {spare} master {BOND}\n\
         link set {BOND} type bond primary {port}\n\
         link set {BOND} up\n\
         addr add 198.51.100.1/24 dev {BOND}\n\
         addr add 2001:db8:51::1/64 dev {BOND} nodad\n",
        outside.name()
    ))?;
    let [v4, v6] = Family::BOTH.map(|family| vip(family, 1));
    outside.ip(&format!(
        "link set wire0 up\n\
         addr add 198.51.100.2/24 dev wire0\n\
         addr add 2001:db8:51::2/64 dev wire0 nodad\n\
         route replace {v4} via 198.51.100.1 dev wire0\n\
         route replace {v6} via 2001:db8:51::1 dev wire0\n"
    ))?;
    within(patience(30), || {
        let hooks = hooks(world)?;
        let why = without_xdp(world, BOND)?;
        ensure!(at(&hooks, BOND) == by_tc()? && why.contains("XDP sees its ports"), "{why:?}, {hooks:?}");
        ensure!(PORTS.iter().all(|port| at(&hooks, port).is_empty()), "at its ports: {hooks:?}");
        ensure!(at(&hooks, "eth0").contains("xdp/generic"), "no XDP beside it: {hooks:?}");
        let page = world.cli(world.node(1), &["status"])?;
        ensure!(page.contains(&why), "{why:?} is not in {page}");
        Ok(())
    })?;
    // From outside over the bond.
    all_served(world)
}

/// What is at a device.
fn at(hooks: &[(String, String)], device: &str) -> BTreeSet<String> {
    hooks.iter().filter(|(target, _)| target == device).map(|(_, kind)| kind.clone()).collect()
}

/// And what is at one that is met by tc alone.
fn by_tc() -> Result<BTreeSet<String>> {
    let way = way()?;
    Ok(["ingress", "egress"].map(|direction| format!("{way}/{direction}")).into())
}

/// Why XDP is not on a device.
fn without_xdp(world: &World, device: &str) -> Result<String> {
    Ok(world.node(1).status()?["withoutXdp"][device].as_str().unwrap_or_default().to_owned())
}

const VLAN: &str = "eth0.77";
const TAGGED: &str = "link eth0 type vlan id 77";
/// The two ends of it: the node's, and that of the client outside, who serves there, too.
const VLAN_NODE: [&str; 2] = ["198.51.77.1", "2001:db8:77::1"];
const VLAN_OUTSIDE: [&str; 2] = ["198.51.77.2", "2001:db8:77::2"];

/// A second way from outside leads over a VLAN of the first one.
fn tagged(world: &World) -> Result<()> {
    let beyond = beyond();
    let served = served_by_a_vlan(world, &beyond);
    let gone = beyond.iter().try_for_each(|object| world.remove(object));
    // One end does not go with the other, and a case that fails may not have made both.
    let [node, outside] =
        [&world.node(1).place, world.outside()].map(|place| place.namespace.ip(&format!("link del {VLAN}\n")));
    served.and(gone).and(node).and(outside)
}

/// A Service whose endpoint is reached by the VLAN alone.
fn beyond() -> Vec<Value> {
    let service = objects::service("beyond")
        .cluster_ips(&Family::BOTH.map(|family| vip(family, 2)))
        .port("web", "TCP", 80)
        .node_port(NODE_PORT + 1)
        .port("dns", "UDP", 80)
        .node_port(NODE_PORT + 1);
    let slice = |(family, address): (Family, &str)| {
        let mut slice = objects::slice("beyond", family).port("web", "TCP", 8080).port("dns", "UDP", 8080).json();
        slice["endpoints"] = json!([{"addresses": [address], "conditions": {"ready": true}}]);
        slice
    };
    [service.json()].into_iter().chain(Family::BOTH.into_iter().zip(VLAN_OUTSIDE).map(slice)).collect()
}

fn served_by_a_vlan(world: &World, beyond: &[Value]) -> Result<()> {
    let outside = world.outside();
    for (namespace, [v4, v6]) in [(&world.node(1).place.namespace, VLAN_NODE), (&outside.namespace, VLAN_OUTSIDE)] {
        namespace.ip(&format!(
            "link add name {VLAN} {TAGGED}\n\
             link set {VLAN} up\n\
             addr add {v4}/24 dev {VLAN}\n\
             addr add {v6}/64 dev {VLAN} nodad\n"
        ))?;
    }
    for (family, by) in Family::BOTH.into_iter().zip(VLAN_NODE) {
        outside.namespace.ip(&format!("route replace {} via {by} dev {VLAN}\n", vip(family, 1)))?;
    }
    let addresses = VLAN_OUTSIDE.map(|address| format!("--address={address}"));
    let args = ["serve", "--name=outside", "--port=8080"].map(str::to_owned).into_iter().chain(addresses);
    let mut server = outside.start(&world.programs().testpod, &args.collect::<Vec<_>>())?;
    server.wait_for_line("serving", patience(5))?;
    beyond.iter().try_for_each(|object| world.write(object))?;
    within(patience(30), || {
        let hooks = hooks(world)?;
        ensure!(at(&hooks, VLAN) == by_tc()? && at(&hooks, "eth0") == by_tc()?, "{hooks:?}");
        let why = without_xdp(world, "eth0")?;
        ensure!(why.contains("VLANs are on it"), "{why:?}");
        over_a_vlan(world)
    })?;
    // ClusterIPs, over the VLAN from outside.
    all_served(world)
}

/// Node ports at the address that the node has there; and those whose backend is there, which sees that address.
fn over_a_vlan(world: &World) -> Result<()> {
    let ways = Family::BOTH.into_iter().zip(VLAN_NODE);
    for ((family, address), transport) in ways.flat_map(|way| [(way, Transport::Tcp), (way, Transport::Udp)]) {
        let address: IpAddr = address.parse()?;
        for (from, to, backend) in [
            (world.outside(), SocketAddr::new(address, NODE_PORT), "b1"),
            (world.pod("a1"), world.node(1).place.at(family, NODE_PORT + 1), "outside"),
        ] {
            let report = world.ask(from, &Ask::new(to, transport).times(2).timeout(5000))?;
            let answers: Vec<_> = report.tries.iter().filter_map(|one| one.answer.as_ref()).collect();
            let right = answers.len() == 2 && answers.iter().all(|answer| answer.backend == backend);
            ensure!(right, "{} -> {to} {transport}: {report:?}", from.name);
            for answer in answers.iter().filter(|answer| answer.backend == "outside") {
                let seen = answer.peer.parse::<SocketAddr>()?.ip();
                ensure!(seen == address, "{} -> {to} {transport}: masqueraded with {seen}", from.name);
            }
        }
    }
    Ok(())
}

fn cleaned_up(world: &mut World) -> Result<()> {
    let link = world.pod_link(world.pod("a1"));
    let namespace = world.node(1).place.namespace.clone();
    // A qdisc of clsact's kind goes with TCX, too.
    let there = namespace.output("tc", &["qdisc", "show", "dev", &link])?;
    if !there.contains("clsact") {
        namespace.output("tc", &["qdisc", "add", "dev", &link, "clsact"])?;
    }
    // Any program will do, and a kernel may have no other classifier: one of ours, where we would never put it.
    let program = world.node(1).bpffs.join("v1/programs/tc_ingress_ether").display().to_string();
    let foreign = ["filter", "add", "dev", &link, "ingress", "prio", "7", "bpf", "da", "pinned", &program];
    namespace.output("tc", &foreign)?;
    world.kill_agent(1)?;
    world.cli(world.node(1), &["cleanup"])?;
    let shown = namespace.output("tc", &["filter", "show", "dev", &link, "ingress"])?;
    ensure!(shown.contains("pref 7 "), "the foreign filter is gone: {shown}");
    ensure!(!shown.contains("pref 80 "), "ours is still there: {shown}");
    Ok(())
}
