//! What is in force, asked of the kernel and of nobody else.
//!
//! A stamp tells at next to no cost that something has changed; where packets can be sent to is read, whole, only then. Rules change in one
//! step, those of nftables and those of one of the old tables, so what is seen with a stamp was in force from its first moment.

use std::{
    collections::HashSet,
    io,
    mem::size_of,
    net::Ipv4Addr,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
};

use anyhow::{Context as _, Result, ensure};
use nix::libc;

use crate::{rules::vip, world::Netns};

/// Whose words the rules are in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    /// Elements of a map of nftables.
    Elements { table: &'static str, map: &'static str },
    /// Rules of a table of nftables.
    Rules { table: &'static str },
    /// kube-proxy's of nftables: a chain for each Service, found in this map, with a rule that has a map of its own.
    Chains { table: &'static str, map: &'static str },
    /// A table of the old kind.
    Legacy { table: &'static str },
}

/// Looks at one network namespace.
pub struct Observer {
    socket: OwnedFd,
    place: Place,
    /// The address of a Service's endpoint.
    endpoint: fn(u32, u32) -> Ipv4Addr,
}

const NFTABLES: u16 = 10 << 8;
const GET_RULE: u16 = NFTABLES | 7;
const GET_ELEMENTS: u16 = NFTABLES | 13;
const GET_GENERATION: u16 = NFTABLES | 16;
const GENERATION_ID: u16 = 1;
const REQUEST: u16 = 1;
const DUMP: u16 = 0x300;
const DONE: u16 = 3;
const ERROR: u16 = 2;

/// `IPT_SO_GET_INFO`, `IPT_SO_GET_ENTRIES`.
const INFO: i32 = 64;
const ENTRIES: i32 = 65;
/// `struct ipt_getinfo` up to what is wanted of it, and the head of `struct ipt_get_entries`.
const INFO_LENGTH: usize = 84;
const ENTRIES_HEAD: usize = 40;
const TABLE_NAME: usize = 32;

impl Observer {
    pub fn new(netns: &Netns, place: Place, endpoint: fn(u32, u32) -> Ipv4Addr) -> Result<Self> {
        let (family, kind, protocol) = match place {
            Place::Legacy { .. } => (libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_RAW),
            _ => (libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_NETFILTER),
        };
        let fd = netns.enter(|| {
            // SAFETY: no pointers.
            let fd = unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol) };
            ensure!(fd >= 0, "a socket to look at rules: {}", io::Error::last_os_error());
            Ok(fd)
        })?;
        // SAFETY: opened above, nobody else's.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self { socket, place, endpoint })
    }

    /// Another one after each change, anybody's.
    pub fn stamp(&self) -> Result<u64> {
        if let Place::Legacy { table } = self.place {
            let (entries, size) = self.info(table)?;
            return Ok(u64::from(entries) << 32 | u64::from(size));
        }
        let mut stamp = None;
        self.ask(GET_GENERATION, 0, libc::AF_UNSPEC, &[], |body| {
            let id = body.get(4..).and_then(|attributes| attributes.get(4..8));
            let kind = body.get(6..8).map(|kind| u16::from_ne_bytes([kind[0], kind[1]]));
            if kind == Some(GENERATION_ID) {
                stamp = id.map(|id| u64::from(u32::from_be_bytes([id[0], id[1], id[2], id[3]])));
            }
        })?;
        stamp.context("the kernel names no generation of rules")
    }

    /// Whether all of the first so many Services can be sent to, at each of so many endpoints.
    pub fn holds(&self, services: u32, endpoints: u32) -> Result<bool> {
        let mut wanted: HashSet<u32> = match self.place {
            Place::Chains { .. } => (0..services).map(|index| vip(index).into()).collect(),
            _ => {
                (0..services).flat_map(|index| (0..endpoints).map(move |n| (self.endpoint)(index, n).into())).collect()
            }
        };
        self.look(|address| {
            wanted.remove(&address);
        })?;
        let last = |n| self.has(services.saturating_sub(1), n);
        Ok(wanted.is_empty() && (0..endpoints).map(last).collect::<Result<Vec<_>>>()?.into_iter().all(|has| has))
    }

    /// Whether packets for a Service can be sent to its `n`-th endpoint.
    pub fn has(&self, index: u32, n: u32) -> Result<bool> {
        let wanted = u32::from((self.endpoint)(index, n));
        let mut has = false;
        let mut look = |address: u32| has |= address == wanted;
        if let Place::Chains { table, .. } = self.place {
            let mut map = None;
            let chain = format!("/s{index}/tcp/http\0");
            self.dump(GET_RULE, &attribute(1, table), |rule| {
                if position(rule, chain.as_bytes()).is_some() {
                    let name = position(rule, b"__map").and_then(|at| rule[at..].split(|byte| *byte == 0).next());
                    map = name.map(|name| String::from_utf8_lossy(name).into_owned());
                }
            })?;
            if let Some(map) = map {
                let of = [attribute(1, table), attribute(2, &map)].concat();
                self.dump(GET_ELEMENTS, &of, |bytes| addresses(bytes).for_each(&mut look))?;
            }
        } else {
            self.look(look)?;
        }
        Ok(has)
    }

    /// At whatever stands in the rules and may be an address.
    fn look(&self, mut each: impl FnMut(u32)) -> Result<()> {
        let note = |bytes: &[u8]| addresses(bytes).for_each(&mut each);
        match self.place {
            Place::Elements { table, map } | Place::Chains { table, map } => {
                self.dump(GET_ELEMENTS, &[attribute(1, table), attribute(2, map)].concat(), note)
            }
            Place::Rules { table } => self.dump(GET_RULE, &attribute(1, table), note),
            Place::Legacy { table } => {
                addresses(&self.entries(table)?).for_each(&mut each);
                Ok(())
            }
        }
    }

    /// Of what is not there, nothing.
    fn dump(&self, kind: u16, of: &[u8], each: impl FnMut(&[u8])) -> Result<()> {
        match self.ask(kind, DUMP, libc::AF_INET, of, each) {
            Err(error) if error.raw_os_error() != Some(libc::ENOENT) => Err(error).context("read the rules"),
            _ => Ok(()),
        }
    }

    fn info(&self, table: &str) -> Result<(u32, u32)> {
        let mut info = [0_u8; INFO_LENGTH];
        info[..table.len()].copy_from_slice(table.as_bytes());
        self.option(INFO, &mut info).with_context(|| format!("the size of table {table}"))?;
        let number = |at: usize| u32::from_ne_bytes([info[at], info[at + 1], info[at + 2], info[at + 3]]);
        Ok((number(INFO_LENGTH - 8), number(INFO_LENGTH - 4)))
    }

    fn entries(&self, table: &str) -> Result<Vec<u8>> {
        let mut refused = None;
        // It may be exchanged between the two questions.
        for _ in 0..10 {
            let (_, size) = self.info(table)?;
            let mut all = vec![0; ENTRIES_HEAD + size as usize];
            all[..table.len()].copy_from_slice(table.as_bytes());
            all[TABLE_NAME..TABLE_NAME + 4].copy_from_slice(&size.to_ne_bytes());
            match self.option(ENTRIES, &mut all) {
                Ok(()) => return Ok(all),
                Err(error) => refused = Some(error),
            }
        }
        Err(refused.context("nothing was asked")?).with_context(|| format!("the rules of table {table}"))
    }

    fn option(&self, name: i32, value: &mut [u8]) -> io::Result<()> {
        let mut length = u32::try_from(value.len()).map_err(io::Error::other)?;
        let (fd, at) = (self.socket.as_raw_fd(), value.as_mut_ptr().cast());
        // SAFETY: `value` has `length` bytes.
        let result = unsafe { libc::getsockopt(fd, libc::IPPROTO_IP, name, at, &raw mut length) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// `each` is called with each message of the answer, from the kernel's `struct nfgenmsg` on.
    fn ask(&self, kind: u16, flags: u16, family: i32, of: &[u8], mut each: impl FnMut(&[u8])) -> io::Result<()> {
        let mut message = ((16 + 4 + of.len()) as u32).to_ne_bytes().to_vec();
        message.extend(kind.to_ne_bytes());
        message.extend((REQUEST | flags).to_ne_bytes());
        message.extend([0; 8]);
        message.extend([family as u8, 0, 0, 0]);
        message.extend(of);
        let fd = self.socket.as_raw_fd();
        // SAFETY: `message` has as many bytes.
        if unsafe { libc::send(fd, message.as_ptr().cast(), message.len(), 0) } < 0 {
            return Err(io::Error::last_os_error());
        }
        let mut buffer = vec![0_u8; 256 * 1024];
        loop {
            // SAFETY: `buffer` has as many bytes.
            let length = unsafe { libc::recv(fd, buffer.as_mut_ptr().cast(), buffer.len(), 0) };
            let mut rest = match usize::try_from(length) {
                Ok(length) => &buffer[..length],
                Err(_) => return Err(io::Error::last_os_error()),
            };
            while let Some((head, _)) = rest.split_at_checked(16) {
                let length = u32::from_ne_bytes([head[0], head[1], head[2], head[3]]) as usize;
                let kind = u16::from_ne_bytes([head[4], head[5]]);
                let body = rest.get(16..length).ok_or(io::ErrorKind::InvalidData)?;
                match kind {
                    DONE => return Ok(()),
                    ERROR => {
                        let code = body.get(..size_of::<i32>()).ok_or(io::ErrorKind::InvalidData)?;
                        return Err(io::Error::from_raw_os_error(-i32::from_ne_bytes([
                            code[0], code[1], code[2], code[3],
                        ])));
                    }
                    _ => each(body),
                }
                if flags & DUMP == 0 {
                    return Ok(());
                }
                rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
            }
        }
    }
}

fn attribute(kind: u16, text: &str) -> Vec<u8> {
    let mut bytes = ((text.len() + 5) as u16).to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(text.as_bytes());
    bytes.resize((bytes.len() + 1).next_multiple_of(4), 0);
    bytes
}

/// All that could be one; none of ours looks like anything else.
fn addresses(bytes: &[u8]) -> impl Iterator<Item = u32> {
    bytes.windows(4).map(|four| u32::from_be_bytes([four[0], four[1], four[2], four[3]]))
}

fn position(bytes: &[u8], wanted: &[u8]) -> Option<usize> {
    bytes.windows(wanted.len()).position(|window| window == wanted)
}
