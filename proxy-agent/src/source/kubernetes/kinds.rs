//! What is particular to each kind: where it lives, what is asked for, and what becomes of an object.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use kube::api::WatchParams;
use serde::de::DeserializeOwned;
use tracing::{debug, info};

use super::{board, decode::Unreadable, remarks::Remarks};
use crate::{
    model::{EndpointSlice, Event, NodeFacts, Service, ServiceKey},
    source::{
        api,
        convert::{self, Names},
    },
};

/// What is asked for, besides the kind. Whatever a server does not understand is filtered again by `convert`.
#[derive(Clone, Default)]
pub(super) struct Selectors {
    pub(super) labels: Option<String>,
    pub(super) fields: Option<String>,
    /// The field selector only saves traffic: a server that refuses it (400) is asked without.
    pub(super) fields_optional: bool,
}

impl Selectors {
    pub(super) fn watch(&self, timeout: Duration) -> WatchParams {
        WatchParams {
            label_selector: self.labels.clone(),
            field_selector: self.fields.clone(),
            timeout: Some(u32::try_from(timeout.as_secs()).unwrap_or(u32::MAX).max(1)),
            bookmarks: true,
            ..WatchParams::default()
        }
    }
}

pub(super) trait Kind: Send + 'static {
    type Object: DeserializeOwned + Clone + Send + 'static;
    const KIND: board::Kind;
    const PATH: &'static str;
    /// As RBAC rules name it.
    const RESOURCE: &'static str;
    /// Objects asked for at a time while listing: a page is held whole, as text and as objects.
    const PAGE: u32;

    fn selectors(&self) -> Selectors;
    fn metadata(object: &Self::Object) -> &api::Metadata;

    /// Takes in one object of a list that is not complete yet.
    fn listed(&mut self, object: Self::Object);
    /// The same of one that cannot be read: it is there, and what was known of it stands.
    fn listed_unreadable(&mut self, object: Unreadable);
    /// Forgets a list that was broken off.
    fn list_lost(&mut self);
    /// The list is complete: it replaces all that was known.
    fn list_done(&mut self) -> Vec<Event>;
    fn applied(&mut self, object: Self::Object) -> Option<Event>;
    /// It changed to something that cannot be read.
    fn applied_unreadable(&mut self, object: Unreadable) -> Option<Event>;
    fn deleted(&mut self, metadata: &api::Metadata) -> Option<Event>;

    /// What is wrong with objects that are not handed on.
    fn remarks(&mut self) -> &mut Remarks;

    /// Why a complete list is not enough yet.
    fn missing(&self) -> Option<String> {
        None
    }
}

#[derive(Default)]
pub(super) struct Services {
    names: Names,
    list: Vec<Arc<Service>>,
    unreadable: BTreeSet<ServiceKey>,
    remarks: Remarks,
}

impl Kind for Services {
    type Object = api::Service;
    const KIND: board::Kind = board::Kind::Services;
    const PATH: &'static str = "/api/v1/services";
    const RESOURCE: &'static str = "services";
    const PAGE: u32 = 500;

    fn selectors(&self) -> Selectors {
        Selectors {
            labels: Some(format!("!{}", api::PROXY_NAME_LABEL)),
            fields: Some("spec.clusterIP!=None".to_owned()),
            fields_optional: true,
        }
    }

    fn metadata(object: &api::Service) -> &api::Metadata {
        &object.metadata
    }

    fn listed(&mut self, object: api::Service) {
        if let Ok(service) = convert::service(&object, &mut self.names) {
            self.list.push(Arc::new(service));
        }
    }

    fn listed_unreadable(&mut self, object: Unreadable) {
        let Unreadable { namespace, name, why, .. } = object;
        self.remarks.listed(place("Service", &namespace, &name), unreadable(&why));
        self.unreadable.insert(ServiceKey { namespace: self.names.get(&namespace), name: self.names.get(&name) });
    }

    fn list_lost(&mut self) {
        self.list = Vec::new();
        self.unreadable.clear();
        self.remarks.list_lost();
    }

    fn list_done(&mut self) -> Vec<Event> {
        info!(services = self.list.len(), unreadable = self.unreadable.len(), "listed");
        self.remarks.list_done();
        let unreadable = std::mem::take(&mut self.unreadable);
        vec![Event::UnreadableServices(unreadable), Event::Services(std::mem::take(&mut self.list))]
    }

    fn applied(&mut self, object: api::Service) -> Option<Event> {
        self.remarks.clear(|| place("Service", &object.metadata.namespace, &object.metadata.name));
        Some(match convert::service(&object, &mut self.names) {
            Ok(service) => Event::Service(Arc::new(service)),
            Err(_) => Event::ServiceGone(convert::key(&object.metadata, &mut self.names)),
        })
    }

    fn applied_unreadable(&mut self, object: Unreadable) -> Option<Event> {
        let Unreadable { namespace, name, why, .. } = object;
        self.remarks.set(place("Service", &namespace, &name), unreadable(&why));
        None
    }

    fn deleted(&mut self, metadata: &api::Metadata) -> Option<Event> {
        self.remarks.clear(|| place("Service", &metadata.namespace, &metadata.name));
        Some(Event::ServiceGone(convert::key(metadata, &mut self.names)))
    }

    fn remarks(&mut self) -> &mut Remarks {
        &mut self.remarks
    }
}

pub(super) fn place(kind: &str, namespace: &str, name: &str) -> String {
    format!("{kind} {namespace}/{name}")
}

pub(super) fn unreadable(why: &str) -> String {
    format!("cannot be read: {why}; what was known of it before stands until it can be")
}

#[derive(Default)]
pub(super) struct Slices {
    names: Names,
    list: Vec<Arc<EndpointSlice>>,
    unreadable: BTreeMap<(Arc<str>, Arc<str>), Option<ServiceKey>>,
    remarks: Remarks,
}

impl Slices {
    /// Or what to say of it.
    fn convert(&mut self, object: &api::EndpointSlice) -> Result<Arc<EndpointSlice>, Option<String>> {
        convert::slice(object, &mut self.names).map(Arc::new).map_err(|why| match why {
            // Contract A17: nobody can tell whose endpoints these are.
            convert::NotOurs::NoServiceName => {
                Some("ignored: it names no Service; set its label kubernetes.io/service-name".to_owned())
            }
            why => {
                debug!(slice = %convert::key(&object.metadata, &mut self.names), ?why, "ignored");
                None
            }
        })
    }

    fn gone(&mut self, metadata: &api::Metadata) -> Event {
        Event::SliceGone { namespace: self.names.get(&metadata.namespace), name: self.names.get(&metadata.name) }
    }
}

impl Kind for Slices {
    type Object = api::EndpointSlice;
    const KIND: board::Kind = board::Kind::Slices;
    const PATH: &'static str = "/apis/discovery.k8s.io/v1/endpointslices";
    const RESOURCE: &'static str = "endpointslices.discovery.k8s.io";
    // A slice holds up to a thousand endpoints, usually a hundred.
    const PAGE: u32 = 200;

    fn selectors(&self) -> Selectors {
        Selectors { labels: Some(format!("!{}", api::HEADLESS_LABEL)), ..Selectors::default() }
    }

    fn metadata(object: &api::EndpointSlice) -> &api::Metadata {
        &object.metadata
    }

    fn listed(&mut self, object: api::EndpointSlice) {
        let api::Metadata { namespace, name, .. } = &object.metadata;
        match self.convert(&object) {
            Ok(slice) => self.list.push(slice),
            Err(Some(why)) => self.remarks.listed(place("EndpointSlice", namespace, name), why),
            Err(None) => {}
        }
    }

    fn listed_unreadable(&mut self, object: Unreadable) {
        let Unreadable { namespace, name, service, why, .. } = object;
        self.remarks.listed(place("EndpointSlice", &namespace, &name), unreadable(&why));
        let namespace = self.names.get(&namespace);
        let service =
            service.map(|service| ServiceKey { namespace: Arc::clone(&namespace), name: self.names.get(&service) });
        self.unreadable.insert((namespace, self.names.get(&name)), service);
    }

    fn list_lost(&mut self) {
        self.list = Vec::new();
        self.unreadable.clear();
        self.remarks.list_lost();
    }

    fn list_done(&mut self) -> Vec<Event> {
        info!(slices = self.list.len(), unreadable = self.unreadable.len(), "listed");
        self.remarks.list_done();
        let unreadable = std::mem::take(&mut self.unreadable);
        vec![Event::UnreadableSlices(unreadable), Event::Slices(std::mem::take(&mut self.list))]
    }

    fn applied(&mut self, object: api::EndpointSlice) -> Option<Event> {
        let api::Metadata { namespace, name, .. } = &object.metadata;
        let converted = self.convert(&object);
        match &converted {
            Err(Some(why)) => self.remarks.set(place("EndpointSlice", namespace, name), why.clone()),
            _ => self.remarks.clear(|| place("EndpointSlice", namespace, name)),
        }
        Some(converted.map_or_else(|_| self.gone(&object.metadata), Event::Slice))
    }

    fn applied_unreadable(&mut self, object: Unreadable) -> Option<Event> {
        let Unreadable { namespace, name, why, .. } = object;
        self.remarks.set(place("EndpointSlice", &namespace, &name), unreadable(&why));
        None
    }

    fn deleted(&mut self, metadata: &api::Metadata) -> Option<Event> {
        self.remarks.clear(|| place("EndpointSlice", &metadata.namespace, &metadata.name));
        Some(self.gone(metadata))
    }

    fn remarks(&mut self) -> &mut Remarks {
        &mut self.remarks
    }
}

/// The own Node alone (contract A124). A Node that goes away leaves its facts behind: the machine is still here.
pub(super) struct OwnNode {
    name: String,
    /// As it was read last; that a Node was leaving does not outlive it.
    known: Option<NodeFacts>,
    told: Option<NodeFacts>,
    /// Of a list that is not complete yet.
    listed: Option<NodeFacts>,
    unreadable: bool,
    remarks: Remarks,
}

impl OwnNode {
    pub(super) fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            known: None,
            told: None,
            listed: None,
            unreadable: false,
            remarks: Remarks::default(),
        }
    }

    fn place(&self) -> String {
        format!("Node {}", self.name)
    }

    /// It could be read.
    fn read(&mut self, facts: NodeFacts) -> Option<Event> {
        self.known = Some(facts.clone());
        self.tell(facts)
    }

    /// Nodes change with every heartbeat; the facts hardly ever do.
    fn tell(&mut self, facts: NodeFacts) -> Option<Event> {
        if self.told.as_ref() == Some(&facts) {
            return None;
        }
        info!(node = self.name, zone = facts.zone.as_deref(), leaving = facts.leaving, "own Node");
        self.told = Some(facts.clone());
        Some(Event::Node(facts))
    }

    /// It is there: what was known of it stands. If that is nothing, its name has to do, since all else waits for it.
    fn there(&mut self) -> Option<Event> {
        let name = self.name.as_str();
        let facts = self.known.get_or_insert_with(|| NodeFacts { name: name.into(), ..NodeFacts::default() }).clone();
        self.tell(facts)
    }

    /// A Node that is gone is as good as leaving (contract A117). One that comes after it is another one.
    fn gone(&mut self) -> Option<Event> {
        let known = self.known.as_mut()?;
        known.leaving = false;
        let facts = NodeFacts { leaving: true, ..known.clone() };
        self.tell(facts)
    }
}

impl Kind for OwnNode {
    type Object = api::Node;
    const KIND: board::Kind = board::Kind::Node;
    const PATH: &'static str = "/api/v1/nodes";
    const RESOURCE: &'static str = "nodes";
    const PAGE: u32 = 1;

    fn selectors(&self) -> Selectors {
        Selectors { fields: Some(format!("metadata.name={}", self.name)), ..Selectors::default() }
    }

    fn metadata(object: &api::Node) -> &api::Metadata {
        &object.metadata
    }

    fn listed(&mut self, object: api::Node) {
        if object.metadata.name == self.name {
            let (facts, problems) = convert::node(&object);
            self.listed = Some(facts);
            if !problems.is_empty() {
                self.remarks.listed(self.place(), problems.join("; "));
            }
        }
    }

    fn listed_unreadable(&mut self, object: Unreadable) {
        if object.name == self.name {
            self.unreadable = true;
            self.remarks.listed(self.place(), unreadable(&object.why));
        }
    }

    fn list_lost(&mut self) {
        self.listed = None;
        self.unreadable = false;
        self.remarks.list_lost();
    }

    fn list_done(&mut self) -> Vec<Event> {
        self.remarks.list_done();
        let unreadable = std::mem::take(&mut self.unreadable);
        let event = match self.listed.take() {
            Some(facts) => self.read(facts),
            None if unreadable => self.there(),
            None => self.gone(),
        };
        event.into_iter().collect()
    }

    fn applied(&mut self, object: api::Node) -> Option<Event> {
        if object.metadata.name != self.name {
            return None;
        }
        let (facts, problems) = convert::node(&object);
        let place = self.place();
        if problems.is_empty() {
            self.remarks.clear(|| place);
        } else {
            self.remarks.set(place, problems.join("; "));
        }
        self.read(facts)
    }

    fn applied_unreadable(&mut self, object: Unreadable) -> Option<Event> {
        if object.name != self.name {
            return None;
        }
        self.remarks.set(self.place(), unreadable(&object.why));
        self.there()
    }

    fn deleted(&mut self, metadata: &api::Metadata) -> Option<Event> {
        if metadata.name != self.name {
            return None;
        }
        let place = self.place();
        self.remarks.clear(|| place);
        self.gone()
    }

    fn remarks(&mut self) -> &mut Remarks {
        &mut self.remarks
    }

    fn missing(&self) -> Option<String> {
        self.told.is_none().then(|| {
            format!(
                "there is no Node {:?}: kubelet has not registered it, or --hostname-override must name another",
                self.name
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object<T: DeserializeOwned>(yaml: &str) -> T {
        serde_saphyr::from_str(yaml).unwrap()
    }

    /// A1, A6: what stops being ours is gone, what starts being ours is there.
    #[test]
    fn services_change_hands() {
        let mut services = Services::default();
        let ours = "{metadata: {namespace: n, name: s}, spec: {clusterIP: 10.0.0.1, ports: [{port: 80}]}}";
        for not_ours in [
            "{metadata: {namespace: n, name: s}, spec: {clusterIP: None}}",
            "{metadata: {namespace: n, name: s}, spec: {type: ExternalName, clusterIP: 10.0.0.1}}",
            "{metadata: {namespace: n, name: s, labels: {service.kubernetes.io/service-proxy-name: x}}, spec: {clusterIP: 10.0.0.1}}",
        ] {
            assert!(matches!(services.applied(object(ours)), Some(Event::Service(_))));
            let gone = services.applied(object(not_ours)).unwrap();
            assert!(matches!(&gone, Event::ServiceGone(key) if key.to_string() == "n/s"), "{gone:?}");
            services.listed(object(not_ours));
        }
        services.listed(object(ours));
        assert!(matches!(services.list_done().as_slice(), [_, Event::Services(list)] if list.len() == 1));
        // A list that was broken off leaves nothing in the next one.
        services.listed(object(ours));
        services.list_lost();
        assert!(matches!(services.list_done().as_slice(), [_, Event::Services(list)] if list.is_empty()));
    }

    /// A17: nobody can tell whose endpoints these are, so somebody has to be told.
    #[test]
    fn a_slice_that_names_no_service_is_named() {
        let mut slices = Slices::default();
        let nameless = "{metadata: {namespace: n, name: lost}, addressType: IPv4}";
        let named =
            "{metadata: {namespace: n, name: lost, labels: {kubernetes.io/service-name: s}}, addressType: IPv4}";
        slices.listed(object(nameless));
        slices.list_done();
        let told = slices.remarks().news().unwrap();
        assert!(told["EndpointSlice n/lost"][0].contains("set its label kubernetes.io/service-name"), "{told:?}");
        assert!(matches!(slices.applied(object(named)), Some(Event::Slice(_))));
        assert!(slices.remarks().news().unwrap().is_empty());
        slices.applied(object(nameless));
        assert_eq!(slices.remarks().news().unwrap().len(), 1);
        slices.deleted(&object::<api::EndpointSlice>(nameless).metadata);
        assert!(slices.remarks().news().unwrap().is_empty());
    }

    fn unreadable_node() -> Unreadable {
        Unreadable {
            namespace: String::new(),
            name: "n1".into(),
            resource_version: "1".into(),
            service: None,
            why: "no".into(),
        }
    }

    /// A117: one that is there again is not leaving because its predecessor is gone, or was leaving, whether it can be read or not.
    #[test]
    fn a_node_that_comes_back_unreadable_is_not_leaving() {
        let leaving = "{metadata: {name: n1, deletionTimestamp: '2026-01-01T00:00:00Z', labels: {topology.kubernetes.io/zone: z}}}";
        for by_list in [false, true] {
            let mut node = OwnNode::new("n1");
            assert!(matches!(node.applied(object(leaving)), Some(Event::Node(facts)) if facts.leaving));
            // As long as it is the same one, what was known of it stands.
            assert_eq!(node.applied_unreadable(unreadable_node()), None);
            let (gone, back) = if by_list {
                let gone = node.list_done().pop();
                node.listed_unreadable(unreadable_node());
                (gone, node.list_done().pop())
            } else {
                (node.deleted(&object::<api::Node>(leaving).metadata), node.applied_unreadable(unreadable_node()))
            };
            assert_eq!(gone, None, "it was leaving already");
            let same_facts = |facts: &NodeFacts| !facts.leaving && facts.zone.as_deref() == Some("z");
            assert!(matches!(&back, Some(Event::Node(facts)) if same_facts(facts)), "{back:?}");
        }
    }

    #[test]
    fn what_is_wrong_with_the_own_node_is_told() {
        let wrong = "{metadata: {name: n1}, spec: {podCIDRs: [10.0.0.0/99]}, status: {addresses: [{type: InternalIP, address: x}]}}";
        let mut node = OwnNode::new("n1");
        node.listed(object(wrong));
        node.list_done();
        let told = node.remarks().news().unwrap();
        assert!(told["Node n1"][0].contains("podCIDRs") && told["Node n1"][0].contains("addresses"), "{told:?}");
        node.applied(object("{metadata: {name: n1}}"));
        assert!(node.remarks().news().unwrap().is_empty());
        node.applied(object(wrong));
        assert_eq!(node.remarks().news().unwrap().len(), 1);
        // It is of this one alone.
        node.listed(object(&wrong.replace("n1", "n2")));
        node.list_done();
        assert!(node.remarks().news().unwrap().is_empty());
    }

    #[test]
    fn a_node_that_cannot_be_read_is_there_nevertheless() {
        let unreadable = unreadable_node;
        let mut node = OwnNode::new("n1");
        node.listed_unreadable(unreadable());
        assert!(matches!(node.list_done().as_slice(), [Event::Node(facts)] if &*facts.name == "n1" && !facts.leaving));
        assert_eq!((node.missing(), node.remarks().news().unwrap().len()), (None, 1));
        assert_eq!(node.applied_unreadable(unreadable()), None);
    }

    #[test]
    fn the_own_node_is_waited_for_and_kept() {
        let mut node = OwnNode::new("n1");
        let n1 = "{metadata: {name: n1, labels: {topology.kubernetes.io/zone: z}}}";
        assert_eq!(node.list_done(), []);
        assert!(node.missing().unwrap().contains("--hostname-override"));
        assert_eq!(node.applied(object("{metadata: {name: n2}}")), None);
        assert!(node.missing().is_some());
        let event = node.applied(object(n1));
        assert!(matches!(&event, Some(Event::Node(facts)) if facts.zone.as_deref() == Some("z")), "{event:?}");
        assert_eq!(node.missing(), None);
        // A heartbeat is no news.
        assert_eq!(node.applied(object(n1)), None);
        let event = node.deleted(&object::<api::Node>(n1).metadata);
        assert!(matches!(&event, Some(Event::Node(facts)) if facts.leaving && facts.zone.is_some()), "{event:?}");
        assert_eq!(node.missing(), None);
        assert_eq!(node.list_done(), []);
        node.listed(object(n1));
        assert!(matches!(node.list_done().as_slice(), [Event::Node(facts)] if !facts.leaving));
    }
}
