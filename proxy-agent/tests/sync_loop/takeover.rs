//! What another mode left in force is told of only when this one is.

use std::time::Duration;

use proxy_agent::{
    dataplane::{Failure, memory::Kernel},
    desired::Devices,
    model::{Event, SourceState},
    sync::Options,
};

use crate::{
    common::{key, node},
    world::{SOON, World, device, frontend, full, quick, three, web},
};

/// Everything but devices.
async fn told(kernel: &Kernel) -> World {
    kernel.state().hooks_first = true;
    let mut world = World::start(kernel.clone(), quick());
    for event in [
        Event::Node(node("this", None)),
        Event::Addresses(Default::default()),
        Event::Services(Vec::new()),
        Event::Slices(Vec::new()),
        web("10.96.0.1", "a"),
    ] {
        world.send(event).await;
    }
    world.source.send_replace(SourceState::Synced);
    world
}

/// A flow that meets some of the hooks only loses its answers; who serves until then goes on, and is told of by `in_force`, once.
#[tokio::test]
async fn where_nothing_is_in_force_hooks_come_first() {
    let kernel = Kernel::default();
    let mut world = told(&kernel).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(kernel.state().calls, Vec::<&str>::new(), "devices are waited for");
    world.devices.send_replace(Devices::new());
    world.wait("ready", |status| status.ready).await;
    world.converge().await;
    assert_eq!(kernel.state().calls, ["set_devices", "activate", "resync"]);
    world.send(web("10.96.0.2", "b")).await;
    world.converge().await;
    until_in_force(&kernel, 1).await;
    world.stop().await;
    // What is in force is brought up to date before hooks are touched.
    kernel.state().calls.clear();
    let world = World::started(kernel.clone(), quick(), three()).await;
    assert_eq!(kernel.state().calls.first(), Some(&"resync"));
    world.converge().await;
    until_in_force(&kernel, 2).await;
    world.stop().await;
}

#[tokio::test]
async fn devices_that_nobody_tells_of_are_not_waited_for_long() {
    let kernel = Kernel::default();
    let world = told(&kernel).await;
    world.converge().await;
    assert_eq!(kernel.state().calls, ["activate", "resync"]);
    assert_eq!(kernel.state().in_force, 0, "packets may still be another mode's");
    world.stop().await;
}

/// Ready, and has had the time to say that the former may go.
async fn settled(world: &mut World) {
    world.wait("ready", |status| status.ready).await;
    tokio::time::sleep(Duration::from_millis(400)).await;
}

/// So often it has been said to be in force, which follows what makes it so.
async fn until_in_force(kernel: &Kernel, times: u64) {
    tokio::time::timeout(SOON, async {
        while kernel.state().in_force < times {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .expect("in force");
}

/// Who served before is the only one that does, whatever else is in order.
#[tokio::test]
async fn while_nothing_is_in_force_the_former_goes_on() {
    let six = "fd00:10:96::1";
    for broken in [&["10.96.0.1", "10.96.0.2", "10.96.0.3", six][..], &[six]] {
        let kernel = Kernel::default();
        let fault = |ip: &&str| (frontend(ip), Failure::Retry("busy".into()));
        kernel.state().faults.frontends.extend(broken.iter().map(fault));
        let impatient = Options { takeover: Duration::from_millis(1), ..quick() };
        let events = three().into_iter().chain([web(six, "six")]).collect();
        let mut world = World::started(kernel.clone(), impatient, events).await;
        settled(&mut world).await;
        assert_eq!(kernel.state().in_force, 0, "{broken:?}");
        kernel.state().faults.frontends.clear();
        until_in_force(&kernel, 1).await;
        world.converge().await;
        assert_eq!(kernel.state().in_force, 1);
        world.stop().await;
    }
}

#[tokio::test]
async fn the_former_goes_on_a_while_for_what_is_missing_and_no_longer() {
    for (patience, expected) in [(Duration::from_secs(3600), 0), (Duration::from_millis(100), 1)] {
        let options = Options { takeover: patience, retry_first: Duration::from_secs(3600), ..quick() };
        for what in ["a frontend", "a device", "a Service that cannot be read"] {
            let kernel = Kernel::default();
            let mut world = World::start(kernel.clone(), options.clone());
            let mut events = three();
            match what {
                "a frontend" => drop(kernel.state().faults.frontends.insert(frontend("10.96.0.2"), full())),
                "a device" => {
                    kernel.state().faults.devices.insert("veth1".into(), Failure::Retry("busy".into()));
                    world.devices.send_replace([(7, device("veth0")), (8, device("veth1"))].into());
                }
                _ => events.push(Event::UnreadableServices([key("d")].into())),
            }
            for event in
                [Event::Node(node("this", None)), Event::Addresses(Default::default()), Event::Slices(Vec::new())]
            {
                world.send(event).await;
            }
            for event in events {
                world.send(event).await;
            }
            world.send(Event::Services(Vec::new())).await;
            for event in three() {
                world.send(event).await;
            }
            if what != "a device" {
                world.devices.send_replace(Devices::new());
            }
            world.source.send_replace(SourceState::Synced);
            settled(&mut world).await;
            assert_eq!(kernel.state().in_force, expected, "{what} {patience:?}");
            world.stop().await;
        }
    }
}

/// What never helps is not waited for.
#[tokio::test]
async fn the_former_does_not_wait_for_what_cannot_be() {
    let kernel = Kernel::default();
    {
        let faults = &mut kernel.state().faults;
        faults.frontends.insert(frontend("10.96.0.2"), Failure::Unsupported("never".into()));
        faults.devices.insert("veth1".into(), Failure::Unsupported("never".into()));
        faults.without_xdp.insert("veth0".into(), Failure::Retry("busy".into()));
    }
    let world = World::started(kernel.clone(), quick(), three()).await;
    world.devices.send_replace([(7, device("veth0")), (8, device("veth1"))].into());
    until_in_force(&kernel, 1).await;
    world.stop().await;
}
