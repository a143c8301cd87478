//! `services`: the frontends in the kernel, and whether each is in force.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{self, Write},
    net::{IpAddr, SocketAddr},
    rc::Rc,
    slice,
};

use anyhow::Context;
use serde::Serialize;

use super::{
    Exit, agent,
    filter::ServiceName,
    list,
    output::{Column, Row},
    pins::{Agent, Frontend, Knows},
    shapes::{Endpoint, FrontendAddress, algorithm, blank},
};
use crate::{
    desired::{Action, Algorithm, FrontendKind, Verdict, Verdicts},
    model::{Protocol, ServiceKey},
    status::report::Unprogrammed,
};

#[derive(Clone, PartialEq, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Service {
    pub namespace: String,
    pub name: String,
    /// Empty for an unnamed port.
    pub port_name: String,
    #[serde(rename = "type")]
    pub kind: String,
    pub frontend: FrontendAddress,
    pub backends: Vec<Endpoint>,
    pub local_backends: Vec<Endpoint>,
    /// `Programmed`, `Pending` or `Degraded`.
    pub state: String,
    pub reason: Option<String>,
    /// Since when there has been something to say of it, RFC 3339; absent where there is nothing.
    pub since: Option<String>,
    /// Absent where the kernel does not hold the frontend.
    pub verdicts: Option<Verdicts>,
    pub algorithm: Option<Algorithm>,
    /// Positions of the Maglev tables; absent where the kernel chooses otherwise, or needs no table.
    pub maglev_table: Option<u32>,
    pub local_maglev_table: Option<u32>,
    pub affinity_seconds: Option<u32>,
    pub service_id: Option<u32>,
    /// `namespace/name:port`, as columns and filters have it.
    #[serde(skip)]
    pub service: String,
    #[serde(skip)]
    pub outline: Rc<Outline>,
}

/// The whole Service as kubectl shows it, told from its frontends.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Outline {
    external: BTreeSet<IpAddr>,
    ports: BTreeMap<(String, Protocol), Port>,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
struct Port {
    own: Option<u16>,
    node: Option<u16>,
}

impl Outline {
    fn add(&mut self, row: &Service) {
        let Service { port_name, kind, frontend: FrontendAddress { address, port, protocol }, .. } = row;
        let is = |of: FrontendKind| *kind == of.to_string();
        let number = self.ports.entry((port_name.clone(), *protocol)).or_default();
        if is(FrontendKind::NodePort) {
            number.node = Some(*port);
            return;
        }
        number.own = Some(*port);
        if !is(FrontendKind::ClusterIp) {
            self.external.insert(*address);
        }
    }

    fn external(&self) -> String {
        self.external.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
    }

    /// `53/UDP,80:30080/TCP`
    fn ports(&self) -> String {
        let ports: BTreeSet<_> = self.ports.iter().map(|((_, protocol), port)| (*port, *protocol)).collect();
        let ports = ports.into_iter().map(|(Port { own, node }, protocol)| {
            let numbers: Vec<_> = [own, node].into_iter().flatten().map(|number| number.to_string()).collect();
            format!("{}/{protocol}", numbers.join(":"))
        });
        ports.collect::<Vec<_>>().join(",")
    }
}

impl Row for Service {
    const KIND: &'static str = "ServiceList";
    const COLUMNS: &'static [Column<Self>] = &[
        Column::new("SERVICE", |s| s.service.clone()),
        Column::new("TYPE", |s| s.kind.clone()),
        Column::new("FRONTEND", |s| s.frontend.to_string()),
        Column::wide("EXTERNAL-IP", |s| s.outline.external()),
        Column::wide("PORT(S)", |s| s.outline.ports()),
        Column::new("BACKENDS", |s| in_use(s).to_string()),
        Column::wide("LOCAL", |s| s.local_backends.len().to_string()),
        Column::wide("POD", |s| blank(s.verdicts.map(|v| verdict(v.pod)))),
        Column::wide("NODE", |s| blank(s.verdicts.map(|v| verdict(v.node)))),
        Column::wide("EXTERNAL", |s| blank(s.verdicts.map(|v| verdict(v.external)))),
        Column::wide("ALGORITHM", |s| {
            blank(s.algorithm.map(|choice| algorithm(choice, [s.maglev_table, s.local_maglev_table])))
        }),
        Column::wide("AFFINITY", |s| blank(s.affinity_seconds.map(|seconds| format!("{seconds}s")))),
        Column::wide("ID", |s| blank(s.service_id)),
        Column::wide("SINCE", |s| blank(s.since.as_ref())),
        Column::new("STATE", |s| match &s.reason {
            Some(reason) => format!("{}: {reason}", s.state),
            None => s.state.clone(),
        }),
    ];
}

/// Backends that some origin is served from: where the policy is Local there are none but the local ones.
fn in_use(service: &Service) -> usize {
    service.backends.iter().chain(&service.local_backends).collect::<BTreeSet<_>>().len()
}

fn verdict(verdict: Verdict) -> String {
    let action = match verdict.action {
        Action::PickAll => "all",
        Action::PickLocal => "local",
        Action::Drop => "drop",
        Action::Reject => "reject",
        Action::Pass => "pass",
    };
    if verdict.masquerade { format!("{action},masquerade") } else { action.to_owned() }
}

pub fn execute(args: list::Args, out: &mut dyn Write) -> anyhow::Result<Exit> {
    let (frontends, report) = match args.pins.knows()? {
        Knows::Pins(opened) => {
            let Agent { running: _, pid: _, report, error } = args.pins.agent(&opened);
            if let Some(error) = error {
                // The pins are worth showing all the same.
                let _ =
                    writeln!(io::stderr(), "warning: states are what the pins say; the agent does not answer: {error}");
            }
            (opened.frontends()?, report)
        }
        Knows::Agent(addr, report) => (in_force(addr)?, Some(*report)),
    };
    // One that does not get all that it asks for is in force, and says so.
    let said = report.into_iter().flat_map(|report| report.unprogrammed.into_iter().chain(report.limited)).collect();
    let rows = merge(frontends, said);
    args.show(rows, |row| (&row.service, slice::from_ref(&row.frontend.address)), out)
}

/// As the agent says it.
pub(super) fn in_force(addr: SocketAddr) -> anyhow::Result<Vec<Frontend>> {
    let rows = agent::frontends(addr).with_context(|| format!("asking the agent at {addr} what is in force"))?;
    Ok(rows.into_iter().map(Frontend::from).collect())
}

/// What the kernel holds, and what the agent says is not in force; a frontend may be in both (an older version serves).
fn merge(frontends: Vec<Frontend>, unprogrammed: Vec<Unprogrammed>) -> Vec<Service> {
    let mut rows: BTreeMap<(String, FrontendAddress), Service> = frontends
        .into_iter()
        .map(|frontend| {
            let row = programmed(frontend);
            ((row.service.clone(), row.frontend), row)
        })
        .collect();
    for Unprogrammed { service, kind, address, port, protocol, state, reason, since } in unprogrammed {
        let frontend = FrontendAddress { address, port, protocol };
        let row = rows.entry((service.clone(), frontend)).or_insert_with(|| absent(service, kind, frontend));
        row.state = state;
        row.reason = reason;
        row.since = Some(since);
    }
    let mut outlines: BTreeMap<ServiceKey, Outline> = BTreeMap::new();
    for row in rows.values() {
        outlines.entry(key(row)).or_default().add(row);
    }
    let outlines: BTreeMap<_, _> = outlines.into_iter().map(|(key, outline)| (key, Rc::new(outline))).collect();
    let outlined =
        rows.into_values().map(|row| Service { outline: outlines.get(&key(&row)).cloned().unwrap_or_default(), ..row });
    outlined.collect()
}

fn key(row: &Service) -> ServiceKey {
    ServiceKey::new(&row.namespace, &row.name)
}

fn programmed(frontend: Frontend) -> Service {
    let Frontend { service, service_id, kind, frontend, all, local, verdicts, algorithm, affinity_secs } = frontend;
    Service {
        maglev_table: all.table,
        local_maglev_table: local.table,
        backends: all.backends,
        local_backends: local.backends,
        state: "Programmed".to_owned(),
        verdicts: Some(verdicts),
        algorithm: Some(algorithm),
        affinity_seconds: affinity_secs,
        service_id,
        ..absent(service, kind, frontend)
    }
}

/// Not in the kernel, as far as is known yet.
fn absent(service: String, kind: String, frontend: FrontendAddress) -> Service {
    let name = ServiceName::parse(&service);
    Service {
        namespace: name.namespace.to_owned(),
        name: name.name.to_owned(),
        port_name: name.port.to_owned(),
        kind,
        frontend,
        backends: Vec::new(),
        local_backends: Vec::new(),
        state: String::new(),
        reason: None,
        since: None,
        verdicts: None,
        algorithm: None,
        maglev_table: None,
        local_maglev_table: None,
        affinity_seconds: None,
        service_id: None,
        outline: Rc::default(),
        service,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        cli::{output::tests::every_format, pins::tests::frontends},
        model::Protocol,
    };

    fn degraded(address: &str, service: &str) -> Unprogrammed {
        Unprogrammed {
            service: service.into(),
            kind: "ClusterIP".into(),
            address: address.parse().unwrap(),
            port: 80,
            protocol: Protocol::Tcp,
            state: "Degraded".into(),
            reason: Some("map frontends_v4 is full (65536); raise --map-frontends".into()),
            since: "2026-11-21T02:31:58.042Z".into(),
        }
    }

    #[test]
    fn services_in_every_format() {
        let rows = merge(frontends(), vec![degraded("10.96.0.99", "default/late:http")]);
        insta::assert_snapshot!("services", every_format(&rows));
    }

    #[test]
    fn an_older_version_in_the_kernel_is_one_row_that_says_so() {
        let first = frontends().remove(0);
        let rows = merge(vec![first.clone()], vec![degraded(&first.frontend.address.to_string(), &first.service)]);
        assert_eq!(rows.len(), 1);
        let row = rows.first().unwrap();
        assert_eq!(row.state, "Degraded");
        assert_eq!(row.backends.len(), first.all.backends.len(), "the backends that serve now");
    }

    /// What kubectl says in EXTERNAL-IP and PORT(S) is told of each of a Service's frontends, and of no other's.
    #[test]
    fn a_services_addresses_and_ports_are_told_together() {
        let row = |kind: FrontendKind, service: &str, address: &str, port, protocol| Frontend {
            kind: kind.to_string(),
            service: service.into(),
            frontend: FrontendAddress { address: address.parse().unwrap(), port, protocol },
            ..frontends().remove(0)
        };
        let (tcp, udp) = (Protocol::Tcp, Protocol::Udp);
        let rows = merge(
            vec![
                row(FrontendKind::ClusterIp, "a/web:http", "10.96.0.1", 80, tcp),
                row(FrontendKind::ClusterIp, "a/web:dns", "10.96.0.1", 53, udp),
                row(FrontendKind::ClusterIp, "a/web:dns-tcp", "10.96.0.1", 53, tcp),
                row(FrontendKind::NodePort, "a/web:http", "192.0.2.1", 30080, tcp),
                row(FrontendKind::NodePort, "a/web:http", "127.0.0.1", 30080, tcp),
                row(FrontendKind::LoadBalancer, "a/web:http", "203.0.113.9", 80, tcp),
                row(FrontendKind::ExternalIp, "a/web:http", "198.51.100.1", 80, tcp),
                row(FrontendKind::ClusterIp, "a/web-2:http", "10.96.0.2", 8080, tcp),
            ],
            vec![degraded("10.96.0.3", "a/late")],
        );
        let told = |name: &str| -> BTreeSet<_> {
            let of_it = rows.iter().filter(|row| row.name == name);
            of_it.map(|row| (row.outline.external(), row.outline.ports())).collect()
        };
        let all = ("198.51.100.1,203.0.113.9".to_owned(), "53/TCP,53/UDP,80:30080/TCP".to_owned());
        assert_eq!(told("web"), [all].into());
        assert_eq!(told("web-2"), [(String::new(), "8080/TCP".to_owned())].into());
        assert_eq!(told("late"), [(String::new(), "80/TCP".to_owned())].into());
    }

    /// A Service whose policy is Local has none but local backends, and is not without any.
    #[test]
    fn local_backends_count_and_count_once() {
        let mut first = frontends().remove(0);
        first.local.backends = first.all.backends.iter().take(1).copied().collect();
        let count = |frontend: &Frontend| in_use(merge(vec![frontend.clone()], vec![]).first().unwrap());
        assert_eq!(count(&first), first.all.backends.len());
        first.all.backends.clear();
        assert_eq!(count(&first), 1);
    }
}
