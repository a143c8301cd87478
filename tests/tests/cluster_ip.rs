//! ClusterIP Services through the real agent: every topology, pods translated at connect time and per packet.

use std::process::ExitCode;

use anyhow::Result;
use proxy_tests::{
    cases::{self, Ground, services},
    suite::Suite,
    world::{AgentOptions, Programs, SocketLb, Spec, Topology, World, cleanup_on_signals},
};

fn main() -> ExitCode {
    let mut suite = Suite::new("cluster_ip");
    let Some(programs) = suite.programs() else { return suite.finish() };
    if let Err(error) = cleanup_on_signals().and_then(|()| World::sweep().map(drop)) {
        suite.fail("preparation", &error);
        return suite.finish();
    }
    for (topology, rp_filter) in
        [(Topology::Routed, true), (Topology::Bridge, false), (Topology::Vxlan, true), (Topology::Uplink, true)]
    {
        for socket_lb in SocketLb::SERVING {
            // Where the uplink is matters to packets alone.
            if topology == Topology::Uplink && socket_lb != SocketLb::Node {
                continue;
            }
            let group = format!("{}/{}", topology.name(), socket_lb.name());
            if !suite.wants_group(&group) {
                continue;
            }
            let spec = Spec { rp_filter, ..Spec::two_nodes(topology) };
            match prepare(&spec, programs.clone(), socket_lb) {
                Ok(world) => cases::all(&mut suite, &group, &Ground { world: &world, socket_lb }),
                Err(error) => suite.fail(&group, &error),
            }
        }
    }
    suite.finish()
}

fn prepare(spec: &Spec, programs: Programs, socket_lb: SocketLb) -> Result<World> {
    let mut world = World::new(spec, programs)?;
    for object in services::objects(&world) {
        world.write(&object)?;
    }
    world.start_agents(&AgentOptions::new(socket_lb))?;
    world.settle()?;
    Ok(world)
}
