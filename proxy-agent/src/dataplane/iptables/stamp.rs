//! Whether anybody changed a rule since it was last looked: asked of the kernel, without iptables.
//!
//! nftables counts changes. The old tables count nothing, but give all of their rules at once, which is what each iptables that is started asks
//! for, too; a hash of that is kept.

use std::{
    fmt,
    hash::Hasher as _,
    io,
    os::fd::{AsRawFd as _, OwnedFd},
};

use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto};

use super::{flavour::Flavour, render::Table};
use crate::{
    dataplane::netfilter::{conntrack::Socket, names::Fnv},
    model::Family,
};

/// What is other after each change of rules.
pub(super) trait Stamps: fmt::Debug + Send {
    /// `None`: it cannot be told, so it has to be looked.
    fn stamp(&self, family: Family) -> Option<u64>;
}

pub(super) fn of(flavour: Flavour) -> Box<dyn Stamps> {
    match flavour {
        Flavour::Nft => Box::new(Counted(Socket::open().ok())),
        Flavour::Legacy => Box::new(Hashed),
    }
}

#[derive(Debug)]
struct Counted(Option<Socket>);

impl Stamps for Counted {
    fn stamp(&self, _: Family) -> Option<u64> {
        self.0.as_ref()?.generation().ok().map(u64::from)
    }
}

#[derive(Debug)]
struct Hashed;

impl Stamps for Hashed {
    fn stamp(&self, family: Family) -> Option<u64> {
        let asked = Asked::open(family).ok()?;
        let mut fnv = Fnv::default();
        for table in Table::ALL {
            hash(&asked.rules(table.name()).ok()?, asked.entry, &mut fnv)?;
        }
        Some(fnv.finish())
    }
}

/// How an entry of a family is laid out: `struct ipt_entry`, `struct ip6t_entry`.
#[derive(Clone, Copy, Debug)]
struct Entry {
    /// Where it says how long it is, with all that belongs to it.
    length: usize,
    /// Packets and bytes, which nobody changes a rule for.
    counters: usize,
}

const V4: Entry = Entry { length: 90, counters: 96 };
const V6: Entry = Entry { length: 142, counters: 152 };
const COUNTERS: usize = 16;

/// `IPT_SO_GET_INFO` and `IPT_SO_GET_ENTRIES`, and the same of IPv6.
const INFO: i32 = 64;
const ENTRIES: i32 = 65;
/// `struct ipt_getinfo`, whose last number is the size of all entries; the head of `struct ipt_get_entries`: name, size.
const INFO_LENGTH: usize = 84;
const HEAD: usize = 40;
const NAME: usize = 32;

struct Asked {
    socket: OwnedFd,
    level: i32,
    entry: Entry,
}

impl Asked {
    fn open(family: Family) -> io::Result<Self> {
        let (domain, level, entry) = match family {
            Family::V4 => (AddressFamily::INET, libc::IPPROTO_IP, V4),
            Family::V6 => (AddressFamily::INET6, libc::IPPROTO_IPV6, V6),
        };
        let socket = rustix::net::socket_with(domain, SocketType::RAW, SocketFlags::CLOEXEC, Some(ipproto::RAW))?;
        Ok(Self { socket, level, entry })
    }

    /// All entries of a table. It may be exchanged between the two questions: then the kernel refuses the second.
    fn rules(&self, table: &str) -> io::Result<Vec<u8>> {
        let size = self.option(INFO, table, &[], INFO_LENGTH)?;
        let size = size.last_chunk().copied().map(u32::from_ne_bytes).ok_or(io::ErrorKind::InvalidData)?;
        let all = self.option(ENTRIES, table, &size.to_ne_bytes(), HEAD.saturating_add(size as usize))?;
        Ok(all.get(HEAD..).unwrap_or_default().to_vec())
    }

    /// Asks by the name of the table, and what stands behind it.
    fn option(&self, name: i32, table: &str, further: &[u8], length: usize) -> io::Result<Vec<u8>> {
        let mut value = table.as_bytes().to_vec();
        value.resize(NAME, 0);
        value.extend(further);
        value.resize(length, 0);
        let mut length = u32::try_from(length).map_err(io::Error::other)?;
        let (fd, at) = (self.socket.as_raw_fd(), value.as_mut_ptr().cast());
        // SAFETY: `value` has `length` bytes, and both live through the call.
        let result = unsafe { libc::getsockopt(fd, self.level, name, at, &raw mut length) };
        if result == 0 { Ok(value) } else { Err(io::Error::last_os_error()) }
    }
}

/// All of each entry but its counters. `None`: these are no entries.
fn hash(mut entries: &[u8], layout: Entry, into: &mut Fnv) -> Option<()> {
    into.write_usize(entries.len());
    while !entries.is_empty() {
        let Entry { length, counters } = layout;
        let length = u16::from_ne_bytes(*entries.get(length..)?.first_chunk()?);
        let (entry, rest) = entries.split_at_checked(length.into())?;
        let (head, tail) = entry.split_at_checked(counters)?;
        into.write(head);
        into.write(tail.get(COUNTERS..)?);
        entries = rest;
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(layout: Entry, length: usize) -> Vec<u8> {
        let mut entry: Vec<u8> = (0..length).map(|at| at as u8).collect();
        entry[layout.length..layout.length + 2].copy_from_slice(&(length as u16).to_ne_bytes());
        entry
    }

    fn of(entries: &[u8], layout: Entry) -> Option<u64> {
        let mut fnv = Fnv::default();
        hash(entries, layout, &mut fnv).map(|()| fnv.finish())
    }

    #[test]
    fn counters_alone_make_no_difference() {
        for layout in [V4, V6] {
            let two = [entry(layout, 176), entry(layout, 200)].concat();
            let known = of(&two, layout);
            assert!(known.is_some());
            for at in 0..two.len() {
                let mut other = two.clone();
                other[at] ^= 1;
                let within = if at < 176 { at } else { at - 176 };
                let counts = (layout.counters..layout.counters + COUNTERS).contains(&within);
                assert_eq!(of(&other, layout) == known, counts, "byte {at}");
            }
            for cut in 1..two.len() {
                assert_ne!(of(&two[..cut], layout), known);
            }
            assert_ne!(of(&two[176..], layout), known);
        }
        assert_eq!(of(&[0; 300], V4), None, "an entry of no length");
    }
}
