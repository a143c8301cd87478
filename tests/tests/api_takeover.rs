//! kube-proxy, then the agent, then kube-proxy again, on running nodes, by the commands of docs/migrate.md in their order: new connections are
//! answered at any time, those that are open go on, whoever translated them, and nothing is left of the former.
//!
//! `cargo xtask e2e takeover` does the same in a whole cluster.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::Write as _,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, ExitCode, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use proxy_tests::{
    apiserver,
    conformance::{
        lab::{Lab, Means},
        services::{self, At, FIRST, Service, Via},
        subject::{self, Mode, Subject},
        table::Configuration,
    },
    observed::{Bar, Observed, Phases},
    pod::{socket::Transport, storm},
    suite::Suite,
    world::{AgentOptions, Client, Family, Node, Place, SocketLb, World, cleanup_on_signals, patience, within},
};

/// Whose are asked. No phase but lasts so long at least; the first one, with which the others are compared, as long as some of them do.
const SERVICES: &str = "web | NodePort | b1 b2";
const LASTS: Duration = Duration::from_secs(2);
const CONTROL: Duration = Duration::from_secs(10);
/// How much longer than in that one nobody may be answered, on one way. Whoever is not served loses datagrams, or sends its SYN again, and of those
/// there may be none more; this is for answers that come late, and for a machine with much to do, on which clients themselves come to ask late.
const GAP: u64 = 5;

/// Connections a second of each kind; they end with their phase, and have not seen the whole of one that lasts for so many seconds.
const RATE: u16 = 4;
const WORKERS: u16 = 2;
const SECONDS: u16 = 280;
/// Long ones of each way.
const HELD: u16 = 5;
/// No claim about speed.
const TIMEOUT: &str = "--timeout=8000";

/// Source ports of each way: for what is new, and after these for what is held. None is used again before all others were: what conntrack
/// remembers of a connection outlives it. A node's are none that the kernel gives to others.
const PORTS: u16 = 10_000;
const PORTS_OF_NODE: u16 = 61_000;
const NEW: u16 = 2_100;
const OPEN: u16 = 150;

/// Ports that kube-proxy never masquerades with, but where a client's is one of the first 1023 (docs/migrate.md).
const MASQUERADE_PORTS: &str = "--masquerade-ports=512-1023";
/// Of kube-proxy in this world.
const HEALTHZ: u16 = 28_256;

const BEFORE: &str = "kube-proxy";
const TO_AGENT: &str = "to the agent";
const AGENT: &str = "agent";
const BACK: &str = "to kube-proxy";
const AFTER: &str = "kube-proxy again";

/// What connections that have ended leave in conntrack is forgotten soon.
const FORGETFUL: [(&str, &str); 5] = [
    ("netfilter/nf_conntrack_udp_timeout", "3"),
    ("netfilter/nf_conntrack_udp_timeout_stream", "3"),
    ("netfilter/nf_conntrack_tcp_timeout_time_wait", "3"),
    ("netfilter/nf_conntrack_tcp_timeout_close", "3"),
    ("netfilter/nf_conntrack_tcp_timeout_last_ack", "3"),
];

fn main() -> ExitCode {
    let mut suite = Suite::new("api_takeover");
    let Some(programs) = suite.programs() else { return suite.finish() };
    let (servers, kube_proxy) =
        match apiserver::Programs::find().and_then(|servers| Ok((servers, subject::kube_proxy()?))) {
            Ok(found) => found,
            Err(reason) => {
                suite.skip("takeover", &format!("{reason:#}"));
                return suite.finish();
            }
        };
    let agent = programs.agent.clone();
    let prepared = cleanup_on_signals()
        .and_then(|()| World::sweep())
        .and_then(|_| Lab::new(programs, Means::Upstream { servers, kube_proxy }))
        .and_then(|lab| {
            let services = services::parse(SERVICES, FIRST)?;
            lab.install(&services)?;
            Ok((lab, services.into_iter().next().context("a Service")?))
        });
    match prepared {
        Ok((mut lab, service)) => {
            let mut ports = Ports::default();
            // Each of kube-proxy's modes, and pods in both of ours.
            for (mode, socket_lb) in [(Mode::Nftables, SocketLb::Node), (Mode::Iptables, SocketLb::All)] {
                let name = format!("takeover/{}, pods by {}", Subject::KubeProxy(mode).name(), socket_lb.name());
                suite.case(&name, || {
                    let done = there_and_back(&mut lab, &service, mode, socket_lb, &agent, &mut ports);
                    let logs = lab.logs();
                    let stopped = lab.world.remove_agents().and_then(|()| lab.stop());
                    done.context(logs).and(stopped)
                });
            }
        }
        Err(error) => suite.fail("preparation", &error),
    }
    suite.finish()
}

fn there_and_back(
    lab: &mut Lab,
    service: &Service,
    mode: Mode,
    socket_lb: SocketLb,
    agent: &Path,
    ports: &mut Ports,
) -> Result<()> {
    let mut options = AgentOptions::new(socket_lb);
    options.kubeconfig = lab.objects.kubeconfig()?;
    options.extra.extend(["--proxy-mode", "ebpf", MASQUERADE_PORTS].map(str::to_owned));
    options.extra.extend(["--conntrack-udp-timeout=3s", "--conntrack-udp-timeout-stream=3s"].map(str::to_owned));
    let mut traffic = Traffic { observed: Observed::default(), ports };
    lab.start(Subject::KubeProxy(mode), Configuration::BASE)?;
    lab.world.nodes.iter().try_for_each(|node| node.place.namespace.sysctl(&FORGETFUL))?;
    for node in &lab.world.nodes {
        let shown = lab.world.cli_output(node, &["check"])?;
        ensure!(shown.contains("kube-proxy in "), "check does not name kube-proxy:\n{shown}");
    }

    let since_before = traffic.open(lab, service)?;
    traffic.during(lab, service, BEFORE, |_, _| {
        sleep(CONTROL);
        Ok(())
    })?;
    traffic.during(lab, service, TO_AGENT, |_, lab| {
        // Its DaemonSet is deleted, ours is applied.
        lab.end_proxies();
        waits_until_ready(lab, &options, service)?;
        lab.world.start_agents(&options)?;
        lab.world.nodes.iter().try_for_each(|node| rid_of_kube_proxy(lab, node, service, mode, agent))
    })?;
    let since_agent = traffic.open(lab, service)?;
    traffic.during(lab, service, AGENT, |traffic, lab| {
        lab.world.nodes.iter().try_for_each(|node| within(patience(60), || counts_them(lab, node)))?;
        traffic.close(since_before, Phases { since: BEFORE, until: AGENT })?;
        // Nobody needs it any more.
        lab.world.nodes.iter().try_for_each(|node| within(patience(90), || is_alone(node)))
    })?;

    let mut drains = Vec::new();
    traffic.during(lab, service, BACK, |_, lab| {
        for number in 1..=lab.world.nodes.len() {
            lab.world.kill_agent(number)?;
        }
        // Before anybody would take over.
        let refused = lab.world.cli(lab.world.node(1), &["cleanup", "--drain=1s"]).err();
        let refused = refused.map(|error| error.to_string()).unwrap_or_default();
        ensure!(refused.contains("there are no rules of kube-proxy here"), "cleanup --drain: {refused}");
        lab.launch(Subject::KubeProxy(mode))?;
        for node in &lab.world.nodes {
            within(patience(60), || {
                let (code, words) = node.http(HEALTHZ, "/healthz")?;
                ensure!(code == 200, "{code} {words}");
                Ok(())
            })?;
            has_rules(lab, node, service)?;
        }
        let dir = lab.world.objects_dir();
        for node in &lab.world.nodes {
            drains.push(Drain::begin(node, agent, &dir)?);
        }
        drains.iter().try_for_each(|drain| drain.says("new connections are left to others"))
    })?;
    let since_after = traffic.open(lab, service)?;
    traffic.during(lab, service, AFTER, |traffic, _| {
        // Longer than one that is not waited for takes to go.
        sleep(LASTS);
        for drain in &mut drains {
            ensure!(drain.goes_on()?, "a node's cleanup did not wait: {}", drain.said()?);
        }
        traffic.close(since_agent, Phases { since: AGENT, until: AFTER })?;
        drains.into_iter().try_for_each(Drain::ends)
    })?;
    traffic.close(since_after, Phases { since: AFTER, until: AFTER })?;
    for node in &lab.world.nodes {
        ensure!(!node.bpffs.exists(), "{} is still there", node.bpffs.display());
    }
    let Traffic { observed, ports: _ } = traffic;
    println!("{observed}");
    // `cargo xtask` shows lines that begin so.
    observed.sums().lines().for_each(|line| println!("sum  {line}"));
    let faults = observed.faults(Bar::Control { phase: BEFORE, gap: patience(GAP) });
    ensure!(faults.is_empty(), "{}\n{observed}", faults.join("\n"));
    Ok(())
}

/// An agent that has heard of nothing yet takes nobody's place.
fn waits_until_ready(lab: &mut Lab, options: &AgentOptions, service: &Service) -> Result<()> {
    let kubeconfig = fs::read_to_string(options.kubeconfig.as_ref().context("a kubeconfig")?)?;
    let mut kubeconfig: serde_json::Value = serde_json::from_str(&kubeconfig)?;
    kubeconfig["clusters"][0]["cluster"]["server"] = "https://127.0.0.1:9".into();
    let nowhere = lab.world.objects_dir().join("nowhere.kubeconfig");
    fs::write(&nowhere, kubeconfig.to_string())?;
    lab.world.start_agent(1, &AgentOptions { kubeconfig: Some(nowhere), ..options.clone() })?;
    let node = lab.world.node(1);
    within(patience(60), || {
        ensure!(node.status()?["ready"] == false, "it is ready");
        Ok(())
    })?;
    let refused = lab.world.cli(node, &["cleanup", "--kube-proxy"]).err().map(|error| error.to_string());
    ensure!(refused.as_ref().is_some_and(|why| why.contains("is not ready")), "before it is ready: {refused:?}");
    has_rules(lab, node, service).context("before the agent was ready")?;
    lab.world.kill_agent(1)
}

/// Beside the agent that runs.
fn rid_of_kube_proxy(lab: &Lab, node: &Node, service: &Service, mode: Mode, agent: &Path) -> Result<()> {
    let world = &lab.world;
    let status = world.cli(node, &["status"])?;
    ensure!(!status.contains("unhealthy") && status.contains(" 0 pending, 0 degraded"), "{status}");
    let refused = world.cli(node, &["cleanup"]).err().map(|error| error.to_string()).unwrap_or_default();
    ensure!(refused.contains("an agent runs on") && refused.contains("stop it first"), "cleanup: {refused}");
    // Whoever names another directory finds it, too.
    let elsewhere = node.place.command(agent)?.args(["cleanup", "--bpffs=/sys/fs/bpf/nobodys"]).output()?;
    let said = String::from_utf8_lossy(&elsewhere.stderr);
    let names = said.contains(&format!("an agent runs on {}", node.bpffs.display()));
    ensure!(!elsewhere.status.success() && names, "cleanup of another directory: {said}");
    let dry = world.cli(node, &["cleanup", "--kube-proxy", "--dry-run"])?;
    ensure!(dry.contains("would keep NAT on") && dry.contains("would remove"), "{dry}");
    has_rules(lab, node, service).context("a dry run")?;
    let refused = {
        let _held = Owned::hold(node)?;
        world.cli(node, &["cleanup", "--kube-proxy"]).err().map(|error| error.to_string())
    };
    ensure!(refused.as_ref().is_some_and(|why| why.contains("NAT cannot be kept on")), "{refused:?}");
    within(patience(30), || {
        ensure!(!ruleset(node)?.contains("proxy-agent-nat"), "its owner is gone, and the table is there");
        Ok(())
    })?;
    has_rules(lab, node, service).context("without what keeps NAT on")?;
    if mode == Mode::Iptables {
        keeps_forwarding(lab, node)?;
    } else {
        let said = world.cli(node, &["cleanup", "--kube-proxy"])?;
        ensure!(said.contains("what is its own stays") && said.contains("removed"), "{said}");
    }
    let again = world.cli(node, &["cleanup", "--kube-proxy"])?;
    ensure!(again.contains("no rules of kube-proxy"), "{again}");
    let shown = world.cli_output(node, &["check"])?;
    ensure!(shown.contains("no traces of kube-proxy"), "{shown}");
    Ok(())
}

/// A firewall that drops what is forwarded unless a rule accepts it: kube-proxy's goes on accepting until it is said to go.
fn keeps_forwarding(lab: &Lab, node: &Node) -> Result<()> {
    let iptables = |args: &[&str]| node.place.namespace.output("iptables-nft", args);
    // Theirs who are told to.
    iptables(&["-A", "FORWARD", "-j", "ACCEPT"])?;
    iptables(&["-P", "FORWARD", "DROP"])?;
    let shown = lab.world.cli_output(node, &["check"])?;
    ensure!(shown.contains("firewall: drops what is forwarded") && shown.contains("chain FORWARD"), "{shown}");
    let said = lab.world.cli(node, &["cleanup", "--kube-proxy"])?;
    let stays = said.contains("chain KUBE-FORWARD in table filter (iptables-nft-save) stays");
    ensure!(stays && said.contains("what is its own stays") && said.contains("removed"), "{said}");
    let rules = iptables(&["-S"])?;
    let keeps = rules.contains("-j KUBE-FORWARD") && rules.contains("--ctstate RELATED,ESTABLISHED -j ACCEPT");
    ensure!(keeps && !rules.contains("KUBE-SERVICES"), "{rules}");
    lab.world.cli(node, &["cleanup", "--kube-proxy", "--force"])?;
    ensure!(!iptables(&["-S"])?.contains("KUBE-FORWARD"), "it stays in spite of --force");
    iptables(&["-P", "FORWARD", "ACCEPT"])?;
    iptables(&["-D", "FORWARD", "-j", "ACCEPT"]).map(drop)
}

/// The tables that keep NAT on, held by a process that lets nobody else change them.
struct Owned(Child);

impl Owned {
    fn hold(node: &Node) -> Result<Self> {
        let mut command = node.place.namespace.command("nft");
        let mut owned =
            Self(command.arg("-i").stdin(Stdio::piped()).stdout(Stdio::null()).spawn().context("start nft")?);
        let stdin = owned.0.stdin.as_mut().context("its stdin")?;
        for family in ["ip", "ip6"] {
            writeln!(stdin, "add table {family} proxy-agent-nat {{ flags owner; }}")?;
        }
        stdin.flush()?;
        within(patience(30), || {
            let tables = node.place.namespace.output("nft", &["list", "tables"])?;
            ensure!(tables.matches("proxy-agent-nat").count() == 2, "{tables}");
            Ok(())
        })?;
        Ok(owned)
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        // What is gone already needs no ending.
        let _gone = self.0.kill();
        let _gone = self.0.wait();
    }
}

/// What kube-proxy translated is known, and NAT stays on for it.
fn counts_them(lab: &Lab, node: &Node) -> Result<()> {
    let shown = lab.world.cli(node, &["status"])?;
    ensure!(shown.contains("Left by other modes") && shown.contains("kube-proxy"), "{shown}");
    let status = node.status()?;
    let retiring = status["retiring"].as_array().context("no word of what is retiring")?;
    let kept = retiring.iter().find(|one| one["mode"] == "kube-proxy");
    let flows = kept.and_then(|one| one["flows"].as_u64()).unwrap_or_default();
    // Node2 has those of one way only.
    ensure!(flows >= u64::from(HELD), "{retiring:?}");
    ensure!(ruleset(node)?.contains("proxy-agent-nat"), "nothing keeps NAT on");
    Ok(())
}

/// Nothing is left of kube-proxy, nor of what kept its connections going.
fn is_alone(node: &Node) -> Result<()> {
    let ruleset = ruleset(node)?;
    let left: Vec<&str> = ruleset
        .lines()
        .filter(|line| {
            ["table ip kube-proxy", "table ip6 kube-proxy", "proxy-agent-nat", "KUBE-SVC"]
                .iter()
                .any(|one| line.contains(one))
        })
        .collect();
    ensure!(left.is_empty(), "{}: {left:?}\n{:?}", node.place.name, node.status()?["retiring"]);
    Ok(())
}

/// kube-proxy is as far as the Service.
fn has_rules(lab: &Lab, node: &Node, service: &Service) -> Result<()> {
    let ruleset = ruleset(node)?;
    for family in Family::BOTH {
        let addr = service.address(&lab.world, Via::ClusterIp, family, Transport::Tcp).ip().to_string();
        ensure!(ruleset.contains(&addr), "{}: kube-proxy has no rules for {addr}", node.place.name);
    }
    Ok(())
}

/// Of nftables, and of iptables of either flavour.
fn ruleset(node: &Node) -> Result<String> {
    let rules = node.place.namespace.rules()?.join("\n");
    Ok(rules + &node.place.namespace.output("nft", &["list", "ruleset"])?)
}

/// `cleanup --drain` at work on a node.
struct Drain {
    child: Child,
    said: PathBuf,
}

impl Drain {
    fn begin(node: &Node, agent: &Path, dir: &Path) -> Result<Self> {
        let said = dir.join(format!("drain-{}.log", node.place.name));
        let output = File::create(&said)?;
        let mut command = node.place.command(agent)?;
        command.args(["cleanup", "--drain=30m", "--bpffs"]).arg(&node.bpffs).stdin(Stdio::null());
        let child = command.stdout(output.try_clone()?).stderr(output).spawn().context("start cleanup")?;
        Ok(Self { child, said })
    }

    fn said(&self) -> Result<String> {
        fs::read_to_string(&self.said).with_context(|| format!("read {}", self.said.display()))
    }

    fn says(&self, words: &str) -> Result<()> {
        within(patience(60), || {
            let said = self.said()?;
            ensure!(said.contains(words), "cleanup --drain says {said:?}");
            Ok(())
        })
    }

    fn goes_on(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    /// By itself, once nobody needs what it holds.
    fn ends(mut self) -> Result<()> {
        let deadline = Instant::now() + patience(90);
        while self.goes_on()? {
            ensure!(Instant::now() < deadline, "cleanup --drain does not end: {}", self.said()?);
            sleep(Duration::from_millis(100));
        }
        let ended = self.child.wait()?;
        let said = self.said()?;
        ensure!(ended.success() && said.contains("all connections have ended"), "cleanup --drain: {ended}: {said}");
        Ok(())
    }
}

impl Drop for Drain {
    fn drop(&mut self) {
        // What is gone already needs no ending.
        let _gone = self.child.kill();
        let _gone = self.child.wait();
    }
}

/// Connections that are held, and flows of datagrams.
struct Open {
    holds: Vec<(String, Client)>,
    talks: Vec<(String, Client)>,
}

struct Traffic<'a> {
    observed: Observed,
    ports: &'a mut Ports,
}

/// How many source ports of each way and protocol (UDP?) are used up: by what is new, and by what is held.
#[derive(Default)]
struct Ports(BTreeMap<(String, bool), (u16, u16)>);

/// Who asks, and by what way.
struct Way<'a> {
    place: &'a Place,
    name: String,
    to: [SocketAddr; 2],
    /// First of its source ports.
    ports: u16,
}

fn ways<'a>(lab: &'a Lab, service: &Service) -> Vec<Way<'a>> {
    let world = &lab.world;
    let (pod, node, outside) = (world.pod("a1"), &world.node(1).place, world.outside());
    let mut ways = Vec::new();
    for family in Family::BOTH {
        for (place, number, via, name) in [
            (pod, 0, Via::ClusterIp, "ClusterIP"),
            (pod, 1, Via::NodePort(At::Node2), "NodePort of node2"),
            (node, 0, Via::ClusterIp, "ClusterIP"),
            (node, 1, Via::NodePort(At::Node1), "NodePort of node1"),
            (outside, 0, Via::NodePort(At::Node1), "NodePort of node1"),
        ] {
            let to = [Transport::Tcp, Transport::Udp].map(|transport| service.address(world, via, family, transport));
            let first = if place.is_node() { PORTS_OF_NODE } else { PORTS };
            let ports = first + number * (NEW + OPEN);
            ways.push(Way { place, name: format!("{} → {name}, {family}", place.name), to, ports });
        }
    }
    ways
}

impl Ports {
    /// For a storm, which says afterwards how many it [used](Self::used).
    fn of_new(&mut self, way: &Way<'_>, udp: bool) -> String {
        let (new, _) = self.0.entry((way.name.clone(), udp)).or_default();
        if *new + RATE * SECONDS > NEW {
            *new = 0;
        }
        format!("--source-port={}", way.ports + *new)
    }

    fn used(&mut self, way: String, udp: bool, tries: u64) -> Result<()> {
        let (new, _) = self.0.entry((way, udp)).or_default();
        *new += u16::try_from(tries)? + WORKERS;
        Ok(())
    }

    /// So many that follow one another.
    fn of_open(&mut self, way: &Way<'_>, udp: bool, count: u16) -> Result<String> {
        let (_, open) = self.0.entry((way.name.clone(), udp)).or_default();
        let port = way.ports + NEW + *open;
        *open += count;
        ensure!(*open <= OPEN, "no more source ports");
        Ok(format!("--source-port={port}"))
    }
}

impl Traffic<'_> {
    /// Long ones, in use until they are closed.
    fn open(&mut self, lab: &Lab, service: &Service) -> Result<Open> {
        let mut open = Open { holds: Vec::new(), talks: Vec::new() };
        for way in ways(lab, service) {
            let [tcp, udp] = way.to.map(|to| to.to_string());
            let port = self.ports.of_open(&way, false, HELD)?;
            let held = format!("--connections={HELD}");
            let args = ["hold", &tcp, &port, &held, "--interval=300", "--expect=b1,b2", TIMEOUT];
            open.holds.push((way.name.clone(), start(lab, way.place, &args)?));
            let port = self.ports.of_open(&way, true, 1)?;
            let talk = start(lab, way.place, &["talk", &udp, &port, "--interval=200", TIMEOUT])?;
            open.talks.push((way.name, talk));
        }
        for (_, client) in open.holds.iter_mut().chain(&mut open.talks) {
            client.wait_for_line("ready", patience(60))?;
        }
        Ok(open)
    }

    fn close(&mut self, open: Open, phases: Phases) -> Result<()> {
        for (way, client) in open.holds {
            self.observed.held(phases, way, client.finish(patience(60))?);
        }
        for (way, client) in open.talks {
            self.observed.talk(phases, way, client.finish(patience(60))?);
        }
        Ok(())
    }

    /// New connections of every kind, before, while and after `act` is done.
    fn during(
        &mut self,
        lab: &mut Lab,
        service: &Service,
        phase: &'static str,
        act: impl FnOnce(&mut Self, &mut Lab) -> Result<()>,
    ) -> Result<()> {
        let mut storms = Vec::new();
        let (rate, workers, seconds) =
            (format!("--rate={RATE}"), format!("--workers={WORKERS}"), format!("--seconds={SECONDS}"));
        for way in ways(lab, service) {
            for (to, udp) in way.to.into_iter().zip([false, true]) {
                let (at, port) = (to.to_string(), self.ports.of_new(&way, udp));
                let mut args = vec!["storm", &at, &port, &rate, &seconds, &workers, "--expect=b1,b2", TIMEOUT];
                args.extend(udp.then_some("--udp"));
                storms.push((way.name.clone(), udp, start(lab, way.place, &args)?));
            }
        }
        let began = Instant::now();
        for (_, _, client) in &mut storms {
            client.wait_for_line("ready", patience(60))?;
        }
        act(self, lab)?;
        sleep(LASTS);
        let took = began.elapsed().as_secs();
        ensure!(took < SECONDS.into(), "the phase {phase:?} took {took} s, and was not watched to its end");
        for (way, udp, client) in storms {
            let report: storm::Report = client.finish(patience(60))?;
            self.ports.used(way.clone(), udp, report.tries)?;
            let transport = if udp { Transport::Udp } else { Transport::Tcp };
            self.observed.begun(phase, way, transport, report);
        }
        Ok(())
    }
}

fn start(lab: &Lab, place: &Place, args: &[&str]) -> Result<Client> {
    let args: Vec<String> = args.iter().map(|&arg| arg.to_owned()).collect();
    place.start(&lab.world.programs().testpod, &args)
}
