//! Where objects come from: a Kubernetes API server, or a directory of YAML files. Both say the same thing in the same words:
//! [`model::Event`]s, and a [`SourceState`].
//!
//! A source owns the reading and the slimming of objects, and nothing else: it never decides what a Service means (`plan`
//! does) and never deletes on its own account. Losing the source is a state, not an event: what was known stays known
//! (contract A136) until a *complete* list says otherwise.
//!
//! ```text
//! API server ─ list, watch ─┐
//!                           ├─► api (slim serde types) ─► convert ─► model ─► Event
//! directory ── scan, parse ─┘
//! ```

mod address;
mod api;
mod convert;
mod directory;
mod file;
mod kubernetes;

use std::{path::PathBuf, sync::Arc, time::Duration};

use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

pub use file::File;

use crate::{
    model::{self, SourceState},
    status::requests::{EventCounts, Requests},
};

/// Annotation of a Service that chooses how its backends are chosen: `random` or `round-robin`.
pub const ALGORITHM_ANNOTATION: &str = "proxy-agent/algorithm";

/// Annotation of a Service, a Pod or a Namespace: `node` leaves pods' sockets alone at connect time, so that their packets are translated.
pub const SOCKET_LB_ANNOTATION: &str = "proxy-agent/socket-lb";

/// Annotation of a Service: `true` resets its TCP connections to endpoints that were deleted.
pub const RESET_DELETED_ANNOTATION: &str = "proxy-agent/reset-deleted";

#[derive(Clone, Debug)]
pub struct Options {
    /// The own node's name, as [`node_name`] gives it.
    pub node: String,
    /// Annotations of Pods of this node and of Namespaces are asked for, too.
    pub pods: bool,
    pub input: Input,
}

#[derive(Clone, Debug)]
pub enum Input {
    Kubernetes(KubernetesOptions),
    /// Every `*.yaml`, `*.yml` and `*.json` below it.
    Directory(PathBuf),
}

#[derive(Clone, Debug)]
pub struct KubernetesOptions {
    /// `None`: `KUBECONFIG`, `~/.kube/config`, or the pod's service account, in this order.
    pub kubeconfig: Option<PathBuf>,
    /// Address of the API server in place of the one the kubeconfig names (kube-proxy's `--master`).
    pub server: Option<String>,
    /// A watch is asked to last this long, and given up for dead a little later: how long a connection that silently died can go
    /// unnoticed. The default is a minute.
    pub watch_timeout: Duration,
    /// Where requests are counted.
    pub requests: Arc<Requests>,
}

impl Default for KubernetesOptions {
    fn default() -> Self {
        Self { kubeconfig: None, server: None, watch_timeout: Duration::from_secs(60), requests: Arc::default() }
    }
}

/// Why a source cannot even start. What goes wrong later is a [`SourceState`].
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    #[error("cannot tell this node's name: {0}; give it with --hostname-override")]
    NodeName(String),
    #[error("cannot read the directory {}: {cause}; --source names a directory of YAML files", path.display())]
    Directory { path: PathBuf, cause: String },
    #[error("cannot use {what}: {cause}; --kubeconfig names another, --source reads a directory instead")]
    Config { what: String, cause: String },
    #[error("following the API server ended: {0}")]
    Ended(String),
}

/// The own node's name: the override, else the host's name; trimmed, in lower case (contract A124).
pub fn node_name(hostname_override: Option<&str>) -> Result<String, SourceError> {
    let name = match hostname_override.map(str::trim) {
        Some(name) if !name.is_empty() => name.to_lowercase(),
        _ => rustix::system::uname().nodename().to_string_lossy().trim().to_lowercase(),
    };
    if name.is_empty() { Err(SourceError::NodeName("the host has none".into())) } else { Ok(name) }
}

/// What stands in the place of a password, as Go has it.
const HIDDEN: &str = "xxxxx";

/// An API server's address for others to see: a password in it is meant for the server alone.
pub fn without_password(address: &str) -> String {
    let hidden = || {
        let (scheme, rest) = address.split_at_checked(address.find("://").map_or(0, |at| at + "://".len()))?;
        let (who, _host) = rest.split(['/', '?', '#']).next()?.rsplit_once('@')?;
        let (user, _password) = who.split_once(':')?;
        Some(format!("{scheme}{user}:{HIDDEN}{}", rest.get(who.len()..)?))
    };
    hidden().unwrap_or_else(|| address.to_owned())
}

/// Whether a source could start, as far as that can be told without asking anybody.
pub async fn check(input: &Input) -> Result<(), SourceError> {
    match input {
        Input::Directory(root) => match std::fs::read_dir(root) {
            Ok(_) => Ok(()),
            Err(error) => Err(SourceError::Directory { path: root.clone(), cause: error.to_string() }),
        },
        Input::Kubernetes(options) => kubernetes::check(options).await,
    }
}

/// Runs until cancelled, or until nobody listens to `events` any more. Events come in an order that is safe to apply one by
/// one; the state turns `Synced` only after every event of the first complete lists was handed over.
pub async fn run(
    options: Options,
    events: mpsc::Sender<model::Event>,
    state: watch::Sender<SourceState>,
    cancel: CancellationToken,
) -> Result<(), SourceError> {
    let Options { node, pods, input } = options;
    match input {
        Input::Directory(root) => directory::run(&node, pods, &root, &events, &state, &cancel).await,
        Input::Kubernetes(options) => kubernetes::run(&node, pods, options, events, state, &cancel).await,
    }
}

/// What is left to be said when the agent ends is said within this, or not at all.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Tells users of the cluster what they should hear of this node, until cancelled. A directory has nobody to tell.
pub async fn tell(
    options: Options,
    mut notices: mpsc::Receiver<model::Notice>,
    counts: Arc<EventCounts>,
    cancel: CancellationToken,
) -> Result<(), SourceError> {
    let Options { node, pods: _, input } = options;
    let told = async {
        match input {
            Input::Directory(_) => while notices.recv().await.is_some() {},
            Input::Kubernetes(options) => kubernetes::tell(&node, options, &mut notices, &counts).await,
        }
    };
    let late = async {
        cancel.cancelled().await;
        tokio::time::sleep(LAST_WORDS).await;
    };
    tokio::select! {
        () = told => {}
        () = late => {}
    }
    // A task that ends early ends the process.
    cancel.cancelled().await;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_is_hidden_and_nothing_else() {
        for (address, shown) in [
            ("https://user:pass@10.0.0.1:6443", "https://user:xxxxx@10.0.0.1:6443"),
            ("https://user:p@ss:word@[fd00::1]:6443/a?b=c", "https://user:xxxxx@[fd00::1]:6443/a?b=c"),
            ("user:pass@api:6443", "user:xxxxx@api:6443"),
            ("https://:pass@api", "https://:xxxxx@api"),
            ("https://user:@api", "https://user:xxxxx@api"),
        ] {
            assert_eq!(without_password(address), shown);
        }
        for whole in ["https://10.0.0.1:6443", "https://user@api:6443", "https://api:6443/a:b@c", "[fd00::1]:6443", ""]
        {
            assert_eq!(without_password(whole), whole);
        }
    }
}
