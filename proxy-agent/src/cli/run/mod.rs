//! `run`: the agent. Opens the dataplane, wires the tasks, and waits for a reason to stop.
//!
//! ```text
//! source ──events──► sync ──status──► serve
//! node ───devices──►  │ owns the dataplane
//! ```

use std::{
    fs,
    io::Write,
    iter,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context, anyhow};
use proxy_common::counters::Reason;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{mpsc, watch},
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::{Exit, cleanup, exit::UsageError, pins::PinsArgs, shapes};
use crate::{
    config::{self, Bind, ClusterCidr, ConfigError, LocalMode, PortRange, ProxyMode},
    dataplane::{
        self, Dataplane, Ended, Fill,
        choose::{self, Choice},
        ebpf,
        ipvs::Ipvs,
        netfilter::{self, ByFamily, lock::Lock},
        select::{self, Mode},
    },
    desired::{Algorithm, Devices},
    model::{NodeFacts, Notice, SourceState, address::NodePortAddresses},
    node, plan, serve, source,
    status::{
        Status,
        requests::{EventCounts, Requests},
    },
    sync,
};

pub mod args;
pub mod effective;
mod follow;
mod given;
mod logging;
pub mod planned;
mod privileges;
mod sysctl;
mod tasks;
mod unused;

pub use args::Args;
use args::{Conntrack, Maps};
use effective::Effective;
pub use given::Given;
use tasks::Tasks;

/// Events a source may be ahead of the loop.
const EVENTS: usize = 1024;

/// What may wait to be told to users of the cluster.
const NOTICES: usize = 64;

/// What every task is started with.
struct Plan {
    source: source::Options,
    node: node::Options,
    sync: sync::Options,
    serve: serve::Options,
    dataplane: select::Options,
    /// `None`: as the mode has it.
    algorithm: Option<Algorithm>,
    /// For whoever can tell users of the cluster.
    notices: (mpsc::Receiver<Notice>, Arc<EventCounts>),
    /// Where the configuration in force is shown.
    shown: watch::Sender<Arc<serve::Shown>>,
}

pub fn execute(given: Given, out: &mut dyn Write) -> anyhow::Result<Exit> {
    if given.args.file.version.as_deref().is_some_and(|version| config::boolean(version) != Ok(false)) {
        writeln!(out, "proxy-agent {}", env!("CARGO_PKG_VERSION"))?;
        return Ok(Exit::Done);
    }
    let effective = effective::of(&given)?;
    let args = effective.args.clone();
    if let Some(path) = &args.file.write_config_to {
        let text = effective.yaml()?;
        fs::write(path, text).with_context(|| format!("writing {} (--write-config-to)", path.display()))?;
        return Ok(Exit::Done);
    }
    if args.file.cleanup {
        let metrics_bind_address = args.binds().1.map_or(Bind::Off, Bind::Socket);
        return cleanup::execute(cleanup::Args::everything(PinsArgs { bpffs: args.bpffs, metrics_bind_address }), out);
    }
    let log = logging::start(args.log.format(), args.log.filter())?;
    let init_only = args.file.init_only;
    let (conntrack, oom_score_adj) = (args.conntrack, args.oom_score_adj);
    let (profiling, asked) = (args.profiling, shapes::asked(args.proxy_mode));
    let mut plan = plan(args, effective.shown()?)?;
    plan.serve.verbosity = profiling.then(|| set_verbosity(Arc::clone(&log)));
    let set_sysctls = |mode: Mode| {
        let problems = if mode.has_pins() { Vec::new() } else { sysctl::set(&conntrack) };
        problems.iter().for_each(|problem| warn!("{problem}"));
    };
    let announce = |mode: Mode, options: &select::Options| {
        for warning in effective.warnings(named(mode)) {
            warn!("{warning}");
        }
        if let Some(notice) = effective.notice() {
            info!("{notice}");
        }
        warn_of_settings(mode.has_pins().then_some(options.ebpf.masquerade_ports));
    };
    // Where something is to be started that shows which one can run.
    let known = match asked {
        None if init_only => Some(choose::first(&plan.dataplane)?.mode),
        asked => asked,
    };
    if let Some(mode) = known {
        plan.dataplane.mode = mode;
        announce(mode, &plan.dataplane);
        let allowed = privileges::check(mode.has_pins().then_some(&plan.dataplane.ebpf.bpffs));
        allowed.map_err(|error| with_advice(error, &plan.dataplane))?;
    }
    if let (Some(mode), true) = (known, init_only) {
        // Beside an agent at work, for it is done again whenever a Pod starts: nothing here takes its lock.
        match mode {
            Mode::Ebpf => {
                let (_mounted, warning) = ebpf::mount_bpffs(&plan.dataplane.ebpf.bpffs)?;
                warning.iter().for_each(|warning| warn!("{warning}"));
            }
            Mode::Ipvs => Ipvs::initialise(&plan.dataplane.netfilter)?,
            Mode::Nftables | Mode::Iptables => {}
        }
        set_sysctls(mode);
        info!(mode = mode.name(), "done what takes more rights than to run (--init-only)");
        return Ok(Exit::Done);
    }
    if let Some(score) = oom_score_adj
        && let Err(error) = fs::write("/proc/self/oom_score_adj", score.to_string())
    {
        warn!("--oom-score-adj {score} cannot be set: {error}; lowering it takes CAP_SYS_RESOURCE");
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("starting the runtime")?;
    runtime.block_on(check_source(&effective))?;
    let (Choice { mode, reason }, opened) = {
        // The programs' own log is read by a task.
        let _inside = runtime.enter();
        // Whoever is the second here need not try what could run. The modes of netfilter take it themselves.
        match known {
            None => {
                drop(Lock::take()?);
                choose::start_first(&plan.dataplane, |options| open(options, None))?
            }
            Some(mode) => {
                let alone = mode.has_pins().then(Lock::take).transpose()?;
                let opened = open(&plan.dataplane, alone).map_err(|error| with_advice(error, &plan.dataplane))?;
                (Choice { mode, reason: "asked for".into() }, opened)
            }
        }
    };
    if known.is_none() {
        announce(mode, &plan.dataplane);
    }
    plan.run_in(mode);
    // Whoever is the second here has changed nothing.
    set_sysctls(mode);
    let configuration =
        follow::Configuration { given, current: effective, log, mode: named(mode), shown: plan.shown.clone() };
    let Opened { dataplane, _alone } = opened;
    let outcome = runtime.block_on(run(plan, reason.into(), configuration, dataplane));
    // A blocking read of the kernel for a scrape may still be under way; nobody waits for it.
    runtime.shutdown_background();
    outcome.map(|()| Exit::Done)
}

/// A dataplane that nobody else runs here.
struct Opened {
    dataplane: Box<dyn Dataplane>,
    /// The modes of netfilter take it themselves.
    _alone: Option<Lock>,
}

fn open(options: &select::Options, alone: Option<Lock>) -> anyhow::Result<Opened> {
    let alone = match alone {
        None => options.mode.has_pins().then(Lock::take).transpose()?,
        taken => taken,
    };
    let opened = select::open(options);
    let opened = opened.with_context(|| format!("the {} dataplane cannot be had on this node", options.mode.name()));
    Ok(Opened { dataplane: opened?, _alone: alone })
}

/// Where the node cannot run what was asked for, what it could run.
fn with_advice(error: anyhow::Error, options: &select::Options) -> anyhow::Error {
    match choose::instead(options.mode, options) {
        Some(advice) => anyhow!("{error:#}; {advice}"),
        None => error,
    }
}

impl Plan {
    /// What is another's in another mode than eBPF, of which it is made.
    fn run_in(&mut self, mode: Mode) {
        self.dataplane.mode = mode;
        if mode.has_pins() {
            return;
        }
        // Netfilter translates packets alone.
        (self.serve.socket_lb, self.serve.bpffs) = (None, None);
        let netfilter::Options { ended, restore_failures, .. } = &self.dataplane.netfilter;
        self.serve.probe = probe_rules(mode, Arc::clone(ended), Arc::clone(restore_failures));
        if mode == Mode::Ipvs {
            self.sync.defaults.algorithm = self.algorithm.unwrap_or(Algorithm::Scheduler);
        }
    }
}

/// From options to what each task wants; everything that can be wrong with them is found here.
fn plan(args: Args, shown: serve::Shown) -> anyhow::Result<Plan> {
    let (healthz, metrics) = args.binds();
    let Together { min_sync_period, sync_period, node_port_addresses, detection } =
        Together::of(&args).map_err(|error| UsageError(error.to_string()))?;
    let Args {
        file: _,
        kubeconfig,
        master,
        source: directory,
        hostname_override,
        // Which runs shows when it is started.
        proxy_mode: _,
        socket_lb,
        pod_annotations,
        xdp,
        devices,
        uplinks,
        algorithm,
        masquerade_all,
        netfilter,
        masquerade_ports,
        detect_local_mode: _,
        cluster_cidr: _,
        pod_bridge_interface: _,
        pod_interface_name_prefix: _,
        bind_address: _,
        nodeport_addresses: _,
        external_ips,
        feature_gates,
        cgroup_root,
        bpffs,
        periods: _,
        healthz_bind_address: _,
        metrics_bind_address: _,
        healthz_port: _,
        metrics_port: _,
        bind_address_hard_fail,
        // What logs is set up first, and by who starts all.
        profiling: _,
        conntrack,
        maps,
        log: _,
        ebpf_log_level,
        ipvs_strict_arp,
        oom_score_adj: _,
        unused: _,
    } = args;
    let ended = Arc::<Ended>::default();
    let requests = Arc::<Requests>::default();
    let node = source::node_name(hostname_override.as_deref())?;
    let input = input(directory, kubeconfig, master, Arc::clone(&requests));
    let localhost_node_ports = netfilter.iptables_localhost_nodeports.unwrap_or(true);
    let (sender, told) = mpsc::channel(NOTICES);
    let counts = Arc::<EventCounts>::default();
    // Whoever asks first is told.
    let (shown, configuration) = watch::channel(Arc::new(shown));
    let algorithm = algorithm.map(Algorithm::from);
    let dataplane = select::Options {
        mode: Mode::Ebpf,
        netfilter: netfilter::Options {
            detect_local: detection.dataplane,
            affinity_entries: maps.map_affinity,
            ended: Arc::clone(&ended),
            ipvs_strict_arp,
            ..netfilter.options(masquerade_ports)
        },
        ebpf: ebpf::Options {
            bpffs: bpffs.clone(),
            cgroup_root,
            socket_lb: socket_lb.into(),
            xdp: xdp.into(),
            detect_local: detection.dataplane,
            left_pods: pod_annotations,
            sizes: sizes(maps),
            masquerade_ports: (masquerade_ports.min, masquerade_ports.max),
            timeouts: timeouts(conntrack),
            ended: Arc::clone(&ended),
            log_level: ebpf_log_level.number(),
            ..Default::default()
        },
    };
    Ok(Plan {
        source: source::Options { node, pods: pod_annotations, input },
        node: node::Options {
            patterns: node::Pattern::all(&devices),
            detect: detection.node,
            uplinks: node::Pattern::all(&uplinks),
            xdp: ebpf::Xdp::from(xdp) != ebpf::Xdp::Off,
        },
        sync: sync::Options {
            defaults: plan::Defaults {
                algorithm: algorithm.unwrap_or(Algorithm::Random),
                masquerade_all,
                detect_local: detection.plan,
                node_port_addresses,
                localhost_node_ports,
                external_ips: external_ips && config::gates::allow_external_ips(&feature_gates.join(",")),
            },
            min_period: min_sync_period,
            resync_period: sync_period,
            ..Default::default()
        },
        serve: serve::Options {
            healthz,
            metrics,
            bind_address_hard_fail,
            sync_period,
            socket_lb: Some(socket_lb.name()),
            probe: probe(&bpffs, ended),
            bpffs: Some(bpffs),
            requests,
            notices: serve::Notices { sender, counts: Arc::clone(&counts) },
            configuration,
            verbosity: None,
        },
        dataplane,
        algorithm,
        notices: (told, counts),
        shown,
    })
}

fn input(
    directory: Option<PathBuf>,
    kubeconfig: Option<PathBuf>,
    master: Option<String>,
    requests: Arc<Requests>,
) -> source::Input {
    match directory {
        Some(directory) => source::Input::Directory(directory),
        None => {
            // Empty is unset, as for kube-proxy.
            let kubeconfig = kubeconfig.filter(|path| !path.as_os_str().is_empty());
            let server = master.filter(|server| !server.is_empty());
            source::Input::Kubernetes(source::KubernetesOptions { kubeconfig, server, requests, ..Default::default() })
        }
    }
}

/// Whether there is a source to start with.
async fn check_source(effective: &Effective) -> anyhow::Result<()> {
    let Args { source: directory, kubeconfig, master, .. } = &effective.args;
    let named = if directory.is_some() { "source" } else { "kubeconfig" };
    let input = input(directory.clone(), kubeconfig.clone(), master.clone(), Arc::default());
    source::check(&input).await.map_err(|error| effective.blame(named, error))
}

/// Whether an agent that starts with this would find what it names, as far as that can be told without starting one.
async fn could_start(effective: &Effective, running: ProxyMode) -> anyhow::Result<()> {
    check_source(effective).await?;
    let Args { proxy_mode, socket_lb, bpffs, cgroup_root, .. } = &effective.args;
    let mode = if *proxy_mode == ProxyMode::Auto { running } else { *proxy_mode };
    if mode != ProxyMode::Ebpf {
        return Ok(());
    }
    let pins = ("bpffs", ebpf::probe::bpffs(bpffs));
    let cgroup = (ebpf::SocketLb::from(*socket_lb) != ebpf::SocketLb::Off)
        .then(|| ("cgroup-root", ebpf::probe::cgroup(cgroup_root.as_deref())));
    for (long, check) in iter::once(pins).chain(cgroup) {
        let ebpf::probe::Check { name: _, ok, optional, detail, remedy } = check;
        if !ok && !optional {
            return Err(effective.blame(long, format!("{detail}; {remedy}")));
        }
    }
    Ok(())
}

/// By HTTP, in kube-proxy's numbers; it takes the place of whatever filter is in force.
fn set_verbosity(log: logging::Reload) -> serve::SetVerbosity {
    Arc::new(move |v| {
        let filter = args::Log::filter_of(v);
        log(filter).map_err(|error| format!("{error:#}"))?;
        info!(verbosity = v, filter, "set by HTTP: what is logged");
        Ok(())
    })
}

/// As it is asked for.
const fn named(mode: Mode) -> ProxyMode {
    match mode {
        Mode::Ebpf => ProxyMode::Ebpf,
        Mode::Nftables => ProxyMode::Nftables,
        Mode::Iptables => ProxyMode::Iptables,
        Mode::Ipvs => ProxyMode::Ipvs,
    }
}

/// How pods of this node are told (contract A72), for each who has a part in it.
#[derive(Default)]
struct Detection {
    plan: plan::DetectLocal,
    node: node::Detect,
    dataplane: dataplane::DetectLocal,
}

impl Detection {
    fn of(
        mode: Option<LocalMode>,
        cidrs: Option<ClusterCidr>,
        bridge: Option<String>,
        prefix: Option<String>,
    ) -> Result<Self, ConfigError> {
        let name = |name: Option<String>, mode, option| {
            name.filter(|name| !name.is_empty()).ok_or(ConfigError::NoName { mode, option })
        };
        let by_address = |plan| Self { plan, dataplane: dataplane::DetectLocal::Address, ..Self::default() };
        let by_device = |node| Self { node, ..Self::default() };
        Ok(match mode {
            None => Self::default(),
            Some(LocalMode::ClusterCidr) => {
                let ClusterCidr(cidrs) = cidrs.unwrap_or_default();
                by_address(plan::DetectLocal::Cidrs(cidrs.into_iter().collect()))
            }
            Some(LocalMode::NodeCidr) => by_address(plan::DetectLocal::NodeCidrs),
            Some(LocalMode::BridgeInterface) => {
                by_device(node::Detect::Bridge(name(bridge, "BridgeInterface", "--pod-bridge-interface")?))
            }
            Some(LocalMode::InterfaceNamePrefix) => {
                by_device(node::Detect::Prefix(name(prefix, "InterfaceNamePrefix", "--pod-interface-name-prefix")?))
            }
        })
    }
}

/// What several options say together, and what can be wrong with that (contract A144).
struct Together {
    min_sync_period: Duration,
    sync_period: Duration,
    node_port_addresses: NodePortAddresses,
    detection: Detection,
}

impl Together {
    fn of(args: &Args) -> Result<Self, ConfigError> {
        let (min_sync_period, sync_period) = args.periods.of(args.proxy_mode)?;
        // kube-proxy's `primary` is what it takes for the node's own addresses, and --bind-address says one of them (contract A125).
        let instead = args.bind_address.filter(|address| !address.is_unspecified());
        let node_port_addresses = match config::node_port_addresses(&args.nodeport_addresses.join(","))? {
            NodePortAddresses::Primary(_) => NodePortAddresses::Primary(instead),
            others => others,
        };
        let (bridge, prefix) = (args.pod_bridge_interface.clone(), args.pod_interface_name_prefix.clone());
        let detection = Detection::of(args.detect_local_mode, args.cluster_cidr.clone(), bridge, prefix)?;
        Ok(Self { min_sync_period, sync_period, node_port_addresses, detection })
    }
}

fn timeouts(conntrack: Conntrack) -> ebpf::Timeouts {
    let Conntrack {
        conntrack_tcp_timeout_established,
        conntrack_tcp_timeout_close_wait,
        conntrack_udp_timeout,
        conntrack_udp_timeout_stream,
        // Of the kernel's conntrack alone.
        conntrack_max_per_core: _,
        conntrack_min: _,
        conntrack_tcp_be_liberal: _,
    } = conntrack;
    let default = ebpf::Timeouts::default();
    // "As it is" is the default, for there is nobody else who could have set it.
    let seconds = |timeout: Option<Duration>, default| match timeout {
        None | Some(Duration::ZERO) => default,
        Some(timeout) => u32::try_from(timeout.as_secs()).unwrap_or(u32::MAX).max(1),
    };
    ebpf::Timeouts {
        tcp_established: seconds(conntrack_tcp_timeout_established, default.tcp_established),
        tcp_close_wait: seconds(conntrack_tcp_timeout_close_wait, default.tcp_close_wait),
        udp: seconds(conntrack_udp_timeout, default.udp),
        udp_stream: seconds(conntrack_udp_timeout_stream, default.udp_stream),
    }
}

fn sizes(maps: Maps) -> ebpf::Sizes {
    let Maps {
        map_frontends,
        map_slots,
        map_services,
        map_connections,
        map_half_open,
        map_datagrams,
        map_affinity,
        map_source_ranges,
    } = maps;
    ebpf::Sizes {
        frontends: map_frontends,
        slots: map_slots,
        services: map_services,
        connections: map_connections,
        half_open: map_half_open,
        datagrams: map_datagrams,
        affinity: map_affinity,
        source_ranges: map_source_ranges,
    }
}

/// Settings of the node that will hurt; `check` names more.
fn warn_of_settings(masquerade_ports: Option<(u16, u16)>) {
    let overlap = masquerade_ports
        .zip(PortRange::ephemeral())
        .and_then(|((min, max), ephemeral)| PortRange { min, max }.overlap_warning(ephemeral));
    if let Some(text) = overlap {
        warn!("{text}");
    }
    for (name, on) in ebpf::probe::forwards(Path::new(ebpf::probe::PROC_SYS)) {
        if !on {
            warn!("{name} is off: this node passes nothing from one device to another; sysctl -w {name}=1");
        }
    }
}

async fn run(
    plan: Plan,
    reason: Arc<str>,
    configuration: follow::Configuration,
    dataplane: Box<dyn Dataplane>,
) -> anyhow::Result<()> {
    let Plan { source, node, sync, serve, dataplane: _, algorithm: _, notices, shown: _ } = plan;
    let (told, counts) = notices;
    let stop = stop_signal()?;
    info!(
        version = env!("CARGO_PKG_VERSION"),
        node = source.node,
        mode = dataplane.capabilities().name,
        reason = &*reason,
        socket_lb = serve.socket_lb,
        bpffs = serve.bpffs.as_ref().map(|bpffs| tracing::field::display(bpffs.display())),
        "starting"
    );
    let starting =
        Status { mode_reason: reason, ..Status::starting(dataplane.capabilities().name, source.node.as_str().into()) };
    let (events, heard) = mpsc::channel(EVENTS);
    let (source_state, source_seen) = watch::channel(SourceState::Listing { missing: Vec::new() });
    let (devices, devices_seen) = watch::channel(Devices::new());
    let (facts, facts_seen) = watch::channel(None);
    let (status, status_seen) = watch::channel(Arc::new(starting));

    let mut tasks = Tasks::new();
    tasks.spawn("Events", source::tell(source.clone(), told, counts, tasks.token()));
    tasks.spawn("source", source::run(source, events.clone(), source_state, tasks.token()));
    tasks.spawn("node facts", node_facts(status_seen.clone(), facts, tasks.token()));
    tasks.spawn("device watcher", node::run(node, facts_seen, events, devices, tasks.token()));
    let ends = sync::Ends { events: heard, devices: devices_seen, source: source_seen, dataplane, status };
    tasks.spawn("sync", sync::run(sync, ends, tasks.token()));
    tasks.spawn("configuration file", configuration.follow(tasks.token()));
    tasks.spawn("HTTP server", serve::run(serve, status_seen, tasks.token()));
    tasks.run(stop, tasks::GRACE).await
}

/// Hands what is known of the own Node to who tells devices apart by it.
async fn node_facts(
    mut status: watch::Receiver<Arc<Status>>,
    facts: watch::Sender<Option<Arc<NodeFacts>>>,
    cancel: CancellationToken,
) -> anyhow::Result<()> {
    let follow = async {
        while status.changed().await.is_ok() {
            let now = status.borrow_and_update().node_facts.clone();
            facts.send_if_modified(|known| {
                *known != now && {
                    *known = now;
                    true
                }
            });
        }
    };
    tokio::select! {
        () = follow => {}
        () = cancel.cancelled() => {}
    }
    Ok(())
}

/// Resolves to the name of the signal that asks the agent to stop.
fn stop_signal() -> anyhow::Result<impl Future<Output = &'static str>> {
    let mut term = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
    let mut int = signal(SignalKind::interrupt()).context("listening for SIGINT")?;
    Ok(async move {
        tokio::select! {
            _ = term.recv() => "SIGTERM",
            _ = int.recv() => "SIGINT",
        }
    })
}

/// How long a count of the maps' entries is good for: counting walks them all, and those of connections are large.
const FILL_IS_GOOD_FOR: Duration = Duration::from_secs(60);

/// What metrics read from the kernel: events at every scrape, the maps' fill once a minute.
fn probe(bpffs: &Path, ended: Arc<Ended>) -> serve::Probe {
    let bpffs = bpffs.to_owned();
    let counted: Mutex<Option<(Instant, Vec<Fill>)>> = Mutex::new(None);
    Arc::new(move || {
        let read = || -> Result<serve::Readings, ebpf::read::ReadError> {
            let pins = ebpf::read::Pins::open(&bpffs)?;
            let event =
                |(reason, count): (Reason, u64)| serve::Event { reason: reason.name(), drop: reason.is_drop(), count };
            let mut counted = counted.lock().unwrap_or_else(PoisonError::into_inner);
            let fill = match &*counted {
                Some((at, fill)) if at.elapsed() < FILL_IS_GOOD_FOR => fill.clone(),
                _ => {
                    let fill = pins.fill()?;
                    *counted = Some((Instant::now(), fill.clone()));
                    fill
                }
            };
            Ok(serve::Readings {
                events: pins.reasons()?.into_iter().map(event).collect(),
                fill,
                ended: ended.counts().into(),
                restore_failures: None,
            })
        };
        read().map_err(|error| error.to_string())
    })
}

/// The same where nothing is pinned.
fn probe_rules(mode: Mode, ended: Arc<Ended>, restore_failures: Arc<ByFamily>) -> serve::Probe {
    Arc::new(move || {
        let restore_failures = (mode == Mode::Iptables).then(|| restore_failures.counts());
        Ok(serve::Readings { ended: ended.counts().into(), restore_failures, ..serve::Readings::default() })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_in_force_is_shown_from_the_start() {
        let effective = effective::of(&effective::tests::given(&["--source=/objects", "--v=2"])).unwrap();
        let shown = effective.shown().unwrap();
        let plan = plan(effective.args.clone(), shown.clone()).unwrap();
        assert_eq!(**plan.serve.configuration.borrow(), shown);
        assert!(shown.configz.contains("\"verbosity\":2"), "{}", shown.configz);
    }

    /// A mode is of one of the three alone; the options of other modes mean nothing to it.
    #[test]
    fn each_mode_is_told_to_whom_it_concerns_a72() {
        let cidrs = || Some(crate::config::cluster_cidr("10.244.0.0/16,fd00:244::/48").unwrap());
        let all = |mode| Detection::of(mode, cidrs(), Some("cni0".into()), Some("veth".into())).unwrap();
        let of = |mode| {
            let Detection { plan, node, dataplane } = all(mode);
            (plan, node, dataplane)
        };
        let by_device = |node| (plan::DetectLocal::Device, node, dataplane::DetectLocal::Device);
        let by_address = |plan| (plan, node::Detect::Roles, dataplane::DetectLocal::Address);
        let ranges = ["10.244.0.0/16", "fd00:244::/48"].map(|cidr| cidr.parse().unwrap());
        assert_eq!(of(None), by_device(node::Detect::Roles));
        assert_eq!(of(Some(LocalMode::ClusterCidr)), by_address(plan::DetectLocal::Cidrs(ranges.into())));
        assert_eq!(of(Some(LocalMode::NodeCidr)), by_address(plan::DetectLocal::NodeCidrs));
        assert_eq!(of(Some(LocalMode::BridgeInterface)), by_device(node::Detect::Bridge("cni0".into())));
        assert_eq!(of(Some(LocalMode::InterfaceNamePrefix)), by_device(node::Detect::Prefix("veth".into())));

        // Without a range nobody can be told, by that mode (A73); a name has to be there.
        let Detection { plan, dataplane, .. } = Detection::of(Some(LocalMode::ClusterCidr), None, None, None).unwrap();
        assert_eq!((plan, dataplane), (plan::DetectLocal::Cidrs([].into()), dataplane::DetectLocal::Address));
        for nothing in [None, Some(String::new())] {
            let (veth, cni0) = (Some("veth".to_owned()), Some("cni0".to_owned()));
            for (mode, bridge, prefix, option) in [
                (LocalMode::BridgeInterface, nothing.clone(), veth, "--pod-bridge-interface"),
                (LocalMode::InterfaceNamePrefix, cni0, nothing.clone(), "--pod-interface-name-prefix"),
            ] {
                let Err(error) = Detection::of(Some(mode), None, bridge, prefix) else { panic!("{option}") };
                assert!(error.to_string().contains(option), "{error}");
            }
        }
    }
}
