//! Addresses as Kubernetes spells them.
//!
//! Kubernetes reads IPv4 octets with leading zeros as decimal numbers, from the days when Go did, and such spellings live on in
//! stored objects (contract A12). Rust's parser refuses them, rightly for new input, so the agent reads them itself and passes
//! on the canonical address.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use crate::model::address::MAPPED;

/// Reads an address; IPv4 octets may carry leading zeros.
pub(super) fn parse_ip(text: &str) -> Result<IpAddr, &'static str> {
    let text = text.trim();
    if text.contains(':') {
        return match text.parse::<Ipv6Addr>() {
            Ok(ip) if ip.to_ipv4_mapped().is_some() => Err(MAPPED),
            Ok(ip) => Ok(ip.into()),
            Err(_) => Err("is no IP address"),
        };
    }
    parse_ipv4(text).map(IpAddr::V4).ok_or("is no IP address")
}

fn parse_ipv4(text: &str) -> Option<Ipv4Addr> {
    let mut octets = [0_u8; 4];
    let mut parts = text.split('.');
    for octet in &mut octets {
        *octet = u8::try_from(decimal(parts.next()?, 255)?).ok()?;
    }
    parts.next().is_none().then(|| octets.into())
}

/// Digits alone, however many zeros lead.
fn decimal(text: &str, max: u32) -> Option<u32> {
    if text.is_empty() {
        return None;
    }
    text.bytes().try_fold(0_u32, |value, byte| {
        let digit = char::from(byte).to_digit(10)?;
        Some(value * 10 + digit).filter(|value| *value <= max)
    })
}

/// Reads a network, host bits cleared; the same leniency in address and length (contract A10, A12).
pub(super) fn parse_cidr(text: &str) -> Result<IpNet, &'static str> {
    const NONE: &str = "is no address range (CIDR)";
    let (address, length) = text.trim().split_once('/').ok_or(NONE)?;
    let address = parse_ip(address)?;
    let length = decimal(length, 128).and_then(|length| u8::try_from(length).ok()).ok_or(NONE)?;
    Ok(IpNet::new(address, length).map_err(|_| NONE)?.trunc())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leading_zeros_are_decimal() {
        for (text, ip) in [
            ("172.30.0.041", "172.30.0.41"),
            ("1.2.3.004", "1.2.3.4"),
            ("192.168.099.022", "192.168.99.22"),
            ("10.180.00.001", "10.180.0.1"),
            ("010.0.0.1", "10.0.0.1"),
            ("000000010.0.0.000255", "10.0.0.255"),
            (" 10.0.0.1\n", "10.0.0.1"),
            ("fd00:0096::0010", "fd00:96::10"),
            ("::", "::"),
        ] {
            assert_eq!(parse_ip(text), Ok(ip.parse().unwrap()), "{text}");
        }
    }

    #[test]
    fn what_is_no_address() {
        for text in [
            "",
            " ",
            ".",
            "1",
            "1.2.3",
            "1.2.3.",
            "1.2.3.4.5",
            "1.2.3.4.",
            "256.0.0.1",
            "1.2.3.-4",
            "1.2.3.+4",
            "1.2.3.0x4",
            "1.2. 3.4",
            "1..3.4",
            "4294967297.0.0.1",
            "fe80::1%eth0",
            "fd00::g",
            "::ffff:1.2.3.4",
            "::ffff:102:304",
            "example.com",
            "1.2.3.4/32",
            "١.2.3.4",
        ] {
            assert!(parse_ip(text).is_err(), "{text}");
        }
    }

    #[test]
    fn ranges() {
        for (text, net) in [
            ("203.0.113.000/025", "203.0.113.0/25"),
            (" 203.0.113.0/25", "203.0.113.0/25"),
            ("203.0.113.77/25", "203.0.113.0/25"),
            ("0.0.0.0/0", "0.0.0.0/0"),
            ("fd00::1/64", "fd00::/64"),
        ] {
            assert_eq!(parse_cidr(text), Ok(net.parse().unwrap()), "{text}");
        }
        for text in [
            "",
            "10.0.0.1",
            "10.0.0.1/",
            "10.0.0.1/33",
            "fd00::/129",
            "fd00::/-1",
            "/8",
            "10.0.0.0/8/8",
            "10.0.0.0/256",
        ] {
            assert!(parse_cidr(text).is_err(), "{text}");
        }
    }
}
