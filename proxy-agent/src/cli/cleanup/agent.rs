//! The agent that is at work here, wherever its pins are; and whether kube-proxy's rules may go for it.

use std::{
    fmt,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use crate::{
    cli::agent,
    config::{Bind, METRICS_PORT},
    dataplane::{
        DataplaneError,
        ebpf::read::{self, Pins},
        netfilter::lock::Lock,
        select::Mode,
    },
    status::report::{FrontendCount, Report, Source},
};

/// A change of a Service may be on its way into the kernel.
const PATIENCE: Duration = Duration::from_secs(5);
const AGAIN: Duration = Duration::from_millis(200);

/// In words, if one is: on these pins or on others, or in a mode that has none.
pub(super) fn at_work(bpffs: &Path) -> Option<String> {
    if let Some(agent) = on(bpffs) {
        return Some(agent);
    }
    match Lock::take() {
        Err(DataplaneError::Unavailable(_)) => {}
        _ => return None,
    }
    let elsewhere = read::elsewhere(bpffs).iter().find_map(|dir| on(dir));
    Some(elsewhere.unwrap_or_else(|| {
        "an agent runs in this network namespace (it holds the abstract socket @proxy-agent, see `ss -xlp`)".to_owned()
    }))
}

/// The one that holds these pins.
fn on(bpffs: &Path) -> Option<String> {
    let pins = Pins::open(bpffs).ok().filter(Pins::agent_running)?;
    let pid = pins.agent_pid().map(|pid| format!(" (pid {pid})")).unwrap_or_default();
    Some(format!("an agent runs on {}{pid}", bpffs.display()))
}

/// What it says of itself.
pub(super) struct Asked {
    /// Why kube-proxy's rules are needed still; nothing where all is in force.
    pub(super) lack: Option<String>,
    /// That it accepts for itself what it translates and is forwarded.
    pub(super) accepts: bool,
}

/// As far as it is asked at this address.
pub(super) fn ask(at: &Bind) -> Asked {
    let Some(addr) = at.socket(METRICS_PORT) else {
        let lack = "cannot be asked whether it is ready: --metrics-bind-address is empty".to_owned();
        return Asked { lack: Some(lack), accepts: false };
    };
    let end = Instant::now() + PATIENCE;
    loop {
        let asked = match agent::report(addr) {
            Ok(report) => Asked { lack: lack(&report), accepts: report.mode == Mode::Iptables.name() },
            Err(error) => {
                let lack = format!(
                    "cannot be asked whether it is ready: {addr}: {error:#}; give --metrics-bind-address as the agent has it"
                );
                Asked { lack: Some(lack), accepts: false }
            }
        };
        if asked.lack.is_none() || Instant::now() > end {
            return asked;
        }
        thread::sleep(AGAIN);
    }
}

/// What an agent that has just started may not have in force yet, or not at all.
fn lack(report: &Report) -> Option<String> {
    let Report { ready, source, frontends, unprogrammed, failed_devices, lost_hooks, .. } = report;
    if !ready {
        let waits = match source {
            Source::Listing { missing } if !missing.is_empty() => format!(" (it waits for {})", missing.join(", ")),
            _ => String::new(),
        };
        return Some(format!("is not ready: its first full state is not in force yet{waits}"));
    }
    let FrontendCount { programmed: _, pending, degraded } = frontends;
    let first = unprogrammed.first().map(|one| {
        let reason = one.reason.as_deref().unwrap_or("it waits");
        format!("{} at {} port {}/{}: {reason}", one.service, one.address, one.port, one.protocol)
    });
    let lost = lost_hooks.iter().map(|hook| format!("{} {}", hook.kind, hook.target));
    [
        of("frontends", pending + degraded, first),
        of("devices", failed_devices.len(), failed_devices.iter().next().map(|(name, why)| format!("{name}: {why}"))),
        of("hooks", lost_hooks.len(), lost.into_iter().next()),
    ]
    .into_iter()
    .flatten()
    .next()
}

fn of(what: &str, count: usize, first: Option<impl fmt::Display>) -> Option<String> {
    let first = first.map(|first| format!(" ({first})")).unwrap_or_default();
    (count > 0).then(|| format!("has not all in force: without {count} {what}{first}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        model::SourceState,
        status::{
            Status,
            report::tests::{busy, check_ports},
        },
    };

    fn report(status: &Status) -> Report {
        Report::new(status, true, Some("all"), None, &check_ports())
    }

    #[test]
    fn it_is_to_have_all_in_force() {
        let starting =
            Status { ready: false, source: SourceState::Listing { missing: vec!["nodes".into()] }, ..busy() };
        let lacks = lack(&report(&starting)).unwrap();
        assert!(lacks.contains("not ready") && lacks.contains("waits for nodes"), "{lacks}");
        let mut one = report(&busy());
        let lacks = lack(&one).unwrap();
        assert!(lacks.contains("1 frontends (default/api:http at 10.96.0.2 port 80/TCP: "), "{lacks}");
        one.frontends.degraded = 0;
        one.failed_devices = [("eth7".to_owned(), "no room".to_owned())].into();
        assert_eq!(lack(&one).unwrap(), "has not all in force: without 1 devices (eth7: no room)");
        one.failed_devices.clear();
        one.lost_hooks.clear();
        assert_eq!(lack(&one), None);
        one.frontends.pending = 2;
        one.unprogrammed.clear();
        assert_eq!(lack(&one).unwrap(), "has not all in force: without 2 frontends");
    }

    #[test]
    fn who_does_not_answer_is_not_taken_for_ready() {
        let silent = ask(&"127.0.0.1:1".parse().unwrap()).lack.unwrap();
        assert!(silent.contains("127.0.0.1:1") && silent.contains("--metrics-bind-address"), "{silent}");
    }
}
