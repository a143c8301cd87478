//! Sockets that were pointed at a backend at connect time: finds those whose backend is gone, in every network namespace, and
//! destroys them (`SOCK_DESTROY`). Their owner sees ECONNABORTED when it reads, EDESTADDRREQ when it sends a datagram, and asks anew.
//!
//! What our programs noted in sockets tells which ones those are, by their cookies: exactly those that *we* pointed there. A socket
//! that its owner connected to the backend itself has no note that says so. Only if there are any, the namespaces are gone
//! through for them, if this process may enter them. Where it is destroyed a socket is named by its addresses and cookie: one
//! that connected elsewhere meanwhile is not found.
//!
//! A namespace is entered by the one thread that does this, which does nothing else.

use std::{
    collections::{HashMap, HashSet},
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::{fd::AsFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
};

use proxy_common::{Address, Ipv4Be, Ipv6Be, proto, socket::PeerRecord};
use rustix::thread::{CapabilitySet, LinkNameSpaceType, move_into_link_name_space};

use super::{notes::Reader, types::Kernel};
use crate::{
    dataplane::{
        alive::Alive,
        ebpf::{diag, layout::MapName, pins::Layout, sys},
    },
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
    /// Sockets that are still on a removed backend, and the last thing that was in the way.
    pub(super) left: usize,
    pub(super) why: Option<String>,
}

/// How the notes are read.
#[derive(Debug)]
pub(super) struct Notes {
    v4: Reader,
    v6: Reader,
}

/// Cookies, and whom these sockets talk to by their notes. One that speaks both families may have a note of each, of which the older
/// one is not true any more.
type Lost = HashMap<u64, Vec<(Protocol, Backend)>>;

impl Notes {
    pub(super) fn open() -> io::Result<Self> {
        let kernel = Kernel::read()?;
        Ok(Self { v4: Reader::new::<PeerRecord<Ipv4Be>>(&kernel)?, v6: Reader::new::<PeerRecord<Ipv6Be>>(&kernel)? })
    }

    /// How many sockets were pointed at a backend, and are.
    pub(super) fn count(&self, layout: &Layout) -> io::Result<u64> {
        let mut cookies = HashSet::new();
        self.v4.each(sys::open(&layout.map(MapName::PeersV4))?.as_fd(), |cookie, note: PeerRecord<Ipv4Be>| {
            cookies.extend((note.service != 0).then_some(cookie));
        })?;
        self.v6.each(sys::open(&layout.map(MapName::PeersV6))?.as_fd(), |cookie, note: PeerRecord<Ipv6Be>| {
            cookies.extend((note.service != 0).then_some(cookie));
        })?;
        Ok(cookies.len() as u64)
    }

    /// The sockets whose note says that they were pointed at a backend that is gone.
    fn lost(&self, layout: &Layout, alive: &Alive) -> io::Result<Lost> {
        let mut lost = Lost::new();
        let mut add = |cookie, whom| lost.entry(cookie).or_default().push(whom);
        self.v4.each(sys::open(&layout.map(MapName::PeersV4))?.as_fd(), |cookie, note: PeerRecord<Ipv4Be>| {
            if let Some(whom) = judge(&note, alive) {
                add(cookie, whom);
            }
        })?;
        self.v6.each(sys::open(&layout.map(MapName::PeersV6))?.as_fd(), |cookie, note: PeerRecord<Ipv6Be>| {
            if let Some(whom) = judge(&note, alive) {
                add(cookie, whom);
            }
        })?;
        Ok(lost)
    }
}

/// What two looks agree on. A note has no seal: read while its socket writes it, it may be half of the last connection and half of this one,
/// which may well be to a backend that serves.
fn agreed(mut one: Lost, other: &Lost) -> Lost {
    one.retain(|cookie, notes| {
        notes.retain(|note| other.get(cookie).is_some_and(|notes| notes.contains(note)));
        !notes.is_empty()
    });
    one
}

/// The network namespace that this thread belongs to, and whether it is in another one.
#[derive(Debug)]
pub(super) struct Home {
    namespace: fs::File,
    away: bool,
}

impl Home {
    /// Of a thread that has not been anywhere yet.
    pub(super) fn open() -> io::Result<Self> {
        Ok(Self { namespace: fs::File::open("/proc/thread-self/ns/net")?, away: false })
    }

    fn leave_for(&mut self, path: &Path) -> io::Result<()> {
        let namespace = fs::File::open(path)?;
        // A file of that name may be another by now; what is no network namespace is refused.
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
        self.away = true;
        Ok(())
    }

    /// By the first way that there still is: a process may end at any time, and its pod live on. `false`: there is none any more.
    fn leave_by(&mut self, ways: &[PathBuf], round: &mut Round) -> bool {
        for path in ways {
            match self.leave_for(path) {
                Ok(()) => return true,
                // Gone since it was listed.
                Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => {}
                Err(error) => round.note(&path.to_string_lossy(), &error),
            }
        }
        false
    }

    /// Asks for nothing where there is no way to go: even that would take CAP_SYS_ADMIN.
    pub(super) fn back(&mut self) -> io::Result<()> {
        if self.away {
            move_into_link_name_space(self.namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
            self.away = false;
        }
        Ok(())
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
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Unreachable {
    pub(crate) why: String,
    pub(crate) remedy: &'static str,
    /// The node's own can be, all the same.
    pub(crate) but_the_nodes: bool,
}

/// Whether the kernel can destroy a socket of this protocol, and this process can find the namespaces of all pods and enter them.
pub(crate) fn reaches_sockets(protocol: Protocol) -> Result<(), Unreachable> {
    diag::can_destroy(protocol.number()).map_err(|why| Unreachable {
        why,
        remedy: "use a kernel with CONFIG_INET_UDP_DIAG, CONFIG_INET_TCP_DIAG and CONFIG_INET_DIAG_DESTROY and run with CAP_NET_ADMIN",
        but_the_nodes: false,
    })?;
    Means::held().enter()
}

/// What this process has to find and enter namespaces with.
#[derive(Clone, Copy, Debug)]
struct Means {
    /// CAP_SYS_ADMIN.
    admin: bool,
    /// It sees all processes of the host, and where each of them is.
    sees_all: bool,
    sees_processes: bool,
    /// The directory in which the container runtime mounts namespaces is there, and those that it mounts from now on will be.
    mounts: bool,
    has_directory: bool,
}

impl Means {
    fn held() -> Self {
        const INITIAL_PID_NAMESPACE: u64 = 0xEFFF_FFFC;
        let capabilities = rustix::thread::capabilities(None).map_or(CapabilitySet::empty(), |sets| sets.effective);
        let sees_processes = fs::metadata("/proc/self/ns/pid").is_ok_and(|ns| ns.ino() == INITIAL_PID_NAMESPACE);
        let has_directory = Path::new(MOUNTED).is_dir();
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        Self {
            admin: capabilities.contains(CapabilitySet::SYS_ADMIN),
            // The first process may do everything: who may look at it may look at all (ptrace(2): CAP_SYS_PTRACE).
            sees_all: sees_processes && fs::read_link("/proc/1/ns/net").is_ok(),
            sees_processes,
            mounts: has_directory && receives_mounts(&mounts, Path::new(MOUNTED)),
            has_directory,
        }
    }

    fn enter(self) -> Result<(), Unreachable> {
        let Self { admin, sees_all, sees_processes, mounts, has_directory } = self;
        let but = |why: &str, remedy| Err(Unreachable { why: why.into(), remedy, but_the_nodes: true });
        let remedy =
            "mount the host's /run/netns with mountPropagation: HostToContainer, or run with hostPID and SYS_PTRACE";
        if !admin {
            but(
                "network namespaces of pods may not be entered without CAP_SYS_ADMIN",
                "add SYS_ADMIN to the container's capabilities, and mount the host's /run/netns with mountPropagation: HostToContainer, \
                 or run with hostPID and SYS_PTRACE",
            )
        } else if sees_all || mounts {
            Ok(())
        } else if sees_processes {
            but("it may not be seen which network namespace a process is in without CAP_SYS_PTRACE", remedy)
        } else if has_directory {
            but("network namespaces that come later do not appear in this container's /run/netns", remedy)
        } else {
            but("network namespaces of pods cannot be found from this container", remedy)
        }
    }
}

/// Whether what others mount below `path` appears here, too, by `/proc/self/mountinfo`: there its mount has a peer (`shared`) or
/// a master.
fn receives_mounts(mountinfo: &str, path: &Path) -> bool {
    // Number, parent, device, root, mount point, options; then words of which some may be missing, up to a dash.
    let mounts = mountinfo.lines().filter_map(|line| Some((Path::new(line.split(' ').nth(4)?), line)));
    // Of two at one place the later one is on top.
    let over = mounts.filter(|(point, _)| path.starts_with(point)).max_by_key(|(point, _)| point.components().count());
    over.is_some_and(|(_, line)| {
        let words = line.split(' ').skip(6).take_while(|word| *word != "-");
        words.into_iter().any(|word| word.starts_with("shared:") || word.starts_with("master:"))
    })
}

/// Finds and destroys them: everywhere, or where `pods` is false, those of the thread's own namespace.
pub(super) fn end(notes: &Notes, layout: &Layout, alive: &Alive, home: &mut Home, pods: bool) -> io::Result<Round> {
    home.back()?;
    let mut round = Round::default();
    let mut lost = notes.lost(layout, alive)?;
    if !lost.is_empty() {
        lost = agreed(lost, &notes.lost(layout, alive)?);
    }
    if lost.is_empty() {
        return Ok(round);
    }
    end_here(&mut lost, &mut round);
    let Ok(own) = home.namespace.metadata().inspect_err(|error| round.note("its own network namespace", error)) else {
        return Ok(round);
    };
    let all = if pods { namespaces(Path::new(PROC), Path::new(MOUNTED), own.dev(), own.ino()) } else { HashMap::new() };
    for ways in all.values() {
        if lost.is_empty() {
            break;
        }
        if home.leave_by(ways, &mut round) {
            end_here(&mut lost, &mut round);
        }
    }
    if let Err(error) = home.back() {
        round.note("the way back from the network namespaces of pods", &error);
    }
    if !lost.is_empty() {
        // Not those that were closed or connected elsewhere meanwhile.
        round.left = agreed(lost, &notes.lost(layout, alive)?).len();
    }
    Ok(round)
}

impl Round {
    fn note(&mut self, what: &str, error: &io::Error) {
        self.why = Some(format!("{what}: {error}"));
    }
}

/// Every network namespace but the own one, by inode number, and the ways there: a mount, which outlives processes, first.
fn namespaces(proc: &Path, mounted: &Path, device: u64, own: u64) -> HashMap<u64, Vec<PathBuf>> {
    let mut found: HashMap<u64, Vec<PathBuf>> = HashMap::new();
    for entry in fs::read_dir(mounted).into_iter().flatten().flatten() {
        let path = entry.path();
        if let Ok(about) = fs::metadata(&path)
            && about.dev() == device
        {
            found.entry(about.ino()).or_default().push(path);
        }
    }
    for entry in fs::read_dir(proc).into_iter().flatten().flatten() {
        if !entry.file_name().as_encoded_bytes().first().is_some_and(u8::is_ascii_digit) {
            continue;
        }
        let path = entry.path().join("ns/net");
        // `net:[4026531840]`: cheaper than opening it. A process that is gone, or may not be looked at, has none.
        let Ok(link) = fs::read_link(&path) else { continue };
        let number = link.to_str().and_then(|link| link.strip_prefix("net:[")?.strip_suffix(']')?.parse().ok());
        if let Some(number) = number {
            found.entry(number).or_default().push(path);
        }
    }
    found.remove(&own);
    found
}

/// Sockets of the namespace that this thread is in; takes out of `lost` those that it found. What fails concerns one socket, or
/// one kind of them.
fn end_here(lost: &mut Lost, round: &mut Round) {
    let socket = match diag::Socket::open() {
        Ok(socket) => socket,
        Err(error) => return round.note("socket diagnostics", &error),
    };
    for (number, protocol) in [(proto::UDP, Protocol::Udp), (proto::TCP, Protocol::Tcp)] {
        if !lost.values().flatten().any(|(of, _)| *of == protocol) {
            continue;
        }
        for family in [libc::AF_INET, libc::AF_INET6] {
            let mut found = Vec::new();
            let listed = socket.connected(family as u8, number, |id| {
                let Some(cookie) = cookie(id) else { return };
                if let Some(notes) = lost.get(&cookie) {
                    let peer = peer(id, family);
                    found.push((cookie, *id, notes.iter().any(|(_, to)| peer == Some((to.addr, to.port)))));
                }
            });
            if let Err(error) = listed {
                round.note(&format!("the list of {protocol} sockets"), &error);
            }
            for (cookie, id, is_there) in found {
                // A note of an earlier connection does not match what the socket is connected to.
                let destroyed = if is_there { socket.destroy(family as u8, number, &id) } else { Ok(false) };
                match destroyed {
                    Ok(destroyed) => {
                        lost.remove(&cookie);
                        round.destroyed += u64::from(destroyed);
                    }
                    Err(error) => round.note(&format!("the end of a {protocol} socket"), &error),
                }
            }
        }
    }
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
        // All the ways there.
        let mut ways = namespaces(&proc, &mounted, about.dev(), 7).remove(&8).unwrap();
        ways.sort_unstable();
        assert_eq!(ways, ["20", "21"].map(|pid| proc.join(pid).join("ns/net")));
        std::os::unix::fs::symlink(format!("net:[{}]", about.ino()), proc.join("22/ns/again")).unwrap();
        fs::rename(proc.join("22/ns/again"), proc.join("22/ns/net")).unwrap();
        let ways = namespaces(&proc, &mounted, about.dev(), 7).remove(&about.ino()).unwrap();
        assert_eq!(ways, [mounted.join("cni-1"), proc.join("22/ns/net")], "a mount first");
    }

    #[test]
    fn pods_are_reached_where_they_are_found_and_may_be_entered() {
        let none = Means { admin: false, sees_all: false, sees_processes: false, mounts: false, has_directory: false };
        let all = Means { admin: true, sees_all: true, sees_processes: true, mounts: true, has_directory: true };
        assert_eq!(all.enter(), Ok(()));
        assert_eq!(Means { mounts: false, ..all }.enter(), Ok(()));
        assert_eq!(Means { sees_all: false, sees_processes: false, ..all }.enter(), Ok(()));
        let why = |means: Means| means.enter().unwrap_err().why;
        assert!(why(Means { admin: false, ..all }).contains("CAP_SYS_ADMIN"));
        let admin = Means { admin: true, ..none };
        // hostPID alone: other users' processes, and the capable ones, are closed books.
        assert!(why(Means { sees_processes: true, has_directory: true, ..admin }).contains("CAP_SYS_PTRACE"));
        assert!(why(Means { has_directory: true, ..admin }).contains("come later"));
        assert!(why(admin).contains("cannot be found"));
        assert!(all.enter().is_ok() && Means { admin: false, ..all }.enter().unwrap_err().but_the_nodes);
    }

    #[test]
    fn mounts_come_along_only_where_they_are_passed_on() {
        let netns = Path::new("/run/netns");
        let root = "27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n";
        assert!(receives_mounts(root, netns));
        let private = format!("{root}42 27 0:25 /netns /run/netns rw - tmpfs tmpfs rw,shared:9\n");
        assert!(!receives_mounts(&private, netns), "mounted without propagation");
        let nested = format!("{private}44 42 0:4 net:[4026532177] /run/netns/cni-1 rw shared:2 - nsfs nsfs rw\n");
        assert!(!receives_mounts(&nested, netns), "what is below it does not matter");
        let slave = format!("{root}42 27 0:25 /netns /run/netns rw master:7 - tmpfs tmpfs rw\n");
        assert!(receives_mounts(&slave, netns));
        let above = "27 1 254:0 / / rw - ext4 /dev/vda rw\n30 27 0:25 / /run rw,nosuid master:3 propagate_from:2 - tmpfs tmpfs rw\n";
        assert!(receives_mounts(above, netns) && !receives_mounts(above, Path::new("/runnetns")));
        assert!(
            !receives_mounts(&format!("{slave}43 42 0:26 / /run/netns rw - tmpfs tmpfs rw\n"), netns),
            "mounted over"
        );
    }

    #[test]
    fn home_is_where_one_never_left_without_asking() {
        let mut home = Home::open().unwrap();
        // By whoever may do nothing, too.
        home.back().unwrap();
        assert!(home.leave_for(Path::new("/proc/self/ns/mnt")).is_err());
        assert!(!home.away);
    }

    #[test]
    fn a_namespace_is_entered_by_whatever_way_is_left() {
        if !rustix::process::geteuid().is_root() {
            println!("SKIP a_namespace_is_entered_by_whatever_way_is_left: not root");
            return;
        }
        let (mut home, mut round) = (Home::open().unwrap(), Round::default());
        let [gone, own] = ["/proc/4294967295/ns/net", "/proc/thread-self/ns/net"].map(PathBuf::from);
        assert!(!home.leave_by(std::slice::from_ref(&gone), &mut round) && !home.away);
        assert!(home.leave_by(&[gone, own], &mut round) && home.away);
        assert_eq!(round.why, None);
        home.back().unwrap();
    }

    #[test]
    fn notes_count_if_two_looks_agree_on_them() {
        let to = |addr: &str| (Protocol::Udp, Backend { addr: addr.parse().unwrap(), port: Port::new(53).unwrap() });
        let lost = |rows: &[(u64, &[&str])]| -> Lost {
            rows.iter().map(|(cookie, addrs)| (*cookie, addrs.iter().map(|addr| to(addr)).collect())).collect()
        };
        let first = lost(&[(1, &["10.0.0.1", "fd00::1"]), (2, &["10.0.0.1"]), (3, &["10.0.0.1"]), (4, &["fd00::1"])]);
        // One changed of two, another backend, none any more.
        let second = lost(&[(1, &["10.0.0.1"]), (2, &["10.0.0.2"]), (4, &["fd00::1"]), (5, &["fd00::1"])]);
        assert_eq!(agreed(first, &second), lost(&[(1, &["10.0.0.1"]), (4, &["fd00::1"])]));
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
