//! `connections`: the flows of the per-packet path, one row each.
//!
//! A flow has two entries in the kernel, a masqueraded one four (`proxy_common::connection`); an LRU may have evicted some of
//! them. Every entry tells the whole flow or its masquerade half, so one that is left is enough for a row.

use std::{
    collections::BTreeMap,
    io::Write,
    net::{IpAddr, SocketAddr},
    slice,
};

use proxy_common::connection::{flags, hook, state};
use serde::Serialize;

use super::{
    Exit,
    filter::ServiceName,
    list,
    output::{Column, Row},
    shapes::{Endpoint, blank},
};
use crate::{dataplane::ebpf::read::ConnectionEntry, model::Protocol};

#[derive(Clone, PartialEq, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Connection {
    pub protocol: Protocol,
    pub client: Endpoint,
    /// What the client aims at; absent for a direct connection that had to yield its source port.
    pub frontend: Option<Endpoint>,
    pub backend: Endpoint,
    /// What the backend sees as its peer, where that is not the client.
    pub masqueraded: Option<Endpoint>,
    pub state: State,
    /// Since the last packet in either direction.
    pub idle_seconds: u32,
    pub namespace: String,
    pub name: String,
    pub port_name: String,
    #[serde(skip)]
    pub service: String,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum State {
    /// Packets of the client only.
    SynSent,
    Unreplied,
    /// Both sides were heard.
    Established,
    /// One side is done.
    Closing,
    Closed,
}

impl State {
    const fn name(self) -> &'static str {
        match self {
            Self::SynSent => "SYN_SENT",
            Self::Unreplied => "UNREPLIED",
            Self::Established => "ESTABLISHED",
            Self::Closing => "CLOSING",
            Self::Closed => "CLOSED",
        }
    }

    /// From the notes of both directions.
    const fn of(protocol: Protocol, forward: u8, reply: u8) -> Self {
        let either = forward | reply;
        if either & state::RST != 0 || (forward & reply & state::FIN) != 0 {
            Self::Closed
        } else if either & state::FIN != 0 {
            Self::Closing
        } else if reply & state::SEEN != 0 {
            Self::Established
        } else if matches!(protocol, Protocol::Tcp) {
            Self::SynSent
        } else {
            Self::Unreplied
        }
    }
}

impl Row for Connection {
    const KIND: &'static str = "ConnectionList";
    const COLUMNS: &'static [Column<Self>] = &[
        Column::new("PROTO", |c| c.protocol.to_string()),
        Column::new("CLIENT", |c| c.client.to_string()),
        Column::new("FRONTEND", |c| blank(c.frontend)),
        Column::new("BACKEND", |c| c.backend.to_string()),
        Column::wide("MASQUERADED", |c| blank(c.masqueraded)),
        Column::new("STATE", |c| c.state.name().to_owned()),
        Column::new("IDLE", |c| format!("{}s", c.idle_seconds)),
        Column::wide("SERVICE", |c| c.service.clone()),
    ];
}

pub fn execute(args: list::Args, out: &mut dyn Write) -> anyhow::Result<Exit> {
    let rows =
        flows(args.pins.open("in nftables mode the kernel tracks them: `conntrack -L --dst-nat`")?.connections()?);
    args.show(rows, |row| (&row.service, vips(row)), out)
}

fn vips(connection: &Connection) -> &[IpAddr] {
    connection.frontend.as_ref().map_or(&[], |frontend| slice::from_ref(&frontend.address))
}

/// A flow as the backend's side sees it: what both halves have in common. The client's port is the one after a remap.
type Inner = (Protocol, SocketAddr, SocketAddr);

#[derive(Default)]
struct Flow {
    /// Client and frontend as the client sees them.
    outer: Option<(SocketAddr, SocketAddr)>,
    direct: bool,
    masqueraded: Option<SocketAddr>,
    forward: u8,
    reply: u8,
    idle_seconds: Option<u32>,
    service: String,
}

fn flows(entries: Vec<ConnectionEntry>) -> Vec<Connection> {
    let mut flows: BTreeMap<Inner, Flow> = BTreeMap::new();
    for entry in entries {
        // Asks for a masquerade port that no packet has taken yet; the flow's other entries tell all there is.
        if entry.flags & flags::PENDING != 0 {
            continue;
        }
        // The programs translate nothing else.
        let Some(protocol) = Protocol::from_number(entry.protocol) else { continue };
        let seen = Seen::of(&entry);
        let flow = flows.entry((protocol, seen.client, seen.backend)).or_default();
        if seen.forward {
            flow.forward |= entry.state;
        } else {
            flow.reply |= entry.state;
        }
        flow.idle_seconds = Some(flow.idle_seconds.map_or(entry.idle_secs, |idle| idle.min(entry.idle_secs)));
        flow.direct |= entry.flags & flags::DIRECT != 0;
        flow.outer = flow.outer.or(seen.outer);
        flow.masqueraded = flow.masqueraded.or(seen.masqueraded);
        flow.service = entry.service;
    }
    flows.into_iter().map(connection).collect()
}

/// What one entry tells.
struct Seen {
    forward: bool,
    client: SocketAddr,
    backend: SocketAddr,
    outer: Option<(SocketAddr, SocketAddr)>,
    masqueraded: Option<SocketAddr>,
}

impl Seen {
    fn of(entry: &ConnectionEntry) -> Self {
        let ConnectionEntry { hook, src, dst, to, other, flags, .. } = *entry;
        let with_port = |addr: SocketAddr, port| SocketAddr::new(addr.ip(), port);
        match (flags & flags::MASQUERADE != 0, hook == hook::INGRESS) {
            // client → VIP becomes client:other → backend
            (false, true) => Self {
                forward: true,
                client: with_port(src, other),
                backend: to,
                outer: Some((src, dst)),
                masqueraded: None,
            },
            // backend → client becomes VIP → client:other
            (false, false) => Self {
                forward: false,
                client: dst,
                backend: src,
                outer: Some((with_port(dst, other), to)),
                masqueraded: None,
            },
            // client → backend becomes node → backend
            (true, false) => Self { forward: true, client: src, backend: dst, outer: None, masqueraded: Some(to) },
            // backend → node becomes backend → client
            (true, true) => Self { forward: false, client: to, backend: src, outer: None, masqueraded: Some(dst) },
        }
    }
}

fn connection(((protocol, inner_client, backend), flow): (Inner, Flow)) -> Connection {
    let Flow { outer, direct, masqueraded, forward, reply, idle_seconds, service } = flow;
    // What the backend sees differs from the client also where only the source port had to change.
    let (client, frontend) = outer.map_or((inner_client, None), |(client, frontend)| (client, Some(frontend)));
    let remapped = (client != inner_client).then_some(inner_client);
    let name = ServiceName::parse(&service);
    Connection {
        protocol,
        client: client.into(),
        frontend: frontend.filter(|_| !direct).map(Endpoint::from),
        backend: backend.into(),
        masqueraded: masqueraded.or(remapped).map(Endpoint::from),
        state: State::of(protocol, forward, reply),
        idle_seconds: idle_seconds.unwrap_or_default(),
        namespace: name.namespace.to_owned(),
        name: name.name.to_owned(),
        port_name: name.port.to_owned(),
        service,
    }
}

#[cfg(test)]
mod tests {
    use proxy_common::{
        Address, Be16, Ipv4Be,
        connection::{ConnectionKey, ConnectionValue, pair},
        proto,
    };

    use super::*;
    use crate::cli::output::tests::every_format;

    type Pair = (ConnectionKey<Ipv4Be>, ConnectionValue<Ipv4Be>);

    fn ip(text: &str) -> Ipv4Be {
        Ipv4Be::from_ip(text.parse().unwrap()).unwrap()
    }

    /// Both entries of a pair, given the first as `src → dst`, rewritten to `to` with `other`.
    fn entries(hook: u8, src: (&str, u16), dst: (&str, u16), to: (&str, u16), other: u16, flags: u8) -> [Pair; 2] {
        let p = Be16::from_host;
        let key = ConnectionKey::new(hook, proto::TCP, ip(src.0), p(src.1), ip(dst.0), p(dst.1));
        let value =
            ConnectionValue { addr: ip(to.0), port: p(to.1), other: p(other), service: 3, flags, ..Default::default() };
        [(key, value), pair(&key, &value)]
    }

    fn entry((key, value): Pair, state: u8, idle_secs: u32) -> ConnectionEntry {
        let addr = |addr: Ipv4Be, port: Be16| SocketAddr::new(addr.to_ip(), port.to_host());
        ConnectionEntry {
            protocol: key.proto,
            hook: key.hook,
            src: addr(key.src, key.sport),
            dst: addr(key.dst, key.dport),
            to: addr(value.addr, value.port),
            other: value.other.to_host(),
            flags: value.flags,
            state,
            idle_secs,
            service: "default/web:http".into(),
        }
    }

    const CLIENT: (&str, u16) = ("192.0.2.7", 40_000);
    const VIP: (&str, u16) = ("10.96.0.1", 80);
    const BACKEND: (&str, u16) = ("10.1.1.3", 8080);
    const NODE: (&str, u16) = ("192.0.2.1", 1025);

    fn masqueraded() -> Vec<ConnectionEntry> {
        let [forward, reply] = entries(hook::INGRESS, CLIENT, VIP, BACKEND, CLIENT.1, flags::NEEDS_MASQUERADE);
        let [out, back] = entries(hook::EGRESS, CLIENT, BACKEND, NODE, BACKEND.1, flags::MASQUERADE);
        vec![
            entry(forward, state::SEEN, 4),
            entry(reply, state::SEEN, 3),
            entry(out, state::SEEN, 4),
            entry(back, state::SEEN, 3),
        ]
    }

    #[test]
    fn four_entries_are_one_row() {
        let rows = flows(masqueraded());
        assert_eq!(rows.len(), 1, "{rows:?}");
        let row = rows.first().unwrap();
        assert_eq!(row.client.to_string(), "192.0.2.7:40000");
        assert_eq!(row.frontend.unwrap().to_string(), "10.96.0.1:80");
        assert_eq!(row.backend.to_string(), "10.1.1.3:8080");
        assert_eq!(row.masqueraded.unwrap().to_string(), "192.0.2.1:1025");
        assert_eq!((row.state, row.idle_seconds), (State::Established, 3));
    }

    #[test]
    fn either_half_of_a_pair_is_enough() {
        let all = masqueraded();
        for plain in [0, 1] {
            for masquerade in [2, 3] {
                let rows = flows(vec![all[plain].clone(), all[masquerade].clone()]);
                assert_eq!(rows.len(), 1, "{plain} {masquerade}: {rows:?}");
                let row = rows.first().unwrap();
                assert_eq!(row.client.to_string(), "192.0.2.7:40000");
                assert_eq!(row.masqueraded.unwrap().to_string(), "192.0.2.1:1025");
            }
        }
    }

    #[test]
    fn a_remapped_flow_shows_both_ports() {
        for one in entries(hook::INGRESS, CLIENT, VIP, BACKEND, 50_001, 0) {
            let rows = flows(vec![entry(one, state::SEEN, 0)]);
            let row = rows.first().unwrap();
            assert_eq!(row.client.to_string(), "192.0.2.7:40000");
            assert_eq!(row.masqueraded.unwrap().to_string(), "192.0.2.7:50001");
        }
    }

    #[test]
    fn a_direct_connection_has_no_frontend() {
        let [forward, reply] = entries(hook::INGRESS, CLIENT, BACKEND, BACKEND, 50_001, flags::DIRECT);
        let rows = flows(vec![entry(forward, state::SEEN, 0), entry(reply, 0, 0)]);
        assert_eq!(rows.len(), 1);
        assert_eq!(rows.first().unwrap().frontend, None);
        assert_eq!(rows.first().unwrap().state, State::SynSent);
    }

    #[test]
    fn states_follow_both_directions() {
        use state::{FIN, RST, SEEN};
        for (protocol, forward, reply, expected) in [
            (Protocol::Tcp, SEEN, 0, State::SynSent),
            (Protocol::Tcp, SEEN, SEEN, State::Established),
            (Protocol::Tcp, SEEN | FIN, SEEN, State::Closing),
            (Protocol::Tcp, SEEN, SEEN | FIN, State::Closing),
            (Protocol::Tcp, SEEN | FIN, SEEN | FIN, State::Closed),
            (Protocol::Tcp, SEEN, SEEN | RST, State::Closed),
            (Protocol::Udp, SEEN, 0, State::Unreplied),
            (Protocol::Udp, SEEN, SEEN, State::Established),
        ] {
            assert_eq!(State::of(protocol, forward, reply), expected, "{protocol} {forward} {reply}");
        }
    }

    #[test]
    fn connections_in_every_format() {
        let v6 = |text: &str| text.parse::<SocketAddr>().unwrap();
        let mut all = masqueraded();
        all.push(ConnectionEntry {
            protocol: proto::UDP,
            hook: hook::INGRESS,
            src: v6("[fd00:1::2]:40001"),
            dst: v6("[fd00:96::a]:53"),
            to: v6("[fd00:1::5]:5353"),
            other: 40_001,
            flags: 0,
            state: state::SEEN,
            idle_secs: 12,
            service: "kube-system/dns:dns".into(),
        });
        insta::assert_snapshot!("connections", every_format(&flows(all)));
    }
}
