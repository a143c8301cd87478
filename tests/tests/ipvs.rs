//! Services by the kernel's own load balancer: the cases of ClusterIPs and of what leads in from outside, and what is IPVS' alone.
//! A kernel without IPVS skips it; `cargo xtask vm` has one with.

use std::{fs, net::SocketAddr, process::ExitCode, thread, time::Duration};

use anyhow::{Context, Result, ensure};
use proxy_tests::{
    cases::{self, Ground, external, services},
    pod::{hold as held, socket::Transport, storm},
    suite::Suite,
    world::{
        AgentOptions, Ask, Client, Fallback, Family, Node, Programs, SocketLb, Spec, Topology, World,
        external as outer, objects, patience, vip, within,
    },
};
use serde_json::Value;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Part {
    ClusterIp,
    External,
    Own,
}

fn main() -> ExitCode {
    if let Some(reason) = World::without_ipvs() {
        let mut suite = Suite::new("ipvs");
        suite.skip("ipvs", reason);
        return suite.finish();
    }
    let shapes = [("cluster_ip", Part::ClusterIp), ("external", Part::External), ("own", Part::Own)];
    let shapes = shapes.map(|(name, part)| (name.to_owned(), part));
    Suite::in_worlds("ipvs", shapes, prepare, |suite, group, part, world| match part {
        Part::ClusterIp => cases::by_ipvs(suite, group, &ground(world)),
        Part::External => external::all(suite, group, &ground(world)),
        Part::Own => own(suite, group, world),
    })
}

fn ground(world: &World) -> Ground<'_> {
    Ground { world, socket_lb: SocketLb::Node, large_segments: true, fallback: Some(Fallback::Ipvs) }
}

fn prepare(programs: Programs, part: &Part) -> Result<World> {
    let spec = Spec { rp_filter: true, ..Spec::two_nodes(Topology::Routed) };
    let objects = match part {
        Part::ClusterIp => services::objects,
        Part::External => external::objects,
        Part::Own => objects::nodes,
    };
    World::serving(&spec, programs, &options(), objects)
}

fn options() -> AgentOptions {
    let mut options = AgentOptions::by(Fallback::Ipvs);
    options.extra.extend(["--sync-period".to_owned(), "2s".to_owned()]);
    options
}

fn own(suite: &mut Suite, group: &str, world: &mut World) {
    suite.case(&format!("{group}/frontends are virtual servers, and others read them alike"), || shown(world));
    suite.case(&format!("{group}/A95 A96: a client stays where it was, for a time"), || affinity(world));
    suite.case(&format!("{group}/A104: connections to an endpoint that leaves go on"), || graceful(world));
    suite.case(&format!("{group}/A103: datagrams to an endpoint that is gone go to another"), || datagrams(world));
    suite.case(&format!("{group}/A135: a restart is seen by nobody"), || restart(world));
    for (what, change) in ALTERATIONS {
        suite.case(&format!("{group}/put back: {what}"), || put_back(world, change));
    }
    suite.case(&format!("{group}/what is not served as asked says so"), || limits(world));
    suite.case(&format!("{group}/a load balancer's address that is the node's stays the node's"), || {
        nodes_address(world)
    });
    for (other, first) in OTHERS.into_iter().zip((12_000..).step_by(4_000)) {
        let name = other.map_or("eBPF", Fallback::name);
        suite.case(&format!("{group}/from IPVS to {name} and back"), || moves(world, other, first));
    }
    suite.case(&format!("{group}/auto takes IPVS where nothing else can run"), || chosen_by_auto(world));
    suite.case(&format!("{group}/cleanup takes away what is ours and nothing else"), || cleans_up(world));
    suite.case(&format!("{group}/settings that cannot be written are found before anything is"), || settings(world));
    suite.case(&format!("{group}/cleanup --kube-proxy takes away what its IPVS mode leaves and nothing else"), || {
        cleans_up_after_kube_proxy(world)
    });
}

fn node_port(number: u8) -> u16 {
    30_000 + u16::from(number)
}

fn service(number: u8) -> objects::Service {
    objects::service(&format!("web-{number}"))
        .cluster_ips(&Family::BOTH.map(|family| vip(family, number)))
        .port("web", "TCP", 80)
        .node_port(node_port(number))
        .port("dns", "UDP", 53)
        .load_balancer(&Family::BOTH.map(|family| outer(family, number)))
}

fn slices(world: &World, number: u8, pods: &[&str]) -> Vec<Value> {
    let slice = |family| {
        objects::slice(&format!("web-{number}"), family)
            .port("web", "TCP", 8080)
            .port("dns", "UDP", 8080)
            .endpoints(pods.iter().map(|pod| world.pod(pod)))
            .json()
    };
    Family::BOTH.map(slice).to_vec()
}

fn install(world: &mut World, number: u8, service: &objects::Service, pods: &[&str]) -> Result<()> {
    let objects = [vec![service.clone().json()], slices(world, number, pods)].concat();
    world.apply(&objects)
}

fn answers(world: &World, number: u8) -> Result<()> {
    for from in [world.pod("a1"), &world.node(1).place, world.outside()] {
        for family in Family::BOTH {
            for (port, transport) in [(80, Transport::Tcp), (53, Transport::Udp)] {
                let to = SocketAddr::new(vip(family, number), port);
                let report = world.ask(from, &Ask::new(to, transport).times(2).timeout(3000))?;
                ensure!(report.errors().is_empty(), "{} to {to} {transport}: {:?}", from.name, report.errors());
            }
        }
    }
    Ok(())
}

fn eventually(seconds: u64, check: impl Fn() -> Result<()>) -> Result<()> {
    within(patience(seconds), check)
}

fn output(node: &Node, words: &str) -> Result<String> {
    let mut words = words.split(' ');
    let program = words.next().context("no command")?;
    node.place.namespace.output(program, &words.collect::<Vec<_>>())
}

/// As `ipvsadm` would make them again.
fn servers(node: &Node) -> Result<Vec<String>> {
    let mut lines: Vec<String> = output(node, "ipvsadm -Sn")?.lines().map(|line| line.trim().to_owned()).collect();
    lines.sort();
    Ok(lines)
}

/// Those who are sent new connections: what is leaving goes when its last connection is forgotten, two minutes after it ended.
fn chosen(node: &Node) -> Result<Vec<String>> {
    let of = |line: &str| line.split(' ').skip(1).take(2).map(str::to_owned).collect::<Vec<_>>();
    let mut lines = servers(node)?;
    lines.retain(|line| !line.ends_with(" -w 0"));
    let in_use: Vec<Vec<String>> = lines.iter().filter(|line| line.starts_with("-a ")).map(|line| of(line)).collect();
    lines.retain(|line| in_use.contains(&of(line)));
    Ok(lines)
}

fn shown(world: &mut World) -> Result<()> {
    install(world, 1, &service(1).external_local(), &["b1", "b2"])?;
    let node = world.node(1);
    let shown = servers(node)?;
    let (b1, b2) = (world.pod("b1"), world.pod("b2"));
    let [vip4, lb4] = [vip(Family::V4, 1), outer(Family::V4, 1)];
    for line in [
        format!("-A -t {vip4}:80 -s rr"),
        format!("-a -t {vip4}:80 -r {}:8080 -m -w 1", b1.v4),
        format!("-a -t {vip4}:80 -r {}:8080 -m -w 1", b2.v4),
        format!("-A -u [{}]:53 -s rr", vip(Family::V6, 1)),
        format!("-a -t {lb4}:80 -r {}:8080 -m -w 1", b1.v4),
        format!("-a -t {}:{} -r {}:8080 -m -w 1", node.place.v4, node_port(1), b1.v4),
    ] {
        ensure!(shown.contains(&line), "no {line:?} in {shown:#?}");
    }
    let remote = format!("-a -t {lb4}:80 -r {}:8080", b2.v4);
    ensure!(!shown.iter().any(|line| line.starts_with(&remote)), "the outside is local's: {shown:#?}");
    ensure!(shown.iter().any(|line| line.starts_with("-a -f ") && line.contains(&b2.v4.to_string())), "{shown:#?}");
    let held = output(node, "ip -o addr show dev proxy-ipvs0")?;
    ensure!(held.contains(&format!("{lb4}/32")) && !held.contains(&format!("{}/", node.place.v4)), "{held}");
    answers(world, 1)?;
    none_of_the_nodes(world, 1)?;
    let status = world.cli(node, &["status"])?;
    ensure!(status.contains("ipvs") && status.contains("proxy-ipvs0"), "{status}");
    Ok(())
}

/// The device's addresses are nobody's sockets'.
fn none_of_the_nodes(world: &World, number: u8) -> Result<()> {
    for family in Family::BOTH {
        for addr in [vip(family, number), outer(family, number)] {
            let to = SocketAddr::new(addr, 10_256);
            let report = world.ask(world.outside(), &Ask::new(to, Transport::Tcp).timeout(3000))?;
            ensure!(report.errors().keys().eq(["ECONNREFUSED"]), "{to}: {report:?}");
        }
    }
    Ok(())
}

fn affinity(world: &mut World) -> Result<()> {
    let pods = ["b1", "c1", "b2", "c2"];
    install(world, 2, &service(2).affinity(Some(30)), &pods)?;
    let mut all = Vec::new();
    for from in ["a1", "a2", "node1", "outside"] {
        for family in Family::BOTH {
            let from = world.place(from).context("no place")?;
            let ask = Ask::new((vip(family, 2), 80).into(), Transport::Tcp).times(6).timeout(3000);
            let report = world.ask(from, &ask)?;
            ensure!(report.errors().is_empty(), "{} {family}: {:?}", from.name, report.errors());
            let seen: Vec<String> = report.backends().into_keys().collect();
            ensure!(seen.len() == 1, "{} {family}: {seen:?}", from.name);
            all.extend(seen);
        }
    }
    all.sort();
    all.dedup();
    ensure!(all.len() > 1, "everybody is sent to {all:?}");
    // Endpoints that leave keep their connections, and have no part in who is new: nobody's hash leads to them.
    let shown = servers(world.node(1))?;
    let by_hash = format!("-A -t {}:80 -s mh ", vip(Family::V4, 2));
    let passes_by = |line: &String| line.starts_with(&by_hash) && line.contains("mh-fallback");
    ensure!(shown.iter().any(passes_by), "no {by_hash:?} with mh-fallback in {shown:#?}");
    let held = held_connections(world, 2)?;
    install(world, 2, &service(2).affinity(Some(30)), &pods[..1])?;
    for from in ["a1", "a2", "node1", "outside"] {
        for family in Family::BOTH {
            let from = world.place(from).context("no place")?;
            let report = world.ask(from, &Ask::new((vip(family, 2), 80).into(), Transport::Tcp).timeout(3000))?;
            ensure!(report.backends().keys().eq(&pods[..1]), "{} {family}: {report:?}", from.name);
        }
    }
    unbroken(held)?;
    install(world, 2, &service(2).affinity(None), &pods)?;
    let report = world.ask(world.pod("a1"), &Ask::new((vip(Family::V4, 2), 80).into(), Transport::Tcp).times(8))?;
    ensure!(report.backends().len() > 1, "{:?}", report.backends());
    Ok(())
}

fn start(world: &World, from: &str, args: &[&str]) -> Result<Client> {
    let place = world.place(from).context("no such place")?;
    let args: Vec<String> = args.iter().map(|&arg| arg.to_owned()).collect();
    let mut client = place.start(&world.programs().testpod, &args)?;
    client.wait_for_line("ready", patience(5))?;
    Ok(client)
}

fn held_connections(world: &World, number: u8) -> Result<Vec<Client>> {
    hold(world, number, &["--connections=4", "--interval=50"])
}

fn hold(world: &World, number: u8, how: &[&str]) -> Result<Vec<Client>> {
    let mut held = Vec::new();
    for (from, family) in [
        ("a1", Family::V4),
        ("node1", Family::V4),
        ("node1", Family::V6),
        ("outside", Family::V4),
        ("outside", Family::V6),
    ] {
        let to = SocketAddr::new(vip(family, number), 80).to_string();
        held.push(start(world, from, &[&["hold", to.as_str()], how].concat())?);
    }
    Ok(held)
}

fn unbroken(held: Vec<Client>) -> Result<()> {
    for client in held {
        let report: held::Report = client.finish(patience(5))?;
        ensure!(report.broken.is_empty() && report.wrong.is_empty(), "{report:?}");
    }
    Ok(())
}

fn graceful(world: &mut World) -> Result<()> {
    install(world, 3, &service(3), &["b1", "b2"])?;
    let held = held_connections(world, 3)?;
    install(world, 3, &service(3), &["b2"])?;
    let (b1, vip4) = (world.pod("b1").v4, vip(Family::V4, 3));
    let leaving = format!("-a -t {vip4}:80 -r {b1}:8080 -m -w 0");
    let shown = servers(world.node(1))?;
    ensure!(shown.contains(&leaving), "no {leaving:?} in {shown:#?}");
    let report = world.ask(world.pod("a1"), &Ask::new((vip4, 80).into(), Transport::Tcp).times(6))?;
    ensure!(report.backends().keys().eq(["b2"]), "{:?}", report.backends());
    // The Service goes, its connections do not.
    world.remove(&service(3).json())?;
    world.settle()?;
    let shown = servers(world.node(1))?;
    ensure!(shown.contains(&leaving), "no {leaving:?} in {shown:#?}");
    let report = world.ask(world.pod("a1"), &Ask::new((vip4, 80).into(), Transport::Tcp).timeout(3000))?;
    ensure!(report.errors().keys().eq(["ECONNREFUSED"]), "{report:?}");
    unbroken(held)?;
    // Nobody was connected over IPv6's other address.
    Ok(())
}

fn datagrams(world: &mut World) -> Result<()> {
    install(world, 4, &service(4), &["b1"])?;
    for family in Family::BOTH {
        let to = SocketAddr::new(vip(family, 4), 53);
        let ask = Ask::new(to, Transport::Udp).times(1).timeout(3000);
        let report = world.ask(world.pod("a1"), &ask)?;
        ensure!(report.backends().keys().eq(["b1"]), "{report:?}");
    }
    install(world, 4, &service(4), &["b2"])?;
    let shown = servers(world.node(1))?;
    let gone = format!("-a -u {}:53 -r {}:8080", vip(Family::V4, 4), world.pod("b1").v4);
    ensure!(!shown.iter().any(|line| line.starts_with(&gone)), "{shown:#?}");
    answers(world, 4)
}

fn restart(world: &mut World) -> Result<()> {
    install(world, 5, &service(5), &["b1", "b2"])?;
    let held = held_connections(world, 5)?;
    let addresses = Family::BOTH.map(|family| [vip(family, 5), outer(family, 5)]).concat();
    // Of others some may be leaving.
    let servers = |world: &World| -> Result<Vec<String>> {
        let mut lines = servers(world.node(1))?;
        lines.retain(|line| addresses.iter().any(|addr| line.contains(&SocketAddr::new(*addr, 80).to_string())));
        Ok(lines)
    };
    let before = servers(world)?;
    ensure!(before.len() == 12, "{before:#?}");
    world.kill_agent(1)?;
    answers(world, 5)?;
    world.start_agents(&options())?;
    let after = servers(world)?;
    ensure!(after == before, "{before:#?} became {after:#?}");
    answers(world, 5)?;
    unbroken(held)
}

const ALTERATIONS: [(&str, &str); 6] = [
    ("all servers are cleared", "ipvsadm -C"),
    ("the device is gone", "ip link del proxy-ipvs0"),
    ("an address is gone", "ip addr flush dev proxy-ipvs0"),
    ("all rules are flushed", "nft flush ruleset"),
    ("connection tracking is switched off", "sysctl -w net.ipv4.vs.conntrack=0"),
    ("a server of somebody else's stays", "ipvsadm -A -t 198.51.100.1:80 -s rr"),
];

fn put_back(world: &mut World, change: &str) -> Result<()> {
    install(world, 6, &service(6), &["b1", "b2"])?;
    answers(world, 6)?;
    let node = world.node(1);
    let before = chosen(node)?;
    ensure!(before.len() > 20, "{before:#?}");
    let repaired = || -> Result<u64> { node.status()?["sync"]["driftRepaired"].as_u64().context("no driftRepaired") };
    let counted = repaired()?;
    output(node, change)?;
    // Nobody is behind it.
    let foreign = change.contains("198.51.100.1");
    eventually(10, || {
        let conntrack = output(node, "cat /proc/sys/net/ipv4/vs/conntrack")?;
        ensure!(conntrack.trim() == "1", "not set");
        let ours = chosen(node)?;
        ensure!(ours == before, "{before:#?} became {ours:#?}");
        answers(world, 6)?;
        ensure!(foreign || repaired()? > counted, "{} was counted, as before", repaired()?);
        Ok(())
    })?;
    if foreign {
        thread::sleep(Duration::from_secs(3));
        ensure!(servers(node)?.iter().any(|line| line.contains("198.51.100.1")), "it is gone");
        output(node, "ipvsadm -D -t 198.51.100.1:80")?;
    }
    Ok(())
}

fn limits(world: &mut World) -> Result<()> {
    install(world, 7, &service(7).external_local().affinity(Some(60)), &["b1", "b2"])?;
    answers(world, 7)?;
    let shown: Value = serde_json::from_str(&world.cli(world.node(1), &["services", "-o", "json"])?)?;
    let rows: Vec<&Value> =
        shown["items"].as_array().context("no items")?.iter().filter(|row| row["name"] == "web-7").collect();
    ensure!(rows.len() > 6, "{rows:#?}");
    for row in &rows {
        let reason = row["reason"].to_string();
        let loopback = row["frontend"]["address"] == "127.0.0.1";
        let wanted = if loopback { "no NodePorts on" } else { "each address's own" };
        ensure!(row["state"] == "Programmed" && reason.contains(wanted), "{row}");
    }
    ensure!(rows.iter().any(|row| row["reason"].to_string().contains("by a hash")), "{rows:#?}");
    Ok(())
}

/// What listens at it is reached, and the Service is served, too.
fn nodes_address(world: &mut World) -> Result<()> {
    let addr = world.node(1).place.v4;
    let service = service(9).load_balancer(&[addr.into()]);
    install(world, 9, &service, &["b1", "b2"])?;
    let node = world.node(1);
    let held = output(node, "ip -o addr show dev proxy-ipvs0")?;
    ensure!(!held.contains(&format!("{addr}/")), "{held}");
    let guarded = output(node, "nft list set ip proxy-agent-ipvs guards")?;
    ensure!(!guarded.contains(&format!("{addr},")) && !guarded.contains(&format!("{addr} ")), "{guarded}");
    for (from, port) in [(world.outside(), 80), (world.pod("a1"), 80)] {
        let report = world.ask(from, &Ask::new((addr, port).into(), Transport::Tcp).times(2).timeout(3000))?;
        ensure!(report.errors().is_empty(), "{} to {addr}: {:?}", from.name, report.errors());
    }
    world.remove(&service.json())?;
    world.settle()
}

/// Modes to move to; none: eBPF, per packet.
const OTHERS: [Option<Fallback>; 3] = [Some(Fallback::Nftables), Some(Fallback::IptablesNft), None];

/// New connections find no gap, either way, open ones go on, and once they are over nothing of the former is left. Source ports are those from the
/// first.
fn moves(world: &mut World, other: Option<Fallback>, first: u16) -> Result<()> {
    // An emulated verifier takes its time.
    let ready = |world: &World| world.node(1).wait_ready(patience(if other.is_none() { 120 } else { 30 }));
    world.start_agents(&options())?;
    // Those of earlier cases are waited for, and each is one that lasts until it was silent for so long.
    output(world.node(1), "ipvsadm --set 900 120 3")?;
    install(world, 8, &service(8), &["b1", "b2"])?;
    install(world, 9, &service(9).external_local(), &["b1", "b2"])?;
    // From ports of their own: one that leads to one backend by both modes is told apart by neither.
    let storms = |world: &World, first: u16| -> Result<Vec<(String, Client)>> {
        let from = ["a1", "node1", "outside"].into_iter();
        let mut storms: Vec<(&str, SocketAddr, u16)> =
            from.flat_map(|from| Family::BOTH.map(|family| (from, (vip(family, 8), 80).into(), first))).collect();
        // Whom IPVS finds by a mark.
        let own = world.node(1).place.v4;
        storms.push(("node1", (own, node_port(9)).into(), first + 1_000));
        let storms = storms.into_iter().map(|(from, to, port)| {
            let (to, port) = (to.to_string(), format!("--source-port={port}"));
            let how = ["--expect=b1,b2", "--rate=1", "--seconds=900", "--timeout=20000", &port];
            let client = start(world, from, &[&["storm", to.as_str()][..], &how].concat())?;
            Ok((format!("{from} to {to}"), client))
        });
        storms.collect()
    };
    let calm = |world: &World, storms: Vec<(String, Client)>| -> Result<()> {
        for (what, client) in storms {
            let report: storm::Report = client.finish(patience(10))?;
            let is_calm = report.failures.is_empty() && report.wrong.is_empty() && report.tries > 10;
            ensure!(is_calm, "{what}: {report:?}\n{}", world.node(1).agent_log());
        }
        Ok(())
    };
    let is_over = |world: &World, gone: &str| -> Result<()> {
        eventually(30, || {
            let retiring = &world.node(1).status()?["retiring"];
            ensure!(retiring.as_array().is_some_and(Vec::is_empty), "{retiring}");
            let left = state(world.node(1))?.concat();
            ensure!(!left.contains(gone), "{gone} is in {left}");
            Ok(())
        })
        .with_context(|| format!("{gone} does not go: {}", world.node(1).agent_log()))
    };
    // Little, so that an emulated machine has time for what is looked at.
    let few = ["--connections=2", "--interval=500", "--timeout=10000"];
    let (held, storm) = (hold(world, 8, &few)?, storms(world, first)?);
    world.start_agent(1, &other.map_or_else(|| AgentOptions::new(SocketLb::Node), AgentOptions::by))?;
    ready(world)?;
    eventually(30, || is_retired(world, held.len() as u64 * 2))
        .with_context(|| format!("nothing is retired: {}", world.node(1).agent_log()))?;
    answers(world, 8)?;
    none_of_the_nodes(world, 8)?;
    unbroken(held)?;
    is_over(world, "proxy-agent-ipvs")?;
    let left = (servers(world.node(1))?, output(world.node(1), "ip -o link show")?);
    ensure!(left.0.is_empty() && !left.1.contains("proxy-ipvs0"), "{left:?}");
    answers(world, 8)?;
    calm(world, storm)?;
    let (held, storm) = (hold(world, 8, &few)?, storms(world, first + 2_000)?);
    world.start_agent(1, &options())?;
    world.node(1).wait_ready(patience(30))?;
    // By conntrack they go on without those who began them; by programs they do not.
    let last = if other.is_some() { held } else { unbroken(held).map(|()| Vec::new())? };
    is_over(world, if other == Some(Fallback::Nftables) { "table ip proxy-agent {" } else { "chain PROXY-" })?;
    ensure!(other.is_some() || !world.node(1).bpffs.exists(), "pins are left");
    answers(world, 8)?;
    calm(world, storm)?;
    unbroken(last)
}

/// Connections of IPVS' are counted, at least so many, nobody new goes by it, and nobody is given a Service's address as their source.
fn is_retired(world: &World, flows: u64) -> Result<()> {
    let node = world.node(1);
    let retiring = &node.status()?["retiring"];
    let of_ipvs = retiring.as_array().into_iter().flatten().find(|one| one["mode"] == "ipvs");
    let of_ipvs = of_ipvs.with_context(|| format!("nothing of IPVS retires: {retiring}"))?;
    ensure!(of_ipvs["retired"] == true && of_ipvs["flows"].as_u64() >= Some(flows), "{of_ipvs}");
    let chosen = chosen(node)?;
    ensure!(chosen.is_empty(), "somebody is chosen: {chosen:#?}");
    for family in Family::BOTH {
        let to = vip(family, 8).to_string();
        let way = output(node, &format!("ip route get {to}"))?;
        ensure!(way.contains("local") && !way.contains(&format!("src {to}")), "{way}");
    }
    Ok(())
}

/// Its table needs nft, too, but less of it.
fn chosen_by_auto(world: &mut World) -> Result<()> {
    let said = world.cli_output(world.node(1), &["check", "--proxy-mode=ipvs", "--ipvs-scheduler=none-such"])?;
    ensure!(said.contains("modprobe ip_vs_none-such"), "{said}");
    let capabilities = Some("+net_admin,+dac_override".to_owned());
    let programs = Some(world.nft_without_numgen()?);
    let options = AgentOptions { capabilities, programs, only_programs: true, ..AgentOptions::new(SocketLb::Node) };
    world.start_agent(1, &options)?;
    world.node(1).wait_ready(patience(60))?;
    let status = world.node(1).status()?;
    let why = status["modeReason"].as_str().unwrap_or_default();
    ensure!(status["mode"] == "ipvs" && why.contains("nftables cannot run here (nft: no numgen"), "{status}");
    answers(world, 6)?;
    world.start_agents(&self::options())
}

/// All that an agent may change of a node.
fn state(node: &Node) -> Result<Vec<String>> {
    [
        "nft -s list ruleset",
        "ip -o -d link show",
        "ip -o addr show",
        "ip route show table all",
        "ipvsadm -Sn",
        "sysctl net.ipv4.vs net.ipv4.ip_forward net.ipv6.conf.all.forwarding net.ipv4.conf.all.arp_ignore net.ipv4.conf.all.arp_announce",
    ]
    .into_iter()
    .map(|words| output(node, words))
    .collect()
}

/// What of the node's is set while the agent runs, and `cleanup` puts back. `conn_reuse_mode` is left as it is from Linux 5.9 on.
const SETTINGS: [(&str, &str); 6] = [
    ("vs.conntrack", "1"),
    ("vs.expire_nodest_conn", "1"),
    ("vs.expire_quiescent_template", "1"),
    ("vs.conn_reuse_mode", "0"),
    ("conf.all.arp_ignore", "1"),
    ("conf.all.arp_announce", "2"),
];

/// As one that is killed in its midst.
fn leave_a_trial(node: &Node) -> Result<()> {
    for command in [
        "ip link add proxy-ipvs-try type dummy",
        "ipvsadm -A -t 192.0.2.101:1 -s rr",
        "ipvsadm -A -t [2001:db8::65]:1 -s rr",
    ] {
        output(node, command)?;
    }
    Ok(())
}

fn cleans_up(world: &mut World) -> Result<()> {
    world.remove_agents()?;
    let node = world.node(1);
    world.cli(node, &["cleanup"])?;
    for command in ["ipvsadm -A -t 198.51.100.1:80 -s rr", "ipvsadm -a -t 198.51.100.1:80 -r 198.51.100.2:80 -m"] {
        output(node, command)?;
    }
    let set =
        || SETTINGS.iter().try_for_each(|(name, _)| output(node, &format!("sysctl -w net.ipv4.{name}=0")).map(drop));
    set()?;
    let before = state(node)?;
    ensure!(!before.concat().contains("proxy-"), "{before:#?}");
    // What is asked for with the second start is put back as well.
    world.start_agent(1, &options())?;
    world.node(1).wait_ready(patience(30))?;
    let mut strict = options();
    strict.extra.push("--ipvs-strict-arp".into());
    world.start_agent(1, &strict)?;
    world.node(1).wait_ready(patience(30))?;
    answers(world, 6)?;
    let node = world.node(1);
    for (name, wanted) in SETTINGS {
        let now = output(node, &format!("sysctl -n net.ipv4.{name}"))?;
        ensure!(now.trim() == wanted, "{name}: {now}, not {wanted}");
    }
    let refused = world.cli(node, &["cleanup"]);
    ensure!(refused.is_err(), "cleaned up under an agent");
    world.kill_agent(1)?;
    let node = world.node(1);
    let left = state(node)?;
    ensure!(left != before, "nothing was left to remove");
    leave_a_trial(node)?;
    let left = state(node)?;
    let shown = world.cli(node, &["cleanup", "--dry-run"])?;
    ensure!(shown.contains("would remove device proxy-ipvs0") && state(node)? == left, "{shown}");
    let shown = world.cli(node, &["cleanup"])?;
    ensure!(shown.contains("removed table ip6 proxy-agent-ipvs"), "{shown}");
    for line in ["removed device proxy-ipvs-try", "removed 2 virtual servers"] {
        ensure!(shown.contains(line), "no {line:?} in {shown}");
    }
    for (before, after) in before.iter().zip(&state(node)?) {
        ensure!(before == after, "before:\n{before}\nafter:\n{after}");
    }
    ensure!(!world.cli(node, &["cleanup"])?.contains("removed"), "there was more");
    // The next trial is not mistaken about it either.
    leave_a_trial(node)?;
    let agent = world.programs().agent.to_str().context("a path")?;
    // Whether eBPF could run is not asked.
    let check = ["--bounding-set=-sys_admin,-bpf", agent, "check", "--proxy-mode=ipvs"];
    let checked = node.place.namespace.output("setpriv", &check)?;
    ensure!(checked.contains("mode ipvs: can run"), "{checked}");
    for (before, after) in before.iter().zip(&state(node)?) {
        ensure!(before == after, "before:\n{before}\nafter:\n{after}");
    }
    output(node, "ipvsadm -D -t 198.51.100.1:80").map(drop)
}

/// In a container `/proc/sys` is read-only; `DIRECTORY` is where the manifest mounts the node's settings.
fn settings(world: &mut World) -> Result<()> {
    const READ_ONLY: &str = "mount --bind /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys";
    const BESIDES: &str = "mount --bind /proc/sys/net \"$DIRECTORY\"";
    world.remove_agents()?;
    let directory = world.objects_dir().with_file_name("settings");
    fs::create_dir_all(&directory)?;
    let checked = |script: &str| -> Result<Value> {
        let node = world.node(1);
        let mut command = node.place.command("unshare")?;
        command.args([
            "--mount",
            "--propagation=private",
            "sh",
            "-c",
            // Whether eBPF could run is not asked here: without leave to load programs that takes no time, in an emulated machine least of all.
            &format!("{script} && exec timeout 60 setpriv --bounding-set=-sys_admin,-bpf \"$@\""),
            "sh",
        ]);
        command.arg(&world.programs().agent).args(["check", "-o", "json", "--proxy-mode", "ipvs"]);
        command.arg("--bpffs").arg(&node.bpffs).arg("--cgroup-root").arg(&node.cgroup).env("DIRECTORY", &directory);
        let done = command.output()?;
        let (out, err) = (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
        let list: Value = serde_json::from_str(&out).with_context(|| format!("{script}: {out} {err}"))?;
        let mut items = list["items"].as_array().into_iter().flatten();
        items
            .find(|item| item["name"] == "mode ipvs")
            .cloned()
            .with_context(|| format!("{script}: no mode ipvs: {out}"))
    };
    let set = |value: u8| output(world.node(1), &format!("sysctl -w net.ipv4.vs.conntrack={value}"));
    set(0)?;
    let refused = checked(READ_ONLY)?;
    let detail = refused["detail"].as_str().unwrap_or_default();
    ensure!(
        refused["result"] == "failed" && detail.contains("net/ipv4/vs/conntrack cannot be set"),
        "read-only, and not as it must be: {refused}"
    );
    let found = checked(&format!("{BESIDES} && {READ_ONLY}"))?;
    ensure!(found["result"] == "ok", "the node's are mounted elsewhere: {found}");
    let conntrack = output(world.node(1), "cat /proc/sys/net/ipv4/vs/conntrack")?;
    ensure!(conntrack.trim() == "0", "a trial set it: {conntrack}");
    // All that has to be set.
    for name in ["vs.conntrack", "vs.expire_nodest_conn", "vs.expire_quiescent_template", "ip_forward"] {
        output(world.node(1), &format!("sysctl -w net.ipv4.{name}=1"))?;
    }
    let needless = checked(READ_ONLY)?;
    ensure!(needless["result"] == "ok", "read-only, and as it must be: {needless}");
    set(0).map(drop)
}

/// As kube-proxy 1.36 makes them, and of which kind.
const SETS: [(&str, &str); 17] = [
    ("LOOP-BACK", "hash:ip,port,ip"),
    ("CLUSTER-IP", "hash:ip,port"),
    ("EXTERNAL-IP", "hash:ip,port"),
    ("EXTERNAL-IP-LOCAL", "hash:ip,port"),
    ("LOAD-BALANCER", "hash:ip,port"),
    ("LOAD-BALANCER-LOCAL", "hash:ip,port"),
    ("LOAD-BALANCER-FW", "hash:ip,port"),
    ("LOAD-BALANCER-SOURCE-IP", "hash:ip,port,ip"),
    ("LOAD-BALANCER-SOURCE-CIDR", "hash:ip,port,net"),
    ("NODE-PORT-TCP", "bitmap:port"),
    ("NODE-PORT-LOCAL-TCP", "bitmap:port"),
    ("NODE-PORT-UDP", "bitmap:port"),
    ("NODE-PORT-LOCAL-UDP", "bitmap:port"),
    ("NODE-PORT-SCTP-HASH", "hash:ip,port"),
    ("NODE-PORT-LOCAL-SCTP-HASH", "hash:ip,port"),
    ("HEALTH-CHECK-NODE-PORT", "bitmap:port"),
    ("IPVS-IPS", "hash:ip"),
];

/// Some of its rules: what asks for sets, and jumps to it.
fn rules_of_kube_proxy(prefix: &str) -> String {
    format!(
        "*nat\n:KUBE-SERVICES - [0:0]\n:KUBE-NODE-PORT - [0:0]\n:KUBE-MARK-MASQ - [0:0]\n:KUBE-POSTROUTING - [0:0]\n\
         -A PREROUTING -j KUBE-SERVICES\n-A POSTROUTING -j KUBE-POSTROUTING\n\
         -A KUBE-SERVICES -m set --match-set {prefix}CLUSTER-IP dst,dst -j KUBE-MARK-MASQ\n\
         -A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODE-PORT\n-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000\n\
         -A KUBE-NODE-PORT -p tcp -m set --match-set {prefix}NODE-PORT-TCP dst -j KUBE-MARK-MASQ\n\
         -A KUBE-POSTROUTING -m set --match-set {prefix}LOOP-BACK dst,dst,src -j MASQUERADE\nCOMMIT\n\
         *filter\n:KUBE-IPVS-FILTER - [0:0]\n:KUBE-NODE-PORT - [0:0]\n-A INPUT -j KUBE-IPVS-FILTER\n-A INPUT -j KUBE-NODE-PORT\n\
         -A KUBE-IPVS-FILTER -m set --match-set {prefix}IPVS-IPS dst -j REJECT\n\
         -A KUBE-NODE-PORT -m set --match-set {prefix}HEALTH-CHECK-NODE-PORT dst -j ACCEPT\nCOMMIT\n"
    )
}

fn cleans_up_after_kube_proxy(world: &mut World) -> Result<()> {
    world.remove_agents()?;
    let node = world.node(1);
    world.cli(node, &["cleanup"])?;
    let (v4, v6) = (node.place.v4, node.place.v6);
    let all = |lines: &[String]| lines.iter().try_for_each(|words| output(node, words).map(drop));
    // Somebody's: servers elsewhere, at another port of the node's, by another protocol; sets, of kube-router's name, too; rules; a device.
    let others = [
        "ipvsadm -C".to_owned(),
        "ipvsadm -A -t 198.51.100.1:80 -s rr".to_owned(),
        "ipvsadm -a -t 198.51.100.1:80 -r 198.51.100.2:80 -m".to_owned(),
        format!("ipvsadm -A -t {v4}:8081 -s rr"),
        format!("ipvsadm -A -u {v4}:30080 -s rr"),
        "ipvsadm -A -f 7 -s rr".to_owned(),
        "ipset create MINE hash:ip".to_owned(),
        "ipset add MINE 198.51.100.7".to_owned(),
        "ipset create KUBE-SRC-ABCDEF hash:ip".to_owned(),
        "ip link add mine0 type dummy".to_owned(),
        "ip addr add 198.51.100.9/32 dev mine0".to_owned(),
    ];
    all(&others)?;
    for tool in ["iptables-nft", "ip6tables-legacy"] {
        // In whichever chain it writes to: iptables makes that, and leaves it.
        for (table, hooks) in [("nat", &["PREROUTING", "POSTROUTING", "OUTPUT"][..]), ("filter", &["INPUT", "OUTPUT"])]
        {
            output(node, &format!("{tool} -t {table} -N MINE"))?;
            all(&hooks.iter().map(|hook| format!("{tool} -t {table} -A {hook} -j MINE")).collect::<Vec<_>>())?;
        }
    }
    output(node, "iptables-nft -t filter -A MINE -m set --match-set MINE src -j RETURN")?;
    let state = || -> Result<Vec<String>> {
        let mut state = state(node)?;
        for words in ["ipset save -sorted", "ip6tables-legacy-save"] {
            let text = output(node, words)?;
            // Not when it was, nor counters.
            let lines = text.lines().filter(|line| !line.starts_with('#'));
            state.push(lines.map(|line| line.split(" [").next().unwrap_or_default()).collect::<Vec<_>>().join("\n"));
        }
        Ok(state)
    };
    let before = state()?;

    let mut its = vec![
        "ip link add kube-ipvs0 type dummy".to_owned(),
        "ip addr add 10.96.7.1/32 dev kube-ipvs0".to_owned(),
        "ip addr add fd00:96::7:1/128 dev kube-ipvs0 nodad".to_owned(),
        "ipvsadm -A -t 10.96.7.1:80 -s rr".to_owned(),
        "ipvsadm -a -t 10.96.7.1:80 -r 198.51.100.2:80 -m".to_owned(),
        "ipvsadm -A -u [fd00:96::7:1]:53 -s rr".to_owned(),
        format!("ipvsadm -A -t {v4}:30080 -s rr"),
        format!("ipvsadm -A -t [{v6}]:30080 -s rr"),
    ];
    for (prefix, family) in [("KUBE-", "inet"), ("KUBE-6-", "inet6")] {
        for (name, kind) in SETS {
            let name: String = format!("{prefix}{name}").chars().take(31).collect();
            let rest = if kind == "bitmap:port" { "range 0-65535".to_owned() } else { format!("family {family}") };
            its.push(format!("ipset create {name} {kind} {rest}"));
        }
        its.push(format!("ipset add {prefix}NODE-PORT-TCP 30080"));
    }
    all(&its)?;
    for (tool, prefix) in [("iptables-nft-restore", "KUBE-"), ("ip6tables-legacy-restore", "KUBE-6-")] {
        let file = world.objects_dir().join("kube-proxy.rules");
        std::fs::write(&file, rules_of_kube_proxy(prefix))?;
        output(node, &format!("{tool} --noflush {}", file.display()))?;
    }
    let left = state()?;
    ensure!(left != before, "nothing was made");

    let dry = world.cli(node, &["cleanup", "--kube-proxy", "--dry-run"])?;
    for line in ["4 virtual servers (IPVS)", "device kube-ipvs0", "34 sets of ipset", "(iptables-nft-save)"] {
        ensure!(dry.contains(&format!("would remove {line}")) || dry.contains(line), "no {line:?} in {dry}");
    }
    ensure!(state()? == left, "a dry run removed something: {dry}");
    // What nobody can see is no reason to fail, and neither is what an earlier one has begun.
    output(node, &format!("ipvsadm -D -t {v4}:30080"))?;
    let said = world.cli(node, &["cleanup", "--kube-proxy"])?;
    ensure!(said.contains("removed 3 virtual servers") && said.contains("removed 34 sets"), "{said}");
    for (before, after) in before.iter().zip(&state()?) {
        ensure!(before == after, "before:\n{before}\nafter:\n{after}");
    }
    let again = world.cli(node, &["cleanup", "--kube-proxy"])?;
    ensure!(again.contains("no rules of kube-proxy"), "{again}");
    // A set that somebody else's rule asks for stays with them, and that is said.
    all(&[
        "ipset create KUBE-IPVS-IPS hash:ip".to_owned(),
        "iptables-nft -t filter -A MINE -m set --match-set KUBE-IPVS-IPS src -j RETURN".to_owned(),
        "ipset create KUBE-LOOP-BACK hash:ip".to_owned(),
    ])?;
    let refused = world.cli(node, &["cleanup", "--kube-proxy"]).err().map(|error| format!("{error:#}"));
    ensure!(refused.as_ref().is_some_and(|why| why.contains("KUBE-IPVS-IPS: a rule asks for it")), "{refused:?}");
    let sets = output(node, "ipset list -name")?;
    ensure!(sets.contains("KUBE-IPVS-IPS") && !sets.contains("KUBE-LOOP-BACK"), "{sets}");
    Ok(())
}
