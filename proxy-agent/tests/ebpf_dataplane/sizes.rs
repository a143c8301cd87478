//! Maps that fill up, and maps that change their size.

use super::*;

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

/// What the programs find in a map of frontends: how many backends each has.
fn contents(map: aya::maps::MapData) -> BTreeMap<Vec<u8>, u16> {
    use proxy_common::{
        Ipv4Be,
        frontend::{FrontendKey, FrontendValue},
    };
    const COUNT: usize = std::mem::offset_of!(FrontendValue, all_count);
    type Entries<M> = aya::maps::HashMap<M, [u8; size_of::<FrontendKey<Ipv4Be>>()], [u8; size_of::<FrontendValue>()]>;
    let entries: Entries<_> = aya::maps::Map::HashMap(map).try_into().unwrap();
    let count = |value: [u8; size_of::<FrontendValue>()]| u16::from_ne_bytes([value[COUNT], value[COUNT + 1]]);
    entries.iter().map(|entry| entry.unwrap()).map(|(key, value)| (key.to_vec(), count(value))).collect()
}

/// Death at every step of a change of sizes, with other frontends wanted than before: whatever programs a link runs then, their maps
/// hold all that was in force or all that is wanted; and the next start, whichever sizes it wants, ends it and has what either kind
/// of programs wrote.
#[test]
fn dying_anywhere_while_maps_change_their_size_costs_nothing() {
    use aya::maps::{HashMap, Map, MapData};
    use proxy_common::{
        Ipv4Be,
        socket::{DatagramKey, DatagramValue},
    };
    type Key = [u8; size_of::<DatagramKey<Ipv4Be>>()];
    type Value = [u8; size_of::<DatagramValue<Ipv4Be>>()];
    let Some(mut world) = World::new("crash") else { return };
    let devices = devices();
    // One Service has other backends, another goes and a third comes.
    let one = state(2);
    let mut other = state(1);
    for v6 in [false, true] {
        other.frontends.insert(frontend(1, v6), spec(1, v6, 2..7));
        other.frontends.insert(frontend(3, v6), spec(3, v6, 1..3));
    }
    let frontends =
        |world: &World| contents(MapData::from_pin(world.options.bpffs.join("v1/maps/frontends_v4")).unwrap());
    let [(other, other_contents), (one, one_contents)] = [other, one].map(|state| {
        start(&mut world.open(), &state, &devices);
        assert_holds(&world.pins(), &state);
        (state, frontends(&world))
    });
    assert_ne!(one_contents, other_contents);
    let (small, large) =
        (world.options.sizes, Sizes { slots: 2048, datagrams: 512, frontends: 512, ..world.options.sizes });
    let datagrams = |data| -> HashMap<MapData, Key, Value> { Map::LruHashMap(data).try_into().unwrap() };
    let key = |n: u8| -> Key { [n; size_of::<Key>()] };
    let (mut mixed, mut complete) = (0, false);
    for step in 0..100 {
        let state = if step % 2 == 0 { &other } else { &one };
        let before = world.options.sizes;
        let pinned = MapData::from_pin(world.options.bpffs.join("v1/maps/datagrams_v4")).unwrap();
        datagrams(pinned).insert(key(1), [1; size_of::<Value>()], 0).unwrap();
        world.options.sizes = if before == small { large } else { small };
        let try_it = || -> Option<()> {
            let mut ebpf = Ebpf::open_dying_after(&world.options, step).ok()?;
            assert!(ebpf.resync(state).is_clean());
            // Either kind of links may be first.
            if step % 4 < 2 {
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
            let held = contents(map);
            assert!(held == one_contents || held == other_contents, "step {step}: {held:?}");
        }

        // Steps 7 and 8 leave links of both kinds, each order of moving them one.
        if step % 3 < 2 {
            world.options.sizes = before;
        }
        // Every kind of links writes on until it is moved.
        let mut ebpf = world.open();
        for (number, map) in (10..).zip(map_in_force(&world, "datagrams_v4").into_values()) {
            datagrams(map).insert(key(number), [number; size_of::<Value>()], 0).unwrap();
            written.push(number);
        }
        start(&mut ebpf, state, &devices);
        assert_whole(&world);
        assert_holds(&world.pins(), state);
        assert!(!world.options.bpffs.join("v1/moving").exists());
        let left = fs::read_dir(world.options.bpffs.join("v1/maps")).unwrap();
        let left: Vec<_> = left.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        assert!(left.iter().all(|name| !name.contains('-')), "{left:?}");
        drop(ebpf);
        let mut after = datagrams(MapData::from_pin(world.options.bpffs.join("v1/maps/datagrams_v4")).unwrap());
        for number in written {
            assert_eq!(after.get(&key(number), 0).unwrap(), [number; size_of::<Value>()], "step {step}");
            after.remove(&key(number)).unwrap();
        }
        assert_eq!(start(&mut world.open(), state, &devices), 0, "settled");
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
