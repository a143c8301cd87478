//! `lint`: everything that is checked without running the product.
//!
//! Every crate is looked at alone: together, cargo would unify features (the agent's `aya` would reach `proxy-common`), and a
//! crate could lean on what another one switched on. All steps run even if one fails, and the end says which did.

use std::{fs, process::ExitCode};

use anyhow::{Context as _, Result};

use crate::{
    command::{self, cargo, succeeds},
    setup,
};

/// The workspace's crates and what to look at in each. The programs are checked for the host, where `main` is empty: only
/// the binary, since there is no test harness without std.
const CRATES: [(&str, &[&str]); 6] = [
    ("proxy-common", &["--all-targets"]),
    ("proxy-common", &["--all-targets", "--features", "user"]),
    ("proxy-ebpf", &["--bins"]),
    ("proxy-agent", &["--all-targets"]),
    ("proxy-tests", &["--all-targets"]),
    ("xtask", &["--all-targets"]),
];

pub fn run() -> Result<ExitCode> {
    let mut failed = Vec::new();
    let mut step = |name: String, passed: Result<bool>| -> Result<()> {
        if !passed? {
            failed.push(name);
        }
        Ok(())
    };

    heading("cargo fmt");
    step("formatting (cargo fmt --all mends it)".into(), succeeds(cargo().args(["fmt", "--all", "--check"])))?;
    for (name, args) in CRATES {
        let what = format!("clippy of {name} {}", args.join(" "));
        heading(&what);
        let mut clippy = cargo();
        clippy
            .args(["clippy", "--locked", "--quiet", "--no-deps", "--package", name])
            .args(args)
            .args(["--", "-Dwarnings"]);
        step(what, succeeds(&mut clippy))?;
    }
    heading("docs");
    let mut doc = cargo();
    doc.args(["doc", "--locked", "--quiet", "--no-deps", "--document-private-items"]).env("RUSTDOCFLAGS", "-Dwarnings");
    step("docs (broken links, mostly)".into(), succeeds(&mut doc))?;
    heading("every crate inherits the lints");
    step("lint inheritance".into(), inherited())?;
    heading("cargo deny: licences, bans, sources (advisories are not asked for: `cargo deny check advisories`)");
    match setup::cargo_deny() {
        Ok(()) => step(
            "cargo deny".into(),
            succeeds(cargo().args([
                "deny",
                "--locked",
                "check",
                "--hide-inclusion-graph",
                "bans",
                "licenses",
                "sources",
            ])),
        )?,
        // Whoever works without a network learns the rest all the same; where nobody reads it, it must not pass for checked.
        Err(error) if command::is_ci() => {
            println!("lint: {error:#}");
            step("cargo deny, which is not to be had".into(), Ok(false))?;
        }
        Err(error) => println!("lint: NOT CHECKED: licences, bans, sources: {error:#}"),
    }

    if failed.is_empty() {
        println!("lint: all good");
        return Ok(ExitCode::SUCCESS);
    }
    for name in &failed {
        println!("lint: FAILED {name}");
    }
    Ok(ExitCode::FAILURE)
}

fn heading(text: &str) {
    println!("lint: {text}");
}

/// `[lints] workspace = true` in every member: without it a crate silently has no lints at all.
fn inherited() -> Result<bool> {
    let root = command::root().join("Cargo.toml");
    let text = fs::read_to_string(&root).with_context(|| format!("cannot read {}", root.display()))?;
    let members = text
        .lines()
        .find_map(|line| line.strip_prefix("members = "))
        .with_context(|| format!("no line `members = [...]` in {}", root.display()))?;
    let mut all = true;
    for member in members.split('"').skip(1).step_by(2) {
        let manifest = command::root().join(member).join("Cargo.toml");
        let text = fs::read_to_string(&manifest).with_context(|| format!("cannot read {}", manifest.display()))?;
        let mut lines = text.lines().skip_while(|line| line.trim() != "[lints]").skip(1);
        if lines.next().is_none_or(|line| line.trim() != "workspace = true") {
            println!("lint: {} lacks `[lints] workspace = true`", manifest.display());
            all = false;
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(path: &str) -> String {
        fs::read_to_string(command::root().join(path)).unwrap()
    }

    #[test]
    fn every_map_is_documented() {
        let maps = read("proxy-ebpf/src/maps.rs") + &read("proxy-agent/src/dataplane/ebpf/layout.rs");
        let docs = read("docs/maps.md");
        let declared = maps.split("#[btf_map(name = \"").skip(1).chain(maps.split(" = \"").skip(1));
        let names: Vec<&str> = declared.filter_map(|rest| rest.split('"').next()).collect();
        assert!(names.len() > 20, "{names:?}");
        for name in names {
            assert!(docs.contains(&format!("`{name}`")), "docs/maps.md does not name the map `{name}`");
        }
        for option in maps.split('"').filter(|word| word.starts_with("--map-")) {
            assert!(docs.contains(&format!("`{option}`")), "docs/maps.md does not name the option `{option}`");
        }
    }

    #[test]
    fn every_crate_inherits_the_lints() {
        assert!(inherited().unwrap());
    }
}
