//! The loop without a kernel: from an event handed over to the dataplane's write, in clusters of growing size (bench C3, C4).
//! The dataplane in memory stands for the maps, so this is what the agent adds to the writes themselves.

mod common;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use proxy_agent::{
    dataplane::memory::{Kernel, Memory},
    desired::Devices,
    model::{Event, SourceState},
    status::Status,
    sync,
};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

fn change(c: &mut Criterion) {
    let mut group = c.benchmark_group("event to write, by services");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.unwrap_or_else(|error| panic!("no runtime: {error}"));
    for services in [100, 10_000, 50_000] {
        let kernel = Kernel::default();
        let (events, events_rx) = mpsc::channel(1024);
        let (devices, devices_rx) = watch::channel(Devices::new());
        let (_source, source_rx) = watch::channel(SourceState::Synced);
        let (status_tx, mut status) = watch::channel(Arc::new(Status::starting("", "node-7".into())));
        let cancel = CancellationToken::new();
        let ends = sync::Ends {
            events: events_rx,
            devices: devices_rx,
            source: source_rx,
            dataplane: Box::new(Memory::new(kernel.clone())),
            status: status_tx,
        };
        runtime.spawn(sync::run(sync::Options::default(), ends, cancel.clone()));
        runtime.block_on(async {
            for event in common::events(services) {
                events.send(event).await.unwrap_or_else(|_| panic!("the loop ended"));
            }
            devices.send_replace(Devices::new());
            drop(status.wait_for(|status| status.ready).await);
        });

        let mut version = 0;
        group.bench_function(BenchmarkId::from_parameter(services), |b| {
            b.iter_custom(|rounds| {
                let mut waited = Duration::ZERO;
                for _ in 0..rounds {
                    version += 1;
                    let event = Event::Slice(common::slice((version - 1) / 2 * 37 % services, version));
                    // As changes come in life: the loop is asleep.
                    std::thread::sleep(Duration::from_micros(500));
                    let before = kernel.state().writes;
                    let start = Instant::now();
                    events.blocking_send(event).unwrap_or_else(|_| panic!("the loop ended"));
                    while kernel.state().writes == before {
                        std::hint::spin_loop();
                    }
                    waited += start.elapsed();
                }
                waited
            });
        });
        cancel.cancel();
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20);
    targets = change
}
criterion_main!(benches);
