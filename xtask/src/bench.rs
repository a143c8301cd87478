//! `bench`: figures. The measuring program is built for release and runs as root; it is no part of the test suites.

use std::process::ExitCode;

use anyhow::{Result, bail};
use proxy_tests::extent::Extent;

use crate::{build, build_ebpf, command, setup};

pub fn run(extent: &Extent) -> Result<ExitCode> {
    setup::tools(&setup::WORLD)?;
    setup::tools(&setup::NETNS_SUITES)?;
    let object = build_ebpf::object()?;
    command::check(command::cargo().args([
        "build",
        "--locked",
        "--release",
        "-p",
        "proxy-tests",
        "--features",
        "bench",
        "--bin",
        "bench",
    ]))?;
    let target = command::target_dir();
    let mut bench = command::as_root(target.join("release/bench"), "measuring in network namespaces")?;
    bench.env("PROXY_EBPF_OBJECT", &object).arg("--out").arg(target.join("bench"));
    bench.args(extent.options());
    if extent.wants("c3") || extent.wants("c11") {
        bench.arg("--agent").arg(build::agent()?);
    }
    if extent.wants("c11") {
        match setup::kube_proxy() {
            Ok(program) => drop(bench.arg("--kube-proxy").arg(program)),
            // The measuring program says what that leaves out.
            Err(error) => eprintln!("setup: no kube-proxy to measure: {error:#}"),
        }
    }
    match bench.status()?.code() {
        // 1: a bar was missed. That is what measuring is for, and no failure of this command.
        Some(0 | 1) => Ok(ExitCode::SUCCESS),
        _ => bail!("`{}` failed", command::display(&bench)),
    }
}
