//! What is iptables' own, with nft's and the legacy one: what somebody flushes is put back, a start is seen by nobody, others' rules stay as they
//! are, a lock that is held is waited for, one frontend that iptables does not take costs the others nothing. What Services mean is in the
//! other suites.

use std::{
    fs,
    net::SocketAddr,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use proxy_tests::{
    cases::{
        packets,
        rules::{answers, is_put_back, options, prepare, repaired, report, restart, second, service},
    },
    pod::socket::Transport,
    suite::Suite,
    world::{AgentOptions, Ask, Fallback, Family, World, vip, within},
};
use serde_json::Value;

/// Fifteen sync periods.
const PATIENCE: Duration = Duration::from_secs(30);

fn main() -> ExitCode {
    let shapes = [Fallback::IptablesNft, Fallback::IptablesLegacy].map(|by| (by.name().to_owned(), by));
    Suite::in_worlds(
        "iptables",
        shapes,
        |programs, by| prepare(programs, *by),
        |suite, group, by, world| {
            let by = *by;
            for (what, change) in ALTERATIONS {
                suite.case(&format!("{group}/F61, put back: {what}"), || put_back(world, by, change));
            }
            suite.case(&format!("{group}/others' rules stay as they are"), || others(world, by));
            suite.case(&format!("{group}/nothing is written without a change"), || quiet(world, by));
            suite.case(&format!("{group}/A135: a restart is seen by nobody"), || restart(world, by));
            suite.case(&format!("{group}/A76: forwarded though the firewall drops"), || forwarded(world, by));
            suite.case(&format!("{group}/A109: what is invalid leaves no pod"), || packets::invalid(world));
            suite.case(&format!("{group}/A54: loopback is opened no longer than it is asked for"), || {
                loopback(world, by)
            });
            suite.case(&format!("{group}/nothing of the other flavour is left"), || flavours(world, by));
            suite.case(&format!("{group}/a second agent is refused"), || second(world, "iptables"));
            if by == Fallback::IptablesLegacy {
                suite.case(&format!("{group}/F62: the lock is held"), || locked(world, by));
            }
            suite.case(&format!("{group}/a frontend that iptables does not take costs the others nothing"), || {
                one_bad(world, by)
            });
        },
    )
}

fn eventually(check: impl Fn() -> Result<()>) -> Result<()> {
    within(PATIENCE, check)
}

/// Runs iptables' command of this family with these words on node 1.
fn run(world: &World, by: Fallback, family: Family, suffix: &str, words: &str) -> Result<String> {
    let [v4, v6] = by.iptables().context("no iptables")?;
    let command = format!("{}{suffix}", if family == Family::V4 { v4 } else { v6 });
    world.node(1).place.namespace.output(&command, &words.split_whitespace().collect::<Vec<_>>())
}

/// What `-save` prints, chain by chain, without the times at which it did and what packets changed.
fn saved(world: &World, by: Fallback) -> Result<Vec<String>> {
    let mut lines = Vec::new();
    for family in Family::BOTH {
        let text = run(world, by, family, "-save", "")?;
        let mut table = "";
        for line in text.lines() {
            table = line.strip_prefix('*').unwrap_or(table);
            if let Some(chain) = line.strip_prefix(':') {
                let chain = chain.split(" [").next().unwrap_or_default();
                lines.push((format!("{family} {table}"), chain.to_owned(), format!(":{chain}")));
            } else if let Some(rule) = line.strip_prefix("-A ") {
                let chain = rule.split(' ').next().unwrap_or_default();
                lines.push((format!("{family} {table} rules"), chain.to_owned(), line.to_owned()));
            }
        }
    }
    // New chains come last, whatever their names are. Rules of a chain stay in their order.
    lines.sort_by(|(table, chain, _), (other, another, _)| (table, chain).cmp(&(other, another)));
    Ok(lines.into_iter().map(|(_, _, line)| line).collect())
}

const ALTERATIONS: [(&str, &[(Family, &str)]); 8] = [
    ("nat is flushed", &[(Family::V4, "-t nat -F")]),
    ("filter is flushed", &[(Family::V6, "-t filter -F")]),
    ("nat is flushed and its chains are gone", &[(Family::V4, "-t nat -F"), (Family::V4, "-t nat -X")]),
    ("mangle is flushed", &[(Family::V4, "-t mangle -F")]),
    ("nobody is led to us", &[(Family::V4, "-t nat -F PREROUTING")]),
    ("a list is emptied", &[(Family::V6, "-t nat -F PROXY-SERVICES")]),
    ("a rule says something else", &[(Family::V6, "-t filter -R PROXY-REJECT 2 -j ACCEPT")]),
    ("a rule is added", &[(Family::V4, "-t nat -I PROXY-SERVICES -j RETURN")]),
];

fn put_back(world: &World, by: Fallback, changes: &[(Family, &str)]) -> Result<()> {
    answers(world, 1)?;
    let (before, rules) = (repaired(world)?, saved(world, by)?);
    for (family, words) in changes {
        run(world, by, *family, "", words)?;
    }
    eventually(|| is_put_back(world, before))?;
    ensure!(saved(world, by)? == rules, "not what it was");
    Ok(())
}

/// Those of a container runtime and of a firewall, with words in them that are ours.
fn others(world: &mut World, by: Fallback) -> Result<()> {
    let foreign = [
        "-t nat -N DOCKER",
        "-t nat -A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER",
        "-t nat -A DOCKER -p tcp --dport 4711 -j REDIRECT --to-ports 80",
        "-t filter -N PROXY-OTHERS",
        "-t filter -A INPUT -m comment --comment PROXY-SERVICES -j PROXY-OTHERS",
        "-t filter -A PROXY-OTHERS -p tcp --dport 9 -j DROP",
        "-t mangle -A PREROUTING -p udp --dport 9 -j MARK --set-xmark 0x1/0x1",
        "-t raw -A PREROUTING -p udp --dport 9 -j NOTRACK",
    ];
    for family in Family::BOTH {
        for words in foreign {
            run(world, by, family, "", words)?;
        }
    }
    let alien = |world: &World| -> Result<Vec<String>> {
        let ours = |line: &String| {
            let words: Vec<&str> = line.split(' ').collect();
            let target = words.iter().position(|word| *word == "-j").and_then(|at| words.get(at + 1));
            let is_ours = |name: &str| name.starts_with("PROXY-") && name != "PROXY-OTHERS";
            line.strip_prefix(':').is_some_and(is_ours)
                || words.get(1).is_some_and(|name| is_ours(name))
                || target.is_some_and(|name| is_ours(name))
        };
        Ok(saved(world, by)?.into_iter().filter(|line| !ours(line)).collect())
    };
    let before = alien(world)?;
    ensure!(before.iter().any(|line| line.contains("DOCKER")), "{before:#?}");
    let objects = service(world, 3, "come", None);
    world.apply(&objects)?;
    answers(world, 3)?;
    ensure!(alien(world)? == before, "after a change: {:#?}", alien(world)?);
    run(world, by, Family::V4, "", "-t nat -F PROXY-SERVICES")?;
    eventually(|| answers(world, 3))?;
    world.start_agents(&options(by))?;
    answers(world, 3)?;
    ensure!(alien(world)? == before, "after a start: {:#?}", alien(world)?);
    Ok(())
}

/// Packets that the first list counted. Rules that were written again begin at nothing.
fn counted(world: &World, by: Fallback) -> Result<u64> {
    let listed = run(world, by, Family::V4, "", "-t nat -S PROXY-SERVICES -v")?;
    let counts = listed.lines().filter_map(|line| line.split_once(" -c ")?.1.split(' ').next()?.parse::<u64>().ok());
    Ok(counts.sum())
}

fn quiet(world: &World, by: Fallback) -> Result<()> {
    answers(world, 1)?;
    let (rules, repairs, packets) = (saved(world, by)?, repaired(world)?, counted(world, by)?);
    ensure!(packets > 0, "nothing is counted");
    thread::sleep(Duration::from_secs(5));
    run(world, by, Family::V4, "", "-t nat -N SOMEBODY")?;
    run(world, by, Family::V4, "", "-t nat -X SOMEBODY")?;
    thread::sleep(Duration::from_secs(5));
    ensure!(saved(world, by)? == rules, "the rules changed");
    ensure!(counted(world, by)? >= packets, "the rules were written again");
    ensure!(repaired(world)? == repairs, "another one's chain counted as altered");
    // By now all was seen to be as it should, and nobody looks until something changes.
    for (what, change) in ALTERATIONS.into_iter().skip(5) {
        thread::sleep(Duration::from_secs(5));
        put_back(world, by, change).with_context(|| format!("after a while without a change: {what}"))?;
    }
    Ok(())
}

fn forwarded(world: &World, by: Fallback) -> Result<()> {
    let outside = |world: &World| -> Result<()> {
        for family in Family::BOTH {
            let to = SocketAddr::new(world.node(1).place.ip(family), 30_001);
            let report = world.ask(world.outside(), &Ask::new(to, Transport::Tcp).times(6).timeout(500))?;
            ensure!(report.errors().is_empty(), "outside to {to}: {:?}", report.errors());
        }
        Ok(())
    };
    outside(world)?;
    for family in Family::BOTH {
        run(world, by, family, "", "-P FORWARD DROP")?;
    }
    let seen = outside(world);
    for family in Family::BOTH {
        run(world, by, family, "", "-P FORWARD ACCEPT")?;
    }
    seen
}

/// Whatever becomes of the rule in which it stands what the setting was before, as long as an agent runs.
fn loopback(world: &mut World, by: Fallback) -> Result<()> {
    route_localnet_is(world, "1")?;
    let before = repaired(world)?;
    run(world, by, Family::V4, "", "-t filter -F")?;
    eventually(|| {
        ensure!(repaired(world)? > before, "nothing was repaired\n{}", world.node(1).agent_log());
        Ok(())
    })?;
    let not_asked = AgentOptions { extra: not_on_loopback(by), fallback: None, ..options(by) };
    for (options, wanted) in [(&options(by), "1"), (&not_asked, "0"), (&options(by), "1")] {
        world.start_agents(options)?;
        route_localnet_is(world, wanted)?;
        answers(world, 1)?;
    }
    Ok(())
}

fn route_localnet_is(world: &World, wanted: &str) -> Result<()> {
    let text = world.node(1).place.namespace.output("cat", &["/proc/sys/net/ipv4/conf/all/route_localnet"])?;
    ensure!(text.trim() == wanted, "route_localnet is {text}");
    Ok(())
}

/// An agent takes over with the other flavour, and one with this one again; the last is not asked for what takes a setting.
fn flavours(world: &mut World, by: Fallback) -> Result<()> {
    let other = if by == Fallback::IptablesNft { Fallback::IptablesLegacy } else { Fallback::IptablesNft };
    let not_asked = AgentOptions { extra: not_on_loopback(by), fallback: None, ..options(by) };
    for (from, to, options, wanted) in [
        (by, other, options(other), "1"),
        (other, by, options(by), "1"),
        (by, other, options(other), "1"),
        (other, by, not_asked, "0"),
    ] {
        world.start_agents(&options)?;
        let ours = |line: &String| line.starts_with(":PROXY-") && !line.starts_with(":PROXY-OTHERS");
        eventually(|| {
            let left: Vec<String> = saved(world, from)?.into_iter().filter(ours).collect();
            ensure!(left.is_empty(), "of {}: {left:#?}\n{}", from.name(), world.node(1).agent_log());
            Ok(())
        })?;
        ensure!(saved(world, to)?.iter().any(ours), "nothing is there of {}", to.name());
        route_localnet_is(world, wanted)?;
        answers(world, 1)?;
    }
    world.start_agents(&options(by))
}

/// What an agent is told that is asked for no node ports of 127.0.0.1.
fn not_on_loopback(by: Fallback) -> Vec<String> {
    let flavour = by.name().trim_start_matches("iptables-");
    let others = ["--proxy-mode", "iptables", "--iptables-flavour", flavour].map(str::to_owned);
    options(by).extra.into_iter().chain(others).collect()
}

/// Programs that stand before the real ones: the words in `before` come first, with the input in `$input`.
fn wrapper(world: &World, by: Fallback, before: &str) -> Result<PathBuf> {
    let dir = world.objects_dir().join("../programs");
    fs::create_dir_all(&dir)?;
    for command in by.iptables().context("no iptables")? {
        let name = format!("{command}-restore");
        let real = ["/usr/sbin", "/sbin", "/usr/bin"].map(|dir| Path::new(dir).join(&name));
        let real = real.iter().find(|path| path.exists()).with_context(|| format!("no {name}"))?.display();
        let script = format!(
            "#!/bin/sh\ninput=$(mktemp)\ntrap 'rm -f \"$input\"' EXIT\ncat > \"$input\"\n{before}\n{real} \"$@\" < \"$input\"\n"
        );
        let path = dir.join(&name);
        fs::write(&path, script)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    }
    Ok(dir)
}

/// Held for longer than is waited for it: a change waits, and comes into force once it is free. The lock is this test's own.
fn locked(world: &mut World, by: Fallback) -> Result<()> {
    let lock = world.objects_dir().join("../xtables.lock");
    let programs = Some(wrapper(world, by, &format!("export XTABLES_LOCKFILE={}", lock.display()))?);
    world.start_agents(&AgentOptions { programs, ..options(by) })?;
    let failures = |world: &World| world.node(1).metric("kubeproxy_sync_proxy_rules_iptables_restore_failures_total");
    let before = failures(world)?;
    let file = fs::File::options().create(true).append(true).open(&lock)?;
    file.lock()?;
    for object in service(world, 4, "patient", None) {
        world.write(&object)?;
    }
    let since = Instant::now();
    // Each family waits for it in turn, and so does the next try.
    within(Duration::from_secs(45), || {
        ensure!(failures(world)? > before, "no failure was counted");
        ensure!(report(world)?["frontends"]["degraded"].as_u64() > Some(0), "nothing is degraded");
        Ok(())
    })?;
    ensure!(since.elapsed() > Duration::from_secs(4), "it was not waited for");
    // What was in force is.
    answers(world, 1)?;
    thread::sleep(Duration::from_secs(3));
    ensure!(failures(world)? < before + 8.0, "it is tried without a pause");
    drop(file);
    within(Duration::from_secs(60), || answers(world, 4))?;
    answers(world, 1)?;
    world.start_agents(&options(by))
}

fn one_bad(world: &mut World, by: Fallback) -> Result<()> {
    let bad = vip(Family::V4, 44);
    let refuse = format!(
        "if grep -q 'default/many-44' \"$input\" && grep -q '{bad}/32' \"$input\"; then echo 'made up' >&2; exit 1; fi"
    );
    let programs = Some(wrapper(world, by, &refuse)?);
    let with_bad = AgentOptions { programs, ..options(by) };
    let objects: Vec<Value> =
        (40..48).flat_map(|number| service(world, number, &format!("many-{number}"), None)).collect();
    world.start_agents(&with_bad)?;
    // By a change, and at a start.
    world.apply(&objects)?;
    for when in ["a change", "a start"] {
        let is_bad =
            |row: &Value| row["service"] == "default/many-44:web" || row["reason"].to_string().contains("made up");
        // It may be asked a moment before the report of what was done is out.
        within(PATIENCE, || {
            let report = report(world)?;
            let failed = report["unprogrammed"].as_array().context("no unprogrammed")?;
            ensure!(
                !failed.is_empty() && failed.iter().all(is_bad),
                "{when}: {failed:#?}\n{}",
                world.node(1).agent_log()
            );
            Ok(())
        })?;
        for number in [1, 40, 47] {
            answers(world, number)?;
        }
        let rules = saved(world, by)?;
        ensure!(!rules.iter().any(|line| line.contains("PROXT-")), "what was tried stays: {rules:#?}");
        world.start_agents(&with_bad)?;
    }
    // Once iptables takes it, it is served.
    world.start_agents(&options(by))?;
    eventually(|| answers(world, 44))
}
