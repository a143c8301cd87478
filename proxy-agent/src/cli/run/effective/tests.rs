use std::collections::BTreeSet;

use clap::Parser;

use super::*;
use crate::{config::LocalMode, model::address::NodePortAddresses};

#[derive(Parser)]
#[command(name = "run")]
struct Program {
    #[command(flatten)]
    given: Given,
}

pub(in crate::cli::run) fn given(options: &[&str]) -> Given {
    let words = ["run"].into_iter().chain(options.iter().copied());
    Program::try_parse_from(words).unwrap_or_else(|error| panic!("{options:?}: {error}")).given
}

const FILE: &str = "/etc/agent.conf";

pub(in crate::cli::run) fn read(options: &[&str], text: &str) -> anyhow::Result<Effective> {
    with_file(&given(options), Path::new(FILE), text.to_owned())
}

pub(in crate::cli::run) fn theirs(fields: &str) -> String {
    format!("apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n{fields}\n")
}

pub(in crate::cli::run) fn own(fields: &str) -> String {
    format!("---\napiVersion: proxy-agent/v1alpha1\nkind: ProxyAgentConfiguration\n{fields}\n")
}

fn value(effective: &Effective, path: &str) -> (String, String) {
    let one = effective.in_force().into_iter().find(|one| one.field.path == path).unwrap();
    (one.text, one.from.to_string())
}

/// kube-proxy's own list of options: a name in it that is neither taken nor refused for a reason is one that somebody's DaemonSet breaks by.
#[test]
fn every_option_of_kube_proxys_is_taken_a148() {
    let names = include_str!("../../../config/kube_proxy_names.txt").split("[options]\n").nth(1).unwrap();
    let command = given::command();
    let ours: BTreeSet<_> = command.get_arguments().filter_map(|arg| arg.get_long()).collect();
    for name in names.lines().filter(|name| *name != "help") {
        assert!(ours.contains(name), "--{name}");
    }
    let fields = Document::ALL.into_iter().flat_map(|document| document.fields()).chain(kube_proxy::OPTIONS);
    for field in fields.filter(|field| !field.flag.is_empty()) {
        assert!(ours.contains(field.flag), "{field:?}");
    }
    // And each of ours can be said in a file, but for what is about the file itself, and two that kube-proxy itself gives up.
    let elsewhere = ["config", "write-config-to", "cleanup", "init-only", "version", "healthz-port", "metrics-port"];
    for long in ours {
        let has = |field: &Field| field.flag == long;
        let known = Document::ALL.into_iter().any(|document| document.fields().iter().any(has));
        assert!(known || kube_proxy::OPTIONS.iter().any(has) || elsewhere.contains(&long), "--{long} has no field");
    }
}

/// What is of no effect is said, with the reason; what only repeats kube-proxy's default asks for nothing.
#[test]
fn what_has_no_effect_is_said_once_with_the_reason() {
    for field in kube_proxy::without_effect() {
        let asked = match field.kind {
            config::Kind::Bool => "true",
            config::Kind::Levels | config::Kind::Gates => "proxier=4",
            config::Kind::List => "10.0.0.0/8",
            config::Kind::MinorVersion => "1.35",
            config::Kind::Text => "something",
            config::Kind::Duration | config::Kind::Period | config::Kind::Nanoseconds => "7m",
            config::Kind::Int(..) | config::Kind::Number | config::Kind::Quantity => "77",
        };
        let option = format!("--{}={asked}", field.flag);
        let effective = of(&given(&[&option])).unwrap();
        let Here::Ignored(why) = field.here else { panic!("{field:?}") };
        let warnings = effective.warnings(ProxyMode::Ebpf);
        assert_eq!(warnings.len(), 1, "{option}: {warnings:?}");
        let words = [field.name().to_string(), asked.to_owned(), format!("(--{})", field.flag), why.to_owned()];
        assert!(words.iter().all(|word| warnings[0].contains(word)), "{option}: {warnings:?}");
        let default = format!("--{}={}", field.flag, field.default);
        if !field.default.is_empty() {
            assert_eq!(of(&given(&[&default])).unwrap().warnings(ProxyMode::Ebpf), [""; 0], "{default}");
        }
    }
    let gates =
        of(&given(&["--feature-gates=AllAlpha=true", "--feature-gates=AllowServiceExternalIPs=false"])).unwrap();
    assert_eq!((gates.warnings(ProxyMode::Ebpf).len(), gates.args.feature_gates.len()), (1, 2));
    assert!(
        gates.warnings(ProxyMode::Ebpf)[0].starts_with("featureGates AllAlpha=true (--feature-gates) has no effect")
    );
    assert_eq!(of(&given(&[])).unwrap().warnings(ProxyMode::Ebpf), [""; 0]);
}

#[test]
fn what_netfilter_alone_goes_by_is_said_with_ebpf() {
    let effective = read(&[], &theirs("conntrack: {maxPerCore: 5, tcpBeLiberal: true, udpTimeout: 5s}")).unwrap();
    assert_eq!(effective.warnings(ProxyMode::Ebpf).len(), 2, "{:?}", effective.warnings(ProxyMode::Ebpf));
    assert_eq!(effective.warnings(ProxyMode::Iptables), [""; 0]);
    // kind's.
    assert_eq!(read(&[], &theirs("conntrack: {maxPerCore: 0}")).unwrap().warnings(ProxyMode::Ebpf), [""; 0]);
}

#[test]
fn options_are_written_as_kube_proxys() {
    let args = |options: &[&str]| of(&given(options)).unwrap().args;
    assert!(args(&["--masquerade-all"]).masquerade_all && args(&["--masquerade-all=T"]).masquerade_all);
    assert!(!args(&["--masquerade-all=false"]).masquerade_all);
    assert_eq!(args(&["--oom-score-adj", "-998"]).oom_score_adj, Some(-998));
    for verbose in [&["-v", "4"][..], &["-v4"], &["-v=4"], &["--v=4"], &["--v", "4"]] {
        assert_eq!(args(verbose).log.v, 4, "{verbose:?}");
    }
    // What is said twice is said last; lists grow.
    assert_eq!(args(&["-v=1", "--v=2"]).log.v, 2);
    let lists = args(&["--nodeport-addresses=10.0.0.0/8,fd00::/8", "--nodeport-addresses", "192.0.2.0/24"]);
    assert_eq!(lists.nodeport_addresses.len(), 3);
    // Empty is unset.
    for empty in
        ["--proxy-mode=", "--kubeconfig=", "--master=", "--nodeport-addresses=", "--cluster-cidr=", "--network-name="]
    {
        assert_eq!(of(&given(&[empty])).unwrap().warnings(ProxyMode::Ebpf), [""; 0], "{empty}");
    }
    assert_eq!(args(&["--logging-format=json"]).log.format(), super::super::args::LogFormat::Json);
    for (options, filter) in [
        (&["-v2"][..], "info"),
        (&["-v4"], "info,proxy_agent=debug"),
        (&["-v=10"], "info,proxy_agent=trace"),
        (&["-v=10", "--log-level=warn"], "warn"),
    ] {
        assert_eq!(args(options).log.filter(), filter, "{options:?}");
    }
}

#[test]
fn what_does_not_exist_or_makes_no_sense_is_refused() {
    for wrong in [
        "--no-such-option",
        "--healthz-bind-address=0.0.0.0:0",
        "--metrics-bind-address=[::1]:0",
        "--healthz-port=65536",
        "--show-hidden-metrics-for-version=latest",
        "--hostname-override= ",
        "--log-level=proxy_agent=loud",
        "--proxy-mode=kernelspace",
        "--proxy-mode=userspace",
        "--iptables-masquerade-bit=32",
        "--oom-score-adj=1001",
        "--conntrack-min=-1",
        "--config-sync-period=0s",
        "--iptables-sync-period=0s",
        "--feature-gates=NoSuchGate=true",
        "--logging-format=xml",
        "--bind-address=host",
        "--nodeport-addresses=primary2",
        "--profiling=perhaps",
        "--vmodule=a",
        "-v=-1",
    ] {
        assert!(Program::try_parse_from(["run", wrong]).is_err(), "{wrong}");
    }
    for (together, word) in [
        (&["--iptables-min-sync-period=40s"][..], "--sync-period"),
        (&["--proxy-mode=ipvs", "--ipvs-sync-period=1s", "--ipvs-min-sync-period=2s"], "--sync-period"),
        (&["--nodeport-addresses=primary,10.0.0.0/8"], "primary alone"),
        (&["--detect-local-mode=BridgeInterface"], "--pod-bridge-interface"),
    ] {
        let error = of(&given(together)).unwrap_err().to_string();
        assert!(error.contains(word), "{together:?}: {error}");
    }
}

#[test]
fn periods_are_of_the_mode() {
    let seconds = |options: &[&str]| {
        let Together { min_sync_period, sync_period, .. } = Together::of(&of(&given(options)).unwrap().args).unwrap();
        (min_sync_period.as_secs(), sync_period.as_secs())
    };
    let both = ["--iptables-sync-period=10s", "--ipvs-sync-period=20s", "--iptables-min-sync-period=1s"];
    assert_eq!(seconds(&[]), (0, 30));
    assert_eq!(seconds(&both), (1, 10));
    assert_eq!(seconds(&[&both[..], &["--proxy-mode=ipvs"]].concat()), (0, 20));
    assert_eq!(seconds(&[&both[..], &["--sync-period=5s", "--min-sync-period=0"]].concat()), (0, 5));
}

#[test]
fn addresses_to_listen_on_go_by_the_own_one_a125() {
    let binds = |options: &[&str]| {
        let (healthz, metrics) = of(&given(options)).unwrap().args.binds();
        [healthz, metrics].map(|bind| bind.map_or_else(String::new, |bind| bind.to_string()))
    };
    assert_eq!(binds(&[]), ["0.0.0.0:10256", "127.0.0.1:10249"]);
    assert_eq!(binds(&["--bind-address=::"]), ["[::]:10256", "[::1]:10249"]);
    assert_eq!(binds(&["--healthz-port=0", "--metrics-port=1"]), ["", "127.0.0.1:1"]);
    assert_eq!(
        binds(&[
            "--healthz-bind-address=1.2.3.4",
            "--healthz-port=5",
            "--metrics-bind-address=1.2.3.4:6",
            "--metrics-port=7"
        ]),
        ["1.2.3.4:5", "1.2.3.4:6"]
    );
    let primary = |options: &[&str]| Together::of(&of(&given(options)).unwrap().args).unwrap().node_port_addresses;
    let named = ["--nodeport-addresses=primary", "--bind-address=192.0.2.9"];
    assert_eq!(primary(&named), NodePortAddresses::Primary(Some("192.0.2.9".parse().unwrap())));
    assert_eq!(primary(&["--nodeport-addresses=primary", "--bind-address=0.0.0.0"]), NodePortAddresses::Primary(None));
}

#[test]
fn a_file_says_what_options_say() {
    let effective = read(
        &[],
        &(theirs(
            "mode: nftables\nbindAddress: '::'\nnodePortAddresses: [10.0.0.0/8, fd00::/8]\noomScoreAdj: -5\n\
             nftables: {masqueradeBit: 3, masqueradeAll: true, syncPeriod: 10s}\niptables: {masqueradeBit: 4, syncPeriod: 11s}\n\
             detectLocalMode: NodeCIDR\nlogging: {verbosity: 4, format: json}\nhostnameOverride: Node-7\n\
             clientConnection: {kubeconfig: /k}\nconntrack: {tcpEstablishedTimeout: 1h}",
        ) + &own("socketLb: node\nmaps: {slots: 99}\ndevices: [eth*, '!eth1']\nexternalIps: false\nsyncPeriod: null")),
    )
    .unwrap();
    let args = &effective.args;
    assert_eq!(args.proxy_mode, ProxyMode::Nftables);
    assert_eq!((args.netfilter.iptables_masquerade_bit, args.masquerade_all), (3, true));
    assert_eq!(Together::of(args).unwrap().sync_period.as_secs(), 10);
    assert_eq!(args.detect_local_mode, Some(LocalMode::NodeCidr));
    assert_eq!((args.oom_score_adj, args.hostname_override.as_deref()), (Some(-5), Some("Node-7")));
    assert_eq!(args.kubeconfig.as_deref(), Some(Path::new("/k")));
    assert_eq!((args.maps.map_slots, args.external_ips, args.devices.len()), (99, false, 2));
    assert_eq!(args.log.filter(), "info,proxy_agent=debug");
    assert_eq!(args.binds().0.unwrap().to_string(), "[::]:10256");
    assert_eq!(value(&effective, "nftables.masqueradeBit"), ("3".into(), format!("{FILE}:7")));
    assert_eq!(value(&effective, "maps.slots"), ("99".into(), format!("{FILE}:18")));
    assert_eq!(value(&effective, "xdp"), ("off".into(), "default".into()));
}

/// Each mode has its section: what is said in another's is not read, or means nothing, and is named.
#[test]
fn what_is_of_another_mode_is_named() {
    let named = |effective: &Effective, running| -> Vec<String> {
        let warnings = effective.warnings(running);
        assert!(warnings.iter().all(|warning| warning.contains(" has no effect")), "{warnings:?}");
        warnings.into_iter().map(|warning| warning.split(' ').next().unwrap_or_default().to_owned()).collect()
    };
    let sections = "nftables: {masqueradeBit: 0, masqueradeAll: true, syncPeriod: 10s, minSyncPeriod: 2s}\n\
                    iptables: {masqueradeBit: 4, masqueradeAll: true, syncPeriod: 11s, minSyncPeriod: 3s}\n\
                    ipvs: {scheduler: lc, strictARP: true, syncPeriod: 12s, minSyncPeriod: 4s}";
    let of_ipvs = ["ipvs.syncPeriod", "ipvs.minSyncPeriod", "ipvs.scheduler", "ipvs.strictARP"];
    let of_nftables =
        ["nftables.masqueradeBit", "nftables.masqueradeAll", "nftables.syncPeriod", "nftables.minSyncPeriod"];
    let beside_nftables =
        ["iptables.masqueradeBit", "iptables.masqueradeAll", "iptables.syncPeriod", "iptables.minSyncPeriod"];
    for (mode, running, lost) in [
        ("nftables", ProxyMode::Nftables, [&beside_nftables[..], &of_ipvs].concat()),
        ("iptables", ProxyMode::Iptables, [&of_ipvs[..], &of_nftables].concat()),
        ("ipvs", ProxyMode::Ipvs, [&["iptables.syncPeriod", "iptables.minSyncPeriod"][..], &of_nftables].concat()),
        ("ebpf", ProxyMode::Ebpf, [&["iptables.masqueradeBit"][..], &of_ipvs, &of_nftables].concat()),
        // Chosen by itself, and nobody asked for it by name.
        ("auto", ProxyMode::Nftables, [&of_ipvs[..], &of_nftables].concat()),
        ("auto", ProxyMode::Ipvs, [&of_ipvs[..2], &of_nftables].concat()),
    ] {
        let effective = read(&[], &(theirs(sections) + &own(&format!("proxyMode: {mode}")))).unwrap();
        assert_eq!(named(&effective, running), lost, "{mode}, {running} runs");
    }
    // With the place, and what to do.
    let both = read(&[], &(theirs("nftables: {masqueradeAll: true}") + &own("proxyMode: iptables"))).unwrap();
    let text = both.warnings(ProxyMode::Iptables).join("\n");
    let wanted =
        format!("nftables.masqueradeAll true ({FILE}:3) has no effect: it counts where mode nftables is asked for");
    assert_eq!(text, wanted);

    let ours = "socketLb: node\npodAnnotations: true\nxdp: auto\niptablesFlavour: nft\ncgroupRoot: /c\nmaps: {slots: 9, affinity: 9}\n\
                log: {ebpfLevel: info}";
    let effective = read(&[], &own(ours)).unwrap();
    assert_eq!(named(&effective, ProxyMode::Ebpf), ["iptablesFlavour"]);
    let of_ebpf = ["socketLb", "podAnnotations", "xdp", "cgroupRoot", "maps.slots", "log.ebpfLevel"];
    assert_eq!(named(&effective, ProxyMode::Iptables), of_ebpf);
    assert!(effective.warnings(ProxyMode::Iptables)[0].contains("has no effect in mode iptables: sockets"));
    // What is given by option is told apart likewise.
    let options = of(&given(&["--ipvs-scheduler=lc", "--ipvs-sync-period=5s", "--map-slots=7"])).unwrap();
    assert_eq!(named(&options, ProxyMode::Ebpf), ["ipvs.syncPeriod", "ipvs.scheduler"]);
}

/// A ConfigMap of an old kubeadm, or of EKS: what kube-proxy gave up is named, once each, and all else is in force.
#[test]
fn what_kube_proxy_gave_up_is_named_and_passed_over() {
    let old = theirs(
        "mode: ipvs\nudpIdleTimeout: 250ms\nudpTimeoutMilliseconds: 250ms\nresourceContainer: /kube-proxy\n\
         portRange: \"\"\nconntrack: {max: 65536, udpTimeout: 5s}",
    );
    let effective = read(&[], &old).unwrap();
    assert_eq!(effective.args.conntrack.conntrack_udp_timeout.map(|it| it.as_secs()), Some(5));
    let warnings = effective.warnings(ProxyMode::Ipvs);
    for (name, warning) in [
        ("conntrack.max 65536 (/etc/agent.conf:8) has no effect: kube-proxy gave it up", &warnings[0]),
        ("resourceContainer /kube-proxy (/etc/agent.conf:6) has no effect: ", &warnings[1]),
        ("udpIdleTimeout 250ms (/etc/agent.conf:4) has no effect: ", &warnings[2]),
        ("udpTimeoutMilliseconds 250ms (/etc/agent.conf:5) has no effect: ", &warnings[3]),
    ] {
        assert!(warning.starts_with(name), "{warning}");
    }
    assert_eq!(warnings.len(), 4, "{warnings:?}");
    // As kubeadm wrote what nobody had set.
    let unset = theirs("udpIdleTimeout: 0s\nresourceContainer: \"\"\nconntrack: {max: null}");
    assert_eq!(read(&[], &unset).unwrap().warnings(ProxyMode::Ebpf), [""; 0]);
    // kube-proxy has no such fields any more, so it shall not read them here.
    let yaml = effective.yaml().unwrap();
    assert!(["udpIdle", "udpTimeoutM", "resourceC", "  max:"].iter().all(|gone| !yaml.contains(gone)), "{yaml}");
    // What never was one is an error, as before; so is a value that no kube-proxy would have taken.
    for (fields, words) in [
        ("conntrack: {maximum: 5}", ":3: conntrack.maximum: KubeProxyConfiguration has no such field"),
        ("udpIdleTimeouts: 250ms", ":3: udpIdleTimeouts: KubeProxyConfiguration has no such field"),
        ("resourceContainer: {}", ":3: resourceContainer: must be a text"),
    ] {
        let error = read(&[], &theirs(fields)).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn a_password_is_for_nobody_to_see_but_for_the_file() {
    let hidden = |effective: &Effective| {
        let serve::Shown { configz, flags, .. } = effective.shown().unwrap();
        let table = value(&effective.public(), "master").0;
        for shown in [configz, flags["master"].clone(), table, effective.public().yaml().unwrap()] {
            assert!(shown.contains("https://me:xxxxx@api:6443") && !shown.contains("secret"), "{shown}");
        }
        assert!(effective.yaml().unwrap().contains("https://me:secret@api:6443"), "for --write-config-to");
    };
    hidden(&of(&given(&["--master=https://me:secret@api:6443"])).unwrap());
    let by_file = |password: &str| read(&[], &own(&format!("master: https://me:{password}@api:6443"))).unwrap();
    hidden(&by_file("secret"));
    assert_eq!(by_file("secret").changes(&by_file("secret2")), ["master"], "another password is a change");
}

/// Only what something goes by is a reason to start anew.
#[test]
fn what_counts_in_the_mode_that_runs() {
    let effective = read(&[], &theirs("mode: ipvs")).unwrap();
    for (long, running, counts) in [
        ("ipvs-scheduler", ProxyMode::Ipvs, true),
        ("ipvs-sync-period", ProxyMode::Ipvs, true),
        ("iptables-sync-period", ProxyMode::Ipvs, false),
        ("socket-lb", ProxyMode::Ipvs, false),
        ("cgroup-root", ProxyMode::Ipvs, false),
        ("socket-lb", ProxyMode::Ebpf, true),
        ("kube-api-qps", ProxyMode::Ipvs, false),
        ("proxy-mode", ProxyMode::Ipvs, true),
        ("map-affinity", ProxyMode::Ipvs, true),
        ("healthz-port", ProxyMode::Ipvs, true),
    ] {
        assert_eq!(effective.counts(long, running), counts, "{long} {running}");
    }
    let effective = read(&[], &theirs("mode: nftables")).unwrap();
    assert!(effective.counts("iptables-sync-period", ProxyMode::Nftables), "by the name of its own section");
}

/// A142: kube-proxy's options give way to a file and are named; those that do not are ours, the node's name, and what is about the log.
#[test]
fn who_wins() {
    let file = theirs("mode: ipvs\nhostnameOverride: in-file\nhealthzBindAddress: 1.2.3.4:5")
        + &own("socketLb: node\nxdp: generic");
    let options = [
        "--proxy-mode=ebpf",
        "--hostname-override=by-option",
        "--masquerade-all",
        "--socket-lb=off",
        "-v=3",
        "--master=x",
    ];
    let effective = read(&options, &file).unwrap();
    let args = &effective.args;
    assert_eq!((args.proxy_mode, args.masquerade_all, args.log.v), (ProxyMode::Ipvs, false, 3));
    assert_eq!((args.hostname_override.as_deref(), args.master.as_deref()), (Some("by-option"), Some("x")));
    assert_eq!(value(&effective, "socketLb"), ("off".into(), "--socket-lb".into()));
    assert_eq!(value(&effective, "xdp"), ("generic".into(), format!("{FILE}:10")));
    let warnings = effective.warnings(ProxyMode::Ipvs);
    // The other two are of eBPF.
    assert_eq!(warnings.len(), 3, "{warnings:?}");
    assert!(warnings[0].starts_with("--proxy-mode, --masquerade-all: not read beside --config"), "{warnings:?}");
    // A name that is none is in nobody's way (kubeadm's `--hostname-override=$(NODE_NAME)` where the variable is empty).
    let unnamed = read(&["--hostname-override="], &file).unwrap();
    assert_eq!(value(&unnamed, "hostnameOverride"), ("in-file".into(), format!("{FILE}:4")));
    assert_eq!(of(&given(&["--hostname-override="])).unwrap().args.hostname_override.as_deref(), Some(""));
    // A directory is read in place of the cluster that the file names.
    let source = read(&["--source=/objects"], &theirs("clientConnection: {kubeconfig: /k}")).unwrap();
    assert_eq!((source.args.kubeconfig, source.args.source), (None, Some("/objects".into())));
}

#[test]
fn our_word_for_the_mode_is_the_last_one() {
    let both =
        read(&[], &(theirs("mode: iptables\nnftables: {masqueradeAll: true}") + &own("proxyMode: nftables"))).unwrap();
    assert_eq!((both.args.proxy_mode, both.args.masquerade_all), (ProxyMode::Nftables, true));
    let kubeadm = read(&[], include_str!("../../../config/file/kubeadm.yaml")).unwrap();
    assert_eq!((kubeadm.args.proxy_mode, kubeadm.notice()), (ProxyMode::Auto, None));
    assert_eq!(kubeadm.warnings(ProxyMode::Ebpf), [""; 0]);
    // What kube-proxy's own --write-config-to writes: its defaults, in words.
    let written = read(&[], include_str!("../../../config/file/kube_proxy.yaml")).unwrap();
    assert_eq!((written.args.proxy_mode, written.args.oom_score_adj), (ProxyMode::Iptables, Some(-999)));
    assert_eq!(written.warnings(ProxyMode::Ebpf), [""; 0]);
    let kind = read(&[], include_str!("../../../config/file/kind.yaml")).unwrap();
    assert_eq!(kind.args.proxy_mode, ProxyMode::Iptables);
    assert!(kind.notice().unwrap().contains("proxyMode: auto"), "{:?}", kind.notice());
    assert_eq!(kind.warnings(ProxyMode::Iptables), [""; 0]);
}

#[test]
fn what_is_wrong_in_a_file_is_named_by_file_line_and_field() {
    for (file, words) in [
        (theirs("mode: userspace"), &["/etc/agent.conf:3: mode: ", "userspace", "auto, ebpf, nftables"][..]),
        (theirs("mode: kernelspace"), &[":3: mode: ", "Windows"]),
        (theirs("\n\nbindAddress: host"), &[":5: bindAddress: ", "no address"]),
        (theirs("healthzBindAddress: host:80"), &[":3: healthzBindAddress: ", "no address to listen on"]),
        (theirs("clusterCIDR: 10.0.0.0/8,10.1.0.0/16"), &[":3: clusterCIDR: ", "one of each family"]),
        (theirs("detectLocalMode: Some"), &[":3: detectLocalMode: ", "InterfaceNamePrefix"]),
        (theirs("hostnameOverride: ' '"), &[":3: hostnameOverride: ", "no name of a node"]),
        (theirs("metricsBindAddress: 127.0.0.1:0"), &[":3: metricsBindAddress: ", "a port is 1 or more"]),
        (theirs("\ndetectLocalMode: BridgeInterface"), &[":4: detectLocalMode: ", "--pod-bridge-interface"]),
        (theirs("iptables: {minSyncPeriod: 31s}"), &[":3: iptables.minSyncPeriod: ", "--min-sync-period"]),
        (
            theirs("mode: nftables\nnftables:\n  syncPeriod: 5s\n  minSyncPeriod: 6s\nmetricsBindAddress: '::'"),
            &[":6: nftables.minSyncPeriod: ", "(6s, --min-sync-period)"],
        ),
        (theirs("ipvs: {minSyncPeriod: 31s}\nmode: ipvs") + &own("syncPeriod: 9s"), &[":3: ipvs.minSyncPeriod: "]),
        (theirs("iptables: {minSyncPeriod: 1s}") + &own("\nminSyncPeriod: 40s"), &[":8: minSyncPeriod: ", "(40s"]),
        (theirs("nodePortAddresses: [primary, 10.0.0.0/8]"), &[":3: nodePortAddresses: ", "primary alone"]),
        (theirs("") + &own("log:\n  level: proxy_agent=loud"), &[":8: log.level: ", "proxy_agent=loud"]),
        (theirs("nodePortAddresses: [10.0.0.1]"), &[":3: nodePortAddresses: ", "10.0.0.1"]),
        (theirs("logging: {format: xml}"), &[":3: logging.format: ", "text, json"]),
        (theirs("") + &own("socketLb: some"), &[":7: socketLb: ", "all, node, off"]),
        (theirs("") + &own("socketlb: node"), &[":7: socketlb: ", "is socketLb meant?"]),
        (theirs("mode: [\n"), &["/etc/agent.conf:"]),
    ] {
        let error = read(&[], &file).unwrap_err();
        let text = format!("{error:#}");
        assert!(words.iter().all(|word| text.contains(word)) && text.lines().count() == 1, "{file}\n{text}");
        assert!(error.is::<UsageError>());
    }
}

/// What is printed says the same when it is read, whatever it was made of.
#[test]
fn what_is_printed_can_be_read_again() {
    for (options, file) in [
        (&[][..], None),
        (
            &[
                "--proxy-mode=ipvs",
                "--ipvs-sync-period=5s",
                "--masquerade-all",
                "-v=4",
                "--devices=a,b",
                "--healthz-port=0",
            ],
            None,
        ),
        (
            &[
                "--kube-api-qps=50",
                "--feature-gates=AllAlpha=true",
                "--vmodule=a=1",
                "--socket-lb=off",
                "--sync-period=9s",
            ],
            None,
        ),
        (&["--metrics-bind-address=", "--external-ips=false", "--bind-address=::1", "--min-sync-period=0"], None),
        (&["--iptables-localhost-nodeports=false", "--conntrack-udp-timeout=5s", "--conntrack-max-per-core=0"], None),
        (&["--hostname-override=n"], Some(include_str!("../../../config/file/kubeadm.yaml").to_owned())),
        (
            &[],
            Some(theirs(
                "mode: nftables\nnftables: {masqueradeAll: true, minSyncPeriod: 2s}\niptables: {masqueradeBit: 5}",
            )),
        ),
    ] {
        let first = match file {
            Some(text) => read(options, &text).unwrap(),
            None => of(&given(options)).unwrap(),
        };
        let yaml = first.yaml().unwrap();
        let again = read(&[], &yaml).unwrap_or_else(|error| panic!("{error:#}\n{yaml}"));
        assert_eq!(again.yaml().unwrap(), yaml);
        let shown = |effective: &Effective| {
            effective.in_force().into_iter().map(|one| (one.field.path, one.text)).collect::<Vec<_>>()
        };
        assert_eq!(shown(&again), shown(&first));
        let said = |effective: &Effective| effective.warnings(ProxyMode::Ebpf).len();
        assert_eq!(
            said(&again),
            said(&first),
            "{:?} {:?}",
            again.warnings(ProxyMode::Ebpf),
            first.warnings(ProxyMode::Ebpf)
        );
    }
}

#[test]
fn the_defaults_as_they_are_printed() {
    insta::assert_snapshot!(of(&given(&["--hostname-override=node1"])).unwrap().yaml().unwrap());
}

/// A120: by API group, as component-base has it, with nothing but what kube-proxy's own would have in its group.
#[test]
fn what_is_in_force_is_shown_by_api_group() {
    let file = theirs("mode: nftables\nclusterCIDR: 10.244.0.0/16\nudpIdleTimeout: 250ms") + &own("socketLb: node");
    let effective = read(&["--hostname-override=n7"], &file).unwrap();
    let shown: serde_json::Value = serde_json::from_str(&effective.shown().unwrap().configz).unwrap();
    let groups: Vec<_> = shown.as_object().unwrap().keys().collect();
    assert_eq!(groups, ["kubeproxy.config.k8s.io", "proxy-agent"]);
    let theirs = &shown["kubeproxy.config.k8s.io"];
    for (path, value) in [
        ("/kind", serde_json::json!("KubeProxyConfiguration")),
        ("/apiVersion", serde_json::json!("kubeproxy.config.k8s.io/v1alpha1")),
        ("/mode", serde_json::json!("nftables")),
        ("/clusterCIDR", serde_json::json!("10.244.0.0/16")),
        ("/hostnameOverride", serde_json::json!("n7")),
        ("/iptables/masqueradeBit", serde_json::json!(14)),
        ("/featureGates", serde_json::json!({})),
        ("/conntrack/maxPerCore", serde_json::Value::Null),
        ("/healthzBindAddress", serde_json::json!("0.0.0.0:10256")),
    ] {
        assert_eq!(theirs.pointer(path), Some(&value), "{path} of {theirs:#}");
    }
    assert_eq!(theirs.get("udpIdleTimeout"), None);
    assert_eq!(shown["proxy-agent"]["socketLb"], "node");
    let flags = effective.shown().unwrap().flags;
    for (flag, value) in
        [("proxy-mode", "nftables"), ("socket-lb", "node"), ("kubeconfig", ""), ("map-slots", "1048576")]
    {
        assert_eq!(flags.get(flag).map(String::as_str), Some(value), "{flag}");
    }
}

#[test]
fn profiling_is_half_of_what_it_was() {
    let warnings = of(&given(&["--profiling"])).unwrap().warnings(ProxyMode::Ebpf);
    assert!(warnings.len() == 1 && warnings[0].contains("(--profiling): /debug/flags/v is served"), "{warnings:?}");
    assert!(read(&[], &theirs("enableProfiling: true")).unwrap().args.profiling);
    assert_eq!(of(&given(&["--profiling=false"])).unwrap().warnings(ProxyMode::Ebpf), [""; 0]);
}

#[test]
fn changes_are_named_as_the_file_has_them() {
    let before = read(&[], &theirs("mode: nftables\nlogging: {verbosity: 1}")).unwrap();
    let after = read(
        &[],
        &(theirs("mode: nftables\nnftables: {masqueradeAll: true}\nlogging: {verbosity: 5}") + &own("xdp: auto")),
    )
    .unwrap();
    let names: Vec<_> = before.changes(&after).iter().map(|long| after.name_of(long)).collect();
    assert_eq!(names, ["nftables.masqueradeAll", "logging.verbosity", "xdp"]);
    assert_eq!(before.changes(&before), [""; 0]);
    let comment = read(&[], &theirs("# the same\nmode: nftables\nlogging: {verbosity: 1}")).unwrap();
    assert_eq!(before.changes(&comment), [""; 0]);
}
