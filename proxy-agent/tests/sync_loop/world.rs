//! A running loop over a dataplane without a kernel, and what its tests put in.

use std::{sync::Arc, time::Duration};

use proxy_agent::{
    dataplane::{
        Failure,
        memory::{Kernel, Memory},
    },
    desired::{Device, DeviceRole, Devices, Frontend},
    model::{Event, Protocol, SourceState, index::Index},
    plan::{Defaults, Planner},
    status::Status,
    sync::{self, Ends, Options, SyncError},
};
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;

use crate::common::{self, node, service};

/// Far more than anything takes; a busy machine is no failure.
pub(crate) const SOON: Duration = Duration::from_secs(20);

/// A running loop with all its ends.
pub(crate) struct World {
    pub(crate) kernel: Kernel,
    pub(crate) events: mpsc::Sender<Event>,
    pub(crate) devices: watch::Sender<Devices>,
    pub(crate) source: watch::Sender<SourceState>,
    pub(crate) status: watch::Receiver<Arc<Status>>,
    pub(crate) cancel: CancellationToken,
    pub(crate) task: JoinHandle<Result<(), SyncError>>,
    pub(crate) oracle: Index,
}

pub(crate) fn quick() -> Options {
    Options {
        retry_first: Duration::from_millis(20),
        retry_max: Duration::from_millis(80),
        resync_period: Duration::from_millis(100),
        ..Options::default()
    }
}

impl World {
    pub(crate) fn start(kernel: Kernel, options: Options) -> Self {
        let (events, events_rx) = mpsc::channel(1024);
        let (devices, devices_rx) = watch::channel(Devices::new());
        let (source, source_rx) = watch::channel(SourceState::Listing { missing: Vec::new() });
        let (status_tx, status) = watch::channel(Arc::new(Status::starting("", "this".into())));
        let cancel = CancellationToken::new();
        let ends = Ends {
            events: events_rx,
            devices: devices_rx,
            source: source_rx,
            dataplane: Box::new(Memory::new(kernel.clone())),
            status: status_tx,
        };
        let task = tokio::spawn(sync::run(options, ends, cancel.clone()));
        Self { kernel, events, devices, source, status, cancel, task, oracle: Index::default() }
    }

    /// Started, and through the gate with these events and no devices.
    pub(crate) async fn started(kernel: Kernel, options: Options, events: Vec<Event>) -> Self {
        let mut world = Self::start(kernel, options);
        world.open_gate(events).await;
        world.wait("ready", |status| status.ready).await;
        world
    }

    pub(crate) async fn open_gate(&mut self, events: Vec<Event>) {
        let first = [
            Event::Node(node("this", None)),
            Event::Addresses(Default::default()),
            Event::Services(Vec::new()),
            Event::Slices(Vec::new()),
        ];
        for event in first {
            self.send(event).await;
        }
        for event in events {
            self.send(event).await;
        }
        self.devices.send_replace(Devices::new());
        self.source.send_replace(SourceState::Synced);
    }

    pub(crate) async fn send(&mut self, event: Event) {
        self.oracle.apply(event.clone(), &mut Default::default());
        self.events.send(event).await.unwrap();
    }

    pub(crate) async fn wait(&mut self, what: &str, condition: impl Fn(&Status) -> bool) -> Arc<Status> {
        let found = tokio::time::timeout(SOON, self.status.wait_for(|status| condition(status))).await;
        if let Some(status) = found.ok().map(|status| Arc::clone(&status.unwrap())) {
            return status;
        }
        panic!("not in time: {what}; {:#?}", self.status.borrow());
    }

    /// Until the kernel holds exactly what one full plan of all that was sent says.
    pub(crate) async fn converge(&self) {
        let mut planner = Planner::new(Defaults::default());
        let desired = planner.full(self.oracle.snapshot());
        for _ in 0..4000 {
            if self.kernel.state().desired == *desired {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("kernel {:#?}\nis not {desired:#?}", self.kernel.state().desired);
    }

    pub(crate) async fn stop(self) {
        self.cancel.cancel();
        self.task.await.unwrap().unwrap();
    }
}

pub(crate) fn web(ip: &str, name: &str) -> Event {
    Event::Service(Arc::new(service(name, &[ip])))
}

pub(crate) fn frontend(ip: &str) -> Frontend {
    Frontend { addr: ip.parse().unwrap(), port: common::port(80), protocol: Protocol::Tcp }
}

pub(crate) fn three() -> Vec<Event> {
    vec![web("10.96.0.1", "a"), web("10.96.0.2", "b"), web("10.96.0.3", "c")]
}

pub(crate) fn full() -> Failure {
    Failure::Retry("the frontends table is full (3); raise --map-frontends".into())
}

/// A pod's.
pub(crate) fn device(name: &str) -> Device {
    Device::new(name, DeviceRole::Pod)
}
