//! Ask a few times; say what happened each time.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Read, Write},
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::Result;
use nix::{
    errno::Errno,
    libc,
    sys::socket::{setsockopt, sockopt},
};
use serde::{Deserialize, Serialize};

use super::{
    ping, sctp,
    socket::{self, Transport},
    wire::{self, Answer},
};

#[derive(clap::Args)]
pub struct Args {
    pub to: SocketAddr,
    #[arg(long, value_enum, default_value_t = Transport::Tcp)]
    pub transport: Transport,
    /// How often to ask, each time with a new socket
    #[arg(long, default_value_t = 1)]
    pub count: u32,
    /// Bind every socket to this port
    #[arg(long)]
    pub source_port: Option<u16>,
    /// Each try binds to the next port: a flow of its own, whatever earlier ones left behind
    #[arg(long, requires = "source_port")]
    pub successive: bool,
    /// Milliseconds to wait for a connection or an answer
    #[arg(long, default_value_t = 1000)]
    pub timeout: u64,
    /// Reach an IPv4 address through an IPv6 socket
    #[arg(long)]
    pub mapped: bool,
    /// Bytes to send
    #[arg(long, default_value_t = 16)]
    pub size: usize,
    /// Bytes to ask for
    #[arg(long, default_value_t = 0)]
    pub reply: usize,
    /// Send this many datagrams of `size` bytes by one call (UDP_SEGMENT) and expect an answer to each
    #[arg(long, default_value_t = 1)]
    pub burst: usize,
    /// Send datagrams without a checksum (SO_NO_CHECK; IPv4 alone allows it)
    #[arg(long)]
    pub no_check: bool,
    /// Have the kernel tell an unconnected UDP socket of ICMP errors, too (IP_RECVERR)
    #[arg(long)]
    pub hear_errors: bool,
    /// End TCP connections with a reset: a socket in TIME_WAIT would keep its port from the next try
    #[arg(long)]
    pub reset: bool,
    /// Have the server end TCP connections, and leave only once both ends are closed: the port can be used again at once
    #[arg(long, conflicts_with = "reset")]
    pub server_closes: bool,
    /// Give up after the first try that fails
    #[arg(long)]
    pub fail_fast: bool,
}

/// What one try saw.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Try {
    /// Who answered, if anyone did.
    pub answer: Option<Answer>,
    /// Name of the errno that ended the try.
    pub error: Option<String>,
    /// What it was about to do last: a connection that is refused is not one that breaks.
    pub step: String,
    pub micros: u64,
    /// `getpeername` of a connected socket.
    pub peer_name: Option<String>,
    /// Where a UDP answer came from.
    pub from: Option<String>,
}

impl Try {
    pub fn backend(&self) -> Option<&str> {
        self.answer.as_ref().map(|answer| answer.backend.as_str())
    }
}

#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Report {
    pub tries: Vec<Try>,
}

impl Report {
    /// How often each backend answered.
    pub fn backends(&self) -> BTreeMap<String, usize> {
        let mut count = BTreeMap::new();
        for backend in self.tries.iter().filter_map(Try::backend) {
            *count.entry(backend.to_owned()).or_insert(0) += 1;
        }
        count
    }

    /// How often each error ended a try.
    pub fn errors(&self) -> BTreeMap<String, usize> {
        let mut count = BTreeMap::new();
        for error in self.tries.iter().filter_map(|t| t.error.as_ref()) {
            *count.entry(error.clone()).or_insert(0) += 1;
        }
        count
    }

    /// The first try that failed: which it was, in doing what, and when.
    pub fn failure(&self) -> Option<String> {
        let (number, seen) = self.tries.iter().enumerate().find(|(_, seen)| seen.error.is_some())?;
        let Try { error, step, micros, .. } = seen;
        Some(format!("try {}, {step}, {} after {micros} µs", number + 1, error.as_deref()?))
    }
}

pub fn run(args: &Args) -> Result<Report> {
    let mut report = Report::default();
    for i in 0..args.count {
        let source_port = match args.source_port {
            Some(first) if args.successive => first.checked_add(u16::try_from(i).unwrap_or(u16::MAX)),
            port => port,
        };
        let started = Instant::now();
        let mut seen = Try::default();
        if let Err(error) = ask(args, source_port, &mut seen) {
            seen.error = Some(format!("{error:?}"));
        }
        seen.micros = started.elapsed().as_micros().try_into().unwrap_or(u64::MAX);
        if let Some(answer) = &mut seen.answer {
            answer.pad.clear();
        }
        let failed = seen.error.is_some();
        report.tries.push(seen);
        if failed && args.fail_fast {
            break;
        }
    }
    Ok(report)
}

fn ask(args: &Args, source_port: Option<u16>, seen: &mut Try) -> nix::Result<()> {
    let &Args {
        to, transport, timeout, mapped, size, reply, burst, no_check, hear_errors, reset, server_closes, ..
    } = args;
    let to = socket::target(to, mapped);
    let timeout = Duration::from_millis(timeout);
    let mut request = wire::request(size, reply);
    if server_closes {
        request.splice(0..0, *wire::LAST);
    }
    let io = |error: std::io::Error| socket::errno(&error);
    let bytes = match transport {
        Transport::Ping => {
            "ping".clone_into(&mut seen.step);
            seen.answer = Some(ping::ask(to, timeout)?);
            return Ok(());
        }
        Transport::Tcp => {
            "connect".clone_into(&mut seen.step);
            let mut stream = socket::tcp(to, source_port, timeout)?;
            seen.peer_name = socket::peer_name(&stream);
            stream.set_read_timeout(Some(timeout)).map_err(io)?;
            stream.set_write_timeout(Some(timeout)).map_err(io)?;
            "write".clone_into(&mut seen.step);
            stream.write_all(&request).map_err(io)?;
            "read".clone_into(&mut seen.step);
            let mut line = Vec::new();
            let mut reader = BufReader::new(&stream);
            reader.read_until(b'\n', &mut line).map_err(io)?;
            if server_closes {
                "end".clone_into(&mut seen.step);
                reader.read_to_end(&mut Vec::new()).map_err(io)?;
            }
            if reset || server_closes {
                // No seconds at all: a reset. With some, closing takes until the other end has confirmed it.
                let l_linger = if reset { 0 } else { i32::try_from(timeout.as_secs()).unwrap_or(i32::MAX) };
                setsockopt(&stream, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger })?;
            }
            line
        }
        Transport::Sctp => sctp::ask(to, source_port.unwrap_or(50_000), timeout, &request, &mut seen.step)?,
        Transport::Udp | Transport::UdpUnconnected => {
            let connected = transport == Transport::Udp;
            "connect".clone_into(&mut seen.step);
            let socket = match socket::udp(to, source_port, connected) {
                // A server of this place has that port; any other will do.
                Err(nix::errno::Errno::EADDRINUSE) if args.successive => socket::udp(to, None, connected)?,
                socket => socket?,
            };
            socket.set_read_timeout(Some(timeout)).map_err(io)?;
            if no_check {
                socket::no_check(&socket)?;
            }
            if hear_errors {
                socket::hear_errors(&socket, to)?;
            }
            if burst > 1 {
                socket::segment(&socket, request.len())?;
            }
            "send".clone_into(&mut seen.step);
            let datagrams = request.repeat(burst);
            if connected {
                seen.peer_name = socket::peer_name(&socket);
                socket.send(&datagrams).map_err(io)?;
            } else {
                socket.send_to(&datagrams, to).map_err(io)?;
            }
            "receive".clone_into(&mut seen.step);
            let mut buffer = vec![0; 65536];
            let (mut length, mut from) = socket.recv_from(&mut buffer).map_err(io)?;
            for _ in 1..burst {
                let one: Answer =
                    buffer.get(..length).and_then(|one| serde_json::from_slice(one).ok()).ok_or(Errno::EBADMSG)?;
                if one.got != request.len() {
                    return Err(Errno::EMSGSIZE);
                }
                (length, from) = socket.recv_from(&mut buffer).map_err(io)?;
            }
            seen.from = Some(from.to_string());
            buffer.truncate(length);
            buffer
        }
    };
    "understand".clone_into(&mut seen.step);
    seen.answer = Some(serde_json::from_slice(&bytes).map_err(|_| Errno::EBADMSG)?);
    Ok(())
}
