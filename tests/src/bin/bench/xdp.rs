//! D7: what XDP makes of established flows, by `BPF_PROG_TEST_RUN`: nanoseconds of the program alone, and frames that really are sent
//! (`BPF_F_TEST_XDP_LIVE_FRAMES`), to a veth whose other end drops them in XDP.
//!
//! Either way the next run finds the frame that the one before left behind, with another address, and a hop less each time. So a program of a few
//! instructions goes before: it writes the headers anew, with one of 1024 source ports, and calls ours by a tail call. The same before a program that
//! sends back whatever comes is what there is to compare with.
//!
//! Beside that what the stack makes of it with the tc programs: as many frames as a packet socket sends are translated on the way in, routed,
//! masqueraded on the way out, and counted by the other end.

use std::{
    collections::BTreeSet,
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use aya::{
    TestRunOptions,
    maps::{HashMap, PerCpuArray, PerCpuValues},
    programs::{SchedClassifier, TcAttachType, TestRun as _, Xdp, xdp::XdpMode},
};
use nix::libc;
use proxy_common::{
    Ipv4Be, Ipv6Be,
    connection::{ConnectionKey, ConnectionValue},
    counters::Reason,
    device::{DeviceValue, XdpDevice, role, xdp as flags},
    frontend::{origin, verdict},
    globals::socket_lb,
    proto::{TCP, UDP},
};

use crate::{
    Scale,
    bpf::{BPF_PROG_LOAD, Load, act, bpf},
    packets::packet,
    report::{Bound, Figure, Report},
    support::{Datapath, Globals, Spec},
    world::Netns,
};

const BEST_OF: usize = 7;
const BATCH: u32 = 64;
/// Source ports, a power of two, and the first of them.
const FLOWS: u16 = 1_024;
const FIRST: u16 = 40_000;
const SYN: u8 = 0x02;
const ACK: u8 = 0x10;
/// `XDP_TX`.
const BACK: u32 = 3;
/// Interface indexes: where frames come in and leave, and the other end.
const IN: u32 = 71;
const SINK: u32 = 72;
const OWN: [u8; 6] = [2, 0, 0, 0, 0, 0x47];
const PEER: [u8; 6] = [2, 0, 0, 0, 0, 0x48];

#[derive(Clone, Copy)]
struct Family {
    name: &'static str,
    client: IpAddr,
    vip: SocketAddr,
    backend: SocketAddr,
}

fn families() -> [Family; 2] {
    let v4 = |d, port| SocketAddr::new(Ipv4Addr::new(10, 1, 0, d).into(), port);
    let v6 = |d, port| SocketAddr::new(Ipv6Addr::new(0xfd00, 0x10, 1, 0, 0, 0, 0, d).into(), port);
    [
        Family { name: "v4", client: v4(2, 0).ip(), vip: v4(1, 30_080), backend: v4(3, 8080) },
        Family { name: "v6", client: v6(2, 0).ip(), vip: v6(1, 30_080), backend: v6(3, 8080) },
    ]
}

/// As it comes in from the only neighbour there is.
fn arriving(from: SocketAddr, to: SocketAddr, proto: u8, tcp_flags: u8) -> Vec<u8> {
    let mut frame = packet(from, to, proto, tcp_flags);
    frame.splice(..12, OWN.into_iter().chain(PEER));
    frame
}

const fn instruction(op: u8, dst: u8, src: u8, off: i16, imm: i32) -> u64 {
    op as u64 | (dst as u64) << 8 | (src as u64) << 12 | (off as u16 as u64) << 16 | (imm as u32 as u64) << 32
}

/// `lddw`.
fn wide(dst: u8, src: u8, value: u64) -> [u64; 2] {
    [instruction(0x18, dst, src, 0, value as u32 as i32), instruction(0, 0, 0, 0, (value >> 32) as i32)]
}

/// r0 = verdict; exit
fn says(verdict: u32) -> [u64; 2] {
    [instruction(0xb7, 0, 0, 0, verdict as i32), instruction(0x95, 0, 0, 0, 0)]
}

fn load(code: &[u64]) -> Result<OwnedFd> {
    bpf(
        BPF_PROG_LOAD,
        &Load {
            // XDP, and to be attached as such: programs that call one another agree in both.
            kind: 6,
            attach: 37,
            instructions: code.len() as u32,
            code: code.as_ptr() as u64,
            license: c"GPL".as_ptr() as u64,
            ..Default::default()
        },
    )
}

/// Writes the headers of `frame` anew, with one of so many source ports, and goes on with the program in `next`.
fn rewinding(frame: &[u8], flows: u16, headers: usize, ports: usize, next: &OwnedFd) -> Result<OwnedFd> {
    let length = headers.next_multiple_of(8);
    ensure!(length <= frame.len(), "a frame of headers alone");
    let mut body = vec![];
    for (n, chunk) in frame[..length].chunks_exact(8).enumerate() {
        body.extend(wide(4, 0, u64::from_le_bytes(chunk.try_into()?)));
        body.push(instruction(0x7b, 1, 4, (n * 8) as i16, 0));
    }
    body.push(instruction(0x6b, 1, 0, ports as i16, 0));
    body.push(instruction(0xbf, 1, 6, 0, 0));
    body.extend(wide(2, 1, next.as_raw_fd() as u64));
    body.push(instruction(0xb7, 3, 0, 0, 0));
    body.push(instruction(0x85, 0, 0, 0, 12));
    let mut code = vec![
        instruction(0xbf, 6, 1, 0, 0),
        // bpf_get_prandom_u32, into the range of ports, in network order.
        instruction(0x85, 0, 0, 0, 7),
        instruction(0x57, 0, 0, 0, i32::from(flows - 1)),
        instruction(0x07, 0, 0, 0, i32::from(FIRST)),
        instruction(0xdc, 0, 0, 0, 16),
        instruction(0x61, 1, 6, 0, 0),
        instruction(0x61, 2, 6, 4, 0),
        instruction(0xbf, 3, 1, 0, 0),
        instruction(0x07, 3, 0, 0, length as i32),
        instruction(0x2d, 3, 2, body.len() as i16, 0),
    ];
    code.extend(body);
    code.extend(says(0));
    load(&code)
}

/// A map of one program, which others call.
fn callable(program: i32) -> Result<OwnedFd> {
    #[repr(C)]
    struct Create([u32; 4]);
    #[repr(C)]
    struct Update {
        map: u64,
        key: u64,
        value: u64,
        flags: u64,
    }
    let map = bpf(0, &Create([3, 4, 4, 1]))?;
    let (key, value) = (0_u32, program as u32);
    let (key, value) = (&raw const key as u64, &raw const value as u64);
    act(2, &mut Update { map: map.as_raw_fd() as u64, key, value, flags: 0 })?;
    Ok(map)
}

/// `BPF_PROG_TEST_RUN`: verdict and nanoseconds for each run. Live frames have no verdict.
fn test_run(program: &OwnedFd, frame: &[u8], repeat: u32, live: bool) -> Result<(u32, u32)> {
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
        ctx_size_in: u32,
        ctx_size_out: u32,
        ctx_in: u64,
        ctx_out: u64,
        flags: u32,
        cpu: u32,
        batch: u32,
        pad: u32,
    }
    let context = context(frame);
    let mut run = TestRun {
        program: program.as_raw_fd() as u32,
        size_in: frame.len() as u32,
        data_in: frame.as_ptr() as u64,
        repeat,
        ctx_size_in: size_of_val(&context) as u32,
        ctx_in: context.as_ptr() as u64,
        flags: if live { 1 << 1 } else { 0 },
        batch: if live { BATCH } else { 0 },
        ..Default::default()
    };
    act(10, &mut run)?;
    Ok((run.verdict, run.duration))
}

/// `struct xdp_md`.
fn context(frame: &[u8]) -> [u32; 6] {
    [0, frame.len() as u32, 0, IN, 0, 0]
}

struct Bench {
    datapath: Datapath,
    /// Keeps the other end dropping.
    _sink: [OwnedFd; 2],
}

impl Bench {
    /// In a namespace of its own.
    fn new() -> Result<Option<Self>> {
        let globals = Globals { socket_lb: socket_lb::ALL, node_netns_cookie: u64::MAX, connected_udp: 1 };
        let mut datapath = Datapath::load_sized(&globals, 1_024, 1_024, &[]);
        if datapath.ebpf.program("xdp_ingress").is_none() {
            return Ok(None);
        }
        let sink = load(&says(1))?;
        // BPF_LINK_CREATE, by the driver.
        let link = bpf(28, &[sink.as_raw_fd() as u32, SINK, 37, 1 << 2])?;
        let program: &mut Xdp = datapath.ebpf.program_mut("xdp_ingress").context("no program")?.try_into()?;
        program.load()?;
        // Only then has the device what a frame can come in by.
        program.attach_to_if_index(IN, XdpMode::Driver)?;

        outward(&mut datapath)?;
        let [a, b, c, d, e, f] = OWN;
        let mac = [[a, b], [c, d], [e, f]].map(u16::from_ne_bytes);
        let mut xdp_devices: HashMap<_, u32, XdpDevice> =
            datapath.ebpf.map_mut("xdp_devices").context("no xdp_devices map")?.try_into()?;
        xdp_devices.insert(IN, XdpDevice { mac, flags: flags::SENDS | flags::BOUNCES }, 0)?;
        // The stack has no turn: one packet in five seconds would end a run.
        let mut neighbours: PerCpuArray<_, u32> =
            datapath.ebpf.map_mut("neighbours").context("no neighbours map")?.try_into()?;
        let cpus = aya::util::nr_cpus().map_err(|(what, error)| anyhow::anyhow!("{what}: {error}"))?;
        for slot in 0..neighbours.len() {
            neighbours.set(slot, PerCpuValues::try_from(vec![u32::MAX / 2; cpus])?, 0)?;
        }
        Ok(Some(Self { datapath, _sink: [sink, link] }))
    }

    fn program(&self) -> Result<&Xdp> {
        Ok(self.datapath.ebpf.program("xdp_ingress").context("no program")?.try_into()?)
    }

    fn run(&self, frame: &[u8]) -> Result<Vec<u8>> {
        let context: Vec<u8> = context(frame).iter().flat_map(|word| word.to_ne_bytes()).collect();
        let mut out = vec![0; frame.len()];
        let result = self.program()?.test_run(TestRunOptions {
            data_in: Some(frame),
            data_out: Some(&mut out),
            ctx_in: Some(&context),
            ..Default::default()
        })?;
        ensure!(result.return_value == BACK, "verdict {} on {frame:02x?}", result.return_value);
        Ok(out)
    }

    /// Opens every flow, both sides heard. Where the source port stands.
    fn establish(&self, family: Family, proto: u8) -> Result<usize> {
        let Family { client, vip, backend, .. } = family;
        let ports = if client.is_ipv4() { 34 } else { 54 };
        let mut given = BTreeSet::new();
        for port in FIRST..FIRST + FLOWS {
            let client = SocketAddr::new(client, port);
            let sent = self.run(&arriving(client, vip, proto, SYN))?;
            let seen = u16::from_be_bytes([sent[ports], sent[ports + 1]]);
            ensure!(given.insert(seen), "two flows have port {seen}");
            let answer = self.run(&arriving(backend, SocketAddr::new(vip.ip(), seen), proto, SYN | ACK))?;
            ensure!(answer[ports..ports + 2] == vip.port().to_be_bytes(), "the answer is not the VIP's");
            self.run(&arriving(client, vip, proto, ACK))?;
        }
        ensure!(self.half_open()? == 0, "some flows are not established");
        Ok(ports)
    }

    fn half_open(&self) -> Result<usize> {
        let map = |name| self.datapath.ebpf.map(name).context(name);
        let v4: HashMap<_, ConnectionKey<Ipv4Be>, ConnectionValue<Ipv4Be>> = map("half_open_v4")?.try_into()?;
        let v6: HashMap<_, ConnectionKey<Ipv6Be>, ConnectionValue<Ipv6Be>> = map("half_open_v6")?.try_into()?;
        Ok(v4.keys().count() + v6.keys().count())
    }

    fn bypassed(&self) -> Result<u64> {
        let reasons: PerCpuArray<_, u64> = self.datapath.ebpf.map("reasons").context("no reasons map")?.try_into()?;
        Ok(reasons.get(&(Reason::Bypassed as u32), 0)?.iter().sum())
    }
}

/// Makes the device one that leads to the outside, with frontends that masquerade who comes by it.
fn outward(datapath: &mut Datapath) -> Result<()> {
    let [v4, v6] = families();
    let (IpAddr::V4(source4), IpAddr::V6(source6)) = (v4.vip.ip(), v6.vip.ip()) else { bail!("families") };
    let value = DeviceValue {
        source4: Ipv4Be::from_octets(source4.octets()),
        source6: Ipv6Be::from_octets(source6.octets()),
        role: role::OUTWARD,
        ..Default::default()
    };
    let mut devices: HashMap<_, u32, DeviceValue> =
        datapath.ebpf.map_mut("devices").context("no devices map")?.try_into()?;
    devices.insert(IN, value, 0)?;
    let mut verdicts = [verdict::PICK_ALL; origin::COUNT];
    verdicts[origin::EXTERNAL] |= verdict::MASQUERADE;
    for Family { vip, backend, .. } in [v4, v6] {
        for proto in [TCP, UDP] {
            datapath.frontend(vip, proto, &Spec { verdicts, ..Spec::pick_all(1, &[backend]) });
        }
    }
    Ok(())
}

/// Sends by the other end.
struct Sender(OwnedFd);

impl Sender {
    fn open() -> Result<Self> {
        // SAFETY: no pointers.
        let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
        ensure!(fd >= 0, "a packet socket: {}", std::io::Error::last_os_error());
        // SAFETY: just made, for us alone.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: plain old data; all zeroes is a value of it.
        let mut at: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        at.sll_family = libc::AF_PACKET as u16;
        at.sll_ifindex = SINK as i32;
        let length = size_of_val(&at) as libc::socklen_t;
        // SAFETY: `at` is a whole sockaddr_ll.
        let bound = unsafe { libc::bind(socket.as_raw_fd(), (&raw const at).cast(), length) };
        ensure!(bound == 0, "bind a packet socket: {}", std::io::Error::last_os_error());
        Ok(Self(socket))
    }

    /// Some frames by one call. How many were taken.
    fn send(&self, frames: &[Vec<u8>]) -> Result<usize> {
        let part = |frame: &Vec<u8>| libc::iovec { iov_base: frame.as_ptr().cast_mut().cast(), iov_len: frame.len() };
        let mut parts: Vec<_> = frames.iter().map(part).collect();
        let message = |part: &mut libc::iovec| {
            // SAFETY: plain old data; all zeroes is a value of it.
            let mut message: libc::mmsghdr = unsafe { std::mem::zeroed() };
            (message.msg_hdr.msg_iov, message.msg_hdr.msg_iovlen) = (part, 1);
            message
        };
        let mut messages: Vec<_> = parts.iter_mut().map(message).collect();
        // SAFETY: as many headers as are told, each with one part, all of which live until the call returns; the frames are only read.
        let sent = unsafe { libc::sendmmsg(self.0.as_raw_fd(), messages.as_mut_ptr(), messages.len() as u32, 0) };
        usize::try_from(sent).with_context(|| format!("sendmmsg: {}", std::io::Error::last_os_error()))
    }
}

/// The tc programs and the stack, as fast as a socket sends.
fn by_tc(report: &mut Report) -> Result<()> {
    let globals = Globals { socket_lb: socket_lb::ALL, node_netns_cookie: u64::MAX, connected_udp: 1 };
    let mut datapath = Datapath::load_sized(&globals, 1_024, 1_024, &[]);
    outward(&mut datapath)?;
    let sink = load(&says(1))?;
    let _link = bpf(28, &[sink.as_raw_fd() as u32, SINK, 37, 1 << 2])?;
    for (name, way) in [("tc_ingress_ether", TcAttachType::Ingress), ("tc_egress_ether", TcAttachType::Egress)] {
        let program: &mut SchedClassifier = datapath.ebpf.program_mut(name).context(name)?.try_into()?;
        program.load()?;
        program.attach("in", way)?;
    }
    let sender = Sender::open()?;
    for Family { name, client, vip, backend } in families() {
        for (proto, proto_name) in [(TCP, "TCP"), (UDP, "UDP")] {
            let what = format!("{name} {proto_name}");
            // Of the range that masquerading takes ports from, so that each keeps its own.
            let each = |frame: &dyn Fn(SocketAddr, SocketAddr) -> Vec<u8>| -> Vec<_> {
                let ports = (0..FLOWS).map(|n| 10_000 + n);
                ports.map(|port| frame(SocketAddr::new(client, port), SocketAddr::new(vip.ip(), port))).collect()
            };
            let openings = each(&|client, _| arriving(client, vip, proto, SYN));
            let answers = each(&|_, seen| arriving(backend, seen, proto, SYN | ACK));
            let frames = each(&|client, _| arriving(client, vip, proto, ACK));
            for (step, told) in [("openings", &openings), ("answers", &answers), ("others", &frames)] {
                let before = received()?;
                for some in told.chunks(BATCH as usize) {
                    ensure!(sender.send(some)? == some.len(), "not all frames were taken");
                }
                std::thread::sleep(Duration::from_millis(100));
                let got = received()? - before;
                ensure!(got >= u64::from(FLOWS), "{what}: of {FLOWS} {step} {got} arrived");
            }
            let mut rates = vec![];
            for _ in 0..BEST_OF {
                let (before, start) = (received()?, Instant::now());
                for some in frames.chunks(BATCH as usize).cycle() {
                    sender.send(some)?;
                    if start.elapsed() > Duration::from_millis(300) {
                        break;
                    }
                }
                let took = start.elapsed();
                // What the stack had no room for is lost, and not counted.
                std::thread::sleep(Duration::from_millis(50));
                rates.push((received()? - before) as f64 / took.as_secs_f64() / 1e6);
            }
            report.row(
                "D7",
                format!("{what} the same by tc and the stack, as fast as a socket sends"),
                "Mpps",
                Figure::of(&rates),
            );
        }
    }
    Ok(())
}

/// Best and worst of some, in nanoseconds for each packet.
fn repeated(program: &OwnedFd, frame: &[u8], repeat: u32, live: bool) -> Result<Figure> {
    let mut ns = vec![];
    for _ in 0..BEST_OF {
        let (verdict, took) = test_run(program, frame, repeat, live)?;
        ensure!(live || verdict == BACK, "verdict {verdict}");
        ns.push(f64::from(took));
    }
    Ok(Figure::of(&ns))
}

/// Packets that `ethtool` says the other end got.
fn received() -> Result<u64> {
    let out = std::process::Command::new("ethtool").args(["-S", "sink"]).output()?;
    let text = String::from_utf8(out.stdout)?;
    let count = text.lines().find_map(|line| line.trim().strip_prefix("rx_queue_0_xdp_packets:"));
    count.context("no rx_queue_0_xdp_packets")?.trim().parse().context("a number")
}

pub fn measure(scale: &Scale, report: &mut Report) -> Result<()> {
    let netns = Netns::new()?;
    let [v4, v6] = families();
    let mut batch = format!(
        "link set lo up\n\
         link add in index {IN} type veth peer name sink index {SINK}\n\
         link set in address 02:00:00:00:00:47\n\
         link set in up\n\
         link set sink up\n\
         addr add {}/24 dev in\n\
         addr add {}/64 dev in nodad\n",
        v4.vip.ip(),
        v6.vip.ip()
    );
    for ip in [v4.client, v4.backend.ip(), v6.client, v6.backend.ip()] {
        batch += &format!("neigh add {ip} lladdr 02:00:00:00:00:48 dev in nud permanent\n");
    }
    netns.ip(&batch)?;
    let report = std::sync::Mutex::new(report);
    netns.enter(|| {
        let mut report = report.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        fs::write("/proc/sys/net/ipv4/ip_forward", "1")?;
        fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1")?;
        // The way to the backend leads out where it came in.
        for device in ["all", "in"] {
            fs::write(format!("/proc/sys/net/ipv4/conf/{device}/send_redirects"), "0")?;
        }
        inside(scale, &mut report)?;
        by_tc(&mut report)
    })
}

fn inside(scale: &Scale, report: &mut Report) -> Result<()> {
    let Some(bench) = Bench::new()? else {
        report.skip("D7: the object has no XDP program");
        return Ok(());
    };
    let ours = callable(bench.program()?.fd()?.as_fd().as_raw_fd())?;
    let nothing = load(&says(BACK))?;
    let nothing = callable(nothing.as_raw_fd())?;
    for family in families() {
        for (proto, proto_name) in [(TCP, "TCP"), (UDP, "UDP")] {
            let name = |what: &str| format!("{} {proto_name} {what}", family.name);
            let ports = bench.establish(family, proto)?;
            let frame = arriving(SocketAddr::new(family.client, FIRST), family.vip, proto, ACK);
            let headers = ports + if proto == TCP { 20 } else { 8 };
            let before = |flows, next| rewinding(&frame, flows, headers, ports, next);
            let (floor, one, ours) = (before(FLOWS, &nothing)?, before(1, &ours)?, before(FLOWS, &ours)?);
            let alone = |program| repeated(program, &frame, scale.repeat, false);
            let (idle, single, many) = (alone(&floor)?, alone(&one)?, alone(&ours)?);
            report.row("D7", name("established, masqueraded, program alone"), "ns", many);
            report.row("D7", name("the same, one flow"), "ns", single);
            report.row("D7", name("the same, a program that only sends back"), "ns", idle);
            if family.name == "v4" && proto == TCP {
                let own = single.min - idle.min;
                report.bar("D6", "XDP, established, masqueraded, one flow, v4 TCP, ns", Bound::AtMost(70.0), own, true);
            }
            // By turns; what did not arrive was not sent.
            let mut live: [Vec<f64>; 2] = Default::default();
            for _ in 0..BEST_OF {
                for (program, ns) in [&floor, &ours].into_iter().zip(&mut live) {
                    let (before, bypassed) = (received()?, bench.bypassed()?);
                    ns.push(f64::from(test_run(program, &frame, scale.repeat, true)?.1));
                    let (got, sent) = (received()? - before, bench.bypassed()? - bypassed);
                    ensure!(got >= u64::from(scale.repeat) / 100 * 99, "of {} frames {got} arrived", scale.repeat);
                    let wanted = if std::ptr::eq(program, &floor) { 0 } else { u64::from(scale.repeat) };
                    ensure!(sent >= wanted, "of {wanted} frames {sent} were translated");
                }
            }
            let [idle, sent] = live.map(|ns| Figure::of(&ns.iter().map(|ns| 1_000.0 / ns).collect::<Vec<_>>()));
            report.row("D7", name("established, masqueraded, sent"), "Mpps", sent);
            report.row("D7", name("the same, a program that only sends back"), "Mpps", idle);
            if family.name == "v4" && proto == TCP {
                report.bar("D7", "established, v4 TCP, sent, Mpps", Bound::AtLeast(8.0), sent.max, true);
                report.bar(
                    "D7",
                    "… over a program that only sends back",
                    Bound::AtLeast(0.75),
                    sent.max / idle.max,
                    true,
                );
            }
        }
    }
    Ok(())
}
