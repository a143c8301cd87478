//! The maps by name: what kind they are, how large by default, which option makes them larger.
//!
//! The programs declare the same maps with their types; this table checks pinned ones against it, and makes the two that no
//! program knows.

use std::mem::size_of;

use proxy_common::{
    Ipv4Be, Ipv6Be,
    affinity::{AffinityKey, AffinityValue},
    connection::{ConnectionKey, ConnectionValue, FragmentKey, FragmentValue},
    counters::{Confirmed, Reason, ServiceCounters, Spare},
    device::{DeviceValue, XdpDevice},
    frontend::{FrontendKey, FrontendValue},
    local_cidr::{LocalCidrKey, LocalCidrValue},
    meta::{Meta, ServiceName},
    slot::{SlotV4, SlotV6},
    socket::{DatagramKey, DatagramValue, PeerRecord},
    source_range::{SourceRangeKey, SourceRangeValue},
};

use super::sys::{MapInfo, map_flag, map_type};

macro_rules! maps {
    ($($variant:ident = $name:literal: $kind:ident<$key:ty, $value:ty>, $flags:expr, $size:expr, $option:literal;)+) => {
        /// Every map, pinned as `maps/<name>`.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
        pub(crate) enum MapName {
            $($variant,)+
        }

        impl MapName {
            pub(crate) const ALL: &[Self] = &[$(Self::$variant,)+];

            pub(crate) const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)+
                }
            }

            /// The option that sets its size; empty where it has a fixed one.
            pub(crate) const fn option(self) -> &'static str {
                match self {
                    $(Self::$variant => $option,)+
                }
            }

            /// As made with `sizes`.
            pub(crate) fn info(self, sizes: &Sizes) -> MapInfo {
                match self {
                    $(Self::$variant => MapInfo {
                        kind: map_type::$kind,
                        key: size_of::<$key>() as u32,
                        value: size_of::<$value>() as u32,
                        max_entries: ($size)(sizes),
                        flags: $flags,
                    },)+
                }
            }
        }
    };
}

maps! {
    FrontendsV4 = "frontends_v4": HASH<FrontendKey<Ipv4Be>, FrontendValue>, map_flag::NO_PREALLOC, |s: &Sizes| s.frontends, "--map-frontends";
    FrontendsV6 = "frontends_v6": HASH<FrontendKey<Ipv6Be>, FrontendValue>, map_flag::NO_PREALLOC, |s: &Sizes| s.frontends, "--map-frontends";
    SlotsV4 = "slots_v4": ARRAY<u32, SlotV4>, map_flag::MMAPABLE, |s: &Sizes| s.slots, "--map-slots";
    SlotsV6 = "slots_v6": ARRAY<u32, SlotV6>, map_flag::MMAPABLE, |s: &Sizes| s.slots, "--map-slots";
    EstablishedV4 = "established_v4": LRU_HASH<ConnectionKey<Ipv4Be>, ConnectionValue<Ipv4Be>>, 0, |s: &Sizes| s.connections, "--map-connections";
    EstablishedV6 = "established_v6": LRU_HASH<ConnectionKey<Ipv6Be>, ConnectionValue<Ipv6Be>>, 0, |s: &Sizes| s.connections, "--map-connections";
    AnsweredV4 = "answered_v4": LRU_HASH<ConnectionKey<Ipv4Be>, ConnectionValue<Ipv4Be>>, 0, |s: &Sizes| (s.connections / 2).max(1), "--map-connections";
    AnsweredV6 = "answered_v6": LRU_HASH<ConnectionKey<Ipv6Be>, ConnectionValue<Ipv6Be>>, 0, |s: &Sizes| (s.connections / 2).max(1), "--map-connections";
    HalfOpenV4 = "half_open_v4": LRU_HASH<ConnectionKey<Ipv4Be>, ConnectionValue<Ipv4Be>>, 0, |s: &Sizes| s.half_open, "--map-half-open";
    HalfOpenV6 = "half_open_v6": LRU_HASH<ConnectionKey<Ipv6Be>, ConnectionValue<Ipv6Be>>, 0, |s: &Sizes| s.half_open, "--map-half-open";
    FragmentsV4 = "fragments_v4": LRU_HASH<FragmentKey<Ipv4Be>, FragmentValue>, 0, |_: &Sizes| 8_192, "";
    FragmentsV6 = "fragments_v6": LRU_HASH<FragmentKey<Ipv6Be>, FragmentValue>, 0, |_: &Sizes| 8_192, "";
    Held = "held": RINGBUF<(), ()>, 0, |_: &Sizes| 1 << 19, "";
    PeersV4 = "peers_v4": SK_STORAGE<u32, PeerRecord<Ipv4Be>>, map_flag::NO_PREALLOC, |_: &Sizes| 0, "";
    PeersV6 = "peers_v6": SK_STORAGE<u32, PeerRecord<Ipv6Be>>, map_flag::NO_PREALLOC, |_: &Sizes| 0, "";
    DatagramsV4 = "datagrams_v4": LRU_HASH<DatagramKey<Ipv4Be>, DatagramValue<Ipv4Be>>, 0, |s: &Sizes| s.datagrams, "--map-datagrams";
    DatagramsV6 = "datagrams_v6": LRU_HASH<DatagramKey<Ipv6Be>, DatagramValue<Ipv6Be>>, 0, |s: &Sizes| s.datagrams, "--map-datagrams";
    AffinityV4 = "affinity_v4": LRU_HASH<AffinityKey, AffinityValue<Ipv4Be>>, 0, |s: &Sizes| s.affinity, "--map-affinity";
    AffinityV6 = "affinity_v6": LRU_HASH<AffinityKey, AffinityValue<Ipv6Be>>, 0, |s: &Sizes| s.affinity, "--map-affinity";
    SourceRangesV4 = "source_ranges_v4": LPM_TRIE<SourceRangeKey<Ipv4Be>, SourceRangeValue>, map_flag::NO_PREALLOC, |s: &Sizes| s.source_ranges, "--map-source-ranges";
    SourceRangesV6 = "source_ranges_v6": LPM_TRIE<SourceRangeKey<Ipv6Be>, SourceRangeValue>, map_flag::NO_PREALLOC, |s: &Sizes| s.source_ranges, "--map-source-ranges";
    LocalCidrsV4 = "local_cidrs_v4": LPM_TRIE<LocalCidrKey<Ipv4Be>, LocalCidrValue>, map_flag::NO_PREALLOC, |_: &Sizes| 256, "";
    LocalCidrsV6 = "local_cidrs_v6": LPM_TRIE<LocalCidrKey<Ipv6Be>, LocalCidrValue>, map_flag::NO_PREALLOC, |_: &Sizes| 256, "";
    Devices = "devices": HASH<u32, DeviceValue>, map_flag::NO_PREALLOC, |_: &Sizes| 16_384, "";
    XdpDevices = "xdp_devices": HASH<u32, XdpDevice>, map_flag::NO_PREALLOC, |_: &Sizes| 1_024, "";
    Bridges = "bridges": HASH<u32, u32>, map_flag::NO_PREALLOC, |_: &Sizes| 16_384, "";
    LeftPods = "left_pods": HASH<u64, u32>, map_flag::NO_PREALLOC, |_: &Sizes| 4_096, "";
    Alone = "alone": ARRAY<u32, u32>, 0, |_: &Sizes| 1, "";
    ServiceCounters = "service_counters": PERCPU_HASH<u32, ServiceCounters>, map_flag::NO_PREALLOC, |s: &Sizes| s.services, "--map-services";
    Reasons = "reasons": PERCPU_ARRAY<u32, u64>, 0, |_: &Sizes| Reason::COUNT as u32, "";
    Confirmed = "confirmed": PERCPU_ARRAY<u32, Confirmed>, 0, |_: &Sizes| 1, "";
    Spare = "spare": ARRAY<u32, Spare>, map_flag::MMAPABLE, |_: &Sizes| Spare::TABLES as u32, "";
    Names = "names": HASH<u32, ServiceName>, map_flag::NO_PREALLOC, |s: &Sizes| s.services, "--map-services";
    Meta = "meta": ARRAY<u32, Meta>, 0, |_: &Sizes| 1, "";
}

impl MapName {
    /// Written by the programs: what is in it must outlive a change of its size.
    pub(crate) const fn is_written_by_programs(self) -> bool {
        !matches!(
            self,
            Self::FrontendsV4
                | Self::FrontendsV6
                | Self::SlotsV4
                | Self::SlotsV6
                | Self::SourceRangesV4
                | Self::SourceRangesV6
                | Self::LocalCidrsV4
                | Self::LocalCidrsV6
                | Self::Devices
                | Self::Bridges
                | Self::XdpDevices
                | Self::LeftPods
                | Self::Alone
                | Self::Spare
                | Self::Held
                | Self::Names
                | Self::Meta
        )
    }

    /// No program refers to it; the agent makes it.
    pub(crate) const fn is_unknown_to_programs(self) -> bool {
        matches!(self, Self::Names | Self::Meta)
    }
}

impl std::fmt::Display for MapName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// How many entries the maps hold; each is an option, and each counts for one address family.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Sizes {
    pub frontends: u32,
    pub slots: u32,
    pub services: u32,
    pub connections: u32,
    pub half_open: u32,
    pub datagrams: u32,
    pub affinity: u32,
    pub source_ranges: u32,
}

impl Default for Sizes {
    fn default() -> Self {
        Self {
            frontends: 65_536,
            slots: 1_048_576,
            services: 65_536,
            connections: 262_144,
            half_open: 65_536,
            datagrams: 65_536,
            affinity: 65_536,
            source_ranges: 65_536,
        }
    }
}
