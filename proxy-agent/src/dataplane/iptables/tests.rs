//! What becomes of rules when iptables-restore fails, by one that does as it is told.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use super::*;
use crate::dataplane::netfilter::refused::{frontend, spec};

/// Refuses what has a line that the file `refuses` names; notes what it takes in `given`.
const RESTORE: &str = r#"#!/bin/sh
cd "${0%/*}"
cat >last
if [ -s refuses ] && grep -qFf refuses last; then echo "iptables-restore: line 3 failed" >&2; exit 1; fi
cat last >given
"#;

/// Prints the file `saved`.
const SAVE: &str = r#"#!/bin/sh
cd "${0%/*}"
echo "$*" >>looks
[ ! -e saved ] || exec cat saved
"#;

/// 0: it cannot be told.
#[derive(Clone, Default, Debug)]
struct Told(Arc<AtomicU64>);

impl Stamps for Told {
    fn stamp(&self, _: Family) -> Option<u64> {
        Some(self.0.load(Ordering::Relaxed)).filter(|stamp| *stamp != 0)
    }
}

struct World {
    dir: tempfile::TempDir,
    iptables: Iptables,
    stamps: Told,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let script = |name: &str, text: &str| -> &'static str {
            let path: PathBuf = dir.path().join(name);
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
            Box::leak(path.display().to_string().into_boxed_str())
        };
        let programs = [script("list", SAVE), script("restore", RESTORE), script("save", SAVE)];
        let half = |family| {
            let renderer = Renderer {
                family,
                mark: 0x4000,
                masquerade_ports: (32_768, 65_535),
                localhost: false,
                route_localnet: None,
                liberal: false,
            };
            Half::new(renderer)
        };
        let stamps = Told::default();
        let iptables = Iptables {
            _lock: Lock::take_name(&format!("proxy-agent-test-{}", dir.path().display())).unwrap(),
            tools: Tools::fake(programs),
            stamps: Box::new(stamps.clone()),
            leftovers: None,
            halves: Family::BOTH.map(half),
            flows: Flows::idle(),
            detect_local: DetectLocal::Device,
            localhost: false,
            affinity_clients: 100,
            failures: Arc::default(),
            devices: Some(BTreeSet::new()),
            held: BTreeSet::new(),
            health: BTreeSet::new(),
            ration: Ration::new(Instant::now()),
            wrote: false,
        };
        Self { dir, iptables, stamps }
    }

    fn file(&self, name: &str) -> String {
        fs::read_to_string(self.dir.path().join(name)).unwrap_or_default()
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(Path::join(self.dir.path(), name), text).unwrap();
    }

    fn set(&mut self, set: &[Frontend]) -> Report {
        let set = set.iter().map(|frontend| (*frontend, spec(frontend))).collect();
        self.iptables.apply(&Changes { set, ..Changes::default() })
    }
}

/// After the tool itself was exchanged, say.
#[test]
fn what_stood_and_is_not_taken_any_more_is_said() {
    let mut world = World::new();
    let [one, two, three] = ["10.96.0.1", "10.96.0.2", "10.96.0.3"].map(frontend);
    assert_eq!(world.set(&[one, two]).failed, BTreeMap::new());
    world.write("refuses", "10.96.0.2/32\n");
    world.iptables.halves[0].state = State::Unknown;
    let report = world.set(&[three]);
    assert_eq!(report.failed.keys().copied().collect::<Vec<_>>(), [two]);
    let given = world.file("given");
    assert!(given.contains("10.96.0.1/32") && given.contains("10.96.0.3/32") && !given.contains("10.96.0.2/32"));
    // Tried again as what failed is, it comes back.
    world.write("refuses", "");
    assert_eq!(world.set(&[two]).failed, BTreeMap::new());
    assert!(world.file("given").contains("10.96.0.2/32"));
}

#[test]
fn a_failure_of_ours_is_no_drift() {
    let mut world = World::new();
    let [one, two] = ["10.96.0.1", "10.96.0.2"].map(frontend);
    assert_eq!(world.set(&[one]).failed, BTreeMap::new());
    world.write("refuses", "COMMIT\n");
    assert!(!world.set(&[two]).failed.is_empty());
    let drift = world.iptables.observe().unwrap();
    assert!(drift.unfinished && drift.altered() == 0, "{drift:?}");
}

#[test]
fn a_rule_that_says_something_else_is_drift() {
    let mut world = World::new();
    let [one, two] = ["10.96.0.1", "10.96.0.2"].map(frontend);
    assert_eq!(world.set(&[one]).failed, BTreeMap::new());
    // One that prints rules in words of its own.
    let printed = world.file("given").replace("\n-I ", "\n-A ").replace("--ctstate NEW ", "--state NEW ");
    let seen = |world: &mut World, text: &str| {
        world.write("saved", text);
        world.iptables.ration = Ration::new(Instant::now());
        world.iptables.halves[0].state = State::Filled;
        world.iptables.observe().unwrap().hooks
    };
    assert_eq!(seen(&mut world, &printed), Vec::<String>::new());
    assert_eq!(seen(&mut world, &printed), Vec::<String>::new());
    let reject = "--state NEW -j REJECT";
    assert!(printed.contains(reject));
    let altered = printed.replace(reject, "--state NEW -j ACCEPT");
    assert_eq!(seen(&mut world, &altered), ["iptables/PROXY-REJECT filter ipv4"]);
    assert_eq!(seen(&mut world, &printed.replace("10.96.0.1/32", "10.96.0.9/32")).len(), 1);
    assert_eq!(seen(&mut world, &printed), Vec::<String>::new());
    // What is written anew is seen anew, and nothing else.
    let known = |world: &World, chain: &str| {
        let mut prints = world.iptables.halves[0].prints.keys();
        prints.any(|(table, name)| table.name() == "filter" && name == chain)
    };
    assert!(known(&world, "PROXY-SERVICES") && known(&world, "PROXY-REJECT"));
    assert_eq!(world.set(&[two]).failed, BTreeMap::new());
    assert!(!known(&world, "PROXY-SERVICES") && known(&world, "PROXY-REJECT"));
}

/// Starting iptables takes as long as its tables are large, and most of the time there is nothing to see.
#[test]
fn rules_that_nobody_changed_are_not_looked_at_again() {
    let mut world = World::new();
    let one = frontend("10.96.0.1");
    assert_eq!(world.set(&[one]).failed, BTreeMap::new());
    let printed = world.file("given").replace("\n-I ", "\n-A ");
    world.write("saved", &printed);
    let looks = |world: &mut World| {
        world.write("looks", "");
        let drift = world.iptables.observe().unwrap();
        (world.file("looks").lines().count(), drift.hooks.len())
    };
    let compared = |world: &mut World| {
        world.iptables.ration = Ration::new(Instant::now());
        looks(world)
    };
    let all = compared(&mut world);
    assert!(all.0 > 1 && all.1 == 0, "{all:?}");
    assert_eq!(compared(&mut world), all, "nothing is known of whether it has changed");
    world.stamps.0.store(7, Ordering::Relaxed);
    // Not all of it was read: that it stays so is not enough.
    for _ in 0..2 {
        world.iptables.ration.for_nothing(Instant::now(), Duration::from_secs(1000));
    }
    assert!(looks(&mut world).0 > 0 && looks(&mut world).0 > 0);
    assert_eq!(compared(&mut world), all);
    assert_eq!((compared(&mut world), looks(&mut world)), ((0, 0), (0, 0)));
    // Somebody flushes a chain.
    world.write("saved", &printed.replace("-A PROXY-CANARY", "-A OTHERS"));
    world.stamps.0.store(8, Ordering::Relaxed);
    let (count, lost) = looks(&mut world);
    assert!(count > 0 && lost > 0, "{count} {lost}");
}

#[test]
fn an_emptied_chain_is_found_at_once_though_others_change_theirs() {
    let mut world = World::new();
    assert_eq!(world.set(&[frontend("10.96.0.1")]).failed, BTreeMap::new());
    let printed = world.file("given").replace("\n-I ", "\n-A ");
    let emptied: String = printed.split_inclusive('\n').filter(|line| !line.starts_with("-A PROXY-GUARD ")).collect();
    let seen = |world: &mut World, stamp: u64, text: &str| {
        world.write("saved", text);
        world.stamps.0.store(stamp, Ordering::Relaxed);
        world.iptables.observe().unwrap().hooks
    };
    let none = Vec::<String>::new();
    assert_eq!(seen(&mut world, 1, &printed), none, "of our own");
    assert_eq!(seen(&mut world, 2, &printed), none, "of others'");
    assert_eq!(seen(&mut world, 3, &emptied), ["iptables/PROXY-GUARD filter ipv4"]);
    world.iptables.halves[0].state = State::Filled;
    assert_eq!(seen(&mut world, 4, &emptied).len(), 1, "what was found was not for nothing");
}
