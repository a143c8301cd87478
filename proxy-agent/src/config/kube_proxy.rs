//! The fields of kube-proxy's `KubeProxyConfiguration`, `kubeproxy.config.k8s.io/v1alpha1` as of 1.36, and those of its options that no
//! field has: what each means here, or why it means nothing (contract A148, A149).

use super::{
    Field,
    Kind::{Bool, Duration, Gates, Int, Levels, List, MinorVersion, Nanoseconds, Number, Period, Quantity, Text},
    ProxyMode,
};

/// The largest number that Go's `int32` holds.
const INT32: i64 = i32::MAX as i64;

const WINDOWS: &str = "it is of Windows";
const STREAMS: &str = "the log is one stream without a buffer, to stderr";
const OWN_TABLE: &str = "connections are in a table of eBPF's own (--map-connections), and the kernel's is left alone";
const CLIENT: &str = "the API server is only watched, a handful of requests in all";

/// Those that are made of netfilter.
const NETFILTER: &[ProxyMode] = &[ProxyMode::Nftables, ProxyMode::Iptables, ProxyMode::Ipvs];
const IPVS: &[ProxyMode] = &[ProxyMode::Ipvs];
const OF_IPVS: &str = "it is of IPVS";

/// In the order of kube-proxy's own type.
pub const FIELDS: &[Field] = &[
    Field::new("featureGates", "feature-gates", Gates, ""),
    Field::new("clientConnection.kubeconfig", "kubeconfig", Text, ""),
    Field::new("clientConnection.acceptContentTypes", "", Text, "").ignored("the API server is asked for JSON"),
    Field::new("clientConnection.contentType", "kube-api-content-type", Text, "application/vnd.kubernetes.protobuf")
        .ignored("the API server is asked for JSON"),
    Field::new("clientConnection.qps", "kube-api-qps", Number, "5").ignored(CLIENT),
    Field::new("clientConnection.burst", "kube-api-burst", Int(0, INT32), "10").ignored(CLIENT),
    Field::new("logging.format", "logging-format", Text, "text"),
    Field::new("logging.flushFrequency", "log-flush-frequency", Nanoseconds, "5s")
        .ignored("every line is written at once"),
    Field::new("logging.verbosity", "v", Int(0, INT32), "0"),
    Field::new("logging.vmodule", "vmodule", Levels, "")
        .ignored("it names files of kube-proxy's source; --log-level takes target=level,…"),
    Field::new("logging.options.text.splitStream", "log-text-split-stream", Bool, "false").ignored(STREAMS),
    Field::new("logging.options.text.infoBufferSize", "log-text-info-buffer-size", Quantity, "0").ignored(STREAMS),
    Field::new("logging.options.json.splitStream", "log-json-split-stream", Bool, "false").ignored(STREAMS),
    Field::new("logging.options.json.infoBufferSize", "log-json-info-buffer-size", Quantity, "0").ignored(STREAMS),
    Field::new("hostnameOverride", "hostname-override", Text, ""),
    Field::new("bindAddress", "bind-address", Text, "0.0.0.0"),
    Field::new("healthzBindAddress", "healthz-bind-address", Text, "0.0.0.0:10256"),
    Field::new("metricsBindAddress", "metrics-bind-address", Text, "127.0.0.1:10249"),
    Field::new("bindAddressHardFail", "bind-address-hard-fail", Bool, "false"),
    Field::new("enableProfiling", "profiling", Bool, "false"),
    Field::new("showHiddenMetricsForVersion", "show-hidden-metrics-for-version", MinorVersion, "")
        .ignored("no metric is hidden"),
    Field::new("mode", "proxy-mode", Text, ""),
    Field::new("iptables.masqueradeBit", "iptables-masquerade-bit", Int(0, 31), "14")
        .zero_counts()
        .only_in(NETFILTER, "no packet is marked"),
    Field::new("iptables.masqueradeAll", "masquerade-all", Bool, "false"),
    Field::new("iptables.localhostNodePorts", "iptables-localhost-nodeports", Bool, "").zero_counts(),
    Field::new("iptables.syncPeriod", "iptables-sync-period", Period, "30s"),
    Field::new("iptables.minSyncPeriod", "iptables-min-sync-period", Duration, "0s").theirs("1s"),
    Field::new("ipvs.syncPeriod", "ipvs-sync-period", Period, "30s"),
    Field::new("ipvs.minSyncPeriod", "ipvs-min-sync-period", Duration, "0s"),
    Field::new("ipvs.scheduler", "ipvs-scheduler", Text, "rr").only_in(IPVS, OF_IPVS),
    Field::new("ipvs.excludeCIDRs", "ipvs-exclude-cidrs", List, "")
        .ignored("virtual servers of others are left alone, wherever they are"),
    Field::new("ipvs.strictARP", "ipvs-strict-arp", Bool, "false").only_in(IPVS, OF_IPVS),
    Field::new("ipvs.tcpTimeout", "ipvs-tcp-timeout", Duration, "0s").ignored(IPVS_TIMES),
    Field::new("ipvs.tcpFinTimeout", "ipvs-tcpfin-timeout", Duration, "0s").ignored(IPVS_TIMES),
    Field::new("ipvs.udpTimeout", "ipvs-udp-timeout", Duration, "0s").ignored(IPVS_TIMES),
    // Of mode nftables, in place of those of `iptables`.
    Field::new("nftables.masqueradeBit", "", Int(0, 31), "14").zero_counts(),
    Field::new("nftables.masqueradeAll", "", Bool, "false"),
    Field::new("nftables.syncPeriod", "", Period, "30s"),
    Field::new("nftables.minSyncPeriod", "", Duration, "0s").theirs("1s"),
    Field::new("winkernel.networkName", "network-name", Text, "").ignored(WINDOWS),
    Field::new("winkernel.sourceVip", "source-vip", Text, "").ignored(WINDOWS),
    Field::new("winkernel.enableDSR", "enable-dsr", Bool, "false").ignored(WINDOWS),
    Field::new("winkernel.rootHnsEndpointName", "root-hnsendpoint-name", Text, "").ignored(WINDOWS),
    Field::new("winkernel.forwardHealthCheckVip", "forward-healthcheck-vip", Bool, "false").ignored(WINDOWS),
    Field::new("detectLocalMode", "detect-local-mode", Text, ""),
    Field::new("detectLocal.bridgeInterface", "pod-bridge-interface", Text, ""),
    Field::new("detectLocal.interfaceNamePrefix", "pod-interface-name-prefix", Text, ""),
    Field::new("clusterCIDR", "cluster-cidr", Text, ""),
    Field::new("nodePortAddresses", "nodeport-addresses", List, ""),
    Field::new("oomScoreAdj", "oom-score-adj", Int(-1000, 1000), "").zero_counts(),
    Field::new("conntrack.maxPerCore", "conntrack-max-per-core", Int(0, INT32), "")
        .theirs("32768")
        .zero_counts()
        .only_in(NETFILTER, OWN_TABLE),
    Field::new("conntrack.min", "conntrack-min", Int(0, INT32), "")
        .theirs("131072")
        .zero_counts()
        .only_in(NETFILTER, OWN_TABLE),
    Field::new("conntrack.tcpEstablishedTimeout", "conntrack-tcp-timeout-established", Duration, "").zero_counts(),
    Field::new("conntrack.tcpCloseWaitTimeout", "conntrack-tcp-timeout-close-wait", Duration, "").zero_counts(),
    Field::new("conntrack.tcpBeLiberal", "conntrack-tcp-be-liberal", Bool, "false")
        .only_in(NETFILTER, "its table keeps no windows, so no packet is out of one"),
    Field::new("conntrack.udpTimeout", "conntrack-udp-timeout", Duration, ""),
    Field::new("conntrack.udpStreamTimeout", "conntrack-udp-timeout-stream", Duration, ""),
    Field::new("configSyncPeriod", "config-sync-period", Period, "15m")
        .ignored("changes are watched, and a lost watch lists everything again"),
    Field::new("portRange", "", Text, "").ignored("kube-proxy has no use for it either"),
    Field::new("windowsRunAsService", "windows-service", Bool, "false").ignored(WINDOWS),
];

const IPVS_TIMES: &str = "the kernel's times stand; `ipvsadm --set` changes them";

const USERSPACE: &str = "kube-proxy gave it up with its userspace mode (1.26)";

/// Fields of the same version that kube-proxy once had, and gave up: it warns of them as of any that it does not know, and goes on; old
/// ConfigMaps have them.
pub const GIVEN_UP: &[Field] = &[
    Field::new("conntrack.max", "", Int(0, INT32), "")
        .ignored("kube-proxy gave it up (1.15); conntrack.maxPerCore and conntrack.min are what is left of it"),
    Field::new("resourceContainer", "", Text, "").ignored("kube-proxy gave it up (1.16)"),
    Field::new("udpIdleTimeout", "", Duration, "").ignored(USERSPACE),
    // What the former was called at first.
    Field::new("udpTimeoutMilliseconds", "", Duration, "").ignored(USERSPACE),
];

/// Options of kube-proxy's that no field has.
pub const OPTIONS: &[Field] = &[
    Field::new("", "boot-id-file", Text, "").ignored("the machine's name is asked of no file"),
    Field::new("", "machine-id-file", Text, "").ignored("the machine's name is asked of no file"),
];

/// Fields and options that nothing here goes by, and that are options.
pub fn without_effect() -> impl Iterator<Item = &'static Field> {
    let ignored = |field: &&Field| matches!(field.here, super::Here::Ignored(_)) && !field.flag.is_empty();
    FIELDS.iter().chain(OPTIONS).filter(ignored)
}

/// Whether an option is not read where there is a file (contract A142): those are that a field of the file could say, but for the
/// node's name and what is about the log.
pub fn gives_way(flag: &str) -> bool {
    let deprecated = ["healthz-port", "metrics-port"];
    let field = FIELDS.iter().find(|field| field.flag == flag);
    deprecated.contains(&flag)
        || field.is_some_and(|field| field.path != "hostnameOverride" && !field.path.starts_with("logging."))
}

/// The option that a field of the file sets in this mode; empty: none. What `iptables` and `nftables` both have is read from the section
/// of the mode, as by kube-proxy, where `nftables` counts in its own mode alone.
pub fn option_of(field: &'static Field, mode: ProxyMode) -> &'static str {
    let (section, rest) = field.path.split_once('.').unwrap_or_default();
    let beside = |section: &str| FIELDS.iter().find(|other| other.path.split_once('.') == Some((section, rest)));
    match (section, mode) {
        ("nftables", ProxyMode::Nftables) => beside("iptables").map_or("", |field| field.flag),
        ("nftables", _) => "",
        ("iptables", ProxyMode::Nftables) if beside("nftables").is_some() => "",
        _ => field.flag,
    }
}

/// Why a field is not read where this mode is asked for: it is of a section that is another mode's, or such a section has it instead.
pub fn elsewhere(field: &Field, asked: ProxyMode) -> Option<String> {
    let (section, rest) = field.path.split_once('.')?;
    let of_section = |section: &str| FIELDS.iter().any(|other| other.path.split_once('.') == Some((section, rest)));
    let is_period = ["syncPeriod", "minSyncPeriod"].contains(&rest);
    match (section, asked) {
        ("nftables", ProxyMode::Nftables) | ("ipvs", ProxyMode::Ipvs) => None,
        ("nftables", _) => Some("it counts where mode nftables is asked for".to_owned()),
        ("ipvs", _) if is_period => Some("it counts where mode ipvs is asked for".to_owned()),
        ("iptables", ProxyMode::Nftables) if of_section("nftables") => {
            Some(format!("where mode nftables is asked for, nftables.{rest} counts"))
        }
        ("iptables", ProxyMode::Ipvs) if is_period => Some(format!("where mode ipvs is asked for, ipvs.{rest} counts")),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::config::Here;

    /// What kube-proxy 1.36 has, taken from its source: `options.go` and `types.go`.
    const UPSTREAM: &str = include_str!("kube_proxy_names.txt");

    fn upstream(what: &str) -> BTreeSet<&'static str> {
        let section = UPSTREAM.split(&format!("[{what}]\n")).nth(1).unwrap();
        section.lines().take_while(|line| !line.starts_with('[')).filter(|line| !line.is_empty()).collect()
    }

    #[test]
    fn every_field_of_kube_proxys_is_known_and_no_other_a149() {
        let ours: BTreeSet<_> = FIELDS.iter().map(|field| field.path).collect();
        assert_eq!(ours, upstream("fields"));
        for field in FIELDS.iter().chain(GIVEN_UP) {
            if let Here::Ignored(why) | Here::In(_, why) = field.here {
                assert!(why.len() > 10, "{field:?}");
            }
        }
    }

    #[test]
    fn each_mode_has_its_section() {
        let field = |path: &str| FIELDS.iter().find(|field| field.path == path).unwrap();
        for (path, mode, option) in [
            ("nftables.masqueradeAll", ProxyMode::Nftables, "masquerade-all"),
            ("nftables.masqueradeAll", ProxyMode::Auto, ""),
            ("nftables.syncPeriod", ProxyMode::Nftables, "iptables-sync-period"),
            ("iptables.masqueradeAll", ProxyMode::Nftables, ""),
            ("iptables.masqueradeAll", ProxyMode::Ipvs, "masquerade-all"),
            ("iptables.masqueradeBit", ProxyMode::Ebpf, "iptables-masquerade-bit"),
            ("iptables.localhostNodePorts", ProxyMode::Nftables, "iptables-localhost-nodeports"),
            ("ipvs.syncPeriod", ProxyMode::Iptables, "ipvs-sync-period"),
            ("bindAddress", ProxyMode::Nftables, "bind-address"),
        ] {
            assert_eq!(option_of(field(path), mode), option, "{path} {mode}");
        }
        // And whoever says it in another section hears of it.
        for (path, mode, why) in [
            ("nftables.masqueradeAll", ProxyMode::Auto, "where mode nftables is asked for"),
            ("nftables.syncPeriod", ProxyMode::Ipvs, "where mode nftables is asked for"),
            ("iptables.masqueradeBit", ProxyMode::Nftables, "nftables.masqueradeBit counts"),
            ("iptables.syncPeriod", ProxyMode::Nftables, "nftables.syncPeriod counts"),
            ("iptables.minSyncPeriod", ProxyMode::Ipvs, "ipvs.minSyncPeriod counts"),
            ("ipvs.syncPeriod", ProxyMode::Ebpf, "where mode ipvs is asked for"),
        ] {
            let said = elsewhere(field(path), mode).unwrap_or_default();
            assert!(said.contains(why), "{path} {mode}: {said:?}");
        }
        for (path, mode) in [
            ("nftables.masqueradeAll", ProxyMode::Nftables),
            ("iptables.masqueradeAll", ProxyMode::Ipvs),
            ("iptables.syncPeriod", ProxyMode::Auto),
            ("iptables.localhostNodePorts", ProxyMode::Nftables),
            ("ipvs.syncPeriod", ProxyMode::Ipvs),
            ("ipvs.scheduler", ProxyMode::Auto),
            ("bindAddress", ProxyMode::Nftables),
        ] {
            assert_eq!(elsewhere(field(path), mode), None, "{path} {mode}");
        }
    }

    #[test]
    fn what_gives_way_to_a_file_a142() {
        for (flag, does) in [
            ("proxy-mode", true),
            ("kubeconfig", true),
            ("healthz-port", true),
            ("hostname-override", false),
            ("v", false),
            ("logging-format", false),
            ("master", false),
            ("socket-lb", false),
        ] {
            assert_eq!(gives_way(flag), does, "{flag}");
        }
    }
}
