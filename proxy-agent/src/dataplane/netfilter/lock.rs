//! One agent in a network namespace: two would write the same rules, or translate the same packets.

use std::{
    io,
    os::{
        fd::{AsFd, AsRawFd},
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixListener},
    },
    time::Duration,
};

use rustix::{
    io::Errno,
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType},
};

use crate::dataplane::DataplaneError;

/// An abstract name belongs to the network namespace, and ends with the process however that ends.
const NAME: &str = "proxy-agent";

/// Between taking the name and listening there lies next to nothing.
const TRIES: u32 = 5;
const PAUSE: Duration = Duration::from_millis(20);

/// Held as long as this lives.
#[derive(Debug)]
pub struct Lock {
    /// `None`: somebody has it who is no agent.
    _listener: Option<UnixListener>,
}

impl Lock {
    pub fn take() -> Result<Self, DataplaneError> {
        Self::take_name(NAME)
    }

    pub(crate) fn take_name(name: &str) -> Result<Self, DataplaneError> {
        let bound = SocketAddr::from_abstract_name(name).and_then(|addr| UnixListener::bind_addr(&addr));
        match bound {
            Ok(listener) => Ok(Self { _listener: Some(listener) }),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => match holder(name) {
                // Anybody may take a name, on the node's own network, too; to write rules takes more.
                Some(holder) if !may_be_agent(holder) => {
                    tracing::error!(
                        ?holder,
                        "the abstract socket @{name}, by which agents keep apart, is held by somebody who is none (`ss -xlp`); going on without it"
                    );
                    Ok(Self { _listener: None })
                }
                holder => {
                    let pid = match holder {
                        Some(Holder::Process { pid: pid @ 1.., .. }) => format!(" (pid {pid})"),
                        _ => String::new(),
                    };
                    Err(DataplaneError::Unavailable(format!(
                        "another proxy-agent{pid} is at work in this network namespace (it holds the abstract socket @{name}, see `ss -xlp`); stop it first"
                    )))
                }
            },
            Err(source) => Err(DataplaneError::Kernel { what: format!("abstract socket @{name}"), source }),
        }
    }
}

/// Who has the name, as the kernel says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Holder {
    /// The pid is 0 where it has none in this PID namespace.
    Process { uid: u32, pid: i32 },
    /// An agent does.
    DoesNotListen,
}

fn may_be_agent(holder: Holder) -> bool {
    match holder {
        Holder::Process { uid, pid: _ } => uid == 0 || uid == rustix::process::geteuid().as_raw(),
        Holder::DoesNotListen => false,
    }
}

/// `None`: that cannot be told.
fn holder(name: &str) -> Option<Holder> {
    for _ in 0..TRIES {
        match ask(name) {
            Ok(holder) => return Some(holder),
            // It may be about to.
            Err(Errno::CONNREFUSED) => std::thread::sleep(PAUSE),
            Err(_) => return None,
        }
    }
    Some(Holder::DoesNotListen)
}

/// Whose socket it is.
fn ask(name: &str) -> Result<Holder, Errno> {
    let addr = SocketAddrUnix::new_abstract_name(name.as_bytes())?;
    // Whoever holds it may let callers wait.
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &addr)?;
    peer(&socket)
}

/// By hand, for a process of another PID namespace has none here, which is no number that `rustix` takes.
fn peer(socket: impl AsFd) -> Result<Holder, Errno> {
    let mut peer = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut length = size_of_val(&peer) as libc::socklen_t;
    let fd = socket.as_fd().as_raw_fd();
    // SAFETY: `peer` is a whole `struct ucred`, `length` says so, and both outlive the call.
    let result =
        unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_PEERCRED, (&raw mut peer).cast(), &raw mut length) };
    if result == 0 { Ok(Holder::Process { uid: peer.uid, pid: peer.pid }) } else { Err(Errno::INVAL) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(what: &str) -> String {
        format!("proxy-agent-test-{what}-{}", std::process::id())
    }

    /// A process that another test has just started shares the sockets of this one until it is another program's.
    fn is_to_be_had(name: &str) -> bool {
        (0..100).any(|_| {
            let is_ours = Lock::take_name(name).is_ok_and(|lock| lock._listener.is_some());
            if !is_ours {
                std::thread::sleep(std::time::Duration::from_millis(50));
            }
            is_ours
        })
    }

    #[test]
    fn the_second_is_refused_until_the_first_is_gone() {
        let name = name("second");
        let first = Lock::take_name(&name).unwrap();
        let error = Lock::take_name(&name).unwrap_err().to_string();
        assert!(error.contains(&name) && error.contains("stop it"), "{error}");
        assert!(error.contains(&format!("(pid {})", std::process::id())), "{error}");
        drop(first);
        assert!(is_to_be_had(&name));
    }

    #[test]
    fn who_does_not_listen_is_no_agent() {
        let name = name("other");
        let addr = SocketAddrUnix::new_abstract_name(name.as_bytes()).unwrap();
        let socket = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
        rustix::net::bind(&socket, &addr).unwrap();
        assert!(Lock::take_name(&name).unwrap()._listener.is_none());
    }

    /// Of a pod on the node's network that is not root.
    #[test]
    fn somebody_without_privileges_keeps_nobody_away() {
        if !rustix::process::geteuid().is_root() {
            println!("SKIP a lock held by somebody else: not root");
            return;
        }
        let name = name("nobody");
        let addr = SocketAddr::from_abstract_name(&name).unwrap();
        let taken = std::thread::spawn(move || {
            let nobody = rustix::process::Uid::from_raw(65_534);
            // Of this thread alone.
            rustix::thread::set_thread_res_uid(nobody, nobody, nobody).unwrap();
            UnixListener::bind_addr(&addr).unwrap()
        });
        let taken = taken.join().unwrap();
        assert!(matches!(holder(&name), Some(Holder::Process { uid: 65_534, .. })));
        assert!(Lock::take_name(&name).unwrap()._listener.is_none());
        drop(taken);
        assert!(is_to_be_had(&name));
    }
}
