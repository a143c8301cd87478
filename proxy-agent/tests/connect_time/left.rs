//! Connected UDP sockets that `connect` left on their VIP: their packets are translated elsewhere, or not at all.

use std::net::UdpSocket;

use proxy_common::{
    frontend::flags,
    globals::socket_lb,
    proto::{TCP, UDP},
};

use super::{
    BACKENDS, BACKENDS6, SPELT, VIP, VIP6, addr, addrs, answer, as_pod, ask, ask_tcp, ip, isolated, load_as, serve,
    support::{Datapath, Globals, Spec, netns_cookie},
    udp,
};

/// The VIPs become addresses of this namespace, with somebody there: who answers by the name of a VIP was reached untranslated.
fn serve_vips() {
    ip("addr add 10.96.0.1/32 dev lo");
    ip("-6 addr add fd00:10:96::1/128 dev lo nodad");
    for vip in [VIP, VIP6] {
        serve(addr(vip));
    }
}

fn frontends(datapath: &mut Datapath) {
    datapath.frontend(addr(VIP), UDP, &Spec::pick_all(1, &addrs(&BACKENDS)));
    datapath.frontend(addr(VIP6), UDP, &Spec::pick_all(2, &addrs(&BACKENDS6)));
}

/// However it sends. A datagram that was led to a backend would be answered from where this socket does not listen.
#[track_caller]
fn is_left_on(socket: &UdpSocket, vip: &str) {
    let (vip, who) = (addr(vip), addr(if vip == VIP6 { VIP6 } else { VIP }));
    assert_eq!(socket.peer_addr().unwrap(), vip);
    for _ in 0..10 {
        socket.send(b"?").unwrap();
        assert_eq!(answer(socket).unwrap(), (who, vip));
        assert_eq!(ask(socket, vip).unwrap(), (who, vip), "spelt out");
    }
}

/// Where nothing could move the socket when its backend goes.
#[test]
fn connected_sockets_of_pods_are_left_to_their_packets() {
    isolated("left::connected_sockets_of_pods_are_left_to_their_packets", |cgroup| {
        serve_vips();
        for (cookie, is_pod) in [(netns_cookie() + 1, true), (netns_cookie(), false)] {
            let globals = Globals { socket_lb: socket_lb::ALL, node_netns_cookie: cookie, connected_udp: 0 };
            let mut datapath = load_as(cgroup, &globals);
            frontends(&mut datapath);
            for (bind, vip) in SPELT {
                let socket = udp(bind);
                socket.connect(addr(vip)).unwrap();
                if is_pod {
                    is_left_on(&socket, vip);
                } else {
                    socket.send(b"?").unwrap();
                    assert!(!addrs(&[VIP, VIP6]).contains(&answer(&socket).unwrap().0));
                }
                let (who, shown) = ask(&udp(bind), addr(vip)).unwrap();
                assert!(!addrs(&[VIP, VIP6]).contains(&who), "{who}: those that are not connected have a backend");
                assert_eq!(shown, addr(vip));
            }
        }
    });
}

/// What may have to be reset goes per packet where sockets are out of reach: for pods alone, and TCP is asked for by its frontend.
#[test]
fn connections_that_only_packets_can_reset_are_left_to_them() {
    isolated("left::connections_that_only_packets_can_reset_are_left_to_them", |cgroup| {
        serve_vips();
        for (cookie, is_pod) in [(netns_cookie() + 1, true), (netns_cookie(), false)] {
            let globals = Globals { socket_lb: socket_lb::ALL, node_netns_cookie: cookie, connected_udp: 1 };
            let mut datapath = load_as(cgroup, &globals);
            for flags in [0, flags::PODS_PER_PACKET] {
                for (vip, backends) in [(VIP, &BACKENDS[..]), (VIP6, &BACKENDS6[..])] {
                    let spec = Spec { flags, ..Spec::pick_all(1, &addrs(backends)) };
                    datapath.frontend(addr(vip), TCP, &spec);
                    let left = ask_tcp(addr(vip)).unwrap() == addr(vip);
                    assert_eq!(left, is_pod && flags != 0, "{vip} {flags} pod: {is_pod}");
                }
            }
        }
    });
}

/// Connected while nothing served the VIP.
#[test]
fn a_frontend_that_comes_later_moves_no_socket() {
    isolated("left::a_frontend_that_comes_later_moves_no_socket", |cgroup| {
        serve_vips();
        let mut datapath = as_pod(cgroup);
        let sockets = SPELT.map(|(bind, vip)| {
            let socket = udp(bind);
            socket.connect(addr(vip)).unwrap();
            is_left_on(&socket, vip);
            (socket, vip)
        });
        frontends(&mut datapath);
        for (socket, vip) in &sockets {
            is_left_on(socket, vip);
        }
    });
}
