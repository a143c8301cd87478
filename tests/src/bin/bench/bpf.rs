//! `bpf(2)` for programs of a few instructions that are made here.

use std::os::fd::{FromRawFd as _, OwnedFd};

use anyhow::{Result, ensure};
use nix::libc;

pub const BPF_PROG_LOAD: i32 = 5;

#[repr(C)]
#[derive(Default)]
pub struct Load {
    pub kind: u32,
    pub instructions: u32,
    pub code: u64,
    pub license: u64,
    pub log: [u32; 4],
    pub kernel: u32,
    pub flags: u32,
    pub name: [u8; 16],
    pub ifindex: u32,
    pub attach: u32,
}

/// Carries out a command that makes a descriptor.
pub fn bpf<T>(command: i32, attr: &T) -> Result<OwnedFd> {
    // SAFETY: `attr` is the head of `union bpf_attr` for the command and the size says how much of it there is.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attr), size_of::<T>()) };
    ensure!(fd >= 0, "bpf({command}): {}", std::io::Error::last_os_error());
    // SAFETY: a descriptor that the kernel has just made for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Carries out one that does not.
pub fn act<T>(command: i32, attr: &mut T) -> Result<()> {
    // SAFETY: as above; what the kernel writes back is of the same head.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>()) };
    ensure!(result == 0, "bpf({command}): {}", std::io::Error::last_os_error());
    Ok(())
}
