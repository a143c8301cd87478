//! Who is examined.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Stdio},
};

use anyhow::{Context, Result, bail};

use super::table::Configuration;
use crate::{
    apiserver,
    world::{Node, SocketLb},
};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Subject {
    KubeProxy(Mode),
    Ebpf(SocketLb),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    Nftables,
    Iptables,
}

impl Subject {
    /// kube-proxy first: it proves the cases.
    pub const ALL: [Self; 4] = [
        Self::KubeProxy(Mode::Nftables),
        Self::KubeProxy(Mode::Iptables),
        Self::Ebpf(SocketLb::All),
        Self::Ebpf(SocketLb::Node),
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::KubeProxy(Mode::Nftables) => "kube-proxy nftables",
            Self::KubeProxy(Mode::Iptables) => "kube-proxy iptables",
            Self::Ebpf(SocketLb::All) => "ebpf socket-lb all",
            Self::Ebpf(SocketLb::Node) => "ebpf socket-lb node",
            Self::Ebpf(SocketLb::Off) => "ebpf socket-lb off",
        }
    }

    /// Whether pods are translated at connect time: their own address reaches the backend then, and nothing is masqueraded.
    pub fn pods_at_connect_time(self) -> bool {
        self == Self::Ebpf(SocketLb::All)
    }
}

/// kube-proxy: `KUBE_PROXY_BIN`, or the release that `tests/apiserver/go.mod` names, built with Go.
pub fn kube_proxy() -> Result<PathBuf> {
    let Some(path) = std::env::var_os("KUBE_PROXY_BIN") else { return apiserver::build("kube-proxy") };
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
        // Limits of connection tracking belong to the machine, not to a namespace.
        let text = format!(
            "apiVersion: kubeproxy.config.k8s.io/v1alpha1\n\
             kind: KubeProxyConfiguration\n\
             mode: {mode}\n\
             hostnameOverride: {name}\n\
             clientConnection: {{kubeconfig: {kubeconfig}}}\n\
             {detector}\n\
             healthzBindAddress: 127.0.0.1:10256\n\
             metricsBindAddress: 127.0.0.1:10249\n\
             iptables: {{masqueradeAll: {masquerade_all}, minSyncPeriod: 20ms, syncPeriod: 30s}}\n\
             nftables: {{masqueradeAll: {masquerade_all}, minSyncPeriod: 20ms, syncPeriod: 30s}}\n\
             conntrack: {{maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}}\n"
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
