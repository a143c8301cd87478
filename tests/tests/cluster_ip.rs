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
    use SocketLb::{All, Node, Off};
    let worlds: [(Topology, bool, &[SocketLb]); 5] = [
        (Topology::Routed, true, &[All, Node]),
        (Topology::Bridge, false, &[All, Node, Off]),
        (Topology::Vxlan, true, &[All, Node]),
        // Where the uplink is matters to packets alone.
        (Topology::Uplink, true, &[Node]),
        (Topology::Tun, false, &[Node]),
    ];
    for (topology, rp_filter, modes) in worlds {
        for &socket_lb in modes {
            let group = format!("{}/{}", topology.name(), socket_lb.name());
            if !suite.wants_group(&group) {
                continue;
            }
            // Elsewhere packets are as large, and as unfinished, as the kernel likes them best.
            let software_checksums = topology == Topology::Bridge;
            let spec = Spec { rp_filter, software_checksums, ..Spec::two_nodes(topology) };
            let large_segments = matches!(topology, Topology::Routed | Topology::Vxlan);
            match prepare(&spec, programs.clone(), socket_lb) {
                Ok(world) => cases::all(&mut suite, &group, &Ground { world: &world, socket_lb, large_segments }),
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
