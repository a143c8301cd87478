//! Whether anybody else translates for our frontends, by which the programs tell a connection that has lost its entries from one that another
//! proxy made before this one took over. The former is reset, the latter must go on.
//!
//! Netfilter's translations, kube-proxy's and those of our own other modes, are told by the kernel's conntrack: there is one as long as it
//! has a TCP connection that was meant for a frontend of ours and is answered by somebody else. All links have moved to our programs when
//! that is asked first, so there will be no more of them, and who finds none left is done. Another proxy that is started later is not
//! looked for.
//!
//! On a thread of its own, which ends with that: to list a large table takes longer than a change may wait.

use std::{
    convert::Infallible,
    io,
    net::IpAddr,
    sync::mpsc::{self, Receiver, RecvTimeoutError, Sender},
    time::{Duration, Instant},
};

use proxy_common::{
    Address, Be16, Ipv4Be, Ipv6Be,
    frontend::{FrontendKey, FrontendValue},
    proto,
};

use super::{
    layout::MapName,
    pins::Layout,
    sys::{self, Map},
};
use crate::{
    dataplane::netfilter::conntrack::{self, Entry, Socket},
    model::{Family, Protocol},
};

/// An entry that moves while they are listed may be missed: what is gone is gone twice.
const AGAIN: Duration = Duration::from_secs(1);
/// Between two looks while there are some, at first and at the longest.
const SOON: Duration = Duration::from_secs(5);
const LONGEST: Duration = Duration::from_secs(300);
/// Long looks take at most one part in so many of the time.
const SHARE: u32 = 100;
const LONG: Duration = Duration::from_secs(1);

/// The thread's other end. It ends with this.
#[derive(Debug)]
pub(crate) struct Alone {
    layout: Layout,
    looking: Option<Sender<Infallible>>,
}

impl Alone {
    pub(crate) fn new(layout: &Layout) -> Self {
        Self { layout: layout.clone(), looking: None }
    }

    /// Entries may be found missing for another reason: programs go over to other maps.
    pub(crate) fn doubt(&self) -> io::Result<()> {
        set(&self.layout, false)
    }

    /// From now on every new connection to a frontend is ours. Called again, it goes on as it does.
    pub(crate) fn look(&mut self) {
        if self.looking.is_some() {
            return;
        }
        let (looking, end) = mpsc::channel();
        let layout = self.layout.clone();
        let thread = std::thread::Builder::new().name("alone".into());
        match thread.spawn(move || run(&layout, &end)) {
            Ok(_) => self.looking = Some(looking),
            Err(error) => tracing::warn!(%error, "whether others translate here cannot be looked at now"),
        }
    }
}

fn run(layout: &Layout, end: &Receiver<Infallible>) {
    let (mut pause, mut quiet, mut said) = (SOON, false, None);
    loop {
        let started = Instant::now();
        let told = others(layout).inspect_err(|_| {
            // What an earlier run found out may not be so any more. Without the map there is nobody to tell.
            let _gone = set(layout, false);
        });
        let left = told.and_then(|left| {
            // A single look that finds none changes nothing: before a restart there may have been none, too.
            if left > 0 || quiet { set(layout, left == 0).map(|()| left) } else { Ok(left) }
        });
        let next = match left {
            Ok(0) if quiet => {
                tracing::info!("nobody else translates here: TCP connections that lose their entries are reset");
                return;
            }
            Ok(0) => {
                quiet = true;
                AGAIN
            }
            left => {
                quiet = false;
                let text = left.map_or_else(
                    |error| format!("what else translates here cannot be told, so a TCP connection that loses its entries hangs: {error}"),
                    |_| "another proxy's connections to Services are going on: until they have ended, one that loses its entries hangs".to_owned(),
                );
                // A directory that is cleared away has nothing to look at.
                if said.as_ref() != Some(&text) && layout.maps.exists() {
                    tracing::info!("{text}");
                    said = Some(text);
                }
                let now = pause;
                pause = (pause * 3 / 2).min(LONGEST);
                now
            }
        };
        let took = started.elapsed();
        let rest = if took > LONG { (took * SHARE).min(LONGEST) } else { Duration::ZERO };
        match end.recv_timeout(next.max(rest)) {
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

/// TCP connections to frontends of ours that somebody else translates.
fn others(layout: &Layout) -> io::Result<usize> {
    // Without connection tracking there is no translation by rules.
    if !conntrack::is_tracking() {
        return Ok(0);
    }
    let socket = Socket::open()?;
    let mut left = 0;
    for family in Family::BOTH {
        let frontends = Frontends::open(layout, family)?;
        let mut failed = None;
        socket.entries(family, Protocol::Tcp, |entry| {
            if is_translated(&entry) {
                match frontends.have(&entry) {
                    Ok(ours) => left += usize::from(ours),
                    Err(error) => failed = Some(error),
                }
            }
        })?;
        failed.map_or(Ok(()), Err)?;
    }
    Ok(left)
}

/// By rules, or by IPVS, which does not mark the entry as translated.
fn is_translated(entry: &Entry) -> bool {
    entry.asked != entry.answers
}

/// Those in force.
enum Frontends {
    V4(Map<FrontendKey<Ipv4Be>, FrontendValue>),
    V6(Map<FrontendKey<Ipv6Be>, FrontendValue>),
}

impl Frontends {
    fn open(layout: &Layout, family: Family) -> io::Result<Self> {
        let open = |map| sys::open_read_only(&layout.map(map));
        match family {
            Family::V4 => open(MapName::FrontendsV4).and_then(Map::new).map(Self::V4),
            Family::V6 => open(MapName::FrontendsV6).and_then(Map::new).map(Self::V6),
        }
    }

    fn have(&self, entry: &Entry) -> io::Result<bool> {
        let (addr, port) = entry.asked;
        match self {
            Self::V4(map) => key::<Ipv4Be>(addr, port.get()).map_or(Ok(false), |key| Ok(map.get(&key)?.is_some())),
            Self::V6(map) => key::<Ipv6Be>(addr, port.get()).map_or(Ok(false), |key| Ok(map.get(&key)?.is_some())),
        }
    }
}

fn key<A: Address>(addr: IpAddr, port: u16) -> Option<FrontendKey<A>> {
    Some(FrontendKey::new(A::from_ip(addr)?, Be16::from_host(port), proto::TCP))
}

/// Tells the programs.
fn set(layout: &Layout, alone: bool) -> io::Result<()> {
    let map: Map<u32, u32> = sys::open(&layout.map(MapName::Alone)).and_then(Map::new)?;
    let wanted = u32::from(alone);
    if map.get(&0)? == Some(wanted) { Ok(()) } else { map.put(&0, &wanted, sys::ANY) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Port;

    #[test]
    fn who_is_answered_by_somebody_else_is_translated() {
        let end = |last: u8, port| (IpAddr::from([10, 96, 0, last]), Port::new(port).unwrap());
        for (asked, answers, status, translated) in [
            (end(1, 80), end(1, 80), false, false),
            (end(1, 80), end(2, 80), true, true),
            (end(1, 80), end(1, 8080), true, true),
            // IPVS alters what answers, and says no more of it.
            (end(1, 80), end(2, 80), false, true),
        ] {
            assert_eq!(is_translated(&Entry::of(Protocol::Tcp, asked, answers, status)), translated);
        }
    }

    /// Nothing to look at: it says so once at most, and goes on until it is ended.
    #[test]
    fn it_ends_with_its_owner() {
        let empty = tempfile::tempdir().unwrap();
        let (looking, end) = mpsc::channel();
        let layout = Layout::of(empty.path());
        let thread = std::thread::spawn(move || run(&layout, &end));
        drop(looking);
        thread.join().unwrap();
    }
}
