//! D6 for flows that are masqueraded, as those to node ports are, and D13: what a full connection table costs, and whom.
//!
//! A masqueraded packet never comes back to where it began, so nothing here is repeated: all are single runs, less what a packet costs
//! that the program does not look at.

use std::net::SocketAddr;

use anyhow::{Context as _, Result, ensure};

use crate::{
    Scale,
    packets::{ACK, EGRESS, ESTABLISHED, Family, INGRESS, OUTSIDE, Programs, SYN, arp, client, families, packet},
    report::{Bound, Figure, Report},
};
use proxy_common::proto::{TCP, UDP};

/// New flows whose cost is compared.
const OPENED: u16 = 500;
/// Flows that have to outlive the churn.
const LIVE: u16 = 100;
/// Connections that pass through the table, as a multiple of its entries.
const CHURN: u32 = 10;

/// Times of one step, beside those of nothing.
#[derive(Default)]
struct Step {
    ns: Vec<f64>,
    nothing: Vec<f64>,
}

impl Step {
    /// One run; what came out.
    fn run(&mut self, programs: &Programs, program: &str, sent: &[u8]) -> Result<Vec<u8>> {
        self.nothing.push(programs.run(program, &arp(), 1)?.1);
        let (ns, out) = programs.pass(program, sent)?;
        self.ns.push(ns);
        Ok(out)
    }

    fn figure(&self) -> Figure {
        let floor = Figure::of(&self.nothing).median;
        let Figure { median, min, max } = Figure::of(&self.ns);
        Figure { median: median - floor, min: min - floor, max: max - floor }
    }
}

fn source_port(family: Family, frame: &[u8]) -> Result<u16> {
    let at = if family.client.is_ipv4() { 34 } else { 54 };
    let bytes = frame.get(at..at + 2).context("a short frame")?;
    Ok(u16::from_be_bytes([bytes[0], bytes[1]]))
}

/// Through both hooks of a node port's node: the request to a backend elsewhere and its answer.
pub fn masqueraded(
    programs: &Programs,
    family: Family,
    proto: u8,
    scale: &Scale,
    report: &mut Report,
    name: &impl Fn(&str) -> String,
) -> Result<()> {
    let Family { node_port, backends: [backend, ..], .. } = family;
    let (mut opens, mut leaves) = (Step::default(), Step::default());
    let outside = client(family, OUTSIDE);
    for port in 1..=scale.new_flows {
        let from = SocketAddr::new(outside, port);
        let inside = opens.run(programs, INGRESS, &packet(from, node_port, proto, SYN))?;
        leaves.run(programs, EGRESS, &inside)?;
    }
    report.row("D6", name("new flow, node port, at ingress"), "ns", opens.figure());
    report.row("D6", name("new flow, node port, at egress: is given a port"), "ns", leaves.figure());

    let from = SocketAddr::new(outside, 50_000);
    let (_, inside) = programs.pass(INGRESS, &packet(from, node_port, proto, SYN))?;
    let (_, sent) = programs.pass(EGRESS, &inside)?;
    let given = SocketAddr::new(family.node, source_port(family, &sent)?);
    ensure!(sent == packet(given, backend, proto, SYN), "a node port's packet is not what it should be");
    for flags in [SYN | ACK, ACK] {
        let (_, inside) = programs.pass(INGRESS, &packet(backend, given, proto, flags))?;
        let (_, answer) = programs.pass(EGRESS, &inside)?;
        ensure!(answer == packet(node_port, from, proto, flags), "a node port's answer is not what it should be");
        programs.pass(EGRESS, &programs.pass(INGRESS, &packet(from, node_port, proto, ACK))?.1)?;
    }
    let mut steps: [Step; 4] = Default::default();
    for _ in 0..scale.new_flows {
        let [request_in, request_out, answer_in, answer_out] = &mut steps;
        let inside = request_in.run(programs, INGRESS, &packet(from, node_port, proto, ACK))?;
        request_out.run(programs, EGRESS, &inside)?;
        let inside = answer_in.run(programs, INGRESS, &packet(backend, given, proto, ACK))?;
        answer_out.run(programs, EGRESS, &inside)?;
    }
    let what = ["request, ingress", "request, egress", "answer, ingress", "answer, egress"];
    for (what, step) in what.into_iter().zip(&steps) {
        report.row("D6", name(&format!("established, node port: {what}")), "ns", step.figure());
    }
    // What the same is without masquerade, measured in the same way.
    let mut plain = Step::default();
    for _ in 0..scale.new_flows {
        plain.run(programs, INGRESS, &packet(SocketAddr::new(family.client, ESTABLISHED), family.vip, proto, ACK))?;
    }
    report.row("D6", name("established, not masqueraded, one at a time"), "ns", plain.figure());
    Ok(())
}

/// Asks for `to`, is answered as far as it takes for both sides to have spoken, and tells by whom.
fn connect(programs: &Programs, family: Family, from: SocketAddr, to: SocketAddr, proto: u8) -> Result<SocketAddr> {
    let (_, request) = programs.pass(INGRESS, &packet(from, to, proto, SYN))?;
    let mut all = family.backends.iter().chain([&family.mirror]);
    let backend = *all.find(|backend| packet(from, **backend, proto, SYN) == request).context("sent to no backend")?;
    programs.pass(EGRESS, &packet(backend, from, proto, SYN | ACK))?;
    if proto == TCP {
        programs.pass(INGRESS, &packet(from, to, proto, ACK))?;
    }
    Ok(backend)
}

/// The flows that have to live on. There are three backends: a datagram whose flow was lost goes to another one two times of three; what TCP
/// sends then goes to none.
struct Live {
    family: Family,
    proto: u8,
    flows: Vec<(SocketAddr, SocketAddr, bool)>,
}

impl Live {
    fn open(programs: &Programs, family: Family, proto: u8) -> Result<Self> {
        let open = |n| {
            let end = SocketAddr::new(client(family, n), 40_000);
            Ok((end, connect(programs, family, end, family.random, proto)?, true))
        };
        Ok(Self { family, proto, flows: (1..=LIVE).map(open).collect::<Result<_>>()? })
    }

    /// Each says something and is answered.
    fn talk(&mut self, programs: &Programs) -> Result<()> {
        let Self { family: Family { random, .. }, proto, flows } = self;
        for (end, backend, lives) in flows {
            let (_, request) = programs.pass(INGRESS, &packet(*end, *random, *proto, ACK))?;
            let (_, answer) = programs.pass(EGRESS, &packet(*backend, *end, *proto, ACK))?;
            *lives &= request == packet(*end, *backend, *proto, ACK) && answer == packet(*random, *end, *proto, ACK);
        }
        Ok(())
    }
}

/// The sender of the churn's connection number `n`: none comes twice.
fn passer_by(family: Family, n: u32) -> Result<SocketAddr> {
    let (port, number) = (n / 50_000, n % 50_000);
    Ok(SocketAddr::new(client(family, u16::try_from(10_000 + number)?), u16::try_from(1_024 + port)?))
}

/// D13: the whole table full of others' flows, ten times over. None of them is closed, so nothing makes room for them (F24).
pub fn full_table(scale: &Scale, report: &mut Report) -> Result<()> {
    for family in families() {
        for (proto, proto_name) in [(TCP, "TCP"), (UDP, "UDP")] {
            let both_spoke = if proto == UDP { "answered" } else { "established" };
            let [both_spoke, half_open] = [both_spoke, "half_open"].map(|map| format!("{map}_{}", family.name));
            let half = scale.table / 4;
            let sizes = [(both_spoke.as_str(), scale.table), (half_open.as_str(), half)];
            let Some(programs) = Programs::load_sized(1, &sizes)? else {
                report.skip("D13: the object has no per-packet programs");
                return Ok(());
            };
            let mut passers_by = 0..;
            let mut next = || passer_by(family, passers_by.next().unwrap_or_default());
            let mut opened = || -> Result<Figure> {
                let packets: Vec<_> =
                    (0..OPENED).map(|_| Ok(packet(next()?, family.vip, proto, SYN))).collect::<Result<_>>()?;
                programs.singly(packets.into_iter())
            };
            let empty = opened()?;
            let mut live = Live::open(&programs, family, proto)?;
            // With two entries for each connection, half of the table has gone by between two words of a live one.
            let pause = scale.table / 4;
            for n in 0..CHURN * scale.table {
                if n % pause == 0 {
                    live.talk(&programs)?;
                }
                connect(&programs, family, passer_by(family, 1_000_000 + n)?, family.vip, proto)?;
            }
            // And of flows that nobody answers.
            for n in 0..CHURN * half {
                if n % pause == 0 {
                    live.talk(&programs)?;
                }
                programs.pass(INGRESS, &packet(passer_by(family, 100_000_000 + n)?, family.vip, proto, SYN))?;
            }
            live.talk(&programs)?;
            let full = opened()?;
            let lost = live.flows.iter().filter(|(_, _, lives)| !lives).count();
            let name = |what: &str| format!("{} {proto_name} {what}, {} entries", family.name, scale.table);
            report.row("D13", name("new flow, table empty"), "ns", empty);
            report.row("D13", name("new flow, table full, ten times over"), "ns", full);
            let cost = full.median / empty.median;
            report.bar("D13", name("new flow, full over empty"), Bound::AtMost(1.3), cost, true);
            report.bar("D13", name(&format!("of {LIVE} live flows lost")), Bound::AtMost(0.0), lost as f64, true);
        }
    }
    Ok(())
}
