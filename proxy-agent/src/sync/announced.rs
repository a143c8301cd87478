//! The dataplane behind the one way to call it.

use std::{borrow::Cow, collections::BTreeMap, sync::Arc, time::Instant};

use super::table::Table;
use crate::{
    dataplane::{Capabilities, Dataplane, Failure, Report},
    desired::{Changes, DesiredState, Frontend, FrontendSpec},
};

/// Any call may block for ever in the kernel, so each is announced before it is made and health tells an agent that hangs in it from
/// one that has nothing to do (contract A117, A118).
///
/// What the dataplane cannot express is not asked of it: it is taken out, and reported as failed.
pub(super) struct Announced {
    dataplane: Box<dyn Dataplane>,
    capabilities: Capabilities,
}

/// By frontend, why it cannot be in force.
type Refused = BTreeMap<Frontend, Failure>;

impl Announced {
    pub(super) fn new(dataplane: Box<dyn Dataplane>) -> Self {
        Self { capabilities: dataplane.capabilities(), dataplane }
    }

    pub(super) const fn name(&self) -> &'static str {
        self.capabilities.name
    }

    pub(super) const fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    /// `since`: since when something waits for this call, if anything does.
    pub(super) fn call<T>(
        &mut self,
        table: &mut Table,
        since: Option<Instant>,
        call: impl FnOnce(&mut dyn Dataplane) -> T,
    ) -> T {
        let alone = table.announce(since);
        let answer = call(&mut *self.dataplane);
        if alone {
            table.returned();
        }
        answer
    }

    pub(super) fn resync(&mut self, table: &mut Table, since: Option<Instant>, desired: &DesiredState) -> Report {
        let mut desired = Cow::Borrowed(desired);
        let refused = self.refused(&desired.frontends);
        for frontend in refused.keys() {
            desired.to_mut().frontends.remove(frontend);
        }
        let report = self.call(table, since, |dataplane| dataplane.resync(&desired));
        with(report, refused)
    }

    pub(super) fn apply(&mut self, table: &mut Table, since: Option<Instant>, changes: &Changes) -> Report {
        let mut changes = Cow::Borrowed(changes);
        let refused = self.refused(&changes.set);
        for frontend in refused.keys() {
            // What it was before may be in force.
            let changes = changes.to_mut();
            changes.set.remove(frontend);
            changes.remove.insert(*frontend);
        }
        let report = self.call(table, since, |dataplane| dataplane.apply(&changes));
        with(report, refused)
    }

    fn refused(&self, frontends: &BTreeMap<Frontend, Arc<FrontendSpec>>) -> Refused {
        let lacks = |(frontend, spec): (&Frontend, &Arc<FrontendSpec>)| {
            Some((*frontend, self.capabilities.lacks(frontend, spec)?))
        };
        frontends.iter().filter_map(lacks).collect()
    }
}

fn with(mut report: Report, refused: Refused) -> Report {
    for (frontend, failure) in refused {
        // One that could not be taken out either says that: it is tried again.
        report.failed.entry(frontend).or_insert(failure);
    }
    report
}
