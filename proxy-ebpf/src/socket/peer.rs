//! The record in the socket: which VIP it asked for and which backend it got.
//!
//! A record whose service is 0 names no peer: it says that the socket once had one, or that it has sent datagrams to a
//! VIP. A socket without a record never had to do with us; that is what keeps the hooks cheap for everybody else.

use proxy_common::{counters::Reason, slot::Target, socket::PeerRecord};

use super::view::View;
use crate::{count, maps::Family};

/// What a record names.
#[derive(Clone, Copy)]
pub(super) struct Peer<A> {
    pub(super) vip: Target<A>,
    pub(super) backend: Target<A>,
}

/// The record of one socket, which may name a peer.
pub(super) struct Record<A>(*mut PeerRecord<A>);

impl<A: Family> Record<A> {
    /// The record of this hook's socket, if it has one.
    #[inline(always)]
    pub(super) fn of<V: View<Addr = A>>(view: &V) -> Option<Self> {
        // SAFETY: the map and this hook's socket (kernel 5.3, fb85c4a730af); no value is handed over.
        let record = unsafe { A::peers().get_ptr_mut(view.ctx()) };
        if record.is_null() { None } else { Some(Self(record)) }
    }

    /// The record of this hook's socket, made if it had none; `None` if the kernel has no room in the socket.
    #[inline(always)]
    pub(super) fn of_or_new<V: View<Addr = A>>(view: &V) -> Option<Self> {
        // SAFETY: as in `of`; no initial value, so a new record is all zeroes.
        let record = unsafe { A::peers().get_or_insert_ptr_mut(view.ctx(), None) };
        if record.is_null() {
            count::reason(Reason::NotRemembered);
            return None;
        }
        Some(Self(record))
    }

    #[inline(always)]
    pub(super) fn peer(&self) -> Option<Peer<A>> {
        // SAFETY: a live record, checked for null when it was looked up; the socket's lock is held (see the module above).
        let record = unsafe { self.0.read() };
        if record.service == 0 {
            return None;
        }
        Some(Peer {
            vip: Target { addr: record.vip, port: record.vip_port },
            backend: Target { addr: record.backend, port: record.backend_port },
        })
    }

    #[inline(always)]
    pub(super) fn set(&self, peer: Peer<A>, service: u32, proto: u8) {
        let Peer { vip, backend } = peer;
        let record = PeerRecord {
            vip: vip.addr,
            backend: backend.addr,
            vip_port: vip.port,
            backend_port: backend.port,
            service,
            proto,
            pad: [0; 3],
        };
        // SAFETY: as in `peer`.
        unsafe { self.0.write(record) };
    }

    /// Forgets the peer.
    #[inline(always)]
    pub(super) fn clear(&self) {
        // SAFETY: as in `peer`.
        unsafe { (&raw mut (*self.0).service).write(0) };
    }
}
