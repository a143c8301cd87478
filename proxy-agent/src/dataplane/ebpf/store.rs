//! What the table writes to: a handful of maps behind a trait, so that every failure and every crash can be played through
//! without a kernel.
//!
//! Each method that writes is counted by the implementation; `writes` is how "nothing changed, nothing written" is proved.

use std::{collections::BTreeSet, io};

use ipnet::IpNet;
use proxy_common::{
    device::{DeviceValue, XdpDevice},
    frontend::{FrontendKey, FrontendValue},
    meta::ServiceName,
    source_range::SourceRangeKey,
};

use super::{family::Family, layout::MapName};

#[derive(Debug, thiserror::Error)]
pub(crate) enum StoreError {
    #[error("map {map} is full ({capacity} entries): raise {option}", option = .map.option())]
    Full { map: MapName, capacity: u32 },
    #[error("map {map}: {source}{}", crate::dataplane::remedy(.source))]
    Io { map: MapName, source: io::Error },
}

pub(crate) type Result<T, E = StoreError> = std::result::Result<T, E>;

pub(crate) trait Store {
    /// Number of slots.
    fn slots<A: Family>(&self) -> u32;
    fn slot<A: Family>(&self, index: u32) -> A::Slot;
    fn write_slot<A: Family>(&mut self, index: u32, slot: A::Slot) -> Result<()>;

    fn frontends<A: Family>(&self) -> Result<Vec<(FrontendKey<A>, FrontendValue)>>;
    /// Writes in order; how many landed, and why no more did.
    fn put_frontends<A: Family>(&mut self, entries: &[(FrontendKey<A>, FrontendValue)]) -> (usize, Option<StoreError>);
    /// Removing what is not there is no error.
    fn remove_frontends<A: Family>(&mut self, keys: &[FrontendKey<A>]) -> Result<()>;

    fn source_ranges<A: Family>(&self) -> Result<Vec<SourceRangeKey<A>>>;
    fn put_source_range<A: Family>(&mut self, key: &SourceRangeKey<A>) -> Result<()>;
    fn remove_source_range<A: Family>(&mut self, key: &SourceRangeKey<A>) -> Result<()>;

    /// Addresses that tell a pod of this node, of both families.
    fn local_cidrs(&self) -> Result<BTreeSet<IpNet>>;
    fn put_local_cidr(&mut self, cidr: IpNet) -> Result<()>;
    fn remove_local_cidr(&mut self, cidr: IpNet) -> Result<()>;

    /// Forgets the clients that `is_over` says so of, by service and second of the last connection. How many are remembered still.
    fn prune_affinity(&mut self, is_over: &dyn Fn(u32, u32) -> bool) -> Result<usize>;

    fn names(&self) -> Result<Vec<(u32, ServiceName)>>;
    fn put_name(&mut self, id: u32, name: &ServiceName) -> Result<()>;
    fn remove_name(&mut self, id: u32) -> Result<()>;
    /// Forgets the counters of a service; it may have none.
    fn remove_counters(&mut self, id: u32) -> Result<()>;

    fn devices(&self) -> Result<Vec<(u32, DeviceValue)>>;
    fn put_device(&mut self, index: u32, value: &DeviceValue) -> Result<()>;
    fn remove_device(&mut self, index: u32) -> Result<()>;

    fn bridges(&self) -> Result<Vec<(u32, u32)>>;
    fn put_bridge(&mut self, port: u32, bridge: u32) -> Result<()>;
    fn remove_bridge(&mut self, port: u32) -> Result<()>;

    fn xdp_devices(&self) -> Result<Vec<(u32, XdpDevice)>>;
    fn put_xdp_device(&mut self, index: u32, value: &XdpDevice) -> Result<()>;
    fn remove_xdp_device(&mut self, index: u32) -> Result<()>;

    /// Writes so far.
    fn writes(&self) -> u64;
}

/// A kernel made of tree maps, with faults on demand.
#[cfg(test)]
pub(crate) mod memory {
    use std::collections::BTreeMap;

    use super::*;

    /// What goes wrong.
    #[derive(Clone, Debug, Default)]
    pub(crate) enum Fault {
        #[default]
        None,
        /// This many more writes land, then the process is as good as dead: none does.
        DeadAfter(u64),
        /// Each write fails when the next bit of this pseudo-random stream says so (numerator of 256).
        Random { state: u64, chance: u8 },
    }

    #[derive(Clone, Default)]
    pub(crate) struct Memory {
        frontends4: BTreeMap<Vec<u8>, FrontendValue>,
        frontends6: BTreeMap<Vec<u8>, FrontendValue>,
        slots4: Vec<[u64; 3]>,
        slots6: Vec<[u64; 3]>,
        /// What frontends point at: first slot, and how many.
        pointed_at4: Vec<(u32, u32)>,
        pointed_at6: Vec<(u32, u32)>,
        sources4: BTreeMap<Vec<u8>, ()>,
        sources6: BTreeMap<Vec<u8>, ()>,
        pub(crate) source_capacity: Option<usize>,
        local_cidrs: BTreeSet<IpNet>,
        /// Clients: service and second of the last connection.
        pub(crate) affinity: Vec<(u32, u32)>,
        /// How often those were gone through.
        pub(crate) walks: u32,
        pub(crate) names: BTreeMap<u32, ServiceName>,
        pub(crate) name_capacity: Option<usize>,
        devices: BTreeMap<u32, DeviceValue>,
        bridges: BTreeMap<u32, u32>,
        xdp_devices: BTreeMap<u32, XdpDevice>,
        pub(crate) frontend_capacity: usize,
        writes: u64,
        pub(crate) fault: Fault,
        tampering: bool,
    }

    /// Bytes of a plain-old-data value and back.
    fn bytes<T: aya::Pod>(value: &T) -> Vec<u8> {
        // SAFETY: `Pod`: no padding, every byte initialised.
        unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast::<u8>(), size_of::<T>()) }.to_vec()
    }

    fn value<T: aya::Pod>(bytes: &[u8]) -> T {
        assert!(bytes.len() >= size_of::<T>());
        // SAFETY: long enough, read unaligned; `Pod`: every bit pattern is valid.
        unsafe { std::ptr::read_unaligned(bytes.as_ptr().cast()) }
    }

    impl Memory {
        pub(crate) fn new(slots: u32, frontends: usize) -> Self {
            Self {
                slots4: vec![[0; 3]; slots as usize],
                slots6: vec![[0; 3]; slots as usize],
                frontend_capacity: frontends,
                ..Default::default()
            }
        }

        fn write(&mut self, map: MapName) -> Result<()> {
            let failed = match &mut self.fault {
                Fault::None => false,
                Fault::DeadAfter(0) => true,
                Fault::DeadAfter(left) => {
                    *left -= 1;
                    false
                }
                Fault::Random { state, chance } => {
                    *state ^= *state << 13;
                    *state ^= *state >> 7;
                    *state ^= *state << 17;
                    (*state >> 32) as u8 <= *chance
                }
            };
            if failed {
                return Err(StoreError::Io { map, source: io::Error::from_raw_os_error(libc::ENOMEM) });
            }
            self.writes += 1;
            Ok(())
        }

        fn frontends_of<A: Family>(&mut self) -> &mut BTreeMap<Vec<u8>, FrontendValue> {
            if A::LEN == 4 { &mut self.frontends4 } else { &mut self.frontends6 }
        }

        /// An entry was written or removed.
        fn point<A: Family>(&mut self) {
            let map = if A::LEN == 4 { &self.frontends4 } else { &self.frontends6 };
            let held = map.values().flat_map(|value| [value.all(), value.local()]).filter(|range| range.count > 0);
            let held = held.map(|range| (range.base, range.slots())).collect();
            *(if A::LEN == 4 { &mut self.pointed_at4 } else { &mut self.pointed_at6 }) = held;
        }

        fn sources_of<A: Family>(&mut self) -> &mut BTreeMap<Vec<u8>, ()> {
            if A::LEN == 4 { &mut self.sources4 } else { &mut self.sources6 }
        }

        /// Enters a source range behind everybody's back, or takes it out.
        pub(crate) fn tamper_source<A: Family>(&mut self, key: SourceRangeKey<A>, there: bool) {
            let key = bytes(&A::SourceKey::from(key));
            if there {
                self.sources_of::<A>().insert(key, ())
            } else {
                self.sources_of::<A>().remove(&key)
            };
        }

        /// Alters an entry behind everybody's back.
        pub(crate) fn tamper<A: Family>(&mut self, key: FrontendKey<A>, to: Option<FrontendValue>) {
            let key = bytes(&A::Key::from(key));
            match to {
                Some(to) => self.frontends_of::<A>().insert(key, to),
                None => self.frontends_of::<A>().remove(&key),
            };
            self.point::<A>();
        }

        /// Alters a slot behind everybody's back.
        pub(crate) fn tamper_slot<A: Family>(&mut self, index: u32, slot: A::Slot) {
            self.tampering = true;
            self.write_slot::<A>(index, slot).unwrap();
            self.tampering = false;
            self.writes -= 1;
        }
    }

    impl Store for Memory {
        fn slots<A: Family>(&self) -> u32 {
            self.slots4.len() as u32
        }

        fn slot<A: Family>(&self, index: u32) -> A::Slot {
            let words = if A::LEN == 4 { self.slots4[index as usize] } else { self.slots6[index as usize] };
            value::<A::Slot>(&words.iter().flat_map(|w| w.to_ne_bytes()).collect::<Vec<_>>())
        }

        fn write_slot<A: Family>(&mut self, index: u32, slot: A::Slot) -> Result<()> {
            let pointed_at = if A::LEN == 4 { &self.pointed_at4 } else { &self.pointed_at6 };
            let held = pointed_at.iter().any(|(base, slots)| *base <= index && index - base < *slots);
            assert!(!held || self.tampering, "slot {index} is written while a frontend points at it");
            self.write(A::SLOTS)?;
            let mut words = [0; 3];
            for (word, chunk) in words.iter_mut().zip(bytes(&slot).chunks(8)) {
                *word = value::<u64>(chunk);
            }
            let slots = if A::LEN == 4 { &mut self.slots4 } else { &mut self.slots6 };
            slots[index as usize] = words;
            Ok(())
        }

        fn frontends<A: Family>(&self) -> Result<Vec<(FrontendKey<A>, FrontendValue)>> {
            let map = if A::LEN == 4 { &self.frontends4 } else { &self.frontends6 };
            Ok(map.iter().map(|(k, v)| (value::<A::Key>(k).into(), *v)).collect())
        }

        fn put_frontends<A: Family>(
            &mut self,
            entries: &[(FrontendKey<A>, FrontendValue)],
        ) -> (usize, Option<StoreError>) {
            for (done, (key, v)) in entries.iter().enumerate() {
                let capacity = self.frontend_capacity;
                let key = bytes(&A::Key::from(*key));
                let map = self.frontends_of::<A>();
                if !map.contains_key(&key) && map.len() >= capacity {
                    return (done, Some(StoreError::Full { map: A::FRONTENDS, capacity: capacity as u32 }));
                }
                if let Err(error) = self.write(A::FRONTENDS) {
                    return (done, Some(error));
                }
                self.frontends_of::<A>().insert(key, *v);
                self.point::<A>();
            }
            (entries.len(), None)
        }

        fn remove_frontends<A: Family>(&mut self, keys: &[FrontendKey<A>]) -> Result<()> {
            for key in keys {
                self.write(A::FRONTENDS)?;
                let key = bytes(&A::Key::from(*key));
                self.frontends_of::<A>().remove(&key);
                self.point::<A>();
            }
            Ok(())
        }

        fn source_ranges<A: Family>(&self) -> Result<Vec<SourceRangeKey<A>>> {
            let map = if A::LEN == 4 { &self.sources4 } else { &self.sources6 };
            Ok(map.keys().map(|k| value::<A::SourceKey>(k).into()).collect())
        }

        fn put_source_range<A: Family>(&mut self, key: &SourceRangeKey<A>) -> Result<()> {
            let capacity = self.source_capacity.unwrap_or(usize::MAX);
            if self.sources_of::<A>().len() >= capacity {
                return Err(StoreError::Full { map: A::SOURCE_RANGES, capacity: capacity as u32 });
            }
            self.write(A::SOURCE_RANGES)?;
            self.sources_of::<A>().insert(bytes(&A::SourceKey::from(*key)), ());
            Ok(())
        }

        fn remove_source_range<A: Family>(&mut self, key: &SourceRangeKey<A>) -> Result<()> {
            self.write(A::SOURCE_RANGES)?;
            self.sources_of::<A>().remove(&bytes(&A::SourceKey::from(*key)));
            Ok(())
        }

        fn local_cidrs(&self) -> Result<BTreeSet<IpNet>> {
            Ok(self.local_cidrs.clone())
        }

        fn put_local_cidr(&mut self, cidr: IpNet) -> Result<()> {
            self.write(MapName::LocalCidrsV4)?;
            self.local_cidrs.insert(cidr);
            Ok(())
        }

        fn remove_local_cidr(&mut self, cidr: IpNet) -> Result<()> {
            self.write(MapName::LocalCidrsV4)?;
            self.local_cidrs.remove(&cidr);
            Ok(())
        }

        fn prune_affinity(&mut self, is_over: &dyn Fn(u32, u32) -> bool) -> Result<usize> {
            self.walks += 1;
            self.affinity.retain(|(service, seen)| !is_over(*service, *seen));
            Ok(self.affinity.len())
        }

        fn names(&self) -> Result<Vec<(u32, ServiceName)>> {
            Ok(self.names.iter().map(|(k, v)| (*k, *v)).collect())
        }

        fn put_name(&mut self, id: u32, name: &ServiceName) -> Result<()> {
            let capacity = self.name_capacity.unwrap_or(usize::MAX);
            if self.names.len() >= capacity && !self.names.contains_key(&id) {
                return Err(StoreError::Full { map: MapName::Names, capacity: capacity as u32 });
            }
            self.write(MapName::Names)?;
            self.names.insert(id, *name);
            Ok(())
        }

        fn remove_name(&mut self, id: u32) -> Result<()> {
            self.write(MapName::Names)?;
            self.names.remove(&id);
            Ok(())
        }

        fn remove_counters(&mut self, _id: u32) -> Result<()> {
            self.write(MapName::ServiceCounters)
        }

        fn devices(&self) -> Result<Vec<(u32, DeviceValue)>> {
            Ok(self.devices.iter().map(|(k, v)| (*k, *v)).collect())
        }

        fn put_device(&mut self, index: u32, value: &DeviceValue) -> Result<()> {
            self.write(MapName::Devices)?;
            self.devices.insert(index, *value);
            Ok(())
        }

        fn remove_device(&mut self, index: u32) -> Result<()> {
            self.write(MapName::Devices)?;
            self.devices.remove(&index);
            Ok(())
        }

        fn bridges(&self) -> Result<Vec<(u32, u32)>> {
            Ok(self.bridges.iter().map(|(k, v)| (*k, *v)).collect())
        }

        fn put_bridge(&mut self, port: u32, bridge: u32) -> Result<()> {
            self.write(MapName::Bridges)?;
            self.bridges.insert(port, bridge);
            Ok(())
        }

        fn remove_bridge(&mut self, port: u32) -> Result<()> {
            self.write(MapName::Bridges)?;
            self.bridges.remove(&port);
            Ok(())
        }

        fn xdp_devices(&self) -> Result<Vec<(u32, XdpDevice)>> {
            Ok(self.xdp_devices.iter().map(|(k, v)| (*k, *v)).collect())
        }

        fn put_xdp_device(&mut self, index: u32, value: &XdpDevice) -> Result<()> {
            self.write(MapName::XdpDevices)?;
            self.xdp_devices.insert(index, *value);
            Ok(())
        }

        fn remove_xdp_device(&mut self, index: u32) -> Result<()> {
            self.write(MapName::XdpDevices)?;
            self.xdp_devices.remove(&index);
            Ok(())
        }

        fn writes(&self) -> u64 {
            self.writes
        }
    }
}
