//! `build-ebpf`: the programs, for the BPF target, with type information for the verifier and bpftool.

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Result, bail};

use crate::{command, setup};

/// Names the object file to the agent's build script.
pub const OBJECT_VARIABLE: &str = "PROXY_EBPF_OBJECT";

const TARGET: &str = "bpfel-unknown-none";

pub fn run() -> Result<ExitCode> {
    println!("{}", object()?.display());
    Ok(ExitCode::SUCCESS)
}

/// Builds the object; quick when nothing changed.
pub fn object() -> Result<PathBuf> {
    let toolchain = setup::bpf_toolchain()?;
    // Its own target directory: another compiler, other flags, and no lock shared with the outer cargo.
    let target_dir = command::target_dir().join("bpf");
    let mut cargo = command::cargo();
    cargo
        .args(["build", "--locked", "--release", "--package", "proxy-ebpf"])
        .args(["--target", TARGET, "-Z", "build-std=core", "--target-dir"])
        .arg(&target_dir)
        // Flags meant for the host (a linker, a CPU) break a BPF build.
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env_remove("RUSTC_WRAPPER")
        .env_remove("RUSTC_WORKSPACE_WRAPPER")
        .env("RUSTFLAGS", "-Cdebuginfo=2 -Clink-arg=--btf")
        // Lets a stable compiler build its own `core`; it must be the compiler whose sources these are.
        .env("RUSTC_BOOTSTRAP", "1");
    match &toolchain.rustc {
        Some(rustc) => cargo.env("RUSTC", rustc),
        None => cargo.env_remove("RUSTC"),
    };
    command::check(&mut cargo)?;
    let object = target_dir.join(TARGET).join("release/proxy-ebpf");
    if !object.is_file() {
        bail!("cargo reported success but {} is not there", object.display());
    }
    Ok(object)
}
