//! Sockets that were pointed at a backend at connect time: finds those whose backend is gone, in every network namespace, and
//! destroys them (`SOCK_DESTROY`). Their owner sees ECONNABORTED and asks anew.
//!
//! What our programs noted in sockets tells which ones those are, by their cookies: exactly those that *we* pointed there. A socket
//! that its owner connected to the backend itself has no note that says so. Only if there are any, the namespaces are gone
//! through for them. Where it is destroyed a socket is named by its addresses and cookie: one that connected elsewhere
//! meanwhile is not found.
//!
//! A namespace is entered by the one thread that does this, which does nothing else.

use std::{
    collections::HashMap,
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::{fd::AsFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
};

use proxy_common::{Address, Ipv4Be, Ipv6Be, proto, socket::PeerRecord};
use rustix::thread::{CapabilitySet, LinkNameSpaceType, move_into_link_name_space};

use super::{
    alive::Alive,
    notes::{self, Reader},
};
use crate::{
    dataplane::ebpf::{diag, layout::MapName, pins::Layout, sys},
    desired::{Backend, Frontend},
    model::{Port, Protocol},
};

/// Namespaces with a process in them, and those that only a mount keeps (a pod whose processes the agent does not see).
const PROC: &str = "/proc";
const MOUNTED: &str = "/run/netns";

/// What one round did.
#[derive(Debug, Default)]
pub(super) struct Round {
    pub(super) destroyed: u64,
    /// Namespaces whose sockets could not be looked at, and the last reason.
    pub(super) unseen: u64,
    pub(super) why: Option<io::Error>,
}

/// How the notes are read.
#[derive(Debug)]
pub(super) struct Notes {
    v4: Reader,
    v6: Reader,
}

impl Notes {
    pub(super) fn open() -> io::Result<Self> {
        let hook = notes::hook()?;
        Ok(Self { v4: Reader::new::<PeerRecord<Ipv4Be>>(hook)?, v6: Reader::new::<PeerRecord<Ipv6Be>>(hook)? })
    }

    /// The sockets whose note says that they were pointed at a backend that is gone: cookie, whom they talk to.
    fn lost(&self, layout: &Layout, alive: &Alive) -> io::Result<HashMap<u64, (Protocol, Backend)>> {
        let mut lost = HashMap::new();
        self.v4.each(sys::open(&layout.map(MapName::PeersV4))?.as_fd(), |cookie, note: PeerRecord<Ipv4Be>| {
            lost.extend(judge(&note, alive).map(|whom| (cookie, whom)));
        })?;
        self.v6.each(sys::open(&layout.map(MapName::PeersV6))?.as_fd(), |cookie, note: PeerRecord<Ipv6Be>| {
            lost.extend(judge(&note, alive).map(|whom| (cookie, whom)));
        })?;
        Ok(lost)
    }
}

fn judge<A: Address>(note: &PeerRecord<A>, alive: &Alive) -> Option<(Protocol, Backend)> {
    if note.service == 0 {
        return None;
    }
    let protocol = Protocol::from_number(note.proto)?;
    let frontend = Frontend { addr: note.vip.to_ip(), port: Port::new(note.vip_port.to_host())?, protocol };
    let backend = Backend { addr: note.backend.to_ip(), port: Port::new(note.backend_port.to_host())? };
    alive.is_lost(&frontend, &backend).then_some((protocol, backend))
}

/// Why the sockets of pods cannot be destroyed, and what helps.
pub(crate) struct Unreachable {
    pub(crate) why: String,
    pub(crate) remedy: &'static str,
}

/// Whether the kernel can destroy a socket, and this process can find the namespaces of all pods and enter them: it sees the
/// processes of the whole host, or has the directory in which the container runtime mounts namespaces.
pub(crate) fn reaches_sockets() -> Result<(), Unreachable> {
    const INITIAL_PID_NAMESPACE: u64 = 0xEFFF_FFFC;
    let kernel =
        |why| Unreachable { why, remedy: "use a kernel with CONFIG_INET_DIAG_DESTROY and run with CAP_NET_ADMIN" };
    match diag::can_destroy() {
        Ok(true) => {}
        Ok(false) => return Err(kernel("not in this kernel".into())),
        Err(error) => return Err(kernel(error.to_string())),
    }
    let capabilities = rustix::thread::capabilities(None).map_or(CapabilitySet::empty(), |sets| sets.effective);
    if !capabilities.contains(CapabilitySet::SYS_ADMIN) {
        let remedy =
            "add SYS_ADMIN to the container's capabilities and mount the host's /run/netns, or run with hostPID";
        return Err(Unreachable {
            why: "network namespaces of pods may not be entered without CAP_SYS_ADMIN".into(),
            remedy,
        });
    }
    let whole_host = fs::metadata("/proc/self/ns/pid").is_ok_and(|ns| ns.ino() == INITIAL_PID_NAMESPACE);
    if !whole_host && !Path::new(MOUNTED).is_dir() {
        let remedy = "mount the host's /run/netns, or run with hostPID";
        return Err(Unreachable {
            why: "network namespaces of pods cannot be found from this container".into(),
            remedy,
        });
    }
    Ok(())
}

/// Finds and destroys them.
pub(super) fn end(notes: &Notes, layout: &Layout, alive: &Alive) -> io::Result<Round> {
    let mut round = Round::default();
    let mut lost = notes.lost(layout, alive)?;
    if lost.is_empty() {
        return Ok(round);
    }
    let home = fs::File::open("/proc/thread-self/ns/net")?;
    let own = home.metadata()?;
    end_here(&mut lost, &mut round)?;
    for (_, path) in namespaces(Path::new(PROC), Path::new(MOUNTED), own.dev(), own.ino()) {
        if lost.is_empty() {
            break;
        }
        let entered = fs::File::open(&path).and_then(|ns| {
            // A file of that name may be another by now; what is no network namespace is refused.
            move_into_link_name_space(ns.as_fd(), Some(LinkNameSpaceType::Network)).map_err(io::Error::from)
        });
        if let Err(error) = entered.and_then(|()| end_here(&mut lost, &mut round)) {
            // Gone since it was listed.
            if !matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) {
                round.unseen += 1;
                round.why = Some(error);
            }
        }
    }
    move_into_link_name_space(home.as_fd(), Some(LinkNameSpaceType::Network))?;
    if lost.is_empty() {
        // Whoever could not be looked at had none of them.
        (round.unseen, round.why) = (0, None);
    }
    Ok(round)
}

/// Every network namespace but the own one, each once, by inode number.
fn namespaces(proc: &Path, mounted: &Path, device: u64, own: u64) -> HashMap<u64, PathBuf> {
    let mut found = HashMap::new();
    for entry in fs::read_dir(proc).into_iter().flatten().flatten() {
        if !entry.file_name().as_encoded_bytes().first().is_some_and(u8::is_ascii_digit) {
            continue;
        }
        let path = entry.path().join("ns/net");
        // `net:[4026531840]`: cheaper than opening it. A process that is gone, or may not be looked at, has none.
        let Ok(link) = fs::read_link(&path) else { continue };
        let number = link.to_str().and_then(|link| link.strip_prefix("net:[")?.strip_suffix(']')?.parse().ok());
        if let Some(number) = number {
            found.entry(number).or_insert(path);
        }
    }
    for entry in fs::read_dir(mounted).into_iter().flatten().flatten() {
        let path = entry.path();
        if let Ok(about) = fs::metadata(&path)
            && about.dev() == device
        {
            found.entry(about.ino()).or_insert(path);
        }
    }
    found.remove(&own);
    found
}

/// Sockets of the namespace that this thread is in; takes out of `lost` those that it found.
fn end_here(lost: &mut HashMap<u64, (Protocol, Backend)>, round: &mut Round) -> io::Result<()> {
    let socket = diag::Socket::open()?;
    for (number, protocol) in [(proto::UDP, Protocol::Udp), (proto::TCP, Protocol::Tcp)] {
        if !lost.values().any(|(of, _)| *of == protocol) {
            continue;
        }
        for family in [libc::AF_INET, libc::AF_INET6] {
            let mut found = Vec::new();
            socket.connected(family as u8, number, |id| {
                let Some(cookie) = cookie(id) else { return };
                // A note of an earlier connection does not match what the socket is connected to.
                if let Some((_, backend)) = lost.get(&cookie)
                    && peer(id, family) == Some((backend.addr, backend.port))
                {
                    found.push((cookie, *id));
                }
            })?;
            for (cookie, id) in found {
                lost.remove(&cookie);
                round.destroyed += u64::from(socket.destroy(family as u8, number, &id)?);
            }
        }
    }
    Ok(())
}

/// The last two words of `struct inet_diag_sockid`, the lower one first.
fn cookie(id: &diag::Id) -> Option<u64> {
    let word = |at: usize| Some(u64::from(u32::from_ne_bytes(*id.get(at..)?.first_chunk()?)));
    Some(word(44)? << 32 | word(40)?)
}

/// Whom a socket is connected to: `struct inet_diag_sockid` begins with both ports, the own address and the peer's.
fn peer(id: &diag::Id, family: i32) -> Option<(IpAddr, Port)> {
    let port = Port::new(u16::from_be_bytes(*id.get(2..)?.first_chunk()?))?;
    let addr: [u8; 16] = *id.get(20..)?.first_chunk()?;
    let addr = if family == libc::AF_INET {
        IpAddr::V4(Ipv4Addr::from(*addr.first_chunk::<4>()?))
    } else {
        // An IPv6 socket may talk IPv4.
        Ipv6Addr::from(addr).to_canonical()
    };
    Some((addr, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn namespaces_are_listed_once_and_the_own_one_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let (proc, mounted) = (dir.path().join("proc"), dir.path().join("netns"));
        fs::create_dir_all(&mounted).unwrap();
        for (pid, link) in
            [("1", "net:[7]"), ("20", "net:[8]"), ("21", "net:[8]"), ("self", "net:[9]"), ("22", "mnt:[3]")]
        {
            fs::create_dir_all(proc.join(pid).join("ns")).unwrap();
            std::os::unix::fs::symlink(link, proc.join(pid).join("ns/net")).unwrap();
        }
        fs::write(mounted.join("cni-1"), "").unwrap();
        let about = fs::metadata(mounted.join("cni-1")).unwrap();
        let numbers = |device, own| {
            let mut numbers: Vec<u64> = namespaces(&proc, &mounted, device, own).into_keys().collect();
            numbers.sort_unstable();
            numbers
        };
        assert_eq!(numbers(about.dev(), 7), [8, about.ino()]);
        assert_eq!(numbers(about.dev() + 1, 8), [7], "no namespace, a file of another filesystem");
        assert_eq!(namespaces(Path::new("/nowhere"), Path::new("/nowhere"), 0, 0).len(), 0);
    }

    #[test]
    fn the_peer_of_a_socket() {
        let mut id = [0; 48];
        id[2..4].copy_from_slice(&53_u16.to_be_bytes());
        id[20..24].copy_from_slice(&[10, 0, 0, 9]);
        assert_eq!(peer(&id, libc::AF_INET), Some(([10, 0, 0, 9].into(), Port::new(53).unwrap())));
        id[20..36].copy_from_slice(&"::ffff:10.0.0.9".parse::<Ipv6Addr>().unwrap().octets());
        assert_eq!(peer(&id, libc::AF_INET6), Some(([10, 0, 0, 9].into(), Port::new(53).unwrap())));
        id[20..36].copy_from_slice(&"fd00::9".parse::<Ipv6Addr>().unwrap().octets());
        assert_eq!(peer(&id, libc::AF_INET6).unwrap().0, "fd00::9".parse::<IpAddr>().unwrap());
    }
}
