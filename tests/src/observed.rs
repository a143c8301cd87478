//! What came of connections while one proxy took another's place, phase by phase: as a table, and whether all went well.

use std::fmt;

use crate::pod::{hold, socket::Transport, storm, talk};

/// Datagrams of one flow that a machine with much to do may lose.
const LOST: usize = 2;
/// And of all flows that have one each: kube-proxy masquerades with any port of the node, and now and then it is one that the agent masquerades
/// another flow to the same backend with. TCP asks again.
const LOST_FIRST: u64 = 1;

#[derive(Default)]
pub struct Observed {
    begun: Vec<Begun>,
    held: Vec<Held>,
    talks: Vec<Talk>,
}

/// New connections in one phase.
struct Begun {
    phase: &'static str,
    way: String,
    transport: Transport,
    report: storm::Report,
}

/// Connections that were opened in one phase and in use until the end of another.
struct Held {
    phases: Phases,
    way: String,
    report: hold::Report,
}

/// The same, a flow of datagrams.
struct Talk {
    phases: Phases,
    way: String,
    report: talk::Report,
}

#[derive(Clone, Copy)]
pub struct Phases {
    pub since: &'static str,
    pub until: &'static str,
}

impl Observed {
    pub fn begun(&mut self, phase: &'static str, way: String, transport: Transport, report: storm::Report) {
        self.begun.push(Begun { phase, way, transport, report });
    }

    pub fn held(&mut self, phases: Phases, way: String, report: hold::Report) {
        self.held.push(Held { phases, way, report });
    }

    pub fn talk(&mut self, phases: Phases, way: String, report: talk::Report) {
        self.talks.push(Talk { phases, way, report });
    }

    /// All ways together, a line for each phase and kind.
    pub fn sums(&self) -> String {
        let Self { begun, held, talks } = self;
        let mut sums: Vec<(&str, String, [u64; 3])> = Vec::new();
        let mut add = |kind, phase: String, counts: [u64; 3]| match sums
            .iter_mut()
            .find(|(of, at, _)| *of == kind && *at == phase)
        {
            Some((_, _, sum)) => sum.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count),
            None => sums.push((kind, phase, counts)),
        };
        for Begun { phase, way: _, transport, report } in begun {
            let failed = report.failures.values().chain(report.wrong.values()).sum();
            add(
                if *transport == Transport::Udp { "new UDP" } else { "new TCP" },
                (*phase).to_owned(),
                [report.tries, report.answered, failed],
            );
        }
        for one in held {
            let broken = one.broken().count() as u64;
            add("long TCP", one.phases.to_string(), [one.report.connections as u64, one.report.answers, broken]);
        }
        for one in talks {
            let (turns, broken) = (one.report.turns.len(), u64::from(!one.is_whole()));
            add("long UDP", one.phases.to_string(), [1, (turns - one.lost()) as u64, broken]);
        }
        let mut text = format!("{:<10}{:<34}{:>12}{:>10}{:>8}", "kind", "phase", "connections", "answers", "broken");
        for (kind, phase, [all, answers, broken]) in sums {
            text += &format!("\n{kind:<10}{phase:<34}{all:>12}{answers:>10}{broken:>8}");
        }
        text
    }

    /// Whether no connection was refused, or broke, or led to somebody else.
    pub fn is_clean(&self) -> bool {
        let Self { begun, held, talks } = self;
        let lost: u64 = begun.iter().map(Begun::lost).sum();
        begun.iter().all(Begun::is_whole)
            && lost <= LOST_FIRST
            && held.iter().all(Held::is_whole)
            && talks.iter().all(Talk::is_whole)
    }
}

impl Begun {
    /// Datagrams that nobody answered.
    fn lost(&self) -> u64 {
        let silent = self.report.failures.get("receive: ETIMEDOUT").copied().unwrap_or_default();
        if self.transport == Transport::Udp { silent } else { 0 }
    }

    fn is_whole(&self) -> bool {
        let failed: u64 = self.report.failures.values().sum();
        failed == self.lost() && self.report.wrong.is_empty() && self.report.tries > 0
    }
}

impl Held {
    fn broken(&self) -> impl Iterator<Item = &String> {
        self.report.broken.iter().chain(&self.report.wrong)
    }

    fn is_whole(&self) -> bool {
        self.broken().next().is_none() && self.report.answers > 0
    }
}

impl Talk {
    fn lost(&self) -> usize {
        self.report.turns.iter().filter(|turn| turn.error.is_some()).count()
    }

    /// One socket that is answered to the end, by whoever serves.
    fn is_whole(&self) -> bool {
        let answered = self.report.turns.last().is_some_and(|turn| turn.error.is_none());
        self.report.sockets == 1 && answered && self.lost() <= LOST
    }
}

impl fmt::Display for Phases {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} … {}", self.since, self.until)
    }
}

impl fmt::Display for Observed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { begun, held, talks } = self;
        writeln!(f, "{:<32} {:<38} {:>9} {:>9} {:>9}", "phase", "new connections", "tried", "answered", "failed")?;
        for Begun { phase, way, transport, report } in begun {
            let failed: u64 = report.failures.values().sum();
            let way = format!("{way} {transport}");
            writeln!(f, "{phase:<32} {way:<38} {:>9} {:>9} {failed:>9}", report.tries, report.answered)?;
            for (how, count) in report.failures.iter().chain(&report.wrong) {
                writeln!(f, "{:<32}   {count} times {how}", "")?;
            }
            for (at, port, how) in &report.failed {
                writeln!(f, "{:<32}   at {} s from port {}: {how}", "", at / 1_000_000, port.unwrap_or_default())?;
            }
        }
        writeln!(f, "{:<32} {:<38} {:>9} {:>9} {:>9}", "from … to", "long connections", "held", "answers", "broken")?;
        for one in held {
            let Held { phases, way, report } = one;
            let broken = one.broken().count();
            let phases = phases.to_string();
            writeln!(f, "{phases:<32} {way:<38} {:>9} {:>9} {broken:>9}", report.connections, report.answers)?;
            for words in one.broken() {
                writeln!(f, "{:<32}   {words}", "")?;
            }
        }
        if !talks.is_empty() {
            writeln!(f, "{:<32} {:<38} {:>9} {:>9} {:>9}", "from … to", "UDP flows", "sockets", "answers", "lost")?;
        }
        for one in talks {
            let Talk { phases, way, report } = one;
            let (phases, lost) = (phases.to_string(), one.lost());
            let answers = report.turns.len() - lost;
            writeln!(f, "{phases:<32} {way:<38} {:>9} {answers:>9} {lost:>9}", report.sockets)?;
            if !one.is_whole() {
                writeln!(f, "{:<32}   {:?}", "", report.errors())?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn turn(error: Option<&str>) -> talk::Turn {
        let backend = error.is_none().then(|| "b1:8080".to_owned());
        talk::Turn { at: 0, backend, error: error.map(str::to_owned) }
    }

    fn talk(sockets: u32, errors: &[Option<&str>]) -> Observed {
        let mut observed = Observed::default();
        let phases = Phases { since: "one", until: "other" };
        let turns = errors.iter().map(|error| turn(*error)).collect();
        observed.talk(phases, "pod".into(), talk::Report { turns, sockets });
        observed
    }

    #[test]
    fn what_broke_shows() {
        let lost = Some("ETIMEDOUT");
        assert!(talk(1, &[None, lost, None, lost, None]).is_clean());
        for broken in [talk(2, &[None]), talk(1, &[None, lost]), talk(1, &[None, lost, lost, lost, None]), talk(1, &[])]
        {
            assert!(!broken.is_clean(), "{broken}");
        }
        let begun = |transport, failures: &[(&str, u64)]| {
            let failures = failures.iter().map(|(how, count)| ((*how).to_owned(), *count)).collect();
            let mut observed = Observed::default();
            observed.begun("one", "node".into(), transport, storm::Report { tries: 9, failures, ..Default::default() });
            observed
        };
        assert!(Observed::default().is_clean() && begun(Transport::Tcp, &[]).is_clean());
        let silent = |count| [("receive: ETIMEDOUT", count)];
        assert!(begun(Transport::Udp, &silent(1)).is_clean());
        for broken in [
            begun(Transport::Tcp, &silent(1)),
            begun(Transport::Udp, &silent(2)),
            begun(Transport::Udp, &[("receive: ECONNREFUSED", 1)]),
        ] {
            assert!(!broken.is_clean() && broken.to_string().contains("times receive"));
        }
        let held = |broken: &[&str]| {
            let mut observed = Observed::default();
            let broken = broken.iter().map(|&one| one.to_owned()).collect();
            let report = hold::Report { connections: 1, answers: 3, broken, ..Default::default() };
            observed.held(Phases { since: "one", until: "other" }, "pod".into(), report);
            observed
        };
        assert!(held(&[]).is_clean() && !held(&["connection 0"]).is_clean());
    }
}
