//! A client that never stops talking, from one source port, and what it saw when: does it find its way when backends come and go?
//!
//! It does what a careful application does: one socket is kept until the kernel says that it is broken, then another takes
//! its place on the same port.

use std::{
    io::{BufRead, BufReader, Write},
    net::{SocketAddr, TcpStream, UdpSocket},
    sync::atomic::Ordering,
    thread,
    time::{Duration, SystemTime},
};

use anyhow::Result;
use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use super::{
    socket::{self, Transport},
    wire::{self, Answer},
};

#[derive(clap::Args)]
pub struct Args {
    pub to: SocketAddr,
    #[arg(long, value_enum, default_value_t = Transport::Udp)]
    pub transport: Transport,
    /// The port to talk from
    #[arg(long)]
    pub source_port: u16,
    /// Milliseconds between two requests
    #[arg(long, default_value_t = 50)]
    pub interval: u64,
    /// Milliseconds to wait for an answer: long enough that a machine with much to do loses none
    #[arg(long, default_value_t = 1000)]
    pub timeout: u64,
    /// Reach an IPv4 address through an IPv6 socket
    #[arg(long)]
    pub mapped: bool,
}

/// What became of one request.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Turn {
    /// When it was sent, milliseconds since the epoch.
    pub at: u64,
    /// Who answered, and on which of its ports: `name:port`.
    pub backend: Option<String>,
    /// Name of the errno, if none did.
    pub error: Option<String>,
}

#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Report {
    pub turns: Vec<Turn>,
    /// Sockets that were opened one after the other.
    pub sockets: u32,
}

impl Report {
    /// Between two instants: who answered, in order, without repetitions.
    pub fn backends(&self, from: u64, to: u64) -> Vec<&str> {
        let turns = self.turns.iter().filter(|turn| (from..to).contains(&turn.at));
        let mut seen: Vec<&str> = turns.filter_map(|turn| turn.backend.as_deref()).collect();
        seen.dedup();
        seen
    }

    /// Names of the errors, in order, without repetitions.
    pub fn errors(&self) -> Vec<&str> {
        let mut seen: Vec<&str> = self.turns.iter().filter_map(|turn| turn.error.as_deref()).collect();
        seen.dedup();
        seen
    }
}

/// Milliseconds since the epoch.
pub fn now() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

enum Socket {
    Udp(UdpSocket, bool),
    Tcp(BufReader<TcpStream>),
}

/// Prints `ready` after the first answer, then talks on until stdin closes.
pub fn run(args: &Args) -> Result<Report> {
    let stop = super::stop_on_stdin_eof();
    let mut report = Report::default();
    let mut socket = None;
    let mut ready = false;
    while !stop.load(Ordering::Relaxed) {
        let at = now();
        let turn = match turn(args, &mut socket, &mut report.sockets) {
            Ok(Answer { backend, local, .. }) => {
                if !ready {
                    println!("ready");
                    ready = true;
                }
                let port = local.rsplit(':').next().unwrap_or_default().to_owned();
                Turn { at, backend: Some(format!("{backend}:{port}")), error: None }
            }
            Err(errno) => {
                // No answer is no reason to give a datagram socket up; a stream that fell silent is waited for, too.
                if errno != Errno::ETIMEDOUT {
                    socket = None;
                }
                Turn { at, backend: None, error: Some(format!("{errno:?}")) }
            }
        };
        report.turns.push(turn);
        thread::sleep(Duration::from_millis(args.interval));
    }
    Ok(report)
}

fn turn(args: &Args, socket: &mut Option<Socket>, opened: &mut u32) -> nix::Result<Answer> {
    let to = socket::target(args.to, args.mapped);
    let timeout = Duration::from_millis(args.timeout);
    let io = |error: std::io::Error| socket::errno(&error);
    let current = match socket {
        Some(current) => current,
        None => {
            let fresh = match args.transport {
                Transport::Tcp => {
                    let stream = socket::tcp(to, None, Duration::from_secs(1))?;
                    stream.set_read_timeout(Some(timeout)).map_err(io)?;
                    Socket::Tcp(BufReader::new(stream))
                }
                transport => {
                    let connected = transport == Transport::Udp;
                    let udp = socket::udp(to, Some(args.source_port), connected)?;
                    udp.set_read_timeout(Some(timeout)).map_err(io)?;
                    Socket::Udp(udp, connected)
                }
            };
            *opened += 1;
            socket.insert(fresh)
        }
    };
    let request = wire::request(0, 0);
    let bytes = match current {
        Socket::Tcp(stream) => {
            stream.get_mut().write_all(&request).map_err(io)?;
            let mut line = Vec::new();
            if stream.read_until(b'\n', &mut line).map_err(io)? == 0 {
                return Err(Errno::ECONNRESET);
            }
            line
        }
        Socket::Udp(udp, connected) => {
            if *connected { udp.send(&request) } else { udp.send_to(&request, to) }.map_err(io)?;
            let mut buffer = vec![0; 2048];
            let (length, from) = udp.recv_from(&mut buffer).map_err(io)?;
            // Whoever takes answers from anybody looks at where they come from.
            if from != to {
                return Err(Errno::EBADMSG);
            }
            buffer.truncate(length);
            buffer
        }
    };
    serde_json::from_slice(&bytes).map_err(|_| Errno::EBADMSG)
}
