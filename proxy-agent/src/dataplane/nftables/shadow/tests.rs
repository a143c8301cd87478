//! The text of transactions, put to a table that carries it out as the kernel would.

use std::collections::HashMap;

use proptest::prelude::*;

use super::*;
use crate::{
    dataplane::{netfilter::Options, nftables::Role},
    desired::{Action, Algorithm, Backend, BackendSet, FrontendKind, Verdict, Verdicts},
    model::{Family, Protocol, ServiceKey, ServicePortName},
};

/// A table that takes what nft takes, and refuses what the kernel refuses.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
struct Kernel {
    chains: BTreeMap<String, Vec<String>>,
    elements: BTreeMap<String, BTreeMap<String, String>>,
}

impl Kernel {
    fn run(&mut self, text: &str) {
        for line in text.lines() {
            let words: Vec<&str> = line.splitn(6, ' ').collect();
            let rest = words.get(5).copied().unwrap_or_default();
            match (words[0], words[1]) {
                ("add", "table" | "set" | "map") => {}
                ("add", "chain") => drop(self.chains.entry(words[4].to_owned()).or_default()),
                ("add", "rule") => self.chains.get_mut(words[4]).expect("a chain for the rule").push(rest.to_owned()),
                ("flush", "table") => self.chains.values_mut().for_each(Vec::clear),
                ("flush", "chain") => self.chains.get_mut(words[4]).expect("a chain to flush").clear(),
                ("flush", _) => drop(self.elements.remove(words[4])),
                ("delete", "chain") => {
                    let name = words[4];
                    assert!(!self.refers_to(name), "{name} is in use");
                    assert_eq!(self.chains.remove(name), Some(vec![]), "{name}");
                }
                ("add" | "delete", "element") => self.change(words[0], words[4], rest),
                _ => panic!("{line}"),
            }
        }
        self.elements.retain(|_, elements| !elements.is_empty());
        self.check();
    }

    fn change(&mut self, verb: &str, set: &str, rest: &str) {
        let elements = self.elements.entry(set.to_owned()).or_default();
        for element in rest.strip_prefix("{ ").and_then(|rest| rest.strip_suffix(" }")).expect("braces").split(", ") {
            let (key, value) = element.split_once(" : ").unwrap_or((element, ""));
            let (key, comment) = key.split_once(" comment ").unwrap_or((key, ""));
            if verb == "delete" {
                assert!(elements.remove(key).is_some(), "{key} is not in {set}");
            } else {
                let stood = elements.insert(key.to_owned(), format!("{value}{comment}"));
                assert_eq!(stood, None, "{key} is in {set}");
            }
        }
    }

    fn refers_to(&self, chain: &str) -> bool {
        let goto = format!("goto {chain}");
        let is_it = |text: &str| {
            text.split(" goto ").skip(1).any(|rest| rest.split(['"', ' ']).next() == Some(chain))
                || text.starts_with(&goto) && text[goto.len()..].starts_with(['"', ' '])
        };
        self.chains.values().flatten().any(|rule| is_it(&format!("{rule} ")))
            || self.elements.values().flat_map(HashMapLike::values_of).any(|value| is_it(&format!("{value} ")))
    }

    /// Every way leads somewhere.
    fn check(&self) {
        let rules = self.chains.values().flatten().cloned();
        let values = self.elements.values().flat_map(|elements| elements.values().cloned());
        for text in rules.chain(values) {
            for rest in text.split("goto ").skip(1) {
                let name = rest.split(['"', ' ']).next().unwrap();
                assert!(self.chains.contains_key(name), "{text}: no chain {name}");
            }
        }
    }

    /// As one would have to be asked for in full.
    fn of(shadow: &Shadow) -> Self {
        let mut elements: BTreeMap<String, BTreeMap<String, String>> = BTreeMap::new();
        for ((collection, key), element) in shadow.elements() {
            let comment = element.comment.map(|comment| format!("\"{comment}\"")).unwrap_or_default();
            let value = format!("{}{comment}", element.value.unwrap_or_default());
            elements.entry(collection.name().to_owned()).or_default().insert(key, value);
        }
        let mut chains = shadow.rules();
        chains.extend(shadow.renderer.skeleton().into_iter().map(|(name, _, rules)| (name.to_owned(), rules)));
        Self { chains, elements }
    }
}

trait HashMapLike {
    fn values_of(&self) -> Vec<&String>;
}

impl HashMapLike for BTreeMap<String, String> {
    fn values_of(&self) -> Vec<&String> {
        self.values().collect()
    }
}

fn shadow(family: Family) -> Shadow {
    shadow_as(Role::Whole, family)
}

fn shadow_as(role: Role, family: Family) -> Shadow {
    Shadow::new(Renderer::new(family, role, &Options::default()))
}

fn refill(shadow: &Shadow, items: &[Item], found: &Found) -> (Shadow, String) {
    let mut fresh = shadow.emptied();
    found.chains.iter().for_each(|name| fresh.incarnations.take_up(name));
    let draft = fresh.draft(items);
    let text = fresh.refill(&draft, found, true);
    fresh.refilled(items, draft);
    (fresh, text)
}

fn frontend(family: Family, last: u8, port: u16, protocol: Protocol) -> Frontend {
    let addr = match family {
        Family::V4 => IpAddr::from([10, 96, 0, last]),
        Family::V6 => IpAddr::from([0xfd00, 0x96, 0, 0, 0, 0, 0, u16::from(last)]),
    };
    Frontend { addr, port: port.try_into().unwrap(), protocol }
}

fn backends(family: Family, members: &[u8]) -> BackendSet {
    let backend = |last: &u8| Backend {
        addr: match family {
            Family::V4 => IpAddr::from([10, 244, 1, *last]),
            Family::V6 => IpAddr::from([0xfd00, 0x244, 1, 0, 0, 0, 0, u16::from(*last)]),
        },
        port: 8080.try_into().unwrap(),
    };
    let mut set: Vec<_> = members.iter().map(backend).collect();
    set.sort();
    set.dedup();
    set.into()
}

fn verdict(action: Action, masquerade: bool) -> Verdict {
    Verdict { action, masquerade }
}

fn spec(name: &str, protocol: Protocol, all: BackendSet, local: BackendSet, verdicts: [Verdict; 3]) -> FrontendSpec {
    let [pod, node, external] = verdicts;
    FrontendSpec {
        service: ServicePortName { service: ServiceKey::new("default", name), port: "http".into(), protocol },
        kind: FrontendKind::ClusterIp,
        all,
        local,
        verdicts: Verdicts { pod, node, external },
        algorithm: Algorithm::Random,
        affinity_secs: None,
        source_ranges: None,
        pods_per_packet: false,
        alive: None,
    }
}

/// One of everything, as nft would be given it.
fn example(family: Family) -> Vec<Item> {
    let set = |members: &[u8]| backends(family, members);
    let all = |masquerade| verdict(Action::PickAll, masquerade);
    let local = verdict(Action::PickLocal, false);
    let (drop, reject, pass) =
        (verdict(Action::Drop, false), verdict(Action::Reject, false), verdict(Action::Pass, false));
    let ranges: Arc<[IpNet]> = match family {
        Family::V4 => ["192.0.2.0/24", "198.51.100.7/32"].map(|net| net.parse().unwrap()).into(),
        Family::V6 => ["2001:db8::/64", "2001:db8:1::7/128"].map(|net| net.parse().unwrap()).into(),
    };
    let tcp = Protocol::Tcp;
    let web = spec("web", tcp, set(&[1, 2, 3]), set(&[]), [all(false), all(true), all(true)]);
    let lb = FrontendSpec {
        source_ranges: Some(ranges),
        ..spec("lb", tcp, set(&[1, 2]), set(&[1]), [all(false), drop, local])
    };
    let sticky = FrontendSpec {
        affinity_secs: Some(10_800),
        ..spec("sticky", Protocol::Udp, set(&[4, 5]), set(&[]), [all(false), all(false), all(true)])
    };
    let turns = FrontendSpec {
        algorithm: Algorithm::RoundRobin,
        ..spec("turns", tcp, set(&[1, 2]), set(&[]), [all(false); 3])
    };
    let one =
        |last, protocol, spec: FrontendSpec| Item::Frontend(frontend(family, last, 80, protocol), Some(Arc::new(spec)));
    let cidr = match family {
        Family::V4 => "10.244.1.0/24",
        Family::V6 => "fd00:244:1::/64",
    };
    vec![
        Item::Pods([4, 7].into()),
        Item::LocalCidrs([cidr.parse().unwrap()].into()),
        Item::Guard(frontend(family, 1, 80, tcp).addr, true),
        one(1, tcp, web),
        one(2, tcp, lb),
        one(3, Protocol::Udp, sticky),
        one(4, tcp, turns),
        one(5, Protocol::Sctp, spec("empty", Protocol::Sctp, set(&[]), set(&[]), [reject; 3])),
        one(6, tcp, spec("far", tcp, set(&[]), set(&[]), [drop, pass, drop])),
    ]
}

#[test]
fn one_of_everything() {
    for (role, name) in [(Role::Whole, "refill"), (Role::Gate, "refill_gate")] {
        for family in Family::BOTH {
            let at = frontend(family, 1, 80, Protocol::Tcp).addr;
            let servers = Servers { at: [format!("{at} . 6 . 80")].into(), marks: [0x0102_0300].into() };
            let servers = (role == Role::Gate).then_some(Item::servers(servers));
            let items: Vec<Item> = example(family).into_iter().chain(servers).collect();
            let (filled, text) = refill(&shadow_as(role, family), &items, &Found::default());
            insta::assert_snapshot!(format!("{name}_{}", filled.renderer.ip), text);
            let mut kernel = Kernel::default();
            kernel.run(&text);
            assert_eq!(kernel, Kernel::of(&filled));
        }
    }
}

#[test]
fn a_change_is_what_changed() {
    let family = Family::V4;
    let (mut whole, _) = refill(&shadow(family), &example(family), &Found::default());
    let at = |last, protocol| frontend(family, last, 80, protocol);
    let with = |shadow: &Shadow, of: Frontend, change: &dyn Fn(&mut FrontendSpec)| {
        let mut spec = FrontendSpec::clone(&shadow.frontends[&of]);
        change(&mut spec);
        Item::Frontend(of, Some(Arc::new(spec)))
    };
    let (web, sticky) = (at(1, Protocol::Tcp), at(3, Protocol::Udp));
    let mut steps = Vec::new();
    let mut step = |name: &str, items: Vec<Item>| {
        let draft = whole.draft(&items);
        steps.push(format!("# {name}: {} writes\n{}", draft.writes, draft.text));
        whole.commit(&items, draft);
        whole.clone()
    };
    let now = step("nothing", vec![]);
    let now = step("one backend more", vec![with(&now, web, &|spec| spec.all = backends(family, &[1, 2, 3, 9]))]);
    let now = step("one of affinity less", vec![with(&now, sticky, &|spec| spec.all = backends(family, &[4]))]);
    let now = step("and it is back", vec![with(&now, sticky, &|spec| spec.all = backends(family, &[4, 5]))]);
    step("another time-out", vec![with(&now, sticky, &|spec| spec.affinity_secs = Some(60))]);
    step("the last of its kind", vec![Item::Frontend(at(2, Protocol::Tcp), None)]);
    step("devices, guards", vec![Item::Pods([4, 8].into()), Item::Guard(web.addr, false)]);
    insta::assert_snapshot!("changes", steps.join("\n"));
}

/// All backends, local ones, an action for each origin, what else it is like.
type Service = (Vec<u8>, Vec<u8>, [u8; 3], u8);

/// Numbers of Services, and what they are like.
#[derive(Clone, Debug)]
struct Model {
    services: HashMap<u8, Service>,
    guards: BTreeSet<u8>,
    pods: BTreeSet<u32>,
}

fn models() -> impl Strategy<Value = Model> {
    let members = || proptest::collection::vec(1_u8..6, 0..5);
    let service = (members(), members(), [0_u8..8, 0..8, 0..8], 0_u8..12);
    let services = proptest::collection::hash_map(1_u8..6, service, 0..5);
    let guards = proptest::collection::btree_set(1_u8..6, 0..4);
    let pods = proptest::collection::btree_set(1_u32..6, 0..4);
    (services, guards, pods).prop_map(|(services, guards, pods)| Model { services, guards, pods })
}

fn items(model: &Model) -> Vec<Item> {
    let family = Family::V4;
    let Model { services, guards, pods } = model;
    let mut items = vec![Item::Pods(pods.clone())];
    items.extend((1..6).map(|last| Item::Guard(IpAddr::from([10, 96, 0, last]), guards.contains(&last))));
    for last in 1..6 {
        // Two frontends of one port.
        for port in [80, 8080] {
            let made = services.get(&last).map(|(all, local, verdicts, kind)| {
                let action = |number: u8| match number % 6 {
                    0 | 1 => Action::PickAll,
                    2 => Action::PickLocal,
                    3 => Action::Drop,
                    4 => Action::Reject,
                    _ => Action::Pass,
                };
                let verdicts = verdicts.map(|number| verdict(action(number), number % 2 == 0 && number % 6 < 3));
                let (all, local) = (backends(family, all), backends(family, local));
                let made = spec(&format!("s{last}"), Protocol::Tcp, all, local, verdicts);
                let ranges = [
                    IpNet::new([192, 0, 2, 0].into(), 24).unwrap(),
                    IpNet::new([198, 51, kind / 6, 0].into(), 24).unwrap(),
                ];
                Arc::new(FrontendSpec {
                    algorithm: [Algorithm::Random, Algorithm::RoundRobin][usize::from(kind % 2)],
                    affinity_secs: (kind % 3 == 1).then_some(60 * u32::from(1 + kind / 6)),
                    source_ranges: (kind % 4 == 3).then(|| ranges.into()),
                    ..made
                })
            });
            items.push(Item::Frontend(frontend(family, last, port, Protocol::Tcp), made));
        }
    }
    items
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    /// Whatever is in force, a change leads to what making everything anew would lead to, and once more is nothing.
    #[test]
    fn changes_add_up(models in proptest::collection::vec(models(), 1..6)) {
        let mut shadow = shadow(Family::V4);
        let mut kernel = Kernel::default();
        let (fresh, text) = refill(&shadow, &[], &Found::default());
        kernel.run(&text);
        shadow = fresh;
        for model in &models {
            let items = items(model);
            let draft = shadow.draft(&items);
            kernel.run(&draft.text);
            shadow.commit(&items, draft);
            prop_assert_eq!(&kernel, &Kernel::of(&shadow));
            prop_assert_eq!(shadow.draft(&items).text, "");
            // A restart, over whatever is there.
            let found = Found { chains: kernel.chains.keys().cloned().collect(), ..Found::default() };
            let restarted = Shadow { incarnations: Incarnations::default(), ..shadow.clone() };
            let (again, text) = refill(&restarted, &shadow.items(), &found);
            let mut other = kernel.clone();
            other.run(&text);
            prop_assert_eq!(&other, &kernel);
            prop_assert_eq!(&Kernel::of(&again), &kernel);
        }
    }
}

/// Who is remembered at an endpoint is not any more once it was away, and is through a restart.
#[test]
fn an_endpoint_that_comes_back_is_a_new_one() {
    let family = Family::V4;
    let sticky = |members: &[u8]| {
        let all = verdict(Action::PickAll, false);
        let spec = spec("sticky", Protocol::Tcp, backends(family, members), backends(family, &[]), [all; 3]);
        vec![Item::Frontend(
            frontend(family, 1, 80, Protocol::Tcp),
            Some(Arc::new(FrontendSpec { affinity_secs: Some(60), ..spec })),
        )]
    };
    let endpoints = |shadow: &Shadow| -> BTreeSet<String> {
        shadow.rules().into_keys().filter(|name| endpoint_of(name).is_some()).collect()
    };
    let mut shadow = shadow(family);
    let mut step = |members: &[u8]| {
        let items = sticky(members);
        let draft = shadow.draft(&items);
        shadow.commit(&items, draft);
        (endpoints(&shadow), shadow.clone())
    };
    let (both, _) = step(&[1, 2]);
    let (one, _) = step(&[1]);
    assert!(both.is_superset(&one));
    let (again, now) = step(&[1, 2]);
    let new: Vec<_> = again.difference(&both).collect();
    assert!(new.len() == 1 && new[0].ends_with("-1-60"), "{again:?} after {both:?}");
    let found = Found { chains: now.rules().into_keys().collect(), ..Found::default() };
    let restarted = Shadow { incarnations: Incarnations::from(700), ..now.clone() };
    let (restarted, _) = refill(&restarted, &sticky(&[1, 2]), &found);
    assert_eq!(endpoints(&restarted), again);
    // Gone while there was no agent.
    let (mut restarted, _) = refill(&restarted, &sticky(&[1]), &found);
    let items = sticky(&[1, 2]);
    let draft = restarted.draft(&items);
    restarted.commit(&items, draft);
    let back: Vec<_> = endpoints(&restarted).difference(&again).cloned().collect();
    assert!(back.len() == 1 && back[0].ends_with("-701-60"), "{back:?}");
    // What is remembered of them does not grow with those who were here.
    let mut shadow = now;
    for round in 0..20 {
        for members in [[round, 100], [100, 101]] {
            let items = sticky(&members);
            let draft = shadow.draft(&items);
            shadow.commit(&items, draft);
        }
    }
    assert_eq!(shadow.incarnations.len(), 2);
}

/// What belongs to a Service that cannot be read stays through a start.
#[test]
fn what_is_kept_is_left_alone() {
    let family = Family::V4;
    let (whole, text) = refill(&shadow(family), &example(family), &Found::default());
    let mut kernel = Kernel::default();
    kernel.run(&text);
    let web = Renderer::frontend_key(&frontend(family, 1, 80, Protocol::Tcp));
    let mut stale: BTreeMap<Collection, Vec<String>> = BTreeMap::new();
    for (collection, key) in whole.elements().into_keys() {
        if collection.frontend_of(&key).is_some_and(|frontend| frontend != web) {
            stale.entry(collection).or_default().push(key);
        }
    }
    let found = Found {
        chains: kernel.chains.keys().cloned().collect(),
        kept: [web.clone()].into(),
        stale,
        ..Found::default()
    };
    let before = kernel.clone();
    let (_, text) = refill(&shadow(family), &[], &found);
    kernel.run(&text);
    let of_web = |kernel: &Kernel| -> Vec<String> {
        kernel
            .elements
            .values()
            .flatten()
            .filter(|(key, _)| key.starts_with("10.96.0.1 . "))
            .map(|(key, value)| format!("{key} {value}"))
            .collect()
    };
    assert!(of_web(&before).len() > 4);
    assert_eq!(of_web(&kernel), of_web(&before));
    assert_eq!(kernel.chains["tcp-all-3"], before.chains["tcp-all-3"]);
    assert_eq!(kernel.elements["frontends"].len(), 1);
}
