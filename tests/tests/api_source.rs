//! The agent's Kubernetes source against a real API server: lists, watches, outages, refusals.

use std::{
    process::ExitCode,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use proxy_agent::{
    model::{
        Event, Family, ServiceKey, SourceState,
        index::{Index, Touched},
    },
    source::{self, Input, KubernetesOptions, Options},
};
use proxy_tests::{
    apiserver::{ApiServer, Programs, Relay, Seat, User},
    suite::Suite,
};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

/// Long enough for a busy machine; what is waited for usually takes milliseconds.
const PATIENCE: Duration = Duration::from_secs(20);

fn main() -> ExitCode {
    let mut suite = Suite::new("api_source");
    let programs = match Programs::find() {
        Ok(programs) => programs,
        Err(reason) => {
            suite.skip("api server", &format!("{reason:#}"));
            return suite.finish();
        }
    };
    let mut server = match ApiServer::start(programs, Seat::default()) {
        Ok(server) => server,
        Err(error) => {
            suite.fail("start etcd and kube-apiserver", &error);
            return suite.finish();
        }
    };
    suite.case("refusals name the remedy", || refusals(&server));
    suite.case("the own Node is waited for (A124)", || own_node(&server));
    suite.case("Pods of the own node and Namespaces, with leave and without", || own_pods(&server));
    suite.case("objects come, change and go", || changes(&server));
    suite.case("what is another's is invisible (A1, A2, A4-A6)", || not_ours(&server));
    suite.case("a list of several pages arrives whole", || pages(&server));
    suite.case("a cut connection resumes without a new list", || resumes(&server));
    suite.case("kill -9 of the API server takes nothing away (A136)", || killed(&mut server));
    suite.case("changes missed for good are found by a new list (410, A137)", || relists(&mut server));
    suite.case("a silent connection is given up (F6)", || silence(&server));
    if !suite.is_clean() {
        eprintln!("{}", server.log());
    }
    suite.finish()
}

/// A source that runs, and what it said so far.
struct Following {
    runtime: Option<tokio::runtime::Runtime>,
    cancel: CancellationToken,
    heard: Arc<Mutex<Heard>>,
    state: watch::Receiver<SourceState>,
}

#[derive(Default)]
struct Heard {
    index: Index,
    events: Vec<Event>,
}

impl Following {
    fn start(server: &ApiServer, user: User, through: Option<&Relay>) -> Result<Self> {
        Self::start_with(server, user, through, false)
    }

    fn start_with(server: &ApiServer, user: User, through: Option<&Relay>, pods: bool) -> Result<Self> {
        let address = through.map_or_else(|| server.address(), Relay::address);
        let options = Options {
            node: "n1".into(),
            pods,
            input: Input::Kubernetes(KubernetesOptions {
                kubeconfig: Some(server.kubeconfig(user, address)?),
                watch_timeout: Duration::from_secs(2),
                ..KubernetesOptions::default()
            }),
        };
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let (tx, mut events) = mpsc::channel(8);
        let (state_tx, state) = watch::channel(SourceState::Listing { missing: vec!["not started".into()] });
        let cancel = CancellationToken::new();
        let mut first = Heard::default();
        // The one thing that no source tells.
        first.index.apply(Event::Addresses(Default::default()), &mut Touched::default());
        let heard = Arc::new(Mutex::new(first));
        let hearing = Arc::clone(&heard);
        let ended = cancel.clone();
        runtime.spawn(async move {
            if let Err(error) = source::run(options, tx, state_tx, ended).await {
                eprintln!("the source ended: {error}");
            }
        });
        runtime.spawn(async move {
            while let Some(event) = events.recv().await {
                let mut heard = hearing.lock().unwrap_or_else(PoisonError::into_inner);
                heard.index.apply(event.clone(), &mut Touched::default());
                heard.events.push(event);
            }
        });
        Ok(Self { runtime: Some(runtime), cancel, heard, state })
    }

    /// Started and in step.
    fn synced(server: &ApiServer, through: Option<&Relay>) -> Result<Self> {
        server.apply(&node("n1", "z1"))?;
        let following = Self::start(server, User::Proxy, through)?;
        following.wait_state(PATIENCE, |state| *state == SourceState::Synced)?;
        following.wait("the complete lists", |heard| heard.index.is_complete())?;
        Ok(following)
    }

    fn look<T>(&self, look: impl FnOnce(&Heard) -> T) -> T {
        look(&self.heard.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn wait(&self, what: &str, done: impl Fn(&Heard) -> bool) -> Result<()> {
        let began = Instant::now();
        while !self.look(&done) {
            if began.elapsed() > PATIENCE {
                let last = self.look(|heard| format!("{:#?}", heard.events.iter().rev().take(3).collect::<Vec<_>>()));
                bail!("waited in vain for {what}; state {:?}, last events {last}", *self.state.borrow());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    fn wait_state(&self, patience: Duration, is: impl Fn(&SourceState) -> bool) -> Result<Duration> {
        let began = Instant::now();
        while !is(&self.state.borrow()) {
            if began.elapsed() > patience {
                bail!("the state stayed {:?}", *self.state.borrow());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(began.elapsed())
    }

    /// Lists of Services so far: the first, and one for each time the source had to begin anew.
    fn lists(&self) -> usize {
        self.look(|heard| heard.events.iter().filter(|event| matches!(event, Event::Services(_))).count())
    }
}

impl Drop for Following {
    fn drop(&mut self) {
        self.cancel.cancel();
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(Duration::from_secs(5));
        }
    }
}

fn key(name: &str) -> ServiceKey {
    ServiceKey::new("default", name)
}

fn knows(name: &'static str) -> impl Fn(&Heard) -> bool {
    move |heard| heard.index.snapshot().services.contains_key(&key(name))
}

fn lacks(name: &'static str) -> impl Fn(&Heard) -> bool {
    move |heard| !heard.index.snapshot().services.contains_key(&key(name))
}

fn service(name: &str, extra: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: default}}\nspec: {{ports: [{{name: http, port: 80, \
         targetPort: 8080}}]{extra}}}\n"
    )
}

fn slice(name: &str, service: &str, labels: &str, address: &str) -> String {
    format!(
        "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: {name}, namespace: default, labels: \
         {{kubernetes.io/service-name: {service}{labels}}}}}\naddressType: IPv4\nendpoints: [{{addresses: [{address}], nodeName: n1, \
         conditions: {{ready: true}}}}]\nports: [{{name: http, port: 8080}}]\n"
    )
}

fn node(name: &str, zone: &str) -> String {
    format!("apiVersion: v1\nkind: Node\nmetadata: {{name: {name}, labels: {{topology.kubernetes.io/zone: {zone}}}}}\n")
}

fn missing(state: &SourceState) -> String {
    match state {
        SourceState::Listing { missing } => missing.join("\n"),
        _ => String::new(),
    }
}

fn refusals(server: &ApiServer) -> Result<()> {
    for (user, parts) in [
        (User::Nobody, ["403", "system:node-proxier", "list and watch of endpointslices.discovery.k8s.io"]),
        (User::Stranger, ["401", "credentials", "EndpointSlices"]),
    ] {
        let following = Following::start(server, user, None)?;
        following
            .wait_state(PATIENCE, |state| parts.iter().all(|part| missing(state).contains(part)))
            .with_context(|| format!("{user:?}"))?;
        ensure!(following.look(|heard| heard.events.is_empty()), "events without a list");
    }
    Ok(())
}

fn own_node(server: &ApiServer) -> Result<()> {
    server.kubectl(&["delete", "node", "n1", "--ignore-not-found"], "")?;
    let following = Following::start(server, User::Proxy, None)?;
    following.wait_state(PATIENCE, |state| {
        matches!(state, SourceState::Listing { missing } if matches!(missing.as_slice(), [node] if node.contains("--hostname-override")))
    })?;
    server.apply(&node("n2", "other"))?;
    server.apply(&node("n1", "z1"))?;
    following.wait_state(PATIENCE, |state| *state == SourceState::Synced)?;
    following.wait("the zone", |heard| heard.index.snapshot().node.zone.as_deref() == Some("z1"))?;
    server.kubectl(&["label", "node", "n1", "--overwrite", "topology.kubernetes.io/zone=z2"], "")?;
    following.wait("the new zone (A41)", |heard| heard.index.snapshot().node.zone.as_deref() == Some("z2"))?;
    server.apply(&node("n1", "z1"))?;
    following.wait("the old zone", |heard| heard.index.snapshot().node.zone.as_deref() == Some("z1"))
}

/// `system:node-proxier` grants neither list: Services are served all the same, and what is in the way is said.
fn own_pods(server: &ApiServer) -> Result<()> {
    server.apply(&node("n1", "z1"))?;
    let refused = Following::start_with(server, User::Proxy, None, true)?;
    let parts = ["403", "list and watch of pods", "list and watch of namespaces"];
    refused.wait_state(
        PATIENCE,
        |state| matches!(state, SourceState::Stale { reason } if parts.iter().all(|part| reason.contains(part))),
    )?;
    refused.wait("Services", |heard| heard.index.is_complete())?;
    ensure!(!refused.look(|heard| heard.index.snapshot().pods_known), "nothing is known of pods");

    let pod = |name: &str, node: &str| {
        format!(
            "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: default, annotations: {{proxy-agent/socket-lb: node}}}}\n\
             spec: {{nodeName: {node}, automountServiceAccountToken: false, containers: [{{name: c, image: none}}]}}\n"
        )
    };
    let following = Following::start_with(server, User::Admin, None, true)?;
    following.wait_state(PATIENCE, |state| *state == SourceState::Synced)?;
    following.wait("both lists", |heard| heard.index.snapshot().pods_known)?;
    server.apply(&(pod("elsewhere", "n2") + &pod("here", "n1")))?;
    let says = |value: Option<&'static str>| {
        move |heard: &Heard| {
            let pods = &heard.index.snapshot().pods;
            let here = pods.get(&("default".into(), "here".into()));
            here.is_some() == value.is_some() && here.and_then(|pod| pod.socket_lb.as_deref()) == value
        }
    };
    following.wait("the own pod", says(Some("node")))?;
    server.kubectl(&["annotate", "pod", "here", "--overwrite", "proxy-agent/socket-lb=all"], "")?;
    following.wait("its new annotation", says(Some("all")))?;
    let namespace = |value: Option<&'static str>| {
        move |heard: &Heard| heard.index.snapshot().namespaces.get("default").map(|value| &**value) == value
    };
    server.kubectl(&["annotate", "namespace", "default", "proxy-agent/socket-lb=node"], "")?;
    following.wait("the Namespace's annotation", namespace(Some("node")))?;
    server.kubectl(&["annotate", "namespace", "default", "proxy-agent/socket-lb-"], "")?;
    following.wait("the Namespace's annotation to go", namespace(None))?;
    server.kubectl(&["delete", "pod", "here", "elsewhere", "--force", "--grace-period=0"], "")?;
    following.wait("the pod to go", says(None))?;
    let told = following.look(|heard| format!("{:?}", heard.events));
    ensure!(!told.contains("elsewhere"), "a pod of another node was asked for: {told}");
    Ok(())
}

fn changes(server: &ApiServer) -> Result<()> {
    let following = Following::synced(server, None)?;
    server.apply(&(service("web", ", ipFamilyPolicy: RequireDualStack") + &slice("web-1", "web", "", "10.1.0.1")))?;
    following.wait("the Service with its slice", |heard| {
        let snapshot = heard.index.snapshot();
        snapshot.services.contains_key(&key("web")) && snapshot.slices.contains_key(&key("web"))
    })?;
    following.look(|heard| {
        let service = &heard.index.snapshot().services[&key("web")];
        let families: Vec<_> = service.cluster_ips.iter().map(|ip| Family::of(*ip)).collect();
        ensure!(families == [Family::V4, Family::V6], "cluster IPs {:?}", service.cluster_ips);
        ensure!(service.problems.is_empty(), "{:?}", service.problems);
        ensure!(service.created > 1_700_000_000 && !service.uid.is_empty(), "{service:?}");
        let slice = &heard.index.snapshot().slices[&key("web")]["web-1"];
        let endpoint = &slice.endpoints[0];
        ensure!(endpoint.address.to_string() == "10.1.0.1" && endpoint.node.as_deref() == Some("n1"), "{endpoint:?}");
        ensure!(endpoint.ready && endpoint.serving && !endpoint.terminating, "{endpoint:?}");
        ensure!(slice.ports[0].port.get() == 8080 && &*slice.ports[0].name == "http", "{:?}", slice.ports);
        Ok(())
    })?;

    server.kubectl(&["annotate", "service", "web", "proxy-agent/algorithm=round-robin"], "")?;
    let annotated = |heard: &Heard| {
        heard
            .index
            .snapshot()
            .services
            .get(&key("web"))
            .is_some_and(|service| service.algorithm.as_deref() == Some("round-robin"))
    };
    following.wait("the annotation", annotated)?;
    server.apply(&slice("web-1", "web", "", "10.1.0.2"))?;
    following.wait("the new endpoint", |heard| {
        let slice = heard.index.snapshot().slices.get(&key("web")).and_then(|slices| slices.get("web-1"));
        slice.is_some_and(|slice| slice.endpoints[0].address.to_string() == "10.1.0.2")
    })?;
    server.delete("endpointslice", "web-1")?;
    following.wait("the slice to go", |heard| !heard.index.snapshot().slices.contains_key(&key("web")))?;
    ensure!(following.look(knows("web")), "the Service went with its slice");
    server.delete("service", "web")?;
    following.wait("the Service to go", lacks("web"))?;
    ensure!(following.lists() == 1, "{} lists", following.lists());
    Ok(())
}

fn not_ours(server: &ApiServer) -> Result<()> {
    let following = Following::synced(server, None)?;
    server.apply(
        &(service("headless", ", clusterIP: None")
            + "---\napiVersion: v1\nkind: Service\nmetadata: {name: alias, namespace: default}\nspec: {type: ExternalName, externalName: a.example}\n"
            + &slice("headless-1", "headless", ", service.kubernetes.io/headless: ''", "10.1.0.3")
            + &service("mine", "")
            + &slice("mine-1", "mine", "", "10.1.0.4")),
    )?;
    following.wait("what is ours", |heard| {
        let snapshot = heard.index.snapshot();
        snapshot.services.contains_key(&key("mine")) && snapshot.slices.contains_key(&key("mine"))
    })?;
    following.look(|heard| {
        let snapshot = heard.index.snapshot();
        for name in ["headless", "alias"] {
            ensure!(
                !snapshot.services.contains_key(&key(name)) && !snapshot.slices.contains_key(&key(name)),
                "{name} is seen"
            );
        }
        Ok(())
    })?;
    // A1, A3: labels added to live objects, and taken away again.
    server.kubectl(&["label", "service", "mine", "service.kubernetes.io/service-proxy-name=other"], "")?;
    following.wait("another proxy's Service to go", lacks("mine"))?;
    server.kubectl(&["label", "service", "mine", "service.kubernetes.io/service-proxy-name-"], "")?;
    following.wait("the Service to come back", knows("mine"))?;
    server.kubectl(&["label", "endpointslice", "mine-1", "service.kubernetes.io/headless="], "")?;
    following.wait("the headless slice to go", |heard| !heard.index.snapshot().slices.contains_key(&key("mine")))?;
    server.kubectl(&["label", "endpointslice", "mine-1", "service.kubernetes.io/headless-"], "")?;
    following.wait("the slice to come back", |heard| heard.index.snapshot().slices.contains_key(&key("mine")))?;
    // A6.
    let patch = |patch: &str| server.kubectl(&["patch", "service", "mine", "--type=merge", "-p", patch], "");
    patch(r#"{"spec":{"type":"ExternalName","externalName":"a.example","clusterIP":null,"clusterIPs":null}}"#)?;
    following.wait("the ExternalName to go", lacks("mine"))?;
    patch(r#"{"spec":{"type":"ClusterIP","externalName":null}}"#)?;
    following.wait("the ClusterIP to come", knows("mine"))?;
    for name in ["mine", "headless", "alias"] {
        server.delete("service", name)?;
    }
    server.kubectl(&["delete", "endpointslice", "mine-1", "headless-1", "--wait=false"], "").map(drop)
}

fn pages(server: &ApiServer) -> Result<()> {
    const SLICES: usize = 450;
    let label = ", pages: 'yes'";
    let yaml: String = (0..SLICES).map(|n| slice(&format!("page-{n}"), "pages", label, "10.1.0.5")).collect();
    server.kubectl(&["create", "--validate=false", "-f", "-"], &yaml)?;
    let following = Following::synced(server, None)?;
    let listed =
        following.look(|heard| heard.index.snapshot().slices.get(&key("pages")).map_or(0, |slices| slices.len()));
    ensure!(listed == SLICES, "{listed} slices of {SLICES}");
    let lists = following.look(|heard| heard.events.iter().filter(|event| matches!(event, Event::Slices(_))).count());
    ensure!(lists == 1, "{lists} lists");
    server.kubectl(&["delete", "endpointslices", "-l", "pages=yes", "--wait=false"], "")?;
    following.wait("all to go", |heard| !heard.index.snapshot().slices.contains_key(&key("pages")))
}

fn stale(state: &SourceState) -> bool {
    matches!(state, SourceState::Stale { reason } if reason.contains("cannot reach the API server"))
}

fn resumes(server: &ApiServer) -> Result<()> {
    let relay = Relay::start(server.address())?;
    server.apply(&(service("kept", "") + &service("goner", "")))?;
    let following = Following::synced(server, Some(&relay))?;
    // Watches end every two seconds here: the state must not move meanwhile.
    let watches = relay.accepted();
    let mut states = following.state.clone();
    states.mark_unchanged();
    std::thread::sleep(Duration::from_secs(4));
    ensure!(!states.has_changed()?, "the state flickered to {:?}", *states.borrow());
    ensure!(relay.accepted() - watches < 30, "{} connections in four seconds", relay.accepted() - watches);

    relay.cut();
    following.wait_state(PATIENCE, stale)?;
    ensure!(following.look(knows("goner")), "gone with the connection");
    server.delete("service", "goner")?;
    server.apply(&service("comer", ""))?;
    relay.forward();
    following.wait("what was missed", |heard| knows("comer")(heard) && lacks("goner")(heard))?;
    following.wait_state(PATIENCE, |state| *state == SourceState::Synced)?;
    ensure!(following.look(knows("kept")), "lost");
    ensure!(following.lists() == 1, "{} lists", following.lists());
    for name in ["kept", "comer"] {
        server.delete("service", name)?;
    }
    Ok(())
}

fn killed(server: &mut ApiServer) -> Result<()> {
    server.apply(&(service("kept", "") + &slice("kept-1", "kept", "", "10.1.0.6")))?;
    let following = Following::synced(server, None)?;
    let before = following.look(|heard| heard.index.snapshot().clone());
    server.kill()?;
    following.wait_state(PATIENCE, stale)?;
    std::thread::sleep(Duration::from_secs(1));
    ensure!(following.look(|heard| *heard.index.snapshot() == before), "the outage changed what is known");
    server.restart()?;
    let took = following.wait_state(Duration::from_secs(40), |state| *state == SourceState::Synced)?;
    println!("in step {} ms after the server was", took.as_millis());
    ensure!(
        following.look(|heard| heard.index.snapshot().services == before.services),
        "the return changed what is known"
    );
    server.apply(&slice("kept-1", "kept", "", "10.1.0.7"))?;
    following.wait("a change after the return", |heard| {
        let slice = heard.index.snapshot().slices.get(&key("kept")).and_then(|slices| slices.get("kept-1"));
        slice.is_some_and(|slice| slice.endpoints[0].address.to_string() == "10.1.0.7")
    })?;
    server.delete("service", "kept")?;
    server.delete("endpointslice", "kept-1")
}

/// The API server's cache begins with its start: what happened before, and was not seen, can only be had from a list.
fn relists(server: &mut ApiServer) -> Result<()> {
    let relay = Relay::start(server.address())?;
    server.apply(&(service("kept", "") + &service("goner", "") + &slice("goner-1", "goner", "", "10.1.0.8")))?;
    let following = Following::synced(server, Some(&relay))?;
    relay.cut();
    following.wait_state(PATIENCE, stale)?;
    server.delete("service", "goner")?;
    server.delete("endpointslice", "goner-1")?;
    server.apply(&service("comer", ""))?;
    server.restart()?;
    ensure!(following.look(knows("goner")), "gone before anybody said so");
    relay.forward();
    let patience = Duration::from_secs(40);
    following.wait_state(patience, |state| *state == SourceState::Synced)?;
    following.wait("what was missed", |heard| {
        knows("comer")(heard) && lacks("goner")(heard) && !heard.index.snapshot().slices.contains_key(&key("goner"))
    })?;
    ensure!(following.look(knows("kept")), "lost");
    ensure!(following.lists() == 2, "{} lists", following.lists());
    // Nothing was said to be gone by name: absence from the complete list did it, in one step.
    let gone = following.look(|heard| heard.events.iter().any(|event| matches!(event, Event::ServiceGone(_))));
    ensure!(!gone, "deleted one by one");
    for name in ["kept", "comer"] {
        server.delete("service", name)?;
    }
    Ok(())
}

fn silence(server: &ApiServer) -> Result<()> {
    let relay = Relay::start(server.address())?;
    let following = Following::synced(server, Some(&relay))?;
    relay.stall();
    server.apply(&service("late", ""))?;
    // Two seconds of watch, some grace, and the time a new connection is given to answer.
    following.wait_state(
        Duration::from_secs(40),
        |state| matches!(state, SourceState::Stale { reason } if reason.contains("does not answer")),
    )?;
    relay.forward();
    following.wait_state(Duration::from_secs(40), |state| *state == SourceState::Synced)?;
    following.wait("the change", knows("late"))?;
    server.delete("service", "late")
}
