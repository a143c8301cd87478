//! The few `bpf(2)` commands that aya does not offer or hides behind types that own what they touch: batches (kernel 5.6),
//! links created, swapped and inspected by file descriptor, read-only opens.
//!
//! Everything here is a thin call; who may call what when is decided elsewhere.

use std::{
    ffi::CString,
    io,
    marker::PhantomData,
    mem::{MaybeUninit, offset_of, size_of},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
    ptr,
};

use aya::Pod;

mod cmd {
    pub(super) const MAP_CREATE: i64 = 0;
    pub(super) const MAP_LOOKUP: i64 = 1;
    pub(super) const MAP_UPDATE: i64 = 2;
    pub(super) const MAP_DELETE: i64 = 3;
    pub(super) const MAP_NEXT_KEY: i64 = 4;
    pub(super) const PROG_LOAD: i64 = 5;
    pub(super) const OBJ_PIN: i64 = 6;
    pub(super) const OBJ_GET: i64 = 7;
    pub(super) const OBJ_INFO: i64 = 15;
    pub(super) const PROG_QUERY: i64 = 16;
    pub(super) const LOOKUP_AND_DELETE: i64 = 21;
    pub(super) const LOOKUP_BATCH: i64 = 24;
    pub(super) const UPDATE_BATCH: i64 = 26;
    pub(super) const DELETE_BATCH: i64 = 27;
    pub(super) const LINK_CREATE: i64 = 28;
    pub(super) const LINK_UPDATE: i64 = 29;
    pub(super) const ITER_CREATE: i64 = 33;
    pub(super) const LINK_DETACH: i64 = 34;
}

/// Map types, as in `enum bpf_map_type`.
pub(crate) mod map_type {
    pub(crate) const HASH: u32 = 1;
    pub(crate) const ARRAY: u32 = 2;
    pub(crate) const PERCPU_HASH: u32 = 5;
    pub(crate) const PERCPU_ARRAY: u32 = 6;
    pub(crate) const LRU_HASH: u32 = 9;
    pub(crate) const LPM_TRIE: u32 = 11;
    pub(crate) const SK_STORAGE: u32 = 24;
    pub(crate) const RINGBUF: u32 = 27;
}

pub(crate) mod map_flag {
    pub(crate) const NO_PREALLOC: u32 = 1;
    pub(crate) const MMAPABLE: u32 = 1 << 10;
}

/// Flags of an update.
pub(crate) const ANY: u64 = 0;
pub(crate) const NOEXIST: u64 = 1;

const OPEN_READ_ONLY: u32 = 1 << 3;

/// Elements for each batch call: large enough to amortise the call, small enough for the stack of kernel buffers.
const BATCH: usize = 4096;

/// Calls `bpf(2)`; `attr` is the prefix of `union bpf_attr` that the command reads.
fn bpf<T>(command: i64, attr: &mut T) -> io::Result<i32> {
    // SAFETY: `attr` is live and exactly as long as said, and has every field that the command writes back: some are written wherever
    // they stand in the union, whatever length was given. Pointers inside it were made by the callers in this module from buffers
    // that outlive the call and are as long as the kernel takes them to be.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, ptr::from_mut(attr), size_of::<T>()) };
    i32::try_from(result).ok().filter(|r| *r >= 0).ok_or_else(io::Error::last_os_error)
}

fn bpf_fd<T>(command: i64, attr: &mut T) -> io::Result<OwnedFd> {
    let fd = bpf(command, attr)?;
    // SAFETY: the command returned a new file descriptor that nobody else holds.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn raw(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

fn address<T>(of: *const T) -> u64 {
    of.addr() as u64
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e))
}

#[repr(C)]
#[derive(Default)]
struct ObjAttr {
    path: u64,
    fd: u32,
    flags: u32,
}

/// Pins `fd` at `path`, which must not exist.
pub(crate) fn pin(fd: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    bpf(cmd::OBJ_PIN, &mut ObjAttr { path: address(path.as_ptr()), fd: raw(fd), flags: 0 }).map(drop)
}

/// Where a pin waits until it takes the place of another; a process that dies may leave one behind.
pub(crate) fn waiting(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push("-new");
    path.with_file_name(name)
}

/// Pins `fd` at `path`, replacing what is there in one step.
pub(crate) fn pin_over(fd: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let fresh = waiting(path);
    match std::fs::remove_file(&fresh) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    pin(fd, &fresh)?;
    std::fs::rename(&fresh, path)
}

/// Opens a pinned object.
pub(crate) fn open(path: &Path) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    bpf_fd(cmd::OBJ_GET, &mut ObjAttr { path: address(path.as_ptr()), ..Default::default() })
}

/// Opens a pinned map so that this process cannot write to it.
pub(crate) fn open_read_only(path: &Path) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    bpf_fd(cmd::OBJ_GET, &mut ObjAttr { path: address(path.as_ptr()), fd: 0, flags: OPEN_READ_ONLY })
}

#[repr(C)]
struct InfoAttr {
    fd: u32,
    len: u32,
    info: u64,
}

/// The first words of a `bpf_*_info` struct; later fields are not asked for.
fn info(fd: BorrowedFd<'_>) -> io::Result<[u32; 64]> {
    let mut words = [0_u32; 64];
    let len = size_of::<[u32; 64]>() as u32;
    bpf(cmd::OBJ_INFO, &mut InfoAttr { fd: raw(fd), len, info: address(words.as_mut_ptr()) })?;
    Ok(words)
}

/// What the kernel says of a link (`struct bpf_link_info`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct LinkInfo {
    pub(crate) program_id: u32,
    /// Interface index (TCX, XDP) or cgroup id; 0 once the device or the cgroup is gone, or the link was detached.
    pub(crate) target: u64,
}

const LINK_TYPE_CGROUP: u32 = 3;
const LINK_TYPE_XDP: u32 = 6;
const LINK_TYPE_TCX: u32 = 11;

pub(crate) fn link_info(fd: BorrowedFd<'_>) -> io::Result<LinkInfo> {
    let [kind, _id, program_id, _pad, low, high, ..] = info(fd)?;
    let target = match kind {
        LINK_TYPE_CGROUP => u64::from(high) << 32 | u64::from(low),
        LINK_TYPE_XDP | LINK_TYPE_TCX => u64::from(low),
        other => return Err(io::Error::new(io::ErrorKind::InvalidData, format!("link of unknown type {other}"))),
    };
    Ok(LinkInfo { program_id, target })
}

pub(crate) fn program_id(fd: BorrowedFd<'_>) -> io::Result<u32> {
    let [_kind, id, ..] = info(fd)?;
    Ok(id)
}

/// What the kernel says of a map (`struct bpf_map_info`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct MapInfo {
    pub(crate) kind: u32,
    pub(crate) key: u32,
    pub(crate) value: u32,
    pub(crate) max_entries: u32,
    pub(crate) flags: u32,
}

pub(crate) fn map_info(fd: BorrowedFd<'_>) -> io::Result<MapInfo> {
    let [kind, _id, key, value, max_entries, flags, ..] = info(fd)?;
    Ok(MapInfo { kind, key, value, max_entries, flags })
}

pub(crate) fn map_id(fd: BorrowedFd<'_>) -> io::Result<u32> {
    let [_kind, id, ..] = info(fd)?;
    Ok(id)
}

#[repr(C)]
struct CreateAttr {
    info: [u32; 5],
    inner_map_fd: u32,
    numa_node: u32,
    name: [u8; 16],
}

/// Creates a map without type information; for the maps that no program reads.
pub(crate) fn create(name: &str, info: MapInfo) -> io::Result<OwnedFd> {
    let MapInfo { kind, key, value, max_entries, flags } = info;
    let mut bytes = [0_u8; 16];
    for (to, from) in bytes.iter_mut().take(15).zip(name.bytes()) {
        *to = from;
    }
    bpf_fd(
        cmd::MAP_CREATE,
        &mut CreateAttr { info: [kind, key, value, max_entries, flags], inner_map_fd: 0, numa_node: 0, name: bytes },
    )
}

/// Where a link goes.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Target<'a> {
    Cgroup(BorrowedFd<'a>),
    Interface(u32),
    /// An interface's XDP hook, by `XDP_FLAGS_*`.
    Xdp(u32, u32),
}

#[repr(C)]
#[derive(Default)]
struct LinkCreateAttr {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
    relative: u32,
    pad: u32,
    expected_revision: u64,
}

/// Attaches behind whatever is there already: cgroup links always allow others beside them, TCX links queue at the end. XDP takes one alone:
/// EBUSY says that there is another.
pub(crate) fn link_create(program: BorrowedFd<'_>, target: Target<'_>, attach_type: u32) -> io::Result<OwnedFd> {
    let (target, flags) = match target {
        Target::Cgroup(fd) => (raw(fd), 0),
        Target::Interface(index) => (index, 0),
        Target::Xdp(index, flags) => (index, flags),
    };
    let program = raw(program);
    bpf_fd(cmd::LINK_CREATE, &mut LinkCreateAttr { program, target, attach_type, flags, ..Default::default() })
}

/// Whole: where TCX is asked, the kernel writes `revision` back even if `attr` is said to end before it.
#[repr(C)]
#[derive(Default)]
struct QueryAttr {
    target: u32,
    attach_type: u32,
    flags: u32,
    attach_flags: u32,
    programs: u64,
    count: u32,
    pad: u32,
    program_attach_flags: u64,
    links: u64,
    link_attach_flags: u64,
    revision: u64,
}

const _: () = assert!(offset_of!(QueryAttr, revision) == 56 && size_of::<QueryAttr>() == 64);

/// Ids of the programs at a device's TCX hook, in the order in which they run (6.6, e420bed02507). More than a kernel takes there (64) are
/// not asked for.
pub(crate) fn attached(index: u32, attach_type: u32) -> io::Result<Vec<u32>> {
    let mut ids = vec![0_u32; 64];
    let programs = address(ids.as_mut_ptr());
    let mut attr = QueryAttr { target: index, attach_type, programs, count: 64, ..Default::default() };
    match bpf(cmd::PROG_QUERY, &mut attr) {
        Ok(_) => {}
        // Nobody was ever attached there.
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(Vec::new()),
        Err(error) => return Err(error),
    }
    ids.truncate(attr.count as usize);
    Ok(ids)
}

/// `expected_attach_type` and `attach_btf_id` stand where the kernel has them; what lies between is zero.
#[repr(C)]
#[derive(Default)]
struct ProgramAttr {
    kind: u32,
    instructions: u32,
    code: u64,
    license: u64,
    log: [u32; 4],
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    attach_type: u32,
    types: [u32; 2],
    functions: u64,
    function_count: u32,
    line_size: u32,
    lines: u64,
    line_count: u32,
    attach_btf_id: u32,
}

const _: () = assert!(size_of::<ProgramAttr>() == 112);

const BPF_PROG_TYPE_TRACING: u32 = 26;
const BPF_TRACE_ITER: u32 = 28;

/// Loads an iterator's program for the kernel function of that type id.
pub(crate) fn load_iterator(code: &[u8], hook: u32) -> io::Result<OwnedFd> {
    let attr = &mut ProgramAttr {
        kind: BPF_PROG_TYPE_TRACING,
        instructions: (code.len() / 8) as u32,
        code: address(code.as_ptr()),
        license: address(c"GPL".as_ptr()),
        name: *b"proxy_notes\0\0\0\0\0",
        attach_type: BPF_TRACE_ITER,
        attach_btf_id: hook,
        ..Default::default()
    };
    bpf_fd(cmd::PROG_LOAD, attr)
}

#[repr(C)]
struct IteratorLinkAttr {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
    about: u64,
    about_len: u32,
    pad: u32,
}

/// A file that holds what the program writes of each element of `map`, once.
pub(crate) fn iterate(program: BorrowedFd<'_>, map: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let about = raw(map);
    let attr = &mut IteratorLinkAttr {
        program: raw(program),
        target: 0,
        attach_type: BPF_TRACE_ITER,
        flags: 0,
        about: address(&raw const about),
        about_len: size_of::<u32>() as u32,
        pad: 0,
    };
    let link = bpf_fd(cmd::LINK_CREATE, attr)?;
    // Link, flags. The file keeps the link.
    bpf_fd(cmd::ITER_CREATE, &mut [raw(link.as_fd()), 0])
}

#[repr(C)]
struct LinkUpdateAttr {
    link: u32,
    program: u32,
    flags: u32,
    old_program: u32,
}

/// Swaps the program of a link in place: no packet, no socket sees the link without one.
pub(crate) fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    bpf(cmd::LINK_UPDATE, &mut LinkUpdateAttr { link: raw(link), program: raw(program), flags: 0, old_program: 0 })
        .map(drop)
}

/// Takes the program off its hook now, whoever still holds the link.
pub(crate) fn link_detach(link: BorrowedFd<'_>) -> io::Result<()> {
    bpf(cmd::LINK_DETACH, &mut raw(link)).map(drop)
}

#[repr(C)]
#[derive(Default)]
struct ElementAttr {
    map: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
#[derive(Default)]
struct BatchAttr {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map: u32,
    element_flags: u64,
    flags: u64,
}

/// What `EINVAL` and its like mean for a batch: this kernel or this kind of map has none.
fn no_batch(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP | ENOTSUPP | libc::ENOSYS))
}

/// The kernel's own errno that has no name in user space.
const ENOTSUPP: i32 = 524;

/// A map of keys `K` and values `V`, both exactly as large as the kernel's.
#[derive(Debug)]
pub(crate) struct Map<K, V> {
    fd: OwnedFd,
    types: PhantomData<(K, V)>,
}

impl<K: Pod, V: Pod> Map<K, V> {
    /// Fails where the sizes differ: a smaller type would let the kernel write past it.
    pub(crate) fn new(fd: OwnedFd) -> io::Result<Self> {
        let MapInfo { key, value, .. } = map_info(fd.as_fd())?;
        if key as usize != size_of::<K>() || value as usize != size_of::<V>() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("entries of {key}+{value} bytes, not {}+{}", size_of::<K>(), size_of::<V>()),
            ));
        }
        Ok(Self { fd, types: PhantomData })
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn element(&self) -> ElementAttr {
        ElementAttr { map: raw(self.fd()), ..Default::default() }
    }

    pub(crate) fn get(&self, key: &K) -> io::Result<Option<V>> {
        self.get_by(cmd::MAP_LOOKUP, key)
    }

    fn get_by(&self, command: i64, key: &K) -> io::Result<Option<V>> {
        let mut value = MaybeUninit::<V>::zeroed();
        let attr = &mut ElementAttr { key: address(key), value: address(value.as_mut_ptr()), ..self.element() };
        match bpf(command, attr) {
            // SAFETY: the kernel filled it (and it was zeroed); `Pod`: every bit pattern is valid.
            Ok(_) => Ok(Some(unsafe { value.assume_init() })),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub(crate) fn put(&self, key: &K, value: &V, flags: u64) -> io::Result<()> {
        let attr = &mut ElementAttr { key: address(key), value: address(value), flags, ..self.element() };
        bpf(cmd::MAP_UPDATE, attr).map(drop)
    }

    /// Whether there was something to remove.
    pub(crate) fn remove(&self, key: &K) -> io::Result<bool> {
        match bpf(cmd::MAP_DELETE, &mut ElementAttr { key: address(key), ..self.element() }) {
            Ok(_) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Removes an element and tells what it held at that moment (hash maps since 5.14, 3e87f192b405).
    pub(crate) fn take(&self, key: &K) -> io::Result<Option<V>> {
        self.get_by(cmd::LOOKUP_AND_DELETE, key)
    }

    /// Writes all, or as many as fit: how many landed, and why no more did.
    ///
    /// A batch that meets a full map keeps what it wrote and says how much that was (measured on 6.18).
    pub(crate) fn put_all(&self, keys: &[K], values: &[V], flags: u64) -> (usize, Option<io::Error>) {
        let total = keys.len().min(values.len());
        let mut done = 0;
        while let (Some(k), Some(v)) = (keys.get(done..total), values.get(done..total)) {
            if k.is_empty() {
                break;
            }
            let mut attr = BatchAttr {
                keys: address(k.as_ptr()),
                values: address(v.as_ptr()),
                count: k.len().min(BATCH) as u32,
                map: raw(self.fd()),
                element_flags: flags,
                ..Default::default()
            };
            let result = bpf(cmd::UPDATE_BATCH, &mut attr);
            match result {
                Ok(_) => done += attr.count as usize,
                Err(error) if no_batch(&error) => return self.put_each(keys, values, done, flags),
                Err(error) => return (done + attr.count as usize, Some(error)),
            }
        }
        (done, None)
    }

    fn put_each(&self, keys: &[K], values: &[V], from: usize, flags: u64) -> (usize, Option<io::Error>) {
        let mut done = from;
        for (key, value) in keys.iter().zip(values).skip(from) {
            if let Err(error) = self.put(key, value, flags) {
                return (done, Some(error));
            }
            done += 1;
        }
        (done, None)
    }

    /// Removes all; what is not there is skipped. How many there were.
    pub(crate) fn remove_all(&self, keys: &[K]) -> io::Result<usize> {
        let mut next = 0;
        let mut removed = 0;
        while let Some(rest) = keys.get(next..).filter(|rest| !rest.is_empty()) {
            let mut attr = BatchAttr {
                keys: address(rest.as_ptr()),
                count: rest.len().min(BATCH) as u32,
                map: raw(self.fd()),
                ..Default::default()
            };
            match bpf(cmd::DELETE_BATCH, &mut attr) {
                Ok(_) => {
                    next += attr.count as usize;
                    removed += attr.count as usize;
                }
                // The one that stopped the batch is absent: step over it.
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {
                    next += attr.count as usize + 1;
                    removed += attr.count as usize;
                }
                Err(error) if no_batch(&error) => {
                    for key in rest {
                        removed += usize::from(self.remove(key)?);
                    }
                    return Ok(removed);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(removed)
    }

    /// Every entry. With writers about, an entry that changes meanwhile may show its old or its new value.
    pub(crate) fn entries(&self) -> io::Result<Vec<(K, V)>> {
        let mut out = Vec::new();
        self.each(|key, value| out.push((key, value)))?;
        Ok(out)
    }

    /// Calls `each` with every entry, as [`Self::entries`] finds them.
    pub(crate) fn each(&self, mut each: impl FnMut(K, V)) -> io::Result<()> {
        dump(self.fd(), size_of::<K>(), size_of::<V>(), |key, value| {
            // SAFETY: as long as the type (checked in `new`), read unaligned; `Pod`: every bit pattern is valid.
            let key = unsafe { ptr::read_unaligned(key.as_ptr().cast()) };
            // SAFETY: as above.
            let value = unsafe { ptr::read_unaligned(value.as_ptr().cast()) };
            each(key, value);
        })
    }
}

/// Calls `each` with the bytes of every entry of a map; `value` is the size of all its CPUs' values where there are several.
pub(crate) fn dump(
    map: BorrowedFd<'_>,
    key: usize,
    value: usize,
    mut each: impl FnMut(&[u8], &[u8]),
) -> io::Result<()> {
    let mut room = 1024_usize;
    let mut keys = vec![0_u8; room * key];
    let mut values = vec![0_u8; room * value];
    // The kernel's cursor: a bucket number (hash maps) or an index (arrays); four bytes, but never more than a key.
    let mut cursor = vec![0_u8; key.max(8)];
    let mut next = cursor.clone();
    let mut first = true;
    loop {
        let mut attr = BatchAttr {
            in_batch: if first { 0 } else { address(cursor.as_ptr()) },
            out_batch: address(next.as_mut_ptr()),
            keys: address(keys.as_mut_ptr()),
            values: address(values.as_mut_ptr()),
            count: room as u32,
            map: raw(map),
            ..Default::default()
        };
        let result = bpf(cmd::LOOKUP_BATCH, &mut attr);
        let last = match result {
            Ok(_) => false,
            Err(error) => match error.raw_os_error() {
                Some(libc::ENOENT) => true,
                // One bucket holds more than there is room for.
                Some(libc::ENOSPC) if room < 1 << 22 => {
                    room *= 2;
                    keys.resize(room * key, 0);
                    values.resize(room * value, 0);
                    continue;
                }
                _ if first && no_batch(&error) => return dump_each(map, key, value, each),
                _ => return Err(error),
            },
        };
        for (k, v) in keys.chunks_exact(key).zip(values.chunks_exact(value)).take(attr.count as usize) {
            each(k, v);
        }
        if last {
            return Ok(());
        }
        first = false;
        std::mem::swap(&mut cursor, &mut next);
    }
}

fn dump_each(map: BorrowedFd<'_>, key: usize, value: usize, mut each: impl FnMut(&[u8], &[u8])) -> io::Result<()> {
    let mut at: Option<Vec<u8>> = None;
    let mut bytes = vec![0_u8; value];
    loop {
        let mut next = vec![0_u8; key];
        let mut attr = ElementAttr {
            map: raw(map),
            key: at.as_ref().map_or(0, |k| address(k.as_ptr())),
            value: address(next.as_mut_ptr()),
            ..Default::default()
        };
        match bpf(cmd::MAP_NEXT_KEY, &mut attr) {
            Ok(_) => {}
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(()),
            Err(error) => return Err(error),
        }
        let mut attr = ElementAttr {
            map: raw(map),
            key: address(next.as_ptr()),
            value: address(bytes.as_mut_ptr()),
            ..Default::default()
        };
        match bpf(cmd::MAP_LOOKUP, &mut attr) {
            Ok(_) => each(&next, &bytes),
            // Gone between the two calls.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            Err(error) => return Err(error),
        }
        at = Some(next);
    }
}

/// The bytes of one element of an array; `value` is as long as all its CPUs' values together.
pub(crate) fn read_element(map: BorrowedFd<'_>, index: u32, value: &mut [u8]) -> io::Result<()> {
    let attr = &mut ElementAttr {
        map: raw(map),
        key: address(&raw const index),
        value: address(value.as_mut_ptr()),
        ..Default::default()
    };
    bpf(cmd::MAP_LOOKUP, attr).map(drop)
}

/// Deletes one element of a map whose values the caller does not care for. Whether there was one.
pub(crate) fn remove<K: Pod>(map: BorrowedFd<'_>, key: &K) -> io::Result<bool> {
    if map_info(map)?.key as usize != size_of::<K>() {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a key of another size"));
    }
    let attr = &mut ElementAttr { map: raw(map), key: address(key), ..Default::default() };
    match bpf(cmd::MAP_DELETE, attr) {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Writes one element from bytes that [`dump`] gave of a map of the same kind.
pub(crate) fn put_bytes(map: BorrowedFd<'_>, key: &[u8], value: &[u8], flags: u64) -> io::Result<()> {
    let attr = &mut ElementAttr {
        map: raw(map),
        key: address(key.as_ptr()),
        value: address(value.as_ptr()),
        flags,
        ..Default::default()
    };
    bpf(cmd::MAP_UPDATE, attr).map(drop)
}
