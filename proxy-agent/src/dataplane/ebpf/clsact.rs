//! tc filters on the clsact qdisc, for kernels without TCX (before 6.6), over rtnetlink.
//!
//! A filter has no link that could be pinned: ours is known by a priority and a handle that nobody else uses. Replacing it is
//! atomic; looking costs one request.

use std::{
    io,
    mem::size_of,
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
    ptr,
};

use rustix::net::{AddressFamily, SocketFlags, SocketType};

/// Below the automatic ones (49152 and down), above Cilium's 1.
const PRIORITY: u32 = 80;
/// "prox"
const HANDLE: u32 = 0x7072_6f78;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Direction {
    Ingress,
    Egress,
}

impl Direction {
    pub(crate) const BOTH: [Self; 2] = [Self::Ingress, Self::Egress];

    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        }
    }

    /// The clsact class (`TC_H_CLSACT`, `TC_H_MIN_INGRESS` or `_EGRESS`).
    const fn parent(self) -> u32 {
        match self {
            Self::Ingress => 0xffff_fff2,
            Self::Egress => 0xffff_fff3,
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Head {
    len: u32,
    kind: u16,
    flags: u16,
    sequence: u32,
    port: u32,
    // struct tcmsg
    family: u8,
    pad: [u8; 3],
    index: u32,
    handle: u32,
    parent: u32,
    info: u32,
}

const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_EXCL: u16 = 0x200;
const NLM_F_CREATE: u16 = 0x400;
const RTM_NEWQDISC: u16 = 36;
const RTM_NEWTFILTER: u16 = 44;
const RTM_DELTFILTER: u16 = 45;
const RTM_GETTFILTER: u16 = 46;
const NLMSG_ERROR: u16 = 2;
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_BPF_FD: u16 = 6;
const TCA_BPF_NAME: u16 = 7;
const TCA_BPF_FLAGS: u16 = 8;
const TCA_BPF_ID: u16 = 11;
const ACT_DIRECT: u32 = 1;
const ETH_P_ALL: u16 = 3;

struct Socket(OwnedFd);

impl Socket {
    fn open() -> io::Result<Self> {
        let fd = rustix::net::socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            // NETLINK_ROUTE
            None,
        )?;
        Ok(Self(fd))
    }

    /// Sends one request; the answer's bytes, empty if it was only acknowledged.
    fn ask(&self, mut head: Head, attributes: &[u8]) -> io::Result<Vec<u8>> {
        head.len = (size_of::<Head>() + attributes.len()) as u32;
        head.sequence = 1;
        let mut message = Vec::with_capacity(head.len as usize);
        // SAFETY: `Head` is plain integers without padding.
        message.extend_from_slice(unsafe {
            std::slice::from_raw_parts(ptr::from_ref(&head).cast::<u8>(), size_of::<Head>())
        });
        message.extend_from_slice(attributes);
        rustix::net::send(&self.0, &message, rustix::net::SendFlags::empty())?;
        let mut buffer = vec![0_u8; 16 * 1024];
        let mut answer = Vec::new();
        loop {
            let (_, length) = rustix::net::recv(&self.0, buffer.as_mut_slice(), rustix::net::RecvFlags::empty())?;
            let mut rest = buffer.get(..length).unwrap_or_default();
            while let Some((kind, body, after)) = split(rest) {
                rest = after;
                if kind == NLMSG_ERROR {
                    let code = body.first_chunk().map_or(-libc::EPROTO, |b| i32::from_ne_bytes(*b));
                    return if code == 0 { Ok(answer) } else { Err(io::Error::from_raw_os_error(-code)) };
                }
                answer = body.to_vec();
            }
        }
    }
}

/// The first message: its type, its body, what follows.
fn split(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let len = u32::from_ne_bytes(*bytes.first_chunk()?) as usize;
    let kind = u16::from_ne_bytes(*bytes.get(4..)?.first_chunk()?);
    Some((kind, bytes.get(16..len)?, bytes.get(len.next_multiple_of(4)..).unwrap_or_default()))
}

/// The attribute of this type.
fn attribute(mut bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    loop {
        let len = usize::from(u16::from_ne_bytes(*bytes.first_chunk()?));
        let kind = u16::from_ne_bytes(*bytes.get(2..)?.first_chunk()?) & 0x3fff;
        let body = bytes.get(4..len)?;
        if kind == wanted {
            return Some(body);
        }
        bytes = bytes.get(len.next_multiple_of(4)..)?;
    }
}

fn push(to: &mut Vec<u8>, kind: u16, body: &[u8]) {
    to.extend_from_slice(&((body.len() + 4) as u16).to_ne_bytes());
    to.extend_from_slice(&kind.to_ne_bytes());
    to.extend_from_slice(body);
    to.resize(to.len().next_multiple_of(4), 0);
}

const fn head(kind: u16, flags: u16, index: u32, direction: Direction) -> Head {
    Head {
        len: 0,
        kind,
        flags: NLM_F_REQUEST | NLM_F_ACK | flags,
        sequence: 0,
        port: 0,
        family: 0,
        pad: [0; 3],
        index,
        handle: HANDLE,
        parent: direction.parent(),
        info: PRIORITY << 16 | ETH_P_ALL.to_be() as u32,
    }
}

fn kind_bpf() -> Vec<u8> {
    let mut attributes = vec![];
    push(&mut attributes, TCA_KIND, b"bpf\0");
    attributes
}

/// Whether this says that the device, its qdisc or the filter is not there.
fn is_absent(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV | libc::EINVAL))
}

/// Id of the program in our filter.
pub(crate) fn program(index: u32, direction: Direction) -> io::Result<Option<u32>> {
    let answer = match Socket::open()?.ask(head(RTM_GETTFILTER, 0, index, direction), &kind_bpf()) {
        Ok(answer) => answer,
        Err(error) if is_absent(&error) => return Ok(None),
        Err(error) => return Err(error),
    };
    let id = answer
        .get(size_of::<Head>() - 16..)
        .and_then(|attributes| attribute(attribute(attributes, TCA_OPTIONS)?, TCA_BPF_ID))
        .and_then(|id| id.first_chunk())
        .map(|id| u32::from_ne_bytes(*id));
    Ok(id)
}

/// Puts the program in our filter, making the qdisc and the filter if they are missing, replacing its program otherwise.
pub(crate) fn attach(index: u32, direction: Direction, program: BorrowedFd<'_>, name: &str) -> io::Result<()> {
    let socket = Socket::open()?;
    let mut qdisc = vec![];
    push(&mut qdisc, TCA_KIND, b"clsact\0");
    let request = Head {
        handle: 0xffff_0000,
        parent: 0xffff_fff1,
        info: 0,
        ..head(RTM_NEWQDISC, NLM_F_CREATE | NLM_F_EXCL, index, direction)
    };
    match socket.ask(request, &qdisc) {
        Err(error) if error.raw_os_error() != Some(libc::EEXIST) => return Err(error),
        _ => {}
    }
    let mut options = vec![];
    push(&mut options, TCA_BPF_FD, &program.as_raw_fd().to_ne_bytes());
    let mut c_name = name.as_bytes().to_vec();
    c_name.push(0);
    push(&mut options, TCA_BPF_NAME, &c_name);
    push(&mut options, TCA_BPF_FLAGS, &ACT_DIRECT.to_ne_bytes());
    let mut attributes = kind_bpf();
    push(&mut attributes, TCA_OPTIONS | 0x8000, &options);
    socket.ask(head(RTM_NEWTFILTER, NLM_F_CREATE, index, direction), &attributes).map(drop)
}

/// Removes our filter; the qdisc stays, others may use it. Whether there was one.
pub(crate) fn detach(index: u32, direction: Direction) -> io::Result<bool> {
    match Socket::open()?.ask(head(RTM_DELTFILTER, 0, index, direction), &kind_bpf()) {
        Ok(_) => Ok(true),
        Err(error) if is_absent(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

const _: () = assert!(size_of::<Head>() == 36);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_found_and_bounded() {
        let mut inner = vec![];
        push(&mut inner, TCA_BPF_NAME, b"abc\0");
        push(&mut inner, TCA_BPF_ID, &77_u32.to_ne_bytes());
        let mut bytes = kind_bpf();
        push(&mut bytes, TCA_OPTIONS, &inner);
        let options = attribute(&bytes, TCA_OPTIONS).unwrap();
        assert_eq!(attribute(options, TCA_BPF_ID), Some(&77_u32.to_ne_bytes()[..]));
        assert_eq!(attribute(&bytes, 99), None);
        for cut in 0..bytes.len() {
            let _ = attribute(&bytes[..cut], TCA_OPTIONS);
        }
    }
}
