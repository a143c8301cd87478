//! What came of connections while one proxy took another's place, phase by phase: as a table, and whether all went well.

use std::{collections::BTreeMap, fmt, time::Duration};

use crate::pod::{hold, socket::Transport, storm, talk};

/// By what it is judged whether all went well. A connection that is refused, or breaks, is never well.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Bar {
    /// Of a whole cluster with the agent's own settings: some datagrams may be lost, and SYNs be sent again. kube-proxy masquerades with any
    /// port of the node, and now and then it is one that the agent masquerades another flow to the same backend with (docs/migrate.md).
    Cluster,
    /// No datagram is lost; no more SYNs are sent again than by the same storm in the phase `control`, in which nothing changes; and never is
    /// nobody answered for longer than then by more than `gap`.
    Control { phase: &'static str, gap: Duration },
}

/// What [`Bar::Cluster`] lets pass: of one flow's datagrams, and of all flows that have one each.
const LOST: usize = 2;
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
        let mut sums: Vec<(&str, String, [u64; 4], u64)> = Vec::new();
        let mut add = |kind, phase: String, counts: [u64; 4], gap: u64| match sums
            .iter_mut()
            .find(|(of, at, ..)| *of == kind && *at == phase)
        {
            Some((_, _, sum, longest)) => {
                sum.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
                *longest = gap.max(*longest);
            }
            None => sums.push((kind, phase, counts, gap)),
        };
        for Begun { phase, way: _, transport, report } in begun {
            let failed = report.failures.values().chain(report.wrong.values()).sum();
            add(
                if *transport == Transport::Udp { "new UDP" } else { "new TCP" },
                (*phase).to_owned(),
                [report.tries, report.answered, failed, report.sent_again],
                report.gap_micros,
            );
        }
        for one in held {
            let broken = one.broken().count() as u64;
            add("long TCP", one.phases.to_string(), [one.report.connections as u64, one.report.answers, broken, 0], 0);
        }
        for one in talks {
            let (turns, broken) = (one.report.turns.len(), one.lost() as u64);
            add("long UDP", one.phases.to_string(), [1, (turns - one.lost()) as u64, broken, 0], 0);
        }
        let mut text = format!(
            "{:<10}{:<34}{:>12}{:>10}{:>8}{:>12}{:>10}",
            "kind", "phase", "connections", "answers", "broken", "SYNs again", "gap"
        );
        for (kind, phase, [all, answers, broken, again], gap) in sums {
            // Of what is open all the time it is not asked.
            let gap = if gap > 0 { format!("{} ms", gap / 1000) } else { String::new() };
            text += &format!("\n{kind:<10}{phase:<34}{all:>12}{answers:>10}{broken:>8}{again:>12}{gap:>10}");
        }
        text
    }

    /// What went wrong: connections that were refused, or broke, or led to somebody else, and what goes beyond the bar.
    pub fn faults(&self, bar: Bar) -> Vec<String> {
        let Self { begun, held, talks } = self;
        let lost: u64 = begun.iter().map(Begun::lost).sum();
        let (most, of_flow) = if bar == Bar::Cluster { (LOST_FIRST, LOST) } else { (0, 0) };
        let mut faults = Vec::new();
        if lost > most {
            faults.push(format!("{lost} datagrams of new flows were lost"));
        }
        let name = |one: &Begun| format!("{}, {} {}", one.phase, one.way, one.transport);
        faults.extend(
            begun.iter().filter(|one| !one.is_whole()).map(|one| format!("{}: not all were answered", name(one))),
        );
        faults
            .extend(held.iter().filter(|one| !one.is_whole()).map(|one| format!("{}, {}: broke", one.phases, one.way)));
        let talks = talks.iter().filter(|one| !one.is_whole(of_flow));
        faults.extend(talks.map(|one| format!("{}, {} udp: {} datagrams were lost", one.phases, one.way, one.lost())));
        if let Bar::Control { phase, gap } = bar {
            let controls: BTreeMap<_, _> =
                begun.iter().filter(|one| one.phase == phase).map(|one| (one.storm(), &one.report)).collect();
            for one in begun {
                let Some(control) = controls.get(&one.storm()) else {
                    faults.push(format!("{}: there is none in the phase {phase}", name(one)));
                    continue;
                };
                // As many of as many, but for one that a machine with other things to do may lose.
                if one.report.sent_again.saturating_sub(1) * control.tries > control.sent_again * one.report.tries {
                    faults.push(format!("{}: {} SYNs were sent again", name(one), one.report.sent_again));
                }
                let beyond = one.report.gap_micros.saturating_sub(control.gap_micros);
                if Duration::from_micros(beyond) > gap {
                    faults.push(format!("{}: nobody was answered for {} ms", name(one), one.report.gap_micros / 1000));
                }
            }
        }
        faults
    }
}

impl Begun {
    /// Which storm it is, in whichever phase.
    fn storm(&self) -> (&str, String) {
        (&self.way, self.transport.to_string())
    }

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
    fn is_whole(&self, lost: usize) -> bool {
        let answered = self.report.turns.last().is_some_and(|turn| turn.error.is_none());
        self.report.sockets == 1 && answered && self.lost() <= lost
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
        writeln!(
            f,
            "{:<32} {:<38} {:>9} {:>9} {:>9} {:>9} {:>9}",
            "phase", "new connections", "tried", "answered", "failed", "SYN again", "gap (ms)"
        )?;
        for Begun { phase, way, transport, report } in begun {
            let failed: u64 = report.failures.values().sum();
            let way = format!("{way} {transport}");
            writeln!(
                f,
                "{phase:<32} {way:<38} {:>9} {:>9} {failed:>9} {:>9} {:>9}",
                report.tries,
                report.answered,
                report.sent_again,
                report.gap_micros / 1000
            )?;
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
            if !one.is_whole(0) {
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

    const CONTROL: Bar = Bar::Control { phase: "one", gap: Duration::from_secs(2) };

    fn is_clean(observed: &Observed) -> bool {
        observed.faults(Bar::Cluster).is_empty()
    }

    #[test]
    fn what_broke_shows() {
        let lost = Some("ETIMEDOUT");
        let some = talk(1, &[None, lost, None, lost, None]);
        assert!(is_clean(&some) && !some.faults(CONTROL).is_empty());
        assert_eq!(talk(1, &[None, None]).faults(CONTROL), [] as [String; 0]);
        for broken in [talk(2, &[None]), talk(1, &[None, lost]), talk(1, &[None, lost, lost, lost, None]), talk(1, &[])]
        {
            assert!(!is_clean(&broken), "{broken}");
        }
        let begun = |transport, failures: &[(&str, u64)]| {
            let failures = failures.iter().map(|(how, count)| ((*how).to_owned(), *count)).collect();
            let mut observed = Observed::default();
            observed.begun("one", "node".into(), transport, storm::Report { tries: 9, failures, ..Default::default() });
            observed
        };
        assert!(is_clean(&Observed::default()) && is_clean(&begun(Transport::Tcp, &[])));
        let silent = |count| [("receive: ETIMEDOUT", count)];
        let one = begun(Transport::Udp, &silent(1));
        assert!(is_clean(&one) && !one.faults(CONTROL).is_empty());
        for broken in [
            begun(Transport::Tcp, &silent(1)),
            begun(Transport::Udp, &silent(2)),
            begun(Transport::Udp, &[("receive: ECONNREFUSED", 1)]),
        ] {
            assert!(!is_clean(&broken) && broken.to_string().contains("times receive"));
        }
        let held = |broken: &[&str]| {
            let mut observed = Observed::default();
            let broken = broken.iter().map(|&one| one.to_owned()).collect();
            let report = hold::Report { connections: 1, answers: 3, broken, ..Default::default() };
            observed.held(Phases { since: "one", until: "other" }, "pod".into(), report);
            observed
        };
        assert!(is_clean(&held(&[])) && !is_clean(&held(&["connection 0"])));
    }

    /// Of the same storm: who asks, by which way.
    #[test]
    fn a_change_is_compared_with_no_change() {
        let faults = |control: (u64, u64), change: (u64, u64)| {
            let mut observed = Observed::default();
            for (phase, tries, (sent_again, seconds)) in [("one", 100, control), ("other", 200, change)] {
                let gap_micros = seconds * 1_000_000;
                let report = storm::Report { tries, answered: tries, sent_again, gap_micros, ..Default::default() };
                observed.begun(phase, "pod".into(), Transport::Tcp, report);
            }
            assert!(is_clean(&observed));
            observed.faults(CONTROL)
        };
        for (control, change, expected) in [
            ((0, 0), (0, 2), ""),
            ((0, 0), (0, 3), "other, pod tcp: nobody was answered for 3000 ms"),
            ((0, 4), (0, 6), ""),
            ((0, 0), (1, 0), ""),
            ((0, 0), (2, 0), "other, pod tcp: 2 SYNs were sent again"),
            ((1, 0), (3, 0), ""),
            ((1, 0), (4, 0), "other, pod tcp: 4 SYNs were sent again"),
        ] {
            assert_eq!(faults(control, change).join("; "), expected, "{control:?} {change:?}");
        }
        let mut alone = Observed::default();
        let report = storm::Report { tries: 1, answered: 1, ..Default::default() };
        alone.begun("other", "pod".into(), Transport::Tcp, report);
        assert_eq!(alone.faults(CONTROL), ["other, pod tcp: there is none in the phase one"]);
        assert!(alone.sums().contains("SYNs again"));
    }
}
