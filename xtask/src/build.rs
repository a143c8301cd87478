//! `build`: the agent with the programs inside. Other verbs call [`agent`] for the binary they run.

use std::{path::PathBuf, process::ExitCode};

use anyhow::Result;

use crate::{build_ebpf, command};

pub fn run() -> Result<ExitCode> {
    println!("{}", agent()?.display());
    Ok(ExitCode::SUCCESS)
}

/// Builds the release binary; quick when nothing changed.
pub fn agent() -> Result<PathBuf> {
    let object = build_ebpf::object()?;
    command::check(
        command::cargo()
            .args(["build", "--locked", "--release", "--package", "proxy-agent"])
            .env(build_ebpf::OBJECT_VARIABLE, object),
    )?;
    Ok(command::target_dir().join("release/proxy-agent"))
}
