//! Megabytes through one TCP connection, both ways at once, every byte compared.
//!
//! Large writes make the kernel build segments far beyond the MTU where the links take them, which only the last link cuts up.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpStream},
    thread,
    time::Duration,
};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::{socket, wire};

#[derive(clap::Args)]
pub struct Args {
    pub to: SocketAddr,
    /// Megabytes each way
    #[arg(long, default_value_t = 16)]
    pub megabytes: usize,
    /// Seconds without progress before it counts as broken
    #[arg(long, default_value_t = 5)]
    pub timeout: u64,
}

/// What came of it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Report {
    pub backend: String,
    /// Source address and port as the server saw them.
    pub peer: String,
    /// Bytes each way.
    pub bytes: usize,
    /// What arrived at the server is what was sent.
    pub up: bool,
    /// What arrived here is what the server sent.
    pub down: bool,
}

/// First word of a request for a bulk transfer; the number of bytes follows.
pub(super) const REQUEST: &str = "BULK";

const CHUNK: usize = 64 * 1024;
const UP: u64 = 0x9e37_79b9_7f4a_7c15;
const DOWN: u64 = 0x2545_f491_4f6c_dd1d;

pub fn run(args: &Args) -> Result<Report> {
    let &Args { to, megabytes, timeout } = args;
    let timeout = Duration::from_secs(timeout);
    let bytes = megabytes << 20;
    let stream = socket::tcp(to, None, timeout).with_context(|| format!("connect to {to}"))?;
    stream.set_read_timeout(Some(timeout))?;
    stream.set_write_timeout(Some(timeout))?;
    let mut writer = stream.try_clone()?;
    writer.write_all(format!("{REQUEST} {bytes}\n").as_bytes())?;
    let sender = thread::spawn(move || send(&mut writer, bytes, UP));
    let mut reader = BufReader::with_capacity(CHUNK, stream);
    let digest = receive(&mut reader, bytes).context("receive")?;
    let mut line = Vec::new();
    reader.read_until(b'\n', &mut line).context("receive the server's account")?;
    sender.join().map_err(|_| anyhow::anyhow!("the sender panicked"))?.context("send")?;
    let answer: wire::Answer = serde_json::from_slice(&line).context("the server's account")?;
    Ok(Report {
        backend: answer.backend,
        peer: answer.peer,
        bytes,
        up: answer.pad == format!("{:x}", expected(bytes, UP)),
        down: digest == expected(bytes, DOWN),
    })
}

/// The server's side, its request line read already. Returns the digest of what arrived.
pub(super) fn serve(stream: TcpStream, reader: &mut BufReader<TcpStream>, bytes: usize) -> std::io::Result<String> {
    let mut writer = stream;
    let sender = thread::spawn(move || send(&mut writer, bytes, DOWN));
    let digest = receive(reader, bytes)?;
    sender.join().map_err(|_| std::io::Error::other("the sender panicked"))??;
    Ok(format!("{digest:x}"))
}

/// The bytes at one place of the stream: a lost, doubled or displaced chunk shows.
fn fill(chunk: &mut [u8], state: &mut u64) {
    for word in chunk.chunks_exact_mut(8) {
        *state ^= *state << 13;
        *state ^= *state >> 7;
        *state ^= *state << 17;
        word.copy_from_slice(&state.to_le_bytes());
    }
}

fn fold(digest: u64, chunk: &[u8]) -> u64 {
    chunk.as_chunks::<8>().0.iter().fold(digest, |digest, word| {
        (digest.rotate_left(5) ^ u64::from_le_bytes(*word)).wrapping_mul(0x517c_c1b7_2722_0a95)
    })
}

fn send(writer: &mut impl Write, bytes: usize, mut state: u64) -> std::io::Result<()> {
    let mut chunk = vec![0; CHUNK];
    for _ in 0..bytes / CHUNK {
        fill(&mut chunk, &mut state);
        writer.write_all(&chunk)?;
    }
    Ok(())
}

fn receive(reader: &mut impl Read, bytes: usize) -> std::io::Result<u64> {
    let mut chunk = vec![0; CHUNK];
    let mut digest = 0;
    for _ in 0..bytes / CHUNK {
        reader.read_exact(&mut chunk)?;
        digest = fold(digest, &chunk);
    }
    Ok(digest)
}

fn expected(bytes: usize, mut state: u64) -> u64 {
    let mut chunk = vec![0; CHUNK];
    (0..bytes / CHUNK).fold(0, |digest, _| {
        fill(&mut chunk, &mut state);
        fold(digest, &chunk)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sent_is_what_is_expected_and_a_changed_byte_is_not() {
        let mut sent = Vec::new();
        send(&mut sent, 4 * CHUNK, UP).unwrap();
        assert_eq!(receive(&mut sent.as_slice(), 4 * CHUNK).unwrap(), expected(4 * CHUNK, UP));
        sent[3 * CHUNK + 5] ^= 1;
        assert_ne!(receive(&mut sent.as_slice(), 4 * CHUNK).unwrap(), expected(4 * CHUNK, UP));
    }
}
