//! Whether the node has IPsec policies: what those would encrypt or refuse, XDP would send on in clear, for `bpf_fib_lookup` knows of none.
//!
//! Level-triggered: what is heard only says that it is time to ask again.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

use rustix::{
    io::Errno,
    net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, bind, netlink, recv, send, socket_with},
};
use tokio::io::unix::AsyncFd;

/// `XFRMNLGRP_POLICY`, and `XFRMNLGRP_EXPIRE`, which tells of policies whose time is over.
const GROUPS: u32 = 1 << (4 - 1) | 1 << (2 - 1);

const XFRM_MSG_NEWSPDINFO: u16 = 0x24;
const XFRM_MSG_GETSPDINFO: u16 = 0x25;
const XFRM_MSG_GETDEFAULT: u16 = 0x28;
const XFRMA_SPD_INFO: u16 = 1;
const XFRM_USERPOLICY_BLOCK: u8 = 1;
const NLM_F_REQUEST: u16 = 1;
/// `struct nlmsghdr`.
const HEADER: usize = 16;
/// The flags in front of the attributes.
const FLAGS: usize = 4;

/// What of IPsec is in XDP's way here, if anything.
pub(crate) fn bars() -> Option<&'static str> {
    match exist() {
        Ok(true) => Some("there are IPsec policies (ip xfrm policy): what XDP sends on passes none"),
        Ok(false) => None,
        Err(_) => Some("the kernel does not say whether there are IPsec policies, and what XDP sends on passes none"),
    }
}

/// Whether there are policies, or what none is for is not let through.
fn exist() -> io::Result<bool> {
    let Some(socket) = open()? else { return Ok(false) };
    if counts(&ask(&socket, XFRM_MSG_GETSPDINFO)?).ok_or(io::ErrorKind::InvalidData)? {
        return Ok(true);
    }
    // Since 5.14 (2d151d39073a); before, everything is let through.
    Ok(ask(&socket, XFRM_MSG_GETDEFAULT).is_ok_and(|answer| blocks(&answer)))
}

/// `None`: a kernel without IPsec.
fn open() -> io::Result<Option<OwnedFd>> {
    match socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, Some(netlink::XFRM)) {
        Ok(socket) => Ok(Some(socket)),
        Err(Errno::PROTONOSUPPORT) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn ask(socket: &OwnedFd, kind: u16) -> io::Result<Vec<u8>> {
    let mut message = ((HEADER + FLAGS) as u32).to_ne_bytes().to_vec();
    message.extend(kind.to_ne_bytes());
    message.extend(NLM_F_REQUEST.to_ne_bytes());
    // Sequence number and port: one request is out at a time. The flags.
    message.extend([0; 8 + FLAGS]);
    send(socket, &message, SendFlags::empty())?;
    let mut buffer = vec![0; 1024];
    let (_, length) = recv(socket, buffer.as_mut_slice(), RecvFlags::empty())?;
    buffer.truncate(length);
    Ok(buffer)
}

/// Whether any of the numbers of policies is above zero: in, out, forwarded; the next three are of sockets' own ones. `None`: no answer.
fn counts(answer: &[u8]) -> Option<bool> {
    if half(answer, 4)? != XFRM_MSG_NEWSPDINFO {
        return None;
    }
    let mut attributes = answer.get(HEADER + FLAGS..)?;
    loop {
        let length = usize::from(half(attributes, 0)?);
        if half(attributes, 2)? == XFRMA_SPD_INFO {
            return Some(attributes.get(4..length)?.get(..12)?.iter().any(|byte| *byte != 0));
        }
        attributes = attributes.get(length.max(4).next_multiple_of(4)..)?;
    }
}

/// Whether packets that no policy is for are refused: coming in, passing, going out (`struct xfrm_userpolicy_default`).
fn blocks(answer: &[u8]) -> bool {
    half(answer, 4) == Some(XFRM_MSG_GETDEFAULT)
        && answer.get(HEADER..HEADER + 3).is_some_and(|default| default.contains(&XFRM_USERPOLICY_BLOCK))
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// Hears when policies change.
pub(crate) struct Ear(Option<AsyncFd<OwnedFd>>);

impl Ear {
    /// One that is deaf hears nothing for ever: nobody is to be told, or there is no IPsec.
    pub(crate) fn open(is_wanted: bool) -> io::Result<Self> {
        let Some(socket) = is_wanted.then(open).transpose()?.flatten() else { return Ok(Self(None)) };
        bind(&socket, &netlink::SocketAddrNetlink::new(0, GROUPS))?;
        rustix::io::ioctl_fionbio(&socket, true)?;
        // SAFETY: the descriptor is the value's own, which nobody takes out of it: it stays open until the value is gone, and the same.
        Ok(Self(Some(unsafe { AsyncFd::register(socket)? })))
    }

    /// Until something was heard; all of it is taken out.
    pub(crate) async fn heard(&self) -> io::Result<()> {
        let Self(Some(socket)) = self else { return std::future::pending().await };
        let mut ready = socket.readable().await?;
        let mut buffer = [0; 4096];
        loop {
            match recv(socket.get_ref().as_fd(), &mut buffer[..], RecvFlags::empty()) {
                // More than there was room for: as good as any.
                Ok(_) | Err(Errno::NOBUFS | Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(error) => return Err(error.into()),
            }
        }
        ready.clear_ready();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(kind: u16, body: &[u8]) -> Vec<u8> {
        let mut message = ((HEADER + body.len()) as u32).to_ne_bytes().to_vec();
        message.extend(kind.to_ne_bytes());
        message.extend([0; 10]);
        message.extend(body);
        message
    }

    #[test]
    fn answers_are_read_and_bounded() {
        let numbers = |numbers: [u32; 6]| {
            let mut body = vec![0; FLAGS];
            // Something else first.
            for (kind, value) in [(7_u16, vec![9; 5]), (XFRMA_SPD_INFO, numbers.map(u32::to_ne_bytes).concat())] {
                body.extend((4 + value.len() as u16).to_ne_bytes());
                body.extend(kind.to_ne_bytes());
                body.extend(value);
                body.resize(body.len().next_multiple_of(4), 0);
            }
            answer(XFRM_MSG_NEWSPDINFO, &body)
        };
        assert_eq!(counts(&numbers([0, 0, 0, 2, 2, 0])), Some(false), "an IKE daemon's own sockets");
        for n in 0..3 {
            let mut some = [0; 6];
            some[n] = 256;
            assert_eq!(counts(&numbers(some)), Some(true));
        }
        let whole = numbers([1, 0, 0, 0, 0, 0]);
        for cut in 0..whole.len() {
            assert_eq!(counts(&whole[..cut]), None, "{cut}");
        }
        // NLMSG_ERROR.
        assert_eq!(counts(&answer(2, &[0xff; 40])), None);
        assert!(!blocks(&answer(2, &[1; 40])) && !blocks(&[]));
        assert!(blocks(&answer(XFRM_MSG_GETDEFAULT, &[2, 1, 2])) && !blocks(&answer(XFRM_MSG_GETDEFAULT, &[2, 2, 2])));
    }
}
