//! NodePorts, load balancers' addresses and external IPs through the real agent: pods translated at connect time and per packet.

use std::process::ExitCode;

use anyhow::Result;
use proxy_tests::{
    cases::{Ground, external},
    suite::Suite,
    world::{AgentOptions, Programs, SocketLb, Spec, Topology, World, cleanup_on_signals},
};

fn main() -> ExitCode {
    let mut suite = Suite::new("external");
    let Some(programs) = suite.programs() else { return suite.finish() };
    if let Err(error) = cleanup_on_signals().and_then(|()| World::sweep().map(drop)) {
        suite.fail("preparation", &error);
        return suite.finish();
    }
    let worlds = [
        (Topology::Routed, SocketLb::All),
        (Topology::Routed, SocketLb::Node),
        // With the kernel's own connection tracking and masquerading beside ours.
        (Topology::Vxlan, SocketLb::Node),
    ];
    for (topology, socket_lb) in worlds {
        let group = format!("{}/{}", topology.name(), socket_lb.name());
        if !suite.wants_group(&group) {
            continue;
        }
        match prepare(&Spec { rp_filter: true, ..Spec::two_nodes(topology) }, programs.clone(), socket_lb) {
            Ok(world) => {
                external::all(&mut suite, &group, &Ground { world: &world, socket_lb, large_segments: true });
            }
            Err(error) => suite.fail(&group, &error),
        }
    }
    suite.finish()
}

fn prepare(spec: &Spec, programs: Programs, socket_lb: SocketLb) -> Result<World> {
    let mut world = World::new(spec, programs)?;
    for object in external::objects(&world) {
        world.write(&object)?;
    }
    world.start_agents(&AgentOptions::new(socket_lb))?;
    world.settle()?;
    Ok(world)
}
