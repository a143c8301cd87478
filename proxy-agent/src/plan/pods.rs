//! Which pods' sockets are left alone at connect time.

use std::{collections::BTreeMap, sync::Arc};

use crate::{
    desired::LeftPods,
    model::{Pod, Snapshot},
};

/// What a pod says goes before what its namespace says; `None` before both are known. By object, what cannot be done of what is asked for.
pub(super) fn left(snapshot: &Snapshot) -> (Option<LeftPods>, BTreeMap<String, Vec<String>>) {
    let (mut left, mut problems) = (LeftPods::new(), BTreeMap::new());
    for (name, value) in &snapshot.namespaces {
        if is_left(value).is_none() {
            problems.insert(format!("Namespace {name}"), vec![unknown(value)]);
        }
    }
    for ((namespace, name), pod) in &snapshot.pods {
        let Pod { key: _, uid, host_network, socket_lb } = &**pod;
        let place = format!("{namespace}/{name}");
        let own = socket_lb.as_ref();
        if let Some(value) = own.filter(|value| is_left(value).is_none()) {
            problems.insert(format!("Pod {place}"), vec![unknown(value)]);
        }
        let says = |value: &Arc<str>| is_left(value);
        let asked = own.and_then(says).or_else(|| snapshot.namespaces.get(namespace).and_then(says));
        if asked != Some(true) {
            continue;
        }
        if *host_network {
            // Of a whole namespace it is meant for the others.
            if own.is_some() {
                let why = "socket-lb \"node\" means nothing for a pod in the node's network: its sockets are the node's own, and nothing \
                           translates their packets";
                problems.insert(format!("Pod {place}"), vec![why.to_owned()]);
            }
            continue;
        }
        left.insert(Arc::clone(uid), place.into());
    }
    (snapshot.pods_known.then_some(left), problems)
}

fn is_left(value: &Arc<str>) -> Option<bool> {
    match value.trim() {
        "node" => Some(true),
        "all" => Some(false),
        _ => None,
    }
}

fn unknown(value: &str) -> String {
    format!("socket-lb {value:?} is not known and changes nothing; write \"all\" or \"node\"")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::model::{
        Event,
        index::{Index, Touched},
    };

    /// A pod may be left alone for its own annotation or for its namespace's: who is not is known of both together.
    #[test]
    fn nobody_is_known_to_be_left_alone_before_both_lists_came() {
        let pods = || Event::Pods { list: Vec::new(), unreadable: BTreeSet::new() };
        let namespaces = || Event::Namespaces { list: BTreeMap::new(), unreadable: BTreeSet::new() };
        for lists in [[pods(), namespaces()], [namespaces(), pods()]] {
            let mut index = Index::default();
            let mut known = Vec::new();
            for event in lists {
                index.apply(event, &mut Touched::default());
                known.push(left(index.snapshot()).0.is_some());
            }
            assert_eq!(known, [false, true]);
        }
    }

    #[test]
    fn a_pod_goes_before_its_namespace() {
        let mut snapshot = Snapshot::default();
        for (namespace, value) in [("mesh", "node"), ("odd", "off")] {
            snapshot.namespaces.insert(namespace.into(), value.into());
        }
        for (namespace, name, value, host_network) in [
            ("mesh", "plain", None, false),
            ("mesh", "out", Some("all"), false),
            ("mesh", "odd", Some("none"), false),
            ("mesh", "host", None, true),
            ("default", "asks", Some("node"), false),
            ("default", "plain", None, false),
            ("default", "host", Some("node"), true),
            ("odd", "plain", None, false),
        ] {
            let key = (namespace.into(), name.into());
            let uid = format!("uid of {namespace}/{name}").into();
            let pod = Pod { key, uid, host_network, socket_lb: value.map(Into::into) };
            snapshot.pods.insert(pod.key.clone(), Arc::new(pod));
        }
        assert_eq!(left(&snapshot).0, None, "lists that are not complete say nothing of who is not in them");
        snapshot.pods_known = true;
        let (left, problems) = left(&snapshot);
        let left = left.unwrap();
        let names: Vec<&str> = left.values().map(|name| &**name).collect();
        // One that says nothing known goes by its namespace.
        assert_eq!(names, ["default/asks", "mesh/odd", "mesh/plain"]);
        assert!(left.keys().all(|uid| uid.starts_with("uid of")));
        let named: Vec<&str> = problems.keys().map(String::as_str).collect();
        assert_eq!(named, ["Namespace odd", "Pod default/host", "Pod mesh/odd"]);
        assert!(problems["Pod default/host"][0].contains("node's network"), "{problems:?}");
    }
}
