//! Session affinity at connect time (contract A9): a client is a network namespace.

use std::{
    fs,
    net::{SocketAddr, UdpSocket},
    thread,
    time::Duration,
};

use aya::maps::{HashMap, MapData};
use proxy_common::{
    Address, Be16, Ipv4Be, Ipv6Be,
    affinity::{AffinityKey, AffinityValue},
    counters::{Reason, ServiceCounters},
    frontend::{algorithm, origin, verdict},
    proto::{TCP, UDP},
};

use super::{
    BACKENDS, BACKENDS6, VIP, VIP_B, VIP6, addr, addrs, answer, as_node, as_pod, ask, ask_tcp, ip, isolated, serve,
    support::{Datapath, Spec, netns_cookie},
    udp,
};

const TIMEOUT: u32 = 60;
const MAPPED: &str = "[::ffff:10.96.0.1]:80";

/// By turns, so that whoever is not remembered is sent to a backend that the test can tell.
fn sticky(service: u32, all: &[SocketAddr]) -> Spec {
    Spec { algorithm: algorithm::ROUND_ROBIN, affinity_secs: TIMEOUT, ..Spec::pick_all(service, all) }
}

fn not_sticky(service: u32, all: &[SocketAddr]) -> Spec {
    Spec { affinity_secs: 0, ..sticky(service, all) }
}

/// Turns are counted per CPU.
fn on_one_cpu() {
    let mut cpus = nix::sched::CpuSet::new();
    cpus.set(0).unwrap();
    nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &cpus).unwrap();
}

/// How a new connection is made.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Way {
    Tcp,
    Connected,
    Unconnected,
}

impl Way {
    const ALL: [Self; 3] = [Self::Tcp, Self::Connected, Self::Unconnected];

    fn proto(self) -> u8 {
        if self == Self::Tcp { TCP } else { UDP }
    }

    /// Who answers a new socket.
    #[track_caller]
    fn open(self, vip: SocketAddr) -> SocketAddr {
        match self {
            Self::Tcp => ask_tcp(vip).unwrap(),
            Self::Connected => {
                let socket = connected(vip);
                socket.send(b"?").unwrap();
                let (who, shown) = answer(&socket).unwrap();
                assert_eq!(shown, vip);
                who
            }
            Self::Unconnected => {
                let (who, shown) = ask(&unconnected(vip), vip).unwrap();
                assert_eq!(shown, vip);
                who
            }
        }
    }
}

fn unconnected(vip: SocketAddr) -> UdpSocket {
    udp(if vip.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })
}

fn connected(vip: SocketAddr) -> UdpSocket {
    let socket = unconnected(vip);
    socket.connect(vip).unwrap();
    socket
}

/// Runs a case for each way to connect, every time with another service id; all on one CPU.
fn each_way(cgroup: &fs::File, case: impl Fn(&mut Datapath, Way, u32)) {
    on_one_cpu();
    let mut datapath = as_pod(cgroup);
    for (way, service) in Way::ALL.into_iter().zip([10, 20, 30]) {
        case(&mut datapath, way, service);
    }
}

fn map<A: Address>(datapath: &mut Datapath) -> HashMap<&mut MapData, AffinityKey, AffinityValue<A>>
where
    AffinityValue<A>: aya::Pod,
{
    let name = if A::LEN == 4 { "affinity_v4" } else { "affinity_v6" };
    HashMap::try_from(datapath.ebpf.map_mut(name).unwrap()).unwrap()
}

/// As if the last connections of every IPv4 client were `seconds` ago.
fn age(datapath: &mut Datapath, seconds: u32) {
    let mut map = map::<Ipv4Be>(datapath);
    let entries: Vec<_> = map.iter().map(Result::unwrap).collect();
    for (key, value) in entries {
        map.insert(key, AffinityValue { seen: value.seen.wrapping_sub(seconds), ..value }, 0).unwrap();
    }
}

/// Runs `f` in another network namespace, with the same backends: another client.
fn elsewhere<T: Send>(f: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        let thread = scope.spawn(|| {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            ip("link set lo up");
            for backend in addrs(&BACKENDS) {
                ip(&format!("addr add {}/32 dev lo", backend.ip()));
                serve(backend);
            }
            f()
        });
        thread.join().unwrap()
    })
}

/// Contract A100: over each transport.
#[test]
fn a_pod_stays_where_it_was_sent() {
    isolated("affinity::a_pod_stays_where_it_was_sent", |cgroup| {
        each_way(cgroup, |datapath, way, service| {
            let all = addrs(&BACKENDS);
            datapath.frontend(addr(VIP), way.proto(), &sticky(service, &all));
            for _ in 0..20 {
                assert_eq!(way.open(addr(VIP)), all[0], "{way:?}");
                // An IPv4-mapped address on an IPv6 socket leads to the same frontend.
                assert_eq!(way.open(addr(MAPPED)), all[0], "{way:?}");
            }
            let counters: aya::maps::PerCpuHashMap<_, u32, ServiceCounters> =
                datapath.ebpf.map("service_counters").unwrap().try_into().unwrap();
            let connections: u64 = counters.get(&service, 0).unwrap().iter().map(|c| c.connections).sum();
            assert_eq!(connections, 40, "{way:?}: each counts once");
        });
    });
}

#[test]
fn families_are_remembered_apart() {
    isolated("affinity::families_are_remembered_apart", |cgroup| {
        each_way(cgroup, |datapath, way, service| {
            let (all, all6) = (addrs(&BACKENDS), addrs(&BACKENDS6));
            datapath.frontend(addr(VIP), way.proto(), &sticky(service, &all));
            datapath.frontend(addr(VIP6), way.proto(), &sticky(service, &all6));
            for _ in 0..5 {
                assert_eq!(way.open(addr(VIP)), all[0], "{way:?}");
                assert_eq!(way.open(addr(VIP6)), all6[1], "{way:?}: the second by turns, of two");
            }
        });
    });
}

#[test]
fn another_namespace_is_another_client() {
    isolated("affinity::another_namespace_is_another_client", |cgroup| {
        each_way(cgroup, |datapath, way, service| {
            let all = addrs(&BACKENDS);
            datapath.frontend(addr(VIP), way.proto(), &sticky(service, &all));
            assert_eq!(way.open(addr(VIP)), all[0]);
            elsewhere(|| {
                for _ in 0..5 {
                    assert_eq!(way.open(addr(VIP)), all[1], "{way:?}");
                }
            });
            assert_eq!(way.open(addr(VIP)), all[0], "{way:?}");
        });
    });
}

/// Contract A95, A97.
#[test]
fn frontends_of_a_port_share_and_ports_do_not() {
    isolated("affinity::frontends_of_a_port_share_and_ports_do_not", |cgroup| {
        each_way(cgroup, |datapath, way, service| {
            let all = addrs(&BACKENDS);
            let other_port = addr("10.96.0.1:81");
            datapath.frontend(addr(VIP), way.proto(), &sticky(service, &all));
            datapath.frontend(addr(VIP_B), way.proto(), &sticky(service, &all));
            datapath.frontend(other_port, way.proto(), &not_sticky(service + 1, &all));
            // So that it is the second one's turn there.
            assert_eq!(way.open(other_port), all[0]);
            datapath.frontend(other_port, way.proto(), &sticky(service + 1, &all));
            for _ in 0..3 {
                assert_eq!(way.open(addr(VIP)), all[0], "{way:?}");
                assert_eq!(way.open(other_port), all[1], "{way:?}");
                assert_eq!(way.open(addr(VIP_B)), all[0], "{way:?}");
            }
        });
    });
}

/// Contract A96, A101.
#[test]
fn time_runs_out_from_the_last_new_connection() {
    isolated("affinity::time_runs_out_from_the_last_new_connection", |cgroup| {
        each_way(cgroup, |datapath, way, service| {
            let all = addrs(&BACKENDS);
            datapath.frontend(addr(VIP), way.proto(), &sticky(service, &all));
            assert_eq!(way.open(addr(VIP)), all[0]);
            for _ in 0..4 {
                age(datapath, TIMEOUT - 5);
                assert_eq!(way.open(addr(VIP)), all[0], "{way:?}: put off");
            }
            // The second by turns; remembered anew.
            age(datapath, TIMEOUT + 5);
            for _ in 0..3 {
                assert_eq!(way.open(addr(VIP)), all[1], "{way:?}");
            }
        });
    });
}

/// Datagrams of a flow that there is are no new connection; they stay where they are all the same.
#[test]
fn datagrams_of_a_socket_put_nothing_off() {
    isolated("affinity::datagrams_of_a_socket_put_nothing_off", |cgroup| {
        on_one_cpu();
        let mut datapath = as_pod(cgroup);
        let all = addrs(&BACKENDS);
        datapath.frontend(addr(VIP), UDP, &sticky(1, &all));
        let (open, fixed) = (unconnected(addr(VIP)), connected(addr(VIP)));
        let talk = || {
            assert_eq!(ask(&open, addr(VIP)).unwrap(), (all[0], addr(VIP)));
            fixed.send(b"?").unwrap();
            assert_eq!(answer(&fixed).unwrap(), (all[0], addr(VIP)));
        };
        talk();
        age(&mut datapath, TIMEOUT - 5);
        talk();
        age(&mut datapath, 10);
        talk();
        assert_eq!(Way::Unconnected.open(addr(VIP)), all[1], "the second by turns");
        talk();
    });
}

/// By the programs' own clock.
#[test]
fn a_second_is_a_second() {
    isolated("affinity::a_second_is_a_second", |cgroup| {
        on_one_cpu();
        let mut datapath = as_pod(cgroup);
        let all = addrs(&BACKENDS);
        datapath.frontend(addr(VIP), TCP, &Spec { affinity_secs: 2, ..sticky(1, &all) });
        for _ in 0..5 {
            assert_eq!(ask_tcp(addr(VIP)).unwrap(), all[0]);
            thread::sleep(Duration::from_millis(700));
        }
        thread::sleep(Duration::from_millis(2600));
        assert_eq!(ask_tcp(addr(VIP)).unwrap(), all[1]);
    });
}

/// Contract A98.
#[test]
fn a_backend_that_may_not_be_chosen_is_forgotten() {
    isolated("affinity::a_backend_that_may_not_be_chosen_is_forgotten", |cgroup| {
        each_way(cgroup, |datapath, way, service| {
            let all = addrs(&BACKENDS);
            datapath.frontend(addr(VIP), way.proto(), &sticky(service, &all));
            assert_eq!(way.open(addr(VIP)), all[0]);
            datapath.frontend(addr(VIP), way.proto(), &sticky(service, &all[1..]));
            let second = way.open(addr(VIP));
            assert_eq!(second, all[2], "{way:?}: the second by turns, of two");
            datapath.frontend(addr(VIP), way.proto(), &sticky(service, &all));
            for _ in 0..5 {
                assert_eq!(way.open(addr(VIP)), second, "{way:?}: and not back");
            }
            // Eligible is what this origin's verdict picks from.
            let near = *all.iter().find(|backend| **backend != second).unwrap();
            let local =
                Spec { verdicts: [verdict::PICK_LOCAL; origin::COUNT], local: vec![near], ..sticky(service, &all) };
            datapath.frontend(addr(VIP), way.proto(), &local);
            assert_eq!(way.open(addr(VIP)), near, "{way:?}");
            datapath.frontend(addr(VIP), way.proto(), &sticky(service, &all));
            assert_eq!(way.open(addr(VIP)), near, "{way:?}: remembered anew");
        });
    });
}

/// Contract A98 for a socket that has a backend of its own already: what it is sent to next is what everybody else is.
#[test]
fn a_socket_whose_backend_goes_follows_its_pod() {
    isolated("affinity::a_socket_whose_backend_goes_follows_its_pod", |cgroup| {
        on_one_cpu();
        let mut datapath = as_pod(cgroup);
        let all = addrs(&BACKENDS);
        datapath.frontend(addr(VIP), UDP, &sticky(1, &all));
        let socket = unconnected(addr(VIP));
        assert_eq!(ask(&socket, addr(VIP)).unwrap().0, all[0]);
        datapath.frontend(addr(VIP), UDP, &sticky(1, &all[1..]));
        super::datagrams::end(&mut datapath);
        let now = Way::Connected.open(addr(VIP));
        for _ in 0..3 {
            assert_eq!(ask(&socket, addr(VIP)).unwrap(), (now, addr(VIP)));
        }
    });
}

/// Contract A99.
#[test]
fn affinity_comes_and_goes_with_the_frontend() {
    isolated("affinity::affinity_comes_and_goes_with_the_frontend", |cgroup| {
        each_way(cgroup, |datapath, way, service| {
            let all = addrs(&BACKENDS);
            let held = map::<Ipv4Be>(datapath).keys().count();
            datapath.frontend(addr(VIP), way.proto(), &not_sticky(service, &all));
            let by_turns = || [(); 3].map(|()| way.open(addr(VIP)));
            assert_eq!(by_turns(), all[..], "{way:?}");
            assert_eq!(map::<Ipv4Be>(datapath).keys().count(), held, "{way:?}: nobody is remembered");
            // One that goes on through it all.
            let first = unconnected(addr(VIP));
            let talks = way == Way::Unconnected;
            let stays = || !talks || ask(&first, addr(VIP)).unwrap() == (all[0], addr(VIP));
            assert!(stays());
            datapath.frontend(addr(VIP), way.proto(), &sticky(service, &all));
            let sent = all[usize::from(talks)];
            assert_eq!(by_turns(), [sent; 3], "{way:?}");
            assert!(stays());
            datapath.frontend(addr(VIP), way.proto(), &not_sticky(service, &all));
            let again = by_turns();
            assert!(all.iter().all(|backend| again.contains(backend)), "{way:?}: {again:?}");
            assert!(stays());
        });
    });
}

/// Every pick would end at the same backend: the VIP that was written to last names the sender.
#[test]
fn two_sticky_vips_may_share_a_backend() {
    isolated("affinity::two_sticky_vips_may_share_a_backend", |cgroup| {
        on_one_cpu();
        let mut datapath = as_pod(cgroup);
        let all = addrs(&BACKENDS);
        datapath.frontend(addr(VIP), UDP, &sticky(1, &all));
        datapath.frontend(addr(VIP_B), UDP, &sticky(2, &all));
        let socket = unconnected(addr(VIP));
        for _ in 0..3 {
            for vip in [VIP, VIP_B] {
                assert_eq!(ask(&socket, addr(vip)).unwrap(), (all[0], addr(vip)));
            }
        }
    });
}

#[test]
fn the_node_is_a_client_of_its_own() {
    isolated("affinity::the_node_is_a_client_of_its_own", |cgroup| {
        on_one_cpu();
        let mut datapath = as_node(cgroup);
        let all = addrs(&BACKENDS);
        datapath.frontend(addr(VIP), TCP, &sticky(7, &all));
        datapath.frontend(addr(VIP6), TCP, &sticky(8, &addrs(&BACKENDS6)));
        for _ in 0..5 {
            assert_eq!(ask_tcp(addr(VIP)).unwrap(), all[0]);
        }
        ask_tcp(addr(VIP6)).unwrap();
        // What user space reads.
        let entries: Vec<_> = map::<Ipv4Be>(&mut datapath).iter().map(Result::unwrap).collect();
        let [(key, value)] = entries[..] else { panic!("{entries:?}") };
        assert_eq!(key, AffinityKey::of_netns(netns_cookie(), 7));
        assert!(value.is_sealed_for(&key));
        assert_eq!((value.addr.to_ip(), value.port), (all[0].ip(), Be16::from_host(all[0].port())));
        let keys: Vec<_> = map::<Ipv6Be>(&mut datapath).keys().map(Result::unwrap).collect();
        assert_eq!(keys, [AffinityKey::of_netns(netns_cookie(), 8)]);
    });
}

#[test]
fn an_entry_that_does_not_match_its_seal_is_none() {
    isolated("affinity::an_entry_that_does_not_match_its_seal_is_none", |cgroup| {
        on_one_cpu();
        let mut datapath = as_pod(cgroup);
        let all = addrs(&BACKENDS);
        datapath.frontend(addr(VIP), TCP, &sticky(1, &all));
        assert_eq!(ask_tcp(addr(VIP)).unwrap(), all[0]);
        let key = AffinityKey::of_netns(netns_cookie(), 1);
        let mut entries = map::<Ipv4Be>(&mut datapath);
        let value = entries.get(&key, 0).unwrap();
        entries.insert(key, AffinityValue { port: Be16::from_host(1), ..value }, 0).unwrap();
        assert_eq!(ask_tcp(addr(VIP)).unwrap(), all[1]);
        assert_eq!(datapath.reason(Reason::TornRead), 1);
        assert_eq!(ask_tcp(addr(VIP)).unwrap(), all[1]);
    });
}
