//! TCP connections per packet that lose their entries (contract F24), and those that another proxy made before this one took over (F45): the
//! former are reset, the latter go on, and nobody is reset as long as there are any of those.

use std::{
    collections::BTreeSet,
    fs, io,
    net::{IpAddr, SocketAddr},
    process::ExitCode,
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use proxy_tests::{
    pod::{hold, socket::Transport, storm},
    suite::Suite,
    world::{
        AgentOptions, Ask, Client, Family, Place, Programs, SocketLb, Spec, Topology, World, external, objects, trace,
        vip, within,
    },
};
use serde_json::Value;

const PORT: u16 = 80;
const NODE_PORT: u16 = 30_080;
const SERVED: u16 = 8080;
const PATIENCE: Duration = Duration::from_secs(15);
/// For how long, in milliseconds, an answer is waited for that is to come at once, and so is a reset: too short for one that was
/// [`IN_VAIN`] before.
const AT_ONCE: u32 = 3000;
const IN_VAIN: u32 = 14_000;

fn main() -> ExitCode {
    let shapes = [Topology::Routed, Topology::Uplink, Topology::Bridge];
    let shapes = shapes.map(|topology| (format!("lost/{}", topology.name()), topology));
    Suite::in_worlds("lost", shapes, prepare, |suite, group, &topology, world| {
        if topology == Topology::Routed {
            lost(suite, group, world);
        } else {
            suite.case(&format!("{group}/F24: at a port of a bridge who speaks in vain is reset"), || {
                reset_at_a_bridge(world)
            });
        }
        suite.case(&format!("{group}/F45: a connection from before the address was a Service's goes on"), || {
            from_before(world)
        });
    })
}

fn lost(suite: &mut Suite, group: &str, world: &mut World) {
    suite.case(&format!("{group}/F45: another proxy's connections go on, and then nobody else translates"), || {
        taken_over(world)
    });
    suite.case(
        &format!("{group}/F45: another proxy's connections by links that had no hooks while no agent ran"),
        || found_again(world),
    );
    for family in Family::BOTH {
        suite.case(&format!("{group}/F24: a connection without entries is reset at once, {family}"), || {
            reset(world, family)
        });
    }
    for xdp in ["off", "generic"] {
        suite.case(
            &format!("{group}/F24: the same at load balancers' addresses, external IPs and NodePorts, XDP {xdp}"),
            || reset_outside(world, xdp),
        );
    }
    suite.case(&format!("{group}/F24: silent connections outlive thousands that come and go"), || outlives(world));
    suite.case(&format!("{group}/F24: a table full of open connections cuts none of them"), || full(world));
    suite.case(&format!("{group}/an idle agent looks at one number a second"), || idles(world));
}

/// With pods that have links of their own no agent runs at first.
fn prepare(programs: Programs, &topology: &Topology) -> Result<World> {
    let spec = Spec { for_xdp: topology == Topology::Routed, ..Spec::two_nodes(topology) };
    let mut world = World::new(&spec, programs)?;
    let service = objects::service("web")
        .cluster_ips(&Family::BOTH.map(|family| vip(family, 1)))
        .port("", "TCP", PORT)
        .node_port(NODE_PORT)
        .load_balancer(&Family::BOTH.map(|family| external(family, 1)))
        .external_ips(&Family::BOTH.map(|family| external(family, 2)));
    let slice = |family| objects::slice("web", family).port("", "TCP", SERVED).endpoint(world.pod("b2")).json();
    let objects = [objects::nodes(&world), vec![service.json()], Family::BOTH.map(slice).to_vec()].concat();
    objects.iter().try_for_each(|object| world.write(object))?;
    if topology != Topology::Routed {
        world.start_agents(&AgentOptions::new(SocketLb::Node))?;
        world.settle()?;
    }
    Ok(world)
}

fn hold(world: &World, family: Family) -> Result<Client> {
    hold_to(world.pod("a1"), SocketAddr::new(vip(family, 1), PORT), AT_ONCE, "b2", world)
}

/// The answer of `backend` is waited for, `patience` milliseconds at most.
fn hold_to(from: &Place, to: SocketAddr, patience: u32, backend: &str, world: &World) -> Result<Client> {
    let (timeout, backend) = (format!("--timeout={patience}"), format!("--expect={backend}"));
    let args = ["hold", &to.to_string(), "--connections=1", "--interval=100", &timeout, &backend];
    let mut held = from.start(&world.programs().testpod, &args.map(str::to_owned))?;
    held.wait_for_line("ready", PATIENCE)?;
    Ok(held)
}

/// Whether connections without entries are reset on node1, as `status` has it.
fn is_said(world: &World) -> Result<bool> {
    let (page, text) = (world.cli(world.node(1), &["status"])?, world.cli(world.node(1), &["status", "-o", "json"])?);
    let json: Value = serde_json::from_str(&text)?;
    let said = json["kernel"]["resetsLost"].as_bool().with_context(|| text.clone())?;
    ensure!(
        page.contains(if said { "Resets:     on" } else { "Resets:     off: a TCP connection" }),
        "{said}, but {page}"
    );
    Ok(said)
}

fn resets(world: &World) -> Result<u64> {
    count(world, "lost_connection")
}

fn count(world: &World, reason: &str) -> Result<u64> {
    let text = world.cli(world.node(1), &["counters", "-o", "json"])?;
    let counters: Value = serde_json::from_str(&text)?;
    let mut events = counters["events"].as_array().into_iter().flatten();
    let event = events.find(|event| event["reason"] == reason);
    event.with_context(|| format!("no such reason: {text}"))?["count"].as_u64().context("a count")
}

fn table(family: Family) -> (&'static str, &'static str) {
    if family == Family::V4 { ("ip", "ip") } else { ("ip6", "ip6") }
}

/// Rules of kube-proxy's shape on node1, and connections that they translate.
fn translated(world: &World) -> Result<Vec<Client>> {
    for family in Family::BOTH {
        let ((table, ip), to, backend) = (table(family), vip(family, 1), world.pod("b2").at(family, SERVED));
        world.node(1).place.namespace.nft(&format!(
            "table {table} other-proxy {{\n chain services {{\n type nat hook prerouting priority dstnat;\n \
             {ip} daddr {to} tcp dport {PORT} dnat to {backend}\n }}\n}}\n"
        ))?;
    }
    Family::BOTH.map(|family| hold(world, family)).into_iter().collect()
}

/// The other one serves nobody any more; what stays is what the kernel tracks, as long as there is a rule that wants it tracked.
fn ends(world: &World) -> Result<()> {
    for family in Family::BOTH {
        let ((table, ip), other) = (table(family), vip(family, 99));
        world.node(1).place.namespace.nft(&format!(
            "flush chain {table} other-proxy services\n\
             add rule {table} other-proxy services {ip} daddr {other} tcp dport {PORT} dnat to {other}\n"
        ))?;
    }
    Ok(())
}

/// The kernel remembers closed ones for two minutes.
fn forget(world: &World) -> Result<()> {
    for (family, name) in [(Family::V4, "ipv4"), (Family::V6, "ipv6")] {
        let to = vip(family, 1).to_string();
        world.node(1).place.namespace.output("conntrack", &["-D", "-f", name, "-p", "tcp", "--orig-dst", &to])?;
    }
    Ok(())
}

fn taken_over(world: &mut World) -> Result<()> {
    let held = translated(world)?;
    world.start_agents(&AgentOptions::new(SocketLb::Node))?;
    world.settle()?;
    ends(world)?;
    // Looked for at once, and again after a second.
    thread::sleep(Duration::from_secs(4));
    ensure!(!world.node(1).is_alone()? && !is_said(world)?, "connections of another proxy were not seen");
    for held in held {
        let report: hold::Report = held.finish(PATIENCE)?;
        ensure!(report.broken.is_empty() && report.wrong.is_empty() && report.rounds > 20, "{report:?}");
    }
    ensure!(resets(world)? == 0, "somebody was reset");
    forget(world)?;
    world.wait_until_alone(1)?;
    ensure!(is_said(world)?, "status does not say that connections are reset now");
    Ok(())
}

/// An earlier run has found out that nobody else translates. Meanwhile there is a link that it did not know, as that of a new pod, and
/// somebody else has served it.
fn found_again(world: &mut World) -> Result<()> {
    world.wait_until_alone(1)?;
    let before = resets(world)?;
    world.kill_agent(1)?;
    let links = world.node(1).bpffs.join("v1/links");
    let pins = fs::read_dir(&links).with_context(|| format!("list {}", links.display()))?;
    // All are listed before the first one goes.
    for link in pins.collect::<io::Result<Vec<_>>>()? {
        if link.file_name().to_string_lossy().starts_with("tcx-") {
            fs::remove_file(link.path())?;
        }
    }
    // The kernel detaches what nobody holds any more a moment later.
    thread::sleep(Duration::from_secs(1));
    let held = translated(world)?;
    world.start_agent(1, &AgentOptions::new(SocketLb::Node))?;
    world.node(1).wait_ready(PATIENCE)?;
    world.settle()?;
    ends(world)?;
    thread::sleep(Duration::from_secs(4));
    for held in held {
        let report: hold::Report = held.finish(PATIENCE)?;
        let whole = report.broken.is_empty() && report.wrong.is_empty() && report.rounds > 20;
        ensure!(whole, "{report:?}, {} resets\n{}", resets(world)? - before, world.node(1).agent_log());
    }
    ensure!(resets(world)? == before, "somebody was reset");
    forget(world)?;
    world.wait_until_alone(1)
}

/// As if other connections had taken both halves' place.
fn reset(world: &mut World, family: Family) -> Result<()> {
    if world.node(1).status().is_err() {
        world.start_agents(&AgentOptions::new(SocketLb::Node))?;
    }
    world.wait_until_alone(1)?;
    let before = resets(world)?;
    let held = hold(world, family)?;
    thread::sleep(Duration::from_millis(500));
    let name = if family == Family::V4 { "established_v4" } else { "established_v6" };
    let removed = world.node(1).clear_map(name)?;
    ensure!(removed >= 2, "{removed} entries for a connection and its answers");
    thread::sleep(Duration::from_secs(1));
    let report: hold::Report = held.finish(PATIENCE)?;
    ensure!(report.broken.iter().any(|how| how.contains("os error 104")), "not reset within {AT_ONCE} ms: {report:?}");
    ensure!(resets(world)? > before, "not counted");
    let leaks = world.leaks()?;
    ensure!(leaks.is_empty(), "{leaks:?}");
    // The next one is served.
    let report: hold::Report = hold(world, family)?.finish(PATIENCE)?;
    ensure!(report.broken.is_empty(), "{report:?}");
    Ok(())
}

/// Where the address may be somebody else's, once nobody has answered for some seconds; what the node would send back where it came from, at
/// once. The node's own stack answers for its ports.
fn reset_outside(world: &mut World, xdp: &str) -> Result<()> {
    if world.node(1).status().is_ok() {
        world.kill_agent(1)?;
    }
    let extra = ["--xdp", xdp].map(str::to_owned).to_vec();
    world.start_agent(1, &AgentOptions { extra, ..AgentOptions::new(SocketLb::Node) })?;
    world.node(1).wait_ready(PATIENCE)?;
    let status = world.cli(world.node(1), &["status"])?;
    ensure!(status.contains("xdp/") == (xdp != "off"), "XDP {xdp}: {status}");
    world.wait_until_alone(1)?;
    let before = resets(world)?;
    let mut all = Vec::new();
    for family in Family::BOTH {
        let (balancer, external_ip) = (external(family, 1), external(family, 2));
        let node = world.node(1).place.at(family, NODE_PORT);
        for (from, to) in [
            (world.outside(), SocketAddr::new(balancer, PORT)),
            (world.outside(), SocketAddr::new(external_ip, PORT)),
            (world.pod("a1"), SocketAddr::new(balancer, PORT)),
            (world.pod("a1"), SocketAddr::new(external_ip, PORT)),
            (world.outside(), node),
            (world.pod("a1"), node),
        ] {
            // Pods are not known to have meant this node; the stack answers them at once, too.
            let patience = if from.name == "a1" && to != node { IN_VAIN } else { AT_ONCE };
            all.push((format!("{} -> {to}", from.name), hold_to(from, to, patience, "b2", world)?));
        }
    }
    thread::sleep(Duration::from_millis(500));
    for name in ["established_v4", "established_v6"] {
        let removed = world.node(1).clear_map(name)?;
        ensure!(removed >= 12, "{removed} entries in {name}");
    }
    // Twice what is waited for: what is said again is, after longer and longer pauses.
    thread::sleep(Duration::from_secs(12));
    for (what, held) in all {
        let report: hold::Report = held.finish(PATIENCE)?;
        ensure!(report.broken.iter().any(|how| how.contains("os error 104")), "{what}: not reset: {report:?}");
    }
    // At NodePorts the stack did it.
    let count = resets(world)? - before;
    ensure!((8..=16).contains(&count), "{count} resets of ours for 8 connections");
    for family in Family::BOTH {
        let to = SocketAddr::new(external(family, 1), PORT);
        let again = hold_to(world.outside(), to, AT_ONCE, "b2", world)?;
        let report: hold::Report = again.finish(PATIENCE)?;
        ensure!(report.broken.is_empty() && report.wrong.is_empty(), "{report:?}");
    }
    Ok(())
}

/// Where the uplink is in the pods' bridge, or pods are each other's neighbours, what leads back there may be for any of them.
fn reset_at_a_bridge(world: &mut World) -> Result<()> {
    world.wait_until_alone(1)?;
    let before = resets(world)?;
    let mut all = Vec::new();
    for to in Family::BOTH.map(|family| SocketAddr::new(external(family, 1), PORT)) {
        for from in [world.outside(), world.pod("a1")] {
            // An uplink of its own turns back.
            let patience = if world.topology == Topology::Uplink || from.name == "a1" { IN_VAIN } else { AT_ONCE };
            all.push((format!("{} -> {to}", from.name), hold_to(from, to, patience, "b2", world)?));
        }
    }
    thread::sleep(Duration::from_millis(500));
    for name in ["established_v4", "established_v6"] {
        let removed = world.node(1).clear_map(name)?;
        ensure!(removed >= 4, "{removed} entries in {name}");
    }
    thread::sleep(Duration::from_secs(12));
    for (what, held) in all {
        let report: hold::Report = held.finish(PATIENCE)?;
        ensure!(report.broken.iter().any(|how| how.contains("os error 104")), "{what}: not reset: {report:?}");
    }
    let count = resets(world)? - before;
    ensure!((4..=8).contains(&count), "{count} resets of ours for 4 connections");
    Ok(())
}

/// Further addresses of the host outside, with a server of its own that is reached from pods and reaches them.
fn outside_serves(world: &World) -> Result<([IpAddr; 2], Client)> {
    let (outside, node) = (world.outside(), &world.node(1).place);
    let [v4, v6] = ["192.168.77.101", "fd00:77::101"];
    outside.namespace.ip(&format!(
        "addr add {v4}/24 dev eth0\n\
         addr add {v6}/64 dev eth0 nodad\n\
         route replace 10.244.1.0/24 via {}\n\
         route replace fd00:244:1::/64 via {}\n",
        node.v4, node.v6
    ))?;
    let addresses = [v4, v6].map(|address| format!("--address={address}"));
    let args =
        [&["serve".to_owned(), "--name=outside".to_owned(), format!("--port={SERVED}")], &addresses[..]].concat();
    let mut server = outside.start(&world.programs().testpod, &args)?;
    server.wait_for_line("serving", PATIENCE)?;
    Ok(([v4.parse()?, v6.parse()?], server))
}

/// An address becomes the external IP of a Service: what talks to who has it, already and directly, has no entries, and is answered.
fn from_before(world: &mut World) -> Result<()> {
    world.wait_until_alone(1)?;
    let (before, left) = (resets(world)?, count(world, "not_a_syn")?);
    let pod = |name: &'static str| (name, Family::BOTH.map(|family| world.pod(name).ip(family)));
    let mut talks = match world.topology {
        Topology::Routed => vec![("a1", pod("b2"))],
        _ => vec![("a1", pod("b1"))],
    };
    let mut _server = None;
    if world.topology == Topology::Uplink {
        let (addresses, server) = outside_serves(world)?;
        talks.extend([("a1", ("outside", addresses)), ("outside", pod("b1"))]);
        _server = Some(server);
    }
    let mut all = Vec::new();
    let mut ips = BTreeSet::new();
    for (from, (name, addresses)) in talks {
        let place = world.place(from).with_context(|| format!("no {from}"))?;
        for ip in addresses {
            let held = hold_to(place, SocketAddr::new(ip, SERVED), IN_VAIN, name, world)?;
            all.push((format!("{from} -> {name}, {ip}"), held));
            ips.insert(ip);
        }
    }
    let service = objects::service("taken")
        .cluster_ips(&Family::BOTH.map(|family| vip(family, 2)))
        .port("", "TCP", SERVED)
        .external_ips(&ips.iter().copied().collect::<Vec<_>>())
        .json();
    let slice = |family| objects::slice("taken", family).port("", "TCP", SERVED).endpoint(world.pod("c2")).json();
    let slices = Family::BOTH.map(slice);
    world.apply(&[&[service.clone()][..], &slices].concat())?;
    let shown = world.cli(world.node(1), &["services", "-o", "json"])?;
    let missing: Vec<_> = ips.iter().filter(|ip| !shown.contains(&format!("\"{ip}\""))).collect();
    ensure!(missing.is_empty(), "not in force: {missing:?}");
    // A pod's neighbour is reached past the node: who asks anew there gets no answer from another pod.
    if world.topology == Topology::Routed {
        for &ip in &ips {
            let to = SocketAddr::new(ip, SERVED);
            let report = world.ask(world.pod("a1"), &Ask::new(to, Transport::Tcp).times(3))?;
            ensure!(report.backends().keys().eq(["c2"]), "the external IP is not in force: {report:?}");
        }
    }
    thread::sleep(Duration::from_secs(8));
    let connections = all.len() as u64;
    for (what, held) in all {
        let report: hold::Report = held.finish(PATIENCE)?;
        ensure!(report.broken.is_empty() && report.wrong.is_empty() && report.rounds > 40, "{what}: {report:?}");
    }
    ensure!(resets(world)? == before, "somebody was reset");
    // The programs have seen each of them.
    let seen = count(world, "not_a_syn")? - left;
    ensure!(seen > 40 * connections, "{seen} packets of {connections} connections");
    world.remove(&service)?;
    slices.iter().try_for_each(|slice| world.remove(slice))?;
    world.settle()
}

/// Two tables' worth of connections from outside, each closed at once, beside some that say nothing.
fn outlives(world: &mut World) -> Result<()> {
    const ENTRIES: u64 = 16_384;
    /// New connections a second in each family: a thread that wakes up two seconds late still finds room.
    const RATE: u64 = 300;
    /// For how long the silent ones say nothing.
    const SILENCE: Duration = Duration::from_secs(45);
    world.kill_agent(1)?;
    let extra = ["--map-connections", &ENTRIES.to_string()].map(str::to_owned).to_vec();
    world.start_agent(1, &AgentOptions { extra, ..AgentOptions::new(SocketLb::Node) })?;
    world.node(1).wait_ready(PATIENCE)?;
    world.wait_until_alone(1)?;
    let swept = || over(world);
    let (before, resets_before, repaired) = (swept()?, resets(world)?, count(world, "pair_repaired")?);
    let (interval, timeout) = (format!("--interval={}", SILENCE.as_millis()), format!("--timeout={AT_ONCE}"));
    let (mut silent, mut storms) = (Vec::new(), Vec::new());
    for family in Family::BOTH {
        let node = world.node(1).place.at(family, NODE_PORT);
        let balancer = SocketAddr::new(external(family, 1), PORT);
        let own = SocketAddr::new(vip(family, 1), PORT);
        for (from, to) in [(world.outside(), node), (world.outside(), balancer), (world.pod("a1"), own)] {
            let args = ["hold", &to.to_string(), "--connections=3", &interval, &timeout, "--expect=b2"];
            let mut held = from.start(&world.programs().testpod, &args.map(str::to_owned))?;
            held.wait_for_line("ready", PATIENCE)?;
            silent.push((format!("{} -> {to}", from.name), held));
        }
    }
    for family in Family::BOTH {
        let to = world.node(1).place.at(family, NODE_PORT).to_string();
        // Four entries each.
        let (rate, seconds) = (format!("--rate={RATE}"), format!("--seconds={}", 2 * ENTRIES / 4 / RATE + 3));
        let args = ["storm", &to, &rate, &seconds, "--workers=16"];
        let mut storm = world.outside().start(&world.programs().testpod, &args.map(str::to_owned))?;
        storm.wait_for_line("ready", PATIENCE)?;
        storms.push(storm);
    }
    for storm in storms {
        let report: storm::Report = storm.ends(SILENCE)?;
        ensure!(report.failures.is_empty() && report.answered * 4 > 2 * ENTRIES * 9 / 10, "{report:?}");
    }
    for (what, held) in silent {
        let report: hold::Report = held.finish(SILENCE + PATIENCE)?;
        let whole = report.broken.is_empty() && report.wrong.is_empty() && report.answers == 3 * report.rounds;
        ensure!(whole && (1..=2).contains(&report.rounds), "{what}: {report:?}");
    }
    ensure!(swept()? > before, "nothing was taken out: the tables were not full");
    let (resets, again) = (resets(world)? - resets_before, count(world, "pair_repaired")? - repaired);
    ensure!(resets == 0 && again == 0, "{resets} connections were reset, {again} halves were put back");
    Ok(())
}

/// As many silent connections as nearly fill a table, and more that want to come in: they are dropped until somebody closes.
fn full(world: &mut World) -> Result<()> {
    const ENTRIES: u32 = 2048;
    /// Half of the entries, less what is kept back on a node of few CPUs.
    const CONNECTIONS: usize = 300;
    world.kill_agent(1)?;
    let extra = ["--map-connections", &ENTRIES.to_string()].map(str::to_owned).to_vec();
    world.start_agent(1, &AgentOptions { extra, ..AgentOptions::new(SocketLb::Node) })?;
    world.node(1).wait_ready(PATIENCE)?;
    world.wait_until_alone(1)?;
    let (pod, testpod) = (world.pod("a1"), &world.programs().testpod);
    let (resets_before, full_before) = (resets(world)?, count(world, "table_full")?);
    for family in Family::BOTH {
        let to = SocketAddr::new(vip(family, 1), PORT);
        let hold = |extra: &[&str]| {
            let args =
                ["hold", &to.to_string(), &format!("--connections={CONNECTIONS}"), "--expect=b2"].map(str::to_owned);
            let extra = extra.iter().map(|&arg| arg.to_owned());
            pod.start(testpod, &args.into_iter().chain(extra).collect::<Vec<_>>())
        };
        let silence = Duration::from_secs(12);
        let mut silent = hold(&[&format!("--interval={}", silence.as_millis()), "--timeout=6000"])?;
        silent.wait_for_line("ready", PATIENCE)?;
        // The thread looks once a second.
        thread::sleep(Duration::from_secs(2));
        let mut others = Vec::new();
        let dropped = loop {
            ensure!(others.len() < 8, "{to}: {} connections came in", CONNECTIONS * (1 + others.len()));
            let mut more = hold(&["--interval=60000", "--timeout=1500"])?;
            let came = more.wait_for_line("ready", PATIENCE);
            thread::sleep(Duration::from_secs(2));
            match came {
                Ok(()) => others.push(more),
                Err(error) => break error,
            }
        };
        ensure!(format!("{dropped:#}").contains("timed out"), "{to}: {dropped:#}");
        ensure!(!others.is_empty(), "{to}: there was no room at all");
        let report: hold::Report = silent.finish(silence + PATIENCE)?;
        let whole = report.broken.is_empty() && report.wrong.is_empty();
        ensure!(whole && report.answers > 0, "{to}: {report:?}");
        // Who closes makes room.
        drop(others);
        within(PATIENCE, || {
            let mut fresh = hold(&["--interval=100", "--timeout=1500"])?;
            fresh.wait_for_line("ready", PATIENCE)?;
            let report: hold::Report = fresh.finish(PATIENCE)?;
            ensure!(report.broken.is_empty(), "{to}: {report:?}");
            Ok(())
        })?;
    }
    let (resets, full) = (resets(world)? - resets_before, count(world, "table_full")? - full_before);
    ensure!(resets == 0 && full > 0, "{resets} connections were reset, {full} were dropped");
    Ok(())
}

/// Pairs of entries that were taken out because their flow is over.
fn over(world: &World) -> Result<u64> {
    let (_, metrics) = world.node(1).http(10_249, "/metrics")?;
    let mut values = metrics.lines().filter_map(|line| line.strip_prefix("proxy_agent_ended_total{object=\"over\"} "));
    values.next().with_context(|| metrics.clone())?.parse().context("a count")
}

/// What an agent asks the kernel's maps while nothing happens: how many flows have come, and nothing of the tables.
fn idles(world: &mut World) -> Result<()> {
    const SECONDS: u64 = 10;
    world.kill_agent(1)?;
    world.start_agent(1, &AgentOptions { traced: true, ..AgentOptions::new(SocketLb::Node) })?;
    world.node(1).wait_ready(PATIENCE)?;
    world.wait_until_alone(1)?;
    world.settle()?;
    // The second look for flows of backends that are gone, and whatever else a start brings.
    thread::sleep(Duration::from_secs(5));
    let before = world.node(1).bpf_calls()?.len();
    thread::sleep(Duration::from_secs(SECONDS));
    let calls = world.node(1).bpf_calls()?.split_off(before);
    let look = ("BPF_MAP_LOOKUP_ELEM", Some("confirmed"));
    let looks = |call: &&trace::Call| (call.command.as_str(), call.pin.as_deref()) == look;
    let others: Vec<_> = calls.iter().filter(|call| !looks(call)).collect();
    ensure!(others.is_empty(), "{others:?}");
    ensure!((SECONDS / 2..=SECONDS + 1).contains(&(calls.len() as u64)), "{} looks in {SECONDS} s", calls.len());
    Ok(())
}
