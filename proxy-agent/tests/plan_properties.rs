//! Incremental planning equals the full plan, whatever happens in whatever order (fault F18).

mod common;

use std::{collections::BTreeMap, sync::Arc};

use common::events;
use proptest::prelude::*;
use proxy_agent::{
    desired::{Algorithm, DesiredState, HealthChecks},
    model::{
        EndpointSlice, Event, Service, ServiceKey, Snapshot,
        address::NodePortAddresses,
        index::{Index, Touched},
    },
    plan::{Defaults, DetectLocal, Planner},
};

/// The snapshot as events define it, without any cleverness.
#[derive(Default)]
struct Naive {
    services: BTreeMap<ServiceKey, Arc<Service>>,
    slices: BTreeMap<Arc<str>, Arc<EndpointSlice>>,
    /// That a list of pods came, and one of namespaces.
    listed: [bool; 2],
    snapshot: Snapshot,
}

impl Naive {
    fn apply(&mut self, event: Event) {
        match event {
            Event::Service(service) => drop(self.services.insert(service.key.clone(), service)),
            Event::ServiceGone(key) => drop(self.services.remove(&key)),
            Event::Slice(slice) => drop(self.slices.insert(Arc::clone(&slice.name), slice)),
            Event::SliceGone { name, .. } => drop(self.slices.remove(&name)),
            Event::Node(facts) => self.snapshot.node = facts,
            Event::Addresses(addresses) => self.snapshot.addresses = addresses,
            Event::Services(list) => {
                self.services.clear();
                list.into_iter().for_each(|service| self.apply(Event::Service(service)));
            }
            Event::Pod(pod) => drop(self.snapshot.pods.insert(pod.key.clone(), pod)),
            Event::PodGone(key) => drop(self.snapshot.pods.remove(&key)),
            Event::Pods { list, unreadable } => {
                self.listed[0] = true;
                self.snapshot.pods.retain(|key, _| unreadable.contains(key));
                list.into_iter().for_each(|pod| self.apply(Event::Pod(pod)));
            }
            Event::Namespace(name, Some(value)) => drop(self.snapshot.namespaces.insert(name, value)),
            Event::Namespace(name, None) => drop(self.snapshot.namespaces.remove(&name)),
            Event::Namespaces { list, unreadable } => {
                self.listed[1] = true;
                self.snapshot.namespaces.retain(|name, _| unreadable.contains(name));
                self.snapshot.namespaces.extend(list);
            }
            Event::Problems(..) | Event::UnreadableServices(_) | Event::UnreadableSlices(_) => {}
            Event::Slices(list) => {
                self.slices.clear();
                list.into_iter().for_each(|slice| self.apply(Event::Slice(slice)));
            }
        }
    }

    fn snapshot(&self) -> Snapshot {
        let pods_known = self.listed == [true; 2];
        let mut snapshot = Snapshot { services: self.services.clone(), pods_known, ..self.snapshot.clone() };
        for slice in self.slices.values() {
            let slices = snapshot.slices.entry(slice.service.clone()).or_default();
            slices.insert(Arc::clone(&slice.name), Arc::clone(slice));
        }
        snapshot
    }
}

fn detection() -> impl Strategy<Value = DetectLocal> {
    prop_oneof![
        2 => Just(DetectLocal::Device),
        1 => Just(DetectLocal::Cidrs(["10.244.0.0/16".parse().unwrap()].into())),
        1 => Just(DetectLocal::NodeCidrs),
    ]
}

fn defaults() -> impl Strategy<Value = Defaults> {
    let which = prop_oneof![
        2 => Just(NodePortAddresses::All),
        1 => Just(NodePortAddresses::Primary(None)),
        1 => Just(NodePortAddresses::Cidrs(vec!["192.0.2.0/29".parse().unwrap()])),
    ];
    (which, detection(), any::<(bool, bool, bool)>()).prop_map(
        |(node_port_addresses, detect_local, (masquerade_all, localhost_node_ports, external_ips))| Defaults {
            algorithm: Algorithm::Random,
            masquerade_all,
            detect_local,
            node_port_addresses,
            localhost_node_ports,
            external_ips,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn incremental_equals_full(
        batches in prop::collection::vec(prop::collection::vec(events(), 1..4), 1..25),
        defaults in defaults(),
    ) {
        let (mut index, mut naive) = (Index::default(), Naive::default());
        let mut planner = Planner::new(defaults.clone());
        let (mut kernel, mut told) = (DesiredState::default(), HealthChecks::new());
        for (turn, batch) in batches.into_iter().enumerate() {
            // What a full plan leaves behind is as good a start as any.
            if turn % 5 == 4 {
                planner.full(index.snapshot());
            }
            let mut touched = Touched::default();
            for event in batch {
                naive.apply(event.clone());
                index.apply(event, &mut touched);
            }
            prop_assert_eq!(index.snapshot(), &naive.snapshot());
            prop_assert_eq!(index.endpoints(), naive.slices.values().map(|slice| slice.endpoints.len()).sum::<usize>());

            let before = planner.state().clone();
            let changes = planner.update(index.snapshot(), &touched.services);
            let mut oracle = Planner::new(defaults.clone());
            oracle.full(index.snapshot());
            prop_assert_eq!(planner.state(), oracle.state());
            prop_assert_eq!(planner.health_checks(), oracle.health_checks());
            for (service, check) in planner.take_health_changes() {
                match check {
                    Some(check) => drop(told.insert(service, check)),
                    None => drop(told.remove(&service)),
                }
            }
            prop_assert_eq!(planner.health_checks(), &told);
            prop_assert_eq!(planner.problems(), oracle.problems());

            // The changes are exactly the difference, and carrying them out gives the new state.
            prop_assert_eq!(&changes, &before.diff(planner.state()));
            kernel.apply(&changes);
            prop_assert_eq!(&kernel, planner.state());
            prop_assert!(kernel.diff(planner.state()).is_empty());
        }
    }

    #[test]
    fn an_event_that_changes_nothing_touches_nothing(history in prop::collection::vec(events(), 1..25)) {
        let mut index = Index::default();
        let mut touched = Touched::default();
        for event in history {
            index.apply(event.clone(), &mut touched);
            let is_relist = matches!(event, Event::Services(_) | Event::Slices(_) | Event::Pods { .. });
            touched = Touched::default();
            index.apply(event, &mut touched);
            // A relist may name one object twice; then it changes twice each time.
            prop_assert!(is_relist || touched.is_empty(), "{:?}", touched);
        }
    }
}
