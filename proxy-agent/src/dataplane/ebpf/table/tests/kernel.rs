//! The same crash points in a real kernel: maps of the real kinds, pinned, written through the mapping and in batches.

use std::{fs, os::fd::AsFd, path::PathBuf};

use proxy_common::source_range::SourceRangeKey;

use super::*;
use crate::dataplane::ebpf::{
    layout::{MapName, Sizes},
    maps::Maps,
    store::Result,
    sys,
};

/// A process that dies after so many writes: what comes after does not land.
struct Dying {
    maps: Maps,
    left: u64,
}

impl Dying {
    fn live(&mut self, map: MapName) -> Result<()> {
        self.left =
            self.left.checked_sub(1).ok_or_else(|| StoreError::Io { map, source: std::io::Error::other("dead") })?;
        Ok(())
    }
}

impl Store for Dying {
    fn slots<A: Family>(&self) -> u32 {
        self.maps.slots::<A>()
    }
    fn slot<A: Family>(&self, index: u32) -> A::Slot {
        self.maps.slot::<A>(index)
    }
    fn write_slot<A: Family>(&mut self, index: u32, slot: A::Slot) -> Result<()> {
        self.live(A::SLOTS)?;
        self.maps.write_slot::<A>(index, slot)
    }
    fn frontends<A: Family>(&self) -> Result<Vec<(FrontendKey<A>, FrontendValue)>> {
        self.maps.frontends::<A>()
    }
    fn put_frontends<A: Family>(&mut self, entries: &[(FrontendKey<A>, FrontendValue)]) -> (usize, Option<StoreError>) {
        // A batch dies in its middle.
        let fits = usize::try_from(self.left).unwrap().min(entries.len());
        let (landed, error) = self.maps.put_frontends::<A>(&entries[..fits]);
        self.left -= landed as u64;
        let died = (fits < entries.len()).then(|| self.live(A::FRONTENDS).err()).flatten();
        (landed, error.or(died))
    }
    fn remove_frontends<A: Family>(&mut self, keys: &[FrontendKey<A>]) -> Result<()> {
        for key in keys {
            self.live(A::FRONTENDS)?;
            self.maps.remove_frontends::<A>(&[*key])?;
        }
        Ok(())
    }
    fn source_ranges<A: Family>(&self) -> Result<Vec<SourceRangeKey<A>>> {
        self.maps.source_ranges()
    }
    fn put_source_range<A: Family>(&mut self, key: &SourceRangeKey<A>) -> Result<()> {
        self.live(A::SOURCE_RANGES)?;
        self.maps.put_source_range(key)
    }
    fn remove_source_range<A: Family>(&mut self, key: &SourceRangeKey<A>) -> Result<()> {
        self.live(A::SOURCE_RANGES)?;
        self.maps.remove_source_range(key)
    }
    fn prune_affinity(&mut self, is_over: &dyn Fn(u32, u32) -> bool) -> Result<usize> {
        self.maps.prune_affinity(is_over)
    }
    fn names(&self) -> Result<Vec<(u32, ServiceName)>> {
        self.maps.names()
    }
    fn put_name(&mut self, id: u32, name: &ServiceName) -> Result<()> {
        self.live(MapName::Names)?;
        self.maps.put_name(id, name)
    }
    fn remove_name(&mut self, id: u32) -> Result<()> {
        self.live(MapName::Names)?;
        self.maps.remove_name(id)
    }
    fn remove_counters(&mut self, id: u32) -> Result<()> {
        self.live(MapName::ServiceCounters)?;
        self.maps.remove_counters(id)
    }
    fn local_cidrs(&self) -> Result<BTreeSet<IpNet>> {
        self.maps.local_cidrs()
    }
    fn put_local_cidr(&mut self, cidr: IpNet) -> Result<()> {
        self.live(MapName::LocalCidrsV4)?;
        self.maps.put_local_cidr(cidr)
    }
    fn remove_local_cidr(&mut self, cidr: IpNet) -> Result<()> {
        self.live(MapName::LocalCidrsV4)?;
        self.maps.remove_local_cidr(cidr)
    }
    fn devices(&self) -> Result<Vec<(u32, DeviceValue)>> {
        self.maps.devices()
    }
    fn put_device(&mut self, index: u32, value: &DeviceValue) -> Result<()> {
        self.maps.put_device(index, value)
    }
    fn remove_device(&mut self, index: u32) -> Result<()> {
        self.maps.remove_device(index)
    }
    fn bridges(&self) -> Result<Vec<(u32, u32)>> {
        self.maps.bridges()
    }
    fn put_bridge(&mut self, port: u32, bridge: u32) -> Result<()> {
        self.maps.put_bridge(port, bridge)
    }
    fn remove_bridge(&mut self, port: u32) -> Result<()> {
        self.maps.remove_bridge(port)
    }
    fn xdp_devices(&self) -> Result<Vec<(u32, XdpDevice)>> {
        self.maps.xdp_devices()
    }
    fn put_xdp_device(&mut self, index: u32, value: &XdpDevice) -> Result<()> {
        self.maps.put_xdp_device(index, value)
    }
    fn remove_xdp_device(&mut self, index: u32) -> Result<()> {
        self.maps.remove_xdp_device(index)
    }
    fn writes(&self) -> u64 {
        self.maps.writes()
    }
}

struct Pins(PathBuf);

impl Pins {
    fn new() -> Self {
        let root = PathBuf::from(format!("/sys/fs/bpf/table-{}", std::process::id()));
        fs::create_dir(&root).unwrap();
        let pins = Self(root);
        let sizes = Sizes { frontends: 64, slots: 256, services: 64, ..Sizes::default() };
        for map in [
            MapName::FrontendsV4,
            MapName::FrontendsV6,
            MapName::SlotsV4,
            MapName::SlotsV6,
            MapName::Names,
            MapName::ServiceCounters,
            MapName::Devices,
            MapName::Bridges,
            MapName::XdpDevices,
            MapName::SourceRangesV4,
            MapName::SourceRangesV6,
            MapName::LocalCidrsV4,
            MapName::LocalCidrsV6,
            MapName::AffinityV4,
            MapName::AffinityV6,
            MapName::Meta,
        ] {
            let fd = sys::create(map.as_str(), map.info(&sizes)).unwrap();
            sys::pin(fd.as_fd(), &pins.0.join(map.as_str())).unwrap();
        }
        pins
    }

    fn open(&self, left: u64) -> Table<Dying> {
        let maps = Maps::open(|map| self.0.join(map.as_str())).unwrap();
        Table::new(Dying { maps, left }, REST)
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn every_crash_point_is_safe_in_the_kernel() {
    if !rustix::process::geteuid().is_root() {
        println!("SKIP every_crash_point_is_safe_in_the_kernel: not root");
        return;
    }
    // Nothing has mounted it yet on a machine that has just come up.
    crate::dataplane::ebpf::pins::ensure_bpffs(std::path::Path::new("/sys/fs/bpf")).unwrap();
    let (a, b) = example();
    let (from, to) = (desired(&a), desired(&b));
    let old_or_new = [oracle(&from), oracle(&to)];
    let mut crashes = 0;
    loop {
        let pins = Pins::new();
        assert!(pins.open(u64::MAX).resync(&from, NOW).is_clean());
        let mut dying = pins.open(crashes);
        let writes = dying.resync(&to, NOW).writes;
        for (at, what) in seen(dying.store()) {
            assert!(old_or_new.iter().any(|o| o.get(&at) == Some(&what)), "{at:?} after {crashes} writes: {what:?}");
        }
        let mut restarted = pins.open(u64::MAX);
        assert!(restarted.resync(&to, NOW).is_clean());
        assert_eq!(seen(restarted.store()), oracle(&to), "after {crashes} writes");
        assert_eq!(restarted.store().local_cidrs().unwrap(), to.local_cidrs, "after {crashes} writes");
        assert!(restarted.observe().unwrap().is_empty());
        assert_eq!(pins.open(u64::MAX).resync(&to, NOW).writes, 0, "after {crashes} writes");
        if writes < crashes {
            break;
        }
        crashes += 1;
    }
    assert!(crashes > 15, "the example takes more than {crashes} writes");
}
