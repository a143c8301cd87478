//! The eBPF dataplane.
//!
//! ```text
//! Ebpf ─┬─ table   ids, slot ranges, the order of writes; pure over a store
//!       ├─ devices what the programs must know of each device; pure over the same store
//!       │    └─ maps    the store: the pinned maps (slots through a mapping)
//!       ├─ hooks   programs, pinned links, tc filters
//!       └─ pins    the directory: owner, lock
//! read     the same maps for readers: CLI, metrics; never writes
//! probe    can this node run it, and why not
//! ```
//!
//! Everything in force is pinned: the agent may die and come back at any instant without a packet noticing. A restart with
//! nothing changed loads nothing and writes nothing.

use std::{
    fs, io,
    os::fd::AsFd,
    path::PathBuf,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use crate::{
    dataplane::{Capabilities, Dataplane, DataplaneError, Drift, Fill, Hook, Report},
    desired::{Changes, DesiredState, Devices},
    model::Protocol,
};

mod alloc;
mod cgroup;
mod clsact;
mod devices;
mod diag;
mod family;
mod hooks;
mod layout;
mod log;
mod maps;
pub mod object;
mod pins;
pub mod probe;
pub mod read;
mod render;
mod services;
mod store;
mod sys;
mod table;

pub use layout::Sizes;
pub use pins::PinError;

use hooks::Hooks;
use layout::MapName;
use maps::Maps;
use pins::{Layout, Pinned};
use store::Store;
use table::Table;

/// Whose sockets are translated at connect time.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SocketLb {
    /// All processes'.
    #[default]
    All,
    /// The node's own; pods are served per packet.
    Node,
    /// Nobody's.
    Off,
}

/// How the per-packet programs are attached.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Tc {
    /// TCX where the kernel has it, clsact filters elsewhere.
    #[default]
    Auto,
    Tcx,
    Clsact,
}

#[derive(Clone, Debug)]
pub struct Options {
    /// The pin directory.
    pub bpffs: PathBuf,
    /// Where connect-time programs are attached; by default the root of the cgroup v2 hierarchy.
    pub cgroup_root: Option<PathBuf>,
    pub socket_lb: SocketLb,
    pub tc: Tc,
    pub sizes: Sizes,
    /// First and last source port for masquerading; apart from the kernel's ephemeral ports.
    pub masquerade_ports: (u16, u16),
    /// Level of the programs' own debug lines; 0: off.
    pub log_level: u8,
    /// Programs to run instead of the embedded ones.
    pub object: Option<&'static [u8]>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            bpffs: "/sys/fs/bpf/proxy-agent".into(),
            cgroup_root: None,
            socket_lb: SocketLb::All,
            tc: Tc::Auto,
            sizes: Sizes::default(),
            masquerade_ports: (1024, 29_999),
            log_level: 0,
            object: None,
        }
    }
}

impl Options {
    fn object(&self) -> Result<&'static [u8], DataplaneError> {
        self.object.map_or_else(object::bytes, Ok)
    }
}

/// The dataplane; see the head of this module.
#[derive(Debug)]
pub struct Ebpf {
    pinned: Pinned,
    table: Table<Maps>,
    hooks: Hooks,
    sizes: Sizes,
    /// Maps that wait under another name for the programs to have moved to them.
    resized: Vec<MapName>,
    /// Links began to move to programs that use those.
    moving: bool,
    started: Instant,
}

fn kernel(what: impl Into<String>) -> impl FnOnce(io::Error) -> DataplaneError {
    let what = what.into();
    |source| DataplaneError::Kernel { what, source }
}

impl Ebpf {
    /// Opens or makes the maps, adopts or loads the programs. Changes nothing that is in force.
    pub fn open(options: &Options) -> Result<Self, DataplaneError> {
        let pinned = Pinned::open(&options.bpffs).map_err(|error| DataplaneError::Unavailable(error.to_string()))?;
        // Said before anything is pinned.
        options.object()?;
        let layout = &pinned.layout;
        let resized = check_maps(layout, &options.sizes)?;
        for map in MapName::ALL.iter().copied().filter(|map| map.is_agents()) {
            ensure_map(layout, map, &options.sizes, &resized)?;
        }
        let path = |map: MapName| if resized.contains(&map) { layout.resized(map) } else { layout.map(map) };
        let sizes: Vec<_> = MapName::ALL.iter().map(|map| (*map, map.info(&options.sizes).max_entries)).collect();
        let meta = sys::open(&layout.map(MapName::Meta)).and_then(sys::Map::new).map_err(kernel("map meta"))?;
        let hooks = Hooks::open(layout, options, &meta, &sizes, &path)?;
        copy_resized(layout, resized.iter().copied().filter(|map| !map.is_programs()), sys::ANY)?;
        let maps = Maps::open(path).map_err(|error| DataplaneError::Unavailable(error.to_string()))?;
        Ok(Self {
            table: Table::new(maps, alloc::REST),
            hooks,
            sizes: options.sizes,
            resized,
            moving: false,
            started: Instant::now(),
            pinned,
        })
    }

    /// Removes what a directory of pins holds, with no agent running on it.
    pub fn remove(bpffs: &std::path::Path) -> Result<(), DataplaneError> {
        if !bpffs.exists() {
            return Ok(());
        }
        let pinned = Pinned::open(bpffs).map_err(|error| DataplaneError::Unavailable(error.to_string()))?;
        remove_all(&pinned.layout)
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// Devices that may carry filters of ours, as the kernel remembers them.
    fn known_devices(&mut self) -> Vec<u32> {
        self.table.store_mut().devices().map(|d| d.into_iter().map(|(index, _)| index).collect()).unwrap_or_default()
    }

    /// What is left of devices that are not wanted any more.
    fn clear_other_devices(&mut self, devices: &Devices, report: &mut Report) {
        let known = self.known_devices();
        self.hooks.detach_others(&known, devices, report);
        if let Err(error) = devices::prune(self.table.store_mut(), devices, report) {
            tracing::warn!(%error, "entries of devices that are gone stay");
        }
    }

    /// Before links move: brings what the programs wrote to maps of another size, all of it the first time. From then on the new
    /// maps are written to as well, and what is in them stands.
    fn before_links_move(&mut self) -> Result<(), DataplaneError> {
        let flags = if self.moving { sys::NOEXIST } else { sys::ANY };
        self.moving = true;
        copy_resized(&self.pinned.layout, self.resized.iter().copied().filter(|map| map.is_programs()), flags)
    }

    /// Once every link holds our programs: maps of a new size take the place of the old ones, and `meta` says what runs.
    fn settle(&mut self) -> Result<(), DataplaneError> {
        if !self.hooks.is_settled() {
            return Ok(());
        }
        if !self.resized.is_empty() {
            // What the old programs wrote meanwhile comes along.
            self.before_links_move()?;
            let layout = &self.pinned.layout;
            for map in std::mem::take(&mut self.resized) {
                fs::rename(layout.resized(map), layout.map(map)).map_err(kernel(format!("map {map}")))?;
            }
        }
        let meta = *self.hooks.meta();
        self.table.store_mut().set_meta(&meta).map_err(kernel("map meta"))
    }
}

impl Dataplane for Ebpf {
    fn capabilities(&self) -> Capabilities {
        Capabilities { name: "ebpf", protocols: vec![Protocol::Tcp, Protocol::Udp], affinity: false }
    }

    fn resync(&mut self, desired: &DesiredState) -> Report {
        let now = self.now();
        self.table.resync(desired, now)
    }

    fn apply(&mut self, changes: &Changes) -> Report {
        let now = self.now();
        self.table.apply(changes, now)
    }

    fn set_devices(&mut self, devices: &Devices) -> Report {
        let mut report = Report::default();
        // A program finds its device's entry from its first packet on.
        devices::put(self.table.store_mut(), devices, &mut report);
        if let Err(error) = self.before_links_move() {
            tracing::warn!(%error, "connections that began meanwhile may be forgotten");
        }
        self.hooks.set_devices(devices, &mut report);
        self.clear_other_devices(devices, &mut report);
        if let Err(error) = self.settle() {
            tracing::warn!(%error, "the next start will load the programs again");
        }
        report
    }

    fn activate(&mut self) -> Result<(), DataplaneError> {
        let mut report = Report::default();
        self.before_links_move()?;
        self.hooks.activate(&mut report)?;
        for (device, failure) in &report.failed_devices {
            tracing::warn!(device, %failure, "not attached");
        }
        self.settle()
    }

    fn observe(&mut self) -> Result<Drift, DataplaneError> {
        let mut drift = self.table.observe().map_err(|error| DataplaneError::Unavailable(error.to_string()))?;
        drift.hooks = self.hooks.lost();
        Ok(drift)
    }

    fn tick(&mut self) -> Option<Duration> {
        let now = self.now();
        self.table.tick(now)
    }

    fn teardown(&mut self) -> Result<(), DataplaneError> {
        remove_all(&self.pinned.layout)
    }

    fn fill(&self) -> Vec<Fill> {
        let names = [MapName::FrontendsV4, MapName::FrontendsV6, MapName::SlotsV4, MapName::SlotsV6, MapName::Names];
        names
            .into_iter()
            .zip(self.table.used())
            .map(|(map, entries)| Fill {
                map: map.to_string(),
                entries,
                capacity: u64::from(map.info(&self.sizes).max_entries),
                option: map.option(),
            })
            .collect()
    }

    fn hooks(&self) -> Vec<Hook> {
        self.hooks.in_force()
    }
}

/// Compares the pinned maps with what they should be. Returns those whose size differs, each made anew beside the old one.
fn check_maps(layout: &Layout, sizes: &Sizes) -> Result<Vec<MapName>, DataplaneError> {
    let mut resized = vec![];
    for map in MapName::ALL.iter().copied() {
        let waiting = layout.resized(map);
        match fs::remove_file(&waiting) {
            // Left by a process that died before its programs had moved.
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(kernel(waiting.display().to_string())(error));
            }
            _ => {}
        }
        let fd = match sys::open(&layout.map(map)) {
            Ok(fd) => fd,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(kernel(format!("pinned map {map}"))(error)),
        };
        let have = sys::map_info(fd.as_fd()).map_err(kernel(format!("pinned map {map}")))?;
        let want = map.info(sizes);
        // Flags may hold bits that the kernel added.
        if (have.kind, have.key, have.value) != (want.kind, want.key, want.value)
            || have.flags & want.flags != want.flags
        {
            return Err(DataplaneError::Unavailable(format!(
                "pinned map {} has another layout ({have:?}, not {want:?}): it was not made by this program; run `proxy-agent \
                 cleanup` or use another --bpffs",
                layout.map(map).display()
            )));
        }
        if have.max_entries != want.max_entries {
            let used = used_entries(map, fd.as_fd()).map_err(kernel(format!("pinned map {map}")))?;
            if used > u64::from(want.max_entries) {
                return Err(DataplaneError::Unavailable(format!(
                    "pinned map {map} needs {used} entries, {} {} leaves it {}: raise it",
                    map.option(),
                    want.max_entries,
                    want.max_entries
                )));
            }
            tracing::info!(map = map.as_str(), from = have.max_entries, to = want.max_entries, "changes its size");
            resized.push(map);
        }
    }
    Ok(resized)
}

/// Entries that a new map must have room for; 0 where it may forget.
fn used_entries(map: MapName, fd: std::os::fd::BorrowedFd<'_>) -> io::Result<u64> {
    use proxy_common::slot::{Slot, SlotV4, SlotV6};
    fn last<T: Slot + aya::Pod>(fd: std::os::fd::BorrowedFd<'_>) -> io::Result<u64> {
        let slots = maps::SlotArray::<T>::new(fd, false)?;
        let last = (0..slots.len()).rev().find(|index| !slots.read(*index).is_virgin());
        Ok(last.map_or(0, |index| u64::from(index) + 1))
    }
    match map {
        MapName::SlotsV4 => last::<SlotV4>(fd),
        MapName::SlotsV6 => last::<SlotV6>(fd),
        MapName::FrontendsV4 | MapName::FrontendsV6 | MapName::Names => {
            let info = sys::map_info(fd)?;
            let mut count = 0;
            sys::dump(fd, info.key as usize, info.value as usize, |_, _| count += 1)?;
            Ok(count)
        }
        _ => Ok(0),
    }
}

/// Makes a map that no program refers to.
fn ensure_map(layout: &Layout, map: MapName, sizes: &Sizes, resized: &[MapName]) -> Result<(), DataplaneError> {
    let path = if resized.contains(&map) { layout.resized(map) } else { layout.map(map) };
    if path.exists() {
        return Ok(());
    }
    sys::create(map.as_str(), map.info(sizes))
        .and_then(|fd| sys::pin(fd.as_fd(), &path))
        .map_err(kernel(format!("map {map}")))
}

fn copy_resized(layout: &Layout, maps: impl Iterator<Item = MapName>, flags: u64) -> Result<(), DataplaneError> {
    use proxy_common::slot::{SlotV4, SlotV6};
    fn slots<T: proxy_common::slot::Slot + aya::Pod>(from: &std::path::Path, to: &std::path::Path) -> io::Result<()> {
        let from = maps::SlotArray::<T>::new(sys::open(from)?.as_fd(), false)?;
        maps::SlotArray::<T>::new(sys::open(to)?.as_fd(), true)?.copy_from(&from);
        Ok(())
    }
    for map in maps {
        let (from, to) = (layout.map(map), layout.resized(map));
        let copied = match map {
            MapName::SlotsV4 => slots::<SlotV4>(&from, &to),
            MapName::SlotsV6 => slots::<SlotV6>(&from, &to),
            _ => {
                maps::value_size(map).and_then(|value| maps::copy_entries(&from, &to, value, flags, map.is_programs()))
            }
        };
        copied.map_err(kernel(format!("copy map {map}")))?;
    }
    Ok(())
}

/// Removes links, filters, programs, maps and the directory itself.
fn remove_all(layout: &Layout) -> Result<(), DataplaneError> {
    let devices = sys::open_read_only(&layout.map(MapName::Devices))
        .and_then(sys::Map::<u32, proxy_common::device::DeviceValue>::new)
        .and_then(|map| map.entries())
        .map(|entries| entries.into_iter().map(|(index, _)| index).collect::<Vec<_>>())
        .unwrap_or_default();
    let remove = || -> io::Result<()> {
        hooks::remove_all(layout, &devices)?;
        fs::remove_dir_all(&layout.version)?;
        match fs::remove_dir(&layout.root) {
            // Other layouts of ours may live beside it.
            Err(error) if error.kind() != io::ErrorKind::DirectoryNotEmpty => Err(error),
            _ => Ok(()),
        }
    };
    remove().map_err(kernel(format!("clean up {}", layout.root.display())))
}
