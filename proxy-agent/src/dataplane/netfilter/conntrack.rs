//! Netfilter over netlink: connection tracking (what leads where, and the end of an entry), and what there is of a table of nftables.

use std::{
    collections::{BTreeMap, BTreeSet},
    hash::Hasher,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::OwnedFd,
    path::Path,
};

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink};

use super::names::Fnv;
use crate::{
    dataplane::netlink::{
        NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, attribute, attributes, error, message, split,
    },
    model::{Family, Port, Protocol},
};

pub(super) const NFTABLES: u16 = 10 << 8;
pub(super) const NEW_TABLE: u16 = NFTABLES;
const GET_TABLE: u16 = NFTABLES | 1;
const DELETE_TABLE: u16 = NFTABLES | 2;
pub(super) const TABLE_NAME: u16 = 1;
/// Around what is done as a whole or not at all; the resource of the first says of what.
const BATCH_BEGIN: u16 = 16;
const BATCH_END: u16 = 17;
const RESOURCE: [u8; 2] = (NFTABLES >> 8).to_be_bytes();
const NEW_GENERATION: u16 = NFTABLES | 15;
const GET_GENERATION: u16 = NFTABLES | 16;
const GENERATION_ID: u16 = 1;
const GET_CHAIN: u16 = NFTABLES | 4;
const GET_RULE: u16 = NFTABLES | 7;
const GET_SET: u16 = NFTABLES | 10;
const GET_ELEMENTS: u16 = NFTABLES | 13;
/// Of chains, rules and sets alike.
pub(super) const TABLE: u16 = 1;
pub(super) const CHAIN_NAME: u16 = 3;
/// Where a chain is hooked, what becomes of what it leaves alone, and its type.
pub(super) const CHAIN_HOOK: [u16; 3] = [4, 5, 7];
pub(super) const RULE_CHAIN: u16 = 2;
pub(super) const RULE_EXPRESSIONS: u16 = 4;
const SET_NAME: u16 = 2;
/// Of `GET_ELEMENTS`: the name of the set, and its elements.
const ELEMENTS_SET: u16 = 2;
const ELEMENTS: u16 = 3;
/// Of an element.
const KEY: u16 = 1;
const VALUE: u16 = 1;

const CONNTRACK: u16 = 1 << 8;
const GET_ENTRY: u16 = CONNTRACK | 1;
const DELETE_ENTRY: u16 = CONNTRACK | 2;

/// `enum ctattr_type`.
const ORIGINAL: u16 = 1;
const REPLY: u16 = 2;
const STATUS: u16 = 3;
const PROTOCOL_INFO: u16 = 4;
const ID: u16 = 12;
const ZONE: u16 = 18;
pub(super) const NESTED: u16 = 0x8000;

/// `CTA_PROTOINFO_TCP`, `CTA_PROTOINFO_TCP_STATE`, and the first of the states of a connection that is over (`TIME_WAIT`, `CLOSE`).
const OF_TCP: u16 = 1;
const TCP_STATE: u16 = 1;
const TIME_WAIT: u8 = 7;

/// `IPS_DST_NAT`.
const DST_NAT: u32 = 1 << 5;

/// Only there where the kernel tracks connections.
const TRACKED: &str = "/proc/sys/net/netfilter/nf_conntrack_count";

/// Asked of this and not by listing, which would load the module.
pub(crate) fn is_tracking() -> bool {
    Path::new(TRACKED).exists()
}

/// One end of a tuple.
pub(crate) type End = (IpAddr, Port);

/// What is tracked, as far as it matters here.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Entry {
    pub(crate) protocol: Protocol,
    /// Who opened it, whom they meant, and who answers.
    pub(crate) opener: End,
    pub(crate) asked: End,
    pub(crate) answers: End,
    /// Its destination is translated.
    pub(crate) translated: bool,
    /// It is in a zone: not of the rules that we write.
    pub(crate) zoned: bool,
    /// Both sides of a TCP connection have closed it, or one has reset it.
    pub(crate) over: bool,
    family: Family,
    original: Vec<u8>,
    id: Vec<u8>,
}

impl Entry {
    /// By rules, or by IPVS, which does not mark it.
    pub(crate) fn is_translated(&self) -> bool {
        self.translated || self.asked != self.answers
    }
}

#[cfg(test)]
impl Entry {
    pub(crate) fn of(protocol: Protocol, asked: End, answers: End, translated: bool) -> Self {
        Self {
            protocol,
            opener: asked,
            asked,
            answers,
            translated,
            zoned: false,
            over: false,
            family: Family::of(asked.0),
            original: vec![],
            id: vec![],
        }
    }
}

/// A chain of nftables.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Chain {
    pub(crate) rules: usize,
    /// Of what its rules say, and of where it is hooked: another one, if somebody altered it.
    pub(crate) print: u64,
}

impl Chain {
    fn note(&mut self, bytes: &[u8]) {
        let mut fnv = Fnv::default();
        fnv.write_u64(self.print);
        fnv.write(bytes);
        self.print = fnv.finish();
    }

    fn rule(&mut self, bytes: &[u8]) {
        self.rules += 1;
        // Not its handle, which is another one each time.
        attributes(bytes).filter(|(kind, _)| *kind == RULE_EXPRESSIONS).for_each(|(_, what)| self.note(what));
    }
}

/// What is in a table, without sets' elements: cheap, whatever the size of sets. `nft -t` reads them all the same.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Structure {
    pub(crate) chains: BTreeMap<String, Chain>,
    /// Sets and maps.
    pub(crate) sets: BTreeSet<String>,
}

/// One change of a transaction of nftables.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Step {
    pub(crate) kind: u16,
    pub(crate) flags: u16,
    pub(crate) attributes: Vec<u8>,
}

pub(crate) fn remove_table(table: &str) -> Step {
    Step { kind: DELETE_TABLE, flags: 0, attributes: string(TABLE_NAME, table) }
}

/// An attribute that is a name.
pub(crate) fn string(kind: u16, text: &str) -> Vec<u8> {
    attribute(kind, &[text.as_bytes(), &[0]].concat())
}

/// Whether it is for want of nftables, or of leave to ask, that a question after tables fails.
pub(crate) fn is_refusal(error: &io::Error) -> bool {
    [Some(libc::EINVAL), Some(libc::EOPNOTSUPP), Some(libc::EPROTONOSUPPORT), Some(libc::EPERM)]
        .contains(&error.raw_os_error())
}

/// Netfilter's netlink, of the network namespace that it was opened in.
#[derive(Debug)]
pub(crate) struct Socket(OwnedFd);

impl Socket {
    pub(crate) fn open() -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC;
        Ok(Self(rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, Some(netlink::NETFILTER))?))
    }

    /// How often the rules of nftables, anybody's, have changed.
    pub(crate) fn generation(&self) -> io::Result<u32> {
        self.send(GET_GENERATION, 0, libc::AF_UNSPEC as u8, &[])?;
        let mut generation = None;
        self.receive(|kind, attributes_of| {
            if kind == NEW_GENERATION {
                let id = attributes(attributes_of).find(|(kind, _)| *kind == GENERATION_ID);
                generation = id.and_then(|(_, id)| Some(u32::from_be_bytes(*id.first_chunk()?)));
            }
            generation.is_some()
        })?;
        generation.ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    /// Names of this family's tables of nftables, anybody's.
    pub(crate) fn tables(&self, family: Family) -> io::Result<Vec<String>> {
        self.send(GET_TABLE, NLM_F_DUMP, number(family), &[])?;
        let mut names = Vec::new();
        self.receive(|kind, attributes_of| {
            let name = attributes(attributes_of).find(|(of, _)| kind == NEW_TABLE && *of == TABLE_NAME);
            if let Some((_, name)) = name {
                names.push(
                    String::from_utf8_lossy(name.split(|byte| *byte == 0).next().unwrap_or_default()).into_owned(),
                );
            }
            false
        })?;
        Ok(names)
    }

    /// Which families have a table of nftables of this name, anybody's. A kernel that is not ours to ask, or has no nftables, has none.
    pub(crate) fn families_with(table: &str) -> io::Result<Vec<Family>> {
        let mut found = Vec::new();
        for family in Family::BOTH {
            match Self::open().and_then(|socket| socket.tables(family)) {
                Ok(names) => found.extend(names.iter().any(|name| name == table).then_some(family)),
                Err(error) if is_refusal(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(found)
    }

    /// A table of nftables, with all that is in it.
    pub(crate) fn remove_table(&self, family: Family, table: &str) -> io::Result<()> {
        self.transact(family, &[remove_table(table)])
    }

    /// Changes rules of nftables, by all of these steps or by none.
    pub(crate) fn transact(&self, family: Family, steps: &[Step]) -> io::Result<()> {
        let around = |kind| message(kind, NLM_F_REQUEST, &[&[libc::AF_UNSPEC as u8, 0], &RESOURCE[..]].concat());
        let mut batch = around(BATCH_BEGIN);
        for (nth, Step { kind, flags, attributes }) in steps.iter().enumerate() {
            // The kernel answers once it has carried out all of them, with what it refuses first: one answer tells.
            let answered = if nth + 1 == steps.len() { NLM_F_ACK } else { 0 };
            let body = [&[number(family), 0, 0, 0], &attributes[..]].concat();
            batch.extend(message(*kind, NLM_F_REQUEST | flags | answered, &body));
            batch.resize(batch.len().next_multiple_of(4), 0);
        }
        batch.extend(around(BATCH_END));
        rustix::net::send(&self.0, &batch, SendFlags::empty())?;
        self.receive(|_, _| false)
    }

    /// Of nftables' table of this name; empty where there is none.
    pub(crate) fn structure(&self, family: Family, table: &str) -> io::Result<Structure> {
        let mut structure = Structure::default();
        let name = [table.as_bytes(), &[0]].concat();
        let of = |kind| self.send(kind, NLM_F_DUMP, number(family), &attribute(TABLE, &name));
        of(GET_CHAIN)?;
        self.receive(|_, bytes| {
            if let Some(chain) = of_table(bytes, table, CHAIN_NAME) {
                let chain = structure.chains.entry(chain).or_default();
                attributes(bytes).filter(|(kind, _)| CHAIN_HOOK.contains(kind)).for_each(|(_, what)| chain.note(what));
            }
            false
        })?;
        if structure.chains.is_empty() {
            // The kernel refuses to list sets of a table that is not there.
            return Ok(structure);
        }
        of(GET_RULE)?;
        self.receive(|_, bytes| {
            if let Some(chain) = of_table(bytes, table, RULE_CHAIN) {
                structure.chains.entry(chain).or_default().rule(bytes);
            }
            false
        })?;
        of(GET_SET)?;
        self.receive(|_, bytes| {
            structure.sets.extend(of_table(bytes, table, SET_NAME));
            false
        })?;
        Ok(structure)
    }

    /// One chain of such a table, which is not hooked anywhere.
    pub(crate) fn chain(&self, family: Family, table: &str, chain: &str) -> io::Result<Chain> {
        let name = |kind, name: &str| attribute(kind, &[name.as_bytes(), &[0]].concat());
        let of = [name(TABLE, table), name(RULE_CHAIN, chain)].concat();
        self.send(GET_RULE, NLM_F_DUMP, number(family), &of)?;
        let mut found = Chain::default();
        self.receive(|_, bytes| {
            if of_table(bytes, table, RULE_CHAIN).as_deref() == Some(chain) {
                found.rule(bytes);
            }
            false
        })?;
        Ok(found)
    }

    /// Calls `each` with the key of every element of a set or map of nftables; of none where there is no such set.
    pub(crate) fn keys(&self, family: Family, table: &str, set: &str, mut each: impl FnMut(&[u8])) -> io::Result<()> {
        let name = |kind, name: &str| attribute(kind, &[name.as_bytes(), &[0]].concat());
        let of = [name(TABLE, table), name(ELEMENTS_SET, set)].concat();
        self.send(GET_ELEMENTS, NLM_F_DUMP, number(family), &of)?;
        let result = self.receive(|_, bytes| {
            let elements =
                attributes(bytes).filter(|(kind, _)| *kind == ELEMENTS).flat_map(|(_, list)| attributes(list));
            for (_, element) in elements {
                let key = attributes(element).find(|(kind, _)| *kind == KEY).map(|(_, key)| key);
                if let Some((_, key)) = key.and_then(|key| attributes(key).find(|(kind, _)| *kind == VALUE)) {
                    each(key);
                }
            }
            false
        });
        result.or_else(|error| if error.raw_os_error() == Some(libc::ENOENT) { Ok(()) } else { Err(error) })
    }

    /// Calls `each` with every entry of this family and protocol. What comes or goes meanwhile may be missed.
    pub(crate) fn entries(&self, family: Family, protocol: Protocol, mut each: impl FnMut(Entry)) -> io::Result<()> {
        self.all_entries(family, |entry| {
            if entry.protocol == protocol {
                each(entry);
            }
        })
    }

    /// The same, of every protocol that has ports.
    pub(crate) fn all_entries(&self, family: Family, mut each: impl FnMut(Entry)) -> io::Result<()> {
        self.send(GET_ENTRY, NLM_F_DUMP, number(family), &[])?;
        self.receive(|_, attributes| {
            if let Some(entry) = parse(attributes, family) {
                each(entry);
            }
            false
        })
    }

    /// Whether there was still such an entry.
    pub(crate) fn delete(&self, entry: &Entry) -> io::Result<bool> {
        let mut body = attribute(ORIGINAL | NESTED, &entry.original);
        if !entry.id.is_empty() {
            // Another flow of the same tuple is not meant.
            body.extend(attribute(ID, &entry.id));
        }
        self.send(DELETE_ENTRY, NLM_F_ACK, number(entry.family), &body)?;
        match self.receive(|_, _| false) {
            Ok(()) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(error) => Err(error),
        }
    }

    pub(super) fn send(&self, kind: u16, flags: u16, family: u8, attributes: &[u8]) -> io::Result<()> {
        // `struct nfgenmsg`: family, version, resource.
        let body = [&[family, 0, 0, 0], attributes].concat();
        rustix::net::send(&self.0, &message(kind, NLM_F_REQUEST | flags, &body), SendFlags::empty())?;
        Ok(())
    }

    /// Until the end of the answer, or until `each` has what it wants.
    pub(super) fn receive(&self, mut each: impl FnMut(u16, &[u8]) -> bool) -> io::Result<()> {
        let mut buffer = vec![0_u8; 64 * 1024];
        loop {
            let (_, length) = rustix::net::recv(&self.0, buffer.as_mut_slice(), RecvFlags::empty())?;
            let mut rest = buffer.get(..length).unwrap_or_default();
            while let Some((kind, message, next)) = split(rest) {
                match kind {
                    NLMSG_DONE | NLMSG_ERROR => return error(message).map_or(Ok(()), Err),
                    _ => {
                        if each(kind, message.get(4..).unwrap_or_default()) {
                            return Ok(());
                        }
                    }
                }
                rest = next;
            }
        }
    }
}

/// A name in a message about something of this table.
fn of_table(bytes: &[u8], table: &str, name: u16) -> Option<String> {
    let find = |wanted: u16| attributes(bytes).find(|(kind, _)| *kind == wanted).map(|(_, value)| text(value));
    find(TABLE).filter(|of| of == table).and_then(|_| find(name))
}

/// Names end with a zero byte.
pub(super) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes.strip_suffix(&[0]).unwrap_or(bytes)).into_owned()
}

const fn number(family: Family) -> u8 {
    match family {
        Family::V4 => libc::AF_INET as u8,
        Family::V6 => libc::AF_INET6 as u8,
    }
}

fn parse(bytes: &[u8], family: Family) -> Option<Entry> {
    let find = |wanted: u16| attributes(bytes).find(|(kind, _)| *kind == wanted).map(|(_, value)| value);
    let original = find(ORIGINAL)?;
    let (protocol, opener, asked) = tuple(original)?;
    let (_, answers, _) = tuple(find(REPLY)?)?;
    let status = u32::from_be_bytes(*find(STATUS)?.first_chunk()?);
    Some(Entry {
        protocol,
        opener,
        asked,
        answers,
        translated: status & DST_NAT != 0,
        zoned: find(ZONE).is_some(),
        over: find(PROTOCOL_INFO).and_then(tcp_state).is_some_and(|state| state >= TIME_WAIT),
        family,
        original: original.to_vec(),
        id: find(ID).unwrap_or_default().to_vec(),
    })
}

fn tcp_state(info: &[u8]) -> Option<u8> {
    let (_, tcp) = attributes(info).find(|(kind, _)| *kind == OF_TCP)?;
    let (_, state) = attributes(tcp).find(|(kind, _)| *kind == TCP_STATE)?;
    state.first().copied()
}

/// Protocol, source and destination.
fn tuple(bytes: &[u8]) -> Option<(Protocol, End, End)> {
    let nested = |wanted: u16| attributes(bytes).find(|(kind, _)| *kind == wanted).map(|(_, value)| value);
    let (ip, proto) = (nested(1)?, nested(2)?);
    let address = |v4: u16| {
        attributes(ip).find_map(|(kind, value)| match (kind, value.len()) {
            (kind, 4) if kind == v4 => Some(IpAddr::V4(Ipv4Addr::from(*value.first_chunk::<4>()?))),
            (kind, 16) if kind == v4 + 2 => Some(IpAddr::V6(Ipv6Addr::from(*value.first_chunk::<16>()?))),
            _ => None,
        })
    };
    let part = |wanted: u16| attributes(proto).find(|(kind, _)| *kind == wanted).map(|(_, value)| value);
    let protocol = Protocol::from_number(*part(1)?.first()?)?;
    let port = |kind| Port::new(u16::from_be_bytes(*part(kind)?.first_chunk()?));
    Some((protocol, (address(1)?, port(2)?), (address(2)?, port(3)?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tuple_of(src: [u8; 4], dst: [u8; 4], sport: u16, dport: u16) -> Vec<u8> {
        let ip = [attribute(1, &src), attribute(2, &dst)].concat();
        let proto =
            [attribute(1, &[17]), attribute(2, &sport.to_be_bytes()), attribute(3, &dport.to_be_bytes())].concat();
        [attribute(1 | NESTED, &ip), attribute(2 | NESTED, &proto)].concat()
    }

    #[test]
    fn an_entry_says_whom_its_opener_meant_and_who_answers() {
        let original = tuple_of([10, 1, 0, 2], [10, 96, 0, 10], 4070, 53);
        let reply = tuple_of([10, 1, 0, 9], [10, 1, 0, 2], 5353, 4070);
        let bytes = [
            attribute(ORIGINAL | NESTED, &original),
            attribute(REPLY | NESTED, &reply),
            attribute(STATUS, &0x2a_u32.to_be_bytes()),
            attribute(ID, &[1, 2, 3, 4]),
        ]
        .concat();
        let entry = parse(&bytes, Family::V4).unwrap();
        assert_eq!(entry.opener, ([10, 1, 0, 2].into(), Port::new(4070).unwrap()));
        assert_eq!(entry.asked, ([10, 96, 0, 10].into(), Port::new(53).unwrap()));
        assert_eq!(entry.answers, ([10, 1, 0, 9].into(), Port::new(5353).unwrap()));
        assert!(entry.translated && !entry.zoned && entry.protocol == Protocol::Udp);
        assert_eq!((entry.original, entry.id), (original, vec![1, 2, 3, 4]));
        assert!(!entry.over);
        for (state, over) in [(3, false), (5, false), (7, true), (8, true)] {
            let tcp = attribute(OF_TCP | NESTED, &attribute(TCP_STATE, &[state]));
            let bytes = [bytes.clone(), attribute(PROTOCOL_INFO | NESTED, &tcp)].concat();
            assert_eq!(parse(&bytes, Family::V4).unwrap().over, over, "{state}");
        }
        let zoned = [bytes.clone(), attribute(ZONE, &[0, 7])].concat();
        assert!(parse(&zoned, Family::V4).unwrap().zoned);
        for cut in 0..bytes.len() {
            let _whatever = parse(&bytes[..cut], Family::V4);
        }
    }

    #[test]
    fn the_kernel_answers() {
        match Socket::open().and_then(|socket| socket.generation()) {
            Ok(generation) => assert!(generation > 0),
            Err(error) => println!("SKIP the_kernel_answers: nftables: {error}"),
        }
    }
}
