//! Who asks for a new connection: what session affinity remembers it by, and whether it may ask at all.
//!
//! Per packet a client is its address, before any masquerade (contract A95). At connect time a socket mostly has no address yet, so the
//! client is the network namespace it is in; what is remembered of a pod by the one way is not known by the other.

use aya_ebpf::btf_maps::lpm_trie::Key;
use proxy_common::{
    Ipv4Be, Ipv6Be,
    affinity::{AffinityKey, AffinityValue, is_expired},
    counters::Reason,
    frontend::Range,
    slot::Target,
    source_range::SourceRangeKey,
};

use crate::{clock, count, lookup::is_among, maps::Family, sealed};

pub(crate) trait Client<A> {
    fn affinity_key(&self, service: u32) -> AffinityKey;
}

/// Told by a socket: the cookie of its network namespace.
#[derive(Clone, Copy)]
pub(crate) struct ByNetns(pub(crate) u64);

macro_rules! by_address {
    ($($addr:ty),+) => {$(
        /// Told by a packet.
        impl Client<Self> for $addr {
            #[inline(always)]
            fn affinity_key(&self, service: u32) -> AffinityKey {
                AffinityKey::of_address(*self, service)
            }
        }
    )+};
}

by_address!(Ipv4Be, Ipv6Be);

impl<A: Family> Client<A> for ByNetns {
    #[inline(always)]
    fn affinity_key(&self, service: u32) -> AffinityKey {
        AffinityKey::of_netns(self.0, service)
    }
}

/// Whether `addr` is in one of the service's source ranges.
#[inline(always)]
pub(crate) fn is_in_range<A: Family>(service: u32, addr: &A) -> bool {
    let SourceRangeKey { prefix, range } = SourceRangeKey::host(service, *addr);
    A::source_ranges().get(&Key::new(prefix, range)).is_some()
}

/// Whether the sender of a packet may open a flow: to a frontend with source ranges (`filtered`) if it is in one of them. Counts it either
/// way. 0: it may not (contract A91).
#[inline(never)]
pub(crate) fn admit<A: Family>(service: u32, addr: &A, filtered: u32) -> u32 {
    if filtered != 0 && !is_in_range(service, addr) {
        count::reason(Reason::SourceRange);
        count::refused(service);
        return 0;
    }
    count::connection(service);
    1
}

/// What a connection has to do with session affinity.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Sticky {
    /// The backends that are eligible.
    pub(crate) range: Range,
    /// 0: nothing.
    pub(crate) timeout_secs: u32,
}

/// Session affinity: puts the backend of the client's last connection in the place of `target`, if its time is not over and
/// it is still eligible (contract A98), and notes that there is a new connection (A96); else has `target` remembered. `chosen`
/// tells what it was, once more.
///
/// Once for each connection, by who takes it; `true`: its turn is somebody else's ([`count::turn_back`]). Apart from the choice, and in small steps, because the stack has no room for them together.
#[inline(always)]
pub(crate) fn stick<A: Family, C: Client<A>>(
    client: &C,
    service: u32,
    sticky: &Sticky,
    target: &mut Target<A>,
    chosen: impl Fn() -> Target<A>,
) -> bool {
    if sticky.timeout_secs == 0 {
        return false;
    }
    if recall(client, service, sticky.timeout_secs, target) != 0 && is_among(&sticky.range, target) != 0 {
        return true;
    }
    *target = chosen();
    // Its value is needed by nobody, but a function without one is no function to the verifier.
    core::hint::black_box(remember(client, service, target));
    false
}

/// Where the client's last connection went, if its time is not over; from now on it is not for as long again. 0: nowhere, and `target` is as it was.
#[inline(never)]
fn recall<A: Family, C: Client<A>>(client: &C, service: u32, timeout_secs: u32, target: &mut Target<A>) -> u32 {
    let key = client.affinity_key(service);
    let Some(live) = A::affinity().get_ptr_mut(&key) else { return 0 };
    // SAFETY: a live pointer to a value of this map; AffinityValue is plain integers.
    let value = unsafe { sealed::copy(live.cast_const()) };
    if !value.is_sealed_for(&key) {
        count::reason(Reason::TornRead);
        return 0;
    }
    let now = clock::now_secs();
    if is_expired(value.seen, now, timeout_secs) {
        return 0;
    }
    if value.seen != now {
        // SAFETY: a live pointer; one aligned word, outside the seal. An element that was recycled meanwhile gets a
        // wrong time of another client's at worst, by seconds.
        unsafe { (&raw mut (*live).seen).write_volatile(now) };
    }
    *target = Target { addr: value.addr, port: value.port };
    1
}

#[inline(never)]
fn remember<A: Family, C: Client<A>>(client: &C, service: u32, target: &Target<A>) -> u32 {
    let key = client.affinity_key(service);
    let value =
        AffinityValue { addr: target.addr, port: target.port, pad: 0, seal: 0, seen: clock::now_secs() }.sealed(&key);
    if A::affinity().insert(&key, &value, 0).is_err() {
        count::reason(Reason::NotRemembered);
    }
    0
}
