//! The real binary: exit status, where output goes, readers that leave.

use std::{
    io::Read,
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
    for verb in ["run", "services", "backends", "connections", "counters", "status", "check", "cleanup"] {
        assert!(out.contains(&format!("\n  {verb} ")), "{verb} is missing: {out}");
    }
    for args in
        [&["frobnicate"][..], &["run", "--proxy-mode", "ipvs"], &["services", "--vip", "x"], &["man", "frobnicate"]]
    {
        let (code, out, err) = run(args);
        assert_eq!((code, out.as_str()), (2, ""), "{args:?}: {err}");
        assert!(err.starts_with("error: "), "{err}");
    }
    assert!(run(&["run", "--proxy-mode", "ipvs"]).2.contains("ipvs is not available in this version"));
}

#[test]
fn what_is_not_there_cannot_be_read() {
    let dir = tempfile::tempdir().unwrap();
    let absent = dir.path().join("pins");
    let absent = absent.to_str().unwrap();
    for verb in ["services", "backends", "connections", "counters"] {
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
        "--source",
        dir.path().to_str().unwrap(),
        "--bpffs",
        pins.to_str().unwrap(),
        "--log-level",
        "off",
    ]);
    assert_eq!((code, out.as_str()), (3, ""), "{err}");
    assert!(err.contains("error: the eBPF dataplane cannot be had on this node"), "{err}");
    let (code, _, err) = run(&["run", "--log-level", "proxy_agent=loud"]);
    assert_eq!(code, 2, "{err}");
}

#[test]
fn a_reader_that_leaves_is_no_error() {
    let mut child = agent(&["completions", "bash"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let mut err = String::new();
    child.stderr.take().unwrap().read_to_string(&mut err).unwrap();
    assert_eq!((child.wait().unwrap().code(), err.as_str()), (Some(0), ""));
}
