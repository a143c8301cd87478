//! Counting, per CPU.

use aya_ebpf::bindings::BPF_NOEXIST;
use proxy_common::{
    Address,
    counters::{Confirmed, Reason, ServiceCounters},
    proto,
};

use crate::maps::{CONFIRMED, REASONS, SERVICE_COUNTERS};

#[inline(always)]
pub(crate) fn reason(reason: Reason) {
    if let Some(counter) = REASONS.get_ptr_mut(reason as u32) {
        // SAFETY: a per-CPU element; programs on one CPU may interleave at worst and lose a count.
        unsafe { *counter += 1 };
    }
}

#[inline(always)]
fn of_service(service: u32) -> Option<*mut ServiceCounters> {
    if let Some(counters) = SERVICE_COUNTERS.get_ptr_mut(service) {
        return Some(counters);
    }
    // First connection or refusal of this service: the only time an entry is made. Losing the race against another CPU is fine.
    let _ = SERVICE_COUNTERS.insert(service, ServiceCounters::default(), BPF_NOEXIST.into());
    SERVICE_COUNTERS.get_ptr_mut(service)
}

/// The round-robin cursor of this CPU.
#[inline(always)]
pub(crate) fn cursor(service: u32) -> u64 {
    match SERVICE_COUNTERS.get_ptr_mut(service) {
        // SAFETY: a per-CPU element, see `reason`.
        Some(counters) => unsafe { (*counters).turns },
        None => 0,
    }
}

/// A new connection. Once for each, by who takes the pick, which was its backend's turn.
#[inline(always)]
pub(crate) fn connection(service: u32) {
    if let Some(counters) = of_service(service) {
        // SAFETY: a per-CPU element, see `reason`.
        unsafe {
            (*counters).connections += 1;
            (*counters).turns += 1;
        }
    }
}

/// The connection that was just counted goes where its client went before: the turn it was given is the next one's. Otherwise clients whose
/// connections come in pairs would all be sent to the same backend of two.
#[inline(always)]
pub(crate) fn turn_back(service: u32) {
    if let Some(counters) = SERVICE_COUNTERS.get_ptr_mut(service) {
        // SAFETY: a per-CPU element, see `reason`.
        unsafe { (*counters).turns -= 1 };
    }
}

/// A packet of a flow that was counted when it began. It makes no entry: the service may be gone, and its entry with it.
#[inline(always)]
pub(crate) fn packet(service: u32, bytes: u32) {
    if let Some(counters) = SERVICE_COUNTERS.get_ptr_mut(service) {
        // SAFETY: a per-CPU element, see `reason`.
        unsafe {
            (*counters).packets += 1;
            (*counters).bytes += bytes as u64;
        }
    }
}

#[inline(always)]
pub(crate) fn refused(service: u32) {
    if let Some(counters) = of_service(service) {
        // SAFETY: a per-CPU element, see `reason`.
        unsafe { (*counters).refused += 1 };
    }
}

/// A pair of entries moved on from half-open.
#[inline(always)]
pub(crate) fn confirmed<A: Address>(protocol: u8) {
    if let Some(confirmed) = CONFIRMED.get_ptr_mut(0) {
        // SAFETY: a per-CPU element, see `reason`.
        let Confirmed { established_v4, established_v6, answered_v4, answered_v6 } = unsafe { &mut *confirmed };
        let (established, answered) =
            if A::LEN == 4 { (established_v4, answered_v4) } else { (established_v6, answered_v6) };
        *(if protocol == proto::UDP { answered } else { established }) += 1;
    }
}
