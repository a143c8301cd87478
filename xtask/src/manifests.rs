//! `manifests`: renders the kustomize base and checks it.

use std::process::ExitCode;

use anyhow::{Result, bail};

#[derive(clap::Args)]
pub struct Args {}

pub fn run(_args: &Args) -> Result<ExitCode> {
    bail!("`manifests` is not built yet")
}
