//! What turns virtual servers as they are into virtual servers as they should be: pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use super::{
    codec::{Destination, Held, Request, Service, Virtual},
    render::{Server, Stay},
};
use crate::{desired::Backend, model::Port};

/// Address and port of a backend.
pub type Place = (IpAddr, u16);

/// A virtual server as it is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Current {
    pub service: Service,
    /// The weight of each; `None`: it is not translated as ours are.
    pub destinations: BTreeMap<Place, Option<u32>>,
}

impl Current {
    pub(super) fn of(service: Service, held: &[Held]) -> Self {
        let destination = |held: &Held| {
            let Destination { addr, port, weight } = held.destination;
            ((addr, port), held.translated.then_some(weight))
        };
        Self { service, destinations: held.iter().map(destination).collect() }
    }

    /// Who is chosen no more, and still there.
    pub(super) fn leaving(&self) -> impl Iterator<Item = Place> {
        self.destinations.iter().filter(|(_, weight)| **weight == Some(0)).map(|(place, _)| *place)
    }
}

pub type Kernel = BTreeMap<Virtual, Current>;

/// In the order in which they are to be carried out. Nobody whose connections stay is taken away: they are chosen no more, until
/// `departed` says that they may go.
pub fn turn(at: Virtual, current: Option<&Current>, wanted: Option<&Server>, otherwise: &Stay) -> Vec<Request> {
    let mut requests = Vec::new();
    if let Some(Server { service, .. }) = wanted {
        match current {
            None => requests.push(Request::Add(service.clone())),
            Some(current) if current.service != *service => requests.push(Request::Set(service.clone())),
            Some(_) => {}
        }
    }
    let none = BTreeMap::new();
    let there = current.map_or(&none, |current| &current.destinations);
    let chosen: BTreeSet<Place> = wanted.iter().flat_map(|server| server.backends.iter()).map(place).collect();
    for (addr, port) in &chosen {
        let destination = Destination { addr: *addr, port: *port, weight: 1 };
        match there.get(&(*addr, *port)) {
            None => requests.push(Request::AddDestination(at, destination)),
            Some(Some(1)) => {}
            Some(_) => requests.push(Request::SetDestination(at, destination)),
        }
    }
    let stay = wanted.map_or(otherwise, |server| &server.stay);
    let mut left = !chosen.is_empty();
    for (place, weight) in there.iter().filter(|(place, _)| !chosen.contains(place)) {
        let (addr, port) = *place;
        let destination = Destination { addr, port, weight: 0 };
        let stays = Port::new(port).is_some_and(|port| stay.keeps(&Backend { addr, port }));
        match weight {
            _ if !stays => requests.push(Request::RemoveDestination(at, destination)),
            Some(0) => {}
            _ => requests.push(Request::SetDestination(at, destination)),
        }
        left |= stays;
    }
    if wanted.is_none() && current.is_some() && !left {
        // Its destinations go with it.
        return vec![Request::Remove(at)];
    }
    requests
}

/// What may go, of those who are chosen no more: whoever has no connections left. With the last one a server goes that nobody wants.
pub(super) fn departed(at: Virtual, current: &Current, held: &[Held], wanted: bool) -> Vec<Request> {
    let idle = |held: &&Held| held.destination.weight == 0 && held.active == 0 && held.inactive == 0;
    let gone: Vec<Destination> = held
        .iter()
        .filter(idle)
        .map(|held| held.destination)
        .filter(|one| current.destinations.get(&(one.addr, one.port)) == Some(&Some(0)))
        .collect();
    if !wanted && gone.len() == held.len() {
        return vec![Request::Remove(at)];
    }
    gone.into_iter().map(|destination| Request::RemoveDestination(at, destination)).collect()
}

/// Notes what a request has changed.
pub fn carry_out(current: &mut Kernel, request: &Request) {
    match request {
        Request::Add(service) => {
            let new = Current { service: service.clone(), destinations: BTreeMap::new() };
            current.insert(service.at, new);
        }
        Request::Set(service) => {
            if let Some(current) = current.get_mut(&service.at) {
                current.service.clone_from(service);
            }
        }
        Request::Remove(at) => drop(current.remove(at)),
        Request::AddDestination(at, to) | Request::SetDestination(at, to) => {
            if let Some(current) = current.get_mut(at) {
                current.destinations.insert((to.addr, to.port), Some(to.weight));
            }
        }
        Request::RemoveDestination(at, to) => {
            if let Some(current) = current.get_mut(at) {
                current.destinations.remove(&(to.addr, to.port));
            }
        }
    }
}

/// Whose server a request is about.
pub(super) const fn target(request: &Request) -> Virtual {
    match request {
        Request::Add(Service { at, .. }) | Request::Set(Service { at, .. }) => *at,
        Request::Remove(at)
        | Request::AddDestination(at, _)
        | Request::SetDestination(at, _)
        | Request::RemoveDestination(at, _) => *at,
    }
}

fn place(backend: &Backend) -> Place {
    (backend.addr, backend.port.get())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{desired::BackendSet, model::Protocol};

    const AT: Virtual =
        Virtual::At { addr: IpAddr::V4(std::net::Ipv4Addr::new(10, 96, 0, 1)), port: 80, protocol: Protocol::Tcp };

    fn set(lasts: &[u8]) -> BackendSet {
        let backend = |last: &u8| Backend { addr: [10, 1, 0, *last].into(), port: Port::new(8080).unwrap() };
        lasts.iter().map(backend).collect()
    }

    fn server(scheduler: &str, lasts: &[u8], stay: Stay) -> Server {
        let service =
            Service { at: AT, scheduler: scheduler.into(), persistence: None, by_port: false, fallback: false };
        Server { service, backends: set(lasts), stay }
    }

    fn text(requests: &[Request]) -> Vec<String> {
        let to = |to: &Destination| format!("{}={}", to.addr, to.weight);
        let one = |request: &Request| match request {
            Request::Add(service) => format!("add {}", service.scheduler),
            Request::Set(service) => format!("set {}", service.scheduler),
            Request::Remove(_) => "remove".to_owned(),
            Request::AddDestination(_, of) => format!("+{}", to(of)),
            Request::SetDestination(_, of) => format!("~{}", to(of)),
            Request::RemoveDestination(_, of) => format!("-{}", to(of)),
        };
        requests.iter().map(one).collect()
    }

    fn run(current: &mut Kernel, requests: &[Request]) {
        requests.iter().for_each(|request| carry_out(current, request));
    }

    fn held(current: &Current, connections: &[u8]) -> Vec<Held> {
        let one = |((addr, port), weight): (&Place, &Option<u32>)| Held {
            destination: Destination { addr: *addr, port: *port, weight: weight.unwrap_or(1) },
            translated: true,
            active: u32::from(connections.iter().any(|last| *addr == IpAddr::from([10, 1, 0, *last]))),
            inactive: 0,
        };
        current.destinations.iter().map(one).collect()
    }

    #[test]
    fn who_leaves_keeps_their_connections() {
        let mut current = Kernel::new();
        let mut to = |wanted: Option<&Server>| {
            let requests = turn(AT, current.get(&AT), wanted, &Stay::All);
            run(&mut current, &requests);
            text(&requests)
        };
        assert_eq!(to(Some(&server("rr", &[1, 2], Stay::All))), ["add rr", "+10.1.0.1=1", "+10.1.0.2=1"]);
        assert_eq!(to(Some(&server("rr", &[1, 2], Stay::All))), Vec::<String>::new());
        assert_eq!(to(Some(&server("mh", &[2, 3], Stay::All))), ["set mh", "+10.1.0.3=1", "~10.1.0.1=0"]);
        assert_eq!(to(Some(&server("mh", &[1, 3], Stay::All))), ["~10.1.0.1=1", "~10.1.0.2=0"], "it is back");
        assert_eq!(to(None), ["~10.1.0.1=0", "~10.1.0.3=0"], "the Service is gone, its connections are not");
        assert_eq!(to(None), Vec::<String>::new());
        let now = current[&AT].clone();
        assert_eq!(text(&departed(AT, &now, &held(&now, &[1, 2]), false)), ["-10.1.0.3=0"]);
        assert_eq!(text(&departed(AT, &now, &held(&now, &[]), false)), ["remove"]);
        assert_eq!(text(&departed(AT, &now, &held(&now, &[]), true)).len(), 3);
        // Somebody has come back meanwhile.
        assert_eq!(text(&turn(AT, Some(&now), Some(&server("mh", &[1], Stay::All)), &Stay::All)), ["~10.1.0.1=1"]);
    }

    #[test]
    fn datagrams_go_on_only_where_somebody_serves_them() {
        let mut current = Kernel::new();
        let alive = |lasts: &[u8]| Stay::Only(set(lasts));
        let mut to = |wanted: Option<&Server>| {
            let requests = turn(AT, current.get(&AT), wanted, &Stay::without_frontend(Protocol::Udp));
            run(&mut current, &requests);
            text(&requests)
        };
        to(Some(&server("rr", &[1, 2, 3], alive(&[1, 2, 3]))));
        assert_eq!(to(Some(&server("rr", &[3], alive(&[2, 3])))), ["-10.1.0.1=0", "~10.1.0.2=0"]);
        assert_eq!(to(Some(&server("rr", &[3], alive(&[3])))), ["-10.1.0.2=0"]);
        assert_eq!(to(None), ["remove"]);
    }

    proptest! {
        #[test]
        fn it_comes_to_what_is_wanted(steps in prop::collection::vec((any::<bool>(), any::<bool>(), prop::collection::btree_set(1_u8..9, 0..5)), 1..9)) {
            let mut current = Kernel::new();
            for (is_wanted, udp, lasts) in steps {
                let lasts: Vec<u8> = lasts.into_iter().collect();
                let stay = if udp { Stay::Only(set(&lasts)) } else { Stay::All };
                let wanted = is_wanted.then(|| server("rr", &lasts, stay));
                let requests = turn(AT, current.get(&AT), wanted.as_ref(), &Stay::All);
                run(&mut current, &requests);
                prop_assert_eq!(&turn(AT, current.get(&AT), wanted.as_ref(), &Stay::All), &vec![]);
                if let Some(now) = current.get(&AT).cloned() {
                    run(&mut current, &departed(AT, &now, &held(&now, &[]), is_wanted));
                }
                let chosen: Vec<Place> = wanted.iter().flat_map(|server| server.backends.iter()).map(place).collect();
                let there = current.get(&AT).map(|current| current.destinations.clone());
                prop_assert_eq!(there.map(|there| there.into_keys().collect()), is_wanted.then_some(chosen));
            }
        }
    }
}
