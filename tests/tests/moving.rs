//! From one dataplane to another, under traffic: somebody serves at any time, connections go on, and once they have ended nothing is left
//! of the former.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, Permissions},
    net::SocketAddr,
    os::unix::fs::PermissionsExt,
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use proxy_tests::{
    pod::{hold, socket::Transport, storm, talk},
    suite::Suite,
    world::{
        AgentOptions, Ask, Client, Fallback, Family, Place, Programs, SocketLb, Spec, Topology, World, objects, vip,
    },
};
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(30);
/// Both sides of every pair, and eBPF in both of its ways: each pair of modes is there, each way at least once as the former and as the
/// next one. At first nobody but the former has translation switched on.
const MOVES: [(Mode, Mode); 11] = [
    (Mode::By(Fallback::Nftables), Mode::Packets),
    (Mode::Sockets, Mode::By(Fallback::Nftables)),
    (Mode::Packets, Mode::By(Fallback::IptablesNft)),
    (Mode::By(Fallback::IptablesNft), Mode::By(Fallback::Nftables)),
    (Mode::By(Fallback::Nftables), Mode::By(Fallback::IptablesNft)),
    (Mode::By(Fallback::IptablesNft), Mode::Sockets),
    (Mode::Sockets, Mode::By(Fallback::IptablesLegacy)),
    (Mode::By(Fallback::IptablesLegacy), Mode::Packets),
    (Mode::Packets, Mode::By(Fallback::Nftables)),
    (Mode::By(Fallback::IptablesNft), Mode::By(Fallback::IptablesLegacy)),
    (Mode::By(Fallback::IptablesLegacy), Mode::By(Fallback::Nftables)),
];

const CLUSTER: u16 = 30_080;
const LOCAL: u16 = 30_081;
const CLUSTER_UDP: u16 = 30_053;

/// Source ports of storms that begin when another mode has taken over, by who asks: those of a pod or from outside, and those of the node, which
/// masquerades with some of the others. No flow of the former's has them.
const FRESH: u16 = 10_000;
const FRESH_OF_NODE: u16 = 61_200;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Mode {
    /// eBPF, pods at connect time.
    Sockets,
    /// eBPF, pods per packet.
    Packets,
    By(Fallback),
}

impl Mode {
    fn name(self) -> &'static str {
        match self {
            Self::Sockets => "ebpf-all",
            Self::Packets => "ebpf-node",
            Self::By(fallback) => fallback.name(),
        }
    }

    /// As the agent calls it.
    fn of_agent(self) -> &'static str {
        match self {
            Self::Sockets | Self::Packets => "ebpf",
            Self::By(Fallback::Nftables) => "nftables",
            Self::By(_) => "iptables",
        }
    }

    /// Translated by the kernel's conntrack for either, its flows are not counted, and go on.
    fn shares_flows(self, other: Self) -> bool {
        !self.is_ebpf() && !other.is_ebpf()
    }

    fn is_ebpf(self) -> bool {
        self.of_agent() == "ebpf"
    }

    fn options(self) -> AgentOptions {
        let mut options = match self {
            Self::Sockets => AgentOptions::new(SocketLb::All),
            Self::Packets => AgentOptions::new(SocketLb::Node),
            Self::By(fallback) => AgentOptions::by(fallback),
        };
        // What is silent for so long is over.
        options.extra.extend(["--conntrack-udp-timeout=3s", "--conntrack-udp-timeout-stream=3s"].map(str::to_owned));
        options
    }
}

fn main() -> ExitCode {
    Suite::in_worlds("moving", [("moving".to_owned(), ())], prepare, |suite, group, (), world| {
        let (mut alone, mut has_tables) = (BTreeMap::new(), false);
        for (nth, (from, to)) in MOVES.into_iter().enumerate() {
            suite.case(&format!("{group}/from {} to {}", from.name(), to.name()), || {
                if nth > 0 && !has_tables {
                    make_tables(world)?;
                    alone.clear();
                    has_tables = true;
                }
                if !alone.contains_key(to.name()) {
                    alone.insert(to.name(), runs_alone(world, to)?);
                }
                moves(world, from, to, alone.get(to.name()).context("what it looks like alone")?)
            });
        }
        suite.case(&format!("{group}/every kind of flow is counted"), || counts(world));
        suite.case(&format!("{group}/there and back, and an agent that dies on the way"), || dies(world));
        suite.case(&format!("{group}/beside an agent that runs in mode ebpf no other starts"), || refused(world));
        suite.case(&format!("{group}/what may not be touched is said"), || complains(world));
    })
}

fn prepare(programs: Programs, (): &()) -> Result<World> {
    let world = World::new(&Spec::two_nodes(Topology::Routed), programs)?;
    let web = objects::service("web").cluster_ips(&Family::BOTH.map(|family| vip(family, 1)));
    let web = web.port("web", "TCP", 80).node_port(CLUSTER).port("dns", "UDP", 53).node_port(CLUSTER_UDP).json();
    let local = objects::service("local").cluster_ips(&Family::BOTH.map(|family| vip(family, 2)));
    let local = local.port("web", "TCP", 80).node_port(LOCAL).external_local().json();
    let slice = |name: &'static str, family| {
        let slice = objects::slice(name, family).port("web", "TCP", 8080).port("dns", "UDP", 8080);
        slice.endpoints([world.pod("b1"), world.pod("b2")]).json()
    };
    let slices = ["web", "local"].into_iter().flat_map(|name| Family::BOTH.map(|family| slice(name, family)));
    let objects = objects::nodes(&world).into_iter().chain([web, local]).chain(slices);
    objects.into_iter().try_for_each(|object| world.write(&object))?;
    Ok(world)
}

/// Of iptables; they are everybody's once they are there, and have translation switched on.
fn make_tables(world: &World) -> Result<()> {
    for tool in ["iptables-nft", "ip6tables-nft", "iptables-legacy", "ip6tables-legacy"] {
        for table in ["nat", "filter", "mangle"] {
            let namespace = &world.node(1).place.namespace;
            namespace.output(tool, &["-t", table, "-N", "MINE"])?;
            for hook in ["PREROUTING", "POSTROUTING", "INPUT", "FORWARD", "OUTPUT"] {
                let rule = ["-j", "MINE"];
                if namespace.output(tool, &[&["-t", table, "-A", hook], &rule[..]].concat()).is_ok() {
                    namespace.output(tool, &[&["-t", table, "-D", hook], &rule[..]].concat())?;
                }
            }
            namespace.output(tool, &["-t", table, "-X", "MINE"])?;
        }
    }
    Ok(())
}

fn start(world: &mut World, mode: Mode) -> Result<()> {
    start_with(world, &mode.options())
}

fn start_with(world: &mut World, options: &AgentOptions) -> Result<()> {
    world.start_agent(1, options)?;
    world.node(1).wait_ready(PATIENCE)
}

/// As `to` follows upon `from`: the image of eBPF mode has no nft.
fn follow(world: &mut World, from: Mode, to: Mode) -> Result<()> {
    let mut options = to.options();
    if from == Mode::By(Fallback::Nftables) && to.is_ebpf() {
        (options.programs, options.only_programs) = (Some("/nonexistent".into()), true);
    }
    start_with(world, &options)
}

/// All that an agent leaves on a node, but what is in its maps.
fn state(world: &World) -> Result<Vec<String>> {
    let node = world.node(1);
    let commands = [
        "nft -s list ruleset",
        "iptables-legacy-save",
        "ip6tables-legacy-save",
        "ip -o -d link show",
        "tc qdisc show",
        "ip rule show",
        "ip route show table all",
        "cat /proc/sys/net/ipv4/conf/all/route_localnet",
    ];
    let mut state = Vec::new();
    for command in commands {
        let words: Vec<&str> = command.split(' ').collect();
        let (program, args) = words.split_first().context("a command")?;
        let text = node.place.namespace.output(program, args)?;
        // Counters, and when it was asked.
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        let lines: Vec<&str> = lines.map(|line| line.split(" [").next().unwrap_or_default()).collect();
        state.push(if program == &"nft" { without_empty_chains(&lines) } else { lines.join("\n") });
    }
    state.push(format!("{} is there: {}", node.bpffs.display(), node.bpffs.exists()));
    Ok(state)
}

/// iptables makes chains that nothing is in for its tables, and takes some away again; they are everybody's, and in no order.
fn without_empty_chains(ruleset: &[&str]) -> String {
    let mut blocks: BTreeMap<(String, String), Vec<String>> = BTreeMap::new();
    let (mut table, mut block) = (String::new(), String::new());
    for line in ruleset {
        if line.starts_with("table ") {
            table = (*line).to_owned();
        } else if line.starts_with('\t') && line.ends_with(" {") && !line.starts_with("\t\t") {
            block = line.trim().to_owned();
        } else if line.starts_with("\t\t") {
            blocks.entry((table.clone(), block.clone())).or_default().push(line.trim().to_owned());
        }
    }
    blocks.retain(
        |_, lines| !matches!(&lines[..], [only] if only.starts_with("type ") && only.ends_with("policy accept;")),
    );
    format!("{blocks:#?}")
}

fn runs_alone(world: &mut World, mode: Mode) -> Result<Vec<String>> {
    world.remove_agents()?;
    start(world, mode)?;
    let alone = state(world)?;
    world.remove_agents()?;
    Ok(alone)
}

/// Who asks, by what way, and which backends may answer.
fn flows(world: &World) -> Vec<(&Place, SocketAddr, &'static str)> {
    let node = &world.node(1).place;
    let mut flows = Vec::new();
    for family in Family::BOTH {
        for place in [world.pod("a1"), node] {
            flows.push((place, SocketAddr::new(vip(family, 1), 80), "b1,b2"));
        }
        flows.push((world.outside(), node.at(family, CLUSTER), "b1,b2"));
        flows.push((world.outside(), node.at(family, LOCAL), "b1"));
        flows.push((world.pod("a1"), node.at(family, CLUSTER), "b1,b2"));
    }
    flows
}

/// One socket each, and never silent.
fn datagrams(world: &World) -> Result<Vec<(String, Client)>> {
    let mut talks = Vec::new();
    for (place, to, _) in flows(world) {
        let port = match to.port() {
            80 => 53,
            CLUSTER => CLUSTER_UDP,
            _ => continue,
        };
        let (to, source) = (SocketAddr::new(to.ip(), port).to_string(), 21_000 + talks.len());
        let client = start_at(world, place, &["talk", &to, &format!("--source-port={source}")])?;
        talks.push((format!("{} -> {to}", place.name), client));
    }
    for (_, client) in &mut talks {
        client.wait_for_line("ready", PATIENCE)?;
    }
    Ok(talks)
}

/// Whoever answered first goes on to. A machine that stands still loses some answers.
fn go_on(talks: Vec<(String, Client)>) -> Result<()> {
    for (what, client) in talks {
        let report: talk::Report = client.finish(Duration::from_secs(10))?;
        let (asked, lost) = (report.turns.len(), report.turns.iter().filter(|turn| turn.error.is_some()).count());
        let backends = report.backends(0, u64::MAX);
        let stays = backends.len() == 1 && report.sockets == 1;
        ensure!(stays && asked > lost + 10, "{what}: {lost} of {asked} lost, {backends:?}, {:?}", report.errors());
    }
    Ok(())
}

struct Traffic {
    holds: Vec<(String, Client)>,
    storms: Vec<(String, Client)>,
}

impl Traffic {
    fn start(world: &World) -> Result<Self> {
        let mut holds = Vec::new();
        // None that the kernel chooses: a client's port that leads to one backend by both modes is told apart by neither.
        for ((place, to, expect), port) in flows(world).into_iter().zip((61_000_u16..).step_by(10)) {
            let (at, expect, port) = (to.to_string(), format!("--expect={expect}"), format!("--source-port={port}"));
            let args = ["hold", &at, &expect, &port, "--connections=6", "--interval=50"];
            holds.push((format!("{} -> {to}", place.name), start_at(world, place, &args)?));
        }
        let mut traffic = Self { holds, storms: Self::storms(world, false)? };
        for (_, client) in &mut traffic.holds {
            client.wait_for_line("ready", PATIENCE)?;
        }
        Ok(traffic)
    }

    /// New connections of every kind; `fresh`: from ports that no flow had yet.
    fn storms(world: &World, fresh: bool) -> Result<Vec<(String, Client)>> {
        let mut storms = Vec::new();
        let mut begun: BTreeMap<(&str, bool), u16> = BTreeMap::new();
        for (place, to, expect) in flows(world) {
            let nth = begun.entry((place.name.as_str(), to.is_ipv4())).or_default();
            let first = if place.name == "node1" { FRESH_OF_NODE } else { FRESH + *nth * storm::PORTS };
            *nth += 1;
            let (expect, port) = (format!("--expect={expect}"), format!("--source-port={first}"));
            let what = format!("{} -> {to}", place.name);
            let mut storm = |at: &str, udp: bool, rate: &str| -> Result<()> {
                let mut args = vec!["storm", at, expect.as_str(), rate, "--seconds=120"];
                args.extend(udp.then_some("--udp"));
                args.extend(fresh.then_some(port.as_str()));
                let what = if udp { format!("{what}, UDP") } else { what.clone() };
                storms.push((what, start_at(world, place, &args)?));
                Ok(())
            };
            // Of 60 a second a gap of a tenth of a second takes six. Fresh ports last for two minutes of 30.
            storm(&to.to_string(), false, if fresh { "--rate=30" } else { "--rate=60" })?;
            let udp = match to.port() {
                80 => Some(53),
                CLUSTER => Some(CLUSTER_UDP),
                _ => None,
            };
            if let Some(port) = udp {
                storm(&SocketAddr::new(to.ip(), port).to_string(), true, "--rate=30")?;
            }
        }
        for (_, client) in &mut storms {
            client.wait_for_line("ready", PATIENCE)?;
        }
        Ok(storms)
    }

    /// What is held ends; new connections go on.
    fn let_go(&mut self) -> Result<()> {
        let mut trouble = Vec::new();
        for (what, client) in self.holds.drain(..) {
            let report: hold::Report = client.finish(Duration::from_secs(10))?;
            let fine = report.broken.is_empty() && report.wrong.is_empty() && report.rounds > 20;
            trouble.extend((!fine).then(|| format!("held, {what}: {report:?}")));
        }
        ensure!(trouble.is_empty(), "{}", trouble.join("\n"));
        Ok(())
    }

    /// New connections end.
    fn calm(&mut self, world: &World) -> Result<()> {
        let mut trouble = Vec::new();
        for (what, client) in self.storms.drain(..) {
            let report: storm::Report = client.finish(Duration::from_secs(10))?;
            // A SYN that nobody takes is sent again after a second, and answered as if nothing had been. A machine that stands still for so
            // long is no gap, as long as that is rare: a gap of a tenth of a second takes six of them.
            let gap = report.sent_again * 100 > report.tries;
            let fine = report.failures.is_empty() && report.wrong.is_empty() && report.tries > 20 && !gap;
            trouble.extend((!fine).then(|| format!("new connections, {what}: {report:?}")));
        }
        ensure!(trouble.is_empty(), "{}\n{}", trouble.join("\n"), lost_elsewhere(world)?);
        Ok(())
    }
}

fn start_at(world: &World, place: &Place, args: &[&str]) -> Result<Client> {
    let args: Vec<String> = args.iter().map(|arg| (*arg).to_owned()).collect();
    place.start(&world.programs().testpod, &args)
}

fn retiring(world: &World) -> Result<Vec<Value>> {
    let status = world.node(1).status()?;
    status["retiring"].as_array().cloned().context("no word of what is retiring")
}

fn wait_for(what: &str, mut is_so: impl FnMut() -> Result<Result<(), String>>) -> Result<()> {
    let deadline = Instant::now() + PATIENCE * 2;
    loop {
        match is_so()? {
            Ok(()) => return Ok(()),
            Err(now) => ensure!(Instant::now() < deadline, "{what}: {now}"),
        }
        thread::sleep(Duration::from_millis(100));
    }
}

/// What a dataplane has no part in: connections that a backend was too slow to take, and what conntrack had no place for.
fn lost_elsewhere(world: &World) -> Result<String> {
    const COUNTED: [&str; 4] = ["ListenOverflows", "ListenDrops", "TCPTimeouts", "TCPAbortOnTimeout"];
    let mut lines = Vec::new();
    for place in [world.pod("b1"), world.pod("b2"), world.pod("a1"), &world.node(1).place, world.outside()] {
        let text = place.namespace.output("cat", &["/proc/net/netstat"])?;
        let rows: Vec<&str> = text.lines().filter(|line| line.starts_with("TcpExt:")).collect();
        let [names, values] = rows[..] else { continue };
        let pairs = names.split(' ').zip(values.split(' ')).filter(|(name, _)| COUNTED.contains(name));
        let counts: Vec<String> = pairs.map(|(name, value)| format!("{name} {value}")).collect();
        lines.push(format!("{}: {}", place.name, counts.join(", ")));
    }
    let conntrack = world.node(1).place.namespace.output("conntrack", &["-S"])?;
    Ok(format!("{}\n{conntrack}", lines.join("\n")))
}

/// The other mode's flows are counted.
fn waits_for_flows(world: &World, mode: &str) -> Result<()> {
    wait_for("flows are counted", || {
        let list = retiring(world)?;
        let counts = |one: &Value| one["mode"] == mode && one["flows"].as_u64().is_some_and(|flows| flows >= 12);
        Ok(if list.iter().any(counts) { Ok(()) } else { Err(format!("{list:?}")) })
    })
}

fn waits_for_the_end(world: &World) -> Result<()> {
    wait_for("nothing is left", || {
        let list = retiring(world)?;
        Ok(if list.is_empty() { Ok(()) } else { Err(format!("{list:?}\n{}", world.node(1).agent_log())) })
    })
}

fn serves(world: &World) -> Result<()> {
    for (place, to, expect) in flows(world) {
        let report = world.ask(place, &Ask::new(to, Transport::Tcp).times(30))?;
        let seen: Vec<String> = report.backends().into_keys().collect();
        ensure!(seen.join(",") == expect && report.errors().is_empty(), "{} -> {to}: {report:?}", place.name);
    }
    Ok(())
}

fn moves(world: &mut World, from: Mode, to: Mode, alone: &[String]) -> Result<()> {
    anew(world)?;
    start(world, from)?;
    let mut traffic = Traffic::start(world)?;
    let talks = if from.shares_flows(to) { datagrams(world)? } else { Vec::new() };
    thread::sleep(Duration::from_millis(500));
    follow(world, from, to)?;
    if !from.shares_flows(to) {
        waits_for_flows(world, from.of_agent())?;
        let node = world.node(1);
        ensure!(node.metric("proxy_agent_retiring_flows")? >= 12.0, "no metric");
        let said = world.cli(node, &["status"])?;
        ensure!(said.contains("Left by other modes") && said.contains("takes no new flows"), "{said}");
        // Who asks hears what is in force.
        let listed = world.cli(node, &["services", "--no-headers"])?;
        ensure!(listed.contains("default/web:web"), "services: {listed}");
        let unheard = world.cli(node, &["services", "--no-headers", "--metrics-bind-address="]);
        ensure!(from.is_ebpf() == unheard.is_err(), "what is retired is shown: {unheard:?}");
    }
    // Two looks at what is left, and more of the same traffic.
    thread::sleep(Duration::from_secs(4));
    if to.is_ebpf() {
        // The longer both modes have entries, the likelier is a client's port that leads to one backend by both.
        traffic.calm(world)?;
        forget(world, &["-D", "-p", "udp"]);
        traffic.storms = Traffic::storms(world, true)?;
    }
    traffic.let_go()?;
    go_on(talks)?;
    // Where the former's programs and maps go, somebody asks meanwhile, and after.
    waits_for_the_end(world)?;
    thread::sleep(Duration::from_millis(500));
    traffic.calm(world)?;
    serves(world)?;
    is_alone(world, alone)?;
    ensure!(world.leaks()?.is_empty(), "leaks");
    Ok(())
}

/// As if this mode had been the only one.
fn is_alone(world: &World, alone: &[String]) -> Result<()> {
    for (alone, left) in alone.iter().zip(&state(world)?) {
        let (one, other): (BTreeSet<&str>, BTreeSet<&str>) = (alone.lines().collect(), left.lines().collect());
        ensure!(alone == left, "there should be {:?}, and not {:?}", &one - &other, &other - &one);
    }
    Ok(())
}

/// What conntrack remembers of UDP would last for up to two minutes. It fails where there is nothing to forget.
fn forget(world: &World, what: &[&str]) {
    for family in ["ipv4", "ipv6"] {
        let _ = world.node(1).place.namespace.output("conntrack", &[what, &["-f", family]].concat());
    }
}

/// Nothing of the case before, which would be in the way of the same ports: conntrack was off when it ended.
fn anew(world: &mut World) -> Result<()> {
    world.remove_agents()?;
    forget(world, &["-F"]);
    forget(world, &["-D"]);
    Ok(())
}

/// The former stays for each of them: for none but these, of which there is one of each.
fn counts(world: &mut World) -> Result<()> {
    anew(world)?;
    let modes =
        [Mode::Packets, Mode::By(Fallback::Nftables), Mode::Sockets, Mode::By(Fallback::IptablesNft), Mode::Packets];
    let mut from = None;
    let mut port = 62_000;
    for to in modes {
        let Some(from) = from.replace(to) else {
            start(world, to)?;
            continue;
        };
        let mut holds = Vec::new();
        for (place, at, expect) in flows(world) {
            port += 1;
            let args = [
                "hold".to_owned(),
                at.to_string(),
                format!("--expect={expect}"),
                format!("--source-port={port}"),
                "--connections=1".to_owned(),
            ];
            let mut client = place.start(&world.programs().testpod, &args)?;
            client.wait_for_line("ready", PATIENCE)?;
            holds.push((format!("{} -> {at}", place.name), client));
        }
        start(world, to)?;
        let all = holds.len() as u64;
        wait_for("all are counted", || {
            let list = retiring(world)?;
            let counts = |one: &Value| one["mode"] == from.of_agent() && one["flows"] == all;
            Ok(if list.iter().any(counts) { Ok(()) } else { Err(format!("from {from:?}, {all}: {list:?}")) })
        })?;
        for (what, client) in holds {
            let report: hold::Report = client.finish(Duration::from_secs(10))?;
            ensure!(report.broken.is_empty() && report.wrong.is_empty(), "from {from:?}, {what}: {report:?}");
        }
        waits_for_the_end(world)?;
    }
    Ok(())
}

/// Whoever comes next finds what was retired half, or takes it up again.
fn dies(world: &mut World) -> Result<()> {
    make_tables(world)?;
    anew(world)?;
    let alone = runs_alone(world, Mode::Packets)?;
    start(world, Mode::Packets)?;
    let mut traffic = Traffic::start(world)?;
    for mode in
        [Mode::By(Fallback::Nftables), Mode::By(Fallback::IptablesNft), Mode::Packets, Mode::By(Fallback::Nftables)]
    {
        start(world, mode)?;
        // In the midst, as likely as not.
        thread::sleep(Duration::from_millis(700));
        world.kill_agent(1)?;
        start(world, mode)?;
        thread::sleep(Duration::from_millis(1500));
        world.kill_agent(1)?;
    }
    start(world, Mode::Packets)?;
    thread::sleep(Duration::from_secs(3));
    traffic.calm(world)?;
    traffic.let_go()?;
    forget(world, &["-D", "-p", "udp"]);
    waits_for_the_end(world)?;
    is_alone(world, &alone)?;
    serves(world)
}

/// It would take the frontends from under the other.
fn refused(world: &mut World) -> Result<()> {
    world.remove_agents()?;
    start(world, Mode::Packets)?;
    for mode in ["nftables", "iptables"] {
        does_not_start(world, mode, "another agent runs on")?;
    }
    // On the same pins, and in the same network.
    does_not_start(world, "ebpf", "another proxy-agent (pid ")?;
    serves(world)?;
    world.remove_agents()
}

fn does_not_start(world: &World, mode: &str, why: &str) -> Result<()> {
    let node = world.node(1);
    let source = world.objects_dir();
    let mut command = node.place.command("/usr/bin/timeout")?;
    command.arg("20").arg(&world.programs().agent).args(["run", "--hostname-override", "node1", "--log-level", "off"]);
    command.arg("--source").arg(&source).arg("--bpffs").arg(&node.bpffs).args(["--proxy-mode", mode]);
    let done = command.output()?;
    let said = String::from_utf8_lossy(&done.stderr);
    ensure!(done.status.code() == Some(3) && said.contains(why), "{mode}: {said}");
    Ok(())
}

/// What others could have tampered with is left alone and goes on serving as it was; who would start behind it does not.
fn complains(world: &mut World) -> Result<()> {
    anew(world)?;
    start(world, Mode::Packets)?;
    let bpffs = world.node(1).bpffs.clone();
    let may = |mode| fs::set_permissions(&bpffs, Permissions::from_mode(mode));
    world.kill_agent(1)?;
    may(0o770)?;
    for mode in ["nftables", "iptables"] {
        does_not_start(world, mode, "others could swap")?;
    }
    serves(world)?;
    may(0o700)?;
    start(world, Mode::By(Fallback::Nftables))?;
    waits_for_the_end(world)?;
    ensure!(!world.node(1).bpffs.exists(), "pins are left");
    serves(world)?;
    world.remove_agents()
}
