//! Which backends flows may go on with: what `plan` said of each frontend that is in force. Every dataplane ends what leads elsewhere
//! (contract A103–A108), and counts it.

use std::{
    collections::{BTreeSet, HashMap},
    net::IpAddr,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use proxy_common::{Address, slot::Target};

use super::Report;
use crate::{
    desired::{Backend, BackendSet, Changes, DesiredState, Frontend},
    model::{Port, Protocol},
};

/// How long an endpoint must be gone before TCP connections to it are reset: one that moves from slice to slice may be in none
/// of them for a moment, and nothing brings a connection back.
pub(crate) const TCP_GRACE: Duration = Duration::from_secs(3);

/// What was ended since the agent started.
#[derive(Debug, Default)]
pub struct Ended {
    pub(crate) udp_flows: AtomicU64,
    pub(crate) tcp_flows: AtomicU64,
    pub(crate) masquerades: AtomicU64,
    pub(crate) sockets: AtomicU64,
    /// Pairs of entries of flows that were over by themselves.
    pub(crate) over: AtomicU64,
}

impl Ended {
    /// What is counted, by name.
    pub fn counts(&self) -> [(&'static str, u64); 5] {
        let Self { udp_flows, tcp_flows, masquerades, sockets, over } = self;
        let counts = [
            ("udp_flow", udp_flows),
            ("tcp_flow", tcp_flows),
            ("masquerade", masquerades),
            ("socket", sockets),
            ("over", over),
        ];
        counts.map(|(name, count)| (name, count.load(Ordering::Relaxed)))
    }
}

/// What becomes of the flows of one frontend.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Keep {
    /// Nothing ends them: the protocol says so, or what is in force is not known.
    All,
    /// They go on as long as they lead to one of these.
    Only(BackendSet),
}

/// Whether a set has a backend; of TCP, whether it has its address (see [`FrontendSpec::alive`](crate::desired::FrontendSpec)).
fn has(set: &BackendSet, protocol: Protocol, backend: &Backend) -> bool {
    match protocol {
        Protocol::Tcp => set.binary_search_by_key(&backend.addr, |backend| backend.addr).is_ok(),
        Protocol::Udp | Protocol::Sctp => set.binary_search(backend).is_ok(),
    }
}

impl From<Option<BackendSet>> for Keep {
    fn from(alive: Option<BackendSet>) -> Self {
        alive.map_or(Self::All, Self::Only)
    }
}

/// A change of what is in force.
#[derive(Debug, Default)]
pub(crate) struct Change {
    pub(crate) set: Vec<(Frontend, Keep)>,
    pub(crate) removed: BTreeSet<Frontend>,
}

impl Change {
    /// What of `changes` is in force; `None` if nothing is.
    pub(crate) fn of(changes: &Changes, report: &Report) -> Option<Self> {
        let landed = |frontend: &Frontend| !report.failed.contains_key(frontend);
        let set = changes.set.iter().filter(|(frontend, _)| landed(frontend));
        let set: Vec<_> = set.map(|(frontend, spec)| (*frontend, spec.alive.clone().into())).collect();
        let removed: BTreeSet<_> = changes.remove.iter().copied().filter(landed).collect();
        (!set.is_empty() || !removed.is_empty()).then_some(Self { set, removed })
    }
}

/// Everything that should be in force; `report` says what is not.
pub(crate) fn all(desired: &DesiredState, report: &Report) -> Vec<(Frontend, Keep)> {
    let keep = |(frontend, spec): (&Frontend, &std::sync::Arc<crate::desired::FrontendSpec>)| {
        let keep = if report.failed.contains_key(frontend) { Keep::All } else { spec.alive.clone().into() };
        (*frontend, keep)
    };
    let mut all: Vec<_> = desired.frontends.iter().map(keep).collect();
    // Those that could not be removed.
    all.extend(report.failed.keys().filter(|f| !desired.frontends.contains_key(f)).map(|f| (*f, Keep::All)));
    all
}

#[derive(Debug, Default)]
pub(crate) struct Alive {
    frontends: HashMap<Frontend, Keep>,
    /// All were named once: from then on one that is new had no flows, or they were seen to when it went.
    complete: bool,
    /// How many of them are TCP and may end flows: mostly none, and then TCP's tables are left alone.
    resetting: usize,
    /// TCP backends that were lost a moment ago, and until when that does not count.
    fading: HashMap<(Frontend, IpAddr), Instant>,
    /// TCP frontends of which it is not known yet what they lost, and until when.
    fresh: HashMap<Frontend, Instant>,
}

impl Alive {
    pub(crate) fn replace(&mut self, all: Vec<(Frontend, Keep)>, now: Instant) {
        let Self { frontends, .. } = &*self;
        // What stands stands on: its endpoints are gone for as long as they were.
        let kept: BTreeSet<Frontend> = all.iter().map(|(frontend, _)| *frontend).collect();
        let removed = frontends.keys().filter(|frontend| !kept.contains(frontend)).copied().collect();
        self.apply(Change { set: all, removed }, now);
        self.complete = true;
    }

    /// Carries a change out; says whether UDP flows may have lost their backend by it. What only gained has lost nothing: a change
    /// that ends no flow costs no walk over them (contract A104).
    pub(crate) fn apply(&mut self, Change { set, removed }: Change, now: Instant) -> bool {
        let mut lost = false;
        for frontend in removed {
            self.put(frontend, None, now);
            // A TCP flow outlives its Service.
            lost |= frontend.protocol == Protocol::Udp;
        }
        for (frontend, keep) in set {
            lost |= self.put(frontend, Some(keep), now) && frontend.protocol == Protocol::Udp;
        }
        lost
    }

    /// Whether the frontend may have lost a backend.
    fn put(&mut self, frontend: Frontend, new: Option<Keep>, now: Instant) -> bool {
        let Frontend { protocol, .. } = frontend;
        let old = self.frontends.get(&frontend);
        let gone: Option<Vec<Backend>> = match (old, &new) {
            (_, None | Some(Keep::All)) => Some(vec![]),
            (Some(Keep::Only(old)), Some(Keep::Only(new))) => {
                Some(old.iter().filter(|backend| !has(new, protocol, backend)).copied().collect())
            }
            (None, Some(Keep::Only(_))) if self.complete && frontend.protocol == Protocol::Udp => Some(vec![]),
            // What the frontend led to before is not known; entries may stem from an earlier one, which a TCP flow outlives.
            (None | Some(Keep::All), Some(Keep::Only(_))) => None,
        };
        let lost = gone.as_ref().is_none_or(|gone| !gone.is_empty());
        if frontend.protocol == Protocol::Tcp {
            let resets = |keep: Option<&Keep>| usize::from(matches!(keep, Some(Keep::Only(_))));
            self.resetting = self.resetting + resets(new.as_ref()) - resets(old);
            match (gone, &new) {
                (None, _) => drop(self.fresh.insert(frontend, now + TCP_GRACE)),
                (Some(gone), Some(Keep::Only(new))) => {
                    let is_back = |addr: &IpAddr| new.binary_search_by_key(addr, |backend| backend.addr).is_ok();
                    self.fading.retain(|(at, addr), _| *at != frontend || !is_back(addr));
                    self.fading.extend(gone.into_iter().map(|backend| ((frontend, backend.addr), now + TCP_GRACE)));
                }
                (Some(_), _) => {}
            }
        }
        match new {
            Some(new) => self.frontends.insert(frontend, new),
            None => self.frontends.remove(&frontend),
        };
        lost
    }

    /// Forgets who was lost long enough ago. Whether there was any, and when to ask again.
    pub(crate) fn settle(&mut self, now: Instant) -> (bool, Option<Instant>) {
        let Self { fading, fresh, .. } = self;
        let before = fading.len() + fresh.len();
        fading.retain(|_, until| *until > now);
        fresh.retain(|_, until| *until > now);
        (self.fading.len() + self.fresh.len() < before, self.next_fade())
    }

    /// When the next one that was lost counts as such.
    pub(crate) fn next_fade(&self) -> Option<Instant> {
        self.fading.values().chain(self.fresh.values()).min().copied()
    }

    /// All that should be in force was named.
    pub(crate) const fn is_complete(&self) -> bool {
        self.complete
    }

    /// Whether it is one of those that are known to be in force.
    pub(crate) fn knows(&self, frontend: &Frontend) -> bool {
        self.frontends.contains_key(frontend)
    }

    pub(crate) fn frontends(&self) -> impl Iterator<Item = &Frontend> {
        self.frontends.keys()
    }

    /// Nothing ends its flows.
    pub(crate) fn keeps_all(&self, frontend: &Frontend) -> bool {
        self.frontends.get(frontend) == Some(&Keep::All)
    }

    pub(crate) const fn resets_tcp(&self) -> bool {
        self.resetting > 0
    }

    /// Whether what led from this VIP to this backend has lost it, in the words of the maps. What has no port leads nowhere.
    pub(crate) fn has_lost<A: Address>(&self, protocol: Protocol, vip: Target<A>, backend: Target<A>) -> bool {
        let place = |Target { addr, port }: Target<A>| Some((addr.to_ip(), Port::new(port.to_host())?));
        let Some(((vip, port), (addr, backend_port))) = place(vip).zip(place(backend)) else { return false };
        self.is_lost(&Frontend { addr: vip, port, protocol }, &Backend { addr, port: backend_port })
    }

    /// Whether a flow from `frontend` to `backend` has lost it.
    pub(crate) fn is_lost(&self, frontend: &Frontend, backend: &Backend) -> bool {
        match self.frontends.get(frontend) {
            Some(Keep::Only(alive)) => {
                !has(alive, frontend.protocol, backend)
                    && !self.fresh.contains_key(frontend)
                    && !self.fading.contains_key(&(*frontend, backend.addr))
            }
            Some(Keep::All) => false,
            // Whatever is in our tables came by a frontend: this one is gone. A UDP flow goes with it, for its backend's address
            // may be another pod's tomorrow (contract F54); a TCP flow has an end of its own.
            None => frontend.protocol == Protocol::Udp,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Port;

    fn frontend(port: u16, protocol: Protocol) -> Frontend {
        Frontend { addr: [10, 96, 0, 1].into(), port: Port::new(port).unwrap(), protocol }
    }

    fn backend(n: u8) -> Backend {
        Backend { addr: [10, 0, 0, n].into(), port: Port::new(53).unwrap() }
    }

    fn only(backends: &[u8]) -> Keep {
        Keep::Only(backends.iter().map(|n| backend(*n)).collect())
    }

    fn set(frontend: Frontend, keep: Keep) -> Change {
        Change { set: vec![(frontend, keep)], removed: BTreeSet::new() }
    }

    fn remove(frontend: Frontend) -> Change {
        Change { set: vec![], removed: [frontend].into() }
    }

    #[test]
    fn only_what_lost_a_backend_is_a_loss() {
        let (dns, now) = (frontend(53, Protocol::Udp), Instant::now());
        let mut alive = Alive::default();
        assert!(alive.apply(set(dns, only(&[1, 2])), now), "a frontend that is new here may have been there before us");
        assert!(!alive.apply(set(dns, only(&[1, 2, 3])), now));
        assert!(!alive.apply(set(dns, only(&[1, 2, 3])), now));
        assert!(alive.apply(set(dns, only(&[1, 3])), now));
        assert!(alive.is_lost(&dns, &backend(2)) && !alive.is_lost(&dns, &backend(1)));
        assert!(alive.apply(set(dns, only(&[])), now));
        assert!(alive.is_lost(&dns, &backend(1)), "nobody left (contract A106)");
        assert!(alive.apply(remove(dns), now));
        assert!(alive.is_lost(&dns, &backend(1)), "the frontend is gone");
        // What could not be programmed is not known, and ends nothing.
        assert!(!alive.apply(set(dns, Keep::All), now));
        assert!(!alive.is_lost(&dns, &backend(1)));
        assert!(alive.apply(set(dns, only(&[1])), now));
        assert!(alive.apply(set(frontend(55, Protocol::Udp), only(&[1])), now), "not all is known yet");
        alive.replace(vec![(frontend(54, Protocol::Udp), only(&[1]))], now);
        assert!(alive.is_lost(&dns, &backend(1)) && !alive.is_lost(&frontend(54, Protocol::Udp), &backend(1)));
        // A Service that is made now: its flows, if there were any, ended with their frontend.
        assert!(!alive.apply(set(frontend(56, Protocol::Udp), only(&[1])), now));
        assert!(!alive.apply(set(dns, only(&[2])), now), "one that was seen to go");
        assert!(alive.apply(set(dns, only(&[3])), now));
        // What could not be programmed may be anything.
        alive.apply(set(frontend(57, Protocol::Udp), Keep::All), now);
        assert!(alive.apply(set(frontend(57, Protocol::Udp), only(&[1])), now));
    }

    #[test]
    fn tcp_ends_only_where_it_was_asked_for() {
        let (web, now) = (frontend(80, Protocol::Tcp), Instant::now());
        let later = now + TCP_GRACE;
        let mut alive = Alive::default();
        alive.apply(set(web, Keep::All), now);
        assert!(!alive.resets_tcp() && !alive.is_lost(&web, &backend(1)));
        alive.apply(set(web, only(&[1])), now);
        assert!(alive.resets_tcp());
        assert!(!alive.is_lost(&web, &backend(2)), "not yet");
        assert_eq!(alive.settle(now), (false, Some(later)));
        assert_eq!(alive.settle(later), (true, None));
        assert!(alive.is_lost(&web, &backend(2)) && !alive.is_lost(&web, &backend(1)));
        alive.apply(remove(web), now);
        assert!(!alive.resets_tcp() && !alive.is_lost(&web, &backend(1)), "a connection outlives its Service");
        alive.replace(vec![(web, only(&[1])), (frontend(81, Protocol::Tcp), only(&[1]))], now);
        alive.apply(set(web, Keep::All), now);
        assert!(alive.resets_tcp());
        alive.replace(vec![], now);
        assert!(!alive.resets_tcp());
    }

    #[test]
    fn a_port_that_changes_resets_nobody() {
        let (web, dns, now) = (frontend(80, Protocol::Tcp), frontend(53, Protocol::Udp), Instant::now());
        let mut alive = Alive::default();
        alive.apply(set(web, only(&[1])), now - TCP_GRACE);
        alive.apply(set(dns, only(&[1])), now - TCP_GRACE);
        alive.settle(now);
        let other = Backend { port: Port::new(8080).unwrap(), ..backend(1) };
        let elsewhere = Backend { port: Port::new(8080).unwrap(), ..backend(2) };
        assert!(!alive.is_lost(&web, &other) && alive.is_lost(&web, &elsewhere));
        assert!(alive.is_lost(&dns, &other), "a datagram to a port that nobody serves is lost");
        assert!(!alive.apply(set(web, Keep::Only([other].into())), now));
        assert_eq!(alive.settle(now), (false, None), "nothing fades");
    }

    #[test]
    fn an_endpoint_that_is_back_soon_was_not_lost() {
        let (web, now) = (frontend(80, Protocol::Tcp), Instant::now());
        let second = Duration::from_secs(1);
        let mut alive = Alive::default();
        alive.apply(set(web, only(&[1, 2])), now - TCP_GRACE);
        alive.settle(now);
        alive.apply(set(web, only(&[2])), now);
        alive.apply(set(web, only(&[1, 2])), now + second);
        // Gone again: the time counts from here.
        alive.apply(set(web, only(&[2])), now + 2 * second);
        assert_eq!(alive.settle(now + TCP_GRACE), (false, Some(now + 2 * second + TCP_GRACE)));
        assert!(!alive.is_lost(&web, &backend(1)));
        // The same state once more, as after a resync, does not begin it anew.
        alive.replace(vec![(web, only(&[2]))], now + 4 * second);
        assert_eq!(alive.settle(now + 2 * second + TCP_GRACE), (true, None));
        assert!(alive.is_lost(&web, &backend(1)));
    }
}
