//! `build-ebpf`: the programs, for the BPF target, with type information for the verifier and bpftool.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context as _, Result, bail};

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
    cargo.env("LD_LIBRARY_PATH", llvm_dir(&toolchain.llvm)?);
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

/// A directory that holds one LLVM and nothing else: bpf-linker opens the first `libLLVM*` it meets in `LD_LIBRARY_PATH`,
/// and a distribution's directory may hold several.
fn llvm_dir(library: &Path) -> Result<PathBuf> {
    let dir = command::target_dir().join("bpf/llvm");
    let link = dir.join("libLLVM-of-the-compiler.so");
    if fs::read_link(&link).is_ok_and(|to| to == library) {
        return Ok(dir);
    }
    fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
    match fs::remove_file(&link) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("cannot replace {}", link.display()));
        }
        _ => {}
    }
    symlink(library, &link).with_context(|| format!("cannot create {}", link.display()))?;
    Ok(dir)
}
