//! The own Node's Pods, and Namespaces: whose sockets are to be left alone at connect time.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use tracing::info;

use super::{
    board,
    decode::Unreadable,
    kinds::{Kind, Selectors, place, unreadable},
    remarks::Remarks,
};
use crate::{
    model::{Event, Pod, PodKey},
    source::{
        api,
        convert::{self, Names},
    },
};

pub(super) struct Pods {
    node: String,
    names: Names,
    list: Vec<Arc<Pod>>,
    unreadable: BTreeSet<PodKey>,
    remarks: Remarks,
}

impl Pods {
    pub(super) fn new(node: &str) -> Self {
        Self {
            node: node.to_owned(),
            names: Names::default(),
            list: Vec::new(),
            unreadable: BTreeSet::new(),
            remarks: Remarks::default(),
        }
    }

    fn convert(&mut self, object: &api::Pod) -> Option<Arc<Pod>> {
        convert::pod(object, &self.node, &mut self.names).map(Arc::new)
    }
}

impl Kind for Pods {
    type Object = api::Pod;
    const KIND: board::Kind = board::Kind::Pods;
    const PATH: &'static str = "/api/v1/pods";
    const RESOURCE: &'static str = "pods";
    const PAGE: u32 = 100;

    fn selectors(&self) -> Selectors {
        let fields = format!("spec.nodeName={},status.phase!=Succeeded,status.phase!=Failed", self.node);
        Selectors { fields: Some(fields), ..Selectors::default() }
    }

    fn metadata(object: &api::Pod) -> &api::Metadata {
        &object.metadata
    }

    fn listed(&mut self, object: api::Pod) {
        let pod = self.convert(&object);
        self.list.extend(pod);
    }

    fn listed_unreadable(&mut self, object: Unreadable) {
        let Unreadable { namespace, name, why, .. } = object;
        self.remarks.listed(place("Pod", &namespace, &name), unreadable(&why));
        self.unreadable.insert((self.names.get(&namespace), self.names.get(&name)));
    }

    fn list_lost(&mut self) {
        self.list = Vec::new();
        self.unreadable.clear();
        self.remarks.list_lost();
    }

    fn list_done(&mut self) -> Vec<Event> {
        info!(pods = self.list.len(), unreadable = self.unreadable.len(), "listed");
        self.remarks.list_done();
        let (list, unreadable) = (std::mem::take(&mut self.list), std::mem::take(&mut self.unreadable));
        vec![Event::Pods { list, unreadable }]
    }

    fn applied(&mut self, object: api::Pod) -> Option<Event> {
        self.remarks.clear(|| place("Pod", &object.metadata.namespace, &object.metadata.name));
        Some(match self.convert(&object) {
            Some(pod) => Event::Pod(pod),
            None => Event::PodGone(convert::pod_key(&object.metadata, &mut self.names)),
        })
    }

    fn applied_unreadable(&mut self, object: Unreadable) -> Option<Event> {
        let Unreadable { namespace, name, why, .. } = object;
        self.remarks.set(place("Pod", &namespace, &name), unreadable(&why));
        None
    }

    fn deleted(&mut self, metadata: &api::Metadata) -> Option<Event> {
        self.remarks.clear(|| place("Pod", &metadata.namespace, &metadata.name));
        Some(Event::PodGone(convert::pod_key(metadata, &mut self.names)))
    }

    fn remarks(&mut self) -> &mut Remarks {
        &mut self.remarks
    }
}

#[derive(Default)]
pub(super) struct Namespaces {
    names: Names,
    list: BTreeMap<Arc<str>, Arc<str>>,
    unreadable: BTreeSet<Arc<str>>,
    remarks: Remarks,
}

fn of(name: &str) -> String {
    format!("Namespace {name}")
}

impl Kind for Namespaces {
    type Object = api::Namespace;
    const KIND: board::Kind = board::Kind::Namespaces;
    const PATH: &'static str = "/api/v1/namespaces";
    const RESOURCE: &'static str = "namespaces";
    const PAGE: u32 = 500;

    fn selectors(&self) -> Selectors {
        Selectors::default()
    }

    fn metadata(object: &api::Namespace) -> &api::Metadata {
        &object.metadata
    }

    fn listed(&mut self, object: api::Namespace) {
        if let (name, Some(value)) = convert::namespace(&object.metadata, &mut self.names) {
            self.list.insert(name, value);
        }
    }

    fn listed_unreadable(&mut self, object: Unreadable) {
        self.remarks.listed(of(&object.name), unreadable(&object.why));
        self.unreadable.insert(self.names.get(&object.name));
    }

    fn list_lost(&mut self) {
        self.list.clear();
        self.unreadable.clear();
        self.remarks.list_lost();
    }

    fn list_done(&mut self) -> Vec<Event> {
        self.remarks.list_done();
        let (list, unreadable) = (std::mem::take(&mut self.list), std::mem::take(&mut self.unreadable));
        vec![Event::Namespaces { list, unreadable }]
    }

    fn applied(&mut self, object: api::Namespace) -> Option<Event> {
        self.remarks.clear(|| of(&object.metadata.name));
        let (name, value) = convert::namespace(&object.metadata, &mut self.names);
        Some(Event::Namespace(name, value))
    }

    fn applied_unreadable(&mut self, object: Unreadable) -> Option<Event> {
        self.remarks.set(of(&object.name), unreadable(&object.why));
        None
    }

    fn deleted(&mut self, metadata: &api::Metadata) -> Option<Event> {
        self.remarks.clear(|| of(&metadata.name));
        Some(Event::Namespace(self.names.get(&metadata.name), None))
    }

    fn remarks(&mut self) -> &mut Remarks {
        &mut self.remarks
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object<T: serde::de::DeserializeOwned>(yaml: &str) -> T {
        serde_saphyr::from_str(yaml).unwrap()
    }

    #[test]
    fn pods_of_the_own_node_that_are_not_over() {
        let mut pods = Pods::new("n1");
        let fields = pods.selectors().fields.unwrap();
        assert!(fields.starts_with("spec.nodeName=n1,"), "{fields}");
        let pod = |name: &str, rest: &str| {
            object::<api::Pod>(&format!("{{metadata: {{namespace: a, name: {name}, uid: u-{name}}}, {rest}}}"))
        };
        pods.listed(pod("here", "spec: {nodeName: n1}"));
        pods.listed(pod("host", "spec: {nodeName: n1, hostNetwork: true}"));
        pods.listed(pod("elsewhere", "spec: {nodeName: n2}"));
        pods.listed(pod("over", "spec: {nodeName: n1}, status: {phase: Succeeded}"));
        let [Event::Pods { list, .. }] = &pods.list_done()[..] else { panic!("no list") };
        let told: Vec<_> = list.iter().map(|pod| (&*pod.key.1, &*pod.uid, pod.host_network)).collect();
        assert_eq!(told, [("here", "u-here", false), ("host", "u-host", true)]);
        // A static pod's cgroup has the uid that the kubelet made.
        let mirror = "{metadata: {namespace: a, name: m, uid: x, annotations: {kubernetes.io/config.mirror: hash, \
                      proxy-agent/socket-lb: node}}, spec: {nodeName: n1}}";
        let Some(Event::Pod(told)) = pods.applied(object(mirror)) else { panic!("not told") };
        assert_eq!((&*told.uid, told.socket_lb.as_deref()), ("hash", Some("node")));
        let over = pods.applied(pod("here", "spec: {nodeName: n1}, status: {phase: Failed}"));
        assert_eq!(over, Some(Event::PodGone(("a".into(), "here".into()))));
    }

    #[test]
    fn annotated_namespaces() {
        let mut namespaces = Namespaces::default();
        namespaces.listed(object("{metadata: {name: plain}}"));
        let mesh = "{metadata: {name: mesh, annotations: {proxy-agent/socket-lb: node}}}";
        namespaces.listed(object(mesh));
        let list = BTreeMap::from([(Arc::from("mesh"), Arc::from("node"))]);
        assert_eq!(namespaces.list_done(), [Event::Namespaces { list, unreadable: BTreeSet::new() }]);
        let event = namespaces.applied(object("{metadata: {name: mesh}}"));
        assert_eq!(event, Some(Event::Namespace("mesh".into(), None)));
        assert_eq!(namespaces.applied(object(mesh)), Some(Event::Namespace("mesh".into(), Some("node".into()))));
    }
}
