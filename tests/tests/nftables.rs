//! What is nftables' own: its table is put back when somebody alters it, a start is seen by nobody, one frontend that nft does not take
//! costs the others nothing, and what is served with less than was asked for says so. What Services mean is in the other suites.

use std::{
    fs, net::SocketAddr, os::unix::fs::PermissionsExt as _, path::PathBuf, process::ExitCode, thread, time::Duration,
};

use anyhow::{Context, Result, ensure};
use proxy_tests::{
    cases::packets,
    pod::{hold, socket::Transport, storm},
    suite::Suite,
    world::{AgentOptions, Ask, Client, Fallback, Family, Programs, Spec, Topology, World, objects, vip, within},
};
use serde_json::Value;

/// More than two sync periods.
const PATIENCE: Duration = Duration::from_secs(10);

fn main() -> ExitCode {
    let shapes = [("nftables".to_owned(), ())];
    Suite::in_worlds(
        "nftables",
        shapes,
        |programs, ()| prepare(programs),
        |suite, group, (), world| {
            for (what, change) in ALTERATIONS {
                suite.case(&format!("{group}/put back: {what}"), || put_back(world, change));
            }
            suite.case(&format!("{group}/nothing is written without a change"), || quiet(world));
            suite.case(&format!("{group}/A135: a restart is seen by nobody"), || restart(world));
            suite.case(&format!("{group}/what is not served as asked says so"), || limits(world));
            suite.case(&format!("{group}/what only eBPF has is looked for elsewhere"), || elsewhere(world));
            suite.case(&format!("{group}/A109: what is invalid leaves no pod"), || packets::invalid(world));
            suite.case(&format!("{group}/a second agent is refused"), || second(world));
            suite.case(&format!("{group}/a frontend that nft does not take costs the others nothing"), || {
                one_bad(world)
            });
        },
    )
}

fn options() -> AgentOptions {
    let mut options = AgentOptions::by(Fallback::Nftables);
    options.extra.extend(["--sync-period".to_owned(), "2s".to_owned()]);
    options
}

fn prepare(programs: Programs) -> Result<World> {
    let mut world = World::serving(&Spec::two_nodes(Topology::Routed), programs, &options(), objects::nodes)?;
    let objects = service(&world, 1, "web", false);
    world.apply(&objects)?;
    Ok(world)
}

fn service(world: &World, number: u8, name: &str, maglev: bool) -> Vec<Value> {
    let service = objects::service(name)
        .cluster_ips(&Family::BOTH.map(|family| vip(family, number)))
        .port("web", "TCP", 80)
        .node_port(30_000 + u16::from(number));
    let service = if maglev { service.annotation("proxy-agent/algorithm", "maglev") } else { service };
    let slices = Family::BOTH.map(|family| {
        objects::slice(name, family).port("web", "TCP", 8080).endpoints(["b1", "b2"].map(|pod| world.pod(pod))).json()
    });
    [vec![service.json()], slices.to_vec()].concat()
}

fn answers(world: &World, number: u8) -> Result<()> {
    for from in [world.pod("a1"), &world.node(1).place, world.outside()] {
        for family in Family::BOTH {
            let to = (vip(family, number), 80).into();
            let report = world.ask(from, &Ask::new(to, Transport::Tcp).times(3).timeout(500))?;
            ensure!(report.errors().is_empty(), "{} to {to}: {:?}", from.name, report.errors());
        }
    }
    Ok(())
}

fn eventually(check: impl Fn() -> Result<()>) -> Result<()> {
    within(PATIENCE, check)
}

fn report(world: &World) -> Result<Value> {
    let status: Value = serde_json::from_str(&world.cli(world.node(1), &["status", "-o", "json"])?)?;
    Ok(status["report"].clone())
}

fn table(world: &World, family: &str) -> Result<String> {
    world.node(1).place.namespace.output("nft", &["-j", "list", "table", family, "proxy-agent"])
}

const ALTERATIONS: [(&str, &str); 8] = [
    ("its rules are flushed", "flush table ip proxy-agent"),
    ("all rules are flushed", "flush ruleset"),
    ("it is deleted", "delete table ip6 proxy-agent"),
    ("a map is emptied", "flush map ip proxy-agent tcp-endpoints"),
    ("a rule says something else", "flush chain ip6 proxy-agent refuse\nadd rule ip6 proxy-agent refuse accept\n"),
    ("a chain drops what it leaves alone", "add chain ip proxy-agent guard-output { policy drop; }"),
    ("a rule is added", "insert rule ip proxy-agent prerouting drop"),
    ("a guard is gone", "delete element ip proxy-agent guards { 10.96.0.1 }"),
];

fn put_back(world: &mut World, change: &str) -> Result<()> {
    answers(world, 1)?;
    let repaired =
        |world: &World| -> Result<u64> { report(world)?["sync"]["driftRepaired"].as_u64().context("no driftRepaired") };
    let before = repaired(world)?;
    world.node(1).place.namespace.nft(change)?;
    eventually(|| {
        ensure!(repaired(world)? > before, "nothing was repaired\n{}", world.node(1).agent_log());
        answers(world, 1)
    })?;
    let guards = world.node(1).place.namespace.output("nft", &["list", "set", "ip", "proxy-agent", "guards"])?;
    ensure!(guards.contains(&vip(Family::V4, 1).to_string()), "{guards}");
    Ok(())
}

/// Handles would be others.
fn quiet(world: &mut World) -> Result<()> {
    let both = |world: &World| -> Result<[String; 2]> { Ok([table(world, "ip")?, table(world, "ip6")?]) };
    let before = both(world)?;
    thread::sleep(Duration::from_secs(5));
    ensure!(both(world)? == before, "the tables changed");
    // What others write is none of our business.
    let repaired = report(world)?["sync"]["driftRepaired"].clone();
    world.node(1).place.namespace.nft("add table ip others\ndelete table ip others\n")?;
    thread::sleep(Duration::from_secs(5));
    ensure!(both(world)? == before, "the tables changed with another one");
    ensure!(report(world)?["sync"]["driftRepaired"] == repaired, "another one's table counted as altered");
    Ok(())
}

fn restart(world: &mut World) -> Result<()> {
    let (mut held, mut storms) = (Vec::new(), Vec::new());
    for (from, family) in [("a1", Family::V4), ("a1", Family::V6), ("outside", Family::V4)] {
        let to = SocketAddr::new(vip(family, 1), 80).to_string();
        let place = world.place(from).context("no such place")?;
        let start = |args: &[&str]| -> Result<Client> {
            let args: Vec<String> = args.iter().map(|&arg| arg.to_owned()).collect();
            let mut client = place.start(&world.programs().testpod, &args)?;
            client.wait_for_line("ready", Duration::from_secs(5))?;
            Ok(client)
        };
        held.push(start(&["hold", &to, "--connections=4", "--interval=20"])?);
        storms.push(start(&["storm", &to, "--rate=50", "--workers=2"])?);
    }
    for _ in 0..3 {
        for node in [1, 2] {
            world.kill_agent(node)?;
        }
        answers(world, 1)?;
        world.start_agents(&options())?;
    }
    for client in held {
        let report: hold::Report = client.finish(Duration::from_secs(10))?;
        ensure!(report.broken.is_empty() && report.wrong.is_empty(), "{report:?}");
    }
    for client in storms {
        let report: storm::Report = client.finish(Duration::from_secs(10))?;
        ensure!(report.failures.is_empty() && report.answered > 20, "{report:?}");
    }
    Ok(())
}

fn rows(world: &World, name: &str) -> Result<Vec<Value>> {
    let shown: Value = serde_json::from_str(&world.cli(world.node(1), &["services", "-o", "json"])?)?;
    let rows = shown["items"].as_array().context("no items")?.iter().filter(|row| row["name"] == name);
    Ok(rows.cloned().collect())
}

fn limits(world: &mut World) -> Result<()> {
    let objects = service(world, 2, "hashed", true);
    world.apply(&objects)?;
    answers(world, 2)?;
    let all = rows(world, "hashed")?;
    let said = |row: &Value, text: &str| row["state"] == "Programmed" && row["reason"].to_string().contains(text);
    let is_loopback = |row: &Value| row["frontend"]["address"] == "127.0.0.1";
    ensure!(all.len() > 3, "{all:#?}");
    ensure!(
        all.iter().all(|row| said(row, if is_loopback(row) { "no NodePorts on" } else { "at random" })),
        "{all:#?}"
    );
    ensure!(all.iter().any(is_loopback), "{all:#?}");
    let plain = rows(world, "web")?;
    ensure!(plain.iter().all(|row| is_loopback(row) || row["reason"].is_null()), "{plain:#?}");
    let report = report(world)?;
    ensure!(report["mode"] == "nftables" && report["frontends"]["degraded"] == 0, "{report:#}");
    ensure!(report["limited"].as_array().is_some_and(|limited| limited.len() > all.len()), "{report:#}");
    let backends = world.cli(world.node(1), &["backends", "-o", "wide"])?;
    ensure!(backends.contains(&world.pod("b2").v4.to_string()), "{backends}");
    Ok(())
}

fn elsewhere(world: &mut World) -> Result<()> {
    let status = world.cli(world.node(1), &["status"])?;
    ensure!(status.contains("nftables/prerouting") && !status.contains("nothing is pinned"), "{status}");
    for (verb, hint) in [("connections", "conntrack -L"), ("affinity", "nft list set"), ("counters", "/metrics")] {
        let error = world.cli(world.node(1), &[verb]).err().context("it printed something")?.to_string();
        ensure!(error.contains(hint), "{error}");
    }
    Ok(())
}

fn second(world: &mut World) -> Result<()> {
    let node = world.node(1);
    let absent = node.bpffs.join("absent");
    for mode in ["nftables", "ebpf"] {
        let done = node
            .place
            .command(&world.programs().agent)?
            .args(["run", "--metrics-bind-address=", "--healthz-bind-address=", "--source=/nowhere"])
            .arg(format!("--proxy-mode={mode}"))
            .arg(format!("--bpffs={}", absent.display()))
            .output()?;
        let said = String::from_utf8_lossy(&done.stderr);
        ensure!(!done.status.success() && said.contains("another proxy-agent (pid "), "{mode}: {said}");
        ensure!(!absent.exists(), "{mode} left pins");
    }
    answers(world, 1)
}

/// Stands before the real one, and refuses what names the address.
fn wrapper(world: &World, refused: &str) -> Result<PathBuf> {
    let real = ["/usr/sbin/nft", "/sbin/nft", "/usr/bin/nft"].into_iter().find(|path| PathBuf::from(path).exists());
    let real = real.context("no nft")?;
    let dir = world.objects_dir().join("../programs");
    fs::create_dir_all(&dir)?;
    let script = format!(
        "#!/bin/sh\ncase \" $* \" in *\" - \"*) ;; *) exec {real} \"$@\" ;; esac\ninput=$(mktemp)\ntrap 'rm -f \"$input\"' EXIT\ncat > \"$input\"\n\
         if grep -q '{refused} ' \"$input\"; then echo 'Error: Could not process rule: made up' >&2; exit 1; fi\n{real} \"$@\" < \"$input\"\n"
    );
    let path = dir.join("nft");
    fs::write(&path, script)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(dir)
}

fn one_bad(world: &mut World) -> Result<()> {
    let bad = vip(Family::V4, 44);
    let programs = Some(wrapper(world, &bad.to_string())?);
    let options = AgentOptions { programs, ..options() };
    let objects: Vec<Value> =
        (40..48).flat_map(|number| service(world, number, &format!("many-{number}"), false)).collect();
    world.start_agents(&options)?;
    // By a change, and at a start.
    world.apply(&objects)?;
    for when in ["a change", "a start"] {
        let report = report(world)?;
        let failed = report["unprogrammed"].as_array().context("no unprogrammed")?;
        let is_bad = |row: &Value| row["address"] == bad.to_string() && row["reason"].to_string().contains("made up");
        ensure!(failed.len() == 1 && failed.iter().all(is_bad), "{when}: {failed:#?}\n{}", world.node(1).agent_log());
        for number in [40, 47] {
            answers(world, number)?;
        }
        world.start_agents(&options)?;
    }
    // Once nft takes it, it is served.
    world.start_agents(&self::options())?;
    eventually(|| answers(world, 44))
}
