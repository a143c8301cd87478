//! The pinned maps, open: what [`Table`](super::table::Table) writes to in a real kernel.

use std::{
    collections::BTreeSet,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    ptr,
    sync::atomic::{AtomicU64, Ordering},
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use proxy_common::{
    Address, Ipv4Be, Ipv6Be,
    affinity::{AffinityKey, AffinityValue},
    counters::ServiceCounters,
    device::{DeviceValue, XdpDevice},
    frontend::{FrontendKey, FrontendValue},
    local_cidr::{LocalCidrKey, LocalCidrValue},
    meta::{Meta, ServiceName},
    slot::{Slot, SlotV4, SlotV6},
    source_range::SourceRangeKey,
};
use rustix::mm::{MapFlags, ProtFlags};

use super::{
    family::{Family, FrontendMap, SourceMap},
    layout::MapName,
    store::{Result, Store, StoreError},
    sys::{self, Map},
};

/// An array map in our address space, of elements that are words. A store here is seen by programs at once, without a system call.
#[derive(Debug)]
pub(crate) struct MappedArray<T> {
    words: *mut AtomicU64,
    bytes: usize,
    len: u32,
    element: std::marker::PhantomData<T>,
}

// SAFETY: the pointer is to a shared mapping that this value owns; every access to it is atomic.
unsafe impl<T> Send for MappedArray<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for MappedArray<T> {}

impl<T: aya::Pod + Default> MappedArray<T> {
    const WORDS: usize = size_of::<T>() / 8;

    /// Maps the array; `writable` needs a descriptor that was opened for writing.
    pub(crate) fn new(fd: BorrowedFd<'_>, writable: bool) -> io::Result<Self> {
        // What the accesses below rely on: the kernel lays elements of an array out at their size rounded up to 8.
        const { assert!(size_of::<T>().is_multiple_of(8) && align_of::<T>() == 8) };
        let info = sys::map_info(fd)?;
        if info.value as usize != size_of::<T>() || info.kind != sys::map_type::ARRAY {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "not an array of such elements"));
        }
        let bytes = info.max_entries as usize * size_of::<T>();
        let protection = if writable { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ };
        // SAFETY: a fresh mapping at an address of the kernel's choice; nothing else is touched.
        let start = unsafe { rustix::mm::mmap(ptr::null_mut(), bytes, protection, MapFlags::SHARED, fd, 0) }?;
        Ok(Self { words: start.cast(), bytes, len: info.max_entries, element: std::marker::PhantomData })
    }

    pub(crate) const fn len(&self) -> u32 {
        self.len
    }

    fn word(&self, index: u32, word: usize) -> Option<&AtomicU64> {
        let at = (index < self.len && word < Self::WORDS).then(|| index as usize * Self::WORDS + word)?;
        // SAFETY: `index` is below the number of elements, so the word lies in the mapping, which lives as long as `self` and
        // is page-aligned, so the word is 8-byte aligned. Others write it in whole words, too.
        Some(unsafe { &*self.words.add(at) })
    }

    /// An element as it stands; the default where there is none such.
    pub(crate) fn read(&self, index: u32) -> T {
        let mut element = T::default();
        let to = ptr::from_mut(&mut element).cast::<u64>();
        for word in 0..Self::WORDS {
            if let Some(from) = self.word(index, word) {
                // SAFETY: `T` is `WORDS` aligned words of plain data (asserted in `new`).
                unsafe { to.add(word).write(from.load(Ordering::Acquire)) };
            }
        }
        element
    }

    /// Each word in one aligned store, the last with release order: a slot's carries the generation (and, for IPv6, the proof), so
    /// a reader that sees it sees the others.
    pub(crate) fn write(&self, index: u32, element: &T) {
        let from = ptr::from_ref(element).cast::<u64>();
        for word in 0..Self::WORDS {
            if let Some(to) = self.word(index, word) {
                // SAFETY: `T` is `WORDS` aligned words of plain data (asserted in `new`).
                let value = unsafe { from.add(word).read() };
                to.store(value, if word + 1 == Self::WORDS { Ordering::Release } else { Ordering::Relaxed });
            }
        }
    }
}

impl<T: Slot + aya::Pod> MappedArray<T> {
    /// Copies what fits of another array; for a change of size.
    pub(crate) fn copy_from(&self, other: &Self) {
        for index in 0..self.len.min(other.len) {
            let slot = other.read(index);
            if !slot.is_virgin() {
                self.write(index, &slot);
            }
        }
    }
}

impl<T> Drop for MappedArray<T> {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`, of that length; no reference into it outlives `self`.
        let _ = unsafe { rustix::mm::munmap(self.words.cast(), self.bytes) };
    }
}

/// The maps that the agent itself reads and writes.
#[derive(Debug)]
pub(crate) struct Maps {
    frontends_v4: FrontendMap<Ipv4Be>,
    frontends_v6: FrontendMap<Ipv6Be>,
    slots_v4: MappedArray<SlotV4>,
    slots_v6: MappedArray<SlotV6>,
    sources_v4: SourceMap<Ipv4Be>,
    sources_v6: SourceMap<Ipv6Be>,
    local_cidrs_v4: Map<LocalCidrKey<Ipv4Be>, LocalCidrValue>,
    local_cidrs_v6: Map<LocalCidrKey<Ipv6Be>, LocalCidrValue>,
    affinity_v4: Map<AffinityKey, AffinityValue<Ipv4Be>>,
    affinity_v6: Map<AffinityKey, AffinityValue<Ipv6Be>>,
    names: Map<u32, ServiceName>,
    counters: OwnedFd,
    devices: Map<u32, DeviceValue>,
    bridges: Map<u32, u32>,
    xdp_devices: Map<u32, XdpDevice>,
    meta: Map<u32, Meta>,
    writes: u64,
}

impl Maps {
    /// Opens the pins; `path` says where each map is.
    pub(crate) fn open(path: impl Fn(MapName) -> PathBuf) -> Result<Self> {
        let fd = |map: MapName| sys::open(&path(map)).map_err(|source| StoreError::Io { map, source });
        fn typed<K: aya::Pod, V: aya::Pod>(map: MapName, fd: OwnedFd) -> Result<Map<K, V>> {
            Map::new(fd).map_err(|source| StoreError::Io { map, source })
        }
        fn slots<T: Slot + aya::Pod>(map: MapName, fd: OwnedFd) -> Result<MappedArray<T>> {
            MappedArray::new(fd.as_fd(), true).map_err(|source| StoreError::Io { map, source })
        }
        Ok(Self {
            frontends_v4: typed(MapName::FrontendsV4, fd(MapName::FrontendsV4)?)?,
            frontends_v6: typed(MapName::FrontendsV6, fd(MapName::FrontendsV6)?)?,
            slots_v4: slots(MapName::SlotsV4, fd(MapName::SlotsV4)?)?,
            slots_v6: slots(MapName::SlotsV6, fd(MapName::SlotsV6)?)?,
            sources_v4: typed(MapName::SourceRangesV4, fd(MapName::SourceRangesV4)?)?,
            sources_v6: typed(MapName::SourceRangesV6, fd(MapName::SourceRangesV6)?)?,
            local_cidrs_v4: typed(MapName::LocalCidrsV4, fd(MapName::LocalCidrsV4)?)?,
            local_cidrs_v6: typed(MapName::LocalCidrsV6, fd(MapName::LocalCidrsV6)?)?,
            affinity_v4: typed(MapName::AffinityV4, fd(MapName::AffinityV4)?)?,
            affinity_v6: typed(MapName::AffinityV6, fd(MapName::AffinityV6)?)?,
            names: typed(MapName::Names, fd(MapName::Names)?)?,
            counters: fd(MapName::ServiceCounters)?,
            devices: typed(MapName::Devices, fd(MapName::Devices)?)?,
            bridges: typed(MapName::Bridges, fd(MapName::Bridges)?)?,
            xdp_devices: typed(MapName::XdpDevices, fd(MapName::XdpDevices)?)?,
            meta: typed(MapName::Meta, fd(MapName::Meta)?)?,
            writes: 0,
        })
    }

    pub(crate) fn meta(&self) -> io::Result<Meta> {
        Ok(self.meta.get(&0)?.unwrap_or_default())
    }

    /// Writes only what differs.
    pub(crate) fn set_meta(&mut self, meta: &Meta) -> io::Result<()> {
        if self.meta()? != *meta {
            self.meta.put(&0, meta, sys::ANY)?;
            self.writes += 1;
        }
        Ok(())
    }

    fn refused(&self, map: MapName, fd: BorrowedFd<'_>, source: io::Error) -> StoreError {
        match (source.raw_os_error(), sys::map_info(fd)) {
            // A trie has a word of its own for it.
            (Some(libc::E2BIG | libc::ENOSPC), Ok(info)) => StoreError::Full { map, capacity: info.max_entries },
            _ => StoreError::Io { map, source },
        }
    }
}

fn v4_key(cidr: Ipv4Net) -> LocalCidrKey<Ipv4Be> {
    LocalCidrKey { prefix: u32::from(cidr.prefix_len()), addr: Ipv4Be::from_octets(cidr.network().octets()) }
}

fn v6_key(cidr: Ipv6Net) -> LocalCidrKey<Ipv6Be> {
    LocalCidrKey { prefix: u32::from(cidr.prefix_len()), addr: Ipv6Be::from_octets(cidr.network().octets()) }
}

/// What nobody could have written is left out.
fn cidrs<A: Address>(
    map: &Map<LocalCidrKey<A>, LocalCidrValue>,
    name: MapName,
) -> Result<impl Iterator<Item = IpNet> + use<A>>
where
    LocalCidrKey<A>: aya::Pod,
{
    let entries = map.entries().map_err(|source| StoreError::Io { map: name, source })?;
    let net =
        |LocalCidrKey { prefix, addr }: LocalCidrKey<A>| IpNet::new(addr.to_ip(), u8::try_from(prefix).ok()?).ok();
    Ok(entries.into_iter().filter_map(move |(key, _)| net(key)))
}

impl Store for Maps {
    fn slots<A: Family>(&self) -> u32 {
        A::slots(&self.slots_v4, &self.slots_v6).len()
    }

    fn slot<A: Family>(&self, index: u32) -> A::Slot {
        A::slots(&self.slots_v4, &self.slots_v6).read(index)
    }

    fn write_slot<A: Family>(&mut self, index: u32, slot: A::Slot) -> Result<()> {
        A::slots(&self.slots_v4, &self.slots_v6).write(index, &slot);
        self.writes += 1;
        Ok(())
    }

    fn frontends<A: Family>(&self) -> Result<Vec<(FrontendKey<A>, FrontendValue)>> {
        let entries = A::frontends(&self.frontends_v4, &self.frontends_v6)
            .entries()
            .map_err(|source| StoreError::Io { map: A::FRONTENDS, source })?;
        Ok(entries.into_iter().map(|(key, value)| (key.into(), value)).collect())
    }

    fn put_frontends<A: Family>(&mut self, entries: &[(FrontendKey<A>, FrontendValue)]) -> (usize, Option<StoreError>) {
        let map = A::frontends(&self.frontends_v4, &self.frontends_v6);
        let (keys, values): (Vec<A::Key>, Vec<_>) = entries.iter().map(|(k, v)| (A::Key::from(*k), *v)).unzip();
        let (landed, error) = map.put_all(&keys, &values, sys::ANY);
        let error = error.map(|source| self.refused(A::FRONTENDS, map.fd(), source));
        self.writes += landed as u64;
        (landed, error)
    }

    fn remove_frontends<A: Family>(&mut self, keys: &[FrontendKey<A>]) -> Result<()> {
        let keys: Vec<A::Key> = keys.iter().map(|key| A::Key::from(*key)).collect();
        let removed = A::frontends(&self.frontends_v4, &self.frontends_v6)
            .remove_all(&keys)
            .map_err(|source| StoreError::Io { map: A::FRONTENDS, source })?;
        self.writes += removed as u64;
        Ok(())
    }

    fn source_ranges<A: Family>(&self) -> Result<Vec<SourceRangeKey<A>>> {
        let entries = A::sources(&self.sources_v4, &self.sources_v6)
            .entries()
            .map_err(|source| StoreError::Io { map: A::SOURCE_RANGES, source })?;
        Ok(entries.into_iter().map(|(key, _)| key.into()).collect())
    }

    fn put_source_range<A: Family>(&mut self, key: &SourceRangeKey<A>) -> Result<()> {
        let map = A::sources(&self.sources_v4, &self.sources_v6);
        map.put(&A::SourceKey::from(*key), &1, sys::ANY)
            .map_err(|source| self.refused(A::SOURCE_RANGES, map.fd(), source))?;
        self.writes += 1;
        Ok(())
    }

    fn remove_source_range<A: Family>(&mut self, key: &SourceRangeKey<A>) -> Result<()> {
        let removed = A::sources(&self.sources_v4, &self.sources_v6)
            .remove(&A::SourceKey::from(*key))
            .map_err(|source| StoreError::Io { map: A::SOURCE_RANGES, source })?;
        self.writes += u64::from(removed);
        Ok(())
    }

    fn local_cidrs(&self) -> Result<BTreeSet<IpNet>> {
        let Self { local_cidrs_v4: v4, local_cidrs_v6: v6, .. } = self;
        Ok(cidrs(v4, MapName::LocalCidrsV4)?.chain(cidrs(v6, MapName::LocalCidrsV6)?).collect())
    }

    fn put_local_cidr(&mut self, cidr: IpNet) -> Result<()> {
        let (map, fd, put) = match cidr {
            IpNet::V4(cidr) => {
                let map = &self.local_cidrs_v4;
                (MapName::LocalCidrsV4, map.fd(), map.put(&v4_key(cidr), &1, sys::ANY))
            }
            IpNet::V6(cidr) => {
                let map = &self.local_cidrs_v6;
                (MapName::LocalCidrsV6, map.fd(), map.put(&v6_key(cidr), &1, sys::ANY))
            }
        };
        put.map_err(|source| self.refused(map, fd, source))?;
        self.writes += 1;
        Ok(())
    }

    fn remove_local_cidr(&mut self, cidr: IpNet) -> Result<()> {
        let (map, removed) = match cidr {
            IpNet::V4(cidr) => (MapName::LocalCidrsV4, self.local_cidrs_v4.remove(&v4_key(cidr))),
            IpNet::V6(cidr) => (MapName::LocalCidrsV6, self.local_cidrs_v6.remove(&v6_key(cidr))),
        };
        self.writes += u64::from(removed.map_err(|source| StoreError::Io { map, source })?);
        Ok(())
    }

    fn prune_affinity(&mut self, is_over: &dyn Fn(u32, u32) -> bool) -> Result<usize> {
        Ok(prune(&self.affinity_v4, MapName::AffinityV4, is_over, |value| value.seen)?
            + prune(&self.affinity_v6, MapName::AffinityV6, is_over, |value| value.seen)?)
    }

    fn names(&self) -> Result<Vec<(u32, ServiceName)>> {
        self.names.entries().map_err(|source| StoreError::Io { map: MapName::Names, source })
    }

    fn put_name(&mut self, id: u32, name: &ServiceName) -> Result<()> {
        self.names.put(&id, name, sys::ANY).map_err(|source| self.refused(MapName::Names, self.names.fd(), source))?;
        self.writes += 1;
        Ok(())
    }

    fn remove_name(&mut self, id: u32) -> Result<()> {
        let removed = self.names.remove(&id).map_err(|source| StoreError::Io { map: MapName::Names, source })?;
        self.writes += u64::from(removed);
        Ok(())
    }

    fn remove_counters(&mut self, id: u32) -> Result<()> {
        let removed = sys::remove(self.counters.as_fd(), &id)
            .map_err(|source| StoreError::Io { map: MapName::ServiceCounters, source })?;
        self.writes += u64::from(removed);
        Ok(())
    }

    fn devices(&self) -> Result<Vec<(u32, DeviceValue)>> {
        self.devices.entries().map_err(|source| StoreError::Io { map: MapName::Devices, source })
    }

    fn put_device(&mut self, index: u32, value: &DeviceValue) -> Result<()> {
        self.devices
            .put(&index, value, sys::ANY)
            .map_err(|source| self.refused(MapName::Devices, self.devices.fd(), source))?;
        self.writes += 1;
        Ok(())
    }

    fn remove_device(&mut self, index: u32) -> Result<()> {
        let removed = self.devices.remove(&index).map_err(|source| StoreError::Io { map: MapName::Devices, source })?;
        self.writes += u64::from(removed);
        Ok(())
    }

    fn bridges(&self) -> Result<Vec<(u32, u32)>> {
        self.bridges.entries().map_err(|source| StoreError::Io { map: MapName::Bridges, source })
    }

    fn put_bridge(&mut self, port: u32, bridge: u32) -> Result<()> {
        self.bridges
            .put(&port, &bridge, sys::ANY)
            .map_err(|source| self.refused(MapName::Bridges, self.bridges.fd(), source))?;
        self.writes += 1;
        Ok(())
    }

    fn remove_bridge(&mut self, port: u32) -> Result<()> {
        let removed = self.bridges.remove(&port).map_err(|source| StoreError::Io { map: MapName::Bridges, source })?;
        self.writes += u64::from(removed);
        Ok(())
    }

    fn xdp_devices(&self) -> Result<Vec<(u32, XdpDevice)>> {
        self.xdp_devices.entries().map_err(|source| StoreError::Io { map: MapName::XdpDevices, source })
    }

    fn put_xdp_device(&mut self, index: u32, value: &XdpDevice) -> Result<()> {
        self.xdp_devices
            .put(&index, value, sys::ANY)
            .map_err(|source| self.refused(MapName::XdpDevices, self.xdp_devices.fd(), source))?;
        self.writes += 1;
        Ok(())
    }

    fn remove_xdp_device(&mut self, index: u32) -> Result<()> {
        let removed =
            self.xdp_devices.remove(&index).map_err(|source| StoreError::Io { map: MapName::XdpDevices, source })?;
        self.writes += u64::from(removed);
        Ok(())
    }

    fn writes(&self) -> u64 {
        self.writes
    }
}

/// Takes out what is over; how many entries stay.
fn prune<V: aya::Pod>(
    map: &Map<AffinityKey, V>,
    name: MapName,
    is_over: &dyn Fn(u32, u32) -> bool,
    seen: fn(&V) -> u32,
) -> Result<usize> {
    let failed = |source| StoreError::Io { map: name, source };
    let mut left = 0;
    for (key, value) in map.entries().map_err(failed)? {
        // Looked at once more: a program may have noted a new connection meanwhile.
        if is_over(key.service, seen(&value))
            && map.get(&key).map_err(failed)?.is_some_and(|value| is_over(key.service, seen(&value)))
        {
            map.remove(&key).map_err(failed)?;
        } else {
            left += 1;
        }
    }
    Ok(left)
}

/// Copies the entries of a hash map that are `wanted` into another; for a change of size. What does not fit is left out, and counted,
/// where the map may forget anyway (those that programs write), and an error elsewhere; any other error is one everywhere. `flags`:
/// [`sys::NOEXIST`] keeps what is there already.
pub(crate) fn copy_entries(
    map: MapName,
    from: &Path,
    to: &Path,
    flags: u64,
    wanted: &dyn Fn(&[u8]) -> bool,
) -> io::Result<()> {
    let from = sys::open_read_only(from)?;
    let to = sys::open(to)?;
    let info = sys::map_info(from.as_fd())?;
    let (mut failed, mut forgotten) = (None, 0_u64);
    sys::dump(from.as_fd(), info.key as usize, value_size(map)?, |key, value| {
        if !wanted(key) {
            return;
        }
        let Err(error) = sys::put_bytes(to.as_fd(), key, value, flags) else { return };
        match error.raw_os_error() {
            Some(libc::EEXIST) => {}
            // ENOMEM is how a full LRU map says so.
            Some(libc::E2BIG | libc::ENOSPC | libc::ENOMEM) if map.is_written_by_programs() => forgotten += 1,
            _ => failed = Some(error),
        }
    })?;
    if forgotten > 0 {
        tracing::warn!(map = map.as_str(), forgotten, "entries did not fit into the map of the new size");
    }
    failed.map_or(Ok(()), Err)
}

/// Size of one value as system calls see it: all CPUs' values of a per-CPU map, each rounded up to 8.
pub(crate) fn value_size(map: MapName) -> io::Result<usize> {
    let info = map.info(&super::layout::Sizes::default());
    let per_cpu = matches!(info.kind, sys::map_type::PERCPU_HASH | sys::map_type::PERCPU_ARRAY);
    Ok(if per_cpu {
        let cpus = aya::util::nr_cpus().map_err(|(_, error)| error)?;
        (info.value as usize).next_multiple_of(8) * cpus
    } else {
        info.value as usize
    })
}

const _: () = assert!(size_of::<ServiceCounters>().is_multiple_of(8));
