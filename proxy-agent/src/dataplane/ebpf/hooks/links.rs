//! Pinned links: made, moved to other programs, removed; and what their names say.

use std::{
    fs, io,
    os::fd::{AsFd, BorrowedFd},
    path::Path,
};

use rustix::io::Errno;

use super::programs::Program;
use crate::dataplane::ebpf::{
    clsact::Direction,
    pins::Layout,
    sys::{self, Target},
    xdp::Mode,
};

const TCX_INGRESS: u32 = 46;
const TCX_EGRESS: u32 = 47;

pub(super) const fn tcx_type(direction: Direction) -> u32 {
    match direction {
        Direction::Ingress => TCX_INGRESS,
        Direction::Egress => TCX_EGRESS,
    }
}

pub(super) fn tcx_name(index: u32, direction: Direction) -> String {
    format!("tcx-{index}-{}", direction.as_str())
}

pub(super) const XDP: u32 = 37;

pub(super) fn xdp_name(index: u32, mode: Mode) -> String {
    format!("xdp-{index}-{}", mode.as_str())
}

/// The index and the mode in a pin's name.
pub(crate) fn parse_xdp_name(name: &str) -> Option<(u32, &str)> {
    let (index, mode) = name.strip_prefix("xdp-")?.split_once('-')?;
    Some((index.parse().ok()?, mode))
}

/// Whether the pin is of a link on a device.
pub(super) fn is_devices(name: &str) -> bool {
    name.starts_with("tcx-") || name.starts_with("xdp-")
}

/// The index and the direction in a pin's name.
pub(crate) fn parse_tcx_name(name: &str) -> Option<(u32, &str)> {
    let (index, direction) = name.strip_prefix("tcx-")?.split_once('-')?;
    Some((index.parse().ok()?, direction))
}

/// The device's name; where it is not in this network namespace, its index.
pub(crate) fn interface_name(index: u32) -> String {
    index_to_name(index).unwrap_or_else(|_| format!("interface {index}"))
}

/// Whether the kernel says that there is no such device in this network namespace.
pub(super) fn is_gone(index: u32) -> bool {
    index_to_name(index) == Err(Errno::NODEV)
}

fn index_to_name(index: u32) -> Result<String, Errno> {
    let socket = rustix::net::socket(rustix::net::AddressFamily::UNIX, rustix::net::SocketType::DGRAM, None)?;
    rustix::net::netdevice::index_to_name(&socket, index)
}

/// A kernel with TCX finds no such device; one without does not know the attach type (6.6, e420bed02507).
pub(crate) fn has_tcx(program: BorrowedFd<'_>) -> bool {
    let nowhere = Target::Interface(u32::try_from(i32::MAX).unwrap_or_default());
    matches!(sys::link_create(program, nowhere, TCX_INGRESS), Err(error) if error.raw_os_error() == Some(libc::ENODEV))
}

/// Names in a directory of pins.
pub(crate) fn list(directory: &Path) -> io::Result<Vec<String>> {
    let mut names = vec![];
    for entry in fs::read_dir(directory)? {
        if let Ok(name) = entry?.file_name().into_string() {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

/// Makes `pin` a link of `program` on `target`; how many writes that took.
pub(super) fn ensure(
    pin: &Path,
    program: &Program,
    target: Target<'_>,
    target_id: u64,
    attach_type: u32,
) -> io::Result<u64> {
    // A process that died between pinning a link and naming the pin left it attached; TCX takes no program twice.
    if !pin.exists() && sys::waiting(pin).exists() {
        fs::rename(sys::waiting(pin), pin)?;
    }
    match sys::open(pin) {
        Ok(link) => {
            let info = sys::link_info(link.as_fd());
            match info {
                Ok(info) if info.target == target_id && info.program_id == program.id => return Ok(0),
                // In place. If the link turns out dead after all, it is replaced below.
                Ok(info) if info.target == target_id && sys::link_update(link.as_fd(), program.fd.as_fd()).is_ok() => {
                    return Ok(1);
                }
                _ => {}
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let link = sys::link_create(program.fd.as_fd(), target, attach_type)?;
    sys::pin_over(link.as_fd(), pin)?;
    Ok(1)
}

/// Detaches and unpins links by name; how many.
pub(super) fn remove(layout: &Layout, which: impl Fn(&str) -> bool) -> io::Result<u64> {
    let mut removed = 0;
    for name in list(&layout.links)?.iter().filter(|name| which(name)) {
        let path = layout.links.join(name);
        if let Ok(link) = sys::open(&path) {
            // It may be dead already (its device is gone); the pin goes either way.
            let _ = sys::link_detach(link.as_fd());
        }
        fs::remove_file(&path)?;
        removed += 1;
    }
    Ok(removed)
}
