//! `backends`: which backend serves which frontends.

use std::{io::Write, slice};

use serde::Serialize;

use super::{
    Exit,
    filter::ServiceName,
    list,
    output::{Column, Row},
    pins::{Frontend, Knows, Range},
    services,
    shapes::{self, Endpoint, FrontendAddress, blank},
};
use crate::desired::Algorithm;

/// One backend of one frontend.
#[derive(Clone, PartialEq, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Backend {
    pub backend: Endpoint,
    pub namespace: String,
    pub name: String,
    pub port_name: String,
    pub frontend: FrontendAddress,
    /// Also in the set that local traffic policies pick from.
    pub local: bool,
    /// Where the frontend's slots are; absent where there are none, in other modes than eBPF.
    pub slots: Option<Slots>,
    pub algorithm: Algorithm,
    #[serde(skip)]
    pub service: String,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Slots {
    pub base: u32,
    pub count: u16,
    pub generation: u8,
    /// Positions of the Maglev table behind them; absent where there is none.
    pub maglev_table: Option<u32>,
}

impl Row for Backend {
    const KIND: &'static str = "BackendList";
    const COLUMNS: &'static [Column<Self>] = &[
        Column::new("BACKEND", |b| b.backend.to_string()),
        Column::new("SERVICE", |b| b.service.clone()),
        Column::new("FRONTEND", |b| b.frontend.to_string()),
        Column::wide("LOCAL", |b| if b.local { "yes".to_owned() } else { String::new() }),
        Column::wide("SLOTS", |b| {
            let slots = |Slots { base, count, .. }| {
                format!("{base}-{}", u32::saturating_add(base, u32::from(u16::saturating_sub(count, 1))))
            };
            blank(b.slots.map(slots))
        }),
        Column::wide("GENERATION", |b| blank(b.slots.map(|slots| slots.generation))),
        Column::wide("ALGORITHM", |b| {
            shapes::algorithm(b.algorithm, [b.slots.and_then(|slots| slots.maglev_table), None])
        }),
    ];
}

pub fn execute(args: list::Args, out: &mut dyn Write) -> anyhow::Result<Exit> {
    let frontends = match args.pins.knows()? {
        Knows::Pins(opened) => opened.frontends()?,
        Knows::Agent(addr, _) => services::in_force(addr)?,
    };
    let rows = rows(frontends);
    args.show(rows, |row| (&row.service, slice::from_ref(&row.frontend.address)), out)
}

/// By backend, then by frontend: what one pod serves stands together.
fn rows(frontends: Vec<Frontend>) -> Vec<Backend> {
    let mut rows: Vec<_> = frontends.iter().flat_map(of_frontend).collect();
    rows.sort_by(|a, b| (a.backend, &a.service, a.frontend).cmp(&(b.backend, &b.service, b.frontend)));
    rows
}

fn of_frontend(frontend: &Frontend) -> Vec<Backend> {
    let Frontend { service, service_id, frontend, all, local, algorithm, .. } = frontend;
    let name = ServiceName::parse(service);
    // A backend may be local only: a terminating one, kept for local traffic while others serve the rest.
    let only_local = local.backends.iter().filter(|backend| !all.backends.contains(backend)).map(|b| (b, local));
    let rows = all.backends.iter().map(|b| (b, all)).chain(only_local);
    rows.map(|(backend, range)| {
        let Range { base, count, generation, table, backends: _ } = *range;
        Backend {
            backend: *backend,
            namespace: name.namespace.to_owned(),
            name: name.name.to_owned(),
            port_name: name.port.to_owned(),
            frontend: *frontend,
            local: local.backends.contains(backend),
            slots: service_id.map(|_| Slots { base, count, generation, maglev_table: table }),
            algorithm: *algorithm,
            service: service.clone(),
        }
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{output::tests::every_format, pins::tests::frontends};

    #[test]
    fn backends_in_every_format() {
        insta::assert_snapshot!("backends", every_format(&rows(frontends())));
    }
}
