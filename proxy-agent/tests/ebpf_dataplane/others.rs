//! What others do to hooks: a link detached by hand, programs in front of ours.

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use proxy_agent::dataplane::Dataplane;

use super::{World, devices, link_ids, start, state};

const OBJ_GET: i64 = 7;
const LINK_CREATE: i64 = 28;
const LINK_DETACH: i64 = 34;
const TCX_INGRESS: u32 = 46;

fn bpf(command: i64, attr: &[u32]) -> i32 {
    // SAFETY: the attribute lives through the call, and is as long as the kernel is told.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attr.as_ptr(), size_of_val(attr)) };
    assert!(result >= 0, "bpf({command}): {}", io::Error::last_os_error());
    result as i32
}

fn owned(fd: i32) -> OwnedFd {
    // SAFETY: just made, and nobody else's.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn pinned(path: &Path) -> OwnedFd {
    let path = CString::new(path.as_os_str().as_bytes()).unwrap();
    let address = path.as_ptr() as u64;
    owned(bpf(OBJ_GET, &[address as u32, (address >> 32) as u32, 0, 0]))
}

/// As `bpftool link detach` does it.
fn detach(link: &OwnedFd) {
    bpf(LINK_DETACH, &[link.as_raw_fd() as u32]);
}

/// The link stays pinned, and its program is off its place.
#[test]
fn a_link_that_is_detached_by_hand_is_made_anew() {
    let Some(world) = World::new("detach") else { return };
    let mut ebpf = world.open();
    start(&mut ebpf, &state(2), &devices());
    let whole = ebpf.hooks().len();
    for name in ["connect4", "tcx-701-ingress"] {
        let before = link_ids(&world)[name];
        detach(&pinned(&world.options.bpffs.join("v1/links").join(name)));
        let lost = ebpf.observe().unwrap().hooks;
        assert_eq!((lost.len(), ebpf.hooks().len()), (1, whole - 1), "{name}: {lost:?}");
        ebpf.activate().unwrap();
        assert!(ebpf.observe().unwrap().is_empty(), "{name}");
        assert_eq!(ebpf.hooks().len(), whole, "{name}");
        assert_ne!(link_ids(&world)[name], before, "{name}");
    }
}

#[test]
fn programs_in_front_of_ours_are_said() {
    let Some(world) = World::new("ahead") else { return };
    let (mut ebpf, devices) = (world.open(), devices());
    let attach = |index| {
        let program = pinned(&world.options.bpffs.join("v1/programs/tc_ingress_l3"));
        owned(bpf(LINK_CREATE, &[program.as_raw_fd() as u32, index, TCX_INGRESS, 0]))
    };
    // One that was there first, and one that comes later and queues behind ours.
    let first = attach(701);
    start(&mut ebpf, &state(2), &devices);
    let _later = attach(702);
    let ahead = ebpf.ahead();
    assert_eq!(ahead.len(), 1, "{ahead:?}");
    let seen = (ahead[0].kind.as_str(), ahead[0].target.as_str(), ahead[0].programs.len());
    assert_eq!(seen, ("tcx/ingress", "veth-a", 1));
    detach(&first);
    assert_eq!(ebpf.ahead(), []);
}
