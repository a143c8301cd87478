//! Which addresses can be served, and which can serve.

use std::net::IpAddr;

/// Which family such an address means is anybody's guess, and a packet never carries it.
pub const MAPPED: &str = "is an IPv4 address in IPv6 clothes";

/// Why no frontend can have this address.
pub fn unfit_for_vip(ip: IpAddr) -> Option<&'static str> {
    if ip.is_unspecified() {
        Some("is the unspecified address")
    } else if ip.is_loopback() {
        Some("is a loopback address")
    } else if ip.is_multicast() {
        Some("is a multicast address")
    } else if matches!(ip, IpAddr::V4(ip) if ip.is_broadcast()) {
        Some("is the broadcast address")
    } else if matches!(ip, IpAddr::V6(ip) if ip.to_ipv4_mapped().is_some()) {
        Some(MAPPED)
    } else if matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local()) {
        Some("is a link-local address")
    } else {
        None
    }
}

/// Why no endpoint can have this address: what the API server refuses too. Traffic sent there would reach this node's own
/// services, everybody, or another host on every link: doors that nobody asked for (fault F13).
pub fn unfit_for_endpoint(ip: IpAddr) -> Option<&'static str> {
    unfit_for_vip(ip)
        .or_else(|| matches!(ip, IpAddr::V4(ip) if ip.is_link_local()).then_some("is a link-local address"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_nothing_can_live_at() {
        for text in [
            "0.0.0.0",
            "127.0.0.1",
            "127.1.2.3",
            "224.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "ff02::1",
            "fe80::1",
            "::ffff:1.2.3.4",
        ] {
            assert!(unfit_for_vip(text.parse().unwrap()).is_some(), "{text}");
        }
        assert_eq!(unfit_for_vip("169.254.20.10".parse().unwrap()), None);
        assert!(unfit_for_endpoint("169.254.20.10".parse().unwrap()).is_some());
        for text in ["10.0.0.1", "192.0.2.1", "fd00::1", "2001:db8::1"] {
            assert_eq!(unfit_for_endpoint(text.parse().unwrap()), None, "{text}");
        }
    }
}
