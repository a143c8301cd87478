//! One way to print: a list of rows with columns, as a table for people, as JSON or YAML for programs.
//!
//! Tables look like kubectl's: upper-case headers, columns three blanks apart, no boxes, blank for none. JSON is
//! `{"apiVersion", "kind", "items"}`; its fields are stable (docs/cli.md), tables may gain columns.

use std::{cmp::Ordering, io::Write};

use anyhow::Context;
use clap::{Args, ValueEnum};
use serde::Serialize;

use super::exit::UsageError;
pub use crate::status::report::API_VERSION;

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, ValueEnum)]
pub enum Format {
    #[default]
    Table,
    /// A table with every column.
    Wide,
    Json,
    Yaml,
}

#[derive(Clone, Debug, Default, Args)]
pub struct OutputArgs {
    /// How to print
    #[arg(short, long, value_enum, default_value_t, value_name = "FORMAT")]
    pub output: Format,
    /// Leave the header line out
    #[arg(long)]
    pub no_headers: bool,
}

#[derive(Clone, Debug, Default, Args)]
pub struct SortArgs {
    /// Sort by this column (its header, in any case); numbers inside the text count as numbers
    #[arg(long, value_name = "COLUMN")]
    pub sort_by: Option<String>,
}

/// One column of a table; `wide`: shown by `-o wide` only.
pub struct Column<R> {
    pub header: &'static str,
    pub wide: bool,
    pub cell: fn(&R) -> String,
}

impl<R> Column<R> {
    pub const fn new(header: &'static str, cell: fn(&R) -> String) -> Self {
        Self { header, wide: false, cell }
    }

    pub const fn wide(header: &'static str, cell: fn(&R) -> String) -> Self {
        Self { header, wide: true, cell }
    }
}

/// Something that is printed in lists.
pub trait Row: Serialize + Sized + 'static {
    /// `kind` of the list in JSON.
    const KIND: &'static str;
    const COLUMNS: &'static [Column<Self>];
}

/// A list as JSON and YAML have it.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct List<'a, R> {
    api_version: &'static str,
    kind: &'static str,
    items: &'a [R],
}

/// Sorts by a column, stable, so that equal cells keep the natural order of the list.
pub fn sort<R: Row>(rows: &mut [R], by: &SortArgs) -> Result<(), UsageError> {
    let SortArgs { sort_by: Some(by) } = by else { return Ok(()) };
    let Some(column) = R::COLUMNS.iter().find(|column| column.header.eq_ignore_ascii_case(by)) else {
        let headers: Vec<_> = R::COLUMNS.iter().map(|column| column.header).collect();
        return Err(UsageError(format!("--sort-by {by}: no such column; there are {}", headers.join(", "))));
    };
    rows.sort_by(|a, b| natural(&(column.cell)(a), &(column.cell)(b)));
    Ok(())
}

pub fn print<R: Row>(rows: &[R], args: &OutputArgs, out: &mut dyn Write) -> anyhow::Result<()> {
    match args.output {
        Format::Table => table(rows, false, !args.no_headers, out),
        Format::Wide => table(rows, true, !args.no_headers, out),
        format => document(&List { api_version: API_VERSION, kind: R::KIND, items: rows }, format, out),
    }
}

/// Writes one value as JSON or YAML; tables are the caller's.
pub fn document<T: Serialize>(value: &T, format: Format, out: &mut dyn Write) -> anyhow::Result<()> {
    let text = match format {
        Format::Yaml => serde_saphyr::to_string(value).context("writing YAML")?,
        Format::Json | Format::Table | Format::Wide => {
            serde_json::to_string_pretty(value).context("writing JSON")? + "\n"
        }
    };
    out.write_all(text.as_bytes())?;
    Ok(())
}

pub fn table<R: Row>(rows: &[R], wide: bool, headers: bool, out: &mut dyn Write) -> anyhow::Result<()> {
    let columns: Vec<_> = R::COLUMNS.iter().filter(|column| wide || !column.wide).collect();
    let header = headers.then(|| columns.iter().map(|column| column.header.to_owned()).collect());
    let cells = rows.iter().map(|row| columns.iter().map(|column| (column.cell)(row)).collect());
    let lines: Vec<Vec<String>> = header.into_iter().chain(cells).collect();
    write_aligned(&lines, out)
}

/// Lines of cells, columns aligned; the last column is not padded.
pub fn write_aligned(lines: &[Vec<String>], out: &mut dyn Write) -> anyhow::Result<()> {
    let mut widths: Vec<usize> = Vec::new();
    for line in lines {
        widths.resize(widths.len().max(line.len()), 0);
        for (width, cell) in widths.iter_mut().zip(line) {
            *width = (*width).max(cell.chars().count());
        }
    }
    for line in lines {
        let text: String = line.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}   ")).collect();
        writeln!(out, "{}", text.trim_end())?;
    }
    Ok(())
}

/// Compares texts as people read them: runs of digits count as numbers, so `10.0.0.2` comes before `10.0.0.10`.
fn natural(a: &str, b: &str) -> Ordering {
    let (mut a, mut b) = (a, b);
    loop {
        let (digits_a, rest_a) = split_run(a);
        let (digits_b, rest_b) = split_run(b);
        let order = match (digits_a.parse::<u128>(), digits_b.parse::<u128>()) {
            (Ok(x), Ok(y)) => x.cmp(&y),
            _ => digits_a.cmp(digits_b),
        };
        if order != Ordering::Equal || digits_a.is_empty() || digits_b.is_empty() {
            return order;
        }
        (a, b) = (rest_a, rest_b);
    }
}

/// The first run of digits or of anything else, and what follows.
fn split_run(text: &str) -> (&str, &str) {
    let digits = text.starts_with(|c: char| c.is_ascii_digit());
    let end = text.find(|c: char| c.is_ascii_digit() != digits).unwrap_or(text.len());
    text.split_at(end)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Every format of a list, as the golden files hold them.
    pub(crate) fn every_format<R: Row>(rows: &[R]) -> String {
        [Format::Table, Format::Wide, Format::Json, Format::Yaml]
            .map(|format| {
                let mut out = Vec::new();
                print(rows, &OutputArgs { output: format, no_headers: false }, &mut out).unwrap();
                format!("--- {format:?}\n{}", String::from_utf8(out).unwrap())
            })
            .concat()
    }

    #[test]
    fn natural_order() {
        for (less, more) in [("10.0.0.2:80", "10.0.0.10:80"), ("a", "b"), ("a", "a1"), ("2s", "10s"), ("", "a")] {
            assert_eq!(natural(less, more), Ordering::Less, "{less} {more}");
            assert_eq!(natural(more, less), Ordering::Greater, "{less} {more}");
            assert_eq!(natural(less, less), Ordering::Equal);
        }
    }

    #[test]
    fn blank_cells_leave_no_trailing_blanks() {
        let mut out = Vec::new();
        let line = |cells: [&str; 3]| cells.map(str::to_owned).to_vec();
        write_aligned(&[line(["A", "LONG", "C"]), line(["aaa", "", ""]), line(["", "x", "y"])], &mut out).unwrap();
        assert_eq!(String::from_utf8(out).unwrap(), "A     LONG   C\naaa\n      x      y\n");
    }
}
