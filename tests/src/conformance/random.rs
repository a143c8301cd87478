//! Services that nobody thought of: made up from a seed, the same ones for everybody. What kube-proxy answers, in both of its modes
//! alike, is what we have to answer.

use std::collections::BTreeMap;

use anyhow::{Context, Result};

use super::{
    lab::{Lab, is_blind, is_nothing, keeps_own, nothing, question, silence},
    services::{At, Service, Via},
    subject::Subject,
};
use crate::{
    pod::{socket::Transport, survey::Question},
    world::{Family, SocketLb},
};

/// Seeds that are always asked. These were the first; none was added for what it found. One that finds something, of a day's or by hand, is added
/// with a word on what that was, in the change that mends it.
const SEEDS: &[u64] = &[1, 2, 3];
/// What their names begin with.
pub const NAME: &str = "seed-";
/// Services of one seed.
const SERVICES: u8 = 8;
/// Number of the first.
const FIRST: u8 = 100;
/// By the number of endpoints, three at most: none of them is missed more often than once in a million times.
const TRIES: [u32; 4] = [4, 10, 22, 40];

const PLACES: [&str; 4] = ["pod", "node", "outside", "other"];

/// What was heard, by who asked what.
pub type Answers = BTreeMap<String, String>;

/// splitmix64
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        usize::try_from(self.next() % n as u64).unwrap_or_default()
    }

    /// True once in `n` times.
    fn once_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    fn one<'a>(&mut self, of: &[&'a str]) -> &'a str {
        of.get(self.below(of.len())).copied().unwrap_or_default()
    }
}

/// Those that are always asked, and `PROXY_CONFORMANCE_SEEDS`.
pub fn seeds() -> Result<Vec<u64>> {
    let further = std::env::var("PROXY_CONFORMANCE_SEEDS").unwrap_or_default();
    let further = further.split(',').filter(|seed| !seed.is_empty()).map(str::parse);
    SEEDS.iter().copied().map(Ok).chain(further).collect::<Result<_, _>>().context("PROXY_CONFORMANCE_SEEDS")
}

/// The Services of every seed.
pub fn services(seeds: &[u64]) -> Result<Vec<Service>> {
    let mut services = Vec::new();
    let mut number = FIRST;
    for &seed in seeds {
        let mut dice = Dice(seed);
        for _ in 0..SERVICES {
            services.push(Service::parse(number, &line(seed, number, &mut dice))?);
            number = number.checked_add(1).context("too many seeds: there are addresses for some twenty")?;
        }
    }
    Ok(services)
}

/// As in the table of [`super::services`].
fn line(seed: u64, number: u8, dice: &mut Dice) -> String {
    let mut what = vec![dice.one(&["ClusterIP", "NodePort", "LoadBalancer", "LoadBalancer"]).to_owned()];
    for (word, n) in [("external", 2), ("eTP", 2), ("iTP", 4)] {
        if dice.once_in(n) {
            what.push(word.to_owned());
        }
    }
    if dice.once_in(6) {
        what.push(dice.one(&["v4", "v6"]).to_owned());
    }
    if dice.once_in(4) {
        let ranges =
            ["192.168.77.100/32,fd00:77::100/128", "192.168.77.0/24", "10.244.0.0/16,fd00:244::/32", "fd00:99::/64"];
        what.push(format!("ranges={}", dice.one(&ranges)));
    }
    if dice.once_in(10) {
        what.push(dice.one(&["ingress=proxy", "ingress=none", "no-node-ports"]).to_owned());
    }
    let mut places = vec!["b1", "b2", "c1", "c2", "a1", "node1", "node2"];
    let endpoints = (0..dice.below(4)).map(|_| {
        let place = places.remove(dice.below(places.len()));
        let condition = dice.one(&["", "", "", ":unready", ":terminating", ":bare"]);
        let hint = dice.one(&["", "", "@zone-a", "@zone-b", "@node1", "@node2"]);
        format!("{place}{condition}{hint}")
    });
    let endpoints = endpoints.collect::<Vec<_>>().join(" ");
    // Where a policy narrows what one way may lead to, whoever is asked by two ways at a time has two answers.
    let narrowed = what.iter().any(|word| matches!(word.as_str(), "eTP" | "iTP"));
    if dice.once_in(4) && !narrowed {
        what.push("affinity=10800".to_owned());
    }
    format!("{NAME}{seed}-{number} | {} | {endpoints}", what.join(" "))
}

fn ways(service: &Service) -> Vec<(&'static str, Via)> {
    let mut ways = vec![("cluster-ip", Via::ClusterIp)];
    if service.kind != "ClusterIP" && service.node_ports {
        ways.push(("node-port", Via::NodePort(At::Node1)));
    }
    if service.kind == "LoadBalancer" {
        ways.push(("lb", Via::LoadBalancer));
    }
    if service.external {
        ways.push(("external-ip", Via::ExternalIp));
    }
    ways
}

/// Asks them all. Each question is of one transport, the other family's of the other one: which is which differs between ways and places.
pub fn ask(lab: &Lab, services: &[Service]) -> Result<Answers> {
    let mut answers = Answers::new();
    for (place, from) in PLACES.into_iter().enumerate() {
        let mut asked: Vec<(String, Family, &Service, Question)> = Vec::new();
        for service in services {
            let number = usize::from(service.number);
            let mut ways: Vec<_> = ways(service).into_iter().enumerate().collect();
            if service.affinity.is_some() {
                // Who asks by two ways at one time is no client that was led somewhere before.
                let which = number % ways.len();
                ways.rotate_left(which);
                ways.truncate(1);
            }
            for (which, (way, via)) in ways {
                for &family in &service.families {
                    let odd = (number + which + place) % 2 == 1;
                    let transport = if odd == (family == Family::V4) { Transport::Tcp } else { Transport::Udp };
                    let to = service.address(&lab.world, via, family, transport);
                    let key = format!("{from} to {} {way} {family} {transport}", service.name);
                    let tries = TRIES[service.endpoints.len().min(3)];
                    asked.push((key, family, service, question(to, transport, tries, silence())));
                }
            }
        }
        let questions: Vec<Question> = asked.iter().map(|(_, _, _, question)| question.clone()).collect();
        for ((key, family, service, _), report) in asked.into_iter().zip(lab.survey(from, &questions)?) {
            answers.insert(key, same_for_all(service, lab.heard(from, family, &report)?));
        }
    }
    Ok(answers)
}

/// With affinity each draws another backend, and the source that it sees depends on it.
fn same_for_all(service: &Service, heard: String) -> String {
    let words: Vec<&str> = heard.split(' ').collect();
    match words[..] {
        [one, "own" | "node"] if service.affinity.is_some() => {
            let endpoint = service.endpoints.iter().find(|endpoint| endpoint.place == one);
            match endpoint.map(|endpoint| endpoint.condition.as_deref()) {
                Some(Some("unready")) | None => heard,
                Some(Some("terminating")) => "always the same one, that terminates".to_owned(),
                Some(_) => "always the same one".to_owned(),
            }
        }
        _ => heard,
    }
}

/// Who stands for kube-proxy where nobody else can be asked: it was compared with kube-proxy elsewhere, and no cases deviate but one.
pub const REFERENCE: Subject = Subject::Ebpf(SocketLb::Node);

/// What all of kube-proxy's modes agree upon. Where one of them cannot tell a refusal from a drop, no more is agreed than that nobody answers.
pub fn agreed(of: &[(Subject, Answers)]) -> Answers {
    let mut modes = of.iter().filter(|(subject, _)| matches!(subject, Subject::KubeProxy(_)));
    let Some((first, answers)) = modes.next() else {
        let reference = of.iter().find(|(subject, _)| *subject == REFERENCE);
        let meant = |(key, heard): (&String, &String)| {
            let from = Asked::of(key).map_or("", |asked| asked.from);
            (key.clone(), nothing(REFERENCE, from, heard).to_owned())
        };
        return reference.map(|(_, answers)| answers.iter().map(meant).collect()).unwrap_or_default();
    };
    let mut agreed = answers.clone();
    for (_, answers) in modes {
        agreed.retain(|key, heard| {
            let Some(other) = answers.get(key) else { return false };
            let blind = Asked::of(key).is_some_and(|asked| is_blind(*first, asked.from));
            if blind
                && is_nothing(heard)
                && is_nothing(other)
                && heard != other
                && (heard == "EPERM" || other == "EPERM")
            {
                "EPERM".clone_into(heard);
                return true;
            }
            heard == other
        });
    }
    agreed
}

/// Answers that are not kube-proxy's, with the Service that they are about.
pub fn differences(
    subject: Subject,
    answers: &Answers,
    agreed: &Answers,
    services: &[Service],
) -> Vec<(String, String)> {
    let mut differences = Vec::new();
    for (key, heard) in answers {
        let Some(wanted) = agreed.get(key) else { continue };
        let asked = Asked::of(key);
        let service = asked.as_ref().and_then(|asked| services.iter().find(|service| service.name == asked.service));
        let same =
            asked.zip(service).is_some_and(|(asked, service)| asked.is_answered(subject, service, heard, wanted));
        if !same {
            differences.push((key.clone(), format!("{heard:?}, agreed: {wanted:?}; {service:?}")));
        }
    }
    differences
}

/// A question by its key.
struct Asked<'a> {
    from: &'a str,
    service: &'a str,
    via: Via,
    family: Family,
}

impl<'a> Asked<'a> {
    fn of(key: &'a str) -> Option<Self> {
        let [from, "to", service, way, family, _] = key.split(' ').collect::<Vec<_>>()[..] else { return None };
        let family = Family::BOTH.into_iter().find(|one| one.to_string() == family)?;
        Some(Self { from, service, via: Via::parse(way).ok()?, family })
    }

    fn is_answered(&self, subject: Subject, service: &Service, heard: &str, wanted: &str) -> bool {
        let Self { from, via, family, .. } = *self;
        if is_nothing(wanted) {
            let heard = nothing(subject, from, heard);
            // Which of the two kube-proxy does was not to be told.
            let blind = heard == "EPERM" && is_blind(subject, from);
            return heard == wanted || blind || wanted == "EPERM" && is_nothing(heard);
        }
        if !keeps_own(subject, from, via, service.filters(via, family)) {
            return heard == wanted;
        }
        let is_source = |word: &str| word.split('+').all(|source| matches!(source, "node" | "own"));
        let wanted: Vec<&str> = wanted.split(' ').map(|word| if is_source(word) { "own" } else { word }).collect();
        heard == wanted.join(" ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn with_affinity_it_is_told_that_it_is_one_and_not_which() {
        let service =
            Service::parse(100, "seed-1-100 | ClusterIP affinity=10800 | b1 b2:terminating c1:unready").unwrap();
        let said = |heard: &str| same_for_all(&service, heard.to_owned());
        assert_eq!(said("b1 own"), said("b1 node"));
        for other in ["b2 own", "b1 b2 own", "c1 own", "c2 own", "refused", "b1 own ECONNRESET"] {
            assert_ne!(said(other), said("b1 own"), "{other}");
        }
        let without = Service { affinity: None, ..service };
        assert_eq!(same_for_all(&without, "b1 own".to_owned()), "b1 own");
    }

    #[test]
    fn a_seed_makes_the_same_services_again() {
        let made = services(SEEDS).unwrap();
        assert_eq!(made, services(SEEDS).unwrap());
        assert!(made.iter().any(|service| service.affinity.is_some()), "affinity is asked");
        assert_ne!(line(1, FIRST, &mut Dice(1)), line(1, FIRST, &mut Dice(2)));
    }

    #[test]
    fn what_is_translated_at_connect_time_is_not_masqueraded_and_nothing_else_is_excused() {
        let service = Service::parse(100, "seed-1-100 | LoadBalancer external ranges=192.168.77.0/24 | b1").unwrap();
        let (all, node) = (Subject::Ebpf(SocketLb::All), Subject::Ebpf(SocketLb::Node));
        let is =
            |subject, key: &str, heard, wanted| Asked::of(key).unwrap().is_answered(subject, &service, heard, wanted);
        for (key, at_connect_time) in [
            ("pod to seed-1-100 cluster-ip v4 tcp", true),
            ("pod to seed-1-100 node-port v4 tcp", true),
            // Of another node; with ranges of this family, and of the other alone (A93).
            ("other to seed-1-100 node-port v4 tcp", false),
            ("pod to seed-1-100 lb v4 tcp", false),
            ("pod to seed-1-100 lb v6 tcp", true),
            ("node to seed-1-100 lb v6 tcp", false),
        ] {
            assert_eq!(is(all, key, "b1 own", "b1 node"), at_connect_time, "{key}");
            assert_eq!(is(all, key, "b1 node", "b1 node"), !at_connect_time, "{key}");
            assert!(is(node, key, "b1 node", "b1 node") && !is(node, key, "b1 own", "b1 node"), "{key}");
        }
        let udp = "node to seed-1-100 cluster-ip v4 udp";
        assert!(is(all, udp, "EPERM", "silent") && is(all, udp, "refused", "EPERM") && is(all, udp, "EPERM", "EPERM"));
        assert!(!is(all, udp, "EPERM", "refused") && !is(all, udp, "b1 node", "EPERM"));
        assert!(!is(all, "pod to seed-1-100 cluster-ip v4 udp", "EPERM", "silent"));
    }

    #[test]
    fn of_two_modes_one_of_which_cannot_tell_no_more_is_taken_than_both_say() {
        use super::super::subject::Mode;
        let key = "node to seed-1-100 cluster-ip v4 udp".to_owned();
        let of = |mode, heard: &str| (Subject::KubeProxy(mode), Answers::from([(key.clone(), heard.to_owned())]));
        for (one, other, both) in [
            ("EPERM", "refused", Some("EPERM")),
            ("silent", "EPERM", Some("EPERM")),
            ("refused", "refused", Some("refused")),
            ("EPERM", "EPERM", Some("EPERM")),
            ("refused", "silent", None),
            ("EPERM", "b1 node", None),
        ] {
            let agreed = agreed(&[of(Mode::Nftables, one), of(Mode::Iptables, other)]);
            assert_eq!(agreed.get(&key).map(String::as_str), both, "{one} {other}");
        }
        // In kube-proxy's absence.
        let of = |subject, heard: &str| (subject, Answers::from([(key.clone(), heard.to_owned())]));
        let agreed = agreed(&[of(Subject::Ebpf(SocketLb::All), "b1 own"), of(REFERENCE, "EPERM")]);
        assert_eq!(agreed.get(&key).map(String::as_str), Some("silent"));
    }
}
