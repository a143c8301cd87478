//! Everything that CI and people do with this repository: one verb, one file.
#![allow(unreachable_pub, reason = "a program: nothing of it is reached from outside")]

mod bench;
mod build;
mod build_ebpf;
mod command;
mod e2e;
mod image;
mod lint;
mod manifests;
mod run;
mod setup;
mod test;
mod vm;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", about, version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Start the product: against a cluster with a kubeconfig, else in a world of network namespaces on this machine
    Run(run::Args),
    /// Run the test suites and sum them up
    Test(test::Args),
    /// Run what differs between kernels on others than this one, in emulated machines
    Vm(vm::Args),
    /// Build target/release/proxy-agent with the eBPF programs inside
    Build,
    /// Build the eBPF object alone
    BuildEbpf,
    /// Formatting, clippy, docs, lint inheritance, licences
    Lint,
    /// Measure, and compare with a direct connection and with kube-proxy's kind of rules
    Bench(proxy_tests::extent::Extent),
    /// Build a container image of the agent, without a registry
    Image(image::Args),
    /// Make a whole Kubernetes cluster on this machine and run upstream's specs against the agent in it
    E2e(e2e::Args),
    /// Render the manifests and the chart, and check them
    Manifests(manifests::Args),
}

fn main() -> ExitCode {
    let Cli { verb } = Cli::parse();
    let outcome = match verb {
        Verb::Run(args) => run::run(args),
        Verb::Test(args) => test::run(&args),
        Verb::Vm(args) => vm::run(&args),
        Verb::Build => build::run(),
        Verb::BuildEbpf => build_ebpf::run(),
        Verb::Lint => lint::run(),
        Verb::Bench(args) => bench::run(&args),
        Verb::Image(args) => image::run(&args),
        Verb::E2e(args) => e2e::run(&args),
        Verb::Manifests(args) => manifests::run(&args),
    };
    match outcome {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(3)
        }
    }
}
