//! The server: TCP, UDP and SCTP on given addresses and ports.
//!
//! It binds addresses, not wildcards: a UDP answer from a wildcard socket may leave with another of the host's addresses.

use std::{
    io::{BufRead, BufReader, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::Arc,
    thread,
};

use anyhow::{Context, Result};

use super::{bulk, sctp, wire};

#[derive(clap::Args)]
pub struct Args {
    /// What the answers call this server
    #[arg(long)]
    pub name: String,
    /// Addresses to listen on
    #[arg(long = "address", required = true)]
    pub addresses: Vec<IpAddr>,
    /// Ports to listen on, TCP, UDP and SCTP each
    #[arg(long = "port", required = true)]
    pub ports: Vec<u16>,
}

/// Stack of a thread that serves one connection: a thousand of them are to be cheap.
const STACK: usize = 128 * 1024;

/// Serves until killed. Prints one line once everything is bound.
pub fn run(args: &Args) -> Result<()> {
    let Args { name, addresses, ports } = args;
    let name: Arc<str> = name.as_str().into();
    let mut workers = Vec::new();
    for &address in addresses {
        let socket = sctp::listen(address)?;
        let (name, ports) = (Arc::clone(&name), ports.clone());
        workers.push(thread::spawn(move || sctp::serve(&socket, &name, address, &ports)));
    }
    for &address in addresses {
        for &port in ports {
            let at = SocketAddr::new(address, port);
            let listener = TcpListener::bind(at).with_context(|| format!("listen on TCP {at}"))?;
            let socket = UdpSocket::bind(at).with_context(|| format!("listen on UDP {at}"))?;
            let (tcp, udp) = (Arc::clone(&name), Arc::clone(&name));
            workers.push(thread::spawn(move || accept(&listener, &tcp)));
            workers.push(thread::spawn(move || datagrams(&socket, &udp, at)));
        }
    }
    println!("serving");
    for worker in workers {
        let _ = worker.join();
    }
    Ok(())
}

fn accept(listener: &TcpListener, name: &Arc<str>) {
    for stream in listener.incoming() {
        // A client that went away between SYN and accept is no reason to stop serving.
        let Ok(stream) = stream else { continue };
        let name = Arc::clone(name);
        let served = thread::Builder::new().stack_size(STACK).spawn(move || {
            let _ = converse(stream, &name);
        });
        if let Err(error) = served {
            eprintln!("testpod: no thread for a connection: {error}");
        }
    }
}

fn converse(stream: TcpStream, name: &str) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let (peer, local) = (stream.peer_addr()?.to_string(), stream.local_addr()?.to_string());
    let mut writer = stream.try_clone()?;
    let mut reader = BufReader::with_capacity(4096, stream);
    let mut line = Vec::new();
    while reader.read_until(b'\n', &mut line)? > 0 {
        let request = str::from_utf8(&line).ok().and_then(|line| line.strip_prefix(bulk::REQUEST));
        if let Some(bytes) = request.and_then(|bytes| bytes.trim().parse().ok()) {
            let digest = bulk::serve(writer.try_clone()?, &mut reader, bytes)?;
            writer.write_all(&wire::encode(&wire::Answer {
                backend: name.to_owned(),
                peer,
                local,
                got: bytes,
                pad: digest,
            }))?;
            return Ok(());
        }
        // For people with curl.
        if line.starts_with(b"GET ") {
            let mut header = String::new();
            while reader.read_line(&mut header)? > 2 {
                header.clear();
            }
            writer.write_all(b"HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n")?;
            return writer.write_all(&wire::answer(name, &peer, &local, &line));
        }
        if let Some(request) = line.strip_prefix(wire::LAST) {
            return writer.write_all(&wire::answer(name, &peer, &local, request));
        }
        writer.write_all(&wire::answer(name, &peer, &local, &line))?;
        line.clear();
    }
    Ok(())
}

fn datagrams(socket: &UdpSocket, name: &str, at: SocketAddr) {
    let mut buffer = vec![0; 65536];
    loop {
        // An error here is an ICMP message about an earlier answer.
        let Ok((length, peer)) = socket.recv_from(&mut buffer) else { continue };
        let request = buffer.get(..length).unwrap_or_default();
        let _ = socket.send_to(&wire::answer(name, &peer.to_string(), &at.to_string(), request), peer);
    }
}
