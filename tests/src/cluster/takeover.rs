//! kube-proxy, then the agent, then kube-proxy again, with connections observed throughout.
//!
//! As an operator does it: kube-proxy's DaemonSet is deleted (its rules go on), the agent's is applied, what kube-proxy left is removed;
//! and the reverse. Between the two steps Deployments are scaled and rolled and a node is drained.

use std::{
    fmt,
    net::SocketAddr,
    path::Path,
    process::{Child, Command, Stdio},
    thread::sleep,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};

use super::{Cluster, Proxy, images, kubeconfig, network, node::Node};
use crate::{
    observed::{Observed, Phases},
    pod::socket::Transport,
    world::Client,
};

/// What is asked. `steady` keeps its pods; `moving` is what is changed meanwhile. A server goes on for the grace period of its pod.
const OBJECTS: &str = r"
apiVersion: apps/v1
kind: Deployment
metadata: {name: NAME}
spec:
  replicas: 3
  selector: {matchLabels: {app: NAME}}
  strategy: {rollingUpdate: {maxUnavailable: 0, maxSurge: 1}}
  template:
    metadata: {labels: {app: NAME}}
    spec:
      terminationGracePeriodSeconds: 10
      automountServiceAccountToken: false
      topologySpreadConstraints:
      - {maxSkew: 1, topologyKey: kubernetes.io/hostname, whenUnsatisfiable: ScheduleAnyway, labelSelector: {matchLabels: {app: NAME}}}
      containers:
      - name: server
        image: IMAGE
        args: [serve, --name=$(POD), --address=$(ADDRESS), --port=8080]
        env:
        - {name: POD, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
        - {name: ADDRESS, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
        readinessProbe: {tcpSocket: {port: 8080}, periodSeconds: 1}
---
apiVersion: v1
kind: Service
metadata: {name: NAME}
spec:
  type: NodePort
  clusterIP: CLUSTERIP
  selector: {app: NAME}
  ports:
  - {name: tcp, port: 80, targetPort: 8080, nodePort: NODEPORT}
  - {name: udp, port: 80, targetPort: 8080, nodePort: NODEPORT, protocol: UDP}
---
";

const CLIENT: &str = r"
apiVersion: v1
kind: Pod
metadata: {name: client}
spec:
  nodeName: node1
  automountServiceAccountToken: false
  containers:
  - name: client
    image: IMAGE
    args: [serve, --name=client, --address=127.0.0.1, --port=8080]
";

/// A Service of the above.
#[derive(Clone, Copy)]
struct Target {
    name: &'static str,
    cluster_ip: &'static str,
    node_port: u16,
}

const STEADY: Target = Target { name: "steady", cluster_ip: "10.96.7.1", node_port: 30701 };
const MOVING: Target = Target { name: "moving", cluster_ip: "10.96.7.2", node_port: 30702 };

impl Target {
    fn objects(self) -> String {
        OBJECTS
            .replace("NODEPORT", &self.node_port.to_string())
            .replace("CLUSTERIP", self.cluster_ip)
            .replace("IMAGE", images::TESTPOD)
            .replace("NAME", self.name)
    }

    /// By the Service's own address, or by a port of a node.
    fn at(self, node: Option<u8>) -> Result<SocketAddr> {
        Ok(match node {
            None => SocketAddr::new(self.cluster_ip.parse()?, 80),
            Some(node) => SocketAddr::new(network::node_address(node).into(), self.node_port),
        })
    }
}

/// Who asks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Origin {
    Pod,
    Node,
    Outside,
}

impl Origin {
    fn name(self) -> &'static str {
        match self {
            Self::Pod => "pod",
            Self::Node => "node",
            Self::Outside => "outside",
        }
    }
}

/// From where to where; `None`: the Service's own address.
const WAYS: [(Origin, Option<u8>); 5] = [
    (Origin::Pod, None),
    (Origin::Pod, Some(2)),
    (Origin::Node, None),
    (Origin::Node, Some(1)),
    (Origin::Outside, Some(1)),
];

#[derive(Clone, Copy)]
struct Phase {
    name: &'static str,
    /// Who takes over in it.
    to: Option<Proxy>,
}

impl Phase {
    const fn settled(name: &'static str) -> Self {
        Self { name, to: None }
    }

    fn is_settled(self) -> bool {
        self.to.is_none()
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

const PHASES: [Phase; 5] = [
    Phase::settled("kube-proxy"),
    Phase { name: "to the agent", to: Some(Proxy::Agent) },
    Phase::settled("agent"),
    Phase { name: "to kube-proxy", to: Some(Proxy::KubeProxy) },
    Phase::settled("kube-proxy again"),
];

/// How long an answer may take: no claim about speed on a machine that runs a whole cluster.
const TIMEOUT: &str = "--timeout=8000";

struct Storms(Vec<(String, Transport, Client)>);

impl Cluster {
    /// On a cluster in which kube-proxy serves. `agent`, `testpod`: as they are on this machine.
    pub fn take_over(&self, agent: &Path, testpod: &Path) -> Result<Observed> {
        for target in [STEADY, MOVING] {
            self.plane.server.apply(&target.objects())?;
        }
        self.plane.server.apply(&CLIENT.replace("IMAGE", images::TESTPOD))?;
        for what in ["deployment/steady", "deployment/moving"] {
            self.kubectl_for(&["rollout", "status", what, "--timeout=120s"], "180s")?;
        }
        self.kubectl_for(&["wait", "--for=condition=Ready", "pod/client", "--timeout=120s"], "180s")?;
        let (mut observed, mut drains) = (Observed::default(), Vec::new());
        let mut open: Vec<(&str, Vec<(String, Client)>)> = Vec::new();
        for phase in PHASES {
            eprintln!("e2e: phase: {phase}");
            if phase.is_settled() {
                open.push((phase.name, self.hold(testpod)?));
            }
            let storms = self.storms(testpod)?;
            drains.extend(self.act(phase, agent)?);
            storms.end(phase.name, &mut observed)?;
            // Those of the phase before the last step have seen it whole.
            while phase.is_settled() && open.len() > 1 {
                let (since, clients) = open.remove(0);
                for (way, client) in clients {
                    let report = client.finish(Duration::from_secs(60))?;
                    observed.held(Phases { since, until: phase.name }, way, report);
                }
            }
        }
        for mut drain in drains {
            let ended = drain.wait().context("wait for cleanup")?;
            ensure!(ended.success(), "cleanup --drain: {ended}");
        }
        Ok(observed)
    }

    /// Long connections, in use until they are told to end.
    fn hold(&self, testpod: &Path) -> Result<Vec<(String, Client)>> {
        let mut held = Vec::new();
        for (from, node) in WAYS {
            let (what, mut command) = self.client(testpod, from, STEADY, node)?;
            command.args(["hold", &STEADY.at(node)?.to_string(), "--connections=10", TIMEOUT]);
            let mut client = Client::spawn(command, what.clone())?;
            client.wait_for_line("ready", Duration::from_secs(60))?;
            held.push((what, client));
        }
        Ok(held)
    }

    /// Something that runs testpod where `from` says; its verb is to follow.
    fn client(&self, testpod: &Path, from: Origin, target: Target, node: Option<u8>) -> Result<(String, Command)> {
        let mut command = match from {
            Origin::Pod => {
                let mut kubectl = self.command(Path::new("kubectl"));
                kubectl.arg("--kubeconfig").arg(kubeconfig()).args(["exec", "-i", "client", "--", "/testpod"]);
                kubectl
            }
            Origin::Node => self.nodes.first().context("no node")?.command(testpod)?,
            Origin::Outside => self.command(testpod),
        };
        // Signals of a terminal are for us.
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let way = node.map_or("ClusterIP".to_owned(), |node| format!("NodePort of node{node}"));
        Ok((format!("{} → {} {way}", from.name(), target.name), command))
    }

    fn storms(&self, testpod: &Path) -> Result<Storms> {
        let mut storms = Vec::new();
        for (from, node) in WAYS {
            for (target, udp) in [(STEADY, false), (MOVING, false), (STEADY, true)] {
                let (what, mut command) = self.client(testpod, from, target, node)?;
                command.args(["storm", &target.at(node)?.to_string(), "--rate=10", "--workers=4", "--seconds=600"]);
                command.arg(TIMEOUT);
                if udp {
                    command.arg("--udp");
                }
                let transport = if udp { Transport::Udp } else { Transport::Tcp };
                storms.push((what.clone(), transport, Client::spawn(command, what)?));
            }
        }
        for (_, _, client) in &mut storms {
            client.wait_for_line("ready", Duration::from_secs(60))?;
        }
        Ok(Storms(storms))
    }

    /// What is done in a phase, and what goes on after it.
    fn act(&self, phase: Phase, agent: &Path) -> Result<Vec<Child>> {
        match phase.to {
            Some(Proxy::Agent) => {
                self.remove(Proxy::KubeProxy)?;
                self.install(Proxy::Agent)?;
                self.on_every_node(agent, &["cleanup", "--kube-proxy"])?;
            }
            Some(Proxy::KubeProxy) => {
                self.remove(Proxy::Agent)?;
                self.install(Proxy::KubeProxy)?;
                return self.drain(agent);
            }
            None => self.change()?,
        }
        Ok(Vec::new())
    }

    /// Begins on every node; it goes on until the connections have ended that go by the agent's programs.
    fn drain(&self, agent: &Path) -> Result<Vec<Child>> {
        let begin = |node: &Node| {
            let mut command = node.command(agent)?;
            command.args(["cleanup", "--drain=5m"]).stdin(Stdio::null()).stdout(Stdio::null());
            command.spawn().with_context(|| format!("start cleanup on {}", node.name))
        };
        self.nodes.iter().map(begin).collect()
    }

    /// Deletes its DaemonSet; what it programmed goes on serving.
    fn remove(&self, proxy: Proxy) -> Result<()> {
        let daemons = ["--namespace=kube-system", "delete", "daemonset", proxy.name(), "--cascade=foreground"];
        self.kubectl_for(&daemons, "120s").map(drop)
    }

    fn on_every_node(&self, program: &Path, args: &[&str]) -> Result<()> {
        for node in &self.nodes {
            let done =
                node.command(program)?.args(args).output().with_context(|| format!("run {}", program.display()))?;
            let words = [done.stdout, done.stderr].concat();
            ensure!(done.status.success(), "{args:?} on {}: {}", node.name, String::from_utf8_lossy(&words));
        }
        Ok(())
    }

    /// Scaled, rolled, and a node drained of it.
    fn change(&self) -> Result<()> {
        let rolled = ["rollout", "status", "deployment/moving", "--timeout=120s"];
        for args in [
            &["scale", "deployment/moving", "--replicas=5"][..],
            &["rollout", "restart", "deployment/moving"],
            &["scale", "deployment/moving", "--replicas=2"],
        ] {
            self.kubectl(args)?;
            self.kubectl_for(&rolled, "180s")?;
        }
        let drain = ["drain", "node3", "--ignore-daemonsets", "--pod-selector=app=moving", "--timeout=120s"];
        self.kubectl_for(&drain, "180s")?;
        self.kubectl(&["uncordon", "node3"])?;
        self.kubectl_for(&rolled, "180s")?;
        // Some more connections after the last change.
        sleep(Duration::from_secs(3));
        Ok(())
    }
}

impl Storms {
    fn end(self, phase: &'static str, observed: &mut Observed) -> Result<()> {
        for (way, transport, client) in self.0 {
            observed.begun(phase, way, transport, client.finish(Duration::from_secs(60))?);
        }
        Ok(())
    }
}
