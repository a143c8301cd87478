//! The connection table: finding, opening, confirming, repairing and forgetting flows.
//!
//! A pair of entries starts half-open and moves to the established map once both sides have spoken: for TCP when the opener
//! acknowledges the peer's answer (who spoofs a SYN does not know its number, so a flood evicts only half-open entries), for
//! SCTP when it uses the tag in it, for UDP with the first answer. What is said of TCP below holds for SCTP, whose chunks
//! the parser has put in TCP's terms.

use aya_ebpf::bindings::{BPF_ANY, BPF_NOEXIST};
use proxy_common::{
    Be16,
    connection::{
        self, ConnectionKey, ConnectionValue, flags, hook, masquerade_key, state,
        times::{SCTP_ESTABLISHED, SCTP_OTHERS, TCP_HALF_OPEN},
    },
    counters::Reason,
    proto,
};

use super::packet::{Frame, Header, load, tcp_flags};
use crate::{
    apart::apart,
    clock, count, globals,
    maps::{Packet, Work, kind},
    sealed,
};

/// What a peer may have sent behind its SYN-ACK (TCP Fast Open) before the first acknowledgement that gets through to us. A
/// forged one is in it once in 4096 tries.
const FIRST_WINDOW: u32 = 1 << 20;

/// What an insert that must not find its key says if it does.
const EEXIST: i32 = -17;

/// Where an entry was found that was copied and checked against its seal.
pub(crate) struct Hit<A> {
    /// For notes; `None`: only a second look found it. Such a packet leaves none, which the next one does.
    live: Option<*mut ConnectionValue<A>>,
    pub(crate) established: bool,
}

/// What a called function returns that has nothing to say: one that returns nothing leaves a pointer to its stack in the
/// register, and the verifier refuses that.
pub(crate) type Void = u32;
pub(crate) const VOID: Void = 0;

/// Takes a [`Void`], so that the compiler does not drop it from the function.
#[inline(always)]
pub(crate) fn void(returned: Void) {
    core::hint::black_box(returned);
}

/// Room of the slow path, one for each function that needs some: IPv6 entries do not fit the 512 bytes of stack that a chain
/// of calls shares. Per CPU: tc programs run with bottom halves off and do not interrupt one another. (With PREEMPT_RT they may since
/// 3253cb49cbad; `check` warns of it.)
#[derive(Clone, Copy)]
pub(crate) enum Room {
    Over,
    Forget,
    Confirm,
    Enter,
    Masquerade,
    Icmp,
    Main,
}

impl Room {
    #[inline(always)]
    pub(crate) fn work<A: Header>(self) -> Option<&'static mut Work<A>> {
        // SAFETY: an element of this CPU's own that only the function named by `self` uses, and none of them re-enters itself. Where
        // programs of one CPU preempt one another (PREEMPT_RT) words may be another packet's; they are plain integers.
        A::work().get_ptr_mut(self as u32).map(|work| unsafe { &mut *work })
    }
}

/// How much may come into the tables of established TCP and SCTP flows. Where an agent says so nothing that is open is cut for what is new: a flow is
/// not opened without room for it, and one for which there is none any more by the time it is confirmed stays half-open until there is.
mod spare {
    use proxy_common::{Address, counters::Spare, proto};

    use crate::{clock, maps::SPARE};

    /// What a pair takes.
    const ENTRIES: i64 = 2;

    /// The table's element, if an agent keeps it.
    #[inline(always)]
    fn kept<A: Address>(protocol: u8) -> Option<*mut Spare> {
        if protocol == proto::UDP {
            return None;
        }
        let spare = SPARE.get_ptr_mut(if A::LEN == 4 { 0 } else { 1 })?;
        // SAFETY: a live element; one aligned word.
        let until = unsafe { (&raw const (*spare).until).read_volatile() };
        if clock::now_secs() as u64 <= until { Some(spare) } else { None }
    }

    /// Whether a flow may be opened that is to come into the table.
    #[inline(always)]
    pub(super) fn has<A: Address>(protocol: u8) -> bool {
        match kept::<A>(protocol) {
            // SAFETY: a live element; one aligned word.
            Some(spare) => unsafe { (&raw const (*spare).entries).read_volatile() > 0 },
            None => true,
        }
    }

    /// Takes the room of a pair, of the reserve, too; false: there is none. CPUs that do so at once may all find the last: the agent keeps more
    /// back than there are CPUs.
    #[inline(always)]
    pub(super) fn take<A: Address>(protocol: u8) -> bool {
        let Some(spare) = kept::<A>(protocol) else { return true };
        // SAFETY: a live element; two aligned words, of which the latter is always the same.
        let left = unsafe {
            (&raw const (*spare).entries).read_volatile().wrapping_add((&raw const (*spare).reserve).read_volatile())
        };
        if left <= 0 {
            return false;
        }
        // SAFETY: of a live element, 8-byte aligned.
        unsafe { subtract(&raw mut (*spare).entries) };
        true
    }

    /// The same of one that comes in whatever there is: the other half of a flow that is open.
    #[inline(always)]
    pub(super) fn take_anyway<A: Address>(protocol: u8) {
        if let Some(spare) = kept::<A>(protocol) {
            // SAFETY: of a live element, 8-byte aligned.
            unsafe { subtract(&raw mut (*spare).entries) };
        }
    }

    /// # Safety
    ///
    /// `entries` is of a live map value, aligned, and everybody writes it in one piece.
    #[inline(always)]
    unsafe fn subtract(entries: *mut i64) {
        // SAFETY: by the contract. `BPF_XADD`: what was there before is not asked for.
        #[cfg(target_arch = "bpf")]
        unsafe {
            use core::intrinsics::{AtomicOrdering, atomic_xadd};

            atomic_xadd::<i64, i64, { AtomicOrdering::Relaxed }>(entries, -ENTRIES);
        }
        // SAFETY: as above.
        #[cfg(not(target_arch = "bpf"))]
        unsafe {
            use core::sync::atomic::{AtomicI64, Ordering};

            AtomicI64::from_ptr(entries).fetch_sub(ENTRIES, Ordering::Relaxed);
        }
    }
}

/// The established flows of the key's protocol: UDP's have a map of their own.
mod established {
    use proxy_common::{
        connection::{ConnectionKey, ConnectionValue},
        proto,
    };

    use crate::maps::Family;

    #[inline(always)]
    pub(super) fn get<A: Family>(key: &ConnectionKey<A>) -> Option<*mut ConnectionValue<A>> {
        if key.proto == proto::UDP { A::answered().get_ptr_mut(key) } else { A::established().get_ptr_mut(key) }
    }

    #[inline(always)]
    pub(super) fn insert<A: Family>(key: &ConnectionKey<A>, value: &ConnectionValue<A>, flags: u32) -> Result<(), i32> {
        if key.proto == proto::UDP {
            A::answered().insert(key, value, flags.into())
        } else {
            A::established().insert(key, value, flags.into())
        }
    }

    #[inline(always)]
    pub(super) fn remove<A: Family>(key: &ConnectionKey<A>) {
        // Gone already is fine.
        let _ = if key.proto == proto::UDP { A::answered().remove(key) } else { A::established().remove(key) };
    }
}

#[inline(always)]
fn look<A: Header>(
    live: Option<*mut ConnectionValue<A>>,
    key: &ConnectionKey<A>,
    to: &mut ConnectionValue<A>,
) -> Option<Result<*mut ConnectionValue<A>, ()>> {
    let live = live?;
    // SAFETY: a live pointer to a value of this map; ConnectionValue is plain integers.
    unsafe { sealed::copy_to(live, to) };
    Some(if to.is_sealed_for(key) { Ok(live) } else { Err(()) })
}

#[inline(always)]
fn find_once<A: Header>(key: &ConnectionKey<A>, to: &mut ConnectionValue<A>) -> Result<Option<Hit<A>>, ()> {
    if let Some(found) = look(established::get(key), key, to) {
        return found.map(|live| Some(Hit { live: Some(live), established: true }));
    }
    match look(A::half_open().get_ptr_mut(key), key, to) {
        Some(found) => found.map(|live| Some(Hit { live: Some(live), established: false })),
        None => Ok(None),
    }
}

/// Copies the entry of `key` to `to`. A torn read is looked up again, at most twice; then it counts as a miss, though it [is there](is_there).
///
/// An entry that moves on is in the established map before it leaves the half-open one. Who looks in the same order may pass it on the
/// way, so it is gone only if a second look into the first map says so: a packet that went untranslated would cost the connection.
#[inline(always)]
pub(crate) fn find<A: Header>(key: &ConnectionKey<A>, to: &mut ConnectionValue<A>) -> Option<Hit<A>> {
    let found = match find_once(key, to) {
        Ok(Some(hit)) => return Some(hit),
        Ok(None) => look_again(key, to),
        Err(()) => {
            count::reason(Reason::TornRead);
            peek(key, to)
        }
    };
    if found == 0 { None } else { Some(Hit { live: None, established: found == 2 }) }
}

/// Whether there is an entry, be it one that cannot be read whole. In this order, since one that moves on is in the established map before
/// it leaves the other.
#[inline(always)]
pub(crate) fn is_there<A: Header>(key: &ConnectionKey<A>) -> bool {
    A::half_open().get_ptr_mut(key).is_some() || established::get(key).is_some()
}

/// Whether there is an entry of `key` (egress) that a new flow of these ends would be rewritten by: any, but for one that masquerades where that is
/// what it `needs`. Of a flow that is over, too: another port does no harm. Read without its seal, since one that is written just now is
/// another flow's or none, and another port or the old answer is right for both.
#[inline(always)]
pub(crate) fn would_be_rewritten<A: Header>(key: &ConnectionKey<A>, needs: bool) -> bool {
    let is_in_the_way = |live: Option<*mut ConnectionValue<A>>| {
        live.is_some_and(|live| {
            // SAFETY: a live pointer to a value of this map; a byte, copied at once.
            let said = unsafe { (&raw const (*live).flags).read_volatile() };
            !needs || said & flags::MASQUERADE == 0
        })
    };
    is_in_the_way(A::half_open().get_ptr_mut(key)) || is_in_the_way(established::get(key))
}

apart! {
    /// The last look of [`find`], among the established flows alone: 0 for none, 2 if it is there.
    fn look_again[look_again_v4, look_again_v6](reads key: ConnectionKey; writes to: ConnectionValue;) -> u32 = found_again;

    /// [`find`] for the slow path: 0 for none, 1 half-open, 2 established.
    pub(crate) fn peek[peek_v4, peek_v6](reads key: ConnectionKey; writes to: ConnectionValue;) -> u32 = found;

    /// [`pair`](connection::pair) into room of the slow path.
    fn put_pair[put_pair_v4, put_pair_v6](
        reads key: ConnectionKey, value: ConnectionValue; writes to_key: ConnectionKey, to_value: ConnectionValue;
    ) -> u32 = paired;

    /// The key of that alone.
    pub(crate) fn put_pair_key[put_pair_key_v4, put_pair_key_v6](
        reads key: ConnectionKey, value: ConnectionValue; writes to: ConnectionKey;
    ) -> u32 = paired_key;

    /// Puts back the half of an established pair that was evicted, and for a masqueraded flow the request for its other pair, with the port
    /// that it had.
    fn repair[repair_v4, repair_v6](reads key: ConnectionKey, value: ConnectionValue; writes;) -> u32 = repaired;

    /// Fresh notes and the seal.
    pub(crate) fn freshen[freshen_v4, freshen_v6](reads key: ConnectionKey; writes value: ConnectionValue;) -> u32 = freshened;

    /// Whether a new connection may take this flow's place (1): closed on both sides, reset, or idle beyond its time-out.
    pub(crate) fn is_over[is_over_v4, is_over_v6](
        reads key: ConnectionKey, value: ConnectionValue; writes; established: u32
    ) -> u32 = over;

    pub(crate) fn remove[remove_v4, remove_v6](reads key: ConnectionKey; writes;) -> u32 = removed;

    /// Removes a flow: the pair of `key`, and the pair that masquerades it, if there is one.
    pub(crate) fn forget[forget_v4, forget_v6](reads key: ConnectionKey, value: ConnectionValue; writes;) -> u32 = forgotten;

    /// Enters a pair as half-open; `pair_key` and `pair_value` are its other half. That one goes first and claims the reply tuple, so
    /// two flows that two CPUs open at once never share one.
    ///
    /// [`TAKEN`]: nothing was entered. [`LOST`]: the same, counted.
    pub(crate) fn open[open_v4, open_v6](
        reads key: ConnectionKey; writes value: ConnectionValue, pair_key: ConnectionKey, pair_value: ConnectionValue;
    ) -> u32 = opened;

    /// Enters the masquerade pair of `key` (egress): the reverse entry claims the port, so two flows never share one. `look`: at who
    /// has the port; a flow that is over is put out of it, and one that was this flow's before its own entry was evicted is
    /// its again. Without it only a free port is taken, which is quick to find out.
    pub(crate) fn claim_masquerade[claim_masquerade_v4, claim_masquerade_v6](
        reads key: ConnectionKey;
        writes value: ConnectionValue, reverse_key: ConnectionKey, reverse: ConnectionValue;
        look: u32
    ) -> u32 = claimed;
}

/// What [`open`] and [`claim_masquerade`] say: somebody else has the tuple.
pub(crate) const TAKEN: u32 = 0;
pub(crate) const ENTERED: u32 = 1;
/// There was no room.
pub(crate) const LOST: u32 = 2;

#[inline(always)]
fn found_again<A: Header>(key: &ConnectionKey<A>, to: &mut ConnectionValue<A>) -> u32 {
    for _ in 0..2 {
        match look(established::get(key), key, to) {
            Some(Ok(_)) => return 2,
            Some(Err(())) => count::reason(Reason::TornRead),
            None => return 0,
        }
    }
    0
}

#[inline(always)]
fn found<A: Header>(key: &ConnectionKey<A>, to: &mut ConnectionValue<A>) -> u32 {
    for _ in 0..2 {
        match find_once(key, to) {
            Ok(Some(Hit { established, .. })) => return if established { 2 } else { 1 },
            Ok(None) => return found_again(key, to),
            Err(()) => count::reason(Reason::TornRead),
        }
    }
    0
}

#[inline(always)]
fn paired<A: Header>(
    key: &ConnectionKey<A>,
    value: &ConnectionValue<A>,
    to_key: &mut ConnectionKey<A>,
    to_value: &mut ConnectionValue<A>,
) -> Void {
    connection::put_pair(key, value, to_key, to_value);
    VOID
}

#[inline(always)]
fn paired_key<A: Header>(key: &ConnectionKey<A>, value: &ConnectionValue<A>, to: &mut ConnectionKey<A>) -> Void {
    connection::put_pair_key(key, value, to);
    VOID
}

/// Whether packets on this entry go from the flow's opener to its peer.
#[inline(always)]
fn is_forward<A: Header>(key: &ConnectionKey<A>, value: &ConnectionValue<A>) -> bool {
    let masquerade = value.flags & flags::MASQUERADE != 0;
    if key.hook == hook::INGRESS { !masquerade } else { masquerade }
}

impl<A: Header> Hit<A> {
    /// Whether XDP is to leave this packet to the stack, which looks for a neighbour that is gone: it is sent again for want of an answer.
    #[inline(always)]
    pub(crate) fn is_sent_again(&self, key: &ConnectionKey<A>, value: &ConnectionValue<A>, packet: &Packet<A>) -> bool {
        if packet.proto != proto::UDP {
            // Each has an entry, so it is not the first one.
            return packet.is_syn() || packet.is_syn_ack() && (self.established || value.state & state::NUMBERED != 0);
        }
        let now = clock::now_secs();
        if self.established || !is_forward(key, value) || now.wrapping_sub(value.checked).cast_signed() <= 1 {
            return false;
        }
        // One each second or two: who sends and expects no answer is not slowed down.
        if let Some(live) = self.live {
            // SAFETY: as for the other notes.
            unsafe { note_checked(live, value, now) };
        }
        true
    }

    /// Notes a packet on this entry, moves the flow on to established where it is due, looks after its pair.
    ///
    /// The notes go into an element that could have been recycled since the seal was checked. So it is looked at once more just
    /// before; what is left is a few instructions wide, and then another flow's idle time or state is off, on which no
    /// rewrite ever depends.
    #[inline(always)]
    pub(crate) fn note(
        &self,
        ctx: &impl Frame,
        key: &ConnectionKey<A>,
        value: &mut ConnectionValue<A>,
        packet: &Packet<A>,
    ) {
        let Some(live) = self.live else { return };
        let now = clock::now_secs();
        let mut seen = value.state | state::SEEN;
        if packet.proto != proto::UDP {
            if packet.tcp_flags & tcp_flags::FIN != 0 {
                seen |= state::FIN;
            }
            // Who has reset the connection says no more. Who goes on has not: the reset was forged, or late, and its receiver ignored it.
            if packet.tcp_flags & tcp_flags::RST != 0 {
                seen |= state::RST;
            } else {
                seen &= !state::RST;
            }
            // Ports used anew: what the last connection ended with no longer counts.
            if packet.is_syn() {
                seen = state::SEEN;
            }
        }
        // SAFETY: a live map value (see above for recycling); each store is one aligned word or byte. Unchanged notes are
        // not stored, to leave the cache line to its readers.
        unsafe {
            if (seen != value.state || now != value.seen) && is_still(live, value) {
                if seen != value.state {
                    (&raw mut (*live).state).write_volatile(seen);
                }
                (&raw mut (*live).seen).write_volatile(now);
            }
        }
        value.state = seen;
        if !self.established {
            let forward = is_forward(key, value);
            let due = if packet.proto == proto::UDP {
                !forward
            } else {
                forward && packet.tcp_flags & (tcp_flags::SYN | tcp_flags::ACK | tcp_flags::RST) == tcp_flags::ACK
            };
            if due && value.flags & flags::PENDING == 0 {
                void(confirm(ctx, key, value, packet));
            } else if !forward && packet.is_syn_ack() {
                void(number(ctx, packet, key, value, live));
            }
        } else if now.wrapping_sub(value.checked).cast_signed() > 1 {
            // SAFETY: as above.
            unsafe { note_checked(live, value, now) };
            void(repair(key, value));
        }
    }
}

/// Whether the element still holds the entry that was copied to `value`.
///
/// # Safety
///
/// `live` is a live map value.
#[inline(always)]
unsafe fn is_still<A: Header>(live: *const ConnectionValue<A>, value: &ConnectionValue<A>) -> bool {
    // SAFETY: by the contract; an aligned word.
    unsafe { (&raw const (*live).seal).read_volatile() == value.seal }
}

/// Writes `checked`, unless the element is another flow's by now: there it may be the number that a SYN-ACK carried.
///
/// # Safety
///
/// As of [`is_still`].
#[inline(always)]
unsafe fn note_checked<A: Header>(live: *mut ConnectionValue<A>, value: &ConnectionValue<A>, checked: u32) {
    // SAFETY: by the contract; an aligned word.
    unsafe {
        if is_still(live, value) {
            (&raw mut (*live).checked).write_volatile(checked);
        }
    }
}

/// Whether both rewrite alike.
#[inline(always)]
fn is_same<A: Header>(one: &ConnectionValue<A>, other: &ConnectionValue<A>) -> bool {
    one.addr == other.addr && one.port == other.port && one.other == other.other
}

/// A 32-bit number of the TCP or SCTP header, if its bytes are there.
#[inline(always)]
fn header_number<A: Header>(ctx: &impl Frame, packet: &Packet<A>, offset: u32) -> Option<u32> {
    if packet.kind != kind::WHOLE { None } else { load::<u32>(ctx, packet.l4 + offset).map(u32::from_be) }
}

/// Notes in the answer's half-open entry what acknowledges this SYN-ACK. A peer that answers with another number than before (SCTP; SYN
/// cookies, which depend on the opener's own number) moves that one on to the opener's entry: the last two count.
#[inline(never)]
fn number<A: Header>(
    ctx: &impl Frame,
    packet: &Packet<A>,
    key: &ConnectionKey<A>,
    value: &ConnectionValue<A>,
    live: *mut ConnectionValue<A>,
) -> Void {
    // The sequence number, or the tag behind the INIT ACK's chunk header.
    let (offset, further) = if packet.proto == proto::TCP { (4, 1) } else { (16, 0) };
    let Some(wanted) = header_number(ctx, packet, offset) else { return VOID };
    let wanted = wanted.wrapping_add(further);
    let mut noted = state::NUMBERED;
    if value.state & state::NUMBERED != 0 {
        if value.checked == wanted {
            return VOID;
        }
        let Some(Work { key: opener_key, found, .. }) = Room::Confirm.work::<A>() else { return VOID };
        void(put_pair_key(key, value, opener_key));
        let Some(Hit { live: Some(opener), established: false }) = find(opener_key, found) else { return VOID };
        // SAFETY: as for the other notes.
        unsafe { note_checked(opener, found, value.checked) };
        noted |= state::RENUMBERED;
    }
    // SAFETY: as for the other notes; the number goes before the word that it is there.
    unsafe {
        if is_still(live, value) {
            (&raw mut (*live).checked).write_volatile(wanted);
            (&raw mut (*live).state).write_volatile(value.state | noted);
        }
    }
    VOID
}

/// Whether the opener's packet acknowledges what the peer sent: its SYN-ACK, and data behind it if the first acknowledgement was lost. Where
/// the peer's number is not known (a pair that was put back in mid-flow), any does, unless the peer refused.
#[inline(always)]
fn acknowledges<A: Header>(
    ctx: &impl Frame,
    packet: &Packet<A>,
    opener: &ConnectionValue<A>,
    answer: &ConnectionValue<A>,
) -> bool {
    if answer.state & state::NUMBERED == 0 {
        return answer.state & state::RST == 0;
    }
    // The acknowledgement, or the tag that every packet carries.
    let (offset, window) = if packet.proto == proto::TCP { (8, FIRST_WINDOW) } else { (4, 1) };
    let Some(number) = header_number(ctx, packet, offset) else { return false };
    number.wrapping_sub(answer.checked) < window
        || answer.state & state::RENUMBERED != 0 && number.wrapping_sub(opener.checked) < window
}

/// Moves a pair to the established map, if its other side has spoken: with this packet, for UDP.
#[inline(never)]
fn confirm<A: Header>(
    ctx: &impl Frame,
    key: &ConnectionKey<A>,
    value: &ConnectionValue<A>,
    packet: &Packet<A>,
) -> Void {
    let answered = packet.proto == proto::UDP;
    let Some(Work { key: reverse_key, value: reverse, found, .. }) = Room::Confirm.work::<A>() else { return VOID };
    void(put_pair(key, value, reverse_key, reverse));
    if peek(reverse_key, found) == 0 {
        if !answered {
            return VOID;
        }
    } else if !is_same(found, reverse) || !answered && found.state & state::SEEN == 0 {
        // Another flow's by now: two CPUs opened at once, or one half was evicted and the client went on elsewhere.
        return VOID;
    } else if !answered && !acknowledges(ctx, packet, value, found) {
        return VOID;
    } else {
        reverse.state = found.state & !(state::NUMBERED | state::RENUMBERED);
        reverse.seen = found.seen;
    }
    if !spare::take::<A>(packet.proto) {
        // With a later packet there may be room, and that need not acknowledge the same again.
        if let Some(live) = A::half_open().get_ptr_mut(&*reverse_key) {
            // SAFETY: as for the other notes.
            unsafe {
                if is_still(live, found) {
                    (&raw mut (*live).state).write_volatile(reverse.state);
                }
            }
        }
        return VOID;
    }
    let now = clock::now_secs();
    reverse.checked = now;
    *found = ConnectionValue { seen: now, checked: now, ..*value };
    // The reverse entry first: once the opener's entry is established, nothing looks for the half-open ones.
    if established::insert(reverse_key, reverse, BPF_ANY).is_ok() && established::insert(key, found, BPF_ANY).is_ok() {
        let _ = A::half_open().remove(key);
        let _ = A::half_open().remove(&*reverse_key);
        count::confirmed::<A>(packet.proto);
    } else {
        count::reason(Reason::InsertFailed);
    }
    VOID
}

#[inline(always)]
fn repaired<A: Header>(key: &ConnectionKey<A>, value: &ConnectionValue<A>) -> Void {
    let Some(Work { key: other_key, value: other, found, .. }) = Room::Confirm.work::<A>() else { return VOID };
    void(put_pair(key, value, other_key, other));
    let now = clock::now_secs();
    let (mut masquerade, mut given) = (false, Be16(0));
    if peek(other_key, found) == 0 {
        other.seen = now;
        other.checked = now;
        if established::insert(other_key, other, BPF_NOEXIST).is_ok() {
            spare::take_anyway::<A>(key.proto);
            count::reason(Reason::PairRepaired);
        }
    } else if !is_same(found, other) && is_forward(key, value) {
        // The other half was evicted and its tuple given to another flow, which now gets our answers: we have to
        // leave it. (An answer's entry without its way there harms nobody: late answers still show the VIP.)
        void(remove(key));
        masquerade = value.flags & flags::MASQUERADE != 0;
        *other_key = *key;
    }
    if key.hook == hook::INGRESS && value.flags & flags::NEEDS_MASQUERADE != 0 {
        *other_key = masquerade_key(key, value);
        masquerade = peek(other_key, found) == 0;
        given = value.given;
    }
    if masquerade {
        // Whether that saves the flow is for the egress hook to say.
        let _ = request_masquerade(other_key, other, value.service, given);
    }
    VOID
}

/// Asks the egress hook to masquerade: only there is the device known, and with it the source address (contract A75). `given` is the
/// port that the flow had before, or 0.
#[inline(always)]
fn request_masquerade<A: Header>(
    key: &ConnectionKey<A>,
    room: &mut ConnectionValue<A>,
    service: u32,
    given: Be16,
) -> Result<(), i32> {
    *room = ConnectionValue { service, port: given, flags: flags::PENDING | flags::MASQUERADE, ..Default::default() };
    void(freshen(key, room));
    A::half_open().insert(key, &*room, BPF_ANY.into())
}

#[inline(always)]
fn freshened<A: Header>(key: &ConnectionKey<A>, value: &mut ConnectionValue<A>) -> Void {
    let now = clock::now_secs();
    value.seen = now;
    value.checked = now;
    value.state = state::SEEN;
    value.pad2 = 0;
    value.given = Be16(0);
    value.seal = value.seal_for(key);
    VOID
}

/// Whether the entry alone has been idle long enough for [`is_over`] to be worth asking for a packet that opens nothing by itself.
#[inline(always)]
pub(crate) fn may_be_idle<A: Header>(key: &ConnectionKey<A>, value: &ConnectionValue<A>) -> bool {
    let shortest = match key.proto {
        proto::UDP => globals::udp_secs(),
        proto::SCTP => SCTP_ESTABLISHED,
        _ => TCP_HALF_OPEN,
    };
    clock::since(value.seen) > shortest
}

#[inline(always)]
fn over<A: Header>(key: &ConnectionKey<A>, value: &ConnectionValue<A>, established: u32) -> u32 {
    if value.flags & flags::PENDING != 0 {
        return 0;
    }
    let Some(Work { key: other_key, found, .. }) = Room::Over.work::<A>() else { return 0 };
    void(put_pair_key(key, value, other_key));
    let (other_state, other_seen) = if peek(other_key, found) != 0 { (found.state, found.seen) } else { (0, 0) };
    let seen = if other_seen > value.seen { other_seen } else { value.seen };
    let idle = clock::since(seen);
    if key.proto != proto::UDP {
        if (value.state | other_state) & state::RST != 0 || value.state & other_state & state::FIN != 0 {
            return 1;
        }
        let closes = (value.state | other_state) & state::FIN != 0;
        if key.proto == proto::SCTP {
            return u32::from(idle > if established != 0 && !closes { SCTP_ESTABLISHED } else { SCTP_OTHERS });
        }
        let established_secs = if closes { globals::tcp_close_wait_secs() } else { globals::tcp_established_secs() };
        return u32::from(idle > if established != 0 { established_secs } else { TCP_HALF_OPEN });
    }
    u32::from(idle > if established != 0 { globals::udp_stream_secs() } else { globals::udp_secs() })
}

/// Notes in the main pair of the flow that `key` (egress) masquerades which port it was given. `pair_key`, `other_key` and `found` are
/// room.
#[inline(never)]
pub(crate) fn note_given<A: Header>(
    key: &ConnectionKey<A>,
    given: Be16,
    pair_key: &mut ConnectionKey<A>,
    other_key: &mut ConnectionKey<A>,
    found: &mut ConnectionValue<A>,
) -> Void {
    *pair_key = ConnectionKey::new(hook::EGRESS, key.proto, key.dst, key.dport, key.src, key.sport);
    let Some(Hit { live: Some(live), .. }) = find(pair_key, found) else { return VOID };
    if found.flags & (flags::NEEDS_MASQUERADE | flags::PENDING) != flags::NEEDS_MASQUERADE {
        return VOID;
    }
    // SAFETY: as for the other notes.
    unsafe { write_given(live, found, given) };
    void(put_pair_key(pair_key, found, other_key));
    if let Some(Hit { live: Some(live), .. }) = find(other_key, found) {
        // SAFETY: as above.
        unsafe { write_given(live, found, given) };
    }
    VOID
}

/// # Safety
///
/// As of [`is_still`].
#[inline(always)]
unsafe fn write_given<A: Header>(live: *mut ConnectionValue<A>, value: &ConnectionValue<A>, given: Be16) {
    // SAFETY: by the contract; an aligned half-word.
    unsafe {
        if is_still(live, value) {
            (&raw mut (*live).given).write_volatile(given);
        }
    }
}

#[inline(always)]
fn removed<A: Header>(key: &ConnectionKey<A>) -> Void {
    established::remove(key);
    let _ = A::half_open().remove(key);
    VOID
}

#[inline(always)]
fn forgotten<A: Header>(key: &ConnectionKey<A>, value: &ConnectionValue<A>) -> Void {
    let Some(Work { key: other_key, value: other, found, spare_key, .. }) = Room::Forget.work::<A>() else {
        return VOID;
    };
    void(put_pair(key, value, other_key, other));
    let half = established::get(other_key).or_else(|| A::half_open().get_ptr_mut(&*other_key));
    let is_anothers = half.is_some_and(|live| {
        // SAFETY: a live pointer to a value of this map; ConnectionValue is plain integers. One that is torn is left to its time-out.
        unsafe { sealed::copy_to(live, found) };
        !is_same(found, other)
    });
    // Where the reply tuple is another flow's by now, so is what masquerades that one.
    let keeps = is_anothers && key.hook == hook::INGRESS;
    if value.flags & flags::NEEDS_MASQUERADE != 0 && !keeps {
        *spare_key =
            if key.hook == hook::INGRESS { masquerade_key(key, value) } else { masquerade_key(other_key, other) };
        if peek(spare_key, found) != 0 && found.flags & flags::MASQUERADE != 0 {
            void(remove(spare_key));
            if found.flags & flags::PENDING == 0 {
                void(put_pair(spare_key, found, other_key, other));
                // The port may be another flow's by now.
                if peek(other_key, found) != 0 && is_same(found, other) {
                    void(remove(other_key));
                }
            }
        }
    }
    void(remove(key));
    if !is_anothers {
        void(put_pair_key(key, value, other_key));
        void(remove(other_key));
    }
    VOID
}

#[inline(always)]
fn opened<A: Header>(
    key: &ConnectionKey<A>,
    value: &mut ConnectionValue<A>,
    pair_key: &mut ConnectionKey<A>,
    pair_value: &mut ConnectionValue<A>,
) -> u32 {
    if !spare::has::<A>(key.proto) {
        count::reason(Reason::TableFull);
        return LOST;
    }
    void(freshen(key, value));
    void(put_pair(key, value, pair_key, pair_value));
    match A::half_open().insert(&*pair_key, &*pair_value, BPF_NOEXIST.into()) {
        Ok(()) => {}
        Err(EEXIST) => return TAKEN,
        Err(_) => {
            count::reason(Reason::InsertFailed);
            return LOST;
        }
    }
    // Moved on by another CPU between the look and the claim: then it has the tuple.
    if established::get(pair_key).is_some() {
        let _ = A::half_open().remove(&*pair_key);
        return TAKEN;
    }
    let mut entered = A::half_open().insert(key, &*value, BPF_ANY.into()).is_ok();
    if entered && value.flags & flags::NEEDS_MASQUERADE != 0 {
        *pair_key = masquerade_key(key, value);
        // Of an earlier connection from this port to this backend its masquerade may be left alone, by an eviction or a sweep: found before
        // the request, it would go on with what that connection ended with.
        established::remove(pair_key);
        entered = request_masquerade(pair_key, pair_value, value.service, Be16(0)).is_ok();
    }
    if entered {
        return ENTERED;
    }
    void(forget(key, value));
    count::reason(Reason::InsertFailed);
    LOST
}

#[inline(always)]
fn claimed<A: Header>(
    key: &ConnectionKey<A>,
    value: &mut ConnectionValue<A>,
    reverse_key: &mut ConnectionKey<A>,
    reverse: &mut ConnectionValue<A>,
    look: u32,
) -> u32 {
    void(freshen(key, value));
    void(put_pair_key(key, value, reverse_key));
    if look != 0 {
        let held = peek(reverse_key, reverse);
        if held != 0 {
            let own = reverse.addr == key.src && reverse.port == key.sport && reverse.other == key.dport;
            if !own && is_over(reverse_key, reverse, u32::from(held == 2)) == 0 {
                return TAKEN;
            }
            void(forget(reverse_key, reverse));
        }
    }
    void(put_pair(key, value, reverse_key, reverse));
    if A::half_open().insert(&*reverse_key, &*reverse, BPF_NOEXIST.into()).is_err() {
        return TAKEN;
    }
    // Moved on by another CPU between the look and the claim: then it has the port.
    let lost = established::get(reverse_key).is_some();
    if lost || A::half_open().insert(key, &*value, BPF_ANY.into()).is_err() {
        let _ = A::half_open().remove(&*reverse_key);
        return if lost { TAKEN } else { LOST };
    }
    ENTERED
}
