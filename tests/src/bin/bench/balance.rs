//! D9: whom new flows are sent to, at random, in turns and by Maglev: one run of the program for each flow.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context as _, Result, ensure};
use proxy_common::{frontend::algorithm, proto::UDP};

use crate::{
    Scale,
    packets::{Family, INGRESS, Programs, SYN, families, packet},
    report::{Bound, Figure, Report},
    support::Spec,
};

/// Backends, and the chi-square that an even choice among them exceeds one time in a thousand.
const SETS: [(u16, f64); 5] = [(2, 10.828), (3, 13.816), (7, 22.458), (100, 148.230), (1000, 1142.848)];
const ALGORITHMS: [(u8, &str); 3] =
    [(algorithm::RANDOM, "random"), (algorithm::ROUND_ROBIN, "in turns"), (algorithm::MAGLEV, "Maglev")];
/// Flows for each backend from which on chance moves the shares by less than is asked of them.
const ENOUGH: f64 = 100_000.0;
/// Room for every set three times in each family, and for the tables of one of them.
const SLOTS: u32 = 400_000;
/// Ports of the frontends, and the first of their Services' ids.
const FIRST_PORT: u16 = 1_000;
const FIRST_SERVICE: u32 = 2_000_000;

fn backend(family: Family, n: u16) -> IpAddr {
    let [high, low] = n.to_be_bytes();
    match family.client {
        IpAddr::V4(_) => Ipv4Addr::new(10, 200, high, low).into(),
        IpAddr::V6(_) => Ipv6Addr::new(0xfd00, 0x10, 200, 0, 0, 0, 0, n).into(),
    }
}

fn destination(family: Family, frame: &[u8]) -> Result<IpAddr> {
    let at = if family.client.is_ipv4() { 30..34 } else { 38..54 };
    let bytes = frame.get(at).context("a short frame")?;
    Ok(match family.client {
        IpAddr::V4(_) => <[u8; 4]>::try_from(bytes)?.into(),
        IpAddr::V6(_) => <[u8; 16]>::try_from(bytes)?.into(),
    })
}

/// How many of so many flows each of `n` backends gets.
fn picked(programs: &Programs, family: Family, vip: SocketAddr, n: u16, flows: u32) -> Result<Vec<f64>> {
    let mut shares = vec![0.0; usize::from(n)];
    for flow in 0..flows {
        let (client, port) = crate::maglev::end(flow);
        let client = match family.client {
            IpAddr::V4(_) => IpAddr::from(client),
            IpAddr::V6(_) => Ipv6Addr::from_bits(0xfd00_0010_0004 << 80 | u128::from(client.to_bits())).into(),
        };
        let (_, out) = programs.pass(INGRESS, &packet(SocketAddr::new(client, port), vip, UDP, SYN))?;
        let to = destination(family, &out)?;
        let number = match to {
            IpAddr::V4(to) => to.to_bits() as u16,
            IpAddr::V6(to) => to.to_bits() as u16,
        };
        ensure!(to == backend(family, number), "sent to {to}, which is no backend");
        *shares.get_mut(usize::from(number)).context("sent to a backend of another frontend")? += 1.0;
    }
    Ok(shares)
}

pub fn measure(scale: &Scale, report: &mut Report) -> Result<()> {
    let Some(mut programs) = Programs::load_sized(1, &[("slots_v4", SLOTS), ("slots_v6", SLOTS)])? else {
        report.skip("D9: the object has no per-packet programs");
        return Ok(());
    };
    for family in families() {
        let mut frontends = 0;
        for (algorithm, name) in ALGORITHMS {
            for (n, limit) in SETS {
                let vip = SocketAddr::new(family.vip.ip(), FIRST_PORT + frontends);
                let backends: Vec<_> = (0..n).map(|n| SocketAddr::new(backend(family, n), 8080)).collect();
                let service = FIRST_SERVICE + u32::from(frontends);
                frontends += 1;
                programs.datapath.frontend(vip, UDP, &Spec { algorithm, ..Spec::pick_all(service, &backends) });

                let shares = picked(&programs, family, vip, n, scale.picks)?;
                let even = f64::from(scale.picks) / f64::from(n);
                let chi_square = shares.iter().map(|share| (share - even).powi(2) / even).sum::<f64>();
                let Figure { min, max, .. } = Figure::of(&shares);
                let what = |what: &str| format!("{} {n} backends, {name}, {} flows: {what}", family.name, scale.picks);
                let shares = Figure { median: max / min, min, max };
                report.row("D9", what("largest over smallest share"), "", shares);
                report.bar("D9", what("chi-square"), Bound::AtMost(limit), chi_square, true);
                if even >= ENOUGH {
                    report.bar("D9", what("largest over smallest share"), Bound::AtMost(1.05), max / min, true);
                }
            }
        }
    }
    Ok(())
}
