//! One file: text in, model objects and remarks out.
//!
//! Two kinds of wrong are told apart. Text that is no YAML (or JSON) leaves nothing to rely on: the whole file is broken, and
//! its last good state stands. An object that is wrong in a file that reads is left out alone; if it says its name, whoever knew it
//! before may let that stand.

use std::{collections::BTreeSet, fmt, path::Path, sync::Arc};

use serde::{
    Deserialize,
    de::{DeserializeOwned, IgnoredAny},
};
use serde_json::Value;
use serde_saphyr::{NonFiniteFloatPolicy, Spanned};

use crate::{
    model::{EndpointSlice, NodeFacts, Pod, PodKey, Service, ServiceKey},
    source::{
        api,
        convert::{self, Names, NotOurs},
    },
};

/// What a file holds that concerns the proxy.
#[derive(Clone, PartialEq, Debug, Default)]
pub(super) struct Parsed {
    pub(super) services: Vec<(Line, Arc<Service>)>,
    pub(super) slices: Vec<(Line, Arc<EndpointSlice>)>,
    pub(super) nodes: Vec<(Line, NodeFacts)>,
    /// With the names of their nodes.
    pub(super) pods: Vec<(Line, Arc<str>, Arc<Pod>)>,
    /// And what their annotation says.
    pub(super) namespaces: Vec<(Line, Arc<str>, Option<Arc<str>>)>,
    /// Objects that are there but cannot be read, and why not.
    pub(super) unreadable: Vec<(Line, Object, String)>,
    /// Objects that were left out, or not wholly understood where the model has no place to say so.
    pub(super) problems: Vec<(Line, String)>,
    /// Kinds that mean nothing here.
    pub(super) ignored: BTreeSet<String>,
}

/// An object by its name.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Object {
    Service(ServiceKey),
    /// And the Service whose it says it is.
    Slice((Arc<str>, Arc<str>), Option<ServiceKey>),
    Node(Arc<str>),
    Pod(PodKey),
    Namespace(Arc<str>),
}

impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Service(key) => write!(f, "Service {key}"),
            Self::Slice((namespace, name), _) => write!(f, "EndpointSlice {namespace}/{name}"),
            Self::Node(name) => write!(f, "Node {name}"),
            Self::Pod((namespace, name)) => write!(f, "Pod {namespace}/{name}"),
            Self::Namespace(name) => write!(f, "Namespace {name}"),
        }
    }
}

/// Where an object starts, counted from 1; 0 is unknown.
pub(super) type Line = u64;

/// Why a file as a whole cannot be read.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Broken {
    pub(super) line: Line,
    pub(super) message: String,
}

pub(super) fn parse(path: &Path, text: &str, names: &mut Names) -> Result<Parsed, Broken> {
    let json = path.extension().is_some_and(|extension| extension == "json");
    let documents = if json { json_documents(text)? } else { yaml_documents(text)? };
    let mut parsed = Parsed::default();
    for (line, document) in documents {
        parsed.object(line, document, None, names);
    }
    Ok(parsed)
}

fn json_documents(text: &str) -> Result<Vec<(Line, Value)>, Broken> {
    let mut documents = Vec::new();
    let mut stream = serde_json::Deserializer::from_str(text).into_iter::<Value>();
    loop {
        let rest = text.get(stream.byte_offset()..).unwrap_or_default();
        let start = text.len() - rest.trim_start().len();
        let line = 1 + text.bytes().take(start).filter(|byte| *byte == b'\n').count();
        match stream.next() {
            None => return Ok(documents),
            Some(Ok(document)) => documents.push((line as Line, document)),
            Some(Err(error)) => return Err(Broken { line: error.line() as Line, message: error.to_string() }),
        }
    }
}

fn yaml_options() -> serde_saphyr::Options {
    serde_saphyr::options! {
        // The files are the operator's own and may hold a whole cluster: only what guards the stack is kept small.
        budget: serde_saphyr::budget! {
            max_depth: 128,
            max_events: usize::MAX,
            max_nodes: usize::MAX,
            max_documents: usize::MAX,
            max_total_scalar_bytes: usize::MAX,
            max_total_comment_bytes: usize::MAX,
        },
        // Objects of other kinds may hold anything.
        non_finite_float_policy: NonFiniteFloatPolicy::AsString,
        with_snippet: false,
    }
}

fn yaml<T: DeserializeOwned>(text: &str) -> Result<Vec<T>, Broken> {
    serde_saphyr::from_multiple_with_options(text, yaml_options()).map_err(|error| Broken {
        line: error.location().map_or(0, |location| location.line()),
        message: error.to_string(),
    })
}

fn yaml_documents(text: &str) -> Result<Vec<(Line, Value)>, Broken> {
    let documents: Vec<Spanned<Value>> = yaml(text)?;
    let mut documents: Vec<(Line, Value)> =
        documents.into_iter().map(|document| (document.defined.line(), document.value)).collect();
    // Items of a List want lines of their own; that is worth a second reading where there is one.
    if documents.iter().any(|(_, document)| items(document).is_some()) {
        #[derive(Deserialize)]
        struct Lines {
            #[serde(default)]
            items: Option<Vec<Spanned<IgnoredAny>>>,
        }
        if let Ok(lines) = yaml::<Lines>(text)
            && lines.len() == documents.len()
        {
            for ((_, document), lines) in documents.iter_mut().zip(lines) {
                let lines = lines.items.unwrap_or_default();
                for (item, line) in items_mut(document).into_iter().flatten().zip(lines) {
                    if let Value::Object(item) = item {
                        item.insert(LINE.to_owned(), line.defined.line().into());
                    }
                }
            }
        }
    }
    Ok(documents)
}

/// Carries the line of a List's item from the reader to [`Parsed::object`]; no field of an API object looks like it.
const LINE: &str = "\0line";

fn items(document: &Value) -> Option<&Vec<Value>> {
    if is_list(document) { document.get("items")?.as_array() } else { None }
}

fn items_mut(document: &mut Value) -> Option<&mut Vec<Value>> {
    if is_list(document) { document.get_mut("items")?.as_array_mut() } else { None }
}

fn is_list(document: &Value) -> bool {
    let text = |field| document.get(field).and_then(Value::as_str);
    text("apiVersion").zip(text("kind")).is_some_and(|(version, kind)| list_of(version, kind).is_some())
}

/// What the items of such a list are, unless they say it themselves (`v1 List`). Whatever else ends in `List` is somebody's own kind.
fn list_of(version: &str, kind: &str) -> Option<Option<(&'static str, &'static str)>> {
    if (version, kind) == ("v1", "List") {
        return Some(None);
    }
    let of = kind.strip_suffix("List")?;
    KINDS.into_iter().find(|known| *known == (version, of)).map(Some)
}

/// apiVersion and kind of what means something here.
const KINDS: [(&str, &str); 5] =
    [("v1", "Service"), ("discovery.k8s.io/v1", "EndpointSlice"), ("v1", "Node"), ("v1", "Pod"), ("v1", "Namespace")];

impl Object {
    /// The name of an object that may hold anything else.
    fn of(kind: &str, object: &Value) -> Option<Self> {
        let metadata = object.get("metadata")?;
        let name = metadata.get("name")?.as_str().filter(|name| !name.is_empty())?;
        let namespace = match metadata.get("namespace") {
            None | Some(Value::Null) => "default",
            Some(namespace) => {
                namespace.as_str().map(|namespace| if namespace.is_empty() { "default" } else { namespace })?
            }
        };
        match kind {
            "Service" => Some(Self::Service(ServiceKey::new(namespace, name))),
            "EndpointSlice" => {
                let service = metadata.get("labels").and_then(|labels| labels.get(api::SERVICE_NAME_LABEL)?.as_str());
                let service = service.map(|service| ServiceKey::new(namespace, service));
                Some(Self::Slice((namespace.into(), name.into()), service))
            }
            "Pod" => Some(Self::Pod((namespace.into(), name.into()))),
            "Namespace" => Some(Self::Namespace(name.into())),
            _ => Some(Self::Node(name.into())),
        }
    }
}

impl Parsed {
    fn say(&mut self, line: Line, problem: impl Into<String>) {
        self.problems.push((line, problem.into()));
    }

    /// Whether something that `other` holds may be missing here.
    pub(super) fn holds_less_than(&self, other: &Self) -> bool {
        let counts = |parsed: &Self| {
            let Self { services, slices, nodes, pods, namespaces, unreadable, problems: _, ignored: _ } = parsed;
            [
                services.len() + slices.len() + nodes.len() + pods.len() + namespaces.len() + unreadable.len(),
                services.iter().map(|(_, service)| service.ports.len()).sum(),
                slices.iter().map(|(_, slice)| slice.ports.len()).sum(),
                slices.iter().map(|(_, slice)| slice.endpoints.len()).sum(),
            ]
        };
        counts(self).iter().zip(counts(other)).any(|(here, there)| *here < there)
    }

    /// Reads one object. `inherited`: apiVersion and kind that items of a ServiceList … leave out.
    fn object(&mut self, line: Line, mut object: Value, inherited: Option<(&str, &str)>, names: &mut Names) {
        if object.is_null() {
            return;
        }
        if !object.is_object() {
            return self.say(
                line,
                "is no Kubernetes object, but a bare value or list; it is left out, write a List with items",
            );
        }
        let line = object.get(LINE).and_then(Value::as_u64).unwrap_or(line);
        let text = |field: &str| object.get(field).and_then(Value::as_str).map(str::to_owned);
        let version = text("apiVersion").or_else(|| inherited.map(|(version, _)| version.to_owned()));
        let kind = text("kind").or_else(|| inherited.map(|(_, kind)| kind.to_owned()));
        let (Some(version), Some(kind)) = (version, kind) else {
            return self.say(line, "has no apiVersion and kind, so it is left out; write both");
        };
        match (version.as_str(), kind.as_str()) {
            ("v1", "Service") => self.service(line, object, names),
            ("discovery.k8s.io/v1", "EndpointSlice") => self.slice(line, object, names),
            ("v1", "Node") => self.node(line, object),
            ("v1", "Pod") => self.pod(line, object, names),
            ("v1", "Namespace") => self.namespace(line, object, names),
            (version, kind) => {
                let Some(of) = list_of(version, kind) else {
                    self.ignored.insert(format!("{version} {kind}"));
                    return;
                };
                let Some(items) = object.get_mut("items").and_then(Value::as_array_mut) else {
                    return self.say(line, format!("{kind} has no items; write at least `items: []`"));
                };
                for item in std::mem::take(items) {
                    self.object(line, item, of, names);
                }
            }
        }
    }

    /// Reads an object of a kind we know; its name and namespace as the API server would have them.
    fn typed<T: DeserializeOwned>(
        &mut self,
        line: Line,
        kind: &str,
        object: Value,
        metadata: impl Fn(&mut T) -> &mut api::Metadata,
    ) -> Option<T> {
        let named = Object::of(kind, &object);
        match serde_json::from_value::<T>(object) {
            Err(error) => {
                match named {
                    Some(named) => self.unreadable.push((line, named, format!("cannot be read: {error}"))),
                    None => self.say(line, format!("{kind}: {error}; the object is left out until that is mended")),
                }
                None
            }
            Ok(mut object) => {
                let metadata = metadata(&mut object);
                if metadata.namespace.is_empty() {
                    metadata.namespace = "default".to_owned();
                }
                if metadata.name.is_empty() {
                    self.say(line, format!("{kind}: metadata.name is missing; the object is left out, give it one"));
                    return None;
                }
                Some(object)
            }
        }
    }

    fn service(&mut self, line: Line, object: Value, names: &mut Names) {
        let Some(object) = self.typed::<api::Service>(line, "Service", object, |object| &mut object.metadata) else {
            return;
        };
        match convert::service(&object, names) {
            Ok(service) => self.services.push((line, Arc::new(service))),
            Err(NotOurs::NoClusterIp) => self.say(
                line,
                format!(
                    "Service {}/{}: spec.clusterIP is empty and a directory has nobody to allocate one: write an address",
                    object.metadata.namespace, object.metadata.name
                ),
            ),
            Err(_) => {},
        }
    }

    fn slice(&mut self, line: Line, object: Value, names: &mut Names) {
        let object = self.typed::<api::EndpointSlice>(line, "EndpointSlice", object, |object| &mut object.metadata);
        let Some(mut object) = object else { return };
        for port in &mut object.ports {
            // What the API server defaults; it never hands out a port without a name (contract A22).
            port.name.get_or_insert_default();
        }
        let key = || format!("EndpointSlice {}/{}", object.metadata.namespace, object.metadata.name);
        match convert::slice(&object, names) {
            Ok(slice) => self.slices.push((line, Arc::new(slice))),
            Err(NotOurs::NoServiceName) => {
                self.say(
                    line,
                    format!("{}: label {} is missing, so it serves no Service; add it", key(), api::SERVICE_NAME_LABEL),
                );
            }
            Err(NotOurs::AddressType) if object.address_type != "FQDN" => {
                let why = "is neither IPv4 nor IPv6; it is left out, write one of these";
                self.say(line, format!("{}: addressType {:?} {why}", key(), object.address_type));
            }
            Err(_) => {}
        }
    }

    fn pod(&mut self, line: Line, object: Value, names: &mut Names) {
        let Some(object) = self.typed::<api::Pod>(line, "Pod", object, |object| &mut object.metadata) else { return };
        if let Some(pod) = convert::pod(&object, &object.spec.node_name, names) {
            if pod.uid.is_empty() {
                let (namespace, name) = &pod.key;
                let why = "metadata.uid is missing, by which its cgroup is found; it is left out, write it";
                return self.say(line, format!("Pod {namespace}/{name}: {why}"));
            }
            self.pods.push((line, names.get(&object.spec.node_name), Arc::new(pod)));
        }
    }

    fn namespace(&mut self, line: Line, object: Value, names: &mut Names) {
        let object = self.typed::<api::Namespace>(line, "Namespace", object, |object| &mut object.metadata);
        if let Some(object) = object {
            let (name, value) = convert::namespace(&object.metadata, names);
            self.namespaces.push((line, name, value));
        }
    }

    fn node(&mut self, line: Line, object: Value) {
        if let Some(object) = self.typed::<api::Node>(line, "Node", object, |object| &mut object.metadata) {
            let (facts, problems) = convert::node(&object);
            for problem in problems {
                self.say(line, format!("Node {}: {problem}", facts.name));
            }
            self.nodes.push((line, facts));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(name: &str, text: &str) -> Result<Parsed, Broken> {
        parse(Path::new(name), text, &mut Names::default())
    }

    fn services(parsed: &Parsed) -> Vec<(Line, String)> {
        parsed.services.iter().map(|(line, service)| (*line, service.key.to_string())).collect()
    }

    const SERVICE: &str =
        "apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec: {clusterIP: 10.0.0.1, ports: [{port: 80}]}\n";

    #[test]
    fn documents_and_lists() {
        let parsed = file(
            "a.yaml",
            "# nothing yet\n---\n---\napiVersion: v1\nkind: Service\nmetadata: {name: a, namespace: x}\nspec: {clusterIP: 10.0.0.1, ports: \
             [{port: 80}]}\n---\napiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: Service\n  metadata:\n    name: b\n  spec: \
             {clusterIP: 10.0.0.2, ports: [{port: 80}]}\n- apiVersion: apps/v1\n  kind: Deployment\n  metadata: {name: d}\n- \
             apiVersion: v1\n  kind: Node\n  metadata: {name: n1}\n---\napiVersion: v1\nkind: ConfigMap\ndata: {x: .nan}\n---\napiVersion: \
             discovery.k8s.io/v1\nkind: EndpointSliceList\nitems:\n- metadata: {name: s, labels: {kubernetes.io/service-name: a}}\n  \
             addressType: IPv4\n  ports: [{port: 80}]\n",
        )
        .unwrap();
        assert_eq!(services(&parsed), [(4, "x/a".to_owned()), (12, "default/b".to_owned())]);
        assert_eq!(parsed.nodes.iter().map(|(line, node)| (*line, &*node.name)).collect::<Vec<_>>(), [(20, "n1")]);
        let (line, slice) = &parsed.slices[0];
        assert_eq!((*line, slice.service.to_string(), &*slice.ports[0].name), (31, "default/a".to_owned(), ""));
        assert_eq!(parsed.ignored.iter().collect::<Vec<_>>(), ["apps/v1 Deployment", "v1 ConfigMap"]);
        assert_eq!(parsed.problems, []);
    }

    /// `AllowList` of somebody's own is no list of `Allow`s.
    #[test]
    fn kinds_that_end_in_list_are_kinds() {
        let own = [
            "{apiVersion: x.example/v1, kind: AllowList, metadata: {name: a}, spec: {}}",
            "{apiVersion: x.example/v1, kind: AllowList, metadata: {name: b}, items: [10.0.0.1, 10.0.0.2]}",
            "{apiVersion: x.example/v1, kind: ServiceList, items: [{metadata: {name: c}}]}",
            "{apiVersion: x.example/v1, kind: List, items: [1]}",
            "{apiVersion: v1, kind: ConfigMapList, items: [{metadata: {name: d}}]}",
            "{apiVersion: apps/v1, kind: DeploymentList}",
        ];
        for name in ["a.yaml", "a.json"] {
            let text = if name == "a.json" {
                let values = own.iter().map(|text| serde_saphyr::from_str::<Value>(text).unwrap().to_string());
                values.collect::<Vec<_>>().join("\n")
            } else {
                own.join("\n---\n")
            };
            let parsed = file(name, &text).unwrap();
            let ignored = [
                "apps/v1 DeploymentList",
                "v1 ConfigMapList",
                "x.example/v1 AllowList",
                "x.example/v1 List",
                "x.example/v1 ServiceList",
            ];
            assert_eq!(parsed.ignored.iter().collect::<Vec<_>>(), ignored, "{name}");
            assert_eq!(parsed, Parsed { ignored: parsed.ignored.clone(), ..Parsed::default() }, "{name}");
        }
        let list =
            |kind: &str, items: &str| file("a.yaml", &format!("{{apiVersion: v1, kind: {kind}{items}}}")).unwrap();
        for kind in ["List", "ServiceList", "NodeList", "PodList", "NamespaceList"] {
            assert_eq!(list(kind, ", items: []"), Parsed::default());
            let said = format!("{kind} has no items; write at least `items: []`");
            assert_eq!(list(kind, "").problems, [(1, said)]);
        }
    }

    #[test]
    fn json() {
        let text = "\n{\n\t\"apiVersion\": \"v1\", \"kind\": \"Service\", \"metadata\": {\"name\": \"a\"},\n \"spec\": {\"clusterIP\": \"10.0.0.1\", \
                    \"ports\": [{\"port\": 80}]}}\n";
        assert_eq!(services(&file("a.json", text).unwrap()), [(2, "default/a".to_owned())]);
        let two = file("a.json", &format!("{text}{text}")).unwrap();
        assert_eq!(services(&two), [(2, "default/a".to_owned()), (6, "default/a".to_owned())]);
        assert_eq!(file("a.json", "{\n\"a\": 1,\n}").unwrap_err().line, 3);
        assert_eq!(file("a.json", "").unwrap(), Parsed::default());
    }

    #[test]
    fn nothing_in_it() {
        for text in ["", "\n", "---\n", "# a remark\n", "---\n---\n", "null\n"] {
            assert_eq!(file("a.yaml", text).unwrap(), Parsed::default(), "{text:?}");
        }
    }

    #[test]
    fn broken_files_say_where() {
        for (text, line) in [
            ("a: 1\nb: [1, 2\nc: 3\n", 3),
            ("a: 1\n  b: 2\n", 2),
            ("---\na: 1\n---\nb: \"x\n", 4),
            ("a: 1\na: 2\n", 2),
            ("a:\n\t- b\n", 2),
        ] {
            let broken = file("a.yaml", text).unwrap_err();
            assert!(broken.line.abs_diff(line) <= 1, "{text:?}: {broken:?}");
            assert!(!broken.message.is_empty());
        }
        let deep = file("a.yaml", &"[".repeat(100_000)).unwrap_err();
        assert!(deep.message.len() < 500, "{deep:?}");
    }

    #[test]
    fn bad_objects_leave_the_others() {
        let text = format!(
            "{SERVICE}---\napiVersion: v1\nkind: Service\nspec: {{clusterIP: 10.0.0.2}}\n---\nkind: Service\n---\n- 1\n---\napiVersion: v1\nkind: \
             Service\nmetadata: {{name: c}}\nspec: 5\n---\napiVersion: v1\nkind: Service\nmetadata: {{name: d}}\n---\n\
             apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: s}}\n"
        );
        let parsed = file("a.yml", &text).unwrap();
        assert_eq!(services(&parsed), [(1, "default/a".to_owned())]);
        let expected = [
            (6, "metadata.name is missing"),
            (10, "no apiVersion and kind"),
            (12, "no Kubernetes object"),
            (19, "nobody to allocate one"),
            (23, "kubernetes.io/service-name is missing"),
        ];
        assert!(
            matches!(&parsed.unreadable[..], [(14, Object::Service(key), why)] if &*key.name == "c" && why.contains("invalid type: integer")),
            "{:?}",
            parsed.unreadable
        );
        assert_eq!(parsed.problems.len(), expected.len(), "{:?}", parsed.problems);
        for ((line, problem), (expected_line, part)) in parsed.problems.iter().zip(expected) {
            assert_eq!(*line, expected_line, "{problem}");
            assert!(problem.contains(part), "{problem}");
        }
    }

    /// A directory of files is read as a cluster dump is: without complaint about what has its reasons.
    #[test]
    fn objects_that_are_not_ours_are_silent() {
        let parsed = file(
            "a.yaml",
            "{apiVersion: v1, kind: Service, metadata: {name: a}, spec: {clusterIP: None}}\n---\n{apiVersion: v1, kind: Service, metadata: \
             {name: b}, spec: {type: ExternalName}}\n---\n{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: {name: s, labels: \
             {kubernetes.io/service-name: a}}, addressType: FQDN}\n",
        )
        .unwrap();
        assert_eq!(parsed, Parsed::default());
    }
}
