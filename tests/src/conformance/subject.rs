//! Who is examined.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Stdio},
};

use anyhow::{Context, Result, bail, ensure};

use super::{
    services::{At, Service, Via},
    table::Configuration,
};
use crate::{
    golang,
    pod::socket::Transport,
    world::{Ask, Fallback, Family, Node, SocketLb, World},
};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Subject {
    KubeProxy(Mode),
    Ebpf(SocketLb),
    /// And with XDP where packets come in from outside.
    Xdp(SocketLb),
    Fallback(Fallback),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    Nftables,
    Iptables,
}

impl Subject {
    /// kube-proxy first: it proves the cases.
    pub const ALL: [Self; 9] = [
        Self::KubeProxy(Mode::Nftables),
        Self::KubeProxy(Mode::Iptables),
        Self::Ebpf(SocketLb::All),
        Self::Ebpf(SocketLb::Node),
        Self::Xdp(SocketLb::Node),
        Self::Fallback(Fallback::Nftables),
        Self::Fallback(Fallback::IptablesNft),
        Self::Fallback(Fallback::IptablesLegacy),
        Self::Fallback(Fallback::Ipvs),
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::KubeProxy(Mode::Nftables) => "kube-proxy nftables",
            Self::KubeProxy(Mode::Iptables) => "kube-proxy iptables",
            Self::Ebpf(SocketLb::All) => "ebpf socket-lb all",
            Self::Ebpf(SocketLb::Node) => "ebpf socket-lb node",
            Self::Ebpf(SocketLb::Off) => "ebpf socket-lb off",
            Self::Xdp(_) => "ebpf XDP",
            Self::Fallback(Fallback::Nftables) => "agent nftables",
            Self::Fallback(Fallback::IptablesNft) => "agent iptables-nft",
            Self::Fallback(Fallback::IptablesLegacy) => "agent iptables-legacy",
            Self::Fallback(Fallback::Ipvs) => "agent ipvs",
        }
    }

    /// Whether it is one to be asked where objects are files.
    pub fn reads_files(self) -> bool {
        !matches!(self, Self::KubeProxy(_) | Self::Xdp(_))
    }

    /// Why it cannot be asked here, if so.
    pub fn unavailable(self) -> Option<&'static str> {
        (self == Self::Fallback(Fallback::Ipvs)).then(World::without_ipvs).flatten()
    }

    /// Whether two connections from one port to one backend are taken for one, where they came by two Services: IPVS changes no source
    /// port, and looks answers up by these.
    pub fn mixes_ports(self) -> bool {
        self == Self::Fallback(Fallback::Ipvs)
    }

    /// Whether it is one of ours.
    pub fn is_agent(self) -> bool {
        !matches!(self, Self::KubeProxy(_))
    }

    /// Whether it has counters of its own.
    pub fn is_ebpf(self) -> bool {
        matches!(self, Self::Ebpf(_) | Self::Xdp(_))
    }

    /// Further options of our agent. `native`: what cannot be had is heard of.
    pub fn extra(self) -> &'static [&'static str] {
        match self {
            Self::Xdp(_) => &["--xdp", "native"],
            Self::KubeProxy(_) | Self::Ebpf(_) | Self::Fallback(_) => &[],
        }
    }

    /// Once it was asked: that XDP had a part in the answers, where it should, of each family and transport. `services`: those of the
    /// table.
    pub fn check(self, world: &World, services: &[Service]) -> Result<()> {
        if !matches!(self, Self::Xdp(_)) {
            return Ok(());
        }
        // Two endpoints, one of them on the other node.
        let service = services.iter().find(|service| service.name == "ports").context("no Service with node ports")?;
        for family in Family::BOTH {
            for transport in [Transport::Tcp, Transport::Udp] {
                let to = service.address(world, Via::NodePort(At::Node1), family, transport);
                let before = bypassed(world)?;
                let report = world.ask(world.outside(), &Ask::new(to, transport).times(30))?;
                let there = report.backends().get("b2").copied().unwrap_or_default();
                ensure!(report.errors().is_empty() && there > 0, "{to} {transport}: {report:?}");
                // Both ways, but the stack has its turn with each neighbour every few seconds, on each CPU.
                let count = bypassed(world)? - before;
                ensure!(
                    count >= there as u64,
                    "{to} {transport}: {there} flows to the other node, {count} packets past the stack"
                );
            }
        }
        Ok(())
    }

    /// Whether pods are translated at connect time: their own address reaches the backend then, and nothing is masqueraded.
    pub fn pods_at_connect_time(self) -> bool {
        self == Self::Ebpf(SocketLb::All)
    }
}

/// Packets that XDP on node1 sent on past the stack.
fn bypassed(world: &World) -> Result<u64> {
    let counters = world.cli(world.node(1), &["counters"])?;
    let bypassed = counters.lines().find_map(|line| line.strip_prefix("bypassed"));
    let count = bypassed.and_then(|line| line.split_whitespace().nth(1)?.parse().ok());
    count.with_context(|| format!("how much went past the stack is not told:\n{counters}"))
}

/// kube-proxy: `KUBE_PROXY_BIN`, or the release that `tests/apiserver/go.mod` names, built with Go.
pub fn kube_proxy() -> Result<PathBuf> {
    let Some(path) = std::env::var_os("KUBE_PROXY_BIN") else { return golang::KUBE_PROXY.quick().build_with_path() };
    let path = PathBuf::from(path);
    if !path.is_file() {
        bail!("KUBE_PROXY_BIN names {}, which is no file", path.display());
    }
    Ok(path)
}

/// kube-proxy on a node; killed when dropped, its rules stay.
pub struct KubeProxy {
    child: Child,
    log: PathBuf,
}

impl KubeProxy {
    pub fn start(
        program: &Path,
        node: &Node,
        dir: &Path,
        mode: Mode,
        configuration: Configuration,
        kubeconfig: &Path,
        more: &str,
    ) -> Result<Self> {
        let name = &node.place.name;
        let mode = match mode {
            Mode::Nftables => "nftables",
            Mode::Iptables => "iptables",
        };
        let detector = if configuration.detector {
            "detectLocalMode: NodeCIDR"
        } else {
            "detectLocalMode: ClusterCIDR\nclusterCIDR: \"\""
        };
        let masquerade_all = configuration.masquerade_all;
        let kubeconfig = kubeconfig.display();
        // Limits of connection tracking belong to the machine, not to a namespace. An agent that runs beside it has the usual ports.
        let text = format!(
            "apiVersion: kubeproxy.config.k8s.io/v1alpha1\n\
             kind: KubeProxyConfiguration\n\
             mode: {mode}\n\
             hostnameOverride: {name}\n\
             clientConnection: {{kubeconfig: {kubeconfig}}}\n\
             {detector}\n\
             healthzBindAddress: 127.0.0.1:28256\n\
             metricsBindAddress: 127.0.0.1:28249\n\
             iptables: {{masqueradeAll: {masquerade_all}, minSyncPeriod: 20ms, syncPeriod: 30s}}\n\
             nftables: {{masqueradeAll: {masquerade_all}, minSyncPeriod: 20ms, syncPeriod: 30s}}\n\
             conntrack: {{maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}}\n\
             {more}"
        );
        let config = dir.join(format!("kube-proxy-{name}.yaml"));
        fs::write(&config, text).with_context(|| format!("write {}", config.display()))?;
        let log = dir.join(format!("kube-proxy-{name}.log"));
        let output = File::create(&log).with_context(|| format!("create {}", log.display()))?;
        let child = node
            .place
            .command(program)?
            .arg("--config")
            .arg(config)
            .env_remove("KUBECONFIG")
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .spawn()
            .with_context(|| format!("start kube-proxy on {name}"))?;
        Ok(Self { child, log })
    }

    /// What its log ends with.
    pub fn log(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines.get(lines.len().saturating_sub(15)..).unwrap_or_default().join("\n")
    }
}

impl Drop for KubeProxy {
    fn drop(&mut self) {
        // What is gone already needs no ending.
        let _gone = self.child.kill();
        let _gone = self.child.wait();
    }
}
