//! What eBPF left in force, where another mode takes over.
//!
//! Retired it has no frontend and no guard: what is new passes to whoever is behind it, and what is open goes on by the connection
//! table, without which it would break. The programs that translate at connect time are needed by sockets that were pointed at a backend, for
//! as long as those ask who their peer is.

use std::{
    io,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use proxy_common::{
    Ipv4Be, Ipv6Be,
    device::XdpDevice,
    frontend::{FrontendKey, FrontendValue},
};

use super::{
    Options, Timeouts,
    family::Family,
    hygiene::{self, Census, Hygiene},
    layout::MapName,
    noted,
    pins::{Layout, PinError, Pinned},
    remove_all,
    sys::{self, Map},
};
use crate::{
    dataplane::{DataplaneError, former, select::Mode},
    model::Protocol,
};

/// Connections of sockets that were pointed at a backend need no program: who their peer is is all they would hear otherwise.
const SOCKETS_COUNT_FOR: Duration = Duration::from_secs(24 * 3600);

/// See the module.
#[derive(Debug)]
pub(crate) struct Former {
    pinned: Pinned,
    census: Census,
    /// Maybe by an earlier process.
    retired: Option<SystemTime>,
}

impl Former {
    /// `None` where nothing is pinned. Fails where an agent holds the pins, which is at work here, and where they cannot be taken out of force:
    /// the programs come before netfilter, so they would go on choosing backends by what was true when they were left, and nobody would hear of
    /// the new mode.
    pub(crate) fn find(options: &Options) -> Result<Option<(Self, Hygiene)>, DataplaneError> {
        let Some(former) = Self::open(&options.bpffs, options.timeouts)? else { return Ok(None) };
        let tcp = hygiene::reaches_sockets(Protocol::Tcp);
        let pods = hygiene::reaches_sockets(Protocol::Udp).or_else(|why| tcp.map_err(|_| why));
        let Self { pinned, census, retired: _ } = &former;
        let hygiene = Hygiene::start(pinned.layout.clone(), pods, census.timeouts(), Arc::clone(&options.ended))
            .map_err(super::kernel("start the thread that ends stale flows"))?;
        Ok(Some((former, hygiene)))
    }

    fn open(bpffs: &Path, otherwise: Timeouts) -> Result<Option<Self>, DataplaneError> {
        let there = Layout::of(bpffs).version.try_exists();
        if !there.map_err(super::kernel("look for what an agent in mode ebpf left (--bpffs)"))? {
            return Ok(None);
        }
        let pinned = match Pinned::open(bpffs) {
            Ok(pinned) => pinned,
            // Whatever that is, no program hangs on it.
            Err(PinError::NotBpffs { .. }) => return Ok(None),
            Err(error) => return Err(in_the_way(&error)),
        };
        may_be_emptied(&pinned.layout).map_err(|error| in_the_way(&error))?;
        // What this agent was told may be something else, and is of a mode that it does not run in.
        let timeouts = noted::timeouts(&pinned.layout, otherwise);
        Ok(Some(Self { pinned, census: Census::new(timeouts), retired: None }))
    }
}

/// What an agent left, held as if one ran on it while its connections end: new ones are left to whoever is behind.
#[derive(Debug)]
pub struct Drain(Former);

impl Drain {
    /// `None` where nothing is pinned.
    pub fn begin(bpffs: &Path) -> Result<Option<Self>, DataplaneError> {
        let Some(mut former) = Former::open(bpffs, Timeouts::default())? else { return Ok(None) };
        former::Former::retire(&mut former)?;
        Ok(Some(Self(former)))
    }

    /// Flows that the programs translate packet by packet, or datagram by datagram. Sockets that were pointed at a backend go on without them.
    pub fn flows(&mut self) -> Result<u64, DataplaneError> {
        self.0.count(false)
    }

    pub fn remove(mut self) -> Result<(), DataplaneError> {
        former::Former::remove(&mut self.0)
    }
}

impl former::Former for Former {
    fn name(&self) -> &'static str {
        Mode::Ebpf.name()
    }

    fn is_there(&mut self) -> Result<bool, DataplaneError> {
        self.pinned.layout.version.try_exists().map_err(super::kernel("look for the pins of eBPF"))
    }

    fn retire(&mut self) -> Result<(), DataplaneError> {
        let layout = &self.pinned.layout;
        empty(layout).map_err(super::kernel("take the frontends of eBPF out of force"))?;
        self.retired = Some(noted::retire(layout).map_err(super::kernel("note since when eBPF is retired"))?);
        Ok(())
    }

    fn flows(&mut self) -> Result<u64, DataplaneError> {
        // A clock that was set back says nothing.
        let sockets = self.retired.is_none_or(|retired| retired.elapsed().unwrap_or_default() < SOCKETS_COUNT_FOR);
        self.count(sockets)
    }

    fn remove(&mut self) -> Result<(), DataplaneError> {
        remove_all(&self.pinned.layout)
    }
}

impl Former {
    fn count(&mut self, sockets: bool) -> Result<u64, DataplaneError> {
        unless_broken_off(self.census.count(&self.pinned.layout, sockets))
            .map_err(super::kernel("count the flows of eBPF"))
    }
}

fn in_the_way(error: &dyn std::error::Error) -> DataplaneError {
    DataplaneError::Unavailable(format!(
        "what an agent in mode ebpf left is in force, and cannot be retired: {error}; `proxy-agent cleanup` removes it"
    ))
}

/// Without CAP_BPF, say, that would show only when this mode is in force.
fn may_be_emptied(layout: &Layout) -> io::Result<()> {
    for map in maps::<u32, u32>(layout, MapName::Alone)? {
        let value = map.get(&0)?.unwrap_or_default();
        map.put(&0, &value, sys::ANY).map_err(|error| {
            io::Error::new(error.kind(), format!("{}: {error}; it takes CAP_BPF", layout.map(MapName::Alone).display()))
        })?;
    }
    Ok(())
}

/// Where a map is missing an agent died while it made them, or while it removed them: hooks come after that, and go before.
fn unless_broken_off(flows: io::Result<u64>) -> io::Result<u64> {
    match flows {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
        flows => flows,
    }
}

/// Guards first: what has a guard and no frontend is refused.
fn empty(layout: &Layout) -> io::Result<()> {
    // Before anybody else can have a flow: whoever takes up these maps again, also half emptied, comes after somebody who translates, and
    // would reset what that one has open.
    for map in maps::<u32, u32>(layout, MapName::Alone)? {
        map.put(&0, &0, sys::ANY)?;
    }
    for guards in [true, false] {
        empty_frontends::<Ipv4Be>(layout, guards)?;
        empty_frontends::<Ipv6Be>(layout, guards)?;
    }
    // XDP leaves the rest to tc, which has the same table.
    for map in maps::<u32, XdpDevice>(layout, MapName::XdpDevices)? {
        let indices: Vec<u32> = map.entries()?.into_iter().map(|(index, _)| index).collect();
        map.remove_all(&indices)?;
    }
    Ok(())
}

fn empty_frontends<A: Family>(layout: &Layout, guards: bool) -> io::Result<()> {
    for map in maps::<A::Key, FrontendValue>(layout, A::FRONTENDS)? {
        let mut keys = Vec::new();
        map.each(|key: A::Key, _| {
            let is_guard = Into::<FrontendKey<A>>::into(key).is_guard();
            if is_guard == guards {
                keys.push(key);
            }
        })?;
        map.remove_all(&keys)?;
    }
    Ok(())
}

/// A map, and those that links use in its place while sizes change.
pub(super) fn maps<K: aya::Pod, V: aya::Pod>(layout: &Layout, name: MapName) -> io::Result<Vec<Map<K, V>>> {
    let mut maps = Vec::new();
    for path in [layout.map(name), layout.resized(name), layout.former(name)] {
        match sys::open(&path).and_then(Map::new) {
            Ok(map) => maps.push(map),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(maps)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Or it would be retired for ever, and named as a trouble.
    #[test]
    fn what_is_half_there_has_no_flows() {
        let empty = tempfile::tempdir().unwrap();
        let layout = Layout::of(empty.path());
        super::empty(&layout).unwrap();
        let counted = Census::new(Options::default().timeouts).count(&layout, false);
        assert_eq!(unless_broken_off(counted).unwrap(), 0);
        assert!(unless_broken_off(Err(io::ErrorKind::PermissionDenied.into())).is_err());
    }
}
