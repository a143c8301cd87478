//! `connect`: VIP → backend, before the first packet.

use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};
use proxy_common::{
    counters::Reason,
    frontend::{FrontendKey, origin},
    proto,
};

use super::{
    PASS,
    errno::{ECONNREFUSED, EPERM, ETIMEDOUT},
    fail, hash, is_left_alone, origin_of,
    peer::{Peer, Record},
    view::{Either, V4, View},
};
use crate::{
    client::stick,
    count, globals, log,
    lookup::{Choice, choose},
};

#[cgroup_sock_addr(connect4)]
pub fn connect4(ctx: SockAddrContext) -> i32 {
    connect(&V4(ctx))
}

#[cgroup_sock_addr(connect6)]
pub fn connect6(ctx: SockAddrContext) -> i32 {
    match Either::of(ctx) {
        Either::Native(view) => connect(&view),
        Either::Mapped(view) => connect(&view),
    }
}

#[inline(always)]
fn connect<V: View>(view: &V) -> i32 {
    let proto = match view.protocol() {
        6 => proto::TCP,
        17 => proto::UDP,
        _ => return PASS,
    };
    let Some((origin, client)) = origin_of(view.ctx()) else { return PASS };
    if is_left_alone(origin) != 0 {
        return untranslated(view);
    }
    // Nothing could move it once its backend is gone: per packet each datagram is looked at. The node's own sockets have no such way.
    if proto == proto::UDP && origin == origin::POD && globals::connected_udp() == 0 {
        return untranslated(view);
    }
    let vip = view.target();
    let hash = |of_client| hash(view.ctx(), of_client);
    match choose::<V::Addr, true>(&FrontendKey::new(vip.addr, vip.port, proto), origin, 0, true, hash) {
        Choice::Backend { filtered: true, .. } if origin == origin::POD => untranslated(view),
        Choice::Backend { target: mut backend, service, sticky, .. } => {
            count::connection(service);
            let chosen = backend;
            if stick(&client, service, &sticky, &mut backend, || chosen) {
                count::turn_back(service);
            }
            log::chosen(view.ctx(), (vip.addr, vip.port), (backend.addr, backend.port));
            view.set_target(backend);
            if let Some(record) = Record::of_or_new(view) {
                record.set(Peer { vip, backend }, service, proto);
            }
            PASS
        }
        Choice::Pass => untranslated(view),
        // Per packet it is dropped in silence, and the caller waits as it would behind netfilter (contract A83).
        Choice::Drop { service } if service != 0 && origin == origin::POD => untranslated(view),
        // No per-packet hook is on the node's own way out: this is what a DROP in OUTPUT looks like to the caller, only that
        // a TCP one learns at once what it would learn after its retries.
        Choice::Drop { service } if service != 0 => fail(if proto == proto::TCP { ETIMEDOUT } else { EPERM }),
        // The frontend could not be read (service 0), or has nobody to serve it.
        choice @ (Choice::Drop { .. } | Choice::Refuse) => {
            if matches!(choice, Choice::Refuse) {
                count::reason(Reason::Rejected);
            }
            log::refused(view.ctx(), proto, (vip.addr, vip.port));
            fail(ECONNREFUSED)
        }
    }
}

/// Lets the call go on as it is; what the socket was connected to before is not its peer any more.
#[inline(always)]
fn untranslated<V: View>(view: &V) -> i32 {
    if let Some(record) = Record::of(view) {
        record.clear();
    }
    PASS
}
