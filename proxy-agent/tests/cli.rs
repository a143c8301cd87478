//! The real binary: exit status, where output goes, readers that leave.

use std::{
    io::Read,
    os::unix::{
        fs::{MetadataExt, PermissionsExt},
        process::CommandExt,
    },
    process::{Command, Output, Stdio},
};

fn agent(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_proxy-agent"));
    command.args(args).env_remove("PROXY_AGENT_BPFFS").env_remove("PROXY_AGENT_SOURCE").env_remove("RUST_LOG");
    command
}

fn run(args: &[&str]) -> (i32, String, String) {
    let Output { status, stdout, stderr } = agent(args).output().unwrap();
    (status.code().unwrap(), String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap())
}

#[test]
fn help_is_done_and_nonsense_is_usage() {
    let (code, out, err) = run(&["--help"]);
    assert_eq!((code, err.as_str()), (0, ""));
    for verb in
        ["run", "config", "services", "backends", "connections", "affinity", "counters", "status", "check", "cleanup"]
    {
        assert!(out.contains(&format!("\n  {verb} ")), "{verb} is missing: {out}");
    }
    for args in [
        &["frobnicate"][..],
        &["run", "--proxy-mode", "userspace"],
        &["services", "--vip", "x"],
        &["man", "frobnicate"],
    ] {
        let (code, out, err) = run(args);
        assert_eq!((code, out.as_str()), (2, ""), "{args:?}: {err}");
        assert!(err.starts_with("error: "), "{err}");
    }
    assert!(run(&["run", "--proxy-mode", "userspace"]).2.contains("auto, ebpf, nftables, iptables and ipvs"));
}

/// Every option that sizes maps names all of them: whoever reads `answered_v4 is full` looks for it here.
#[test]
fn help_says_which_maps_an_option_sizes() {
    let (_, out, _) = run(&["run", "--help"]);
    let text = out.split("--map-connections").nth(1).unwrap().split("--map-half-open").next().unwrap();
    assert!(text.contains("stablished") && text.contains("nswered") && text.contains("half as many"), "{text}");
}

#[test]
fn what_is_not_there_cannot_be_read() {
    // `cleanup` is refused where an agent runs, and others here start some.
    if rustix::process::geteuid().is_root() {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
    }
    let dir = tempfile::tempdir().unwrap();
    let absent = dir.path().join("pins");
    let absent = absent.to_str().unwrap();
    for verb in ["services", "backends", "connections", "affinity", "counters"] {
        let (code, out, err) = run(&[verb, "--bpffs", absent]);
        assert_eq!((code, out.as_str()), (3, ""), "{verb}");
        assert!(err.contains(absent) && err.contains("--bpffs"), "{err}");
    }
    let (code, out, _) = run(&["status", "--bpffs", absent]);
    assert_eq!(code, 0);
    assert!(out.contains("not running") && out.contains("nothing is pinned here"), "{out}");
    let (code, out, err) = run(&["cleanup", "--bpffs", absent]);
    assert_eq!(code, 0, "{err}");
    assert!(out.contains("nothing is pinned here"), "{out}");
}

#[test]
fn an_agent_that_cannot_start_says_why_on_stderr() {
    let dir = tempfile::tempdir().unwrap();
    let pins = dir.path().join("pins");
    let (code, out, err) = run(&[
        "run",
        "--proxy-mode",
        "ebpf",
        "--source",
        dir.path().to_str().unwrap(),
        "--bpffs",
        pins.to_str().unwrap(),
        "--log-level",
        "off",
    ]);
    assert_eq!((code, out.as_str()), (3, ""), "{err}");
    let says_why = ["error: the ebpf dataplane cannot be had on this node", "error: not allowed to run the datapath"];
    assert!(says_why.iter().any(|why| err.contains(why)), "{err}");
    let (code, _, err) = run(&["run", "--log-level", "proxy_agent=loud"]);
    assert_eq!(code, 2, "{err}");
}

/// An unprivileged start says what it lacks, in one line, and leaves nothing behind that would be in root's way.
#[test]
fn an_agent_without_privileges_makes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    // Root starts it as nobody; anybody else is unprivileged already.
    let own = dir.path().metadata().unwrap().uid();
    let uid = if own == 0 { 65534 } else { own };
    // A copy, for the build directory may be closed to others. By a process of its own: what this one has open for writing, a child
    // that another test starts meanwhile holds, too, and the kernel runs no file that is.
    let binary = dir.path().join("proxy-agent");
    let copied = Command::new("cp").arg(env!("CARGO_BIN_EXE_proxy-agent")).arg(&binary).status().unwrap();
    assert!(copied.success());
    let open = dir.path().join("bpffs");
    std::fs::create_dir(&open).unwrap();
    for (path, mode) in [(dir.path(), 0o755), (&open, 0o1777)] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }
    let pins = open.join("proxy-agent");
    let mut command = Command::new(&binary);
    command
        .args(["run", "--proxy-mode", "ebpf", "--log-level", "off", "--source"])
        .arg(&open)
        .arg("--bpffs")
        .arg(&pins)
        .current_dir("/");
    if own == 0 {
        command.uid(uid).gid(uid);
    }
    let Output { status, stderr, .. } = command.output().unwrap();
    let err = String::from_utf8(stderr).unwrap();
    assert_eq!(status.code(), Some(3), "{err}");
    assert!(err.contains("CAP_BPF") && err.contains("CAP_NET_ADMIN"), "{err}");
    // The bpffs here is of whoever runs the test.
    assert_eq!(err.contains(&format!("uid 0 (it is {uid}")), own == 0, "{err}");
    assert!(err.contains("run as root") && err.lines().count() == 1, "{err}");
    assert!(!pins.exists());
}

#[test]
fn a_reader_that_leaves_is_no_error() {
    let mut child = agent(&["completions", "bash"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let mut err = String::new();
    child.stderr.take().unwrap().read_to_string(&mut err).unwrap();
    assert_eq!((child.wait().unwrap().code(), err.as_str()), (Some(0), ""));
}

fn write(dir: &tempfile::TempDir, text: &str) -> String {
    let path = dir.path().join("agent.conf");
    std::fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn a_configuration_is_printed_and_read_again() {
    let dir = tempfile::tempdir().unwrap();
    let text = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nmode: nftables\n---\n\
                apiVersion: proxy-agent/v1alpha1\nkind: ProxyAgentConfiguration\nsocketLb: node\n";
    let file = write(&dir, text);
    let (code, table, err) = run(&["config", "--config", &file, "--xdp=generic"]);
    assert_eq!(code, 0, "{err}");
    for (field, value, from) in
        [("mode", "nftables", ":3"), ("socketLb", "node", ":7"), ("xdp", "generic", "--xdp"), ("bpffs", "/", "default")]
    {
        let row = table.lines().find(|row| row.starts_with(&format!("{field} "))).unwrap();
        assert!(row.contains(value) && row.ends_with(from), "{row}");
    }
    let (_, yaml, _) = run(&["config", "--config", &file, "--xdp=generic", "-o", "yaml"]);
    let written = dir.path().join("written.conf");
    let written = written.to_str().unwrap();
    let (code, out, err) = run(&["run", "--config", &file, "--xdp=generic", "--write-config-to", written]);
    assert_eq!((code, out.as_str(), err.as_str()), (0, "", ""));
    assert_eq!(std::fs::read_to_string(written).unwrap(), yaml);
    assert_eq!(run(&["config", "--config", written, "-o", "yaml"]), (0, yaml, String::new()));
    let (_, json, _) = run(&["config", "--config", written, "-o", "json"]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!((&json["items"][0]["mode"], &json["items"][1]["xdp"]), (&"nftables".into(), &"generic".into()));
}

#[test]
fn a_configuration_that_makes_no_sense_is_usage() {
    let dir = tempfile::tempdir().unwrap();
    let file = write(&dir, "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nmoed: ipvs\n");
    for verb in ["run", "config"] {
        let (code, out, err) = run(&[verb, "--config", &file]);
        assert_eq!((code, out.as_str()), (2, ""), "{err}");
        assert!(err.contains(&format!("{file}:3: moed: ")) && err.contains("is mode meant?"), "{err}");
    }
    let (code, _, err) = run(&["run", "--config", "/nonexistent/file"]);
    assert_eq!(code, 3, "{err}");
    assert!(err.contains("/nonexistent/file"), "{err}");
}

#[test]
fn under_kube_proxys_name_it_is_run() {
    for (args, words) in [
        (&["--version"][..], "proxy-agent 0"),
        (&["--version=raw"], "proxy-agent 0"),
        (&["--help"], "--iptables-masquerade-bit"),
        (&["config", "--hostname_override=n"], "hostnameOverride"),
    ] {
        let Output { status, stdout, .. } = agent(args).arg0("/usr/local/bin/kube-proxy").output().unwrap();
        let out = String::from_utf8(stdout).unwrap();
        assert!(status.success() && out.contains(words), "{args:?}: {out}");
    }
}
