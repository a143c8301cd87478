//! The datapath by itself: the object loaded without the agent, and its maps filled by hand. Used by tests and benchmarks.

use std::{
    env, fs,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, HashMap, MapData, PerCpuArray},
    programs::{CgroupAttachMode, CgroupSockAddr},
};
use proxy_common::{
    Address, Be16, Ipv4Be, Ipv6Be,
    counters::Reason,
    frontend::{FrontendKey, FrontendValue, Range, algorithm, flags, origin, verdict},
    maglev::{self, Walk},
    slot::{Slot, SlotV4, SlotV6, Target, sort_key},
};

/// The programs of the connect-time path.
pub(crate) const CONNECT_TIME: [&str; 8] =
    ["connect4", "connect6", "sendmsg4", "sendmsg6", "recvmsg4", "recvmsg6", "getpeername4", "getpeername6"];

/// Why the programs cannot be run here, if they cannot.
pub(crate) fn skip() -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("not root".into());
    }
    match env::var_os("PROXY_EBPF_OBJECT") {
        None => Some("PROXY_EBPF_OBJECT names no object (cargo xtask build-ebpf)".into()),
        Some(object) if !PathBuf::from(&object).is_file() => {
            Some(format!("no object at {}", PathBuf::from(object).display()))
        }
        Some(_) if cgroup_root().is_none() => Some("no cgroup v2 is mounted".into()),
        Some(_) => None,
    }
}

/// Where cgroup v2 is mounted.
pub(crate) fn cgroup_root() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ');
        let (_, at, kind) = (fields.next()?, fields.next()?, fields.next()?);
        (kind == "cgroup2").then(|| PathBuf::from(at))
    })
}

/// `SO_NETNS_COOKIE` of this thread's network namespace.
pub(crate) fn netns_cookie() -> u64 {
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let mut cookie = 0_u64;
    let mut len = size_of::<u64>() as u32;
    // SAFETY: `cookie` and `len` live through the call and `len` says how big `cookie` is.
    let rc = unsafe {
        nix::libc::getsockopt(
            std::os::fd::AsRawFd::as_raw_fd(&socket),
            nix::libc::SOL_SOCKET,
            71, // SO_NETNS_COOKIE, kernel 5.14
            (&raw mut cookie).cast(),
            &raw mut len,
        )
    };
    assert_eq!(rc, 0, "SO_NETNS_COOKIE: {}", std::io::Error::last_os_error());
    cookie
}

/// What the object is loaded as.
pub(crate) struct Globals {
    pub(crate) socket_lb: u8,
    pub(crate) node_netns_cookie: u64,
    pub(crate) connected_udp: u8,
}

/// One frontend to write.
#[derive(Clone)]
pub(crate) struct Spec {
    pub(crate) service: u32,
    pub(crate) all: Vec<SocketAddr>,
    pub(crate) local: Vec<SocketAddr>,
    pub(crate) verdicts: [u8; origin::COUNT],
    pub(crate) algorithm: u8,
    /// As the agent does for Maglev, or not: then a program that asks for one must do without.
    pub(crate) tables: bool,
    pub(crate) affinity_secs: u32,
    /// `frontend::flags`.
    pub(crate) flags: u16,
}

impl Spec {
    pub(crate) fn pick_all(service: u32, all: &[SocketAddr]) -> Self {
        Self {
            service,
            all: all.to_vec(),
            local: Vec::new(),
            verdicts: [verdict::PICK_ALL; origin::COUNT],
            algorithm: 0,
            tables: true,
            affinity_secs: 0,
            flags: 0,
        }
    }
}

/// The slots and frontends of one family.
pub(crate) trait Maps: Address {
    type Slot: Slot<Addr = Self> + aya::Pod;
    type Key: aya::Pod;
    const FRONTENDS: &'static str;
    const SLOTS: &'static str;

    fn key(key: FrontendKey<Self>) -> Self::Key;
}

impl Maps for Ipv4Be {
    type Slot = SlotV4;
    type Key = FrontendKey<Ipv4Be>;
    const FRONTENDS: &'static str = "frontends_v4";
    const SLOTS: &'static str = "slots_v4";

    fn key(key: FrontendKey<Self>) -> Self::Key {
        key
    }
}

impl Maps for Ipv6Be {
    type Slot = SlotV6;
    type Key = FrontendKey<Ipv6Be>;
    const FRONTENDS: &'static str = "frontends_v6";
    const SLOTS: &'static str = "slots_v6";

    fn key(key: FrontendKey<Self>) -> Self::Key {
        key
    }
}

pub(crate) struct Datapath {
    pub(crate) ebpf: Ebpf,
    next_slot: u32,
}

impl Datapath {
    pub(crate) fn load(globals: &Globals, frontends: u32, slots: u32) -> Self {
        Self::load_sized(globals, frontends, slots, &[])
    }

    /// The same, with the sizes of some other maps.
    pub(crate) fn load_sized(globals: &Globals, frontends: u32, slots: u32, sizes: &[(&str, u32)]) -> Self {
        let object = fs::read(env::var_os("PROXY_EBPF_OBJECT").expect("checked by skip()")).unwrap();
        let mut loader = EbpfLoader::new();
        loader
            .override_global("AYA_LOG_LEVEL", &0_u8, true)
            .override_global("SOCKET_LB", &globals.socket_lb, true)
            .override_global("NODE_NETNS_COOKIE", &globals.node_netns_cookie, true)
            .override_global("CONNECTED_UDP", &globals.connected_udp, true);
        for family in ["v4", "v6"] {
            loader
                .map_max_entries(if family == "v4" { "frontends_v4" } else { "frontends_v6" }, frontends)
                .map_max_entries(if family == "v4" { "slots_v4" } else { "slots_v6" }, slots);
        }
        for (map, size) in sizes {
            loader.map_max_entries(map, *size);
        }
        Self::over(loader.load(&object).unwrap())
    }

    /// Maps of an object loaded elsewhere.
    pub(crate) fn over(ebpf: Ebpf) -> Self {
        Self { ebpf, next_slot: 0 }
    }

    /// Loads the connect-time programs and attaches them to `cgroup` until `self` is dropped.
    pub(crate) fn attach_connect_time(&mut self, cgroup: &fs::File) {
        for name in CONNECT_TIME {
            let program: &mut CgroupSockAddr = self.ebpf.program_mut(name).unwrap().try_into().unwrap();
            program.load().unwrap_or_else(|e| panic!("{name}: {e:?}"));
            // A cgroup link allows others beside it in any case, and the kernel refuses the flag that says so.
            program.attach(cgroup, CgroupAttachMode::Single).unwrap_or_else(|e| panic!("{name}: {e:?}"));
        }
    }

    /// Writes `spec` for `vip`, into a fresh range.
    pub(crate) fn frontend(&mut self, vip: SocketAddr, proto: u8, spec: &Spec) {
        match vip.ip() {
            IpAddr::V4(_) => self.write::<Ipv4Be>(Some(vip.port()), vip.ip(), proto, spec),
            IpAddr::V6(_) => self.write::<Ipv6Be>(Some(vip.port()), vip.ip(), proto, spec),
        }
    }

    /// Refuses what no frontend claims at `vip`.
    pub(crate) fn guard(&mut self, vip: IpAddr, service: u32) {
        let spec = Spec { verdicts: [verdict::REJECT; origin::COUNT], ..Spec::pick_all(service, &[]) };
        match vip {
            IpAddr::V4(_) => self.write::<Ipv4Be>(None, vip, 0, &spec),
            IpAddr::V6(_) => self.write::<Ipv6Be>(None, vip, 0, &spec),
        }
    }

    /// Takes a guard out again.
    pub(crate) fn unguard(&mut self, vip: IpAddr) {
        match vip {
            IpAddr::V4(_) => self.remove::<Ipv4Be>(None, vip, 0),
            IpAddr::V6(_) => self.remove::<Ipv6Be>(None, vip, 0),
        }
    }

    /// Takes a frontend out again.
    pub(crate) fn forget(&mut self, vip: SocketAddr, proto: u8) {
        match vip {
            SocketAddr::V4(_) => self.remove::<Ipv4Be>(Some(vip.port()), vip.ip(), proto),
            SocketAddr::V6(_) => self.remove::<Ipv6Be>(Some(vip.port()), vip.ip(), proto),
        }
    }

    fn remove<A: Maps>(&mut self, port: Option<u16>, vip: IpAddr, proto: u8) {
        let addr = A::from_ip(vip).unwrap();
        let key = match port {
            Some(port) => FrontendKey::new(addr, Be16::from_host(port), proto),
            None => FrontendKey::guard(addr),
        };
        self.frontends::<A>().remove(&A::key(key)).unwrap();
    }

    fn write<A: Maps>(&mut self, port: Option<u16>, vip: IpAddr, proto: u8, spec: &Spec) {
        let Spec { service, all, local, verdicts, algorithm, tables, affinity_secs, flags } = spec;
        let tables = *tables && *algorithm == algorithm::MAGLEV;
        let (all, local) = (self.range::<A>(all, tables), self.range::<A>(local, tables));
        let addr = A::from_ip(vip).unwrap();
        let key = match port {
            Some(port) => FrontendKey::new(addr, Be16::from_host(port), proto),
            None => FrontendKey::guard(addr),
        };
        let value = FrontendValue {
            all_base: all.base,
            local_base: local.base,
            all_count: all.count,
            local_count: local.count,
            service: *service,
            verdicts: *verdicts,
            algorithm: *algorithm,
            all_generation: all.generation,
            local_generation: local.generation,
            flags: *flags
                | u16::from(all.table) << flags::ALL_TABLE_SHIFT
                | u16::from(local.table) << flags::LOCAL_TABLE_SHIFT,
            affinity_secs: *affinity_secs,
            ..Default::default()
        };
        self.frontends::<A>().insert(A::key(key), value.sealed(&key), 0).unwrap();
    }

    /// The value of `vip` as it stands.
    pub(crate) fn frontends<A: Maps>(&mut self) -> HashMap<&mut MapData, A::Key, FrontendValue> {
        HashMap::try_from(self.ebpf.map_mut(A::FRONTENDS).unwrap()).unwrap()
    }

    fn range<A: Maps>(&mut self, backends: &[SocketAddr], tables: bool) -> Range {
        let mut targets: Vec<_> = backends
            .iter()
            .map(|b| Target { addr: A::from_ip(b.ip()).unwrap(), port: Be16::from_host(b.port()) })
            .collect();
        targets.sort_by_key(|t| sort_key(*t));
        let index = if tables { maglev::index_for(targets.len()) } else { 0 };
        let range = Range { base: self.next_slot, count: targets.len() as u16, generation: 1, table: index };
        self.next_slot += range.slots();
        let mut table = vec![0; maglev::size(index) as usize];
        let mut walks: Vec<_> = targets.iter().map(|t| Walk::new(*t, table.len().max(2) as u32)).collect();
        maglev::populate(&mut walks, &mut table);
        let table: Vec<_> = table.into_iter().map(|n| targets[usize::from(n)]).collect();
        let mut slots: Array<_, A::Slot> = Array::try_from(self.ebpf.map_mut(A::SLOTS).unwrap()).unwrap();
        for (i, target) in targets.into_iter().chain(table).enumerate() {
            slots.set(range.base + i as u32, A::Slot::encode(target, range.generation), 0).unwrap();
        }
        range
    }

    /// How often `reason` was counted, on all CPUs.
    pub(crate) fn reason(&self, reason: Reason) -> u64 {
        let reasons: PerCpuArray<_, u64> = PerCpuArray::try_from(self.ebpf.map("reasons").unwrap()).unwrap();
        reasons.get(&(reason as u32), 0).unwrap().iter().sum()
    }
}
