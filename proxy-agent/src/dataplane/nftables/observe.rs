//! What the kernel holds of our table, as nft lists it.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::{
    super::netfilter::conntrack::{Chain, Structure},
    render::{Collection, Element, Renderer},
    shadow::{Found, Left, Shadow},
};

/// Elements, as they are listed.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Listed {
    pub(super) elements: BTreeMap<(Collection, String), Element>,
}

/// Reads what `nft -j list …` printed; what is of other tables is left out. `None`: it is not what nft prints.
pub(super) fn parse(json: &str, renderer: &Renderer) -> Option<Listed> {
    let (ip, table) = (renderer.ip, renderer.table());
    let document: Value = serde_json::from_str(json).ok()?;
    let mut listed = Listed::default();
    for object in document.get("nftables")?.as_array()? {
        let Some((kind, about)) = object.as_object().and_then(|object| object.iter().next()) else { continue };
        let text = |key: &str| about.get(key).and_then(Value::as_str).unwrap_or_default();
        if text("family") != ip || text("table") != table || !matches!(kind.as_str(), "set" | "map") {
            continue;
        }
        let elements = about.get("elem").and_then(Value::as_array).into_iter().flatten();
        if let Some(collection) = renderer.own_collections().find(|one| one.name() == text("name")) {
            listed.elements.extend(elements.filter_map(|one| element(one, collection)));
        }
    }
    Some(listed)
}

fn element(json: &Value, collection: Collection) -> Option<((Collection, String), Element)> {
    let (key, value) = match json.as_array().map(Vec::as_slice) {
        Some([key, value]) => (key, Some(verdict(value)?)),
        Some(_) => return None,
        None => (json, None),
    };
    let wrapped = key.get("elem");
    let comment = wrapped.and_then(|elem| elem.get("comment")).and_then(Value::as_str).map(str::to_owned);
    let key = wrapped.and_then(|elem| elem.get("val")).unwrap_or(key);
    Some(((collection, expression(key)?), Element { value, comment }))
}

fn verdict(json: &Value) -> Option<String> {
    let object = json.as_object()?;
    let (word, about) = object.iter().next()?;
    match word.as_str() {
        "concat" => expression(json),
        "goto" | "jump" => Some(format!("{word} {}", about.get("target")?.as_str()?)),
        word => Some(word.to_owned()),
    }
}

fn expression(json: &Value) -> Option<String> {
    match json {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Object(_) => {
            if let Some(parts) = json.get("concat").and_then(Value::as_array) {
                return Some(parts.iter().map(expression).collect::<Option<Vec<_>>>()?.join(" . "));
            }
            let prefix = json.get("prefix")?;
            Some(format!("{}/{}", prefix.get("addr")?.as_str()?, prefix.get("len")?))
        }
        _ => None,
    }
}

/// Whether sets, chains and their rules are there, as many as there should be.
pub(super) fn is_structure_of(found: &Structure, shadow: &Shadow) -> bool {
    // What is made anew may have other rules than it was read with.
    let mut wanted = shadow.left.chains.clone();
    wanted.extend(shadow.renderer.skeleton().into_iter().map(|(name, _, rules)| (name.to_owned(), rules.len())));
    wanted.extend(shadow.rules().into_iter().map(|(name, rules)| (name, rules.len())));
    let Structure { chains, sets } = found;
    let as_wanted = if shadow.keeps {
        // Chains of ours that nobody needs stay while there is something that may lead to them.
        wanted.iter().all(|(name, rules)| chains.get(name).is_some_and(|chain| chain.rules == *rules))
    } else {
        chains.len() == wanted.len()
            && chains.iter().zip(&wanted).all(|((name, chain), (other, rules))| name == other && chain.rules == *rules)
    };
    *sets == shadow.renderer.names() && as_wanted
}

impl Listed {
    /// Keys under which something else stands than should.
    pub(super) fn differences(&self, shadow: &Shadow) -> BTreeSet<(Collection, String)> {
        let wanted = shadow.elements();
        // nft shows devices by name, and marks in a way of its own.
        let by_number = [Collection::Pods, Collection::Marks];
        let counts = |(collection, _): &&(Collection, String)| !by_number.contains(collection);
        let keys = wanted.keys().chain(self.elements.keys()).filter(counts);
        // So do addresses.
        let may_stay =
            |key: &(Collection, String)| shadow.keeps && key.0 == Collection::Hairpin && !wanted.contains_key(key);
        let mut differences: BTreeSet<_> =
            keys.filter(|key| !may_stay(key) && wanted.get(*key) != self.elements.get(*key)).cloned().collect();
        for of in by_number {
            let count = |elements: &BTreeMap<(Collection, String), Element>| {
                elements.keys().filter(|(collection, _)| *collection == of).count()
            };
            let is_inherited = of == Collection::Pods && shadow.inherits_pods;
            if !is_inherited && count(&wanted) != count(&self.elements) {
                differences.insert((of, String::new()));
            }
        }
        differences
    }

    /// What must not be touched, because `is_held` says so of the Service that a frontend's comment names, and what may go.
    pub(super) fn found(&self, chains: BTreeMap<String, Chain>, is_held: impl Fn(&str) -> bool) -> Found {
        let of_service = |element: &&Element| {
            let service = element.comment.as_deref().unwrap_or_default();
            is_held(service.split(':').next().unwrap_or_default())
        };
        let is_frontend = |collection| matches!(collection, Collection::Frontends | Collection::NodeFrontends);
        let held =
            self.elements.iter().filter(|((collection, _), element)| is_frontend(*collection) && of_service(element));
        let kept: BTreeSet<String> = held.map(|((_, key), _)| key.clone()).collect();
        let mut stale: BTreeMap<Collection, Vec<String>> = BTreeMap::new();
        let mut left = Left::default();
        let names = chains.keys().cloned().collect();
        if !kept.is_empty() {
            left.chains = chains.into_iter().map(|(name, chain)| (name, chain.rules)).collect();
            for ((collection, key), element) in &self.elements {
                let goes = match (collection.frontend_of(key), collection) {
                    (Some(frontend), _) => !kept.contains(&frontend),
                    (None, Collection::Guards) => {
                        !kept.iter().any(|frontend| frontend.split(" . ").next() == Some(key))
                    }
                    (None, Collection::LocalCidrs | Collection::Servers | Collection::Marks) => true,
                    (None, _) => false,
                };
                if goes {
                    stale.entry(*collection).or_default().push(key.clone());
                } else if !matches!(collection, Collection::Pods | Collection::Hairpin) {
                    left.elements.insert((*collection, key.clone()), element.clone());
                }
            }
        }
        Found { chains: names, kept, stale, left }
    }
}

/// Arguments that list it, in numbers.
pub(super) const fn arguments(renderer: &Renderer) -> [&'static str; 5] {
    ["-jn", "list", "table", renderer.ip, renderer.table()]
}

#[cfg(test)]
mod tests {
    use super::{super::render::Role, *};
    use crate::{
        dataplane::netfilter::Options,
        model::{Family, Protocol},
    };

    #[test]
    fn what_nft_prints_is_understood() {
        let json = r#"{"nftables": [{"metainfo": {"version": "1.0.6"}}, {"table": {"family": "ip", "name": "proxy-agent", "handle": 2}},
            {"map": {"family": "ip", "name": "frontends", "table": "proxy-agent", "map": "verdict", "elem": [
              [{"concat": ["10.96.0.3", 132, 7]}, {"goto": {"target": "refuse"}}], [{"concat": ["10.96.0.2", 17, 53]}, {"drop": null}],
              [{"elem": {"val": {"concat": ["10.96.0.1", 6, 80]}, "comment": "default/web:http"}}, {"goto": {"target": "all-2"}}]]}},
            {"map": {"family": "ip", "name": "tcp-endpoints", "table": "proxy-agent", "elem": [[{"concat": ["10.96.0.1", 80, 0]}, {"concat": ["10.1.0.3", 8080]}]]}},
            {"set": {"family": "ip", "name": "tcp-sources", "table": "proxy-agent", "elem": [{"concat": ["10.96.0.4", 9, {"prefix": {"addr": "10.0.0.0", "len": 8}}]}]}},
            {"set": {"family": "ip", "name": "guards", "table": "proxy-agent", "elem": ["10.96.0.1", "10.96.0.9"]}},
            {"chain": {"family": "ip", "table": "proxy-agent", "name": "all-2", "handle": 8}},
            {"rule": {"family": "ip", "table": "proxy-agent", "chain": "all-2", "handle": 25, "expr": []}},
            {"chain": {"family": "ip", "table": "filter", "name": "all-2", "handle": 8}}]}"#;
        let of = |family| Renderer::new(family, Role::Whole, &Options::default());
        let listed = parse(json, &of(Family::V4)).unwrap();
        let lines: Vec<_> =
            listed.elements.iter().map(|((of, key), one)| format!("{} {}", of.name(), one.text(key))).collect();
        assert_eq!(
            lines,
            [
                "frontends 10.96.0.1 . 6 . 80 comment \"default/web:http\" : goto all-2",
                "frontends 10.96.0.2 . 17 . 53 : drop",
                "frontends 10.96.0.3 . 132 . 7 : goto refuse",
                "tcp-endpoints 10.96.0.1 . 80 . 0 : 10.1.0.3 . 8080",
                "tcp-sources 10.96.0.4 . 9 . 10.0.0.0/8",
                "guards 10.96.0.1",
                "guards 10.96.0.9",
            ]
        );
        let found = listed.found(BTreeMap::new(), |service| service == "default/web");
        assert_eq!(found.kept, ["10.96.0.1 . 6 . 80".to_owned()].into());
        assert_eq!(found.stale[&Collection::Guards], ["10.96.0.9"]);
        assert!(
            !found.stale.contains_key(&Collection::Endpoints(Protocol::Tcp))
                && found.stale[&Collection::Frontends].len() == 2
        );
        assert_eq!(listed.found(BTreeMap::new(), |_| false).stale.len(), 0);
        assert_eq!(parse(json, &of(Family::V6)).unwrap(), Listed::default());
        assert_eq!(parse("nft: error", &of(Family::V4)), None);
    }
}
