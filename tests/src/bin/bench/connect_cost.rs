//! D1: what the hook adds to one `connect`.

use std::{fs::File, net::SocketAddrV4};

use anyhow::{Context as _, Result};
use proxy_common::globals::socket_lb;

use crate::{
    Scale,
    report::{Bound, Figure, Report},
    rules, services,
    worker::{Cost, Job, Variant, Worker},
    world::{Cgroups, World},
};

pub fn measure(scale: &Scale, cgroups: &Cgroups, report: &mut Report) -> Result<()> {
    let world = World::new()?;
    let server: SocketAddrV4 = match services::server() {
        std::net::SocketAddr::V4(v4) => v4,
        std::net::SocketAddr::V6(_) => return Ok(()),
    };
    let variant = |label: &str, cgroup: &str, to: Vec<SocketAddrV4>, fresh: bool| -> Result<Variant> {
        Ok(Variant { label: label.into(), cgroup: cgroups.make(cgroup)?, to, fresh })
    };

    let mut variants = vec![
        variant("no program", "d1-none", vec![server], false)?,
        variant("no program, control", "d1-control", vec![server], false)?,
        variant("empty program", "d1-empty", vec![server], false)?,
        variant("no program, new socket", "d1-none", vec![server], true)?,
    ];
    let empty = cgroups.make("d1-empty")?;
    let _empty = services::empty_connect4(&File::open(&empty)?)?;
    let mut datapaths = Vec::new();
    for &services in scale.services {
        let name = format!("d1-{services}");
        let mut datapath = services::load(services, socket_lb::ALL);
        datapath.attach_connect_time(&File::open(cgroups.make(&name)?)?);
        services::add_sticky(&mut datapath, services);
        datapaths.push(datapath);
        let vip = services::vip(rules::measured(services));
        variants.push(variant(&format!("hit, {services} services"), &name, vec![vip], false)?);
        let sticky = vec![services::STICKY];
        variants.push(variant(&format!("hit with affinity, {services} services"), &name, sticky, false)?);
        variants.push(variant(&format!("miss, {services} services"), &name, vec![server], false)?);
        variants.push(variant(&format!("hit, new socket, {services} services"), &name, vec![vip], true)?);
        // A stride that visits all of them in no order that a cache likes.
        let all: Vec<_> = (0..services).map(|i| services::vip((i * 7_919) % services)).collect();
        variants.push(variant(&format!("hits all over, {services} services"), &name, all, false)?);
    }
    let mut worker =
        Worker::start_with_output(Job::ConnectCost { netns: world.client.path(), variants, batches: scale.batches })?;
    let costs: Vec<Cost> = worker.line()?;

    let of = |label: &str| {
        costs.iter().find(|cost| cost.label == label).map(|cost| cost.ns.as_slice()).with_context(|| label.to_owned())
    };
    let min = |label: &str| Ok::<_, anyhow::Error>(Figure::of(of(label)?).min);
    for Cost { label, ns } in &costs {
        report.row("D1", format!("connect, {label}"), "ns", Figure::of(ns));
    }

    let none = min("no program")?;
    let noise = (min("no program, control")? - none).abs();
    let sure = noise < 30.0;
    report.row("D1", "control − baseline (min)", "ns", Figure { median: noise, min: noise, max: noise });
    let fresh = min("no program, new socket")?;
    let (Some(&first), Some(&last)) = (scale.services.first(), scale.services.last()) else { return Ok(()) };
    for &services in scale.services {
        let hit = min(&format!("hit, {services} services"))? - none;
        report.bar("D1", format!("hit over no program, {services} services, ns"), Bound::AtMost(200.0), hit, sure);
        let miss = min(&format!("miss, {services} services"))? - none;
        report.bar("D1", format!("miss over no program, {services} services, ns"), Bound::AtMost(150.0), miss, sure);
        let affinity = min(&format!("hit with affinity, {services} services"))? - none - hit;
        let what = format!("connect, affinity over none, client remembered, {services} services, ns");
        report.bar("D12", what, Bound::AtMost(150.0), affinity, sure);
        // Mostly the kernel's allocation of the record for the way back, which lives and dies with the socket.
        let whole = min(&format!("hit, new socket, {services} services"))? - fresh;
        let what = format!("hit with reverse-NAT over no program, new socket, {services} services, ns");
        report.bar("D1", what, Bound::AtMost(350.0), whole, sure);
    }
    let flat = min(&format!("hit, {last} services"))? / min(&format!("hit, {first} services"))?;
    report.bar("D1", format!("hit, {last} over {first} services"), Bound::AtMost(1.10), flat, sure);
    Ok(())
}
