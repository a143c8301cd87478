//! Can this node run the eBPF dataplane, and why not: one check a line, each with its remedy. Changes nothing.

use std::{
    fs, io,
    os::{fd::AsFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
};

use aya::{
    EbpfLoader,
    maps::MapType,
    programs::{Program, ProgramError, ProgramType},
    sys::{BpfHelper, is_helper_supported, is_map_supported, is_program_supported},
};
use rustix::thread::CapabilitySet;
use serde::Serialize;

use super::{Options, SocketLb, Xdp, cgroup as cgroups, hooks, hygiene, lasting, linkage, pins};
use crate::model::Protocol;

pub const PROC_SYS: &str = "/proc/sys";

/// One answer.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Check {
    pub name: &'static str,
    pub ok: bool,
    /// The agent runs without it, with something missing that `detail` names.
    pub optional: bool,
    pub detail: String,
    /// What to do about it; empty where nothing is amiss.
    pub remedy: String,
}

impl Check {
    fn good(name: &'static str, detail: impl Into<String>) -> Self {
        Self { name, ok: true, optional: false, detail: detail.into(), remedy: String::new() }
    }

    fn bad(name: &'static str, detail: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { name, ok: false, optional: false, detail: detail.into(), remedy: remedy.into() }
    }

    fn of(name: &'static str, ok: bool, good: &str, bad: &str, remedy: &str) -> Self {
        if ok { Self::good(name, good) } else { Self::bad(name, bad, remedy) }
    }

    fn optional(self) -> Self {
        Self { optional: true, ..self }
    }
}

/// Every check, in the order they matter.
pub fn probe(options: &Options) -> Vec<Check> {
    let mut checks = without_programs(options);
    checks.extend(programs(options));
    if options.socket_lb != SocketLb::Off {
        checks.push(socket_destroy());
    }
    checks.push(forwarding());
    checks
}

/// Those that come before the programs are loaded: loading takes about as long as a start, which finds out by itself what comes of it.
pub fn without_programs(options: &Options) -> Vec<Check> {
    let mut checks = vec![embedded(options)];
    checks.extend(capabilities());
    checks.push(kernel());
    checks.push(preemption(&fs::read_to_string(Path::new(PROC_SYS).join("kernel/version")).unwrap_or_default()));
    checks.push(btf());
    checks.push(bpffs(&options.bpffs));
    if options.socket_lb != SocketLb::Off {
        checks.push(cgroup(options.cgroup_root.as_deref()));
        checks.push(helper(
            "bpf_set_retval",
            ProgramType::CgroupSockAddr,
            BpfHelper::BPF_FUNC_set_retval,
            "a refused connect gets EPERM instead of ECONNREFUSED",
            "5.18",
        ));
    }
    checks.push(helper(
        "coarse clock",
        ProgramType::SchedClassifier,
        BpfHelper::BPF_FUNC_ktime_get_coarse_ns,
        "the exact, slower clock is read for each packet",
        "5.11",
    ));
    checks
}

fn embedded(options: &Options) -> Check {
    match options.object() {
        Ok(object) => Check::good("programs", format!("{} KiB embedded", object.len() / 1024)),
        Err(error) => Check::bad("programs", error.to_string(), "build with `cargo xtask build`"),
    }
}

/// What the agent must be allowed, each with the capabilities that grant it. Before 5.8 CAP_SYS_ADMIN stands for both of the
/// newer ones, and it still does.
const CAPABILITIES: [(&str, CapabilitySet); 3] = [
    ("CAP_BPF", CapabilitySet::BPF.union(CapabilitySet::SYS_ADMIN)),
    ("CAP_PERFMON", CapabilitySet::PERFMON.union(CapabilitySet::SYS_ADMIN)),
    ("CAP_NET_ADMIN", CapabilitySet::NET_ADMIN),
];

/// Which of them `held` does not grant.
pub fn missing_capabilities(held: CapabilitySet) -> impl Iterator<Item = &'static str> {
    CAPABILITIES.into_iter().filter(move |(_, any)| !held.intersects(*any)).map(|(name, _)| name)
}

/// Effective capabilities of this process.
fn capabilities() -> Vec<Check> {
    let held = rustix::thread::capabilities(None).map_or(CapabilitySet::empty(), |sets| sets.effective);
    let missing: Vec<_> = missing_capabilities(held).collect();
    let check = |(name, _): (&'static str, _)| {
        let remedy = format!("run as root, or add {} to the container's capabilities", name.trim_start_matches("CAP_"));
        Check::of(name, !missing.contains(&name), "held", "missing", &remedy)
    };
    CAPABILITIES.into_iter().map(check).collect()
}

fn kernel() -> Check {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned();
    let lacking: Vec<&str> = [
        ("classifier programs", is_program_supported(ProgramType::SchedClassifier)),
        ("cgroup socket-address programs", is_program_supported(ProgramType::CgroupSockAddr)),
    ]
    .into_iter()
    .filter(|(_, supported)| !matches!(supported, Ok(true)))
    .map(|(what, _)| what)
    .chain(
        [("LRU hash maps", MapType::LruHash), ("socket storage", MapType::SkStorage)]
            .into_iter()
            .filter(|(_, kind)| !matches!(is_map_supported(*kind), Ok(true)))
            .map(|(what, _)| what),
    )
    .chain(hooks::netns_cookie().is_err().then_some("SO_NETNS_COOKIE"))
    .collect();
    kernel_with(&release, &lacking)
}

fn kernel_with(release: &str, lacking: &[&str]) -> Check {
    if lacking.is_empty() {
        return Check::good("kernel", release);
    }
    Check::bad(
        "kernel",
        format!("{release} lacks (or this process may not use) {}", lacking.join(", ")),
        "use kernel 5.14 or later with CONFIG_BPF_SYSCALL and CONFIG_CGROUP_BPF, and run with the capabilities above; older ones can run \
         --proxy-mode nftables or iptables",
    )
}

/// `version`: what was built, and how (`uname -v`). There softirqs of one CPU may preempt one another (3253cb49cbad), unless it was
/// built with `PREEMPT_RT_NEEDS_BH_LOCK`, which cannot be seen from here. The per-packet programs work in per-CPU maps.
fn preemption(version: &str) -> Check {
    Check::of(
        "preemption",
        !version.split_whitespace().any(|word| word == "PREEMPT_RT"),
        "softirqs of one CPU do not preempt one another",
        "PREEMPT_RT: packets of one CPU may be worked on at once, and mixed up",
        "boot a kernel without PREEMPT_RT; one built with CONFIG_PREEMPT_RT_NEEDS_BH_LOCK is fine, too",
    )
    .optional()
}

fn btf() -> Check {
    Check::of(
        "BTF",
        Path::new("/sys/kernel/btf/vmlinux").exists(),
        "/sys/kernel/btf/vmlinux",
        "/sys/kernel/btf/vmlinux is missing: socket storage maps need type information",
        "use a kernel with CONFIG_DEBUG_INFO_BTF",
    )
}

/// Whether pins can be there.
pub fn bpffs(path: &Path) -> Check {
    match pins::is_on_bpffs(path) {
        Ok(true) => match not_its_own(path) {
            None if lasting::ends_with_container(path, false) => Check::bad(
                "bpffs",
                format!("{} is not on the node's: what is in force ends with this container", path.display()),
                NODES_BPFFS,
            )
            .optional(),
            None => Check::good("bpffs", path.display().to_string()),
            Some(uid) => {
                Check::bad("bpffs", format!("uid 0 missing (it is {uid}, and the bpffs is root's)"), "run as root")
            }
        },
        Ok(false) if may_be_mounted(path) && lasting::would_end_with_container() => Check::bad(
            "bpffs",
            "nothing is mounted at /sys/fs/bpf, and what the agent mounts there ends with this container",
            NODES_BPFFS,
        )
        .optional(),
        Ok(false) if may_be_mounted(path) => Check::bad(
            "bpffs",
            "nothing is mounted at /sys/fs/bpf",
            "mount -t bpf bpf /sys/fs/bpf (the agent does it if it may)",
        )
        .optional(),
        Ok(false) if path.starts_with("/sys/fs/bpf") => Check::bad(
            "bpffs",
            "nothing is mounted at /sys/fs/bpf, and this process may not (CAP_SYS_ADMIN)",
            "mount -t bpf bpf /sys/fs/bpf on the node, and give it to the container",
        ),
        Ok(false) => Check::bad(
            "bpffs",
            format!("{} is not on a bpf filesystem", path.display()),
            "mount one (`mount -t bpf bpf DIR`) or give --bpffs a path on one",
        ),
        Err(error) => Check::bad("bpffs", format!("{}: {error}", path.display()), "give --bpffs a path that exists"),
    }
}

const NODES_BPFFS: &str = "mount the node's /sys/fs/bpf into the container, as the manifests do";

fn may_be_mounted(path: &Path) -> bool {
    path.starts_with("/sys/fs/bpf") && Path::new("/sys/fs/bpf").is_dir() && may_mount()
}

fn may_mount() -> bool {
    rustix::thread::capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::SYS_ADMIN))
}

/// The own uid, where the directory, or what it would be made in, is root's and this process may not write there.
pub fn not_its_own(bpffs: &Path) -> Option<u32> {
    let uid = rustix::process::geteuid().as_raw();
    let held = rustix::thread::capabilities(None).map_or(CapabilitySet::empty(), |sets| sets.effective);
    lacks_uid(held, uid, owner(bpffs)).then_some(uid)
}

fn lacks_uid(held: CapabilitySet, uid: u32, owner: Option<u32>) -> bool {
    uid != 0 && owner == Some(0) && !held.contains(CapabilitySet::DAC_OVERRIDE)
}

/// Who owns the directory, or what it would be made in.
fn owner(bpffs: &Path) -> Option<u32> {
    bpffs.ancestors().find_map(|path| match path.metadata() {
        Ok(metadata) => Some(Some(metadata.uid())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        // Not ours to look into; whoever may will say what is wrong with it.
        Err(_) => Some(None),
    })?
}

/// Whether connect-time programs can be attached there; `None`: where it is mounted.
pub fn cgroup(root: Option<&Path>) -> Check {
    cgroup_of(root, || cgroups::mounted().ok().flatten())
}

fn cgroup_of(root: Option<&Path>, mounted: impl Fn() -> Option<PathBuf>) -> Check {
    let remedy =
        "mount one (`mount -t cgroup2 none /sys/fs/cgroup`), name it with --cgroup-root, or use --socket-lb off";
    match root.map(Path::to_owned).or_else(mounted) {
        None => Check::bad("cgroup v2", "not mounted", remedy),
        // Whoever names a part of the hierarchy means it.
        Some(path) if root.is_none() && !cgroups::is_root(&path) => Check::bad(
            "cgroup v2",
            format!(
                "{} is not the root of the hierarchy: sockets outside are not translated at connect time",
                path.display()
            ),
            "mount the node's /sys/fs/cgroup into the container",
        )
        .optional(),
        Some(path) if path.join("cgroup.controllers").exists() => Check::good("cgroup v2", path.display().to_string()),
        Some(path) => Check::bad("cgroup v2", format!("{} is no cgroup v2 directory", path.display()), remedy),
    }
}

fn helper(name: &'static str, program: ProgramType, helper: BpfHelper, without: &str, since: &str) -> Check {
    match is_helper_supported(program, helper) {
        Ok(true) => Check::good(name, "supported"),
        Ok(false) => Check::bad(name, without, format!("kernel {since} or later")).optional(),
        Err(error) => {
            Check::bad(name, format!("cannot be asked: {error}"), "run with CAP_BPF and CAP_PERFMON").optional()
        }
    }
}

/// Where the kernel cannot even be asked to load programs.
const CAPABLE: &str = "run with CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON, on kernel 5.14 or later";

/// Loads every program as a dry run, with small maps, pinning nothing; and asks how tc programs can be attached.
fn programs(options: &Options) -> Vec<Check> {
    let Ok(object) = options.object() else { return vec![] };
    let mut loader = EbpfLoader::new();
    for map in
        super::layout::MapName::ALL.iter().filter(|map| !map.is_unknown_to_programs() && !map.option().is_empty())
    {
        loader.map_max_entries(map.as_str(), 16);
    }
    let globals = match hooks::Globals::of(options) {
        Ok(globals) => globals,
        Err(error) => return vec![Check::bad("load", error.to_string(), CAPABLE)],
    };
    globals.give(&mut loader);
    let mut ebpf = match loader.load(&linkage::suited(object)) {
        Ok(ebpf) => ebpf,
        Err(error) => return vec![Check::bad("load", hooks::in_a_line(&error), CAPABLE)],
    };
    let mut tcx = None;
    let mut loaded = 0;
    let mut xdp = None;
    for (name, program) in ebpf.programs_mut() {
        let result = match program {
            Program::CgroupSockAddr(_) if options.socket_lb == SocketLb::Off => continue,
            Program::CgroupSockAddr(program) => program.load(),
            Program::SchedClassifier(program) => {
                let result = program.load();
                if let (None, Ok(fd)) = (tcx, program.fd()) {
                    tcx = Some(hooks::has_tcx(fd.as_fd()));
                }
                result
            }
            Program::Xdp(program) if options.xdp != Xdp::Off => {
                xdp = Some(xdp_program(program.load()));
                continue;
            }
            _ => continue,
        };
        if let Err(error) = result {
            return vec![Check::bad("load", hooks::refused(name, &error), hooks::remedy(&error))];
        }
        loaded += 1;
    }
    let attach = if tcx == Some(true) { "TCX" } else { "clsact filters (TCX needs kernel 6.6)" };
    let checks = [Check::good("load", format!("{loaded} programs pass the verifier")), Check::good("tc", attach)];
    checks.into_iter().chain(xdp).collect()
}

fn xdp_program(loaded: Result<(), ProgramError>) -> Check {
    const NAME: &str = "XDP program";
    match loaded {
        Ok(()) => Check::good(NAME, "passes the verifier"),
        Err(error) => Check::bad(
            NAME,
            format!("{}: everything is served without XDP", hooks::refused("xdp_ingress", &error)),
            "use --xdp off, or a later kernel; please report the verifier's words and the kernel",
        )
        .optional(),
    }
}

/// Whether sockets can be taken off a backend that is gone; where not, pods' are served per packet.
fn socket_destroy() -> Check {
    let reached = [Protocol::Udp, Protocol::Tcp]
        .map(|protocol| hygiene::reaches_sockets(protocol).map_err(|why| (protocol, why)));
    let Some((protocol, hygiene::Unreachable { why, remedy, but_the_nodes })) =
        reached.into_iter().find_map(Result::err)
    else {
        return Check::good("socket destroy", "supported");
    };
    let pods = match protocol {
        Protocol::Udp => {
            "connected UDP of pods, and TCP to Services that reset deleted endpoints, are served per packet"
        }
        _ => "TCP of pods to Services that reset deleted endpoints is served per packet",
    };
    let node = if but_the_nodes {
        ""
    } else {
        "; the node's own sockets stay on a removed backend until their owner gives up"
    };
    Check::bad("socket destroy", format!("{why}: {pods}{node}"), remedy).optional()
}

/// Whether the node passes packets on, IPv4 and IPv6: without it nothing that comes from one device leaves by another. A kernel
/// without IPv6 has none to pass on.
pub fn forwards(proc_sys: &Path) -> [(&'static str, bool); 2] {
    let on = |path: &str| fs::read_to_string(proc_sys.join(path)).is_ok_and(|text| text.trim() == "1");
    [
        ("net.ipv4.ip_forward", on("net/ipv4/ip_forward")),
        ("net.ipv6.conf.all.forwarding", on("net/ipv6/conf/all/forwarding") || !proc_sys.join("net/ipv6").exists()),
    ]
}

/// Whatever serves: nothing else passes packets on to pods.
pub fn forwarding() -> Check {
    let [(_, v4), (_, v6)] = forwards(Path::new(PROC_SYS));
    Check::of(
        "forwarding",
        v4 && v6,
        "on for IPv4 and IPv6",
        match (v4, v6) {
            (false, false) => "off: the node passes no packets on to pods",
            (false, true) => "off for IPv4: the node passes no IPv4 packets on to pods",
            _ => "off for IPv6: the node passes no IPv6 packets on to pods",
        },
        "sysctl -w net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1",
    )
    .optional()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataplane::DataplaneError;

    #[test]
    fn roots_directory_is_roots() {
        assert!(lacks_uid(CapabilitySet::BPF, 7, Some(0)));
        for (held, uid, owner) in
            [(CapabilitySet::BPF, 0, 0), (CapabilitySet::BPF, 7, 7), (CapabilitySet::DAC_OVERRIDE, 7, 0)]
        {
            assert!(!lacks_uid(held, uid, Some(owner)), "{uid} {owner}");
        }
    }

    #[test]
    fn no_cgroup_v2_and_no_bpffs_have_their_remedies() {
        let failed = |check: Check| {
            assert!(!check.ok && !check.optional, "{check:?}");
            (check.name, check.detail, check.remedy)
        };
        let cgroup_remedy =
            "mount one (`mount -t cgroup2 none /sys/fs/cgroup`), name it with --cgroup-root, or use --socket-lb off";
        for (root, detail) in [
            (None, "not mounted"),
            (Some("/proc"), "/proc is no cgroup v2 directory"),
            (Some("/nonexistent"), "/nonexistent is no cgroup v2 directory"),
        ] {
            let check = failed(cgroup_of(root.map(Path::new), || None));
            assert_eq!(check, ("cgroup v2", detail.to_owned(), cgroup_remedy.to_owned()));
        }
        let (_, detail, remedy) = failed(bpffs(Path::new("/proc/pins")));
        assert_eq!(detail, "/proc/pins is not on a bpf filesystem");
        assert_eq!(remedy, "mount one (`mount -t bpf bpf DIR`) or give --bpffs a path on one");
    }

    #[test]
    fn a_kernel_that_is_too_old_is_named_with_what_it_lacks() {
        assert_eq!(kernel_with("6.1.0", &[]), Check::good("kernel", "6.1.0"));
        let Check { ok, optional, detail, remedy, .. } = kernel_with("4.19.0", &["socket storage", "SO_NETNS_COOKIE"]);
        assert!(!ok && !optional);
        assert_eq!(detail, "4.19.0 lacks (or this process may not use) socket storage, SO_NETNS_COOKIE");
        assert!(remedy.contains("kernel 5.14") && remedy.contains("--proxy-mode nftables"), "{remedy}");
        assert!(!remedy.contains('\n'));
        // What the programs are told is asked of the kernel, too.
        let error = DataplaneError::Kernel {
            what: "SO_NETNS_COOKIE (kernel 5.14)".into(),
            source: io::Error::from_raw_os_error(libc::ENOPROTOOPT),
        };
        assert!(error.to_string().ends_with("the kernel is too old for that: upgrade it (docs/kernels.md)"), "{error}");
    }

    #[test]
    fn a_kernel_whose_softirqs_preempt_one_another_is_named() {
        assert!(preemption("#1 SMP PREEMPT_DYNAMIC Debian 6.12.57-1 (2025-11-05)").ok);
        assert!(preemption("").ok);
        let Check { ok, optional, remedy, .. } = preemption("#1 SMP PREEMPT_RT Debian 6.12.57-1 (2025-11-05)");
        assert!(!ok && optional && !remedy.is_empty());
    }
}
