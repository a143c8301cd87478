//! What `services`, `backends` and `connections` have in common: rows that belong to Services, narrowed, sorted, printed.

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
    /// Prints those rows that were asked for; `of` tells a row's Service and VIP.
    pub(super) fn show<R: Row>(
        &self,
        mut rows: Vec<R>,
        of: impl Fn(&R) -> (&str, Option<IpAddr>),
        out: &mut dyn Write,
    ) -> anyhow::Result<Exit> {
        let Self { filter, sort, output, pins: _ } = self;
        rows.retain(|row| {
            let (service, vip) = of(row);
            filter.admits(service, vip)
        });
        output::sort(&mut rows, sort)?;
        output::print(&rows, output, out)?;
        Ok(Exit::Done)
    }
}
