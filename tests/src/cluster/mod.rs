//! A whole Kubernetes cluster on this machine: real servers, real kubelets on containerd, pods in containers.
//!
//! Each node is a set of namespaces (`node`), all of them on one bridge that nothing leaves (`network`). The servers and a small
//! DNS (`dns`) are in a namespace beside them. Images are made of programs of this machine (`images`): there is no registry.
//! One cluster at a time, found by fixed names (`layout`): so one whose owner was killed is removed by the next, or by [`sweep`].

mod control;
mod dns;
mod image;
mod images;
mod layout;
mod machine;
mod network;
mod node;
mod proxy;
pub mod specs;
pub mod takeover;

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

use self::{control::ControlPlane, layout::Layout, network::Network, node::Node};
use crate::{
    apiserver::{self, User},
    world::{Namespace, cgroup},
};

pub use self::{layout::cleanup_on_signals, layout::sweep, proxy::Proxy};

/// What runs in it, built.
#[derive(Clone, Debug)]
pub struct Programs {
    pub servers: apiserver::Programs,
    pub controller_manager: PathBuf,
    pub scheduler: PathBuf,
    pub kubelet: PathBuf,
    pub pause: PathBuf,
    pub agnhost: PathBuf,
    pub invalid: PathBuf,
    pub kube_proxy: PathBuf,
    pub agent: PathBuf,
    /// The archive of its image; without one an image is made of the program.
    pub agent_image: Option<PathBuf>,
    pub testpod: PathBuf,
}

/// A running cluster. Dropping it takes it down.
pub struct Cluster {
    // In the order in which they end.
    nodes: Vec<Node>,
    plane: ControlPlane,
    network: Network,
    _layout: Layout,
}

impl Cluster {
    /// Makes it; its nodes are ready, nobody serves Services yet.
    pub fn up(programs: &Programs, nodes: u8) -> Result<Self> {
        let began = Instant::now();
        let step = |what: &str| eprintln!("e2e: {:>3} s: {what}", began.elapsed().as_secs());
        let layout = Layout::create()?;
        let network = Network::create(nodes)?;
        step("starting etcd and kube-apiserver");
        let plane = ControlPlane::start(programs, &network.servers, nodes)?;
        let kubeconfig = plane.server.kubeconfig(User::Admin, plane.address())?;
        std::fs::copy(&kubeconfig, layout::kubeconfig()).context("copy the kubeconfig")?;
        dns::serve(&network.servers, network::SERVERS.into(), kubeconfig)?;
        let mut cluster = Self { nodes: Vec::new(), plane, network, _layout: layout };
        step("making images");
        let images = images::make(programs, &layout::images())?;
        step("starting the nodes");
        for number in 1..=nodes {
            cluster.start_node(number, nodes)?;
        }
        for node in &mut cluster.nodes {
            node.wait_containerd()?;
        }
        cluster.import(&images)?;
        for number in 1..=nodes {
            cluster.start_kubelet(programs, number)?;
        }
        step("waiting for the nodes");
        for node in &cluster.nodes {
            cluster.wait_registered(&node.name)?;
            cluster.kubectl(&["patch", "node", &node.name, "--patch", &node.patch()])?;
        }
        cluster.kubectl_for(&["wait", "--for=condition=Ready", "nodes", "--all", "--timeout=180s"], "240s")?;
        cluster.wait_service_account()?;
        step("ready");
        Ok(cluster)
    }

    fn start_node(&mut self, number: u8, nodes: u8) -> Result<()> {
        let namespace = self.network.node(&Node::name_of(number), number, nodes)?;
        let mut node = Node::create(number, &namespace)?;
        node.start_containerd()?;
        self.nodes.push(node);
        Ok(())
    }

    fn import(&self, images: &[PathBuf]) -> Result<()> {
        images.iter().try_for_each(|image| self.nodes.iter().try_for_each(|node| node.import(image)))
    }

    fn start_kubelet(&mut self, programs: &Programs, number: u8) -> Result<()> {
        let name = Node::name_of(number);
        let server = &self.plane.server;
        let kubeconfig = server.kubeconfig_of(&name, &Node::token(number), server.address())?;
        let node = self.nodes.iter_mut().find(|node| node.name == name).context("no such node")?;
        node.start_kubelet(&programs.kubelet, &kubeconfig)
    }

    fn wait_registered(&self, node: &str) -> Result<()> {
        self.wait(&["get", "node", node]).with_context(|| format!("{node} does not register: see {}", logs().display()))
    }

    /// Without it no pod is admitted.
    fn wait_service_account(&self) -> Result<()> {
        self.wait(&["get", "serviceaccount", "default"])
    }

    fn wait(&self, args: &[&str]) -> Result<()> {
        let began = Instant::now();
        loop {
            match self.kubectl(args) {
                Ok(_) => return Ok(()),
                Err(error) if began.elapsed() > Duration::from_secs(120) => return Err(error),
                Err(_) => sleep(Duration::from_millis(300)),
            }
        }
    }

    /// Runs kubectl as the administrator; returns what it printed.
    pub fn kubectl(&self, args: &[&str]) -> Result<String> {
        self.plane.server.kubectl(args, "")
    }

    /// The same where one request takes its time.
    fn kubectl_for(&self, args: &[&str], patience: &str) -> Result<String> {
        let mut all = vec!["--request-timeout", patience];
        all.extend(args);
        self.kubectl(&all)
    }

    /// A command among the servers, from where nodes and pods are reached.
    pub fn command(&self, program: &Path) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.servers().path())).arg(program).stdin(Stdio::null());
        command
    }

    fn servers(&self) -> &Namespace {
        &self.network.servers
    }

    /// How to go on by hand.
    pub fn by_hand(&self) -> String {
        let mut text = format!(
            "nsenter --net={} kubectl --kubeconfig {} get pods -A -o wide\n",
            self.servers().path(),
            kubeconfig().display()
        );
        for node in &self.nodes {
            text.push_str(&format!("{} bash    # on {}\n", node.by_hand(), node.name));
        }
        text.push_str(&format!("logs: {}\n", logs().display()));
        text
    }
}

/// The administrator's.
pub fn kubeconfig() -> PathBuf {
    layout::kubeconfig()
}

pub fn logs() -> PathBuf {
    layout::logs()
}

/// Why none can be made here.
pub fn unavailable() -> Option<String> {
    let filesystems = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if !filesystems.lines().any(|line| line.trim_start_matches("nodev").trim() == "overlay") {
        return Some("the kernel has no overlayfs".to_owned());
    }
    let v1 = cgroup::hierarchies().is_ok_and(|found| {
        found.iter().any(|one| one.v1.as_deref().is_some_and(|options| options.split(',').any(|name| name == "memory")))
    });
    if !v1 {
        let why = "a node's own cgroup holds processes, and those of v2 that do have no controllers to pass on";
        return Some(format!("needs the controllers of cgroup v1: {why}"));
    }
    let plugin = format!("{}/ptp", node::PLUGINS);
    (!Path::new(&plugin).exists()).then(|| format!("there is no {plugin}"))
}
