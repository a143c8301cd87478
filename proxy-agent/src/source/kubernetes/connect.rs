//! The client, and what its errors mean to the one who runs the agent.

use std::{
    error::Error,
    io,
    time::{Duration, Instant},
};

use kube::{
    Client, Config,
    config::{KubeConfigOptions, Kubeconfig},
};
use tokio::sync::Mutex;
use tracing::debug;

use crate::source::{KubernetesOptions, SourceError};

/// A client this young is not made anew: its credentials were just read.
const FRESH: Duration = Duration::from_secs(20);

/// Makes clients from the configuration as it is *now*: certificates and tokens in kubeconfig files are replaced while the
/// agent runs.
pub(super) struct Connector {
    options: KubernetesOptions,
    client: Mutex<(Client, Instant)>,
}

impl Connector {
    pub(super) async fn new(options: KubernetesOptions) -> Result<Self, SourceError> {
        let client = connect(&options).await?;
        Ok(Self { options, client: Mutex::new((client, Instant::now())) })
    }

    pub(super) async fn client(&self) -> Client {
        self.client.lock().await.0.clone()
    }

    /// Reads the configuration again, unless that was done a moment ago. Where it cannot be read, the old client has to do.
    pub(super) async fn renew(&self) {
        let mut held = self.client.lock().await;
        if held.1.elapsed() < FRESH {
            return;
        }
        match connect(&self.options).await {
            Ok(client) => *held = (client, Instant::now()),
            Err(error) => debug!(%error, "the configuration cannot be read again"),
        }
    }
}

async fn connect(options: &KubernetesOptions) -> Result<Client, SourceError> {
    let KubernetesOptions { kubeconfig, server, watch_timeout: _ } = options;
    let wrong = |what: String, error: &(dyn Error + 'static)| SourceError::Config { what, cause: root_cause(error) };
    let mut config = match kubeconfig {
        Some(path) => {
            let what = || format!("the kubeconfig {}", path.display());
            let kubeconfig = Kubeconfig::read_from(path).map_err(|error| wrong(what(), &error))?;
            Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
                .await
                .map_err(|error| wrong(what(), &error))?
        }
        None => Config::infer().await.map_err(|error| {
            let what = "a configuration of the API server (KUBECONFIG, ~/.kube/config, the pod's service account)";
            wrong(what.to_owned(), &error)
        })?,
    };
    if let Some(server) = server {
        config.cluster_url =
            server.parse().map_err(|error| wrong(format!("the API server's address {server:?}"), &error))?;
    }
    config.connect_timeout = Some(Duration::from_secs(10));
    // Trying again is the followers' business: they say so in the state meanwhile.
    config.default_retry = false;
    Client::try_from(config).map_err(|error| wrong("a client for the API server".to_owned(), &error))
}

/// What an error comes down to: the outer layers say "service error", the innermost "connection refused".
fn root_cause(error: &(dyn Error + 'static)) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    // Says "deadline has elapsed" of itself.
    let late = error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::TimedOut);
    if late { "it does not answer".to_owned() } else { error.to_string() }
}

/// Says what went wrong, and what to do where that can be told. `resource`: as RBAC names it.
pub(super) fn reason(error: &kube::Error, resource: &str) -> String {
    match error {
        kube::Error::Api(status) => match status.code {
            401 => format!(
                "the API server does not know us (401 {}): renew the credentials of the kubeconfig or service account",
                status.message
            ),
            403 => format!(
                "the API server refuses (403 {}): grant list and watch of {resource}, as the ClusterRole system:node-proxier does",
                status.message
            ),
            0 => {
                format!("an object of the API server's stream cannot be read {}", status.message).trim_end().to_owned()
            }
            code => format!("the API server answered {code} {}", status.message),
        },
        kube::Error::SerdeError(error) => format!("the API server's answer cannot be read: {error}"),
        error => format!("cannot reach the API server: {}", root_cause(error)),
    }
}

#[cfg(test)]
mod tests {
    use kube::core::Status;

    use super::*;

    #[test]
    fn refusals_name_the_remedy() {
        let error =
            |code| kube::Error::Api(Status::failure("services is forbidden", "Forbidden").with_code(code).boxed());
        let text = reason(&error(403), "services");
        assert!(text.contains("list and watch of services") && text.contains("system:node-proxier"), "{text}");
        assert!(reason(&error(401), "services").contains("credentials"));
        assert!(reason(&error(500), "services").contains("500"));
    }

    #[tokio::test]
    async fn a_kubeconfig_that_is_not_there() {
        let options =
            KubernetesOptions { kubeconfig: Some("/nonexistent/kubeconfig".into()), ..KubernetesOptions::default() };
        let error = Connector::new(options).await.err().unwrap().to_string();
        assert!(error.contains("/nonexistent/kubeconfig") && error.contains("No such file"), "{error}");
    }
}
