//! Where the objects are that everybody reads: in an API server; or in files, where none can be had.

use std::{fs, path::PathBuf};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use crate::{
    apiserver::{ApiServer, User},
    world::objects,
};

pub enum Objects {
    Served(ApiServer),
    /// A directory that our agent reads. Nobody looks through what is written there, or completes it.
    Files(PathBuf),
}

impl Objects {
    /// Creates or changes them. A status stays.
    pub fn apply(&self, objects: &[Value]) -> Result<()> {
        match self {
            Self::Served(server) => server.apply(&list(objects)),
            Self::Files(dir) => objects.iter().try_for_each(|object| {
                let mut object = object.clone();
                if object.get("status").is_none()
                    && let Some(status) = read(dir, &object)?.and_then(|known| known.get("status").cloned())
                {
                    object["status"] = status;
                }
                objects::write(dir, &object)
            }),
        }
    }

    /// Changes the statuses of objects that there are, and nothing else of them.
    pub fn apply_status(&self, statuses: &[Value]) -> Result<()> {
        match self {
            _ if statuses.is_empty() => Ok(()),
            Self::Served(server) => server.apply_status(&list(statuses)),
            Self::Files(dir) => statuses.iter().try_for_each(|object| {
                let mut known = read(dir, object)?.context("a status of nothing")?;
                known["status"] = object["status"].clone();
                objects::write(dir, &known)
            }),
        }
    }

    /// What it does not say is gone, too.
    pub fn replace(&self, object: &Value) -> Result<()> {
        match self {
            Self::Served(server) => {
                server.kubectl(&["replace", "--validate=false", "-f", "-"], &object.to_string()).map(drop)
            }
            Self::Files(dir) => objects::write(dir, object),
        }
    }

    pub fn delete(&self, kind: &str, name: &str) -> Result<()> {
        match self {
            Self::Served(server) => server.delete(kind, name),
            Self::Files(dir) => objects::remove(dir, &named(kind, name)),
        }
    }

    pub fn label_node(&self, name: &str, label: &str, value: &str) -> Result<()> {
        match self {
            Self::Served(server) => {
                server.kubectl(&["label", "--overwrite", "node", name, &format!("{label}={value}")], "").map(drop)
            }
            Self::Files(dir) => {
                let mut node = read(dir, &named("node", name))?.context("no such node")?;
                node["metadata"]["labels"][label] = value.into();
                objects::write(dir, &node)
            }
        }
    }

    /// The Events that there are; `None`: nobody takes any.
    pub fn events(&self) -> Result<Option<Value>> {
        let Self::Served(server) = self else { return Ok(None) };
        let events = server.kubectl(&["get", "events.events.k8s.io", "-o", "json"], "")?;
        serde_json::from_str(&events).context("what kubectl printed").map(Some)
    }

    /// The way to the server, as kube-proxy's user.
    pub fn kubeconfig(&self) -> Result<Option<PathBuf>> {
        match self {
            Self::Served(server) => server.kubeconfig(User::Proxy, server.address()).map(Some),
            Self::Files(_) => Ok(None),
        }
    }
}

fn list(objects: &[Value]) -> String {
    json!({"apiVersion": "v1", "kind": "List", "items": objects}).to_string()
}

fn named(kind: &str, name: &str) -> Value {
    json!({"kind": kind, "metadata": {"name": name}})
}

fn read(dir: &std::path::Path, object: &Value) -> Result<Option<Value>> {
    let path = objects::file(dir, object)?;
    match fs::read(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("read {}", path.display())),
        Ok(bytes) => serde_json::from_slice(&bytes).with_context(|| path.display().to_string()).map(Some),
    }
}
