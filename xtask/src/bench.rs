//! `bench`: figures. The measuring program is built for release and runs as root; it is no part of the test suites.

use std::process::ExitCode;

use anyhow::{Result, bail};

use crate::{build, build_ebpf, command};

#[derive(clap::Args)]
pub struct Args {
    /// Under a minute: few rounds, small rulesets, wide spread
    #[arg(long, conflicts_with = "full")]
    smoke: bool,
    /// A quarter of an hour: what docs/bench.md quotes (the default)
    #[arg(long)]
    full: bool,
    /// Only these (d1, d2, d3, d5, d6, d9, c3)
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
}

pub fn run(args: Args) -> Result<ExitCode> {
    let Args { smoke, full: _, only } = args;
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
    if smoke {
        bench.arg("--smoke");
    }
    if only.is_empty() || only.iter().any(|id| id == "c3") {
        bench.arg("--agent").arg(build::agent()?);
    }
    if !only.is_empty() {
        bench.arg("--only").arg(only.join(","));
    }
    match bench.status()?.code() {
        // 1: a bar was missed. That is what measuring is for, and no failure of this command.
        Some(0 | 1) => Ok(ExitCode::SUCCESS),
        _ => bail!("`{}` failed", command::display(&bench)),
    }
}
