//! Two Services, one frontend: the older keeps it, the other takes over when it goes (fault F15); and the shared guard.

mod common;

use std::sync::Arc;

use common::{key, node, service, slice};
use proxy_agent::{
    desired::{Action, Frontend},
    model::{
        Event, Family, NodeFacts, Protocol, Service,
        index::{Index, Touched},
    },
    plan::{Defaults, Planner},
};

struct World {
    index: Index,
    planner: Planner,
}

impl World {
    fn new() -> Self {
        let mut world = Self { index: Index::default(), planner: Planner::new(Defaults::default()) };
        world.take(Event::Node(node("this", None)));
        world
    }

    /// Takes the event in; says how many frontends were set and removed.
    fn take(&mut self, event: Event) -> (usize, usize) {
        let mut touched = Touched::default();
        self.index.apply(event, &mut touched);
        let changes = self.planner.update(self.index.snapshot(), &touched.services);
        (changes.set.len(), changes.remove.len())
    }

    fn owner(&self) -> Option<String> {
        let frontend = Frontend { addr: "10.96.0.1".parse().unwrap(), port: common::port(80), protocol: Protocol::Tcp };
        self.planner.state().frontends.get(&frontend).map(|spec| spec.service.to_string())
    }
}

fn aged(name: &str, created: i64) -> Arc<Service> {
    Arc::new(Service { created, ..service(name, &["10.96.0.1"]) })
}

#[test]
fn the_older_keeps_the_address() {
    let mut world = World::new();
    assert_eq!(world.take(Event::Service(aged("old", 1))), (1, 0));
    assert_eq!(world.take(Event::Service(aged("a-young", 2))), (0, 0));
    assert_eq!(world.owner().as_deref(), Some("default/old:http"));
    let problems = world.planner.problems();
    assert_eq!(problems.keys().collect::<Vec<_>>(), ["Service default/a-young"]);
    assert!(problems["Service default/a-young"][0].contains("10.96.0.1:80/TCP is already used by default/old:http"));

    // Whoever comes first in time of creation has it, not who came first to us.
    assert_eq!(world.take(Event::Service(aged("oldest", 0))), (1, 0));
    assert_eq!(world.owner().as_deref(), Some("default/oldest:http"));
    assert_eq!(world.planner.problems().len(), 2);
}

#[test]
fn the_loser_takes_over_with_its_own_backends() {
    let mut world = World::new();
    world.take(Event::Service(aged("old", 1)));
    world.take(Event::Service(aged("young", 2)));
    world.take(Event::Slice(Arc::new(slice("old", "old-1", &["10.0.0.1"]))));
    // A change of the loser's backends changes nothing in force.
    assert_eq!(world.take(Event::Slice(Arc::new(slice("young", "young-1", &["10.0.0.2"])))), (0, 0));

    assert_eq!(world.take(Event::ServiceGone(key("old"))), (1, 0));
    assert_eq!(world.owner().as_deref(), Some("default/young:http"));
    let (_, spec) = world.planner.state().frontends.first_key_value().unwrap();
    assert_eq!(spec.all[0].to_string(), "10.0.0.2:8080");
    assert!(world.planner.problems().is_empty());

    assert_eq!(world.take(Event::ServiceGone(key("young"))), (0, 1));
    assert!(world.planner.state().frontends.is_empty());
}

#[test]
fn a_guard_stands_while_one_service_holds_the_address() {
    let mut world = World::new();
    world.take(Event::Service(aged("old", 1)));
    world.take(Event::Service(aged("young", 2)));
    world.take(Event::ServiceGone(key("old")));
    assert_eq!(world.planner.state().guards.len(), 1);
    world.take(Event::ServiceGone(key("young")));
    assert!(world.planner.state().guards.is_empty());
}

#[test]
fn ties_go_to_the_smaller_uid_then_the_smaller_key() {
    let mut world = World::new();
    let with_uid = |name, uid: &str| Arc::new(Service { uid: uid.into(), ..service(name, &["10.96.0.1"]) });
    world.take(Event::Service(with_uid("a", "2")));
    world.take(Event::Service(with_uid("b", "1")));
    assert_eq!(world.owner().as_deref(), Some("default/b:http"));
    world.take(Event::Service(with_uid("a", "1")));
    assert_eq!(world.owner().as_deref(), Some("default/a:http"));
}

#[test]
fn a_slice_that_changes_its_service_touches_both() {
    let mut world = World::new();
    world.take(Event::Service(Arc::new(service("a", &["10.96.0.1"]))));
    world.take(Event::Service(Arc::new(service("b", &["10.96.0.2"]))));
    world.take(Event::Slice(Arc::new(slice("a", "s", &["10.0.0.1"]))));
    assert_eq!(world.take(Event::Slice(Arc::new(slice("b", "s", &["10.0.0.1"])))), (2, 0));
}

#[test]
fn only_name_and_zone_of_the_node_touch_services_a41() {
    let mut world = World::new();
    world.take(Event::Service(Arc::new(service("a", &["10.96.0.1"]))));
    let mut touched = Touched::default();
    let mut facts = node("this", None);
    facts.internal_ips = vec!["192.0.2.1".parse().unwrap()];
    world.index.apply(Event::Node(facts), &mut touched);
    assert!(touched.is_empty());
    world.index.apply(Event::Addresses(["192.0.2.1".parse().unwrap()].into()), &mut touched);
    assert!(touched.is_empty());
    world.index.apply(Event::Node(node("this", Some("z"))), &mut touched);
    assert_eq!(touched.services.len(), 1);
}

#[test]
fn a_new_trigger_time_alone_touches_nothing_a27_a28() {
    let mut index = Index::default();
    let with = |trigger_time, address: &str| {
        Event::Slice(Arc::new(proxy_agent::model::EndpointSlice { trigger_time, ..slice("a", "s", &[address]) }))
    };
    let mut touched = Touched::default();
    index.apply(with(Some(1), "10.0.0.1"), &mut touched);
    assert_eq!(touched.triggers, [(key("a"), Family::V4, 1)]);
    let mut touched = Touched::default();
    index.apply(with(Some(2), "10.0.0.1"), &mut touched);
    assert!(touched.is_empty());
    index.apply(with(Some(3), "10.0.0.2"), &mut touched);
    assert_eq!(touched.triggers, [(key("a"), Family::V4, 3)]);
}

fn with_node_port(name: &str, ip: &str, created: i64) -> Service {
    let mut service = Service { created, ..service(name, &[ip]) };
    service.ports[0].node_port = Some(common::port(30080));
    service
}

fn addresses(world: &mut World, addresses: &[&str]) -> (usize, usize) {
    world.take(Event::Addresses(addresses.iter().map(|ip| ip.parse().unwrap()).collect()))
}

/// A127: NodePorts follow the node's addresses, and no other Service is planned again for it.
#[test]
fn node_ports_follow_the_nodes_addresses_a127() {
    let mut world = World::new();
    world.take(Event::Service(Arc::new(service("plain", &["10.96.0.1"]))));
    world.take(Event::Service(Arc::new(with_node_port("web", "10.96.0.2", 1))));
    assert_eq!(addresses(&mut world, &["127.0.0.1", "192.0.2.1", "fe80::1"]), (1, 0));
    assert_eq!(addresses(&mut world, &["127.0.0.1", "192.0.2.1", "192.0.2.2", "fe80::2"]), (1, 0));
    assert_eq!(addresses(&mut world, &["127.0.0.1", "192.0.2.2"]), (0, 1));

    let mut touched = Touched::default();
    world.index.apply(Event::Addresses(Default::default()), &mut touched);
    assert_eq!(touched.services, [key("web")].into());
    // The same again is nothing new.
    touched = Touched::default();
    world.index.apply(Event::Addresses(Default::default()), &mut touched);
    assert!(touched.is_empty());
}

/// An external IP that becomes the node's own is given up, and comes back when it goes.
#[test]
fn an_external_ip_yields_to_the_node() {
    let mut world = World::new();
    let external_ips = vec!["198.51.100.1".parse().unwrap()];
    world.take(Event::Service(Arc::new(Service { external_ips, ..service("web", &["10.96.0.2"]) })));
    assert_eq!(world.planner.state().frontends.len(), 2);
    assert_eq!(addresses(&mut world, &["198.51.100.1"]), (0, 1));
    assert!(world.planner.problems()["Service default/web"][0].contains("198.51.100.1 is an address of this node"));
    assert_eq!(addresses(&mut world, &["198.51.100.2"]), (1, 0));
    assert!(world.planner.problems().is_empty());
}

/// F15: one NodePort, two Services: the older has it on every address.
#[test]
fn the_older_keeps_a_node_port_f15() {
    let mut world = World::new();
    addresses(&mut world, &["192.0.2.1", "192.0.2.2"]);
    world.take(Event::Service(Arc::new(with_node_port("young", "10.96.0.2", 2))));
    world.take(Event::Service(Arc::new(with_node_port("old", "10.96.0.1", 1))));
    let owners: Vec<String> =
        world.planner.state().frontends.iter().map(|(f, s)| format!("{f} {}", s.service)).collect();
    assert!(owners.iter().filter(|owner| owner.contains(":30080/")).all(|owner| owner.ends_with("default/old:http")));
    let problems = &world.planner.problems()["Service default/young"];
    assert!(problems[0].contains(":30080/TCP is already used by default/old:http, which is older"), "{problems:?}");
}

/// F15, A158: what a user writes does not take away what the cluster handed out, however old it is.
#[test]
fn kinds_come_before_age_f15() {
    let mut world = World::new();
    let ours = "10.96.0.1".parse().unwrap();
    let thief = Service { created: 1, external_ips: vec![ours], ..service("thief", &["10.96.0.9"]) };
    world.take(Event::Service(Arc::new(thief)));
    assert_eq!(world.owner().as_deref(), Some("default/thief:http"));
    let balanced = Service { created: 2, load_balancer_ips: vec![ours], ..service("balanced", &["10.96.0.8"]) };
    assert_eq!(world.take(Event::Service(Arc::new(balanced))), (2, 0));
    assert_eq!(world.owner().as_deref(), Some("default/balanced:http"));
    world.take(Event::Service(aged("dns", 3)));
    assert_eq!(world.owner().as_deref(), Some("default/dns:http"));
    for loser in ["thief", "balanced"] {
        let problems = &world.planner.problems()[&format!("Service default/{loser}")];
        assert!(problems[0].contains("default/dns:http, which has it as its ClusterIP and keeps it"), "{problems:?}");
    }
    world.take(Event::ServiceGone(key("dns")));
    assert_eq!(world.owner().as_deref(), Some("default/balanced:http"));
}

/// A92, A127: what the node itself may ask of a load balancer with source ranges follows the Node's InternalIPs, and the addresses
/// it has where it names none.
#[test]
fn source_ranges_follow_the_nodes_addresses() {
    let mut world = World::new();
    let balanced = Service {
        load_balancer_ips: vec!["203.0.113.1".parse().unwrap()],
        source_ranges: vec!["192.0.2.0/28".parse().unwrap()],
        ..service("web", &["10.96.0.2"])
    };
    world.take(Event::Service(Arc::new(balanced)));
    world.take(Event::Slice(Arc::new(slice("web", "web-1", &["10.0.0.1"]))));
    let action = |world: &World| {
        let (_, spec) =
            world.planner.state().frontends.iter().find(|(f, _)| f.addr.to_string() == "203.0.113.1").unwrap();
        spec.verdicts.node.action
    };
    assert_eq!(action(&world), Action::Drop);
    assert_eq!(addresses(&mut world, &["192.0.2.1"]), (1, 0));
    assert_eq!(action(&world), Action::PickAll);
    for (internal, expected) in [("198.51.100.1", Action::Drop), ("192.0.2.2", Action::PickAll)] {
        let facts = NodeFacts { internal_ips: vec![internal.parse().unwrap()], ..node("this", None) };
        assert_eq!(world.take(Event::Node(facts)), (1, 0));
        assert_eq!(action(&world), expected);
    }
}
