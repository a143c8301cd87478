//! `status`: what runs here. The agent tells of itself, if one runs; the rest is read from the pins.

use std::{io::Write, path::PathBuf};

use clap::Args as ClapArgs;
use serde::Serialize;

use super::{
    Exit,
    output::{self, API_VERSION, Format},
    pins::{Agent, Opened, PinsArgs},
    shapes::duration,
};
use crate::status::report::{
    Ahead, Device, FrontendCount, HealthCheck, Hook, MapFill, Report, Retiring, Source, Sync, Unprogrammed,
};

#[derive(Clone, Debug, ClapArgs)]
pub struct Args {
    /// How to print; wide adds the hooks and every map
    #[arg(short, long, value_enum, default_value_t, value_name = "FORMAT")]
    output: Format,
    #[command(flatten)]
    pins: PinsArgs,
}

#[derive(Clone, PartialEq, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    api_version: &'static str,
    kind: &'static str,
    pub bpffs: PathBuf,
    pub agent: AgentStatus,
    /// Absent where nothing is pinned.
    pub kernel: Option<Kernel>,
    /// What the agent says of itself; absent where none answers.
    pub report: Option<Report>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct AgentStatus {
    pub running: bool,
    pub pid: Option<u32>,
    /// Why a running agent could not be asked.
    pub error: Option<String>,
}

/// What the pins hold.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Kernel {
    pub frontends: usize,
    pub backends: usize,
    /// TCP connections that have lost their entries are reset: nobody else translates here, and there are hooks to do it.
    pub resets_lost: bool,
    pub hooks: Vec<Hook>,
    pub maps: Vec<MapFill>,
}

pub fn execute(args: Args, out: &mut dyn Write) -> anyhow::Result<Exit> {
    let Args { output, pins } = args;
    let status = gather(&pins)?;
    match output {
        Format::Json | Format::Yaml => output::document(&status, output, out)?,
        Format::Table | Format::Wide => page(&status, output == Format::Wide, out)?,
    }
    Ok(Exit::Done)
}

fn gather(pins: &PinsArgs) -> anyhow::Result<Status> {
    let opened = pins.open_if_there()?;
    let mut agent = opened.as_ref().map(|opened| pins.agent(opened)).unwrap_or_default();
    let other = if agent.running { pins.retires_pins() } else { pins.unpinned() };
    if let Some((_, report)) = other.filter(|_| agent.report.is_none()) {
        agent = Agent { running: true, pid: Some(report.pid), report: Some(report), error: None };
    }
    let Agent { running, pid, report, error } = agent;
    let kernel = opened.as_ref().map(Opened::kernel).transpose()?;
    Ok(Status::new(pins.bpffs.clone(), AgentStatus { running, pid, error }, kernel, report))
}

impl Status {
    fn new(bpffs: PathBuf, agent: AgentStatus, kernel: Option<Kernel>, report: Option<Report>) -> Self {
        Self { api_version: API_VERSION, kind: "Status", bpffs, agent, kernel, report }
    }
}

/// For people: one line each, lists indented below.
fn page(status: &Status, wide: bool, out: &mut dyn Write) -> anyhow::Result<()> {
    let Status { api_version: _, kind: _, bpffs, agent, kernel, report } = status;
    let mut page = Page { out };
    page.line("Agent", &agent_text(agent, report.as_ref(), kernel.is_some()))?;
    let pinned = report.as_ref().is_none_or(|report| report.bpffs.is_some());
    if pinned || kernel.is_some() {
        page.line("Pins", &pins_text(&bpffs.display().to_string(), kernel.as_ref()))?;
    }
    if let Some(report) = report {
        report_lines(report, &mut page)?;
    }
    if let Some(kernel) = kernel {
        // The agent also knows filters that have no pins, and names cgroups by path.
        let hooks = report.as_ref().map_or(&kernel.hooks, |report| &report.hooks);
        kernel_lines(kernel, hooks, wide, &mut page)?;
    } else if let Some(report) = report.as_ref().filter(|_| !pinned) {
        hook_lines(&report.hooks, wide, &mut page)?;
    }
    if let Some(report) = report {
        page.list("Left by other modes", report.retiring.iter().map(retiring_line).collect())?;
        trouble(report, &mut page)?;
    }
    Ok(())
}

struct Page<'a> {
    out: &'a mut dyn Write,
}

impl Page<'_> {
    fn line(&mut self, label: &str, text: &str) -> anyhow::Result<()> {
        writeln!(self.out, "{:<12}{text}", format!("{label}:"))?;
        Ok(())
    }

    /// A heading and aligned lines below it; nothing where there are none.
    fn list(&mut self, label: &str, lines: Vec<Vec<String>>) -> anyhow::Result<()> {
        if lines.is_empty() {
            return Ok(());
        }
        writeln!(self.out, "{label}:")?;
        let indented: Vec<Vec<String>> = lines
            .into_iter()
            .map(|line| {
                line.into_iter().enumerate().map(|(i, cell)| if i == 0 { format!("  {cell}") } else { cell }).collect()
            })
            .collect();
        output::write_aligned(&indented, self.out)
    }
}

fn agent_text(agent: &AgentStatus, report: Option<&Report>, pinned: bool) -> String {
    let AgentStatus { running, pid, error } = agent;
    let pid = pid.map(|pid| format!(", pid {pid}")).unwrap_or_default();
    match (report, running) {
        (Some(report), _) => {
            let Report { version, node, uptime_seconds, .. } = report;
            format!("running{pid}, node {node}, version {version}, up {}", duration(*uptime_seconds))
        }
        (None, true) => {
            format!("running{pid}, but it does not answer: {}", error.as_deref().unwrap_or("no reason known"))
        }
        (None, false) if !pinned => "not running".to_owned(),
        (None, false) => "not running; what it left in the kernel goes on serving".to_owned(),
    }
}

fn pins_text(bpffs: &str, kernel: Option<&Kernel>) -> String {
    match kernel {
        Some(Kernel { frontends, backends, .. }) => {
            format!("{bpffs}: {frontends} frontends, {backends} backends in force")
        }
        None => format!("{bpffs}: nothing is pinned here"),
    }
}

fn report_lines(report: &Report, page: &mut Page<'_>) -> anyhow::Result<()> {
    let Report { mode, mode_reason, socket_lb, ready, healthy, source, sync, services, endpoints, frontends, .. } =
        report;
    let reason = if mode_reason.is_empty() { String::new() } else { format!(" ({mode_reason})") };
    page.line("Mode", &format!("{mode}{reason}"))?;
    if let Some(socket_lb) = socket_lb {
        page.line(
            "Socket LB",
            match socket_lb.as_str() {
                "off" => "off: connections that this node's own processes make to Services are not served",
                "node" => "node: this node's own processes at connect time, pods per packet",
                other => other,
            },
        )?;
    }
    page.line(
        "Health",
        match (*ready, *healthy) {
            (true, true) => "healthy",
            (false, _) => "not ready: the first full state is not in force yet",
            (true, false) => "unhealthy: a change has been waiting for too long",
        },
    )?;
    page.line(
        "Source",
        &match source {
            Source::Listing { missing } if missing.is_empty() => "waiting for the first complete lists".to_owned(),
            Source::Listing { missing } => format!("waiting for the first complete list of {}", missing.join(", ")),
            Source::Synced => "synced".to_owned(),
            Source::Stale { reason } => format!("stale, the last state goes on serving: {reason}"),
        },
    )?;
    let Sync { count, last, pending_services, pending_endpoints, drift_repaired, .. } = sync;
    page.line(
        "Sync",
        &format!(
            "{count} done, last {}; pending: {pending_services} Services, {pending_endpoints} endpoints; drift repaired: \
             {drift_repaired}",
            last.as_deref().unwrap_or("never"),
        ),
    )?;
    page.line("Objects", &format!("{services} Services, {endpoints} endpoints"))?;
    let FrontendCount { programmed, pending, degraded } = frontends;
    page.line("Frontends", &format!("{programmed} programmed, {pending} pending, {degraded} degraded"))
}

fn kernel_lines(kernel: &Kernel, hooks: &[Hook], wide: bool, page: &mut Page<'_>) -> anyhow::Result<()> {
    let Kernel { frontends: _, backends: _, resets_lost, hooks: _, maps } = kernel;
    page.line(
        "Resets",
        if hooks.is_empty() {
            "off: nothing is translated"
        } else if *resets_lost {
            "on: a TCP connection that has lost its entries is reset"
        } else {
            "off: a TCP connection that has lost its entries hangs: another proxy's, which look the same, may go on, a device has no hooks, or \
             nobody could look yet (the log says more)"
        },
    )?;
    hook_lines(hooks, wide, page)?;
    let maps = maps.iter().filter(|map| wide || map.entries > 0);
    page.list("Maps", maps.map(map_line).collect())
}

fn hook_lines(hooks: &[Hook], wide: bool, page: &mut Page<'_>) -> anyhow::Result<()> {
    if hooks.is_empty() {
        page.line("Hooks", "none: nothing is translated")
    } else if wide {
        let line = |hook: &Hook| vec![hook.kind.clone(), hook.target.clone(), hook.program.clone()];
        page.list("Hooks", hooks.iter().map(line).collect())
    } else {
        page.list("Hooks", by_target(hooks))
    }
}

/// Target, and what sits there.
fn by_target(hooks: &[Hook]) -> Vec<Vec<String>> {
    let mut targets: Vec<(&str, Vec<&str>)> = Vec::new();
    for hook in hooks {
        match targets.iter_mut().find(|(target, _)| *target == hook.target) {
            Some((_, kinds)) => kinds.push(&hook.kind),
            None => targets.push((&hook.target, vec![&hook.kind])),
        }
    }
    targets.into_iter().map(|(target, kinds)| vec![target.to_owned(), kinds.join(" ")]).collect()
}

fn map_line(fill: &MapFill) -> Vec<String> {
    let MapFill { map, entries, capacity, option } = fill;
    let percent = if *capacity == 0 { 0.0 } else { *entries as f64 * 100.0 / *capacity as f64 };
    let advice =
        if percent >= 90.0 && !option.is_empty() { format!("nearly full: raise {option}") } else { String::new() };
    vec![map.clone(), format!("{entries} of {capacity}"), format!("{percent:.0}%"), advice]
}

/// Devices, and what is not as it should be.
fn trouble(report: &Report, page: &mut Page<'_>) -> anyhow::Result<()> {
    let Report {
        unprogrammed,
        limited,
        failed_guards,
        health_checks,
        problems,
        devices,
        failed_devices,
        without_xdp,
        lost_hooks,
        ahead,
        ..
    } = report;
    let device = |device: &Device| {
        let Device { index: _, name, role, counts_as, source4, source6 } = device;
        // Said where it is not what the role says.
        let role = match (role.as_str(), counts_as.as_str()) {
            ("pod", "outside") => "pod, counts as outside".to_owned(),
            ("outward" | "overlay", "pod") => format!("{role}, counts as pods"),
            _ => role.clone(),
        };
        let sources = [source4.map(|a| a.to_string()), source6.map(|a| a.to_string())];
        vec![name.clone(), role, sources.into_iter().flatten().collect::<Vec<_>>().join(" ")]
    };
    page.list("Devices", devices.iter().map(device).collect())?;
    let pairs = |map: &std::collections::BTreeMap<String, String>| {
        map.iter().map(|(object, reason)| vec![object.clone(), reason.clone()]).collect()
    };
    page.list("Devices that could not be attached to", pairs(failed_devices))?;
    page.list("Devices without XDP", pairs(without_xdp))?;
    let lost = |hook: &Hook| vec![hook.kind.clone(), hook.target.clone(), hook.program.clone()];
    page.list("Hooks that were taken off and cannot be put back", lost_hooks.iter().map(lost).collect())?;
    let others = |ahead: &Ahead| {
        let Ahead { kind, target, programs } = ahead;
        let ids: Vec<String> = programs.iter().map(ToString::to_string).collect();
        vec![kind.clone(), target.clone(), format!("programs {}", ids.join(", "))]
    };
    page.list("Others' programs that run before ours", ahead.iter().map(others).collect())?;
    page.list("Health-check node ports", health_checks.iter().map(check_line).collect())?;
    let line = |frontend: &Unprogrammed| {
        let Unprogrammed { service, kind: _, address, port, protocol, state, reason, since } = frontend;
        let frontend = super::shapes::FrontendAddress { address: *address, port: *port, protocol: *protocol };
        let state = match reason {
            Some(reason) => format!("{state}: {reason}"),
            None => state.clone(),
        };
        vec![service.clone(), frontend.to_string(), format!("since {since}"), state]
    };
    page.list("Frontends not in force", unprogrammed.iter().map(line).collect())?;
    page.list("Frontends in force with less than asked for", limited.iter().map(line).collect())?;
    let guards = failed_guards.iter().map(|(addr, reason)| vec![addr.to_string(), reason.clone()]).collect();
    page.list("Addresses whose unused ports are not refused", guards)?;
    let problems = problems.iter().flat_map(|(object, all)| all.iter().map(|one| vec![object.clone(), one.clone()]));
    page.list("Problems of objects", problems.collect())
}

fn retiring_line(retiring: &Retiring) -> Vec<String> {
    let Retiring { mode, retired, flows, trouble } = retiring;
    let state = match (trouble, flows) {
        (Some(trouble), _) if *retired => format!("takes no new flows, and stays: {trouble}"),
        (Some(trouble), _) => format!("stays in force: {trouble}"),
        (None, None) if *retired => "takes no new flows".to_owned(),
        (None, None) => "goes once this mode is in force".to_owned(),
        (None, Some(1)) => "takes no new flows, 1 is open".to_owned(),
        (None, Some(flows)) => format!("takes no new flows, {flows} are open"),
    };
    vec![mode.clone(), state]
}

/// What a load balancer hears; that it hears nothing is among the problems.
fn check_line(check: &HealthCheck) -> Vec<String> {
    let HealthCheck { service, port, local_endpoints, listening, failed } = check;
    let counts: Vec<String> = local_endpoints.iter().map(|(family, count)| format!("{count} {family}")).collect();
    let all = listening.len() + failed.len();
    let open =
        if failed.is_empty() { String::new() } else { format!("open at {} of {all} addresses", listening.len()) };
    vec![port.to_string(), service.clone(), format!("local endpoints: {}", counts.join(", ")), open]
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::status::report::tests::{busy, check_ports};

    fn hook(kind: &str, target: &str) -> Hook {
        Hook { kind: kind.into(), target: target.into(), program: kind.replace('/', "_") }
    }

    fn kernel() -> Kernel {
        let map = |map: &str, entries, capacity, option: &str| MapFill {
            map: map.into(),
            entries,
            capacity,
            option: option.into(),
        };
        Kernel {
            frontends: 1,
            backends: 1,
            resets_lost: true,
            hooks: vec![
                hook("cgroup/connect4", "/sys/fs/cgroup"),
                hook("cgroup/connect6", "/sys/fs/cgroup"),
                hook("tcx/ingress", "eth0"),
                hook("tcx/egress", "eth0"),
            ],
            maps: vec![
                map("frontends_v4", 60_000, 65_536, "--map-frontends"),
                map("slots_v4", 1, 1_048_576, "--map-slots"),
                map("slots_v6", 0, 1_048_576, "--map-slots"),
            ],
        }
    }

    fn report() -> Report {
        let mut report = Report::new(&busy(), true, Some("all"), Some(Path::new("/sys/fs/bpf/x")), &check_ports());
        report.pid = 4242;
        report.uptime_seconds = 3_700;
        report.version = "0.0.0".into();
        report
    }

    fn pages(status: &Status) -> String {
        [false, true]
            .map(|wide| {
                let mut out = Vec::new();
                page(status, wide, &mut out).unwrap();
                format!("--- {}\n{}", if wide { "wide" } else { "table" }, String::from_utf8(out).unwrap())
            })
            .concat()
    }

    #[test]
    fn status_of_a_running_agent() {
        let agent = AgentStatus { running: true, pid: Some(4242), error: None };
        let status = Status::new("/sys/fs/bpf/x".into(), agent, Some(kernel()), Some(report()));
        let mut text = pages(&status);
        for format in [Format::Json, Format::Yaml] {
            let mut out = Vec::new();
            output::document(&status, format, &mut out).unwrap();
            text += &format!("--- {format:?}\n{}", String::from_utf8(out).unwrap());
        }
        insta::assert_snapshot!("status", text);
    }

    #[test]
    fn status_without_an_agent() {
        let gone = AgentStatus { running: false, pid: None, error: None };
        let mute =
            AgentStatus { running: true, pid: Some(7), error: Some("127.0.0.1:10249: connection refused".into()) };
        let text = [
            pages(&Status::new("/sys/fs/bpf/x".into(), gone.clone(), Some(kernel()), None)),
            pages(&Status::new(
                "/sys/fs/bpf/x".into(),
                gone.clone(),
                Some(Kernel { resets_lost: false, ..kernel() }),
                None,
            )),
            pages(&Status::new("/sys/fs/bpf/x".into(), gone, None, None)),
            pages(&Status::new(
                "/sys/fs/bpf/x".into(),
                mute,
                Some(Kernel { hooks: vec![], resets_lost: false, ..kernel() }),
                None,
            )),
        ];
        insta::assert_snapshot!("status_without_an_agent", text.join("\n"));
    }
}
