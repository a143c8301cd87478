//! Sets of ipset, over netlink: which there are, the ports in one, and its end. There need be no tool of that name.

use std::{collections::BTreeSet, io, path::Path};

use super::conntrack::{Socket, text};
use crate::{
    dataplane::netlink::{NLM_F_ACK, NLM_F_DUMP, attribute, attributes},
    model::Protocol,
};

const SETS: u16 = 6 << 8;
const DESTROY: u16 = SETS | 3;
const LIST: u16 = SETS | 7;

/// `IPSET_ATTR_*`
const VERSION: u16 = 1;
const NAME: u16 = 2;
const FLAGS: u16 = 6;
const MEMBERS: u16 = 8;
/// Of a member.
const PORT: u16 = 4;
const PROTOCOL: u16 = 7;
const NET_BYTE_ORDER: u16 = 0x4000;
/// The oldest that every kernel takes.
const PROTOCOL_VERSION: u8 = 6;
/// `IPSET_FLAG_LIST_SETNAME`
const NAMES_ALONE: u32 = 2;

/// `IPSET_ERR_BUSY`
const BUSY: i32 = 4100;

/// What stands here is loaded, or built in.
const MODULES: &str = "/sys/module";

/// All sets, of every family, of the network namespace that it was opened in.
#[derive(Debug)]
pub(crate) struct Sets(Socket);

impl Sets {
    /// `None`: the kernel has no sets. It is not made to load what holds them.
    pub(crate) fn open() -> io::Result<Option<Self>> {
        let modules = Path::new(MODULES);
        if modules.exists() && !modules.join("ip_set").exists() {
            return Ok(None);
        }
        match Socket::open() {
            Ok(socket) => Ok(Some(Self(socket))),
            Err(error) if error.raw_os_error() == Some(libc::EPROTONOSUPPORT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub(crate) fn names(&self) -> io::Result<BTreeSet<String>> {
        let mut names = BTreeSet::new();
        self.0.send(LIST, NLM_F_DUMP, libc::AF_UNSPEC as u8, &names_alone())?;
        let result = self.0.receive(|_, answer| {
            names.extend(attributes(answer).find(|(kind, _)| *kind == NAME).map(|(_, name)| text(name)));
            false
        });
        match result {
            // Nobody answers for sets.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(BTreeSet::new()),
            result => result.map(|()| names),
        }
    }

    /// Which ports are in it, and of which protocol where it says so; none where there is no such set.
    pub(crate) fn ports(&self, name: &str) -> io::Result<BTreeSet<(u16, Option<Protocol>)>> {
        let mut ports = BTreeSet::new();
        self.0.send(LIST, NLM_F_DUMP, libc::AF_UNSPEC as u8, &named(name))?;
        let result = self.0.receive(|_, answer| {
            ports.extend(members(answer));
            false
        });
        match result {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(BTreeSet::new()),
            result => result.map(|()| ports),
        }
    }

    /// One that is not there is no error; one that a rule asks for is (`ResourceBusy`).
    pub(crate) fn destroy(&self, name: &str) -> io::Result<()> {
        self.0.send(DESTROY, NLM_F_ACK, libc::AF_UNSPEC as u8, &named(name))?;
        self.0.receive(|_, _| false).or_else(|error| match error.raw_os_error() {
            Some(libc::ENOENT) => Ok(()),
            Some(BUSY) => Err(io::Error::new(io::ErrorKind::ResourceBusy, "a rule asks for it")),
            _ => Err(error),
        })
    }
}

/// Of a request about one set. Without a name it would be about all of them.
fn named(name: &str) -> Vec<u8> {
    [attribute(VERSION, &[PROTOCOL_VERSION]), attribute(NAME, &[name.as_bytes(), &[0]].concat())].concat()
}

fn names_alone() -> Vec<u8> {
    let flags = attribute(FLAGS | NET_BYTE_ORDER, &NAMES_ALONE.to_be_bytes());
    [attribute(VERSION, &[PROTOCOL_VERSION]), flags].concat()
}

/// Out of one of the answers that list a set: it takes several to list a large one.
fn members(answer: &[u8]) -> impl Iterator<Item = (u16, Option<Protocol>)> {
    let lists = attributes(answer).filter(|(kind, _)| *kind == MEMBERS);
    lists.flat_map(|(_, list)| attributes(list)).filter_map(|(_, member)| {
        let value = |wanted| attributes(member).find(|(kind, _)| *kind == wanted).map(|(_, value)| value);
        let port = u16::from_be_bytes(*value(PORT)?.first_chunk()?);
        let protocol = value(PROTOCOL).and_then(|protocol| Protocol::from_number(*protocol.first()?));
        Some((port, protocol))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(bytes: &[u8]) -> String {
        let word = |word: &[u8]| word.iter().map(|byte| format!("{byte:02x}")).collect();
        bytes.chunks(4).map(word).collect::<Vec<String>>().join(" ")
    }

    #[test]
    fn requests_are_laid_out_as_the_kernel_reads_them() {
        assert_eq!(hex(&named("KUBE-IPVS-IPS")), "05000100 06000000 12000200 4b554245 2d495056 532d4950 53000000");
        assert_eq!(hex(&names_alone()), "05000100 06000000 08000640 00000002");
    }

    /// As 6.1 lists `bitmap:port` and `hash:ip,port`.
    #[test]
    fn ports_are_read() {
        const NESTED: u16 = 0x8000;
        let port = |port: u16| attribute(PORT | NET_BYTE_ORDER, &port.to_be_bytes());
        let member = |parts: &[Vec<u8>]| attribute(7 | NESTED, &parts.concat());
        let addr = attribute(1 | NESTED, &attribute(1 | NET_BYTE_ORDER, &[10, 0, 0, 1]));
        let list = [
            member(&[port(30_080)]),
            member(&[addr.clone(), port(30_081), attribute(PROTOCOL, &[132])]),
            member(&[addr]),
        ];
        let answer = [named("KUBE-NODE-PORT-TCP"), attribute(MEMBERS | NESTED, &list.concat())].concat();
        assert_eq!(members(&answer).collect::<Vec<_>>(), [(30_080, None), (30_081, Some(Protocol::Sctp))]);
        for cut in 0..answer.len() {
            let _ = members(&answer[..cut]).count();
        }
        assert_eq!(members(&named("KUBE-NODE-PORT-TCP")).count(), 0);
    }
}
