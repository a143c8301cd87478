//! `sendmsg` with an address, on UDP sockets: VIP → backend for each datagram.
//!
//! Later datagrams of one socket to one VIP go to the backend of the first, as a flow's do: while it serves, chosen by now or not (contract
//! A45, A104). When it does not, the agent deletes the entry that says so. After a silence in which a flow would be over, only what
//! may be chosen is gone on with.
//! Answers are told by (socket, backend) alone, so two VIPs that lead one socket to the same backend are ambiguous: another
//! backend is preferred then; if the picks find none, the answers are shown as the VIP's that was written to last.
//! The same holds for a socket that writes to a VIP and, beside it, to one of its backends directly.

use aya_ebpf::{
    EbpfContext as _, helpers::generated::bpf_get_socket_cookie, macros::cgroup_sock_addr, programs::SockAddrContext,
};
use proxy_common::{
    affinity::is_expired,
    counters::Reason,
    frontend::{FrontendKey, FrontendValue, origin, verdict},
    proto,
    slot::Target,
    socket::{DatagramKey, DatagramValue, direction},
};

use super::{
    PASS,
    errno::{ECONNREFUSED, EPERM},
    fail, hash, is_left_alone, origin_of,
    peer::Record,
    view::{Either, V4, View},
};
use crate::{
    client::{ByNetns, Sticky, stick},
    clock, count, globals,
    lookup::{Choice, Found, choose, frontend, is_among},
    maps::Family,
    sealed,
};

/// How often another backend is asked for when answers of the first would be ambiguous.
const PICKS: u32 = 3;

#[cgroup_sock_addr(sendmsg4)]
pub fn sendmsg4(ctx: SockAddrContext) -> i32 {
    sendmsg(&V4(ctx))
}

#[cgroup_sock_addr(sendmsg6)]
pub fn sendmsg6(ctx: SockAddrContext) -> i32 {
    match Either::of(ctx) {
        Either::Native(view) => sendmsg(&view),
        // The kernel sends to mapped addresses through its IPv4 code: this is `sendmsg4`'s.
        Either::Mapped(_) => PASS,
    }
}

#[inline(always)]
fn sendmsg<V: View>(view: &V) -> i32 {
    // UDP-Lite passes here, too.
    if view.protocol() != u32::from(proto::UDP) {
        return PASS;
    }
    let Some((origin, client)) = origin_of(view.ctx()) else { return PASS };
    let to = view.target();
    let record = Record::of(view);
    if let Some(record) = &record
        && let Some(peer) = record.peer()
    {
        if to == peer.vip && view.is_connected_to(peer.backend) {
            // A connected socket hears its peer only, so the VIP it is connected to means that one backend.
            view.set_target(peer.backend);
            return PASS;
        }
        if to == peer.backend {
            // A connected IPv6 socket sending to its IPv4-mapped peer. Not connected: the backend is meant by its own name now.
            if !view.is_connected_to(peer.backend) {
                record.clear();
            }
            return PASS;
        }
    }

    // A connected socket goes on as it is, above; any other datagram may go either way.
    if is_left_alone(origin) != 0 {
        return direct(view, record.is_some(), to);
    }

    let key = FrontendKey::new(to.addr, to.port, proto::UDP);
    let mut value = FrontendValue::default();
    match frontend(&key, &mut value) {
        Found::Nothing => return direct(view, record.is_some(), to),
        // What `connect` left on its VIP hears the VIP alone, and its packets are translated, or nothing is: the frontend came later, pods
        // are not let through at connect time, or their connected UDP is not pointed anywhere.
        _ if view.is_connected_to(to) => return PASS,
        Found::Frontend => {}
        Found::Torn => return fail(ECONNREFUSED),
    }
    // SAFETY: the context this program was called with.
    let cookie = unsafe { bpf_get_socket_cookie(view.ctx().as_ptr()) };
    if record.is_some()
        && let Some(backend) = remembered(cookie, to, &value, origin)
    {
        view.set_target(backend);
        return PASS;
    }
    pick(view, &key, origin, &client, cookie)
}

/// Whether `backend` is one that `origin` may be sent to.
#[inline(always)]
fn may_be_chosen<A: Family>(value: &FrontendValue, origin: usize, backend: &Target<A>) -> bool {
    let range = match value.verdict(origin) & verdict::ACTION_MASK {
        verdict::PICK_ALL => value.all(),
        verdict::PICK_LOCAL => value.local(),
        _ => return false,
    };
    is_among(&range, backend) != 0
}

/// Copies one entry; `None` if there is none or it is not whole: it is made again then.
#[inline(always)]
fn entry<A: Family>(key: &DatagramKey<A>) -> Option<(*mut DatagramValue<A>, DatagramValue<A>)> {
    let live = A::datagrams().get_ptr_mut(key)?;
    // SAFETY: a live pointer to a value of this map; DatagramValue is plain integers.
    let value = unsafe { sealed::copy(live.cast_const()) };
    if !value.is_sealed_for(key) {
        count::reason(Reason::TornRead);
        return None;
    }
    Some((live, value))
}

/// What one entry leads to.
#[inline(always)]
pub(super) fn read<A: Family>(key: &DatagramKey<A>) -> Option<Target<A>> {
    let (_, value) = entry(key)?;
    Some(Target { addr: value.addr, port: value.port })
}

#[inline(always)]
fn write<A: Family>(key: &DatagramKey<A>, target: Target<A>, service: u32) {
    let Target { addr, port } = target;
    let value = DatagramValue { addr, port, pad: 0, service, seal: 0, seen: clock::now_secs() };
    if A::datagrams().insert(key, value.sealed(key), 0).is_err() {
        count::reason(Reason::NotRemembered);
    }
}

/// The backend that earlier datagrams of this socket to `vip` went to, if later ones go there, too.
#[inline(always)]
fn remembered<A: Family>(cookie: u64, vip: Target<A>, frontend: &FrontendValue, origin: usize) -> Option<Target<A>> {
    let (live, value) = entry(&DatagramKey::new(cookie, direction::TO_BACKEND, vip.addr, vip.port))?;
    if value.service != frontend.service {
        return None;
    }
    let backend = Target { addr: value.addr, port: value.port };
    let now = clock::now_secs();
    if is_expired(value.seen, now, globals::udp_stream_secs()) && !may_be_chosen(frontend, origin, &backend) {
        return None;
    }
    if value.seen != now {
        // SAFETY: a live pointer; one aligned word, outside the seal. An element that was recycled meanwhile gets a wrong time of
        // another socket's at worst, by minutes.
        unsafe { (&raw mut (*live).seen).write_volatile(now) };
    }
    // The entry for answers may have been evicted, or taken by another VIP since.
    let reply = DatagramKey::new(cookie, direction::TO_VIP, backend.addr, backend.port);
    if read(&reply) != Some(vip) {
        write(&reply, vip, frontend.service);
    }
    Some(backend)
}

/// A backend for the first datagram, or the refusal.
#[inline(always)]
fn pick<V: View>(view: &V, key: &FrontendKey<V::Addr>, origin: usize, client: &ByNetns, cookie: u64) -> i32 {
    let vip = Target { addr: key.addr, port: key.port };
    let mut picks = 0;
    while picks < PICKS {
        let attempt = picks;
        picks += 1;
        let hash = |of_client| hash(view.ctx(), of_client);
        match choose::<V::Addr, true>(key, origin, attempt, true, hash) {
            Choice::Backend { filtered: true, .. } if origin == origin::POD => return PASS,
            Choice::Backend { target: mut backend, sticky, service, .. } => {
                let Sticky { range, timeout_secs } = sticky;
                let mut reply = DatagramKey::new(cookie, direction::TO_VIP, backend.addr, backend.port);
                // Session affinity goes before an unambiguous answer: every pick would end at the same backend.
                if picks < PICKS
                    && range.count > 1
                    && timeout_secs == 0
                    && let Some(shown) = read(&reply)
                    && shown != vip
                {
                    continue;
                }
                count::connection(service);
                if stick(client, service, &sticky, &mut backend, || Target { addr: reply.addr, port: reply.port }) {
                    count::turn_back(service);
                }
                reply.addr = backend.addr;
                reply.port = backend.port;
                view.set_target(backend);
                // Marks the socket, so that answers are looked up.
                if Record::of_or_new(view).is_some() {
                    write(&reply, vip, service);
                    let forward = DatagramKey::new(cookie, direction::TO_BACKEND, vip.addr, vip.port);
                    write(&forward, backend, service);
                }
                return PASS;
            }
            Choice::Pass => return PASS,
            // As for `connect`: pods meet the drop per packet, the node's own processes see what netfilter's OUTPUT gives.
            Choice::Drop { service } if service != 0 => return if origin == origin::POD { PASS } else { fail(EPERM) },
            Choice::Drop { .. } => return fail(ECONNREFUSED),
            Choice::Refuse => {
                count::reason(Reason::Rejected);
                return fail(ECONNREFUSED);
            }
        }
    }
    PASS
}

/// A datagram to no VIP. If the socket also uses a VIP with this backend, answers are the backend's own from now on.
#[inline(always)]
fn direct<V: View>(view: &V, marked: bool, to: Target<V::Addr>) -> i32 {
    if marked {
        // SAFETY: the context this program was called with.
        let cookie = unsafe { bpf_get_socket_cookie(view.ctx().as_ptr()) };
        let reply = DatagramKey::new(cookie, direction::TO_VIP, to.addr, to.port);
        if V::Addr::datagrams().get_ptr(reply).is_some() {
            // Gone already is fine.
            let _ = V::Addr::datagrams().remove(reply);
        }
    }
    PASS
}
