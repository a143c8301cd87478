//! The loop over a dataplane without a kernel: the gate, failures apart from each other, retries, relists, coalescing,
//! drift, and faults at every step (faults F2, F21, F25, F26).

#[path = "../common/mod.rs"]
mod common;
mod health;
mod takeover;
mod world;

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use common::{key, node, service, slice};
use proptest::{prelude::*, strategy::ValueTree, test_runner::TestRunner};
use proxy_agent::{
    dataplane::{
        Failure,
        memory::{Kernel, Lack},
    },
    desired::{Device, DeviceRole, Devices, Frontend},
    model::{EndpointSlice, Event, Family, Protocol, Service, SourceState, Teller},
    plan::{Defaults, DetectLocal},
    serve::health::judge,
    status::{FrontendState, Status},
    sync::{Options, SyncError},
};
use world::{SOON, World, device, frontend, full, quick, three, web};

#[tokio::test]
async fn nothing_is_written_before_everything_was_heard_of_a130() {
    // Left by an earlier run; no Service of that name exists in the lists that come.
    let kernel = Kernel::default();
    {
        let before = World::started(kernel.clone(), quick(), vec![web("10.96.9.9", "old")]).await;
        before.stop().await;
    }
    kernel.state().calls.clear();
    let left = kernel.state().desired.clone();
    assert_eq!(left.frontends.len(), 1);

    let mut world = World::start(kernel.clone(), quick());
    let gate = [
        Event::Services(vec![Arc::new(service("a", &["10.96.0.1"]))]),
        Event::Slices(vec![Arc::new(slice("a", "a-1", &["10.0.0.1"]))]),
        Event::Node(node("this", None)),
        Event::Addresses(["192.0.2.1".parse().unwrap()].into()),
    ];
    for event in gate {
        world.send(event).await;
        tokio::time::sleep(Duration::from_millis(30)).await;
        assert_eq!(kernel.state().desired, left);
    }
    // All is known, but the source does not yet say that this is all.
    assert!(kernel.state().calls.is_empty(), "{:?}", kernel.state().calls);
    // What must not wait for it is looked after, more than at the start.
    tokio::time::timeout(SOON, async {
        while kernel.state().waits < 2 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await
    .unwrap();
    assert!(!world.status.borrow().ready);

    world.source.send_replace(SourceState::Synced);
    world.wait("programmed", |status| status.syncs > 0).await;
    world.converge().await;
    // Devices that nobody has told us are not touched, and the node is not ready without them.
    assert_eq!(kernel.state().calls, ["resync", "activate"]);
    assert!(!world.status.borrow().ready);
    // What an earlier run left on them is looked after until they are told, and no longer.
    let waits = async |many: u64| {
        let before = kernel.state().waits;
        let more = async {
            while kernel.state().waits < before + many {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(Duration::from_millis(2500), more).await.is_ok()
    };
    assert!(waits(1).await, "nobody looks after devices");
    world.devices.send_replace(Devices::new());
    world.wait("ready", |status| status.ready).await;
    assert!(!waits(1).await, "devices are known");
    assert_eq!(kernel.state().calls, ["resync", "activate", "set_devices"]);
    world.stop().await;
}

#[tokio::test]
async fn a_restart_with_nothing_changed_writes_nothing() {
    let kernel = Kernel::default();
    World::started(kernel.clone(), quick(), three()).await.stop().await;
    let writes = kernel.state().writes;
    assert_eq!(writes, 6);
    let world = World::started(kernel.clone(), quick(), three()).await;
    world.converge().await;
    assert_eq!(kernel.state().writes, writes);
    world.stop().await;
}

#[tokio::test]
async fn one_failure_stands_alone_and_is_tried_again_f21() {
    let kernel = Kernel::default();
    kernel.state().faults.frontends.insert(frontend("10.96.0.2"), full());
    let mut world = World::started(kernel.clone(), quick(), three()).await;
    let degraded = |status: &Status| status.frontends.get(&frontend("10.96.0.2")).map(|row| row.state.clone());
    let status = world.wait("degraded", |status| degraded(status) == Some(FrontendState::Degraded(full()))).await;
    for ip in ["10.96.0.1", "10.96.0.3"] {
        assert_eq!(status.frontends[&frontend(ip)].state, FrontendState::Programmed);
    }
    assert_eq!(kernel.state().desired.frontends.len(), 2);

    // Others go on meanwhile.
    world.send(web("10.96.0.4", "d")).await;
    world.wait("the fourth", |status| status.frontends.contains_key(&frontend("10.96.0.4"))).await;

    kernel.state().faults.frontends.clear();
    world.wait("recovered", |status| degraded(status) == Some(FrontendState::Programmed)).await;
    world.converge().await;
    world.stop().await;
}

#[tokio::test]
async fn what_fails_along_with_others_is_said_and_tried_again() {
    let kernel = Kernel::default();
    // Nobody compares, nobody makes it anew.
    let options = Options { resync_period: Duration::from_secs(3600), ..quick() };
    let mut world = World::started(kernel.clone(), options, three()).await;
    {
        let mut state = kernel.state();
        state.faults.frontends.insert(frontend("10.96.0.4"), full());
        state.faults.together = true;
    }
    world.send(web("10.96.0.4", "d")).await;
    let all = |status: &Status, state: FrontendState| {
        status.frontends.len() == 4 && status.frontends.values().all(|row| row.state == state)
    };
    world.wait("all are degraded", |status| all(status, FrontendState::Degraded(full()))).await;
    kernel.state().faults.frontends.clear();
    world.wait("recovered", |status| all(status, FrontendState::Programmed)).await;
    world.converge().await;
    world.stop().await;
}

#[tokio::test]
async fn what_a_dataplane_knows_to_be_undone_is_done_and_no_drift() {
    let kernel = Kernel::default();
    let options = Options { retry_first: Duration::from_secs(3600), retry_max: Duration::from_secs(3600), ..quick() };
    let mut world = World::started(kernel.clone(), options, three()).await;
    kernel.state().faults.frontends.insert(frontend("10.96.0.4"), full());
    world.send(web("10.96.0.4", "d")).await;
    let state = |status: &Status| status.frontends.get(&frontend("10.96.0.4")).map(|row| row.state.clone());
    world.wait("degraded", |status| state(status) == Some(FrontendState::Degraded(full()))).await;
    {
        let mut state = kernel.state();
        state.faults.frontends.clear();
        state.faults.unfinished = true;
    }
    world.wait("in force", |status| state(status) == Some(FrontendState::Programmed)).await;
    assert_eq!(world.status.borrow().drift_repaired, 0);
    world.stop().await;
}

#[tokio::test]
async fn what_can_never_work_is_not_tried_again() {
    let kernel = Kernel::default();
    let never = Failure::Unsupported("SCTP is not supported by this dataplane".into());
    kernel.state().faults.frontends.insert(frontend("10.96.0.2"), never.clone());
    let options = Options { resync_period: Duration::from_secs(60), ..quick() };
    let mut world = World::started(kernel.clone(), options, three()).await;
    world.wait("said", |s| s.frontends[&frontend("10.96.0.2")].state == FrontendState::Degraded(never.clone())).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(kernel.state().calls, ["resync", "set_devices", "activate"]);
    world.stop().await;
}

/// Protocols and affinity that a dataplane does not have: said of each frontend, never asked of the dataplane, and what was in force
/// under the same address goes.
#[tokio::test]
async fn what_a_dataplane_cannot_express_is_said_per_frontend() {
    let kernel = Kernel::default();
    kernel.state().lacks = vec![Lack::Protocol(Protocol::Sctp), Lack::Affinity];
    let with = |name: &str, ip: &str, protocol, affinity_secs| {
        let mut service = service(name, &[ip]);
        service.ports[0].protocol = protocol;
        Event::Service(Arc::new(Service { affinity_secs, ..service }))
    };
    let mut first = three();
    first.push(with("s", "10.96.0.4", Protocol::Sctp, None));
    first.push(with("t", "10.96.0.5", Protocol::Tcp, Some(60)));
    let mut world = World::started(kernel.clone(), quick(), first).await;
    let sctp = Frontend { protocol: Protocol::Sctp, ..frontend("10.96.0.4") };
    let why = |status: &Status, frontend: &Frontend| match &status.frontends[frontend].state {
        FrontendState::Degraded(Failure::Unsupported(why)) => why.clone(),
        state => format!("{state:?}"),
    };
    let settled = |status: &Status| status.frontends.values().all(|known| known.state != FrontendState::Pending);
    let status = world.wait("programmed", |status| status.frontends.len() == 5 && settled(status)).await;
    assert_eq!(why(&status, &sctp), "frontend 10.96.0.4:80/SCTP: SCTP is not served by the memory dataplane");
    assert!(why(&status, &frontend("10.96.0.5")).contains("no session affinity"));
    assert_eq!(status.frontends[&frontend("10.96.0.1")].state, FrontendState::Programmed);
    assert_eq!(kernel.state().desired.frontends.len(), 3);

    // One that is in force asks for what there is not, and thinks better of it.
    world.send(with("a", "10.96.0.1", Protocol::Tcp, Some(60))).await;
    world.wait("said", |status| why(status, &frontend("10.96.0.1")).contains("no session affinity")).await;
    assert_eq!(kernel.state().desired.frontends.len(), 2);
    world.send(web("10.96.0.1", "a")).await;
    world.wait("back", |s| s.frontends[&frontend("10.96.0.1")].state == FrontendState::Programmed).await;
    assert_eq!(kernel.state().desired.frontends.len(), 3);
    // Repairs and further attempts ask for no more than that.
    kernel.state().desired.frontends.remove(&frontend("10.96.0.2"));
    world.wait("repaired", |status| status.drift_repaired > 0).await;
    assert_eq!(kernel.state().desired.frontends.len(), 3);
    assert!(why(&world.status.borrow(), &sctp).contains("SCTP is not served"));
    world.stop().await;
}

#[tokio::test]
async fn room_that_is_made_is_used_at_once() {
    let kernel = Kernel::default();
    kernel.state().faults.capacity = Some(2);
    let options = Options { retry_first: Duration::from_millis(30), retry_max: Duration::from_secs(60), ..quick() };
    let mut world = World::started(kernel.clone(), options, three()).await;
    // Time enough for the pauses to grow beyond what the test waits.
    tokio::time::sleep(Duration::from_millis(500)).await;
    world.send(Event::ServiceGone(key("a"))).await;
    world.converge().await;
    world.wait("in force", |s| s.frontends[&frontend("10.96.0.3")].state == FrontendState::Programmed).await;
    world.stop().await;
}

#[tokio::test]
async fn a_relist_removes_what_vanished_meanwhile_f2_a137() {
    let mut world = World::started(Kernel::default(), quick(), three()).await;
    world.converge().await;
    world.send(Event::Services(vec![Arc::new(service("b", &["10.96.0.2"]))])).await;
    world.converge().await;
    assert_eq!(world.kernel.state().desired.frontends.len(), 1);
    let status = world.wait("rows follow", |status| status.frontends.len() == 1).await;
    assert_eq!(status.services, 1);
    world.stop().await;
}

#[tokio::test]
async fn what_is_queued_is_taken_together() {
    let kernel = Kernel::default();
    let mut world = World::started(kernel.clone(), quick(), three()).await;
    kernel.state().calls.clear();
    kernel.state().faults.slow = Duration::from_millis(50);
    for i in 1..=200_u8 {
        world.send(Event::Slice(Arc::new(slice("a", "a-1", &[&format!("10.0.0.{i}")])))).await;
    }
    world.converge().await;
    let applies = kernel.state().calls.iter().filter(|call| **call == "apply").count();
    assert!((1..=50).contains(&applies), "{applies} calls for 200 changes");
    let status = world.wait("counted", |status| status.endpoint_changes.total == 200).await;
    assert_eq!(status.endpoints, 1);
    world.stop().await;
}

#[tokio::test]
async fn a_minimum_period_is_kept() {
    let kernel = Kernel::default();
    let options = Options { min_period: Duration::from_millis(300), ..quick() };
    let mut world = World::started(kernel.clone(), options, three()).await;
    kernel.state().calls.clear();
    for i in 1..=5_u8 {
        world.send(Event::Slice(Arc::new(slice("a", "a-1", &[&format!("10.0.0.{i}")])))).await;
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    world.converge().await;
    // Two, should the machine take so long over sending that a period ends meanwhile; without a period there would be five.
    let applies = kernel.state().calls.len();
    assert!(applies <= 2, "{applies}");
    world.stop().await;
}

#[tokio::test]
async fn drift_is_repaired_and_counted_f27() {
    let kernel = Kernel::default();
    let mut world = World::started(kernel.clone(), quick(), three()).await;
    kernel.state().desired.frontends.remove(&frontend("10.96.0.1"));
    kernel.state().active = false;
    let status = world.wait("repaired", |status| status.drift_repaired > 0).await;
    assert_eq!(status.drift_repaired, 2);
    world.converge().await;
    assert!(kernel.state().active);
    world.stop().await;
}

/// With the addresses gone that tell a pod, everybody is outside.
#[tokio::test]
async fn addresses_that_tell_pods_are_repaired_a72() {
    let kernel = Kernel::default();
    let cidr: ipnet::IpNet = "10.244.0.0/16".parse().unwrap();
    let detect_local = DetectLocal::Cidrs([cidr].into());
    let options = Options { defaults: Defaults { detect_local, ..Defaults::default() }, ..quick() };
    let mut world = World::started(kernel.clone(), options, three()).await;
    assert!(kernel.state().desired.local_cidrs.remove(&cidr));
    let status = world.wait("repaired", |status| status.drift_repaired > 0).await;
    assert_eq!(status.drift_repaired, 1);
    assert!(kernel.state().desired.local_cidrs.contains(&cidr));
    world.stop().await;
}

#[tokio::test]
async fn hooks_that_do_not_attach_are_said_and_tried_again() {
    let kernel = Kernel::default();
    kernel.state().faults.activate = true;
    let mut world = World::start(kernel.clone(), quick());
    world.open_gate(three()).await;
    let status = world.wait("said", |status| status.problems.contains_key("hooks")).await;
    assert!(!status.ready);
    kernel.state().faults.activate = false;
    world.wait("ready", |status| status.ready && status.problems.is_empty()).await;
    world.stop().await;
}

#[tokio::test]
async fn devices_are_followed_and_failures_tried_again() {
    let kernel = Kernel::default();
    let mut world = World::started(kernel.clone(), quick(), three()).await;
    kernel.state().faults.devices.insert("veth1".into(), Failure::Retry("busy".into()));
    world.devices.send_replace([(7, device("veth0")), (8, device("veth1"))].into());
    let status = world.wait("said", |status| status.failed_devices.contains_key("veth1")).await;
    assert_eq!(status.devices.len(), 2);
    assert_eq!(kernel.state().devices.len(), 1);
    kernel.state().faults.devices.clear();
    world.wait("attached", |status| status.failed_devices.is_empty()).await;
    assert_eq!(kernel.state().devices.len(), 2);
    world.stop().await;
}

#[tokio::test]
async fn latency_is_measured_from_the_trigger_time_a28() {
    let mut world = World::started(Kernel::default(), quick(), three()).await;
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let now = i64::try_from(now.as_nanos()).unwrap();
    let with = |name: &str, trigger_time, address: &str| {
        Event::Slice(Arc::new(EndpointSlice { trigger_time, ..slice(name, &format!("{name}-1"), &[address]) }))
    };
    // Before our time; without a time; now; now, but it fails.
    world.kernel.state().faults.frontends.insert(frontend("10.96.0.3"), full());
    world.send(with("a", Some(now - 3_600_000_000_000), "10.0.0.1")).await;
    world.send(with("a", None, "10.0.0.2")).await;
    world.send(with("b", Some(now), "10.0.0.1")).await;
    world.send(with("c", Some(now), "10.0.0.1")).await;
    let measured = |status: &Status| status.timings.programming[&Family::V4].count();
    let status = world.wait("measured", |status| measured(status) > 0).await;
    assert_eq!(measured(&status), 1);
    world.kernel.state().faults.frontends.clear();
    let status = world.wait("the failed one", |status| measured(status) > 1).await;
    assert_eq!(measured(&status), 2);
    assert!(status.timings.programming[&Family::V4].sum() < 10.0);
    assert_eq!(status.timings.programming[&Family::V6].count(), 0);
    assert!(status.timings.full.count() >= 1 && status.timings.partial.count() >= 1);
    world.stop().await;
}

#[tokio::test]
async fn a_call_that_does_not_return_is_seen() {
    let mut world = World::started(Kernel::default(), quick(), three()).await;
    world.kernel.state().faults.slow = Duration::from_secs(2);
    world.send(web("10.96.0.4", "d")).await;
    let status = world.wait("announced", |status| status.pending_since.is_some()).await;
    assert!(
        status.pending_since.unwrap().elapsed() < Duration::from_millis(1800),
        "announced before the call returned"
    );
    world.kernel.state().faults.slow = Duration::ZERO;
    world.wait("over", |status| status.pending_since.is_none()).await;
    world.stop().await;
}

/// Every call that the loop makes into the kernel, hanging: a restart might help, so /livez must say so (A117, A118).
#[tokio::test]
async fn whatever_call_hangs_livez_says_so() {
    for call in ["apply", "set_devices", "activate", "observe", "resync", "tick", "fill"] {
        let mut world = World::started(Kernel::default(), quick(), three()).await;
        let period = Duration::from_millis(100);
        let lives = |status: &Status| judge(status, period, Instant::now(), SystemTime::now()).livez();
        {
            let mut state = world.kernel.state();
            state.faults.slow = Duration::from_secs(1);
            state.faults.slow_call = Some(call);
            state.faults.tick = Some(Duration::from_millis(50));
            // Makes the next look at the kernel find something to repair.
            state.active = !matches!(call, "resync" | "activate");
        }
        match call {
            "set_devices" => drop(world.devices.send_replace([(7, device("veth0"))].into())),
            _ => world.send(web("10.96.0.4", "d")).await,
        }
        let mut dead = false;
        let start = Instant::now();
        while !dead && start.elapsed() < Duration::from_secs(4) {
            tokio::time::sleep(Duration::from_millis(10)).await;
            dead = !lives(&world.status.borrow());
        }
        assert!(dead, "{call} hung, and nobody said so");
        world.kernel.state().faults.slow = Duration::ZERO;
        world.wait("over", |status| status.pending_since.is_none()).await;
        world.stop().await;
    }
}

#[tokio::test]
async fn what_the_source_reports_and_what_conflicts_is_published() {
    let mut world = World::started(Kernel::default(), quick(), three()).await;
    world.send(Event::Problems(Teller::Source, [("web.yaml:3".to_owned(), vec!["not YAML".to_owned()])].into())).await;
    world.send(web("10.96.0.1", "z")).await;
    let status = world.wait("both", |status| status.problems.len() == 2).await;
    assert!(status.problems["Service default/z"][0].contains("already used by default/a:http"));
    world.send(Event::Problems(Teller::Source, [].into())).await;
    world.wait("one", |status| status.problems.len() == 1).await;
    world.stop().await;
}

/// F17 across a restart: what the first list says is there but cannot be read keeps what an earlier run left in force.
#[tokio::test]
async fn a_restart_takes_nothing_away_that_cannot_be_read() {
    let endpoints = |service: &str, ip: &str| Event::Slice(Arc::new(slice(service, &format!("{service}-1"), &[ip])));
    let everything = || {
        let mut events = three();
        events.extend([endpoints("a", "10.0.0.1"), endpoints("b", "10.0.0.2"), endpoints("c", "10.0.0.3")]);
        events
    };
    let kernel = Kernel::default();
    let world = World::started(kernel.clone(), quick(), everything()).await;
    world.converge().await;
    world.stop().await;
    let left = kernel.state().desired.clone();
    let unreadable = |name: &str, service: Option<&str>| {
        Event::UnreadableSlices([(("default".into(), name.into()), service.map(key))].into())
    };
    let first = |lists: Vec<Event>| {
        let rest = [Event::Node(node("this", None)), Event::Addresses(Default::default())];
        rest.into_iter().chain(lists).collect::<Vec<_>>()
    };
    let lists = |names: &[(&str, &str)], slices: &[(&str, &str)]| {
        let services = names.iter().map(|(name, ip)| Arc::new(service(name, &[ip]))).collect();
        let slices = slices.iter().map(|(name, ip)| Arc::new(slice(name, &format!("{name}-1"), &[ip]))).collect();
        [Event::Services(services), Event::Slices(slices)]
    };
    // Service b and the slice of c cannot be read; a has gone.
    let restart = async || {
        let mut world = World::start(kernel.clone(), quick());
        let [services, slices] = lists(&[("c", "10.96.0.3")], &[("b", "10.0.0.2")]);
        let b = Event::UnreadableServices([key("b")].into());
        for event in first(vec![b, services, unreadable("c-1", Some("c")), slices]) {
            world.send(event).await;
        }
        world.devices.send_replace(Devices::new());
        world.source.send_replace(SourceState::Synced);
        world.wait("ready", |status| status.ready).await;
        world
    };
    let stands = |name: &str, ip: &str| {
        let state = kernel.state();
        assert_eq!(state.desired.frontends.get(&frontend(ip)), left.frontends.get(&frontend(ip)), "{name}");
        assert!(state.desired.guards.contains(&ip.parse().unwrap()), "guard of {name}");
    };
    let mut world = restart().await;
    stands("b", "10.96.0.2");
    stands("c", "10.96.0.3");
    assert!(!kernel.state().desired.frontends.contains_key(&frontend("10.96.0.1")));
    let degraded = |status: &Status| {
        let row = status.frontends.get(&frontend("10.96.0.3")).map(|row| &row.state);
        let held = matches!(row, Some(FrontendState::Degraded(Failure::Held(why))) if why.contains("cannot be read"));
        // It serves as before: no reason for a load balancer to go elsewhere.
        held && !status.has_degraded(&key("c"), Family::V4)
    };
    world.wait("said", degraded).await;
    // Neither a change elsewhere nor a repair ends that.
    world.send(web("10.96.0.9", "d")).await;
    kernel.state().desired.frontends.remove(&frontend("10.96.0.9"));
    tokio::time::sleep(quick().resync_period * 3).await;
    stands("b", "10.96.0.2");
    stands("c", "10.96.0.3");
    // Readable at last, at another address; and the slice gone for good.
    world.send(web("10.96.0.8", "b")).await;
    world.send(Event::SliceGone { namespace: "default".into(), name: "c-1".into() }).await;
    world.converge().await;
    let programmed = |status: &Status| status.frontends.values().all(|row| row.state == FrontendState::Programmed);
    world.wait("programmed", programmed).await;
    world.stop().await;

    // Gone without ever having been read: nothing of it stays.
    let world = World::started(kernel.clone(), quick(), everything()).await;
    world.converge().await;
    world.stop().await;
    let mut world = restart().await;
    world.send(Event::ServiceGone(key("b"))).await;
    world.send(Event::ServiceGone(key("c"))).await;
    world.converge().await;
    assert!(kernel.state().desired.frontends.is_empty());
    world.stop().await;
}

#[tokio::test]
async fn a_source_that_ends_ends_the_loop_and_leaves_the_kernel_alone() {
    let kernel = Kernel::default();
    let world = World::started(kernel.clone(), quick(), three()).await;
    world.converge().await;
    drop(world.events);
    assert!(matches!(world.task.await.unwrap(), Err(SyncError::SourceEnded)));
    assert_eq!(kernel.state().desired.frontends.len(), 3);
}

/// An arbitrary history, always the same for one seed.
fn history(length: usize) -> Vec<Event> {
    let mut runner = TestRunner::deterministic();
    let strategy = prop::collection::vec(common::events(), length);
    strategy.new_tree(&mut runner).unwrap().current()
}

#[tokio::test]
async fn converges_whatever_fails_f25() {
    for every in [2, 3, 7] {
        let kernel = Kernel::default();
        kernel.state().faults.every = every;
        let mut world = World::started(kernel.clone(), quick(), Vec::new()).await;
        for event in history(60) {
            world.send(event).await;
            tokio::task::yield_now().await;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
        kernel.state().faults.every = 0;
        world.converge().await;
        let rows = kernel.state().desired.frontends.len();
        let programmed =
            |s: &Status| s.frontends.values().filter(|row| row.state == FrontendState::Programmed).count() == rows;
        world.wait("clean", |status| status.frontends.len() == rows && programmed(status)).await;
        world.stop().await;
    }
}

#[tokio::test]
async fn dying_after_any_write_and_starting_again_converges_f26() {
    let endpoints =
        |service: &str, addresses: &[&str]| Event::Slice(Arc::new(slice(service, &format!("{service}-1"), addresses)));
    let mut first = three();
    first.push(endpoints("a", &["10.0.0.1", "10.0.0.2"]));
    let then = [
        endpoints("a", &["10.0.0.2"]),
        endpoints("b", &["10.0.0.3"]),
        Event::ServiceGone(key("c")),
        web("10.96.0.9", "b"),
        web("10.96.0.1", "d"),
        Event::ServiceGone(key("a")),
    ];
    let mut steps = 0;
    for crash_after in 0.. {
        let kernel = Kernel::default();
        kernel.state().faults.crash_after = Some(crash_after);
        let mut world = World::start(kernel.clone(), quick());
        world.open_gate(first.clone()).await;
        world.wait("first sync", |status| status.syncs > 0).await;
        for (at, event) in then.iter().enumerate() {
            world.send(event.clone()).await;
            world.wait("sync", |status| status.syncs > at as u64 + 1).await;
        }
        world.cancel.cancel();
        world.task.await.unwrap().unwrap();
        let died = kernel.state().writes == crash_after;

        kernel.state().faults.crash_after = None;
        let everything = first.iter().chain(&then).cloned().collect();
        let world = World::started(kernel.clone(), quick(), everything).await;
        world.converge().await;
        world.stop().await;
        steps += 1;
        if !died {
            break;
        }
    }
    // Three frontends and guards; set, set, remove both, move both, hand over. One run dies with the last write, one after.
    assert_eq!(steps, 6 + 2 + 2 + 4 + 1 + 2);
}

/// Whatever was in XDP's way may go away without anybody telling.
#[tokio::test]
async fn a_device_without_xdp_is_looked_at_again() {
    let kernel = Kernel::default();
    let why = Failure::Unsupported("another XDP program is there".into());
    kernel.state().faults.without_xdp = [("eth0".to_owned(), why)].into();
    let mut world = World::start(kernel, quick());
    let device = Device { role: DeviceRole::Outward, local: false, ..device("eth0") };
    world.devices.send_replace([(7, device)].into());
    world.open_gate(three()).await;
    world.wait("without", |status| status.ready && status.without_xdp.len() == 1).await;
    let repaired = world.status.borrow().drift_repaired;
    world.kernel.state().faults.without_xdp.clear();
    let status = world.wait("with", |status| status.without_xdp.is_empty()).await;
    assert_eq!(status.drift_repaired, repaired, "nothing was altered");
    // Where nothing is missing nobody looks.
    tokio::time::sleep(Duration::from_millis(150)).await;
    let calls = || world.kernel.state().calls.iter().filter(|call| **call == "set_devices").count();
    let before = calls();
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(calls(), before);
    world.stop().await;
}
