//! The snapshot as events build it, and which Services each event touches.
//!
//! Level-triggered: an event is never acted upon. It changes the snapshot and marks Services; whoever plans looks at the
//! whole snapshot again. An event that changes nothing marks nothing (contract A27), and a relist marks exactly what
//! differs from what was known (A137).

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::IpAddr,
    sync::Arc,
};

use super::{EndpointSlice, Event, Family, NodeFacts, Pod, PodKey, Service, ServiceKey, Snapshot, Teller};

type SliceKey = (Arc<str>, Arc<str>);

/// What events since the last look have marked.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Touched {
    pub services: BTreeSet<ServiceKey>,
    /// Trigger times (nanoseconds since the epoch) that came with slices whose content changed (contract A28).
    pub triggers: Vec<(ServiceKey, Family, i64)>,
    /// Services, and EndpointSlices, that came, went or changed.
    pub service_changes: u64,
    pub slice_changes: u64,
    /// What is known of pods and namespaces is something else than it was.
    pub pods: bool,
}

impl Touched {
    /// There is something to plan anew.
    pub fn calls_for_plan(&self) -> bool {
        self.pods || !self.services.is_empty()
    }

    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Which kinds have been heard of completely.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Heard {
    services: bool,
    slices: bool,
    node: bool,
    addresses: bool,
    pods: bool,
    namespaces: bool,
}

/// A [`Snapshot`] with what is needed to change it in steps that cost what changed.
#[derive(Clone, Debug, Default)]
pub struct Index {
    snapshot: Snapshot,
    /// The Service that each known slice is filed under.
    owners: HashMap<SliceKey, ServiceKey>,
    endpoints: usize,
    heard: Heard,
    /// Left out of the next complete list, and yet not gone.
    unreadable_services: BTreeSet<ServiceKey>,
    unreadable_slices: BTreeMap<SliceKey, Option<ServiceKey>>,
    /// There, but unreadable for as long as this source has been heard: nothing is known of them.
    unknown_services: BTreeSet<ServiceKey>,
    unknown_slices: BTreeMap<SliceKey, Option<ServiceKey>>,
    problems: BTreeMap<Teller, BTreeMap<String, Vec<String>>>,
}

impl Index {
    pub fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    /// Endpoints in all slices, duplicates counted.
    pub fn endpoints(&self) -> usize {
        self.endpoints
    }

    /// What sources could not read at all: object or file → what was wrong.
    pub fn problems(&self) -> BTreeMap<String, Vec<String>> {
        self.problems.values().flatten().map(|(place, problems)| (place.clone(), problems.clone())).collect()
    }

    /// Services of which not all is known, as they or slices of theirs cannot be read and never could. What an earlier run left in
    /// force of them is the best there is.
    pub fn unknown(&self) -> BTreeSet<ServiceKey> {
        let of_slices = self.unknown_slices.values().flatten();
        let of_slices = of_slices.filter(|service| self.snapshot.services.contains_key(service));
        self.unknown_services.iter().chain(of_slices).cloned().collect()
    }

    /// Complete lists of Services and EndpointSlices, the own Node and its addresses have come in; before that nothing may
    /// be programmed (contract A130).
    pub fn is_complete(&self) -> bool {
        let Heard { services, slices, node, addresses, pods: _, namespaces: _ } = self.heard;
        services && slices && node && addresses
    }

    /// Takes one event in and marks what it touches.
    pub fn apply(&mut self, event: Event, touched: &mut Touched) {
        match event {
            Event::Service(service) => self.set_service(service, touched),
            Event::ServiceGone(key) => self.remove_service(&key, touched),
            Event::Slice(slice) => self.set_slice(slice, touched),
            Event::SliceGone { namespace, name } => self.remove_slice(&(namespace, name), touched),
            Event::Node(facts) => self.set_node(facts, touched),
            Event::Addresses(addresses) => self.set_addresses(addresses, touched),
            Event::Services(list) => self.relist_services(list, touched),
            Event::Slices(list) => self.relist_slices(list, touched),
            Event::Pod(pod) => self.set_pod(pod, touched),
            Event::PodGone(key) => touched.pods |= self.snapshot.pods.remove(&key).is_some(),
            Event::Pods { list, unreadable } => self.relist_pods(list, &unreadable, touched),
            Event::Namespace(name, value) => self.set_namespace(name, value, touched),
            Event::Namespaces { list, unreadable } => self.relist_namespaces(list, &unreadable, touched),
            Event::UnreadableServices(keys) => self.unreadable_services = keys,
            Event::UnreadableSlices(keys) => self.unreadable_slices = keys,
            Event::Problems(teller, problems) => drop(self.problems.insert(teller, problems)),
        }
    }

    fn set_service(&mut self, service: Arc<Service>, touched: &mut Touched) {
        let key = service.key.clone();
        self.unknown_services.remove(&key);
        if self.snapshot.services.get(&key) != Some(&service) {
            self.snapshot.services.insert(key.clone(), service);
            touched.service_changes += 1;
            touched.services.insert(key);
        }
    }

    fn remove_service(&mut self, key: &ServiceKey, touched: &mut Touched) {
        self.unknown_services.remove(key);
        if self.snapshot.services.remove(key).is_some() {
            touched.service_changes += 1;
            touched.services.insert(key.clone());
        }
    }

    fn relist_services(&mut self, list: Vec<Arc<Service>>, touched: &mut Touched) {
        self.heard.services = true;
        let listed: HashSet<ServiceKey> = list.iter().map(|service| service.key.clone()).collect();
        let unreadable = std::mem::take(&mut self.unreadable_services);
        let is_gone = |key: &&ServiceKey| !listed.contains(*key) && !unreadable.contains(*key);
        let gone: Vec<ServiceKey> = self.snapshot.services.keys().filter(is_gone).cloned().collect();
        for key in &gone {
            self.remove_service(key, touched);
        }
        for service in list {
            self.set_service(service, touched);
        }
        self.unknown_services = unreadable;
        self.unknown_services.retain(|key| !self.snapshot.services.contains_key(key));
    }

    fn set_slice(&mut self, slice: Arc<EndpointSlice>, touched: &mut Touched) {
        let key = (Arc::clone(&slice.namespace), Arc::clone(&slice.name));
        self.unknown_slices.remove(&key);
        if self.owners.get(&key).is_some_and(|owner| *owner != slice.service) {
            self.remove_slice(&key, touched);
        }
        let service = slice.service.clone();
        let (trigger, family) = (slice.trigger_time, slice.family);
        self.endpoints += slice.endpoints.len();
        let before =
            self.snapshot.slices.entry(service.clone()).or_default().insert(Arc::clone(&key.1), Arc::clone(&slice));
        match before {
            Some(before) => {
                self.endpoints -= before.endpoints.len();
                if same_content(&before, &slice) {
                    return;
                }
                if trigger != before.trigger_time {
                    touched.triggers.extend(trigger.map(|at| (service.clone(), family, at)));
                }
            }
            None => {
                self.owners.insert(key, service.clone());
                touched.triggers.extend(trigger.map(|at| (service.clone(), family, at)));
            }
        }
        touched.slice_changes += 1;
        touched.services.insert(service);
    }

    fn remove_slice(&mut self, key: &SliceKey, touched: &mut Touched) {
        self.unknown_slices.remove(key);
        let Some(service) = self.owners.remove(key) else { return };
        if let Some(slices) = self.snapshot.slices.get_mut(&service) {
            if let Some(slice) = slices.remove(&key.1) {
                self.endpoints -= slice.endpoints.len();
            }
            if slices.is_empty() {
                self.snapshot.slices.remove(&service);
            }
        }
        touched.slice_changes += 1;
        touched.services.insert(service);
    }

    fn relist_slices(&mut self, list: Vec<Arc<EndpointSlice>>, touched: &mut Touched) {
        self.heard.slices = true;
        let listed: HashSet<(&str, &str)> = list.iter().map(|slice| (&*slice.namespace, &*slice.name)).collect();
        let unreadable = std::mem::take(&mut self.unreadable_slices);
        let gone: BTreeSet<SliceKey> = self
            .owners
            .keys()
            .filter(|key| !listed.contains(&(&*key.0, &*key.1)) && !unreadable.contains_key(*key))
            .cloned()
            .collect();
        for key in &gone {
            self.remove_slice(key, touched);
        }
        for slice in list {
            self.set_slice(slice, touched);
        }
        self.unknown_slices = unreadable;
        self.unknown_slices.retain(|key, _| !self.owners.contains_key(key));
    }

    /// Only what planning reads touches anything: the node's name and zone (contract A41), the networks of its pods (A72), and its
    /// addresses (A127).
    fn set_node(&mut self, facts: NodeFacts, touched: &mut Touched) {
        self.heard.node = true;
        let known = &self.snapshot.node;
        if known.name != facts.name || known.zone != facts.zone || known.pod_cidrs != facts.pod_cidrs {
            touched.services.extend(self.snapshot.services.keys().cloned());
        } else if known.internal_ips != facts.internal_ips {
            self.touch_askers(touched);
        }
        self.snapshot.node = facts;
    }

    fn set_addresses(&mut self, addresses: BTreeSet<IpAddr>, touched: &mut Touched) {
        self.heard.addresses = true;
        if self.snapshot.addresses != addresses {
            self.touch_askers(touched);
            // And who has its ClusterIP taken by the node, or given back.
            let other: BTreeSet<IpAddr> = self.snapshot.addresses.symmetric_difference(&addresses).copied().collect();
            let services = self.snapshot.services.iter();
            let yields = services.filter(|(_, service)| service.cluster_ips.iter().any(|ip| other.contains(ip)));
            touched.services.extend(yields.map(|(key, _)| key.clone()));
        }
        self.snapshot.addresses = addresses;
    }

    fn set_pod(&mut self, pod: Arc<Pod>, touched: &mut Touched) {
        if self.snapshot.pods.get(&pod.key) != Some(&pod) {
            touched.pods = true;
            self.snapshot.pods.insert(pod.key.clone(), pod);
        }
    }

    fn know_pods(&mut self, touched: &mut Touched) {
        if self.heard.pods && self.heard.namespaces && !self.snapshot.pods_known {
            self.snapshot.pods_known = true;
            touched.pods = true;
        }
    }

    fn relist_pods(&mut self, list: Vec<Arc<Pod>>, unreadable: &BTreeSet<PodKey>, touched: &mut Touched) {
        self.heard.pods = true;
        self.know_pods(touched);
        let listed: HashSet<&PodKey> = list.iter().map(|pod| &pod.key).collect();
        let before = self.snapshot.pods.len();
        self.snapshot.pods.retain(|key, _| listed.contains(key) || unreadable.contains(key));
        touched.pods |= self.snapshot.pods.len() != before;
        for pod in list {
            self.set_pod(pod, touched);
        }
    }

    fn set_namespace(&mut self, name: Arc<str>, value: Option<Arc<str>>, touched: &mut Touched) {
        let before = match value.clone() {
            Some(value) => self.snapshot.namespaces.insert(name, value),
            None => self.snapshot.namespaces.remove(&name),
        };
        touched.pods |= before != value;
    }

    fn relist_namespaces(
        &mut self,
        mut list: BTreeMap<Arc<str>, Arc<str>>,
        unreadable: &BTreeSet<Arc<str>>,
        touched: &mut Touched,
    ) {
        self.heard.namespaces = true;
        self.know_pods(touched);
        let known = std::mem::take(&mut self.snapshot.namespaces);
        for name in unreadable {
            if let Some(value) = known.get(name) {
                list.entry(Arc::clone(name)).or_insert_with(|| Arc::clone(value));
            }
        }
        touched.pods |= known != list;
        self.snapshot.namespaces = list;
    }

    fn touch_askers(&self, touched: &mut Touched) {
        let askers = self.snapshot.services.iter().filter(|(_, service)| service.asks_for_addresses());
        touched.services.extend(askers.map(|(key, _)| key.clone()));
    }
}

/// Whether two versions of a slice mean the same; the trigger time means nothing by itself.
fn same_content(a: &EndpointSlice, b: &EndpointSlice) -> bool {
    let EndpointSlice { namespace: _, name: _, service, family, ports, endpoints, trigger_time: _, problems } = a;
    *service == b.service
        && *family == b.family
        && *ports == b.ports
        && *endpoints == b.endpoints
        && *problems == b.problems
}
