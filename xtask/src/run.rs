//! `run`: the product, started.
//!
//! With a kubeconfig: against that cluster, from this host. Without one: in a world of network namespaces on this machine (two
//! nodes with pods and the agent, a client outside), from the ordinary Kubernetes objects in `examples/`.

mod ask;
mod expected;

use std::{
    collections::BTreeMap,
    ffi::{OsStr, OsString},
    fmt::Write as _,
    io::Write as _,
    net::{Ipv4Addr, SocketAddr},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use proxy_tests::world::{
    AgentOptions, Programs, SocketLb, Spec, Topology, World, cleanup_on_signals, set_exit_status, wait_if_ending,
};

use crate::{build, command, setup};

#[derive(clap::Args)]
pub struct Args {
    /// Run against the cluster of this kubeconfig, from this host [default: KUBECONFIG, unless an option of the world is given]
    #[arg(long, value_name = "FILE", conflicts_with_all = ["once", "output", "topology", "socket_lb", "tries", "source"])]
    kubeconfig: Option<PathBuf>,

    /// Ask every frontend, print how often each backend answered, clean up; exit 0 only if all answered and shared fairly
    #[arg(long)]
    once: bool,

    /// What to print what was asked and answered as [default: table]
    #[arg(long, short, value_enum)]
    output: Option<Output>,

    /// How pods are attached to the nodes of the world [default: routed]
    #[arg(long, value_enum)]
    topology: Option<Shape>,

    /// Whose sockets are translated at connect time; the others go packet by packet [default: all]
    #[arg(long, value_enum)]
    socket_lb: Option<Sockets>,

    /// How often each frontend is asked from each place [default: 60]
    #[arg(long, value_name = "N")]
    tries: Option<u32>,

    /// The objects to start from: all that `proxy-agent run --source` reads [default: the repository's examples]
    #[arg(long, value_name = "DIR")]
    source: Option<PathBuf>,

    /// Further options of `proxy-agent run`
    #[arg(last = true, value_name = "OPTION")]
    agent: Vec<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Output {
    Table,
    Json,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Shape {
    Routed,
    Bridge,
    Vxlan,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Sockets {
    All,
    Node,
    /// The node's own processes are not served
    Off,
}

impl Args {
    /// Something was asked for that only a world has.
    fn wants_world(&self) -> bool {
        let Self { kubeconfig: _, once, output, topology, socket_lb, tries, source, agent: _ } = self;
        *once || output.is_some() || topology.is_some() || socket_lb.is_some() || tries.is_some() || source.is_some()
    }

    fn output(&self) -> Output {
        self.output.unwrap_or(Output::Table)
    }

    fn topology(&self) -> Topology {
        match self.topology.unwrap_or(Shape::Routed) {
            Shape::Routed => Topology::Routed,
            Shape::Bridge => Topology::Bridge,
            Shape::Vxlan => Topology::Vxlan,
        }
    }

    fn socket_lb(&self) -> SocketLb {
        match self.socket_lb.unwrap_or(Sockets::All) {
            Sockets::All => SocketLb::All,
            Sockets::Node => SocketLb::Node,
            Sockets::Off => SocketLb::Off,
        }
    }
}

/// How often each frontend is asked from each place.
const TRIES: u32 = 60;
/// Set for the second start, as root, with what the first one built.
const BUILT: &str = "PROXY_XTASK_BUILT";
/// Set for it, too: the directory that the caller's relative names start from.
const CALLED_IN: &str = "PROXY_XTASK_CALLED_IN";

pub fn run(args: Args) -> Result<ExitCode> {
    if let Some(kubeconfig) = &args.kubeconfig {
        return against_cluster(kubeconfig, &args.agent);
    }
    let environment = std::env::var_os("KUBECONFIG").filter(|files| !files.is_empty() && !args.wants_world());
    if let Some(files) = environment.filter(|_| std::env::var_os(BUILT).is_none()) {
        return against_cluster_of_environment(&files, &args.agent);
    }
    let programs = programs()?;
    if !command::is_root() {
        return again_as_root(&programs);
    }
    if let Some(reason) = World::unavailable() {
        anyhow::bail!("no world can be made here: {reason}");
    }
    // Before any thread is started: Ctrl-C takes the world down.
    cleanup_on_signals()?;
    World::sweep()?;
    in_a_world(&args, programs)
}

/// Builds what runs in a world, unless `PROXY_AGENT_BIN` names it: the start before `sudo` does, and so may the caller.
fn programs() -> Result<Programs> {
    setup::tools(&setup::WORLD)?;
    setup::tools(&setup::NETNS_SUITES[..1])?;
    if std::env::var_os("PROXY_AGENT_BIN").is_some() {
        return Programs::find();
    }
    let agent = build::agent()?;
    command::check(command::cargo().args([
        "build",
        "--locked",
        "--quiet",
        "--package",
        "proxy-tests",
        "--bin",
        "testpod",
    ]))?;
    Ok(Programs { agent, testpod: command::target_dir().join("debug/testpod") })
}

fn again_as_root(programs: &Programs) -> Result<ExitCode> {
    let own = std::env::current_exe().context("find the running program")?;
    let mut sudo = command::as_root("env", "a world of network namespaces")?;
    let mut called_in = OsString::from(format!("{CALLED_IN}="));
    called_in.push(std::env::current_dir().context("the current directory is gone")?);
    sudo.arg(called_in)
        .arg(format!("{BUILT}=1"))
        .arg(format!("PROXY_AGENT_BIN={}", programs.agent.display()))
        .arg(format!("PROXY_TESTPOD_BIN={}", programs.testpod.display()))
        .arg(own)
        .args(std::env::args_os().skip(1));
    // Replaces this process: Ctrl-C and the exit status are the other one's.
    Err(sudo.exec()).context("start as root")
}

fn against_cluster(kubeconfig: &Path, options: &[String]) -> Result<ExitCode> {
    let agent = build::agent()?;
    let kubeconfig = kubeconfig.canonicalize().with_context(|| format!("no kubeconfig at {}", kubeconfig.display()))?;
    eprintln!("run: {} run --kubeconfig {} {}", agent.display(), kubeconfig.display(), options.join(" "));
    let mut agent = command::as_root(agent, "programming this host's datapath")?;
    agent.arg("run").arg("--kubeconfig").arg(kubeconfig).args(options);
    Err(agent.exec()).context("start the agent")
}

/// `files` may be a list; the agent puts it together.
fn against_cluster_of_environment(files: &OsStr, options: &[String]) -> Result<ExitCode> {
    eprintln!(
        "run: AGAINST THE CLUSTER of KUBECONFIG={}, programming this host; for a world on this machine unset KUBECONFIG or say \
         `--source examples`",
        files.display()
    );
    let agent = build::agent()?;
    let setting = setting(files)?;
    let mut command = command::as_root("env", "programming this host's datapath")?;
    command.arg(setting).arg(agent).arg("run").args(options);
    Err(command.exec()).context("start the agent")
}

/// The agent is started in another directory: relative names of the list are made absolute, empty ones left out as kubectl does.
fn setting(files: &OsStr) -> Result<OsString> {
    let files = std::env::split_paths(files).filter(|file| !file.as_os_str().is_empty()).map(std::path::absolute);
    let files = files.collect::<std::io::Result<Vec<_>>>().context("the current directory is gone")?;
    let mut setting = OsString::from("KUBECONFIG=");
    setting.push(std::env::join_paths(files).context("KUBECONFIG")?);
    Ok(setting)
}

/// The pods that `examples/` speaks of, in the order that gives them their addresses.
fn pods() -> Vec<Vec<String>> {
    [&["client", "web-1", "dns-1", "store-1"], &["web-2", "dns-2", "store-2", "store-3"]]
        .map(|names| names.map(str::to_owned).to_vec())
        .to_vec()
}

fn in_a_world(args: &Args, programs: Programs) -> Result<ExitCode> {
    let source = objects(args.source.as_deref())?;
    say(args, &format!("making two nodes with pods ({}) and a client outside", args.topology().name()));
    let spec = Spec { nodes: pods(), ..Spec::two_nodes(args.topology()) };
    let mut world = World::new(&spec, programs)?;
    say(args, &format!("starting proxy-agent on both, objects from {}", source.display()));
    world.start_agents(&AgentOptions {
        source: Some(source.clone()),
        extra: args.agent.clone(),
        ..AgentOptions::new(args.socket_lb())
    })?;
    let node = &world.node(1).place;
    let own = [node.v4.into(), node.v6.into(), Ipv4Addr::LOCALHOST.into()];
    // What cannot be asked is a problem of the report: the world is there all the same.
    let plan =
        expected::plan(&world.programs().agent, &source, &node.name, &own, &args.agent).unwrap_or_else(|error| {
            let why = BTreeMap::from([("nothing is asked".to_owned(), vec![format!("{error:#}")])]);
            expected::Plan { frontends: Vec::new(), problems: why }
        });
    let node_is_served = args.socket_lb() != SocketLb::Off;
    let places = if node_is_served { "a pod, a node and outside" } else { "a pod and outside" };
    say(args, &format!("asking {} frontends from {places}", plan.frontends.len()));
    let mut report = ask::all(&world, &plan, node_is_served, args.tries.unwrap_or(TRIES))?;
    if args.source.is_none() && args.agent.is_empty() {
        report.requires_every_kind();
    }
    match args.output() {
        Output::Table => print!("{}", report.table()),
        Output::Json => println!("{}", serde_json::to_string_pretty(&report)?),
    }
    if args.once {
        drop(world);
        return Ok(if report.ok { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    }
    let next = what_next(&world, &source, &plan);
    match args.output() {
        Output::Table => println!("{next}"),
        // What reads stdout wants the report alone.
        Output::Json => eprintln!("{next}"),
    }
    std::io::stdout().flush()?;
    // Ctrl-C is how this ends: the signal removes the world.
    set_exit_status(0);
    loop {
        std::thread::sleep(Duration::from_secs(1));
        for node in &world.nodes {
            if let Some(log) = node.agent_ended() {
                wait_if_ending();
                eprintln!("the agent on {} has ended; what it programmed goes on serving\n{log}", node.place.name);
                return Ok(ExitCode::from(3));
            }
        }
    }
}

/// The directory of objects, by its full name: the agents start elsewhere.
fn objects(given: Option<&Path>) -> Result<PathBuf> {
    let directory = match given {
        None => command::root().join("examples"),
        Some(given) => {
            let called_in = std::env::var_os(CALLED_IN).map_or_else(std::env::current_dir, |dir| Ok(dir.into()));
            called_in.context("the current directory is gone")?.join(given)
        }
    };
    let found =
        directory.canonicalize().with_context(|| format!("no directory of objects at {}", directory.display()))?;
    ensure!(found.is_dir(), "{} is no directory: --source names one", found.display());
    Ok(found)
}

fn say(args: &Args, what: &str) {
    if args.output() == Output::Table {
        println!("run: {what}");
    }
}

fn what_next(world: &World, source: &Path, plan: &expected::Plan) -> String {
    let programs = world.programs();
    let (agent, testpod) = (programs.agent.display(), programs.testpod.display());
    let node = world.node(1);
    let bpffs = node.bpffs.display();
    let inside = |command: &str| node.place.by_hand(command);
    let log = node.agent_log_path().map_or_else(String::new, |path| path.display().to_string());
    let mut text = String::from("\nRunning until Ctrl-C. In another terminal, as root:\n\n");
    let mut line = |what: &str, command: &str| {
        let _ = writeln!(text, "  {what:<19}{command}");
    };
    // One of each kind: a cluster's own address, and those that are for who comes from outside.
    let kinds = [("ClusterIP", "ask as a pod"), ("NodePort", "ask from outside"), ("LoadBalancer", "ask from outside")];
    for (kind, what) in kinds {
        let fits = |f: &&expected::Frontend| {
            f.kind == kind && f.protocol != "SCTP" && !f.all.is_empty() && !f.address.is_loopback()
        };
        let Some(frontend) = plan.frontends.iter().find(fits) else { continue };
        let at = SocketAddr::new(frontend.address, frontend.port);
        let transport = if frontend.protocol == "UDP" { " --transport udp" } else { "" };
        let probe = format!("{testpod} probe {at}{transport} --count 4");
        let place = if kind == "ClusterIP" { world.pod("client") } else { world.outside() };
        line(what, &place.by_hand(&probe));
    }
    line("change something", &format!("edit what is in {}, then ask again", source.display()));
    line("what is in force", &inside(&format!("{agent} services --bpffs {bpffs}")));
    line("", &inside(&format!("{agent} backends --bpffs {bpffs}")));
    line("how the agent is", &inside(&format!("{agent} status --bpffs {bpffs}")));
    line("connections", &inside(&format!("{agent} connections --bpffs {bpffs}")));
    line("its log", &format!("tail -f {log}"));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relative_directories_are_the_callers() {
        let here = std::env::current_dir().unwrap();
        assert_eq!(objects(Some(Path::new("src"))).unwrap(), here.join("src").canonicalize().unwrap());
        assert_eq!(objects(None).unwrap(), command::root().join("examples").canonicalize().unwrap());
        for wrong in ["nowhere", "Cargo.toml"] {
            assert!(objects(Some(Path::new(wrong))).is_err(), "{wrong}");
        }
    }

    #[test]
    fn relative_kubeconfigs_survive_another_directory() {
        let here = std::env::current_dir().unwrap();
        let expected = format!("KUBECONFIG={}:/b", here.join("a").display());
        assert_eq!(setting(OsStr::new("a::/b:")).unwrap(), OsString::from(expected));
    }
}
