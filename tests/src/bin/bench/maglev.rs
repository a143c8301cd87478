//! D9: how evenly Maglev's tables are shared, what a change of the set moves, and what a table costs to make. No kernel: the code is the one
//! that the agent and the programs run. Whom flows are really sent to is [`balance`](crate::balance)'s.

use std::{hint::black_box, net::Ipv4Addr, time::Instant};

use proxy_common::{
    Be16, Ipv4Be,
    maglev::{self, Walk},
    proto::TCP,
    slot::Target,
};

use crate::report::{Bound, Figure, Report};

type Backend = Target<Ipv4Be>;

fn backends(n: u32) -> Vec<Backend> {
    let first = u32::from(Ipv4Addr::new(10, 244, 0, 1));
    let addr = |n: u32| Ipv4Be::from_octets((first + n).to_be_bytes());
    (0..n).map(|n| Target { addr: addr(n), port: Be16::from_host(8080) }).collect()
}

struct Table {
    backends: Vec<Backend>,
    positions: Vec<u16>,
}

impl Table {
    fn new(backends: Vec<Backend>) -> Self {
        let size = maglev::size(maglev::index_for(backends.len()));
        // One backend has no table: every flow is its.
        let mut positions = vec![0; size.max(1) as usize];
        if size > 0 {
            let mut walks: Vec<_> = backends.iter().map(|backend| Walk::new(*backend, size)).collect();
            maglev::populate(&mut walks, &mut positions);
        }
        Self { backends, positions }
    }

    fn index(&self, hash: u32) -> usize {
        usize::from(self.positions[maglev::position(hash, self.positions.len() as u32) as usize])
    }

    fn choose(&self, hash: u32) -> Backend {
        self.backends[self.index(hash)]
    }
}

/// Where a flow comes from: clients by the thousand, each from ports in turn.
pub fn end(flow: u32) -> (Ipv4Addr, u16) {
    let [_, b, c, d] = (flow % 1009).to_be_bytes();
    (Ipv4Addr::new(192, b, c, d), (1024 + flow / 1009) as u16)
}

/// The hashes of so many flows.
fn flows(n: u32) -> impl Iterator<Item = u32> {
    let vip = Target { addr: Ipv4Be::from_octets([10, 96, 0, 1]), port: Be16::from_host(80) };
    (0..n).map(move |n| {
        let (client, port) = end(n);
        let client = Target { addr: Ipv4Be::from_octets(client.octets()), port: Be16::from_host(port) };
        maglev::flow(client, vip, TCP)
    })
}

/// Of the flows that `gone` does not have in `more`, the share that has another backend in `fewer`.
fn moved(more: &Table, fewer: &Table, gone: Backend, hashes: &[u32]) -> f64 {
    let (mut all, mut moved) = (0_u32, 0_u32);
    for hash in hashes {
        let before = more.choose(*hash);
        if before != gone {
            all += 1;
            moved += u32::from(fewer.choose(*hash) != before);
        }
    }
    f64::from(moved) / f64::from(all)
}

fn without(all: &[Backend], index: usize) -> (Table, Backend) {
    let mut fewer = all.to_vec();
    let gone = fewer.remove(index);
    (Table::new(fewer), gone)
}

pub fn measure(report: &mut Report) {
    let hashes: Vec<u32> = flows(1_000_000).collect();
    for n in [2_u32, 3, 7, 10, 100, 1000] {
        let table = Table::new(backends(n));
        let mut positions = vec![0.0; n as usize];
        for position in &table.positions {
            positions[usize::from(*position)] += 1.0;
        }
        let Figure { min, max, .. } = Figure::of(&positions);
        let what = format!("{n} backends, {} positions", table.positions.len());
        let ratio = max / min;
        report.row("D9", format!("{what}: largest over smallest share"), "", Figure { median: ratio, min, max });

        let all = backends(n);
        let some = (0..n as usize).step_by((n as usize / 20).max(1));
        let lost: Vec<f64> = some
            .map(|index| {
                let (fewer, gone) = without(&all, index);
                moved(&table, &fewer, gone, &hashes) * 100.0
            })
            .collect();
        let leaves = Figure::of(&lost);
        report.row("D9", format!("{what}: one leaves, flows of the others that move"), "%", leaves);
        let more = Table::new(backends(n + 1));
        let joins = moved(&more, &table, more.backends[n as usize], &hashes) * 100.0;
        let joins = Figure { median: joins, min: joins, max: joins };
        report.row("D9", format!("{what}: one joins, flows that move between the others"), "%", joins);

        report.bar("D9", format!("{n} backends: largest over smallest share"), Bound::AtMost(1.05), ratio, true);
        // Of all flows, whichever backend it is that leaves.
        let worst = leaves.max * (1.0 - 1.0 / f64::from(n));
        report.bar("D9", format!("{n} backends: one leaves, % moved beyond its own"), Bound::AtMost(1.0), worst, true);
    }
    for n in [7, 38] {
        let (more, fewer) = (Table::new(backends(n + 1)), Table::new(backends(n)));
        let grows = moved(&more, &fewer, more.backends[n as usize], &hashes) * 100.0;
        let what = format!("from {n} to {} backends, {} to {}", n + 1, fewer.positions.len(), more.positions.len());
        let figure = Figure { median: grows, min: grows, max: grows };
        report.row("D9", format!("{what} positions: flows that move between the others"), "%", figure);
    }
    for n in [2, 3, 7, 10, 100, 1000, 10_000] {
        let took: Vec<f64> = (0..21)
            .map(|_| {
                let backends = backends(n);
                let start = Instant::now();
                black_box(Table::new(backends));
                start.elapsed().as_secs_f64() * 1e6
            })
            .collect();
        report.row("D9", format!("making the table of {n} backends"), "µs", Figure::of(&took));
    }
}
