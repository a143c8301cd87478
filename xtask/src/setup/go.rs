//! Go, which builds Kubernetes' own programs for the `api` suite.
//!
//! A Go that is here and new enough is used as it is. An older one, Debian's if there is none at all, is asked to fetch a newer
//! toolchain the way Go itself does: as the module `golang.org/toolchain`, from the module proxy, checked against Go's checksum
//! database and the sum below. (Since 1.21 Go would go on to start it by itself; Debian 12 has 1.19, which only knows
//! modules, so what remains of the work is done here for both.)

use std::{
    ffi::OsStr,
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;

use super::{Tool, numbers, tools};
use crate::command::{self, ask, command, find};

/// The release that is brought: any that `tests/apiserver/go.mod` is content with.
const RELEASE: &str = "1.26.8";
/// `go mod download -json golang.org/toolchain@v0.0.1-go<RELEASE>.linux-<architecture>` says `Sum`.
const SUMS: [(&str, &str, &str); 2] = [
    ("x86_64", "amd64", "h1:ZOmGe1OnfREDMIdb1Qi4G9JSuDPBLGExZMQ4nis1RXM="),
    ("aarch64", "arm64", "h1:sYL/O6MqS68ML0kjsQ36WoYIpJqkw60TxizWUYUKQMc="),
];

/// Any release: the first that knows checksummed modules is 1.13.
const GO: Tool = Tool { program: "go", package: "golang-go", why: "builds kube-apiserver and kube-proxy" };

/// A `go` that builds Kubernetes.
pub fn program() -> Result<PathBuf> {
    let needed = needed()?;
    if let Some(present) = find("go").filter(|go| version(go).is_some_and(|version| version >= needed)) {
        return Ok(present);
    }
    let brought = directory();
    let program = brought.join("bin/go");
    if program.is_file() {
        return Ok(program);
    }
    tools(&[GO])?;
    let present = find("go").context("there is no `go`")?;
    // The distribution's own may be new enough.
    let found = version(&present).with_context(|| format!("{} does not say its version", present.display()))?;
    if found >= needed {
        return Ok(present);
    }
    eprintln!(
        "setup: {} is {}.{}, Kubernetes wants {}.{}: fetching the toolchain go{RELEASE} with it, 70 MB out of the Go module proxy",
        present.display(),
        found.0,
        found.1,
        needed.0,
        needed.1
    );
    fetch(&present, &brought).with_context(|| {
        format!(
            "cannot fetch the toolchain go{RELEASE}; install Go {}.{} or later (https://go.dev/dl)",
            needed.0, needed.1
        )
    })?;
    Ok(program)
}

/// By the module that is built with it.
fn needed() -> Result<(u32, u32)> {
    let manifest = command::root().join("tests/apiserver/go.mod");
    let text = fs::read_to_string(&manifest).with_context(|| format!("cannot read {}", manifest.display()))?;
    let line = text.lines().find_map(|line| line.strip_prefix("go "));
    line.and_then(numbers).with_context(|| format!("{} does not say which Go it is for", manifest.display()))
}

/// Of itself, not of a toolchain that it would fetch.
fn version(go: &Path) -> Option<(u32, u32)> {
    let text = ask(command(go).arg("version").env("GOTOOLCHAIN", "local"))?;
    // `go version go1.26.8 linux/amd64`
    numbers(text.split_whitespace().nth(2)?.strip_prefix("go")?)
}

/// Beside what is built with it: who keeps `target/` keeps it, too.
fn directory() -> PathBuf {
    command::target_dir().join(format!("kube/go{RELEASE}"))
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Module {
    dir: PathBuf,
    sum: String,
}

fn fetch(go: &Path, into: &Path) -> Result<()> {
    let (_, architecture, sum) = SUMS
        .into_iter()
        .find(|(name, ..)| *name == std::env::consts::ARCH)
        .with_context(|| format!("no sum of it is known for {}", std::env::consts::ARCH))?;
    let cache = into.with_extension("part");
    // What an interrupted attempt left.
    remove(&cache)?;
    let text = command::output(
        command(go)
            .args(["mod", "download", "-json"])
            .arg(format!("golang.org/toolchain@v0.0.1-go{RELEASE}.linux-{architecture}"))
            .env("GOTOOLCHAIN", "local")
            .env("GOMODCACHE", &cache)
            // Go makes its modules read-only else, and this one needs a touch.
            .env("GOFLAGS", "-modcacherw"),
    )?;
    let module: Module = serde_json::from_str(&text).context("what `go mod download` says is no JSON")?;
    ensure!(module.sum == sum, "the module proxy's has the sum {}, expected {sum}", module.sum);
    complete(&module.dir)?;
    remove(into)?;
    fs::rename(&module.dir, into).with_context(|| format!("cannot rename to {}", into.display()))?;
    remove(&cache)?;
    ensure!(version(&into.join("bin/go")).is_some(), "{} does not run", into.join("bin/go").display());
    Ok(())
}

fn remove(directory: &Path) -> Result<()> {
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", directory.display()))
        }
        _ => Ok(()),
    }
}

/// A module holds neither executable files nor other modules: cmd/go/internal/toolchain/select.go sets the one and renames the
/// others, and so do we.
fn complete(root: &Path) -> Result<()> {
    for programs in ["bin", "pkg/tool"] {
        each_file(&root.join(programs), &|file| fs::set_permissions(file, fs::Permissions::from_mode(0o755)))?;
    }
    each_file(&root.join("src"), &|file| {
        if file.file_name() == Some(OsStr::new("_go.mod")) {
            fs::copy(file, file.with_file_name("go.mod"))?;
        }
        Ok(())
    })
}

fn each_file(directory: &Path, act: &dyn Fn(&Path) -> std::io::Result<()>) -> Result<()> {
    let entries = fs::read_dir(directory).with_context(|| format!("cannot read {}", directory.display()))?;
    for entry in entries {
        let entry = entry?;
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            each_file(&path, act)?;
        } else {
            act(&path).with_context(|| format!("cannot prepare {}", path.display()))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{RELEASE, needed, numbers};

    #[test]
    fn what_is_brought_builds_the_module() {
        assert!(numbers(RELEASE) >= Some(needed().unwrap()));
    }
}
