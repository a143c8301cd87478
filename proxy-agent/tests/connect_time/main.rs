//! Connect-time programs in the kernel: real sockets, backends on the loopback device of a network namespace.
//!
//! Programs see sockets by their process's cgroup, and processes choose addresses by their network namespace; so each test
//! runs itself again as a child inside a cgroup and a namespace of its own. Needs root and the object; else it is skipped.

#[allow(dead_code, reason = "the packet tests use the rest")]
#[path = "../support/mod.rs"]
mod support;

mod affinity;
mod datagrams;
mod left;

use std::{
    env, fs,
    io::{ErrorKind, Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsRawFd,
    path::PathBuf,
    process::Command,
    thread,
    time::Duration,
};

use aya::maps::HashMap;
use proxy_common::{
    Be16, Ipv4Be,
    counters::{Reason, ServiceCounters},
    frontend::{FrontendKey, algorithm, flags, verdict},
    globals::socket_lb,
    proto::{TCP, UDP},
};

use support::{Datapath, Globals, Spec, netns_cookie};

const VIP: &str = "10.96.0.1:80";
const VIP_B: &str = "10.96.0.2:80";
const VIP6: &str = "[fd00:10:96::1]:80";
/// Where a socket is bound, and a VIP as it says it.
const SPELT: [(&str, &str); 3] = [("0.0.0.0:0", VIP), ("[::]:0", VIP6), ("[::]:0", "[::ffff:10.96.0.1]:80")];
const BACKENDS: [&str; 3] = ["10.244.0.1:8080", "10.244.0.2:8080", "10.244.0.3:8080"];
const BACKENDS6: [&str; 2] = ["[fd00:10:244::1]:8080", "[fd00:10:244::2]:8080"];

fn addr(s: &str) -> SocketAddr {
    s.parse().unwrap()
}

fn addrs(s: &[&str]) -> Vec<SocketAddr> {
    s.iter().map(|s| addr(s)).collect()
}

/// Removes the test's cgroup, whatever happens.
struct Cgroup(PathBuf);

impl Drop for Cgroup {
    fn drop(&mut self) {
        // The child is gone, but the kernel may take a moment to notice.
        for _ in 0..50 {
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            thread::sleep(Duration::from_millis(20));
        }
        eprintln!("could not remove {}", self.0.display());
    }
}

const CHILD: &str = "CONNECT_TIME_CGROUP";

/// Runs `case` in a cgroup and a network namespace of its own; `name` is the test's.
fn isolated(name: &str, case: fn(&fs::File)) {
    if let Some(reason) = support::skip() {
        println!("SKIP {name}: {reason}");
        return;
    }
    if let Some(cgroup) = env::var_os(CHILD) {
        let cgroup = PathBuf::from(cgroup);
        fs::write(cgroup.join("cgroup.procs"), "0").unwrap();
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        ip("link set lo up");
        for backend in addrs(&BACKENDS) {
            ip(&format!("addr add {}/32 dev lo", backend.ip()));
            serve(backend);
        }
        for backend in addrs(&BACKENDS6) {
            ip(&format!("-6 addr add {}/128 dev lo nodad", backend.ip()));
            serve(backend);
        }
        return case(&fs::File::open(cgroup).unwrap());
    }
    let path = support::cgroup_root().unwrap().join(format!("proxy-connect-time-{}-{name}", std::process::id()));
    fs::create_dir(&path).unwrap();
    let cgroup = Cgroup(path);
    let output = Command::new(env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env(CHILD, &cgroup.0)
        .output()
        .unwrap();
    drop(cgroup);
    assert!(
        output.status.success(),
        "{}\n{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

fn ip(args: &str) {
    assert!(Command::new("ip").args(args.split(' ')).status().unwrap().success(), "ip {args}");
}

/// A backend that tells its name, over TCP and UDP.
fn serve(at: SocketAddr) {
    let listener = TcpListener::bind(at).unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let _ = stream.unwrap().write_all(at.to_string().as_bytes());
        }
    });
    let socket = UdpSocket::bind(at).unwrap();
    thread::spawn(move || {
        let mut buffer = [0; 16];
        loop {
            let (_, from) = socket.recv_from(&mut buffer).unwrap();
            socket.send_to(at.to_string().as_bytes(), from).unwrap();
        }
    });
}

fn load(cgroup: &fs::File, socket_lb: u8, node_netns_cookie: u64) -> Datapath {
    load_as(cgroup, &Globals { socket_lb, node_netns_cookie, connected_udp: 1 })
}

fn load_as(cgroup: &fs::File, globals: &Globals) -> Datapath {
    let mut datapath = Datapath::load(globals, 1024, 65_536);
    datapath.attach_connect_time(cgroup);
    datapath
}

/// Everything translated; this namespace is a pod's.
fn as_pod(cgroup: &fs::File) -> Datapath {
    load(cgroup, socket_lb::ALL, netns_cookie() + 1)
}

fn as_node(cgroup: &fs::File) -> Datapath {
    load(cgroup, socket_lb::ALL, netns_cookie())
}

/// Who answers a TCP connection to `vip`.
fn ask_tcp(vip: SocketAddr) -> std::io::Result<SocketAddr> {
    let mut stream = TcpStream::connect_timeout(&vip, Duration::from_secs(2))?;
    assert_eq!(stream.peer_addr()?, vip, "getpeername");
    let mut name = String::new();
    stream.read_to_string(&mut name)?;
    Ok(addr(&name))
}

fn udp(bind: &str) -> UdpSocket {
    let socket = UdpSocket::bind(bind).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    socket
}

/// Sends to `vip` and tells who answered and as whom.
fn ask(socket: &UdpSocket, vip: SocketAddr) -> std::io::Result<(SocketAddr, SocketAddr)> {
    socket.send_to(b"?", vip)?;
    answer(socket)
}

fn answer(socket: &UdpSocket) -> std::io::Result<(SocketAddr, SocketAddr)> {
    let mut buffer = [0; 64];
    let (n, from) = socket.recv_from(&mut buffer)?;
    Ok((addr(std::str::from_utf8(&buffer[..n]).unwrap()), from))
}

fn dissolve(socket: &UdpSocket) {
    let unspec = nix::libc::sockaddr { sa_family: nix::libc::AF_UNSPEC as u16, sa_data: [0; 14] };
    // SAFETY: a valid socket, and an address of the length given.
    let rc = unsafe { nix::libc::connect(socket.as_raw_fd(), &raw const unspec, size_of_val(&unspec) as u32) };
    assert_eq!(rc, 0);
}

#[test]
fn tcp_reaches_a_backend_and_sees_the_vip() {
    isolated("tcp_reaches_a_backend_and_sees_the_vip", |cgroup| {
        let mut datapath = as_pod(cgroup);
        datapath.frontend(addr(VIP), TCP, &Spec::pick_all(1, &addrs(&BACKENDS)));
        datapath.frontend(addr(VIP6), TCP, &Spec::pick_all(2, &addrs(&BACKENDS6)));
        for _ in 0..20 {
            assert!(addrs(&BACKENDS).contains(&ask_tcp(addr(VIP)).unwrap()));
            assert!(addrs(&BACKENDS6).contains(&ask_tcp(addr(VIP6)).unwrap()));
            // An IPv4-mapped address on an IPv6 socket.
            assert!(addrs(&BACKENDS).contains(&ask_tcp(addr("[::ffff:10.96.0.1]:80")).unwrap()));
        }
        // Not ours: as if no program were there.
        assert_eq!(ask_tcp(addr(BACKENDS[1])).unwrap(), addr(BACKENDS[1]));
        assert_eq!(ask_tcp(addr(BACKENDS6[1])).unwrap(), addr(BACKENDS6[1]));
    });
}

#[test]
fn connected_udp_keeps_its_backend_and_sees_the_vip() {
    isolated("connected_udp_keeps_its_backend_and_sees_the_vip", |cgroup| {
        let mut datapath = as_pod(cgroup);
        datapath.frontend(addr(VIP), UDP, &Spec::pick_all(1, &addrs(&BACKENDS)));
        datapath.frontend(addr(VIP6), UDP, &Spec::pick_all(2, &addrs(&BACKENDS6)));
        for (bind, vip) in SPELT {
            let socket = udp(bind);
            socket.connect(addr(vip)).unwrap();
            assert_eq!(socket.peer_addr().unwrap(), addr(vip));
            socket.send(b"?").unwrap();
            let (first, shown) = answer(&socket).unwrap();
            assert_eq!(shown, addr(vip), "source of the answer");
            for _ in 0..10 {
                socket.send(b"?").unwrap();
                assert_eq!(answer(&socket).unwrap(), (first, addr(vip)));
                // The same with the VIP spelt out: the socket hears no other backend.
                assert_eq!(ask(&socket, addr(vip)).unwrap(), (first, addr(vip)));
            }
        }
    });
}

#[test]
fn unconnected_udp_is_answered_by_the_vip_and_sticks() {
    isolated("unconnected_udp_is_answered_by_the_vip_and_sticks", |cgroup| {
        let mut datapath = as_pod(cgroup);
        datapath.frontend(addr(VIP), UDP, &Spec::pick_all(1, &addrs(&BACKENDS)));
        datapath.frontend(addr(VIP6), UDP, &Spec::pick_all(2, &addrs(&BACKENDS6)));
        for (bind, vip) in SPELT {
            let mut seen = std::collections::BTreeSet::new();
            for _ in 0..20 {
                let socket = udp(bind);
                let (first, shown) = ask(&socket, addr(vip)).unwrap();
                assert_eq!(shown, addr(vip));
                seen.insert(first);
                for _ in 0..5 {
                    assert_eq!(ask(&socket, addr(vip)).unwrap(), (first, addr(vip)), "contract A45");
                }
            }
            assert!(seen.len() > 1, "twenty sockets, one backend: {seen:?}");
        }
    });
}

/// A pick that is not taken, since answers of it would be ambiguous, is no connection and moves no cursor.
#[test]
fn picks_that_are_not_taken_are_not_counted() {
    isolated("picks_that_are_not_taken_are_not_counted", |cgroup| {
        let mut datapath = as_pod(cgroup);
        let mut cpus = nix::sched::CpuSet::new();
        cpus.set(0).unwrap();
        nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &cpus).unwrap();
        let all = addrs(&BACKENDS);
        for (service, vip) in [(1, VIP), (2, VIP_B)] {
            let spec = Spec { algorithm: algorithm::ROUND_ROBIN, ..Spec::pick_all(service, &all) };
            datapath.frontend(addr(vip), UDP, &spec);
        }
        let socket = udp("0.0.0.0:0");
        assert_eq!(ask(&socket, addr(VIP)).unwrap().0, all[0]);
        assert_eq!(ask(&socket, addr(VIP_B)).unwrap().0, all[1], "the first would be ambiguous");
        let order = [(); 3].map(|()| ask(&udp("0.0.0.0:0"), addr(VIP_B)).unwrap().0);
        assert_eq!(order, [all[1], all[2], all[0]]);
        let counters: aya::maps::PerCpuHashMap<_, u32, ServiceCounters> =
            datapath.ebpf.map("service_counters").unwrap().try_into().unwrap();
        let connections: u64 = counters.get(&2, 0).unwrap().iter().map(|c| c.connections).sum();
        assert_eq!(connections, 4);
    });
}

#[test]
fn an_evicted_reply_entry_is_put_back() {
    isolated("an_evicted_reply_entry_is_put_back", |cgroup| {
        let mut datapath = as_pod(cgroup);
        datapath.frontend(addr(VIP), UDP, &Spec::pick_all(1, &addrs(&BACKENDS[..1])));
        let socket = udp("0.0.0.0:0");
        ask(&socket, addr(VIP)).unwrap();
        let mut datagrams: HashMap<
            _,
            proxy_common::socket::DatagramKey<Ipv4Be>,
            proxy_common::socket::DatagramValue<Ipv4Be>,
        > = HashMap::try_from(datapath.ebpf.map_mut("datagrams_v4").unwrap()).unwrap();
        let reply = datagrams.keys().map(Result::unwrap).find(|k| k.direction == 1).unwrap();
        datagrams.remove(&reply).unwrap();
        assert_eq!(ask(&socket, addr(VIP)).unwrap().1, addr(VIP));

        // One that was overwritten by another key's value is not believed, and made again.
        let mut value = datagrams.get(&reply, 0).unwrap();
        value.addr = Ipv4Be::from_octets([10, 96, 9, 9]);
        datagrams.insert(reply, value, 0).unwrap();
        assert_eq!(ask(&socket, addr(VIP)).unwrap().1, addr(VIP));
        assert_eq!(datapath.reason(Reason::TornRead), 1);
    });
}

#[test]
fn two_vips_of_one_set_are_told_apart() {
    isolated("two_vips_of_one_set_are_told_apart", |cgroup| {
        let mut datapath = as_pod(cgroup);
        let all = addrs(&BACKENDS);
        datapath.frontend(addr(VIP), UDP, &Spec::pick_all(1, &all));
        datapath.frontend(addr(VIP_B), UDP, &Spec::pick_all(2, &all));
        let mut ambiguous = 0;
        for _ in 0..50 {
            let socket = udp("0.0.0.0:0");
            let (one, _) = ask(&socket, addr(VIP)).unwrap();
            let (two, _) = ask(&socket, addr(VIP_B)).unwrap();
            ambiguous += usize::from(one == two);
            // In turns, each answer shows the VIP that was asked, even on one backend.
            for vip in [VIP, VIP_B, VIP] {
                assert_eq!(ask(&socket, addr(vip)).unwrap().1, addr(vip));
            }
        }
        // Two more picks of three backends: 1/27 of the sockets, not 1/3.
        assert!(ambiguous < 10, "{ambiguous} of 50 share a backend");

        // A VIP, then one of its backends by name: the answer is the backend's own.
        let socket = udp("0.0.0.0:0");
        let (backend, _) = ask(&socket, addr(VIP)).unwrap();
        assert_eq!(ask(&socket, backend).unwrap(), (backend, backend));
        assert_eq!(ask(&socket, addr(VIP)).unwrap(), (backend, addr(VIP)));
    });
}

#[test]
fn a_stale_record_is_not_believed() {
    isolated("a_stale_record_is_not_believed", |cgroup| {
        let mut datapath = as_pod(cgroup);
        datapath.frontend(addr(VIP), UDP, &Spec::pick_all(1, &addrs(&BACKENDS[..1])));
        datapath.frontend(addr(VIP_B), UDP, &Spec::pick_all(2, &addrs(&BACKENDS[1..2])));
        let backend = addr(BACKENDS[0]);
        let socket = udp("0.0.0.0:0");
        socket.connect(addr(VIP)).unwrap();
        assert_eq!(socket.peer_addr().unwrap(), addr(VIP));

        // Straight to the backend.
        socket.connect(backend).unwrap();
        assert_eq!(socket.peer_addr().unwrap(), backend);
        socket.send(b"?").unwrap();
        assert_eq!(answer(&socket).unwrap(), (backend, backend));

        // To another VIP.
        socket.connect(addr(VIP)).unwrap();
        socket.connect(addr(VIP_B)).unwrap();
        assert_eq!(socket.peer_addr().unwrap(), addr(VIP_B));
        socket.send(b"?").unwrap();
        assert_eq!(answer(&socket).unwrap(), (addr(BACKENDS[1]), addr(VIP_B)));

        // Dissolved (which no program sees), then straight to the backend without connecting.
        socket.connect(addr(VIP)).unwrap();
        dissolve(&socket);
        assert_eq!(socket.peer_addr().unwrap_err().kind(), ErrorKind::NotConnected);
        assert_eq!(ask(&socket, backend).unwrap(), (backend, backend));
        assert_eq!(ask(&socket, addr(VIP)).unwrap(), (backend, addr(VIP)));

        // A refused connect leaves the socket as it was: connected to the VIP it had.
        socket.connect(addr(VIP)).unwrap();
        datapath.guard(addr("10.96.0.9:1").ip(), 3);
        assert_eq!(socket.connect(addr("10.96.0.9:1")).unwrap_err().kind(), ErrorKind::ConnectionRefused);
        assert_eq!(socket.peer_addr().unwrap(), addr(VIP));
    });
}

#[test]
fn nobody_to_serve_is_refused() {
    isolated("nobody_to_serve_is_refused", |cgroup| {
        let mut datapath = as_pod(cgroup);
        let none = Spec { verdicts: [verdict::REJECT; 3], ..Spec::pick_all(7, &[]) };
        for (vip, guard) in [(VIP, "10.96.0.1:81"), (VIP6, "[fd00:10:96::1]:81")] {
            datapath.frontend(addr(vip), TCP, &none);
            datapath.guard(addr(vip).ip(), 8);
            // No endpoint, an unused port (contract A48), the right port of another protocol (A47).
            assert_eq!(ask_tcp(addr(vip)).unwrap_err().kind(), ErrorKind::ConnectionRefused);
            assert_eq!(ask_tcp(addr(guard)).unwrap_err().kind(), ErrorKind::ConnectionRefused);
            let socket = udp(if addr(vip).is_ipv4() { "0.0.0.0:0" } else { "[::]:0" });
            assert_eq!(socket.send_to(b"?", addr(vip)).unwrap_err().kind(), ErrorKind::ConnectionRefused);
            assert_eq!(socket.connect(addr(vip)).unwrap_err().kind(), ErrorKind::ConnectionRefused);
        }
        let socket = udp("[::]:0");
        let mapped = addr("[::ffff:10.96.0.1]:80");
        assert_eq!(socket.send_to(b"?", mapped).unwrap_err().kind(), ErrorKind::ConnectionRefused);
        assert_eq!(ask_tcp(mapped).unwrap_err().kind(), ErrorKind::ConnectionRefused);
        assert_eq!(datapath.reason(Reason::Rejected), 10);
        let counters: aya::maps::PerCpuHashMap<_, u32, ServiceCounters> =
            aya::maps::PerCpuHashMap::try_from(datapath.ebpf.map("service_counters").unwrap()).unwrap();
        let refused = |service: u32| counters.get(&service, 0).unwrap().iter().map(|c| c.refused).sum::<u64>();
        assert_eq!((refused(7), refused(8)), (3, 7));
    });
}

#[test]
fn a_drop_depends_on_the_origin() {
    isolated("a_drop_depends_on_the_origin", |cgroup| {
        let dropped = Spec { verdicts: [verdict::DROP; 3], ..Spec::pick_all(1, &addrs(&BACKENDS)) };
        {
            let mut datapath = as_node(cgroup);
            datapath.frontend(addr(VIP), TCP, &dropped);
            datapath.frontend(addr(VIP), UDP, &dropped);
            assert_eq!(ask_tcp(addr(VIP)).unwrap_err().raw_os_error(), Some(nix::libc::ETIMEDOUT));
            let socket = udp("0.0.0.0:0");
            assert_eq!(socket.connect(addr(VIP)).unwrap_err().raw_os_error(), Some(nix::libc::EPERM));
            assert_eq!(socket.send_to(b"?", addr(VIP)).unwrap_err().raw_os_error(), Some(nix::libc::EPERM));
            assert_eq!(datapath.reason(Reason::PolicyDrop), 3);
        }
        // A pod's packets go on to the per-packet path, untranslated: to show it, the VIP is an address here.
        let mut datapath = as_pod(cgroup);
        datapath.frontend(addr(VIP), TCP, &dropped);
        datapath.frontend(addr(VIP), UDP, &dropped);
        ip("addr add 10.96.0.1/32 dev lo");
        serve(addr(VIP));
        assert_eq!(ask_tcp(addr(VIP)).unwrap(), addr(VIP));
        assert_eq!(ask(&udp("0.0.0.0:0"), addr(VIP)).unwrap(), (addr(VIP), addr(VIP)));

        // Verdicts are read for the right origin.
        let per_origin = Spec {
            verdicts: [verdict::PICK_LOCAL, verdict::REJECT, verdict::DROP],
            local: addrs(&BACKENDS[2..]),
            ..Spec::pick_all(1, &addrs(&BACKENDS[..2]))
        };
        datapath.frontend(addr(VIP), TCP, &per_origin);
        assert_eq!(ask_tcp(addr(VIP)).unwrap(), addr(BACKENDS[2]));
        drop(datapath);
        let mut datapath = as_node(cgroup);
        datapath.frontend(addr(VIP), TCP, &per_origin);
        assert_eq!(ask_tcp(addr(VIP)).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    });
}

/// Contract A91: only a packet tells whether its sender is in a range. What the node sends itself was decided by its verdict.
#[test]
fn source_ranges_leave_pods_to_their_packets() {
    isolated("source_ranges_leave_pods_to_their_packets", |cgroup| {
        // Untranslated, the VIP is an address here.
        ip("addr add 10.96.0.1/32 dev lo");
        serve(addr(VIP));
        let spec = Spec { flags: flags::HAS_SOURCE_RANGES, ..Spec::pick_all(1, &addrs(&BACKENDS)) };
        for (load, translated) in [(as_pod as fn(&fs::File) -> Datapath, false), (as_node, true)] {
            let mut datapath = load(cgroup);
            datapath.frontend(addr(VIP), TCP, &spec);
            datapath.frontend(addr(VIP), UDP, &spec);
            assert_eq!(ask_tcp(addr(VIP)).unwrap() != addr(VIP), translated);
            let (who, shown) = ask(&udp("0.0.0.0:0"), addr(VIP)).unwrap();
            assert_eq!((who != addr(VIP), shown), (translated, addr(VIP)));
            let connected = udp("0.0.0.0:0");
            connected.connect(addr(VIP)).unwrap();
            connected.send(b"?").unwrap();
            let (who, shown) = answer(&connected).unwrap();
            assert_eq!((who != addr(VIP), shown), (translated, addr(VIP)));
        }
    });
}

/// A Service may ask for it; a verdict to refuse or drop is then carried out on its packets, too.
#[test]
fn a_frontend_may_leave_pods_to_their_packets() {
    isolated("a_frontend_may_leave_pods_to_their_packets", |cgroup| {
        let flags = flags::PODS_PER_PACKET;
        let put = |datapath: &mut Datapath, refusal: Option<u8>| {
            for (vip, backends) in [(VIP, &BACKENDS[..]), (VIP6, &BACKENDS6)] {
                let spec = Spec { flags, ..Spec::pick_all(1, &addrs(backends)) };
                let spec = refusal.map_or(spec.clone(), |verdict| Spec { verdicts: [verdict; 3], ..spec });
                for proto in [TCP, UDP] {
                    datapath.frontend(addr(vip), proto, &spec);
                }
            }
        };
        ip("addr add 10.96.0.1/32 dev lo");
        ip("-6 addr add fd00:10:96::1/128 dev lo nodad");
        serve(addr(VIP));
        serve(addr(VIP6));
        for refusal in [None, Some(verdict::REJECT), Some(verdict::DROP)] {
            let mut datapath = as_pod(cgroup);
            put(&mut datapath, refusal);
            for (bind, vip) in SPELT {
                let itself = addr(if vip == VIP6 { VIP6 } else { VIP });
                assert_eq!(ask_tcp(addr(vip)).unwrap(), itself);
                assert_eq!(ask(&udp(bind), addr(vip)).unwrap(), (itself, addr(vip)));
                let connected = udp(bind);
                connected.connect(addr(vip)).unwrap();
                connected.send(b"?").unwrap();
                assert_eq!(answer(&connected).unwrap(), (itself, addr(vip)));
            }
            drop(datapath);

            // The node's own sockets have no other way.
            let mut datapath = as_node(cgroup);
            put(&mut datapath, refusal);
            for (bind, vip) in SPELT {
                let itself = addr(if vip == VIP6 { VIP6 } else { VIP });
                let vip = addr(vip);
                let connected = udp(bind);
                let refused = match refusal {
                    None => {
                        assert_ne!(ask_tcp(vip).unwrap(), itself);
                        assert_ne!(ask(&udp(bind), vip).unwrap().0, itself);
                        connected.connect(vip).unwrap();
                        connected.send(b"?").unwrap();
                        assert_ne!(answer(&connected).unwrap().0, itself);
                        continue;
                    }
                    Some(verdict::DROP) => [ErrorKind::TimedOut, ErrorKind::PermissionDenied],
                    Some(_) => [ErrorKind::ConnectionRefused; 2],
                };
                let errors = [ask_tcp(vip).unwrap_err(), connected.connect(vip).unwrap_err()];
                assert_eq!(errors.map(|error| error.kind()), refused, "{vip}");
                assert_eq!(ask(&udp(bind), vip).unwrap_err().kind(), refused[1], "{vip}");
            }
        }
    });
}

#[test]
fn node_scope_leaves_pods_alone() {
    isolated("node_scope_leaves_pods_alone", |cgroup| {
        let spec = Spec::pick_all(1, &addrs(&BACKENDS));
        ip("addr add 10.96.0.1/32 dev lo");
        serve(addr(VIP));
        for (cookie, translated) in [(netns_cookie(), true), (netns_cookie() + 1, false)] {
            let mut datapath = load(cgroup, socket_lb::NODE, cookie);
            datapath.frontend(addr(VIP), TCP, &spec);
            datapath.frontend(addr(VIP), UDP, &spec);
            assert_eq!(ask_tcp(addr(VIP)).unwrap() != addr(VIP), translated);
            let (who, shown) = ask(&udp("0.0.0.0:0"), addr(VIP)).unwrap();
            assert_eq!((who != addr(VIP), shown), (translated, addr(VIP)));
        }
    });
}

#[test]
fn backends_get_their_share() {
    isolated("backends_get_their_share", |cgroup| {
        let mut datapath = as_pod(cgroup);
        let all = addrs(&BACKENDS);
        let count = |n: usize| {
            let mut counts = [0_usize; 3];
            for _ in 0..n {
                let who = ask_tcp(addr(VIP)).unwrap();
                counts[all.iter().position(|b| *b == who).unwrap()] += 1;
            }
            counts
        };
        // 600 picks of one in three: 200 each, standard deviation 11.5.
        datapath.frontend(addr(VIP), TCP, &Spec::pick_all(1, &all));
        let counts = count(600);
        assert!(counts.iter().all(|c| (140..260).contains(c)), "random: {counts:?}");

        // Round robin walks per CPU: on one CPU it is exact.
        let mut cpus = nix::sched::CpuSet::new();
        cpus.set(0).unwrap();
        nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &cpus).unwrap();
        datapath.frontend(addr(VIP), TCP, &Spec { algorithm: algorithm::ROUND_ROBIN, ..Spec::pick_all(2, &all) });
        assert_eq!(count(300), [100; 3]);

        // Maglev: a connection has no port yet to be told by, so it is one at random; with affinity the pod is.
        let maglev = Spec { algorithm: algorithm::MAGLEV, ..Spec::pick_all(3, &all) };
        for tables in [true, false] {
            datapath.frontend(addr(VIP), TCP, &Spec { tables, ..maglev.clone() });
            let counts = count(600);
            assert!(counts.iter().all(|c| (140..260).contains(c)), "Maglev: {counts:?}");
        }
        datapath.frontend(addr(VIP), TCP, &Spec { affinity_secs: 60, ..maglev });
        assert!(count(30).contains(&30));
    });
}

#[test]
fn a_value_that_is_not_whole_is_refused_and_counted() {
    isolated("a_value_that_is_not_whole_is_refused_and_counted", |cgroup| {
        let mut datapath = as_pod(cgroup);
        datapath.frontend(addr(VIP), TCP, &Spec::pick_all(1, &addrs(&BACKENDS)));
        let key = FrontendKey::new(Ipv4Be::from_octets([10, 96, 0, 1]), Be16::from_host(80), TCP);
        let good = datapath.frontends::<Ipv4Be>().get(&key, 0).unwrap();
        let torn = proxy_common::frontend::FrontendValue { all_count: 1, ..good };
        datapath.frontends::<Ipv4Be>().insert(key, torn, 0).unwrap();
        assert_eq!(ask_tcp(addr(VIP)).unwrap_err().kind(), ErrorKind::ConnectionRefused);
        assert_eq!((datapath.reason(Reason::TornRead), datapath.reason(Reason::TornTwice)), (1, 1));

        // A range whose slots belong to somebody else by now.
        let stale = proxy_common::frontend::FrontendValue { all_generation: 2, ..good }.sealed(&key);
        datapath.frontends::<Ipv4Be>().insert(key, stale, 0).unwrap();
        assert_eq!(ask_tcp(addr(VIP)).unwrap_err().kind(), ErrorKind::ConnectionRefused);
        assert_eq!(datapath.reason(Reason::StaleSlot), 2);

        datapath.frontends::<Ipv4Be>().insert(key, good, 0).unwrap();
        ask_tcp(addr(VIP)).unwrap();
    });
}

#[test]
fn the_verifier_has_little_to_do() {
    isolated("the_verifier_has_little_to_do", |cgroup| {
        let datapath = as_pod(cgroup);
        for name in support::CONNECT_TIME {
            let program: &aya::programs::CgroupSockAddr = datapath.ebpf.program(name).unwrap().try_into().unwrap();
            let count = program.info().unwrap().verified_instruction_count();
            println!("{name}: {count:?} instructions verified");
            // Its limit is a million; older kernels prune less.
            assert!(count.is_none_or(|count| count < 100_000), "{name}: {count:?}");
        }
    });
}

#[test]
fn other_protocols_pass() {
    isolated("other_protocols_pass", |cgroup| {
        let mut datapath = as_pod(cgroup);
        datapath.guard(addr(BACKENDS[0]).ip(), 1);
        // A ping socket connects with the same hook.
        fs::write("/proc/sys/net/ipv4/ping_group_range", "0 0").unwrap();
        let socket = nix::sys::socket::socket(
            nix::sys::socket::AddressFamily::Inet,
            nix::sys::socket::SockType::Datagram,
            nix::sys::socket::SockFlag::empty(),
            nix::sys::socket::SockProtocol::Icmp,
        )
        .unwrap();
        let IpAddr::V4(ip) = addr(BACKENDS[0]).ip() else { unreachable!() };
        let to = nix::sys::socket::SockaddrIn::from(std::net::SocketAddrV4::new(ip, 0));
        nix::sys::socket::connect(socket.as_raw_fd(), &to).unwrap();
        assert_eq!(ask_tcp(addr(BACKENDS[0])).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    });
}
