//! Which backend the later datagrams of an unconnected socket go to (contract A45, A104).

use std::{io::ErrorKind, net::SocketAddr};

use aya::maps::{HashMap, MapData};
use proxy_common::{
    Address, Ipv4Be, Ipv6Be,
    frontend::verdict,
    proto::UDP,
    socket::{DatagramKey, DatagramValue, direction},
};

use super::{
    BACKENDS, BACKENDS6, SPELT, VIP, VIP6, addr, addrs, as_pod, ask, isolated,
    support::{Datapath, Spec},
    udp,
};

/// Seconds after which a flow of datagrams is over.
const STREAM: u32 = 120;

/// Edits every entry, or removes those for which `edit` says so; how many there were.
fn edit(datapath: &mut Datapath, mut edit: impl FnMut(u8, &mut u32) -> bool) -> usize {
    fn go<A: Address>(datapath: &mut Datapath, edit: &mut dyn FnMut(u8, &mut u32) -> bool) -> usize
    where
        DatagramKey<A>: aya::Pod,
        DatagramValue<A>: aya::Pod,
    {
        let name = if A::LEN == 4 { "datagrams_v4" } else { "datagrams_v6" };
        let mut map: HashMap<&mut MapData, DatagramKey<A>, DatagramValue<A>> =
            HashMap::try_from(datapath.ebpf.map_mut(name).unwrap()).unwrap();
        let entries: Vec<_> = map.iter().map(Result::unwrap).collect();
        let count = entries.len();
        for (key, mut value) in entries {
            if edit(key.direction, &mut value.seen) {
                map.remove(&key).unwrap();
            } else {
                map.insert(key, value, 0).unwrap();
            }
        }
        count
    }
    go::<Ipv4Be>(datapath, &mut edit) + go::<Ipv6Be>(datapath, &mut edit)
}

/// As the agent does with what leads to backends that serve no longer, here with all there is.
pub(super) fn end(datapath: &mut Datapath) {
    edit(datapath, |at, _| at == direction::TO_BACKEND);
}

/// As if every socket had been silent for as long.
fn age(datapath: &mut Datapath, seconds: u32) {
    let entries = edit(datapath, |_, seen| {
        *seen = seen.wrapping_sub(seconds);
        false
    });
    assert!(entries > 0);
}

fn each(cgroup: &std::fs::File, case: impl Fn(&mut Datapath, &str, SocketAddr, &[SocketAddr])) {
    for (bind, vip) in SPELT {
        let all = if vip == VIP6 { addrs(&BACKENDS6) } else { addrs(&BACKENDS[..2]) };
        case(&mut as_pod(cgroup), bind, addr(vip), &all);
    }
}

/// The frontend as programs know it.
fn put(datapath: &mut Datapath, vip: SocketAddr, spec: &Spec) {
    datapath.frontend(addr(if vip == addr(VIP6) { VIP6 } else { VIP }), UDP, spec);
}

/// Terminating, out of its zone, or elsewhere than a policy allows: that is for new flows.
#[test]
fn a_backend_that_is_not_chosen_any_more_keeps_its_flows() {
    isolated("datagrams::a_backend_that_is_not_chosen_any_more_keeps_its_flows", |cgroup| {
        each(cgroup, |datapath, bind, vip, all| {
            put(datapath, vip, &Spec::pick_all(1, &all[..1]));
            let socket = udp(bind);
            for spec in [
                Spec::pick_all(1, &all[..1]),
                Spec::pick_all(1, all),
                Spec::pick_all(1, &all[1..]),
                Spec { verdicts: [verdict::PICK_LOCAL; 3], local: all[1..].to_vec(), ..Spec::pick_all(1, all) },
                Spec { verdicts: [verdict::DROP; 3], ..Spec::pick_all(1, all) },
                Spec { verdicts: [verdict::REJECT; 3], ..Spec::pick_all(1, &[]) },
            ] {
                put(datapath, vip, &spec);
                for _ in 0..3 {
                    assert_eq!(ask(&socket, vip).unwrap(), (all[0], vip), "{:?}", spec.verdicts);
                }
            }
            // Others are refused; and so is this one, once the agent has found that its backend serves no longer.
            assert_eq!(udp(bind).send_to(b"?", vip).unwrap_err().kind(), ErrorKind::ConnectionRefused);
            end(datapath);
            assert_eq!(socket.send_to(b"?", vip).unwrap_err().kind(), ErrorKind::ConnectionRefused);
            put(datapath, vip, &Spec::pick_all(1, &all[1..]));
            assert_eq!(ask(&socket, vip).unwrap(), (all[1], vip));
        });
    });
}

/// Each datagram puts the end off.
#[test]
fn after_a_long_silence_a_backend_must_be_one_that_is_chosen() {
    isolated("datagrams::after_a_long_silence_a_backend_must_be_one_that_is_chosen", |cgroup| {
        each(cgroup, |datapath, bind, vip, all| {
            put(datapath, vip, &Spec::pick_all(1, &all[..1]));
            let socket = udp(bind);
            ask(&socket, vip).unwrap();
            put(datapath, vip, &Spec::pick_all(1, all));
            for _ in 0..5 {
                age(datapath, STREAM + 60);
                assert_eq!(ask(&socket, vip).unwrap(), (all[0], vip), "it is");
            }
            put(datapath, vip, &Spec::pick_all(1, &all[1..]));
            for _ in 0..3 {
                age(datapath, STREAM - 2);
                assert_eq!(ask(&socket, vip).unwrap(), (all[0], vip), "not silent for long");
            }
            age(datapath, STREAM + 2);
            assert_eq!(ask(&socket, vip).unwrap(), (all[1], vip));
            put(datapath, vip, &Spec { verdicts: [verdict::REJECT; 3], ..Spec::pick_all(1, &[]) });
            age(datapath, STREAM + 2);
            assert_eq!(socket.send_to(b"?", vip).unwrap_err().kind(), ErrorKind::ConnectionRefused);
        });
    });
}

#[test]
fn what_is_remembered_is_one_services() {
    isolated("datagrams::what_is_remembered_is_one_services", |cgroup| {
        each(cgroup, |datapath, bind, vip, all| {
            put(datapath, vip, &Spec::pick_all(1, &all[..1]));
            let socket = udp(bind);
            ask(&socket, vip).unwrap();
            put(datapath, vip, &Spec::pick_all(2, &all[1..]));
            assert_eq!(ask(&socket, vip).unwrap(), (all[1], vip));
        });
    });
}
