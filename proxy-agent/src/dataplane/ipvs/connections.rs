//! Connections that IPVS translates, as the kernel lists them. Whose they are is told by what they are addressed to.

use std::{
    collections::BTreeSet,
    fs::File,
    io::{self, BufRead, BufReader},
    net::{IpAddr, Ipv4Addr},
};

use super::codec::Virtual;
use crate::model::Protocol;

const LIST: &str = "/proc/thread-self/net/ip_vs_conn";

/// States in which nothing more is said, of TCP and of SCTP.
const OVER: [&str; 6] = ["NONE", "LISTEN", "TIME_WAIT", "CLOSE", "CLOSED", "REJECTED"];

/// How many of these servers are open. Datagrams are, until they were silent for IPVS' own time-out.
pub(super) fn open(servers: &BTreeSet<Virtual>) -> io::Result<u64> {
    match File::open(LIST) {
        Ok(file) => count(BufReader::new(file), servers),
        // IPVS is gone, and they with it.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
        Err(error) => Err(error),
    }
}

fn count(list: impl BufRead, servers: &BTreeSet<Virtual>) -> io::Result<u64> {
    let mut open = 0;
    for line in list.lines() {
        open += u64::from(read(&line?).is_some_and(|at| servers.contains(&at)));
    }
    Ok(open)
}

/// What one that is open is addressed to: protocol, client, its port, address, port, backend, its port, state …, ports by sixteen.
fn read(line: &str) -> Option<Virtual> {
    let mut words = line.split_whitespace();
    let protocol = match words.next()? {
        "TCP" => Protocol::Tcp,
        "UDP" => Protocol::Udp,
        "SCTP" => Protocol::Sctp,
        _ => return None,
    };
    let port = |word: &str| u16::from_str_radix(word, 16).ok();
    // Who is remembered has no port, and is no connection.
    words.nth(1).and_then(port).filter(|port| *port != 0)?;
    let (addr, port) = (address(words.next()?)?, port(words.next()?)?);
    let state = words.nth(2)?;
    (protocol == Protocol::Udp || !OVER.contains(&state)).then_some(Virtual::At { addr, port, protocol })
}

fn address(word: &str) -> Option<IpAddr> {
    if word.contains(':') {
        return word.parse().ok();
    }
    u32::from_str_radix(word, 16).ok().map(|bits| Ipv4Addr::from_bits(bits).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As 6.1 prints them.
    const LISTED: &str = "\
Pro FromIP   FPrt ToIP     TPrt DestIP   DPrt State       Expires PEName PEData
TCP 0AF40102 C35A 0A600001 0050 0AF40103 1F90 ESTABLISHED     899
TCP 0AF40102 C35B 0A600001 0050 0AF40103 1F90 TIME_WAIT       119
TCP 0AF40102 C35C 0A600001 0050 0AF40103 1F90 FIN_WAIT        119
TCP 0AF40102 0000 0A600001 0050 0AF40103 1F90 NONE            170
TCP 0AF40102 C35D 0A600002 0050 0AF40103 1F90 ESTABLISHED     899
UDP 0AF40102 C35A 0A600001 0035 0AF40103 1F90 UDP             299
UDP fd00:0000:0000:0000:0000:0000:0000:0002 C35A fd00:0096:0000:0000:0000:0000:0000:0001 0035 fd00:0000:0000:0000:0000:0000:0000:0003 1F90 UDP             299
";

    #[test]
    fn what_is_open_is_counted_and_nobody_elses() {
        let at = |addr: &str, port, protocol| Virtual::At { addr: addr.parse().unwrap(), port, protocol };
        let of = |servers: &[Virtual]| count(LISTED.as_bytes(), &servers.iter().copied().collect()).unwrap();
        let web = at("10.96.0.1", 80, Protocol::Tcp);
        assert_eq!(of(&[web]), 2, "established, and closed by one side");
        assert_eq!(of(&[at("10.96.0.1", 53, Protocol::Udp)]), 1);
        assert_eq!(of(&[web, at("fd00:96::1", 53, Protocol::Udp)]), 3);
        assert_eq!(of(&[at("10.96.0.1", 80, Protocol::Udp), at("10.96.0.3", 80, Protocol::Tcp)]), 0);
        for cut in 0..LISTED.len() {
            let _whatever = read(&LISTED[cut..]);
        }
    }

    #[test]
    fn where_there_is_no_ipvs_there_are_none() {
        assert_eq!(open(&BTreeSet::new()).unwrap(), 0);
    }
}
