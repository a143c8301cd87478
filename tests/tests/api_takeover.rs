//! kube-proxy, then the agent, then kube-proxy again, on running nodes: new connections are answered at any time, those that are open go on,
//! whoever translated them, and nothing is left of the former.
//!
//! `cargo xtask e2e takeover` does the same in a whole cluster.

use std::{
    collections::BTreeMap,
    fs::{self, File},
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
    observed::{Observed, Phases},
    pod::socket::Transport,
    suite::Suite,
    world::{AgentOptions, Client, Family, Node, Place, SocketLb, World, cleanup_on_signals, patience, within},
};

/// Whose are asked. No phase but lasts so long at least.
const SERVICES: &str = "web | NodePort | b1 b2";
const LASTS: Duration = Duration::from_secs(2);

/// Connections a second of each kind, and after how many seconds they end at the latest.
const RATE: u16 = 4;
const SECONDS: u16 = 50;
/// Long ones of each way.
const HELD: u16 = 5;
/// No claim about speed.
const TIMEOUT: &str = "--timeout=8000";

/// Source ports, of which none is used twice: what conntrack remembers of a connection outlives it. A node's are none that a proxy
/// masquerades with.
const PORTS: u16 = 10_000;
const PORTS_OF_NODE: u16 = 61_000;

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
    options.extra.extend(["--proxy-mode", "ebpf"].map(str::to_owned));
    options.extra.extend(["--conntrack-udp-timeout=3s", "--conntrack-udp-timeout-stream=3s"].map(str::to_owned));
    let mut traffic = Traffic { observed: Observed::default(), ports };
    lab.start(Subject::KubeProxy(mode), Configuration::BASE)?;
    lab.world.nodes.iter().try_for_each(|node| node.place.namespace.sysctl(&FORGETFUL))?;

    let since_before = traffic.open(lab, service)?;
    traffic.during(lab, service, BEFORE, |_| Ok(()))?;
    traffic.during(lab, service, TO_AGENT, |lab| {
        lab.world.start_agents(&options)?;
        lab.settle()?;
        lab.end_proxies();
        lab.world.nodes.iter().try_for_each(|node| rid_of_kube_proxy(lab, node, service))
    })?;
    let since_agent = traffic.open(lab, service)?;
    traffic.during(lab, service, AGENT, |lab| {
        lab.world.nodes.iter().try_for_each(|node| within(patience(60), || counts_them(node)))
    })?;
    traffic.close(since_before, Phases { since: BEFORE, until: AGENT })?;
    // Nobody needs it any more.
    lab.world.nodes.iter().try_for_each(|node| within(patience(90), || is_alone(node)))?;

    let mut drains = Vec::new();
    traffic.during(lab, service, BACK, |lab| {
        lab.launch(Subject::KubeProxy(mode))?;
        for node in &lab.world.nodes {
            within(patience(60), || has_rules(lab, node, service))?;
        }
        for number in 1..=lab.world.nodes.len() {
            lab.world.kill_agent(number)?;
        }
        let dir = lab.world.objects_dir();
        for node in &lab.world.nodes {
            drains.push(Drain::begin(node, agent, &dir)?);
        }
        drains.iter().try_for_each(|drain| drain.says("new connections are left to others"))
    })?;
    let since_after = traffic.open(lab, service)?;
    traffic.during(lab, service, AFTER, |_| Ok(()))?;
    for drain in &mut drains {
        ensure!(drain.goes_on()?, "a node's cleanup did not wait: {}", drain.said()?);
    }
    traffic.close(since_agent, Phases { since: AGENT, until: AFTER })?;
    for drain in drains {
        drain.ends()?;
    }
    traffic.close(since_after, Phases { since: AFTER, until: AFTER })?;
    for node in &lab.world.nodes {
        ensure!(!node.bpffs.exists(), "{} is still there", node.bpffs.display());
    }
    let Traffic { observed, ports: _ } = traffic;
    println!("{observed}");
    // `cargo xtask` shows lines that begin so.
    observed.sums().lines().for_each(|line| println!("sum  {line}"));
    ensure!(observed.is_clean(), "connections broke or were refused:\n{observed}");
    Ok(())
}

/// Beside the agent that runs.
fn rid_of_kube_proxy(lab: &Lab, node: &Node, service: &Service) -> Result<()> {
    let world = &lab.world;
    let refused = world.cli(node, &["cleanup"]).err().map(|error| error.to_string()).unwrap_or_default();
    ensure!(refused.contains("an agent runs on") && refused.contains("stop it first"), "cleanup: {refused}");
    let dry = world.cli(node, &["cleanup", "--kube-proxy", "--dry-run"])?;
    ensure!(dry.contains("would keep NAT on") && dry.contains("would remove"), "{dry}");
    has_rules(lab, node, service).context("a dry run")?;
    let said = world.cli(node, &["cleanup", "--kube-proxy"])?;
    ensure!(said.contains("what is its own stays") && said.contains("removed"), "{said}");
    let again = world.cli(node, &["cleanup", "--kube-proxy"])?;
    ensure!(again.contains("no rules of kube-proxy"), "{again}");
    let shown = world.cli_output(node, &["check"])?;
    ensure!(shown.contains("no traces of kube-proxy"), "{shown}");
    Ok(())
}

/// What kube-proxy translated is known, and NAT stays on for it.
fn counts_them(node: &Node) -> Result<()> {
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
        command.args(["cleanup", "--drain=10m", "--bpffs"]).arg(&node.bpffs).stdin(Stdio::null());
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

/// The next source port of each place, family (IPv4?) and protocol (UDP?).
#[derive(Default)]
struct Ports(BTreeMap<(String, bool, bool), u16>);

/// Who asks, and by what way.
fn ways<'a>(lab: &'a Lab, service: &Service) -> Vec<(&'a Place, String, [SocketAddr; 2])> {
    let world = &lab.world;
    let (pod, node, outside) = (world.pod("a1"), &world.node(1).place, world.outside());
    let mut ways = Vec::new();
    for family in Family::BOTH {
        for (place, via, name) in [
            (pod, Via::ClusterIp, "ClusterIP"),
            (pod, Via::NodePort(At::Node2), "NodePort of node2"),
            (node, Via::ClusterIp, "ClusterIP"),
            (node, Via::NodePort(At::Node1), "NodePort of node1"),
            (outside, Via::NodePort(At::Node1), "NodePort of node1"),
        ] {
            let to = [Transport::Tcp, Transport::Udp].map(|transport| service.address(world, via, family, transport));
            ways.push((place, format!("{} → {name}, {family}", place.name), to));
        }
    }
    ways
}

impl Ports {
    /// So many that follow one another.
    fn take(&mut self, place: &Place, to: SocketAddr, udp: bool, count: u16) -> Result<String> {
        let first = if place.is_node() { PORTS_OF_NODE } else { PORTS };
        let next = self.0.entry((place.name.clone(), to.is_ipv4(), udp)).or_insert(first);
        let port = *next;
        *next = port.checked_add(count).context("no more source ports")?;
        Ok(format!("--source-port={port}"))
    }
}

impl Traffic<'_> {
    /// Long ones, in use until they are closed.
    fn open(&mut self, lab: &Lab, service: &Service) -> Result<Open> {
        let mut open = Open { holds: Vec::new(), talks: Vec::new() };
        for (place, way, [tcp, udp]) in ways(lab, service) {
            let (to, port) = (tcp.to_string(), self.ports.take(place, tcp, false, HELD)?);
            let held = format!("--connections={HELD}");
            let args = ["hold", &to, &port, &held, "--interval=300", "--expect=b1,b2", TIMEOUT];
            open.holds.push((way.clone(), start(lab, place, &args)?));
            let (to, port) = (udp.to_string(), self.ports.take(place, udp, true, 1)?);
            open.talks.push((way, start(lab, place, &["talk", &to, &port, "--interval=200", TIMEOUT])?));
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
        act: impl FnOnce(&mut Lab) -> Result<()>,
    ) -> Result<()> {
        let mut storms = Vec::new();
        let (rate, seconds) = (format!("--rate={RATE}"), format!("--seconds={SECONDS}"));
        for (place, way, [tcp, udp]) in ways(lab, service) {
            for (to, udp) in [(tcp, false), (udp, true)] {
                let (at, port) = (to.to_string(), self.ports.take(place, to, udp, RATE * SECONDS)?);
                let mut args = vec!["storm", &at, &port, &rate, &seconds, "--workers=2", "--expect=b1,b2", TIMEOUT];
                args.extend(udp.then_some("--udp"));
                let transport = if udp { Transport::Udp } else { Transport::Tcp };
                storms.push((way.clone(), transport, start(lab, place, &args)?));
            }
        }
        for (_, _, client) in &mut storms {
            client.wait_for_line("ready", patience(60))?;
        }
        act(lab)?;
        sleep(LASTS);
        for (way, transport, client) in storms {
            self.observed.begun(phase, way, transport, client.finish(patience(60))?);
        }
        Ok(())
    }
}

fn start(lab: &Lab, place: &Place, args: &[&str]) -> Result<Client> {
    let args: Vec<String> = args.iter().map(|&arg| arg.to_owned()).collect();
    place.start(&lab.world.programs().testpod, &args)
}
