//! Packets by description: built from scratch, and judged by a parser that shares no code with the programs.

use std::net::{IpAddr, SocketAddr};

use etherparse::{NetSlice, SlicedPacket};

pub(crate) const FIN: u8 = 0x01;
pub(crate) const SYN: u8 = 0x02;
pub(crate) const RST: u8 = 0x04;
pub(crate) const ACK: u8 = 0x10;

pub(crate) const INIT: u8 = 1;
pub(crate) const INIT_ACK: u8 = 2;
pub(crate) const ABORT: u8 = 6;
pub(crate) const SHUTDOWN: u8 = 7;
pub(crate) const COOKIE_ECHO: u8 = 10;
/// What each end of an association tells the other to send under.
pub(crate) const OPENERS_TAG: u32 = 0x0a0b_0c0d;
pub(crate) const ANSWERERS_TAG: u32 = 0xf5e6_d7c8;

pub(crate) const ETHERNET: usize = 14;
/// The first is that of the loopback device, which test runs have the packet come in by.
const MACS: [u8; 12] = [0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 2];

#[derive(Clone, Debug)]
pub(crate) enum Body {
    Tcp {
        flags: u8,
    },
    /// `bare`: no checksum (IPv4).
    Udp {
        bare: bool,
    },
    /// First chunk's type, and the tag it is sent under.
    Sctp {
        chunk: u8,
        tag: u32,
    },
    /// Type, code, rest of the header. Ports of the packet's addresses do not count.
    Icmp {
        kind: u8,
        code: u8,
        rest: [u8; 4],
    },
    Other(u8),
}

/// A packet that is whole and right; [`Packet::frame`] gives its bytes.
#[derive(Clone, Debug)]
pub(crate) struct Packet {
    pub(crate) src: SocketAddr,
    pub(crate) dst: SocketAddr,
    pub(crate) body: Body,
    pub(crate) payload: Vec<u8>,
    pub(crate) ttl: u8,
    pub(crate) id: u32,
    /// IPv4 options, a multiple of 4 bytes.
    pub(crate) options: Vec<u8>,
    /// IPv6 extension headers: protocol number and bytes, whose first is overwritten with what comes next.
    pub(crate) extensions: Vec<(u8, Vec<u8>)>,
}

impl Packet {
    fn new(src: SocketAddr, dst: SocketAddr, body: Body) -> Self {
        Self {
            src,
            dst,
            body,
            payload: b"payload".to_vec(),
            ttl: 61,
            id: 0x1234,
            options: Vec::new(),
            extensions: Vec::new(),
        }
    }

    pub(crate) fn tcp(src: SocketAddr, dst: SocketAddr, flags: u8) -> Self {
        Self::new(src, dst, Body::Tcp { flags })
    }

    pub(crate) fn udp(src: SocketAddr, dst: SocketAddr) -> Self {
        Self::new(src, dst, Body::Udp { bare: false })
    }

    pub(crate) fn sctp(src: SocketAddr, dst: SocketAddr, chunk: u8, tag: u32) -> Self {
        Self::new(src, dst, Body::Sctp { chunk, tag })
    }

    /// What opens a flow over `proto`.
    pub(crate) fn opening(proto: u8, src: SocketAddr, dst: SocketAddr) -> Self {
        match proto {
            6 => Self::tcp(src, dst, SYN),
            132 => Self::sctp(src, dst, INIT, 0),
            _ => Self::udp(src, dst),
        }
    }

    /// What answers it.
    pub(crate) fn answer(proto: u8, src: SocketAddr, dst: SocketAddr) -> Self {
        match proto {
            6 => Self::tcp(src, dst, SYN | ACK),
            132 => Self::sctp(src, dst, INIT_ACK, OPENERS_TAG),
            _ => Self::udp(src, dst),
        }
    }

    /// What its opener sends next.
    pub(crate) fn more(proto: u8, src: SocketAddr, dst: SocketAddr) -> Self {
        match proto {
            6 => Self::tcp(src, dst, ACK),
            132 => Self::sctp(src, dst, COOKIE_ECHO, ANSWERERS_TAG),
            _ => Self::udp(src, dst),
        }
    }

    /// The orderly end of a connection, in one direction.
    pub(crate) fn closing(proto: u8, src: SocketAddr, dst: SocketAddr) -> Self {
        if proto == 6 { Self::tcp(src, dst, FIN | ACK) } else { Self::sctp(src, dst, SHUTDOWN, ANSWERERS_TAG) }
    }

    /// The other one, in both.
    pub(crate) fn abort(proto: u8, src: SocketAddr, dst: SocketAddr) -> Self {
        if proto == 6 { Self::tcp(src, dst, RST | ACK) } else { Self::sctp(src, dst, ABORT, ANSWERERS_TAG) }
    }

    pub(crate) fn icmp(src: IpAddr, dst: IpAddr, kind: u8, code: u8, payload: &[u8]) -> Self {
        let body = Body::Icmp { kind, code, rest: [0; 4] };
        Self { payload: payload.to_vec(), ..Self::new(SocketAddr::new(src, 0), SocketAddr::new(dst, 0), body) }
    }

    pub(crate) fn other(src: IpAddr, dst: IpAddr, proto: u8) -> Self {
        Self::new(SocketAddr::new(src, 0), SocketAddr::new(dst, 0), Body::Other(proto))
    }

    /// The same packet between other ends.
    pub(crate) fn between(&self, src: SocketAddr, dst: SocketAddr) -> Self {
        Self { src, dst, ..self.clone() }
    }

    pub(crate) fn to(&self, dst: SocketAddr) -> Self {
        self.between(self.src, dst)
    }

    pub(crate) fn from(&self, src: SocketAddr) -> Self {
        self.between(src, self.dst)
    }

    pub(crate) fn with_payload(mut self, payload: &[u8]) -> Self {
        self.payload = payload.to_vec();
        self
    }

    pub(crate) fn is_v6(&self) -> bool {
        self.src.is_ipv6()
    }

    pub(crate) fn proto(&self) -> u8 {
        match self.body {
            Body::Tcp { .. } => 6,
            Body::Udp { .. } => 17,
            Body::Sctp { .. } => 132,
            Body::Icmp { .. } if self.is_v6() => 58,
            Body::Icmp { .. } => 1,
            Body::Other(proto) => proto,
        }
    }

    /// The transport header and what follows, checksum included.
    pub(crate) fn transport(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let (sport, dport) = (self.src.port().to_be_bytes(), self.dst.port().to_be_bytes());
        let field = match &self.body {
            Body::Tcp { flags } => {
                bytes.extend([sport, dport].concat());
                bytes.extend([0, 0, 0, 7, 0, 0, 0, 9, 0x50, *flags, 0x20, 0, 0, 0, 0, 0]);
                Some(16)
            }
            Body::Udp { bare } => {
                bytes.extend([sport, dport].concat());
                bytes.extend((8 + self.payload.len() as u16).to_be_bytes());
                bytes.extend([0, 0]);
                (!bare).then_some(6)
            }
            Body::Sctp { chunk, tag } => {
                bytes.extend([sport, dport].concat());
                bytes.extend(tag.to_be_bytes());
                bytes.extend([0; 4]);
                let own = match *chunk {
                    INIT => Some(OPENERS_TAG),
                    INIT_ACK => Some(ANSWERERS_TAG),
                    _ => None,
                };
                let length = 4 + own.map_or(0, |_| 16) + self.payload.len() as u16;
                bytes.extend([*chunk, 0]);
                bytes.extend(length.to_be_bytes());
                if let Some(own) = own {
                    bytes.extend(own.to_be_bytes());
                    // Window, streams out and in, first number.
                    bytes.extend([0, 1, 0, 0, 0, 10, 0, 10, 0, 0, 0, 1]);
                }
                None
            }
            Body::Icmp { kind, code, rest } => {
                bytes.extend([*kind, *code, 0, 0]);
                bytes.extend(rest);
                Some(2)
            }
            Body::Other(_) => None,
        };
        bytes.extend(&self.payload);
        if let Body::Sctp { .. } = self.body {
            let sum = crc32c(&bytes);
            bytes[8..12].copy_from_slice(&sum.to_le_bytes());
        }
        if let Some(field) = field {
            let mut sum = !total(&pseudo(self.src.ip(), self.dst.ip(), self.proto(), &bytes));
            if sum == 0 && self.proto() == 17 {
                sum = 0xffff;
            }
            bytes[field..field + 2].copy_from_slice(&sum.to_be_bytes());
        }
        bytes
    }

    pub(crate) fn frame(&self) -> Vec<u8> {
        self.wrap(&self.transport(), None)
    }

    /// Bytes `from..to` of the transport layer as a fragment.
    pub(crate) fn fragment(&self, from: usize, to: usize) -> Vec<u8> {
        let transport = self.transport();
        assert!(from.is_multiple_of(8) && to <= transport.len());
        self.wrap(&transport[from..to], Some((from as u16 / 8, to < transport.len())))
    }

    /// An IPv6 fragment header that announces the only fragment (RFC 6946).
    pub(crate) fn atomic_fragment(&self) -> Vec<u8> {
        self.wrap(&self.transport(), Some((0, false)))
    }

    fn wrap(&self, transport: &[u8], fragment: Option<(u16, bool)>) -> Vec<u8> {
        let mut frame = MACS.to_vec();
        match (self.src.ip(), self.dst.ip()) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                frame.extend([8, 0]);
                let ihl = 20 + self.options.len();
                let mut header = vec![0x40 | (ihl / 4) as u8, 0];
                header.extend(((ihl + transport.len()) as u16).to_be_bytes());
                header.extend((self.id as u16).to_be_bytes());
                let (offset, more) = fragment.unwrap_or((0, false));
                header.extend((offset | if more { 0x2000 } else { 0 }).to_be_bytes());
                header.extend([self.ttl, self.proto(), 0, 0]);
                header.extend(src.octets());
                header.extend(dst.octets());
                header.extend(&self.options);
                let sum = !total(&header);
                header[10..12].copy_from_slice(&sum.to_be_bytes());
                frame.extend(header);
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                frame.extend([0x86, 0xdd]);
                let mut extensions = self.extensions.clone();
                if let Some((offset, more)) = fragment {
                    let mut header = vec![0, 0];
                    header.extend((offset << 3 | u16::from(more)).to_be_bytes());
                    header.extend(self.id.to_be_bytes());
                    extensions.push((44, header));
                }
                let length = transport.len() + extensions.iter().map(|(_, bytes)| bytes.len()).sum::<usize>();
                frame.extend([0x60, 0x01, 0x02, 0x03]);
                frame.extend((length as u16).to_be_bytes());
                frame.extend([extensions.first().map_or(self.proto(), |e| e.0), self.ttl]);
                frame.extend(src.octets());
                frame.extend(dst.octets());
                for (i, (_, bytes)) in extensions.iter().enumerate() {
                    frame.push(extensions.get(i + 1).map_or(self.proto(), |e| e.0));
                    frame.extend(&bytes[1..]);
                }
            }
            _ => panic!("mixed families: {self:?}"),
        }
        frame.extend(transport);
        frame
    }
}

/// The checksum of SCTP bit by bit, as RFC 9260 has it in appendix A; over what it stands in as zero.
pub(crate) fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |register, byte| {
        (0..8).fold(register ^ u32::from(*byte), |r, _| if r & 1 == 1 { r >> 1 ^ 0x82f6_3b78 } else { r >> 1 })
    })
}

/// Folded one's-complement sum (RFC 1071, the plain way).
pub(crate) fn total(bytes: &[u8]) -> u16 {
    let mut sum = 0_u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(pair[0]) << 8 | pair.get(1).copied().map_or(0, u32::from);
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// What a transport checksum is taken over. ICMP has no pseudo-header, ICMPv6 has.
fn pseudo(src: IpAddr, dst: IpAddr, proto: u8, transport: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    match (src, dst) {
        (IpAddr::V4(_), IpAddr::V4(_)) if proto == 1 => {}
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            bytes.extend([src.octets(), dst.octets()].concat());
            bytes.extend([0, proto]);
            bytes.extend((transport.len() as u16).to_be_bytes());
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            bytes.extend([src.octets(), dst.octets()].concat());
            bytes.extend((transport.len() as u32).to_be_bytes());
            bytes.extend([0, 0, 0, proto]);
        }
        _ => panic!("mixed families"),
    }
    bytes.extend(transport);
    bytes
}

/// What a full recomputation says of a frame's checksums.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Sums {
    /// Not a whole packet: nothing to say.
    Unknown,
    Right,
    WrongHeader,
    WrongTransport,
}

/// Parses with etherparse and sums everything anew.
pub(crate) fn sums(frame: &[u8]) -> Sums {
    let Ok(packet) = SlicedPacket::from_ethernet(frame) else { return Sums::Unknown };
    let Some(net) = packet.net else { return Sums::Unknown };
    let (src, dst) = match &net {
        NetSlice::Ipv4(ip) => {
            let header = ip.header();
            if header.header_checksum() != header.to_header().calc_header_checksum() {
                return Sums::WrongHeader;
            }
            (IpAddr::V4(header.source_addr()), IpAddr::V4(header.destination_addr()))
        }
        NetSlice::Ipv6(ip) => (IpAddr::V6(ip.header().source_addr()), IpAddr::V6(ip.header().destination_addr())),
        NetSlice::Arp(_) => return Sums::Unknown,
    };
    let Some(ip) = net.ip_payload_ref() else { return Sums::Unknown };
    if ip.fragmented {
        return Sums::Right;
    }
    let (proto, bytes) = (ip.ip_number.0, ip.payload);
    let whole = match proto {
        6 => bytes.len() >= 20,
        17 => bytes.len() >= 8 && usize::from(u16::from_be_bytes([bytes[4], bytes[5]])) == bytes.len(),
        1 | 58 => bytes.len() >= 8,
        132 if bytes.len() >= 12 && bytes[8..12] != [0; 4] => {
            let mut zeroed = bytes.to_vec();
            zeroed[8..12].fill(0);
            let right = crc32c(&zeroed).to_le_bytes() == bytes[8..12];
            return if right { Sums::Right } else { Sums::WrongTransport };
        }
        // Left to the device.
        132 => return Sums::Unknown,
        _ => return Sums::Right,
    };
    if !whole || (proto == 1) != src.is_ipv4() && matches!(proto, 1 | 58) {
        return Sums::Unknown;
    }
    if proto == 17 && bytes[6..8] == [0, 0] {
        return if src.is_ipv4() { Sums::Right } else { Sums::WrongTransport };
    }
    if total(&pseudo(src, dst, proto, bytes)) == 0xffff { Sums::Right } else { Sums::WrongTransport }
}

/// Offset of the IP payload.
pub(crate) fn payload_at(frame: &[u8]) -> usize {
    let packet = SlicedPacket::from_ethernet(frame).unwrap();
    frame.len() - packet.net.unwrap().ip_payload_ref().unwrap().payload.len()
}

/// The UDP or TCP ends of a whole packet.
pub(crate) fn ends(frame: &[u8]) -> (SocketAddr, SocketAddr) {
    let packet = SlicedPacket::from_ethernet(frame).unwrap();
    let (src, dst): (IpAddr, IpAddr) = match packet.net.as_ref().unwrap() {
        NetSlice::Ipv4(ip) => (ip.header().source_addr().into(), ip.header().destination_addr().into()),
        NetSlice::Ipv6(ip) => (ip.header().source_addr().into(), ip.header().destination_addr().into()),
        NetSlice::Arp(_) => panic!("ARP"),
    };
    let at = payload_at(frame);
    let port = |at: usize| u16::from_be_bytes([frame[at], frame[at + 1]]);
    (SocketAddr::new(src, port(at)), SocketAddr::new(dst, port(at + 2)))
}

/// The builder itself, against etherparse's.
#[test]
fn built_packets_are_those_of_etherparse() {
    use etherparse::PacketBuilder;
    let (c4, v4): (SocketAddr, SocketAddr) = ("10.1.0.5:5000".parse().unwrap(), "10.96.0.1:80".parse().unwrap());
    let mut packet = Packet::tcp(c4, v4, SYN);
    packet.id = 0;
    let mut bytes = Vec::new();
    let mut header = etherparse::TcpHeader::new(5000, 80, 7, 0x2000);
    header.acknowledgment_number = 9;
    header.syn = true;
    PacketBuilder::ethernet2(MACS[6..].try_into().unwrap(), MACS[..6].try_into().unwrap())
        .ipv4([10, 1, 0, 5], [10, 96, 0, 1], 61)
        .tcp_header(header)
        .write(&mut bytes, b"payload")
        .unwrap();
    // etherparse sets "don't fragment".
    bytes[20] = 0;
    let sum: u16 = !total(&[&bytes[14..24], &[0, 0], &bytes[26..34]].concat());
    bytes[24..26].copy_from_slice(&sum.to_be_bytes());
    assert_eq!(packet.frame(), bytes);
    assert_eq!(sums(&bytes), Sums::Right);

    let (c6, v6): (SocketAddr, SocketAddr) = ("[fd00::5]:5000".parse().unwrap(), "[fd00::96]:53".parse().unwrap());
    let mut bytes = Vec::new();
    PacketBuilder::ethernet2(MACS[6..].try_into().unwrap(), MACS[..6].try_into().unwrap())
        .ipv6(
            "fd00::5".parse::<std::net::Ipv6Addr>().unwrap().octets(),
            "fd00::96".parse::<std::net::Ipv6Addr>().unwrap().octets(),
            61,
        )
        .udp(5000, 53)
        .write(&mut bytes, b"payload")
        .unwrap();
    bytes[14..18].copy_from_slice(&[0x60, 1, 2, 3]);
    assert_eq!(Packet::udp(c6, v6).frame(), bytes);
    assert_eq!(sums(&bytes), Sums::Right);
    // And the judge condemns.
    for at in [ETHERNET + 41, bytes.len() - 1] {
        let mut broken = bytes.clone();
        broken[at] ^= 1;
        assert_eq!(sums(&broken), Sums::WrongTransport);
    }
}
