//! Backends come and go while clients talk from one port without a pause (contract A103–A108, F53, F54): within a second each of
//! them talks to somebody who serves. Every server stays alive throughout, so a flow that stays where it was is seen as such.

use std::{net::SocketAddr, process::ExitCode, thread, time::Duration};

use anyhow::{Context, Result, ensure};
use proxy_tests::{
    pod::{
        socket::Transport,
        talk::{self, Report},
    },
    suite::Suite,
    world::{AgentOptions, Client, Family, Place, Programs, SocketLb, Spec, Topology, World, external, objects, vip},
};
use serde_json::{Value, json};

/// Where nobody answers for a while and the first who does is waited for.
const EAGER: &[&str] = &["--timeout=100"];

/// What a client may need to find its way (F53): about a second.
const WITHIN: u64 = 1_300;

fn main() -> ExitCode {
    let unprivileged = [("hygiene/unprivileged".to_owned(), None)];
    let shapes = Suite::every_way("hygiene").into_iter().map(|(group, options)| (group, Some(options)));
    let extra = ["--xdp", "native"].map(str::to_owned).to_vec();
    let by_xdp = [("hygiene/xdp".to_owned(), Some(AgentOptions { extra, ..AgentOptions::new(SocketLb::Node) }))];
    Suite::in_worlds("hygiene", unprivileged.into_iter().chain(shapes).chain(by_xdp), prepare, cases)
}

fn cases(suite: &mut Suite, group: &str, shape: &Option<AgentOptions>, world: &mut World) {
    let with_xdp = shape.as_ref().is_some_and(has_xdp);
    for (name, policies, before, after) in MOVES {
        if !with_xdp || name == ON_ANOTHER_NODE {
            suite.case(&format!("{group}/A108: {name}"), || moves(world, policies, before, after));
        }
    }
    if with_xdp {
        suite.case(&format!("{group}/packets went past the stack meanwhile"), || bypassed(world));
        return;
    }
    suite.case(&format!("{group}/A104: flows to whoever still serves stay"), || stays(world));
    suite.case(&format!("{group}/A104: a policy ends no flow"), || policy(world));
    suite.case(&format!("{group}/A104: nor does the node's taking the ClusterIP for itself"), || {
        yielded(world, shape.as_ref().is_some_and(|shape| shape.fallback.is_some()))
    });
    suite.case(&format!("{group}/A106, F54: nobody serves any more, and somebody again"), || empties(world));
    suite.case(&format!("{group}/F54: the Service is deleted"), || deleted(world));
    suite.case(&format!("{group}/a socket that was connected to the backend itself is left alone"), || direct(world));
    suite.case(&format!("{group}/what changed while no agent ran"), || meanwhile(world, &options(shape)?));
    suite.case(&format!("{group}/F54: the Service is deleted while no agent runs"), || {
        deleted_meanwhile(world, &options(shape)?)
    });
    if shape.as_ref().is_some_and(|shape| shape.fallback.is_some()) {
        suite.case(&format!("{group}/A105: a flow from before there was a Service"), || before_the_service(world));
        // Netfilter points no sockets anywhere, and resets nothing.
        return;
    }
    suite.case(&format!("{group}/A103: an idle socket is ended, and is none of those that are left"), || idle(world));
    suite.case(&format!("{group}/A104: TCP is reset on demand, once its endpoint is deleted"), || resets(world));
    let off = || -> Result<_> { Ok(AgentOptions { socket_lb: SocketLb::Off, ..options(shape)? }) };
    suite.case(&format!("{group}/A103: at start with --socket-lb off, too"), || switched_off(world, &off()?));
}

fn has_xdp(options: &AgentOptions) -> bool {
    options.extra.iter().any(|word| word == "--xdp")
}

/// `None`: with what the DaemonSet may do and no more, so that no namespace of a pod can be entered.
fn options(shape: &Option<AgentOptions>) -> Result<AgentOptions> {
    Ok(match shape {
        Some(options) => options.clone(),
        None => AgentOptions { capabilities: Some(shipped_capabilities()?), ..AgentOptions::new(SocketLb::All) },
    })
}

/// The kernel tracks what nobody answers, too, and a flow that it knows meets no new rules.
fn before_the_service(world: &mut World) -> Result<()> {
    let number = 120;
    let mut talks = Talks::begin(world, number, EAGER)?;
    pause(500);
    world.write(&dns(number).json())?;
    let state: State = (&[("s1", ""), ("s3", "")], 8080);
    let made = apply(world, state)?;
    pause(WITHIN + 500);
    talks.ready()?;
    found_its_way(&talks.finish()?, made, state)?;
    world.leaks().map(drop)
}

/// Of the DaemonSet's container, as setpriv(1) wants them: `+bpf,+perfmon`.
fn shipped_capabilities() -> Result<String> {
    let manifest = include_str!("../../manifests/base/daemonset.yaml");
    let list = manifest.split_once("add: [").and_then(|(_, rest)| rest.split_once(']')).context("no capabilities")?.0;
    Ok(list.split(", ").map(|name| format!("+{}", name.to_lowercase())).collect::<Vec<_>>().join(","))
}

fn prepare(programs: Programs, shape: &Option<AgentOptions>) -> Result<World> {
    let pods = [["client", "s1", "s2"], ["s3", "s4", "s5"]];
    let nodes = pods.iter().map(|names| names.iter().map(|&name| name.to_owned()).collect()).collect();
    let for_xdp = shape.as_ref().is_some_and(has_xdp);
    let spec = Spec { nodes, for_xdp, ..Spec::two_nodes(Topology::Routed) };
    let world = World::serving(&spec, programs, &options(shape)?, objects::nodes)?;
    // What no Service has goes back out by the device that it came in by, of which the kernel would tell: the client would not come by node1 again.
    world.outside().namespace.sysctl(&[
        ("ipv4/conf/all/accept_redirects", "0"),
        ("ipv4/conf/eth0/accept_redirects", "0"),
        ("ipv6/conf/all/accept_redirects", "0"),
        ("ipv6/conf/eth0/accept_redirects", "0"),
    ])?;
    Ok(world)
}

/// An endpoint: its pod, and a word on its state.
type Endpoint = (&'static str, &'static str);
/// Endpoints and the port that they serve on.
type State = (&'static [Endpoint], u16);

/// A Service's policies, internal and external.
#[derive(Clone, Copy)]
enum Policies {
    Cluster,
    Local,
}
use Policies::{Cluster, Local};

/// What is asked of XDP, which sends on what is for another node.
const ON_ANOTHER_NODE: &str = "on another node";

const MOVES: [(&str, Policies, State, State); 7] = [
    ("a pod takes another's place", Cluster, (&[("s1", "")], 8080), (&[("s2", "")], 8080)),
    // The first one is of node1.
    ("the same with both policies Local", Local, (&[("s1", ""), ("s3", "")], 8080), (&[("s2", ""), ("s3", "")], 8080)),
    (ON_ANOTHER_NODE, Cluster, (&[("s1", "")], 8080), (&[("s3", "")], 8080)),
    ("one of two goes", Cluster, (&[("s1", "")], 8080), (&[("s3", ""), ("s4", "")], 8080)),
    (
        "one becomes unready, another ready",
        Cluster,
        (&[("s1", ""), ("s3", "unready")], 8080),
        (&[("s1", "unready"), ("s3", "")], 8080),
    ),
    ("one terminates and serves no longer", Cluster, (&[("s1", "")], 8080), (&[("s1", "dead"), ("s2", "")], 8080)),
    ("the target port changes", Cluster, (&[("s1", "")], 8080), (&[("s1", "")], 9090)),
];

fn conditions(state: &str) -> Value {
    let (ready, serving, terminating) = match state {
        "unready" => (false, false, false),
        "dead" => (false, false, true),
        "terminating" => (false, true, true),
        _ => (true, true, false),
    };
    json!({"ready": ready, "serving": serving, "terminating": terminating})
}

fn dns(number: u8) -> objects::Service {
    everywhere("dns", number, "UDP").external_ips(&Family::BOTH.map(|family| external_ip(family, number)))
}

/// A Service that is reached by a ClusterIP, a NodePort and a load balancer's address of each family.
fn everywhere(name: &str, number: u8, protocol: &str) -> objects::Service {
    objects::service(name)
        .cluster_ips(&Family::BOTH.map(|family| vip(family, number)))
        .port("dns", protocol, 53)
        .node_port(node_port(number))
        .load_balancer(&Family::BOTH.map(|family| external(family, number)))
}

fn node_port(number: u8) -> u16 {
    31_000 + u16::from(number)
}

/// In the other half of the addresses that load balancers have, too.
fn external_ip(family: Family, number: u8) -> std::net::IpAddr {
    external(family, number ^ 0x80)
}

/// Ways from outside to a Service, at node1.
fn at_node_port(world: &World, family: Family, number: u8) -> SocketAddr {
    world.node(1).place.at(family, node_port(number))
}

fn at_load_balancer(family: Family, number: u8) -> SocketAddr {
    SocketAddr::new(external(family, number), 53)
}

fn slices(world: &World, service: &str, protocol: &str, (endpoints, port): State) -> Vec<Value> {
    let slice = |family| {
        let slice = objects::slice(service, family).port("dns", protocol, port);
        let add = |slice: objects::Slice, (pod, state): &Endpoint| {
            slice.endpoint_with(world.pod(pod), conditions(state), Value::Null)
        };
        endpoints.iter().fold(slice, add).json()
    };
    Family::BOTH.map(slice).to_vec()
}

/// In force; when that was.
fn apply(world: &mut World, state: State) -> Result<u64> {
    let objects = slices(world, "dns", "UDP", state);
    world.apply(&objects)?;
    Ok(talk::now())
}

fn with_policies(number: u8, policies: Policies) -> objects::Service {
    match policies {
        Cluster => dns(number),
        Local => dns(number).local().external_local(),
    }
}

/// A number for the VIP that no case before has used, with the Service in force: no client port meets an earlier flow.
fn fresh(world: &mut World, state: State) -> Result<u8> {
    fresh_with(world, Cluster, state)
}

fn fresh_with(world: &mut World, policies: Policies, state: State) -> Result<u8> {
    use std::sync::atomic::{AtomicU8, Ordering};
    static NEXT: AtomicU8 = AtomicU8::new(10);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    world.write(&with_policies(number, policies).json())?;
    apply(world, state)?;
    Ok(number)
}

struct Talks(Vec<(String, Client)>);

impl Talks {
    /// From a pod, from the node itself and from outside, with connected and unconnected sockets, over both families; from pod and outside
    /// by every other address of the Service, too (A103).
    fn start(world: &World, number: u8) -> Result<Self> {
        Self::started(world, number, &[])
    }

    fn started(world: &World, number: u8, extra: &[&str]) -> Result<Self> {
        let mut talks = Self::begin(world, number, extra)?;
        talks.ready()?;
        Ok(talks)
    }

    /// The same where nobody answers yet.
    fn begin(world: &World, number: u8, extra: &[&str]) -> Result<Self> {
        let mut talks = Self(Vec::new());
        for (i, from) in [world.pod("client"), &world.node(1).place, world.outside()].into_iter().enumerate() {
            for transport in [Transport::Udp, Transport::UdpUnconnected] {
                for family in Family::BOTH {
                    talks.add(world, from, family, number, transport, extra)?;
                }
            }
            if i < 2 {
                talks.add(world, from, Family::V4, number, Transport::Udp, &[extra, &["--mapped"]].concat())?;
            }
        }
        for from in [world.pod("client"), world.outside()] {
            for family in Family::BOTH {
                let by_external_ip = SocketAddr::new(external_ip(family, number), 53);
                for to in [at_node_port(world, family, number), at_load_balancer(family, number), by_external_ip] {
                    talks.add_to(world, from, to, number, Transport::Udp, extra)?;
                }
            }
        }
        Ok(talks)
    }

    fn add(
        &mut self,
        world: &World,
        from: &Place,
        family: Family,
        number: u8,
        transport: Transport,
        extra: &[&str],
    ) -> Result<()> {
        self.add_to(world, from, SocketAddr::new(vip(family, number), 53), number, transport, extra)
    }

    fn add_to(
        &mut self,
        world: &World,
        from: &Place,
        to: SocketAddr,
        number: u8,
        transport: Transport,
        extra: &[&str],
    ) -> Result<()> {
        // One port for each: two sockets of one place may not have the same.
        let port = 20_000 + u16::from(number) * 32 + u16::try_from(self.0.len())?;
        let mut args = vec![
            "talk".to_owned(),
            to.to_string(),
            format!("--transport={transport}"),
            format!("--source-port={port}"),
        ];
        args.extend(extra.iter().map(|&arg| arg.to_owned()));
        let what = format!("{} -> {to} {transport} {}", from.name, extra.join(" "));
        self.0.push((what, from.start(&world.programs().testpod, &args)?));
        Ok(())
    }

    fn ready(&mut self) -> Result<()> {
        self.0.iter_mut().try_for_each(|(_, client)| client.wait_for_line("ready", Duration::from_secs(5)))
    }

    fn finish(self) -> Result<Vec<(String, Report)>> {
        self.0.into_iter().map(|(what, client)| Ok((what, client.finish(Duration::from_secs(5))?))).collect()
    }
}

/// `name:port` of those that serve.
fn serving((endpoints, port): State) -> Vec<String> {
    endpoints.iter().filter(|(_, state)| state.is_empty()).map(|(pod, _)| format!("{pod}:{port}")).collect()
}

/// Every talk finds somebody who serves within a second of the change, and nobody else answers after that.
fn found_its_way(reports: &[(String, Report)], changed: u64, state: State) -> Result<()> {
    let right = serving(state);
    for (what, report) in reports {
        let answers = report.backends(changed + WITHIN, u64::MAX);
        ensure!(
            !answers.is_empty() && answers.iter().all(|backend| right.iter().any(|one| one == backend)),
            "{what}: answered by {answers:?} a second after the change, expected {right:?}; errors {:?}, {} sockets",
            report.errors(),
            report.sockets
        );
        let new = report
            .turns
            .iter()
            .find(|turn| turn.at >= changed && turn.backend.as_ref().is_some_and(|backend| right.contains(backend)));
        let took = new.context("no answer")?.at - changed;
        ensure!(took <= WITHIN, "{what}: took {took} ms");
    }
    Ok(())
}

/// Long enough for the flow to be an established one, and for a late change to show.
fn pause(millis: u64) {
    thread::sleep(Duration::from_millis(millis));
}

fn ended(world: &World) -> Result<f64> {
    world.node(1).metric("proxy_agent_ended_total")
}

fn moves(world: &mut World, policies: Policies, before: State, after: State) -> Result<()> {
    let number = fresh_with(world, policies, before)?;
    let talks = Talks::started(world, number, EAGER)?;
    pause(300);
    let counted = ended(world)?;
    let changed = apply(world, after)?;
    pause(WITHIN + 700);
    ensure!(ended(world)? > counted, "nothing was counted as ended");
    let reports = talks.finish()?;
    match policies {
        Cluster => found_its_way(&reports, changed, after),
        Local => {
            let (endpoints, port) = after;
            // By its other addresses a pod may use any endpoint (A66).
            let (anywhere, here): (Vec<_>, Vec<_>) = reports.into_iter().partition(|(what, _)| {
                what.starts_with("client ") && ![" 10.96.", " [fd00:96:"].iter().any(|vip| what.contains(vip))
            });
            ensure!(!anywhere.is_empty() && !here.is_empty(), "nobody talked");
            found_its_way(&anywhere, changed, after)?;
            found_its_way(&here, changed, (endpoints.get(..1).unwrap_or_default(), port))
        }
    }
}

/// By XDP, on node1.
fn bypassed(world: &World) -> Result<()> {
    let counters = world.cli(world.node(1), &["counters"])?;
    let line = counters.lines().find_map(|line| line.strip_prefix("bypassed"));
    let count: Option<u64> = line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok());
    ensure!(count.is_some_and(|count| count > 0), "{counters}");
    Ok(())
}

/// Terminating endpoints that serve keep their flows, and so do those that stay while others go.
fn stays(world: &mut World) -> Result<()> {
    let number = fresh(world, (&[("s1", "")], 8080))?;
    let talks = Talks::start(world, number)?;
    pause(300);
    apply(world, (&[("s1", "terminating"), ("s2", ""), ("s3", "")], 8080))?;
    pause(500);
    apply(world, (&[("s1", "terminating"), ("s3", "")], 8080))?;
    pause(WITHIN + 500);
    for (what, report) in talks.finish()? {
        let seen = report.backends(0, u64::MAX);
        ensure!(seen == ["s1:8080"] && report.errors().is_empty(), "{what}: {seen:?} {:?}", report.errors());
        ensure!(report.sockets == 1, "{what}: {} sockets", report.sockets);
    }
    Ok(())
}

/// Policies Local take s3 out of what is chosen on node 1, and end nothing.
fn policy(world: &mut World) -> Result<()> {
    let number = fresh(world, (&[("s3", "")], 8080))?;
    let talks = Talks::start(world, number)?;
    pause(300);
    world.write(&with_policies(number, Local).json())?;
    apply(world, (&[("s3", ""), ("s1", "")], 8080))?;
    pause(WITHIN + 500);
    for (what, report) in talks.finish()? {
        let seen = report.backends(0, u64::MAX);
        ensure!(seen == ["s3:8080"] && report.sockets == 1, "{what}: {seen:?}, {} sockets", report.sockets);
    }
    Ok(())
}

/// As NodeLocal DNSCache comes and goes: who talks to a backend already goes on with it.
fn yielded(world: &mut World, by_rules: bool) -> Result<()> {
    let number = fresh(world, (&[("s1", "")], 8080))?;
    let talks = Talks::start(world, number)?;
    pause(300);
    // On a device of its own, so that the node does not choose it to send to a pod from, as it would one of `lo`: what is answered in the moments
    // in which it comes or goes would be lost.
    let [v4, v6] = Family::BOTH.map(|family| vip(family, number));
    let comes = format!(
        "link add nodelocaldns type bridge\nlink set nodelocaldns up\n\
         addr add {v4}/32 dev nodelocaldns\naddr add {v6}/128 dev nodelocaldns nodad\n"
    );
    for script in [&comes, "link del nodelocaldns\n"] {
        world.node(1).place.namespace.ip(script)?;
        pause(WITHIN + 1_000);
    }
    for (what, report) in talks.finish()? {
        let seen = report.backends(0, u64::MAX);
        // To an address of its own the node sends from that address: another flow, by rules that see packets alone.
        let moves = by_rules && what.starts_with("node1 ") && what.contains("udp-unconnected");
        let (answered, unharmed) = (seen == ["s1:8080"], moves || report.errors().is_empty());
        ensure!(answered && unharmed, "{what}: {seen:?} {:?}", report.errors());
        ensure!(report.sockets == 1, "{what}: {} sockets", report.sockets);
    }
    Ok(())
}

fn empties(world: &mut World) -> Result<()> {
    let number = fresh(world, (&[("s1", ""), ("s3", "")], 8080))?;
    let talks = Talks::started(world, number, EAGER)?;
    pause(300);
    let emptied = apply(world, (&[], 8080))?;
    pause(WITHIN + 500);
    let state: State = (&[("s4", "")], 8080);
    let filling = talk::now();
    let filled = apply(world, state)?;
    pause(WITHIN + 500);
    let reports = talks.finish()?;
    for (what, report) in &reports {
        // Whoever asked just before may be answered just after, by a backend chosen at its next try.
        let seen = report.backends(emptied + WITHIN, filling - 100);
        ensure!(seen.is_empty(), "{what}: {seen:?} answered while there was nobody");
    }
    found_its_way(&reports, filled, state)
}

fn deleted(world: &mut World) -> Result<()> {
    let number = fresh(world, (&[("s1", ""), ("s3", "")], 8080))?;
    let talks = Talks::started(world, number, EAGER)?;
    pause(300);
    world.remove(&dns(number).json())?;
    world.settle()?;
    nobody_answers(world, talks)
}

/// The Service has gone at this moment.
fn nobody_answers(world: &World, talks: Talks) -> Result<()> {
    let gone = talk::now();
    pause(WITHIN + 500);
    for (what, report) in talks.finish()? {
        let seen = report.backends(gone + WITHIN, u64::MAX);
        ensure!(seen.is_empty(), "{what}: {seen:?} answered for a Service that is gone");
    }
    world.leaks().map(drop)
}

/// Beside others that do end: as long as there are none, nobody looks for sockets.
fn direct(world: &mut World) -> Result<()> {
    let number = fresh(world, (&[("s1", ""), ("s3", "")], 8080))?;
    let through_the_vip = Talks::start(world, number)?;
    let mut talks = Talks(Vec::new());
    for (i, from) in [world.pod("client"), &world.node(1).place].into_iter().enumerate() {
        let pods = ["s1", "s3"].into_iter().flat_map(|pod| Family::BOTH.map(|family| world.pod(pod).at(family, 8080)));
        for (j, to) in pods.enumerate() {
            let port = 30_000 + u16::try_from(i * 4 + j)?;
            let args = ["talk".to_owned(), to.to_string(), format!("--source-port={port}")];
            talks.0.push((format!("{} -> {to}", from.name), from.start(&world.programs().testpod, &args)?));
        }
    }
    talks.ready()?;
    apply(world, (&[("s4", "")], 8080))?;
    pause(WITHIN + 500);
    for (what, report) in talks.finish()? {
        ensure!(report.errors().is_empty() && report.sockets == 1, "{what}: {:?}", report.errors());
    }
    through_the_vip.finish().map(drop)
}

/// Lesson of agents that swept on change alone, and of those that swept away what was fine.
fn meanwhile(world: &mut World, options: &AgentOptions) -> Result<()> {
    let number = fresh(world, (&[("s1", "")], 8080))?;
    let talks = Talks::start(world, number)?;
    pause(300);
    for node in [1, 2] {
        world.kill_agent(node)?;
    }
    // Nothing changed for these: they talk on.
    world.start_agents(options)?;
    pause(WITHIN + 500);
    for node in [1, 2] {
        world.kill_agent(node)?;
    }
    let quiet = talk::now();
    let state: State = (&[("s4", "")], 8080);
    for object in slices(world, "dns", "UDP", state) {
        world.write(&object)?;
    }
    world.start_agents(options)?;
    let changed = talk::now();
    pause(WITHIN + 500);
    let reports = talks.finish()?;
    for (what, report) in &reports {
        let seen = report.backends(0, quiet);
        ensure!(seen == ["s1:8080"], "{what}: {seen:?} before anything changed");
        let broken = report.turns.iter().find(|turn| turn.at < quiet && turn.error.is_some());
        ensure!(broken.is_none(), "{what}: {broken:?} although nothing had changed");
    }
    found_its_way(&reports, changed, state)
}

fn deleted_meanwhile(world: &mut World, options: &AgentOptions) -> Result<()> {
    let number = fresh(world, (&[("s1", ""), ("s3", "")], 8080))?;
    let talks = Talks::started(world, number, EAGER)?;
    pause(300);
    for node in [1, 2] {
        world.kill_agent(node)?;
    }
    world.remove(&dns(number).json())?;
    world.start_agents(options)?;
    world.settle()?;
    nobody_answers(world, talks)
}

/// A socket of the node's that nobody reads from: what was destroyed stays open, and keeps its note.
fn idle(world: &mut World) -> Result<()> {
    let number = fresh(world, (&[("s1", "")], 8080))?;
    let node = world.node(1).place.clone();
    let mut talks = Talks(Vec::new());
    for family in Family::BOTH {
        talks.add(world, &node, family, number, Transport::Udp, &["--interval=600000"])?;
    }
    talks.ready()?;
    let counted = ended(world)?;
    apply(world, (&[("s2", "")], 8080))?;
    pause(WITHIN);
    let after = ended(world)?;
    ensure!(after >= counted + 2.0, "{} sockets or flows were ended", after - counted);
    // Something else is lost: those are not looked for again.
    apply(world, (&[("s3", "")], 8080))?;
    pause(WITHIN + 2_500);
    ensure!(ended(world)? == after, "the same sockets were ended once more");
    let log = world.node(1).agent_log();
    let complaint = log.lines().find(|line| line.contains("WARN") && line.contains("removed backends"));
    ensure!(complaint.is_none(), "{complaint:?}");
    Ok(())
}

/// What an earlier run pointed at a backend does not stay there because this one points nothing anywhere. Everybody else goes per packet from
/// now on; the node's own processes are not served.
fn switched_off(world: &mut World, off: &AgentOptions) -> Result<()> {
    let number = fresh(world, (&[("s1", "")], 8080))?;
    let talks = Talks::started(world, number, EAGER)?;
    pause(300);
    for node in [1, 2] {
        world.kill_agent(node)?;
    }
    let state: State = (&[("s2", "")], 8080);
    for object in slices(world, "dns", "UDP", state) {
        world.write(&object)?;
    }
    let starting = talk::now();
    world.start_agents(off)?;
    let changed = talk::now();
    pause(WITHIN + 500);
    let node = format!("{} ", world.node(1).place.name);
    let (of_node, others): (Vec<_>, Vec<_>) =
        talks.finish()?.into_iter().partition(|(what, _)| what.starts_with(&node));
    ensure!(!of_node.is_empty() && !others.is_empty(), "nobody talked");
    for (what, report) in of_node {
        // While it starts, s2 is there and the hooks of the run before are, too.
        ensure!(report.backends(0, starting) == ["s1:8080"], "{what}: {:?} before", report.backends(0, starting));
        let seen = report.backends(changed + WITHIN, u64::MAX);
        ensure!(seen.is_empty(), "{what}: {seen:?} answered after its removal");
    }
    found_its_way(&others, changed, state)
}

fn resets(world: &mut World) -> Result<()> {
    let (plain, resetting) = (200, 201);
    world.write(&everywhere("plain", plain, "TCP").json())?;
    let annotated = everywhere("resetting", resetting, "TCP").annotation("proxy-agent/reset-deleted", "true");
    world.write(&annotated.json())?;
    let state =
        |world: &World, state: State| ["plain", "resetting"].map(|name| slices(world, name, "TCP", state)).concat();
    let objects = state(world, (&[("s1", ""), ("s3", "")], 8080));
    world.apply(&objects)?;
    let mut talks = Talks(Vec::new());
    for from in [world.pod("client"), &world.node(1).place, world.outside()] {
        for family in Family::BOTH {
            for number in [plain, resetting] {
                talks.add(world, from, family, number, Transport::Tcp, &[])?;
                if !from.is_node() {
                    for to in [at_node_port(world, family, number), at_load_balancer(family, number)] {
                        talks.add_to(world, from, to, number, Transport::Tcp, &[])?;
                    }
                }
            }
        }
    }
    talks.ready()?;
    pause(300);
    // Unready, terminating, not serving: no reason for a reset as long as they are listed.
    let objects = state(world, (&[("s1", "dead"), ("s3", "unready"), ("s4", "")], 8080));
    world.apply(&objects)?;
    let listed = talk::now();
    pause(4_000);
    let objects = state(world, (&[("s4", "")], 8080));
    world.apply(&objects)?;
    let gone = talk::now();
    pause(5_000);
    for (what, report) in talks.finish()? {
        let early = report.turns.iter().find(|turn| turn.at < gone + 2_000 && turn.error.is_some());
        ensure!(
            early.is_none(),
            "{what}: {early:?} ({} ms after the endpoints were unready)",
            early.map_or(0, |turn| turn.at.saturating_sub(listed))
        );
        let last = report.backends(gone + 4_500, u64::MAX);
        if what.contains("201") || what.contains("c9]") {
            ensure!(last == ["s4:8080"] && report.sockets == 2, "{what}: {last:?}, {:?}", report.errors());
        } else {
            ensure!(last != ["s4:8080"] && report.errors().is_empty(), "{what}: {last:?}, {:?}", report.errors());
        }
    }
    Ok(())
}
