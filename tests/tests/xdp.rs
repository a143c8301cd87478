//! XDP through the real agent, native and generic: everything from outside is served as without it, and what goes on to the other node
//! goes past the stack.

use std::{
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use proxy_tests::{
    cases::{Ground, external},
    pod::{hold, socket::Transport},
    suite::Suite,
    world::{AgentOptions, Ask, Client, Family, Programs, SocketLb, Spec, Topology, World, cleanup_on_signals},
};

const SOCKET_LB: SocketLb = SocketLb::Node;
const PATIENCE: Duration = Duration::from_secs(5);
/// A cluster that nobody answers for.
const NOBODY: &str = "apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: 'http://127.0.0.1:1'}}]
users: [{name: u, user: {}}]
contexts: [{name: c, context: {cluster: c, user: u}}]
current-context: c
";

fn main() -> ExitCode {
    let mut suite = Suite::new("xdp");
    let Some(programs) = suite.programs() else { return suite.finish() };
    if let Err(error) = cleanup_on_signals().and_then(|()| World::sweep().map(drop)) {
        suite.fail("preparation", &error);
        return suite.finish();
    }
    for mode in ["native", "generic"] {
        if !suite.wants_group(mode) {
            continue;
        }
        let mut world = match prepare(programs.clone(), mode) {
            Ok(world) => world,
            Err(error) => {
                suite.fail(mode, &error);
                continue;
            }
        };
        external::all(&mut suite, mode, &ground(&world));
        suite.case(&format!("{mode}/what goes on to another node goes past the stack"), || bypasses(&world, mode));
        suite.case(&format!("{mode}/F43: path MTU is found past the stack"), || path_mtu(&world));
        suite.case(&format!("{mode}/a neighbour that is another one now is found"), || neighbour(&world));
        suite.case(&format!("{mode}/IPsec policies keep it off"), || ipsec(&mut world, mode));
        suite.case(&format!("{mode}/restarts, and XDP off and on, under traffic"), || switches(&mut world, mode));
        suite.case(&format!("{mode}/cleanup takes it off"), || cleaned(&mut world));
    }
    suite.finish()
}

fn ground(world: &World) -> Ground<'_> {
    Ground { world, socket_lb: SOCKET_LB, large_segments: false, fallback: None }
}

fn options(mode: &str) -> AgentOptions {
    let extra = ["--xdp", mode, "--sync-period", "1s"].map(str::to_owned).to_vec();
    AgentOptions { extra, ..AgentOptions::new(SOCKET_LB) }
}

fn prepare(programs: Programs, mode: &str) -> Result<World> {
    let spec = Spec { rp_filter: true, for_xdp: true, ..Spec::two_nodes(Topology::Routed) };
    let mut world = World::new(&spec, programs)?;
    for object in external::objects(&world) {
        world.write(&object)?;
    }
    world.start_agents(&options(mode))?;
    world.settle()?;
    Ok(world)
}

/// Packets that XDP on node1 sent on.
fn bypassed(world: &World) -> Result<u64> {
    let text = world.cli(world.node(1), &["counters", "-o", "json"])?;
    let json: serde_json::Value = serde_json::from_str(&text)?;
    let found = find(&json, "bypassed").unwrap_or(0);
    Ok(found)
}

/// `count` of the object whose `reason` is this, wherever it stands.
fn find(json: &serde_json::Value, reason: &str) -> Option<u64> {
    match json {
        serde_json::Value::Object(fields) if fields.get("reason").is_some_and(|r| r == reason) => {
            fields.get("count")?.as_u64()
        }
        serde_json::Value::Object(fields) => fields.values().find_map(|value| find(value, reason)),
        serde_json::Value::Array(items) => items.iter().find_map(|value| find(value, reason)),
        _ => None,
    }
}

fn is_on(world: &World, mode: &str) -> Result<bool> {
    let status = world.cli(world.node(1), &["status"])?;
    Ok(status.contains(&format!("xdp/{mode}")))
}

fn bypasses(world: &World, mode: &str) -> Result<()> {
    ensure!(is_on(world, mode)?, "status does not name the hook");
    for family in Family::BOTH {
        for transport in [Transport::Tcp, Transport::Udp] {
            let to = external::at_node_port(world, family, transport);
            let before = bypassed(world)?;
            let report = world.ask(world.outside(), &Ask::new(to, transport).times(30))?;
            ensure!(report.errors().is_empty(), "{to} {transport}: {:?}", report.errors());
            // Half of the flows, roughly, lead to the other node; of each half of its packets there and back: the stack has its turn with each
            // neighbour every few seconds, on each CPU.
            let there = report.backends().get("b2").copied().unwrap_or_default();
            ensure!(there > 0, "none was answered by the other node");
            let least = if transport == Transport::Tcp { 3 } else { 1 };
            let count = bypassed(world)? - before;
            ensure!(
                count >= least * there as u64,
                "{to} {transport}: {there} flows to the other node, {count} packets past the stack"
            );
        }
    }
    Ok(())
}

/// Of some 160 packets of 200 000 bytes the stack has its turn, and what is sent again.
fn path_mtu(world: &World) -> Result<()> {
    for family in Family::BOTH {
        let before = bypassed(world)?;
        external::remote_path_mtu(&ground(world), family)?;
        let count = bypassed(world)? - before;
        ensure!(count >= 50, "{family}: {count} packets past the stack");
    }
    Ok(())
}

/// Until both backends answer whoever asks the node port, and by the other node past the stack again.
fn recovers(world: &World, family: Family, transport: Transport) -> Result<()> {
    let to = external::at_node_port(world, family, transport);
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let before = bypassed(world)?;
        let report = world.ask(world.outside(), &Ask { timeout: 1500, ..Ask::new(to, transport).times(6) })?;
        let other = report.backends().contains_key("b2");
        if report.errors().is_empty() && other && bypassed(world)? > before {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "{to} {transport}: {:?} {:?}", report.errors(), report.backends());
    }
}

/// The other node has another Ethernet address, and nobody says so: XDP alone would go on sending to the old one. Each transport by itself, since
/// one that finds out does so for the others.
fn neighbour(world: &World) -> Result<()> {
    let [here, there] = [1, 2].map(|n| &world.node(n).place);
    let link = here.namespace.output("ip", &["-o", "link", "show", "eth0"])?;
    let own = link.split_whitespace().skip_while(|word| *word != "link/ether").nth(1).context("an Ethernet address")?;
    here.namespace.sysctl(&[
        ("ipv4/neigh/eth0/delay_first_probe_time", "1"),
        ("ipv4/neigh/eth0/retrans_time_ms", "200"),
        ("ipv6/neigh/eth0/delay_first_probe_time", "1"),
        ("ipv6/neigh/eth0/retrans_time_ms", "200"),
    ])?;
    for family in Family::BOTH {
        // It would ask by itself, and so be heard of.
        let (ours, theirs) = (here.ip(family).to_string(), there.ip(family).to_string());
        let quiet = ["neigh", "replace", &ours, "lladdr", own, "dev", "eth0", "nud", "permanent"];
        there.namespace.output("ip", &quiet)?;
        for transport in [Transport::Tcp, Transport::Udp] {
            let stale = ["neigh", "replace", &theirs, "lladdr", "02:00:00:00:00:99", "dev", "eth0", "nud", "stale"];
            here.namespace.output("ip", &stale)?;
            recovers(world, family, transport)?;
        }
        there.namespace.output("ip", &["neigh", "del", &ours, "dev", "eth0"])?;
    }
    Ok(())
}

/// As long as there is a policy, whatever it is for; also for an agent that starts.
fn ipsec(world: &mut World, mode: &str) -> Result<()> {
    let policy = |world: &World, change: &str| {
        let mut words = vec!["xfrm", "policy", change, "src", "192.0.2.0/24", "dst", "203.0.113.0/24", "dir", "out"];
        if change == "add" {
            words.extend(["tmpl", "src", "192.0.2.1", "dst", "203.0.113.1", "proto", "esp", "mode", "tunnel"]);
        }
        world.node(1).place.namespace.output("ip", &words)
    };
    policy(world, "add")?;
    for restart in [false, true] {
        if restart {
            world.kill_agent(1)?;
            world.start_agent(1, &options(mode))?;
            world.node(1).wait_ready(Duration::from_secs(30))?;
        }
        settled(world, mode, false)?;
        let status = world.cli(world.node(1), &["status"])?;
        ensure!(status.contains("IPsec policies"), "{status}");
        let before = bypassed(world)?;
        for family in Family::BOTH {
            let to = external::at_node_port(world, family, Transport::Tcp);
            let report = world.ask(world.outside(), &Ask::new(to, Transport::Tcp).times(10))?;
            ensure!(report.errors().is_empty(), "{:?}", report.errors());
        }
        let count = bypassed(world)? - before;
        ensure!(count == 0, "{count} packets past the stack");
    }
    policy(world, "delete")?;
    settled(world, mode, true)?;
    recovers(world, Family::V4, Transport::Tcp)?;
    // Nor does it wait for a cluster that cannot be reached: of a policy from before the start, and of one that comes then.
    let path = world.objects_dir().with_file_name("nobody.yaml");
    std::fs::write(&path, NOBODY).with_context(|| path.display().to_string())?;
    let away = AgentOptions { kubeconfig: Some(path), ..options(mode) };
    for before in [true, false] {
        world.kill_agent(1)?;
        if before {
            policy(world, "add")?;
        }
        world.start_agent(1, &away)?;
        if !before {
            thread::sleep(Duration::from_secs(1));
            recovers(world, Family::V4, Transport::Tcp)?;
            policy(world, "add")?;
        }
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let earlier = bypassed(world)?;
            let to = external::at_node_port(world, Family::V4, Transport::Tcp);
            let report = world.ask(world.outside(), &Ask::new(to, Transport::Tcp).times(20))?;
            ensure!(report.errors().is_empty(), "{:?}", report.errors());
            let count = bypassed(world)? - earlier;
            if count == 0 {
                break;
            }
            ensure!(Instant::now() < deadline, "before the start: {before}; {count} packets past the stack");
        }
        let link = world.node(1).place.namespace.output("ip", &["-o", "link", "show", "eth0"])?;
        ensure!(link.contains("xdp"), "nothing is taken off before the first full state");
        policy(world, "delete")?;
        world.kill_agent(1)?;
        world.start_agent(1, &options(mode))?;
        world.node(1).wait_ready(Duration::from_secs(30))?;
        settled(world, mode, true)?;
        recovers(world, Family::V4, Transport::Tcp)?;
    }
    Ok(())
}

struct Held(Vec<Client>);

impl Held {
    fn start(world: &World) -> Result<Self> {
        let mut clients = Family::BOTH
            .map(|family| {
                let to = external::at_node_port(world, family, Transport::Tcp).to_string();
                let args = ["hold", &to, "--interval=20", "--connections=40"].map(str::to_owned);
                world.outside().start(&world.programs().testpod, &args)
            })
            .into_iter()
            .collect::<Result<Vec<_>>>()?;
        for client in &mut clients {
            client.wait_for_line("ready", Duration::from_secs(15))?;
        }
        Ok(Self(clients))
    }

    fn finish(self) -> Result<()> {
        for client in self.0 {
            let report: hold::Report = client.finish(Duration::from_secs(15))?;
            ensure!(report.broken.is_empty() && report.wrong.is_empty(), "{report:?}");
            ensure!(report.backends.len() == 2 && report.rounds > 20, "{report:?}");
        }
        Ok(())
    }
}

/// Whoever is connected notices nothing, and whoever connects meanwhile is served.
fn switches(world: &mut World, mode: &str) -> Result<()> {
    let held = Held::start(world)?;
    for (next, on) in [(mode, true), ("off", false), (mode, true), ("off", false), (mode, true)] {
        world.kill_agent(1)?;
        let before = bypassed(world)?;
        thread::sleep(Duration::from_millis(300));
        let meanwhile = bypassed(world)? > before;
        world.start_agent(1, &options(next))?;
        world.node(1).wait_ready(Duration::from_secs(30))?;
        settled(world, next, on)?;
        let before = bypassed(world)?;
        for family in Family::BOTH {
            let to = external::at_node_port(world, family, Transport::Tcp);
            let report = world.ask(world.outside(), &Ask::new(to, Transport::Tcp).times(20))?;
            ensure!(report.errors().is_empty(), "{next}: {:?}", report.errors());
        }
        let count = bypassed(world)? - before;
        ensure!((count > 0) == on, "--xdp {next}: {count} packets past the stack");
        ensure!(on || meanwhile, "with no agent running XDP goes on");
    }
    held.finish()
}

fn settled(world: &World, mode: &str, on: bool) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let text = world.node(1).place.namespace.output("ip", &["-o", "link", "show", "eth0"])?;
        if text.contains("xdp") == on && (!on || is_on(world, mode)?) {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "--xdp {mode}: {text}");
        thread::sleep(Duration::from_millis(50));
    }
}

fn cleaned(world: &mut World) -> Result<()> {
    world.remove_agents()?;
    for node in &world.nodes {
        // Once its pin is gone the kernel lets go of a link by a worker of its own.
        let deadline = Instant::now() + PATIENCE;
        loop {
            let links = node.place.namespace.output("ip", &["-o", "link"]).context("ip link")?;
            if !links.contains("xdp") {
                break;
            }
            ensure!(Instant::now() < deadline, "{links}");
            thread::sleep(Duration::from_millis(50));
        }
    }
    Ok(())
}
