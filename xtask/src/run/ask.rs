//! Asks every frontend from everywhere, and judges: answered (or refused, where it must be), by the right backends, in fair
//! shares (or all by one, where a Service asks for affinity).

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    net::{IpAddr, SocketAddr},
};

use anyhow::Result;
use proxy_tests::{
    pod::socket::Transport,
    world::{Ask, Place, World},
};
use serde::Serialize;

use super::expected::{Frontend, Plan};

/// The JSON of `run -o json`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// Everything below is as it should be.
    pub ok: bool,
    pub topology: &'static str,
    /// Packets for Services that reached the default route.
    pub leaks: Vec<String>,
    /// What is wrong with the objects, and what is not asked.
    pub problems: Vec<String>,
    pub frontends: Vec<Asked>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Asked {
    pub service: String,
    #[serde(rename = "type")]
    pub kind: String,
    pub address: String,
    pub port: u16,
    pub protocol: String,
    /// Who asked: `pod`, `node` or `outside`.
    pub from: &'static str,
    pub expected: Expected,
    pub tries: u32,
    /// Answers by backend.
    pub backends: BTreeMap<String, usize>,
    /// Failures by errno.
    pub errors: BTreeMap<String, usize>,
    /// How the backends are to share.
    pub sharing: Sharing,
    /// They shared so, as far as chance goes.
    pub fair: bool,
    pub ok: bool,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Expected {
    /// Exactly these answer.
    Backends(BTreeSet<String>),
    /// Nobody can: ECONNREFUSED.
    Refused,
    /// Somebody could, but not on this node: silence.
    Dropped,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Sharing {
    /// Each as often as any other.
    Fair,
    /// By a hash, or as somebody's affinity comes and goes: any of them.
    Any,
    /// One client, one backend.
    One,
}

/// Affinity that does not end while it is asked for.
const LASTING: u32 = 60;

/// All from node1: a pod on it, itself (if its sockets are served at all), and outside by way of it.
pub fn all(world: &World, plan: &Plan, node_is_served: bool, tries: u32) -> Result<Report> {
    let Plan { frontends, problems } = plan;
    let mut problems: Vec<String> = problems
        .iter()
        .flat_map(|(object, problems)| problems.iter().map(move |problem| format!("{object}: {problem}")))
        .collect();
    let origins = [("pod", world.pod("client")), ("node", &world.node(1).place), ("outside", world.outside())];
    let mut asked = Vec::new();
    for frontend in frontends {
        let transport = match frontend.protocol.as_str() {
            "TCP" => Transport::Tcp,
            "UDP" => Transport::Udp,
            "SCTP" => Transport::Sctp,
            other => {
                problems.push(format!("{}: nobody here can ask over {other}", frontend.service));
                continue;
            }
        };
        for (from, place) in origins {
            // 127.0.0.1 is somebody else wherever else it is asked.
            let elsewhere = frontend.address.is_loopback() && from != "node";
            // No hook sees what the node's own processes send over SCTP.
            let node_is_served = node_is_served && transport != Transport::Sctp;
            if !elsewhere && (node_is_served || from != "node") {
                asked.push(one(world, frontend, transport, from, place, tries)?);
            }
        }
    }
    let leaks = world.leaks()?;
    // Who asked nothing knows nothing.
    let ok = leaks.is_empty() && problems.is_empty() && !asked.is_empty() && asked.iter().all(|asked| asked.ok);
    Ok(Report { ok, topology: world.topology.name(), leaks, problems, frontends: asked })
}

/// The place that has an address.
fn at(world: &World, address: IpAddr) -> Option<&Place> {
    let mut places = world.pods().chain(world.nodes.iter().map(|node| &node.place));
    places.find(|place| [place.v4.into(), place.v6.into()].contains(&address))
}

fn expect(world: &World, frontend: &Frontend, from: &str, place: &Place) -> Expected {
    let Frontend { all, local, verdicts, address, .. } = frontend;
    let verdict = match from {
        "pod" => &verdicts.pod,
        "node" => &verdicts.node,
        _ => &verdicts.external,
    };
    let own: IpAddr = if address.is_ipv4() { place.v4.into() } else { place.v6.into() };
    let backends = match verdict.action.as_str() {
        // What the node itself sends is decided by its verdict.
        "pick-all" | "pick-local" if from != "node" && frontend.shuts_out(own) => return Expected::Dropped,
        "pick-all" => all,
        "pick-local" => local,
        "drop" => return Expected::Dropped,
        // `reject`; and where it is passed on nobody listens.
        _ => return Expected::Refused,
    };
    let name = |backend: &SocketAddr| {
        at(world, backend.ip()).map_or_else(|| backend.ip().to_string(), |place| place.name.clone())
    };
    Expected::Backends(backends.iter().map(name).collect())
}

fn sharing(frontend: &Frontend) -> Sharing {
    match (frontend.affinity_secs, frontend.algorithm.as_str()) {
        (Some(LASTING..), _) => Sharing::One,
        (None, "random" | "round-robin") => Sharing::Fair,
        _ => Sharing::Any,
    }
}

fn one(
    world: &World,
    frontend: &Frontend,
    transport: Transport,
    from: &'static str,
    place: &Place,
    tries: u32,
) -> Result<Asked> {
    let expected = expect(world, frontend, from, place);
    let nobody = |backend: &SocketAddr| at(world, backend.ip()).is_none();
    let (tries, timeout) = match &expected {
        // Each try that leads to an address that nobody has here takes all its time.
        Expected::Backends(_) if frontend.all.iter().any(nobody) => (3, 1000),
        Expected::Backends(backends) => (tries * u32::try_from(backends.len()).unwrap_or(1), 1000),
        // Over IPv6 a refusal per packet may take the client's second SYN.
        Expected::Refused => (3, 3000),
        Expected::Dropped => (2, 250),
    };
    let to = SocketAddr::new(frontend.address, frontend.port);
    let report = world.ask(place, &Ask::new(to, transport).times(tries).timeout(timeout))?;
    let (backends, errors) = (report.backends(), report.errors());
    let sharing = sharing(frontend);
    let all = |errno| backends.is_empty() && errors.keys().eq([errno]);
    let fair = match (sharing, &expected) {
        (Sharing::Fair, Expected::Backends(expected)) => {
            backends.keys().eq(expected) && is_fair(backends.values().copied())
        }
        (Sharing::One, Expected::Backends(_)) => backends.len() == 1,
        _ => true,
    };
    let ok = match &expected {
        Expected::Backends(expected) => {
            errors.is_empty()
                && !backends.is_empty()
                && backends.keys().all(|backend| expected.contains(backend))
                && fair
        }
        Expected::Refused => all("ECONNREFUSED"),
        // Dropped in silence per packet. The node's own sockets are told at connect time, datagrams as behind netfilter.
        Expected::Dropped if from == "node" && transport != Transport::Tcp => all("EPERM"),
        Expected::Dropped => all("ETIMEDOUT"),
    };
    Ok(Asked {
        service: frontend.service.clone(),
        kind: frontend.kind.clone(),
        address: frontend.address.to_string(),
        port: frontend.port,
        protocol: frontend.protocol.clone(),
        from,
        expected,
        tries,
        backends,
        errors,
        sharing,
        fair,
        ok,
    })
}

/// Pearson's chi-square test against equal shares; a fair choice fails it once in a million.
fn is_fair(counts: impl Iterator<Item = usize> + Clone) -> bool {
    #[allow(clippy::cast_precision_loss, reason = "counts of a few thousand")]
    let counts: Vec<f64> = counts.map(|count| count as f64).collect();
    #[allow(clippy::cast_precision_loss, reason = "a handful of backends")]
    let n = counts.len() as f64;
    if n < 2.0 {
        return true;
    }
    let mean = counts.iter().sum::<f64>() / n;
    let chi_square: f64 = counts.iter().map(|count| (count - mean).powi(2) / mean).sum();
    // Wilson and Hilferty's approximation of the quantile; 4.75 standard deviations are one in a million.
    let freedom = n - 1.0;
    let spread = 2.0 / (9.0 * freedom);
    chi_square <= freedom * (1.0 - spread + 4.75 * spread.sqrt()).powi(3)
}

/// What `examples/` has of every kind, over each family. The plan that says what is asked is the product's own: what it forgot would not be
/// missed.
const EXPECTED: [(&str, &str, &[&str]); 4] = [
    ("ClusterIP", "TCP", &["pod", "node", "outside"]),
    ("ClusterIP", "UDP", &["pod", "node", "outside"]),
    ("NodePort", "TCP", &["outside"]),
    ("LoadBalancer", "TCP", &["outside"]),
];

const FAMILIES: [(&str, bool); 2] = [("IPv4", true), ("IPv6", false)];

impl Report {
    /// Of the repository's own objects.
    pub fn requires_every_kind(&mut self) {
        for (kind, protocol, places) in EXPECTED {
            for (from, (family, is_v4)) in places.iter().flat_map(|from| FAMILIES.map(|family| (*from, family))) {
                let is_it = |asked: &Asked| {
                    let of_family = asked.address.parse().is_ok_and(|address: IpAddr| address.is_ipv4() == is_v4);
                    let answered = asked.ok && !asked.backends.is_empty();
                    of_family && answered && (&*asked.kind, &*asked.protocol, asked.from) == (kind, protocol, from)
                };
                if !self.frontends.iter().any(is_it) {
                    self.problems.push(format!(
                        "nobody asking from {from} was answered by a {kind} over {family} and {protocol}"
                    ));
                    self.ok = false;
                }
            }
        }
    }

    pub fn table(&self) -> String {
        let mut rows = vec![["SERVICE", "FRONTEND", "FROM", "ANSWERED BY", ""].map(str::to_owned)];
        for asked in &self.frontends {
            let shares = asked.backends.iter().map(|(name, count)| format!("{name} {count}"));
            let errors = asked.errors.iter().map(|(name, count)| match (name.as_str(), &asked.expected) {
                ("ECONNREFUSED", Expected::Refused) => format!("refused {count}"),
                _ => format!("{name} {count}"),
            });
            rows.push([
                asked.service.clone(),
                format!(
                    "{}/{}",
                    SocketAddr::new(asked.address.parse().unwrap_or([0; 4].into()), asked.port),
                    asked.protocol
                ),
                asked.from.to_owned(),
                shares.chain(errors).collect::<Vec<_>>().join(", "),
                self.verdict(asked),
            ]);
        }
        let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
        let widths = [0, 1, 2, 3].map(width);
        let mut table = String::from("\n");
        for [service, frontend, from, answered, verdict] in &rows {
            let [a, b, c, d] = widths;
            let line = format!("{service:a$}  {frontend:b$}  {from:c$}  {answered:d$}  {verdict}");
            let _ = writeln!(table, "{}", line.trim_end());
        }
        for leak in &self.leaks {
            let _ = writeln!(table, "leaked to the default route: {leak}");
        }
        for problem in &self.problems {
            let _ = writeln!(table, "problem: {problem}");
        }
        let good = self.frontends.iter().filter(|asked| asked.ok).count();
        let _ = writeln!(table, "\n{good} of {} as they should be", self.frontends.len());
        table
    }

    fn verdict(&self, asked: &Asked) -> String {
        if asked.ok {
            return "ok".to_owned();
        }
        match &asked.expected {
            Expected::Backends(expected) if asked.errors.is_empty() && asked.backends.keys().eq(expected) => {
                "UNFAIR".to_owned()
            }
            Expected::Backends(expected) => {
                let one_of = if asked.sharing == Sharing::One { "one of " } else { "" };
                format!("WRONG, expected {one_of}{}", expected.iter().cloned().collect::<Vec<_>>().join(", "))
            }
            Expected::Refused => "WRONG, expected a refusal".to_owned(),
            Expected::Dropped => "WRONG, expected silence".to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::{Asked, EXPECTED, Expected, Report, Sharing, is_fair};

    /// A plan that forgot a kind, a family, a protocol or an origin is not as it should be, however well the rest was answered.
    #[test]
    fn what_was_not_asked_is_missed() {
        let asked: Vec<_> = EXPECTED
            .iter()
            .flat_map(|(kind, protocol, places)| places.iter().map(move |from| (*kind, *protocol, *from)))
            .flat_map(|(kind, protocol, from)| {
                ["10.96.0.1", "fd00:96::1"].map(|address| (kind, protocol, from, address))
            })
            .collect();
        for left_out in 0..=asked.len() {
            let frontends = asked.iter().enumerate().filter(|(i, _)| *i != left_out);
            let frontends = frontends.map(|(_, (kind, protocol, from, address))| Asked {
                service: String::new(),
                kind: (*kind).to_owned(),
                address: (*address).to_owned(),
                port: 80,
                protocol: (*protocol).to_owned(),
                from,
                expected: Expected::Backends(BTreeSet::new()),
                tries: 1,
                backends: BTreeMap::from([("a".to_owned(), 1)]),
                errors: BTreeMap::new(),
                sharing: Sharing::One,
                fair: true,
                ok: true,
            });
            let mut report = Report {
                ok: true,
                topology: "",
                leaks: Vec::new(),
                problems: Vec::new(),
                frontends: frontends.collect(),
            };
            report.requires_every_kind();
            assert_eq!(report.ok, left_out == asked.len(), "{:?}", report.problems);
            assert_eq!(report.problems.len(), usize::from(!report.ok));
        }
    }

    #[test]
    fn even_and_nearly_even_shares_are_fair() {
        assert!(is_fair([60, 60].into_iter()));
        assert!(is_fair([50, 70].into_iter()));
        assert!(is_fair([52, 61, 67].into_iter()));
        assert!(is_fair([7].into_iter()));
    }

    #[test]
    fn lopsided_shares_are_not() {
        assert!(!is_fair([95, 25].into_iter()));
        assert!(!is_fair([120, 0].into_iter()));
        assert!(!is_fair([100, 60, 20].into_iter()));
    }
}
