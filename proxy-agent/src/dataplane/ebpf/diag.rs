//! Socket diagnostics: which sockets are connected, and the end of one.

use std::{io, os::fd::OwnedFd};

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP: u16 = 0x300;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const HEADER: usize = 16;
/// States of a socket that has a peer: all but closed, listening, TIME_WAIT and those without a socket.
const WITH_PEER: u32 = 1 << 1 | 1 << 2 | 1 << 4 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 11;
const ANY_STATE: u32 = u32::MAX;

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
    pub(crate) fn connected(&self, family: u8, protocol: u8, mut each: impl FnMut(&Id)) -> io::Result<()> {
        self.send(SOCK_DIAG_BY_FAMILY, NLM_F_DUMP, family, protocol, WITH_PEER, &[0; 48])?;
        let mut buffer = vec![0_u8; 64 * 1024];
        loop {
            let (_, length) = rustix::net::recv(&self.0, buffer.as_mut_slice(), RecvFlags::empty())?;
            let mut rest = buffer.get(..length).unwrap_or_default();
            while let Some((kind, message, next)) = split(rest) {
                match kind {
                    NLMSG_DONE => return Ok(()),
                    NLMSG_ERROR => return Err(error(message).unwrap_or_else(|| io::ErrorKind::InvalidData.into())),
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
        let length = HEADER + 8 + id.len();
        let mut message = Vec::with_capacity(length);
        message.extend_from_slice(&(length as u32).to_ne_bytes());
        message.extend_from_slice(&kind.to_ne_bytes());
        message.extend_from_slice(&(NLM_F_REQUEST | flags).to_ne_bytes());
        // Sequence number and port: one request is out at a time.
        message.extend_from_slice(&[0; 8]);
        // `struct inet_diag_req_v2`.
        message.extend_from_slice(&[family, protocol, 0, 0]);
        message.extend_from_slice(&states.to_ne_bytes());
        message.extend_from_slice(id);
        rustix::net::send(&self.0, &message, SendFlags::empty())?;
        Ok(())
    }
}

/// Asks for the end of a UDP socket that cannot exist (port 0 to port 0): ENOENT where the operation is known, EOPNOTSUPP
/// where it is not compiled in.
pub(crate) fn can_destroy() -> io::Result<bool> {
    match Socket::open()?.destroy(libc::AF_INET as u8, libc::IPPROTO_UDP as u8, &[0; 48]) {
        Ok(_) => Ok(true),
        Err(error) => match error.raw_os_error() {
            Some(libc::EOPNOTSUPP) => Ok(false),
            Some(libc::EINVAL) => Ok(true),
            _ => Err(error),
        },
    }
}

/// The first message: its type, what is in it, and what comes after it.
fn split(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let length = u32::from_ne_bytes(*bytes.first_chunk()?) as usize;
    let kind = u16::from_ne_bytes(*bytes.get(4..)?.first_chunk()?);
    let message = bytes.get(HEADER..length)?;
    Some((kind, message, bytes.get(length.next_multiple_of(4)..).unwrap_or_default()))
}

/// What `NLMSG_ERROR` says; nothing if it is an acknowledgement.
fn error(message: &[u8]) -> Option<io::Error> {
    let code = message.first_chunk().map_or(-libc::EINVAL, |code| i32::from_ne_bytes(*code));
    (code != 0).then(|| io::Error::from_raw_os_error(-code))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_follow_one_another() {
        let message = |kind: u16, body: &[u8]| {
            let mut bytes = ((HEADER + body.len()) as u32).to_ne_bytes().to_vec();
            bytes.extend(kind.to_ne_bytes());
            bytes.resize(HEADER, 0);
            bytes.extend(body);
            bytes
        };
        let code = (-libc::ENOENT).to_ne_bytes();
        let both = [message(SOCK_DIAG_BY_FAMILY, b"1234"), message(NLMSG_ERROR, &code)].concat();
        let (kind, body, rest) = split(&both).unwrap();
        assert_eq!((kind, body), (SOCK_DIAG_BY_FAMILY, b"1234".as_slice()));
        let (kind, body, rest) = split(rest).unwrap();
        assert_eq!((kind, error(body).unwrap().raw_os_error()), (NLMSG_ERROR, Some(libc::ENOENT)));
        assert!(rest.is_empty() && split(rest).is_none());
        assert!(error(&0_i32.to_ne_bytes()).is_none());
    }
}
