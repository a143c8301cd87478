//! The Helm chart: with its own values it gives what the kustomize base gives, and with the values beside each overlay what that gives.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};
use proxy_tests::manifests::{self, BASE};
use serde_json::Value;

use super::{Leave, inspect};
use crate::command::{self, command};

const DIRECTORY: &str = "manifests/chart";

/// Values that mean nothing: each is refused, and the words of the refusal name what is wrong.
const REFUSED: [(&str, &str); 17] = [
    ("uplink[0]=eth0", "uplink"),
    ("image.name=a", "name"),
    ("image.tag=latest", "tag"),
    ("image.digest=sha256:1", "digest"),
    ("image.repository=", "repository"),
    ("mode=IPVS", "mode"),
    ("mountBpffs=maybe", "mountBpffs"),
    ("apiServer.host=https://a", "host"),
    ("apiServer.port=0", "port"),
    ("apiServer.host=a,apiServer.fromKubeProxy=true", "apiServer"),
    ("cgroupRoot=host/cgroup", "cgroupRoot"),
    ("clusterCIDR[0]=10.0.0.0", "clusterCIDR"),
    ("nodePortAddresses={primary,10.0.0.0/8}", "nodePortAddresses"),
    ("logging.format=xml", "format"),
    ("extraArgs[0]=cleanup", "extraArgs"),
    ("resources.limits.cpu=1", "cpu"),
    ("tolerations[0].operator=Any", "operator"),
];

/// One of everything: what comes out of it is held to the same as the overlays.
const EVERYTHING: &str = "image.repository=registry.example/proxy-agent,image.pullPolicy=Always,imagePullSecrets[0].name=a,\
    apiServer.host=192.0.2.1,uplinks={eth0,eth1},devices={eth*},podAnnotations=true,clusterCIDR={10.244.0.0/16,fd00:244::/56},\
    nodePortAddresses={192.0.2.0/24},metrics.bindAddress=0.0.0.0:10249,logging.format=json,logging.level=debug,\
    extraArgs={--masquerade-all},extraEnv[0].name=A,extraEnv[0].value=b,annotations.a=b,maxUnavailable=1";

pub(super) struct Chart {
    pub(super) helm: PathBuf,
}

impl Chart {
    fn template(&self) -> Command {
        let home = command::target_dir().join("helm");
        let mut helm = command(&self.helm);
        // It takes the cluster for an old one unless it is told, or built by those who release it.
        helm.args(["template", "proxy-agent", DIRECTORY, "--namespace=kube-system", "--kube-version=1.36.0"]);
        // Nothing of the user's own.
        for variable in ["HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME"] {
            helm.env(variable, &home);
        }
        helm
    }

    fn objects(&self, args: &[&str]) -> Result<Vec<Value>> {
        manifests::objects(&command::output(self.template().args(args))?)
    }

    /// `expected`: what kustomize makes of the directory.
    pub(super) fn gives_the_same(&self, directory: &str, expected: &[Value]) -> Result<()> {
        let values = format!("--values={directory}/values.yaml");
        let given = if directory == BASE { self.objects(&[]) } else { self.objects(&[&values]) };
        let differences = differences(expected, &given.context("the chart")?)?;
        ensure!(
            differences.is_empty(),
            "the chart gives something else than {directory} (with its values.yaml):\n  {}",
            differences.join("\n  ")
        );
        Ok(())
    }

    /// How many values there are that it refuses.
    pub(super) fn refuses(&self) -> Result<usize> {
        for (values, word) in REFUSED {
            let done = self.template().args(["--set", values]).output().context("start helm")?;
            let said = String::from_utf8_lossy(&done.stderr);
            ensure!(!done.status.success(), "the chart takes {values}");
            ensure!(said.contains(word), "the chart refuses {values} for another reason: {said}");
        }
        Ok(REFUSED.len())
    }

    pub(super) fn takes_everything(&self, help: &str) -> Result<()> {
        let objects = self.objects(&["--set", EVERYTHING]).context("the chart, with everything set")?;
        inspect(&objects, help, Leave::of(BASE)).context("the chart, with everything set")
    }
}

fn by_name(objects: &[Value]) -> Result<BTreeMap<String, &Value>> {
    let mut named = BTreeMap::new();
    for object in objects {
        let name = format!("{} {}", super::text(object, "/kind")?, super::text(object, "/metadata/name")?);
        if named.insert(name.clone(), object).is_some() {
            bail!("{name} is there twice");
        }
    }
    Ok(named)
}

/// What is not the same, each as one line.
fn differences(expected: &[Value], given: &[Value]) -> Result<Vec<String>> {
    let (expected, given) = (by_name(expected)?, by_name(given)?);
    let names: BTreeSet<&String> = expected.keys().chain(given.keys()).collect();
    let mut lines = Vec::new();
    for name in names {
        compare(name, expected.get(name).copied(), given.get(name).copied(), &mut lines);
    }
    Ok(lines)
}

fn compare(at: &str, expected: Option<&Value>, given: Option<&Value>, lines: &mut Vec<String>) {
    match (expected, given) {
        (Some(Value::Object(expected)), Some(Value::Object(given))) => {
            let keys: BTreeSet<&String> = expected.keys().chain(given.keys()).collect();
            for key in keys {
                compare(&format!("{at}/{key}"), expected.get(key), given.get(key), lines);
            }
        }
        (Some(Value::Array(expected)), Some(Value::Array(given))) => {
            for index in 0..expected.len().max(given.len()) {
                compare(&format!("{at}/{index}"), expected.get(index), given.get(index), lines);
            }
        }
        _ if expected == given => {}
        _ => {
            let shown = |value: Option<&Value>| value.map_or("nothing".to_owned(), Value::to_string);
            lines.push(format!("{at}: {} by kustomize, {} by the chart", shown(expected), shown(given)));
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(path: &str) -> String {
        std::fs::read_to_string(command::root().join(path)).unwrap()
    }

    #[test]
    fn what_differs_is_named() {
        let object = |value: Value| [json!({"kind": "K", "metadata": {"name": "n"}, "a": [1, value]})];
        assert_eq!(differences(&object(json!(2)), &object(json!(2))).unwrap(), Vec::<String>::new());
        assert_eq!(
            differences(&object(json!(2)), &object(json!({"b": 3}))).unwrap(),
            ["K n/a/1: 2 by kustomize, {\"b\":3} by the chart"]
        );
        assert_eq!(differences(&object(json!(2)), &[]).unwrap().len(), 1);
    }

    /// Each value is in the schema, each property has a default, and nothing else is taken.
    fn matches(at: &str, values: &Value, schema: &Value) {
        let Some(properties) = schema["properties"].as_object() else { return };
        assert_eq!(schema["additionalProperties"], false, "{at}");
        let values = values.as_object().unwrap_or_else(|| panic!("{at} is no mapping"));
        for (name, value) in values {
            let property = properties.get(name).unwrap_or_else(|| panic!("{at}.{name} is not in the schema"));
            matches(&format!("{at}.{name}"), value, property);
        }
        // What Kubernetes defines has no defaults here; Helm itself passes `global`.
        let left: Vec<_> = properties.keys().filter(|name| !values.contains_key(*name) && *name != "global").collect();
        assert!(left.is_empty() || at.starts_with("values.resources"), "{at}: {left:?} are not in values.yaml");
    }

    #[test]
    fn the_schema_has_all_values_and_no_others() {
        let values: Value = serde_saphyr::from_str(&read("manifests/chart/values.yaml")).unwrap();
        let schema: Value = serde_json::from_str(&read("manifests/chart/values.schema.json")).unwrap();
        matches("values", &values, &schema);
    }

    #[test]
    fn the_chart_is_of_this_version() {
        let chart: Value = serde_saphyr::from_str(&read("manifests/chart/Chart.yaml")).unwrap();
        for field in ["version", "appVersion"] {
            assert_eq!(chart[field], env!("CARGO_PKG_VERSION"), "{field}");
        }
    }
}
