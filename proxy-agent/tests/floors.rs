//! Holds the floors of the agent (src/lib.rs): a room imports only what stands below it, and no arrow runs back up.
//!
//! It reads the sources as text: `crate::room`, `crate::{room::…, room}` and, at the top of a room, `super::room`. Tests
//! inside the sources may import what they like.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

/// Each room and the rooms it may import. Most specific path first: the first match holds.
const FLOORS: &[(&str, &[&str])] = &[
    ("model", &[]),
    ("desired", &["model"]),
    ("plan", &["model", "desired"]),
    // A question to the kernel that both the device watcher and a dataplane ask.
    ("ipsec", &[]),
    ("dataplane", &["dataplane", "model", "desired", "ipsec"]),
    ("status", &["model", "desired", "dataplane"]),
    // A source and the device watcher hand out values; who uses them is above.
    ("source", &["model", "status"]),
    ("node", &["model", "desired", "ipsec"]),
    ("config", &["model"]),
    ("sync", &["model", "desired", "plan", "dataplane", "node", "status"]),
    ("serve", &["model", "desired", "status", "dataplane"]),
    // `run` starts the loop; every other verb reads pins, files or the agent's HTTP.
    (
        "cli/run",
        &["model", "desired", "plan", "dataplane", "status", "source", "node", "config", "sync", "serve", "cli"],
    ),
    ("cli", &["model", "desired", "plan", "dataplane", "status", "node", "config", "cli"]),
];

/// Rooms that are values and functions only: no kernel, no cluster, no clock, no log.
const PURE: [&str; 3] = ["model", "desired", "plan"];
const IMPURE: [&str; 13] = [
    "aya::",
    "kube::",
    "k8s_openapi::",
    "tokio::",
    "rustix::",
    "rtnetlink::",
    "tracing::",
    "std::fs",
    "std::time",
    "std::process",
    "std::thread",
    "async fn",
    "println!",
];

/// The words of `model` that a dataplane may use: what names a frontend, nothing that carries policy.
const NAMES: [&str; 5] = ["Family", "Port", "Protocol", "ServiceKey", "ServicePortName"];

fn src() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

/// Every source file: path below `src/`, without `mod.rs` and `.rs`, and its text without tests and comments.
fn sources() -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut open = vec![src()];
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            let stem = path.file_stem().unwrap().to_str().unwrap().to_owned();
            if path.is_dir() {
                if !is_test(&stem) {
                    open.push(path);
                }
            } else if path.extension().is_some_and(|ext| ext == "rs") && !is_test(&stem) {
                let below = path.strip_prefix(src()).unwrap().with_extension("");
                let room = below.to_str().unwrap();
                let room = room.strip_suffix("/mod").unwrap_or(room).to_owned();
                found.push((room, strip(&fs::read_to_string(&path).unwrap())));
            }
        }
    }
    found.sort();
    found
}

fn is_test(stem: &str) -> bool {
    stem == "tests" || stem.ends_with("_tests")
}

fn strip(text: &str) -> String {
    let text = text.split("#[cfg(test)]\nmod ").next().unwrap_or_default();
    text.lines().map(|line| line.split("//").next().unwrap_or_default()).collect::<Vec<_>>().join("\n")
}

/// First path segments after every `prefix` (`crate::` …), groups opened.
fn imports(text: &str, prefix: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for (at, _) in text.match_indices(prefix) {
        let before = text[..at].chars().next_back().unwrap_or(' ');
        if before.is_alphanumeric() || before == '_' || before == ':' {
            continue;
        }
        found.extend(heads(&text[at + prefix.len()..]));
    }
    found
}

/// `a::b` → a;  `{a::{b, c}, d}` → a, d.
fn heads(path: &str) -> Vec<String> {
    let word =
        |text: &str| -> String { text.trim_start().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect() };
    let Some(group) = path.strip_prefix('{') else { return vec![word(path)] };
    let (mut depth, mut start, mut found) = (1, 0, Vec::new());
    for (i, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 || (depth == 1 && c == ',') {
            found.push(word(&group[start..i]));
            start = i + 1;
        }
        if depth == 0 {
            break;
        }
    }
    found.retain(|head| !head.is_empty());
    found
}

fn floor(room: &str) -> Option<&'static [&'static str]> {
    // `cli/run` stands before `cli` only by being longer.
    FLOORS
        .iter()
        .filter(|(name, _)| room == *name || room.strip_prefix(name).is_some_and(|rest| rest.starts_with('/')))
        .max_by_key(|(name, _)| name.len())
        .map(|(_, below)| *below)
}

fn top(room: &str) -> &str {
    room.split('/').next().unwrap_or(room)
}

#[test]
fn no_arrow_runs_back_up() {
    let rooms: BTreeSet<&str> = FLOORS.iter().map(|(room, _)| top(room)).collect();
    let mut wrong = Vec::new();
    for (room, text) in sources() {
        if room == "lib" || room == "main" {
            continue;
        }
        let Some(below) = floor(&room) else {
            wrong.push(format!("src/{room}: a room that this test does not know; give it a floor"));
            continue;
        };
        let mut seen = imports(&text, "crate::");
        if !room.contains('/') {
            seen.extend(imports(&text, "super::"));
        }
        for import in seen {
            if rooms.contains(import.as_str()) && import != top(&room) && !below.contains(&import.as_str()) {
                wrong.push(format!("src/{room} imports {import}; it may import {below:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn pure_rooms_stay_pure() {
    for (room, text) in sources() {
        if PURE.contains(&top(&room)) {
            for word in IMPURE {
                assert!(!text.contains(word), "src/{room} is pure and says `{word}`");
            }
        }
    }
}

#[test]
fn a_dataplane_sees_names_and_no_services() {
    for (room, text) in sources() {
        if top(&room) != "dataplane" {
            continue;
        }
        let used = imports(&text, "crate::model::").into_iter().chain(imports(&text, "model::"));
        for name in used {
            // In a group after `crate::{` the path reads `model::X`; both forms end up here.
            assert!(NAMES.contains(&name.as_str()), "src/{room} uses model::{name}: a dataplane executes verdicts");
        }
        if room != "dataplane" {
            let plan = imports(&text, "crate::");
            assert!(!plan.contains("plan"), "src/{room} imports plan");
        }
    }
}

#[test]
fn only_dataplanes_know_the_kernel_library() {
    for (room, text) in sources() {
        if top(&room) != "dataplane" {
            let aya = text.contains(" aya::") || text.contains("(aya::") || text.contains("use aya");
            assert!(!aya, "src/{room} uses aya, which stays behind the dataplane");
        }
    }
}

#[test]
fn this_test_can_see() {
    let text =
        "use crate::{\n    dataplane::{Failure, ebpf},\n    plan,\n};\nfn f() { crate::sync::run() } // crate::cli";
    let seen = imports(&strip(text), "crate::");
    assert_eq!(seen.into_iter().collect::<Vec<_>>(), ["dataplane", "plan", "sync"]);
    assert_eq!(imports("x::crate::no pub(crate) proxy_crate::no", "crate::").len(), 0);
    assert_eq!(floor("cli/run/world"), floor("cli/run"));
    assert_ne!(floor("cli/services"), floor("cli/run"));
    assert_eq!(floor("client"), None);
    assert!(!strip("a\n#[cfg(test)]\nmod tests { use crate::cli; }").contains("cli"));
    assert!(sources().iter().any(|(room, _)| room == "plan"), "the sources were not found");
}
