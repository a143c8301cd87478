//! What the loop says of the node's health: hooks that somebody took off, and a node on which nothing is in force.

use std::time::{Duration, Instant, SystemTime};

use proxy_agent::{dataplane::memory::Kernel, serve::health::judge, status::Status, sync::Options};

use crate::world::{World, device, frontend, full, quick, three, web};

/// (livez, healthz) as of now.
fn health(status: &Status) -> (bool, bool) {
    let health = judge(status, Duration::from_secs(3600), Instant::now(), SystemTime::now());
    (health.livez(), health.healthz())
}

#[tokio::test]
async fn a_hook_that_was_taken_off_is_counted_and_put_back() {
    let kernel = Kernel::default();
    let mut world = World::started(kernel.clone(), quick(), three()).await;
    assert_eq!(health(&world.status.borrow()), (true, true));
    kernel.state().active = false;
    let status = world.wait("noticed", |status| status.hooks_lost > 0 && status.pending_since.is_none()).await;
    assert!(kernel.state().active, "not put back");
    assert_eq!((status.lost_hooks.len(), health(&status)), (0, (true, true)));

    // And where it cannot be put back.
    {
        let mut state = kernel.state();
        state.active = false;
        state.faults.activate = true;
    }
    let status = world.wait("lost", |status| status.hooks_lost > 1 && !status.lost_hooks.is_empty()).await;
    assert_eq!(health(&status), (true, false), "a restart does not help");
    // However often it is looked for, it was taken off once.
    let syncs = Instant::now();
    while syncs.elapsed() < Duration::from_millis(400) {
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert_eq!(world.status.borrow().hooks_lost, 2);
    }
    kernel.state().faults.activate = false;
    let status = world.wait("put back", |status| status.lost_hooks.is_empty()).await;
    assert_eq!((status.hooks_lost, health(&status)), (2, (true, true)));
    world.stop().await;
}

/// What looks after devices finds it before anybody compares with the kernel.
#[tokio::test]
async fn a_hook_that_was_taken_off_between_two_looks_is_no_less_lost() {
    let kernel = Kernel::default();
    let options = Options { resync_period: Duration::from_secs(3600), ..quick() };
    let mut world = World::started(kernel.clone(), options, three()).await;
    {
        let mut state = kernel.state();
        state.active = false;
        state.faults.activate = true;
    }
    world.devices.send_replace([(7, device("veth0"))].into());
    let status = world.wait("lost", |status| !status.lost_hooks.is_empty()).await;
    assert_eq!((status.hooks_lost, status.hooks.len(), health(&status)), (1, 0, (true, false)));
    kernel.state().faults.activate = false;
    let status = world.wait("put back", |status| status.lost_hooks.is_empty()).await;
    assert_eq!((status.hooks_lost, status.hooks.len(), health(&status)), (1, 1, (true, true)));
    // Put back by what finds it.
    kernel.state().active = false;
    world.devices.send_replace([(8, device("veth0"))].into());
    let status = world.wait("counted", |status| status.hooks_lost == 2 && status.lost_hooks.is_empty()).await;
    assert_eq!((status.hooks.len(), health(&status)), (1, (true, true)));
    world.stop().await;
}

/// As kube-proxy's: whoever compares it with the last sync sees a change that came after it, however long others wait.
#[tokio::test]
async fn what_was_queued_last_is_the_newest_change() {
    let options = Options { min_period: Duration::from_secs(3600), ..quick() };
    let mut world = World::started(Kernel::default(), options, three()).await;
    let mut last = world.status.borrow().last_queued;
    for (address, name) in [("10.96.0.4", "d"), ("10.96.0.5", "e")] {
        world.send(web(address, name)).await;
        let status = world.wait("queued", |status| status.last_queued > last).await;
        assert!(status.last_queued > status.last_sync);
        last = status.last_queued;
    }
    world.stop().await;
}

#[tokio::test]
async fn since_when_nothing_is_in_force_is_said() {
    let kernel = Kernel::default();
    let options = Options { resync_period: Duration::from_secs(3600), ..quick() };
    let mut world = World::started(kernel.clone(), options, three()).await;
    assert_eq!(world.status.borrow().nothing_since, None);
    {
        let mut state = kernel.state();
        state.faults.together = true;
        state.faults.frontends.insert(frontend("10.96.0.4"), full());
        // What was lost along with it cannot be put back either.
        state.faults.frontends.extend(["10.96.0.1", "10.96.0.2", "10.96.0.3"].map(|ip| (frontend(ip), full())));
    }
    world.send(web("10.96.0.4", "d")).await;
    let since = world.wait("nothing is in force", |status| status.nothing_since.is_some()).await.nothing_since;
    // Another one that is not in force changes nothing about that.
    kernel.state().faults.frontends.insert(frontend("10.96.0.5"), full());
    world.send(web("10.96.0.5", "e")).await;
    let degraded = |status: &Status| status.unserved.len() == 5;
    assert_eq!(world.wait("the fifth is not either", degraded).await.nothing_since, since);
    {
        let mut state = kernel.state();
        state.faults.frontends.remove(&frontend("10.96.0.1"));
        state.faults.together = false;
    }
    world.wait("one is in force", |status| status.nothing_since.is_none()).await;
    world.stop().await;
}
