//! The plan alone: all of a large cluster (bar: 10k Services with 100k endpoints within 50 ms), and one change in clusters
//! of growing size (bar: the size does not show; bench C4). And what IPVS is asked for that (bench C12).

mod common;

use criterion::{BatchSize, BenchmarkId, Criterion, criterion_group, criterion_main};
use proxy_agent::{
    dataplane::ipvs::{
        codec::Request,
        render::{Renderer, Server, Stay},
        servers::{self, Kernel},
    },
    model::{
        Event,
        index::{Index, Touched},
    },
    plan::{Defaults, Planner},
};

fn index(services: u32) -> Index {
    let mut index = Index::default();
    for event in common::events(services) {
        index.apply(event, &mut Touched::default());
    }
    index
}

fn full(c: &mut Criterion) {
    let mut group = c.benchmark_group("full plan, by services");
    group.sample_size(20);
    for services in [100, 1_000, 10_000] {
        let index = index(services);
        group.bench_function(BenchmarkId::from_parameter(services), |b| {
            b.iter_with_large_drop(|| {
                let mut planner = Planner::new(Defaults::default());
                planner.full(index.snapshot());
                planner
            });
        });
    }
}

fn change(c: &mut Criterion) {
    let mut group = c.benchmark_group("one endpoint changes, by services");
    for services in [100, 1_000, 10_000, 50_000] {
        let mut index = index(services);
        let mut planner = Planner::new(Defaults::default());
        planner.full(index.snapshot());
        let mut version = 0;
        group.bench_function(BenchmarkId::from_parameter(services), |b| {
            let next = || {
                version += 1;
                Event::Slice(common::slice((version - 1) / 2 * 37 % services, version))
            };
            let take = |event| {
                let mut touched = Touched::default();
                index.apply(event, &mut touched);
                planner.update(index.snapshot(), &touched.services)
            };
            b.iter_batched(next, take, BatchSize::SmallInput);
        });
    }
}

/// From what is desired to what IPVS is asked, where it has nothing yet and where it has all of it.
fn ipvs(c: &mut Criterion) {
    const SERVICES: u32 = 10_000;
    let mut group = c.benchmark_group("IPVS, 10 000 Services x 5 endpoints");
    group.sample_size(20);
    let mut index = Index::default();
    for event in common::events_of(SERVICES, 5) {
        index.apply(event, &mut Touched::default());
    }
    let mut planner = Planner::new(Defaults::default());
    let desired = planner.full(index.snapshot());
    let renderer = Renderer { scheduler: "rr".into(), bit: 1 << 14 };
    let turn = |kernel: &Kernel| -> Vec<Request> {
        let servers = desired.frontends.iter().flat_map(|(frontend, spec)| renderer.servers(frontend, spec));
        let requests = |server: Server| {
            let at = server.service.at;
            servers::turn(at, kernel.get(&at), Some(&server), &Stay::All)
        };
        servers.flat_map(requests).collect()
    };
    let mut kernel = Kernel::new();
    let all = turn(&kernel);
    let bytes = |requests: &[Request]| requests.iter().map(|request| request.attributes().len()).sum::<usize>();
    println!("IPVS is asked {} times for {} frontends, {} bytes", all.len(), desired.frontends.len(), bytes(&all));
    group.bench_function("anew", |b| b.iter_with_large_drop(|| turn(&kernel)));
    group.bench_function("anew, as bytes", |b| b.iter(|| bytes(&all)));
    all.iter().for_each(|request| servers::carry_out(&mut kernel, request));
    assert!(turn(&kernel).is_empty(), "nothing is left to do");
    group.bench_function("nothing to do", |b| b.iter(|| turn(&kernel)));
}

criterion_group!(benches, full, change, ipvs);
criterion_main!(benches);
