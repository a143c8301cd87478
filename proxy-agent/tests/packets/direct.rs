//! Connections of a pod's own, which the programs never saw: a Service flow to the same backend stays out of their way.

use std::{
    fs,
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::OwnedFd,
    process::{Child, Command},
    thread,
    time::Duration,
};

use nix::sched::{CloneFlags, setns};
use proxy_common::{counters::Reason, device::role};

use super::{
    packet::Packet,
    world::{Cast, Hook, Options, TCP, UDP, at, casts, world},
};

/// A pod: a network namespace on the other end of a veth, with the addresses of client and backend on its loopback device, so that both ends of
/// its connections are sockets there.
struct Pod(Child);

impl Pod {
    fn new() -> Self {
        let child = Command::new("unshare").args(["--net", "sleep", "60"]).spawn().unwrap();
        let pod = Self(child);
        let own = fs::read_link("/proc/thread-self/ns/net").unwrap();
        while fs::read_link(pod.path()).map_or(true, |ns| ns == own) {
            thread::sleep(Duration::from_millis(5));
        }
        sh(&format!("ip link add pod1 type veth peer name eth0 netns {}", pod.0.id()));
        pod.inside(|| {
            sh("ip link set lo up");
            for cast in casts() {
                for end in [cast.client, cast.backend] {
                    sh(&format!("ip addr add {} dev lo {}", end.ip(), if cast.v6 { "nodad" } else { "" }));
                }
            }
        });
        pod
    }

    fn path(&self) -> String {
        format!("/proc/{}/ns/net", self.0.id())
    }

    /// Number of the pod's namespace, as this thread's namespace has it.
    fn number(&self) -> u16 {
        let shown = Command::new("ip").args(["-o", "link", "show", "pod1"]).output().unwrap();
        let shown = String::from_utf8(shown.stdout).unwrap();
        let mut words = shown.split_whitespace().skip_while(|word| *word != "link-netnsid");
        words.nth(1).unwrap_or_else(|| panic!("{shown}")).parse().unwrap()
    }

    fn inside<T: Send>(&self, run: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                setns(fs::File::open(self.path()).unwrap(), CloneFlags::CLONE_NEWNET).unwrap();
                run()
            });
            inside.join().unwrap()
        })
    }

    /// A socket connected from the client's port to the backend; over TCP with its other end.
    fn connect(&self, proto: u8, client: SocketAddr, backend: SocketAddr) -> Vec<OwnedFd> {
        self.inside(|| {
            if proto != TCP {
                let socket = UdpSocket::bind(client).unwrap();
                socket.connect(backend).unwrap();
                return vec![socket.into()];
            }
            let listener = TcpListener::bind(backend).unwrap();
            let stream = bound_stream(client, backend);
            let (accepted, peer) = listener.accept().unwrap();
            assert_eq!(peer, client);
            vec![stream.into(), accepted.into(), listener.into()]
        })
    }

    /// A socket on the client's port that is not connected to anything.
    fn listen(&self, proto: u8, client: SocketAddr) -> OwnedFd {
        self.inside(|| {
            if proto == TCP {
                TcpListener::bind(client).unwrap().into()
            } else {
                UdpSocket::bind(client).unwrap().into()
            }
        })
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn bound_stream(from: SocketAddr, to: SocketAddr) -> TcpStream {
    use nix::sys::socket::{
        AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, setsockopt, socket, sockopt,
    };
    use std::os::fd::AsRawFd as _;
    let family = if from.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let fd = socket(family, SockType::Stream, SockFlag::empty(), None).unwrap();
    setsockopt(&fd, sockopt::ReuseAddr, &true).unwrap();
    bind(fd.as_raw_fd(), &SockaddrStorage::from(from)).unwrap();
    connect(fd.as_raw_fd(), &SockaddrStorage::from(to)).unwrap();
    fd.into()
}

fn sh(command: &str) {
    let output = Command::new("sh").args(["-c", command]).output().unwrap();
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Whether a new flow from `client` to the VIP keeps its source port.
#[track_caller]
fn keeps_its_port(world: &mut super::world::World, proto: u8, cast: &Cast, client: SocketAddr) -> bool {
    let (seen, backend) = world.translate(Hook::Ingress, &Packet::opening(proto, client, cast.vip));
    assert_eq!((seen.ip(), backend), (client.ip(), cast.backend));
    let answer = Packet::answer(proto, backend, seen);
    world.expect(Hook::Egress, &answer, &answer.between(cast.vip, client));
    seen == client
}

#[test]
fn a_flow_after_a_direct_connection_of_its_tuple_gets_another_port() {
    let Some(mut world) = world("a_flow_after_a_direct_connection_of_its_tuple_gets_another_port", Options::default())
    else {
        return;
    };
    let pod = Pod::new();
    world.pod_device(pod.number());
    let mut remapped = 0;
    for cast in casts() {
        world.service(1, cast.vip, &[cast.backend]);
        for (n, proto) in [TCP, UDP].into_iter().enumerate() {
            let client = at(cast.client, 46_000 + n as u16);
            let held = pod.connect(proto, client, cast.backend);
            // Another port: nothing in the way.
            assert!(keeps_its_port(&mut world, proto, &cast, at(client, 47_000)));
            assert!(!keeps_its_port(&mut world, proto, &cast, client));
            remapped += 1;
            assert_eq!(world.reason(Reason::PortRemapped), remapped);
            // Neither direction of the direct one is touched.
            let direct = Packet::more(proto, client, cast.backend);
            world.untouched(Hook::Ingress, &direct.frame());
            world.untouched(Hook::Egress, &direct.between(cast.backend, client).frame());
            world.remove(|_| true);
            // What comes from elsewhere has no socket here.
            world.device(role::POD);
            assert!(keeps_its_port(&mut world, proto, &cast, client));
            world.remove(|_| true);
            world.pod_device(pod.number());
            // A number that no namespace has.
            world.pod_device(pod.number() + 100);
            assert!(keeps_its_port(&mut world, proto, &cast, client));
            world.remove(|_| true);
            world.pod_device(pod.number());

            // Closed: over TCP the client's end waits for what is still about.
            drop(held);
            assert_eq!(keeps_its_port(&mut world, proto, &cast, client), proto != TCP, "closed: {proto}");
            remapped += u64::from(proto == TCP);
            world.remove(|_| true);
            if proto == TCP {
                let client = at(client, 49_000);
                let held = pod.connect(proto, client, cast.backend);
                for end in &held {
                    let off = nix::libc::linger { l_onoff: 1, l_linger: 0 };
                    nix::sys::socket::setsockopt(end, nix::sys::socket::sockopt::Linger, &off).unwrap();
                }
                drop(held);
                assert!(keeps_its_port(&mut world, proto, &cast, client), "reset");
                world.remove(|_| true);
            }
            // Bound, listening: could be anybody's, and leads nowhere.
            let held = pod.listen(proto, at(client, 48_000));
            assert!(keeps_its_port(&mut world, proto, &cast, at(client, 48_000)));
            drop(held);
            world.remove(|_| true);
        }
    }
    assert_eq!(world.reasons(), [(Reason::PortRemapped.name(), remapped)]);
}
