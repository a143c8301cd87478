//! The options of `run`. Names are kube-proxy's wherever kube-proxy has them.

use std::{path::PathBuf, time::Duration};

use clap::{Arg, ArgAction, Args as ClapArgs, ValueEnum, value_parser};

use crate::{
    cli::shapes::{SocketLb, Xdp},
    config::{self, BPFFS, Bind, ClusterCidr, LocalMode, PortRange, ProxyMode},
    dataplane::{iptables::Flavour, netfilter},
    desired::Algorithm,
    model::address::NodePortAddresses,
};

#[derive(Clone, Debug, ClapArgs)]
#[command(mut_args(switch))]
pub struct Args {
    /// Watch this cluster [default: KUBECONFIG, ~/.kube/config, or the pod's service account]
    #[arg(long, value_name = "FILE", help_heading = "Source")]
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
    #[arg(long, value_name = "NAME", env = "PROXY_AGENT_HOSTNAME_OVERRIDE", help_heading = "Source")]
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
        value_parser = config::node_port_addresses,
        env = "PROXY_AGENT_NODEPORT_ADDRESSES"
    )]
    pub nodeport_addresses: Option<NodePortAddresses>,
    /// Serve the external IPs of Services
    #[arg(long, default_value_t = true, env = "PROXY_AGENT_EXTERNAL_IPS")]
    pub external_ips: bool,
    /// Root of the cgroup v2 tree to attach to [default: where it is mounted]
    #[arg(long, value_name = "DIR", env = "PROXY_AGENT_CGROUP_ROOT")]
    pub cgroup_root: Option<PathBuf>,
    /// Directory of the pinned maps and programs, on a bpf filesystem
    #[arg(long, value_name = "DIR", default_value = BPFFS, env = "PROXY_AGENT_BPFFS")]
    pub bpffs: PathBuf,

    /// Least time between two syncs; 0: as soon as something changes
    #[arg(long, value_name = "DURATION", default_value = "0", value_parser = config::duration, help_heading = "Sync")]
    pub min_sync_period: Duration,
    /// How often the kernel is compared with what should be in force, and failures are tried again
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = period, help_heading = "Sync")]
    pub sync_period: Duration,
    /// Where /healthz and /livez answer; empty: nowhere
    #[arg(
        long,
        value_name = "ADDRESS",
        default_value = "0.0.0.0:10256",
        env = "PROXY_AGENT_HEALTHZ_BIND_ADDRESS",
        help_heading = "Serving"
    )]
    pub healthz_bind_address: Bind,
    /// Where /metrics, /status and /proxyMode answer; empty: nowhere
    #[arg(
        long,
        value_name = "ADDRESS",
        default_value = "127.0.0.1:10249",
        env = "PROXY_AGENT_METRICS_BIND_ADDRESS",
        help_heading = "Serving"
    )]
    pub metrics_bind_address: Bind,
    /// End if an address cannot be had, instead of trying again
    #[arg(long, help_heading = "Serving")]
    pub bind_address_hard_fail: bool,

    #[command(flatten)]
    pub conntrack: Conntrack,
    #[command(flatten)]
    pub maps: Maps,

    /// How log lines look
    #[arg(long, value_enum, default_value_t, env = "PROXY_AGENT_LOG_FORMAT", help_heading = "Logging")]
    pub log_format: LogFormat,
    /// What the agent logs: a level, or target=level,…
    #[arg(long, value_name = "FILTER", default_value = "info", env = "RUST_LOG", help_heading = "Logging")]
    pub log_level: String,
    /// What the eBPF programs log; it costs them time
    #[arg(long, value_enum, default_value_t, env = "PROXY_AGENT_EBPF_LOG_LEVEL", help_heading = "Logging")]
    pub ebpf_log_level: EbpfLogLevel,
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

/// How long a flow may be silent before another may take its place. They are of this agent's own table; the kernel's conntrack has
/// its own, which this agent leaves alone.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ClapArgs)]
#[command(next_help_heading = "Time-outs of the per-packet path's flows")]
pub struct Conntrack {
    /// TCP, both sides have spoken
    #[arg(long, value_name = "DURATION", default_value = "24h", value_parser = period)]
    pub conntrack_tcp_timeout_established: Duration,
    /// TCP, one side has closed
    #[arg(long, value_name = "DURATION", default_value = "1h", value_parser = period)]
    pub conntrack_tcp_timeout_close_wait: Duration,
    /// UDP, not answered yet
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = period)]
    pub conntrack_udp_timeout: Duration,
    /// UDP, answered
    #[arg(long, value_name = "DURATION", default_value = "2m", value_parser = period)]
    pub conntrack_udp_timeout_stream: Duration,
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

/// What is on by default can be switched off: `--it=false`, as kube-proxy has it.
fn switch(arg: Arg) -> Arg {
    if arg.get_default_values() != ["true"] {
        return arg;
    }
    arg.value_name("BOOL").action(ArgAction::Set).num_args(0..=1).require_equals(true).default_missing_value("true")
}

/// A map cannot be empty, and the kernel refuses sizes near 2³².
fn entries() -> clap::builder::RangedI64ValueParser<u32> {
    value_parser!(u32).range(1..=1 << 30)
}

fn period(text: &str) -> Result<Duration, String> {
    match config::duration(text) {
        Ok(Duration::ZERO) => Err("must be more than 0".into()),
        Ok(period) => Ok(period),
        Err(error) => Err(error.to_string()),
    }
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
