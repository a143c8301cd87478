//! Connect time: a socket that aims at a VIP is pointed at a backend before the first packet exists.
//!
//! ```text
//! connect(VIP)  ─► connect4/6      VIP → backend, noted in the socket (`peers`)
//! sendto(VIP)   ─► sendmsg4/6      VIP → backend, noted under (socket, VIP) and (socket, backend) (`datagrams`)
//! recvfrom()    ─► recvmsg4/6      backend → VIP
//! getpeername() ─► getpeername4/6  backend → VIP
//! ```
//!
//! One file per hook: two entry points and the body they share, generic over how the hook shows an address ([`view`]).
//!
//! What the kernel does (read in 6.18, the same since 5.7):
//! - An IPv4-mapped address on an IPv6 socket reaches `connect6`, `recvmsg6` and `getpeername6` as it is, but *sending* to
//!   one calls `udp_sendmsg`, hence `sendmsg4`. That holds for the address of a connected socket, too: such a socket
//!   meets `sendmsg4` with the backend's address on every `send`.
//! - All hooks but TCP's run under the socket's lock, taken for them; TCP's `connect` holds it anyway. So a record in
//!   the socket has one user at a time and needs no seal.
//! - `connect(AF_UNSPEC)` calls no hook: a record outlives it. Whoever reads one compares it with what the socket, or the
//!   caller, says ([`peer`]).
//! - An MPTCP socket connects through a TCP one that it owns, and that one is translated; `getpeername` of the MPTCP socket
//!   shows the backend.

mod connect;
mod getpeername;
mod peer;
mod recvmsg;
mod sendmsg;
mod view;

use aya_ebpf::{
    EbpfContext as _,
    helpers::generated::{
        bpf_get_current_ancestor_cgroup_id, bpf_get_netns_cookie, bpf_get_prandom_u32, bpf_set_retval,
    },
    programs::SockAddrContext,
};
use proxy_common::{frontend::origin, globals::socket_lb, maglev};

use crate::{client::ByNetns, globals, maps::LEFT_PODS};

/// What a program returns to let the call go on.
const PASS: i32 = 1;
/// What a program returns to make the call fail: with EPERM, or with what `bpf_set_retval` said.
const FAIL: i32 = 0;

/// What a `recvmsg` or `getpeername` program must return, whatever it did (verifier, 5.8 and later).
const ALWAYS: i32 = 1;

mod errno {
    pub(super) const EPERM: i32 = 1;
    pub(super) const ETIMEDOUT: i32 = 110;
    pub(super) const ECONNREFUSED: i32 = 111;
}

/// Where the socket belongs, and the network namespace it is in; `None` if it is not ours to translate (`--socket-lb node` and a
/// pod's socket).
#[inline(always)]
fn origin_of(ctx: &SockAddrContext) -> Option<(usize, ByNetns)> {
    // SAFETY: the context this program was called with. Kernel 5.7 (f318903c0bf4).
    let cookie = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    if cookie == globals::node_netns_cookie() {
        Some((origin::NODE, ByNetns(cookie)))
    } else if globals::socket_lb() == socket_lb::NODE {
        None
    } else {
        Some((origin::POD, ByNetns(cookie)))
    }
}

/// Cgroups above a process that are looked at.
const DEPTH: i32 = 16;

/// Whether the calling pod is left to its packets. Its processes are in cgroups below the pod's, whose depth depends on the kubelet and on what
/// the node itself is in. Nobody is asked where no pod can be left (`--pod-annotations`). 0: it is not.
#[inline(never)]
fn is_left_alone(origin: usize) -> u32 {
    if globals::left_pods() == 0 || origin != origin::POD {
        return 0;
    }
    let mut depth = 1;
    while depth < DEPTH {
        // SAFETY: no pointers. Kernel 5.7 for these hooks (0f09abd105da).
        let id = unsafe { bpf_get_current_ancestor_cgroup_id(depth) };
        if id == 0 {
            return 0;
        }
        if LEFT_PODS.get_ptr(id).is_some() {
            return 1;
        }
        depth += 1;
    }
    0
}

/// What Maglev goes by at connect time. A connection has no source port yet, and mostly no source address, so it is one at random; what
/// sticks to its client is told by the network namespace, which is the client's own.
#[inline(always)]
fn hash(ctx: &SockAddrContext, client: bool) -> u32 {
    if client {
        // SAFETY: the context this program was called with. Kernel 5.7 (f318903c0bf4).
        maglev::namespace(unsafe { bpf_get_netns_cookie(ctx.as_ptr()) })
    } else {
        // SAFETY: no arguments.
        unsafe { bpf_get_prandom_u32() }
    }
}

/// Makes the call fail with `errno`.
#[inline(always)]
fn fail(errno: i32) -> i32 {
    if globals::have_set_retval() != 0 {
        // SAFETY: no pointers. Kernel 5.18 (b44123b4a3dc); before it this branch is pruned and the caller sees EPERM.
        unsafe { bpf_set_retval(-errno) };
    }
    FAIL
}
