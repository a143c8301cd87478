//! An address family as user space sees it: one code path, two sets of maps.

use proxy_common::{
    Address, Ipv4Be, Ipv6Be,
    frontend::{FrontendKey, FrontendValue},
    slot::{Slot, SlotV4, SlotV6},
    source_range::{SourceRangeKey, SourceRangeValue},
};

use super::{layout::MapName, maps::MappedArray, sys::Map};

pub(crate) trait Family: Address + aya::Pod + std::hash::Hash + Send + Sync {
    type Slot: Slot<Addr = Self> + aya::Pod + Send + Sync;
    type Key: Into<FrontendKey<Self>> + From<FrontendKey<Self>> + aya::Pod + Send + Sync;

    type SourceKey: Into<SourceRangeKey<Self>> + From<SourceRangeKey<Self>> + aya::Pod + Send + Sync;

    const FRONTENDS: MapName;
    const SLOTS: MapName;
    const SOURCE_RANGES: MapName;

    /// This family's of a pair of maps.
    fn frontends<'a>(v4: &'a FrontendMap<Ipv4Be>, v6: &'a FrontendMap<Ipv6Be>) -> &'a Map<Self::Key, FrontendValue>;
    fn slots<'a>(v4: &'a MappedArray<SlotV4>, v6: &'a MappedArray<SlotV6>) -> &'a MappedArray<Self::Slot>;
    fn sources<'a>(v4: &'a SourceMap<Ipv4Be>, v6: &'a SourceMap<Ipv6Be>) -> &'a Map<Self::SourceKey, SourceRangeValue>;
}

pub(crate) type SourceMap<A> = Map<SourceRangeKey<A>, SourceRangeValue>;
pub(crate) type FrontendMap<A> = Map<FrontendKey<A>, FrontendValue>;

impl Family for Ipv4Be {
    type Slot = SlotV4;
    type Key = FrontendKey<Self>;
    type SourceKey = SourceRangeKey<Self>;

    const FRONTENDS: MapName = MapName::FrontendsV4;
    const SLOTS: MapName = MapName::SlotsV4;
    const SOURCE_RANGES: MapName = MapName::SourceRangesV4;

    fn frontends<'a>(v4: &'a FrontendMap<Ipv4Be>, _: &'a FrontendMap<Ipv6Be>) -> &'a Map<Self::Key, FrontendValue> {
        v4
    }

    fn slots<'a>(v4: &'a MappedArray<SlotV4>, _: &'a MappedArray<SlotV6>) -> &'a MappedArray<Self::Slot> {
        v4
    }

    fn sources<'a>(v4: &'a SourceMap<Ipv4Be>, _: &'a SourceMap<Ipv6Be>) -> &'a Map<Self::SourceKey, SourceRangeValue> {
        v4
    }
}

impl Family for Ipv6Be {
    type Slot = SlotV6;
    type Key = FrontendKey<Self>;
    type SourceKey = SourceRangeKey<Self>;

    const FRONTENDS: MapName = MapName::FrontendsV6;
    const SLOTS: MapName = MapName::SlotsV6;
    const SOURCE_RANGES: MapName = MapName::SourceRangesV6;

    fn frontends<'a>(_: &'a FrontendMap<Ipv4Be>, v6: &'a FrontendMap<Ipv6Be>) -> &'a Map<Self::Key, FrontendValue> {
        v6
    }

    fn slots<'a>(_: &'a MappedArray<SlotV4>, v6: &'a MappedArray<SlotV6>) -> &'a MappedArray<Self::Slot> {
        v6
    }

    fn sources<'a>(_: &'a SourceMap<Ipv4Be>, v6: &'a SourceMap<Ipv6Be>) -> &'a Map<Self::SourceKey, SourceRangeValue> {
        v6
    }
}
