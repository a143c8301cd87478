//! The addresses that this network namespace has.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::OwnedFd,
    ptr,
};

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

/// Which addresses are not of this namespace any more. A list is as old as it is, and what a route makes local (`ip route add local
/// 198.51.100.0/24 dev lo`) is in none, so the kernel is asked about each address that the list lacks, once.
pub(super) struct Lost<'a> {
    own: &'a BTreeSet<IpAddr>,
    asked: BTreeMap<IpAddr, bool>,
}

impl<'a> Lost<'a> {
    pub(super) const fn new(own: &'a BTreeSet<IpAddr>) -> Self {
        Self { own, asked: BTreeMap::new() }
    }

    pub(super) fn has(&mut self, address: IpAddr) -> io::Result<bool> {
        if self.own.contains(&address) {
            return Ok(false);
        }
        if let Some(lost) = self.asked.get(&address) {
            return Ok(*lost);
        }
        let lost = !is_local(address)?;
        self.asked.insert(address, lost);
        Ok(lost)
    }
}

/// Whether what is sent to this address comes in here, as the kernel's routes have it.
fn is_local(address: IpAddr) -> io::Result<bool> {
    const RTM_NEWROUTE: u16 = 24;
    const NLMSG_ERROR: u16 = 2;
    const RTN_LOCAL: u8 = 2;
    // NETLINK_ROUTE.
    let socket: OwnedFd =
        rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
    rustix::net::send(&socket, &question(address), SendFlags::empty())?;
    let mut buffer = [0_u8; 4096];
    let (_, length) = rustix::net::recv(&socket, buffer.as_mut_slice(), RecvFlags::empty())?;
    let answer = buffer.get(..length).unwrap_or_default();
    let unreadable = || io::Error::new(io::ErrorKind::InvalidData, "the kernel's answer about a route makes no sense");
    let kind = answer.get(4..).and_then(<[u8]>::first_chunk).map(|kind| u16::from_ne_bytes(*kind));
    match kind.ok_or_else(unreadable)? {
        RTM_NEWROUTE => answer.get(23).map(|kind| *kind == RTN_LOCAL).ok_or_else(unreadable),
        NLMSG_ERROR => {
            let code = answer.get(16..).and_then(<[u8]>::first_chunk).map(|code| i32::from_ne_bytes(*code));
            match -code.ok_or_else(unreadable)? {
                // No route, and routes that refuse.
                libc::ENETUNREACH | libc::EHOSTUNREACH | libc::ESRCH | libc::EINVAL | libc::EACCES => Ok(false),
                code => Err(io::Error::from_raw_os_error(code)),
            }
        }
        _ => Err(unreadable()),
    }
}

/// `RTM_GETROUTE` for one destination.
fn question(address: IpAddr) -> Vec<u8> {
    const RTM_GETROUTE: u16 = 26;
    const NLM_F_REQUEST: u16 = 1;
    const RTA_DST: u16 = 1;
    let (family, octets) = match address {
        IpAddr::V4(v4) => (libc::AF_INET, v4.octets().to_vec()),
        IpAddr::V6(v6) => (libc::AF_INET6, v6.octets().to_vec()),
    };
    let mut message = Vec::with_capacity(48);
    // struct nlmsghdr, with the message's whole length,
    message.extend_from_slice(&(32 + octets.len() as u32).to_ne_bytes());
    message.extend_from_slice(&RTM_GETROUTE.to_ne_bytes());
    message.extend_from_slice(&NLM_F_REQUEST.to_ne_bytes());
    message.extend_from_slice(&[0; 8]);
    // struct rtmsg: family, length of the destination,
    message.extend_from_slice(&[family as u8, octets.len() as u8 * 8]);
    message.extend_from_slice(&[0; 10]);
    // and the destination.
    message.extend_from_slice(&(4 + octets.len() as u16).to_ne_bytes());
    message.extend_from_slice(&RTA_DST.to_ne_bytes());
    message.extend_from_slice(&octets);
    message
}

/// All but link-local ones: they come and go with every pod's link, and nothing is masqueraded with one.
pub(crate) fn own() -> io::Result<BTreeSet<IpAddr>> {
    let mut first = ptr::null_mut();
    // SAFETY: `first` is room for the pointer that the call gives.
    if unsafe { libc::getifaddrs(&raw mut first) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let (mut own, mut next) = (BTreeSet::new(), first);
    // SAFETY: `next` is of the list that was given just now and is not freed yet, or null.
    while let Some(entry) = unsafe { next.as_ref() } {
        // SAFETY: an address of that list, or null.
        own.extend(unsafe { entry.ifa_addr.as_ref() }.and_then(ip));
        next = entry.ifa_next;
    }
    // SAFETY: what `getifaddrs` gave, freed once; nothing of it is held.
    unsafe { libc::freeifaddrs(first) };
    Ok(own)
}

fn ip(address: &libc::sockaddr) -> Option<IpAddr> {
    let address = ptr::from_ref(address);
    // SAFETY: never null; the family is the first field of each kind of address.
    match i32::from(unsafe { (*address).sa_family }) {
        libc::AF_INET => {
            // SAFETY: so the family says; read unaligned.
            let v4 = unsafe { address.cast::<libc::sockaddr_in>().read_unaligned() };
            Some(Ipv4Addr::from(v4.sin_addr.s_addr.to_ne_bytes()).into())
        }
        libc::AF_INET6 => {
            // SAFETY: so the family says; read unaligned.
            let v6 = unsafe { address.cast::<libc::sockaddr_in6>().read_unaligned() };
            let v6 = Ipv6Addr::from(v6.sin6_addr.s6_addr);
            (!v6.is_unicast_link_local()).then_some(v6.into())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::{
        process::Command,
        time::{Duration, Instant},
    };

    use super::*;

    fn ip(arguments: &str) {
        let status = Command::new("ip").args(arguments.split(' ')).status().unwrap();
        assert!(status.success(), "ip {arguments}");
    }

    /// In a network namespace that lasts as long as its thread.
    fn isolated(body: impl FnOnce() + Send + 'static) {
        if !rustix::process::geteuid().is_root() {
            println!("SKIP lost addresses: not root");
            return;
        }
        let thread = std::thread::spawn(|| {
            // SAFETY: of this thread alone, and of no file descriptors.
            unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }.unwrap();
            ip("link set lo up");
            body();
        });
        thread.join().unwrap();
    }

    #[test]
    fn what_a_route_makes_local_is_not_lost() {
        isolated(|| {
            ip("route add local 198.51.100.0/24 dev lo");
            ip("-6 route add local 2001:db8:5::/64 dev lo");
            let own = own().unwrap();
            let mut lost = Lost::new(&own);
            for (address, expected) in [
                ("127.0.0.1", false),
                ("::1", false),
                ("198.51.100.7", false),
                ("2001:db8:5::7", false),
                ("198.51.101.7", true),
                ("2001:db8:6::7", true),
            ] {
                for _ in 0..2 {
                    assert_eq!(lost.has(address.parse().unwrap()).unwrap(), expected, "{address}");
                }
            }
        });
    }

    /// Otherwise each pod that goes would have all tables walked over.
    #[test]
    fn a_pods_link_brings_no_address_of_the_nodes() {
        isolated(|| {
            let before = own().unwrap();
            ip("link add pod type veth peer name peer");
            ip("link set peer up");
            ip("-6 addr add fe80::7/64 dev pod nodad");
            ip("link set pod up");
            assert_eq!(own().unwrap(), before);
            ip("-6 addr add 2001:db8::7/64 dev pod nodad");
            assert_eq!(own().unwrap().len(), before.len() + 1);
        });
    }

    #[test]
    fn an_address_that_came_after_the_list_is_not_lost() {
        isolated(|| {
            let addresses = ["192.0.2.1", "2001:db8::1"].map(|address| address.parse::<IpAddr>().unwrap());
            let list = own().unwrap();
            ip("addr add 192.0.2.1/32 dev lo");
            ip("-6 addr add 2001:db8::1/128 dev lo nodad");
            // A worker of the kernel's makes it local, as often as not after `ip` has come back.
            let deadline = Instant::now() + Duration::from_secs(10);
            while !is_local(addresses[1]).unwrap() && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(1));
            }
            assert_eq!(addresses.map(|address| Lost::new(&list).has(address).unwrap()), [false; 2]);
            ip("addr del 192.0.2.1/32 dev lo");
            ip("-6 addr del 2001:db8::1/128 dev lo");
            assert_eq!(addresses.map(|address| Lost::new(&list).has(address).unwrap()), [true; 2]);
        });
    }
}
