//! `affinity`: whom session affinity remembers, and where their next connection goes.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    io::Write,
    net::IpAddr,
};

use proxy_common::affinity::is_expired;
use serde::Serialize;

use super::{
    Exit,
    filter::ServiceName,
    list,
    output::{Column, Row},
    pins::Frontend,
    shapes::{Endpoint, blank, duration},
};
use crate::dataplane::ebpf::read::{AffinityClient, AffinityEntry};

/// One client of one ServicePort.
#[derive(Clone, PartialEq, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Affinity {
    pub namespace: String,
    pub name: String,
    pub port_name: String,
    pub client: Client,
    pub backend: Endpoint,
    /// Since the client's last connection began.
    pub age_seconds: u32,
    /// Until another backend may be chosen; absent where the Service has no affinity now.
    pub remaining_seconds: Option<u32>,
    pub timeout_seconds: Option<u32>,
    pub state: State,
    pub service_id: u32,
    #[serde(skip)]
    pub service: String,
    #[serde(skip)]
    pub vips: Vec<IpAddr>,
}

/// A packet is told by its source, a socket by its network namespace.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Client {
    pub address: Option<IpAddr>,
    pub netns_cookie: Option<u64>,
    /// That namespace is the node's own.
    pub node: bool,
}

impl fmt::Display for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.address, self.netns_cookie) {
            (Some(address), _) => address.fmt(f),
            (None, _) if self.node => f.write_str("node"),
            (None, cookie) => write!(f, "netns {}", blank(cookie)),
        }
    }
}

/// Whether the client's next connection goes there.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub enum State {
    Active,
    /// Its time is over.
    Expired,
    /// No frontend of the Service picks from it any more.
    BackendGone,
    /// The Service has no affinity any more.
    Off,
}

impl Row for Affinity {
    const KIND: &'static str = "AffinityList";
    const COLUMNS: &'static [Column<Self>] = &[
        Column::new("SERVICE", |a| a.service.clone()),
        Column::new("CLIENT", |a| a.client.to_string()),
        Column::new("BACKEND", |a| a.backend.to_string()),
        Column::new("AGE", |a| duration(a.age_seconds.into())),
        Column::new("LEFT", |a| blank(a.remaining_seconds.map(|left| duration(left.into())))),
        Column::wide("TIMEOUT", |a| blank(a.timeout_seconds.map(|timeout| duration(timeout.into())))),
        Column::wide("ID", |a| a.service_id.to_string()),
        Column::new("STATE", |a| format!("{:?}", a.state)),
    ];
}

pub fn execute(args: list::Args, out: &mut dyn Write) -> anyhow::Result<Exit> {
    let opened = args.pins.open("in nftables mode `nft list set ip proxy-agent affinity` has the clients")?;
    let rows = rows(opened.affinities()?, &opened.frontends()?, opened.node_netns_cookie()?);
    args.show(rows, |row| (&row.service, &row.vips), out)
}

/// What the frontends of a Service port say of it, of both families: no backend is in both.
#[derive(Default)]
struct Port {
    timeout_secs: Option<u32>,
    vips: BTreeSet<IpAddr>,
    backends: BTreeSet<Endpoint>,
}

fn rows(entries: Vec<AffinityEntry>, frontends: &[Frontend], node: u64) -> Vec<Affinity> {
    let mut ports: BTreeMap<u32, Port> = BTreeMap::new();
    for Frontend { service_id, frontend, all, local, affinity_secs, .. } in frontends {
        let Some(service_id) = service_id else { continue };
        let port = ports.entry(*service_id).or_default();
        port.timeout_secs = port.timeout_secs.max(*affinity_secs);
        port.vips.insert(frontend.address);
        port.backends.extend(all.backends.iter().chain(&local.backends));
    }
    let gone = Port::default();
    let mut rows: Vec<_> = entries
        .into_iter()
        .map(|entry| {
            let port = ports.get(&entry.service_id).unwrap_or(&gone);
            row(entry, port, node)
        })
        .collect();
    rows.sort_by(|a, b| {
        (&a.service, a.service_id, a.client, a.backend).cmp(&(&b.service, b.service_id, b.client, b.backend))
    });
    rows
}

fn row(entry: AffinityEntry, port: &Port, node: u64) -> Affinity {
    let AffinityEntry { client, service_id, service, backend, age_secs } = entry;
    let Port { timeout_secs, vips, backends } = port;
    let backend = Endpoint::from(backend);
    let state = match timeout_secs {
        None => State::Off,
        Some(timeout) if is_expired(0, age_secs, *timeout) => State::Expired,
        Some(_) if !backends.contains(&backend) => State::BackendGone,
        Some(_) => State::Active,
    };
    let name = ServiceName::parse(&service);
    Affinity {
        namespace: name.namespace.to_owned(),
        name: name.name.to_owned(),
        port_name: name.port.to_owned(),
        client: match client {
            AffinityClient::Address(address) => Client { address: Some(address), netns_cookie: None, node: false },
            AffinityClient::Netns(cookie) => Client { address: None, netns_cookie: Some(cookie), node: cookie == node },
        },
        backend,
        age_seconds: age_secs,
        remaining_seconds: timeout_secs.map(|timeout| timeout.saturating_sub(age_secs)),
        timeout_seconds: *timeout_secs,
        state,
        service_id,
        service,
        vips: vips.iter().copied().collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{output::tests::every_format, pins::tests::frontends};

    const NODE: u64 = 1;

    fn entry(client: AffinityClient, service_id: u32, backend: &str, age_secs: u32) -> AffinityEntry {
        let service = match service_id {
            1 => "default/web:http",
            3 => "default/sticky",
            _ => "",
        };
        AffinityEntry { client, service_id, service: service.into(), backend: backend.parse().unwrap(), age_secs }
    }

    fn address(text: &str) -> AffinityClient {
        AffinityClient::Address(text.parse().unwrap())
    }

    /// One port with affinity, one without.
    fn some_sticky() -> Vec<Frontend> {
        let mut all = frontends();
        for frontend in all.iter_mut().filter(|frontend| frontend.service_id == Some(3)) {
            frontend.service = "default/sticky".into();
            frontend.all.backends = vec![Endpoint::from("10.1.1.3:8080".parse::<std::net::SocketAddr>().unwrap())];
        }
        all
    }

    fn some() -> Vec<AffinityEntry> {
        vec![
            entry(AffinityClient::Netns(4_711), 3, "10.1.1.3:8080", 3_700),
            entry(address("192.0.2.10"), 3, "10.1.1.3:8080", 10_801),
            entry(address("192.0.2.9"), 3, "10.1.1.9:8080", 5),
            entry(AffinityClient::Netns(NODE), 3, "10.1.1.3:8080", 0),
            entry(address("fd00:1::7"), 1, "[fd00:1::3]:8080", 60),
            entry(address("192.0.2.9"), 9, "10.1.1.3:8080", 60),
        ]
    }

    #[test]
    fn affinity_in_every_format() {
        insta::assert_snapshot!("affinity", every_format(&rows(some(), &some_sticky(), NODE)));
    }

    #[test]
    fn a_state_says_whether_the_entry_counts() {
        let rows = rows(some(), &some_sticky(), NODE);
        let states: Vec<_> = rows.iter().map(|row| (row.client.to_string(), row.state)).collect();
        let expected = [
            ("192.0.2.9", State::Off),
            ("node", State::Active),
            ("netns 4711", State::Active),
            ("192.0.2.9", State::BackendGone),
            ("192.0.2.10", State::Expired),
            ("fd00:1::7", State::Off),
        ];
        assert_eq!(states, expected.map(|(client, state)| (client.to_owned(), state)));
        // Up to its last second it counts, as in the datapath.
        let last = self::rows(vec![entry(address("192.0.2.9"), 3, "10.1.1.3:8080", 10_800)], &some_sticky(), NODE);
        assert_eq!(last.first().map(|row| (row.state, row.remaining_seconds)), Some((State::Active, Some(0))));
    }

    #[test]
    fn a_row_knows_every_vip_of_its_port() {
        let rows = rows(some(), &some_sticky(), NODE);
        let vips = rows.iter().find(|row| row.service_id == 1).map(|row| row.vips.len());
        assert_eq!(vips, Some(2), "one of each family");
    }
}
