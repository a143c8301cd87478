use std::{collections::HashMap, sync::Arc};

use proptest::prelude::*;

use super::{super::render::POD_SERVICES, *};
use crate::{
    dataplane::netfilter::Options,
    desired::{Action, Algorithm, Backend, FrontendKind, FrontendSpec, Verdict, Verdicts},
    model::{Family, Protocol, ServiceKey},
};

/// The kernel, as far as `iptables-restore --noflush` is concerned.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
struct Kernel(BTreeMap<ChainName, Rules>);

impl Kernel {
    fn new() -> Self {
        let built_in = [
            (Table::Nat, "PREROUTING"),
            (Table::Nat, "OUTPUT"),
            (Table::Nat, "POSTROUTING"),
            (Table::Filter, "INPUT"),
            (Table::Filter, "FORWARD"),
            (Table::Filter, "OUTPUT"),
        ];
        Self(built_in.map(|(table, name)| ((table, name.to_owned()), Rules::new())).into())
    }

    /// Refuses what iptables would.
    fn restore(&mut self, text: &str) -> Result<(), String> {
        let mut next = self.0.clone();
        let mut table = None;
        for line in text.lines() {
            let bad = || format!("{line:?} is refused");
            let (verb, rest) = line.split_at_checked(1).ok_or_else(bad)?;
            match verb {
                "*" => table = Some(Table::ALL.into_iter().find(|table| table.name() == rest).ok_or_else(bad)?),
                ":" => {
                    let name = rest.strip_suffix(" - [0:0]").filter(|name| name.len() <= 28).ok_or_else(bad)?;
                    next.insert((table.ok_or_else(bad)?, name.to_owned()), Rules::new());
                }
                "-" => {
                    let (verb, rest) = rest.split_once(' ').ok_or_else(bad)?;
                    let (chain, rule) = rest.split_once(' ').unwrap_or((rest, ""));
                    let key = (table.ok_or_else(bad)?, chain.to_owned());
                    let rules = next.get_mut(&key).ok_or_else(bad)?;
                    match verb {
                        "A" => rules.push(rule.to_owned()),
                        "I" => rules.insert(0, rule.to_owned()),
                        "D" => drop(rules.remove(rules.iter().position(|one| one == rule).ok_or_else(bad)?)),
                        "X" if rules.is_empty() => drop(next.remove(&key)),
                        _ => return Err(bad()),
                    }
                }
                "C" => {
                    Self(next.clone()).check()?;
                    table = None;
                }
                _ => return Err(bad()),
            }
        }
        if table.is_some() {
            return Err("no COMMIT".into());
        }
        self.0 = next;
        Ok(())
    }

    /// Every jump of ours leads somewhere.
    fn check(&self) -> Result<(), String> {
        for ((table, chain), rules) in &self.0 {
            for rule in rules {
                let target = rule.split(' ').skip_while(|word| !matches!(*word, "-j" | "-g")).nth(1).unwrap_or("");
                if target.starts_with(PREFIX) && !self.0.contains_key(&(*table, target.to_owned())) {
                    return Err(format!("{chain}: {rule} leads nowhere"));
                }
            }
        }
        Ok(())
    }

    fn save(&self) -> String {
        let mut text = String::new();
        for table in Table::ALL {
            text += &format!("*{}\n", table.name());
            for (_, chain) in self.0.keys().filter(|(one, _)| *one == table) {
                text += &format!(":{chain} - [0:0]\n");
            }
            for ((_, chain), rules) in self.0.iter().filter(|((one, _), _)| *one == table) {
                for rule in rules {
                    text += &format!("-A {chain} {rule}\n");
                }
            }
            text += "COMMIT\n";
        }
        text
    }
}

fn renderer(family: Family) -> Renderer {
    let Options { masquerade_ports, .. } = Options::default();
    Renderer { family, mark: 0x4000, masquerade_ports, localhost: false, route_localnet: None, liberal: false }
}

fn name(name: &str, protocol: Protocol) -> ServicePortName {
    ServicePortName { service: ServiceKey::new("default", name), port: "http".into(), protocol }
}

fn frontend(addr: &str, port: u16, protocol: Protocol) -> Frontend {
    Frontend { addr: addr.parse().unwrap(), port: port.try_into().unwrap(), protocol }
}

fn backends(addrs: &[&str]) -> Arc<[Backend]> {
    addrs.iter().map(|addr| Backend { addr: addr.parse().unwrap(), port: 8080.try_into().unwrap() }).collect()
}

const fn verdict(action: Action, masquerade: bool) -> Verdict {
    Verdict { action, masquerade }
}

fn spec(service: ServicePortName, all: &[&str], local: &[&str]) -> FrontendSpec {
    let action = if all.is_empty() { Action::Reject } else { Action::PickAll };
    let others = verdict(action, !all.is_empty());
    FrontendSpec {
        service,
        kind: FrontendKind::ClusterIp,
        all: backends(all),
        local: backends(local),
        verdicts: Verdicts { pod: verdict(action, false), node: others, external: others },
        algorithm: Algorithm::Random,
        affinity_secs: None,
        source_ranges: None,
        pods_per_packet: false,
        alive: None,
    }
}

fn unit<const N: usize>(frontends: [(Frontend, FrontendSpec); N]) -> (ServicePortName, Option<Stand>) {
    let service = frontends[0].1.service.clone();
    let unit = frontends.into_iter().map(|(frontend, spec)| (frontend, Arc::new(spec))).collect();
    (service, Some(Stand::Planned(unit)))
}

/// A bit of everything.
fn example(family: Family) -> Vec<Item> {
    let v4 = family == Family::V4;
    let pick = |one: &'static str, other: &'static str| if v4 { one } else { other };
    let (a, b) = (pick("10.244.1.2", "fd00:244:1::2"), pick("10.244.2.3", "fd00:244:2::3"));
    let web_ip = pick("10.96.0.20", "fd00:96::20");
    let balanced = pick("203.0.113.7", "fd00:1b::7");
    let node = pick("192.168.77.1", "fd00:77::1");
    let web = spec(name("web", Protocol::Tcp), &[a, b], &[a]);
    let local = Verdicts {
        pod: verdict(Action::PickAll, false),
        node: verdict(Action::PickAll, true),
        external: verdict(Action::PickLocal, false),
    };
    let cluster = verdict(Action::PickAll, true);
    let everywhere = Verdicts { pod: cluster, node: cluster, external: cluster };
    let range = if v4 { "198.51.100.0/24" } else { "fd00:51::/64" };
    let front = |addr| frontend(addr, 80, Protocol::Tcp);
    let sticky = |kind, verdicts| FrontendSpec {
        kind,
        verdicts,
        affinity_secs: Some(10_800),
        algorithm: Algorithm::RoundRobin,
        ..spec(name("sticky", Protocol::Udp), &[a, b], &[])
    };
    let far = Verdicts { external: verdict(Action::Drop, false), ..local };
    let units = [
        unit([
            (front(web_ip), web.clone()),
            (
                front(balanced),
                FrontendSpec {
                    kind: FrontendKind::LoadBalancer,
                    verdicts: local,
                    source_ranges: Some([range.parse().unwrap()].into()),
                    ..web.clone()
                },
            ),
            (
                frontend(node, 30_080, Protocol::Tcp),
                FrontendSpec { kind: FrontendKind::NodePort, verdicts: everywhere, ..web },
            ),
        ]),
        unit([(front(pick("10.96.0.21", "fd00:96::21")), spec(name("empty", Protocol::Tcp), &[], &[]))]),
        unit([(frontend(node, 30_053, Protocol::Udp), sticky(FrontendKind::NodePort, everywhere))]),
        unit([(
            frontend(node, 30_090, Protocol::Sctp),
            FrontendSpec {
                kind: FrontendKind::NodePort,
                verdicts: far,
                ..spec(name("far", Protocol::Sctp), &[b], &[])
            },
        )]),
    ];
    let guards = [web_ip, pick("10.96.0.21", "fd00:96::21")].map(|addr| Item::Guard(addr.parse().unwrap(), true));
    let others = [Item::Pods(Pods::Devices(["cni0".to_owned()].into())), Item::Health([32_000].into())];
    units.map(|(service, stand)| Item::Unit(service, stand)).into_iter().chain(guards).chain(others).collect()
}

fn everything(shadow: &Shadow) -> String {
    let patch = Patch { set: shadow.chains(), gone: BTreeSet::new() };
    patch.text(&Jumps { stale: Vec::new(), wanted: shadow.renderer.jumps() })
}

#[test]
fn ipv4() {
    let mut shadow = Shadow::new(renderer(Family::V4));
    shadow.turn(example(Family::V4));
    insta::assert_snapshot!(everything(&shadow));
}

#[test]
fn ipv6() {
    let mut shadow = Shadow::new(renderer(Family::V6));
    shadow.turn(example(Family::V6));
    insta::assert_snapshot!(everything(&shadow));
}

#[test]
fn pods_told_by_address_and_node_ports_on_loopback() {
    let mut shadow = Shadow::new(Renderer { localhost: true, route_localnet: Some(0), ..renderer(Family::V4) });
    let node = verdict(Action::PickAll, true);
    let pass = verdict(Action::Pass, false);
    let web = FrontendSpec {
        kind: FrontendKind::NodePort,
        verdicts: Verdicts { pod: pass, node, external: pass },
        ..spec(name("web", Protocol::Tcp), &["10.244.1.2"], &[])
    };
    let (service, stand) = unit([(frontend("127.0.0.1", 30_080, Protocol::Tcp), web)]);
    let cidrs = Item::Pods(Pods::Cidrs(["10.244.1.0/24".parse().unwrap()].into()));
    shadow.turn(vec![Item::Unit(service, stand), cidrs]);
    insta::assert_snapshot!(everything(&shadow));
}

/// An endpoint that comes changes its ServicePort's chain and one list of addresses, a Service one more: of hundreds.
#[test]
fn a_change_is_as_long_as_what_changes() {
    let mut shadow = Shadow::new(renderer(Family::V4));
    let endpoint = |i: u32| std::net::Ipv4Addr::from(0x0af4_0000 + i).to_string();
    let front = |i: u32| frontend(&std::net::Ipv4Addr::from(0x0a60_0000 + i * 7).to_string(), 80, Protocol::Tcp);
    let service = |i: u32, endpoints: &[&str]| {
        let (service, stand) = unit([(front(i), spec(name(&format!("s{i}"), Protocol::Tcp), endpoints, &[]))]);
        Item::Unit(service, stand)
    };
    let services = (0..2000_u32).map(|i| service(i, &[&endpoint(2 * i), &endpoint(2 * i + 1)])).collect();
    shadow.turn(services);
    let longest = shadow.chains().values().map(Vec::len).max().unwrap();
    assert!(longest <= 70, "{longest} rules in a chain");
    let chains = |patch: &Patch| {
        let kind = |(_, chain): &ChainName| chain.split('-').nth(1).unwrap().to_owned();
        (
            patch.set.keys().map(kind).collect::<Vec<_>>().join(" "),
            patch.gone.iter().map(kind).collect::<Vec<_>>().join(" "),
        )
    };
    let more = service(1000, &[&endpoint(2000), &endpoint(2001), &endpoint(4001)]);
    let (patch, _) = shadow.turn(vec![more]);
    assert_eq!(chains(&patch), ("NET SVC".into(), String::new()), "the new endpoint, and who chooses it: {patch:?}");
    assert!(patch.writes() < 70, "{patch:?}");
    let (patch, _) = shadow.turn(vec![Item::Unit(name("s1000", Protocol::Tcp), None)]);
    assert_eq!(chains(&patch), ("NET NET NET".into(), "INT SVC".into()), "{patch:?}");
    assert!(patch.writes() < 200, "{patch:?}");
}

/// An endpoint of several Services may be sent to itself by any of them.
#[test]
fn an_endpoint_is_masqueraded_to_itself_until_no_service_has_it() {
    let mut shadow = Shadow::new(renderer(Family::V4));
    let rules = |shadow: &Shadow| shadow.chains()[&(Table::Nat, "PROXY-HAIRPIN".to_owned())].clone();
    let service = |n: u8, endpoints: &[&str]| {
        let (service, stand) = unit([(
            frontend(&format!("10.96.0.{n}"), 80, Protocol::Tcp),
            spec(name(&format!("s{n}"), Protocol::Tcp), endpoints, &[]),
        )]);
        Item::Unit(service, stand)
    };
    shadow.turn(vec![service(1, &["10.244.1.2", "10.244.1.3"]), service(2, &["10.244.1.2"])]);
    let rule = |addr: &str| format!("-s {addr}/32 -d {addr}/32 -j PROXY-MARK-MASQ");
    let [one, two] = ["10.244.1.2", "10.244.1.3"].map(rule);
    assert_eq!(rules(&shadow), [one.clone(), two.clone()]);
    let (patch, undo) = shadow.turn(vec![service(1, &["10.244.1.3"])]);
    assert_eq!(rules(&shadow), [one.clone(), two.clone()]);
    assert!(!patch.set.contains_key(&(Table::Nat, "PROXY-HAIRPIN".to_owned())), "{patch:?}");
    shadow.turn(vec![Item::Unit(name("s2", Protocol::Tcp), None)]);
    assert_eq!(rules(&shadow), std::slice::from_ref(&two));
    shadow.turn(undo);
    assert_eq!(rules(&shadow), [one, two]);
    shadow.turn(vec![Item::Unit(name("s1", Protocol::Tcp), None)]);
    assert_eq!(rules(&shadow), Rules::new());
}

/// The chance of each endpoint of a list of 1000 is the same to the eighth decimal.
#[test]
fn every_endpoint_is_as_likely_as_the_others() {
    let addrs: Vec<String> = (0..1000_u32).map(|i| std::net::Ipv4Addr::from(0x0af4_0000 + i).to_string()).collect();
    let addrs: Vec<&str> = addrs.iter().map(String::as_str).collect();
    let (_, stand) = unit([(frontend("10.96.0.1", 80, Protocol::Tcp), spec(name("many", Protocol::Tcp), &addrs, &[]))]);
    let Some(Stand::Planned(unit)) = stand else { panic!() };
    let piece = renderer(Family::V4).piece(&unit);
    let (_, rules) = piece.chains.iter().find(|((_, chain), _)| chain.starts_with("PROXY-SVC-")).unwrap();
    let mut left = 1.0;
    for rule in rules {
        let chance = rule
            .split_once("--probability ")
            .map_or(1.0, |(_, rest)| rest.split(' ').next().unwrap().parse::<f64>().unwrap());
        // As the kernel has it.
        let chance = (chance * f64::from(1_u32 << 31)).round() / f64::from(1_u32 << 31);
        assert!((left * chance - 0.001).abs() < 1e-8, "{rule}: {}", left * chance);
        left *= 1.0 - chance;
    }
}

/// Two frontends of a port that do not agree, as no plan has it, do not get each other's backends.
#[test]
fn frontends_that_disagree_have_chains_of_their_own() {
    let service = || name("web", Protocol::Tcp);
    let (_, stand) = unit([
        (frontend("10.96.0.1", 80, Protocol::Tcp), spec(service(), &["10.244.1.2"], &[])),
        (frontend("10.96.0.2", 80, Protocol::Tcp), spec(service(), &["10.244.1.3"], &[])),
    ]);
    let Some(Stand::Planned(unit)) = stand else { panic!() };
    let piece = renderer(Family::V4).piece(&unit);
    let svc = piece.chains.keys().filter(|(_, chain)| chain.starts_with("PROXY-SVC-")).count();
    assert_eq!(svc, 2, "{piece:?}");
}

fn any_action() -> impl Strategy<Value = Action> {
    prop_oneof![
        Just(Action::PickAll),
        Just(Action::PickLocal),
        Just(Action::Drop),
        Just(Action::Reject),
        Just(Action::Pass)
    ]
}

fn any_verdict() -> impl Strategy<Value = Verdict> {
    (any_action(), any::<bool>()).prop_map(|(action, masquerade)| Verdict { action, masquerade })
}

fn any_unit() -> impl Strategy<Value = Item> {
    let endpoints = proptest::collection::btree_set(1..90_u8, 0..8);
    let frontends =
        proptest::collection::btree_map((0..80_u8, 1..3_u16), (any_verdict(), any_verdict(), any_verdict()), 0..4);
    (0..24_u8, frontends, endpoints.clone(), endpoints, proptest::option::of(1..3_u32), any::<bool>()).prop_map(
        |(number, frontends, all, local, affinity_secs, ranges)| {
            let service = name(&format!("s{number}"), Protocol::Tcp);
            let addrs = |set: std::collections::BTreeSet<u8>| -> Arc<[Backend]> {
                set.iter()
                    .map(|i| Backend { addr: [10, 244, 16 * (i % 2), *i].into(), port: 80.try_into().unwrap() })
                    .collect()
            };
            let (all, local) = (addrs(all), addrs(local));
            let unit: Unit = frontends
                .into_iter()
                .map(|((addr, port), (pod, node, external))| {
                    // Two Services never have one frontend: `plan` sees to that.
                    let frontend = frontend(&format!("10.{}.{}.{addr}", 90 + number % 3, number), port, Protocol::Tcp);
                    let spec = FrontendSpec {
                        all: Arc::clone(&all),
                        local: Arc::clone(&local),
                        verdicts: Verdicts { pod, node, external },
                        affinity_secs,
                        source_ranges: ranges.then(|| ["198.51.100.0/24".parse().unwrap()].into()),
                        ..spec(service.clone(), &[], &[])
                    };
                    (frontend, Arc::new(spec))
                })
                .collect();
            let stand = (!unit.is_empty()).then_some(Stand::Planned(unit));
            Item::Unit(service, stand)
        },
    )
}

fn any_items() -> impl Strategy<Value = Vec<Item>> {
    let item = prop_oneof![
        8 => any_unit(),
        4 => (0..24_u8, 0..80_u8, any::<bool>()).prop_map(|(n, addr, wanted)| Item::Guard([10, 90 + n % 3, n, addr].into(), wanted)),
        1 => proptest::collection::btree_set("veth[0-3]", 0..3).prop_map(|names| Item::Pods(Pods::Devices(names))),
        1 => proptest::collection::btree_set(30_000..30_004_u16, 0..3).prop_map(Item::Health),
    ];
    proptest::collection::vec(item, 0..40).prop_map(|items| {
        // One of a kind: later ones count.
        let mut seen = HashMap::new();
        for item in items {
            seen.insert(
                match &item {
                    Item::Unit(service, _) => service.to_string(),
                    Item::Guard(addr, _) => addr.to_string(),
                    Item::Pods(_) => "pods".to_owned(),
                    Item::Health(_) => "health".to_owned(),
                },
                item,
            );
        }
        seen.into_values().collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Changes carried out one after the other lead to what all of it written anew would be; taken back, to what was before; and a
    /// restarted agent, to the same. Nothing of others is touched.
    #[test]
    fn changes_lead_to_the_whole(steps in proptest::collection::vec(any_items(), 1..5)) {
        let mut kernel = Kernel::new();
        kernel.0.get_mut(&(Table::Nat, "PREROUTING".to_owned())).unwrap().push("-j DOCKER-OR-SO".to_owned());
        let untouched = kernel.clone();
        let mut shadow = Shadow::new(renderer(Family::V4));
        kernel.restore(&everything(&shadow)).unwrap();
        let none = Jumps::default();
        for items in steps {
            let before = kernel.clone();
            let (patch, undo) = shadow.turn(items.clone());
            kernel.restore(&patch.text(&none)).unwrap();
            let (back, _) = shadow.turn(undo);
            let mut undone = kernel.clone();
            undone.restore(&back.text(&none)).unwrap();
            prop_assert_eq!(undone, before);
            shadow.turn(items.clone());
            prop_assert_eq!(shadow.turn(items).0, Patch::default(), "the same again is nothing");
            let mut anew = untouched.clone();
            anew.restore(&everything(&shadow)).unwrap();
            prop_assert_eq!(&kernel, &anew);

            let mut saved = super::super::save::Saved::default();
            saved.parse(&kernel.save());
            let set = shadow.chains();
            let gone = saved.names().into_iter().filter(|name| !set.contains_key(name)).collect();
            let jumps = Jumps { stale: saved.jumps.clone(), wanted: shadow.renderer.jumps() };
            kernel.restore(&Patch { set, gone }.text(&jumps)).unwrap();
            prop_assert_eq!(&kernel, &anew, "restarted");
        }
        let mut saved = super::super::save::Saved::default();
        saved.parse(&kernel.save());
        kernel.restore(&removal(saved.names(), saved.jumps)).unwrap();
        prop_assert_eq!(kernel, untouched);
    }
}

/// Nothing is refused that was translated a moment ago, and is by others from now on.
#[test]
fn what_refuses_goes_before_what_translates() {
    let chain = |table| (table, "PROXY-SERVICES".to_owned());
    let jump = |table| (table, "INPUT -j PROXY-SERVICES".to_owned());
    let text = removal(Table::ALL.map(chain).into(), Table::ALL.map(jump).to_vec());
    let tables: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix('*')).collect();
    assert_eq!(tables, ["filter", "nat", "mangle"]);
}

#[test]
fn pods_have_a_list_of_their_own_only_where_it_matters() {
    let mut shadow = Shadow::new(renderer(Family::V4));
    let top = |shadow: &Shadow| shadow.chains()[&(Table::Nat, "PROXY-SERVICES".to_owned())].join("\n");
    let items = example(Family::V4);
    shadow.turn(items[1..2].to_vec());
    assert!(!top(&shadow).contains(PODS));
    shadow.turn(items[..1].to_vec());
    assert!(top(&shadow).contains(PODS));
    assert!(shadow.chains()[&(Table::Nat, POD_SERVICES.to_owned())].len() == 1);
}
