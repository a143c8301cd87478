//! What becomes of a table when nft fails, by one that does as it is told.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};

use super::{
    render::{Collection, Element},
    *,
};
use crate::{
    dataplane::netfilter::refused::{frontend, spec},
    desired::{Action, Backend, FrontendSpec, Verdict, Verdicts},
};

/// Fails at what the file `fails` names; lists the file `table`; notes what it is given in `given`, `all` and, a line for each, `runs`.
const FAKE: &str = r#"#!/bin/sh
cd "${0%/*}"
case "$*" in *list*) what=list ;; *) what=change; cat >last ;; esac
if grep -qs "$what" fails; then echo "Error: Device or resource busy" >&2; exit 1; fi
if [ $what = list ]; then
    echo "$*" >>listed
    [ -e table ] || { echo "Error: No such file or directory" >&2; exit 1; }
    exec cat table
fi
case "$*" in *-c*) ;; *) cat last >given; cat last >>all; echo >>runs ;; esac
"#;

/// The kernel that goes with it.
#[derive(Debug)]
struct Kernel(PathBuf);

impl Rules for Kernel {
    fn generation(&self) -> io::Result<u32> {
        Ok(read(&self.0, "runs").lines().count() as u32)
    }

    fn structure(&self, family: Family, _table: &str) -> io::Result<Structure> {
        if read(&self.0, "fails").contains("structure") {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        let mut structure = Structure::default();
        let table: Value = serde_json::from_str(&read(&self.0, "table")).unwrap_or_default();
        for object in table["nftables"].as_array().into_iter().flatten() {
            let (kind, about) = object.as_object().unwrap().iter().next().unwrap();
            let text = |key: &str| about[key].as_str().unwrap().to_owned();
            if text("family") != if family == Family::V4 { "ip" } else { "ip6" } {
                continue;
            }
            match kind.as_str() {
                "chain" => drop(structure.chains.entry(text("name")).or_default()),
                "rule" => {
                    let chain = structure.chains.entry(text("chain")).or_default();
                    chain.rules += 1;
                    chain.print += about["print"].as_u64().unwrap();
                }
                _ => drop(structure.sets.insert(text("name"))),
            }
        }
        Ok(structure)
    }

    fn chain(&self, _family: Family, _table: &str, _name: &str) -> io::Result<Chain> {
        Ok(Chain::default())
    }

    fn keys(&self, family: Family, _table: &str, set: &str) -> io::Result<Vec<Vec<u8>>> {
        let table: Value = serde_json::from_str(&read(&self.0, "table")).unwrap_or_default();
        let ip = netfilter::ip(family);
        let sets = table["nftables"].as_array().into_iter().flatten().map(|object| &object["set"]);
        let elements = sets
            .filter(|about| about["family"] == ip && about["name"] == set)
            .flat_map(|about| about["elem"].as_array().into_iter().flatten());
        Ok(elements.filter_map(|element| bytes(element["elem"]["val"].as_str()?)).collect())
    }

    fn count(&self, family: Family, _table: &str, set: &str) -> io::Result<u64> {
        assert_eq!(set, render::AFFINITY);
        Ok(if family == Family::V4 { 70_000 } else { 3 })
    }
}

/// A mark, or address, protocol and port, as a kernel has them; others' keys are not asked for.
fn bytes(key: &str) -> Option<Vec<u8>> {
    let parts: Vec<&str> = key.split(" . ").collect();
    match parts[..] {
        [mark] => Some(mark.parse::<u32>().ok()?.to_ne_bytes().to_vec()),
        [addr, protocol, port] => {
            let mut key = match addr.parse().unwrap() {
                IpAddr::V4(addr) => addr.octets().to_vec(),
                IpAddr::V6(addr) => addr.octets().to_vec(),
            };
            let [high, low] = port.parse::<u16>().ok()?.to_be_bytes();
            key.extend([protocol.parse().ok()?, 0, 0, 0, high, low, 0, 0]);
            Some(key)
        }
        _ => None,
    }
}

fn read(dir: &Path, name: &str) -> String {
    fs::read_to_string(dir.join(name)).unwrap_or_default()
}

/// With an nft that does as the files of `dir` say.
pub(crate) fn fake(dir: &Path, role: Role) -> Nftables {
    let path = dir.join("nft");
    fs::write(&path, FAKE).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    let program = Box::leak(path.display().to_string().into_boxed_str());
    let half = |family| Half::new(family, role, &Options::default());
    Nftables {
        _lock: Lock::take_name(&format!("proxy-agent-test-{}", dir.display())).unwrap(),
        role,
        nft: Tool { program, ..NFT },
        netlink: Box::new(Kernel(dir.to_owned())),
        halves: Family::BOTH.map(half),
        flows: Flows::idle(),
        pods: None,
        devices: Vec::new(),
        held: BTreeSet::new(),
    }
}

/// The kernel holds what it should.
pub(crate) fn list_fake(dir: &Path, nftables: &Nftables) {
    let whole = nftables.halves.iter().flat_map(|half| listing(&half.shadow)).collect::<Vec<_>>();
    fs::write(dir.join("table"), json!({ "nftables": whole }).to_string()).unwrap();
}

struct World {
    dir: tempfile::TempDir,
    nftables: Nftables,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let nftables = fake(dir.path(), Role::Whole);
        Self { dir, nftables }
    }

    fn file(&self, name: &str) -> String {
        read(self.dir.path(), name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(Path::join(self.dir.path(), name), text).unwrap();
    }

    /// From now on the kernel holds what it should.
    fn list(&self) {
        list_fake(self.dir.path(), &self.nftables);
    }

    fn alter(&self, from: &str, to: &str) {
        let table = self.file("table");
        assert!(table.contains(from), "{from}: {table}");
        self.write("table", &table.replace(from, to));
    }

    /// After somebody changed rules, of whatever table.
    fn drift(&mut self) -> Drift {
        let mut drift = Drift::default();
        for at in 0..2 {
            let now = self.nftables.halves[at].generation.unwrap_or_default().wrapping_add(1);
            self.nftables.compare(at, now, &mut drift).unwrap();
        }
        drift
    }

    fn set(&mut self, set: &[Frontend]) -> Report {
        let set = set.iter().map(|frontend| (*frontend, spec(frontend))).collect();
        self.nftables.apply(&Changes { set, ..Changes::default() })
    }
}

/// As nft would list it.
fn listing(shadow: &Shadow) -> Vec<Value> {
    let (ip, role) = (shadow.renderer.ip, shadow.renderer.role);
    let mut all = Vec::new();
    let skeleton = shadow.renderer.skeleton().into_iter().map(|(name, _, rules)| (name.to_owned(), rules));
    for (name, rules) in skeleton.chain(shadow.rules()) {
        all.push(json!({ "chain": { "family": ip, "table": role.table(), "name": name } }));
        let rule = |rule: &String| json!({ "rule": { "family": ip, "table": role.table(), "chain": name, "print": print(rule) } });
        all.extend(rules.iter().map(rule));
    }
    let elements = shadow.elements();
    for name in Collection::of(role).map(|one| one.name()).chain([render::AFFINITY]) {
        let of = elements.iter().filter(|((collection, _), _)| collection.name() == name);
        let elem = of.map(|((_, key), Element { value, comment })| {
            let key = json!({ "elem": { "val": key, "comment": comment } });
            match value.as_deref().map(|value| value.split_once(' ').unwrap_or((value, ""))) {
                Some((word, target)) => json!([key, { word: { "target": target } }]),
                None => key,
            }
        });
        let elem: Vec<Value> = elem.collect();
        all.push(json!({ "set": { "family": ip, "table": role.table(), "name": name, "elem": elem } }));
    }
    all
}

fn print(rule: &str) -> u64 {
    netfilter::names::hash([rule]) >> 16
}

#[test]
fn what_was_in_force_survives_a_refill_that_fails() {
    let [one, two, three, gone] = ["10.96.0.1", "10.96.0.2", "10.96.0.3", "10.96.0.4"].map(frontend);
    for fails in ["structure", "change"] {
        let mut world = World::new();
        assert_eq!(world.set(&[one, two, gone]).failed, BTreeMap::new());
        world.nftables.halves[0].state = State::Unknown;
        world.write("fails", fails);
        let remove = [gone].into();
        let set = [(three, spec(&three))].into();
        let report = world.nftables.apply(&Changes { set, remove, ..Changes::default() });
        // All of them are known as failed: what is gone, too.
        assert_eq!(report.failed.keys().copied().collect::<Vec<_>>(), [one, two, three, gone], "{fails}");
        // That is no drift: nobody altered anything.
        let drift = world.drift();
        assert!(drift.unfinished && drift.altered() == 0, "{drift:?}");
        world.write("fails", "");
        assert_eq!(world.set(&[three]).failed, BTreeMap::new(), "{fails}");
        let given = world.file("given");
        for frontend in [one, two, three] {
            assert!(given.contains(&frontend.addr.to_string()), "{fails}: {frontend}:\n{given}");
        }
    }
}

#[test]
fn both_families_are_compared_in_full() {
    let mut world = World::new();
    let [four, six] = ["10.96.0.1", "fd00:96::1"].map(frontend);
    assert_eq!(world.set(&[four, six]).failed, BTreeMap::new());
    world.list();
    assert!(world.drift().is_empty());
    for half in &mut world.nftables.halves {
        half.ration = Ration::new(Instant::now());
    }
    world.alter("goto", "jump");
    let drift = world.drift();
    assert_eq!(drift.frontends.into_iter().collect::<BTreeSet<_>>(), [four, six].into());
}

#[test]
fn devices_of_an_earlier_run_go_once_ours_are_known() {
    let mut world = World::new();
    let [four, six] = ["10.96.0.1", "fd00:96::1"].map(frontend);
    world.list();
    assert_eq!(world.set(&[four, six]).failed, BTreeMap::new());
    let all = world.file("all");
    assert!(all.contains("10.96.0.1") && !all.contains("flush set ip proxy-agent pods"), "{all}");
    world.list();
    assert!(world.drift().is_empty());
    let report = world.nftables.set_devices(&Devices::new());
    assert!(report.failed_devices.is_empty());
    let given = world.file("all").split_off(all.len());
    assert_eq!(given, "flush set ip proxy-agent pods\nflush set ip6 proxy-agent pods\n");
    // By now they are known.
    assert_eq!(world.nftables.set_devices(&Devices::new()).writes, 0);
    // Those that failed are still to come, whoever was told of it.
    world.nftables.pods = Some([7].into());
    let drift = world.drift();
    assert!(drift.unfinished && drift.altered() == 0, "{drift:?}");
    let mut desired = DesiredState::default();
    desired.frontends.extend([four, six].map(|frontend| (frontend, spec(&frontend))));
    assert!(world.nftables.resync(&desired).is_clean());
    assert_eq!(world.file("given"), "add element ip6 proxy-agent pods { 7 }\n");
}

#[test]
fn drift_is_found_beside_what_cannot_be_read() {
    let mut world = World::new();
    let [one, held] = ["10.96.0.1", "10.96.0.2"].map(frontend);
    assert_eq!(world.set(&[one, held]).failed, BTreeMap::new());
    world.nftables.halves[1].state = State::Absent;
    world.list();
    world.nftables.hold(&[spec(&held).service.service.clone()].into());
    world.nftables.halves[0].state = State::Unknown;
    let report = world.set(&[one]);
    assert_eq!(report.failed.into_keys().collect::<Vec<_>>(), [held]);
    assert!(!world.nftables.halves[0].kept.is_empty());
    assert!(!world.file("given").contains("10.96.0.2"));
    assert!(world.drift().is_empty());
    // A chain that stayed does not get its rules twice.
    let mut other = FrontendSpec::clone(&spec(&one));
    let backend = Backend { addr: "10.244.1.1".parse().unwrap(), port: 80.try_into().unwrap() };
    other.all = vec![backend].into();
    let all = Verdict { action: Action::PickAll, masquerade: false };
    other.verdicts = Verdicts { pod: all, node: all, external: all };
    let set = [(one, Arc::new(other))].into();
    assert_eq!(world.nftables.apply(&Changes { set, ..Changes::default() }).failed, BTreeMap::new());
    assert!(world.file("given").contains("flush chain ip proxy-agent tcp-all-1"), "{}", world.file("given"));
    assert_eq!(world.set(&[one]).failed, BTreeMap::new());
    for (from, to) in [("10.96.0.1 .", "10.96.0.9 ."), ("10.96.0.2 .", "10.96.0.8 .")] {
        world.nftables.halves[0].ration = Ration::new(Instant::now());
        world.nftables.halves[0].state = State::Filled;
        world.alter(from, to);
        let drift = world.drift();
        assert!(!drift.is_empty(), "{from}");
        world.alter(to, from);
    }
}

/// A dataplane of which this is the gate leaves alone what the next resync does, and nothing else.
#[test]
fn what_is_kept_is_told_before_it_is() {
    let mut world = World::new();
    let [one, held] = ["10.96.0.1", "10.96.0.2"].map(frontend);
    assert_eq!(world.set(&[one, held]).failed, BTreeMap::new());
    world.list();
    assert_eq!(world.nftables.kept().unwrap(), BTreeSet::new());
    assert_eq!(
        [one, frontend("10.96.0.3"), frontend("fd00:96::1")].map(|one| world.nftables.stands(&one)),
        [Some(true), Some(false), None]
    );
    let service = spec(&held).service.service.clone();
    world.nftables.hold(&[service].into());
    world.nftables.halves[0].state = State::Unknown;
    assert_eq!(world.nftables.stands(&one), None);
    let kept = world.nftables.kept().unwrap();
    assert_eq!(kept, [Renderer::frontend_key(&held)].into());
    let mut desired = DesiredState::default();
    desired.frontends.extend([one, held].map(|frontend| (frontend, spec(&frontend))));
    let report = world.nftables.resync(&desired);
    assert_eq!(report.failed.into_keys().collect::<Vec<_>>(), [held]);
    world.list();
    assert_eq!(world.nftables.kept().unwrap(), kept);
    // All of it is known now: the table still has it, and the resync that comes takes it in.
    world.nftables.hold(&BTreeSet::new());
    assert_eq!(world.nftables.kept().unwrap(), BTreeSet::new());
    assert!(world.nftables.resync(&desired).is_clean());
    world.write("table", "");
    world.nftables.halves[0].state = State::Unknown;
    assert_eq!(world.nftables.stands(&one), Some(false));
}

#[test]
fn a_rule_that_says_something_else_is_made_anew() {
    let mut world = World::new();
    let [four, six] = ["10.96.0.1", "fd00:96::1"].map(frontend);
    assert_eq!(world.set(&[four, six]).failed, BTreeMap::new());
    world.list();
    assert!(world.drift().is_empty(), "what could not be read is taken for what it should be");
    world.alter(&print("reject").to_string(), &print("accept").to_string());
    assert_eq!(world.drift().hooks, ["table ip proxy-agent", "table ip6 proxy-agent"]);
}

#[test]
fn how_many_clients_are_remembered_is_said() {
    let mut world = World::new();
    let [four, six] = ["10.96.0.1", "fd00:96::1"].map(frontend);
    assert_eq!(world.set(&[four, six]).failed, BTreeMap::new());
    assert!(world.nftables.fill().iter().all(|fill| fill.entries == 0));
    world.nftables.observe().unwrap();
    let fill: Vec<_> = world.nftables.fill().into_iter().map(|fill| (fill.map, fill.entries, fill.capacity)).collect();
    assert_eq!(fill, [("affinity_v4".to_owned(), 70_000, 65_536), ("affinity_v6".to_owned(), 3, 65_536)]);
    world.nftables.halves[0].count_at = Instant::now() + Duration::from_secs(3600);
    world.nftables.halves[0].remembered = 1;
    world.nftables.observe().unwrap();
    assert_eq!(world.nftables.halves[0].remembered, 1, "not before it is time");
}

/// In a network namespace of this thread's own. Who asks may have no nft.
#[test]
fn what_is_noted_is_read_from_the_kernel() {
    if !rustix::process::geteuid().is_root() || NFT.run(&["--version"], "").is_err() {
        println!("SKIP what_is_noted_is_read_from_the_kernel: not root, or no nft");
        return;
    }
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
    let noted_by = || Nftables::noted_by(Role::Gate, &Options::default()).unwrap();
    let nothing = Family::BOTH.map(|family| (family, Servers::default()));
    assert_eq!(noted_by(), nothing);
    let noted = Family::BOTH.map(|family| {
        let shadow = Shadow::new(Renderer::new(family, Role::Gate, &Options::default()));
        let addr = netfilter::sample::addr(family, 100);
        let at = PROTOCOLS.map(|protocol| {
            Nftables::key(&Frontend { addr, port: (256 + u16::from(protocol.number())).try_into().unwrap(), protocol })
        });
        let servers = Servers { at: at.into(), marks: [1, 0x0102_0300, u32::MAX].into() };
        let draft = shadow.draft(&[Item::servers(servers.clone())]);
        NFT.run(&["-f", "-"], &shadow.refill(&draft, &shadow::Found::default(), true)).unwrap();
        (family, servers)
    });
    assert_eq!(noted_by(), noted);
    assert_eq!(Nftables::remains_of(Role::Gate).unwrap().len(), 2);
    Nftables::remove_tables(Role::Gate).unwrap();
    assert_eq!(Nftables::remains_of(Role::Gate).unwrap(), Vec::<String>::new());
    assert_eq!(noted_by(), nothing);
}

/// Of many only those that come or go; what could not be noted comes with what is brought about next.
#[test]
fn what_is_new_is_noted_until_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let mut gate = fake(dir.path(), Role::Gate);
    let of = |lasts: &[u8]| Servers {
        at: lasts.iter().map(|last| format!("10.96.0.{last} . 6 . 80")).collect(),
        ..Servers::default()
    };
    let note = |gate: &mut Nftables, come: &[u8], gone: &[u8]| {
        gate.note(Family::V4, &of(come), &of(gone), &mut Report::default());
        read(dir.path(), "given")
    };
    assert_eq!(note(&mut gate, &[1, 2], &[]), "", "there is no table yet");
    let one = frontend("10.96.0.1");
    let set = [(one, spec(&one))].into();
    assert_eq!(gate.apply(&Changes { set, ..Changes::default() }).failed, BTreeMap::new());
    let given = read(dir.path(), "given");
    assert!(given.contains("servers { 10.96.0.1 . 6 . 80, 10.96.0.2 . 6 . 80 }"), "{given}");
    assert_eq!(note(&mut gate, &[], &[]), given, "nothing is said of what stays");
    assert_eq!(
        note(&mut gate, &[3], &[1]),
        "delete element ip proxy-agent-ipvs servers { 10.96.0.1 . 6 . 80 }\nadd element ip proxy-agent-ipvs servers { 10.96.0.3 . 6 . 80 }\n"
    );
    list_fake(dir.path(), &gate);
    fs::write(dir.path().join("fails"), "change").unwrap();
    note(&mut gate, &[4], &[3]);
    assert_eq!(gate.halves[0].state, State::Unknown, "nobody knows what is there");
    fs::write(dir.path().join("fails"), "").unwrap();
    let set = [(one, spec(&one))].into();
    assert_eq!(gate.apply(&Changes { set, ..Changes::default() }).failed, BTreeMap::new());
    let given = read(dir.path(), "given");
    assert!(given.contains("servers { 10.96.0.2 . 6 . 80, 10.96.0.4 . 6 . 80 }"), "{given}");
}
