//! Virtual services and their destinations as `include/uapi/linux/ip_vs.h` has them: attributes of generic netlink messages.
//!
//! Pure: bytes from values and values from bytes. Why no crate does it: see `dataplane::netlink`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::{
    dataplane::netlink::{attribute, attributes},
    model::{Family, Protocol},
};

const NLA_F_NESTED: u16 = 0x8000;

/// `IPVS_GENL_NAME`, `IPVS_GENL_VERSION`.
pub(super) const FAMILY: &str = "IPVS";
pub(super) const VERSION: u8 = 1;

/// `IPVS_CMD_*`
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Command {
    NewService = 1,
    SetService = 2,
    DelService = 3,
    GetService = 4,
    NewDest = 5,
    SetDest = 6,
    DelDest = 7,
    GetDest = 8,
    GetInfo = 15,
}

// `IPVS_CMD_ATTR_*`
const ATTR_SERVICE: u16 = 1;
const ATTR_DEST: u16 = 2;

// `IPVS_SVC_ATTR_*`
const SVC_AF: u16 = 1;
const SVC_PROTOCOL: u16 = 2;
const SVC_ADDR: u16 = 3;
const SVC_PORT: u16 = 4;
const SVC_FWMARK: u16 = 5;
const SVC_SCHED_NAME: u16 = 6;
const SVC_FLAGS: u16 = 7;
const SVC_TIMEOUT: u16 = 8;
const SVC_NETMASK: u16 = 9;

// `IPVS_DEST_ATTR_*`
const DEST_ADDR: u16 = 1;
const DEST_PORT: u16 = 2;
const DEST_FWD_METHOD: u16 = 3;
const DEST_WEIGHT: u16 = 4;
const DEST_U_THRESH: u16 = 5;
const DEST_L_THRESH: u16 = 6;
const DEST_ACTIVE_CONNS: u16 = 7;
const DEST_INACT_CONNS: u16 = 8;
const DEST_ADDR_FAMILY: u16 = 11;

// `IPVS_INFO_ATTR_*`
const INFO_VERSION: u16 = 1;
const INFO_CONN_TAB_SIZE: u16 = 2;

/// `IP_VS_SVC_F_PERSISTENT`: who came once is sent to the same destination again.
const PERSISTENT: u32 = 1;
/// `IP_VS_SVC_F_SCHED_MH_FALLBACK`, and of `sh` the same: who is led to a destination that takes nobody new is led to another. Their tables
/// keep a destination for as long as the service has it, whatever its weight, and without this its share of the clients is refused.
const FALLBACK: u32 = 8;
/// `IP_VS_SVC_F_SCHED_MH_PORT`: the scheduler `mh` goes by ports, too.
const BY_PORT: u32 = 0x10;
/// `IP_VS_CONN_F_FWD_MASK`; 0 is translation of addresses (`IP_VS_CONN_F_MASQ`).
const FORWARD_MASK: u32 = 7;
const TRANSLATE: u32 = 0;
/// What the kernel tells of a destination at one of the node's own addresses (`IP_VS_CONN_F_LOCALNODE`), whatever it was given.
const LOCAL_NODE: u32 = 1;

/// How packets are found to belong to a service.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Virtual {
    /// By what they are addressed to.
    At { addr: IpAddr, port: u16, protocol: Protocol },
    /// By their mark, the whole of it. These are looked for first.
    Marked { family: Family, mark: u32 },
}

impl Virtual {
    pub const fn family(&self) -> Family {
        match self {
            Self::At { addr: IpAddr::V4(_), .. } => Family::V4,
            Self::At { addr: IpAddr::V6(_), .. } => Family::V6,
            Self::Marked { family, .. } => *family,
        }
    }
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Service {
    pub at: Virtual,
    /// Name of the kernel's module without `ip_vs_`.
    pub scheduler: String,
    /// Seconds for which a client is remembered.
    pub persistence: Option<u32>,
    /// A scheduler that hashes takes ports for a part of who the client is.
    pub by_port: bool,
    /// One that hashes passes by who takes nobody new.
    pub fallback: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Destination {
    pub addr: IpAddr,
    pub port: u16,
    /// 0: nobody new is sent there.
    pub weight: u32,
}

/// A destination as the kernel tells it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Held {
    pub destination: Destination,
    /// Its addresses are translated, as all of ours are.
    pub translated: bool,
    pub active: u32,
    pub inactive: u32,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Info {
    pub version: (u8, u8, u8),
    pub connection_buckets: u32,
}

/// One change, or one question about one thing.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Request {
    Add(Service),
    Set(Service),
    Remove(Virtual),
    AddDestination(Virtual, Destination),
    SetDestination(Virtual, Destination),
    RemoveDestination(Virtual, Destination),
}

impl Request {
    pub const fn command(&self) -> Command {
        match self {
            Self::Add(_) => Command::NewService,
            Self::Set(_) => Command::SetService,
            Self::Remove(_) => Command::DelService,
            Self::AddDestination(..) => Command::NewDest,
            Self::SetDestination(..) => Command::SetDest,
            Self::RemoveDestination(..) => Command::DelDest,
        }
    }

    /// The attributes of its message.
    pub fn attributes(&self) -> Vec<u8> {
        match self {
            Self::Add(service) | Self::Set(service) => whole_service(service),
            Self::Remove(at) => service(*at),
            Self::AddDestination(at, to) | Self::SetDestination(at, to) | Self::RemoveDestination(at, to) => {
                [nested(ATTR_SERVICE, &key(*at)), destination(to)].concat()
            }
        }
    }
}

/// The attributes that name one service.
pub(super) fn service(at: Virtual) -> Vec<u8> {
    nested(ATTR_SERVICE, &key(at))
}

const fn number(family: Family) -> u16 {
    match family {
        Family::V4 => libc::AF_INET as u16,
        Family::V6 => libc::AF_INET6 as u16,
    }
}

/// `union nf_inet_addr`
fn union(addr: IpAddr) -> Vec<u8> {
    let mut bytes = match addr {
        IpAddr::V4(addr) => addr.octets().to_vec(),
        IpAddr::V6(addr) => addr.octets().to_vec(),
    };
    bytes.resize(16, 0);
    bytes
}

fn nested(kind: u16, inner: &[Vec<u8>]) -> Vec<u8> {
    attribute(kind | NLA_F_NESTED, &inner.concat())
}

fn key(at: Virtual) -> Vec<Vec<u8>> {
    let family = attribute(SVC_AF, &number(at.family()).to_ne_bytes());
    match at {
        Virtual::At { addr, port, protocol } => vec![
            family,
            attribute(SVC_PROTOCOL, &u16::from(protocol.number()).to_ne_bytes()),
            attribute(SVC_ADDR, &union(addr)),
            attribute(SVC_PORT, &port.to_be_bytes()),
        ],
        Virtual::Marked { mark, .. } => vec![family, attribute(SVC_FWMARK, &mark.to_ne_bytes())],
    }
}

fn whole_service(service: &Service) -> Vec<u8> {
    let Service { at, scheduler, persistence, by_port, fallback } = service;
    let mut name = scheduler.clone().into_bytes();
    name.push(0);
    let flags = [(persistence.is_some(), PERSISTENT), (*by_port, BY_PORT), (*fallback, FALLBACK)];
    let set = flags.iter().filter(|(is_set, _)| *is_set).fold(0, |all, (_, flag)| all | flag);
    let of_ours = flags.iter().fold(0, |all, (_, flag)| all | flag);
    // Each client by itself: all bits of an address, as IPv4 mask or IPv6 prefix length.
    let mask = match at.family() {
        Family::V4 => u32::MAX,
        Family::V6 => 128,
    };
    let mut inner = key(*at);
    inner.extend([
        attribute(SVC_SCHED_NAME, &name),
        // `struct ip_vs_flags`: these, and which of them count.
        attribute(SVC_FLAGS, &[set.to_ne_bytes(), of_ours.to_ne_bytes()].concat()),
        attribute(SVC_TIMEOUT, &persistence.unwrap_or(0).to_ne_bytes()),
        attribute(SVC_NETMASK, &mask.to_ne_bytes()),
    ]);
    nested(ATTR_SERVICE, &inner)
}

fn destination(to: &Destination) -> Vec<u8> {
    let Destination { addr, port, weight } = to;
    nested(
        ATTR_DEST,
        &[
            attribute(DEST_ADDR, &union(*addr)),
            attribute(DEST_PORT, &port.to_be_bytes()),
            attribute(DEST_FWD_METHOD, &TRANSLATE.to_ne_bytes()),
            attribute(DEST_WEIGHT, &weight.to_ne_bytes()),
            attribute(DEST_U_THRESH, &0_u32.to_ne_bytes()),
            attribute(DEST_L_THRESH, &0_u32.to_ne_bytes()),
            attribute(DEST_ADDR_FAMILY, &number(Family::of(*addr)).to_ne_bytes()),
        ],
    )
}

/// The value of the first attribute of this kind.
pub(super) fn find(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find_map(|(found, value)| (found == kind).then_some(value))
}

fn u16_of(bytes: &[u8], kind: u16) -> Option<u16> {
    Some(u16::from_ne_bytes(*find(bytes, kind)?.first_chunk()?))
}

fn port_of(bytes: &[u8], kind: u16) -> Option<u16> {
    Some(u16::from_be_bytes(*find(bytes, kind)?.first_chunk()?))
}

fn u32_of(bytes: &[u8], kind: u16) -> Option<u32> {
    Some(u32::from_ne_bytes(*find(bytes, kind)?.first_chunk()?))
}

fn addr_of(bytes: &[u8], kind: u16, family: u16) -> Option<IpAddr> {
    let bytes = find(bytes, kind)?;
    match i32::from(family) {
        libc::AF_INET => Some(Ipv4Addr::from(*bytes.first_chunk::<4>()?).into()),
        libc::AF_INET6 => Some(Ipv6Addr::from(*bytes.first_chunk::<16>()?).into()),
        _ => None,
    }
}

/// A service out of the attributes of an answer. `None`: one that we cannot have made (of a protocol that no Service has).
pub fn read_service(answer: &[u8]) -> Option<Service> {
    let service = find(answer, ATTR_SERVICE)?;
    let number = u16_of(service, SVC_AF)?;
    let at = if let Some(mark) = u32_of(service, SVC_FWMARK) {
        let family = Family::BOTH.into_iter().find(|family| self::number(*family) == number)?;
        Virtual::Marked { family, mark }
    } else {
        Virtual::At {
            addr: addr_of(service, SVC_ADDR, number)?,
            port: port_of(service, SVC_PORT)?,
            protocol: Protocol::from_number(u8::try_from(u16_of(service, SVC_PROTOCOL)?).ok()?)?,
        }
    };
    let name = find(service, SVC_SCHED_NAME)?;
    let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
    let flags = u32_of(service, SVC_FLAGS)?;
    Some(Service {
        at,
        scheduler: String::from_utf8_lossy(name).into_owned(),
        persistence: (flags & PERSISTENT != 0).then(|| u32_of(service, SVC_TIMEOUT)).flatten(),
        by_port: flags & BY_PORT != 0,
        fallback: flags & FALLBACK != 0,
    })
}

/// A destination of a service of this family.
pub fn read_destination(answer: &[u8], of: Family) -> Option<Held> {
    let destination = find(answer, ATTR_DEST)?;
    // Since 3.18; before that always the service's.
    let family = u16_of(destination, DEST_ADDR_FAMILY).unwrap_or(number(of));
    let forward = u32_of(destination, DEST_FWD_METHOD)? & FORWARD_MASK;
    Some(Held {
        destination: Destination {
            addr: addr_of(destination, DEST_ADDR, family)?,
            port: port_of(destination, DEST_PORT)?,
            weight: u32_of(destination, DEST_WEIGHT)?,
        },
        translated: forward == TRANSLATE || forward == LOCAL_NODE,
        active: u32_of(destination, DEST_ACTIVE_CONNS).unwrap_or(0),
        inactive: u32_of(destination, DEST_INACT_CONNS).unwrap_or(0),
    })
}

pub fn read_info(answer: &[u8]) -> Option<Info> {
    let [_, major, minor, patch] = u32_of(answer, INFO_VERSION)?.to_be_bytes();
    Some(Info { version: (major, minor, patch), connection_buckets: u32_of(answer, INFO_CONN_TAB_SIZE)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(bytes: &[u8]) -> String {
        bytes
            .chunks(4)
            .map(|word| word.iter().map(|byte| format!("{byte:02x}")).collect())
            .collect::<Vec<String>>()
            .join(" ")
    }

    fn web(v6: bool) -> Virtual {
        let addr = if v6 { "fd00:96::1" } else { "10.96.0.1" };
        Virtual::At { addr: addr.parse().unwrap(), port: 80, protocol: Protocol::Tcp }
    }

    #[test]
    fn requests_are_laid_out_as_the_kernel_reads_them() {
        let service = Service {
            at: web(false),
            scheduler: "rr".into(),
            persistence: Some(10_800),
            by_port: false,
            fallback: false,
        };
        assert_eq!(
            hex(&Request::Add(service).attributes()),
            "54000180 \
             06000100 02000000 06000200 06000000 \
             14000300 0a600001 00000000 00000000 00000000 \
             06000400 00500000 \
             07000600 72720000 0c000700 01000000 19000000 \
             08000800 302a0000 08000900 ffffffff"
        );
        let service =
            Service { at: web(false), scheduler: "mh".into(), persistence: None, by_port: true, fallback: true };
        assert!(hex(&Request::Set(service).attributes()).contains(" 07000600 6d680000 0c000700 18000000 19000000 "));
        let to = Destination { addr: "10.244.1.7".parse().unwrap(), port: 8080, weight: 1 };
        assert_eq!(
            hex(&Request::AddDestination(web(false), to).attributes()),
            "30000180 \
             06000100 02000000 06000200 06000000 \
             14000300 0a600001 00000000 00000000 00000000 \
             06000400 00500000 \
             48000280 \
             14000100 0af40107 00000000 00000000 00000000 \
             06000200 1f900000 \
             08000300 00000000 08000400 01000000 \
             08000500 00000000 08000600 00000000 \
             06000b00 02000000"
        );
        assert_eq!(
            hex(&Request::Remove(web(true)).attributes()),
            "30000180 \
             06000100 0a000000 06000200 06000000 \
             14000300 fd000096 00000000 00000000 00000001 \
             06000400 00500000"
        );
    }

    #[test]
    fn what_is_written_is_read() {
        for (v6, persistence) in [(false, None), (true, Some(60))] {
            let service = Service { at: web(v6), scheduler: "mh".into(), persistence, by_port: v6, fallback: !v6 };
            assert_eq!(read_service(&Request::Add(service.clone()).attributes()), Some(service));
            let addr: IpAddr = if v6 { "fd00::7" } else { "10.1.0.7" }.parse().unwrap();
            let to = Destination { addr, port: 53, weight: 0 };
            let held = read_destination(&Request::AddDestination(web(v6), to).attributes(), web(v6).family());
            assert_eq!(held, Some(Held { destination: to, translated: true, active: 0, inactive: 0 }));
        }
    }

    #[test]
    fn what_is_cut_off_is_no_service() {
        let service =
            Service { at: web(true), scheduler: "rr".into(), persistence: None, by_port: false, fallback: false };
        let bytes = Request::Add(service).attributes();
        for cut in 0..bytes.len() {
            assert_eq!(read_service(&bytes[..cut]), None, "{cut}");
        }
        let marked = Virtual::Marked { family: Family::V6, mark: 7 };
        let service =
            Service { at: marked, scheduler: "rr".into(), persistence: None, by_port: false, fallback: false };
        let request = Request::Add(service.clone());
        assert!(hex(&request.attributes()).contains("06000100 0a000000 08000500 07000000"));
        assert_eq!(read_service(&request.attributes()), Some(service));
    }
}
