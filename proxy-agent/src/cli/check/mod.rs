//! `check`: can this node run the agent, and what to do if not. One line each; it changes nothing.

use std::{
    collections::BTreeMap,
    io::{self, IsTerminal, Write},
    net::{SocketAddr, TcpListener},
    path::PathBuf,
};

use clap::Args as ClapArgs;
use serde::Serialize;

use super::{
    Exit, agent,
    output::{self, Column, Format, OutputArgs, Row},
    run::args::Netfilter,
    shapes::{self, SocketLb, Xdp},
};
use crate::{
    config::{BPFFS, Bind, HEALTHZ_PORT, METRICS_PORT, PortRange, ProxyMode},
    dataplane::{
        Missing,
        choose::Candidate,
        ebpf::{
            self,
            probe::{self, probe},
            read::Pins,
            xdp::{self, Driver},
        },
        iptables::Iptables,
        ipvs::Ipvs,
        nftables::Nftables,
        select::{self, Mode},
    },
    desired::Device,
    node,
    status::report::Report,
};

mod firewall;
mod foreign;

use foreign::Foreign;

#[derive(Clone, Debug, ClapArgs)]
pub struct Args {
    /// Which dataplane is to run: ebpf, nftables, iptables, ipvs, or auto, the first of these that this node can run
    #[arg(long, value_name = "MODE", default_value_t, env = "PROXY_AGENT_PROXY_MODE")]
    proxy_mode: ProxyMode,
    /// Directory of the pinned maps and programs
    #[arg(long, value_name = "DIR", default_value = BPFFS, env = "PROXY_AGENT_BPFFS")]
    bpffs: PathBuf,
    /// Root of the cgroup v2 tree to attach to [default: where it is mounted]
    #[arg(long, value_name = "DIR", env = "PROXY_AGENT_CGROUP_ROOT")]
    cgroup_root: Option<PathBuf>,
    /// Whose sockets are to be translated at connect time
    #[arg(long, value_enum, default_value_t, env = "PROXY_AGENT_SOCKET_LB")]
    socket_lb: SocketLb,
    /// Whether what leaves again by an outward device is to go past the stack
    #[arg(long, value_enum, default_value_t, env = "PROXY_AGENT_XDP")]
    xdp: Xdp,
    #[command(flatten)]
    netfilter: Netfilter,
    /// Source ports of masqueraded flows
    #[arg(long, value_name = "MIN-MAX", default_value_t = PortRange::MASQUERADE, env = "PROXY_AGENT_MASQUERADE_PORTS")]
    masquerade_ports: PortRange,
    /// Links that lead out of the node although they look like pods'; patterns with * and ?, ! in front excludes
    #[arg(long, value_name = "PATTERN,…", value_delimiter = ',', env = "PROXY_AGENT_UPLINKS")]
    uplinks: Vec<String>,
    /// Where the agent is to answer /healthz
    #[arg(long, value_name = "ADDRESS", default_value = "0.0.0.0:10256", env = "PROXY_AGENT_HEALTHZ_BIND_ADDRESS")]
    healthz_bind_address: Bind,
    /// Where the agent is to answer /metrics
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:10249", env = "PROXY_AGENT_METRICS_BIND_ADDRESS")]
    metrics_bind_address: Bind,
    #[command(flatten)]
    output: OutputArgs,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Check {
    pub name: String,
    pub result: Outcome,
    pub detail: String,
    /// What to do about it; empty where nothing need be done.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub remedy: String,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    Ok,
    /// It runs, with less than it could have or with a risk.
    Warning,
    /// The agent cannot run.
    Failed,
}

impl Outcome {
    const fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Failed => "failed",
        }
    }

    const fn sign(self) -> &'static str {
        match self {
            Self::Ok => "✔",
            Self::Warning => "!",
            Self::Failed => "✘",
        }
    }
}

impl Row for Check {
    const KIND: &'static str = "CheckList";
    const COLUMNS: &'static [Column<Self>] = &[
        Column::new("RESULT", |c| c.result.name().to_owned()),
        Column::new("CHECK", |c| c.name.clone()),
        Column::new("DETAIL", |c| c.detail.clone()),
        Column::new("REMEDY", |c| c.remedy.clone()),
    ];
}

pub fn execute(args: Args, out: &mut dyn Write) -> anyhow::Result<Exit> {
    let Args {
        proxy_mode,
        bpffs,
        cgroup_root,
        socket_lb,
        xdp,
        netfilter,
        masquerade_ports,
        uplinks,
        healthz_bind_address,
        metrics_bind_address,
        output,
    } = args;
    // A running agent holds its addresses itself.
    let pins = Pins::open(&bpffs).ok();
    let (running, has_pins) = (pins.as_ref().is_some_and(Pins::agent_running), pins.is_some());
    let hooked = pins.and_then(|pins| pins.hooks().ok()).unwrap_or_default();
    let hooked: Vec<_> =
        hooked.into_iter().filter(|hook| hook.kind.starts_with("xdp/")).map(|hook| hook.target).collect();
    let ebpf = ebpf::Options { bpffs, cgroup_root, socket_lb: socket_lb.into(), xdp: xdp.into(), ..Default::default() };
    let options = select::Options { mode: Mode::Ebpf, ebpf, netfilter: netfilter.options(masquerade_ports) };
    let (mut checks, chosen) = modes(shapes::asked(proxy_mode), &options);
    if chosen == Some(Mode::Ebpf) {
        checks.extend(socket_lb_off(socket_lb));
        checks.push(masquerade(masquerade_ports, PortRange::ephemeral()));
    }
    checks.push(other_proxies(foreign::look()));
    if chosen.is_some_and(|mode| mode != Mode::Iptables) {
        checks.extend(firewall(&firewall::look()));
    }
    let report = metrics_bind_address.socket(METRICS_PORT).and_then(|addr| agent::report(addr).ok());
    checks.extend(left(report.as_ref(), &in_force(has_pins)));
    let (without_uplink, outward) = match survey(&uplinks) {
        Ok(node::Survey { without_uplink, outward }) => (Ok(without_uplink), outward),
        Err(error) => (Err(error), BTreeMap::new()),
    };
    checks.push(uplink(without_uplink));
    checks.extend(outward.into_iter().map(|(index, (device, program))| {
        let program = program.filter(|_| !hooked.contains(&device.name));
        past_the_stack(xdp, &device, program, xdp::driver(index).ok())
    }));
    if !running {
        checks.extend(address("health address", "--healthz-bind-address", healthz_bind_address.socket(HEALTHZ_PORT)));
        checks.extend(address("metrics address", "--metrics-bind-address", metrics_bind_address.socket(METRICS_PORT)));
    }
    match output.output {
        Format::Table => lines(&checks, io::stdout().is_terminal(), out)?,
        _ => output::print(&checks, &output, out)?,
    }
    Ok(verdict(&checks))
}

/// Every dataplane in a line, eBPF, if it is wanted, also in detail; and which of them would run.
fn modes(asked: Option<Mode>, options: &select::Options) -> (Vec<Check>, Option<Mode>) {
    let details = probe(&options.ebpf);
    let candidate = |mode| match mode {
        Mode::Ebpf => Candidate::of_ebpf(&details),
        other => Candidate::try_out(other, options),
    };
    let candidates = Mode::ALL.map(candidate);
    let can_run = |candidate: &&Candidate| candidate.can_run() && asked.is_none_or(|asked| asked == candidate.mode);
    let chosen = candidates.iter().find(can_run).map(|candidate| candidate.mode);
    let details = if asked.is_none_or(|asked| asked == Mode::Ebpf) { details } else { vec![probe::forwarding()] };
    let mut checks: Vec<Check> = details.into_iter().map(Check::from).collect();
    if chosen.is_some() {
        // What is essential to one mode is no matter where another can run.
        checks
            .iter_mut()
            .filter(|check| check.result == Outcome::Failed)
            .for_each(|check| check.result = Outcome::Warning);
    }
    checks.extend(candidates.iter().map(|candidate| mode(candidate, asked, chosen)));
    (checks, chosen)
}

fn mode(candidate: &Candidate, asked: Option<Mode>, chosen: Option<Mode>) -> Check {
    let name = format!("mode {}", candidate.mode.name());
    if candidate.can_run() {
        let what = match (asked, chosen == Some(candidate.mode)) {
            (None, true) => "can run, and auto takes it",
            _ => "can run",
        };
        return ok(&name, what);
    }
    let is_needed = chosen.is_none() && asked.is_none_or(|asked| asked == candidate.mode);
    let result = if is_needed { Outcome::Failed } else { Outcome::Warning };
    Check { name, result, detail: format!("cannot run: {}", candidate.lack()), remedy: candidate.remedy() }
}

fn verdict(checks: &[Check]) -> Exit {
    if checks.iter().any(|check| check.result == Outcome::Failed) { Exit::DoesNotHold } else { Exit::Done }
}

/// One line each, the remedy at its end; signs for people, words for everything else.
fn lines(checks: &[Check], signs: bool, out: &mut dyn Write) -> anyhow::Result<()> {
    for Check { name, result, detail, remedy } in checks {
        let mark = if signs { result.sign() } else { result.name() };
        let missing = Missing { what: detail.clone(), remedy: remedy.clone() };
        writeln!(out, "{mark:<width$} {name}: {missing}", width = if signs { 1 } else { 7 })?;
    }
    Ok(())
}

impl From<probe::Check> for Check {
    fn from(check: probe::Check) -> Self {
        let probe::Check { name, ok, optional, detail, remedy } = check;
        let result = match (ok, optional) {
            (true, _) => Outcome::Ok,
            (false, true) => Outcome::Warning,
            (false, false) => Outcome::Failed,
        };
        Self { name: name.to_owned(), result, detail, remedy }
    }
}

fn socket_lb_off(socket_lb: SocketLb) -> Option<Check> {
    (socket_lb == SocketLb::Off).then(|| {
        warning(
            "socket LB",
            "off: connections that this node's own processes make to Services are not served",
            "use --socket-lb all or node, unless nothing on the node itself needs Services",
        )
    })
}

fn ok(name: &str, detail: impl Into<String>) -> Check {
    Check { name: name.to_owned(), result: Outcome::Ok, detail: detail.into(), remedy: String::new() }
}

fn warning(name: &str, detail: impl Into<String>, remedy: impl Into<String>) -> Check {
    Check { name: name.to_owned(), result: Outcome::Warning, detail: detail.into(), remedy: remedy.into() }
}

fn masquerade(ports: PortRange, ephemeral: Option<PortRange>) -> Check {
    const NAME: &str = "masquerade ports";
    let Some(ephemeral) = ephemeral else {
        return warning(NAME, "net.ipv4.ip_local_port_range cannot be read", "mount /proc");
    };
    if ports.overlaps(ephemeral) {
        warning(
            NAME,
            format!("{ports} overlaps the kernel's ephemeral ports {ephemeral}"),
            "choose --masquerade-ports outside, or move net.ipv4.ip_local_port_range",
        )
    } else {
        ok(NAME, format!("{ports}, apart from the kernel's ephemeral ports {ephemeral}"))
    }
}

/// Only where there is something to say. Whether the rules that there are let pods' traffic through nobody can tell from here.
fn firewall(drop: &[String]) -> Option<Check> {
    (!drop.is_empty()).then(|| {
        warning(
            "firewall",
            format!(
                "drops what is forwarded unless a rule accepts it ({}): kube-proxy in iptables mode accepts what it translates, this mode does not",
                drop.join(", ")
            ),
            "see that rules of the CNI, or your own, accept what goes to pods and comes from them (iptables -A FORWARD -d PODS -j ACCEPT, and -s), \
             or use --proxy-mode iptables",
        )
    })
}

/// What XDP can do at a device that leads out of the node. `program`: somebody else's on its hook.
fn past_the_stack(xdp: Xdp, device: &Device, program: Option<u32>, driver: Option<Driver>) -> Check {
    let name = format!("XDP {}", device.name);
    let (can, remedy) = match (xdp::bars(device), program, driver) {
        (Some(why), _, _) => (Err(format!("barred: {why}")), "use --xdp off, if that is to stay so"),
        (None, Some(id), _) => (
            Err(format!("barred: program {id} of somebody else's is there")),
            "ip link set dev … xdp off, if it is not needed",
        ),
        (None, None, Some(Driver { runs: false, .. })) => {
            (Err("generic: its driver has no XDP".to_owned()), "use --xdp generic, which is slower, or off")
        }
        (None, None, Some(Driver { sends: true, .. })) => (Ok("native, and takes frames of other devices"), ""),
        (None, None, Some(_)) => (Ok("native; takes no frames of other devices now"), ""),
        (None, None, None) => {
            (Ok("generic, perhaps native: the kernel does not say what its driver can (6.3 does)"), "")
        }
    };
    match can {
        Ok(can) => ok(&name, can),
        // Generic is had wherever nothing bars it; and who does not ask lacks nothing.
        Err(can) if xdp == Xdp::Off || xdp == Xdp::Generic && can.starts_with("generic") => ok(&name, can),
        Err(can) => warning(&name, can, remedy),
    }
}

/// Bridges that lead out of the node by a port that looks like a pod's, and all devices that lead out.
fn survey(uplinks: &[String]) -> anyhow::Result<node::Survey> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let options = node::Options { uplinks: node::Pattern::all(uplinks), ..Default::default() };
    Ok(runtime.block_on(node::survey(&options))?)
}

fn uplink(bridges: anyhow::Result<BTreeMap<String, Vec<String>>>) -> Check {
    const NAME: &str = "uplinks";
    let named = |(bridge, ports): (&String, &Vec<String>)| format!("{bridge} ({})", ports.join(", "));
    match bridges {
        Ok(bridges) if bridges.is_empty() => ok(NAME, "told from pods' links"),
        Ok(bridges) => warning(
            NAME,
            format!(
                "the default route leads by a bridge whose ports all look like pods' links: {}",
                bridges.iter().map(named).collect::<Vec<_>>().join("; ")
            ),
            "name the port that leads out of the node with --uplinks, for run as for check",
        ),
        Err(error) => warning(NAME, format!("nobody could look: {error}"), "run this where netlink is allowed"),
    }
}

fn other_proxies(foreign: Foreign) -> Check {
    const NAME: &str = "other proxies";
    match foreign {
        Foreign::None => ok(NAME, "no traces of kube-proxy, kube-router, Cilium or Calico's eBPF dataplane"),
        Foreign::Found(places) => warning(
            NAME,
            places.join(", "),
            "two proxies translate the same traffic: take the other off this node, or switch its service proxy off, then remove what it left (of \
             kube-proxy: `proxy-agent cleanup --kube-proxy`)",
        ),
        Foreign::Unknown(reason) => {
            warning(NAME, format!("nobody could look: {reason}"), "install nft or iptables, and run this as root")
        }
    }
}

/// The modes that agents left something in force of, or run in.
fn in_force(has_pins: bool) -> Vec<Mode> {
    let has_rules = |mode| match mode {
        Mode::Ebpf => has_pins,
        Mode::Nftables => Nftables::remains().is_ok_and(|remains| !remains.is_empty()),
        Mode::Iptables => !Iptables::remains().0.is_empty(),
        Mode::Ipvs => Ipvs::remains().is_ok_and(|remains| !remains.is_empty()),
    };
    Mode::ALL.into_iter().filter(|mode| has_rules(*mode)).collect()
}

/// What another mode left translates the same traffic, by what was known when it was left. The agent that runs retires it, or says why not; one
/// that starts will.
fn left(report: Option<&Report>, in_force: &[Mode]) -> Option<Check> {
    const NAME: &str = "other modes";
    let report = report?;
    let Report { mode, retiring, .. } = report;
    let mut others = Vec::new();
    let mut stays = false;
    for other in in_force.iter().map(|other| other.name()).filter(|other| other != mode) {
        let of = retiring.iter().find(|one| one.mode == other);
        let why = match of.map(|one| (one.retired, &one.trouble)) {
            Some((_, None)) => "is being retired".to_owned(),
            Some((true, Some(trouble))) => format!("takes no new flows, and stays: {trouble}"),
            Some((false, Some(trouble))) => format!("stays in force: {trouble}"),
            None if !report.ready => "is in force until this mode is".to_owned(),
            None => "is in force, and nobody retires it".to_owned(),
        };
        stays |= of.map_or(report.ready, |one| one.trouble.is_some());
        others.push(format!("what {other} left {why}"));
    }
    let text = (!others.is_empty()).then(|| others.join("; "))?;
    Some(if stays {
        warning(
            NAME,
            text,
            "see to what is in its way: it is tried again; `proxy-agent cleanup`, with no agent at work, removes it with its open connections",
        )
    } else {
        ok(NAME, text)
    })
}

fn address(name: &str, option: &str, addr: Option<SocketAddr>) -> Option<Check> {
    let addr = addr?;
    Some(match TcpListener::bind(addr) {
        Ok(_) => ok(name, format!("{addr} is free")),
        Err(error) => warning(name, format!("{addr}: {error}"), format!("free it, or choose another with {option}")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{cli::output::tests::every_format, desired::DeviceRole};

    #[test]
    fn a_firewall_that_drops_is_named_with_what_to_do() {
        assert_eq!(firewall(&[]), None);
        let check = firewall(&["chain FORWARD in table ip filter".to_owned()]).unwrap();
        assert_eq!(
            (check.result, check.detail.contains("(chain FORWARD in table ip filter)")),
            (Outcome::Warning, true)
        );
        assert!(check.remedy.contains("iptables -A FORWARD -d PODS"), "{}", check.remedy);
    }

    #[test]
    fn what_nobody_retires_is_warned_of() {
        let report = Report::new(&crate::status::report::tests::busy(), true, None, None, &Default::default());
        assert_eq!(report.mode, "ebpf");
        assert_eq!(left(None, &Mode::ALL), None, "the next agent will see to it");
        assert_eq!(left(Some(&report), &[Mode::Ebpf]), None);
        let of = |report: &Report, mode| left(Some(report), &[Mode::Ebpf, mode]).unwrap();
        let retiring = of(&report, Mode::Nftables);
        assert_eq!((retiring.result, retiring.detail.as_str()), (Outcome::Ok, "what nftables left is being retired"));
        let stays = of(&report, Mode::Iptables);
        assert_eq!(stays.result, Outcome::Warning);
        assert!(stays.detail.contains("stays in force: the lock is held"), "{}", stays.detail);
        let nobody = of(&Report { retiring: Vec::new(), ..report }, Mode::Nftables);
        assert_eq!(nobody.result, Outcome::Warning);
        assert!(nobody.detail.contains("nobody retires it"), "{}", nobody.detail);
    }

    fn checks() -> Vec<Check> {
        let ephemeral = PortRange { min: 32_768, max: 60_999 };
        let failed = probe::Check {
            name: "CAP_BPF",
            ok: false,
            optional: false,
            detail: "missing".into(),
            remedy: "run as root, or add BPF to the container's capabilities".into(),
        };
        let ebpf = Candidate::of_ebpf(std::slice::from_ref(&failed));
        let nftables = Candidate { mode: Mode::Nftables, missing: Vec::new() };
        vec![
            failed.into(),
            mode(&ebpf, None, None),
            mode(&ebpf, None, Some(Mode::Nftables)),
            mode(&nftables, None, Some(Mode::Nftables)),
            mode(&nftables, Some(Mode::Ebpf), None),
            masquerade(PortRange::MASQUERADE, Some(ephemeral)),
            masquerade(PortRange { min: 1024, max: 40_000 }, Some(ephemeral)),
            other_proxies(Foreign::Found(vec!["table ip kube-proxy (kube-proxy in nftables mode)".into()])),
            other_proxies(Foreign::Unknown("nft: not found".into())),
            uplink(Ok(BTreeMap::new())),
            uplink(Ok([("br0".to_owned(), vec!["out0".to_owned(), "veth1".to_owned()])].into())),
        ]
    }

    #[test]
    fn what_xdp_can_is_said_of_each_device() {
        let device = Device { mac: Some([2, 0, 0, 0, 0, 1]), ..Device::new("eth0", DeviceRole::Outward) };
        let barred = Device { without_xdp: Some("VLANs are on it"), ..device.clone() };
        let all = Some(Driver { runs: true, sends: true });
        let alone = Some(Driver { runs: true, sends: false });
        let none = Some(Driver { runs: false, sends: false });
        let cases = [
            (&device, None, all, "native, and takes", [true; 3]),
            (&device, None, alone, "native; takes no", [true; 3]),
            (&device, None, None, "the kernel does not say", [true; 3]),
            (&device, None, none, "generic: its driver has no XDP", [false, true, true]),
            (&device, Some(17), all, "program 17 of somebody else's", [false, false, true]),
            (&barred, None, all, "barred: VLANs are on it", [false, false, true]),
        ];
        for (device, program, driver, text, good) in cases {
            for (xdp, good) in [Xdp::Auto, Xdp::Generic, Xdp::Off].into_iter().zip(good) {
                let check = past_the_stack(xdp, device, program, driver);
                let wanted = if good { Outcome::Ok } else { Outcome::Warning };
                assert_eq!((check.name.as_str(), check.result), ("XDP eth0", wanted), "{xdp:?} {text}");
                assert!(check.detail.contains(text), "{check:?}");
                assert_eq!(check.remedy.is_empty(), good, "{check:?}");
            }
        }
    }

    #[test]
    fn checks_in_every_format() {
        let text = |signs| {
            let mut out = Vec::new();
            lines(&checks(), signs, &mut out).unwrap();
            String::from_utf8(out).unwrap()
        };
        let all = format!("--- terminal\n{}--- pipe\n{}{}", text(true), text(false), every_format(&checks()));
        insta::assert_snapshot!("check", all);
    }

    #[test]
    fn only_what_is_essential_fails_the_check() {
        assert_eq!(verdict(&checks()), Exit::DoesNotHold);
        assert_eq!(verdict(checks().get(2..).unwrap()), Exit::Done);
    }

    #[test]
    fn a_taken_address_is_named_with_its_option() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = taken.local_addr().unwrap();
        let check = address("metrics address", "--metrics-bind-address", Some(addr)).unwrap();
        assert_eq!(check.result, Outcome::Warning);
        assert!(
            check.remedy.contains("--metrics-bind-address") && check.detail.contains(&addr.to_string()),
            "{check:?}"
        );
        assert_eq!(address("metrics address", "--metrics-bind-address", None), None);
    }
}
