//! `recvmsg`: a datagram from a backend shows the VIP it answers for.

use aya_ebpf::{
    EbpfContext as _, helpers::generated::bpf_get_socket_cookie, macros::cgroup_sock_addr, programs::SockAddrContext,
};
use proxy_common::socket::{DatagramKey, direction};

use super::{
    ALWAYS,
    peer::Record,
    sendmsg::read,
    view::{Either, V4, View},
};

#[cgroup_sock_addr(recvmsg4)]
pub fn recvmsg4(ctx: SockAddrContext) -> i32 {
    recvmsg(&V4(ctx))
}

#[cgroup_sock_addr(recvmsg6)]
pub fn recvmsg6(ctx: SockAddrContext) -> i32 {
    match Either::of(ctx) {
        Either::Native(view) => recvmsg(&view),
        Either::Mapped(view) => recvmsg(&view),
    }
}

#[inline(always)]
fn recvmsg<V: View>(view: &V) -> i32 {
    // No record: this socket never asked for a VIP.
    let Some(record) = Record::of(view) else { return ALWAYS };
    let source = view.target();
    // A peer counts after `connect(AF_UNSPEC)`, too: datagrams that came before it are still in the queue.
    if let Some(peer) = record.peer()
        && peer.backend == source
    {
        view.set_target(peer.vip);
        return ALWAYS;
    }
    // SAFETY: the context this program was called with.
    let cookie = unsafe { bpf_get_socket_cookie(view.ctx().as_ptr()) };
    if let Some(vip) = read(&DatagramKey::new(cookie, direction::TO_VIP, source.addr, source.port)) {
        view.set_target(vip);
    }
    ALWAYS
}
