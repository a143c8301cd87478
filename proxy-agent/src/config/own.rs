//! The fields of the file's second document, `ProxyAgentConfiguration`: what kube-proxy has no word for. Each has an option of the same meaning.

use super::{
    Field,
    Kind::{Bool, Duration, Int, List, Period, Text},
    ProxyMode,
};

const ENTRIES: super::Kind = Int(1, 1 << 30);

const EBPF: &[ProxyMode] = &[ProxyMode::Ebpf];
const SOCKETS: &str = "sockets are translated by eBPF alone";
const PROGRAMS: &str = "there are no programs but eBPF's";
const MAPS: &str = "the map is eBPF's";

pub const FIELDS: &[Field] = &[
    Field::new("source", "source", Text, ""),
    Field::new("master", "master", Text, ""),
    Field::new("proxyMode", "proxy-mode", Text, "auto"),
    Field::new("socketLb", "socket-lb", Text, "all").only_in(EBPF, SOCKETS),
    Field::new("podAnnotations", "pod-annotations", Bool, "false").only_in(EBPF, SOCKETS),
    Field::new("xdp", "xdp", Text, "off").only_in(EBPF, PROGRAMS),
    Field::new("devices", "devices", List, ""),
    Field::new("uplinks", "uplinks", List, ""),
    Field::new("algorithm", "algorithm", Text, ""),
    Field::new("externalIps", "external-ips", Bool, "true").zero_counts(),
    Field::new("masqueradePorts", "masquerade-ports", Text, "1024-29999"),
    Field::new("iptablesFlavour", "iptables-flavour", Text, "").only_in(&[ProxyMode::Iptables], "it is of iptables"),
    Field::new("cgroupRoot", "cgroup-root", Text, "").only_in(EBPF, SOCKETS),
    Field::new("bpffs", "bpffs", Text, super::BPFFS),
    Field::new("syncPeriod", "sync-period", Period, "").zero_counts(),
    Field::new("minSyncPeriod", "min-sync-period", Duration, "").zero_counts(),
    Field::new("maps.frontends", "map-frontends", ENTRIES, "65536").only_in(EBPF, MAPS),
    Field::new("maps.slots", "map-slots", ENTRIES, "1048576").only_in(EBPF, MAPS),
    Field::new("maps.services", "map-services", ENTRIES, "65536").only_in(EBPF, MAPS),
    Field::new("maps.connections", "map-connections", ENTRIES, "262144").only_in(EBPF, MAPS),
    Field::new("maps.halfOpen", "map-half-open", ENTRIES, "65536").only_in(EBPF, MAPS),
    Field::new("maps.datagrams", "map-datagrams", ENTRIES, "65536").only_in(EBPF, MAPS),
    Field::new("maps.affinity", "map-affinity", ENTRIES, "65536"),
    Field::new("maps.sourceRanges", "map-source-ranges", ENTRIES, "65536").only_in(EBPF, MAPS),
    Field::new("log.format", "log-format", Text, ""),
    Field::new("log.level", "log-level", Text, ""),
    Field::new("log.ebpfLevel", "ebpf-log-level", Text, "off").only_in(EBPF, PROGRAMS),
];
