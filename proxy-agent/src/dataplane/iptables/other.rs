//! What an earlier run left with the other flavour: it goes once everything is in force with this one.

use super::{
    Half, Iptables,
    left::{self, Left},
};
use crate::{dataplane::netfilter::State, model::Family};

impl Iptables {
    /// By an earlier run, with the other flavour.
    pub(super) fn noted_elsewhere(&self, family: Family) -> Option<i32> {
        self.leftovers?.save(family).ok()?.route_localnet()
    }

    pub(super) fn remove_other(&mut self) {
        if self.halves.iter().all(|half| half.state != State::Unknown)
            && let Some(other) = self.leftovers.take()
        {
            tracing::info!(flavour = %other.flavour, "what an earlier run left with the other flavour of iptables is removed");
            let shields = |half: &Half| half.state == State::Filled && half.shadow.renderer.shields_loopback();
            // Who goes on with the setting keeps the neighbours out.
            let goes_on = self.halves.iter().any(shields);
            let remove = |left: Left| if goes_on { left.remove_rules() } else { left.remove_with(&self.loopback) };
            if let Err(error) = left::of(other).each(remove) {
                tracing::warn!(%error, flavour = %other.flavour, "what an earlier run left stays");
                self.leftovers = Some(other);
            }
        }
    }
}
