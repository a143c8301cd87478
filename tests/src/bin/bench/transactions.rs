//! D2, D3, D5: transactions through a ClusterIP against a direct connection and against rules.

use std::{fs::File, net::SocketAddr};

use anyhow::{Context as _, Result};
use proxy_common::{device::DeviceValue, device::role, globals::socket_lb};

use crate::{
    Scale,
    report::{Bound, Figure, Report},
    rules, services,
    support::Datapath,
    worker::{Job, Mode, Sample, Worker},
    world::{Cgroups, World},
};

const ID: u8 = 42;
const SERVICES: u32 = 10_000;

const DIRECT: &str = "direct";
const CONTROL: &str = "direct, control";
const CONNECT_TIME: &str = "connect time";
const PER_PACKET: &str = "per packet";

struct Variant {
    label: String,
    worker: Worker,
}

/// A world with its server.
struct Stage {
    world: World,
    _server: Worker,
}

impl Stage {
    fn new() -> Result<Self> {
        let world = World::new()?;
        let server = Worker::start(Job::Serve { netns: world.server.path(), at: services::server(), id: ID })?;
        Ok(Self { world, _server: server })
    }

    fn client(&self, label: impl Into<String>, cgroups: &Cgroups, cgroup: &str, to: SocketAddr) -> Result<Variant> {
        let label = label.into();
        let job = Job::Ask { netns: self.world.client.path(), cgroup: cgroups.make(cgroup)?, to, id: ID };
        Ok(Variant { worker: Worker::start(job)?, label })
    }
}

pub fn measure(scale: &Scale, cgroups: &Cgroups, wants: &dyn Fn(&str) -> bool, report: &mut Report) -> Result<()> {
    let plain = Stage::new()?;
    let mut datapath = services::load(SERVICES, socket_lb::ALL);
    datapath.attach_connect_time(&File::open(cgroups.make("connect-time")?)?);
    let our_vip = SocketAddr::from(services::vip(rules::measured(SERVICES)));
    let mut stages = Vec::new();
    let mut variants = vec![
        plain.client(DIRECT, cgroups, "direct", services::server())?,
        plain.client(CONTROL, cgroups, "control", services::server())?,
        plain.client(CONNECT_TIME, cgroups, "connect-time", our_vip)?,
    ];

    let mut per_packet = None;
    if wants("d5") {
        let stage = Stage::new()?;
        let mut datapath = services::load(SERVICES, socket_lb::NODE);
        if attach_tc(&mut datapath, &stage.world)? {
            variants.push(stage.client(PER_PACKET, cgroups, "per-packet", our_vip)?);
            per_packet = Some(datapath);
            stages.push(stage);
        } else {
            report.skip("D5: the object has no per-packet programs");
        }
    }
    if wants("d2") || wants("d3") {
        for (kind, load) in [("nftables", rules::nft as fn(&_, _) -> _), ("iptables", rules::iptables)] {
            for &services in scale.rules {
                let stage = Stage::new()?;
                if let Err(error) = load(&stage.world.node, services) {
                    report.skip(format!("{kind} with {services} services: {error:#}"));
                    continue;
                }
                let vip = SocketAddr::from(services::vip(rules::measured(services)));
                let label = format!("{kind}, {services}");
                variants.push(stage.client(&label, cgroups, "rules", vip)?);
                if scale.rules.last() == Some(&services) {
                    let label = format!("direct under {label}");
                    variants.push(stage.client(label, cgroups, "rules", services::server())?);
                }
                stages.push(stage);
            }
        }
    }

    let modes: &[(&'static str, Mode, &str)] = &[("D2", Mode::Crr, "TCP_CRR"), ("D3", Mode::Rr, "TCP_RR")];
    for &(id, mode, name) in modes {
        let rounds = run(scale, mode, &mut variants)?;
        write_down(id, name, mode, scale, &variants, &rounds, per_packet.is_some(), report)?;
    }
    drop(stages);
    Ok(())
}

/// All rounds: for each a sample of every variant, in the variants' order.
fn run(scale: &Scale, mode: Mode, variants: &mut [Variant]) -> Result<Vec<Vec<Sample>>> {
    for variant in variants.iter_mut() {
        // Neighbour entries, caches.
        variant.worker.round(mode, 50).with_context(|| variant.label.clone())?;
    }
    let mut rounds = Vec::new();
    for round in 0..scale.rounds {
        let mut samples: Vec<Option<Sample>> = vec![None; variants.len()];
        let order: Vec<usize> =
            if round % 2 == 0 { (0..variants.len()).collect() } else { (0..variants.len()).rev().collect() };
        for index in order {
            let (Some(variant), Some(sample)) = (variants.get_mut(index), samples.get_mut(index)) else { continue };
            *sample = Some(variant.worker.round(mode, scale.round_ms).with_context(|| variant.label.clone())?);
        }
        rounds.push(samples.into_iter().flatten().collect());
    }
    Ok(rounds)
}

#[expect(clippy::too_many_arguments, reason = "one caller; a struct would only rename them")]
fn write_down(
    id: &'static str,
    name: &str,
    mode: Mode,
    scale: &Scale,
    variants: &[Variant],
    rounds: &[Vec<Sample>],
    per_packet: bool,
    report: &mut Report,
) -> Result<()> {
    let index = |label: &str| variants.iter().position(|v| v.label == label);
    let direct = index(DIRECT).context("no baseline")?;
    // Of one transaction's median time, over the same of the baseline in the same round; above 1 is faster.
    let p50_over = |of: usize, over: usize| -> Figure {
        Figure::of(&rounds.iter().filter_map(|r| Some(r.get(over)?.p50_us / r.get(of)?.p50_us)).collect::<Vec<_>>())
    };
    let rate_over = |of: usize, over: usize| -> Figure {
        Figure::of(
            &rounds.iter().filter_map(|r| Some(r.get(of)?.per_second / r.get(over)?.per_second)).collect::<Vec<_>>(),
        )
    };
    for (at, variant) in variants.iter().enumerate() {
        let column = |f: fn(&Sample) -> f64| -> Figure {
            Figure::of(&rounds.iter().filter_map(|r| r.get(at).map(f)).collect::<Vec<_>>())
        };
        report.row(id, format!("{name}, {}", variant.label), "1/s", column(|s| s.per_second));
        report.row(id, format!("{name}, {}, p50", variant.label), "µs", column(|s| s.p50_us));
        report.row(id, format!("{name}, {}, p99", variant.label), "µs", column(|s| s.p99_us));
        if at != direct {
            report.row(id, format!("{name}, {}, rate over direct", variant.label), "×", rate_over(at, direct));
            report.row(id, format!("{name}, {}, p50 ratio to direct", variant.label), "×", p50_over(at, direct));
        }
    }

    let control = p50_over(index(CONTROL).context("no control")?, direct).median;
    let sure = (0.99..=1.01).contains(&control);
    report.row(id, format!("{name}, control (p50 ratio)"), "×", Figure { median: control, min: control, max: control });
    let ours = index(CONNECT_TIME).context("no connect time")?;
    let bar = match mode {
        Mode::Crr => 0.97,
        Mode::Rr => 0.99,
    };
    report.bar(
        id,
        format!("{name} at connect time over direct (p50)"),
        Bound::AtLeast(bar),
        p50_over(ours, direct).median,
        sure,
    );
    if matches!(mode, Mode::Crr) {
        for &services in scale.rules {
            for (kind, at, bar) in [("nftables", 10_000, 1.15), ("iptables", 10_000, 1.9), ("iptables", 100, 1.10)] {
                if at == services
                    && let Some(peer) = index(&format!("{kind}, {services}"))
                {
                    let ratio = p50_over(ours, peer).median;
                    let what = format!("{name} at connect time over {kind} with {services} services (p50)");
                    report.bar(id, what, Bound::AtLeast(bar), ratio, sure);
                }
            }
        }
    }
    if per_packet && let Some(at) = index(PER_PACKET) {
        let ratio = rate_over(at, direct).median;
        if matches!(mode, Mode::Crr) {
            report.bar("D5", format!("{name} per packet over direct (rate)"), Bound::AtLeast(0.88), ratio, sure);
            if let Some(peer) = index("nftables, 10000") {
                let ratio = rate_over(at, peer).median;
                let what = format!("{name} per packet over nftables with 10000 services (rate)");
                report.bar("D5", what, Bound::AtLeast(1.05), ratio, sure);
            }
        }
    }
    Ok(())
}

/// Puts the per-packet programs on both devices of the node; `false` if the object has none.
fn attach_tc(datapath: &mut Datapath, world: &World) -> Result<bool> {
    use aya::programs::{SchedClassifier, TcAttachType};

    if datapath.ebpf.program("tc_ingress_ether").is_none() {
        return Ok(false);
    }
    world.node.enter(|| {
        for device in ["c0", "s0"] {
            let index = nix::net::if_::if_nametoindex(device)?;
            let mut devices: aya::maps::HashMap<_, u32, DeviceValue> =
                datapath.ebpf.map_mut("devices").context("no devices map")?.try_into()?;
            devices.insert(index, DeviceValue { role: role::POD, ..Default::default() }, 0)?;
        }
        for (name, at) in [("tc_ingress_ether", TcAttachType::Ingress), ("tc_egress_ether", TcAttachType::Egress)] {
            let program: &mut SchedClassifier = datapath.ebpf.program_mut(name).context(name)?.try_into()?;
            program.load()?;
            for device in ["c0", "s0"] {
                program.attach(device, at)?;
            }
        }
        Ok(true)
    })
}
