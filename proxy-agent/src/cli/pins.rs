//! The pinned maps as the readers see them: what `dataplane::ebpf::read` hands out, named and in the shapes that are printed.

use std::{net::SocketAddr, path::PathBuf};

use anyhow::bail;
use clap::Args as ClapArgs;

use super::{
    agent,
    counters::{Event, Service},
    shapes::{Endpoint, FrontendAddress},
    status::Kernel,
};
use crate::{
    config::{BPFFS, Bind, METRICS_PORT},
    dataplane::{
        ebpf::read::{AffinityEntry, ConnectionEntry, FrontendRow, Pins, RangeRow, ReadError, VerdictRow},
        select::Mode,
    },
    desired::{Algorithm, Verdicts},
    status::report::{Hook, InForce, MapFill, Report},
};

#[derive(Clone, Debug, ClapArgs)]
pub struct PinsArgs {
    /// Directory of the pinned maps and programs
    #[arg(long, value_name = "DIR", default_value = BPFFS, env = "PROXY_AGENT_BPFFS")]
    pub bpffs: PathBuf,
    /// Where the running agent answers
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:10249", env = "PROXY_AGENT_METRICS_BIND_ADDRESS")]
    pub metrics_bind_address: Bind,
}

#[derive(Clone, PartialEq, Debug)]
pub struct Frontend {
    /// `namespace/name:port`.
    pub service: String,
    /// Only pinned maps have one.
    pub service_id: Option<u32>,
    pub kind: String,
    pub frontend: FrontendAddress,
    pub all: Range,
    pub local: Range,
    pub verdicts: Verdicts,
    pub algorithm: Algorithm,
    pub affinity_secs: Option<u32>,
}

/// A run of slots and what stands in them.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Range {
    pub base: u32,
    pub count: u16,
    pub generation: u8,
    /// Positions of the Maglev table, if it has one.
    pub table: Option<u32>,
    pub backends: Vec<Endpoint>,
}

/// The agent on these pins, as far as it can be asked.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Agent {
    pub running: bool,
    pub pid: Option<u32>,
    pub report: Option<Report>,
    /// Why a running agent could not be asked.
    pub error: Option<String>,
}

/// Pins, open for reading.
pub struct Opened(Pins);

/// Who knows what is in force here.
pub enum Knows {
    Pins(Opened),
    /// An agent in a mode that pins nothing.
    Agent(SocketAddr, Box<Report>),
}

impl PinsArgs {
    /// Pins that an agent holds come first, then an agent that has none, then pins that an agent left.
    pub fn knows(&self) -> anyhow::Result<Knows> {
        let opened = self.open_if_there()?;
        match opened {
            Some(opened) if opened.is_in_force() && self.retires_pins().is_none() => Ok(Knows::Pins(opened)),
            opened => match (self.unpinned(), opened) {
                (Some((addr, report)), _) => Ok(Knows::Agent(addr, Box::new(report))),
                // What is in force is not in them.
                (None, Some(opened)) if opened.0.is_retired() => bail!(
                    "{}: another mode has taken over, and its agent does not answer; give --metrics-bind-address as the agent has it",
                    self.bpffs.display()
                ),
                (None, Some(opened)) => Ok(Knows::Pins(opened)),
                (None, None) => Err(ReadError::Nothing(self.bpffs.clone()).into()),
            },
        }
    }

    /// An agent of this network namespace that pins nothing.
    pub fn unpinned(&self) -> Option<(SocketAddr, Report)> {
        let addr = self.metrics_bind_address.socket(METRICS_PORT)?;
        let report = agent::report(addr).ok()?;
        report.bpffs.is_none().then_some((addr, report))
    }

    /// The same, where it holds pins that an agent in another mode left, until their last flow is over.
    pub fn retires_pins(&self) -> Option<(SocketAddr, Report)> {
        let has = |report: &Report| report.retiring.iter().any(|one| one.mode == Mode::Ebpf.name());
        self.unpinned().filter(|(_, report)| has(report))
    }

    /// Of what only pinned maps hold; `elsewhere` says where else it is to be found.
    pub fn open(&self, elsewhere: &str) -> anyhow::Result<Opened> {
        match self.knows()? {
            Knows::Pins(opened) => Ok(opened),
            Knows::Agent(_, report) => {
                bail!("the agent here runs in {} mode, which keeps no such table of its own; {elsewhere}", report.mode)
            }
        }
    }

    /// `None` where nothing is pinned.
    pub fn open_if_there(&self) -> anyhow::Result<Option<Opened>> {
        match Pins::open(&self.bpffs) {
            Ok(pins) => Ok(Some(Opened(pins))),
            Err(ReadError::Nothing(_)) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Asks the agent that holds these pins.
    pub fn agent(&self, opened: &Opened) -> Agent {
        let Opened(pins) = opened;
        if !pins.agent_running() {
            return Agent::default();
        }
        let running = Agent { running: true, pid: pins.agent_pid(), ..Agent::default() };
        match self.report() {
            Ok(report) => Agent { pid: running.pid.or(Some(report.pid)), report: Some(report), ..running },
            Err(error) => Agent { error: Some(error), ..running },
        }
    }

    /// The report of whoever answers, if it speaks of these pins.
    fn report(&self) -> Result<Report, String> {
        let Some(addr) = self.metrics_bind_address.socket(METRICS_PORT) else {
            return Err("--metrics-bind-address is empty".into());
        };
        match agent::report(addr) {
            Ok(report) if report.bpffs.as_ref() == Some(&self.bpffs) => Ok(report),
            Ok(Report { bpffs: Some(bpffs), .. }) => Err(format!(
                "{addr}: the agent there uses the pins in {}; give --metrics-bind-address the address of this one",
                bpffs.display()
            )),
            Ok(Report { mode, .. }) => Err(format!(
                "{addr}: the agent there runs in {mode} mode, without pins; give --metrics-bind-address the address of this one"
            )),
            Err(error) => Err(format!("{addr}: {error:#}; is --metrics-bind-address where the agent answers?")),
        }
    }
}

impl Opened {
    /// By an agent at work.
    fn is_in_force(&self) -> bool {
        self.0.agent_running() && !self.0.is_retired()
    }

    /// Guards are no frontends of a Service and are left out.
    pub fn frontends(&self) -> anyhow::Result<Vec<Frontend>> {
        Ok(self.0.frontends()?.into_iter().filter_map(Frontend::of).collect())
    }

    pub fn connections(&self) -> anyhow::Result<Vec<ConnectionEntry>> {
        Ok(self.0.connections()?)
    }

    pub fn affinities(&self) -> anyhow::Result<Vec<AffinityEntry>> {
        Ok(self.0.affinities()?)
    }

    pub fn node_netns_cookie(&self) -> anyhow::Result<u64> {
        Ok(self.0.meta()?.node_netns_cookie)
    }

    /// By Service. What is counted under an id that names no Service any more is about to go.
    pub fn service_counters(&self) -> anyhow::Result<Vec<Service>> {
        let names = self.0.names()?;
        let counters = self.0.service_counters()?;
        let mut rows: Vec<_> = counters
            .into_iter()
            .filter_map(|(id, counters)| Some(Service::new(names.get(&id)?.clone(), counters)))
            .collect();
        rows.sort_by(|a, b| a.service.cmp(&b.service));
        Ok(rows)
    }

    pub fn events(&self) -> anyhow::Result<Vec<Event>> {
        Ok(self.0.reasons()?.into_iter().map(|(reason, count)| Event::new(reason, count)).collect())
    }

    pub fn kernel(&self) -> anyhow::Result<Kernel> {
        let frontends = self.frontends()?;
        let backends: std::collections::BTreeSet<_> = frontends
            .iter()
            .flat_map(|frontend| frontend.all.backends.iter().chain(&frontend.local.backends))
            .collect();
        let hooks: Vec<_> = self.0.hooks()?.iter().map(Hook::from).collect();
        Ok(Kernel {
            frontends: frontends.len(),
            backends: backends.len(),
            resets_lost: self.0.is_alone()? && !hooks.is_empty(),
            hooks,
            maps: self.0.fill()?.iter().map(MapFill::from).collect(),
        })
    }
}

impl From<InForce> for Frontend {
    fn from(row: InForce) -> Self {
        let InForce {
            service,
            kind,
            address,
            port,
            protocol,
            backends,
            local_backends,
            verdicts,
            algorithm,
            affinity_seconds,
        } = row;
        let range = |backends: Vec<SocketAddr>| Range {
            backends: backends.into_iter().map(Endpoint::from).collect(),
            ..Range::default()
        };
        Self {
            service,
            service_id: None,
            kind,
            frontend: FrontendAddress { address, port, protocol },
            all: range(backends),
            local: range(local_backends),
            verdicts,
            algorithm,
            affinity_secs: affinity_seconds,
        }
    }
}

impl Frontend {
    fn of(row: FrontendRow) -> Option<Self> {
        let FrontendRow {
            addr,
            port,
            protocol,
            guard,
            service_id,
            service,
            kind,
            verdicts: VerdictRow { pod, node, external },
            algorithm,
            affinity_secs,
            all,
            local,
            all_range,
            local_range,
            torn: _,
        } = row;
        let protocol = protocol.filter(|_| !guard)?;
        Some(Self {
            service,
            service_id: Some(service_id),
            kind: kind.to_string(),
            frontend: FrontendAddress { address: addr, port, protocol },
            all: Range::of(all_range, all),
            local: Range::of(local_range, local),
            verdicts: Verdicts { pod, node, external },
            algorithm,
            affinity_secs,
        })
    }
}

impl Range {
    fn of(range: RangeRow, backends: Vec<std::net::SocketAddr>) -> Self {
        let RangeRow { base, count, generation, table } = range;
        let table = Some(table).filter(|positions| *positions > 0);
        Self { base, count, generation, table, backends: backends.into_iter().map(Endpoint::from).collect() }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::{
        desired::{Action, FrontendKind, Verdict},
        model::Protocol,
    };

    /// A dual-stack Service, one with local backends, one without any.
    pub(crate) fn frontends() -> Vec<Frontend> {
        let row = |addr: &str, port, protocol, service_id, service: &str, all: &[&str], local: &[&str]| {
            let addresses = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect::<Vec<_>>();
            let pick = Verdict { action: Action::PickAll, masquerade: false };
            let reject = Verdict { action: Action::Reject, masquerade: false };
            let near = if all.is_empty() { reject } else { pick };
            let outside = Verdict { masquerade: !all.is_empty(), ..near };
            Frontend::of(FrontendRow {
                addr: addr.parse().unwrap(),
                port,
                protocol,
                guard: protocol.is_none(),
                service_id,
                service: service.into(),
                kind: FrontendKind::ClusterIp,
                verdicts: VerdictRow { pod: near, node: near, external: outside },
                algorithm: match service_id {
                    1 => Algorithm::Maglev,
                    2 => Algorithm::RoundRobin,
                    _ => Algorithm::Random,
                },
                affinity_secs: (service_id == 3).then_some(10_800),
                all: addresses(all),
                local: addresses(local),
                all_range: RangeRow {
                    base: service_id * 16,
                    count: all.len() as u16,
                    generation: 7,
                    // As the agent does: one backend needs none.
                    table: if service_id == 1 && all.len() > 1 { 4513 } else { 0 },
                },
                local_range: RangeRow { base: service_id * 16 + 8, count: local.len() as u16, generation: 9, table: 0 },
                torn: false,
            })
        };
        [
            row("10.96.0.1", 80, Some(Protocol::Tcp), 1, "default/web:http", &["10.1.1.3:8080", "10.1.2.3:8080"], &[]),
            row("10.96.0.1", 0, None, 0, "", &[], &[]),
            row(
                "10.96.0.10",
                53,
                Some(Protocol::Udp),
                2,
                "kube-system/dns:dns",
                &["10.1.1.5:5353"],
                &["10.1.1.5:5353"],
            ),
            row("10.96.0.77", 443, Some(Protocol::Tcp), 3, "default/empty", &[], &[]),
            row("fd00:96::1", 80, Some(Protocol::Tcp), 1, "default/web:http", &["[fd00:1::3]:8080"], &[]),
        ]
        .into_iter()
        .flatten()
        .collect()
    }

    #[test]
    fn guards_are_no_services() {
        assert_eq!(frontends().len(), 4);
    }
}
