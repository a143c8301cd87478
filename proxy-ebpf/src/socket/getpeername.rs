//! `getpeername`: a connected socket shows the VIP it asked for.

use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};

use super::{
    ALWAYS,
    peer::Record,
    view::{Either, V4, View},
};

#[cgroup_sock_addr(getpeername4)]
pub fn getpeername4(ctx: SockAddrContext) -> i32 {
    getpeername(&V4(ctx))
}

#[cgroup_sock_addr(getpeername6)]
pub fn getpeername6(ctx: SockAddrContext) -> i32 {
    match Either::of(ctx) {
        Either::Native(view) => getpeername(&view),
        Either::Mapped(view) => getpeername(&view),
    }
}

#[inline(always)]
fn getpeername<V: View>(view: &V) -> i32 {
    // The kernel has put the socket's peer into the context: a record of an earlier connection does not match it.
    if let Some(peer) = Record::of(view).and_then(|record| record.peer())
        && peer.backend == view.target()
    {
        view.set_target(peer.vip);
    }
    ALWAYS
}
