//! Who serves Services in a cluster: upstream's kube-proxy, or the agent as its manifests have it.

use anyhow::{Context as _, Result};

use super::{Cluster, images};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Proxy {
    KubeProxy,
    Agent,
}

impl Proxy {
    /// Of its DaemonSet, in `kube-system`.
    pub fn name(self) -> &'static str {
        match self {
            Self::KubeProxy => "kube-proxy",
            Self::Agent => "proxy-agent",
        }
    }
}

/// As kubeadm has it, but for what is the cluster's: the API server's address, and that nothing of the machine's own namespace may
/// be set from a node's.
fn kube_proxy(server: std::net::SocketAddr) -> String {
    format!(
        r#"
apiVersion: v1
kind: ServiceAccount
metadata: {{name: kube-proxy, namespace: kube-system}}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {{name: kube-proxy}}
roleRef: {{apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: "system:node-proxier"}}
subjects: [{{kind: ServiceAccount, name: kube-proxy, namespace: kube-system}}]
---
apiVersion: v1
kind: ConfigMap
metadata: {{name: kube-proxy, namespace: kube-system}}
data:
  config.conf: |
    apiVersion: kubeproxy.config.k8s.io/v1alpha1
    kind: KubeProxyConfiguration
    mode: nftables
    clusterCIDR: {pods}
    detectLocalMode: ClusterCIDR
    conntrack: {{maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}}
---
apiVersion: apps/v1
kind: DaemonSet
metadata: {{name: kube-proxy, namespace: kube-system, labels: {{k8s-app: kube-proxy}}}}
spec:
  selector: {{matchLabels: {{k8s-app: kube-proxy}}}}
  template:
    metadata: {{labels: {{k8s-app: kube-proxy}}}}
    spec:
      serviceAccountName: kube-proxy
      priorityClassName: system-node-critical
      hostNetwork: true
      tolerations: [{{operator: Exists}}]
      containers:
      - name: kube-proxy
        image: {image}
        args: [--config=/etc/kube-proxy/config.conf, --hostname-override=$(NODE_NAME)]
        env:
        - {{name: NODE_NAME, valueFrom: {{fieldRef: {{fieldPath: spec.nodeName}}}}}}
        - {{name: KUBERNETES_SERVICE_HOST, value: "{host}"}}
        - {{name: KUBERNETES_SERVICE_PORT, value: "{port}"}}
        securityContext: {{privileged: true}}
        readinessProbe:
          httpGet: {{path: /healthz, port: 10256, host: 127.0.0.1}}
          periodSeconds: 2
        volumeMounts:
        - {{name: config, mountPath: /etc/kube-proxy}}
        - {{name: lock, mountPath: /run/xtables.lock}}
      volumes:
      - {{name: config, configMap: {{name: kube-proxy}}}}
      - {{name: lock, hostPath: {{path: /run/xtables.lock, type: FileOrCreate}}}}
"#,
        pods = super::network::POD_RANGE,
        image = images::KUBE_PROXY,
        host = server.ip(),
        port = server.port(),
    )
}

/// Where the agent finds the API server: the manifest reads it from here.
fn endpoint(server: std::net::SocketAddr) -> String {
    format!(
        r#"
apiVersion: v1
kind: ConfigMap
metadata: {{name: kubernetes-services-endpoint, namespace: kube-system}}
data: {{KUBERNETES_SERVICE_HOST: "{}", KUBERNETES_SERVICE_PORT: "{}"}}
"#,
        server.ip(),
        server.port()
    )
}

impl Cluster {
    /// Installs it and waits until it serves on every node.
    pub fn install(&self, proxy: Proxy) -> Result<()> {
        let server = &self.plane.server;
        match proxy {
            Proxy::KubeProxy => server.apply(&kube_proxy(server.address()))?,
            Proxy::Agent => {
                server.apply(&endpoint(server.address()))?;
                let base = concat!(env!("CARGO_MANIFEST_DIR"), "/../manifests/base");
                server.kubectl(&["apply", "--validate=false", "-k", base], "")?;
            }
        }
        self.wait_rolled_out(proxy)
    }

    fn wait_rolled_out(&self, proxy: Proxy) -> Result<()> {
        let daemons = format!("daemonset/{}", proxy.name());
        let waits = ["--namespace=kube-system", "rollout", "status", &daemons, "--timeout=120s"];
        self.kubectl_for(&waits, "180s").map(drop).with_context(|| {
            let about = ["--namespace=kube-system", "describe", "pods"];
            format!("{} does not get ready: {}", proxy.name(), self.kubectl(&about).unwrap_or_default())
        })
    }
}
