//! The device that holds the addresses of Services: what is for them is for the node, and so comes to IPVS.
//!
//! A dummy, which sends nothing anywhere. What is to be put back once it goes is written on it (its alias), so it is known to whoever
//! removes it, and gone with it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::IpNet;

use super::talk::Talk;
use crate::{
    dataplane::netlink::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, attribute, attributes},
    model::Family,
};

/// `node` knows it by this name, too.
pub(super) const NAME: &str = "proxy-ipvs0";
/// Of proxies that work alike: the addresses that theirs hold are Services', too.
const ALIKE: [&str; 3] = [NAME, KUBE_PROXYS, "kube-dummy-if"];
/// kube-proxy's.
pub(super) const KUBE_PROXYS: &str = "kube-ipvs0";
/// One that is made to see whether it can be.
pub(super) const TRIAL: &str = "proxy-ipvs-try";

const NEW_LINK: u16 = 16;
const DELETE_LINK: u16 = 17;
const GET_LINK: u16 = 18;
const SET_LINK: u16 = 19;
const NEW_ADDRESS: u16 = 20;
const DELETE_ADDRESS: u16 = 21;
const GET_ADDRESS: u16 = 22;
const NEW_ROUTE: u16 = 24;
const DELETE_ROUTE: u16 = 25;
const GET_ROUTE: u16 = 26;
const GET_NEIGHBOUR: u16 = 30;
/// `NLM_F_CREATE | NLM_F_EXCL`
const CREATE: u16 = 0x600;

/// `IFLA_*`
const LINK_NAME: u16 = 3;
const LINK_INFO: u16 = 18;
const LINK_ALIAS: u16 = 20;
const LINK_FAMILIES: u16 = 26;
const INFO_KIND: u16 = 1;
const KIND: &str = "dummy";
const INET6_ADDR_GEN_MODE: u16 = 8;
const NO_ADDRESS_OF_ITS_OWN: u8 = 1;
const NESTED: u16 = 0x8000;

/// `NDA_DST`, `NDA_LLADDR`
const DESTINATION: u16 = 1;
const LINK_ADDRESS: u16 = 2;
/// `NUD_REACHABLE`, `_STALE`, `_DELAY`, `_PROBE`, `_PERMANENT`: somebody has answered for it, and not failed to since.
const ANSWERED: u16 = 0x02 | 0x04 | 0x08 | 0x10 | 0x80;

/// `IFA_*`
const ADDRESS: u16 = 1;
const LOCAL: u16 = 2;
const CACHE_INFO: u16 = 6;
const FLAGS: u16 = 8;
/// `IFA_F_NODAD`: usable at once.
const NO_DETECTION: u32 = 2;
/// `RTA_*`
const ROUTE_TO: u16 = 1;
const ROUTE_DEVICE: u16 = 4;
const ROUTE_SOURCE: u16 = 7;
/// `RT_TABLE_LOCAL`, `RTN_LOCAL`, and `RTPROT_STATIC`, which tells ours from those that the kernel makes with an address.
const LOCAL_TABLE: u8 = 255;
const TO_THIS_NODE: u8 = 2;
const MADE_BY_HAND: u8 = 4;
/// `NLM_F_CREATE`: beside others to the same address, before them.
const BESIDE: u16 = 0x400;
/// Nobody's (RFC 5737, RFC 3849): the way there is the way to what the node knows nothing of, as it does of Services' addresses.
const ELSEWHERE: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(198, 51, 100, 1)), IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1))];
const SCOPE_HOST: u8 = 254;
const SCOPE_UNIVERSE: u8 = 0;

/// Addresses and devices of the network namespace that it was opened in.
#[derive(Debug)]
pub(super) struct Route(Talk);

/// What there is of our device.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Device {
    pub(super) index: u32,
    pub(super) alias: String,
    pub(super) up: bool,
    /// As ours is; another one of this name is somebody else's.
    pub(super) is_dummy: bool,
}

impl Route {
    pub(super) fn open() -> io::Result<Self> {
        // Of netlink's families this is the first.
        Ok(Self(Talk::open(None)?))
    }

    pub(super) fn device(&self) -> io::Result<Option<Device>> {
        self.named(NAME)
    }

    /// Whatever it is.
    pub(super) fn named(&self, name: &str) -> io::Result<Option<Device>> {
        let body = [link(0, 0, 0), attribute(LINK_NAME, &terminated(name))].concat();
        let answers = match self.ask(GET_LINK, NLM_F_ACK, &body) {
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return Ok(None),
            answers => answers?,
        };
        Ok(answers.iter().find_map(|answer| read_device(answer, name)))
    }

    /// Makes it, with this text on it.
    pub(super) fn create(&self, alias: &str) -> io::Result<Device> {
        self.ask(NEW_LINK, NLM_F_ACK | CREATE, &new_link(NAME))?;
        let made = self.device()?.ok_or(io::ErrorKind::NotFound)?;
        self.label(made.index, alias)?;
        self.raise(made.index)?;
        self.device()?.ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    pub(super) fn label(&self, index: u32, alias: &str) -> io::Result<()> {
        let body = [link(index, 0, 0), attribute(LINK_ALIAS, alias.as_bytes())].concat();
        self.ask(SET_LINK, NLM_F_ACK, &body).map(drop)
    }

    pub(super) fn raise(&self, index: u32) -> io::Result<()> {
        if fs::exists("/proc/sys/net/ipv6").unwrap_or(false) {
            let mode = attribute(INET6_ADDR_GEN_MODE, &[NO_ADDRESS_OF_ITS_OWN]);
            let families = attribute(LINK_FAMILIES | NESTED, &attribute(libc::AF_INET6 as u16 | NESTED, &mode));
            self.ask(SET_LINK, NLM_F_ACK, &[link(index, 0, 0), families].concat())?;
        }
        let flags = (libc::IFF_UP | libc::IFF_NOARP) as u32;
        self.ask(SET_LINK, NLM_F_ACK, &link(index, flags, flags)).map(drop)
    }

    /// What is gone already is no error.
    pub(super) fn remove(&self, index: u32) -> io::Result<()> {
        match self.ask(DELETE_LINK, NLM_F_ACK, &link(index, 0, 0)) {
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(()),
            done => done.map(drop),
        }
    }

    /// Whether the kernel makes such devices at all.
    pub(super) fn try_out(&self) -> io::Result<()> {
        match self.ask(NEW_LINK, NLM_F_ACK | CREATE, &new_link(TRIAL)) {
            // Somebody else is trying, or was killed over it.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            done => drop(done?),
        }
        self.tried()?.map_or(Ok(()), |device| self.remove(device.index))
    }

    /// One that was made so.
    pub(super) fn tried(&self) -> io::Result<Option<Device>> {
        Ok(self.named(TRIAL)?.filter(|device| device.is_dummy))
    }

    pub(super) fn addresses(&self, index: u32) -> io::Result<BTreeSet<IpAddr>> {
        let answers = self.ask(GET_ADDRESS, NLM_F_DUMP, &[0; 8])?;
        Ok(answers.iter().filter_map(|answer| read_address(answer, index)).collect())
    }

    /// What the node's own devices hold, and the networks that they are in by that.
    pub(super) fn others(&self) -> io::Result<Vec<IpNet>> {
        let mut alike = BTreeSet::new();
        for name in ALIKE {
            alike.extend(self.named(name)?.map(|device| device.index));
        }
        let answers = self.ask(GET_ADDRESS, NLM_F_DUMP, &[0; 8])?;
        Ok(answers.iter().filter_map(|answer| read_other(answer, &alike)).collect())
    }

    /// Addresses that somebody else has answered for, and with which link address.
    pub(super) fn neighbours(&self) -> io::Result<BTreeMap<IpAddr, Vec<u8>>> {
        let answers = self.ask(GET_NEIGHBOUR, NLM_F_DUMP, &[0; 12])?;
        Ok(answers.iter().filter_map(|answer| read_neighbour(answer)).collect())
    }

    /// What is there already is no error.
    pub(super) fn add(&self, index: u32, addr: IpAddr) -> io::Result<()> {
        match self.ask(NEW_ADDRESS, NLM_F_ACK | CREATE, &address(index, addr)) {
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
            done => done.map(drop),
        }
    }

    pub(super) fn take_off(&self, index: u32, addr: IpAddr) -> io::Result<()> {
        match self.ask(DELETE_ADDRESS, NLM_F_ACK, &address(index, addr)) {
            Err(error) if error.raw_os_error() == Some(libc::EADDRNOTAVAIL) => Ok(()),
            done => done.map(drop),
        }
    }

    /// Which of its own addresses the node would take for itself to ask something that is not here; `None`: it has none.
    pub(super) fn source(&self, family: Family) -> io::Result<Option<IpAddr>> {
        let elsewhere = ELSEWHERE.into_iter().filter(|addr| Family::of(*addr) == family);
        let body: Vec<Vec<u8>> = elsewhere.map(|addr| route(addr, [0; 4], &[])).collect();
        // Where no way leads there is nothing to be known from one.
        let answers = self.ask(GET_ROUTE, NLM_F_ACK, &body.concat()).unwrap_or_default();
        let chosen = answers.iter().find_map(|answer| read_route(answer)?.source);
        let is_of = |addr: &IpAddr| Family::of(*addr) == family && is_for_all(*addr);
        let mut own = self.others()?.into_iter().map(|net| net.addr()).filter(is_of);
        Ok(chosen.filter(is_of).or_else(|| own.next()))
    }

    /// Has what is for this address come to the node as if the device held it, but that nobody takes it for a source.
    pub(super) fn route_here(&self, index: u32, addr: IpAddr, source: IpAddr) -> io::Result<()> {
        let source = attribute(ROUTE_SOURCE, &octets(source));
        match self.ask(NEW_ROUTE, NLM_F_ACK | BESIDE, &to_this_node(index, addr, &source)) {
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
            done => done.map(drop),
        }
    }

    /// What [`Self::route_here`] leads here.
    pub(super) fn routed(&self, index: u32) -> io::Result<BTreeSet<IpAddr>> {
        let answers = self.ask(GET_ROUTE, NLM_F_DUMP, &[0; 12])?;
        let of_ours = |way: &Way| way.kind == OURS && way.device == Some(index);
        Ok(answers.iter().filter_map(|answer| read_route(answer)).filter(of_ours).map(|way| way.to).collect())
    }

    /// What is not there is no error.
    pub(super) fn let_go(&self, index: u32, addr: IpAddr) -> io::Result<()> {
        match self.ask(DELETE_ROUTE, NLM_F_ACK, &to_this_node(index, addr, &[])) {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            done => done.map(drop),
        }
    }

    fn ask(&self, kind: u16, flags: u16, body: &[u8]) -> io::Result<Vec<Vec<u8>>> {
        self.0.ask(kind, NLM_F_REQUEST | flags, body)
    }
}

fn terminated(text: &str) -> Vec<u8> {
    [text.as_bytes(), &[0]].concat()
}

/// `struct ifinfomsg`
fn link(index: u32, flags: u32, change: u32) -> Vec<u8> {
    [[0_u8; 4], index.to_ne_bytes(), flags.to_ne_bytes(), change.to_ne_bytes()].concat()
}

fn new_link(name: &str) -> Vec<u8> {
    let kind = attribute(INFO_KIND, KIND.as_bytes());
    [link(0, 0, 0), attribute(LINK_NAME, &terminated(name)), attribute(LINK_INFO | NESTED, &kind)].concat()
}

/// `struct ifaddrmsg` and what describes an address that nobody takes for the node's own by itself: of scope host, or deprecated.
fn address(index: u32, addr: IpAddr) -> Vec<u8> {
    let (family, bits, scope, bytes) = match addr {
        IpAddr::V4(addr) => (libc::AF_INET as u8, 32, SCOPE_HOST, addr.octets().to_vec()),
        IpAddr::V6(addr) => (libc::AF_INET6 as u8, 128, SCOPE_UNIVERSE, addr.octets().to_vec()),
    };
    let mut body = [[family, bits, 0, scope], index.to_ne_bytes()].concat();
    body.extend(attribute(LOCAL, &bytes));
    body.extend(attribute(ADDRESS, &bytes));
    if Family::of(addr) == Family::V6 {
        body.extend(attribute(FLAGS, &NO_DETECTION.to_ne_bytes()));
        // `struct ifa_cacheinfo`: preferred, valid; never and for ever.
        body.extend(attribute(CACHE_INFO, &[[0; 4], [0xff; 4], [0; 4], [0; 4]].concat()));
    }
    body
}

/// What a route says of itself: table, who made it, scope, kind.
const OURS: [u8; 4] = [LOCAL_TABLE, MADE_BY_HAND, SCOPE_HOST, TO_THIS_NODE];

/// As far as it matters here.
#[derive(Debug, PartialEq, Eq)]
struct Way {
    /// As in [`OURS`]; IPv6 knows no scopes.
    kind: [u8; 4],
    to: IpAddr,
    device: Option<u32>,
    source: Option<IpAddr>,
}

/// `struct rtmsg` and what follows it, of one address.
fn route(addr: IpAddr, kind: [u8; 4], more: &[u8]) -> Vec<u8> {
    let (family, bits) = match addr {
        IpAddr::V4(_) => (libc::AF_INET as u8, 32),
        IpAddr::V6(_) => (libc::AF_INET6 as u8, 128),
    };
    let message = [[family, bits, 0, 0], kind, [0; 4]].concat();
    [message.as_slice(), attribute(ROUTE_TO, &octets(addr)).as_slice(), more].concat()
}

fn to_this_node(index: u32, addr: IpAddr, more: &[u8]) -> Vec<u8> {
    route(addr, OURS, &[attribute(ROUTE_DEVICE, &index.to_ne_bytes()).as_slice(), more].concat())
}

fn octets(addr: IpAddr) -> Vec<u8> {
    match addr {
        IpAddr::V4(addr) => addr.octets().to_vec(),
        IpAddr::V6(addr) => addr.octets().to_vec(),
    }
}

/// Not of a link, nor of the node alone.
const fn is_for_all(addr: IpAddr) -> bool {
    match addr {
        IpAddr::V4(addr) => !addr.is_loopback() && !addr.is_link_local(),
        IpAddr::V6(addr) => !addr.is_loopback() && !addr.is_unicast_link_local(),
    }
}

fn read_route(answer: &[u8]) -> Option<Way> {
    let family = *answer.first()?;
    let mut kind: [u8; 4] = *answer.get(4..)?.first_chunk()?;
    if i32::from(family) == libc::AF_INET6
        && let [_, _, scope, _] = &mut kind
    {
        *scope = SCOPE_HOST;
    }
    let value = |wanted| Some(attributes(answer.get(12..)?).find(|(kind, _)| *kind == wanted)?.1);
    let to = of_bytes(family, value(ROUTE_TO)?)?;
    let device = value(ROUTE_DEVICE).and_then(|index| Some(u32::from_ne_bytes(*index.first_chunk()?)));
    Some(Way { kind, to, device, source: value(ROUTE_SOURCE).and_then(|source| of_bytes(family, source)) })
}

fn read_device(answer: &[u8], name: &str) -> Option<Device> {
    let index = u32::from_ne_bytes(*answer.get(4..)?.first_chunk()?);
    let flags = u32::from_ne_bytes(*answer.get(8..)?.first_chunk()?);
    let value = |wanted| Some(attributes(answer.get(16..)?).find(|(kind, _)| *kind == wanted)?.1);
    let kind = value(LINK_INFO).and_then(|info| attributes(info).find(|(kind, _)| *kind == INFO_KIND));
    (text(value(LINK_NAME)?)? == name).then(|| Device {
        index,
        alias: value(LINK_ALIAS).and_then(text).unwrap_or_default(),
        up: flags & libc::IFF_UP as u32 != 0,
        is_dummy: kind.and_then(|(_, kind)| text(kind)).is_some_and(|kind| kind == KIND),
    })
}

fn text(bytes: &[u8]) -> Option<String> {
    bytes.split(|byte| *byte == 0).next().map(|bytes| String::from_utf8_lossy(bytes).into_owned())
}

fn read_address(answer: &[u8], index: u32) -> Option<IpAddr> {
    (index_of(answer)? == index).then(|| address_of(answer))?
}

/// Of a device that is none of these.
fn read_other(answer: &[u8], devices: &BTreeSet<u32>) -> Option<IpNet> {
    let net = IpNet::new(address_of(answer)?, *answer.get(1)?).ok()?;
    (!devices.contains(&index_of(answer)?)).then_some(net)
}

/// `struct ndmsg` and what follows it.
fn read_neighbour(answer: &[u8]) -> Option<(IpAddr, Vec<u8>)> {
    let state = u16::from_ne_bytes(*answer.get(8..)?.first_chunk()?);
    let value = |wanted| Some(attributes(answer.get(12..)?).find(|(kind, _)| *kind == wanted)?.1);
    let addr = of_bytes(*answer.first()?, value(DESTINATION)?)?;
    (state & ANSWERED != 0).then_some((addr, value(LINK_ADDRESS)?.to_vec()))
}

fn index_of(answer: &[u8]) -> Option<u32> {
    Some(u32::from_ne_bytes(*answer.get(4..)?.first_chunk()?))
}

fn address_of(answer: &[u8]) -> Option<IpAddr> {
    let value = |wanted| attributes(answer.get(8..)?).find(|(kind, _)| *kind == wanted).map(|(_, value)| value);
    let bytes = value(LOCAL).or_else(|| value(ADDRESS))?;
    of_bytes(*answer.first()?, bytes)
}

fn of_bytes(family: u8, bytes: &[u8]) -> Option<IpAddr> {
    match i32::from(family) {
        libc::AF_INET => Some(IpAddr::from(*bytes.first_chunk::<4>()?)),
        libc::AF_INET6 => Some(IpAddr::from(*bytes.first_chunk::<16>()?)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        for addr in [IpAddr::from([10, 96, 0, 1]), "fd00:96::1".parse().unwrap()] {
            let bytes = address(7, addr);
            assert_eq!((read_address(&bytes, 7), read_address(&bytes, 8)), (Some(addr), None));
            let mut wider = bytes.clone();
            wider[1] = 24;
            let net = read_other(&wider, &[8].into()).unwrap();
            assert!(net.addr() == addr && net.prefix_len() == 24 && read_other(&wider, &[7].into()).is_none());
            let family = bytes[0];
            let octets = attributes(&bytes[8..]).next().unwrap().1;
            let neighbour = |state: u8| {
                let message = [[family, 0, 0, 0], [7, 0, 0, 0], [state, 0, 0, 0]].concat();
                [message, attribute(DESTINATION, octets), attribute(LINK_ADDRESS, &[2, 0, 0, 0, 0, 1])].concat()
            };
            let there = (addr, vec![2, 0, 0, 0, 0, 1]);
            // Reachable, stale; failed, of no protocol.
            assert_eq!(
                [2, 4, 0x20, 0x40].map(|state| read_neighbour(&neighbour(state))),
                [Some(&there), Some(&there), None, None].map(Option::<&_>::cloned)
            );
            for cut in 0..bytes.len() {
                let _whatever = (read_address(&bytes[..cut], 7), read_neighbour(&bytes[..cut]));
            }
        }
        for (addr, source) in [("10.96.0.1", "192.0.2.7"), ("fd00:96::1", "2001:db8::7")] {
            let [addr, source]: [IpAddr; 2] = [addr, source].map(|addr| addr.parse().unwrap());
            let mut bytes = to_this_node(7, addr, &attribute(ROUTE_SOURCE, &octets(source)));
            let way = Way { kind: OURS, to: addr, device: Some(7), source: Some(source) };
            assert_eq!(read_route(&bytes).as_ref(), Some(&way));
            // The kernel's own, of an address.
            bytes[5] = 2;
            assert_ne!(read_route(&bytes).map(|way| way.kind), Some(OURS));
            for cut in 0..bytes.len() {
                let _whatever = read_route(&bytes[..cut]);
            }
        }
        let alias = attribute(LINK_ALIAS, b"before: a=0\0");
        let kind = |name: &[u8]| attribute(LINK_INFO | NESTED, &attribute(INFO_KIND, name));
        let of =
            |name: &str, kind| [link(7, 1, 1), attribute(LINK_NAME, &terminated(name)), alias.clone(), kind].concat();
        let device = Device { index: 7, alias: "before: a=0".into(), up: true, is_dummy: true };
        assert_eq!(read_device(&of(NAME, kind(b"dummy")), NAME), Some(device.clone()));
        let other = Device { is_dummy: false, ..device };
        assert_eq!(read_device(&of(NAME, kind(b"veth\0")), NAME), Some(other.clone()));
        assert_eq!(read_device(&of(NAME, Vec::new()), NAME), Some(other), "hardware");
        assert_eq!(read_device(&of("kube-ipvs0", kind(b"dummy")), NAME), None);
    }
}
