//! The plan alone: all of a large cluster (bar: 10k Services with 100k endpoints within 50 ms), and one change in clusters
//! of growing size (bar: the size does not show; bench C4).

mod common;

use criterion::{BatchSize, BenchmarkId, Criterion, criterion_group, criterion_main};
use proxy_agent::{
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

criterion_group!(benches, full, change);
criterion_main!(benches);
