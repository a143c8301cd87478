//! A readable text of a desired state: what golden tests compare and `proxy-agent plan` prints.

use std::fmt;

use crate::desired::{Action, Algorithm, BackendSet, DesiredState, FrontendSpec, Verdict, Verdicts};

/// Prints one block for each frontend, then the guards.
pub struct Dump<'a>(pub &'a DesiredState);

impl fmt::Display for Dump<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let DesiredState { frontends, guards, local_cidrs, left_pods } = self.0;
        for (frontend, spec) in frontends {
            let FrontendSpec {
                service,
                kind,
                all,
                local,
                verdicts,
                algorithm,
                affinity_secs,
                source_ranges,
                pods_per_packet,
                alive,
            } = &**spec;
            let algorithm = match algorithm {
                Algorithm::Random => "random",
                Algorithm::RoundRobin => "round-robin",
                Algorithm::Maglev => "maglev",
                Algorithm::Scheduler => "scheduler",
            };
            write!(f, "{frontend} {kind} {service} {algorithm}")?;
            if let Some(seconds) = affinity_secs {
                write!(f, " affinity={seconds}s")?;
            }
            if let Some(ranges) = source_ranges {
                let ranges: Vec<String> = ranges.iter().map(ToString::to_string).collect();
                write!(f, " from={}", ranges.join(","))?;
            }
            if *pods_per_packet {
                write!(f, " pods-per-packet")?;
            }
            writeln!(f)?;
            let Verdicts { pod, node, external } = *verdicts;
            writeln!(f, "  pod {}, node {}, external {}", text(pod), text(node), text(external))?;
            backends(f, "all", all)?;
            backends(f, "local", local)?;
            // Mostly that is what is chosen.
            if let Some(alive) = alive.as_ref().filter(|alive| *alive != all && *alive != local) {
                backends(f, "alive", alive)?;
            }
        }
        for addr in guards {
            writeln!(f, "guard {addr}")?;
        }
        for cidr in local_cidrs {
            writeln!(f, "pods {cidr}")?;
        }
        for (uid, name) in left_pods.iter().flatten() {
            writeln!(f, "left alone {name} {uid}")?;
        }
        Ok(())
    }
}

fn text(verdict: Verdict) -> &'static str {
    match (verdict.action, verdict.masquerade) {
        (Action::PickAll, false) => "all",
        (Action::PickAll, true) => "all+masquerade",
        (Action::PickLocal, false) => "local",
        (Action::PickLocal, true) => "local+masquerade",
        (Action::Drop, _) => "drop",
        (Action::Reject, _) => "reject",
        (Action::Pass, _) => "pass",
    }
}

fn backends(f: &mut fmt::Formatter<'_>, name: &str, set: &BackendSet) -> fmt::Result {
    if set.is_empty() {
        return Ok(());
    }
    write!(f, "  {name}:")?;
    for backend in set.iter() {
        write!(f, " {backend}")?;
    }
    writeln!(f)
}
