//! Socket diagnostics: which sockets are connected, and the end of one.

use std::{io, os::fd::OwnedFd};

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink};

use crate::dataplane::netlink::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, error, message, split};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
/// States of a socket that has a peer: all but closed, listening, TIME_WAIT and those without a socket.
const WITH_PEER: u32 = 1 << 1 | 1 << 2 | 1 << 4 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 11;
const ANY_STATE: u32 = u32::MAX;
const NO_STATE: u32 = 0;

/// `struct inet_diag_sockid`: source and destination port, source and destination address, interface, cookie.
pub(crate) type Id = [u8; 48];

/// Of the network namespace that it was opened in.
#[derive(Debug)]
pub(crate) struct Socket(OwnedFd);

impl Socket {
    pub(crate) fn open() -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC;
        Ok(Self(rustix::net::socket_with(AddressFamily::NETLINK, SocketType::DGRAM, flags, Some(netlink::SOCK_DIAG))?))
    }

    /// Calls `each` with every connected socket of `family` and `protocol`.
    ///
    /// A socket that comes or goes meanwhile may be missed: nobody can list what does not stand still.
    pub(crate) fn connected(&self, family: u8, protocol: u8, each: impl FnMut(&Id)) -> io::Result<()> {
        self.list(family, protocol, WITH_PEER, each)
    }

    fn list(&self, family: u8, protocol: u8, states: u32, mut each: impl FnMut(&Id)) -> io::Result<()> {
        self.send(SOCK_DIAG_BY_FAMILY, NLM_F_DUMP, family, protocol, states, &[0; 48])?;
        let mut buffer = vec![0_u8; 64 * 1024];
        loop {
            let (_, length) = rustix::net::recv(&self.0, buffer.as_mut_slice(), RecvFlags::empty())?;
            let mut rest = buffer.get(..length).unwrap_or_default();
            while let Some((kind, message, next)) = split(rest) {
                match kind {
                    // Both say how it went; the kernel has no list of a protocol that it does not know (ENOENT).
                    NLMSG_DONE | NLMSG_ERROR => return error(message).map_or(Ok(()), Err),
                    _ => {
                        // `struct inet_diag_msg`: family, state, timer, retransmissions, id.
                        if let Some(id) = message.get(4..).and_then(|rest| rest.first_chunk()) {
                            each(id);
                        }
                    }
                }
                rest = next;
            }
        }
    }

    /// Destroys the socket with exactly these addresses and this cookie. Whether there was one.
    pub(crate) fn destroy(&self, family: u8, protocol: u8, id: &Id) -> io::Result<bool> {
        self.send(SOCK_DESTROY, NLM_F_ACK, family, protocol, ANY_STATE, id)?;
        let mut buffer = vec![0_u8; 4096];
        let (_, length) = rustix::net::recv(&self.0, buffer.as_mut_slice(), RecvFlags::empty())?;
        let Some((NLMSG_ERROR, message, _)) = split(buffer.get(..length).unwrap_or_default()) else {
            return Err(io::ErrorKind::InvalidData.into());
        };
        match error(message) {
            None => Ok(true),
            // Closed, or connected elsewhere, since it was listed.
            Some(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESTALE)) => Ok(false),
            Some(error) => Err(error),
        }
    }

    fn send(&self, kind: u16, flags: u16, family: u8, protocol: u8, states: u32, id: &Id) -> io::Result<()> {
        // `struct inet_diag_req_v2`.
        let body = [&[family, protocol, 0, 0], states.to_ne_bytes().as_slice(), id].concat();
        let message = message(kind, NLM_F_REQUEST | flags, &body);
        rustix::net::send(&self.0, &message, SendFlags::empty())?;
        Ok(())
    }
}

/// Whether the kernel destroys sockets of `protocol`; if not, why. It is asked for the end of one that cannot exist (port 0 to port 0).
pub(crate) fn can_destroy(protocol: u8) -> Result<(), String> {
    let family = libc::AF_INET as u8;
    let socket = Socket::open().map_err(|error| error.to_string())?;
    let listed = socket.list(family, protocol, NO_STATE, |_| {});
    judge(listed, || socket.destroy(family, protocol, &[0; 48]))
}

/// What the answers mean. No such socket and no such protocol are one errno to who asks for an end (ENOENT), so a list that there is
/// tells first that the kernel knows the protocol.
fn judge(listed: io::Result<()>, destroyed: impl FnOnce() -> io::Result<bool>) -> Result<(), String> {
    if let Err(error) = listed {
        return Err(match error.raw_os_error() {
            Some(libc::ENOENT) => "the kernel has no socket diagnostics, or may not load them".into(),
            _ => error.to_string(),
        });
    }
    match destroyed() {
        Ok(_) => Ok(()),
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Err("not in this kernel".into()),
        Err(error) => Err(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 99 is nobody's: as if UDP's or TCP's diagnostics were missing.
    const NOBODYS: u8 = 99;

    #[test]
    fn a_protocol_without_diagnostics_is_told_from_a_socket_that_is_not_there() {
        let of = |errno| io::Error::from_raw_os_error(errno);
        let there = || Ok(false);
        assert_eq!(judge(Ok(()), there), Ok(()));
        assert!(judge(Err(of(libc::ENOENT)), there).unwrap_err().contains("diagnostics"));
        assert!(judge(Err(of(libc::EPERM)), there).is_err());
        assert_eq!(judge(Ok(()), || Err(of(libc::EOPNOTSUPP))), Err("not in this kernel".into()));
        assert!(judge(Ok(()), || Err(of(libc::EPERM))).is_err());
    }

    #[test]
    fn the_kernel_tells_them_apart() {
        // Listing needs no privileges, and a kernel without any diagnostics answers as one without this protocol's.
        let socket = Socket::open().unwrap();
        let error = socket.list(libc::AF_INET as u8, NOBODYS, NO_STATE, |_| {}).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOENT));
        assert!(can_destroy(NOBODYS).is_err());
    }
}
