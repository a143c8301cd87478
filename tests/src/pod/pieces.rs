//! A datagram in fragments that this program cuts itself, so that they go in the order that is asked for, and what comes to the port that it was sent from.

use std::{
    io::{self, Write as _},
    net::{IpAddr, SocketAddr, UdpSocket},
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use nix::{
    libc,
    sys::socket::{MsgFlags, SockaddrStorage, sendto},
};
use serde::{Deserialize, Serialize};

use super::{
    frame::{checksum, octets},
    wire,
};

#[derive(clap::Args)]
pub struct Args {
    pub to: SocketAddr,
    #[arg(long)]
    pub from: SocketAddr,
    /// Bytes of the datagram
    #[arg(long)]
    pub size: usize,
    /// Milliseconds between two fragments
    #[arg(long, default_value_t = 20)]
    pub pause: u64,
    /// How many datagrams to wait for at the port
    #[arg(long, default_value_t = 0)]
    pub answers: usize,
    /// Milliseconds for which they are waited for; `ready` is printed with the first one
    #[arg(long, default_value_t = 3000)]
    pub timeout: u64,
}

/// From whom each came, how long it was, and what it says, if it is an answer.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Report {
    pub heard: Vec<Heard>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Heard {
    pub from: SocketAddr,
    pub size: usize,
    pub answer: Option<wire::Answer>,
}

const UDP: u8 = 17;
const FRAGMENT: u8 = 44;
/// Of what is cut, a multiple of eight that fits any link's MTU.
const PIECE: usize = 1200;

pub fn run(args: &Args) -> Result<Report> {
    let Args { to, from, size, pause, answers, timeout } = args;
    // Without one the port may be somebody else's.
    let socket =
        (*answers > 0).then(|| UdpSocket::bind(from).with_context(|| format!("bind to {from}"))).transpose()?;
    let mut packets = cut(*from, *to, &wire::request(*size, 0))?;
    packets.reverse();
    let raw = open(to)?;
    for (n, packet) in packets.iter().enumerate() {
        if n > 0 {
            thread::sleep(Duration::from_millis(*pause));
        }
        // A raw socket takes no port.
        let at = SockaddrStorage::from(SocketAddr::new(to.ip(), 0));
        sendto(raw.as_raw_fd(), packet, &at, MsgFlags::empty()).with_context(|| format!("send a fragment to {to}"))?;
    }
    let mut report = Report::default();
    let deadline = Instant::now() + Duration::from_millis(*timeout);
    let mut buffer = vec![0; 65536];
    while let Some(socket) = socket.as_ref().filter(|_| report.heard.len() < *answers) {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            break;
        }
        socket.set_read_timeout(Some(left))?;
        let Ok((size, from)) = socket.recv_from(&mut buffer) else { continue };
        let answer = buffer.get(..size).and_then(|bytes| serde_json::from_slice(bytes).ok());
        report.heard.push(Heard { from, size, answer });
        if report.heard.len() == 1 {
            println!("ready");
            io::stdout().flush()?;
        }
    }
    Ok(report)
}

/// One that takes whole packets, their IP header included.
fn open(to: &SocketAddr) -> Result<OwnedFd> {
    let family = if to.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    // SAFETY: no pointers.
    let fd = unsafe { libc::socket(family, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::IPPROTO_RAW) };
    if fd < 0 {
        return Err(io::Error::last_os_error()).context("open a raw socket");
    }
    // SAFETY: just made, for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The fragments of a datagram, in their order.
fn cut(from: SocketAddr, to: SocketAddr, payload: &[u8]) -> Result<Vec<Vec<u8>>> {
    let (src, dst) = (octets(from.ip()), octets(to.ip()));
    let length = u16::try_from(8 + payload.len()).context("a datagram has less than 64 KB")?;
    let mut udp = [from.port().to_be_bytes(), to.port().to_be_bytes(), length.to_be_bytes(), [0, 0]].concat();
    udp.extend(payload);
    let mut pseudo = [&src[..], &dst, &[0, UDP], &length.to_be_bytes()].concat();
    pseudo.extend(&udp);
    pseudo.resize(pseudo.len().next_multiple_of(2), 0);
    udp.splice(6..8, checksum(&pseudo));
    // Of datagrams that are under way at one time no two have the same.
    let id = std::process::id();
    let pieces = udp.chunks(PIECE).enumerate().map(|(n, piece)| {
        let (at, more) = (n * PIECE, (n + 1) * PIECE < udp.len());
        let header = match from.ip() {
            IpAddr::V4(_) => {
                let field = (at / 8) as u16 | if more { 0x2000 } else { 0 };
                let total = (20 + piece.len()) as u16;
                let mut header = vec![0x45, 0];
                header.extend([total.to_be_bytes(), (id as u16).to_be_bytes(), field.to_be_bytes()].concat());
                header.extend([64, UDP, 0, 0]);
                header.extend([&src[..], &dst].concat());
                let sum = checksum(&header);
                header.splice(10..12, sum);
                header
            }
            IpAddr::V6(_) => {
                let mut header = vec![0x60, 0, 0, 0];
                header.extend(((8 + piece.len()) as u16).to_be_bytes());
                header.extend([FRAGMENT, 64]);
                header.extend([&src[..], &dst].concat());
                header.extend([UDP, 0]);
                header.extend((at as u16 | u16::from(more)).to_be_bytes());
                header.extend(id.to_be_bytes());
                header
            }
        };
        [&header[..], piece].concat()
    });
    Ok(pieces.collect())
}
