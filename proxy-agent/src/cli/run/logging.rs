//! Logs go to stderr, as text or JSON; colours only to a terminal that wants them (`NO_COLOR`). What is logged can change while the agent runs.

use std::{
    io::{self, IsTerminal},
    sync::Arc,
};

use anyhow::Context;
use tracing_subscriber::{EnvFilter, filter::LevelFilter, fmt};

use super::args::LogFormat;
use crate::cli::exit::UsageError;

/// Puts another filter in place of the one in force.
pub(super) type Reload = Arc<dyn Fn(&str) -> anyhow::Result<()> + Send + Sync>;

pub(super) fn start(format: LogFormat, filter: &str) -> anyhow::Result<Reload> {
    let filter = parse(filter)?;
    let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let builder =
        fmt().with_env_filter(filter).with_writer(io::stderr).with_ansi(io::stderr().is_terminal() && !no_color);
    let (started, reload): (_, Reload) = match format {
        LogFormat::Text => {
            let builder = builder.with_filter_reloading();
            let handle = builder.reload_handle();
            (builder.try_init(), Arc::new(move |filter| Ok(handle.reload(parse(filter)?)?)))
        }
        LogFormat::Json => {
            let builder = builder.json().flatten_event(true).with_filter_reloading();
            let handle = builder.reload_handle();
            (builder.try_init(), Arc::new(move |filter| Ok(handle.reload(parse(filter)?)?)))
        }
    };
    started.map_err(anyhow::Error::from_boxed).context("starting the log")?;
    Ok(reload)
}

fn parse(filter: &str) -> Result<EnvFilter, UsageError> {
    EnvFilter::builder()
        .with_default_directive(LevelFilter::INFO.into())
        .parse(filter)
        .map_err(|error| UsageError(format!("--log-level {filter}: {error}")))
}
