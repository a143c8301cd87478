//! What users of the cluster hear of a node: written with the rights of kube-proxy's user, and shown by kubectl.

use anyhow::{Context, Result, ensure};
use proxy_tests::{
    apiserver::User,
    world::{AgentOptions, patience, within},
};
use serde_json::{Value, json};

use super::{Cluster, PATIENCE, service};

/// Room for three entries of each family and Service: two ports and a guard.
const ROOM: u32 = 20;
const NAMES: [&str; 8] = ["e0", "e1", "e2", "e3", "e4", "e5", "e6", "e7"];
const FIRST: u8 = 60;

/// All of one reason: (what they are about, what kubectl goes by, type, note).
fn of(cluster: &Cluster, reason: &str) -> Result<Vec<(String, String, String, String)>> {
    let text = cluster.server.kubectl(&["get", "events.events.k8s.io", "-A", "-o", "json"], "")?;
    let list: Value = serde_json::from_str(&text).context("the list of Events")?;
    let events = list["items"].as_array().context("no items")?.iter().filter(|event| event["reason"] == reason);
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let row = |event: &Value| {
        ensure!(event["reportingController"] == "proxy-agent", "{event:#}");
        let about = &event["regarding"];
        Ok((text(&about["name"]), text(&about["uid"]), text(&event["type"]), text(&event["note"])))
    };
    events.map(row).collect()
}

pub(super) fn told(cluster: &mut Cluster) -> Result<()> {
    cluster.ready()?;
    cluster.world.remove_agents()?;
    let before = of(cluster, "Starting")?.len();
    let kubeconfig = Some(cluster.server.kubeconfig(User::Proxy, cluster.server.address())?);
    // Whoever has the port of the health checks of one Service is there first.
    let node = &cluster.node().place;
    let name = node.name.clone();
    let mut web = service("checked", FIRST - 1);
    web["spec"]["type"] = json!("LoadBalancer");
    web["spec"]["externalTrafficPolicy"] = json!("Local");
    // A NodePort is a frontend for each address of the node.
    web["spec"]["allocateLoadBalancerNodePorts"] = json!(false);
    cluster.apply(&[web])?;
    let path = ["get", "service", "checked", "-o", "jsonpath={.spec.healthCheckNodePort}"];
    let port: u16 = cluster.server.kubectl(&path, "")?.trim().parse().context("healthCheckNodePort")?;
    let taken = node.namespace.enter(|| std::net::TcpListener::bind(("0.0.0.0", port)))??;

    let extra = vec![format!("--map-frontends={ROOM}")];
    let options = AgentOptions { kubeconfig, extra, ..AgentOptions::new(cluster.socket_lb) };
    cluster.world.start_agent(1, &options)?;
    let node = cluster.world.node(1);
    node.wait_ready(PATIENCE)?;
    within(patience(30), || {
        let starting = of(cluster, "Starting")?;
        let (about, uid, kind, note) = starting.last().context("no Event")?;
        ensure!(starting.len() > before, "{starting:?}");
        ensure!((about, uid, kind.as_str()) == (&name, &name, "Normal") && note.contains("mode ebpf"), "{starting:?}");
        let failed = of(cluster, "FailedToStartServiceHealthcheck")?;
        let (about, uid, kind, note) = failed.first().context("no Event on the Service")?;
        ensure!((about.as_str(), kind.as_str()) == ("checked", "Warning") && uid.len() > 8, "{failed:?}");
        ensure!(note.contains("Address already in use"), "{note}");
        Ok(())
    })?;
    drop(taken);

    // More than there is room for, and less again.
    for (number, name) in (FIRST..).zip(NAMES) {
        cluster.create((name, number), &[])?;
    }
    within(patience(30), || {
        let degraded = of(cluster, "FrontendDegraded")?;
        ensure!(!degraded.is_empty(), "{}", node.status()?);
        for (about, uid, kind, note) in &degraded {
            ensure!(NAMES.contains(&about.as_str()) && uid.len() > 8 && kind == "Warning", "{degraded:?}");
            ensure!(note.contains(&name) && note.contains("raise --map-frontends"), "{note}");
        }
        Ok(())
    })?;
    let (stays, ..) = of(cluster, "FrontendDegraded")?.into_iter().next().context("no Event")?;
    for name in NAMES.into_iter().filter(|name| *name != stays) {
        remove(cluster, name)?;
    }
    within(patience(60), || {
        // One of the others may have been in force again for a moment before it went.
        let recovered = of(cluster, "FrontendRecovered")?;
        ensure!(recovered.iter().any(|(about, _, kind, _)| *about == stays && kind == "Normal"), "{recovered:?}");
        Ok(())
    })?;
    ensure!(node.metric("proxy_agent_events_total")? >= 4.0, "Events are not counted");
    remove(cluster, &stays)?;
    cluster.server.delete("service", "checked")?;
    // The other cases go by other options.
    cluster.world.remove_agents()
}

fn remove(cluster: &Cluster, name: &str) -> Result<()> {
    cluster.server.delete("service", name)?;
    ["v4", "v6"].into_iter().try_for_each(|family| cluster.server.delete("endpointslice", &format!("{name}-{family}")))
}
