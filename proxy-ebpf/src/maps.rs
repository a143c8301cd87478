//! Every map of the datapath. Read this file and you know the design (docs/maps.md has the fields).
//!
//! `_v4`/`_v6` pairs hold the same types over the two address families; programs reach them through [`Family`], so there is
//! one code path. Sizes here are defaults; the agent sets them at load time.

use aya_ebpf::{
    bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC},
    btf_maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, PerCpuHashMap, RingBuf, SkStorage},
    macros::btf_map,
};
use proxy_common::{
    Address, Be16, Ipv4Be, Ipv6Be,
    affinity::{AffinityKey, AffinityValue},
    connection::{ConnectionKey, ConnectionValue, FragmentKey, FragmentValue},
    counters::{Confirmed, Reason, ServiceCounters, Spare},
    device::{DeviceValue, XdpDevice},
    frontend::{FrontendKey, FrontendValue},
    local_cidr::LocalCidrValue,
    slot::{Slot, SlotV4, SlotV6, Target},
    socket::{DatagramKey, DatagramValue, PeerRecord},
    source_range::{SourceRange, SourceRangeValue},
};

use crate::{
    client::{Client, Sticky},
    tc::source::Way,
};

const NO_PREALLOC: usize = BPF_F_NO_PREALLOC as usize;
const MMAPABLE: usize = BPF_F_MMAPABLE as usize;

pub(crate) type Frontends<A> = HashMap<FrontendKey<A>, FrontendValue, 65_536, NO_PREALLOC>;
pub(crate) type Slots<S> = Array<S, 1_048_576, MMAPABLE>;
pub(crate) type Connections<A> = LruHashMap<ConnectionKey<A>, ConnectionValue<A>, 262_144>;
pub(crate) type Answered<A> = LruHashMap<ConnectionKey<A>, ConnectionValue<A>, 131_072>;
pub(crate) type HalfOpen<A> = LruHashMap<ConnectionKey<A>, ConnectionValue<A>, 65_536>;
pub(crate) type Fragments<A> = LruHashMap<FragmentKey<A>, FragmentValue, 8_192>;
pub(crate) type Peers<A> = SkStorage<PeerRecord<A>>;
pub(crate) type Datagrams<A> = LruHashMap<DatagramKey<A>, DatagramValue<A>, 65_536>;
pub(crate) type Affinity<A> = LruHashMap<AffinityKey, AffinityValue<A>, 65_536>;
pub(crate) type LocalCidrs<A> = LpmTrie<A, LocalCidrValue, 256>;
pub(crate) type SourceRanges<A> = LpmTrie<SourceRange<A>, SourceRangeValue, 65_536>;

/// (address, port, protocol) → ranges, verdicts. Writer: agent. Full: that frontend is reported, others go on.
#[btf_map(name = "frontends_v4")]
static FRONTENDS_V4: Frontends<Ipv4Be> = Frontends::new();
#[btf_map(name = "frontends_v6")]
static FRONTENDS_V6: Frontends<Ipv6Be> = Frontends::new();

/// Backends, inline; ranges point here. Writer: agent, through a mapping. Full: the frontend that needs them is reported.
#[btf_map(name = "slots_v4")]
static SLOTS_V4: Slots<SlotV4> = Slots::new();
#[btf_map(name = "slots_v6")]
static SLOTS_V6: Slots<SlotV6> = Slots::new();

/// TCP and SCTP flows that both sides have spoken on. Writer: programs. Full: the least recently used goes, its pair repairs it.
#[btf_map(name = "established_v4")]
static ESTABLISHED_V4: Connections<Ipv4Be> = Connections::new();
#[btf_map(name = "established_v6")]
static ESTABLISHED_V6: Connections<Ipv6Be> = Connections::new();

/// UDP flows that were answered, apart from the others so that however many of them evict no idle TCP flow. Writer: programs.
/// Full: as above.
#[btf_map(name = "answered_v4")]
static ANSWERED_V4: Answered<Ipv4Be> = Answered::new();
#[btf_map(name = "answered_v6")]
static ANSWERED_V6: Answered<Ipv6Be> = Answered::new();

/// Flows only one side has spoken on, apart from the others so that a SYN flood evicts only its like.
#[btf_map(name = "half_open_v4")]
static HALF_OPEN_V4: HalfOpen<Ipv4Be> = HalfOpen::new();
#[btf_map(name = "half_open_v6")]
static HALF_OPEN_V6: HalfOpen<Ipv6Be> = HalfOpen::new();

/// Ports of a datagram's first fragment, for its later ones. Writer: programs.
#[btf_map(name = "fragments_v4")]
static FRAGMENTS_V4: Fragments<Ipv4Be> = Fragments::new();
#[btf_map(name = "fragments_v6")]
static FRAGMENTS_V6: Fragments<Ipv6Be> = Fragments::new();

/// Copies of fragments that came before their datagram's first one ([`Held`](proxy_common::held::Held)), as many bytes. Writer: programs. Reader:
/// agent, which brings them back. Full: they are lost.
#[btf_map(name = "held")]
pub(crate) static HELD: RingBuf<u8, HELD_BYTES> = RingBuf::new();
pub(crate) const HELD_BYTES: usize = 1 << 19;

/// Connected socket → VIP it asked for. Lives in the socket, never full.
#[btf_map(name = "peers_v4")]
static PEERS_V4: Peers<Ipv4Be> = Peers::new();
#[btf_map(name = "peers_v6")]
static PEERS_V6: Peers<Ipv6Be> = Peers::new();

/// Unconnected UDP: (socket, VIP) → backend and (socket, backend) → VIP. Writer: programs. Full: the least recently used goes.
#[btf_map(name = "datagrams_v4")]
static DATAGRAMS_V4: Datagrams<Ipv4Be> = Datagrams::new();
#[btf_map(name = "datagrams_v6")]
static DATAGRAMS_V6: Datagrams<Ipv6Be> = Datagrams::new();

/// (client, service) → backend, for session affinity. Writer: programs, agent deletes. Full: the least recently used goes, and its
/// client may be sent elsewhere.
#[btf_map(name = "affinity_v4")]
static AFFINITY_V4: Affinity<Ipv4Be> = Affinity::new();
#[btf_map(name = "affinity_v6")]
static AFFINITY_V6: Affinity<Ipv6Be> = Affinity::new();

/// (service, prefix) → that new flows may come from there. Writer: agent. Full: the frontend that needs them is reported.
#[btf_map(name = "source_ranges_v4")]
static SOURCE_RANGES_V4: SourceRanges<Ipv4Be> = SourceRanges::new();
#[btf_map(name = "source_ranges_v6")]
static SOURCE_RANGES_V6: SourceRanges<Ipv6Be> = SourceRanges::new();

/// Prefix → that pods of this node may have its addresses. Writer: agent. Full: that is reported, and what has no room is outside.
#[btf_map(name = "local_cidrs_v4")]
static LOCAL_CIDRS_V4: LocalCidrs<Ipv4Be> = LocalCidrs::new();
#[btf_map(name = "local_cidrs_v6")]
static LOCAL_CIDRS_V6: LocalCidrs<Ipv6Be> = LocalCidrs::new();

/// Cgroup id of a pod → 1: its sockets are left alone at connect time. Writer: agent. Full: that is reported, others are translated.
#[btf_map(name = "left_pods")]
pub(crate) static LEFT_PODS: HashMap<u64, u32, 4_096, NO_PREALLOC> = HashMap::new();

/// Interface index → role and masquerade source. Writer: agent.
#[btf_map(name = "devices")]
pub(crate) static DEVICES: HashMap<u32, DeviceValue, 16_384, NO_PREALLOC> = HashMap::new();

/// Interface index of a bridge's port → that of the bridge. Writer: agent. Full: packets masqueraded there get the device's address.
#[btf_map(name = "bridges")]
pub(crate) static BRIDGES: HashMap<u32, u32, 16_384, NO_PREALLOC> = HashMap::new();

/// Interface index → where XDP may send to, and from where it takes frames. Writer: agent.
#[btf_map(name = "xdp_devices")]
pub(crate) static XDP_DEVICES: HashMap<u32, XdpDevice, 1_024, NO_PREALLOC> = HashMap::new();

/// What the routing table is asked with by XDP, and its answer: of the packet, and of who sent it. Writer and reader: the program that runs on this CPU.
#[btf_map(name = "routes")]
pub(crate) static ROUTES: PerCpuArray<Way, 2> = PerCpuArray::new();

/// Digest of a neighbour's Ethernet address → second of the connection table's clock at which the stack had a packet for it from this CPU last that
/// XDP could have sent. Writer: programs.
#[btf_map(name = "neighbours")]
pub(crate) static NEIGHBOURS: PerCpuArray<u32, NEIGHBOUR_SLOTS> = PerCpuArray::new();
pub(crate) const NEIGHBOUR_SLOTS: usize = 1_024;

/// Service id → counters. Writer: programs (entry appears with the first connection), agent deletes.
#[btf_map(name = "service_counters")]
pub(crate) static SERVICE_COUNTERS: PerCpuHashMap<u32, ServiceCounters, 65_536, NO_PREALLOC> = PerCpuHashMap::new();

/// `Reason` → how often. Writer: programs.
#[btf_map(name = "reasons")]
pub(crate) static REASONS: PerCpuArray<u64, { Reason::COUNT }> = PerCpuArray::new();

/// How many pairs moved on from half-open, by table. Writer: programs. Reader: the agent, which makes room when there were many.
#[btf_map(name = "confirmed")]
pub(crate) static CONFIRMED: PerCpuArray<Confirmed, 1> = PerCpuArray::new();

/// By table: how many entries may still come in. Writer: agent, through a mapping, every second; programs subtract.
#[btf_map(name = "spare")]
pub(crate) static SPARE: Array<Spare, { Spare::TABLES }, MMAPABLE> = Array::new();

/// Until when the refusals that this CPU sent keep it busy, in nanoseconds of the monotonic clock: those of TCP (0), all others (1), and
/// from [`refusals::SENDERS`] on those to the senders of one digest. Writer: programs.
#[btf_map(name = "refusals")]
pub(crate) static REFUSALS: PerCpuArray<u64, { refusals::SENDERS as usize + 256 }> = PerCpuArray::new();

/// The clock's last reading: seconds over ticks of the kernel's timer. Writer and readers: programs, on every CPU.
#[btf_map(name = "clock")]
pub(crate) static CLOCK: Array<u64, 1> = Array::new();

/// Of packets that belong to no connection, a digest of whose they are → over a digest of one the second at which it was first seen.
/// Writer and reader: programs, on every CPU. Where two senders share an element, the first has it for a while.
#[btf_map(name = "strays")]
pub(crate) static STRAYS: Array<u64, STRAY_SLOTS> = Array::new();
pub(crate) const STRAY_SLOTS: usize = 65_536;

/// 0 → 1: nobody else translates, so what belongs to no connection of ours belongs to none. Writer: agent.
#[btf_map(name = "alone")]
pub(crate) static ALONE: Array<u32, 1> = Array::new();

pub(crate) mod refusals {
    pub(crate) const SENDERS: u32 = 2;
    /// The rate of one sender is this part of the whole.
    pub(crate) const SHARES: u64 = 10;
}

/// What is being worked on, see `tc::table::Room`. Writer and reader: the program that runs on this CPU.
#[btf_map(name = "work_v4")]
static WORK_V4: PerCpuArray<Work<Ipv4Be>, 8> = PerCpuArray::new();
#[btf_map(name = "work_v6")]
static WORK_V6: PerCpuArray<Work<Ipv6Be>, 8> = PerCpuArray::new();

/// What one function works on. In a map and not on the stack for two reasons: IPv6 entries do not fit the 512 bytes of stack that
/// a chain of calls shares, and what is read back from a map is unknown to the verifier, so that paths which led here
/// by different ways are one path to it.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Work<A> {
    pub(crate) packet: Packet<A>,
    pub(crate) key: ConnectionKey<A>,
    pub(crate) spare_key: ConnectionKey<A>,
    pub(crate) value: ConnectionValue<A>,
    pub(crate) found: ConnectionValue<A>,
    pub(crate) sticky: Sticky,
    pub(crate) picked: Target<A>,
}

/// What a packet is to the translation; a `u8` in [`Packet`].
pub(crate) mod kind {
    /// TCP, UDP or SCTP with its header at hand.
    pub(crate) const WHOLE: u8 = 0;
    /// A later fragment: ports known from the first, no header to rewrite.
    pub(crate) const LATER_FRAGMENT: u8 = 1;
    /// ICMP error: quotes a packet.
    pub(crate) const ICMP_ERROR: u8 = 2;
    /// Any other protocol.
    pub(crate) const OTHER: u8 = 3;
    /// A later fragment whose first one was not seen.
    pub(crate) const LOST_FRAGMENT: u8 = 4;
}

/// A parsed packet.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Packet<A> {
    pub(crate) src: A,
    pub(crate) dst: A,
    pub(crate) sport: Be16,
    pub(crate) dport: Be16,
    /// Offset of the transport header from the start of the frame.
    pub(crate) l4: u32,
    pub(crate) proto: u8,
    /// [`kind`].
    pub(crate) kind: u8,
    /// Those of TCP; for SCTP what stands for them ([`tc::sctp`](crate::tc)).
    pub(crate) tcp_flags: u8,
    /// 1: of more fragments the first.
    pub(crate) more: u8,
}

/// One address family: its maps.
pub(crate) trait Family: Address + Client<Self> {
    type Slot: Slot<Addr = Self>;
    /// The address as aya-log prints it.
    type Shown: aya_log_ebpf::macro_support::IpFormatter + aya_log_ebpf::macro_support::Argument;

    fn shown(self) -> Self::Shown;
    fn frontends() -> &'static Frontends<Self>;
    fn slots() -> &'static Slots<Self::Slot>;
    fn established() -> &'static Connections<Self>;
    fn answered() -> &'static Answered<Self>;
    fn half_open() -> &'static HalfOpen<Self>;
    fn fragments() -> &'static Fragments<Self>;
    fn peers() -> &'static Peers<Self>;
    fn datagrams() -> &'static Datagrams<Self>;
    fn affinity() -> &'static Affinity<Self>;
    fn source_ranges() -> &'static SourceRanges<Self>;
    fn local_cidrs() -> &'static LocalCidrs<Self>;
    fn work() -> &'static PerCpuArray<Work<Self>, 8>;
}

macro_rules! family {
    ($addr:ty, $slot:ty, $shown:ty, $show:expr, $frontends:ident, $slots:ident, $established:ident, $answered:ident, $half_open:ident, $fragments:ident, $peers:ident, $datagrams:ident, $affinity:ident, $source_ranges:ident, $local_cidrs:ident, $work:ident) => {
        impl Family for $addr {
            type Slot = $slot;
            type Shown = $shown;

            #[inline(always)]
            fn shown(self) -> $shown {
                $show(self)
            }
            #[inline(always)]
            fn frontends() -> &'static Frontends<Self> {
                &$frontends
            }
            #[inline(always)]
            fn slots() -> &'static Slots<$slot> {
                &$slots
            }
            #[inline(always)]
            fn established() -> &'static Connections<Self> {
                &$established
            }
            #[inline(always)]
            fn answered() -> &'static Answered<Self> {
                &$answered
            }
            #[inline(always)]
            fn half_open() -> &'static HalfOpen<Self> {
                &$half_open
            }
            #[inline(always)]
            fn fragments() -> &'static Fragments<Self> {
                &$fragments
            }
            #[inline(always)]
            fn peers() -> &'static Peers<Self> {
                &$peers
            }
            #[inline(always)]
            fn datagrams() -> &'static Datagrams<Self> {
                &$datagrams
            }
            #[inline(always)]
            fn affinity() -> &'static Affinity<Self> {
                &$affinity
            }
            #[inline(always)]
            fn source_ranges() -> &'static SourceRanges<Self> {
                &$source_ranges
            }
            #[inline(always)]
            fn local_cidrs() -> &'static LocalCidrs<Self> {
                &$local_cidrs
            }
            #[inline(always)]
            fn work() -> &'static PerCpuArray<Work<Self>, 8> {
                &$work
            }
        }
    };
}

family!(
    Ipv4Be,
    SlotV4,
    u32,
    |addr: Ipv4Be| u32::from_be(addr.0),
    FRONTENDS_V4,
    SLOTS_V4,
    ESTABLISHED_V4,
    ANSWERED_V4,
    HALF_OPEN_V4,
    FRAGMENTS_V4,
    PEERS_V4,
    DATAGRAMS_V4,
    AFFINITY_V4,
    SOURCE_RANGES_V4,
    LOCAL_CIDRS_V4,
    WORK_V4
);
family!(
    Ipv6Be,
    SlotV6,
    [u8; 16],
    |addr: Ipv6Be| addr.octets(),
    FRONTENDS_V6,
    SLOTS_V6,
    ESTABLISHED_V6,
    ANSWERED_V6,
    HALF_OPEN_V6,
    FRAGMENTS_V6,
    PEERS_V6,
    DATAGRAMS_V6,
    AFFINITY_V6,
    SOURCE_RANGES_V6,
    LOCAL_CIDRS_V6,
    WORK_V6
);
