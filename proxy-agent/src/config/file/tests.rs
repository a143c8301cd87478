use super::*;

/// As `kubeadm init` 1.36 writes it into the ConfigMap `kube-proxy`: every field, as Go writes what nobody has set.
const KUBEADM: &str = include_str!("kubeadm.yaml");
/// As `kind` hands it to kubeadm.
const KIND: &str = include_str!("kind.yaml");

fn said(text: &str) -> Vec<(&'static str, String, Line)> {
    read(text).unwrap().into_iter().map(|said| (said.field.path, said.text, said.line)).collect()
}

fn wrong(text: &str) -> String {
    read(text).unwrap_err().iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
}

fn with(fields: &str) -> String {
    format!("apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n{fields}")
}

#[test]
fn what_kubeadm_writes_says_three_things() {
    let text = |text: &str| text.to_owned();
    assert_eq!(
        said(KUBEADM),
        [
            ("bindAddress", text("0.0.0.0"), 2),
            ("clientConnection.kubeconfig", text("/var/lib/kube-proxy/kubeconfig.conf"), 8),
            ("clusterCIDR", text("10.244.0.0/16"), 10),
        ]
    );
}

#[test]
fn what_kind_writes() {
    let paths: Vec<_> = said(KIND).into_iter().map(|(path, text, _)| format!("{path}={text}")).collect();
    assert_eq!(
        paths,
        [
            "mode=iptables",
            "iptables.minSyncPeriod=1s",
            "conntrack.maxPerCore=0",
            "clusterCIDR=10.244.0.0/16",
            "clientConnection.kubeconfig=/var/lib/kube-proxy/kubeconfig.conf",
        ]
    );
}

#[test]
fn json_is_yaml() {
    let json = r#"{"kind":"KubeProxyConfiguration","apiVersion":"kubeproxy.config.k8s.io/v1alpha1","mode":"ipvs"}"#;
    assert_eq!(said(json), [("mode", "ipvs".to_owned(), 1)]);
}

#[test]
fn both_documents_are_read_in_either_order() {
    let own = "apiVersion: proxy-agent/v1alpha1\nkind: ProxyAgentConfiguration\nproxyMode: ebpf\nmaps: {slots: 10}\nxdp: off\n";
    let theirs = with("mode: nftables\n");
    let mut one = read(&format!("{theirs}---\n{own}")).unwrap();
    let mut other = read(&format!("{own}---\n{theirs}---\n")).unwrap();
    for said in [&mut one, &mut other] {
        assert_eq!(said.len(), 4);
        said.sort_by_key(|said| said.field.path);
        said.iter_mut().for_each(|said| said.line = 0);
    }
    assert_eq!(one, other);
    assert!(wrong(&format!("{own}---\n{own}")).contains("a second ProxyAgentConfiguration"));
}

#[test]
fn what_is_unknown_is_named_with_its_line_and_what_was_meant() {
    for (text, words) in [
        (with("mod: ipvs\n"), &["line 3: mod: ", "is mode meant?"][..]),
        (with("iptables:\n  masqueradeall: true\n"), &["line 4: iptables.masqueradeall: ", "is masqueradeAll meant?"]),
        (with("iptables:\n  colour: red\n"), &["line 4: iptables.colour: KubeProxyConfiguration has no such field"]),
        // Of the other document.
        (with("socketLb: node\n"), &["line 3: socketLb: "]),
        (with("iptables: 5\n"), &["line 3: iptables: must be a map of fields"]),
        (with("mode: ipvs\nmode: iptables\n"), &["line 4", "uplicate"]),
        ("kind: KubeProxyConfiguration\n".into(), &["apiVersion is missing: kubeproxy.config.k8s.io/v1alpha1"]),
        ("apiVersion: v1\nkind: ConfigMap\n".into(), &["line 2", "\"ConfigMap\"", "ProxyAgentConfiguration"]),
        (
            "apiVersion: kubeproxy.config.k8s.io/v1\nkind: KubeProxyConfiguration\n".into(),
            &["line 1", "kubeproxy.config.k8s.io/v1alpha1 alone"],
        ),
        (String::new(), &["there is nothing in it"]),
        ("- a\n".into(), &["line 1", "a map of fields"]),
    ] {
        let error = wrong(&text);
        assert!(words.iter().all(|word| error.contains(word)), "{text}\n{error}");
        assert_eq!(error.lines().count(), 1, "{error}");
    }
    assert_eq!(wrong(&with("mod: ipvs\niptable: {}\n")).lines().count(), 2, "all of it is said at once");
}

/// A144, as far as it is of one field; the rest is seen where all of them come together.
#[test]
fn values_are_of_their_kind() {
    for (fields, words) in [
        ("iptables: {masqueradeBit: 32}", "iptables.masqueradeBit: must be from 0 to 31"),
        ("iptables: {masqueradeBit: \"14\"}", "iptables.masqueradeBit: must be a whole number"),
        ("iptables: {masqueradeAll: \"true\"}", "iptables.masqueradeAll: must be true or false"),
        ("iptables: {syncPeriod: 30}", "iptables.syncPeriod: must be a duration"),
        ("iptables: {syncPeriod: -1s}", "is no duration"),
        ("configSyncPeriod: x", "is no duration"),
        ("hostnameOverride: 5", "hostnameOverride: must be a text (in quotes"),
        ("nodePortAddresses: 10.0.0.0/8", "nodePortAddresses: must be a list"),
        ("nodePortAddresses: [5]", "nodePortAddresses: must be a list"),
        ("oomScoreAdj: -1001", "from -1000 to 1000"),
        ("conntrack: {min: -1}", "conntrack.min: must be 0 or more"),
        ("conntrack: {tcpEstablishedTimeout: -1s}", "is no duration"),
        ("clientConnection: {burst: -1}", "must be 0 or more"),
        ("featureGates: {NoSuchGate: true}", "no feature gate \"NoSuchGate\""),
        ("featureGates: {AllAlpha: 1}", "a map of names to true or false"),
        ("logging: {vmodule: [{filePattern: a}]}", "a list of filePattern and verbosity"),
        ("logging: {flushFrequency: soon}", "is no duration"),
        ("showHiddenMetricsForVersion: 1.35", "showHiddenMetricsForVersion: must be a version in quotes"),
        ("showHiddenMetricsForVersion: latest", "is no minor version"),
    ] {
        let error = wrong(&with(&format!("{fields}\n")));
        assert!(error.starts_with("line 3: ") && error.contains(words), "{fields}\n{error}");
    }
}

#[test]
fn nought_and_null_say_nothing_where_go_has_it_so() {
    let nothing = "mode: \"\"\niptables: {masqueradeBit: null, syncPeriod: 0s, masqueradeAll: false}\nipvs: null\n\
                   nodePortAddresses: []\nfeatureGates: {}\nclientConnection: {qps: 0, burst: 0}\nlogging: {verbosity: 0}\n";
    assert_eq!(said(&with(nothing)), []);
    let something = "iptables: {masqueradeBit: 0, localhostNodePorts: false}\noomScoreAdj: 0\nconntrack: {tcpEstablishedTimeout: 0s}\n";
    assert_eq!(said(&with(something)).len(), 4);
}

#[test]
fn every_kind_is_read_as_it_is_written() {
    for (kind, text) in [
        (Kind::Bool, "true"),
        (Kind::Int(-5, 5), "-3"),
        (Kind::Number, "2.5"),
        (Kind::Text, "a"),
        (Kind::Period, "1m30s"),
        (Kind::Nanoseconds, "5s"),
        (Kind::List, "a,b"),
        (Kind::List, ""),
        (Kind::MinorVersion, "1.35"),
        (Kind::Gates, "A=true,B=false"),
        (Kind::Levels, "a=1,b*=2"),
        (Kind::Quantity, "2Mi"),
    ] {
        let yaml = serde_saphyr::to_string(&value(kind, text)).unwrap();
        let tree: Tree = serde_saphyr::from_str(&yaml).unwrap();
        assert_eq!(super::text(kind, &tree).as_deref(), Ok(text), "{kind:?} {yaml}");
    }
}

/// What is written where nothing is said is read as nothing.
#[test]
fn what_is_unsaid_stays_so() {
    for document in Document::ALL {
        let mut tree = Tree::Null;
        for key in [("apiVersion", document.api_version()), ("kind", document.kind())] {
            tree.put(key.0, Tree::Text(key.1.to_owned()));
        }
        for field in document.fields() {
            tree.put(field.path, unsaid(field));
        }
        let yaml = serde_saphyr::to_string(&tree).unwrap();
        assert_eq!(read(&yaml), Ok(Vec::new()), "{yaml}");
    }
}
