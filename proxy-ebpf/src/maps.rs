//! Every map of the datapath. Read this file and you know the design (docs/maps.md has the fields).
//!
//! `_v4`/`_v6` pairs hold the same types over the two address families; programs reach them through [`Family`], so there is
//! one code path. Sizes here are defaults; the agent sets them at load time.

use aya_ebpf::{
    bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC},
    btf_maps::{Array, HashMap, LruHashMap, PerCpuArray, PerCpuHashMap, SkStorage},
    macros::btf_map,
};
use proxy_common::{
    Address, Ipv4Be, Ipv6Be,
    connection::{ConnectionKey, ConnectionValue, FragmentKey, FragmentValue},
    counters::{Reason, ServiceCounters},
    device::DeviceValue,
    frontend::{FrontendKey, FrontendValue},
    slot::{Slot, SlotV4, SlotV6},
    socket::{DatagramKey, DatagramValue, PeerRecord},
};

const NO_PREALLOC: usize = BPF_F_NO_PREALLOC as usize;
const MMAPABLE: usize = BPF_F_MMAPABLE as usize;

pub(crate) type Frontends<A> = HashMap<FrontendKey<A>, FrontendValue, 65_536, NO_PREALLOC>;
pub(crate) type Slots<S> = Array<S, 1_048_576, MMAPABLE>;
pub(crate) type Connections<A> = LruHashMap<ConnectionKey<A>, ConnectionValue<A>, 262_144>;
pub(crate) type HalfOpen<A> = LruHashMap<ConnectionKey<A>, ConnectionValue<A>, 65_536>;
pub(crate) type Fragments<A> = LruHashMap<FragmentKey<A>, FragmentValue, 8_192>;
pub(crate) type Peers<A> = SkStorage<PeerRecord<A>>;
pub(crate) type Datagrams<A> = LruHashMap<DatagramKey<A>, DatagramValue<A>, 65_536>;

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

/// Flows that both sides have spoken on. Writer: programs. Full: the least recently used goes, its pair repairs it.
#[btf_map(name = "established_v4")]
static ESTABLISHED_V4: Connections<Ipv4Be> = Connections::new();
#[btf_map(name = "established_v6")]
static ESTABLISHED_V6: Connections<Ipv6Be> = Connections::new();

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

/// Interface index → role and masquerade source. Writer: agent.
#[btf_map(name = "devices")]
pub(crate) static DEVICES: HashMap<u32, DeviceValue, 16_384, NO_PREALLOC> = HashMap::new();

/// Service id → counters. Writer: programs (entry appears with the first connection), agent deletes.
#[btf_map(name = "service_counters")]
pub(crate) static SERVICE_COUNTERS: PerCpuHashMap<u32, ServiceCounters, 65_536, NO_PREALLOC> = PerCpuHashMap::new();

/// `Reason` → how often. Writer: programs.
#[btf_map(name = "reasons")]
pub(crate) static REASONS: PerCpuArray<u64, { Reason::COUNT }> = PerCpuArray::new();

/// One address family: its maps.
pub(crate) trait Family: Address {
    type Slot: Slot<Addr = Self>;

    fn frontends() -> &'static Frontends<Self>;
    fn slots() -> &'static Slots<Self::Slot>;
    fn established() -> &'static Connections<Self>;
    fn half_open() -> &'static HalfOpen<Self>;
    fn fragments() -> &'static Fragments<Self>;
    fn peers() -> &'static Peers<Self>;
    fn datagrams() -> &'static Datagrams<Self>;
}

macro_rules! family {
    ($addr:ty, $slot:ty, $frontends:ident, $slots:ident, $established:ident, $half_open:ident, $fragments:ident, $peers:ident, $datagrams:ident) => {
        impl Family for $addr {
            type Slot = $slot;

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
        }
    };
}

family!(Ipv4Be, SlotV4, FRONTENDS_V4, SLOTS_V4, ESTABLISHED_V4, HALF_OPEN_V4, FRAGMENTS_V4, PEERS_V4, DATAGRAMS_V4);
family!(Ipv6Be, SlotV6, FRONTENDS_V6, SLOTS_V6, ESTABLISHED_V6, HALF_OPEN_V6, FRAGMENTS_V6, PEERS_V6, DATAGRAMS_V6);
