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
    use std::collections::BTreeSet;

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

    /// Every text of the repository, by path.
    fn texts() -> Vec<(String, String)> {
        let listed =
            command::output(command::command("git").args(["ls-files", "--cached", "--others", "--exclude-standard"]));
        let ends = [".rs", ".md", ".toml", ".txt", ".yaml"];
        let listed = listed.unwrap();
        let paths = listed.lines().filter(|path| ends.iter().any(|end| path.ends_with(end)));
        // A file that is deleted and not yet committed is still listed.
        paths.filter_map(|path| Some((path.to_owned(), fs::read_to_string(command::root().join(path)).ok()?))).collect()
    }

    /// Numbers such as A12 that a text names, those within A12–A15 too.
    fn cited(text: &str, letters: &[char]) -> BTreeSet<(char, u32)> {
        let mut found = BTreeSet::new();
        let mut last: Option<(char, u32, usize)> = None;
        let mut at = 0;
        for piece in text.split_inclusive(|c: char| !c.is_ascii_alphanumeric() && c != '_') {
            let word = piece.trim_end_matches(|c: char| !c.is_ascii_alphanumeric() && c != '_');
            let (start, end) = (at, at + word.len());
            at += piece.len();
            let mut chars = word.chars();
            let Some(letter) = chars.next().filter(|letter| letters.contains(letter)) else { continue };
            let digits = chars.as_str();
            if digits.is_empty() || digits.len() > 3 || !digits.bytes().all(|b| b.is_ascii_digit()) {
                continue;
            }
            let number = digits.parse().unwrap();
            let from = match last {
                Some((l, first, last_end)) if l == letter && ["-", "–"].contains(&&text[last_end..start]) => first,
                _ => number,
            };
            found.extend((from..=number).map(|n| (letter, n)));
            last = Some((letter, number, end));
        }
        found
    }

    /// The numbers that a document's tables begin their rows with.
    fn rows(path: &str, letters: &[char]) -> Vec<(char, u32)> {
        let text = read(path);
        let firsts = text.lines().filter_map(|line| line.strip_prefix("| ")?.split(" |").next());
        firsts.flat_map(|first| cited(first, letters)).collect()
    }

    #[test]
    fn every_number_cited_is_in_its_document() {
        assert_eq!(Vec::from_iter(cited("(A1, A3–A5), B2 A6_x xA7 A1234", &['A'])), [1, 3, 4, 5].map(|n| ('A', n)));
        for (path, letters) in [("docs/contract.md", ['A', 'F']), ("docs/bench.md", ['C', 'D'])] {
            let known = BTreeSet::from_iter(rows(path, &letters));
            assert!(known.len() > 4, "{path}: {known:?}");
            for (file, text) in texts() {
                // The example above is no citation.
                let text = if file == "xtask/src/lint.rs" { String::new() } else { text };
                let unknown: Vec<_> = cited(&text, &letters).difference(&known).copied().collect();
                assert!(unknown.is_empty(), "{file} cites {unknown:?}, which {path} does not have");
            }
        }
    }

    #[test]
    fn the_contract_says_where_each_statement_stands() {
        let mut seen = BTreeSet::new();
        for number in rows("docs/contract.md", &['A', 'F']) {
            assert!(seen.insert(number), "{number:?} is there twice");
        }
        let contract = read("docs/contract.md");
        let is_number = |row: &&str| row.starts_with("| A") || row.starts_with("| F");
        for row in contract.lines().filter(is_number) {
            let stands = row.trim_end_matches(" |").rsplit("| ").next().unwrap_or_default();
            let word = stands.split([',', ';', ':']).next().unwrap_or_default();
            assert!(["yes", "part", "decided", "later", "own"].contains(&word), "{row}");
        }
    }

    #[test]
    fn every_crate_inherits_the_lints() {
        assert!(inherited().unwrap());
    }
}
