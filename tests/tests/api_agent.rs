//! The real agent against a real API server: what clients see while objects come, change and go, while the server is away, and
//! while the agent is.
//!
//! The API server sits in the network namespace of the only node and listens on its loopback. Everything that the agent knows
//! came through its watches; nothing is read from files.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

#[path = "api_agent/events.rs"]
mod events;

use anyhow::{Context, Result, bail, ensure};
use proxy_tests::{
    apiserver::{self, ApiServer, Relay, Seat, User},
    manifests::{self, BASE, OVERLAYS},
    pod::{hold, socket::Transport, storm},
    suite::Suite,
    world::{
        AgentOptions, Ask, Client, Family, Node, Place, Programs, SocketLb, Spec, Topology, World, cleanup_on_signals,
        objects, vip, within,
    },
};
use serde_json::{Value, json};

/// Long enough for a busy machine; what is waited for usually takes milliseconds.
const PATIENCE: Duration = Duration::from_secs(20);
/// The same for what waits for the agent's next try to reach the API server.
const RETURN: Duration = Duration::from_secs(60);
/// How long nothing is to happen where nothing may.
const QUIET: Duration = Duration::from_secs(2);

/// A Service that every case finds, and its address.
const WEB: (&str, u8) = ("web", 20);

fn main() -> ExitCode {
    let mut suite = Suite::new("api_agent");
    let Some(programs) = suite.programs() else { return suite.finish() };
    let servers = match apiserver::Programs::find() {
        Ok(servers) => servers,
        Err(reason) => {
            suite.skip("api_agent", &format!("{reason:#}"));
            return suite.finish();
        }
    };
    match cleanup_on_signals().and_then(|()| World::sweep()).and_then(|_| Cluster::new(programs, servers)) {
        Ok(mut cluster) => cases(&mut suite, &mut cluster),
        Err(error) => suite.fail("preparation", &error),
    }
    suite.finish()
}

fn cases(suite: &mut Suite, cluster: &mut Cluster) {
    for socket_lb in SocketLb::SERVING {
        let group = format!("api/{}", socket_lb.name());
        if !suite.wants_group(&group) {
            continue;
        }
        cluster.socket_lb = socket_lb;
        let mut case = |name: &str, case: fn(&mut Cluster) -> Result<()>| {
            suite.case(&format!("{group}/{name}"), || {
                case(cluster).map_err(|error| error.context(cluster.world.node(1).agent_log()))
            });
        };
        case("A124: nothing before the lists are complete", nothing_early);
        case("endpoints and Services come, change and go", changes);
        case("A136: kill -9 of the API server", server_killed);
        if socket_lb == SocketLb::All {
            case("the manifests, field by field", manifests_taken);
            case("in a pod, by the manifests' service account", in_a_pod);
            case("metrics and health", metrics);
            case("A145, A115: Events on the Node and on Services", events::told);
            case("A137: deleted while the agent was cut off", deleted_meanwhile);
            case("A135, A136: the agent started again while the API server is down", both_down);
        }
    }
    if !suite.is_clean() {
        eprintln!("{}", cluster.server.log());
    }
}

/// A node with its pods, and the API server. Fields are dropped in this order: nothing may run in the namespaces that the
/// world removes.
struct Cluster {
    server: ApiServer,
    world: World,
    socket_lb: SocketLb,
}

impl Cluster {
    fn new(programs: Programs, servers: apiserver::Programs) -> Result<Self> {
        let pods = ["client", "r1", "r2", "r3"].map(str::to_owned).to_vec();
        let world = World::new(&Spec { nodes: vec![pods], ..Spec::two_nodes(Topology::Routed) }, programs)?;
        let namespace = PathBuf::from(world.node(1).place.namespace.path());
        let server = ApiServer::start(servers, Seat { namespace: Some(namespace), ..Seat::default() })?;
        Ok(Self { server, world, socket_lb: SocketLb::All })
    }

    fn node(&self) -> &Node {
        self.world.node(1)
    }

    fn apply(&self, objects: &[Value]) -> Result<()> {
        self.server.apply(&json!({"apiVersion": "v1", "kind": "List", "items": objects}).to_string())
    }

    /// The Service's slices of both families, with these endpoints.
    fn endpoints(&self, service: &str, pods: &[&str]) -> Result<()> {
        let places: Vec<&Place> = pods.iter().map(|pod| self.world.pod(pod)).collect();
        self.apply(&Family::BOTH.map(|family| slice(service, family).endpoints(places.iter().copied()).json()))
    }

    /// A new Service with these endpoints.
    fn create(&self, (name, number): (&str, u8), pods: &[&str]) -> Result<()> {
        self.apply(&[service(name, number)])?;
        self.endpoints(name, pods)
    }

    /// Starts the agent, or starts it again; does not wait.
    fn start(&mut self, at: SocketAddr) -> Result<()> {
        let kubeconfig = Some(self.server.kubeconfig(User::Proxy, at)?);
        self.world.start_agent(1, &AgentOptions { kubeconfig, ..AgentOptions::new(self.socket_lb) })
    }

    /// In step with the API server, with `web` and nothing else, whatever the case before left.
    fn ready(&mut self) -> Result<()> {
        self.server.kubectl(&["get", "--raw", "/readyz"], "").map(drop).or_else(|_| self.server.restart())?;
        self.apply(&[objects::node(&self.node().place, "zone-a")])?;
        self.create(WEB, &["r1", "r2"])?;
        if !self.world.node(1).agent_running() {
            self.start(self.server.address())?;
        }
        self.node().wait_ready(PATIENCE)?;
        within(RETURN, || self.reachable(true))?;
        within(PATIENCE, || self.served(WEB.1, &["r1", "r2"]))
    }

    /// Whether the agent has the API server.
    fn reachable(&self, wanted: bool) -> Result<()> {
        let synced = self.node().metric("proxy_agent_source_synced")? == 1.0;
        ensure!(
            synced == wanted,
            "the source is {} synced: {}",
            if synced { "" } else { "not" },
            self.node().status()?
        );
        Ok(())
    }

    fn origins(&self) -> [&Place; 2] {
        [self.world.pod("client"), &self.node().place]
    }

    /// Exactly these answer, from everywhere, over both families and transports.
    fn served(&self, number: u8, pods: &[&str]) -> Result<()> {
        let expected: BTreeSet<String> = pods.iter().map(|&pod| pod.to_owned()).collect();
        for from in self.origins() {
            for (to, transport) in addresses(number) {
                let tries = 20 * u32::try_from(pods.len())?;
                let report = self.world.ask(from, &Ask::new(to, transport).times(tries).with("--fail-fast"))?;
                let seen: BTreeSet<String> = report.backends().into_keys().collect();
                ensure!(
                    report.errors().is_empty() && seen == expected,
                    "{} -> {to} {transport}: {:?} {:?}, expected {expected:?}",
                    from.name,
                    report.backends(),
                    report.errors()
                );
            }
        }
        Ok(())
    }

    /// Nobody answers, and nobody refuses: the address is no Service's.
    fn unserved(&self, number: u8) -> Result<()> {
        self.all_fail(number, 250, "ETIMEDOUT")
    }

    fn refused(&self, number: u8) -> Result<()> {
        // Per packet an IPv6 refusal may take the second SYN (see the cases of A81).
        self.all_fail(number, 3000, "ECONNREFUSED")
    }

    fn all_fail(&self, number: u8, patience: u32, errno: &str) -> Result<()> {
        for from in self.origins() {
            for (to, transport) in addresses(number) {
                let report = self.world.ask(from, &Ask::new(to, transport).timeout(patience))?;
                ensure!(
                    report.backends().is_empty() && report.errors().keys().eq([errno]),
                    "{} -> {to} {transport}: expected {errno}, saw {report:?}",
                    from.name
                );
            }
        }
        Ok(())
    }
}

fn addresses(number: u8) -> impl Iterator<Item = (SocketAddr, Transport)> {
    Family::BOTH.into_iter().flat_map(move |family| {
        [(80, Transport::Tcp), (53, Transport::Udp)]
            .map(|(port, transport)| (SocketAddr::new(vip(family, number), port), transport))
    })
}

fn service(name: &str, number: u8) -> Value {
    let addresses = Family::BOTH.map(|family| vip(family, number));
    let mut service =
        objects::service(name).cluster_ips(&addresses).port("web", "TCP", 80).port("dns", "UDP", 53).json();
    // The server gives out its own.
    if let Some(metadata) = service["metadata"].as_object_mut() {
        metadata.remove("uid");
    }
    service["spec"]["ipFamilyPolicy"] = "RequireDualStack".into();
    service
}

fn slice(service: &str, family: Family) -> objects::Slice {
    objects::slice(service, family).port("web", "TCP", 8080).port("dns", "UDP", 8080)
}

/// Holds for a while.
fn steadily(check: impl Fn() -> Result<()>) -> Result<()> {
    let began = Instant::now();
    while began.elapsed() < QUIET {
        check()?;
    }
    Ok(())
}

/// Connections to `web` held and made, from the pod and from the node, all through a case.
struct Traffic {
    holds: Vec<(String, Client)>,
    storms: Vec<(String, Client)>,
}

impl Traffic {
    fn start(cluster: &Cluster) -> Result<Self> {
        let testpod: &Path = &cluster.world.programs().testpod;
        let mut traffic = Self { holds: Vec::new(), storms: Vec::new() };
        for from in cluster.origins() {
            for family in Family::BOTH {
                let to = SocketAddr::new(vip(family, WEB.1), 80).to_string();
                let what = format!("{} -> {to}", from.name);
                let args = |args: &[&str]| args.iter().map(|&arg| arg.to_owned()).collect::<Vec<_>>();
                let hold = args(&["hold", &to, "--interval=100", "--connections=20", "--expect=r1,r2"]);
                traffic.holds.push((what.clone(), from.start(testpod, &hold)?));
                let storm = args(&["storm", &to, "--seconds=300", "--rate=20", "--expect=r1,r2"]);
                traffic.storms.push((what, from.start(testpod, &storm)?));
            }
        }
        for (_, client) in traffic.holds.iter_mut().chain(&mut traffic.storms) {
            client.wait_for_line("ready", PATIENCE)?;
        }
        Ok(traffic)
    }

    /// Nothing broke, nothing failed, nobody wrong answered.
    fn finish(self) -> Result<()> {
        for (what, client) in self.holds {
            let report: hold::Report = client.finish(PATIENCE)?;
            let whole = report.broken.is_empty() && report.wrong.is_empty() && report.rounds > 2;
            ensure!(whole, "held connections, {what}: {report:?}");
        }
        for (what, client) in self.storms {
            let report: storm::Report = client.finish(PATIENCE)?;
            let whole = report.failures.is_empty() && report.wrong.is_empty() && report.tries > 0;
            ensure!(whole, "new connections, {what}: {report:?}");
        }
        Ok(())
    }
}

/// The lists of Services and EndpointSlices are there, but not yet the agent's own Node.
fn nothing_early(cluster: &mut Cluster) -> Result<()> {
    cluster.world.remove_agents()?;
    cluster.server.kubectl(&["delete", "node", "node1", "--ignore-not-found"], "")?;
    cluster.create(WEB, &["r1", "r2"])?;
    cluster.start(cluster.server.address())?;
    let node = cluster.node();
    within(PATIENCE, || {
        let status = node.status()?.to_string();
        ensure!(status.contains("--hostname-override"), "the status does not tell of the missing Node: {status}");
        Ok(())
    })?;
    steadily(|| {
        cluster.unserved(WEB.1)?;
        for (metric, value) in
            [("proxy_agent_ready", 0.0), ("proxy_agent_source_synced", 0.0), ("proxy_agent_syncs_total", 0.0)]
        {
            ensure!(node.metric(metric)? == value, "{metric} is {}", node.metric(metric)?);
        }
        let (livez, healthz) = (node.http(10256, "/livez")?, node.http(10256, "/healthz")?);
        ensure!((livez.0, healthz.0) == (200, 503), "livez {livez:?}, healthz {healthz:?}");
        Ok(())
    })?;
    cluster.apply(&[objects::node(&node.place, "zone-a")])?;
    node.wait_ready(PATIENCE)?;
    cluster.served(WEB.1, &["r1", "r2"])?;
    within(PATIENCE, || cluster.reachable(true))
}

fn changes(cluster: &mut Cluster) -> Result<()> {
    cluster.ready()?;
    let cluster = &*cluster;
    cluster.create(("short", 30), &["r1"])?;
    within(PATIENCE, || cluster.served(30, &["r1"]))?;
    for pods in [&["r1", "r3"][..], &["r3"], &["r1", "r2", "r3"], &["r2"]] {
        cluster.endpoints("short", pods)?;
        within(PATIENCE, || cluster.served(30, pods)).with_context(|| format!("endpoints {pods:?}"))?;
    }
    let unready = json!({"ready": false, "serving": false, "terminating": false});
    let place = cluster.world.pod("r2");
    cluster.apply(
        &Family::BOTH.map(|family| slice("short", family).endpoint_with(place, unready.clone(), Value::Null).json()),
    )?;
    within(PATIENCE, || cluster.refused(30)).context("unready")?;
    cluster.endpoints("short", &["r2"])?;
    within(PATIENCE, || cluster.served(30, &["r2"])).context("ready again")?;
    cluster.server.delete("service", "short")?;
    within(PATIENCE, || cluster.unserved(30)).context("the Service is deleted")?;
    // A13: the same name with another address.
    cluster.apply(&[service("short", 31)])?;
    within(PATIENCE, || cluster.served(31, &["r2"])).context("made again")?;
    cluster.unserved(30)?;
    // A13 once more, in one step as far as the agent can tell: the deletion and the creation come right after each other.
    cluster
        .server
        .kubectl(&["replace", "--force", "--validate=false", "-f", "-"], &service("short", 32).to_string())?;
    within(PATIENCE, || cluster.served(32, &["r2"])).context("replaced")?;
    within(PATIENCE, || cluster.unserved(31)).context("replaced")?;
    cluster.server.delete("service", "short")?;
    cluster.server.delete("endpointslice", "short-v4")?;
    cluster.server.delete("endpointslice", "short-v6")?;
    within(PATIENCE, || cluster.unserved(32))?;
    cluster.served(WEB.1, &["r1", "r2"])
}

/// The API server knows every field of what is rendered, and would store it.
fn manifests_taken(cluster: &mut Cluster) -> Result<()> {
    let dry = |yaml: &str| {
        let args = ["apply", "--server-side", "--dry-run=server", "--validate=strict", "-f", "-"];
        cluster.server.kubectl(&args, yaml)
    };
    for directory in [BASE].into_iter().chain(OVERLAYS) {
        let rendered = manifests::render(directory)?;
        let taken = dry(&rendered).context(directory)?;
        let objects = manifests::objects(&rendered)?.len();
        ensure!(taken.lines().count() == objects, "{directory} has {objects} objects, taken were {taken}");
    }
    // It looks at each.
    let misspelt = manifests::render(BASE)?.replace("hostNetwork:", "hostnetwork:");
    let refused = dry(&misspelt).err().context("a field that there is not was taken")?.to_string();
    ensure!(refused.contains("hostnetwork"), "{refused}");
    Ok(())
}

/// No kubeconfig: what the kubelet mounts and sets is all there is, and what the manifests grant is all that it may.
fn in_a_pod(cluster: &mut Cluster) -> Result<()> {
    cluster.ready()?;
    cluster.world.remove_agents()?;
    cluster.server.apply(&manifests::render(BASE)?)?;
    let account = cluster.server.service_account("kube-system", "proxy-agent")?;
    let service_account = Some((account, cluster.server.address()));
    cluster.world.start_agent(1, &AgentOptions { service_account, ..AgentOptions::new(cluster.socket_lb) })?;
    cluster.node().wait_ready(PATIENCE)?;
    within(PATIENCE, || cluster.reachable(true))?;
    cluster.served(WEB.1, &["r1", "r2"])?;
    cluster.endpoints(WEB.0, &["r3"])?;
    within(PATIENCE, || cluster.served(WEB.1, &["r3"]))?;
    // The other cases go by a kubeconfig.
    cluster.world.remove_agents()
}

fn metrics(cluster: &mut Cluster) -> Result<()> {
    cluster.ready()?;
    let cluster = &*cluster;
    let node = cluster.node();
    let codes = || -> Result<(u16, u16)> { Ok((node.http(10256, "/livez")?.0, node.http(10256, "/healthz")?.0)) };
    ensure!(codes()? == (200, 200), "livez and healthz: {:?}", codes()?);
    let read = || -> Result<[f64; 6]> {
        let mut values = [0.0; 6];
        let names = [
            "proxy_agent_syncs_total",
            "proxy_agent_services",
            "proxy_agent_bpf_map_entries",
            "kubeproxy_network_programming_duration_seconds_count",
            "kubeproxy_sync_proxy_rules_endpoint_changes_total",
            "proxy_agent_datapath_events_total",
        ];
        for (value, name) in values.iter_mut().zip(names) {
            *value = node.metric(name)?;
        }
        Ok(values)
    };
    let [syncs, services, entries, latencies, changes, events] = read()?;
    std::thread::sleep(Duration::from_secs(1));
    cluster.create(("counted", 33), &[])?;
    within(PATIENCE, || cluster.refused(33))?;
    // The time of the change, in the server's words: what the endpoint controller writes. It has whole seconds, and what was before
    // the agent started is none of its delay.
    let now = ["get", "service", "counted", "-o", "jsonpath={.metadata.creationTimestamp}"];
    let now = cluster.server.kubectl(&now, "")?;
    let slices = Family::BOTH.map(|family| {
        let mut slice = slice("counted", family).endpoint(cluster.world.pod("r3")).json();
        slice["metadata"]["annotations"] = json!({"endpoints.kubernetes.io/last-change-trigger-time": now});
        slice
    });
    cluster.apply(&slices)?;
    within(PATIENCE, || cluster.served(33, &["r3"]))?;
    // The kernel may answer before the sync's own account of it is out.
    within(PATIENCE, || {
        let after = read()?;
        ensure!(after[0] >= syncs + 2.0, "syncs: {syncs}, then {}", after[0]);
        ensure!(after[1] == services + 1.0, "Services: {services}, then {}", after[1]);
        ensure!(after[2] > entries, "map entries: {entries}, then {}", after[2]);
        ensure!(after[3] > latencies, "programming latencies: {latencies}, then {}", after[3]);
        ensure!(after[4] >= changes + 2.0, "endpoint changes: {changes}, then {}", after[4]);
        ensure!(after[5] > events, "refusals are not counted: {events}, then {}", after[5]);
        Ok(())
    })?;
    ensure!(node.metric("rest_client_requests_total")? > 0.0, "no request is counted");
    let sum = node.metric("kubeproxy_network_programming_duration_seconds_sum")?;
    ensure!(sum > 0.0 && sum < 60.0, "programming latency of {sum} s");
    ensure!(
        node.metric("proxy_agent_bpf_map_capacity")? > node.metric("proxy_agent_bpf_map_entries")?,
        "maps hold more than they can"
    );
    cluster.server.delete("service", "counted")?;
    within(PATIENCE, || {
        let known = node.metric("proxy_agent_services")?;
        ensure!(known == services, "{known} Services, {services} expected");
        Ok(())
    })?;
    cluster.server.delete("endpointslice", "counted-v4")?;
    cluster.server.delete("endpointslice", "counted-v6")
}

fn server_killed(cluster: &mut Cluster) -> Result<()> {
    cluster.ready()?;
    let traffic = Traffic::start(cluster)?;
    cluster.server.kill()?;
    within(PATIENCE, || cluster.reachable(false))?;
    steadily(|| {
        cluster.served(WEB.1, &["r1", "r2"])?;
        // A136: the last state goes on serving.
        let (livez, healthz) = (cluster.node().http(10256, "/livez")?, cluster.node().http(10256, "/healthz")?);
        ensure!((livez.0, healthz.0) == (200, 200), "livez {livez:?}, healthz {healthz:?}");
        Ok(())
    })?;
    cluster.server.restart()?;
    cluster.served(WEB.1, &["r1", "r2"])?;
    traffic.finish()?;
    // Changed before the agent may have noticed that the server is back.
    cluster.endpoints(WEB.0, &["r3"])?;
    within(RETURN, || cluster.served(WEB.1, &["r3"])).context("a change after the return")?;
    // Each kind is watched by itself and finds the way back in its own time.
    within(RETURN, || cluster.reachable(true))
}

/// The API server's cache begins with its start: what happened before, and was not seen, can only be had from a new list.
fn deleted_meanwhile(cluster: &mut Cluster) -> Result<()> {
    cluster.ready()?;
    let address = cluster.server.address();
    let relay = cluster.node().place.namespace.enter(|| Relay::start(address))??;
    cluster.start(relay.address())?;
    cluster.node().wait_ready(PATIENCE)?;
    cluster.create(("goner", 40), &["r3"])?;
    cluster.create(("shrinks", 41), &["r1", "r3"])?;
    within(PATIENCE, || cluster.served(40, &["r3"]).and_then(|()| cluster.served(41, &["r1", "r3"])))?;
    let traffic = Traffic::start(cluster)?;
    relay.cut();
    within(PATIENCE, || cluster.reachable(false))?;
    cluster.server.delete("service", "goner")?;
    cluster.server.delete("endpointslice", "goner-v4")?;
    cluster.server.delete("endpointslice", "goner-v6")?;
    cluster.endpoints("shrinks", &["r1"])?;
    cluster.create(("comer", 42), &["r2"])?;
    cluster.server.restart()?;
    steadily(|| {
        cluster.served(40, &["r3"])?;
        cluster.served(41, &["r1", "r3"])?;
        cluster.unserved(42)
    })
    .context("cut off")?;
    relay.forward();
    within(RETURN, || cluster.unserved(40)).context("deleted while cut off")?;
    within(PATIENCE, || cluster.served(41, &["r1"]).and_then(|()| cluster.served(42, &["r2"])))?;
    within(RETURN, || cluster.reachable(true))?;
    traffic.finish()?;
    for name in ["shrinks", "comer"] {
        cluster.server.delete("service", name)?;
    }
    // The relay ends with this case.
    cluster.world.kill_agent(1)
}

fn both_down(cluster: &mut Cluster) -> Result<()> {
    cluster.ready()?;
    let traffic = Traffic::start(cluster)?;
    cluster.server.kill()?;
    cluster.world.kill_agent(1)?;
    cluster.served(WEB.1, &["r1", "r2"]).context("with neither")?;
    cluster.start(cluster.server.address())?;
    within(PATIENCE, || cluster.reachable(false))?;
    steadily(|| {
        cluster.served(WEB.1, &["r1", "r2"])?;
        if let Some(log) = cluster.node().agent_ended() {
            bail!("the agent ended: {log}");
        }
        let healthz = cluster.node().http(10256, "/healthz")?;
        ensure!(healthz.0 == 503, "ready without a list: {healthz:?}");
        Ok(())
    })
    .context("with an agent that knows nothing")?;
    cluster.server.restart()?;
    cluster.node().wait_ready(RETURN)?;
    cluster.served(WEB.1, &["r1", "r2"])?;
    traffic.finish()?;
    cluster.endpoints(WEB.0, &["r3"])?;
    within(PATIENCE, || cluster.served(WEB.1, &["r3"])).context("a change after the return")
}
