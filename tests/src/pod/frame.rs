//! One TCP packet, a SYN if nothing else is asked for, as a whole Ethernet frame, with or without a VLAN tag, and what comes back for it.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use nix::{
    libc,
    net::if_::if_nametoindex,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{MsgFlags, recv, send},
};
use serde::{Deserialize, Serialize};

#[derive(clap::Args)]
pub struct Args {
    pub to: SocketAddr,
    #[arg(long)]
    pub from: SocketAddr,
    /// Device that sends and listens
    #[arg(long)]
    pub device: String,
    /// Its hardware address
    #[arg(long)]
    pub from_mac: String,
    #[arg(long)]
    pub to_mac: String,
    /// Put an 802.1Q tag on it
    #[arg(long)]
    pub vlan: Option<u16>,
    /// Of TCP's header
    #[arg(long, default_value_t = SYN)]
    pub flags: u8,
    /// Milliseconds to listen
    #[arg(long, default_value_t = 1000)]
    pub timeout: u64,
}

/// What came back.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Report {
    /// `tcp` from where the frame went, or `icmp` from anybody; nothing within the time.
    pub answer: Option<String>,
}

const TCP: u8 = 6;
const SYN: u8 = 2;

pub fn run(args: &Args) -> Result<Report> {
    let Args { to, from, device, from_mac, to_mac, vlan, flags, timeout } = args;
    let socket = open(device)?;
    let mut frame = [mac(to_mac)?, mac(from_mac)?].concat();
    if let Some(vlan) = vlan {
        frame.extend(0x8100_u16.to_be_bytes());
        frame.extend(vlan.to_be_bytes());
    }
    frame.extend(ip(*from, *to, *flags)?);
    send(socket.as_raw_fd(), &frame, MsgFlags::empty()).context("send the frame")?;
    let deadline = Instant::now() + Duration::from_millis(*timeout);
    let mut buffer = vec![0; 65536];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = PollTimeout::try_from(left.as_millis()).unwrap_or(PollTimeout::MAX);
        if poll(&mut [PollFd::new(socket.as_fd(), PollFlags::POLLIN)], left)? == 0 {
            return Ok(Report::default());
        }
        let length = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        if let Some(answer) = buffer.get(..length).and_then(|frame| answer(frame, *from, *to)) {
            return Ok(Report { answer: Some(answer.to_owned()) });
        }
    }
}

fn open(device: &str) -> Result<OwnedFd> {
    let all = (libc::ETH_P_ALL as u16).to_be();
    // SAFETY: no pointers.
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, i32::from(all)) };
    if fd < 0 {
        return Err(io::Error::last_os_error()).context("open a packet socket");
    }
    // SAFETY: just made, for us alone.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let index = if_nametoindex(device).with_context(|| format!("find the device {device}"))?;
    // SAFETY: plain old data; all zeroes is a value of it.
    let mut at: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    at.sll_family = libc::AF_PACKET as u16;
    at.sll_protocol = all;
    at.sll_ifindex = index.try_into()?;
    let length = size_of_val(&at) as libc::socklen_t;
    // SAFETY: `at` is a whole sockaddr_ll.
    if unsafe { libc::bind(socket.as_raw_fd(), (&raw const at).cast(), length) } != 0 {
        return Err(io::Error::last_os_error()).with_context(|| format!("bind to {device}"));
    }
    Ok(socket)
}

fn mac(text: &str) -> Result<Vec<u8>> {
    let bytes: Result<Vec<u8>, _> = text.split(':').map(|byte| u8::from_str_radix(byte, 16)).collect();
    bytes.ok().filter(|bytes| bytes.len() == 6).with_context(|| format!("{text} is no hardware address"))
}

/// From the EtherType on.
fn ip(from: SocketAddr, to: SocketAddr, flags: u8) -> Result<Vec<u8>> {
    let (src, dst) = (octets(from.ip()), octets(to.ip()));
    let mut tcp = [from.port().to_be_bytes(), to.port().to_be_bytes()].concat();
    tcp.extend(0x1234_5678_u32.to_be_bytes());
    tcp.extend([0; 4]);
    tcp.extend([5 << 4, flags, 0xff, 0xff, 0, 0, 0, 0]);
    let mut pseudo = [src.clone(), dst.clone()].concat();
    pseudo.extend([0, TCP, 0, u8::try_from(tcp.len())?]);
    let sum = checksum(&[pseudo, tcp.clone()].concat());
    tcp.splice(16..18, sum);
    let mut packet;
    if from.is_ipv4() {
        let total = u8::try_from(20 + tcp.len())?;
        let mut header = vec![0x45, 0, 0, total, 0, 1, 0x40, 0, 64, TCP, 0, 0];
        header.extend([src, dst].concat());
        let sum = checksum(&header);
        header.splice(10..12, sum);
        packet = vec![0x08, 0x00];
        packet.extend(header);
    } else {
        packet = vec![0x86, 0xdd, 0x60, 0, 0, 0, 0, u8::try_from(tcp.len())?, TCP, 64];
        packet.extend([src, dst].concat());
    }
    packet.extend(tcp);
    Ok(packet)
}

pub(super) fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

/// Of an even number of bytes.
pub(super) fn checksum(bytes: &[u8]) -> [u8; 2] {
    let mut sum: u32 = bytes.as_chunks::<2>().0.iter().map(|pair| u32::from(u16::from_be_bytes(*pair))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}

/// Whether a frame answers ours; a tag on it is no part of what the socket reads.
fn answer(frame: &[u8], from: SocketAddr, to: SocketAddr) -> Option<&'static str> {
    let (at, size, protocol, payload, icmp) = match frame.get(12..14)? {
        [0x08, 0x00] => (26, 4, *frame.get(23)?, 14 + usize::from(frame.get(14)? & 15) * 4, (1, 3)),
        [0x86, 0xdd] => (22, 16, *frame.get(20)?, 54, (58, 1)),
        _ => return None,
    };
    let (src, dst) = (frame.get(at..at + size)?, frame.get(at + size..at + 2 * size)?);
    let port = u16::from_be_bytes(frame.get(payload + 2..payload + 4)?.try_into().ok()?);
    if dst != octets(from.ip()) {
        None
    } else if protocol == TCP && src == octets(to.ip()) && port == from.port() {
        Some("tcp")
    } else if (protocol, *frame.get(payload)?) == icmp {
        Some("icmp")
    } else {
        None
    }
}
