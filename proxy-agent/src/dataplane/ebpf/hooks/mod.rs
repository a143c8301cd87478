//! Programs and where they sit: loads them, pins them, attaches them, swaps them in place, notices when somebody took them off.
//!
//! ```text
//! Hooks ─┬─ programs   which there are; loads them or takes up the pinned ones
//!        │    └─ globals  what they are loaded with
//!        └─ links      of a program and a place, by pin
//! ```
//!
//! Nothing is kept in memory that the kernel could contradict: every question is asked of the pinned links again.
//!
//! Each step is idempotent and leaves a state that the next process can go on from, so a crash anywhere is repaired by the
//! ordinary start:
//! - a program's pin is replaced by rename, a link's program by `BPF_LINK_UPDATE`: no socket and no packet finds a gap;
//! - a link is right if its target is ours and its program is the pinned one; anything else is put right;
//! - `meta` says what is loaded, down to the ids of programs and maps; it is struck before a program is pinned and written last.
//!   So whoever starts next, of whichever version or configuration, adopts only what was in force as a whole. Programs that the kernel
//!   refuses change nothing of that.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    os::fd::AsFd,
    path::{Path, PathBuf},
};

use proxy_common::{
    LAYOUT_VERSION,
    device::{XdpDevice, xdp as flags},
    meta::Meta,
};

use super::{
    Options, SocketLb, Tc, Xdp,
    cgroup::Cgroup,
    clsact::{self, Direction},
    kernel,
    layout::MapName,
    pins::Layout,
    sys::{self, Target},
    xdp::{self, Mode},
};
use crate::{
    dataplane::{Ahead, DataplaneError, Failure, Hook, Report},
    desired::{Device, DeviceRole, Devices},
};

mod globals;
mod links;
mod programs;
mod refusal;

pub(crate) use globals::{Globals, netns_cookie};
pub(crate) use links::{has_tcx, interface_name, list, parse_tcx_name, parse_xdp_name};
use links::{tcx_name, tcx_type, xdp_name};
pub(crate) use programs::{CGROUP_PROGRAMS, RETURN_PROGRAM};
use programs::{Loaded, Program, XDP_PROGRAM, tc_program};
pub(crate) use refusal::{in_a_line, refused, remedy};

/// Programs and links of one agent.
#[derive(Debug)]
pub(crate) struct Hooks {
    layout: Layout,
    programs: Vec<Program>,
    cgroup: Option<Cgroup>,
    tcx: bool,
    xdp: Xdp,
    /// Why there is no program for XDP although it is asked for.
    without_xdp: Option<String>,
    /// Devices that XDP was attached to.
    bypassing: BTreeMap<u32, Mode>,
    meta: Meta,
    /// Until they are known, links of an earlier run stay as they are.
    devices: Option<Devices>,
    activated: bool,
    /// Programs were loaded, not adopted: filters of another way to attach may be about.
    fresh: bool,
}

impl Hooks {
    /// Adopts the pinned programs if they are the ones we would load, loads and pins ours otherwise. Attaches nothing yet.
    ///
    /// `maps`: every map with its size; `map_path` says where each is pinned.
    pub(crate) fn open(
        layout: &Layout,
        options: &Options,
        stored: &sys::Map<u32, Meta>,
        maps: &[(MapName, u32)],
        map_path: &dyn Fn(MapName) -> PathBuf,
    ) -> Result<Self, DataplaneError> {
        let object = options.object()?;
        let globals = Globals::of(options)?;
        let wanted = programs::wanted(options.socket_lb, options.xdp);
        let digest = globals.digest(object, &wanted, maps);
        let found = stored.get(&0).map_err(kernel("map meta"))?.unwrap_or_default();
        let mut meta =
            Meta { layout: LAYOUT_VERSION, pad: 0, programs: 0, node_netns_cookie: globals.node_netns_cookie };
        if found.node_netns_cookie != 0 && found.node_netns_cookie != meta.node_netns_cookie {
            // Interface indexes in the names of the links mean devices of another namespace.
            links::remove(layout, links::is_devices).map_err(kernel("links of another network namespace"))?;
        }
        // Programs whose maps lost their pins would go on with maps that nobody else sees. And a logger can only be had from
        // programs loaded by this process.
        let adopted = match (programs::open(layout, &wanted), programs::map_ids(maps, map_path)) {
            (Ok(programs), Ok(maps)) if options.log_level == 0 => {
                meta.programs = programs::fingerprint(digest, &programs, &maps);
                (found == meta).then_some(programs)
            }
            _ => None,
        };
        let fresh = adopted.is_none();
        let Loaded { programs, without_xdp } = match adopted {
            Some(programs) => {
                tracing::info!(programs = programs.len(), "adopted the pinned programs");
                Loaded { programs, without_xdp: None }
            }
            None => {
                // One without XDP that should be there is not adopted by the next start: the kernel is asked again.
                let loaded = programs::load(object, &globals, (&wanted, options.xdp), maps, map_path)?;
                // From here on nobody adopts what is pinned, until every link holds these programs.
                meta.programs = 0;
                if found != meta {
                    stored.put(&0, &meta, sys::ANY).map_err(kernel("map meta"))?;
                }
                programs::pin(layout, &loaded.programs)?;
                let maps = programs::map_ids(maps, map_path).map_err(kernel("pinned maps"))?;
                meta.programs = programs::fingerprint(digest, &loaded.programs, &maps);
                loaded
            }
        };
        let cgroup = match options.socket_lb {
            SocketLb::Off => None,
            SocketLb::All | SocketLb::Node => Some(Cgroup::open(options.cgroup_root.as_deref())?),
        };
        let tcx = match options.tc {
            Tc::Tcx => true,
            Tc::Clsact => false,
            Tc::Auto => programs
                .iter()
                .find(|p| p.name == "tc_ingress_ether")
                .is_some_and(|program| has_tcx(program.fd.as_fd())),
        };
        Ok(Self {
            layout: layout.clone(),
            programs,
            cgroup,
            tcx,
            xdp: options.xdp,
            without_xdp,
            bypassing: BTreeMap::new(),
            meta,
            devices: None,
            activated: false,
            fresh,
        })
    }

    /// Where connect-time programs are attached, if they are.
    pub(crate) fn cgroup_root(&self) -> Option<&Path> {
        self.cgroup.as_ref().map(|cgroup| cgroup.path.as_path())
    }

    pub(crate) const fn meta(&self) -> &Meta {
        &self.meta
    }

    fn program(&self, name: &str) -> io::Result<&Program> {
        self.programs
            .iter()
            .find(|program| program.name == name)
            .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("program {name} is not loaded")))
    }

    /// Attaches the connect-time programs, and puts back what the known devices have lost.
    pub(crate) fn activate(&mut self, report: &mut Report) -> Result<(), DataplaneError> {
        self.activated = true;
        let mut wanted = BTreeSet::new();
        if let Some(cgroup) = &self.cgroup {
            for (name, attach_type) in CGROUP_PROGRAMS {
                wanted.insert(name.to_owned());
                let program = self.program(name).map_err(kernel(format!("cgroup {}", cgroup.path.display())))?;
                report.writes += links::ensure(
                    &self.layout.links.join(name),
                    program,
                    Target::Cgroup(cgroup.fd.as_fd()),
                    cgroup.id,
                    attach_type,
                )
                .map_err(kernel(format!("attach {name} to cgroup {}", cgroup.path.display())))?;
            }
        }
        report.writes += links::remove(&self.layout, |name| !links::is_devices(name) && !wanted.contains(name))
            .map_err(kernel("links that are not wanted any more"))?;
        if let Some(devices) = self.devices.take() {
            self.set_devices(&devices, report);
        }
        Ok(())
    }

    /// Whether these are the first ones, and an earlier run has not left links, or filters, on all of them.
    pub(crate) fn are_new(&self, devices: &Devices) -> bool {
        let is_there = |index: u32, direction| {
            if self.tcx {
                self.layout.links.join(tcx_name(index, direction)).exists()
            } else {
                clsact::program(index, direction).is_ok_and(|program| program.is_some())
            }
        };
        self.devices.is_none()
            && devices.keys().any(|index| !Direction::BOTH.into_iter().all(|direction| is_there(*index, direction)))
    }

    /// Attaches to exactly these devices.
    pub(crate) fn set_devices(&mut self, devices: &Devices, report: &mut Report) {
        self.attach_devices(devices, report);
        self.attach_xdp(devices, report);
        self.devices = Some(devices.clone());
    }

    /// Whether nothing runs on what came before: each link and each filter that exists holds a program of ours. One that could
    /// not be made is no obstacle.
    pub(crate) fn is_settled(&self) -> bool {
        self.activated && self.devices.is_some() && self.lagging().is_empty()
    }

    /// What runs on what came before although it should have moved.
    pub(crate) fn lagging(&self) -> Vec<String> {
        let ours = |id: u32| self.programs.iter().any(|program| program.id == id);
        // A link without a target is dead: its device is gone. A connect-time one is not to move before it is activated.
        let is_due = |name: &String| if links::is_devices(name) { self.devices.is_some() } else { self.activated };
        let link = |name: &String| {
            sys::open(&self.layout.links.join(name))
                .and_then(|link| sys::link_info(link.as_fd()))
                .is_ok_and(|info| info.target == 0 || ours(info.program_id))
        };
        let filter = |index: u32, direction| clsact::program(index, direction).ok().flatten().is_none_or(ours);
        let mut lagging = match list(&self.layout.links) {
            Ok(names) => names.into_iter().filter(|name| is_due(name) && !link(name)).collect(),
            Err(error) => vec![format!("{}: {error}", self.layout.links.display())],
        };
        for (index, device) in self.devices.iter().flatten().filter(|_| !self.tcx) {
            let held = Direction::BOTH.into_iter().filter(|direction| !filter(*index, *direction));
            lagging.extend(held.map(|direction| format!("{}/{}", device.name, direction.as_str())));
        }
        lagging
    }

    fn attach_devices(&self, devices: &Devices, report: &mut Report) {
        for (index, device) in devices {
            for direction in Direction::BOTH {
                match self.attach_device(*index, device, direction) {
                    Ok(writes) => report.writes += writes,
                    // The device is gone; the next list of devices will not have it.
                    Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {}
                    Err(error) => {
                        let why = format!("device {}: cannot attach at {}: {error}", device.name, direction.as_str());
                        report.failed_devices.insert(device.name.clone(), Failure::Retry(why));
                    }
                }
            }
        }
        let wanted: BTreeSet<String> = if self.tcx {
            devices.keys().flat_map(|index| Direction::BOTH.map(|d| tcx_name(*index, d))).collect()
        } else {
            BTreeSet::new()
        };
        match links::remove(&self.layout, |name| name.starts_with("tcx-") && !wanted.contains(name)) {
            Ok(writes) => report.writes += writes,
            Err(error) => tracing::warn!(%error, "links of devices that are gone stay pinned"),
        }
    }

    fn attach_device(&self, index: u32, device: &Device, direction: Direction) -> io::Result<u64> {
        let program = self.program(tc_program(direction, device.ethernet))?;
        if self.tcx {
            links::ensure(
                &self.layout.links.join(tcx_name(index, direction)),
                program,
                Target::Interface(index),
                u64::from(index),
                tcx_type(direction),
            )
        } else if clsact::program(index, direction)? == Some(program.id) {
            Ok(0)
        } else {
            clsact::attach(index, direction, program.fd.as_fd(), program.name)?;
            Ok(1)
        }
    }

    /// The outward ones of these devices that XDP is of use on; of the others the report says why not.
    pub(crate) fn for_xdp(&self, devices: &Devices, report: &mut Report) -> BTreeSet<u32> {
        let mut wanted = BTreeSet::new();
        let is_asked_for = self.xdp.mode().is_some();
        for (index, device) in devices.iter().filter(|(_, d)| is_asked_for && d.role == DeviceRole::Outward) {
            match xdp::bars(device).or(self.without_xdp.as_deref()) {
                Some(why) => {
                    report.without_xdp.insert(device.name.clone(), Failure::Unsupported(why.to_owned()));
                }
                None => {
                    wanted.insert(*index);
                }
            }
        }
        wanted
    }

    /// To exactly those devices.
    fn attach_xdp(&mut self, devices: &Devices, report: &mut Report) {
        let mode = self.xdp.mode();
        let wanted = self.for_xdp(devices, report);
        let names: BTreeSet<String> =
            mode.iter().flat_map(|mode| wanted.iter().map(|index| xdp_name(*index, *mode))).collect();
        // Before others come: a device has one in one mode.
        match links::remove(&self.layout, |name| name.starts_with("xdp-") && !names.contains(name)) {
            Ok(writes) => report.writes += writes,
            Err(error) => tracing::warn!(%error, "XDP links that are not wanted any more stay pinned"),
        }
        self.bypassing.clear();
        let Some(mode) = mode else { return };
        for (index, device) in devices.iter().filter(|(index, _)| wanted.contains(index)) {
            let attached = self.program(XDP_PROGRAM).and_then(|program| {
                let target = Target::Xdp(*index, mode.flags());
                let pin = self.layout.links.join(xdp_name(*index, mode));
                links::ensure(&pin, program, target, u64::from(*index), links::XDP)
            });
            match attached {
                Ok(writes) => {
                    report.writes += writes;
                    self.bypassing.insert(*index, mode);
                }
                // The device is gone; the next list of devices will not have it.
                Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {}
                Err(error) => {
                    report.without_xdp.insert(device.name.clone(), self.xdp.refusal(mode, &error));
                }
            }
        }
    }

    /// What the XDP program must know of the devices that it is on. Asked for once it is there: a driver may need it to be able to send.
    pub(crate) fn xdp_devices(&self) -> BTreeMap<u32, XdpDevice> {
        let value = |(index, mode): (&u32, &Mode)| {
            let device = self.devices.as_ref()?.get(index)?;
            let [a, b, c, d, e, f] = device.mac?;
            let mac = [[a, b], [c, d], [e, f]].map(u16::from_ne_bytes);
            let generic = *mode == Mode::Generic;
            let sends = if generic || xdp::sends(*index) { flags::SENDS } else { 0 };
            let bounces = if generic || !device.veth { flags::BOUNCES } else { 0 };
            let sums = if !generic && xdp::makes_sums(*index, &device.name) { flags::SUMS } else { 0 };
            Some((*index, XdpDevice { mac, flags: sends | bounces | sums }))
        };
        self.bypassing.iter().filter_map(value).collect()
    }

    /// Takes our filters off devices that may carry some (`known`) and should not: all others than `devices`, and with TCX all.
    /// (TCX links go with their pins.) Returns the devices that still have one, which are reported, so that it is tried again.
    pub(crate) fn detach_others(&mut self, known: &[u32], devices: &Devices, report: &mut Report) -> BTreeSet<u32> {
        let mut left = BTreeSet::new();
        if self.tcx && !self.fresh {
            return left;
        }
        for index in known.iter().filter(|index| self.tcx || !devices.contains_key(index)) {
            for direction in Direction::BOTH {
                match clsact::detach(*index, direction) {
                    Ok(was_there) => report.writes += u64::from(was_there),
                    Err(error) => {
                        let name = interface_name(*index);
                        let why =
                            format!("device {name}: cannot remove the tc filter at {}: {error}", direction.as_str());
                        report.failed_devices.insert(name, Failure::Retry(why));
                        left.insert(*index);
                    }
                }
            }
        }
        self.fresh = !left.is_empty();
        left
    }

    /// Hooks that should be in force, each with whether it is; `None` where that cannot be asked, or its device is gone.
    fn expected(&self) -> Vec<(Hook, Option<bool>)> {
        let mut hooks = vec![];
        if let Some(cgroup) = self.cgroup.as_ref().filter(|_| self.activated) {
            for (name, _) in CGROUP_PROGRAMS {
                let hook = Hook {
                    kind: format!("cgroup/{name}"),
                    target: cgroup.path.display().to_string(),
                    program: name.to_owned(),
                };
                hooks.push((hook, self.holds(&self.layout.links.join(name), name, cgroup.id)));
            }
        }
        for (index, device) in self.devices.iter().flatten() {
            for direction in Direction::BOTH {
                let name = tc_program(direction, device.ethernet);
                let holds = if self.tcx {
                    self.holds(&self.layout.links.join(tcx_name(*index, direction)), name, u64::from(*index))
                } else {
                    let id = self.program(name).map(|p| p.id).ok();
                    clsact::program(*index, direction).ok().map(|held| held.is_some() && held == id)
                };
                // What is said of devices lags behind the kernel.
                let holds = holds.filter(|holds| *holds || !links::is_gone(*index));
                let kind = if self.tcx { "tcx" } else { "clsact" };
                let hook = Hook {
                    kind: format!("{kind}/{}", direction.as_str()),
                    target: device.name.clone(),
                    program: name.to_owned(),
                };
                hooks.push((hook, holds));
            }
        }
        for (index, mode) in &self.bypassing {
            let name = self.devices.iter().flatten().find(|(i, _)| *i == index).map(|(_, device)| device.name.clone());
            let hook = Hook {
                kind: format!("xdp/{}", mode.as_str()),
                target: name.unwrap_or_else(|| format!("interface {index}")),
                program: XDP_PROGRAM.to_owned(),
            };
            let pin = self.layout.links.join(xdp_name(*index, *mode));
            let holds = self.holds(&pin, XDP_PROGRAM, u64::from(*index));
            hooks.push((hook, holds.filter(|holds| *holds || !links::is_gone(*index))));
        }
        hooks
    }

    fn holds(&self, pin: &Path, program: &str, target: u64) -> Option<bool> {
        match sys::open(pin).and_then(|link| sys::link_info(link.as_fd())) {
            Ok(info) => Some(info.target == target && self.program(program).is_ok_and(|p| p.id == info.program_id)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Some(false),
            Err(_) => None,
        }
    }

    pub(crate) fn in_force(&self) -> Vec<Hook> {
        self.expected().into_iter().filter(|(_, holds)| *holds == Some(true)).map(|(hook, _)| hook).collect()
    }

    pub(crate) fn lost(&self) -> Vec<String> {
        self.expected().into_iter().filter(|(_, holds)| *holds == Some(false)).map(|(hook, _)| hook.name()).collect()
    }

    /// Programs that run before ours on devices, where the kernel can say so. Of clsact's filters those of a lesser priority do; who puts
    /// one there knows.
    pub(crate) fn ahead(&self) -> Vec<Ahead> {
        let mut ahead = vec![];
        for (index, device) in self.devices.iter().flatten().filter(|_| self.tcx) {
            for direction in Direction::BOTH {
                let own = self.program(tc_program(direction, device.ethernet)).map(|program| program.id);
                let attached = sys::attached(*index, tcx_type(direction));
                let (Ok(own), Ok(attached)) = (own, attached) else { continue };
                let programs: Vec<u32> = attached.iter().copied().take_while(|id| *id != own).collect();
                // Without ours among them nobody is in front of it.
                if !programs.is_empty() && programs.len() < attached.len() {
                    let kind = format!("tcx/{}", direction.as_str());
                    ahead.push(Ahead { kind, target: device.name.clone(), programs });
                }
            }
        }
        ahead
    }
}

/// Removes every link and every program pin, whoever made them in this directory.
pub(crate) fn remove_all(layout: &Layout, known_devices: &[u32]) -> io::Result<()> {
    for index in known_devices {
        for direction in Direction::BOTH {
            clsact::detach(*index, direction)?;
        }
    }
    links::remove(layout, |_| true)?;
    for name in list(&layout.programs)? {
        fs::remove_file(layout.programs.join(name))?;
    }
    Ok(())
}
