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
use serde_json::{Value, json};

use super::{
    services::{At, OUTER_NETWORKS, Service, Via, second},
    subject::{KubeProxy, Subject},
    table::{Case, Configuration, Expected},
};
use crate::{
    apiserver::{self, ApiServer, Seat, User},
    pod::{probe::Report, socket::Transport, survey::Question},
    world::{AgentOptions, Family, Place, Programs, Spec, Topology, World, objects},
};

/// Syncs of kube-proxy take a second on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);
/// Longer than a refusal takes that came while the socket was locked: TCP hears of it at its second SYN, after a second.
const SILENCE: u64 = 1600;
const ANSWER: u64 = 4000;
/// With two backends one is missed once in a million times.
const TRIES: u32 = 20;

/// Fields are dropped in this order: nothing may run in the namespaces that the world removes.
pub struct Lab {
    proxies: Vec<KubeProxy>,
    pub server: ApiServer,
    pub world: World,
    kube_proxy: PathBuf,
    dir: PathBuf,
    markers: u16,
    pub subject: Option<Subject>,
}

impl Lab {
    pub fn new(programs: Programs, servers: apiserver::Programs, kube_proxy: PathBuf) -> Result<Self> {
        let spec = Spec { rp_filter: false, ..Spec::two_nodes(Topology::Routed) };
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
        for network in OUTER_NETWORKS {
            let by = if network.contains(':') { IpAddr::from(entry.v6) } else { entry.v4.into() };
            outside.namespace.ip(&format!("route replace {network} via {by}\n"))?;
        }
        let (v4, v6) = (second(Family::V4), second(Family::V6));
        entry.namespace.ip(&format!("addr add {v4}/24 dev eth0\naddr add {v6}/64 dev eth0 nodad\n"))?;
        // Every node reaches it there, and no dataplane's rules are in its way.
        let seat = Seat { address: outside.v4.into(), namespace: Some(outside.namespace.path().into()) };
        let server = ApiServer::start(servers, seat)?;
        let dir = world.objects_dir();
        let lab = Self { proxies: Vec::new(), server, world, kube_proxy, dir, markers: 0, subject: None };
        lab.apply(&objects::nodes(&lab.world))?;
        Ok(lab)
    }

    pub fn apply(&self, objects: &[Value]) -> Result<()> {
        self.server.apply(&list(objects))
    }

    /// Writes Services with slices and statuses.
    pub fn install<'a>(&self, services: impl IntoIterator<Item = &'a Service>) -> Result<()> {
        let (mut objects, mut statuses) = (Vec::new(), Vec::new());
        for service in services {
            objects.extend(service.objects(&self.world)?);
            statuses.extend(service.status());
        }
        self.apply(&objects)?;
        if statuses.is_empty() { Ok(()) } else { self.server.apply_status(&list(&statuses)) }
    }

    /// Starts the subject on every node and waits until it has in force what was written so far.
    pub fn start(&mut self, subject: Subject, configuration: Configuration) -> Result<()> {
        self.subject = Some(subject);
        let kubeconfig = self.server.kubeconfig(User::Proxy, self.server.address())?;
        match subject {
            Subject::KubeProxy(mode) => {
                for node in &self.world.nodes {
                    let proxy = KubeProxy::start(&self.kube_proxy, node, &self.dir, mode, configuration, &kubeconfig)?;
                    self.proxies.push(proxy);
                }
            }
            Subject::Ebpf(socket_lb) => {
                let mut options = AgentOptions { kubeconfig: Some(kubeconfig), ..AgentOptions::new(socket_lb) };
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

    /// Ends it and takes what it left in the kernel.
    pub fn stop(&mut self) -> Result<()> {
        match self.subject.take() {
            None => {}
            Some(Subject::Ebpf(_)) => self.world.remove_agents()?,
            Some(Subject::KubeProxy(_)) => {
                self.proxies.clear();
                for node in &self.world.nodes {
                    let namespace = &node.place.namespace;
                    namespace.nft("flush ruleset")?;
                    // Flows that are gone already are no error; it says how many there were.
                    for family in ["ipv4", "ipv6"] {
                        namespace.output("conntrack", &["-F", "-f", family])?;
                    }
                    namespace.sysctl(&[("ipv4/conf/all/route_localnet", "0")])?;
                }
            }
        }
        Ok(())
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
        let addresses = [
            IpAddr::from([10, 96, 255, u8::try_from(number).context("too many markers")?]),
            IpAddr::from([0xfd00, 0x96, 0, 0, 0, 0, 0, 0xff00 + number]),
        ];
        let mut service = objects::service(&name).port("", "TCP", 1).cluster_ips(&addresses).json();
        service["spec"]["ipFamilyPolicy"] = "RequireDualStack".into();
        let backend = self.world.pod("c2");
        let slices =
            Family::BOTH.map(|family| objects::slice(&name, family).port("", "TCP", 8080).endpoint(backend).json());
        self.apply(&[vec![service], slices.to_vec()].concat())?;
        let deadline = Instant::now() + PATIENCE;
        for from in ["a1", "a2"] {
            loop {
                let questions = addresses.map(|address| question(SocketAddr::new(address, 1), Transport::Tcp, 1, 300));
                let reports = self.survey(from, &questions)?;
                if reports.iter().all(|report| report.errors().is_empty()) {
                    break;
                }
                ensure!(
                    Instant::now() < deadline,
                    "{name} does not answer {from} within {PATIENCE:?}\n{}",
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
            let first = place.source_ports();
            let questions: Vec<Question> = questions.iter().map(|question| with_ports(question, first)).collect();
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
                    let question = expecting(to, transport, &case.expected);
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
                let heard = self.heard(from, *family, &report)?;
                if !self.as_expected(case, &heard, from) {
                    seen[*number].push(format!("{} {}: {heard}", question.to, question.transport));
                }
            }
        }
        Ok(seen)
    }

    /// Where pods are translated at connect time they keep their address, which is right (A77).
    fn as_expected(&self, case: &Case, heard: &str, from: &str) -> bool {
        let expected = self
            .subject
            .map_or(case.expected.clone(), |subject| at_connect_time(subject, from, case.via, &case.expected));
        match expected {
            Expected::Answered { backends, sticky: true, source } => {
                backends.iter().any(|backend| heard == format!("{backend} {source}"))
            }
            // On the node's own way out a refused datagram and a dropped one look the same.
            Expected::Refused | Expected::Silent if heard == "EPERM" => {
                matches!(from, "node" | "node2" | "localhost")
            }
            expected => heard == expected.text(),
        }
    }

    /// What came back, in the notation of the table.
    pub fn heard(&self, from: &str, family: Family, report: &Report) -> Result<String> {
        let place = self.place(from)?;
        let nodes: BTreeSet<IpAddr> =
            [self.world.node(1).place.ip(family), self.world.node(2).place.ip(family), second(family)].into();
        let mut sources = BTreeSet::new();
        for answer in report.tries.iter().filter_map(|one| one.answer.as_ref()) {
            let source = answer.peer.parse::<SocketAddr>()?.ip();
            sources.insert(if !place.is_node() && source == place.ip(family) {
                "own".to_owned()
            } else if nodes.contains(&source) {
                "node".to_owned()
            } else {
                source.to_string()
            });
        }
        let mut words: Vec<String> = report.backends().into_keys().collect();
        if !sources.is_empty() {
            words.push(sources.into_iter().collect::<Vec<_>>().join("+"));
        }
        for error in report.errors().into_keys() {
            words.push(match error.as_str() {
                "ECONNREFUSED" => "refused".to_owned(),
                // The default route ends at a host that forwards nothing, and says so if it is IPv6.
                "ETIMEDOUT" | "ENETUNREACH" => "silent".to_owned(),
                _ => error,
            });
        }
        Ok(words.join(" "))
    }
}

/// What the answer becomes for a subject that translates this place's connections at connect time. Node ports of another node are
/// that node's to translate.
fn at_connect_time(subject: Subject, from: &str, via: Via, expected: &Expected) -> Expected {
    let pod = !matches!(from, "node" | "node2" | "localhost" | "outside");
    let elsewhere = match via {
        Via::NodePort(At::Node2) => from != "other",
        Via::NodePort(_) => from == "other",
        _ => false,
    };
    match expected {
        Expected::Answered { backends, sticky, .. } if pod && !elsewhere && subject.pods_at_connect_time() => {
            Expected::Answered { backends: backends.clone(), sticky: *sticky, source: "own".to_owned() }
        }
        expected => expected.clone(),
    }
}

pub fn question(to: SocketAddr, transport: Transport, count: u32, timeout: u64) -> Question {
    Question { to, transport, count, timeout, source_port: None }
}

/// A UDP flow outlives its socket: ports that another question just had would mix the two. Counted from `first`.
fn with_ports(question: &Question, first: u32) -> Question {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let mut question = question.clone();
    if question.transport != Transport::Tcp {
        question.source_port = u16::try_from(first + NEXT.fetch_add(question.count, Ordering::Relaxed) % 25_000).ok();
    }
    question
}

fn expecting(to: SocketAddr, transport: Transport, expected: &Expected) -> Question {
    match expected {
        Expected::Refused => question(to, transport, 1, ANSWER),
        Expected::Silent => question(to, transport, 1, SILENCE),
        Expected::Answered { backends, .. } => {
            question(to, transport, if backends.len() > 1 { TRIES } else { 10 }, ANSWER)
        }
    }
}

fn list(objects: &[Value]) -> String {
    json!({"apiVersion": "v1", "kind": "List", "items": objects}).to_string()
}
