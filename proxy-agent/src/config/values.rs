//! The values of the configuration: how they are written, their defaults, and what is odd about them.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    ops::RangeInclusive,
    str::FromStr,
    time::Duration,
};

use ipnet::IpNet;

use crate::model::address::NodePortAddresses;

/// Where the pins are, unless told otherwise.
pub const BPFFS: &str = "/sys/fs/bpf/proxy-agent";
/// Port of the health server, where kube-proxy has it.
pub const HEALTHZ_PORT: u16 = 10256;
/// Port of the metrics server, where kube-proxy has it.
pub const METRICS_PORT: u16 = 10249;

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ConfigError {
    #[error("{0:?} is no mode; the modes are auto, ebpf, nftables, iptables and ipvs")]
    UnknownMode(String),
    #[error("{0:?} is neither true nor false")]
    Boolean(String),
    #[error("{0:?} is no address; write it as 192.0.2.1 or 2001:db8::1")]
    Address(String),
    #[error("{0:?} is Windows' mode; the modes here are auto, ebpf, nftables, iptables and ipvs")]
    WindowsMode(String),
    #[error("{0:?} is no scheduler of IPVS; give the name of its kernel module without ip_vs_, for example rr")]
    Scheduler(String),
    #[error("{0:?} is no range of ports; write it as MIN-MAX, for example 1024-29999")]
    Ports(String),
    #[error("{0:?} is no duration; write it as 500ms, 30s, 1m30s or 1h")]
    Duration(String),
    #[error(
        "{0:?} is no address range of the node; write it as a CIDR (192.0.2.0/24), several with commas between, or primary alone"
    )]
    NodePortAddresses(String),
    #[error(
        "{0:?} is no way to tell pods; the modes are ClusterCIDR, NodeCIDR, BridgeInterface and InterfaceNamePrefix"
    )]
    LocalMode(String),
    #[error(
        "{0:?} is no range of pod addresses; write it as a CIDR (10.244.0.0/16), or one of each family with a comma between"
    )]
    ClusterCidr(String),
    #[error("--detect-local-mode {mode} tells pods by a name: give it with {option}")]
    NoName { mode: &'static str, option: &'static str },
    #[error(
        "{0:?} is no address to listen on; write it as ADDRESS:PORT, [ADDRESS]:PORT, ADDRESS, or off; a port is 1 or more"
    )]
    Bind(String),
    #[error("{0:?} is no name of a node; leave it out for the host's own")]
    NodeName(String),
    #[error(
        "the least time between two syncs ({least:?}, --min-sync-period) is longer than the time between two looks at the kernel \
         ({period:?}, --sync-period)"
    )]
    Periods { least: Duration, period: Duration },
}

impl ConfigError {
    /// The options that it is about, where it is about several: whoever said one of the first of them is to be told.
    pub const fn options(&self) -> &'static [&'static str] {
        match self {
            Self::Periods { .. } => &[
                "min-sync-period",
                "iptables-min-sync-period",
                "ipvs-min-sync-period",
                "sync-period",
                "iptables-sync-period",
                "ipvs-sync-period",
            ],
            Self::NodePortAddresses(_) => &["nodeport-addresses"],
            Self::NoName { .. } => &["detect-local-mode"],
            _ => &[],
        }
    }
}

/// Which dataplane.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum ProxyMode {
    /// The first that the node can run.
    #[default]
    Auto,
    Ebpf,
    Nftables,
    Iptables,
    Ipvs,
}

impl FromStr for ProxyMode {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            // kube-proxy's default has no name.
            "auto" | "" => Ok(Self::Auto),
            "ebpf" => Ok(Self::Ebpf),
            "nftables" => Ok(Self::Nftables),
            "iptables" => Ok(Self::Iptables),
            "ipvs" => Ok(Self::Ipvs),
            "kernelspace" => Err(ConfigError::WindowsMode(text.to_owned())),
            other => Err(ConfigError::UnknownMode(other.to_owned())),
        }
    }
}

impl fmt::Display for ProxyMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Ebpf => "ebpf",
            Self::Nftables => "nftables",
            Self::Iptables => "iptables",
            Self::Ipvs => "ipvs",
        })
    }
}

/// First and last port, both included.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PortRange {
    pub min: u16,
    pub max: u16,
}

impl PortRange {
    /// Below the kernel's ephemeral ports (32768-60999) and below the NodePorts (30000-32767).
    pub const MASQUERADE: Self = Self { min: 1024, max: 29_999 };

    pub const fn overlaps(self, other: Self) -> bool {
        self.min <= other.max && other.min <= self.max
    }

    /// The kernel's ephemeral ports, of the network namespace this runs in.
    pub fn ephemeral() -> Option<Self> {
        let text = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").ok()?;
        let mut numbers = text.split_whitespace().map(str::parse);
        match (numbers.next()?, numbers.next()?) {
            (Ok(min), Ok(max)) => Some(Self { min, max }),
            _ => None,
        }
    }

    /// What to say if `self` is used for masquerading while the kernel hands out `ephemeral`.
    pub fn overlap_warning(self, ephemeral: Self) -> Option<String> {
        self.overlaps(ephemeral).then(|| {
            format!(
                "--masquerade-ports {self} overlaps the kernel's ephemeral ports {ephemeral}: a masqueraded flow may take the \
                 port of a connection of this node; choose a range outside, or move net.ipv4.ip_local_port_range"
            )
        })
    }
}

impl From<PortRange> for RangeInclusive<u16> {
    fn from(PortRange { min, max }: PortRange) -> Self {
        min..=max
    }
}

impl FromStr for PortRange {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parsed = text.split_once('-').and_then(|(min, max)| {
            let (min, max) = (min.trim().parse().ok()?, max.trim().parse().ok()?);
            (min > 0 && min <= max).then_some(Self { min, max })
        });
        parsed.ok_or_else(|| ConfigError::Ports(text.to_owned()))
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.min, self.max)
    }
}

/// A duration as Go and kube-proxy write it: `1m30s`. A bare `0` is nought.
pub fn duration(text: &str) -> Result<Duration, ConfigError> {
    let error = || ConfigError::Duration(text.to_owned());
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    let mut rest = text;
    let mut total = 0.0;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(error)?;
        let (number, unit) = rest.split_at(digits);
        let end = unit.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(unit.len());
        let (unit, following) = unit.split_at(end);
        let scale = match unit {
            "ns" => 1e-9,
            "us" | "µs" | "μs" => 1e-6,
            "ms" => 0.001,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return Err(error()),
        };
        total += number.parse::<f64>().map_err(|_| error())? * scale;
        rest = following;
    }
    if text.is_empty() { Err(error()) } else { Duration::try_from_secs_f64(total).map_err(|_| error()) }
}

/// A duration that is not nought.
pub fn period(text: &str) -> Result<Duration, String> {
    match duration(text) {
        Ok(Duration::ZERO) => Err("must be more than 0".into()),
        Ok(period) => Ok(period),
        Err(error) => Err(error.to_string()),
    }
}

/// As Go's `strconv.ParseBool` has it, by which kube-proxy's options are read.
pub fn boolean(text: &str) -> Result<bool, ConfigError> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        other => Err(ConfigError::Boolean(other.to_owned())),
    }
}

/// `--bind-address`: the node's own address of a family; one of all zeros says nothing but which family comes first.
pub fn bind_address(text: &str) -> Result<IpAddr, ConfigError> {
    text.trim().parse().map_err(|_| ConfigError::Address(text.to_owned()))
}

/// `--hostname-override`: empty is the host's own name.
pub fn node_name(text: &str) -> Result<String, ConfigError> {
    let is_blank = text.trim().is_empty() && !text.is_empty();
    if is_blank { Err(ConfigError::NodeName(text.to_owned())) } else { Ok(text.to_owned()) }
}

/// Whether the kernel has it is seen when it is asked for.
pub fn ipvs_scheduler(text: &str) -> Result<String, ConfigError> {
    let is_name = (1..16).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_lowercase());
    if is_name { Ok(text.to_owned()) } else { Err(ConfigError::Scheduler(text.to_owned())) }
}

/// One part of `--nodeport-addresses`; what they are together is [`node_port_addresses`].
pub fn node_port_address(text: &str) -> Result<String, ConfigError> {
    node_port_addresses(text).map(|_| text.trim().to_owned())
}

/// Which of its addresses the node answers NodePorts at, as `--nodeport-addresses` says it (contract A53).
pub fn node_port_addresses(text: &str) -> Result<NodePortAddresses, ConfigError> {
    let parts: Vec<&str> = text.split(',').map(str::trim).filter(|part| !part.is_empty()).collect();
    match parts.as_slice() {
        [] => Ok(NodePortAddresses::All),
        ["primary"] => Ok(NodePortAddresses::Primary(None)),
        cidrs => {
            let parse = |cidr: &&str| cidr.parse().map_err(|_| ConfigError::NodePortAddresses((*cidr).to_owned()));
            cidrs.iter().map(parse).collect::<Result<_, _>>().map(NodePortAddresses::Cidrs)
        }
    }
}

/// How pods of this node are told, in kube-proxy's words (contract A72).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LocalMode {
    ClusterCidr,
    NodeCidr,
    BridgeInterface,
    InterfaceNamePrefix,
}

impl FromStr for LocalMode {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "ClusterCIDR" => Ok(Self::ClusterCidr),
            "NodeCIDR" => Ok(Self::NodeCidr),
            "BridgeInterface" => Ok(Self::BridgeInterface),
            "InterfaceNamePrefix" => Ok(Self::InterfaceNamePrefix),
            other => Err(ConfigError::LocalMode(other.to_owned())),
        }
    }
}

/// `--cluster-cidr`: one range, or one of each family (contract A73). Empty: none.
pub fn cluster_cidr(text: &str) -> Result<ClusterCidr, ConfigError> {
    let error = || ConfigError::ClusterCidr(text.to_owned());
    let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
    let cidrs: Vec<IpNet> = parts.map(|part| part.parse().map_err(|_| error())).collect::<Result<_, _>>()?;
    let of_family = |v4: bool| cidrs.iter().filter(|cidr| cidr.addr().is_ipv4() == v4).count();
    if of_family(true) > 1 || of_family(false) > 1 { Err(error()) } else { Ok(ClusterCidr(cidrs)) }
}

/// Addresses of the cluster's pods.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ClusterCidr(pub Vec<IpNet>);

/// An address to listen on, in kube-proxy's ways of writing it; empty: not at all.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Bind {
    Off,
    /// Port of the option's default.
    Address(IpAddr),
    Socket(SocketAddr),
}

impl Bind {
    pub fn socket(self, default_port: u16) -> Option<SocketAddr> {
        match self {
            Self::Off => None,
            Self::Address(addr) => Some(SocketAddr::new(addr, default_port)),
            Self::Socket(socket) => Some(socket),
        }
    }
}

impl FromStr for Bind {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bare = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(text);
        if text.is_empty() || text == "off" {
            Ok(Self::Off)
        } else if let Ok(addr) = bare.parse() {
            Ok(Self::Address(addr))
        } else {
            let socket = text.parse().ok().filter(|socket: &SocketAddr| socket.port() != 0);
            socket.map(Self::Socket).ok_or_else(|| ConfigError::Bind(text.to_owned()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_are_known_by_name() {
        assert_eq!("auto".parse(), Ok(ProxyMode::Auto));
        assert_eq!("ebpf".parse(), Ok(ProxyMode::Ebpf));
        assert_eq!("nftables".parse(), Ok(ProxyMode::Nftables));
        assert_eq!("ipvs".parse(), Ok(ProxyMode::Ipvs));
        assert_eq!("iptables".parse(), Ok(ProxyMode::Iptables));
        assert!("IPVS".parse::<ProxyMode>().is_err());
        assert_eq!(ipvs_scheduler("wlc"), Ok("wlc".into()));
        for bad in ["", "RR", "rr lc", "../rr", "averyveryverylong"] {
            assert!(ipvs_scheduler(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn port_ranges() {
        assert_eq!("1024-29999".parse(), Ok(PortRange::MASQUERADE));
        for bad in ["", "80", "0-10", "10-9", "1-65536", "a-b", "-", "1-2-3"] {
            assert!(bad.parse::<PortRange>().is_err(), "{bad}");
        }
        let ephemeral = PortRange { min: 32_768, max: 60_999 };
        assert_eq!(PortRange::MASQUERADE.overlap_warning(ephemeral), None);
        let warning = PortRange { min: 1024, max: 32_768 }.overlap_warning(ephemeral).unwrap();
        assert!(warning.contains("1024-32768") && warning.contains("32768-60999"), "{warning}");
    }

    #[test]
    fn addresses_of_node_ports() {
        let cidrs = |cidrs: &[&str]| NodePortAddresses::Cidrs(cidrs.iter().map(|cidr| cidr.parse().unwrap()).collect());
        assert_eq!(node_port_addresses(""), Ok(NodePortAddresses::All));
        assert_eq!(node_port_addresses("primary"), Ok(NodePortAddresses::Primary(None)));
        assert_eq!(node_port_addresses("10.0.0.0/8"), Ok(cidrs(&["10.0.0.0/8"])));
        assert_eq!(node_port_addresses("10.0.0.0/8, fd00::/8"), Ok(cidrs(&["10.0.0.0/8", "fd00::/8"])));
        for bad in ["10.0.0.1", "eth0", "primary,10.0.0.0/8", "10.0.0.0/33"] {
            assert!(node_port_addresses(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn ways_to_tell_pods() {
        assert_eq!("NodeCIDR".parse(), Ok(LocalMode::NodeCidr));
        assert!("nodecidr".parse::<LocalMode>().unwrap_err().to_string().contains("InterfaceNamePrefix"));
        for (text, count) in [("", 0), ("10.244.0.0/16", 1), ("fd00::/56, 10.244.0.0/16", 2)] {
            assert_eq!(cluster_cidr(text).map(|ClusterCidr(cidrs)| cidrs.len()), Ok(count), "{text}");
        }
        for bad in ["10.244.0.1", "10.244.0.0/16,10.245.0.0/16", "10.244.0.0/33", "eth0"] {
            assert!(cluster_cidr(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn durations_as_go_writes_them() {
        for (text, millis) in
            [("0", 0), ("500ms", 500), ("30s", 30_000), ("1m30s", 90_000), ("1h", 3_600_000), ("1.5s", 1500)]
        {
            assert_eq!(duration(text), Ok(Duration::from_millis(millis)), "{text}");
        }
        assert_eq!(duration("15m0s"), duration("900s"));
        assert_eq!(duration("2000us").map(|it| it.as_millis()), Ok(2));
        assert!(period("0s").is_err() && period("1ms").is_ok());
        for bad in ["", "30", "s", "1x", "-1s", "1s1", "1e3s", "..s", "99999999999999999999999h"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn booleans_as_go_writes_them() {
        assert_eq!(
            ["true", "T", "1", "False", "0"].map(|text| boolean(text).ok()),
            [Some(true), Some(true), Some(true), Some(false), Some(false)]
        );
        for bad in ["", "yes", "on", "maybe"] {
            assert!(boolean(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn addresses_to_listen_on() {
        let socket = |text: &str| text.parse::<Bind>().map(|bind| bind.socket(10_256).map(|addr| addr.to_string()));
        assert_eq!([socket(""), socket("off")], [Ok(None), Ok(None)]);
        assert_eq!(socket("0.0.0.0:1"), Ok(Some("0.0.0.0:1".into())));
        assert_eq!(socket("127.0.0.1"), Ok(Some("127.0.0.1:10256".into())));
        assert_eq!(socket("::"), Ok(Some("[::]:10256".into())));
        assert_eq!(socket("[::1]"), Ok(Some("[::1]:10256".into())));
        assert_eq!(socket("[::1]:80"), Ok(Some("[::1]:80".into())));
        for bad in ["localhost:80", "1.2.3.4:99999", ":80", "[::1"] {
            assert!(socket(bad).is_err(), "{bad}");
        }
    }
}
