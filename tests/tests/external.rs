//! NodePorts, load balancers' addresses and external IPs through the real agent: pods translated at connect time and per packet.

use std::process::ExitCode;

use proxy_tests::{
    cases::{Ground, external},
    suite::Suite,
    world::{AgentOptions, SocketLb, Spec, Topology, World},
};

fn main() -> ExitCode {
    let shapes = [
        (Topology::Routed, SocketLb::All),
        (Topology::Routed, SocketLb::Node),
        // With the kernel's own connection tracking and masquerading beside ours.
        (Topology::Vxlan, SocketLb::Node),
    ];
    let shapes = shapes.map(|shape| (format!("{}/{}", shape.0.name(), shape.1.name()), shape));
    let prepare = |programs, (topology, socket_lb): &_| {
        let spec = Spec { rp_filter: true, ..Spec::two_nodes(*topology) };
        World::serving(&spec, programs, &AgentOptions::new(*socket_lb), external::objects)
    };
    Suite::in_worlds("external", shapes, prepare, |suite, group, (_, socket_lb), world| {
        external::all(suite, group, &Ground { world, socket_lb: *socket_lb, large_segments: true, fallback: None });
    })
}
