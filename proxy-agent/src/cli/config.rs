//! `config`: the configuration that `run` would have with the same options, and where each value comes from. It changes nothing.

use std::io::Write;

use clap::Args as ClapArgs;
use serde::Serialize;

use super::{
    Exit,
    output::{self, Column, Format, OutputArgs, Row},
    run::{Given, effective},
};
use crate::config::{Document, Here, tree::Tree};

#[derive(Clone, Debug, ClapArgs)]
// Its group would have the name of that of `run`.
#[group(skip)]
pub struct Args {
    #[command(flatten)]
    output: OutputArgs,
    #[command(flatten)]
    run: Given,
}

/// A line of the table.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
struct Setting {
    document: &'static str,
    field: &'static str,
    value: String,
    from: String,
    meaning: String,
}

impl Row for Setting {
    const KIND: &'static str = "SettingList";
    const COLUMNS: &'static [Column<Self>] = &[
        Column::wide("DOCUMENT", |setting| setting.document.to_owned()),
        Column::new("FIELD", |setting| setting.field.to_owned()),
        Column::new("VALUE", |setting| setting.value.clone()),
        Column::new("FROM", |setting| setting.from.clone()),
        Column::wide("MEANING", |setting| setting.meaning.clone()),
    ];
}

/// Both documents, as JSON has them.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Documents {
    api_version: &'static str,
    kind: &'static str,
    items: [Tree; 2],
}

pub fn execute(args: Args, out: &mut dyn Write) -> anyhow::Result<Exit> {
    let Args { output, run } = args;
    let effective = effective::of(&run)?.public();
    match output.output {
        Format::Yaml => out.write_all(effective.yaml()?.as_bytes())?,
        Format::Json => {
            let items = effective.documents();
            let documents = Documents { api_version: output::API_VERSION, kind: "ConfigurationList", items };
            output::document(&documents, Format::Json, out)?;
        }
        Format::Table | Format::Wide => {
            let settings: Vec<_> = effective.in_force().into_iter().map(setting).collect();
            output::print(&settings, &output, out)?;
        }
    }
    Ok(Exit::Done)
}

fn setting(one: effective::InForce) -> Setting {
    let effective::InForce { document, field, tree: _, text, from, elsewhere } = one;
    let meaning = match (elsewhere, field.here) {
        (Some(why), _) => format!("no effect: {why}"),
        (None, Here::Honoured) => String::new(),
        (None, Here::In(modes, why)) => {
            let modes: Vec<_> = modes.iter().map(ToString::to_string).collect();
            format!("mode {} alone: {why}", modes.join(", "))
        }
        (None, Here::Ignored(why)) => format!("no effect: {why}"),
    };
    Setting { document: Document::kind(document), field: field.path, value: text, from: from.to_string(), meaning }
}
