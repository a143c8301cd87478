//! The pinned maps for readers: the CLI, metrics. Opened or mapped read-only; works with no agent running.
//!
//! A reader runs beside a writing agent, so a frontend may change while it is read; its seal and the generation of its slots
//! say so, and the entry is read once more.

use std::{
    collections::BTreeMap,
    fs, io,
    net::{IpAddr, SocketAddr},
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
};

use proxy_common::{
    Address, Ipv4Be, Ipv6Be,
    affinity::{AffinityKey, AffinityValue},
    connection::{ConnectionKey, ConnectionValue},
    counters::{Reason, ServiceCounters},
    frontend::{FrontendKey, FrontendValue, Range, origin},
    maglev,
    meta::{Meta, ServiceName},
    slot::{Slot, SlotV4, SlotV6, Target},
};
use serde::Serialize;

use super::{
    family::Family,
    hooks::{self, CGROUP_PROGRAMS},
    layout::{MapName, Sizes},
    maps::{self, MappedArray},
    noted,
    pins::{self, Layout},
    render, sys,
};
use crate::{
    dataplane::{Fill, Hook, mounts},
    desired::{Algorithm, FrontendKind, Verdict},
    model::Protocol,
};

#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    #[error("{0} holds no pins: no agent with the eBPF dataplane has run here, or --bpffs names another directory")]
    Nothing(std::path::PathBuf),
    #[error("{path}: {source}")]
    Io { path: std::path::PathBuf, source: io::Error },
}

/// Verdict for each origin.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub struct VerdictRow {
    pub pod: Verdict,
    pub node: Verdict,
    pub external: Verdict,
}

/// A run of slots.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub struct RangeRow {
    pub base: u32,
    pub count: u16,
    pub generation: u8,
    /// Positions of the Maglev table behind the backends; 0: there is none.
    pub table: u32,
}

impl From<Range> for RangeRow {
    fn from(Range { base, count, generation, table }: Range) -> Self {
        Self { base, count, generation, table: maglev::size(table) }
    }
}

/// One entry of `frontends`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct FrontendRow {
    pub addr: IpAddr,
    /// 0 for a guard.
    pub port: u16,
    /// `None` for a guard.
    pub protocol: Option<Protocol>,
    /// What holds for the address where no frontend claims the port.
    pub guard: bool,
    pub service_id: u32,
    /// `namespace/name:port`; empty for a guard.
    pub service: String,
    pub kind: FrontendKind,
    pub verdicts: VerdictRow,
    pub algorithm: Algorithm,
    pub affinity_secs: Option<u32>,
    pub all: Vec<SocketAddr>,
    pub local: Vec<SocketAddr>,
    /// Where the slots of `all` and of `local` are.
    pub all_range: RangeRow,
    pub local_range: RangeRow,
    /// The entry changed while it was read, twice; or somebody wrote to it who should not.
    pub torn: bool,
}

/// One entry of the connection table, addresses decoded; what the entries of one flow make together is the reader's.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ConnectionEntry {
    /// IP protocol number.
    pub protocol: u8,
    /// `proxy_common::connection::hook`.
    pub hook: u8,
    pub src: SocketAddr,
    pub dst: SocketAddr,
    /// New destination (ingress) or new source (egress).
    pub to: SocketAddr,
    /// New source port (ingress) or new destination port (egress).
    pub other: u16,
    /// `proxy_common::connection::flags`.
    pub flags: u8,
    /// `proxy_common::connection::state`.
    pub state: u8,
    /// Seconds since the last packet on this entry.
    pub idle_secs: u32,
    pub service: String,
}

/// Who is remembered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AffinityClient {
    Address(IpAddr),
    /// At connect time: cookie of the network namespace.
    Netns(u64),
}

/// One entry of session affinity.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct AffinityEntry {
    pub client: AffinityClient,
    pub service_id: u32,
    /// `namespace/name:port`; empty if the id has no name any more.
    pub service: String,
    pub backend: SocketAddr,
    /// Seconds since the client's last connection began.
    pub age_secs: u32,
}

/// A pin directory, open for reading.
#[derive(Debug)]
pub struct Pins {
    layout: Layout,
}

type Result<T, E = ReadError> = std::result::Result<T, E>;

/// How far below a bpf filesystem's root a directory of pins is looked for.
const DEPTH: usize = 4;

/// Other directories than this one with pins of an agent of this network namespace, on any bpf filesystem that is mounted here. What cannot be
/// read is not looked at.
pub fn elsewhere(bpffs: &Path) -> Vec<PathBuf> {
    let Ok(here) = hooks::netns_cookie() else { return Vec::new() };
    let mut found = Vec::new();
    for mount in mounts::all().unwrap_or_default().into_iter().filter(|mount| mount.kind == "bpf") {
        search(&mount.path, DEPTH, &mut found);
    }
    // One directory may be seen by several mounts.
    let place = |path: &Path| path.metadata().map(|it| (it.dev(), it.ino())).ok();
    let mut seen = vec![place(bpffs)];
    found.retain(|dir| {
        let place = place(dir);
        let is_new = !seen.contains(&place);
        seen.push(place);
        is_new && Pins::open(dir).and_then(|pins| pins.meta()).is_ok_and(|meta| meta.node_netns_cookie == here)
    });
    found
}

/// Directories that look like one of pins, at any depth up to this one.
fn search(dir: &Path, depth: usize, found: &mut Vec<PathBuf>) {
    if Layout::of(dir).map(MapName::Meta).exists() {
        return found.push(dir.to_owned());
    }
    if depth == 0 {
        return;
    }
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            search(&entry.path(), depth - 1, found);
        }
    }
}

impl Pins {
    pub fn open(bpffs: &Path) -> Result<Self> {
        let layout = Layout::of(bpffs);
        match layout.map(MapName::Meta).symlink_metadata() {
            Ok(_) => Ok(Self { layout }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(ReadError::Nothing(bpffs.to_owned())),
            Err(source) => Err(ReadError::Io { path: layout.maps, source }),
        }
    }

    fn fd(&self, map: MapName) -> Result<OwnedFd> {
        let path = self.layout.map(map);
        sys::open_read_only(&path).map_err(|source| ReadError::Io { path, source })
    }

    fn failed(&self, map: MapName) -> impl FnOnce(io::Error) -> ReadError {
        let path = self.layout.map(map);
        |source| ReadError::Io { path, source }
    }

    fn map<K: aya::Pod, V: aya::Pod>(&self, map: MapName) -> Result<sys::Map<K, V>> {
        sys::Map::new(self.fd(map)?).map_err(self.failed(map))
    }

    /// Service id → `namespace/name:port`.
    pub fn names(&self) -> Result<BTreeMap<u32, String>> {
        let names = self.map::<u32, ServiceName>(MapName::Names)?;
        let entries = names.entries().map_err(self.failed(MapName::Names))?;
        Ok(entries.into_iter().map(|(id, name)| (id, name.as_str().to_owned())).collect())
    }

    pub fn meta(&self) -> Result<Meta> {
        let meta = self.map::<u32, Meta>(MapName::Meta)?;
        Ok(meta.get(&0).map_err(self.failed(MapName::Meta))?.unwrap_or_default())
    }

    /// Whether nobody else translates here, so that TCP connections that have lost their entries are reset.
    pub fn is_alone(&self) -> Result<bool> {
        // Pins of a version that had no such map.
        if !self.layout.map(MapName::Alone).exists() {
            return Ok(false);
        }
        let alone = self.map::<u32, u32>(MapName::Alone)?;
        Ok(alone.get(&0).map_err(self.failed(MapName::Alone))? == Some(1))
    }

    /// Whether an agent holds the directory now.
    pub fn agent_running(&self) -> bool {
        pins::is_held(&self.layout.root)
    }

    /// Whether another mode has taken over: they are there for open connections alone.
    pub fn is_retired(&self) -> bool {
        noted::is_retired(&self.layout)
    }

    /// Its pid, as far as this pid namespace can tell.
    pub fn agent_pid(&self) -> Option<u32> {
        pins::holder_of(&self.layout.root)
    }

    /// Frontends and guards of both families, sorted.
    pub fn frontends(&self) -> Result<Vec<FrontendRow>> {
        let names = self.names()?;
        let mut rows = self.frontends_of::<Ipv4Be>(&names)?;
        rows.extend(self.frontends_of::<Ipv6Be>(&names)?);
        rows.sort_by_key(|row| (row.addr, row.port, row.protocol));
        Ok(rows)
    }

    fn frontends_of<A: Family>(&self, names: &BTreeMap<u32, String>) -> Result<Vec<FrontendRow>> {
        let map = self.map::<A::Key, FrontendValue>(A::FRONTENDS)?;
        // The kernel shares the pages of a map only through a descriptor that may write; the mapping itself is read-only.
        let slots = sys::open(&self.layout.map(A::SLOTS))
            .and_then(|fd| MappedArray::<A::Slot>::new(fd.as_fd(), false))
            .map_err(self.failed(A::SLOTS))?;
        let mut rows = vec![];
        for (key, value) in map.entries().map_err(self.failed(A::FRONTENDS))? {
            let row = frontend_row::<A>(key.into(), &value, &slots, names);
            let row = if row.torn {
                match map.get(&key).map_err(self.failed(A::FRONTENDS))? {
                    Some(value) => frontend_row::<A>(key.into(), &value, &slots, names),
                    None => continue,
                }
            } else {
                row
            };
            rows.push(row);
        }
        Ok(rows)
    }

    /// The entries of the per-packet path's flows, in no order.
    pub fn connections(&self) -> Result<Vec<ConnectionEntry>> {
        let names = self.names()?;
        let mut rows = vec![];
        for map in [MapName::EstablishedV4, MapName::AnsweredV4, MapName::HalfOpenV4] {
            self.connections_of::<Ipv4Be>(map, &names, &mut rows)?;
        }
        for map in [MapName::EstablishedV6, MapName::AnsweredV6, MapName::HalfOpenV6] {
            self.connections_of::<Ipv6Be>(map, &names, &mut rows)?;
        }
        Ok(rows)
    }

    fn connections_of<A: Family>(
        &self,
        map: MapName,
        names: &BTreeMap<u32, String>,
        rows: &mut Vec<ConnectionEntry>,
    ) -> Result<()>
    where
        ConnectionKey<A>: aya::Pod,
        ConnectionValue<A>: aya::Pod,
    {
        let now = monotonic_secs();
        let entries = self.map::<ConnectionKey<A>, ConnectionValue<A>>(map)?.entries().map_err(self.failed(map))?;
        let at = |addr: A, port: proxy_common::Be16| SocketAddr::new(addr.to_ip(), port.to_host());
        // An entry that changed while it was read tells nothing; its pair does.
        for (key, value) in entries.into_iter().filter(|(key, value)| value.is_sealed_for(key)) {
            rows.push(ConnectionEntry {
                protocol: key.proto,
                hook: key.hook,
                src: at(key.src, key.sport),
                dst: at(key.dst, key.dport),
                to: at(value.addr, value.port),
                other: value.other.to_host(),
                flags: value.flags,
                state: value.state,
                idle_secs: now.saturating_sub(value.seen),
                service: names.get(&value.service).cloned().unwrap_or_default(),
            });
        }
        Ok(())
    }

    /// Whom session affinity remembers, in no order; also those whose time is over and that nobody has taken out yet.
    pub fn affinities(&self) -> Result<Vec<AffinityEntry>> {
        let names = self.names()?;
        let mut rows = self.affinities_of::<Ipv4Be>(MapName::AffinityV4, &names)?;
        rows.extend(self.affinities_of::<Ipv6Be>(MapName::AffinityV6, &names)?);
        Ok(rows)
    }

    fn affinities_of<A: Address>(&self, map: MapName, names: &BTreeMap<u32, String>) -> Result<Vec<AffinityEntry>>
    where
        AffinityValue<A>: aya::Pod,
    {
        let now = monotonic_secs();
        let entries = self.map::<AffinityKey, AffinityValue<A>>(map)?.entries().map_err(self.failed(map))?;
        let mut rows = vec![];
        // One that changed while it was read is left out, as the programs do.
        for (key, value) in entries.into_iter().filter(|(key, value)| value.is_sealed_for(key)) {
            let address = key.address::<A>().map(AffinityClient::Address);
            let Some(client) = address.or(key.netns().map(AffinityClient::Netns)) else { continue };
            rows.push(AffinityEntry {
                client,
                service_id: key.service,
                service: names.get(&key.service).cloned().unwrap_or_default(),
                backend: SocketAddr::new(value.addr.to_ip(), value.port.to_host()),
                age_secs: now.saturating_sub(value.seen),
            });
        }
        Ok(rows)
    }

    /// By service id, summed over CPUs.
    pub fn service_counters(&self) -> Result<BTreeMap<u32, ServiceCounters>> {
        let mut counters = BTreeMap::new();
        self.each_per_cpu(MapName::ServiceCounters, |key, cpus| {
            let mut sum = ServiceCounters::default();
            for cpu in cpus.chunks_exact(size_of::<ServiceCounters>()) {
                let words = words(cpu);
                let [connections, packets, bytes, refused, turns] = words;
                sum.connections += connections;
                sum.packets += packets;
                sum.bytes += bytes;
                sum.refused += refused;
                sum.turns += turns;
            }
            counters.insert(key, sum);
        })?;
        Ok(counters)
    }

    /// Every reason, summed over CPUs; in order.
    pub fn reasons(&self) -> Result<Vec<(Reason, u64)>> {
        let mut counts = BTreeMap::new();
        self.each_per_cpu(MapName::Reasons, |index, cpus| {
            let sum: u64 = cpus.chunks_exact(8).map(|cpu| words::<1>(cpu).iter().sum::<u64>()).sum();
            counts.insert(index, sum);
        })?;
        Ok(Reason::ALL.into_iter().map(|r| (r, counts.get(&(r as u32)).copied().unwrap_or(0))).collect())
    }

    /// Calls `each` with a key and all its CPUs' values.
    fn each_per_cpu(&self, map: MapName, mut each: impl FnMut(u32, &[u8])) -> Result<()> {
        let fd = self.fd(map)?;
        let size = maps::value_size(map).map_err(self.failed(map))?;
        let mut entry = |key: &[u8], value: &[u8]| {
            if let Some(key) = key.first_chunk() {
                each(u32::from_ne_bytes(*key), value);
            }
        };
        sys::dump(fd.as_fd(), 4, size, &mut entry).map_err(self.failed(map))
    }

    /// How full the maps are. Counts entries: costs a walk over the larger maps.
    pub fn fill(&self) -> Result<Vec<Fill>> {
        let mut fill = vec![];
        for map in MapName::ALL.iter().copied() {
            let entries = match map {
                MapName::SlotsV4 => self.slots_used::<Ipv4Be>()?,
                MapName::SlotsV6 => self.slots_used::<Ipv6Be>()?,
                // Socket storage has no size, the others are always full.
                MapName::PeersV4
                | MapName::PeersV6
                | MapName::Reasons
                | MapName::Confirmed
                | MapName::Spare
                | MapName::Held
                | MapName::Meta => continue,
                _ => {
                    let info = map.info(&Sizes::default());
                    let value = maps::value_size(map).map_err(self.failed(map))?;
                    let mut count = 0;
                    sys::dump(self.fd(map)?.as_fd(), info.key as usize, value, |_, _| count += 1)
                        .map_err(self.failed(map))?;
                    count
                }
            };
            let capacity = sys::map_info(self.fd(map)?.as_fd()).map_err(self.failed(map))?.max_entries;
            fill.push(Fill { map: map.to_string(), entries, capacity: u64::from(capacity), option: map.option() });
        }
        Ok(fill)
    }

    /// Slots that some frontend points at.
    fn slots_used<A: Family>(&self) -> Result<u64> {
        let map = self.map::<A::Key, FrontendValue>(A::FRONTENDS)?;
        let mut ranges: Vec<(u32, u32)> = map
            .entries()
            .map_err(self.failed(A::FRONTENDS))?
            .into_iter()
            .flat_map(|(_, value)| [value.all(), value.local()])
            .filter(|range| range.count > 0)
            .map(|range| (range.base, range.slots()))
            .collect();
        ranges.sort_unstable();
        ranges.dedup();
        Ok(ranges.into_iter().map(|(_, slots)| u64::from(slots)).sum())
    }

    /// Pinned links that are attached. (Filters of the clsact fallback have no pins; the running agent knows them.)
    pub fn hooks(&self) -> Result<Vec<Hook>> {
        let names = hooks::list(&self.layout.links)
            .map_err(|source| ReadError::Io { path: self.layout.links.clone(), source })?;
        let mut found = vec![];
        for name in names {
            let Ok(info) = sys::open(&self.layout.links.join(&name)).and_then(|link| sys::link_info(link.as_fd()))
            else {
                continue;
            };
            if info.target == 0 {
                continue;
            }
            let hook = if let Some((index, direction)) = hooks::parse_tcx_name(&name) {
                Hook {
                    kind: format!("tcx/{direction}"),
                    target: hooks::interface_name(index),
                    program: self.program_name(info.program_id).unwrap_or_else(|| format!("tc_{direction}")),
                }
            } else if let Some((index, mode)) = hooks::parse_xdp_name(&name) {
                Hook {
                    kind: format!("xdp/{mode}"),
                    target: hooks::interface_name(index),
                    program: self.program_name(info.program_id).unwrap_or_else(|| "xdp_ingress".to_owned()),
                }
            } else if CGROUP_PROGRAMS.iter().any(|(program, _)| *program == name) {
                Hook { kind: format!("cgroup/{name}"), target: format!("cgroup {}", info.target), program: name }
            } else {
                continue;
            };
            found.push(hook);
        }
        Ok(found)
    }

    /// The pinned program of this id.
    fn program_name(&self, id: u32) -> Option<String> {
        hooks::list(&self.layout.programs).ok()?.into_iter().find(|name| {
            sys::open(&self.layout.programs.join(name))
                .and_then(|fd| sys::program_id(fd.as_fd()))
                .is_ok_and(|i| i == id)
        })
    }
}

fn words<const N: usize>(bytes: &[u8]) -> [u64; N] {
    let mut words = [0; N];
    for (word, chunk) in words.iter_mut().zip(bytes.chunks_exact(8)) {
        *word = chunk.first_chunk().map_or(0, |c| u64::from_ne_bytes(*c));
    }
    words
}

fn frontend_row<A: Family>(
    key: FrontendKey<A>,
    value: &FrontendValue,
    slots: &MappedArray<A::Slot>,
    names: &BTreeMap<u32, String>,
) -> FrontendRow {
    let mut torn = !value.is_sealed_for(&key);
    let mut backends = |range: Range| -> Vec<SocketAddr> {
        (0..u32::from(range.count))
            .filter_map(|offset| {
                let slot = slots.read(range.base.wrapping_add(offset));
                let Some(Target { addr, port }) = slot.decode(range.generation) else {
                    torn = true;
                    return None;
                };
                Some(SocketAddr::new(addr.to_ip(), port.to_host()))
            })
            .collect()
    };
    let (all, local) = (backends(value.all()), backends(value.local()));
    let verdict = |origin: usize| render::verdict_of(value.verdicts.get(origin).copied().unwrap_or_default());
    FrontendRow {
        addr: key.addr.to_ip(),
        port: key.port.to_host(),
        protocol: Protocol::from_number(key.proto),
        guard: key.is_guard(),
        service_id: value.service,
        service: names.get(&value.service).cloned().unwrap_or_default(),
        kind: render::kind_of(value),
        verdicts: VerdictRow {
            pod: verdict(origin::POD),
            node: verdict(origin::NODE),
            external: verdict(origin::EXTERNAL),
        },
        algorithm: render::algorithm_of(value.algorithm),
        affinity_secs: Some(value.affinity_secs).filter(|secs| *secs > 0),
        all,
        local,
        all_range: value.all().into(),
        local_range: value.local().into(),
        torn,
    }
}

/// The clock of the connection table.
pub(super) fn monotonic_secs() -> u32 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    u32::try_from(now.tv_sec).unwrap_or(u32::MAX)
}

const _: () = assert!(size_of::<SlotV4>() == 8 && size_of::<SlotV6>() == 24);
