//! `counters`: what the datapath counted, per Service and per reason.

use std::io::Write;

use clap::Args as ClapArgs;
use proxy_common::counters::{Reason, ServiceCounters};
use serde::Serialize;

use super::{
    Exit,
    filter::{self, Filter, ServiceName},
    output::{self, API_VERSION, Column, Format, OutputArgs, Row, SortArgs},
    pins::PinsArgs,
};

#[derive(Clone, Debug, ClapArgs)]
pub struct Args {
    /// Only Services of this namespace
    #[arg(short, long, value_name = "NAMESPACE")]
    namespace: Option<String>,
    /// Only this Service
    #[arg(long, value_name = "NAMESPACE/NAME", value_parser = filter::service)]
    service: Option<String>,
    #[command(flatten)]
    sort: SortArgs,
    #[command(flatten)]
    output: OutputArgs,
    #[command(flatten)]
    pins: PinsArgs,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Service {
    pub namespace: String,
    pub name: String,
    pub port_name: String,
    pub connections: u64,
    pub packets: u64,
    pub bytes: u64,
    pub refused: u64,
    #[serde(skip)]
    pub service: String,
}

impl Row for Service {
    const KIND: &'static str = "CounterList";
    const COLUMNS: &'static [Column<Self>] = &[
        Column::new("SERVICE", |c| c.service.clone()),
        Column::new("CONNECTIONS", |c| c.connections.to_string()),
        Column::new("PACKETS", |c| c.packets.to_string()),
        Column::new("BYTES", |c| c.bytes.to_string()),
        Column::new("REFUSED", |c| c.refused.to_string()),
    ];
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Event {
    pub reason: &'static str,
    /// The packet or the connection was lost to its sender.
    pub drop: bool,
    pub count: u64,
    pub meaning: &'static str,
}

impl Row for Event {
    const KIND: &'static str = "EventList";
    const COLUMNS: &'static [Column<Self>] = &[
        Column::new("REASON", |e| e.reason.to_owned()),
        Column::new("CLASS", |e| if e.drop { "drop" } else { "note" }.to_owned()),
        Column::new("COUNT", |e| e.count.to_string()),
        Column::wide("MEANING", |e| e.meaning.to_owned()),
    ];
}

/// Both lists as one document.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Document<'a> {
    api_version: &'static str,
    kind: &'static str,
    items: &'a [Service],
    /// Absent where a filter asks for Services: reasons are counted for the whole datapath.
    #[serde(skip_serializing_if = "Option::is_none")]
    events: Option<&'a [Event]>,
}

impl Service {
    pub fn new(service: String, counters: ServiceCounters) -> Self {
        let ServiceCounters { connections, packets, bytes, refused, turns: _ } = counters;
        let name = ServiceName::parse(&service);
        Self {
            namespace: name.namespace.to_owned(),
            name: name.name.to_owned(),
            port_name: name.port.to_owned(),
            connections,
            packets,
            bytes,
            refused,
            service,
        }
    }
}

impl Event {
    pub fn new(reason: Reason, count: u64) -> Self {
        Self { reason: reason.name(), drop: reason.is_drop(), count, meaning: meaning(reason) }
    }
}

const fn meaning(reason: Reason) -> &'static str {
    match reason {
        Reason::Rejected => "no endpoint: the caller was refused",
        Reason::PolicyDrop => "endpoints exist, none where the traffic policy allows",
        Reason::MasqueradeExhausted => "no masquerade port free towards that backend; widen --masquerade-ports",
        Reason::NoMasqueradeAddress => "the device that leads to the backend has no address to masquerade with",
        Reason::InsertFailed => "the connection table refused an entry; see status for how full it is",
        Reason::RewriteFailed => "the kernel refused to rewrite a packet",
        Reason::RejectFailed => "a refusal could not be built; the packet was dropped silently",
        Reason::TornRead => "an entry changed while it was read; it was read again",
        Reason::TornTwice => "a frontend changed twice while it was read; the caller was refused",
        Reason::StaleSlot => "a backend list was replaced while it was read; the frontend was looked up again",
        Reason::PortRemapped => "a flow got another source port, its reply tuple was taken",
        Reason::PairRepaired => "a missing half of a connection was put back",
        Reason::UnknownFragment => {
            "a fragment whose first part was not seen; left to the kernel unless it is for a VIP"
        }
        Reason::Unparsed => "a header that is not understood; left to the kernel",
        Reason::NotASyn => "TCP without a connection and no SYN; left to the kernel",
        Reason::NotRemembered => {
            "a VIP could not be noted down for a socket: the connection works, but shows its backend"
        }
        Reason::StrayFragment => {
            "a fragment for a VIP whose first part was refused, dropped or not seen; of the latter the agent has a copy"
        }
        Reason::Martian => "to a VIP from a loopback address or from a VIP",
        Reason::Unserved => "to a VIP, by nobody translated, and about to leave the node",
        Reason::RejectLimited => "more refusals than are sent in a second; the packet was dropped silently",
        Reason::SourceRange => "a new flow from outside the ranges that its Service may be asked from",
        Reason::Bypassed => "packets that XDP sent on past the stack",
        Reason::LostConnection => "TCP of a connection to a VIP that has lost its entries; reset",
        Reason::TableFull => "a new flow, while those that are open fill the table; see --map-connections",
        Reason::HeldFragment => "a fragment that came before its datagram's first one; kept until that comes",
        Reason::ReturnedFragment => "one of those, put back after its first",
        Reason::RemapExhausted => "no source port left for a flow whose reply tuple was taken",
    }
}

pub fn execute(args: Args, out: &mut dyn Write) -> anyhow::Result<Exit> {
    let Args { namespace, service, sort, output, pins } = args;
    let filter = Filter { namespace, service, vip: None };
    let opened = pins.open("in nftables mode nothing is counted per Service; flows that were ended are in /metrics")?;
    let mut services = opened.service_counters()?;
    services.retain(|row| filter.admits(&row.service, &[]));
    output::sort(&mut services, &sort)?;
    let events = if filter.is_empty() { Some(opened.events()?) } else { None };
    print(&services, events.as_deref(), &output, out)?;
    Ok(Exit::Done)
}

fn print(services: &[Service], events: Option<&[Event]>, args: &OutputArgs, out: &mut dyn Write) -> anyhow::Result<()> {
    match args.output {
        Format::Json | Format::Yaml => {
            let document = Document { api_version: API_VERSION, kind: Service::KIND, items: services, events };
            output::document(&document, args.output, out)
        }
        Format::Table | Format::Wide => {
            let wide = args.output == Format::Wide;
            output::table(services, wide, !args.no_headers, out)?;
            let Some(events) = events else { return Ok(()) };
            writeln!(out)?;
            // What never happened is of interest to nobody who did not ask for everything.
            let events: Vec<_> = events.iter().filter(|event| wide || event.count > 0).cloned().collect();
            output::table(&events, wide, !args.no_headers, out)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_in_every_format() {
        let services = [
            Service::new(
                "default/web:http".into(),
                ServiceCounters { connections: 12, packets: 340, bytes: 51_234, ..Default::default() },
            ),
            Service::new("kube-system/dns:dns".into(), ServiceCounters { refused: 3, ..Default::default() }),
        ];
        let events: Vec<_> =
            Reason::ALL.iter().map(|reason| Event::new(*reason, u64::from(*reason as u32 % 3))).collect();
        let text = [Format::Table, Format::Wide, Format::Json, Format::Yaml].map(|output| {
            let mut out = Vec::new();
            print(&services, Some(&events), &OutputArgs { output, no_headers: false }, &mut out).unwrap();
            format!("--- {output:?}\n{}", String::from_utf8(out).unwrap())
        });
        insta::assert_snapshot!("counters", text.concat());
    }

    #[test]
    fn a_filter_leaves_the_reasons_out() {
        let mut out = Vec::new();
        let args = OutputArgs { output: Format::Json, no_headers: false };
        print(&[], None, &args, &mut out).unwrap();
        assert!(!String::from_utf8(out).unwrap().contains("events"));
    }
}
