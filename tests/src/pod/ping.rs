//! An echo request by a raw socket, which no hook at connect time sees: ICMP for IPv4, ICMPv6 for IPv6.

use std::{
    io,
    net::SocketAddr,
    sync::atomic::{AtomicU16, Ordering},
    time::{Duration, Instant},
};

use nix::{errno::Errno, libc};

use super::{sctp, socket::errno, wire::Answer};

/// Type of the request and of the reply, by family.
const ECHO4: [u8; 2] = [8, 0];
const ECHO6: [u8; 2] = [128, 129];

/// Asks once. Who has answered does not say more than that; its name is `echo`, its port
/// that of backends, and the source that it saw is the one that it answered to.
pub fn ask(to: SocketAddr, timeout: Duration) -> nix::Result<Answer> {
    static NEXT: AtomicU16 = AtomicU16::new(1);
    let io = |error: io::Error| errno(&error);
    let (protocol, [request, reply]) =
        if to.is_ipv6() { (libc::IPPROTO_ICMPV6, ECHO6) } else { (libc::IPPROTO_ICMP, ECHO4) };
    let socket = sctp::open(to.is_ipv6(), protocol).map_err(io)?;
    // A connected one is told of refusals.
    socket.connect(SocketAddr::new(to.ip(), 0)).map_err(io)?;
    // Raw sockets hear everybody's answers.
    let [id, number] = [std::process::id() as u16, NEXT.fetch_add(1, Ordering::Relaxed)].map(u16::to_be_bytes);
    let mut packet = [&[request, 0, 0, 0][..], &id, &number, b"anybody?"].concat();
    // The kernel makes ICMPv6's, which is over addresses, too.
    let sum = sum(&packet).to_be_bytes();
    packet.splice(2..4, sum);
    socket.send(&packet).map_err(io)?;
    let deadline = Instant::now() + timeout;
    let mut buffer = [0; 2048];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Errno::ETIMEDOUT);
        }
        socket.set_read_timeout(Some(left)).map_err(io)?;
        let length = socket.recv(&mut buffer).map_err(io)?;
        let heard = buffer.get(..length).and_then(|bytes| sctp::payload(bytes, to.is_ipv6()));
        if heard.is_some_and(|heard| heard.first() == Some(&reply) && heard.get(4..) == packet.get(4..)) {
            let peer = socket.local_addr().map_err(io)?;
            return Ok(Answer {
                backend: "echo".to_owned(),
                peer: peer.to_string(),
                local: SocketAddr::new(to.ip(), 8080).to_string(),
                got: packet.len(),
                pad: String::new(),
            });
        }
    }
}

/// The Internet checksum.
fn sum(bytes: &[u8]) -> u16 {
    let words = bytes.as_chunks::<2>().0.iter().map(|word| u32::from(u16::from_be_bytes(*word)));
    let sum: u32 = words.sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !((folded & 0xffff) + (folded >> 16)) as u16
}
