//! `manifests`: renders the kustomize base, what is built upon it and the Helm chart, and checks what can be checked without a cluster: it
//! is YAML, names are unique and resolve, the containers ask for no more than they should, of capabilities and of what they may write to, and
//! every option in their arguments exists; the chart gives the same objects, and refuses values that mean nothing; alerts and dashboard
//! go by metrics that there are. The `api` suite puts what is rendered to a real API server.

mod chart;
mod monitoring;

use std::{collections::BTreeSet, path::Path, process::ExitCode};

use anyhow::{Context as _, Result, bail, ensure};
use proxy_tests::manifests::{self, BASE, OVERLAYS};
use serde_json::{Value, json};

use crate::{
    command::{self, command, output},
    setup,
};

/// Legacy iptables asks the kernel by a raw socket.
const IPTABLES: &str = "manifests/overlays/iptables";
/// IPVS wants the kernel set.
const IPVS: &str = "manifests/overlays/ipvs";
/// A node that is a container has neither bpffs nor the host's cgroups.
const KIND: &str = "manifests/overlays/kind";

/// What the agent may hold beyond nothing (docs/kernels.md says for what).
const CAPABILITIES: [&str; 3] = ["BPF", "NET_ADMIN", "PERFMON"];
const CAPABILITIES_OF_IPTABLES: [&str; 4] = ["BPF", "NET_ADMIN", "NET_RAW", "PERFMON"];
/// What of the node's a container may write to.
const WRITABLE: [&str; 1] = ["/sys/fs/bpf"];
const WRITABLE_OF_IPTABLES: [&str; 2] = ["/sys/fs/bpf", "/run/xtables.lock"];
const WRITABLE_OF_IPVS: [&str; 2] = ["/sys/fs/bpf", "/proc/sys/net"];

/// What a Pod may have at most.
#[derive(Clone, Copy)]
struct Leave {
    capabilities: &'static [&'static str],
    writable: &'static [&'static str],
    /// It may have the privileged step that mounts bpffs, and must be told where the root of the cgroups is.
    is_container: bool,
}

impl Leave {
    fn of(directory: &str) -> Self {
        let least = Self { capabilities: &CAPABILITIES, writable: &WRITABLE, is_container: false };
        match directory {
            IPTABLES => Self { capabilities: &CAPABILITIES_OF_IPTABLES, writable: &WRITABLE_OF_IPTABLES, ..least },
            IPVS => Self { writable: &WRITABLE_OF_IPVS, ..least },
            KIND => Self { is_container: true, ..least },
            _ => least,
        }
    }
}

#[derive(clap::Args)]
pub struct Args {
    /// Print nothing but what is wrong
    #[arg(long)]
    check: bool,

    /// Only fetch and build what the checks need: helm and promtool
    #[arg(long, conflicts_with = "check")]
    bring: bool,
}

pub fn run(args: &Args) -> Result<ExitCode> {
    let Args { check, bring } = args;
    setup::tools(&[setup::KUBECTL])?;
    let (helm, promtool) = (setup::helm(), setup::promtool());
    if *bring {
        helm.and(promtool)?;
        return Ok(ExitCode::SUCCESS);
    }
    let help = help()?;
    let chart = unchecked("the chart", helm)?.map(|helm| chart::Chart { helm });
    for directory in [BASE].into_iter().chain(OVERLAYS) {
        let text = manifests::render(directory)?;
        let objects = manifests::objects(&text)?;
        inspect(&objects, &help, Leave::of(directory)).context(directory)?;
        if let Some(chart) = &chart {
            chart.gives_the_same(directory, &objects)?;
        }
        if *check {
            println!("manifests: {directory}: {} objects render and hold together", objects.len());
        } else if directory == BASE {
            print!("{text}");
        }
    }
    if let Some(chart) = &chart {
        let refused = chart.refuses()?;
        chart.takes_everything(&help)?;
        if *check {
            println!("manifests: the chart gives the same objects, and refuses {refused} values that mean nothing");
        }
    }
    if let Some(promtool) = unchecked("the rules of alerts", promtool)? {
        monitoring::check(&promtool)?;
        if *check {
            println!("manifests: the rules of alerts hold");
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Whoever works without a network learns the rest all the same; where nobody reads it, it must not pass for checked.
fn unchecked<T>(what: &str, tool: Result<T>) -> Result<Option<T>> {
    match tool {
        Ok(tool) => Ok(Some(tool)),
        Err(error) if command::is_ci() => Err(error.context(format!("{what}: not checked"))),
        Err(error) => {
            eprintln!("manifests: NOT CHECKED: {what}: {error:#}");
            Ok(None)
        }
    }
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
    let first = list(daemon_set, "/spec/template/spec/initContainers");
    ensure!(first.is_empty() || leave.is_container, "there is a step before the agent, and nothing asks for one");
    first.iter().try_for_each(|step| inspect_step(step, daemon_set))
}

/// Of the version that this is, with tools or without.
fn inspect_image(container: &Value, name: &str) -> Result<()> {
    let image = text(container, "/image")?;
    let tag = image.rsplit_once(':').map(|(_, tag)| tag.trim_end_matches("-tools"));
    let version = env!("CARGO_PKG_VERSION");
    ensure!(tag == Some(version), "container {name}: image {image} is not pinned to version {version}");
    Ok(())
}

/// The only thing that is privileged: it mounts bpffs, and does and sees nothing else.
fn inspect_step(step: &Value, daemon_set: &Value) -> Result<()> {
    let name = text(step, "/name")?;
    inspect_image(step, name)?;
    let agents = daemon_set.pointer("/spec/template/spec/containers/0/image");
    ensure!(step.pointer("/image") == agents, "step {name} has another image than the agent");
    ensure!(step.pointer("/args") == Some(&json!(["init"])), "step {name} does more than `proxy-agent init`");
    let mounts = json!([{"name": "bpffs", "mountPath": "/sys/fs/bpf", "mountPropagation": "Bidirectional"}]);
    ensure!(step.pointer("/volumeMounts") == Some(&mounts), "step {name} mounts something else than bpffs");
    let security = json!({"privileged": true, "readOnlyRootFilesystem": true, "runAsUser": 0});
    ensure!(step.pointer("/securityContext") == Some(&security), "step {name} has another securityContext: {step}");
    Ok(())
}

fn inspect_container(container: &Value, volumes: &[Value], help: &str, leave: Leave) -> Result<()> {
    let Leave { capabilities, writable, is_container } = leave;
    let name = text(container, "/name")?;
    inspect_image(container, name)?;
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
        let read_only = mount.pointer("/readOnly").is_some_and(|value| value == true);
        if source.pointer("/configMap/name").is_some() {
            ensure!(read_only, "container {name} may write to {volume}, a ConfigMap");
            continue;
        }
        let source = text(source, "/hostPath/path")?;
        ensure!(
            read_only || writable.contains(&source),
            "container {name} may write to {source}, it should do with {writable:?}"
        );
        let propagation = mount.pointer("/mountPropagation").and_then(Value::as_str).unwrap_or("None");
        ensure!(propagation != "Bidirectional", "what container {name} mounts below {path} would reach the node");
    }
    for (field, wanted) in [("allowPrivilegeEscalation", json!(false)), ("readOnlyRootFilesystem", json!(true))] {
        let said = container.pointer(&format!("/securityContext/{field}"));
        ensure!(said == Some(&wanted), "container {name}: {field} is not {wanted}");
    }
    let dropped = container.pointer("/securityContext/capabilities/drop");
    ensure!(dropped == Some(&json!(["ALL"])), "container {name} keeps capabilities that the runtime gives");
    ensure!(container.pointer("/securityContext/privileged").is_none(), "container {name} asks to be privileged");
    for capability in list(container, "/securityContext/capabilities/add") {
        let known = capability.as_str().is_some_and(|capability| capabilities.contains(&capability));
        ensure!(known, "container {name} asks for capability {capability}, it should do with {capabilities:?}");
    }
    ensure!(
        container.pointer("/resources/limits/cpu").is_none(),
        "container {name} has a CPU limit: throttling delays programming"
    );
    let args = list(container, "/args");
    ensure!(args.first().is_some_and(|verb| verb == "run"), "container {name} does not start `proxy-agent run`");
    for arg in args.iter().skip(1) {
        let option = arg.as_str().unwrap_or_default().split('=').next().unwrap_or_default();
        let known = help.split(|c: char| c.is_whitespace() || matches!(c, ',' | '=' | '[')).any(|word| word == option);
        ensure!(option.starts_with("--") && known, "container {name}: `proxy-agent run` has no option {option}");
        // Where it is differs from host to host (hybrid ones have it in `unified`); the agent finds it, unless the node is a container.
        ensure!(
            option != "--cgroup-root" || is_container,
            "container {name} names the cgroup root, which the agent finds by itself"
        );
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
    use super::*;

    const HELP: &str = "Usage: proxy-agent run [OPTIONS]\n      --bpffs <DIR>   Where pins go\n      --source=<DIR> --cgroup-root <DIR>";
    const IMAGE: &str = concat!("proxy-agent:", env!("CARGO_PKG_VERSION"));

    fn container_in(directory: &str, change: impl FnOnce(&mut Value)) -> Result<()> {
        let mut container = json!({
            "name": "a", "image": IMAGE, "args": ["run", "--bpffs=/x"],
            "securityContext": {
                "allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true,
                "capabilities": {"drop": ["ALL"], "add": ["BPF"]},
            },
            "volumeMounts": [
                {"name": "v", "mountPath": "/host/v", "readOnly": true},
                {"name": "c", "mountPath": "/c", "readOnly": true},
            ],
        });
        change(&mut container);
        let volumes = [
            json!({"name": "v", "hostPath": {"path": "/proc/sys/net"}}),
            json!({"name": "c", "configMap": {"name": "c"}}),
        ];
        inspect_container(&container, &volumes, HELP, Leave::of(directory))
    }

    #[test]
    fn a_container_is_held_to_little() {
        container_in(BASE, |_| {}).unwrap();
        let refused = |change: fn(&mut Value), word: &str| {
            let error = container_in(BASE, change).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        };
        refused(|c| c["args"][1] = json!("--bpf=/x"), "--bpf");
        refused(|c| c["args"][0] = json!("check"), "does not start");
        refused(|c| c["args"][1] = json!("--cgroup-root=/host/cgroup"), "cgroup root");
        refused(|c| c["image"] = json!("proxy-agent:latest"), "pinned");
        refused(|c| c["image"] = json!("proxy-agent"), "pinned");
        refused(|c| c["volumeMounts"][0]["name"] = json!("w"), "mounts w");
        refused(|c| c["volumeMounts"][0]["mountPath"] = json!("/proc/sys/net"), "inside /proc");
        refused(|c| c["volumeMounts"][0]["readOnly"] = json!(false), "may write to /proc/sys/net");
        refused(|c| c["volumeMounts"][0]["mountPropagation"] = json!("Bidirectional"), "would reach the node");
        refused(|c| c["volumeMounts"][1]["readOnly"] = json!(false), "a ConfigMap");
        refused(|c| c["securityContext"]["privileged"] = json!(true), "privileged");
        refused(|c| c["securityContext"]["allowPrivilegeEscalation"] = json!(null), "allowPrivilegeEscalation");
        refused(|c| c["securityContext"]["readOnlyRootFilesystem"] = json!(false), "readOnlyRootFilesystem");
        refused(|c| c["securityContext"]["capabilities"]["drop"] = json!([]), "keeps capabilities");
        refused(|c| c["securityContext"]["capabilities"]["add"][0] = json!("SYS_ADMIN"), "SYS_ADMIN");
        refused(|c| c["resources"]["limits"]["cpu"] = json!("1"), "CPU limit");
        container_in(KIND, |c| c["args"][1] = json!("--cgroup-root=/host/cgroup")).unwrap();
        container_in(IPTABLES, |c| c["image"] = json!(format!("{IMAGE}-tools"))).unwrap();
    }

    #[test]
    fn the_privileged_step_does_one_thing() {
        let daemon_set = json!({"spec": {"template": {"spec": {"containers": [{"image": IMAGE}]}}}});
        let step = |change: fn(&mut Value)| {
            let mut step = json!({
                "name": "mount-bpffs", "image": IMAGE, "args": ["init"],
                "securityContext": {"privileged": true, "readOnlyRootFilesystem": true, "runAsUser": 0},
                "volumeMounts": [{"name": "bpffs", "mountPath": "/sys/fs/bpf", "mountPropagation": "Bidirectional"}],
            });
            change(&mut step);
            inspect_step(&step, &daemon_set)
        };
        step(|_| {}).unwrap();
        let changes: [fn(&mut Value); 4] = [
            |step| step["args"] = json!(["run"]),
            |step| step["image"] = json!(format!("{IMAGE}-tools")),
            |step| step["volumeMounts"][0]["mountPath"] = json!("/sys"),
            |step| step["securityContext"]["readOnlyRootFilesystem"] = json!(false),
        ];
        for change in changes {
            step(change).unwrap_err();
        }
    }
}
