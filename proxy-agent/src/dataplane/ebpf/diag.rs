//! Socket diagnostics: whether the kernel can destroy a socket for us.

use std::io;

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink};

const SOCK_DESTROY: u16 = 21;
const NLM_F_REQUEST_ACK: u16 = 1 | 4;
const NLMSG_ERROR: u16 = 2;
/// `struct inet_diag_req_v2`: family, protocol, ext, pad, states, then the socket's id.
const REQUEST: usize = 56;

/// Asks for the end of a UDP socket that cannot exist (port 0 to port 0): ENOENT where the operation is known, EOPNOTSUPP
/// where it is not compiled in.
pub(crate) fn can_destroy() -> io::Result<bool> {
    let socket = rustix::net::socket_with(
        AddressFamily::NETLINK,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        Some(netlink::SOCK_DIAG),
    )?;
    let mut message = Vec::with_capacity(16 + REQUEST);
    message.extend_from_slice(&((16 + REQUEST) as u32).to_ne_bytes());
    message.extend_from_slice(&SOCK_DESTROY.to_ne_bytes());
    message.extend_from_slice(&NLM_F_REQUEST_ACK.to_ne_bytes());
    message.extend_from_slice(&1_u32.to_ne_bytes());
    message.extend_from_slice(&0_u32.to_ne_bytes());
    message.extend_from_slice(&[libc::AF_INET as u8, libc::IPPROTO_UDP as u8, 0, 0]);
    message.resize(16 + REQUEST, 0);
    rustix::net::send(&socket, &message, SendFlags::empty())?;
    let mut buffer = vec![0_u8; 4096];
    let (_, length) = rustix::net::recv(&socket, buffer.as_mut_slice(), RecvFlags::empty())?;
    let answer = buffer.get(..length).unwrap_or_default();
    let kind = answer.get(4..).and_then(|b| b.first_chunk()).map(|b| u16::from_ne_bytes(*b));
    let code = answer.get(16..).and_then(|b| b.first_chunk()).map(|b| i32::from_ne_bytes(*b));
    match (kind, code.map(|code| -code)) {
        (Some(NLMSG_ERROR), Some(libc::EOPNOTSUPP)) => Ok(false),
        (Some(NLMSG_ERROR), Some(0 | libc::ENOENT | libc::EINVAL)) => Ok(true),
        (Some(NLMSG_ERROR), Some(code)) => Err(io::Error::from_raw_os_error(code)),
        _ => Err(io::Error::from(io::ErrorKind::InvalidData)),
    }
}
