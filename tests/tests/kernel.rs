//! What the agent makes of the kernel that it runs on: `check` finds nothing that fails, packets are met by the means that this
//! kernel has, and what somebody takes off is put back.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
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
    },
};
use serde_json::Value;

fn main() -> ExitCode {
    Suite::in_worlds("kernel", [("kernel".to_owned(), ())], prepare, |suite, group, (), world| {
        suite.case(&format!("{group}/check: nothing fails, and it says how packets are met"), || checked(world));
        suite.case(&format!("{group}/tc programs are on every device: by TCX since 6.6, before by clsact"), || {
            hooked(world)
        });
        suite.case(&format!("{group}/what somebody takes off a device is put back"), || put_back(world));
        let name = format!("{group}/a bond is met at the bond, not at its ports, and without XDP");
        match has_bonds(world) {
            Ok(true) => suite.case(&name, || bonded(world)),
            Ok(false) => suite.skip(&name, "this kernel has no bonding"),
            Err(error) => suite.fail(&name, &error),
        }
        suite.case(&format!("{group}/foreign filters stay, ours go"), || cleaned_up(world));
    })
}

fn prepare(programs: Programs, (): &()) -> Result<World> {
    // Pods are served by what is at their links alone.
    let extra = ["--sync-period", "1s", "--xdp", "generic"].map(str::to_owned).to_vec();
    let options = AgentOptions { extra, ..AgentOptions::new(SocketLb::Node) };
    let spec = Spec { nodes: vec![vec!["a1".to_owned(), "b1".to_owned()]], ..Spec::two_nodes(Topology::Routed) };
    World::serving(&spec, programs, &options, |world| {
        let service = objects::service("web")
            .cluster_ips(&Family::BOTH.map(|family| vip(family, 1)))
            .port("web", "TCP", 80)
            .port("dns", "UDP", 80);
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
fn has_bonds(world: &World) -> Result<bool> {
    let namespace = &world.node(1).place.namespace;
    let made = namespace.output("ip", &["link", "add", BOND, "type", "bond", "mode", "active-backup"]);
    match made {
        Ok(_) => namespace.output("ip", &["link", "del", BOND]).map(|_| true),
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
    let way = way()?;
    let wanted: BTreeSet<_> = ["ingress", "egress"].map(|direction| format!("{way}/{direction}")).into();
    let deadline = Instant::now() + patience(30);
    let at = |hooks: &[(String, String)], device: &str| -> BTreeSet<String> {
        hooks.iter().filter(|(target, _)| target == device).map(|(_, kind)| kind.clone()).collect()
    };
    loop {
        let hooks = hooks(world)?;
        let status = world.node(1).status()?;
        let why = status["withoutXdp"][BOND].as_str().unwrap_or_default().to_owned();
        if at(&hooks, BOND) == wanted && why.contains("XDP sees its ports") {
            ensure!(PORTS.iter().all(|port| at(&hooks, port).is_empty()), "at its ports: {hooks:?}");
            ensure!(at(&hooks, "eth0").contains("xdp/generic"), "no XDP beside it: {hooks:?}");
            let page = world.cli(world.node(1), &["status"])?;
            ensure!(page.contains(&why), "{why:?} is not in {page}");
            break;
        }
        ensure!(Instant::now() < deadline, "{why:?}, {hooks:?}");
        thread::sleep(Duration::from_millis(200));
    }
    // From outside over the bond.
    all_served(world)
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
