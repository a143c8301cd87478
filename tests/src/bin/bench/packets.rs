//! D6: nanoseconds per packet of the per-packet programs alone, by `BPF_PROG_TEST_RUN`.
//!
//! A repeated run sees the packet as the run before left it. For established flows two frontends therefore lead to each
//! other, `VIP → Y` and `Y → VIP`: every run translates, and the packet comes back every second time. New flows and refusals
//! are measured one run at a time, each with a packet of its own, less what a packet costs that the program does not look at.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context as _, Result, ensure};
use aya::{
    Pod, TestRunOptions,
    maps::HashMap,
    programs::{SchedClassifier, TestRun as _},
};
use proxy_common::{
    Address, Be16, Ipv4Be, Ipv6Be, checksum,
    connection::{ConnectionKey, ConnectionValue, hook},
    device::{DeviceValue, role},
    frontend::{algorithm, origin, verdict},
    globals::socket_lb,
    proto::{TCP, UDP},
};

use crate::{
    Scale,
    report::{Bound, Figure, Report},
    support::{Datapath, Globals, Spec},
    world::Netns,
};

const BEST_OF: usize = 7;
/// Room for half-open flows when they evict each other.
const SMALL: u32 = 1_024;

/// First of the ids of the frontends that differ in how they choose.
const CHOICES: u32 = 1_000_000;

pub const SYN: u8 = 0x02;
pub const ACK: u8 = 0x10;

#[derive(Clone, Copy)]
pub struct Family {
    pub name: &'static str,
    pub client: IpAddr,
    pub vip: SocketAddr,
    /// Backend of `vip`, and a frontend that leads back.
    pub mirror: SocketAddr,
    empty: SocketAddr,
    elsewhere: SocketAddr,
    /// Three backends each: chosen at random; with session affinity; by Maglev.
    pub random: SocketAddr,
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
            node_port: v6(7, 1, 30_080),
            node: v6(7, 2, 0).ip(),
            backends: [0x21, 0x22, 0x23].map(|host| v6(2, host, 8080)),
        },
    ]
}

/// An Ethernet frame from `from` to `to`.
pub fn packet(from: SocketAddr, to: SocketAddr, proto: u8, flags: u8) -> Vec<u8> {
    let payload = [0_u8; 18];
    let mut l4 = Vec::new();
    l4.extend(from.port().to_be_bytes());
    l4.extend(to.port().to_be_bytes());
    if proto == TCP {
        // Number 1; what it acknowledges is the SYN with that number.
        l4.extend([0, 0, 0, 1, 0, 0, 0, 2, 0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
    } else {
        l4.extend(u16::try_from(8 + payload.len()).unwrap_or(0).to_be_bytes());
        l4.extend([0, 0]);
    }
    l4.extend(payload);
    let length = u16::try_from(l4.len()).unwrap_or(0);

    let mut pseudo = Vec::new();
    match (from.ip(), to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => pseudo.extend([from.octets(), to.octets()].concat()),
        (IpAddr::V6(from), IpAddr::V6(to)) => pseudo.extend([from.octets(), to.octets()].concat()),
        _ => {}
    }
    let addresses = pseudo.clone();
    pseudo.extend([0, proto]);
    pseudo.extend(length.to_be_bytes());
    let sum = checksum::finish(checksum::sum(&pseudo) + checksum::sum(&l4)).to_ne_bytes();
    // None at all is what zero would say of a datagram.
    let sum = if proto == UDP && sum == [0, 0] { [0xff, 0xff] } else { sum };
    let at = if proto == TCP { 16 } else { 6 };
    l4.splice(at..at + 2, sum);

    // The loopback device's address first.
    let mut frame = vec![0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 2];
    if from.is_ipv4() {
        frame.extend([0x08, 0x00]);
        let mut ip = vec![0x45, 0];
        ip.extend((20 + length).to_be_bytes());
        ip.extend([0, 1, 0x40, 0, 64, proto, 0, 0]);
        ip.extend(addresses);
        let sum = checksum::finish(checksum::sum(&ip)).to_ne_bytes();
        ip.splice(10..12, sum);
        frame.extend(ip);
    } else {
        frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
        frame.extend(length.to_be_bytes());
        frame.extend([proto, 64]);
        frame.extend(addresses);
    }
    frame.extend(l4);
    frame
}

/// What the programs do not look at.
pub fn arp() -> Vec<u8> {
    let mut frame = vec![0_u8; 60];
    frame.splice(12..14, [0x08, 0x06]);
    frame
}

pub struct Programs {
    datapath: Datapath,
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
        // Four Maglev tables of 4513 positions.
        let mut datapath = Datapath::load_sized(&globals, 2 * services + 1_024, 2 * services + 20_480, sizes);
        if datapath.ebpf.program("tc_ingress_ether").is_none() {
            return Ok(None);
        }
        for name in ["tc_ingress_ether", "tc_egress_ether"] {
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
            for proto in [TCP, UDP] {
                let refused = Spec { verdicts: [verdict::REJECT; origin::COUNT], ..Spec::pick_all(3, &[]) };
                datapath.frontend(family.vip, proto, &Spec::pick_all(1, &[family.mirror]));
                datapath.frontend(family.mirror, proto, &Spec::pick_all(2, &[family.vip]));
                datapath.frontend(family.empty, proto, &refused);
                // The three kinds of choice; services of their own, below those of the many.
                let random = Spec::pick_all(CHOICES, &family.backends);
                let sticky = Spec { service: CHOICES + 1, affinity_secs: 10_800, ..random.clone() };
                let maglev = Spec { service: CHOICES + 2, algorithm: algorithm::MAGLEV, ..random.clone() };
                datapath.frontend(family.random, proto, &random);
                datapath.frontend(family.sticky, proto, &sticky);
                datapath.frontend(family.maglev, proto, &maglev);
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

    fn repeated(&self, packet: &[u8], repeat: u32) -> Result<Figure> {
        let mut ns = Vec::new();
        for _ in 0..BEST_OF {
            ns.push(self.run("tc_ingress_ether", packet, repeat)?.1);
        }
        Ok(Figure::of(&ns))
    }

    /// One run for each packet, less a run that does nothing.
    pub fn singly(&self, packets: impl Iterator<Item = Vec<u8>>) -> Result<Figure> {
        let arp = arp();
        let mut nothing = Vec::new();
        let mut ns = Vec::new();
        for packet in packets {
            nothing.push(self.run("tc_ingress_ether", &arp, 1)?.1);
            ns.push(self.run("tc_ingress_ether", &packet, 1)?.1);
        }
        let floor = Figure::of(&nothing).median;
        let Figure { median, min, max } = Figure::of(&ns);
        Ok(Figure { median: median - floor, min: min - floor, max: max - floor })
    }

    /// Opens the flow from `client` to both mirrored frontends, both directions seen.
    fn establish(&self, family: Family, port: u16, proto: u8) -> Result<()> {
        let client = SocketAddr::new(family.client, port);
        for (frontend, backend) in [(family.vip, family.mirror), (family.mirror, family.vip)] {
            self.run("tc_ingress_ether", &packet(client, frontend, proto, SYN), 1)?;
            self.run("tc_egress_ether", &packet(backend, client, proto, SYN | ACK), 1)?;
            self.run("tc_ingress_ether", &packet(client, frontend, proto, ACK), 1)?;
            self.run("tc_egress_ether", &packet(backend, client, proto, ACK), 1)?;
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
    let mut figures: [Vec<Figure>; 5] = Default::default();
    for round in 0..2 {
        let numbers = || (1..=half).map(move |n| n + round * half);
        let one = |frontend| move |port| packet(SocketAddr::new(family.client, port), frontend, proto, SYN);
        let many = |frontend| move |n| packet(SocketAddr::new(client(family, n), 40_000), frontend, proto, SYN);
        for (figures, figure) in figures.iter_mut().zip([
            programs.singly(numbers().map(one(family.random)))?,
            programs.singly(numbers().map(one(family.sticky)))?,
            programs.singly(numbers().map(one(family.maglev)))?,
            programs.singly(numbers().map(many(family.random)))?,
            programs.singly(numbers().map(many(family.sticky)))?,
        ]) {
            figures.push(figure);
        }
    }
    let figures = figures.map(|rounds| Figure {
        median: rounds.iter().map(|round| round.median).sum::<f64>() / rounds.len() as f64,
        min: rounds.iter().map(|round| round.min).fold(f64::INFINITY, f64::min),
        max: rounds.iter().map(|round| round.max).fold(f64::NEG_INFINITY, f64::max),
    });
    let [random, remembered, maglev, random_many, new] = figures;
    for (what, figure) in [
        ("new flow, random of three", random),
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

/// That the programs translate what is measured, and that the packet survives it.
fn check(programs: &Programs, family: Family, proto: u8) -> Result<()> {
    let client = SocketAddr::new(family.client, 40_000);
    let sent = packet(client, family.vip, proto, ACK);
    for (repeat, wanted) in [(1, packet(client, family.mirror, proto, ACK)), (2, sent.clone())] {
        let program: &SchedClassifier =
            programs.datapath.ebpf.program("tc_ingress_ether").context("no program")?.try_into()?;
        let mut out = vec![0; sent.len()];
        program.test_run(TestRunOptions {
            data_in: Some(&sent),
            data_out: Some(&mut out),
            repeat,
            ..Default::default()
        })?;
        ensure!(out == wanted, "after {repeat} runs the packet is not what it should be");
    }
    Ok(())
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
            report.row("D6", "a packet that is no IP", "ns", programs.repeated(&arp(), scale.repeat)?);
        }
        let mut v4_established = None;
        for family in families() {
            let of = |port: u16| SocketAddr::new(family.client, port);
            for (proto, proto_name) in [(TCP, "TCP"), (UDP, "UDP")] {
                let name = |what: &str| format!("{} {proto_name} {what}, {services} services", family.name);
                programs.establish(family, 40_000, proto)?;
                check(&programs, family, proto)?;
                let established = programs.repeated(&packet(of(40_000), family.vip, proto, ACK), scale.repeat)?;
                report.row("D6", name("established"), "ns", established);
                let miss = programs.repeated(&packet(of(40_001), family.elsewhere, proto, ACK), scale.repeat)?;
                report.row("D6", name("miss, no opening (TCP) or any (UDP)"), "ns", miss);
                if proto == TCP {
                    let opening = programs.repeated(&packet(of(40_001), family.elsewhere, proto, SYN), scale.repeat)?;
                    report.row("D6", name("miss, SYN"), "ns", opening);
                }
                let new = programs.singly((1..=scale.new_flows).map(|p| packet(of(p), family.vip, proto, SYN)))?;
                report.row("D6", name("new flow, room left"), "ns", new);
                let refused = programs.singly((1..=1_000).map(|p| packet(of(p), family.empty, proto, SYN)))?;
                report.row("D6", name("no backend, refused"), "ns", refused);
                if !last {
                    continue;
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
