//! ClusterIP Services through the real agent: every topology, pods translated at connect time and per packet.

use std::process::ExitCode;

use proxy_tests::{
    cases::{self, Ground, services},
    suite::Suite,
    world::{AgentOptions, SocketLb, Spec, Topology, World},
};

fn main() -> ExitCode {
    use SocketLb::{All, Node, Off};
    let worlds: [(Topology, bool, &[SocketLb]); 5] = [
        (Topology::Routed, true, &[All, Node]),
        (Topology::Bridge, false, &[All, Node, Off]),
        (Topology::Vxlan, true, &[All, Node]),
        // Where the uplink is matters to packets alone.
        (Topology::Uplink, true, &[Node]),
        (Topology::Tun, false, &[Node]),
    ];
    let shapes = worlds.into_iter().flat_map(|(topology, rp_filter, modes)| {
        let named =
            move |mode: &SocketLb| (format!("{}/{}", topology.name(), mode.name()), (topology, rp_filter, *mode));
        modes.iter().map(named)
    });
    let prepare = |programs, (topology, rp_filter, socket_lb): &_| {
        // Elsewhere packets are as large, and as unfinished, as the kernel likes them best.
        let software_checksums = *topology == Topology::Bridge;
        let spec = Spec { rp_filter: *rp_filter, software_checksums, ..Spec::two_nodes(*topology) };
        World::serving(&spec, programs, &AgentOptions::new(*socket_lb), services::objects)
    };
    Suite::in_worlds("cluster_ip", shapes, prepare, |suite, group, (topology, _, socket_lb), world| {
        let large_segments = matches!(topology, Topology::Routed | Topology::Vxlan);
        cases::all(suite, group, &Ground { world, socket_lb: *socket_lb, large_segments, fallback: None });
    })
}
