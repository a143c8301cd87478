//! The client, and what its errors mean to the one who runs the agent.

use std::{
    collections::BTreeSet,
    error::Error,
    ffi::{OsStr, OsString},
    io,
    path::PathBuf,
    time::{Duration, Instant},
};

use axum::http::{Uri, uri::Authority};
use kube::{
    Client, Config,
    client::ClientBuilder,
    config::{KubeConfigOptions, Kubeconfig, KubeconfigError},
};
use tokio::sync::Mutex;
use tracing::{debug, warn};

use super::meter::Meter;
use crate::source::{KubernetesOptions, SourceError, without_password};

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
    let config = config(options).await?;
    let host = host(&config.cluster_url);
    let builder = ClientBuilder::try_from(config)
        .map_err(|error: kube::Error| wrong("a client for the API server".to_owned(), &error))?;
    Ok(builder.with_layer(&Meter { requests: options.requests.clone(), host }).build())
}

/// With the port, as it is counted by: it stands among the metrics, and who is asking does not.
fn host(server: &Uri) -> String {
    let authority = server.authority().map(Authority::as_str).unwrap_or_default();
    authority.rsplit('@').next().unwrap_or_default().to_owned()
}

/// What the client is made of. To make one may start a program that brings credentials, and wait for it; this only reads.
pub(super) async fn config(options: &KubernetesOptions) -> Result<Config, SourceError> {
    let KubernetesOptions { kubeconfig, server, watch_timeout: _, requests: _ } = options;
    let mut config = match kubeconfig {
        Some(path) => {
            let what = || format!("the kubeconfig {}", path.display());
            let kubeconfig = Kubeconfig::read_from(path).map_err(|error| wrong(what(), &error))?;
            Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
                .await
                .map_err(|error| wrong(what(), &error))?
        }
        None => infer(std::env::var_os("KUBECONFIG"), std::env::home_dir()).await?,
    };
    if let Some(server) = server {
        let what = || format!("the API server's address {:?}", without_password(server));
        config.cluster_url = server.parse().map_err(|error| wrong(what(), &error))?;
    }
    config.connect_timeout = Some(Duration::from_secs(10));
    // Trying again is the followers' business: they say so in the state meanwhile.
    config.default_retry = false;
    Ok(config)
}

fn wrong(what: String, error: &(dyn Error + 'static)) -> SourceError {
    SourceError::Config { what, cause: root_cause(error) }
}

/// What kubectl would take: the files of `KUBECONFIG`, else `~/.kube/config`, else the pod's service account. kube's own
/// inference goes on to the service account, of whatever cluster, where a kubeconfig is broken or one of several is not there.
async fn infer(variable: Option<OsString>, home: Option<PathBuf>) -> Result<Config, SourceError> {
    match kubeconfig(variable.as_deref(), home)? {
        Some(kubeconfig) => Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
            .await
            .map_err(|error| wrong("the kubeconfig (of KUBECONFIG, or ~/.kube/config)".to_owned(), &error)),
        None => Config::incluster().map_err(|error| {
            let what = "a configuration of the API server (KUBECONFIG, ~/.kube/config, the pod's service account)";
            wrong(what.to_owned(), &error)
        }),
    }
}

/// The kubeconfig files there are, as one; `None` if there are none, or nothing is in them. As kubectl has it: empty names mean
/// nothing, a file that is not there is passed over, the first to say a thing has it, and relative paths inside a file are
/// relative to that file.
fn kubeconfig(variable: Option<&OsStr>, home: Option<PathBuf>) -> Result<Option<Kubeconfig>, SourceError> {
    let variable = variable.filter(|files| !files.is_empty());
    let files: Vec<PathBuf> = match variable {
        Some(files) => std::env::split_paths(files).filter(|file| !file.as_os_str().is_empty()).collect(),
        None => home.map(|home| home.join(".kube/config")).into_iter().collect(),
    };
    let mut merged: Option<Kubeconfig> = None;
    let mut seen = BTreeSet::new();
    for file in &files {
        let what = || format!("the kubeconfig {}", file.display());
        let path = std::path::absolute(file).map_err(|error| wrong(what(), &error))?;
        if !seen.insert(path.clone()) {
            continue;
        }
        let mut next = match Kubeconfig::read_from(&path) {
            Ok(next) => next,
            Err(KubeconfigError::ReadConfig(error, _)) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(wrong(what(), &error)),
        };
        // `current-context: ""` says nothing; the next file may.
        next.current_context = next.current_context.filter(|context| !context.is_empty());
        merged = Some(match merged {
            None => next,
            Some(before) => before.merge(next).map_err(|error| wrong(what(), &error))?,
        });
    }
    if let (Some(files), None) = (variable, &merged) {
        warn!(files = %files.display(), "none of the files of KUBECONFIG is there");
    }
    Ok(merged.filter(|merged| !merged.contexts.is_empty() || !merged.clusters.is_empty()))
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
    async fn whoever_asks_is_not_told_of() {
        let host_of = |server: &str| host(&server.parse().unwrap());
        assert_eq!(host_of("https://user:pass@10.0.0.1:6443/"), "10.0.0.1:6443");
        assert_eq!(host_of("https://[fd00::1]:6443"), "[fd00::1]:6443");
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kubeconfig");
        std::fs::write(&path, config("a", "a", "")).unwrap();
        let server = Some("https://user:pass@no host".to_owned());
        let options = KubernetesOptions { kubeconfig: Some(path), server, ..Default::default() };
        let error = super::config(&options).await.unwrap_err().to_string();
        assert!(error.contains("https://user:xxxxx@no host") && !error.contains("pass"), "{error}");
    }

    fn config(server: &str, context: &str, more: &str) -> String {
        format!(
            "apiVersion: v1\nkind: Config\nclusters: [{{name: {server}, cluster: {{server: \"https://{server}:6443\"{more}}}}}]\n\
             users: [{{name: u, user: {{token: {server}}}}}]\n\
             contexts: [{{name: {server}, context: {{cluster: {server}, user: u}}}}]\ncurrent-context: \"{context}\"\n"
        )
    }

    /// Several files, some of them not there, relative, named twice or empty: as kubectl takes them.
    #[tokio::test]
    async fn files_of_the_environment_are_one_configuration() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::create_dir(path("sub")).unwrap();
        std::fs::write(path("sub/a"), config("a", "", ", certificate-authority: ca.crt")).unwrap();
        std::fs::write(path("b"), config("b", "a", "")).unwrap();
        std::fs::write(path("broken"), "clusters: [").unwrap();
        let text = |files: &[&str]| {
            let files = files.iter().map(|file| if file.is_empty() { PathBuf::new() } else { path(file) });
            std::env::join_paths(files).unwrap()
        };
        let files = text(&["", "absent", "sub/a", "b", "sub/a"]);
        let merged = kubeconfig(Some(&files), None).unwrap().unwrap();
        assert_eq!(merged.current_context.as_deref(), Some("a"));
        assert_eq!(merged.clusters.iter().map(|c| &*c.name).collect::<Vec<_>>(), ["a", "b"]);
        // The first file has the user.
        assert_eq!(merged.auth_infos.len(), 1);
        let authority =
            merged.clusters[0].cluster.as_ref().unwrap().certificate_authority.as_deref().map(PathBuf::from);
        assert_eq!(authority, Some(path("sub/ca.crt")));

        // A relative name is relative to where the agent was started.
        let here = std::env::current_dir().unwrap();
        let up: PathBuf = here.components().skip(1).map(|_| "..").collect();
        let relative = up.join(path("b").strip_prefix("/").unwrap());
        let merged = kubeconfig(Some(relative.as_os_str()), None).unwrap().unwrap();
        assert_eq!(merged.clusters[0].name, "b");

        // What is there but broken is an error, not another cluster.
        let error = infer(Some(text(&["b", "broken"])), None).await.unwrap_err().to_string();
        assert!(error.contains("broken"), "{error}");

        // The variable hides the home's file, also when nothing it names is there.
        std::fs::create_dir_all(path(".kube")).unwrap();
        std::fs::write(path(".kube/config"), config("home", "home", "")).unwrap();
        assert!(kubeconfig(Some(&text(&["absent"])), Some(path(""))).unwrap().is_none());
        for unset in [None, Some(OsStr::new(""))] {
            assert_eq!(kubeconfig(unset, Some(path(""))).unwrap().unwrap().clusters[0].name, "home");
        }
    }

    /// Neither a kubeconfig nor a pod: all ways in are named.
    #[tokio::test]
    async fn nothing_to_go_by() {
        if std::env::var_os("KUBERNETES_SERVICE_HOST").is_some() {
            return println!("SKIP nothing to go by: this is a pod");
        }
        let error = infer(None, None).await.unwrap_err().to_string();
        for way in ["KUBECONFIG", "~/.kube/config", "service account", "--kubeconfig", "--source"] {
            assert!(error.contains(way), "{way} is not in {error}");
        }
        assert!(!error.contains('\n'), "{error}");
    }

    #[tokio::test]
    async fn a_kubeconfig_that_is_not_there() {
        let options =
            KubernetesOptions { kubeconfig: Some("/nonexistent/kubeconfig".into()), ..KubernetesOptions::default() };
        let error = Connector::new(options).await.err().unwrap().to_string();
        assert!(error.contains("/nonexistent/kubeconfig") && error.contains("No such file"), "{error}");
    }
}
