//! What is nftables' own: its table is put back when somebody alters it, a start is seen by nobody, one frontend that nft does not take
//! costs the others nothing, and what is served with less than was asked for says so. What Services mean is in the other suites.

use std::{fs, os::unix::fs::PermissionsExt as _, path::PathBuf, process::ExitCode, thread, time::Duration};

use anyhow::{Context, Result, ensure};
use proxy_tests::{
    cases::{
        packets,
        rules::{answers, is_put_back, options, prepare, repaired, report, restart, second, service},
    },
    suite::Suite,
    world::{AgentOptions, Fallback, Family, World, vip, within},
};
use serde_json::Value;

/// More than two sync periods.
const PATIENCE: Duration = Duration::from_secs(10);

fn main() -> ExitCode {
    let shapes = [("nftables".to_owned(), ())];
    Suite::in_worlds(
        "nftables",
        shapes,
        |programs, ()| prepare(programs, Fallback::Nftables),
        |suite, group, (), world| {
            for (what, change) in ALTERATIONS {
                suite.case(&format!("{group}/put back: {what}"), || put_back(world, change));
            }
            suite.case(&format!("{group}/nothing is written without a change"), || quiet(world));
            suite.case(&format!("{group}/A135: a restart is seen by nobody"), || restart(world, Fallback::Nftables));
            suite.case(&format!("{group}/what is not served as asked says so"), || limits(world));
            suite.case(&format!("{group}/what only eBPF has is looked for elsewhere"), || elsewhere(world));
            suite.case(&format!("{group}/A109: what is invalid leaves no pod"), || packets::invalid(world));
            suite.case(&format!("{group}/a second agent is refused"), || {
                ["nftables", "ebpf"].into_iter().try_for_each(|mode| second(world, mode))
            });
            suite.case(&format!("{group}/a frontend that nft does not take costs the others nothing"), || {
                one_bad(world)
            });
        },
    )
}

fn eventually(check: impl Fn() -> Result<()>) -> Result<()> {
    within(PATIENCE, check)
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
    let before = repaired(world)?;
    world.node(1).place.namespace.nft(change)?;
    eventually(|| is_put_back(world, before))?;
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
    let repairs = repaired(world)?;
    world.node(1).place.namespace.nft("add table ip others\ndelete table ip others\n")?;
    thread::sleep(Duration::from_secs(5));
    ensure!(both(world)? == before, "the tables changed with another one");
    ensure!(repaired(world)? == repairs, "another one's table counted as altered");
    Ok(())
}

fn rows(world: &World, name: &str) -> Result<Vec<Value>> {
    let shown: Value = serde_json::from_str(&world.cli(world.node(1), &["services", "-o", "json"])?)?;
    let rows = shown["items"].as_array().context("no items")?.iter().filter(|row| row["name"] == name);
    Ok(rows.cloned().collect())
}

fn limits(world: &mut World) -> Result<()> {
    let objects = service(world, 2, "hashed", Some("maglev"));
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
    let with_bad = AgentOptions { programs, ..options(Fallback::Nftables) };
    let objects: Vec<Value> =
        (40..48).flat_map(|number| service(world, number, &format!("many-{number}"), None)).collect();
    world.start_agents(&with_bad)?;
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
        world.start_agents(&with_bad)?;
    }
    // Once nft takes it, it is served.
    world.start_agents(&options(Fallback::Nftables))?;
    eventually(|| answers(world, 44))
}
