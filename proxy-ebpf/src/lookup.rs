//! From (address, port, protocol) to a backend or a refusal. The same for sockets and packets.

use aya_ebpf::helpers::bpf_get_prandom_u32;
use proxy_common::{
    counters::Reason,
    frontend::{FrontendKey, FrontendValue, Range, algorithm, flags, origin, verdict},
    maglev,
    slot::{Slot, Target, sort_key},
};

use crate::{
    client::{Sticky, is_in_range},
    count,
    maps::Family,
    sealed,
};

/// What a look at the frontends map said. The value itself goes through a reference that starts out as zeroes: inside an
/// enum it would be undefined where there is none, and the compiler copies it before it asks, which the verifier refuses.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Found {
    /// `value` is whole.
    Frontend,
    /// Not ours.
    Nothing,
    /// Torn at both looks: ours, but unusable now.
    Torn,
}

/// What to do with a new connection.
pub(crate) enum Choice<A> {
    Backend {
        target: Target<A>,
        /// Who takes it asks whether the client is to go elsewhere ([`stick`](crate::client::stick)).
        sticky: Sticky,
        service: u32,
        masquerade: bool,
        /// Only packets tell whether the client may ask (contract A91): at connect time a pod is left to them, and what the node sends
        /// itself its verdict has decided.
        filtered: bool,
    },
    /// Silently.
    Drop {
        service: u32,
    },
    Refuse,
    /// Not ours.
    Pass,
}

#[inline(always)]
fn read_once<A: Family>(key: &FrontendKey<A>, value: &mut FrontendValue) -> Found {
    let Some(found) = A::frontends().get_ptr(key) else { return Found::Nothing };
    // SAFETY: a live pointer to a value of this map; FrontendValue is plain integers.
    unsafe { sealed::copy_to(found, value) };
    if value.is_sealed_for(key) { Found::Frontend } else { Found::Torn }
}

#[inline(always)]
fn read<A: Family>(key: &FrontendKey<A>, value: &mut FrontendValue) -> Found {
    let found = read_once(key, value);
    if found != Found::Torn {
        return found;
    }
    count::reason(Reason::TornRead);
    let found = read_once(key, value);
    if found == Found::Torn {
        count::reason(Reason::TornTwice);
    }
    found
}

/// The frontend of `key`, or the guard of its address.
#[inline(always)]
pub(crate) fn frontend<A: Family>(key: &FrontendKey<A>, value: &mut FrontendValue) -> Found {
    match read(key, value) {
        Found::Nothing => read(&FrontendKey::guard(key.addr), value),
        found => found,
    }
}

/// What holds for a packet to `addr` that has no ports to be told by: only the address's guard speaks of it.
#[inline(always)]
pub(crate) fn guard<A: Family>(addr: A, origin: usize) -> Choice<A> {
    let mut value = FrontendValue::default();
    match read(&FrontendKey::guard(addr), &mut value) {
        Found::Frontend => {}
        Found::Nothing => return Choice::Pass,
        Found::Torn => return Choice::Drop { service: 0 },
    }
    match value.verdict(origin) & verdict::ACTION_MASK {
        verdict::PICK_ALL | verdict::PICK_LOCAL | verdict::PASS => Choice::Pass,
        verdict::DROP => drop(value.service, true),
        _ => refuse(value.service, true),
    }
}

/// Whether `addr` is a ClusterIP: each has a guard. One look-up.
#[inline(never)]
pub(crate) fn is_guarded<A: Family>(addr: A) -> bool {
    has_guard(addr)
}

/// [`is_guarded`], on the way of every packet that is not ours: with no call of its own.
#[inline(always)]
pub(crate) fn has_guard<A: Family>(addr: A) -> bool {
    A::frontends().get_ptr(FrontendKey::guard(addr)).is_some()
}

/// Whether there is such a frontend. One look-up.
#[inline(always)]
pub(crate) fn has_frontend<A: Family>(key: &FrontendKey<A>) -> bool {
    A::frontends().get_ptr(key).is_some()
}

/// What [`served`] says: a new connection would be given no backend, or the address is the node's, whose stack answers.
pub(crate) const UNSERVED: u32 = 0;
/// It would, at an address that is the cluster's alone.
pub(crate) const OURS: u32 = 1;
/// It would, at one that may have been somebody else's before.
pub(crate) const SHARED: u32 = 2;

/// What this frontend would do with a new connection from `src`, of `origin`, and whose its address is.
#[inline(never)]
pub(crate) fn served<A: Family>(key: &FrontendKey<A>, origin: usize, src: &A) -> u32 {
    let mut value = FrontendValue::default();
    if read(key, &mut value) != Found::Frontend {
        return UNSERVED;
    }
    let kind = value.flags & flags::KIND_MASK;
    let count = match value.verdict(origin) & verdict::ACTION_MASK {
        verdict::PICK_ALL => value.all_count,
        verdict::PICK_LOCAL => value.local_count,
        _ => 0,
    };
    if kind == flags::NODE_PORT
        || count == 0
        || value.flags & flags::HAS_SOURCE_RANGES != 0 && !is_in_range(value.service, src)
    {
        return UNSERVED;
    }
    if kind == flags::CLUSTER_IP { OURS } else { SHARED }
}

#[inline(always)]
fn slot<A: Family>(range: Range, index: u32) -> Option<Target<A>> {
    let slot = A::slots().get_ptr(range.base.wrapping_add(index))?;
    // SAFETY: a live pointer into the slots array; slots are plain integers.
    unsafe { sealed::copy(slot) }.decode(range.generation)
}

/// From one attempt's position in a Maglev table to the next one's: far apart, and never back to the first.
const NEXT_POSITION: u32 = 0x9e37_79b9;

/// Picks a backend for a new connection from `origin`. Who takes it counts it ([`count::connection`]); who does not asks again with
/// the next `attempt`, so that round robin and Maglev offer another one.
///
/// `hash` is what Maglev goes by: of the client alone if it is asked with `true`, of the flow otherwise. Only who carries a refusal out
/// `counts` it. `SOCKET`: at connect time, where there is another way.
#[inline(always)]
pub(crate) fn choose<A: Family, const SOCKET: bool>(
    key: &FrontendKey<A>,
    origin: usize,
    attempt: u32,
    counts: bool,
    hash: impl Fn(bool) -> u32,
) -> Choice<A> {
    // A slot re-used under our feet shows in its generation: the frontend has a new range by then, so look once more.
    let mut looks = 0;
    let mut attempt = attempt;
    let mut stale = 0;
    while looks < 2 {
        looks += 1;
        let mut value = FrontendValue::default();
        match frontend(key, &mut value) {
            Found::Frontend => {}
            Found::Nothing => return Choice::Pass,
            Found::Torn => return Choice::Drop { service: 0 },
        }
        // Whatever the verdict is, a refusal, too: who redirects the pod's packets may know another way.
        if SOCKET && origin == origin::POD && value.flags & flags::PODS_PER_PACKET != 0 {
            return Choice::Pass;
        }
        let word = value.verdict(origin);
        let range = match word & verdict::ACTION_MASK {
            verdict::PICK_ALL => value.all(),
            verdict::PICK_LOCAL => value.local(),
            verdict::DROP => return drop(value.service, counts),
            verdict::PASS => return Choice::Pass,
            _ => return refuse(value.service, counts),
        };
        // Whoever asks, a filter or not (contract A89).
        if range.count == 0 {
            return refuse(value.service, counts);
        }
        // The old range still: its bad slot is not worth another look.
        if looks > 1 && value.seal == stale {
            attempt += 1;
        }
        let index = if value.algorithm == algorithm::ROUND_ROBIN {
            (count::cursor(value.service).wrapping_add(attempt as u64) % range.count as u64) as u32
        } else if value.algorithm == algorithm::MAGLEV {
            let hash = hash(value.affinity_secs != 0).wrapping_add(attempt.wrapping_mul(NEXT_POSITION));
            match maglev::size(range.table) {
                // So few or so many that there is no table: evenly, and alike on every node.
                0 => maglev::position(hash, range.count as u32),
                size => range.count as u32 + maglev::position(hash, size),
            }
        } else if range.count == 1 {
            0
        } else {
            // SAFETY: no arguments.
            let random = unsafe { bpf_get_prandom_u32() };
            random % range.count as u32
        };
        if let Some(target) = slot(range, index) {
            return Choice::Backend {
                target,
                sticky: Sticky { range, timeout_secs: value.affinity_secs },
                service: value.service,
                masquerade: word & verdict::MASQUERADE != 0,
                filtered: value.flags & flags::HAS_SOURCE_RANGES != 0,
            };
        }
        count::reason(Reason::StaleSlot);
        stale = value.seal;
    }
    count::reason(Reason::TornTwice);
    Choice::Drop { service: 0 }
}

#[inline(always)]
fn drop<A>(service: u32, counts: bool) -> Choice<A> {
    if counts {
        count::reason(Reason::PolicyDrop);
        count::refused(service);
    }
    Choice::Drop { service }
}

#[inline(always)]
fn refuse<A>(service: u32, counts: bool) -> Choice<A> {
    // Whoever refuses counts the reason: a packet that cannot be told so counts under another one.
    if counts {
        count::refused(service);
    }
    Choice::Refuse
}

/// Whether `target` is in `range`: a binary search, since slots of a range are sorted. 0: it is not.
#[inline(never)]
pub(crate) fn is_among<A: Family>(range: &Range, target: &Target<A>) -> u32 {
    let range = *range;
    let wanted = sort_key(*target);
    let mut low = 0_u32;
    let mut high = range.count as u32;
    // 16 halvings cover every count that fits 16 bits.
    let mut probes = 0;
    while probes < 17 && low < high {
        probes += 1;
        let middle = (low + high) / 2;
        let Some(found) = slot::<A>(range, middle) else { return 0 };
        let found = sort_key(found);
        if found == wanted {
            return 1;
        }
        if found < wanted { low = middle + 1 } else { high = middle }
    }
    0
}
