//! D6: nanoseconds per packet of the per-packet programs alone, by `BPF_PROG_TEST_RUN`.
//!
//! A repeated run sees the packet as the run before left it. For established flows two frontends therefore lead to each
//! other, `VIP → Y` and `Y → VIP`: every run translates, and the packet comes back every second time. So do its fragments and the errors
//! about it. New flows and refusals are measured one run at a time, each with a packet of its own, less what a packet costs that the program
//! does not look at.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context as _, Result, ensure};
use aya::{
    Pod, TestRunOptions,
    maps::HashMap,
    programs::{SchedClassifier, TestRun as _},
};
use proxy_common::{
    Address, Be16, Ipv4Be, Ipv6Be,
    connection::{ConnectionKey, ConnectionValue, hook},
    device::{DeviceValue, role},
    frontend::{algorithm, origin, verdict},
    globals::socket_lb,
    proto::{SCTP, TCP, UDP},
};

use crate::{
    Scale,
    frame::{Body, ETHERNET, Packet},
    report::{Bound, Figure, Report},
    support::{Datapath, Globals, Spec},
    world::Netns,
};

pub(crate) use crate::frame::{ACK, SYN};

const BEST_OF: usize = 7;
/// Room for half-open flows when they evict each other.
const SMALL: u32 = 1_024;

/// First of the ids of the frontends that differ in how they choose.
const CHOICES: u32 = 1_000_000;

/// Number of the first of the clients that ask one frontend alone, from many ports. Below are those that ask from one port.
const ALONE: u16 = 9_000;
/// Of the one that asks the node port.
pub const OUTSIDE: u16 = ALONE + 4;

pub const INGRESS: &str = "tc_ingress_ether";
pub const EGRESS: &str = "tc_egress_ether";

pub const PROTOS: [(u8, &str); 3] = [(TCP, "TCP"), (UDP, "UDP"), (SCTP, "SCTP")];

/// The client's port of the flow that is measured as an established one.
pub const ESTABLISHED: u16 = 40_000;

/// Where a fragmented packet is cut: behind TCP's checksum.
const CUT: usize = 24;

#[derive(Clone, Copy)]
pub struct Family {
    pub name: &'static str,
    pub client: IpAddr,
    pub vip: SocketAddr,
    /// Backend of `vip`, and a frontend that leads back.
    pub mirror: SocketAddr,
    empty: SocketAddr,
    elsewhere: SocketAddr,
    /// Three backends each: chosen at random; in turns; with session affinity; by Maglev.
    pub random: SocketAddr,
    turns: SocketAddr,
    sticky: SocketAddr,
    maglev: SocketAddr,
    /// Masqueraded, with this address, to one backend.
    pub node_port: SocketAddr,
    pub node: IpAddr,
    pub backends: [SocketAddr; 3],
}

pub fn families() -> [Family; 2] {
    let v4 = |a, b, c, d, port| SocketAddr::new(Ipv4Addr::new(a, b, c, d).into(), port);
    let v6 = |net, host, port| SocketAddr::new(Ipv6Addr::new(0xfd00, 0x10, net, 0, 0, 0, 0, host).into(), port);
    [
        Family {
            name: "v4",
            client: v4(10, 1, 0, 2, 0).ip(),
            vip: v4(10, 111, 0, 1, 80),
            mirror: v4(10, 111, 0, 2, 8080),
            empty: v4(10, 111, 0, 3, 80),
            elsewhere: v4(10, 2, 0, 9, 80),
            random: v4(10, 111, 0, 4, 80),
            sticky: v4(10, 111, 0, 5, 80),
            maglev: v4(10, 111, 0, 6, 80),
            turns: v4(10, 111, 0, 7, 80),
            node_port: v4(192, 168, 7, 1, 30_080),
            node: v4(192, 168, 7, 2, 0).ip(),
            backends: [21, 22, 23].map(|host| v4(10, 2, 0, host, 8080)),
        },
        Family {
            name: "v6",
            client: v6(1, 2, 0).ip(),
            vip: v6(0x111, 1, 80),
            mirror: v6(0x111, 2, 8080),
            empty: v6(0x111, 3, 80),
            elsewhere: v6(2, 9, 80),
            random: v6(0x111, 4, 80),
            sticky: v6(0x111, 5, 80),
            maglev: v6(0x111, 6, 80),
            turns: v6(0x111, 7, 80),
            node_port: v6(7, 1, 30_080),
            node: v6(7, 2, 0).ip(),
            backends: [0x21, 0x22, 0x23].map(|host| v6(2, host, 8080)),
        },
    ]
}

/// From `from` to `to`; an SCTP packet's chunk says what `flags` say of TCP.
fn described(from: SocketAddr, to: SocketAddr, proto: u8, flags: u8) -> Packet {
    let packet = match (proto, flags) {
        (TCP, _) => Packet::tcp(from, to, flags),
        (_, SYN) => Packet::opening(proto, from, to),
        (_, ACK) => Packet::more(proto, from, to),
        _ => Packet::answer(proto, from, to),
    };
    packet.with_payload(&[0; 18])
}

/// The same as an Ethernet frame.
pub fn packet(from: SocketAddr, to: SocketAddr, proto: u8, flags: u8) -> Vec<u8> {
    described(from, to, proto, flags).frame()
}

/// That a packet is too long for a link, as a router says it to `to`: with the least of it that it may quote.
fn too_long(from: IpAddr, to: IpAddr, quoted: &Packet) -> Vec<u8> {
    let (kind, code, least) = if from.is_ipv4() { (3, 4, 28) } else { (2, 0, 48) };
    Packet::icmp(from, to, kind, code, &quoted.frame()[ETHERNET..ETHERNET + least]).frame()
}

/// What the programs do not look at.
pub fn arp() -> Vec<u8> {
    let mut frame = vec![0_u8; 60];
    frame.splice(12..14, [0x08, 0x06]);
    frame
}

pub struct Programs {
    pub datapath: Datapath,
}

impl Programs {
    /// `None` if the object has no per-packet programs.
    fn load(services: u32, half_open: Option<u32>) -> Result<Option<Self>> {
        let sizes = half_open.map(|room| [("half_open_v4", room), ("half_open_v6", room)]);
        Self::load_sized(services, sizes.as_ref().map_or(&[], |sizes| &sizes[..]))
    }

    /// The same, with the sizes of some maps.
    pub fn load_sized(services: u32, sizes: &[(&str, u32)]) -> Result<Option<Self>> {
        let globals = Globals { socket_lb: socket_lb::ALL, node_netns_cookie: u64::MAX, connected_udp: 1 };
        // Six Maglev tables of 4513 positions.
        let mut datapath = Datapath::load_sized(&globals, 2 * services + 1_024, 2 * services + 28_672, sizes);
        if datapath.ebpf.program(INGRESS).is_none() {
            return Ok(None);
        }
        for name in [INGRESS, EGRESS] {
            let program: &mut SchedClassifier = datapath.ebpf.program_mut(name).context(name)?.try_into()?;
            program.load()?;
        }
        // Test runs happen on the loopback device.
        let mut devices: HashMap<_, u32, DeviceValue> =
            datapath.ebpf.map_mut("devices").context("no devices map")?.try_into()?;
        let [v4, v6] = families().map(|family| family.node);
        let source4 = Ipv4Be::from_ip(v4).context("an IPv4 address")?;
        let source6 = Ipv6Be::from_ip(v6).context("an IPv6 address")?;
        devices.insert(1, DeviceValue { role: role::POD, source4, source6, ..Default::default() }, 0)?;

        for family in families() {
            for (proto, _) in PROTOS {
                let refused = Spec { verdicts: [verdict::REJECT; origin::COUNT], ..Spec::pick_all(3, &[]) };
                datapath.frontend(family.vip, proto, &Spec::pick_all(1, &[family.mirror]));
                datapath.frontend(family.mirror, proto, &Spec::pick_all(2, &[family.vip]));
                datapath.frontend(family.empty, proto, &refused);
                // The kinds of choice; services of their own, beyond those of the many.
                let random = Spec::pick_all(CHOICES, &family.backends);
                let sticky = Spec { service: CHOICES + 1, affinity_secs: 10_800, ..random.clone() };
                let maglev = Spec { service: CHOICES + 2, algorithm: algorithm::MAGLEV, ..random.clone() };
                let turns = Spec { service: CHOICES + 4, algorithm: algorithm::ROUND_ROBIN, ..random.clone() };
                datapath.frontend(family.random, proto, &random);
                datapath.frontend(family.sticky, proto, &sticky);
                datapath.frontend(family.maglev, proto, &maglev);
                datapath.frontend(family.turns, proto, &turns);
                let verdicts = [verdict::PICK_ALL | verdict::MASQUERADE; origin::COUNT];
                let [backend, ..] = family.backends;
                datapath.frontend(
                    family.node_port,
                    proto,
                    &Spec { verdicts, ..Spec::pick_all(CHOICES + 3, &[backend]) },
                );
            }
        }
        for index in 1..services {
            let spec = Spec::pick_all(index + 3, &[SocketAddr::new(Ipv4Addr::new(10, 2, 0, 2).into(), 8080)]);
            datapath.frontend(crate::services::vip(index).into(), TCP, &spec);
        }
        Ok(Some(Self { datapath }))
    }

    /// Nanoseconds of one run, and the packet that came out of it.
    pub fn pass(&self, program: &str, packet: &[u8]) -> Result<(f64, Vec<u8>)> {
        let program: &SchedClassifier = self.datapath.ebpf.program(program).context("no program")?.try_into()?;
        let mut out = vec![0; packet.len()];
        let options =
            TestRunOptions { data_in: Some(packet), data_out: Some(&mut out), repeat: 1, ..Default::default() };
        let took = program.test_run(options)?.duration;
        Ok((took.as_nanos() as f64, out))
    }

    /// Verdict and nanoseconds per run.
    pub fn run(&self, program: &str, packet: &[u8], repeat: u32) -> Result<(i32, f64)> {
        let program: &SchedClassifier = self.datapath.ebpf.program(program).context("no program")?.try_into()?;
        let mut out = vec![0; 256];
        let result = program.test_run(TestRunOptions {
            data_in: Some(packet),
            data_out: Some(&mut out),
            repeat,
            ..Default::default()
        })?;
        Ok((result.return_value as i32, result.duration.as_nanos() as f64))
    }

    fn repeated(&self, program: &str, packet: &[u8], repeat: u32) -> Result<Figure> {
        let mut ns = Vec::new();
        for _ in 0..BEST_OF {
            ns.push(self.run(program, packet, repeat)?.1);
        }
        Ok(Figure::of(&ns))
    }

    /// One run for each packet, less a run that does nothing.
    pub fn singly(&self, packets: impl Iterator<Item = Vec<u8>>) -> Result<Figure> {
        let arp = arp();
        let mut nothing = Vec::new();
        let mut ns = Vec::new();
        for packet in packets {
            nothing.push(self.run(INGRESS, &arp, 1)?.1);
            ns.push(self.run(INGRESS, &packet, 1)?.1);
        }
        let floor = Figure::of(&nothing).median;
        let Figure { median, min, max } = Figure::of(&ns);
        Ok(Figure { median: median - floor, min: min - floor, max: max - floor })
    }

    /// Opens the flow from `client` to both mirrored frontends, both directions seen.
    fn establish(&self, family: Family, port: u16, proto: u8) -> Result<()> {
        let client = SocketAddr::new(family.client, port);
        for (frontend, backend) in [(family.vip, family.mirror), (family.mirror, family.vip)] {
            self.run(INGRESS, &packet(client, frontend, proto, SYN), 1)?;
            self.run(EGRESS, &packet(backend, client, proto, SYN | ACK), 1)?;
            self.run(INGRESS, &packet(client, frontend, proto, ACK), 1)?;
            self.run(EGRESS, &packet(backend, client, proto, ACK), 1)?;
            let is_there = match (client.ip(), frontend.ip()) {
                (IpAddr::V4(from), IpAddr::V4(to)) => {
                    let (from, to) = (Ipv4Be::from_octets(from.octets()), Ipv4Be::from_octets(to.octets()));
                    self.is_established(from, client.port(), to, frontend.port(), proto)?
                }
                (IpAddr::V6(from), IpAddr::V6(to)) => {
                    let (from, to) = (Ipv6Be::from_octets(from.octets()), Ipv6Be::from_octets(to.octets()));
                    self.is_established(from, client.port(), to, frontend.port(), proto)?
                }
                _ => false,
            };
            ensure!(is_there, "the flow from {client} to {frontend} did not become established");
        }
        Ok(())
    }

    fn is_established<A: Address>(&self, src: A, sport: u16, dst: A, dport: u16, proto: u8) -> Result<bool>
    where
        ConnectionKey<A>: Pod,
        ConnectionValue<A>: Pod,
    {
        let name = format!("{}_v{}", if proto == UDP { "answered" } else { "established" }, A::VERSION);
        let map = self.datapath.ebpf.map(&name).context(name)?;
        let map: HashMap<_, ConnectionKey<A>, ConnectionValue<A>> = map.try_into()?;
        let (sport, dport) = (Be16::from_host(sport), Be16::from_host(dport));
        Ok(map.get(&ConnectionKey::new(hook::INGRESS, proto, src, sport, dst, dport), 0).is_ok())
    }
}

/// A client of its own for each number.
pub fn client(family: Family, number: u16) -> IpAddr {
    let [high, low] = number.to_be_bytes();
    match family.client {
        IpAddr::V4(_) => Ipv4Addr::new(10, 3, high, low).into(),
        IpAddr::V6(_) => Ipv6Addr::new(0xfd00, 0x10, 3, 0, 0, 0, 0, number).into(),
    }
}

/// New flows by how their backend is chosen, and what session affinity adds to it: for a client that is remembered, and for one that is
/// to be remembered (D12).
fn choices(
    programs: &Programs,
    family: Family,
    proto: u8,
    scale: &Scale,
    report: &mut Report,
    name: &impl Fn(&str) -> String,
) -> Result<()> {
    // By turns: a slow minute of the machine falls on all of them.
    let half = scale.new_flows / 2;
    let mut figures: [Vec<Figure>; 6] = Default::default();
    for round in 0..2 {
        let numbers = || (1..=half).map(move |n| n + round * half);
        // No two frontends are asked from the same port: their backends are the same, and a flow whose answers would be another's costs more.
        let one = |frontend, who| {
            let who = client(family, ALONE + who);
            move |port| packet(SocketAddr::new(who, port), frontend, proto, SYN)
        };
        let many = |frontend, port| move |n| packet(SocketAddr::new(client(family, n), port), frontend, proto, SYN);
        for (figures, figure) in figures.iter_mut().zip([
            programs.singly(numbers().map(one(family.random, 0)))?,
            programs.singly(numbers().map(one(family.turns, 1)))?,
            programs.singly(numbers().map(one(family.sticky, 2)))?,
            programs.singly(numbers().map(one(family.maglev, 3)))?,
            programs.singly(numbers().map(many(family.random, 40_000)))?,
            programs.singly(numbers().map(many(family.sticky, 40_001)))?,
        ]) {
            figures.push(figure);
        }
    }
    let figures = figures.map(|rounds| Figure {
        median: rounds.iter().map(|round| round.median).sum::<f64>() / rounds.len() as f64,
        min: rounds.iter().map(|round| round.min).fold(f64::INFINITY, f64::min),
        max: rounds.iter().map(|round| round.max).fold(f64::NEG_INFINITY, f64::max),
    });
    let [random, turns, remembered, maglev, random_many, new] = figures;
    for (what, figure) in [
        ("new flow, random of three", random),
        ("new flow, in turns", turns),
        ("new flow, affinity, client remembered", remembered),
        ("new flow, Maglev", maglev),
        ("new flow, random of three, another client each", random_many),
        ("new flow, affinity, another client each", new),
    ] {
        report.row("D6", name(what), "ns", figure);
    }
    if proto == TCP {
        // The best of thousands of runs: medians differ by more than this between two runs on a busy machine.
        let (hit, insert) = (remembered.min - random.min, new.min - random_many.min);
        let what = |what: &str| format!("affinity, {what}, over none, {} TCP, ns", family.name);
        report.bar("D12", what("client remembered"), Bound::AtMost(150.0), hit, true);
        report.bar("D12", what("client new"), Bound::AtMost(350.0), insert, true);
    }
    Ok(())
}

/// What is sent over and over, and what one run makes of it; the next one makes it what it was.
struct Mirrored {
    what: &'static str,
    program: &'static str,
    sent: Vec<u8>,
    translated: Vec<u8>,
}

impl Mirrored {
    /// Of the flow that [`Programs::establish`] opens: a packet.
    fn packet(family: Family, proto: u8) -> Self {
        let sent = described(SocketAddr::new(family.client, ESTABLISHED), family.vip, proto, ACK);
        let translated = sent.to(family.mirror).frame();
        Self { what: "established", program: INGRESS, sent: sent.frame(), translated }
    }

    /// Its fragments, the first one first, since it says where the others go. None of SCTP: where the port changes they are dropped.
    fn fragments(family: Family, proto: u8) -> Vec<Self> {
        if proto == SCTP {
            return Vec::new();
        }
        let sent = described(SocketAddr::new(family.client, ESTABLISHED), family.vip, proto, ACK);
        let translated = sent.to(family.mirror);
        let fragment = |what, from, to| Self {
            what,
            program: INGRESS,
            sent: sent.fragment(from, to),
            translated: translated.fragment(from, to),
        };
        let all = sent.transport().len();
        vec![fragment("established, first fragment", 0, CUT), fragment("established, later fragment", CUT, all)]
    }

    /// Errors about it: the client's about an answer, and those that the client is told by a router behind the node.
    fn errors(family: Family, proto: u8) -> [Self; 2] {
        let Family { client, vip, mirror, elsewhere, .. } = family;
        let end = SocketAddr::new(client, ESTABLISHED);
        let mut answer = described(vip, end, proto, ACK);
        if let Body::Udp { bare } = &mut answer.body {
            // Nobody corrects a quoted checksum.
            *bare = true;
        }
        let request = |to| answer.between(end, to);
        [
            Self {
                what: "ICMP error about an answer, ingress",
                program: INGRESS,
                sent: too_long(client, vip.ip(), &answer),
                translated: too_long(client, mirror.ip(), &answer.from(mirror)),
            },
            Self {
                what: "ICMP error about a request, egress",
                program: EGRESS,
                sent: too_long(elsewhere.ip(), client, &request(mirror)),
                translated: too_long(elsewhere.ip(), client, &request(vip)),
            },
        ]
    }

    /// That every run translates, and that the packet survives it.
    fn check(&self, programs: &Programs) -> Result<()> {
        let Self { what, program, sent, translated } = self;
        let program: &SchedClassifier = programs.datapath.ebpf.program(program).context("no program")?.try_into()?;
        for (repeat, wanted) in [(1, translated), (2, sent)] {
            let mut out = vec![0; sent.len()];
            program.test_run(TestRunOptions {
                data_in: Some(sent),
                data_out: Some(&mut out),
                repeat,
                ..Default::default()
            })?;
            ensure!(&out == wanted, "{what}: after {repeat} runs {out:02x?}, not {wanted:02x?}");
        }
        Ok(())
    }

    fn measure(&self, programs: &Programs, scale: &Scale) -> Result<Figure> {
        self.check(programs)?;
        programs.repeated(self.program, &self.sent, scale.repeat)
    }
}

pub fn measure(scale: &Scale, report: &mut Report) -> Result<()> {
    alone(|| inside(scale, report))
}

/// Test runs send nothing, but a refusal asks for it: have no way out at all.
pub fn alone(measured: impl FnOnce() -> Result<()> + Send) -> Result<()> {
    let netns = Netns::new()?;
    netns.ip("link set lo up\n")?;
    netns.enter(measured)
}

fn inside(scale: &Scale, report: &mut Report) -> Result<()> {
    for &services in scale.services {
        let Some(programs) = Programs::load(services, None)? else {
            report.skip("D6: the object has no per-packet programs");
            return Ok(());
        };
        let Some(small) = Programs::load(1, Some(SMALL))? else { return Ok(()) };
        let last = scale.services.last() == Some(&services);
        if last {
            report.row("D6", "a packet that is no IP", "ns", programs.repeated(INGRESS, &arp(), scale.repeat)?);
        }
        let mut v4_established = None;
        for family in families() {
            let of = |port: u16| SocketAddr::new(family.client, port);
            for (proto, proto_name) in PROTOS {
                let name = |what: &str| format!("{} {proto_name} {what}, {services} services", family.name);
                programs.establish(family, ESTABLISHED, proto)?;
                let mirrored = Mirrored::packet(family, proto);
                let established = mirrored.measure(&programs, scale)?;
                report.row("D6", name(mirrored.what), "ns", established);
                let astray = |flags| packet(of(40_001), family.elsewhere, proto, flags);
                let miss = programs.repeated(INGRESS, &astray(ACK), scale.repeat)?;
                report.row("D6", name("miss, no opening (TCP, SCTP) or any (UDP)"), "ns", miss);
                if proto != UDP {
                    let opening = programs.repeated(INGRESS, &astray(SYN), scale.repeat)?;
                    report.row("D6", name("miss, opening"), "ns", opening);
                }
                let new = programs.singly((1..=scale.new_flows).map(|p| packet(of(p), family.vip, proto, SYN)))?;
                report.row("D6", name("new flow, room left"), "ns", new);
                let refused = programs.singly((1..=1_000).map(|p| packet(of(p), family.empty, proto, SYN)))?;
                report.row("D6", name("no backend, refused"), "ns", refused);
                if !last {
                    continue;
                }
                for mirrored in Mirrored::fragments(family, proto).iter().chain(&Mirrored::errors(family, proto)) {
                    report.row("D6", name(mirrored.what), "ns", mirrored.measure(&programs, scale)?);
                }
                choices(&programs, family, proto, scale, report, &name)?;
                crate::flows::masqueraded(&programs, family, proto, scale, report, &name)?;
                let fill = small.singly((1..=scale.new_flows).map(|p| packet(of(p), family.vip, proto, SYN)))?;
                report.row("D6", name("new flow, evicting another"), "ns", fill);
                if family.name == "v4" && proto == TCP {
                    v4_established = Some(established.min);
                    report.bar("D6", "established, v4 TCP, ns", Bound::AtMost(90.0), established.min, true);
                    report.bar("D6", "miss, v4 TCP, ns", Bound::AtMost(30.0), miss.min, true);
                    report.bar("D6", "new flow with room left, v4 TCP, ns", Bound::AtMost(400.0), new.median, true);
                    report.bar(
                        "D6",
                        "new flow evicting another, v4 TCP, ns",
                        Bound::AtMost(1_000.0),
                        fill.median,
                        true,
                    );
                }
                if family.name == "v6"
                    && proto == TCP
                    && let Some(v4) = v4_established
                {
                    report.bar("D6", "established, v6 over v4, TCP", Bound::AtMost(1.4), established.min / v4, true);
                }
            }
        }
    }
    Ok(())
}
