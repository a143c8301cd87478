//! What the next process finds and takes up.

use super::*;

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
    assert!(took < Duration::from_secs(1), "{took:?}");
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

/// From `--detect-local-mode ClusterCIDR` to none: the old programs go by the addresses until the new ones are in force.
#[test]
fn addresses_that_tell_pods_go_after_the_programs_that_ask_for_them() {
    let Some(mut world) = World::new("cidrs") else { return };
    let (without, devices) = (state(2), devices());
    let with = DesiredState { local_cidrs: ["10.244.1.0/24".parse().unwrap()].into(), ..without.clone() };
    let present = |world: &World| {
        let map = aya::maps::MapData::from_pin(world.options.bpffs.join("v1/maps/local_cidrs_v4")).unwrap();
        let map = aya::maps::Map::LpmTrie(map);
        aya::maps::LpmTrie::<_, [u8; 4], u32>::try_from(map).unwrap().keys().count()
    };
    world.options.detect_local = DetectLocal::Address;
    start(&mut world.open(), &with, &devices);
    assert_eq!(present(&world), 1);
    world.options.detect_local = DetectLocal::Device;
    let mut ebpf = world.open();
    assert!(ebpf.resync(&without).is_clean());
    assert_eq!(present(&world), 1, "the old programs are in force still");
    assert!(ebpf.set_devices(&devices).is_clean());
    ebpf.activate().unwrap();
    assert_eq!(present(&world), 0);
    assert!(ebpf.observe().unwrap().is_empty());
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

/// Where the kernel refuses the programs of another version the former ones serve on, by whichever mode they are taken over then.
#[test]
fn a_start_that_is_refused_leaves_what_is_in_force_to_the_next() {
    let Some(mut world) = World::new("refusednext") else { return };
    let (state, devices) = (state(2), devices());
    start(&mut world.open(), &state, &devices);
    let ids = |world: &World| (program_ids(world), link_ids(world), pinned_program_ids(world));
    let before = ids(&world);
    let good = world.options.object.unwrap();
    world.options.object = Some(with_refused(good, "classifier"));
    assert!(Ebpf::open(&world.options).unwrap_err().to_string().contains("the kernel refuses the program"));
    assert_eq!(ids(&world), before);
    world.options.object = Some(good);
    assert_eq!(start(&mut world.open(), &state, &devices), 0, "nothing changed, nothing written");
    assert_eq!(ids(&world), before, "adopted");
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
            *spec = Arc::new(FrontendSpec { affinity_secs: Some(100), ..(**spec).clone() });
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
        seen: now.checked_sub(age).expect("a machine that came up minutes ago"),
        ..Default::default()
    };
    let client = |n: u8| Ipv4Be::from_octets([192, 0, 2, n]);
    for (key, value) in [
        (AffinityKey::of_address(client(1), id(1)), entry(1, 40)),
        (AffinityKey::of_netns(4711, id(2)), entry(2, 10)),
        (AffinityKey::of_address(client(3), id(3)), entry(3, 10)),
        // Its time is over.
        (AffinityKey::of_address(client(4), id(1)), entry(1, 150)),
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

/// A socket that is not connected hears the VIP's name by the programs alone: an answer that is under way is waited for, by each family.
#[test]
fn a_drain_waits_for_answers_to_unconnected_sockets() {
    use proxy_agent::dataplane::ebpf::Drain;
    use proxy_common::{
        Address, Be16, Ipv4Be, Ipv6Be,
        socket::{DatagramKey, DatagramValue, direction},
    };

    fn put<A: Address>(world: &World, name: &str, [vip, backend]: [A; 2], seconds_ago: u32)
    where
        DatagramKey<A>: aya::Pod,
        DatagramValue<A>: aya::Pod,
    {
        let pin = world.options.bpffs.join("v1/maps").join(name);
        let map = aya::maps::Map::LruHashMap(aya::maps::MapData::from_pin(pin).unwrap());
        let mut map: aya::maps::HashMap<_, DatagramKey<A>, DatagramValue<A>> = map.try_into().unwrap();
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic).tv_sec as u32;
        let port = Be16::from_host(53);
        for (direction, from, to) in [(direction::TO_BACKEND, vip, backend), (direction::TO_VIP, backend, vip)] {
            let key = DatagramKey::new(7, direction, from, port);
            let seen = now.wrapping_sub(seconds_ago);
            let value = DatagramValue { addr: to, port, service: 1, seen, ..Default::default() };
            map.insert(key, value.sealed(&key), 0).unwrap();
        }
    }

    let Some(mut world) = World::new("datagrams") else { return };
    world.options.timeouts.udp = 20;
    start(&mut world.open(), &state(1), &devices());
    let mut drain = Drain::begin(&world.options.bpffs).unwrap().unwrap();
    assert_eq!(drain.flows().unwrap(), 0);
    let v4 = ["10.96.0.1", "10.1.0.1"].map(|addr| Ipv4Be::from_ip(addr.parse().unwrap()).unwrap());
    let v6 = ["fd96::1", "fd00:1::1"].map(|addr| Ipv6Be::from_ip(addr.parse().unwrap()).unwrap());
    put(&world, "datagrams_v4", v4, 1);
    assert_eq!(drain.flows().unwrap(), 1);
    put(&world, "datagrams_v6", v6, 15);
    assert_eq!(drain.flows().unwrap(), 2);
    // By the time-out that the programs had, not by this process's.
    put(&world, "datagrams_v4", v4, 21);
    put(&world, "datagrams_v6", v6, 25);
    assert_eq!(drain.flows().unwrap(), 0);
    drain.remove().unwrap();
}

/// By whoever is told of another directory, whether an agent runs on these or not; those of another network namespace are not its business.
#[test]
fn pins_are_found_whatever_directory_is_asked_for() {
    use proxy_agent::dataplane::ebpf::read::elsewhere;

    let Some(mut world) = World::new("elsewhere") else { return };
    let other = world.options.bpffs.clone();
    world.options.bpffs = other.join("deeper/pins");
    let mut ebpf = world.open();
    start(&mut ebpf, &state(1), &devices());
    let pins = [world.options.bpffs.clone()];
    assert_eq!(elsewhere(&other), pins);
    assert_eq!(elsewhere(&pins[0]), [] as [PathBuf; 0]);
    drop(ebpf);
    assert_eq!(elsewhere(Path::new("/nowhere")), pins);
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
    assert_eq!(elsewhere(&other), [] as [PathBuf; 0]);
    Ebpf::remove(&pins[0]).unwrap();
    fs::remove_dir_all(&other).unwrap();
}
