//! Just enough of SCTP (RFC 9260) over raw sockets, for kernels that have none: an association, one message each way, its end.
//!
//! The server keeps nothing: the tag that it tells a client to send under is made of the client's own. Whoever receives a packet with
//! a wrong checksum drops it, as the kernel would.

use std::{
    io,
    net::{IpAddr, SocketAddr, UdpSocket},
    os::fd::{FromRawFd, OwnedFd},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use nix::{
    errno::Errno,
    libc,
    sys::socket::{SockaddrStorage, bind},
};

use super::{socket::errno, wire};

const DATA: u8 = 0;
const INIT: u8 = 1;
const INIT_ACK: u8 = 2;
const SHUTDOWN: u8 = 7;
const SHUTDOWN_ACK: u8 = 8;
const COOKIE_ECHO: u8 = 10;
const COOKIE_ACK: u8 = 11;
const SHUTDOWN_COMPLETE: u8 = 14;

/// What makes the server's tag of the client's.
const KEY: u32 = 0x5ea1_1ed5;
/// One packet has to hold a message: there is no fragmentation here.
const LONGEST: usize = 1200;

/// A packet with one chunk.
struct Packet {
    from: u16,
    to: u16,
    tag: u32,
    chunk: u8,
    /// Behind the chunk's header, without padding.
    body: Vec<u8>,
}

impl Packet {
    fn bytes(&self) -> Vec<u8> {
        let Self { from, to, tag, chunk, body } = self;
        let mut bytes = [from.to_be_bytes(), to.to_be_bytes()].concat();
        bytes.extend(tag.to_be_bytes());
        bytes.extend([0; 4]);
        // A whole message, for DATA.
        bytes.extend([*chunk, if *chunk == DATA { 3 } else { 0 }]);
        bytes.extend((4 + body.len() as u16).to_be_bytes());
        bytes.extend(body);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        let sum = crc32c(&bytes);
        bytes.splice(8..12, sum.to_le_bytes());
        bytes
    }

    /// Nothing if it is cut off, or its checksum is wrong.
    fn parse(bytes: &[u8]) -> Option<Self> {
        let short = |at: usize| Some(u16::from_be_bytes(*bytes.get(at..at + 2)?.as_array()?));
        let mut zeroed = bytes.to_vec();
        let sum: Vec<u8> = zeroed.get(8..12)?.to_vec();
        zeroed.get_mut(8..12)?.fill(0);
        if sum != crc32c(&zeroed).to_le_bytes() {
            return None;
        }
        let tag = u32::from_be_bytes(*bytes.get(4..8)?.as_array()?);
        let end = 12 + usize::from(short(14)?);
        let body = bytes.get(16..end)?.to_vec();
        Some(Self { from: short(0)?, to: short(2)?, tag, chunk: *bytes.get(12)?, body })
    }

    fn first_word(&self) -> Option<u32> {
        Some(u32::from_be_bytes(*self.body.get(..4)?.as_array()?))
    }

    /// Of DATA: behind number, stream, order and protocol.
    fn message(&self) -> Option<&[u8]> {
        self.body.get(12..)
    }
}

fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |register, byte| {
        (0..8).fold(register ^ u32::from(*byte), |r, _| if r & 1 == 1 { r >> 1 ^ 0x82f6_3b78 } else { r >> 1 })
    })
}

/// Body of an INIT or INIT ACK: tag, window, streams out and in, first number.
fn init(tag: u32) -> Vec<u8> {
    [&tag.to_be_bytes()[..], &[0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1]].concat()
}

fn data(message: &[u8]) -> Vec<u8> {
    [&[0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0], message].concat()
}

const fn name(chunk: u8) -> &'static str {
    match chunk {
        INIT => "INIT",
        COOKIE_ECHO => "COOKIE ECHO",
        DATA => "DATA",
        SHUTDOWN => "SHUTDOWN",
        _ => "SHUTDOWN COMPLETE",
    }
}

/// A raw socket. The standard library's datagram socket will do for it, with ports of 0.
pub(super) fn open(v6: bool, protocol: i32) -> io::Result<UdpSocket> {
    let family = if v6 { libc::AF_INET6 } else { libc::AF_INET };
    // SAFETY: no pointers.
    let fd = unsafe { libc::socket(family, libc::SOCK_RAW | libc::SOCK_CLOEXEC, protocol) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: just made, for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) }.into())
}

/// What follows the IP header, which IPv4 alone hands out.
pub(super) fn payload(bytes: &[u8], v6: bool) -> Option<&[u8]> {
    let header = if v6 { 0 } else { usize::from(bytes.first()? & 15) * 4 };
    bytes.get(header..)
}

/// Asks with one association; the answer as it came. `step` is what it said last.
pub fn ask(
    to: SocketAddr,
    source_port: u16,
    timeout: Duration,
    request: &[u8],
    step: &mut String,
) -> nix::Result<Vec<u8>> {
    let io = |error: io::Error| errno(&error);
    if request.len() > LONGEST {
        return Err(Errno::EMSGSIZE);
    }
    let socket = open(to.is_ipv6(), libc::IPPROTO_SCTP).map_err(io)?;
    socket.connect(SocketAddr::new(to.ip(), 0)).map_err(io)?;
    let deadline = Instant::now() + timeout;
    let own = u32::from(source_port) << 16 | 0x0bad;
    let mut tag = 0;
    let mut say = |tag: u32, chunk: u8, body: Vec<u8>, wanted: Option<u8>| -> nix::Result<Option<Packet>> {
        name(chunk).clone_into(step);
        let packet = Packet { from: source_port, to: to.port(), tag, chunk, body };
        socket.send(&packet.bytes()).map_err(io)?;
        let Some(wanted) = wanted else { return Ok(None) };
        let mut buffer = vec![0; 65_536];
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            socket.set_read_timeout(Some(left.max(Duration::from_millis(1)))).map_err(io)?;
            let length = socket.recv(&mut buffer).map_err(io)?;
            let packet = buffer.get(..length).and_then(|bytes| payload(bytes, to.is_ipv6())).and_then(Packet::parse);
            // Raw sockets hear everybody's.
            let ours = packet.filter(|p| p.from == to.port() && p.to == source_port && p.tag == own);
            if let Some(packet) = ours.filter(|packet| packet.chunk == wanted) {
                return Ok(Some(packet));
            }
            if left.is_zero() {
                return Err(Errno::ETIMEDOUT);
            }
        }
    };
    if let Some(told) = say(tag, INIT, init(own), Some(INIT_ACK))?.and_then(|packet| packet.first_word()) {
        tag = told;
    }
    say(tag, COOKIE_ECHO, b"cookie".to_vec(), Some(COOKIE_ACK))?;
    let answer = say(tag, DATA, data(request), Some(DATA))?;
    say(tag, SHUTDOWN, vec![0, 0, 0, 1], Some(SHUTDOWN_ACK))?;
    say(tag, SHUTDOWN_COMPLETE, vec![], None)?;
    answer.and_then(|packet| packet.message().map(<[u8]>::to_vec)).ok_or(Errno::EBADMSG)
}

/// A socket that hears what comes for the address.
pub fn listen(address: IpAddr) -> Result<UdpSocket> {
    let socket = open(address.is_ipv6(), libc::IPPROTO_SCTP).context("open a raw socket")?;
    let at = SockaddrStorage::from(SocketAddr::new(address, 0));
    bind(std::os::fd::AsRawFd::as_raw_fd(&socket), &at).with_context(|| format!("bind a raw socket to {address}"))?;
    Ok(socket)
}

/// Answers whoever asks one of the ports.
pub fn serve(socket: &UdpSocket, name: &str, address: IpAddr, ports: &[u16]) {
    let mut buffer = vec![0; 65_536];
    loop {
        let Ok((length, peer)) = socket.recv_from(&mut buffer) else { continue };
        let bytes = buffer.get(..length).and_then(|bytes| payload(bytes, address.is_ipv6()));
        let Some(packet) = bytes.and_then(Packet::parse).filter(|packet| ports.contains(&packet.to)) else { continue };
        let peer = SocketAddr::new(peer.ip(), packet.from);
        if let Some(answer) = answer(&packet, name, peer, SocketAddr::new(address, packet.to)) {
            let _ = socket.send_to(&answer.bytes(), SocketAddr::new(peer.ip(), 0));
        }
    }
}

fn answer(packet: &Packet, name: &str, peer: SocketAddr, local: SocketAddr) -> Option<Packet> {
    let theirs = packet.tag ^ KEY;
    let (tag, chunk, body) = match packet.chunk {
        INIT if packet.tag == 0 => {
            let told = packet.first_word()?;
            (told, INIT_ACK, init(told ^ KEY))
        }
        COOKIE_ECHO => (theirs, COOKIE_ACK, vec![]),
        DATA => {
            let answer = wire::answer(name, &peer.to_string(), &local.to_string(), packet.message()?);
            (theirs, DATA, data(&answer))
        }
        SHUTDOWN => (theirs, SHUTDOWN_ACK, vec![]),
        _ => return None,
    };
    Some(Packet { from: packet.to, to: packet.from, tag, chunk, body })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_are_what_they_were() {
        for length in 0..9 {
            let packet = Packet { from: 1, to: 65_535, tag: 7, chunk: DATA, body: data(&vec![9; length]) };
            let mut bytes = packet.bytes();
            assert_eq!(bytes.len() % 4, 0);
            let parsed = Packet::parse(&bytes).unwrap();
            assert_eq!((parsed.from, parsed.to, parsed.tag, parsed.chunk), (1, 65_535, 7, DATA));
            assert_eq!(parsed.message().unwrap(), vec![9; length]);
            bytes[1] ^= 1;
            assert!(Packet::parse(&bytes).is_none(), "a wrong checksum");
        }
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }
}
