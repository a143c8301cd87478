//! The per-packet programs loaded for one test, their maps, and what a test asks of them.
//!
//! `BPF_PROG_TEST_RUN` hands a packet to a program as if it had come in (or were going out) by the loopback device of this thread's
//! network namespace, so each test makes a namespace of its own and tells the programs what that device is.

use std::{
    env, fs, io,
    net::{IpAddr, SocketAddr},
    os::fd::{AsFd as _, AsRawFd as _},
    time::{SystemTime, UNIX_EPOCH},
};

use aya::{
    EbpfLoader,
    maps::{Array, HashMap, Map, MapData, PerCpuHashMap, RingBuf},
    programs::{Program, TestRun as _, TestRunOptions},
};
use proxy_agent::dataplane::ebpf::{Sweep, Swept};
use proxy_common::{
    Address, Be16, Ipv4Be, Ipv6Be,
    connection::{ConnectionKey, ConnectionValue, FragmentKey, FragmentValue, flags, hook, state},
    counters::{Reason, ServiceCounters, Spare},
    device::{DeviceValue, role},
    frontend::{origin, verdict},
    globals,
};

use super::{
    packet::{Packet, Sums, sums},
    support::{Datapath, Maps, Spec},
};

/// `TC_ACT_UNSPEC`, `TC_ACT_SHOT`, `TC_ACT_REDIRECT`.
pub(crate) const NEXT: i32 = -1;
pub(crate) const DROP: i32 = 2;
pub(crate) const BOUNCE: i32 = 7;

pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;
pub(crate) const SCTP: u8 = 132;
pub(crate) const PROTOS: [u8; 3] = [TCP, UDP, SCTP];

#[derive(Clone, Copy, PartialEq, Eq, Debug, PartialOrd, Ord)]
pub(crate) enum Hook {
    Ingress,
    Egress,
}

/// The cast of one family.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cast {
    pub(crate) v6: bool,
    pub(crate) client: SocketAddr,
    pub(crate) vip: SocketAddr,
    pub(crate) vip2: SocketAddr,
    pub(crate) backend: SocketAddr,
    pub(crate) backend2: SocketAddr,
    /// What masqueraded packets get as their source.
    pub(crate) node: IpAddr,
    pub(crate) router: IpAddr,
}

pub(crate) fn casts() -> [Cast; 2] {
    let a = |s: &str| s.parse::<SocketAddr>().unwrap();
    [
        Cast {
            v6: false,
            client: a("10.244.1.5:40001"),
            vip: a("10.96.0.1:80"),
            vip2: a("10.96.0.2:8000"),
            backend: a("10.244.2.7:8080"),
            backend2: a("10.244.2.8:8081"),
            node: "192.168.7.1".parse().unwrap(),
            router: "192.168.7.254".parse().unwrap(),
        },
        Cast {
            v6: true,
            client: a("[fd00:244:1::5]:40001"),
            vip: a("[fd00:96::1]:80"),
            vip2: a("[fd00:96::2]:8000"),
            backend: a("[fd00:244:2::7]:8080"),
            backend2: a("[fd00:244:2::8]:8081"),
            node: "fd00:7::1".parse().unwrap(),
            router: "fd00:7::fe".parse().unwrap(),
        },
    ]
}

/// How the object is loaded.
#[derive(Clone, Copy)]
pub(crate) struct Options {
    pub(crate) ports: (u16, u16),
    pub(crate) half_open: u32,
    pub(crate) established: u32,
    /// A second, for each CPU.
    pub(crate) refusals: u32,
    pub(crate) detect_local: u8,
}

impl Default for Options {
    fn default() -> Self {
        Self { ports: (20_000, 29_999), half_open: 16_384, established: 16_384, refusals: 100_000, detect_local: 0 }
    }
}

/// One entry of the connection table, of either family.
#[derive(Clone, PartialEq, Eq, Debug, PartialOrd, Ord)]
pub(crate) struct Row {
    pub(crate) established: bool,
    pub(crate) hook: Hook,
    pub(crate) proto: u8,
    pub(crate) src: SocketAddr,
    pub(crate) dst: SocketAddr,
    pub(crate) to: SocketAddr,
    pub(crate) other: u16,
    pub(crate) flags: u8,
    pub(crate) state: u8,
    pub(crate) seen: u32,
    pub(crate) service: u32,
}

/// The part of an entry that a test may change.
pub(crate) struct Notes<'a> {
    pub(crate) seen: &'a mut u32,
    pub(crate) checked: &'a mut u32,
    pub(crate) seal: &'a mut u32,
}

const PROG_TEST_RUN: i64 = 10;
/// `BPF_F_TEST_SKB_CHECKSUM_COMPLETE`.
const CHECKSUM_COMPLETE: u32 = 1 << 2;

/// What `BPF_PROG_TEST_RUN` reads of `union bpf_attr`.
#[repr(C)]
#[derive(Default)]
struct TestRun {
    program: u32,
    verdict: u32,
    size_in: u32,
    size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    context_size: [u32; 2],
    context: [u64; 2],
    flags: u32,
    cpu: u32,
    batch_size: u32,
    pad: u32,
}

trait Table: Maps {
    const ESTABLISHED: &'static str;
    const ANSWERED: &'static str;
    const HALF_OPEN: &'static str;
}

impl Table for Ipv4Be {
    const ESTABLISHED: &'static str = "established_v4";
    const ANSWERED: &'static str = "answered_v4";
    const HALF_OPEN: &'static str = "half_open_v4";
}

impl Table for Ipv6Be {
    const ESTABLISHED: &'static str = "established_v6";
    const ANSWERED: &'static str = "answered_v6";
    const HALF_OPEN: &'static str = "half_open_v6";
}

pub(crate) struct World {
    pub(crate) datapath: Datapath,
    /// Whether packets come with a sum over all of them, as hardware makes it (`CHECKSUM_COMPLETE`); it is looked at when they leave.
    pub(crate) summed: bool,
}

/// Why the programs cannot be run here; printed by the caller.
pub(crate) fn world(test: &str, options: Options) -> Option<World> {
    if let Some(reason) = super::support::skip() {
        println!("SKIP {test}: {reason}");
        return None;
    }
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
    Some(World::load(options))
}

impl World {
    pub(crate) fn load(options: Options) -> Self {
        let Options { ports: (min, max), half_open, established, refusals, detect_local } = options;
        let object = fs::read(env::var_os("PROXY_EBPF_OBJECT").expect("checked by skip()")).unwrap();
        let mut loader = EbpfLoader::new();
        loader.override_global(globals::MASQUERADE_PORT_MIN, &min, true).override_global(
            globals::MASQUERADE_PORT_MAX,
            &max,
            true,
        );
        loader.override_global(globals::REFUSALS_PER_SECOND, &refusals, true);
        // As the agent does, unless it is asked for more.
        loader.override_global("AYA_LOG_LEVEL", &0_u8, true);
        loader.override_global(globals::DETECT_LOCAL, &detect_local, true);
        for name in ["frontends_v4", "frontends_v6", "fragments_v4", "fragments_v6", "affinity_v4", "affinity_v6"] {
            loader.map_max_entries(name, 1024);
        }
        for name in ["slots_v4", "slots_v6"] {
            loader.map_max_entries(name, 1 << 19);
        }
        for name in [Ipv4Be::HALF_OPEN, Ipv6Be::HALF_OPEN] {
            loader.map_max_entries(name, half_open);
        }
        for name in [Ipv4Be::ESTABLISHED, Ipv6Be::ESTABLISHED, Ipv4Be::ANSWERED, Ipv6Be::ANSWERED] {
            loader.map_max_entries(name, established);
        }
        let mut ebpf = loader.load(&proxy_agent::dataplane::ebpf::linkage::suited(&object)).unwrap();
        for name in ["tc_ingress_ether", "tc_egress_ether"] {
            let program: &mut aya::programs::SchedClassifier = ebpf.program_mut(name).unwrap().try_into().unwrap();
            program.load().unwrap_or_else(|e| panic!("{name}: {e:?}"));
        }
        let mut world = Self { datapath: Datapath::over(ebpf), summed: false };
        world.device(role::POD);
        world
    }

    /// Makes the device a pod's whose network namespace has the number `netns`.
    pub(crate) fn pod_device(&mut self, netns: u16) {
        let [v4, v6] = casts().map(|c| c.node);
        self.put_device(1, role::POD, (Some(v4), Some(v6)), netns + 1);
    }

    /// Makes the device an outward one behind another that has the programs, too.
    pub(crate) fn device_behind(&mut self) {
        self.device(role::OUTWARD);
        self.device_flags(proxy_common::device::flags::BEHIND);
    }

    /// Gives the device these flags.
    pub(crate) fn device_flags(&mut self, flags: u8) {
        let device = self.devices().get(&1, 0).unwrap();
        self.devices().insert(1, DeviceValue { flags, ..device }, 0).unwrap();
    }

    /// Tells the programs whether nobody else translates.
    pub(crate) fn alone(&mut self, alone: bool) {
        let mut map: Array<&mut MapData, u32> = Array::try_from(self.datapath.ebpf.map_mut("alone").unwrap()).unwrap();
        map.set(0, u32::from(alone), 0).unwrap();
    }

    /// Says of each table how many entries may come in, and how many more for flows that are open, as an agent does, until that second of the monotonic
    /// clock.
    pub(crate) fn spare(&mut self, entries: i64, reserve: i64, until: u64) {
        let mut map: Array<&mut MapData, Spare> =
            Array::try_from(self.datapath.ebpf.map_mut("spare").unwrap()).unwrap();
        (0..Spare::TABLES as u32).for_each(|index| map.set(index, Spare { entries, reserve, until }, 0).unwrap());
    }

    /// Makes the device of index `port` a port of the bridge of index `bridge`.
    pub(crate) fn bridge(&mut self, port: u32, bridge: u32) {
        let mut bridges: HashMap<&mut MapData, u32, u32> =
            HashMap::try_from(self.datapath.ebpf.map_mut("bridges").unwrap()).unwrap();
        bridges.insert(port, bridge, 0).unwrap();
    }

    /// Makes the device a port of some bridge, or of none.
    pub(crate) fn bridge_port(&mut self, is_one: bool) {
        let mut bridges: HashMap<&mut MapData, u32, u32> =
            HashMap::try_from(self.datapath.ebpf.map_mut("bridges").unwrap()).unwrap();
        if is_one {
            bridges.insert(1, 9, 0).unwrap();
        } else {
            let _ = bridges.remove(&1);
        }
    }

    /// Makes the device of that index what `role` says, with the node's addresses.
    pub(crate) fn device_at(&mut self, index: u32, role: u8) {
        let [v4, v6] = casts().map(|c| c.node);
        self.put_device(index, role, (Some(v4), Some(v6)), 0);
    }

    /// Makes the device what `role` says, with the node's addresses.
    pub(crate) fn device(&mut self, role: u8) {
        let [v4, v6] = casts().map(|c| c.node);
        self.device_with(Some((role, Some(v4), Some(v6))));
    }

    pub(crate) fn device_with(&mut self, device: Option<(u8, Option<IpAddr>, Option<IpAddr>)>) {
        match device {
            Some((role, v4, v6)) => self.put_device(1, role, (v4, v6), 0),
            None => {
                let _ = self.devices().remove(&1);
            }
        }
    }

    fn put_device(&mut self, index: u32, role: u8, (v4, v6): (Option<IpAddr>, Option<IpAddr>), netns: u16) {
        let source4 = v4.map_or(Ipv4Be::UNSPECIFIED, |ip| Ipv4Be::from_ip(ip).unwrap());
        let source6 = v6.map_or(Ipv6Be::UNSPECIFIED, |ip| Ipv6Be::from_ip(ip).unwrap());
        self.devices().insert(index, DeviceValue { source6, source4, role, flags: 0, netns }, 0).unwrap();
    }

    fn devices(&mut self) -> HashMap<&mut MapData, u32, DeviceValue> {
        HashMap::try_from(self.datapath.ebpf.map_mut("devices").unwrap()).unwrap()
    }

    /// A frontend that picks from all `backends` whoever asks; what comes from outside is masqueraded.
    pub(crate) fn service(&mut self, service: u32, vip: SocketAddr, backends: &[SocketAddr]) {
        let spec = Spec { verdicts: usual(), ..Spec::pick_all(service, backends) };
        for proto in PROTOS {
            self.datapath.frontend(vip, proto, &spec);
        }
    }

    /// Runs a packet through a program: verdict and packet out.
    pub(crate) fn run(&self, hook: Hook, frame: &[u8]) -> (i32, Vec<u8>) {
        let name = match hook {
            Hook::Ingress => "tc_ingress_ether",
            Hook::Egress => "tc_egress_ether",
        };
        if self.summed {
            return self.run_summed(name, frame).unwrap_or_else(|e| {
                panic!("{name}: {e} (EBADMSG: the sum over the whole packet is off) on {}", hex(frame))
            });
        }
        self.run_program(name, frame, None).unwrap_or_else(|e| panic!("{name}: {e:?} on {frame:02x?}"))
    }

    /// The same with the hardware's sum, which the kernel compares when the program has run. (aya does not offer it.)
    pub(crate) fn run_summed(&self, name: &str, frame: &[u8]) -> io::Result<(i32, Vec<u8>)> {
        let Program::SchedClassifier(program) = self.datapath.ebpf.program(name).unwrap() else {
            panic!("{name} is not tc's")
        };
        let mut out = vec![0; 9000];
        let mut attr = TestRun {
            program: program.fd().unwrap().as_fd().as_raw_fd().cast_unsigned(),
            size_in: frame.len() as u32,
            size_out: out.len() as u32,
            data_in: frame.as_ptr().addr() as u64,
            data_out: out.as_mut_ptr().addr() as u64,
            repeat: 1,
            flags: CHECKSUM_COMPLETE,
            ..TestRun::default()
        };
        // SAFETY: `attr` is a prefix of `union bpf_attr`, and its pointers are to buffers that live on and are as long as it says.
        let rc = unsafe { nix::libc::syscall(nix::libc::SYS_bpf, PROG_TEST_RUN, &raw mut attr, size_of::<TestRun>()) };
        if rc != 0 {
            return Err(io::Error::last_os_error());
        }
        out.truncate(attr.size_out as usize);
        Ok((attr.verdict.cast_signed(), out))
    }

    pub(crate) fn run_program(
        &self,
        name: &str,
        frame: &[u8],
        ctx: Option<&[u8]>,
    ) -> Result<(i32, Vec<u8>), aya::programs::ProgramError> {
        let mut out = vec![0; 9000];
        let options =
            TestRunOptions { data_in: Some(frame), data_out: Some(&mut out), ctx_in: ctx, ..TestRunOptions::default() };
        let result = match self.datapath.ebpf.program(name).unwrap() {
            Program::SchedClassifier(program) => program.test_run(options)?,
            Program::Xdp(program) => program.test_run(options)?,
            _ => panic!("{name} takes no packets"),
        };
        out.truncate(result.data_size_out as usize);
        Ok((result.return_value as i32, out))
    }

    /// The packet must leave as `expected`, to the byte, with all sums right.
    #[track_caller]
    pub(crate) fn expect(&mut self, hook: Hook, packet: &Packet, expected: &Packet) {
        self.expect_frame(hook, &packet.frame(), &expected.frame());
    }

    #[track_caller]
    pub(crate) fn expect_frame(&mut self, hook: Hook, frame: &[u8], expected: &[u8]) {
        let (verdict, out) = self.run(hook, frame);
        assert_eq!(sums(expected), Sums::Right, "the expectation itself");
        assert_eq!((verdict, hex(&out)), (NEXT, hex(expected)), "{hook:?}: in was {}", hex(frame));
        assert_eq!(sums(&out), Sums::Right);
    }

    #[track_caller]
    pub(crate) fn untouched(&mut self, hook: Hook, frame: &[u8]) {
        let (verdict, out) = self.run(hook, frame);
        assert_eq!((verdict, hex(&out)), (NEXT, hex(frame)), "{hook:?}");
    }

    /// Runs a packet that is to be translated; returns its new ends.
    #[track_caller]
    pub(crate) fn translate(&mut self, hook: Hook, packet: &Packet) -> (SocketAddr, SocketAddr) {
        let (verdict, out) = self.run(hook, &packet.frame());
        assert_eq!(verdict, NEXT, "{hook:?} {packet:?}");
        assert_eq!(sums(&out), Sums::Right, "{hook:?} {packet:?}");
        let (src, dst) = super::packet::ends(&out);
        assert_eq!(hex(&out), hex(&packet.between(src, dst).frame()), "only ends change");
        (src, dst)
    }

    /// Both ways through both hooks until the flow is established, not masqueraded; returns the backend.
    #[track_caller]
    pub(crate) fn establish(&mut self, proto: u8, client: SocketAddr, vip: SocketAddr) -> SocketAddr {
        let (seen_client, backend) = self.translate(Hook::Ingress, &Packet::opening(proto, client, vip));
        let back = self.translate(Hook::Egress, &Packet::answer(proto, backend, seen_client));
        assert_eq!(back, (vip, client));
        if proto != UDP {
            self.translate(Hook::Ingress, &Packet::more(proto, client, vip));
        }
        backend
    }

    pub(crate) fn reason(&self, reason: Reason) -> u64 {
        self.datapath.reason(reason)
    }

    /// Every reason that was counted.
    pub(crate) fn reasons(&self) -> Vec<(&'static str, u64)> {
        Reason::ALL.into_iter().map(|r| (r.name(), self.reason(r))).filter(|(_, n)| *n != 0).collect()
    }

    pub(crate) fn counters(&self, service: u32) -> ServiceCounters {
        let map: PerCpuHashMap<_, u32, ServiceCounters> =
            PerCpuHashMap::try_from(self.datapath.ebpf.map("service_counters").unwrap()).unwrap();
        let mut total = ServiceCounters::default();
        if let Ok(values) = map.get(&service, 0) {
            for value in values.iter() {
                total.connections += value.connections;
                total.packets += value.packets;
                total.bytes += value.bytes;
                total.refused += value.refused;
                total.turns += value.turns;
            }
        }
        total
    }

    pub(crate) fn has_counters(&self, service: u32) -> bool {
        let map: PerCpuHashMap<_, u32, ServiceCounters> =
            PerCpuHashMap::try_from(self.datapath.ebpf.map("service_counters").unwrap()).unwrap();
        map.keys().any(|key| key.unwrap() == service)
    }

    /// As the agent does when a service is gone.
    pub(crate) fn forget_counters(&mut self, service: u32) {
        let mut map: PerCpuHashMap<_, u32, ServiceCounters> =
            PerCpuHashMap::try_from(self.datapath.ebpf.map_mut("service_counters").unwrap()).unwrap();
        map.remove(&service).unwrap();
    }

    /// Takes out what is over, if there is too little room, as the agent does every second.
    pub(crate) fn sweep(&self, sweep: &mut Sweep) -> Swept {
        let open = |name: &str| match self.datapath.ebpf.map(name).unwrap() {
            Map::LruHashMap(map) | Map::PerCpuArray(map) | Map::Array(map) => map.fd().as_fd().try_clone_to_owned(),
            map => panic!("{name}: {map:?}"),
        };
        sweep.look(open).unwrap()
    }

    /// The connection table.
    pub(crate) fn rows(&self) -> Vec<Row> {
        let mut rows = Vec::new();
        self.rows_of::<Ipv4Be>(&mut rows);
        self.rows_of::<Ipv6Be>(&mut rows);
        rows.sort();
        rows
    }

    fn rows_of<A: Table>(&self, rows: &mut Vec<Row>)
    where
        ConnectionKey<A>: aya::Pod,
        ConnectionValue<A>: aya::Pod,
    {
        for name in [A::HALF_OPEN, A::ESTABLISHED, A::ANSWERED] {
            let map: HashMap<_, ConnectionKey<A>, ConnectionValue<A>> =
                HashMap::try_from(self.datapath.ebpf.map(name).unwrap()).unwrap();
            rows.extend(map.iter().map(|entry| {
                let (key, value) = entry.unwrap();
                row(name != A::HALF_OPEN, &key, &value)
            }));
        }
    }

    /// Changes the entries that `which` names; `None` removes them. Returns how many there were.
    pub(crate) fn edit(&mut self, which: impl Fn(&Row) -> bool, change: Option<&dyn Fn(Notes<'_>)>) -> usize {
        self.edit_of::<Ipv4Be>(&which, change) + self.edit_of::<Ipv6Be>(&which, change)
    }

    fn edit_of<A: Table>(&mut self, which: &dyn Fn(&Row) -> bool, change: Option<&dyn Fn(Notes<'_>)>) -> usize
    where
        ConnectionKey<A>: aya::Pod,
        ConnectionValue<A>: aya::Pod,
    {
        let mut edited = 0;
        for name in [A::HALF_OPEN, A::ESTABLISHED, A::ANSWERED] {
            let mut map: HashMap<&mut MapData, ConnectionKey<A>, ConnectionValue<A>> =
                HashMap::try_from(self.datapath.ebpf.map_mut(name).unwrap()).unwrap();
            let found: Vec<_> = map
                .iter()
                .map(Result::unwrap)
                .filter(|(key, value)| which(&row(name != A::HALF_OPEN, key, value)))
                .collect();
            edited += found.len();
            for (key, mut value) in found {
                match change {
                    None => map.remove(&key).unwrap(),
                    Some(change) => {
                        let ConnectionValue { seen, checked, seal, .. } = &mut value;
                        change(Notes { seen, checked, seal });
                        map.insert(key, value, 0).unwrap();
                    }
                }
            }
        }
        edited
    }

    /// Adds flags to the way there of every established TCP flow, as the agent does.
    pub(crate) fn mark(&mut self, flags: u8) {
        self.mark_of::<Ipv4Be>(flags);
        self.mark_of::<Ipv6Be>(flags);
    }

    fn mark_of<A: Table>(&mut self, flags: u8)
    where
        ConnectionKey<A>: aya::Pod,
        ConnectionValue<A>: aya::Pod,
    {
        let mut map: HashMap<&mut MapData, ConnectionKey<A>, ConnectionValue<A>> =
            HashMap::try_from(self.datapath.ebpf.map_mut(A::ESTABLISHED).unwrap()).unwrap();
        for (key, value) in
            map.iter().map(Result::unwrap).filter(|(key, _)| key.hook == hook::INGRESS).collect::<Vec<_>>()
        {
            let value = ConnectionValue { flags: value.flags | flags, ..value }.sealed(&key);
            map.insert(key, value, 0).unwrap();
        }
    }

    /// Makes every entry's last packet `seconds` older, and the look for its pair.
    pub(crate) fn age(&mut self, seconds: u32) {
        self.edit(
            |_| true,
            Some(&|notes| {
                *notes.seen = notes.seen.wrapping_sub(seconds);
                *notes.checked = notes.checked.wrapping_sub(seconds);
            }),
        );
    }

    /// The records of fragments that came before their first one, since they were asked for last.
    pub(crate) fn held(&mut self) -> Vec<Vec<u8>> {
        let mut ring: RingBuf<&mut MapData> = RingBuf::try_from(self.datapath.ebpf.map_mut("held").unwrap()).unwrap();
        let mut records = Vec::new();
        while let Some(record) = ring.next() {
            records.push(record.to_vec());
        }
        records
    }

    /// Makes the first fragments that are remembered older.
    pub(crate) fn age_fragments(&mut self, seconds: u32) {
        self.age_fragments_of::<Ipv4Be>("fragments_v4", seconds);
        self.age_fragments_of::<Ipv6Be>("fragments_v6", seconds);
    }

    fn age_fragments_of<A>(&mut self, name: &str, seconds: u32)
    where
        FragmentKey<A>: aya::Pod,
    {
        let mut map: HashMap<&mut MapData, FragmentKey<A>, FragmentValue> =
            HashMap::try_from(self.datapath.ebpf.map_mut(name).unwrap()).unwrap();
        for (key, value) in map.iter().map(Result::unwrap).collect::<Vec<_>>() {
            map.insert(key, FragmentValue { seen: value.seen.wrapping_sub(seconds), ..value }, 0).unwrap();
        }
    }

    pub(crate) fn remove(&mut self, which: impl Fn(&Row) -> bool) -> usize {
        self.edit(which, None)
    }
}

fn row<A: Address>(established: bool, key: &ConnectionKey<A>, value: &ConnectionValue<A>) -> Row {
    let end = |addr: A, port: Be16| SocketAddr::new(addr.to_ip(), port.to_host());
    Row {
        established,
        hook: if key.hook == hook::INGRESS { Hook::Ingress } else { Hook::Egress },
        proto: key.proto,
        src: end(key.src, key.sport),
        dst: end(key.dst, key.dport),
        to: end(value.addr, value.port),
        other: value.other.to_host(),
        flags: value.flags,
        state: value.state,
        seen: value.seen,
        service: value.service,
    }
}

impl Row {
    pub(crate) fn is(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    pub(crate) fn has_seen(&self) -> bool {
        self.state & state::SEEN != 0
    }

    /// Main pair or masquerade pair, and the hook: what a test names an entry by.
    pub(crate) fn part(&self) -> (bool, Hook) {
        (self.is(flags::MASQUERADE), self.hook)
    }
}

/// Pods and the node keep their address, what comes from outside is masqueraded.
pub(crate) fn usual() -> [u8; origin::COUNT] {
    let mut verdicts = [verdict::PICK_ALL; origin::COUNT];
    verdicts[origin::EXTERNAL] = verdict::PICK_ALL | verdict::MASQUERADE;
    verdicts
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// `addr` with another port.
pub(crate) fn at(addr: SocketAddr, port: u16) -> SocketAddr {
    SocketAddr::new(addr.ip(), port)
}

/// Dice that tell their seed: `PACKETS_SEED` throws them again.
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn new() -> Self {
        let seed = env::var("PACKETS_SEED")
            .ok()
            .and_then(|s| s.parse().ok())
            .unwrap_or_else(|| SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64 | 1);
        println!("PACKETS_SEED={seed}");
        Self(seed)
    }

    /// xorshift64*.
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(crate) fn below(&mut self, n: usize) -> usize {
        ((self.next() >> 33) % n as u64) as usize
    }
}
