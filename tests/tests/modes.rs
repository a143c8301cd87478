//! Which dataplane runs: the first that the node can run, or the one that is asked for, and what is said where neither can.

use std::{
    fs,
    net::SocketAddr,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use proxy_tests::{
    pod::socket::Transport,
    suite::Suite,
    world::{AgentOptions, Ask, Family, Programs, SocketLb, Spec, Topology, World, objects, pins, vip},
};
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(30);

/// All that rules of netfilter's need, and less than eBPF does.
const RULES_ALONE: &str = "+net_admin,+net_raw,+dac_override";
const WITHOUT_RAW: &str = "+net_admin,+dac_override";
const NOTHING: &str = "+dac_override";
/// Of both flavours.
const IPTABLES_TOOLS: &[&str] = &[
    "iptables-nft",
    "iptables-nft-restore",
    "iptables-nft-save",
    "ip6tables-nft",
    "ip6tables-nft-restore",
    "ip6tables-nft-save",
    "iptables-legacy",
    "iptables-legacy-restore",
    "iptables-legacy-save",
    "ip6tables-legacy",
    "ip6tables-legacy-restore",
    "ip6tables-legacy-save",
];
/// Everything but nft.
const WITHOUT_TOOLS: &str = "/nonexistent";

fn main() -> ExitCode {
    Suite::in_worlds("modes", [("modes".to_owned(), ())], prepare, |suite, group, _, world| {
        // First, for without its commands nobody can tell whose the tables are that the old iptables makes.
        suite.case(&format!("{group}/cleanup takes away what it can, also without nft"), || cleans_up_as_it_can(world));
        suite.case(&format!("{group}/check names every mode and who lacks what"), || checks(world));
        suite.case(&format!("{group}/auto takes eBPF where it can"), || {
            serves_as(world, None, None, "ebpf", "auto: ebpf can run here")
        });
        suite.case(&format!("{group}/auto loads eBPF's programs once, and none that are pinned"), || loads_once(world));
        suite.case(&format!("{group}/a mode that cannot run says which could"), || refused(world));
        suite.case(&format!("{group}/auto without CAP_BPF takes nftables"), || {
            serves_as(world, Some(RULES_ALONE), None, "nftables", "CAP_BPF: missing")
        });
        suite.case(&format!("{group}/auto without CAP_BPF and nft takes iptables"), || {
            let tools = tools(world, "without-nft", IPTABLES_TOOLS)?;
            serves_as(
                world,
                Some(RULES_ALONE),
                Some(tools),
                "iptables",
                "nftables cannot run here (nft cannot be started",
            )
        });
        suite.case(&format!("{group}/cleanup takes away what every mode left and nothing else"), || cleans_up(world));
    })
}

fn prepare(programs: Programs, (): &()) -> Result<World> {
    let world = World::new(&Spec::two_nodes(Topology::Routed), programs)?;
    let service = objects::service("web").cluster_ips(&Family::BOTH.map(|family| vip(family, 1))).port("", "TCP", 80);
    let slice = |family| objects::slice("web", family).port("", "TCP", 8080).endpoint(world.pod("b2")).json();
    let objects = [objects::nodes(&world), vec![service.json()], Family::BOTH.map(slice).to_vec()].concat();
    objects.iter().try_for_each(|object| world.write(object))?;
    Ok(world)
}

/// What the agent's binary says on node 1: exit status, stdout, stderr.
fn said(
    world: &World,
    capabilities: Option<&str>,
    path: Option<&str>,
    bpffs: &Path,
    args: &[&str],
) -> Result<(Option<i32>, String, String)> {
    let node = world.node(1);
    // One that should have failed and runs must not run for ever.
    let mut command = node.place.command("/usr/bin/timeout")?;
    command.arg("60");
    if let Some(capabilities) = capabilities {
        command.args(["/usr/bin/setpriv", &format!("--bounding-set=-all,{capabilities}")]);
    }
    command.arg(&world.programs().agent).args(args).arg("--bpffs").arg(bpffs);
    if args.first() != Some(&"cleanup") {
        command.arg("--cgroup-root").arg(&node.cgroup);
    }
    if let Some(path) = path {
        command.env("PATH", path);
    }
    let done = command.output()?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ok((done.status.code(), text(&done.stdout), text(&done.stderr)))
}

/// How `check` was asked, and what it is to say.
struct Asked<'a> {
    capabilities: Option<&'a str>,
    path: Option<&'a str>,
    bpffs: &'a Path,
    args: &'a [&'a str],
    exit: i32,
    /// Of each mode in [`MODES`].
    wanted: [Said<'a>; 4],
}

const MODES: [&str; 4] = ["mode ebpf", "mode nftables", "mode iptables", "mode ipvs"];

/// What of one mode.
#[derive(Clone, Copy)]
enum Said<'a> {
    Runs,
    Taken,
    /// What is lacking, and what to do about it.
    Lacks(&'a str, &'a str),
    /// The same, and so the agent cannot run.
    Fails(&'a str, &'a str),
}

fn checks(world: &mut World) -> Result<()> {
    use Said::{Fails, Lacks, Runs, Taken};
    let bpffs = world.node(1).bpffs.clone();
    let elsewhere = world.objects_dir();
    let without_nft = tools(world, "without-nft", IPTABLES_TOOLS)?;
    let without_nft = without_nft.to_str().context("a path")?;
    let ipvs = if World::without_ipvs().is_some() { Lacks("no IPVS", "modprobe ip_vs") } else { Runs };
    let no_ipvs_tools = if World::without_ipvs().is_some() { ipvs } else { Lacks("nft cannot be started", "nftables") };
    let (no_bpf, nothing) = (("CAP_BPF", "add BPF"), ("CAP_NET_ADMIN", "add NET_ADMIN"));
    let (no_nft, no_iptables) = (("nft cannot be", "package nftables"), ("cannot be started", "package iptables"));
    let lacks = |(what, remedy)| Lacks(what, remedy);
    let fails = |(what, remedy)| Fails(what, remedy);
    let all = Asked { capabilities: None, path: None, bpffs: &bpffs, args: &[], exit: 0, wanted: [Runs; 4] };
    let rules = Asked { capabilities: Some(RULES_ALONE), ..all };
    let bare = Asked { path: Some(WITHOUT_TOOLS), ..all };
    let raw = Asked { capabilities: Some(WITHOUT_RAW), ..all };
    let rows = [
        Asked { wanted: [Taken, Runs, Runs, ipvs], ..all },
        Asked { wanted: [lacks(no_bpf), Taken, Runs, ipvs], ..rules },
        Asked { args: &["--proxy-mode", "ebpf"], exit: 1, wanted: [fails(no_bpf), Runs, Runs, ipvs], ..rules },
        Asked { path: Some(without_nft), wanted: [lacks(no_bpf), lacks(no_nft), Taken, no_ipvs_tools], ..rules },
        Asked { bpffs: &elsewhere, wanted: [Lacks("is not on a bpf", "mount"), Taken, Runs, ipvs], ..all },
        Asked { wanted: [Taken, lacks(no_nft), lacks(no_iptables), no_ipvs_tools], ..bare },
        Asked {
            args: &["--proxy-mode", "nftables"],
            exit: 1,
            wanted: [Runs, fails(no_nft), lacks(no_iptables), no_ipvs_tools],
            ..bare
        },
        Asked {
            capabilities: Some(NOTHING),
            exit: 1,
            wanted: [fails(no_bpf), fails(nothing), fails(nothing), fails(nothing)],
            ..all
        },
        // As `run` would be told.
        Asked {
            args: &["--proxy-mode", "iptables", "--iptables-flavour", "legacy"],
            exit: 1,
            wanted: [lacks(no_bpf), Runs, Fails("CAP_NET_RAW", "add NET_RAW"), ipvs],
            ..raw
        },
        Asked {
            args: &[
                "--proxy-mode",
                "iptables",
                "--iptables-flavour=nft",
                "--iptables-masquerade-bit=5",
                "--iptables-localhost-nodeports",
            ],
            wanted: [lacks(no_bpf), Runs, Runs, ipvs],
            ..raw
        },
    ];
    rows.iter().try_for_each(|row| is_said(world, row))
}

fn is_said(world: &World, asked: &Asked<'_>) -> Result<()> {
    let Asked { capabilities, path, bpffs, args, exit, wanted } = *asked;
    let what = format!("{args:?}, {capabilities:?}, PATH {path:?}, {}", bpffs.display());
    let (code, out, err) = said(world, capabilities, path, bpffs, &[&["check", "-o", "json"], args].concat())?;
    let list: Value = serde_json::from_str(&out).with_context(|| format!("{what}: {out} {err}"))?;
    let items = list["items"].as_array().context("no items")?;
    let (_, lines, _) = said(world, capabilities, path, bpffs, &[&["check"], args].concat())?;
    for (name, wanted) in MODES.into_iter().zip(wanted) {
        let (result, words, todo) = match wanted {
            Said::Runs => ("ok", "can run", ""),
            Said::Taken => ("ok", "can run, and auto takes it", ""),
            Said::Lacks(words, todo) => ("warning", words, todo),
            Said::Fails(words, todo) => ("failed", words, todo),
        };
        let item = items.iter().find(|item| item["name"] == name);
        let item = item.with_context(|| format!("{what}: no {name}: {out}"))?;
        let [detail, remedy] = ["detail", "remedy"].map(|field| item[field].as_str().unwrap_or_default());
        let is_it = item["result"] == result && detail.contains(words) && remedy.contains(todo);
        ensure!(
            is_it && remedy.is_empty() == todo.is_empty(),
            "{what}: wanted {result} {words:?} {todo:?}, not {item}"
        );
        // The same in one line.
        let mut of_mode = lines.lines().filter(|line| line.contains(&format!(" {name}: ")));
        let line = of_mode.next().with_context(|| format!("{what}: no line of {name}: {lines}"))?;
        let end = if todo.is_empty() { detail.to_owned() } else { format!("{detail}; {remedy}") };
        ensure!(line.ends_with(&end) && of_mode.next().is_none(), "{what}: wanted {end:?}, not {lines}");
    }
    ensure!(code == Some(exit), "{what}: exit status {code:?}: {out} {err}");
    Ok(())
}

/// A directory of these programs of the system's, and no others.
fn tools(world: &World, name: &str, tools: &[&str]) -> Result<PathBuf> {
    let dir = world.objects_dir().with_file_name(name);
    fs::create_dir_all(&dir)?;
    for tool in tools {
        let real = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(|dir| Path::new(dir).join(tool));
        let real = real.iter().find(|path| path.exists()).with_context(|| format!("no {tool}"))?;
        let link = dir.join(tool);
        if !link.exists() {
            symlink(real, link)?;
        }
    }
    Ok(dir)
}

/// Nothing of ours is made by one that fails.
fn refused(world: &mut World) -> Result<()> {
    let without_numgen = world.nft_without_numgen()?;
    let mut rows = vec![
        (Some(RULES_ALONE), None, "ebpf", &["CAP_BPF", "--proxy-mode nftables could run here"][..]),
        (None, Some(WITHOUT_TOOLS), "nftables", &["nft cannot be started", "--proxy-mode ebpf could run here"]),
        (
            Some(RULES_ALONE),
            Some(WITHOUT_TOOLS),
            "ebpf",
            &["CAP_BPF", "no other mode can run here either", "nft cannot be started"],
        ),
        (
            Some(RULES_ALONE),
            Some(WITHOUT_TOOLS),
            "auto",
            &["none of the dataplanes can run", "CAP_BPF", "root", "nft cannot be started", "check"],
        ),
    ];
    if World::without_ipvs().is_some() {
        // With it, it would be the one that runs: a case of IPVS' suite.
        let why = &[
            "nftables cannot run here (nft: no numgen",
            "iptables cannot run here (",
            "ipvs cannot run here (the kernel has no IPVS; `modprobe",
        ];
        rows.push((Some(RULES_ALONE), without_numgen.to_str(), "auto", why));
    }
    let source = world.objects_dir();
    let source = source.to_str().context("a path")?;
    let absent = world.node(1).bpffs.join("absent");
    for (capabilities, path, mode, words) in rows {
        let args =
            ["run", "--source", source, "--hostname-override", "node1", "--log-level", "off", "--proxy-mode", mode];
        let (code, _, err) = said(world, capabilities, path, &absent, &args)?;
        ensure!(code == Some(3), "{mode} {capabilities:?}: {code:?} {err}");
        ensure!(
            words.iter().all(|word| err.contains(word)) && err.lines().count() == 1,
            "{mode} {capabilities:?}: {err}"
        );
        ensure!(!absent.exists(), "{mode} {capabilities:?} left pins");
    }
    Ok(())
}

/// The mode and its reason: in the report, at /proxyMode, as a metric, in the log.
fn serves_as(
    world: &mut World,
    capabilities: Option<&str>,
    programs: Option<PathBuf>,
    mode: &str,
    reason: &str,
) -> Result<()> {
    world.remove_agents()?;
    let options = AgentOptions {
        capabilities: capabilities.map(str::to_owned),
        only_programs: programs.is_some(),
        programs,
        ..AgentOptions::new(SocketLb::All)
    };
    world.start_agent(1, &options)?;
    let node = world.node(1);
    node.wait_ready(PATIENCE)?;
    let told = node.http(10249, "/proxyMode")?;
    ensure!(told == (200, mode.to_owned()), "/proxyMode: {told:?}");
    let status = node.status()?;
    let why = status["modeReason"].as_str().unwrap_or_default();
    ensure!(status["mode"] == mode && why.contains(reason), "{} {why}", status["mode"]);
    let metrics = node.http(10249, "/metrics")?.1;
    ensure!(metrics.contains(&format!("proxy_agent_mode{{mode=\"{mode}\"}} 1")), "{metrics}");
    ensure!(node.metric("proxy_agent_mode")? == 1.0, "more than one mode: {metrics}");
    let info = metrics
        .lines()
        .find(|line| line.starts_with(&format!("proxy_agent_mode_info{{mode=\"{mode}\",reason=\"auto: ")));
    ensure!(info.is_some_and(|info| info.contains(reason) && info.ends_with("} 1")), "{metrics}");
    let log = node.agent_log();
    ensure!(log.contains(&format!("mode=\"{mode}\"")) && log.contains(reason), "{log}");
    for family in Family::BOTH {
        let to = SocketAddr::new(vip(family, 1), 80);
        let report = world.ask(world.pod("a1"), &Ask::new(to, Transport::Tcp))?;
        ensure!(report.backends().keys().eq(["b2"]), "{mode}, {to}: {report:?}");
    }
    world.remove_agents()
}

/// Whether it can run is found by starting it, which is most of what a start takes.
fn loads_once(world: &mut World) -> Result<()> {
    /// What the kernel keeps of a name.
    const NAME: usize = 15;
    world.remove_agents()?;
    for loads in [1, 0] {
        world.start_agent(1, &AgentOptions { traced: true, ..AgentOptions::new(SocketLb::All) })?;
        let node = world.node(1);
        node.wait_ready(PATIENCE)?;
        let calls = node.bpf_calls()?;
        let pinned = fs::read_dir(node.bpffs.join("v1/programs"))?;
        let pinned = pinned.map(|entry| -> Result<String> { Ok(entry?.file_name().to_string_lossy().into_owned()) });
        let pinned = pinned.collect::<Result<Vec<_>>>()?;
        ensure!(!pinned.is_empty() && !calls.is_empty(), "{pinned:?} pinned, {} calls traced", calls.len());
        for name in &pinned {
            let name = name.get(..NAME).unwrap_or(name);
            let times = calls.iter().filter(|call| call.program.as_deref() == Some(name)).count();
            ensure!(times == loads, "{name} was loaded {times} times, not {loads}");
        }
        ensure!(node.status()?["modeReason"] == "auto: ebpf can run here", "{}", node.status()?["modeReason"]);
        world.kill_agent(1)?;
    }
    world.remove_agents()
}

/// All that an agent may change of a node.
fn state(world: &World) -> Result<Vec<String>> {
    let node = world.node(1);
    let namespace = &node.place.namespace;
    let output = |words: &str| {
        let words: Vec<&str> = words.split(' ').collect();
        let (program, args) = words.split_first().context("a command")?;
        namespace.output(program, args)
    };
    let mut state =
        ["nft -s list ruleset", "ip -o -d link show", "tc qdisc show", "ip rule show", "ip route show table all"]
            .into_iter()
            .map(output)
            .collect::<Result<Vec<_>>>()?;
    for path in ["ipv4/ip_forward", ROUTE_LOCALNET, "ipv4/conf/all/rp_filter", "ipv6/conf/all/forwarding"] {
        state.push(output(&format!("cat /proc/sys/net/{path}"))?);
    }
    for words in ["iptables-legacy-save", "ip6tables-legacy-save", "ipset save -sorted"] {
        let text = output(words)?;
        // Not when it was, nor counters.
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        state.push(lines.map(|line| line.split(" [").next().unwrap_or_default()).collect::<Vec<_>>().join("\n"));
    }
    for link in links(world)? {
        for way in ["ingress", "egress"] {
            state.push(format!("{link} {way}: {}", output(&format!("tc filter show dev {link} {way}"))?));
        }
    }
    state.push(format!("programs of the cgroup: {:?}", pins::on_cgroup(&node.cgroup)?));
    let others = others(world);
    let pinned = fs::read_dir(&others).into_iter().flatten().flatten().map(|entry| entry.file_name());
    state.push(format!("{}: {:?}", others.display(), pinned.collect::<Vec<_>>()));
    Ok(state)
}

/// Somebody's pins, beside ours.
fn others(world: &World) -> PathBuf {
    world.node(1).bpffs.with_file_name("others")
}

fn links(world: &World) -> Result<Vec<String>> {
    let text = world.node(1).place.namespace.output("ip", &["-o", "link", "show"])?;
    let name =
        |line: &str| line.split([' ', ':', '@']).find(|word| word.starts_with(char::is_alphabetic)).map(str::to_owned);
    Ok(text.lines().filter_map(name).collect())
}

fn put_back(world: &World, restore: &[&str], rules: &str) -> Result<()> {
    let file = world.objects_dir().join("left.rules");
    fs::write(&file, rules)?;
    let file = file.to_string_lossy();
    world.node(1).place.namespace.output(restore[0], &[&restore[1..], &[&*file]].concat()).map(drop)
}

fn is_as(world: &World, before: &[String]) -> Result<()> {
    for (before, after) in before.iter().zip(&state(world)?) {
        ensure!(before == after, "before:\n{before}\nafter:\n{after}");
    }
    Ok(())
}

/// How the rules of a mode are read, and how they are put back.
struct Save {
    save: &'static [&'static str],
    restore: &'static [&'static str],
}

const NFTABLES: [Save; 2] = [
    Save { save: &["nft", "list", "table", "ip", "proxy-agent"], restore: &["nft", "-f"] },
    Save { save: &["nft", "list", "table", "ip6", "proxy-agent"], restore: &["nft", "-f"] },
];
const IPTABLES: [Save; 2] = [
    Save { save: &["iptables-nft-save"], restore: &["iptables-nft-restore"] },
    Save { save: &["ip6tables-nft-save"], restore: &["ip6tables-nft-restore"] },
];
const LEGACY: [Save; 2] = [
    Save { save: &["iptables-legacy-save"], restore: &["iptables-legacy-restore"] },
    Save { save: &["ip6tables-legacy-save"], restore: &["ip6tables-legacy-restore"] },
];

/// What an agent is told, and with that changes all of a node that its mode may change.
const BY_NFTABLES: &[&str] = &["--proxy-mode", "nftables"];
const BY_NFT: &[&str] = &["--proxy-mode", "iptables", "--iptables-flavour", "nft", "--iptables-localhost-nodeports"];
const BY_LEGACY: &[&str] =
    &["--proxy-mode", "iptables", "--iptables-flavour", "legacy", "--iptables-localhost-nodeports"];
const ROUTE_LOCALNET: &str = "ipv4/conf/all/route_localnet";

fn cleans_up(world: &mut World) -> Result<()> {
    let foreign = "table ip other {\n chain proxy-agent {\n type filter hook forward priority 5;\n counter accept\n }\n}\n\
                   table inet proxy-agent {\n set frontends {\n type ipv4_addr;\n elements = { 10.96.0.1 }\n }\n}\n";
    let node = &world.node(1).place.namespace;
    node.nft(foreign)?;
    // iptables makes tables for its chains, which are everybody's from then on.
    for by in [BY_NFT, BY_LEGACY] {
        run_and_end(world, by)?;
        world.cli(world.node(1), &["cleanup"])?;
    }
    ensure!(!state(world)?.iter().any(|text| text.contains("PROXY-")), "{:?}", state(world)?);
    // Names and words like ours, in the tables that we write to; the qdisc that our filters would be of without TCX.
    let node = &world.node(1).place.namespace;
    for tool in ["iptables-nft", "ip6tables-nft"] {
        for args in
            ["-N PROXYING", "-A PROXYING -m comment --comment PROXY-SERVICES -j RETURN", "-A POSTROUTING -j PROXYING"]
        {
            let args: Vec<&str> = ["-t", "nat"].into_iter().chain(args.split(' ')).collect();
            node.output(tool, &args)?;
        }
    }
    // Whoever restores such tables makes chains of theirs that nothing is in.
    for Save { save, restore } in &IPTABLES {
        put_back(world, restore, &node.output(save[0], &save[1..])?)?;
    }
    for tool in ["iptables-legacy", "ip6tables-legacy"] {
        node.output(tool, &["-t", "nat", "-N", "PROXY-MINE"])?;
    }
    for words in ["create proxy-agent hash:ip", "add proxy-agent 10.96.0.1", "create KUBE-SRC-ABCDEF hash:ip"] {
        node.output("ipset", &words.split(' ').collect::<Vec<_>>())?;
    }
    let links = links(world)?;
    for link in &links {
        node.output("tc", &["qdisc", "add", "dev", link, "clsact"])?;
        for way in ["ingress", "egress"] {
            let add = ["filter", "add", "dev", link, way, "pref", "7", "bpf", "bytecode", "1,6 0 0 0"];
            node.output("tc", &add)?;
        }
    }
    let others = others(world);
    fs::create_dir(&others)?;
    pins::attach_others(&world.node(1).cgroup, &others.join("connect4"))?;
    let before = state(world)?;
    // A mode that takes over removes what another one left, so each is alone first, and its rules are put back beside the pins of the last.
    let mut rules = Vec::new();
    for (by, saves) in [(BY_NFTABLES, &NFTABLES), (BY_NFT, &IPTABLES), (BY_LEGACY, &LEGACY)] {
        run_and_end(world, by)?;
        ensure!(state(world)? != before, "{by:?} leaves nothing to remove");
        ensure!((route_localnet(world)? == "1") == (saves[0].save != NFTABLES[0].save), "{by:?}: loopback");
        for Save { save, restore } in saves {
            rules.push((restore, world.node(1).place.namespace.output(save[0], &save[1..])?));
        }
        world.cli(world.node(1), &["cleanup"])?;
        is_as(world, &before)?;
    }
    run_and_end(world, &["--proxy-mode", "ebpf"])?;
    for (restore, text) in rules {
        put_back(world, restore, &text)?;
    }
    world.node(1).place.namespace.sysctl(&[(ROUTE_LOCALNET, "1")])?;
    let bpffs = world.node(1).bpffs.clone();
    let left = state(world)?;
    ensure!(left != before, "nothing was left to remove");
    let (code, out, err) = said(world, None, None, &bpffs, &["cleanup", "--dry-run"])?;
    for line in [
        "would remove table ip proxy-agent (nftables)",
        "would remove table ip6 proxy-agent (nftables)",
        "chains of iptables (nft)",
        "chains of iptables (legacy)",
        "links/connect4",
    ] {
        ensure!(out.contains(line), "no {line:?} in {code:?} {out} {err}");
    }
    ensure!(state(world)? == left, "a dry run removed something");
    let (code, out, err) = said(world, None, None, &bpffs, &["cleanup"])?;
    ensure!(code == Some(0) && out.contains("removed table ip6 proxy-agent (nftables)"), "{code:?} {out} {err}");
    is_as(world, &before)?;
    let (code, out, _) = said(world, None, None, &bpffs, &["cleanup", "--kube-proxy"])?;
    ensure!(
        code == Some(0) && out.contains("nothing is pinned here") && out.contains("no rules of kube-proxy"),
        "{out}"
    );
    is_as(world, &before)?;
    let node = &world.node(1).place.namespace;
    for link in &links {
        node.output("tc", &["qdisc", "del", "dev", link, "clsact"])?;
    }
    fs::remove_dir_all(&others)?;
    node.nft("flush ruleset")
}

/// An iptables of the newer kind whose rules are ours, and stay.
const STAYS: [(&str, &str); 3] = [
    ("", "echo 'iptables v1.8.9 (nf_tables)'"),
    ("-save", "echo '*nat\n:PROXY-SERVICES - [0:0]\nCOMMIT'"),
    ("-restore", "echo busy >&2; exit 1"),
];

/// Neither for want of nft does anything stay, nor because something else cannot go.
fn cleans_up_as_it_can(world: &mut World) -> Result<()> {
    let before = state(world)?;
    run_and_end(world, BY_NFTABLES)?;
    let node = &world.node(1).place.namespace;
    let rules: Vec<String> =
        NFTABLES.iter().map(|Save { save, .. }| node.output(save[0], &save[1..])).collect::<Result<_>>()?;
    let bpffs = world.node(1).bpffs.clone();
    let (code, out, err) = said(world, None, Some(WITHOUT_TOOLS), &bpffs, &["cleanup"])?;
    ensure!(code == Some(0) && out.contains("removed table ip6 proxy-agent (nftables)"), "{code:?} {out} {err}");
    is_as(world, &before)?;
    // Pins are the last to go. One mode removes what another left, so these are put back.
    run_and_end(world, &["--proxy-mode", "ebpf"])?;
    for (Save { restore, .. }, text) in NFTABLES.iter().zip(&rules) {
        put_back(world, restore, text)?;
    }
    let dir = world.objects_dir().with_file_name("stays");
    fs::create_dir_all(&dir)?;
    for (ip, (of, script)) in ["iptables-nft", "ip6tables-nft"].into_iter().flat_map(|ip| STAYS.map(|one| (ip, one))) {
        let path = dir.join(format!("{ip}{of}"));
        fs::write(&path, format!("#!/bin/sh\n{script}\n"))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    }
    let (code, out, err) = said(world, None, dir.to_str(), &bpffs, &["cleanup"])?;
    ensure!(code == Some(3) && err.contains("iptables-nft-restore: busy"), "{code:?} {out} {err}");
    ensure!(out.contains("removed table ip proxy-agent (nftables)") && !out.contains("of iptables"), "{out} {err}");
    ensure!(out.contains("links/connect4") && !bpffs.exists(), "pins are left: {out} {err}");
    is_as(world, &before)
}

fn route_localnet(world: &World) -> Result<String> {
    let text = world.node(1).place.namespace.output("cat", &[&format!("/proc/sys/net/{ROUTE_LOCALNET}")])?;
    Ok(text.trim().to_owned())
}

/// It refuses to clean up under an agent.
fn run_and_end(world: &mut World, by: &[&str]) -> Result<()> {
    let extra = by.iter().map(|word| (*word).to_owned()).collect();
    let options = AgentOptions { extra, ..AgentOptions::new(SocketLb::All) };
    world.start_agent(1, &options)?;
    world.node(1).wait_ready(PATIENCE)?;
    let bpffs = world.node(1).bpffs.clone();
    let (code, _, err) = said(world, None, None, &bpffs, &["cleanup"])?;
    ensure!(code == Some(3) && err.contains("stop it first"), "{by:?}, while it runs: {code:?} {err}");
    world.kill_agent(1)
}
