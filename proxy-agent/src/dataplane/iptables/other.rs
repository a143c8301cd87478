//! What an earlier run left with the other flavour: it goes once this one is in force, as what other modes left does.
//!
//! What it noted of `route_localnet` is taken over before, and with it the rule that keeps the neighbours out, where that has to stay: so nothing
//! of the other flavour has to.

use std::time::Instant;

use super::{
    AGAIN, Half, Iptables,
    flavour::Tools,
    left::{self, Left},
};
use crate::{dataplane::netfilter::State, model::Family};

/// See the module; as long as it is there.
#[derive(Debug)]
pub(super) struct Other {
    tools: Tools,
    /// It serves until this one is in force.
    may_go: bool,
    due: Instant,
    trouble: Option<String>,
}

impl Other {
    pub(super) fn new(tools: Tools) -> Self {
        Self { tools, may_go: false, due: Instant::now(), trouble: None }
    }

    pub(super) const fn let_go(&mut self) {
        self.may_go = true;
    }

    /// What `route_localnet` was.
    pub(super) fn noted(&self) -> Option<i32> {
        self.tools.save(Family::V4).ok()?.route_localnet()
    }

    /// Why not all of it is gone.
    pub(super) fn trouble(&self) -> Option<String> {
        self.trouble.clone()
    }
}

impl Iptables {
    pub(super) fn remove_other(&mut self, now: Instant) {
        let Self { halves, other, loopback, .. } = self;
        let is_known = halves.iter().all(|half| half.state != State::Unknown);
        let may_go = |other: &&mut Other| other.may_go && other.due <= now;
        let Some(Other { tools, may_go: _, due, trouble }) = other.as_mut().filter(may_go) else { return };
        let flavour = tools.flavour;
        if !is_known {
            *trouble = Some(format!("those of iptables ({flavour}) stay until rules of both families can be written"));
            return;
        }
        // Ours keeps the neighbours out from now on.
        let is_shielded = halves.iter().any(Half::shields);
        let remove = |left: Left| if is_shielded { left.remove_rules() } else { left.remove_with(loopback) };
        let found = left::of(*tools);
        let some = !found.left.is_empty();
        match found.each(remove) {
            Ok(()) => {
                if some {
                    tracing::info!(%flavour, "what an earlier run left with the other flavour of iptables is removed");
                }
                *other = None;
            }
            Err(error) => {
                *due = now + AGAIN;
                *trouble = Some(format!("not all of them are gone from iptables ({flavour}): {error}"));
            }
        }
    }
}
