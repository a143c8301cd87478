//! The eBPF dataplane.
//!
//! ```text
//! Ebpf ─┬─ table   ids, slot ranges, the order of writes; pure over a store
//!       ├─ devices what the programs must know of each device; pure over the same store
//!       │    └─ maps    the store: the pinned maps (slots through a mapping)
//!       ├─ hooks   programs, pinned links, tc filters
//!       ├─ alone   whether somebody else translates here, too
//!       └─ pins    the directory: owner, lock
//! read     the same maps for readers: CLI, metrics; never writes
//! probe    can this node run it, and why not
//! ```
//!
//! Everything in force is pinned: the agent may die and come back at any instant without a packet noticing. A restart with
//! nothing changed loads nothing and writes nothing.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    os::fd::AsFd,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use crate::{
    dataplane::{
        Ahead, Capabilities, Dataplane, DataplaneError, DetectLocal, Drift, Ended, Failure, Fill, Hook, Report,
    },
    desired::{Algorithm, Changes, DesiredState, Devices, Frontend, LeftPods},
    ipsec,
    model::{Protocol, ServiceKey},
};

mod alloc;
mod alone;
mod cgroup;
mod clsact;
mod devices;
mod diag;
mod family;
mod former;
mod held;
mod hooks;
mod hygiene;
mod lasting;
mod layout;
mod left;
pub mod linkage;
mod log;
mod maps;
mod noted;
pub mod object;
mod pins;
pub mod probe;
pub mod read;
mod render;
mod resize;
mod services;
mod store;
mod sys;
mod table;
pub mod xdp;

pub use former::Drain;
pub(crate) use former::Former;
pub(crate) use hygiene::Hygiene;
/// For tests and benchmarks, with maps that are pinned nowhere.
#[doc(hidden)]
pub use hygiene::sweep::{Sweep, Swept};
pub use layout::Sizes;
pub use pins::PinError;
pub use xdp::Xdp;

use alone::Alone;
use held::Keeper;
use hooks::Hooks;
use layout::MapName;
use left::Left;
use maps::Maps;
use pins::{Layout, Pinned};
use resize::Steps;
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
    pub detect_local: DetectLocal,
    /// Pods may be left alone at connect time, each by itself.
    pub left_pods: bool,
    pub tc: Tc,
    pub xdp: Xdp,
    pub sizes: Sizes,
    /// First and last source port for masquerading; apart from the kernel's ephemeral ports.
    pub masquerade_ports: (u16, u16),
    /// Level of the programs' own debug lines; 0: off.
    pub log_level: u8,
    /// Programs to run instead of the embedded ones.
    pub object: Option<&'static [u8]>,
    pub timeouts: Timeouts,
    /// Counts what is ended because its backend is gone.
    pub ended: Arc<Ended>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            bpffs: "/sys/fs/bpf/proxy-agent".into(),
            cgroup_root: None,
            socket_lb: SocketLb::All,
            detect_local: DetectLocal::Device,
            left_pods: false,
            tc: Tc::Auto,
            xdp: Xdp::Off,
            sizes: Sizes::default(),
            masquerade_ports: (1024, 29_999),
            log_level: 0,
            object: None,
            timeouts: Timeouts::default(),
            ended: Arc::default(),
        }
    }
}

/// How long a flow of the per-packet path may be silent, in seconds, before its entries may be taken over. Names and defaults are
/// kube-proxy's and the kernel's conntrack.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Timeouts {
    /// TCP, both sides have spoken.
    pub tcp_established: u32,
    /// TCP, one side has closed.
    pub tcp_close_wait: u32,
    /// UDP, no answer yet.
    pub udp: u32,
    /// UDP, answered.
    pub udp_stream: u32,
}

impl Timeouts {
    fn longer(self, other: Self) -> Self {
        let Self { tcp_established, tcp_close_wait, udp, udp_stream } = self;
        Self {
            tcp_established: tcp_established.max(other.tcp_established),
            tcp_close_wait: tcp_close_wait.max(other.tcp_close_wait),
            udp: udp.max(other.udp),
            udp_stream: udp_stream.max(other.udp_stream),
        }
    }
}

impl Default for Timeouts {
    fn default() -> Self {
        Self { tcp_established: 86_400, tcp_close_wait: 3_600, udp: 30, udp_stream: 120 }
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
    /// Maps that links of two changes ago may still use.
    former: Vec<MapName>,
    /// Links that could not be moved: they go on with the old maps, which nobody writes to any more.
    lagging: Vec<String>,
    steps: Steps,
    hygiene: Hygiene,
    _keeper: Keeper,
    left: Left,
    alone: Alone,
    /// The first full state is in force: before that there may be no frontend that others' connections could be told by.
    serving: bool,
    /// And every device has its hooks.
    complete: bool,
    /// Pods may be left alone at connect time ([`Options::left_pods`]).
    leaves_pods: bool,
    started: Instant,
}

/// What is in the directory of pins, as it should be.
struct Made {
    hooks: Hooks,
    maps: Maps,
    resized: Vec<MapName>,
    moving: bool,
    former: Vec<MapName>,
}

fn kernel(what: impl Into<String>) -> impl FnOnce(io::Error) -> DataplaneError {
    let what = what.into();
    |source| DataplaneError::Kernel { what, source }
}

fn unavailable(what: impl Into<String>) -> DataplaneError {
    DataplaneError::Unavailable(what.into())
}

impl Ebpf {
    /// Opens or makes the maps, adopts or loads the programs. Changes nothing that is in force, but that XDP of an earlier run goes on past
    /// IPsec policies.
    pub fn open(options: &Options) -> Result<Self, DataplaneError> {
        Self::open_counting(options, Steps::endless())
    }

    /// The same, but a change of map sizes ends after so many steps, as if the process had died there. For tests.
    #[doc(hidden)]
    pub fn open_dying_after(options: &Options, steps: u32) -> Result<Self, DataplaneError> {
        Self::open_counting(options, Steps::at_most(steps))
    }

    fn open_counting(options: &Options, mut steps: Steps) -> Result<Self, DataplaneError> {
        let pinned = Pinned::open(&options.bpffs).map_err(|error| DataplaneError::Unavailable(error.to_string()))?;
        if let Some(warning) = lasting::warning(&options.bpffs, pinned.mounted) {
            tracing::warn!(bpffs = %options.bpffs.display(), "{warning}");
        }
        let made = Self::make(&pinned.layout, options, &mut steps).inspect_err(|_| {
            // Nothing is in force by it, and another mode would take it for what an agent left.
            if pinned.is_new
                && let Err(error) = remove_all(&pinned.layout)
            {
                tracing::warn!(%error, "what could not be opened stays pinned");
            }
        })?;
        Self::over(pinned, made, options, steps)
    }

    fn make(layout: &Layout, options: &Options, steps: &mut Steps) -> Result<Made, DataplaneError> {
        // Said before anything is pinned.
        options.object()?;
        // An earlier process may have died with its links half moved.
        let moving = resize::recover(layout, &options.sizes, steps)?;
        let former = resize::former(layout);
        let resized = resize::check(layout, &options.sizes, moving)?;
        for map in MapName::ALL.iter().copied().filter(|map| map.is_unknown_to_programs()) {
            ensure_map(layout, map, &options.sizes, &resized)?;
        }
        let path = |map: MapName| if resized.contains(&map) { layout.resized(map) } else { layout.map(map) };
        let sizes: Vec<_> = MapName::ALL.iter().map(|map| (*map, map.info(&options.sizes).max_entries)).collect();
        let meta = sys::open(&layout.map(MapName::Meta)).and_then(sys::Map::new).map_err(kernel("map meta"))?;
        let hooks = Hooks::open(layout, options, &meta, &sizes, &path)?;
        noted::take_up(layout)
            .and_then(|()| noted::note(layout, options.timeouts))
            .map_err(kernel("note the time-outs"))?;
        if !moving {
            let written_by_agents = resized.iter().copied().filter(|map| !map.is_written_by_programs());
            resize::copy(layout, written_by_agents, sys::ANY, steps)?;
        }
        let maps = Maps::open(path).map_err(|error| DataplaneError::Unavailable(error.to_string()))?;
        Ok(Made { hooks, maps, resized, moving, former })
    }

    fn over(pinned: Pinned, made: Made, options: &Options, steps: Steps) -> Result<Self, DataplaneError> {
        let Made { hooks, maps, resized, moving, former } = made;
        let layout = &pinned.layout;
        let tcp = hygiene::reaches_sockets(Protocol::Tcp);
        let reach = if tcp.is_ok() { render::Reach::Sockets } else { render::Reach::Packets };
        let pods = hygiene::reaches_sockets(Protocol::Udp).or_else(|why| tcp.map_err(|_| why));
        let hygiene = Hygiene::start(layout.clone(), pods, options.timeouts, Arc::clone(&options.ended))
            .map_err(kernel("start the thread that ends stale flows"))?;
        let keeper = Keeper::start(layout.clone())
            .map_err(kernel("start the thread that keeps fragments for their first one"))?;
        let mut ebpf = Self {
            hygiene,
            _keeper: keeper,
            left: Left::new(&pinned.layout, hooks.cgroup_root().map(PathBuf::from)),
            alone: Alone::new(&pinned.layout),
            serving: false,
            complete: false,
            leaves_pods: options.left_pods,
            table: Table::new(maps, alloc::REST)
                .resetting_by(reach)
                .leaving_local_cidrs(options.detect_local == DetectLocal::Device),
            hooks,
            sizes: options.sizes,
            resized,
            moving,
            former,
            lagging: Vec::new(),
            steps,
            started: Instant::now(),
            pinned,
        };
        if ebpf.changes_maps() {
            ebpf.alone.doubt().map_err(kernel("map alone"))?;
        }
        ebpf.wait();
        Ok(ebpf)
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

    /// Until links move, which may take time, or fail: XDP of an earlier run, or of other circumstances, leaves to the stack what it should.
    fn keep_xdp(&mut self, devices: &Devices, report: &mut Report) {
        let wanted = self.hooks.for_xdp(devices, report);
        if let Err(error) = devices::keep_xdp(self.table.store_mut(), &wanted, report) {
            for device in devices.iter().filter_map(|(index, device)| (!wanted.contains(index)).then_some(device)) {
                let why = format!("device {}: XDP may go on there: {error}", device.name);
                report.failed_devices.insert(device.name.clone(), Failure::Retry(why));
            }
        }
    }

    /// What is left of devices that are not wanted any more.
    fn clear_other_devices(&mut self, devices: &Devices, report: &mut Report) {
        let known = self.known_devices();
        let filtered = self.hooks.detach_others(&known, devices, report);
        if let Err(error) = devices::prune(self.table.store_mut(), devices, &filtered, report) {
            tracing::warn!(%error, "entries of devices that are gone stay");
        }
    }

    /// Before links move: brings what the programs wrote to maps of another size, all of it the first time. From then on the new
    /// maps are written to as well, and what is in them stands, also for a process that comes after this one.
    fn before_links_move(&mut self) -> Result<(), DataplaneError> {
        // Where nothing moves but what could not, nothing is brought along: that would revive what was deleted since.
        if !self.changes_maps() || (!self.lagging.is_empty() && self.hooks.lagging() == self.lagging) {
            return Ok(());
        }
        self.copy_what_programs_wrote()
    }

    /// There are links that use, or may use, other maps than they should.
    const fn changes_maps(&self) -> bool {
        !self.resized.is_empty() || !self.former.is_empty()
    }

    fn copy_what_programs_wrote(&mut self) -> Result<(), DataplaneError> {
        let flags = if self.moving { sys::NOEXIST } else { sys::ANY };
        let Self { pinned: Pinned { layout, .. }, resized, former, steps, .. } = self;
        resize::copy(
            layout,
            resized.iter().copied().filter(|map| map.is_written_by_programs() && layout.resized(*map).exists()),
            flags,
            steps,
        )?;
        resize::copy_former(layout, former, steps)?;
        if !self.moving && !self.resized.is_empty() {
            self.steps.next()?;
            resize::begin_moving(layout)?;
            self.moving = true;
        }
        Ok(())
    }

    /// What is asked of `frontends` does not reach links that lag behind.
    fn degrade(&self, report: &mut Report, frontends: impl IntoIterator<Item = Frontend>) {
        if self.lagging.is_empty() {
            return;
        }
        let why = format!(
            "{} could not be moved to the maps of another size and serves what was in force before; what is in the way of it stands with the \
             failed devices and hooks",
            self.lagging.join(", ")
        );
        for frontend in frontends {
            report.failed.entry(frontend).or_insert_with(|| Failure::Retry(format!("frontend {frontend}: {why}")));
        }
    }

    /// Once every link holds our programs: maps of a new size take the place of the old ones, and `meta` says what runs. Where a link is
    /// missing others may go on translating, and come over later: they are not looked for yet.
    fn settle(&mut self, missing: bool) -> Result<(), DataplaneError> {
        self.lagging = if self.moving || !self.former.is_empty() { self.hooks.lagging() } else { Vec::new() };
        self.complete = false;
        if !self.hooks.is_settled() {
            return Ok(());
        }
        if self.changes_maps() {
            // What the old programs wrote meanwhile comes along.
            self.copy_what_programs_wrote()?;
            resize::put_in_place(&self.pinned.layout, &self.resized, &mut self.steps)?;
            self.resized.clear();
            self.moving = false;
            resize::forget_former(&self.pinned.layout, &self.former, &mut self.steps)?;
            self.former.clear();
            self.hygiene.look();
        }
        self.table.clear_local_cidrs().map_err(|error| unavailable(error.to_string()))?;
        self.steps.next()?;
        let meta = *self.hooks.meta();
        self.table.store_mut().set_meta(&meta).map_err(kernel("map meta"))?;
        self.complete = !missing;
        if self.serving && self.complete {
            self.alone.look();
        }
        Ok(())
    }

    /// Before the first links are made: what comes in by a link that had none may have been another proxy's until now, whatever an earlier run
    /// found out.
    fn before_new_links(&self, devices: &Devices) -> Result<(), DataplaneError> {
        if !self.hooks.are_new(devices) {
            return Ok(());
        }
        tracing::debug!("links are new: who else translates there is to be found out");
        self.alone.doubt().map_err(kernel("map alone"))
    }
}

/// Mounts a bpf filesystem where pins at `root` need one and none is; tells whether it had to, and what to say of where it is.
pub fn mount_bpffs(root: &std::path::Path) -> Result<(bool, Option<&'static str>), DataplaneError> {
    let mounted = pins::ensure_bpffs(root).map_err(|error| DataplaneError::Unavailable(error.to_string()))?;
    Ok((mounted, lasting::warning(root, mounted)))
}

impl Dataplane for Ebpf {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            name: "ebpf",
            protocols: vec![Protocol::Tcp, Protocol::Udp, Protocol::Sctp],
            affinity: true,
            algorithms: vec![Algorithm::Random, Algorithm::RoundRobin, Algorithm::Maglev],
            otherwise: Algorithm::Random,
            turns_restart: None,
            loopback: true,
            resets: true,
            affinity_clients: None,
            affinity_apart: false,
        }
    }

    fn resync(&mut self, desired: &DesiredState) -> Report {
        let now = self.now();
        let mut report = self.table.resync(desired, now);
        // Nobody will ever say who it is where nobody is asked: what an earlier run left there goes.
        let nobody = (!self.leaves_pods).then(LeftPods::new);
        if let Some(left_pods) = desired.left_pods.as_ref().or(nobody.as_ref()) {
            self.left.set(left_pods, now);
        }
        self.degrade(&mut report, desired.frontends.keys().copied());
        self.hygiene.all(desired, &report);
        report
    }

    fn wait(&mut self) {
        let store = self.table.store_mut();
        if store.xdp_devices().is_ok_and(|entries| entries.is_empty()) {
            return;
        }
        // Devices are told by the node's facts, which may be long in coming; of policies the kernel knows.
        let Some(why) = ipsec::bars() else { return };
        match devices::keep_xdp(store, &BTreeSet::new(), &mut Report::default()) {
            Ok(()) => tracing::warn!(why, "XDP of an earlier run leaves everything to the stack"),
            Err(error) => tracing::error!(why, %error, "XDP of an earlier run goes on; it is tried again"),
        }
    }

    /// Where nothing is in force yet. Maps of another size are filled before links move to them.
    fn hooks_first(&self) -> bool {
        !self.changes_maps() && self.table.is_out_of_force()
    }

    fn hold(&mut self, services: &BTreeSet<ServiceKey>) {
        self.table.hold(services);
    }

    fn apply(&mut self, changes: &Changes) -> Report {
        let now = self.now();
        let mut report = self.table.apply(changes, now);
        if let Some(left_pods) = &changes.left_pods {
            self.left.set(left_pods, now);
        }
        self.degrade(&mut report, changes.set.keys().chain(&changes.remove).copied());
        self.hygiene.changed(changes, &report);
        report
    }

    fn set_devices(&mut self, devices: &Devices) -> Report {
        let mut report = Report::default();
        self.keep_xdp(devices, &mut report);
        // A program finds its device's entry from its first packet on.
        let moves = devices::put(self.table.store_mut(), devices, &mut report);
        if let Err(error) = self.before_links_move().and_then(|()| self.before_new_links(devices)) {
            // Links that moved now would leave connections behind, links that are made have them reset.
            let failed = |device: &crate::desired::Device| (device.name.clone(), Failure::Retry(error.to_string()));
            report.failed_devices.extend(devices.values().map(failed));
            return report;
        }
        self.hooks.set_devices(devices, &mut report);
        devices::put_xdp(self.table.store_mut(), &self.hooks.xdp_devices(), &mut report);
        self.clear_other_devices(devices, &mut report);
        if moves {
            devices::put(self.table.store_mut(), devices, &mut report);
        }
        let missing = !report.failed_devices.is_empty();
        if let Err(error) = self.settle(missing) {
            tracing::warn!(%error, "the next start will load the programs again");
        }
        self.degrade(&mut report, self.table.frontends());
        self.hygiene.devices();
        report
    }

    fn activate(&mut self) -> Result<(), DataplaneError> {
        let mut report = Report::default();
        self.before_links_move()?;
        self.hooks.activate(&mut report)?;
        for (device, failure) in &report.failed_devices {
            tracing::warn!(device, %failure, "not attached");
        }
        self.settle(!report.failed_devices.is_empty())
    }

    fn in_force(&mut self) {
        self.serving = true;
        if self.complete {
            self.alone.look();
        }
    }

    fn observe(&mut self) -> Result<Drift, DataplaneError> {
        let mut drift = self.table.observe().map_err(|error| DataplaneError::Unavailable(error.to_string()))?;
        drift.hooks = self.hooks.lost();
        // What a device can send changes with settings of it that nobody tells of.
        let known = self.table.store_mut().xdp_devices().map(|entries| entries.into_iter().collect());
        if known.is_ok_and(|known: BTreeMap<_, _>| known != self.hooks.xdp_devices()) {
            drift.hooks.push("xdp_devices".to_owned());
        }
        Ok(drift)
    }

    fn tick(&mut self) -> Option<Duration> {
        let now = self.now();
        let next = [self.table.tick(now, read::monotonic_secs()), self.left.tick(now)];
        next.into_iter().flatten().min()
    }

    fn unplaced(&self) -> Option<String> {
        self.left.complaint(self.now())
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

    fn lost_hooks(&self) -> Vec<String> {
        self.hooks.lost()
    }

    fn ahead(&self) -> Vec<Ahead> {
        self.hooks.ahead()
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
