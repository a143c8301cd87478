//! The codec of IPVS against the kernel itself, and against what `ipvsadm` reads there.

use std::{
    io::ErrorKind,
    net::{IpAddr, Ipv4Addr},
    process::Command,
};

use proxy_agent::{
    dataplane::ipvs::{
        codec::{Destination, Request, Service, Virtual},
        socket::Socket,
    },
    model::Protocol,
};

/// In a network namespace of its own; `None` where the test is to be skipped.
fn socket(test: &str) -> Option<Socket> {
    if !nix::unistd::geteuid().is_root() {
        println!("SKIP {test}: not root");
        return None;
    }
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
    // Without any route of its own a namespace takes every address for a broadcast one, and IPVS none of these.
    assert!(Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap().success());
    match Socket::open() {
        Ok(socket) => Some(socket),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            println!("SKIP {test}: this kernel has no IPVS");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

fn service(addr: &str, port: u16, protocol: Protocol, persistence: Option<u32>) -> Service {
    let at = Virtual::At { addr: addr.parse().unwrap(), port, protocol };
    Service { at, scheduler: "rr".into(), persistence, by_port: false, fallback: false }
}

fn destination(addr: &str, weight: u32) -> Destination {
    Destination { addr: addr.parse().unwrap(), port: 8080, weight }
}

fn carried_out(socket: &mut Socket, requests: &[Request]) {
    for (request, outcome) in requests.iter().zip(socket.run(requests).unwrap()) {
        outcome.unwrap_or_else(|error| panic!("{request:?}: {error}"));
    }
}

/// `ipvsadm` is asked for the rules that would make what there is.
fn ipvsadm() -> Vec<String> {
    let shown = Command::new("ipvsadm").arg("-Sn").output().unwrap();
    assert!(shown.status.success(), "{}", String::from_utf8_lossy(&shown.stderr));
    let mut lines: Vec<String> =
        String::from_utf8(shown.stdout).unwrap().lines().map(|line| line.trim().to_owned()).collect();
    lines.sort();
    lines
}

#[test]
fn what_is_added_is_there_and_others_read_it_alike() {
    let Some(mut socket) = socket("what_is_added_is_there_and_others_read_it_alike") else { return };
    let info = socket.info().unwrap();
    assert!(info.version >= (1, 2, 1) && info.connection_buckets > 0, "{info:?}");
    assert_eq!(socket.services().unwrap(), []);
    let mut services = vec![
        service("10.96.0.1", 80, Protocol::Tcp, None),
        service("10.96.0.1", 53, Protocol::Udp, Some(10_800)),
        service("10.96.0.1", 3868, Protocol::Sctp, None),
        service("fd00:96::1", 80, Protocol::Tcp, Some(60)),
        Service {
            scheduler: "mh".into(),
            by_port: true,
            fallback: true,
            ..service("10.96.0.2", 80, Protocol::Tcp, None)
        },
    ];
    let (web, six) = (services[0].at, services[3].at);
    let mut requests: Vec<_> = services.iter().cloned().map(Request::Add).collect();
    requests.push(Request::AddDestination(web, destination("10.244.1.7", 1)));
    requests.push(Request::AddDestination(web, destination("10.244.2.7", 1)));
    requests.push(Request::AddDestination(six, destination("fd00:244::7", 1)));
    carried_out(&mut socket, &requests);

    let mut found = socket.services().unwrap();
    found.sort_by_key(|service| service.at);
    services.sort_by_key(|service| service.at);
    assert_eq!(found, services);
    let mut held = socket.destinations(web).unwrap();
    held.sort_by_key(|held| held.destination);
    let expected = [destination("10.244.1.7", 1), destination("10.244.2.7", 1)];
    assert_eq!(held.iter().map(|held| held.destination).collect::<Vec<_>>(), expected);
    assert!(held.iter().all(|held| held.translated && held.active == 0 && held.inactive == 0), "{held:?}");
    assert_eq!(socket.destinations(six).unwrap()[0].destination, destination("fd00:244::7", 1));

    let shown = ipvsadm();
    for line in [
        "-A -t 10.96.0.1:80 -s rr",
        "-A -u 10.96.0.1:53 -s rr -p 10800",
        "-A -t [fd00:96::1]:80 -s rr -p 60",
        "-a -t 10.96.0.1:80 -r 10.244.1.7:8080 -m -w 1",
        "-a -t [fd00:96::1]:80 -r [fd00:244::7]:8080 -m -w 1",
    ] {
        assert!(shown.iter().any(|shown| shown == line), "no {line:?} in {shown:#?}");
    }

    let by_hash = |shown: &&String| shown.starts_with("-A -t 10.96.0.2:80 -s mh ");
    let by_hash = shown.iter().find(by_hash).unwrap_or_else(|| panic!("{shown:#?}"));
    assert!(by_hash.contains("mh-fallback") && by_hash.contains("mh-port"), "{by_hash}");

    // Nobody new goes to one without weight, and what is changed is changed.
    services[0].persistence = Some(5);
    carried_out(
        &mut socket,
        &[
            Request::SetDestination(web, destination("10.244.1.7", 0)),
            Request::RemoveDestination(web, destination("10.244.2.7", 1)),
            Request::Set(services[0].clone()),
            Request::Remove(six),
        ],
    );
    let held: Vec<_> = socket.destinations(web).unwrap().iter().map(|held| held.destination).collect();
    assert_eq!(held, [destination("10.244.1.7", 0)]);
    let found = socket.services().unwrap();
    assert!(found.contains(&services[0]) && found.iter().all(|service| service.at != six), "{found:?}");
}

#[test]
fn each_request_fails_by_itself() {
    let Some(mut socket) = socket("each_request_fails_by_itself") else { return };
    let [web, other] = [80, 81].map(|port| service("10.96.0.1", port, Protocol::Tcp, None));
    let unknown = Service { scheduler: "nosuch".into(), ..other.clone() };
    let outcomes = socket
        .run(&[
            Request::Add(web.clone()),
            Request::Add(web.clone()),
            Request::Add(unknown),
            Request::RemoveDestination(web.at, destination("10.244.1.7", 1)),
            Request::AddDestination(other.at, destination("10.244.1.7", 1)),
            Request::Add(other.clone()),
        ])
        .unwrap();
    let errors: Vec<_> = outcomes.iter().map(|outcome| outcome.as_ref().err().and_then(|e| e.raw_os_error())).collect();
    let [exists, nothing, no_service] = [nix::libc::EEXIST, nix::libc::ENOENT, nix::libc::ESRCH].map(Some);
    assert_eq!(errors, [None, exists, nothing, nothing, no_service, None]);
    let mut found = socket.services().unwrap();
    found.sort_by_key(|service| service.at);
    assert_eq!(found, [web, other]);
}

#[test]
fn many_are_carried_out_in_one_go() {
    let Some(mut socket) = socket("many_are_carried_out_in_one_go") else { return };
    let addr = |n: u16| IpAddr::from(Ipv4Addr::from(0x0a60_0000 + u32::from(n)));
    let services: Vec<Service> = (1..=500)
        .map(|n| Service {
            at: Virtual::At { addr: addr(n), port: 80, protocol: Protocol::Tcp },
            scheduler: "rr".into(),
            persistence: None,
            by_port: false,
            fallback: false,
        })
        .collect();
    let with = |service: &Service| {
        let to = |n| Request::AddDestination(service.at, destination(&format!("10.244.0.{n}"), 1));
        [vec![Request::Add(service.clone())], (1..=3).map(to).collect()].concat()
    };
    carried_out(&mut socket, &services.iter().flat_map(with).collect::<Vec<_>>());
    assert_eq!(socket.services().unwrap().len(), 500);
    assert_eq!(socket.destinations(services[499].at).unwrap().len(), 3);
    carried_out(&mut socket, &services.iter().map(|service| Request::Remove(service.at)).collect::<Vec<_>>());
    assert_eq!(socket.services().unwrap(), []);
}
