//! `manifests`: renders the kustomize base and what is built upon it, and checks what can be checked without a cluster: it is YAML, names are unique and
//! resolve, the container asks for no more than it should, of capabilities and of what it may write to, and every option in its arguments exists.

use std::{collections::BTreeSet, path::Path, process::ExitCode};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use crate::{
    command::{self, command, output},
    setup,
};

const BASE: &str = "manifests/base";
const OVERLAYS: [&str; 3] = ["manifests/overlays/pod-annotations", IPTABLES, IPVS];
/// Legacy iptables asks the kernel by a raw socket.
const IPTABLES: &str = "manifests/overlays/iptables";
/// IPVS wants the kernel set.
const IPVS: &str = "manifests/overlays/ipvs";

/// What the agent may hold beyond nothing (docs/kernels.md says for what).
const CAPABILITIES: [&str; 3] = ["BPF", "NET_ADMIN", "PERFMON"];
const CAPABILITIES_OF_IPTABLES: [&str; 4] = ["BPF", "NET_ADMIN", "NET_RAW", "PERFMON"];
/// What of the node's a container may write to.
const WRITABLE: [&str; 1] = ["/sys/fs/bpf"];
const WRITABLE_OF_IPTABLES: [&str; 2] = ["/sys/fs/bpf", "/run/xtables.lock"];
const WRITABLE_OF_IPVS: [&str; 2] = ["/sys/fs/bpf", "/proc/sys/net"];

/// What a container may have at most.
#[derive(Clone, Copy)]
struct Leave {
    capabilities: &'static [&'static str],
    writable: &'static [&'static str],
}

impl Leave {
    fn of(directory: &str) -> Self {
        match directory {
            IPTABLES => Self { capabilities: &CAPABILITIES_OF_IPTABLES, writable: &WRITABLE_OF_IPTABLES },
            IPVS => Self { capabilities: &CAPABILITIES, writable: &WRITABLE_OF_IPVS },
            _ => Self { capabilities: &CAPABILITIES, writable: &WRITABLE },
        }
    }
}

#[derive(clap::Args)]
pub struct Args {
    /// Print nothing but what is wrong
    #[arg(long)]
    check: bool,
}

pub fn run(args: &Args) -> Result<ExitCode> {
    let Args { check } = args;
    setup::tools(&[setup::KUBECTL])?;
    let help = help()?;
    for directory in [BASE].into_iter().chain(OVERLAYS) {
        let text = output(command("kubectl").args(["kustomize", directory]))?;
        let objects: Vec<Value> = serde_saphyr::from_multiple(&text).context("the rendered manifests are no YAML")?;
        inspect(&objects, &help, Leave::of(directory)).context(directory)?;
        if *check {
            println!("manifests: {directory}: {} objects render and hold together", objects.len());
        } else if directory == BASE {
            print!("{text}");
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// What `proxy-agent run --help` says: the binary that `PROXY_AGENT_BIN` names, or one with no programs inside (its options are the same).
fn help() -> Result<String> {
    if let Some(agent) = std::env::var_os("PROXY_AGENT_BIN") {
        return output(command(agent).args(["run", "--help"]));
    }
    let mut cargo = command::cargo();
    cargo.args(["run", "--locked", "--quiet", "--package", "proxy-agent", "--", "run", "--help"]);
    output(&mut cargo)
}

fn inspect(objects: &[Value], help: &str, leave: Leave) -> Result<()> {
    let mut names = BTreeSet::new();
    for object in objects {
        let kind = text(object, "/kind")?;
        let name = text(object, "/metadata/name")?;
        ensure!(!text(object, "/apiVersion")?.is_empty(), "{kind} {name} has no apiVersion");
        ensure!(names.insert((kind, name)), "{kind} {name} is there twice");
    }
    let daemon_set = objects
        .iter()
        .find(|object| object.pointer("/kind").is_some_and(|kind| kind == "DaemonSet"))
        .context("there is no DaemonSet")?;

    let selector =
        daemon_set.pointer("/spec/selector/matchLabels").and_then(Value::as_object).context("no selector")?;
    for (label, value) in selector {
        let labels = daemon_set.pointer("/spec/template/metadata/labels").context("the Pods carry no labels")?;
        ensure!(labels.get(label) == Some(value), "the selector's label {label} is not on the Pods");
    }
    let account = text(daemon_set, "/spec/template/spec/serviceAccountName")?;
    ensure!(names.contains(&("ServiceAccount", account)), "there is no ServiceAccount {account}");
    let bound = objects.iter().any(|object| {
        object.pointer("/kind").is_some_and(|kind| kind == "ClusterRoleBinding")
            && object.pointer("/subjects/0/name").is_some_and(|name| name == account)
            && object.pointer("/subjects/0/namespace") == daemon_set.pointer("/metadata/namespace")
    });
    ensure!(bound, "ServiceAccount {account} is bound to no role");

    let volumes = list(daemon_set, "/spec/template/spec/volumes");
    for container in list(daemon_set, "/spec/template/spec/containers") {
        inspect_container(container, volumes, help, leave)?;
    }
    Ok(())
}

fn inspect_container(container: &Value, volumes: &[Value], help: &str, leave: Leave) -> Result<()> {
    let Leave { capabilities, writable } = leave;
    let name = text(container, "/name")?;
    let image = text(container, "/image")?;
    ensure!(
        image.contains(':') && !image.ends_with(":latest"),
        "container {name}: image {image} is not pinned to a version"
    );
    for mount in list(container, "/volumeMounts") {
        let volume = name_of(mount).context("a volume mount without a name")?;
        let path = text(mount, "/mountPath")?;
        ensure!(
            !Path::new(path).starts_with("/proc"),
            "container {name} mounts {volume} inside /proc, which runtimes refuse"
        );
        let Some(source) = volumes.iter().find(|one| name_of(one) == Some(volume)) else {
            bail!("container {name} mounts {volume}, which is no volume of the Pod");
        };
        let source = text(source, "/hostPath/path")?;
        let read_only = mount.pointer("/readOnly").is_some_and(|value| value == true);
        ensure!(
            read_only || writable.contains(&source),
            "container {name} may write to {source}, it should do with {writable:?}"
        );
    }
    ensure!(container.pointer("/securityContext/privileged").is_none(), "container {name} asks to be privileged");
    for capability in list(container, "/securityContext/capabilities/add") {
        let known = capability.as_str().is_some_and(|capability| capabilities.contains(&capability));
        ensure!(known, "container {name} asks for capability {capability}, it should do with {capabilities:?}");
    }
    let args = list(container, "/args");
    ensure!(args.first().is_some_and(|verb| verb == "run"), "container {name} does not start `proxy-agent run`");
    for arg in args.iter().skip(1) {
        let option = arg.as_str().unwrap_or_default().split('=').next().unwrap_or_default();
        let known = help.split(|c: char| c.is_whitespace() || matches!(c, ',' | '=' | '[')).any(|word| word == option);
        ensure!(option.starts_with("--") && known, "container {name}: `proxy-agent run` has no option {option}");
        // Where it is differs from host to host (hybrid ones have it in `unified`); the agent finds it.
        ensure!(option != "--cgroup-root", "container {name} names the cgroup root, which the agent finds by itself");
    }
    Ok(())
}

fn text<'a>(object: &'a Value, pointer: &str) -> Result<&'a str> {
    match object.pointer(pointer).and_then(Value::as_str) {
        Some(text) => Ok(text),
        None => bail!("{pointer} is missing in {object}"),
    }
}

fn list<'a>(object: &'a Value, pointer: &str) -> &'a [Value] {
    object.pointer(pointer).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

fn name_of(object: &Value) -> Option<&str> {
    object.pointer("/name").and_then(Value::as_str)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const HELP: &str = "Usage: proxy-agent run [OPTIONS]\n      --bpffs <DIR>   Where pins go\n      --source=<DIR> --cgroup-root <DIR>";

    fn container(change: impl FnOnce(&mut Value)) -> Result<()> {
        let mut container = json!({
            "name": "a", "image": "proxy-agent:1", "args": ["run", "--bpffs=/x"],
            "securityContext": {"capabilities": {"add": ["BPF"]}},
            "volumeMounts": [{"name": "v", "mountPath": "/host/v", "readOnly": true}],
        });
        change(&mut container);
        let volumes = [json!({"name": "v", "hostPath": {"path": "/proc/sys/net"}})];
        inspect_container(&container, &volumes, HELP, Leave::of(BASE))
    }

    #[test]
    fn a_container_is_held_to_little() {
        container(|_| {}).unwrap();
        let refused = |change: fn(&mut Value), word: &str| {
            let error = container(change).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        };
        refused(|c| c["args"][1] = json!("--bpf=/x"), "--bpf");
        refused(|c| c["args"][0] = json!("check"), "does not start");
        refused(|c| c["args"][1] = json!("--cgroup-root=/host/cgroup"), "cgroup root");
        refused(|c| c["image"] = json!("proxy-agent:latest"), "pinned");
        refused(|c| c["volumeMounts"][0]["name"] = json!("w"), "mounts w");
        refused(|c| c["volumeMounts"][0]["mountPath"] = json!("/proc/sys/net"), "inside /proc");
        refused(|c| c["volumeMounts"][0]["readOnly"] = json!(false), "may write to /proc/sys/net");
        refused(|c| c["securityContext"]["privileged"] = json!(true), "privileged");
        refused(|c| c["securityContext"]["capabilities"]["add"][0] = json!("SYS_ADMIN"), "SYS_ADMIN");
    }
}
