//! Alerts and the dashboard: promtool reads and tries the rules; that they go by metrics that there are, a unit test holds.

use std::path::Path;

use anyhow::{Context as _, Result};

use crate::command::{self, command, output};

pub(super) fn check(promtool: &Path) -> Result<()> {
    let directory = command::root().join("manifests/monitoring");
    for (verb, file) in [("check", "rules.yaml"), ("test", "rules.test.yaml")] {
        output(command(promtool).args([verb, "rules", file]).current_dir(&directory))
            .with_context(|| file.to_owned())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{
        collections::{BTreeMap, BTreeSet},
        fs,
    };

    use serde_json::Value;

    use crate::command;

    /// What `/metrics` answers with everything in it, as the agent's own test keeps it.
    const GOLDEN: &str = "proxy-agent/src/serve/snapshots/proxy_agent__serve__metrics__tests__metrics.snap";
    /// Labels that a scrape adds.
    const SCRAPED: [&str; 2] = ["job", "instance"];

    fn read(path: &str) -> String {
        fs::read_to_string(command::root().join(path)).unwrap()
    }

    type Metrics = BTreeMap<String, BTreeSet<String>>;

    /// Names of samples, and the labels of each.
    fn exported() -> Metrics {
        let golden = read(GOLDEN);
        let mut metrics = Metrics::new();
        let is_sample = |line: &&str| line.starts_with("kubeproxy_") || line.starts_with("proxy_agent_");
        for line in golden.lines().filter(is_sample) {
            let (sample, _) = line.rsplit_once(' ').unwrap();
            let (name, labels) = sample.split_once('{').unwrap_or((sample, ""));
            let labels = labels.split("\",").filter_map(|label| Some(label.split_once("=\"")?.0.to_owned()));
            metrics.entry(name.to_owned()).or_default().extend(labels);
        }
        metrics
    }

    /// Words of an expression outside quotes, each with what stands behind it.
    fn words(expression: &str) -> Vec<(String, String)> {
        let outside: String = expression.split('"').step_by(2).collect::<Vec<_>>().join("\"\"");
        let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
        let mut words = Vec::new();
        let mut rest = outside.as_str();
        while let Some(start) = rest.find(is_word) {
            let from = &rest[start..];
            let end = from.find(|c| !is_word(c)).unwrap_or(from.len());
            words.push((from[..end].to_owned(), from[end..].trim_start().to_owned()));
            rest = &from[end..];
        }
        words
    }

    /// What is wrong with an expression.
    fn wrong(expression: &str, metrics: &Metrics) -> Vec<String> {
        let mut wrong = Vec::new();
        let mut named = 0;
        let labels: BTreeSet<&str> = metrics.values().flatten().map(String::as_str).chain(SCRAPED).collect();
        for (word, behind) in words(expression) {
            if word.starts_with("kubeproxy_") || word.starts_with("proxy_agent_") {
                named += 1;
                let Some(own) = metrics.get(&word) else {
                    wrong.push(format!("there is no {word}"));
                    continue;
                };
                let Some((selectors, _)) = behind.strip_prefix('{').and_then(|rest| rest.split_once('}')) else {
                    continue;
                };
                for (label, behind) in words(selectors) {
                    let is_label = behind.starts_with(['=', '!']);
                    if is_label && !own.contains(&label) && !SCRAPED.contains(&label.as_str()) {
                        wrong.push(format!("{word} has no label {label}"));
                    }
                }
            } else if word == "by" {
                let by = behind.strip_prefix('(').and_then(|rest| rest.split_once(')')).unwrap_or_default().0;
                let unknown = words(by).into_iter().filter(|(label, _)| !labels.contains(label.as_str()));
                wrong.extend(unknown.map(|(label, _)| format!("nothing has a label {label}")));
            }
        }
        if named == 0 && !words(expression).iter().any(|(word, _)| word == "up") {
            wrong.push("it names no metric".to_owned());
        }
        wrong
    }

    /// Every value of this key, at whatever depth.
    fn all<'a>(value: &'a Value, key: &str, found: &mut Vec<&'a str>) {
        match value {
            Value::Object(map) => {
                found.extend(map.get(key).and_then(Value::as_str));
                map.values().for_each(|value| all(value, key, found));
            }
            Value::Array(list) => list.iter().for_each(|value| all(value, key, found)),
            _ => {}
        }
    }

    #[test]
    fn alerts_and_dashboard_go_by_metrics_that_there_are() {
        let metrics = exported();
        assert!(metrics.len() > 30, "{metrics:?}");
        let rules: Value = serde_saphyr::from_str(&read("manifests/monitoring/rules.yaml")).unwrap();
        let dashboard: Value = serde_json::from_str(&read("manifests/monitoring/grafana.json")).unwrap();
        for (document, least) in [(&rules, 10), (&dashboard, 20)] {
            let mut expressions = Vec::new();
            all(document, "expr", &mut expressions);
            assert!(expressions.len() >= least, "{expressions:?}");
            for expression in expressions {
                assert_eq!(wrong(expression, &metrics), Vec::<String>::new(), "{expression}");
            }
        }
    }

    #[test]
    fn what_is_not_exported_is_found() {
        let metrics = exported();
        let is_wrong = |expression: &str| !wrong(expression, &metrics).is_empty();
        assert!(!is_wrong("sum by (state) (proxy_agent_frontends{state=\"by (a)\",job!=\"x\"}) > 0"));
        assert!(!is_wrong("rate(kubeproxy_network_programming_duration_seconds_bucket[5m])"));
        assert!(is_wrong("proxy_agent_frontend > 0"));
        assert!(is_wrong("proxy_agent_frontends{phase=\"pending\"}"));
        assert!(is_wrong("sum by (phase) (proxy_agent_frontends)"));
        assert!(is_wrong("vector(1)"));
    }
}
