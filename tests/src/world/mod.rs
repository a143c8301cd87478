//! A cluster on one machine, out of network namespaces: nodes with pods, a client outside, the real agent on each node.
//!
//! ```text
//!   pods of node1 ── node1 ──┐                        ┌── node2 ── pods of node2
//!                            ├── underlay (a bridge) ──┤
//!                 outside ──┘                        └── sink (everybody's default route)
//! ```
//!
//! Nothing leads out of the machine: the underlay is a bridge in a namespace of its own, and the nodes' default route ends
//! in the sink, which counts what arrives for a Service address: a packet there is one the proxy let slip.
//!
//! Whatever runs in a world is started in its place: the cgroup first (it decides about translation at connect time), then
//! the network namespace, by `setns` and not by `ip netns exec`, which would hide cgroups and bpffs. A world is removed
//! when it is dropped, on Ctrl-C, and by [`World::sweep`] if its owner was killed.

mod agent;
pub(crate) mod cgroup;
pub(crate) mod layout;
mod namespace;
mod place;
mod topology;
mod tunnel;

pub mod objects;
pub mod pins;
pub mod trace;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, Permissions},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

pub use agent::{AgentOptions, Fallback, SocketLb};
pub use layout::{cleanup_on_signals, set_exit_status, wait_if_ending};
pub use namespace::Namespace;
pub use place::{Ask, Client, Family, Place};

use agent::Agent;
use layout::Layout;
use tunnel::Tunnel;

/// Ports on which every server of a world answers.
pub const SERVER_PORTS: [u16; 2] = [8080, 9090];

/// How pods are attached, and how their packets get from node to node.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Topology {
    /// A host route for each pod, routes between the nodes: the shape of Calico.
    Routed,
    /// Pods on a bridge that is their gateway, routes between the nodes: the shape of the CNI bridge plugin.
    Bridge,
    /// Pods on a bridge, VXLAN between the nodes: the shape of flannel.
    Vxlan,
    /// Pods and the uplink on one bridge, which has the node's address, too.
    Uplink,
    /// A host route for each pod; between the nodes, and from outside, links whose packets have no Ethernet header: the shape of
    /// IPIP and WireGuard.
    Tun,
}

impl Topology {
    pub const ALL: [Self; 5] = [Self::Routed, Self::Bridge, Self::Vxlan, Self::Uplink, Self::Tun];

    pub fn name(self) -> &'static str {
        match self {
            Self::Routed => "routed",
            Self::Bridge => "bridge",
            Self::Vxlan => "vxlan",
            Self::Uplink => "uplink",
            Self::Tun => "tun",
        }
    }
}

/// What to build.
#[derive(Clone, Debug)]
pub struct Spec {
    pub topology: Topology,
    /// Names of the pods of each node, all different. Node N (from 1) is called `nodeN`.
    pub nodes: Vec<Vec<String>>,
    /// Strict reverse-path filtering on the nodes.
    pub rp_filter: bool,
    /// Checksums are computed and looked at on most links, which otherwise leave them out.
    pub software_checksums: bool,
    /// Links on which native XDP works as on hardware: every frame has its checksum, and whoever is sent one by XDP polls.
    pub for_xdp: bool,
}

impl Spec {
    /// Two nodes: `a1 b1 c1` on the first, `a2 b2 c2` on the second.
    pub fn two_nodes(topology: Topology) -> Self {
        let pods = |node: u8| ["a", "b", "c"].iter().map(|pod| format!("{pod}{node}")).collect();
        Self { topology, nodes: vec![pods(1), pods(2)], rp_filter: false, software_checksums: false, for_xdp: false }
    }
}

/// The programs that run inside.
#[derive(Clone, Debug)]
pub struct Programs {
    pub testpod: PathBuf,
    pub agent: PathBuf,
}

impl Programs {
    /// `PROXY_TESTPOD_BIN` and `PROXY_AGENT_BIN`, or what cargo left beside the running program. `Err` names what is missing.
    pub fn find() -> Result<Self> {
        Ok(Self { testpod: Self::find_testpod()?, agent: Self::find_agent()? })
    }

    pub fn find_testpod() -> Result<PathBuf> {
        find("testpod", "PROXY_TESTPOD_BIN", "cargo build -p proxy-tests")
    }

    pub fn find_agent() -> Result<PathBuf> {
        find("proxy-agent", "PROXY_AGENT_BIN", "cargo xtask build")
    }
}

fn find(name: &str, variable: &str, remedy: &str) -> Result<PathBuf> {
    if let Some(path) = std::env::var_os(variable) {
        let path = PathBuf::from(path);
        if !path.is_file() {
            bail!("{variable} names {}, which is no file", path.display());
        }
        return Ok(path);
    }
    // target/<profile>/deps/<test> and target/<profile>/<program> both lie below target/.
    let own = std::env::current_exe().context("find the running program")?;
    let target = own.ancestors().find(|dir| dir.join("CACHEDIR.TAG").is_file());
    let found =
        target.into_iter().flat_map(|target| ["release", "debug"].map(|profile| target.join(profile).join(name)));
    found
        .filter(|path| path.is_file())
        .max_by_key(|path| path.metadata().and_then(|meta| meta.modified()).ok())
        .with_context(|| format!("no {name} below target/: run `{remedy}`, or name it with {variable}"))
}

/// One node: its own place (network namespace, cgroup `host`), and what its agent is given.
pub struct Node {
    pub place: Place,
    /// Root of the node's cgroup subtree.
    pub cgroup: PathBuf,
    /// Its private directory below the bpffs.
    pub bpffs: PathBuf,
    agent: Option<Agent>,
}

pub struct World {
    pub topology: Topology,
    pub nodes: Vec<Node>,
    pods: BTreeMap<String, Place>,
    outside: Place,
    sink: Namespace,
    programs: Programs,
    servers: Vec<Client>,
    markers: u32,
    _tunnels: Vec<Tunnel>,
    layout: Layout,
    _underlay: Namespace,
}

impl World {
    /// Why no world can be made here, if so: what is missing and what to do about it.
    pub fn unavailable() -> Option<String> {
        if !nix::unistd::geteuid().is_root() {
            return Some("needs root for network namespaces: run it as root".to_owned());
        }
        for tool in ["ip", "nft", "bridge"] {
            let found = std::env::var_os("PATH").is_some_and(|path| {
                std::env::split_paths(&path)
                    .chain(["/usr/sbin".into(), "/sbin".into()])
                    .any(|dir: PathBuf| dir.join(tool).is_file())
            });
            if !found {
                return Some(format!("needs {tool}: install iproute2 and nftables"));
            }
        }
        cgroup::root().err().map(|error| format!("{error:#}"))
    }

    /// Why there can be no IPVS here, if so.
    pub fn without_ipvs() -> Option<&'static str> {
        // A kernel that has it built in knows no such module.
        let _loaded = std::process::Command::new("modprobe").args(["-q", "ip_vs"]).status();
        (!Path::new("/proc/net/ip_vs").exists()).then_some("this kernel has no IPVS")
    }

    /// A directory with an nft, and nothing else, that takes what a kernel without `numgen` takes.
    pub fn nft_without_numgen(&self) -> Result<PathBuf> {
        const NFT: &str = "#!/bin/sh\nPATH=/usr/sbin:/usr/bin:/sbin:/bin\ncase \"$*\" in *-f*) ;; *) exec nft \"$@\" ;; esac\n\
                           input=$(cat)\ncase $input in *numgen*) echo 'no numgen' >&2; exit 1 ;; esac\n\
                           printf '%s\\n' \"$input\" | nft \"$@\"\n";
        let dir = self.objects_dir().with_file_name("nft-without-numgen");
        fs::create_dir_all(&dir)?;
        let path = dir.join("nft");
        fs::write(&path, NFT)?;
        fs::set_permissions(&path, Permissions::from_mode(0o755))?;
        Ok(dir)
    }

    /// A world in which agents serve the objects that are made for it.
    pub fn serving(
        spec: &Spec,
        programs: Programs,
        options: &AgentOptions,
        objects: impl FnOnce(&Self) -> Vec<serde_json::Value>,
    ) -> Result<Self> {
        let mut world = Self::new(spec, programs)?;
        objects(&world).iter().try_for_each(|object| world.write(object))?;
        world.start_agents(options)?;
        world.settle()?;
        Ok(world)
    }

    /// Builds namespaces, cgroups and links, and starts a server in every pod and on every node. No agent runs yet.
    pub fn new(spec: &Spec, programs: Programs) -> Result<Self> {
        if spec.nodes.is_empty() || spec.nodes.len() > 9 || spec.nodes.iter().any(|pods| pods.len() > 200) {
            bail!("a world has 1 to 9 nodes with at most 200 pods each");
        }
        let names: BTreeSet<&String> = spec.nodes.iter().flatten().collect();
        if names.len() != spec.nodes.iter().map(Vec::len).sum::<usize>() {
            bail!("two pods of one name");
        }
        // Whatever fails from here on, dropping the layout removes what was made.
        let layout = Layout::create()?;
        let built = topology::build(spec, &layout)?;
        let mut world = Self {
            topology: spec.topology,
            nodes: built.nodes,
            pods: built.pods,
            outside: built.outside,
            sink: built.sink,
            programs,
            servers: Vec::new(),
            markers: 0,
            _tunnels: built.tunnels,
            layout,
            _underlay: built.underlay,
        };
        world.start_servers()?;
        Ok(world)
    }

    /// Removes what worlds left behind whose owner is gone. Returns how many there were.
    pub fn sweep() -> Result<usize> {
        layout::sweep()
    }

    fn start_servers(&mut self) -> Result<()> {
        let places = self.nodes.iter().map(|node| &node.place).chain(self.pods.values());
        let mut servers = places.map(|place| self.start_server(place)).collect::<Result<Vec<_>>>()?;
        for server in &mut servers {
            server.wait_for_line("serving", patience(5))?;
        }
        self.servers = servers;
        Ok(())
    }

    fn start_server(&self, place: &Place) -> Result<Client> {
        let mut args = vec!["serve".to_owned(), format!("--name={}", place.name)];
        args.extend([place.v4.to_string(), place.v6.to_string()].map(|address| format!("--address={address}")));
        args.extend(SERVER_PORTS.iter().map(|port| format!("--port={port}")));
        place.start(&self.programs.testpod, &args).with_context(|| format!("server in {}", place.name))
    }

    /// A further pod of node N, as a CNI plugs it in while all else runs; with a server.
    pub fn plug(&mut self, number: usize, name: &str) -> Result<()> {
        let nth = self.pods.values().filter(|pod| pod.node == Some(number)).count();
        let nth = u8::try_from(nth).context("too many pods")?;
        let node = u8::try_from(number)?;
        let place = topology::build_pod(self.topology, self.node(number), node, nth, name, &self.layout)?;
        let mut server = self.start_server(&place)?;
        server.wait_for_line("serving", patience(5))?;
        self.servers.push(server);
        self.pods.insert(name.to_owned(), place);
        Ok(())
    }

    /// Takes the link of a pod away, as a CNI does when the pod ends.
    pub fn unplug(&self, pod: &Place) -> Result<()> {
        let node = self.node(pod.node.context("no pod")?);
        node.place.namespace.ip(&format!("link del {}\n", self.pod_link(pod)))
    }

    /// A pod by name.
    ///
    /// # Panics
    /// If there is none: a mistake in the test itself.
    pub fn pod(&self, name: &str) -> &Place {
        self.pods.get(name).unwrap_or_else(|| panic!("no pod {name} in this world"))
    }

    pub fn pods(&self) -> impl Iterator<Item = &Place> {
        self.pods.values()
    }

    /// Node N, from 1.
    ///
    /// # Panics
    /// If there is none: a mistake in the test itself.
    pub fn node(&self, number: usize) -> &Node {
        number
            .checked_sub(1)
            .and_then(|i| self.nodes.get(i))
            .unwrap_or_else(|| panic!("no node {number} in this world"))
    }

    pub fn outside(&self) -> &Place {
        &self.outside
    }

    /// Pod, node or `outside` by name.
    pub fn place(&self, name: &str) -> Option<&Place> {
        let nodes = self.nodes.iter().map(|node| &node.place);
        nodes.chain(self.pods.values()).chain([&self.outside]).find(|place| place.name == name)
    }

    pub fn programs(&self) -> &Programs {
        &self.programs
    }

    /// The directory that the agents read.
    pub fn objects_dir(&self) -> PathBuf {
        self.layout.objects()
    }

    /// Every address that node N owns: what a masqueraded packet may have as its source.
    pub fn node_addresses(&self, number: usize) -> Result<BTreeSet<IpAddr>> {
        self.addresses(&self.node(number).place)
    }

    /// The source that a node's kernel gives to what it sends there itself.
    pub fn route_source(&self, number: usize, to: IpAddr) -> Result<IpAddr> {
        let shown = self.node(number).place.namespace.output("ip", &["-j", "route", "get", &to.to_string()])?;
        let shown: serde_json::Value = serde_json::from_str(&shown).context("ip -j route get")?;
        let source = shown.pointer("/0/prefsrc").and_then(serde_json::Value::as_str);
        source.with_context(|| format!("no source in {shown}"))?.parse().context("prefsrc")
    }

    /// Every address that a place has.
    pub fn addresses(&self, place: &Place) -> Result<BTreeSet<IpAddr>> {
        let out = place.namespace.output("ip", &["-o", "addr", "show"])?;
        // "2: eth0    inet 192.168.77.1/24 brd …"
        Ok(out
            .lines()
            // Addresses of Services.
            .filter(|line| !line.contains("proxy-ipvs0"))
            .filter_map(|line| line.split_whitespace().nth(3)?.split('/').next()?.parse::<IpAddr>().ok())
            .filter(|address| !address.is_loopback())
            .collect())
    }

    /// Writes one object, atomically: readers see the old file or the new one.
    pub fn write(&self, object: &serde_json::Value) -> Result<()> {
        objects::write(&self.objects_dir(), object)
    }

    pub fn remove(&self, object: &serde_json::Value) -> Result<()> {
        objects::remove(&self.objects_dir(), object)
    }

    /// Writes objects and waits until every running agent has them in force.
    pub fn apply(&mut self, objects: &[serde_json::Value]) -> Result<()> {
        for object in objects {
            self.write(object)?;
        }
        self.settle()
    }

    /// Waits until every running agent has in force what was written so far: until a marker Service, written last, shows in
    /// its maps.
    pub fn settle(&mut self) -> Result<()> {
        self.markers += 1;
        // The last addresses of the Service network: frontends are written in the order of their addresses.
        let address = Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 0, 0xf000 + u16::try_from(self.markers % 0xfff)?);
        self.write(&objects::service("marker").port("", "TCP", 1).cluster_ips(&[address.into()]).json())?;
        let wanted = format!("\"{address}\"");
        let limit = patience(10);
        let deadline = Instant::now() + limit;
        for node in self.nodes.iter().filter(|node| node.agent.is_some()) {
            loop {
                let shown = self.cli(node, &["services", "-o", "json"]);
                if shown.as_ref().is_ok_and(|shown| shown.contains(&wanted)) {
                    break;
                }
                if Instant::now() > deadline {
                    let why = shown.err().map_or(String::new(), |error| format!(" ({error:#})"));
                    bail!(
                        "{}: the agent has not programmed {address} within {limit:?}{why}\n{}",
                        node.place.name,
                        node.agent_log()
                    );
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        Ok(())
    }

    /// Until the agent of node N has found that nobody else translates there; it looks again after pauses that grow by the half from five
    /// seconds on.
    pub fn wait_until_alone(&self, number: usize) -> Result<()> {
        let node = self.node(number);
        let deadline = Instant::now() + patience(40);
        while !node.is_alone()? {
            if Instant::now() > deadline {
                bail!("{}: others are said to translate there\n{}", node.place.name, node.agent_log());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    /// What a reading command of the agent prints about a node's pins.
    pub fn cli(&self, node: &Node, args: &[&str]) -> Result<String> {
        let done = node.place.command(&self.programs.agent)?.args(args).arg("--bpffs").arg(&node.bpffs).output()?;
        if !done.status.success() {
            bail!("proxy-agent {}: {}", args.join(" "), String::from_utf8_lossy(&done.stderr).trim());
        }
        Ok(String::from_utf8_lossy(&done.stdout).into_owned())
    }

    /// What such a command prints although it may find something wrong.
    pub fn cli_output(&self, node: &Node, args: &[&str]) -> Result<String> {
        let done = node.place.command(&self.programs.agent)?.args(args).arg("--bpffs").arg(&node.bpffs).output()?;
        Ok(String::from_utf8_lossy(&done.stdout).into_owned())
    }

    /// Starts the agent on every node and waits until all are ready.
    pub fn start_agents(&mut self, options: &AgentOptions) -> Result<()> {
        for number in 1..=self.nodes.len() {
            self.start_agent(number, options)?;
        }
        (1..=self.nodes.len()).try_for_each(|number| self.node(number).wait_ready(patience(30)))
    }

    /// Starts the agent on node N; does not wait.
    pub fn start_agent(&mut self, number: usize, options: &AgentOptions) -> Result<()> {
        let (program, objects, logs) = (self.programs.agent.clone(), self.objects_dir(), self.layout.logs());
        let node = number.checked_sub(1).and_then(|i| self.nodes.get_mut(i)).context("no such node")?;
        node.agent = None;
        node.agent = Some(Agent::start(node, &program, &objects, &logs, options)?);
        Ok(())
    }

    /// Ends the agent of node N as a crash would (SIGKILL); the datapath stays.
    pub fn kill_agent(&mut self, number: usize) -> Result<()> {
        let node = number.checked_sub(1).and_then(|i| self.nodes.get_mut(i)).context("no such node")?;
        node.agent = None;
        Ok(())
    }

    /// Stops the agents and takes what they left in the kernel out of this world, so that the next one starts fresh.
    pub fn remove_agents(&mut self) -> Result<()> {
        for node in &mut self.nodes {
            node.agent = None;
            layout::remove_pins(&node.bpffs)?;
            // Deleting what is not there is an error, making what is there is none.
            let tables = ["ip", "ip6"]
                .map(|family| format!("add table {family} proxy-agent\ndelete table {family} proxy-agent\n"));
            node.place.namespace.nft(&tables.concat())?;
            node.remove_chains()?;
        }
        Ok(())
    }

    /// Packets for a Service address that reached the sink since the last call, as `source > destination`.
    pub fn leaks(&self) -> Result<Vec<String>> {
        let mut seen = Vec::new();
        for set in ["leaks4", "leaks6"] {
            let listed = self.sink.output("nft", &["-j", "list", "set", "inet", "sink", set])?;
            let listed: serde_json::Value = serde_json::from_str(&listed).context("nft -j list set")?;
            for element in listed.pointer("/nftables/1/set/elem").and_then(|v| v.as_array()).into_iter().flatten() {
                let parts = element.pointer("/concat").and_then(|v| v.as_array());
                let text = |i: usize| {
                    parts
                        .and_then(|p| p.get(i))
                        .map_or(String::new(), |v| v.as_str().map_or(v.to_string(), str::to_owned))
                };
                seen.push(format!("{} > {} proto {}", text(0), text(1), text(2)));
            }
            self.sink.output("nft", &["flush", "set", "inet", "sink", set])?;
        }
        Ok(seen)
    }

    /// Packets with a wrong checksum that anybody has met so far, as `place: counter`.
    pub fn bad_checksums(&self) -> Result<Vec<String>> {
        let mut seen = Vec::new();
        for place in self.nodes.iter().map(|node| &node.place).chain(self.pods.values()).chain([&self.outside]) {
            let counters = place.namespace.enter(counters)??;
            let bad = counters.into_iter().filter(|(name, count)| name.ends_with("InCsumErrors") && *count > 0);
            seen.extend(bad.map(|(name, count)| format!("{}: {count} {name}", place.name)));
        }
        Ok(seen)
    }

    /// Name of the node's end of a pod's link.
    pub fn pod_link(&self, pod: &Place) -> String {
        topology::pod_link(self.topology, &pod.name)
    }

    pub fn id(&self) -> &str {
        self.layout.id()
    }
}

/// The protocols' own counters of the thread's namespace.
fn counters() -> Result<Vec<(String, u64)>> {
    let mut counters = Vec::new();
    for file in ["snmp", "netstat"] {
        let text =
            fs::read_to_string(format!("/proc/thread-self/net/{file}")).with_context(|| format!("read {file}"))?;
        let lines: Vec<&str> = text.lines().collect();
        // A line of names, a line of values.
        for [names, values] in lines.as_chunks::<2>().0 {
            let protocol = names.split(':').next().unwrap_or_default();
            let pairs = names.split_whitespace().zip(values.split_whitespace()).skip(1);
            counters.extend(pairs.map(|(name, value)| (format!("{protocol}{name}"), value.parse().unwrap_or(0))));
        }
    }
    let text = fs::read_to_string("/proc/thread-self/net/snmp6").context("read snmp6")?;
    counters.extend(text.lines().filter_map(|line| {
        let (name, value) = line.split_once(char::is_whitespace)?;
        Some((name.to_owned(), value.trim().parse().ok()?))
    }));
    Ok(counters)
}

/// How long to wait for what takes no more than so many seconds on a machine: longer on an emulated one, by the factor that
/// `PROXY_TESTS_SLOWER` says.
pub fn patience(seconds: u64) -> Duration {
    Duration::from_secs(seconds.saturating_mul(slower().into()))
}

/// Asks again and again, until it is so; what was wrong the last time, where it has not come to be so within `patience`.
pub fn within(patience: Duration, check: impl Fn() -> Result<()>) -> Result<()> {
    let began = Instant::now();
    loop {
        let Err(error) = check() else { return Ok(()) };
        if began.elapsed() > patience {
            return Err(error.context(format!("still not so after {} s", patience.as_secs())));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// By what factor things take longer here.
pub fn slower() -> u32 {
    std::env::var("PROXY_TESTS_SLOWER").ok().and_then(|factor| factor.parse().ok()).unwrap_or(1)
}

/// Version of the kernel: the first two numbers.
pub fn kernel() -> Result<(u32, u32)> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    let mut next = || numbers.next().context("no version")?.context("kernel version");
    Ok((next()?, next()?))
}

/// The Service network of every world.
pub const SERVICE_CIDR_V4: &str = "10.96.0.0/16";
pub const SERVICE_CIDR_V6: &str = "fd00:96::/112";

/// Addresses that lead to the cluster from outside: of load balancers, and external IPs. They are no node's.
pub const EXTERNAL_CIDR_V4: &str = "203.0.113.0/24";
pub const EXTERNAL_CIDR_V6: &str = "2001:db8:203::/112";

/// The Nth address of those, in a family.
pub fn external(family: Family, n: u8) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(203, 0, 113, n).into(),
        Family::V6 => Ipv6Addr::new(0x2001, 0xdb8, 0x203, 0, 0, 0, 0, n.into()).into(),
    }
}

/// `10.96.0.N`
pub fn vip4(n: u8) -> IpAddr {
    Ipv4Addr::new(10, 96, 0, n).into()
}

/// `fd00:96::N`
pub fn vip6(n: u8) -> IpAddr {
    Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 0, n.into()).into()
}

/// The Nth Service address of a family.
pub fn vip(family: Family, n: u8) -> IpAddr {
    match family {
        Family::V4 => vip4(n),
        Family::V6 => vip6(n),
    }
}

impl Node {
    /// Flushes iptables' tables in which an agent has chains.
    fn remove_chains(&self) -> Result<()> {
        let namespace = &self.place.namespace;
        for command in Fallback::ALL.into_iter().filter_map(Fallback::iptables).flatten() {
            if !namespace.output(&format!("{command}-save"), &[])?.contains(":PROXY-SERVICES") {
                continue;
            }
            for table in ["nat", "filter", "mangle"] {
                namespace.output(command, &["-t", table, "-F"])?;
                namespace.output(command, &["-t", table, "-X"])?;
            }
        }
        namespace.sysctl(&[("ipv4/conf/all/route_localnet", "0")])
    }

    pub fn agent_running(&self) -> bool {
        self.agent.is_some()
    }

    /// What the agent wrote to stderr, its end first of all.
    pub fn agent_log(&self) -> String {
        self.agent.as_ref().map_or_else(|| "no agent runs here".to_owned(), Agent::log_tail)
    }

    pub fn agent_log_path(&self) -> Option<&Path> {
        self.agent.as_ref().map(Agent::log_path)
    }
}
