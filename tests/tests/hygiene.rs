//! Backends come and go while clients talk from one port without a pause (contract A103–A108, F53, F54): within a second each of
//! them talks to somebody who serves. Every server stays alive throughout, so a flow that stays where it was is seen as such.

use std::{process::ExitCode, thread, time::Duration};

use anyhow::{Context, Result, ensure};
use proxy_tests::{
    pod::{
        socket::Transport,
        talk::{self, Report},
    },
    suite::Suite,
    world::{AgentOptions, Client, Family, Place, Programs, SocketLb, Spec, Topology, World, objects, vip},
};
use serde_json::{Value, json};

/// What a client may need to find its way (F53).
const WITHIN: u64 = 1_000;

fn main() -> ExitCode {
    let unprivileged = [("hygiene/unprivileged".to_owned(), None)];
    let shapes = Suite::both_ways("hygiene").map(|(group, socket_lb)| (group, Some(socket_lb)));
    Suite::in_worlds("hygiene", unprivileged.into_iter().chain(shapes), prepare, cases)
}

fn cases(suite: &mut Suite, group: &str, socket_lb: &Option<SocketLb>, world: &mut World) {
    for (name, before, after) in MOVES {
        suite.case(&format!("{group}/A108: {name}"), || moves(world, before, after));
    }
    suite.case(&format!("{group}/A103: an idle socket is ended, and is none of those that are left"), || idle(world));
    suite.case(&format!("{group}/A104: TCP is reset on demand, once its endpoint is deleted"), || resets(world));
    let Some(socket_lb) = socket_lb else { return };
    suite.case(&format!("{group}/A104: flows to whoever still serves stay"), || stays(world));
    suite.case(&format!("{group}/A104: a policy ends no flow"), || policy(world));
    suite.case(&format!("{group}/A106, F54: nobody serves any more, and somebody again"), || empties(world));
    suite.case(&format!("{group}/F54: the Service is deleted"), || deleted(world));
    suite.case(&format!("{group}/a socket that was connected to the backend itself is left alone"), || direct(world));
    let options = AgentOptions::new(*socket_lb);
    suite.case(&format!("{group}/what changed while no agent ran"), || meanwhile(world, &options));
    suite.case(&format!("{group}/A103: at start with --socket-lb off, too"), || switched_off(world));
}

/// Of the DaemonSet's container, as setpriv(1) wants them: `+bpf,+perfmon`.
fn shipped_capabilities() -> Result<String> {
    let manifest = include_str!("../../manifests/base/daemonset.yaml");
    let list = manifest.split_once("add: [").and_then(|(_, rest)| rest.split_once(']')).context("no capabilities")?.0;
    Ok(list.split(", ").map(|name| format!("+{}", name.to_lowercase())).collect::<Vec<_>>().join(","))
}

/// `None`: with what the DaemonSet may do and no more, so that no namespace of a pod can be entered.
fn prepare(programs: Programs, socket_lb: &Option<SocketLb>) -> Result<World> {
    let pods = [["client", "s1", "s2"], ["s3", "s4", "s5"]];
    let nodes = pods.iter().map(|names| names.iter().map(|&name| name.to_owned()).collect()).collect();
    let spec = Spec { nodes, ..Spec::two_nodes(Topology::Routed) };
    let options = match socket_lb {
        Some(socket_lb) => AgentOptions::new(*socket_lb),
        None => AgentOptions { capabilities: Some(shipped_capabilities()?), ..AgentOptions::new(SocketLb::All) },
    };
    World::serving(&spec, programs, &options, objects::nodes)
}

/// An endpoint: its pod, and a word on its state.
type Endpoint = (&'static str, &'static str);
/// Endpoints and the port that they serve on.
type State = (&'static [Endpoint], u16);

const MOVES: [(&str, State, State); 6] = [
    ("a pod takes another's place", (&[("s1", "")], 8080), (&[("s2", "")], 8080)),
    ("on another node", (&[("s1", "")], 8080), (&[("s3", "")], 8080)),
    ("one of two goes", (&[("s1", "")], 8080), (&[("s3", ""), ("s4", "")], 8080)),
    (
        "one becomes unready, another ready",
        (&[("s1", ""), ("s3", "unready")], 8080),
        (&[("s1", "unready"), ("s3", "")], 8080),
    ),
    ("one terminates and serves no longer", (&[("s1", "")], 8080), (&[("s1", "dead"), ("s2", "")], 8080)),
    ("the target port changes", (&[("s1", "")], 8080), (&[("s1", "")], 9090)),
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
    objects::service("dns").cluster_ips(&Family::BOTH.map(|family| vip(family, number))).port("dns", "UDP", 53)
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

/// A number for the VIP that no case before has used, with the Service in force: no client port meets an earlier flow.
fn fresh(world: &mut World, state: State) -> Result<u8> {
    use std::sync::atomic::{AtomicU8, Ordering};
    static NEXT: AtomicU8 = AtomicU8::new(10);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    world.write(&dns(number).json())?;
    apply(world, state)?;
    Ok(number)
}

struct Talks(Vec<(String, Client)>);

impl Talks {
    /// From a pod, from the node itself and from outside, with connected and unconnected sockets, over both families.
    fn start(world: &World, number: u8) -> Result<Self> {
        let mut talks = Self(Vec::new());
        for (i, from) in [world.pod("client"), &world.node(1).place, world.outside()].into_iter().enumerate() {
            for transport in [Transport::Udp, Transport::UdpUnconnected] {
                for family in Family::BOTH {
                    talks.add(world, from, family, number, transport, &[])?;
                }
            }
            if i < 2 {
                talks.add(world, from, Family::V4, number, Transport::Udp, &["--mapped"])?;
            }
        }
        talks.ready()?;
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
        let to = std::net::SocketAddr::new(vip(family, number), 53);
        // One port for each: two sockets of one place may not have the same.
        let port = 20_000 + u16::from(number) * 20 + u16::try_from(self.0.len())?;
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

fn moves(world: &mut World, before: State, after: State) -> Result<()> {
    let number = fresh(world, before)?;
    let talks = Talks::start(world, number)?;
    pause(300);
    let counted = ended(world)?;
    let changed = apply(world, after)?;
    pause(WITHIN + 700);
    ensure!(ended(world)? > counted, "nothing was counted as ended");
    let reports = talks.finish()?;
    found_its_way(&reports, changed, after)
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

/// `internalTrafficPolicy: Local` takes s3 out of what is chosen on node 1, and ends nothing.
fn policy(world: &mut World) -> Result<()> {
    let number = fresh(world, (&[("s3", "")], 8080))?;
    let talks = Talks::start(world, number)?;
    pause(300);
    world.write(&dns(number).local().json())?;
    apply(world, (&[("s3", ""), ("s1", "")], 8080))?;
    pause(WITHIN + 500);
    for (what, report) in talks.finish()? {
        let seen = report.backends(0, u64::MAX);
        ensure!(seen == ["s3:8080"] && report.sockets == 1, "{what}: {seen:?}, {} sockets", report.sockets);
    }
    Ok(())
}

fn empties(world: &mut World) -> Result<()> {
    let number = fresh(world, (&[("s1", ""), ("s3", "")], 8080))?;
    let talks = Talks::start(world, number)?;
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
    let talks = Talks::start(world, number)?;
    pause(300);
    world.remove(&dns(number).json())?;
    world.settle()?;
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
        for (j, pod) in ["s1", "s3"].into_iter().enumerate() {
            let to = world.pod(pod).at(Family::V4, 8080);
            let port = 30_000 + u16::try_from(i * 2 + j)?;
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

/// What an earlier run pointed at a backend does not stay there because this one points nothing anywhere.
fn switched_off(world: &mut World) -> Result<()> {
    let number = fresh(world, (&[("s1", "")], 8080))?;
    let node = world.node(1).place.clone();
    let mut talks = Talks(Vec::new());
    talks.add(world, &node, Family::V4, number, Transport::Udp, &[])?;
    talks.ready()?;
    for node in [1, 2] {
        world.kill_agent(node)?;
    }
    for object in slices(world, "dns", "UDP", (&[("s2", "")], 8080)) {
        world.write(&object)?;
    }
    world.start_agents(&AgentOptions::new(SocketLb::Off))?;
    let changed = talk::now();
    pause(WITHIN + 500);
    for (what, report) in talks.finish()? {
        let seen = report.backends(changed + WITHIN, u64::MAX);
        ensure!(seen.is_empty(), "{what}: {seen:?} answered after its removal");
    }
    Ok(())
}

fn resets(world: &mut World) -> Result<()> {
    let service = |name: &str, number: u8| {
        objects::service(name).cluster_ips(&Family::BOTH.map(|family| vip(family, number))).port("dns", "TCP", 53)
    };
    let (plain, resetting) = (200, 201);
    world.write(&service("plain", plain).json())?;
    world.write(&service("resetting", resetting).annotation("proxy-agent/reset-deleted", "true").json())?;
    let state =
        |world: &World, state: State| ["plain", "resetting"].map(|name| slices(world, name, "TCP", state)).concat();
    let objects = state(world, (&[("s1", ""), ("s3", "")], 8080));
    world.apply(&objects)?;
    let mut talks = Talks(Vec::new());
    for from in [world.pod("client"), &world.node(1).place, world.outside()] {
        for family in Family::BOTH {
            for number in [plain, resetting] {
                talks.add(world, from, family, number, Transport::Tcp, &[])?;
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
            early.map_or(0, |turn| turn.at - listed)
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
