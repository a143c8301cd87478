//! The eBPF dataplane in the kernel: pins, adoption, swaps, lost hooks, full maps. Needs root and the object; else skipped.
//!
//! Each test has its own network namespace (its thread's), cgroup and pin directory, and removes them.

use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs,
    net::IpAddr,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use proxy_agent::{
    dataplane::{
        Dataplane, Failure,
        ebpf::{Ebpf, Options, Sizes, SocketLb, Tc, probe::probe, read::Pins},
    },
    desired::{
        Action, Algorithm, Backend, DesiredState, Device, DeviceRole, Devices, Frontend, FrontendKind, FrontendSpec,
        Verdict, Verdicts,
    },
    model::{Protocol, ServiceKey, ServicePortName},
};

const BPFFS: &str = "/sys/fs/bpf";

fn skip() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("not root".into());
    }
    match env::var_os("PROXY_EBPF_OBJECT") {
        None => Some("PROXY_EBPF_OBJECT names no object (cargo xtask build-ebpf)".into()),
        Some(object) if !Path::new(&object).is_file() => Some(format!("no object at {}", Path::new(&object).display())),
        Some(_) if cgroup_root().is_none() => Some("no cgroup v2 is mounted".into()),
        Some(_) => None,
    }
}

fn cgroup_root() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    let line = mounts.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2"))?;
    line.split(' ').nth(1).map(PathBuf::from)
}

/// What one test has for itself.
struct World {
    options: Options,
}

impl World {
    /// `None` where the test is to be skipped.
    fn new(test: &str) -> Option<Self> {
        if let Some(reason) = skip() {
            println!("SKIP {test}: {reason}");
            return None;
        }
        let object: &'static [u8] = fs::read(env::var_os("PROXY_EBPF_OBJECT").unwrap()).unwrap().leak();
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        let name = format!("dataplane-{test}-{}", std::process::id());
        let cgroup = cgroup_root().unwrap().join(&name);
        fs::create_dir(&cgroup).unwrap();
        let options = Options {
            bpffs: Path::new(BPFFS).join(&name),
            cgroup_root: Some(cgroup),
            sizes: Sizes {
                frontends: 256,
                slots: 1024,
                services: 256,
                connections: 256,
                half_open: 256,
                datagrams: 256,
                affinity: 256,
                source_ranges: 64,
            },
            object: Some(object),
            ..Options::default()
        };
        Some(Self { options })
    }

    fn open(&self) -> Ebpf {
        Ebpf::open(&self.options).unwrap()
    }

    fn pins(&self) -> Pins {
        Pins::open(&self.options.bpffs).unwrap()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = Ebpf::remove(&self.options.bpffs);
        let _ = fs::remove_dir_all(&self.options.bpffs);
        let _ = fs::remove_dir(self.options.cgroup_root.as_ref().unwrap());
    }
}

fn sh(command: &str) -> String {
    let output = Command::new("sh").args(["-c", command]).output().unwrap();
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn frontend(n: u8, v6: bool) -> Frontend {
    Frontend {
        addr: if v6 { IpAddr::from([0xfd96, 0, 0, 0, 0, 0, 0, u16::from(n)]) } else { IpAddr::from([10, 96, 0, n]) },
        port: 80.try_into().unwrap(),
        protocol: Protocol::Tcp,
    }
}

fn spec(n: u8, v6: bool, backends: std::ops::Range<u8>) -> Arc<FrontendSpec> {
    let backend = |b: u8| Backend {
        addr: if v6 {
            IpAddr::from([0xfd00, u16::from(n), 0, 0, 0, 0, 0, u16::from(b)])
        } else {
            IpAddr::from([10, n, 0, b])
        },
        port: 8080.try_into().unwrap(),
    };
    let pick = |masquerade| Verdict { action: Action::PickAll, masquerade };
    Arc::new(FrontendSpec {
        service: ServicePortName {
            service: ServiceKey::new("default", &format!("web{n}")),
            port: "http".into(),
            protocol: Protocol::Tcp,
        },
        kind: FrontendKind::ClusterIp,
        all: backends.map(backend).collect(),
        local: [].into(),
        verdicts: Verdicts { pod: pick(false), node: pick(false), external: pick(true) },
        algorithm: Algorithm::Random,
        affinity_secs: None,
        source_ranges: None,
        alive: None,
    })
}

/// Services 1..=count over both families, three backends each, guards for IPv4.
fn state(count: u8) -> DesiredState {
    let mut state = DesiredState::default();
    for n in 1..=count {
        for v6 in [false, true] {
            state.frontends.insert(frontend(n, v6), spec(n, v6, 1..4));
        }
        state.guards.insert(frontend(n, false).addr);
    }
    state
}

/// Two veths of fixed indexes.
fn devices() -> Devices {
    sh(
        "ip link add veth-a index 701 type veth peer name peer-a && ip link add veth-b index 702 type veth peer name peer-b",
    );
    device_list(&[(701, "veth-a"), (702, "veth-b")])
}

fn device_list(devices: &[(u32, &str)]) -> Devices {
    devices
        .iter()
        .map(|(index, name)| {
            let device = Device {
                name: (*name).into(),
                role: DeviceRole::Pod,
                ethernet: true,
                source4: Some([192, 168, 0, 1].into()),
                source6: None,
                netns: None,
                bridge: None,
                behind: false,
            };
            (*index, device)
        })
        .collect()
}

/// As the loop does it at start.
fn start(ebpf: &mut Ebpf, state: &DesiredState, devices: &Devices) -> u64 {
    let resync = ebpf.resync(state);
    assert!(resync.is_clean(), "{resync:?}");
    let report = ebpf.set_devices(devices);
    assert!(report.is_clean(), "{report:?}");
    ebpf.activate().unwrap();
    let drift = ebpf.observe().unwrap();
    assert!(drift.is_empty(), "{drift:?}");
    resync.writes + report.writes
}

fn assert_holds(pins: &Pins, state: &DesiredState) {
    let rows: BTreeMap<_, _> =
        pins.frontends().unwrap().into_iter().map(|row| ((row.addr, row.port, row.protocol), row)).collect();
    assert_eq!(rows.len(), state.frontends.len() + state.guards.len());
    for (frontend, spec) in &state.frontends {
        let row = &rows[&(frontend.addr, frontend.port.get(), Some(frontend.protocol))];
        assert!(!row.torn && !row.guard);
        assert_eq!(row.service, spec.service.to_string());
        let all: Vec<_> = spec.all.iter().map(|b| std::net::SocketAddr::new(b.addr, b.port.get())).collect();
        assert_eq!(row.all, all);
        assert_eq!(row.verdicts.external, spec.verdicts.external);
    }
    for guard in &state.guards {
        assert!(rows[&(*guard, 0, None)].guard);
    }
}

/// What the kernel says of the links in force, by hook.
fn links<T>(world: &World, of: impl Fn(&aya::programs::links::FdLink) -> T) -> BTreeMap<String, T> {
    let links = world.options.bpffs.join("v1/links");
    fs::read_dir(links)
        .unwrap()
        .map(|entry| {
            let path = entry.unwrap().path();
            let link = aya::programs::links::PinnedLink::from_pin(&path).unwrap().into();
            (path.file_name().unwrap().to_str().unwrap().to_owned(), of(&link))
        })
        .collect()
}

/// Ids of the programs in force; a fresh load changes them.
fn program_ids(world: &World) -> BTreeMap<String, u32> {
    links(world, |link| link.info().unwrap().program_id())
}

fn link_ids(world: &World) -> BTreeMap<String, u32> {
    links(world, |link| link.info().unwrap().id())
}

#[test]
fn a_restart_adopts_everything_and_writes_nothing() {
    let Some(world) = World::new("restart") else { return };
    let (state, devices) = (state(20), devices());
    let mut first = world.open();
    assert!(start(&mut first, &state, &devices) > 0);
    assert_eq!(first.hooks().len(), 8 + 2 * 2);
    assert_holds(&world.pins(), &state);
    assert!(world.pins().agent_running());
    let refused = Ebpf::open(&world.options).unwrap_err().to_string();
    assert!(refused.contains("another agent") && refused.contains(&std::process::id().to_string()), "{refused}");
    let (programs, links) = (program_ids(&world), link_ids(&world));
    drop(first);
    assert!(!world.pins().agent_running());

    let began = Instant::now();
    let mut second = world.open();
    assert_eq!(start(&mut second, &state, &devices), 0, "nothing changed, nothing written");
    let took = began.elapsed();
    assert_eq!((program_ids(&world), link_ids(&world)), (programs, links));
    assert!(took < Duration::from_millis(400), "{took:?}");
    assert_holds(&world.pins(), &state);
    assert_eq!(world.pins().hooks().unwrap().len(), 12);
}

#[test]
fn other_programs_are_swapped_into_the_same_links() {
    let Some(mut world) = World::new("swap") else { return };
    let (state, devices) = (state(2), devices());
    start(&mut world.open(), &state, &devices);
    let (programs, links) = (program_ids(&world), link_ids(&world));
    world.options.masquerade_ports = (2048, 4096);
    start(&mut world.open(), &state, &devices);
    let now = program_ids(&world);
    assert_eq!(link_ids(&world), links, "the links themselves stay");
    assert!(now.iter().all(|(hook, id)| programs[hook] != *id), "{programs:?} {now:?}");

    // Connect-time translation off: those links and programs go, the others stay.
    world.options.socket_lb = SocketLb::Off;
    let mut ebpf = world.open();
    start(&mut ebpf, &state, &devices);
    assert_eq!(ebpf.hooks().len(), 4);
    assert_eq!(program_ids(&world).len(), 4);
    let programs: Vec<_> = fs::read_dir(world.options.bpffs.join("v1/programs"))
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    assert!(programs.iter().all(|p| p.starts_with("tc_")), "{programs:?}");
}

#[test]
fn lost_hooks_are_noticed_and_put_back() {
    let Some(world) = World::new("lost") else { return };
    let (state, devices) = (state(2), devices());
    let mut ebpf = world.open();
    start(&mut ebpf, &state, &devices);

    // The device of index 701 goes and another comes with the same index.
    sh("ip link del veth-a && ip link add veth-c index 701 type veth peer name peer-c");
    // Somebody unpins a link.
    fs::remove_file(world.options.bpffs.join("v1/links/connect4")).unwrap();
    let mut lost = ebpf.observe().unwrap().hooks;
    lost.sort();
    assert_eq!(lost.len(), 3, "{lost:?}");
    assert!(lost[0].starts_with("cgroup/connect4") && lost[1].starts_with("tcx/egress veth-a"), "{lost:?}");
    let devices = device_list(&[(701, "veth-c"), (702, "veth-b")]);
    assert!(ebpf.set_devices(&devices).is_clean());
    ebpf.activate().unwrap();
    assert!(ebpf.observe().unwrap().is_empty());

    // A device that is not wanted any more.
    assert!(ebpf.set_devices(&device_list(&[(702, "veth-b")])).is_clean());
    assert_eq!(program_ids(&world).keys().filter(|name| name.starts_with("tcx")).count(), 2);
    // A device that is not there is no failure: it is about to be reported gone.
    assert!(ebpf.set_devices(&device_list(&[(702, "veth-b"), (9999, "ghost")])).is_clean());
}

#[test]
fn half_pinned_states_are_completed() {
    let Some(world) = World::new("half") else { return };
    let (state, devices) = (state(2), devices());
    // Dies after loading: programs and maps pinned, nothing attached, `meta` empty.
    drop(world.open());
    start(&mut world.open(), &state, &devices);
    for victim in ["v1/programs/connect4", "v1/links/tcx-701-ingress", "v1/links/sendmsg6", "v1/maps/reasons"] {
        fs::remove_file(world.options.bpffs.join(victim)).unwrap();
        let mut ebpf = world.open();
        start(&mut ebpf, &state, &devices);
        assert_eq!(ebpf.hooks().len(), 12, "{victim}");
        assert!(world.options.bpffs.join(victim).exists(), "{victim}");
    }
    // Dies between pinning a link and giving the pin its name: that link is attached, and must not stay beside another.
    let links = world.options.bpffs.join("v1/links");
    for name in ["connect6", "tcx-702-egress"] {
        fs::rename(links.join(name), links.join(format!("{name}-new"))).unwrap();
    }
    start(&mut world.open(), &state, &devices);
    assert_eq!(link_ids(&world).len(), 12, "{:?}", link_ids(&world));
    let attached = Command::new("bpftool").args(["net", "show", "dev", "veth-b"]).output();
    if let Ok(attached) = attached {
        let attached = String::from_utf8_lossy(&attached.stdout).into_owned();
        assert_eq!(attached.matches("tcx/egress").count(), 1, "{attached}");
    }
    assert_holds(&world.pins(), &state);
}

#[test]
fn clsact_serves_where_tcx_is_missing() {
    let Some(mut world) = World::new("clsact") else { return };
    world.options.tc = Tc::Clsact;
    let (state, devices) = (state(2), devices());
    let mut ebpf = world.open();
    let program = world.options.bpffs.join("v1/programs/tc_ingress_ether");
    sh(&format!(
        "tc qdisc add dev veth-a clsact && tc filter add dev veth-a ingress prio 7 bpf da pinned {}",
        program.display()
    ));
    start(&mut ebpf, &state, &devices);
    assert_eq!(ebpf.hooks().iter().filter(|h| h.kind.starts_with("clsact/")).count(), 4);
    let shown = sh("tc filter show dev veth-a ingress; tc filter show dev veth-b egress");
    assert!(shown.contains("tc_ingress_ether") && shown.contains("tc_egress_ether"), "{shown}");
    drop(ebpf);
    let mut ebpf = world.open();
    assert_eq!(start(&mut ebpf, &state, &devices), 0);
    sh("tc filter del dev veth-b egress prio 80");
    assert_eq!(ebpf.observe().unwrap().hooks, ["clsact/egress veth-b"]);
    ebpf.activate().unwrap();
    assert!(ebpf.observe().unwrap().is_empty());
    assert!(ebpf.set_devices(&device_list(&[(701, "veth-a")])).is_clean());
    assert!(!sh("tc filter show dev veth-b egress").contains("tc_egress"));
    ebpf.teardown().unwrap();
    let shown = sh("tc filter show dev veth-a ingress");
    assert!(shown.contains("pref 7 ") && !shown.contains("pref 80 "), "a foreign filter stays, ours goes: {shown}");
}

#[test]
fn a_full_map_fails_one_frontend_and_leaves_the_others() {
    let Some(mut world) = World::new("full") else { return };
    world.options.sizes.frontends = 4;
    world.options.sizes.slots = 16;
    let mut ebpf = world.open();
    let mut small = state(2);
    assert!(ebpf.resync(&small).is_clean());
    let report = ebpf.resync(&state(3));
    assert_eq!(report.failed.len() + report.failed_guards.len(), 2, "{report:?}");
    let Some(Failure::Retry(why)) = report.failed.get(&frontend(3, false)) else { panic!("{report:?}") };
    assert!(why.contains("frontends_v4 is full (4 entries): raise --map-frontends"), "{why}");
    // All of the first two hold; the third stands over IPv6, where there was room.
    small.frontends.insert(frontend(3, true), spec(3, true, 1..4));
    assert_holds(&world.pins(), &small);
    let full = world.pins().fill().unwrap().into_iter().find(|f| f.map == "frontends_v4").unwrap();
    assert_eq!((full.entries, full.capacity, full.option), (4, 4, "--map-frontends"));
    // More backends than there are slots.
    let mut large = small.clone();
    large.frontends.insert(frontend(1, true), spec(1, true, 1..40));
    let report = ebpf.resync(&large);
    let Some(Failure::Retry(why)) = report.failed.get(&frontend(1, true)) else { panic!("{report:?}") };
    assert!(why.contains("slots_v6") && why.contains("--map-slots"), "{why}");
    assert_holds(&world.pins(), &small);
}

#[test]
fn maps_change_their_size_and_keep_what_is_in_them() {
    let Some(mut world) = World::new("resize") else { return };
    let (state, devices) = (state(10), devices());
    start(&mut world.open(), &state, &devices);
    let links = link_ids(&world);
    world.options.sizes = Sizes {
        frontends: 512,
        slots: 2048,
        services: 128,
        connections: 512,
        half_open: 128,
        datagrams: 512,
        affinity: 512,
        source_ranges: 128,
    };
    let mut ebpf = world.open();
    assert_eq!(start(&mut ebpf, &state, &devices), 4, "the entries came along; only the devices' links are swapped");
    assert_eq!(link_ids(&world), links);
    let fill = world.pins().fill().unwrap();
    let capacity = |map: &str| fill.iter().find(|f| f.map == map).unwrap().capacity;
    assert_eq!((capacity("frontends_v4"), capacity("slots_v6"), capacity("established_v4")), (512, 2048, 512));
    assert_holds(&world.pins(), &state);
    drop(ebpf);
    assert_eq!(start(&mut world.open(), &state, &devices), 0, "and the next restart is an ordinary one");
    world.options.sizes.frontends = 8;
    let refused = Ebpf::open(&world.options).unwrap_err().to_string();
    assert!(refused.contains("--map-frontends 8") && refused.contains("20 entries"), "{refused}");
}

/// Ids of the pinned programs by name.
fn pinned_program_ids(world: &World) -> BTreeMap<String, u32> {
    fs::read_dir(world.options.bpffs.join("v1/programs"))
        .unwrap()
        .map(|entry| {
            let path = entry.unwrap().path();
            let info = aya::programs::ProgramInfo::from_pin(&path).unwrap();
            (path.file_name().unwrap().to_str().unwrap().to_owned(), info.id())
        })
        .collect()
}

/// Every link runs a pinned program, each of these uses the pinned maps, and no map waits.
fn assert_whole(world: &World) {
    let pins = world.options.bpffs.join("v1");
    let pinned = pinned_program_ids(world);
    for (hook, id) in program_ids(world) {
        assert!(pinned.values().any(|pinned| *pinned == id), "{hook} runs another program than the pinned");
    }
    let names: Vec<_> =
        fs::read_dir(pins.join("maps")).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    assert!(names.iter().all(|name| !name.ends_with("-resized")), "{names:?}");
    for (program, maps) in [
        ("connect4", &["frontends_v4", "slots_v4", "peers_v4", "service_counters"][..]),
        ("tc_ingress_ether", &["frontends_v4", "frontends_v6", "slots_v6", "established_v4", "devices", "reasons"]),
    ] {
        let info = aya::programs::ProgramInfo::from_pin(pins.join("programs").join(program)).unwrap();
        let used = info.map_ids().unwrap().unwrap();
        for map in maps {
            let id = aya::maps::MapInfo::from_pin(pins.join("maps").join(map)).unwrap().id();
            assert!(used.contains(&id), "{program} uses another {map} than the pinned");
        }
    }
}

#[test]
fn a_start_that_came_to_nothing_leaves_no_programs_to_the_next() {
    let Some(world) = World::new("rollback") else { return };
    let (state, devices) = (state(2), devices());
    start(&mut world.open(), &state, &devices);
    assert_whole(&world);
    let mut others = [(); 2].map(|()| world.options.clone());
    others[0].socket_lb = SocketLb::Node;
    others[1].sizes.connections = 512;
    for other in &others {
        // Dies before it attached anything, or with some links moved; devices are unknown to it.
        for attached in [false, true] {
            let links = link_ids(&world);
            let mut ebpf = Ebpf::open(other).unwrap();
            let theirs = pinned_program_ids(&world);
            if attached {
                assert!(ebpf.resync(&state).is_clean());
                ebpf.activate().unwrap();
                assert_eq!(program_ids(&world)["connect4"], theirs["connect4"]);
            }
            drop(ebpf);
            start(&mut world.open(), &state, &devices);
            let ours = pinned_program_ids(&world);
            assert!(ours.iter().all(|(name, id)| theirs[name] != *id), "adopted what another start had loaded");
            assert_eq!(link_ids(&world), links);
            assert_whole(&world);
            assert_holds(&world.pins(), &state);
            // And that is settled.
            assert_eq!(start(&mut world.open(), &state, &devices), 0);
            assert_eq!(pinned_program_ids(&world), ours);
        }
    }
}

#[test]
fn a_map_that_lost_its_pin_is_not_left_to_the_old_programs() {
    let Some(world) = World::new("lostmap") else { return };
    let (state, devices) = (state(2), devices());
    start(&mut world.open(), &state, &devices);
    let maps = world.options.bpffs.join("v1/maps");
    for map in ["frontends_v4", "established_v4", "devices"] {
        let programs = pinned_program_ids(&world);
        // What a process leaves that made the map anew and died before it loaded a program on it.
        fs::rename(maps.join(map), maps.join("aside")).unwrap();
        let bpffs = PathBuf::from(format!("{}-donor", world.options.bpffs.display()));
        let donor = Options { bpffs, ..world.options.clone() };
        drop(Ebpf::open(&donor).unwrap());
        let fresh = aya::maps::MapData::from_pin(donor.bpffs.join("v1/maps").join(map)).unwrap();
        fresh.pin(maps.join(map)).unwrap();
        fs::remove_file(maps.join("aside")).unwrap();
        Ebpf::remove(&donor.bpffs).unwrap();
        start(&mut world.open(), &state, &devices);
        assert!(pinned_program_ids(&world).iter().all(|(name, id)| programs[name] != *id), "{map}");
        assert_whole(&world);
        assert_holds(&world.pins(), &state);
    }
}

#[test]
fn what_programs_write_while_maps_change_their_size_comes_along() {
    use aya::maps::{HashMap, Map, MapData};
    use proxy_common::{
        Ipv4Be,
        socket::{DatagramKey, DatagramValue},
    };
    type Key = [u8; size_of::<DatagramKey<Ipv4Be>>()];
    type Value = [u8; size_of::<DatagramValue<Ipv4Be>>()];
    let Some(mut world) = World::new("meanwhile") else { return };
    let (state, devices) = (state(2), devices());
    start(&mut world.open(), &state, &devices);
    let datagrams = |world: &World| -> HashMap<MapData, Key, Value> {
        let data = MapData::from_pin(world.options.bpffs.join("v1/maps/datagrams_v4")).unwrap();
        Map::LruHashMap(data).try_into().unwrap()
    };
    let key = |n: u8| -> Key { [n; size_of::<Key>()] };
    let value = |n: u8| -> Value { [n; size_of::<Value>()] };
    let mut old = datagrams(&world);
    old.insert(key(1), value(1), 0).unwrap();
    world.options.sizes.datagrams = 512;
    let mut ebpf = world.open();
    assert!(ebpf.resync(&state).is_clean());
    // The old programs go on until links move, and some do until the last has.
    old.insert(key(1), value(9), 0).unwrap();
    old.insert(key(2), value(2), 0).unwrap();
    ebpf.activate().unwrap();
    {
        let data = MapData::from_pin(world.options.bpffs.join("v1/maps/datagrams_v4-resized")).unwrap();
        let mut new: HashMap<MapData, Key, Value> = Map::LruHashMap(data).try_into().unwrap();
        assert_eq!(new.get(&key(2), 0).unwrap(), value(2), "there when the first link has moved");
        new.insert(key(2), value(7), 0).unwrap();
    }
    old.insert(key(3), value(3), 0).unwrap();
    assert!(ebpf.set_devices(&devices).is_clean());
    let new = datagrams(&world);
    let got = [1, 2, 3].map(|n| new.get(&key(n), 0).unwrap());
    assert_eq!(got, [value(9), value(7), value(3)], "the newer of each");
    assert_whole(&world);
}

/// One map of every program in force, by hook: its id, and the map.
fn map_in_force(world: &World, name: &str) -> BTreeMap<u32, aya::maps::MapData> {
    let links: Vec<u32> = program_ids(world).into_values().collect();
    let used = aya::programs::loaded_programs().flatten().filter(|program| links.contains(&program.id()));
    let ids = used.flat_map(|program| program.map_ids().unwrap().unwrap());
    ids.map(|id| (id, aya::maps::MapData::from_id(id).unwrap()))
        .filter(|(_, map)| map.info().unwrap().name_as_str() == Some(name))
        .collect()
}

/// Death at every step of a change of sizes: whatever programs a link runs then, their maps hold everything; and the next start,
/// whichever sizes it wants, ends it and has what either kind of programs wrote.
#[test]
fn dying_anywhere_while_maps_change_their_size_costs_nothing() {
    use aya::maps::{HashMap, Map, MapData};
    use proxy_common::{
        Ipv4Be,
        frontend::{FrontendKey, FrontendValue},
        socket::{DatagramKey, DatagramValue},
    };
    type Key = [u8; size_of::<DatagramKey<Ipv4Be>>()];
    type Value = [u8; size_of::<DatagramValue<Ipv4Be>>()];
    let Some(mut world) = World::new("crash") else { return };
    let (state, devices) = (state(2), devices());
    start(&mut world.open(), &state, &devices);
    let (small, large) =
        (world.options.sizes, Sizes { slots: 2048, datagrams: 512, frontends: 512, ..world.options.sizes });
    let frontends = world.pins().frontends().unwrap().iter().filter(|row| row.addr.is_ipv4()).count();
    let datagrams = |data| -> HashMap<MapData, Key, Value> { Map::LruHashMap(data).try_into().unwrap() };
    let key = |n: u8| -> Key { [n; size_of::<Key>()] };
    let (mut mixed, mut complete) = (0, false);
    for step in 0..100 {
        let before = world.options.sizes;
        let pinned = MapData::from_pin(world.options.bpffs.join("v1/maps/datagrams_v4")).unwrap();
        datagrams(pinned).insert(key(1), [1; size_of::<Value>()], 0).unwrap();
        world.options.sizes = if before == small { large } else { small };
        let try_it = || -> Option<()> {
            let mut ebpf = Ebpf::open_dying_after(&world.options, step).ok()?;
            assert!(ebpf.resync(&state).is_clean());
            // Either kind of links may be first.
            if step % 2 == 0 {
                ebpf.activate().ok()?;
            }
            ebpf.set_devices(&devices).is_clean().then_some(())?;
            ebpf.activate().ok()
        };
        complete = try_it().is_some();

        let mut written = vec![1];
        for (number, map) in (2..).zip(map_in_force(&world, "datagrams_v4").into_values()) {
            let mut map = datagrams(map);
            assert_eq!(map.get(&key(1), 0).unwrap(), [1; size_of::<Value>()], "step {step}");
            map.insert(key(number), [number; size_of::<Value>()], 0).unwrap();
            written.push(number);
        }
        let in_force = map_in_force(&world, "frontends_v4");
        mixed += usize::from(in_force.len() == 2);
        for map in in_force.into_values() {
            let map: HashMap<MapData, [u8; size_of::<FrontendKey<Ipv4Be>>()], [u8; size_of::<FrontendValue>()]> =
                Map::HashMap(map).try_into().unwrap();
            assert_eq!(map.keys().count(), frontends, "step {step}");
        }

        if step % 3 == 0 {
            world.options.sizes = before;
        }
        start(&mut world.open(), &state, &devices);
        assert_whole(&world);
        assert_holds(&world.pins(), &state);
        assert!(!world.options.bpffs.join("v1/moving").exists());
        let mut after = datagrams(MapData::from_pin(world.options.bpffs.join("v1/maps/datagrams_v4")).unwrap());
        for number in written {
            assert_eq!(after.get(&key(number), 0).unwrap(), [number; size_of::<Value>()], "step {step}");
            after.remove(&key(number)).unwrap();
        }
        assert_eq!(start(&mut world.open(), &state, &devices), 0, "settled");
        if complete {
            break;
        }
    }
    assert!(complete && mixed > 1, "{mixed} deaths with links of both kinds");
}

#[test]
fn a_link_that_could_not_be_moved_keeps_the_start_unsettled() {
    let Some(mut world) = World::new("unmoved") else { return };
    let (state, devices) = (state(1), devices());
    start(&mut world.open(), &state, &devices);
    world.options.sizes.connections = 512;
    world.options.sizes.datagrams = 512;
    let old = world.options.bpffs.join("v1/maps/datagrams_v4");
    let datagrams = |path: &Path| -> aya::maps::HashMap<_, [u8; DATAGRAM_KEY], [u8; DATAGRAM_VALUE]> {
        aya::maps::Map::LruHashMap(aya::maps::MapData::from_pin(path).unwrap()).try_into().unwrap()
    };
    const DATAGRAM_KEY: usize = size_of::<proxy_common::socket::DatagramKey<proxy_common::Ipv4Be>>();
    const DATAGRAM_VALUE: usize = size_of::<proxy_common::socket::DatagramValue<proxy_common::Ipv4Be>>();
    datagrams(&old).insert([1; DATAGRAM_KEY], [1; DATAGRAM_VALUE], 0).unwrap();
    let mut ebpf = world.open();
    assert!(ebpf.resync(&state).is_clean());
    ebpf.activate().unwrap();
    // What stands in place of the pin is no link.
    let pin = world.options.bpffs.join("v1/links/tcx-702-egress");
    let aside = world.options.bpffs.join("v1/aside");
    fs::rename(&pin, &aside).unwrap();
    fs::create_dir(&pin).unwrap();
    let report = ebpf.set_devices(&devices);
    assert_eq!(report.failed_devices.len(), 1, "{report:?}");
    let waiting = world.options.bpffs.join("v1/maps/established_v4-resized");
    assert!(waiting.exists(), "the old map stays in place for the link that still uses it");
    // Its packets meet the frontends as they were: nothing that is asked for now is in force everywhere.
    assert_eq!(report.failed.len(), state.frontends.len(), "{report:?}");
    let Some(Failure::Retry(why)) = report.failed.get(&frontend(1, false)) else { panic!("{report:?}") };
    assert!(why.contains("tcx-702-egress"), "{why}");
    assert_eq!(ebpf.resync(&state).failed.len(), state.frontends.len());
    // What was deleted since does not come back with every change of devices.
    let mut new = datagrams(&world.options.bpffs.join("v1/maps/datagrams_v4-resized"));
    new.remove(&[1; DATAGRAM_KEY]).unwrap();
    assert_eq!(ebpf.set_devices(&devices).failed_devices.len(), 1);
    assert!(new.get(&[1; DATAGRAM_KEY], 0).is_err());
    fs::remove_dir(&pin).unwrap();
    fs::rename(&aside, &pin).unwrap();
    assert!(ebpf.set_devices(&devices).is_clean());
    assert!(ebpf.resync(&state).is_clean());
    assert!(!waiting.exists());
    assert_whole(&world);
}

/// Whoever gets the id of a Service that was removed while maps change their size starts to count from nothing.
#[test]
fn counters_of_a_removed_service_stay_behind_a_change_of_sizes() {
    let Some(mut world) = World::new("counters") else { return };
    let devices = devices();
    start(&mut world.open(), &state(3), &devices);
    let pin = |world: &World| {
        let data = aya::maps::MapData::from_pin(world.options.bpffs.join("v1/maps/service_counters")).unwrap();
        let counters: aya::maps::PerCpuHashMap<
            _,
            u32,
            [u64; size_of::<proxy_common::counters::ServiceCounters>() / 8],
        > = aya::maps::Map::PerCpuHashMap(data).try_into().unwrap();
        counters
    };
    let names = world.pins().names().unwrap();
    let mut counters = pin(&world);
    let cpus = aya::util::nr_cpus().unwrap();
    for id in names.keys() {
        let one = vec![[1; size_of::<proxy_common::counters::ServiceCounters>() / 8]; cpus];
        counters.insert(id, aya::maps::PerCpuValues::try_from(one).unwrap(), 0).unwrap();
    }
    world.options.sizes.services = 128;
    start(&mut world.open(), &state(1), &devices);
    let left = world.pins().names().unwrap();
    assert!(left.len() < names.len());
    let counted: BTreeSet<u32> = pin(&world).keys().map(Result::unwrap).collect();
    assert_eq!(counted, left.into_keys().collect());
}

/// Contract A102; and what the readers show of it.
#[test]
fn clients_of_session_affinity_outlive_the_agent_and_not_their_service() {
    use proxy_agent::dataplane::ebpf::read::AffinityClient;
    use proxy_common::{
        Address, Be16, Ipv4Be, Ipv6Be,
        affinity::{AffinityKey, AffinityValue},
    };

    let Some(mut world) = World::new("affinity") else { return };
    let sticky = |count: u8| {
        let mut state = state(count);
        for spec in state.frontends.values_mut() {
            *spec = Arc::new(FrontendSpec { affinity_secs: Some(1000), ..(**spec).clone() });
        }
        state
    };
    let devices = devices();
    start(&mut world.open(), &sticky(3), &devices);
    let ids: BTreeMap<String, u32> = world.pins().names().unwrap().into_iter().map(|(id, name)| (name, id)).collect();
    let id = |n: u8| ids[&format!("default/web{n}:http")];
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic).tv_sec as u32;
    let pinned = |map: &str| world.options.bpffs.join("v1/maps").join(map);
    let mut v4: aya::maps::HashMap<_, AffinityKey, AffinityValue<Ipv4Be>> =
        aya::maps::Map::LruHashMap(aya::maps::MapData::from_pin(pinned("affinity_v4")).unwrap()).try_into().unwrap();
    let mut v6: aya::maps::HashMap<_, AffinityKey, AffinityValue<Ipv6Be>> =
        aya::maps::Map::LruHashMap(aya::maps::MapData::from_pin(pinned("affinity_v6")).unwrap()).try_into().unwrap();
    let backend = |n: u8| spec(n, false, 1..4).all[0];
    let entry = |n: u8, age: u32| AffinityValue {
        addr: Ipv4Be::from_ip(backend(n).addr).unwrap(),
        port: Be16::from_host(8080),
        seen: now - age,
        ..Default::default()
    };
    let client = |n: u8| Ipv4Be::from_octets([192, 0, 2, n]);
    for (key, value) in [
        (AffinityKey::of_address(client(1), id(1)), entry(1, 500)),
        (AffinityKey::of_netns(4711, id(2)), entry(2, 10)),
        (AffinityKey::of_address(client(3), id(3)), entry(3, 10)),
        // Its time is over.
        (AffinityKey::of_address(client(4), id(1)), entry(1, 2000)),
        // Nobody's.
        (AffinityKey::of_address(client(5), 200), entry(1, 10)),
    ] {
        v4.insert(key, value.sealed(&key), 0).unwrap();
    }
    let key = AffinityKey::of_address(Ipv6Be([1, 2, 3, 4]), id(1));
    let addr = Ipv6Be::from_ip(spec(1, true, 1..4).all[1].addr).unwrap();
    v6.insert(
        key,
        AffinityValue { addr, port: Be16::from_host(8080), seen: now, ..Default::default() }.sealed(&key),
        0,
    )
    .unwrap();

    let held = |world: &World| -> BTreeSet<(String, String, String)> {
        let rows = world.pins().affinities().unwrap();
        let of = |client: AffinityClient| match client {
            AffinityClient::Address(address) => address.to_string(),
            AffinityClient::Netns(cookie) => format!("netns {cookie}"),
        };
        rows.into_iter().map(|row| (row.service, of(row.client), row.backend.to_string())).collect()
    };
    let rows = |of: &[(&str, &str, &str)]| -> BTreeSet<(String, String, String)> {
        of.iter().map(|(a, b, c)| ((*a).to_owned(), (*b).to_owned(), (*c).to_owned())).collect()
    };
    assert_eq!(held(&world).len(), 6);
    let age = world.pins().affinities().unwrap().iter().find(|row| row.service_id == id(3)).map(|row| row.age_secs);
    assert!(age.is_some_and(|age| (10..60).contains(&age)), "{age:?}");

    // A restart forgets nobody but those whose time is over and those of nobody.
    let mut ebpf = world.open();
    start(&mut ebpf, &sticky(3), &devices);
    ebpf.tick();
    let [first, second, third] = [
        ("default/web1:http", "192.0.2.1", "10.1.0.1:8080"),
        ("default/web2:http", "netns 4711", "10.2.0.1:8080"),
        ("default/web3:http", "192.0.2.3", "10.3.0.1:8080"),
    ];
    let v6_row = held(&world).into_iter().find(|row| row.1.contains(':')).unwrap();
    assert_eq!((v6_row.0.as_str(), v6_row.2.as_str()), ("default/web1:http", "[fd00:1::2]:8080"));
    let v4_rows =
        |world: &World| -> BTreeSet<_> { held(world).into_iter().filter(|row| !row.1.contains(':')).collect() };
    assert_eq!(v4_rows(&world), rows(&[first, second, third]));

    // Nor does a change of the maps' size.
    drop(ebpf);
    world.options.sizes.affinity = 512;
    start(&mut world.open(), &sticky(3), &devices);
    assert_eq!(v4_rows(&world), rows(&[first, second, third]));

    // A Service that goes takes its clients along, at the latest with the next start.
    start(&mut world.open(), &sticky(2), &devices);
    start(&mut world.open(), &sticky(2), &devices);
    assert_eq!(v4_rows(&world), rows(&[first, second]));
}

#[test]
fn teardown_leaves_nothing() {
    let Some(world) = World::new("teardown") else { return };
    let mut ebpf = world.open();
    start(&mut ebpf, &state(2), &devices());
    ebpf.teardown().unwrap();
    assert!(!world.options.bpffs.exists());
    drop(ebpf);
    assert!(Pins::open(&world.options.bpffs).unwrap_err().to_string().contains("holds no pins"));
    Ebpf::remove(&world.options.bpffs).unwrap();
}

#[test]
fn a_map_of_another_layout_is_refused() {
    let Some(world) = World::new("layout") else { return };
    drop(world.open());
    let maps = world.options.bpffs.join("v1/maps");
    fs::remove_file(maps.join("frontends_v4")).unwrap();
    fs::rename(maps.join("frontends_v6"), maps.join("frontends_v4")).unwrap();
    let refused = Ebpf::open(&world.options).unwrap_err().to_string();
    assert!(refused.contains("frontends_v4") && refused.contains("another layout"), "{refused}");
}

#[test]
fn every_check_names_its_remedy() {
    let Some(world) = World::new("probe") else { return };
    let checks = probe(&world.options);
    for name in ["programs", "CAP_BPF", "kernel", "cgroup v2", "load", "tc", "socket destroy", "forwarding"] {
        let check = checks.iter().find(|c| c.name == name).unwrap_or_else(|| panic!("no check {name}: {checks:#?}"));
        assert!(check.ok || !check.remedy.is_empty(), "{check:?}");
        assert!(check.ok || check.optional, "{check:?}");
    }
    let mut options = world.options.clone();
    options.cgroup_root = Some("/proc".into());
    options.bpffs = "/tmp/pins".into();
    let failed: Vec<_> = probe(&options).into_iter().filter(|c| !c.ok && !c.optional).map(|c| c.name).collect();
    assert_eq!(failed, ["bpffs", "cgroup v2"]);
}

#[test]
fn links_of_an_earlier_run_stay_until_the_devices_are_known() {
    let Some(mut world) = World::new("unknown") else { return };
    let (state, devices) = (state(1), devices());
    start(&mut world.open(), &state, &devices);
    let links = link_ids(&world);
    world.options.masquerade_ports = (3000, 4000);
    let mut ebpf = world.open();
    assert!(ebpf.resync(&state).is_clean());
    ebpf.activate().unwrap();
    assert_eq!(link_ids(&world), links);
    // Dies here: the next start knows that not all links were moved.
    drop(ebpf);
    let mut ebpf = world.open();
    start(&mut ebpf, &state, &devices);
    assert_eq!(link_ids(&world), links);
    drop(ebpf);
    let programs = program_ids(&world);
    start(&mut world.open(), &state, &devices);
    assert_eq!(program_ids(&world), programs);
}

#[test]
fn a_change_from_filters_to_links_leaves_no_filter() {
    let Some(mut world) = World::new("mode") else { return };
    let (state, devices) = (state(1), devices());
    world.options.tc = Tc::Clsact;
    start(&mut world.open(), &state, &devices);
    world.options.tc = Tc::Auto;
    start(&mut world.open(), &state, &devices);
    assert!(!sh("tc filter show dev veth-a ingress").contains("pref 80 "));
    world.options.tc = Tc::Clsact;
    start(&mut world.open(), &state, &devices);
    assert!(sh("tc filter show dev veth-a ingress").contains("pref 80 "));
    assert_eq!(program_ids(&world).len(), 8);
}
