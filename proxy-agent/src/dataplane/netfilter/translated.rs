//! Connections that conntrack translates for rules that are gone.
//!
//! The rules are for the first packet of a flow alone; what follows is translated by its entry, as long as somebody has conntrack and
//! translation switched on in this network namespace. So what is retired keeps that, and nothing else.

use std::{io, sync::PoisonError};

use super::conntrack::{self, Entry, Socket};
use crate::{
    dataplane::{DataplaneError, former::Known},
    desired::Frontend,
    model::Family,
};

/// Where another of netfilter's modes takes over there is nothing to keep, and `known` is none: its own rules have it switched on.
#[derive(Debug)]
pub(crate) struct Translated {
    known: Option<Known>,
}

impl Translated {
    pub(crate) const fn new(known: Option<Known>) -> Self {
        Self { known }
    }

    /// Flows have to be waited for.
    pub(crate) const fn lasts(&self) -> bool {
        self.known.is_some()
    }

    /// Frontends of what is retired: the Service of one may be gone by now, and its connections go on.
    pub(crate) fn learn(&self, frontends: impl IntoIterator<Item = Frontend>) {
        if let Some(known) = &self.known {
            known.lock().unwrap_or_else(PoisonError::into_inner).extend(frontends);
        }
    }

    pub(crate) fn flows(&self) -> Result<u64, DataplaneError> {
        let Some(known) = &self.known else { return Ok(0) };
        let known = known.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let of = |family| of(family, |frontend| known.contains(&frontend));
        Family::BOTH.into_iter().map(of).sum::<io::Result<u64>>().map_err(failed)
    }
}

/// Open connections whose destination is translated, and was one of these.
pub(super) fn of(family: Family, is_meant: impl Fn(Frontend) -> bool) -> io::Result<u64> {
    let mut flows = 0;
    if !conntrack::is_tracking() {
        return Ok(flows);
    }
    Socket::open()?.all_entries(
        family,
        |Entry { protocol, asked: (addr, port), translated, zoned, over, .. }| {
            flows += u64::from(translated && !zoned && !over && is_meant(Frontend { addr, port, protocol }));
        },
    )?;
    Ok(flows)
}

pub(super) fn failed(source: io::Error) -> DataplaneError {
    DataplaneError::Kernel {
        what: "count the connections that conntrack translates (is nf_conntrack_netlink there?)".into(),
        source,
    }
}
