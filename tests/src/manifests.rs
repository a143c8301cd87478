//! The manifests as kustomize renders them, and what they give the agent's container.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

pub const BASE: &str = "manifests/base";

/// Whatever is built upon the base.
pub const OVERLAYS: [&str; 7] = [
    "manifests/overlays/iptables",
    "manifests/overlays/ipvs",
    "manifests/overlays/k3s",
    "manifests/overlays/kind",
    "manifests/overlays/kubeadm",
    "manifests/overlays/nftables",
    "manifests/overlays/pod-annotations",
];

/// A directory of the repository.
pub fn path(directory: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(directory)
}

/// What `kubectl apply -k` would apply.
pub fn render(directory: &str) -> Result<String> {
    let rendered = Command::new("kubectl").arg("kustomize").arg(path(directory)).output().context("start kubectl")?;
    if !rendered.status.success() {
        bail!("kubectl kustomize {directory}: {}", String::from_utf8_lossy(&rendered.stderr).trim());
    }
    String::from_utf8(rendered.stdout).with_context(|| format!("kubectl kustomize {directory} printed no text"))
}

/// The objects of a YAML stream.
pub fn objects(yaml: &str) -> Result<Vec<Value>> {
    let objects: Vec<Value> = serde_saphyr::from_multiple(yaml).context("what was rendered is no YAML")?;
    Ok(objects.into_iter().filter(|object| !object.is_null()).collect())
}

/// The Pods of the DaemonSet.
#[derive(Clone, Debug)]
pub struct Pod(Value);

/// One of their containers.
#[derive(Clone, Debug)]
pub struct Container {
    pub image: String,
    pub args: Vec<String>,
    /// Name and value; of those that the kubelet fills in, what it fills in.
    pub env: Vec<(String, String)>,
    pub security: Security,
    pub mounts: Vec<Mount>,
}

/// A container's securityContext, whole: what this does not know is an error, so that nothing of it is left out.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Security {
    /// None beyond these. `None`: all there are, with everything else that goes with being privileged.
    pub capabilities: Option<Vec<String>>,
    pub read_only: bool,
    pub user: i64,
    pub may_gain: bool,
    /// The seccomp filter that the runtime has by default.
    pub filtered: bool,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Mount {
    /// On the node.
    pub source: String,
    pub at: String,
    pub read_only: bool,
    /// Mounts that the container makes below it reach the node.
    pub bidirectional: bool,
}

impl Pod {
    /// The one of a directory's rendered DaemonSet, on this node.
    pub fn of(directory: &str) -> Result<Self> {
        let objects = objects(&render(directory)?)?;
        let daemon_set = objects.into_iter().find(|object| object["kind"] == "DaemonSet");
        let mut daemon_set = daemon_set.with_context(|| format!("{directory} has no DaemonSet"))?;
        Ok(Self(daemon_set["spec"]["template"]["spec"].take()))
    }

    /// The agent's own.
    pub fn agent(&self, node: &str) -> Result<Container> {
        self.container("containers", "proxy-agent", node)
    }

    /// The step that mounts bpffs.
    pub fn mount_bpffs(&self, node: &str) -> Result<Container> {
        self.container("initContainers", "mount-bpffs", node)
    }

    fn container(&self, list: &str, name: &str, node: &str) -> Result<Container> {
        let Self(pod) = self;
        let containers = pod[list].as_array().map_or(&[][..], Vec::as_slice);
        let container = containers.iter().find(|one| one["name"] == name);
        let container = container.with_context(|| format!("there is no {name} among the {list}"))?;
        let text = |value: &Value| value.as_str().map(str::to_owned).context("no text");
        let of = |list: &Value| list.as_array().cloned().unwrap_or_default();
        let mut env = Vec::new();
        for variable in of(&container["env"]) {
            let value = match variable["valueFrom"]["fieldRef"]["fieldPath"].as_str() {
                Some("spec.nodeName") => node.to_owned(),
                Some(path) => bail!("{variable}: what is {path}?"),
                None => text(&variable["value"]).with_context(|| format!("{variable}"))?,
            };
            env.push((text(&variable["name"])?, value));
        }
        let expand = |arg: &Value| -> Result<String> {
            let mut arg = text(arg)?;
            for (name, value) in &env {
                arg = arg.replace(&format!("$({name})"), value);
            }
            Ok(arg)
        };
        Ok(Container {
            image: text(&container["image"])?,
            args: of(&container["args"]).iter().map(expand).collect::<Result<_>>()?,
            security: Security::of(&container["securityContext"], &pod["securityContext"])?,
            mounts: of(&container["volumeMounts"]).iter().map(|mount| self.mount(mount)).collect::<Result<_>>()?,
            env,
        })
    }

    fn mount(&self, mount: &Value) -> Result<Mount> {
        let volumes = self.0["volumes"].as_array().context("no volumes")?;
        let volume = volumes.iter().find(|volume| volume["name"] == mount["name"]);
        let source = volume.and_then(|volume| volume["hostPath"]["path"].as_str());
        Ok(Mount {
            source: source.with_context(|| format!("{mount} is no path of the node"))?.to_owned(),
            at: mount["mountPath"].as_str().context("no mountPath")?.to_owned(),
            read_only: mount["readOnly"] == true,
            bidirectional: mount["mountPropagation"] == "Bidirectional",
        })
    }
}

impl Security {
    fn of(container: &Value, pod: &Value) -> Result<Self> {
        let known = |object: &Value, known: &[&str]| -> Result<()> {
            let keys = object.as_object().into_iter().flatten().map(|(key, _)| key);
            let unknown: Vec<_> = keys.filter(|key| !known.contains(&key.as_str())).collect();
            ensure!(unknown.is_empty(), "what does {unknown:?} of the securityContext mean?");
            Ok(())
        };
        known(pod, &["seccompProfile"])?;
        known(
            container,
            &["allowPrivilegeEscalation", "capabilities", "privileged", "readOnlyRootFilesystem", "runAsUser"],
        )?;
        known(&container["capabilities"], &["add", "drop"])?;
        let privileged = container["privileged"] == true;
        let drop = &container["capabilities"]["drop"];
        ensure!(privileged || *drop == serde_json::json!(["ALL"]), "some capabilities are left: {drop}");
        let added = container["capabilities"]["add"].as_array().map_or(&[][..], Vec::as_slice);
        let added = added.iter().map(|name| name.as_str().map(str::to_owned).context("a capability"));
        Ok(Self {
            capabilities: if privileged { None } else { Some(added.collect::<Result<_>>()?) },
            read_only: container["readOnlyRootFilesystem"] == true,
            user: container["runAsUser"].as_i64().context("runAsUser says nothing")?,
            may_gain: container["allowPrivilegeEscalation"] != false,
            filtered: !privileged && pod["seccompProfile"]["type"] == "RuntimeDefault",
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(security: &Value) -> Pod {
        Pod(json!({
            "securityContext": {"seccompProfile": {"type": "RuntimeDefault"}},
            "volumes": [{"name": "v", "hostPath": {"path": "/sys/x"}}, {"name": "c", "configMap": {"name": "c"}}],
            "containers": [{
                "name": "proxy-agent",
                "image": "proxy-agent:1",
                "args": ["run", "--hostname-override=$(NODE_NAME)"],
                "env": [{"name": "NODE_NAME", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}}],
                "securityContext": security,
                "volumeMounts": [{"name": "v", "mountPath": "/host/x", "readOnly": true}],
            }],
        }))
    }

    fn least() -> Value {
        json!({
            "allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true, "runAsUser": 0,
            "capabilities": {"drop": ["ALL"], "add": ["BPF"]},
        })
    }

    #[test]
    fn a_container_is_read_whole() {
        let container = pod(&least()).agent("n1").unwrap();
        assert_eq!(container.args, ["run", "--hostname-override=n1"]);
        let mount = Mount { source: "/sys/x".into(), at: "/host/x".into(), read_only: true, bidirectional: false };
        assert_eq!(container.mounts, [mount]);
        let security = Security {
            capabilities: Some(vec!["BPF".into()]),
            read_only: true,
            user: 0,
            may_gain: false,
            filtered: true,
        };
        assert_eq!(container.security, security);
    }

    #[test]
    fn what_is_not_known_is_refused() {
        let refused = |change: fn(&mut Value)| {
            let mut security = least();
            change(&mut security);
            pod(&security).agent("n1").unwrap_err().to_string()
        };
        assert!(refused(|security| security["seLinuxOptions"] = json!({})).contains("seLinuxOptions"));
        assert!(refused(|security| security["capabilities"]["drop"] = json!(["KILL"])).contains("KILL"));
        assert!(refused(|security| security["runAsUser"] = json!(null)).contains("runAsUser"));
    }
}
