//! Programs and where they sit: loads them, pins them, attaches them, swaps them in place, notices when somebody took them off.
//!
//! Nothing is kept in memory that the kernel could contradict: every question is asked of the pinned links again.
//!
//! Each step is idempotent and leaves a state that the next process can go on from, so a crash anywhere is repaired by the
//! ordinary start:
//! - a program's pin is replaced by rename, a link's program by `BPF_LINK_UPDATE`: no socket and no packet finds a gap;
//! - a link is right if its target is ours and its program is the pinned one; anything else is put right;
//! - `meta` says what is loaded, down to the ids of programs and maps; it is struck before anything is loaded and written last.
//!   So whoever starts next, of whichever version or configuration, adopts only what was in force as a whole.

use std::{
    collections::BTreeSet,
    fs, io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
};

use aya::{
    EbpfLoader,
    programs::{Program as AyaProgram, ProgramType},
    sys::{BpfHelper, is_helper_supported},
};
use proxy_common::{LAYOUT_VERSION, globals, meta::Meta};

use super::{
    Options, SocketLb, Tc, Timeouts, cgroup,
    clsact::{self, Direction},
    hygiene,
    layout::MapName,
    object::Digest,
    pins::Layout,
    sys::{self, Target},
};
use crate::{
    dataplane::{DataplaneError, Failure, Hook, Report},
    desired::{Device, Devices},
};

/// Connect-time programs and their attach types (`enum bpf_attach_type`).
pub(crate) const CGROUP_PROGRAMS: [(&str, u32); 8] = [
    ("connect4", 10),
    ("connect6", 11),
    ("sendmsg4", 14),
    ("sendmsg6", 15),
    ("recvmsg4", 19),
    ("recvmsg6", 20),
    ("getpeername4", 29),
    ("getpeername6", 30),
];

/// Per-packet programs.
const TC_PROGRAMS: [&str; 4] = ["tc_ingress_ether", "tc_egress_ether", "tc_ingress_l3", "tc_egress_l3"];

const TCX_INGRESS: u32 = 46;
const TCX_EGRESS: u32 = 47;

const fn tc_program(direction: Direction, ethernet: bool) -> &'static str {
    match (direction, ethernet) {
        (Direction::Ingress, true) => "tc_ingress_ether",
        (Direction::Egress, true) => "tc_egress_ether",
        (Direction::Ingress, false) => "tc_ingress_l3",
        (Direction::Egress, false) => "tc_egress_l3",
    }
}

const fn tcx_type(direction: Direction) -> u32 {
    match direction {
        Direction::Ingress => TCX_INGRESS,
        Direction::Egress => TCX_EGRESS,
    }
}

/// What programs are loaded with; together with the object, what tells one set of programs from another.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Globals {
    socket_lb: u8,
    node_netns_cookie: u64,
    masquerade_ports: (u16, u16),
    timeouts: Timeouts,
    connected_udp: u8,
    have_set_retval: u8,
    have_coarse_clock: u8,
    log_level: u8,
    /// Not a global: another way to attach is another set of hooks.
    tc: Tc,
}

impl Globals {
    pub(crate) fn of(options: &Options) -> Result<Self, DataplaneError> {
        let helper = |program, helper: BpfHelper| {
            is_helper_supported(program, helper).map(u8::from).map_err(|error| {
                DataplaneError::Unavailable(format!(
                    "cannot ask the kernel which helpers it has ({error}): the agent needs CAP_BPF and CAP_PERFMON \
                     (CAP_SYS_ADMIN before kernel 5.8)"
                ))
            })
        };
        Ok(Self {
            socket_lb: match options.socket_lb {
                SocketLb::Node => globals::socket_lb::NODE,
                SocketLb::All | SocketLb::Off => globals::socket_lb::ALL,
            },
            node_netns_cookie: netns_cookie()
                .map_err(|source| DataplaneError::Kernel { what: "SO_NETNS_COOKIE (kernel 5.14)".into(), source })?,
            masquerade_ports: options.masquerade_ports,
            timeouts: options.timeouts,
            connected_udp: u8::from(hygiene::reaches_sockets().is_ok()),
            have_set_retval: helper(ProgramType::CgroupSockAddr, BpfHelper::BPF_FUNC_set_retval)?,
            have_coarse_clock: helper(ProgramType::SchedClassifier, BpfHelper::BPF_FUNC_ktime_get_coarse_ns)?,
            log_level: options.log_level,
            tc: options.tc,
        })
    }

    /// Sets them in what is about to be loaded.
    pub(crate) fn give<'a>(&'a self, loader: &mut EbpfLoader<'a>) {
        let Self {
            socket_lb,
            node_netns_cookie,
            masquerade_ports: (low, high),
            timeouts: Timeouts { tcp_established, tcp_close_wait, udp, udp_stream },
            connected_udp,
            have_set_retval,
            have_coarse_clock,
            log_level,
            tc: _,
        } = self;
        loader
            .override_global(globals::SOCKET_LB, socket_lb, true)
            .override_global(globals::NODE_NETNS_COOKIE, node_netns_cookie, true)
            .override_global(globals::MASQUERADE_PORT_MIN, low, true)
            .override_global(globals::MASQUERADE_PORT_MAX, high, true)
            .override_global(globals::TCP_ESTABLISHED_SECS, tcp_established, true)
            .override_global(globals::TCP_CLOSE_WAIT_SECS, tcp_close_wait, true)
            .override_global(globals::UDP_SECS, udp, true)
            .override_global(globals::UDP_STREAM_SECS, udp_stream, true)
            .override_global(globals::CONNECTED_UDP, connected_udp, true)
            .override_global(globals::HAVE_SET_RETVAL, have_set_retval, true)
            .override_global(globals::HAVE_COARSE_CLOCK, have_coarse_clock, true)
            .override_global(globals::LOG_LEVEL, log_level, true);
    }

    fn digest(&self, object: &[u8], programs: &[&str], maps: &[(MapName, u32)]) -> u64 {
        let Self {
            socket_lb,
            node_netns_cookie,
            masquerade_ports,
            timeouts: Timeouts { tcp_established, tcp_close_wait, udp, udp_stream },
            connected_udp,
            have_set_retval,
            have_coarse_clock,
            log_level,
            tc,
        } = self;
        let mut digest = Digest::new()
            .bytes(object)
            .bytes(&[*socket_lb, *connected_udp, *have_set_retval, *have_coarse_clock, *log_level, *tc as u8])
            .bytes(&node_netns_cookie.to_le_bytes())
            .bytes(&masquerade_ports.0.to_le_bytes())
            .bytes(&masquerade_ports.1.to_le_bytes());
        for seconds in [tcp_established, tcp_close_wait, udp, udp_stream] {
            digest = digest.bytes(&seconds.to_le_bytes());
        }
        for program in programs {
            digest = digest.bytes(program.as_bytes());
        }
        // Programs hold on to their maps: other maps need other programs.
        for (map, entries) in maps {
            digest = digest.bytes(map.as_str().as_bytes()).bytes(&entries.to_le_bytes());
        }
        digest.finish()
    }
}

/// What stands in `meta`: the programs as they were made (`digest`), and which ones these are, on which maps. Another program
/// under the same pin, or another map, has another id.
fn fingerprint(digest: u64, programs: &[Program], maps: &[u32]) -> u64 {
    let ids = programs.iter().map(|program| program.id).chain(maps.iter().copied());
    ids.fold(Digest::new().bytes(&digest.to_le_bytes()), |digest, id| digest.bytes(&id.to_le_bytes())).finish()
}

/// `SO_NETNS_COOKIE` of the namespace this process is in (kernel 5.14, e8b9eab99232).
pub(crate) fn netns_cookie() -> io::Result<u64> {
    const SO_NETNS_COOKIE: libc::c_int = 71;
    let socket = rustix::net::socket(rustix::net::AddressFamily::UNIX, rustix::net::SocketType::DGRAM, None)?;
    let mut cookie = 0_u64;
    let mut len = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the socket is open, and `cookie` has room for the `len` bytes the kernel may write.
    let result = unsafe {
        libc::getsockopt(
            std::os::fd::AsRawFd::as_raw_fd(&socket),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut len,
        )
    };
    if result == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}

#[derive(Debug)]
struct Program {
    name: &'static str,
    fd: OwnedFd,
    id: u32,
}

#[derive(Debug)]
struct Cgroup {
    path: PathBuf,
    fd: OwnedFd,
    /// What the kernel calls it in a link.
    id: u64,
}

/// Programs and links of one agent.
#[derive(Debug)]
pub(crate) struct Hooks {
    layout: Layout,
    programs: Vec<Program>,
    cgroup: Option<Cgroup>,
    tcx: bool,
    meta: Meta,
    /// Until they are known, links of an earlier run stay as they are.
    devices: Option<Devices>,
    activated: bool,
    /// Programs were loaded, not adopted: filters of another way to attach may be about.
    fresh: bool,
}

fn unavailable(what: impl std::fmt::Display) -> DataplaneError {
    DataplaneError::Unavailable(what.to_string())
}

fn kernel(what: impl Into<String>) -> impl FnOnce(io::Error) -> DataplaneError {
    let what = what.into();
    |source| DataplaneError::Kernel { what, source }
}

/// An error with all its causes: the verifier's words are in the last.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

impl Hooks {
    /// Adopts the pinned programs if they are the ones we would load, loads and pins ours otherwise. Attaches nothing yet.
    ///
    /// `maps`: every map with its size; `map_path` says where each is pinned.
    pub(crate) fn open(
        layout: &Layout,
        options: &Options,
        stored: &sys::Map<u32, Meta>,
        maps: &[(MapName, u32)],
        map_path: &dyn Fn(MapName) -> PathBuf,
    ) -> Result<Self, DataplaneError> {
        let object = options.object()?;
        let globals = Globals::of(options)?;
        let wanted: Vec<&'static str> = match options.socket_lb {
            SocketLb::Off => TC_PROGRAMS.to_vec(),
            SocketLb::All | SocketLb::Node => {
                CGROUP_PROGRAMS.iter().map(|(name, _)| *name).chain(TC_PROGRAMS).collect()
            }
        };
        let digest = globals.digest(object, &wanted, maps);
        let found = stored.get(&0).map_err(kernel("map meta"))?.unwrap_or_default();
        let mut meta =
            Meta { layout: LAYOUT_VERSION, pad: 0, programs: 0, node_netns_cookie: globals.node_netns_cookie };
        if found.node_netns_cookie != 0 && found.node_netns_cookie != meta.node_netns_cookie {
            // Interface indexes in the names of the links mean devices of another namespace.
            remove_links(layout, |name| name.starts_with("tcx-"))
                .map_err(kernel("links of another network namespace"))?;
        }
        // Programs whose maps lost their pins would go on with maps that nobody else sees. And a logger can only be had from
        // programs loaded by this process.
        let adopted = match (open_programs(layout, &wanted), map_ids(maps, map_path)) {
            (Ok(programs), Ok(maps)) if options.log_level == 0 => {
                meta.programs = fingerprint(digest, &programs, &maps);
                (found == meta).then_some(programs)
            }
            _ => None,
        };
        let fresh = adopted.is_none();
        let programs = match adopted {
            Some(programs) => {
                tracing::info!(programs = programs.len(), "adopted the pinned programs");
                programs
            }
            None => {
                // From here on nobody adopts what is pinned, until every link holds these programs.
                meta.programs = 0;
                if found != meta {
                    stored.put(&0, &meta, sys::ANY).map_err(kernel("map meta"))?;
                }
                let programs = load(layout, object, &globals, &wanted, maps, map_path)?;
                let maps = map_ids(maps, map_path).map_err(kernel("pinned maps"))?;
                meta.programs = fingerprint(digest, &programs, &maps);
                programs
            }
        };
        let cgroup = match options.socket_lb {
            SocketLb::Off => None,
            SocketLb::All | SocketLb::Node => Some(open_cgroup(options.cgroup_root.as_deref())?),
        };
        let tcx = match options.tc {
            Tc::Tcx => true,
            Tc::Clsact => false,
            Tc::Auto => programs
                .iter()
                .find(|p| p.name == "tc_ingress_ether")
                .is_some_and(|program| has_tcx(program.fd.as_fd())),
        };
        Ok(Self { layout: layout.clone(), programs, cgroup, tcx, meta, devices: None, activated: false, fresh })
    }

    pub(crate) const fn meta(&self) -> &Meta {
        &self.meta
    }

    fn program(&self, name: &str) -> io::Result<&Program> {
        self.programs
            .iter()
            .find(|program| program.name == name)
            .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("program {name} is not loaded")))
    }

    /// Attaches the connect-time programs, and puts back what the known devices have lost.
    pub(crate) fn activate(&mut self, report: &mut Report) -> Result<(), DataplaneError> {
        self.activated = true;
        let mut wanted = BTreeSet::new();
        if let Some(cgroup) = &self.cgroup {
            for (name, attach_type) in CGROUP_PROGRAMS {
                wanted.insert(name.to_owned());
                let program = self.program(name).map_err(kernel(format!("cgroup {}", cgroup.path.display())))?;
                report.writes += ensure_link(
                    &self.layout.links.join(name),
                    program,
                    Target::Cgroup(cgroup.fd.as_fd()),
                    cgroup.id,
                    attach_type,
                )
                .map_err(kernel(format!("attach {name} to cgroup {}", cgroup.path.display())))?;
            }
        }
        report.writes += remove_links(&self.layout, |name| !name.starts_with("tcx-") && !wanted.contains(name))
            .map_err(kernel("links that are not wanted any more"))?;
        if let Some(devices) = &self.devices {
            self.attach_devices(devices, report);
        }
        Ok(())
    }

    /// Attaches to exactly these devices.
    pub(crate) fn set_devices(&mut self, devices: &Devices, report: &mut Report) {
        self.attach_devices(devices, report);
        self.devices = Some(devices.clone());
    }

    /// Whether nothing runs on what came before: each link and each filter that exists holds a program of ours. One that could
    /// not be made is no obstacle.
    pub(crate) fn is_settled(&self) -> bool {
        self.activated && self.devices.is_some() && self.lagging().is_empty()
    }

    /// What runs on what came before although it should have moved.
    pub(crate) fn lagging(&self) -> Vec<String> {
        let ours = |id: u32| self.programs.iter().any(|program| program.id == id);
        // A link without a target is dead: its device is gone. A connect-time one is not to move before it is activated.
        let is_due = |name: &String| if name.starts_with("tcx-") { self.devices.is_some() } else { self.activated };
        let link = |name: &String| {
            sys::open(&self.layout.links.join(name))
                .and_then(|link| sys::link_info(link.as_fd()))
                .is_ok_and(|info| info.target == 0 || ours(info.program_id))
        };
        let filter = |index: u32, direction| clsact::program(index, direction).ok().flatten().is_none_or(ours);
        let mut lagging = match list(&self.layout.links) {
            Ok(names) => names.into_iter().filter(|name| is_due(name) && !link(name)).collect(),
            Err(error) => vec![format!("{}: {error}", self.layout.links.display())],
        };
        for (index, device) in self.devices.iter().flatten().filter(|_| !self.tcx) {
            let held = Direction::BOTH.into_iter().filter(|direction| !filter(*index, *direction));
            lagging.extend(held.map(|direction| format!("{}/{}", device.name, direction.as_str())));
        }
        lagging
    }

    fn attach_devices(&self, devices: &Devices, report: &mut Report) {
        for (index, device) in devices {
            for direction in Direction::BOTH {
                match self.attach_device(*index, device, direction) {
                    Ok(writes) => report.writes += writes,
                    // The device is gone; the next list of devices will not have it.
                    Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {}
                    Err(error) => {
                        let why = format!("device {}: cannot attach at {}: {error}", device.name, direction.as_str());
                        report.failed_devices.insert(device.name.clone(), Failure::Retry(why));
                    }
                }
            }
        }
        let wanted: BTreeSet<String> = if self.tcx {
            devices.keys().flat_map(|index| Direction::BOTH.map(|d| tcx_name(*index, d))).collect()
        } else {
            BTreeSet::new()
        };
        match remove_links(&self.layout, |name| name.starts_with("tcx-") && !wanted.contains(name)) {
            Ok(writes) => report.writes += writes,
            Err(error) => tracing::warn!(%error, "links of devices that are gone stay pinned"),
        }
    }

    fn attach_device(&self, index: u32, device: &Device, direction: Direction) -> io::Result<u64> {
        let program = self.program(tc_program(direction, device.ethernet))?;
        if self.tcx {
            ensure_link(
                &self.layout.links.join(tcx_name(index, direction)),
                program,
                Target::Interface(index),
                u64::from(index),
                tcx_type(direction),
            )
        } else if clsact::program(index, direction)? == Some(program.id) {
            Ok(0)
        } else {
            clsact::attach(index, direction, program.fd.as_fd(), program.name)?;
            Ok(1)
        }
    }

    /// Takes our filters off devices that may carry some (`known`) and should not: all others than `devices`, and with TCX all.
    /// (TCX links go with their pins.)
    pub(crate) fn detach_others(&mut self, known: &[u32], devices: &Devices, report: &mut Report) {
        if self.tcx && !self.fresh {
            return;
        }
        for index in known.iter().filter(|index| self.tcx || !devices.contains_key(index)) {
            for direction in Direction::BOTH {
                match clsact::detach(*index, direction) {
                    Ok(was_there) => report.writes += u64::from(was_there),
                    Err(error) => tracing::warn!(index, %error, "cannot remove the tc filter"),
                }
            }
        }
        self.fresh = false;
    }

    /// Hooks that should be in force, each with whether it is.
    fn expected(&self) -> Vec<(Hook, bool)> {
        let mut hooks = vec![];
        if let Some(cgroup) = self.cgroup.as_ref().filter(|_| self.activated) {
            for (name, _) in CGROUP_PROGRAMS {
                let hook = Hook {
                    kind: format!("cgroup/{name}"),
                    target: cgroup.path.display().to_string(),
                    program: name.to_owned(),
                };
                hooks.push((hook, self.holds(&self.layout.links.join(name), name, cgroup.id)));
            }
        }
        for (index, device) in self.devices.iter().flatten() {
            for direction in Direction::BOTH {
                let name = tc_program(direction, device.ethernet);
                let holds = if self.tcx {
                    self.holds(&self.layout.links.join(tcx_name(*index, direction)), name, u64::from(*index))
                } else {
                    let id = self.program(name).map(|p| p.id).ok();
                    id.is_some() && clsact::program(*index, direction).ok().flatten() == id
                };
                let kind = if self.tcx { "tcx" } else { "clsact" };
                let hook = Hook {
                    kind: format!("{kind}/{}", direction.as_str()),
                    target: device.name.clone(),
                    program: name.to_owned(),
                };
                hooks.push((hook, holds));
            }
        }
        hooks
    }

    fn holds(&self, pin: &Path, program: &str, target: u64) -> bool {
        let Ok(info) = sys::open(pin).and_then(|link| sys::link_info(link.as_fd())) else { return false };
        info.target == target && self.program(program).is_ok_and(|p| p.id == info.program_id)
    }

    pub(crate) fn in_force(&self) -> Vec<Hook> {
        self.expected().into_iter().filter(|(_, holds)| *holds).map(|(hook, _)| hook).collect()
    }

    pub(crate) fn lost(&self) -> Vec<String> {
        self.expected()
            .into_iter()
            .filter(|(_, holds)| !holds)
            .map(|(Hook { kind, target, .. }, _)| format!("{kind} {target}"))
            .collect()
    }
}

fn tcx_name(index: u32, direction: Direction) -> String {
    format!("tcx-{index}-{}", direction.as_str())
}

/// The index and the direction in a pin's name.
pub(crate) fn parse_tcx_name(name: &str) -> Option<(u32, &str)> {
    let (index, direction) = name.strip_prefix("tcx-")?.split_once('-')?;
    Some((index.parse().ok()?, direction))
}

/// A kernel with TCX finds no such device; one without does not know the attach type (6.6, e420bed02507).
pub(crate) fn has_tcx(program: std::os::fd::BorrowedFd<'_>) -> bool {
    let nowhere = Target::Interface(u32::try_from(i32::MAX).unwrap_or_default());
    matches!(sys::link_create(program, nowhere, TCX_INGRESS), Err(error) if error.raw_os_error() == Some(libc::ENODEV))
}

fn open_cgroup(root: Option<&Path>) -> Result<Cgroup, DataplaneError> {
    let path = match root {
        Some(path) => path.to_owned(),
        None => {
            let path = cgroup::root().map_err(kernel("/proc/self/mountinfo"))?.ok_or_else(|| {
                unavailable(
                    "no cgroup v2 hierarchy is mounted: mount one (`mount -t cgroup2 none /sys/fs/cgroup`), name it with \
                     --cgroup-root, or run with --socket-lb off",
                )
            })?;
            if !cgroup::is_root(&path) {
                tracing::warn!(
                    path = %path.display(),
                    "not the root of the cgroup hierarchy: sockets outside are not translated at connect time; mount the node's \
                     /sys/fs/cgroup into the container"
                );
            }
            path
        }
    };
    const CGROUP2_MAGIC: u64 = 0x6367_7270;
    let open = || -> io::Result<_> {
        let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::CLOEXEC;
        let fd = rustix::fs::open(&path, flags, rustix::fs::Mode::empty())?;
        let magic = rustix::fs::fstatfs(&fd)?.f_type as u64;
        Ok((fd, magic, fs::metadata(&path)?.ino()))
    };
    let (fd, magic, id) = open().map_err(|error| {
        unavailable(format!(
            "--cgroup-root {}: {error}; name a directory of the cgroup v2 hierarchy, or run with --socket-lb off",
            path.display()
        ))
    })?;
    if magic != CGROUP2_MAGIC {
        return Err(unavailable(format!(
            "--cgroup-root {} is not in a cgroup v2 hierarchy: connect-time programs cannot be attached there; name one that \
             is, or run with --socket-lb off",
            path.display()
        )));
    }
    Ok(Cgroup { path, fd, id })
}

fn open_programs(layout: &Layout, wanted: &[&'static str]) -> io::Result<Vec<Program>> {
    wanted
        .iter()
        .map(|name| {
            let fd = sys::open(&layout.programs.join(name))?;
            let id = sys::program_id(fd.as_fd())?;
            Ok(Program { name, fd, id })
        })
        .collect()
}

fn map_ids(maps: &[(MapName, u32)], path: &dyn Fn(MapName) -> PathBuf) -> io::Result<Vec<u32>> {
    maps.iter().map(|(map, _)| sys::map_id(sys::open(&path(*map))?.as_fd())).collect()
}

fn load(
    layout: &Layout,
    object: &[u8],
    globals: &Globals,
    wanted: &[&'static str],
    maps: &[(MapName, u32)],
    map_path: &dyn Fn(MapName) -> PathBuf,
) -> Result<Vec<Program>, DataplaneError> {
    let mut loader = EbpfLoader::new();
    globals.give(&mut loader);
    for (map, entries) in maps.iter().filter(|(map, _)| !map.is_agents()) {
        loader.map_max_entries(map.as_str(), *entries).map_pin_path(map.as_str(), map_path(*map));
    }
    let started = std::time::Instant::now();
    let mut ebpf = loader.load(object).map_err(|error| {
        unavailable(format!(
            "the eBPF object cannot be loaded: {}; the agent needs CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON",
            chain(&error)
        ))
    })?;
    let mut programs = vec![];
    for name in wanted {
        let program = ebpf
            .program_mut(name)
            .ok_or_else(|| unavailable(format!("the embedded eBPF object has no program {name}: build it again")))?;
        let loaded = match program {
            AyaProgram::CgroupSockAddr(program) => program.load(),
            AyaProgram::SchedClassifier(program) => program.load(),
            _ => return Err(unavailable(format!("the embedded program {name} is of an unexpected kind"))),
        };
        loaded.map_err(|error| unavailable(format!("program {name} cannot be loaded: {}", chain(&error))))?;
        let fd = program
            .fd()
            .map_err(|error| unavailable(format!("program {name}: {}", chain(&error))))?
            .as_fd()
            .try_clone_to_owned()
            .map_err(kernel(format!("program {name}")))?;
        sys::pin_over(fd.as_fd(), &layout.programs.join(name)).map_err(kernel(format!("pin program {name}")))?;
        let id = sys::program_id(fd.as_fd()).map_err(kernel(format!("program {name}")))?;
        programs.push(Program { name, fd, id });
    }
    // Programs an earlier configuration pinned.
    for name in list(&layout.programs).map_err(kernel("pinned programs"))? {
        if !wanted.contains(&name.as_str()) {
            fs::remove_file(layout.programs.join(&name)).map_err(kernel(format!("unpin program {name}")))?;
        }
    }
    tracing::info!(programs = programs.len(), took = ?started.elapsed(), "loaded the programs");
    if globals.log_level > 0 {
        super::log::drain(&mut ebpf);
    }
    Ok(programs)
}

/// Names in a directory of pins.
pub(crate) fn list(directory: &Path) -> io::Result<Vec<String>> {
    let mut names = vec![];
    for entry in fs::read_dir(directory)? {
        if let Ok(name) = entry?.file_name().into_string() {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

/// Makes `pin` a link of `program` on `target`; how many writes that took.
fn ensure_link(pin: &Path, program: &Program, target: Target<'_>, target_id: u64, attach_type: u32) -> io::Result<u64> {
    // A process that died between pinning a link and naming the pin left it attached; TCX takes no program twice.
    if !pin.exists() && sys::waiting(pin).exists() {
        fs::rename(sys::waiting(pin), pin)?;
    }
    match sys::open(pin) {
        Ok(link) => {
            let info = sys::link_info(link.as_fd());
            match info {
                Ok(info) if info.target == target_id && info.program_id == program.id => return Ok(0),
                // In place. If the link turns out dead after all, it is replaced below.
                Ok(info) if info.target == target_id && sys::link_update(link.as_fd(), program.fd.as_fd()).is_ok() => {
                    return Ok(1);
                }
                _ => {}
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let link = sys::link_create(program.fd.as_fd(), target, attach_type)?;
    sys::pin_over(link.as_fd(), pin)?;
    Ok(1)
}

/// Detaches and unpins links by name; how many.
fn remove_links(layout: &Layout, which: impl Fn(&str) -> bool) -> io::Result<u64> {
    let mut removed = 0;
    for name in list(&layout.links)?.iter().filter(|name| which(name)) {
        let path = layout.links.join(name);
        if let Ok(link) = sys::open(&path) {
            // It may be dead already (its device is gone); the pin goes either way.
            let _ = sys::link_detach(link.as_fd());
        }
        fs::remove_file(&path)?;
        removed += 1;
    }
    Ok(removed)
}

/// Removes every link and every program pin, whoever made them in this directory.
pub(crate) fn remove_all(layout: &Layout, known_devices: &[u32]) -> io::Result<()> {
    for index in known_devices {
        for direction in Direction::BOTH {
            clsact::detach(*index, direction)?;
        }
    }
    remove_links(layout, |_| true)?;
    for name in list(&layout.programs)? {
        fs::remove_file(layout.programs.join(name))?;
    }
    Ok(())
}
