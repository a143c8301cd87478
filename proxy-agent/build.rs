//! Puts the compiled eBPF programs where the agent embeds them from.
//!
//! `PROXY_EBPF_OBJECT` names the object file (`cargo xtask build` sets it). Without it an empty file is embedded: checks, lints
//! and pure tests need no BPF toolchain, and the agent says at run time that it holds no programs.

use std::{env, fs, io, path::PathBuf, process::ExitCode};

const OBJECT: &str = "PROXY_EBPF_OBJECT";

fn embed() -> io::Result<()> {
    println!("cargo:rerun-if-env-changed={OBJECT}");
    println!("cargo:rerun-if-changed=build.rs");
    let out = env::var_os("OUT_DIR").ok_or_else(|| io::Error::other("OUT_DIR is not set: run me through cargo"))?;
    let embedded = PathBuf::from(out).join("programs.o");
    match env::var_os(OBJECT).filter(|path| !path.is_empty()) {
        Some(path) => {
            let path = PathBuf::from(path);
            println!("cargo:rerun-if-changed={}", path.display());
            let bytes =
                fs::read(&path).map_err(|e| io::Error::new(e.kind(), format!("{OBJECT}={}: {e}", path.display())))?;
            fs::write(embedded, bytes)
        }
        None => fs::write(embedded, []),
    }
}

fn main() -> ExitCode {
    match embed() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cannot embed the eBPF programs: {error}");
            ExitCode::FAILURE
        }
    }
}
