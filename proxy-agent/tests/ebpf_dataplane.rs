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
        Dataplane, DetectLocal, Failure,
        choose::Candidate,
        ebpf::{Ebpf, Options, Sizes, SocketLb, Tc, Xdp, probe::probe, read::Pins},
    },
    desired::{
        Action, Algorithm, Backend, DesiredState, Device, DeviceRole, Devices, Frontend, FrontendKind, FrontendSpec,
        Verdict, Verdicts,
    },
    model::{Protocol, ServiceKey, ServicePortName},
};

#[path = "ebpf_dataplane/others.rs"]
mod others;
#[path = "ebpf_dataplane/sizes.rs"]
mod sizes;
#[path = "ebpf_dataplane/starts.rs"]
mod starts;
#[path = "ebpf_dataplane/torn.rs"]
mod torn;

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
        pods_per_packet: false,
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
            let device = Device { source4: Some([192, 168, 0, 1].into()), ..Device::new(name, DeviceRole::Pod) };
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
    // Nor has anybody taken anything off it, or off one that goes before anybody says so.
    sh("ip link del veth-b");
    assert_eq!(ebpf.observe().unwrap().hooks, Vec::<String>::new());
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
    let failed: Vec<_> = probe(&options).into_iter().filter(|c| !c.ok && !c.optional).collect();
    let failed: Vec<_> =
        failed.iter().map(|check| (check.name, check.detail.as_str(), check.remedy.as_str())).collect();
    let bpffs =
        ("/tmp/pins is not on a bpf filesystem", "mount one (`mount -t bpf bpf DIR`) or give --bpffs a path on one");
    let cgroup = (
        "/proc is no cgroup v2 directory",
        "mount one (`mount -t cgroup2 none /sys/fs/cgroup`), name it with --cgroup-root, or use --socket-lb off",
    );
    assert_eq!(failed, [("bpffs", bpffs.0, bpffs.1), ("cgroup v2", cgroup.0, cgroup.1)]);
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

/// Devices that lead outward, with the Ethernet addresses that they have.
fn outward(devices: &[(u32, &str)]) -> Devices {
    let mac = |name: &str| {
        let text = sh(&format!("ip -o link show {name} | sed 's/.*link.ether \\([^ ]*\\).*/\\1/'"));
        let bytes: Vec<u8> = text.trim().split(':').map(|b| u8::from_str_radix(b, 16).unwrap()).collect();
        bytes.try_into().unwrap()
    };
    device_list(devices)
        .into_iter()
        .map(|(index, device)| {
            (index, Device { role: DeviceRole::Outward, mac: Some(mac(&device.name)), veth: true, ..device })
        })
        .collect()
}

fn xdp_hooks(ebpf: &Ebpf) -> Vec<String> {
    let hooks = ebpf.hooks().into_iter().filter(|hook| hook.kind.starts_with("xdp/"));
    hooks.map(|hook| format!("{} {}", hook.kind, hook.target)).collect()
}

/// As the programs find it: interface index, and whether it may be sent to.
fn xdp_entries(world: &World) -> BTreeMap<u32, bool> {
    use aya::maps::{HashMap, Map, MapData};
    let data = MapData::from_pin(world.options.bpffs.join("v1/maps/xdp_devices")).unwrap();
    let map: HashMap<_, u32, proxy_common::device::XdpDevice> = HashMap::try_from(Map::HashMap(data)).unwrap();
    map.iter().map(Result::unwrap).map(|(index, value)| (index, value.flags != 0)).collect()
}

#[test]
fn xdp_is_attached_to_outward_devices_and_moves_with_the_option() {
    let Some(mut world) = World::new("xdp") else { return };
    devices();
    let state = state(2);
    let mut devices = outward(&[(701, "veth-a"), (702, "veth-b")]);
    sh("ip link add pod index 703 type veth peer name pod-peer");
    devices.extend(device_list(&[(703, "pod")]));
    world.options.xdp = Xdp::Native;
    let mut ebpf = world.open();
    start(&mut ebpf, &state, &devices);
    assert_eq!(xdp_hooks(&ebpf), ["xdp/native veth-a", "xdp/native veth-b"]);
    assert_eq!(ebpf.set_devices(&devices).without_xdp, BTreeMap::new());
    // What is sent to a veth needs another end that polls.
    assert_eq!(xdp_entries(&world), BTreeMap::from([(701, false), (702, false)]));
    sh("ip link set veth-a up && ip link set peer-a up && ethtool -K peer-a gro on");
    assert_eq!(ebpf.observe().unwrap().hooks, ["xdp_devices"]);
    ebpf.set_devices(&devices);
    assert_eq!(xdp_entries(&world), BTreeMap::from([(701, true), (702, false)]));
    drop(ebpf);

    let links = link_ids(&world);
    let mut ebpf = world.open();
    assert_eq!(start(&mut ebpf, &state, &devices), 0, "nothing changed, nothing written");
    assert_eq!(link_ids(&world), links);
    let pinned = world.pins().hooks().unwrap();
    assert_eq!(pinned.iter().filter(|hook| hook.kind == "xdp/native").count(), 2);

    // A link is lost, and is put back.
    fs::remove_file(world.options.bpffs.join("v1/links/xdp-702-native")).unwrap();
    assert_eq!(ebpf.observe().unwrap().hooks, ["xdp/native veth-b"]);
    assert!(ebpf.set_devices(&devices).without_xdp.is_empty());
    assert!(ebpf.observe().unwrap().is_empty());
    // A device goes, and what XDP knows of it.
    ebpf.set_devices(&outward(&[(701, "veth-a")]));
    assert_eq!((xdp_hooks(&ebpf).len(), xdp_entries(&world).len()), (1, 1));
    drop(ebpf);

    world.options.xdp = Xdp::Generic;
    let mut ebpf = world.open();
    start(&mut ebpf, &state, &devices);
    assert_eq!(xdp_hooks(&ebpf), ["xdp/generic veth-a", "xdp/generic veth-b"]);
    assert!(!world.options.bpffs.join("v1/links/xdp-701-native").exists());
    drop(ebpf);

    world.options.xdp = Xdp::Off;
    let mut ebpf = world.open();
    start(&mut ebpf, &state, &devices);
    assert!(xdp_hooks(&ebpf).is_empty() && xdp_entries(&world).is_empty());
    assert!(!world.options.bpffs.join("v1/programs/xdp_ingress").exists());
    assert!(!sh("ip -o link").contains("xdp"), "nothing of it is left on a device");
}

/// What XDP should not do any more it does not until links have moved: that may take time, or fail.
#[test]
fn xdp_leaves_a_device_before_links_move() {
    let Some(mut world) = World::new("xdpbar") else { return };
    devices();
    let mut devices = outward(&[(701, "veth-a"), (702, "veth-b")]);
    world.options.xdp = Xdp::Native;
    start(&mut world.open(), &state(1), &devices);
    assert_eq!(xdp_entries(&world).len(), 2);
    world.options.sizes.connections *= 2;
    devices.get_mut(&702).unwrap().without_xdp = Some("there are IPsec policies");
    let mut ebpf = world.open();
    assert!(ebpf.resync(&state(1)).is_clean());
    // What stands in place of the map of the new size is none.
    let pin = world.options.bpffs.join("v1/maps/established_v4-resized");
    let aside = world.options.bpffs.join("v1/aside");
    fs::rename(&pin, &aside).unwrap();
    fs::create_dir(&pin).unwrap();
    let old = link_ids(&world);
    let report = ebpf.set_devices(&devices);
    assert_eq!(report.failed_devices.len(), 2, "{report:?}");
    assert_eq!(link_ids(&world), old);
    assert_eq!(xdp_entries(&world).into_keys().collect::<Vec<_>>(), [701]);
    assert_eq!(report.without_xdp.keys().collect::<Vec<_>>(), ["veth-b"]);
    fs::remove_dir(&pin).unwrap();
    fs::rename(&aside, &pin).unwrap();
    let report = ebpf.set_devices(&devices);
    assert!(report.is_clean(), "{report:?}");
    assert_eq!(xdp_hooks(&ebpf), ["xdp/native veth-a"]);
    assert_eq!(xdp_entries(&world).into_keys().collect::<Vec<_>>(), [701]);
}

/// tc serves all the same.
#[test]
fn where_xdp_is_not_to_be_had_it_is_said_why() {
    let Some(mut world) = World::new("noxdp") else { return };
    devices();
    sh(
        "ip link add br0 index 704 type bridge; ip link add big index 705 mtu 9000 type veth peer name big-peer mtu 9000",
    );
    let mut devices = outward(&[(701, "veth-a"), (702, "veth-b"), (704, "br0"), (705, "big")]);
    devices.get_mut(&702).unwrap().without_xdp = Some("VLANs are on it");
    // Somebody else's program.
    let mut other = {
        let object = fs::read(env::var_os("PROXY_EBPF_OBJECT").unwrap()).unwrap();
        aya::EbpfLoader::new().load(&proxy_agent::dataplane::ebpf::linkage::suited(&object)).unwrap()
    };
    let program: &mut aya::programs::Xdp = other.program_mut("xdp_ingress").unwrap().try_into().unwrap();
    program.load().unwrap();
    let foreign = program.info().unwrap().id();
    program.attach_to_if_index(701, aya::programs::xdp::XdpMode::Driver).unwrap();
    for (option, retried) in [(Xdp::Auto, false), (Xdp::Native, true)] {
        world.options.xdp = option;
        let mut ebpf = world.open();
        ebpf.resync(&state(1));
        let report = ebpf.set_devices(&devices);
        assert!(report.is_clean(), "{report:?}");
        ebpf.activate().unwrap();
        let expected = [
            ("big", "MTU is too large", retried),
            ("br0", "no XDP", retried),
            ("veth-a", "another XDP program", retried),
            ("veth-b", "VLANs are on it", false),
        ];
        assert_eq!(report.without_xdp.len(), expected.len(), "{report:?}");
        for ((device, why), (name, text, again)) in report.without_xdp.iter().zip(expected) {
            assert_eq!((device.as_str(), matches!(why, Failure::Retry(_))), (name, again), "{why}");
            assert!(why.to_string().contains(text), "{device}: {why}");
        }
        assert!(xdp_hooks(&ebpf).is_empty());
        assert_eq!(ebpf.hooks().iter().filter(|hook| hook.kind.starts_with("tcx/")).count(), 8);
    }
    assert!(sh("ip -d link show veth-a").contains(&format!("prog/xdp id {foreign} ")), "the other one stays");
    // The loop sets the same devices again with every resync, as long as one is without.
    world.options.xdp = Xdp::Auto;
    let mut ebpf = world.open();
    ebpf.resync(&state(1));
    assert_eq!(ebpf.set_devices(&devices).without_xdp.len(), 4);
    sh("ip link set veth-b down; ip link set big down; ip link set big mtu 1500; ip link set big-peer mtu 1500");
    drop(other);
    until("XDP on what is free", || {
        ebpf.set_devices(&devices);
        xdp_hooks(&ebpf) == ["xdp/native veth-a", "xdp/native big"]
    });
}

#[track_caller]
fn until(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..100 {
        if holds() {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    panic!("not in time: {what}");
}

/// The object, but the (first) program of that section is one that no kernel takes: it returns nothing, at once.
fn with_refused(object: &[u8], section: &str) -> &'static [u8] {
    let mut object = object.to_vec();
    let word = |at: usize, size: usize| (0..size).rev().fold(0, |word, n| word << 8 | usize::from(object[at + n]));
    // ELF64: e_shoff, e_shentsize, e_shnum, e_shstrndx; sh_name, sh_offset.
    let (table, size, count, names) = (word(0x28, 8), word(0x3a, 2), word(0x3c, 2), word(0x3e, 2));
    let header = |n: usize| table + n * size;
    let names = word(header(names) + 0x18, 8);
    let name = format!("{section}\0");
    let is_it = |n: &usize| object[names + word(header(*n), 4)..].starts_with(name.as_bytes());
    let section = word(header((0..count).find(is_it).unwrap_or_else(|| panic!("no section {section}"))) + 0x18, 8);
    object[section..section + 8].copy_from_slice(&[0x95, 0, 0, 0, 0, 0, 0, 0]);
    object.leak()
}

#[test]
fn a_kernel_that_refuses_the_xdp_program_costs_xdp_alone() {
    let Some(mut world) = World::new("refusedxdp") else { return };
    devices();
    let devices = outward(&[(701, "veth-a"), (702, "veth-b")]);
    let good = world.options.object;
    let refused = with_refused(good.unwrap(), "xdp");
    let no_xdp = |world: &World| {
        assert!(!world.options.bpffs.join("v1/programs/xdp_ingress").exists());
        until("XDP is off", || !sh("ip -o link").contains("xdp"));
    };
    for option in [Xdp::Auto, Xdp::Generic] {
        // What an earlier run left in force goes, too.
        (world.options.xdp, world.options.object) = (option, good);
        let mut ebpf = world.open();
        start(&mut ebpf, &state(1), &devices);
        assert_eq!(xdp_hooks(&ebpf).len(), 2);
        drop(ebpf);
        world.options.object = Some(refused);
        // Nor does the next start do without the others, or without asking again.
        for _ in 0..2 {
            let mut ebpf = world.open();
            start(&mut ebpf, &state(1), &devices);
            let report = ebpf.set_devices(&devices);
            assert_eq!(report.without_xdp.len(), 2, "{report:?}");
            for why in report.without_xdp.values() {
                let Failure::Unsupported(why) = why else { panic!("{why:?}") };
                assert!(why.contains("the kernel refuses the program xdp_ingress") && why.contains("insn"), "{why}");
                assert!(why.ends_with("; use a later kernel, or --xdp off"), "{why}");
                assert!(why.len() < 200 && !why.contains('\n'), "{why}");
            }
            assert!(xdp_hooks(&ebpf).is_empty() && xdp_entries(&world).is_empty());
            assert_eq!(ebpf.hooks().iter().filter(|hook| hook.kind.starts_with("tcx/")).count(), 4);
            no_xdp(&world);
        }
        let check = |world: &World| {
            let checks = proxy_agent::dataplane::ebpf::probe::probe(&world.options);
            checks.into_iter().find(|check| check.name == "XDP program").unwrap()
        };
        let refusal = check(&world);
        assert!(!refusal.ok && refusal.optional && refusal.detail.contains("insn"), "{refusal:?}");
        world.options.object = good;
        assert!(check(&world).ok);
    }
    (world.options.xdp, world.options.object) = (Xdp::Native, Some(refused));
    let error = Ebpf::open(&world.options).unwrap_err().to_string();
    assert!(error.contains("xdp_ingress") && error.contains("--xdp auto"), "{error}");
    assert!(error.len() < 250 && !error.contains('\n'), "{error}");
}

/// The verifier says why in as many lines as it looked at instructions: what is wanted of them is the last.
#[test]
fn a_kernel_that_refuses_a_program_is_said_in_a_line_with_the_remedy() {
    let Some(mut world) = World::new("refused") else { return };
    let good = world.options.object.unwrap();
    for (section, program) in [("classifier", "tc_"), ("cgroup/connect4", "connect4")] {
        world.options.object = Some(with_refused(good, section));
        let error = Ebpf::open(&world.options).unwrap_err().to_string();
        assert!(!world.options.bpffs.exists(), "it left pins: another mode would take them for what is in force");
        let checks = probe(&world.options);
        let check = checks.iter().find(|check| !check.ok && !check.optional).unwrap();
        assert_eq!(check.name, "load", "{checks:#?}");
        let candidate = Candidate::of_ebpf(&checks);
        assert!(!candidate.can_run());
        for said in [&error, &check.detail, &candidate.lack()] {
            let what = format!("the kernel refuses the program {program}");
            assert!(said.contains(&what) && said.contains("insn"), "{section}: {said}");
            assert!(said.len() < 250 && !said.contains('\n'), "{section}: {said}");
        }
        for said in [&error, &check.remedy, &candidate.remedy()] {
            assert!(said.contains("use a later kernel, or --proxy-mode nftables"), "{section}: {said}");
        }
    }
    // Nothing is left for a start with programs that are taken.
    world.options.object = Some(good);
    let mut ebpf = world.open();
    start(&mut ebpf, &state(1), &devices());
}
