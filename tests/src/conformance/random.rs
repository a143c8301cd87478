//! Services that nobody thought of: made up from a seed, the same ones for everybody. What kube-proxy answers, in both of its modes
//! alike, is what we have to answer.

use std::collections::BTreeMap;

use anyhow::{Context, Result};

use super::{
    lab::{Lab, question},
    services::{At, Service, Via},
    subject::Subject,
};
use crate::{
    pod::{socket::Transport, survey::Question},
    world::Family,
};

/// Seeds that are always asked; one that found something stays here.
const SEEDS: &[u64] = &[1, 2, 3];
/// Services of one seed.
const SERVICES: u8 = 8;
/// Number of the first.
const FIRST: u8 = 100;
/// Of three backends one is missed once in three million times.
const TRIES: u32 = 40;
const SILENCE: u64 = 1600;

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

/// The Services of every seed, `PROXY_CONFORMANCE_SEEDS` among them.
pub fn services() -> Result<Vec<Service>> {
    let further = std::env::var("PROXY_CONFORMANCE_SEEDS").unwrap_or_default();
    let further: Vec<u64> = further
        .split(',')
        .filter(|seed| !seed.is_empty())
        .map(str::parse)
        .collect::<Result<_, _>>()
        .context("PROXY_CONFORMANCE_SEEDS")?;
    let mut services = Vec::new();
    let mut number = FIRST;
    for &seed in SEEDS.iter().chain(&further) {
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
    format!("seed-{seed}-{number} | {} | {endpoints}", what.join(" "))
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

/// Asks them all. IPv4 by one transport and IPv6 by the other, in turn.
pub fn ask(lab: &Lab, services: &[Service]) -> Result<Answers> {
    let mut answers = Answers::new();
    for from in PLACES {
        let mut asked: Vec<(String, Family, Question)> = Vec::new();
        for service in services {
            for (way, via) in ways(service) {
                for &family in &service.families {
                    let odd = service.number % 2 == 1;
                    let transport = if odd == (family == Family::V4) { Transport::Tcp } else { Transport::Udp };
                    let to = service.address(&lab.world, via, family, transport);
                    let key = format!("{from} to {} {way} {family} {transport}", service.name);
                    asked.push((key, family, question(to, transport, TRIES, SILENCE)));
                }
            }
        }
        let questions: Vec<Question> = asked.iter().map(|(_, _, question)| question.clone()).collect();
        for ((key, family, _), report) in asked.into_iter().zip(lab.survey(from, &questions)?) {
            answers.insert(key, lab.heard(from, family, &report)?);
        }
    }
    Ok(answers)
}

/// What all of kube-proxy's modes agree upon.
pub fn agreed(of: &[(Subject, Answers)]) -> Answers {
    let mut modes =
        of.iter().filter(|(subject, _)| matches!(subject, Subject::KubeProxy(_))).map(|(_, answers)| answers);
    let mut agreed = modes.next().cloned().unwrap_or_default();
    for answers in modes {
        agreed.retain(|key, heard| answers.get(key).is_some_and(|other| same(key, heard, other)));
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
        let pod = key.starts_with("pod ") || key.starts_with("other ");
        // Nothing is masqueraded where pods are translated at connect time.
        let own = || format!("{} own", wanted.rsplit_once(' ').map_or(wanted.as_str(), |(backends, _)| backends));
        let unmasqueraded = subject.pods_at_connect_time() && pod && wanted.contains(' ') && *heard == own();
        if !same(key, heard, wanted) && !unmasqueraded {
            let name = key.split(' ').nth(2).unwrap_or_default();
            let service = services.iter().find(|service| service.name == name);
            differences.push((key.clone(), format!("{heard:?}, kube-proxy: {wanted:?}; {service:?}")));
        }
    }
    differences
}

/// On the node's own way out a refused datagram and a dropped one look the same.
fn same(key: &str, one: &str, other: &str) -> bool {
    let nothing = |heard: &str| matches!(heard, "EPERM" | "refused" | "silent");
    one == other || (key.starts_with("node ") && (one == "EPERM" || other == "EPERM") && nothing(one) && nothing(other))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_makes_the_same_services_again() {
        assert_eq!(services().unwrap(), services().unwrap());
        assert_ne!(line(1, FIRST, &mut Dice(1)), line(1, FIRST, &mut Dice(2)));
    }
}
