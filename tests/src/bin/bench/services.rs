//! What benchmarks need beyond the tests' datapath: many Services at once, and a program that does nothing.

use std::{
    fs::File,
    net::{Ipv4Addr, SocketAddr, SocketAddrV4},
    os::fd::{AsRawFd as _, OwnedFd},
};

use anyhow::Result;
use proxy_common::proto::{TCP, UDP};

use crate::{
    bpf::{BPF_PROG_LOAD, Load, bpf},
    rules::{self, PORT, SERVER_PORT},
    support::{Datapath, Globals, Spec},
    world::SERVER,
};

pub fn server() -> SocketAddr {
    SocketAddr::new(SERVER.parse::<Ipv4Addr>().unwrap_or(Ipv4Addr::UNSPECIFIED).into(), SERVER_PORT)
}

pub fn vip(index: u32) -> SocketAddrV4 {
    SocketAddrV4::new(rules::vip(index), PORT)
}

/// A datapath with `services` Services over TCP and UDP, two backends each, all of which are the server.
pub fn load(services: u32, socket_lb: u8) -> Datapath {
    let globals = Globals { socket_lb, node_netns_cookie: u64::MAX, connected_udp: 1 };
    let mut datapath = Datapath::load(&globals, 2 * services + 1024, 4 * services + 1024);
    let spec = Spec::pick_all(1, &[server(), server()]);
    for index in 0..services {
        let spec = Spec { service: index + 1, ..spec.clone() };
        datapath.frontend(vip(index).into(), TCP, &spec);
        datapath.frontend(vip(index).into(), UDP, &spec);
    }
    datapath
}

/// A Service with session affinity, apart from the others.
pub const STICKY: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(10, 97, 0, 1), PORT);

/// Adds it to a datapath of `services` others.
pub fn add_sticky(datapath: &mut Datapath, services: u32) {
    let spec = Spec { affinity_secs: 10_800, ..Spec::pick_all(services + 1, &[server(), server()]) };
    datapath.frontend(STICKY.into(), UDP, &spec);
}

/// `connect4` that says yes and nothing else: what having any program costs. Attached while the result lives.
pub fn empty_connect4(cgroup: &File) -> Result<[OwnedFd; 2]> {
    const BPF_LINK_CREATE: i32 = 28;
    const BPF_PROG_TYPE_CGROUP_SOCK_ADDR: u32 = 18;
    const BPF_CGROUP_INET4_CONNECT: u32 = 10;

    #[repr(C)]
    struct Link {
        program: u32,
        target: u32,
        attach: u32,
        flags: u32,
    }
    // r0 = 1; exit
    let code: [u64; 2] = [0x0000_0001_0000_00b7, 0x95];
    let program = bpf(
        BPF_PROG_LOAD,
        &Load {
            kind: BPF_PROG_TYPE_CGROUP_SOCK_ADDR,
            instructions: 2,
            code: code.as_ptr() as u64,
            license: c"GPL".as_ptr() as u64,
            attach: BPF_CGROUP_INET4_CONNECT,
            ..Default::default()
        },
    )?;
    let link = bpf(
        BPF_LINK_CREATE,
        &Link {
            program: program.as_raw_fd() as u32,
            target: cgroup.as_raw_fd() as u32,
            attach: BPF_CGROUP_INET4_CONNECT,
            flags: 0,
        },
    )?;
    Ok([program, link])
}
