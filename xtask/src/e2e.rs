//! `e2e`: a whole Kubernetes cluster on this machine, and upstream's specs run against the agent in it.
//!
//! The agent is what its manifests make of it: a DaemonSet, in an image, with their privileges. `up` leaves out the specs and waits.

use std::{os::unix::process::CommandExt as _, path::PathBuf, process::ExitCode, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use proxy_tests::{
    apiserver,
    cluster::{
        self, Cluster, Programs, Proxy,
        specs::{self, Group, Run, State, Table},
    },
    golang::{self, Goal},
    observed::Bar,
    world::World,
};

use crate::{command, image, setup};

/// The archive of the image of `PROXY_AGENT_BIN`: set for the second start, as root.
const IMAGE: &str = "PROXY_AGENT_IMAGE";

#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    verb: Option<Verb>,

    /// How many nodes
    #[arg(long, global = true, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=9))]
    nodes: u8,

    /// Who serves Services
    #[arg(long, global = true, value_enum, default_value_t = Choice::Agent)]
    proxy: Choice,

    /// Groups of upstream's specs [default: all of services, conntrack, distribution, slices, granular]
    #[arg(long, value_name = "GROUP", value_delimiter = ',')]
    groups: Vec<String>,

    /// Specs by a regular expression over their names instead
    #[arg(long, value_name = "REGEX", conflicts_with = "groups")]
    focus: Option<String>,

    /// So many specs at a time
    #[arg(long, value_name = "N", default_value_t = 4)]
    workers: u32,

    /// End the specs after so many minutes
    #[arg(long, value_name = "MINUTES", default_value_t = 60)]
    limit: u64,
}

#[derive(clap::Subcommand)]
enum Verb {
    /// Make the cluster, say how to use it, and wait for Ctrl-C
    Up,
    /// kube-proxy, then the agent, then kube-proxy again, with connections observed throughout
    Takeover,
    /// Remove what a cluster left whose owner was killed
    Down,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Choice {
    Agent,
    KubeProxy,
    /// Nobody yet (`up` alone)
    None,
}

impl Choice {
    fn proxy(self) -> Option<Proxy> {
        match self {
            Self::Agent => Some(Proxy::Agent),
            Self::KubeProxy => Some(Proxy::KubeProxy),
            Self::None => None,
        }
    }
}

pub fn run(args: &Args) -> Result<ExitCode> {
    if matches!(args.verb, Some(Verb::Down)) {
        if !command::is_root() {
            return again_as_root(None);
        }
        cluster::sweep()?;
        return Ok(ExitCode::SUCCESS);
    }
    let programs = programs()?;
    if !command::is_root() {
        return again_as_root(Some(&programs));
    }
    if let Some(reason) = World::unavailable().or_else(cluster::unavailable) {
        bail!("no cluster can be made here: {reason}");
    }
    match args.verb {
        Some(Verb::Up) => up(&programs, args),
        Some(Verb::Takeover) => take_over(&programs, args.nodes),
        Some(Verb::Down) | None => specs(&programs, args),
    }
}

/// Ctrl-C takes it down.
fn cluster(programs: &Programs, nodes: u8) -> Result<Cluster> {
    // Before any thread is started.
    cluster::cleanup_on_signals()?;
    Cluster::up(programs, nodes)
}

fn install(cluster: &Cluster, proxy: Proxy) -> Result<()> {
    cluster.install(proxy)?;
    eprintln!("e2e: {} serves on every node", proxy.name());
    Ok(())
}

fn up(programs: &Programs, args: &Args) -> Result<ExitCode> {
    let cluster = cluster(programs, args.nodes)?;
    if let Some(proxy) = args.proxy.proxy() {
        install(&cluster, proxy)?;
    }
    print!("{}", cluster.by_hand());
    println!("Ctrl-C takes it down.");
    loop {
        std::thread::park();
    }
}

fn take_over(programs: &Programs, nodes: u8) -> Result<ExitCode> {
    // One is drained.
    ensure!(nodes >= 3, "this takes three nodes");
    let cluster = cluster(programs, nodes)?;
    install(&cluster, Proxy::KubeProxy)?;
    let report = cluster.take_over(&programs.agent, &programs.testpod)?;
    print!("{report}");
    let faults = report.faults(Bar::Cluster);
    faults.iter().for_each(|fault| println!("fault: {fault}"));
    Ok(if faults.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn specs(programs: &Programs, args: &Args) -> Result<ExitCode> {
    let proxy = args.proxy.proxy().context("without a proxy no spec passes")?;
    let specs = specs::Programs { specs: build(golang::SPECS)?, ginkgo: build(golang::GINKGO)? };
    let cluster = cluster(programs, args.nodes)?;
    install(&cluster, proxy)?;
    let table = run_specs(&cluster, &specs, args, proxy)?;
    print!("{table}");
    let failed = table.count(State::Failed) > 0 || table.count(State::Passed) == 0;
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn run_specs(cluster: &Cluster, programs: &specs::Programs, args: &Args, proxy: Proxy) -> Result<Table> {
    let focus = match &args.focus {
        Some(focus) => focus.clone(),
        None => Group::focus(&args.groups)?,
    };
    let run = Run {
        focus,
        workers: args.workers,
        limit: Duration::from_secs(60 * args.limit),
        out: command::target_dir().join("e2e").join(proxy.name()),
    };
    eprintln!("e2e: specs; their output goes to {}", run.out.display());
    cluster.specs(programs, &run)
}

fn programs() -> Result<Programs> {
    setup::cluster()?;
    let (agent, agent_image) = match std::env::var_os("PROXY_AGENT_BIN") {
        Some(agent) => (PathBuf::from(agent), std::env::var_os(IMAGE).map(PathBuf::from)),
        None => {
            let (agent, image) = image::built()?;
            (agent, Some(image))
        }
    };
    let testpod = match std::env::var_os("PROXY_TESTPOD_BIN") {
        Some(testpod) => PathBuf::from(testpod),
        None => {
            command::check(command::cargo().args([
                "build",
                "--locked",
                "--quiet",
                "-p",
                "proxy-tests",
                "--bin",
                "testpod",
            ]))?;
            command::target_dir().join("debug/testpod")
        }
    };
    // What looks for it has no other Go than that on PATH.
    let _apiserver = build(golang::APISERVER)?;
    Ok(Programs {
        servers: apiserver::Programs::find()?,
        controller_manager: build(golang::CONTROLLER_MANAGER)?,
        scheduler: build(golang::SCHEDULER)?,
        kubelet: build(golang::KUBELET)?,
        pause: build(golang::PAUSE)?,
        agnhost: build(golang::AGNHOST)?,
        invalid: build(golang::INVALID)?,
        kube_proxy: setup::kube_proxy()?,
        agent,
        agent_image,
        testpod,
    })
}

fn build(goal: Goal) -> Result<PathBuf> {
    goal.build(setup::go_program)
}

fn again_as_root(programs: Option<&Programs>) -> Result<ExitCode> {
    let own = std::env::current_exe().context("find the running program")?;
    let mut sudo = command::as_root("env", "a cluster of namespaces")?;
    if let Some(programs) = programs {
        sudo.arg(format!("PROXY_AGENT_BIN={}", programs.agent.display()));
        if let Some(image) = &programs.agent_image {
            sudo.arg(format!("{IMAGE}={}", image.display()));
        }
        sudo.arg(format!("PROXY_TESTPOD_BIN={}", programs.testpod.display()));
    }
    sudo.arg(own).args(std::env::args_os().skip(1));
    // Replaces this process: Ctrl-C and the exit status are the other one's.
    Err(sudo.exec()).context("start as root")
}
