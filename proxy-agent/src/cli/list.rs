//! What `services`, `backends`, `connections` and `affinity` have in common: rows that belong to Services, narrowed, sorted, printed.

use std::{io::Write, net::IpAddr};

use clap::Args as ClapArgs;

use super::{
    Exit,
    filter::Filter,
    output::{self, OutputArgs, Row, SortArgs},
    pins::PinsArgs,
};

#[derive(Clone, Debug, ClapArgs)]
pub struct Args {
    #[command(flatten)]
    filter: Filter,
    #[command(flatten)]
    sort: SortArgs,
    #[command(flatten)]
    output: OutputArgs,
    #[command(flatten)]
    pub(super) pins: PinsArgs,
}

impl Args {
    /// Prints those rows that were asked for; `of` tells a row's Service and VIPs.
    pub(super) fn show<R: Row>(
        &self,
        mut rows: Vec<R>,
        of: impl Fn(&R) -> (&str, &[IpAddr]),
        out: &mut dyn Write,
    ) -> anyhow::Result<Exit> {
        let Self { filter, sort, output, pins: _ } = self;
        rows.retain(|row| {
            let (service, vips) = of(row);
            filter.admits(service, vips)
        });
        output::sort(&mut rows, sort)?;
        output::print(&rows, output, out)?;
        Ok(Exit::Done)
    }
}
