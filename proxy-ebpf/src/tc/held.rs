//! Fragments that overtake their datagram's first one: a program can neither wait nor keep them, so the agent does. It gets a copy, and brings
//! it back once it sees that the first one was translated.

use aya_ebpf::{
    EbpfContext,
    bindings::{__sk_buff, TC_ACT_OK, TC_ACT_SHOT},
    helpers::{bpf_clone_redirect, bpf_skb_load_bytes},
    macros::classifier,
    programs::TcContext,
};
use proxy_common::{
    connection::{FragmentKey, hook},
    counters::Reason,
    held::{FRAME, Held, ROOM},
};

use super::{device, is_overheard, packet::Header};
use crate::{count, maps::HELD};

/// Hands a copy of the packet to the agent, unless it is for another host, or too long, or there is no room for it.
#[inline(always)]
pub(crate) fn hold<A: Header>(ctx: &TcContext, l3: u32, key: &FragmentKey<A>) {
    let len = ctx.len();
    if len == 0 || len > FRAME as u32 || key.hook == hook::INGRESS && is_overheard(ctx, l3, device(ctx).0) {
        return;
    }
    let Some(mut record) = HELD.reserve_untyped::<Held<A>>(0) else { return };
    let (skb, to) = (ctx.as_ptr().cast::<__sk_buff>(), record.as_mut_ptr());
    // SAFETY: the context is live; `to` is a record of its own until it is submitted, each field is written in place, and the helper writes
    // no more bytes than the field has.
    let is_read = unsafe {
        (&raw mut (*to).version).write(A::VERSION);
        (&raw mut (*to).l3).write(l3 as u8);
        (&raw mut (*to).len).write(len as u16);
        (&raw mut (*to).ifindex).write((*skb).ifindex);
        (&raw mut (*to).mark).write((*skb).mark);
        (&raw mut (*to).key).write(*key);
        // Read once more: from the comparisons above 6.1 does not see that it fits, and the compiler leaves out what it knows.
        let len = ((&raw const (*skb).len).read_volatile().wrapping_sub(1) & (ROOM as u32 - 1)) + 1;
        bpf_skb_load_bytes(skb.cast(), 0, (&raw mut (*to).frame).cast(), len) == 0
    };
    if is_read {
        record.submit(0);
        count::reason(Reason::HeldFragment);
    } else {
        record.discard(0);
    }
}

/// Run by the agent itself, on a copy that it brings back: to the interface and by the hook that `cb` names.
#[classifier]
pub(crate) fn tc_return(ctx: TcContext) -> i32 {
    let skb = ctx.as_ptr().cast::<__sk_buff>();
    // SAFETY: the context is live; the words are the caller's own.
    let returned = unsafe { bpf_clone_redirect(skb, (*skb).cb[0], (*skb).cb[1].into()) };
    if returned != 0 {
        return TC_ACT_SHOT;
    }
    count::reason(Reason::ReturnedFragment);
    TC_ACT_OK
}
