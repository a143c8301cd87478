//! What becomes of rules when iptables-restore fails, by one that does as it is told.

use std::{
    fs,
    io::Write as _,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::PermissionsExt,
    },
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};

use super::*;
use crate::{
    dataplane::netfilter::refused::{frontend, spec},
    desired::Frontend,
};

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
            other: None,
            halves: Family::BOTH.map(half),
            flows: Flows::idle(),
            detect_local: DetectLocal::Device,
            localhost: false,
            loopback: RouteLocalnet(dir.path().join("route_localnet")),
            unsettled: None,
            affinity_clients: 100,
            failures: Arc::default(),
            devices: Some(BTreeSet::new()),
            held: BTreeSet::new(),
            health: BTreeSet::new(),
            rations: Rations::new(Instant::now()),
            wrote: false,
        };
        Self { dir, iptables, stamps }
    }

    /// With node ports of 127.0.0.1 asked for.
    fn opening() -> Self {
        let mut world = Self::new();
        world.iptables.localhost = true;
        for half in &mut world.iptables.halves {
            half.shadow.renderer.localhost = true;
        }
        world
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
        world.iptables.rations = Rations::new(Instant::now());
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
        world.iptables.rations = Rations::new(Instant::now());
        looks(world)
    };
    let all = compared(&mut world);
    assert!(all.0 > 1 && all.1 == 0, "{all:?}");
    assert_eq!(compared(&mut world), all, "nothing is known of whether it has changed");
    world.stamps.0.store(7, Ordering::Relaxed);
    // Not all of it was read: that it stays so is not enough.
    for _ in 0..2 {
        world.iptables.rations.others.for_nothing(Instant::now(), Duration::from_secs(1000));
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

/// With ten thousand Services it takes seconds, and something always changes.
#[test]
fn readings_that_follow_our_own_changes_are_rationed_by_themselves() {
    let mut world = World::new();
    assert_eq!(world.set(&[frontend("10.96.0.1")]).failed, BTreeMap::new());
    let printed = world.file("given").replace("\n-I ", "\n-A ");
    world.write("saved", &printed);
    // One may be owed for.
    world.iptables.rations.own.for_nothing(Instant::now(), Duration::from_secs(1000));
    assert!(world.iptables.observe().unwrap().hooks.is_empty());
    assert!(!world.iptables.wrote && !world.iptables.rations.own.allows(Instant::now()), "it was for nothing");
    let altered = printed.replace("--ctstate NEW -j REJECT", "--ctstate NEW -j ACCEPT");
    world.write("saved", &altered);
    world.iptables.wrote = true;
    assert!(world.iptables.observe().unwrap().hooks.is_empty() && world.iptables.wrote, "not read yet");
    world.iptables.wrote = false;
    assert_eq!(world.iptables.observe().unwrap().hooks.len(), 1, "others have their own");
}

/// What can be read and not written, by root either; as long as the first lives.
fn sealed(text: &str) -> (OwnedFd, RouteLocalnet) {
    let file = memfd_create("route_localnet", MemfdFlags::ALLOW_SEALING).unwrap();
    fs::File::from(file.try_clone().unwrap()).write_all(text.as_bytes()).unwrap();
    fcntl_add_seals(&file, SealFlags::WRITE | SealFlags::SHRINK).unwrap();
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    (file, RouteLocalnet(path.into()))
}

/// A setting that can be written, with this in it.
fn writable(world: &World, value: &str) -> RouteLocalnet {
    world.write("route_localnet", value);
    RouteLocalnet(world.dir.path().join("route_localnet"))
}

/// As iptables-save would print what was written last.
fn print(world: &World) {
    let given = world.file("given").replace("\n-I ", "\n-A ");
    let gone: BTreeSet<&str> = given.lines().filter_map(|line| line.strip_prefix("-X ")).collect();
    let is_there = |line: &&str| {
        let chain = line.strip_prefix(':').and_then(|rest| rest.split(' ').next());
        !line.starts_with("-X ") && !line.starts_with("-D ") && !chain.is_some_and(|chain| gone.contains(chain))
    };
    world.write("saved", &given.split_inclusive('\n').filter(is_there).collect::<String>());
}

const NOTED: &str = "--comment \"route_localnet was 0\"";
const LEADS: &str = "-I INPUT -m comment --comment \"loopback is the node's own\" -j PROXY-LOOPBACK";
/// What an agent left that could not put it back.
const LEFT: &str = "*filter\n:PROXY-LOOPBACK - [0:0]\n-A INPUT -m comment --comment \"loopback is the node's own\" -j PROXY-LOOPBACK\n\
    -A PROXY-LOOPBACK ! -s 127.0.0.0/8 -d 127.0.0.0/8 -m comment --comment \"route_localnet was 0\" -j DROP\nCOMMIT\n";

#[test]
fn the_neighbours_are_kept_out_for_as_long_as_the_setting_stands() {
    let mut world = World::opening();
    world.iptables.loopback = writable(&world, "0");
    let one = frontend("10.96.0.1");
    assert_eq!(world.set(&[one]).failed, BTreeMap::new());
    assert!(world.file("given").contains(NOTED) && world.file("route_localnet") == "1");
    print(&world);

    // The next agent is not asked for it, and cannot put it back.
    let mut next = World::new();
    next.write("saved", &world.file("saved"));
    let (_file, stuck) = sealed("1\n");
    next.iptables.loopback = stuck;
    assert_eq!(next.set(&[one]).failed, BTreeMap::new());
    let given = next.file("given");
    assert!(given.contains(NOTED) && given.contains("-I INPUT") && !given.contains("-X PROXY-LOOPBACK"), "{given}");
    assert_eq!(next.iptables.tick(), Some(AGAIN));
    let said = next.iptables.unsettled().unwrap();
    assert!(said.contains("cannot be set back to 0") && said.contains("mount /proc/sys writable"), "{said}");
    print(&next);
    assert!(next.iptables.observe().unwrap().hooks.is_empty(), "nothing to repair");

    // Nothing is asked for any more: the rule alone stays.
    next.iptables.halves[0].state = State::Unknown;
    let gone = Changes { remove: [one].into(), ..Changes::default() };
    assert_eq!(next.iptables.apply(&gone).failed, BTreeMap::new());
    let given = next.file("given");
    assert!(given.contains("-X PROXY-SERVICES") && given.contains(NOTED) && given.contains(LEADS), "{given}");
    assert!(!given.contains("-X PROXY-LOOPBACK") && next.iptables.tick().is_some(), "{given}");
    print(&next);

    // By now it can.
    next.iptables.loopback = writable(&next, "1");
    assert_eq!((next.iptables.tick(), next.iptables.unsettled()), (None, None));
    assert_eq!(next.file("route_localnet"), "0");
    assert_eq!(next.iptables.halves[0].state, State::Unknown);
    assert_eq!(next.set(&[one]).failed, BTreeMap::new());
    let given = next.file("given");
    assert!(given.contains("-X PROXY-LOOPBACK") && !given.contains(NOTED), "{given}");
}

/// Nothing is served, and the setting cannot be put back.
#[test]
fn the_rule_that_stands_alone_is_looked_after() {
    let mut world = World::new();
    let (_file, stuck) = sealed("1\n");
    world.iptables.loopback = stuck;
    world.write("saved", LEFT);
    let again = |world: &mut World| {
        world.write("given", "");
        world.iptables.bring_about(0, Vec::new(), &mut Report::default());
        assert_eq!(world.iptables.halves[0].state, State::Absent);
        let given = world.file("given");
        assert!(given.is_empty() || given.contains(NOTED) && given.contains(LEADS), "{given}");
        !given.is_empty()
    };
    let lost = |world: &mut World| {
        world.iptables.rations = Rations::new(Instant::now());
        world.iptables.observe().unwrap().hooks
    };
    assert!(again(&mut world), "its rule may say anything");
    print(&world);
    let stands = world.file("saved");
    assert_eq!(lost(&mut world), Vec::<String>::new());
    assert!(!again(&mut world), "it is as it should be");
    // Somebody flushes all there is; the chain alone; the way there.
    let emptied = stands.replace("-A PROXY-LOOPBACK", "-A OTHERS");
    let aside: String = stands.split_inclusive('\n').filter(|line| !line.starts_with("-A INPUT")).collect();
    for (left, name) in [("", "INPUT"), (&*emptied, "PROXY-LOOPBACK"), (&*aside, "INPUT")] {
        world.write("saved", left);
        assert_eq!(lost(&mut world), [format!("iptables/{name} filter ipv4")]);
        assert!(again(&mut world), "without {name}");
        world.write("saved", &stands);
        assert_eq!(lost(&mut world), Vec::<String>::new());
    }
}

#[test]
fn nothing_is_opened_for_nobody_though_it_is_asked_for() {
    let mut world = World::opening();
    let (_file, stuck) = sealed("1\n");
    world.iptables.loopback = stuck;
    world.write("saved", LEFT);
    world.iptables.bring_about(0, Vec::new(), &mut Report::default());
    assert!(world.file("given").contains(NOTED));
    assert_eq!(world.iptables.tick(), Some(AGAIN));
    assert!(world.iptables.unsettled().unwrap().contains("cannot be set back to 0"));
    print(&world);
    // By now it can.
    world.iptables.loopback = writable(&world, "1");
    assert_eq!((world.iptables.tick(), world.iptables.unsettled()), (None, None));
    assert_eq!(world.file("route_localnet"), "0");
    assert_eq!(world.iptables.halves[0].state, State::Unknown);
    world.iptables.bring_about(0, Vec::new(), &mut Report::default());
    let given = world.file("given");
    assert!(given.contains("-X PROXY-LOOPBACK") && !given.contains(NOTED), "{given}");
    print(&world);
    world.write("given", "");
    world.iptables.halves[0].state = State::Unknown;
    world.iptables.bring_about(0, Vec::new(), &mut Report::default());
    assert_eq!(world.file("given"), "", "nothing is left");
}

#[test]
fn a_setting_that_cannot_be_set_is_said_and_tried_again() {
    let mut world = World::opening();
    let (_file, stuck) = sealed("0\n");
    world.iptables.loopback = stuck;
    assert_eq!(world.set(&[frontend("10.96.0.1")]).failed, BTreeMap::new());
    assert!(world.file("given").contains(NOTED));
    assert_eq!(world.iptables.tick(), Some(AGAIN));
    let said = world.iptables.unsettled().unwrap();
    assert!(said.contains("cannot be set to 1") && said.contains("127.0.0.1 do not answer"), "{said}");
    // By now it can; and again where somebody else has set it.
    for _ in 0..2 {
        world.iptables.loopback = writable(&world, "0");
        assert_eq!((world.iptables.tick(), world.iptables.unsettled()), (None, None));
        assert_eq!(world.file("route_localnet"), "1");
    }
}

/// It may have no tools, which would fail over and over.
#[test]
fn a_family_without_services_has_no_chains_for_health_checks_alone() {
    let mut world = World::new();
    let [one, two] = ["10.96.0.1", "fd00:96::1"].map(frontend);
    let desired = DesiredState { frontends: [(one, spec(&one))].into(), ..DesiredState::default() };
    world.iptables.let_in(&[32_000].into());
    assert_eq!(world.iptables.resync(&desired).failed, BTreeMap::new());
    let states = |world: &World| world.iptables.halves.each_ref().map(|half| half.state);
    assert_eq!(states(&world), [State::Filled, State::Absent]);
    assert!(world.file("given").contains("--dport 32000"));
    assert_eq!(world.iptables.resync(&desired).writes, 0);
    world.iptables.let_in(&[32_001].into());
    assert!(world.file("given").contains("--dport 32001") && states(&world) == [State::Filled, State::Absent]);
    // As soon as it has one it has them, too.
    assert_eq!(world.set(&[two]).failed, BTreeMap::new());
    let given = world.file("given");
    assert!(given.contains("fd00:96::1") && given.contains("--dport 32001"), "{given}");
}

/// Of the other flavour: what shields loopback, and more.
fn left_by_other() -> World {
    let other = World::new();
    other.write("saved", &format!("*nat\n:PROXY-SERVICES - [0:0]\n-A OUTPUT -j PROXY-SERVICES\nCOMMIT\n{LEFT}"));
    other
}

/// A family that nobody needs keeps nobody waiting.
#[test]
fn what_the_other_flavour_left_goes_once_everything_is_in_force() {
    let (mut world, other) = (World::new(), left_by_other());
    world.iptables.other = Some(Other::new(other.iptables.tools));
    world.iptables.loopback = writable(&world, "1");
    let one = frontend("10.96.0.1");
    world.write("refuses", "COMMIT\n");
    let desired = DesiredState { frontends: [(one, spec(&one))].into(), ..DesiredState::default() };
    assert!(!world.iptables.resync(&desired).failed.is_empty());
    assert_eq!((world.iptables.tick(), other.file("given").as_str()), (Some(AGAIN), ""), "nobody else serves");
    world.write("refuses", "");
    assert_eq!(world.iptables.resync(&desired).failed, BTreeMap::new());
    assert_eq!(world.iptables.halves[1].state, State::Absent);
    assert_eq!(
        (world.iptables.tick(), other.file("given").as_str()),
        (Some(AGAIN), ""),
        "what is missing may come yet"
    );
    world.iptables.in_force();
    world.iptables.halves[1].state = State::Unknown;
    assert_eq!(
        (world.iptables.tick(), other.file("given").as_str()),
        (Some(AGAIN), ""),
        "nor is it known what there is"
    );
    world.iptables.halves[1].state = State::Absent;
    assert_eq!((world.iptables.tick(), world.iptables.unremoved()), (None, None));
    let given = other.file("given");
    assert!(given.contains("-X PROXY-LOOPBACK") && given.contains("-X PROXY-SERVICES"), "{given}");
    assert_eq!(world.file("route_localnet"), "0");
}

#[test]
fn what_shields_loopback_is_taken_over_from_the_other_flavour() {
    for serves in [false, true] {
        let (mut world, other) = (World::new(), left_by_other());
        world.iptables.other = Some(Other::new(other.iptables.tools));
        let (_file, stuck) = sealed("1\n");
        world.iptables.loopback = stuck;
        let one = frontend("10.96.0.1");
        let items =
            serves.then(|| world.iptables.items(0, &Changes { set: [(one, spec(&one))].into(), ..Changes::default() }));
        world.iptables.bring_about(0, items.unwrap_or_default(), &mut Report::default());
        let given = world.file("given");
        assert!(given.contains(NOTED) && given.contains(LEADS), "{given}");
        world.iptables.halves[1].state = State::Absent;
        world.iptables.in_force();
        assert_eq!((world.iptables.tick(), world.iptables.unremoved()), (Some(AGAIN), None));
        assert!(world.iptables.unsettled().unwrap().contains("cannot be set back to 0"));
        let given = other.file("given");
        assert!(given.contains("-X PROXY-LOOPBACK") && given.contains("-X PROXY-SERVICES"), "{given}");
    }
}

/// Nobody knew of it in time to take it over.
#[test]
fn what_has_to_stay_of_the_other_flavour_is_what_shields_loopback() {
    let (mut world, other) = (World::new(), left_by_other());
    world.iptables.other = Some(Other::new(other.iptables.tools));
    let (_file, stuck) = sealed("1\n");
    world.iptables.loopback = stuck;
    for half in &mut world.iptables.halves {
        half.state = State::Absent;
    }
    world.iptables.in_force();
    assert_eq!(world.iptables.tick(), Some(AGAIN));
    let given = other.file("given");
    assert!(given.contains("-X PROXY-SERVICES") && !given.contains("PROXY-LOOPBACK"), "{given}");
    let said = world.iptables.unremoved().unwrap();
    assert!(said.contains("from iptables (nft)") && said.contains("cannot be set back to 0"), "{said}");
    // By now it could be, but for somebody who does not let us write.
    world.iptables.loopback = writable(&world, "1");
    other.write("saved", LEFT);
    other.write("refuses", "COMMIT\n");
    let mut later = Instant::now();
    world.iptables.remove_other(later);
    assert_eq!(world.iptables.unremoved(), Some(said), "not without a pause");
    later += AGAIN * 2;
    world.iptables.remove_other(later);
    let said = world.iptables.unremoved().unwrap();
    assert!(said.contains("line 3 failed") && world.file("route_localnet") == "0", "{said}");
    other.write("refuses", "");
    world.iptables.remove_other(later + AGAIN);
    assert!(other.file("given").contains("-X PROXY-LOOPBACK"));
    assert_eq!((world.iptables.tick(), world.iptables.unremoved()), (None, None));
}
