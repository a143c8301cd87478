//! The images that a cluster starts containers from, made of what was built and of programs of this machine.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

use super::{Programs, image::Image};

/// Under the names that upstream's specs ask for, at the release of `tests/cluster/go.mod` (test/utils/image/manifest.go).
pub(super) const PAUSE: &str = "registry.k8s.io/pause:3.10.2";
pub(super) const AGNHOST: &str = "registry.k8s.io/e2e-test-images/agnhost:2.63.0";
pub(super) const INVALID: &str = "registry.k8s.io/e2e-test-images/regression-issue-74839:1.4";
const BUSYBOX: &str = "registry.k8s.io/e2e-test-images/busybox:1.37.0-1";
/// Whatever answers by HTTP will do.
const NGINX: &str = "registry.k8s.io/e2e-test-images/nginx:1.15-4";
/// As `manifests/base` has it.
pub(super) const AGENT: &str = "proxy-agent:0.1.0";
/// What the suites run in their pods.
pub(super) const TESTPOD: &str = "testpod:e2e";
pub(super) const KUBE_PROXY: &str = "kube-proxy:e2e";

/// What upstream's specs call: what agnhost's Dockerfile installs, and what is in its base, which is busybox's.
const TOOLS: [&str; 41] = [
    "[", "bash", "cat", "chmod", "curl", "cut", "date", "dd", "dig", "echo", "env", "false", "grep", "head",
    "hostname", "id", "ip", "kill", "ls", "mkdir", "nc", "nslookup", "printf", "ps", "rm", "sed", "seq", "sh", "sleep",
    "sort", "ss", "tail", "test", "timeout", "touch", "tr", "true", "uname", "wc", "wget", "xargs",
];

const IPTABLES: [&str; 6] =
    ["iptables", "iptables-save", "iptables-restore", "ip6tables", "ip6tables-save", "ip6tables-restore"];

/// Packs all that are not packed yet; returns the archives.
pub(super) fn make(programs: &Programs, dir: &Path) -> Result<Vec<PathBuf>> {
    Ok(vec![
        alone(PAUSE, &programs.pause, "/pause", &[], dir)?,
        agnhost(&programs.agnhost, dir)?,
        alone(NGINX, &programs.agnhost, "/agnhost", &["netexec", "--http-port=80"], dir)?,
        busybox(dir)?,
        alone(INVALID, &programs.invalid, "/regression-issue-74839", &[], dir)?,
        alone(TESTPOD, &programs.testpod, "/testpod", &[], dir)?,
        kube_proxy(&programs.kube_proxy, dir)?,
        match &programs.agent_image {
            Some(archive) => archive.clone(),
            None => alone(AGENT, &programs.agent, "/usr/bin/proxy-agent", &[], dir)?,
        },
    ])
}

/// A program, and nothing else.
fn alone(name: &str, program: &Path, at: &str, arguments: &[&str], dir: &Path) -> Result<PathBuf> {
    let mut image = Image::new(name, dir)?;
    image.program(program, at)?;
    image.pack(&[at], arguments)
}

fn agnhost(program: &Path, dir: &Path) -> Result<PathBuf> {
    let mut image = Image::new(AGNHOST, dir)?;
    image.link("bin", "usr/bin")?;
    image.program(program, "agnhost")?;
    image.link("agnhost-2", "agnhost")?;
    image.directory("uploads")?;
    image.programs(&TOOLS)?;
    image.pack(&["/agnhost"], &["pause"])
}

fn busybox(dir: &Path) -> Result<PathBuf> {
    let mut image = Image::new(BUSYBOX, dir)?;
    image.link("bin", "usr/bin")?;
    image.programs(&TOOLS)?;
    image.pack(&["sh"], &[])
}

fn kube_proxy(program: &Path, dir: &Path) -> Result<PathBuf> {
    let mut image = Image::new(KUBE_PROXY, dir)?;
    image.link("bin", "usr/bin")?;
    image.program(program, "usr/bin/kube-proxy")?;
    image.programs(&IPTABLES)?;
    image.programs(&["nft", "ipset", "conntrack", "sh"])?;
    // iptables finds these by itself.
    let (extensions, found) = ["/usr/lib/x86_64-linux-gnu/xtables", "/usr/lib/aarch64-linux-gnu/xtables"]
        .into_iter()
        .find_map(|dir| Some((dir, fs::read_dir(dir).ok()?)))
        .context("there are no extensions of iptables")?;
    for extension in found {
        let extension = extension?;
        image.program(&extension.path(), &format!("{extensions}/{}", extension.file_name().to_string_lossy()))?;
    }
    image.pack(&["/usr/bin/kube-proxy"], &[])
}
