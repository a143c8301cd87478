//! An address family as user space sees it: one code path, two sets of maps.

use proxy_common::{
    Address, Ipv4Be, Ipv6Be,
    frontend::FrontendKey,
    slot::{Slot, SlotV4, SlotV6},
};

use crate::{dataplane::ebpf::layout::MapName, model};

pub(crate) trait Family: Address + aya::Pod + std::hash::Hash + Send + Sync {
    type Slot: Slot<Addr = Self> + aya::Pod + Send + Sync;
    type Key: Into<FrontendKey<Self>> + From<FrontendKey<Self>> + aya::Pod + Send + Sync;

    const FAMILY: model::Family;
    const FRONTENDS: MapName;
    const SLOTS: MapName;
}

impl Family for Ipv4Be {
    type Slot = SlotV4;
    type Key = FrontendKey<Self>;

    const FAMILY: model::Family = model::Family::V4;
    const FRONTENDS: MapName = MapName::FrontendsV4;
    const SLOTS: MapName = MapName::SlotsV4;
}

impl Family for Ipv6Be {
    type Slot = SlotV6;
    type Key = FrontendKey<Self>;

    const FAMILY: model::Family = model::Family::V6;
    const FRONTENDS: MapName = MapName::FrontendsV6;
    const SLOTS: MapName = MapName::SlotsV6;
}
