//! What an agent left in the kernel, read without its help: pinned maps byte for byte, and which programs and links there are.

use std::{
    collections::BTreeMap,
    ffi::CString,
    fs, io,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
    ptr, slice,
};

use anyhow::{Context, Result};
use nix::libc;

const MAP_LOOKUP: i64 = 1;
const MAP_DELETE: i64 = 3;
const MAP_NEXT_KEY: i64 = 4;
const PROG_LOAD: i64 = 5;
const OBJ_PIN: i64 = 6;
const OBJ_GET: i64 = 7;
const PROG_ATTACH: i64 = 8;
const PROG_QUERY: i64 = 16;
const LINK_DETACH: i64 = 34;
const HASH: u32 = 1;
const MMAPABLE: u32 = 1 << 10;

/// `BPF_PROG_TYPE_CGROUP_SOCK_ADDR`, `BPF_CGROUP_INET4_CONNECT`, `BPF_F_ALLOW_MULTI`
const SOCK_ADDR: u32 = 18;
const CONNECT4: u32 = 10;
const BESIDE_OTHERS: u32 = 2;
/// `enum bpf_attach_type`, as far as kernels may have it.
const ATTACH_TYPES: std::ops::Range<u32> = 0..64;
/// `r0 = 1; exit`: it goes on as it would without.
const NOTHING: [u64; 2] = [0x0000_0001_0000_00b7, 0x95];

/// Maps that nobody but the agent writes.
const AGENTS: [&str; 7] = ["frontends_v4", "frontends_v6", "slots_v4", "slots_v6", "devices", "names", "meta"];

/// Elements by key; of an array those that are not all zeroes, by index.
pub type Elements = BTreeMap<Vec<u8>, Vec<u8>>;

/// A directory of pins at one moment.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Pinned {
    /// The maps that only the agent writes.
    pub maps: BTreeMap<String, Elements>,
    /// Every pin, by its path below the layout's directory, with the kernel's ids of it and of what it holds.
    pub ids: BTreeMap<String, String>,
}

impl Pinned {
    pub(super) fn read(bpffs: &Path) -> Result<Self> {
        let top = top(bpffs);
        let mut pinned = Self { maps: BTreeMap::new(), ids: BTreeMap::new() };
        for dir in ["maps", "links", "programs"] {
            let entries = fs::read_dir(top.join(dir)).with_context(|| format!("read {}/{dir}", top.display()))?;
            for entry in entries {
                let path = entry?.path();
                let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                let fd = open(&path).with_context(|| format!("open the pin {}", path.display()))?;
                let facts = Facts::of(&fd)?;
                pinned.ids.insert(format!("{dir}/{name}"), facts.identity());
                if dir == "maps" && AGENTS.contains(&name.as_str()) {
                    let elements = elements(&fd, &facts).with_context(|| format!("read the map {name}"))?;
                    pinned.maps.insert(name, elements);
                }
            }
        }
        Ok(pinned)
    }

    /// The elements of one of the agent's maps.
    ///
    /// # Panics
    /// If there is none of that name: a mistake in the test itself.
    pub fn map(&self, name: &str) -> &Elements {
        self.maps.get(name).unwrap_or_else(|| panic!("no map {name} in the pins"))
    }

    /// What is not the same, each as one line.
    pub fn differences(&self, other: &Self) -> Vec<String> {
        let mut lines = Vec::new();
        for name in keys(&self.ids, &other.ids) {
            let (before, after) = (self.ids.get(name), other.ids.get(name));
            if before != after {
                lines.push(format!("{name}: {before:?} -> {after:?}"));
            }
        }
        let none = Elements::new();
        for name in keys(&self.maps, &other.maps) {
            let (before, after) = (self.maps.get(name).unwrap_or(&none), other.maps.get(name).unwrap_or(&none));
            for key in changed(before, after) {
                lines.push(format!("{name} {key:02x?}: {:02x?} -> {:02x?}", before.get(key), after.get(key)));
            }
        }
        lines
    }
}

fn top(bpffs: &Path) -> PathBuf {
    bpffs.join("v1")
}

/// The elements of one map, as quickly as they can be had.
pub(super) fn map(bpffs: &Path, name: &str) -> Result<Elements> {
    let path = top(bpffs).join("maps").join(name);
    let fd = open(&path).with_context(|| format!("open the pin {}", path.display()))?;
    elements(&fd, &Facts::of(&fd)?).with_context(|| format!("read the map {name}"))
}

/// Removes the elements of a hash map, one after the other.
pub(super) fn clear(bpffs: &Path, name: &str) -> Result<usize> {
    let path = top(bpffs).join("maps").join(name);
    let fd = open(&path).with_context(|| format!("open the pin {}", path.display()))?;
    let (map, size) = (u32::try_from(fd.as_raw_fd())?, Facts::of(&fd)?.number("key_size")? as usize);
    let mut removed = 0;
    loop {
        let mut first = vec![0_u8; size];
        match bpf(MAP_NEXT_KEY, &mut ElementAttr { map, pad: 0, key: 0, value: first.as_mut_ptr() as u64, flags: 0 }) {
            Ok(_) => {}
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(removed),
            Err(error) => return Err(error.into()),
        }
        match bpf(MAP_DELETE, &mut ElementAttr { map, pad: 0, key: first.as_ptr() as u64, value: 0, flags: 0 }) {
            Ok(_) => removed += 1,
            // Evicted meanwhile.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Takes a link's program off its place, as `bpftool link detach` does; the link stays pinned.
pub(super) fn detach(bpffs: &Path, name: &str) -> Result<()> {
    let path = top(bpffs).join("links").join(name);
    let link = open(&path).with_context(|| format!("open the pin {}", path.display()))?;
    bpf(LINK_DETACH, &mut u32::try_from(link.as_raw_fd())?).with_context(|| format!("detach the link {name}"))?;
    Ok(())
}

/// Somebody else's program at connect time, which does nothing: on this cgroup for as long as that is there, and pinned.
pub fn attach_others(cgroup: &Path, pin: &Path) -> Result<()> {
    let license = c"GPL";
    let mut load = LoadAttr {
        kind: SOCK_ADDR,
        count: NOTHING.len() as u32,
        instructions: NOTHING.as_ptr() as u64,
        license: license.as_ptr() as u64,
        expected: CONNECT4,
        ..LoadAttr::default()
    };
    let fd = bpf(PROG_LOAD, &mut load).context("load a program")?;
    // SAFETY: the kernel has just made it for us alone.
    let program = unsafe { OwnedFd::from_raw_fd(fd) };
    let program = u32::try_from(program.as_raw_fd()).map(|fd| (program, fd))?;
    let target = fs::File::open(cgroup).with_context(|| format!("open {}", cgroup.display()))?;
    let target = u32::try_from(target.as_raw_fd()).map(|fd| (target, fd))?;
    let mut attach = AttachAttr { target: target.1, program: program.1, kind: CONNECT4, flags: BESIDE_OTHERS };
    bpf(PROG_ATTACH, &mut attach).with_context(|| format!("attach a program to {}", cgroup.display()))?;
    let path = CString::new(pin.as_os_str().as_bytes())?;
    let mut at = ObjectAttr { path: path.as_ptr() as u64, fd: program.1, flags: 0 };
    bpf(OBJ_PIN, &mut at).with_context(|| format!("pin a program at {}", pin.display()))?;
    Ok(())
}

/// Which programs there are on a cgroup, by the way in which they are attached.
pub fn on_cgroup(cgroup: &Path) -> Result<BTreeMap<u32, Vec<u32>>> {
    let target = fs::File::open(cgroup).with_context(|| format!("open {}", cgroup.display()))?;
    let mut found = BTreeMap::new();
    for kind in ATTACH_TYPES {
        let mut ids = vec![0_u32; 64];
        let mut attr = QueryAttr {
            target: u32::try_from(target.as_raw_fd())?,
            kind,
            ids: ids.as_mut_ptr() as u64,
            count: 64,
            ..QueryAttr::default()
        };
        // What is not for cgroups is refused.
        if bpf(PROG_QUERY, &mut attr).is_ok() && attr.count > 0 {
            ids.truncate(attr.count as usize);
            found.insert(kind, ids);
        }
    }
    Ok(found)
}

/// Keys whose elements came, went or are others now.
pub fn changed<'a>(before: &'a Elements, after: &'a Elements) -> Vec<&'a Vec<u8>> {
    keys(before, after).into_iter().filter(|key| before.get(*key) != after.get(*key)).collect()
}

fn keys<'a, K: Ord, V>(one: &'a BTreeMap<K, V>, other: &'a BTreeMap<K, V>) -> Vec<&'a K> {
    let mut all: Vec<&K> = one.keys().chain(other.keys()).collect();
    all.sort();
    all.dedup();
    all
}

/// What the kernel says of a BPF object's descriptor.
struct Facts(BTreeMap<String, String>);

impl Facts {
    fn of(fd: &OwnedFd) -> Result<Self> {
        let text = fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd()))?;
        let pairs = text.lines().filter_map(|line| line.split_once(':'));
        Ok(Self(pairs.map(|(key, value)| (key.trim().to_owned(), value.trim().to_owned())).collect()))
    }

    fn identity(&self) -> String {
        let ids = ["map_id", "prog_id", "link_id", "prog_tag", "ifindex", "cgroup_id", "attach_type", "max_entries"];
        let shown = ids.iter().filter_map(|id| Some(format!("{id} {}", self.0.get(*id)?)));
        shown.collect::<Vec<_>>().join(", ")
    }

    fn number(&self, key: &str) -> Result<u32> {
        let text = self.0.get(key).with_context(|| format!("fdinfo has no {key}"))?;
        text.parse().with_context(|| format!("fdinfo: {key} {text}"))
    }
}

fn bpf<T>(command: i64, attr: &mut T) -> io::Result<i32> {
    // SAFETY: every caller's struct has the layout of its command in `union bpf_attr`, with every field that the kernel writes back,
    // and what it points to outlives the call.
    let done = unsafe { libc::syscall(libc::SYS_bpf, command, ptr::from_mut(attr), size_of::<T>()) };
    i32::try_from(done).ok().filter(|done| *done >= 0).ok_or_else(io::Error::last_os_error)
}

#[repr(C)]
struct ObjectAttr {
    path: u64,
    fd: u32,
    flags: u32,
}

#[derive(Default)]
#[repr(C)]
struct LoadAttr {
    kind: u32,
    count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel: u32,
    flags: u32,
    name: [u8; 16],
    device: u32,
    expected: u32,
}

#[repr(C)]
struct AttachAttr {
    target: u32,
    program: u32,
    kind: u32,
    flags: u32,
}

/// Whole: some of it is written back even if it is said to be shorter.
#[derive(Default)]
#[repr(C)]
struct QueryAttr {
    target: u32,
    kind: u32,
    flags: u32,
    attach_flags: u32,
    ids: u64,
    count: u32,
    pad: u32,
    program_attach_flags: u64,
    links: u64,
    link_attach_flags: u64,
    revision: u64,
}

const _: () = assert!(size_of::<QueryAttr>() == 64);

#[repr(C)]
struct ElementAttr {
    map: u32,
    pad: u32,
    key: u64,
    /// Or the next key.
    value: u64,
    flags: u64,
}

fn open(path: &Path) -> Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let fd = bpf(OBJ_GET, &mut ObjectAttr { path: path.as_ptr() as u64, fd: 0, flags: 0 })?;
    // SAFETY: the kernel has just made it for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn elements(fd: &OwnedFd, facts: &Facts) -> Result<Elements> {
    let (key_size, value_size) = (facts.number("key_size")? as usize, facts.number("value_size")? as usize);
    let count = facts.number("max_entries")?;
    let flags = facts.0.get("map_flags").context("fdinfo has no map_flags")?;
    if u32::from_str_radix(flags.trim_start_matches("0x"), 16)? & MMAPABLE != 0 {
        return mapped(fd, value_size, count);
    }
    let mut elements = Elements::new();
    let mut lookup = |key: Vec<u8>| -> Result<()> {
        let mut value = vec![0_u8; value_size];
        let map = u32::try_from(fd.as_raw_fd())?;
        let attr =
            &mut ElementAttr { map, pad: 0, key: key.as_ptr() as u64, value: value.as_mut_ptr() as u64, flags: 0 };
        bpf(MAP_LOOKUP, attr)?;
        elements.insert(key, value);
        Ok(())
    };
    if facts.number("map_type")? != HASH {
        for index in 0..count {
            lookup(index.to_ne_bytes().to_vec())?;
        }
        return Ok(elements);
    }
    let mut last: Option<Vec<u8>> = None;
    loop {
        let mut next = vec![0_u8; key_size];
        let key = last.as_ref().map_or(0, |key| key.as_ptr() as u64);
        let map = u32::try_from(fd.as_raw_fd())?;
        match bpf(MAP_NEXT_KEY, &mut ElementAttr { map, pad: 0, key, value: next.as_mut_ptr() as u64, flags: 0 }) {
            Ok(_) => {}
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(elements),
            Err(error) => return Err(error.into()),
        }
        lookup(next.clone())?;
        last = Some(next);
    }
}

/// An array through a mapping of its memory, as the agent itself sees it.
fn mapped(fd: &OwnedFd, value_size: usize, count: u32) -> Result<Elements> {
    let length = value_size * count as usize;
    // SAFETY: a fresh mapping of the kernel's choice, read only.
    let at = unsafe { libc::mmap(ptr::null_mut(), length, libc::PROT_READ, libc::MAP_SHARED, fd.as_raw_fd(), 0) };
    if at == libc::MAP_FAILED {
        return Err(io::Error::last_os_error()).context("map its memory");
    }
    // SAFETY: mapped above and unmapped below. No agent writes while pins are compared; a torn byte would show as a difference.
    let bytes = unsafe { slice::from_raw_parts(at.cast::<u8>(), length) };
    let used = (0_u32..).zip(bytes.chunks_exact(value_size)).filter(|(_, value)| value.iter().any(|byte| *byte != 0));
    let elements = used.map(|(index, value)| (index.to_be_bytes().to_vec(), value.to_vec())).collect();
    // SAFETY: nothing refers to it any more.
    unsafe { libc::munmap(at, length) };
    Ok(elements)
}
