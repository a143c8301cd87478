//! The cluster in which everybody is examined in turn: one world, one API server, the same objects for all.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::Write as _,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    process::Stdio,
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::{
    objects::Objects,
    services::{At, OUTER_NETWORKS, Service, Via, owned, second},
    subject::{KubeProxy, Subject},
    table::{Case, Configuration, Expected, SIZE},
};
use crate::{
    apiserver::{self, ApiServer, Seat},
    pod::{probe::Report, socket::Transport, survey::Question},
    world::{
        AgentOptions, Fallback, Family, Place, Programs, SERVER_PORTS, Spec, Topology, World, objects, patience, slower,
    },
};

/// Syncs of kube-proxy take a second on a busy machine.
const PATIENCE: u64 = 30;
const ANSWER: Duration = Duration::from_secs(4);
/// First of the source ports of connections, where they are given: below those that the kernel chooses, of which some have just been closed.
const STREAMS: u32 = 2_000;
/// Where an agent listens.
const AGENT_PORTS: [u16; 2] = [10_249, 10_256];
/// With two backends one is missed once in a million times.
const TRIES: u32 = 20;

/// Fields are dropped in this order: nothing may run in the namespaces that the world removes.
pub struct Lab {
    proxies: Vec<KubeProxy>,
    pub objects: Objects,
    pub world: World,
    kube_proxy: Option<PathBuf>,
    dir: PathBuf,
    markers: u16,
    pub subject: Option<Subject>,
    configuration: Configuration,
    /// From the next start on.
    pub node_port_addresses: Option<&'static str>,
    /// Answers of a Service with affinity, and since when they are remembered.
    pub remembered: Option<(Instant, BTreeMap<String, String>)>,
    /// What node2 answers `outside` goes by node1.
    detoured: bool,
}

/// What there is besides our own programs.
pub enum Means {
    Upstream {
        servers: apiserver::Programs,
        kube_proxy: PathBuf,
    },
    /// Nothing: objects are files, and kube-proxy is not asked.
    None,
}

impl Lab {
    pub fn new(programs: Programs, means: Means) -> Result<Self> {
        let for_xdp = matches!(means, Means::Upstream { .. });
        let spec = Spec { rp_filter: false, for_xdp, ..Spec::two_nodes(Topology::Routed) };
        let world = World::new(&spec, programs)?;
        let (entry, outside) = (&world.node(1).place, world.outside());
        // What no dataplane takes leaves node1 by the way that it came, and the kernel would tell `outside` of a shorter one: past
        // node1, for good.
        outside.namespace.sysctl(&[
            ("ipv4/conf/all/accept_redirects", "0"),
            ("ipv4/conf/eth0/accept_redirects", "0"),
            ("ipv6/conf/all/accept_redirects", "0"),
            ("ipv6/conf/eth0/accept_redirects", "0"),
        ])?;
        // What is asked is who refuses, not how many refusals a second the kernel sends to one client.
        for node in &world.nodes {
            node.place.namespace.sysctl(&[("ipv4/icmp_ratemask", "0"), ("ipv6/icmp/ratemask", "0")])?;
        }
        for network in OUTER_NETWORKS {
            let by = if network.contains(':') { IpAddr::from(entry.v6) } else { entry.v4.into() };
            outside.namespace.ip(&format!("route replace {network} via {by}\n"))?;
        }
        for further in [second, owned] {
            let (v4, v6) = (further(Family::V4), further(Family::V6));
            entry.namespace.ip(&format!("addr add {v4}/24 dev eth0\naddr add {v6}/64 dev eth0 nodad\n"))?;
        }
        let dir = world.objects_dir();
        let (objects, kube_proxy) = match means {
            Means::Upstream { servers, kube_proxy } => {
                // Every node reaches it there, and no dataplane's rules are in its way.
                let seat = Seat { address: outside.v4.into(), namespace: Some(outside.namespace.path().into()) };
                (Objects::Served(ApiServer::start(servers, seat)?), Some(kube_proxy))
            }
            Means::None => (Objects::Files(dir.clone()), None),
        };
        let lab = Self {
            proxies: Vec::new(),
            objects,
            world,
            kube_proxy,
            dir,
            markers: 0,
            subject: None,
            configuration: Configuration::BASE,
            node_port_addresses: None,
            remembered: None,
            detoured: false,
        };
        lab.apply(&objects::nodes(&lab.world))?;
        Ok(lab)
    }

    pub fn apply(&self, objects: &[Value]) -> Result<()> {
        self.objects.apply(objects)
    }

    /// Writes Services with slices and statuses.
    pub fn install<'a>(&self, services: impl IntoIterator<Item = &'a Service>) -> Result<()> {
        let (mut objects, mut statuses) = (Vec::new(), Vec::new());
        for service in services {
            objects.extend(service.objects(&self.world)?);
            statuses.extend(service.status());
        }
        self.apply(&objects)?;
        self.objects.apply_status(&statuses)
    }

    /// Starts the subject on every node and waits until it has in force what was written so far.
    pub fn start(&mut self, subject: Subject, configuration: Configuration) -> Result<()> {
        (self.subject, self.configuration) = (Some(subject), configuration);
        self.remembered = None;
        self.detour(!configuration.detector && !configuration.masquerade_all)?;
        if subject.is_agent() {
            // What another subject left would answer in its place.
            for node in &self.world.nodes {
                let rules = node.place.namespace.rules()?;
                ensure!(rules.is_empty(), "{} has rules already:\n{}", node.place.name, rules.join("\n"));
                let filters = node.place.namespace.filters()?;
                ensure!(filters.is_empty(), "{} has tc filters already:\n{}", node.place.name, filters.join("\n"));
            }
        }
        self.launch(subject)
    }

    /// Kills the subject on every node, and starts it with what it left in the kernel.
    pub fn restart(&mut self) -> Result<()> {
        let subject = self.subject.context("nobody was started")?;
        self.proxies.clear();
        for number in 1..=self.world.nodes.len() {
            self.world.kill_agent(number)?;
        }
        self.launch(subject)
    }

    /// Starts the subject on every node beside whoever serves there, and waits until somebody has in force what was written so far.
    pub fn launch(&mut self, subject: Subject) -> Result<()> {
        let (configuration, node_port_addresses) = (self.configuration, self.node_port_addresses);
        let kubeconfig = self.objects.kubeconfig()?;
        match subject {
            Subject::KubeProxy(mode) => {
                let program = self.kube_proxy.as_ref().context("there is no kube-proxy here")?;
                let kubeconfig = kubeconfig.context("kube-proxy reads no files")?;
                for node in &self.world.nodes {
                    let more =
                        node_port_addresses.map_or_else(String::new, |range| format!("nodePortAddresses: [{range}]\n"));
                    let proxy = KubeProxy::start(program, node, &self.dir, mode, configuration, &kubeconfig, &more)?;
                    self.proxies.push(proxy);
                }
            }
            Subject::Ebpf(_) | Subject::Xdp(_) | Subject::Fallback(_) => {
                let mut options = match subject {
                    Subject::Fallback(fallback) => AgentOptions::by(fallback),
                    Subject::Ebpf(socket_lb) | Subject::Xdp(socket_lb) => AgentOptions::new(socket_lb),
                    Subject::KubeProxy(_) => bail!("no agent"),
                };
                options.kubeconfig = kubeconfig;
                if options.fallback.is_none() {
                    // Not another mode in its place, where the kernel refuses a program.
                    options.extra.extend(["--proxy-mode", "ebpf"].map(str::to_owned));
                }
                options.extra.extend(subject.extra().iter().map(|&word| word.to_owned()));
                options.extra.extend(node_port_addresses.map(|range| format!("--nodeport-addresses={range}")));
                if configuration.masquerade_all {
                    options.extra.push("--masquerade-all".to_owned());
                }
                let detection: &[&str] = match (configuration.detector, configuration.masquerade_all) {
                    // By devices, which is the default.
                    (true, false) => &[],
                    (true, true) => &["--detect-local-mode", "NodeCIDR"],
                    // Nobody is told without addresses (A73).
                    (false, _) => &["--detect-local-mode", "ClusterCIDR"],
                };
                options.extra.extend(detection.iter().map(|&word| word.to_owned()));
                self.world.start_agents(&options)?;
            }
        }
        self.settle()
    }

    /// Where nothing to a ClusterIP is masqueraded (A78), what a backend of node2 answers `outside` has to come by node1 all the same, which
    /// translated the question.
    fn detour(&mut self, wanted: bool) -> Result<()> {
        if self.detoured != wanted {
            let (entry, far) = (&self.world.node(1).place, &self.world.node(2).place);
            for family in Family::BOTH {
                let (outside, by) = (self.world.outside().ip(family), entry.ip(family));
                let bits = if family == Family::V4 { 32 } else { 128 };
                let change = if wanted { "replace" } else { "del" };
                far.namespace.ip(&format!("route {change} {outside}/{bits} via {by}\n"))?;
            }
            // Both are on one link, which node1 would tell node2 of.
            let redirects = if wanted { "0" } else { "1" };
            entry
                .namespace
                .sysctl(&[("ipv4/conf/all/send_redirects", redirects), ("ipv4/conf/eth0/send_redirects", redirects)])?;
            self.detoured = wanted;
        }
        Ok(())
    }

    /// Ends it and takes what it left in the kernel.
    pub fn stop(&mut self) -> Result<()> {
        match self.subject.take() {
            None => {}
            Some(Subject::Ebpf(_) | Subject::Xdp(_)) => {
                for number in 1..=self.world.nodes.len() {
                    self.world.kill_agent(number)?;
                }
                for node in &self.world.nodes {
                    // Without TCX a program is a filter's, and no pin's: it would go on with the next subject's packets.
                    if !node.place.namespace.filters()?.is_empty() {
                        self.world.cli(node, &["cleanup"])?;
                    }
                }
                self.world.remove_agents()?;
            }
            Some(Subject::Fallback(by)) => {
                self.world.remove_agents()?;
                if by == Fallback::Ipvs {
                    for node in &self.world.nodes {
                        self.world.cli(node, &["cleanup"])?;
                    }
                }
                self.forget_flows()?;
            }
            Some(Subject::KubeProxy(_)) => {
                self.proxies.clear();
                for node in &self.world.nodes {
                    node.place.namespace.flush_rules()?;
                    node.place.namespace.sysctl(&[("ipv4/conf/all/route_localnet", "0")])?;
                }
                self.forget_flows()?;
            }
        }
        Ok(())
    }

    fn forget_flows(&self) -> Result<()> {
        for node in &self.world.nodes {
            // Flows that are gone already are no error; it says how many there were.
            for family in ["ipv4", "ipv6"] {
                node.place.namespace.output("conntrack", &["-F", "-f", family])?;
            }
        }
        Ok(())
    }

    /// Ends kube-proxy and leaves its rules.
    pub fn end_proxies(&mut self) {
        self.proxies.clear();
    }

    /// What the subject's logs end with.
    pub fn logs(&self) -> String {
        let proxies = self.proxies.iter().map(KubeProxy::log);
        let agents = self.world.nodes.iter().filter(|node| node.agent_running()).map(crate::world::Node::agent_log);
        proxies.chain(agents).collect::<Vec<_>>().join("\n")
    }

    /// Waits until what was written so far is in force: until a marker, a Service written last, answers on every node.
    pub fn settle(&mut self) -> Result<()> {
        self.markers += 1;
        let number = self.markers;
        let name = format!("marker-{number}");
        // Some thousands of them, none the last address of its network.
        let [high, low] = (0xf000 + number).to_be_bytes();
        ensure!(number < 0xfff, "too many markers");
        let addresses =
            [IpAddr::from([10, 96, high, low]), IpAddr::from([0xfd00, 0x96, 0, 0, 0, 0, 0, 0xf000 + number])];
        let mut service = objects::service(&name).port("", "TCP", 1).cluster_ips(&addresses).json();
        service["spec"]["ipFamilyPolicy"] = "RequireDualStack".into();
        let backend = self.world.pod("c2");
        let slices =
            Family::BOTH.map(|family| objects::slice(&name, family).port("", "TCP", 8080).endpoint(backend).json());
        self.apply(&[vec![service], slices.to_vec()].concat())?;
        let patience = patience(PATIENCE);
        let deadline = Instant::now() + patience;
        let timeout = Duration::from_millis(300) * slower();
        for from in ["a1", "a2"] {
            loop {
                let questions =
                    addresses.map(|address| question(SocketAddr::new(address, 1), Transport::Tcp, 1, timeout));
                let reports = self.survey(from, &questions)?;
                if reports.iter().all(|report| report.errors().is_empty()) {
                    break;
                }
                ensure!(
                    Instant::now() < deadline,
                    "{name} does not answer {from} within {patience:?}\n{}",
                    self.logs()
                );
                std::thread::sleep(Duration::from_millis(30));
            }
        }
        Ok(())
    }

    /// A place by the name that cases give it.
    pub fn place(&self, name: &str) -> Result<&Place> {
        let name = match name {
            "pod" => "a1",
            "other" => "a2",
            "node" | "localhost" => "node1",
            name => name,
        };
        self.world.place(name).with_context(|| format!("no place {name}"))
    }

    pub fn survey(&self, from: &str, questions: &[Question]) -> Result<Vec<Report>> {
        let place = self.place(from)?;
        let mut child = place
            .command(&self.world.programs().testpod)?
            .arg("survey")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("start testpod")?;
        if let Some(mut stdin) = child.stdin.take() {
            let datagrams = place.source_ports();
            let every = self.subject.is_some_and(Subject::mixes_ports);
            let numbered = |question: &Question| match question.transport {
                _ if question.source_port.is_some() => question.clone(),
                Transport::Tcp if !every => question.clone(),
                Transport::Tcp => with_ports(question, STREAMS),
                _ => with_ports(question, datagrams),
            };
            let questions: Vec<Question> = questions.iter().map(numbered).collect();
            stdin.write_all(&serde_json::to_vec(&questions)?)?;
        }
        let done = child.wait_with_output()?;
        if !done.status.success() {
            bail!("testpod survey in {from}: {}", String::from_utf8_lossy(&done.stderr).trim());
        }
        serde_json::from_slice(&done.stdout).context("what testpod survey printed")
    }

    /// Asks every case, all those of one place at one time; for each what came back, of all families and transports, that is not
    /// as expected.
    pub fn ask_all(&self, cases: &[Case], services: &[Service]) -> Result<Vec<Vec<String>>> {
        let mut seen = vec![Vec::new(); cases.len()];
        let mut by_place: BTreeMap<&str, Vec<(usize, Family, Question)>> = BTreeMap::new();
        for (number, case) in cases.iter().enumerate() {
            let service = services.iter().find(|one| one.name == case.service).context("no such Service")?;
            for &family in &case.families {
                for &transport in &case.transports {
                    let to = service.address(&self.world, case.via, family, transport);
                    let question = Question { size: case.size, ..expecting(to, transport, &case.expected) };
                    by_place.entry(&case.from).or_default().push((number, family, question));
                }
            }
        }
        for (from, mut asked) in by_place {
            // What takes long begins first.
            asked.sort_by_key(|(_, _, question)| question.count);
            let questions: Vec<Question> = asked.iter().map(|(_, _, question)| question.clone()).collect();
            for ((number, family, question), report) in asked.iter().zip(self.survey(from, &questions)?) {
                let case = cases.get(*number).context("a case")?;
                let service = services.iter().find(|one| one.name == case.service).context("no such Service")?;
                let heard = self.heard(from, *family, &report)?;
                if !self.as_expected(case, service.filters(case.via, *family), question.transport, &heard) {
                    let failure = report.failure().map(|what| format!(" ({what})")).unwrap_or_default();
                    seen[*number].push(format!("{} {}{failure}: {heard}", question.to, question.transport));
                }
            }
        }
        Ok(seen)
    }

    /// Where pods are translated at connect time they keep their address, which is right (A77). SCTP never is.
    fn as_expected(&self, case: &Case, filtered: bool, transport: Transport, heard: &str) -> bool {
        let Some(subject) = self.subject else { return false };
        let Case { from, via, expected, .. } = case;
        let own = transport != Transport::Sctp && keeps_own(subject, from, *via, filtered);
        match expected {
            Expected::Answered { backends, sticky, source } => {
                let source = if own { "own" } else { source };
                let of = |backend: &str| heard == format!("{backend} {source}");
                if *sticky { backends.iter().any(|one| of(one)) } else { of(&backends.join(" ")) }
            }
            Expected::Nobody => is_nothing(heard),
            expected => nothing(subject, from, heard) == expected.text() || heard == "EPERM" && is_blind(subject, from),
        }
    }

    /// What came back, in the notation of the table.
    pub fn heard(&self, from: &str, family: Family, report: &Report) -> Result<String> {
        let place = self.place(from)?;
        let nodes: BTreeSet<IpAddr> =
            [self.world.node(1).place.ip(family), self.world.node(2).place.ip(family), second(family), owned(family)]
                .into();
        let (mut sources, mut backends) = (BTreeSet::new(), BTreeSet::new());
        for answer in report.tries.iter().filter_map(|one| one.answer.as_ref()) {
            let source = answer.peer.parse::<SocketAddr>()?.ip();
            let by = answer.local.parse::<SocketAddr>()?.port();
            backends.insert(if by == 8080 { answer.backend.clone() } else { format!("{}:{by}", answer.backend) });
            sources.insert(if !place.is_node() && source == place.ip(family) {
                "own".to_owned()
            } else if nodes.contains(&source) {
                "node".to_owned()
            } else {
                source.to_string()
            });
        }
        let mut words: Vec<String> = backends.into_iter().collect();
        if !sources.is_empty() {
            words.push(sources.into_iter().collect::<Vec<_>>().join("+"));
        }
        for error in report.errors().into_keys() {
            words.push(match error.as_str() {
                "ECONNREFUSED" => "refused".to_owned(),
                // The default route ends at a host that forwards nothing, and says so if it is IPv6.
                // What is dropped on the node's own way out, a raw socket hears of.
                "ETIMEDOUT" | "ENETUNREACH" | "ENOBUFS" => "silent".to_owned(),
                "EPERM" => error,
                // Nothing in the table ends so: say all that is known.
                _ => report.failure().unwrap_or(error),
            });
        }
        Ok(words.join(" "))
    }
}

/// Whether a backend sees the asker's own address, masqueraded or not: where the subject translates this place's connections at connect
/// time (A77). Node ports of another node are that node's to translate, and where only packets tell whether somebody may ask
/// (`filtered`), pods are left to them (A91).
pub fn keeps_own(subject: Subject, from: &str, via: Via, filtered: bool) -> bool {
    let pod = !is_node(from) && from != "outside";
    let elsewhere = match via {
        Via::NodePort(At::Node2) => from != "other",
        Via::NodePort(_) => from == "other",
        _ => false,
    };
    pod && !elsewhere && !filtered && subject.pods_at_connect_time()
}

fn is_node(place: &str) -> bool {
    matches!(place, "node" | "node2" | "localhost")
}

/// On the node's own way out netfilter answers a refused datagram as a dropped one: `EPERM`.
pub fn is_blind(subject: Subject, from: &str) -> bool {
    matches!(subject, Subject::KubeProxy(_) | Subject::Fallback(_)) && is_node(from)
}

/// What was heard, by its meaning: our hook on the node's own way out tells the drop of a datagram at once.
pub fn nothing<'a>(subject: Subject, from: &str, heard: &'a str) -> &'a str {
    if heard == "EPERM" && is_node(from) && !is_blind(subject, from) { "silent" } else { heard }
}

/// Whether it means that nobody answers.
pub fn is_nothing(heard: &str) -> bool {
    matches!(heard, "EPERM" | "refused" | "silent")
}

pub fn question(to: SocketAddr, transport: Transport, count: u32, timeout: Duration) -> Question {
    let timeout = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
    Question { to, transport, count, timeout, source_port: None, size: SIZE }
}

/// Who has not answered until then does not. Longer than a refusal takes that came while the socket was locked: TCP hears of it at its
/// second SYN, after a second; on an emulated machine at the third, after three.
pub fn silence() -> Duration {
    Duration::from_millis(if slower() > 1 { 4000 } else { 1600 })
}

/// A UDP flow outlives its socket: ports that another question just had would mix the two. Counted from `first`.
fn with_ports(question: &Question, first: u32) -> Question {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let count = question.count;
    let port = loop {
        let port = first + NEXT.fetch_add(count, Ordering::Relaxed) % 25_000;
        // Whose servers those are cannot ask from there.
        if !SERVER_PORTS.iter().chain(&AGENT_PORTS).any(|taken| (port..port + count).contains(&u32::from(*taken))) {
            break port;
        }
    };
    Question { source_port: u16::try_from(port).ok(), ..question.clone() }
}

fn expecting(to: SocketAddr, transport: Transport, expected: &Expected) -> Question {
    match expected {
        Expected::Refused => question(to, transport, 1, ANSWER * slower()),
        Expected::Silent | Expected::Nobody => question(to, transport, 1, silence()),
        Expected::Answered { backends, .. } => {
            question(to, transport, if backends.len() > 1 { TRIES } else { 10 }, ANSWER * slower())
        }
    }
}
