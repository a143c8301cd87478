//! What is SCTP's own (RFC 9260): how its chunks read in terms of TCP, and its checksum.
//!
//! INIT, INIT ACK, COOKIE ECHO and COOKIE ACK are SYN, SYN-ACK, ACK and an ACK back. What the opener must know of the answer is no
//! number but the *tag* in its INIT ACK, which each later packet carries. Only a packet's first chunk is looked at: INIT, INIT ACK and
//! SHUTDOWN COMPLETE are always alone, and what ends an association otherwise is first in practice.
//!
//! The checksum is a CRC over the whole packet and over no address, so translating addresses costs it nothing, and another port is
//! worked in without reading the packet ([`crc32c`]). A zero in its place is the sender's leaving it to the device (`CHECKSUM_PARTIAL`
//! with `csum_not_inet`, as on a pod's veth): the kernel sums up over that zero where the packet leaves by a device
//! that cannot, so it has to stay. netfilter goes by the packet's mark for that, which programs cannot see; of packets that are
//! summed up one in 2³² looks the same, and its receiver drops it. A receiving stack looks at no other sum of the packet, so
//! `CHECKSUM_COMPLETE` needs no care.

use aya_ebpf::{EbpfContext as _, helpers::generated::bpf_skb_store_bytes, programs::TcContext};
use proxy_common::{Be16, crc32c};

use super::packet::{Header, load, pair32, tcp_flags};
use crate::maps::Packet;

mod chunk {
    pub(super) const INIT: u8 = 1;
    pub(super) const INIT_ACK: u8 = 2;
    pub(super) const ABORT: u8 = 6;
    pub(super) const SHUTDOWN: u8 = 7;
    pub(super) const SHUTDOWN_ACK: u8 = 8;
    pub(super) const SHUTDOWN_COMPLETE: u8 = 14;
}

const HEADER: u32 = 12;
/// Where the checksum stands.
const CHECKSUM: u32 = 8;

/// The flags that a TCP packet with the meaning of this first chunk would have. An INIT under a tag is none (RFC 9260, 8.5.1).
#[inline(always)]
pub(super) const fn flags(chunk: u8, tag: u32) -> u8 {
    match chunk {
        chunk::INIT if tag == 0 => tcp_flags::SYN,
        chunk::INIT => 0,
        chunk::INIT_ACK => tcp_flags::SYN | tcp_flags::ACK,
        chunk::ABORT | chunk::SHUTDOWN_COMPLETE => tcp_flags::RST,
        chunk::SHUTDOWN | chunk::SHUTDOWN_ACK => tcp_flags::FIN | tcp_flags::ACK,
        _ => tcp_flags::ACK,
    }
}

/// Works the ports that the packet is about to get into its checksum. 0: done. A packet in fragments cannot be helped: its length
/// is known to the last one only.
#[inline(never)]
pub(super) fn change_ports<A: Header>(ctx: &TcContext, l3: u32, packet: &Packet<A>, sport: Be16, dport: Be16) -> u32 {
    let Some(sum) = load::<u32>(ctx, packet.l4 + CHECKSUM) else { return 1 };
    if sum == 0 {
        return 0;
    }
    if packet.more != 0 {
        return 1;
    }
    // What the IP header tells: a short frame is padded.
    let (field, counted) = if A::VERSION == 4 { (2, 0) } else { (4, A::LEN_MIN) };
    let Some(length) = load::<Be16>(ctx, l3 + field) else { return 1 };
    let length = (length.to_host() as u32 + counted).wrapping_sub(packet.l4 - l3);
    if length.wrapping_sub(HEADER) > u16::MAX as u32 {
        return 1;
    }
    let difference = pair32([packet.sport.0 ^ sport.0, packet.dport.0 ^ dport.0]);
    let sum = sum ^ u32::from_le(sctp_sum_change(u32::from_le(difference), length));
    // SAFETY: live context; the helper reads four bytes of `sum` and checks the offset.
    let stored = unsafe {
        bpf_skb_store_bytes(
            ctx.as_ptr().cast(),
            packet.l4 + CHECKSUM,
            (&raw const sum).cast(),
            size_of::<u32>() as u32,
            0,
        )
    };
    u32::from(stored != 0)
}

/// [`crc32c::change`]. A global function, which the verifier walks once and not for each way that leads here (kernel 5.6, 51c39bb1d5d1).
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn sctp_sum_change(difference: u32, len: u32) -> u32 {
    crc32c::change(difference, len)
}
