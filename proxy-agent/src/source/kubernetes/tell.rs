//! Events on Services: what their owners should hear of this node, where they look for it (`kubectl describe service`).
//!
//! The only thing that is ever written to the API server. Nothing depends on it: what cannot be written is in the agent's log and
//! in its status.

use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use kube::{api::PostParams, core::Request};
use serde_json::{Value, json};
use tokio::{sync::mpsc, time::timeout};
use tracing::{debug, warn};

use super::connect::Connector;
use crate::{
    model::{ServiceKey, Warning},
    source::{KubernetesOptions, SourceError},
};

/// As kubectl shows it for the source of an Event.
const CONTROLLER: &str = "proxy-agent";
const ANSWER: Duration = Duration::from_secs(10);

/// Writes what comes until nobody sends any more. The API server is not spoken to before there is something to say.
pub(in crate::source) async fn tell(node: &str, options: KubernetesOptions, warnings: &mut mpsc::Receiver<Warning>) {
    let mut connector = None;
    while let Some(warning) = warnings.recv().await {
        if let Err(why) = post(node, &options, &mut connector, &warning).await {
            warn!(service = %warning.service, reason = warning.reason, "no Event could be written: {why}");
        }
    }
}

async fn post(
    node: &str,
    options: &KubernetesOptions,
    connector: &mut Option<Connector>,
    warning: &Warning,
) -> Result<(), String> {
    let connector = match connector {
        Some(connector) => {
            // Tokens age while nothing happens.
            connector.renew().await;
            connector
        }
        None => {
            connector.insert(Connector::new(options.clone()).await.map_err(|error: SourceError| error.to_string())?)
        }
    };
    let body = event(node, warning, Timestamp::now());
    let path = format!("/apis/events.k8s.io/v1/namespaces/{}/events", warning.service.namespace);
    let request = Request::new(path)
        .create(&PostParams::default(), body.to_string().into_bytes())
        .map_err(|error| error.to_string())?;
    let answer = timeout(ANSWER, connector.client().await.request_text(request)).await;
    answer.map_err(|_| format!("no answer within {} s", ANSWER.as_secs()))?.map_err(|error| error.to_string())?;
    debug!(service = %warning.service, reason = warning.reason, "Event written");
    Ok(())
}

fn event(node: &str, warning: &Warning, now: Timestamp) -> Value {
    let Warning { service: ServiceKey { namespace, name }, uid, reason, action, note } = warning;
    let uid = (!uid.is_empty()).then_some(&**uid);
    json!({
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"namespace": &**namespace, "name": format!("{name}.{:x}", now.as_nanosecond())},
        "eventTime": format!("{now:.6}"),
        "reportingController": CONTROLLER,
        "reportingInstance": instance(node),
        "type": "Warning",
        "reason": reason,
        "action": action,
        "regarding": {"apiVersion": "v1", "kind": "Service", "namespace": &**namespace, "name": &**name, "uid": uid},
        "note": shortened(note),
    })
}

/// The API takes 128 bytes.
fn instance(node: &str) -> String {
    cut(&format!("{CONTROLLER}-{node}"), 128).to_owned()
}

/// The API takes 1024 bytes.
fn shortened(note: &str) -> &str {
    cut(note, 1024)
}

fn cut(text: &str, bytes: usize) -> &str {
    text.get(..text.floor_char_boundary(bytes)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn an_event_says_who_where_and_what() {
        let warning = Warning {
            service: ServiceKey::new("shop", "web"),
            uid: Arc::from("u1"),
            reason: "FailedToStartServiceHealthcheck",
            action: "Listen",
            note: "ä".repeat(2000),
        };
        let event = event("n1", &warning, Timestamp::UNIX_EPOCH);
        assert_eq!(event["regarding"]["uid"], "u1");
        assert_eq!(event["metadata"], json!({"namespace": "shop", "name": "web.0"}));
        assert_eq!(event["eventTime"], "1970-01-01T00:00:00.000000Z");
        assert_eq!(event["reportingInstance"], "proxy-agent-n1");
        assert_eq!(event["note"].as_str().unwrap().len(), 1024);
        assert_eq!(instance(&"n".repeat(250)).len(), 128);
    }
}
