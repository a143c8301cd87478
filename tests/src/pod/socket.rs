//! Client sockets with what the standard library does not offer: a chosen source port, a connect that times out with it,
//! IPv4 through an IPv6 socket.

use std::{
    fmt,
    io::ErrorKind,
    net::{IpAddr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket},
    os::fd::{AsFd, AsRawFd, OwnedFd},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    libc,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{
        AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, getpeername, getsockopt, setsockopt, socket,
        sockopt,
    },
};
use serde::{Deserialize, Serialize};

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Transport {
    Tcp,
    /// A connected UDP socket
    Udp,
    /// Over a raw socket
    Sctp,
    /// An echo request, over a raw socket; the port means nothing
    Ping,
    /// sendto and recvfrom on a UDP socket that is never connected
    UdpUnconnected,
}

impl Transport {
    /// Those that the kernel has sockets for.
    pub const ALL: [Self; 3] = [Self::Tcp, Self::Udp, Self::UdpUnconnected];
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
            Self::Ping => "ping",
            Self::UdpUnconnected => "udp-unconnected",
        })
    }
}

/// `a.b.c.d` as `::ffff:a.b.c.d` where an IPv6 socket is to carry IPv4.
pub fn target(to: SocketAddr, mapped: bool) -> SocketAddr {
    match to.ip() {
        IpAddr::V4(v4) if mapped => SocketAddr::new(IpAddr::V6(v4.to_ipv6_mapped()), to.port()),
        _ => to,
    }
}

/// A socket of the family of `to`, bound to `source_port` if one is given.
fn open(to: SocketAddr, kind: SockType, source_port: Option<u16>) -> nix::Result<OwnedFd> {
    let family = if to.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let fd = socket(family, kind, SockFlag::SOCK_CLOEXEC, None)?;
    if let Some(port) = source_port {
        setsockopt(&fd, sockopt::ReuseAddr, &true)?;
        let any = if to.is_ipv4() { IpAddr::from([0; 4]) } else { IpAddr::V6(Ipv6Addr::UNSPECIFIED) };
        bind(fd.as_raw_fd(), &SockaddrStorage::from(SocketAddr::new(any, port)))?;
    }
    Ok(fd)
}

/// Connects within `timeout`; `ETIMEDOUT` otherwise.
pub fn tcp(to: SocketAddr, source_port: Option<u16>, timeout: Duration) -> nix::Result<TcpStream> {
    let fd = open(to, SockType::Stream, source_port)?;
    let stream = TcpStream::from(fd);
    stream.set_nonblocking(true).map_err(|error| errno(&error))?;
    match connect(stream.as_raw_fd(), &SockaddrStorage::from(to)) {
        Ok(()) => {}
        Err(Errno::EINPROGRESS) => {
            wait(&stream, PollFlags::POLLOUT, timeout)?;
            let error = getsockopt(&stream, sockopt::SocketError)?;
            if error != 0 {
                return Err(Errno::from_raw(error));
            }
        }
        Err(error) => return Err(error),
    }
    stream.set_nonblocking(false).map_err(|error| errno(&error))?;
    let _ = stream.set_nodelay(true);
    Ok(stream)
}

/// How many segments were sent again: of a connection that was just made, its SYN.
pub fn sent_again(stream: &TcpStream) -> nix::Result<u32> {
    let mut info = std::mem::MaybeUninit::<libc::tcp_info>::zeroed();
    let mut length = size_of::<libc::tcp_info>() as libc::socklen_t;
    // SAFETY: `info` is of the length that is given.
    let result = unsafe {
        libc::getsockopt(stream.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_INFO, info.as_mut_ptr().cast(), &mut length)
    };
    Errno::result(result)?;
    // SAFETY: zeroed, and any bytes are valid.
    Ok(unsafe { info.assume_init() }.tcpi_total_retrans)
}

/// A UDP socket, connected if `connected`.
pub fn udp(to: SocketAddr, source_port: Option<u16>, connected: bool) -> nix::Result<UdpSocket> {
    let fd = open(to, SockType::Datagram, source_port)?;
    if connected {
        connect(fd.as_raw_fd(), &SockaddrStorage::from(to))?;
    }
    Ok(UdpSocket::from(fd))
}

/// The kernel tells an unconnected socket of the ICMP errors that are about its datagrams.
pub fn hear_errors(socket: &UdpSocket, to: SocketAddr) -> nix::Result<()> {
    if to.is_ipv4() {
        setsockopt(socket, sockopt::Ipv4RecvErr, &true)
    } else {
        setsockopt(socket, sockopt::Ipv6RecvErr, &true)
    }
}

/// One call sends many datagrams of this length; the kernel cuts them as late as the link allows.
pub fn segment(socket: &UdpSocket, length: usize) -> nix::Result<()> {
    option(socket, libc::SOL_UDP, libc::UDP_SEGMENT, i32::try_from(length).map_err(|_| Errno::EINVAL)?)
}

/// Datagrams leave without a checksum.
pub fn no_check(socket: &UdpSocket) -> nix::Result<()> {
    option(socket, libc::SOL_SOCKET, libc::SO_NO_CHECK, 1)
}

fn option(socket: &UdpSocket, level: i32, name: i32, value: i32) -> nix::Result<()> {
    let length = size_of::<i32>() as libc::socklen_t;
    // SAFETY: the kernel reads an int where `value` is one.
    let done = unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const value).cast(), length) };
    Errno::result(done).map(drop)
}

/// `getpeername` through the kernel, not what the caller remembers.
pub fn peer_name(socket: &impl AsRawFd) -> Option<String> {
    let name = getpeername::<SockaddrStorage>(socket.as_raw_fd()).ok()?;
    let address = match (name.as_sockaddr_in(), name.as_sockaddr_in6()) {
        (Some(v4), _) => SocketAddr::new(IpAddr::V4(v4.ip()), v4.port()),
        (_, Some(v6)) => SocketAddr::new(IpAddr::V6(v6.ip()), v6.port()),
        _ => return None,
    };
    Some(address.to_string())
}

fn wait(socket: &impl AsFd, events: PollFlags, timeout: Duration) -> nix::Result<()> {
    let deadline = Instant::now() + timeout;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = PollTimeout::try_from(left.as_millis()).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(socket.as_fd(), events)], left) {
            Ok(0) => return Err(Errno::ETIMEDOUT),
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error),
        }
    }
}

/// The errno behind an I/O error: a read that ran into its time limit is `ETIMEDOUT`, an early end `ECONNRESET`.
pub fn errno(error: &std::io::Error) -> Errno {
    match (error.kind(), error.raw_os_error()) {
        (ErrorKind::WouldBlock | ErrorKind::TimedOut, _) => Errno::ETIMEDOUT,
        (_, Some(raw)) => Errno::from_raw(raw),
        (ErrorKind::UnexpectedEof, None) => Errno::ECONNRESET,
        _ => Errno::EIO,
    }
}
