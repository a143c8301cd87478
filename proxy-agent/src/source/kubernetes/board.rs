//! How the kinds stand, and what that makes of the whole.

use std::sync::{Mutex, PoisonError};

use tokio::sync::watch;
use tracing::{info, warn};

use crate::model::SourceState;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    Services,
    Slices,
    Node,
    Pods,
    Namespaces,
}

/// As many as there are.
pub(super) const KINDS: usize = 5;

impl Kind {
    const ALL: [Self; KINDS] = [Self::Services, Self::Slices, Self::Node, Self::Pods, Self::Namespaces];

    /// Its own of what there is one of for each.
    pub(super) fn of<T>(self, all: &mut [T; KINDS]) -> &mut T {
        let [services, slices, node, pods, namespaces] = all;
        match self {
            Self::Services => services,
            Self::Slices => slices,
            Self::Node => node,
            Self::Pods => pods,
            Self::Namespaces => namespaces,
        }
    }

    const fn is_optional(self) -> bool {
        matches!(self, Self::Pods | Self::Namespaces)
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Services => "Services",
            Self::Slices => "EndpointSlices",
            Self::Node => "Node",
            Self::Pods => "Pods",
            Self::Namespaces => "Namespaces",
        }
    }
}

/// How one kind stands.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Standing {
    /// No complete list yet; why not, if something is in the way.
    Waiting(Option<String>),
    Good,
    /// Listed once, out of reach now.
    Failing(String),
}

pub(super) struct Board {
    standings: Mutex<[Standing; KINDS]>,
    state: watch::Sender<SourceState>,
}

impl Board {
    pub(super) fn new(state: watch::Sender<SourceState>) -> Self {
        let standings = [const { Standing::Waiting(None) }; KINDS];
        state.send_replace(whole(&standings));
        Self { standings: Mutex::new(standings), state }
    }

    /// The last complete list of this kind is whole and followed, or would be if `missing` did not say otherwise.
    pub(super) fn good(&self, kind: Kind, missing: Option<String>) {
        self.update(kind, |_| missing.map_or(Standing::Good, |missing| Standing::Waiting(Some(missing))));
    }

    /// Something went wrong. What was listed before stays listed.
    pub(super) fn failing(&self, kind: Kind, why: String) {
        self.update(kind, |standing| match standing {
            Standing::Waiting(_) => Standing::Waiting(Some(why)),
            Standing::Good | Standing::Failing(_) => Standing::Failing(why),
        });
    }

    fn update(&self, kind: Kind, to: impl FnOnce(&Standing) -> Standing) {
        let mut standings = self.standings.lock().unwrap_or_else(PoisonError::into_inner);
        let standing = kind.of(&mut standings);
        let to = to(standing);
        if *standing == to {
            return;
        }
        match &to {
            Standing::Good => info!(kind = kind.name(), "in step with the API server"),
            Standing::Waiting(Some(why)) | Standing::Failing(why) => warn!(kind = kind.name(), "{why}"),
            Standing::Waiting(None) => {}
        }
        *standing = to;
        let whole = whole(&standings);
        // Under the lock: two kinds that change at once must not publish their states in the wrong order.
        self.state.send_if_modified(|state| {
            let news = *state != whole;
            *state = whole;
            news
        });
    }
}

/// Services wait for nothing that they are not made of: a list of Pods or Namespaces that cannot be had is a reason to be stale.
fn whole(standings: &[Standing; KINDS]) -> SourceState {
    let missing: Vec<String> = Kind::ALL
        .iter()
        .zip(standings)
        .filter(|(kind, _)| !kind.is_optional())
        .filter_map(|(kind, standing)| match standing {
            Standing::Waiting(None) => Some(kind.name().to_owned()),
            Standing::Waiting(Some(why)) => Some(format!("{}: {why}", kind.name())),
            Standing::Good | Standing::Failing(_) => None,
        })
        .collect();
    if !missing.is_empty() {
        return SourceState::Listing { missing };
    }
    let mut reasons: Vec<(&str, Vec<&str>)> = Vec::new();
    for (kind, standing) in Kind::ALL.iter().zip(standings) {
        let why = match standing {
            Standing::Failing(why) => why,
            Standing::Waiting(Some(why)) if kind.is_optional() => why,
            Standing::Waiting(_) | Standing::Good => continue,
        };
        // All of them usually fail for one reason: it is said once.
        match reasons.iter_mut().find(|(known, _)| known == why) {
            Some((_, kinds)) => kinds.push(kind.name()),
            None => reasons.push((why, vec![kind.name()])),
        }
    }
    if reasons.is_empty() {
        return SourceState::Synced;
    }
    let reasons: Vec<String> = reasons.into_iter().map(|(why, kinds)| format!("{}: {why}", kinds.join(", "))).collect();
    SourceState::Stale { reason: reasons.join("; ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listing(missing: &[&str]) -> SourceState {
        SourceState::Listing { missing: missing.iter().map(|&kind| kind.to_owned()).collect() }
    }

    #[test]
    fn services_do_not_wait_for_pods() {
        let (state, states) = watch::channel(SourceState::Synced);
        let board = Board::new(state);
        for kind in [Kind::Services, Kind::Slices, Kind::Node] {
            board.good(kind, None);
        }
        assert_eq!(*states.borrow(), SourceState::Synced);
        board.failing(Kind::Pods, "forbidden".into());
        assert_eq!(*states.borrow(), SourceState::Stale { reason: "Pods: forbidden".into() });
        board.good(Kind::Pods, None);
        assert_eq!(*states.borrow(), SourceState::Synced);
    }

    #[test]
    fn one_state_of_three() {
        let (state, states) = watch::channel(SourceState::Synced);
        let board = Board::new(state);
        let is = |expected: SourceState| assert_eq!(*states.borrow(), expected);
        is(listing(&["Services", "EndpointSlices", "Node"]));
        board.failing(Kind::Services, "refused".into());
        is(listing(&["Services: refused", "EndpointSlices", "Node"]));
        board.good(Kind::Services, None);
        board.good(Kind::Slices, None);
        board.good(Kind::Node, Some("there is no Node n1".into()));
        is(listing(&["Node: there is no Node n1"]));
        // Once listed, always listed: out of reach is another matter than not yet there.
        board.failing(Kind::Services, "refused".into());
        is(listing(&["Node: there is no Node n1"]));
        board.good(Kind::Node, None);
        is(SourceState::Stale { reason: "Services: refused".into() });
        board.failing(Kind::Slices, "refused".into());
        board.failing(Kind::Node, "forbidden".into());
        is(SourceState::Stale { reason: "Services, EndpointSlices: refused; Node: forbidden".into() });
        for kind in Kind::ALL {
            board.good(kind, None);
        }
        is(SourceState::Synced);
    }
}
