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
    Exit,
    output::{self, Column, Format, OutputArgs, Row},
    shapes::SocketLb,
};
use crate::{
    config::{BPFFS, Bind, HEALTHZ_PORT, METRICS_PORT, PortRange},
    dataplane::ebpf::{
        self,
        probe::{self, probe},
        read::Pins,
    },
    node,
};

mod foreign;

use foreign::Foreign;

#[derive(Clone, Debug, ClapArgs)]
pub struct Args {
    /// Directory of the pinned maps and programs
    #[arg(long, value_name = "DIR", default_value = BPFFS, env = "PROXY_AGENT_BPFFS")]
    bpffs: PathBuf,
    /// Root of the cgroup v2 tree to attach to [default: where it is mounted]
    #[arg(long, value_name = "DIR", env = "PROXY_AGENT_CGROUP_ROOT")]
    cgroup_root: Option<PathBuf>,
    /// Whose sockets are to be translated at connect time
    #[arg(long, value_enum, default_value_t, env = "PROXY_AGENT_SOCKET_LB")]
    socket_lb: SocketLb,
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
        bpffs,
        cgroup_root,
        socket_lb,
        masquerade_ports,
        uplinks,
        healthz_bind_address,
        metrics_bind_address,
        output,
    } = args;
    // A running agent holds its addresses itself.
    let running = Pins::open(&bpffs).is_ok_and(|pins| pins.agent_running());
    let options = ebpf::Options { bpffs, cgroup_root, socket_lb: socket_lb.into(), ..Default::default() };
    let mut checks: Vec<_> = probe(&options).into_iter().map(Check::from).collect();
    checks.extend(socket_lb_off(socket_lb));
    checks.push(masquerade(masquerade_ports, PortRange::ephemeral()));
    checks.push(other_proxies(foreign::look()));
    checks.push(uplink(bridges(&uplinks)));
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

fn verdict(checks: &[Check]) -> Exit {
    if checks.iter().any(|check| check.result == Outcome::Failed) { Exit::DoesNotHold } else { Exit::Done }
}

/// One line each, the remedy below; signs for people, words for everything else.
fn lines(checks: &[Check], signs: bool, out: &mut dyn Write) -> anyhow::Result<()> {
    for Check { name, result, detail, remedy } in checks {
        let mark = if signs { result.sign() } else { result.name() };
        writeln!(out, "{mark:<width$} {name}: {detail}", width = if signs { 1 } else { 7 })?;
        if !remedy.is_empty() {
            writeln!(out, "{:width$} → {remedy}", "", width = if signs { 1 } else { 7 })?;
        }
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

/// Bridges that lead out of the node by a port that looks like a pod's.
fn bridges(uplinks: &[String]) -> anyhow::Result<BTreeMap<String, Vec<String>>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let options = node::Options { uplinks: node::Pattern::all(uplinks), ..Default::default() };
    Ok(runtime.block_on(node::without_uplink(&options))?)
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
        Foreign::None => ok(NAME, "no rules of kube-proxy"),
        Foreign::Found(places) => warning(
            NAME,
            format!("rules of kube-proxy: {}", places.join(", ")),
            "take kube-proxy off this node (kubectl -n kube-system delete ds kube-proxy), then run kube-proxy --cleanup here",
        ),
        Foreign::Unknown(reason) => {
            warning(NAME, format!("nobody could look: {reason}"), "install nft or iptables, and run this as root")
        }
    }
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
    use crate::cli::output::tests::every_format;

    fn checks() -> Vec<Check> {
        let ephemeral = PortRange { min: 32_768, max: 60_999 };
        let failed = probe::Check {
            name: "CAP_BPF",
            ok: false,
            optional: false,
            detail: "missing".into(),
            remedy: "run as root, or add BPF to the container's capabilities".into(),
        };
        vec![
            failed.into(),
            masquerade(PortRange::MASQUERADE, Some(ephemeral)),
            masquerade(PortRange { min: 1024, max: 40_000 }, Some(ephemeral)),
            other_proxies(Foreign::Found(vec!["table ip kube-proxy (kube-proxy in nftables mode)".into()])),
            other_proxies(Foreign::Unknown("nft: not found".into())),
            uplink(Ok(BTreeMap::new())),
            uplink(Ok([("br0".to_owned(), vec!["out0".to_owned(), "veth1".to_owned()])].into())),
        ]
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
        assert_eq!(verdict(checks().get(1..).unwrap()), Exit::Done);
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
