//! The options of `run`. Names are kube-proxy's wherever kube-proxy has them.

use std::{
    convert::Infallible,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use clap::{Arg, ArgAction, Args as ClapArgs, ValueEnum, value_parser};

use super::{logging, unused::Unused};
use crate::{
    cli::shapes::{SocketLb, Xdp},
    config::{self, BPFFS, Bind, ClusterCidr, HEALTHZ_PORT, LocalMode, METRICS_PORT, PortRange, ProxyMode},
    dataplane::{iptables::Flavour, netfilter},
    desired::Algorithm,
};

#[derive(Clone, Debug, ClapArgs)]
// As kube-proxy's own: what is said twice is said last.
#[command(mut_args(switch), args_override_self = true, allow_negative_numbers = true)]
pub struct Args {
    #[command(flatten)]
    pub file: File,

    /// Watch this cluster [default: KUBECONFIG, ~/.kube/config, or the pod's service account]
    #[arg(long, value_name = "FILE", value_parser = path, help_heading = "Source")]
    pub kubeconfig: Option<PathBuf>,
    /// Address of the API server, in place of the one the kubeconfig names
    #[arg(long, value_name = "URL", help_heading = "Source")]
    pub master: Option<String>,
    /// Watch Service, EndpointSlice and Node YAML below this directory instead of a cluster
    #[arg(
        long,
        value_name = "DIR",
        conflicts_with_all = ["kubeconfig", "master"],
        env = "PROXY_AGENT_SOURCE",
        help_heading = "Source"
    )]
    pub source: Option<PathBuf>,
    /// This node's name [default: the host's name]
    #[arg(
        long,
        value_name = "NAME",
        value_parser = config::node_name,
        env = "PROXY_AGENT_HOSTNAME_OVERRIDE",
        help_heading = "Source"
    )]
    pub hostname_override: Option<String>,

    /// Which dataplane: ebpf, nftables, iptables, ipvs, or auto, the first of these that this node can run
    #[arg(long, value_name = "MODE", default_value_t, env = "PROXY_AGENT_PROXY_MODE")]
    pub proxy_mode: ProxyMode,
    /// Whose sockets are translated at connect time; what is not goes per packet
    #[arg(long, value_enum, default_value_t, env = "PROXY_AGENT_SOCKET_LB")]
    pub socket_lb: SocketLb,
    /// Annotations of this node's Pods and of Namespaces may leave pods alone at connect time; needs leave to list and watch both
    #[arg(long, env = "PROXY_AGENT_POD_ANNOTATIONS")]
    pub pod_annotations: bool,
    /// Whether what leaves again by an outward device goes past the stack, its firewall included
    #[arg(long, value_enum, default_value_t, env = "PROXY_AGENT_XDP")]
    pub xdp: Xdp,
    /// Attach only to devices that match; patterns with * and ?, ! in front excludes
    #[arg(long, value_name = "PATTERN,…", value_delimiter = ',', env = "PROXY_AGENT_DEVICES")]
    pub devices: Vec<String>,
    /// Links that lead out of the node although they look like pods' (a veth in a bridge); patterns as above
    #[arg(long, value_name = "PATTERN,…", value_delimiter = ',', env = "PROXY_AGENT_UPLINKS")]
    pub uplinks: Vec<String>,
    /// How a backend is chosen, where the Service does not say [default: random; by IPVS: what --ipvs-scheduler says]
    #[arg(long, value_enum, env = "PROXY_AGENT_ALGORITHM")]
    pub algorithm: Option<AlgorithmArg>,
    /// Masquerade all traffic to ClusterIPs, pods' too
    #[arg(long, env = "PROXY_AGENT_MASQUERADE_ALL")]
    pub masquerade_all: bool,
    /// The node's own address of a family, in place of the Node's; an IPv6 one moves the default addresses to listen on to IPv6
    #[arg(long, value_name = "ADDRESS", value_parser = config::bind_address, env = "PROXY_AGENT_BIND_ADDRESS")]
    pub bind_address: Option<IpAddr>,
    /// How pods of this node are told: ClusterCIDR, NodeCIDR, BridgeInterface or InterfaceNamePrefix [default: by the links of their devices]
    #[arg(long, value_name = "MODE", env = "PROXY_AGENT_DETECT_LOCAL_MODE", help_heading = "Local detection")]
    pub detect_local_mode: Option<LocalMode>,
    /// Addresses of the cluster's pods, for ClusterCIDR
    #[arg(
        long,
        value_name = "CIDR[,CIDR]",
        value_parser = config::cluster_cidr,
        env = "PROXY_AGENT_CLUSTER_CIDR",
        help_heading = "Local detection"
    )]
    pub cluster_cidr: Option<ClusterCidr>,
    /// Bridge that pods are on, for BridgeInterface
    #[arg(long, value_name = "NAME", env = "PROXY_AGENT_POD_BRIDGE_INTERFACE", help_heading = "Local detection")]
    pub pod_bridge_interface: Option<String>,
    /// What the names of pods' devices begin with, for InterfaceNamePrefix
    #[arg(
        long,
        value_name = "PREFIX",
        env = "PROXY_AGENT_POD_INTERFACE_NAME_PREFIX",
        help_heading = "Local detection"
    )]
    pub pod_interface_name_prefix: Option<String>,
    #[command(flatten)]
    pub netfilter: Netfilter,
    /// Source ports of masqueraded flows, with eBPF
    #[arg(long, value_name = "MIN-MAX", default_value_t = PortRange::MASQUERADE, env = "PROXY_AGENT_MASQUERADE_PORTS")]
    pub masquerade_ports: PortRange,
    /// Where NodePorts answer: addresses of the node within these, or primary, its InternalIPs [default: all]
    #[arg(
        long,
        value_name = "CIDR,…|primary",
        value_delimiter = ',',
        value_parser = config::node_port_address,
        env = "PROXY_AGENT_NODEPORT_ADDRESSES"
    )]
    pub nodeport_addresses: Vec<String>,
    /// Serve the external IPs of Services
    #[arg(long, default_value_t = true, env = "PROXY_AGENT_EXTERNAL_IPS")]
    pub external_ips: bool,
    /// kube-proxy's feature gates; AllowServiceExternalIPs=false is --external-ips=false, no other has an effect
    #[arg(long, value_name = "NAME=BOOL,…", value_delimiter = ',', value_parser = config::gates::feature_gate)]
    pub feature_gates: Vec<String>,
    /// Root of the cgroup v2 tree to attach to [default: where it is mounted]
    #[arg(long, value_name = "DIR", env = "PROXY_AGENT_CGROUP_ROOT")]
    pub cgroup_root: Option<PathBuf>,
    /// Directory of the pinned maps and programs, on a bpf filesystem
    #[arg(long, value_name = "DIR", default_value = BPFFS, env = "PROXY_AGENT_BPFFS")]
    pub bpffs: PathBuf,

    #[command(flatten)]
    pub periods: Periods,
    /// Where /healthz and /livez answer; empty or off: nowhere [default: 0.0.0.0:10256]
    #[arg(long, value_name = "ADDRESS", env = "PROXY_AGENT_HEALTHZ_BIND_ADDRESS", help_heading = "Serving")]
    pub healthz_bind_address: Option<Bind>,
    /// Where /metrics, /status, /configz and /proxyMode answer; empty or off: nowhere [default: 127.0.0.1:10249]
    #[arg(long, value_name = "ADDRESS", env = "PROXY_AGENT_METRICS_BIND_ADDRESS", help_heading = "Serving")]
    pub metrics_bind_address: Option<Bind>,
    /// Port of --healthz-bind-address where that names none; 0: nowhere (deprecated)
    #[arg(long, value_name = "PORT", help_heading = "Serving")]
    pub healthz_port: Option<u16>,
    /// Port of --metrics-bind-address where that names none; 0: nowhere (deprecated)
    #[arg(long, value_name = "PORT", help_heading = "Serving")]
    pub metrics_port: Option<u16>,
    /// End if an address cannot be had, instead of trying again
    #[arg(long, help_heading = "Serving")]
    pub bind_address_hard_fail: bool,
    /// Answer PUT /debug/flags/v, too, where /metrics is: how much is logged, as -v has it. kube-proxy's /debug/pprof is of Go, and not here
    #[arg(long, help_heading = "Serving")]
    pub profiling: bool,

    #[command(flatten)]
    pub conntrack: Conntrack,
    #[command(flatten)]
    pub maps: Maps,

    #[command(flatten)]
    pub log: Log,
    /// What the eBPF programs log; it costs them time
    #[arg(long, value_enum, default_value_t, env = "PROXY_AGENT_EBPF_LOG_LEVEL", help_heading = "Logging")]
    pub ebpf_log_level: EbpfLogLevel,

    /// Tell no neighbour of addresses that are on another device, with --proxy-mode ipvs: arp_ignore 1, arp_announce 2
    #[arg(long)]
    pub ipvs_strict_arp: bool,
    /// Of the process, for when memory runs out: the higher, the sooner it is ended [default: as it was started with]
    #[arg(long, value_name = "N", value_parser = value_parser!(i16).range(-1000..=1000), allow_hyphen_values = true)]
    pub oom_score_adj: Option<i16>,
    #[command(flatten)]
    pub unused: Unused,
}

impl Args {
    /// Where /healthz and /metrics answer: as kube-proxy, by default in the family of --bind-address.
    pub fn binds(&self) -> (Option<SocketAddr>, Option<SocketAddr>) {
        let (all, own): (IpAddr, IpAddr) = match self.bind_address {
            Some(IpAddr::V6(_)) => (Ipv6Addr::UNSPECIFIED.into(), Ipv6Addr::LOCALHOST.into()),
            _ => (Ipv4Addr::UNSPECIFIED.into(), Ipv4Addr::LOCALHOST.into()),
        };
        let bind = |given: Option<Bind>, default, port: Option<u16>, default_port| match port {
            Some(0) => None,
            port => given.unwrap_or(Bind::Address(default)).socket(port.unwrap_or(default_port)),
        };
        (
            bind(self.healthz_bind_address, all, self.healthz_port, HEALTHZ_PORT),
            bind(self.metrics_bind_address, own, self.metrics_port, METRICS_PORT),
        )
    }
}

/// The file, and what is done in place of running.
#[derive(Clone, Debug, ClapArgs)]
#[command(next_help_heading = "Configuration file")]
pub struct File {
    /// Read the configuration from this file: a KubeProxyConfiguration, a ProxyAgentConfiguration, or both. kube-proxy's options beside it
    /// are not read, but for --hostname-override, --master and those of the log
    #[arg(long, value_name = "FILE", env = "PROXY_AGENT_CONFIG")]
    pub config: Option<PathBuf>,
    /// Write the configuration that would be in force to this file, and end
    #[arg(long, value_name = "FILE")]
    pub write_config_to: Option<PathBuf>,
    /// Remove everything of ours from the kernel, and what kube-proxy left, and end
    #[arg(long)]
    pub cleanup: bool,
    /// Do what takes more rights than to run (mount bpffs, set the kernel's conntrack and what IPVS needs), and end
    #[arg(long)]
    pub init_only: bool,
    /// Print the version, and end
    #[arg(long, value_name = "raw|BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub version: Option<String>,
}

/// How often. kube-proxy's own are of one kind of mode each; ours are of all, and count where both are given.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ClapArgs)]
#[command(next_help_heading = "Sync")]
pub struct Periods {
    /// Least time between two syncs; 0: as soon as something changes [default: 0]
    #[arg(long, value_name = "DURATION", value_parser = config::duration)]
    pub min_sync_period: Option<Duration>,
    /// How often the kernel is compared with what should be in force, and failures are tried again [default: 30s]
    #[arg(long, value_name = "DURATION", value_parser = config::period)]
    pub sync_period: Option<Duration>,
    /// --min-sync-period of all modes but ipvs
    #[arg(long, value_name = "DURATION", value_parser = config::duration)]
    pub iptables_min_sync_period: Option<Duration>,
    /// --sync-period of all modes but ipvs
    #[arg(long, value_name = "DURATION", value_parser = config::period)]
    pub iptables_sync_period: Option<Duration>,
    /// --min-sync-period of mode ipvs
    #[arg(long, value_name = "DURATION", value_parser = config::duration)]
    pub ipvs_min_sync_period: Option<Duration>,
    /// --sync-period of mode ipvs
    #[arg(long, value_name = "DURATION", value_parser = config::period)]
    pub ipvs_sync_period: Option<Duration>,
}

impl Periods {
    /// Least time between two syncs, and how often the kernel is looked at (contract A144: the former is no longer).
    pub fn of(self, mode: ProxyMode) -> Result<(Duration, Duration), config::ConfigError> {
        let Self {
            min_sync_period,
            sync_period,
            iptables_min_sync_period,
            iptables_sync_period,
            ipvs_min_sync_period,
            ipvs_sync_period,
        } = self;
        let (of_mode, least_of_mode) = match mode {
            ProxyMode::Ipvs => (ipvs_sync_period, ipvs_min_sync_period),
            _ => (iptables_sync_period, iptables_min_sync_period),
        };
        let least = min_sync_period.or(least_of_mode).unwrap_or_default();
        let period = sync_period.or(of_mode).unwrap_or(Duration::from_secs(30));
        if least <= period { Ok((least, period)) } else { Err(config::ConfigError::Periods { least, period }) }
    }
}

#[derive(Clone, PartialEq, Eq, Debug, ClapArgs)]
#[command(next_help_heading = "Logging")]
pub struct Log {
    /// How log lines look [default: as --logging-format says]
    #[arg(long, value_enum, env = "PROXY_AGENT_LOG_FORMAT")]
    pub log_format: Option<LogFormat>,
    /// What the agent logs: a level, or target=level,… [default: as -v says]
    #[arg(long, value_name = "FILTER", value_parser = logging::checked, env = "RUST_LOG")]
    pub log_level: Option<String>,
    /// kube-proxy's --log-format
    #[arg(long, value_enum, default_value_t)]
    pub logging_format: LogFormat,
    /// kube-proxy's --log-level: from 4 on debug, from 6 on trace, of the agent itself; below that info
    #[arg(short, long, value_name = "N", value_parser = value_parser!(u32).range(..=i64::from(i32::MAX)), default_value_t)]
    pub v: u32,
}

impl Log {
    pub fn format(&self) -> LogFormat {
        self.log_format.unwrap_or(self.logging_format)
    }

    pub fn filter(&self) -> &str {
        self.log_level.as_deref().unwrap_or(Self::filter_of(self.v))
    }

    /// What kube-proxy's verbosity comes to.
    pub const fn filter_of(v: u32) -> &'static str {
        match v {
            0..=3 => "info",
            4..=5 => "info,proxy_agent=debug",
            _ => "info,proxy_agent=trace",
        }
    }
}

/// What the dataplanes that are made of netfilter are told, by `run` and by `check`, which tries them out with it.
#[derive(Clone, Debug, ClapArgs)]
pub struct Netfilter {
    /// Bit of a packet's mark that asks for masquerading, where netfilter does it
    #[arg(
        long,
        value_name = "BIT",
        default_value_t = 14,
        value_parser = value_parser!(u8).range(0..=31),
        env = "PROXY_AGENT_IPTABLES_MASQUERADE_BIT"
    )]
    pub iptables_masquerade_bit: u8,
    /// NodePorts answer the node's own processes on 127.0.0.1, too: by default at connect time alone; if asked for, by iptables, too, with
    /// route_localnet
    #[arg(
        long,
        value_name = "BOOL",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true",
        value_parser = config::boolean,
        env = "PROXY_AGENT_IPTABLES_LOCALHOST_NODEPORTS"
    )]
    pub iptables_localhost_nodeports: Option<bool>,
    /// Which iptables, with --proxy-mode iptables: nft or legacy [default: the one that others use here]
    #[arg(long, value_name = "FLAVOUR", env = "PROXY_AGENT_IPTABLES_FLAVOUR")]
    pub iptables_flavour: Option<Flavour>,
    /// How IPVS chooses a backend, where the Service does not say: rr, lc, sh …, as the kernel has them
    #[arg(
        long,
        value_name = "NAME",
        default_value = "rr",
        value_parser = config::ipvs_scheduler,
        env = "PROXY_AGENT_IPVS_SCHEDULER"
    )]
    pub ipvs_scheduler: String,
}

impl Netfilter {
    /// `masquerade_ports`: eBPF's.
    pub fn options(self, masquerade_ports: PortRange) -> netfilter::Options {
        let Self { iptables_masquerade_bit, iptables_localhost_nodeports, iptables_flavour, ipvs_scheduler } = self;
        let PortRange { min, max } = masquerade_ports;
        netfilter::Options {
            masquerade_bit: iptables_masquerade_bit,
            iptables_flavour,
            localhost_node_ports: iptables_localhost_nodeports == Some(true),
            masquerade_ports: netfilter::beside((min, max)),
            ipvs_scheduler,
            ..Default::default()
        }
    }
}

/// How long a flow may be silent before another may take its place: in the agent's own table with eBPF, in the kernel's where netfilter
/// translates, which is left as it is but for what is given here.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ClapArgs)]
#[command(next_help_heading = "Flows")]
pub struct Conntrack {
    /// TCP, both sides have spoken; 0: as it is [default with eBPF: 24h]
    #[arg(long, value_name = "DURATION", value_parser = config::duration)]
    pub conntrack_tcp_timeout_established: Option<Duration>,
    /// TCP, one side has closed; 0: as it is [default with eBPF: 1h]
    #[arg(long, value_name = "DURATION", value_parser = config::duration)]
    pub conntrack_tcp_timeout_close_wait: Option<Duration>,
    /// UDP, not answered yet; 0: as it is [default with eBPF: 30s]
    #[arg(long, value_name = "DURATION", value_parser = config::duration)]
    pub conntrack_udp_timeout: Option<Duration>,
    /// UDP, answered; 0: as it is [default with eBPF: 2m]
    #[arg(long, value_name = "DURATION", value_parser = config::duration)]
    pub conntrack_udp_timeout_stream: Option<Duration>,
    /// Entries of the kernel's conntrack for each CPU, 1048576 in all at most, without eBPF; 0: as it is
    #[arg(long, value_name = "N")]
    pub conntrack_max_per_core: Option<u32>,
    /// Least number of entries of the kernel's conntrack, without eBPF
    #[arg(long, value_name = "N")]
    pub conntrack_min: Option<u32>,
    /// Let the kernel's conntrack take packets that are out of their window, without eBPF
    #[arg(long)]
    pub conntrack_tcp_be_liberal: bool,
}

/// Entries of the maps; each counts for one address family.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ClapArgs)]
#[command(next_help_heading = "Sizes (entries, for each address family)")]
pub struct Maps {
    /// Frontends: one for each address, port and protocol of a Service, and one for each address
    #[arg(long, value_name = "N", default_value_t = 65_536, value_parser = entries())]
    pub map_frontends: u32,
    /// Slots: one for each backend of each ServicePort, and room for the next version of the list
    #[arg(long, value_name = "N", default_value_t = 1_048_576, value_parser = entries())]
    pub map_slots: u32,
    /// ServicePorts
    #[arg(long, value_name = "N", default_value_t = 65_536, value_parser = entries())]
    pub map_services: u32,
    /// Entries of established flows; a flow has two, a masqueraded one four. Answered UDP flows have half as many of their own
    #[arg(long, value_name = "N", default_value_t = 262_144, value_parser = entries())]
    pub map_connections: u32,
    /// Entries of half-open flows
    #[arg(long, value_name = "N", default_value_t = 65_536, value_parser = entries())]
    pub map_half_open: u32,
    /// Entries of unconnected UDP sockets
    #[arg(long, value_name = "N", default_value_t = 65_536, value_parser = entries())]
    pub map_datagrams: u32,
    /// Clients that session affinity remembers
    #[arg(long, value_name = "N", default_value_t = 65_536, value_parser = entries())]
    pub map_affinity: u32,
    /// Source ranges of load balancers' addresses
    #[arg(long, value_name = "N", default_value_t = 65_536, value_parser = entries())]
    pub map_source_ranges: u32,
}

/// Booleans are written as kube-proxy has them: `--it`, `--it=true`, `--it=false`.
fn switch(arg: Arg) -> Arg {
    let is_on = arg.get_default_values() == ["true"];
    if !is_on && !matches!(arg.get_action(), ArgAction::SetTrue) {
        return arg;
    }
    let arg = arg.value_name("BOOL").action(ArgAction::Set).num_args(0..=1).require_equals(true);
    let arg = arg.value_parser(config::boolean).default_missing_value("true");
    if is_on { arg } else { arg.default_value("false").hide_default_value(true) }
}

/// Empty: none, as kube-proxy has it.
fn path(text: &str) -> Result<PathBuf, Infallible> {
    Ok(text.into())
}

/// A map cannot be empty, and the kernel refuses sizes near 2³².
fn entries() -> clap::builder::RangedI64ValueParser<u32> {
    value_parser!(u32).range(1..=1 << 30)
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum AlgorithmArg {
    Random,
    /// Each CPU walks the list on its own
    RoundRobin,
    /// By a hash of the flow, the same on every node; takes 4513 slots and more for each set of backends
    Maglev,
}

impl From<AlgorithmArg> for Algorithm {
    fn from(algorithm: AlgorithmArg) -> Self {
        match algorithm {
            AlgorithmArg::Random => Self::Random,
            AlgorithmArg::RoundRobin => Self::RoundRobin,
            AlgorithmArg::Maglev => Self::Maglev,
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, ValueEnum)]
pub enum LogFormat {
    #[default]
    Text,
    Json,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, ValueEnum)]
pub enum EbpfLogLevel {
    #[default]
    Off,
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

impl EbpfLogLevel {
    /// As the programs' global has it.
    pub const fn number(self) -> u8 {
        self as u8
    }
}
